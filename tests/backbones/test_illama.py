"""iLLaMA against goldens from the authors' code, and timm's model protocol."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import backbones.illama  # noqa: F401  (registers the models with timm)
from backbones.illama import ILLaMA, checkpoint_filter_fn, resample_pos_embed, select_weights
from backbones.illama_layers import (
    SoftMaskedAttention,
    SoftMaskSchedule,
    rotary_table,
    rotate,
    soft_masked_attention,
    soft_masked_attention_reference,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "illama"
COUNTS = {
    "illama_tiny": (5_701_096, 512),
    "illama_small": (22_018_024, 1024),
    "illama_base": (86_502_376, 2048),
    "illama_large": (310_445_032, 2816),
}


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def small(**options: object) -> ILLaMA:
    """A model of 3 blocks whose every parameter is random enough to matter."""
    torch.manual_seed(0)
    defaults = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = ILLaMA(**{**defaults, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def image(height: int = 32, width: int = 48, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


# ---- goldens ----
def test_golden_attention() -> None:
    t = golden("attention_softmask")
    cos, sin = rotary_table(11, 16)
    close(cos, t["out.freqs_cos"])
    close(sin, t["out.freqs_sin"])
    close(rotate(t["in.x"].view(2, 11, 3, 16), cos, sin), t["out.rope_of_x_as_heads"])
    attention = SoftMaskedAttention(48, 3)
    attention.load_state_dict(params(t) | {"soft_mask_rate": torch.tensor(0.0)})
    for rate in (0.0, 1.0, 0.35):
        attention.soft_mask_rate.fill_(rate)
        x = t["in.x"].clone().requires_grad_()
        y = attention(x)
        close(y, t[f"out.alpha{rate}"])
    (y * t["in.cot"]).sum().backward()  # rate 0.35, the golden gradients'
    assert x.grad is not None and attention.qkv.weight.grad is not None and attention.proj.bias.grad is not None
    close(x.grad, t["grad.x"])
    close(attention.qkv.weight.grad, t["grad.qkv.weight"])
    close(attention.proj.bias.grad, t["grad.proj.bias"])


def golden_model(t: dict[str, Tensor]) -> ILLaMA:
    model = ILLaMA(img_size=(40, 24), patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=7)
    model.load_state_dict(checkpoint_filter_fn({"model": params(t)}, model))
    return model


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_golden_model(rate: float) -> None:
    t = golden("model_rect")
    model = golden_model(t).eval()
    model.set_soft_mask_rate(rate)
    tokens = model.forward_features(t["in.x"])
    close(tokens[:, -1], t[f"out.features.alpha{rate}"])
    close(model.forward_head(tokens, pre_logits=True), t[f"out.features.alpha{rate}"])
    close(model(t["in.x"]), t[f"out.logits.alpha{rate}"])


def test_golden_model_gradients() -> None:
    t = golden("model_rect")
    model = golden_model(t).train()
    model.set_soft_mask_rate(0.6)
    x = t["in.x"].clone().requires_grad_()
    logits = model(x)
    close(logits, t["out.logits_train.alpha0.6"])
    (logits * t["in.cot"]).sum().backward()
    close(x.grad, t["grad.x"])
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key in [k for k in t if k.startswith("grad.") and k != "grad.x"]:
        close(grads[key.removeprefix("grad.")], t[key])


def test_golden_schedule_positions_selection() -> None:
    t = golden("schedule_posembed_select")
    schedules = {
        "constant": SoftMaskSchedule("constant", 5, 3),
        "linear": SoftMaskSchedule("linear", 5, 3),
        "linear_r0.8_cut1": SoftMaskSchedule("linear", 3, 1, initial_rate=0.8),
        "standard": SoftMaskSchedule("standard", 5, 3),
        "cut0": SoftMaskSchedule("constant", 4, 0),
    }
    for name, schedule in schedules.items():
        expected = t[f"out.sched.{name}"]
        close(torch.tensor([schedule.rate_at(i) for i in range(len(expected))]), expected)
    assert schedules["linear"].rate_at(14) == 0.0 and schedules["standard"].rate_at(10**6) == 1.0
    close(resample_pos_embed(t["in.pos_embed"], (6, 6), (4, 4)), t["out.pos_embed_4to6"])
    close(resample_pos_embed(t["in.pos_embed"], (3, 3), (4, 4)), t["out.pos_embed_4to3"])
    assert torch.equal(select_weights(t["in.ws"], (4, 6)), t["out.ws_10x12_to_4x6"])
    assert torch.equal(select_weights(t["in.ws"], (7, 5)), t["out.ws_10x12_to_7x5"])


# ---- attention ----
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_fused_form_equals_reference_with_gradients(rate: float) -> None:
    torch.manual_seed(0)
    q, k, v, cot = (torch.randn(2, 3, 13, 8, dtype=torch.float64) for _ in range(4))
    q = q * 6  # wide scores: an inexact normaliser would show
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for function in (soft_masked_attention_reference, soft_masked_attention):
        out = function(*inputs, torch.tensor(rate))
        results.append((out, *torch.autograd.grad((out * cot).sum(), inputs)))
    for reference, fused in zip(*results, strict=True):
        close(fused, reference, 1e-10)


def test_mask_multiplies_after_softmax() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 9, 8).unbind(0)
    identity = torch.eye(9).expand(1, 2, 9, 9)  # v = 1 reads the map itself
    full = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)
    causal = soft_masked_attention(q, k, identity, torch.tensor(0.0))
    close(causal, full.tril())
    close(causal[..., -1, :].sum(-1), torch.ones(1, 2))
    assert (causal.sum(-1)[..., :-1] < 1).all()
    close(soft_masked_attention(q, k, identity, torch.tensor(1.0)), full)
    # The two-call form: causal softmax scaled back by the ratio of the normalisers.
    scores = q @ k.transpose(-2, -1) / math.sqrt(8)
    masked = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf)
    ratio = (masked.logsumexp(-1) - scores.logsumexp(-1)).exp()
    mixed = 0.4 * full + 0.6 * ratio[..., None] * masked.softmax(-1)
    close(soft_masked_attention(q, k, identity, torch.tensor(0.4)), mixed)


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_table(12, 8)
    rows = [rotate(x.expand(1, 12, 1, 8), cos, sin)[0, :, 0] for x in (q, k)]
    close(rows[0][0], q)
    close(rows[0][7] @ rows[1][4], rows[0][11] @ rows[1][8])


# ---- protocol ----
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    count, hidden = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.blocks[0].mlp.fc1.out_features == hidden
    assert model.num_features == model.head_hidden_size == model.feature_info[-1]["num_chs"]


def test_parameter_count_at_384() -> None:
    with torch.device("meta"):
        model = timm.create_model("illama_base.in1k_384")
    assert sum(p.numel() for p in model.parameters()) == 86_794_216


def test_created_by_timm_with_other_channels_and_size() -> None:
    model = timm.create_model("illama_tiny", num_classes=10, in_chans=4, img_size=128).eval()
    x = torch.randn(2, 4, 128, 128)
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        assert model.forward_features(x).shape == (2, 65, 192)
    features = timm.create_model("illama_tiny", features_only=True, img_size=32, out_indices=(1, -1))
    assert [tuple(y.shape) for y in features(torch.randn(1, 3, 32, 32))] == [(1, 192, 2, 2)] * 2
    assert features.feature_info.reduction() == [16, 16]


def test_class_token_is_last() -> None:
    model, x = small(), image()
    assert model.num_prefix_tokens == 0 and model.suffix_tokens == 1
    before = model._embed(x)
    with torch.no_grad():
        model.cls_token.add_(1)
    changed = (model._embed(x) - before).abs().amax(dim=(0, 2)) > 0.5
    assert changed.tolist() == [False] * 6 + [True]
    model.reset_classifier(5, "avg")
    tokens = model.forward_features(x)
    close(model.forward_head(tokens, pre_logits=True), tokens[:, :6].mean(1))


def test_intermediates() -> None:
    model, x = small(), image()
    final, maps = model.forward_intermediates(x, indices=[0, -1], norm=True)
    close(final, model.forward_features(x))
    assert [tuple(y.shape) for y in maps] == [(2, 32, 2, 3)] * 2
    close(maps[-1].flatten(2).transpose(1, 2), final[:, :-1])  # row-major grid
    pairs = model.forward_intermediates(
        x, 2, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert [(tuple(a.shape), tuple(b.shape)) for a, b in pairs] == [((2, 6, 32), (2, 1, 32))] * 2
    close(pairs[-1][1][:, 0], final[:, -1])
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    early = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert ran == [0]
    kept = copy.deepcopy(model)
    assert kept.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert len(kept.blocks) == 1 and isinstance(kept.head, torch.nn.Identity)
    close(kept.forward_intermediates(x, [0], intermediates_only=True)[0], early[0])
    close(kept.forward_features(x)[:, :-1].transpose(1, 2).reshape(2, 32, 2, 3), early[0])


def test_reset_classifier() -> None:
    model = small().double()
    model.reset_classifier(11)
    assert model.get_classifier().weight.dtype == torch.float64
    assert model(image().double()).shape == (2, 11) and model.num_classes == 11
    model.reset_classifier(0)
    assert model(image().double()).shape == (2, 32)


def test_other_sizes() -> None:
    fixed, x = small(), image(64, 32)
    dynamic = small(dynamic_img_size=True)
    close(dynamic(image()), fixed(image()), 0.0)
    resized = copy.deepcopy(fixed)
    resized.set_input_size((64, 32))
    assert resized.pos_embed.shape == (1, 9, 32)
    assert torch.equal(resized.pos_embed[:, -1], fixed.pos_embed[:, -1])
    close(dynamic(x), resized(x), 1e-6)
    resized.set_input_size((32, 64))  # as many tokens, another grid
    assert resized.patch_embed.grid_size == (2, 4) and resized(image(32, 64)).shape == (2, 5)
    resized.set_input_size(patch_size=8)
    assert resized.pos_embed.shape == (1, 33, 32) and resized.feature_info[0]["reduction"] == 8
    assert resized(image(32, 64)).shape == (2, 5)
    trained = timm.create_model("illama_tiny", img_size=32)
    trained.set_input_size((48, 32))
    assert timm.models.get_model_input_config(trained)["input_size"] == (3, 48, 32)


def test_weight_decay_and_groups() -> None:
    model = small()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["pos_embed"] == layers["patch_embed.proj.weight"] == layers["cls_token"] == 0
    assert layers["blocks.0.attn.qkv.weight"] == 1 and layers["blocks.2.mlp.fc3.weight"] == 3
    assert set(layers) == {name for name, _ in model.named_parameters()}


# ---- state ----
def test_state_round_trip_keeps_the_mask(tmp_path: Path) -> None:
    model, x = small(), image()
    schedule = SoftMaskSchedule("linear", iterations_per_epoch=5, cutoff_epochs=1)
    model.set_soft_mask_rate(schedule.rate_at(2))
    assert model.soft_mask_rate == 0.5
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    other = small(num_classes=5)
    assert other.soft_mask_rate == 0.0 and not torch.allclose(other(x), model(x))
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert other.soft_mask_rate == 0.5
    close(other(x), model(x), 0.0)
    assert all(layer.attn.soft_mask_rate == 0.5 for layer in other.blocks)


def test_filter_takes_the_authors_layout_and_resizes() -> None:
    square = small(img_size=32)
    theirs = {k: v for k, v in square.state_dict().items() if not k.endswith("soft_mask_rate")}
    same = small(img_size=32)
    same.set_soft_mask_rate(1.0)
    same.load_state_dict(checkpoint_filter_fn({"model": theirs, "epoch": 3}, same))
    assert same.soft_mask_rate == 0.0  # their finished models are causal
    bigger = small(img_size=48)
    bigger.load_state_dict(checkpoint_filter_fn({"model": theirs}, bigger))
    close(bigger.pos_embed, resample_pos_embed(square.pos_embed, (3, 3), (2, 2)), 0.0)
    with pytest.raises(ValueError, match=r"6 patch rows.*has 9"):
        checkpoint_filter_fn(small().state_dict(), bigger)


def test_pretrained_file_through_timm(tmp_path: Path) -> None:
    source = timm.create_model("illama_tiny", img_size=32)
    theirs = {k: v for k, v in source.state_dict().items() if not k.endswith("soft_mask_rate")}
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    overlay = {"file": str(tmp_path / "theirs.pth"), "input_size": (3, 32, 32)}
    loaded = timm.create_model("illama_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert torch.equal(loaded.blocks[5].mlp.fc3.weight, source.blocks[5].mlp.fc3.weight)
    assert loaded.head.weight.shape == (3, 192)


# ---- running ----
def test_compiles_whole_without_recompiling_for_the_rate() -> None:
    torch._dynamo.reset()
    model, x = small(), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rate in (0.0, 0.5, 1.0):
            model.set_soft_mask_rate(rate)
            close(compiled(x), model(x))
    intermediates = torch.compile(model.forward_intermediates, fullgraph=True, backend="aot_eager")
    close(intermediates(x, [1])[1][0], model.forward_intermediates(x, [1])[1][0])


def test_compiled_gradients_and_dynamic_size() -> None:
    torch._dynamo.reset()
    model, x = small(dynamic_img_size=True), image(64, 32)
    model(x).square().sum().backward()
    expected = model.pos_embed.grad
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    close(model.pos_embed.grad, expected)


def test_exports() -> None:
    model, x = small(), image()
    close(torch.export.export(model, (x,)).module()(x), model(x))


def test_gradient_checkpointing_equals_plain() -> None:
    model, x = small(drop_rate=0.0).train(), image()
    model.set_soft_mask_rate(0.3)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        (model(x).sum() + model.forward_intermediates(x, [0, 2])[1][0].square().sum()).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        close(results[1][name], grad, 0.0)


def test_bfloat16() -> None:
    model, x = small(), image()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(model(x).float(), expected, 0.1)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.1)


def test_drop_path_grows_with_depth() -> None:
    model = small(drop_path_rate=0.2)
    assert isinstance(model.blocks[0].drop_path, torch.nn.Identity)
    assert [model.blocks[i].drop_path.drop_prob for i in (1, 2)] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(img_size=(32, 50)), r"16 x 16, got 32 x 50"),
        (lambda: small()(image(channels=4)), r"\(B, 3, H, W\), got \(2, 4, 32, 48\)"),
        (lambda: small()(image(48, 48)), r"height 32 and width 48, got 48 and 48"),
        (lambda: small(dynamic_img_size=True)(image(40, 48)), r"16 x 16, got 40 x 48"),
        (lambda: small().set_input_size((33, 48)), r"16 x 16, got 33 x 48"),
        (lambda: small().forward_intermediates(image(), output_fmt="NHWC"), r"NHWC.*'NCHW' or 'NLC'"),
        (lambda: small().reset_classifier(3, "max"), r"'max'.*token"),
        (lambda: small(num_heads=3), r"dim 32 over 3 heads"),
        (lambda: small().set_soft_mask_rate(1.5), r"1\.5.*\[0, 1\]"),
        (lambda: SoftMaskSchedule("cosine", 5, 3), r"'cosine'.*'linear'"),  # type: ignore[arg-type]
        (lambda: SoftMaskSchedule("linear", 5, 3, initial_rate=-1), r"initial_rate is -1"),
        (lambda: SoftMaskSchedule("linear", 0, 3), r"got 0 and 3"),
        (lambda: SoftMaskSchedule("linear", 5, 3).rate_at(-1), r"iteration is -1"),
        (lambda: select_weights(torch.zeros(3, 4), (4, 4)), r"\(4, 4\) out of \(3, 4\)"),
    ],
)
def test_errors_name_expected_and_given(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_rate_without_a_soft_masked_layer_is_an_error() -> None:
    model = small()
    for block in model.blocks:
        block.attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="no block has a SoftMaskedAttention"):
        model.set_soft_mask_rate(0.5)
