"""Linear classifier: logits = W f + b."""

from __future__ import annotations

from torch import Tensor, nn

from heads.classification import ClassificationHead
from zoo.registry import HEADS


@HEADS.register_module()
class LinearHead(ClassificationHead):
    """One linear layer over pooled features: (B, C) -> logits (B, K).

    Args:
        in_features: C; `ImageClassifier` fills it in from its backbone.
        num_classes: K.
        label_smoothing: see `ClassificationHead`.
        dropout: probability of zeroing a feature while training.
    """

    def __init__(
        self, *, in_features: int, num_classes: int, label_smoothing: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__(num_classes, label_smoothing)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_features, num_classes)
        # Small weights start every class near the same logit, so the first steps do not push noise into the adapters.
        nn.init.trunc_normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) -> (B, K)."""
        return self.fc(self.dropout(features))  # type: ignore[no-any-return]
