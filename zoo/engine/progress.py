"""One line that says how training goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from mmengine.hooks import Hook
from tqdm import tqdm

from zoo.errors import OptionError
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner


class Throughput:
    """Images a second over the last steps: an average that halves the past's weight every ten steps."""

    def __init__(self) -> None:
        self.value = 0.0
        self._last: float | None = None

    def restart(self) -> None:
        """Do not count the time until the next step (start, validation, saving)."""
        self._last = None

    def step(self, images: int) -> None:
        """One more step of so many images ended now."""
        now = time.perf_counter()
        if self._last is not None and now > self._last:
            rate = images / (now - self._last)
            self.value = rate if self.value == 0.0 else self.value + 0.067 * (rate - self.value)
        self._last = now


@HOOKS.register_module()
class Progress(Hook):
    """Step, loss, images/s, last metric and time left, on the first process only, to stderr.

    Args:
        interval: steps between two lines when stderr is not a terminal.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, interval: int = 50) -> None:
        if interval < 1:
            raise OptionError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        self.throughput = Throughput()
        self._bar: tqdm[Any] | None = None
        self._metric = ""

    def before_train(self, runner: ZooRunner) -> None:
        """Open the bar where a resumed run continues."""
        if runner.rank == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=runner.max_iters, initial=runner.iter, unit="step", dynamic_ncols=True)

    def before_train_epoch(self, runner: ZooRunner) -> None:
        """Validation and saving in between are not training speed."""
        self.throughput.restart()

    def after_train_iter(
        self, runner: ZooRunner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Move the bar, or print a line every `interval` steps and at the end."""
        if runner.rank != 0:
            return
        self.throughput.step(batch_images(data_batch) * runner.world_size)
        done, total = runner.iter + 1, runner.max_iters
        loss = outputs["loss"].item() if outputs else float("nan")
        text = f"loss {loss:.4f}, {self.throughput.value:.0f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text + self._metric, refresh=False)
            self._bar.update()
        elif done % self.interval == 0 or done == total:
            self._line(
                f"epoch {runner.epoch + 1}/{runner.max_epochs} step {done}/{total}: {text}{self._metric}"
                f"{self._time_left(total - done, batch_images(data_batch) * runner.world_size)}"
            )

    def after_val_epoch(self, runner: ZooRunner, metrics: dict[str, Any] | None = None) -> None:
        """Show the first metric from now on."""
        numbers = [f"{key} {value:.4g}" for key, value in (metrics or {}).items() if isinstance(value, (int, float))]
        self._metric = f", {numbers[0]}" if numbers else ""
        self.throughput.restart()
        if runner.rank == 0 and self._bar is None and numbers:
            self._line("evaluation: " + ", ".join(numbers))

    def close(self) -> None:
        """Close the bar; the runner calls it however training ends."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _time_left(self, steps: int, images: int) -> str:
        if self.throughput.value == 0.0:
            return ""
        seconds = int(steps * images / self.throughput.value)
        return f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def batch_images(batch: Any) -> int:
    """How many images a batch of the loader holds."""
    return len(batch["inputs"]) if isinstance(batch, dict) and "inputs" in batch else 0
