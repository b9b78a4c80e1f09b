"""AdaptFormer: a scaled bottleneck in parallel to the MLP.

Source: Chen et al. 2022, "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", eq. 2 and 3, and
the authors' released code for what the paper leaves open (initial values, dropout).
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site
from zoo.adapters.bottleneck import Bottleneck
from zoo.errors import OptionError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class AdaptFormer(Adapter):
    """Scaled parallel bottleneck beside the MLP (AdaptFormer 2022).

    MLP(x) -> MLP(x) + scale * up(relu(down(x))), x the MLP's own input. In a pre-norm block that input is LN(h), as in
    the paper's equation 2; no second LayerNorm sits inside the adapter. (The released code feeds the un-normalised h
    and sets its inner LayerNorm to none; an MLP site sees LN(h), which is what the paper writes.)

    Every site adds I*width + width + width*O + O parameters: 2*C*width + width + C where I = O = C.
    `down` starts Kaiming-uniform and `up` at zero, as released, so the adapted model starts exactly equal to the base.

    Args:
        site: an `mlp` site, `(..., I) -> (..., O)` or `(B, I, H, W) -> (B, O, H, W)`; the grid must not change.
        width: bottleneck width; the released 64.
        scale: the fixed factor s; the paper's 0.1.
        dropout: on the hidden units while training; the released 0.1.

    Raises:
        OptionError: `scale` is not a finite number other than zero.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"mlp"})
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)

    def __init__(self, site: Site, *, width: int = 64, scale: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__(site)
        if not math.isfinite(scale) or scale == 0.0:
            raise OptionError(f"scale must be a finite number other than 0, got {scale!r} (the paper uses 0.1)")
        self.scale = scale
        self.bottleneck = Bottleneck(site, width, nn.ReLU, dropout=dropout)
        nn.init.kaiming_uniform_(self.bottleneck.down.weight, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale * self.bottleneck(x)
