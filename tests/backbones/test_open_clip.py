"""open_clip towers and models: equal to open_clip's own, with timm's protocol, adapters, saving and loading."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from timm.models import group_parameters
from tiny_clip import ARCHITECTURES, images, randomise, tokens
from torch import nn

import zoo
from backbones.open_clip_tower import _find, open_clip_model, open_clip_tower
from heads.linear import LinearHead
from tasks.classification.model import ImageClassifier
from tasks.classification.transforms import Preprocessing
from zoo.adapters.inject import attach, attachments, merge, unmerge
from zoo.adapters.probe import correct_modes
from zoo.adapters.sites import find_sites
from zoo.errors import CheckpointError, HubError, OfflineError, OptionError, UnknownNameError
from zoo.export import merged_copy

SIDES = {"tiny-resnet": 64, "tiny-timm": 64}


def picture(name: str, count: int = 2) -> torch.Tensor:
    return images(SIDES.get(name, 32), count)


def reference(model: nn.Module, name: str) -> nn.Module:
    """open_clip's own model with the same weights, built by open_clip."""
    plain = open_clip.create_model(name, load_weights=False, force_custom_text=True).eval()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, open_clip_model(request.param).eval()


# ---- equal to open_clip ----
def test_model_is_open_clips(named):
    name, model = named
    plain = reference(model, name)
    assert isinstance(model, CustomTextCLIP) and list(model.state_dict()) == list(plain.state_dict())
    image, text = picture(name), tokens()
    assert torch.equal(model.encode_image(image), plain.encode_image(image))
    assert torch.equal(model.encode_text(text), plain.encode_text(text))
    for found, expected in zip(model(image, text), plain(image, text), strict=True):
        assert torch.equal(found, expected)


def test_models_own_forward_intermediates_still_answers(named):
    name, model = named
    image, text = picture(name), tokens()
    options = dict(text_output_fmt="NLC", image_output_fmt="NCHW", output_logits=True)
    found, expected = (m.forward_intermediates(image, text, **options) for m in (model, reference(model, name)))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        pairs = zip(found[key], value, strict=True) if isinstance(value, list) else [(found[key], value)]
        assert all(torch.equal(a, b) for a, b in pairs), key


def test_weights_of_a_standard_clip_file(tmp_path):
    plain = open_clip.create_model("tiny-vit", load_weights=False).eval()  # text tower spread over the model itself
    path = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, path)
    model = open_clip_model("tiny-vit", pretrained=f"file:{path}").eval()
    assert model.weights_source == f"file:{path}"
    assert torch.equal(model.encode_image(images()), plain.encode_image(images()))
    assert torch.equal(model.encode_text(tokens()), plain.encode_text(tokens()))
    for part, inputs, expected in (("visual", images(), plain.encode_image), ("text", tokens(), plain.encode_text)):
        tower = open_clip_tower("tiny-vit", tower=part, pretrained=str(path)).eval()
        assert torch.equal(tower(inputs), expected(inputs)) and tower.weights_source == f"file:{path}"


def test_a_file_of_one_tower_and_other_sizes(tmp_path):
    tower = open_clip_tower("tiny-vit").eval()
    save_file(tower.state_dict(), tmp_path / "model.safetensors")
    again = open_clip_tower("tiny-vit", pretrained=str(tmp_path)).eval()
    assert torch.equal(again(images()), tower(images()))
    larger = open_clip_tower("tiny-vit", pretrained=str(tmp_path), image_size=48)
    assert larger.positional_embedding.shape == (37, 64) and larger(images(48)).shape == (2, 32)
    assert torch.equal(larger.positional_embedding[0], tower.positional_embedding[0])
    assert larger.pretrained_cfg["input_size"] == (3, 48, 48)
    with pytest.raises(CheckpointError, match=r"weights of another model: \d+ keys missing"):
        open_clip_tower("tiny-vit", tower="text", pretrained=str(tmp_path))
    with pytest.raises(CheckpointError, match="weights of another model"):
        open_clip_tower("tiny-resnet", pretrained=str(tmp_path))


def test_a_config_folder(tmp_path):
    how = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "resize_mode": "squash"}
    content = {"model_cfg": ARCHITECTURES["tiny-vit"], "preprocess_cfg": how}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    plain = open_clip.create_model("tiny-vit", load_weights=False, force_custom_text=True).eval()
    save_file(plain.state_dict(), tmp_path / "open_clip_model.safetensors")
    model = open_clip_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model.encode_image(images()), plain.encode_image(images()))
    chosen = Preprocessing.of(model)
    assert chosen.mean == (0.5,) * 3 and chosen.crop_mode == "squash" and chosen.size == (32, 32)
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": []}')
    with pytest.raises(CheckpointError, match="is no open_clip config"):
        open_clip_model(f"local-dir:{tmp_path}")


# ---- names, tags and errors ----
def test_errors_say_what_would_be_right():
    with pytest.raises(UnknownNameError, match="did you mean 'ViT-B-32'"):
        open_clip_tower("ViT-B-33")
    with pytest.raises(UnknownNameError, match="no weights 'opena' of ViT-B-32; did you mean 'openai'"):
        open_clip_tower("ViT-B-32/opena")
    with pytest.raises(OptionError, match="say which weights: ViT-B-32/TAG, one of openai"):
        open_clip_tower("ViT-B-32", pretrained=True)
    with pytest.raises(OptionError, match="'visual' or 'text'"):
        open_clip_tower("tiny-vit", tower="vision")
    with pytest.raises(OptionError, match="another architecture"):
        open_clip_tower("tiny-vit", pretrained="open_clip:ViT-B-32/openai")
    with pytest.raises(HubError, match="no file or folder"):
        open_clip_tower("tiny-vit", pretrained="file:/nowhere.safetensors")


def test_offline_error_names_the_weights(monkeypatch):
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    with pytest.raises(OfflineError, match="vit_base_patch32_clip_224"):
        open_clip_tower("ViT-B-32/openai", pretrained=True)
    with pytest.raises(OfflineError, match=r"open_clip_config\.json"):
        open_clip_tower("hf-hub:nobody/nothing")


@pytest.mark.parametrize(
    "name, quick", [("ViT-B-32/openai", True), ("ViT-B-32/laion2b_s34b_b79k", False), ("ViT-B-32-quickgelu", True)]
)
def test_a_tag_decides_the_activation(name, quick):
    """OpenAI's weights were trained with QuickGELU; open_clip only warns when they run with another activation."""
    assert _find(name).config.get("quick_gelu", False) is quick


def test_option_quick_gelu_and_patch_dropout():
    tower = open_clip_tower("tiny-vit", quick_gelu=True, patch_dropout=0.5)
    assert isinstance(tower.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert tower.patch_dropout.prob == 0.5


# ---- timm's protocol ----
def test_vision_protocol(named):
    name, model = named
    tower, image = model.visual, picture(name)
    features = tower.forward_features(image)
    assert torch.equal(tower.forward_head(features), tower(image))
    pooled = tower.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, tower.head_hidden_size)
    assert features.shape[1 if features.ndim == 4 else 2] == tower.num_features
    assert isinstance(tower.get_classifier(), nn.Identity) and tower.num_classes == 0
    tower.reset_classifier(0)
    with pytest.raises(OptionError, match="no classifier"):
        tower.reset_classifier(10)
    layers = group_parameters(tower, tower.group_matcher(), reverse=True)
    assert set(layers) == {n for n, _ in tower.named_parameters()}
    first = next(n for n in layers if "conv1" in n)
    assert layers[first] == 0 and max(layers.values()) >= 2
    assert len(tower.feature_info) == len(tower.forward_intermediates(image, intermediates_only=True))


def test_vision_layers_in_order():
    layers = group_parameters(open_clip_tower("tiny-vit"), open_clip_tower("tiny-vit").group_matcher(), reverse=True)
    wanted = {"class_embedding": 0, "positional_embedding": 0, "ln_pre.weight": 0, "ln_post.bias": 2, "proj": 2}
    wanted |= {f"transformer.resblocks.{i}.attn.in_proj_weight": i + 1 for i in (0, 1)}
    assert {k: layers[k] for k in wanted} == wanted


def test_vision_intermediates(named):
    name, model = named
    tower, image = model.visual, picture(name)
    last, maps = tower.forward_intermediates(image, indices=[0, 1])
    assert torch.equal(last, tower.forward_features(image)) and len(maps) == 2
    expected = reference(model, name).visual.forward_intermediates(image, indices=None)["image_intermediates"]
    assert all(torch.equal(a, b) for a, b in zip(maps, expected[:2], strict=True))
    for m, info in zip(tower.forward_intermediates(image, intermediates_only=True), tower.feature_info, strict=True):
        assert m.shape[1] == info["num_chs"] and m.shape[2] == image.shape[2] // info["reduction"]


def test_vision_intermediates_options():
    tower, image = open_clip_tower("tiny-vit").eval(), images()
    maps = tower.forward_intermediates(
        image, indices=[1], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    (spatial, prefix), tokens_ = maps[0], tower.forward_features(image)
    torch.testing.assert_close(torch.cat((prefix, spatial), 1), tokens_)
    seen: list[int] = []
    for i, block in enumerate(tower.transformer.resblocks):
        block.register_forward_hook(lambda *_, i=i: seen.append(i))
    tower.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
    assert seen == [0]
    oblong = open_clip_tower("tiny-vit", image_size=(32, 48))  # type: ignore[arg-type]
    assert oblong.forward_intermediates(torch.randn(1, 3, 32, 48), intermediates_only=True)[0].shape == (1, 64, 4, 6)
    with pytest.raises(OptionError, match="NCHW or NLC"):
        tower.forward_intermediates(image, output_fmt="NHWC")


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-timm"])
def test_text_protocol(name):
    tower, text = open_clip_tower(name, tower="text").eval(), tokens()
    features = tower.forward_features(text)
    assert features.shape == (2, 12, tower.num_features)
    assert torch.equal(tower.forward_head(features, text=text), tower(text))
    assert tower.forward_head(features, pre_logits=True, text=text).shape == (2, tower.head_hidden_size)
    last, maps = tower.forward_intermediates(text, norm=True)
    assert torch.equal(last, features) and len(maps) == 2
    torch.testing.assert_close(maps[-1], features)
    layers = group_parameters(tower, tower.group_matcher(), reverse=True)
    assert set(layers) == {n for n, _ in tower.named_parameters()}
    assert layers["token_embedding.weight"] == 0 and layers["ln_final.weight"] == 2
    if name == "tiny-vit":
        with pytest.raises(OptionError, match="text=tokens"):
            tower.forward_head(features)


@pytest.mark.parametrize("part", ["visual", "text"])
def test_gradient_checkpointing_changes_nothing_but_memory(part):
    tower = open_clip_tower("tiny-vit", tower=part).train()
    inputs = images() if part == "visual" else tokens()

    def gradients() -> list[torch.Tensor]:
        tower.zero_grad()
        tower(inputs).square().sum().backward()
        return [p.grad.clone() for p in tower.parameters() if p.grad is not None]

    plain = gradients()
    tower.set_grad_checkpointing(True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, gradients(), strict=True))
    with pytest.raises(OptionError, match="no gradient checkpointing"):
        open_clip_tower("tiny-resnet").set_grad_checkpointing()


def test_copies_and_pickles_keep_the_protocol(named):
    name, model = named
    image = picture(name)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model) and type(again.visual) is type(model.visual)
        assert torch.equal(again.visual.forward_features(image), model.visual.forward_features(image))
        assert again.pretrained_cfg == model.pretrained_cfg


def test_pickle_comes_back_in_a_fresh_process(tmp_path):
    file = tmp_path / "tower.pickle"
    file.write_bytes(pickle.dumps(open_clip_tower("tiny-vit")))
    code = f"import pickle; t = pickle.load(open({str(file)!r}, 'rb')); print(t.num_features, type(t).__name__)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout == "64 VisionTransformer\n", done.stderr


def test_preprocessing_is_open_clips():
    chosen = Preprocessing.of(open_clip_tower("tiny-vit"))
    assert chosen.size == (32, 32) and chosen.crop_pct == 1.0 and chosen.interpolation == "bicubic"
    assert chosen.mean == open_clip.OPENAI_DATASET_MEAN and chosen.std == open_clip.OPENAI_DATASET_STD
    assert not timm.is_model(open_clip_tower("tiny-vit").pretrained_cfg["architecture"])


def test_tokenize_refuses_what_would_be_cut():
    model = open_clip_model("tiny-vit")
    assert torch.equal(model.tokenize(["a red cat"]), tokens("a red cat")) and model.tokenize(["x"]).shape == (1, 12)
    with pytest.raises(OptionError, match="has 14 tokens, the text tower takes 12"):
        model.tokenize(["one two three four five six seven eight nine ten eleven twelve"])


# ---- adapters, merging, saving ----
def test_sites_are_those_of_the_plain_model(named):
    name, model = named

    def rows(m: nn.Module) -> list[Any]:
        return [(s.path, s.role, s.depth, s.mode, s.parts) for s in find_sites(m)]

    assert rows(model) == rows(reference(model, name))
    # A plain tower's `head` (the projection of a timm trunk) would be taken for a classifier; both call it head.
    assert rows(model.visual) == rows(reference(model, name).visual)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-timm"])
def test_lora_on_a_tower(name):
    tower, image = open_clip_tower(name).eval(), picture(name)
    before, keys = tower(image), set(tower.state_dict())
    where = ["q", "v"] if name != "tiny-timm" else ["conv"]
    attach(tower, "LoRA", where=where)
    assert torch.allclose(tower(image), before, atol=1e-6) and keys < set(tower.state_dict())
    randomise(tower)
    changed = tower(image)
    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.allclose(tower.forward_head(tower.forward_features(image)), changed, atol=1e-6)
    merge(tower)
    assert set(tower.state_dict()) == keys and torch.allclose(tower(image), changed, atol=1e-5)
    unmerge(tower)
    assert torch.allclose(tower(image), changed, atol=1e-6)
    for twin in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(twin(image), tower(image))


def test_lora_on_both_towers_counts_and_trains():
    model = open_clip_model("tiny-vit").train()
    attached = attach(model, {"type": "LoRA", "rank": 2, "where": ["q", "k", "v"]})
    assert {(s.path.split(".")[0], s.depth, s.mode) for s in attached.sites} == {
        (t, d, "mha") for t in ("visual", "text") for d in (0, 1)
    }
    assert sum(p.numel() for p in attached.parameters()) == 4 * (3 * 2 * 64 + 2 * 3 * 64)
    randomise(model)
    image, text, scale = model(images(), tokens())
    (scale * image @ text.T).diagonal().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attached.parameters())
    assert not model.logit_scale.requires_grad


def test_text_tower_takes_adapters_and_keeps_its_causal_mask():
    tower = open_clip_tower("tiny-vit", tower="text").eval()
    attach(tower, {"type": "LoRA", "where": ["q", "k", "v"]}, example=tokens())
    randomise(tower)
    text = tokens("a red cat", "a red dog")
    features = tower.forward_features(text)
    same = (text[0] == text[1]).int().argmin()  # the first place where the sentences differ
    assert torch.allclose(features[0, :same], features[1, :same], atol=1e-6)
    assert not torch.allclose(features[0, same], features[1, same], atol=1e-3)


def test_zoo_create_save_and_load(tmp_path):
    model = zoo.create("open_clip:tiny-vit", adapter={"type": "LoRA", "where": ["q", "v"], "rank": 2})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".adapters." in name for name in trained)  # no projection trains beside it
    randomise(model)
    zoo.save(model, tmp_path / "own")
    again = zoo.load(tmp_path / "own")
    assert torch.equal(again(images()), model(images())) and again.head_hidden_size == 64
    whole = zoo.create({"type": "OpenCLIPModel", "name": "tiny-vit"}, adapter="LoRA")
    zoo.save(randomise(whole), tmp_path / "both")
    found, expected = zoo.load(tmp_path / "both")(images(), tokens()), whole(images(), tokens())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(OptionError, match="takes no num_classes"):
        zoo.create("open_clip:tiny-vit", num_classes=3)


def test_only_what_was_trained_is_saved_beside_named_weights(tmp_path):
    save_file(open_clip_tower("tiny-vit").state_dict(), tmp_path / "base.safetensors")
    source = f"file:{tmp_path / 'base.safetensors'}"
    model = randomise(zoo.create("open_clip:tiny-vit", pretrained=source, adapter="LoRA"))
    zoo.save(model, tmp_path / "adapter")
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter" / "adapter.safetensors", "pt") as file:
        assert all(".adapters." in key for key in file.keys())  # noqa: SIM118 - no iterator there
    assert torch.equal(zoo.load(tmp_path / "adapter")(images()), model(images()))


def test_merged_weights_load_without_the_zoo(tmp_path):
    model = randomise(zoo.create({"type": "OpenCLIPModel", "name": "tiny-vit"}, adapter="LoRA")).eval()
    zoo.save(model, tmp_path, merged=True)
    plain = open_clip.create_model(
        "tiny-vit", pretrained=str(tmp_path / "model.safetensors"), force_custom_text=True
    ).eval()
    assert torch.allclose(plain.encode_image(images()), model.encode_image(images()), atol=1e-5)
    assert torch.allclose(plain.encode_text(tokens()), model.encode_text(tokens()), atol=1e-5)
    again = open_clip_model("tiny-vit", pretrained=str(tmp_path)).eval()
    assert torch.equal(again.encode_text(tokens()), plain.encode_text(tokens()))
    assert not attachments(merged_copy(model))["default"].model.training


def test_image_classifier_reads_the_pooled_features_before_the_projection():
    tower = open_clip_tower("tiny-vit")
    model = ImageClassifier(tower, {"type": "LinearHead", "num_classes": 3}, adapter={"type": "LoRA", "rank": 2}).eval()
    assert isinstance(model.head, LinearHead) and model.head.fc.in_features == 64
    features = model.extract(images())
    torch.testing.assert_close(features @ tower.proj, tower(images()))
    assert model.preprocessing["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"backbone", "head"}


def test_export_and_compile_with_an_adapter():
    tower = open_clip_tower("tiny-vit").eval()
    attach(tower, "LoRA", where=["q", "v"])
    randomise(tower)
    exported = torch.export.export(tower, (images(),)).module()
    torch.testing.assert_close(exported(images()), tower(images()))
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), tower(images()))


def test_every_site_is_reached(named):
    model = named[1]
    correct_modes([s for s in find_sites(model.visual) if s.role in ("q", "qkv", "fc1", "conv")], model.visual)
