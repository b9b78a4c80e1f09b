"""Patches around labelled pixels, of a scene reduced to a few features a pixel.

A sample is `dict(inputs=(K, P, P) float32, data_samples=dict(label, index, row, column))`, label 0..C-1. Everything
wrong with a scene is found when the data set is built.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tasks.hyperspectral.cubes import Scene
from tasks.hyperspectral.reduction import Basis, fit_basis
from tasks.hyperspectral.scenes import load_scene
from tasks.hyperspectral.splits import Parts, split_pixels
from zoo.errors import OptionError, ZooError, nearest
from zoo.registry import DATASETS

PARTS = ("train", "val", "test")


class Prepared(NamedTuple):
    """A scene with its split."""

    scene: Scene
    parts: Parts


@DATASETS.register_module()
class SpectralPatches(Dataset[dict[str, Any]]):
    """One patch a labelled pixel of one part of a scene.

    Args:
        scene: options of `load_scene`, such as `dict(name="salinas", root=...)`.
        part: "train", "val" or "test" of the split.
        split: options of `split_pixels`, such as `dict(how="blocks", block=32)`.
        reduction: options of `fit_basis`, and `fit`: "train" (default) fits on training pixels only, "scene" on all
            pixels, background and test included, as many published programs do.
        fit_scene, fit_split: the scene and split on whose pixels the reduction is fitted, where that is not this one:
            a scene to test on must be reduced as the training scene was.
        patch: P, odd. Outside the scene, patches are zero: the mean spectrum of what the reduction was fitted on.
        augment: random flips and quarter turns.

    Raises:
        ZooError: what is wrong with the scene, or no pixel in this part. OptionError: a wrong option.
    """

    def __init__(
        self,
        scene: Mapping[str, Any],
        *,
        part: str = "train",
        split: Mapping[str, Any] | None = None,
        reduction: Mapping[str, Any] | None = None,
        fit_scene: Mapping[str, Any] | None = None,
        fit_split: Mapping[str, Any] | None = None,
        patch: int = 15,
        augment: bool = False,
    ) -> None:
        if part not in PARTS:
            raise OptionError(f"part {part!r} is unknown; {nearest(part, PARTS)}")
        if patch < 1 or patch % 2 == 0:
            raise OptionError(f"patch must be odd, so that it has a middle, got {patch}")
        split = dict(split or {"how": "random"})
        self.scene, self.parts = prepare(scene, split, patch)
        fitted = (fit_scene or scene, dict(fit_split or (split if fit_scene is None else {"how": "all"})))
        self.basis = prepare_basis(*fitted, dict(reduction or {}), patch)
        self.patch, self.augment, self.part = patch, augment, part
        assert self.scene.labels is not None
        self.pixels = np.argwhere(self.parts[part])
        if len(self.pixels) == 0:
            raise ZooError(f"no pixel of {self.scene.name} is in its part {part!r} with the split {split}")
        self.targets = self.scene.labels[self.parts[part]] - 1
        self.padded = padded(self.basis(self.scene.cube), patch)
        self.metainfo: dict[str, Any] = {"classes": self.scene.classes}

    @property
    def labels(self) -> list[int]:
        """Class index of every sample."""
        return [int(target) for target in self.targets]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, column = (int(v) for v in self.pixels[index])
        values = self.padded[:, row : row + self.patch, column : column + self.patch]
        if self.augment:
            values = np.rot90(values, np.random.randint(4), (1, 2))
            values = values[:, ::-1] if np.random.randint(2) else values
        sample = {"label": int(self.targets[index]), "index": index, "row": row, "column": column}
        return {"inputs": torch.from_numpy(np.ascontiguousarray(values)), "data_samples": sample}


def padded(reduced: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
    """(H, W, K) -> (K, H + P - 1, W + P - 1), zeros around it."""
    reach = patch // 2
    return np.ascontiguousarray(np.pad(reduced.transpose(2, 0, 1), ((0, 0), (reach, reach), (reach, reach))))


def patches_at(bordered: NDArray[np.float32], pixels: NDArray[np.int64], patch: int) -> Tensor:
    """Patches (N, K, P, P) around pixels (N, 2) of a scene that `padded` made."""
    views = sliding_window_view(bordered, (patch, patch), (1, 2))  # K H W P P
    return torch.from_numpy(np.ascontiguousarray(views[:, pixels[:, 0], pixels[:, 1]].swapaxes(0, 1)))


def prepare(scene: Mapping[str, Any], split: Mapping[str, Any], patch: int) -> Prepared:
    """Scene and split; those of the last few configs are kept, as training and validation data share them."""
    return _prepare(_key(scene), _key(split), patch)


def prepare_basis(
    scene: Mapping[str, Any], split: Mapping[str, Any], reduction: Mapping[str, Any], patch: int
) -> Basis:
    """The reduction fitted on a scene's training pixels (or on all its pixels with `fit="scene"`)."""
    return _fit(_key(scene), _key(split), _key(reduction), patch)


def _key(options: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(options), sort_keys=True, default=str)
    except TypeError as error:
        raise OptionError(f"{dict(options)} is no plain data: {error}") from error


@functools.lru_cache(maxsize=4)
def _prepare(scene: str, split: str, patch: int) -> Prepared:
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(scene).items()}
    try:
        found = load_scene(**options)
    except TypeError as error:
        if isinstance(error, ZooError):
            raise
        raise OptionError(f"the scene {options} does not fit: {error}") from error
    assert found.labels is not None  # `load_scene` refuses a scene without them
    return Prepared(found, split_pixels(found.labels, patch=patch, **json.loads(split)))


@functools.lru_cache(maxsize=8)
def _fit(scene: str, split: str, reduction: str, patch: int) -> Basis:
    found, parts = _prepare(scene, split, patch)
    options = json.loads(reduction)
    where = options.pop("fit", "train")
    if where not in ("train", "scene"):
        raise OptionError(f"the reduction is fitted on 'train' or 'scene', got {where!r}")
    pixels = found.cube.reshape(-1, found.cube.shape[2]) if where == "scene" else found.cube[parts["train"]]
    try:
        return fit_basis(pixels, **options)
    except TypeError as error:
        if isinstance(error, ZooError):
            raise
        raise OptionError(f"the reduction {options} does not fit: {error}") from error
