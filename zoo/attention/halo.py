"""Blocked local self-attention with a halo (HaloNet): blocks of queries share one window of keys around them.

    b x b queries of a block see a w x w window of keys, w = b + 2h, centred on the block.
    logit(i, j; u, v) = q.k / sqrt(d) + q.R_height[u - i + w - 1] + q.R_width[v - j + w - 1]

(i, j) is the query inside its block, (u, v) the key inside the window; tables R are (2w - 1, d), shared by the heads.
Only rows w - b .. 2w - 2 are ever read; the others are kept because published checkpoints have them.

`pad_mode` says what keys outside the map do: "mask" leaves them out of the softmax; "zero" lets them take part as
zero keys and values that keep their position logit, as timm's layer does. Near the border the two differ.

A map of any size is taken: the last blocks of a row or column may be partly outside, and those queries are cut off.
k and v are stored k before v within each head (timm's order); `from_lucidrains` brings the other known layout here.

Source: HaloNet, CVPR 2021, arXiv 2103.12731. No code was published with the paper: strides follow timm.
"""

from __future__ import annotations

from typing import Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from timm.layers.helpers import make_divisible
from torch import Tensor, nn

from zoo.attention.gpsa import attention_linears, take_over
from zoo.registry import ATTENTION

PadMode = Literal["mask", "zero"]


class HaloPositions(nn.Module):
    """Relative position logits, factorised over rows and columns: q (..., i, j, d) -> (..., i, j, u, v)."""

    def __init__(
        self,
        window: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window = window
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim, device=device, dtype=dtype))

    def forward(self, q: Tensor) -> Tensor:
        window, block = self.window, q.shape[-2]
        steps = torch.arange(max(window, block), device=q.device)
        index = steps[:window] - steps[:block, None] + window - 1  # query key
        height, width = self.height_rel[index].to(q.dtype), self.width_rel[index].to(q.dtype)
        rows = torch.einsum("...ijd,iud->...iju", q, height)
        columns = torch.einsum("...ijd,jvd->...ijv", q, width)
        return rows[..., :, None] + columns[..., None, :]


def _inside(size: int, blocks: int, block: int, halo: int, device: torch.device) -> Tensor:
    """Which window positions along one axis lie on the map: bool (blocks, window)."""
    starts = torch.arange(blocks, device=device) * block - halo
    place = starts[:, None] + torch.arange(block + 2 * halo, device=device)
    return (place >= 0) & (place < size)


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: HaloPositions,
    *,
    block: int,
    halo: int,
    stride: int = 1,
    scale_positions: bool = False,
    pad_mode: PadMode = "mask",
    extra: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Halo attention on maps.

    k (B, heads, H, W, d), v (B, heads, H, W, e), q (B, heads, ceil(H/stride), ceil(W/stride), d) -> q's grid with e
    channels. A block is block/stride queries wide. `extra` are keys (B, heads, P, d) and values (B, heads, P, e) that
    every query sees besides its window, without position logit.
    """
    height, width = k.shape[2:4]
    down, across = -(-height // block), -(-width // block)
    queries, window = block // stride, block + 2 * halo

    rows, columns = q.shape[2:4]
    q = F.pad(q, (0, 0, 0, across * queries - columns, 0, down * queries - rows))
    q = q.unflatten(3, (across, queries)).unflatten(2, (down, queries)).transpose(3, 4)  # B h down across i j d

    pad = (0, 0, halo, across * block - width + halo, halo, down * block - height + halo)
    k, v = (
        F.pad(t, pad).unfold(2, window, block).unfold(3, window, block).permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)
        for t in (k, v)
    )  # B h down across window*window d

    scale = q.shape[-1] ** -0.5
    content = (q.flatten(4, 5) @ k.transpose(-2, -1)) * scale
    logits = content + positions(q * scale if scale_positions else q).flatten(6).flatten(4, 5)
    if pad_mode == "mask":
        inside_rows = _inside(height, down, block, halo, q.device)
        inside_columns = _inside(width, across, block, halo, q.device)
        inside = inside_rows[:, None, :, None] & inside_columns[None, :, None, :]  # down across u v
        logits = logits.masked_fill(~inside.flatten(2)[:, :, None], float("-inf"))
    if extra is not None:
        k_extra, v_extra = (t[:, :, None, None] for t in extra)
        logits = torch.cat((logits, q.flatten(4, 5) @ k_extra.transpose(-2, -1) * scale), dim=-1)
        v = torch.cat((v, v_extra.expand(*v.shape[:4], -1, -1)), dim=-2)
    y = F.dropout(logits.softmax(dim=-1), dropout) @ v  # B h down across i*j e
    y = y.unflatten(4, (queries, queries)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return y[:, :, :rows, :columns]


def check_window(block_size: int, halo_size: int, pad_mode: str) -> None:
    """Raises ValueError for a block below 1, a negative halo, or an unknown pad mode."""
    if block_size < 1 or halo_size < 0:
        raise ValueError(f"block_size must be at least 1 and halo_size at least 0, got {block_size} and {halo_size}")
    if pad_mode not in get_args(PadMode):
        raise ValueError(f"pad_mode is {pad_mode!r}; it must be one of {get_args(PadMode)}")


class HaloAttention(nn.Module):
    """Halo attention layer on maps, (B, dim, H, W) -> (B, dim_out, ceil(H/stride), ceil(W/stride)), any H and W.

    Keys and values' names, order and options are those of timm's `HaloAttn`, so its weights load as they are. Queries
    and keys have `dim_head` channels a head (None: `dim_out * qk_ratio` rounded to 8, over the heads), values
    `dim_out / num_heads`. `stride` 2 thins out the queries, or, where the block is odd or with `avg_down`, averages
    2 x 2 outputs. `scale_pos_embed` scales the position logits like the content. `proj_dim` adds a 1x1 convolution
    with bias to that many channels. Raises ValueError for widths, strides, blocks and inputs that do not fit.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        *,
        pad_mode: PadMode = "mask",
        proj_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        if dim_out % num_heads:
            raise ValueError(f"the number of heads must divide the {dim_out} output channels, got {num_heads} heads")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        check_window(block_size, halo_size, pad_mode)
        pooled = stride == 2 and (avg_down or block_size % 2 != 0)
        self.dim, self.num_heads = dim, num_heads
        self.block_size, self.halo_size, self.stride = block_size, halo_size, 1 if pooled else stride
        self.scale_pos_embed = scale_pos_embed
        self.pad_mode: PadMode = pad_mode
        self.dim_head_qk = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        self.dim_head_v = dim_out // num_heads
        width = num_heads * self.dim_head_qk
        self.q = nn.Conv2d(dim, width, 1, stride=self.stride, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Conv2d(dim, width + dim_out, 1, bias=qkv_bias, device=device, dtype=dtype)
        self.pos_embed = HaloPositions(block_size + 2 * halo_size, self.dim_head_qk, device, dtype)
        # On an odd side the last average is over what is there, so the output is as large as a strided convolution's.
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()
        self.proj: nn.Module = nn.Identity()
        if proj_dim is not None:
            self.proj = nn.Conv2d(dim_out, proj_dim, 1, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal: projections with std dim^-0.5, tables with std dim_head^-0.5."""
        for weight in (self.q.weight, self.kv.weight):
            nn.init.trunc_normal_(weight, std=self.dim**-0.5)
        for table in (self.pos_embed.height_rel, self.pos_embed.width_rel):
            nn.init.trunc_normal_(table, std=self.dim_head_qk**-0.5)

    @classmethod
    def from_timm(cls, layer: HaloAttn, pad_mode: PadMode = "zero") -> HaloAttention:
        """A layer with timm's parameters (the same tensors) that takes maps of any size; "zero" keeps its numbers."""
        halo = cls(
            layer.q.in_channels,
            layer.dim_out_v,
            stride=2 if layer.block_stride == 2 or isinstance(layer.pool, nn.AvgPool2d) else 1,
            num_heads=layer.num_heads,
            dim_head=layer.dim_head_qk,
            block_size=layer.block_size,
            halo_size=layer.halo_size,
            qkv_bias=layer.q.bias is not None,
            avg_down=isinstance(layer.pool, nn.AvgPool2d),
            scale_pos_embed=layer.scale_pos_embed,
            pad_mode=pad_mode,
            device=layer.q.weight.device,
            dtype=layer.q.weight.dtype,
        )
        halo.q, halo.kv = layer.q, layer.kv
        halo.pos_embed.height_rel, halo.pos_embed.width_rel = layer.pos_embed.height_rel, layer.pos_embed.width_rel
        return halo.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"halo attention expects (B, {self.dim}, H, W), got {tuple(x.shape)}")
        q = self.q(x).unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2)  # B h H W d
        kv = self.kv(x).unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2)
        k, v = kv.split((self.dim_head_qk, self.dim_head_v), dim=-1)
        y = blocked_attention(
            q,
            k,
            v,
            self.pos_embed,
            block=self.block_size,
            halo=self.halo_size,
            stride=self.stride,
            scale_positions=self.scale_pos_embed,
            pad_mode=self.pad_mode,
        )
        return cast(Tensor, self.proj(self.pool(y.permute(0, 1, 4, 2, 3).flatten(1, 2))))


def from_lucidrains(state: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Weights of halonet-pytorch's `HaloAttention` (0.0.5) in our layout.

    They belong in `HaloAttention(dim, heads * dim_head, num_heads=heads, dim_head=dim_head, scale_pos_embed=True,
    proj_dim=dim)`, whose padding is masked like theirs. Raises ValueError if a key is missing or not theirs.
    """
    expected = {
        "rel_pos_emb.rel_height",
        "rel_pos_emb.rel_width",
        "to_q.weight",
        "to_kv.weight",
        "to_out.weight",
        "to_out.bias",
    }
    if set(state) != expected:
        raise ValueError(
            f"not a halonet-pytorch attention: missing {sorted(expected - set(state))}, "
            f"unknown {sorted(set(state) - expected)}"
        )
    # They keep all keys before all values; here each head has its keys, then its values.
    kv = state["to_kv.weight"].unflatten(0, (2, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    return {
        "q.weight": state["to_q.weight"][:, :, None, None],
        "kv.weight": kv[:, :, None, None],
        "pos_embed.height_rel": state["rel_pos_emb.rel_height"],
        "pos_embed.width_rel": state["rel_pos_emb.rel_width"],
        "proj.weight": state["to_out.weight"][:, :, None, None],
        "proj.bias": state["to_out.bias"],
    }


@ATTENTION.register_module()
class HaloTokenAttention(nn.Module):
    """Halo attention as a replacement for a ViT's softmax attention; keeps its `qkv`, `proj` and query/key norms.

    (B, P + H*W, C) -> the same, P = `num_prefix_tokens`. A patch sees its block's window and the prefix tokens, which
    have no position; a prefix token sees everything. Padding is masked. The relative tables start at zero, so the
    layer begins as the same attention cut to the window, and depend on block and halo only: any rectangle fits, and
    `grid_size` of a call overrides the one from construction. Raises ValueError for heads that do not divide `dim`, a
    bad block or halo, `scale_norm`, masks, and a token count that does not fit the grid. The prefix tokens are our
    addition to arXiv 2103.12731.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        block_size: int = 7,
        halo_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"the number of heads must divide the {dim} channels, got {num_heads} heads")
        if scale_norm:
            raise ValueError("halo attention has no norm after it: build it with scale_norm=False")
        check_window(block_size, halo_size, "mask")
        self.dim, self.num_heads = dim, num_heads
        self.grid_size, self.num_prefix_tokens = grid_size, num_prefix_tokens
        self.block_size, self.halo_size = block_size, halo_size
        norm = (norm_layer or nn.LayerNorm) if qk_norm else nn.Identity
        head = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm, self.k_norm = norm(head).to(device, dtype), norm(head).to(device, dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.pos_embed = HaloPositions(block_size + 2 * halo_size, head, device, dtype)
        nn.init.zeros_(self.pos_embed.height_rel)
        nn.init.zeros_(self.pos_embed.width_rel)

    @classmethod
    def from_attention(
        cls,
        attn: nn.Module,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        block_size: int = 7,
        halo_size: int = 3,
    ) -> Self:
        """Takes over the modules (not copies) of a timm-style attention: qkv, proj, norms, dropouts.

        Raises TypeError if `attn` is not plain attention with one square qkv, see `attention_linears`.
        """
        qkv, _ = attention_linears(attn, cls.__name__)
        halo = cls(
            qkv.in_features,
            cast(int, attn.num_heads),
            grid_size=grid_size,
            num_prefix_tokens=num_prefix_tokens,
            block_size=block_size,
            halo_size=halo_size,
            device=qkv.weight.device,
            dtype=qkv.weight.dtype,
        )
        take_over(halo, attn)
        return halo

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("halo attention has its own mask: it takes no attn_mask and no is_causal=True")
        grid = self.grid_size if grid_size is None else grid_size
        prefix = self.num_prefix_tokens
        expected = prefix + grid[0] * grid[1]
        if x.ndim != 3 or x.shape[1] != expected or x.shape[2] != self.dim:
            raise ValueError(
                f"halo attention expects (batch, {expected}, {self.dim}): {prefix} prefix tokens + a "
                f"{grid[0]}x{grid[1]} grid, got {tuple(x.shape)}"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B h N d each
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        maps = [t[:, :, prefix:].unflatten(2, grid) for t in (q, k, v)]
        y = blocked_attention(
            maps[0],
            maps[1],
            maps[2],
            self.pos_embed,
            block=self.block_size,
            halo=self.halo_size,
            dropout=dropout,
            extra=(k[:, :, :prefix], v[:, :, :prefix]) if prefix else None,
        ).flatten(2, 3)
        if prefix:
            first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v, dropout_p=dropout)
            y = torch.cat((first, y), dim=2)
        return cast(Tensor, self.proj_drop(self.proj(y.transpose(1, 2).flatten(2))))
