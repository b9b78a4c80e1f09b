"""What is compared: named adapter configs with the learning rates to try, from a config or from the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config

from zoo.errors import OptionError, UnknownNameError, nearest
from zoo.registry import ADAPTERS

_ENTRY = ("adapter", "lr")


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    name: what its rows are called. adapter: config for `attach`; None trains the whole model without attaching.
    rates: learning rates to try on the first seed; the one with the best validation result is used.
    """

    name: str
    adapter: dict[str, Any] | None
    rates: tuple[float, ...]


def methods_of(
    config: Config, specs: Sequence[str] | None = None, rates: Sequence[float] | None = None
) -> list[Method]:
    """The methods to compare.

    Args:
        config: its `methods=dict(NAME=dict(adapter=..., lr=RATE or [RATES]))` are the named entries.
        specs: `NAME` or `NAME:option=value,...`, where NAME is an entry or a registered adapter, the options are set in
            its adapter config, and `lr=RATE` or `lr=[RATES]` chooses rates. By default every entry.
        rates: rates to try where a spec has no `lr`; else the entry's, else the config's own.

    Raises:
        UnknownNameError: no such entry or adapter. OptionError: a malformed spec, entry or rate, or a name twice.
    """
    entries = {str(k): dict(v) for k, v in (config.get("methods") or {}).items()}
    for name, entry in entries.items():
        for key in entry:
            if key not in _ENTRY:
                raise OptionError(f"methods[{name!r}] has no {key!r}; {nearest(key, _ENTRY)}")
    specs = list(entries) if specs is None else list(specs)
    if not specs:
        raise OptionError("nothing to compare: give --methods, or `methods=dict(...)` in the config")
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice is not None:
        raise OptionError(f"the method {twice!r} is named twice")
    usual = config.get("optim_wrapper", {}).get("optimizer", {}).get("lr")
    return [_method(spec, entries, rates, usual) for spec in specs]


def _method(spec: str, entries: Mapping[str, dict[str, Any]], rates: Sequence[float] | None, usual: Any) -> Method:
    name, _, text = spec.partition(":")
    if name in entries:
        entry = entries[name]
    elif name in ADAPTERS.names():
        entry = {"adapter": name}
    else:
        raise UnknownNameError(f"no method is called {name!r}; {nearest(name, [*entries, *ADAPTERS.names()])}")
    adapter = entry.get("adapter")
    adapter = {"type": adapter} if isinstance(adapter, str) else adapter and dict(adapter)
    options = _options(text, spec)
    own = options.pop("lr", None)
    if options and adapter is None:
        raise OptionError(f"{spec!r}: {name} attaches nothing, so it takes no options")
    if own is None:
        own = rates if rates is not None else entry.get("lr", usual)
    return Method(spec, {**adapter, **options} if adapter else None, _rates(own, spec))


def _options(text: str, spec: str) -> dict[str, Any]:
    """`rank=4,where=['conv','qkv']` as a dict; a comma starts an option only where `name=` follows it."""
    found: dict[str, Any] = {}
    for part in re.split(r",(?=\w+=)", text) if text else ():
        key, sign, value = part.partition("=")
        if not sign or not key.isidentifier():
            raise OptionError(f"{spec!r}: expected NAME:option=value,option=value, got {part!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value  # a word, such as init=pissa
    return found


def _rates(value: Any, spec: str) -> tuple[float, ...]:
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    good = all(isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0 for rate in listed)
    if not listed or not good:
        raise OptionError(f"{spec!r}: lr must be one or several numbers above 0, got {value!r}")
    return tuple(float(rate) for rate in listed)
