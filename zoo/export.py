"""Plain weights: adapters folded in, written so that timm (or open_clip) loads them without this library."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from zoo.adapters.attached import Attached, active_adapters
from zoo.adapters.inject import attachments
from zoo.adapters.probe import derive_example
from zoo.card import merged_card
from zoo.checkpoint import preprocessing_of
from zoo.errors import CheckpointError, SiteError
from zoo.folder import WEIGHTS, plain_data, replace_file, serialise

_PLAIN = "model.safetensors"
# Arguments of ours, or of timm's factory, that say nothing about the architecture.
_NOT_ARCHITECTURE = frozenset(
    {"type", "name", "pretrained", "num_classes", "adapter", "attention", "pretrained_cfg", "pretrained_cfg_overlay"}
)


def save_merged(model: nn.Module, folder: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Fold the adapters into a copy of the model and write it as `timm.create_model("local-dir:FOLDER")` wants it.

    A task with a timm backbone and a head of one `nn.Linear` becomes the timm model with that classifier. A backbone
    that is not timm's (an open_clip tower) becomes `model.safetensors` alone, with the head, if any, in
    `head.safetensors`. Before anything is written, the plain model is built anew and must predict what the merged one
    predicts.

    Raises:
        SiteError: an adapter without a merged form, or one that is attached but does not run.
        CheckpointError: a head that is not one linear layer, an architecture that timm's arguments do not rebuild (an
            attention plug-in), or a folder that holds a saved adapter.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder} holds a saved adapter ({WEIGHTS}); write the merged weights to another folder")
    merged = merged_copy(model)
    backbone, head = split_task(merged)
    name = str((getattr(backbone, "pretrained_cfg", None) or {}).get("architecture") or type(backbone).__name__)
    if not (hasattr(backbone, "pretrained_cfg") and timm.is_model(name)):
        folder.mkdir(parents=True, exist_ok=True)
        if head is not None:
            replace_file(folder / "head.safetensors", serialise(head.state_dict()))
        replace_file(folder / _PLAIN, serialise(backbone.state_dict()))
        replace_file(folder / "README.md", merged_card(name, backbone, labels).encode())
        return folder
    linear = None if head is None else plain_linear(head)
    arguments = _arguments(backbone, model)
    plain = _rebuild(name, backbone, linear, arguments)
    _check_same(merged if linear is not None else backbone, plain)
    _write(plain, folder, arguments, labels, preprocessing_of(model))
    return folder


def merged_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, with every adapter folded in; the model itself stays as it is."""
    for attached in attachments(model).values():
        idle = isinstance(attached, Attached) and not attached.merged
        if idle and any(p.adapter not in active_adapters(p.site.module) for p in attached.placed):  # type: ignore[union-attr]
            raise SiteError(
                f"adapter {attached.name!r} is attached but does not run; activate or detach it before merging"
            )
    merged = copy.deepcopy(model).cpu().eval()
    for attached in attachments(merged).values():
        if isinstance(attached, Attached) and not attached.merged:
            attached.merge()
    return merged


def split_task(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """(backbone, head) of a task; (the model, None) for anything else."""
    backbone, head = getattr(model, "backbone", None), getattr(model, "head", None)
    if (
        isinstance(backbone, nn.Module)
        and (head is None or isinstance(head, nn.Module))
        and not hasattr(model, "pretrained_cfg")
    ):
        return backbone, head
    return model, None


def plain_linear(head: nn.Module) -> nn.Linear:
    """The one linear layer of a head; raises `CheckpointError` for a head that holds anything else."""
    owners = [m for m in head.modules() if m._parameters or m._buffers]
    if len(owners) == 1 and type(owners[0]) is nn.Linear:
        return owners[0]
    held = ", ".join(type(m).__name__ for m in owners) or "nothing"
    raise CheckpointError(
        f"a {type(head).__name__} (it holds {held}) has no place in a plain timm model, whose classifier is one linear "
        "layer; save it without merged=True, or export model.backbone"
    )


def _arguments(backbone: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Constructor arguments of the backbone, as timm recorded them and as our config has them."""
    config = model.__dict__.get("zoo_config") or {}
    inner = config.get("backbone") if "backbone" in config else config
    given = {**getattr(backbone, "_model_args", {}), **(inner if isinstance(inner, Mapping) else {})}
    kept = {k: v for k, v in given.items() if k not in _NOT_ARCHITECTURE}
    return plain_data(kept, f"the arguments of {type(backbone).__name__}")


def _rebuild(name: str, backbone: nn.Module, linear: nn.Linear | None, arguments: dict[str, Any]) -> nn.Module:
    """The same architecture straight from timm, with the merged weights and the head's linear layer as classifier."""
    classes = linear.out_features if linear is not None else int(backbone.num_classes)  # type: ignore[arg-type]
    plain: Any = timm.create_model(name, num_classes=classes, **arguments)
    cfg = {k: v for k, v in backbone.pretrained_cfg.items() if k != "state_dict"}  # type: ignore[union-attr, operator]
    plain.pretrained_cfg = plain.default_cfg = cfg
    state = backbone.state_dict()
    plain.to(next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)).eval()
    replaced = _classifiers(plain) if linear is not None else {}
    own = {f"{path}.{key}" for path, module in replaced.items() for key in module.state_dict()}
    state = {k: v for k, v in state.items() if k.rpartition(".")[0] not in replaced}
    lost, extra = (
        sorted(plain.state_dict().keys() - own - state.keys()),
        sorted(state.keys() - plain.state_dict().keys()),
    )
    shapes = [k for k, v in plain.state_dict().items() if k in state and state[k].shape != v.shape]
    if lost or extra or shapes:
        raise CheckpointError(
            f"timm's {name} built from {arguments} is not this architecture (was it changed after it was built?): "
            f"missing {lost[:3]}, unexpected {extra[:3]}, shapes of {shapes[:3]}"
        )
    plain.load_state_dict(state, strict=False)
    if linear is not None:
        for module in replaced.values():
            _copy_linear(linear, module, name)
    result: nn.Module = plain
    return result


def _classifiers(plain: nn.Module) -> dict[str, Any]:
    """Path and module of timm's classifier, or of both where a distilled model averages two."""
    names = plain.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return {path: plain.get_submodule(path) for path in ((names,) if isinstance(names, str) else names)}


@torch.no_grad()
def _copy_linear(linear: nn.Linear, target: nn.Module, name: str) -> None:
    """Into a linear classifier, or into the 1x1 convolution that some timm models use as one."""
    weight = target._parameters.get("weight")
    if weight is None or weight.numel() != linear.weight.numel() or weight.shape[0] != linear.out_features:
        raise CheckpointError(
            f"the classifier of timm's {name} is a {type(target).__name__}, which cannot hold {linear}"
        )
    weight.copy_(linear.weight.reshape(weight.shape))
    bias = target._parameters.get("bias")
    if bias is not None:
        bias.zero_() if linear.bias is None else bias.copy_(linear.bias)
    elif linear.bias is not None:
        raise CheckpointError(f"the classifier of timm's {name} has no bias, but the head has one")


@torch.no_grad()
def _check_same(merged: nn.Module, plain: nn.Module) -> None:
    """The same weights in the same layers must give the same numbers, up to the last bits of a reordered sum."""
    example = derive_example(plain)
    if not isinstance(example, Tensor):
        raise CheckpointError(
            f"cannot tell what {type(plain).__name__} takes as input, so the export could not be checked"
        )
    dtype = next(p.dtype for p in plain.parameters())
    x = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, found = merged(x), plain(x)
    scale = float(expected.abs().max())
    gap = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if not gap <= 64 * torch.finfo(dtype).eps * scale:
        raise CheckpointError(
            f"timm's {type(plain).__name__} with the merged weights predicts otherwise (difference {gap:.3g} at "
            f"outputs up to {scale:.3g}): something beyond weights was changed (an attention plug-in?)"
        )


def _write(
    plain: nn.Module, folder: Path, arguments: dict[str, Any], labels: Sequence[str] | None, how: Mapping[str, Any]
) -> None:
    """timm writes beside the folder; each file then moves in one step, `config.json` last."""
    fields = ("input_size", "mean", "std", "interpolation", "crop_pct")
    config: dict[str, Any] = {"pretrained_cfg": {k: how[k] for k in fields if how.get(k) is not None}}
    if labels is not None:
        config["label_names"] = list(labels)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        save_for_hf(plain, beside, model_config=config, model_args=arguments, safe_serialization=True)
        name = str(plain.pretrained_cfg.get("architecture"))  # type: ignore[union-attr, operator]
        (Path(beside) / "README.md").write_text(merged_card(name, plain, labels), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in (_PLAIN, "README.md", "config.json"):
            os.replace(Path(beside) / file, folder / file)
