"""SHViT beyond timm's `shvit_s1` .. `shvit_s4`: distillation head, drop path, authors' checkpoints, detection pyramid.

Source: "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", CVPR 2024, arXiv 2401.16456.
The layers are timm's; timm's four models equal the authors' bit for bit, so only what timm lacks is here:

* `SHViT`: timm's class with `distilled`, `drop_path_rate`, a downsample between stages of equal width too (timm leaves
  it out there), and a classifier that can be asked for after `fuse()`. Registered as `shvit_s1_distilled` and so on.
* `set_drop_path(model, rate)`: stochastic depth for any of timm's SHViTs, in place.
* `checkpoint_filter_fn`: the authors' files, for timm's models and ours.
* `SHViTFPN`: the authors' feature pyramid, which makes strides 8 and 4 by transposed convolutions.

To fold batch norms into convolutions for inference call `model.fuse()`, or `timm.utils.reparameterize_model` on a
`features_only` model. A fused model must not be trained. In detection the authors keep batch norms in eval mode.
"""

import re
from typing import Any, Literal

import timm
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, shvit
from timm.models.shvit import FFN, Conv2dNorm, NormLinear, PatchMerging, Residual
from torch import Tensor, nn


class DropResidual(Residual):
    """``x + drop_path(m(x))``, any shape with the batch first; same keys and same fusion as timm's ``Residual``."""

    def __init__(self, m: nn.Module, rate: float) -> None:
        super().__init__(m)
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.m(x))


def set_drop_path(model: shvit.SHViT, rate: float) -> None:
    """Stochastic depth on every residual of the blocks, rising linearly from 0 to ``rate``; replaces an earlier rate.

    Raises ValueError outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"the drop path rate must lie in [0, 1), got {rate}")
    blocks = [block for stage in model.stages for block in stage.blocks]
    for i, block in enumerate(blocks):
        own = rate * i / max(len(blocks) - 1, 1)
        for name in ("conv", "mixer", "ffn"):
            layer = getattr(block, name)
            if isinstance(layer, Residual):
                setattr(block, name, (DropResidual(layer.m, own) if own else Residual(layer.m)).train(layer.training))


class SHViT(shvit.SHViT):
    """timm's SHViT with ``distilled`` and ``drop_path_rate``, ``(B, in_chans, H, W)`` -> ``(B, num_classes)``.

    A distilled model has a second head, ``head_dist``; it returns the mean of both logits, or, in training mode after
    ``set_distilled_training(True)``, the pair (class logits, distillation logits). Any input size; stages have strides
    16, 32, 64. Raises ValueError for an input that is not ``(B, in_chans, H, W)``. Source: arXiv 2401.16456.
    """

    def __init__(self, *, distilled: bool = False, drop_path_rate: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        for i, (before, after) in enumerate(zip(self.feature_info, self.feature_info[1:], strict=False), start=1):
            if before["num_chs"] == after["num_chs"]:  # timm takes equal widths for "no downsample"
                self.stages[i].downsample = _downsample(after["num_chs"])
        self.distilled, self.distilled_training = distilled, False
        if distilled:
            self.head_dist = self._new_head()
        set_drop_path(self, drop_path_rate)

    def _new_head(self) -> nn.Module:
        like = next(self.parameters())
        head = NormLinear(self.head_hidden_size, self.num_classes) if self.num_classes > 0 else nn.Identity()
        return head.to(like.device, like.dtype).train(self.training)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a training forward returns the pair of logits. Raises ValueError for a model with one head."""
        if not self.distilled:
            raise ValueError("this SHViT has one head; build it with distilled=True")
        self.distilled_training = enable

    def get_classifier(self) -> Any:
        """The linear classifier (after ``fuse()`` too; Identity without classes), or both of a distilled model."""
        heads = (self.head, self.head_dist) if self.distilled else (self.head,)
        linears = tuple(head.l if isinstance(head, NormLinear) else head for head in heads)
        return linears if self.distilled else linears[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.distilled:
            self.head_dist = self._new_head()

    def forward_features(self, x: Tensor) -> Tensor:
        self._check(x)
        return super().forward_features(x)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check(x)
        return super().forward_intermediates(x, *args, **kwargs)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """``(B, C, H, W)`` -> logits ``(B, num_classes)``, or pooled ``(B, C)`` with ``pre_logits``."""
        x = super().forward_head(x, pre_logits=True)
        if pre_logits or not self.distilled:
            return x if pre_logits else self.head(x)
        logits, distilled = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training:
            return logits, distilled
        return (logits + distilled) / 2


def _downsample(dim: int) -> nn.Sequential:
    def local() -> list[nn.Module]:
        return [Residual(Conv2dNorm(dim, dim, 3, 1, 1, groups=dim)), Residual(FFN(dim, 2 * dim))]

    return nn.Sequential(*local(), PatchMerging(dim, dim), *local())


# ---- detection ----
class SHViTFPN(nn.Module):
    """The authors' feature pyramid: three stage maps in, ``num_outs`` maps of one width out, finest first.

    Laterals (1x1) are merged top-down by nearest upsampling to the exact size. ``extra_fine`` levels are chained 2x2
    stride-2 transposed convolutions of the finest merged lateral, and each level gets a 3x3 convolution. Levels beyond
    the stages come from 3x3 stride-2 convolutions: the first of the last stage map itself (``coarse_from="input"``) or
    of the last output (``"output"``), the rest of each other. All convolutions have a bias, none a norm or activation.
    Mask R-CNN: 5 outputs, 2 of them fine (strides 4..64). RetinaNet: 5 outputs, 1 fine (8..128). Parameter names are
    the authors'. Raises ValueError if the counts do not add up or the maps do not fit. Source: arXiv 2401.16456.
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        out_channels: int = 256,
        num_outs: int = 5,
        extra_fine: int = 2,
        coarse_from: Literal["input", "output"] = "input",
    ) -> None:
        super().__init__()
        coarse = num_outs - extra_fine - len(in_channels)
        if extra_fine < 0 or coarse < 0:
            raise ValueError(f"{len(in_channels)} stage maps and {extra_fine} finer levels do not make {num_outs} maps")
        if coarse_from not in ("input", "output"):
            raise ValueError(f"coarse_from is {coarse_from!r}; it must be 'input' or 'output'")
        self.in_channels, self.coarse_from = tuple(in_channels), coarse_from
        first = in_channels[-1] if coarse_from == "input" else out_channels
        self.lateral_convs = nn.ModuleList(_Conv(nn.Conv2d(c, out_channels, 1)) for c in in_channels)
        self.fpn_convs = nn.ModuleList(
            [_Conv(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in in_channels]
            + [_Conv(nn.Conv2d(out_channels if i else first, out_channels, 3, 2, 1)) for i in range(coarse)]
        )
        self.extra_trans_convs = nn.ModuleList(
            _Conv(nn.ConvTranspose2d(out_channels, out_channels, 2, 2)) for _ in range(extra_fine)
        )
        self.extra_fpn_convs = nn.ModuleList(  # the first belongs to the FINEST map
            _Conv(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in range(extra_fine)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """``maps``: ``(B, in_channels[i], H_i, W_i)``, finest first -> ``num_outs`` maps of ``out_channels``."""
        given = tuple(x.shape[1] for x in maps)
        if given != self.in_channels:
            raise ValueError(f"the pyramid expects maps of {self.in_channels} channels, got {given}")
        merged = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[2:], mode="nearest")
        outs = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=False)]
        fine = [merged[0]]
        for conv in self.extra_trans_convs:
            fine.insert(0, conv(fine[0]))
        finer = [conv(x) for conv, x in zip(self.extra_fpn_convs, fine, strict=False)]
        x = maps[-1] if self.coarse_from == "input" else outs[-1]
        for conv in self.fpn_convs[len(merged) :]:
            x = conv(x)
            outs.append(x)
        return finer + outs


class _Conv(nn.Module):
    """One convolution under the name ``conv``, as in the authors' checkpoints."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


# ---- weights ----
_DOWNSAMPLE = {"0.0": "0", "0.1": "1", "1": "2", "2.0": "3", "2.1": "4"}


def _timm_key(key: str) -> str:
    """``blocksS.*`` of the authors as timm's ``stages.(S-1).*``; other keys stay."""
    found = re.match(r"blocks([123])\.(\d+)\.(.*)", key)
    if found is None:
        return key
    stage, index, rest = int(found[1]) - 1, int(found[2]), found[3]
    if stage == 0:
        return f"stages.0.blocks.{index}.{rest}"
    if index > 2:
        return f"stages.{stage}.blocks.{index - 3}.{rest}"
    part = re.match(r"(\d)\.(.*)", rest) if index != 1 else None
    if part is not None:
        return f"stages.{stage}.downsample.{_DOWNSAMPLE[f'{index}.{part[1]}']}.{part[2]}"
    return f"stages.{stage}.downsample.{_DOWNSAMPLE[str(index)]}.{rest}"


def _variant(state: dict[str, Tensor]) -> str:
    """Widths, attended channels and depths that a state dict in timm's layout is made for."""
    dims, partial, depths = [], [], []
    for stage in range(3):
        ffn = state.get(f"stages.{stage}.blocks.0.ffn.m.pw2.c.weight")
        norm = state.get(f"stages.{stage}.blocks.0.mixer.m.pre_norm.weight")
        indices = [int(k.split(".")[3]) for k in state if k.startswith(f"stages.{stage}.blocks.")]
        dims.append(0 if ffn is None else len(ffn))
        partial.append(0 if norm is None else len(norm))
        depths.append(max(indices, default=-1) + 1)
    return f"widths {tuple(dims)}, attended channels {tuple(partial)}, depths {tuple(depths)}"


def checkpoint_filter_fn(state_dict: dict[str, Any], model: shvit.SHViT) -> dict[str, Tensor]:
    """The authors' checkpoint (weights under ``model``), an mmdetection one of theirs (its ``backbone.`` part), or
    timm's, in the layout of timm's SHViT.

    Raises ValueError if it belongs to another variant, naming both, or is no SHViT at all.
    """
    state = state_dict.get("model", state_dict.get("state_dict", state_dict))
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    state = {_timm_key(key): value for key, value in (inner or state).items()}
    if not any(key.startswith("stages.") for key in state):
        raise ValueError(f"not a SHViT checkpoint: no key starts with 'blocks1.' or 'stages.', got {[*state][:3]}")
    given, expected = _variant(state), _variant(model.state_dict())
    if given != expected:
        raise ValueError(f"the checkpoint is a SHViT of {given}; the model has {expected}")
    return state


def _cfg(size: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (4, 4),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.0.c",
        "classifier": ("head.l", "head_dist.l"),
        "license": "mit",
        "paper_ids": "arXiv:2401.16456",
        "origin_url": "https://github.com/ysj9909/SHViT",
    }


default_cfgs = generate_default_cfgs(
    {  # no weights with a distillation head were published
        "shvit_s1_distilled": _cfg(),
        "shvit_s2_distilled": _cfg(),
        "shvit_s3_distilled": _cfg(),
        "shvit_s4_distilled": _cfg(256),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> SHViT:
    return build_model_with_cfg(
        SHViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **{"types": ("i", "s", "s"), "distilled": True, **kwargs},
    )


@timm.models.register_model
def shvit_s1_distilled(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S1 with a distillation head (S1 alone: 6.33 M parameters)."""
    args = {"embed_dim": (128, 224, 320), "depth": (2, 4, 5), "partial_dim": (32, 48, 68)}
    return _create("shvit_s1_distilled", pretrained, args | kwargs)


@timm.models.register_model
def shvit_s2_distilled(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S2 with a distillation head (S2 alone: 11.5 M parameters)."""
    args = {"embed_dim": (128, 308, 448), "depth": (2, 4, 5), "partial_dim": (32, 66, 96)}
    return _create("shvit_s2_distilled", pretrained, args | kwargs)


@timm.models.register_model
def shvit_s3_distilled(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S3 with a distillation head (S3 alone: 14.2 M parameters)."""
    args = {"embed_dim": (192, 352, 448), "depth": (3, 5, 5), "partial_dim": (48, 75, 96)}
    return _create("shvit_s3_distilled", pretrained, args | kwargs)


@timm.models.register_model
def shvit_s4_distilled(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S4 with a distillation head (S4 alone: 16.6 M parameters)."""
    args = {"embed_dim": (224, 336, 448), "depth": (4, 7, 6), "partial_dim": (48, 72, 96)}
    return _create("shvit_s4_distilled", pretrained, args | kwargs)
