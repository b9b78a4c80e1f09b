"""Spectral front ends: shapes, what they start as, and pretrained backbones behind them, with adapters."""

import pytest
import timm
import torch

from backbones.spectral_front_end import BandEmbedding, BandProjection, SpectralConv3d, SpectralFrontEnd
from zoo.adapters.inject import attach
from zoo.errors import OptionError, UnknownNameError

VIT = dict(type="TimmBackbone", name="test_vit")


@pytest.mark.parametrize("front", ["conv3d", "projection", "embedding"])
def test_front_ends_before_a_vit(front):
    model = SpectralFrontEnd(in_chans=12, front=front, backbone=VIT, size=160).eval()
    x = torch.randn(2, 12, 9, 9)
    y = model(x)
    assert y.shape == (2, model.num_features)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.front.parameters())
    assert (model(x.roll(1, 1)) - y).abs().max() > 1e-6  # the order of the bands matters


def test_projection_starts_as_the_leading_components():
    layer, x = BandProjection(10, 3), torch.randn(2, 10, 4, 4)
    torch.testing.assert_close(layer(x), x[:, :3])
    with pytest.raises(OptionError, match=r"\(B, 10, P, P\), got \(2, 9, 4, 4\)"):
        layer(x[:, :9])
    with pytest.raises(OptionError, match="2 features cannot be projected to 3"):
        BandProjection(2, 3)


def test_pixels_are_embedded_alone():
    layer, x = BandEmbedding(10, 5), torch.randn(1, 10, 4, 4)
    y = layer(x)
    torch.testing.assert_close(layer(x[:, :, 1:2, 2:3]), y[:, :, 1:2, 2:3])
    assert layer(torch.randn(1, 7, 4, 4)).shape == (1, 5, 4, 4)


def test_convolutions_take_any_number_of_bands():
    layer = SpectralConv3d(15, 6).eval()
    assert layer(torch.randn(1, 15, 5, 5)).shape == layer(torch.randn(1, 40, 5, 5)).shape == (1, 6, 5, 5)


def test_wide_fronts_and_convolutional_backbones():
    backbone = dict(type="TimmBackbone", name="test_efficientnet")
    model = SpectralFrontEnd(in_chans=8, channels=8, backbone=backbone, front="projection", size=64).eval()
    assert model(torch.randn(2, 8, 9, 9)).shape == (2, model.num_features)
    assert model.body.conv_stem.in_channels == 8


def test_a_classifier_of_the_backbone_is_left_out():
    model = SpectralFrontEnd(in_chans=8, backbone=timm.create_model("test_vit", num_classes=5), size=160).eval()
    assert model(torch.randn(1, 8, 9, 9)).shape == (1, model.num_features)


@pytest.mark.parametrize("front", ["conv3d", "projection", "embedding"])
def test_adapters_attach_behind_the_front(front):
    model = SpectralFrontEnd(in_chans=8, backbone=VIT, front=front, size=160).eval()
    x = torch.randn(1, 8, 9, 9)
    before = model(x)
    attach(model, "LoRA", where=["q", "v"])
    torch.testing.assert_close(model(x), before)


def test_mistakes():
    with pytest.raises(UnknownNameError, match="did you mean 'conv3d'"):
        SpectralFrontEnd(in_chans=8, front="conv3", backbone=VIT)
    with pytest.raises(OptionError, match="does not take these options"):
        SpectralFrontEnd(in_chans=8, front=dict(kind="projection", width=3), backbone=VIT)
    with pytest.raises(OptionError, match="kernel must be odd"):
        BandEmbedding(8, 3, kernel=4)
    with pytest.raises(OptionError, match=r"got \(8, 9, 9\)"):
        SpectralFrontEnd(in_chans=8, backbone=VIT)(torch.zeros(8, 9, 9))
