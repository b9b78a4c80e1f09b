"""What only a GPU shows: the one-matmul form in bf16, under autocast and compiled by inductor; attention plug-ins."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from zoo.adapters.host import BranchHost, Host, hosted
from zoo.adapters.inject import attach, merge
from zoo.attention.plug import plug_attention

# fp32 must mean fp32 here; TF32 is off by default, but a program around may have switched it on
torch.set_float32_matmul_precision("highest")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=4).cuda().eval()


def adapted(model: nn.Module) -> nn.Module:
    attached = attach(model, dict(type="LoRA", rank=8, where="q,v,out,fc1,fc2"))
    for parameter in attached.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    return model


def branched(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Host):
            module.__class__ = hosted(module.plain, BranchHost)
    return twin


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).float().square().mean().backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_fp32_values_and_gradients_equal_the_branch() -> None:
    model, x = adapted(vit()), torch.randn(4, 3, 224, 224, device="cuda")
    slow = branched(model)
    torch.testing.assert_close(model(x), slow(x), atol=1e-5, rtol=1e-4)
    fast_grads, slow_grads = gradients(model, x), gradients(slow, x)
    assert fast_grads.keys() == slow_grads.keys()
    assert max(relative(fast_grads[k], slow_grads[k]) for k in slow_grads) < 1e-4


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_bf16_stays_within_its_rounding_of_fp64(how: str) -> None:
    """One bf16 rounding is 2^-9 of a value; two blocks of them stay below 2 %, and the branch form is no closer."""
    model, x = adapted(vit()), torch.randn(4, 3, 224, 224, device="cuda")
    exact = gradients(copy.deepcopy(model).double(), x.double())
    slow = branched(model)
    if how == "bf16 weights":
        model, slow, x = model.bfloat16(), slow.bfloat16(), x.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
        fast_grads, slow_grads = gradients(model, x), gradients(slow, x)
    fast = sorted(relative(fast_grads[k], exact[k]) for k in exact)[len(exact) // 2]
    branch = sorted(relative(slow_grads[k], exact[k]) for k in exact)[len(exact) // 2]
    assert fast < 0.05 and fast < 2 * branch + 0.01, (fast, branch)


def test_inductor_compiles_one_graph_with_the_same_gradients() -> None:
    model, x = adapted(vit()), torch.randn(4, 3, 224, 224, device="cuda")
    expected = gradients(model, x)
    model.compile(fullgraph=True)
    found = gradients(model, x)
    assert max(relative(found[k], expected[k]) for k in expected) < 1e-3


def test_merging_on_the_gpu_keeps_the_output() -> None:
    model, x = adapted(vit().double()), torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.float64)
    before = model(x)
    merge(model)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("attention", ["GPSA", "HaloTokenAttention", "SLA"])
def test_attention_plug_ins_train_in_bf16(attention: str) -> None:
    model = vit()
    plug_attention(model, attention)
    model = model.bfloat16().train()
    model(torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.bfloat16)).float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
