"""Partial fine-tuning: the last blocks train, with everything behind them.

Source: Jia et al. 2022, "Visual Prompt Tuning", section 4.1 (the Partial-k baseline); Yosinski et al. 2014, "How
transferable are features in deep neural networks?".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from zoo.adapters.base import Site
from zoo.adapters.selection import Selection, in_model_order, parameters_under
from zoo.adapters.sites import find_sites
from zoo.errors import OptionError, SiteError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class LastBlocks(Selection):
    """The last blocks train, with the final norm and a classifier behind them (Partial-k)."""

    @classmethod
    def names(cls, model: nn.Module, *, blocks: int = 1, under: str = "") -> list[str]:
        """Parameter names of the last `blocks` blocks and of the modules registered behind them.

        Args:
            blocks: how many; more than one stage counts through.
            under: path of the part of the model to look in, e.g. `visual` for the image tower of a CLIP.

        Raises:
            OptionError: `blocks` is not between 1 and the number there is, or no module is called `under`.
            SiteError: no blocks are known, or they belong to several towers.
        """
        try:
            part = model.get_submodule(under)
        except AttributeError as error:
            raise OptionError(f"{type(model).__name__} has no module called {under!r}") from error
        sites = _blocks(part)
        if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= len(sites):
            limit = f"from 1 to {len(sites)} (the blocks of {type(part).__name__})"
            raise OptionError(f"blocks must be a whole number {limit}, got {blocks!r}")
        chosen = [site.module for site in sites[-blocks:]]
        return in_model_order(model, parameters_under(model, [*chosen, *_behind(part, sites[-1].path)]))


def _blocks(part: nn.Module) -> Sequence[Site]:
    sites = [site for site in find_sites(part) if site.role == "block"]
    name = type(part).__name__
    if not sites:
        raise SiteError(f"LastBlocks needs to know the blocks of a model, and {name} has none that are known")
    depths = [site.depth for site in sites]
    if None in depths or len(set(depths)) < len(depths):
        towers = sorted({site.path.partition(".")[0] for site in sites})
        raise SiteError(f"the blocks of {name} lie in several towers ({', '.join(towers)}); choose one with under=")
    return sorted(sites, key=lambda site: site.depth or 0)


def _behind(part: nn.Module, last: str) -> list[nn.Module]:
    """Modules registered after the last block, at its own level and at every level above."""
    found: list[nn.Module] = []
    names = last.split(".")
    for level, name in enumerate(names):
        children = part.get_submodule(".".join(names[:level]))._modules
        after = list(children).index(name) + 1
        found += [child for child in list(children.values())[after:] if child is not None]
    return found
