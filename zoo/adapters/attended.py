"""What an attention call computed on the way, for adapters that need more of it than input and output.

An adapter that sets `attends` gets `after_attention(y, seen)` in place of `after(x, y)`. In an `nn.MultiheadAttention`
the host has q, k and v at hand. Elsewhere they are projected a second time, which costs the qkv matmul of that layer
again (about a quarter of an attention layer's own multiplications), because fused kernels keep them to themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.layers import Attention
from torch import Tensor, nn

from zoo.errors import SiteError


class Attended(NamedTuple):
    """q: (B, heads, L, D); k, v: (B, heads, S, D), scaled dot products to come; mask: additive, or None.

    out: the output projection, (..., heads * D) -> (..., C). mutual: queries and keys are the same tokens, so that
    attention is a graph on one set of nodes; False for cross-attention and for decoding with a cache (`cached`).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    out: Callable[[Tensor], Tensor]
    mutual: bool
    cached: bool = False


def attended(module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
    """Project q, k and v of one call of an attention module again.

    A module may say it itself by a method `attended` that takes the arguments of its forward.

    Raises:
        SiteError: an attention that cannot be read, or a mask whose form is unknown.
    """
    own = getattr(module, "attended", None)
    if callable(own):
        seen: Attended = own(*args, **kwargs)
        return seen
    check_readable(module)
    if len(args) > 1 or any(value is not None and value is not False for value in kwargs.values()):
        raise SiteError(f"{type(module).__name__} was called with a mask, which an adapter that attends cannot read")
    stock: Any = module
    x: Tensor = args[0] if args else kwargs["x"]
    shape = (*x.shape[:2], 3, stock.num_heads, stock.head_dim)
    q, k, v = stock.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
    return Attended(stock.q_norm(q), stock.k_norm(k), v, None, stock.proj, True)


def check_readable(module: nn.Module) -> None:
    """Raise `SiteError` for an attention whose q, k, v and output projection are not known."""
    if isinstance(module, nn.MultiheadAttention) or callable(getattr(module, "attended", None)):
        return
    stock = isinstance(module, Attention) and getattr(type(module), "plain", type(module)).forward is Attention.forward
    if not stock or module.gate is not None or not isinstance(module.norm, nn.Identity):
        raise SiteError(
            f"{type(module).__name__} does not tell its q, k and v: nn.MultiheadAttention and timm's plain Attention "
            "do, and any module with a method `attended` (zoo/adapters/attended.py)"
        )
