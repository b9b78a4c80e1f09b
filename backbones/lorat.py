"""LoRAT's backbone: one plain ViT reads a template crop and a search crop together.

Lin et al., "Tracking Meets LoRA: Faster Training, Larger Model, Stronger Performance", ECCV 2024, arXiv 2403.05231.
Both crops share the patch embedding. Positions and token types are decoupled: the template takes the top-left corner
of the search crop's position table, and an embedding tells template background, template foreground and search apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from backbones.timm_backbone import timm_backbone
from zoo.errors import OptionError
from zoo.registry import BACKBONES

Positions = Literal["own", "sincos"]
BACKGROUND, FOREGROUND, SEARCH = 0, 1, 2  # rows of token_type_embed


@BACKBONES.register_module()
class JointViT(nn.Module):
    """Template and search crop through one plain ViT with full self-attention (LoRAT, sec. 3).

    Class and register tokens are dropped. The position table is resized once, when built, to the search grid; it never
    trains. `token_type_embed` (3, D) is new and trains. Everything else keeps timm's keys (`blocks.0.attn.qkv` ...).

    Args:
        name: a plain timm ViT (`VisionTransformer` with a learned position table): DINOv2, CLIP, MAE, AugReg ...
        template_size, search_size: (H, W) of the crops in pixels, multiples of the patch size.
        pretrained: see `timm_backbone`; weights are read at the ViT's own size.
        positions: "own" for the ViT's table, "sincos" for fixed sines and cosines, for ViTs that start random: their
            own tables are noise, and do not train here.
        drop_path: stochastic depth, the same rate in all blocks. Above 0.1 a random subset of the batch runs each
            branch (DINOv2's way), which saves the time of the rest.
        options: the ViT's constructor options.

    Raises:
        OptionError: not a plain ViT, sizes that are no multiples of the patch, a template grid larger than the search
            grid.
    """

    template_size: tuple[int, int]
    search_size: tuple[int, int]
    template_grid: tuple[int, int]
    search_grid: tuple[int, int]
    num_features: int
    patch_embed: nn.Module
    norm_pre: nn.Module
    blocks: nn.Sequential
    norm: nn.Module
    pos_embed: nn.Parameter
    token_type_embed: nn.Parameter

    def __init__(
        self,
        name: str,
        *,
        template_size: Sequence[int] = (112, 112),
        search_size: Sequence[int] = (224, 224),
        pretrained: bool | str = False,
        positions: Positions = "own",
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        vit: Any = timm_backbone(name, pretrained=pretrained, num_classes=0, **options)
        plain = isinstance(vit, VisionTransformer)
        if not plain or vit.pos_embed is None or vit.attn_pool is not None:
            raise OptionError(
                f"{name} is a {type(vit).__name__}; a joint ViT needs a plain timm VisionTransformer with a learned "
                "position table, such as vit_base_patch14_dinov2"
            )
        patch = vit.patch_embed.patch_size
        self.stride = (int(patch[0]), int(patch[1]))
        self.template_grid, self.search_grid = _grids(template_size, search_size, self.stride)
        self.template_size = (self.template_grid[0] * self.stride[0], self.template_grid[1] * self.stride[1])
        self.search_size = (self.search_grid[0] * self.stride[0], self.search_grid[1] * self.stride[1])
        self.num_features = int(vit.num_features)
        vit.patch_embed.strict_img_size = False  # two sizes pass; they are checked in `forward`
        vit.patch_embed.img_size = self.search_size
        self.patch_embed = vit.patch_embed
        if positions not in get_args(Positions):
            raise OptionError(f"positions are {' or '.join(get_args(Positions))}, got {positions!r}")
        if positions == "own":
            table = position_table(vit.pos_embed.detach(), vit.patch_embed.grid_size, self.search_grid)
        else:
            table = sincos_table(self.search_grid, self.num_features)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.token_type_embed = nn.Parameter(torch.empty(3, self.num_features))
        nn.init.trunc_normal_(self.token_type_embed, std=0.02)
        self.norm_pre, self.blocks = vit.norm_pre, vit.blocks
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
        _set_drop_path(self.blocks, drop_path)
        self.pretrained_cfg = dict(vit.pretrained_cfg)
        self.__dict__["weights_source"] = vit.__dict__.get("weights_source")

    def forward(self, search: Tensor, template: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Search tokens after both crops have seen each other.

        Args:
            search: (B, 3, H, W) normalised search crops.
            template: (B, 3, h, w) normalised template crops; without them the search crop runs alone.
            mask: (B, h / stride, w / stride) integers, 1 where the template shows the target.

        Returns:
            (B, N, D), N the cells of the search grid in row-major order.

        Raises:
            OptionError: crops or mask of another size than the model was built for.
        """
        self._check("search crop", search.shape[-2:], self.search_size)
        types = self.token_type_embed
        x = self.norm_pre(self.patch_embed(search) + self.pos_embed) + types[SEARCH]
        if template is not None:
            self._check("template crop", template.shape[-2:], self.template_size)
            if mask is None:
                raise OptionError("a template needs its foreground mask")
            self._check("foreground mask", mask.shape[-2:], self.template_grid)
            z = self.norm_pre(self.patch_embed(template) + self.template_positions()) + types[mask.flatten(1).long()]
            x = torch.cat((z, x), 1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x[:, -self.pos_embed.shape[1] :])
        return out

    def template_positions(self) -> Tensor:
        """(1, n, D): the top-left corner of the search grid's table, as large as the template grid."""
        table: Tensor = self.pos_embed.reshape(1, *self.search_grid, -1)
        return table[:, : self.template_grid[0], : self.template_grid[1]].flatten(1, 2)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {"token_type_embed", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates: embeddings, then the blocks, then the last norm."""
        return {
            "stem": r"^pos_embed|^patch_embed|^token_type_embed|^norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    @staticmethod
    def _check(what: str, found: Sequence[int], wanted: tuple[int, int]) -> None:
        if tuple(found) != wanted:
            raise OptionError(f"the {what} is {tuple(found)}, this model was built for {wanted} (height, width)")


class SubsetBlock(Block):
    """A ViT block whose branches see a random part of the batch while training, scaled up to stay the same on average.

    Oquab et al. 2023 (DINOv2), arXiv 2304.07193, sec. 5: max(int(B (1 - p)), 1) samples run a branch.
    """

    subset_drop: float

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not self.training:
            return super().forward(x, attn_mask, is_causal)
        x = self._add(x, lambda t: self.ls1(self.attn(self.norm1(t), attn_mask=attn_mask, is_causal=is_causal)))
        return self._add(x, lambda t: self.ls2(self.mlp(self.norm2(t))))

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        size = max(int(len(x) * (1 - self.subset_drop)), 1)
        chosen = torch.randperm(len(x), device=x.device)[:size]
        residual = branch(x[chosen])
        return torch.index_add(x, 0, chosen, residual.to(x.dtype), alpha=len(x) / size)


def position_table(table: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """Drop the prefix tokens' rows and resize a position table from one (H, W) grid to another.

    table: (1, P + H*W, D). Returns (1, H'*W', D): bicubic, without antialiasing, to the exact size (LoRAT's way, not
    DINOv2's, which nudges the scale factor).
    """
    own = table[:, table.shape[1] - source[0] * source[1] :]
    if tuple(source) == tuple(target):
        return own.clone()
    maps = own.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, size=tuple(target), mode="bicubic", align_corners=False, antialias=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def sincos_table(grid: Sequence[int], width: int) -> Tensor:
    """(1, H*W, D): sines and cosines of the column, then of the row, D / 4 frequencies each, 1 to 1e-4.

    The usual fixed table of ViTs (Chen et al. 2021, MoCo v3, arXiv 2104.02057). Raises OptionError if 4 does not divide
    D.
    """
    if width % 4:
        raise OptionError(f"sincos positions need a width that 4 divides, got {width}")
    rate = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij")
    x, y = (axis.flatten()[:, None] * rate for axis in (columns, rows))
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1)[None]


def _grids(
    template: Sequence[int], search: Sequence[int], stride: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    found = []
    for what, size in (("template_size", template), ("search_size", search)):
        if len(size) != 2 or min(size) < 1 or any(side % step for side, step in zip(size, stride, strict=True)):
            raise OptionError(f"{what} must be (height, width), multiples of the patch {stride}, got {tuple(size)}")
        found.append((size[0] // stride[0], size[1] // stride[1]))
    if any(z > x for z, x in zip(*found, strict=True)):
        raise OptionError(
            f"the template grid {found[0]} does not fit into the search grid {found[1]}, whose positions it takes"
        )
    return found[0], found[1]


def _set_drop_path(blocks: nn.Module, rate: float) -> None:
    if not 0 <= rate < 1:
        raise OptionError(f"drop_path must lie in [0, 1), got {rate}")
    for block in blocks.children() if rate else ():
        if rate <= 0.1:
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
            continue
        if type(block) is not Block:
            raise OptionError(f"drop_path above 0.1 needs timm's plain Block, this ViT has {type(block).__name__}")
        block.__class__ = SubsetBlock
        block.subset_drop = rate  # type: ignore[assignment]
