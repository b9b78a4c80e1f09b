"""Starting and ending a distributed run, on GPUs (nccl) or on CPU (gloo)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from zoo.errors import OptionError

LAUNCHERS = ("none", "pytorch")


@contextmanager
def distributed(launcher: str, *, timeout_minutes: float = 30.0) -> Iterator[None]:
    """The process group of a run started by torchrun; nothing for launcher "none".

    mmengine would call `torch.cuda.set_device` whatever the machine, so the group is made here, before its runner.

    Raises:
        OptionError: an unknown launcher, or "pytorch" outside torchrun.
    """
    if launcher not in LAUNCHERS:
        raise OptionError(f"launcher is one of {LAUNCHERS}, got {launcher!r}")
    if launcher == "none":
        yield
        return
    missing = [key for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if key not in os.environ]
    if missing:
        raise OptionError(
            f"--launcher pytorch needs the environment of torchrun ({', '.join(missing)} not set); "
            "start with `torchrun --nproc_per_node N tools/train.py CONFIG --launcher pytorch`"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield
        dist.barrier()  # only after success: a failed rank must not wait for the others
    finally:
        dist.destroy_process_group()
