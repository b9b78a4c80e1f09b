"""Crop geometry against the authors' code (LitingLin/LoRAT), and what must hold for any box."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks.tracking.crops import (
    Affine,
    Jitter,
    around,
    clipped,
    cut,
    foreground_mask,
    grown,
    has_extent,
    jittered,
    mean_colour,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "lorat"


def golden(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return tensors, json.loads((GOLDEN / f"{name}.json").read_text())["config"]


def as_rows(crop):
    return np.stack([crop.scale, crop.shift])


@pytest.fixture(scope="module")
def geometry():
    return golden("crop_geometry")


@pytest.mark.parametrize("case", range(7))
def test_golden_crops(geometry, case):
    t, config = geometry
    width, height = config["cases"][case]["output_size_WH"]
    image = t["in.image"].permute(1, 2, 0).numpy()
    box = t[f"in.{case}.box.f64"].numpy()
    crop = around(box, config["cases"][case]["area_factor"], (height, width))
    np.testing.assert_allclose(as_rows(crop), t[f"out.{case}.params.f64"], rtol=1e-12, atol=1e-12)
    for fill, name in ((t["out.mean"].numpy(), "crop"), ((10, 20, 30), "crop_padcolor")):
        pixels, used = cut(image, crop, (height, width), fill)
        torch.testing.assert_close(pixels, t[f"out.{case}.{name}"], rtol=1e-5, atol=1e-3)  # of 255: 4e-6 of the range
    np.testing.assert_array_equal(as_rows(used), t[f"out.{case}.adjusted.f64"])
    np.testing.assert_allclose(used.to_crop(box), t[f"out.{case}.box_in_crop.f64"], rtol=1e-12)
    np.testing.assert_allclose(used.to_image(used.to_crop(box)), t[f"out.{case}.box_back.f64"], rtol=1e-9, atol=1e-9)


def test_golden_mean_colour(geometry):
    # the golden image holds fractions, so the mean is compared on a whole-numbered copy
    image = geometry[0]["in.image"].round().permute(1, 2, 0).numpy().astype(np.uint8)
    np.testing.assert_allclose(mean_colour(image), geometry[0]["in.image"].round().mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("case", range(4))
def test_golden_foreground_mask(case):
    t, config = golden("template_foreground_mask")
    crop = around(t[f"in.{case}.box.f64"].numpy(), config["area_factor"], config["template_size"])
    box = crop.to_crop(t[f"in.{case}.box.f64"].numpy())
    np.testing.assert_allclose(box, t[f"out.{case}.box_in_crop.f64"], rtol=1e-12)
    mask = foreground_mask(box, (14, 14), config["feat"])
    assert torch.equal(mask, t[f"out.{case}.mask"])
    assert torch.equal(mask, t[f"out.{case}.mask_train"])


def test_golden_training_jitter():
    """Among the eight draws are two that would leave too little of the box; the authors' code draws again."""
    t, _ = golden("train_crop_jitter")
    random, box = np.random.Generator(np.random.PCG64(1234)), t["in.box.f64"].numpy()
    for expected in t["out.params.f64"].numpy():
        np.testing.assert_allclose(as_rows(jittered(box, 4.0, (224, 224), random, Jitter())), expected, rtol=1e-12)
    after_eight = np.random.Generator(np.random.PCG64(1234))
    for _ in range(8):
        after_eight.standard_normal(2), after_eight.uniform(-1, 1, 2)
    assert random.random() == after_eight.random()


def test_a_box_is_given_up_after_the_last_try():
    assert jittered((0, 0, 50, 50), 4.0, (20, 20), np.random.default_rng(0), Jitter(least=50)) is None


def test_golden_state_between_frames():
    t, config = golden("decode_and_state")
    width, height = config["search_size_WH"]
    frame = config["image_WH"][::-1]
    for i, previous in enumerate(t["in.prev_box.f64"].numpy()):
        crop = around(grown(previous, config["min_object_size"]), config["area_factor"], (height, width))
        np.testing.assert_allclose(as_rows(crop), t["out.crop_params.f64"][i], rtol=1e-12)
        found = crop.to_image(t["out.win045.box"][i].numpy())
        np.testing.assert_allclose(found, t["out.box_full.f64"][i], rtol=1e-9)
        inside = clipped(found, frame)
        np.testing.assert_allclose(inside, t["out.box_full_clipped.f64"][i], rtol=1e-9)
        state = inside if has_extent(inside) else previous
        np.testing.assert_allclose(state, t["out.next_state_box.f64"][i], rtol=1e-9)


def test_boxes_come_back_from_any_crop():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for _ in range(50):
        corner = random.uniform((0, 0), (80, 50))
        box = np.concatenate((corner, corner + random.uniform(2, 30, 2)))
        _, used = cut(image, around(box, 4.0, (56, 70)), (56, 70), (0, 0, 0))
        np.testing.assert_allclose(used.to_image(used.to_crop(box)), box, atol=1e-3)


def test_a_crop_beside_the_image_is_all_fill():
    image = np.full((20, 20, 3), 200, np.uint8)
    crop = Affine(np.ones(2), np.array([-50.0, -50.0]))
    pixels, used = cut(image, crop, (10, 12), (1, 2, 3))
    assert pixels.shape == (3, 10, 12) and used is crop
    assert torch.equal(pixels[:, 4, 4], torch.tensor([1.0, 2.0, 3.0])) and pixels.std((1, 2)).eq(0).all()


def test_growing_keeps_the_centre():
    np.testing.assert_allclose(grown((10, 10, 12, 40), 10), (6, 10, 16, 40))
