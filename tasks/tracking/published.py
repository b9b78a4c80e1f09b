"""LoRAT's published checkpoint files, turned into this library's keys.

The files (safetensors, whatever their suffix) come in two kinds: only what was trained, or the full state. Differences
to ours: q, k and v are three linears, each with its own adapter (timm fuses them); DINOv2's w12 and w3 are timm's fc1
and fc2; adapters are `lora.A` and `lora.B`; the scale is written beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.inject import attachments
from zoo.errors import CheckpointError, nearest

_PARTS = "qkv"


def load_published(model: nn.Module, path: str | Path) -> list[str]:
    """Load a checkpoint of LitingLin/LoRAT into a `JointTracker` with LoRA on every linear layer of its blocks.

    Returns the names of base tensors that the file does not hold (all of them, for files of trained tensors): those
    keep the values of the backbone, which then has to be pretrained.

    Raises:
        CheckpointError: tensors that do not fit, naming them; the model is unchanged then.
        CheckpointFileError: not a safetensors file.
    """
    state = _read(Path(path))
    scale = _scales(model)
    converted = convert_published(state, name=_adapter_name(model), scale=scale)
    own = model.state_dict()
    unknown = sorted(converted.keys() - own.keys())
    if unknown:
        raise CheckpointError(f"{path}: the model has no {unknown[0]!r}; {nearest(unknown[0], own)}")
    wrong = [
        f"{key} is {tuple(value.shape)}, the model's is {tuple(own[key].shape)}"
        for key, value in converted.items()
        if value.shape != own[key].shape
    ]
    if wrong:
        raise CheckpointError(f"{path} holds a tracker of another size: {wrong[0]}")
    trained = [key for key in own if ".adapters." in key or key.startswith("head.") or key.endswith("token_type_embed")]
    absent = [key for key in trained if key not in converted]
    if absent:
        raise CheckpointError(f"{path} lacks {len(absent)} trained tensors, the first is {absent[0]!r}")
    model.load_state_dict(converted, strict=False)
    return [key for key in own if key not in converted]


def convert_published(state: Mapping[str, Tensor], *, name: str = "default", scale: float = 1.0) -> dict[str, Tensor]:
    """Keys and shapes of LitingLin/LoRAT -> those of a `JointTracker`.

    name: of the adapter set. scale: of the model's adapters; where the file's differs, B takes up the difference.

    Raises:
        CheckpointError: q, k and v are not all there.
    """
    alpha = float(state["lora_alpha"]) if "lora_alpha" in state else 1.0
    rank_stable = bool(state["use_rslora"]) if "use_rslora" in state else False
    made: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if key in ("lora_alpha", "use_rslora"):
            continue
        if key.endswith(".lora.B"):
            rank = tensor.shape[1]
            tensor = tensor * (alpha / (math.sqrt(rank) if rank_stable else rank) / scale)
        new = key.replace(".w12.", ".fc1.").replace(".w3.", ".fc2.").replace(".linear.", ".")
        new = new.replace(".lora.A", f".adapters.{name}.down").replace(".lora.B", f".adapters.{name}.up")
        if not new.startswith("head."):
            new = f"backbone.{new}"
        part = re.fullmatch(r"(.*\.qkv)\.([qkv])\.(.*)", new)
        if part is None:
            made[new] = tensor
        else:
            fused.setdefault(f"{part[1]}.{part[3]}", {})[part[2]] = tensor
    for key, parts in fused.items():
        if set(parts) != set(_PARTS):
            raise CheckpointError(f"of {key!r} the file holds only {', '.join(sorted(parts))}")
        made[key] = torch.cat([parts[one] for one in _PARTS])
    return made


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from zoo.errors import CheckpointFileError

    try:
        return load_file(path)  # by content: the published names end in .bin
    except (OSError, SafetensorError) as error:
        raise CheckpointFileError(f"{path} cannot be read as safetensors: {error}") from error


def _loras(model: nn.Module) -> list[Any]:
    return [found for found in attachments(model).values() if found.config["type"] == "LoRA"]


def _adapter_name(model: nn.Module) -> str:
    found = _loras(model)
    if len(found) != 1:
        raise CheckpointError(f"published LoRAT weights need one LoRA on the model, it has {len(found)}")
    return str(found[0].name)


def _scales(model: nn.Module) -> float:
    scales = {placed.adapter.scale for found in _loras(model) for placed in found.placed}
    if len(scales) > 1:
        raise CheckpointError(f"the model's LoRA has several scales {sorted(scales)}; published weights have one")
    return float(scales.pop()) if scales else 1.0
