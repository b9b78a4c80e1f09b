"""The q, k and v rows of every family's projections, proven on the attention's own arithmetic.

A nudge of some rows of a projection's output tells what they are. Values enter attention linearly (or, behind a
nonlinearity, one value row reaches one channel only), queries and keys do not. A query's nudge at one token shows only
there, or in one channel for channel attention; a key's shows everywhere, and one shift for all keys shows nowhere under
softmax.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from site_families import FAMILIES, family
from torch import Tensor, nn

from zoo.adapters.base import Part, Site
from zoo.adapters.probe import derive_example
from zoo.adapters.sites import find_sites, select


class _Captured(Exception):
    pass


def _first_call(model: nn.Module, owner: nn.Module, example: object) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments `owner` is called with in a forward pass of `model`."""
    found: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def stop(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        found.append((args, kwargs))
        raise _Captured

    handle = owner.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(*example) if isinstance(example, tuple) else model(example)
    except _Captured:
        pass
    finally:
        handle.remove()
    return found[0]


class _Lens:
    """Runs one attention module, nudges a projection's output, and sees what reaches the output projection."""

    def __init__(self, owner: nn.Module, out: Site | None, call: tuple[tuple[object, ...], dict[str, object]]) -> None:
        self.owner, self.out, self.call = owner, out, call

    def see(self, site: Site, nudge: Callable[[Tensor], Tensor]) -> Tensor:
        """(positions, channels) in front of the output projection."""
        target = site.module._parameters[site.weight]
        last = None if self.out is None else self.out.module._parameters["weight"]
        seen: list[Tensor] = []
        hits: list[int] = []

        def watch(real: Callable[..., Tensor], dim: int) -> Callable[..., Tensor]:
            def run(x: Tensor, *args: object, **kwargs: object) -> Tensor:
                weight = kwargs.get("weight", args[0] if args else None)
                if weight is last and last is not None:
                    seen.append(x.detach().movedim(dim, -1).flatten(0, -2))
                y = real(x, *args, **kwargs)
                if weight is not target:
                    return y
                hits.append(1)
                moved = y.detach().movedim(dim, -1)
                return nudge(moved.flatten(0, -2).clone()).reshape(moved.shape).movedim(-1, dim)

            return run

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", watch(F.linear, -1))
            patch.setattr(F, "conv2d", watch(F.conv2d, 1))
            args, kwargs = self.call
            result = self.owner(*args, **kwargs)
        assert hits, f"{site.path} was not used"
        return seen[0] if seen else result.detach().movedim(1, -1).flatten(0, -2)

    def study(self, site: Site, part: Part) -> dict[str, float | bool]:
        rows = torch.cat([torch.arange(start, stop) for start, stop in part.rows])
        noise = torch.randn(len(rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def one_token(scale: float) -> Callable[[Tensor], Tensor]:
            return lambda y: y.index_put((torch.zeros_like(rows), rows), scale * noise, accumulate=True)

        base = self.see(site, lambda y: y)
        plus, minus = self.see(site, one_token(1.0)), self.see(site, one_token(-1.0))
        shifted = self.see(site, lambda y: y.index_add(1, rows, noise.expand(len(y), -1)))
        ramp = torch.linspace(-1, 1, 97, dtype=torch.float64)
        row = self.see(site, lambda y: y.index_add(1, rows[:1], ramp.repeat(len(y) // 97 + 1)[: len(y), None]))
        unit = base.abs().max()
        return {
            "affine": bool((plus + minus - 2 * base).abs().max() < 1e-4 * (plus - base).abs().max()),
            "tokens": int(((plus - base).abs().amax(1) > 1e-9 * unit).sum()),
            "channels": int(((row - base).abs().amax(0) > 1e-9 * unit).sum()),
            "shift_free": bool((shifted - base).abs().max() < 1e-9 * unit),
        }


def _prepared(name: str) -> tuple[nn.Module, object]:
    """A float64 copy with generic weights, and an input of noise."""
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(family(name)).double()
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise * (0.9 * fan_in**-0.5 if parameter.ndim > 1 else 0.3)
    for module in model.modules():
        if hasattr(module, "norm_v"):  # MViTv2 normalises the pooled values: it would hide that they enter linearly
            module.norm_v = nn.Identity()
    example = torch.zeros(2, 5, 32) if name == "encoder_layer" else derive_example(model)
    if isinstance(example, tuple):
        image, text = example
        text = torch.randint(1, 60, text.shape, generator=generator)
        return model, (torch.randn(image.shape, generator=generator, dtype=torch.float64), text)
    return model, torch.randn(example.shape, generator=generator, dtype=torch.float64)


ATTENTIVE = [
    name
    for name in FAMILIES
    if name
    not in {
        "poolformer", "convnext", "resnet18", "efficientnet_lite0", "mobilenetv2", "mixer",  # no attention
        "vit_parallel",  # the block is its own attention module; tested below
        "mobilevitv2",  # separable attention: keys enter linearly; its split is 1, d, d
    }
]  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIVE)
def test_parts_are_what_they_are_called(name: str) -> None:
    model, example = _prepared(name)
    sites = find_sites(model)
    studied: set[tuple[type, int]] = set()
    for owner in (site for site in sites if site.role == "attn"):
        inside = [site for site in sites if site.path == owner.path or site.path.startswith(owner.path + ".")]
        inputs = [site for site in inside if site.parts and all(part.role in ("q", "k", "v") for part in site.parts)]
        kind = (type(owner.module), len(inputs))
        if kind in studied:
            continue
        studied.add(kind)
        out = next((site for site in inside if site.role == "out"), None)
        lens = _Lens(owner.module, out, _first_call(model, owner.module, example))
        found = {part.role: lens.study(site, part) for site in inputs for part in site.parts}
        assert set(found) == {"q", "k", "v"}, owner.path
        query, key, value = found["q"], found["k"], found["v"]
        where = f"{owner.path}: {found}"
        assert value["affine"] or (value["channels"] == 1 < key["channels"]), where
        assert not key["affine"], where
        told_apart = query["tokens"] < key["tokens"] or query["channels"] < key["channels"]
        assert told_apart or (key["shift_free"] and not query["shift_free"]), where
    assert studied


def test_parallel_block_parts_follow_its_split() -> None:
    block = family("vit_parallel").blocks[0]
    (site,) = select(find_sites(block), "qkv,fc1", (), model_name="block")
    assert [part.role for part in site.parts] == ["qkv", "fc1"]
    assert site.parts[1].rows == ((0, block.in_split[0]),)
    assert site.parts[0].rows == ((block.in_split[0], block.in_proj.out_features),)


def test_interleaved_rows() -> None:
    attention = family("levit").stages[0].blocks[0].attn
    site = next(site for site in find_sites(attention) if site.role == "qkv")
    step = 2 * attention.key_dim + attention.val_dim
    assert site.parts[0].rows == tuple((h * step, h * step + attention.key_dim) for h in range(attention.num_heads))
    (whole,) = select([site], "qkv", (), model_name="attention")
    assert whole.parts == (Part("qkv", ((0, step * attention.num_heads),)),)
