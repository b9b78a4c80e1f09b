"""What exists, found by reading source files: names, summaries and config files. Imports no torch, no timm."""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from zoo.errors import ZooError

ROOT = Path(__file__).resolve().parent.parent  # holds zoo/, backbones/, heads/, tasks/ and configs/ side by side


class Entry(NamedTuple):
    """A registered name: the module that declares it and the first line of its docstring."""

    module: str
    summary: str


def package_folder(package: str) -> Path:
    """The folder of an importable package, without importing it.

    Raises:
        ZooError: another module of the same name hides ours (its file is named), or it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ZooError(f"the package {package!r} of the zoo cannot be found; reinstall with `pip install .`")
    folder = Path(spec.origin).resolve().parent
    if package.partition(".")[0] != "zoo" and folder.parent != ROOT:
        raise ZooError(
            f"the name {package!r} is taken by {spec.origin}, which is not part of the zoo; "
            "rename that module or start Python from another folder"
        )
    return folder


@functools.cache
def declared(packages: tuple[str, ...], variable: str) -> dict[str, Entry]:
    """Names registered by `@VARIABLE.register_module(...)` in the files of `packages`, sorted."""
    found: dict[str, Entry] = {}
    for package in packages:
        folder = package_folder(package)
        for file in sorted(folder.rglob("*.py")):
            module = ".".join((package, *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
            for name, entry in _declarations(file, module, variable):
                if name in found:
                    raise ZooError(f"{name!r} is registered twice: in {found[name].module} and in {module}")
                found[name] = entry
    return dict(sorted(found.items()))


def _declarations(file: Path, module: str, variable: str) -> Iterator[tuple[str, Entry]]:
    text = file.read_text(encoding="utf-8")
    if f"@{variable}.register_module" not in text:  # parsing every file would cost half of the import budget
        return
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        for decorator in node.decorator_list:
            if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != f"{variable}.register_module":
                continue
            summary = (ast.get_docstring(node) or "").split("\n", 1)[0]
            for name in _registered_names(decorator) or [node.name]:
                yield name, Entry(module, summary)


def _registered_names(decorator: ast.Call) -> list[str]:
    for keyword in decorator.keywords:
        if keyword.arg == "name":
            value = ast.literal_eval(keyword.value)
            return [value] if isinstance(value, str) else list(value)
    return []


def _is_register_model(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).rpartition(".")[2] == "register_model"


@functools.cache
def own_backbones() -> dict[str, Entry]:
    """Models that our files register with timm: functions under timm's `@register_model` in `backbones/`."""
    found: dict[str, Entry] = {}
    folder = package_folder("backbones")
    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "register_model" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and any(map(_is_register_model, node.decorator_list)):
                found[node.name] = Entry(f"backbones.{file.stem}", (ast.get_docstring(node) or "").split("\n", 1)[0])
    return dict(sorted(found.items()))


@functools.cache
def config_files() -> dict[str, Path]:
    """Named models: the stem of every file under `configs/` (folders starting with `_` hold shared pieces)."""
    folder = package_folder("configs")
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        if any(part.startswith("_") for part in relative.parts):
            continue
        name = file.stem if file.stem != "quickstart" else "_".join((*relative.parts[:-1], "quickstart"))
        if name in found:
            raise ZooError(f"two configs are called {name!r}: {found[name]} and {file}")
        found[name] = file
    return found


def matching(names: Iterable[str], pattern: str = "*") -> list[str]:
    """Names that fit a glob, in natural order (`vit_s2` before `vit_s10`), letter case ignored."""
    return sorted((n for n in names if fnmatch.fnmatch(n.lower(), pattern.lower())), key=_natural)


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts: list[tuple[int, int | str]] = []
    digits = ""
    for char in name.lower() + "\0":
        if char.isdigit():
            digits += char
            continue
        if digits:
            parts.append((0, int(digits)))
            digits = ""
        parts.append((1, char))
    return parts


def timm_names(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """timm's model names that fit a glob. Imports timm."""
    import timm

    return list(timm.list_models(pattern, pretrained=pretrained))


def open_clip_names(pattern: str = "*") -> list[str]:
    """open_clip's architecture names that fit a glob. Imports open_clip."""
    import open_clip

    return matching(open_clip.list_models(), pattern)
