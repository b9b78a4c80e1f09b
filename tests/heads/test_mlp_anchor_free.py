"""The anchor-free head: goldens from the authors' code (LitingLin/LoRAT), labels, losses, decoding, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heads.mlp_anchor_free import (
    MLPAnchorFreeHead,
    TrackOutput,
    box_overlaps,
    covered_cells,
    decode,
    hann_window,
    tracking_losses,
)
from zoo.errors import OptionError

GOLDEN = Path(__file__).parents[1] / "golden" / "lorat"
PIXELS = torch.tensor([112.0, 84, 112, 84], dtype=torch.float64)  # search crop of labels_and_loss: 8 x 6 cells of 14


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def test_golden_forward_and_gradients() -> None:
    t = golden("mlp_head")
    width, height = json.loads((GOLDEN / "mlp_head.json").read_text())["config"]["map_size_WH"]
    head = MLPAnchorFreeHead(in_features=20, map_size=(height, width))
    head.load_state_dict(params(t))
    x = t["in.x"].clone().requires_grad_()
    out = head(x)
    close(out.score_map, t["out.score_map"])
    close(out.boxes, t["out.boxes"])
    close(head.points, t["out.bbox_offset"])
    ((out.score_map * t["in.grad_score_map"]).sum() + (out.boxes * t["in.grad_boxes"]).sum()).backward()
    close(x.grad, t["grad.x"])
    for name, parameter in head.named_parameters():
        close(parameter.grad, t[f"grad.param.{name}"])


def test_golden_positive_cells() -> None:
    t = golden("labels_and_loss")
    boxes = t["in.boxes_xyxy_px"].double() / PIXELS
    close(boxes.float(), t["out.gt_boxes_norm"], 1e-6)
    batch, row, column = covered_cells(boxes * torch.tensor([8, 6, 8, 6]), (6, 8)).nonzero(as_tuple=True)
    assert torch.equal(batch, t["out.positive_batch_index"].long())
    assert torch.equal(row * 8 + column, t["out.positive_map_index"].long())
    assert len(batch) == int(t["out.num_positive"])


@pytest.mark.parametrize("kind", ["iou_aware", "hard"])
def test_golden_losses_and_gradients(kind: str) -> None:
    t = golden("labels_and_loss")
    scores, boxes = t["in.score_map"].clone().requires_grad_(), t["in.pred_boxes"].clone().requires_grad_()
    truth = t["in.boxes_xyxy_px"].double() / PIXELS
    cls, reg = tracking_losses(TrackOutput(scores, boxes), truth, iou_aware=kind == "iou_aware")
    close(cls.reshape(1), t[f"out.{kind}.cls"])
    close(reg.reshape(1), t[f"out.{kind}.reg"])
    (cls + reg).backward()
    close(scores.grad, t[f"grad.{kind}.score_map"])
    close(boxes.grad, t[f"grad.{kind}.pred_boxes"])


def test_loss_of_the_head_is_that_function_with_its_weights() -> None:
    t = golden("labels_and_loss")
    head = MLPAnchorFreeHead(in_features=4, map_size=(6, 8), cls_weight=2.0, reg_weight=0.5)
    samples = [{"box": box} for box in t["in.boxes_xyxy_px"].double() / PIXELS]
    losses = head.loss(TrackOutput(t["in.score_map"], t["in.pred_boxes"]), samples)
    close(losses["loss_cls"].reshape(1), 2 * t["out.iou_aware.cls"])
    close(losses["loss_reg"].reshape(1), 0.5 * t["out.iou_aware.reg"])


@pytest.mark.parametrize("kind,window", [("win045", 0.45), ("nowin", 0.0)])
def test_golden_decoding(kind: str, window: float) -> None:
    t = golden("decode_and_state")
    size = torch.tensor([98.0, 70, 98, 70])
    boxes, confidence = decode(TrackOutput(t["in.score_map"], t["in.boxes"]), window)
    close(boxes * size, t[f"out.{kind}.box"], 1e-4)  # pixels, so 1e-4 is 1e-6 of the crop
    close(confidence, t[f"out.{kind}.confidence"])
    close(hann_window((5, 7)), t["out.window"])


def test_every_box_has_a_positive_cell_and_none_beyond_the_map() -> None:
    tiny = torch.tensor([[3.4, 2.2, 3.4001, 2.2001], [-5.0, -5.0, 20.0, 20.0], [7.9, 5.9, 8.0, 6.0]])
    cells = covered_cells(tiny, (6, 8))
    assert cells[0].sum() == 1 and cells[0, 2, 3]
    assert cells[1].all()
    assert cells[2].sum() == 1 and cells[2, 5, 7]


def test_giou_of_a_perfect_and_of_a_distant_box() -> None:
    a = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 1]])
    b = torch.tensor([[0.0, 0, 1, 1], [2.0, 0, 3, 1]])
    iou, giou = box_overlaps(a, b)
    close(iou, torch.tensor([1.0, 0.0]))
    close(giou, torch.tensor([1.0, -1 / 3]))


def test_refusals() -> None:
    head = MLPAnchorFreeHead(in_features=4, map_size=(2, 2))
    with pytest.raises(OptionError, match=r"expected \(B, 4, D\)"):
        head(torch.zeros(1, 5, 4))
    out = head(torch.zeros(2, 4, 4))
    with pytest.raises(OptionError, match=r"without: \[1\]"):
        head.loss(out, [{"box": [0, 0, 1, 1]}, {}])
    with pytest.raises(OptionError, match="sample 1 has no extent"):
        head.loss(out, [{"box": [0, 0, 1, 1]}, {"box": [1.2, 0, 1.5, 1]}])
    with pytest.raises(OptionError, match="window must lie"):
        MLPAnchorFreeHead(in_features=4, map_size=(2, 2), window=1.0)
