"""How much each parameter contributes to a task, and the ranks that follow from it under a budget.

The contribution is an integrated gradient along the straight line from a model fine-tuned on the task (the target) to
the model it started from (the baseline):

    C_j = | (base - target)_j * 1/N sum_{s<N} dL/dw_j at s/N * base + (1 - s/N) * target |

Sources: Xie et al. 2021, "Finding Discriminative Filters for Specific Degradations in Blind Super-Resolution", and its
released code (FAIG); Park et al. 2024, arXiv 2408.01099 (CoLoRA) for layer means and ratios. CoLoRA's formula from
contributions to ratios is not released; the one here is a power law, scaled so that the budget is met.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Site
from zoo.adapters.colora import DELTA, CoLoRA, Matrix, has_bias, matrix_of
from zoo.adapters.site_table import ROLES
from zoo.adapters.sites import find_sites, select
from zoo.errors import CheckpointError, OptionError, SiteError, nearest

State = Mapping[str, Tensor]


def attributions(
    model: nn.Module,
    baseline: State,
    target: State,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    steps: int = 100,
) -> dict[str, Tensor]:
    """FAIG scores of every parameter scalar, averaged over the batches (FAIG 2021, eq. 5).

    Args:
        model: gives the forward; its weights, flags and modes are put back. It runs in evaluation mode.
        baseline, target: parameters before and after the fine-tuning, by the model's names.
        loss: (model, batch) -> scalar, summed and not averaged over pixels (the score scales with it).
        batches: the magnitude is taken of each batch's gradient; batches of one image are FAIG's.
        steps: N.

    Returns one non-negative tensor for each parameter, in its shape.

    Raises:
        CheckpointError: a parameter missing from a state, or of another shape.
        OptionError: no batch, steps below 1, a loss that is no finite scalar.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps must be a whole number of at least 1, got {steps!r}")
    own = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    ends = [_fitting(own, state, kind) for state, kind in ((baseline, "baseline"), (target, "target"))]
    scores = {name: torch.zeros_like(p) for name, p in own.items()}
    seen = 0
    with _lent(model, own):
        for batch in batches:
            for name, gradient in _path_gradient(model, own, ends, loss, batch, steps).items():
                scores[name] += ((ends[0][name] - ends[1][name]) * gradient / steps).abs()
            seen += 1
    if not seen:
        raise OptionError("attributions need at least one batch")
    return {name: score / seen for name, score in scores.items()}


def filter_scores(scores: Tensor) -> Tensor:
    """Scores (O, I, *kernel) of a convolution added up over each kernel: (O * I,), FAIG's unit."""
    return scores.flatten(2).sum(-1).flatten()


def contributions(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean score of each tensor. A sum would favour large layers, which contribute little a scalar."""
    return {name: score.mean().item() for name, score in scores.items()}


@dataclass(frozen=True)
class Share:
    """What one site gets.

    Attributes:
        path, role: the site's; `parts` the roles in its weight. contribution, delta: C_i and the ratio that follows
        from it (norms: 0 and 1). rank: 0 for a norm. full: the weight itself is tuned. tuned: number of parameters,
        bias included.
    """

    path: str
    role: str
    parts: tuple[str, ...]
    contribution: float
    delta: float
    rank: int
    full: bool
    tuned: int


@dataclass(frozen=True)
class Allocation:
    """Ranks for a whole model; `total` counts all its parameters, `tuned` those that train."""

    shares: tuple[Share, ...]
    total: int

    @property
    def tuned(self) -> int:
        return sum(share.tuned for share in self.shares)

    def config(self, **options: Any) -> dict[str, Any]:
        """The adapter config for `attach` or a model's `adapter=`; `options` are CoLoRA's `bias` and `scale`."""
        roles = {role: None for share in self.shares for role in share.parts}
        ranks = {_glob(share.path): dict(rank=share.rank) for share in self.shares if share.role != "norm"}
        return dict(
            type="CoLoRA", where=[*roles, *(_glob(share.path) for share in self.shares)], per_site=ranks, **options
        )


def allocate(
    model: nn.Module,
    scores: Mapping[str, float],
    *,
    budget: float = DELTA,
    beta: float = 0.5,
    min_delta: float = 0.0,
    bias: bool = True,
    where: str | list[str] | None = None,
) -> Allocation:
    """Ranks from delta_i = clip(alpha * (C_i / max C)^beta, min_delta, 1), with the largest alpha the budget allows.

    Args:
        model: the plain model.
        scores: C of each weight, by parameter name (`contributions`).
        budget: share of all of the model's parameters that may train, biases and norms included.
        beta: 0 gives every layer the same ratio.
        min_delta: lower bound of the ratio; a rank is at least 1 in any case.
        bias: whether biases are tuned, as in CoLoRA's option.
        where: sites, by default CoLoRA's.

    Raises:
        OptionError: an option out of range, a contribution that is missing, negative, NaN or infinite, all of them
            zero, or a budget below what rank 1 everywhere costs.
    """
    if not 0 < budget <= 1:
        raise OptionError(f"budget is a share of the parameters, above 0 and at most 1, got {budget!r}")
    if not 0 <= beta < math.inf:
        raise OptionError(f"beta must be a finite number of at least 0, got {beta!r}")
    if not 0 <= min_delta <= 1:
        raise OptionError(f"min_delta must lie in [0, 1], got {min_delta!r}")
    sites = _tunable(model, where, bias)
    layers = [(site, matrix) for site in sites if (matrix := matrix_of(site)) is not None]
    if not layers:
        raise SiteError(f"{where!r} chooses norms only; CoLoRA allocates ranks to layers")
    values = [_contribution(site, scores) for site, _ in layers]
    top = max(values)
    if top == 0:
        raise OptionError("all contributions are zero: target and baseline are the same weights")
    total = sum(p.numel() for p in model.parameters())
    fixed = sum(_extra(site, bias) for site in sites)
    ratios = [(value / top) ** beta for value in values]
    matrices = [matrix for _, matrix in layers]

    def deltas(alpha: float) -> list[float]:
        return [min(max(alpha * ratio, min_delta), 1.0) for ratio in ratios]

    alpha = _largest_alpha(lambda a: fixed + _cost(matrices, deltas(a)), budget * total, budget)
    chosen = {
        site.path: (value, delta, matrix)
        for (site, matrix), value, delta in zip(layers, values, deltas(alpha), strict=True)
    }
    return Allocation(tuple(_share(site, chosen.get(site.path), bias) for site in sites), total)


def _glob(path: str) -> str:
    """A `where` term for this path alone, also where a module is called like a role (`norm`, `conv`)."""
    return f"[{path[0]}]{path[1:]}" if path in ROLES else path


def _tunable(model: nn.Module, where: str | list[str] | None, bias: bool) -> list[Site]:
    """The chosen sites without norms that have no scale."""
    chosen = select(find_sites(model), where, CoLoRA.default_roles, model_name=type(model).__name__)
    return [site for site in chosen if site.module._parameters.get(site.weight) is not None]


def _extra(site: Site, bias: bool) -> int:
    """Parameters of a site beside its matrix: the bias, and the scale of a norm."""
    covered = sum(part.width for part in site.parts) or site.out_features
    own = site.weight_shape.numel() if matrix_of(site) is None else 0
    return own + (covered if bias and has_bias(site) else 0)


def _share(site: Site, chosen: tuple[float, float, Matrix] | None, bias: bool) -> Share:
    extra, parts = _extra(site, bias), tuple(part.role for part in site.parts) or (site.role,)
    if chosen is None:
        return Share(site.path, site.role, parts, 0.0, 1.0, 0, True, extra)
    value, delta, matrix = chosen
    rank = matrix.rank(delta)
    return Share(site.path, site.role, parts, value, delta, rank, matrix.dense(rank), extra + matrix.tuned(rank))


def _cost(matrices: Iterable[Matrix], deltas: Iterable[float]) -> int:
    return sum(matrix.tuned(matrix.rank(delta)) for matrix, delta in zip(matrices, deltas, strict=True))


def _largest_alpha(cost: Callable[[float], int], allowed: float, budget: float) -> float:
    """Bisection on a rising step function. Above 2^40 even a layer of 1e-12 of the top one is tuned in full."""
    low, high = 0.0, 2.0**40
    if cost(low) > allowed:
        raise OptionError(
            f"budget={budget:g} allows {int(allowed):,} parameters, but rank 1 everywhere, biases and norms take "
            f"{cost(low):,}; raise the budget, choose fewer sites with `where`, or set bias=False"
        )
    if cost(high) <= allowed:
        return high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= allowed else (low, middle)
    return low


def _contribution(site: Site, scores: Mapping[str, float]) -> float:
    name = f"{site.path}.{site.weight}" if site.path else site.weight
    if name not in scores:
        raise OptionError(f"no contribution is given for {name!r}; {nearest(name, scores)}")
    value = float(scores[name])
    if not math.isfinite(value) or value < 0:
        raise OptionError(f"the contribution of {name!r} is {value}; it must be a finite number of at least 0")
    return value


def _fitting(own: Mapping[str, nn.Parameter], state: State, kind: str) -> dict[str, Tensor]:
    for name, parameter in own.items():
        if name not in state:
            raise CheckpointError(f"the {kind} lacks {name!r}; {nearest(name, state)}")
        if state[name].shape != parameter.shape:
            shapes = f"{tuple(state[name].shape)} for {tuple(parameter.shape)}"
            raise CheckpointError(f"the {kind} has {name!r} in another shape: {shapes}")
    return {name: state[name].detach().to(p.device, p.dtype, copy=True) for name, p in own.items()}


@contextlib.contextmanager
def _lent(model: nn.Module, own: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within: evaluation mode, every parameter with a gradient; afterwards all as it was, the values too."""
    modes = {module: module.training for module in model.modules()}
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in own.items()}
    model.eval()
    for parameter in own.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(before[name][0])
                parameter.requires_grad_(before[name][1])


def _path_gradient(
    model: nn.Module,
    own: Mapping[str, nn.Parameter],
    ends: list[dict[str, Tensor]],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    steps: int,
) -> dict[str, Tensor]:
    """Sum of the gradients at the N points; the first is the target, the baseline itself is not reached."""
    baseline, target = ends
    total = {name: torch.zeros_like(p) for name, p in own.items()}
    for step in range(steps):
        alpha = step / steps
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(alpha * baseline[name] + (1 - alpha) * target[name])
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite():
            raise OptionError(f"the loss must be one finite number, at step {step} of {steps} it is {value!r}")
        gradients = torch.autograd.grad(value.sum(), [*own.values()], allow_unused=True)
        for name, gradient in zip(own, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
    return total
