"""Cross-modal bridges: text enters the blocks of a CLIP image tower between attention and feed-forward part.

Source: Xiao et al. 2024, "HiVG", ACM MM 2024, arXiv 2404.13400, and its released code (multi-layer adaptive cross-modal
bridge). A bridge is no attachable adapter: it needs the text and changes the block's residual in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import OptionError, SiteError


class CrossAttention(nn.Module):
    """Multi-head attention with separate projections, q (B, N, C) over keys and values (B, S, C), without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise OptionError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        y: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class BridgeMlp(nn.Module):
    """fc2(quick_gelu(fc1 x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        y: Tensor = self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return y


class CrossModalBridge(nn.Module):
    """x <- x + MLP(CrossAttn(LN(x), gate(concat_i (t_i + w_i * t_i)))); not the identity at first.

    Args:
        width: C of the image tokens (B, N, C). text_width: of the text levels (B, length, C). heads: of the attention.
        levels: how many hidden states of the text tower enter. length: of the text; w_i is a table (length, C).
        hidden: width of the MLP, 4C by default.
        legacy_batch_mix: the released code reads (length, B, C) as (B, length, C), so that texts of a batch mix, and
            its checkpoints were trained so. True repeats that; outputs then depend on the rest of the batch.

    Raises:
        OptionError: heads that do not divide the width, levels below 1.
    """

    def __init__(
        self,
        width: int,
        text_width: int,
        *,
        heads: int,
        levels: int = 1,
        length: int = 77,
        hidden: int | None = None,
        legacy_batch_mix: bool = False,
    ) -> None:
        super().__init__()
        if levels < 1:
            raise OptionError(f"a bridge needs at least one text level, got {levels}")
        self.legacy_batch_mix = legacy_batch_mix
        self.norm = nn.LayerNorm(width)
        self.tables = nn.ParameterList(torch.randn(length, text_width) for _ in range(levels))
        self.gate = nn.Linear(text_width * levels, width)
        self.attn = CrossAttention(width, heads)
        self.mlp = BridgeMlp(width, hidden or 4 * width)

    def forward(self, x: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """Raises `OptionError` for another number of text levels, or texts of another length."""
        if len(texts) != len(self.tables) or texts[0].shape[1] != len(self.tables[0]):
            wanted = f"{len(self.tables)} text levels of {len(self.tables[0])} tokens"
            raise OptionError(f"the bridge takes {wanted}, got {[tuple(text.shape) for text in texts]}")
        weighted = [text + table * text for text, table in zip(texts, self.tables, strict=True)]
        context = self.gate(torch.cat(weighted, -1))
        if self.legacy_batch_mix:
            context = context.transpose(0, 1).reshape(context.shape)
        y: Tensor = x + self.mlp(self.attn(self.norm(x), context))
        return y


class BridgedTower(nn.Module):
    """An open_clip image transformer whose blocks `bridges` take text in: (images, texts) -> all hidden states.

    Args:
        visual: an open_clip `VisionTransformer` of plain residual blocks. bridges: block index -> bridge.

    Raises:
        SiteError: a block that does not exist.
    """

    def __init__(self, visual: nn.Module, bridges: Mapping[int, CrossModalBridge]) -> None:
        super().__init__()
        self.visual = visual
        count = len(visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
        wrong = [index for index in bridges if not 0 <= index < count]
        if wrong:
            raise SiteError(f"the tower has blocks 0 ... {count - 1}; there is no place for a bridge at {wrong[0]}")
        self.bridges = nn.ModuleDict({str(index): bridge for index, bridge in bridges.items()})

    def forward(self, images: Tensor, texts: Sequence[Tensor]) -> list[Tensor]:
        """(B, 3, H, W) and one (B, L, C) a level -> L + 1 states (B, 1 + h*w, C); the last without the final norm."""
        visual: Any = self.visual
        patches = visual.conv1(images)
        token = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        positions = resized_positions(visual.positional_embedding, (patches.shape[2], patches.shape[3]))
        x = visual.ln_pre(torch.cat([token, patches.flatten(2).transpose(1, 2)], 1) + positions.to(patches.dtype))
        states = [x]
        for i, block in enumerate(visual.transformer.resblocks):
            x = x + block.ls_1(block.attention(block.ln_1(x)))
            if str(i) in self.bridges:
                x = self.bridges[str(i)](x, texts)
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
            states.append(x)
        return states


def resized_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A square table (1 + s*s, C) for the grid (h, w), by antialiased bicubic interpolation."""
    side = round((len(table) - 1) ** 0.5)
    if grid == (side, side):
        return table
    maps = table[1:].T.reshape(1, -1, side, side)
    resized = F.interpolate(maps, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], resized[0].flatten(1).T])
