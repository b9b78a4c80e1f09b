"""SSF: scale and shift the output of every layer, folded into the weights afterwards.

Source: Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", eq. 2 and 4.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site, stack_rows
from zoo.errors import OptionError, SiteError
from zoo.registry import ADAPTERS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)  # a scaled weight is undone there


@ADAPTERS.register_module()
class SSF(Adapter):
    """Scale and shift of every layer's output, mergeable into weight and bias (SSF 2022).

    y -> gamma * y + beta for each output channel, hence W -> gamma W (row by row) and b -> gamma b + beta. On linear
    layers and convolutions it runs on the output, as in the paper; on normalisation layers it runs on their
    own weight and bias, which is the same function and stays so where the layer applies an activation as well.

    Parameters: 2*O a site, O the width of the adapted rows. gamma starts at N(1, std), beta at N(0, std), as released,
    so a fresh SSF moves the output slightly; std=0 starts exactly at the base.

    Args:
        site: a linear layer `(..., I) -> (..., O)`, a convolution `(B, I, *space) -> (B, O, *space)`, or a norm layer.
        std: standard deviation of the initial values; the released 0.02.

    Raises:
        OptionError: `std` is negative or not finite.
        SiteError: the layer is bypassed (only its weight is read, so a shift has nowhere to go), standardises its own
            weight, or is a norm without bias.
    """

    roles: ClassVar[frozenset[str]] = frozenset(
        {"q", "k", "v", "qkv", "kv", "qk", "out", "fc1", "fc2", "conv", "linear", "norm", "embed"}
    )
    default_roles: ClassVar[tuple[str, ...]] = ("q", "k", "v", "out", "fc1", "fc2", "conv", "linear", "norm", "embed")
    mergeable: ClassVar[bool] = True
    identity = False

    def __init__(self, site: Site, *, std: float = 0.02) -> None:
        super().__init__(site)
        if not math.isfinite(std) or std < 0:
            raise OptionError(f"std must be a finite number of at least 0, got {std!r} (the released code uses 0.02)")
        shape = site.weight_shape
        _check(site)
        if len(shape) == 1:
            self.form = "weight"
        self.size = shape[0]
        width = sum(part.width for part in site.parts) or self.size
        self.trailing = len(shape) - 2 if isinstance(site.module, _CONVOLUTIONS) else 0
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        if std:
            nn.init.normal_(self.scale, 1.0, std)
            nn.init.normal_(self.shift, 0.0, std)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        shape = (-1, *(1,) * self.trailing)
        scale, shift = self._rows()
        return y * scale.view(shape) + shift.view(shape)

    def reweight(self, weight: Tensor) -> Tensor:
        scale, _ = self._rows()
        return (weight * scale.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)

    def rebias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        scale, shift = self._rows()
        return shift.to(weight.dtype) if bias is None else (bias * scale + shift).to(bias.dtype)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """gamma and beta for every row of the weight: 1 and 0 in the rows of parts that are not adapted."""
        if self.scale.shape[0] == self.size and len(self.parts) <= 1:
            return self.scale, self.shift
        widths = [part.width for part in self.parts]
        scale = stack_rows((self.scale - 1).split(widths), self.parts, self.size, 0) + 1
        return scale, stack_rows(self.shift.split(widths), self.parts, self.size, 0)


def _check(site: Site) -> None:
    module, where = site.module, f"{site.path} ({type(site.module).__name__})"
    if site.mode == "weight":
        raise SiteError(
            f"SSF shifts a layer's output, but {where} is never called: its weight is read elsewhere; leave it out, "
            f"e.g. where='!{site.path}'"
        )
    if isinstance(module, _STANDARDISED):
        raise SiteError(f"SSF cannot be merged into {where}, which standardises its weight; leave it out with `where`")
    if len(site.weight_shape) == 1 and module._parameters.get("bias") is None:
        raise SiteError(f"SSF shifts a norm's output, but {where} has no bias; leave it out with `where`")
