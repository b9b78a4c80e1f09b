"""Simplified linear attention (SLA): ReLU queries and keys, a sum over keys shared by all queries, a local branch.

    k <- k + P;  q <- relu(q);  k <- relu(k)
    O_i = q_i (sum_j k_j^T v_j) / (q_i . sum_j k_j + 1e-6)  +  dwc(v)_i

`P` is a learned key position (zeros at the start), `dwc` a depth-wise convolution over the token grid whose weights
all heads share. There is no 1/sqrt(d) and no softmax; the cost grows with N instead of N^2.

Source: SLAB, ICML 2024, arXiv 2405.11582, section 3.2.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.gpsa import attention_linears
from zoo.registry import ATTENTION

EPS = 1e-6


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised linear attention with ReLU features.

    q (..., N, d), k (..., M, d), v (..., M, e) -> (..., N, e) in the dtype of v. Rows of the implied attention matrix
    sum to 1, or to 0 where a query is negative throughout. Computed in fp32 at least, also under autocast: the
    denominator of a weak query underflows in fp16.
    """
    kind = q.device.type
    with (
        torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    ):  # meta has none
        wide = torch.promote_types(v.dtype, torch.float32)
        qf, kf, vf = q.to(wide).relu(), k.to(wide).relu(), v.to(wide)
        total = kf.sum(dim=-2, keepdim=True)  # 1 d
        denominator = (qf * total).sum(dim=-1, keepdim=True) + EPS  # N 1
        n, m, d, e = qf.shape[-2], kf.shape[-2], qf.shape[-1], vf.shape[-1]
        if n * m * (d + e) > d * e * (n + m):
            out = qf @ (kf.transpose(-2, -1) @ vf)
        else:  # few tokens: the N x M matrix is the smaller one
            out = (qf @ kf.transpose(-2, -1)) @ vf
        return (out / denominator).to(v.dtype)


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear resize of a position table (1, H*W, C) from grid `old` to grid `new`, dtype kept."""
    if old == new:
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    grid = wide.transpose(1, 2).unflatten(2, old)  # 1 C H W
    grid = F.interpolate(grid, size=new, mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C/heads); a head owns a run of neighbouring channels."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads*d), the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def local_branch(dwc: nn.Conv2d, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """The shared depth-wise convolution: v (B, heads, H*W, d) -> the same shape."""
    maps = v.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # B*heads d H W
    return cast(Tensor, dwc(maps)).flatten(2).transpose(1, 2).unflatten(0, v.shape[:2])


def head_dim(dim: int, num_heads: int) -> int:
    """Channels per head. Raises ValueError if `num_heads` does not divide `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"the number of heads must divide the {dim} channels, got {num_heads} heads")
    return dim // num_heads


@ATTENTION.register_module()
class SLA(nn.Module):
    """Simplified linear attention as a replacement for a ViT's softmax attention; keeps its `qkv` and `proj`.

    (B, N, C) -> (B, N, C) with N = num_prefix_tokens + H*W. Prefix tokens attend and are attended to, but have no key
    position and no local branch (the paper has none). The grid may be any rectangle; `grid_size` of a call overrides
    the one from construction, and key positions are then resized bilinearly.

    `qk_norm`, `scale_norm`, `norm_layer` and `attn_drop` belong to timm's attention signature. Raises ValueError if
    one of the first two or the last is in use (SLA normalises no heads and has no attention matrix to drop), if
    `num_heads` does not divide `dim`, on a mask, and on a token count that does not fit the grid.
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
        kernel_size: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if qk_norm or scale_norm:
            raise ValueError("SLA has no query/key or output norm: build it with qk_norm=False, scale_norm=False")
        if attn_drop:
            raise ValueError(f"SLA has no attention matrix to drop from: attn_drop must be 0, got {attn_drop}")
        if kernel_size % 2 == 0:
            raise ValueError(f"SLA needs an odd kernel_size to keep the grid, got {kernel_size}")
        channels = head_dim(dim, num_heads)
        self.dim = dim
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, device=device, dtype=dtype
        )
        rows = grid_size[0] * grid_size[1]
        self.positional_encoding = nn.Parameter(torch.zeros(1, rows, dim, device=device, dtype=dtype))

    @classmethod
    def from_attention(
        cls, attn: nn.Module, *, grid_size: tuple[int, int], num_prefix_tokens: int = 0, kernel_size: int = 5
    ) -> Self:
        """SLA that takes over the modules (not copies) of a timm-style attention: qkv, proj, output dropout.

        Raises TypeError if `attn` is not plain attention with one square qkv, or normalises queries and keys.
        """
        qkv, proj = attention_linears(attn, cls.__name__)
        for name in ("q_norm", "k_norm"):
            if not isinstance(getattr(attn, name, nn.Identity()), nn.Identity):
                raise TypeError(f"SLA cannot keep `{name}` of {type(attn).__name__}")
        sla = cls(
            qkv.in_features,
            cast(int, attn.num_heads),
            grid_size=grid_size,
            num_prefix_tokens=num_prefix_tokens,
            kernel_size=kernel_size,
            device=qkv.weight.device,
            dtype=qkv.weight.dtype,
        )
        sla.qkv, sla.proj = qkv, proj
        sla.proj_drop = getattr(attn, "proj_drop", sla.proj_drop)
        return sla.train(attn.training)

    @torch.no_grad()
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Fix a new token grid: the key positions become the resized ones."""
        table = resize_positions(self.positional_encoding, self.grid_size, grid_size)
        self.positional_encoding = nn.Parameter(table.clone(), self.positional_encoding.requires_grad)
        self.grid_size = grid_size

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("SLA sums over all keys at once: it takes no attn_mask and no is_causal=True")
        grid = self.grid_size if grid_size is None else grid_size
        prefix = self.num_prefix_tokens
        expected = prefix + grid[0] * grid[1]
        if x.ndim != 3 or x.shape[1] != expected or x.shape[2] != self.dim:
            raise ValueError(
                f"SLA expects (batch, {expected}, {self.dim}): {prefix} prefix tokens + a {grid[0]}x{grid[1]} grid, "
                f"got {tuple(x.shape)}"
            )
        q, k, v = cast(Tensor, self.qkv(x)).chunk(3, dim=-1)  # B N C each
        positions = resize_positions(self.positional_encoding, self.grid_size, grid)
        k = k + F.pad(positions, (0, 0, prefix, 0))
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))  # B h N d
        local = local_branch(self.dwc, v[:, :, prefix:], grid)
        out = merge_heads(linear_attention(q, k, v) + F.pad(local, (0, 0, prefix, 0)))
        return cast(Tensor, self.proj_drop(self.proj(out)))
