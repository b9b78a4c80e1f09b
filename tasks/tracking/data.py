"""Data for trackers: sets of sequences, and the pairs of crops that training draws from them.

A set of sequences gives `dict(inputs=TrackSequence, data_samples=dict(name))`; one-pass evaluation runs on it. Pairs
are `dict(inputs=dict(template, search, mask), data_samples=dict(box, sequence, frames))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tasks.tracking.crops import (
    Affine,
    Box,
    Image,
    Jitter,
    around,
    clipped,
    cut,
    foreground_mask,
    has_extent,
    jittered,
    mean_colour,
)
from tasks.tracking.sequences import TrackSequence
from tasks.tracking.transforms import PairAugment
from zoo.errors import OptionError, ZooError
from zoo.registry import DATASETS, TRANSFORMS

_DRAWS = 100  # pairs drawn for one sample before the data are called unfit


class SequenceSet(Dataset[dict[str, Any]]):
    """Sequences under one name; the readers differ only in how they find them.

    Args:
        sequences: at least one, with different names (or a lazy sequence of them).
        where: what the set is called in messages.
        problems: what went wrong while finding them.

    Raises:
        ZooError: lists all problems; or there are no sequences.
    """

    def __init__(self, sequences: Sequence[TrackSequence], where: str, problems: Sequence[str] = ()) -> None:
        if problems:
            more = [f"... and {len(problems) - 100} more"] if len(problems) > 100 else []
            raise ZooError("\n  ".join([f"{where}: {len(problems)} problem(s)", *problems[:100], *more]))
        if len(sequences) == 0:
            raise ZooError(f"{where}: no sequences at all")
        self.sequences = sequences
        self.where = where
        self.metainfo: dict[str, Any] = {"name": where}

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sequence = self.sequences[index]
        return {"inputs": sequence, "data_samples": {"name": sequence.name}}


@DATASETS.register_module()
class TrackingPairs(Dataset[dict[str, Any]]):
    """Template and search crops of one object, drawn at random (LoRAT's sampling, arXiv 2403.05231).

    A source is drawn by weight, then one of its sequences, a frame for the template, and for the search another frame
    at most `gap` away (the same one where there is none). The search crop is jittered. Frames where the object is
    invisible or without extent are never used; a pair whose crop cannot keep enough of the object is drawn again.
    Unlike in the authors' sampler, sequences are drawn with replacement: every sample is a function of its seed alone.

    Args:
        sources: configs of sequence sets, or the sets.
        length: samples an epoch.
        template_size, search_size: (H, W) in pixels; `stride` of a cell of the template mask.
        template_factor, search_factor: see `TrackSettings`.
        weights: of the sources; equal by default.
        gap: in frames.
        jitter: fields of `Jitter`.
        augment: a config or callable like `PairAugment()`, the default; None for none.

    Raises:
        OptionError: numbers that do not fit. ZooError: a source without sequences; while drawing, unreadable frames
        (named), or no usable pair in a hundred draws.
    """

    def __init__(
        self,
        sources: Sequence[SequenceSet | dict[str, Any]],
        *,
        length: int,
        template_size: Sequence[int] = (112, 112),
        search_size: Sequence[int] = (224, 224),
        stride: int = 14,
        template_factor: float = 2.0,
        search_factor: float = 4.0,
        weights: Sequence[float] | None = None,
        gap: int = 100,
        jitter: dict[str, Any] | None = None,
        augment: Callable[..., Any] | dict[str, Any] | str | None = "PairAugment",
    ) -> None:
        shares = np.ones(len(sources)) if weights is None else np.asarray(weights, float)
        if not len(sources) or len(shares) != len(sources) or shares.min() < 0 or shares.sum() == 0:
            raise OptionError(f"{len(sources)} sources need as many weights, none below 0, got {weights}")
        if length < 1 or gap < 1 or any(side % stride for side in (*template_size, *search_size)):
            raise OptionError(
                f"length and gap must be at least 1 and crop sizes multiples of stride={stride}, got length={length}, "
                f"gap={gap}, {tuple(template_size)}, {tuple(search_size)}"
            )
        self.metainfo: dict[str, Any] = {"name": "pairs"}
        self.sources = [DATASETS.create(s) if isinstance(s, dict) else s for s in sources]
        self.shares = shares / shares.sum()
        self.length, self.gap, self.stride = length, gap, stride
        self.template_size, self.search_size = tuple(template_size), tuple(search_size)
        self.template_factor, self.search_factor = template_factor, search_factor
        unknown = set(jitter or {}) - set(Jitter._fields)
        if unknown:
            raise OptionError(f"jitter has no {unknown.pop()!r}; it has {', '.join(Jitter._fields)}")
        self.jitter = Jitter(**(jitter or {}))
        self.augment: PairAugment | None = (
            TRANSFORMS.create(augment) if isinstance(augment, (dict, str)) else augment  # type: ignore[assignment]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        # numpy's global state is set by the engine for every sample; what follows depends on nothing else
        random = np.random.default_rng(np.random.randint(0, 2**31, 4))
        for _ in range(_DRAWS):
            pair = self._draw(random)
            if pair is not None:
                return pair
        raise ZooError(
            f"no usable pair in {_DRAWS} draws from {', '.join(s.where for s in self.sources)}: objects are never "
            f"visible, or too small to keep {self.jitter.least:g} pixels in a search crop"
        )

    def _draw(self, random: np.random.Generator) -> dict[str, Any] | None:
        source = self.sources[random.choice(len(self.sources), p=self.shares)]
        sequence = source.sequences[int(random.integers(len(source)))]
        numbers = two_frames(sequence.usable(), self.gap, random)
        if numbers is None:
            return None
        frames: list[Image] = [sequence.frames[number] for number in numbers]
        boxes = [clipped(sequence.boxes[n], f.shape[:2]) for n, f in zip(numbers, frames, strict=True)]
        if not all(map(has_extent, boxes)):
            return None
        moved = jittered(boxes[1], self.search_factor, self.search_size, random, self.jitter)
        if moved is None:
            return None
        plans = ((around(boxes[0], self.template_factor, self.template_size), self.template_size),
                 (moved, self.search_size))  # fmt: skip
        crops, seen = zip(*map(_cut_out, frames, boxes, *zip(*plans, strict=True)), strict=True)
        if self.augment is not None:
            crops, seen = self.augment(crops, seen, random)
        target = clipped(seen[1], self.search_size)
        if not has_extent(target):  # pixel snapping may take the last sliver of a box
            return None
        height, width = self.search_size
        grid = (self.template_size[0] // self.stride, self.template_size[1] // self.stride)
        inputs: dict[str, Tensor] = {
            "template": crops[0],
            "search": crops[1],
            "mask": foreground_mask(seen[0], (self.stride, self.stride), grid),
        }
        sample = {"box": torch.from_numpy(target / np.array([width, height] * 2)), "sequence": sequence.name}
        return {"inputs": inputs, "data_samples": {**sample, "frames": numbers}}


def two_frames(usable: NDArray[np.int64], gap: int, random: np.random.Generator) -> tuple[int, int] | None:
    """Numbers of a template and a search frame, both usable and at most `gap` apart; None without any."""
    if not len(usable):
        return None
    first = usable[random.integers(len(usable))]
    near = usable[(np.abs(usable - first) <= gap) & (usable != first)]
    return int(first), int(near[random.integers(len(near))] if len(near) else first)


def _cut_out(frame: Image, box: Box, crop: Affine, size: Sequence[int]) -> tuple[Tensor, Box]:
    pixels, used = cut(frame, crop, size, mean_colour(frame))
    return pixels / 255, used.to_crop(box)
