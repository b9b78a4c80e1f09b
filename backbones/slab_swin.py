"""SLAB-Swin: Swin with simplified linear attention over the whole map in its early stages, and PRepBN.

The letter of a stage says which attention it has: L for SLA over all tokens of the stage (no windows, no shift), S for
Swin's softmax windows with shift and relative bias. Published models are LLSS; SSSS is Swin with PRepBN alone.

Source: SLAB, ICML 2024, arXiv 2405.11582; Swin, ICCV 2021, arXiv 2103.14030.
"""

from __future__ import annotations

from typing import Any

from timm.layers import to_2tuple
from timm.models import SwinTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformerBlock, checkpoint_filter_fn
from torch import Tensor, nn

from backbones.slab_fold import FoldSite, fold_sites
from backbones.slab_model import check_image_size, model_cfg, take_norm
from zoo.attention.sla import SLA

__all__ = ["LinearSwinBlock", "SlabSwin", "checkpoint_filter_fn"]


class LinearSwinBlock(nn.Module):
    """A Swin block whose attention is SLA over the whole map, (B, H, W, C) -> (B, H, W, C).

    Built from a window block, whose norms, MLP, qkv and proj it takes over. A map of another size than the one set
    is taken too: key positions are then resized bilinearly in the call.
    Raises ValueError if q, k and v of the block are not as wide as its input.
    """

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        dim, qkv = block.dim, block.attn.qkv
        if qkv.out_features != 3 * dim:
            raise ValueError(
                f"SLA needs heads that share the {dim} channels, got a qkv of {qkv.out_features}: no head_dim"
            )
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.drop_path1, self.drop_path2 = block.drop_path1, block.drop_path2
        self.attn = SLA(
            dim,
            block.attn.num_heads,
            attn_drop=block.attn.attn_drop.p,
            grid_size=to_2tuple(block.input_resolution),
            device=qkv.weight.device,
            dtype=qkv.weight.dtype,
        )
        self.attn.qkv, self.attn.proj, self.attn.proj_drop = qkv, block.attn.proj, block.attn.proj_drop

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """Fix another map size; windows concern the other stages."""
        self.attn.set_grid_size(feat_size)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path1(self.attn(self.norm1(tokens), grid_size=grid))
        tokens = tokens + self.drop_path2(self.mlp(self.norm2(tokens)))
        return tokens.unflatten(1, grid)


class SlabSwin(SwinTransformer):
    """timm's SwinTransformer with one attention letter a stage, (B, in_chans, H, W) -> (B, num_classes).

    `forward_features` returns (B, H/32, W/32, C). Other options are those of timm's SwinTransformer.
    Raises ValueError if a side is no multiple of the patch, or `attn_type` is not one letter L or S for every stage;
    RuntimeError when a folded model is resized.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        attn_type: str = "LLSS",
        **swin_options: Any,
    ) -> None:
        check_image_size(to_2tuple(img_size), to_2tuple(patch_size))
        if len(attn_type) != len(depths) or set(attn_type) - set("LS"):
            raise ValueError(f"attn_type needs one letter, L or S, for each of {len(depths)} stages, got {attn_type!r}")
        super().__init__(img_size=img_size, patch_size=patch_size, depths=depths, **swin_options)
        for stage, letter in zip(self.layers, attn_type, strict=True):
            if letter == "L":
                stage.blocks = nn.Sequential(*map(LinearSwinBlock, stage.blocks))

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **changes: Any) -> None:
        """Fix another input size, as in timm; `changes` are timm's patch_size, window_size, window_ratio, ..."""
        if any(isinstance(block.norm1, nn.Identity) for stage in self.layers for block in stage.blocks):
            raise RuntimeError("a folded model keeps its size (another one may pad windows): resize, then fold")
        patch = to_2tuple(changes.get("patch_size") or self.patch_embed.patch_size)
        size = to_2tuple(img_size or self.patch_embed.img_size)
        check_image_size(size, patch)
        super().set_input_size(img_size=size, **changes)


@fold_sites.register
def _(module: LinearSwinBlock) -> list[FoldSite]:
    return [FoldSite("norm1", ("attn.qkv",)), FoldSite("norm2", ("mlp.fc1",))]


default_cfgs = generate_default_cfgs(
    {
        name: model_cfg("patch_embed.proj", "head.fc", pool_size=(7, 7))
        for name in ("slab_swin_tiny", "slab_swin_small", "slab_swin_base", "prepbn_swin_tiny")
    }
)


def _create(variant: str, steps: int, pretrained: bool, options: dict[str, Any]) -> SlabSwin:
    norm_layer = take_norm(options, steps, eps=1e-5)
    return build_model_with_cfg(
        SlabSwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", (0, 1, 2, 3)), "flatten_sequential": True},
        norm_layer=norm_layer,
        **options,
    )


_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = _TINY | {"depths": (2, 2, 18, 2)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def slab_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-T: SLA in stages 1 and 2, windows of 7 in stages 3 and 4, 29.2 M parameters in training."""
    return _create("slab_swin_tiny", 60_000, pretrained, _TINY | {"drop_path_rate": 0.2} | kwargs)


@register_model
def slab_swin_small(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-S: SLA in stages 1 and 2, windows of 7 in stages 3 and 4, 50.6 M parameters in training."""
    return _create("slab_swin_small", 60_000, pretrained, _SMALL | {"drop_path_rate": 0.3} | kwargs)


@register_model
def slab_swin_base(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-B: SLA in stages 1 and 2, windows of 7 in stages 3 and 4, 89.0 M parameters in training."""
    return _create("slab_swin_base", 60_000, pretrained, _BASE | {"drop_path_rate": 0.5} | kwargs)


@register_model
def prepbn_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """Swin-T with PRepBN: softmax windows everywhere (published weights: norm_layer=RepBN)."""
    options = _TINY | {"drop_path_rate": 0.1, "attn_type": "SSSS"} | kwargs
    return _create("prepbn_swin_tiny", 300_000, pretrained, options)
