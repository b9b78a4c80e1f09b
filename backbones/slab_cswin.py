"""SLAB-CSWin: cross-shaped window attention, made linear in the early stages, with PRepBN.

A stage of letter S splits heads and channels in two halves: one attends within vertical stripes (H x 7), the other
within horizontal ones (7 x W); in the last stage all heads attend over the whole map. A stage of letter L uses
simplified linear attention over the whole map. Every attention adds LePE, a depth-wise 3x3 convolution of the values.
Published models are LLSS.

Source: SLAB, ICML 2024, arXiv 2405.11582; CSWin, CVPR 2022, arXiv 2107.00652.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from backbones.slab_fold import FoldSite, fold_sites
from backbones.slab_model import (
    ConvEmbed,
    NormLayer,
    Pyramid,
    PyramidStage,
    Size,
    check_image_size,
    model_cfg,
    take_norm,
)
from zoo.attention.sla import head_dim, linear_attention, local_branch, merge_heads, resize_positions, split_heads


class StripeAttention(nn.Module):
    """Softmax attention within stripes plus LePE: q, k, v (B, H, W, C) each -> (B, H, W, C).

    Raises ValueError if the heads do not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int, stripe: Size, **dd: Any) -> None:
        super().__init__()
        head_dim(dim, num_heads)
        self.num_heads = num_heads
        self.stripe = stripe
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def set_stripe(self, stripe: Size) -> None:
        self.stripe = stripe

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within one stripe: (B', heads, h*w, d) each -> the same shape."""
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        height, width = q.shape[1:3]
        q, k, v = (window_partition(t, self.stripe) for t in (q, k, v))  # B' h w C
        lepe = self.get_v(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        heads = (split_heads(t.flatten(1, 2), self.num_heads) for t in (q, k, v))
        out = merge_heads(self.mix(*heads)).unflatten(1, self.stripe) + lepe
        return window_reverse(out, self.stripe, height, width)


class StripeSLA(StripeAttention):
    """Simplified linear attention within stripes plus LePE; the same shapes."""

    def __init__(self, dim: int, num_heads: int, stripe: Size, **dd: Any) -> None:
        super().__init__(dim, num_heads, stripe, **dd)
        channels = head_dim(dim, num_heads)
        self.dwc = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, **dd)
        self.positional_encoding = nn.Parameter(torch.zeros(1, stripe[0] * stripe[1], dim, **dd))
        # The published models carry this parameter and never read it; frozen, because nothing can train it.
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, **dd), requires_grad=False)

    @torch.no_grad()
    def set_stripe(self, stripe: Size) -> None:
        table = resize_positions(self.positional_encoding, self.stripe, stripe)
        self.positional_encoding = nn.Parameter(table.clone(), self.positional_encoding.requires_grad)
        super().set_stripe(stripe)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k + split_heads(self.positional_encoding, self.num_heads)
        return linear_attention(q, k, v) + local_branch(self.dwc, v, self.stripe)


class CSWinBlock(nn.Module):
    """Pre-norm cross-shaped attention and MLP, (B, H, W, C) -> (B, H, W, C).

    `split` is the width of the stripes of two half-wide branches; 0 gives one branch over the whole map, linear or not.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Size,
        split: int,
        linear: bool,
        drop_path: float,
        norm_layer: NormLayer,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.split = split
        self.norm1 = norm_layer(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        stripes = self.stripes(grid)
        kind, parts = StripeSLA if linear else StripeAttention, len(stripes)
        self.attns = nn.ModuleList(kind(dim // parts, num_heads // parts, stripe, **dd) for stripe in stripes)
        self.proj = nn.Linear(dim, dim, **dd)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)

    def stripes(self, grid: Size) -> list[Size]:
        """The stripe of each branch. Raises ValueError if stripes do not tile the grid."""
        if not self.split:
            return [grid]
        if any(side % self.split for side in grid):
            raise ValueError(
                f"stripes of {self.split} do not tile the {grid[0]} x {grid[1]} map of their stage: "
                f"its sides must be multiples of {self.split}"
            )
        return [(grid[0], self.split), (self.split, grid[1])]

    def set_grid_size(self, grid: Size) -> None:
        for attn, stripe in zip(self.attns, self.stripes(grid), strict=True):
            attn.set_stripe(stripe)

    def _attend(self, x: Tensor) -> Tensor:
        parts = len(self.attns)
        q, k, v = (t.chunk(parts, dim=-1) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(torch.cat([self.attns[i](q[i], k[i], v[i]) for i in range(parts)], dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SlabCSWin(Pyramid):
    """CSWin with linear (L) or softmax (S) attention a stage, (B, in_chans, H, W) -> (B, num_classes).

    `split` is the stripe width of softmax stages before the last one. Raises ValueError if a side is no multiple of
    32, stripes do not tile the map of their stage (at the published split of 7 in stage 3: sides must be multiples of
    112 = 16 * 7, so 224, 336 or 448), or `attn_type` is not one letter L or S for every stage.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: tuple[int, ...] = (2, 4, 18, 1),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        attn_type: str = "LLSS",
        split: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        *,
        norm_layer: NormLayer,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = to_2tuple(img_size)
        check_image_size(size, self.multiple)
        if len(attn_type) != len(depths) or set(attn_type) - set("LS"):
            raise ValueError(f"attn_type needs one letter, L or S, for each of {len(depths)} stages, got {attn_type!r}")
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages, width, last = [], in_chans, len(depths) - 1
        for i, (heads, grid) in enumerate(zip(num_heads, self.grids(size), strict=True)):
            dim, linear = embed_dim * 2**i, attn_type[i] == "L"
            cut = 0 if linear or i == last else split
            blocks = [CSWinBlock(dim, heads, grid, cut, linear, rate, norm_layer, **dd) for rate in rates[i]]
            kernel, stride, padding = (7, 4, 2) if i == 0 else (3, 2, 1)
            embed = ConvEmbed(width, dim, kernel, stride, padding, norm_layer, **dd)
            stages.append(PyramidStage(embed, blocks, grid, positions=False))
            width = dim
        super().__init__(
            stages,
            norm_layer(width, **dd),
            img_size=size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


@fold_sites.register
def _(module: CSWinBlock) -> list[FoldSite]:
    return [FoldSite("norm1", ("qkv",)), FoldSite("norm2", ("mlp.fc1",))]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """CSWin's keys (`stage1_conv_embed.0`, `stage1.0`, `merge1.conv`, `head`) as ours."""
    state = state_dict.get("model", state_dict.get("state_dict_ema", state_dict))
    renamed = {}
    for key, value in state.items():
        if (stem := re.fullmatch(r"stage1_conv_embed\.(\d)\.(.*)", key)) is not None:
            key = f"stages.0.embed.{'proj' if stem[1] == '0' else 'norm'}.{stem[2]}"
        elif (merge := re.fullmatch(r"merge([1-3])\.(conv|norm)\.(.*)", key)) is not None:
            key = f"stages.{merge[1]}.embed.{'proj' if merge[2] == 'conv' else 'norm'}.{merge[3]}"
        elif (block := re.fullmatch(r"stage([1-4])\.(.*)", key)) is not None:
            key = f"stages.{int(block[1]) - 1}.blocks.{block[2]}"
        elif key in ("head.weight", "head.bias"):
            key = key.replace("head.", "head.fc.")
        renamed[key] = value
    return renamed


default_cfgs = generate_default_cfgs(
    {name: model_cfg("stages.0.embed.proj", "head.fc") for name in ("slab_cswin_tiny", "slab_cswin_small")}
)


def _create(variant: str, pretrained: bool, options: dict[str, Any]) -> SlabCSWin:
    norm_layer = take_norm(options, 120_000, eps=1e-5)
    return build_model_with_cfg(
        SlabCSWin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"},
        norm_layer=norm_layer,
        **options,
    )


@register_model
def slab_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> SlabCSWin:
    """SLAB-CSWin-T: depths 2, 4, 18, 1, SLA in stages 1 and 2, 21.2 M parameters in training."""
    return _create("slab_cswin_tiny", pretrained, {"depths": (2, 4, 18, 1), "drop_path_rate": 0.1} | kwargs)


@register_model
def slab_cswin_small(pretrained: bool = False, **kwargs: Any) -> SlabCSWin:
    """SLAB-CSWin-S: depths 2, 4, 32, 2, SLA in stages 1 and 2, 35.5 M parameters in training."""
    return _create("slab_cswin_small", pretrained, {"depths": (2, 4, 32, 2), "drop_path_rate": 0.3} | kwargs)
