"""Selections: methods that add nothing and only choose which of the base's parameters train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import nn


class Selection:
    """A choice of base parameters, registered and attached like an adapter, but with no sites and no hosts.

    A method overrides `names(model, **options)`: the dotted names of the base parameters to train, in the model's
    order. It changes nothing itself; `attach` freezes the rest. A classifier inside the model trains only where the
    rule of the method covers it; the head of a task lies outside the backbone and trains anyway.
    """

    may_be_empty: ClassVar[bool] = False  # True where the trained head may lie outside of the model

    @classmethod
    def names(cls, model: nn.Module, *args: Any, **options: Any) -> list[str]:
        raise NotImplementedError(f"{cls.__name__} does not say which parameters it trains")


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of the model without those that adapters brought along."""
    added = [module.adapters for module in model.modules() if "_host" in module.__dict__]
    added += [module for path, module in model.named_modules() if path == "adapter_banks"]
    brought = {id(parameter) for module in added for parameter in module.parameters()}  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if id(parameter) not in brought:
            yield name, parameter


def parameters_under(model: nn.Module, modules: Iterable[nn.Module]) -> set[str]:
    """Names, as seen from `model`, of the base parameters that lie in `modules`."""
    wanted = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in base_parameters(model) if id(parameter) in wanted}


def in_model_order(model: nn.Module, chosen: set[str]) -> list[str]:
    """The chosen names in the order in which the model lists its parameters."""
    return [name for name, _ in base_parameters(model) if name in chosen]


def classifier_names(model: nn.Module) -> set[str]:
    """Names of the classifier's parameters; empty for a model without one (a feature extractor, a CLIP tower).

    timm models say where it is by `get_classifier()` (one module, or several for distilled ones); torchvision and
    plain models keep it in `head`, `heads`, `classifier` or `fc`.
    """
    get = getattr(model, "get_classifier", None)
    if callable(get):
        try:
            found = get()
        except AttributeError:  # timm's SHViT without a classifier
            found = None
        heads = [*found] if isinstance(found, (tuple, list)) else [found]
    else:
        heads = [getattr(model, name, None) for name in ("head", "heads", "classifier", "fc")]
    return parameters_under(model, (head for head in heads if isinstance(head, nn.Module)))
