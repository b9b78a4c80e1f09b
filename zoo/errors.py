"""Every error the library raises on purpose. Catch `ZooError` for all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """Base of the library's own errors; each also derives from the builtin a caller would expect."""

    def __str__(self) -> str:
        # KeyError shows repr(message), which turns a readable sentence into an escaped one.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class UnknownNameError(ZooError, KeyError):
    """A name (model, adapter, source scheme, package) that is not registered."""


class OptionError(ZooError, TypeError):
    """An option that does not exist, or a value it does not take."""


class HubError(ZooError, OSError):
    """Weights could not be found, fetched, verified or uploaded."""


class OfflineError(HubError):
    """The network is off (or unreachable) and no local copy exists; the text says what to fetch and where to put it."""


class CheckpointError(ZooError, ValueError):
    """Tensors do not fit what was asked of them: keys, shapes, types, base hash."""


class CheckpointFileError(CheckpointError):
    """A weights file that cannot be read, or that must not be read because it would run code."""


class SiteError(ZooError, ValueError):
    """An adapter does not fit the sites of a model."""


def nearest(name: str, choices: Iterable[str], *, shown: int = 3, listed: int = 20) -> str:
    """Return a hint for an unknown `name`: the closest of `choices`, else the choices themselves.

    Matching ignores case. The text starts in lower case, so it can follow a colon or a semicolon.
    """
    by_fold: dict[str, str] = {}
    for choice in choices:
        by_fold.setdefault(choice.casefold(), choice)
    close = difflib.get_close_matches(name.casefold(), by_fold, n=shown)
    if close:
        return "did you mean " + " or ".join(repr(by_fold[fold]) for fold in close) + "?"
    if not by_fold:
        return "nothing is registered"
    known = sorted(by_fold.values())
    more = f" and {len(known) - listed} more" if len(known) > listed else ""
    return "known: " + ", ".join(known[:listed]) + more
