"""Classification metrics against values worked out by hand."""

import pytest
import torch

from tasks.classification.metrics import ClassificationMetric, calibration_error, confusion_matrix, mean_class_accuracy
from zoo.errors import OptionError, ZooError
from zoo.registry import METRICS


def evaluate(metric, probabilities, targets):
    for row, target in zip(probabilities, targets, strict=True):  # batches of one
        metric.process({"data_samples": [{"label": target}]}, [{"probabilities": torch.tensor(row)}])
    return metric.evaluate(len(targets))


def test_top_k_by_hand():
    rows = [
        [0.40, 0.30, 0.15, 0.10, 0.03, 0.02],
        [0.40, 0.30, 0.15, 0.10, 0.03, 0.02],
        [0.40, 0.30, 0.15, 0.10, 0.03, 0.02],
        [0.40, 0.30, 0.15, 0.10, 0.03, 0.02],
    ]
    found = evaluate(METRICS.create("ClassificationMetric"), rows, [0, 1, 4, 5])  # ranks 0, 1, 4, 5
    assert found["val/top1"] == 0.25 and found["val/top5"] == 0.75
    assert set(found) == {"val/top1", "val/top5", "val/mean_class", "val/ece"}


def test_k_of_all_classes_is_left_out_and_prefix_is_free():
    found = evaluate(ClassificationMetric(prefix="test"), [[0.9, 0.1], [0.9, 0.1]], [0, 1])
    assert "test/top5" not in found and found["test/top1"] == 0.5


def test_ties_agree_with_argmax():
    """An untrained model (all classes equal) is right exactly for class 0, not for every class."""
    metric = ClassificationMetric(topk=(1, 2))
    found = evaluate(metric, [[0.25] * 4] * 4, [0, 1, 2, 3])
    assert found["val/top1"] == 0.25 and found["val/top2"] == 0.5
    assert metric.confusion.tolist() == [[1, 0, 0, 0]] * 4


def test_confusion_and_mean_class():
    target, label = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 0, 2])
    confusion = confusion_matrix(target, label, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert mean_class_accuracy(confusion) == pytest.approx((0.75 + 0.5 + 1.0) / 3)  # class 3 is absent


def test_mean_class_differs_from_top1_on_unbalanced_data():
    metric = ClassificationMetric()
    found = evaluate(metric, [[0.9, 0.1]] * 10, [0] * 9 + [1])
    assert found["val/top1"] == 0.9 and found["val/mean_class"] == 0.5


def test_calibration_error_by_hand():
    # Bins of 1/15: 0.95 twice in bin 14 (one right), 0.55 in bin 8 (right): (2 |0.5 - 0.95| + |1 - 0.55|) / 3
    score, correct = torch.tensor([0.95, 0.95, 0.55]), torch.tensor([True, False, True])
    assert calibration_error(score, correct) == pytest.approx((2 * 0.45 + 0.45) / 3)
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0.0
    assert calibration_error(torch.tensor([0.0]), torch.tensor([False])) == 0.0
    # Errors of opposite sign cancel inside a bin, and only there.
    assert calibration_error(torch.tensor([0.5, 0.5]), torch.tensor([True, False]), bins=1) == 0.0


def test_a_second_evaluation_starts_empty():
    metric = ClassificationMetric()
    evaluate(metric, [[0.9, 0.1]], [1])
    assert evaluate(metric, [[0.9, 0.1]], [0])["val/top1"] == 1.0
    assert metric.confusion.sum() == 1


def test_refusals():
    with pytest.raises(ZooError, match="diverged"):
        evaluate(ClassificationMetric(), [[float("nan"), 0.1]], [0])
    with pytest.raises(ZooError, match="label 2 of sample"):
        evaluate(ClassificationMetric(), [[0.5, 0.5]], [2])
    with pytest.raises(OptionError, match="topk"):
        ClassificationMetric(topk=(0,))
