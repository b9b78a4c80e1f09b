"""ZooTask: a backbone, perhaps adapted, and a head, in the shape mmengine's runner trains."""

from __future__ import annotations

from typing import Any, Self

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from zoo.errors import OptionError
from zoo.freeze import frozen_norms_eval
from zoo.registry import BACKBONES, HEADS, MODELS

Adapter = str | dict[str, Any] | list[Any] | None


class ZooTask(BaseModel):  # type: ignore[misc]
    """Backbone + head with the three modes of mmengine: tensor, loss, predict.

    Args:
        backbone: a module, or its config for `BACKBONES.create`.
        head: a module with `loss(outputs, data_samples) -> dict of scalars` and
            `predict(outputs, data_samples) -> list`, its config for `HEADS.create`, or None (features come out).
        adapter: what `zoo.adapters.inject.attach` takes, with an optional `name`; a list attaches several.
            None leaves the backbone trainable as it is (full fine-tuning).
        attention: an attention plug-in, or a list of them, for `zoo.attention.plug.plug_attention`;
            replaced before adapters attach.
        data_preprocessor: a module or config; mmengine's default (device transfer only) if None.
        extra_losses: terms between two training forwards of a batch, such as MoSA's
            `[dict(type="SymmetricKL", weight=1.0)]` (zoo/adapters/consistency.py); each costs a second forward.
    """

    zoo_config: dict[str, Any]  # the plain-data config the model was built from; set by whoever built it

    def __init__(
        self,
        backbone: nn.Module | dict[str, Any],
        head: nn.Module | dict[str, Any] | None = None,
        *,
        adapter: Adapter = None,
        attention: str | dict[str, Any] | list[Any] | None = None,
        data_preprocessor: nn.Module | dict[str, Any] | None = None,
        extra_losses: list[dict[str, Any]] | None = None,
    ) -> None:
        if isinstance(data_preprocessor, dict):
            data_preprocessor = MODELS.create(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor)
        self.zoo_config = {}
        self.backbone: nn.Module = BACKBONES.create(backbone) if isinstance(backbone, dict) else backbone
        if attention is not None:
            from zoo.attention.plug import plug_attention

            for one in attention if isinstance(attention, list) else [attention]:
                plug_attention(self.backbone, one)
        if adapter is not None:
            from zoo.adapters.inject import attach_all

            attach_all(self.backbone, adapter)
        self.head: nn.Module | None = HEADS.create(head) if isinstance(head, dict) else head
        self.extra_losses: list[Any] = []
        if extra_losses:
            from zoo.adapters.consistency import CONSISTENCY

            self.extra_losses = [CONSISTENCY.create(one) for one in extra_losses]

    def extract(self, inputs: Tensor) -> Any:
        """Normalised inputs (B, C, H, W) -> what the head takes; by default the backbone's own output."""
        return self.backbone(inputs)

    def forward(self, inputs: Tensor, data_samples: list[dict[str, Any]] | None = None, mode: str = "tensor") -> Any:
        """Run one batch.

        Args:
            inputs: (B, C, H, W) float, as the preprocessor gives them.
            data_samples: B dicts with the targets; needed by mode "loss".
            mode: "tensor" -> head output; "loss" -> dict of scalar losses; "predict" -> list of B results.

        Raises:
            OptionError: an unknown mode, or "loss"/"predict" on a task without a head.
        """
        if mode == "loss" and self.extra_losses and self.head is not None:
            from zoo.adapters.consistency import two_pass_losses

            head, samples = self.head, data_samples or []
            return two_pass_losses(
                lambda: head(self.extract(inputs)), lambda outputs: self.loss(outputs, samples), self.extra_losses
            )
        features = self.extract(inputs)
        if mode == "tensor":
            return features if self.head is None else self.head(features)
        if self.head is None:
            raise OptionError(f"mode {mode!r} needs a head, and this {type(self).__name__} has none")
        if mode == "loss":
            return self.loss(self.head(features), data_samples or [])
        if mode == "predict":
            return self.predict(self.head(features), data_samples or [{} for _ in range(len(inputs))])
        raise OptionError(f"mode is 'tensor', 'loss' or 'predict', got {mode!r}")

    def loss(self, outputs: Any, data_samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Head outputs and targets -> named scalar losses; those with "loss" in their name are summed."""
        losses: dict[str, Tensor] = self.head.loss(outputs, data_samples)  # type: ignore[union-attr, operator]
        return losses

    def predict(self, outputs: Any, data_samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Head outputs -> one dict a sample."""
        results: list[dict[str, Any]] = self.head.predict(outputs, data_samples)  # type: ignore[union-attr, operator]
        return results

    def init_weights(self) -> None:
        """Do nothing: weights are set when the model is built; mmengine would re-initialise timm backbones."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but keep frozen norms with running statistics in eval: a frozen backbone stays the same."""
        super().train(mode)
        if mode:
            frozen_norms_eval(self)
        return self

    def compile_features(self, **options: Any) -> None:
        """Compile `extract` with `torch.compile`; parameters and state-dict keys stay as they are."""
        self.extract = torch.compile(self.extract, **options)  # type: ignore[method-assign]
