"""The rows of a comparison: read, written, and summed up by method."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.engine.state import write_atomically
from zoo.errors import ZooError

_TEXT = ("budget", "method", "adapter", "kind", "error")
_WHOLE = ("seed", "trained", "checkpoint_bytes")
COLUMNS = (
    *("budget", "method", "adapter", "seed", "lr", "val", "test", "kind", "trained", "checkpoint_bytes"),
    *("step_ms", "memory_mib", "latency_ms", "merged_ms", "seconds", "error"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """One method over its seeds, at the learning rate chosen on the first; shares between 0 and 1, medians of costs.

    tests: test result of each seed; empty if nothing finished, and `error` then says why.
    """

    name: str
    rate: float | None
    tests: tuple[float, ...]
    kind: str
    costs: dict[str, float]
    error: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.tests)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None with fewer than two seeds."""
        return statistics.stdev(self.tests) if len(self.tests) > 1 else None


def read_rows(path: Path) -> list[Row]:
    """The rows of a `results.csv`, empty cells left out; none if there is no file. Raises ZooError: another table."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ZooError(f"{path} is not a table of this tool (its columns are {reader.fieldnames}); choose --out")
        return [{key: _value(key, text) for key, text in row.items() if text} for row in reader]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the whole table in one step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(COLUMNS), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def chosen_rate(rows: Sequence[Row]) -> float | None:
    """The learning rate with the best validation result on the first seed of one method's rows; ties: the first."""
    finished = [row for row in rows if "error" not in row and row["seed"] == rows[0]["seed"]]
    return float(max(finished, key=lambda row: row["val"])["lr"]) if finished else None


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary a method, by trained parameters; methods that never finished at the end."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        rate = chosen_rate(own)
        done = [row for row in own if row["lr"] == rate and "error" not in row]
        errors = [row["error"] for row in own if "error" in row and row["lr"] in (rate, own[0]["lr"])]
        numeric = [c for c in COLUMNS[8:-1] if done and all(c in row for row in done)]
        costs = {column: float(statistics.median(row[column] for row in done)) for column in numeric}
        tests = tuple(row["test"] for row in done)
        found.append(Summary(name, rate, tests, done[0]["kind"] if done else "", costs, errors[0] if errors else ""))
    return sorted(found, key=lambda one: one.costs.get("trained", float("inf")))


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, one line a method; a failed one has its reason instead of numbers."""
    head = ["method", "test accuracy, %", "trained", "checkpoint, kB", "step, ms", "memory, MiB"]
    head += ["latency, ms", "merged, ms", "lr"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    methods = summarise(rows)
    seeds = max((len(one.tests) for one in methods), default=0)
    for one in methods:
        if not one.tests:
            cells = [one.name, f"failed: {_one_line(one.error)}", *[""] * (len(head) - 2)]
        else:
            costs = one.costs
            cells = [
                one.name,
                _accuracy(one, seeds),
                f"{costs['trained']:,.0f}",
                f"{costs['checkpoint_bytes'] / 1000:,.0f}",
            ]
            cells += [f"{costs['step_ms']:.0f}", f"{costs['memory_mib']:.0f}", f"{costs['latency_ms']:.1f}"]
            cells += [f"{costs['merged_ms']:.1f}" if "merged_ms" in costs else "", f"{one.rate:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _accuracy(one: Summary, seeds: int) -> str:
    spread = "" if one.deviation is None else f" ± {100 * one.deviation:.1f}"
    number = len(one.tests)
    notes = [f"{number} seed{'s' * (number > 1)}"] if number < seeds or one.error else []
    notes += [_one_line(one.error)] if one.error else []
    return f"{100 * one.mean:.1f}{spread}" + (f" ({'; '.join(notes)})" if notes else "")


def _one_line(text: str, longest: int = 160) -> str:
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"


def _value(key: str, text: str) -> Any:
    return text if key in _TEXT else int(text) if key in _WHOLE else float(text)
