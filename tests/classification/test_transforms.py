"""Preprocessing is the backbone's own, random transforms repeat by seed, and mixing keeps the books."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from tasks.classification.transforms import EvalTransform, Mixup, Preprocessing, TrainTransform
from zoo.errors import OptionError
from zoo.registry import BACKBONES, TRANSFORMS

RANDOM = np.random.default_rng(0)
PHOTO = np.asarray(  # smooth, so that geometry errors show and noise does not
    Image.fromarray(RANDOM.integers(0, 256, (9, 12, 3), np.uint8)).resize((240, 180), Image.Resampling.BICUBIC)
)


@pytest.mark.parametrize(
    ("name", "mode"), [("bilinear", InterpolationMode.BILINEAR), ("bicubic", InterpolationMode.BICUBIC)]
)
def test_evaluation_is_resize_and_centre_crop(name, mode):
    """Short side to size / crop_pct, antialiased, then the middle: what published accuracies were measured with."""
    expected = CenterCrop(64)(Resize(80, interpolation=mode)(Image.fromarray(PHOTO)))
    found = EvalTransform(size=64, crop_pct=0.8, interpolation=name)(PHOTO)
    assert found.dtype == torch.uint8 and found.shape == (3, 64, 64)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_squash_keeps_the_whole_image():
    found = EvalTransform(size=(32, 64), crop_pct=1.0, crop_mode="squash")(PHOTO)
    expected = Image.fromarray(PHOTO).resize((64, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_small_images_are_enlarged():
    assert EvalTransform(size=64, crop_pct=1.0)(np.zeros((8, 8, 3), np.uint8)).shape == (3, 64, 64)


def full_train_transform():
    return TrainTransform(size=48, rotate=10, shift=0.1, jitter=0.3, erase=0.5)


def test_training_transform_depends_on_the_seed_only():
    one, two = full_train_transform(), full_train_transform()
    one.set_random_seed(7)
    first = one(PHOTO)
    for _ in range(3):
        two(PHOTO)  # another history
    two.set_random_seed(7)
    assert torch.equal(first, two(PHOTO))
    two.set_random_seed(8)
    assert not torch.equal(first, two(PHOTO))
    assert first.shape == (3, 48, 48) and first.dtype == torch.uint8


def test_training_options_do_what_they_say():
    plain = TrainTransform(size=(180, 240), scale=(1, 1), ratio=(4 / 3, 4 / 3), flip=0.0)
    assert torch.equal(plain(PHOTO).permute(1, 2, 0), torch.from_numpy(PHOTO.copy()))
    flipped = TrainTransform(size=(180, 240), scale=(1, 1), ratio=(4 / 3, 4 / 3), flip=1.0)
    assert torch.equal(flipped(PHOTO).permute(1, 2, 0), torch.from_numpy(PHOTO[:, ::-1].copy()))
    erased = TrainTransform(size=(180, 240), scale=(1, 1), ratio=(4 / 3, 4 / 3), flip=0.0, erase=1.0)(PHOTO)
    assert (erased == 127).all(0).float().mean() > 0.02


def test_preprocessing_follows_the_backbone():
    backbone = BACKBONES.create("TimmBackbone", name="vit_tiny_patch16_224")
    found = Preprocessing.of(backbone)
    assert (found.size, found.mean, found.std) == ((224, 224), (0.5,) * 3, (0.5,) * 3)
    assert (found.crop_pct, found.interpolation) == (0.9, "bicubic")
    assert Preprocessing.of(backbone, {"size": 96, "crop_pct": 1.0}).size == (96, 96)
    assert Preprocessing(**found.as_dict()) == found


def test_unnormalised_inputs_are_stated_and_done():
    raw = Preprocessing(normalise=False)
    assert raw.statistics() == {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert raw.as_dict()["normalise"] is False and raw.mean == (0.485, 0.456, 0.406)


def test_refusals():
    backbone = torch.nn.Identity()
    with pytest.raises(OptionError, match="did you mean 'crop_pct'"):
        Preprocessing.of(backbone, {"crop_pc": 1.0})
    with pytest.raises(OptionError, match="did you mean 'bicubic'"):
        EvalTransform(interpolation="bicubical")
    with pytest.raises(OptionError, match="crop_pct"):
        Preprocessing(crop_pct=1.2)
    with pytest.raises(OptionError, match="image size"):
        EvalTransform(size=(1, 2, 3))
    with pytest.raises(OptionError, match="one above 0"):
        Mixup(num_classes=3, mixup=0, cutmix=0)


@pytest.mark.parametrize("kind", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
@pytest.mark.parametrize("size", [4, 5, 1])
def test_mixing_keeps_image_and_label_in_step(kind, size):
    """Image i is filled with its class index, so a mixed image's mean must equal its soft label's mean class."""
    np.random.seed(3)
    mix = TRANSFORMS.create({"type": "Mixup", "num_classes": 6, **kind})
    images = torch.arange(size).float().view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    mixed, samples = mix(images, [{"label": i, "index": i} for i in range(size)])
    soft = torch.stack([sample["soft_label"] for sample in samples])
    torch.testing.assert_close(soft.sum(1), torch.ones(size))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(6.0))
    assert [sample["label"] for sample in samples] == list(range(size))
    if size == 4:
        assert not torch.equal(mixed, images)
    if size % 2:
        assert soft[-1, size - 1] == 1 and torch.equal(mixed[-1], images[-1])
    assert torch.equal(images[:, 0, 0, 0], torch.arange(size).float())  # the batch itself is left alone
