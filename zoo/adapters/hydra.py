"""Hydra: a low-rank branch on a layer's input and another on its output.

Source: Kim et al. 2023, "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", arXiv 2309.06922,
and the released code for biases, scale and dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Part, Site, stack_rows, take_rows
from zoo.adapters.lora import usable_rank
from zoo.adapters.low_rank import ConvGeometry
from zoo.errors import OptionError, SiteError, nearest
from zoo.registry import ADAPTERS

Init = Literal["xavier", "kaiming"]


@ADAPTERS.register_module()
class Hydra(Adapter):
    """Parallel and sequential low-rank branches around a linear layer or convolution (Hydra 2023).

    y0 = W0 x + b0;  y = y0 + s * up_p(drop(down_p x)) + s * up_s(drop(down_s y0)), nothing non-linear, hence mergeable:
    W = W0 + s (U_p D_p + U_s D_s W0), b = b0 + s (U_s D_s b0 + biases). On a fused weight each chosen part is a layer
    of its own. In a convolution down_p has the layer's kernel, the three others are 1x1.

    Parameters a part of width O: k(I + O) + k + O parallel, k(O + O) + k + O sequential; without `bias` only k times
    the bracket.

    Args:
        site: a linear layer `(..., I) -> (..., O)` or a stock ungrouped convolution `(B, I, *space)`.
        rank: k of the parallel branch; lowered to the weight's own full rank where that is smaller.
        seq_rank: k of the sequential branch, by default `rank`.
        scale: s of both branches (the released VTAB recipes use 0.1 to 4.5).
        bias: biases in all four projections; the released language models have none.
        dropout: on the k hidden numbers while training.
        init: of the down weights, "xavier" (released for VTAB) or "kaiming" (ELEVATER and language); all else is zero.

    Raises:
        OptionError: an option out of range.
        SiteError: the layer is bypassed (only its weight is read), or is a grouped or non-stock convolution.
    """

    roles: ClassVar[frozenset[str]] = frozenset(
        {"q", "k", "v", "qkv", "kv", "qk", "out", "fc1", "fc2", "conv", "linear", "embed", "head"}
    )
    default_roles: ClassVar[tuple[str, ...]] = ("out", "fc2")
    mergeable: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 2,
        seq_rank: int | None = None,
        scale: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
        init: Init = "xavier",
    ) -> None:
        super().__init__(site)
        _check_site(site)
        if not math.isfinite(scale) or scale == 0.0:
            raise OptionError(f"scale must be a finite number other than 0, got {scale!r}")
        if not 0 <= dropout < 1:
            raise OptionError(f"dropout must lie in [0, 1), got {dropout!r}")
        if init not in get_args(Init):
            raise OptionError(f"init {init!r} is unknown; {nearest(str(init), get_args(Init))}")
        self.scale = scale
        self.bias = bias
        conv = ConvGeometry(site.module) if ConvGeometry.fits(site.module) else None  # type: ignore[arg-type]
        self.dims = 0 if conv is None else len(conv.kernel)
        k = usable_rank(rank, site)
        k_seq = usable_rank(rank if seq_rank is None else seq_rank, site)
        common = (bias, dropout, init, self.dims)
        self.parallel = nn.ModuleList(_Head(site.flat_in, p.width, k, *common, conv) for p in site.parts)
        self.sequential = nn.ModuleList(_Head(p.width, p.width, k_seq, *common, None) for p in site.parts)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., I) or (B, I, *space); y: the site's output, from which the sequential branch reads."""
        dim = 1 if self.dims else y.dim() - 1
        blocks = [parallel(x) + sequential(take_rows(y, part, dim)) for part, parallel, sequential in self._heads()]
        return y + self.scale * stack_rows(blocks, self.parts, y.shape[dim], dim)

    def delta(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1).to(self._wide(weight))
        blocks = [
            parallel.matrix() + sequential.matrix().to(flat.dtype) @ take_rows(flat, part, 0)
            for part, parallel, sequential in self._heads()
        ]
        update = self.scale * stack_rows(blocks, self.parts, weight.shape[0], 0)
        return update.to(weight.dtype).reshape(weight.shape)

    def rebias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """b0 passes through the sequential branch too; a layer without bias gets one if the branches have biases."""
        if bias is None and not self.bias:
            return None
        start = weight.new_zeros(weight.shape[0]) if bias is None else bias
        wide = start.to(self._wide(weight))
        blocks = [
            parallel.shift(wide.new_zeros(parallel.down.in_features)) + sequential.shift(take_rows(wide, part, 0))
            for part, parallel, sequential in self._heads()
        ]
        update = self.scale * stack_rows(blocks, self.parts, weight.shape[0], 0)
        return start + update.to(start.dtype)

    def _wide(self, weight: Tensor) -> torch.dtype:
        """Precision of the merge: the wider of the weight's and the branches'."""
        return torch.promote_types(weight.dtype, self.dtype() or weight.dtype)

    def _heads(self) -> Iterator[tuple[Part, _Head, _Head]]:
        return zip(self.parts, self.parallel, self.sequential, strict=True)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, parts={[p.role for p in self.parts]}"


class _Head(nn.Module):
    """One branch, inputs -> rank -> outputs, as linear layers (dims 0) or convolutions over `dims` axes.

    `conv` is the geometry of the down projection, None for a 1x1 kernel. `up` starts at zero.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        bias: bool,
        dropout: float,
        init: Init,
        dims: int,
        conv: ConvGeometry | None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.dims = dims
        self.conv = conv
        self.down = nn.Linear(inputs, rank, bias)
        self.up = nn.Linear(rank, outputs, bias)
        for tensor in (self.up.weight, self.up.bias, self.down.bias):
            if tensor is not None:
                nn.init.zeros_(tensor)
        if init == "xavier":
            nn.init.xavier_uniform_(self.down.weight)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if not self.dims:
            y: Tensor = self.up(F.dropout(self.down(x), self.dropout, self.training))
            return y
        run = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        ones, down, up = (1,) * self.dims, self.down.weight, self.up.weight
        if self.conv is None:
            z = run(x, down.reshape(*down.shape, *ones), self.down.bias)
        else:
            kernel = down.reshape(down.shape[0], x.shape[1], *self.conv.kernel)
            z = run(x, kernel, self.down.bias, self.conv.stride, self.conv.padding, self.conv.dilation)
        z = F.dropout(z, self.dropout, self.training)
        return run(z, up.reshape(*up.shape, *ones), self.up.bias)

    def matrix(self) -> Tensor:
        """The branch's weight (outputs, inputs)."""
        return self.up.weight @ self.down.weight

    def shift(self, bias: Tensor) -> Tensor:
        """What the branch adds to the layer's bias; `bias` (inputs,) is that of the branch's own input."""
        for layer in (self.down, self.up):
            own = None if layer.bias is None else layer.bias.to(bias.dtype)
            bias = F.linear(bias, layer.weight.to(bias.dtype), own)
        return bias


def _check_site(site: Site) -> None:
    module, where = site.module, f"{site.path} ({type(site.module).__name__})"
    if site.mode == "weight":
        raise SiteError(
            f"Hydra reads a layer's output, but {where} is never called: its weight is read elsewhere; leave it out, "
            f"e.g. where='!{site.path}'"
        )
    if len(site.weight_shape) > 2 and not ConvGeometry.fits(module):
        raise SiteError(
            f"Hydra mixes the outputs of a layer, which {where} does not allow: it takes torch's own convolutions with "
            "groups=1 and zero padding; leave it out with `where`"
        )
