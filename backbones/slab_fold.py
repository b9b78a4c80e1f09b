"""Exact removal of evaluated RepBN / PRepBN layers: each becomes part of the linear layer before or behind it.

    norm -> linear:  W' = W * scale (columns),  b' = b + W @ shift
    linear -> norm:  W' = scale * W (rows),     b' = scale * b + shift

The second rule scales the whole bias, alpha's share included (the published code leaves that share out and so
changes its model). A norm that no linear layer can absorb exactly becomes a per-channel affine map instead.

Source: SLAB, ICML 2024, arXiv 2405.11582, section 3.1.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import singledispatch
from typing import NamedTuple

import torch
from timm.layers import ClassifierHead, PatchEmbed, to_2tuple
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from backbones.slab_norm import PRepBN, RepBN, wide
from zoo.adapters.host import Host

LINEAR_POOLS = ("avg", "token", "")  # pools that commute with a per-channel affine map


class FoldSite(NamedTuple):
    """Norm `norm` of a module, and the linear layers that are its only consumers or its only producer.

    Names are attribute paths below the module. `final` marks the norm whose output is the model's feature map.
    """

    norm: str
    consumers: tuple[str, ...] = ()
    producer: str | None = None
    final: bool = False


@singledispatch
def fold_sites(module: nn.Module) -> list[FoldSite]:
    """The norms directly below `module` that a linear layer absorbs exactly; families register their own rule."""
    return []


@fold_sites.register
def _(module: Block) -> list[FoldSite]:
    return [FoldSite("norm1", ("attn.qkv",)), FoldSite("norm2", ("mlp.fc1",))]


@fold_sites.register
def _(module: PatchEmbed) -> list[FoldSite]:
    return [FoldSite("norm", producer="proj")]


@fold_sites.register
def _(module: SwinTransformerBlock) -> list[FoldSite]:
    sites = [FoldSite("norm2", ("mlp.fc1",))]
    # Windows are padded with zeros behind norm1: the shift would leak into the padding.
    padded = any(
        size % window for size, window in zip(to_2tuple(module.input_resolution), module.window_size, strict=True)
    )
    if not padded and not module.dynamic_mask:
        sites.append(FoldSite("norm1", ("attn.qkv",)))
    return sites


@fold_sites.register
def _(module: PatchMerging) -> list[FoldSite]:
    return [FoldSite("norm", ("reduction",))]


@fold_sites.register
def _(module: SpatialReductionAttention) -> list[FoldSite]:
    return [FoldSite("norm", producer="sr")] if module.sr is not None and module.pool is None else []


@fold_sites.register
def _(module: VisionTransformer) -> list[FoldSite]:
    sites = [FoldSite("fc_norm", ("head",))]
    if module.global_pool in LINEAR_POOLS and isinstance(module.fc_norm, nn.Identity):
        sites.append(FoldSite("norm", ("head",), final=True))
    return sites


def classifier_site(norm: str, head: ClassifierHead) -> list[FoldSite]:
    """The final norm before a timm `ClassifierHead`, if its pooling is linear."""
    return [FoldSite(norm, ("head.fc",), final=True)] if head.global_pool.pool_type in LINEAR_POOLS else []


@fold_sites.register
def _(module: SwinTransformer) -> list[FoldSite]:
    return classifier_site("norm", module.head)


def _absorbs_input(layer: nn.Module) -> bool:
    # Exact types: a subclass (an adapter host, a parametrised layer) also reads its input in another way.
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding in ((0, 0), "valid")
    return type(layer) is nn.Linear


def _absorbs_output(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, nn.Conv2d)


def _add_bias(layer: nn.Linear | nn.Conv2d, value: Tensor) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(value.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(wide(layer.bias) + value)


@torch.no_grad()
def fold_into_next(norm: RepBN | PRepBN, layers: Sequence[nn.Module]) -> None:
    """Move the evaluated `norm` into the layers that read its output, in place; the caller drops the norm.

    Each layer is a Linear with C inputs, or an unpadded ungrouped Conv2d. A missing bias is created.
    Raises TypeError for any other layer, before one is touched.
    """
    for layer in layers:
        if not _absorbs_input(layer):
            raise TypeError(f"a norm folds forward into a plain Linear or an unpadded ungrouped Conv2d, got {layer}")
    scale, shift = norm.affine()
    for layer in layers:
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        weight = wide(layer.weight)  # O C (kh kw)
        columns = (1, -1) + (1,) * (weight.ndim - 2)
        _add_bias(layer, (weight * shift.view(columns)).flatten(1).sum(1))
        layer.weight.copy_(weight * scale.view(columns))


@torch.no_grad()
def fold_into_previous(layer: nn.Module, norm: RepBN | PRepBN) -> None:
    """Move the evaluated `norm` into the Linear or Conv2d whose output it reads, in place; the caller drops the norm.

    Raises TypeError for any other layer.
    """
    if not _absorbs_output(layer):
        raise TypeError(f"a norm folds backward into a plain Linear or Conv2d, got {layer}")
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    scale, shift = norm.affine()
    weight = wide(layer.weight)
    if layer.bias is not None:
        layer.bias.copy_(wide(layer.bias) * scale)
    _add_bias(layer, shift)
    layer.weight.copy_(weight * scale.view((-1,) + (1,) * (weight.ndim - 1)))


def _fold_site(module: nn.Module, site: FoldSite) -> None:
    parent_path, _, name = site.norm.rpartition(".")
    parent = module.get_submodule(parent_path)
    norm = getattr(parent, name)
    if not isinstance(norm, (RepBN, PRepBN)):
        return
    if site.producer is not None:
        layer = module.get_submodule(site.producer)
        if not _absorbs_output(layer):
            return
        fold_into_previous(layer, norm)
    else:
        layers = [module.get_submodule(path) for path in site.consumers]
        if not all(map(_absorbs_input, layers)):
            return
        fold_into_next(norm, layers)
    setattr(parent, name, nn.Identity())


def fold_prepbn(model: nn.Module, *, inplace: bool = False, keep_features: bool = False) -> nn.Module:
    """The inference form of a model: evaluation mode, same outputs, no RepBN or PRepBN left.

    By default the final norm moves into the classifier, which keeps the logits and changes what `forward_features`
    returns; `keep_features=True` turns it into a per-channel affine map instead. Without `inplace` a copy is folded.
    Weights of another folded model load into the result. Warns when the schedule of a layer is not over, because
    evaluation then is not yet what was trained. Raises ValueError if there is nothing to fold, or if adapters are
    attached (they read what the norms put out).
    """
    hosts = [name for name, m in model.named_modules() if isinstance(m, Host)]
    if hosts:
        raise ValueError(
            f"adapters are attached at {len(hosts)} sites (first: {hosts[0]!r}): merge or detach, then fold"
        )
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, (RepBN, PRepBN))}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no RepBN or PRepBN layer to fold")
    early = [name for name, m in norms.items() if isinstance(m, PRepBN) and not m.finished]
    if early:
        warnings.warn(
            f"{len(early)} PRepBN layers still mix in LayerNorm (first: {early[0]!r}): the folded model equals "
            "the evaluated one, but neither is what was trained so far",
            stacklevel=2,
        )
    for module in list(model.modules()):
        for site in fold_sites(module):
            if not (site.final and keep_features):
                _fold_site(module, site)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (RepBN, PRepBN)):
                setattr(module, name, child.fuse())
    return model
