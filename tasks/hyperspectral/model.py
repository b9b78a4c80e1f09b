"""SpectralClassifier: patches of a reduced cube -> the class of their middle pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from backbones.lola_specvit import freeze_all_but_lora
from heads.classification import ClassificationHead
from tasks.base import Adapter, ZooTask
from tasks.classification.model import feature_width
from tasks.hyperspectral.reduction import Reduction
from zoo.adapters.selection import classifier_names
from zoo.errors import OptionError
from zoo.registry import BACKBONES, HEADS, MODELS


@MODELS.register_module()
class SpectralClassifier(ZooTask):
    """Backbone -> pooled features (B, C) -> head -> logits (B, classes).

    The reduction from bands to components is kept in the model (`model.reduction`), so that a new cube can be
    predicted; the hook `SpectralReport` puts it there before training.

    Args:
        backbone: a module or config that takes (B, K, P, P): `TimmBackbone` with one of the LoLA-SpecViTs or any timm
            model built with `in_chans=K`, or a `SpectralFrontEnd` before one.
        head: config of a `ClassificationHead`, `in_features` is filled in; or without `type`
            (`dict(num_classes=9, label_smoothing=0.1)`) the backbone's own classifier is kept and gives the logits.
        patch: P. reduction: `dict(bands=B, components=K)`, and `unit_length` as in the data.
        adapter, attention, extra_losses: see `ZooTask`. A `SpectralFrontEnd` trains beside an adapter.
        lora_only: train what the gated LoRA layers of the backbone add and nothing else (and a head of its own):
            the published recipe.
        data_preprocessor: options of `SpectralPreprocessor`.

    Raises:
        OptionError: numbers of classes that differ, an unknown width, lora_only beside an adapter.
    """

    def __init__(
        self,
        backbone: nn.Module | dict[str, Any],
        head: nn.Module | dict[str, Any],
        *,
        patch: int,
        reduction: Mapping[str, Any],
        adapter: Adapter = None,
        attention: str | dict[str, Any] | list[Any] | None = None,
        lora_only: bool = False,
        data_preprocessor: Mapping[str, Any] | None = None,
        extra_losses: list[dict[str, Any]] | None = None,
    ) -> None:
        body: nn.Module = BACKBONES.create(dict(backbone)) if isinstance(backbone, Mapping) else backbone
        if lora_only and adapter is not None:
            raise OptionError("lora_only trains the backbone's own LoRA layers; leave `adapter` out")
        preprocessor = MODELS.create({"type": "SpectralPreprocessor", **(data_preprocessor or {})})
        super().__init__(
            body,
            self._head(body, head),
            adapter=adapter,
            attention=attention,
            data_preprocessor=preprocessor,
            extra_losses=extra_losses,
        )
        if lora_only:
            freeze_all_but_lora(body)
        front = getattr(body, "front", None)
        if adapter is not None and isinstance(front, nn.Module):
            front.requires_grad_(True)  # it is new: frozen, it would stay random
        self.reduction = Reduction(**reduction)
        self.patch = patch

    def _head(self, body: nn.Module, head: nn.Module | Mapping[str, Any]) -> nn.Module:
        if isinstance(head, nn.Module):
            return head
        if "type" not in head:
            own = OwnClassifier(**head)
            held = getattr(body, "num_classes", None)
            if held != own.num_classes:
                raise OptionError(f"the backbone has {held} classes, the head num_classes={own.num_classes}")
            return own
        if classifier_names(body):  # it would stay trainable, unused
            body.reset_classifier(0)  # type: ignore[operator]
        width = {} if "in_features" in head else {"in_features": feature_width(body)}
        made: nn.Module = HEADS.create(dict(head), **width)
        return made

    def extract(self, inputs: Tensor) -> Tensor:
        """(B, K, P, P) -> the vector that the backbone's own classifier would get, or its logits where it is kept."""
        if not isinstance(self.head, OwnClassifier) and hasattr(self.backbone, "forward_head"):
            return self.backbone.forward_head(self.backbone.forward_features(inputs), pre_logits=True)  # type: ignore[operator, no-any-return]
        return self.backbone(inputs)  # type: ignore[no-any-return]


class OwnClassifier(ClassificationHead):
    """Loss and decoding for a backbone that keeps its own classifier: logits pass through."""

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__(num_classes, label_smoothing)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, C) -> the same."""
        return logits


@MODELS.register_module()
class SpectralPreprocessor(BaseDataPreprocessor):  # type: ignore[misc]
    """Moves patches to the device; what happens to a patch alone happens here.

    Args:
        per_patch: give each feature zero mean and unit deviation over the patch (unbiased, + 1e-8): the authors'
            step. It takes away the level of the pixel itself, which is most of what tells materials apart.
        axis_order: "bands_first" feeds (B, K, P, P), as the paper means it. "rows_first" feeds what the authors'
            training script does, (B, rows, columns, bands): possible only because K = P, and `per_patch` then works
            on rows. For comparison with published numbers only.
        noise: deviation of Gaussian noise on the features while training.
        class_mix: alpha of a Beta distribution; while training, each patch is mixed with another patch of its own class
            in the batch, by a random share. Materials in a pixel mix linearly, so the mixture is a likely patch of the
            same class. 0 switches it off.

    Raises:
        OptionError: an unknown order, or rows_first with K != P.
    """

    def __init__(
        self,
        *,
        per_patch: bool = False,
        axis_order: Literal["bands_first", "rows_first"] = "bands_first",
        noise: float = 0.0,
        class_mix: float = 0.0,
    ) -> None:
        super().__init__()
        if axis_order not in ("bands_first", "rows_first"):
            raise OptionError(f"axis_order is 'bands_first' or 'rows_first', got {axis_order!r}")
        if noise < 0 or class_mix < 0:
            raise OptionError(f"noise and class_mix must be at least 0, got {noise} and {class_mix}")
        self.per_patch, self.axis_order, self.noise, self.class_mix = per_patch, axis_order, noise, class_mix

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """`dict(inputs=(B, K, P, P), data_samples=list)` -> the same on the device, float32."""
        batch = self.cast_data(data)
        inputs = _stacked(batch["inputs"])
        if training and self.class_mix:
            inputs = mixed_in_class(inputs, batch["data_samples"], self.class_mix)
        inputs = self.arrange(inputs)
        if training and self.noise:
            inputs = inputs + self.noise * torch.randn_like(inputs)
        return {"inputs": inputs, "data_samples": batch.get("data_samples")}

    def arrange(self, patches: Tensor) -> Tensor:
        """(B, K, P, P) -> the order and scale that the network sees."""
        x = patches.float()
        if self.axis_order == "rows_first":
            if x.shape[1] != x.shape[2]:
                raise OptionError(f"axis_order='rows_first' needs as many features as rows, got {tuple(x.shape)}")
            x = x.permute(0, 2, 3, 1).contiguous()
        if self.per_patch:
            x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-8)
        return x


def mixed_in_class(inputs: Tensor, data_samples: Sequence[dict[str, Any]], alpha: float) -> Tensor:
    """Each of (B, K, P, P) becomes w x + (1 - w) x' with x' of the same class and w from Beta(alpha, alpha)."""
    labels = torch.tensor([int(sample["label"]) for sample in data_samples])
    order = torch.argsort(labels + torch.rand(len(labels)))  # by class, at random within
    partner = torch.empty_like(order)
    for group in order.split(torch.bincount(labels).tolist()):
        partner[group] = group.roll(1)  # the only one of its class is its own partner
    share = torch.distributions.Beta(alpha, alpha).sample((len(labels), 1, 1, 1)).to(inputs)
    return share * inputs + (1 - share) * inputs[partner.to(inputs.device)]


def _stacked(patches: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(patches, Tensor):
        sizes = sorted({tuple(patch.shape) for patch in patches})
        if len(sizes) > 1:
            raise OptionError(f"a batch holds patches of shapes {sizes}")
        patches = torch.stack(list(patches))
    if patches.ndim != 4:
        raise OptionError(f"patches must be (B, features, P, P), got {tuple(patches.shape)}")
    return patches
