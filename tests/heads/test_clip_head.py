"""CLIPZeroShotHead: open_clip's own zero-shot classifier, and when its text features are computed again."""

from __future__ import annotations

import copy
import pickle

import open_clip
import pytest
import torch
from tiny_clip import images, randomise
from torch import Tensor, nn

from backbones.open_clip_tower import open_clip_model
from heads.clip import CLIPZeroShotHead
from zoo.adapters.inject import attach, merge, using
from zoo.errors import OptionError
from zoo.registry import HEADS

CLASSES = ["red_cat", "dog", "grey house"]
TEMPLATES = ["a photo of a {}.", "a drawing of the {}.", "{} texture."]


@pytest.fixture
def model() -> nn.Module:
    return open_clip_model("tiny-vit").eval()


def head_of(model: nn.Module, **options: object) -> CLIPZeroShotHead:
    head: CLIPZeroShotHead = HEADS.create({"type": "CLIPZeroShotHead", "classes": CLASSES, **options}, model=model)
    return head.eval()


def counted(model: nn.Module) -> list[int]:
    """The number of sentences of every run of the text tower from now on."""
    runs: list[int] = []
    model.text.register_forward_hook(lambda _, inputs, __: runs.append(len(inputs[0])))
    return runs


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES])
def test_logits_are_open_clips(model, templates):
    head = head_of(model, templates=templates)
    names = [name.replace("_", " ") for name in CLASSES]
    weights = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer("tiny-vit"), names, templates)
    embedding = model.encode_image(images(), normalize=True)
    expected = model.logit_scale.exp() * embedding @ weights
    torch.testing.assert_close(head(model.encode_image(images())), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.text_features(), weights.T, rtol=1e-5, atol=1e-6)


def test_one_template_is_the_models_own_logits(model):
    head = head_of(model)
    text = model.tokenize(["a photo of a red cat.", "a photo of a dog.", "a photo of a grey house."])
    torch.testing.assert_close(head(model.encode_image(images())), model.get_logits(images(), text)[0])
    model.logit_bias = nn.Parameter(torch.tensor(-3.0))
    torch.testing.assert_close(head(model.encode_image(images())), model.get_logits(images(), text)[0])


def test_many_sentences_go_in_pieces(model):
    head = HEADS.create({"type": "CLIPZeroShotHead", "classes": [f"c{i}" for i in range(300)]}, model=model)
    runs = counted(model)
    model.requires_grad_(False)
    assert head.text_features().shape == (300, 32) and runs == [256, 44]


def test_a_frozen_text_tower_runs_once(model):
    model.requires_grad_(False)
    runs = counted(model)
    head = head_of(model)
    with torch.inference_mode():
        first = head(torch.randn(2, 32))
    features = torch.randn(2, 32, requires_grad=True)
    head(features).sum().backward()  # what was kept in inference mode serves training too
    assert runs == [3] and first.shape == (2, 3) and features.grad is not None
    head.train()(features)
    assert runs == [3, 3]  # another mode: another cache
    head(features)
    assert runs == [3, 3]


def test_adapters_on_the_image_tower_leave_the_cache(model):
    attach(model, "LoRA", where=["q", "v", "visual.*"])
    runs, head = counted(model), head_of(model).train()
    for _ in range(3):
        head(model.encode_image(images())).sum().backward()
    assert runs == [3]


def test_a_trained_text_tower_runs_at_every_step_and_gets_gradients(model):
    attached = attach(model, "LoRA", where=["q", "v", "text.*"])
    randomise(model)
    runs, head = counted(model), head_of(model).train()
    optimizer = torch.optim.SGD(attached.parameters(), 0.1)
    outputs: list[Tensor] = []
    for _ in range(3):
        outputs.append(head(torch.ones(1, 32)))
        optimizer.zero_grad()
        outputs[-1][0, 0].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attached.parameters())
        optimizer.step()
    assert runs == [3, 3, 3] and not torch.equal(outputs[0], outputs[2])


def test_an_evaluation_of_a_trained_text_tower_runs_it_once(model):
    attached = attach(model, "LoRA", where=["q", "v", "text.*"])
    randomise(model)
    runs, head = counted(model), head_of(model)
    with torch.no_grad():
        first = head(torch.ones(1, 32))
        head(torch.ones(1, 32))
        assert runs == [3]
        for parameter in attached.parameters():  # as an optimizer or a loaded file changes them
            parameter.mul_(2)
        second = head(torch.ones(1, 32))
        assert runs == [3, 3] and not torch.equal(first, second)
        with using(model):
            plain = head(torch.ones(1, 32))
        assert runs == [3, 3, 3] and not torch.equal(plain, second)
        merge(model)
        torch.testing.assert_close(head(torch.ones(1, 32)), second, rtol=1e-4, atol=1e-4)


def test_head_owns_no_weights_and_copies_follow_their_model(model):
    head = head_of(model)
    assert not list(head.parameters()) and not head.state_dict()
    pair = nn.ModuleDict({"model": model, "head": head})
    head(torch.ones(1, 32))
    for twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert twin["head"]._model[0] is twin["model"] and twin["head"]._kept is None
        with torch.no_grad():
            for parameter in twin["model"].text.parameters():
                parameter.zero_()
        assert not torch.allclose(twin["head"](torch.ones(1, 32)), head(torch.ones(1, 32)))


def test_half_precision_does_not_reach_the_logits(model):
    head = head_of(model)
    features = model.encode_image(images())
    expected = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(features)  # the text tower runs in bf16 here, the product does not
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.5
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(features), expected)  # what is kept is computed in full precision


def test_refusals(model):
    with pytest.raises(OptionError, match=r"one \{\} for the class name"):
        head_of(model, templates=["a photo."])
    with pytest.raises(OptionError, match="at least one template"):
        head_of(model, templates=[])
    with pytest.raises(OptionError, match="occur more than once"):
        head_of(model, classes=["a_b", "a b"])
    with pytest.raises(OptionError, match="both towers, got a VisionTransformer"):
        head_of(model.visual)
    with pytest.raises(OptionError, match=r"has 1\d tokens"):
        head_of(model, classes=["dog", "a very long name of something that nobody would write so"])
    with pytest.raises(OptionError, match="at least 2"):
        head_of(model, classes=["dog"])
