"""What happens to a pair of crops before training: flips, colours, and one of three strong distortions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional

from tasks.tracking.crops import Box
from zoo.errors import OptionError
from zoo.registry import TRANSFORMS

STRONG = ("grey", "solarise", "blur")


@TRANSFORMS.register_module()
class PairAugment:
    """LoRAT's augmentation of (template, search) (Lin et al. 2024, arXiv 2403.05231; after Touvron et al. 2022).

    Template and search are flipped and recoloured independently; then exactly one of grey, solarise and blur hits both
    alike ("3-Augment", arXiv 2204.07118).

    Args:
        flip: probability of a left-right flip, each.
        jitter: largest relative change of brightness, contrast and saturation, in random order.
        strong: whether one of the three distortions follows.
    """

    def __init__(self, *, flip: float = 0.5, jitter: float = 0.4, strong: bool = True) -> None:
        if not 0 <= flip <= 1 or not 0 <= jitter < 1:
            raise OptionError(f"flip lies in [0, 1] and jitter in [0, 1), got flip={flip}, jitter={jitter}")
        self.flip, self.jitter, self.strong = flip, jitter, strong

    def __call__(
        self, crops: tuple[Tensor, Tensor], boxes: tuple[Box, Box], random: np.random.Generator
    ) -> tuple[tuple[Tensor, Tensor], tuple[Box, Box]]:
        """Two (3, H, W) float crops in 0..1 and their boxes in crop pixels -> the same, 8-bit after a distortion."""
        (template, box), (search, target) = (
            self._one(crop, box, random) for crop, box in zip(crops, boxes, strict=True)
        )
        if self.strong:
            kind, amount = STRONG[random.integers(3)], random.uniform(0.1, 2.0)
            template, search = (distorted(crop, kind, amount) for crop in (template, search))
        return (template, search), (box, target)

    def _one(self, crop: Tensor, box: Box, random: np.random.Generator) -> tuple[Tensor, Box]:
        if random.random() < self.flip:
            crop, box = crop.flip(-1), flipped(box, crop.shape[-1])
        factors = random.uniform(1 - self.jitter, 1 + self.jitter, 3)
        changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
        for i in random.permutation(3) if self.jitter else ():
            crop = changes[i](crop, float(factors[i]))
        return crop, box


def flipped(box: NDArray[np.float64], width: int) -> Box:
    """A box in the mirror image."""
    return np.array([width - box[2], box[1], width - box[0], box[3]])


def distorted(crop: Tensor, kind: str, radius: float) -> Tensor:
    """(3, H, W) float in 0..1 -> grey, solarised at one half, or Gaussian-blurred, through an 8-bit image."""
    pixels = (crop.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Pillow.fromarray(pixels)
    if kind == "grey":
        image = ImageOps.grayscale(image).convert("RGB")
    elif kind == "solarise":
        image = ImageOps.solarize(image, 128)
    else:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
