"""CLIPSeg: a light decoder that turns activations of a frozen CLIP and a text feature into a mask.

Source: Lüddecke and Ecker 2022, "Image Segmentation Using Text and Image Prompts", CVPR 2022, arXiv 2112.10003, and the
refined decoder (`clipseg-rd64-refined`), whose weights `from_transformers` renames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import CheckpointError, OptionError


class _DecoderLayer(nn.Module):
    """Attention and feed-forward part, each followed by its norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))  # type: ignore[no-any-return]


class CLIPSegDecoder(nn.Module):
    """Activations of CLIP blocks, deepest first, summed into a thin transformer; the text scales and shifts the first.

    Args:
        vision_width: C of the activations (B, 1 + h*w, C), class token first. projection: C of the condition (B, C).
        levels: number of activations. width, heads, hidden: of the decoder's layers.
        patch: size of a patch in pixels, which is undone.
        conditional_layer: before which layer the condition enters.
        refined: two transposed convolutions behind a 3x3 one, instead of a single one.

    Raises:
        OptionError: a patch that the refined upsampling cannot undo, or a conditional layer that does not exist.
    """

    def __init__(
        self,
        *,
        vision_width: int = 768,
        projection: int = 512,
        levels: int = 3,
        width: int = 64,
        heads: int = 4,
        hidden: int = 2048,
        patch: int = 16,
        conditional_layer: int = 0,
        refined: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= conditional_layer < levels:
            raise OptionError(f"conditional_layer must be one of 0 ... {levels - 1}, got {conditional_layer}")
        if refined and patch != 16:
            raise OptionError(f"the refined decoder undoes patches of 16 in two steps of 4, not of {patch}")
        self.conditional_layer = conditional_layer
        self.film_mul = nn.Linear(projection, width)
        self.film_add = nn.Linear(projection, width)
        self.reduces = nn.ModuleList(nn.Linear(vision_width, width) for _ in range(levels))
        self.layers = nn.ModuleList(_DecoderLayer(width, heads, hidden) for _ in range(levels))
        self.transposed_convolution: nn.Module = nn.ConvTranspose2d(width, 1, patch, patch)
        if refined:
            self.transposed_convolution = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(width, width // 2, 4, 4),
                nn.ReLU(),
                nn.ConvTranspose2d(width // 2, 1, 4, 4),
            )

    def forward(self, activations: Sequence[Tensor], condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """Activations, shallowest first, (B, 1 + h*w, C) each, condition (B, C), grid (h, w) -> logits (B, 1, H, W).

        Raises:
            OptionError: another number of activations, or of tokens than the grid has.
        """
        if len(activations) != len(self.layers):
            raise OptionError(f"the decoder takes {len(self.layers)} activations, got {len(activations)}")
        if activations[0].shape[1] != 1 + grid[0] * grid[1]:
            raise OptionError(f"{activations[0].shape[1]} tokens are not a class token and a grid of {grid}")
        x: Tensor | None = None
        for i, activation in enumerate(reversed(activations)):
            reduced = self.reduces[i](activation)
            x = reduced if x is None else reduced + x
            if i == self.conditional_layer:
                x = self.film_mul(condition)[:, None] * x + self.film_add(condition)[:, None]
            x = self.layers[i](x)
        assert x is not None
        maps = x[:, 1:].transpose(1, 2).reshape(len(x), -1, *grid)
        logits: Tensor = self.transposed_convolution(maps)
        return logits


class CLIPSeg(nn.Module):
    """(images, token ids) -> mask logits: an open_clip CLIP, `CLIPSegDecoder`, and what may sit between them.

    Towers and decoder are frozen; adapters attach to `clip` before or after, a `neck` trains.

    Args:
        clip: an open_clip CLIP with transformer towers. extract: the blocks whose outputs are decoded.
        decoder: takes as many activations.
        neck: (activations, condition, text levels) -> (activations, condition), such as `VLSMNeck`.
    """

    def __init__(
        self,
        clip: nn.Module,
        decoder: CLIPSegDecoder,
        neck: nn.Module | None = None,
        *,
        extract: Sequence[int] = (3, 6, 9),
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.decoder = decoder.requires_grad_(False)
        self.neck = neck
        self.extract = tuple(extract)

    def visual_activations(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """(B, 3, H, W) -> raw block outputs (B, 1 + h*w, C) and the grid (h, w); positions are interpolated."""
        visual: Any = self.clip.visual
        patches = visual.conv1(images)
        grid = (patches.shape[2], patches.shape[3])
        token = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        x = torch.cat([token, patches.flatten(2).transpose(1, 2)], 1) + self._positions(grid).to(patches.dtype)
        x = visual.ln_pre(x)
        found = []
        for i, block in enumerate(visual.transformer.resblocks[: max(self.extract) + 1]):
            x = block(x)
            if i in self.extract:
                found.append(x)
        return found, grid

    def text_features(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, L) token ids -> projected feature (B, P) and the raw end-of-text tokens (B, C) of the extracted blocks.

        Padding behind the end of text, the largest id, needs no mask: the attention is causal.
        """
        clip: Any = self.clip
        length = ids.shape[1]
        x = clip.token_embedding(ids) + clip.positional_embedding[:length]
        end = (torch.arange(len(ids), device=ids.device), ids.argmax(-1))
        levels = []
        for i, block in enumerate(clip.transformer.resblocks):
            x = block(x, attn_mask=clip.attn_mask[:length, :length])
            if i in self.extract:
                levels.append(x[end])
        return clip.ln_final(x)[end] @ clip.text_projection, levels

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """(B, 3, H, W) and (B, L) -> logits (B, 1, H, W)."""
        activations, grid = self.visual_activations(images)
        condition, levels = self.text_features(ids)
        if self.neck is not None:
            activations, condition = self.neck(activations, condition, levels)
        logits: Tensor = self.decoder(activations, condition, grid)
        return logits

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        table: Tensor = self.clip.visual.positional_embedding  # type: ignore[union-attr, assignment]
        side = round((len(table) - 1) ** 0.5)
        if grid == (side, side):
            return table
        maps = table[1:].T.reshape(1, -1, side, side)
        resized = F.interpolate(maps, grid, mode="bicubic", align_corners=False)
        return torch.cat([table[:1], resized[0].flatten(1).T])


def dice_ce(
    logits: Tensor, target: Tensor, *, dice: float = 1.5, ce: float = 1.0, double_sigmoid: bool = False
) -> Tensor:
    """dice * soft Dice + ce * binary cross-entropy; logits and target (B, 1, H, W), target in {0, 1}.

    double_sigmoid: VLSM-Adapter's released training hands probabilities to a cross-entropy that applies the sigmoid
    again; True repeats that.
    """
    target = target.to(logits.dtype)
    probability = logits.sigmoid()
    overlap = (probability * target).sum((2, 3))
    total = probability.sum((2, 3)) + target.sum((2, 3))
    soft = 1 - (2 * overlap + 1e-5) / (total + 1e-5)
    cross = F.binary_cross_entropy_with_logits(probability if double_sigmoid else logits, target)
    return dice * soft.mean() + ce * cross


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of transformers' CLIPSegForImageSegmentation to those of `CLIPSeg`.

    Raises:
        CheckpointError: a tensor of no known place.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("position_ids") or re.search(r"\.[kv]_proj\.", name):
            continue  # the keys and values follow the queries
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"])
        new = name
        for pattern, text in _RENAMED:
            new = re.sub(pattern, text, new)
        if new == name and not name.startswith("decoder.") and name != "clip.logit_scale":
            raise CheckpointError(f"{name!r} is no tensor of transformers' CLIPSegForImageSegmentation")
        made[new] = tensor.T if re.fullmatch(r"clip\.(text|visual)_projection\.weight", name) else tensor
    return made


_RENAMED = (
    (r"self_attn\.q_proj\.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"^decoder(.*)layer_norm", r"decoder\1norm"),
    (r"^decoder(.*)mlp\.fc1", r"decoder\1mlp.0"),
    (r"^decoder(.*)mlp\.fc2", r"decoder\1mlp.2"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^clip\.text_model\.embeddings\.token_embedding", "clip.token_embedding"),
    (r"^clip\.text_model\.embeddings\.position_embedding\.weight", "clip.positional_embedding"),
    (r"^clip\.text_model\.final_layer_norm", "clip.ln_final"),
    (r"^clip\.text_model\.encoder\.layers", "clip.transformer.resblocks"),
    (r"^clip\.vision_model\.embeddings\.class_embedding", "clip.visual.class_embedding"),
    (r"^clip\.vision_model\.embeddings\.patch_embedding", "clip.visual.conv1"),
    (r"^clip\.vision_model\.embeddings\.position_embedding\.weight", "clip.visual.positional_embedding"),
    (r"^clip\.vision_model\.pre_layrnorm", "clip.visual.ln_pre"),
    (r"^clip\.vision_model\.post_layernorm", "clip.visual.ln_post"),
    (r"^clip\.vision_model\.encoder\.layers", "clip.visual.transformer.resblocks"),
    (r"^clip\.text_projection\.weight", "clip.text_projection"),
    (r"^clip\.visual_projection\.weight", "clip.visual.proj"),
)
