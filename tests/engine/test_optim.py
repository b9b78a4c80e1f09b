"""Groups, names, precision: what the optimizer gets and does."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from tiny_task import TinyTask
from torch import nn

from zoo.engine.optim import TrainableConstructor, build_optimizer, parameter_groups
from zoo.errors import OptionError, UnknownNameError
from zoo.freeze import trainable_parameters


class Wrapped(nn.Module):
    """A timm ViT as `backbone` and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2, num_classes=0)
        self.head = nn.Linear(24, 5)


def _rate_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {name_of[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_only_trainable_parameters_in_two_groups() -> None:
    model = TinyTask()
    groups = parameter_groups(model, lr=0.1, weight_decay=0.3)
    found = _rate_of(model, groups)
    assert found.keys() == trainable_parameters(model).keys()
    assert len(groups) == 2
    assert found["head.fc.weight"] == (0.1, 0.3) and found["backbone.mix.weight"] == (0.1, 0.3)
    assert found["head.fc.bias"] == (0.1, 0.0) and found["head.norm.weight"] == (0.1, 0.0)


def test_layer_decay_head_rate_and_no_weight_decay() -> None:
    model = Wrapped()
    groups = parameter_groups(model, lr=1.0, weight_decay=0.3, layer_decay=0.5, head_lr_mult=10.0)
    found = _rate_of(model, groups)
    # layers: stem, blocks 0-2 (the final norm belongs to the last), head
    assert found["backbone.patch_embed.proj.weight"] == (0.5**4, 0.3)
    assert found["backbone.blocks.0.attn.qkv.weight"] == (0.5**3, 0.3)
    assert found["backbone.blocks.2.attn.qkv.weight"] == (0.5, 0.3)
    assert found["backbone.norm.weight"] == (0.5, 0.0)
    assert found["head.weight"] == (10.0, 0.3) and found["head.bias"] == (10.0, 0.0)
    assert found["backbone.pos_embed"] == (0.5**4, 0.0)  # not a vector: timm's no_weight_decay() names it
    assert len(groups) == 10


def test_layer_decay_equals_timm_on_a_model_with_its_own_classifier() -> None:
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2, num_classes=5)
    theirs = param_groups_layer_decay(model, weight_decay=0.3, layer_decay=0.5)
    scale_of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    ours = _rate_of(model, parameter_groups(model, lr=1.0, weight_decay=0.3, layer_decay=0.5))
    differ = {n for n, p in model.named_parameters() if ours[n] != pytest.approx(scale_of[id(p)])}
    # timm's function decays these two unless it is given the list of no_weight_decay(), which ours asks for itself
    assert differ == {"cls_token", "pos_embed"}


def test_rates_survive_in_the_optimizer() -> None:
    optimizer = build_optimizer(Wrapped(), "lion", lr=1e-3, weight_decay=0.1, head_lr_mult=3.0)
    assert type(optimizer).__name__ == "Lion"
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([1e-3, 3e-3])
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}


def test_mistakes_are_named() -> None:
    model = TinyTask()
    with pytest.raises(UnknownNameError, match="adamw"):
        build_optimizer(model, "adamwx", lr=0.1)
    with pytest.raises(OptionError, match="betaz"):
        build_optimizer(model, "adamw", lr=0.1, betaz=(0.9, 0.99))
    with pytest.raises(OptionError, match="group_matcher"):
        build_optimizer(model, "adamw", lr=0.1, layer_decay=0.5)
    with pytest.raises(OptionError, match="layer_decay"):
        TrainableConstructor({"optimizer": {"type": "sgd", "lr": 0.1}}, {"layer_decai": 0.5})
    with pytest.raises(OptionError, match="accumulative_counts"):
        TrainableConstructor({"optimizer": {"type": "sgd", "lr": 0.1}, "accumulative_count": 2})
    with pytest.raises(OptionError, match=r"fp16.*CUDA"):
        TrainableConstructor({"optimizer": {"type": "sgd", "lr": 0.1}, "amp": "fp16"})(model)
    with pytest.raises(OptionError, match="bf16"):
        TrainableConstructor({"optimizer": {"type": "sgd", "lr": 0.1}, "amp": "bf61"})(model)
    with pytest.raises(OptionError, match="no parameter"):
        build_optimizer(TinyTask().requires_grad_(False), "adamw", lr=0.1)


def _gradient_after(batches: list[int], **options: Any) -> tuple[torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    layer, data = nn.Linear(4, 1), torch.randn(8, 4)
    wrapper = TrainableConstructor({"optimizer": {"type": "momentum", "lr": 0.1}, **options})(layer)
    wrapper.initialize_count_status(layer, 0, len(batches))
    for number, size in enumerate(batches):
        with wrapper.optim_context(layer):
            loss = layer(data[sum(batches[:number]) :][:size]).square().mean()
        wrapper.update_params(loss)
    return layer.weight.detach(), layer


def test_accumulation_equals_one_large_batch() -> None:
    whole, _ = _gradient_after([8])
    parts, _ = _gradient_after([2, 2, 2, 2], accumulative_counts=4)
    assert torch.allclose(whole, parts, atol=1e-7)
    assert not torch.allclose(whole, _gradient_after([2, 2, 2, 2])[0], atol=1e-4)


def test_clipping_bounds_the_step() -> None:
    torch.manual_seed(0)
    start = nn.Linear(4, 1).weight.detach().clone()
    free, _ = _gradient_after([8])
    clipped, _ = _gradient_after([8], clip_grad={"max_norm": 1e-3})
    assert (free - start).norm() > 1e-3
    assert (clipped - start).norm() <= 0.1 * 1e-3 * 1.001


def test_bf16_runs_the_forward_in_bf16_and_keeps_weights_fp32() -> None:
    layer = nn.Linear(4, 1)
    wrapper = TrainableConstructor({"optimizer": {"type": "sgd", "lr": 0.1}, "amp": "bf16"})(layer)
    with wrapper.optim_context(layer):
        out = layer(torch.randn(2, 4))
    assert out.dtype is torch.bfloat16
    wrapper.update_params(out.float().mean())
    assert layer.weight.dtype is torch.float32
