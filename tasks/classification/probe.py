"""What a frozen backbone with the same head reaches on the same budget: the number an adapter has to beat."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmengine.hooks import Hook
from torch import Tensor

from zoo.adapters.inject import using
from zoo.engine.optim import build_optimizer
from zoo.errors import OptionError
from zoo.freeze import count
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner

Features = tuple[Tensor, list[dict[str, Any]]]


@HOOKS.register_module()
class ProbeBaseline(Hook):  # type: ignore[misc]
    """Trains the head alone on features of the plain backbone, before the run, and puts both in one table.

    What is the same as in the run: training images and their order, batch size, number of epochs and steps, the head
    and its starting values, the optimizer and its weight decay, validation images. What favours the baseline: it gets
    the best of several learning rates, chosen on the validation images themselves. What differs: its rate falls from
    the first step on by half a cosine, without warm-up.

    Features are computed once, so training images must not change from epoch to epoch. `probe/top1` beside each
    evaluation is the baseline after as many epochs.

    Args:
        rates: learning rates to try.

    Raises:
        OptionError: random training transforms, a batch augmentation, training by steps, or several processes.
    """

    priority = "NORMAL"  # before the table of results takes the metrics

    def __init__(self, rates: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2)) -> None:
        if not rates or min(rates) <= 0:
            raise OptionError(f"rates must be positive numbers, got {rates}")
        self.rates = tuple(rates)
        self.curve: list[float] = []  # top-1 after each epoch
        self.rate = 0.0
        self._last = 0.0

    def before_train(self, runner: ZooRunner) -> None:
        """Train the baseline, unless a resumed run brought its result along."""
        if self.curve:
            return
        _check(runner)
        model: Any = runner.bare_model
        with torch.random.fork_rng(), using(model.backbone):  # the run itself must not notice
            training = _features(model, runner.train_dataloader)
            validation = _features(model, runner.val_dataloader)
            curves = {rate: list(self._train(runner, training, validation, rate)) for rate in self.rates}
        self.rate = max(curves, key=lambda rate: (curves[rate][-1], -rate))
        self.curve = curves[self.rate]

    def after_val_epoch(self, runner: ZooRunner, metrics: dict[str, Any] | None = None) -> None:
        """Add the baseline's accuracy of the same epoch."""
        if metrics is not None and self.curve and runner.epoch:
            metrics["probe/top1"] = self.curve[min(runner.epoch, len(self.curve)) - 1]
            self._last = metrics.get("val/top1", 0.0)

    def before_save_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """Keep the result for a resumed run."""
        checkpoint["probe"] = {"curve": self.curve, "rate": self.rate}

    def after_load_checkpoint(self, runner: ZooRunner, checkpoint: dict[str, Any]) -> None:
        """Take the result back."""
        saved = checkpoint.get("probe")
        if saved is not None:
            self.curve, self.rate = list(saved["curve"]), saved["rate"]

    def after_train(self, runner: ZooRunner) -> None:
        """Print both numbers."""
        if runner.rank == 0 and self.curve:
            print(self.comparison(runner.bare_model), flush=True)

    def comparison(self, model: Any) -> str:
        """The table of both numbers."""
        head = sum(p.numel() for p in model.head.parameters())
        probe = f"best of {len(self.rates)} learning rates: {self.rate:g}"
        return (
            f"frozen backbone + same head   top-1 {self.curve[-1]:.4f}   {head:>9,} trained parameters ({probe})\n"
            f"this run                      top-1 {self._last:.4f}   {count(model).trainable:>9,} trained parameters\n"
            f"difference                          {100 * (self._last - self.curve[-1]):+.1f} points"
        )

    def _train(self, runner: ZooRunner, training: Features, validation: Features, rate: float) -> Iterator[float]:
        """Yields the validation accuracy after each epoch."""
        model: Any = runner.bare_model
        head = copy.deepcopy(model.head).requires_grad_(True).train()
        options = {**runner.cfg.optim_wrapper.optimizer, "lr": rate}
        optimizer = build_optimizer(head, **options)
        loader = runner.train_dataloader
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, runner.max_epochs * len(loader))
        features, samples = training
        place = {sample["index"]: i for i, sample in enumerate(samples)}
        for epoch in range(runner.max_epochs):
            loader.batch_sampler.set_epoch(epoch)
            for keys in loader.batch_sampler:
                rows = [place[key.index] for key in keys]
                loss = head.loss(head(features[rows]), [samples[row] for row in rows])["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            yield _accuracy(head, validation)


def _check(runner: ZooRunner) -> None:
    model: Any = runner.bare_model
    problems = {
        "a training transform without chance (EvalTransform)": _dataset(runner.train_dataloader).transform.random,
        "no batch_augment": model.data_preprocessor.batch_augment is not None,
        "training by epochs": not runner.cfg.train_cfg.get("by_epoch", True),
        "a single process": runner.world_size > 1,
    }
    needs = [need for need, broken in problems.items() if broken]
    if needs:
        raise OptionError(f"ProbeBaseline computes features once, which needs {', '.join(needs)}; or take the hook out")


def _dataset(loader: Any) -> Any:
    return getattr(loader.dataset, "dataset", loader.dataset)


@torch.no_grad()
def _features(model: Any, loader: Any) -> Features:
    """Pooled features (N, C) of everything the loader gives, and the N samples."""
    training = model.training
    model.eval()
    rows, samples = [], []
    for batch in loader:
        batch = model.data_preprocessor(batch, False)
        rows.append(model.extract(batch["inputs"]).float())
        samples += batch["data_samples"]
    model.train(training)
    return torch.cat(rows), samples


@torch.no_grad()
def _accuracy(head: Any, validation: Features) -> float:
    features, samples = validation
    head.eval()
    labels = head(features).argmax(-1)
    head.train()
    targets = torch.tensor([sample["label"] for sample in samples], device=labels.device)
    return float((labels == targets).double().mean())
