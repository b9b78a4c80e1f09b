"""PoolFormer: goldens from the authors' code, their head against timm's, dense norms and checkpoints."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import GroupNorm1, Mlp
from timm.models.metaformer import MetaFormer, MetaFormerBlock, Pooling
from torch import Tensor, nn

import backbones.poolformer  # noqa: F401  (registers the models with timm)
from backbones.poolformer import PoolFormer, checkpoint_filter_fn

GOLDEN = Path(__file__).parents[1] / "golden" / "poolformer"
COUNTS = {"s12": 11_915_176, "s24": 21_388_968, "s36": 30_862_760, "m36": 56_172_520, "m48": 73_473_448}
SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20)}


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def small(**options: object) -> PoolFormer:
    """Every parameter random: with fresh layer scales of 1e-5 the blocks do next to nothing."""
    torch.manual_seed(0)
    model = PoolFormer(**{**SMALL, "num_classes": 6, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def image(height: int = 64, width: int = 96, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


# ---- goldens ----
def test_golden_model_with_gradients() -> None:
    t = golden("model_rect")
    model = small()
    model.load_state_dict(checkpoint_filter_fn(params(t), model))
    x = t["in.x"].clone().requires_grad_()
    close(model.forward_features(x), t["out.tokens_before_norm"])
    logits = model.train()(x)  # no drop path: training is evaluation
    close(logits, t["out.logits"])
    (logits * t["in.cot"]).sum().backward()
    close(x.grad, t["grad.x"])
    close(model.head.fc.weight.grad, t["grad.head.weight"])
    close(model.stages[0].blocks[0].layer_scale1.scale.grad, t["grad.network.0.0.layer_scale_1"])
    close(model.stages[1].blocks[1].norm1.weight.grad, t["grad.network.2.1.norm1.weight"])


def test_golden_dense_outputs() -> None:
    t = golden("dense_features")
    model = PoolFormer(**SMALL, num_classes=0, dense_norms=True)  # type: ignore[arg-type]
    prefixed = {"meta": {}, "state_dict": {f"backbone.{k}": v for k, v in params(t).items()} | {"neck.x": t["in.x"]}}
    model.load_state_dict(checkpoint_filter_fn(prefixed, model))  # strict: exactly the authors' parameters
    maps = model.eval().forward_intermediates(t["in.x"], norm=True, intermediates_only=True)
    for x, name in zip(maps, ("c2", "c3", "c4", "c5"), strict=True):
        close(x, t[f"out.{name}"])


def test_golden_block_and_pooling() -> None:
    t = golden("block")
    x = t["in.x"].clone().requires_grad_()
    close(Pooling(3)(x), t["out.pool3"])
    close(Pooling(5)(x), t["out.pool5"])
    assert not list(Pooling(3).parameters())
    close(Pooling(3)(torch.ones(1, 2, 4, 3)), torch.zeros(1, 2, 4, 3), 1e-6)
    block = MetaFormerBlock(10, Pooling, nn.GELU, True, GroupNorm1, layer_scale_init_value=1.0)
    block.mlp = Mlp(10, 20, use_conv=True)  # the golden's ratio is 2
    p = params(t)
    for i in (1, 2):
        p[f"layer_scale{i}.scale"] = p.pop(f"layer_scale_{i}")
    block.load_state_dict(p)
    y = block(x)
    close(y, t["out.block"])
    (y * t["in.cot"]).sum().backward()
    close(x.grad, t["grad.x"])
    close(block.layer_scale2.scale.grad, t["grad.layer_scale_2"])
    close(block.mlp.fc1.weight.grad, t["grad.mlp.fc1.weight"])


# ---- the head ----
def test_head_differs_from_timms_by_the_known_formula() -> None:
    model, x = small(), image()
    features = model.forward_features(x)
    centred = features - features.mean((1, 2, 3), keepdim=True)
    pooled = centred.mean((2, 3))
    norm, fc = model.head.norm, model.head.fc
    ours = fc(norm.weight * pooled / (centred.square().mean((1, 2, 3)) + 1e-5).sqrt()[:, None] + norm.bias)
    close(model(x), ours)
    theirs = MetaFormer(  # as timm's poolformer_s12 sets it
        num_classes=6,
        **SMALL,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
    ).eval()
    theirs.load_state_dict(model.state_dict())  # the same keys
    close(theirs.forward_features(x), features, 0.0)
    expected = fc(norm.weight * pooled / (pooled.square().mean(1) + 1e-6).sqrt()[:, None] + norm.bias)
    close(theirs(x), expected)
    assert (theirs(x) - model(x)).abs().max() > 1e-3


# ---- parameters and initialisation ----
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model, theirs = timm.create_model(f"poolformer_{name}_gn"), timm.create_model(f"poolformer_{name}")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, theirs)]
    assert shapes[0] == shapes[1]


def test_initialisation_is_the_authors() -> None:
    model = timm.create_model("poolformer_s12_gn")
    bound = (3 * 7 * 7) ** -0.5  # PyTorch's own: uniform
    assert 0.95 * bound < model.stem.conv.weight.abs().max() <= bound
    assert 0.018 < model.stages[3].blocks[0].mlp.fc1.weight.std() < 0.022
    assert model.stages[0].blocks[0].layer_scale1.scale.eq(1e-5).all()
    with torch.device("meta"):
        deep = timm.create_model("poolformer_s36_gn", drop_path_rate=0.2)
    rates = [b.drop_path1.drop_prob for s in deep.stages for b in s.blocks if not isinstance(b.drop_path1, nn.Identity)]
    assert rates == pytest.approx([0.2 * i / 35 for i in range(1, 36)])


# ---- protocol ----
def test_created_by_timm() -> None:
    model = timm.create_model("poolformer_s12_gn", num_classes=10, in_chans=4).eval()
    with torch.no_grad():
        assert model(image(75, 107, channels=4)).shape == (2, 10)
    features = timm.create_model("poolformer_s12_gn", features_only=True, out_indices=(1, -1), dense_norms=True)
    maps = features(image(64, 100))
    assert [tuple(y.shape[1:]) for y in maps] == [(128, 8, 13), (512, 2, 4)]
    assert features.feature_info.reduction() == [8, 32]
    for y in maps:  # fresh norms: unit statistics over the whole map
        close(y.square().mean((1, 2, 3)), torch.ones(2), 1e-2)
    names = {name.split(".")[2] for name, _ in features.named_parameters() if ".dense_norms." in name}
    assert names == {"1", "3"} and not any("head" in name for name, _ in features.named_parameters())
    features(image())[1].sum().backward()


def test_intermediates_and_head() -> None:
    model, x = small(dense_norms=True), image(75, 107)
    final, maps = model.forward_intermediates(x, indices=[0, 3])
    assert [tuple(y.shape[1:]) for y in maps] == [(8, 19, 27), (20, 3, 4)]
    close(maps[1], model.forward_features(x), 0.0)
    normed = model.forward_intermediates(x, indices=[0, 3], norm=True, stop_early=True, intermediates_only=True)
    close(normed[0], model.dense_norms[0](maps[0]), 0.0)
    close(model.head.fc(model.forward_head(final, pre_logits=True)), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 20)


def test_groups_cover_every_parameter() -> None:
    model = small(dense_norms=True)
    for coarse in (False, True):
        layers = timm.models.group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(layers) == {name for name, _ in model.named_parameters()}
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["stem.conv.weight"] == 0 < layers["stages.0.blocks.0.mlp.fc1.weight"]
    assert layers["stages.1.blocks.0.norm1.weight"] < layers["stages.1.blocks.1.norm1.weight"]


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
    model, x = small(depths=(1, 1, 1, 1)), image()
    expected = model(x)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.1)


# ---- checkpoints and errors ----
def test_imagenet_checkpoint_into_a_dense_model() -> None:
    t = params(golden("model_rect"))
    model = small(dense_norms=True)
    before = model.dense_norms[2].weight.detach().clone()
    model.load_state_dict(checkpoint_filter_fn(t, model))
    close(model.dense_norms[2].weight, before, 0.0)
    close(model.head.fc.weight, t["head.weight"], 0.0)


def test_published_layout_through_timm(tmp_path: Path) -> None:
    t = params(golden("model_rect"))
    torch.save(t, tmp_path / "theirs.pth.tar")
    overlay = {"file": str(tmp_path / "theirs.pth.tar"), "num_classes": 6}
    options = {**SMALL, "num_classes": 2}
    model = timm.create_model("poolformer_s12_gn", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert torch.equal(model.stages[2].downsample.conv.weight, t["network.3.proj.weight"])
    assert model.head.fc.weight.shape == (2, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small()(image(channels=4)), r"\(B, 3, H, W\), got \(2, 4, 64, 96\)"),
        (lambda: small()(image(2, 9)), r"at least 3 x 3, got 2 x 9"),
        (lambda: small().forward_intermediates(image(), norm=True), "dense_norms=True"),
        (lambda: small().forward_intermediates(image(), output_fmt="NLC"), "'NLC'.*'NCHW'"),
        (
            lambda: checkpoint_filter_fn(small(depths=(1, 1, 1, 1)).state_dict(), small()),
            r"depths \(1, 1, 1, 1\) and widths \(8, 12, 16, 20\); the model has depths \(1, 2, 1, 1\)",
        ),
        (lambda: checkpoint_filter_fn({"fc.weight": torch.zeros(1)}, small()), "not a PoolFormer.*'fc.weight'"),
        (lambda: checkpoint_filter_fn(MetaFormer(**SMALL).state_dict(), small()), "MetaFormer Baselines.*poolformerv2"),
    ],
)
def test_errors_name_expected_and_given(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
