"""The pieces of LoLA-SpecViT: gated LoRA linear, SwiGLU, squeeze-excite, halving, padded windows, the block.

Source: "LoLA-SpecViT: Local Attention SwiGLU Vision Transformer with LoRA for Hyperspectral Imaging", 2025, arXiv
2506.17759, with the authors' program as the authority where the text is silent. Parameter names are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.errors import OptionError


class GatedLoRALinear(nn.Module):
    """y = W x + b + sigmoid(G x) * (alpha / r) * Up Down x + R x; G and R are full (out, in) matrices, none has a bias.

    A layer alone starts at y = W x + b + R x (Up is zero). `LoLASpecViT` initialises all of its linears anew, as the
    authors' model does, so there the low-rank term is not zero at the start.

    Args:
        rank, alpha: r and the numerator of the scale.
        gate, residual: whether G and R exist; without both this is plain LoRA, which `merged` folds away.
        gate_rank: G as a product of two matrices of this rank; None keeps it full.

    Raises:
        OptionError: a rank below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        gate: bool = True,
        residual: bool = True,
        gate_rank: int | None = None,
    ) -> None:
        super().__init__()
        if rank < 1 or (gate_rank is not None and gate_rank < 1):
            raise OptionError(f"rank and gate_rank must be at least 1, got rank={rank}, gate_rank={gate_rank}")
        self.in_features, self.out_features = in_features, out_features
        self.scale = alpha / rank
        self.linear = nn.Linear(in_features, out_features)
        self.lora_down = nn.Linear(in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, out_features, bias=False)
        self.lora_gate: nn.Module | None = None
        if gate:
            self.lora_gate = _gate(in_features, out_features, gate_rank)
        self.lora_residual = nn.Linear(in_features, out_features, bias=False) if residual else None
        nn.init.zeros_(self.lora_up.weight)

    def added(self) -> list[nn.Module]:
        """The modules beside the base linear: what trains when the rest is frozen."""
        parts = (self.lora_down, self.lora_up, self.lora_gate, self.lora_residual)
        return [part for part in parts if part is not None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.linear(x)
        low = self.scale * self.lora_up(self.lora_down(x))
        y = y + (low if self.lora_gate is None else torch.sigmoid(self.lora_gate(x)) * low)
        return y if self.lora_residual is None else y + self.lora_residual(x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear of the same function: W + s Up Down + R.

        Raises:
            OptionError: with a gate; its term depends on the input, so no weight can hold it.
        """
        if self.lora_gate is not None:
            raise OptionError("a gated LoRA layer has no exact merge: the gate depends on the input")
        layer = nn.Linear(self.in_features, self.out_features).to(self.linear.weight)
        weight = self.linear.weight + self.scale * self.lora_up.weight @ self.lora_down.weight
        layer.weight.copy_(weight if self.lora_residual is None else weight + self.lora_residual.weight)
        layer.bias.copy_(self.linear.bias)
        return layer


def _gate(in_features: int, out_features: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(in_features, out_features, bias=False)
    return nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=False))


@dataclass(frozen=True)
class LoRAOptions:
    """How the linears of a model are made: gated LoRA layers with these numbers."""

    rank: int = 16
    alpha: float = 32.0
    gate: bool = True
    residual: bool = True
    gate_rank: int | None = None

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """A layer inside a block."""
        return GatedLoRALinear(
            in_features, out_features,
            rank=self.rank, alpha=self.alpha, gate=self.gate, residual=self.residual, gate_rank=self.gate_rank,
        )  # fmt: skip

    def head(self, in_features: int, out_features: int) -> nn.Module:
        """The classifier: plain LoRA, without gate and residual."""
        return GatedLoRALinear(
            in_features, out_features, rank=self.rank, alpha=self.alpha, gate=False, residual=False
        )  # fmt: skip


MakeLinear = Callable[[int, int], nn.Module]


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), all three with bias (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, in_features: int, hidden: int, out_features: int, make: MakeLinear = nn.Linear) -> None:
        super().__init__()
        self.w1 = make(in_features, hidden)
        self.w2 = make(in_features, hidden)
        self.w3 = make(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class ChannelExcite(nn.Module):
    """Squeeze-excite over all axes behind the channels: (B, C, ...) -> the same."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same, each channel scaled by a number in (0, 1)."""
        scale = self.fc(x.flatten(2).mean(-1))
        return x * scale.reshape(*scale.shape, *([1] * (x.ndim - 2)))


class BandDropout(nn.Module):
    """Zeroes whole (sample, channel, band) planes of (B, C, K, H, W) while training, the rest scaled by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, K, H, W) -> the same."""
        if not self.training or self.p == 0:
            return x
        keep = torch.empty(*x.shape[:3], 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class CentreSpectrum(nn.Sequential):
    """One spectrum through three strided 1-D convolutions and a linear map: (B, K) -> (B, C)."""

    def __init__(self, bands: int, width: int, dropout: float = 0.2) -> None:
        layers: list[nn.Module] = [nn.Unflatten(1, (1, bands))]
        for inputs, outputs, kernel in ((1, 16, 11), (16, 32, 7), (32, 64, 5)):
            layers += [nn.Conv1d(inputs, outputs, kernel, 2, kernel // 2), nn.BatchNorm1d(outputs), nn.SiLU()]
            bands = -(-bands // 2)
        super().__init__(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(64 * bands, width))


class ReduceSize(nn.Module):
    """Halves the grid and doubles the channels: (B, C, H, W) -> (B, 2C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
            nn.SiLU(),
            ChannelExcite(dim),
            nn.Conv2d(dim, 2 * dim, 1, bias=False),
        )
        self.norm = nn.BatchNorm2d(2 * dim)
        self.reduction = nn.Conv2d(2 * dim, 2 * dim, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self.conv(x)))


class SpecWindowAttention(nn.Module):
    """Attention among the tokens of one window, with a learned bias for each offset: (B * windows, N, C) -> the same.

    `mask` (windows, N) is True at real tokens; None lets padding attend and be attended to, as the authors do.
    """

    def __init__(self, dim: int, window: int, num_heads: int, make: MakeLinear) -> None:
        super().__init__()
        if dim % num_heads:
            raise OptionError(f"a width of {dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", _offsets(window), persistent=False)
        self.qkv = make(dim, 3 * dim)
        self.proj = make(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B h N d each
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if mask is not None:
            hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
            bias = bias + hidden.repeat(len(x) // len(mask), 1)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


def _offsets(window: int) -> Tensor:
    """(N, N) row of the bias table for each pair of tokens."""
    at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None, :] + window - 1
    return apart[0] * (2 * window - 1) + apart[1]


class SpecBlock(nn.Module):
    """x + attn(norm1 x), then x + mlp(norm2 x), on (B, H, W, C); windows are padded at the bottom and right.

    Args:
        window: side of a window. mask_padding: keep padding tokens out of the attention.
        make: makes the linears. mlp_hidden: width between the MLP's outer linears.
        lean: the MLP is one SwiGLU of hidden width `mlp_hidden`; otherwise the authors' chain of an expanding
            linear, a SwiGLU at full width, and a contracting linear.
        drop_path: probability of dropping each of the two branches.
    """

    def __init__(
        self,
        dim: int,
        window: int,
        num_heads: int,
        *,
        make: MakeLinear,
        mlp_hidden: int,
        lean: bool,
        mask_padding: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window, self.mask_padding = window, mask_padding
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SpecWindowAttention(dim, window, num_heads, make)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp: nn.Module
        if lean:
            self.mlp = SwiGLU(dim, mlp_hidden, dim, make)
        else:  # the place of the authors' dropout of rate 0 keeps their numbering
            middle = (SwiGLU(mlp_hidden, mlp_hidden, mlp_hidden), nn.Identity())
            self.mlp = nn.Sequential(make(dim, mlp_hidden), *middle, make(mlp_hidden, dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        side = self.window
        bottom, right = -height % side, -width % side
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
        mask = None
        if self.mask_padding and (bottom or right):
            real = F.pad(torch.ones(height, width, dtype=torch.bool, device=x.device), (0, right, 0, bottom))
            mask = _windows(real[None, :, :, None], side).squeeze(-1)
        rows, columns = (height + bottom) // side, (width + right) // side
        y = self.attn(_windows(x, side), mask)
        y = y.reshape(batch, rows, columns, side, side, channels).transpose(2, 3)
        return y.reshape(batch, rows * side, columns * side, channels)[:, :height, :width]


def _windows(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, side * side, C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels).transpose(2, 3)
    return x.reshape(-1, side * side, channels)
