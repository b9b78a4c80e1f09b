"""What the SLAB families share: size checks, the timm card of a model, and the four-stage pyramid of PVT and CSWin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size  # timm's own record of the input size
from torch import Tensor, nn

from backbones.slab_fold import FoldSite, classifier_site, fold_sites
from backbones.slab_norm import PRepBN
from zoo.attention.sla import resize_positions

Size = tuple[int, int]
NormLayer = Callable[..., nn.Module]


def check_image_size(size: Size, multiple: Size) -> None:
    """Raises ValueError unless both sides are positive multiples, naming the nearest size that fits."""
    if any(s < m or s % m for s, m in zip(size, multiple, strict=True)):
        near = tuple(max(m, round(s / m) * m) for s, m in zip(size, multiple, strict=True))
        raise ValueError(
            f"height and width must be multiples of {multiple[0]} and {multiple[1]}, got {size[0]} x {size[1]}; "
            f"the nearest size that fits is {near[0]} x {near[1]}"
        )


def model_cfg(first_conv: str, classifier: str, **entries: Any) -> dict[str, Any]:
    """timm's card of a SLAB model; no weights are published in a format that loads without unpickling."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "paper_ids": "arXiv:2405.11582",
        "origin_url": "https://github.com/xinghaochen/SLAB",
        **entries,
    }


def take_norm(options: dict[str, Any], steps: int, eps: float = 1e-6) -> NormLayer:
    """The norm of a named model, taken out of its options: `norm_layer` as given, else PRepBN on its schedule.

    `prepbn_steps` and `prepbn_warm` set the schedule in training forwards; `steps` is the published length.
    """
    chosen: NormLayer | None = options.pop("norm_layer", None)
    steps, warm = options.pop("prepbn_steps", steps), options.pop("prepbn_warm", 0)
    return chosen or partial(PRepBN, steps=steps, warm=warm, eps=eps)


def init_linears(model: nn.Module) -> None:
    """Truncated normal 0.02 weights and zero biases in every Linear."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ConvEmbed(nn.Module):
    """A strided convolution and a norm: (B, H, W, C) -> (B, H/stride, W/stride, C'), channels last."""

    def __init__(
        self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int, norm_layer: NormLayer, **dd: Any
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = (
            self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        )  # folded, no norm follows that would lay it out
        return self.norm(x)


class PyramidStage(nn.Module):
    """Embedding, optional learned positions (1, H*W, C), blocks: (B, h, w, c) -> (B, H, W, C).

    A block maps (B, H, W, C) to the same shape and has `set_grid_size((H, W))`.
    """

    def __init__(self, embed: ConvEmbed, blocks: Sequence[nn.Module], grid: Size, positions: bool) -> None:
        super().__init__()
        self.grid_size = grid
        self.grad_checkpointing = False
        self.embed = embed
        conv = embed.proj
        self.pos_embed: nn.Parameter | None = None
        if positions:
            shape = (1, grid[0] * grid[1], conv.out_channels)
            self.pos_embed = nn.Parameter(torch.empty(shape, device=conv.weight.device, dtype=conv.weight.dtype))
            trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(blocks)

    @torch.no_grad()
    def set_grid_size(self, grid: Size) -> None:
        """Fix another grid: positions are resized bilinearly, and every block follows."""
        if self.pos_embed is not None:
            table = resize_positions(self.pos_embed, self.grid_size, grid)
            self.pos_embed = nn.Parameter(table.clone(), self.pos_embed.requires_grad)
        self.grid_size = grid
        for block in self.blocks:
            block.set_grid_size(grid)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed.view(1, *self.grid_size, -1)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x


class Pyramid(nn.Module):
    """Four stages, a final norm (or none), mean pooling and a linear classifier, with timm's model protocol.

    (B, in_chans, H, W) -> (B, num_classes). `forward_features` returns (B, H/32, W/32, C); `forward_intermediates`
    returns one (B, C, H, W) map a stage. The input size is fixed at construction or by `set_input_size`.
    Raises ValueError for inputs of other channels or size.
    """

    multiple: Size = (32, 32)
    output_fmt = "NHWC"

    def __init__(
        self,
        stages: Sequence[PyramidStage],
        norm: nn.Module,
        *,
        img_size: Size,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dims = [stage.embed.proj.out_channels for stage in stages]
        self.img_size, self.in_chans, self.num_classes, self.global_pool = img_size, in_chans, num_classes, global_pool
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self.head = ClassifierHead(
            dims[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, device=device, dtype=dtype
        )
        self.head_hidden_size = self.head.num_features
        init_linears(self)

    @staticmethod
    def grids(img_size: Size) -> list[Size]:
        """The token grid of each stage."""
        return [(img_size[0] // s, img_size[1] // s) for s in (4, 8, 16, 32)]

    def set_input_size(self, img_size: int | Size) -> None:
        """Fix another input size; learned positions are resized bilinearly."""
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        check_image_size(size, self.multiple)
        for stage, grid in zip(self.stages, self.grids(size), strict=True):
            stage.set_grid_size(grid)
        self.img_size = size
        update_model_input_size(self, size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing but what the optimiser's rule for one-dimensional parameters already leaves out."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regexes for layer-wise learning-rate decay: one group a stage (coarse) or a block."""
        fine = [
            (r"^stages\.(\d+)\.(?:embed|pos_embed)", (-1,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.(?:embed|pos_embed)", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier (0 classes: none), on the model's device and dtype, and optionally another pooling."""
        self.num_classes = num_classes
        like = self.stages[0].embed.proj.weight
        self.head.reset(num_classes, pool_type=global_pool, device=like.device, dtype=like.dtype)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def _image(self, x: Tensor) -> Tensor:
        expected = (self.in_chans, *self.img_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"expected images of shape (batch, {expected[0]}, {expected[1]}, {expected[2]}), got {tuple(x.shape)}; "
                "call set_input_size for another size"
            )
        return x.permute(0, 2, 3, 1)  # B H W C

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs (B, C, H, W), fine to coarse; `norm` applies the final norm to the last stage only."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self._image(x)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            final = i == len(self.stages) - 1
            if i in take:
                y = self.norm(x) if norm and final else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
            if final:
                x = self.norm(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted, and what stood behind them."""
        take, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if pruned or prune_norm:
            self.norm = nn.Identity()
        if pruned:
            self.num_features = self.head.in_features = self.feature_info[last]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return list(take)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self._image(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@fold_sites.register
def _(module: ConvEmbed) -> list[FoldSite]:
    return [FoldSite("norm", producer="proj")]


@fold_sites.register
def _(module: Pyramid) -> list[FoldSite]:
    return classifier_site("norm", module.head)
