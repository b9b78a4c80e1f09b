"""Houlsby adapters: a bottleneck behind the attention and another behind the MLP of every block.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1 and figure 2.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site
from zoo.adapters.bottleneck import Bottleneck
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class Houlsby(Adapter):
    """Serial bottleneck after attention and after MLP (Houlsby et al. 2019).

    y -> y + up(gelu(down(y))), with y the output of the sub-layer's last projection, before the residual addition,
    as in the paper. In a pre-norm block the block's sum becomes x + y + up(gelu(down(y))) with y = Attn(LN(x)):
    the paper's post-norm block normalises after that sum, a pre-norm one in front of the next sub-layer. LayerScale,
    where a block has it, acts behind the adapter.

    Every site adds 2*C*width + width + C parameters (C channels), so a block of attention and MLP twice that.
    The paper draws both weights from a normal of deviation 1e-2 (nearly the identity); here `up` starts at zero and the
    adapted model starts exactly equal to the base, `down` keeps the paper's normal, cut at two deviations.

    Args:
        site: an `attn` or `mlp` site with outputs `(..., C)`, or `(B, C, H, W)` where its layers are convolutions.
        width: bottleneck width; the paper's 64 of {8, 64, 256}.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"attn", "mlp"})
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")

    def __init__(self, site: Site, *, width: int = 64) -> None:
        super().__init__(site)
        self.bottleneck = Bottleneck(site, width, nn.GELU, inputs=site.out_features)
        nn.init.trunc_normal_(self.bottleneck.down.weight, std=0.01, a=-0.02, b=0.02)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bottleneck(y)
