"""Linear probe: only the classifier trains, on frozen features. The lower yardstick of every comparison."""

from __future__ import annotations

from torch import nn

from zoo.adapters.selection import Selection, classifier_names, in_model_order
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class LinearProbe(Selection):
    """Only the classifier trains; the backbone stays frozen."""

    may_be_empty = True

    @classmethod
    def names(cls, model: nn.Module) -> list[str]:
        """The classifier's parameter names; empty for a backbone without one, whose head lies outside."""
        return in_model_order(model, classifier_names(model))
