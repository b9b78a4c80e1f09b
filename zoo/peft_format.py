"""The files of a Hugging Face peft LoRA folder: read with suspicion, without peft.

    adapter_config.json        type, rank, alpha, target modules, modules saved whole
    adapter_model.safetensors  base_model.model.<path>.lora_A.weight (r, I), .lora_B.weight (O, r)

What the entries of the config mean is taken from peft's behaviour (version 0.21).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import CheckpointError, CheckpointFileError
from zoo.folder import read_json
from zoo.hub import load_state_dict

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# Entries of peft's LoRA config that change what is computed, and the values under which they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # other initialisations change the base weights when peft loads the file
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_NESTED_REPEAT = re.compile(r"\([^)]*[*+{][^)]*\)[*+{]")  # the pattern shape that can take exponential time


@dataclass(frozen=True)
class Entry:
    """One LoRA of a peft file: A as (r, I), B as (O, r) and the scale."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class PeftFolder:
    """A plain LoRA as it stands in the files.

    entries: by module path. saved: tensors of modules saved whole, by state-dict key. rslora, dropout: as configured.
    """

    file: Path
    entries: dict[str, Entry]
    saved: dict[str, Tensor]
    rslora: bool
    dropout: float


def read_folder(folder: Path) -> PeftFolder:
    """Read and judge a peft folder; nothing in it is executed.

    Raises:
        CheckpointFileError: no such folder, or a damaged one. CheckpointError: not a plain LoRA.
    """
    config = read_json(folder / CONFIG)
    _check_plain(config, folder)
    file = folder / (WEIGHTS if (folder / WEIGHTS).is_file() or not (folder / PICKLED).is_file() else PICKLED)
    entries, saved = _split(load_state_dict(file), config, file)
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, float):
        raise CheckpointFileError(f"{folder / CONFIG}: lora_dropout is {dropout!r}, not a number")
    return PeftFolder(file, entries, saved, bool(config.get("use_rslora")), dropout)


def _check_plain(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder} holds a peft adapter of type {kind!r}; only LORA has the same form here")
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        if not any(value is item or (type(value) is type(item) and value == item) for item in neutral):
            raise CheckpointError(
                f"{folder}: {key}={value!r} makes this more than a plain LoRA, so it cannot be read exactly"
            )


def _split(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path
) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """LoRA entries by path, and the tensors of modules that were saved whole."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        if plain.endswith(".lora_A.weight"):
            downs[plain.removesuffix(".lora_A.weight")] = tensor
        elif plain.endswith(".lora_B.weight"):
            ups[plain.removesuffix(".lora_B.weight")] = tensor
        else:
            rest[plain] = tensor
    alone = sorted(downs.keys() ^ ups.keys())
    if alone or not downs:
        raise CheckpointFileError(
            f"{file} lacks the other factor of {alone[:3]}" if alone else f"{file} holds no LoRA factors"
        )
    wholes = _names(config.get("modules_to_save"), "modules_to_save", file)
    stray = [key for key in rest if not any(_ends(key.rpartition(".")[0], whole) for whole in wholes)]
    if stray:
        raise CheckpointError(f"{file} holds tensors that are neither LoRA factors nor in modules_to_save: {stray[:5]}")
    return {path: _entry(path, downs[path], ups[path], config, file) for path in downs}, rest


def _entry(path: str, down: Tensor, up: Tensor, config: Mapping[str, Any], file: Path) -> Entry:
    rank = down.shape[0]
    if down.dim() < 2 or up.dim() != down.dim() or up.shape[1:].numel() != rank:
        raise CheckpointFileError(f"{file}: factors of {path} have shapes {tuple(down.shape)} and {tuple(up.shape)}")
    alpha = _by_pattern(path, config.get("alpha_pattern") or {}, config.get("lora_alpha"), file)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Entry(down.reshape(rank, -1), up.reshape(-1, rank), scale)


def _by_pattern(path: str, patterns: Any, default: Any, file: Path) -> float:
    """peft's rule: the first pattern that fits the end of the path, at a dot."""
    value = default
    if not isinstance(patterns, Mapping):
        raise CheckpointFileError(
            f"{file.parent / CONFIG}: alpha_pattern is a {type(patterns).__name__}, not an object"
        )
    for pattern, given in patterns.items():
        if len(pattern) > 500 or _NESTED_REPEAT.search(pattern):
            raise CheckpointFileError(
                f"{file.parent / CONFIG}: the pattern {pattern[:60]!r} is refused, matching it could take forever"
            )
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise CheckpointFileError(
                f"{file.parent / CONFIG}: {pattern!r} is no regular expression ({error})"
            ) from error
        if fits:
            value = given
            break
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointFileError(f"{file.parent / CONFIG}: the alpha of {path} is {value!r}, not a number")
    return float(value)


def _names(value: Any, key: str, file: Path) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointFileError(f"{file.parent / CONFIG}: {key} is {value!r}, not a list of names")
    return value


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}") or f".{name}." in f".{path}."
