"""SHViT: goldens from the authors' code through the key converter, the two heads, drop path and the pyramid."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import shvit
from torch import Tensor, nn

import backbones.shvit  # noqa: F401  (registers the models with timm)
from backbones.shvit import DropResidual, SHViT, SHViTFPN, checkpoint_filter_fn, set_drop_path

GOLDEN = Path(__file__).parents[1] / "golden" / "shvit"
COUNTS = {"s1": 6_330_808, "s2": 11_483_072, "s3": 14_245_273, "s4": 16_588_484}
SMALL = {
    "embed_dim": (16, 24, 32),
    "partial_dim": (5, 6, 9),
    "qk_dim": (4, 4, 4),
    "depth": (1, 2, 1),
    "types": ("i", "s", "s"),
    "num_classes": 7,
}


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def params(tensors: dict[str, Tensor], prefix: str = "param.") -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def small(**options: object) -> SHViT:
    """Every parameter random: fresh blocks are the identity, their last norm weights are zero."""
    torch.manual_seed(0)
    model = SHViT(**{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def image(height: int = 64, width: int = 96, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


# ---- goldens ----
@pytest.mark.parametrize("cls", [SHViT, shvit.SHViT])
def test_golden_model_in_eval(cls: type[shvit.SHViT]) -> None:
    t = golden("model_rect")
    model = cls(**SMALL)
    model.load_state_dict(checkpoint_filter_fn({"model": params(t)}, model))
    model.eval()
    final, maps = model.forward_intermediates(t["in.x"])
    for i, x in enumerate(maps, start=1):
        close(x, t[f"out.stage{i}.eval"])
    close(model.forward_head(final), t["out.logits.eval"])
    close(copy.deepcopy(model).fuse()(t["in.x"]), t["out.logits.eval_fused"])


def test_golden_model_in_training() -> None:
    t = golden("model_rect")
    model = SHViT(**SMALL)
    model.load_state_dict(checkpoint_filter_fn(params(t), model))
    x = t["in.x"].clone().requires_grad_()
    logits = model.train()(x)
    close(logits, t["out.logits.train"])
    (logits * t["in.cot"]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    expected = {
        "patch_embed.0.c.weight": "patch_embed.0.c.weight",
        "head.l.weight": "head.l.weight",
        "stages.1.blocks.0.mixer.m.qkv.c.weight": "blocks2.3.mixer.m.qkv.c.weight",
    }
    for ours, theirs in expected.items():
        scale = t[f"grad.{theirs}"].abs().max().item()
        close(grads[ours] / scale, t[f"grad.{theirs}"] / scale)
    close(x.grad / t["grad.x"].abs().max(), t["grad.x"] / t["grad.x"].abs().max())
    close(model.head.bn.running_mean, t["out.head.bn.running_mean_after"])
    close(model.patch_embed[0].bn.running_var, t["out.patch_embed.0.bn.running_var_after"])


def test_golden_distillation_heads() -> None:
    t = golden("distillation_heads")
    model = SHViT(**{**SMALL, "depth": (1, 1, 1)}, distilled=True)
    model.load_state_dict(checkpoint_filter_fn({"model": params(t)}, model))
    close(model.eval()(t["in.x"]), t["out.logits.eval_mean"])
    model.train()
    assert isinstance(copy.deepcopy(model)(t["in.x"]), Tensor)  # a pair only when asked for
    model.set_distilled_training()
    logits, distilled = model(t["in.x"])
    close(logits, t["out.logits.train_cls"])
    close(distilled, t["out.logits.train_dist"])


@pytest.mark.parametrize(("name", "fine"), [("mask", 2), ("retina", 1)])
def test_golden_pyramid(name: str, fine: int) -> None:
    t = golden("detection_fpn")
    fpn = SHViTFPN((6, 8, 10), 5, num_outs=5, extra_fine=fine)
    fpn.load_state_dict(params(t, f"param.{name}."))
    maps = [t["in.c1"], t["in.c2"], t["in.c3"]]
    outs = fpn(maps)
    assert len(outs) == 5
    for i, x in enumerate(outs):
        close(x, t[f"out.{name}.p{i}"])
    close(torch.compile(fpn, fullgraph=True, backend="aot_eager")(maps)[0], outs[0])


# ---- parameters ----
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        plain = timm.create_model(f"shvit_{name}")
        ours = timm.create_model(f"shvit_{name}_distilled", distilled=False)
        distilled = timm.create_model(f"shvit_{name}_distilled")
    count = [sum(p.numel() for p in m.parameters()) for m in (plain, ours, distilled)]
    width = plain.num_features
    assert count[:2] == [COUNTS[name]] * 2
    assert count[2] == COUNTS[name] + 2 * width + width * 1000 + 1000
    assert plain.state_dict().keys() == ours.state_dict().keys()


# ---- drop path ----
def test_drop_path_rises_over_the_blocks_and_vanishes_in_eval() -> None:
    plain, dropped, x = small(), small(drop_path_rate=0.3), image()
    assert plain.state_dict().keys() == dropped.state_dict().keys()
    rates = [b.ffn.drop_path.drop_prob for s in dropped.stages for b in s.blocks if isinstance(b.ffn, DropResidual)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert isinstance(dropped.stages[0].blocks[0].mixer, nn.Identity)
    close(dropped(x), plain(x), 0.0)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in copy.deepcopy(dropped).fuse().modules())
    close(copy.deepcopy(dropped).fuse()(x), plain(x))


def test_drop_path_on_timms_model() -> None:
    model = timm.create_model("shvit_s1", num_classes=0, **{k: v for k, v in SMALL.items() if k != "num_classes"})
    keys = list(model.state_dict())
    set_drop_path(model, 0.9)
    assert list(model.state_dict()) == keys and model.stages[2].blocks[0].conv.drop_path.drop_prob == 0.9
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            nn.init.ones_(m.weight)
    x = image()
    assert not torch.equal(model(x), model(x))
    set_drop_path(model, 0.0)
    close(model(x), model(x), 0.0)


# ---- protocol ----
def test_created_by_timm() -> None:
    model = timm.create_model("shvit_s1_distilled", num_classes=10, in_chans=4).eval()
    x = image(channels=4)
    with torch.no_grad():
        assert model(x).shape == (2, 10)
    assert [h.out_features for h in model.get_classifier()] == [10, 10]
    features = timm.create_model("shvit_s1_distilled", features_only=True, out_indices=(0, -1)).eval()
    assert [tuple(y.shape[1:]) for y in features(image(80, 112))] == [(128, 5, 7), (320, 2, 2)]
    assert features.feature_info.reduction() == [16, 64]
    fused = timm.utils.reparameterize_model(features)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    close(fused(image())[1], features(image())[1])


def test_equal_widths_keep_their_downsample() -> None:
    model = small(embed_dim=(16, 16, 16))
    assert [tuple(y.shape[2:]) for y in model.forward_intermediates(image())[1]] == [(4, 6), (2, 3), (1, 2)]
    state = {key: torch.zeros(()) for key in small().state_dict()}
    assert model.state_dict().keys() == state.keys()


def test_reset_classifier_and_fused_classifier() -> None:
    model = small(distilled=True).double()
    model.reset_classifier(3)
    assert model(image().double()).shape == (2, 3) and model.head_dist.l.weight.dtype == torch.float64
    model.fuse()
    assert [type(h) for h in model.get_classifier()] == [nn.Linear] * 2
    model.reset_classifier(0)
    assert model(image().double()).shape == (2, 32)
    plain = small()
    assert plain.get_classifier() is plain.head.l
    with pytest.raises(ValueError, match="distilled=True"):
        plain.set_distilled_training()


def test_groups_cover_every_parameter() -> None:
    model = small(distilled=True)
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {name for name, _ in model.named_parameters()}
    assert layers["patch_embed.0.c.weight"] == 0


def test_gradient_checkpointing_equals_plain() -> None:
    model, x = small(), image()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for plain, checked in zip(*results, strict=True):
        close(checked, plain, 0.0)


def test_compiles_and_runs_in_bfloat16() -> None:
    torch._dynamo.reset()
    model, x = small(distilled=True, drop_path_rate=0.1, depth=(1, 1, 0)), image()
    expected = model(x)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.1)


# ---- checkpoints and errors ----
def test_filter_takes_a_detection_checkpoint() -> None:
    t = params(golden("model_rect"))
    model = SHViT(**{**SMALL, "num_classes": 0})
    saved = {f"backbone.{k}": v for k, v in t.items() if not k.startswith("head")} | {"neck.w": t["head.l.bias"]}
    model.load_state_dict(checkpoint_filter_fn({"state_dict": saved}, model))
    close(model.eval().forward_features(golden("model_rect")["in.x"]), golden("model_rect")["out.stage3.eval"])


def test_published_layout_through_timm(tmp_path: Path) -> None:
    t = params(golden("distillation_heads"))
    torch.save({"model": t}, tmp_path / "theirs.pth")
    overlay = {"file": str(tmp_path / "theirs.pth"), "num_classes": 7}
    options = {**SMALL, "depth": (1, 1, 1), "num_classes": 2}
    model = timm.create_model("shvit_s1_distilled", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert torch.equal(model.stages[2].downsample[4].m.pw1.c.weight, t["blocks3.2.1.m.pw1.c.weight"])
    assert model.head_dist.l.weight.shape == (2, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small()(image(channels=4)), r"\(B, 3, H, W\), got \(2, 4, 64, 96\)"),
        (lambda: small(drop_path_rate=1.0), r"\[0, 1\), got 1.0"),
        (lambda: checkpoint_filter_fn({"fc.weight": torch.zeros(1)}, small()), r"not a SHViT.*'fc.weight'"),
        (
            lambda: checkpoint_filter_fn(small(depth=(1, 1, 1)).state_dict(), small()),
            r"of widths \(16, 24, 32\).*depths \(1, 1, 1\); the model has widths .*depths \(1, 2, 1\)",
        ),
        (lambda: checkpoint_filter_fn(small(partial_dim=(5, 7, 9)).state_dict(), small()), r"\(0, 7, 9\).*\(0, 6, 9\)"),
        (lambda: SHViTFPN((6, 8, 10), 5, num_outs=4), r"3 stage maps and 2 finer levels do not make 4"),
        (lambda: SHViTFPN((6, 8, 10), 5, coarse_from="both"), r"'both'.*'input' or 'output'"),  # type: ignore[arg-type]
        (lambda: SHViTFPN((6, 8, 10), 5)([torch.zeros(1, 6, 4, 4)]), r"\(6, 8, 10\) channels, got \(6,\)"),
    ],
)
def test_errors_name_expected_and_given(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
