"""From a batch of the loader to what the model eats: device, 0..1, normalised, mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from zoo.errors import OptionError
from zoo.registry import MODELS, TRANSFORMS

BatchAugment = Callable[[Tensor, list[dict[str, Any]]], tuple[Tensor, list[dict[str, Any]]]]


@MODELS.register_module()
class ZooPreprocessor(BaseDataPreprocessor):  # type: ignore[misc]
    """Moves a batch to the device and normalises it there: (x / 255 - mean) / std, channel by channel.

    uint8 images are scaled to 0..1; floating inputs (hyperspectral cubes) are taken as already scaled.

    Args:
        mean, std: one number a channel, in 0..1 units (timm's convention).
        batch_augment: a callable, or the config of one (registry TRANSFORMS), `(inputs, data_samples) ->
            (inputs, data_samples)` on normalised (B, C, H, W) floats; runs only while training (mixup, cutmix).

    Raises:
        OptionError: mean and std differ in length, a std is not positive, the channels of the input do not fit,
            or images of different sizes arrive (resize or pad them in the dataset's transforms).
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        batch_augment: BatchAugment | dict[str, Any] | str | None = None,
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0.0) <= 0:
            raise OptionError(f"mean and std need the same length and std > 0, got mean={mean}, std={std}")
        # Not persistent: they are configuration, and the adapter file must not carry them.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        built = TRANSFORMS.create(batch_augment) if isinstance(batch_augment, (dict, str)) else batch_augment
        self.batch_augment: BatchAugment | None = built

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """`dict(inputs=(B, C, H, W), data_samples=list of B dicts)` -> the same with float32 inputs on the device."""
        batch = self.cast_data(data)
        inputs = self.normalise(self.stack(batch["inputs"]))
        samples = batch.get("data_samples")
        if training and self.batch_augment is not None:
            inputs, samples = self.batch_augment(inputs, samples)
        return {"inputs": inputs, "data_samples": samples}

    def stack(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """One (B, C, H, W) tensor; subclasses may pad images of different sizes instead of refusing them."""
        if isinstance(images, Tensor):
            return images
        sizes = sorted({tuple(image.shape) for image in images})
        if len(sizes) > 1:
            raise OptionError(f"a batch holds images of sizes {sizes}; resize or pad them in the transforms")
        return torch.stack(list(images))

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float -> float32, zero mean and unit deviation."""
        channels = self.mean.shape[0]
        if images.ndim != 4 or images.shape[1] != channels:
            raise OptionError(
                f"inputs of shape {tuple(images.shape)} do not fit a mean of {channels} channels; "
                f"expected (B, {channels}, H, W)"
            )
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        normalised: Tensor = (scaled - self.mean) / self.std
        return normalised
