"""The classifier heads: known values, soft targets, decoding, gradients, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import OptionError
from zoo.registry import HEADS

NAMES = ("LinearHead", "CosineHead", "MLPHead")


@pytest.fixture(params=NAMES)
def head(request):
    torch.manual_seed(0)
    return HEADS.create(request.param, in_features=6, num_classes=4)


def samples(*labels):
    return [{"label": label} for label in labels]


def test_forward_shape_and_gradients(head):
    features = torch.randn(5, 6)
    logits = head(features)
    assert logits.shape == (5, 4)
    loss = head.loss(logits, samples(0, 1, 2, 3, 0))
    assert set(loss) == {"loss"} and loss["loss"].ndim == 0
    loss["loss"].backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_loss_known_value(head):
    logits = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0]])  # p = 1/2, 1/6, 1/6, 1/6
    assert head.loss(logits, samples(0))["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert head.loss(logits, samples(2))["loss"].item() == pytest.approx(math.log(6), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_label_smoothing_spreads_mass_over_all_classes(name):
    head = HEADS.create(name, in_features=6, num_classes=4, label_smoothing=0.4)
    logits = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0]])
    expected = 0.7 * math.log(2) + 3 * 0.1 * math.log(6)  # 0.6 + 0.4 / 4 on the true class
    assert head.loss(logits, samples(0))["loss"].item() == pytest.approx(expected, abs=1e-6)
    soft = [{"label": 0, "soft_label": F.one_hot(torch.tensor(0), 4).float()}]
    assert head.loss(logits, soft)["loss"].item() == pytest.approx(expected, abs=1e-6)


def test_soft_labels_mix_the_losses(head):
    logits = torch.randn(1, 4)
    mixed = [{"label": 0, "soft_label": torch.tensor([0.3, 0.0, 0.7, 0.0])}]
    one, two = (head.loss(logits, samples(k))["loss"] for k in (0, 2))
    assert head.loss(logits, mixed)["loss"].item() == pytest.approx((0.3 * one + 0.7 * two).item(), abs=1e-6)


def test_loss_in_half_precision_is_computed_in_fp32(head):
    logits = torch.tensor([[0.0, 20.0, 0.0, 0.0]])
    assert head.loss(logits.bfloat16(), samples(0))["loss"].dtype == torch.float32
    assert head.loss(logits.bfloat16(), samples(0))["loss"].item() == pytest.approx(20.0, abs=1e-4)


def test_predict(head):
    logits = torch.tensor([[0.0, math.log(7.0), 0.0, 0.0], [math.log(2.0), 0.0, 0.0, 0.0]])
    first, second = head.predict(logits, samples(0, 0))
    assert (first["label"], second["label"]) == (1, 0)
    assert first["score"] == pytest.approx(0.7) and second["score"] == pytest.approx(0.4)
    assert first["probabilities"].tolist() == pytest.approx([0.1, 0.7, 0.1, 0.1])


def test_bad_targets_are_refused(head):
    logits = torch.zeros(2, 4)
    with pytest.raises(OptionError, match=r"label 4 is outside 0\.\.3"):
        head.loss(logits, samples(0, 4))
    with pytest.raises(OptionError, match="label -1"):  # torch's ignore_index trick must not pass unseen
        head.loss(logits, samples(0, -1))
    with pytest.raises(OptionError, match="sample 1 of the batch has no 'label'"):
        head.loss(logits, [{"label": 1}, {"path": "x"}])
    with pytest.raises(OptionError, match="2 outputs came with 1"):
        head.loss(logits, samples(0))
    with pytest.raises(OptionError, match="soft labels of shape"):
        head.loss(logits, [{"soft_label": torch.ones(3)}] * 2)


@pytest.mark.parametrize("name", NAMES)
def test_bad_options_are_refused(name):
    with pytest.raises(OptionError, match="at least 2"):
        HEADS.create(name, in_features=6, num_classes=1)
    with pytest.raises(OptionError, match="label_smoothing"):
        HEADS.create(name, in_features=6, num_classes=4, label_smoothing=1.0)


def test_cosine_is_the_scaled_angle_and_blind_to_length():
    head = HEADS.create("CosineHead", in_features=2, num_classes=3, temperature=0.25)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]]))
    features = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(head(features), torch.tensor([[4 * 0.6, 4 * 0.8, -4 * 0.6]]))
    torch.testing.assert_close(head(features * 1000), head(features))
    assert torch.isfinite(head(features.half() * 10_000)).all()  # (4e4)^2 is infinite in fp16


def test_cosine_temperature_learned_or_fixed_and_bounded():
    learned = HEADS.create("CosineHead", in_features=2, num_classes=2)
    fixed = HEADS.create("CosineHead", in_features=2, num_classes=2, learn_temperature=False)
    assert "log_scale" in dict(learned.named_parameters())
    assert "log_scale" not in dict(fixed.named_parameters()) and "log_scale" in fixed.state_dict()
    with torch.no_grad():
        learned.log_scale.fill_(50.0)
    assert learned(torch.randn(8, 2)).abs().max() <= 100.0 + 1e-3
    with pytest.raises(OptionError, match="temperature"):
        HEADS.create("CosineHead", in_features=2, num_classes=2, temperature=0.0)


def test_dropout_only_while_training():
    torch.manual_seed(0)
    head = HEADS.create("LinearHead", in_features=64, num_classes=3, dropout=0.5)
    x = torch.randn(2, 64)
    assert not torch.equal(head.train()(x), head(x))
    assert torch.equal(head.eval()(x), head(x))
