"""SLAB models: the published counts, goldens of whole models, timm's protocol, folding, checkpointing, compilation."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import group_parameters
from torch import Tensor, nn

import backbones.slab_cswin
import backbones.slab_deit
import backbones.slab_pvt as slab_pvt
import backbones.slab_swin  # noqa: F401  (registers the models with timm)
from backbones.slab_cswin import checkpoint_filter_fn as cswin_keys
from backbones.slab_fold import fold_prepbn
from backbones.slab_norm import ChannelAffine, PRepBN, RepBN
from zoo.adapters.inject import attach

GOLDEN = Path(__file__).parents[1] / "golden" / "slab"
COUNTS = {  # parameters in training, of which LayerNorm's, which inference drops
    "slab_deit_tiny": (6_198_401, 9_600),
    "slab_deit_small": (22_992_641, 19_200),
    "prepbn_deit_tiny": (5_717_441 + 9_600, 9_600),  # published as RepBN alone: 5,717,441
    "prepbn_deit_small": (22_069_889, 19_200),
    "slab_pvt_tiny": (12_157_692, 10_240),
    "slab_pvt_small": (21_683_788, 18_688),
    "slab_pvt_medium": (37_267_300, 34_048),
    "prepbn_pvt_tiny": (13_239_554, 12_288),
    "prepbn_pvt_small": (24_507_801, 23_936),
    "prepbn_pvt_medium": (44_253_117, 46_976),
    "slab_swin_tiny": (29_216_605, 24_768),
    "slab_swin_small": (50_552_965, 43_200),
    "slab_swin_base": (89_029_373, 57_600),
    "prepbn_swin_tiny": (28_288_383 + 24_768, 24_768),  # published as RepBN alone: 28,288,383
    "slab_cswin_tiny": (21_227_807, 25_984),
    "slab_cswin_small": (35_494_205, 42_368),
}
VIT = dict(patch_size=16, embed_dim=24, depth=2, num_heads=3)
PVT = dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2), depths=(1, 1, 2, 1))
SWIN = dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=2)
SMALL = {
    "slab_deit_tiny": VIT,
    "prepbn_deit_tiny": VIT,
    "slab_pvt_tiny": PVT | dict(attn_type="LLSS", la_sr_ratios=(2, 1, 1, 1)),
    "prepbn_pvt_tiny": PVT,
    "slab_swin_tiny": SWIN,
    "prepbn_swin_tiny": SWIN,
    "slab_cswin_tiny": dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), split=2),
}
small = pytest.mark.parametrize("name", SMALL)


def build(name: str, **options: object) -> nn.Module:
    """A few narrow blocks; norms, positions and biases away from their start."""
    torch.manual_seed(0)
    settings = dict(img_size=64, num_classes=5, prepbn_steps=4, drop_path_rate=0.0) | SMALL[name] | options
    model = timm.create_model(name, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0.0, 0.2)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def quiet_fold(model: nn.Module, **options: bool) -> nn.Module:
    with warnings.catch_warnings():  # nothing here has been trained to the end of its schedule
        warnings.simplefilter("ignore")
        return fold_prepbn(model, **options)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- published figures and goldens ----
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    layer_norms = sum(count(m.norm1) for m in model.modules() if isinstance(m, PRepBN))
    assert (count(model), layer_norms) == COUNTS[name]


@pytest.mark.parametrize(("name", "expected"), [("prepbn_deit_tiny", 5_717_441), ("prepbn_swin_tiny", 28_288_383)])
def test_the_form_published_with_repbn_alone(name: str, expected: int) -> None:
    with torch.device("meta"):
        assert count(timm.create_model(name, norm_layer=RepBN)) == expected


@pytest.mark.parametrize(
    ("name", "steps", "warm"),
    [
        ("slab_deit_tiny", 60_000, 0),
        ("slab_swin_tiny", 60_000, 0),
        ("slab_cswin_tiny", 120_000, 0),
        ("slab_pvt_tiny", 300_000, 0),
    ],
)
def test_published_schedules(name: str, steps: int, warm: int) -> None:
    norms = [m for m in timm.create_model(name, **SMALL[name], img_size=64).modules() if isinstance(m, PRepBN)]
    assert {(int(n.total_step), int(n.iter), int(n.warm), n.norm2.alpha.item()) for n in norms} == {
        (steps, steps, warm, 1.0)
    }
    assert {n.norm1.eps for n in norms} == {1e-5 if "swin" in name else 1e-6}


def test_slab_deit_matches_the_authors() -> None:
    t = load_file(GOLDEN / "slab_deit_tiny_dims.safetensors")
    sizes = dict(img_size=28, patch_size=2, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=6)
    model = timm.create_model("slab_deit_tiny", prepbn_steps=10, **sizes).eval()
    model.load_state_dict({k.removeprefix("param."): v for k, v in t.items() if k.startswith("param.")})
    x = t["in.x"].requires_grad_()
    close(model.forward_head(model.forward_features(x), pre_logits=True), t["out.features.eval"])
    close(model(x), t["out.logits.eval"])
    close(model.train()(x), t["out.logits.train_step0_lambda1"])
    y = model(x)
    close(y, t["out.logits.train_step1_lambda0.9"])
    y.backward(t["in.cot"])
    close(x.grad, t["grad.x"])
    close(model.pos_embed.grad, t["grad.pos_embed"])
    close(model.blocks[0].norm1.norm2.alpha.grad, t["grad.blocks.0.norm1.norm2.alpha"])
    close(model.blocks[1].norm2.norm2.bn.running_mean, t["out.blocks.1.norm2.norm2.bn.running_mean_after2"])
    assert model.norm.iter == t["out.iter_after2"]


def test_slab_pvt_matches_the_authors() -> None:
    t = load_file(GOLDEN / "slab_pvt_small_dims.safetensors")
    model = timm.create_model("slab_pvt_tiny", img_size=64, num_classes=6, attn_type="LLSS", **PVT).eval()
    state = {k.removeprefix("param."): v for k, v in t.items() if k.startswith("param.")}
    model.load_state_dict(slab_pvt.checkpoint_filter_fn({"model": state}, model))
    close(model.forward_head(model.forward_features(t["in.x"]), pre_logits=True), t["out.features.eval"])
    close(model(t["in.x"]), t["out.logits.eval"])


def test_cswin_keys_of_the_original_layout_load() -> None:
    model = build("slab_cswin_tiny")
    old = {}
    for key, value in model.state_dict().items():
        head, _, rest = key.partition(".")
        if head == "stages":
            stage, part, rest = rest.split(".", 2)
            layer, _, leaf = rest.partition(".")
            if part == "blocks":
                key = f"stage{int(stage) + 1}.{rest}"
            elif stage == "0":
                key = f"stage1_conv_embed.{0 if layer == 'proj' else 2}.{leaf}"
            else:
                key = f"merge{stage}.{'conv' if layer == 'proj' else 'norm'}.{leaf}"
        old[key.replace("head.fc.", "head.")] = value
    assert old.keys().isdisjoint({"stages.0.embed.proj.weight", "head.fc.weight"})
    assert cswin_keys({"state_dict_ema": old}, model).keys() == model.state_dict().keys()


# ---- folding ----
@small
def test_folded_model_gives_the_same_output(name: str) -> None:
    model, x = build(name), image()
    close(quiet_fold(model)(x), model(x))
    exact, wide = model.double(), x.double()
    expected = exact(wide)
    folded = quiet_fold(exact)
    close(folded(wide), expected, 1e-11)
    assert not any(
        isinstance(m, (RepBN, PRepBN, ChannelAffine, nn.LayerNorm, nn.BatchNorm1d)) for m in folded.modules()
    )
    norms = [m for m in exact.modules() if isinstance(m, PRepBN)]
    merging = [m for m in folded.modules() if getattr(m, "reduction", None) is not None]
    new_biases = sum(m.reduction.bias.numel() for m in merging)  # PatchMerging had none
    assert count(exact) - count(folded) == sum(4 * n.dim + 1 for n in norms) - new_biases


@small
def test_folding_can_keep_the_feature_map(name: str) -> None:
    model, x = build(name).double(), image().double()
    close(quiet_fold(model, keep_features=True).forward_features(x), model.forward_features(x), 1e-11)
    model.reset_classifier(0)  # without a classifier the final norm has no other place either
    close(quiet_fold(model)(x), model(x), 1e-11)


def test_folding_a_model_whose_windows_are_padded_is_still_exact() -> None:
    model, x = build("prepbn_swin_tiny", window_size=3).double(), image().double()
    folded = quiet_fold(model)
    close(folded(x), model(x), 1e-11)
    assert isinstance(folded.layers[0].blocks[0].norm1, ChannelAffine)  # 3 does not divide 16
    with pytest.raises(RuntimeError, match="resize, then fold"):
        quiet_fold(build("prepbn_swin_tiny")).set_input_size(img_size=96)


@pytest.mark.parametrize("pool", ["avg", "token", "", "max"])
def test_folding_with_other_poolings(pool: str) -> None:
    model, x = build("prepbn_deit_tiny", global_pool=pool, fc_norm=False).double(), image().double()
    close(quiet_fold(model)(x), model(x), 1e-11)


def test_folded_weights_load_into_a_folded_model(tmp_path: Path) -> None:
    source, x = quiet_fold(build("slab_swin_tiny")), image()
    save_file(source.state_dict(), tmp_path / "folded.safetensors")
    torch.manual_seed(5)
    target = quiet_fold(timm.create_model("slab_swin_tiny", img_size=64, num_classes=5, **SWIN))
    target.load_state_dict(load_file(tmp_path / "folded.safetensors"))
    assert torch.equal(target(x), source(x))


def test_folding_refuses_attached_adapters() -> None:
    model = build("slab_deit_tiny")
    attach(model, "LoRA")
    with pytest.raises(ValueError, match="merge or detach"):
        fold_prepbn(model)


# ---- training ----
@small
def test_activation_checkpointing_changes_neither_schedule_nor_gradients(name: str) -> None:
    plain = build(name).train()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing(True)
    for _ in range(3):
        for model in (plain, again):
            model.zero_grad()
            model(image()).square().sum().backward()
    assert {int(m.iter) for m in again.modules() if isinstance(m, PRepBN)} == {1}
    for (key, value), twin in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(value, twin), key
    for (key, parameter), twin in zip(plain.named_parameters(), again.parameters(), strict=True):
        if parameter.requires_grad:  # everything trainable receives a gradient
            close(twin.grad, parameter.grad), key
    frozen = {k.rpartition(".")[2] for k, p in plain.named_parameters() if not p.requires_grad}
    assert frozen <= {"cls_token", "scale"}  # carried by the published models, never read


@pytest.mark.parametrize(
    ("name", "shallow"),
    [("slab_deit_tiny", dict(depth=1)), ("slab_swin_tiny", dict(depths=(1, 1), num_heads=(1, 2), attn_type="LS"))],
)
def test_one_compiled_graph_trains_like_eager(name: str, shallow: dict[str, object]) -> None:
    plain = build(name, **shallow).train()
    twin = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for model in (plain, compiled):
            model.zero_grad()
            model(image()).square().sum().backward()
    for (key, value), other in zip(plain.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(value.float(), other.float(), atol=1e-5), key
    for parameter, other in zip(plain.parameters(), twin.parameters(), strict=True):
        if parameter.requires_grad:
            close(other.grad, parameter.grad, 1e-4)


@pytest.mark.parametrize("name", ["slab_pvt_tiny", "slab_cswin_tiny"])
def test_one_compiled_graph_evaluates_like_eager(name: str) -> None:
    model = build(name, depths=(1, 1, 1, 1))
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(image()), model(image()))


def test_a_model_saved_mid_schedule_trains_on_as_if_never_stopped(tmp_path: Path) -> None:
    plain = build("slab_deit_tiny").train()
    plain(image())
    save_file(plain.state_dict(), tmp_path / "half.safetensors")
    resumed = build("slab_deit_tiny", prepbn_steps=77).train()
    resumed.load_state_dict(load_file(tmp_path / "half.safetensors"))
    assert torch.equal(resumed(image()), plain(image()))
    assert {(int(m.iter), int(m.total_step)) for m in resumed.modules() if isinstance(m, PRepBN)} == {(2, 4)}


@small
def test_bf16(name: str) -> None:
    model = build(name).bfloat16()
    for mode in (False, True):
        y = model.train(mode)(image().bfloat16())
        assert y.dtype is torch.bfloat16 and y.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert build(name).train()(image()).isfinite().all()


# ---- timm's protocol ----
@small
def test_protocol(name: str) -> None:
    model, x = build(name, img_size=(64, 96), in_chans=4), image(64, 96, 4)
    features, maps = model.forward_intermediates(x)
    strides = [info["reduction"] for info in model.feature_info]
    assert [tuple(m.shape) for m in maps] == [
        (2, info["num_chs"], 64 // s, 96 // s) for info, s in zip(model.feature_info, strides, strict=True)
    ]
    assert torch.equal(features, model.forward_features(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.num_features == model.head_hidden_size == maps[-1].shape[1]
    close(model.forward_head(features), model(x), 0.0)
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True, stop_early=True)
    assert torch.equal(last, maps[-1])
    groups = group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert all("embed" in k or "cls_token" in k for k in groups[0]) and all("head" in k for k in groups[max(groups)])
    assert model.no_weight_decay() <= {k for k, _ in model.named_parameters()} | {
        "cls_token",
        "reg_token",
        "dist_token",
    }
    model.reset_classifier(3)
    assert model.get_classifier().out_features == 3 and model(x).shape == (2, 3)
    model.set_input_size(img_size=(96, 64))
    assert model(image(96, 64, 4)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(image(96, 64, 4)).shape == (2, model.num_features)


@pytest.mark.parametrize("name", ["slab_deit_tiny", "slab_pvt_tiny", "slab_swin_tiny", "slab_cswin_tiny"])
def test_features_only(name: str) -> None:
    model = timm.create_model(name, img_size=64, features_only=True, out_indices=(0, 1), **SMALL[name])
    maps = model(image())
    channels_last = model.__class__.__name__ == "FeatureListNet"  # timm's Swin gives B H W C here
    assert [m.shape[-1 if channels_last else 1] for m in maps] == model.feature_info.channels()


def test_a_resized_model_equals_one_whose_positions_were_resized() -> None:
    model = build("slab_pvt_tiny")
    table = model.stages[0].pos_embed
    model.set_input_size((128, 64))
    grid = table.detach().transpose(1, 2).unflatten(2, (16, 16))
    wanted = nn.functional.interpolate(grid, size=(32, 16), mode="bilinear").flatten(2).transpose(1, 2)
    close(model.stages[0].pos_embed, wanted)
    assert model.stages[0].blocks[0].attn.positional_encoding.shape == (1, 16 * 8, 8)  # sr 2


@pytest.mark.parametrize("name", ["slab_deit_tiny", "slab_pvt_tiny", "slab_swin_tiny", "slab_cswin_tiny"])
def test_wrong_sizes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"multiples of .* got 225 x 225; the nearest size that fits is 224 x 224"):
        timm.create_model(name, img_size=225)
    with pytest.raises((ValueError, AssertionError), match=r"64.*96|96.*64"):  # AssertionError: timm's own PatchEmbed
        build(name)(image(96, 96))


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="stripes of 7 do not tile the 16 x 16 map"):
        timm.create_model("slab_cswin_tiny", img_size=256)
    for name in ("slab_pvt_tiny", "slab_swin_tiny", "slab_cswin_tiny"):
        with pytest.raises(ValueError, match="'LLX'"):
            timm.create_model(name, attn_type="LLX")
    for options in ({"class_token": True}, {"global_pool": "token"}, {"reg_tokens": 2}, {"dynamic_img_size": True}):
        with pytest.raises(ValueError, match=r"patch tokens only|one grid"):
            timm.create_model("slab_deit_tiny", **options)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("slab_deit_tiny", pretrained=True)
