"""iLLaMA: a LLaMA decoder as an image backbone (tiny, small, base, large), registered with timm.

Source: "Adapting LLaMA Decoder to Vision Transformer", arXiv 2404.06773 (2024). The formulas come from the paper; the
parameter names follow the authors' checkpoints so those load.

What differs from a ViT:

* The class token comes AFTER the patch tokens. ``num_prefix_tokens`` is therefore 0 and ``suffix_tokens`` is 1:
  patch tokens are ``x[:, :-model.suffix_tokens]`` and the class token is ``x[:, -1]``.
* The mask multiplies the attention weights after the softmax and rows are not renormalised (Eq. 2). Its rate is 1 for
  bidirectional and 0 for causal attention; it is a buffer of every attention layer, so checkpoints carry it.
* Positions enter twice: a learned table over all tokens, and 1-D rotary embedding over the token index in each layer.
* RMSNorm, SwiGLU without biases, qkv and proj with biases.
"""

from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size  # timm's own record of the input size
from torch import Tensor, nn

from backbones.illama_layers import Block, RMSNorm, SoftMaskedAttention

GLOBAL_POOLS = ("token", "avg", "")


def resample_pos_embed(pos_embed: Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
    """Bicubic resize of a position table ``(1, H*W + 1, D)`` whose LAST row is the class token's, which is kept."""
    grid, last = pos_embed[:, :-1], pos_embed[:, -1:]
    # No antialias: the authors' checkpoints were fine-tuned from tables resized without it.
    grid = resample_abs_pos_embed(grid, list(new_grid), list(old_grid), num_prefix_tokens=0, antialias=False)
    return torch.cat((grid, last), dim=1)


class ILLaMA(nn.Module):
    """iLLaMA backbone and classifier, ``(B, in_chans, H, W)`` -> ``(B, num_classes)``, with timm's model protocol.

    ``forward_features`` returns ``(B, H/p * W/p + 1, D)``: patch tokens in row order, then the class token.
    ``global_pool``: ``"token"`` (class token), ``"avg"`` (mean of the patch tokens) or ``""`` (all tokens).
    ``drop_rate`` acts after the position table, as in the paper. With ``dynamic_img_size`` any input whose sides are
    multiples of the patch is taken and positions are interpolated. Raises ValueError for an input of other channels or
    size. Source: arXiv 2404.06773.
    """

    num_prefix_tokens = 0
    suffix_tokens = 1  # the class token is last

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = _known_pool(global_pool)
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        _check_divisible(to_2tuple(img_size), to_2tuple(patch_size))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=not dynamic_img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates))
        self.norm: nn.Module = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.feat_ratio()}
            for i in range(depth)
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal (0.02) for linears, class token and positions; zero biases; causal mask."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, SoftMaskedAttention):
                module.soft_mask_rate.zero_()

    # ---- soft mask ----
    def _soft_masked_layers(self) -> list[SoftMaskedAttention]:
        layers = [m for m in self.modules() if isinstance(m, SoftMaskedAttention)]
        if not layers:
            raise ValueError("no block has a SoftMaskedAttention left (all replaced?), so there is no soft-mask rate")
        return layers

    @property
    def soft_mask_rate(self) -> float:
        """Current soft-mask rate: 1 is bidirectional, 0 causal."""
        return self._soft_masked_layers()[0].soft_mask_rate.item()

    def set_soft_mask_rate(self, rate: float) -> None:
        """Set the soft-mask rate of every layer, for training and inference alike; leave it at 0 after training.

        Raises ValueError outside [0, 1], or if no layer has a soft mask.
        """
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"soft-mask rate is {rate}; it must lie in [0, 1] (1 = bidirectional, 0 = causal)")
        for layer in self._soft_masked_layers():
            layer.soft_mask_rate.fill_(rate)

    # ---- timm protocol: parameters ----
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regexes for layer-wise learning-rate decay; ``coarse`` changes nothing, as in timm's ViT."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a new head (``num_classes`` 0: none) on the model's device and dtype, and optionally another pool."""
        if global_pool is not None:
            self.global_pool = _known_pool(global_pool)
        self.num_classes = num_classes
        like = self.pos_embed
        head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype) if num_classes > 0 else None
        if head is not None:
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = nn.Identity() if head is None else head.train(self.training)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the expected input and/or patch size in place; the position table (and patch kernel) is resampled."""
        embed = self.patch_embed
        new_img, new_patch = to_2tuple(img_size or embed.img_size), to_2tuple(patch_size or embed.patch_size)
        _check_divisible(new_img, new_patch)
        old_grid = embed.grid_size
        embed.set_input_size(img_size=new_img, patch_size=new_patch)
        if embed.grid_size != old_grid:
            table = resample_pos_embed(self.pos_embed.detach(), embed.grid_size, old_grid)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = embed.feat_ratio()
        update_model_input_size(self, new_img, patch_size=patch_size)

    # ---- forward ----
    def _embed(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, N + 1, D)``: patches, then the class token, plus positions."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected an input of shape (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        size, expected = (x.shape[2], x.shape[3]), self.patch_embed.img_size
        if self.dynamic_img_size:
            _check_divisible(size, self.patch_embed.patch_size)
        elif size != expected:
            raise ValueError(
                f"expected an input of height {expected[0]} and width {expected[1]}, got {size[0]} and "
                f"{size[1]}; build with img_size={size} or dynamic_img_size=True, or call set_input_size"
            )
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size(size)
            pos_embed = resample_pos_embed(pos_embed, grid, self.patch_embed.grid_size)
        patches = self.patch_embed(x)
        tokens = torch.cat((patches, self.cls_token.to(patches.dtype).expand(len(x), -1, -1)), dim=1)
        return self.pos_drop(tokens + pos_embed)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> normalised tokens ``(B, N + 1, D)``, class token last."""
        x = self._embed(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``(B, N + 1, D)`` -> logits ``(B, num_classes)``, or pooled features with ``pre_logits``."""
        if self.global_pool == "token":
            x = x[:, -1]
        elif self.global_pool == "avg":
            x = x[:, : -self.suffix_tokens].mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of chosen blocks, as timm's ViT returns them: ``(final tokens, list)`` or only the list.

        Each is ``(B, D, H/p, W/p)`` or ``(B, N, D)`` (``NLC``) without the class token; ``return_prefix_tokens`` makes
        it a pair with the non-patch tokens ``(B, 1, D)``, which here come from the end. ``indices``: last n blocks,
        a list, or None for all. ``stop_early`` skips the blocks after the last one asked for.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        height, width = x.shape[-2:]
        x = self._embed(x)
        taken = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in take:
                taken.append(self.norm(x) if norm else x)
        features: list[Any] = [y[:, : -self.suffix_tokens] for y in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            features = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in features]
        if return_prefix_tokens:
            features = list(zip(features, (y[:, -self.suffix_tokens :] for y in taken), strict=True))
        return features if intermediates_only else (self.norm(x), features)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks after the last one in ``indices`` (and norm, head); returns the absolute indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _known_pool(global_pool: str) -> str:
    if global_pool not in GLOBAL_POOLS:
        raise ValueError(f"global_pool is {global_pool!r}; it must be one of {GLOBAL_POOLS}")
    return global_pool


def _check_divisible(size: tuple[int, int], patch: tuple[int, int]) -> None:
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(
            f"image height and width must be multiples of the patch {patch[0]} x {patch[1]}, got {size[0]} x {size[1]}"
        )


# ---- weights ----
def select_weights(source: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Shrink a tensor by taking evenly spaced entries along each axis (weight selection, used with LLaMA weights).

    A whole step where the size divides, else ``round(linspace(0, n - 1, k))``. Raises ValueError if ``shape`` has
    another rank or a larger side than ``source``.
    """
    if len(shape) != source.ndim or any(k > n for k, n in zip(shape, source.shape, strict=True)):
        raise ValueError(f"cannot select {shape} out of {tuple(source.shape)}")
    for axis, (n, k) in enumerate(zip(source.shape, shape, strict=True)):
        picked = torch.arange(k) * (n // k) if n % k == 0 else torch.linspace(0, n - 1, k).round().long()
        source = source.index_select(axis, picked.to(source.device))
    return source


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ILLaMA) -> dict[str, Tensor]:
    """The authors' checkpoint (weights under ``model``) or our own state dict, made to fit ``model``.

    The authors store no mask rate (their finished models are causal), so 0 is put in; a position table of another
    grid, taken as square, is resized. Raises ValueError if such a table is not square.
    """
    state = dict(state_dict.get("model", state_dict))
    for name, buffer in model.named_buffers():
        if name.endswith("soft_mask_rate"):
            state.setdefault(name, torch.zeros_like(buffer))
    table = state.get("pos_embed")
    if table is not None and table.shape[1] != model.pos_embed.shape[1]:
        side = round((table.shape[1] - 1) ** 0.5)
        if side * side != table.shape[1] - 1:
            raise ValueError(
                f"pos_embed has {table.shape[1] - 1} patch rows, not a square grid, and the model "
                f"has {model.pos_embed.shape[1] - 1}: it cannot be resized"
            )
        state["pos_embed"] = resample_pos_embed(table, model.patch_embed.grid_size, (side, side))
    return state


def _cfg(file: str, size: int = 224) -> dict[str, Any]:
    # Above 224 the authors evaluate on the whole resized image without a crop.
    return {
        "hf_hub_id": "techmonsterwang/iLLaMA",
        "hf_hub_filename": f"illama-{file}.pth",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": 0.875 if size == 224 else 1.0,
        "crop_mode": "center" if size == 224 else "squash",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2404.06773",
        "origin_url": "https://github.com/techmonsterwang/iLLaMA",
    }


default_cfgs = generate_default_cfgs(
    {
        "illama_tiny.in1k": _cfg("tiny-in1k-75.0"),
        "illama_small.in1k": _cfg("small-in1k-79.9"),
        "illama_base.in1k": _cfg("base-in1k-81.6"),
        "illama_base.in1k_384": _cfg("base-in1k-384-83.0", 384),
        "illama_base.in21k_ft_in1k": _cfg("base-in21kin1k-224-83.6"),
        "illama_base.in21k_ft_in1k_384": _cfg("base-in21kin1k-384-85.0", 384),
        "illama_large.in21k_ft_in1k": _cfg("large-in21kin1k-224-84.8"),
        "illama_large.in21k_ft_in1k_384": _cfg("large-in21kin1k-384-86.0", 384),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> ILLaMA:
    return build_model_with_cfg(
        ILLaMA,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


@timm.models.register_model
def illama_tiny(pretrained: bool = False, **kwargs: Any) -> ILLaMA:
    """iLLaMA-T: width 192, 12 blocks, 3 heads, 5.7 M parameters."""
    return _create("illama_tiny", pretrained, {"embed_dim": 192, "depth": 12, "num_heads": 3} | kwargs)


@timm.models.register_model
def illama_small(pretrained: bool = False, **kwargs: Any) -> ILLaMA:
    """iLLaMA-S: width 384, 12 blocks, 6 heads, 22.0 M parameters."""
    return _create("illama_small", pretrained, {"embed_dim": 384, "depth": 12, "num_heads": 6} | kwargs)


@timm.models.register_model
def illama_base(pretrained: bool = False, **kwargs: Any) -> ILLaMA:
    """iLLaMA-B: width 768, 12 blocks, 12 heads, 86.5 M parameters."""
    return _create("illama_base", pretrained, {"embed_dim": 768, "depth": 12, "num_heads": 12} | kwargs)


@timm.models.register_model
def illama_large(pretrained: bool = False, **kwargs: Any) -> ILLaMA:
    """iLLaMA-L: width 1024, 24 blocks, 16 heads, 310.4 M parameters."""
    return _create("illama_large", pretrained, {"embed_dim": 1024, "depth": 24, "num_heads": 16} | kwargs)
