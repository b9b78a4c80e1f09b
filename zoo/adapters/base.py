"""The adapter protocol: what a site offers and what an adapter may do there.

An adapter overrides as few of these as its method needs:

    before(x)         block input -> block input                (prompts)
    after(x, y)       (site input, site output) -> output       (branches, bottlenecks, scale-shift)
    factors()         (A, B) of a low-rank weight update         (LoRA and its kin; gives after, delta and speed)
    delta(weight)     a dense weight update                      (any other mergeable method)
    reweight(weight)  the adapted weight itself                  (methods that are not a sum: DoRA, scale-shift)

Shape letters: B batch, N tokens, C channels, I and O a weight's input and output width (for a convolution
I = C_in / groups * kernel area), r rank, P parts of a fused weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import SiteError

if TYPE_CHECKING:
    from zoo.adapters.attended import Attended

Mode = Literal["branch", "weight", "mha"]
Form = Literal["low_rank", "branch", "weight"]


@dataclass(frozen=True)
class Part:
    """Output rows of a weight that play one role, e.g. the `q` rows of a fused qkv.

    `rows` holds half-open ranges: one for contiguous layouts, one a head for interleaved layouts (LeViT, TinyViT).
    """

    role: str
    rows: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True)
class Site:
    """A place in a model where an adapter can sit.

    Attributes:
        path: dotted module path; "" is the model itself.
        role: `q k v out fc1 fc2 conv norm block attn mlp embed head linear`; a fused weight has role `qkv`.
        depth: index of the transformer block or conv stage block that holds it, None outside of blocks.
        module: the module itself.
        in_features, out_features: channels in and out; 0 where a module has no such notion (blocks of odd nets).
        parts: the roles inside the weight; a plain layer has one part over all rows.
        mode: how the host runs it. `branch` wraps the forward; `weight` turns `weight` into base + update, for
            layers whose forward is bypassed; `mha` re-expresses nn.MultiheadAttention so that its projections are
            sites.
        weight: name of the adapted parameter (`in_proj_weight` for nn.MultiheadAttention).
    """

    path: str
    role: str
    depth: int | None
    module: nn.Module = field(repr=False, compare=False)
    in_features: int
    out_features: int
    parts: tuple[Part, ...] = ()
    mode: Mode = "branch"
    weight: str = "weight"

    def only(self, roles: Iterable[str]) -> Site:
        """The same site restricted to some of its parts."""
        return replace(self, parts=tuple(p for p in self.parts if p.role in set(roles)))

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the adapted parameter; raises `SiteError` if the site has none."""
        parameter = self.module._parameters.get(self.weight)
        if parameter is None:
            raise SiteError(f"{self.path or 'the model'} ({type(self.module).__name__}) has no parameter {self.weight}")
        return parameter.shape

    @property
    def flat_in(self) -> int:
        """I: width of the weight seen as a matrix (O, I)."""
        return self.weight_shape[1:].numel()


class Factors(NamedTuple):
    """A low-rank update by parts: rows of part p get `up_p @ down_p`, scale already inside `up`.

    down: (P*r, I); up: (sum of the part widths, r), parts stacked in the order of `Site.parts`.
    """

    down: Tensor
    up: Tensor


class Adapter(nn.Module):
    """Base of every adapter: does nothing until a method overrides one of the hooks above.

    Class attributes:
        roles: site roles the method can sit on; `attach` uses `default_roles` when the caller gives no `where`, and
            `fallback_roles` too on models that have none of these.
        mergeable: the adapter can be folded into the site's weight (and bias): `reweight` and `rebias` are exact.
        attends: at an attention module, `after_attention` runs in place of `after` (zoo/adapters/attended.py).
        identity: a freshly built adapter leaves the model's output unchanged.
        form: how the host runs it; an instance may set its own (LoRA with dropout is a branch).
            "low_rank": `factors` is implemented and the host may use its one-matmul form (`after` is the fallback).
            "branch": `before` and `after` around the module's own forward.
            "weight": the module's own forward runs with `reweight(weight)` and `rebias(weight, bias)`.
    """

    roles: ClassVar[frozenset[str]] = frozenset()
    default_roles: ClassVar[tuple[str, ...]] = ()
    fallback_roles: ClassVar[tuple[str, ...]] = ()
    mergeable: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    identity: bool = True
    form: Form = "branch"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.parts = site.parts

    @classmethod
    def bank(cls, sites: Sequence[Site], **options: object) -> nn.Module | None:
        """A module of tensors shared by all sites, owned once by the model's root; None if nothing is shared."""
        return None

    def dtype(self) -> torch.dtype | None:
        """Precision the adapter computes in; None if it holds no floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def after_attention(self, y: Tensor, seen: Attended) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not attend")

    def factors(self) -> Factors:
        raise NotImplementedError(f"{type(self).__name__} is not low-rank")

    def delta(self, weight: Tensor) -> Tensor:
        """The update in the weight's own shape and dtype; by default from `factors`."""
        return assemble(self.factors(), self.parts, weight.shape[0]).to(weight.dtype).reshape(weight.shape)

    def reweight(self, weight: Tensor) -> Tensor:
        """The adapted weight; by default weight + delta."""
        return weight + self.delta(weight)

    def rebias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The adapted bias given the unadapted weight and bias; by default unchanged."""
        return bias


def link_bank(adapter: Adapter, bank: nn.Module | None) -> None:
    """Give an adapter its bank without registering it there (the root owns it; a tuple hides it from nn.Module)."""
    adapter.__dict__["_bank"] = (bank,)


def stack_rows(blocks: Sequence[Tensor], parts: Sequence[Part], size: int, dim: int) -> Tensor:
    """Place each part's rows at their positions along `dim`, zeros elsewhere.

    blocks: one tensor a part, with `part.width` entries along `dim`. Built from slices and one `cat` so that it
    differentiates, compiles and exports; contiguous full-cover parts cost nothing.
    """
    pieces: list[tuple[int, int, Tensor]] = []
    for part, block in zip(parts, blocks, strict=True):
        offset = 0
        for start, stop in part.rows:
            pieces.append((start, stop, block.narrow(dim, offset, stop - start)))
            offset += stop - start
    pieces.sort(key=lambda piece: piece[0])
    filled: list[Tensor] = []
    at = 0
    for start, stop, piece in pieces:
        if start > at:
            filled.append(_zeros(piece, start - at, dim))
        filled.append(piece)
        at = stop
    if at < size:
        filled.append(_zeros(pieces[-1][2], size - at, dim))
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim)


def take_rows(tensor: Tensor, part: Part, dim: int) -> Tensor:
    """The entries of one part along `dim` (the inverse of `stack_rows` for that part)."""
    slices = [tensor.narrow(dim, start, stop - start) for start, stop in part.rows]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim)


def assemble(factors: Factors, parts: Sequence[Part], size: int) -> Tensor:
    """The dense update (O, I) of low-rank factors, zeros in rows that no part covers."""
    rank = factors.up.shape[1]
    ups = factors.up.split([part.width for part in parts], 0)
    return stack_rows([up @ down for up, down in zip(ups, factors.down.split(rank, 0), strict=True)], parts, size, 0)


def _zeros(like: Tensor, count: int, dim: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = count
    return like.new_zeros(shape)
