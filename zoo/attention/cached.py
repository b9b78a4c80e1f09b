"""Multi-head attention of a text decoder: to itself with a cache of keys and values, or to another sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.attended import Attended
from zoo.errors import OptionError

Cache = tuple[Tensor, Tensor]


class CachedAttention(nn.Module):
    """(x, context, mask, cache) -> (y, cache); x: (B, L, C), y: (B, L, C).

    context: (B, S, context_width) for cross-attention. mask: additive, broadcast to (B, heads, L, S). cache: keys and
    values (B, heads, S, D) of earlier tokens, which the new ones are appended to; the returned one includes them.

    Raises:
        OptionError: heads that do not divide the width, or a cache for cross-attention.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise OptionError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(context_width or width, width)
        self.v_proj = nn.Linear(context_width or width, width)
        self.out_proj = nn.Linear(width, width)

    def attended(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Attended:
        """Queries, and all keys and values, cached ones first."""
        if context is not None and cache is not None:
            raise OptionError("a cache holds earlier tokens of x; cross-attention has none")
        source = x if context is None else context
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return Attended(q, k, v, mask, self.out_proj, context is None and cache is None, cache is not None)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        seen = self.attended(x, context, mask, cache)
        merged = F.scaled_dot_product_attention(seen.q, seen.k, seen.v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.out_proj(merged), (seen.k, seen.v)
