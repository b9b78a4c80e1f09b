"""LoRAT's head: a score and a box from every cell of the search grid, its labels, losses and decoding.

Lin et al., ECCV 2024, arXiv 2403.05231, sec. 3.4. Cells are taken row by row: cell (i, j) of an (H, W) map has its
reference point at ((j + 0.5) / W, (i + 0.5) / H). Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from zoo.errors import OptionError
from zoo.registry import HEADS

EPS = 1e-6


class TrackOutput(NamedTuple):
    """score_map (B, H, W) logits; boxes (B, H, W, 4) in shares of the search crop, free to leave [0, 1]. fp32."""

    score_map: Tensor
    boxes: Tensor


class MLP(nn.Module):
    """Linear layers with GELU between them; (..., D) -> (..., out)."""

    def __init__(self, width: int, out: int, depth: int, init_std: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width if i < depth - 1 else out) for i in range(depth))
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=init_std)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


@HEADS.register_module()
class MLPAnchorFreeHead(nn.Module):
    """Two 3-layer MLPs over the search tokens: one target score and four distances to the box's sides a cell.

    Args:
        in_features: D; `JointTracker` fills it in from its backbone.
        map_size: (H, W) of the search grid; filled in likewise.
        depth: layers of each MLP.
        iou_aware: a positive cell's target score is the IoU of its own box with the truth, not 1.
        cls_weight, reg_weight: factors of the two losses.
        init_std: deviation of the first weights. 0.02 suits wide pretrained backbones; a narrow one that starts random
            learns much faster with about D ** -0.5, else three layers shrink its gradients to nothing.
        window: share of the Hann window in the choice of a cell, in [0, 1).
    """

    def __init__(
        self,
        *,
        in_features: int,
        map_size: Sequence[int],
        depth: int = 3,
        iou_aware: bool = True,
        cls_weight: float = 1.0,
        reg_weight: float = 1.0,
        init_std: float = 0.02,
        window: float = 0.45,
    ) -> None:
        super().__init__()
        if len(map_size) != 2 or min(map_size) < 1 or depth < 1:
            raise OptionError(f"map_size is (H, W) and depth at least 1, got map_size={map_size}, depth={depth}")
        if not 0 <= window < 1:
            raise OptionError(f"window must lie in [0, 1), got {window}")
        self.map_size = (int(map_size[0]), int(map_size[1]))
        self.iou_aware, self.cls_weight, self.reg_weight, self.window = iou_aware, cls_weight, reg_weight, window
        self.depth = depth
        self.cls_mlp = MLP(in_features, 1, depth, init_std)
        self.reg_mlp = MLP(in_features, 4, depth, init_std)
        self.register_buffer("points", reference_points(self.map_size), persistent=False)

    def no_weight_decay(self) -> set[str]:
        """The last score layer is one row, a vector in all but shape."""
        return {f"cls_mlp.layers.{self.depth - 1}.weight"}

    def forward(self, tokens: Tensor) -> TrackOutput:
        """(B, H*W, D) -> `TrackOutput`."""
        height, width = self.map_size
        if tokens.ndim != 3 or tokens.shape[1] != height * width:
            raise OptionError(f"expected (B, {height * width}, D) search tokens, got {tuple(tokens.shape)}")
        scores = self.cls_mlp(tokens).float().reshape(-1, height, width)
        sides = self.reg_mlp(tokens).float().sigmoid().reshape(-1, height, width, 4)
        points: Tensor = self.points  # type: ignore[assignment]
        return TrackOutput(scores, torch.cat((points - sides[..., :2], points + sides[..., 2:]), -1))

    def loss(self, outputs: TrackOutput, data_samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Outputs and B samples with `box` (4,), in shares of the search crop -> `loss_cls`, `loss_reg`.

        Raises:
            OptionError: a sample without a box, or a box without extent inside the crop.
        """
        absent = [i for i, sample in enumerate(data_samples) if "box" not in sample]
        if absent or len(data_samples) != len(outputs.boxes):
            raise OptionError(f"{len(outputs.boxes)} outputs need as many samples with a `box`; without: {absent}")
        boxes = torch.stack([torch.as_tensor(sample["box"], dtype=torch.float64) for sample in data_samples])
        boxes = boxes.clamp(0, 1).to(outputs.boxes.device)
        flat = ((boxes[:, 2:] - boxes[:, :2]) <= 0).any(1).nonzero().flatten().tolist()
        if flat:
            raise OptionError(f"sample {flat[0]} has no extent inside its search crop: {boxes[flat[0]].tolist()}")
        cls, reg = tracking_losses(outputs, boxes, iou_aware=self.iou_aware)
        return {"loss_cls": self.cls_weight * cls, "loss_reg": self.reg_weight * reg}

    def predict(self, outputs: TrackOutput, data_samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Outputs -> B dicts: `box` (4,) fp32 on the CPU in shares of the search crop, its `score`."""
        boxes, scores = decode(outputs, self.window)
        return [{"box": box, "score": score} for box, score in zip(boxes.cpu(), scores.tolist(), strict=True)]


def reference_points(map_size: Sequence[int]) -> Tensor:
    """(H, W, 2): x, y of every cell's centre in shares of the map."""
    height, width = map_size
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def covered_cells(boxes: Tensor, map_size: Sequence[int]) -> Tensor:
    """Cells that boxes touch: floor of the near sides, floor(v + 1 - 1e-4) of the far ones, cut to the map.

    boxes: (B, 4) in cells. Returns (B, H, W) bool. A box of any size inside the map covers at least one cell.
    """
    height, width = map_size
    low, high = boxes[:, :2].floor(), (boxes[:, 2:] + 1 - 1e-4).floor()
    x, y = (torch.arange(n, device=boxes.device) for n in (width, height))
    columns = (x >= low[:, :1]) & (x < high[:, :1])
    rows = (y >= low[:, 1:]) & (y < high[:, 1:])
    return rows[:, :, None] & columns[:, None]


def tracking_losses(outputs: TrackOutput, boxes: Tensor, *, iou_aware: bool = True) -> tuple[Tensor, Tensor]:
    """Score and box loss, both divided by the number of positive cells (mean over processes, at least 1).

    boxes: (B, 4) truth in shares of the crop. The score loss is binary cross-entropy over all cells, towards the IoU
    of the cell's own box at positive cells (1 if not iou_aware) and 0 elsewhere; the box loss is 1 - GIoU there.
    """
    height, width = outputs.score_map.shape[1:]
    cells = boxes * boxes.new_tensor([width, height, width, height])
    positive = covered_cells(cells, (height, width))
    batch = positive.nonzero(as_tuple=True)[0]
    number = positive.sum().float()
    if get_world_size() > 1:
        all_reduce(number, "mean")
    number = number.clamp(min=1)
    iou, giou = box_overlaps(outputs.boxes[positive], boxes.to(outputs.boxes.dtype)[batch])
    target = torch.zeros_like(outputs.score_map)
    target[positive] = iou.detach() if iou_aware else 1.0
    cls = F.binary_cross_entropy_with_logits(outputs.score_map, target, reduction="sum")
    return cls / number, (1 - giou).sum() / number


def box_overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (Rezatofighi et al. 2019, arXiv 1902.09630) of pairs (N, 4), areas clamped at 1e-6."""
    inner = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    union = (area_a + area_b - inner).clamp(min=EPS)
    hull = (torch.max(a[:, 2:], b[:, 2:]) - torch.min(a[:, :2], b[:, :2])).prod(1).clamp(min=EPS)
    iou = inner / union
    return iou, iou - (hull - union) / hull


def hann_window(map_size: Sequence[int]) -> Tensor:
    """(H, W): outer product of symmetric Hann windows, zero at the border."""
    rows, columns = (torch.hann_window(n, periodic=False) for n in map_size)
    return rows[:, None] * columns


def decode(outputs: TrackOutput, window: float) -> tuple[Tensor, Tensor]:
    """The box (B, 4) of the cell where (1 - window) * score + window * Hann is largest, and its plain score (B,)."""
    score = outputs.score_map.sigmoid().flatten(1)
    hann = hann_window(outputs.score_map.shape[1:]).to(score).flatten()
    best = ((1 - window) * score + window * hann).argmax(1)
    rows = torch.arange(len(best), device=best.device)
    return outputs.boxes.flatten(1, 2)[rows, best], score[rows, best]
