"""open_clip models and their towers, unwrapped: by architecture and pretrained tag, or from any weights source."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import open_clip
from open_clip.coca_model import CoCa
from open_clip.convert import convert_state_dict
from open_clip.model import (
    CustomTextCLIP,
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
    set_model_preprocess_cfg,
)
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from backbones.open_clip_kinds import KINDS, with_protocol
from zoo.errors import CheckpointError, HubError, OfflineError, OptionError, UnknownNameError, nearest
from zoo.hub import Source, fetch, load_state_dict
from zoo.registry import BACKBONES

Part = Literal["visual", "text"]
_FILES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors", "pytorch_model.bin"),
)
# The resize modes of open_clip, as timm calls them.
_CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
# Notes that OpenAI's own files keep among the tensors.
_NOTES = ("input_resolution", "context_length", "vocab_size", "text.transformer.embeddings.position_ids")


@BACKBONES.register_module(name="OpenCLIPTower")  # type: ignore[untyped-decorator]
def open_clip_tower(
    name: str,
    *,
    tower: Part = "visual",
    pretrained: bool | str = False,
    image_size: int | None = None,
    context_length: int | None = None,
    quick_gelu: bool | None = None,
    patch_dropout: float | None = None,
) -> nn.Module:
    """One tower of an open_clip model, in open_clip's own class and keys, with timm's protocol on it.

    The tower's call gives the embedding (B, D); `forward_features`, `forward_head(pre_logits=True)` and
    `forward_intermediates` give what lies before, and `ImageClassifier` puts its head on the pooled features before
    the projection, as CLIP's linear probes do (Radford et al. 2021, arXiv 2103.00020, sec. 3.2).

    Args:
        name, pretrained, image_size, context_length, quick_gelu, patch_dropout: see `open_clip_model`; `pretrained`
            also takes a file that holds this tower alone.
        tower: "visual" or "text".

    Raises: as `open_clip_model`.
    """
    if tower not in get_args(Part):
        raise OptionError(f"tower is 'visual' or 'text', got {tower!r}; {nearest(str(tower), get_args(Part))}")
    whole = _create(name, tower, pretrained, image_size, context_length, quick_gelu, patch_dropout)
    chosen = with_protocol(getattr(whole, tower))
    chosen.__dict__["weights_source"] = whole.__dict__["weights_source"]
    if tower == "visual":
        chosen.__dict__["pretrained_cfg"] = whole.__dict__["pretrained_cfg"]
    return chosen


@BACKBONES.register_module(name="OpenCLIPModel")  # type: ignore[untyped-decorator]
def open_clip_model(
    name: str,
    *,
    pretrained: bool | str = False,
    image_size: int | None = None,
    context_length: int | None = None,
    quick_gelu: bool | None = None,
    patch_dropout: float | None = None,
) -> nn.Module:
    """A whole open_clip model: `visual`, `text` (always a module of its own), `logit_scale`, `tokenize(texts)`.

    Args:
        name: `ARCH` or `ARCH/TAG` of open_clip, `hf-hub:org/name`, or `local-dir:folder` with `open_clip_config.json`.
            A tag also decides the activation (QuickGELU), mean and std that its weights were trained with.
        pretrained: True for the weights of the tag or repository, or a source: `file:/path`, `hf-hub:org/name:file`,
            `pip:package`, `https://...`, `open_clip:ARCH/TAG`. `model.weights_source` says afterwards what was
            loaded (None for random weights).
        image_size, context_length: other than the architecture's; positions are interpolated when weights are loaded.
        quick_gelu: override the activation, for weights of your own.
        patch_dropout: share of patches left out while training (Li et al. 2023, arXiv 2212.00794).

    Raises:
        UnknownNameError: no such architecture or tag. OptionError: pretrained=True without a tag.
        OfflineError: something must be fetched and cannot be. CheckpointError: weights of another model, naming keys.
    """
    model = _create(name, None, pretrained, image_size, context_length, quick_gelu, patch_dropout)
    for part in (model.visual, model.text):
        if type(part) in KINDS:  # a Hugging Face text tower works as open_clip has it
            with_protocol(cast(nn.Module, part))
    return with_protocol(model)


def tokenize(tokenizer_name: str, context_length: int, texts: Sequence[str]) -> Tensor:
    """Texts -> (N, L) int64, by the tokenizer of an open_clip model.

    Raises OptionError: a text that open_clip would cut. OfflineError: the tokenizer must be fetched and cannot be.
    """
    tokenizer = _tokenizer(tokenizer_name, context_length)
    if isinstance(tokenizer, SimpleTokenizer):
        for text in texts:
            length = len(tokenizer.encode(text)) + 2  # start and end
            if length > context_length:
                raise OptionError(f"{text!r} has {length} tokens, the text tower takes {context_length}; shorten it")
    tokens: Tensor = tokenizer(list(texts), context_length=context_length)
    return tokens


@functools.cache
def _tokenizer(name: str, context_length: int) -> Any:
    try:
        return open_clip.get_tokenizer(name, context_length=context_length)
    except (OSError, ValueError) as error:
        raise OfflineError(
            f"the tokenizer of {name} is not in the local cache and could not be fetched ({_first_line(error)}); "
            f"fetch it on a connected machine by `open_clip.get_tokenizer({name!r})` and copy the cache (HF_HOME)"
        ) from error


@dataclass(frozen=True)
class _Architecture:
    """What a name stands for: open_clip's model config, how images are made, and where its weights are."""

    name: str  # without the tag
    config: dict[str, Any]
    preprocess: dict[str, Any]
    sources: tuple[str, ...]  # tried in order


def _create(
    name: str,
    tower: Part | None,
    pretrained: bool | str,
    image_size: int | None,
    context_length: int | None,
    quick_gelu: bool | None,
    patch_dropout: float | None,
) -> nn.Module:
    """The plain open_clip model with `weights_source`, `pretrained_cfg` and `tokenizer_name` set."""
    if isinstance(pretrained, str) and pretrained.startswith("open_clip:"):
        other, name = name, pretrained.removeprefix("open_clip:")
        if other.partition("/")[0] != name.partition("/")[0]:
            raise OptionError(f"{pretrained} are weights of another architecture than {other}")
        pretrained = True
    architecture = _find(name)
    if pretrained is True and not architecture.sources:
        tags = open_clip.list_pretrained_tags_by_model(architecture.name)
        raise OptionError(f"say which weights: {architecture.name}/TAG, one of {', '.join(tags) or '(it has none)'}")
    given: dict[str, dict[str, Any]] = {
        "": {"quick_gelu": quick_gelu},
        "vision_cfg": {"image_size": image_size, "patch_dropout": patch_dropout},
        "text_cfg": {"context_length": context_length},
    }
    sources = architecture.sources if pretrained is True else (str(pretrained),)
    source, path = _fetch(sources) if pretrained else (None, None)  # before the model is built: it is what may fail
    model = _build(architecture, given)
    if path is not None:
        _load(model, load_state_dict(path), tower, f"{source}, asked for {name}")
    if image_size is not None and hasattr(model.visual, "set_input_size"):  # a timm trunk resizes its own positions
        cast(Any, model.visual).set_input_size(image_size)
    _describe(model, architecture, source)
    return model


def _find(name: str) -> _Architecture:
    if name.startswith(("hf-hub:", "local-dir:")):
        folder = name.removeprefix("local-dir:")
        places = tuple(f"{name}:{file}" if name.startswith("hf-hub:") else f"file:{folder}/{file}" for file in _FILES)
        file = fetch(f"{name}:open_clip_config.json" if folder == name else f"file:{folder}/open_clip_config.json")
        content = _read_config(file)
        return _Architecture(name, content["model_cfg"], content.get("preprocess_cfg", {}), places)
    arch, slash, tag = name.partition("/")
    config = open_clip.get_model_config(arch)
    if config is None:
        raise UnknownNameError(f"open_clip has no model {arch!r}; {nearest(arch, open_clip.list_models())}")
    if not slash:
        return _Architecture(arch, config, {}, ())
    cfg = open_clip.get_pretrained_cfg(arch, tag)
    if not cfg:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        raise UnknownNameError(f"open_clip has no weights {tag!r} of {arch}; {nearest(tag, tags)}")
    # open_clip itself only warns here, and runs the weights with an activation they were not trained with.
    config["quick_gelu"] = bool(cfg.get("quick_gelu", config.get("quick_gelu", False)))
    return _Architecture(arch, config, cfg, (f"open_clip:{arch}/{tag}",))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content["model_cfg"]["vision_cfg"], dict) and isinstance(content["model_cfg"]["text_cfg"], dict):
            return cast(dict[str, Any], content)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no open_clip config: {type(error).__name__} {error}") from error
    raise CheckpointError(f"{file} is no open_clip config: vision_cfg and text_cfg must be objects")


def _build(architecture: _Architecture, given: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    config = copy.deepcopy(architecture.config)
    config.pop("custom_text", None)  # the text tower is a module of its own here, whatever the config says
    for section, options in given.items():
        (config[section] if section else config).update({k: v for k, v in options.items() if v is not None})
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP
    try:
        model: nn.Module = kind(**config)
        return model
    except OSError as error:
        raise OfflineError(
            f"the text tower of {architecture.name} is described by a Hugging Face repository that is not in the local "
            f"cache and could not be fetched ({_first_line(error)})"
        ) from error


def _describe(model: Any, architecture: _Architecture, source: str | None) -> None:
    """What the preprocessing and tokenizing code wants to know, as plain attributes."""
    size = tuple(int(s) for s in _pair(model.visual.image_size))
    own = merge_preprocess_dict(PreprocessCfg(), {**architecture.preprocess, "size": size})
    set_model_preprocess_cfg(model, own)
    model.__dict__["weights_source"] = source
    model.__dict__["tokenizer_name"] = architecture.name
    model.__dict__["pretrained_cfg"] = {
        "architecture": f"open_clip:{architecture.name}",  # some open_clip names are names of other models in timm
        "input_size": (3, *size),
        "mean": tuple(own["mean"]),
        "std": tuple(own["std"]),
        "interpolation": own["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES[own["resize_mode"]],
        "num_classes": 0,
    }


def _fetch(sources: Sequence[str]) -> tuple[str, Path]:
    """The first source that exists, and its file."""
    problem: HubError | None = None
    for text in sources:
        source = Source.parse(text)
        try:
            path = fetch(source)
        except OfflineError:
            raise
        except HubError as error:
            problem = problem or error
            continue
        if path.is_dir():
            held = [path / file for file in _FILES if (path / file).is_file()]
            if not held:
                raise CheckpointError(f"{text!r} is a folder without any of {', '.join(_FILES)}")
            path = held[0]
        # What is recorded must fetch the same again: of a list of guesses, the one that held.
        return str(source), path
    assert problem is not None  # sources is never empty
    raise problem


def _load(model: nn.Module, state: dict[str, Tensor], tower: Part | None, what: str) -> None:
    """Load a whole model's weights, or `tower` alone, strictly; open_clip's conversions of older layouts included."""
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    alone = tower is not None and set(state) == set(cast(nn.Module, getattr(model, tower)).state_dict())
    if alone:
        state = {f"{tower}.{key}": value for key, value in state.items()}
    else:
        state = convert_to_custom_text_state_dict(convert_state_dict(cast(Any, model), state))
    state = {key: value for key, value in state.items() if key not in _NOTES}
    own = {k: v for k, v in model.state_dict().items() if not alone or k.startswith(f"{tower}.")}
    try:
        for key in ("logit_scale", "logit_bias"):  # stored as a number or as a vector of one
            if key in state and key in own:
                state[key] = state[key].reshape(own[key].shape)
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except (AssertionError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{what}: positions or logit scale do not fit: {_first_line(error)}") from error
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    pairs = [(k, tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own]
    shapes = [f"{key} {given} for {wanted}" for key, given, wanted in pairs if given != wanted]
    if missing or extra or shapes:
        raise CheckpointError(
            f"{what}: weights of another model: {len(missing)} keys missing (such as {missing[:3]}), "
            f"{len(extra)} unexpected (such as {extra[:3]}), shapes {shapes[:3]}"
        )
    model.load_state_dict(state, strict=False)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
