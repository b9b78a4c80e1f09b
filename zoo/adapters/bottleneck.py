"""The bottleneck that Houlsby, Pfeiffer and AdaptFormer share: C -> width -> C with a non-linearity between."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from zoo.adapters.base import Site
from zoo.errors import OptionError, SiteError


class Bottleneck(nn.Module):
    """up(dropout(act(down(x)))), zero at first because `up` starts at zero.

    `(..., I) -> (..., O)` for channels-last sites, `(B, I, H, W) -> (B, O, H, W)` for channels-first ones, where both
    layers are 1x1 convolutions. Parameters: I*width + width + width*O + O.

    Args:
        site: gives I = `in_features` of the bottleneck's input, O = `out_features`, and the layout.
        width: the hidden width.
        act: builds the non-linearity.
        inputs: channels of the bottleneck's input where that is not the site's input (a sequential adapter reads O).
        dropout: probability of dropping a hidden unit, in training only.

    Raises:
        OptionError: `width` or `dropout` out of range.
        SiteError: the site does not say how many channels it has, or holds no layer that tells its layout.
    """

    def __init__(
        self,
        site: Site,
        width: int,
        act: Callable[[], nn.Module],
        *,
        inputs: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise OptionError(f"width must be a whole number of at least 1, got {width!r}")
        if not 0.0 <= dropout < 1.0:
            raise OptionError(f"dropout must be in [0, 1), got {dropout!r}")
        inputs = site.in_features if inputs is None else inputs
        if inputs < 1 or site.out_features < 1:
            raise SiteError(f"{site.path} ({type(site.module).__name__}) has no fixed channel count; pick another site")
        first = channels_first(site)
        layer: Callable[[int, int], nn.Linear | nn.Conv2d] = _pointwise if first else nn.Linear
        self.down = layer(inputs, width)
        self.act = act()
        self.drop = nn.Dropout(dropout)
        self.up = layer(width, site.out_features)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.drop(self.act(self.down(x))))
        return y


def channels_first(site: Site) -> bool:
    """Whether the site's tensors are `(B, C, H, W)`, told by the first layer with a weight inside the module.

    That layer reads the site's own input: a `Conv2d` reads channels-first maps, a `Linear` (the output projection of
    an `nn.MultiheadAttention` is one) reads channels-last tokens or maps. Convolutions further in, such as the
    depthwise one of a PVT MLP, work on a reshaped copy and say nothing.

    Raises:
        SiteError: there is neither (a pooling token mixer, a bare activation).
    """
    for name, module in site.module.named_modules():
        if "adapters" in name.split("."):  # an adapter that sits there already
            continue
        if isinstance(module, nn.Conv2d):
            return True
        if isinstance(module, nn.Linear):
            return False
    raise SiteError(
        f"{site.path} ({type(site.module).__name__}) holds no Linear or Conv2d, so its layout is unknown; "
        "choose other sites with `where`"
    )


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)
