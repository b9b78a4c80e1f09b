"""What can be named: models, backbones, adapters, attention, heads. No torch unless timm or open_clip is asked."""

from __future__ import annotations

from typing import Literal

from zoo.catalog import config_files, matching, open_clip_names, own_backbones, timm_names
from zoo.errors import UnknownNameError, nearest
from zoo.registry import ADAPTERS, ATTENTION, HEADS

Source = Literal["zoo", "timm", "open_clip"]


def list_models(pattern: str = "*") -> list[str]:
    """Named models (each is a file under `configs/`) that fit a glob, e.g. `"*lora*"`."""
    return matching(config_files(), pattern)


def list_adapters(pattern: str = "*") -> list[str]:
    """Adapter names that fit a glob; `zoo.describe(name)` tells more."""
    return matching(ADAPTERS.names(), pattern)


def list_attention(pattern: str = "*") -> list[str]:
    """Plug-in attention names that fit a glob."""
    return matching(ATTENTION.names(), pattern)


def list_heads(pattern: str = "*") -> list[str]:
    """Head names that fit a glob."""
    return matching(HEADS.names(), pattern)


def list_backbones(pattern: str = "*", *, source: Source | None = "zoo", pretrained: bool = False) -> list[str]:
    """Backbone names that fit a glob.

    Args:
        source: "zoo" for our own (no import), "timm", "open_clip", or None for all (imports both, some seconds).
        pretrained: only timm's models with weights, listed with their tags.
    """
    if source not in ("zoo", "timm", "open_clip", None):
        raise UnknownNameError(f"no backbone source is called {source!r}; {nearest(str(source), Source.__args__)}")  # type: ignore[attr-defined]
    found: list[str] = []
    if source in ("zoo", None):
        found += matching(own_backbones(), pattern)
    if source in ("timm", None):
        found += [name for name in timm_names(pattern, pretrained=pretrained) if name not in found]
    if source in ("open_clip", None):
        found += open_clip_names(pattern)
    return found
