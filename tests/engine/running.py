"""Training runs of the tiny task, in this process or in one that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = HERE / "tiny_config.py"
# Fresh processes that have imported torch already: a start costs 0.1 s instead of 5.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["running", "tiny_task", "zoo.engine.runner"])


def train(work_dir: Path, *, resume: bool | str = False, **options: Any) -> Any:
    """Train in this process; options are dotted keys with `__` for the dots. Returns the runner."""
    from zoo.engine.config import load_config
    from zoo.engine.runner import ZooRunner

    cfg = load_config(str(CONFIG), {key.replace("__", "."): value for key, value in options.items()})
    cfg.work_dir, cfg.resume = str(work_dir), resume
    cfg.setdefault("randomness", {"seed": 0})
    runner = ZooRunner.from_cfg(cfg)
    runner.train()
    return runner


def _child(work_dir: str, resume: bool, options: dict[str, Any]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(f"{work_dir}.log", "a")  # noqa: SIM115
    train(Path(work_dir), resume=resume, **options)


def start(work_dir: Path, *, resume: bool = False, **options: Any) -> Any:
    """Train in a process of its own."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT)])
    process = _server.Process(target=_child, args=(str(work_dir), resume, options))
    process.start()
    return process


def run(work_dir: Path, *, resume: bool = False, **options: Any) -> None:
    """Train in a process of its own, to the end."""
    process = start(work_dir, resume=resume, **options)
    process.join(60)
    assert process.exitcode == 0, Path(f"{work_dir}.log").read_text()[-2000:]


def _rank(work_dir: str, resume: bool, options: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from zoo.engine.launch import distributed

    with distributed("pytorch"):
        _child(work_dir, resume, {**options, "launcher": "pytorch"})


def run_ranks(work_dir: Path, ranks: int, *, resume: bool = False, **options: Any) -> None:
    """Train in several processes, as torchrun would start them, to the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(_server.Process(target=_rank, args=(str(work_dir), resume, options, own)))
        started[-1].start()
    for process in started:
        process.join(60)
    assert all(p.exitcode == 0 for p in started), Path(f"{work_dir}.log").read_text()[-2000:]


def kill_when(work_dir: Path, moment: Callable[[], bool], *, resume: bool, **options: Any) -> None:
    """Train, and SIGKILL the process as soon as `moment()` holds."""
    process = start(work_dir, resume=resume, **options)
    deadline = time.monotonic() + 60
    while not moment():
        assert process.is_alive(), "ended before the moment came: " + Path(f"{work_dir}.log").read_text()[-2000:]
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two plain structures differ in any bit; None if they are equal."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        return None if same else f"{where}: tensors differ"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: keys {a.keys() ^ b.keys()}"
        return next((d for key in a if (d := difference(a[key], b[key], f"{where}.{key}"))), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{where}[{i}]"))), None)
    return None if a == b else f"{where}: {a!r} and {b!r}"


def state(path: Path) -> dict[str, Any]:
    """A resume file without what measures time and memory."""
    content = torch.load(path, weights_only=True)
    content["meta"].pop("written")
    content["results"].pop("seconds")
    for row in content["results"]["rows"]:
        for key in ("images_per_s", "peak_memory_mib", "seconds"):
            row.pop(key)
    hub = content["message_hub"]
    for key in ("cfg", "experiment_name"):
        hub["runtime_info"].pop(key, None)
    hub["log_scalars"] = {k: v for k, v in hub["log_scalars"].items() if not k.endswith("time")}
    hub["resumed_keys"] = {k: v for k, v in hub["resumed_keys"].items() if not k.endswith("time")}
    return dict(content)
