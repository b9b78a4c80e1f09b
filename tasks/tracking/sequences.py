"""A film with one tracked object: frames that are read when asked for, and what is known about the object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.classification.images import read_image
from tasks.tracking.crops import Box, Image
from zoo.errors import ZooError


class Frames(Protocol):
    """Frames by number, each (H, W, 3) uint8 RGB."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Image: ...


class FrameFiles:
    """Frames in image files; one that cannot be read is a `ZooError` that names it, when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int, /) -> Image:
        return read_image(self.paths[number])


@dataclass(frozen=True, eq=False)
class TrackSequence:
    """One object through one film.

    Attributes:
        name: unique in its data set; result files carry it.
        frames: T frames.
        boxes: (T, 4) x1, y1, x2, y2 in pixels from 0, or (1, 4) where only the first is public. Frames without the
            object hold what the data set wrote there, often zeros.
        visible: (T,) bool where the data set says so, else None.
        cover: (T,) visible share of the object in eighths (GOT-10k), else None.
        text: a description in words, where there is one.
    """

    name: str
    frames: Frames = field(repr=False)
    boxes: Box = field(repr=False)
    visible: NDArray[np.bool_] | None = field(default=None, repr=False)
    cover: NDArray[np.int64] | None = field(default=None, repr=False)
    text: str = ""

    def __post_init__(self) -> None:
        length = len(self.frames)
        if length == 0:
            raise ZooError(f"sequence {self.name} has no frames")
        if self.boxes.shape not in ((length, 4), (1, 4)):
            raise ZooError(f"sequence {self.name}: {length} frames, but boxes of shape {self.boxes.shape}")
        for what in ("visible", "cover"):
            column = getattr(self, what)
            if column is not None and column.shape != (length,):
                raise ZooError(f"sequence {self.name}: {length} frames, but {len(column)} entries of `{what}`")

    @property
    def annotated(self) -> bool:
        """Whether every frame has its truth."""
        return len(self.boxes) == len(self.frames)

    def usable(self) -> NDArray[np.int64]:
        """Numbers of the frames one can train on: object visible, box with extent."""
        good = np.isfinite(self.boxes).all(1) & (self.boxes[:, 2:] > self.boxes[:, :2]).all(1)
        if self.visible is not None and self.annotated:
            good &= self.visible
        return np.flatnonzero(good)


def xywh(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 4) corners -> x, y, width, height."""
    return np.concatenate((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), -1)


def xyxy(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 4) x, y, width, height -> corners."""
    return np.concatenate((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), -1)
