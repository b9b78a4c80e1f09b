"""Losses between two training forwards of one batch, for models that are random while they train.

MoSA draws other experts in each forward and trains them to agree; dropout regularised the same way is R-Drop. A term
compares two outputs and knows nothing of tasks: `two_pass_losses` runs the model and adds up, so any task can use it.

Sources: Zhang et al., "MoSA", arXiv 2312.02923 and its released code (symmetric KL, deep term); Liang et al. 2021,
"R-Drop: Regularized Dropout for Neural Networks", arXiv 2106.14448 (`detach=False`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from zoo.errors import OptionError
from zoo.registry import CONSISTENCY


class ConsistencyLoss(Protocol):
    """A term between two outputs of the model on one batch.

    Attributes:
        name: key in the losses, without the `loss_` that makes mmengine add it up.
        second: weight of the task's own loss on the second forward.
    """

    name: str
    second: float

    def __call__(self, first: Any, second: Any) -> Tensor: ...


def symmetric_kl(first: Tensor, second: Tensor, *, detach: bool = True) -> Tensor:
    """Half of KL(p_second || p_first) + KL(p_first || p_second), averaged over the rows.

    first, second: logits (B, K), or (B, ..., K), where every position counts as a row. The sums are formed in at
    least float32. detach: no gradient through the distribution that serves as target (MoSA); R-Drop lets it pass.
    """
    a, b = (_log_probabilities(t) for t in (first, second))
    target_a, target_b = (a.detach(), b.detach()) if detach else (a, b)
    forward = F.kl_div(a, target_b, reduction="batchmean", log_target=True)
    backward = F.kl_div(b, target_a, reduction="batchmean", log_target=True)
    return 0.5 * (forward + backward)


def hidden_distance(first: Sequence[Tensor], second: Sequence[Tensor], *, blocks: int = 6) -> Tensor:
    """Mean squared differences of the first `blocks` block outputs, added and divided by the number of blocks.

    first, second: one tensor a block, from two forwards. MoSA's deep term is 0.01 of this (off in its recipes).

    Raises:
        OptionError: no block, or another number of blocks in `second`.
    """
    if not first or len(first) != len(second):
        raise OptionError(f"hidden_distance compares block by block, got {len(first)} and {len(second)} blocks")
    pairs = list(zip(first, second, strict=True))[:blocks]
    return sum((F.mse_loss(a, b) for a, b in pairs), start=first[0].new_zeros(())) / len(first)


@CONSISTENCY.register_module()
class SymmetricKL:
    """Symmetric KL between the class distributions of two forwards (MoSA; R-Drop with `detach=False`).

    Args:
        weight: factor of the term; MoSA's 1.
        second: weight of the task's loss on the second forward; MoSA's 0 (R-Drop has 1).
        detach: stop the gradient of the distribution that serves as target.

    Raises:
        OptionError: `weight` is not a positive number, or `second` a negative one.
    """

    name = "symmetric_kl"

    def __init__(self, *, weight: float = 1.0, second: float = 0.0, detach: bool = True) -> None:
        if not (math.isfinite(weight) and weight > 0):
            raise OptionError(f"weight must be a positive number, got {weight!r}; leave the term out to switch it off")
        if not (math.isfinite(second) and second >= 0):
            raise OptionError(f"second must be a number of at least 0, got {second!r}")
        self.weight = weight
        self.second = second
        self.detach = detach

    def __call__(self, first: Any, second: Any) -> Tensor:
        """first, second: logits (B, K) or (B, ..., K); a scalar, weight included."""
        for output in (first, second):
            if not isinstance(output, Tensor):
                raise OptionError(f"SymmetricKL compares one tensor of logits, the head gave {type(output).__name__}")
        return self.weight * symmetric_kl(first, second, detach=self.detach)


def two_pass_losses(
    run: Callable[[], Any],
    loss: Callable[[Any], Mapping[str, Tensor]],
    terms: Sequence[ConsistencyLoss],
) -> dict[str, Tensor]:
    """The task's losses on a first forward, and every term between it and a second one.

    Args:
        run: a training forward of the batch, up to what the head puts out.
        loss: outputs -> named losses of the task.
        terms: at least one; all compare the same two forwards.

    Returns the task's losses, `loss_<name>` for each term and, where a term asks for it, the task's losses on the
    second forward under `second_<key>` (a key with "loss" in it still counts).

    Raises:
        OptionError: two terms of one name, or a name that the task's losses have already.
    """
    first, second = run(), run()
    losses = dict(loss(first))
    for term in terms:
        key = f"loss_{term.name}"
        if key in losses:
            raise OptionError(f"two losses are called {key!r}; give the terms names of their own")
        losses[key] = term(first, second)
    again = sum(term.second for term in terms)
    if again:
        losses.update({f"second_{key}": again * value for key, value in loss(second).items() if "loss" in key})
    return losses


def _log_probabilities(logits: Tensor) -> Tensor:
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return wide.log_softmax(-1).flatten(0, -2)
