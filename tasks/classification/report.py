"""Pictures of a run: loss and accuracy curves, and the confusion matrix."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from mmengine.hooks import Hook
from numpy.typing import ArrayLike

from tasks.classification.metrics import ClassificationMetric
from zoo.engine.state import write_atomically
from zoo.errors import OptionError
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from zoo.engine.runner import ZooRunner

INK, MUTED, MAIN, SECOND = "#1f2430", "#7a8190", "#1764ab", "#d9822b"
_NUMBERS_UP_TO, _NAMES_UP_TO = 20, 40  # classes for which cells carry counts, and axes every name


@HOOKS.register_module()
class ClassificationReport(Hook):  # type: ignore[misc]
    """Checks that classes agree before training, and writes `curves.png` and `confusion.png` into the work folder.

    Raises:
        OptionError: training and validation data number their classes differently, the head has another number of
            classes, or the config's `classes` are other names than the data's.
    """

    priority = "LOW"  # after the table of results is written

    def before_train(self, runner: ZooRunner) -> None:
        """Compare the classes; a config without `classes` takes those of the data, so that they are saved."""
        classes = _classes(runner.train_dataloader)
        head = getattr(getattr(runner.bare_model, "head", None), "num_classes", len(classes))
        if head != len(classes):
            raise OptionError(f"the head has num_classes={head}, the data {len(classes)} classes: {classes[:20]}")
        if runner.val_loop is not None and _classes(runner.val_dataloader) != classes:
            raise OptionError(
                f"training and validation data differ in their classes: {classes[:20]} and "
                f"{_classes(runner.val_dataloader)[:20]}; give both the same `classes=`"
            )
        named = runner.cfg.get("classes")
        if named is None:
            runner.cfg["classes"] = classes
        elif list(named) != classes:
            raise OptionError(f"the config's classes {list(named)[:20]} are not the data's {classes[:20]}")

    def after_train(self, runner: ZooRunner) -> None:
        """Draw the run and its last evaluation."""
        if runner.rank != 0:
            return
        table = Path(runner.work_dir, "results.csv")
        if table.is_file():
            save_figure(curves_figure(read_rows(table)), Path(runner.work_dir, "curves.png"))
        if runner.val_loop is not None:
            _draw_confusion(runner, runner.val_loop, "confusion.png")

    def after_test(self, runner: ZooRunner) -> None:
        """Draw the test's confusion matrix."""
        if runner.rank == 0:
            _draw_confusion(runner, runner.test_loop, "confusion_test.png")


def _classes(loader: Any) -> list[str]:
    return [str(name) for name in loader.dataset.metainfo["classes"]]


def _draw_confusion(runner: ZooRunner, loop: Any, name: str) -> None:
    for metric in loop.evaluator.metrics:
        if isinstance(metric, ClassificationMetric) and metric.confusion is not None:
            figure = confusion_figure(metric.confusion, _classes(loop.dataloader))
            save_figure(figure, Path(runner.work_dir, name))


def read_rows(table: Path) -> list[dict[str, float]]:
    """`results.csv` as numbers; empty cells are left out."""
    with table.open(encoding="utf-8", newline="") as stream:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]


def curves_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Training loss (left) and accuracies (right) by epoch or step; the probe baseline, where there is one, dashed."""
    figure = _blank(9.4, 3.8)
    left, right = figure.subplots(1, 2)
    by_epoch = len({row["epoch"] for row in rows}) == len(rows)
    at = "epoch" if by_epoch else "step"  # training by steps stays in epoch 0
    left.plot(*_column(rows, at, "loss"), color=MAIN, marker="o", markersize=4, linewidth=2)
    _style(left, "Training loss", at)
    left.set_ylim(bottom=0)
    lines = {
        "top-1": ("val/top1", MAIN, "-"),
        "mean class": ("val/mean_class", MUTED, ":"),
        "frozen + head": ("probe/top1", SECOND, "--"),
    }
    lowest = 1.0
    ends: list[tuple[float, float, str, str]] = []
    for label, (key, colour, dash) in lines.items():
        places, values = _column(rows, at, key)
        if not values or (key == "val/mean_class" and np.allclose(values, _column(rows, at, "val/top1")[1], atol=5e-3)):
            continue  # balanced classes: the same curve twice tells nothing
        right.plot(places, values, dash, color=colour, marker="o", markersize=4, linewidth=2)
        ends.append((values[-1], places[-1], f"{label} {100 * values[-1]:.1f}%", colour))
        lowest = min(lowest, *values)
    _style(right, "Validation accuracy", at)
    right.set_ylim(max(0.0, np.floor(lowest * 10 - 0.5) / 10), 1.005)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label_ends(right, ends)
    return figure


def confusion_figure(matrix: ArrayLike, classes: Sequence[str]) -> Figure:
    """(K, K) counts, row true, column predicted: shares of each row as colour, counts where they fit, worst mix-ups."""
    counts = np.asarray(matrix, dtype=np.int64)
    number = len(counts)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = float(np.clip(1.8 + 0.48 * number, 4.5, 9.0))
    figure = _blank(side + 1.2, side)
    axes = figure.subplots()
    # By square root: a class mixed up in 4 % of its images must not look white.
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if number <= _NUMBERS_UP_TO:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.35 else INK
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=9)
    _class_ticks(axes, classes)
    right = int(np.trace(counts))
    axes.set_title(f"{right} of {int(counts.sum())} right ({right / max(1, counts.sum()):.1%})", color=INK, loc="left")
    axes.set_xlabel(f"predicted\n{_worst(counts, classes)}", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, pad=0.02, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the true class", color=INK)
    bar.outline.set_visible(False)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG in one step."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, lambda file: file.write(content.getvalue()))


def _blank(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    return figure


def _column(rows: Sequence[Mapping[str, float]], at: str, key: str) -> tuple[list[float], list[float]]:
    held = [row for row in rows if key in row]
    return [row[at] for row in held], [row[key] for row in held]


def _style(axes: Axes, title: str, at: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel(at, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e6e8ec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=INK, length=0)


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each curve at its last point, moved apart where they would touch."""
    low, high = axes.get_ylim()
    gap, ceiling = 0.075 * (high - low), high
    for value, last, text, colour in sorted(ends, reverse=True):
        place = min(value, ceiling)
        axes.annotate(text, (last, value), (8, place), textcoords=("offset points", "data"), va="center", color=colour)
        ceiling = place - gap


def _class_ticks(axes: Axes, classes: Sequence[str]) -> None:
    number = len(classes)
    step = 1 if number <= _NAMES_UP_TO else int(np.ceil(number / 20))
    places = np.arange(0, number, step)
    names = [name if len(name) <= 18 else name[:17] + "…" for name in classes[::step]]
    turned = max(map(len, names)) > 3
    size = 9 if len(places) <= 25 else 7
    axes.set_xticks(places, names, rotation=60 if turned else 0, ha="right" if turned else "center", fontsize=size)
    axes.set_yticks(places, names, fontsize=size)


def _worst(counts: np.ndarray[Any, Any], classes: Sequence[str], shown: int = 3) -> str:
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:shown]
    pairs = [(*np.unravel_index(place, wrong.shape), wrong.flat[place]) for place in order if wrong.flat[place] > 0]
    if not pairs:
        return "no mistakes"
    return "most mixed up: " + ", ".join(f"{classes[i]} as {classes[j]} ({n}x)" for i, j, n in pairs)
