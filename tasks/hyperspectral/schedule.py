"""Cyclical learning rates: cosines with restarts, larger for the low-rank tensors.

Source: arXiv 2506.17759 describes a cyclical schedule that modulates the strength of adaptation; in the authors'
program it is this factor on the learning rate. Their training script uses another one, `restart_rate` after a warm-up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mmengine.hooks import Hook

from backbones.lola_specvit_layers import GatedLoRALinear
from zoo.adapters.selection import base_parameters
from zoo.errors import OptionError
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner


def cycle_rate(
    step: int, base: float, *, first: int = 10, growth: int = 2, lowest: float = 1e-6, scale: float = 1.0
) -> float:
    """lowest + scale (base - lowest) (1 + cos(pi t / T)) / 2, at step t of a cycle of T steps.

    The first cycle has `first` steps, each later one `growth` times as many. step: counted from 0.
    """
    length = first
    while step >= length:
        step, length = step - length, length * growth
    return lowest + scale * (base - lowest) * (1 + math.cos(math.pi * step / length)) / 2


def restart_rate(
    epoch: int,
    batch: int,
    batches: int,
    base: float,
    *,
    peak: float,
    warmup: int = 5,
    first: int = 10,
    growth: int = 2,
    lowest: float = 1e-6,
) -> float:
    """The rate that the authors' script uses for one batch: a warm-up by epochs, then cosines with restarts.

    The cosine moves after each batch, so a batch runs at the rate that the one before it set; the first batch after
    the warm-up still has the full rate. Cycles are counted from the start of the run, not from the warm-up's end.

    peak: rate of all groups at the end of the warm-up; the cosine then starts from the group's own `base`.
    """
    if epoch < warmup:
        return peak * (epoch + 1) / warmup
    last = epoch * batches + batch - 1  # the batch that moved the schedule last
    if last < warmup * batches:
        return peak
    at, length = last / batches, first
    while at >= length:
        at, length = at - length, length * growth
    return lowest + (base - lowest) * (1 + math.cos(math.pi * at / length)) / 2


@HOOKS.register_module()
class CyclicLoRA(Hook):  # type: ignore[misc]
    """Sets the learning rate before every step: cosines with restarts, `scale` times as high for low-rank tensors.

    Low-rank tensors are what gated LoRA layers and zoo adapters add; ask for a `param_scheduler=[]` beside this hook.
    The rate depends on the number of the step only, so a resumed run continues exactly.

    Args:
        first: steps of the first cycle. growth: how much longer each cycle is than the one before.
        lowest: rate at the end of a cycle. scale: factor for the low-rank tensors.

    Raises:
        OptionError: a cycle without steps, growth below 1, or a param_scheduler that would fight with it.
    """

    def __init__(self, first: int = 10, growth: int = 2, lowest: float = 1e-6, scale: float = 2.0) -> None:
        if first < 1 or growth < 1:
            raise OptionError(f"first and growth must be at least 1, got first={first}, growth={growth}")
        self.first, self.growth, self.lowest, self.scale = first, growth, lowest, scale
        self._groups: list[tuple[dict[str, Any], float, float]] = []  # group, base rate, factor

    def before_run(self, runner: ZooRunner) -> None:
        """Split the optimizer's groups into low-rank and other tensors; here, before a resume changes their rates."""
        optimizer = getattr(runner.optim_wrapper, "optimizer", None)
        if optimizer is None or self._groups:  # only evaluating, or testing after training
            return
        if runner.param_schedulers:
            raise OptionError("CyclicLoRA sets the learning rate itself: set param_scheduler=[]")
        low = low_rank_parameters(runner.bare_model)
        whole = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in whole:
            for factor, wanted in ((self.scale, True), (1.0, False)):
                own = [p for p in group["params"] if (id(p) in low) == wanted]
                if own:
                    optimizer.param_groups.append({**group, "params": own})
                    self._groups.append((optimizer.param_groups[-1], group["lr"], factor))

    def before_train_iter(self, runner: ZooRunner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the rates of this step."""
        groups = runner.optim_wrapper.optimizer.param_groups
        for group, (_, base, factor) in zip(groups, self._groups, strict=True):
            group["lr"] = cycle_rate(
                runner.iter, base, first=self.first, growth=self.growth, lowest=self.lowest, scale=factor
            )


def low_rank_parameters(model: Any) -> set[int]:
    """Ids of what gated LoRA layers and attached adapters add to a model."""
    base = {id(p) for _, p in base_parameters(model)}
    added = {id(p) for p in model.parameters()} - base
    layers = [module for module in model.modules() if isinstance(module, GatedLoRALinear)]
    return added | {id(p) for layer in layers for part in layer.added() for p in part.parameters()}
