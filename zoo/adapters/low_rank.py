"""How a low-rank update runs: one matmul with the updated weight, and its own backward.

The usual branch form, y = W x + B A x, reads every token twice more and saves more than it must. Here the update is
added to the weight (O x I numbers, far fewer than the tokens' activations) and one matmul does the rest:

    forward   M = W + sum_i B_i A_i        y  = x M^T + b
    backward  dx = g M                      dB = g^T (x A^T)        dA = (g B)^T x

Only x is saved, M is rebuilt in the backward, and the dense gradient of W, which autograd would form on the way to
A and B, never exists. For the dropout case the branch form is kept, since there the update sees another input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.adapters.base import Factors, Part, assemble, stack_rows, take_rows

Parts = tuple[Part, ...]


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Factors], parts: Sequence[Parts]
) -> Tensor:
    """y = x (W + sum of updates)^T + b in one matmul.

    x: (..., I); weight: (O, I), never given a gradient through this path unless it requires one; bias: (O,) or None;
    factors: one a adapter, `parts[i]` says which rows `factors[i]` updates. Returns (..., O) in x's dtype, or in the
    autocast dtype where autocast is on.
    """
    flat = [tensor for factor in factors for tensor in factor]
    kind = x.device.type
    if autocast_on(kind):
        with torch.autocast(kind, enabled=False):  # the sum must be formed in full precision
            return _run(x.to(torch.get_autocast_dtype(kind)), weight, bias, tuple(parts), flat)
    return _run(x, weight, bias, tuple(parts), flat)


def autocast_on(kind: str) -> bool:
    """Whether autocast is on for a device type; False for those that have none, such as meta."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[Parts, ...], flat: Sequence[Tensor]) -> Tensor:
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if frozen and torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in flat)):
        result: Tensor = _LowRankLinear.apply(x, weight, bias, parts, *flat)
        return result
    return F.linear(x, _updated(weight, parts, flat, x.dtype), None if bias is None else bias.to(x.dtype))


def _updated(weight: Tensor, parts: Sequence[Parts], flat: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """M in `dtype`: the sum is formed in the wider of the two precisions and rounded once."""
    for i, part in enumerate(parts):
        weight = weight + assemble(Factors(flat[2 * i], flat[2 * i + 1]), part, weight.shape[0])
    return weight.to(dtype)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[Parts, ...], *flat: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *flat)
        ctx.parts = parts
        return F.linear(x, _updated(weight, parts, flat, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *flat = ctx.saved_tensors
        dx = grad @ _updated(weight, ctx.parts, flat, grad.dtype) if ctx.needs_input_grad[0] else None
        x2, g2 = x.flatten(0, -2), grad.flatten(0, -2)
        out: list[Tensor | None] = []
        for i, parts in enumerate(ctx.parts):
            out += _factor_gradients(x2, g2, Factors(flat[2 * i], flat[2 * i + 1]), parts)
        return (dx, None, None, None, *out)


def _factor_gradients(x: Tensor, grad: Tensor, factors: Factors, parts: Parts) -> tuple[Tensor, Tensor]:
    rank = factors.up.shape[1]
    down, up = factors.down.to(x.dtype), factors.up.to(x.dtype)
    seen = x @ down.t()  # tokens, P*r
    d_down, d_up = [], []
    for part, z, up_p in zip(parts, seen.split(rank, 1), up.split([p.width for p in parts], 0), strict=True):
        g = take_rows(grad, part, 1)
        d_up.append(g.t() @ z)
        d_down.append((g @ up_p).t() @ x)
    joined = (torch.cat(d_down), torch.cat(d_up)) if len(parts) > 1 else (d_down[0], d_up[0])
    return joined[0].to(factors.down.dtype), joined[1].to(factors.up.dtype)


def branch_linear(x: Tensor, y: Tensor, factors: Factors, parts: Parts) -> Tensor:
    """The branch form: y plus the update applied to x. x: (..., I); y: (..., O)."""
    z = F.linear(x, factors.down)
    blocks = [F.linear(h, up) for h, up in _by_part(z, factors, parts, -1)]
    return y + stack_rows(blocks, parts, y.shape[-1], y.dim() - 1)


def branch_conv(x: Tensor, y: Tensor, factors: Factors, parts: Parts, conv: ConvGeometry) -> Tensor:
    """The branch form of an ungrouped convolution: the same kernel area to P*r channels, then 1x1 to the outputs.

    x: (B, C, *space); y: (B, O, *space').
    """
    dims = len(conv.kernel)
    run = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    kernel = factors.down.reshape(factors.down.shape[0], x.shape[1], *conv.kernel)
    z = run(x, kernel, None, conv.stride, conv.padding, conv.dilation)
    ones = (1,) * dims
    blocks = [run(h, up.reshape(*up.shape, *ones)) for h, up in _by_part(z, factors, parts, 1)]
    return y + stack_rows(blocks, parts, y.shape[1], 1)


def _by_part(z: Tensor, factors: Factors, parts: Parts, dim: int) -> list[tuple[Tensor, Tensor]]:
    rank = factors.up.shape[1]
    ups = factors.up.split([part.width for part in parts], 0)
    return list(zip(z.split(rank, dim), ups, strict=True))


class ConvGeometry:
    """Kernel, stride, padding and dilation of a stock, ungrouped convolution."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.kernel: tuple[int, ...] = tuple(conv.kernel_size)
        self.stride: Any = conv.stride
        self.padding: Any = conv.padding
        self.dilation: Any = conv.dilation

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the branch form computes what the module does (subclasses pad or standardise in their own way)."""
        stock = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        plain = getattr(type(module), "plain", type(module))  # the class behind a host
        return (
            isinstance(module, stock)
            and plain.forward in {kind.forward for kind in stock}
            and module.groups == 1
            and module.padding_mode == "zeros"
        )
