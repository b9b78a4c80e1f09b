"""A task small enough to train in a second: random images, two convolutions with BatchNorm and dropout, a linear head.

The label is the brightest third of the image, so that training has something to learn.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor, nn
from torch.utils.data import Dataset

from tasks.base import ZooTask
from zoo.freeze import freeze
from zoo.registry import DATASETS, METRICS, MODELS


@DATASETS.register_module()
class TinyImages(Dataset[dict[str, Any]]):
    """`size` images of (3, 12, 12); augmented by all three global generators if `augment`."""

    metainfo = {"classes": ("left", "middle", "right")}

    def __init__(self, size: int, augment: bool = False, poison: int | None = None, delay: float = 0.0) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 200, (size, 3, 12, 12), dtype=np.uint8)
        self.labels = [int(label) for label in rng.integers(0, 3, size)]
        for image, label in zip(self.images, self.labels, strict=True):
            image[:, :, 4 * label : 4 * label + 4] += 50
        self.augment, self.poison, self.delay = augment, poison, delay

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.delay)
        image = torch.from_numpy(self.images[index].copy())
        if self.augment:
            if random.random() < 0.5:
                image = image.flip(1)
            image = image.roll(int(np.random.randint(0, 4)), 1)
            image = (image.float() + 20 * torch.rand(())).clamp(0, 255).byte()
        sample = {"label": self.labels[index], "index": index, "path": f"image_{index}.png"}
        if index == self.poison:
            sample["poison"] = True
        return {"inputs": image, "data_samples": sample}


class TinyNet(nn.Module):
    """(B, 3, 12, 12) -> (B, 24): eight channels in three vertical stripes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        stripes = self.mix(self.stem(x)).amax(2).reshape(len(x), 8, 3, 4).mean(3)  # B 8 3
        return self.drop(stripes.flatten(1))


class TinyHead(nn.Module):
    """(B, 24) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.fc = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))

    def loss(self, outputs: Tensor, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        target = torch.tensor([s["label"] for s in samples])
        loss = nn.functional.cross_entropy(outputs, target)
        if any("poison" in s for s in samples):
            loss = loss * float("nan")
        return {"loss_cls": loss}

    def predict(self, outputs: Tensor, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**s, "pred": int(row.argmax())} for s, row in zip(samples, outputs, strict=True)]


@MODELS.register_module()
class TinyTask(ZooTask):
    """Everything but `stem` trains; `stem` is the frozen base."""

    def __init__(self, dropout: bool = True, frozen: bool = True, data_preprocessor: Any = None) -> None:
        torch.manual_seed(7)
        super().__init__(TinyNet(), TinyHead(), data_preprocessor=data_preprocessor)
        if frozen:
            freeze(self.backbone.stem)
        if not dropout:
            self.backbone.drop.p = 0.0


@MODELS.register_module()
class TinyAdaptedTask(ZooTask):
    """A two-block ViT with whatever adapter the config names."""

    def __init__(self, adapter: Any = None, data_preprocessor: Any = None) -> None:
        torch.manual_seed(7)
        vit = {"img_size": 12, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
        backbone = {"type": "TimmBackbone", "name": "vit_tiny_patch16_224", **vit}
        super().__init__(backbone, TinyHead(), adapter=adapter, data_preprocessor=data_preprocessor)


@METRICS.register_module()
class TinyAccuracy(BaseMetric):
    """Share of right labels."""

    default_prefix = "tiny"

    def process(self, data_batch: Any, data_samples: list[dict[str, Any]]) -> None:
        self.results += [float(s["pred"] == s["label"]) for s in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {"accuracy": sum(results) / len(results)}


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
