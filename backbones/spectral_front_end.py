"""Spectral front ends: what turns K features a pixel into the channels of any timm backbone.

Three ways, each a module (B, K, P, P) -> (B, C, P, P): `SpectralConv3d` (the 3-D convolutions of LoLA-SpecViT),
`BandProjection` (one linear map a pixel, at first the leading K features: PCA to k) and `BandEmbedding` (a small
1-D network along the bands of each pixel). `SpectralFrontEnd` puts one before a backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.lola_specvit import spectral_conv
from backbones.lola_specvit_layers import ChannelExcite
from zoo.adapters.selection import classifier_names
from zoo.errors import OptionError, UnknownNameError, nearest
from zoo.registry import BACKBONES


class SpectralConv3d(nn.Module):
    """3-D convolutions over (band, row, column), squeeze-excite, mean over the bands (arXiv 2506.17759).

    Args:
        in_chans: K; any number works. channels: C. width: channels of the first two convolutions.
        band_stride: of the three along the bands.
    """

    def __init__(
        self,
        in_chans: int,
        channels: int,
        *,
        width: tuple[int, int] = (8, 16),
        band_stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.conv = spectral_conv(channels, (width[0], width[1]), band_stride)
        self.excite = ChannelExcite(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, P, P) -> (B, C, P, P)."""
        return self.excite(self.conv(x[:, None])).mean(2)


class BandProjection(nn.Module):
    """A 1 x 1 convolution that starts as the first C of K features; on whitened PCA features this is PCA to C.

    Args:
        in_chans: K, at least C. channels: C.
    """

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        if in_chans < channels:
            raise OptionError(f"{in_chans} features cannot be projected to {channels} channels; give more components")
        self.conv = nn.Conv2d(in_chans, channels, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(channels, in_chans)[..., None, None])
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, P, P) -> (B, C, P, P)."""
        if x.shape[1] != self.conv.in_channels:
            raise OptionError(f"patches must be (B, {self.conv.in_channels}, P, P), got {tuple(x.shape)}")
        return self.conv(x)


class BandEmbedding(nn.Module):
    """Each pixel's bands as a sequence: a 1-D convolution, a learned vector for each band, a mean, a linear map.

    Other numbers of bands than K run too; the bands' vectors are then interpolated.

    Args:
        in_chans: K. channels: C. width: channels along the bands. kernel: bands seen at once, odd.
    """

    def __init__(self, in_chans: int, channels: int, *, width: int = 32, kernel: int = 7) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise OptionError(f"kernel must be odd, got {kernel}")
        # (kernel, 1, 1) convolutions in 3-D are 1-D ones over all pixels at once.
        self.first = nn.Conv3d(1, width, (kernel, 1, 1), padding=(kernel // 2, 0, 0))
        self.band = nn.Parameter(torch.empty(1, width, in_chans))
        self.second = nn.Conv3d(width, width, (kernel, 1, 1), padding=(kernel // 2, 0, 0))
        self.last = nn.Conv3d(width, channels, 1)
        nn.init.trunc_normal_(self.band, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, P, P) -> (B, C, P, P)."""
        band = self.band if x.shape[1] == self.band.shape[2] else F.interpolate(self.band, x.shape[1], mode="linear")
        x = F.silu(self.first(x[:, None]) + band[..., None, None])
        return self.last(F.silu(self.second(x)).mean(2, keepdim=True)).squeeze(2)


FRONTS: dict[str, type[nn.Module]] = {
    "conv3d": SpectralConv3d,
    "projection": BandProjection,
    "embedding": BandEmbedding,
}


@BACKBONES.register_module()
class SpectralFrontEnd(nn.Module):
    """(B, K, P, P) -> a front end -> a backbone's features (B, C).

    Args:
        in_chans: K. backbone: a module or config; its own number of input channels decides how many the front makes.
        front: name in `FRONTS`, or `dict(kind=name, **options)`.
        channels: what the front makes; 3 by default, so that pretrained backbones fit as they are.
        size: side that patches are resized to before the backbone (a ViT of 224 wants 224); None leaves them.

    Raises:
        UnknownNameError: no such front. OptionError: an option it does not take.
    """

    def __init__(
        self,
        *,
        in_chans: int,
        backbone: nn.Module | Mapping[str, Any],
        front: str | Mapping[str, Any] = "conv3d",
        channels: int = 3,
        size: int | None = None,
        pretrained: bool | str | None = None,
    ) -> None:
        super().__init__()
        options = {"kind": front} if isinstance(front, str) else dict(front)
        kind = str(options.pop("kind", ""))
        if kind not in FRONTS:
            raise UnknownNameError(f"no spectral front end is called {kind!r}; {nearest(kind, FRONTS)}")
        try:
            self.front = FRONTS[kind](in_chans, channels, **options)
        except TypeError as error:
            raise OptionError(f"the front end {kind!r} does not take these options: {error}") from error
        if isinstance(backbone, Mapping):
            given = dict(backbone) if pretrained is None else {**backbone, "pretrained": pretrained}
            body: nn.Module = BACKBONES.create({**given, **({} if channels == 3 else {"in_chans": channels})})
        else:
            body = backbone
        if classifier_names(body):
            body.reset_classifier(0)  # type: ignore[operator]
        self.body = body
        self.in_chans, self.size = in_chans, size
        self.num_features = self.head_hidden_size = self._width()
        self.__dict__["weights_source"] = body.__dict__.get("weights_source")

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, P, P) -> (B, C), what the backbone's own classifier would get."""
        if x.ndim != 4:
            raise OptionError(f"patches must be (B, features, P, P), got {tuple(x.shape)}")
        x = self.front(x)
        if self.size is not None:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        body: Any = self.body
        if hasattr(body, "forward_head"):
            return body.forward_head(body.forward_features(x), pre_logits=True)  # type: ignore[no-any-return]
        return body(x)  # type: ignore[no-any-return]

    def _width(self) -> int:
        for name in ("head_hidden_size", "num_features", "output_dim"):
            width = getattr(self.body, name, None)
            if isinstance(width, int):
                return width
        raise OptionError(f"the width of {type(self.body).__name__}'s features is not known")
