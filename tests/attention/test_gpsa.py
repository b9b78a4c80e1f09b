"""GPSA against goldens from the authors' code, brute force, and the limits of its gate."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.attention import Attention, AttentionRope
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo.attention.gpsa import (
    GPSA,
    gated_attention,
    gated_map,
    local_stencil,
    mean_distance,
    positional_attention,
    relative_offsets,
)
from zoo.attention.plug import plug_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "convit-gpsa"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def close_grad(actual: Tensor, expected: Tensor) -> None:
    """Gradients of a sum over tokens reach 10; rounding is relative to the largest, not to each."""
    close(actual, expected, 1e-5 * max(1.0, expected.abs().max().item()))


def layer(grid: tuple[int, int] = (3, 4), prefix: int = 1, dim: int = 24, heads: int = 4, **options: object) -> GPSA:
    torch.manual_seed(0)
    gpsa = GPSA(dim, heads, grid_size=grid, num_prefix_tokens=prefix, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in gpsa.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return gpsa.eval()


def tokens(n: int, dim: int = 24) -> Tensor:
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(1))


# ---- goldens ----
@pytest.mark.parametrize("case", ["gpsa_h4_4x4", "gpsa_h9_5x5_bias"])
def test_golden_of_the_authors_layer(case: str) -> None:
    t = golden(case)
    heads = len(t["param.gating_param"])
    x = t["in.x"].clone().requires_grad_()
    p = {name: value.clone().requires_grad_() for name, value in params(t).items()}
    grid = (round(x.shape[1] ** 0.5),) * 2
    q, k = nn.functional.linear(x, p["qk.weight"], p.get("qk.bias")).chunk(2, dim=-1)
    v = nn.functional.linear(x, p["v.weight"], p.get("v.bias"))
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    pos_proj = nn.Linear(3, heads)
    pos_proj.load_state_dict({"weight": t["param.pos_proj.weight"], "bias": t["param.pos_proj.bias"]})
    y = gated_attention(q, k, v, pos_proj, p["gating_param"], grid).transpose(1, 2).flatten(2)
    y = nn.functional.linear(y, p["proj.weight"], p["proj.bias"])
    close(y, t["out.y"])
    attention = gated_map(q, k, pos_proj, p["gating_param"], grid)
    close(attention, t["out.attn"])
    close(mean_distance(attention, grid), t["out.nonlocality"])
    assert torch.equal(relative_offsets(grid), t["out.rel_indices"][0])
    (y * t["in.grad_out"]).sum().backward()
    close(x.grad, t["grad.x"])
    p |= {"pos_proj.weight": pos_proj.weight, "pos_proj.bias": pos_proj.bias}
    for key in [k for k in t if k.startswith("grad.") and k != "grad.x"]:
        close_grad(p[key.removeprefix("grad.")].grad, t[key])


def test_golden_plug_in_with_a_prefix_token() -> None:
    t = golden("plugin_prefix1_grid3x4")
    gpsa = GPSA(24, 4, grid_size=(3, 4), num_prefix_tokens=1)
    gpsa.load_state_dict(params(t))
    x = t["in.x"].clone().requires_grad_()
    y = gpsa(x)
    close(y, t["out.y"])
    close(gpsa.attention_map(x), t["out.attn"])
    close(relative_offsets((3, 4)), t["out.rel_3x4"])
    (y * t["in.grad_out"]).sum().backward()
    close(x.grad, t["grad.x"])
    for name, parameter in gpsa.named_parameters():
        close(parameter.grad, t[f"grad.{name}"])


@pytest.mark.parametrize("heads", [4, 9, 16])
@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_golden_local_stencil(heads: int, strength: float) -> None:
    t = golden("local_init")
    weight = local_stencil(heads, strength)
    close(weight, t[f"out.pos_proj_weight.h{heads}_s{strength}"])
    bias = t[f"out.pos_proj_bias.h{heads}_s{strength}"]
    close(positional_attention(weight, bias, (5, 5)), t[f"out.pos_attn_5x5.h{heads}_s{strength}"])


def test_golden_stencil_of_six_heads_fills_four() -> None:
    close(local_stencil(6), golden("local_init")["out.pos_proj_weight_first4.h6_s1.0"])
    gpsa = GPSA(24, 6, grid_size=(2, 2), locality_strength=3.0, gate_init=1.0)
    assert torch.equal(gpsa.gating_param, torch.ones(6)) and gpsa.pos_proj.bias.eq(0).all()
    rest = gpsa.pos_proj.weight[4:].abs()
    assert 0 < rest.max() < 0.02 * 3 * 5


# ---- properties ----
def test_offsets_equal_brute_force_on_a_rectangle() -> None:
    offsets = relative_offsets((3, 4))
    for query in range(12):
        for key in range(12):
            dy, dx = key // 4 - query // 4, key % 4 - query % 4
            assert offsets[query, key].tolist() == [dx, dy, dx * dx + dy * dy]


def test_factorised_position_equals_the_full_softmax() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 3), torch.randn(5)
    expected = (relative_offsets((3, 4)) @ weight.T + bias).permute(2, 0, 1).softmax(dim=-1)
    close(positional_attention(weight, bias, (3, 4)), expected, 1e-6)


def test_strong_locality_is_a_convolution_stencil() -> None:
    attention = positional_attention(local_stencil(9, 50.0), torch.zeros(9), (5, 7))
    query = 2 * 7 + 3
    for a in range(3):
        for b in range(3):
            key = (2 + a - 1) * 7 + 3 + b - 1
            assert attention[a + 3 * b, query, key] > 0.999


def test_stencil_of_a_rectangle() -> None:
    attention = positional_attention(local_stencil(12, 50.0, (3, 4)), torch.zeros(12), (5, 8))
    # 4 columns: their centre lies between two patches, so the outer heads share their mass between two columns
    query = 2 * 8 + 3
    for a in range(3):
        for b in range(4):
            row = attention[a + 3 * b, query].view(5, 8)[2 + a - 1]
            assert row[3 + b - 2] > 0.499 and row[3 + b - 1] > 0.499


def test_rows_sum_to_one_and_paths_agree() -> None:
    gpsa, x = layer(), tokens(13)
    attention = gpsa.attention_map(x)
    close(attention.sum(-1), torch.ones(2, 4, 13))
    v = gpsa.qkv(x)[..., 48:].unflatten(-1, (4, 6)).transpose(1, 2)
    close(gpsa(x), gpsa.proj((attention @ v).transpose(1, 2).flatten(2)))


def test_gate_limits() -> None:
    torch.manual_seed(0)
    attention = Attention(24, 4, qkv_bias=True).double().eval()
    gpsa = GPSA.from_attention(attention, grid_size=(3, 4), num_prefix_tokens=1, gate_init=-20.0)
    x = tokens(13).double()
    expected = attention(x)
    assert (gpsa(x) - expected).abs().max() < 1e-7
    with torch.no_grad():
        gpsa.gating_param.fill_(50.0)
    rows = gpsa.attention_map(x)[:, :, 1:]
    close(rows[0], rows[1], 1e-12)  # independent of x
    close(gpsa(x)[:, :1], expected[:, :1], 1e-12)  # prefix queries have no gate


def test_from_attention_keeps_modules_and_adds_five_numbers_a_head() -> None:
    attention = Attention(24, 4, qkv_bias=True, qk_norm=True, attn_drop=0.1, norm_layer=nn.LayerNorm)
    gpsa = GPSA.from_attention(attention, grid_size=(2, 3), kernel_size=(1, 4))
    assert gpsa.qkv is attention.qkv and gpsa.proj is attention.proj and gpsa.q_norm is attention.q_norm
    assert gpsa.attn_drop.p == 0.1
    count = [sum(p.numel() for p in m.parameters()) for m in (gpsa, attention)]
    assert count[0] - count[1] == 5 * 4


def test_plugs_into_a_timm_transformer_on_a_rectangle() -> None:
    torch.manual_seed(0)
    model = VisionTransformer((48, 64), 16, embed_dim=24, depth=2, num_heads=4, num_classes=3, reg_tokens=2).eval()
    x = torch.randn(2, 3, 48, 64)
    expected, keys = model(x), set(model.state_dict())
    plug_attention(model, {"type": "GPSA", "gate_init": -20.0, "kernel_size": (2, 2)})
    assert [type(b.attn) for b in model.blocks] == [GPSA, GPSA] and model.blocks[0].attn.num_prefix_tokens == 3
    assert set(model.state_dict()) - keys == {
        f"blocks.{i}.attn.{n}" for i in (0, 1) for n in ("gating_param", "pos_proj.weight", "pos_proj.bias")
    }
    close(model(x), expected)


def test_dropout_acts_on_the_mixed_attention() -> None:
    gpsa, x = layer(attn_drop=1.0).train(), tokens(13)
    close(gpsa(x), gpsa.proj.bias.expand(2, 13, 24))
    gpsa.attn_drop.p = 0.4
    torch.manual_seed(3)
    noisy = torch.stack([gpsa(x) for _ in range(600)]).mean(0)
    assert (noisy - gpsa.eval()(x)).abs().max() < 0.15


def test_other_grid_needs_no_change() -> None:
    gpsa = layer()
    other = layer(grid=(4, 2))
    other.load_state_dict(gpsa.state_dict())
    x = tokens(9)
    close(gpsa(x, grid_size=(4, 2)), other(x), 0.0)


def test_every_parameter_gets_a_gradient() -> None:
    gpsa = layer()
    gpsa(tokens(13)).square().sum().backward()
    for name, parameter in gpsa.named_parameters():
        if name == "pos_proj.bias":  # cancels in the softmax
            assert parameter.grad.abs().max() < 1e-4
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert gpsa.pos_proj.weight.grad[:, 2].abs().min() > 0


def test_compiles_exports_and_runs_in_bfloat16() -> None:
    torch._dynamo.reset()
    gpsa, x = layer(), tokens(13)
    expected = gpsa(x)
    close(torch.compile(gpsa, fullgraph=True, backend="aot_eager")(x), expected)
    close(torch.export.export(gpsa, (x,)).module()(x), expected)
    half = copy.deepcopy(gpsa).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(gpsa(x).float(), expected, 0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GPSA(24, 5, grid_size=(2, 2)), ValueError, "24 channels, got 5 heads"),
        (lambda: GPSA(24, 4, grid_size=(2, 2), kernel_size=(2, 3)), ValueError, "2 x 3 stencil needs 6 heads"),
        (lambda: GPSA(24, 4, grid_size=(2, 2), scale_norm=True), ValueError, "scale_norm=False"),
        (lambda: layer()(tokens(12)), ValueError, r"13, 24.*1 prefix tokens \+ a 3x4 grid, got \(2, 12, 24\)"),
        (lambda: layer()(tokens(13), is_causal=True), ValueError, "no is_causal"),
        (lambda: GPSA.from_attention(nn.Linear(2, 2), grid_size=(2, 2)), TypeError, "Linear lacks"),
        (
            lambda: GPSA.from_attention(Attention(24, 4, scale_norm=True, norm_layer=nn.LayerNorm), grid_size=(2, 2)),
            TypeError,
            "norm or gate after the attention of Attention",
        ),
        (lambda: GPSA.from_attention(Attention(24, 4, gated=True), grid_size=(2, 2)), TypeError, "norm or gate"),
        (lambda: GPSA.from_attention(Attention(24, 4, attn_head_dim=4), grid_size=(2, 2)), TypeError, "inputs, got 48"),
        (lambda: GPSA.from_attention(AttentionRope(24, 4), grid_size=(2, 2)), TypeError, "also takes rope"),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
