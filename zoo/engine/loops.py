"""Training loops that can start in the middle of an epoch and say when a state is whole enough to save.

After every step, and once more after every epoch with its validation, they call the hook stage
`save_point(runner, epoch_done)`. There `runner.epoch` and `runner.iter` count what is done, and nothing is half done.
"""

from __future__ import annotations

from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.utils import calc_dynamic_intervals
from torch import nn

from zoo.engine.data import ResumableBatches
from zoo.errors import CheckpointError, OptionError
from zoo.registry import LOOPS


def _batches(loop: EpochBasedTrainLoop | IterBasedTrainLoop) -> ResumableBatches:
    batches = loop.dataloader.batch_sampler
    if not isinstance(batches, ResumableBatches):
        raise OptionError("give train_dataloader as a config dict, so that the engine can resume mid-epoch")
    return batches


@LOOPS.register_module()
class EpochLoop(EpochBasedTrainLoop):
    """Epochs over the training set; `train_cfg=dict(by_epoch=True, max_epochs=...)` builds it."""

    def run(self) -> nn.Module:
        """Train to the end, from wherever `_epoch` and `_iter` stand."""
        self.runner.call_hook("before_train")
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self.runner.val_loop is not None and self._val_is_due():
                self.runner.val_loop.run()
            self.runner.call_hook("save_point", epoch_done=True)
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        """The rest of the current epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        _batches(self).skip = done
        for number, batch in enumerate(self.dataloader, done):
            self.run_iter(number, batch)
            self.runner.call_hook("save_point", epoch_done=False)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def set_progress(self, epoch: int, iteration: int, steps_per_epoch: int) -> None:
        """Continue after `iteration` steps of a run whose epochs had `steps_per_epoch`.

        Raises:
            CheckpointError: the epoch now has another number of steps and the run stopped in the middle of one.
        """
        now = len(self.dataloader)
        if now != steps_per_epoch and iteration != epoch * steps_per_epoch:
            raise CheckpointError(
                f"the checkpoint stands in the middle of an epoch of {steps_per_epoch} steps, and an epoch now has "
                f"{now}: batch size, number of processes or data set changed; restore them, or resume from a "
                "checkpoint written at the end of an epoch"
            )
        self._epoch = epoch
        self._iter = epoch * now + (iteration - epoch * steps_per_epoch)

    def _val_is_due(self) -> bool:
        last = self._epoch == self._max_epochs
        return bool(self._epoch >= self.val_begin and (self._epoch % self.val_interval == 0 or last))


@LOOPS.register_module()
class IterLoop(IterBasedTrainLoop):
    """A fixed number of steps; `train_cfg=dict(by_epoch=False, max_iters=...)` builds it."""

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: list[tuple[int, int]] | None = None,
    ) -> None:
        # mmengine's own __init__ starts the data iterator, before a resumed run knows where to start.
        BaseLoop.__init__(self, runner, dataloader)
        self._max_iters, self._max_epochs = max_iters, 1
        self._epoch = self._iter = 0
        self.val_begin, self.val_interval = val_begin, val_interval
        self.stop_training = False  # EarlyStoppingHook sets it
        self.dynamic_milestones, self.dynamic_intervals = calc_dynamic_intervals(val_interval, dynamic_intervals)

    def run(self) -> nn.Module:
        """Train to the end, from wherever `_iter` stands."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        batches = self._endless()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            due = self._iter >= self.val_begin and self._iter % self.val_interval == 0
            if self.runner.val_loop is not None and (due or self._iter == self._max_iters):
                self.runner.val_loop.run()
            self.runner.call_hook("save_point", epoch_done=False)
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _endless(self) -> Any:
        sampler = _batches(self)
        endless = isinstance(sampler.batches.sampler, InfiniteSampler)  # one pass that never ends
        passes, done = (0, self._iter) if endless else divmod(self._iter, len(self.dataloader))
        while True:
            sampler.set_epoch(passes)
            sampler.skip = done
            yield from self.dataloader
            passes, done = passes + 1, 0

    def set_progress(self, epoch: int, iteration: int, steps_per_epoch: int) -> None:
        """Continue after `iteration` steps; a changed length of the data only matters from the next pass on."""
        if len(self.dataloader) != steps_per_epoch:
            raise CheckpointError(
                f"one pass over the data had {steps_per_epoch} steps and now has {len(self.dataloader)}: "
                "batch size, number of processes or data set changed; restore them to resume"
            )
        self._epoch, self._iter = epoch, iteration
