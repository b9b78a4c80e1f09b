"""Full fine-tuning: everything trains. The yardstick of every comparison."""

from __future__ import annotations

from torch import nn

from zoo.adapters.selection import Selection, base_parameters
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class FullFineTuning(Selection):
    """Every parameter of the model trains; nothing is added."""

    @classmethod
    def names(cls, model: nn.Module) -> list[str]:
        """All base parameter names of `model`."""
        return [name for name, _ in base_parameters(model)]
