"""Maps for cubes from files: a picture, the labels, their uncertainty, and `predictions.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tasks.hyperspectral.cubes import SUFFIXES, Scene, labels_of, read_array
from tasks.hyperspectral.maps import predict_scene, save_map
from tasks.hyperspectral.metrics import accuracies, confusion
from tasks.hyperspectral.scenes import read_cube
from zoo.engine.state import write_atomically
from zoo.errors import ZooError


def predict_files(model: nn.Module, inputs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Classify every pixel of each cube; folders are searched. Returns the content of `out/predictions.json`.

    For a cube `x.mat` (.npy, .hdr, ENVI data) it writes `x_map.png`, `x_labels.npy`, `x_uncertainty.npy` and
    `x_map.mat`. A file `x_gt.mat` (.npy, .hdr) beside it is taken as its ground truth: it is shown, and scored.
    Files that cannot be used are listed under `skipped` with the reason, and the others go on.

    Raises:
        ZooError: not one cube could be read, or the model holds no reduction.
    """
    model.reduction.basis()  # type: ignore[union-attr, operator]  # refuse before any file is read
    classes = _classes(model)
    done: dict[str, Any] = {"labels": classes, "predictions": [], "skipped": []}
    for path in _files(inputs, done["skipped"]):
        try:
            entry = _predict(model, path, out, classes)
        except ZooError as error:
            done["skipped"].append({"path": str(path), "reason": str(error)})
            continue
        done["predictions"].append(entry)
        _save(done, out)
    _save(done, out)
    if not done["predictions"]:
        reasons = "\n  ".join(f"{item['path']}: {item['reason']}" for item in done["skipped"][:20])
        raise ZooError(f"none of the {len(done['skipped'])} inputs could be predicted\n  {reasons}")
    return done


def _predict(model: nn.Module, path: Path, out: Path, classes: list[str]) -> dict[str, Any]:
    scene = replace(read_cube(path), classes=tuple(classes))
    truth = _truth(path)
    if truth is not None:
        labels, _ = labels_of(read_array(truth, ndim=2), classes)
        if labels.shape != scene.cube.shape[:2]:
            raise ZooError(f"{truth} of shape {labels.shape} does not fit the cube of shape {scene.cube.shape}")
        if labels.min() < 0 or labels.max() > len(classes):
            raise ZooError(f"{truth} holds labels {labels.min()}..{labels.max()}; the model knows 0..{len(classes)}")
        scene = replace(scene, labels=labels)
    found = predict_scene(model, scene.cube)
    numbers = _score(scene, found.labels, len(classes))
    heading = path.name + "".join(f", {key} {value:.3f}" for key, value in numbers.items())
    written = save_map(out, path.stem, scene, found, classes, heading)
    shares = np.bincount(found.labels.ravel(), minlength=len(classes) + 1)
    return {
        "path": str(path),
        "shape": list(scene.cube.shape),
        "pixels": {name: int(number) for name, number in zip(["unpredicted", *classes], shares, strict=True)},
        "mean_uncertainty": float(found.uncertainty.mean()),
        **({"metrics": numbers, "truth": str(truth)} if numbers else {}),
        "files": [file.name for file in written],
    }


def _score(scene: Scene, predicted: Any, num_classes: int) -> dict[str, float]:
    if scene.labels is None:
        return {}
    known = (scene.labels > 0) & (predicted > 0)
    return accuracies(confusion(scene.labels[known] - 1, predicted[known] - 1, num_classes)) if known.any() else {}


def _classes(model: Any) -> list[str]:
    names = model.__dict__.get("zoo_card", {}).get("labels")
    return list(names) if names else [f"class {i}" for i in range(1, model.head.num_classes + 1)]


def _truth(path: Path) -> Path | None:
    stem = path.stem.removesuffix("_corrected")
    beside = [path.with_name(f"{stem}_gt{suffix}") for suffix in SUFFIXES]
    return next((file for file in beside if file.is_file()), None)


def _files(inputs: Sequence[Path], skipped: list[dict[str, str]]) -> list[Path]:
    found: list[Path] = []
    for path in inputs:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.stem.endswith("_gt"))
        if not inside:
            skipped.append({"path": str(path), "reason": f"the folder holds no {', '.join(SUFFIXES)} files"})
        found += inside
    return found


def _save(content: dict[str, Any], out: Path) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(out / "predictions.json", lambda file: file.write(text.encode()))
