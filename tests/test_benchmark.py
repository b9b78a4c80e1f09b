"""The measuring itself: candidates run in turn, failures and limits are text, and the page says what the CSV says."""

from __future__ import annotations

import fnmatch
import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from backbones.published_accuracy import PUBLISHED
from zoo.adapters.probe import derive_example
from zoo.benchmark import backbones as suite
from zoo.benchmark.report import Report, read_csv, table, write_csv
from zoo.benchmark.timing import LimitError, Timing, interleaved, time_limit
from zoo.catalog import own_backbones
from zoo.errors import CheckpointError, OptionError, UnknownNameError
from zoo.factory import create

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def run(*arguments: object) -> int:
    spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.main([str(argument) for argument in arguments]))


# ---- timing ----
def test_candidates_run_in_turn_after_their_warmup() -> None:
    calls: list[str] = []
    out = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3, warmup=2)
    assert "".join(calls) == "aabb" + "ababab"
    assert all(isinstance(o, Timing) and o.rounds == 3 and o.peak_bytes is None for o in out.values())


def test_medians_tell_fast_from_slow() -> None:
    waits = iter([0.0, 0.02, 0.02, 0.5, 0.02])  # warm-up, then rounds of which one was disturbed
    out = interleaved({"slow": lambda: time.sleep(next(waits)), "fast": lambda: None}, CPU, rounds=4, warmup=1)
    slow, fast = out["slow"], out["fast"]
    assert isinstance(slow, Timing) and isinstance(fast, Timing)
    assert 0.02 <= slow.seconds < 0.1 and fast.seconds < 0.01


def test_one_failure_is_text_and_stops_nobody() -> None:
    turns = iter(range(10))

    def later() -> None:
        if next(turns) == 2:
            raise RuntimeError("out of luck\nand a trace")

    def never() -> None:
        raise ValueError("no")

    out = interleaved({"never": never, "later": later, "good": lambda: None}, CPU, rounds=4, warmup=1)
    assert out["never"] == "ValueError: no" and out["later"] == "RuntimeError: out of luck"
    assert isinstance(out["good"], Timing) and out["good"].rounds == 4
    assert list(out) == ["never", "later", "good"]


def test_limits() -> None:
    out = interleaved({"stuck": lambda: time.sleep(5), "good": lambda: None}, CPU, rounds=2, limits={"stuck": 0.1})
    assert out["stuck"] == "LimitError: took longer than 0.1 s" and isinstance(out["good"], Timing)
    start = time.monotonic()
    out = interleaved({"long": lambda: time.sleep(0.06)}, CPU, rounds=100, warmup=1, limit=0.2)
    assert isinstance(out["long"], Timing) and 1 <= out["long"].rounds < 10
    assert time.monotonic() - start < 2
    with pytest.raises(LimitError), time_limit(0.05):
        time.sleep(1)
    time.sleep(0.1)  # no alarm is left behind
    with pytest.raises(OptionError, match="rounds, warmup and limit"):
        interleaved({"a": lambda: None}, CPU, rounds=0)


# ---- report ----
def test_csv_comes_back_as_it_was(tmp_path: Path) -> None:
    report = Report(
        {"device": "one: two, three", "batch": "2"}, [{"model": "a", "notes": 'b, "c" | d'}, {"model": "e"}]
    )
    write_csv(report, tmp_path / "x.csv")
    back = read_csv(tmp_path / "x.csv")
    assert back.header == report.header
    assert back.rows == [report.rows[0], {"model": "e", "notes": ""}]
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]
    lines = table(back.rows, {"model": "name", "notes": "notes"}).splitlines()
    assert lines == ["| name | notes |", "|---|---|", '| a | b, "c" \\| d |', "| e |  |"]


def test_a_foreign_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match="0 header lines, 1 rows"):
        read_csv(tmp_path / "x.csv")
    with pytest.raises(CheckpointError, match="does not exist; measure first"):
        read_csv(tmp_path / "y.csv")


# ---- suite `backbones` ----
def test_every_model_of_ours_is_in_the_suite_with_a_peer_of_its_size() -> None:
    left_out = {name for pattern in suite.LEFT_OUT for name in fnmatch.filter(own_backbones(), pattern)}
    assert {*own_backbones()} - {*suite.PEERS} == left_out
    assert {*PUBLISHED} <= {*suite.PEERS} and {*suite.COMPILED} <= {*suite.PEERS}
    sizes: dict[str, int] = {}
    for name in {*suite.PEERS, *suite.PEERS.values()}:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in create(name, num_classes=None).parameters())
    ratios = {name: sizes[name] / sizes[peer] for name, peer in suite.PEERS.items()}
    assert all(0.7 < ratio < 1.45 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("name", "expected"),  # counted by others over the same layers
    [
        ("slab_deit_tiny", 1.139),
        ("slab_pvt_tiny", 2.036),
        ("shvit_s1", 0.241),
        ("poolformer_s12_gn", 1.8),
        ("convit_tiny", 1.25),
    ],
)
def test_gmacs(name: str, expected: float) -> None:
    with torch.device("meta"):  # shapes are enough
        model = create(name, num_classes=None)
    assert suite.gmacs(model, derive_example(model)) == pytest.approx(expected, rel=0.01)


def test_gmacs_of_one_image_of_several() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert suite.gmacs(model, torch.zeros(4, 3, 4, 4)) == pytest.approx((3 * 9 * 8 * 16 + 8 * 16 * 5) / 1e9)


def test_tool_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, markdown = tmp_path / "b.csv", tmp_path / "b.md"
    options = ("--batch", 2, "--dtype", "float32", "--rounds", 1, "--device", "cpu", "--no-compile", "--limit", 300)
    assert run("backbones", "--models", "illama_tiny", "shvit_s1", *options, "--csv", csv, "--markdown", markdown) == 0
    report = read_csv(csv)
    assert report.header["torch"] == torch.__version__ and report.header["timm"] == timm.__version__
    assert report.header["batch"] == "2" and report.header["dtype"] == "float32" and "CPU" in report.header["device"]
    illama, shvit = report.rows
    assert (illama["model"], illama["parameters"], illama["top1"]) == ("illama_tiny", "5.70", "75.0")
    assert (shvit["model"], shvit["parameters"], shvit["top1"]) == ("shvit_s1", "6.33", "72.8")
    assert illama["folded"] == "-" and float(shvit["folded"]) > 0  # iLLaMA has nothing to fold
    assert not illama["notes"] and not shvit["notes"]
    for row in report.rows:
        assert float(row["eager"]) > 0 and float(row["peer_eager"]) > 0 and row["compiled"] == row["memory"] == "-"
        best = max(float(row[key]) for key in ("eager", "folded") if row[key] != "-")
        assert float(row["ratio"]) == pytest.approx(best / float(row["peer_eager"]), rel=0.02)
    text = markdown.read_text()
    assert (
        f"torch {torch.__version__}" in text
        and "| illama_tiny | 224 | 5.70 |" in text
        and PUBLISHED["shvit_s1"].source in text
    )
    markdown.unlink()
    assert run("backbones", "--from-csv", csv, "--markdown", markdown) == 0
    assert markdown.read_text() == text
    assert "model=shvit_s1" in capsys.readouterr().out


def test_failures_are_text_in_the_row(tmp_path: Path) -> None:
    settings = suite.Settings(CPU, torch.float32, batch=1, rounds=1, compile_models=(), limit=0.001)
    row = suite.measure_one("illama_tiny", settings)
    assert row["notes"].startswith("LimitError: took longer than 0.003 s") and not row["eager"]
    spent = suite.Settings(CPU, torch.float32, batch=1, compile_models=(), budget=-1.0)
    report = suite.measure(["illama_tiny"], spent, tmp_path / "b.csv", say=lambda line: None)
    assert report.rows == [{"model": "illama_tiny", "notes": "not measured: the -1 s of the run were over"}]
    assert "No model was measured" in suite.page(read_csv(tmp_path / "b.csv"))
    assert "- `illama_tiny`: not measured" in suite.page(report)


def test_names_and_globs() -> None:
    assert suite.chosen(["illama_t*", "convit_tiny"]) == ["illama_tiny", "convit_tiny"]
    assert suite.chosen(["*"]) == list(suite.PEERS)
    with pytest.raises(UnknownNameError, match="no model 'illama_tini'; did you mean 'illama_tiny'"):
        suite.chosen(["illama_tiny", "illama_tini"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("backbones", "--from-csv", "x.csv"), "say where with --markdown"),
        (("backbones", "--models", "resnet18"), "the suite has no model 'resnet18'"),
        (("backbones", "--models", "illama_tiny", "--batch", 0), "batch must be at least 1, got 0"),
        (("train", "--model", "test_vit", "--rank", 0), "rank must be at least 1"),
        (("train", "--model", "test_vitt"), "no model is called 'test_vitt'"),
    ],
)
def test_tool_errors(arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


# ---- suite `train` ----
def test_training_steps_next_to_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "t.csv"
    assert run("train", "--model", "test_vit", "--batch", 2, "--rounds", 1, "--device", "cpu", "--csv", csv) == 0
    report = read_csv(csv)
    rows = {row["method"]: row for row in report.rows}
    assert list(rows) == ["zoo LoRA", "peft LoRA", "full"]
    assert rows["zoo LoRA"]["trained"] == rows["peft LoRA"]["trained"]  # the same places, the same classifier
    assert float(rows["full"]["trained"]) > 2 * float(rows["zoo LoRA"]["trained"])
    assert rows["full"]["ratio"] == "1.000" and all(float(row["milliseconds"]) > 0 for row in rows.values())
    assert "| zoo LoRA |" in capsys.readouterr().out


def test_steps_train_what_they_should() -> None:
    from zoo.benchmark.train import Step

    torch.manual_seed(0)
    model = create("test_vit", num_classes=5, adapter=dict(type="LoRA", rank=2), img_size=32)
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    step = Step(model, torch.randn(4, 3, 32, 32), torch.arange(4), torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    assert step.held() == weights
    losses = [float(step()) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[k], value) for k, value in frozen.items())
    moments = 2 * sum(p.nbytes for p in step.trained)
    assert 0 <= step.held() - weights - moments <= 8 * len(step.trained)  # and one step counter a tensor
