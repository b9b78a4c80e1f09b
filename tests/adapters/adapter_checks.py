"""Small real models and the checks that hold for every adapter, for the test files of single methods."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.adapters.inject import attach

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of `method/case`."""
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def vit(seed: int = 3, depth: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", depth=depth, embed_dim=48, img_size=32, num_classes=5)
    return randomise(model).eval()


def clip(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=32)
    text = CLIPTextCfg(context_length=7, vocab_size=20, width=24, heads=2, layers=2)
    return randomise(CLIP(16, vision, text)).eval()


MODELS: dict[str, Callable[..., nn.Module]] = {"timm ViT": vit, "open_clip CLIP": clip}


def randomise(module: nn.Module, std: float = 0.05) -> nn.Module:
    """Norms and biases away from one and zero, so that nothing hides behind them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return module


def shake(attached: Any, std: float = 0.3) -> None:
    """Move every adapter parameter away from its initial value."""
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)


def run(model: nn.Module, seed: int = 0) -> Tensor:
    """Outputs on fixed inputs; of a CLIP the features of both towers."""
    torch.manual_seed(seed)
    first = next(p for p in model.parameters() if p.is_floating_point())
    image = torch.randn(2, 3, 32, 32).to(first.dtype)
    if not isinstance(model, CLIP):
        return model(image)
    return torch.cat([model.encode_image(image), model.encode_text(torch.randint(1, 20, (2, 7)))])


def check_start(build: Callable[..., nn.Module], config: dict[str, Any]) -> None:
    """Identity at the start; base keys stay; only the adapter is trained, and all of it can be."""
    base = build()
    model = build()
    attached = attach(model, config)
    torch.testing.assert_close(run(model), run(base), atol=2e-6, rtol=1e-5)
    own = set(attached.state_dict())
    assert [key for key in model.state_dict() if key not in own] == list(base.state_dict())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in attached.named_parameters()}
    shake(attached)
    assert not torch.allclose(run(model), run(base), atol=1e-3)
    run(model).square().sum().backward()
    lacking = [name for name, p in attached.named_parameters() if p.grad is None or not p.grad.any()]
    assert not lacking
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def check_round_trips(build: Callable[..., nn.Module], config: dict[str, Any]) -> None:
    """Saved tensors and deep copies give the same outputs; detaching gives the base back."""
    model, twin, base = build(), build(), build()
    attached, other = attach(model, config), attach(twin, config)
    shake(attached)
    other.load_state_dict(attached.state_dict())
    expected = run(model)
    assert torch.equal(run(twin), expected)
    copied = copy.deepcopy(model)
    shake(attached)
    assert torch.equal(run(copied), expected)
    attached.detach()
    assert torch.equal(run(model), run(base)) and list(model.state_dict()) == list(base.state_dict())


def check_merge(build: Callable[..., nn.Module], config: dict[str, Any]) -> None:
    """Merged equals unmerged, with no adapter key left, also when merged while training; unmerging is exact."""
    model = build()
    attached = attach(model, config)
    shake(attached, 0.1)
    expected = run(model)
    model.train()
    attached.merge()
    model.eval()
    assert list(model.state_dict()) == list(build().state_dict())
    torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=1e-5)
    attached.unmerge()
    model.eval()
    assert torch.equal(run(model), expected)


def check_half(build: Callable[..., nn.Module], config: dict[str, Any]) -> None:
    """bf16 throughout, fp32 adapters on a bf16 base, and autocast stay finite; merging works there too."""
    for order in ("attach first", "base first"):
        model = build() if order == "attach first" else build().bfloat16()
        attached = attach(model, config)
        shake(attached, 0.1)
        model = model.bfloat16() if order == "attach first" else model
        out = run(model.train())
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in attached.parameters())
        assert any(p.grad is not None and p.grad.any() for p in attached.parameters())
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = run(model)
        assert mixed.isfinite().all()
        if all(placed.adapter.mergeable for placed in attached.placed):
            before = run(model).float()
            attached.merge()
            assert (run(model).float() - before).norm() < 0.03 * before.norm()


def check_compiles(config: dict[str, Any]) -> None:
    """One graph in training mode, the same outputs and gradients as eager, given the same random numbers."""
    torch._dynamo.reset()
    model = vit(depth=1)
    attached = attach(model, config)
    shake(attached)
    model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for runner in (model, compiled):
        model.zero_grad()
        torch.manual_seed(5)
        image = torch.randn(2, 3, 32, 32)
        out = runner(image)
        out.square().sum().backward()
        results.append((out.detach(), [p.grad.clone() for p in attached.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
