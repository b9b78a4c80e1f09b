"""The public single-object tracking sets as they lie on disk. Boxes come out as corners, counted from pixel 0.

Everything wrong with a set is found when it is built and told at once. Frames are named, not listed or opened: of each
sequence the first and the last must be there, and a damaged one is an error when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.classification.images import IMAGE_SUFFIXES, read_image
from tasks.tracking.crops import Image
from tasks.tracking.data import SequenceSet
from tasks.tracking.sequences import FrameFiles, Frames, TrackSequence, xyxy
from zoo.errors import UnknownNameError, ZooError, nearest
from zoo.registry import DATASETS


class NumberedFrames:
    """Frames in files called by number: `folder/<number>.jpg` from `start` on, zero-padded to `digits`."""

    def __init__(self, folder: Path, count: int, *, start: int = 1, digits: int = 8) -> None:
        self.folder, self.count, self.start, self.digits = folder, count, start, digits
        for number in (0, count - 1):
            if count and not self.path(number).is_file():
                raise ZooError(f"{count} frames are annotated, but {self.path(number)} does not exist")

    def __len__(self) -> int:
        return self.count

    def path(self, number: int) -> Path:
        """The file of frame `number`, counted from 0."""
        return self.folder / f"{number + self.start:0{self.digits}d}.jpg"

    def __getitem__(self, number: int, /) -> Image:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return read_image(self.path(number))


@DATASETS.register_module()
class LaSOT(SequenceSet):
    """LaSOT (Fan et al. 2019): `CLASS/CLASS-N/{img/, groundtruth.txt, full_occlusion.txt, out_of_view.txt, nlp.txt}`.

    Annotations count pixels from 1. An object is visible unless it is fully occluded or out of view.

    Args:
        root: the folder of class folders, with `training_set.txt` and `testing_set.txt`.
        split: "train" or "test".
        exclude: names of sequences to leave out.
    """

    def __init__(self, root: str | Path, *, split: str, exclude: Iterable[str] = ()) -> None:
        lists = {"train": "training_set.txt", "test": "testing_set.txt"}
        _check_split("LaSOT", split, lists)
        root = Path(root)
        problems: list[str] = []
        names = _listed(root / lists[split], problems)
        folders = [root / name.rpartition("-")[0] / name for name in names if name not in set(exclude)]
        super().__init__(_each(folders, _lasot(1), problems), f"LaSOT {split} of {root}", problems)


@DATASETS.register_module()
class LaSOTExtension(SequenceSet):
    """LaSOT's extension (Fan et al. 2021), 15 classes x 10: as LaSOT, without lists, pixels taken as they are.

    Args:
        root: the folder of class folders.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        problems: list[str] = []
        folders = sorted((p.parent for p in root.glob("*/*-*/groundtruth.txt")), key=_natural)
        super().__init__(_each(folders, _lasot(0), problems), f"LaSOT extension {root}", problems)


@DATASETS.register_module()
class GOT10k(SequenceSet):
    """GOT-10k (Huang et al. 2019): `{train,val,test}/{list.txt, NAME/{%08d.jpg, groundtruth.txt, *.label}}`.

    The test part has only the first box. Frames count as visible unless `absence.label` is 1 or `cover.label` is 0.

    Args:
        root, split: "train", "val" or "test".
        exclude: names of sequences to leave out, such as those that other benchmarks share.
    """

    def __init__(self, root: str | Path, *, split: str, exclude: Iterable[str] = ()) -> None:
        _check_split("GOT-10k", split, ("train", "val", "test"))
        folder = Path(root, split)
        problems: list[str] = []
        names = [name for name in _listed(folder / "list.txt", problems) if name not in set(exclude)]
        found = _each([folder / name for name in names], _got10k, problems)
        super().__init__(found, f"GOT-10k {split} of {root}", problems)


@DATASETS.register_module()
class TrackingNet(SequenceSet):
    """TrackingNet (Muller et al. 2018): `{TRAIN_0..11, TEST}/{frames/SEQ/%d.jpg from 0, anno/SEQ.txt}`.

    The test part has only the first box.

    Args:
        root, split: "train" (whichever of the twelve parts are there) or "test".
    """

    def __init__(self, root: str | Path, *, split: str) -> None:
        _check_split("TrackingNet", split, ("train", "test"))
        root = Path(root)
        problems: list[str] = []
        parts = [f"TRAIN_{i}" for i in range(12)] if split == "train" else ["TEST"]
        files = [file for part in parts for file in sorted((root / part / "anno").glob("*.txt"))]
        super().__init__(_each(files, _trackingnet, problems), f"TrackingNet {split} of {root}", problems)


@DATASETS.register_module()
class TNL2K(SequenceSet):
    """TNL2K (Wang et al. 2021): `SEQ/{imgs/, groundtruth.txt, language.txt}`.

    Args:
        root: the folder of sequences.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        problems: list[str] = []
        folders = sorted((p.parent for p in root.glob("*/groundtruth.txt")), key=_natural)
        super().__init__(_each(folders, _tnl2k, problems), f"TNL2K {root}", problems)


def read_numbers(file: Path, columns: int | None = None) -> NDArray[np.float64]:
    """A text of numbers, separated by commas, tabs or spaces: (lines, columns) float64.

    Raises:
        ZooError: missing, empty, not numbers (with the line), or lines of another length.
    """
    if not file.is_file():
        raise ZooError(f"{file} does not exist")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = [word for word in re.split(r"[,\s]+", line.strip()) if word]
        if not words:
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError:
            raise ZooError(f"{file} line {number}: expected numbers, got {line.strip()!r}") from None
        if len(rows[-1]) != (columns or len(rows[0])):
            wanted = columns or len(rows[0])
            raise ZooError(f"{file} line {number}: expected {wanted} numbers, got {len(rows[-1])}")
    if not rows:
        raise ZooError(f"{file} is empty")
    return np.array(rows)


def read_boxes(file: Path, origin: int = 0) -> NDArray[np.float64]:
    """Lines `x, y, w, h` whose first pixel is `origin` -> (T, 4) corners."""
    return xyxy(read_numbers(file, 4)) - origin


def image_files(folder: Path) -> list[Path]:
    """Images of a folder in natural order of their names."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES] if folder.is_dir() else []
    return sorted(found, key=_natural)


def _lasot(origin: int) -> Callable[[Path], TrackSequence]:
    def read(folder: Path) -> TrackSequence:
        boxes = read_boxes(folder / "groundtruth.txt", origin)
        hidden = [read_numbers(folder / f"{name}.txt").ravel() > 0 for name in ("full_occlusion", "out_of_view")]
        text = folder / "nlp.txt"
        words = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        frames = NumberedFrames(folder / "img", len(boxes))
        if {len(column) for column in hidden} != {len(boxes)}:
            raise ZooError(f"{folder}: {len(boxes)} boxes, but visibility of {[len(column) for column in hidden]}")
        return TrackSequence(folder.name, frames, boxes, ~(hidden[0] | hidden[1]), text=words)

    return read


def _got10k(folder: Path) -> TrackSequence:
    boxes = read_boxes(folder / "groundtruth.txt")
    if not (folder / "cover.label").is_file():  # the test part
        return TrackSequence(folder.name, FrameFiles(image_files(folder)), boxes)
    cover = read_numbers(folder / "cover.label", 1).ravel().astype(np.int64)
    absent = read_numbers(folder / "absence.label", 1).ravel() > 0
    frames = NumberedFrames(folder, len(boxes))
    if not len(cover) == len(absent) == len(boxes):
        raise ZooError(f"{folder}: {len(boxes)} boxes, {len(cover)} lines of cover, {len(absent)} of absence")
    return TrackSequence(folder.name, frames, boxes, ~absent & (cover > 0), cover)


def _trackingnet(file: Path) -> TrackSequence:
    boxes = read_boxes(file)
    folder = file.parent.parent / "frames" / file.stem
    known = len(boxes) > 1
    frames: Frames = NumberedFrames(folder, len(boxes), start=0, digits=1) if known else FrameFiles(image_files(folder))
    return TrackSequence(file.stem, frames, boxes)


def _tnl2k(folder: Path) -> TrackSequence:
    boxes = read_boxes(folder / "groundtruth.txt")
    text = folder / "language.txt"
    words = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
    return TrackSequence(folder.name, FrameFiles(image_files(folder / "imgs")), boxes, text=words)


def _each(paths: Iterable[Path], read: Callable[[Path], TrackSequence], problems: list[str]) -> list[TrackSequence]:
    found = []
    for path in paths:
        try:
            found.append(read(path))
        except ZooError as error:
            problems.append(str(error))
    return found


def _listed(file: Path, problems: list[str]) -> list[str]:
    if not file.is_file():
        problems.append(f"the list {file} does not exist")
        return []
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _check_split(where: str, split: str, known: Iterable[str]) -> None:
    if split not in set(known):
        raise UnknownNameError(f"{where} has no split {split!r}; {nearest(split, known)}")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    words: Sequence[Any] = re.findall(r"\d+|\D+", path.stem)
    return [(0, int(word)) if word.isdecimal() else (1, word) for word in words]
