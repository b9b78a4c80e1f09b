"""Attach adapters to any model, switch between them, fold them into the weights, take them off again."""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.attached import (
    RECORD,
    Attached,
    Placed,
    Selected,
    active_adapters,
    remember,
    set_active,
    settle_attention,
)
from zoo.adapters.base import Adapter, Site, link_bank
from zoo.adapters.probe import correct_modes
from zoo.adapters.selection import Selection
from zoo.adapters.sites import find_sites, select
from zoo.errors import OptionError, SiteError, UnknownNameError, nearest
from zoo.registry import ADAPTERS


def attach(
    model: nn.Module,
    adapter: str | Mapping[str, Any],
    *,
    name: str = "default",
    where: str | Sequence[str] | None = None,
    per_site: Mapping[str, Mapping[str, Any] | None] | None = None,
    freeze: bool = True,
    example: Tensor | None = None,
) -> Attached | Selected:
    """Attach an adapter (or a selection such as BitFit) to a model in place.

    Args:
        model: any module; timm, open_clip and the zoo's own families have roles, others offer `linear`, `conv`, `norm`.
        adapter: a registered name or `dict(type=..., where=..., per_site=..., **options)`.
        name: key of this set; several sets can share a model.
        where: roles, path globs and depth terms (docs/architecture.md); by default the method's usual places.
        per_site: options that differ by place, `{glob or role: dict(rank=4)}`; later entries win, None leaves out.
        freeze: stop training everything but adapters. Trainable flags come back on `detach`.
        example: an input (B, C, H, W) for the check that every site is reached; found by itself for timm and open_clip.

    Returns:
        `Attached`, or what the selection returns.

    Raises:
        UnknownNameError, OptionError: no such adapter or option. SiteError: no fitting site, an unfit pair, or a site
        whose weight is never used in a forward.
    """
    options: dict[str, Any] = {"type": adapter} if isinstance(adapter, str) else dict(adapter)
    where = options.pop("where", None) if where is None else where
    per_site = options.pop("per_site", None) if per_site is None else per_site
    method = ADAPTERS.get(_take_type(options))
    _check_name(model, name)
    config = {"type": method.__name__, **options, **_given(where=where, per_site=per_site)}
    if issubclass(method, Selection):
        check_options(method, options)
        return _select(model, method, options, name, config)
    offered = find_sites(model)
    sites = select(offered, where, _usual_roles(method, offered, where), model_name=type(model).__name__)
    sites = correct_modes(sites, model, example)
    _check_fit(method, sites)
    placed, bank = _build(method, sites, options, per_site or {})
    new = [bank, *(item.adapter for item in placed)]
    if not any(p.requires_grad for module in new if module is not None for p in module.parameters()):
        raise SiteError(
            f"{method.__name__} would train nothing on {type(model).__name__}: it has no trainable tensor there"
        )
    attached = Attached(model, name, config, placed, bank)
    remember(model, attached)
    if freeze:
        _freeze_base(model)
    attached.add_to_tree()
    return attached


def attach_all(model: nn.Module, adapters: str | Mapping[str, Any] | Sequence[Any]) -> list[Attached | Selected]:
    """Attach one adapter config or several (each may carry its own `name`; the first is else called "default")."""
    several = [adapters] if isinstance(adapters, (str, Mapping)) else list(adapters)
    done = []
    for number, one in enumerate(several):
        options: dict[str, Any] = {"type": one} if isinstance(one, str) else dict(one)
        name = options.pop("name", f"{options.get('type')}_{number}".lower() if number else "default")
        done.append(attach(model, options, name=name, freeze=number == 0))  # again would freeze selections made before
    return done


def attachments(model: nn.Module) -> dict[str, Attached | Selected]:
    """Everything attached to the model or to a part of it, by name (a part's path in front if names repeat)."""
    found: dict[str, Attached | Selected] = {}
    for path, module in model.named_modules():
        for name, attached in module.__dict__.get(RECORD, {}).items():
            found[name if name not in found else f"{path}:{name}"] = attached
    return found


def merge(model: nn.Module, *names: str) -> None:
    """Fold the named adapter sets (by default all) into the weights; the model is then plain."""
    for attached in _named(model, names):
        attached.merge()


def unmerge(model: nn.Module, *names: str) -> None:
    """Undo `merge`, latest first."""
    for attached in reversed([a for a in _named(model, names) if names or a.merged]):
        attached.unmerge()


def detach(model: nn.Module, *names: str) -> None:
    """Take the named adapter sets (by default all) off the model."""
    for attached in reversed(_named(model, names)):
        attached.detach()


def activate(model: nn.Module, *names: str) -> None:
    """Let exactly the named adapter sets run, in this order; none for the plain base model."""
    chosen = _named(model, names) if names else []
    merged = [a.name for a in attachments(model).values() if a.merged]
    if merged:
        raise SiteError(f"adapter {merged[0]!r} is merged into the weights; unmerge it before choosing what runs")
    for module in model.modules():
        if "_host" in module.__dict__:
            sets = [a for a in chosen if isinstance(a, Attached)]
            set_active(module, [p.adapter for a in sets for p in a.placed if p.site.module is module])
    for part in model.modules():
        if RECORD in part.__dict__:
            settle_attention(part)


@contextlib.contextmanager
def using(model: nn.Module, *names: str) -> Iterator[nn.Module]:
    """Within the block exactly the named adapter sets run; `using(model)` gives the plain base model."""
    before = {module: active_adapters(module) for module in model.modules() if "_host" in module.__dict__}
    activate(model, *names)
    try:
        yield model
    finally:
        for module, active in before.items():
            set_active(module, list(active))
        for part in model.modules():
            if RECORD in part.__dict__:
                settle_attention(part)


def check_options(method: type, options: Mapping[str, Any]) -> None:
    """Raise `OptionError` for an option the method does not take."""
    function = method.names if issubclass(method, Selection) else method.__init__
    known = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != "bank"
    ]
    for option in options:
        if option not in known:
            raise OptionError(f"{method.__name__} takes no option {option!r}; {nearest(option, known)}")


def _build(
    method: type[Adapter],
    sites: Sequence[Site],
    options: Mapping[str, Any],
    per_site: Mapping[str, Mapping[str, Any] | None],
) -> tuple[list[Placed], nn.Module | None]:
    check_options(method, options)
    for pattern, extra in per_site.items():
        if not any(_applies(pattern, site) for site in sites):
            raise SiteError(
                f"per_site names {pattern!r}, which fits no chosen site; for example {sites[0].path!r} is one"
            )
        check_options(method, extra or {})
    chosen: list[tuple[Site, dict[str, Any]]] = []
    for site in sites:
        merged: dict[str, Any] | None = dict(options)
        for pattern, extra in per_site.items():
            if _applies(pattern, site):
                merged = None if extra is None else {**(merged or options), **extra}
        if merged is not None:
            chosen.append((site, merged))
    if not chosen:
        raise SiteError(f"per_site leaves no site for {method.__name__}")
    bank = method.bank([site for site, _ in chosen], **options)
    shared = {} if bank is None else {"bank": bank}
    placed = []
    for site, own in chosen:
        adapter = method(site, **own, **shared)
        link_bank(adapter, bank)
        placed.append(Placed(site, _match(adapter, site.module)))
    if bank is not None:
        _match(bank, sites[0].module)
    return placed, bank


def _usual_roles(method: type[Adapter], sites: Sequence[Site], where: str | Sequence[str] | None) -> tuple[str, ...]:
    """Roles taken where none is named: the method's own; on a model without any of them, or below a named path, also
    its fallback (a convolutional network has no q, k, v)."""
    terms = where.split(",") if isinstance(where, str) else where or ()
    named_path = any(sign in term for term in terms for sign in ".*" if not term.strip().startswith("!"))
    offered = {site.role for site in sites} | {part.role for site in sites for part in site.parts}
    if named_path or not offered & set(method.default_roles):
        return (*method.default_roles, *method.fallback_roles)
    return method.default_roles


def _match(adapter: Any, module: nn.Module) -> Any:
    """Put new tensors on the module's device, in its mode; fp32 on half-precision models, float64 on such."""
    adapter.train(module.training)
    reference = next((p for p in module.parameters() if p.is_floating_point()), None)
    if reference is None:
        return adapter
    dtype = torch.float64 if reference.dtype == torch.float64 else None
    return adapter.to(device=reference.device, dtype=dtype)


def _applies(pattern: str, site: Site) -> bool:
    return pattern == site.role or any(p.role == pattern for p in site.parts) or fnmatch.fnmatchcase(site.path, pattern)


def _check_fit(method: type[Adapter], sites: Sequence[Site]) -> None:
    for site in sites:
        roles = {site.role, *(part.role for part in site.parts)}
        if not roles & method.roles:
            raise SiteError(
                f"{method.__name__} cannot sit on {site.path!r}, a {site.role} site ({type(site.module).__name__}); "
                f"it takes {', '.join(sorted(method.roles))}"
            )
        if site.mode == "weight" and not method.mergeable:
            raise SiteError(
                f"{method.__name__} cannot sit on {site.path!r}: {type(site.module).__name__} is never called there "
                "(its parent reads the weight), so only adapters that change the weight fit, such as LoRA"
            )
        held = site.module._modules.get("adapters")
        if held is not None and "_host" not in site.module.__dict__:
            raise SiteError(f"{site.path!r} ({type(site.module).__name__}) has a child called `adapters` of its own")
        if isinstance(site.module, nn.MultiheadAttention) and not site.module._qkv_same_embed_dim:
            raise SiteError(f"{site.path!r}: nn.MultiheadAttention with kdim or vdim of its own cannot be adapted")
    paths = [site.path for site in sites]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise SiteError(f"{twice[0]!r} was chosen in two roles at once; attach under two names instead")


def _take_type(options: dict[str, Any]) -> str:
    if "type" not in options:
        raise OptionError(f"the adapter config {options!r} has no `type`; one of {sorted(ADAPTERS.names())}")
    return str(options.pop("type"))


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _check_name(model: nn.Module, name: str) -> None:
    if not name.isidentifier():
        raise OptionError(f"an adapter name must be an identifier (letters, digits, _), got {name!r}")
    if name in model.__dict__.get(RECORD, {}):
        raise OptionError(f"an adapter called {name!r} is attached already; choose another name= or detach it")


def _named(model: nn.Module, names: Sequence[str]) -> list[Any]:
    known = attachments(model)
    for name in names:
        if name not in known:
            raise UnknownNameError(f"no adapter called {name!r} is attached; {nearest(name, known)}")
    chosen = [known[name] for name in names] if names else list(known.values())
    if not chosen:
        raise SiteError(f"{type(model).__name__} has no adapter attached")
    return chosen


def _select(
    model: nn.Module, method: type[Selection], options: dict[str, Any], name: str, config: dict[str, Any]
) -> Selected:
    chosen = method.names(model, **options)
    if not chosen and not method.may_be_empty:
        raise SiteError(f"{method.__name__} would train nothing on {type(model).__name__}")
    selected = Selected(model, name, config, chosen)
    remember(model, selected)
    _freeze_base(model)
    for parameter in selected.parameters():
        parameter.requires_grad_(True)
    return selected


def _freeze_base(model: nn.Module) -> None:
    kept = {id(p) for attached in attachments(model).values() for p in attached.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
