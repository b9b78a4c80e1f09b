"""How a module runs its adapters: its class becomes a cached subclass, nothing else about it changes.

`module.__class__ = hosted(type(module), kind)`. The module keeps its parameters, their names, its hooks and its
place in the tree; adapters live in the child `adapters`, and the tuple `_active` holds those that run now. A host's
forward reads no mode flags: another active set means another class or another tuple.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.attended import Attended, attended
from zoo.adapters.base import Adapter, Mode
from zoo.adapters.low_rank import autocast_on, low_rank_linear
from zoo.errors import SiteError


class Host:
    """Mixin of every hosted class; knows the class it stands in for."""

    plain: ClassVar[type[nn.Module]]
    kind: ClassVar[type[Host]]
    weight_name: ClassVar[str]
    _active: tuple[Adapter, ...]
    _parameters: dict[str, nn.Parameter | None]

    def __reduce_ex__(self, protocol: Any) -> Any:  # dynamic classes cannot be found by name when unpickling
        return _rebuild, (self.plain, self.kind, self.weight_name), dict(self.__dict__)


class BranchHost(Host):
    """`before` and `after` around the module's own forward; a tuple output is adapted in its first element."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        branches = self._branches()
        name = None if args else next(iter(kwargs))  # called by keywords only: the first one is the input
        x = args[0] if name is None else kwargs.pop(name)
        for adapter in branches:
            x = _before(adapter, x)
        run = super().forward  # type: ignore[misc]
        y = run(x, *args[1:], **kwargs) if name is None else run(**{name: x}, **kwargs)
        first = y[0] if isinstance(y, tuple) else y
        for adapter in branches:
            if adapter.attends:
                seen = attended(self, x, *args[1:], **kwargs) if name is None else attended(self, **{name: x}, **kwargs)  # type: ignore[arg-type]
                first = adapter.after_attention(first, seen)
            else:
                first = _after(adapter, x, first)
        return (first, *y[1:]) if isinstance(y, tuple) else first

    def _branches(self) -> tuple[Adapter, ...]:
        return self._active


class LowRankHost(Host):
    """A stock `nn.Linear` whose active adapters are all low-rank: one matmul with the updated weight."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        active = self._active
        return low_rank_linear(x, self.weight, self.bias, [a.factors() for a in active], [a.parts for a in active])


class WeightHost(BranchHost):
    """The module's own forward, or whoever reads its weight, sees the updated weight and bias.

    `hosted` adds a property for the weight and one for the bias. A dense weight gradient is formed on the way to the
    adapters, which is why only sites that need it get this host.
    """

    def _branches(self) -> tuple[Adapter, ...]:
        return tuple(a for a in self._active if a.form == "branch")

    def _adapted(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._parameters[self.weight_name], self._parameters.get(bias_name(self.weight_name))
        return updated(weight, bias, [a for a in self._active if a.form != "branch"])  # type: ignore[arg-type]


class AttentionHost(Host):
    """`nn.MultiheadAttention` written out, so that its projections are sites; same parameters, same result.

    Adapters with parts act on the fused input projection, the others on the module as a whole. The output projection
    is called as a module and may be hosted itself.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        mha: Any = self
        if query.dim() != 3:
            raise SiteError(f"an adapted nn.MultiheadAttention takes batched input (B, N, C), got {tuple(query.shape)}")
        whole = [a for a in self._active if not a.parts]
        same = query is key and key is value
        for adapter in whole:
            query = _before(adapter, query)
        key, value = (query, query) if same else (key, value)
        x = query
        q, k, v = self._project(query, key, value) if mha.batch_first else self._project(*_swap(query, key, value))
        mask = _joint_mask(attn_mask, key_padding_mask, q, k, is_causal)
        dropout = mha.dropout if mha.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(mha.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = mha.out_proj(out.transpose(1, 2).flatten(2))  # B N C
        for adapter in whole:
            if adapter.attends:
                y = adapter.after_attention(y, Attended(q, k, v, mask, mha.out_proj, same))
        y = y if mha.batch_first else y.transpose(0, 1)
        for adapter in whole:
            y = y if adapter.attends else _after(adapter, x, y)
        if not need_weights:
            return y, None
        return y, weights.mean(1) if average_attn_weights else weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (B, heads, N, head_dim)."""
        mha: Any = self
        weight, bias = self._parameters["in_proj_weight"], self._parameters.get("in_proj_bias")
        inner = [a for a in self._active if a.parts]
        if query is key and key is value:
            low_rank = [a for a in inner if a.form == "low_rank"]
            adapted, moved = updated(weight, bias, [a for a in inner if a.form == "weight"])  # type: ignore[arg-type]
            if low_rank:
                fused = low_rank_linear(
                    query, adapted, moved, [a.factors() for a in low_rank], [a.parts for a in low_rank]
                )
            else:
                fused = F.linear(query, adapted, moved)
            for adapter in inner:
                if adapter.form == "branch":
                    fused = _after(adapter, query, fused)
            projected = fused.chunk(3, -1)
        else:
            dense, moved = updated(weight, bias, inner)  # type: ignore[arg-type]
            biases = moved.chunk(3) if moved is not None else (None, None, None)
            pairs = zip((query, key, value), dense.chunk(3), biases, strict=True)
            projected = tuple(F.linear(x, w, b) for x, w, b in pairs)
        heads = (*query.shape[:1], -1, mha.num_heads, mha.head_dim)
        q, k, v = (p.reshape(heads).transpose(1, 2) for p in projected)
        return q, k, v


def updated(weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias after the adapters' updates, in order."""
    for adapter in adapters:
        bias = adapter.rebias(weight, bias)
        weight = adapter.reweight(weight)
    return weight, bias


def bias_name(weight_name: str) -> str:
    """`weight` -> `bias`, `in_proj_weight` -> `in_proj_bias`."""
    return weight_name.removesuffix("weight") + "bias"


def settle(module: nn.Module, mode: Mode, weight_name: str, active: Sequence[Adapter]) -> None:
    """Give `module` the host that runs `active`, or its plain class back when nothing runs."""
    plain = module.plain if isinstance(module, Host) else type(module)
    module.__dict__["_active"] = tuple(active)
    kind = _kind(module, plain, mode, active)
    module.__class__ = plain if kind is None else hosted(plain, kind, weight_name)
    if kind is None:
        del module.__dict__["_active"]


def _kind(module: nn.Module, plain: type[nn.Module], mode: Mode, active: Sequence[Adapter]) -> type[Host] | None:
    # Adapters of the whole attention and of its projections share one host, whichever came first.
    packed = plain.forward is nn.MultiheadAttention.forward and module._parameters["in_proj_weight"] is not None
    if mode == "mha" or (mode == "branch" and packed):
        out_hosted = isinstance(module.out_proj, Host)
        return AttentionHost if active or out_hosted else None
    if not active:
        return None
    forms = {adapter.form for adapter in active}
    if mode == "weight" or "weight" in forms:
        return WeightHost
    if forms == {"low_rank"} and plain.forward is nn.Linear.forward:
        return LowRankHost
    return BranchHost


_CLASSES: dict[tuple[Any, Any, str], type[nn.Module]] = {}


def hosted(plain: type[nn.Module], kind: type[Host], weight_name: str = "weight") -> type[nn.Module]:
    """The subclass of `plain` that runs adapters the way of `kind`; one class for each combination."""
    key = (plain, kind, weight_name)
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(plain, kind, weight_name)
    return _CLASSES[key]


def _make_class(plain: type[nn.Module], kind: type[Host], weight_name: str) -> type[nn.Module]:
    members: dict[str, Any] = {
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
        "plain": plain,
        "kind": kind,
        "weight_name": weight_name,
    }
    if kind is WeightHost:
        members[weight_name] = property(lambda self: self._adapted()[0])
        members[bias_name(weight_name)] = property(lambda self: self._adapted()[1])
    return type(plain.__name__, (kind, plain), members)


def _rebuild(plain: type[nn.Module], kind: type[Host], weight_name: str) -> nn.Module:
    cls = hosted(plain, kind, weight_name)
    return cls.__new__(cls)


def _before(adapter: Adapter, x: Tensor) -> Tensor:
    return adapter.before(x)


def _after(adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
    """`after` in the adapter's own precision: fp32 adapters on a bf16 backbone train well, bf16 ones do not."""
    dtype = adapter.dtype()
    if dtype is None or dtype == y.dtype or autocast_on(y.device.type):
        return adapter.after(x, y)
    return adapter.after(x.to(dtype), y.to(dtype)).to(y.dtype)


def _swap(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(N, B, C) -> (B, N, C), keeping identity between equal inputs."""
    swapped = {id(t): t.transpose(0, 1) for t in tensors}
    return tuple(swapped[id(t)] for t in tensors)


def _joint_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool
) -> Tensor | None:
    """nn.MultiheadAttention's masks (True = hidden) as one additive mask that broadcasts to (B, heads, N, S)."""
    batch, heads, length, source = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    mask: Tensor | None = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        mask = mask.reshape(batch, heads, length, source) if mask.dim() == 3 else mask
    elif is_causal:
        mask = _additive(torch.ones(length, source, dtype=torch.bool, device=q.device).triu(1), q.dtype)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
