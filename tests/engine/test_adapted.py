"""An adapter through the whole path: config, training, resume file, saved folder, rebuilt model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running import difference, state, train
from tiny_task import TinyAdaptedTask

import zoo
from zoo.engine.state import read_resume_file
from zoo.freeze import trainable_parameters

LORA: dict[str, Any] = {"model__type": "TinyAdaptedTask", "model__adapter": {"type": "LoRA", "rank": 2}}


def test_lora_trains_and_the_base_stays_bit_identical(tmp_path: Path) -> None:
    before = TinyAdaptedTask().state_dict()
    runner = train(tmp_path, train_cfg__max_epochs=2, **LORA)
    after = runner.bare_model.state_dict()
    base = [name for name in before if name.startswith("backbone.")]
    assert base and all(torch.equal(before[name], after[name]) for name in base)
    saved = read_resume_file(tmp_path / "resume/step_00000012.pth")["state_dict"]
    assert saved.keys() == trainable_parameters(runner.bare_model).keys()
    assert all(".adapters." in name or name.startswith("head.") for name in saved)
    assert any(name.endswith("fc.weight") for name in saved)


def test_the_saved_folder_rebuilds_the_model(tmp_path: Path) -> None:
    trained = train(tmp_path, train_cfg__max_epochs=1, **LORA).bare_model.eval()
    rebuilt = zoo.load(str(tmp_path / "adapter"))
    images = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(rebuilt(images), trained(images))
    assert rebuilt.zoo_card["metrics"]["tiny/accuracy"] >= 0


@pytest.mark.parametrize("adapter", ["LinearProbe", "BitFit", {"type": "LoRA", "rank": 2}])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, adapter: Any) -> None:
    options = {"model__type": "TinyAdaptedTask", "model__adapter": adapter, "train_cfg__max_epochs": 2}
    train(tmp_path, default_hooks__checkpoint__keep=20, **options)
    final = tmp_path / "resume/step_00000012.pth"
    whole = state(final)
    for file in sorted((tmp_path / "resume").glob("step_*.pth"))[4:]:
        file.unlink()
    train(tmp_path, resume=True, **options)
    assert difference(whole, state(final)) is None


def test_several_adapters_train_together() -> None:
    second = {"type": "AdaptFormer", "name": "beside"}
    model = TinyAdaptedTask(adapter=[{"type": "LoRA", "rank": 2}, second])
    names = trainable_parameters(model)
    assert any(".adapters.default." in name for name in names) and any(".adapters.beside." in name for name in names)
    assert not any(name.endswith("qkv.weight") for name in names)
