"""LoRA: low-rank adaptation of a weight, y = W x + b + s B A x.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, eq. 3. Variants:
rsLoRA scaling s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732); PiSSA initialisation from the leading
singular vectors (Meng et al., NeurIPS 2024, arXiv 2404.02948).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Factors, Form, Site, take_rows
from zoo.adapters.low_rank import ConvGeometry, branch_conv, branch_linear
from zoo.errors import OptionError, SiteError, nearest
from zoo.registry import ADAPTERS

Init = Literal["kaiming", "gaussian", "both_normal", "pissa"]


@ADAPTERS.register_module()
class LoRA(Adapter):
    """Low-rank update B A of a linear or convolution weight (Hu et al. 2022), by parts on a fused weight.

    On a fused qkv each of the chosen parts gets factors of its own; `where="qkv"` treats the weight as one matrix.
    A convolution's weight is the matrix (C_out, C_in / groups * kernel area), so A is a convolution to r channels and
    B a 1x1 convolution; grouped and depthwise ones share A between groups.

    Parameters: `down` (P*r, I), `up` (sum of part widths, r); count P*r*I + r*O for full parts.

    Args:
        rank: r, at least 1; lowered to the weight's own full rank where that is smaller
            (the scale stays that of the rank asked for).
        alpha: numerator of the scale, by default equal to `rank` (scale 1).
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        dropout: probability of zeroing an input of A while training. Costs speed (two paths), and is refused on
            sites that can only be adapted through their weight.
        init: "kaiming" (A uniform with a = sqrt 5, B zero), "gaussian" (A normal with std 1/r, B zero),
            "both_normal" (A and B truncated normal 0.02: not the identity; LoRAT trains so), "pissa" (A and B
            from the top r singular vectors of W; a frozen copy is subtracted, so W itself stays untouched).

    Raises:
        OptionError: rank, dropout or init out of range. SiteError: dropout on a weight-only site.
    """

    roles = frozenset({"q", "k", "v", "qkv", "kv", "qk", "out", "fc1", "fc2", "conv", "linear", "embed", "head"})
    default_roles = ("q", "k", "v", "out", "fc1", "fc2")
    fallback_roles = ("conv", "linear")
    mergeable = True
    form: Form = "low_rank"

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        init: Init = "kaiming",
    ) -> None:
        super().__init__(site)
        usable = usable_rank(rank, site)
        if not 0 <= dropout < 1:
            raise OptionError(f"LoRA dropout must lie in [0, 1), got {dropout}")
        if init not in get_args(Init):
            raise OptionError(f"LoRA init {init!r} is unknown; {nearest(init, get_args(Init))}")
        self.rank = usable
        self.alpha = float(rank if alpha is None else alpha)
        self.scale = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        self.identity = init != "both_normal"
        width = sum(part.width for part in site.parts)
        self.down = nn.Parameter(torch.empty(len(site.parts) * usable, site.flat_in))
        self.up = nn.Parameter(torch.zeros(width, usable))
        self._choose_form(site)
        self._initialise(site, init)

    def _choose_form(self, site: Site) -> None:
        branch = ConvGeometry.fits(site.module) and site.mode == "branch"
        self.conv = ConvGeometry(site.module) if branch else None  # type: ignore[arg-type]
        if self.conv is not None:
            self.form = "branch"
        elif len(site.weight_shape) > 2 or site.mode == "weight":
            self.form = "weight"
        elif self.dropout:
            self.form = "branch"
        if self.dropout and self.form == "weight":
            raise SiteError(
                f"LoRA dropout needs a branch, but {site.path} ({type(site.module).__name__}) can only be adapted "
                "through its weight; use dropout=0, or leave the site out"
            )

    def _initialise(self, site: Site, init: Init) -> None:
        if init == "pissa":
            self._initialise_pissa(site)
        elif init == "both_normal":
            nn.init.trunc_normal_(self.down, std=0.02)
            nn.init.trunc_normal_(self.up, std=0.02)
        elif init == "gaussian":
            nn.init.normal_(self.down, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def _initialise_pissa(self, site: Site) -> None:
        weight = site.module._parameters[site.weight]
        assert weight is not None
        if weight.is_meta:
            raise OptionError("PiSSA needs the pretrained weight's values, but the model is on the meta device")
        matrix = weight.detach().flatten(1).float()
        downs, ups = [], []
        for part in site.parts:
            u, s, vh = torch.linalg.svd(take_rows(matrix, part, 0), full_matrices=False)
            root = (s[: self.rank] / self.scale).sqrt()
            downs.append(root[:, None] * vh[: self.rank])
            ups.append(u[:, : self.rank] * root)
        with torch.no_grad():
            self.down.copy_(torch.cat(downs))
            self.up.copy_(torch.cat(ups))
        self.register_buffer("down_start", self.down.detach().clone())
        self.register_buffer("up_start", self.up.detach().clone())

    def factors(self) -> Factors:
        """(down, scale * up); with PiSSA the start point is subtracted, by twice the rank."""
        start: Tensor | None = self._buffers.get("down_start")
        if start is None:
            return Factors(self.down, self.up * self.scale)
        downs = (self.down.split(self.rank), start.split(self.rank))
        down = torch.cat([half for pair in zip(*downs, strict=True) for half in pair])
        return Factors(down, torch.cat([self.up, -self.up_start], 1) * self.scale)  # type: ignore[operator]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., I) or (B, C, *space); y: the site's output."""
        x = F.dropout(x, self.dropout, self.training)
        if self.conv is not None:
            return branch_conv(x, y, self.factors(), self.parts, self.conv)
        return branch_linear(x, y, self.factors(), self.parts)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, parts={[p.role for p in self.parts]}"


def usable_rank(rank: int, site: Site) -> int:
    """`rank`, lowered to the smaller side of the weight where it exceeds it (a 3x3 depthwise kernel has rank 9).

    Raises:
        OptionError: not a whole number of at least 1.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise OptionError(f"rank must be a whole number of at least 1, got {rank!r} (at {site.path}, role {site.role})")
    return min(rank, site.flat_in, min(part.width for part in site.parts))
