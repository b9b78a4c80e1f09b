"""LoLA-SpecViT: patches of a hyperspectral cube through 3-D convolutions and windowed attention.

Source: arXiv 2506.17759 (2025) and its journal version (Int. J. Applied Earth Observation and Geoinformation 144,
104924); keys and numbers are those of the authors' program. Two variants:

`lola_specvit`       the published network: 254.6 M parameters for 9 classes, of which the 73.6 M of the gated LoRA
                     layers train (`freeze_all_but_lora`) and the rest stays at its random start.
`lola_specvit_tidy`  the same design without its waste, the default of the configs: SwiGLU as the whole MLP with hidden
                     width 8/3 C, plain linears that all train, windows no larger than the grid, padding masked, bands
                     summed with learned weights, the middle pixel heard apart, few blocks. Zoo adapters attach to it,
                     to carry a trained model to another scene; `lora=` puts gated LoRA layers, with a low-rank gate if
                     wanted, in place of its linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.lola_specvit_layers import (
    BandDropout,
    CentreSpectrum,
    ChannelExcite,
    GatedLoRALinear,
    LoRAOptions,
    ReduceSize,
    SpecBlock,
)
from zoo.errors import OptionError


class LoLASpecViT(nn.Module):
    """(B, K, P, P) patches of K bands -> logits, or pooled features (B, C) without a classifier.

    Args:
        in_chans: K. An axis of the 3-D convolutions, not a width: any K runs unless an option below fixes it.
        num_classes: 0 for features. img_size: P, the side of a patch.
        dim: channels of the first stage; they double from stage to stage.
        depths, num_heads, window: blocks, heads and window side, a stage each.
        front: channels of the first two 3-D convolutions.
        mlp_ratio: hidden width of the MLP as a share of the stage's channels.
        lora: None for plain linears, or the fields of `LoRAOptions`.
        lean_mlp, mask_padding: see `SpecBlock`. clip_window: windows no larger than the stage's grid.
        band_weights: sum the bands with learned weights instead of taking their mean. The convolutions are the same for
            every band, so after a mean the network hardly knows which band it saw; K is then fixed.
        centre_skip: read the middle pixel's spectrum by 1-D convolutions (`CentreSpectrum`) and add the result to every
            token before the last norm. The patch is judged by its middle pixel, which the mean over all tokens
            otherwise dilutes; K is then fixed.
        band_stride: of the three 3-D convolutions along the bands. Above 1 it makes hundreds of raw bands affordable;
            along wavelengths, unlike along PCA components, neighbours mean something to a convolution.
        drop_rate, band_drop, drop_path_rate: dropout of tokens, of (channel, band) planes, and of block branches,
            the last rising linearly over all blocks.

    Raises:
        OptionError: stages that disagree in number, an unknown LoRA option, a patch that is too small.
    """

    def __init__(
        self,
        *,
        in_chans: int = 15,
        num_classes: int = 9,
        img_size: int = 15,
        dim: int = 96,
        depths: Sequence[int] = (3, 4, 19),
        num_heads: Sequence[int] = (4, 8, 16),
        window: Sequence[int] = (7, 7, 7),
        front: tuple[int, int] = (32, 64),
        mlp_ratio: float = 4.0,
        lora: Mapping[str, Any] | None = None,
        lean_mlp: bool = False,
        mask_padding: bool = False,
        clip_window: bool = False,
        band_weights: bool = False,
        centre_skip: bool = False,
        band_stride: tuple[int, int, int] = (1, 1, 1),
        drop_rate: float = 0.1,
        band_drop: float = 0.1,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        if not len(depths) == len(num_heads) == len(window) or not depths:
            raise OptionError(f"depths {depths}, num_heads {num_heads} and window {window} must name the same stages")
        if img_size < 4:
            raise OptionError(f"a patch needs at least 4 x 4 pixels, got img_size={img_size}")
        if lora is not None and set(lora) - set(LoRAOptions.__dataclass_fields__):
            raise OptionError(f"lora has the fields {sorted(LoRAOptions.__dataclass_fields__)}, got {sorted(lora)}")
        self.in_chans, self.side, self.num_classes = in_chans, img_size, num_classes
        self.num_features = self.head_hidden_size = dim * 2 ** (len(depths) - 1)
        self._lora = None if lora is None else LoRAOptions(**lora)
        self.spectral_conv = spectral_conv(dim, front, band_stride)
        bands = in_chans
        for stride in band_stride:
            bands = -(-bands // stride)
        self.band_dropout = BandDropout(band_drop)
        self.spectral_attention = ChannelExcite(dim)
        self.band_weights = nn.Parameter(torch.empty(dim, bands, 1, 1)) if band_weights else None
        self.patch_embed = nn.Sequential(nn.Conv2d(dim, dim, 4, 2, 1), nn.BatchNorm2d(dim), nn.SiLU())
        grid = img_size // 2
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        make = nn.Linear if self._lora is None else self._lora.linear
        self.levels = nn.ModuleList()
        for i, (depth, heads, side) in enumerate(zip(depths, num_heads, window, strict=True)):
            width, start = dim * 2**i, sum(depths[:i])
            blocks: list[nn.Module] = [
                SpecBlock(
                    width, min(side, grid) if clip_window else side, heads,
                    make=make, mlp_hidden=int(width * mlp_ratio), lean=lean_mlp, mask_padding=mask_padding, drop_path=p,
                )
                for p in rates[start : start + depth]
            ]  # fmt: skip
            last = i == len(depths) - 1
            self.levels.append(nn.Sequential(*blocks, *(() if last else (ReduceSize(width),))))
            grid = -(-grid // 2)
        self.centre: nn.Module | None = None
        self.norm = nn.LayerNorm(self.num_features)
        self.head = self._classifier(num_classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.band_weights is not None:
            nn.init.normal_(self.band_weights, std=bands**-0.5)
        if centre_skip:
            self.centre = CentreSpectrum(in_chans, self.num_features)  # keeps torch's own start

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, K, P, P) -> tokens (B, N, C), normed."""
        tokens = self._stages(self.pixels(x))[-1].permute(0, 2, 3, 1).flatten(1, 2)
        if self.centre is not None:
            tokens = tokens + self.centre(x[:, :, self.side // 2, self.side // 2])[:, None]
        return self.norm(tokens)

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, K, P, P) -> the last map and the map after each stage, all (B, C, h, w), before the last norm."""
        maps = self._stages(self.pixels(x))
        return maps[-1], maps

    def pixels(self, x: Tensor) -> Tensor:
        """(B, K, P, P) -> features of each pixel (B, dim, P, P): 3-D convolutions, squeeze-excite, sum over bands."""
        if x.ndim != 4 or tuple(x.shape[2:]) != (self.side, self.side):
            raise OptionError(f"patches must be (B, bands, {self.side}, {self.side}), got {tuple(x.shape)}")
        fixed = self.band_weights is not None or self.centre is not None
        if fixed and x.shape[1] != self.in_chans:
            raise OptionError(f"this network was built for {self.in_chans} bands, got {tuple(x.shape)}")
        x = self.spectral_attention(self.band_dropout(self.spectral_conv(x[:, None])))
        return x.mean(2) if self.band_weights is None else (x * self.band_weights).sum(2)

    def _stages(self, pixels: Tensor) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(pixels).permute(0, 2, 3, 1) + self.pos_embed)
        maps = []
        for level in self.levels:
            for layer in level:  # type: ignore[attr-defined]
                x = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if isinstance(layer, ReduceSize) else layer(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) -> logits, or the pooled (B, C)."""
        x = x.mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, P, P) -> (B, num_classes), or (B, C) without a classifier."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear; an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, or none for 0."""
        self.num_classes = num_classes
        self.head = self._classifier(num_classes).to(self.pos_embed.device)
        self.head.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """Position tables."""
        return {n for n, _ in self.named_parameters() if n == "pos_embed" or n.endswith("position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates."""
        return {
            "stem": r"^spectral_conv|^spectral_attention|^patch_embed|^pos_embed",
            "blocks": r"^levels\.(\d+)" if coarse else [(r"^levels\.(\d+)\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        make = nn.Linear if self._lora is None else self._lora.head
        return make(self.num_features, num_classes)


def spectral_conv(dim: int, front: tuple[int, int], band_stride: tuple[int, int, int] = (1, 1, 1)) -> nn.Sequential:
    """Three 3-D convolutions over (band, row, column), each with batch norm and SiLU: (B, 1, K, P, P) -> (B, dim, ...).

    Kernels 7, 5 and 3 along the bands, 3 x 3 in space; stride 1 in space and, as published, along the bands.
    """
    layers: list[nn.Module] = []
    sizes = ((1, front[0], 7), (front[0], front[1], 5), (front[1], dim, 3))
    for (inputs, outputs, bands), stride in zip(sizes, band_stride, strict=True):
        conv = nn.Conv3d(inputs, outputs, (bands, 3, 3), (stride, 1, 1), (bands // 2, 1, 1))
        layers += [conv, nn.BatchNorm3d(outputs), nn.SiLU()]
    return nn.Sequential(*layers)


def freeze_all_but_lora(model: nn.Module) -> nn.Module:
    """Train what the gated LoRA layers add, and nothing else: the authors' recipe.

    The convolutions and base linears then stay at whatever they are; running statistics of norms are for the caller's
    mode to decide.

    Raises:
        OptionError: the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, GatedLoRALinear)]
    if not layers:
        raise OptionError(f"{type(model).__name__} has no gated LoRA layer; build it with lora=dict(rank=16)")
    model.requires_grad_(False)
    for layer in layers:
        for part in layer.added():
            part.requires_grad_(True)
    return model


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict without the position index, which is computed here."""
    state = state.get("model_state_dict", state.get("state_dict", state))
    return {key: tensor for key, tensor in state.items() if not key.endswith("relative_position_index")}


def _initialise(module: nn.Module) -> None:
    # All linears alike, those inside LoRA layers too: the authors' model starts so.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(**options: Any) -> dict[str, Any]:
    first = {"first_conv": "spectral_conv.0", "classifier": "head"}
    return {"input_size": (15, 15, 15), "num_classes": 9, "url": "", "pool_size": None, **first, **options}


default_cfgs = generate_default_cfgs({"lola_specvit.untrained": _cfg(), "lola_specvit_tidy.untrained": _cfg()})


def _create(name: str, pretrained: bool, defaults: dict[str, Any], options: dict[str, Any]) -> LoLASpecViT:
    model: LoLASpecViT = build_model_with_cfg(
        LoLASpecViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**defaults, **options}
    )
    # The config's size is of the published patches; what this model takes follows from its own options.
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "input_size"}
    model.default_cfg = model.pretrained_cfg
    return model


@register_model
def lola_specvit(pretrained: bool = False, **kwargs: Any) -> LoLASpecViT:
    """LoLA-SpecViT as published: 254.6 M parameters, gated LoRA of rank 16 in every linear of its 26 blocks."""
    return _create("lola_specvit", pretrained, {"lora": {"rank": 16, "alpha": 32.0}}, kwargs)


@register_model
def lola_specvit_tidy(pretrained: bool = False, **kwargs: Any) -> LoLASpecViT:
    """LoLA-SpecViT's design without its waste: plain linears, SwiGLU of width 8/3, 1.2 M parameters."""
    tidy = {
        "dim": 64, "depths": (2, 4), "num_heads": (4, 8), "window": (7, 7), "front": (8, 16), "mlp_ratio": 8 / 3,
        "lean_mlp": True, "mask_padding": True, "clip_window": True, "band_weights": True, "centre_skip": True,
        "drop_path_rate": 0.1,
    }  # fmt: skip
    return _create("lola_specvit_tidy", pretrained, tidy, kwargs)
