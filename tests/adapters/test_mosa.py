"""MoSA and MoSL: masks, the authors' tensors, what trains under SGD, averaging, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from adapter_checks import (
    MODELS,
    check_compiles,
    check_half,
    check_merge,
    check_round_trips,
    check_start,
    golden,
    run,
    shake,
    vit,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo.adapters import sparse_experts
from zoo.adapters.attached import Attached
from zoo.adapters.inject import attach
from zoo.adapters.sparse_experts import ExpertLayer, Split, expert_owner, merge_experts
from zoo.errors import OptionError, SiteError

CONFIGS: dict[str, dict[str, Any]] = {
    "MoSA": dict(type="MoSA", width=6, experts=3),
    "Pfeiffer": dict(type="MoSAPfeiffer", width=6, experts=3, share="up"),
    "Houlsby": dict(type="MoSAHoulsby", width=6, experts=3, share="none", split_bias=True),
    "MoSL": dict(type="MoSL", rank=4, experts=3, share="none", scale=0.7),
    "learned scale, no norm": dict(type="MoSA", width=6, scale=None, norm=False, along="row"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


@every_model
@every_config
def test_start(build: Callable[..., nn.Module], config: dict[str, Any]) -> None:
    check_start(build, config)


@every_model
@every_config
def test_save_load_copy_and_detach(build: Callable[..., nn.Module], config: dict[str, Any]) -> None:
    check_round_trips(build, config)


@every_config
def test_half_precision(config: dict[str, Any]) -> None:
    check_half(vit, config)


@pytest.mark.parametrize("config", [CONFIGS["MoSA"], CONFIGS["MoSL"]], ids=["MoSA", "MoSL"])
def test_random_training_forward_compiles_to_one_graph(config: dict[str, Any]) -> None:
    check_compiles(config)


@every_model
def test_mosl_merges_its_means(build: Callable[..., nn.Module]) -> None:
    check_merge(build, {**CONFIGS["MoSL"], "where": "q, v, out, fc1"})


@pytest.mark.parametrize("along", ["all", "row", "column"])
@pytest.mark.parametrize("case", ["16x24_n4", "6x10_n3", "7x5_n4"])
def test_golden_masks(case: str, along: sparse_experts.Along) -> None:
    tensors, _ = golden("mosa/masks")
    experts = int(case[-1])
    owner = expert_owner(tensors[f"in.score_{case}"], experts, along)
    masks = torch.stack([owner == i for i in range(experts)])
    assert torch.equal(masks, tensors[f"out.masks_{along}_{case}"].bool())


def test_golden_mask_of_a_split_bias() -> None:
    tensors, _ = golden("mosa/masks")
    owner = expert_owner(tensors["in.score_bias13"], 4)
    assert torch.equal(torch.stack([owner == i for i in range(4)]), tensors["out.masks_bias13_n4_splitbias"].bool())
    assert owner.bincount().tolist() == [3, 3, 3, 4]  # int(13 i / 4): 3, 6, 9, 13


def block_model(tensors: dict[str, Tensor], about: dict[str, Any], fold_norm: bool) -> nn.Module:
    """A ViT whose one block is the reference's; `fold_norm` moves norm2's affine part into fc1."""
    options = about["config"]
    width, hidden = options["hidden"], options["mlp_dim"]
    model = VisionTransformer(
        img_size=32,
        embed_dim=width,
        depth=1,
        num_heads=options["heads"],
        mlp_ratio=(hidden + 0.5) / width,
        num_classes=2,
    ).eval()
    block = model.blocks[0]
    names = dict(norm1="attention_norm", norm2="ffn_norm")
    names |= {"attn.proj": "attn.out", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
    state = {f"{a}.{k}": tensors[f"param.{b}.{k}"] for a, b in names.items() for k in ("weight", "bias")}
    for k in ("weight", "bias"):
        state[f"attn.qkv.{k}"] = torch.cat([tensors[f"param.attn.{p}.{k}"] for p in ("query", "key", "value")])
    if fold_norm:
        gain, shift = state["norm2.weight"], state["norm2.bias"]
        state["mlp.fc1.bias"] = state["mlp.fc1.bias"] + state["mlp.fc1.weight"] @ shift
        state["mlp.fc1.weight"] = state["mlp.fc1.weight"] * gain
        state["norm2.weight"], state["norm2.bias"] = torch.ones_like(gain), torch.zeros_like(shift)
    block.load_state_dict(state)
    return model


def fix_expert(layer: ExpertLayer, half: str, index: int, tensors: dict[str, Tensor]) -> None:
    """Give expert `index` the reference's values and mask, and let every forward draw it."""
    owned = tensors[f"in.mask.adapter_{half}.{index}.weight"].bool()
    with torch.no_grad():
        weight = tensors[f"param.adapter_{half}.{index}.weight"]
        layer.weight.value.copy_(torch.where(owned, weight, torch.nan))  # what the expert does not own is never read
        layer.weight.start.copy_(torch.where(owned, torch.nan, weight))
        layer.weight.owner.copy_(torch.where(owned, index, (index + 1) % layer.experts))
        for i in range(layer.experts):
            layer.bias.value[i].copy_(tensors[f"param.adapter_{half}.{i}.bias"])


CASES = {
    "adaptformer_down_e4": dict(type="MoSA", width=6, experts=4, share="down", dropout=0.0),
    "pfeiffer_up_e3": dict(type="MoSAPfeiffer", width=7, experts=3, share="up"),
}


@pytest.mark.parametrize("case", CASES)
def test_golden_block(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, about = golden(f"mosa/{case}")
    config, first, second = CASES[case], *about["train_indices"]["values"]
    shared = config["share"]
    half, index = ("up", second) if shared == "down" else ("down", first)
    model = block_model(tensors, about, fold_norm=config["type"] == "MoSA")
    adapter: Any = attach(model, config).placed[0].adapter
    whole, split = getattr(adapter.bottleneck, shared), getattr(adapter.bottleneck, half)
    for module, name in ((adapter.norm, "norm"), (whole, shared)):
        module.load_state_dict({k: tensors[f"param.adapter_{name}.{k}"] for k in ("weight", "bias")})
    fix_expert(split, half, index, tensors)
    monkeypatch.setattr(sparse_experts, "draw", lambda experts, device: torch.tensor(index))
    x = tensors["in.x"].requires_grad_()
    model.train()
    out = model.blocks[0](x)
    torch.testing.assert_close(out, tensors["out.train"], atol=1e-5, rtol=1e-5)
    (out * tensors["in.cotangent"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad.x"], atol=2e-5, rtol=1e-5)
    for module, name in ((adapter.norm, "norm"), (whole, shared)):
        for k, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, tensors[f"grad.adapter_{name}.{k}"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        split.weight.value.grad, tensors[f"grad.adapter_{half}.{index}.weight"], atol=2e-5, rtol=1e-5
    )
    expected = torch.zeros_like(split.bias.value)
    expected[index] = tensors[f"grad.adapter_{half}.{index}.bias"]
    torch.testing.assert_close(split.bias.value.grad, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(split.bias.mean(), tensors[f"out.merged.adapter_{half}_merge.bias"])

    with torch.no_grad():  # the reference's mean is over unrelated experts, which one copy cannot hold
        for tensor in (split.weight.value, split.weight.start):
            tensor.copy_(tensors[f"out.merged.adapter_{half}_merge.weight"])
    model.eval()
    torch.testing.assert_close(model.blocks[0](x), tensors["out.eval"], atol=1e-5, rtol=1e-5)


def test_golden_mosl(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, about = golden("mosa/mosl_lora_qv_down_e3")
    options = about["config"]
    model = VisionTransformer(img_size=32, embed_dim=24, depth=1, num_heads=options["heads"], num_classes=2).eval()
    attn = model.blocks[0].attn
    with torch.no_grad():
        for k in ("weight", "bias"):
            getattr(attn.qkv, k).copy_(torch.cat([tensors[f"param.{p}.{k}"] for p in ("query", "key", "value")]))
            getattr(attn.proj, k).copy_(tensors[f"param.out.{k}"])
    config = dict(
        type="MoSL", rank=options["rank"], experts=options["expert_num"], share="down", scale=options["lora_scalar"]
    )
    attached = attach(model, {**config, "where": "q, v"})
    adapter: Any = attached.placed[0].adapter
    drawn = dict(q=2, v=1)
    with torch.no_grad():
        for role, index in drawn.items():
            adapter.down[role].value.copy_(tensors[f"param.lora_A_{role}.weight"])
            adapter.up[role].value.copy_(tensors[f"param.lora_B_{role}.{index}.weight"])
            adapter.up[role].start.copy_(adapter.up[role].value)
    monkeypatch.setattr("zoo.adapters.mosl.draw", lambda experts, device: torch.tensor(0))
    x = tensors["in.x"]
    torch.testing.assert_close(attn.train()(x), tensors["out.train"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for role in drawn:
            for tensor in (adapter.up[role].value, adapter.up[role].start):
                tensor.copy_(tensors[f"out.merged.lora_B_{role}_merge.weight"])
    torch.testing.assert_close(attn.eval()(x), tensors["out.eval"], atol=1e-5, rtol=1e-5)
    attached.merge()
    torch.testing.assert_close(attn(x), tensors["out.eval"], atol=1e-5, rtol=1e-5)


class Dense(nn.Module):
    """The released layout: N full copies, gradients multiplied by the masks."""

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        self.owner = layer.weight.owner
        self.weights = nn.ParameterList(layer.weight.start.clone() for _ in range(layer.experts))
        self.biases = nn.ParameterList(layer.bias.value[0].detach().clone() for _ in range(layer.experts))

    def step(self, x: Tensor, cotangent: Tensor, index: int, rate: float) -> None:
        weight, bias = self.weights[index], self.biases[index]
        (nn.functional.linear(x, weight, bias) * cotangent).sum().backward()
        weight.grad *= self.owner == index
        torch.optim.SGD(self.parameters(), rate).step()
        self.zero_grad(set_to_none=True)


def test_sgd_trains_bit_for_bit_as_full_copies_with_masked_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ExpertLayer(nn.Linear(7, 5), 3, "all", split_bias=False)
    dense = Dense(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for step in range(12):
        index = step % 2  # expert 2 is never drawn
        monkeypatch.setattr(sparse_experts, "draw", lambda experts, device, index=index: torch.tensor(index))
        x, cotangent = torch.randn(4, 7), torch.randn(4, 5)
        optimizer.zero_grad()
        (layer(x) * cotangent).sum().backward()
        optimizer.step()
        dense.step(x, cotangent, index, 0.1)
    for i in range(3):
        assert torch.equal(layer.weight.expert(torch.tensor(i)), dense.weights[i])
        assert torch.equal(layer.bias.expert(torch.tensor(i)), dense.biases[i])
    outside = layer.weight.owner != 0
    assert torch.equal(dense.weights[0][outside], layer.weight.start[outside])
    assert not torch.equal(dense.weights[0], layer.weight.start)
    torch.testing.assert_close(layer.weight.mean(), sum(dense.weights) / 3)
    torch.testing.assert_close(layer.bias.mean(), sum(dense.biases) / 3)
    plain = layer.plain()
    torch.testing.assert_close(plain(x), layer.eval()(x))


def test_all_experts_are_drawn_and_their_mean_output_is_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.stack([sparse_experts.draw(4, torch.device("cpu")) for _ in range(400)]).bincount(minlength=4)
    assert (drawn > 60).all() and len(drawn) == 4
    model = vit()
    attached = attach(model, dict(type="MoSA", width=6, experts=4, dropout=0.0), where="depth=1")
    shake(attached)
    tokens = torch.randn(2, 5, 48)
    mlp = model.blocks[1].mlp
    evaluated = mlp(tokens)
    model.train()
    outputs = []
    for index in range(4):
        monkeypatch.setattr(sparse_experts, "draw", lambda experts, device, index=index: torch.tensor(index))
        outputs.append(mlp(tokens))
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(torch.stack(outputs).mean(0), evaluated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIGS["MoSA"], CONFIGS["MoSL"]], ids=["MoSA", "MoSL"])
def test_gradient_checkpointing_draws_the_same_experts_again(config: dict[str, Any]) -> None:
    model = vit().train()
    attached = attach(model, config)
    shake(attached)
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        run(model).square().sum().backward()
        results.append([p.grad.clone() for p in attached.parameters()])
    torch.testing.assert_close(results[0], results[1])


def test_one_expert_is_a_plain_adapter() -> None:
    model = vit()
    attached = attach(model, dict(type="MoSA", width=6, experts=1))
    assert not any(isinstance(m, (ExpertLayer, Split)) for m in model.modules())
    shake(attached)
    adapter: Any = attached.placed[0].adapter
    x, y = torch.randn(2, 4, 48), torch.randn(2, 4, 48)
    bottleneck = adapter.bottleneck
    expected = y + 0.1 * bottleneck.up(nn.functional.gelu(bottleneck.down(adapter.norm(x))))
    torch.testing.assert_close(adapter.after(x, y), expected)


@every_config
def test_merged_experts_give_the_same_outputs_and_load_again(config: dict[str, Any]) -> None:
    model = vit()
    attached = attach(model, config)
    shake(attached)
    expected = run(model)
    merge_experts(attached)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)
    assert not any("owner" in key or "start" in key for key in attached.state_dict())
    assert torch.equal(run(model.train()), run(model)) or config.get("type") == "MoSA"  # which has dropout
    again = vit()
    loaded = attach(again, attached.config)
    loaded.load_state_dict(attached.state_dict())
    torch.testing.assert_close(run(again), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(SiteError, match="no experts"):
        merge_experts(attached)


def test_merge_experts_keeps_the_callers_options_and_refuses_other_adapters() -> None:
    by_site = {"*.0.*": dict(experts=2)}
    attached = attach(vit(), dict(type="MoSA", width=6, per_site=by_site))
    merge_experts(attached)
    assert attached.config["per_site"] == {"*.0.*": dict(experts=1)} and by_site == {"*.0.*": dict(experts=2)}
    with pytest.raises(SiteError, match="no experts"):
        merge_experts(attach(vit(), "AdaptFormer"))
    mosl = attach(vit(), "MoSL")
    mosl.merge()
    with pytest.raises(SiteError, match="unmerge"):
        merge_experts(mosl)


def test_channels_first_blocks() -> None:
    model = timm.create_model("poolformer_s12", num_classes=3)
    attached = attach(model, dict(type="MoSA", width=4, where="mlp, depth<2"))
    shake(attached)
    x = torch.randn(1, 3, 64, 64)
    expected = model.eval()(x)
    model.train()(x).sum().backward()
    merge_experts(attached)
    torch.testing.assert_close(model.eval()(x), expected, atol=1e-4, rtol=1e-4)


COUNTS = {  # released table: trainable entries (masks counted once), deployed parameters
    ("MoSA", 64, 4, "down"): (1_235_712, 1_208_064),
    ("MoSAPfeiffer", 64, 4, "down"): (1_235_712, 1_208_064),
    ("MoSA", 16, 4, "down"): (350_400, 322_752),
    ("MoSA", 64, 2, "up"): (1_208_832, 1_208_064),
    ("MoSAPfeiffer", 64, 2, "none"): (1_218_048, 1_208_064),
    ("MoSAHoulsby", 64, 4, "down"): (2_434_560, 2_379_264),
    ("MoSAHoulsby", 64, 2, "none"): (2_399_232, 2_379_264),
}


@pytest.fixture(scope="module")
def vit_base() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224")


@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_released_counts_on_vit_base(case: tuple[str, int, int, str], vit_base: nn.Module) -> None:
    kind, width, experts, share = case
    attached = attach(vit_base, dict(type=kind, width=width, experts=experts, share=share))
    trainable = count(attached)
    merge_experts(attached)
    deployed = count(attached)
    attached.detach()
    assert (trainable, deployed) == COUNTS[case]


def count(attached: Attached) -> int:
    return sum(p.numel() for p in attached.parameters())


def test_mosl_count_does_not_grow_with_the_experts(vit_base: nn.Module) -> None:
    counts = []
    for experts in (1, 4):
        attached = attach(vit_base, dict(type="MoSL", experts=experts, share="none"))
        counts.append(count(attached))
        attached.detach()
    assert counts == [12 * 2 * 16 * (768 + 768)] * 2


WRONG = [
    *(dict(type="MoSA", experts=0), dict(type="MoSA", experts=256), dict(type="MoSA", share="both")),
    *(dict(type="MoSA", along="diagonal"), dict(type="MoSA", scale=0.0), dict(type="MoSA", width=0)),
    *(dict(type="MoSA", width=2, experts=3, along="row"), dict(type="MoSA", reduction=2)),
    *(dict(type="MoSAHoulsby", scale=1.0), dict(type="MoSAPfeiffer", experts=2.0)),
    *(dict(type="MoSL", rank=0), dict(type="MoSL", share="q"), dict(type="MoSL", scale=float("inf"))),
    dict(type="MoSL", along="none"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        attach(vit(), wrong)


def test_mosl_refuses_convolutions_and_bypassed_layers() -> None:
    with pytest.raises(SiteError):
        attach(vit(), dict(type="MoSL", where="embed"))
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2)
    with pytest.raises(SiteError, match="never called"):
        attach(beit, dict(type="MoSL", where="q"))
