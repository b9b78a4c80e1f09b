"""Reading cubes and label maps: MATLAB 5 and 7.3, ENVI, NumPy. A cube is (H, W, B), a label map (H, W), 0 unlabelled.

ENVI and .npy files are memory-mapped, so that a cube larger than memory can be reduced row by row.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.errors import OptionError, UnknownNameError, ZooError, nearest

Array = NDArray[Any]
SUFFIXES = (".mat", ".npy", ".hdr")
_ENVI_TYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
_ENVI_DATA = ("", ".img", ".dat", ".raw", ".bsq", ".bil", ".bip", ".sli")
_ENVI_AXES = {"bsq": ("b", "r", "c"), "bil": ("r", "b", "c"), "bip": ("r", "c", "b")}  # band, row, column


@dataclass(frozen=True)
class Scene:
    """A cube and what is known about it.

    Attributes:
        name: for messages and pictures.
        cube: (H, W, B), real numbers of any type, perhaps memory-mapped.
        labels: (H, W) int64, 0 where nothing is known, 1..C the classes; None for a cube to predict only.
        classes: C names.
        wavelengths: (B,) in nanometres, None where unknown; false colours are chosen by them.
    """

    name: str
    cube: Array
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    wavelengths: NDArray[np.float64] | None = None


def read_array(path: str | Path, key: str | None = None, *, ndim: int = 3) -> Array:
    """The array of `ndim` axes in a file: .mat (versions 5 and 7.3), .npy, or an ENVI header or its data file.

    Args:
        key: name of the variable in a .mat file; None takes the only one that has `ndim` axes.

    Raises:
        ZooError: the file is missing, damaged, of an unknown kind, or holds no such array. UnknownNameError: no
            variable `key`, with the names there are.
    """
    path = Path(path)
    if not path.is_file():
        raise ZooError(f"missing file {path}")
    try:
        if path.suffix.lower() == ".mat":
            array = _read_mat(path, key, ndim)
        elif path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif header_of(path) is not None:
            array = read_envi(path)[0]
        else:
            raise ZooError(f"{path}: cubes are read from {', '.join(SUFFIXES)} and ENVI data files with a .hdr beside")
    except ZooError:
        raise
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ZooError(f"unreadable file {path}: {error}") from error
    if ndim == 2 and array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != ndim or array.dtype.kind not in "fiub":
        what = "a cube (rows, columns, bands)" if ndim == 3 else "a label map (rows, columns)"
        raise ZooError(f"{path} holds {array.dtype} of shape {array.shape}, which is not {what} of real numbers")
    return array


def _read_mat(path: Path, key: str | None, ndim: int) -> Array:
    if path.read_bytes()[:128].find(b"MATLAB 7.3") >= 0:
        return _read_mat73(path, key, ndim)
    from scipy.io import loadmat, whosmat

    shapes = {name: shape for name, shape, kind in whosmat(path) if kind not in ("cell", "struct", "char", "object")}
    return np.asarray(loadmat(path, variable_names=[name := _choose(path, shapes, key, ndim)])[name])


def _read_mat73(path: Path, key: str | None, ndim: int) -> Array:
    if importlib.util.find_spec("h5py") is None:
        raise ZooError(
            f"{path} is a MATLAB 7.3 (HDF5) file, which needs the package h5py: pip install h5py "
            "(or save it with MATLAB's -v7)"
        )
    import h5py

    with h5py.File(path, "r") as file:
        shapes = {name: item.shape for name, item in file.items() if isinstance(item, h5py.Dataset)}
        # MATLAB stores columns first, so HDF5 sees the axes reversed.
        return np.ascontiguousarray(np.transpose(file[_choose(path, shapes, key, ndim)][()]))


def _choose(path: Path, shapes: dict[str, tuple[int, ...]], key: str | None, ndim: int) -> str:
    if key is not None:
        if key not in shapes:
            raise UnknownNameError(f"{path} has no variable {key!r}; {nearest(key, shapes)}")
        return key
    fitting = [name for name, shape in shapes.items() if len(shape) == ndim]
    if len(fitting) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
        raise ZooError(f"{path} holds {len(fitting)} arrays of {ndim} axes; give the variable's name. It has: {listed}")
    return fitting[0]


def header_of(path: Path) -> Path | None:
    """The ENVI header of a header or data file: itself, `x.hdr`, or `x.img.hdr`."""
    if path.suffix.lower() == ".hdr":
        return path
    beside = (path.with_suffix(".hdr"), path.with_name(path.name + ".hdr"))
    return next((found for found in beside if found.is_file()), None)


def read_envi(path: str | Path) -> tuple[Array, NDArray[np.float64] | None]:
    """An ENVI file, by its header or data file -> memory-mapped (H, W, B), and wavelengths (B,) in nm where given.

    Raises:
        ZooError: a field is missing or unknown, or the data file is missing or shorter than the header says.
    """
    header = header_of(Path(path))
    if header is None or not header.is_file():
        raise ZooError(f"there is no ENVI header for {path}")
    fields = envi_fields(header)
    absent = [name for name in ("samples", "lines", "bands", "data type", "interleave") if name not in fields]
    if absent:
        raise ZooError(f"{header} lacks the fields {absent}")
    code, layout = int(fields["data type"]), fields["interleave"].lower()
    if code not in _ENVI_TYPES or layout not in _ENVI_AXES:
        raise ZooError(f"{header}: data type {code} with interleave {layout!r} is not supported")
    size = {"r": int(fields["lines"]), "c": int(fields["samples"]), "b": int(fields["bands"])}
    kind = np.dtype(_ENVI_TYPES[code]).newbyteorder(">" if fields.get("byte order", "0").strip() == "1" else "<")
    offset = int(fields.get("header offset", 0))
    data = _envi_data(header, Path(path))
    wanted = offset + kind.itemsize * size["r"] * size["c"] * size["b"]
    if data.stat().st_size < wanted:
        raise ZooError(f"{data} has {data.stat().st_size} bytes, its header asks for {wanted}")
    axes = _ENVI_AXES[layout]
    stored = np.memmap(data, kind, "r", offset, tuple(size[axis] for axis in axes))
    return stored.transpose([axes.index(axis) for axis in "rcb"]), _wavelengths(fields, size["b"])


def envi_fields(header: Path) -> dict[str, str]:
    """The fields of an ENVI header, names in lower case, braces taken off."""
    text = header.read_text(encoding="utf-8", errors="replace")
    if not text.lstrip().startswith("ENVI"):
        raise ZooError(f"{header} is no ENVI header: it does not begin with ENVI")
    found = re.findall(r"^\s*([^=\n]+?)\s*=\s*(\{[^}]*\}|[^\n]*)", text, re.MULTILINE)
    return {" ".join(name.lower().split()): value.strip().strip("{}").strip() for name, value in found}


def _envi_data(header: Path, given: Path) -> Path:
    if given != header:
        return given
    stem = header.with_suffix("")
    beside = [Path(f"{stem}{suffix}") for suffix in _ENVI_DATA]
    found = next((path for path in beside if path.is_file()), None)
    if found is None:
        raise ZooError(f"no data file beside {header}; looked for {', '.join(p.name for p in beside)}")
    return found


def _wavelengths(fields: dict[str, str], bands: int) -> NDArray[np.float64] | None:
    listed = fields.get("wavelength", "").replace(",", " ").split()
    if len(listed) != bands:
        return None
    values = np.array(listed, dtype=np.float64)
    return values * 1000 if values.max() < 100 else values  # micrometres


def check_scene(scene: Scene, *, bad_pixels: Literal["error", "unlabelled"] = "error") -> Scene:
    """The scene as it can be trained and tested on, or an error that says everything that is wrong with it.

    Args:
        bad_pixels: what to do with pixels that have a band that is not finite: refuse the scene, or take their label
            away and give them the mean spectrum.

    Raises:
        ZooError: sizes that differ, labels that are missing, fractional, negative, above the number of classes, or
            all 0; pixels that are not finite.
    """
    if bad_pixels not in ("error", "unlabelled"):
        raise OptionError(f"bad_pixels is 'error' or 'unlabelled', got {bad_pixels!r}")
    problems = _label_problems(scene)
    bad = ~finite_pixels(scene.cube)
    if bad.all():
        problems.append("no pixel is finite in all bands")
    elif bad.any() and bad_pixels == "error":
        row, column = np.argwhere(bad)[0]
        problems.append(
            f"{bad.sum()} of {bad.size} pixels hold NaN or infinity, the first at row {row}, column {column}; "
            "bad_pixels='unlabelled' leaves them out"
        )
    if problems:
        raise ZooError("\n  ".join([f"scene {scene.name}: {len(problems)} problem(s)", *problems]))
    if not bad.any():
        return scene
    cube = np.array(scene.cube, dtype=np.float32)
    cube[bad] = cube[~bad].mean(0, dtype=np.float64)
    labels = None if scene.labels is None else np.where(bad, 0, scene.labels)
    return replace(scene, cube=cube, labels=labels)


def finite_pixels(cube: Array, rows: int = 64) -> NDArray[np.bool_]:
    """(H, W): whether all bands are finite; reads a few rows at a time."""
    if cube.dtype.kind != "f":
        return np.ones(cube.shape[:2], dtype=bool)
    parts = [np.isfinite(cube[i : i + rows]).all(-1) for i in range(0, len(cube), rows)]
    return np.concatenate(parts)


def _label_problems(scene: Scene) -> list[str]:
    labels, shape = scene.labels, scene.cube.shape
    if labels is None:
        return ["it has no label map"]
    if labels.shape != shape[:2]:
        swapped = " (rows and columns are swapped)" if labels.shape == shape[1::-1] else ""
        return [f"labels of shape {labels.shape} do not fit a cube of shape {shape}{swapped}"]
    problems = []
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.round(labels)):
        problems.append("labels are fractions; they must be whole numbers")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > len(scene.classes):
        problems.append(f"labels run from {low} to {high}; {len(scene.classes)} classes allow 0..{len(scene.classes)}")
    if high <= 0:
        problems.append("every pixel is background (label 0): there is nothing to learn")
    return problems


def labels_of(array: Array, classes: Sequence[str] | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """A label map as int64 and its class names, numbered where none are given."""
    names = tuple(classes) if classes else tuple(f"class {i}" for i in range(1, int(np.max(array, initial=0)) + 1))
    return np.asarray(array, dtype=np.int64), names
