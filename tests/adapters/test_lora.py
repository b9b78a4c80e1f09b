"""LoRA: counts, scale, initialisation, every kind of weight, the one-matmul form against the branch form, and peft."""

from __future__ import annotations

import copy

import peft
import pytest
import timm
import torch
from torch import nn

from zoo.adapters.base import Factors, Part
from zoo.adapters.host import BranchHost, Host, hosted
from zoo.adapters.inject import attach, merge, unmerge
from zoo.adapters.low_rank import branch_linear, low_rank_linear
from zoo.errors import OptionError, SiteError


def vit(**options: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=4, **options).eval()


def randomise(module: nn.Module | object, std: float = 0.05) -> None:
    for parameter in module.parameters():  # type: ignore[union-attr]
        nn.init.normal_(parameter, 0, std)


def part(role: str, *rows: tuple[int, int]) -> Part:
    return Part(role, rows)


LAYOUTS = {
    "whole": (part("out", (0, 12)),),
    "q and v of a fused qkv": (part("q", (0, 4)), part("v", (8, 12))),
    "interleaved by head": (part("q", (0, 2), (6, 8)), part("k", (2, 4), (8, 10))),
    "unequal widths": (part("q", (0, 2)), part("v", (4, 12))),
}


@pytest.mark.parametrize("parts", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 3, 4)], ids=str)
def test_one_matmul_form_has_the_values_and_gradients_of_the_branch(
    parts: tuple[Part, ...], lead: tuple[int, ...]
) -> None:
    x = torch.randn(*lead, 7, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(12, 7, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    width = sum(p.width for p in parts)
    down = torch.randn(len(parts) * 3, 7, dtype=torch.float64, requires_grad=True)
    up = torch.randn(width, 3, dtype=torch.float64, requires_grad=True)
    fast = low_rank_linear(x, weight, bias, [Factors(down, up)], [parts])
    slow = branch_linear(x, nn.functional.linear(x, weight, bias), Factors(down, up), parts)
    torch.testing.assert_close(fast, slow)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad(fast, (x, down, up), probe), torch.autograd.grad(slow, (x, down, up), probe), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_one_matmul_form_passes_gradcheck_with_two_adapters() -> None:
    parts = LAYOUTS["q and v of a fused qkv"]
    weight = torch.randn(12, 5, dtype=torch.float64)

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return low_rank_linear(x, weight, None, [Factors(a, b), Factors(c, d)], [parts, LAYOUTS["whole"]])

    shapes = [(3, 5), (4, 5), (8, 2), (2, 5), (12, 2)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(run, inputs)


def test_frozen_weight_gets_no_gradient_and_only_the_input_is_saved() -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    attach(layer_in := nn.Sequential(layer), dict(type="LoRA", rank=2, where="linear"))
    x = torch.randn(1000, 64, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer_in(x)
    y.sum().backward()
    assert layer.weight.grad is None
    token_sized = [t for t in saved if t.numel() >= 1000 * 64]
    assert [t.data_ptr() for t in token_sized] == [x.data_ptr()]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_scale(rslora: bool, scale: float) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    attached = attach(model, dict(type="LoRA", rank=4, alpha=16, rslora=rslora, where="linear"))
    randomise(attached)
    adapter = attached.placed[0].adapter
    x = torch.randn(3, 6)
    expected = x @ model[0].weight.T + scale * (x @ adapter.down.T @ adapter.up.T)
    torch.testing.assert_close(model(x), expected)


def test_counts_of_vit_base() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    fused = attach(model, dict(type="LoRA", rank=8, where="qkv"), name="fused")
    assert sum(p.numel() for p in fused.parameters()) == 294_912  # 12 * 8 * (768 + 2304)
    split = attach(model, dict(type="LoRA", rank=4, where="q,v"), name="split")
    assert sum(p.numel() for p in split.parameters()) == 12 * 2 * 4 * (768 + 768)
    every = attach(model, dict(type="LoRA", rank=8, where="qkv,out,fc1,fc2"), name="every")
    assert sum(p.numel() for p in every.parameters()) == 1_179_648


def test_dropout_is_a_branch_that_only_train_mode_feels() -> None:
    model = vit()
    attached = attach(model, dict(type="LoRA", dropout=0.5))
    assert {row["form"] for row in attached.table()} == {"branch"}
    randomise(attached)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_both_normal_starts_away_from_the_base_and_kaiming_on_it() -> None:
    x = torch.randn(1, 3, 224, 224)
    model = vit()
    base = model(x)
    attached = attach(model, dict(type="LoRA", init="both_normal"))
    assert (model(x) - base).abs().max() > 1e-3
    assert not any(placed.adapter.identity for placed in attached.placed)
    attached.detach()
    for init in ("kaiming", "gaussian"):
        attached = attach(model, dict(type="LoRA", init=init))
        assert torch.equal(model(x), base)
        attached.detach()


def test_pissa_is_the_identity_and_holds_the_leading_singular_vectors() -> None:
    model = nn.Sequential(nn.Linear(10, 8))
    weight = model[0].weight.detach().clone()
    x = torch.randn(4, 10)
    base = model(x)
    attached = attach(model, dict(type="LoRA", rank=3, alpha=6, init="pissa", where="linear"))
    torch.testing.assert_close(model(x), base, atol=1e-5, rtol=0)
    adapter = attached.placed[0].adapter
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(
        adapter.scale * adapter.up @ adapter.down, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5, rtol=0
    )
    assert torch.equal(model[0].weight, weight)
    reloaded = nn.Sequential(nn.Linear(10, 8))
    reloaded.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    other = attach(reloaded, dict(type="LoRA", rank=3, alpha=6, init="pissa", where="linear"))
    randomise(attached)
    other.load_state_dict(attached.state_dict())
    torch.testing.assert_close(reloaded(x), model(x))


CONVS = {
    "3x3 strided": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "1x1": nn.Conv2d(6, 8, 1, bias=False),
    "dilated": nn.Conv2d(6, 8, 3, dilation=2),
    "grouped": nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "same-padded (TF)": timm.layers.Conv2dSame(6, 8, 3, stride=2),
    "weight-standardised": timm.layers.StdConv2d(6, 8, 3, padding=1),
    "reflect-padded": nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "1-d": nn.Conv1d(6, 8, 3, padding=1),
    "3-d": nn.Conv3d(6, 8, 3, padding=1),
}


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
def test_convolutions_identity_merge_and_gradients(conv: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(conv))
    dims = len(conv.kernel_size)
    x = torch.randn(2, 6, *(9, 8, 7)[:dims])
    base = model(x)
    attached = attach(model, dict(type="LoRA", rank=2, where="conv"))
    assert torch.equal(model(x), base)
    randomise(attached, 0.3)
    out = model(x)
    assert (out - base).abs().max() > 1e-2
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attached.parameters())
    adapter = attached.placed[0].adapter
    flat = conv.weight[0].numel()
    assert adapter.down.shape == (2, flat) and adapter.up.shape == (conv.out_channels, 2)
    merge(model)
    torch.testing.assert_close(model(x), out, atol=1e-5, rtol=1e-5)
    unmerge(model)
    assert torch.equal(model(x), out)


def test_grouped_conv_refuses_dropout_with_the_reason() -> None:
    with pytest.raises(SiteError, match="only be adapted through its weight"):
        attach(nn.Sequential(CONVS["depthwise"]), dict(type="LoRA", dropout=0.1, where="conv"))


def test_rank_is_lowered_to_what_a_small_weight_holds() -> None:
    attached = attach(nn.Sequential(copy.deepcopy(CONVS["depthwise"])), dict(type="LoRA", rank=64, where="conv"))
    assert attached.placed[0].adapter.rank == 6  # 6 outputs, 9 inputs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(rank=0), "at least 1, got 0"),
        (dict(rank=2.5), "at least 1, got 2.5"),
        (dict(dropout=1.0), r"\[0, 1\), got 1.0"),
        (dict(init="kaming"), "did you mean 'kaiming'"),
        (dict(rnak=4), "takes no option 'rnak'; did you mean 'rank'"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        attach(vit(), dict(type="LoRA", **options))


@pytest.mark.parametrize("targets", ["linear", "conv"])
def test_same_output_as_peft(targets: str) -> None:
    """The same factors in peft's model and in ours give the same logits."""
    if targets == "linear":
        model, names, where = vit(), ["qkv", "attn.proj", "fc1", "fc2"], "qkv,out,fc1,fc2"
        x = torch.randn(2, 3, 224, 224)
    else:
        model, names, where = timm.create_model("resnet10t", num_classes=4).eval(), ["conv1", "conv2"], "layer*.conv*"
        x = torch.randn(2, 3, 64, 64)
        names = r"layer\d\..*conv\d"
    ours, theirs = model, copy.deepcopy(model)
    attached = attach(ours, dict(type="LoRA", rank=4, alpha=8, where=where))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)).eval()
    randomise(attached)
    layers = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert layers.keys() == {site.path for site in attached.sites}
    with torch.no_grad():
        for site, adapter in attached.placed:
            down, up = layers[site.path].lora_A["default"].weight, layers[site.path].lora_B["default"].weight
            down.copy_(adapter.down.reshape(down.shape))
            up.copy_(adapter.up.reshape(up.shape))
    torch.testing.assert_close(ours(x), wrapped(x), atol=1e-5, rtol=1e-5)


def test_autocast_sums_in_fp32_and_rounds_once() -> None:
    layer = nn.Sequential(nn.Linear(32, 32))
    attached = attach(layer, dict(type="LoRA", rank=4, where="linear"))
    randomise(attached)
    adapter = attached.placed[0].adapter
    x = torch.randn(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    merged = (layer[0].weight + adapter.up @ adapter.down).bfloat16()
    assert torch.equal(y, nn.functional.linear(x.bfloat16(), merged, layer[0].bias.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert adapter.up.grad is not None and adapter.up.grad.dtype == torch.float32


def test_bf16_base_keeps_fp32_adapters() -> None:
    model = vit().bfloat16()
    attached = attach(model, "LoRA")
    assert {p.dtype for p in attached.parameters()} == {torch.float32}
    model(torch.randn(1, 3, 224, 224).bfloat16()).float().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in attached.parameters())


def test_lora_on_multihead_attention_equals_a_dense_update() -> None:
    mha = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    model = nn.ModuleDict({"attn": mha})
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    cases = [
        dict(query=x, key=x, value=x),
        dict(query=x, key=x, value=x, key_padding_mask=padding),
        dict(query=x, key=x, value=x, attn_mask=causal, need_weights=False),
        dict(query=x, key=x, value=x, attn_mask=torch.randn(8, 5, 5), average_attn_weights=False),
        dict(query=x, key=memory, value=memory),
    ]
    attached = attach(model, dict(type="LoRA", rank=2, where="q,v,out"), example=None)
    randomise(attached, 0.3)
    dense = copy.deepcopy(model)
    merge(dense)
    assert type(dense["attn"]) is nn.MultiheadAttention and isinstance(mha, Host)
    for case in cases:
        y, weights = mha(**case)
        expected, expected_weights = dense["attn"](**case)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        if case.get("need_weights", True):
            torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-5)


def test_model_gradients_of_both_host_forms_agree() -> None:
    fast = vit().double()
    attached = attach(fast, dict(type="LoRA", where="q,v,out,fc1,fc2"))
    randomise(attached)
    slow = copy.deepcopy(fast)
    for module in slow.modules():
        if isinstance(module, Host):
            module.__class__ = hosted(module.plain, BranchHost)
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    fast(x).square().mean().backward()
    slow(x).square().mean().backward()
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9)
