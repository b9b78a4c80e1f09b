"""Reading tensors from files nobody vouches for, and naming a set of tensors by its content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from zoo.errors import CheckpointError, CheckpointFileError

if TYPE_CHECKING:
    from torch import Tensor

# The format's own ceiling. The header is JSON that is parsed in memory before anything else is known.
MAX_HEADER_BYTES = 100_000_000
# What a file of nothing but tensors refers to.
_TENSOR_PARTS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.\w*Storage|torch\.\w*\d\w*|torch\.bool"
)


def load_state_dict(path: str | os.PathLike[str], *, inside: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` or torch file on the CPU; nothing in the file is ever executed.

    A checkpoint that nests its tensors (`{"model": {...}, "epoch": 3}`) is opened when exactly one entry is a dict
    of tensors; `inside` names the entry where there are several.
    Raises CheckpointFileError: not such a file, truncated, holds other things than tensors, or a pickle that asks
    for Python objects (which are named).
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "does not exist"
        raise CheckpointFileError(f"weights file {path} {what}")
    with path.open("rb") as file:
        head = file.read(64)
    if path.suffix == ".safetensors" or head[4:9] == b"\0\0\0\0{":
        content: Any = _read_safetensors(path, head)
    elif head.startswith((b"PK", b"\x80")):
        content = _read_torch(path, is_zip=head.startswith(b"PK"))
    else:
        hint = (
            " It is a git-lfs pointer: the real file was not fetched."
            if head.startswith(b"version https://git-lfs")
            else ""
        )
        raise CheckpointFileError(f"{path} is no safetensors or torch file; it starts with {head[:16]!r}.{hint}")
    return _only_tensors(path, content, inside)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (64 hex digits) of keys, dtypes, shapes and raw bytes, in key order.

    Equal for equal content on any device and for any memory layout; any dtype, zero-dim and empty tensors included.
    One tensor at a time is brought to contiguous CPU memory. Raises CheckpointError for a tensor without plain
    values (sparse, quantised, meta).
    """
    import torch

    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach()
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"tensor {key!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) has no plain bytes"
            )
        label = json.dumps([key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(len(label).to_bytes(8, "little"))  # lengths keep neighbouring entries from running together
        digest.update(label.encode())
        if tensor.numel():
            plain = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(path: Path, head: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    size = path.stat().st_size
    claimed = int.from_bytes(head[:8], "little") if len(head) >= 8 else -1
    if not 0 < claimed <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointFileError(
            f"{path} is not a whole safetensors file: it claims a header of {claimed} bytes, the file has {size} "
            f"(headers end at {MAX_HEADER_BYTES})"
        )
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # its parser raises an Exception subclass of its own, besides OSError and KeyError
        raise CheckpointFileError(f"{path} is truncated or damaged: {error}") from error


def _read_torch(path: Path, *, is_zip: bool) -> Any:
    import torch

    try:
        if is_zip:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointFileError:
        raise
    except Exception as error:  # a damaged pickle can surface as nearly any builtin exception
        foreign = _foreign_globals(path, is_zip=is_zip)
        if foreign:
            raise CheckpointFileError(
                f"{path} was not read: it asks to call or create {', '.join(foreign)}, which can run code. "
                "Ask for a safetensors file, or a torch file with tensors only"
            ) from error
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointFileError(f"{path} is truncated, damaged or not a tensor file: {first}") from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that would unpack to more than itself; torch stores its entries uncompressed."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > size:
        raise CheckpointFileError(f"{path} ({size} bytes) would unpack to {unpacked} bytes; torch does not compress")


def _foreign_globals(path: Path, *, is_zip: bool) -> list[str]:
    """Name the Python objects a pickle asks for beyond plain tensors; the pickle is scanned, not run."""
    names: list[str] = []
    with contextlib.suppress(ValueError, OSError, zipfile.BadZipFile), contextlib.ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context(path.open("rb"))
        if is_zip:
            archive = stack.enter_context(zipfile.ZipFile(stream))
            inner = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if inner is None:
                return []
            stream = stack.enter_context(archive.open(inner))
        strings = ["?", "?"]
        # A damaged end stops the scan with ValueError; the names found before it still tell what the file is.
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return sorted({name for name in names if not _TENSOR_PARTS.fullmatch(name)})


def _only_tensors(path: Path, content: Any, inside: str | None) -> dict[str, Tensor]:
    """Return the one dict of tensors in `content`, as detached plain tensors."""
    if inside is not None:
        if not isinstance(content, Mapping) or inside not in content:
            held = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointFileError(f"{path} has no entry {inside!r}; it holds {held}")
        content = content[inside]
    if not isinstance(content, Mapping):
        raise CheckpointFileError(f"{path} holds a {type(content).__name__}, not a dict of named tensors")
    if not _is_tensors(content):
        nested = [key for key, value in content.items() if isinstance(value, Mapping) and value and _is_tensors(value)]
        if len(nested) > 1:
            raise CheckpointFileError(f"{path} holds several dicts of tensors; pass inside= one of {nested}")
        if not nested:
            key, value = next((key, value) for key, value in content.items() if not _is_named(key, value))
            raise CheckpointFileError(
                f"{path}: entry {key!r} is a {type(value).__name__}, not a tensor under a text key"
            )
        content = content[nested[0]]
    return {key: tensor.detach() for key, tensor in content.items()}


def _is_tensors(content: Mapping[Any, Any]) -> bool:
    return all(_is_named(key, value) for key, value in content.items())


def _is_named(key: Any, value: Any) -> bool:
    import torch

    return isinstance(key, str) and isinstance(value, torch.Tensor)
