"""Goldens of the authors' program: preprocessing in both axis orders, metrics, learning-rate schedules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks.hyperspectral.data import padded, patches_at
from tasks.hyperspectral.metrics import accuracies, class_accuracy, confusion
from tasks.hyperspectral.model import SpectralPreprocessor
from tasks.hyperspectral.reduction import fit_basis
from tasks.hyperspectral.schedule import cycle_rate, restart_rate

GOLDEN = Path(__file__).parents[1] / "golden" / "lola-specvit"


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="module")
def prepared():
    """(golden, our whitened cube with the golden's signs, labelled pixels)."""
    t = golden("preprocess")
    cube, labels = t["in.cube.f64"].numpy(), t["in.gt"].numpy()
    basis = fit_basis(cube.reshape(-1, cube.shape[2]), components=5, whiten=True)
    return t, basis(cube), np.argwhere(labels > 0)


def signed(reduced, t):
    """The sign of a component is arbitrary: take the golden's."""
    sign = np.sign((reduced * t["out.pca.f64"].numpy()).sum((0, 1)))
    return (reduced * sign).astype(np.float32)


def test_pca(prepared):
    t, reduced, _ = prepared
    # Mean and matrix are kept in fp32, so that saved models reduce as trained ones: 1e-5 becomes 5e-5.
    np.testing.assert_allclose(np.abs(reduced), t["out.pca_abs.f64"].numpy(), rtol=5e-5, atol=5e-5)


def test_patches_and_labels(prepared):
    t, reduced, pixels = prepared
    patches = patches_at(padded(signed(reduced, t), 5), pixels, 5)
    torch.testing.assert_close(patches.permute(0, 2, 3, 1), t["out.patches_NHWC"], rtol=5e-5, atol=5e-5)
    labels = t["in.gt"].numpy()[pixels[:, 0], pixels[:, 1]] - 1
    assert labels.tolist() == t["out.labels"].tolist()


@pytest.mark.parametrize(
    ("order", "name"),
    [("bands_first", "out.standardised_NCHW"), ("rows_first", "out.standardised_as_authors_feed")],
)
def test_standardisation_in_both_axis_orders(prepared, order, name):
    t = prepared[0]
    patches = t["out.patches_NHWC"].permute(0, 3, 1, 2)
    step = SpectralPreprocessor(per_patch=True, axis_order=order)
    torch.testing.assert_close(step.arrange(patches), t[name], rtol=1e-5, atol=1e-5)


def test_metrics():
    t = golden("metrics")
    counts = confusion(t["in.y_true"].numpy(), t["in.y_pred"].numpy(), 6)
    assert counts.tolist() == t["out.confusion"].tolist()
    scale = 100 if t["out.oa_aa_kappa.f64"].max() > 1.5 else 1
    np.testing.assert_allclose(class_accuracy(counts) * scale, t["out.per_class.f64"].numpy(), rtol=1e-12)
    np.testing.assert_allclose(
        np.array(list(accuracies(counts).values())) * scale, t["out.oa_aa_kappa.f64"].numpy(), rtol=1e-12
    )


def test_cyclical_schedule():
    expected = golden("schedules")["out.lora_clr_lr.f64"].numpy()
    cycle = dict(first=4, growth=2, lowest=1e-6)
    ours = [[cycle_rate(k, 1e-3, scale=2.0, **cycle), cycle_rate(k, 1e-4, **cycle)] for k in range(14)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_schedule_of_the_training_script():
    expected = golden("schedules")["out.train_script_lr.f64"].numpy()
    ours = [[restart_rate(e, b, 4, base, peak=2e-5) for base in (2e-5, 2e-6)] for e in range(34) for b in range(4)]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
