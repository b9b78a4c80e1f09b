"""HaloNet: the paper's parameter counts, equality with timm's network, any image size, timm's protocol."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.halo_attn import HaloAttn
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn

from backbones.halonet import SPECS, HaloNet, HaloSpec, checkpoint_filter_fn, make_size_free, model_config

COUNTS = {
    "halonet_h0": 5_502_248,
    "halonet_h1_paper": 8_105_576,
    "halonet_h2": 9_405_608,
    "halonet_h3": 11_842_792,
    "halonet_h4": 19_103_464,
    "halonet_h5": 30_718_952,
    "halonet_h6": 43_458_280,
    "halonet_h7": 67_434_728,
}
TIMM_COUNTS = {
    "halonet_h1": 8_100_056,
    "halonet26t": 12_480_288,
    "sehalonet33ts": 13_691_712,
    "halonet50ts": 22_733_280,
    "eca_halonext26ts": 10_756_885,
    "haloregnetz_b": 11_680_072,
}
SMALL = HaloSpec(4, 1, 1.5, 0.5, 2, 40, 64, widths=(16, 16, 32, 32), heads=(2, 2, 4, 4))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def small(spec: HaloSpec = SMALL, pad_mode: str = "mask", **options: object) -> HaloNet:
    torch.manual_seed(0)
    cfg = model_config(spec, pad_mode)  # type: ignore[arg-type]
    model = HaloNet(cfg, num_classes=5, zero_init_last=False, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def image(height: int = 40, width: int = 72, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


# ---- parameters ----
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert model.pretrained_cfg["input_size"][1] == SPECS[name].image
    assert model.num_features == model.feature_info[-1]["num_chs"]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", TIMM_COUNTS)
def test_timms_models_keep_their_parameters(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        keys = list(model.state_dict())
        make_size_free(model)
    assert sum(p.numel() for p in model.parameters()) == TIMM_COUNTS[name] and list(model.state_dict()) == keys
    assert not any(isinstance(m, HaloAttn) for m in model.modules())


# ---- against timm ----
def test_layout_equals_timms_network() -> None:
    spec = HaloSpec(4, 1, 1.0, 1.0, 2, 0, 128, widths=(16, 24, 32, 40), heads=(2, 2, 2, 2))
    ours = small(spec, "zero")
    stages = zip((3, 3, 2, 3), spec.widths, (1, 2, 2, 2), strict=True)
    theirs = (
        ByobNet(
            ByoModelCfg(
                blocks=tuple(ByoBlockCfg(type="self_attn", d=d, c=c, s=s, gs=0, br=1.0) for d, c, s in stages),
                stem_chs=16,
                stem_type="7x7",
                stem_pool="maxpool",
                self_attn_layer="halo",
                self_attn_kwargs={"block_size": 4, "halo_size": 1, "num_heads": 2},
            ),
            num_classes=5,
        )
        .eval()
        .double()
    )
    ours.double().stages[0][0].shortcut = nn.Identity()  # timm has none where the widths agree
    theirs.load_state_dict(ours.state_dict())
    x = image(128, 128)[:1].double()
    for a, b in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
        close(a, b)
    close(ours(x), theirs(x))


def test_timms_model_at_its_own_size_and_at_others() -> None:
    torch.manual_seed(0)
    model = timm.create_model("halonet26t", num_classes=5).eval()
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(AssertionError):
            model(x[..., :224])
        assert make_size_free(model) is model
        close(model(x), expected, 1e-4)
        assert model(x[..., :224, :130]).shape == (1, 5)
        odd = make_size_free(timm.create_model("haloregnetz_b", num_classes=0)).eval()
        maps = odd.forward_intermediates(x[..., :100, :66], intermediates_only=True)
    assert [tuple(y.shape[2:]) for y in maps[-2:]] == [(7, 5), (4, 3)]  # pooled layers of odd blocks round up


# ---- protocol ----
def test_any_size_and_intermediates() -> None:
    model = small()
    final, maps = model.forward_intermediates(image())
    assert [tuple(y.shape[1:]) for y in maps] == [(16, 20, 36), (8, 10, 18), (8, 5, 9), (16, 3, 5), (40, 2, 3)]
    close(final, model.forward_features(image()), 0.0)
    for size in ((64, 64), (33, 47), (7, 200)):
        assert model(image(*size)).shape == (2, 5)


def test_padding_is_masked_unless_asked_for() -> None:
    masked, zero = small(), small(pad_mode="zero")
    zero.load_state_dict(masked.state_dict())
    assert not torch.allclose(masked(image()), zero(image()), atol=1e-4)


def test_created_by_timm() -> None:
    model = timm.create_model("halonet_h0", num_classes=10, in_chans=4, pad_mode="zero").eval()
    with torch.no_grad():
        assert model(image(64, 40, 4)).shape == (2, 10)
    assert model.stages[2][1].self_attn.pad_mode == "zero" and model.get_classifier().out_features == 10
    features = timm.create_model("halonet_h0", features_only=True, out_indices=(1, -1))
    assert [tuple(y.shape[1:]) for y in features(image(64, 40))] == [(32, 16, 10), (256, 2, 2)]
    assert features.feature_info.reduction() == [4, 32]


def test_head_and_reset() -> None:
    model, x = small(), image()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    close(pooled, model.forward_features(x).mean((2, 3)))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    close(model(x), pooled)


def test_groups_cover_every_parameter() -> None:
    model = small()
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {name for name, _ in model.named_parameters()}
    assert layers["stem.conv1.conv.weight"] == 0 < layers["stages.3.2.self_attn.q.weight"]


def test_initialisation() -> None:
    with torch.random.fork_rng():
        model = timm.create_model("halonet_h0", num_classes=0, drop_path_rate=0.2)
    assert all(block.conv3_1x1.bn.weight.eq(0).all() for stage in model.stages for block in stage)
    attn = model.stages[3][1].self_attn
    assert 0.9 * 512**-0.5 < attn.q.weight.std() < 1.1 * 512**-0.5
    assert 0.9 * 64**-0.5 < attn.pos_embed.width_rel.std() < 1.1 * 64**-0.5
    assert model.stages[3][2].drop_path.drop_prob == pytest.approx(0.2)


def test_gradient_checkpointing_equals_plain() -> None:
    model, x = small(), image()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in results[0].items():
        close(results[1][name], grad, 0.0)
        assert grad.abs().sum() > 0, name


def test_compiles_and_runs_in_bfloat16() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    cfg = model_config(SMALL)  # cut to one block each of two stages: compiling takes seconds a block
    cfg = replace(cfg, blocks=tuple(stage[:1] for stage in cfg.blocks[:2]), num_features=0)
    model, x = HaloNet(cfg, num_classes=5, zero_init_last=False).eval(), image()
    expected = model(x)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.1)


# ---- checkpoints and errors ----
def test_checkpoint_through_timm(tmp_path: Path) -> None:
    source = timm.create_model("halonet_h0")
    save_file(source.state_dict(), tmp_path / "h0.safetensors")
    overlay = {"file": str(tmp_path / "h0.safetensors")}
    loaded = timm.create_model("halonet_h0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    key = "stages.2.4.self_attn.pos_embed.height_rel"
    assert torch.equal(loaded.state_dict()[key], source.state_dict()[key])
    with pytest.raises(ValueError, match=r"depths \(3, 3, 7, 3\), .*; the model has depths \(3, 3, 11, 3\)"):
        timm.create_model("halonet_h2", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: small()(image(channels=4)), ValueError, r"\(B, 3, H, W\), got \(2, 4, 40, 72\)"),
        (lambda: small(pad_mode="reflect"), ValueError, "'reflect'.*'mask', 'zero'"),
        (lambda: small(replace(SMALL, heads=(5, 2, 4, 4))), ValueError, "24 output channels, got 5 heads"),
        (
            lambda: checkpoint_filter_fn(small(replace(SMALL, halo=2)).state_dict(), small()),
            ValueError,
            r"windows \(8, 8, 8, 8\); .*windows \(6, 6, 6, 6\)",
        ),
        (lambda: make_size_free(small()), TypeError, "HaloNet has no timm halo layer"),
        (lambda: make_size_free(timm.create_model("halo2botnet50ts_256")), TypeError, r"fixed size at stages\.3"),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
