"""Cosine classifier: logits are scaled angles between features and class directions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.classification import ClassificationHead
from zoo.errors import OptionError
from zoo.registry import HEADS


@HEADS.register_module()
class CosineHead(ClassificationHead):
    """logits_k = s * cos(f, w_k): (B, C) -> (B, K), blind to the features' length (Gidaris and Komodakis 2018).

    Source: "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018, arXiv 1804.09458, sec. 3.2.

    Args:
        in_features: C; `ImageClassifier` fills it in from its backbone.
        num_classes: K.
        temperature: 1 / s at the start, above 0. With s too small even a perfect fit has a high loss: the largest
            probability two classes can reach is 1 / (1 + exp(-2 s)).
        learn_temperature: train log s together with the directions; s never exceeds 100.
        label_smoothing: see `ClassificationHead`.
    """

    max_scale = 100.0

    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int,
        temperature: float = 0.1,
        learn_temperature: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, label_smoothing)
        if not 1 / self.max_scale <= temperature:
            raise OptionError(f"temperature must be at least {1 / self.max_scale}, got {temperature}")
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))
        log_scale = torch.tensor(-math.log(temperature))
        if learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) -> (B, K)."""
        # Lengths are taken in fp32: in fp16 the squares of ordinary features overflow.
        cosine = F.normalize(features.float(), dim=-1) @ F.normalize(self.weight.float(), dim=-1).T
        return cosine * self.log_scale.exp().clamp(max=self.max_scale)
