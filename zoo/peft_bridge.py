"""Exchange of LoRA adapters with Hugging Face peft: its folder format, written and read without peft itself.

peft computes y = W x + s B A x with s = alpha / r (or alpha / sqrt r), on a whole linear or convolution weight. Our
factors for some parts of a fused weight become one LoRA of rank P*r whose B is zero outside each part's block, which is
the same function. What peft has no form of is refused with the reason, never approximated.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.attached import Attached, Placed
from zoo.adapters.base import Factors, Part, Site, stack_rows, take_rows
from zoo.adapters.inject import attach, attachments
from zoo.adapters.lora import LoRA
from zoo.adapters.low_rank import ConvGeometry
from zoo.adapters.sites import find_sites
from zoo.errors import CheckpointError, SiteError, UnknownNameError, nearest
from zoo.export import plain_linear, split_task
from zoo.folder import replace_file, serialise
from zoo.peft_format import CONFIG, PREFIX, WEIGHTS, Entry, PeftFolder, read_folder


def export_peft(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write the LoRA set `name` as a peft folder; `peft.PeftModel.from_pretrained(timm_model, folder)` reads it.

    Keys are those of the module the set is attached to: the model, or a task's backbone. Trained weights outside of
    adapters go to `modules_to_save`; a task's head of one linear layer is saved as the timm model's classifier.

    Raises:
        UnknownNameError: no such set. SiteError: another method than LoRA, or a site that peft cannot adapt so (layers
        whose forward is bypassed, nn.MultiheadAttention, grouped convolutions). CheckpointError: a head or trained
        weight that has no place in a peft folder.
    """
    attached = _lora_set(model, name)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, tuple[int, float]] = {}
    for placed in attached.placed:
        _check_peft_site(placed.site)
        down, up, scale = _whole_factors(placed)
        path = placed.site.path
        scales[path] = (down.shape[0], scale)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = down
        tensors[f"{PREFIX}{path}.lora_B.weight"] = up
    saved = _saved_modules(attached.model) | _task_classifier(model, attached)
    for path, state in saved.items():
        tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in state.items()}
    config = _config(attached, scales, sorted(saved))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, serialise(tensors))
    replace_file(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return folder


def import_peft(model: nn.Module, folder: str | Path, name: str = "default") -> Attached:
    """Attach the LoRA of a peft folder to our model, under `name`; the places are those that the file has tensors for.

    Modules that peft saved whole (`modules_to_save`) are loaded into the base and left trainable. Nothing in the
    folder is executed; everything is checked before the model is touched.

    Raises:
        CheckpointFileError: no peft folder, or a damaged one. CheckpointError: not a plain LoRA (DoRA, another method,
        an initialisation that rewrites the base), or tensors that do not fit. SiteError: a place that does not exist
        here, or where peft's result would not be ours.
    """
    read = read_folder(Path(folder))
    saved, file = read.saved, read.file
    own = model.state_dict()
    unfit = [f"{k} {tuple(t.shape)}" for k, t in saved.items() if k not in own or own[k].shape != t.shape]
    if unfit:
        raise CheckpointError(f"{file}: modules saved whole do not fit the model: {', '.join(unfit[:5])}")
    sites = _match_sites(model, read)
    fitted = {path: _fit(entry, sites[path]) for path, entry in read.entries.items()}
    options = {p: dict(rank=e.down.shape[0], alpha=_alpha(e, read.rslora)) for p, e in fitted.items()}
    attached = attach(model, _attach_config(sites, options, read), name=name)
    assert isinstance(attached, Attached)
    try:
        for placed in attached.placed:
            _check_peft_site(placed.site)
            _load(placed, fitted[placed.site.path])
    except BaseException:
        attached.detach()
        raise
    model.load_state_dict(saved, strict=False)
    for key, parameter in model.named_parameters():
        if key in saved:
            parameter.requires_grad_(True)
    return attached


def _lora_set(model: nn.Module, name: str) -> Attached:
    known = attachments(model)
    if name not in known:
        raise UnknownNameError(f"no adapter called {name!r} is attached; {nearest(name, known)}")
    attached = known[name]
    if not isinstance(attached, Attached) or any(type(p.adapter) is not LoRA for p in attached.placed):
        raise SiteError(f"{name!r} is {attached.config['type']}; peft's file format is written here for LoRA only")
    if attached.merged:
        raise SiteError(f"adapter {name!r} is merged; unmerge it before exporting")
    return attached


def _check_peft_site(site: Site) -> None:
    """Refuse a place where peft computes something else than a LoRA of this weight."""
    kind, where = type(site.module).__name__, repr(site.path)
    if site.mode == "weight":
        raise SiteError(
            f"{where} ({kind}) is read but never called by its parent; peft's LoRA there does nothing until merged"
        )
    if site.mode == "mha":
        raise SiteError(
            f"{where}: peft adapts nn.MultiheadAttention only as input and output projection together, by merging"
        )
    if isinstance(site.module, nn.Linear) or ConvGeometry.fits(site.module):
        return
    groups = getattr(site.module, "groups", 1)
    why = (
        f"{groups} groups, which peft cannot merge"
        if groups != 1
        else "a forward of its own, which peft's branch would not follow"
    )
    raise SiteError(f"{where} ({kind}) has {why}")


def _whole_factors(placed: Placed) -> tuple[Tensor, Tensor, float]:
    """A, B and the scale of the one LoRA over the whole weight, in peft's shapes."""
    site, adapter = placed
    assert isinstance(adapter, LoRA)
    down, up = _raw(adapter)
    rank, size = up.shape[1], site.weight_shape[0]
    blocks = up.split([part.width for part in site.parts], 0)
    whole = torch.cat([stack_rows([b], [p], size, 0) for b, p in zip(blocks, site.parts, strict=True)], 1)
    assert whole.shape[1] == rank * len(site.parts)
    shape = site.weight_shape[1:]  # (I,) or (C_in, *kernel)
    ones = (1,) * (len(shape) - 1)
    return down.detach().reshape(-1, *shape), whole.detach().reshape(*whole.shape, *ones), adapter.scale


def _raw(adapter: LoRA) -> Factors:
    """Factors without the scale; with PiSSA's start point subtracted, which doubles the rank."""
    if "down_start" not in adapter._buffers:
        return Factors(adapter.down, adapter.up)
    return Factors(adapter.factors().down, torch.cat([adapter.up, -adapter.up_start], 1))  # type: ignore[operator]


def _saved_modules(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """State of every base module that trains, by path."""
    paths = [path for path, _ in model.named_modules()]
    saved: dict[str, dict[str, Tensor]] = {}
    for path, module in model.named_modules():
        if "adapters" in path.split(".") or path.startswith("adapter_banks"):
            continue
        trained = [n for n, p in module._parameters.items() if p is not None and p.requires_grad]
        if not trained:
            continue
        meant = [other for other in paths if other.endswith(path)]
        if not path or module._modules or len(meant) > 1:
            why = "is no layer of its own" if not path or module._modules else f"would also mean {meant[:3]} to peft"
            raise CheckpointError(
                f"{path or 'the model'} trains ({', '.join(trained)}), but {why}, so modules_to_save cannot hold it"
            )
        saved[path] = {key: tensor.detach() for key, tensor in module.state_dict().items()}
    return saved


def _task_classifier(model: nn.Module, attached: Attached) -> dict[str, dict[str, Tensor]]:
    """A task's head under the name of its timm backbone's classifier."""
    backbone, head = split_task(model)
    if head is None or attached.model is not backbone:
        return {}
    name = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier")
    if not isinstance(name, str):
        raise CheckpointError(f"{type(backbone).__name__} names no single classifier that could hold the head")
    return {name: {key: tensor.detach() for key, tensor in plain_linear(head).state_dict().items()}}


def _config(attached: Attached, scales: Mapping[str, tuple[int, float]], saved: list[str]) -> dict[str, Any]:
    rslora = bool(attached.config.get("rslora"))
    alphas = {path: _number(scale * (math.sqrt(rank) if rslora else rank)) for path, (rank, scale) in scales.items()}
    rank = Counter(rank for rank, _ in scales.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    dropouts = {placed.adapter.dropout for placed in attached.placed}
    if len(dropouts) > 1:
        raise SiteError(f"peft has one dropout for all places, this set has {sorted(dropouts)}")  # type: ignore[type-var]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        # peft matches list entries by their end ("proj" is also "patch_embed.proj"), a text as a whole
        "target_modules": "|".join(re.escape(path) for path in scales),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(p)}": r for p, (r, _) in scales.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "lora_dropout": dropouts.pop(),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
    }


def _match_sites(model: nn.Module, read: PeftFolder) -> dict[str, Site]:
    entries, file = read.entries, read.file
    sites = {site.path: site for site in find_sites(model) if site.parts}
    for path, entry in entries.items():
        if path not in sites:
            raise SiteError(f"{file} adapts {path!r}, which {type(model).__name__} has not; {nearest(path, sites)}")
        site = sites[path]
        _check_peft_site(site)
        shape = (entry.up.shape[0], entry.down.shape[1])
        if shape != (site.weight_shape[0], site.flat_in):
            raise CheckpointError(
                f"{file}: the update of {path!r} is {shape}, its weight is {(site.weight_shape[0], site.flat_in)}"
            )
    return {path: sites[path] for path in entries}


def _fit(entry: Entry, site: Site) -> Entry:
    """Rewrite a rank above the weight's own as the full rank: one factor becomes the identity, the product stays."""
    full = min(site.weight_shape[0], site.flat_in)
    if entry.down.shape[0] <= full:
        return entry
    dense = (entry.up.double() @ entry.down.double()).to(entry.up.dtype)
    eye = torch.eye(full, dtype=entry.up.dtype)
    wide = dense.shape[0] > dense.shape[1]
    return Entry(eye if wide else dense, dense if wide else eye, entry.scale)


def _attach_config(
    sites: Mapping[str, Site], options: Mapping[str, dict[str, Any]], read: PeftFolder
) -> dict[str, Any]:
    """A LoRA on exactly these paths, fused weights as one part; a leading dot keeps a path from reading as a role."""
    common = dict(Counter(tuple(o.items()) for o in options.values()).most_common(1)[0][0])
    where = [*sorted({site.role for site in sites.values()}), *(path if "." in path else f".{path}" for path in sites)]
    found: dict[str, Any] = {"type": "LoRA", "where": where, **common}
    found |= {"rslora": True} if read.rslora else {}
    found |= {"dropout": read.dropout} if read.dropout else {}
    per_site = {path: own for path, own in options.items() if own != common}
    return {**found, "per_site": per_site} if per_site else found


def _alpha(entry: Entry, rslora: bool) -> float:
    rank = entry.down.shape[0]
    return _number(entry.scale * (math.sqrt(rank) if rslora else rank))


@torch.no_grad()
def _load(placed: Placed, entry: Entry) -> None:
    site, adapter = placed
    assert isinstance(adapter, LoRA)
    parts: tuple[Part, ...] = site.parts
    adapter.down.copy_(entry.down)
    adapter.up.copy_(torch.cat([take_rows(entry.up, part, 0) for part in parts]))


def _number(value: float) -> float:
    """Without the rounding of scale * rank: alphas are short numbers."""
    short = float(f"{value:.12g}")
    return int(short) if short == int(short) else short
