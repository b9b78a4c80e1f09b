"""Any timm model, unwrapped: pretrained by timm's own tag, or from any other weights source."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import timm
import torch
from timm.models import load_pretrained, model_entrypoint
from torch import nn

from zoo.catalog import own_backbones
from zoo.errors import CheckpointError, OfflineError, OptionError, UnknownNameError, ZooError, nearest
from zoo.hub import Source, fetch, load_state_dict, match_by_order, packaged_weights
from zoo.hub.sources import Scheme
from zoo.registry import BACKBONES

# timm's models whose authors' own checkpoint files our filters read too
PUBLISHED_LAYOUTS = {
    "shvit_": "backbones.shvit",
    "poolformer_": "backbones.poolformer",
    "convit_": "backbones.convit",
}


@BACKBONES.register_module(name="TimmBackbone")
def timm_backbone(
    name: str, *, pretrained: bool | str = False, num_classes: int | None = 0, **options: Any
) -> nn.Module:
    """A timm model (or one of ours, registered with timm) by name; the class is timm's own.

    Args:
        name: `arch` or `arch.tag`, `hf-hub:org/name`, or `local-dir:folder`.
        pretrained: True for the weights of timm's tag, or a source: `pip:package`, `file:/path`,
            `hf-hub:org/name:file`, `https://...`. `model.weights_source` says afterwards what was loaded (None for
            random weights).
        num_classes: 0 for features without a classifier, None to keep the pretrained one.
        options: passed to the model's constructor (`img_size`, `in_chans`, `drop_path_rate`, ...).

    Raises:
        UnknownNameError, OptionError: no such model or constructor option. OfflineError: weights are not here and
        cannot be fetched. CheckpointError: weights of another model, naming the keys.
    """
    _register_own(name)
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        arch = name.partition(".")[0]
        raise UnknownNameError(f"timm has no model {name!r}; {nearest(arch, timm.list_models())}")
    if num_classes is not None:
        options["num_classes"] = num_classes
    if isinstance(pretrained, str):
        source: str | None
        source, overlay = _read(pretrained, name)
        model = _create(name, False, {**options, "pretrained_cfg_overlay": _without_weights(overlay)})
        _load(model, name, overlay, source)
    else:
        source = _own_source(name) if pretrained else None
        model = _create(name, pretrained, options)
    model.__dict__["weights_source"] = source
    return model


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise OptionError(f"{name} does not take these options: {error}") from error
    except ZooError:
        raise
    except (OSError, RuntimeError) as error:
        if pretrained and not options.get("pretrained_cfg_overlay"):
            raise OfflineError(
                f"the pretrained weights of {name} are not in the local cache and could not be fetched "
                f"({_first_line(error)}). Fetch them on a machine with network by "
                f"`python -c \"import timm; timm.create_model('{name}', pretrained=True)\"` and copy the Hugging Face "
                "cache folder (HF_HOME), or give `pretrained=` a file: or pip: source"
            ) from error
        raise CheckpointError(f"the weights do not fit {name}: {error}") from error
    return model


def _read(text: str, name: str) -> tuple[str, dict[str, Any]]:
    """The canonical source and what timm shall load from it."""
    source = Source.parse(text)
    path = fetch(source)
    if path.is_dir():
        files = [p for p in (path / "model.safetensors", path / "pytorch_model.bin") if p.is_file()]
        if not files:
            raise CheckpointError(f"{text!r} is a folder without model.safetensors or pytorch_model.bin")
        path = files[0]
    overlay: dict[str, Any] = {"state_dict": load_state_dict(path)}
    known = packaged_weights(source) if source.scheme is Scheme.PIP else None
    if known is not None:
        if name.partition(".")[0] != known.arch:
            raise CheckpointError(f"{text!r} holds weights of {known.arch}, not of {name}")
        with torch.device("meta"):
            reference = timm.create_model(known.arch).state_dict()
        overlay = {"state_dict": match_by_order(overlay["state_dict"], reference), "mean": known.mean, "std": known.std}
    return str(source), overlay


def _without_weights(overlay: dict[str, Any]) -> dict[str, Any] | None:
    return {k: v for k, v in overlay.items() if k != "state_dict"} or None


def _load(model: Any, name: str, overlay: dict[str, Any], source: str) -> None:
    """Load through timm (channel and classifier adaptation, key filters), allowing only the classifier to differ."""
    config = {**model.pretrained_cfg, **overlay}
    outcome: list[Any] = []
    handle = model.register_load_state_dict_post_hook(lambda module, keys: outcome.append(keys))
    filter_fn = _key_filter(name)
    channels = getattr(model, "in_chans", None) or next(p for p in model.parameters() if p.dim() == 4).shape[1]
    try:
        load_pretrained(model, config, num_classes=model.num_classes, in_chans=channels, filter_fn=filter_fn)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{source} does not hold weights of {name}: {_first_line(error)}") from error
    finally:
        handle.remove()
    classifiers = config.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    missing = [key for key in outcome[0].missing_keys if not key.startswith(heads or ("\0",))]
    extra = [key for key in outcome[0].unexpected_keys if not key.startswith(heads or ("\0",))]
    if missing or extra:
        raise CheckpointError(
            f"{source} does not hold weights of {name}: {len(missing)} keys missing (such as {missing[:3]}), "
            f"{len(extra)} unexpected (such as {extra[:3]})"
        )


def _key_filter(name: str) -> Any:
    """The function that turns published keys into the model's: ours where it knows more layouts than timm's."""
    arch = name.partition(".")[0]
    ours = next((home for prefix, home in PUBLISHED_LAYOUTS.items() if arch.startswith(prefix)), None)
    return getattr(import_module(ours or model_entrypoint(arch).__module__), "checkpoint_filter_fn", None)


def _own_source(name: str) -> str:
    if ":" in name:
        return name
    config = timm.get_pretrained_cfg(name)
    tag = f".{config.tag}" if config is not None and config.tag else ""
    return f"timm:{name.partition('.')[0]}{tag}"


def _register_own(name: str) -> None:
    """Importing one of our files registers its models with timm."""
    module = own_backbones().get(name.partition(".")[0])
    if module is not None:
        import_module(module.module)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
