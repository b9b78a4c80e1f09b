"""Moving average of the trained tensors only: the frozen backbone is not copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from mmengine.hooks import Hook
from torch import Tensor

from zoo.errors import CheckpointError, OptionError
from zoo.freeze import trainable_parameters
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner


@HOOKS.register_module()
class TrainableEMA(Hook):
    """After each optimizer step n: average = d * average + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)).

    The averages are evaluated, and stay in the model when training ends; training goes on with the raw weights.
    (Polyak and Juditsky 1992; the warm-up of d is TensorFlow's `num_updates` rule.)

    Args:
        decay: in (0, 1).
    """

    priority = "NORMAL"

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 < decay < 1.0:
            raise OptionError(f"decay lies between 0 and 1, got {decay}")
        self.decay = decay
        self.steps = 0
        self.averaged: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}

    def before_train(self, runner: ZooRunner) -> None:
        """Start from the weights as they are, unless a resume brought averages."""
        if not self.averaged:
            self.averaged = {n: p.detach().clone() for n, p in trainable_parameters(runner.bare_model).items()}

    @torch.no_grad()
    def after_train_iter(
        self, runner: ZooRunner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Fold the weights in, if they moved in this iteration."""
        if runner.optim_wrapper.mid_accumulation:
            return
        self.steps += 1
        weight = 1.0 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in trainable_parameters(runner.bare_model).items():
            self.averaged[name].lerp_(parameter, weight)

    def before_val_epoch(self, runner: ZooRunner) -> None:
        """Evaluate the averages."""
        if self.averaged:  # empty when a run only evaluates
            self._raw = {n: p.detach().clone() for n, p in trainable_parameters(runner.bare_model).items()}
            self._put(runner, self.averaged)

    def after_val_epoch(self, runner: ZooRunner, metrics: dict[str, Any] | None = None) -> None:
        """Back to the raw weights, bit by bit."""
        self._put(runner, self._raw)
        self._raw = {}

    def after_train(self, runner: ZooRunner) -> None:
        """The averages are the result."""
        self._put(runner, self.averaged)

    def before_save_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """The raw weights are saved as the model's; the averages beside them."""
        checkpoint["averaged"] = {"steps": self.steps, "tensors": self.averaged}

    def after_load_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """Take the averages back; a file of a run without them starts the average at its weights."""
        saved = checkpoint.get("averaged")
        if saved is None:
            runner.announce("the resume file holds no averaged weights: the average starts now")
            return
        parameters = trainable_parameters(runner.bare_model)
        if saved["tensors"].keys() != parameters.keys():
            raise CheckpointError("the averaged weights in the file are of another set of parameters")
        self.steps = saved["steps"]
        self.averaged = {name: saved["tensors"][name].to(p.device) for name, p in parameters.items()}

    @torch.no_grad()
    def _put(self, runner: ZooRunner, tensors: dict[str, Tensor]) -> None:
        parameters = trainable_parameters(runner.bare_model)
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
