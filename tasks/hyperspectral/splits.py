"""Which labelled pixels train, validate and test.

A pixel is judged with the patch around it, so two parts chosen at random share almost every pixel they look at, and
published figures on such splits measure memory of the scene. `blocks` keeps the patches of different parts apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import OptionError, UnknownNameError, nearest

Labels = NDArray[np.int64]
Parts = dict[str, NDArray[np.bool_]]


def split_pixels(labels: Labels, how: str = "random", *, patch: int, seed: int = 0, **options: Any) -> Parts:
    """Disjoint masks (H, W) of labelled pixels for "train", "val" and "test".

    Args:
        how: "random" (`random_split`), "count" (`count_split`), "blocks" (`block_split`), or "all": every labelled
            pixel is in each part, for scenes that serve as one part only.
        patch: side of the patches; `blocks` keeps them from overlapping between parts.

    Raises:
        UnknownNameError: no such way. OptionError: shares, counts or sizes that cannot be had, naming the class.
    """
    if how == "all":
        if options:
            raise OptionError(f"how='all' takes no {sorted(options)}")
        return dict.fromkeys(("train", "val", "test"), labels > 0)
    if how not in _WAYS:
        raise UnknownNameError(f"no split is called {how!r}; {nearest(how, ['all', *_WAYS])}")
    try:
        parts = _WAYS[how](labels, patch=patch, seed=seed, **options)
    except TypeError as error:
        raise OptionError(f"split {how!r} does not take these options: {error}") from error
    _check_training(labels, parts["train"])
    return parts


def random_split(labels: Labels, *, patch: int, seed: int, train: float = 0.1, val: float = 0.0) -> Parts:
    """Shares of each class at random, the rest for testing; at least one training pixel a class.

    Patches of different parts overlap: fit for comparison with published figures, not as a measure of accuracy on
    new ground.
    """
    if not 0 < train < 1 or val < 0 or train + val >= 1:
        raise OptionError(f"train and val are shares of each class with train + val < 1, got train={train}, val={val}")
    return _by_class(labels, seed, lambda n: (max(1, round(train * n)), round(val * n)))


def count_split(labels: Labels, *, patch: int, seed: int, train: int = 20, val: int = 0) -> Parts:
    """So many training (and validation) pixels of each class, the rest for testing.

    Raises:
        OptionError: a class has no more pixels than that.
    """
    if train < 1 or val < 0:
        raise OptionError(f"train must be at least 1 and val at least 0, got train={train}, val={val}")
    for label, number in zip(*np.unique(labels[labels > 0], return_counts=True), strict=True):
        if number <= train + val:
            raise OptionError(f"class {label} has {number} pixels, too few for {train} + {val} and any to test")
    return _by_class(labels, seed, lambda n: (train, val))


def block_split(
    labels: Labels,
    *,
    patch: int,
    seed: int,
    block: int = 32,
    train: float = 0.5,
    val: float = 0.0,
) -> Parts:
    """Square blocks of the scene go to one part each; pixels whose patch would reach into another part are dropped.

    Blocks are dealt so that each class comes near its shares. No two patches of different parts share a pixel: the
    centres lie at least `patch` rows or columns apart.

    Raises:
        OptionError: blocks no larger than a patch, which would leave nothing of them.
    """
    if not 0 < train < 1 or val < 0 or train + val >= 1:
        raise OptionError(f"train and val are shares with train + val < 1, got train={train}, val={val}")
    if block <= patch:
        raise OptionError(f"blocks of {block} pixels are not larger than a patch of {patch}: nothing would be left")
    shares = np.array([train, val, 1 - train - val])
    rows, columns = -(-labels.shape[0] // block), -(-labels.shape[1] // block)
    number = np.arange(labels.shape[0])[:, None] // block * columns + np.arange(labels.shape[1]) // block
    every = range(1, int(labels.max()) + 1)
    counts = np.stack([np.bincount(number[labels == c], minlength=rows * columns) for c in every], 1)
    owner = _deal(counts, shares, np.random.default_rng(seed))[number]
    # The gap comes out of the later part: training pixels are what is scarce.
    parts: Parts = {}
    taken = np.zeros(labels.shape, dtype=bool)
    for index, name in enumerate(("train", "val", "test")):
        parts[name] = (labels > 0) & (owner == index) & ~grown(taken, patch - 1)
        taken |= parts[name]
    return parts


_WAYS: dict[str, Callable[..., Parts]] = {"random": random_split, "count": count_split, "blocks": block_split}


def grown(mask: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """True within `reach` rows and columns of a True pixel."""
    from scipy.ndimage import maximum_filter

    return maximum_filter(mask, 2 * reach + 1, mode="constant", cval=False)


def describe(labels: Labels, parts: Mapping[str, NDArray[np.bool_]], classes: tuple[str, ...]) -> str:
    """A table of the pixels of each class in each part, and of those in none."""
    width = max(len(name) for name in (*classes, "class"))
    lines = [f"{'class':<{width}}" + "".join(f"{name:>9}" for name in (*parts, "dropped"))]
    used = np.any(list(parts.values()), 0)
    for i, name in enumerate(classes, 1):
        numbers = [int((labels[mask] == i).sum()) for mask in (*parts.values(), ~used)]
        lines.append(f"{name:<{width}}" + "".join(f"{number:>9,}" for number in numbers))
    return "\n".join(lines)


def _deal(counts: NDArray[np.int64], shares: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Blocks (N, C) of class counts -> the part of each, largest first, always to where most is missing."""
    weight = counts / np.maximum(counts.sum(0), 1)  # rare classes count as much as common ones
    missing = np.outer(shares, (counts.sum(0) > 0).astype(float))
    owner = np.zeros(len(counts), dtype=np.int64)
    order = rng.permutation(len(counts))
    for i in order[np.argsort(-weight[order].sum(1), kind="stable")]:
        owner[i] = int(np.argmax(missing @ weight[i]))
        missing[owner[i]] -= weight[i]
    return owner


def _by_class(labels: Labels, seed: int, numbers: Callable[[int], tuple[int, int]]) -> Parts:
    rng = np.random.default_rng(seed)
    parts = {name: np.zeros(labels.size, dtype=bool) for name in ("train", "val", "test")}
    flat = labels.ravel()
    for label in np.unique(flat[flat > 0]):
        order = rng.permutation(np.flatnonzero(flat == label))
        train, val = numbers(len(order))
        for name, chosen in zip(parts, np.split(order, [train, train + val]), strict=True):
            parts[name][chosen] = True
    return {name: mask.reshape(labels.shape) for name, mask in parts.items()}


def _check_training(labels: Labels, train: NDArray[np.bool_]) -> None:
    lost = sorted(set(np.unique(labels[labels > 0]).tolist()) - set(np.unique(labels[train]).tolist()))
    if lost:
        raise OptionError(f"classes {lost} have no training pixel in this split; another seed, share or block size may")
