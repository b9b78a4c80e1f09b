"""Exchange with HF peft: the real peft reads what we write and we read what it writes, with equal outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from zoo.adapters.attached import Attached
from zoo.adapters.inject import attachments
from zoo.errors import CheckpointError, CheckpointFileError, SiteError, UnknownNameError
from zoo.peft_bridge import export_peft, import_peft

SPECS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": dict(depth=2, img_size=32),
    "convnext_atto": dict(depths=(1, 1, 1, 1)),
    "resnet18": {},
    "eva02_tiny_patch14_224": dict(depth=2, img_size=28),
}


def build(name: str, num_classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=num_classes, **SPECS[name]).eval()


def images(model: nn.Module) -> Tensor:
    side = 28 if "Eva" in type(model).__name__ else 32
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images(model if not isinstance(model, peft.PeftModel) else model.base_model.model))


def randomise(parameters: Any) -> None:
    torch.manual_seed(3)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.2)


def assert_close(found: Tensor, expected: Tensor, base: Tensor) -> None:
    """Ours adds the update to the weight, peft adds a branch: the order of fp32 sums differs, nothing else."""
    scale = float(expected.abs().max())
    assert float((expected - base).abs().max()) > 1e-2 * scale, (
        "the adapter does nothing, so equality would say nothing"
    )
    assert float((found - expected).abs().max()) <= 2e-5 * scale


def ours(name: str, **options: Any) -> tuple[nn.Module, Attached, Tensor]:
    model = build(name)
    base = run(model)
    attached = zoo.attach(model, {"type": "LoRA", **options})
    randomise(attached.parameters())
    return model, attached, base


EXPORTS = [
    ("vit_tiny_patch16_224", dict(where="q,v", rank=3, alpha=7)),
    ("vit_tiny_patch16_224", dict(where="k", rank=2)),
    ("vit_tiny_patch16_224", dict(where="qkv,out,fc1,fc2", rank=4, alpha=8, rslora=True)),
    (
        "vit_tiny_patch16_224",
        dict(where="q,k,v,fc1", rank=4, per_site={"fc1": dict(rank=6, alpha=3), "blocks.1.attn.qkv": dict(rank=1)}),
    ),
    ("vit_tiny_patch16_224", dict(where="qkv,embed", rank=4, init="pissa")),
    ("vit_tiny_patch16_224", dict(where="q,v", rank=100, rslora=True)),
    ("convnext_atto", dict(where="fc1,fc2,conv,embed,!*.conv_dw", rank=3, alpha=4)),
    ("resnet18", dict(where="conv", rank=4)),
]


class TestExport:
    @pytest.mark.parametrize(("name", "options"), EXPORTS)
    def test_peft_reads_it(self, name: str, options: dict[str, Any], tmp_path: Path) -> None:
        model, _, base = ours(name, **options)
        theirs = peft.PeftModel.from_pretrained(build(name), str(export_peft(model, tmp_path))).eval()
        assert_close(run(theirs), run(model), base)
        assert_close(run(theirs.merge_and_unload()), run(model), base)

    def test_rank_of_parts(self, tmp_path: Path) -> None:
        model, _, _ = ours("vit_tiny_patch16_224", where="q,v", rank=3)
        tensors = load_file(export_peft(model, tmp_path) / "adapter_model.safetensors")
        up = tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
        assert up.shape == (3 * 192, 6)
        assert not up[192:384].any() and not up[:192, 3:].any() and not up[384:, :3].any()

    def test_classifier_goes_along(self, tmp_path: Path) -> None:
        model = zoo.create(
            "vit_tiny_patch16_224", num_classes=5, adapter=dict(type="LoRA", rank=2), **SPECS["vit_tiny_patch16_224"]
        )
        randomise(p for p in model.parameters() if p.requires_grad)
        fresh = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SPECS["vit_tiny_patch16_224"]).eval()
        plain = {k: v for k, v in model.state_dict().items() if ".adapters." not in k and not k.startswith("head.")}
        fresh.load_state_dict(plain, strict=False)
        base = run(fresh)
        theirs = peft.PeftModel.from_pretrained(fresh, str(export_peft(model, tmp_path))).eval()
        assert_close(run(theirs), run(model), base)

    def test_task_head_becomes_classifier(self, tmp_path: Path) -> None:
        task = zoo.create(
            dict(
                type="ImageClassifier",
                backbone=dict(type="TimmBackbone", name="resnet18"),
                head=dict(type="LinearHead", num_classes=5),
                adapter=dict(type="LoRA", rank=2, where="conv"),
            )
        )
        for attached in attachments(task).values():
            randomise(attached.parameters())
        fresh = build("resnet18")
        plain = {k: v for k, v in task.backbone.state_dict().items() if ".adapters." not in k}
        fresh.load_state_dict(plain, strict=False)
        base = run(fresh)
        theirs = peft.PeftModel.from_pretrained(fresh, str(export_peft(task, tmp_path))).eval()
        assert_close(run(theirs), run(task), base)

    def test_refusals(self, tmp_path: Path) -> None:
        model, _, _ = ours("vit_tiny_patch16_224", where="q")
        with pytest.raises(UnknownNameError, match="default"):
            export_peft(model, tmp_path / "a", "defualt")
        zoo.merge(model)
        with pytest.raises(SiteError, match="merged"):
            export_peft(model, tmp_path / "a")
        grouped, _, _ = ours("convnext_atto", where=["conv", "*.conv_dw"])
        with pytest.raises(SiteError, match="40 groups"):
            export_peft(grouped, tmp_path / "a")
        bypassed, _, _ = ours("eva02_tiny_patch14_224", where="qkv")
        with pytest.raises(SiteError, match="never called"):
            export_peft(bypassed, tmp_path / "a")
        other = build("resnet18")
        zoo.attach(other, "BitFit")
        with pytest.raises(SiteError, match="BitFit"):
            export_peft(other, tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_trained_weight_without_a_place(self, tmp_path: Path) -> None:
        model, _, _ = ours("vit_tiny_patch16_224", where="q")
        model.cls_token.requires_grad_(True)
        with pytest.raises(CheckpointError, match="cls_token"):
            export_peft(model, tmp_path)
        model.cls_token.requires_grad_(False)
        model.norm.weight.requires_grad_(True)  # "norm" is also the end of "blocks.0.attn.norm" to peft
        with pytest.raises(CheckpointError, match="norm"):
            export_peft(model, tmp_path)


IMPORTS = [
    ("vit_tiny_patch16_224", dict(target_modules=["qkv", "fc1"], r=4, lora_alpha=9)),
    ("vit_tiny_patch16_224", dict(target_modules=r"blocks\.\d+\.(attn\.proj|mlp\.fc2)", r=4, use_rslora=True)),
    (
        "vit_tiny_patch16_224",
        dict(
            target_modules=["qkv", "proj"],
            r=4,
            rank_pattern={"blocks.1.attn.qkv": 2},
            alpha_pattern={r"^blocks\.0\..*": 3},
        ),
    ),
    ("vit_tiny_patch16_224", dict(target_modules=["qkv"], r=300, lora_alpha=30)),
    ("vit_tiny_patch16_224", dict(target_modules=["fc1"], r=4, modules_to_save=["head"])),
    ("convnext_atto", dict(target_modules=["fc1", "stem.0"], r=64, modules_to_save=["head.fc"])),
    ("resnet18", dict(target_modules=["conv1", "downsample.0"], r=4, init_lora_weights="gaussian")),
]


class TestImport:
    @pytest.mark.parametrize(("name", "options"), IMPORTS)
    def test_reads_peft(self, name: str, options: dict[str, Any], tmp_path: Path) -> None:
        base = run(build(name))
        theirs = peft.get_peft_model(build(name), peft.LoraConfig(**options)).eval()
        randomise(p for p in theirs.parameters() if p.requires_grad)
        theirs.save_pretrained(str(tmp_path))
        model = build(name)
        attached = import_peft(model, tmp_path, "foreign")
        assert_close(run(model), run(theirs), base)
        trained = {k for k, p in model.named_parameters() if p.requires_grad}
        heads = {k for k in trained if ".adapters." not in k}
        assert heads == (
            {f"{options['modules_to_save'][0]}.{k}" for k in ("weight", "bias")}
            if "modules_to_save" in options
            else set()
        )
        zoo.merge(model)
        assert_close(run(model), run(theirs), base)
        assert attached.merged

    def test_pickled_tensors(self, tmp_path: Path) -> None:
        theirs = peft.get_peft_model(build("resnet18"), peft.LoraConfig(target_modules=["conv1"], r=4)).eval()
        randomise(p for p in theirs.parameters() if p.requires_grad)
        theirs.save_pretrained(str(tmp_path), safe_serialization=False)
        model = build("resnet18")
        base = run(model)
        import_peft(model, tmp_path)
        assert_close(run(model), run(theirs), base)

    def test_our_own_round_trip(self, tmp_path: Path) -> None:
        model, _, base = ours("vit_tiny_patch16_224", where="q,v", rank=120, alpha=60)
        again = build("vit_tiny_patch16_224")
        import_peft(again, export_peft(model, tmp_path))
        assert_close(run(again), run(model), base)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (dict(use_dora=True), "use_dora"),
            (dict(bias="all"), "bias"),
            (dict(init_lora_weights="pissa"), "init_lora_weights"),
        ],
    )
    def test_not_plain_lora(self, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
        config = peft.LoraConfig(target_modules=["fc1"], r=4, **options)
        peft.get_peft_model(build("vit_tiny_patch16_224"), config).save_pretrained(str(tmp_path))
        self.refused(tmp_path, CheckpointError, reason)

    def test_other_method(self, tmp_path: Path) -> None:
        theirs = peft.get_peft_model(build("vit_tiny_patch16_224"), peft.LoHaConfig(target_modules=["fc1"], r=4))
        theirs.save_pretrained(str(tmp_path))
        self.refused(tmp_path, CheckpointError, "LOHA")

    def refused(self, folder: Path, error: type[Exception], reason: str, name: str = "vit_tiny_patch16_224") -> None:
        """The import fails with the reason, and the model is as before."""
        model = build(name)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(error, match=reason):
            import_peft(model, folder)
        assert not attachments(model) and all(p.requires_grad for p in model.parameters())
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)

    def written(self, folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        base = dict(peft_type="LORA", r=2, lora_alpha=2)
        (folder / "adapter_config.json").write_text(json.dumps(base | config))
        return folder

    def test_malformed(self, tmp_path: Path) -> None:
        key = "base_model.model.blocks.0.mlp.fc1"
        good = {f"{key}.lora_A.weight": torch.ones(2, 192), f"{key}.lora_B.weight": torch.ones(768, 2)}
        folder = tmp_path / "f"
        import_peft(build("vit_tiny_patch16_224"), self.written(folder, good))
        self.refused(
            self.written(folder, {k: v for k, v in good.items() if "_A" in k}), CheckpointFileError, "other factor"
        )
        self.refused(self.written(folder, {k: v[:1] for k, v in good.items()}), CheckpointFileError, "shapes")
        wide = {f"{key}.lora_A.weight": torch.ones(2, 100), f"{key}.lora_B.weight": torch.ones(768, 2)}
        self.refused(self.written(folder, wide), CheckpointError, r"\(768, 100\)")
        moved = {k.replace("fc1", "fc9"): v for k, v in good.items()}
        self.refused(self.written(folder, moved), SiteError, r"mlp\.fc9.*did you mean")
        stray = good | {"base_model.model.head.weight": torch.zeros(5, 192)}
        self.refused(self.written(folder, stray), CheckpointError, "neither")
        self.refused(self.written(folder, stray, modules_to_save="head"), CheckpointFileError, "list of names")
        small = good | {"base_model.model.head.weight": torch.zeros(4, 192)}
        self.refused(self.written(folder, small, modules_to_save=["head"]), CheckpointError, "saved whole")
        self.refused(self.written(folder, good, lora_alpha="x"), CheckpointFileError, "not a number")
        self.refused(self.written(folder, good, alpha_pattern={"(a+)+": 1}), CheckpointFileError, "forever")
        self.refused(self.written(folder, good, alpha_pattern={"(": 1}), CheckpointFileError, "regular expression")
        (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")
        self.refused(folder, CheckpointFileError, "safetensors")
        (folder / "adapter_model.safetensors").unlink()
        self.refused(folder, CheckpointFileError, "does not exist")
        (folder / "adapter_config.json").write_text("[1]")
        self.refused(folder, CheckpointFileError, "list")

    def test_place_where_peft_does_nothing(self, tmp_path: Path) -> None:
        theirs = peft.get_peft_model(build("eva02_tiny_patch14_224"), peft.LoraConfig(target_modules=["qkv"], r=2))
        theirs.save_pretrained(str(tmp_path))
        self.refused(tmp_path, SiteError, "never called", "eva02_tiny_patch14_224")
