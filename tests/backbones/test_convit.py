"""ConViT: the authors' golden, equality with timm on its own size, and freedom from it."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.convit import ConVit
from torch import Tensor, nn

from backbones.convit import ConViT, GridGPSA, checkpoint_filter_fn, make_size_free, resize_positions

GOLDEN = Path(__file__).parents[1] / "golden" / "convit-gpsa"
COUNTS = {"convit_tiny": 5_710_512, "convit_small": 27_777_322, "convit_base": 86_540_040}
SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
    "embed_dim": 9,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "qkv_bias": True,
    "local_up_to_layer": 2,
}


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def small(**options: object) -> ConViT:
    torch.manual_seed(0)
    model = ConViT(**{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def image(height: int = 24, width: int = 40, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def test_golden_model() -> None:
    t = golden("convit_model_tiny")
    model = ConViT(**SMALL).eval()
    model.load_state_dict(checkpoint_filter_fn({"model": params(t)}, model))
    tokens = model.forward_features(t["in.x"])
    close(model.forward_head(tokens, pre_logits=True), t["out.cls_feature"])
    close(model(t["in.x"]), t["out.logits"])


@pytest.mark.parametrize("heads", [4, 9])
@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_golden_local_init(heads: int, strength: float) -> None:
    t = golden("local_init")
    options = {**SMALL, "num_heads": heads, "locality_strength": strength}
    gpsa = ConViT(**options).blocks[1].attn
    close(gpsa.pos_proj.weight, t[f"out.pos_proj_weight.h{heads}_s{strength}"])
    close(gpsa.gating_param, t[f"out.gating.h{heads}_s{strength}"])
    assert torch.equal(gpsa.v.weight, torch.eye(9 * heads))
    plain = ConViT(**options, local_init=False).blocks[1].attn
    assert plain.pos_proj.weight.abs().max() < 0.2 and plain.v.weight.abs().max() < 0.2


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = make_size_free(timm.create_model(name))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    gpsa, mhsa = model.blocks[9].attn, model.blocks[10].attn
    counts = [sum(p.numel() for p in m.parameters()) for m in (gpsa, mhsa)]
    assert counts[0] - counts[1] == 5 * gpsa.num_heads


def test_equals_timm_at_its_own_size_and_is_free_of_it() -> None:
    torch.manual_seed(0)
    theirs = ConVit(**SMALL, attn_drop_rate=0.0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x, keys = image(32, 32), list(theirs.state_dict())
    expected = theirs(x)
    maps = theirs.forward_intermediates(x)[1]
    attention = theirs.blocks[0].attn.get_attention(torch.ones(1, 16, 36) * torch.arange(36))
    with pytest.raises(AssertionError):
        theirs(image())
    weight = theirs.blocks[0].attn.qk.weight
    ours = make_size_free(theirs)
    assert ours is theirs and isinstance(ours, ConViT) and list(ours.state_dict()) == keys
    assert ours.blocks[0].attn.qk.weight is weight
    close(ours(x), expected)
    for a, b in zip(ours.forward_intermediates(x)[1], maps, strict=True):
        close(a, b)
    close(ours.blocks[0].attn.get_attention(torch.ones(1, 16, 36) * torch.arange(36)), attention)
    assert ours(image()).shape == (2, 7)
    assert make_size_free(ours) is ours


def test_rectangle_is_position_for_position() -> None:
    """Transposing image and every position dependent part must transpose the maps."""
    model, x = small(), image()
    flipped = copy.deepcopy(model)
    with torch.no_grad():
        flipped.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.transpose(2, 3))
        flipped.pos_embed.copy_(model.pos_embed.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2))
        for ours, theirs in zip(flipped.blocks[:2], model.blocks[:2], strict=True):
            ours.attn.pos_proj.weight.copy_(theirs.attn.pos_proj.weight[:, [1, 0, 2]])
    y = flipped.forward_intermediates(x.transpose(2, 3))[1]
    for a, b in zip(y, model.forward_intermediates(x)[1], strict=True):
        close(a.transpose(2, 3), b)
    assert not torch.allclose(model.forward_intermediates(x.transpose(2, 3))[1][0], y[0])


def test_created_by_timm_with_other_channels_and_shape() -> None:
    model = make_size_free(timm.create_model("convit_tiny", img_size=(32, 64), in_chans=4, num_classes=5)).eval()
    with torch.no_grad():
        assert model(image(48, 32, 4)).shape == (2, 5)
        assert model.forward_features(image(32, 64, 4)).shape == (2, 9, 192)
    features = make_size_free(timm.create_model("convit_tiny", img_size=32, features_only=True, out_indices=(1, -1)))
    assert [tuple(y.shape) for y in features(image(48, 32))] == [(2, 192, 3, 2)] * 2
    assert features.feature_info.reduction() == [16, 16]


def test_intermediates() -> None:
    model, x = small(), image()
    final, maps = model.forward_intermediates(x, indices=[1, -1], norm=True)
    close(final, model.forward_features(x))
    assert [tuple(y.shape) for y in maps] == [(2, 36, 3, 5)] * 2
    close(maps[-1].flatten(2).transpose(1, 2), final[:, 1:])
    early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert early[0].shape == (2, 15, 36)
    kept = copy.deepcopy(model)
    kept.prune_intermediate_layers([1])
    close(kept.forward_features(x), model.norm(early[0]))
    model.reset_classifier(3, "avg")
    close(model.forward_head(final, pre_logits=True), final[:, 1:].mean(1))
    assert model(x).shape == (2, 3) and model.get_classifier().out_features == 3


def test_groups_cover_every_parameter() -> None:
    model = small()
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {name for name, _ in model.named_parameters()}


def test_gradient_checkpointing_equals_plain() -> None:
    model, x = small(), image()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        (model(x).sum() + model.forward_intermediates(x, [0, 2])[1][0].square().sum()).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in results[0].items():
        close(results[1][name], grad, 0.0)
    for gate in ("blocks.0.attn.gating_param", "blocks.1.attn.pos_proj.weight"):
        assert results[0][gate].abs().min() > 0


def test_attention_dropout_acts() -> None:
    model, x = small(attn_drop_rate=0.5), image()
    close(model(x), model(x), 0.0)
    assert not torch.equal(model.train()(x), model(x))


def test_compiles_and_runs_in_bfloat16() -> None:
    torch._dynamo.reset()
    model, x = small(depth=2, local_up_to_layer=1), image()
    expected = model(x)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.15)  # logits of size 4 from bfloat16 weights


def test_filter_resizes_the_position_table() -> None:
    state = small().state_dict()
    wide = small(img_size=(24, 40))
    wide.load_state_dict(checkpoint_filter_fn(state, wide))
    close(wide.pos_embed, resize_positions(state["pos_embed"], (3, 5), (4, 4)), 0.0)
    close(wide(image()), make_size_free(small())(image()))
    with pytest.raises(ValueError, match="15 rows, not a square grid, and the model has 16"):
        checkpoint_filter_fn(wide.state_dict(), small())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: small()(image(channels=4)), ValueError, r"\(B, 3, H, W\), got \(2, 4, 24, 40\)"),
        (lambda: small()(image(24, 41)), ValueError, r"8 x 8, got 24 x 41"),
        (lambda: small().forward_intermediates(image(), output_fmt="NHWC"), ValueError, "'NHWC'.*'NLC'"),
        (lambda: make_size_free(nn.Linear(2, 2)), TypeError, "Linear .*no timm ConViT"),
        (lambda: small().blocks[0].attn(torch.zeros(1, 12, 36)), ValueError, "12 tokens for a grid of 3 x 3"),
        (lambda: checkpoint_filter_fn({"x": torch.zeros(1)}, small()), ValueError, "not a ConViT.*'x'"),
        (
            lambda: checkpoint_filter_fn(small(num_heads=9, embed_dim=4).state_dict(), small()),
            ValueError,
            "of width 36, 9 heads, 4 blocks of which 2 GPSA; the model has width 36, 4 heads",
        ),
    ],
)
def test_errors_name_expected_and_given(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_refuses_replaced_layers() -> None:
    model = ConVit(**SMALL)

    class Hosted(type(model.blocks[0])):  # what attaching an adapter does to a class
        pass

    model.blocks[1].__class__ = Hosted
    with pytest.raises(TypeError, match="Hosted is not timm's Block"):
        make_size_free(model)


def test_every_gpsa_layer_was_freed() -> None:
    assert [isinstance(b.attn, GridGPSA) for b in small().blocks] == [True, True, False, False]
