"""DoRA: the weight as magnitude times direction, with a low-rank update of the direction.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv 2402.09353, eq. 5, and
section 4.3 for the norm that gradients do not pass.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Factors, Site, stack_rows, take_rows
from zoo.adapters.lora import usable_rank
from zoo.errors import OptionError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class DoRA(Adapter):
    """W' = m * (W + s B A) / |W + s B A|, the norm taken over each output's weights (DoRA 2024).

    m starts at |W|, so the adapted model starts at the base up to rounding. A convolution's weight is the matrix
    (C_out, C_in / groups * kernel area). It runs through the weight: one forward forms W' (O x I numbers, few beside
    the tokens), and the backward forms the dense gradient of W'.

    m is read off the weight when the adapter is attached: load pretrained weights first, or m with them.

    Parameters: `magnitude` (sum of part widths), `down` (P*r, I), `up` (sum of part widths, r); O + P*r*I + r*O in all.

    Args:
        site: any layer with a weight of at least two dimensions, bypassed ones too.
        rank: r, at least 1; lowered to the weight's own full rank where that is smaller.
        alpha: numerator of the scale, by default equal to `rank` (scale 1).
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        detach_norm: treat the norm as a constant in the backward (the paper's section 4.3, and its default).

    Raises:
        OptionError: rank or alpha out of range.
    """

    roles: ClassVar[frozenset[str]] = frozenset(
        {"q", "k", "v", "qkv", "kv", "qk", "out", "fc1", "fc2", "conv", "linear", "embed", "head"}
    )
    default_roles: ClassVar[tuple[str, ...]] = ("q", "k", "v", "out", "fc1", "fc2")
    fallback_roles: ClassVar[tuple[str, ...]] = ("conv", "linear")
    mergeable: ClassVar[bool] = True
    form = "weight"

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rslora: bool = False,
        detach_norm: bool = True,
    ) -> None:
        super().__init__(site)
        rank = usable_rank(rank, site)
        alpha = float(rank if alpha is None else alpha)
        if not math.isfinite(alpha) or alpha == 0:
            raise OptionError(f"alpha must be a finite number other than 0, got {alpha!r}")
        self.rank = rank
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.detach_norm = detach_norm
        width = sum(part.width for part in site.parts)
        self.down = nn.Parameter(torch.empty(len(site.parts) * rank, site.flat_in))
        self.up = nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        weight = site.module._parameters[site.weight]
        assert weight is not None
        norm = _row_norm(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
        self.magnitude = nn.Parameter(torch.cat([take_rows(norm, part, 0) for part in site.parts]))

    def factors(self) -> Factors:
        """The update of the direction, before it is normalised."""
        return Factors(self.down, self.up * self.scale)

    def reweight(self, weight: Tensor) -> Tensor:
        """weight: (O, I) or (C_out, C_in / groups, *kernel); rows of parts that are not adapted pass unchanged."""
        with torch.autocast(weight.device.type, enabled=False):
            wide = weight.to(torch.promote_types(weight.dtype, self.up.dtype))
            direction = wide + self.delta(wide)
            norm = _row_norm(direction)
            norm = norm.detach() if self.detach_norm else norm
            widths = [part.width for part in self.parts]
            blocks = []
            for part, magnitude in zip(self.parts, self.magnitude.split(widths), strict=True):
                # A row of zeros has no direction: it stays zero instead of becoming nan.
                blocks.append(magnitude / take_rows(norm, part, 0).clamp_min(torch.finfo(norm.dtype).tiny) - 1)
            gain = 1 + stack_rows(blocks, self.parts, weight.shape[0], 0)
            return (direction * gain.view(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, parts={[p.role for p in self.parts]}"


def _row_norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)
