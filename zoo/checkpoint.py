"""What is saved: a folder with what was trained and how to rebuild the rest.

    config.json          model config, adapters, base weights (source and content hash), preprocessing, labels, metrics
    adapter.safetensors  trained tensors only: adapters, head, unfrozen parameters
    README.md            a model card

`config.json` is data: names are looked up in the registries, nothing in it is imported or executed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import __version__
from zoo.adapters.inject import attach, attachments
from zoo.adapters.selection import classifier_names
from zoo.card import model_card
from zoo.errors import CheckpointError, CheckpointFileError, OptionError, ZooError
from zoo.folder import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    check_types,
    plain_data,
    read_card,
    read_json,
    refuse_local_sources,
    replace_file,
    serialise,
)
from zoo.hub import content_hash, fetch, load_state_dict, push_folder

CARD = "README.md"
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    labels: list[str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    merged: bool = False,
) -> Path:
    """Write what was trained, and how to rebuild the rest, into a folder; or with `merged` a plain timm checkpoint.

    Args:
        labels: class names in index order. metrics: figures to keep with the weights.
        preprocessing: how inputs were made (size, mean, std in 0..1 units, crop, interpolation); by default the
            backbone's own.
        merged: fold the adapters into a copy and write it so that `timm.create_model("local-dir:FOLDER")` loads it.

    Every file is replaced in one step, `config.json` last; it holds the hash of the weights, so a torn save is noticed.

    Raises:
        CheckpointError: the model was not built by `zoo.create` or a config, its adapters are merged right now, or
            labels, metrics or preprocessing are not plain data. Nothing is written then.
    """
    folder = Path(folder)
    if merged:
        from zoo.export import save_merged

        return save_merged(model, folder, labels=labels)
    config = _config_of(model)
    stuck = [a.name for a in attachments(model).values() if a.merged]
    if stuck:
        raise CheckpointError(f"adapter {stuck[0]!r} is merged; unmerge it before saving, or save with merged=True")
    state = {k: v.detach() for k, v in model.state_dict().items()}
    source = weights_source(model)
    trained = trained_keys(model) if source else set(state)
    base = {k: v for k, v in state.items() if k not in trained}
    weights = serialise({k: state[k] for k in sorted(trained)})
    card: dict[str, Any] = {
        "format": FORMAT,
        "zoo_version": __version__,
        "model": config,
        "adapters": _adapter_records(model),
        "base": {"source": source, "sha256": content_hash(base), "tensors": len(base), "dtype": _dtype_of(base)},
        "weights": {"sha256": hashlib.sha256(weights).hexdigest(), "tensors": len(trained)},
        "preprocessing": dict(preprocessing) if preprocessing is not None else preprocessing_of(model),
        "labels": labels,
        "metrics": dict(metrics or {}),
    }
    card = plain_data(card, "what is to be saved")
    texts = {CARD: model_card(card, model), CONFIG: json.dumps(card, indent=1, sort_keys=True) + "\n"}
    folder.mkdir(parents=True, exist_ok=True)  # from here on nothing is left that could refuse
    replace_file(folder / WEIGHTS, weights)
    for name, text in texts.items():
        replace_file(folder / name, text.encode("utf-8"))
    return folder


def load(source: str | Path, *, device: str | torch.device | None = None) -> nn.Module:
    """Rebuild a saved model from a folder, `hf-hub:org/name[@revision]` or any folder source; in eval mode.

    The result carries `zoo_card`, the content of `config.json` (labels, metrics, preprocessing).

    Raises:
        CheckpointFileError: a file is missing, torn, not ours, or hostile. CheckpointError: other base weights than
        those the adapter was trained on, or keys that differ. OfflineError: something must be fetched and cannot be.
    """
    from zoo.factory import build

    folder = _folder(source)
    card = read_card(folder)
    if str(source).startswith("hf-hub:"):
        refuse_local_sources(card["model"], str(source))
    check_types(card["model"], folder)
    try:
        model = build(_without_adapter(card["model"]))
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        if isinstance(error, ZooError) and not isinstance(error, OptionError):
            raise
        raise CheckpointFileError(f"{folder / CONFIG} describes a model that cannot be built: {error}") from error
    model.__dict__["zoo_config"] = card["model"]
    # Before attaching: adapters choose their own precision.
    model.to(DTYPES.get(card["base"].get("dtype"), torch.float32))
    _attach_all(model, card["adapters"])
    _load_tensors(model, folder, card)
    model.__dict__["zoo_card"] = card
    return model.to(device).eval()


def load_into(model: nn.Module, source: str | Path) -> None:
    """Load the adapters and head of a saved folder into a model built the same way; adapters it lacks are attached."""
    folder = _folder(source)
    card = read_card(folder)
    before = {id(a) for a in attachments(model).values()}
    present = {record["name"] for record in _adapter_records(model)}
    try:
        _attach_all(model, [r for r in card["adapters"] if not isinstance(r, dict) or r.get("name") not in present])
        _load_tensors(model, folder, card)
    except BaseException:
        for attached in reversed([a for a in attachments(model).values() if id(a) not in before]):
            attached.detach()
        raise
    model.__dict__["zoo_card"] = card


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    **card: Any,
) -> str:
    """Save to a temporary folder and upload it to the Hugging Face hub; `card` goes to `save`. Returns the address."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, **card)
        return push_folder(folder, repo_id, private=private, token=token, revision=revision)


def is_saved_model(source: str | Path) -> bool:
    """Whether a folder or repository is in our layout (as opposed to timm's)."""
    try:
        return "model" in read_json(_folder(source) / CONFIG)
    except CheckpointFileError:
        return False


def trained_keys(model: nn.Module) -> set[str]:
    """State-dict keys that training may have changed.

    Adapters, the head (or the new classifier that `num_classes=` asked for), unfrozen parameters and the buffers beside
    them, and running statistics that saw batches since the model was built, frozen or not.
    """
    keys: set[str] = set()
    for path, module in model.named_modules():
        own = {name for name, p in module._parameters.items() if p is not None and p.requires_grad}
        if own:
            own |= module._buffers.keys()
        if _is_adapter(path):
            own |= module._parameters.keys() | module._buffers.keys()
        keys.update(f"{path}.{name}" if path else name for name in own)
    head = getattr(model, "head", None)
    if isinstance(head, nn.Module) and hasattr(model, "backbone"):
        keys.update(head.state_dict(prefix="head."))
    elif model.__dict__.get("zoo_config", {}).get("num_classes"):
        keys.update(classifier_names(model))
    at_build: Mapping[str, int] = model.__dict__.get("batches_at_build", {})
    for path, count in batches_seen(model).items():
        if at_build.get(path) != count:
            keys.update(f"{path}.{n}" if path else n for n in model.get_submodule(path)._buffers)
    return keys & set(model.state_dict())


def batches_seen(model: nn.Module) -> dict[str, int]:
    """How many training batches each norm with running statistics has counted, by path."""
    counters = {path: module._buffers.get("num_batches_tracked") for path, module in model.named_modules()}
    return {path: int(count) for path, count in counters.items() if count is not None and not count.is_meta}


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """Input size, mean, std (0..1 units), crop and interpolation of the model's backbone; {} if it says nothing."""
    own = model.__dict__.get("preprocessing")
    if own is not None:
        return dict(own)
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "pretrained_cfg"):
        return {}
    from timm.data.config import resolve_model_data_config

    return {k: v for k, v in resolve_model_data_config(backbone).items() if k not in ("crop_mode",)}


def weights_source(model: nn.Module) -> str | None:
    """Where the backbone's weights came from; None for random weights."""
    backbone = getattr(model, "backbone", model)
    source: str | None = backbone.__dict__.get("weights_source")
    return source


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = model.__dict__.get("zoo_config")
    if not config:
        raise CheckpointError(
            f"this {type(model).__name__} was not built by zoo.create or a config, so it could not be rebuilt; "
            "build it so, or keep `attached.state_dict()` yourself"
        )
    return plain_data(config, "the model config")


def _adapter_records(model: nn.Module) -> list[dict[str, Any]]:
    roots = {id(module): path for path, module in model.named_modules()}
    return [{"root": roots[id(a.model)], "name": a.name, "config": dict(a.config)} for a in attachments(model).values()]


def _attach_all(model: nn.Module, records: list[dict[str, Any]]) -> None:
    for record in records:
        try:
            root = model.get_submodule(record["root"])
            config, name = dict(record["config"]), str(record["name"])
            attach(root, config, name=name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ZooError):
                raise
            raise CheckpointFileError(f"{CONFIG} has a malformed adapter entry {record!r}: {error}") from error


def _load_tensors(model: nn.Module, folder: Path, card: dict[str, Any]) -> None:
    """Check everything before the first tensor is written, so that a refusal leaves the model as it was."""
    tensors = load_state_dict(folder / WEIGHTS)
    own = model.state_dict()
    extra = sorted(tensors.keys() - own.keys())
    lost = sorted(k for k in own.keys() - tensors.keys() if ".adapters." in f".{k}" or k.startswith("adapter_banks."))
    wrong = [
        f"{k} {tuple(t.shape)} for {tuple(own[k].shape)}"
        for k, t in tensors.items()
        if k in own and own[k].shape != t.shape
    ]
    if extra or lost or wrong:
        raise CheckpointError(
            f"{folder} does not fit the model: unexpected {extra[:5]}, missing {lost[:5]}, shapes {wrong[:5]}"
        )
    base = {k: v for k, v in own.items() if k not in tensors}
    expected, found = card["base"].get("sha256"), content_hash(base)
    if expected != found:
        trained_on = card["base"].get("source") or "unnamed weights"
        raise CheckpointError(
            f"{folder} was trained on other base weights: {trained_on} with hash {expected}, "
            f"but this model has {weights_source(model) or 'random weights'} with hash {found}"
        )
    model.load_state_dict(tensors, strict=False)
    if card["base"].get("source"):  # what was trained trains on, so that saving again saves it again
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.requires_grad_(True)


def _folder(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointFileError(f"{path} is a file; a saved model is a folder with {CONFIG} and {WEIGHTS}")
    found = fetch(str(source))
    if not found.is_dir():
        raise CheckpointFileError(f"{source} is a file; a saved model is a folder with {CONFIG} and {WEIGHTS}")
    return found


def _without_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "adapter"}


def _is_adapter(path: str) -> bool:
    return "adapters" in path.split(".") or path.startswith("adapter_banks")


def _dtype_of(base: Mapping[str, Tensor]) -> str:
    """The precision of the base's weights; `load` builds in float32 and casts."""
    found = {str(t.dtype).removeprefix("torch.") for t in base.values() if t.is_floating_point()}
    return found.pop() if len(found) == 1 else "float32"
