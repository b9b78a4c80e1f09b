"""SLAB-DeiT: a plain ViT with simplified linear attention and PRepBN, and DeiT with PRepBN alone.

SLAB-DeiT has no class token: 14x14 patch tokens, SLA in every block, norms norm1, norm2 and a final one before mean
pooling. The PRepBN-only models are timm's ViT with class token and softmax attention.

Source: SLAB, ICML 2024, arXiv 2405.11582.
"""

from __future__ import annotations

from typing import Any

from timm.layers import to_2tuple
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.slab_model import check_image_size, model_cfg, take_norm
from zoo.attention.sla import SLA


class SlabDeiT(VisionTransformer):
    """timm's VisionTransformer with SLA in place of softmax attention, (B, in_chans, H, W) -> (B, num_classes).

    `forward_features` returns (B, H/p * W/p, C). Options are those of timm's VisionTransformer; the token grid is
    fixed at construction or by `set_input_size`, which resizes the key positions of every block.
    Raises ValueError for prefix tokens, for a changing grid, and for sides that are no multiple of the patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        global_pool: str = "avg",
        class_token: bool = False,
        reg_tokens: int = 0,
        dynamic_img_size: bool = False,
        fc_norm: bool | None = False,
        **vit_options: Any,
    ) -> None:
        if class_token or reg_tokens or global_pool == "token":
            raise ValueError("SLAB-DeiT has patch tokens only: no class_token, reg_tokens or global_pool='token'")
        if dynamic_img_size:
            raise ValueError("SLA ties its key positions to one grid: give img_size, or call set_input_size")
        check_image_size(to_2tuple(img_size), to_2tuple(patch_size))
        fixed = {"global_pool": global_pool, "class_token": False, "fc_norm": fc_norm}
        super().__init__(img_size, patch_size, **fixed, **vit_options)
        for block in self.blocks:
            block.attn = SLA.from_attention(block.attn, grid_size=self.patch_embed.grid_size)
        # The published models carry a class token that they never read; frozen, because nothing can train it.
        self.cls_token = nn.Parameter(self.pos_embed.new_zeros(1, 1, self.embed_dim), requires_grad=False)

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(x + self.pos_embed)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Fix another input or patch size: resizes the patch kernel, the positions and the key positions."""
        image = to_2tuple(img_size or self.patch_embed.img_size)
        patch = to_2tuple(patch_size or self.patch_embed.patch_size)
        check_image_size(image, patch)
        super().set_input_size(img_size=image, patch_size=patch)
        for block in self.blocks:
            block.attn.set_grid_size(self.patch_embed.grid_size)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' keys are ours; only the wrapper around the weights is taken off."""
    inner: dict[str, Any] = state_dict.get("model", state_dict)
    return inner


default_cfgs = generate_default_cfgs(
    {
        name: model_cfg("patch_embed.proj", "head")
        for name in ("slab_deit_tiny", "slab_deit_small", "prepbn_deit_tiny", "prepbn_deit_small")
    }
)


def _create(cls: type[VisionTransformer], variant: str, steps: int, pretrained: bool, options: dict[str, Any]) -> Any:
    norm_layer = take_norm(options, steps)
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        norm_layer=norm_layer,
        **options,
    )


_TINY = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}


@register_model
def slab_deit_tiny(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """SLAB-DeiT-T: width 192, SLA in all 12 blocks, 6.20 M parameters in training."""
    return _create(SlabDeiT, "slab_deit_tiny", 60_000, pretrained, _TINY | kwargs)


@register_model
def slab_deit_small(pretrained: bool = False, **kwargs: Any) -> SlabDeiT:
    """SLAB-DeiT-S: width 384, SLA in all 12 blocks, 23.0 M parameters in training."""
    return _create(SlabDeiT, "slab_deit_small", 60_000, pretrained, _SMALL | kwargs)


@register_model
def prepbn_deit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-T with PRepBN: class token, softmax attention (published weights: norm_layer=RepBN)."""
    return _create(VisionTransformer, "prepbn_deit_tiny", 300_000, pretrained, _TINY | kwargs)


@register_model
def prepbn_deit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-S with PRepBN: class token, softmax attention, 22.1 M parameters in training."""
    return _create(VisionTransformer, "prepbn_deit_small", 300_000, pretrained, _SMALL | kwargs)
