"""What trains and what stays: trainable parameters, freezing, counts, and norms that must not drift."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class Counts(NamedTuple):
    """Numbers of parameters of a model; a parameter shared by several modules counts once."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """Trainable and frozen together."""
        return self.trainable + self.frozen


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for everything that requires a gradient, in `named_parameters()` order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def freeze(module: nn.Module) -> nn.Module:
    """Stop every parameter of `module` from training and put its running-statistics norms in eval mode."""
    module.requires_grad_(False)
    frozen_norms_eval(module)
    return module


def count(model: nn.Module) -> Counts:
    """How many numbers train and how many do not."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return Counts(trainable=sizes[True], frozen=sizes[False])


def frozen_norms_eval(model: nn.Module) -> int:
    """Put the frozen normalisation layers that keep running statistics in eval mode; returns how many.

    In training mode such a layer rewrites its buffers at every forward, so a "frozen" backbone would drift.
    A layer is frozen when one of its own parameters is; a layer without parameters (affine=False) is frozen
    when the nearest module around it that owns parameters has a frozen one.
    """
    frozen = [norm for norm, parents in _norms(model, ()) if _is_frozen(norm, parents)]
    for norm in frozen:
        norm.eval()
    return len(frozen)


def _norms(module: nn.Module, parents: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
    # Asks for the buffers, not for the class: timm, torchvision and our own norms share no base class.
    if getattr(module, "running_mean", None) is not None and getattr(module, "track_running_stats", True):
        yield module, parents
    for child in module.children():
        yield from _norms(child, (module, *parents))


def _is_frozen(norm: nn.Module, parents: tuple[nn.Module, ...]) -> bool:
    for owner in (norm, *parents):
        flags = [p.requires_grad for p in owner.parameters()]
        if flags:
            return not all(flags)
    return False
