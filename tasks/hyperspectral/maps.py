"""A class for every pixel of a scene, and what it looks like: false colours, truth, map, uncertainty."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from tasks.hyperspectral.cubes import Scene, finite_pixels
from tasks.hyperspectral.data import padded, patches_at
from zoo.engine.state import write_atomically
from zoo.errors import ZooError

INK, UNLABELLED, WRONG = "#1f2430", "#d9dce2", "#c8102e"
_RGB_NM = (650.0, 550.0, 450.0)


class SceneMap(NamedTuple):
    """The answer for a scene.

    labels: (H, W) int64, 1..C; 0 where the cube holds no finite spectrum. uncertainty: (H, W) float32, the entropy of
    the predicted probabilities as a share of its largest value log C. confidence: (H, W) float32, the top probability.
    """

    labels: NDArray[np.int64]
    uncertainty: NDArray[np.float32]
    confidence: NDArray[np.float32]


@torch.no_grad()
def predict_scene(model: Any, cube: NDArray[Any], *, rows: int = 32, batch: int = 512) -> SceneMap:
    """Classify every pixel of a cube (H, W, B), a tile of a few rows at a time.

    Tiles overlap by half a patch, so the answer does not depend on `rows`; memory holds one tile of the reduced cube.

    Raises:
        ZooError: the cube has other bands than the model was fitted on, or the model holds no reduction.
    """
    basis, patch = model.reduction.basis(), model.patch
    height, width = cube.shape[:2]
    if cube.ndim != 3 or cube.shape[2] != len(basis.mean):
        raise ZooError(f"the model takes cubes (rows, columns, {len(basis.mean)}), got {cube.shape}")
    reach, training = patch // 2, model.training
    good = finite_pixels(cube)
    labels = np.zeros((height, width), dtype=np.int64)
    uncertainty, confidence = np.ones((2, height, width), dtype=np.float32)
    model.eval()
    try:
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            low, high = max(0, top - reach), min(height, bottom + reach)
            reduced = np.nan_to_num(basis(cube[low:high]), nan=0.0, posinf=0.0, neginf=0.0)
            bordered = padded(reduced, patch)
            inside = np.argwhere(good[top:bottom])
            for start in range(0, len(inside), batch):
                at = inside[start : start + batch]
                probabilities = _probabilities(model, bordered, at + np.array([top - low, 0]), patch)
                place = (at[:, 0] + top, at[:, 1])
                labels[place] = probabilities.argmax(1) + 1
                confidence[place] = probabilities.max(1)
                uncertainty[place] = _entropy(probabilities)
    finally:
        model.train(training)
    confidence[~good] = 0
    return SceneMap(labels, uncertainty, confidence)


def _probabilities(model: Any, bordered: NDArray[np.float32], at: NDArray[np.int64], patch: int) -> NDArray[Any]:
    batch = {"inputs": patches_at(bordered, at, patch), "data_samples": [{} for _ in at]}
    results = model(**model.data_preprocessor(batch, False), mode="predict")
    return np.stack([result["probabilities"].numpy() for result in results])


def _entropy(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    terms = -probabilities * np.log(np.maximum(probabilities, 1e-12))
    return (terms.sum(1) / np.log(probabilities.shape[1])).astype(np.float32)


def false_colour(scene: Scene) -> NDArray[np.float32]:
    """(H, W, 3) in 0..1: the bands nearest to red, green and blue light, each stretched between its 2 % and 98 %.

    Without wavelengths the bands at 1/2, 1/4 and 1/10 of the spectrum stand in, about right for 0.4 to 1.0 um sensors.
    """
    bands = scene.cube.shape[2]
    if scene.wavelengths is not None:
        chosen = [int(np.abs(scene.wavelengths - wanted).argmin()) for wanted in _RGB_NM]
    else:
        chosen = [int(bands * share) for share in (0.5, 0.25, 0.1)]
    image = np.nan_to_num(np.asarray(scene.cube[..., chosen], dtype=np.float32))
    low, high = np.percentile(image, (2, 98), axis=(0, 1))
    stretched: NDArray[np.float32] = np.clip((image - low) / np.maximum(high - low, 1e-12), 0, 1)
    return stretched


def scene_figure(scene: Scene, found: SceneMap, classes: Sequence[str], heading: str = "") -> Figure:
    """False colours, ground truth (where there is one), the map, its mistakes, its uncertainty; classes below."""
    colours = palette(len(classes))
    known = ListedColormap([UNLABELLED, *colours])
    panels: list[tuple[str, Any, dict[str, Any]]] = [("false colour", false_colour(scene), {})]
    numbered = {"cmap": known, "vmin": -0.5, "vmax": len(classes) + 0.5, "interpolation": "nearest"}
    if scene.labels is not None:
        panels.append(("ground truth", scene.labels, numbered))
    panels.append(("predicted", found.labels, numbered))
    if scene.labels is not None:
        wrong = np.where(scene.labels == 0, 0, np.where(scene.labels == found.labels, 1, 2))
        marks = {"cmap": ListedColormap([UNLABELLED, "#ffffff", WRONG]), "vmin": -0.5, "vmax": 2.5}
        panels.append(("mistakes", wrong, {**marks, "interpolation": "nearest"}))
    panels.append(("uncertainty", found.uncertainty, {"cmap": "magma", "vmin": 0, "vmax": 1}))
    height, width = found.labels.shape
    panel = float(np.clip(3.0 * width / height, 1.2, 5.0))
    columns = max(1, int(panel * len(panels) // 1.75))
    legend = 0.24 * -(-(len(classes) + 1) // columns)
    figure = Figure(figsize=(panel * len(panels) + 0.6, panel * height / width + 0.9 + legend), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for place, (title, image, options) in zip(axes, panels, strict=True):
        shown = place.imshow(image, **options)
        place.set_title(title, color=INK, fontsize=11, loc="left")
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_color("#b8bdc8")
    bar = figure.colorbar(shown, ax=axes[-1], shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    entries = [Patch(facecolor=c, label=n) for c, n in zip(colours, classes, strict=True)]
    entries.append(Patch(facecolor=UNLABELLED, edgecolor="#b8bdc8", label="unlabelled"))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    if heading:
        figure.suptitle(heading, color=INK, fontsize=12, x=0.01, ha="left")
    return figure


def _dump(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def palette(number: int) -> list[tuple[float, float, float]]:
    """Colours that stay apart: those of tab20 in an order that separates neighbours, then hues by the golden angle."""
    listed = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    base = [*listed[0::2], *listed[1::2]]
    hues = [(0.61803 * i) % 1 for i in range(max(0, number - len(base)))]
    return [*base[:number], *(tuple(matplotlib.colors.hsv_to_rgb((hue, 0.55, 0.75))) for hue in hues)]


def save_map(
    out: Path, stem: str, scene: Scene, found: SceneMap, classes: Sequence[str], heading: str = ""
) -> list[Path]:
    """Write `<stem>_map.png`, `<stem>_labels.npy`, `<stem>_uncertainty.npy` and `<stem>_map.mat`; returns them.

    The .mat file holds `labels` (uint16, 0 unpredicted), `uncertainty`, `confidence` and `classes`.
    """
    from scipy.io import savemat

    picture = io.BytesIO()
    scene_figure(scene, found, classes, heading).savefig(picture, format="png", dpi=130)
    written = {f"{stem}_map.png": picture.getvalue()}
    for name, array in (("labels", found.labels.astype(np.uint16)), ("uncertainty", found.uncertainty)):
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        written[f"{stem}_{name}.npy"] = stream.getvalue()
    stream = io.BytesIO()
    fields: dict[str, Any] = {"labels": found.labels.astype(np.uint16), "classes": np.array(classes, dtype=object)}
    fields |= {"uncertainty": found.uncertainty, "confidence": found.confidence}
    savemat(stream, fields, do_compression=True)
    written[f"{stem}_map.mat"] = stream.getvalue()
    for name, content in written.items():
        write_atomically(out / name, partial(_dump, content))
    return [out / name for name in written]
