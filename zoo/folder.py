"""The files of a saved folder: written in one step each, read with suspicion.

A folder may come from anywhere. `config.json` is data: its size, depth, types and paths are judged here before anything
is built from it, and every `type` must be a name of our registries.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import CheckpointError, CheckpointFileError, nearest
from zoo.hub import Scheme, Source
from zoo.hub.download import file_sha256
from zoo.registry import ADAPTERS, ATTENTION, BACKBONES, CONSISTENCY, HEADS, MODELS, TRANSFORMS

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "adapter.safetensors"
MAX_CONFIG_BYTES = 16 << 20
MAX_CONFIG_DEPTH = 40
# Options of timm that name files; a downloaded config has no business with them.
_FILE_OPTIONS = frozenset({"checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"})
# mmengine's registries would import any dotted `type`, so a saved config may name only what ours (and these) hold.
_MMENGINE_TYPES = frozenset({"BaseDataPreprocessor", "ImgDataPreprocessor"})


def read_card(folder: Path) -> dict[str, Any]:
    """`config.json`, checked: format, entries, and the hash of the weights beside it."""
    card = read_json(folder / CONFIG)
    lacking = [key for key in ("format", "model", "adapters", "base", "weights") if key not in card]
    if lacking:
        raise CheckpointFileError(f"{folder / CONFIG} is not a saved zoo model: it lacks {', '.join(lacking)}")
    if card["format"] != FORMAT:
        raise CheckpointFileError(
            f"{folder / CONFIG} has format {card['format']!r}, this version reads {FORMAT}; update the zoo"
        )
    types = [(card["model"], dict), (card["adapters"], list), (card["base"], dict), (card["weights"], dict)]
    if not all(isinstance(value, kind) for value, kind in types):
        raise CheckpointFileError(
            f"{folder / CONFIG} is malformed: model, base and weights are objects, adapters a list"
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointFileError(f"{folder} has a config but no {WEIGHTS}")
    found = file_sha256(folder / WEIGHTS)
    if found != card["weights"].get("sha256"):
        raise CheckpointFileError(
            f"{folder / WEIGHTS} is not the file that was saved with {CONFIG}: sha256 {found}, expected "
            f"{card['weights'].get('sha256')} (truncated, or swapped with another model's?)"
        )
    return card


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointFileError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointFileError(f"{path} has {path.stat().st_size:,} bytes, more than any config of ours")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointFileError(f"{path} holds a {type(content).__name__}, not an object")
    if any(depth > MAX_CONFIG_DEPTH for _, _, depth in _walk(content)):
        raise CheckpointFileError(f"{path} nests deeper than {MAX_CONFIG_DEPTH} levels, more than any config of ours")
    return content


def _walk(content: Any) -> Iterator[tuple[str, Any, int]]:
    """(key, value, depth) of everything in nested data, without recursion; list entries go under their list's key."""
    stack = [("", content, 0)]
    while stack:
        key, value, depth = stack.pop()
        yield key, value, depth
        if depth > MAX_CONFIG_DEPTH:
            continue
        if isinstance(value, Mapping):
            stack += [(str(k), v, depth + 1) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [(key, v, depth + 1) for v in value]


def check_types(config: Any, folder: Path) -> None:
    """Every `type` must be a name that our registries hold."""
    known = set(_MMENGINE_TYPES)
    for registry in (ADAPTERS, ATTENTION, BACKBONES, CONSISTENCY, HEADS, MODELS, TRANSFORMS):
        known |= set(registry.names())
    types = [value for key, value, _ in _walk(config) if key == "type"]
    if not types:
        raise CheckpointFileError(f"{folder / CONFIG}: the model config has no `type`")
    for value in types:
        if not isinstance(value, str) or value.removeprefix("zoo.") not in known:
            raise CheckpointFileError(
                f"{folder / CONFIG} asks for type {value!r}, which the zoo has not; {nearest(str(value), known)}"
            )


def refuse_local_sources(config: Any, where: str) -> None:
    """A downloaded config may name public weights, not files of the machine that reads it."""
    for key, value, _ in _walk(config):
        if key in _FILE_OPTIONS:
            raise CheckpointFileError(f"{where} sets {key}, which reads files of this machine; refused")
        if isinstance(value, str) and (
            value.startswith(("file:", "local-dir:", "/", "~", "."))
            or ".." in Path(value).parts
            or (key == "pretrained" and Source.parse(value).scheme is Scheme.FILE)
        ):
            raise CheckpointFileError(f"{where} asks for {value!r}, a path on this machine; refused")


def plain_data(value: Any, what: str) -> dict[str, Any]:
    """The same as JSON would give it back; tuples become lists, one-element tensors numbers."""
    try:
        return dict(json.loads(json.dumps(value, default=_plain)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} holds something that is not plain data: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if getattr(value, "ndim", None) == 0 or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")


def serialise(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save as to_bytes

    return to_bytes({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, {"format": "pt"})


def replace_file(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
