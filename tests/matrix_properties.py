"""What every adapter must keep on every backbone, one function a property.

A property takes a `Pair` and raises `AssertionError` where it fails; it returns False where it does not apply (merging
a method that has no merged form, a non-square image on a fixed grid). A pair that does not fit at all raises
`SiteError` from `attach`. The tests run them all; the compatibility table is printed from the same functions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from matrix_families import FAMILIES, build, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.adapters.base import Site
from zoo.adapters.inject import attach, using
from zoo.errors import SiteError


class Method(NamedTuple):
    """An adapter's config and its closed-form number of parameters at one site (`count`) or in all (`total`)."""

    config: dict[str, Any]
    count: Callable[[Site], int]
    where: Mapping[str, str] = {}  # families where the usual places are not all fit, and the choice that is


class Pair(NamedTuple):
    family: str
    method: str

    def config(self) -> dict[str, Any]:
        method = METHODS[self.method]
        where = method.where.get(self.family)
        return {**method.config, **({} if where is None else {"where": where})}

    def attached(self, seed: int = 1, model: nn.Module | None = None, name: str = "default") -> tuple[nn.Module, Any]:
        """A model with the adapter in its initial state."""
        model = build(self.family) if model is None else model
        torch.manual_seed(seed)
        example = inputs(self.family).to(next(model.parameters()).dtype)
        return model, attach(model, self.config(), name=name, example=example)

    def randomised(self, seed: int = 1, model: nn.Module | None = None, name: str = "default") -> tuple[nn.Module, Any]:
        """A model whose adapter is far from its initial state."""
        model, attached = self.attached(seed, model, name)
        randomise(attached, seed)
        return model, attached

    def sample(self) -> tuple[nn.Module, Any]:
        """A copy of the first randomised model: attaching checks every site, which costs more than copying."""
        model, attached = copy.deepcopy(_first(self))
        return model, attached

    def inputs(self, batch: int = 2) -> Tensor:
        return inputs(self.family, batch)


@functools.cache
def _first(pair: Pair) -> tuple[nn.Module, Any]:
    return pair.randomised()


def bottleneck_count(inputs: int, site: Site, width: int) -> int:
    return inputs * width + width + width * site.out_features + site.out_features


def lora_count(site: Site) -> int:
    rank = 2
    return rank * (len(site.parts) * site.flat_in + sum(part.width for part in site.parts))


def _widths(site: Site) -> int:
    return sum(part.width for part in site.parts)


# SSF cannot shift what a bypassed qkv gives.
NO_QKV = dict.fromkeys(("BEiT", "EVA-02", "Swin-V2"), "!*.qkv")

METHODS: dict[str, Method] = {
    "LoRA": Method(dict(type="LoRA", rank=2), lora_count),
    "DoRA": Method(dict(type="DoRA", rank=2), lambda site: lora_count(site) + _widths(site)),
    "BlockLoRA": Method(
        dict(type="BlockLoRA", rank=4, blocks=2, where="q, v, out, fc1, fc2, conv"),
        lambda site: 2 * len(site.parts) * site.flat_in + 4 * _widths(site),
    ),
    "Hydra": Method(
        dict(type="Hydra", rank=2, scale=0.5),
        lambda site: sum(2 * site.flat_in + 8 * part.width + 4 for part in site.parts),
    ),
    "MoSL": Method(
        dict(type="MoSL", rank=3, experts=2), lambda site: 3 * (len(site.parts) * site.flat_in + _widths(site))
    ),
    "MoSA": Method(
        dict(type="MoSA", width=5, experts=3, dropout=0.0),
        lambda site: bottleneck_count(site.in_features, site, 5) + 2 * site.out_features + 2 * site.in_features,
    ),
    "Houlsby": Method(dict(type="Houlsby", width=5), lambda site: bottleneck_count(site.out_features, site, 5)),
    "Pfeiffer": Method(
        dict(type="Pfeiffer", reduction=8),
        lambda site: bottleneck_count(site.out_features, site, site.out_features // 8),
    ),
    "AdaptFormer": Method(dict(type="AdaptFormer", width=5), lambda site: bottleneck_count(site.in_features, site, 5)),
    "SSF": Method(
        dict(type="SSF"), lambda site: 2 * (sum(part.width for part in site.parts) or site.weight_shape[0]), NO_QKV
    ),
    "VPT deep": Method(dict(type="VPT", tokens=3), lambda site: 3 * site.in_features),
    "VPT shallow": Method(
        dict(type="VPT", tokens=3, deep=False), lambda site: 3 * site.in_features * (site.depth == 0)
    ),
}

# Pairs that do not fit, and the words in which `attach` says why.
_STAGED = ("Swin-V2", "ConvNeXt", "ResNet", "PoolFormer", "SHViT", "HaloNet", "EfficientNet-Lite")
_NO_MLP = ("ResNet", "EfficientNet-Lite", "HaloNet")
UNFIT: dict[Pair, str] = {
    **{Pair(family, "Pfeiffer"): "chooses nothing" for family in _NO_MLP},
    **{Pair(family, "AdaptFormer"): "chooses nothing" for family in _NO_MLP},
    **{Pair(family, "Houlsby"): "chooses nothing" for family in ("ResNet", "EfficientNet-Lite")},
    **{Pair(family, "VPT deep"): "any number of tokens" for family in (*_STAGED, "BEiT", "ConViT")},
    **{Pair(family, "VPT shallow"): "one stack of blocks" for family in _STAGED},
    **{Pair(family, "VPT shallow"): "any number of tokens" for family in ("BEiT", "ConViT")},
    **{Pair(family, "MoSA"): "chooses nothing" for family in _NO_MLP},
    **{Pair(family, "Hydra"): "chooses nothing" for family in _NO_MLP},
    **{Pair(family, "MoSL"): "chooses nothing" for family in ("ResNet", "EfficientNet-Lite", "PoolFormer", "ConvNeXt")},
    **{Pair(family, "MoSL"): "adapts matrices" for family in ("SHViT", "HaloNet")},
    **{Pair(family, "MoSL"): "never called" for family in NO_QKV},
    **{Pair("EVA-02", method): "rotary embedding" for method in ("VPT deep", "VPT shallow")},
}


# torch picks attention and convolution kernels by `requires_grad` and by memory layout; they sum in another order.
ROUNDING = 2e-6


def identity_at_init(pair: Pair) -> bool:
    base, x = build(pair.family), pair.inputs()
    model, attached = pair.attached()
    if not all(placed.adapter.identity for placed in attached.placed):
        return False
    assert distance(run(model, x), run(base, x)) <= ROUNDING
    return True


def base_untouched(pair: Pair) -> bool:
    """Keys and values of the base stay bit for bit, also through a training step in training mode."""
    before = {key: tensor.clone() for key, tensor in build(pair.family).state_dict().items()}
    model, attached = pair.randomised()
    assert [key for key in model.state_dict() if key not in attached.state_dict()] == [*before]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in attached.parameters()}
    loss(model, pair.inputs()).backward()
    torch.optim.SGD(trained, 0.1).step()
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    return True


def load_before_is_load_after(pair: Pair) -> bool:
    first, attached = pair.sample()
    second, late = pair.randomised(model=build(pair.family, seed=5))
    missing, unexpected = second.load_state_dict(build(pair.family).state_dict(), strict=False)
    assert set(missing) == set(late.state_dict()) and not unexpected
    late.load_state_dict(attached.state_dict())
    assert torch.equal(run(first, pair.inputs()), run(second, pair.inputs()))
    return True


def gradient_everywhere(pair: Pair) -> bool:
    model, attached = pair.sample()
    loss(model, pair.inputs()).backward()
    for name, parameter in attached.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        assert parameter.grad.isfinite().all() and parameter.grad.any(), f"{name} got a zero or infinite gradient"
    return True


def merge_is_exact(pair: Pair) -> bool:
    base, x = build(pair.family), pair.inputs()
    model, attached = pair.randomised()
    if not all(placed.adapter.mergeable for placed in attached.placed):
        with pytest.raises(SiteError, match="no merged form"):
            attached.merge()
        return False
    adapted = run(model, x)
    assert distance(adapted, run(base, x)) > 1e-3
    attached.merge()
    assert distance(run(model, x), adapted) <= 1e-5
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    with pytest.raises(SiteError, match="already"):
        attached.merge()
    attached.unmerge()
    same_weights(model, base, attached)
    assert torch.equal(run(model, x), adapted)
    return True


def detach_restores(pair: Pair) -> bool:
    base, x = build(pair.family), pair.inputs()
    model, attached = pair.randomised()
    attached.detach()
    assert [*model.state_dict()] == [*base.state_dict()]
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    assert torch.equal(run(model, x), run(base, x))
    return True


def closed_form_count(pair: Pair) -> bool:
    _, attached = pair.attached()
    expected = sum(METHODS[pair.method].count(site) for site in attached.sites)
    assert sum(parameter.numel() for parameter in attached.parameters()) == expected
    return True


def save_then_load(pair: Pair) -> bool:
    model, attached = pair.sample()
    other, empty = pair.attached(seed=9)
    with TemporaryDirectory() as folder:
        file = Path(folder, "adapter.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in attached.state_dict().items()}, file)
        empty.load_state_dict(load_file(file))
    assert torch.equal(run(model, pair.inputs()), run(other, pair.inputs()))
    return True


def deepcopy_independent(pair: Pair) -> bool:
    x = pair.inputs()
    model, _ = pair.randomised()
    adapted = run(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, x), adapted)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    assert torch.equal(run(model, x), adapted) and not torch.equal(run(twin, x), adapted)
    return True


def compiles(pair: Pair) -> bool:
    """One graph without breaks, with the eager result and the eager gradients."""
    model, attached = pair.sample()
    x = pair.inputs()
    adapted = run(model, x)
    loss(model, x).backward()
    eager = [parameter.grad.clone() for parameter in attached.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    y = first(torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(x))
    assert distance(y.detach(), adapted) <= 1e-5
    direction(y).backward()
    for gradient, (name, parameter) in zip(eager, attached.named_parameters(), strict=True):
        assert distance(parameter.grad, gradient) <= 1e-4, name  # sums of mixed signs cancel
    return True


def exports(pair: Pair) -> bool:
    model, _ = pair.sample()
    x = pair.inputs()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert distance(first(program.module()(x)), run(model, x)) <= 1e-5
    return True


def two_adapters(pair: Pair) -> bool:
    """Each alone, both and none, on a model that gets its second adapter while it runs the first."""
    x = pair.inputs()
    plain = run(build(pair.family), x)
    model, _ = pair.sample()
    alone = {"default": run(model, x), "b": run(pair.randomised(2, name="b")[0], x)}
    pair.randomised(2, model=model, name="b")
    both = run(model, x)
    for name, expected in alone.items():
        with using(model, name):
            assert distance(run(model, x), expected) <= ROUNDING
    with using(model):
        assert distance(run(model, x), plain) <= ROUNDING
    with using(model, "default", "b"):
        assert torch.equal(run(model, x), both)
    for other in (plain, *alone.values()):
        assert distance(both, other) > 1e-4
    return True


def bf16_finite(pair: Pair) -> bool:
    model = build(pair.family).bfloat16()
    model, attached = pair.randomised(model=model)
    y = first(model(pair.inputs().bfloat16()))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    y.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in attached.parameters())
    return True


def batch_of_one(pair: Pair) -> bool:
    model, _ = pair.sample()
    x = pair.inputs()
    assert distance(run(model, x[:1]), run(model, x)[:1]) <= 1e-5
    return True


def oblong_images(pair: Pair) -> bool:
    size = FAMILIES[pair.family].oblong
    if size is None:
        return False
    model, _ = pair.sample()
    x = inputs(pair.family, 1, size)
    with using(model):
        plain = run(model, x)
    adapted = run(model, x)
    assert adapted.shape == plain.shape and adapted.isfinite().all() and distance(adapted, plain) > 1e-4
    return True


PROPERTIES: dict[str, Callable[[Pair], bool]] = {
    "identity at init": identity_at_init,
    "base untouched": base_untouched,
    "load before = after": load_before_is_load_after,
    "gradient everywhere": gradient_everywhere,
    "merge": merge_is_exact,
    "detach": detach_restores,
    "closed-form count": closed_form_count,
    "save and load": save_then_load,
    "deepcopy": deepcopy_independent,
    "compile": compiles,
    "export": exports,
    "two adapters": two_adapters,
    "bf16": bf16_finite,
    "batch 1": batch_of_one,
    "non-square": oblong_images,
}


def outcome(name: str, pair: Pair) -> str:
    """One cell of the compatibility table: "yes", "-" where the property does not apply, "FAILS" with the reason."""
    try:
        return "yes" if PROPERTIES[name](pair) else "-"
    except Exception as error:  # a table shows what is broken instead of stopping there
        return f"FAILS ({type(error).__name__})"


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return first(model(x))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return direction(first(model(x)))


def direction(y: Tensor) -> Tensor:
    """A fixed random projection of the output, so that no gradient cancels by symmetry."""
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    scale = b.abs().max().item()
    return (a - b).abs().max().item() / (scale or 1.0)


def randomise(attached: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def same_weights(model: nn.Module, base: nn.Module, attached: Any) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.state_dict().items())
    assert set(state) == {*base.state_dict(), *attached.state_dict()}
