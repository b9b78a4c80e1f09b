"""Gated positional self-attention (GPSA): each head mixes content attention with attention by relative position.

    A_c = softmax_k(q k^T / sqrt(d))                              content
    A_p = softmax_k(w_h . (dx, dy, dx^2 + dy^2) + b_h)            position, (dx, dy) = key - query in patches
    A   = (1 - g_h) A_c + g_h A_p,   g_h = sigmoid(gating_param_h);   y = proj(A v)

dx counts columns and dy rows. Two separate softmaxes are mixed; their logits are never added.

The positional logit is a sum of a term in dy and a term in dx, so its softmax over a rectangle is the product of a
softmax over rows and one over columns. A_p v is therefore two small matrix products and A_p is never built, except
where dropout acts on A itself.

Source: ConViT, ICML 2021, arXiv 2103.10697. The paper has neither prefix tokens nor rectangles; what they do here:
a prefix query uses A_c alone; a patch query uses A_c over all tokens and A_p over the patches.
"""

from __future__ import annotations

import inspect
import math
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import ATTENTION


# ---- the position part ----
def relative_offsets(grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """(dx, dy, dx^2 + dy^2) from every query to every key of a row-major grid H x W: fp32 (H*W, H*W, 3)."""
    rows = torch.arange(grid[0], dtype=torch.float32, device=device).repeat_interleave(grid[1])
    columns = torch.arange(grid[1], dtype=torch.float32, device=device).repeat(grid[0])
    dx, dy = columns[None] - columns[:, None], rows[None] - rows[:, None]
    return torch.stack((dx, dy, dx * dx + dy * dy), dim=-1)


def local_stencil(num_heads: int, strength: float = 1.0, kernel: tuple[int, int] | None = None) -> Tensor:
    """Rows of `pos_proj.weight` that make each head look at one cell of a Ky x Kx stencil: fp32 (Ky*Kx, 3).

    Head a + Ky*b gets strength * (2(b - cx), 2(a - cy), -1), whose logit is -strength * |delta - (b - cx, a - cy)|^2
    up to a constant. `kernel` None: the largest square with at most `num_heads` cells, as in the paper.
    Raises ValueError if the stencil has more cells than there are heads.
    """
    height, width = kernel if kernel is not None else (math.isqrt(num_heads),) * 2
    if height < 1 or width < 1 or height * width > num_heads:
        raise ValueError(f"a {height} x {width} stencil needs {height * width} heads, there are {num_heads}")
    a, b = torch.arange(height).repeat(width), torch.arange(width).repeat_interleave(height)
    dx, dy = 2 * b - (width - 1), 2 * a - (height - 1)
    return strength * torch.stack((dx, dy, -torch.ones_like(a)), dim=-1).float()


def positional_factors(weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A_p of every head as (rows (h, H, H), columns (h, W, W)), fp32; A_p is their Kronecker product.

    `weight` (h, 3) and `bias` (h) are those of `pos_proj`. Always fp32: squared distances leave the precision of bf16.
    """
    weight, bias = weight.float(), bias.float()
    dy, dx = (
        (steps[None] - steps[:, None])[None]  # 1 query key
        for steps in (torch.arange(n, dtype=torch.float32, device=weight.device) for n in grid)
    )
    x, y, square = (w[:, None, None] for w in weight.unbind(-1))
    rows = (y * dy + square * dy * dy).softmax(dim=-1)
    # The bias cancels in the softmax; it stays in the graph so that it has a gradient (zero), as in the paper's code.
    columns = (x * dx + square * dx * dx + bias[:, None, None]).softmax(dim=-1)
    return rows, columns


def positional_attention(weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """A_p itself, fp32 (h, H*W, H*W)."""
    rows, columns = positional_factors(weight, bias, grid)
    return torch.einsum("hik,hjl->hijkl", rows, columns).flatten(3, 4).flatten(1, 2)


# ---- the mixture ----
def gated_map(
    q: Tensor, k: Tensor, pos_proj: nn.Linear, gate: Tensor, grid: tuple[int, int], prefix: int = 0
) -> Tensor:
    """A, (B, h, P + N, P + N), from q and k (B, h, P + N, d), gate logits (h) and P prefix tokens; rows sum to 1."""
    content = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    position = F.pad(positional_attention(pos_proj.weight, pos_proj.bias, grid).to(content.dtype), (prefix, 0))
    g = gate.sigmoid().to(content.dtype)[:, None, None]
    return torch.cat((content[:, :, :prefix], (1 - g) * content[:, :, prefix:] + g * position), dim=2)


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, pos_proj: nn.Linear, gate: Tensor, grid: tuple[int, int], prefix: int = 0
) -> Tensor:
    """A v, (B, h, P + N, d), without building A: (1 - g) * SDPA(q, k, v) + g * rows (columns v) on the patches."""
    content = F.scaled_dot_product_attention(q, k, v)
    rows, columns = (factor.to(v.dtype) for factor in positional_factors(pos_proj.weight, pos_proj.bias, grid))
    patches = columns[:, None] @ v[:, :, prefix:].unflatten(2, grid)  # B h H W d
    position = (rows @ patches.flatten(3)).view(patches.shape).flatten(2, 3)
    g = gate.sigmoid().to(v.dtype)[:, None, None]
    mixed = (1 - g) * content[:, :, prefix:] + g * position
    return torch.cat((content[:, :, :prefix], mixed), dim=2) if prefix else mixed


def mean_distance(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far each head looks: mean distance in patches from query to key, attention (B, h, N, N) -> (h)."""
    distances = relative_offsets(grid, attention.device)[..., 2].sqrt()
    return (attention.float().mean(dim=0) * distances).sum(dim=-1).mean(dim=-1)


def attention_linears(attn: nn.Module, replacement: str) -> tuple[nn.Linear, nn.Linear]:
    """`qkv` and `proj` of a timm-style attention that `replacement` may take over.

    Raises TypeError where that would silently drop a part of it: no fused square qkv, a norm or a gate after the
    attention, or further inputs (rotary tables, relative biases, window masks).
    """
    qkv, proj, kind = getattr(attn, "qkv", None), getattr(attn, "proj", None), type(attn).__name__
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
        raise TypeError(f"{replacement} takes over `qkv` and `proj` linears; {kind} lacks one of them")
    if qkv.out_features != 3 * qkv.in_features:
        raise TypeError(f"{replacement} needs q, k, v as wide as the {qkv.in_features} inputs, got {qkv.out_features}")
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) or getattr(attn, "gate", None) is not None:
        raise TypeError(f"{replacement} cannot keep the norm or gate after the attention of {kind}")
    known = {"x", "attn_mask", "is_causal", "grid_size", "args", "kwargs"}
    further = [name for name in inspect.signature(attn.forward).parameters if name not in known]
    if further:
        raise TypeError(f"{replacement} cannot replace {kind}, whose forward also takes {', '.join(further)}")
    return qkv, proj


def take_over(replacement: nn.Module, attn: nn.Module) -> None:
    """Move qkv, proj, query/key norms, dropouts and mode of `attn` (the modules, not copies) into `replacement`."""
    for name in ("qkv", "proj", "q_norm", "k_norm", "attn_drop", "proj_drop"):
        setattr(replacement, name, getattr(attn, name, getattr(replacement, name)))
    replacement.train(attn.training)


@ATTENTION.register_module()
class GPSA(nn.Module):
    """GPSA as a replacement for a ViT's softmax attention; keeps its `qkv`, `proj` and query/key norms.

    (B, P + H*W, C) -> the same, P = `num_prefix_tokens`. New parameters: `pos_proj` (3 -> heads) and `gating_param`
    (heads), 5 a head, independent of the grid, so any rectangle fits; `grid_size` of a call overrides the one given at
    construction. `gate_init` is the gate's logit: 1 in the paper (mostly positional), -4 by default (1.8 % positional)
    because the layer is meant to start near the attention it replaces; lower starts nearer but learns slower.
    `kernel_size` (Ky, Kx) is the local stencil, None for the largest square that the heads can fill; heads beyond the
    stencil start near-uniform. Raises ValueError for heads that do not divide `dim`, a stencil larger than the heads,
    `scale_norm`, masks, and a token count that does not fit the grid. Source: arXiv 2103.10697.
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
        gate_init: float = -4.0,
        locality_strength: float = 1.0,
        kernel_size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"the number of heads must divide the {dim} channels, got {num_heads} heads")
        if scale_norm:
            raise ValueError("GPSA has no norm after its attention: build it with scale_norm=False")
        self.dim, self.num_heads = dim, num_heads
        self.grid_size, self.num_prefix_tokens = grid_size, num_prefix_tokens
        self.gate_init, self.locality_strength, self.kernel_size = gate_init, locality_strength, kernel_size
        norm = (norm_layer or nn.LayerNorm) if qk_norm else nn.Identity
        head = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm, self.k_norm = norm(head).to(device, dtype), norm(head).to(device, dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.pos_proj = nn.Linear(3, num_heads, device=device, dtype=dtype)
        self.gating_param = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_positions()

    @torch.no_grad()
    def reset_positions(self) -> None:
        """Local stencil, zero bias, gates at `gate_init`; `qkv` and `proj` are left alone."""
        stencil = local_stencil(self.num_heads, self.locality_strength, self.kernel_size)
        nn.init.trunc_normal_(self.pos_proj.weight, std=0.02).mul_(self.locality_strength)
        self.pos_proj.weight[: len(stencil)] = stencil.to(self.pos_proj.weight)
        nn.init.zeros_(self.pos_proj.bias)
        self.gating_param.fill_(self.gate_init)

    @classmethod
    def from_attention(
        cls,
        attn: nn.Module,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        gate_init: float = -4.0,
        locality_strength: float = 1.0,
        kernel_size: tuple[int, int] | None = None,
    ) -> Self:
        """GPSA that takes over the modules (not copies) of a timm-style attention: qkv, proj, norms, dropouts.

        Raises TypeError if `attn` is not plain attention with one square qkv, see `attention_linears`.
        """
        qkv, _ = attention_linears(attn, cls.__name__)
        gpsa = cls(
            qkv.in_features,
            cast(int, attn.num_heads),
            grid_size=grid_size,
            num_prefix_tokens=num_prefix_tokens,
            gate_init=gate_init,
            locality_strength=locality_strength,
            kernel_size=kernel_size,
            device=qkv.weight.device,
            dtype=qkv.weight.dtype,
        )
        take_over(gpsa, attn)
        return gpsa

    def _heads(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        prefix = self.num_prefix_tokens
        expected = prefix + grid[0] * grid[1]
        if x.ndim != 3 or x.shape[1] != expected or x.shape[2] != self.dim:
            raise ValueError(
                f"GPSA expects (batch, {expected}, {self.dim}): {prefix} prefix tokens + a {grid[0]}x{grid[1]} grid, "
                f"got {tuple(x.shape)}"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B h N d each
        return self.q_norm(q), self.k_norm(k), v

    def attention_map(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The mixed attention A of `x`, (B, heads, N, N); each row sums to 1."""
        grid = self.grid_size if grid_size is None else grid_size
        q, k, _ = self._heads(x, grid)
        return gated_map(q, k, self.pos_proj, self.gating_param, grid, self.num_prefix_tokens)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("GPSA attends to the whole grid: it takes no attn_mask and no is_causal=True")
        grid = self.grid_size if grid_size is None else grid_size
        q, k, v = self._heads(x, grid)
        if self.training and self.attn_drop.p > 0:  # dropout acts on A, so A must exist
            attention = gated_map(q, k, self.pos_proj, self.gating_param, grid, self.num_prefix_tokens)
            y = self.attn_drop(attention) @ v
        else:
            y = gated_attention(q, k, v, self.pos_proj, self.gating_param, grid, self.num_prefix_tokens)
        return cast(Tensor, self.proj_drop(self.proj(y.transpose(1, 2).flatten(2))))
