"""Block-LoRA: a LoRA whose blocks along the rank share one down-projection.

Source: Zhou et al. 2025, "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot
Learning", arXiv 2501.16720. No code is released; the reading here follows from what the paper states (all down blocks
are shared, products become sums, fewer parameters). Scaling, initial values and dropout are those of its base recipe,
CLIP-LoRA: Zanella and Ben Ayed 2024, "Low-Rank Few-Shot Adaptation of Vision-Language Models", arXiv 2405.18541.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Factors, Site
from zoo.adapters.lora import usable_rank
from zoo.adapters.low_rank import ConvGeometry, branch_conv, branch_linear
from zoo.errors import OptionError, SiteError, nearest
from zoo.registry import ADAPTERS

ScaleRank = Literal["nominal", "block"]


@ADAPTERS.register_module()
class BlockLoRA(Adapter):
    """Low-rank update (B_1 + ... + B_n) A with one shared A of rank r / n (Block-LoRA 2025).

    A LoRA of rank r whose A is n equal blocks stacked: y = W x + b + s * sum_i B_i A x. The update's true rank is at
    most r / n. Without `block_dropout` all B_i get the same gradient, so they stay equal up to their scale in the sum.

    Parameters: `down` (P*r/n, I), `up` (n, sum of part widths, r/n); count P*I*r/n + O*r for full parts.

    Args:
        site: a linear layer or convolution; each of the chosen parts of a fused weight has factors of its own.
        rank: r, a multiple of `blocks`. Where r / n exceeds the weight's own full rank, r / n is lowered to that.
        blocks: n; 1 is CLIP-LoRA.
        alpha: numerator of the scale.
        rslora: scale alpha / sqrt(rank), as in CLIP-LoRA; otherwise alpha / rank.
        scale_rank: which rank that is: the "nominal" r, or the "block" rank r / n (the paper does not say).
        dropout: probability of zeroing an input of A while training; CLIP-LoRA trains with 0.25.
        block_dropout: draw a dropout mask for every block, so that the blocks become different.

    Raises:
        OptionError: an option out of range, `rank` not a multiple of `blocks`, `block_dropout` without dropout.
        SiteError: dropout on a site that can only be adapted through its weight.
    """

    roles: ClassVar[frozenset[str]] = frozenset(
        {"q", "k", "v", "qkv", "kv", "qk", "out", "fc1", "fc2", "conv", "linear", "embed", "head"}
    )
    default_roles: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    mergeable: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 2,
        blocks: int = 2,
        alpha: float = 1.0,
        rslora: bool = True,
        scale_rank: ScaleRank = "nominal",
        dropout: float = 0.0,
        block_dropout: bool = False,
    ) -> None:
        super().__init__(site)
        _check(rank, blocks, scale_rank, dropout, block_dropout)
        divisor = rank if scale_rank == "nominal" else rank // blocks
        self.scale = alpha / (math.sqrt(divisor) if rslora else divisor)
        self.rank = usable_rank(rank // blocks, site)
        self.dropout = dropout
        self.block_dropout = block_dropout
        width = sum(part.width for part in site.parts)
        self.down = nn.Parameter(torch.empty(len(site.parts) * self.rank, site.flat_in))
        self.up = nn.Parameter(torch.zeros(blocks, width, self.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self._choose_form(site)

    def _choose_form(self, site: Site) -> None:
        called = site.mode != "weight"
        self.conv = ConvGeometry(site.module) if called and ConvGeometry.fits(site.module) else None  # type: ignore[arg-type]
        if self.conv is not None:
            self.form = "branch"
        elif not called or len(site.weight_shape) > 2:
            self.form = "weight"
        else:
            self.form = "branch" if self.dropout else "low_rank"
        if self.dropout and self.form == "weight":
            raise SiteError(
                f"BlockLoRA dropout needs a branch, but {site.path} ({type(site.module).__name__}) can only be adapted "
                "through its weight; use dropout=0, or leave the site out"
            )

    def factors(self) -> Factors:
        """(A, s * sum of the B_i): the blocks are added as weights, before the one up product."""
        return Factors(self.down, self.up.sum(0) * self.scale)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., I) or (B, C, *space); y: the site's output."""
        if not (self.block_dropout and self.training):
            return self._branch(F.dropout(x, self.dropout, self.training), y, self.factors())
        for up in self.up:
            y = self._branch(F.dropout(x, self.dropout), y, Factors(self.down, up * self.scale))
        return y

    def _branch(self, x: Tensor, y: Tensor, factors: Factors) -> Tensor:
        if self.conv is not None:
            return branch_conv(x, y, factors, self.parts, self.conv)
        return branch_linear(x, y, factors, self.parts)

    def extra_repr(self) -> str:
        roles = [part.role for part in self.parts]
        return f"block rank={self.rank}, blocks={len(self.up)}, scale={self.scale:g}, parts={roles}"


def _check(rank: int, blocks: int, scale_rank: str, dropout: float, block_dropout: bool) -> None:
    for name, value in (("rank", rank), ("blocks", blocks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}")
    if rank % blocks:
        raise OptionError(f"rank must be a multiple of blocks, got rank={rank} and blocks={blocks}")
    if scale_rank not in get_args(ScaleRank):
        raise OptionError(f"scale_rank {scale_rank!r} is unknown; {nearest(str(scale_rank), get_args(ScaleRank))}")
    if not 0 <= dropout < 1:
        raise OptionError(f"dropout must lie in [0, 1), got {dropout!r}")
    if block_dropout and not dropout:
        raise OptionError("block_dropout draws dropout masks, but dropout is 0; give a dropout, e.g. 0.25")
