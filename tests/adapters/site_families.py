"""Small members of every backbone family whose sites are verified: name -> (builder, example input shape)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import open_clip
import timm
import torchvision
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

Build = Callable[[], nn.Module]


def _timm(name: str, **options: object) -> Build:
    return functools.partial(timm.create_model, name, pretrained=False, num_classes=7, **options)


_TEXT = dict(context_length=8, vocab_size=64, width=32, heads=2, layers=2)
_VIT = dict(embed_dim=48, num_heads=3, depth=2, img_size=32)
_WINDOWS = dict(embed_dim=24, depths=(1, 1), num_heads=(2, 2))


def _clip(vision: dict[str, object]) -> Build:
    return functools.partial(open_clip.CLIP, 32, vision, _TEXT)


def _siglip() -> nn.Module:
    vision = dict(timm_model_name="vit_tiny_patch16_224", timm_pool="map", timm_proj="none", image_size=32)
    return open_clip.CustomTextCLIP(192, vision, _TEXT, init_logit_bias=-10.0)


FAMILIES: dict[str, Build] = {
    "vit": _timm("vit_tiny_patch16_224", **_VIT),
    "deit3": _timm("deit3_small_patch16_224", **_VIT),
    "dinov2": _timm("vit_small_patch14_dinov2", **{**_VIT, "img_size": 28}),
    "dinov3": _timm("vit_small_patch16_dinov3", **_VIT),
    "dinov3_qkv_bias": _timm("vit_small_patch16_dinov3_qkvb", **_VIT),
    "flexivit": _timm("flexivit_small", **_VIT),
    "naflexvit": _timm("naflexvit_base_patch16_gap", embed_dim=48, num_heads=3, depth=2),
    "vit_relpos": _timm("vit_relpos_small_patch16_224", **_VIT),
    "vit_parallel": functools.partial(
        VisionTransformer, img_size=32, embed_dim=48, num_heads=3, depth=2, block_fn=ParallelScalingBlock
    ),
    "swin": _timm("swin_tiny_patch4_window7_224", img_size=56, **_WINDOWS),
    "swinv2": _timm("swinv2_tiny_window8_256", img_size=64, **_WINDOWS),
    "swinv2_cr": _timm("swinv2_cr_tiny_224", img_size=56, window_size=7, **_WINDOWS),
    "beit": _timm("beit_base_patch16_224", **_VIT),
    "beitv2": _timm("beitv2_base_patch16_224", **_VIT),
    "eva02_fused": _timm("eva02_tiny_patch14_224", **{**_VIT, "img_size": 28}),
    "eva02_split": _timm("eva02_base_patch14_224", **{**_VIT, "img_size": 28}),
    "convit": _timm("convit_tiny", depth=2, local_up_to_layer=1, embed_dim=16, num_heads=4, img_size=32),
    "halonet": _timm("halonet26t"),
    "shvit": _timm("shvit_s1"),
    "poolformer": _timm("poolformer_s12"),
    "convnext": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "resnet18": _timm("resnet18"),
    "efficientnet_lite0": _timm("efficientnet_lite0"),
    "mobilenetv2": _timm("mobilenetv2_050"),
    "mixer": _timm("mixer_s32_224", img_size=64),
    "cait": _timm("cait_xxs24_224", depth_token_only=1, **_VIT),
    "maxvit": _timm("maxvit_pico_rw_256", depths=(1, 1), embed_dim=(32, 64)),
    "maxvit_tf": _timm("maxvit_tiny_tf_224", depths=(1, 1), embed_dim=(32, 64), stem_width=32),
    "coatnet": _timm("coatnet_0_224", depths=(1, 1, 1, 1), embed_dim=(16, 16, 64, 64), img_size=64),
    "mvitv2": _timm("mvitv2_tiny"),
    "pvt_v2": _timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
    "hiera": _timm("hiera_tiny_224", embed_dim=24, num_heads=1, stages=(1, 1, 1, 1)),
    "xcit": _timm("xcit_nano_12_p16_224", depth=1),
    "samvit": _timm("samvit_base_patch16", embed_dim=48, num_heads=3, depth=2, img_size=64, global_attn_indexes=(1,)),
    "edgenext": _timm("edgenext_xx_small", depths=(2, 2, 2, 2), global_block_counts=(0, 1, 1, 1)),
    "efficientvit_mit": _timm("efficientvit_b0"),
    "efficientvit_msra": _timm("efficientvit_m0", depth=(1, 1, 1)),
    "tiny_vit": _timm("tiny_vit_5m_224", depths=(1, 1, 1, 1)),
    "levit": _timm("levit_128s", depth=(1, 1, 1)),
    "levit_conv": _timm("levit_conv_128s", depth=(1, 1, 1)),
    "vitamin": _timm("vitamin_small_224", depth=1, img_size=64),
    "siglip": _timm("vit_base_patch16_siglip_224", **_VIT),
    "mobilevitv2": _timm("mobilevitv2_050"),
    "gcvit": _timm("gcvit_xxtiny"),
    "twins": _timm("twins_svt_small", depths=(2, 2, 2, 2)),
    "lambda_resnet": _timm("lambda_resnet26t"),
    "botnet": _timm("botnet26t_256"),
    "lowformer": _timm("lowformer_b0"),
    "efficientformer": _timm("efficientformer_l1"),
    "mobilenetv4": _timm("mobilenetv4_hybrid_medium"),
    "open_clip_vit": _clip(dict(layers=2, width=64, head_width=32, patch_size=16, image_size=32)),
    "open_clip_rn": _clip(dict(layers=(1, 1, 1, 1), width=16, image_size=64, head_width=32)),
    "open_clip_siglip": _siglip,
    "torchvision_vit": functools.partial(torchvision.models.VisionTransformer, 32, 16, 2, 2, 32, 64),
    "torchvision_swin": functools.partial(torchvision.models.SwinTransformer, [4, 4], 32, [1, 1], [2, 2], [7, 7]),
    "torchvision_swin_v2": functools.partial(
        torchvision.models.SwinTransformer,
        [4, 4],
        32,
        [1, 1],
        [2, 2],
        [8, 8],
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    ),
    "encoder_layer": functools.partial(nn.TransformerEncoderLayer, 32, 2, 64, batch_first=True),
}


@functools.cache
def family(name: str) -> nn.Module:
    """One shared instance in evaluation mode; tests must leave it as it was."""
    return FAMILIES[name]().eval()
