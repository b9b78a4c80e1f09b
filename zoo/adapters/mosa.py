"""MoSA: bottleneck adapters whose two matrices are mixtures of sparse experts, in three places of a block.

Source: Zhang et al., "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", arXiv 2312.02923 (v1: "Split &
Merge"), and the released code for placements and initial values. What an expert is, how it trains and where that
differs from the released code: `sparse_experts.py`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site
from zoo.adapters.bottleneck import Bottleneck, channels_first
from zoo.adapters.sparse_experts import Along, Share, split_bottleneck
from zoo.errors import OptionError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class MoSA(Adapter):
    """Mixture of sparse experts beside the MLP, AdaptFormer's place (MoSA 2024).

    MLP(x) -> MLP(x) + scale * up(dropout(gelu(down(LN(x))))), x the MLP's own input. In the released ViT the inner LN
    reads the block's sum before its norm; a MLP site sees that sum behind the norm, which is the same where the norm
    has no affine part (a pretrained one weights the channels). `norm=False` is the released Swin form.

    Deployed parameters a site: 2*I (norm) + I*width + width + width*O + O. While training each split half has N biases
    instead of one (none of that with `split_bias`), and buffers `start` and `owner` beside its weight.

    Args:
        site: an `mlp` site, `(..., I) -> (..., O)` or `(B, I, H, W) -> (B, O, H, W)`; the grid must not change.
        width: bottleneck width; released 64 (16 on VTAB).
        experts: N; released 4, 1 is a plain adapter.
        share: the half that stays whole: "down" (released default), "up" or "none".
        scale: the fixed factor, None for a learned one that starts at 1.
        dropout: on the hidden units while training.
        norm: a LayerNorm of its own in front of `down`.
        along: rank entries over "all" of a matrix (released), or within each "row" or "column".
        split_bias: split the biases as well instead of giving each expert its own.

    Raises:
        OptionError: an option out of range, or more experts than entries.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"mlp"})
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)

    def __init__(
        self,
        site: Site,
        *,
        width: int = 64,
        experts: int = 4,
        share: Share = "down",
        scale: float | None = 0.1,
        dropout: float = 0.1,
        norm: bool = True,
        along: Along = "all",
        split_bias: bool = False,
    ) -> None:
        super().__init__(site)
        if scale is not None and (not math.isfinite(scale) or scale == 0.0):
            raise OptionError(f"scale must be a finite number other than 0, or None, got {scale!r} (released: 0.1)")
        self.scale: nn.Parameter | float = nn.Parameter(torch.ones(())) if scale is None else scale
        bottleneck = Bottleneck(site, width, nn.GELU, dropout=dropout)
        self.norm = _norm(site, site.in_features) if norm else nn.Identity()
        self.bottleneck = split_bottleneck(bottleneck, experts, share, along, split_bias)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale * self.bottleneck(self.norm(x))


@ADAPTERS.register_module()
class MoSAPfeiffer(Adapter):
    """Mixture of sparse experts behind the MLP, Pfeiffer's place (MoSA 2024).

    y -> y + up(relu(down(LN(y)))), y the MLP's output before the residual addition, as released.

    Args:
        site: an `mlp` or `attn` site with outputs `(..., C)` or `(B, C, H, W)`.
        width, experts, share, along, split_bias: as in `MoSA`; so are the errors and the parameters (I = O = C).
    """

    roles: ClassVar[frozenset[str]] = frozenset({"attn", "mlp"})
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)

    def __init__(
        self,
        site: Site,
        *,
        width: int = 64,
        experts: int = 4,
        share: Share = "down",
        along: Along = "all",
        split_bias: bool = False,
    ) -> None:
        super().__init__(site)
        bottleneck = Bottleneck(site, width, nn.ReLU, inputs=site.out_features)
        self.norm = _norm(site, site.out_features)
        self.bottleneck = split_bottleneck(bottleneck, experts, share, along, split_bias)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bottleneck(self.norm(y))


@ADAPTERS.register_module()
class MoSAHoulsby(Adapter):
    """Mixtures of sparse experts behind attention and MLP, Houlsby's places (MoSA 2024).

    y -> y + up(silu(down(y))), y the sub-layer's output before the residual addition, as Houlsby et al. place it. (The
    released code reads the sum behind the addition instead, which no module of a block has as its output.)

    Args:
        site: an `attn` or `mlp` site with outputs `(..., C)` or `(B, C, H, W)`.
        width, experts, share, along, split_bias: as in `MoSA`; so are the errors. Deployed parameters a site:
            2*C*width + width + C.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"attn", "mlp"})
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")

    def __init__(
        self,
        site: Site,
        *,
        width: int = 64,
        experts: int = 4,
        share: Share = "down",
        along: Along = "all",
        split_bias: bool = False,
    ) -> None:
        super().__init__(site)
        bottleneck = Bottleneck(site, width, nn.SiLU, inputs=site.out_features)
        self.bottleneck = split_bottleneck(bottleneck, experts, share, along, split_bias)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bottleneck(y)


def _norm(site: Site, channels: int) -> nn.Module:
    return LayerNorm2d(channels, eps=1e-6) if channels_first(site) else nn.LayerNorm(channels, eps=1e-6)
