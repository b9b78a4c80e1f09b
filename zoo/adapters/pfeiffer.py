"""Pfeiffer adapters: one serial bottleneck a block, behind the MLP.

Source: Pfeiffer et al. 2021, "AdapterFusion", section 3.2 and appendix A (the placement their search ended with).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site
from zoo.adapters.bottleneck import Bottleneck
from zoo.errors import OptionError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class Pfeiffer(Adapter):
    """Serial bottleneck after the MLP only (Pfeiffer et al. 2021).

    y -> y + up(relu(down(y))), y the MLP's output before the residual addition. A pre-norm block has no LayerNorm
    behind the sum, so the paper's choice between the old and a new one there does not arise.

    Every site adds 2*C*width + width + C parameters, width = max(1, C // reduction): half of Houlsby's at one width.
    `up` starts at zero, so the adapted model starts exactly equal to the base.

    Args:
        site: an `mlp` site with outputs `(..., C)`, or `(B, C, H, W)` where its layers are convolutions.
        reduction: how many times narrower than the site's output the bottleneck is; the paper's 16.

    Raises:
        OptionError: `reduction` is not a whole number of at least 1.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"attn", "mlp"})
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)

    def __init__(self, site: Site, *, reduction: int = 16) -> None:
        super().__init__(site)
        if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 1:
            raise OptionError(f"reduction must be a whole number of at least 1, got {reduction!r}")
        width = max(1, site.out_features // reduction)
        self.bottleneck = Bottleneck(site, width, nn.ReLU, inputs=site.out_features)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bottleneck(y)
