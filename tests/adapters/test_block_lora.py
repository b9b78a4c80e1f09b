"""Block-LoRA: CLIP-LoRA's tensors at one block, tied LoRAs at more, counts, scales and dropout by block."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from adapter_checks import MODELS, check_compiles, check_half, check_merge, check_round_trips, check_start, golden, vit
from open_clip.model import CLIP
from torch import nn

from zoo.adapters.inject import attach
from zoo.errors import OptionError, SiteError

WHERE = {"timm ViT": "q, v, out, fc2, embed", "open_clip CLIP": "q, k, v, out"}


def config(name: str) -> dict[str, object]:
    return dict(type="BlockLoRA", rank=6, blocks=3, alpha=2.0, where=WHERE[name])


@pytest.mark.parametrize("name", MODELS)
def test_start(name: str) -> None:
    check_start(MODELS[name], config(name))


@pytest.mark.parametrize("name", MODELS)
def test_save_load_copy_and_detach(name: str) -> None:
    check_round_trips(MODELS[name], config(name))


@pytest.mark.parametrize("name", MODELS)
def test_merge(name: str) -> None:
    check_merge(MODELS[name], config(name))


@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name: str) -> None:
    check_half(MODELS[name], config(name))


@pytest.mark.parametrize("options", [{}, dict(dropout=0.3, block_dropout=True)], ids=str)
def test_compiles_to_one_graph(options: dict[str, object]) -> None:
    check_compiles({**config("timm ViT"), **options})


class Attention(nn.Module):
    """The one attention layer of the reference, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]


@pytest.mark.parametrize("case", ["base_cliplora_qkv_r2", "base_cliplora_qo_r3_causal"])
def test_golden_one_block_is_clip_lora(case: str) -> None:
    tensors, about = golden(f"block-lora/{case}")
    options = about["config"]
    for name in (
        "q_proj",
        "k_proj",
        "v_proj",
        "proj",
    ):  # stored after the reference's eval() merged them
        assert torch.equal(tensors[f"param.{name}.weight"], tensors[f"out.merged.{name}.weight"])
        if f"param.{name}.w_lora_A" in tensors:
            product = tensors[f"param.{name}.w_lora_B"] @ tensors[f"param.{name}.w_lora_A"]
            tensors[f"param.{name}.weight"] -= options["lora_alpha"] / math.sqrt(options["r"]) * product
    model = Attention().eval()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            fused = torch.cat([tensors[f"param.{p}_proj.{kind}"] for p in "qkv"])
            getattr(model.attn, f"in_proj_{kind}").copy_(fused)
            getattr(model.attn.out_proj, kind).copy_(tensors[f"param.proj.{kind}"])
    x, mask = tensors["in.x"].requires_grad_(), tensors.get("in.attn_mask")
    torch.testing.assert_close(model(x, mask), tensors["out.y_frozen"], atol=1e-5, rtol=1e-5)
    roles = [r.replace("o", "out") for r in options["enable_lora"]]
    settings = dict(type="BlockLoRA", rank=options["r"], blocks=1, alpha=options["lora_alpha"], where=roles)
    attached = attach(model, settings, example=x.detach())
    by_role = dict(q="q_proj", k="k_proj", v="v_proj", out="proj")
    holders = [(item.adapter, [by_role[part.role] for part in item.site.parts]) for item in attached.placed]
    with torch.no_grad():
        for adapter, names in holders:
            adapter.down.copy_(torch.cat([tensors[f"param.{n}.w_lora_A"] for n in names]))
            adapter.up.copy_(torch.cat([tensors[f"param.{n}.w_lora_B"] for n in names])[None])
    y = model(x, mask)
    torch.testing.assert_close(y, tensors["out.y"], atol=1e-5, rtol=1e-5)
    (y * tensors["in.cotangent"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad.x"], atol=1e-5, rtol=1e-5)
    for adapter, names in holders:
        downs = torch.cat([tensors[f"grad.{n}.w_lora_A"] for n in names])
        torch.testing.assert_close(adapter.down.grad, downs, atol=1e-5, rtol=1e-5)
        ups = torch.cat([tensors[f"grad.{n}.w_lora_B"] for n in names])
        torch.testing.assert_close(adapter.up.grad[0], ups, atol=1e-5, rtol=1e-5)
    attached.merge()
    merged = torch.cat([tensors[f"out.merged.{p}_proj.weight"] for p in "qkv"])
    torch.testing.assert_close(model.attn.in_proj_weight, merged, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.attn.out_proj.weight, tensors["out.merged.proj.weight"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["derived_block_r4_n2", "derived_block_r8_n8"])
def test_golden_blocks_are_a_tied_lora(case: str) -> None:
    tensors, about = golden(f"block-lora/{case}")
    options = about["config"]
    weight = tensors["param.weight"]
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].load_state_dict(dict(weight=weight, bias=tensors["param.bias"]))
    settings = dict(type="BlockLoRA", rank=options["r"], blocks=options["n_blocks"], alpha=options["lora_alpha"])
    attached = attach(model, {**settings, "where": "linear"}, example=tensors["in.x"])
    adapter = attached.placed[0].adapter
    with torch.no_grad():
        adapter.down.copy_(tensors["param.A_shared"])
        adapter.up.copy_(torch.stack([tensors[f"param.B.{i}"] for i in range(options["n_blocks"])]))
    torch.testing.assert_close(model(tensors["in.x"]), tensors["out.y"], atol=1e-5, rtol=1e-5)
    attached.merge()
    torch.testing.assert_close(model[0].weight, tensors["out.merged_weight"], atol=1e-6, rtol=1e-5)
    change = model[0].weight.detach() - weight
    assert torch.linalg.matrix_rank(change, atol=1e-4) <= options["r"] // options["n_blocks"]


def test_equals_a_lora_with_tiled_and_joined_factors_in_value_and_gradient() -> None:
    blocked, plain = vit(), vit()
    first = attach(blocked, dict(type="BlockLoRA", rank=6, blocks=3, alpha=2, where="fc1"))
    second = attach(plain, dict(type="LoRA", rank=6, alpha=2, rslora=True, where="fc1"))
    pairs = [(a.adapter, b.adapter) for a, b in zip(first.placed, second.placed, strict=True)]
    for ours, lora in pairs:
        nn.init.normal_(ours.up)
        with torch.no_grad():
            lora.down.copy_(ours.down.repeat(3, 1))
            lora.up.copy_(torch.cat([*ours.up], 1))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(blocked(x), plain(x), atol=1e-5, rtol=1e-5)
    blocked(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, lora in pairs:
        torch.testing.assert_close(ours.down.grad, sum(lora.down.grad.chunk(3)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat([*ours.up.grad], 1), lora.up.grad, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.up.grad[0], ours.up.grad[1])  # the blocks are redundant without dropout by block


def test_dropout_by_block_makes_blocks_differ_and_is_off_in_evaluation() -> None:
    for block_dropout in (False, True):
        model = vit()
        attached = attach(model, dict(type="BlockLoRA", rank=4, dropout=0.5, block_dropout=block_dropout, where="fc1"))
        model.train()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        ups = [item.adapter.up.grad for item in attached.placed]
        assert all(torch.equal(up[0], up[1]) != block_dropout for up in ups)
        x = torch.randn(2, 3, 32, 32)
        for item in attached.placed:
            nn.init.normal_(item.adapter.up)
        assert not torch.equal(model(x), model(x))
        model.eval()
        expected = model(x)
        attached.merge()
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_dropout_by_block_is_the_sum_of_separately_masked_inputs() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    settings = dict(type="BlockLoRA", rank=4, blocks=2, alpha=3.0, dropout=0.4, block_dropout=True, where="linear")
    adapter = attach(model, settings, example=torch.zeros(1, 5)).placed[0].adapter
    nn.init.normal_(adapter.up)
    x = torch.randn(3, 5)
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.manual_seed(1)
    y = model.train()(x)
    torch.manual_seed(1)
    masked = [nn.functional.dropout(x, 0.4) for _ in range(2)]
    terms = [h @ adapter.down.T @ up.T for h, up in zip(masked, adapter.up, strict=True)]
    torch.testing.assert_close(y, plain + 3.0 / math.sqrt(4) * sum(terms))


def test_scales() -> None:
    def scale(**options: object) -> float:
        model = nn.Sequential(nn.Linear(9, 9))
        settings = dict(type="BlockLoRA", rank=8, blocks=2, alpha=3.0, where="linear", **options)
        return attach(model, settings, example=torch.zeros(1, 9)).placed[0].adapter.scale

    assert scale() == pytest.approx(3 / math.sqrt(8))
    assert scale(scale_rank="block") == pytest.approx(3 / math.sqrt(4))
    assert scale(rslora=False) == pytest.approx(3 / 8)
    assert scale(rslora=False, scale_rank="block") == pytest.approx(3 / 4)


COUNTS = {
    (2, 1): (110_592, 73_728),
    (2, 2): (82_944, 55_296),
    (4, 1): (221_184, 147_456),
    (4, 2): (165_888, 110_592),
    (4, 4): (138_240, 92_160),
    (8, 8): (248_832, 165_888),
}


@pytest.fixture(scope="module")
def large_clip() -> nn.Module:
    with torch.device("meta"):
        return CLIP(**open_clip.get_model_config("ViT-B-16"))


@pytest.mark.parametrize("sizes", COUNTS, ids=str)
def test_counts_on_clip_vit_b_16(sizes: tuple[int, int], large_clip: nn.Module) -> None:
    settings = dict(type="BlockLoRA", rank=sizes[0], blocks=sizes[1])
    attached = attach(large_clip, settings)
    vision = sum(p.numel() for n, p in attached.named_parameters() if n.startswith("visual."))
    total = sum(p.numel() for p in attached.parameters())
    attached.detach()
    assert (vision, total - vision) == COUNTS[sizes]


WRONG = [
    *(dict(rank=3), dict(rank=0), dict(blocks=0), dict(rank=2.0), dict(scale_rank="half")),
    *(dict(dropout=1.0), dict(block_dropout=True), dict(n=2)),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_options(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        attach(vit(), dict(type="BlockLoRA", **wrong))


def test_dropout_is_refused_where_only_the_weight_is_read() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(SiteError, match="dropout"):
        attach(model, dict(type="BlockLoRA", dropout=0.1, where="conv"), example=torch.zeros(1, 4, 5, 5))
    attach(model, dict(type="BlockLoRA", where="conv"), example=torch.zeros(1, 4, 5, 5))
