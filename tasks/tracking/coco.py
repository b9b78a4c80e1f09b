"""COCO as a tracking set: every object is a film of one frame."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from tasks.tracking.data import SequenceSet
from tasks.tracking.sequences import FrameFiles, TrackSequence, xyxy
from zoo.errors import ZooError
from zoo.registry import DATASETS


@DATASETS.register_module()
class COCOTracks(SequenceSet):
    """Objects of COCO (Lin et al. 2014): `annotations/instances_<split>.json` and `<split>/` (or `images/<split>/`).

    Crowds and objects without extent are dropped. Sequences are made when asked for: 860,000 of them would not fit.

    Args:
        root, split: such as "train2017".
    """

    def __init__(self, root: str | Path, *, split: str = "train2017") -> None:
        root, where, problems = Path(root), f"COCO {split} of {root}", []
        file = root / "annotations" / f"instances_{split}.json"
        folder = next((p for p in (root / split, root / "images" / split) if p.is_dir()), None)
        if not file.is_file():
            problems.append(f"{file} does not exist")
        if folder is None:
            problems.append(f"there is no folder {root / split} with the images")
        if problems or folder is None:
            super().__init__([], where, problems)
        else:
            super().__init__(_read(file, folder), where)


class _Objects(Sequence[TrackSequence]):
    def __init__(self, folder: Path, files: list[str], boxes: np.ndarray, numbers: np.ndarray) -> None:
        self.folder, self.files, self.boxes, self.numbers = folder, files, boxes, numbers

    def __len__(self) -> int:
        return len(self.boxes)

    @overload
    def __getitem__(self, index: int) -> TrackSequence: ...

    @overload
    def __getitem__(self, index: slice) -> list[TrackSequence]: ...

    def __getitem__(self, index: int | slice) -> TrackSequence | list[TrackSequence]:
        if isinstance(index, slice):
            return [self._one(i) for i in range(*index.indices(len(self)))]
        return self._one(index)

    def __iter__(self) -> Iterator[TrackSequence]:
        return map(self._one, range(len(self)))

    def _one(self, index: int) -> TrackSequence:
        file = self.files[self.numbers[index]]
        box = xyxy(self.boxes[index : index + 1].astype(float))
        return TrackSequence(f"{Path(file).stem}_{index}", FrameFiles([self.folder / file]), box)


def _read(file: Path, folder: Path) -> _Objects:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        files = [image["file_name"] for image in content["images"]]
        number_of = {image["id"]: number for number, image in enumerate(content["images"])}
        kept = [one for one in content["annotations"] if not one.get("iscrowd") and min(one["bbox"][2:]) > 0]
        boxes = np.array([one["bbox"] for one in kept], np.float32).reshape(-1, 4)
        numbers = np.array([number_of[one["image_id"]] for one in kept], np.int32)
    except (ValueError, KeyError, TypeError) as error:
        raise ZooError(f"{file} is not a file of COCO instances: {type(error).__name__} {error}") from error
    return _Objects(folder, files, boxes, numbers)
