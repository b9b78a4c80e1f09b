"""PoolFormer as its authors run it: exact classifier head, norms for dense outputs, their checkpoints.

Source: "MetaFormer Is Actually What You Need for Vision", CVPR 2022, arXiv 2111.11418. Stem, blocks and downsampling
are timm's, which equal the authors' bit for bit. timm's `poolformer_*` differ in three ways that matter:

* Head: timm pools the last map and then normalises the vector over channels; the authors normalise the map with one
  group over channels and pixels and then pool. With timm's order the logits are sharpened by a factor that varies from
  image to image. Registered here as `poolformer_s12_gn` ... `poolformer_m48_gn`, with the same keys and the same
  published weights.
* Dense outputs: the authors give each stage's output a GroupNorm(1) of its own (`dense_norms=True`; they are what
  `norm=True` of `forward_intermediates` means, and are on in a `features_only` model). ImageNet checkpoints have none:
  they start at identity gain.
* Convolutions of stem and downsampling keep PyTorch's initialisation.

timm's `poolformerv2_*` are a different model of a later paper (arXiv 2210.13452: StarReLU, residual scales, an MLP
head); use them from timm, they are not the v2 of the checkpoints handled here.
"""

import re
from typing import Any

import timm
from timm.layers import GroupNorm1
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models.metaformer import MetaFormer
from torch import Tensor, nn

MIN_SIZE = 3  # the 7x7 stem with padding 2 needs this much


class PoolFormer(MetaFormer):
    """PoolFormer, ``(B, in_chans, H, W)`` -> ``(B, num_classes)``, any size from 3 x 3.

    Four maps of strides 4, 8, 16, 32. ``layer_scale`` is the initial gain of every residual. With ``dense_norms`` each
    stage output has a GroupNorm(1); together with ``num_classes=0`` there is then no classifier norm, which is the
    authors' layout for detection and segmentation. Raises ValueError for an input of other channels or too small, and
    for ``norm=True`` without ``dense_norms``. Source: arXiv 2111.11418.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 6, 2),
        dims: tuple[int, ...] = (64, 128, 320, 512),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        layer_scale: float = 1e-5,
        dense_norms: bool = False,
    ) -> None:
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            depths=depths,
            dims=dims,
            mlp_act=nn.GELU,
            mlp_bias=True,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            proj_drop_rate=proj_drop_rate,
            layer_scale_init_values=layer_scale,
            res_scale_init_values=None,
            downsample_norm=None,
            norm_layers=GroupNorm1,
            output_norm=GroupNorm1,
            use_mlp_head=False,
        )
        self.stem.conv.reset_parameters()
        for stage in self.stages:
            if not isinstance(stage.downsample, nn.Identity):
                stage.downsample.conv.reset_parameters()
        self.dense_norms = nn.ModuleList(GroupNorm1(dim) for dim in dims) if dense_norms else None
        if dense_norms and num_classes == 0:
            self.head.norm = nn.Identity()

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        if min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(f"images must be at least {MIN_SIZE} x {MIN_SIZE}, got {x.shape[2]} x {x.shape[3]}")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regexes for layer-wise learning-rate decay: stem, then stages (``coarse``) or their blocks, then norms."""
        stages = (
            r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^dense_norms", (99999,)),
                (r"^head\.norm", (99999,)),
            ]
        )
        return {"stem": r"^stem", "blocks": stages}

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the last stage's map before any norm, ``(B, D, H/32, W/32)``."""
        self._check(x)
        return super().forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The authors' order: norm over channels and pixels, pool, linear."""
        x = self.head.drop(self.head.flatten(self.head.global_pool(self.head.norm(x))))
        return x if pre_logits else self.head.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Stage maps as in timm; ``norm`` sends each through its own dense norm."""
        self._check(x)
        if norm and self.dense_norms is None:
            raise ValueError("norm=True needs a model with per-output norms; build it with dense_norms=True")
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; PoolFormer has maps, so it must be 'NCHW'")
        final, maps = super().forward_intermediates(x, indices, stop_early=stop_early)
        if norm:
            take, _ = feature_take_indices(len(self.stages), indices)
            maps = [self.dense_norms[i](y) for i, y in zip(take, maps, strict=True)]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what comes after the last stage in ``indices``, and the dense norms of all other stages."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm:
            self.dense_norms = None
        elif self.dense_norms is not None:  # an unused parameter would stop distributed training
            norms = (norm if i in take else nn.Identity() for i, norm in enumerate(self.dense_norms))
            self.dense_norms = nn.ModuleList(norms)
        return take


# ---- weights ----
_RULES = (
    (r"^patch_embed\.proj\.", r"stem.conv."),
    (r"^norm([0246])\.", lambda m: f"dense_norms.{int(m[1]) // 2}."),
    (r"^network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^network\.([135])\.proj\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv."),
    (r"\.layer_scale_([12])$", r".layer_scale\1.scale"),
    (r"^norm\.", r"head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _variant(state: dict[str, Tensor]) -> str:
    """Depths and widths that a state dict in our layout is made for."""
    blocks = [tuple(map(int, m.groups())) for k in state if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", k))]
    stages = sorted({stage for stage, _ in blocks})
    depths = tuple(max(i for s, i in blocks if s == stage) + 1 for stage in stages)
    widths = tuple(len(state[f"stages.{stage}.blocks.0.norm1.weight"]) for stage in stages)
    return f"depths {depths} and widths {widths}"


def checkpoint_filter_fn(state_dict: dict[str, Any], model: MetaFormer) -> dict[str, Tensor]:
    """The authors' checkpoint (bare, or the ``backbone.`` part of an mmdetection or mmsegmentation one) or timm's.

    A checkpoint without dense norms keeps those of ``model`` as they are. Raises ValueError for the weights of another
    variant (naming both), of PoolFormerV2 or another model of its paper, or of something else.
    """
    state = state_dict.get("state_dict", state_dict)
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    state = inner or state
    if any(re.search(r"res_scale|\.act\.scale$|token_mixer\.", key) for key in state):
        raise ValueError(
            "these are weights of 'MetaFormer Baselines' (poolformerv2, convformer, caformer); "
            "load them with timm's models of those names"
        )
    converted = {}
    for key, value in state.items():
        for pattern, replacement in _RULES:
            key = re.sub(pattern, replacement, key)
        converted[key] = value
    if "stages.0.blocks.0.norm1.weight" not in converted:
        raise ValueError(f"not a PoolFormer checkpoint: no 'network.0.0.norm1.weight', got {[*state][:3]}")
    own = model.state_dict()
    given, expected = _variant(converted), _variant(own)
    if given != expected:
        raise ValueError(f"the checkpoint is a PoolFormer of {given}; the model has {expected}")
    if not any(key.startswith("dense_norms.") for key in converted):
        converted |= {key: value for key, value in own.items() if key.startswith("dense_norms.")}
    return converted


def _cfg(name: str, crop: float) -> dict[str, Any]:
    return {
        "hf_hub_id": f"timm/poolformer_{name}.sail_in1k",  # the same tensors and keys, only the head's order differs
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": crop,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2111.11418",
        "origin_url": "https://github.com/sail-sg/poolformer",
    }


default_cfgs = generate_default_cfgs(
    {
        "poolformer_s12_gn.sail_in1k": _cfg("s12", 0.9),
        "poolformer_s24_gn.sail_in1k": _cfg("s24", 0.9),
        "poolformer_s36_gn.sail_in1k": _cfg("s36", 0.9),
        "poolformer_m36_gn.sail_in1k": _cfg("m36", 0.95),
        "poolformer_m48_gn.sail_in1k": _cfg("m48", 0.95),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> PoolFormer:
    norm = bool(kwargs.get("dense_norms"))
    return build_model_with_cfg(
        PoolFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "norm": norm},
        **kwargs,
    )


@timm.models.register_model
def poolformer_s12_gn(pretrained: bool = False, **kwargs: Any) -> PoolFormer:
    """PoolFormer-S12 with the authors' head: 11.9 M parameters."""
    return _create("poolformer_s12_gn", pretrained, {"depths": (2, 2, 6, 2)} | kwargs)


@timm.models.register_model
def poolformer_s24_gn(pretrained: bool = False, **kwargs: Any) -> PoolFormer:
    """PoolFormer-S24 with the authors' head: 21.4 M parameters."""
    return _create("poolformer_s24_gn", pretrained, {"depths": (4, 4, 12, 4)} | kwargs)


@timm.models.register_model
def poolformer_s36_gn(pretrained: bool = False, **kwargs: Any) -> PoolFormer:
    """PoolFormer-S36 with the authors' head: 30.9 M parameters."""
    return _create("poolformer_s36_gn", pretrained, {"depths": (6, 6, 18, 6), "layer_scale": 1e-6} | kwargs)


@timm.models.register_model
def poolformer_m36_gn(pretrained: bool = False, **kwargs: Any) -> PoolFormer:
    """PoolFormer-M36 with the authors' head: 56.2 M parameters."""
    args = {"depths": (6, 6, 18, 6), "dims": (96, 192, 384, 768), "layer_scale": 1e-6}
    return _create("poolformer_m36_gn", pretrained, args | kwargs)


@timm.models.register_model
def poolformer_m48_gn(pretrained: bool = False, **kwargs: Any) -> PoolFormer:
    """PoolFormer-M48 with the authors' head: 73.5 M parameters."""
    args = {"depths": (8, 8, 24, 8), "dims": (96, 192, 384, 768), "layer_scale": 1e-6}
    return _create("poolformer_m48_gn", pretrained, args | kwargs)
