"""ImageClassifier on the backbones it promises to take."""

import pytest
import torch
from torch import nn

from heads.linear import LinearHead
from tasks.classification.model import ImageClassifier, feature_width
from zoo.errors import OptionError
from zoo.factory import create
from zoo.freeze import trainable_parameters
from zoo.registry import MODELS

HEAD = {"type": "LinearHead", "num_classes": 3}


def config(name="test_vit", **options):
    return {
        "type": "ImageClassifier",
        "backbone": {"type": "TimmBackbone", "name": name},
        "head": dict(HEAD),
        **options,
    }


def batch(size, count=2):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return {"inputs": images, "data_samples": [{"label": i % 3} for i in range(count)]}


@pytest.mark.parametrize(
    "name", ["test_vit", "test_efficientnet", "test_resnet", "test_convnext", "mobilenetv3_small_050"]
)
def test_timm_backbones_give_what_their_own_classifier_would_get(name):
    model = MODELS.create(config(name)).eval()
    inputs = torch.randn(2, 3, 160 if "test_vit" in name else 64, 160 if "test_vit" in name else 64)
    features = model.extract(inputs)
    assert features.shape == (2, feature_width(model.backbone))
    assert torch.equal(features, model.backbone(inputs))  # num_classes=0: timm's own pooled features
    assert torch.equal(model(inputs), model.head(features))


def test_a_classifier_of_the_backbone_is_left_out():
    bare, full = config(), config()
    full["backbone"]["num_classes"] = 7
    one, two = MODELS.create(bare), MODELS.create(full)
    two.backbone.load_state_dict(one.backbone.state_dict(), strict=False)
    two.head.load_state_dict(one.head.state_dict())
    inputs = torch.randn(1, 3, 160, 160)
    assert torch.equal(one.eval()(inputs), two.eval()(inputs))


def test_any_module_with_a_known_width():
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = ImageClassifier(body, LinearHead(in_features=5, num_classes=3))
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    with pytest.raises(OptionError, match="give in_features"):
        ImageClassifier(body, dict(HEAD))
    assert ImageClassifier(body, {**HEAD, "in_features": 5}).head.fc.in_features == 5


def test_open_clip_tower():
    import open_clip

    tower = open_clip.create_model("ViT-S-32-alt").visual
    model = ImageClassifier(tower, dict(HEAD), adapter={"type": "LoRA", "where": ["q", "v"], "rank": 2}).eval()
    inputs = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(inputs), model.head(tower(inputs)))


def test_training_step_touches_adapter_and_head_only():
    model = MODELS.create(config("test_efficientnet", adapter={"type": "LoRA", "where": ["conv"], "rank": 2})).train()
    names = trainable_parameters(model)
    assert names and all(".adapters." in name or name.startswith("head.") for name in names)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(names.values(), lr=0.01)  # its steps do not vanish with small gradients
    for _ in range(2):  # the second step also moves `down`, whose gradient is zero while `up` is
        data = model.data_preprocessor(batch(64, 4), True)
        loss = model(**data, mode="loss")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(names)  # no running statistic of the frozen backbone either


def test_predictions():
    model = MODELS.create(config()).eval()
    data = model.data_preprocessor(batch(160, 3), False)
    found = model(**data, mode="predict")
    logits = model(data["inputs"])
    assert [f["label"] for f in found] == logits.argmax(1).tolist()
    torch.testing.assert_close(torch.stack([f["probabilities"] for f in found]), logits.softmax(1))


def test_preprocessing_is_the_backbones_and_reaches_the_preprocessor():
    model = MODELS.create(config(preprocessing={"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}))
    assert model.preprocessing["size"] == (160, 160) and model.preprocessing["crop_pct"] == 1.0
    torch.testing.assert_close(model.data_preprocessor.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    raw = MODELS.create(config(preprocessing={"normalise": False}))
    data = {"inputs": torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), "data_samples": [{}]}
    assert raw.data_preprocessor(data)["inputs"].unique().tolist() == [1.0]
    with pytest.raises(OptionError, match="mean and std once"):
        MODELS.create(config(data_preprocessor={"mean": (0.0,) * 3}))


def test_mixup_reaches_the_loss():
    augment = {"type": "Mixup", "num_classes": 3}
    model = MODELS.create(config(data_preprocessor={"batch_augment": augment})).train()
    data = model.data_preprocessor(batch(160, 4), True)
    assert all(sample["soft_label"].shape == (3,) for sample in data["data_samples"])
    assert torch.isfinite(model(**data, mode="loss")["loss"])
    assert "soft_label" not in model.data_preprocessor(batch(160), False)["data_samples"][0]


def test_zoo_create_overrides_head_and_adapter():
    model = create("vit_t_lora_digits", num_classes=4, head="CosineHead", adapter=None, img_size=32)
    assert type(model.head).__name__ == "CosineHead" and model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    assert all(p.requires_grad for p in model.parameters())
