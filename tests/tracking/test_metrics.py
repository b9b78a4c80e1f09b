"""Metrics against the authors' code and the public toolkits, and what must hold by definition."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tasks.tracking.metrics import (
    TrackingMetric,
    evaluate,
    got10k_overlaps,
    got10k_summary,
    overlap,
    summary,
)
from tasks.tracking.sequences import TrackSequence, xyxy
from tasks.tracking.tracker import Track
from zoo.errors import OptionError, ZooError

GOLDEN = Path(__file__).parents[1] / "golden" / "lorat"
NAMES = {"SUC": "auc", "P": "precision", "NP": "norm_precision", "OP50": "op50", "OP75": "op75"}


@pytest.fixture(scope="module")
def golden():
    tensors = {key: value.numpy() for key, value in load_file(GOLDEN / "ope_metrics.safetensors").items()}
    return tensors, json.loads((GOLDEN / "ope_metrics.json").read_text())


def case(t, i):
    return t[f"in.{i}.gt_xywh.f64"], t[f"in.{i}.pred_xywh.f64"], t[f"in.{i}.visible"].astype(bool)


@pytest.mark.parametrize("profile", ["stark", "pytracking"])
@pytest.mark.parametrize("data", ["lasot", "lasot_extension", "otb100"])
def test_golden_curves(golden, profile, data):
    t, info = golden
    found = []
    for i in range(3):
        truth, track, visible = case(t, i)
        labels = None if data == "otb100" else visible
        found.append(evaluate(truth, track, labels, profile=profile, invisible_hit=data != "lasot"))
        expected = {name: t[f"out.{profile}.{data}.{name}_curve"][i] for name in found[i]._fields}
        # Both codes let the overlap of a perfect frame (the first one) come out as 1 + 1e-16 by the way they round
        # fractions, which counts as above 1: the last bin is equal to within that one frame.
        np.testing.assert_allclose(found[i].success[:20], expected["success"][:20], atol=1e-6)
        np.testing.assert_allclose(found[i].success[20], expected["success"][20], atol=1.01 / len(truth))
        np.testing.assert_allclose(found[i].precision, expected["precision"], atol=1e-6)
        np.testing.assert_allclose(found[i].norm_precision, expected["norm_precision"], atol=1e-6)
    numbers = summary(found)
    for theirs, ours in NAMES.items():
        slack = 1 / (21 * 45) if theirs == "SUC" else 1e-6
        assert numbers[ours] == pytest.approx(info["summary"][f"{profile}.{data}"][theirs], abs=slack)


def test_golden_got10k(golden):
    t, info = golden
    width, height = info["config"]["image_WH"]
    overlaps = []
    for i in range(3):
        truth, track, visible = case(t, i)
        overlaps.append(got10k_overlaps(truth, track, visible.astype(int), (height, width)))
        np.testing.assert_allclose(overlaps[i], t[f"out.got10k.{i}.iou.f64"], atol=1e-9)
        assert got10k_summary(overlaps[i : i + 1]) == pytest.approx(info["summary"]["got10k.seq_wise"][i])
    assert got10k_summary(overlaps) == pytest.approx(info["summary"]["got10k.overall_frames"])


def test_a_perfect_track():
    """An overlap of 1 is not above 1, so 20 of 21 thresholds hold; GOT-10k's mean is 1."""
    boxes = np.random.default_rng(0).uniform(1, 50, (30, 4)).round()
    for profile in ("stark", "pytracking"):
        numbers = summary([evaluate(boxes, boxes, profile=profile)])
        assert numbers["auc"] == pytest.approx(20 / 21) and numbers["precision"] == numbers["norm_precision"] == 1
    assert got10k_summary([got10k_overlaps(boxes, boxes, None, None)])["ao"] == 1


def test_empty_boxes_overlap_nothing():
    assert overlap(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [0.0]


def test_lengths_and_numbers_are_checked():
    truth = np.tile([5.0, 5, 10, 10], (4, 1))
    with pytest.raises(ZooError, match="3 boxes were found in 4 frames"):
        evaluate(truth, truth[:3])
    padded = evaluate(truth, truth[:2], profile="pytracking")
    assert padded.precision[20] == 1
    broken = truth.copy()
    broken[2] = np.nan
    with pytest.raises(ZooError, match="first in frame 2"):
        evaluate(truth, broken)
    assert evaluate(truth, broken, profile="pytracking").precision[20] == 1  # repeats the box before
    with pytest.raises(OptionError, match="did you mean 'stark'"):
        evaluate(truth, truth, profile="starc")
    with pytest.raises(OptionError, match="no profile"):
        TrackingMetric(profile="vot")


def test_metric_reports_the_still_box_beside_the_track():
    truth = np.array([[0.0, 0, 10, 10], [5, 0, 10, 10], [20, 0, 10, 10]])
    frames = np.zeros((3, 40, 40, 3), np.uint8)
    sequence = TrackSequence("moving", frames, xyxy(truth))
    track = Track(xyxy(truth), np.ones(3), np.full(3, 0.1))
    for profile, name in (("stark", "op50"), ("got10k", "sr50")):
        metric = TrackingMetric(profile=profile)
        metric.process({"inputs": [sequence]}, [track])
        metrics = metric.evaluate(1)
        assert metrics[f"val/{name}"] == 1 and metrics[f"val/still_{name}"] == (1 / 3 if profile == "stark" else 0)
        assert metrics["val/frames_per_s"] == pytest.approx(10)
    hidden = TrackSequence("server", frames, xyxy(truth[:1]))
    with pytest.raises(ZooError, match="only the first box of server is public"):
        TrackingMetric().process({"inputs": [hidden]}, [track])
