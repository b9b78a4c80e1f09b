"""Losses between two training forwards, switched on by a classifier's config."""

import csv

import pytest
import torch
from mmengine.config import Config

import zoo
from zoo.engine.config import set_options
from zoo.engine.runner import ZooRunner
from zoo.errors import OptionError, UnknownNameError
from zoo.registry import MODELS

TERM = {"type": "SymmetricKL", "weight": 1.0}
MOSA = {"type": "MoSA", "width": 8, "experts": 2, "dropout": 0.0}
GEOMETRY = {"size": (32, 32), "crop_pct": 1.0}


def model_config(**changes):
    return {
        "type": "ImageClassifier",
        "backbone": {"type": "TimmBackbone", "name": "test_vit", "img_size": 32},
        "head": {"type": "LinearHead", "num_classes": 10},
        "adapter": MOSA,
        "preprocessing": GEOMETRY,
        "extra_losses": [TERM],
        **changes,
    }


def moved(model):
    """The model after its adapters have learnt something: fresh ones add zero, whatever experts are drawn."""
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.train()


BATCH, TARGETS = torch.randn(4, 3, 32, 32), [{"label": i} for i in range(4)]


def test_the_term_compares_two_draws_of_experts_and_trains_them():
    model = moved(MODELS.create(model_config()))
    losses = model(BATCH, TARGETS, mode="loss")
    assert set(losses) == {"loss", "loss_symmetric_kl"} and losses["loss_symmetric_kl"] > 0
    losses["loss_symmetric_kl"].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("up" in name for name in reached) and any("head" in name for name in reached)
    assert all("adapters" in name or name.startswith("head.") for name in trained)


def test_nothing_random_means_nothing_to_compare():
    """One expert is a plain adapter: both forwards are equal and the term is zero."""
    model = moved(MODELS.create(model_config(adapter={**MOSA, "experts": 1})))
    losses = model(BATCH, TARGETS, mode="loss")
    assert losses["loss_symmetric_kl"].item() == pytest.approx(0.0, abs=1e-7)


def test_weight_scales_the_term_alone():
    terms = []
    for weight in (1.0, 2.5):
        torch.manual_seed(1)
        model = moved(MODELS.create(model_config(extra_losses=[{**TERM, "weight": weight}])))
        torch.manual_seed(2)
        terms.append(model(BATCH, TARGETS, mode="loss"))
    assert terms[1]["loss"].item() == pytest.approx(terms[0]["loss"].item(), rel=1e-6)
    ratio = terms[1]["loss_symmetric_kl"] / terms[0]["loss_symmetric_kl"]
    assert ratio.item() == pytest.approx(2.5, rel=1e-5)


def test_the_second_forward_costs_only_training(monkeypatch):
    model = moved(MODELS.create(model_config()))
    calls = []
    extract = type(model).extract
    monkeypatch.setattr(type(model), "extract", lambda self, x: calls.append(1) or extract(self, x))
    model(BATCH, TARGETS, mode="loss")
    assert len(calls) == 2
    model.eval()
    model(BATCH, mode="tensor")
    model(BATCH, TARGETS, mode="predict")
    assert len(calls) == 4


def test_mistakes_in_the_config_are_named():
    with pytest.raises(UnknownNameError, match="did you mean 'SymmetricKL'"):
        MODELS.create(model_config(extra_losses=[{"type": "SymetricKL"}]))
    with pytest.raises(OptionError, match="weight must be a positive number"):
        MODELS.create(model_config(extra_losses=[{**TERM, "weight": 0.0}]))


def test_a_whole_run_reports_the_term_and_its_model_comes_back(tmp_path):
    data = {"type": "EmbeddedDataset", "transform": {"type": "EvalTransform", **GEOMETRY}}
    config = Config(
        dict(
            model=model_config(),
            train_dataloader=dict(
                batch_size=10,
                sampler=dict(type="DefaultSampler", shuffle=True),
                dataset=dict(split="train", limit_per_class=4, **data),
            ),
            train_cfg=dict(max_epochs=2),
            optim_wrapper=dict(optimizer=dict(type="adamw", lr=1e-2)),
            randomness=dict(seed=0),
            work_dir=str(tmp_path),
        )
    )
    set_options(config, {"model.extra_losses.0.weight": 0.5})  # as --cfg-options would
    runner = ZooRunner.from_cfg(config)
    runner.train()
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss_symmetric_kl"]) > 0  # once the experts have moved, draws differ
    assert runner.bare_model.extra_losses[0].weight == 0.5
    back = zoo.load(tmp_path / "adapter")
    assert back.extra_losses[0].weight == 0.5
    assert torch.equal(back.eval()(BATCH), runner.bare_model.eval()(BATCH))
