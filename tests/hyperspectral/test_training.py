"""A whole run in small: report, baselines, maps, saved folder, prediction from files, and mistakes said beforehand."""

import csv
import json

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from scipy.io import loadmat, savemat

from backbones.lola_specvit_layers import GatedLoRALinear
from tasks.hyperspectral.maps import predict_scene
from tasks.hyperspectral.scenes import load_scene
from tasks.hyperspectral.schedule import cycle_rate, low_rank_parameters
from tools.predict import main as predict_main
from tools.test import main as evaluate_main
from zoo.engine.runner import ZooRunner
from zoo.errors import OptionError, ZooError

TRAIN = dict(name="composed", size=(36, 36), parcels=30)
TEST = dict(name="composed", half="second", seed=5, size=(20, 24), parcels=14)
SPLIT = dict(how="random", train=0.3, val=0.2)
CLASSES = 12


def run_config(folder, hooks=(dict(type="SpectralReport"),), **changes):
    reduction = dict(components=6, whiten=0.5, unit_length=True)
    data = dict(type="SpectralPatches", patch=5, reduction=reduction)
    order = dict(type="DefaultSampler", shuffle=True)
    backbone = dict(type="TimmBackbone", name="lola_specvit_tidy", in_chans=6, img_size=5, dim=8)
    backbone |= dict(depths=(1, 1), num_heads=(1, 2), front=(2, 4))
    config = Config(
        dict(
            model=dict(
                type="SpectralClassifier",
                backbone=backbone,
                head=dict(type="LinearHead", num_classes=CLASSES),
                patch=5,
                reduction=dict(bands=180, components=6, unit_length=True),
            ),
            train_dataloader=dict(
                batch_size=32, sampler=order, dataset=dict(scene=TRAIN, split=SPLIT, part="train", **data)
            ),
            val_dataloader=dict(
                batch_size=256,
                sampler=dict(order, shuffle=False),
                dataset=dict(scene=TRAIN, split=SPLIT, part="val", **data),
            ),
            test_dataloader=dict(
                batch_size=256,
                sampler=dict(order, shuffle=False),
                dataset=dict(scene=TEST, split=dict(how="all"), part="test", fit_scene=TRAIN, fit_split=SPLIT, **data),
            ),
            val_evaluator=dict(type="SceneMetric"),
            test_evaluator=dict(type="SceneMetric", prefix="test"),
            train_cfg=dict(max_epochs=6, val_interval=3),
            val_cfg=dict(),
            test_cfg=dict(),
            optim_wrapper=dict(optimizer=dict(type="adamw", lr=5e-3)),
            custom_hooks=list(hooks),
            randomness=dict(seed=0),
            work_dir=str(folder),
        )
    )
    config.merge_from_dict(changes)
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished run with a baseline: (runner, work folder)."""
    folder = tmp_path_factory.mktemp("run")
    baselines = dict(type="SpectralBaselines", methods=("lda",), per_class=40)
    runner = ZooRunner.from_cfg(run_config(folder, (dict(type="SpectralReport"), baselines)))
    runner.train()
    return runner, folder


def rows(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_it_learns_and_writes_every_number(done):
    table = rows(done[1] / "results.csv")
    assert float(table[-1]["loss"]) < float(table[0]["loss"])
    assert float(table[-1]["val/OA"]) > 0.3 and {"val/AA", "val/kappa"} <= set(table[0])
    names = [row["name"] for row in rows(done[1] / "baselines.csv")]
    assert names == ["LDA", "LDA, mean of 5 x 5", "this run"]
    assert all(0.1 < float(row["OA"]) <= 1 for row in rows(done[1] / "baselines.csv"))


@pytest.mark.parametrize(("stem", "shape"), [("val", (36, 36)), ("test", (20, 24))])
def test_maps_in_every_form(done, stem, shape):
    folder = done[1]
    labels = np.load(folder / f"{stem}_labels.npy")
    uncertainty = np.load(folder / f"{stem}_uncertainty.npy")
    stored = loadmat(folder / f"{stem}_map.mat")
    assert labels.shape == uncertainty.shape == shape and 1 <= labels.min() <= labels.max() <= CLASSES
    assert uncertainty.min() >= 0 and uncertainty.max() <= 1
    np.testing.assert_array_equal(stored["labels"], labels)
    assert len(stored["classes"].ravel()) == CLASSES
    with Image.open(folder / f"{stem}_map.png") as picture:
        picture.load()
        assert picture.width > 800 and len(picture.convert("L").getcolors()) > 50


def test_maps_agree_with_the_evaluation(done):
    """The table's accuracy, worked out again from the map on disk."""
    truth = load_scene(**TEST).labels
    labels = np.load(done[1] / "test_labels.npy")
    own = rows(done[1] / "baselines.csv")[-1]
    assert (labels == truth).mean() == pytest.approx(float(own["OA"]), abs=1e-4)


def test_tiles_do_not_show(done):
    cube = load_scene(**TEST).cube
    whole = predict_scene(done[0].bare_model, cube, rows=20, batch=1000)
    tiled = predict_scene(done[0].bare_model, cube, rows=3, batch=7)
    assert (whole.labels == tiled.labels).mean() > 0.995  # sums in another order may turn a tie
    np.testing.assert_allclose(whole.uncertainty, tiled.uncertainty, atol=1e-4)


def test_saved_model_is_tested_to_the_same_number(done, tmp_path):
    config = run_config(tmp_path / "again")
    config.dump(tmp_path / "config.py")
    out = tmp_path / "numbers.json"
    arguments = [str(tmp_path / "config.py"), str(done[1] / "adapter"), "--work-dir", str(tmp_path / "t")]
    assert evaluate_main([*arguments, "--out", str(out)]) == 0
    expected = float(rows(done[1] / "baselines.csv")[-1]["OA"])
    assert json.loads(out.read_text())["test/OA"] == pytest.approx(expected, abs=1e-4)


def test_prediction_from_files(done, tmp_path, capsys):
    scene = load_scene(**TEST)
    savemat(tmp_path / "new.mat", {"cube": scene.cube})
    savemat(tmp_path / "new_gt.mat", {"gt": scene.labels})
    cube = scene.cube.copy()
    cube[3, 4, 5] = np.nan
    np.save(tmp_path / "holes.npy", cube)
    np.save(tmp_path / "narrow.npy", scene.cube[..., :100])
    assert predict_main([str(done[1] / "adapter"), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "(rows, columns, 180), got (20, 24, 100)" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    by_name = {entry["path"].rpartition("/")[2]: entry for entry in found["predictions"]}
    assert set(by_name) == {"new.mat", "holes.npy"} and len(found["skipped"]) == 1
    own = rows(done[1] / "baselines.csv")[-1]
    assert by_name["new.mat"]["metrics"]["OA"] == pytest.approx(float(own["OA"]), abs=1e-4)
    assert found["labels"][0] == "soil" and by_name["holes.npy"]["pixels"]["unpredicted"] == 1
    labels = np.load(tmp_path / "out" / "holes_labels.npy")
    assert labels[3, 4] == 0 and (labels > 0).sum() == labels.size - 1
    assert all((tmp_path / "out" / name).is_file() for name in by_name["new.mat"]["files"])


def test_nothing_to_predict(done, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert predict_main([str(done[1] / "adapter"), str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 2
    assert "the folder holds no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.head.num_classes": 11}, "num_classes=11, the scene 12 classes"),
        ({"model.reduction.bands": 100}, r"has 180 bands, reduced to 6; the model's `reduction` says \(100, 6\)"),
        ({"model.patch": 7}, "patches of 5 do not fit a model of patch=7"),
        ({"classes": ["a", "b"]}, "config's classes"),
        ({"val_dataloader.dataset.reduction.whiten": 1.0}, "reduced by different bases"),
    ],
)
def test_what_does_not_fit_is_said_before_training(tmp_path, changes, message):
    with pytest.raises(OptionError, match=message):
        ZooRunner.from_cfg(run_config(tmp_path, **changes)).train()
    assert not (tmp_path / "results.csv").exists()


def test_a_test_scene_reduced_on_its_own_is_refused(done, tmp_path):
    config = run_config(tmp_path)
    config.load_from = str(done[1] / "adapter")
    del config.test_dataloader.dataset["fit_scene"], config.test_dataloader.dataset["fit_split"]
    with pytest.raises(OptionError, match="another basis"):
        ZooRunner.from_cfg(config).test()


def test_cyclic_rates_for_low_rank_tensors(tmp_path):
    lora = {"model.backbone.lora": dict(rank=2, gate_rank=2), "train_cfg.max_epochs": 1}
    config = run_config(tmp_path, (dict(type="CyclicLoRA", first=3, lowest=1e-6, scale=2.0),), **lora)
    runner = ZooRunner.from_cfg(config)
    runner.train()
    model = runner.bare_model
    low = low_rank_parameters(model)
    assert low == {
        id(p) for m in model.modules() if isinstance(m, GatedLoRALinear) for a in m.added() for p in a.parameters()
    }
    last = runner.iter - 1
    for group in runner.optim_wrapper.optimizer.param_groups:
        factor = {2.0 if id(p) in low else 1.0 for p in group["params"]}
        assert len(factor) == 1
        assert group["lr"] == pytest.approx(cycle_rate(last, 5e-3, first=3, lowest=1e-6, scale=factor.pop()))
    config.param_scheduler = [dict(type="LinearLR", start_factor=0.5, end=1)]
    with pytest.raises(OptionError, match="param_scheduler="):
        ZooRunner.from_cfg(config).train()
    with pytest.raises(ZooError, match="at least 1"):
        ZooRunner.from_cfg(run_config(tmp_path, (dict(type="CyclicLoRA", first=0),))).train()
