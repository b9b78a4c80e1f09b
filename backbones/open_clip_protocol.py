"""timm's protocol on open_clip's own modules: an in-place change of class, no wrapper, no new keys.

`change_class(module, kind)` makes the module's class a cached subclass of it and of the mixin `kind`, as adapter hosts
do. The forward, the parameters and their names stay open_clip's; what timm models offer beside them is added.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.errors import OptionError

Indices = int | list[int] | None


class Protocol:
    """Mixin of every changed class; knows the class it stands in for, so that copies and pickles come back."""

    plain: ClassVar[type[nn.Module]]
    kind: ClassVar[type[Protocol]]

    def __reduce_ex__(self, protocol: Any) -> Any:  # dynamic classes cannot be found by name when unpickling
        return _restore, (self.plain, self.kind), dict(self.__dict__)


class Tower(Protocol):
    """What all towers share: the embedding's projection is part of the model, and there is no classifier."""

    num_classes = 0

    def get_classifier(self) -> nn.Module:
        """An identity: heads are put on a tower from outside."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Accepts 0, which is how it is; raises OptionError for anything else."""
        if num_classes or global_pool is not None:
            raise OptionError("a CLIP tower has no classifier and a fixed pooling; put a head of `heads/` on it")

    def _open_clip_way(
        self, x: Tensor, indices: Indices, stop_early: bool, intermediates_only: bool, output_fmt: str, **options: bool
    ) -> Any:
        plain: Any = self.plain
        return plain.forward_intermediates(
            self, x, indices, stop_early, intermediates_only=intermediates_only, output_fmt=output_fmt, **options
        )


def change_class(module: nn.Module, kind: type[Protocol]) -> nn.Module:
    """The same module with the protocol of `kind`."""
    module.__class__ = _changed(type(module), kind)  # type: ignore[arg-type]
    return module


def check_format(output_fmt: str, known: Sequence[str]) -> None:
    """Raise `OptionError` unless `output_fmt` is one of `known`."""
    if output_fmt not in known:
        raise OptionError(f"output_fmt is {' or '.join(known)} here, got {output_fmt!r}")


@functools.cache
def _changed(plain: type[nn.Module], kind: type[Protocol]) -> type[nn.Module]:
    """The subclass of `plain`; it keeps the name and the module, by which adapter sites are recognised."""
    members = {"__module__": plain.__module__, "__doc__": plain.__doc__, "plain": plain, "kind": kind}
    return type(plain.__name__, (kind, plain), members)


def _restore(plain: type[nn.Module], kind: type[Protocol]) -> nn.Module:
    cls = _changed(plain, kind)  # type: ignore[arg-type]
    return cls.__new__(cls)
