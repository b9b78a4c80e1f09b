"""Measurements as a CSV file that says where they were made, and as a Markdown page made from it."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from zoo import __version__
from zoo.errors import CheckpointError, OptionError
from zoo.folder import replace_file

Row = dict[str, str]


class Report(NamedTuple):
    """Where and how it was measured, and one row a model."""

    header: dict[str, str]
    rows: list[Row]


def environment(device: torch.device, **settings: object) -> dict[str, str]:
    """Device and versions, then the settings of the run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions = {"cuda": str(torch.version.cuda)}
    else:
        name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores)"
        versions = {}
    versions |= {"torch": torch.__version__, "timm": timm.__version__, "zoo": __version__}
    return {"device": name, **versions, **{key: str(value) for key, value in settings.items()}}


def write_csv(report: Report, path: Path) -> None:
    """`# key: value` lines, then a table; the file is replaced in one step. Raises OptionError without a folder."""
    _check_folder(path)
    text = io.StringIO()
    for key, value in report.header.items():
        text.write(f"# {key}: {value}\n")
    columns = list(dict.fromkeys(key for row in report.rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(report.rows)
    replace_file(path, text.getvalue().encode())


def read_csv(path: Path) -> Report:
    """What `write_csv` wrote. Raises CheckpointError for another file."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; measure first with --csv {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    header = dict(line.removeprefix("# ").split(": ", 1) for line in comments if ": " in line)
    rows = list(csv.DictReader(lines[len(comments) :]))
    if not header or not rows:
        raise CheckpointError(f"{path} holds no measurements: {len(header)} header lines, {len(rows)} rows")
    return Report(header, rows)


def write_markdown(text: str, path: Path) -> None:
    """Replace the page in one step. Raises OptionError without a folder."""
    _check_folder(path)
    replace_file(path, text.encode())


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table; `columns` maps a row's key to its heading. Numbers are set to the right."""
    cells = [[row.get(key, "").replace("|", "\\|") for key in columns] for row in rows]
    numeric = [all(_is_number(line[i]) for line in cells if line[i] not in ("", "-")) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(columns.values()) + " |",
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells)])


def header_lines(header: Mapping[str, str]) -> str:
    """The header as one sentence of `key value` pairs."""
    return ", ".join(f"{key} {value}" for key, value in header.items()) + "."


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("x"))
    except ValueError:
        return False
    return True


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise OptionError(f"the folder {path.parent} does not exist")
