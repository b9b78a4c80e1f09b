"""CoLoRA: low-rank updates whose rank follows each layer's contribution to a task, with tuned biases and norms.

Source: Park, Kim and Chun 2024, "Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image
Restoration", arXiv 2408.01099. The authors released no code: how a convolution becomes a matrix, how a ratio is rounded
to a rank, and the scale of one are read out of the text and its figures. Which rank a layer gets is decided in
`zoo/adapters/contribution.py`.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from zoo.adapters.base import Adapter, Factors, Part, Site, stack_rows
from zoo.adapters.host import bias_name
from zoo.adapters.low_rank import ConvGeometry, branch_conv, branch_linear
from zoo.adapters.site_table import merge_rows
from zoo.errors import OptionError, SiteError
from zoo.registry import ADAPTERS

DELTA = 0.07  # the paper's share of tuned parameters


class Matrix(NamedTuple):
    """A weight as `groups` matrices of `rows` x `columns`: outputs by inputs times kernel area, of one group each."""

    groups: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.groups * self.rows * self.columns

    @property
    def step(self) -> int:
        """Parameters that one rank costs."""
        return self.groups * (self.rows + self.columns)

    def rank(self, delta: float) -> int:
        """The rank at which factors have `delta` of the weight's parameters, to the nearest, at least 1; dense at 1."""
        if delta >= 1:
            return math.ceil(self.size / self.step)
        return max(1, math.floor(delta * self.size / self.step + 0.5))

    def dense(self, rank: int) -> bool:
        """Whether factors of this rank would be no smaller than the weight, which is then tuned itself."""
        return rank * self.step >= self.size

    def tuned(self, rank: int) -> int:
        """Parameters that rank `rank` trains."""
        return self.size if self.dense(rank) else rank * self.step


def matrix_of(site: Site) -> Matrix | None:
    """The weight's matrices; None for the vector of a norm.

    Raises:
        SiteError: no weight there, or a choice among the outputs of a grouped convolution.
    """
    shape = site.weight_shape
    if len(shape) < 2:
        return None
    module, area = site.module, shape[2:].numel()
    groups = module.groups if isinstance(module, _ConvNd) else 1
    if isinstance(module, _ConvTransposeNd):
        return Matrix(groups, shape[1], shape[0] // groups * area)
    rows = sum(part.width for part in site.parts)
    if groups > 1 and rows != shape[0]:
        raise SiteError(f"CoLoRA takes a grouped convolution as a whole: {site.path!r} has {shape[0]} rows, not {rows}")
    return Matrix(groups, rows // groups, shape[1] * area)


def has_bias(site: Site) -> bool:
    """Whether the module holds a bias of its own beside the adapted weight."""
    return site.module._parameters.get(bias_name(site.weight)) is not None


@ADAPTERS.register_module()
class CoLoRA(Adapter):
    """W + s B A with a rank for each layer, biases and norms tuned in full (CoLoRA 2024).

    A linear layer, convolution or transposed convolution gets one pair of factors; a grouped one gets a pair for each
    group, since the groups share no input. A rank whose factors would be no smaller than the weight, as always in a
    depthwise convolution, gives an update of the weight's own shape instead. Norms get such an update for scale and
    shift. All chosen rows of a fused weight are one matrix. `contribution.allocate` makes the config for a model.

    Parameters: `down` (G*r, I) and `up` (O, r), or `update` (the weight's shape), and `shift` (O,).

    Args:
        site: any layer with a weight.
        rank: r; 0 tunes the bias alone.
        delta: in place of `rank`, the share of the weight's parameters that r(d + k) makes up; 0.07 if neither is said.
        bias: also tune the bias, where the layer has one.
        scale: s.

    Raises:
        OptionError: both or impossible rank and delta, nothing left to tune, a scale that is 0 or not finite.
        SiteError: the site has no weight.
    """

    roles: ClassVar[frozenset[str]] = frozenset(
        {"q", "k", "v", "qkv", "kv", "qk", "out", "fc1", "fc2", "conv", "deconv", "linear", "embed", "head", "norm"}
    )
    default_roles: ClassVar[tuple[str, ...]] = (
        *("q", "k", "v", "out", "fc1", "fc2"),
        *("conv", "deconv", "linear", "embed", "norm"),
    )
    mergeable: ClassVar[bool] = True

    down: nn.Parameter | None
    up: nn.Parameter | None
    update: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(
        self,
        site: Site,
        *,
        rank: int | None = None,
        delta: float | None = None,
        bias: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(site)
        if not math.isfinite(scale) or scale == 0.0:
            raise OptionError(f"scale must be a finite number other than 0, got {scale!r}")
        self.scale = scale
        self.matrix = matrix_of(site)
        self.parts = _joined(site)
        self.rank = 0 if self.matrix is None else _rank(self.matrix, rank, delta, site)
        dense = self.matrix is None or (self.rank > 0 and self.matrix.dense(self.rank))
        self.update = nn.Parameter(torch.zeros(site.weight_shape)) if dense else None
        self.down = self.up = None
        if self.matrix is not None and self.rank and not dense:
            groups, rows, columns = self.matrix
            self.down = nn.Parameter(torch.empty(groups * self.rank, columns))
            self.up = nn.Parameter(torch.zeros(groups * rows, self.rank))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        covered = sum(part.width for part in self.parts) or site.out_features
        self.shift = nn.Parameter(torch.zeros(covered)) if bias and has_bias(site) else None
        if self.update is None and self.down is None and self.shift is None:
            raise OptionError(f"CoLoRA with rank 0 tunes nothing at {site.path!r}, which has no bias; leave it out")
        self.transposed = isinstance(site.module, _ConvTransposeNd)
        self._choose_form(site)

    def _choose_form(self, site: Site) -> None:
        branch = site.mode == "branch" and ConvGeometry.fits(site.module)
        self.conv = ConvGeometry(site.module) if branch else None  # type: ignore[arg-type]
        stays = site.mode == "weight" or self.update is not None or (len(site.weight_shape) > 2 and not branch)
        if stays:
            self.form = "weight"
        else:
            self.form = "low_rank" if self.down is not None and self.shift is None and not branch else "branch"

    def factors(self) -> Factors:
        """(A, s B) of an ungrouped layer."""
        assert self.down is not None and self.up is not None
        return Factors(self.down, self.up * self.scale)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., I) or (B, I, *space); y: the site's output."""
        if self.down is not None and self.conv is not None:
            y = branch_conv(x, y, self.factors(), self.parts, self.conv)
        elif self.down is not None:
            y = branch_linear(x, y, self.factors(), self.parts)
        if self.shift is None:
            return y
        dim = y.dim() - 1 if self.conv is None else 1
        moved = stack_rows([self.shift], self.parts, y.shape[dim], 0)
        return y + moved.reshape(-1, *(1,) * (y.dim() - 1 - dim)).to(y.dtype)  # under autocast y is not fp32

    def delta(self, weight: Tensor) -> Tensor:
        """The update in the weight's shape and dtype; of all its groups."""
        if self.update is not None:
            return (self.update * self.scale).to(weight.dtype)
        if self.down is None or self.up is None or self.matrix is None:
            return torch.zeros_like(weight)
        groups, rows, columns = self.matrix
        blocks = self.up.reshape(groups, rows, -1) @ self.down.reshape(groups, -1, columns)
        if self.transposed:  # (G, O, I, *kernel) is stored as (G*I, O, *kernel)
            inputs = weight.shape[0] // groups
            full = blocks.reshape(groups, rows, inputs, *weight.shape[2:]).transpose(1, 2)
        else:
            full = stack_rows([blocks.flatten(0, 1)], self.parts, weight.shape[0], 0)
        return (full.reshape(weight.shape) * self.scale).to(weight.dtype)

    def rebias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if self.shift is None or bias is None:
            return bias
        shift = stack_rows([self.shift], self.parts, bias.shape[0], 0) if self.parts else self.shift
        return bias + shift.to(bias.dtype)

    def extra_repr(self) -> str:
        kind = "full" if self.update is not None else f"rank={self.rank}"
        return f"{kind}, bias={self.shift is not None}, scale={self.scale:g}, matrix={self.matrix}"


def _joined(site: Site) -> tuple[Part, ...]:
    """All chosen rows as one part; none for a transposed convolution, whose weight's rows are inputs."""
    if not site.parts:
        return ()
    rows = merge_rows(row for part in site.parts for row in part.rows)
    return (Part("".join(part.role for part in site.parts), rows),)


def _rank(matrix: Matrix, rank: int | None, delta: float | None, site: Site) -> int:
    if rank is not None and delta is not None:
        raise OptionError(f"rank={rank} and delta={delta} say the same thing; give one of them")
    if rank is None:
        delta = DELTA if delta is None else delta
        if not 0 < delta <= 1:
            raise OptionError(f"delta is a share of the weight's parameters, above 0 and at most 1, got {delta!r}")
        return matrix.rank(delta)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise OptionError(f"rank must be a whole number of at least 0, got {rank!r} (at {site.path}, role {site.role})")
    return rank
