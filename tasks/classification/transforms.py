"""From an image (H, W, 3) uint8 to a tensor (3, H, W) uint8, following the backbone's own preprocessing.

Mean and deviation are applied on the device by `ZooPreprocessor`; here is geometry and augmentation only. Random
transforms draw from generators that `set_random_seed` resets; the engine calls it before every sample with a seed
made of (run seed, epoch, sample), so a resumed run sees the same crops as an uninterrupted one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.errors import OptionError, nearest
from zoo.registry import TRANSFORMS

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

Image = NDArray[np.uint8]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone wants its images; part of a classifier's config and so of its checkpoints.

    Attributes:
        size: (H, W) fed to the backbone.
        crop_pct: the image is resized so that `size` is this share of it, then cropped. Small images full of content
            (digits, CIFAR) want 1.0.
        crop_mode: "center" keeps the shape and crops the shorter side; "squash" ignores the shape; "border" pads.
        interpolation: of the resizing, by Pillow's antialiased filters.
        mean, std: a channel, in 0..1 units.
        normalise: False feeds plain 0..1 values. Say which it was beside every accuracy: published few-shot numbers
            of both kinds exist, and differ by up to ten points.
    """

    size: tuple[int, int] = (224, 224)
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    normalise: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_size(self.size))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("crop_mode", self.crop_mode, CROP_MODES)
        if not 0 < self.crop_pct <= 1:
            raise OptionError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")

    @classmethod
    def of(cls, backbone: nn.Module, overrides: Mapping[str, Any] | None = None) -> Preprocessing:
        """What the backbone's pretrained config says (timm's `pretrained_cfg`), with overrides.

        Raises:
            OptionError: an unknown override, or a value it does not take.
        """
        overrides = dict(overrides or {})
        for name in overrides:
            if name not in cls.__dataclass_fields__:
                raise OptionError(f"preprocessing has no {name!r}; {nearest(name, cls.__dataclass_fields__)}")
        own: dict[str, Any] = {}
        if getattr(backbone, "pretrained_cfg", None):
            from timm.data.config import resolve_model_data_config

            found = resolve_model_data_config(backbone)  # type: ignore[no-untyped-call]
            own = {name: found[name] for name in ("crop_pct", "crop_mode", "interpolation", "mean", "std")}
            own["size"] = found["input_size"][1:]
        return cls(**{**own, **overrides})

    def statistics(self) -> dict[str, tuple[float, ...]]:
        """`mean` and `std` for the preprocessor: those of the backbone, or 0 and 1 where inputs are not normalised."""
        if self.normalise:
            return {"mean": self.mean, "std": self.std}
        return {"mean": (0.0,) * len(self.mean), "std": (1.0,) * len(self.std)}

    def evaluation(self) -> EvalTransform:
        """The transform of validation and prediction."""
        return EvalTransform(
            size=self.size, crop_pct=self.crop_pct, crop_mode=self.crop_mode, interpolation=self.interpolation
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a config file."""
        return asdict(self)


@TRANSFORMS.register_module()
class EvalTransform:
    """Resize and crop without chance, bit-equal to timm's evaluation transform.

    Args: see `Preprocessing`.
    """

    random = False

    def __init__(
        self,
        *,
        size: int | Sequence[int] = (224, 224),
        crop_pct: float = 0.875,
        crop_mode: str = "center",
        interpolation: str = "bicubic",
    ) -> None:
        from timm.data.transforms_factory import create_transform

        fields = Preprocessing(as_size(size), crop_pct, crop_mode, interpolation)
        self._steps = create_transform(
            (3, *fields.size),
            is_training=False,
            use_prefetcher=True,  # timm's word for "leave uint8, normalise later"
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation=interpolation,
        )

    def __call__(self, image: Image) -> Tensor:
        """(H, W, 3) uint8 -> (3, H', W') uint8."""
        from PIL import Image as Pillow

        return torch.as_tensor(self._steps(Pillow.fromarray(image)))


@TRANSFORMS.register_module()
class TrainTransform:
    """Random crop, flip and the usual distortions, by albumentations.

    Args:
        size: (H, W) or one number.
        scale: share of the image's area that a crop covers, from and to; (1, 1) keeps everything.
        ratio: width / height of a crop, from and to.
        interpolation: of the resizing; shrinking averages areas instead, as OpenCV's filters alias.
        flip: probability of a left-right flip; 0 for writing, digits, left-or-right questions.
        rotate, shift: largest angle in degrees and largest move as a share of the side, each way.
        jitter: largest relative change of brightness, contrast and saturation.
        erase: probability of blanking a rectangle with mid grey (Zhong et al. 2017, arXiv 1708.04896).
    """

    random = True

    def __init__(
        self,
        *,
        size: int | Sequence[int] = (224, 224),
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
        flip: float = 0.5,
        rotate: float = 0.0,
        shift: float = 0.0,
        jitter: float = 0.0,
        erase: float = 0.0,
    ) -> None:
        import albumentations as A
        import cv2

        check_choice("interpolation", interpolation, INTERPOLATIONS)
        flags = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
        flag = dict(zip(INTERPOLATIONS, flags, strict=True))[interpolation]
        box = (as_size(size), tuple(scale), tuple(ratio))
        steps: list[Any] = [A.RandomResizedCrop(*box, interpolation=flag, area_for_downscale="image")]
        if flip:
            steps.append(A.HorizontalFlip(p=flip))
        if rotate or shift:
            moves = dict.fromkeys(("x", "y"), (-shift, shift))
            affine = cv2.INTER_CUBIC if interpolation == "bicubic" else cv2.INTER_LINEAR
            steps.append(A.Affine(rotate=(-rotate, rotate), translate_percent=moves, interpolation=affine, p=1.0))
        if jitter:
            change = (max(0.0, 1 - jitter), 1 + jitter)
            steps.append(A.ColorJitter(brightness=change, contrast=change, saturation=change, hue=(0, 0), p=1.0))
        if erase:
            steps.append(A.CoarseDropout((1, 1), (0.15, 0.5), (0.15, 0.5), fill=127, p=erase))
        self._steps = A.Compose(steps)

    def set_random_seed(self, seed: int) -> None:
        """Start all of its generators anew; the next call depends on the seed and the image only."""
        self._steps.set_random_seed(seed)

    def __call__(self, image: Image) -> Tensor:
        """(H, W, 3) uint8 -> (3, H', W') uint8."""
        changed = self._steps(image=image)["image"]
        return torch.from_numpy(np.ascontiguousarray(changed.transpose(2, 0, 1)))


@TRANSFORMS.register_module()
class Mixup:
    """Batch augmentation on the device: mixup, CutMix, or one of both by chance, through `timm.data.Mixup`.

    Sources: Zhang et al. 2018 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899). Each sample leaves with a
    `soft_label` (K,) beside its `label`. Labels are smoothed by the head, not here.

    Args:
        num_classes: K.
        mixup, cutmix: alpha of the Beta distribution of the mixing share; 0 switches that kind off.
        prob: share of batches that are mixed at all.
        switch_prob: share of CutMix where both kinds are on.
    """

    def __init__(
        self, *, num_classes: int, mixup: float = 0.8, cutmix: float = 1.0, prob: float = 1.0, switch_prob: float = 0.5
    ) -> None:
        from timm.data.mixup import Mixup as TimmMixup

        if min(mixup, cutmix) < 0 or not max(mixup, cutmix) > 0:
            raise OptionError(f"mixup and cutmix must be >= 0 and one above 0, got mixup={mixup}, cutmix={cutmix}")
        options: dict[str, Any] = dict(prob=prob, switch_prob=switch_prob, label_smoothing=0.0, num_classes=num_classes)
        self._mix = TimmMixup(mixup, cutmix, **options)  # type: ignore[no-untyped-call]

    def __call__(self, inputs: Tensor, data_samples: list[dict[str, Any]]) -> tuple[Tensor, list[dict[str, Any]]]:
        """(B, C, H, W) and B samples -> mixed inputs, samples with `soft_label` (K,). An odd last image stays whole."""
        labels = torch.tensor([sample["label"] for sample in data_samples], device=inputs.device)
        even = len(inputs) - len(inputs) % 2
        soft = nn.functional.one_hot(labels, self._mix.num_classes).float()
        if even:
            mixed, soft_even = self._mix(inputs[:even].clone(), labels[:even])
            inputs, soft = torch.cat((mixed, inputs[even:])), torch.cat((soft_even.float(), soft[even:]))
        return inputs, [{**sample, "soft_label": row} for sample, row in zip(data_samples, soft, strict=True)]


def as_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) from one number or two."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise OptionError(f"an image size is one number or (height, width), got {size}")
    return pair


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raise `OptionError` unless `value` is one of `choices`."""
    if value not in choices:
        raise OptionError(f"{what} {value!r} is unknown; {nearest(value, choices)}")
