"""What the classifier heads share: targets, cross-entropy and decoding. The heads differ in `forward` only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import OptionError


class ClassificationHead(nn.Module):
    """Base of the heads over pooled features (B, C).

    Args:
        num_classes: K, at least 2.
        label_smoothing: mass in [0, 1) spread evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567). It is
            linear in the targets, so mixed (soft) targets are smoothed here too and nowhere else.
    """

    def __init__(self, num_classes: int, label_smoothing: float) -> None:
        super().__init__()
        if num_classes < 2:
            raise OptionError(f"a classifier needs num_classes of at least 2, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise OptionError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Tensor, data_samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Logits (B, K) and B samples -> `{"loss": scalar}`, the mean cross-entropy in fp32.

        Raises:
            OptionError: a sample without a target, a class index outside [0, K), or soft labels of another width.
        """
        targets = self.targets(outputs, data_samples)
        return {"loss": F.cross_entropy(outputs.float(), targets, label_smoothing=self.label_smoothing)}

    def predict(self, outputs: Tensor, data_samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Logits (B, K) -> B dicts: `label` (int), its probability `score`, `probabilities` (K,) fp32 on the CPU."""
        probabilities = outputs.detach().float().softmax(-1).cpu()
        scores, labels = probabilities.max(-1)
        rows = zip(labels.tolist(), scores.tolist(), probabilities, strict=True)
        return [{"label": label, "score": score, "probabilities": row} for label, score, row in rows]

    def targets(self, outputs: Tensor, data_samples: Sequence[dict[str, Any]]) -> Tensor:
        """(B,) int64 from `label`, or (B, K) from `soft_label` where a batch augmentation mixed the samples."""
        if len(data_samples) != len(outputs):
            raise OptionError(f"{len(outputs)} outputs came with {len(data_samples)} data_samples")
        key = "soft_label" if "soft_label" in data_samples[0] else "label"
        absent = [i for i, sample in enumerate(data_samples) if key not in sample]
        if absent:
            held = sorted(data_samples[absent[0]])
            raise OptionError(f"sample {absent[0]} of the batch has no {key!r}; it has {held}")
        if key == "soft_label":
            soft = torch.stack([sample[key] for sample in data_samples]).to(outputs)
            if soft.shape != outputs.shape:
                raise OptionError(f"soft labels of shape {tuple(soft.shape)} do not fit logits {tuple(outputs.shape)}")
            return soft.float()
        labels = [int(sample[key]) for sample in data_samples]
        wrong = [label for label in labels if not 0 <= label < self.num_classes]
        if wrong:
            raise OptionError(f"label {wrong[0]} is outside 0..{self.num_classes - 1}; set num_classes as in the data")
        return torch.tensor(labels, device=outputs.device)
