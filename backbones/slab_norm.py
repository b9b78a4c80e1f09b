"""RepBN and PRepBN: batch statistics that slowly take over from LayerNorm and then vanish into a linear layer.

    RepBN(x)  = BN(x) + alpha * x
    PRepBN(x) = lam * LN(x) + (1 - lam) * RepBN(x)     training, lam = r0 * iter / total_step counts down to 0
    PRepBN(x) = RepBN(x)                               evaluation, whatever lam is

In evaluation RepBN is one scale and one shift per channel, so it can be folded away (`backbones.slab_fold`).

Source: SLAB, ICML 2024, arXiv 2405.11582, section 3.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _recomputing() -> bool:
    """True while activation checkpointing runs a forward a second time, inside the backward pass.

    Inside a compiled graph there is nothing to tell apart: it holds each update of a buffer once.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.library.custom_op("zoo::prepbn_lam", mutates_args=())
def _lam_of(count: Tensor, total: Tensor, r0: float) -> Tensor:
    """Weight of LayerNorm, fp32 0-dim, for the int64 0-dim count `iter` (-1: warm-up).

    An opaque op, so that torch.compile keeps the value for the backward instead of computing it again there from
    counters which the forward has advanced meanwhile (pytorch pull request 197039).
    """
    return torch.where(count < 0, 1.0, r0 * count.float() / total.float())


@_lam_of.register_fake
def _(count: Tensor, total: Tensor, r0: float) -> Tensor:
    return torch.empty_like(count, dtype=torch.float32)


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is where it is more exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_channels(x: Tensor, dim: int, owner: str) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"{owner} expects {dim} channels on the last axis, got an input of shape {tuple(x.shape)}")


class ChannelAffine(nn.Module):
    """One scale and one shift per channel: what an evaluated RepBN is when no linear layer can absorb it.

    (..., C) -> (..., C), dtype of the input.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone())
        self.shift = nn.Parameter(shift.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class RepBN(nn.Module):
    """Batch norm over all tokens plus a learned multiple of the input: BN(x) + alpha * x.

    (..., C) -> (..., C), channels last; the statistics run over every leading axis. alpha is one scalar a layer.
    Statistics are those of one process: `SyncBatchNorm` is refused with a TypeError.
    Raises ValueError when the last axis is not `dim`, or when a training batch has a single token.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=device, dtype=dtype))
        self.bn = nn.BatchNorm1d(dim, eps=eps, momentum=momentum, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The gain; hosts written for LayerNorm ask it for device and dtype."""
        return self.bn.weight

    def affine(self) -> tuple[Tensor, Tensor]:
        """The evaluated layer as (scale, shift), (C,) each, at least fp32: RepBN(x) = scale * x + shift."""
        bn = self.bn
        assert bn.running_mean is not None and bn.running_var is not None
        gain = wide(bn.weight) * torch.rsqrt(wide(bn.running_var) + bn.eps)
        return gain + wide(self.alpha), wide(bn.bias) - gain * wide(bn.running_mean)

    def fuse(self) -> ChannelAffine:
        """The evaluated layer as a module without statistics (also the hook of `timm.utils.reparameterize_model`)."""
        scale, shift = self.affine()
        return ChannelAffine(scale.to(self.weight.dtype), shift.to(self.weight.dtype)).train(self.training)

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor:
        """`update`: 0-dim bool; where it is False a training forward leaves the running statistics alone."""
        _check_channels(x, self.dim, "RepBN")
        bn = self.bn
        if isinstance(bn, nn.SyncBatchNorm):
            raise TypeError("RepBN keeps statistics per process: leave it out of convert_sync_batchnorm")
        assert bn.running_mean is not None and bn.running_var is not None
        flat = x.reshape(-1, self.dim)  # B*N C: the same statistics as BatchNorm1d over (B, C, N), no transposes
        if not bn.training:
            y = F.batch_norm(flat, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
            return y.reshape(x.shape) + self.alpha * x
        if flat.shape[0] < 2:
            raise ValueError(f"RepBN in training needs at least 2 tokens over the batch, got shape {tuple(x.shape)}")
        # The kernel updates copies, so that a skipped or repeated forward can be told from a real one afterwards
        # while autograd sees the same operations in both.
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
        y = F.batch_norm(flat, mean, var, bn.weight, bn.bias, True, bn.momentum or 0.0, bn.eps)
        if not _recomputing():
            self._store(mean, var, update)
        return y.reshape(x.shape) + self.alpha * x

    @torch.no_grad()
    def _store(self, mean: Tensor, var: Tensor, update: Tensor | None) -> None:
        bn = self.bn
        assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
        if update is None:
            update = torch.ones((), dtype=torch.bool, device=mean.device)
        bn.running_mean.copy_(torch.where(update, mean, bn.running_mean))
        bn.running_var.copy_(torch.where(update, var, bn.running_var))
        bn.num_batches_tracked.add_(update.to(torch.int64))

    def extra_repr(self) -> str:
        return f"{self.dim}"


class PRepBN(nn.Module):
    """LayerNorm that turns into RepBN over `steps` training forwards; evaluation is always pure RepBN.

    (..., C) -> (..., C). The first `warm` training forwards are LayerNorm alone and leave the batch statistics
    untouched; then lam = r0 * iter / total_step with iter = steps, steps - 1, ..., 0. The counters `warm`, `iter` and
    `total_step` are int64 buffers, saved and loaded with the weights. One training forward is one step, so with
    gradient accumulation `steps` counts micro-batches; a forward repeated by activation checkpointing is not counted,
    and mixes with the lam of the forward it repeats (each backward must come before the layer's next forward). Only
    checkpointing inside a compiled graph, or an `activation_memory_budget` below 1, mixes by the next step's lam.
    Accuracy in evaluation means nothing before lam has reached 0.

    `eps` is that of the LayerNorm; batch norm uses 1e-5. Raises ValueError for steps < 1, warm < 0, r0 outside [0, 1]
    and for inputs that RepBN refuses.
    """

    def __init__(
        self,
        dim: int,
        steps: int = 300_000,
        warm: int = 0,
        r0: float = 1.0,
        eps: float = 1e-6,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"PRepBN needs steps >= 1, got {steps}")
        if warm < 0:
            raise ValueError(f"PRepBN needs warm >= 0, got {warm}")
        if not 0.0 <= r0 <= 1.0:
            raise ValueError(f"PRepBN needs r0 between 0 and 1, got {r0}")
        self.dim = dim
        self.r0 = r0
        self.norm1 = nn.LayerNorm(dim, eps=eps, device=device, dtype=dtype)
        self.norm2 = RepBN(dim, alpha=alpha, device=device, dtype=dtype)
        self.warm: Tensor
        self.iter: Tensor
        self.total_step: Tensor
        self.last: Tensor
        self.register_buffer("warm", torch.tensor(warm, dtype=torch.int64, device=device))
        self.register_buffer("iter", torch.tensor(steps, dtype=torch.int64, device=device))
        self.register_buffer("total_step", torch.tensor(steps, dtype=torch.int64, device=device))
        # Count used by the latest training forward, -1 for a warm one: what a recomputed forward has to use again.
        self.register_buffer("last", torch.tensor(steps, dtype=torch.int64, device=device), persistent=False)

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm, *, steps: int, warm: int = 0, r0: float = 1.0) -> PRepBN:
        """A PRepBN whose LayerNorm branch is `norm` itself, so that training starts from its function.

        Raises ValueError if `norm` is not over one axis or has no weight and bias.
        """
        if len(norm.normalized_shape) != 1 or norm.weight is None or norm.bias is None:
            raise ValueError(f"PRepBN replaces a LayerNorm over one axis with weight and bias, got {norm}")
        weight = norm.weight
        layer = cls(norm.normalized_shape[0], steps, warm, r0, norm.eps, device=weight.device, dtype=weight.dtype)
        layer.norm1 = norm
        return layer.train(norm.training)

    @property
    def weight(self) -> Tensor:
        """The LayerNorm gain; hosts written for LayerNorm ask it for device and dtype."""
        return self.norm1.weight

    @property
    def lam(self) -> float:
        """Weight of LayerNorm in the next training forward (reads the counters: waits for the device)."""
        return float(_lam_of(self._count(), self.total_step, self.r0))

    @property
    def finished(self) -> bool:
        """True once training forwards are pure RepBN, that is once the layer may be folded."""
        return self.lam == 0.0

    def affine(self) -> tuple[Tensor, Tensor]:
        """The evaluated layer as (scale, shift), (C,) each, at least fp32."""
        return self.norm2.affine()

    def fuse(self) -> ChannelAffine:
        """The evaluated layer as a module without statistics."""
        return self.norm2.fuse()

    def _count(self) -> Tensor:
        return torch.where(self.warm > 0, -1, self.iter)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.norm2(x)  # type: ignore[no-any-return]
        _check_channels(x, self.dim, "PRepBN")
        # Tensor arithmetic instead of `if`: no device wait, and one graph for the whole schedule.
        repeated = _recomputing()
        count = self.last if repeated else self._count()
        lam = _lam_of(count, self.total_step, self.r0)
        y = lam * self.norm1(x) + (1.0 - lam) * self.norm2(x, update=count >= 0)
        if not repeated:
            self._advance(count)
        return y

    @torch.no_grad()
    def _advance(self, count: Tensor) -> None:
        self.last.copy_(count)
        self.warm.sub_((count < 0).to(torch.int64))
        self.iter.sub_((count > 0).to(torch.int64))

    def extra_repr(self) -> str:
        return f"{self.dim}, r0={self.r0}"


def replace_layer_norms(model: nn.Module, *, steps: int, warm: int = 0, r0: float = 1.0) -> int:
    """Turn every channels-last LayerNorm of a transformer into PRepBN, in place; returns how many were turned.

    Weights carry over: the first training forward computes what the model computed before. Subclasses that
    normalise another axis (LayerNorm2d) are left alone. Raises ValueError if the model has no such LayerNorm.
    """
    from timm.layers import LayerNorm as TimmLayerNorm

    count = 0
    for parent in list(model.modules()):
        if isinstance(parent, PRepBN):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm) and type(child) in (nn.LayerNorm, TimmLayerNorm):
                setattr(parent, name, PRepBN.from_layer_norm(child, steps=steps, warm=warm, r0=r0))
                count += 1
    if count == 0:
        raise ValueError(f"{type(model).__name__} has no nn.LayerNorm to replace")
    return count
