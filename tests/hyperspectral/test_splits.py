"""Splits: parts are disjoint, have the sizes asked for, and patches of blocks never share a pixel."""

import numpy as np
import pytest

from tasks.hyperspectral.splits import describe, grown, split_pixels
from zoo.errors import OptionError, UnknownNameError

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, (60, 80))


def disjoint(parts):
    return sum(mask.astype(int) for mask in parts.values()).max() <= 1


def test_random_shares_of_each_class():
    parts = split_pixels(LABELS, "random", patch=5, train=0.1, val=0.2, seed=3)
    assert disjoint(parts) and not any(mask[LABELS == 0].any() for mask in parts.values())
    for label in (1, 2, 3):
        number = (label == LABELS).sum()
        assert (LABELS[parts["train"]] == label).sum() == round(0.1 * number)
        assert (LABELS[parts["val"]] == label).sum() == round(0.2 * number)
    assert sum(mask.sum() for mask in parts.values()) == (LABELS > 0).sum()
    again = split_pixels(LABELS, "random", patch=5, train=0.1, val=0.2, seed=3)
    other = split_pixels(LABELS, "random", patch=5, train=0.1, val=0.2, seed=4)
    assert np.array_equal(parts["train"], again["train"]) and not np.array_equal(parts["train"], other["train"])


def test_a_tiny_share_still_trains_on_every_class():
    rare = np.where(np.arange(LABELS.size).reshape(LABELS.shape) < 3, 4, LABELS)
    parts = split_pixels(rare, "random", patch=5, train=0.01)
    assert (rare[parts["train"]] == 4).sum() == 1


def test_fixed_counts():
    parts = split_pixels(LABELS, "count", patch=5, train=7, val=2)
    assert disjoint(parts)
    assert [(LABELS[parts["train"]] == c).sum() for c in (1, 2, 3)] == [7] * 3
    assert [(LABELS[parts["val"]] == c).sum() for c in (1, 2, 3)] == [2] * 3
    with pytest.raises(OptionError, match="too few for 5000"):
        split_pixels(LABELS, "count", patch=5, train=5000)


@pytest.mark.parametrize("patch", [3, 7])
def test_blocks_share_no_pixel_of_any_patch(patch):
    labels = np.kron(RNG.integers(1, 4, (6, 8)), np.ones((10, 10), dtype=int))
    parts = split_pixels(labels, "blocks", patch=patch, block=12, train=0.5, val=0.2)
    assert disjoint(parts) and all(mask.any() for mask in parts.values())
    seen = [grown(mask, patch // 2) for mask in parts.values()]
    assert not (seen[0] & seen[1]).any() and not (seen[0] & seen[2]).any() and not (seen[1] & seen[2]).any()


def test_blocks_come_near_the_shares():
    labels = RNG.integers(1, 4, (120, 120))
    parts = split_pixels(labels, "blocks", patch=1, block=10, train=0.5, val=0.2)
    shares = [mask.mean() for mask in parts.values()]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.03)


def test_all_uses_every_labelled_pixel():
    parts = split_pixels(LABELS, "all", patch=5)
    assert all(np.array_equal(mask, LABELS > 0) for mask in parts.values())


def test_description_counts_what_was_dropped():
    parts = split_pixels(LABELS, "blocks", patch=5, block=20)
    text = describe(LABELS, parts, ("a", "b", "c"))
    assert text.splitlines()[0].split() == ["class", "train", "val", "test", "dropped"]
    row = [int(number.replace(",", "")) for number in text.splitlines()[1].split()[1:]]
    assert sum(row) == (LABELS == 1).sum() and row[3] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "random", "train": 0.9, "val": 0.2}, r"train \+ val < 1"),
        ({"how": "blocks", "block": 5}, "not larger than a patch of 5"),
        ({"how": "random", "share": 0.1}, "does not take these options"),
        ({"how": "all", "train": 0.1}, "takes no"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(OptionError, match=message):
        split_pixels(LABELS, patch=5, **options)


def test_unknown_way_and_lost_classes():
    with pytest.raises(UnknownNameError, match="did you mean 'random'"):
        split_pixels(LABELS, "randm", patch=5)
    labels = np.ones((40, 40), dtype=int)
    labels[:20, :20] = 2  # one block only: it cannot be in two parts
    with pytest.raises(OptionError, match="have no training pixel"):
        for seed in range(20):
            split_pixels(labels, "blocks", patch=3, block=20, train=0.3, val=0.3, seed=seed)
