"""ELA: efficient local attention, a channel gate from strip means along rows and columns.

    z_h[c, i] = mean_j x[c, i, j]        z_w[c, j] = mean_i x[c, i, j]
    a = sigmoid(GroupNorm_n(Conv1d_k(z)))  for each strip        y[c, i, j] = x[c, i, j] a_h[c, i] a_w[c, j]

Xu & Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024, arXiv 2403.01123. Both strips
share one convolution and norm; the paper's two symbols also allow separate ones (`shared=False`). The use on a
transformer's patch tokens and the start at the identity (`residual=True`) are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site
from zoo.errors import OptionError, SiteError, nearest
from zoo.registry import ADAPTERS, ATTENTION


class Variant(NamedTuple):
    """Kernel length, channels in a convolution group, groups of the norm."""

    kernel_size: int
    group_width: int
    norm_groups: int


VARIANTS = {"T": Variant(5, 1, 32), "B": Variant(7, 1, 16), "S": Variant(5, 8, 16), "L": Variant(7, 8, 16)}


class StripGate(nn.Module):
    """sigmoid(GroupNorm(Conv1d(strip))): (B, C, length) -> (B, C, length) in (0, 1). Parameters 7C, 9C, 42C, 58C."""

    def __init__(self, channels: int, variant: Variant) -> None:
        super().__init__()
        k, width, groups = variant
        if channels % width or channels % groups:
            raise OptionError(
                f"ELA with convolution groups of {width} channels and {groups} norm groups needs channels divisible by "
                f"both, got {channels}"
            )
        self.conv = nn.Conv1d(channels, channels, k, padding=k // 2, groups=channels // width, bias=False)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, strip: Tensor) -> Tensor:
        gate: Tensor = self.norm(self.conv(strip)).sigmoid()
        return gate


class ELAGate(nn.Module):
    """ELA on a map (B, C, H, W) -> the same shape, any H and W.

    Args:
        variant: "T" (7C parameters), "B" (9C), "S" (42C) or "L" (58C); doubled with `shared=False`.
        norm_groups: overrides the variant's groups, for widths that they do not divide.
    """

    def __init__(
        self, channels: int, variant: str = "B", *, shared: bool = True, norm_groups: int | None = None
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise OptionError(f"ELA variant {variant!r} is unknown; {nearest(variant, VARIANTS)}")
        chosen = VARIANTS[variant]
        if norm_groups is not None:
            chosen = chosen._replace(norm_groups=norm_groups)
        self.gate = StripGate(channels, chosen)
        self.gate_w = None if shared else StripGate(channels, chosen)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # long strips need fp32 sums
        rows, columns = wide.mean(3).to(x.dtype), wide.mean(2).to(x.dtype)
        gate_w = self.gate if self.gate_w is None else self.gate_w
        return x * self.gate(rows)[:, :, :, None] * gate_w(columns)[:, :, None, :]


@ATTENTION.register_module()
@ADAPTERS.register_module()
class ELA(Adapter):
    """Efficient local attention after a block or stage (2024), on maps (B, C, H, W), (B, H, W, C) or patch tokens.

    Args:
        variant, shared, norm_groups: see `ELAGate`.
        residual: y + s * (ELA(y) - y) with a zero-initialised gain s a channel, so that a pretrained model starts
            unchanged; False is the paper's form, whose gates start near 1/4.
        grid_size: (H, W) of the patch tokens where the site gives tokens; by default they must form a square.
        num_prefix_tokens: class and register tokens in front, left alone.
    """

    roles = frozenset({"block", "conv", "mlp", "attn"})
    default_roles = ("block",)

    def __init__(
        self,
        site: Site,
        *,
        variant: str = "B",
        shared: bool = True,
        norm_groups: int | None = None,
        residual: bool = True,
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(site)
        if not site.out_features:
            kind = type(site.module).__name__
            raise SiteError(f"ELA needs the channels of {site.path!r}, which its {kind} does not tell")
        self.channels = site.out_features
        self.grid_size, self.num_prefix_tokens = grid_size, num_prefix_tokens
        self.ela = ELAGate(self.channels, variant, shared=shared, norm_groups=norm_groups)
        self.gain = nn.Parameter(torch.zeros(self.channels)) if residual else None
        self.identity = residual

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y: (B, C, H, W), (B, H, W, C) or (B, P + H*W, C)."""
        if y.dim() == 4:
            last = y.shape[1] != self.channels  # channels-last maps of Swin and ConvNeXt's inner layers
            gated = self._gate(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if last else self._gate(y)
            return gated
        prefix, patches = y.split([self.num_prefix_tokens, y.shape[1] - self.num_prefix_tokens], 1)
        height, width = self._grid(patches.shape[1])
        maps = patches.transpose(1, 2).unflatten(2, (height, width))
        return torch.cat([prefix, self._gate(maps).flatten(2).transpose(1, 2)], 1)

    def _gate(self, maps: Tensor) -> Tensor:
        gated: Tensor = self.ela(maps)
        if self.gain is None:
            return gated
        return maps + self.gain[:, None, None] * (gated - maps)

    def _grid(self, tokens: int) -> tuple[int, int]:
        if self.grid_size is not None:
            height, width = self.grid_size
        else:
            height = width = round(tokens**0.5)
        if height * width != tokens:
            raise SiteError(
                f"ELA got {tokens} patch tokens, which are no {height}x{width} grid; give grid_size=(H, W) and "
                f"num_prefix_tokens (now {self.num_prefix_tokens})"
            )
        return height, width
