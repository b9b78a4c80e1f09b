"""Stops a run whose loss is no longer a number, and says where."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mmengine.hooks import Hook

from zoo.engine.safe_checkpoint import resume_files
from zoo.errors import ZooError
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner


class NonFiniteLossError(ZooError, FloatingPointError):
    """The loss became NaN or infinite."""


@HOOKS.register_module()
class NanGuard(Hook):
    """Raises `NonFiniteLossError` naming the step, the losses, the samples of the batch and the last good file.

    Args:
        shown: how many samples of the batch to name.
    """

    priority = "VERY_HIGH"  # before averages and logs take the bad step in

    def __init__(self, shown: int = 8) -> None:
        self.shown = shown

    def after_train_iter(
        self, runner: ZooRunner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Look at every loss of the step."""
        values = {key: value.item() for key, value in (outputs or {}).items()}
        if all(math.isfinite(value) for value in values.values()):
            return
        files = resume_files(runner.work_dir)
        last = f"the last good state is {files[-1]}" if files else "no state was saved before it"
        raise NonFiniteLossError(
            f"the loss is not finite at step {runner.iter + 1} (epoch {runner.epoch + 1}): "
            f"{', '.join(f'{key}={value:g}' for key, value in values.items())}; "
            f"batch: {self._samples(data_batch)}; {last}. "
            "Try a lower learning rate, clip_grad=dict(max_norm=1.0), or amp='bf16' instead of 'fp16'"
        )

    def _samples(self, batch: Any) -> str:
        samples = batch.get("data_samples", []) if isinstance(batch, dict) else []
        names = [str(s.get("path") or s.get("index", "?")) for s in samples if isinstance(s, dict)]
        more = f" and {len(names) - self.shown} more" if len(names) > self.shown else ""
        return ", ".join(names[: self.shown]) + more if names else "samples carry neither path nor index"
