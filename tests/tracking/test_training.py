"""Configs fit what they name, and a whole run in small: table, both numbers, saved folder, result from the folder."""

import csv

import pytest
import torch
from PIL import Image

import zoo
from tasks.tracking.model import JointTracker
from tasks.tracking.sequences import TrackSequence
from zoo.catalog import config_files
from zoo.engine.config import accepted, load_config
from zoo.engine.optim import build_optimizer
from zoo.engine.runner import ZooRunner
from zoo.registry import DATASETS, MODELS

LORAT = [f"vit_{size}_lorat{kind}" for size in "sblg" for kind in ("", "_378")]


@pytest.mark.parametrize("name", LORAT)
def test_recipes_fit_their_models_and_data(name):
    config = load_config(name)
    for part in (config.train_dataloader.dataset, config.val_dataloader.dataset, config.test_dataloader.dataset):
        for one in (part, *part.get("sources", ())):
            assert one["type"] in DATASETS.names() and set(one) - {"type"} <= accepted(one["type"])
    backbone, pairs, tracking = config.model.backbone, config.train_dataloader.dataset, config.model.tracking
    for key in ("template_size", "search_size"):
        assert tuple(backbone[key]) == tuple(pairs[key])
    for key in ("template_factor", "search_factor"):
        assert tracking[key] == pairs[key]
    assert config.optim_wrapper.optimizer.weight_decay == 0.1 and config.train_cfg.max_epochs == 170
    assert config.train_dataloader.batch_size == 128 and len(config.train_dataloader.dataset.sources) == 4


def test_what_is_not_decayed():
    """Biases, the token types, and the last score layer, a vector in all but shape; LoRA's factors are decayed."""
    config = load_config("vit_s_lorat").model.to_dict()
    config["backbone"] = {**config["backbone"], "pretrained": False}
    with torch.device("meta"):
        model = MODELS.create(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, "adamw", lr=1e-4, weight_decay=0.1).param_groups
    plain = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert plain == {
        "backbone.token_type_embed",
        "head.cls_mlp.layers.2.weight",
        *(f"head.{kind}_mlp.layers.{i}.bias" for kind in ("cls", "reg") for i in range(3)),
    }


def small_run(folder):
    config = load_config(str(config_files()["tracking_quickstart"]))
    pairs = config.train_dataloader.dataset
    pairs.length, pairs.sources[0]["count"] = 64, 4
    config.train_dataloader.batch_size = 8
    config.train_cfg = dict(by_epoch=True, max_epochs=2)
    config.model.backbone.update(embed_dim=32, depth=1, num_heads=2)
    for loader in (config.val_dataloader, config.test_dataloader):
        loader.dataset["count"], loader.dataset["length"] = 2, 4
    config.work_dir = str(folder)
    return config


def test_a_run_from_config_to_tracks(tmp_path):
    torch.manual_seed(0)
    runner = ZooRunner.from_cfg(small_run(tmp_path))
    runner.train()
    with (tmp_path / "results.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 2 and rows[1]["loss"] < rows[0]["loss"]
    assert rows[1]["loss"] == pytest.approx(rows[1]["loss_cls"] + rows[1]["loss_reg"])
    assert {"val/auc", "val/precision", "val/norm_precision", "val/still_auc"} <= rows[1].keys()
    assert rows[0]["val/still_auc"] == rows[1]["val/still_auc"]
    with Image.open(tmp_path / "success.png") as picture:
        assert picture.size[0] > 900
    model = zoo.load(tmp_path / "adapter")
    assert isinstance(model, JointTracker)
    sequence = DATASETS.create(small_run(tmp_path).val_dataloader.dataset.to_dict()).sequences[0]
    assert isinstance(sequence, TrackSequence)
    ours, theirs = (m([sequence], mode="predict")[0] for m in (model, runner.bare_model))
    assert (ours.boxes == theirs.boxes).all() and len(ours.boxes) == 4
