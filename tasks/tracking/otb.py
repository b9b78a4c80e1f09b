"""OTB-100, whose sequences differ in nearly everything that can differ."""

from __future__ import annotations

from pathlib import Path

from tasks.tracking.data import SequenceSet
from tasks.tracking.readers import NumberedFrames, read_boxes
from tasks.tracking.sequences import TrackSequence
from zoo.errors import ZooError
from zoo.registry import DATASETS

FIRST = {"BlurCar1": 247, "BlurCar3": 3, "BlurCar4": 18, "David": 300}  # numbers of the first annotated frames
LAST = {"David": 770, "Football1": 74, "Freeman3": 460, "Freeman4": 283, "Diving": 215}
DIGITS = {"Board": 5}
OBJECTS = {"Jogging": ("1", "2"), "Skating2": ("1", "2"), "Human4": ("2",)}  # suffixes of their annotation files


@DATASETS.register_module()
class OTB100(SequenceSet):
    """OTB-100 (Wu et al. 2015): `SEQ/{img/%04d.jpg, groundtruth_rect.txt}`; numbers separated by commas, tabs, spaces.

    Films with several objects give one sequence each (`Jogging.1`, `Jogging.2`); annotations that start late or stop
    early keep their frames. Coordinates are taken as they are written, as the common toolkits do.

    Args:
        root: the folder of sequences.
        skip_tiger1: leave out the first five frames of Tiger1, as pytracking's list does.
    """

    def __init__(self, root: str | Path, *, skip_tiger1: bool = False) -> None:
        root = Path(root)
        found, problems = [], []
        for folder in sorted(p for p in root.iterdir() if (p / "img").is_dir()) if root.is_dir() else ():
            for suffix in (f".{number}" for number in OBJECTS[folder.name]) if folder.name in OBJECTS else ("",):
                try:
                    found.append(_read(folder, suffix, 5 if skip_tiger1 and folder.name == "Tiger1" else 0))
                except ZooError as error:
                    problems.append(str(error))
        super().__init__(found, f"OTB-100 {root}", problems)


def _read(folder: Path, suffix: str, skip: int) -> TrackSequence:
    name = folder.name
    first = FIRST.get(name, 1)
    boxes = read_boxes(folder / f"groundtruth_rect{suffix}.txt")
    if name in LAST:
        boxes = boxes[: LAST[name] - first + 1]
    frames = NumberedFrames(folder / "img", len(boxes) - skip, start=first + skip, digits=DIGITS.get(name, 4))
    return TrackSequence(name + suffix, frames, boxes[skip:])
