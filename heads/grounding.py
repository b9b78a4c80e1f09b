"""Visual grounding: a transformer over visual and text tokens, a box from its [REG] token, and HiVG's losses.

Sources: Xiao et al. 2024, "HiVG", arXiv 2404.13400, and its released code; Carion et al. 2020, "DETR" (the encoder);
Rezatofighi et al. 2019 (GIoU); Lin et al. 2017 (focal loss); Milletari et al. 2016 (dice).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from zoo.errors import OptionError


class _EncoderLayer(nn.Module):
    """Positions are added to queries and keys, not to values."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
        y = self.norm1(x) if self.pre_norm else x
        placed = y + positions
        attended = self.self_attn(placed, placed, y, key_padding_mask=padding, need_weights=False)[0]
        x = x + self.dropout(attended)
        x = x if self.pre_norm else self.norm1(x)
        y = self.norm2(x) if self.pre_norm else x
        x = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(y)))))
        return x if self.pre_norm else self.norm2(x)


class GroundingEncoder(nn.Module):
    """(tokens, positions, padding) -> (box, tokens): DETR's encoder, and a 3-layer MLP on the first token.

    tokens, positions: (B, N, C), [REG] first; padding: (B, N) bool, True where a token is to be ignored. box: (B, 4) as
    (cx, cy, w, h) in [0, 1].

    Raises:
        OptionError: heads that do not divide the width.
    """

    def __init__(
        self,
        width: int = 512,
        *,
        heads: int = 8,
        hidden: int = 2048,
        layers: int = 6,
        dropout: float = 0.1,
        pre_norm: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise OptionError(f"heads must divide the width {width}, got {heads}")
        self.layers = nn.ModuleList(_EncoderLayer(width, heads, hidden, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if pre_norm else None
        self.box = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, tokens: Tensor, positions: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            tokens = layer(tokens, positions, padding)
        tokens = tokens if self.norm is None else self.norm(tokens)
        x = tokens[:, 0]
        for layer in list(self.box)[:-1]:
            x = F.relu(layer(x))
        return self.box[-1](x).sigmoid(), tokens


def grounding_losses(
    boxes: Tensor,
    target: Tensor,
    logits_per_text: Tensor | None = None,
    patch_logits: Tensor | None = None,
    mask_logits: Tensor | None = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """HiVG's losses, weights included; sums over the batch divided by its size.

    boxes, target: (B, 4) as (cx, cy, w, h). logits_per_text: (B, B). patch_logits: (B, h*w) of a square grid;
    mask_logits: (B, 1, H', W'); mask: (B, 1, H, W), the target's box area or its mask. What is not given has no term.

    Raises:
        OptionError: patch or mask logits without a mask.
    """
    batch = len(boxes)
    corners = [box_convert(b, "cxcywh", "xyxy") for b in (boxes, target)]
    losses = {
        "loss_bbox": 2 * (boxes - target).abs().sum() / batch,
        "loss_giou": 2 * generalized_box_iou_loss(corners[0], corners[1], reduction="sum") / batch,
    }
    if logits_per_text is not None:
        labels = torch.arange(batch, device=boxes.device)
        both = (F.cross_entropy(logits_per_text, labels), F.cross_entropy(logits_per_text.T, labels))
        losses["loss_contrastive"] = (both[0] + both[1]) / 2
    if mask is None:
        if patch_logits is not None or mask_logits is not None:
            raise OptionError("patch_logits and mask_logits need the target as `mask`")
        return losses
    if patch_logits is not None:
        side = round(patch_logits.shape[1] ** 0.5)
        patches = F.interpolate(mask, (side, side), mode="nearest")
        losses["loss_align_focal"], losses["loss_align_dice"] = _area_losses(patch_logits, patches)
    if mask_logits is not None:
        resized = F.interpolate(mask_logits, mask.shape[2:], mode="bilinear", align_corners=False)
        losses["loss_seg_focal"], losses["loss_seg_dice"] = _area_losses(resized, mask)
    return losses


def _area_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits, target = logits.flatten(1), target.flatten(1).to(logits.dtype)
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2).mean(1).mean()
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    return 20 * focal, 2 * dice.mean()
