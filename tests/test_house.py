"""The house rules that a machine can check: lint, types, file sizes, imports that cost nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("zoo", "backbones", "heads", "tasks", "configs", "tools", "tests")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "zoo"]], ids=" ".join
)
def test_lint_and_types(command: list[str]) -> None:
    done = run("-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_stay_within_one_sitting() -> None:
    lengths = {p: len(p.read_text().splitlines()) for folder in PACKAGES for p in (ROOT / folder).rglob("*.py")}
    too_long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400}
    assert not too_long


def test_tools_stay_thin() -> None:
    assert {p.name: n for p in (ROOT / "tools").glob("*.py") if (n := len(p.read_text().splitlines())) > 120} == {}


def test_imports_and_listings_load_no_torch() -> None:
    code = (
        "import sys, zoo, backbones, heads, tasks, configs, zoo.adapters, zoo.attention, zoo.engine\n"
        "zoo.list_models(); zoo.list_adapters(); zoo.list_attention(); zoo.list_heads(); zoo.list_backbones()\n"
        "heavy = {'torch', 'timm', 'open_clip', 'torchvision', 'albumentations', 'cv2'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_public_name_of_zoo_can_be_reached() -> None:
    import zoo

    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'creat'"):
        zoo.creat  # noqa: B018
