"""Norm tuning: only the scales and shifts of the normalisation layers train.

Source: Basu et al. 2024, "Strong Baselines for Parameter-Efficient Few-Shot Fine-Tuning" (LN-Tune), section 3; for
batch norm Frankle et al. 2021, "Training BatchNorm and Only BatchNorm".
"""

from __future__ import annotations

from torch import nn

from zoo.adapters.selection import Selection, in_model_order, parameters_under
from zoo.adapters.sites import find_sites
from zoo.errors import SiteError
from zoo.registry import ADAPTERS


@ADAPTERS.register_module()
class NormTuning(Selection):
    """The weights and biases of all normalisation layers train (LN-Tune, BatchNorm tuning)."""

    @classmethod
    def names(cls, model: nn.Module) -> list[str]:
        """Parameter names of the model's `norm` sites.

        Raises:
            SiteError: it has none with parameters.
        """
        norms = [site.module for site in find_sites(model) if site.role == "norm"]
        chosen = in_model_order(model, parameters_under(model, norms))
        if not chosen:
            raise SiteError(f"NormTuning trains normalisation layers, but {type(model).__name__} has none with weights")
        return chosen
