"""Hydra: the authors' tensors, the merge formula, counts, and what it must refuse."""

from __future__ import annotations

import pytest
import timm
import torch
from adapter_checks import MODELS, check_compiles, check_half, check_merge, check_round_trips, check_start, golden, vit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from zoo.adapters.attached import Attached
from zoo.adapters.inject import attach
from zoo.errors import OptionError, SiteError

CONFIG = dict(type="Hydra", rank=3, scale=0.7)
WHERE = {"timm ViT": "q, v, out, fc2, embed", "open_clip CLIP": "q, v, out, fc2"}  # q and v: parts of a fused weight


def config(name: str) -> dict[str, object]:
    return {**CONFIG, "where": WHERE[name]}


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


def test_compiles_to_one_graph() -> None:
    check_compiles({**config("timm ViT"), "dropout": 0.1})


def test_golden_elevater_mlp() -> None:
    tensors, about = golden("hydra/elevater_hydramlp")
    options = about["config"]
    model = nn.Sequential(nn.Linear(options["in_channel"], options["out_channel"]))
    names = {
        key.removeprefix("param.linear."): value for key, value in tensors.items() if key.startswith("param.linear")
    }
    model[0].load_state_dict(names)
    settings = dict(type="Hydra", rank=options["bottleneck"], scale=options["scale"], where="linear")
    attached = attach(model, settings, example=torch.zeros(1, options["in_channel"]))
    load_branches(attached, 0, tensors, "param.adapter_par", "param.adapter_seq")
    x = tensors["in.x"].requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, tensors["out.y"], atol=1e-5, rtol=1e-5)
    (y * tensors["in.cotangent"] if "in.cotangent" in tensors else y).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad.x"], atol=1e-5, rtol=1e-5)
    compare_gradients(attached, 0, tensors, "grad.adapter_par", "grad.adapter_seq")
    attached.merge()
    torch.testing.assert_close(model[0].weight, tensors["out.merged.weight"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model[0].bias, tensors["out.merged.bias"], atol=1e-5, rtol=1e-5)


def test_golden_vit_with_both_places() -> None:
    tensors, about = golden("hydra/vtab_vit_both")
    options = about["config"]
    base = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.") and "hydra" not in k}
    model = VisionTransformer(
        img_size=(32, 48), patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=5
    ).eval()
    model.load_state_dict(base)
    settings = dict(type="Hydra", rank=options["hydra_dim"], scale=options["scale"], dropout=options["dropout"])
    attached = attach(model, settings, example=tensors["in.x"])
    places = ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc2"]
    assert [site.path for site in attached.sites] == places
    prefixes = [p.replace(".proj", ".hydra_proj").replace(".fc2", ".hydra_mlp") for p in places]
    for i, prefix in enumerate(prefixes):
        load_branches(attached, i, tensors, f"param.{prefix}_par", f"param.{prefix}_seq")
    tokens = tensors["in.tokens"]
    torch.testing.assert_close(model.blocks[0].attn(tokens), tensors["out.block0_attn"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.blocks[0].mlp(tokens), tensors["out.block0_mlp"], atol=1e-5, rtol=1e-5)
    logits = model(tensors["in.x"])
    torch.testing.assert_close(logits, tensors["out.logits"], atol=1e-5, rtol=1e-5)
    (logits * tensors["in.cotangent"]).sum().backward()
    for i, prefix in enumerate(prefixes):
        compare_gradients(attached, i, tensors, f"grad.{prefix}_par", f"grad.{prefix}_seq")
    attached.merge()
    for path in places:
        module = model.get_submodule(path)
        torch.testing.assert_close(module.weight, tensors[f"out.merged.{path}.weight"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module.bias, tensors[f"out.merged.{path}.bias"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(tensors["in.x"]), tensors["out.logits"], atol=1e-5, rtol=1e-5)


def load_branches(attached: Attached, index: int, tensors: dict[str, torch.Tensor], parallel: str, serial: str) -> None:
    adapter = attached.placed[index].adapter
    for head, prefix in ((adapter.parallel[0], parallel), (adapter.sequential[0], serial)):
        head.load_state_dict(
            {
                f"{ours}.{kind}": tensors[f"{prefix}.{ours}_proj.{kind}"]
                for ours in ("down", "up")
                for kind in ("weight", "bias")
            }
        )


def compare_gradients(
    attached: Attached, index: int, tensors: dict[str, torch.Tensor], parallel: str, serial: str
) -> None:
    adapter = attached.placed[index].adapter
    for head, prefix in ((adapter.parallel[0], parallel), (adapter.sequential[0], serial)):
        for name, parameter in head.named_parameters():
            expected = tensors[f"{prefix}.{name.replace('.', '_proj.')}"]
            torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (5, 6)),
    "1x1 convolution": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 4)),
    "strided convolution without bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 7, 7)),
    "convolution over one axis": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same"), (2, 4, 9)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("kind", LAYERS)
def test_merge_creates_a_bias_only_where_it_needs_one(kind: str, bias: bool) -> None:
    build, shape = LAYERS[kind]
    model = nn.Sequential(build())
    x = torch.randn(shape)
    plain, had_bias = model(x), model[0].bias is not None
    settings = dict(type="Hydra", rank=2, seq_rank=3, scale=1.7, bias=bias, where="linear" if x.dim() == 2 else "conv")
    attached = attach(model, settings, example=x)
    torch.testing.assert_close(model(x), plain)
    for parameter in attached.parameters():
        nn.init.normal_(parameter)
    expected = model(x)
    weight = model[0].weight.detach().clone()
    attached.merge()
    assert (model[0].bias is not None) == (had_bias or bias)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-5)
    change = (model[0].weight - weight).flatten(1)
    assert torch.linalg.matrix_rank(change) <= 2 + 3
    attached.unmerge()
    assert (model[0].bias is not None) == had_bias and torch.equal(model(x), expected)


def test_without_its_sequential_branch_it_is_lora() -> None:
    hydra, lora = vit(), vit()
    first = attach(hydra, dict(type="Hydra", rank=4, scale=0.5, bias=False, where="q, v, fc2"))
    second = attach(lora, dict(type="LoRA", rank=4, alpha=2, where="q, v, fc2"))
    for a, b in zip(first.placed, second.placed, strict=True):
        for head in a.adapter.parallel:
            nn.init.normal_(head.up.weight)
        with torch.no_grad():
            b.adapter.down.copy_(torch.cat([head.down.weight for head in a.adapter.parallel]))
            b.adapter.up.copy_(torch.cat([head.up.weight for head in a.adapter.parallel]))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(hydra(x), lora(x), atol=1e-5, rtol=1e-5)


def test_sequential_branch_reads_the_frozen_output_alone_and_passes_gradient_to_the_input() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attached = attach(model, dict(type="Hydra", rank=2, where="linear"), example=torch.zeros(1, 4))
    adapter = attached.placed[0].adapter
    nn.init.normal_(adapter.parallel[0].up.weight)
    nn.init.normal_(adapter.sequential[0].up.weight)
    x = torch.randn(3, 4, requires_grad=True)
    y0 = nn.functional.linear(x, model[0].weight, model[0].bias)
    expected = y0 + adapter.parallel[0](x) + adapter.sequential[0](y0)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (model(x), expected)))


def test_dropout_only_while_training() -> None:
    model = vit()
    attached = attach(model, dict(type="Hydra", dropout=0.5))
    for parameter in attached.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_released_count_on_vit_base() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    attached = attach(model, "Hydra")
    assert sum(p.numel() for p in attached.parameters()) == 239_712
    by_place = {row["path"].split(".", 2)[2]: row["params"] for row in attached.table()}
    assert by_place == {"attn.proj": 3842 + 3842, "mlp.fc2": 8450 + 3842}


@pytest.mark.parametrize(
    "wrong",
    [dict(rank=0), dict(seq_rank=-1), dict(scale=0.0), dict(dropout=1.0), dict(init="xaver"), dict(width=3)],
    ids=str,
)
def test_wrong_options(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        attach(vit(), dict(type="Hydra", **wrong))


def test_grouped_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(SiteError, match="groups=1"):
        attach(model, dict(type="Hydra", where="conv"), example=torch.zeros(1, 4, 5, 5))


def test_bypassed_layers_are_refused() -> None:
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2)
    with pytest.raises(SiteError, match="never called"):
        attach(beit, dict(type="Hydra", where="q"))
