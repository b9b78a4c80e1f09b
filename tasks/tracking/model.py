"""JointTracker: a joint template-and-search backbone and a head that finds the target in the search crop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tasks.base import Adapter, ZooTask
from tasks.preprocess import ZooPreprocessor
from tasks.tracking.sequences import TrackSequence
from tasks.tracking.tracker import folded, follow
from zoo.errors import OptionError
from zoo.registry import BACKBONES, HEADS, MODELS


@dataclass(frozen=True)
class TrackSettings:
    """How crops are cut around a box.

    Attributes:
        template_factor, search_factor: how much larger than the box (by area, roughly its square) the crops are.
        least_side: sides of the last box are raised to so many pixels before the next search crop is cut.
    """

    template_factor: float = 2.0
    search_factor: float = 4.0
    least_side: float = 10.0

    def __post_init__(self) -> None:
        if min(self.template_factor, self.search_factor) < 1 or self.least_side <= 0:
            raise OptionError(f"crop factors must be at least 1 and least_side above 0, got {self}")


@MODELS.register_module()
class TrackingPreprocessor(ZooPreprocessor):
    """Stacks pairs of crops and normalises both; whole sequences pass unchanged.

    `inputs` of a batch is a list of B dicts `template` (3, h, w), `search` (3, H, W), `mask` (h', w'), which become
    one dict of (B, ...) tensors, or a list of `TrackSequence`.
    """

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """See the class; crops are uint8, or float in 0..1."""
        pairs = data["inputs"]
        if pairs and isinstance(pairs[0], TrackSequence):
            return {"inputs": pairs, "data_samples": data.get("data_samples")}
        batch = self.cast_data(data)
        pairs = batch["inputs"]
        inputs = {key: self.normalise(self.stack([pair[key] for pair in pairs])) for key in ("template", "search")}
        inputs["mask"] = self.stack([pair["mask"] for pair in pairs])
        return {"inputs": inputs, "data_samples": batch.get("data_samples")}


@MODELS.register_module()
class JointTracker(ZooTask):
    """Backbone over template and search crop -> search tokens -> head -> score map and boxes (LoRAT).

    With adapters, what trains is the adapters, the backbone's `token_type_embed` and the head.

    Args:
        backbone: a `JointViT` or its config.
        head: a module or config such as `dict(type="MLPAnchorFreeHead")`; width and map size come from the backbone.
        adapter, attention, extra_losses: see `ZooTask`.
        tracking: fields of `TrackSettings` that differ from its defaults.
        preprocessing: `mean` and `std` of the crops, 0..1 units; by default the backbone's own.

    Raises:
        OptionError: an unknown field, or a backbone that does not read two crops.
    """

    def __init__(
        self,
        backbone: nn.Module | dict[str, Any],
        head: nn.Module | dict[str, Any],
        *,
        adapter: Adapter = None,
        attention: str | dict[str, Any] | list[Any] | None = None,
        tracking: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        extra_losses: list[dict[str, Any]] | None = None,
    ) -> None:
        body: Any = BACKBONES.create(dict(backbone)) if isinstance(backbone, Mapping) else backbone
        if not hasattr(body, "search_grid"):
            raise OptionError(f"{type(body).__name__} does not read a template and a search crop; use JointViT")
        if isinstance(head, Mapping):
            sizes = {"in_features": body.num_features, "map_size": body.search_grid}
            head = HEADS.create(dict(head), **sizes)
        self_made = {"mean": body.pretrained_cfg["mean"], "std": body.pretrained_cfg["std"]}
        statistics = {key: tuple(value) for key, value in {**self_made, **(preprocessing or {})}.items()}
        if set(statistics) != {"mean", "std"}:
            raise OptionError(f"preprocessing of a tracker has `mean` and `std`, got {sorted(statistics)}")
        super().__init__(
            body,
            head,
            adapter=adapter,
            attention=attention,
            data_preprocessor=TrackingPreprocessor(mean=statistics["mean"], std=statistics["std"]),
            extra_losses=extra_losses,
        )
        body.token_type_embed.requires_grad_(True)  # new, so it cannot stay frozen with the pretrained rest
        try:
            self.settings = TrackSettings(**(tracking or {}))
        except TypeError as error:
            known = ", ".join(TrackSettings.__dataclass_fields__)
            raise OptionError(f"tracking takes {known}: {error}") from error
        self.preprocessing = {**statistics, "template_size": body.template_size, "search_size": body.search_size}

    def extract(self, inputs: Any) -> Tensor:
        """`dict(search, template, mask)` as the preprocessor gives it -> search tokens (B, N, D)."""
        if isinstance(inputs, Tensor):
            return self.backbone(inputs)  # type: ignore[no-any-return]
        return self.backbone(inputs["search"], inputs["template"], inputs["mask"])  # type: ignore[no-any-return]

    def forward(self, inputs: Any, data_samples: list[dict[str, Any]] | None = None, mode: str = "tensor") -> Any:
        """See `ZooTask`; a list of `TrackSequence` with mode "predict" gives a `Track` each."""
        if isinstance(inputs, list) and inputs and isinstance(inputs[0], TrackSequence):
            if mode != "predict":
                raise OptionError(f"sequences are tracked with mode 'predict', got {mode!r}; train on pairs of crops")
            with folded(self):
                return [follow(self, sequence) for sequence in inputs]
        return super().forward(inputs, data_samples, mode)
