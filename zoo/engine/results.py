"""What a run achieved: `results.csv`, one row an evaluation, the adapter folder, and a table at the end."""

from __future__ import annotations

import csv
import importlib.util
import io
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.hooks import Hook

from zoo.engine.progress import Throughput, batch_images
from zoo.engine.safe_checkpoint import SafeCheckpoint, resume_files
from zoo.engine.state import write_atomically
from zoo.freeze import count
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner

FIRST = ("epoch", "step", "lr", "images_per_s", "peak_memory_mib", "seconds")


@HOOKS.register_module()
class Results(Hook):
    """Writes `<work_dir>/results.csv` after each evaluation (each epoch, if there is none) and the end's summary.

    Columns: epoch, step, lr, images_per_s, peak_memory_mib (GPU if there is one, else the process), seconds of
    training so far (those before a resume included), then the mean of every training loss since the last row, then
    the metrics.
    """

    priority = "BELOW_NORMAL"

    def __init__(self) -> None:
        self.throughput = Throughput()
        self.rows: list[dict[str, Any]] = []
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._losses: dict[str, list[float]] = {}
        self._metrics: dict[str, float] | None = None

    def before_train(self, runner: ZooRunner) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def before_train_epoch(self, runner: ZooRunner) -> None:
        """Validation and saving in between are not training speed."""
        self.throughput.restart()

    def after_train_iter(
        self, runner: ZooRunner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Collect losses and speed."""
        self.throughput.step(batch_images(data_batch) * runner.world_size)
        for key, value in (outputs or {}).items():
            total = self._losses.setdefault(key, [0.0, 0.0])
            total[0] += value.item()
            total[1] += 1

    def after_val_epoch(self, runner: ZooRunner, metrics: dict[str, Any] | None = None) -> None:
        """Keep the numbers until the row is written."""
        self._metrics = {key: float(v) for key, v in (metrics or {}).items() if isinstance(v, (int, float))}

    def save_point(self, runner: ZooRunner, epoch_done: bool) -> None:
        """Write the row: before the checkpoint hook saves, so that the row is part of the saved state."""
        if self._metrics is None and not (epoch_done and runner.val_loop is None):
            return
        row: dict[str, Any] = {
            "epoch": runner.epoch,
            "step": runner.iter,
            "lr": max(group["lr"] for group in runner.optim_wrapper.optimizer.param_groups),
            "images_per_s": round(self.throughput.value, 2),
            "peak_memory_mib": round(_peak_memory_mib(), 1),
            "seconds": round(self._seconds(), 2),
        }
        row.update({key: total / number for key, (total, number) in self._losses.items()})
        row.update(self._metrics or {})
        self.rows.append(row)
        self._losses, self._metrics = {}, None
        self.throughput.restart()
        if runner.rank == 0:
            self._write(Path(runner.work_dir, "results.csv"))

    def before_save_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """Rows and sums travel with the state, so that a resumed run ends with the same table."""
        checkpoint["results"] = {"rows": self.rows, "losses": self._losses, "seconds": self._seconds()}

    def after_load_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """Take the rows back; rows of steps that a killed run made after its last save are made again."""
        saved = checkpoint.get("results")
        if saved is not None:
            self.rows, self._losses, self._seconds_before = saved["rows"], saved["losses"], saved["seconds"]

    def after_train(self, runner: ZooRunner) -> None:
        """Save the adapter folder and print the summary."""
        if runner.rank != 0:
            return
        folder = self._save_adapter(runner)
        print(_table(self._summary(runner, folder)), flush=True)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _write(self, path: Path) -> None:
        columns = dict.fromkeys((*FIRST, *(key for row in self.rows for key in row)))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))

    def _save_adapter(self, runner: ZooRunner) -> Path | None:
        # A task trained from Python without a config cannot be rebuilt from a folder; its resume file remains.
        if importlib.util.find_spec("zoo.checkpoint") is None or not getattr(runner.bare_model, "zoo_config", None):
            return None
        from zoo.checkpoint import save

        folder = Path(runner.work_dir, "adapter")
        last = self.rows[-1] if self.rows else {}
        metrics = {key: value for key, value in last.items() if key not in FIRST}
        save(runner.bare_model, folder, labels=runner.cfg.get("classes"), metrics=metrics)
        return folder

    def _summary(self, runner: ZooRunner, folder: Path | None) -> dict[str, str]:
        numbers = count(runner.bare_model)
        share = 100 * numbers.trainable / max(numbers.total, 1)
        files = resume_files(runner.work_dir)
        saved = sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder else 0
        rows = {
            "trained parameters": f"{numbers.trainable:,} of {numbers.total:,} ({share:.2f}%)",
            "adapter folder": f"{folder} ({saved:,} bytes)" if folder else "",
            "resume file": f"{files[-1]} ({files[-1].stat().st_size:,} bytes)" if files else "",
            "best": _best(runner),
            "training time": f"{self._seconds():.1f} s",
        }
        target = folder or (files[-1] if files else None)
        if target and runner.cfg.filename and runner.cfg.get("test_dataloader"):
            rows["next"] = f"python tools/test.py {runner.cfg.filename} {target}"
        return {key: value for key, value in rows.items() if value}


def _best(runner: ZooRunner) -> str:
    for hook in runner.hooks:
        if isinstance(hook, SafeCheckpoint) and hook.best_value is not None:
            return f"{hook.best} = {hook.best_value:.4g} at step {hook.best_step}"
    return ""


def _peak_memory_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def _table(rows: dict[str, str]) -> str:
    width = max(len(key) for key in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())
