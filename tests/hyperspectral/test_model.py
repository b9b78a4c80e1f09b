"""SpectralClassifier: heads, freezing, preprocessing, saving with its reduction, and every shipped config."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

import configs
from backbones.lola_specvit_layers import GatedLoRALinear
from tasks.hyperspectral.maps import predict_scene
from tasks.hyperspectral.model import SpectralClassifier, SpectralPreprocessor
from tasks.hyperspectral.reduction import fit_basis
from zoo.checkpoint import load, save
from zoo.errors import OptionError
from zoo.factory import build
from zoo.freeze import count
from zoo.registry import DATASETS, HOOKS, METRICS

FOLDER = Path(configs.__file__).parent / "hyperspectral"
TIDY = dict(
    type="TimmBackbone", name="lola_specvit_tidy", in_chans=4, img_size=5, dim=8, depths=(1, 1), num_heads=(1, 2)
)
CONFIG = dict(
    type="SpectralClassifier",
    backbone=dict(TIDY, front=(2, 4)),
    head=dict(type="LinearHead", num_classes=3),
    patch=5,
    reduction=dict(bands=7, components=4),
)
CUBE = np.random.default_rng(0).random((9, 11, 7)).astype(np.float32)


def fitted(**changes):
    model = build({**CONFIG, **changes})
    model.reduction.keep(fit_basis(CUBE.reshape(-1, 7), components=4))
    return model.eval()


def batch(number=3):
    return {"inputs": torch.randn(number, 4, 5, 5), "data_samples": [{"label": i % 3} for i in range(number)]}


def test_modes():
    model = fitted()
    data = model.data_preprocessor(batch())
    assert model(**data).shape == (3, 3)
    assert model(**data, mode="loss")["loss"].ndim == 0
    assert set(model(**data, mode="predict")[0]) == {"label", "score", "probabilities"}


def test_the_backbones_own_classifier_may_stay():
    model = fitted(backbone=dict(TIDY, front=(2, 4), num_classes=3), head=dict(num_classes=3, label_smoothing=0.1))
    data = model.data_preprocessor(batch())
    torch.testing.assert_close(model(**data), model.backbone(data["inputs"]))
    with pytest.raises(OptionError, match="backbone has 5 classes, the head num_classes=3"):
        fitted(backbone=dict(TIDY, num_classes=5), head=dict(num_classes=3))


def test_published_recipe_trains_lora_only():
    lora = dict(TIDY, front=(2, 4), lora=dict(rank=2), num_classes=3)
    model = fitted(backbone=lora, head=dict(num_classes=3), lora_only=True)
    added = {
        id(p) for m in model.modules() if isinstance(m, GatedLoRALinear) for a in m.added() for p in a.parameters()
    }
    assert {id(p) for p in model.parameters() if p.requires_grad} == added
    model.train()
    assert not model.backbone.spectral_conv[1].training  # frozen norms keep their statistics
    with pytest.raises(OptionError, match="leave `adapter` out"):
        fitted(backbone=lora, lora_only=True, adapter="LoRA")


def test_front_end_trains_beside_an_adapter():
    body = dict(type="TimmBackbone", name="test_vit")
    front = dict(type="SpectralFrontEnd", in_chans=4, size=160, backbone=body)
    model = fitted(backbone=front, adapter=dict(type="LoRA", rank=2, where=["q", "v"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"backbone.front.conv.0.weight", "head.fc.weight"} <= trained
    assert any(".adapters." in name for name in trained)
    assert not any(name.startswith("backbone.body") and ".adapters." not in name for name in trained)
    assert model(**model.data_preprocessor(batch())).shape == (3, 3)


@pytest.mark.parametrize("adapter", [None, dict(type="LoRA", rank=2, where=["q", "v"])])
def test_saved_model_maps_a_cube_as_before(tmp_path, adapter):
    torch.manual_seed(1)
    model = fitted(adapter=adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save(model, tmp_path, labels=["a", "b", "c"])
    found, again = predict_scene(model, CUBE), predict_scene(load(tmp_path), CUBE)
    assert np.array_equal(found.labels, again.labels)
    np.testing.assert_allclose(found.uncertainty, again.uncertainty, atol=1e-5)


def test_preprocessor_mistakes():
    with pytest.raises(OptionError, match="'bands_first' or 'rows_first'"):
        SpectralPreprocessor(axis_order="columns")
    with pytest.raises(OptionError, match="at least 0"):
        SpectralPreprocessor(noise=-1)
    with pytest.raises(OptionError, match=r"needs as many features as rows, got \(3, 4, 5, 5\)"):
        SpectralPreprocessor(axis_order="rows_first")(batch())
    with pytest.raises(OptionError, match=r"must be \(B, features, P, P\)"):
        SpectralPreprocessor()({"inputs": torch.zeros(2, 5, 5)})


def test_noise_only_while_training():
    step, data = SpectralPreprocessor(noise=0.5, class_mix=1.0), batch()
    assert torch.equal(step(data, False)["inputs"], data["inputs"])
    assert not torch.equal(step(data, True)["inputs"], data["inputs"])


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_config_builds(file):
    config = Config.fromfile(str(file), lazy_import=False).to_dict()
    body = config["model"]["backbone"].get("backbone")
    if body is not None:
        body["pretrained"] = False  # needs the network; the architecture does not
    with torch.device("meta" if file.stem == "lola_specvit" else "cpu"):
        model = SpectralClassifier(**{k: v for k, v in config["model"].items() if k != "type"})
    frozen = config["model"].get("adapter") is not None or config["model"].get("lora_only", False)
    assert count(model).trainable > 0 and (count(model).frozen > 0) == frozen
    for part in ("train", "val", "test"):
        data = config[f"{part}_dataloader"]["dataset"]
        assert data["part"] == part and data["patch"] == model.patch
        bands, features = model.reduction.matrix.shape
        assert data["reduction"].get("components", bands) == features
        assert data["reduction"].get("unit_length", False) == model.reduction.unit_length
        DATASETS.get(data["type"])
    METRICS.create(config["val_evaluator"])
    for hook in config["custom_hooks"]:
        HOOKS.create(hook)
    if file.stem == "lola_specvit":
        assert (count(model).total, count(model).trainable) == (254_642_348, 73_586_944)
