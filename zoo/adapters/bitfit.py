"""BitFit: only the biases train.

Source: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", section 3.
"""

from __future__ import annotations

from torch import nn

from zoo.adapters.selection import Selection, base_parameters
from zoo.errors import SiteError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class BitFit(Selection):
    """All bias vectors train, those of the norms included (BitFit 2022)."""

    @classmethod
    def names(cls, model: nn.Module) -> list[str]:
        """Names of the 1-D parameters called `bias` or `*_bias` (`q_bias`, `in_proj_bias`).

        Tables of relative position biases are no biases in this sense.

        Raises:
            SiteError: the model has none.
        """
        chosen = [name for name, parameter in base_parameters(model) if parameter.dim() == 1 and _is_bias(name)]
        if not chosen:
            raise SiteError(f"BitFit trains biases, but {type(model).__name__} has none")
        return chosen


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")
