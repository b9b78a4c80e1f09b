"""Labels for image files: `predictions.json` and annotated contact sheets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from tasks.classification.images import IMAGE_SUFFIXES, read_image
from tasks.classification.transforms import EvalTransform, Preprocessing
from zoo.engine.state import write_atomically
from zoo.errors import ZooError

COLUMNS, ROWS, SIDE, TEXT, GAP = 6, 5, 176, 58, 14
INK, MUTED, SURE, UNSURE = "#1f2430", "#7a8190", "#1764ab", "#d9822b"


class Shown(NamedTuple):
    """What is kept of a file: enough to classify and to draw it, not the pixels of a 50-megapixel photo."""

    path: Path
    inputs: Tensor  # (3, H, W) uint8
    thumb: Pillow.Image


def predict_files(
    model: nn.Module, inputs: Sequence[Path], out: Path, *, topk: int = 5, batch: int = 32
) -> dict[str, Any]:
    """Classify files, and all images below folders; returns the content of `out/predictions.json`.

    Images are prepared exactly as in evaluation (`model.preprocessing`). Unreadable files are listed under `skipped`
    and the others go on. The file is rewritten after every batch and each full contact sheet is written at once, so
    an interrupted run keeps what it had.

    Raises:
        ZooError: not one image could be read.
    """
    labels = model.__dict__.get("zoo_card", {}).get("labels")
    chosen = Preprocessing(**model.preprocessing)  # type: ignore[arg-type]
    done: dict[str, Any] = {"preprocessing": chosen.as_dict(), "labels": labels, "predictions": [], "skipped": []}
    page: list[tuple[Pillow.Image, dict[str, Any]]] = []
    number = 0
    try:
        for group in _batches(inputs, done["skipped"], chosen.evaluation(), batch):
            results = classify(model, torch.stack([item.inputs for item in group]))
            for item, result in zip(group, results, strict=True):
                entry = {"path": str(item.path), **_named(result, labels, topk)}
                done["predictions"].append(entry)
                page.append((item.thumb, entry))
                if len(page) == COLUMNS * ROWS:
                    number += 1
                    _save_sheet(page, out, number)
                    page = []
            _save_json(done, out)
    finally:
        if page:
            _save_sheet(page, out, number + 1)
        _save_json(done, out)
    if not done["predictions"]:
        reasons = "\n  ".join(f"{item['path']}: {item['reason']}" for item in done["skipped"][:20])
        raise ZooError(f"none of the {len(done['skipped'])} inputs could be read\n  {reasons}")
    return done


@torch.no_grad()
def classify(model: Any, inputs: Tensor) -> list[dict[str, Any]]:
    """(B, 3, H, W) uint8 as the evaluation transform gives them -> B predictions, in eval mode."""
    samples = {"inputs": inputs, "data_samples": [{} for _ in inputs]}
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = model(**model.data_preprocessor(samples, False), mode="predict")
    model.train(was_training)
    return results


def contact_sheet(page: Sequence[tuple[Pillow.Image, dict[str, Any]]]) -> Pillow.Image:
    """Images in a grid, each with its label, a bar as long as the score, and its file name."""
    columns = min(COLUMNS, len(page))
    rows = -(-len(page) // columns)
    sheet = Pillow.new("RGB", (GAP + columns * (SIDE + GAP), GAP + rows * (SIDE + TEXT + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (thumb, entry) in enumerate(page):
        x = GAP + place % columns * (SIDE + GAP)
        y = GAP + place // columns * (SIDE + TEXT + GAP)
        sheet.paste(thumb, (x, y))
        colour = SURE if entry["score"] >= 0.5 else UNSURE
        y += SIDE + 4
        draw.rectangle((x, y, x + SIDE, y + 4), fill="#e6e8ec")
        draw.rectangle((x, y, x + round(SIDE * entry["score"]), y + 4), fill=colour)
        score = f"{100 * entry['score']:.0f}%"
        large, small = ImageFont.load_default(17), ImageFont.load_default(11)
        width = SIDE - draw.textlength(score, large) - 8
        draw.text((x, y + 9), _fit(draw, entry["name"], large, width), fill=INK, font=large)
        draw.text((x + SIDE, y + 9), score, fill=colour, font=large, anchor="ra")
        draw.text((x, y + 33), _fit(draw, Path(entry["path"]).name, small, SIDE), fill=MUTED, font=small)
    return sheet


def _batches(
    inputs: Sequence[Path], skipped: list[dict[str, str]], transform: EvalTransform, size: int
) -> Iterator[list[Shown]]:
    group: list[Shown] = []
    for path in _files(inputs, skipped):
        try:
            pixels = read_image(path)
        except ZooError as error:
            skipped.append({"path": str(path), "reason": str(error)})
            continue
        thumb = ImageOps.pad(Pillow.fromarray(pixels), (SIDE, SIDE), color="#f0f1f4")
        group.append(Shown(path, transform(pixels), thumb))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _files(inputs: Sequence[Path], skipped: list[dict[str, str]]) -> Iterator[Path]:
    for path in inputs:
        if not path.is_dir():
            yield path  # whatever its suffix: it was asked for by name
            continue
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not files:
            skipped.append({"path": str(path), "reason": "the folder holds no images"})
        yield from files


def _named(result: dict[str, Any], labels: Sequence[str] | None, topk: int) -> dict[str, Any]:
    scores, order = result["probabilities"].topk(min(topk, len(result["probabilities"])))
    best = [
        {"label": label, "name": labels[label] if labels else str(label), "score": score}
        for label, score in zip(order.tolist(), scores.tolist(), strict=True)
    ]
    return {**best[0], "topk": best}


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def _save_json(content: dict[str, Any], out: Path) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(out / "predictions.json", lambda file: file.write(text.encode()))


def _save_sheet(page: Sequence[tuple[Pillow.Image, dict[str, Any]]], out: Path, number: int) -> None:
    sheet = contact_sheet(page)
    write_atomically(out / f"contact_sheet_{number:03}.png", lambda file: sheet.save(file, format="PNG"))
