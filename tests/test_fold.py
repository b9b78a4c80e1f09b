"""The inference form: equal outputs, no batch norm left where none is needed, clear refusals where nothing folds."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import zoo
from backbones.slab_norm import PRepBN
from zoo.adapters.attached import RECORD
from zoo.adapters.inject import attachments
from zoo.errors import CheckpointError, OptionError, SiteError, ZooError
from zoo.folding import conv_bn_pairs, fold

VIT: dict[str, Any] = dict(depth=2, img_size=32)


def disturbed(model: nn.Module) -> nn.Module:
    """Statistics, gains and biases away from where they start, at which half of the formulas would do."""
    torch.manual_seed(3)
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def image(side: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor) -> None:
    # Products are rounded in another order through tens of layers.
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "norms", "left"),
    [
        ("shvit_s1", 74, 0),
        ("shvit_s1_distilled", 75, 0),
        ("resnet18", 20, 0),
        ("resnetv2_50", 49, 17),  # the first norm of a block reads a sum
        ("densenet121", 121, 62),  # a concatenation
        ("efficientnet_lite0", 49, 0),
        ("tf_efficientnet_lite0", 49, 0),  # convolutions that pad by themselves
        ("halonet_h0", 53, 16),  # behind attention
        ("levit_128s", 52, 0),
        ("repvgg_a0", 61, 0),
    ],
)
def test_batch_norms_go_and_outputs_stay(name: str, norms: int, left: int) -> None:
    model = disturbed(zoo.create(name, num_classes=7))
    x = image(224 if name == "levit_128s" else 64)
    with torch.no_grad():
        before = model(x)
        assert batch_norms(model) == norms
        folded = fold(model, x)
        assert batch_norms(folded) == left
        close(folded(x), before)
        assert torch.equal(model(x), before)  # a copy was folded
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())


def test_prepbn_moves_into_the_linear_layers() -> None:
    model = zoo.create("slab_deit_tiny", depth=2, img_size=64, num_classes=5, prepbn_steps=4)
    disturbed(model)
    with warnings.catch_warnings():  # never trained, so the schedule is not over
        warnings.simplefilter("ignore")
        folded = zoo.fold(model, image())
    assert not any(isinstance(m, (PRepBN, nn.LayerNorm)) for m in folded.modules())
    assert isinstance(folded.norm, nn.Identity)
    with torch.no_grad():
        close(folded(image()), model(image()))


def test_lora_is_merged_for_good() -> None:
    model = zoo.create("vit_tiny_patch16_224", num_classes=5, adapter=dict(type="LoRA", rank=2), **VIT)
    for parameter in attachments(model)["default"].parameters():
        nn.init.normal_(parameter, std=0.1)
    plain = zoo.create("vit_tiny_patch16_224", num_classes=5, **VIT)
    x = image(32)
    folded = fold(model, x)
    with torch.no_grad():
        close(folded(x), model(x))
        with zoo.using(model):
            assert (folded(x) - model(x)).abs().max() > 1e-2
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert not attachments(folded) and RECORD not in folded.__dict__
    assert not attachments(model)["default"].merged


def test_adapter_and_batch_norm_in_one_go_and_in_place() -> None:
    model = zoo.create("test_efficientnet", num_classes=5, adapter=dict(type="LoRA", rank=2, where="conv"))
    disturbed(model)
    for parameter in attachments(model)["default"].parameters():
        nn.init.normal_(parameter, std=0.05)
    x = image(32)
    with torch.no_grad():
        before = model(x)
        assert fold(model, inplace=True) is model  # without an example: the model's own record tells one
        close(model(x), before)
    assert batch_norms(model) == 0


def test_selection_is_no_change() -> None:
    model = zoo.create("resnet18", adapter="BitFit", num_classes=5)
    assert batch_norms(fold(model, image())) == 0
    only = zoo.create("vit_tiny_patch16_224", adapter="BitFit", num_classes=5, **VIT)
    with pytest.raises(ZooError, match="nothing to fold in VisionTransformer"):
        fold(only)


def test_a_task_is_folded_through_its_backbone() -> None:
    backbone = dict(type="TimmBackbone", name="resnet18")
    config = dict(type="ImageClassifier", backbone=backbone, head=dict(type="LinearHead", num_classes=4))
    task = disturbed(zoo.create(config))
    folded = fold(task, image())
    assert batch_norms(folded) == 0
    with torch.no_grad():
        close(folded(image()), task(image()))


# ---- which norm reads which convolution ----
class Shortcut(nn.Module):
    """Layers side by side, of which only `c` and `n3` are alone with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.n1, self.n2, self.n3, self.n4 = (nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        x = a + self.n1(a)  # also a shortcut
        x = self.n2(self.b(x).relu_())  # changed in between
        x = self.n3(self.c(x))
        return self.n4(self.d(x)) + F.conv2d(x, self.d.weight)  # the weight is read once more


def test_only_private_pairs_are_folded() -> None:
    model = disturbed(Shortcut()).eval()
    assert [(p.conv, p.norm) for p in conv_bn_pairs(model, image(8))] == [(model.c, model.n3)]
    folded = fold(model, image(8))
    assert [isinstance(getattr(folded, f"n{i}"), nn.Identity) for i in (1, 2, 3, 4)] == [False, False, True, False]


def test_shared_layers_are_folded_together_or_not_at_all() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    both = disturbed(nn.Sequential(conv, norm, nn.ReLU(), conv, norm)).eval()
    close(fold(both, image(8))(image(8)), both(image(8)))
    assert batch_norms(fold(both, image(8))) == 0
    once = nn.Sequential(conv, norm, nn.Conv2d(3, 3, 1), norm).eval()
    with pytest.raises(ZooError, match="nothing to fold in Sequential"):
        fold(once, image(8))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)], ids=["bare", "affine"])
def test_transposed_and_bare(norm: nn.Module) -> None:
    model = disturbed(nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2, bias=False), norm)).eval()
    assert batch_norms(fold(model, image(8))) == 0
    close(fold(model, image(8))(image(8)), model(image(8)))


def test_hooks_and_standardised_weights_are_left_alone() -> None:
    hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    hooked[0].register_forward_hook(lambda module, inputs, out: out * 2)
    standardised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    for model in (
        hooked,
        standardised,
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ):
        with pytest.raises(ZooError, match="nothing to fold"):
            fold(model, image(8))


# ---- refusals ----
class Fickle(nn.Module):
    """Runs its norm on single images only, which the look at one sample cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) if len(x) == 1 else y


def test_the_proof_fails_with_numbers() -> None:
    with pytest.raises(ZooError, match=r"folded Fickle differs.*output 0 by \d.*reach \d.*relative, allowed 0.0001"):
        fold(disturbed(Fickle()), image(8))


def test_folding_twice_and_saving_are_refused() -> None:
    folded = fold(zoo.create("shvit_s1", num_classes=3))
    with pytest.raises(ZooError, match="nothing to fold in SHViT"):
        fold(folded)
    with pytest.raises(CheckpointError, match="could not be rebuilt"):
        zoo.save(folded, "unused")


def test_adapters_that_cannot_merge_leave_the_model_as_it_was() -> None:
    model = zoo.create("vit_tiny_patch16_224", num_classes=5, **VIT)
    zoo.attach(model, dict(type="LoRA", rank=2), name="first")
    zoo.attach(model, "AdaptFormer", name="second")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SiteError, match=r"AdaptFormer at 'blocks.0.*' has no merged form.*VisionTransformer"):
        fold(model, inplace=True)
    zoo.detach(model, "second")
    zoo.activate(model)
    with pytest.raises(SiteError, match=r"'first'.*does not run; activate or detach"):
        fold(model, inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), None, "cannot tell what Sequential takes.*example="),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), image(8)[:, :2], "does not run on the example"),
        (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).bfloat16(),
            image(8),
            "proved in torch.bfloat16",
        ),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), image(3), "nothing to fold in Sequential"),
    ],
)
def test_errors_say_what_to_do(model: nn.Module, example: Tensor | None, message: str) -> None:
    with pytest.raises(ZooError) as caught:
        fold(model, example)
    assert re.search(message, str(caught.value))
    assert isinstance(caught.value, OptionError) or "nothing to fold" in message
