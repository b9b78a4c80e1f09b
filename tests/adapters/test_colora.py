"""CoLoRA: contributions against FAIG's numbers, ranks under a budget, and factors on every kind of layer."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import MODELS, check_half, check_merge, check_round_trips, check_start, golden, shake, vit
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.adapters.base import Part
from zoo.adapters.colora import CoLoRA, Matrix, matrix_of
from zoo.adapters.contribution import allocate, attributions, contributions, filter_scores
from zoo.adapters.inject import attach
from zoo.adapters.sites import find_sites
from zoo.errors import CheckpointError, OptionError, SiteError

WHERE = {"timm ViT": "q, v, out, fc1, embed, norm", "open_clip CLIP": "q, k, v, out, norm"}
EXAMPLE = torch.zeros(1, 8, 9, 9)


def config(name: str) -> dict[str, Any]:
    return dict(type="CoLoRA", delta=0.2, scale=1.5, where=WHERE[name])


@pytest.mark.parametrize("name", MODELS)
def test_start(name: str) -> None:
    check_start(MODELS[name], config(name))


@pytest.mark.parametrize("name", MODELS)
def test_save_load_copy_and_detach(name: str) -> None:
    check_round_trips(MODELS[name], config(name))


@pytest.mark.parametrize("name", MODELS)
def test_merge(name: str) -> None:
    check_merge(MODELS[name], config(name))


def test_half_precision() -> None:
    check_half(vit, config("timm ViT"))


class Restorer(nn.Module):
    """The reference's network: two levels, a shuffle in between."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.LeakyReLU(0.1)
        wide = [nn.Conv2d(3, 6, 3, 1, 1), act, nn.Conv2d(6, 8, 3, 1, 1), act, nn.Conv2d(8, 32, 3, 1, 1)]
        fine = [nn.PixelShuffle(2), act, nn.Conv2d(8, 8, 3, 1, 1), act, nn.Conv2d(8, 3, 3, 1, 1)]
        self.features = nn.Sequential(*wide, *fine)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def states(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    baseline = {k.removeprefix("param.baseline."): v for k, v in tensors.items() if k.startswith("param.baseline.")}
    return baseline, {k.removeprefix("param.target."): v for k, v in tensors.items() if k.startswith("param.target.")}


def test_golden_contributions() -> None:
    tensors, about = golden("colora/faig_tiny_sr")
    model = Restorer()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.features[0].weight.requires_grad_(False)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - tensors["in.gt"]).square().sum()

    def scores(*images: str) -> dict[str, Tensor]:
        inputs = [tensors[f"in.{name}"] for name in images]
        return attributions(model, *states(tensors), loss, inputs, steps=about["config"]["total_step"])

    first, second, both = scores("x1"), scores("x2"), scores("x1", "x2")
    by_filter = [
        torch.cat([filter_scores(one[f"features.{i}.weight"]) for i in about["config"]["conv_index"]])
        for one in (first, second)
    ]
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_filter[0], tensors["out.faig_per_filter_x1"], **close)
    difference = by_filter[0] - by_filter[1]
    torch.testing.assert_close(difference, tensors["out.faig_per_filter_x1_minus_x2"], **close)
    means = contributions(first)
    for name, score in first.items():
        torch.testing.assert_close(score.sum()[None], tensors[f"out.param_sum_x1.{name}"], **close)
        torch.testing.assert_close(torch.tensor([means[name]]), tensors[f"out.param_mean_x1.{name}"], **close)
        torch.testing.assert_close(both[name], (score + second[name]) / 2)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and model.training
    assert not model.features[0].weight.requires_grad and model.features[2].weight.requires_grad


def test_contributions_of_a_linear_model_grow_with_the_gap_and_vanish_without() -> None:
    model = nn.Linear(4, 3)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = {name: torch.randn_like(p) for name, p in base.items()}

    def scores(gap: float) -> dict[str, Tensor]:
        target = {name: p + gap * step[name] for name, p in base.items()}
        return attributions(model, base, target, lambda m, x: m(x).sum(), [torch.randn(2, 4)], steps=3)

    torch.manual_seed(1)
    one = scores(1.0)
    torch.manual_seed(1)
    two = scores(2.0)
    for name in base:
        assert (one[name] >= 0).all() and one[name].any()
        torch.testing.assert_close(two[name], 2 * one[name])
        assert not scores(0.0)[name].any()


def test_attributions_refuse_what_cannot_be_scored() -> None:
    model = nn.Linear(2, 2)
    state = {name: p.detach() for name, p in model.named_parameters()}
    weight = model.weight.detach().clone()

    def score(baseline: Any = state, loss: Any = lambda m, x: m(x).sum(), count: int = 1, steps: int = 2) -> None:
        attributions(model, baseline, state, loss, [torch.ones(1, 2)] * count, steps=steps)

    with pytest.raises(CheckpointError, match="lacks 'weight'"):
        score({"weigth": state["weight"], "bias": state["bias"]})
    with pytest.raises(CheckpointError, match="another shape"):
        score({**state, "weight": torch.zeros(3, 2)})
    with pytest.raises(OptionError, match="finite"):
        score(loss=lambda m, x: m(x).sum() * float("nan"))
    with pytest.raises(OptionError, match="one finite number"):
        score(loss=lambda m, x: m(x))
    with pytest.raises(OptionError, match="at least one batch"):
        score(count=0)
    with pytest.raises(OptionError, match="steps"):
        score(steps=0)
    assert torch.equal(model.weight, weight)


def test_rank_of_a_ratio() -> None:
    assert Matrix(1, 64, 576).rank(0.1) == 6  # 5.76
    assert Matrix(1, 64, 576).tuned(6) == 6 * 640
    assert Matrix(1, 64, 576).rank(1e-6) == 1
    assert not Matrix(1, 64, 576).dense(57) and Matrix(1, 64, 576).dense(58)
    assert all(Matrix(32, 1, 9).dense(Matrix(32, 1, 9).rank(delta)) for delta in (0.01, 1.0))  # depthwise


LAYERS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(8, 12, 3, 2, 1, 2),
    "grouped": nn.Conv2d(8, 12, 3, 2, 1, 2, 2),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "circular": nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
    "transposed": nn.ConvTranspose2d(8, 12, 3, 2, 1, 1),
    "grouped transposed": nn.ConvTranspose2d(8, 12, 4, 2, groups=4),
    "batch norm": nn.BatchNorm2d(8),
}


@pytest.mark.parametrize("options", [dict(rank=2), dict(rank=0), dict(delta=1.0), dict(rank=1, bias=False)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(copy.deepcopy(LAYERS[kind])).eval()
    x = torch.randn(2, 8, 9, 9)
    plain = model(x)
    attached = attach(model, dict(type="CoLoRA", where="conv, deconv, norm", **options), example=EXAMPLE)
    assert torch.equal(model(x), plain)
    adapter = attached.placed[0].adapter
    bias = model[0].bias.numel() if options.get("bias", True) else 0
    matrix = matrix_of(attached.placed[0].site)
    rank = options.get("rank", 10**9)
    expected = model[0].weight.numel() if matrix is None else matrix.tuned(rank)
    assert sum(p.numel() for p in adapter.parameters()) == expected + bias
    shake(attached)
    y = model(x)
    assert not torch.allclose(y, plain)
    y.square().sum().backward()
    assert all(p.grad.any() for p in attached.parameters())
    assert all(p.grad is None for p in model[0]._parameters.values())
    if matrix is not None and adapter.down is not None:
        change = adapter.delta(model[0]._parameters["weight"]).detach()
        if adapter.transposed:
            shape = (matrix.groups, -1, *change.shape[1:])
            change = change.reshape(shape).transpose(1, 2).reshape(matrix.groups, matrix.rows, -1)
        ranks = torch.linalg.matrix_rank(change.reshape(matrix.groups, matrix.rows, -1))
        assert ranks.tolist() == [rank] * matrix.groups
    attached.merge()
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    attached.unmerge()
    assert torch.equal(model(x), y)


def test_a_ratio_of_one_trains_the_weight_itself() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = attach(model, dict(type="CoLoRA", delta=1.0, where="linear"), example=torch.zeros(1, 6)).placed[0].adapter
    assert adapter.update is not None and adapter.update.shape == (5, 6)


class Net(nn.Module):
    """Encoder, grouped and depthwise middle, decoder, and bare scales that count in the budget."""

    def __init__(self) -> None:
        super().__init__()
        self.intro = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.conv = nn.Conv2d(16, 32, 3, 2, 1)  # called like a role
        self.middle = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.Conv2d(32, 32, 1))
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.ending = nn.Conv2d(16, 3, 3, padding=1)
        self.beta = nn.Parameter(torch.ones(1, 32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(self.intro(x)))
        return x + self.ending(self.up(y + self.beta * self.middle(y)))


CONTRIBUTIONS = {
    **{"intro.weight": 8e-4, "conv.weight": 3e-4, "middle.0.weight": 2e-7, "middle.1.weight": 1e-7},
    **{"up.weight": 4e-4, "ending.weight": 7e-4},
}


@pytest.mark.parametrize("budget", [0.2, 0.45])
def test_allocation_meets_the_budget_and_follows_the_contributions(budget: float) -> None:
    model = Net()
    made = allocate(model, CONTRIBUTIONS, budget=budget)
    total = sum(p.numel() for p in model.parameters())
    steps = [m.step for s in find_sites(model) if s.role != "norm" and (m := matrix_of(s)) is not None]
    assert made.total == total and budget * total - max(steps) < made.tuned <= budget * total
    layers = sorted((s for s in made.shares if s.role != "norm"), key=lambda share: share.contribution)
    assert [s.delta for s in layers] == sorted(s.delta for s in layers)
    attached = attach(model, made.config(), example=torch.zeros(1, 3, 8, 8))
    assert sum(p.numel() for p in attached.parameters()) == made.tuned
    assert {p.site.path: p.adapter.rank for p in attached.placed} == {s.path: s.rank for s in made.shares}
    model(torch.randn(1, 3, 8, 8)).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, _ in attached.named_parameters()}


def test_equal_contributions_give_equal_ratios_and_a_whole_budget_everything() -> None:
    equal = dict.fromkeys(CONTRIBUTIONS, 3e-5)
    shares = allocate(Net(), equal, budget=0.4).shares
    assert len({s.delta for s in shares if s.role != "norm"}) == 1
    flat = allocate(Net(), CONTRIBUTIONS, budget=0.4, beta=0.0).shares
    assert [s.rank for s in flat] == [s.rank for s in shares]
    whole = allocate(Net(), CONTRIBUTIONS, budget=1.0)
    assert all(s.full for s in whole.shares) and whole.tuned == whole.total - 32  # beta is no layer
    assert all(s.delta >= 0.3 for s in allocate(Net(), CONTRIBUTIONS, budget=0.6, min_delta=0.3).shares)


def test_allocation_on_a_transformer_from_real_contributions() -> None:
    model, target = vit(), vit(seed=3)
    shake_all(target)
    images = [(torch.randn(1, 3, 32, 32), torch.tensor([i])) for i in range(2)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    scores = attributions(model, model.state_dict(), target.state_dict(), loss, images, steps=3)
    made = allocate(model, contributions(scores), budget=0.15, where="q, v, fc1, norm")
    attached = attach(model, made.config())
    assert sum(p.numel() for p in attached.parameters()) == made.tuned <= 0.15 * made.total
    assert {p.adapter.parts[0].role for p in attached.placed} == {"qv", "fc1", "norm"}
    assert len({share.rank for share in made.shares}) > 2


def shake_all(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


@pytest.mark.parametrize(
    ("scores", "options", "said"),
    [
        ({"conv.weight": math.nan}, {}, "'conv.weight' is nan"),
        ({"conv.weight": -1.0}, {}, "at least 0"),
        ({"conv.weight": math.inf}, {}, "finite"),
        (dict.fromkeys(CONTRIBUTIONS, 0.0), {}, "the same weights"),
        ({}, dict(budget=0.0), "above 0"),
        ({}, dict(budget=1.5), "at most 1"),
        ({}, dict(budget=0.01), "rank 1 everywhere"),
        ({}, dict(beta=-1.0), "beta"),
        ({}, dict(min_delta=2.0), "min_delta"),
    ],
    ids=str,
)
def test_allocation_refuses(scores: dict[str, float], options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        allocate(Net(), {**CONTRIBUTIONS, **scores}, **options)


def test_allocation_names_a_missing_contribution() -> None:
    with pytest.raises(OptionError, match=r"'up.weight'; did you mean"):
        allocate(Net(), {k.replace("up.", "ups."): v for k, v in CONTRIBUTIONS.items()}, budget=0.4)
    with pytest.raises(SiteError, match="norms only"):
        allocate(Net(), CONTRIBUTIONS, where="norm")


WRONG = [
    *(dict(rank=-1), dict(rank=1.5), dict(rank=2, delta=0.1), dict(delta=0.0), dict(delta=1.1)),
    *(dict(scale=0.0), dict(rank=0, bias=False), dict(ranks=3)),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        attach(vit(), dict(type="CoLoRA", where="fc1", **wrong))


def test_no_part_of_a_grouped_convolution() -> None:
    site = next(s for s in find_sites(nn.Sequential(LAYERS["grouped"])) if s.role == "conv")
    half = replace(site, parts=(Part("conv", ((0, 6),)),))
    with pytest.raises(SiteError, match="as a whole"):
        CoLoRA(half)


def test_the_tool_prints_plots_and_writes_a_config_that_attaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(str(root / "tests/engine"))
    spec = importlib.util.spec_from_file_location("tools_contribution", root / "tools/contribution.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    from tiny_task import TinyTask

    torch.manual_seed(4)
    tuned = {k: v + 0.01 * torch.randn_like(v) for k, v in TinyTask().state_dict().items() if v.is_floating_point()}
    save_file(tuned, tmp_path / "target.safetensors")
    files = [str(root / "tests/engine/tiny_config.py"), "init", str(tmp_path / "target.safetensors")]
    options = ["--images", "2", "--steps", "3", "--budget", "0.5"]
    outputs = ["--plot", str(tmp_path / "bars.png"), "--out", str(tmp_path / "adapter.json")]
    assert tool.main([*files, *options, *outputs]) == 0
    printed = capsys.readouterr().out
    assert "stem.0 (conv)" in printed and "mix (conv)" in printed and "parameters (" in printed
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    attached = attach(
        TinyTask().backbone, json.loads((tmp_path / "adapter.json").read_text()), example=torch.zeros(1, 3, 12, 12)
    )
    assert f"{sum(p.numel() for p in attached.parameters()):,} of" in printed
    assert tool.main([*files[:2], str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err
