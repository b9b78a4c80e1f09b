"""Pictures of a run: success and precision curves, tracker against the box that stays where it began."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from mmengine.hooks import Hook

from tasks.classification.report import save_figure
from tasks.tracking.metrics import OVERLAPS, PIXELS, SHARES, Curves, TrackingMetric
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner

COLOURS = {"tracker": "#1764ab", "still box": "#d9822b"}


@HOOKS.register_module()
class TrackingReport(Hook):  # type: ignore[misc]
    """Writes `success.png` after training and `success_test.png` after a test (not in the got10k profile)."""

    priority = "LOW"

    def after_train(self, runner: ZooRunner) -> None:
        """Draw the last validation."""
        if runner.val_loop is not None:
            _draw(runner, runner.val_loop, "success.png")

    def after_test(self, runner: ZooRunner) -> None:
        """Draw the test."""
        _draw(runner, runner.test_loop, "success_test.png")


def curves_figure(curves: Mapping[str, Curves]) -> Figure:
    """Three panels: success over the overlap asked for, precision over pixels, precision over the box's own size."""
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    panels = (
        ("success", OVERLAPS, "overlap above", None),
        ("precision", PIXELS, "distance within, pixels", 20),
        ("norm_precision", SHARES, "distance within, of the box", 20),
    )
    for axes, (name, places, label, at) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for who, found in curves.items():
            values = getattr(found, name)
            number = values.mean() if at is None else values[at]
            axes.plot(places, values, color=COLOURS.get(who), linewidth=2, label=f"{who} {number:.3f}")
        axes.set(xlabel=label, xlim=(places[0], places[-1]), ylim=(0, 1.02))
        axes.grid(color="#e6e8ec")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("share of frames")
    return figure


def _draw(runner: ZooRunner, loop: Any, name: str) -> None:
    for metric in loop.evaluator.metrics if runner.rank == 0 else ():
        if isinstance(metric, TrackingMetric) and metric.curves is not None:
            save_figure(curves_figure(metric.curves), Path(runner.work_dir, name))
