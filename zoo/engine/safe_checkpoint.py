"""When to save a resume file, which ones to keep, and stopping on a signal without losing the step."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from mmengine.hooks import Hook

from zoo.engine.loops import IterLoop
from zoo.engine.resume import collect
from zoo.engine.state import set_random_state, write_atomically
from zoo.errors import OptionError
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner

FOLDER = "resume"
_NAME = re.compile(r"step_(\d+)\.pth")


def resume_files(work_dir: str | Path) -> list[Path]:
    """The resume files of a work folder, oldest step first. Only whole files ever carry such a name."""
    found = [(int(m[1]), p) for p in Path(work_dir, FOLDER).glob("step_*.pth") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def latest(work_dir: str | Path) -> Path | None:
    """The resume file to continue from, if the folder has one."""
    return next(reversed(resume_files(work_dir)), None)


@HOOKS.register_module()
class SafeCheckpoint(Hook):
    """Saves `<work_dir>/resume/step_N.pth` so that a kill at any moment leaves the last file whole.

    The best state so far is `best.pth` beside them. Without several processes, Ctrl-C and SIGTERM finish the
    current step, save, and stop; a second one stops at once.

    Args:
        every_epochs: save at the end of every so many epochs; the end of training is always saved.
        every_steps: also save every so many steps; None: never (step-based training: at every validation).
        keep: how many files to keep besides `best.pth`.
        best: the metric that decides which state is best; None takes the first one reported.
        larger_is_better: False for errors and losses.

    Raises:
        CheckpointWriteError: a file could not be written (disk full); the earlier ones are untouched.
    """

    priority = "VERY_LOW"  # after schedules, averages and logs have done their part of the step

    def __init__(
        self,
        every_epochs: int = 1,
        every_steps: int | None = None,
        keep: int = 2,
        best: str | None = None,
        larger_is_better: bool = True,
    ) -> None:
        if min(every_epochs, keep, every_steps or 1) < 1:
            raise OptionError("every_epochs, every_steps and keep must be at least 1")
        self.every_epochs, self.every_steps, self.keep = every_epochs, every_steps, keep
        self.best, self.larger_is_better = best, larger_is_better
        self.best_value: float | None = None
        self.best_step: int | None = None
        self._improved = False
        self._stop = False
        self._pid = os.getpid()
        self._old_handlers: dict[int, Any] = {}

    def before_train(self, runner: ZooRunner) -> None:
        """Clear what a killed run left half written, put random states back, listen for signals."""
        if runner.rank == 0:
            for leftover in Path(runner.work_dir, FOLDER).glob("*.tmp"):
                leftover.unlink()
        if isinstance(runner.train_loop, IterLoop) and self.every_steps is None:
            self.every_steps = runner.train_loop.val_interval
        if runner.pending_random is not None:
            set_random_state(runner.pending_random)
        if runner.world_size == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)

    def before_train_iter(self, runner: ZooRunner, batch_idx: int, data_batch: Any = None) -> None:
        """Again, right before the first resumed step: whatever started up in between may have drawn numbers."""
        if runner.pending_random is not None:
            set_random_state(runner.pending_random)
            runner.pending_random = None

    def after_val_epoch(self, runner: ZooRunner, metrics: dict[str, Any] | None = None) -> None:
        """Note whether this is the best state so far."""
        numbers = {key: value for key, value in (metrics or {}).items() if isinstance(value, (int, float))}
        if not numbers:
            return
        self.best = self.best or next(iter(numbers))
        if self.best not in numbers:
            raise OptionError(f"SafeCheckpoint(best={self.best!r}): the evaluation reports {sorted(numbers)}")
        value = float(numbers[self.best])
        sign = 1 if self.larger_is_better else -1
        if self.best_value is None or sign * value > sign * self.best_value:
            self.best_value, self.best_step, self._improved = value, runner.iter, True

    def save_point(self, runner: ZooRunner, epoch_done: bool) -> None:
        """Save if it is time; called by the loops when nothing is half done."""
        runner.pending_random = None
        last = runner.iter >= runner.max_iters and (epoch_done or isinstance(runner.train_loop, IterLoop))
        by_epoch = epoch_done and runner.epoch % self.every_epochs == 0
        by_step = not epoch_done and self.every_steps is not None and runner.iter % self.every_steps == 0
        if last or by_epoch or by_step or self._improved or self._stop:
            self.save(runner)
        if self._stop:
            raise KeyboardInterrupt

    def save(self, runner: ZooRunner) -> None:
        """Write the state now, point `best.pth` at it if it is the best, drop the oldest files."""
        content = collect(runner)
        improved, self._improved = self._improved, False
        if runner.rank != 0:
            return
        path = Path(runner.work_dir, FOLDER, f"step_{runner.iter:08d}.pth")
        write_atomically(path, lambda file: torch.save(content, file))
        if improved:
            _same_file(path, path.with_name("best.pth"))
        for old in resume_files(runner.work_dir)[: -self.keep]:
            old.unlink()

    def before_save_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """What is best so far belongs to the state."""
        checkpoint["best"] = {"metric": self.best, "value": self.best_value, "step": self.best_step}

    def after_load_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """Remember what was best."""
        best = checkpoint.get("best")
        if best is not None and self.best in (None, best["metric"]):
            self.best, self.best_value, self.best_step = best["metric"], best["value"], best["step"]

    def release_signals(self) -> None:
        """Give the signals back to whoever had them; the runner calls it however training ends."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader worker inherits the handler; only its parent decides about Ctrl-C
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True


def _same_file(source: Path, target: Path) -> None:
    """Make `target` a second name of `source` (a copy where the file system has no links), in one step."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(target, lambda file: file.write(source.read_bytes()))
        return
    os.replace(temporary, target)
