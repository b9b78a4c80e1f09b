"""DoRA: against peft on linear layers and convolutions, its counts, and the norm that gradients do not pass."""

from __future__ import annotations

import peft
import pytest
import torch
from adapter_checks import MODELS, check_compiles, check_half, check_merge, check_round_trips, check_start, vit
from torch import nn

from zoo.adapters.inject import attach
from zoo.errors import OptionError

CONFIG = dict(type="DoRA", rank=3, alpha=5.0)


def wide_config(name: str) -> dict[str, object]:
    return {**CONFIG, "where": "q, v, out, fc1, fc2, embed" if name == "timm ViT" else "q, v, out, fc1, fc2"}


@pytest.mark.parametrize("name", MODELS)
def test_start(name: str) -> None:
    check_start(MODELS[name], wide_config(name))


@pytest.mark.parametrize("name", MODELS)
def test_save_load_copy_and_detach(name: str) -> None:
    check_round_trips(MODELS[name], wide_config(name))


@pytest.mark.parametrize("name", MODELS)
def test_merge(name: str) -> None:
    check_merge(MODELS[name], wide_config(name))


@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name: str) -> None:
    check_half(MODELS[name], wide_config(name))


def test_compiles_to_one_graph() -> None:
    check_compiles(wide_config("timm ViT"))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (5, 6), "linear"),
    "without bias": (lambda: nn.Linear(6, 8, bias=False), (5, 6), "linear"),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7), "conv"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_are_those_of_peft(kind: str) -> None:
    build, shape, role = LAYERS[kind]
    layer = build()
    ours = nn.Sequential(build())
    ours[0].load_state_dict(layer.state_dict())
    attached = attach(ours, dict(type="DoRA", rank=2, alpha=3.0, where=role), example=torch.zeros(shape))
    theirs = peft.get_peft_model(
        nn.Sequential(layer), peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=3, use_dora=True)
    )
    host = theirs.base_model.model[0]
    adapter = attached.placed[0].adapter
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.rand_like(parameter))
        down, up = host.lora_A["default"].weight, host.lora_B["default"].weight
        magnitude = host.lora_magnitude_vector["default"].weight
        down.copy_(adapter.down.view_as(down))
        up.copy_(adapter.up.view_as(up))
        magnitude.copy_(adapter.magnitude.view_as(magnitude))
    x = torch.randn(shape)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    for mine, other in ((adapter.down, down), (adapter.up, up), (adapter.magnitude, magnitude)):
        torch.testing.assert_close(mine.grad, other.grad.view_as(mine), atol=1e-5, rtol=1e-5)


def test_gradient_through_the_norm_is_optional_and_exact() -> None:
    model = nn.Sequential(nn.Linear(5, 4)).double()
    attached = attach(
        model, dict(type="DoRA", rank=2, detach_norm=False, where="linear"), example=torch.zeros(1, 5).double()
    )
    adapter = attached.placed[0].adapter
    nn.init.normal_(adapter.up)
    parameters = [adapter.down, adapter.up, adapter.magnitude]
    x = torch.randn(3, 5, dtype=torch.float64)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        state = dict(zip(("down", "up", "magnitude"), tensors, strict=True))
        return torch.func.functional_call(model, {f"0.adapters.default.{k}": v for k, v in state.items()}, (x,))

    assert torch.autograd.gradcheck(run, parameters)
    through = torch.autograd.grad(model(x).sin().sum(), adapter.up)[0]
    adapter.detach_norm = True
    assert not torch.allclose(torch.autograd.grad(model(x).sin().sum(), adapter.up)[0], through)


def test_every_adapted_row_has_the_learned_magnitude_and_other_rows_stay() -> None:
    model = vit()
    attached = attach(model, dict(type="DoRA", rank=2, where="q, v"))
    site, adapter = attached.placed[0]
    nn.init.normal_(adapter.up)
    before = site.module._parameters["weight"].detach().clone()
    with torch.no_grad():
        adapter.magnitude.uniform_(1, 2)
        after = adapter.reweight(before)
    assert torch.equal(after[48:96], before[48:96])
    torch.testing.assert_close(torch.cat([after[:48], after[96:]]).norm(dim=1), adapter.magnitude.detach())


def test_a_row_of_zeros_stays_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(model[0].weight[1].detach())
    attached = attach(model, dict(type="DoRA", rank=1, where="linear"), example=torch.zeros(1, 4))
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].weight.isfinite().all() and not model[0].weight[1].any()
    assert all(p.grad.isfinite().all() for p in attached.parameters())


def test_counts_on_vit_base() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    attached = attach(model, dict(type="DoRA", rank=8))
    widths = {
        "q": (768, 768),
        "k": (768, 768),
        "v": (768, 768),
        "out": (768, 768),
        "fc1": (768, 3072),
        "fc2": (3072, 768),
    }
    expected = 12 * sum(o + 8 * (i + o) for i, o in widths.values())
    assert sum(p.numel() for p in attached.parameters()) == expected


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(alpha=0.0), dict(alpha=float("nan")), dict(dropout=0.1)], ids=str)
def test_wrong_options(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        attach(vit(), dict(type="DoRA", **wrong))
