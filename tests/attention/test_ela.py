"""ELA: the golden tensors, its symmetries, its counts, and its place after blocks of any backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from zoo.adapters.inject import attach
from zoo.attention.ela import VARIANTS, ELAGate
from zoo.attention.plug import plug_attention
from zoo.errors import OptionError, SiteError

GOLDEN = Path(__file__).parents[1] / "golden" / "ela"


@pytest.mark.parametrize("case", sorted(p.stem for p in GOLDEN.glob("*.json")))
def test_golden(case: str) -> None:
    config = json.loads((GOLDEN / f"{case}.json").read_text())["config"]
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    gate = ELAGate(config["channels"], config["variant"])
    names = {"conv.weight": "gate.conv.weight", "gn.weight": "gate.norm.weight", "gn.bias": "gate.norm.bias"}
    given = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    gate.load_state_dict({names[k]: v for k, v in given.items()})
    x = tensors["in.x"].requires_grad_(True)
    y = gate(x)
    torch.testing.assert_close(y, tensors["out.y"], atol=1e-5, rtol=1e-5)
    y.backward(tensors["in.grad_out"])
    torch.testing.assert_close(x.grad, tensors["grad.x"], atol=1e-5, rtol=1e-5)
    for name, ours in names.items():
        if f"grad.{name}" in tensors:
            torch.testing.assert_close(gate.get_parameter(ours).grad, tensors[f"grad.{name}"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("variant", "per_channel"), [("T", 7), ("B", 9), ("S", 42), ("L", 58)])
def test_counts(variant: str, per_channel: int) -> None:
    assert sum(p.numel() for p in ELAGate(64, variant).parameters()) == per_channel * 64
    assert sum(p.numel() for p in ELAGate(64, variant, shared=False).parameters()) == 2 * per_channel * 64


def test_counts_of_resnet18_of_the_card() -> None:
    model = timm.create_model("resnet18")
    attached = attach(model, dict(type="ELA", variant="B", residual=False))
    assert sum(p.numel() for p in attached.parameters()) == 17_280


def test_rows_and_columns_are_treated_alike() -> None:
    gate, x = ELAGate(32, "B"), torch.randn(2, 32, 7, 5)
    torch.testing.assert_close(gate(x.transpose(2, 3)), gate(x).transpose(2, 3))
    assert ELAGate(32, "B")(torch.randn(1, 32, 9, 1)).shape == (1, 32, 9, 1)


def test_zero_norm_gives_a_quarter_and_scale_passes_through() -> None:
    gate, x = ELAGate(32, "S"), torch.randn(2, 32, 6, 8)
    torch.testing.assert_close(gate(3 * x), 3 * gate(x), atol=1e-4, rtol=1e-3)  # up to the norm's eps
    nn.init.zeros_(gate.gate.norm.weight)
    assert torch.equal(gate(x), 0.25 * x)


def test_samples_do_not_mix() -> None:
    gate, x = ELAGate(32, "B").train(), torch.randn(3, 32, 6, 8)
    other = torch.cat([x[:1], torch.randn(2, 32, 6, 8)])
    assert torch.equal(gate(x)[0], gate(other)[0])


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 64, {}),
        ("mobilenetv2_050", 64, dict(norm_groups=8)),
        ("tf_efficientnet_lite0", 64, dict(norm_groups=8)),
        ("convnext_atto", 64, dict(norm_groups=8)),
        ("vit_tiny_patch16_224", 224, dict(num_prefix_tokens=1)),  # 14 x 14 patches behind a class token
    ],
)
def test_starts_as_the_backbone_and_learns_on_every_family(name: str, size: int, options: dict) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, size, size)
    before = model(x)
    paths = plug_attention(model, dict(type="ELA", where="block", **options))
    assert torch.equal(model(x), before)
    for attached in model._attached.values():
        for parameter in attached.parameters():
            nn.init.normal_(parameter, 0, 0.2)
        after = model(x)
        assert (after - before).abs().max() > 1e-6
        after.square().sum().backward()
        assert all(p.grad is not None for p in attached.parameters())
        assert len(paths) == len(attached.sites)
    if name == "vit_tiny_patch16_224":
        model.requires_grad_(False)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(OptionError, match="divisible by both, got 24"):
        ELAGate(24, "B")
    with pytest.raises(OptionError, match="'X' is unknown"):
        ELAGate(32, "X")
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    plug_attention(model, "ELA")
    with pytest.raises(SiteError, match="197 patch tokens"):
        model(torch.randn(1, 3, 224, 224))
    assert set(VARIANTS) == set("TBSL")
