"""The tracker as a state machine: start with a box, then one frame in, one box out.

LoRAT (arXiv 2403.05231): the template is cut once and never changes, the search crop follows the last box, and the
score never gates anything.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from tasks.tracking.crops import (
    Box,
    Image,
    around,
    clipped,
    cut,
    foreground_mask,
    grown,
    has_extent,
    mean_colour,
)
from tasks.tracking.sequences import TrackSequence
from zoo.errors import OptionError, ZooError

if TYPE_CHECKING:
    from tasks.tracking.model import JointTracker


@dataclass
class Track:
    """What a tracker said about a sequence: boxes (T, 4) x1, y1, x2, y2, scores (T,), seconds (T,) a frame.

    `stopped` says why it ended before the last frame, `interrupted` that the user did it; T counts the frames done.
    """

    boxes: Box
    scores: NDArray[np.float64]
    seconds: NDArray[np.float64]
    stopped: str = ""
    interrupted: bool = False


class Tracker:
    """Follows one box through frames.

    Args:
        model: a `JointTracker`. It is run as it is; `folded(model)` merges its adapters for the time being.

    Frames are (H, W, 3) uint8 RGB of one size, boxes x1, y1, x2, y2 in pixels.
    """

    def __init__(self, model: JointTracker) -> None:
        self.model = model
        self.box: Box | None = None  # the state: where the next search crop is cut
        self._size = (0, 0)
        self._number = 0

    def init(self, frame: Image, box: ArrayLike) -> None:
        """Start (again) with the object's box in the first frame.

        Raises:
            OptionError: a box that is no four finite numbers, is empty, or lies outside the frame.
            ZooError: a frame that is no (H, W, 3) uint8 image.
        """
        _check_frame(frame)
        self._size, self._number = (frame.shape[0], frame.shape[1]), 0
        start = _checked_box(box, self._size)
        settings = self.model.settings
        self._fill = mean_colour(frame)
        crop, used = cut(frame, around(start, settings.template_factor, self._template), self._template, self._fill)
        mask = foreground_mask(used.to_crop(start), self.model.backbone.stride, self.model.backbone.template_grid)  # type: ignore[arg-type]
        self._inputs = {"template": self._ready(crop), "mask": mask[None].to(self._device)}
        self.box = start

    def update(self, frame: Image) -> tuple[Box, float]:
        """The object's box in the next frame, cut to the frame, and its score in [0, 1].

        Raises:
            ZooError: not started, a frame of another size than the first, or no (H, W, 3) uint8 image.
        """
        if self.box is None:
            raise ZooError("the tracker has no object yet: call init(frame, box) first")
        self._number += 1
        _check_frame(frame)
        if frame.shape[:2] != self._size:
            raise ZooError(
                f"frame {self._number} is {frame.shape[1]}x{frame.shape[0]}, the first one was "
                f"{self._size[1]}x{self._size[0]}; a box means nothing across sizes: resize the frames, or init again"
            )
        size = self.model.backbone.search_size
        state = grown(self.box, self.model.settings.least_side)
        crop, used = cut(frame, around(state, self.model.settings.search_factor, size), size, self._fill)  # type: ignore[arg-type]
        result = self._run(self._ready(crop))
        shares = result["box"].double().numpy()
        found = clipped(used.to_image(shares * np.array([size[1], size[0]] * 2)), self._size)  # type: ignore[index]
        if has_extent(found):
            self.box = found
        return found, float(result["score"])

    @torch.no_grad()
    def _run(self, search: Tensor) -> dict[str, Any]:
        training = self.model.training
        self.model.eval()
        try:
            results: list[dict[str, Any]] = self.model({**self._inputs, "search": search}, [{}], mode="predict")
        finally:
            self.model.train(training)
        result = results[0]
        if not np.isfinite(result["score"]):
            raise ZooError("the model diverged: its score is not finite")
        return result

    def _ready(self, crop: Tensor) -> Tensor:
        ready: Tensor = self.model.data_preprocessor.normalise(crop[None].to(self._device) / 255)
        return ready

    @property
    def _template(self) -> tuple[int, int]:
        size: tuple[int, int] = self.model.backbone.template_size  # type: ignore[assignment]
        return size

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


def follow(
    model: JointTracker,
    sequence: TrackSequence,
    *,
    keep_going: bool = False,
    watch: Callable[[int, Image, Box, float], None] | None = None,
) -> Track:
    """Run a sequence from its first box; the first result is that box with score 1.

    Args:
        keep_going: after the first frame, end early instead of raising where a frame cannot be used, or at Ctrl-C.
        watch: called with (number, frame, box, score) after every frame.
    """
    tracker = Tracker(model)
    done: list[tuple[Box, float, float]] = []
    stopped, interrupted = "", False
    try:
        for number in range(len(sequence.frames)):
            frame = sequence.frames[number]
            start = time.perf_counter()
            if number == 0:
                tracker.init(frame, sequence.boxes[0])
                box, score = sequence.boxes[0], 1.0
            else:
                box, score = tracker.update(frame)
            done.append((box, score, time.perf_counter() - start))
            if watch is not None:
                watch(number, frame, box, score)
    except (ZooError, KeyboardInterrupt) as error:
        if not keep_going or not done:
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        stopped = "interrupted" if interrupted else str(error)
    boxes, scores, seconds = (np.array(column, float) for column in zip(*done, strict=True))
    return Track(boxes, scores, seconds, stopped, interrupted)


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, adapters that can be are merged into the weights: the same numbers, without their cost."""
    from zoo.adapters.attached import Attached
    from zoo.adapters.inject import attachments

    able = [
        attached
        for attached in attachments(model).values()
        if isinstance(attached, Attached) and not attached.merged and all(p.adapter.mergeable for p in attached.placed)
    ]
    for attached in able:
        attached.merge()
    try:
        yield model
    finally:
        for attached in reversed(able):
            attached.unmerge()


def _check_frame(frame: Any) -> None:
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ZooError(f"a frame is an (H, W, 3) uint8 array, got {got}")
    if 0 in frame.shape:
        raise ZooError(f"an empty frame of shape {frame.shape}")


def _checked_box(box: ArrayLike, size: tuple[int, int]) -> Box:
    try:
        start = np.asarray(box, float)
    except (TypeError, ValueError):
        start = np.empty(0)
    if start.shape != (4,) or not np.isfinite(start).all():
        raise OptionError(f"a box is four finite numbers x1, y1, x2, y2, got {box!r}")
    numbers = ", ".join(f"{v:g}" for v in start)
    if not has_extent(start):
        raise OptionError(f"the box ({numbers}) is empty; it reads x1, y1, x2, y2 with x2 > x1 and y2 > y1")
    if not has_extent(clipped(start, size)):
        raise OptionError(f"the box ({numbers}) lies outside the frame, which is {size[1]}x{size[0]}")
    return start
