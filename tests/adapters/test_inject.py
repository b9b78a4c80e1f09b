"""Attach, switch, merge, detach: what holds for every adapter, shown with LoRA and small models."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from torch import nn

from zoo.adapters.base import Adapter, Site
from zoo.adapters.host import Host
from zoo.adapters.inject import activate, attach, attachments, detach, merge, unmerge, using
from zoo.errors import OptionError, SiteError, UnknownNameError
from zoo.registry import ADAPTERS


def vit(**options: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=4, img_size=64, **options).eval()


def randomised(attached: object) -> object:
    for parameter in attached.parameters():  # type: ignore[attr-defined]
        nn.init.normal_(parameter, 0, 0.05)
    return attached


IMAGE = torch.randn(2, 3, 64, 64)


@ADAPTERS.register_module(name="SharedScaleForTests")
class SharedScale(Adapter):
    """A gain per channel from one vector that all sites share: the smallest method that needs a bank."""

    roles = frozenset({"fc1", "fc2"})
    default_roles = ("fc1",)

    def __init__(self, site: Site, *, bank: nn.Module) -> None:
        super().__init__(site)
        self.gate = nn.Parameter(torch.zeros(1))

    @classmethod
    def bank(cls, sites: object, **options: object) -> nn.Module:
        shared = nn.Module()
        shared.gain = nn.Parameter(torch.ones(1))
        return shared

    def after(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * (1 + self.gate * self._bank[0].gain)


def test_each_both_none() -> None:
    model = vit()
    plain = model(IMAGE)
    randomised(attach(model, "LoRA", name="a"))
    only_a = model(IMAGE)
    randomised(attach(model, dict(type="LoRA", where="fc1"), name="b"))
    both = model(IMAGE)
    assert (both - only_a).abs().max() > 1e-4
    with using(model, "b"):
        only_b = model(IMAGE)
        with using(model):
            assert torch.equal(model(IMAGE), plain)
        assert torch.equal(model(IMAGE), only_b)
    assert torch.equal(model(IMAGE), both)
    activate(model, "a")
    assert torch.equal(model(IMAGE), only_a)
    activate(model, "a", "b")
    assert torch.equal(model(IMAGE), both)


def test_using_restores_after_an_error() -> None:
    model = vit()
    randomised(attach(model, "LoRA"))
    before = model(IMAGE)
    with pytest.raises(RuntimeError, match="inside"), using(model):
        raise RuntimeError("inside")
    assert torch.equal(model(IMAGE), before)


def test_detach_leaves_no_trace() -> None:
    model = vit()
    model.blocks[0].requires_grad_(False)
    reference = copy.deepcopy(model)
    randomised(attach(model, "LoRA"))
    randomised(attach(model, dict(type="LoRA", where="qkv"), name="b"))
    detach(model, "default")
    assert list(attachments(model)) == ["b"]
    detach(model)
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in reference.parameters()]
    assert torch.equal(model(IMAGE), reference(IMAGE))
    assert not any(name.startswith("_") and "host" in name for m in model.modules() for name in m.__dict__)


def test_merge_is_exact_to_undo_and_refuses_a_second_time() -> None:
    model = vit()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    randomised(attach(model, "LoRA"))
    out = model(IMAGE)
    merge(model)
    assert not any(isinstance(m, Host) for m in model.modules())
    assert model.state_dict().keys() == weights.keys()
    torch.testing.assert_close(model(IMAGE), out, atol=1e-5, rtol=1e-5)
    with pytest.raises(SiteError, match="merged already"):
        merge(model)
    with pytest.raises(SiteError, match="unmerge it"):
        activate(model)
    unmerge(model)
    assert torch.equal(model(IMAGE), out)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


def test_freezes_the_base_and_nothing_else() -> None:
    model = vit()
    first = attach(model, "LoRA")
    second = attach(model, dict(type="LoRA", where="fc1"), name="b")
    adapters = {id(p) for a in (first, second) for p in a.parameters()}
    assert all(p.requires_grad == (id(p) in adapters) for p in model.parameters())


def test_state_dict_round_trip_and_mismatch() -> None:
    model, other = vit(), vit()
    other.load_state_dict(model.state_dict())
    trained = randomised(attach(model, "LoRA"))
    fresh = attach(other, "LoRA")
    assert all(".adapters.default." in key for key in trained.state_dict())
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(other(IMAGE), model(IMAGE))
    wrong = attach(vit(), dict(type="LoRA", rank=4))
    with pytest.raises(SiteError, match=r"\(8, 192\) for \(4, 192\)"):
        wrong.load_state_dict(trained.state_dict())


def test_base_checkpoint_loads_after_attaching() -> None:
    source, model = vit(), vit()
    attach(model, "LoRA")
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected and all(".adapters." in key for key in missing)
    assert torch.equal(model(IMAGE), source(IMAGE))


def test_per_site_options() -> None:
    model = vit()
    options = {"fc1": dict(rank=2), "blocks.1.*": dict(alpha=32), "blocks.0.attn.proj": None}
    attached = attach(model, dict(type="LoRA", rank=4, per_site=options))
    found = {placed.site.path: placed.adapter for placed in attached.placed}
    assert "blocks.0.attn.proj" not in found and "blocks.1.attn.proj" in found
    assert found["blocks.0.mlp.fc1"].rank == 2 and found["blocks.0.mlp.fc2"].rank == 4
    assert found["blocks.1.mlp.fc1"].alpha == 32 and found["blocks.0.mlp.fc1"].alpha == 2
    assert found["blocks.1.mlp.fc1"].rank == 2


def test_bank_is_owned_once_shared_copied_and_removed() -> None:
    model = vit()
    attached = attach(model, "SharedScaleForTests")
    keys = [k for k in model.state_dict() if "adapter" in k]
    assert sum(k.startswith("adapter_banks.default") for k in keys) == 1 and len(keys) == 3
    randomised(attached)
    out = model(IMAGE)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IMAGE), out)
    with torch.no_grad():
        twin.adapter_banks["default"].gain.add_(5.0)
    assert torch.equal(model(IMAGE), out) and not torch.equal(twin(IMAGE), out)
    model(IMAGE).sum().backward()
    assert model.adapter_banks["default"].gain.grad is not None
    attached.detach()
    assert not hasattr(model, "adapter_banks")


def test_copies_and_pickles_are_independent() -> None:
    model = vit()
    randomised(attach(model, "LoRA"))
    out = model(IMAGE)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):  # our own bytes, written above
        assert torch.equal(twin(IMAGE), out)
        for parameter in attachments(twin)["default"].parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(model(IMAGE), out)
        detach(twin)
        assert not any(isinstance(m, Host) for m in twin.modules())


@pytest.mark.parametrize("grad", [True, False])
def test_fullgraph_compile_and_export_equal_eager(grad: bool) -> None:
    model = vit()
    randomised(attach(model, dict(type="LoRA", where="q,v,out,fc1,fc2")))
    with torch.set_grad_enabled(grad):
        out = model(IMAGE)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(IMAGE), out)
        torch.testing.assert_close(torch.export.export(model, (IMAGE,)).module()(IMAGE), out)


def test_transformer_encoder_layer_is_adapted_in_its_fast_path_too() -> None:
    """In eval without gradients torch runs a fused kernel that reads the weights and calls no submodule."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    attached = randomised(attach(layer, "LoRA", example=x))
    merged = copy.deepcopy(layer)
    merge(merged)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), merged(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x), merged(x), atol=1e-5, rtol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attached.parameters())


def test_a_weight_that_nothing_reads_is_an_error() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(SiteError, match="idle"):
        attach(Unused(), dict(type="LoRA", where="linear"), example=torch.randn(2, 4))


@pytest.mark.parametrize(
    ("adapter", "options", "error", "words"),
    [
        ("Lora_", {}, UnknownNameError, "did you mean 'LoRA'"),
        (dict(rank=4), {}, OptionError, "has no `type`"),
        ("LoRA", dict(where="fc3"), SiteError, "fc3"),
        ("LoRA", dict(where="block"), SiteError, "LoRA cannot sit on 'blocks.0', a block site"),
        ("LoRA", dict(name="a.b"), OptionError, "identifier"),
        ("LoRA", dict(per_site={"nowhere.*": dict(rank=2)}), SiteError, "fits no chosen site"),
        (dict(type="os.system", command="true"), {}, UnknownNameError, "no adapter is called 'os.system'"),
    ],
    ids=str,
)
def test_refusals_leave_the_model_untouched(adapter: object, options: dict, error: type, words: str) -> None:
    model = vit()
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=words):
        attach(model, adapter, **options)
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == flags
    assert not attachments(model) and not any(isinstance(m, Host) for m in model.modules())


def test_names_must_be_known_and_new() -> None:
    model = vit()
    with pytest.raises(SiteError, match="no adapter attached"):
        merge(model)
    attach(model, "LoRA", name="first")
    with pytest.raises(OptionError, match="attached already"):
        attach(model, "LoRA", name="first")
    with pytest.raises(UnknownNameError, match="did you mean 'first'"):
        detach(model, "frist")
