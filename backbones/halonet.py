"""HaloNet H0 .. H7: residual networks whose spatial layers are all blocked local attention; any image size.

Source: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021, arXiv 2103.12731. No code
was published with the paper. Widths and depths give its eight parameter counts; the numbers of heads (4, 8, 8, 8) and
the treatment of borders are a reading (padding is masked out, `pad_mode="zero"` lets it take part), strides follow
timm: stage 2, 3 and 4 thin out the queries of their first block.

    block: 1x1 conv to w, BN, act | halo attention w -> w r_v | BN, act | 1x1 conv to w r_b, BN | + shortcut | act

with w = 64, 128, 256, 512; the first block of every stage has a 1x1 conv and BN as its shortcut. Built on timm's
`ByobNet`, so the whole of timm's protocol holds. Registered as `halonet_h0`, `halonet_h1_paper`, `halonet_h2` ...
`halonet_h7`: timm's own `halonet_h1` has 8 heads everywhere and an identity shortcut in stage 1.

`make_size_free(model)` lets timm's pretrained models with halo layers (`halonet26t`, `halonet50ts`, `sehalonet33ts`,
`eca_halonext26ts`, `haloregnetz_b`) take any size: timm wants every map to be a multiple of the block.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from timm.layers import DropPath
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, LayerFn
from torch import Tensor, nn

from zoo.attention.halo import HaloAttention, PadMode


@dataclass(frozen=True)
class HaloSpec:
    """One HaloNet: block b, halo h, value and output ratio, blocks of stage 3, width before the classifier, image."""

    block: int
    halo: int
    value_ratio: float
    out_ratio: float
    depth3: int
    final: int  # 0: none
    image: int
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    heads: tuple[int, int, int, int] = (4, 8, 8, 8)


SPECS = {
    "halonet_h0": HaloSpec(8, 3, 1.0, 0.5, 7, 0, 256),
    "halonet_h1_paper": HaloSpec(8, 3, 1.0, 1.0, 10, 0, 256),
    "halonet_h2": HaloSpec(8, 3, 1.0, 1.25, 11, 0, 256),
    "halonet_h3": HaloSpec(10, 3, 1.0, 1.5, 12, 1024, 320),
    "halonet_h4": HaloSpec(12, 2, 1.0, 3.0, 12, 1280, 384),
    "halonet_h5": HaloSpec(14, 2, 2.5, 2.0, 23, 1536, 448),
    "halonet_h6": HaloSpec(8, 4, 3.0, 2.75, 24, 1536, 512),
    "halonet_h7": HaloSpec(10, 3, 4.0, 3.5, 26, 2048, 600),
}


class HaloBlock(nn.Module):
    """Bottleneck around halo attention, ``(B, in_chs, H, W)`` -> ``(B, out_chs, ceil(H/stride), ceil(W/stride))``.

    ``project``: the shortcut is a 1x1 convolution. Further arguments that `ByobNet` passes (dilation, groups, ...)
    have no meaning for attention.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        layers: LayerFn,
        drop_path_rate: float,
        *,
        width: int,
        num_heads: int,
        spec: HaloSpec,
        pad_mode: PadMode,
        project: bool,
        device: Any = None,
        dtype: Any = None,
        **_of_other_blocks: Any,
    ) -> None:
        super().__init__()
        conv = partial(layers.conv_norm_act, device=device, dtype=dtype)
        values = int(width * spec.value_ratio)
        self.shortcut = conv(in_chs, out_chs, 1, stride=stride, apply_act=False) if project else nn.Identity()
        self.conv1_1x1 = conv(in_chs, width, 1)
        self.self_attn = HaloAttention(
            width,
            values,
            stride,
            num_heads,
            width // num_heads,
            spec.block,
            spec.halo,
            pad_mode=pad_mode,
            device=device,
            dtype=dtype,
        )
        self.post_attn = layers.norm_act(values, device=device, dtype=dtype)
        self.conv3_1x1 = conv(values, out_chs, 1, apply_act=False)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.act = layers.act(inplace=True)

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Called by `ByobNet` after its own initialisation of all convolutions."""
        if zero_init_last:
            nn.init.zeros_(self.conv3_1x1.bn.weight)
        self.self_attn.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        y = self.post_attn(self.self_attn(self.conv1_1x1(x)))
        return self.act(self.drop_path(self.conv3_1x1(y)) + self.shortcut(x))


def model_config(spec: HaloSpec, pad_mode: PadMode = "mask") -> ByoModelCfg:
    """The layout of a HaloNet for timm's `ByobNet`."""
    stages = []
    for i, depth in enumerate((3, 3, spec.depth3, 3)):

        def block(project: bool, depth: int, i: int = i) -> ByoBlockCfg:
            kind = partial(
                HaloBlock, width=spec.widths[i], num_heads=spec.heads[i], spec=spec, pad_mode=pad_mode, project=project
            )
            return ByoBlockCfg(type=kind, d=depth, c=int(spec.widths[i] * spec.out_ratio), s=1 if i == 0 else 2, gs=0)

        stages.append((block(True, 1), block(False, depth - 1)))
    return ByoModelCfg(
        blocks=tuple(stages),
        stem_chs=spec.widths[0],
        stem_type="7x7",
        stem_pool="maxpool",
        num_features=spec.final,
    )


class HaloNet(ByobNet):
    """HaloNet of a `model_config`, ``(B, in_chans, H, W)`` -> ``(B, num_classes)``; maps of strides 2 to 32.

    Any H and W: blocks that reach over the border are cut. Raises ValueError for an input of other channels.
    Source: arXiv 2103.12731.
    """

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}")

    def forward_features(self, x: Tensor) -> Tensor:
        self._check(x)
        return super().forward_features(x)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check(x)
        return super().forward_intermediates(x, *args, **kwargs)


def make_size_free(model: nn.Module, pad_mode: PadMode = "zero") -> nn.Module:
    """Swap every halo layer of a timm model for ours with the same parameters, so that any size fits; in place.

    "zero" leaves the numbers at timm's own sizes as they are. Returns ``model``. Raises TypeError if it has no halo
    layer left to swap, or has attention of a fixed size (BoTNet's, some lambda layers), which would still tie it.
    """
    halos = [name for name, module in model.named_modules() if type(module) is HaloAttn]
    fixed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BottleneckAttn) or (isinstance(module, LambdaLayer) and module.conv_lambda is None)
    ]
    if not halos or fixed:
        what = f"attention of a fixed size at {', '.join(fixed)}" if fixed else "no timm halo layer"
        raise TypeError(f"{type(model).__name__} has {what}, so it cannot be made free of its input size")
    for name in halos:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, HaloAttention.from_timm(model.get_submodule(name), pad_mode))
    return model


# ---- weights ----
def _variant(state: dict[str, Tensor]) -> str:
    depths, widths, windows = [], [], []
    for stage in range(4):
        blocks = [int(key.split(".")[2]) for key in state if key.startswith(f"stages.{stage}.")]
        depths.append(max(blocks, default=-1) + 1)
        conv = state.get(f"stages.{stage}.0.conv3_1x1.conv.weight")
        table = state.get(f"stages.{stage}.0.self_attn.pos_embed.height_rel")
        widths.append(0 if conv is None else len(conv))
        windows.append(0 if table is None else (len(table) + 1) // 2)
    return f"depths {tuple(depths)}, widths {tuple(widths)}, windows {tuple(windows)}"


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ByobNet) -> dict[str, Tensor]:
    """A state dict, bare or under ``state_dict``; raises ValueError if it is another HaloNet's, naming both."""
    state = state_dict.get("state_dict", state_dict)
    given, expected = _variant(state), _variant(model.state_dict())
    if given != expected:
        raise ValueError(f"the checkpoint is a HaloNet of {given}; the model has {expected}")
    return state


def _cfg(spec: HaloSpec) -> dict[str, Any]:
    cells = -(-spec.image // 32)
    return {
        "num_classes": 1000,
        "input_size": (3, spec.image, spec.image),
        "pool_size": (cells, cells),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2103.12731",
    }


default_cfgs = generate_default_cfgs({name: _cfg(spec) for name, spec in SPECS.items()})  # no weights were published


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> HaloNet:
    return build_model_with_cfg(
        HaloNet,
        variant,
        pretrained,
        model_cfg=model_config(SPECS[variant], kwargs.pop("pad_mode", "mask")),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **kwargs,
    )


@timm.models.register_model
def halonet_h0(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H0: 5.5 M parameters, image 256."""
    return _create("halonet_h0", pretrained, kwargs)


@timm.models.register_model
def halonet_h1_paper(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H1 with the paper's parameter count, 8.1 M, image 256 (timm's halonet_h1 is laid out otherwise)."""
    return _create("halonet_h1_paper", pretrained, kwargs)


@timm.models.register_model
def halonet_h2(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H2: 9.4 M parameters, image 256."""
    return _create("halonet_h2", pretrained, kwargs)


@timm.models.register_model
def halonet_h3(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H3: 11.8 M parameters, image 320."""
    return _create("halonet_h3", pretrained, kwargs)


@timm.models.register_model
def halonet_h4(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H4: 19.1 M parameters, image 384."""
    return _create("halonet_h4", pretrained, kwargs)


@timm.models.register_model
def halonet_h5(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H5: 30.7 M parameters, image 448."""
    return _create("halonet_h5", pretrained, kwargs)


@timm.models.register_model
def halonet_h6(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H6: 43.5 M parameters, image 512."""
    return _create("halonet_h6", pretrained, kwargs)


@timm.models.register_model
def halonet_h7(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H7: 67.4 M parameters, image 600."""
    return _create("halonet_h7", pretrained, kwargs)
