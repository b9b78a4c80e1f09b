"""Overall accuracy, average accuracy, kappa and the accuracy of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from numpy.typing import ArrayLike, NDArray

from zoo.errors import ZooError
from zoo.registry import METRICS


def confusion(truth: ArrayLike, predicted: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """(N,) true and (N,) predicted classes 0..C-1 -> (C, C) counts, row true, column predicted."""
    flat = np.asarray(truth, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracy(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(C,) share of each true class that is right; NaN for a class that occurs neither in truth nor in prediction,
    0 for one that is predicted and never true."""
    rows, columns = counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        shares = np.diag(counts) / np.maximum(rows, 1)
    return np.where(rows + columns > 0, shares, np.nan)


def accuracies(counts: NDArray[np.int64]) -> dict[str, float]:
    """`OA` = right / all; `AA` = mean of `class_accuracy`; `kappa` = (OA - e) / (1 - e) with e the agreement expected
    of independent row and column totals (Cohen 1960)."""
    total = counts.sum()
    if total == 0:
        raise ZooError("no labelled pixel was predicted, so there is no accuracy")
    observed = float(np.trace(counts) / total)
    expected = float((counts.sum(1) * counts.sum(0)).sum() / float(total) ** 2)
    kappa = (observed - expected) / (1 - expected) if expected < 1 else 0.0
    return {"OA": observed, "AA": float(np.nanmean(class_accuracy(counts))), "kappa": kappa}


@METRICS.register_module()
class SceneMetric(BaseMetric):  # type: ignore[misc]
    """OA, AA and kappa in 0..1 over all pixels of a part, gathered from all processes.

    After `evaluate`, `confusion` is (C, C) int64: row true, column predicted.

    Args:
        prefix: first part of the reported names; "test" for a test evaluator.

    Raises:
        ZooError: probabilities that are not finite (the model diverged), or a label outside the classes.
    """

    default_prefix = "val"

    def __init__(self, *, prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)
        self.num_classes = 0
        self.confusion: NDArray[np.int64] | None = None

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        """Add one batch: targets from the loader's batch, `probabilities` (C,) from the predictions."""
        for sample, result in zip(data_batch["data_samples"], data_samples, strict=True):
            target, place = int(sample["label"]), (sample.get("row"), sample.get("column"))
            self.num_classes = len(result["probabilities"])
            if not bool(torch.isfinite(result["probabilities"]).all()):
                raise ZooError(f"the model diverged: its output for the pixel {place} is not finite")
            if not 0 <= target < self.num_classes:
                raise ZooError(f"label {target} of the pixel {place} is outside 0..{self.num_classes - 1}")
            self.results.append((target, int(result["label"])))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """All pixels -> named scalars; sets `confusion`."""
        truth, predicted = zip(*results, strict=True)
        self.confusion = confusion(truth, predicted, self.num_classes)
        return accuracies(self.confusion)
