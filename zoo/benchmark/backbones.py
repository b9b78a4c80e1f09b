"""Speed of our backbones next to timm's models of the same size: eager, folded and compiled, in the same run."""

from __future__ import annotations

import fnmatch
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backbones.published_accuracy import PUBLISHED
from zoo.adapters.probe import derive_example
from zoo.benchmark.report import Report, Row, environment, header_lines, table, write_csv
from zoo.benchmark.timing import Candidate, LimitError, Outcome, Timing, free, interleaved, reason, time_limit
from zoo.errors import OptionError, UnknownNameError, nearest
from zoo.factory import create
from zoo.folding import fold

# Ours -> timm's model of about the same parameters, run at our image size.
PEERS: dict[str, str] = {
    "illama_tiny": "deit_tiny_patch16_224",
    "illama_small": "deit_small_patch16_224",
    "illama_base": "deit_base_patch16_224",
    "illama_large": "vit_large_patch16_224",
    "slab_deit_tiny": "deit_tiny_patch16_224",
    "slab_deit_small": "deit_small_patch16_224",
    "prepbn_deit_tiny": "deit_tiny_patch16_224",
    "prepbn_deit_small": "deit_small_patch16_224",
    "slab_pvt_tiny": "pvt_v2_b1",
    "slab_pvt_small": "pvt_v2_b2",
    "slab_pvt_medium": "pvt_v2_b3",
    "prepbn_pvt_tiny": "pvt_v2_b1",
    "prepbn_pvt_small": "pvt_v2_b2",
    "prepbn_pvt_medium": "pvt_v2_b3",
    "slab_swin_tiny": "swin_tiny_patch4_window7_224",
    "slab_swin_small": "swin_small_patch4_window7_224",
    "slab_swin_base": "swin_base_patch4_window7_224",
    "prepbn_swin_tiny": "swin_tiny_patch4_window7_224",
    "slab_cswin_tiny": "deit_small_patch16_224",
    "slab_cswin_small": "swin_small_patch4_window7_224",
    "shvit_s1": "efficientvit_m3",
    "shvit_s2": "efficientvit_m5",
    "shvit_s3": "efficientvit_m5",
    "shvit_s4": "fastvit_sa12",
    "poolformer_s12_gn": "resnet18",
    "poolformer_s24_gn": "deit_small_patch16_224",
    "poolformer_s36_gn": "swin_tiny_patch4_window7_224",
    "poolformer_m36_gn": "swin_small_patch4_window7_224",
    "poolformer_m48_gn": "deit_base_patch16_224",
    "convit_tiny": "deit_tiny_patch16_224",
    "convit_small": "deit_small_patch16_224",
    "convit_base": "deit_base_patch16_224",
    "halonet_h0": "efficientnet_b0",
    "halonet_h1_paper": "efficientnet_b1",
    "halonet_h2": "efficientnet_b2",
    "halonet_h3": "efficientnet_b3",
    "halonet_h4": "efficientnet_b4",
    "halonet_h5": "efficientnet_b5",
    "halonet_h6": "efficientnet_b6",
    "halonet_h7": "efficientnet_b7",
}
LEFT_OUT = {  # own backbones that are not measured, and why
    "*_distilled": "the same network with a second classifier",
    "lola_specvit*": "takes cubes of many spectral bands, for which timm has no peer",
}
COMPILED = (  # one a family: compiling takes longer than everything else together
    "illama_small",
    "slab_deit_small",
    "shvit_s3",
    "poolformer_s12_gn",
    "convit_small",
    "halonet_h1_paper",
)
COLUMNS = {
    "model": "model",
    "image": "image",
    "parameters": "M params",
    "gmacs": "GMACs",
    "top1": "top-1 (published)",
    "eager": "eager",
    "folded": "folded",
    "compiled": "compiled",
    "memory": "MiB",
    "peer": "timm's peer",
    "peer_parameters": "its M params",
    "peer_eager": "its eager",
    "ratio": "best / peer",
}


@dataclass(frozen=True)
class Settings:
    """How the suite runs. `limit` and `compile_limit` are seconds for a model, `budget` seconds for all."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    batch: int = 256
    rounds: int = 10
    compile_models: tuple[str, ...] = COMPILED
    limit: float = 12.0
    compile_limit: float = 90.0
    budget: float = 480.0


def chosen(patterns: Sequence[str]) -> list[str]:
    """The suite's models that fit any of the names or globs. Raises UnknownNameError for one that fits none."""
    for pattern in patterns:
        if not fnmatch.filter(PEERS, pattern):
            raise UnknownNameError(f"the suite has no model {pattern!r}; {nearest(pattern, PEERS, listed=99)}")
    return [name for name in PEERS if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def measure(
    names: Sequence[str], settings: Settings, csv: Path | None = None, say: Callable[[str], None] = print
) -> Report:
    """Measure the named models one after another; `csv` is written after each, so that being killed costs one row."""
    if settings.batch < 1:
        raise OptionError(f"the batch must be at least 1, got {settings.batch}")
    header = environment(
        settings.device,
        dtype=str(settings.dtype).removeprefix("torch."),
        batch=settings.batch,
        rounds=settings.rounds,
        weights="random",
    )
    report = Report(header, [])
    end = time.monotonic() + settings.budget
    for name in names:
        if time.monotonic() > end:
            report.rows.append(
                {"model": name, "notes": f"not measured: the {settings.budget:g} s of the run were over"}
            )
        else:
            report.rows.append(measure_one(name, settings))
            free(settings.device)
        row = report.rows[-1]
        say(" ".join(f"{key}={value}" for key, value in row.items() if value and key != "source"))
        if csv is not None:
            write_csv(report, csv)
    return report


def measure_one(name: str, settings: Settings) -> Row:
    """The row of one model; whatever fails is text in it."""
    row: Row = dict.fromkeys([*COLUMNS, "source", "rounds", "notes"], "")
    row |= {"model": name, "peer": PEERS[name]}
    if name in PUBLISHED:
        row |= {"top1": f"{PUBLISHED[name].top1}", "source": PUBLISHED[name].source}
    notes: list[str] = []
    try:
        with time_limit(settings.limit * 3), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random weights: a PRepBN schedule that is not over does not matter
            model = _build(name, settings.device)
            example = derive_example(model)
            row |= {"image": str(example.shape[-1]), **_size(model, example, "parameters")}
            row["gmacs"] = f"{gmacs(model, example):.2f}"
            candidates = dict(_forms(name, model, settings, notes))
            candidates["peer_eager"] = _build(PEERS[name], settings.device)
            row |= _size(candidates["peer_eager"], example, "peer_parameters")
    except Exception as error:
        return row | {"notes": reason(error)}
    torch.manual_seed(0)
    images = torch.randn(settings.batch, *example.shape[1:], device=settings.device, dtype=settings.dtype)
    calls = {key: _call(module, images, settings) for key, module in candidates.items()}
    outcomes = interleaved(
        calls,
        settings.device,
        rounds=settings.rounds,
        limit=settings.limit,
        limits={"compiled": settings.compile_limit},
    )
    if "compiled" in calls:
        torch._dynamo.reset()  # type: ignore[no-untyped-call, unused-ignore]
    return row | _numbers(outcomes, settings.batch, notes)


def gmacs(model: nn.Module, example: Tensor) -> float:
    """Multiply-accumulates of matrix products and convolutions for one image, in thousand millions."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # fused attention is not counted on every device
        model(example)
    return counter.get_total_flops() / 2e9 / len(example)


def page(report: Report) -> str:
    """docs/backbones.md from a report."""
    rows = [row for row in report.rows if row.get("eager")]
    sources = dict.fromkeys(row["source"] for row in rows if row.get("source"))
    notes = [f"- `{row['model']}`: {row['notes']}" for row in report.rows if row.get("notes")]
    parts = [
        "# Backbones",
        "Made by `python tools/benchmark.py backbones --from-csv FILE --markdown docs/backbones.md`.",
        f"Measured on {header_lines(report.header)} Speeds are images per second; each model ran in turn with timm's "
        "peer of about its size, at the same image size, in one process, and the median counts. `folded` is "
        "`zoo.fold(model)`; `-` means that there is nothing to fold or that it was not asked for. `best / peer` "
        "compares the faster of eager and folded with the peer's eager speed. MiB is what an eager call adds to the "
        "memory in use. GMACs count the matrix products and convolutions that run for one image.",
        table(rows, COLUMNS) if rows else "No model was measured.",
        "Top-1 is ImageNet-1k accuracy as published, in percent, from: " + "; ".join(sources) + ".",
    ]
    return "\n\n".join([*parts, *(["## Not measured, or in part", "\n".join(notes)] if notes else [])]) + "\n"


def _build(name: str, device: torch.device) -> nn.Module:
    with device:
        return create(name, num_classes=None).to(device)


def _forms(name: str, model: nn.Module, settings: Settings, notes: list[str]) -> Iterator[tuple[str, nn.Module]]:
    yield "eager", model
    try:
        yield "folded", fold(model)
    except LimitError:
        raise
    except Exception as error:
        if "nothing to fold" not in str(error):
            notes.append(f"folded: {reason(error)}")
    if name in settings.compile_models:
        yield "compiled", torch.compile(model, dynamic=False)  # type: ignore[misc, unused-ignore]


def _size(model: nn.Module, example: Tensor, key: str) -> Row:
    return {key: f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"}


def _call(model: nn.Module, images: Tensor, settings: Settings) -> Candidate:
    model.to(settings.dtype)

    @torch.no_grad()
    def call() -> object:
        return model(images)

    return call


def _numbers(outcomes: dict[str, Outcome], batch: int, notes: list[str]) -> Row:
    row: Row = {}
    speeds: dict[str, float] = {}
    for key in ("eager", "folded", "compiled", "peer_eager"):
        outcome = outcomes.get(key, "")
        if isinstance(outcome, Timing):
            speeds[key] = batch / outcome.seconds
            row[key] = f"{speeds[key]:.4g}" if speeds[key] < 1000 else f"{speeds[key]:.0f}"
        else:
            row[key] = "-"
            if outcome:
                notes.append(f"{key}: {outcome}")
    eager = outcomes["eager"]
    if isinstance(eager, Timing):
        row["rounds"] = str(eager.rounds)
        row["memory"] = "-" if eager.peak_bytes is None else f"{eager.peak_bytes / 2**20:.0f}"
        if "peer_eager" in speeds:
            row["ratio"] = f"{max(speeds['eager'], speeds.get('folded', 0.0)) / speeds['peer_eager']:.2f}"
    return row | {"notes": "; ".join(notes)}
