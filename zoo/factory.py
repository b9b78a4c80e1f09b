"""`create`: from a name or a config to a model that is ready to use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.catalog import config_files, own_backbones
from zoo.errors import OptionError, UnknownNameError, ZooError, nearest
from zoo.registry import ADAPTERS, ATTENTION, BACKBONES, HEADS, MODELS

Part = str | Mapping[str, Any] | None
_UNSET: Any = object()


def create(
    name: str | Mapping[str, Any],
    *,
    pretrained: bool | str = False,
    adapter: Part = _UNSET,
    attention: Part = _UNSET,
    head: Part = _UNSET,
    num_classes: int | None = None,
    checkpoint: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model in eval mode.

    Args:
        name: a named model of the zoo (`zoo.list_models()`), a config file or dict, any timm model name, one of our
            backbones, `open_clip:arch[/tag]`, or a saved folder or `hf-hub:org/name` (then like `zoo.load`).
        pretrained: load the backbone's own weights; or a weights source (`pip:`, `file:`, `hf-hub:`, `https:`).
        adapter, attention, head: a registered name or `dict(type=..., **options)`; None removes the config's.
        num_classes: classes of a new classifier, which then trains beside the adapter.
        checkpoint: a folder or source with adapter and head to load into the model.
        overrides: constructor options of the backbone (timm's `img_size`, `in_chans`, ...) or of the named model.

    Returns:
        The bare timm or open_clip module for a backbone name, a `ZooTask` for a named model.

    Raises:
        UnknownNameError, OptionError: nearest names and valid options are in the message. OfflineError,
        CheckpointError.
    """
    parts = {k: v for k, v in dict(adapter=adapter, attention=attention, head=head).items() if v is not _UNSET}
    config = resolve(name)
    if config is None:
        model = _saved(str(name), parts, pretrained, num_classes, overrides)
    elif config["type"] in MODELS.names():
        model = _task(config, parts, pretrained, num_classes, overrides)
    else:
        model = _bare(config, parts, pretrained, num_classes, overrides)
    if checkpoint is not None:
        from zoo.checkpoint import load_into

        load_into(model, checkpoint)
    return _placed(model, device, dtype).eval()


def resolve(name: str | Mapping[str, Any]) -> dict[str, Any] | None:
    """The model config that a name stands for; None where the name is a saved model's folder or repository.

    Raises:
        UnknownNameError: the name means nothing; the nearest ones are in the message.
    """
    if isinstance(name, Mapping):
        config = dict(name.get("model", name))
        if "type" not in config:
            raise OptionError("a model config needs `type` (or a `model` entry that has it)")
        return config
    if name.endswith(".py"):
        return _read_config(Path(name))
    if name in config_files():
        return _read_config(config_files()[name])
    if name.startswith("open_clip:"):
        return {"type": "OpenCLIPTower", "name": name.removeprefix("open_clip:")}
    if name.startswith(("hf-hub:", "file:", "local-dir:")) or Path(name).is_dir():
        return _folder_config(name)
    import timm

    arch = name.partition(".")[0]
    if arch in own_backbones() or timm.is_model(arch):
        return {"type": "TimmBackbone", "name": name}
    choices = [*config_files(), *own_backbones(), *timm.list_models()]
    raise UnknownNameError(f"no model is called {name!r}; {nearest(name, choices)}")


def build(config: Mapping[str, Any]) -> nn.Module:
    """Build from a model config: data in, module out; `type` is looked up by name only. Records `zoo_config`."""
    from zoo.checkpoint import batches_seen

    config = dict(config)
    if "type" not in config:
        raise OptionError(f"a model config needs `type`, one of {sorted(MODELS.names())}; got {sorted(config)}")
    if config["type"] not in BACKBONES.names():
        model: nn.Module = MODELS.create(config)
    else:
        attention = config.get("attention")
        model = BACKBONES.create({k: v for k, v in config.items() if k != "attention"})
        if attention is not None:
            from zoo.attention.plug import plug_attention

            for one in attention if isinstance(attention, list) else [attention]:
                plug_attention(model, one)
    model.__dict__["zoo_config"] = config
    model.__dict__["batches_at_build"] = batches_seen(model)
    return model


def describe(name: str) -> str:
    """What a registered name is: its kind, documentation and options."""
    for registry in (ADAPTERS, ATTENTION, HEADS, MODELS, BACKBONES):
        if name in registry.names():
            found = registry.get(name)
            heading = f"{name}: {registry.name} in {found.__module__}"
            return f"{heading}\n{inspect.signature(found)}\n\n{inspect.getdoc(found) or ''}"
    if name in config_files():
        return f"{name}: named model\n{config_files()[name].read_text(encoding='utf-8')}"
    if name in own_backbones():
        entry = own_backbones()[name]
        return f"{name}: backbone in {entry.module}\n{entry.summary}"
    registries = (ADAPTERS, ATTENTION, HEADS, MODELS, BACKBONES)
    choices = [*config_files(), *own_backbones(), *(n for registry in registries for n in registry.names())]
    raise UnknownNameError(f"nothing is called {name!r}; {nearest(name, choices)}")


def summary(model: nn.Module) -> str:
    """Parameters in all and trained, and a row for each adapted site."""
    from zoo.adapters.inject import attachments

    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"{type(model).__name__}: {total:,} parameters, {trained:,} trained ({100 * trained / max(total, 1):.3f} %)"
    ]
    for attached in attachments(model).values():
        lines.append(repr(attached) + (" merged" if attached.merged else ""))
        for row in attached.table():
            lines.append("  " + "  ".join(f"{key}={value}" for key, value in row.items() if value not in (None, "")))
    return "\n".join(lines)


def _read_config(path: Path) -> dict[str, Any]:
    from mmengine.config import Config

    if not path.is_file():
        raise UnknownNameError(f"config file {path} does not exist")
    config = Config.fromfile(str(path))
    if "model" not in config:
        raise OptionError(f"{path} has no `model`")
    return dict(config.model.to_dict())


def _folder_config(name: str) -> dict[str, Any] | None:
    """None for a folder or repository in our layout; otherwise it is timm's."""
    from zoo.checkpoint import is_saved_model

    if is_saved_model(name):
        return None
    return {"type": "TimmBackbone", "name": name if ":" in name else f"local-dir:{name}"}


def _saved(
    name: str, parts: dict[str, Any], pretrained: bool | str, num_classes: int | None, overrides: Any
) -> nn.Module:
    from zoo.checkpoint import load

    given = [*parts, *overrides, *(["num_classes"] if num_classes is not None else [])]
    if given or isinstance(pretrained, str):
        raise OptionError(
            f"{name} is a saved model, which comes as it was saved; it takes no {', '.join(given) or 'pretrained='}"
        )
    return load(name)


def _task(
    config: dict[str, Any],
    parts: dict[str, Any],
    pretrained: bool | str,
    num_classes: int | None,
    overrides: dict[str, Any],
) -> nn.Module:
    config = {**config, "backbone": dict(config.get("backbone", {}))}
    config["backbone"]["pretrained"] = pretrained
    for key, value in parts.items():
        config[key] = _typed(value)
    if num_classes is not None:
        config["head"] = {**dict(config.get("head") or {}), "num_classes": num_classes}
    known = inspect.signature(MODELS.get(config["type"]).__init__).parameters
    for key, value in overrides.items():
        if key in known:
            config[key] = (
                {**config[key], **value}
                if isinstance(value, Mapping) and isinstance(config.get(key), Mapping)
                else value
            )
        else:
            config["backbone"][key] = value  # the backbone's constructor has the last word, and names what it refuses
    return build(config)


def _bare(
    config: dict[str, Any],
    parts: dict[str, Any],
    pretrained: bool | str,
    num_classes: int | None,
    overrides: dict[str, Any],
) -> nn.Module:
    if parts.get("head") is not None:
        raise OptionError(
            f"{config['name']} is a bare backbone with a classifier of its own; `head=` belongs to named models"
        )
    classes: dict[str, Any] = {"num_classes": num_classes} if config["type"] == "TimmBackbone" else {}
    if num_classes is not None and not classes:
        raise OptionError(f"{config['name']} has no classifier, so it takes no num_classes")
    plugged = {"attention": _typed(parts["attention"])} if parts.get("attention") is not None else {}
    model = build({**config, **overrides, **classes, **plugged, "pretrained": pretrained})
    if parts.get("adapter") is not None:
        from zoo.adapters.inject import attach_all

        attach_all(model, parts["adapter"])
        train_classifier(model)
    return model


def train_classifier(model: nn.Module) -> None:
    """Let the classifier of a timm-like model train beside an adapter; a model without one is left alone."""
    from zoo.adapters.selection import classifier_names

    wanted = classifier_names(model)
    for name, parameter in model.named_parameters():
        if name in wanted:
            parameter.requires_grad_(True)


def _placed(model: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """The model on its device and in `dtype`; adapters stay in fp32 on a half-precision base, where they train well."""
    if dtype not in (torch.float16, torch.bfloat16):
        return model.to(device=device, dtype=dtype)
    from zoo.adapters.attached import Attached
    from zoo.adapters.inject import attachments

    sets = [attached for attached in attachments(model).values() if isinstance(attached, Attached)]
    own = [{key: tensor.clone() for key, tensor in attached.state_dict().items()} for attached in sets]
    model.to(device=device, dtype=dtype)
    for attached, tensors in zip(sets, own, strict=True):
        for _, adapter in attached.placed:
            adapter.float()
        if attached.bank is not None:
            attached.bank.float()
        attached.load_state_dict(tensors)
    return model


def _typed(part: Any) -> Any:
    """A bare name as a config, everything else as it is."""
    if isinstance(part, str):
        return {"type": part}
    if part is None or isinstance(part, Mapping):
        return None if part is None else dict(part)
    if isinstance(part, (list, tuple)):
        return [_typed(p) for p in part]
    raise ZooError(f"expected a name or a dict(type=...), got {part!r}")
