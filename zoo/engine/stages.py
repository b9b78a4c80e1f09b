"""Training in stages that let more and more adapted blocks train, shallow ones first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from mmengine.hooks import Hook

from zoo.adapters.attached import Attached
from zoo.adapters.hi_lora import check_stage, set_stage
from zoo.adapters.inject import attachments
from zoo.errors import OptionError, UnknownNameError, nearest
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner

Mode = Literal["continue", "stack"]


class Stage(NamedTuple):
    """`depth` blocks train for `epochs` epochs, at `lr_scale` times the optimizer's learning rates."""

    depth: int | None
    epochs: int
    lr_scale: float = 1.0


@HOOKS.register_module()
class HiLoRAStages(Hook):
    """Hierarchical stages of an adapter set (HiVG 2024): blocks below `depth` of a tower train, deeper ones wait.

    HiVG's: `stages=[dict(depth=0, epochs=60), dict(depth=5, epochs=20, lr_scale=0.4), dict(depth=8, epochs=20,
    lr_scale=0.2), dict(depth=12, epochs=20, lr_scale=0.1)]`. A stage starts with a fresh optimizer state and with
    `lr_scale` times the configured rates; give each stage a schedule of its own by `begin` and `end`. Resuming in the
    middle of a stage goes on with it, bit for bit; rates changed in the config count from the next stage on. The
    weights are those at the end of the stage before, not its best.

    Args:
        stages: in order; their epochs must add up to `train_cfg.max_epochs`. depth 0 freezes the set, None is all.
        adapter: name of the set.
        mode: "continue" trains one pair of factors further (HiVG's code), "stack" a new pair in each stage that has a
            depth, on top of the frozen earlier ones (its figure; needs HiLoRA with `pairs` at least that many).
        tower: path glob of the blocks that are ordered; other sites of the set train in every stage but depth 0.
        always: path globs of sites that train in every stage.

    Raises:
        OptionError: stages that do not fit the run, or a distributed run without find_unused_parameters.
        UnknownNameError: no such adapter set. SiteError: a glob that fits nothing.
    """

    priority = "VERY_HIGH"  # what trains is settled before averages and logs look at it

    def __init__(
        self,
        stages: Sequence[Mapping[str, Any]],
        adapter: str = "default",
        *,
        mode: Mode = "continue",
        tower: str = "*",
        always: Sequence[str] = (),
    ) -> None:
        if mode not in get_args(Mode):
            raise OptionError(f"mode {mode!r} is unknown; {nearest(str(mode), get_args(Mode))}")
        self.stages = [_stage(number, options) for number, options in enumerate(stages)]
        if not self.stages:
            raise OptionError("HiLoRAStages needs at least one stage")
        self.adapter = adapter
        self.mode = mode
        self.tower = tower
        self.always = tuple(always)
        self.current: int | None = None

    def before_train(self, runner: ZooRunner) -> None:
        """Check that every stage fits the model and the run."""
        epochs = sum(stage.epochs for stage in self.stages)
        if runner.max_epochs != epochs:
            raise OptionError(f"the stages take {epochs} epochs, but train_cfg.max_epochs is {runner.max_epochs}")
        if runner.distributed and not runner.cfg.get("find_unused_parameters", False):
            raise OptionError("frozen stages need find_unused_parameters=True at the top of the config")
        for group in runner.optim_wrapper.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        attached = self.find(runner)
        for number in range(len(self.stages)):
            check_stage(attached, **self.options(number))
        self.current = None

    def before_train_epoch(self, runner: ZooRunner) -> None:
        """Enter the stage this epoch belongs to; at its first step with a fresh optimizer."""
        number, first = self.stage_of(runner.epoch)
        if number == self.current:
            return
        trained = set_stage(self.find(runner), **self.options(number))
        self.current = number
        if runner.iter == first * len(runner.train_loop.dataloader):
            self._renew(runner, number)
        blocks = "all" if self.stages[number].depth is None else self.stages[number].depth
        runner.logger.info(f"stage {number}: {blocks} blocks, {len(trained)} tensors of {self.adapter!r} train")

    def before_save_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """The rates of this stage are not the config's."""
        checkpoint["stage_rates"] = [group["lr"] for group in runner.optim_wrapper.optimizer.param_groups]

    def after_load_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """Take the rates back; a file of a run without stages keeps what it has."""
        groups = runner.optim_wrapper.optimizer.param_groups
        for group, rate in zip(groups, checkpoint.get("stage_rates", []), strict=False):
            group["lr"] = rate

    def stage_of(self, epoch: int) -> tuple[int, int]:
        """Number and first epoch of the stage that `epoch` lies in."""
        first = 0
        for number, stage in enumerate(self.stages):
            if epoch < first + stage.epochs:
                return number, first
            first += stage.epochs
        raise OptionError(f"epoch {epoch} lies behind the last stage, which ends at {first}")

    def find(self, runner: ZooRunner) -> Attached:
        """The adapter set; raises `UnknownNameError`."""
        known = {name: one for name, one in attachments(runner.bare_model).items() if isinstance(one, Attached)}
        if self.adapter not in known:
            raise UnknownNameError(f"no adapter set is called {self.adapter!r}; {nearest(self.adapter, known)}")
        return known[self.adapter]

    def options(self, number: int) -> dict[str, Any]:
        """What `set_stage` takes for stage `number`."""
        growing = [n for n, stage in enumerate(self.stages[: number + 1]) if stage.depth != 0]
        pair = max(0, len(growing) - 1) if self.mode == "stack" else 0
        return dict(depth=self.stages[number].depth, tower=self.tower, always=self.always, pair=pair)

    def _renew(self, runner: ZooRunner, number: int) -> None:
        optimizer = runner.optim_wrapper.optimizer
        optimizer.state.clear()
        for group in optimizer.param_groups:
            start = group["lr"] if number == 0 else group["initial_lr"]  # a warm-up has begun before stage 0
            group["lr"] = start * self.stages[number].lr_scale


def _stage(number: int, options: Mapping[str, Any]) -> Stage:
    unknown = [key for key in options if key not in Stage._fields]
    if unknown:
        raise OptionError(f"stage {number} takes no option {unknown[0]!r}; {nearest(unknown[0], Stage._fields)}")
    if "depth" not in options or "epochs" not in options:
        raise OptionError(f"stage {number} needs depth and epochs, got {dict(options)!r}")
    stage = Stage(**options)
    if isinstance(stage.epochs, bool) or not isinstance(stage.epochs, int) or stage.epochs < 1:
        raise OptionError(f"stage {number}: epochs must be a whole number of at least 1, got {stage.epochs!r}")
    if not (math.isfinite(stage.lr_scale) and stage.lr_scale > 0):
        raise OptionError(f"stage {number}: lr_scale must be a positive number, got {stage.lr_scale!r}")
    return stage
