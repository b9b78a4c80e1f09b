"""Hi LoRA: LoRA whose layers join the training stage by stage, shallow ones first.

Source: Xiao et al. 2024, "HiVG: Hierarchical Multimodal Fine-grained Modulation for Visual Grounding", ACM MM 2024,
arXiv 2404.13400, and its released code. The paper's figure stacks a new pair of factors a stage on the frozen earlier
ones; the code keeps one pair and trains it further. Both are here: `pairs` above 1 is the figure, `pairs=1` the code.
The stages themselves are the hook `HiLoRAStages` (zoo/engine/stages.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.attached import Attached
from zoo.adapters.base import Adapter, Factors, Site
from zoo.adapters.lora import usable_rank
from zoo.adapters.low_rank import ConvGeometry, branch_conv, branch_linear
from zoo.errors import OptionError, SiteError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class HiLoRA(Adapter):
    """y = W x + b + s sum_j B_j A_j x, a LoRA of stacked pairs of which a training stage trains one (HiVG 2024).

    Every B starts at zero, so pairs of stages to come change nothing, and keys stay the same over all stages.

    Parameters: `downs.j` (P*r, I), `ups.j` (sum of part widths, r); count pairs * (P*r*I + r*O) for full parts.

    Args:
        site: a linear layer or convolution; each of the chosen parts of a fused weight has factors of its own.
        rank: r; lowered to the weight's own full rank where that is smaller.
        alpha: s = alpha / rank.
        dropout: probability of zeroing an input of the A's while training, one mask for all pairs; refused where only
            the weight is read.
        pairs: 1, or the number of stages that stack.

    Raises:
        OptionError: an option out of range. SiteError: dropout on a site that only its weight adapts.
    """

    roles: ClassVar[frozenset[str]] = frozenset(
        {"q", "k", "v", "qkv", "kv", "qk", "out", "fc1", "fc2", "conv", "linear", "embed", "head"}
    )
    default_roles: ClassVar[tuple[str, ...]] = ("q", "k", "v", "out")
    mergeable: ClassVar[bool] = True

    def __init__(
        self, site: Site, *, rank: int = 32, alpha: float = 16.0, dropout: float = 0.1, pairs: int = 1
    ) -> None:
        super().__init__(site)
        if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
            raise OptionError(f"pairs must be a whole number of at least 1, got {pairs!r}")
        if not 0 <= dropout < 1:
            raise OptionError(f"dropout must lie in [0, 1), got {dropout!r}")
        self.rank = usable_rank(rank, site)
        self.scale = alpha / rank
        self.dropout = dropout
        width = sum(part.width for part in site.parts)
        shape = (len(site.parts) * self.rank, site.flat_in)
        self.downs = nn.ParameterList(torch.empty(shape) for _ in range(pairs))
        self.ups = nn.ParameterList(torch.zeros(width, self.rank) for _ in range(pairs))
        for down in self.downs:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        called = site.mode != "weight"
        self.conv = ConvGeometry(site.module) if called and ConvGeometry.fits(site.module) else None  # type: ignore[arg-type]
        if not called or (len(site.weight_shape) > 2 and self.conv is None):
            self.form = "weight"
            if dropout:
                raise SiteError(
                    f"HiLoRA dropout needs a branch, but {site.path} ({type(site.module).__name__}) can only be "
                    "adapted through its weight; use dropout=0, or leave the site out"
                )
        else:
            self.form = "branch" if dropout or self.conv is not None else "low_rank"

    def factors(self) -> Factors:
        """(all A stacked, s times all B side by side), by parts."""
        if len(self.downs) == 1:
            return Factors(self.downs[0], self.ups[0] * self.scale)
        by_part = zip(*(down.split(self.rank) for down in self.downs), strict=True)
        return Factors(torch.cat([one for part in by_part for one in part]), torch.cat([*self.ups], 1) * self.scale)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., I) or (B, C, *space); y: the site's output."""
        x = F.dropout(x, self.dropout, self.training)
        if self.conv is not None:
            return branch_conv(x, y, self.factors(), self.parts, self.conv)
        return branch_linear(x, y, self.factors(), self.parts)

    def train_pair(self, pair: int | None) -> None:
        """Let one pair train and freeze the others; None freezes all."""
        for j, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            down.requires_grad_(j == pair)
            up.requires_grad_(j == pair)

    def extra_repr(self) -> str:
        roles = [part.role for part in self.parts]
        return f"rank={self.rank}, pairs={len(self.downs)}, scale={self.scale:g}, parts={roles}"


def set_stage(
    attached: Attached, depth: int | None, *, tower: str = "*", always: Sequence[str] = (), pair: int = 0
) -> list[str]:
    """Let the adapters of the first `depth` blocks of a tower train; returns the keys of the tensors that now do.

    Args:
        attached: a set of HiLoRA adapters, or of any others, which then train as a whole.
        depth: 0 freezes everything outside `always`; None means all blocks.
        tower: path glob of the hierarchy. Sites outside of it train at every depth above 0.
        always: path globs of sites that train at depth 0 too, such as bridges between towers.
        pair: which of HiLoRA's pairs trains.

    Raises:
        OptionError: a depth or pair that does not exist, or a set that is merged.
        SiteError: a glob that fits no site, or a site of the tower that lies in no block.
    """
    check_stage(attached, depth, tower=tower, always=always, pair=pair)
    for site, adapter in attached.placed:
        trains = any(fnmatchcase(site.path, glob) for glob in always)
        if not trains and depth != 0:
            inside = fnmatchcase(site.path, tower)
            trains = not inside or depth is None or (site.depth is not None and site.depth < depth)
        if isinstance(adapter, HiLoRA):
            adapter.train_pair(pair if trains else None)
        else:
            adapter.requires_grad_(trains)
    for parameter in attached.parameters():
        if not parameter.requires_grad:
            parameter.grad = None  # an optimizer skips what has no gradient; a stale one would still move it
    return [name for name, parameter in attached.named_parameters() if parameter.requires_grad]


def check_stage(
    attached: Attached, depth: int | None, *, tower: str = "*", always: Sequence[str] = (), pair: int = 0
) -> None:
    """Raise what `set_stage` would raise."""
    if attached.merged:
        raise OptionError(f"adapter {attached.name!r} is merged; unmerge it before a training stage")
    paths = [site.path for site in attached.sites]
    for glob in (tower, *always):
        if not any(fnmatchcase(path, glob) for path in paths):
            raise SiteError(f"{glob!r} fits no site of adapter {attached.name!r}; for example {paths[0]!r} is one")
    free = [site for site in attached.sites if not any(fnmatchcase(site.path, glob) for glob in always)]
    inside = [site for site in free if fnmatchcase(site.path, tower)]
    loose = [site.path for site in inside if site.depth is None]
    if loose:
        raise SiteError(f"{loose[0]!r} lies in no block, so no stage reaches it; name it in `always` or leave it out")
    blocks = 1 + max((site.depth or 0 for site in inside), default=-1)
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= blocks):
        raise OptionError(f"depth must be None or 0 ... {blocks}, the adapted blocks of {tower!r}, got {depth!r}")
    pairs = min(len(a.downs) if isinstance(a, HiLoRA) else 1 for _, a in attached.placed)
    if not 0 <= pair < pairs:
        raise OptionError(f"pair {pair} does not exist: {attached.config['type']} was attached with pairs={pairs}")
