"""ImageClassifier: any backbone that yields one vector an image, and a classifier head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tasks.base import Adapter, ZooTask
from tasks.classification.transforms import Preprocessing
from zoo.adapters.selection import classifier_names
from zoo.errors import OptionError
from zoo.registry import BACKBONES, HEADS, MODELS


@MODELS.register_module()
class ImageClassifier(ZooTask):
    """Backbone -> pooled features (B, C) -> head -> logits (B, K).

    Args:
        backbone: a module or config: any timm model (ours too), an open_clip tower, or a module that maps images to
            (B, C). A classifier that the backbone still has is left out.
        head: a module or config of a `ClassificationHead`; `in_features` is filled in from the backbone.
        adapter, attention, extra_losses: see `ZooTask`.
        preprocessing: fields of `Preprocessing` that differ from the backbone's own; data, so that it is saved with
            the model. `model.preprocessing` holds the result, all fields filled in.
        data_preprocessor: config of the batch preprocessor; its mean and std come from `preprocessing`, so the config
            only needs to add what is special (`batch_augment=...`).

    Raises:
        OptionError: the backbone's width is unknown, an unknown preprocessing field, or mean and std given twice.
    """

    def __init__(
        self,
        backbone: nn.Module | dict[str, Any],
        head: nn.Module | dict[str, Any],
        *,
        adapter: Adapter = None,
        attention: str | dict[str, Any] | list[Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        data_preprocessor: dict[str, Any] | None = None,
        extra_losses: list[dict[str, Any]] | None = None,
    ) -> None:
        body: nn.Module = BACKBONES.create(dict(backbone)) if isinstance(backbone, Mapping) else backbone
        if classifier_names(body):  # it would stay trainable, unused
            body.reset_classifier(0)  # type: ignore[operator]
        if isinstance(head, Mapping):
            width = {} if "in_features" in head else {"in_features": feature_width(body)}
            head = HEADS.create(dict(head), **width)
        chosen = Preprocessing.of(body, preprocessing)
        batch = {"type": "ZooPreprocessor", **(data_preprocessor or {})}
        if {"mean", "std"} & set(batch):
            raise OptionError("give mean and std once, in `preprocessing`, not in `data_preprocessor`")
        super().__init__(
            body,
            head,
            adapter=adapter,
            attention=attention,
            data_preprocessor=MODELS.create({**batch, **chosen.statistics()}),
            extra_losses=extra_losses,
        )
        self.preprocessing = chosen.as_dict()

    def extract(self, inputs: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C), the vector that the backbone's own classifier would get."""
        if hasattr(self.backbone, "forward_head"):
            return self.backbone.forward_head(self.backbone.forward_features(inputs), pre_logits=True)  # type: ignore[operator, no-any-return]
        return self.backbone(inputs)  # type: ignore[no-any-return]


def feature_width(backbone: nn.Module) -> int:
    """C of the pooled features: timm's `head_hidden_size` or `num_features`, open_clip's `output_dim`."""
    for name in ("head_hidden_size", "num_features", "output_dim"):
        width = getattr(backbone, name, None)
        if isinstance(width, int):
            return width
    raise OptionError(
        f"the width of {type(backbone).__name__}'s features is not known (it has no head_hidden_size, num_features "
        "or output_dim); give in_features in the head's config"
    )
