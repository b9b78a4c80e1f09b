"""Sparse experts, what MoSA and MoSL are made of: a matrix is dealt out entry by entry to N experts.

Source: Zhang et al., "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", arXiv 2312.02923, and its code.

Every entry of a split matrix belongs to one of N experts. While training, each forward picks an expert at random, and
only that expert's entries learn; expert i is W_i = W_start + M_i (W - W_start), with M_i its mask. For use the experts
are averaged: W_start + (W - W_start) / N, a plain adapter.

The released code keeps N full copies and multiplies their gradients by the masks. Here there is one copy, the start
and the map of owners: entries outside a mask never see a gradient. Under SGD without momentum and decay both train
exactly alike, bit for bit. They differ where an optimiser acts on entries without a gradient: there, an expert that
was not drawn has no gradient and is skipped; here its entries get zeros, so momentum and Adam's moments run on and
decoupled decay applies in every step. Decay there also shrinks each expert's unowned copies of W_start; here those
never move.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.attached import Attached
from zoo.adapters.bottleneck import Bottleneck
from zoo.errors import OptionError, SiteError, nearest

Share = Literal["down", "up", "none"]
Along = Literal["all", "row", "column"]


def expert_owner(score: Tensor, experts: int, along: Along = "all") -> Tensor:
    """Which expert owns each entry: expert i has the 1-based ranks (int(i*n/N), int((i+1)*n/N)] of the scores.

    score: (n,) or (O, I), drawn uniformly. `along` ranks all n entries, or those of each row or column by themselves.
    Returns uint8 in the score's shape.

    Raises:
        OptionError: fewer entries to rank than experts.
    """
    lines = score.reshape(1, -1) if along == "all" else score if along == "row" else score.t()
    count = lines.shape[1]
    if count < experts:
        raise OptionError(f"{experts} experts cannot share {count} entries (a tensor {tuple(score.shape)}, by {along})")
    ranks = lines.contiguous().argsort(1).argsort(1) + 1
    bounds = torch.tensor([int(i * count / experts) for i in range(1, experts)], device=score.device)
    owner = torch.bucketize(ranks, bounds).to(torch.uint8)
    return (owner.t() if along == "column" else owner).reshape(score.shape)


class Split(nn.Module):
    """A tensor whose entries belong to N experts (`owner`), with the value each entry started from (`start`)."""

    start: Tensor
    owner: Tensor

    def __init__(self, start: Tensor, experts: int, along: Along = "all") -> None:
        super().__init__()
        self.experts = experts
        self.value = nn.Parameter(start.detach().clone())
        self.register_buffer("start", start.detach().clone())
        score = torch.rand_like(start, dtype=torch.float32)
        score = score.flatten(1) if start.dim() > 1 else score  # a 1x1 convolution is a matrix too
        self.register_buffer("owner", expert_owner(score, experts, along if start.dim() > 1 else "all").view_as(start))

    def expert(self, index: Tensor) -> Tensor:
        """The tensor as expert `index` (a 0-dim integer tensor) has it."""
        return torch.where(self.owner == index, self.value, self.start)

    def mean(self) -> Tensor:
        return self.start + (self.value - self.start) / self.experts

    def plain(self) -> Whole:
        return Whole(self.mean())


class Whole(nn.Module):
    """A tensor that all experts share, or that is left when they are merged."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())


class Copies(nn.Module):
    """A tensor of which every expert has a full copy of its own, stacked in `value` (N, ...)."""

    def __init__(self, start: Tensor, experts: int) -> None:
        super().__init__()
        self.value = nn.Parameter(start.detach().expand(experts, *start.shape).clone())

    def expert(self, index: Tensor) -> Tensor:
        return self.value.index_select(0, index.view(1)).squeeze(0)

    def mean(self) -> Tensor:
        return self.value.mean(0)


def draw(experts: int, device: torch.device) -> Tensor:
    """A random expert as a tensor: no wait for the device, and checkpointing replays it (torch's own generator)."""
    return torch.randint(experts, (), device=device)


class ExpertLayer(nn.Module):
    """A linear layer or 1x1 convolution of N sparse experts: a random one while training, their mean otherwise."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, experts: int, along: Along, split_bias: bool) -> None:
        super().__init__()
        assert layer.bias is not None
        self.experts = experts
        self.weight = Split(layer.weight, experts, along)
        self.bias = Split(layer.bias, experts) if split_bias else Copies(layer.bias, experts)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            index = draw(self.experts, x.device)
            weight, bias = self.weight.expert(index), self.bias.expert(index)
        else:
            weight, bias = self.weight.mean(), self.bias.mean()
        return F.conv2d(x, weight, bias) if weight.dim() == 4 else F.linear(x, weight, bias)

    def plain(self) -> nn.Linear | nn.Conv2d:
        """A stock layer that holds the mean of the experts."""
        weight, bias = self.weight.mean().detach(), self.bias.mean().detach()
        outputs, inputs = weight.shape[:2]
        layer: nn.Linear | nn.Conv2d
        layer = nn.Conv2d(inputs, outputs, 1) if weight.dim() == 4 else nn.Linear(inputs, outputs)
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        return layer


def split_bottleneck(bottleneck: Bottleneck, experts: int, share: Share, along: Along, split_bias: bool) -> Bottleneck:
    """Deal the bottleneck's layers out to experts, in place; the half named by `share` stays whole."""
    check_experts(experts, share)
    if along not in get_args(Along):
        raise OptionError(f"along {along!r} is unknown; {nearest(str(along), get_args(Along))}")
    nn.init.kaiming_uniform_(bottleneck.down.weight, a=math.sqrt(5))
    for half in ("down", "up"):
        if half != share and experts > 1:  # a single expert owns everything: a plain adapter
            setattr(bottleneck, half, ExpertLayer(getattr(bottleneck, half), experts, along, split_bias))
    return bottleneck


def check_experts(experts: int, share: Share) -> None:
    """Raise `OptionError` for a number of experts or a shared half that does not exist."""
    if isinstance(experts, bool) or not isinstance(experts, int) or not 1 <= experts <= 255:
        raise OptionError(f"experts must be a whole number from 1 to 255, got {experts!r}")
    if share not in get_args(Share):
        raise OptionError(f"share {share!r} is unknown; {nearest(str(share), get_args(Share))}")


def merge_experts(attached: Attached) -> None:
    """Replace the experts of every MoSA or MoSL adapter by their mean: the plain adapter that is deployed.

    Evaluation output stays the same; parameters, masks and start values are dropped, and `attached.config` says
    `experts=1`, so that saved tensors load again. Optimisers that held the experts must be built anew.

    Raises:
        SiteError: the set holds no experts, or is folded into the weights.
    """
    if attached.merged:
        raise SiteError(f"adapter {attached.name!r} is merged into the weights; unmerge it first")
    if not sum([_merge_below(placed.adapter) for placed in attached.placed]):
        raise SiteError(f"{attached.config['type']} has no experts to merge here")
    attached.config["experts"] = 1
    if "per_site" in attached.config:  # rebuilt, not changed: the caller owns it
        by_site = attached.config["per_site"].items()
        attached.config["per_site"] = {key: own if own is None else {**own, "experts": 1} for key, own in by_site}


def _merge_below(module: nn.Module) -> int:
    """Replace what holds experts below `module`; returns how many modules that were."""
    found = 0
    for name, child in list(module.named_children()):
        if isinstance(child, (ExpertLayer, Split)):
            module.add_module(name, child.plain())
            found += 1
        else:
            found += _merge_below(child)
    return found
