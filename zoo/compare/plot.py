"""The picture of a comparison: accuracy against trained parameters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from zoo.compare.table import Row, Summary, summarise
from zoo.engine.state import write_atomically
from zoo.errors import ZooError

_TICKS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)
_LEAST_ERROR = 5e-4  # a perfect score has to be somewhere
INK, MUTED, GRID = "#1f2430", "#7a8190", "#e6e8ec"
KINDS = {
    "merges": ("#1764ab", "o", "merges into the weights"),
    "stays": ("#d9822b", "D", "stays beside the weights"),
    "selection": ("#5b6472", "s", "trains the base's own weights"),
}


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write the picture as PNG. Raises ZooError if no method finished."""
    figure = accuracy_figure(summarise(rows), title)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    write_atomically(path, lambda file: file.write(content.getvalue()))


def accuracy_figure(methods: Sequence[Summary], title: str) -> Figure:
    """Mean test accuracy against trained parameters (log), a bar of one standard deviation each way."""
    shown = [one for one in methods if one.tests]
    if not shown:
        raise ZooError("no method finished, so there is nothing to draw")
    figure = Figure(figsize=(9.2, 5.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, (colour, marker, label) in KINDS.items():
        own = [one for one in shown if one.kind == kind]
        if own:
            places, heights = [one.costs["trained"] for one in own], [one.mean for one in own]
            spread = [one.deviation or 0.0 for one in own]
            axes.errorbar(
                places, heights, spread, fmt=marker, color=colour, label=label, markersize=7.5,
                markeredgecolor="white", markeredgewidth=1.0, elinewidth=1.3, capsize=0, zorder=3,
            )  # fmt: skip
    _style(axes, title, shown)
    figure.draw_without_rendering()  # settles where everything is, which the labels need
    _label(axes, shown)
    return figure


def _style(axes: Axes, title: str, shown: Sequence[Summary]) -> None:
    seeds = {len(one.tests) for one in shown}
    over = f"; mean and standard deviation of {max(seeds)} seeds" if max(seeds) > 1 else ""
    axes.set_title(title, loc="left", color=INK, fontsize=12, pad=32)
    axes.set_xscale("log")
    # By the logarithm of the error, else one weak method squeezes all the good ones together.
    axes.set_yscale("function", functions=(_height, lambda height: 1 - 10.0**-height))
    low, high = axes.get_ylim()
    if sum(low <= tick <= high for tick in _TICKS) > 2:
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel(f"trained parameters, head included (log scale){over}", color=INK)
    axes.set_ylabel("test accuracy (logarithm of the error)", color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=INK, length=0, which="both")
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, labelcolor=INK, fontsize=9.5,
        handletextpad=0.2, columnspacing=1.5,
    )  # fmt: skip


def _height(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.log10(np.clip(1 - accuracy, _LEAST_ERROR, None))


def _short(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _label(axes: Axes, shown: Sequence[Summary]) -> None:
    """Name each point where its name covers no other name, point or bar; a thin line leads there from farther off."""
    renderer = axes.get_figure().canvas.get_renderer()  # type: ignore[union-attr]
    dot = axes.get_figure().dpi / 72  # type: ignore[union-attr]  # pixels of one point
    taken = [_extent(axes, one, 5 * dot) for one in shown]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    inside = axes.get_window_extent(renderer)
    for one in sorted(shown, key=lambda one: -one.mean):
        place = (one.costs["trained"], one.mean)
        x, y = axes.transData.transform(place)
        colour = KINDS[one.kind][0]
        name = axes.annotate(
            one.name, place, (0, 0), textcoords="offset points", fontsize=9, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 5},
        )  # fmt: skip
        size = Text.get_window_extent(name, renderer)
        candidates = []
        for distance, (right, up) in product((9, 16, 24, 34, 46, 60, 76), _DIRECTIONS):
            left = x + right * distance * dot - size.width * (1 - right) / 2  # it is the near end that is that far off
            box = Bbox.from_bounds(left, y + up * distance * dot - size.height / 2, size.width, size.height)
            outside = not (inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1))
            near = (x + right * distance * dot, y + up * distance * dot)
            crossed = _crossed((x, y), near, taken) if distance > 9 else 0
            cost = sum(_overlap(box, other) for other in taken) + 150 * crossed + distance * dot + 1e6 * outside
            candidates.append((cost, distance, right, up, box))
        _, distance, right, up, box = min(candidates, key=lambda candidate: candidate[0])
        taken.append(box)
        name.set_position((right * distance, up * distance))
        name.set_horizontalalignment("left" if right > 0 else "right" if right < 0 else "center")
        if name.arrow_patch is not None:
            name.arrow_patch.set_visible(distance > 9)


_DIRECTIONS = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (1.0, 0.7), (-1.0, 0.7), (1.0, -0.7), (-1.0, -0.7))


def _extent(axes: Axes, one: Summary, radius: float) -> Bbox:
    """The pixels of a point with its bar."""
    spread = one.deviation or 0.0
    x, low = axes.transData.transform((one.costs["trained"], one.mean - spread))
    _, high = axes.transData.transform((one.costs["trained"], one.mean + spread))
    return Bbox.from_extents(x - radius, low - radius, x + radius, high + radius)


def _overlap(a: Bbox, b: Bbox) -> float:
    """Common area in pixels, with a bill of its own for touching at all."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return 300 + width * height if width > 0 and height > 0 else 0.0


def _crossed(start: tuple[float, float], end: tuple[float, float], boxes: Sequence[Bbox]) -> int:
    """How many boxes, but those the line starts in, a straight line passes through."""
    points = np.linspace(start, end, 24)
    return sum(not box.contains(*start) and any(box.contains(float(x), float(y)) for x, y in points) for box in boxes)
