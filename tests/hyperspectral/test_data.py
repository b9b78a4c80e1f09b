"""The composed scene, the reduction and the patches: what is promised about spectra, fitting and borders."""

import numpy as np
import pytest
import torch

from tasks.hyperspectral.composed import CLASSES, composed_scene, library
from tasks.hyperspectral.data import SpectralPatches
from tasks.hyperspectral.reduction import Reduction, fit_basis
from zoo.errors import OptionError, ZooError

SMALL = dict(name="composed", size=(40, 40), parcels=30)
SPLIT = dict(how="random", train=0.2, val=0.1)
PCA = dict(kind="pca", components=6)


def patches(**options):
    given = dict(scene=SMALL, split=SPLIT, reduction=PCA, patch=5)
    return SpectralPatches(**{**given, **options})


def test_halves_share_no_spectrum():
    spectra, halves = library()
    assert spectra.shape == (7261, 180) and np.isfinite(spectra).all()
    for name in CLASSES:
        first, second = halves["first"][name], halves["second"][name]
        assert len(first) >= 15 and not set(first) & set(second)
        assert not (spectra[first][:, None] == spectra[second][None, :40]).all(-1).any()  # no copies either


def test_composed_scenes_are_reproducible_and_complete():
    scene = composed_scene(seed=3, size=(40, 50), parcels=40)
    assert scene.cube.shape == (40, 50, 180) and scene.cube.dtype == np.float32
    assert set(np.unique(scene.labels)) <= set(range(1, 13)) and len(np.unique(scene.labels)) >= 10
    again = composed_scene(seed=3, size=(40, 50), parcels=40)
    assert np.array_equal(scene.cube, again.cube)
    assert not np.array_equal(scene.cube, composed_scene("second", seed=3, size=(40, 50), parcels=40).cube)
    with pytest.raises(OptionError, match="'first' or 'second'"):
        composed_scene("third")


def test_without_earthlib_the_message_says_what_to_install(monkeypatch):
    library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZooError, match="pip install earthlib"):
        composed_scene()
    library.cache_clear()


def test_reduction_is_fitted_on_training_pixels_only_by_default():
    data = patches()
    pixels = data.scene.cube[data.parts["train"]].astype(np.float64)
    reduced = (pixels - data.basis.mean) @ data.basis.matrix
    np.testing.assert_allclose(np.cov(reduced.T), np.eye(6), atol=2e-3)
    np.testing.assert_allclose(reduced.mean(0), 0, atol=1e-3)
    everywhere = patches(reduction=dict(**PCA, fit="scene"))
    assert np.abs(everywhere.basis.mean - data.basis.mean).max() > 1e-4
    assert np.array_equal(patches(part="test").basis.matrix, data.basis.matrix)


def test_another_scene_is_reduced_as_the_training_scene():
    other = dict(SMALL, half="second", seed=9)
    data = patches(scene=other, split=dict(how="all"), fit_scene=SMALL, fit_split=SPLIT, part="test")
    assert np.array_equal(data.basis.matrix, patches().basis.matrix) and len(data) == 1600


def test_patch_is_the_neighbourhood_with_zeros_outside():
    data = patches()
    reduced = data.basis(data.scene.cube)
    for index in (0, len(data) // 2, len(data) - 1):
        sample = data[index]
        row, column = sample["data_samples"]["row"], sample["data_samples"]["column"]
        assert sample["data_samples"]["label"] == data.scene.labels[row, column] - 1
        np.testing.assert_array_equal(sample["inputs"][:, 2, 2], reduced[row, column])
    corner = patches(split=dict(how="all"))[0]["inputs"]
    assert (corner[:, :2] == 0).all() and (corner[:, :, :2] == 0).all() and (corner[:, 2, 2] != 0).any()


def test_augmentation_keeps_the_middle_and_the_set_of_pixels():
    plain, turned = patches(), patches(augment=True)
    np.random.seed(0)
    seen = set()
    for _ in range(20):
        values = turned[7]["inputs"]
        np.testing.assert_array_equal(values[:, 2, 2], plain[7]["inputs"][:, 2, 2])
        np.testing.assert_array_equal(values.flatten(1).sort(1)[0], plain[7]["inputs"].flatten(1).sort(1)[0])
        seen.add(values.numpy().tobytes())
    assert len(seen) > 4


def test_standardisation_and_unit_length():
    pixels = np.random.default_rng(0).random((50, 8)) + 1
    z = fit_basis(pixels, kind="standardise")(pixels[None])[0]
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0), 1, atol=1e-5)
    basis = fit_basis(pixels, components=3, unit_length=True)
    np.testing.assert_allclose(basis(pixels[None]), basis(7 * pixels[None]), atol=1e-4)


def test_whitening_by_degrees():
    pixels = np.random.default_rng(0).standard_normal((400, 5)) * [16, 8, 4, 2, 1]
    full, half, none = (fit_basis(pixels, components=3, whiten=w)(pixels[None])[0].std(0, ddof=1) for w in (1, 0.5, 0))
    np.testing.assert_allclose(full, 1, atol=1e-4)
    np.testing.assert_allclose(half**2, none, rtol=1e-3)
    np.testing.assert_allclose(none[0], 1, atol=1e-4)
    assert none[0] / none[2] > 3
    with pytest.raises(OptionError, match=r"whiten must lie in \[0, 1\]"):
        fit_basis(pixels, components=3, whiten=2)
    with pytest.raises(ZooError, match="nothing to tell apart"):
        fit_basis(np.ones((20, 5)), components=3)


def test_the_model_keeps_the_basis_exactly():
    data = patches()
    kept = Reduction(180, 6)
    with pytest.raises(ZooError, match="holds no reduction"):
        kept.basis()
    kept.keep(data.basis)
    copy = Reduction(180, 6)
    copy.load_state_dict(kept.state_dict())
    np.testing.assert_array_equal(copy.basis()(data.scene.cube), data.basis(data.scene.cube))
    with pytest.raises(OptionError, match="reduced from 180 bands to 6"):
        Reduction(180, 7).keep(data.basis)
    with pytest.raises(ZooError, match="has 100 bands"):
        data.basis(data.scene.cube[..., :100])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 4}, "must be odd"),
        ({"part": "tset"}, "did you mean 'test'"),
        ({"reduction": {"kind": "ica"}}, "'pca' or 'standardise'"),
        ({"reduction": {"components": 500}}, "500 components cannot be fitted"),
        ({"reduction": {"fit": "test"}}, "fitted on 'train' or 'scene'"),
        ({"reduction": {"component": 3}}, "does not fit"),
        ({"scene": {**SMALL, "parcel": 3}}, "does not fit"),
        (
            {"split": {"how": "random", "train": 0.5}, "part": "val"},
            "no pixel of composed first 0 is in .* 'val'",
        ),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ZooError, match=message):
        patches(**options)


def test_mixing_stays_within_a_class():
    from tasks.hyperspectral.model import mixed_in_class

    labels = [0, 1, 0, 1, 1, 4]
    inputs = torch.tensor(labels, dtype=torch.float32).reshape(6, 1, 1, 1) + torch.zeros(6, 2, 3, 3)
    noise = torch.rand(6, 2, 3, 3) * 0.1
    mixed = mixed_in_class(inputs + noise, [{"label": label} for label in labels], 1.0)
    assert ((mixed - inputs) >= 0).all() and ((mixed - inputs) <= 0.1).all()
    assert (mixed != inputs + noise)[:5].any() and torch.allclose(mixed[5], (inputs + noise)[5])
