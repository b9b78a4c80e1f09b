"""Put plug-in attention into a model that exists already, pretrained weights and all.

Two kinds. *Replace*: a module with `from_attention(attn, *, grid_size, num_prefix_tokens, **options)` takes the place
of an attention module and keeps its q, k, v and output weights under their keys. *Insert*: an adapter that acts after
a block or stage (its keys are an adapter's).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from zoo.adapters.base import Adapter, Site
from zoo.adapters.inject import attach
from zoo.adapters.sites import find_sites, select
from zoo.errors import OptionError, SiteError, nearest
from zoo.registry import ATTENTION


def plug_attention(
    model: nn.Module, attention: str | Mapping[str, Any], *, where: str | Sequence[str] | None = None
) -> list[str]:
    """Replace the attention of the chosen places, or insert attention after them; returns their paths.

    Args:
        attention: a registered name or `dict(type=..., where=..., **options)`.
        where: as for adapters (docs/architecture.md); by default every attention module, or for insert
            kinds the method's usual places.

    Raises:
        UnknownNameError, OptionError: no such attention or option. SiteError: no attention there, a model without a
        token grid, or an attention that the plug-in cannot take over, with the reason.
    """
    options = {"type": attention} if isinstance(attention, str) else dict(attention)
    if "type" not in options:
        raise OptionError(f"the attention config {options!r} has no `type`; one of {sorted(ATTENTION.names())}")
    where = options.pop("where", None) if where is None else where
    name = str(options.pop("type"))
    method = ATTENTION.get(name)
    if issubclass(method, Adapter):
        inserted = attach(model, {"type": name, **options}, name=f"attention_{name.lower()}", where=where, freeze=False)
        return [row["path"] for row in inserted.table()]
    _check_options(method, options)
    sites = select(find_sites(model), where, ("attn",), model_name=type(model).__name__)
    built = [(site.path, _replacement(method, model, site, options)) for site in sites]  # all or nothing
    for path, module in built:
        model.set_submodule(path, module)
    return [path for path, _ in built]


def token_grid(model: nn.Module) -> tuple[int, int]:
    """(H, W) of a plain transformer's patch tokens; raises `SiteError` for models without one fixed grid."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) or getattr(model, "grid_size", None)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise SiteError(
            f"{type(model).__name__} has no patch_embed.grid_size, so the token grid is unknown; "
            "replacing attention works on plain vision transformers, inserting works on others too"
        )
    return int(grid[0]), int(grid[1])


def set_token_grid(model: nn.Module, grid_size: tuple[int, int]) -> None:
    """Tell every plugged-in attention that the token grid is now H x W (after a change of the input size)."""
    for module in model.modules():
        if type(module) in ATTENTION.module_dict.values():
            plugged: Any = module
            if hasattr(plugged, "set_grid_size"):
                plugged.set_grid_size(grid_size)
            elif hasattr(plugged, "grid_size"):
                plugged.grid_size = grid_size


def _replacement(method: Any, model: nn.Module, site: Site, options: Mapping[str, Any]) -> nn.Module:
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    try:
        replaced: nn.Module = method.from_attention(
            site.module, grid_size=token_grid(model), num_prefix_tokens=prefix, **options
        )
    except (TypeError, ValueError) as error:
        kind = type(site.module).__name__
        raise SiteError(f"{method.__name__} cannot replace {site.path} ({kind}): {error}") from error
    for parameter in replaced.parameters():
        parameter.requires_grad_(True)
    return replaced


def _check_options(method: Any, options: Mapping[str, Any]) -> None:
    given = inspect.signature(method.from_attention).parameters.values()
    known = [p.name for p in given if p.kind is p.KEYWORD_ONLY and p.name not in ("grid_size", "num_prefix_tokens")]
    for option in options:
        if option not in known:
            raise OptionError(f"{method.__name__} takes no option {option!r}; {nearest(option, known)}")
