"""CLIPClassifier, few-shot subsets and the CLIP-LoRA protocol, on a tiny CLIP and real handwritten digits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from open_clip.transformer import QuickGELU
from PIL import Image
from tiny_clip import images, randomise

import configs
import zoo
from heads.clip import CLIPZeroShotHead
from tasks.classification.clip import CLIPClassifier
from tasks.classification.clip_templates import CLASSES_OF, GENERIC, TEMPLATES, template_of
from tasks.classification.data import EmbeddedDataset
from tasks.classification.few_shot import SEEDS, SHOTS, FewShotDataset, few_shot_indices, few_shot_run
from tasks.classification.predict import classify
from zoo.adapters.inject import attachments
from zoo.engine.runner import ZooRunner
from zoo.errors import OptionError, UnknownNameError, ZooError
from zoo.freeze import count, trainable_parameters
from zoo.registry import DATASETS, MODELS

FOLDER = Path(configs.__file__).parent / "classification"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LORA = {"type": "LoRA", "rank": 2, "alpha": 1, "rslora": True, "dropout": 0.25, "where": ["q", "k", "v"]}


def config(**options: Any) -> dict[str, Any]:
    return {
        "type": "CLIPClassifier",
        "backbone": {"type": "OpenCLIPModel", "name": "tiny-vit"},
        "head": {"type": "CLIPZeroShotHead", "classes": WORDS, "templates": ["the digit {}."]},
        **options,
    }


def batch(count: int = 4) -> dict[str, Any]:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return {"inputs": pixels, "data_samples": [{"label": i} for i in range(count)]}


# ---- the task ----
def test_zero_shot_is_open_clips():
    model = MODELS.create(config()).eval()
    clip = model.backbone
    text = clip.tokenize([f"the digit {word}." for word in WORDS])
    torch.testing.assert_close(model(images()), clip.get_logits(images(), text)[0])
    assert torch.equal(model.extract(images()), clip.encode_image(images()))
    found = model(images(), mode="predict")
    assert [f["label"] for f in found] == model(images()).argmax(1).tolist() and len(found[0]["probabilities"]) == 10


def test_preprocessing_is_clips_and_is_given_once():
    model = MODELS.create(config(preprocessing={"crop_pct": 0.9}))
    assert model.preprocessing["size"] == (32, 32) and model.preprocessing["crop_pct"] == 0.9
    torch.testing.assert_close(
        model.data_preprocessor.mean.flatten(), torch.tensor((0.48145466, 0.4578275, 0.40821073))
    )
    assert len(classify(model, batch()["inputs"])) == 4
    with pytest.raises(OptionError, match="mean and std once"):
        MODELS.create(config(data_preprocessor={"mean": (0.0,) * 3}))
    with pytest.raises(OptionError, match="both towers"):
        MODELS.create(config(backbone={"type": "OpenCLIPTower", "name": "tiny-vit"}))


@pytest.mark.parametrize(
    "where, towers, depths",
    [
        ([], {"visual", "text"}, {0, 1}),
        (["visual.*"], {"visual"}, {0, 1}),
        (["text.*"], {"text"}, {0, 1}),
        (["depth=1"], {"visual", "text"}, {1}),
        (["visual.*", "depth<1"], {"visual"}, {0}),
    ],
)
def test_towers_and_positions_of_the_adapter(where, towers, depths):
    model = MODELS.create(config(adapter={**LORA, "where": ["q", "k", "v", *where]}))
    sites = attachments(model)["default"].sites
    assert {site.path.split(".")[0] for site in sites} == towers and {site.depth for site in sites} == depths
    each = 3 * 2 * 64 + 3 * 64 * 2
    assert count(model).trainable == each * len(towers) * len(depths)


@pytest.mark.parametrize("adapter", [LORA, {**LORA, "type": "BlockLoRA", "blocks": 2}], ids=["LoRA", "BlockLoRA"])
def test_a_step_trains_the_adapters_of_both_towers_only(adapter):
    model = MODELS.create(config(adapter=adapter)).train()
    names = trainable_parameters(model)
    assert names and all(".adapters." in name for name in names)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(names.values(), lr=2e-3)
    runs = []
    model.backbone.text.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        loss = model(**model.data_preprocessor(batch(), True), mode="loss")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(runs) == 3  # the sentences are encoded anew at every step
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == set(names)


def test_loss_is_cross_entropy_of_scaled_cosines():
    model = MODELS.create(config()).eval()
    data = model.data_preprocessor(batch(), False)
    clip = model.backbone
    text = clip.encode_text(clip.tokenize([f"the digit {word}." for word in WORDS]), normalize=True)
    cosine = clip.encode_image(data["inputs"], normalize=True) @ text.T
    expected = torch.nn.functional.cross_entropy(cosine / 0.07, torch.arange(4))  # CLIP's scale before training
    torch.testing.assert_close(model(**data, mode="loss")["loss"], expected)


def test_save_load_merge(tmp_path):
    model = randomise(MODELS.create(config(adapter=LORA))).eval()
    model.__dict__["zoo_config"] = config(adapter=LORA)
    zoo.save(model, tmp_path / "own", labels=WORDS)
    again = zoo.load(tmp_path / "own")
    assert isinstance(again, CLIPClassifier) and isinstance(again.head, CLIPZeroShotHead)
    assert again.head._model[0] is again.backbone
    assert torch.equal(again(images()), model(images()))
    expected = model(images())
    zoo.save(model, tmp_path / "plain", merged=True)
    fresh = MODELS.create(
        config(backbone={"type": "OpenCLIPModel", "name": "tiny-vit", "pretrained": str(tmp_path / "plain")})
    )
    torch.testing.assert_close(fresh.eval()(images()), expected, rtol=1e-4, atol=1e-4)


def test_export_follows_the_eager_model():
    model = randomise(MODELS.create(config(adapter={**LORA, "dropout": 0.0}))).eval()
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images()), model(images()), rtol=1e-4, atol=1e-4)


# ---- few shots ----
def test_few_shots_are_seeded_balanced_and_nested():
    data = EmbeddedDataset("digits", split="train")
    chosen = {shots: FewShotDataset(data, shots=shots, seed=1) for shots in SHOTS}
    for shots, few in chosen.items():
        assert len(few) == 10 * shots and [few.labels.count(i) for i in range(10)] == [shots] * 10
    drawn = {shots: few_shot_indices(data.labels, shots, 1, WORDS) for shots in SHOTS}
    assert set(drawn[1]) < set(drawn[4]) < set(drawn[16]) and len(set(drawn[16])) == 160
    assert drawn[4] == few_shot_indices(data.labels, 4, 1, WORDS) != few_shot_indices(data.labels, 4, 2, WORDS)
    assert len(data) > 1000  # the set it was drawn from is left alone
    sample = chosen[4][7]
    assert sample["data_samples"]["label"] == chosen[4].labels[7] and sample["data_samples"]["index"] == 7
    assert chosen[4].transform is data.transform and chosen[4].metainfo["classes"] == data.metainfo["classes"]


def test_a_classs_draw_does_not_depend_on_the_others():
    labels = [0, 1, 0, 1, 0, 1, 0]
    without = few_shot_indices([0, 0, 0, 0], 2, 5, "a")
    both = few_shot_indices(labels, 2, 5, "ab")
    assert [i // 2 for i in both if labels[i] == 0] == without


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_few_shots_of_folders_and_tables(tmp_path, kind):
    rows = [("path", "label")]
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3 if name == "a" else 5):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
            rows.append((f"{name}/{i}.png", name))
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    inner = {
        "folder": {"type": "ImageFolderDataset", "root": str(tmp_path)},
        "table": {"type": "CSVDataset", "file": str(tmp_path / "list.csv")},
    }[kind]
    few = DATASETS.create({"type": "FewShotDataset", "shots": 2, "seed": 3, "dataset": inner})
    assert few.labels == [0, 1, 0, 1] and few[0]["inputs"].shape == (3, 224, 224)
    with pytest.raises(ZooError, match="class 'a' has 3 images, 4 are asked for"):
        DATASETS.create({"type": "FewShotDataset", "shots": 4, "dataset": inner})
    with pytest.raises(OptionError, match="whole number"):
        DATASETS.create({"type": "FewShotDataset", "shots": 0, "dataset": inner})


# ---- the protocol ----
def protocol(folder: Path) -> Config:
    """The shipped recipe on a tiny CLIP, digits and no GPU."""
    cfg = Config.fromfile(str(FOLDER / "clip_vit_b16_lora_fewshot.py"), lazy_import=False)
    cfg.model.backbone = dict(type="OpenCLIPModel", name="tiny-vit")
    cfg.model.head.update(classes=WORDS)
    size = (32, 32)
    cfg.model.preprocessing.size = size
    cfg.train_dataloader.dataset.dataset = dict(
        type="EmbeddedDataset", transform=dict(type="TrainTransform", size=size, scale=(0.8, 1.0), flip=0.0)
    )
    test = dict(type="EmbeddedDataset", split="val", limit_per_class=5, transform=dict(type="EvalTransform", size=size))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.num_workers = 0
    cfg.val_dataloader.dataset = cfg.test_dataloader.dataset = test
    cfg.classes = [str(i) for i in range(10)]
    cfg.optim_wrapper.amp = None
    cfg.work_dir = str(folder)
    return cfg


def test_recipe_numbers_are_clip_loras():
    cfg = Config.fromfile(str(FOLDER / "clip_vit_b16_lora_fewshot.py"), lazy_import=False)
    for shots in SHOTS:
        for seed in SEEDS:
            cell = few_shot_run(cfg, shots=shots, seed=seed)
            assert cell.train_cfg == dict(by_epoch=False, max_iters=500 * shots, val_interval=500 * shots)
            assert (cell.train_dataloader.dataset.shots, cell.train_dataloader.dataset.seed) == (shots, seed)
            assert cell.randomness.seed == seed
    assert cfg.train_cfg.max_iters == 8000  # the config itself is left alone
    assert cfg.optim_wrapper.optimizer == dict(type="adamw", lr=2e-4, weight_decay=1e-2, betas=(0.9, 0.999))
    assert cfg.train_dataloader.batch_size == 32 and cfg.model.adapter.dropout == 0.25
    with pytest.raises(OptionError, match="does not train a FewShotDataset"):
        few_shot_run(Config.fromfile(str(FOLDER / "lite0_lora_digits.py"), lazy_import=False), shots=1, seed=1)


def test_recipe_runs(tmp_path):
    cfg = protocol(tmp_path)
    cfg.train_dataloader.dataset.shots = 4
    cfg.train_cfg = dict(by_epoch=False, max_iters=30, val_interval=30)
    cfg.optim_wrapper.optimizer.lr = 2e-2  # a network that knows nothing yet has further to go
    cfg.default_hooks = dict(progress=None)
    runner = ZooRunner.from_cfg(cfg)
    losses, rates = [], []
    step = runner.model.train_step

    def recorded(data: Any, optim_wrapper: Any) -> Any:
        rates.append(optim_wrapper.param_groups[0]["lr"])
        outputs = step(data, optim_wrapper)
        losses.append(outputs["loss"].item())
        return outputs

    runner.model.train_step = recorded
    runner.train()
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    assert rates[0] == 2e-2 and rates[-1] < 1e-3 and rates == sorted(rates, reverse=True)
    again = zoo.load(tmp_path / "adapter")
    runner.bare_model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images()), runner.bare_model(images()))
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 0 <= float(rows[-1]["val/top1"]) <= 1 and rows[-1]["step"] == "30"


@pytest.mark.parametrize(
    "name, trained", [("clip_vit_b16_lora_fewshot", 184_320), ("clip_vit_b16_block_lora_fewshot", 138_240)]
)
def test_trained_numbers_of_the_shipped_configs(name, trained):
    """Rank 2 on q, k and v of 12 blocks of width 768 and 12 of width 512; in shapes only, without 150 M numbers."""
    options = Config.fromfile(str(FOLDER / f"{name}.py"), lazy_import=False).model.to_dict()
    options["backbone"]["pretrained"] = False
    with torch.device("meta"):
        model = MODELS.create(options)
    assert count(model) == (trained, 149_620_737)
    assert isinstance(model.backbone.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)  # as OpenAI trained it


# ---- sentences ----
def test_templates_of_the_eleven_sets():
    assert len(TEMPLATES) == 11 and TEMPLATES.keys() == CLASSES_OF.keys()
    assert all(sentence.count("{}") == 1 for sentence in TEMPLATES.values())
    assert template_of("eurosat") == "a centered satellite photo of {}." and template_of("imagenet") == GENERIC
    with pytest.raises(UnknownNameError, match="did you mean 'oxford_pets'"):
        template_of("oxford_pet")
