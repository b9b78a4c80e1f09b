"""Vision adapter zoo: pretrained backbones, adapters, attention plug-ins and task heads under one API.

    import zoo
    model = zoo.create("vit_base_patch16_224", pretrained=True, num_classes=10, adapter="LoRA")

Importing this package imports no torch; the first use of a function does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "create": "zoo.factory",
    "describe": "zoo.factory",
    "summary": "zoo.factory",
    "list_models": "zoo.listing",
    "list_adapters": "zoo.listing",
    "list_attention": "zoo.listing",
    "list_heads": "zoo.listing",
    "list_backbones": "zoo.listing",
    "attach": "zoo.adapters.inject",
    "detach": "zoo.adapters.inject",
    "merge": "zoo.adapters.inject",
    "unmerge": "zoo.adapters.inject",
    "using": "zoo.adapters.inject",
    "activate": "zoo.adapters.inject",
    "find_sites": "zoo.adapters.sites",
    "fold": "zoo.folding",
    "save": "zoo.checkpoint",
    "load": "zoo.checkpoint",
    "push_to_hub": "zoo.checkpoint",
    "ZooError": "zoo.errors",
}
__all__ = [
    "ZooError",
    "__version__",
    "activate",
    "attach",
    "create",
    "describe",
    "detach",
    "find_sites",
    "fold",
    "list_adapters",
    "list_attention",
    "list_backbones",
    "list_heads",
    "list_models",
    "load",
    "merge",
    "push_to_hub",
    "save",
    "summary",
    "unmerge",
    "using",
]

if TYPE_CHECKING:
    from zoo.adapters.inject import activate, attach, detach, merge, unmerge, using
    from zoo.adapters.sites import find_sites
    from zoo.checkpoint import load, push_to_hub, save
    from zoo.errors import ZooError
    from zoo.factory import create, describe, summary
    from zoo.folding import fold
    from zoo.listing import list_adapters, list_attention, list_backbones, list_heads, list_models


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
