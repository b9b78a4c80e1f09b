"""PRepBN, folding and SLA: goldens from the authors' code, the schedule, exactness, refusals."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import backbones.slab_swin as slab_swin
from backbones.slab_cswin import StripeSLA
from backbones.slab_fold import fold_into_next, fold_into_previous, fold_prepbn
from backbones.slab_norm import ChannelAffine, PRepBN, RepBN, replace_layer_norms
from backbones.slab_pvt import SpatialReductionSLA
from zoo.attention.sla import SLA, linear_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "slab"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def params(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    start = f"param.{prefix}"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def lived_in(norm: PRepBN | RepBN) -> PRepBN | RepBN:
    """Every number of the layer away from its start, evaluation mode."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        bn = norm.bn if isinstance(norm, RepBN) else norm.norm2.bn
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2.0)
    return norm.eval()


# ---- goldens ----
def test_repbn_matches_the_authors() -> None:
    t = golden("prepbn")
    layer = RepBN(10)
    layer.load_state_dict(params(t, "repbn."))
    layer.eval()
    close(layer(t["in.x"]), t["out.repbn.eval"])
    scale, shift = layer.affine()
    close(scale, t["out.repbn.fused_scale"])
    close(shift, t["out.repbn.fused_shift"])
    close(layer.fuse()(t["in.x"]), t["out.repbn.eval"])
    x = t["in.x"].requires_grad_()
    y = layer.train()(x)
    close(y, t["out.repbn.train"])
    y.backward(t["in.cot"])
    close(x.grad, t["grad.repbn.x"])
    close(layer.alpha.grad, t["grad.repbn.alpha"])
    close(layer.bn.weight.grad, t["grad.repbn.bn.weight"])
    close(layer.bn.running_mean, t["out.repbn.running_mean_after"])
    close(layer.bn.running_var, t["out.repbn.running_var_after"])


def test_prepbn_schedule_matches_the_authors() -> None:
    t = golden("prepbn")
    layer = PRepBN(10, steps=4, warm=2, r0=0.8, eps=1e-6)
    layer.load_state_dict(params(t, "ln."))
    close(layer.eval()(t["in.x"]), t["out.prepbn.eval_at_start"])
    layer.train()
    lams, mean = [], layer.norm2.bn.running_mean.clone()
    for i, x in enumerate(t["in.seq"]):
        lams.append(layer.lam)
        close(layer(x), t[f"out.prepbn.train_step{i}"])
        assert layer.iter == t["out.prepbn.iter_after_each"][i] and layer.warm == t["out.prepbn.warm_after_each"][i]
        assert torch.equal(layer.norm2.bn.running_mean, mean) == (i < 2)  # warm-up leaves the statistics alone
    assert lams == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0]) and layer.finished
    close(layer.norm2.bn.running_mean, t["out.prepbn.running_mean_after"])
    close(layer.norm2.bn.running_var, t["out.prepbn.running_var_after"])
    close(layer.eval()(t["in.x"]), t["out.prepbn.eval_after"])


@pytest.mark.parametrize("side", [4, 2])  # N > d takes q(k^T v), N < d takes (q k^T)v
def test_sla_matches_the_authors(side: int) -> None:
    t = golden("sla_window")
    layer = SLA(24, 3, grid_size=(side, side))
    layer.load_state_dict(params(t, f"win{side}."))
    x = t[f"in.win{side}.x"].requires_grad_()
    y = layer(x)
    close(y, t[f"out.win{side}"])
    y.backward(t[f"in.win{side}.cot"])
    close(x.grad, t[f"grad.win{side}.x"])
    for name in ("dwc.weight", "positional_encoding", "qkv.weight"):
        close(layer.get_parameter(name).grad, t[f"grad.win{side}.{name}"])


@pytest.mark.parametrize("ratio", [1, 2])
def test_pvt_form_of_sla_matches_the_authors(ratio: int) -> None:
    t = golden("sla_pvt")
    layer = SpatialReductionSLA(20, 4, (8, 8), PRepBN, ratio).eval()
    layer.load_state_dict(params(t, f"sr{ratio}."))
    close(layer(t["in.x"], (8, 8)), t[f"out.sr{ratio}"])


@pytest.mark.parametrize(("name", "stripe"), [("vert", (8, 2)), ("horz", (2, 8))])
def test_stripe_form_of_sla_matches_the_authors(name: str, stripe: tuple[int, int]) -> None:
    t = golden("sla_cswin_stripe")
    layer = StripeSLA(12, 3, stripe)
    layer.load_state_dict(params(t, f"{name}."))
    q, k, v = t["in.qkv"].unflatten(2, (8, 8))
    close(layer(q, k, v).flatten(1, 2), t[f"out.{name}"])


def test_folding_a_swin_matches_the_authors_and_mends_their_patch_embedding() -> None:
    t = golden("repbn_merge")
    sizes = dict(img_size=56, embed_dim=8, depths=(1, 2), num_heads=(2, 4), mlp_ratio=2.0, num_classes=6)
    model = timm.create_model("prepbn_swin_tiny", norm_layer=RepBN, attn_type="SS", **sizes).eval()
    model.load_state_dict(slab_swin.checkpoint_filter_fn(params(t), model))
    x = t["in.x"]
    close(model(x), t["out.logits.before"])
    close(model.forward_head(model.forward_features(x), pre_logits=True), t["out.features.before"])
    folded = fold_prepbn(model)
    close(folded(x), t["out.logits.before"])
    close(folded(x), t["out.logits.correct_patch_embed_merge"])
    assert (folded(x) - t["out.logits.authors_patch_embed_merge_WRONG"]).abs().max() > 0.1
    first = folded.layers[0].blocks[0].attn.qkv
    close(first.weight, t["out.fused.layers.0.blocks.0.attn.qkv.weight"])
    close(first.bias, t["out.fused.layers.0.blocks.0.attn.qkv.bias"])
    merging = folded.layers[1].downsample.reduction
    close(merging.weight, t["out.fused.layers.0.downsample.reduction.weight"])
    close(merging.bias, t["out.fused.layers.0.downsample.reduction.bias"])
    close(model(x), t["out.logits.before"])  # a copy was folded


# ---- the norm ----
def test_repbn_is_the_same_for_every_leading_shape() -> None:
    layer, x = lived_in(RepBN(6)), torch.randn(2, 3, 4, 6)
    for mode in (False, True):
        ways = [x, x.flatten(1, 2), x.flatten(0, 2)]
        outputs = [copy.deepcopy(layer).train(mode)(way).reshape(-1, 6) for way in ways]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_repbn_equals_batch_norm_over_tokens_plus_alpha_x() -> None:
    layer, x = RepBN(6, alpha=0.5).train(), torch.randn(4, 9, 6)
    bn = nn.BatchNorm1d(6)
    close(layer(x), bn(x.transpose(1, 2)).transpose(1, 2) + 0.5 * x)
    close(layer.bn.running_var, bn.running_var)


def test_a_state_saved_mid_schedule_continues_it(tmp_path: Path) -> None:
    def run(layer: PRepBN, batches: Tensor) -> Tensor:
        return torch.stack([layer(x) for x in batches])

    batches = torch.randn(7, 2, 5, 4)
    through = PRepBN(4, steps=4, warm=1).train()
    expected = run(through, batches)
    first = PRepBN(4, steps=4, warm=1).train()
    run(first, batches[:3])
    save_file(first.state_dict(), tmp_path / "half.safetensors")
    second = PRepBN(4, steps=99).train()  # the saved counters win over the constructor's
    second.load_state_dict(load_file(tmp_path / "half.safetensors"))
    assert (second.iter, second.total_step, second.warm) == (2, 4, 0)
    assert torch.equal(run(second, batches[3:]), expected[3:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_step_once(reentrant: bool) -> None:
    plain = PRepBN(6, steps=3, warm=1).train()
    again = copy.deepcopy(plain)
    for _ in range(6):
        x, cot = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        (plain(inputs[0]) * cot).sum().backward()
        (checkpoint(again, inputs[1], use_reentrant=reentrant) * cot).sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in plain.state_dict().items())
    assert plain.finished and plain.norm2.bn.num_batches_tracked == 5


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_compiled_graph_holds_the_whole_schedule(backend: str) -> None:
    plain = PRepBN(6, steps=2, warm=1).train()
    twin = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            x, cot = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
            inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
            (plain(inputs[0]) * cot).sum().backward()
            (compiled(inputs[1]) * cot).sum().backward()
            close(inputs[1].grad, inputs[0].grad)  # the backward mixes by the lam of its own forward
            assert all(torch.allclose(v, twin.state_dict()[k], atol=1e-6) for k, v in plain.state_dict().items())


def test_any_transformer_takes_it_and_starts_from_its_own_function() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3).train()
    x, expected = torch.randn(2, 3, 32, 32), None
    expected = model(x)
    assert replace_layer_norms(model, steps=10) == 5
    close(model(x), expected)  # lam is 1 in the first step
    with pytest.raises(ValueError, match=r"has no nn\.LayerNorm"):
        replace_layer_norms(nn.Linear(2, 2), steps=10)


def test_norm_refusals() -> None:
    with pytest.raises(ValueError, match=r"expects 6 channels on the last axis, got .*\(2, 6, 4\)"):
        PRepBN(6)(torch.randn(2, 6, 4))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        RepBN(6).train()(torch.randn(1, 1, 6))
    for options in ({"steps": 0}, {"warm": -1}, {"r0": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PRepBN(6, **options)
    with pytest.raises(TypeError, match="per process"):
        nn.SyncBatchNorm.convert_sync_batchnorm(RepBN(6))(torch.randn(2, 3, 6))


# ---- folding primitives ----
@pytest.mark.parametrize("bias", [True, False])
def test_folding_into_the_next_layer(bias: bool) -> None:
    norm, x = lived_in(PRepBN(6)), torch.randn(2, 4, 4, 6)
    linear, conv = nn.Linear(6, 5, bias=bias), nn.Conv2d(6, 5, 2, 2, bias=bias)
    expected = linear(norm(x)), conv(norm(x).permute(0, 3, 1, 2))
    fold_into_next(norm, [linear, conv])
    close(linear(x), expected[0])
    close(conv(x.permute(0, 3, 1, 2)), expected[1])


@pytest.mark.parametrize("bias", [True, False])
def test_folding_into_the_previous_layer_scales_the_whole_bias(bias: bool) -> None:
    norm, conv, x = lived_in(RepBN(6)), nn.Conv2d(3, 6, 2, 2, bias=bias), torch.randn(2, 3, 8, 8)
    linear, tokens = nn.Linear(4, 6, bias=bias), torch.randn(2, 5, 4)
    expected = norm(conv(x).permute(0, 2, 3, 1)), norm(linear(tokens))
    fold_into_previous(conv, norm)
    fold_into_previous(linear, norm)
    close(conv(x).permute(0, 2, 3, 1), expected[0])
    close(linear(tokens), expected[1])


def test_folding_refuses_what_would_not_be_exact() -> None:
    norm = lived_in(RepBN(6))
    for layer in (nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1, groups=2), nn.LayerNorm(6)):
        with pytest.raises(TypeError, match="folds forward"):
            fold_into_next(norm, [layer])
    with pytest.raises(TypeError, match="folds backward"):
        fold_into_previous(nn.ReLU(), norm)
    with pytest.raises(ValueError, match="no RepBN or PRepBN"):
        fold_prepbn(nn.Linear(6, 6))


def test_an_unknown_model_keeps_an_affine_map_and_an_unfinished_schedule_warns() -> None:
    model, x = nn.Sequential(lived_in(PRepBN(6, steps=1)), nn.GELU()), torch.randn(2, 3, 6)
    with pytest.warns(UserWarning, match="'0'"):
        folded = fold_prepbn(model)
    assert isinstance(folded[0], ChannelAffine)
    close(folded(x), model.eval()(x))
    model.train()(x), model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold_prepbn(model)


# ---- attention ----
def test_linear_attention_rows_sum_to_one_or_to_zero_in_both_orders() -> None:
    q, k, v = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
    q[:, :, 0] = -1.0
    weights = q.relu() @ k.relu().transpose(-2, -1)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    close(linear_attention(q, k, v), weights @ v)
    few = [t[:, :, 1:4].double() for t in (q, k, v)]
    many = [few[0], *(t.repeat(1, 1, 30, 1) for t in few[1:])]  # thirty copies of the keys: the same averages
    close(linear_attention(*few), linear_attention(*many))  # by (q k^T) v and by q (k^T v)
    sums = linear_attention(q, k, torch.ones_like(v))
    close(sums[:, :, 0], torch.zeros(2, 3, 8))
    close(sums[:, :, 1:], torch.ones(2, 3, 39, 8))
    half = linear_attention(q.half(), k.half(), v.half())
    assert half.dtype is torch.float16 and half.isfinite().all()


def test_cost_is_linear_in_the_tokens() -> None:
    def flops(n: int) -> int:
        q = torch.empty(1, 2, n, 8, device="meta")
        with FlopCounterMode(display=False) as counter:
            linear_attention(q, q, q)
        return counter.get_total_flops()

    assert flops(256) == 2 * flops(128) == 2 * 2 * 2 * 128 * 2 * 64


def test_permuting_heads_permutes_the_output_channels() -> None:
    layer, x = SLA(24, 3, grid_size=(3, 4)), torch.randn(2, 12, 24)
    nn.init.normal_(layer.positional_encoding)
    layer.proj = nn.Identity()
    expected = layer(x).unflatten(2, (3, 8))[:, :, [2, 0, 1]].flatten(2)
    with torch.no_grad():
        order = torch.arange(24).view(3, 8)[[2, 0, 1]].flatten()
        for tensor in (layer.qkv.weight, layer.qkv.bias):
            tensor.copy_(tensor.unflatten(0, (3, 24))[:, order].flatten(0, 1))
        layer.positional_encoding.copy_(layer.positional_encoding[..., order])
    close(layer(x), expected)


def test_sla_takes_over_an_attention_and_leaves_prefix_tokens_out_of_the_local_branch() -> None:
    attn = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3).blocks[0].attn
    layer = SLA.from_attention(attn, grid_size=(3, 4), num_prefix_tokens=1)
    assert layer.qkv is attn.qkv and layer.proj is attn.proj
    assert layer.dwc.weight.shape == (8, 1, 5, 5) and layer.positional_encoding.shape == (1, 12, 24)
    assert not layer.positional_encoding.any()
    x = torch.randn(2, 13, 24)
    before = layer(x)
    with torch.no_grad():
        layer.dwc.bias.add_(1.0)
    close(layer(x)[:, 0], before[:, 0])
    assert not torch.allclose(layer(x)[:, 1:], before[:, 1:])
    swapped = layer(torch.cat((x[:, :1], x[:, 1:].flip(1)), dim=1))
    close(swapped[:, 0], before[:, 0])  # without key positions a prefix token sees a set


def test_another_grid_resizes_the_key_positions() -> None:
    layer = SLA(24, 3, grid_size=(3, 4))
    nn.init.normal_(layer.positional_encoding)
    x = torch.randn(2, 48, 24)
    in_call = layer(x, grid_size=(6, 8))
    layer.set_grid_size((6, 8))
    assert layer.positional_encoding.shape == (1, 48, 24)
    close(layer(x), in_call)


def test_attention_refusals() -> None:
    build = partial(SLA, 24, 3, grid_size=(3, 4))
    with pytest.raises(ValueError, match=r"expects \(batch, 12, 24\).*3x4 grid, got \(2, 13, 24\)"):
        build()(torch.randn(2, 13, 24))
    with pytest.raises(ValueError, match="attn_mask"):
        build()(torch.randn(2, 12, 24), attn_mask=torch.ones(12, 12))
    for options, text in (({"qk_norm": True}, "norm"), ({"attn_drop": 0.1}, "0.1"), ({"kernel_size": 4}, "odd")):
        with pytest.raises(ValueError, match=text):
            build(**options)
    with pytest.raises(ValueError, match="divide the 24 channels, got 5"):
        SLA(24, 5, grid_size=(3, 4))
    with pytest.raises(TypeError, match="lacks one of them"):
        SLA.from_attention(nn.Linear(4, 4), grid_size=(3, 4))
