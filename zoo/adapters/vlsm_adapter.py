"""VLSM-Adapter: bottlenecks with a second activation, in the towers of a segmenter or before its decoder.

Source: Dhakal et al. 2024, "VLSM-Adapter: Finetuning Vision-Language Segmentation Efficiently with Lightweight Blocks",
MICCAI 2024, arXiv 2405.06196, and the released code for where blocks sit and where they stop.

The dense kind is the adapter `VLSMAdapter` in the first layers of the towers; the shallow kind and the conditional
adapter change what the towers hand to the decoder, outside of any layer, and are the module `VLSMNeck`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site
from zoo.adapters.bottleneck import channels_first
from zoo.errors import OptionError, SiteError, nearest
from zoo.registry import ADAPTERS

Variant = Literal["V", "VL", "VLC"]
EXTRACT = (3, 6, 9)  # CLIPSeg reads the outputs of these blocks


class VLSMBlock(nn.Module):
    """A(x) = x + act(fc2(act(fc1 x))), `(..., C) -> (..., C)`: with ReLU it only ever adds.

    Parameters: 2*C*width + width + C, torch's default initial values: not the identity at first.

    Raises:
        OptionError: a width below 1.
    """

    def __init__(self, channels: int, width: int, gelu: bool = False) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(width, channels)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        act = F.gelu if self.gelu else F.relu
        return x + act(self.fc2(act(self.fc1(x))))


@ADAPTERS.register_module()
class VLSMAdapter(Adapter):
    """The dense adapter: y = A(module(x)) after attention and after the feed-forward part, before the residual sum.

    Parameters a site of width C: 2*C*width + width + C. `dense` gives the configs of the paper's variants.

    Args:
        site: an attention or feed-forward module, tokens (B, N, C) or maps (B, C, H, W).
        width: the hidden width.
        gelu: GELU in both places instead of ReLU.

    Raises:
        OptionError: a width below 1. SiteError: a site of unknown width or layout.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"attn", "mlp"})
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    identity = False

    def __init__(self, site: Site, *, width: int = 64, gelu: bool = False) -> None:
        super().__init__(site)
        if site.out_features < 1:
            raise SiteError(f"{site.path} ({type(site.module).__name__}) has no fixed channel count; pick another site")
        self.first = channels_first(site)
        self.block = VLSMBlock(site.out_features, width, gelu)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y: what the module gives; x is not read."""
        adapted: Tensor = self.block(y.movedim(1, -1)).movedim(-1, 1) if self.first else self.block(y)
        return adapted


def dense(variant: Variant = "VL", *, extract: Sequence[int] = EXTRACT, width: int = 64) -> dict[str, dict[str, Any]]:
    """Configs of the dense variants for `attach` on an open_clip CLIP, by the name of each set.

    The blocks below the last extracted one are adapted: its own output is read, but it runs plain. "VLC" also needs a
    `VLSMNeck(condition=True)`, which is no attachment.

    Raises:
        OptionError: no such variant, or nothing extracted.
    """
    check_variant(variant)
    if not extract or min(extract) < 0:
        raise OptionError(f"extract lists block indices, got {tuple(extract)!r}")
    depth = f"depth<{max(extract)}"
    sets = {"vision": dict(type="VLSMAdapter", width=width, where=["attn", "mlp", "visual.*", depth])}
    if variant != "V":
        sets["text"] = dict(type="VLSMAdapter", width=width, where=["attn", "mlp", "!visual.*", depth])
    return sets


class VLSMNeck(nn.Module):
    """Adapters between frozen towers and decoder: the shallow kind, the conditional adapter, or both.

    (activations, condition, text levels) -> (activations, condition). Vision: each activation passes a block of its
    own. Condition: c <- A_c(c). Text: c <- c + sum_i A_i(t_i), after that.

    Args:
        vision_width: C of the activations (B, N, C). text_width: C of the text levels (B, C), the end-of-text tokens
            of raw hidden states. projection: C of the condition (B, C).
        levels: how many activations and text levels there are.
        vision, text, condition: which parts exist. The shallow variants are V: vision; VL: vision, text; VLC: all. Of
            the dense ones only VLC has a neck, with the condition alone.
        width, condition_width: hidden widths. gelu: GELU instead of ReLU.

    Raises:
        OptionError: no part chosen, a width below 1, or text of another width than the projection.
    """

    def __init__(
        self,
        *,
        vision_width: int = 768,
        text_width: int = 512,
        projection: int = 512,
        levels: int = len(EXTRACT),
        vision: bool = False,
        text: bool = False,
        condition: bool = False,
        width: int = 512,
        condition_width: int = 256,
        gelu: bool = False,
    ) -> None:
        super().__init__()
        if not (vision or text or condition):
            raise OptionError("a VLSMNeck without vision, text and condition does nothing; leave it out")
        if text and text_width != projection:
            raise OptionError(
                f"text adapters are added to the condition: their width {text_width} must be {projection}"
            )
        self.levels = levels
        self.vision = nn.ModuleList(VLSMBlock(vision_width, width, gelu) for _ in range(levels if vision else 0))
        self.text = nn.ModuleList(VLSMBlock(text_width, width, gelu) for _ in range(levels if text else 0))
        self.condition = VLSMBlock(projection, condition_width, gelu) if condition else None

    def forward(
        self, activations: Sequence[Tensor], condition: Tensor, text_levels: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Raises `OptionError` where the number of activations or text levels is not `levels`."""
        for kind, found in (("activations", activations), ("text levels", text_levels if self.text else activations)):
            if len(found) != self.levels:
                raise OptionError(f"this VLSMNeck has {self.levels} levels, but got {len(found)} {kind}")
        adapted = list(activations)
        if self.vision:
            adapted = [block(x) for block, x in zip(self.vision, activations, strict=True)]
        if self.condition is not None:
            condition = self.condition(condition)
        if self.text:
            terms = [block(x) for block, x in zip(self.text, text_levels, strict=True)]
            condition = condition + torch.stack(terms).sum(0)
        return adapted, condition


def check_variant(variant: str) -> None:
    if variant not in get_args(Variant):
        raise OptionError(
            f"the variants are V, VL and VLC, not {variant!r}; {nearest(str(variant), get_args(Variant))}"
        )
