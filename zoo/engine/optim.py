"""From a model to an optimizer over its trainable parameters, in few groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.optim import Optimizer

from zoo.engine.amp import ZooOptimWrapper
from zoo.errors import OptionError, UnknownNameError, nearest
from zoo.freeze import trainable_parameters
from zoo.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS

GROUPING = ("layer_decay", "head_lr_mult")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TrainableConstructor:
    """Builds the optimizer wrapper of a config.

    Config: `optim_wrapper=dict(optimizer=dict(type="adamw", lr=1e-3, weight_decay=0.05), amp="bf16",
    accumulative_counts=1, clip_grad=dict(max_norm=1.0), paramwise_cfg=dict(layer_decay=0.75, head_lr_mult=10.0))`.
    The optimizer's `type` is a name of timm.optim (its "sgd" is Nesterov SGD, "momentum" the plain one).

    Args:
        optim_wrapper_cfg: the above without `paramwise_cfg`.
        paramwise_cfg: the options of `parameter_groups`.

    Raises:
        OptionError: an unknown option anywhere above. UnknownNameError: no such optimizer.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop("optimizer"))
        self.grouping = dict(paramwise_cfg or {})
        _only(self.grouping, GROUPING, "paramwise_cfg")
        _only(self.wrapper, ("type", "accumulative_counts", "clip_grad", "amp"), "optim_wrapper")

    def __call__(self, model: nn.Module) -> ZooOptimWrapper:
        """The wrapper for `model` (a distributed wrapper is looked through)."""
        bare: Any = getattr(model, "module", model)
        optimizer = build_optimizer(bare, **self.optimizer, **self.grouping)
        kind = self.wrapper.pop("type", "ZooOptimWrapper")
        # mmengine's plain and CUDA-only wrappers are what ours replaces, whatever a config calls it.
        kind = "ZooOptimWrapper" if kind in ("OptimWrapper", "AmpOptimWrapper") else kind
        wrapper: ZooOptimWrapper = OPTIM_WRAPPERS.create({"type": kind, **self.wrapper}, optimizer=optimizer)
        return wrapper


def build_optimizer(
    model: nn.Module,
    type: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    head_lr_mult: float = 1.0,
    **options: Any,
) -> Optimizer:
    """One of timm's optimizers over the trainable parameters of `model`.

    Raises:
        UnknownNameError: no optimizer of that name. OptionError: an option it does not take, or nothing to train.
    """
    name = type.lower()
    known = [str(known) for known in list_optimizers()]
    if name not in known:
        raise UnknownNameError(f"timm has no optimizer {type!r}; {nearest(name, known)}")
    groups = parameter_groups(
        model, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, head_lr_mult=head_lr_mult
    )
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **options)
    except (TypeError, ValueError) as error:
        raise OptionError(f"optimizer {type!r} does not take {options!r}: {error}") from error


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    head_lr_mult: float = 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters grouped by (learning rate, decay or not): as few groups as there are combinations.

    Args:
        lr: of the head if `head_lr_mult` is 1; without layer_decay, of everything.
        weight_decay: not applied to vectors, biases and what any module's `no_weight_decay()` names.
        layer_decay: each layer of the backbone trains this much slower than the next one, by the layers of its
            `group_matcher` (Clark et al. 2020, ELECTRA; Bao et al. 2021, BEiT); an adapter follows its layer.
        head_lr_mult: factor for everything outside `model.backbone`, and for the backbone's own classifier.

    Raises:
        OptionError: nothing is trainable, or layer_decay for a backbone without `group_matcher`.
    """
    trainable = trainable_parameters(model)
    if not trainable:
        raise OptionError("no parameter of the model is trainable: attach an adapter or train the head")
    plain = _without_decay(model)
    scales = _layer_scales(model, layer_decay)
    head = _head_names(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        rate = lr * (head_lr_mult if name in head else scales.get(name, 1.0))
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") or name in plain else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def _without_decay(model: nn.Module) -> set[str]:
    names: set[str] = set()
    for path, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            names.update(f"{path}.{name}" if path else name for name in listed())
    return names


def _layer_scales(model: nn.Module, layer_decay: float | None) -> dict[str, float]:
    if layer_decay is None:
        return {}
    backbone: Any = getattr(model, "backbone", model)
    if not callable(getattr(backbone, "group_matcher", None)):
        raise OptionError(f"layer_decay needs a backbone with group_matcher(); {type(backbone).__name__} has none")
    layer_of = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    # A head of ours is one more layer after the backbone's; timm counts a classifier of its own already.
    last = max(layer_of.values()) + (backbone is not model)
    prefix = "" if backbone is model else "backbone."
    return {prefix + name: layer_decay ** (last - layer) for name, layer in layer_of.items()}


def _head_names(model: nn.Module) -> set[str]:
    backbone: Any = getattr(model, "backbone", None)
    if backbone is None:
        return set()
    names = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    classifier = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
    if isinstance(classifier, nn.Module):
        own = {id(p) for p in classifier.parameters()}
        names |= {name for name, p in model.named_parameters() if id(p) in own}
    return names


def _only(options: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in options:
        if key not in known:
            raise OptionError(f"{where} has no option {key!r}; {nearest(key, known)}")
