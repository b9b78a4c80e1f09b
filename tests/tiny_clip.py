"""Small open_clip architectures under names of their own; importing this registers them with open_clip."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2}
ARCHITECTURES = {
    "tiny-vit": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-vit-pool-first": {
        "embed_dim": 32,
        "vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": TEXT,
    },
    "tiny-attn-pool": {
        "embed_dim": 32,
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4},
        "text_cfg": TEXT,
    },
    "tiny-resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
    "tiny-timm": {
        "embed_dim": 32,
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
        "text_cfg": {**TEXT, "pool_type": "last", "proj_bias": True},
    },
}

_folder = tempfile.TemporaryDirectory()  # open_clip reads its configs again whenever one is added
for _name, _config in ARCHITECTURES.items():
    Path(_folder.name, f"{_name}.json").write_text(json.dumps(_config))
open_clip.add_model_config(_folder.name)


def images(side: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def tokens(*texts: str) -> Tensor:
    found: Tensor = open_clip.get_tokenizer("tiny-vit")(list(texts or ("a red cat", "a small dog on a mat")))
    return found


def randomise(model: nn.Module) -> nn.Module:
    """Every adapter tensor random, so that adapters change what comes out."""
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            nn.init.normal_(parameter, std=0.1)
    return model
