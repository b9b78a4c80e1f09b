"""A whole run in small: baseline, table, report, saved folder, prediction from files."""

import csv
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import get_priority
from PIL import Image

from tasks.classification.data import EmbeddedDataset
from tasks.classification.predict import classify, predict_files
from tasks.classification.probe import ProbeBaseline
from tasks.classification.report import ClassificationReport, confusion_figure, curves_figure
from tools.predict import main as predict_main
from zoo.engine.results import Results
from zoo.engine.runner import ZooRunner
from zoo.errors import OptionError, ZooError

GEOMETRY = {"size": (32, 32), "crop_pct": 1.0}
REPORT, PROBE = {"type": "ClassificationReport"}, {"type": "ProbeBaseline", "rates": (1e-2, 3e-2)}


def run_config(folder, hooks=(REPORT,), **train_data):
    data = {"type": "EmbeddedDataset", "name": "digits", "transform": {"type": "EvalTransform", **GEOMETRY}}
    order = {"type": "DefaultSampler", "shuffle": True}
    return Config(
        dict(
            model=dict(
                type="ImageClassifier",
                backbone=dict(type="TimmBackbone", name="test_efficientnet"),
                head=dict(type="LinearHead", num_classes=10),
                adapter=dict(type="LoRA", rank=4, where=["conv"]),
                preprocessing=GEOMETRY,
            ),
            train_dataloader=dict(
                batch_size=16, sampler=order, dataset={**data, "split": "train", "limit_per_class": 12, **train_data}
            ),
            val_dataloader=dict(
                batch_size=50,
                sampler={**order, "shuffle": False},
                dataset={**data, "split": "val", "limit_per_class": 6},
            ),
            val_evaluator=dict(type="ClassificationMetric"),
            train_cfg=dict(max_epochs=2),
            val_cfg=dict(),
            optim_wrapper=dict(optimizer=dict(type="adamw", lr=5e-3)),
            custom_hooks=list(hooks),
            randomness=dict(seed=0),
            work_dir=str(folder),
        )
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished run with the baseline: (runner, work folder)."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    runner = ZooRunner.from_cfg(run_config(folder, (REPORT, PROBE)))
    runner.train()
    return runner, folder


def rows(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_table_holds_both_numbers_of_each_epoch(done):
    runner, folder = done
    table = rows(folder)
    hook = next(h for h in runner.hooks if isinstance(h, ProbeBaseline))
    assert [float(row["probe/top1"]) for row in table] == hook.curve
    assert len(hook.curve) == 2 and hook.rate in (1e-2, 3e-2)
    assert float(table[1]["loss"]) < float(table[0]["loss"])
    text = hook.comparison(runner.bare_model)
    assert f"{100 * (float(table[1]['val/top1']) - hook.curve[-1]):+.1f} points" in text


def test_the_baseline_does_not_disturb_the_run(done, tmp_path):
    """Same seed with and without it: every trained tensor ends bit-equal, on the same images in the same order."""
    torch.manual_seed(0)
    alone = ZooRunner.from_cfg(run_config(tmp_path))
    alone.train()
    with_baseline = done[0].bare_model.state_dict()
    assert all(torch.equal(value, with_baseline[key]) for key, value in alone.bare_model.state_dict().items())
    assert "probe/top1" not in rows(tmp_path)[0]


def test_the_baseline_is_a_head_trained_on_the_plain_backbone(done, tmp_path):
    """Worked out again without its shortcuts: no cached features, images from the loader, plain torch AdamW."""
    hook = next(h for h in done[0].hooks if isinstance(h, ProbeBaseline))
    config = run_config(tmp_path)
    model = ZooRunner.from_cfg(config).bare_model.eval()  # same seed: same head at the start; LoRA is the identity
    training = ZooRunner.build_dataloader(config.train_dataloader.to_dict(), seed=0)
    validation = ZooRunner.build_dataloader(config.val_dataloader.to_dict(), seed=0)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=hook.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * len(training))
    curve = []
    for epoch in range(2):
        training.batch_sampler.set_epoch(epoch)
        for batch in training:
            loss = model(**model.data_preprocessor(batch), mode="loss")["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            results = [
                found["label"] == sample["label"]
                for batch in validation
                for found, sample in zip(
                    model(**model.data_preprocessor(batch), mode="predict"), batch["data_samples"], strict=True
                )
            ]
        curve.append(sum(results) / len(results))
    assert curve == pytest.approx(hook.curve, abs=1 / 60 + 1e-9)  # one image of 60 may fall the other way by rounding


def test_pictures(done):
    folder = done[1]
    for name in ("curves.png", "confusion.png"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) > 400 and len(picture.convert("L").getcolors()) > 20  # not a blank sheet


def test_saved_folder_says_how_inputs_were_made(done):
    card = json.loads((done[1] / "adapter" / "config.json").read_text())
    assert card["labels"] == [str(i) for i in range(10)]  # from the data: the config names none
    assert card["preprocessing"]["normalise"] is True and card["preprocessing"]["size"] == [32, 32]
    assert card["metrics"]["val/top1"] == float(rows(done[1])[-1]["val/top1"])


def test_baseline_refuses_what_would_make_it_unfair(tmp_path):
    config = run_config(tmp_path, (PROBE,), transform={"type": "TrainTransform", "size": 32})
    with pytest.raises(OptionError, match="training transform without chance"):
        ZooRunner.from_cfg(config).train()
    config = run_config(tmp_path, (PROBE,))
    config.model.data_preprocessor = dict(batch_augment=dict(type="Mixup", num_classes=10))
    with pytest.raises(OptionError, match="no batch_augment"):
        ZooRunner.from_cfg(config).train()


def test_classes_must_agree_before_anything_trains(tmp_path):
    config = run_config(tmp_path)
    config.model.head.num_classes = 11
    with pytest.raises(OptionError, match="num_classes=11, the data 10 classes"):
        ZooRunner.from_cfg(config).train()
    config = run_config(tmp_path)
    config.classes = list("abcdefghij")
    with pytest.raises(OptionError, match="config's classes"):
        ZooRunner.from_cfg(config).train()
    for part, names in {"train": "ab", "val": "ba"}.items():
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "x.png")
        config[f"{part}_dataloader"].dataset = dict(
            type="ImageFolderDataset", root=str(tmp_path / part), classes=list(names)
        )
    config.model.head.num_classes = 2
    with pytest.raises(OptionError, match="differ in their classes"):
        ZooRunner.from_cfg(config).train()


@pytest.fixture
def files(tmp_path):
    """Eight digits of the test part as PNG files, one file that is no image, and an empty folder."""
    data = EmbeddedDataset("digits", split="test", transform={"type": "EvalTransform", **GEOMETRY})
    for i in range(8):
        Image.fromarray(data.items[i].image).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "empty").mkdir()
    return tmp_path, data


def test_prediction_from_files_equals_evaluation(done, files, tmp_path, capsys):
    folder, data = files
    out = tmp_path / "out"
    wanted = [str(folder / f"{i}.png") for i in range(8)]
    absent = [str(folder / name) for name in ("broken.jpg", "nowhere.png", "empty")]
    code = predict_main(
        [str(done[1] / "adapter"), *wanted, *absent, "--out", str(out), "--topk", "3", "--device", "cpu"]
    )
    assert code == 0
    content = json.loads((out / "predictions.json").read_text())
    assert [p["path"] for p in content["predictions"]] == wanted
    assert sorted(s["path"] for s in content["skipped"]) == sorted(absent)
    assert "8 predictions, 3 skipped" in capsys.readouterr().out
    expected = classify(done[0].bare_model, torch.stack([data[i]["inputs"] for i in range(8)]))
    for found, result in zip(content["predictions"], expected, strict=True):
        assert found["label"] == result["label"] and found["name"] == str(result["label"])
        assert found["score"] == pytest.approx(result["score"], abs=1e-6)
        assert len(found["topk"]) == 3 and found["topk"][0]["score"] >= found["topk"][1]["score"]
    with Image.open(out / "contact_sheet_001.png") as sheet:
        assert sheet.size[0] > 6 * 150  # six columns, and a second row for the other two


def test_results_so_far_survive_an_interruption(done, files, tmp_path, monkeypatch):
    folder, _ = files
    model, calls = done[0].bare_model, []
    original = type(model).predict

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(type(model), "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict_files(model, [folder / f"{i}.png" for i in range(8)], tmp_path / "out", batch=2)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]) == 4
    assert (tmp_path / "out" / "contact_sheet_001.png").is_file()


def test_nothing_readable_is_an_error(done, files, tmp_path, capsys):
    folder, _ = files
    with pytest.raises(ZooError, match="none of the 1 inputs could be read"):
        predict_files(done[0].bare_model, [folder / "broken.jpg"], tmp_path / "out")
    code = predict_main([str(done[1] / "adapter"), str(folder / "empty"), "--out", str(tmp_path / "out")])
    assert code == 2 and "the folder holds no images" in capsys.readouterr().err


def test_curves_by_epoch_or_by_step():
    by_epoch = curves_figure([{"epoch": i, "step": 9 * i, "loss": 1 / i, "val/top1": 0.5} for i in (1, 2)])
    assert by_epoch.axes[0].get_xlabel() == "epoch"
    by_step = curves_figure([{"epoch": 0, "step": 9 * i, "loss": 1 / i, "val/top1": 0.5} for i in (1, 2)])
    assert by_step.axes[0].get_xlabel() == "step"
    assert by_step.axes[0].lines[0].get_xdata().tolist() == [9, 18]
    assert [text.get_text() for text in by_step.axes[1].texts] == ["top-1 50.0%"]


def test_confusion_picture_names_the_worst_mix_up():
    figure = confusion_figure([[8, 0, 0], [5, 3, 0], [0, 0, 0]], ["cat", "dog", "owl"])
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "11 of 16 right (68.8%)"
    assert "dog as cat (5x)" in axes.get_xlabel()
    assert sorted(text.get_text() for text in axes.texts) == ["3", "5", "8"]
    large = confusion_figure(torch.eye(100, dtype=torch.int64), [f"class {i}" for i in range(100)]).axes[0]
    assert not large.texts and len(large.get_xticks()) <= 20 and "no mistakes" in large.get_xlabel()


def test_hooks_have_an_order():
    """The baseline adds its number before the table takes the metrics; the report reads the table afterwards."""
    order = [get_priority(hook.priority) for hook in (ProbeBaseline, Results, ClassificationReport)]
    assert order == sorted(set(order))


def test_a_resumed_run_brings_the_baseline_along(done, tmp_path, monkeypatch):
    """Continued after its first epoch: the same table in the end, and the baseline is not trained again."""
    runner, folder = done
    first = sorted((folder / "resume").glob("step_*.pth"))[0]
    monkeypatch.setattr(ProbeBaseline, "_train", None)
    config = run_config(tmp_path, (REPORT, PROBE))
    config.resume = str(first)
    resumed = ZooRunner.from_cfg(config)
    resumed.train()
    for key in ("step", "loss", "val/top1", "probe/top1"):
        assert [row[key] for row in rows(tmp_path)] == [row[key] for row in rows(folder)], key
    ours = runner.bare_model.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in resumed.bare_model.state_dict().items())
