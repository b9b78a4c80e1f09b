"""Frozen stays frozen, to the last bit, buffers included."""

from __future__ import annotations

from pathlib import Path

import torch
from running import train
from tiny_task import TinyTask
from torch import nn

from zoo.freeze import count, freeze, frozen_norms_eval, trainable_parameters


def test_training_leaves_the_frozen_part_bit_identical(tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in TinyTask().state_dict().items()}
    after = train(tmp_path, train_cfg__max_epochs=2).bare_model.state_dict()
    stem = [k for k in before if k.startswith("backbone.stem")]
    assert any(k.endswith("running_var") for k in stem) and any(k.endswith("num_batches_tracked") for k in stem)
    assert all(torch.equal(before[k], after[k]) for k in stem)
    assert not torch.equal(before["backbone.mix.weight"], after["backbone.mix.weight"])


def test_frozen_norms_are_in_eval_and_others_are_not() -> None:
    model = TinyTask().train()
    assert model.training and model.backbone.drop.training
    assert not model.backbone.stem[1].training
    assert TinyTask(frozen=False).train().backbone.stem[1].training


def test_norms_without_parameters_follow_their_surroundings() -> None:
    bare = lambda: nn.BatchNorm1d(3, affine=False)  # noqa: E731
    frozen = freeze(nn.Sequential(nn.Linear(3, 3), bare()))
    free = nn.Sequential(nn.Linear(3, 3), bare())
    model = nn.Sequential(frozen, free).train()
    assert frozen_norms_eval(model) == 1
    assert not frozen[1].training and free[1].training


def test_counts_and_names() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    freeze(model[0])
    assert count(model) == (3, 8) and count(model).total == 11
    assert list(trainable_parameters(model)) == ["1.weight", "1.bias"]
