"""Small models of every backbone family, for the property matrix: real classes, few and narrow blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import open_clip
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from timm.layers import GroupNorm1
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.efficientnet import EfficientNet
from timm.models.metaformer import MetaFormer
from timm.models.shvit import SHViT
from torch import Tensor, nn

CLASSES = 7


class Family(NamedTuple):
    """How to build the model, its input size (H, W), and a non-square size it takes after building, if any."""

    build: Callable[[], nn.Module]
    size: tuple[int, int] = (64, 64)
    oblong: tuple[int, int] | None = None


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


_NARROW = dict(depth=2, embed_dim=48, num_heads=3)


def _poolformer() -> nn.Module:
    """poolformer_s12's settings; timm's function of that name fixes depths and widths."""
    return MetaFormer(
        num_classes=CLASSES,
        depths=(1, 2),
        dims=(24, 32),
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
    )


def _halonet() -> nn.Module:
    stages = (
        ByoBlockCfg("bottle", d=1, c=32, s=1, gs=0, br=0.5),
        ByoBlockCfg("self_attn", d=2, c=64, s=2, gs=0, br=0.5),
    )
    config = ByoModelCfg(
        blocks=stages,
        stem_chs=16,
        stem_type="tiered",
        stem_pool="maxpool",
        self_attn_layer="halo",
        self_attn_kwargs=dict(block_size=4, halo_size=1, num_heads=2),
    )
    return ByobNet(config, num_classes=CLASSES)


def _shvit() -> nn.Module:
    widths = dict(embed_dim=(32, 48, 64), partial_dim=(16, 24, 32))
    return SHViT(num_classes=CLASSES, depth=(1, 1, 1), types=("i", "s", "s"), **widths)


def _efficientnet_lite() -> nn.Module:
    stages = [["ds_r1_k3_s1_e1_c16"], ["ir_r2_k3_s2_e3_c24"], ["ir_r1_k5_s2_e3_c32"]]
    return EfficientNet(
        block_args=decode_arch_def(stages, 1.0, fix_first_last=True),
        num_classes=CLASSES,
        num_features=48,
        stem_size=16,
        fix_stem=True,
        act_layer=nn.ReLU6,
    )


def _open_clip_tower() -> nn.Module:
    vision = CLIPVisionCfg(layers=2, width=48, head_width=16, patch_size=16, image_size=64)
    text = CLIPTextCfg(context_length=8, vocab_size=100, width=32, heads=2, layers=1)
    model: nn.Module = CLIP(32, vision, text).visual
    assert isinstance(model, open_clip.transformer.VisionTransformer)
    return model


FAMILIES: dict[str, Family] = {
    "ViT": Family(_timm("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True, **_NARROW), oblong=(48, 80)),
    "DINOv2": Family(
        _timm("vit_small_patch14_reg4_dinov2", img_size=56, dynamic_img_size=True, **_NARROW), (56, 56), (42, 70)
    ),
    "BEiT": Family(_timm("beit_base_patch16_224", img_size=64, **_NARROW)),
    "EVA-02": Family(
        _timm("eva02_tiny_patch14_224", img_size=56, dynamic_img_size=True, **_NARROW), (56, 56), (42, 70)
    ),
    "Swin-V2": Family(
        _timm(
            "swinv2_tiny_window8_256",
            depths=(2, 1),
            num_heads=(2, 4),
            embed_dim=32,
            img_size=64,
            window_size=4,
            strict_img_size=False,
        ),
        oblong=(64, 96),
    ),
    "ConvNeXt": Family(_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)), oblong=(64, 96)),
    "ResNet": Family(_timm("resnet18", layers=(1, 1, 1, 1), channels=(16, 24, 32, 40)), oblong=(64, 96)),
    "PoolFormer": Family(_poolformer, oblong=(64, 96)),
    "SHViT": Family(_shvit, oblong=(64, 128)),
    "HaloNet": Family(_halonet, oblong=(64, 96)),
    "ConViT": Family(_timm("convit_tiny", img_size=64, depth=2, local_up_to_layer=1, embed_dim=12)),
    "open_clip ViT": Family(_open_clip_tower),
    "EfficientNet-Lite": Family(_efficientnet_lite, oblong=(64, 96)),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """The family's model in evaluation mode, its weights drawn so that every path matters.

    Fresh timm models hide most of themselves behind LayerScale of 1e-5, tiny heads and zero-initialised norms; a
    property checked there would hold for a broken adapter as well.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family].build().eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                _draw(name.rpartition(".")[2], tensor)
    return model


def inputs(family: str, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    """Random images (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, *(size or FAMILIES[family].size), generator=generator)


def _draw(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or name == "logit_scale":
        return
    if name == "running_var":
        tensor.uniform_(0.5, 1.5)
    elif name in ("running_mean", "bias", "q_bias", "v_bias") or name.endswith("_bias"):
        tensor.normal_(0.0, 0.1)
    elif name in ("weight", "gamma", "scale", "gamma_1", "gamma_2", "in_proj_weight", "proj"):
        if tensor.dim() > 1:
            tensor.normal_(0.0, tensor[0].numel() ** -0.5)
        else:
            tensor.normal_(0.7, 0.1)
