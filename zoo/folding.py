"""`fold`: the inference form of a model, with everything that is linear in evaluation multiplied into the weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from backbones.slab_fold import fold_prepbn
from backbones.slab_norm import PRepBN, RepBN
from zoo.adapters.attached import FLAGS, RECORD, Attached, active_adapters
from zoo.adapters.inject import attachments
from zoo.adapters.probe import derive_example
from zoo.errors import OptionError, SiteError, ZooError

BOUND = 1e-4  # largest change of an output, relative to the largest absolute output
# Exact types: a subclass may do more to its weight or its output (weight standardisation, a second activation).
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, Conv2dSame)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
_Tree = dict[str, int]


def fold(model: nn.Module, example: Any = None, *, inplace: bool = False) -> nn.Module:
    """The inference form of a model: the same outputs from fewer operations.

    In this order: attached adapters merge for good, PRepBN and RepBN move into the linear layers beside them, timm's
    own fused forms are taken (SHViT, LeViT, RepVGG, FastViT ...), and every batch norm that alone reads what a
    convolution puts out moves into that convolution. Which norm reads which convolution is seen in a forward pass.

    Args:
        example: what the model is called with: a tensor (B, C, H, W), a tuple of arguments or a dict of keyword
            arguments. The folded model is then proved equal on it, within 1e-4 of the largest output. Without one an
            input of zeros is made up from the model's own record, only to see the order of its layers.
        inplace: fold `model` itself instead of a copy. If the proof fails it has been changed already.

    Returns:
        The folded model in eval mode, all parameters frozen: training it would be training another model. It is not
        saved by `zoo.save`, its keys differ. Where the final norm moves into the classifier (PRepBN models) the logits
        stay and `forward_features` returns what comes before that norm. Fold in fp32, then convert to half precision.

    Raises:
        ZooError: there is nothing to fold, or the folded model is not equal; the numbers are in the message.
        SiteError: an adapter that has no merged form or is switched off.
        OptionError: no input can be made up, or the model does not run on it; a proof on a half-precision model.
    """
    name = type(model).__name__
    _check_adapters(model)
    if example is not None:
        _check_precision(model)
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    before = _run(model, example) if example is not None else []
    done = _merge(model)
    done |= _fold_repbn(model)
    done |= _fold_own_forms(model)
    done |= _fold_conv_bn(model, example)
    if not done:
        raise ZooError(
            f"nothing to fold in {name}: no mergeable adapter, no RepBN or PRepBN, no batch norm behind a convolution "
            "and no fused form of timm's; use the model as it is"
        )
    if example is not None:
        _prove(name, before, _run(model, example))
    model.__dict__.pop("zoo_config", None)  # it describes the model before folding, which `zoo.save` would believe
    return model.requires_grad_(False)


# ---- adapters and norms with a fold of their own ----
def _check_adapters(model: nn.Module) -> None:
    """Refuse, before anything is changed, what `merge` would refuse halfway."""
    for attached in attachments(model).values():
        if not isinstance(attached, Attached) or attached.merged:
            continue
        for site, adapter in attached.placed:
            kind = attached.config["type"]
            if not adapter.mergeable:
                raise SiteError(
                    f"{kind} at {site.path!r} has no merged form, so {type(model).__name__} cannot be folded with it; "
                    "detach it, or use the model as it is"
                )
            if adapter not in active_adapters(site.module):
                raise SiteError(
                    f"adapter {attached.name!r} ({kind}) is attached but does not run; activate or detach it first"
                )


def _merge(model: nn.Module) -> bool:
    found = attachments(model)
    for attached in found.values():
        if isinstance(attached, Attached) and not attached.merged:
            attached.merge()
    for module in model.modules():  # what follows changes the weights that an unmerge would put back
        module.__dict__.pop(RECORD, None)
        module.__dict__.pop(FLAGS, None)
    return any(isinstance(attached, Attached) for attached in found.values())


def _fold_repbn(model: nn.Module) -> bool:
    if not any(isinstance(module, (RepBN, PRepBN)) for module in model.modules()):
        return False
    fold_prepbn(model, inplace=True)
    return True


def _fold_own_forms(model: nn.Module) -> bool:
    before = _tree(model)
    reparameterize_model(model, inplace=True)
    return _tree(model) != before


def _tree(model: nn.Module) -> _Tree:
    return {name: id(module) for name, module in model.named_modules()}


# ---- convolution and batch norm ----
class Pair(NamedTuple):
    """A convolution and the batch norm that is the only reader of its output."""

    conv: nn.Module
    norm: nn.Module


def _fold_conv_bn(model: nn.Module, example: Any) -> bool:
    norms = [module for module in model.modules() if type(module) in _NORMS]
    if not norms or not any(type(module) in _CONVS for module in model.modules()):
        return False
    pairs = conv_bn_pairs(model, example)
    changed: dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs:
        changed[conv] = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, _TRANSPOSED))  # type: ignore[type-var, arg-type]
        changed[norm] = _rest(norm)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in changed:
                parent._modules[name] = changed[child]
    return bool(pairs)


def conv_bn_pairs(model: nn.Module, example: Any = None) -> list[Pair]:
    """Convolutions whose output goes to one batch norm and nowhere else, as seen in one evaluated forward.

    Every operation of the pass is watched, so a convolution that also feeds a shortcut, or whose output is returned,
    is left out; so are layers with hooks, shared weights, subclasses of torch's and timm's plain layers, and norms
    without statistics.

    Raises:
        OptionError: no input can be made up (then pass `example`), or the model does not run on it.
    """
    if example is None:
        example = derive_example(model)
    if example is None:
        raise OptionError(
            f"cannot tell what {type(model).__name__} takes as input; pass example=, e.g. torch.zeros(1, 3, 224, 224)"
        )
    watch = _Watch()
    handles = []
    for module in model.modules():
        if _foldable(module):
            if type(module) in _CONVS:
                watch.weights.add(id(module.weight))
                handles.append(module.register_forward_hook(watch.after_conv))
            else:
                handles.append(module.register_forward_pre_hook(watch.before_norm))
    try:
        with watch:
            out = _run(model, tree_map_only(Tensor, lambda t: t[:1] if t.ndim else t, example))
    finally:
        for handle in handles:
            handle.remove()
    return watch.pairs({id(tensor) for tensor in out})


def _foldable(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or module.training:
        return False
    if type(module) in _CONVS:
        return type(module) not in _TRANSPOSED or bool(module.groups == 1)
    return type(module) in _NORMS and module.running_mean is not None


class _Watch(TorchDispatchMode):
    """Counts the operations that read each convolution's output and weight, and notes which norm the output entered."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, Tensor] = {}  # holds the tensors, so that no id is given out twice
        self.weights: set[int] = set()
        self.readers: dict[int, int] = defaultdict(int)
        self.made: dict[nn.Module, list[int]] = defaultdict(list)
        self.read: dict[nn.Module, list[int]] = defaultdict(list)

    def after_conv(self, conv: nn.Module, inputs: Any, out: Tensor) -> None:
        self.outputs[id(out)] = out
        self.made[conv].append(id(out))

    def before_norm(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        known = bool(inputs) and id(inputs[0]) in self.outputs  # of other tensors the id may be given out again
        self.read[norm].append(id(inputs[0]) if known else 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.outputs or id(leaf) in self.weights:
                self.readers[id(leaf)] += 1
        return func(*args, **(kwargs or {}))

    def pairs(self, returned: set[int]) -> list[Pair]:
        entered = {tensor: norm for norm, tensors in self.read.items() for tensor in tensors if tensor}
        found = []
        for conv, tensors in self.made.items():
            norms = {entered.get(tensor) for tensor in tensors}
            norm = norms.pop()
            private = all(self.readers[t] == 1 and t not in returned for t in tensors)
            private = private and self.readers[id(conv.weight)] == len(tensors)  # nobody else reads the weight
            if norm is not None and not norms and private and sorted(self.read[norm]) == sorted(tensors):
                found.append(Pair(conv, norm))
        return found


def _rest(norm: nn.Module) -> nn.Module:
    """What a batch norm does besides normalising."""
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity()
    steps = [step for step in (norm.drop, norm.act) if not isinstance(step, nn.Identity)]
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps) if steps else nn.Identity()


# ---- proof ----
def _check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise OptionError(
                f"equality cannot be proved in {parameter.dtype} (parameter {name!r}): fold the fp32 model and convert "
                "the result, or leave `example` out"
            )


def _run(model: nn.Module, example: Any) -> list[Tensor]:
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                out = model(**example)
            else:
                out = model(*example) if isinstance(example, tuple) else model(example)
    except Exception as error:
        raise OptionError(
            f"{type(model).__name__} does not run on the example ({type(error).__name__}: {error}); "
            "pass one that fits as example="
        ) from error
    return _tensors(tree_leaves(out))


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _prove(name: str, before: list[Tensor], after: list[Tensor]) -> None:
    if [t.shape for t in before] != [t.shape for t in after] or not before:
        raise ZooError(
            f"the folded {name} returns {[tuple(t.shape) for t in after]}, the model {[tuple(t.shape) for t in before]}"
        )
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        difference = (old.double() - new.double()).abs().max().item() if old.numel() else 0.0
        scale = old.double().abs().max().item() if old.numel() else 0.0
        if not difference <= BOUND * scale:  # a NaN fails too
            raise ZooError(
                f"the folded {name} differs from the model: output {index} by {difference:.3g} at most, where values "
                f"reach {scale:.3g} ({difference / scale if scale else float('inf'):.3g} relative, allowed {BOUND:g})"
            )
