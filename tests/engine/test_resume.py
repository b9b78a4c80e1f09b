"""Killed at any moment and resumed = never interrupted, to the last bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import difference, kill_when, run, start, state, train

from zoo.engine.resume import Baseline
from zoo.engine.safe_checkpoint import resume_files
from zoo.engine.state import (
    CheckpointWriteError,
    fingerprint,
    plain,
    random_state,
    read_resume_file,
    set_random_state,
    write_atomically,
)
from zoo.errors import CheckpointError, CheckpointFileError

FINAL = "resume/step_00000024.pth"


def _step(folder: Path) -> int:
    files = resume_files(folder)
    return int(files[-1].stem.split("_")[1]) if files else 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"optim_wrapper__accumulative_counts": 5}, id="epochs, mid-accumulation, EMA"),
        pytest.param(
            {
                "train_cfg": {"by_epoch": False, "max_iters": 24, "val_interval": 5},
                "train_dataloader__sampler__type": "InfiniteSampler",
                "param_scheduler": [{"type": "CosineAnnealingLR", "by_epoch": False, "T_max": 24}],
                "optim_wrapper__optimizer__type": "momentum",
            },
            id="steps, infinite sampler",
        ),
    ],
)
def test_killed_at_several_moments_equals_uninterrupted(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"train_dataloader__dataset__delay": 0.002, **options}
    run(tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    kill_when(killed, lambda: _step(killed) >= 2, resume=False, **options)
    half_written = lambda: _step(killed) >= 8 and any(killed.glob("resume/*.tmp"))  # noqa: E731
    kill_when(killed, half_written, resume=True, **options)
    kill_when(killed, lambda: _step(killed) >= 17, resume=True, **options)
    for file in killed.glob("resume/*.pth"):
        read_resume_file(file)  # every file that has a final name is whole
    assert _step(killed) < 24
    run(killed, resume=True, **options)
    assert difference(state(tmp_path / "whole" / FINAL), state(killed / FINAL)) is None
    assert not list(killed.glob("resume/*.tmp"))
    rows = [(killed / "results.csv").read_text(), (tmp_path / "whole/results.csv").read_text()]
    assert [len(text.splitlines()) for text in rows] == [5 + ("train_cfg" in options), 5 + ("train_cfg" in options)]


def test_the_comparison_sees_another_seed(tmp_path: Path) -> None:
    train(tmp_path / "a", train_cfg__max_epochs=1)
    train(tmp_path / "b", train_cfg__max_epochs=1, randomness__seed=1)
    final = "resume/step_00000006.pth"
    assert difference(state(tmp_path / "a" / final), state(tmp_path / "b" / final)) is not None


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    run(tmp_path / "none", train_cfg__max_epochs=2)
    run(tmp_path / "two", train_cfg__max_epochs=2, train_dataloader__num_workers=2)
    final = "resume/step_00000012.pth"
    a, b = state(tmp_path / "none" / final), state(tmp_path / "two" / final)
    assert difference(a, b) is None


def test_sigterm_finishes_the_step_saves_and_stops(tmp_path: Path) -> None:
    options = {"default_hooks__checkpoint": {"type": "SafeCheckpoint"}, "train_dataloader__dataset__delay": 0.01}
    process = start(tmp_path / "a", **options)
    while not (tmp_path / "a/results.csv").exists():
        assert process.is_alive()
    process.terminate()
    process.join(30)
    assert process.exitcode == 1  # KeyboardInterrupt, which tools/train.py reports as 130
    assert _step(tmp_path / "a") >= 6
    run(tmp_path / "a", resume=True, **options)
    run(tmp_path / "b", **options)
    assert difference(state(tmp_path / "a" / FINAL), state(tmp_path / "b" / FINAL)) is None


def test_longer_training_follows_the_new_schedule(tmp_path: Path) -> None:
    run(tmp_path / "long", train_cfg__max_epochs=4)
    run(tmp_path / "short", train_cfg__max_epochs=2)
    runner = train(tmp_path / "short", resume=True, train_cfg__max_epochs=4)
    log = Path(runner.log_dir, f"{runner.timestamp}.log").read_text()
    assert "recomputed from its start" in log
    rates = [[row["lr"] for row in state(tmp_path / d / FINAL)["results"]["rows"]] for d in ("long", "short")]
    assert rates[0][2:] == pytest.approx(rates[1][2:], rel=1e-12)
    assert rates[0][1] != pytest.approx(rates[1][1])


def test_changed_learning_rate_and_decay_are_followed(tmp_path: Path) -> None:
    train(tmp_path, train_cfg__max_epochs=1)
    runner = train(
        tmp_path, resume=True, train_cfg__max_epochs=1, optim_wrapper__optimizer__lr=0.5,
        optim_wrapper__optimizer__weight_decay=0.25,
    )  # fmt: skip
    groups = runner.optim_wrapper.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}


def test_file_holds_only_what_trains_and_loads_as_plain_data(tmp_path: Path) -> None:
    runner = train(tmp_path, train_cfg__max_epochs=1, custom_hooks=[])
    content = read_resume_file(tmp_path / "resume/step_00000006.pth")
    trainable = {name for name, p in runner.bare_model.named_parameters() if p.requires_grad}
    assert content["state_dict"].keys() == trainable
    assert not any(name.startswith("backbone.stem") for name in trainable)
    assert any(name.startswith("backbone.stem") for name in content["base"])


def test_unfrozen_norm_statistics_are_saved(tmp_path: Path) -> None:
    train(tmp_path, train_cfg__max_epochs=1, model__frozen=False)
    saved = read_resume_file(tmp_path / "resume/step_00000006.pth")["state_dict"]
    assert "backbone.stem.1.running_mean" in saved and "backbone.stem.1.num_batches_tracked" in saved


def test_keeps_the_last_files_and_the_best(tmp_path: Path) -> None:
    runner = train(tmp_path, default_hooks__checkpoint__keep=3)
    assert [f.name for f in resume_files(tmp_path)] == [f"step_{n:08d}.pth" for n in (22, 23, 24)]
    rows = {row["step"]: row["tiny/accuracy"] for row in state(tmp_path / FINAL)["results"]["rows"]}
    best = read_resume_file(tmp_path / "resume/best.pth")
    assert best["best"]["value"] == max(rows.values()) == rows[best["meta"]["iter"]]
    assert runner.iter == 24


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model__frozen": False}, "frozen base"),
        ({"optim_wrapper__optimizer__weight_decay": 0.0}, "grouped otherwise"),
        ({"randomness__seed": 3}, "--seed 0"),
        ({"train_dataloader__batch_size": 3}, "middle of an epoch"),
        ({"param_scheduler": []}, "schedulers"),
    ],
)
def test_resume_refuses_another_run(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    train(tmp_path, train_cfg__max_epochs=1)
    middle = tmp_path / "resume/step_00000005.pth"
    with pytest.raises(CheckpointError, match=told):
        train(tmp_path, resume=str(middle), train_cfg__max_epochs=1, **options)


def test_torn_and_foreign_files_are_named(tmp_path: Path) -> None:
    torn = tmp_path / "torn.pth"
    torch.save({"format": "zoo-resume-1"}, torn)
    torn.write_bytes(torn.read_bytes()[:-200])
    foreign = tmp_path / "foreign.pth"
    torch.save({"model": {}}, foreign)
    for path in (torn, foreign, tmp_path / "absent.pth"):
        with pytest.raises(CheckpointFileError, match=path.name):
            read_resume_file(path)


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "x.pth"
    write_atomically(path, lambda file: torch.save({"a": 1}, file))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the write fails half way, as on a full disk
    try:
        with pytest.raises(CheckpointWriteError, match="could not write"):
            write_atomically(path, lambda file: torch.save({"a": torch.randn(100_000)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["x.pth"]


def test_random_states_come_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.standard_normal()), float(torch.randn(()))

    np.random.standard_normal()  # leaves a second normal number waiting inside numpy's generator
    saved = plain(random_state())
    first = draw()
    draw()
    set_random_state(saved)
    assert draw() == first


def test_fingerprint_sees_bits_and_order() -> None:
    a = torch.arange(12.0).reshape(3, 4)
    assert fingerprint(a) == fingerprint(a.clone())
    assert fingerprint(a) != fingerprint(a.flip(0))
    assert fingerprint(torch.ones(8)) != fingerprint(2 * torch.ones(8))
    assert fingerprint(a.bfloat16()) != fingerprint((a + 1).bfloat16())
    b = a.clone()
    b[2, 3] = torch.nextafter(b[2, 3], torch.tensor(100.0))
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(torch.tensor(3)) != fingerprint(torch.tensor(4))


def test_plain_refuses_objects_by_place() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.a\[1\] is a object"):
        plain({"a": [1, object()]})


def test_baseline_sees_a_changed_frozen_tensor() -> None:
    layer = torch.nn.Linear(2, 2).requires_grad_(False)
    baseline = Baseline(layer)
    assert baseline.changed(layer) == {}
    layer.bias.add_(1)
    assert list(baseline.changed(layer)) == ["bias"]
