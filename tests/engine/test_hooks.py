"""Averages, the stop on NaN, the progress line and the results table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from running import train

from zoo.engine.nan_guard import NonFiniteLossError
from zoo.engine.state import read_resume_file
from zoo.engine.weights import load_weights
from zoo.errors import CheckpointError, OptionError
from zoo.freeze import trainable_parameters


def test_average_equals_the_formula(tmp_path: Path) -> None:
    """Every step was saved, so the average can be computed from the saved raw weights."""
    runner = train(tmp_path, train_cfg__max_epochs=1, default_hooks__checkpoint__keep=10)
    saved = [read_resume_file(tmp_path / f"resume/step_{n:08d}.pth") for n in range(1, 7)]
    raw = [content["state_dict"]["head.fc.weight"] for content in saved]
    from tiny_task import TinyTask

    expected = TinyTask().head.fc.weight.detach().double()
    for n, weight in enumerate(raw, 1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.double()
    averaged = saved[-1]["averaged"]["tensors"]
    assert averaged.keys() == trainable_parameters(runner.bare_model).keys()
    assert torch.allclose(averaged["head.fc.weight"].double(), expected, atol=1e-6)
    assert not torch.equal(averaged["head.fc.weight"], raw[-1])
    # the result of training is the average; training itself went on from the raw weights
    assert torch.equal(runner.bare_model.head.fc.weight, averaged["head.fc.weight"])


def test_nan_stops_with_step_samples_and_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError) as caught:
        train(tmp_path, train_dataloader__dataset__poison=5)
    told = str(caught.value)
    files = sorted((tmp_path / "resume").glob("step_*.pth"))
    step = int(files[-1].stem.split("_")[1]) if files else 0
    assert f"step {step + 1} (epoch 1)" in told and "image_5.png" in told and "loss_cls=nan" in told
    assert not files or str(files[-1]) in told
    for file in files:
        assert all(t.isfinite().all() for t in read_resume_file(file)["state_dict"].values())


def test_results_have_one_row_an_evaluation(tmp_path: Path) -> None:
    train(tmp_path, train_cfg__max_epochs=2)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "6"), ("2", "12")]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["loss_cls"])) and 0 <= float(row["tiny/accuracy"]) <= 1
        assert float(row["images_per_s"]) > 0 and float(row["peak_memory_mib"]) > 10 and float(row["lr"]) > 0


def test_without_evaluation_there_is_a_row_an_epoch(tmp_path: Path) -> None:
    train(tmp_path, train_cfg__max_epochs=2, val_dataloader=None, val_cfg=None, val_evaluator=None)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


def test_summary_and_progress_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = train(tmp_path, train_cfg__max_epochs=2, default_hooks__progress={"type": "Progress", "interval": 4})
    out, err = capsys.readouterr()
    trained = sum(p.numel() for p in trainable_parameters(runner.bare_model).values())
    assert f"{trained:,} of " in out and "tiny/accuracy = " in out and "python tools/test.py" in out
    assert len([line for line in err.splitlines() if "images/s" in line]) == 3  # steps 4, 8, 12
    assert len(err.splitlines()) < 10  # no dump of the environment


@pytest.mark.parametrize("source", ["adapter", "resume/best.pth", "resume/step_00000012.pth"])
def test_what_was_saved_can_be_loaded_and_evaluates_the_same(tmp_path: Path, source: str) -> None:
    from tiny_task import TinyTask

    runner = train(tmp_path, train_cfg__max_epochs=2)
    model = TinyTask(data_preprocessor={"type": "ZooPreprocessor", "mean": (0.4,) * 3, "std": (0.2,) * 3})
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.zero_()
    load_weights(model, tmp_path / source)
    if source != "resume/best.pth":
        ours, theirs = trainable_parameters(model), trainable_parameters(runner.bare_model)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(p.abs().sum() > 0 for name, p in trainable_parameters(model).items() if name.endswith("weight"))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    train(tmp_path, train_cfg__max_epochs=1)
    with pytest.raises(CheckpointError, match="not in the model"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "resume/step_00000006.pth")


def test_a_metric_that_is_not_reported_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="tiny/accuracy"):
        train(tmp_path, train_cfg__max_epochs=1, default_hooks__checkpoint__best="top1")


def test_mmengine_checkpoint_hook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="SafeCheckpoint"):
        train(tmp_path, train_cfg__max_epochs=1, default_hooks__checkpoint={"type": "CheckpointHook", "interval": 1})


def test_trackers_must_be_installed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="pip install neptune"):
        train(tmp_path, visualizer={"type": "Visualizer", "vis_backends": [{"type": "NeptuneVisBackend"}]})


def test_compiled_training_keeps_keys(tmp_path: Path) -> None:
    plain = train(tmp_path / "a", train_cfg__max_epochs=1, custom_hooks=[], model__dropout=False)
    compiled = train(
        tmp_path / "b", train_cfg__max_epochs=1, custom_hooks=[], model__dropout=False, compile={"backend": "aot_eager"}
    )
    a, b = plain.bare_model.state_dict(), compiled.bare_model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_bf16_training_stays_close(tmp_path: Path) -> None:
    runner = train(tmp_path, train_cfg__max_epochs=1, optim_wrapper__amp="bf16")
    assert all(p.isfinite().all() and p.dtype is torch.float32 for p in runner.bare_model.parameters())
