"""Two processes on CPU do what one does with the double batch, and resume like one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from running import CONFIG, HERE, ROOT, difference, run_ranks, state, train

from zoo.engine.state import read_resume_file

PLAIN = [  # no dropout: each process draws its own; 24 images: the same batches on both sides
    "model.dropout=False",
    "train_cfg.max_epochs=2",
    "train_dataloader.dataset.size=24",
]


def _torchrun(work_dir: Path, *options: str) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", str(ROOT / "tools/train.py"), str(CONFIG), "--launcher", "pytorch",
        "--work-dir", str(work_dir), "--cfg-options", *options,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path) -> None:
    _torchrun(tmp_path / "two", *PLAIN, "train_dataloader.batch_size=4", "optim_wrapper.accumulative_counts=2")
    train(
        tmp_path / "one", model__dropout=False, train_cfg__max_epochs=2, train_dataloader__dataset__size=24,
        train_dataloader__batch_size=8, optim_wrapper__accumulative_counts=2,
    )  # fmt: skip
    one, two = (read_resume_file(tmp_path / d / "resume/step_00000006.pth") for d in ("one", "two"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.allclose(tensor, two["state_dict"][name], atol=1e-6, rtol=1e-6), name
    for a, b in zip(one["results"]["rows"], two["results"]["rows"], strict=True):
        assert a["tiny/accuracy"] == b["tiny/accuracy"]
    assert len(two["per_rank"]) == 2


def test_two_processes_resume_exactly(tmp_path: Path) -> None:
    options = {"train_cfg__max_epochs": 2, "optim_wrapper__accumulative_counts": 2}
    run_ranks(tmp_path / "a", 2, default_hooks__checkpoint__keep=20, **options)
    final = tmp_path / "a/resume/step_00000006.pth"
    whole = state(final)
    assert not torch.equal(*(rank["gradients"]["head.fc.weight"] for rank in _first(tmp_path / "a")["per_rank"]))
    for file in sorted((tmp_path / "a/resume").glob("step_*.pth"))[1:]:
        file.unlink()  # as if killed after the first step, in the first epoch, with gradients waiting
    run_ranks(tmp_path / "a", 2, resume=True, **options)
    assert difference(whole, state(final)) is None


def _first(work_dir: Path) -> dict[str, Any]:
    return read_resume_file(work_dir / "resume/step_00000001.pth")
