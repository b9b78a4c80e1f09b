"""The authors' published checkpoint files in the layout of our models, or an error that names each misfit."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, NamedTuple

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from backbones.slab_norm import RepBN
from backbones.timm_backbone import PUBLISHED_LAYOUTS
from zoo.catalog import own_backbones, timm_names
from zoo.errors import CheckpointError, UnknownNameError, nearest
from zoo.hub import load_state_dict

FAMILIES = ("illama_", "slab_", "prepbn_", *PUBLISHED_LAYOUTS)  # name prefixes of models whose authors' files are read
_V2 = "poolformerv2_"  # another paper's models, under a name that starts alike


class Converted(NamedTuple):
    """Tensors that `timm.create_model(name, **options)` loads strictly."""

    state: dict[str, Tensor]
    options: dict[str, Any]


class Mismatch(NamedTuple):
    """How converted tensors differ from a model's."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __bool__(self) -> bool:
        return any(self)


def convertible() -> list[str]:
    """Models whose authors' checkpoints can be read."""
    names = {*own_backbones(), *(name for family in PUBLISHED_LAYOUTS for name in timm_names(f"{family}*"))}
    return sorted(n for n in names if n.startswith(FAMILIES) and not n.startswith(_V2))


def convert(
    name: str, path: str | os.PathLike[str], *, inside: str | None = None, num_classes: int = 1000, **options: Any
) -> Converted:
    """Read an authors' checkpoint file and give its tensors the keys of our model.

    Args:
        name: `arch`, or `arch.tag` where the tag's image size differs (`illama_base.in1k_384`).
        path: a `.pth` or `.safetensors` file; nothing in it is executed.
        inside: which entry of the file, where it holds several sets of tensors (`model`, `model_ema`).
        options: constructor options of the model (`img_size`, `depth`, ...).

    Returns:
        The tensors, and the options beyond `name` that the model must be built with. Files of PRepBN models that hold
        RepBN alone (DeiT-T and Swin-T as published) are recognised: their option is `norm_layer=RepBN`.

    Raises:
        UnknownNameError: not a model with published files. CheckpointFileError: the file cannot be read, or would run
        code. CheckpointError: weights of another variant, which is named where it is one of ours, or every key and
        shape that does not fit.
    """
    arch = name.partition(".")[0]
    if arch not in convertible():
        raise UnknownNameError(
            f"no published checkpoints are known for {arch!r}; {nearest(arch, convertible(), listed=99)}"
        )
    theirs = load_state_dict(path, inside=inside)
    options = {"num_classes": num_classes, **options}
    if arch.startswith(("slab_", "prepbn_")) and _is_repbn_alone(theirs):
        options["norm_layer"] = RepBN
    state, problem = _fit(name, theirs, options)
    if not problem:
        return Converted(state, options)
    sibling = _sibling(arch, theirs, options)
    if sibling is not None:
        raise CheckpointError(f"{path} holds the weights of {sibling!r}, not of {name!r}")
    raise CheckpointError(f"{path} does not hold the weights of {name!r}:\n{problem}")


def _fit(name: str, theirs: dict[str, Tensor], options: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The converted tensors, and what is wrong with them in words ("" if nothing is)."""
    arch = name.partition(".")[0]
    _register(arch)
    model: Any = timm.create_model(name, **options)
    try:
        state = dict(_filter(arch)(dict(theirs), model))
    except (ValueError, KeyError, IndexError) as error:
        return {}, str(error) if isinstance(error, ValueError) else f"no such layout: {error!r}"
    own = model.state_dict()
    if own.keys().isdisjoint(state):
        return state, f"not one key is the model's: the file has {[*theirs][:3]}, the model {[*own][:3]}"
    return state, _words(compare(state, model))


def compare(state: dict[str, Tensor], model: nn.Module) -> Mismatch:
    """Every key that is missing or unexpected, and every shape that differs, in the model's order."""
    own = model.state_dict()
    shapes = [
        f"{key}: expected {tuple(own[key].shape)}, given {tuple(state[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    return Mismatch([k for k in own if k not in state], [k for k in state if k not in own], shapes)


def _words(found: Mismatch) -> str:
    parts = (("missing", found.missing), ("unexpected", found.unexpected), ("of another shape", found.shapes))
    return "\n".join(f"{len(lines)} {title}:\n  " + "\n  ".join(lines) for title, lines in parts if lines)


def _sibling(arch: str, theirs: dict[str, Tensor], options: dict[str, Any]) -> str | None:
    """The model of the same family that these tensors fit; models without data answer that."""
    family = next(family for family in FAMILIES if arch.startswith(family))
    for other in convertible():
        if other == arch or not other.startswith(family):
            continue
        with torch.device("meta"):
            _, problem = _fit(other, {k: v.to("meta") for k, v in theirs.items()}, options)
        if not problem:
            return other
    return None


def _filter(arch: str) -> Any:
    home = next((module for prefix, module in PUBLISHED_LAYOUTS.items() if arch.startswith(prefix)), None)
    return import_module(home or model_entrypoint(arch).__module__).checkpoint_filter_fn


def _register(arch: str) -> None:
    """Importing one of our files registers its models with timm."""
    if arch in own_backbones():
        import_module(own_backbones()[arch].module)


def _is_repbn_alone(state: dict[str, Tensor]) -> bool:
    """Whether norms are RepBN (`norm1.alpha`) and not PRepBN, which has step counters beside it."""
    ends = {key.rpartition(".")[2] for key in state}
    return "alpha" in ends and "total_step" not in ends
