"""tools/train.py and tools/test.py: options that are checked, one-line errors, exit codes, and the way round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from running import CONFIG, HERE, ROOT

from zoo.engine.config import accepted, load_config
from zoo.errors import OptionError, UnknownNameError, ZooError


def _tool(name: str) -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / f"tools/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"train_cfg.max_epoch": 3}, "max_epochs"),
        ({"optim_wraper.amp": "bf16"}, "optim_wrapper"),
        ({"optim_wrapper.accumulative_count": 2}, "accumulative_counts"),
        ({"model.frozn": True}, "frozen"),
        ({"param_scheduler.2.end": 3}, "list of 2"),
        ({"param_scheduler.0.strat_factor": 3}, "start_factor"),
        ({"default_hooks.checkpoint.keeep": 3}, "keep"),
        ({"train_dataloader.dataset.sise": 3}, "size"),
        ({"train_dataloader.batchsize": 3}, "batch_size"),
        ({"seed": 3}, "has no 'seed'"),
    ],
)
def test_unknown_options_name_the_nearest(option: dict[str, object], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        load_config(str(CONFIG), option)


def test_known_options_are_set_where_the_config_is_silent() -> None:
    cfg = load_config(
        str(CONFIG),
        {
            "model.dropout": False,  # a parameter of the model's class
            "param_scheduler.1.eta_min": 1e-6,
            "optim_wrapper.amp": "bf16",
            "optim_wrapper.paramwise_cfg.head_lr_mult": 3.0,
            "randomness.seed": 5,
            "default_hooks.progress": None,
            "optim_wrapper.optimizer.betas": (0.8, 0.9),
        },
    )
    assert cfg.model.dropout is False and cfg.param_scheduler[1].eta_min == 1e-6
    assert cfg.optim_wrapper.amp == "bf16" and cfg.optim_wrapper.paramwise_cfg.head_lr_mult == 3.0
    assert cfg.randomness.seed == 5 and cfg.default_hooks.progress is None


def test_a_part_given_by_name_becomes_a_dict(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    file.write_text('model = dict(type="TinyTask", adapter="LoRA")\n')
    assert load_config(str(file), {"model.adapter.rank": 3}).model.adapter == {"type": "LoRA", "rank": 3}
    with pytest.raises(OptionError, match="rank"):
        load_config(str(file), {"model.adapter.ranc": 3})


def test_accepted_options_come_from_the_signature() -> None:
    assert accepted("SafeCheckpoint") == {"every_epochs", "every_steps", "keep", "best", "larger_is_better"}
    assert accepted("NothingOfThatName") is None


def test_unreadable_configs_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(\n")
    with pytest.raises(ZooError, match=r"broken\.py cannot be read"):
        load_config(str(broken))
    with pytest.raises(UnknownNameError, match="there is no config file"):
        load_config(str(tmp_path / "absent.py"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["absent.py"], "there is no config file absent.py"),
        ([str(CONFIG), "--cfg-options", "train_cfg.max_epoch=1"], "max_epochs"),
        ([str(CONFIG), "--cfg-options", "model.type=TinyTsak"], "TinyTask"),
        ([str(CONFIG), "--cfg-options", "optim_wrapper.optimizer.type=adamww"], "adamw"),
        ([str(CONFIG), "--cfg-options", "optim_wrapper.optimizer.betaz=1"], "betaz"),
        ([str(CONFIG), "--cfg-options", "param_scheduler.0.begin=4"], "param_scheduler does not fit"),
        ([str(CONFIG), "--cfg-options", "train_dataloader.sampler.type=Nothing"], "Nothing"),
        ([str(CONFIG), "--amp", "fp16"], "CUDA"),
        ([str(CONFIG), "--launcher", "pytorch"], "torchrun"),
        ([str(CONFIG), "--resume", "absent.pth"], "absent.pth"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _tool("train").main([*arguments, "--work-dir", str(tmp_path / "w")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and told in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_train_then_test_from_the_shell(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    tools = [sys.executable, str(ROOT / "tools/train.py"), str(CONFIG), "--work-dir", str(tmp_path), "--seed", "3"]
    first = subprocess.run([*tools, "--cfg-options", "train_cfg.max_epochs=1"], env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert f"python tools/test.py {CONFIG} {tmp_path}/adapter" in first.stdout
    assert len(first.stderr.splitlines()) < 10, first.stderr
    test = _tool("test")
    saved = str(tmp_path / "adapter")
    assert test.main([str(CONFIG), saved, "--work-dir", str(tmp_path / "t"), "--out", str(tmp_path / "m.json")]) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    last = (tmp_path / "results.csv").read_text().splitlines()[-1].split(",")
    assert metrics["tiny/accuracy"] == pytest.approx(float(last[-1]))
    assert test.main([str(CONFIG), str(tmp_path / "nothing"), "--work-dir", str(tmp_path / "t")]) == 2
