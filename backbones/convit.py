"""ConViT on any image size: timm's models made free of the square grid they were built for.

Source: "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", ICML 2021, arXiv 2103.10697.
timm's `convit_tiny/small/base` have the authors' keys and equal their outputs, but run only at the size they were
built with, only on square grids, and without gradient checkpointing. `make_size_free(model)` lifts this in place:

    model = make_size_free(timm.create_model("convit_tiny", pretrained=True))
    model(torch.randn(1, 3, 160, 256))

No parameter or key changes: GPSA takes its relative positions from the given rectangle (`zoo.attention.gpsa`), the
learned position table is interpolated where the grid is another. `ConViT` is the class such a model then has.
In timm `embed_dim` is the width of ONE head.
"""

import math
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import checkpoint, convit
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.attention.gpsa import gated_attention, gated_map


class GridGPSA(convit.GPSA):
    """timm's GPSA layer (same parameters) on a grid H x W: ``(B, H*W, C)`` -> the same.

    Without ``grid_size`` the tokens must form a square. Raises ValueError if the token count does not fit.
    """

    def _heads(self, x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        if x.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"GPSA got {x.shape[1]} tokens for a grid of {grid[0]} x {grid[1]} without prefix")
        parts = (*self.qk(x).chunk(2, dim=-1), self.v(x))
        return [y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in parts]  # B h N d each

    def _grid(self, x: Tensor, grid_size: tuple[int, int] | None) -> tuple[int, int]:
        return (math.isqrt(x.shape[1]),) * 2 if grid_size is None else grid_size

    def get_attention(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The mixed attention after dropout, ``(B, heads, N, N)``."""
        grid = self._grid(x, grid_size)
        q, k, _ = self._heads(x, grid)
        return self.attn_drop(gated_map(q, k, self.pos_proj, self.gating_param, grid))

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        grid = self._grid(x, grid_size)
        q, k, v = self._heads(x, grid)
        if self.training and self.attn_drop.p > 0:
            y = self.attn_drop(gated_map(q, k, self.pos_proj, self.gating_param, grid)) @ v
        else:
            y = gated_attention(q, k, v, self.pos_proj, self.gating_param, grid)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class GridBlock(convit.Block):
    """timm's ConViT block with the grid handed on to GPSA: ``(B, N, C)`` -> the same."""

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        attn = self.attn(self.norm1(x), grid_size=grid_size) if self.use_gpsa else self.attn(self.norm1(x))
        x = x + self.drop_path(attn)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConViT(convit.ConVit):
    """ConViT for images of any size whose sides are multiples of the patch, ``(B, in_chans, H, W)`` -> logits.

    Built by `make_size_free` or like timm's class; ``local_init=False`` starts GPSA's positions and values at random
    instead of as a convolution. ``forward_features`` gives ``(B, 1 + H/p * W/p, C)``, class token first. Raises
    ValueError for an input of other channels or sides. Source: arXiv 2103.10697.
    """

    grad_checkpointing = False

    def __init__(self, *, local_init: bool = True, **options: Any) -> None:
        super().__init__(**options)
        make_size_free(self)
        if not local_init:
            for block in self.blocks:
                if block.use_gpsa:
                    trunc_normal_(block.attn.v.weight, std=0.02)
                    trunc_normal_(block.attn.pos_proj.weight, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch tokens with positions, and their grid."""
        channels = self.patch_embed.proj.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"expected images (B, {channels}, H, W), got {tuple(x.shape)}")
        height, width = x.shape[2:]
        patch = self.patch_embed.patch_size
        if height % patch[0] or width % patch[1]:
            raise ValueError(
                f"image height and width must be multiples of the patch {patch[0]} x {patch[1]}, got {height} x {width}"
            )
        grid = (height // patch[0], width // patch[1])
        x = self.patch_embed(x)
        if self.use_pos_embed:
            x = x + resize_positions(self.pos_embed, grid, self.patch_embed.grid_size)
        return self.pos_drop(x), grid

    def _block(self, index: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if index == self.local_up_to_layer and self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        block = self.blocks[index]
        return checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        x, grid = self._embed(x)
        for i in range(len(self.blocks)):
            x = self._block(i, x, grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Patch tokens after chosen blocks, ``(B, C, H/p, W/p)`` or ``(B, N, C)`` (``NLC``), as timm returns them."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        taken = []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x = self._block(i, x, grid)
            if i in take:
                y = self.norm(x) if norm else x
                taken.append(y[:, 1:] if i >= self.local_up_to_layer else y)
        if output_fmt == "NCHW":
            taken = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in taken]
        return taken if intermediates_only else (self.norm(x), taken)


def resize_positions(table: Tensor, new: tuple[int, int], old: tuple[int, int]) -> Tensor:
    """Bicubic resize of a position table ``(1, H*W, C)`` without class token."""
    return table if new == old else resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=0)


def make_size_free(model: nn.Module) -> nn.Module:
    """Let a timm ConViT, or every one inside ``model`` (a features_only wrapper), take any image size; in place.

    The classes of the model, its blocks and GPSA layers become the subclasses above, which add no state, so weights,
    hooks and modes stay. Returns ``model``. Raises TypeError if there is no ConViT with a patch embedding in it, or if
    its modules are of other classes than timm's (adapters must come afterwards).
    """
    found = [m for m in model.modules() if isinstance(m, convit.ConVit)]
    if not found or not all(isinstance(m.patch_embed, PatchEmbed) for m in found):
        raise TypeError(f"{type(model).__name__} is (or holds) no timm ConViT with a patch embedding")
    for net in found:
        net.patch_embed.strict_img_size = False
        gpsa = [block.attn for block in net.blocks if block.use_gpsa]
        for modules, theirs, ours in (
            ([net], convit.ConVit, ConViT),
            (net.blocks, convit.Block, GridBlock),
            (gpsa, convit.GPSA, GridGPSA),
        ):
            for module in modules:
                if type(module) is theirs:
                    module.__class__ = ours
                elif not isinstance(module, ours):
                    raise TypeError(
                        f"{type(module).__name__} is not timm's {theirs.__name__}: free the model's size "
                        "before anything is attached to it"
                    )
    return model


# ---- weights ----
def _variant(state: dict[str, Tensor]) -> str:
    gates = [key for key in state if key.endswith("attn.gating_param")]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    heads = len(state[gates[0]]) if gates else 0
    return f"width {state['cls_token'].shape[-1]}, {heads} heads, {depth} blocks of which {len(gates)} GPSA"


def checkpoint_filter_fn(state_dict: dict[str, Any], model: convit.ConVit) -> dict[str, Tensor]:
    """The authors' checkpoint (bare or under ``model``; timm's keys are theirs), positions resized to ``model``.

    A table of another grid is taken as square. Raises ValueError if it is not, for weights of another variant (naming
    both), or for something else than a ConViT.
    """
    state = dict(state_dict.get("model", state_dict))
    if "cls_token" not in state or "blocks.0.norm1.weight" not in state:
        raise ValueError(f"not a ConViT checkpoint: no 'cls_token' and 'blocks.0.norm1.weight', got {[*state][:3]}")
    given, expected = _variant(state), _variant(model.state_dict())
    if given != expected:
        raise ValueError(f"the checkpoint is a ConViT of {given}; the model has {expected}")
    table, rows = state.get("pos_embed"), model.patch_embed.num_patches
    if table is not None and table.shape[1] != rows:
        side = math.isqrt(table.shape[1])
        if side * side != table.shape[1]:
            raise ValueError(f"pos_embed has {table.shape[1]} rows, not a square grid, and the model has {rows}")
        state["pos_embed"] = resize_positions(table, model.patch_embed.grid_size, (side, side))
    return state
