"""Time and memory of several callables, measured in turn (A B A B ...) so that drift of the machine hits all alike."""

from __future__ import annotations

import contextlib
import gc
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import NamedTuple

import torch

from zoo.errors import OptionError


class Timing(NamedTuple):
    """Median seconds of a call, over how many, and the most memory a call added (None where it cannot be known)."""

    seconds: float
    rounds: int
    peak_bytes: int | None


Outcome = Timing | str  # a failure is kept as its reason
Candidate = Callable[[], object]


class LimitError(Exception):
    """A measurement took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `LimitError` in the block once it has run for so long.

    Waits for the call in progress to come back to Python. Outside the main thread, and where the system has no
    interval timer (Windows), there is no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interleaved(
    candidates: Mapping[str, Candidate],
    device: torch.device,
    *,
    rounds: int = 10,
    warmup: int = 2,
    limit: float = 30.0,
    limits: Mapping[str, float] | None = None,
) -> dict[str, Outcome]:
    """Time every candidate once a round and take medians. GPU time is that of CUDA events, CPU time the wall clock's.

    Args:
        warmup: untimed calls of each; the last one gives the memory.
        limit: seconds for a candidate's warm-up, and for all rounds together; rounds end early, after at least one.
        limits: other seconds for some candidates' warm-up (compilation).

    Returns:
        For each name a `Timing`, or the reason why it has none; one that fails does not stop the others.
    """
    if rounds < 1 or warmup < 1 or limit <= 0:
        raise OptionError(f"rounds, warmup and limit must be positive, got {rounds}, {warmup}, {limit:g}")
    outcomes: dict[str, Outcome] = {}
    peaks: dict[str, int | None] = {}
    for name, call in candidates.items():
        try:
            with time_limit((limits or {}).get(name, limit)):
                for _ in range(warmup):
                    peaks[name] = peak_memory(call, device)
        except Exception as error:
            outcomes[name] = reason(error)
            free(device)
    seconds: dict[str, list[float]] = {name: [] for name in candidates if name not in outcomes}
    end = time.monotonic() + limit
    for number in range(rounds):
        if number and time.monotonic() > end:
            break
        for name in [n for n in seconds if n not in outcomes]:
            try:
                seconds[name].append(_seconds(candidates[name], device))
            except Exception as error:
                outcomes[name] = reason(error)
                free(device)
    for name, values in seconds.items():
        if name not in outcomes:
            outcomes[name] = Timing(statistics.median(values), len(values), peaks[name])
    return {name: outcomes[name] for name in candidates}


def peak_memory(call: Candidate, device: torch.device) -> int | None:
    """Run `call`; the bytes it held at most beyond what was allocated before. None on the CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def reason(error: BaseException) -> str:
    """An error as a short line for a table cell."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]


def _seconds(call: Candidate, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        begin.record()
        call()
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more; modules often sit in reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
