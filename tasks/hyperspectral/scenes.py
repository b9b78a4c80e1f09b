"""Scenes by name: the public benchmarks, as their files are published, the composed one, and any files of your own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.hyperspectral.composed import composed_scene
from tasks.hyperspectral.cubes import Scene, check_scene, header_of, labels_of, read_array, read_envi
from zoo.errors import OptionError, UnknownNameError, ZooError, nearest

_IP = (
    "alfalfa, corn no-till, corn min-till, corn, grass pasture, grass trees, mowed grass pasture, windrowed hay, "
    "oats, soybean no-till, soybean min-till, soybean clean, wheat, woods, buildings grass trees drives, "
    "stone steel towers"
)
_SALINAS = (
    "broccoli weeds 1, broccoli weeds 2, fallow, fallow rough plough, fallow smooth, stubble, celery, "
    "grapes untrained, vineyard soil, corn senesced weeds, romaine 4 weeks, romaine 5 weeks, romaine 6 weeks, "
    "romaine 7 weeks, vineyard untrained, vineyard vertical trellis"
)
_HOUSTON = (
    "healthy grass, stressed grass, synthetic grass, trees, soil, water, residential, commercial, road, highway, "
    "railway, parking lot 1, parking lot 2, tennis court, running track"
)
_HANCHUAN = (
    "strawberry, cowpea, soybean, sorghum, water spinach, watermelon, greens, trees, grass, red roof, grey roof, "
    "plastic, bare soil, road, bright object, water"
)
_HONGHU = (
    "red roof, road, bare soil, cotton, cotton firewood, rape, Chinese cabbage, pakchoi, cabbage, tuber mustard, "
    "Brassica parachinensis, Brassica chinensis, small Brassica chinensis, Lactuca sativa, celtuce, "
    "film-covered lettuce, romaine lettuce, carrot, white radish, garlic sprout, broad bean, tree"
)
_LONGKOU = (
    "corn, cotton, sesame, broad-leaf soybean, narrow-leaf soybean, rice, water, roads and houses, mixed weed"
)  # fmt: skip
_PAVIA_U = "asphalt, meadows, gravel, trees, metal sheets, bare soil, bitumen, bricks, shadows"
_PAVIA_C = "water, trees, asphalt, bricks, bitumen, tiles, shadows, meadows, bare soil"
_QINGYUN = "trees, concrete building, car, ironhide building, plastic playground, asphalt road"


@dataclass(frozen=True)
class Published:
    """Where a public scene lies: files, variables in them, (H, W, B) where it is known, class names."""

    cube: str
    cube_key: str
    labels: str
    labels_key: str
    shape: tuple[int, int, int] | None
    class_names: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of classes 1..C."""
        return tuple(name.strip() for name in self.class_names.split(","))


def _whu(name: str, shape: tuple[int, int, int], classes: str) -> Published:
    stem = f"WHU_Hi_{name}"
    return Published(f"{stem}.mat", stem, f"{stem}_gt.mat", f"{stem}_gt", shape, classes)


PUBLISHED = {
    "salinas": Published(
        "Salinas_corrected.mat", "salinas_corrected", "Salinas_gt.mat", "salinas_gt", (512, 217, 204), _SALINAS
    ),
    "indian_pines": Published(
        "Indian_pines_corrected.mat", "indian_pines_corrected", "Indian_pines_gt.mat", "indian_pines_gt",
        (145, 145, 200), _IP,
    ),
    "pavia_university": Published("PaviaU.mat", "paviaU", "PaviaU_gt.mat", "paviaU_gt", (610, 340, 103), _PAVIA_U),
    "pavia_centre": Published("Pavia.mat", "pavia", "Pavia_gt.mat", "pavia_gt", (1096, 715, 102), _PAVIA_C),
    "houston": Published("Houston.mat", "Houston", "Houston_gt.mat", "Houston_gt", (349, 1905, 144), _HOUSTON),
    "longkou": _whu("LongKou", (550, 400, 270), _LONGKOU),
    "hanchuan": _whu("HanChuan", (1217, 303, 274), _HANCHUAN),
    "honghu": _whu("HongHu", (940, 475, 270), _HONGHU),
    "qingyun": Published("QUH-Qingyun.mat", "Chengqu", "QUH-Qingyun_GT.mat", "ChengquGT", None, _QINGYUN),
}  # fmt: skip
# Copies of these files go round under other names too; each is tried.
_OTHER_NAMES = {"Pavia.mat": ("PaviaC.mat",), "Pavia_gt.mat": ("PaviaC_gt.mat",)}
_OTHER_KEYS = {"pavia": ("paviaC",), "pavia_gt": ("paviaC_gt",)}


def load_scene(
    name: str | None = None,
    *,
    root: str | Path = "data/hyperspectral",
    cube: str | Path | None = None,
    labels: str | Path | None = None,
    cube_key: str | None = None,
    labels_key: str | None = None,
    classes: Sequence[str] | None = None,
    bad_pixels: Literal["error", "unlabelled"] = "error",
    **composed: Any,
) -> Scene:
    """A checked, labelled scene.

    Args:
        name: a public scene (`PUBLISHED`), whose files lie in `root`; "composed"; or, with `cube`, what to call it.
        cube, labels: files of your own, with the variables' names in .mat files and the names of classes 1..C.
        bad_pixels: see `check_scene`.
        composed: options of `composed_scene`.

    Raises:
        UnknownNameError: no such scene. ZooError: everything wrong with files and labels, see `check_scene`.
    """
    if composed and name != "composed":
        raise OptionError(f"a scene from files takes no {sorted(composed)}; those belong to name='composed'")
    if cube is not None:
        if labels is None:
            raise OptionError(f"the cube {cube} needs `labels`, the file of its label map")
        found = _own(name or Path(cube).stem, Path(cube), Path(labels), cube_key, labels_key, classes)
    elif name == "composed":
        found = composed_scene(**composed)
    elif name in PUBLISHED:
        found = _published(name, Path(root))
    else:
        raise UnknownNameError(f"no scene is called {name!r}; {nearest(str(name), ['composed', *PUBLISHED])}")
    return check_scene(found, bad_pixels=bad_pixels)


def read_cube(path: str | Path, key: str | None = None) -> Scene:
    """A cube without labels, from any file that `read_array` takes; wavelengths where an ENVI header names them."""
    path = Path(path)
    waves = read_envi(path)[1] if path.suffix.lower() not in (".mat", ".npy") and header_of(path) else None
    return Scene(path.stem, read_array(path, key), wavelengths=waves)


def _own(
    name: str, cube: Path, labels: Path, cube_key: str | None, labels_key: str | None, classes: Sequence[str] | None
) -> Scene:
    values = read_cube(cube, cube_key)
    numbers, names = labels_of(_whole(read_array(labels, labels_key, ndim=2), labels), classes)
    return Scene(name, values.cube, numbers, names, values.wavelengths)


def _published(name: str, root: Path) -> Scene:
    entry = PUBLISHED[name]
    files = [_find(root, file, name) for file in (entry.cube, entry.labels)]
    cube = _variable(files[0], entry.cube_key, 3)
    numbers, classes = labels_of(_whole(_variable(files[1], entry.labels_key, 2), files[1]), entry.classes)
    return Scene(name, cube, numbers, classes)


def _find(root: Path, file: str, name: str) -> Path:
    for candidate in (file, *_OTHER_NAMES.get(file, ())):
        if (root / candidate).is_file():
            return root / candidate
    entry = PUBLISHED[name]
    raise ZooError(
        f"the scene {name!r} needs {entry.cube} and {entry.labels} in {root}, and {file} is not there; put the "
        "published files there, or set `root`"
    )


def _variable(path: Path, key: str, ndim: int) -> Any:
    """The variable by its published names, or the only one that fits."""
    for candidate in (key, *_OTHER_KEYS.get(key, ())):
        try:
            return read_array(path, candidate, ndim=ndim)
        except UnknownNameError:
            continue
    return read_array(path, None, ndim=ndim)


def _whole(array: Any, path: Path) -> Any:
    if array.dtype.kind == "f" and not (array == array.round()).all():
        raise ZooError(f"{path}: labels are fractions or NaN; a label map holds whole numbers, 0 for unlabelled")
    return array
