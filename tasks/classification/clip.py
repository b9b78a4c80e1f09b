"""CLIPClassifier: a whole CLIP as a classifier over class names, zero-shot or with adapters on either tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tasks.base import Adapter, ZooTask
from tasks.classification.transforms import Preprocessing
from zoo.errors import OptionError
from zoo.registry import BACKBONES, HEADS, MODELS


@MODELS.register_module()
class CLIPClassifier(ZooTask):
    """Image -> embedding (B, D) -> logits against the sentences of K classes.

    Without training it is CLIP's zero-shot classifier. With adapters it is trained by cross-entropy of
    exp(logit_scale) cos(image, text) under CLIP's own fixed scale, as CLIP-LoRA does (Zanella and Ben Ayed 2024,
    arXiv 2405.18541). `where` of the adapter says on which tower and in which blocks:

        ["q", "k", "v"]                            all blocks of both towers
        ["q", "k", "v", "visual.*"]                the image tower only ("text.*": the text tower only)
        ["q", "k", "v", "depth=8-11"]              the last third of twelve blocks ("up"); "depth=0-3" is "bottom"

    Args:
        backbone: an `OpenCLIPModel` or its config.
        head: a `CLIPZeroShotHead` or its config, which holds class names and sentences.
        adapter, attention: see `ZooTask`.
        preprocessing: fields of `Preprocessing` that differ from the backbone's own.
        data_preprocessor: config of the batch preprocessor, without mean and std.

    Raises:
        OptionError: a backbone without both towers, an unknown preprocessing field, or mean and std given twice.
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
    ) -> None:
        body: nn.Module = BACKBONES.create(dict(backbone)) if isinstance(backbone, Mapping) else backbone
        if isinstance(head, Mapping):
            head = HEADS.create(dict(head), model=body)
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
        )
        self.preprocessing = chosen.as_dict()

    def extract(self, inputs: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> image embeddings (B, D)."""
        return self.backbone.encode_image(inputs)  # type: ignore[operator, no-any-return]
