"""One optimizer wrapper: gradient accumulation, clipping, and mixed precision on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from zoo.errors import OptionError, nearest
from zoo.registry import OPTIM_WRAPPERS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@OPTIM_WRAPPERS.register_module()
class ZooOptimWrapper(OptimWrapper):
    """mmengine's wrapper with autocast: bf16 on CPU and GPU, fp16 (with loss scaling) on CUDA only.

    Args:
        optimizer: over the trainable parameters.
        accumulative_counts: batches whose gradients are summed into one step.
        clip_grad: options of `torch.nn.utils.clip_grad_norm_`, e.g. dict(max_norm=1.0).
        amp: None (full precision), "bf16" or "fp16".

    Raises:
        OptionError: an unknown precision, or fp16 without CUDA.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: dict[str, Any] | None = None,
        amp: str | None = None,
    ) -> None:
        super().__init__(optimizer, accumulative_counts, dict(clip_grad) if clip_grad else None)
        if amp is not None and amp not in DTYPES:
            raise OptionError(f"no mixed precision is called {amp!r}; {nearest(amp, DTYPES)}")
        self.device_type = optimizer.param_groups[0]["params"][0].device.type
        if amp == "fp16" and self.device_type != "cuda":
            raise OptionError(f"amp='fp16' needs a CUDA GPU, this run is on {self.device_type}; use amp='bf16'")
        self.dtype = DTYPES[amp] if amp else None
        self.scaler = torch.amp.GradScaler("cuda") if amp == "fp16" else None

    @property
    def mid_accumulation(self) -> bool:
        """Whether gradients of earlier batches wait for their step."""
        return not self.should_update()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Around the forward pass: no gradient exchange while accumulating, and autocast if asked for."""
        enabled = self.dtype is not None
        with super().optim_context(model), torch.autocast(self.device_type, self.dtype, enabled=enabled):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward on the (scaled) loss."""
        super().backward(loss if self.scaler is None else self.scaler.scale(loss), **kwargs)

    def step(self, **kwargs: Any) -> None:
        """Clip and step; with a scaler, skip the step whose gradients overflowed."""
        if self.scaler is None:
            super().step(**kwargs)
            return
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad_kwargs:
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Start counting at `init_counts`; a resumed run has its waiting gradients back, so none are lost."""
        self._inner_count = init_counts
        self._max_counts = max_counts
        self._remainder_counts = max_counts % self._accumulative_counts
        # Schedules move once a batch, also while gradients accumulate; without this they warn that no step came first.
        self._global_step = 0

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the loss scale."""
        state: dict[str, Any] = super().state_dict()
        if self.scaler is not None:
            state["loss_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        state = dict(state_dict)
        scale = state.pop("loss_scaler", None)
        if self.scaler is not None and scale is not None:
            self.scaler.load_state_dict(scale)
        super().load_state_dict(state)
