"""p-Adapter: attention as a graph, and one step of p-Laplacian message passing on it behind each attention layer.

Source: Wu et al. 2024, "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models", AAAI 2024,
arXiv 2312.10613, and the released code; the message passing is that of Fu et al. 2022, "p-Laplacian Based Graph Neural
Networks", arXiv 2111.07337. The released attention forward lacks lines (no query projection); it is repaired here.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.attended import Attended, check_readable
from zoo.adapters.base import Adapter, Site
from zoo.adapters.bottleneck import channels_first
from zoo.adapters.low_rank import autocast_on
from zoo.errors import OptionError, SiteError
from zoo.registry import ADAPTERS

EPS = 1e-8


@ADAPTERS.register_module()
class PAdapter(Adapter):
    """y <- y + O_a(GELU(G y) * U), U a p-Laplacian aggregation of projected node features (p-Adapter 2024, eq. 9-12).

    Nodes are the values (self-attention), or the queries and the values (cross-attention, cached decoding), each
    through the layer's own output projection. Not the identity at first; nothing to merge. Cost: the pairwise
    differences take B * N^2 * C / reduction numbers, and q, k, v are projected twice outside of
    nn.MultiheadAttention. As in the released code a cached step aggregates over queries and values as two sides, which
    is not what the same step without a cache gives: decode without one where both must agree.

    Parameters a site of width C, m = C / reduction: 2(C*m + m) + m*C + C, one for p if it is learned, one for mu.

    Args:
        site: an attention module that tells its q, k and v (`attended.check_readable`).
        reduction: C / m.
        p: of the p-Laplacian; initial value where it is learned. Below 1 it is no p-Laplacian: it is held at 1.
        learn_p: let p train.
        mu: mu_0 in mu = mu_0 (2 + tanh theta), theta learned from 0.
        pool: keys of cross-attention are averaged down to this many (the paper's 16 or 24 of an image's tokens).
        self_loops: with p < 2 a token's edge to itself outweighs all others by far (0.999 of the sum at p = 1.25), so
            that little is passed on; False drops these edges.

    Raises:
        OptionError: an option out of range. SiteError: an attention that cannot be read, or a width that reduction and
            heads do not divide.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"attn"})
    default_roles: ClassVar[tuple[str, ...]] = ("attn",)
    attends: ClassVar[bool] = True
    identity = False

    def __init__(
        self,
        site: Site,
        *,
        reduction: int = 8,
        p: float = 1.5,
        learn_p: bool = True,
        mu: float = 0.1,
        pool: int | None = None,
        self_loops: bool = True,
    ) -> None:
        super().__init__(site)
        check_readable(site.module)
        hidden = _reduced(site.out_features, reduction, site)
        heads = getattr(site.module, "num_heads", getattr(site.module, "heads", None))
        if not isinstance(heads, int) or hidden % heads:
            raise SiteError(f"{site.path}: {hidden} channels do not split into {heads} heads; choose another reduction")
        if not (math.isfinite(p) and p >= 1):
            raise OptionError(f"p must be a finite number of at least 1, got {p!r}")
        if not (math.isfinite(mu) and mu > 0):
            raise OptionError(f"mu must be a positive number, got {mu!r}")
        if pool is not None and (isinstance(pool, bool) or not isinstance(pool, int) or pool < 1):
            raise OptionError(f"pool must be a whole number of at least 1, or None, got {pool!r}")
        self.heads, self.mu, self.pool, self.self_loops = heads, mu, pool, self_loops
        self.nodes = nn.Linear(site.out_features, hidden)
        self.gate = nn.Linear(site.out_features, hidden)
        self.up = nn.Linear(hidden, site.out_features)
        _normal(self.nodes, self.gate, self.up)
        self.p = nn.Parameter(torch.tensor([float(p)]), requires_grad=learn_p)
        self.theta = nn.Parameter(torch.zeros(1))

    def after_attention(self, y: Tensor, seen: Attended) -> Tensor:
        """y: (B, L, C), what the attention gave. Graph and aggregation are computed in at least fp32."""
        own = self.up.weight.dtype
        weights, values = attention_weights(seen), seen.v.transpose(1, 2).flatten(2)
        if self.pool is not None and not seen.mutual and not seen.cached:
            pooled = F.adaptive_avg_pool1d(weights.flatten(0, 2), self.pool)
            weights = pooled.reshape(*weights.shape[:3], self.pool)
            values = F.adaptive_avg_pool1d(values.transpose(1, 2), self.pool).transpose(1, 2)
        keys = self._split(seen.out(values))
        queries = keys if seen.mutual else self._split(seen.out(seen.q.transpose(1, 2).flatten(2)))
        with full_precision(y):
            mu = self.mu * (2 + self.theta.float().tanh())
            power = self.p.float().clamp(min=1)
            passed = message_passing(weights, queries, keys, power, mu, own=seen.mutual, self_loops=self.self_loops)
        merged = passed.transpose(1, 2).flatten(2).to(own)
        return y + self.up(F.gelu(self.gate(y.to(own))) * merged).to(y.dtype)

    def _split(self, nodes: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, m / heads) in at least fp32."""
        projected = self.nodes(nodes.to(self.nodes.weight.dtype))
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return wide.reshape(*wide.shape[:2], self.heads, -1).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, mu={self.mu:g}, pool={self.pool}, self_loops={self.self_loops}"


@ADAPTERS.register_module()
class PAdapterFFN(Adapter):
    """y <- FFN(x) + A_2(ReLU(A_1 x)), the bottleneck that the paper puts beside each feed-forward part.

    Parameters: C*m + m + m*C' + C', m = C / reduction. Not the identity at first: all weights are normal with std 0.02.

    Args:
        site: a feed-forward module on tokens (B, N, C).
        reduction: C / m.

    Raises:
        OptionError: a reduction out of range. SiteError: maps (B, C, H, W), or a width that reduction does not divide.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"mlp"})
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)
    identity = False

    def __init__(self, site: Site, *, reduction: int = 8) -> None:
        super().__init__(site)
        if channels_first(site):
            raise SiteError(f"{site.path} works on maps (B, C, H, W); PAdapterFFN takes tokens (B, N, C)")
        hidden = _reduced(site.in_features, reduction, site)
        self.down = nn.Linear(site.in_features, hidden)
        self.up = nn.Linear(hidden, site.out_features)
        _normal(self.down, self.up)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.up(F.relu(self.down(x))).to(y.dtype)


def attention_weights(seen: Attended) -> Tensor:
    """Softmax (B, heads, L, S) in at least fp32, before dropout; a row whose keys are all masked is uniform."""
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (seen.q, seen.k))
    with full_precision(q):
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if seen.mask is not None:
            scores = scores + seen.mask.to(scores.dtype).clamp(min=torch.finfo(scores.dtype).min / 2)
        return scores.softmax(-1)


def message_passing(
    weights: Tensor, queries: Tensor, keys: Tensor, p: Tensor, mu: Tensor, *, own: bool, self_loops: bool = True
) -> Tensor:
    """Re-normalised aggregation: U_i = alpha_i sum_j M_ij F_j (+ alpha_i 2 mu/p F_i), M_ij = A_ij g_ij,
    g_ij = || sqrt(A_ij + e) (F_i - F_j) + e ||^(p-2), alpha_i = 1 / (sum_j M_ij + 2 mu/p).

    weights A: (B, heads, L, S); queries: (B, heads, L, D), keys: (B, heads, S, D), the features of both sides. Of the
    bipartite graph [[0, A], [A^T, 0]] only the rows of the queries are needed, so the rest is never built. own: both
    sides are one set of nodes; then the node's own feature is added, which the released code does only there, and
    `self_loops=False` drops its edge to itself.
    """
    apart = queries[..., :, None, :] - keys[..., None, :, :]
    others = 1 - torch.eye(keys.shape[-2], dtype=keys.dtype, device=keys.device) if own else None
    if others is not None:  # F_i - F_i is zero whatever F is, but its huge gradients would cancel only up to rounding
        apart = apart * others[..., None]
    norm = torch.linalg.vector_norm((weights + EPS).sqrt()[..., None] * apart + EPS, dim=-1)
    edges = weights * norm.pow(p - 2)
    if others is not None and not self_loops:
        edges = edges * others
    pull = 2 * mu / p
    alpha = 1 / (edges.sum(-1, keepdim=True) + pull)
    passed = alpha * (edges @ keys)
    return passed + alpha * pull * queries if own else passed


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast within; device types without it, such as meta, need no switch."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocast_on(kind) else contextlib.nullcontext()


def _reduced(channels: int, reduction: int, site: Site) -> int:
    if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 1:
        raise OptionError(f"reduction must be a whole number of at least 1, got {reduction!r}")
    if channels < 1 or channels % reduction:
        raise SiteError(f"{site.path} has {channels} channels, which a reduction of {reduction} does not divide")
    return channels // reduction


def _normal(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
