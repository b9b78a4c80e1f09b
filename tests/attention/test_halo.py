"""Halo attention against goldens of timm and halonet-pytorch, per-pixel brute force, and known special cases."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers.attention import Attention
from timm.layers.halo_attn import HaloAttn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo.attention.halo import HaloAttention, HaloTokenAttention, from_lucidrains
from zoo.attention.plug import plug_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "halonet-local"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    config = json.loads((GOLDEN / f"{name}.json").read_text())["config"]
    return load_file(GOLDEN / f"{name}.safetensors"), config


def params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def layer(**options: object) -> HaloAttention:
    torch.manual_seed(0)
    defaults: dict[str, object] = {"dim": 16, "num_heads": 2, "block_size": 4, "halo_size": 1, "qkv_bias": True}
    halo = HaloAttention(**{**defaults, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in halo.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return halo.eval()


def image(height: int = 8, width: int = 12, dim: int = 16) -> Tensor:
    return torch.randn(2, dim, height, width, generator=torch.Generator().manual_seed(1))


def per_pixel(halo: HaloAttention, x: Tensor) -> Tensor:
    """The definition, one query at a time (stride 1, no pooling, no output projection)."""
    b, h = halo.block_size, halo.halo_size
    w, heads, d = b + 2 * h, halo.num_heads, halo.dim_head_qk
    q = halo.q(x).unflatten(1, (heads, d))
    k, v = halo.kv(x).unflatten(1, (heads, -1)).split((d, halo.dim_head_v), dim=2)
    height, width = x.shape[2:]
    out = torch.zeros(len(x), heads, halo.dim_head_v, height, width)
    for r in range(height):
        for c in range(width):
            top, left = r // b * b - h, c // b * b - h
            logits, values = [], []
            for u in range(w):
                for s in range(w):
                    inside = 0 <= top + u < height and 0 <= left + s < width
                    if not inside and halo.pad_mode == "mask":
                        continue
                    rel = halo.pos_embed.height_rel[u - r % b + w - 1] + halo.pos_embed.width_rel[s - c % b + w - 1]
                    key = k[..., top + u, left + s] if inside else torch.zeros(len(x), heads, d)
                    values.append(v[..., top + u, left + s] if inside else torch.zeros_like(v[..., 0, 0]))
                    query = q[..., r, c]
                    position = (query * rel).sum(-1) * (d**-0.5 if halo.scale_pos_embed else 1)
                    logits.append((query * key).sum(-1) * d**-0.5 + position)
            weights = torch.stack(logits, -1).softmax(-1)
            out[..., r, c] = (weights[..., None, :] * torch.stack(values, -1)).sum(-1)
    return out.flatten(1, 2)


# ---- goldens ----
@pytest.mark.parametrize("case", ["timm_b4h1_nonsquare", "timm_b3h1_avgdown"])
def test_golden_timm(case: str) -> None:
    t, config = golden(case)
    halo = HaloAttention(**config, pad_mode="zero")
    halo.load_state_dict(params(t))
    check(halo, t, {name: t[f"grad.{name}"] for name in params(t)})


@pytest.mark.parametrize("case", ["lucid_b4h2_masked", "lucid_b3h1_masked"])
def test_golden_lucidrains(case: str) -> None:
    t, config = golden(case)
    heads, dim_head = config["heads"], config["dim_head"]
    halo = HaloAttention(
        config["dim"],
        heads * dim_head,
        num_heads=heads,
        dim_head=dim_head,
        block_size=config["block_size"],
        halo_size=config["halo_size"],
        scale_pos_embed=True,
        proj_dim=config["dim"],
    )
    halo.load_state_dict(from_lucidrains(params(t), heads))
    grads = {key.removeprefix("grad."): t[key] for key in t if key.startswith("grad.") and key != "grad.x"}
    check(halo, t, from_lucidrains(grads, heads))


def check(halo: HaloAttention, t: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    x = t["in.x"].clone().requires_grad_()
    y = halo(x)
    close(y, t["out.y"])
    (y * t["in.grad_out"]).sum().backward()
    close(x.grad, t["grad.x"])
    named = dict(halo.named_parameters())
    assert named.keys() == grads.keys()
    for name, grad in grads.items():
        close(named[name].grad, grad)


# ---- the definition ----
@pytest.mark.parametrize("pad_mode", ["mask", "zero"])
@pytest.mark.parametrize(("size", "block", "halo_size"), [((5, 7), 4, 1), ((6, 4), 3, 2), ((3, 2), 4, 1)])
def test_equals_per_pixel_loops_on_any_size(pad_mode: str, size: tuple[int, int], block: int, halo_size: int) -> None:
    halo = layer(block_size=block, halo_size=halo_size, pad_mode=pad_mode, dim_out=24, dim_head=6)
    x = image(*size)
    close(halo(x), per_pixel(halo, x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": 2, "halo_size": 2, "dim_head": 8},
        {"stride": 2, "avg_down": True},
        {"block_size": 2, "stride": 2, "qk_ratio": 0.5, "scale_pos_embed": True},
    ],
)
def test_from_timm_is_the_same_layer(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    options = {"block_size": 4, "halo_size": 1, "qkv_bias": True, **options}
    theirs = HaloAttn(16, num_heads=2, **options)  # type: ignore[arg-type]
    ours = HaloAttention.from_timm(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys() and ours.q is theirs.q
    close(ours(image()), theirs(image()))


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 2, "avg_down": True}, {"stride": 2, "block_size": 3}])
def test_strided_output_on_odd_sizes(options: dict[str, object]) -> None:
    halo = layer(**options)
    assert halo(image(7, 9)).shape == (2, 16, 4, 5)
    # away from the ragged edge nothing changes: compare with the map cut to whole blocks further out
    if "avg_down" in options:
        plain = layer(stride=1)
        plain.load_state_dict(halo.state_dict())
        y = plain(image(7, 9))
        close(halo(image(7, 9))[..., 3, 4], y[..., 6, 8])
        close(halo(image(7, 9))[..., 3, 0], y[..., 6, :2].mean(-1))


def test_no_halo_is_window_attention_and_one_block_is_global() -> None:
    halo, x = layer(halo_size=0), image()
    y = halo(x)
    close(halo(x[..., 4:8, 8:]), y[..., 4:8, 8:])
    whole = layer(block_size=8, halo_size=0)
    with torch.no_grad():
        whole.pos_embed.height_rel.zero_()
        whole.pos_embed.width_rel.zero_()
    x = image(8, 8)
    q = whole.q(x).unflatten(1, (2, 8)).flatten(3).transpose(2, 3)
    k, v = whole.kv(x).unflatten(1, (2, 16)).flatten(3).transpose(2, 3).chunk(2, dim=-1)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, (8, 8))
    close(whole(x), expected)


def test_shift_by_a_block_and_receptive_field() -> None:
    halo, x = layer(), image(16, 16)
    y, shifted = halo(x), halo(x.roll((4, 4), (2, 3)))
    close(shifted[..., 8:12, 8:12], y[..., 4:8, 4:8])
    changed = x.clone()
    changed[..., 9:, :] += torch.randn(2, 16, 7, 16)
    after = halo(changed)
    close(after[..., :8, :], y[..., :8, :])  # rows 0-7: windows end at row 8
    assert not torch.allclose(after[..., 8:12, :], y[..., 8:12, :])


def test_dead_table_rows_have_no_gradient() -> None:
    for stride, dead in ((1, 2), (2, 6 - 2)):
        halo = layer(stride=stride)
        halo(image()).square().sum().backward()
        for table in (halo.pos_embed.height_rel, halo.pos_embed.width_rel):
            live = table.grad.abs().sum(1) > 0
            assert live.tolist() == [False] * dead + [True] * (11 - dead)


# ---- tokens ----
def test_token_layer_in_the_limits_of_full_attention() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm).eval()
    x = torch.randn(2, 2 + 15, 16)
    wide = HaloTokenAttention.from_attention(attention, grid_size=(3, 5), num_prefix_tokens=2, block_size=5)
    assert wide.qkv is attention.qkv and wide.k_norm is attention.k_norm
    close(wide(x), attention(x))  # one block holds the grid: same attention at the start
    narrow = HaloTokenAttention.from_attention(
        attention, grid_size=(3, 5), num_prefix_tokens=2, block_size=2, halo_size=1
    )
    y = narrow(x)
    close(y[:, :2], attention(x)[:, :2])  # prefix tokens still see everything
    changed = x.clone()
    changed[:, 2 + 4] += 1  # patch (0, 4): in no window of the blocks of columns 0-1
    after = narrow(changed)
    close(after[:, 2:4], y[:, 2:4])
    assert not torch.allclose(after[:, 5], y[:, 5])  # patch (0, 3), window up to column 4
    changed = x.clone()
    changed[:, 0] += 1
    assert ((narrow(changed) - y).abs().amax(-1) > 1e-6).all()  # every patch sees the prefix


def test_plugs_into_a_timm_transformer_on_a_rectangle() -> None:
    torch.manual_seed(0)
    model = VisionTransformer((48, 64), 16, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()
    x = torch.randn(2, 3, 48, 64)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
    expected = model.forward_features(x)
    plug_attention(model, {"type": "HaloTokenAttention", "block_size": 4, "where": "depth=0"})
    assert isinstance(model.blocks[0].attn, HaloTokenAttention) and isinstance(model.blocks[1].attn, Attention)
    close(model.forward_features(x), expected)  # one block holds the 3 x 4 grid
    plug_attention(model, {"type": "HaloTokenAttention", "block_size": 1, "halo_size": 1, "where": "depth=1"})
    local = model.forward_features(x)
    close(local[:, :1], expected[:, :1])  # in the last layer the class token still sees everything
    assert not torch.allclose(local[:, 1:], expected[:, 1:], atol=1e-3)


def test_token_layer_equals_the_map_layer() -> None:
    torch.manual_seed(0)
    token = HaloTokenAttention(16, 2, grid_size=(5, 6), block_size=4, halo_size=1)
    for table in token.pos_embed.parameters():
        nn.init.normal_(table)
    halo = layer(qkv_bias=True, proj_dim=16)
    q, k, v = token.qkv.weight.chunk(3)
    bias = token.qkv.bias.chunk(3)
    halo.load_state_dict(
        {
            "q.weight": q[:, :, None, None],
            "q.bias": bias[0],
            "kv.weight": torch.stack((k.unflatten(0, (2, 8)), v.unflatten(0, (2, 8))), 1).flatten(0, 2)[
                :, :, None, None
            ],
            "kv.bias": torch.stack((bias[1].unflatten(0, (2, 8)), bias[2].unflatten(0, (2, 8))), 1).flatten(),
            "proj.weight": token.proj.weight[:, :, None, None],
            "proj.bias": token.proj.bias,
            **{f"pos_embed.{name}": table for name, table in token.pos_embed.named_parameters()},
        }
    )
    x = image(5, 6)
    close(token(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (5, 6)), halo(x))


def test_token_layer_attention_dropout_and_other_grid() -> None:
    token = HaloTokenAttention(16, 2, attn_drop=1.0, grid_size=(3, 5), num_prefix_tokens=1, block_size=2)
    x = torch.randn(2, 16, 16)
    close(token.train()(x), token.proj.bias.expand(2, 16, 16))
    assert token.eval()(torch.randn(2, 9, 16), grid_size=(2, 4)).shape == (2, 9, 16)


# ---- running ----
@pytest.mark.parametrize("pad_mode", ["mask", "zero"])
def test_compiles_exports_and_runs_in_bfloat16(pad_mode: str) -> None:
    torch._dynamo.reset()
    halo, x = layer(pad_mode=pad_mode), image(7, 9)
    expected = halo(x)
    close(torch.compile(halo, fullgraph=True, backend="aot_eager")(x), expected)
    close(torch.export.export(halo, (x,)).module()(x), expected)
    half = copy.deepcopy(halo).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.1)


def test_token_layer_compiles_and_runs_in_bfloat16() -> None:
    torch._dynamo.reset()
    token = HaloTokenAttention(16, 2, grid_size=(3, 5), num_prefix_tokens=1, block_size=2, halo_size=1).eval()
    x = torch.randn(2, 16, 16)
    expected = token(x)
    close(torch.compile(token, fullgraph=True, backend="aot_eager")(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(token(x).float(), expected, 0.1)
    assert copy.deepcopy(token).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer(num_heads=3), ValueError, "16 output channels, got 3 heads"),
        (lambda: layer(stride=3), ValueError, "stride must be 1 or 2, got 3"),
        (lambda: layer(block_size=0), ValueError, "at least 1 .* got 0 and 1"),
        (lambda: layer(pad_mode="reflect"), ValueError, "'reflect'.*'mask', 'zero'"),
        (lambda: layer()(image(dim=8)), ValueError, r"\(B, 16, H, W\), got \(2, 8, 8, 12\)"),
        (
            lambda: from_lucidrains({"to_q.weight": torch.zeros(1), "x": torch.zeros(1)}, 2),
            ValueError,
            r"missing .*to_kv.weight.*unknown \['x'\]",
        ),
        (
            lambda: HaloTokenAttention(16, 2, grid_size=(3, 5))(torch.zeros(1, 16, 16)),
            ValueError,
            r"\(batch, 15, 16\).*got \(1, 16, 16\)",
        ),
        (lambda: HaloTokenAttention.from_attention(nn.Identity(), grid_size=(2, 2)), TypeError, "Identity lacks"),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
