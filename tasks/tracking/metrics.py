"""One-pass evaluation: overlap and distance curves in the profiles that published numbers use.

Boxes are x, y, width, height. Profiles differ in which frames are valid and what invalid ones count as:

    stark       LoRAT, OSTrack, STARK: valid where the truth has w > 0 and h > 0 (and the object is visible)
    pytracking  visionml/pytracking: valid where all four numbers of the truth are > 0; empty predictions repeat the
                previous one, tracks of another length are cut or padded with their last box
    got10k      got-10k/toolkit: without the first frame and frames of cover 0, boxes cut to the image

In the first two an invalid frame stays in the denominator. Its overlap is -1 and its distance infinite, so it fails;
its normalised distance is -1, so it counts as a hit; on LaSOT and VastTrack (`invisible_hit=False`) not where the
object is labelled invisible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mmengine.evaluator import BaseMetric
from numpy.typing import NDArray

from tasks.tracking.sequences import xywh
from tasks.tracking.tracker import Track
from zoo.errors import OptionError, ZooError, nearest
from zoo.registry import METRICS

Array = NDArray[np.float64]
PROFILES = ("stark", "pytracking", "got10k")
OVERLAPS = np.linspace(0, 1, 21)
PIXELS = np.arange(51.0)
SHARES = np.arange(51) / 100


class Curves(NamedTuple):
    """Shares of a sequence's frames: overlap above each of 21 thresholds, (normalised) distance within each of 51."""

    success: Array
    precision: Array
    norm_precision: Array


def evaluate(
    truth: Array,
    found: Array,
    visible: NDArray[np.bool_] | None = None,
    *,
    profile: str = "stark",
    invisible_hit: bool = True,
) -> Curves:
    """Curves of one sequence (profiles "stark" and "pytracking").

    truth, found: (T, 4). visible: (T,), where the data set has such labels.

    Raises:
        OptionError: unknown profile. ZooError: tracks of another length (stark), or numbers that are not finite.
    """
    if profile not in PROFILES[:2]:
        raise OptionError(f"no curves are called {profile!r}; {nearest(profile, PROFILES[:2])}")
    truth, found = np.asarray(truth, float), np.asarray(found, float)
    if profile == "pytracking":
        found = _repaired(found, len(truth))
    if len(found) != len(truth):
        raise ZooError(f"{len(found)} boxes were found in {len(truth)} frames")
    found = np.concatenate((truth[:1], found[1:]))
    if not np.isfinite(found).all():
        raise ZooError(f"the track holds numbers that are not finite, first in frame {_first_bad(found)}")
    valid = (truth > 0).all(1) if profile == "pytracking" else (truth[:, 2:] > 0).all(1)
    hidden = np.zeros(len(truth), bool) if visible is None else ~np.asarray(visible, bool)
    valid &= ~hidden
    iou = np.where(valid, overlap(truth, found), -1)
    gap = _centre(found) - _centre(truth)
    distance = np.where(valid, np.hypot(*gap.T), np.inf)
    sides = np.where(valid[:, None], truth[:, 2:], 1)
    norm = np.where(valid, np.hypot(*(gap / sides).T), -1)
    if not invisible_hit:
        norm[hidden] = np.inf
    return Curves(
        (iou[:, None] > OVERLAPS).mean(0),
        (distance[:, None] <= PIXELS).mean(0),
        (norm[:, None] <= SHARES).mean(0),
    )


def mean_curves(curves: Sequence[Curves]) -> Curves:
    """The mean over sequences."""
    return Curves(*(np.mean(column, 0) for column in zip(*curves, strict=True)))


def summary(curves: Sequence[Curves]) -> dict[str, float]:
    """Means over sequences, in 0..1: area under the success curve, OP50, OP75, precision at 20 px, at 0.20."""
    success, precision, norm = mean_curves(curves)
    return {
        "auc": float(success.mean()),
        "op50": float(success[10]),
        "op75": float(success[15]),
        "precision": float(precision[20]),
        "norm_precision": float(norm[20]),
    }


def got10k_overlaps(
    truth: Array, found: Array, cover: NDArray[np.int64] | None, image_size: tuple[int, int] | None
) -> Array:
    """Overlaps of the frames that count: not the first, and with cover above 0; boxes cut to image_size (H, W)."""
    if len(found) != len(truth):
        raise ZooError(f"{len(found)} boxes were found in {len(truth)} frames")
    if image_size is not None:
        truth, found = _cut(truth, image_size), _cut(found, image_size)
    kept = np.ones(len(truth), bool) if cover is None else np.asarray(cover) > 0
    kept[0] = False
    return overlap(truth, found)[kept]


def got10k_summary(overlaps: Sequence[Array]) -> dict[str, float]:
    """All frames pooled: `ao` mean overlap, `sr50` and `sr75` shares above 0.5 and 0.75."""
    pooled = np.concatenate(overlaps)
    return {
        "ao": float(pooled.mean()),
        "sr50": float((pooled > 0.5).mean()),
        "sr75": float((pooled > 0.75).mean()),
    }


def overlap(a: Array, b: Array) -> Array:
    """(T, 4) and (T, 4) -> IoU (T,); 0 where both are empty."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    inner = (high - low).clip(min=0).prod(1)
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - inner
    return np.asarray((inner / np.where(union > 0, union, 1)).clip(0, 1))


@METRICS.register_module()
class TrackingMetric(BaseMetric):  # type: ignore[misc]
    """One-pass evaluation of whole sequences; the same numbers for a box that never moves come as `still_...`.

    Args:
        profile: "stark", "pytracking" or "got10k" (see the module's text).
        invisible_hit: False for LaSOT and VastTrack.
        prefix: first part of the reported names; "test" for a test evaluator.

    Raises:
        ZooError: a sequence without public truth.
    """

    default_prefix = "val"

    def __init__(self, *, profile: str = "stark", invisible_hit: bool = True, prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)
        if profile not in PROFILES:
            raise OptionError(f"no profile is called {profile!r}; {nearest(profile, PROFILES)}")
        self.profile, self.invisible_hit = profile, invisible_hit
        self.curves: dict[str, Curves] | None = None  # "tracker" and "still box": means over sequences

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[Track]) -> None:
        """Add sequences (`inputs` of the loader's batch) and their tracks."""
        for sequence, track in zip(data_batch["inputs"], data_samples, strict=True):
            if not sequence.annotated:
                raise ZooError(
                    f"only the first box of {sequence.name} is public; write result files with tools/track.py and "
                    "send them to the benchmark's server"
                )
            truth, found = xywh(sequence.boxes), xywh(track.boxes)
            still = np.repeat(truth[:1], len(truth), 0)
            rate = len(track.seconds) / max(float(track.seconds.sum()), 1e-9)
            self.results.append((self._score(sequence, truth, found), self._score(sequence, truth, still), rate))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Sequences -> named scalars."""
        found, still, rates = zip(*results, strict=True)
        join = got10k_summary if self.profile == "got10k" else summary
        if self.profile != "got10k":
            self.curves = {name: mean_curves(all_of) for name, all_of in (("tracker", found), ("still box", still))}
        metrics = join(found)
        metrics |= {f"still_{name}": value for name, value in join(still).items()}
        return {**metrics, "frames_per_s": float(np.mean(rates))}

    def _score(self, sequence: Any, truth: Array, found: Array) -> Any:
        if self.profile == "got10k":
            height, width = sequence.frames[0].shape[:2]
            return got10k_overlaps(truth, found, sequence.cover, (height, width))
        options: dict[str, Any] = {"profile": self.profile, "invisible_hit": self.invisible_hit}
        return evaluate(truth, found, sequence.visible, **options)


def _centre(boxes: Array) -> Array:
    return boxes[:, :2] + 0.5 * (boxes[:, 2:] - 1)


def _cut(boxes: Array, size: tuple[int, int]) -> Array:
    edges = np.array([size[1], size[0]], float)
    low = boxes[:, :2].clip(0, edges)
    return np.concatenate((low, (boxes[:, :2] + boxes[:, 2:]).clip(0, edges) - low), 1)


def _repaired(found: Array, length: int) -> Array:
    """Cut or padded to `length`; boxes with a side of 0 or with NaN repeat the one before."""
    found = np.concatenate((found[:length], np.repeat(found[-1:], max(length - len(found), 0), 0)))
    for i in range(1, len(found)):
        if (found[i, 2:] == 0).any() or np.isnan(found[i]).any():
            found[i] = found[i - 1]
    return found


def _first_bad(found: Array) -> int:
    return int(np.flatnonzero(~np.isfinite(found).all(1))[0])
