"""Visual prompt tuning: trained tokens beside the patches, in front of every block (deep) or of the first (shallow).

Source: Jia et al. 2022, "Visual Prompt Tuning", eq. 4-5 (shallow) and 6-7 (deep), and the released initial values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site
from zoo.errors import OptionError, SiteError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class VPT(Adapter):
    """Prompt tokens in the blocks of a plain transformer (VPT 2022), deep or shallow.

    Deep: each chosen block reads [x, p] with its own prompts p and drops their outputs. Shallow: the prompts enter in
    front of the first chosen block, pass through all of them, and are dropped behind the last.

    Prompts stand behind the model's own tokens, so class, distillation and register tokens keep their index however
    many there are. The paper puts them between class token and patches; attention that knows no positions gives the
    same outputs for both. Blocks that do know positions (relative bias, rotary embedding, windows, fixed token count)
    are refused. A text tower's mask comes from outside its blocks, so for a CLIP give `where="visual.*"`.

    Between its blocks a model with shallow prompts carries the prompts as well, so `forward_intermediates` is for deep
    prompts only.

    Parameters: tokens * C a block (deep), tokens * C in all, held by the first block (shallow); drawn uniformly from
    +-sqrt(6 / (3 * patch_size^2 + C)). Never the identity: a softmax over more tokens is another function.

    Args:
        site: a `block` site, `(B, N, C) -> (B, N, C)`.
        tokens: number of prompts; the paper tunes it over {1, 5, 10, 50, 100, 200}.
        deep: prompts of their own in every block.
        dropout: on the prompts while training.
        patch_size: the backbone's patch side in pixels; only sets the range of the initial values.
        bank: what `bank` returned, given by `attach` for shallow prompts.

    Raises:
        OptionError: an option out of range.
        SiteError: a block that does not take any number of tokens; with shallow prompts, blocks of several stacks.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"block"})
    default_roles: ClassVar[tuple[str, ...]] = ("block",)
    identity = False

    def __init__(
        self,
        site: Site,
        *,
        tokens: int = 10,
        deep: bool = True,
        dropout: float = 0.0,
        patch_size: int = 16,
        bank: Stack | None = None,
    ) -> None:
        super().__init__(site)
        _check_options(tokens, dropout, patch_size)
        _check_block(site, tokens)
        self.tokens = tokens
        self.drop = nn.Dropout(dropout)
        self.enters = bank is None or bank.first == site.path
        self.leaves = bank is None or bank.last == site.path
        if not deep and bank is None:
            raise OptionError("shallow prompts need the stack that `VPT.bank(sites, deep=False)` returns; use `attach`")
        if self.enters:
            bound = math.sqrt(6 / (3 * patch_size**2 + site.in_features))
            self.prompts = nn.Parameter(torch.empty(tokens, site.in_features).uniform_(-bound, bound))

    @classmethod
    def bank(cls, sites: Sequence[Site], **options: object) -> nn.Module | None:
        """Where shallow prompts enter and leave; None for deep ones."""
        if options.get("deep", True):
            return None
        if len({site.path.rpartition(".")[0] for site in sites}) > 1:
            raise SiteError(
                f"shallow prompts pass through one stack of blocks, but these sites lie in several: {sites[0].path} .. "
                f"{sites[-1].path}; choose the blocks of one with `where`"
            )
        return Stack(sites)

    def before(self, x: Tensor) -> Tensor:
        if not self.enters:
            return x
        prompts: Tensor = self.drop(self.prompts)
        prompts = prompts.to(x.dtype).unsqueeze(0).expand(x.shape[0], -1, -1)
        return torch.cat([x, prompts], 1)  # B N+P C

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y.narrow(1, 0, y.shape[1] - self.tokens) if self.leaves else y


class Stack(nn.Module):
    """The first and the last block that shallow prompts pass through. Holds no tensors."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        ordered = sorted(sites, key=lambda site: -1 if site.depth is None else site.depth)
        self.first, self.last = ordered[0].path, ordered[-1].path


def _check_options(tokens: object, dropout: float, patch_size: object) -> None:
    for name, value in (("tokens", tokens), ("patch_size", patch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0.0 <= dropout < 1.0:
        raise OptionError(f"dropout must be in [0, 1), got {dropout!r}")


def _check_block(site: Site, tokens: int) -> None:
    """Run the block on token sequences of two lengths: only a block that knows no positions takes both."""
    module, where = site.module, f"{site.path} ({type(site.module).__name__})"
    if site.in_features < 1:
        raise SiteError(f"VPT needs blocks on tokens (B, N, C), but {where} has no fixed channel count")
    forward = getattr(module, "plain", type(module)).forward  # without the prompts of another set on the same block
    if "rope" in inspect.signature(forward).parameters:
        raise SiteError(f"VPT cannot add tokens to {where}: its rotary embedding is laid out for the patches alone")
    if any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in module.modules()):
        raise SiteError(f"VPT adds tokens to (B, N, C), but {where} is not batch-first")
    like = next(module.parameters())
    training = [m for m in module.modules() if m.training]
    module.eval()  # running statistics and random streams stay as they are
    try:
        for length in (5, 5 + tokens):
            x = torch.zeros(1, length, site.in_features, device=like.device, dtype=like.dtype)
            with torch.no_grad():
                y = forward(module, x)
            shape = tuple((y[0] if isinstance(y, tuple) else y).shape)
            if shape != tuple(x.shape):
                raise SiteError(f"it turned {tuple(x.shape)} into {shape}")
    except Exception as error:  # a foreign forward may fail in any way; each of them means that the block does not fit
        raise SiteError(
            f"VPT needs blocks that take any number of tokens (B, N, C); {where} does not: {error}"
        ) from error
    finally:
        for m in training:
            m.training = True
