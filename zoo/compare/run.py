"""One run of a comparison: train, test, and measure what it cost. Runs in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from torch import Tensor, nn

from zoo.adapters.attached import Selected
from zoo.adapters.inject import attachments
from zoo.engine.runner import ZooRunner
from zoo.engine.state import write_atomically
from zoo.errors import OptionError, SiteError, ZooError
from zoo.export import merged_copy
from zoo.freeze import count

ROW, LOG = "row.json", "run.log"
_REPEATS, _WARM_UP = 40, 8


class Meter(Hook):
    """Time of every training step, memory up to the last one, and the last validation's first metric."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.peak = 0.0
        self.validation: float | None = None
        self._started = 0.0

    def before_train_iter(self, runner: ZooRunner, batch_idx: int, data_batch: Any = None) -> None:
        """The batch is loaded; the step begins."""
        self._started = clock()

    def after_train_iter(
        self, runner: ZooRunner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Forward, backward and update are done."""
        self.steps.append(clock() - self._started)
        self.peak = peak_memory()  # here, not at the end: evaluation must not count

    def after_val_epoch(self, runner: ZooRunner, metrics: dict[str, Any] | None = None) -> None:
        """The first metric is the one that a learning rate is chosen by."""
        self.validation = share(metrics or {})


def clock() -> float:
    """Seconds: of a GPU the time that passes, of a CPU the time it worked for this process (others may work too)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_memory() -> float:
    """Most MiB held so far: by tensors on a GPU, by the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def share(metrics: dict[str, Any]) -> float:
    """The first metric; raises `OptionError` if it is no share between 0 and 1."""
    name, value = next(((k, v) for k, v in metrics.items() if isinstance(v, (int, float))), ("nothing", None))
    if value is None or not 0 <= value <= 1:
        raise OptionError(f"a comparison needs a first metric between 0 and 1 where more is better, got {name}={value}")
    return float(value)


def work(config: dict[str, Any], filename: str | None) -> None:
    """The body of the process: `measure`, or the reason why not, goes into `<work_dir>/row.json`."""
    folder = Path(config["work_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            row = measure(Config(config, filename=filename))
        except ZooError as error:
            row = {"error": str(error)}
        except Exception as error:  # whatever a method does wrong, the others go on
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.flush()
    text = json.dumps(row)
    write_atomically(folder / ROW, lambda file: file.write(text.encode()))


def measure(config: Config) -> dict[str, Any]:
    """Train and test one method with one learning rate and seed; its numbers by column name.

    The saved adapter stays in the work folder, the resume files do not.
    """
    started, before = time.perf_counter(), peak_memory()
    runner = ZooRunner.from_cfg(config)
    meter = Meter()
    runner.register_hook(meter)
    runner.train()
    model = runner.bare_model
    trained, kind = count(model).trainable, kind_of(model)
    tested = share(runner.test())
    saved = [file for file in Path(runner.work_dir, "adapter").glob("*") if file.is_file()]
    image = next(iter(runner.test_dataloader))
    inputs = model.data_preprocessor(image, False)["inputs"][:1]  # type: ignore[operator]
    row = {
        "val": meter.validation,
        "test": tested,
        "kind": kind,
        "trained": trained,
        "checkpoint_bytes": sum(file.stat().st_size for file in saved),
        "step_ms": round(1000 * statistics.median(meter.steps), 3),
        "memory_mib": round(meter.peak - before, 1),
        **latencies(model, inputs),
        "seconds": round(time.perf_counter() - started, 1),
    }
    shutil.rmtree(Path(runner.work_dir, "resume"), ignore_errors=True)
    return row


def kind_of(model: nn.Module) -> str:
    """Where the trained part ends up: "selection" (the base's own weights), "merges" into them, or "stays" beside."""
    sets = list(attachments(model).values())
    if all(isinstance(one, Selected) for one in sets):
        return "selection"
    merges = all(p.adapter.mergeable for one in sets if not isinstance(one, Selected) for p in one.placed)
    return "merges" if merges else "stays"


def latencies(model: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Milliseconds of one image through the trained model, and through the merged one where there is one."""
    model.eval()
    found = {"latency_ms": _latency(lambda: model(inputs))}
    if kind_of(model) == "selection":  # plain already
        return {**found, "merged_ms": found["latency_ms"]}
    try:
        merged = merged_copy(model).to(inputs.device)
    except SiteError:
        return found
    return {**found, "merged_ms": _latency(lambda: merged(inputs))}


@torch.inference_mode()
def _latency(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(_WARM_UP + _REPEATS):
        started = clock()
        run()
        times.append(clock() - started)
    return round(1000 * statistics.median(times[_WARM_UP:]), 3)
