"""ImageNet-1k top-1 as published, with where the figure stands; nothing here was measured by this library."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Top-1 in percent at one image size, and its source."""

    top1: float
    size: int
    source: str


_ILLAMA = "arXiv 2404.06773"
_ILLAMA_21K = "arXiv 2404.06773, pretrained on ImageNet-21k"
_SLAB = "README of xinghaochen/SLAB"
_SHVIT = "arXiv 2401.16456"
_POOLFORMER = "README of sail-sg/poolformer"
_CONVIT = "timm's results table, tag fb_in1k"
_HALONET = "arXiv 2103.12731, as quoted by leondgarse/keras_cv_attention_models"

PUBLISHED: dict[str, Published] = {
    "illama_tiny": Published(75.0, 224, _ILLAMA),
    "illama_small": Published(79.9, 224, _ILLAMA),
    "illama_base": Published(81.6, 224, _ILLAMA),
    "illama_large": Published(84.8, 224, _ILLAMA_21K),
    "slab_deit_tiny": Published(74.3, 224, _SLAB),
    "slab_deit_small": Published(80.0, 224, _SLAB),
    "prepbn_deit_tiny": Published(73.6, 224, _SLAB),
    "prepbn_deit_small": Published(80.2, 224, _SLAB),
    "slab_pvt_tiny": Published(76.5, 224, _SLAB),
    "prepbn_pvt_tiny": Published(76.0, 224, _SLAB),
    "prepbn_pvt_small": Published(80.1, 224, _SLAB),
    "prepbn_pvt_medium": Published(81.7, 224, _SLAB),
    "slab_swin_tiny": Published(81.8, 224, _SLAB),
    "slab_swin_small": Published(83.6, 224, _SLAB),
    "prepbn_swin_tiny": Published(81.4, 224, _SLAB),
    "slab_cswin_tiny": Published(82.8, 224, _SLAB),
    "shvit_s1": Published(72.8, 224, _SHVIT),
    "shvit_s2": Published(75.2, 224, _SHVIT),
    "shvit_s3": Published(77.4, 224, _SHVIT),
    "shvit_s4": Published(79.4, 256, _SHVIT),
    "poolformer_s12_gn": Published(77.2, 224, _POOLFORMER),
    "poolformer_s24_gn": Published(80.3, 224, _POOLFORMER),
    "poolformer_s36_gn": Published(81.4, 224, _POOLFORMER),
    "poolformer_m36_gn": Published(82.1, 224, _POOLFORMER),
    "poolformer_m48_gn": Published(82.5, 224, _POOLFORMER),
    "convit_tiny": Published(73.14, 224, _CONVIT),
    "convit_small": Published(81.41, 224, _CONVIT),
    "convit_base": Published(82.30, 224, _CONVIT),
    "halonet_h0": Published(77.9, 256, _HALONET),
    "halonet_h1_paper": Published(79.9, 256, _HALONET),
    "halonet_h2": Published(80.4, 256, _HALONET),
    "halonet_h3": Published(81.9, 320, _HALONET),
    "halonet_h4": Published(83.3, 384, _HALONET),
    "halonet_h5": Published(84.0, 448, _HALONET),
    "halonet_h6": Published(84.4, 512, _HALONET),
    "halonet_h7": Published(84.9, 600, _HALONET),
}
