"""MLP classifier: one hidden layer before the logits."""

from __future__ import annotations

from torch import Tensor, nn

from heads.classification import ClassificationHead
from zoo.registry import HEADS


@HEADS.register_module()
class MLPHead(ClassificationHead):
    """logits = W2 gelu(W1 f + b1) + b2: (B, C) -> (B, K).

    Args:
        in_features: C; `ImageClassifier` fills it in from its backbone.
        num_classes: K.
        hidden_features: width of the hidden layer; C by default.
        dropout: probability of zeroing a hidden value while training.
        label_smoothing: see `ClassificationHead`.
    """

    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int,
        hidden_features: int | None = None,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, label_smoothing)
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_classes)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) -> (B, K)."""
        return self.fc2(self.dropout(self.act(self.fc1(features))))  # type: ignore[no-any-return]
