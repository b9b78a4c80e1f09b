"""The pieces of a resume file: plain data, random states, fingerprints of frozen tensors, atomic writing."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from zoo.errors import CheckpointError, CheckpointFileError, ZooError

KEPT_HISTORY = 1000  # log values kept a curve; the full curves are in the log files
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CheckpointWriteError(ZooError, OSError):
    """A resume file could not be written; files written before are untouched."""


def plain(value: Any, where: str = "checkpoint") -> Any:
    """`value` as dicts, lists, numbers, strings and CPU tensors: what `torch.load(weights_only=True)` accepts.

    Raises:
        CheckpointError: something else is in it, naming the place.
    """
    if value is None or (isinstance(value, (bool, int, float, str, torch.dtype)) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, HistoryBuffer):
        log, count = (column[-KEPT_HISTORY:] for column in value.data)
        return {
            "history": torch.from_numpy(np.array(log, dtype=np.float64)),
            "count": torch.from_numpy(np.array(count, dtype=np.int64)),
        }
    if isinstance(value, Mapping):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise CheckpointError(f"{where} is a {type(value).__name__}, which a resume file cannot hold as plain data")


def plain_hub(state: Mapping[str, Any]) -> dict[str, Any]:
    """mmengine's message hub as plain data; runtime information that is not plain is left out.

    A resumed run writes such information anew (configuration text, data set description).
    """
    info = {}
    for key, value in state["runtime_info"].items():
        try:
            info[key] = plain(value)
        except CheckpointError:
            continue
    kept = {*info, *state["log_scalars"]}
    resumed = {key: bool(flag) for key, flag in state["resumed_keys"].items() if key in kept}
    return {"log_scalars": plain(state["log_scalars"]), "runtime_info": info, "resumed_keys": resumed}


def rich_hub(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `plain_hub`, for `MessageHub.load_state_dict`."""
    scalars = {
        key: HistoryBuffer(entry["history"].tolist(), entry["count"].tolist())
        for key, entry in state["log_scalars"].items()
    }
    return {**state, "log_scalars": scalars}


def random_state() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators, every GPU's included."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave. GPU states are left alone when the number of GPUs differs."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def fingerprint(tensor: Tensor) -> int:
    """A number that changes when any bit, or the order of the rows, changes; one pass on the tensor's device.

    Sum over rows i of (i + 1) * (sum of the row's bit patterns as integers), in wrapping 64-bit arithmetic.
    It guards against mistakes (another base model, a drifting norm), not against an attacker.
    """
    bits = tensor.detach().contiguous()
    if bits.is_complex():
        bits = torch.view_as_real(bits)
    rows = bits.view(_BITS[bits.element_size()]).reshape(max(bits.shape[0], 1) if bits.ndim else 1, -1)
    sums = rows.sum(dim=1, dtype=torch.int64)
    return int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum())


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> fingerprint."""
    return {name: fingerprint(tensor) for name, tensor in tensors.items() if tensor.numel()}


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Call `write(open binary file)`, then put the file at `path` in one step: a reader sees all of it or nothing.

    Raises:
        CheckpointWriteError: the disk is full, not writable, ...; what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name with old, empty content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps a failed write in RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointWriteError(f"could not write {path}: {error}") from error
    except BaseException:  # Ctrl-C in the middle of a write
        temporary.unlink(missing_ok=True)
        raise


def read_resume_file(path: Path) -> dict[str, Any]:
    """The content of a resume file.

    Raises:
        CheckpointFileError: not there, not whole, or not a resume file of this library.
    """
    if not path.is_file():
        raise CheckpointFileError(f"there is no resume file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointFileError(f"{path} cannot be read as a resume file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "zoo-resume-1":
        raise CheckpointFileError(f"{path} was not written by this library's trainer")
    return content
