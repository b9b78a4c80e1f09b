"""Time and memory of a training step: our LoRA, peft's LoRA at the same places, and full fine-tuning, in turn."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.inject import attach
from zoo.adapters.probe import derive_example
from zoo.benchmark.report import Report, Row, environment, header_lines, table
from zoo.benchmark.timing import Outcome, Timing, interleaved, reason
from zoo.errors import OptionError
from zoo.factory import create, train_classifier

PLACES = "qkv,out,fc1,fc2"  # every linear layer of a ViT block
CLASSES = 100
COLUMNS = {
    "method": "method",
    "trained": "M trained",
    "milliseconds": "ms a step",
    "ratio": "time / full",
    "memory": "MiB",
    "memory_ratio": "memory / full",
    "notes": "notes",
}


def measure(
    model_name: str,
    device: torch.device,
    *,
    batch: int = 8,
    dtype: torch.dtype = torch.float32,
    rank: int = 16,
    rounds: int = 10,
    limit: float = 120.0,
) -> Report:
    """One row a method: forward, backward and AdamW step on random images, each after the other, medians.

    `dtype` other than float32 runs under autocast with fp32 weights. All methods start from the same weights and also
    train a new classifier of 100 classes. A method that fails, or peft where it is not installed, is text in its row.

    Raises OptionError for a batch or rank below 1; what `zoo.create` and `zoo.attach` raise.
    """
    if batch < 1 or rank < 1:
        raise OptionError(f"batch and rank must be at least 1, got {batch} and {rank}")
    torch.manual_seed(0)
    base = create(model_name, num_classes=CLASSES, device=device)
    shape = derive_example(base).shape[1:]
    images = torch.randn(batch, *shape, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    models: dict[str, nn.Module] = {}
    failed: dict[str, str] = {}
    ours = copy.deepcopy(base)
    attached = attach(ours, {"type": "LoRA", "rank": rank, "where": PLACES})
    train_classifier(ours)
    models["zoo LoRA"] = ours
    try:
        models["peft LoRA"] = _peft(copy.deepcopy(base), [site.path for site in attached.sites], rank)  # type: ignore[union-attr]
    except ImportError as error:
        failed["peft LoRA"] = reason(error)
    models["full"] = base.requires_grad_(True)
    steps = {name: Step(model, images, labels, dtype) for name, model in models.items()}
    outcomes = interleaved(steps, device, rounds=rounds, limit=limit)
    header = environment(
        device,
        model=model_name,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        rank=rank,
        places=PLACES.replace(",", " "),
        optimiser="AdamW",
    )
    return Report(header, [_row(name, steps, {**outcomes, **failed}) for name in (*steps, *failed)])


def page(report: Report) -> str:
    """A Markdown page from a report."""
    intro = (
        "Methods run in turn in one process; ratios are to full fine-tuning of the same run. MiB is what a step needs "
        "at most, with the method's weights and optimiser state."
    )
    parts = ["# Training step", f"Measured on {header_lines(report.header)} {intro}", table(report.rows, COLUMNS)]
    return "\n\n".join(parts) + "\n"


def _peft(model: nn.Module, paths: list[str], rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=paths))
    train_classifier(wrapped.get_base_model())
    return wrapped


class Step:
    """Forward, backward and AdamW on one batch."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        self.model = model.train()
        self.images, self.labels, self.dtype = images, labels, dtype
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4)

    def __call__(self) -> Tensor:
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = F.cross_entropy(self.model(self.images).float(), self.labels)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def held(self) -> int:
        """Bytes that stay between steps: weights, buffers and the optimiser's state."""
        states = [t for state in self.optimiser.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *states))


def _row(name: str, steps: Mapping[str, Step], outcomes: Mapping[str, Outcome]) -> Row:
    row: Row = dict.fromkeys(COLUMNS, "") | {"method": name}
    if name in steps:
        row["trained"] = f"{sum(p.numel() for p in steps[name].trained) / 1e6:.3f}"
    outcome, full = outcomes[name], outcomes["full"]
    if not isinstance(outcome, Timing):
        return row | {"notes": outcome}
    row["milliseconds"] = f"{1000 * outcome.seconds:.4g}"
    if isinstance(full, Timing):
        row["ratio"] = f"{outcome.seconds / full.seconds:.3f}"
    if outcome.peak_bytes is None:
        return row | {"memory": "-"}
    memory = outcome.peak_bytes + steps[name].held()
    row["memory"] = f"{memory / 2**20:.0f}"
    if isinstance(full, Timing) and full.peak_bytes is not None:
        row["memory_ratio"] = f"{memory / (full.peak_bytes + steps['full'].held()):.3f}"
    return row
