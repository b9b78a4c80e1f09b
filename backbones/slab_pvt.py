"""SLAB-PVT: the pyramid vision transformer with simplified linear attention (all stages) and PRepBN.

A stage is a patch-merging convolution with a norm, learned positions, and blocks; there is no class token and no
final norm. The letter of a stage says which attention it has: L for SLA without spatial reduction, S for PVT's softmax
attention over keys and values reduced 8, 4, 2, 1 times a side.

Source: SLAB, ICML 2024, arXiv 2405.11582; PVT, ICCV 2021, arXiv 2102.12122.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
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


class SpatialReductionSLA(nn.Module):
    """SLA whose keys and values may come from a grid reduced `sr_ratio` times a side.

    (B, H*W, C), (H, W) -> (B, H*W, C). The values are stretched back to H*W by linear interpolation along the token
    axis before the local branch. Raises ValueError if the heads do not divide `dim` or the grid is not the one set.
    """

    def __init__(
        self, dim: int, num_heads: int, grid_size: Size, norm_layer: NormLayer, sr_ratio: int = 1, **dd: Any
    ) -> None:
        super().__init__()
        channels = head_dim(dim, num_heads)
        self.num_heads, self.sr_ratio, self.grid_size = num_heads, sr_ratio, grid_size
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **dd) if sr_ratio > 1 else None
        self.norm = norm_layer(dim, **dd) if sr_ratio > 1 else None
        self.dwc = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, **dd)
        rows, columns = self._reduced(grid_size)
        self.positional_encoding = nn.Parameter(torch.zeros(1, rows * columns, dim, **dd))

    def _reduced(self, grid: Size) -> Size:
        return grid[0] // self.sr_ratio, grid[1] // self.sr_ratio

    @torch.no_grad()
    def set_grid_size(self, grid: Size) -> None:
        """Fix another token grid: key positions are resized bilinearly."""
        table = resize_positions(self.positional_encoding, self._reduced(self.grid_size), self._reduced(grid))
        self.positional_encoding = nn.Parameter(table.clone(), self.positional_encoding.requires_grad)
        self.grid_size = grid

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        if tuple(feat_size) != self.grid_size:
            raise ValueError(f"SLA was built for a {self.grid_size} grid, got {tuple(feat_size)}: call set_grid_size")
        n = x.shape[1]
        q, reduced = self.q(x), x
        if self.sr is not None and self.norm is not None:
            maps = self.sr(x.transpose(1, 2).unflatten(2, feat_size))
            reduced = self.norm(maps.flatten(2).transpose(1, 2))
        k, v = self.kv(reduced).chunk(2, dim=-1)  # B M C each
        k = k + self.positional_encoding
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        out = linear_attention(q, k, v)  # B h N d
        if v.shape[2] != n:
            v = F.interpolate(v.flatten(0, 1).transpose(1, 2), size=n, mode="linear").transpose(1, 2)
            v = v.unflatten(0, out.shape[:2])
        return self.proj(merge_heads(out + local_branch(self.dwc, v, feat_size)))


def softmax_attention(dim: int, num_heads: int, norm_layer: NormLayer, sr_ratio: int, **dd: Any) -> nn.Module:
    """PVT's spatial-reduction attention: timm's, with `norm_layer` behind the reduction."""
    attn = SpatialReductionAttention(dim, num_heads, sr_ratio, **dd)
    if attn.norm is not None:
        attn.norm = norm_layer(dim, **dd)
    return attn


class PvtBlock(nn.Module):
    """Pre-norm attention and MLP, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, norm_layer: NormLayer, **dd: Any):
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def set_grid_size(self, grid: Size) -> None:
        if isinstance(self.attn, SpatialReductionSLA):
            self.attn.set_grid_size(grid)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens.unflatten(1, grid)


class SlabPVT(Pyramid):
    """PVT with SLA (L) or softmax (S) attention a stage, (B, in_chans, H, W) -> (B, num_classes).

    Raises ValueError if a side is no multiple of 32, heads do not divide a width, or `attn_type` is not one letter
    L or S for every stage.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        attn_type: str = "LLLL",
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        la_sr_ratios: tuple[int, ...] = (1, 1, 1, 1),
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
        stages, width = [], in_chans
        for i, (dim, heads, grid) in enumerate(zip(embed_dims, num_heads, self.grids(size), strict=True)):
            head_dim(dim, heads)
            blocks = []
            for rate in rates[i]:
                if attn_type[i] == "L":
                    attn: nn.Module = SpatialReductionSLA(dim, heads, grid, norm_layer, la_sr_ratios[i], **dd)
                else:
                    attn = softmax_attention(dim, heads, norm_layer, sr_ratios[i], **dd)
                blocks.append(PvtBlock(dim, attn, mlp_ratios[i], rate, norm_layer, **dd))
            patch = 4 if i == 0 else 2
            stages.append(PyramidStage(ConvEmbed(width, dim, patch, patch, 0, norm_layer, **dd), blocks, grid, True))
            width = dim
        super().__init__(
            stages,
            nn.Identity(),
            img_size=size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


@fold_sites.register
def _(module: PvtBlock) -> list[FoldSite]:
    consumers = ("attn.q", "attn.kv") if module.attn.sr is None else ("attn.q", "attn.sr")
    return [FoldSite("norm1", consumers), FoldSite("norm2", ("mlp.fc1",))]


@fold_sites.register
def _(module: SpatialReductionSLA) -> list[FoldSite]:
    return [] if module.sr is None else [FoldSite("norm", producer="sr")]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' keys (`patch_embed1`, `pos_embed1`, `block1.0`, `head`) as ours."""
    state = state_dict.get("model", state_dict)
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"(patch_embed|pos_embed|block)([1-4])((?:\..*)?)", key)
        if match is not None:
            part = {"patch_embed": "embed", "pos_embed": "pos_embed", "block": "blocks"}[match[1]]
            key = f"stages.{int(match[2]) - 1}.{part}{match[3]}"
        elif key in ("head.weight", "head.bias"):
            key = key.replace("head.", "head.fc.")
        renamed[key] = value
    return renamed


_SIZES = {"tiny": ((2, 2, 2, 2), 0.0), "small": ((3, 4, 6, 3), 0.1), "medium": ((3, 4, 18, 3), 0.3)}

default_cfgs = generate_default_cfgs(
    {
        f"{kind}_pvt_{size}": model_cfg("stages.0.embed.proj", "head.fc")
        for kind in ("slab", "prepbn")
        for size in _SIZES
    }
)


def _create(variant: str, attn_type: str, pretrained: bool, options: dict[str, Any]) -> SlabPVT:
    depths, drop_path = _SIZES[variant.rpartition("_")[2]]
    norm_layer = take_norm(options, 300_000)
    return build_model_with_cfg(
        SlabPVT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"},
        norm_layer=norm_layer,
        **{"depths": depths, "drop_path_rate": drop_path, "attn_type": attn_type, **options},
    )


@register_model
def slab_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-T: SLA in all stages, depths 2, 2, 2, 2, 12.2 M parameters in training."""
    return _create("slab_pvt_tiny", "LLLL", pretrained, kwargs)


@register_model
def slab_pvt_small(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-S: SLA in all stages, depths 3, 4, 6, 3, 21.7 M parameters in training."""
    return _create("slab_pvt_small", "LLLL", pretrained, kwargs)


@register_model
def slab_pvt_medium(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """SLAB-PVT-M: SLA in all stages, depths 3, 4, 18, 3, 37.3 M parameters in training."""
    return _create("slab_pvt_medium", "LLLL", pretrained, kwargs)


@register_model
def prepbn_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-T with PRepBN and softmax attention, 13.2 M parameters in training."""
    return _create("prepbn_pvt_tiny", "SSSS", pretrained, kwargs)


@register_model
def prepbn_pvt_small(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-S with PRepBN and softmax attention, 24.5 M parameters in training."""
    return _create("prepbn_pvt_small", "SSSS", pretrained, kwargs)


@register_model
def prepbn_pvt_medium(pretrained: bool = False, **kwargs: Any) -> SlabPVT:
    """PVT-M with PRepBN and softmax attention, 44.3 M parameters in training."""
    return _create("prepbn_pvt_medium", "SSSS", pretrained, kwargs)
