"""A labelled scene composed of measured spectra: the data that needs no download.

Spectra: the library of the package earthlib (MIT): 5,261 measured reflectances of 180 bands, 400 to 2450 nm. Of these
twelve classes of soils, roofs and pavements are used. The layout is drawn: parcels of a Voronoi diagram, each a
mixture of a few spectra of one class, under uneven light, blurred, with noise. The spectra are real, the scene is not.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.hyperspectral.cubes import Scene
from zoo.errors import OptionError, ZooError

CLASSES = (
    "soil", "comp_shingle", "road", "paint", "sidewalk", "parking_lot", "sand", "litter", "gravel", "bark",
    "wood_shingle", "concrete_tile",
)  # fmt: skip
BANDS = 180
WAVELENGTHS = 400.0 + np.arange(BANDS) * (2050.0 / (BANDS - 1))
_LIBRARY_SPLIT_SEED = 1


def composed_scene(
    half: Literal["first", "second"] = "first",
    *,
    seed: int = 0,
    size: tuple[int, int] = (96, 96),
    parcels: int = 60,
    spectra_per_parcel: int = 4,
    blur: float = 0.7,
    snr_db: float = 30.0,
) -> Scene:
    """A scene (H, W, 180) float32 in which every pixel is labelled with one of twelve classes.

    Args:
        half: which half of each class's spectra is used. The halves share no spectrum, so a scene of the other half
            holds nothing that was trained on.
        seed: layout, mixtures, light and noise.
        parcels: number of Voronoi cells; at least one a class.
        spectra_per_parcel: how many spectra a parcel mixes, with Dirichlet weights anew in each pixel.
        blur: standard deviation of the optics in pixels. snr_db: signal to noise of the whole scene.

    Raises:
        ZooError: earthlib is not installed. OptionError: an option out of range.
    """
    from scipy.ndimage import gaussian_filter

    height, width = size
    if half not in ("first", "second"):
        raise OptionError(f"half is 'first' or 'second', got {half!r}")
    if parcels < len(CLASSES) or spectra_per_parcel < 1 or min(size) < 8:
        raise OptionError(f"a scene needs 8 x 8 pixels and {len(CLASSES)} parcels, got {size} and {parcels}")
    spectra, pools = library()
    rng = np.random.default_rng(seed)
    centres = rng.random((parcels, 2)) * size
    kind = np.concatenate([np.arange(len(CLASSES)), rng.integers(0, len(CLASSES), parcels - len(CLASSES))])
    at = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    parcel = np.square(at[:, :, None] - centres).sum(-1).argmin(-1)
    cube = np.empty((height, width, BANDS), dtype=np.float32)
    for number in np.unique(parcel):
        inside = parcel == number
        pool = pools[half][CLASSES[kind[number]]]
        chosen = rng.choice(pool, min(spectra_per_parcel, len(pool)), replace=False)
        weights = rng.dirichlet(np.full(len(chosen), 1.5), int(inside.sum())).astype(np.float32)
        cube[inside] = weights @ spectra[chosen]
    light = np.clip(1 + 2 * gaussian_filter(rng.standard_normal(size), 8), 0.6, 1.4).astype(np.float32)
    cube = gaussian_filter(cube * light[..., None], (blur, blur, 0))
    cube += rng.standard_normal(cube.shape, dtype=np.float32) * (cube.std() * 10 ** (-snr_db / 20))
    return Scene(f"composed {half} {seed}", cube, kind[parcel].astype(np.int64) + 1, CLASSES, WAVELENGTHS)


@functools.cache
def library() -> tuple[NDArray[np.float32], dict[str, dict[str, NDArray[Any]]]]:
    """The spectra (7261, 180), and for each half the rows of each class: halves are disjoint and fixed."""
    spec = importlib.util.find_spec("earthlib")
    folder = Path(spec.origin).parent / "data" if spec is not None and spec.origin else Path()
    if spec is None or not (folder / "spectra.sli").is_file():
        raise ZooError(
            "the composed scene is made of spectra inside the package earthlib: pip install earthlib "
            "(or pip install 'vision-adapter-zoo[hyperspectral]')"
        )
    spectra = np.fromfile(folder / "spectra.sli", dtype="<f4").reshape(-1, BANDS)
    with (folder / "spectra.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != len(spectra):
        raise ZooError(f"{folder} is damaged: {len(rows)} descriptions of {len(spectra)} spectra; reinstall earthlib")
    rng = np.random.default_rng(_LIBRARY_SPLIT_SEED)
    halves: dict[str, dict[str, NDArray[Any]]] = {"first": {}, "second": {}}
    for name in CLASSES:
        # Canopies in the library are simulated; only measured spectra count here.
        own = [i for i, row in enumerate(rows) if row["LEVEL_3"] == name and row["LEVEL_4"] == "measured"]
        order = rng.permutation(np.array(own))
        halves["first"][name], halves["second"][name] = order[: len(order) // 2], order[len(order) // 2 :]
    return spectra, halves
