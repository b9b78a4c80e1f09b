"""LoLA-SpecViT: goldens of the authors' program, piece by piece and whole, counts, freezing, the tidy one."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from backbones.lola_specvit import LoLASpecViT, checkpoint_filter_fn, freeze_all_but_lora
from backbones.lola_specvit_layers import (
    BandDropout,
    ChannelExcite,
    GatedLoRALinear,
    ReduceSize,
    SpecBlock,
    SpecWindowAttention,
    SwiGLU,
)
from zoo.adapters.inject import attach
from zoo.adapters.sites import find_sites
from zoo.errors import OptionError

GOLDEN = Path(__file__).parents[1] / "golden" / "lola-specvit"
TINY = dict(in_chans=9, num_classes=5, dim=16, depths=(1, 2), num_heads=(2, 4), window=(3, 4), mlp_ratio=2.0)
TINY |= dict(drop_path_rate=0.0, img_size=11, lora=dict(rank=2, alpha=4))
EXACT = {9: (254_639_541, 73_586_832), 6: (254_638_338, 73_586_784), 16: (254_642_348, 73_586_944)}
EXACT[22] = (254_644_754, 73_587_040)


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def fill(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The golden's parameters; only counters of batches may be missing."""
    held = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    lost = module.load_state_dict(checkpoint_filter_fn(held, module), strict=False)
    assert not lost.unexpected_keys and all(key.endswith("num_batches_tracked") for key in lost.missing_keys)
    return module.eval()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_gradients(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    grads = {f"grad.param.{name}": p.grad for name, p in module.named_parameters()}
    named = [key for key in tensors if key.startswith("grad.param.")]
    assert named
    for key in named:
        close(grads[key], tensors[key])


def tidy(**options: object) -> LoLASpecViT:
    small = dict(in_chans=6, img_size=9, dim=8, depths=(1, 1), num_heads=(2, 2), front=(2, 4), num_classes=3)
    return timm.create_model("lola_specvit_tidy", **{**small, **options}).eval()


# ---- goldens ----
def test_golden_gated_linear() -> None:
    t = golden("lora_linear_gated")
    layer = fill(GatedLoRALinear(10, 14, rank=3, alpha=6), t)
    x = t["in.x"].clone().requires_grad_()
    y = layer(x)
    close(y, t["out.y"])
    y.backward(t["in.grad_out"])
    close(x.grad, t["grad.x"])
    check_gradients(layer, t)


def test_golden_window_attention() -> None:
    t = golden("window_attention")
    layer = fill(SpecWindowAttention(12, 3, 3, lambda i, o: GatedLoRALinear(i, o, rank=2, alpha=4)), t)
    assert torch.equal(layer.relative_position_index, t["param.relative_position_index"])
    x = t["in.x"].clone().requires_grad_()
    y = layer(x)
    close(y, t["out.y"])
    y.backward(t["in.grad_out"])
    close(x.grad, t["grad.x"])
    check_gradients(layer, t)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("swiglu", lambda: SwiGLU(10, 16, 6)),
        ("se_2d", lambda: ChannelExcite(32)),
        ("se_3d", lambda: ChannelExcite(32)),
        ("reduce_size", lambda: ReduceSize(16)),
    ],
)
def test_golden_pieces(name: str, make) -> None:
    t = golden(name)
    close(fill(make(), t)(t["in.x"]), t["out.y"])


def test_golden_model() -> None:
    t = golden("full_tiny")
    model = fill(LoLASpecViT(**TINY), t)
    x = t["in.x"]
    close(model.spectral_conv(x[:, None]).mean(2), t["out.spectral_mean"])
    close(model.pixels(x), t["out.after_se_mean"])
    embedded = model.patch_embed(t["out.after_se_mean"]).permute(0, 2, 3, 1)
    close(embedded, t["out.patch_embed"])
    _, maps = model.forward_intermediates(x)
    for i, level in enumerate(maps):
        close(level.permute(0, 2, 3, 1), t[f"out.level{i}"])
    close(model.forward_features(x), t["out.tokens"])
    logits = model(x)
    close(logits, t["out.logits"])
    loss = F.cross_entropy(logits, t["in.label"], label_smoothing=0.1)
    close(loss[None], t["out.loss_ls01"])
    freeze_all_but_lora(model)
    F.cross_entropy(model(x), t["in.label"], label_smoothing=0.1).backward()
    check_gradients(model, t)


def test_golden_batch_statistics() -> None:
    t = golden("full_tiny")
    model = fill(LoLASpecViT(**TINY, drop_rate=0.0, band_drop=0.0), t).train()
    close(model(t["in.x"]), t["out.logits_train_norandom"])
    state = model.state_dict()
    after = [key for key in t if key.startswith("out.after_train.")]
    assert len(after) == 3
    for key in after:
        close(state[key.removeprefix("out.after_train.")], t[key])


# ---- counts and freezing ----
@pytest.mark.parametrize("classes", EXACT)
def test_published_counts(classes: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("lola_specvit", num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == EXACT[classes][0]
    freeze_all_but_lora(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == EXACT[classes][1]
    layers = [m for m in model.modules() if isinstance(m, GatedLoRALinear)]
    assert len(layers) == 105
    gates = sum(layer.lora_gate.weight.numel() for layer in layers if layer.lora_gate is not None)
    residuals = sum(layer.lora_residual.weight.numel() for layer in layers if layer.lora_residual is not None)
    assert gates == residuals == 35_721_216
    assert sum(p.numel() for m in model.modules() if isinstance(m, SwiGLU) for p in m.parameters()) == 142_985_088


def test_only_lora_trains_after_freezing() -> None:
    expected = json.loads((GOLDEN / "full_tiny.json").read_text())
    model = freeze_all_but_lora(LoLASpecViT(**TINY))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(expected["trainable_after_freeze"])
    assert sum(p.numel() for p in model.parameters()) == expected["n_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["n_trainable"]
    model(torch.randn(2, 9, 11, 11)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained
    with pytest.raises(OptionError, match="no gated LoRA layer"):
        freeze_all_but_lora(tidy())


def test_grid_of_the_published_patch() -> None:
    small = dict(dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1), front=(2, 2), lora=dict(rank=1), in_chans=3)
    model = LoLASpecViT(**small).eval()
    _, maps = model.forward_intermediates(torch.randn(1, 3, 15, 15))
    assert model.pos_embed.shape == (1, 7, 7, 8)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 4, 4), (32, 2, 2), (32, 2, 2)]


# ---- pieces ----
def test_stand_alone_layer_starts_without_the_low_rank_term() -> None:
    layer, x = GatedLoRALinear(6, 4, rank=2), torch.randn(3, 6)
    close(layer(x), layer.linear(x) + layer.lora_residual(x))


def test_merge_is_exact_without_a_gate_and_refused_with_one() -> None:
    for residual in (False, True):
        layer, x = GatedLoRALinear(6, 4, rank=2, gate=False, residual=residual), torch.randn(3, 6)
        nn.init.normal_(layer.lora_up.weight)
        close(layer.merged()(x), layer(x), 1e-6)
    with pytest.raises(OptionError, match="no exact merge"):
        GatedLoRALinear(6, 4, rank=2).merged()


def test_low_rank_gate_is_small() -> None:
    full, low = (GatedLoRALinear(64, 64, rank=4, residual=False, gate_rank=rank) for rank in (None, 4))
    sizes = [sum(p.numel() for part in layer.added() for p in part.parameters()) for layer in (full, low)]
    assert sizes == [2 * 4 * 64 + 64 * 64, 4 * 4 * 64]
    assert low(torch.randn(2, 64)).shape == (2, 64)


def block(**options: object) -> SpecBlock:
    given = dict(make=nn.Linear, mlp_hidden=8, lean=True, mask_padding=False, drop_path=0.0)
    made = SpecBlock(8, 4, 2, **{**given, **options})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def test_padding_attends_unless_masked() -> None:
    plain, x = block(), torch.randn(2, 5, 6, 8)
    masked = copy.deepcopy(plain)
    masked.mask_padding = True
    assert (plain(x) - masked(x)).abs().max() > 1e-3
    close(plain(x[:, :4, :4]), masked(x[:, :4, :4]))  # whole windows: nothing is padded
    # Masked windows equal attention over the real tokens alone: one window of 1 x 2 in the corner of the grid.
    alone = plain.norm1(x)[:, 4:, 4:].reshape(2, 2, 8)
    at = torch.tensor([0, 1])  # the first two places of a window's first row
    attn = plain.attn
    q, k, v = attn.qkv(alone).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    bias = attn.relative_position_bias_table[attn.relative_position_index[at][:, at]].permute(2, 0, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, bias[None].expand(2, -1, -1, -1))
    expected = attn.proj(mixed.transpose(1, 2).flatten(2))
    close(masked._attend(plain.norm1(x))[:, 4:, 4:].reshape(2, 2, 8), expected)


def test_band_dropout_takes_whole_planes() -> None:
    layer, x = BandDropout(0.5), torch.ones(4, 8, 6, 3, 3)
    y = layer.train()(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y.amin((3, 4)), y.amax((3, 4)))
    assert torch.equal(layer.eval()(x), x)


# ---- the tidy variant ----
def test_tidy_variant_learns_everywhere_and_wastes_nothing() -> None:
    with torch.device("meta"):
        model = timm.create_model("lola_specvit_tidy")
    assert sum(p.numel() for p in model.parameters()) == 1_189_825
    model = tidy(depths=(1, 2))
    assert not any(isinstance(m, GatedLoRALinear) for m in model.modules())
    assert [b.window for level in model.levels for b in level if isinstance(b, SpecBlock)] == [4, 2, 2]
    model.train()(torch.randn(2, 6, 9, 9)).square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(".fc." in name or "spectral_attention" in name for name in still)  # a ReLU of width one may be dead


def test_band_weights_tell_bands_apart() -> None:
    """Reversing the bands changes nothing after a mean of symmetric kernels, and much after a weighted sum."""
    for weighted in (False, True):
        model = tidy(band_weights=weighted, centre_skip=False)
        for conv in (model.spectral_conv[0], model.spectral_conv[3], model.spectral_conv[6]):
            conv.weight.data += conv.weight.data.flip(2)
        x = torch.randn(2, 6, 9, 9)
        assert ((model(x) - model(x.flip(1))).abs().max() > 1e-4) == weighted


def test_bands_may_be_strided() -> None:
    model = tidy(in_chans=50, band_stride=(4, 2, 1))
    x = torch.randn(2, 50, 9, 9)
    assert model.spectral_conv(x[:, None]).shape[2] == 7 == model.band_weights.shape[1]
    assert model(x).shape == (2, 3)


def test_centre_skip_hears_the_middle_pixel() -> None:
    model, x = tidy(centre_skip=True), torch.randn(1, 6, 9, 9)
    plain = tidy(centre_skip=False)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("centre.")})
    tokens = plain.forward_intermediates(x)[0].permute(0, 2, 3, 1).flatten(1, 2)
    expected = model.norm(tokens + model.centre(x[:, :, 4, 4])[:, None])
    close(model.forward_features(x), expected)
    assert not torch.allclose(plain(x), model(x))


def test_without_band_weights_any_number_of_bands_runs() -> None:
    model = tidy(band_weights=False, centre_skip=False)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 9, 9)).shape == model(torch.randn(1, 20, 9, 9)).shape == (1, 3)


def test_tidy_variant_with_low_rank_gates() -> None:
    model = freeze_all_but_lora(tidy(lora=dict(rank=2, alpha=2, gate_rank=2, residual=False)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < sum(p.numel() for p in model.parameters())
    assert model(torch.randn(2, 6, 9, 9)).shape == (2, 3)


def test_zoo_adapters_sit_on_it() -> None:
    model = tidy(num_classes=0)
    roles = {site.role for site in find_sites(model)}
    assert {"qkv", "out", "fc1", "fc2", "conv", "norm"} <= roles
    x = torch.randn(2, 6, 9, 9)
    before = model(x)
    attach(model, {"type": "LoRA", "rank": 2}, where=["q", "v", "fc2"])
    close(model(x), before)


def test_compiles_and_runs_in_bfloat16() -> None:
    torch._dynamo.reset()
    model, x = tidy(), torch.randn(2, 6, 9, 9)
    expected = model(x)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    close(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), expected, 0.1)


def test_classifier_can_be_taken_off() -> None:
    model = tidy()
    model.reset_classifier(0)
    assert model(torch.randn(1, 6, 9, 9)).shape == (1, model.num_features)
    layers = timm.models.group_parameters(model, model.group_matcher())
    assert layers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tidy()(torch.zeros(1, 6, 7, 7)), r"\(B, bands, 9, 9\), got \(1, 6, 7, 7\)"),
        (lambda: LoLASpecViT(depths=(1, 2)), "must name the same stages"),
        (lambda: LoLASpecViT(lora={"ranks": 2}), "lora has the fields"),
        (lambda: GatedLoRALinear(4, 4, rank=0), "at least 1"),
        (lambda: SpecWindowAttention(10, 3, 3, nn.Linear), "10 cannot be split into 3"),
        (lambda: tidy(img_size=3), "at least 4 x 4"),
        (lambda: tidy()(torch.zeros(1, 5, 9, 9)), "built for 6 bands"),
    ],
)
def test_errors_name_what_was_wrong(call, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()
