"""Layers of iLLaMA (:mod:`backbones.illama`): rotary positions, soft-masked attention, its schedule, RMSNorm, SwiGLU.

Source: "Adapting LLaMA Decoder to Vision Transformer", arXiv 2404.06773 (2024).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn


def rotary_table(
    length: int, head_dim: int, theta: float = 10000.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``m * theta^(-2j/d)``, each ``(length, head_dim / 2)`` fp32, for token index m and pair j."""
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * theta ** (-pair / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2j, 2j+1) of each head; ``(B, N, h, d)`` in and out, computed in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # B N h d/2
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def soft_masked_attention_reference(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """Eq. 2 as written: ``(softmax(q k^T / sqrt(d)) * S) v`` with ``S = rate + (1 - rate) * tril(1)``.

    The softmax runs over all keys, S multiplies afterwards and nothing renormalises: a row of a causal map sums to
    less than 1 except the last. ``q, k, v``: ``(B, h, N, d)``; ``rate``: 0-d in [0, 1]. Returns ``(B, h, N, d)``.
    """
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    past = torch.ones_like(weights[0, 0]).tril()
    return weights * (rate + (1 - rate) * past) @ v


def soft_masked_attention(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """The same as :func:`soft_masked_attention_reference`, exactly, in one fused SDPA call and without an N x N map.

    Every key enters twice: once with its value, visible to queries that may see it, and once with ``rate`` times its
    value, visible to the others. Each query then meets every key exactly once, so the softmax denominator runs over
    all keys, while the value it collects is weighted by 1 (past) or ``rate`` (future). Shapes as in the reference.

    Two flash calls (full and causal) joined by their log-sum-exp are exact too, but need a hand-written backward on
    private ops and were slower on an H200 (ViT-B heads, 256 x 197 tokens, bf16, compiled, forward + backward: this
    2.2 ms, the pair 2.7, the reference 2.6; at 64 x 577: 2.7, 2.8, 4.7).
    """
    past = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    keys, values = torch.cat((k, k), dim=-2), torch.cat((v, rate.to(v.dtype) * v), dim=-2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=torch.cat((past, ~past), dim=-1))


@dataclass(frozen=True)
class SoftMaskSchedule:
    """Soft-mask rate per optimiser iteration; a training hook calls
    ``model.set_soft_mask_rate(schedule.rate_at(iteration))`` before each step.

    ``constant`` holds ``initial_rate`` and ``linear`` falls from it to 0 (both end points included) during the first
    ``cutoff_epochs``; then the rate is 0. ``standard`` keeps ``initial_rate`` for ever: with 1.0 the model stays
    bidirectional. Raises ValueError for an unknown kind, a rate outside [0, 1] or a negative count.
    Source: arXiv 2404.06773, soft mask strategy.
    """

    kind: Literal["constant", "linear", "standard"]
    iterations_per_epoch: int
    cutoff_epochs: int
    initial_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "standard"):
            raise ValueError(f"kind is {self.kind!r}; it must be 'constant', 'linear' or 'standard'")
        if not 0.0 <= self.initial_rate <= 1.0:
            raise ValueError(f"initial_rate is {self.initial_rate}; it must lie in [0, 1]")
        if self.iterations_per_epoch < 1 or self.cutoff_epochs < 0:
            raise ValueError(
                f"iterations_per_epoch must be >= 1 and cutoff_epochs >= 0, "
                f"got {self.iterations_per_epoch} and {self.cutoff_epochs}"
            )

    def rate_at(self, iteration: int) -> float:
        """Rate of a zero-based global iteration."""
        if iteration < 0:
            raise ValueError(f"iteration is {iteration}; it counts from 0")
        if self.kind == "standard":
            return self.initial_rate
        length = self.cutoff_epochs * self.iterations_per_epoch
        if iteration >= length:
            return 0.0
        if self.kind == "constant" or length == 1:
            return self.initial_rate
        return self.initial_rate * (1 - iteration / (length - 1))


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis; the quotient in fp32, cast back before the weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SoftMaskedAttention(nn.Module):
    """Multi-head attention with 1-D RoPE over the token index and the post-softmax soft mask; ``(B, N, D)`` both ways.

    Holds all it needs (the rotary table follows from N, the mask rate is its buffer), so an attention plug-in with
    timm's ``attn(x)`` call can take its place. Source: arXiv 2404.06773, Eq. 2.
    """

    soft_mask_rate: Tensor

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 2:
            raise ValueError(f"dim {dim} over {num_heads} heads must give an even head width, got {dim / num_heads:g}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        # A tensor, not a float: a schedule changes it every iteration, and a float would recompile the graph.
        self.register_buffer("soft_mask_rate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # B N h d
        cos, sin = rotary_table(x.shape[1], self.head_dim, device=x.device)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B h N d
        return self.proj(soft_masked_attention(q, k, v, self.soft_mask_rate).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """``fc2(silu(fc1 x) * fc3 x)`` without biases; ``(B, N, D)`` in and out.

    The hidden width is ``int(2/3 * mlp_ratio * dim)`` rounded up to a multiple of 256 (LLaMA's rule).
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, multiple_of: int = 256) -> None:
        super().__init__()
        hidden = -(-int(2 * int(mlp_ratio * dim) / 3) // multiple_of) * multiple_of
        self.fc1 = nn.Linear(dim, hidden, bias=False)  # gate
        self.fc2 = nn.Linear(hidden, dim, bias=False)  # down
        self.fc3 = nn.Linear(dim, hidden, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """Pre-norm decoder block: attention, then SwiGLU, each in a residual branch with drop path; ``(B, N, D)``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = SoftMaskedAttention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
