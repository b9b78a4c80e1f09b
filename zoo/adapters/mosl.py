"""MoSL: the LoRA flavour of MoSA, whose two factors are dealt out to sparse experts.

Source: Zhang et al., "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", arXiv 2312.02923, and the released
code. What an expert is, how it trains and where that differs from the released code is told in `sparse_experts.py`.
"""

from __future__ import annotations

import math
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Factors, Part, Site, assemble
from zoo.adapters.lora import usable_rank
from zoo.adapters.low_rank import branch_linear
from zoo.adapters.sparse_experts import Along, Share, Split, Whole, check_experts, draw
from zoo.errors import OptionError, SiteError, nearest
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class MoSL(Adapter):
    """Low-rank update whose factors are mixtures of sparse experts (MoSA 2024, LoRA form).

    y -> y + scale * B_j A_i x for each projection, i and j drawn anew in every training forward; in use, and merged
    into the weight, both factors are the means of their experts. (The released code feeds the update of the output
    projection the block's input; here it reads what the projection reads.)

    It always runs as a branch: a merge needs the means and a forward in training a draw, also where both meet. Only the
    cross-attention of an nn.MultiheadAttention, whose projections read three inputs, trains the means themselves.

    Parameters a projection: rank * (I + O), however many experts. Buffers: `start` and `owner` of each split factor.

    Args:
        site: a linear layer `(..., I) -> (..., O)`; each chosen part of a fused weight has factors of its own.
        rank: width between the factors; released 16.
        experts: N; 1 is LoRA.
        share: the factor that stays whole: "down" (A, released default), "up" (B) or "none".
        scale: factor of the update; released 1.
        along: rank entries over "all" of a factor (released), or within each "row" or "column".

    Raises:
        OptionError: an option out of range, or more experts than entries.
        SiteError: the weight is no matrix, or the layer is bypassed (only its weight is read).
    """

    roles: ClassVar[frozenset[str]] = frozenset({"q", "k", "v", "qkv", "kv", "qk", "out", "fc1", "fc2", "linear"})
    default_roles: ClassVar[tuple[str, ...]] = ("q", "v")
    mergeable: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 16,
        experts: int = 4,
        share: Share = "down",
        scale: float = 1.0,
        along: Along = "all",
    ) -> None:
        super().__init__(site)
        _check(site)
        check_experts(experts, share)
        if along not in get_args(Along):
            raise OptionError(f"along {along!r} is unknown; {nearest(str(along), get_args(Along))}")
        if not math.isfinite(scale) or scale == 0.0:
            raise OptionError(f"scale must be a finite number other than 0, got {scale!r} (released: 1)")
        rank = usable_rank(rank, site)
        self.rank, self.scale = rank, scale

        def factor(start: Tensor, half: Share) -> nn.Module:
            return Whole(start) if half == share or experts == 1 else Split(start, experts, along)

        self.down = nn.ModuleDict({part.role: factor(_start_down(rank, site), "down") for part in site.parts})
        self.up = nn.ModuleDict({part.role: factor(_start_up(part, rank), "up") for part in site.parts})

    def factors(self) -> Factors:
        """What this forward uses: drawn experts while training, the means otherwise."""
        return self._joined(stochastic=self.training)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return branch_linear(x, y, self.factors(), self.parts)

    def delta(self, weight: Tensor) -> Tensor:
        """The update that is merged: always of the means."""
        update = assemble(self._joined(stochastic=False), self.parts, weight.shape[0])
        return update.to(weight.dtype)

    def _joined(self, stochastic: bool) -> Factors:
        downs = [_tensor(self.down[part.role], stochastic) for part in self.parts]
        ups = [_tensor(self.up[part.role], stochastic) for part in self.parts]
        return Factors(torch.cat(downs), torch.cat(ups) * self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, parts={[p.role for p in self.parts]}"


def _tensor(factor: nn.Module, stochastic: bool) -> Tensor:
    if isinstance(factor, Split):
        return factor.expert(draw(factor.experts, factor.value.device)) if stochastic else factor.mean()
    value: Tensor = factor.value  # type: ignore[assignment]
    return value


def _start_down(rank: int, site: Site) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(rank, site.flat_in), a=math.sqrt(5))


def _start_up(part: Part, rank: int) -> Tensor:
    return torch.zeros(part.width, rank)


def _check(site: Site) -> None:
    where = f"{site.path} ({type(site.module).__name__})"
    if len(site.weight_shape) != 2:
        raise SiteError(f"MoSL adapts matrices, but the weight of {where} is {tuple(site.weight_shape)}")
    if site.mode == "weight":
        raise SiteError(
            f"MoSL draws experts in the layer's forward, but {where} is never called: its weight is read elsewhere; "
            f"leave it out, e.g. where='!{site.path}'"
        )
