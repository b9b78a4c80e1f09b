"""Classification metrics: top-1, top-5, mean per class, calibration error, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from zoo.errors import OptionError, ZooError
from zoo.registry import METRICS


class Outcome(NamedTuple):
    """One evaluated sample: its class, the predicted one, the rank of its own class (0 = first), the top score."""

    target: int
    label: int
    rank: int
    score: float


@METRICS.register_module()
class ClassificationMetric(BaseMetric):  # type: ignore[misc]
    """Accuracies in 0..1 over a whole data set, gathered from all processes.

    `top1`, `top5`: share of samples whose class is (among) the most probable; equal probabilities rank by class index.
    `mean_class`: mean over the classes present of the share of their samples that are right.
    `ece`: expected calibration error over 15 equal-width bins of the score, sum_b n_b / n |acc_b - conf_b|
    (Guo et al. 2017, arXiv 1706.04599, eq. 3).
    After `evaluate`, `confusion` is (K, K) int64: row true, column predicted.

    Args:
        topk: which k to report; those with k >= K are left out, as they are 1 by definition.
        bins: number of bins of the calibration error.
        prefix: first part of the reported names; "test" for a test evaluator.

    Raises:
        ZooError: probabilities that are not finite (the model diverged), or a label outside the classes.
    """

    default_prefix = "val"

    def __init__(self, *, topk: Sequence[int] = (1, 5), bins: int = 15, prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)
        if not topk or min(topk) < 1 or bins < 1:
            raise OptionError(f"topk and bins must be at least 1, got topk={tuple(topk)}, bins={bins}")
        self.topk = tuple(topk)
        self.bins = bins
        self.num_classes = 0
        self.confusion: Tensor | None = None

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        """Add one batch: targets from the loader's batch, `probabilities` (K,) from the predictions."""
        for sample, result in zip(data_batch["data_samples"], data_samples, strict=True):
            probabilities, target = result["probabilities"], int(sample["label"])
            self.num_classes = len(probabilities)
            if not bool(torch.isfinite(probabilities).all()):
                raise ZooError(f"the model diverged: its output for sample {sample.get('index')} is not finite")
            if not 0 <= target < self.num_classes:
                raise ZooError(f"label {target} of sample {sample.get('index')} is outside 0..{self.num_classes - 1}")
            own = probabilities[target]
            rank = int((probabilities > own).sum() + (probabilities[:target] == own).sum())
            label = int(probabilities.argmax())
            self.results.append(Outcome(target, label, rank, float(probabilities[label])))

    def compute_metrics(self, results: list[Outcome]) -> dict[str, float]:
        """All outcomes -> named scalars; sets `confusion`."""
        target, label, rank, score = (torch.tensor(column) for column in zip(*results, strict=True))
        self.confusion = confusion_matrix(target, label, self.num_classes)
        metrics = {f"top{k}": float((rank < k).double().mean()) for k in self.topk if k < self.num_classes}
        metrics["mean_class"] = mean_class_accuracy(self.confusion)
        metrics["ece"] = calibration_error(score, label == target, self.bins)
        return metrics


def confusion_matrix(target: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(N,) true and (N,) predicted classes -> (K, K) counts, row true, column predicted."""
    flat = target.long() * num_classes + label.long()
    return torch.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_class_accuracy(confusion: Tensor) -> float:
    """Mean of the diagonal shares of the rows that have samples."""
    counts = confusion.sum(1)
    present = counts > 0
    return float((confusion.diagonal()[present] / counts[present].double()).mean())


def calibration_error(score: Tensor, correct: Tensor, bins: int = 15) -> float:
    """(N,) scores in [0, 1], (N,) bools -> expected calibration error; bin b is (b / bins, (b + 1) / bins]."""
    score, hits = score.double(), correct.double()
    index = (score * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add(0, index, hits - score)  # n_b (acc_b - conf_b)
    return float(gap.abs().sum() / len(score))
