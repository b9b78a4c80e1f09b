"""The comparison tool: specs, runs in processes of their own, resuming, choosing a rate, failures, table, picture."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest
from matplotlib.text import Text
from mmengine.config import Config
from PIL import Image

from tools.compare import main
from zoo.compare.methods import Method, methods_of
from zoo.compare.plan import compare, fingerprint
from zoo.compare.plot import KINDS, accuracy_figure
from zoo.compare.table import COLUMNS, chosen_rate, markdown, read_rows, summarise, write_rows
from zoo.errors import OptionError, UnknownNameError, ZooError

CONFIG = """
default_scope = "zoo"
_data = dict(type="EmbeddedDataset", name="digits", transform=dict(type="EvalTransform", size=(32, 32), crop_pct=1.0))
_fixed = dict(type="DefaultSampler", shuffle=False)
model = dict(
    type="ImageClassifier",
    backbone=dict(type="TimmBackbone", name="test_efficientnet"),
    head=dict(type="LinearHead", num_classes=10),
    preprocessing=dict(size=(32, 32), crop_pct=1.0),
)
train_dataloader = dict(
    batch_size=10, sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(split="train", limit_per_class=3, **_data),
)
val_dataloader = dict(batch_size=40, sampler=_fixed, dataset=dict(split="val", limit_per_class=4, **_data))
test_dataloader = dict(batch_size=40, sampler=_fixed, dataset=dict(split="test", limit_per_class=4, **_data))
train_cfg = dict(max_epochs=1)
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type="ClassificationMetric")
test_evaluator = dict(type="ClassificationMetric", prefix="test")
optim_wrapper = dict(optimizer=dict(type="adamw", lr=5e-3))
methods = {
    "LoRA r4": dict(adapter=dict(type="LoRA", rank=4, where=["conv"]), lr=[1e-2, 1e-3]),
    "Probe": dict(adapter="LinearProbe", lr=1e-2),
}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def done(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The two methods of the config, and one that does not fit, with one seed: (folder, exit code)."""
    out = tmp_path_factory.mktemp("out")
    specs = ["LoRA r4", "Probe", "AdaptFormer:width=8"]
    return out, main([str(config), "--methods", *specs, "--seeds", "0", "--out", str(out)])


def load(config: Path) -> Config:
    return Config.fromfile(str(config), lazy_import=False)


def test_rows_hold_what_was_measured(done: tuple[Path, int]) -> None:
    out, _ = done
    rows = {(row["method"], row["lr"]): row for row in read_rows(out / "results.csv")}
    assert list(rows) == [("LoRA r4", 1e-3), ("LoRA r4", 1e-2), ("Probe", 1e-2), ("AdaptFormer:width=8", 5e-3)]
    lora, probe = rows["LoRA r4", 1e-2], rows["Probe", 1e-2]
    assert (lora["kind"], probe["kind"]) == ("merges", "selection")
    assert 0 <= lora["test"] <= 1 and lora["test"] * 40 == pytest.approx(round(lora["test"] * 40))  # 40 test images
    folder = out / "runs" / "LoRA_r4_seed0_lr0.01"
    assert lora["checkpoint_bytes"] == sum(f.stat().st_size for f in (folder / "adapter").iterdir())
    assert not (folder / "resume").exists()
    assert lora["trained"] > probe["trained"] > 0 and lora["checkpoint_bytes"] > probe["checkpoint_bytes"]
    for row in (lora, probe):
        assert all(row[key] > 0 for key in ("step_ms", "memory_mib", "latency_ms", "merged_ms"))
    assert probe["merged_ms"] == probe["latency_ms"]


def test_a_method_that_does_not_fit_is_a_row_with_its_reason(done: tuple[Path, int]) -> None:
    out, code = done
    failed = read_rows(out / "results.csv")[-1]
    assert code == 1 and "roles mlp" in failed["error"] and "test" not in failed
    line = (out / "table.md").read_text().splitlines()[-1]
    assert line.startswith("| AdaptFormer:width=8 | failed: ") and "roles mlp" in line


def test_only_what_is_missing_runs_again(done: tuple[Path, int], config: Path, capsys: pytest.CaptureFixture) -> None:
    out, _ = done
    before = (out / "results.csv").read_bytes()
    assert main([str(config), "--methods", "LoRA r4", "Probe", "--seeds", "0", "--out", str(out)]) == 1
    assert (out / "results.csv").read_bytes() == before  # times included: nothing was run
    assert "validation" not in capsys.readouterr().out
    table = [line.split(" | ")[0] for line in (out / "table.md").read_text().splitlines()[2:]]
    assert table == ["| Probe", "| LoRA r4", "| AdaptFormer:width=8"]  # by trained parameters, failures last


def test_picture(done: tuple[Path, int]) -> None:
    with Image.open(done[0] / "accuracy.png") as picture:
        picture.load()
        assert min(picture.size) > 600 and len(picture.convert("L").getcolors()) > 20


def test_another_budget_is_refused_in_the_same_folder(
    done: tuple[Path, int], config: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [str(config), "--methods", "Probe", "--out", str(done[0])]
    assert main([*command, "--cfg-options", "train_cfg.max_epochs=2"]) == 2
    assert "another config" in capsys.readouterr().err
    one, two = load(config), load(config)
    two.model.adapter, two.optim_wrapper.optimizer.lr = dict(type="LoRA"), 1.0
    assert fingerprint(one) == fingerprint(two)  # what differs between methods is no part of the budget
    two.train_dataloader.batch_size = 5
    assert fingerprint(one) != fingerprint(two)


def die(config: dict[str, object], filename: str | None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as the system does to a process that wants too much memory


def test_a_process_that_dies_is_a_row(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.compare.run.work", die)
    rows = compare(load(config), [Method("Probe", {"type": "LinearProbe"}, (1e-2,))], [0, 1], tmp_path)
    assert [row["seed"] for row in rows] == [0]  # no rate was found to work for seed 1
    assert "SIGKILL" in rows[0]["error"]
    line = markdown(rows).splitlines()[-1]
    assert line.startswith("| Probe | failed: the process ended without a result (SIGKILL)")


def test_specs() -> None:
    config = Config(dict(methods=dict(mine=dict(adapter=dict(type="LoRA", rank=4), lr=[1e-3, 1e-2])), optim_wrapper={}))
    config.optim_wrapper.optimizer = dict(lr=0.5)
    specs = ["mine:rank=2,where=['q','v'],init=pissa", "BitFit", "SSF:lr=[0.1,0.2]"]
    first, second, third = methods_of(config, specs)
    assert first == Method(specs[0], dict(type="LoRA", rank=2, where=["q", "v"], init="pissa"), (1e-3, 1e-2))
    assert second == Method("BitFit", dict(type="BitFit"), (0.5,))
    assert third.rates == (0.1, 0.2) and third.adapter == dict(type="SSF")
    assert [m.rates for m in methods_of(config, specs, [3.0])] == [(3.0,), (3.0,), (0.1, 0.2)]
    assert [m.name for m in methods_of(config)] == ["mine"]


@pytest.mark.parametrize(
    ("specs", "error", "text"),
    [
        (["LoRa"], UnknownNameError, "did you mean 'LoRA'"),
        (["LoRA:rank"], OptionError, "expected NAME:option=value"),
        (["LoRA:lr=0"], OptionError, "numbers above 0"),
        (["LoRA", "LoRA"], OptionError, "named twice"),
        (None, OptionError, "nothing to compare"),
        (["none:rank=4"], OptionError, "takes no options"),
    ],
)
def test_mistakes_in_specs(specs: list[str] | None, error: type[ZooError], text: str) -> None:
    config = Config(dict(optim_wrapper=dict(optimizer=dict(lr=0.1))))
    if specs and specs[0].startswith("none"):
        config.methods = dict(none=dict(adapter=None))
    with pytest.raises(error, match=text):
        methods_of(config, specs)


def made_up(method: str, seed: int, lr: float, val: float, test: float, **more: object) -> dict[str, object]:
    costs = dict(trained=1000, checkpoint_bytes=5000, step_ms=2.0, memory_mib=9.0, latency_ms=1.0, seconds=1.0)
    row = dict(budget="b", method=method, adapter="{}", seed=seed, lr=lr, val=val, test=test, kind="stays")
    return {**row, **costs, **more}


def test_the_rate_is_chosen_by_validation_on_the_first_seed_alone(tmp_path: Path) -> None:
    rows = [made_up("A", 3, 0.1, 0.7, 0.99), made_up("A", 3, 0.2, 0.8, 0.60), made_up("A", 4, 0.2, 0.1, 0.70)]
    rows.append(made_up("A", 4, 0.1, 0.9, 0.9))  # a leftover of another choice must not count
    write_rows(tmp_path / "t.csv", rows)
    assert read_rows(tmp_path / "t.csv") == rows
    assert chosen_rate(rows) == 0.2
    (one,) = summarise(rows)
    assert one.tests == (0.60, 0.70) and one.mean == pytest.approx(0.65)
    assert one.deviation == pytest.approx(0.1 / 2**0.5)  # sample deviation of two numbers
    assert "| A | 65.0 ± 7.1 | 1,000 | 5 | 2 | 9 | 1.0 |  | 0.2 |" in markdown(rows)  # not mergeable: an empty cell


def test_a_lost_seed_is_said() -> None:
    lost = {k: v for k, v in made_up("A", 1, 0.1, 0, 0).items() if k in ("budget", "method", "adapter", "seed", "lr")}
    rows = [made_up("A", 0, 0.1, 0.7, 0.5), {**lost, "error": "loss is\nnan | inf"}]
    assert "| 50.0 (1 seed; loss is nan / inf) |" in markdown(rows)
    rows = [made_up("A", seed, 0.1, 0.7, 0.5) for seed in (0, 1)] + [made_up("B", 0, 0.1, 0.7, 0.6)]
    assert "| A | 50.0 ± 0.0 |" in markdown(rows) and "| B | 60.0 (1 seed) |" in markdown(rows)


def test_a_foreign_table_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(ZooError, match="not a table of this tool"):
        read_rows(tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        assert next(csv.reader(file)) != list(COLUMNS)


def test_names_in_the_picture_do_not_cover_each_other() -> None:
    rows = []
    for number in range(14):  # crowded on purpose: all within two per cent
        kind = list(KINDS)[number % 3]
        for seed in (0, 1):
            test = 0.9 + 0.001 * number + 0.002 * seed
            rows.append(made_up(f"method {number}", seed, 0.1, 0.5, test, trained=20_000 + 900 * number, kind=kind))
    figure = accuracy_figure(summarise(rows), "crowded")
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_text().startswith("method")]
    # Text's own: an annotation's extent would include its line.
    boxes = [Text.get_window_extent(text) for text in names]
    assert len(boxes) == 14
    touching = [(i, j) for i in range(14) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert not touching
