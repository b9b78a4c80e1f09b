"""Cutting a template or search crop around a box, and carrying boxes into the crop and back.

The geometry of SiamFC and its followers, as LoRAT has it (arXiv 2403.05231; LitingLin/LoRAT 5260744). Boxes are
x1, y1, x2, y2 in pixels, corners at whole numbers being pixel edges; sizes are (H, W); numbers are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from heads.mlp_anchor_free import covered_cells

Box = NDArray[np.float64]
Image = NDArray[np.uint8]
_ALMOST_ONE = 1 - 1e-4  # a far side this little beyond a pixel edge does not touch the next pixel


class Affine(NamedTuple):
    """crop = image * scale + shift, both (x, y)."""

    scale: Box
    shift: Box

    def to_crop(self, box: ArrayLike) -> Box:
        """A box of the image in the crop's pixels."""
        return np.asarray(np.asarray(box, float) * np.tile(self.scale, 2) + np.tile(self.shift, 2))

    def to_image(self, box: ArrayLike) -> Box:
        """A box of the crop in the image's pixels."""
        return np.asarray((np.asarray(box, float) - np.tile(self.shift, 2)) / np.tile(self.scale, 2))


def around(box: ArrayLike, factor: float, size: Sequence[int]) -> Affine:
    """The crop of `size` (H, W) around a box, with context.

    Context sides are (w, h) + (factor - 1) (w + h) / 2; one scale for both axes gives their product the crop's area.
    """
    box = np.asarray(box, float)
    wh, out = box[2:] - box[:2], np.array([size[1], size[0]], float)
    context = wh + (factor - 1) * wh.sum() / 2
    scale = np.full(2, np.sqrt(out.prod() / context.prod()))
    return Affine(scale, out / 2 - scale * (box[:2] + box[2:]) / 2)


class Jitter(NamedTuple):
    """How far training crops stray: scale / exp(scale * n) an axis, a move of up to `shift` half boxes.

    A draw counts if the box, cut to the crop, keeps `least` pixels in both sides; after `tries` draws the box is given
    up.
    """

    scale: float = 0.25
    shift: float = 3.0
    least: float = 10.0
    tries: int = 12


def jittered(
    box: ArrayLike, factor: float, size: Sequence[int], random: np.random.Generator, jitter: Jitter
) -> Affine | None:
    """A training crop around a box, None if no draw keeps enough of it.

    A half box is half the mean side as it appears in the crop. Each try draws two normal numbers, then two uniform.
    """
    box = np.asarray(box, float)
    plain = around(box, factor, size)
    middle = np.array([size[1], size[0]], float) / 2
    for _ in range(jitter.tries):
        scale = plain.scale / np.exp(random.standard_normal(2) * jitter.scale)
        reach = jitter.shift * 0.5 * ((box[2:] - box[:2]) * scale).sum()
        crop = Affine(scale, middle - scale * (box[:2] + box[2:]) / 2 + random.uniform(-1, 1, 2) * reach)
        if has_extent(clipped(crop.to_crop(box), size), jitter.least):
            return crop
    return None


def cut(image: Image, crop: Affine, size: Sequence[int], fill: ArrayLike) -> tuple[Tensor, Affine]:
    """Resample a crop, bilinear without antialiasing, whole pixels to whole pixels.

    image: (H, W, 3) uint8. fill: (3,) colour outside of it, 0..255. Returns (3, h, w) float32, 0..255, and the mapping
    that was really used (its rectangles are snapped to pixels): boxes must be carried with that one.
    """
    height, width = size
    out = torch.as_tensor(np.asarray(fill, np.float32)).view(3, 1, 1).expand(3, height, width).clone()
    edges = (image.shape[1], image.shape[0])
    target = snapped(clipped(crop.to_crop((0, 0, *edges)), size))
    if (target[2:] <= target[:2]).any():
        return out, crop  # the crop shows nothing of the image
    source = np.clip(snapped(crop.to_image(target)), 0, np.tile(edges, 2)).astype(int)
    x1, y1, x2, y2 = source
    u1, v1, u2, v2 = target.astype(int)
    piece = torch.from_numpy(np.ascontiguousarray(image[y1:y2, x1:x2].transpose(2, 0, 1))).float()
    out[:, v1:v2, u1:u2] = F.interpolate(piece[None], (int(v2 - v1), int(u2 - u1)), mode="bilinear")[0]
    scale = ((target[2:] - target[:2]) / (source[2:] - source[:2])).astype(np.float32)
    shift = target[:2].astype(np.float32) - source[:2].astype(np.float32) * scale
    return out, Affine(scale.astype(float), shift.astype(float))


def snapped(box: ArrayLike) -> Box:
    """The whole pixels that a box touches."""
    box = np.asarray(box, float)
    return np.concatenate((np.floor(box[:2]), np.floor(box[2:] + _ALMOST_ONE)))


def clipped(box: ArrayLike, size: Sequence[int]) -> Box:
    """The part of a box inside an image of `size` (H, W); without extent if there is none."""
    return np.asarray(np.clip(np.asarray(box, float), 0, np.array([size[1], size[0]] * 2, float)))


def has_extent(box: ArrayLike, least: float = 0.0) -> bool:
    """Whether both sides are longer than 0, and at least `least`."""
    sides = np.asarray(box, float)[2:] - np.asarray(box, float)[:2]
    return bool((sides > 0).all() and (sides >= least).all())


def grown(box: ArrayLike, least: float) -> Box:
    """The box with sides raised to at least `least` about its centre."""
    box = np.asarray(box, float)
    centre, half = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], least) / 2
    return np.concatenate((centre - half, centre + half))


def mean_colour(image: Image) -> NDArray[np.float32]:
    """(H, W, 3) uint8 -> (3,) float32."""
    return np.asarray(image.reshape(-1, 3).mean(0, dtype=np.float64), np.float32)


def foreground_mask(box: ArrayLike, stride: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Which cells of a template crop its box touches; (H, W) int64 of 0 and 1. stride is (height, width) of a cell."""
    cells = torch.as_tensor(np.asarray(box, float) / np.array([stride[1], stride[0]] * 2))
    return covered_cells(cells[None], grid)[0].long()
