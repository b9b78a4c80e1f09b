"""Measure speed and memory: backbones next to timm's, training steps next to peft's.

python tools/benchmark.py backbones --csv backbones.csv [--markdown docs/backbones.md] [--models 'illama_*' shvit_s1]
python tools/benchmark.py backbones --from-csv backbones.csv --markdown docs/backbones.md
python tools/benchmark.py train --model vit_base_patch16_224 --batch 8 [--csv train.csv] [--markdown train.md]

What is compared runs in turn in one process. Weights are random: only speed is measured. Results are printed as they
come, failures are text in the table, and the CSV is written after every model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.errors import OptionError, ZooError

DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    shared.add_argument("--rounds", type=int, default=10, help="timed calls of each")
    shared.add_argument("--csv", type=Path, help="write the measurements there")
    shared.add_argument("--markdown", type=Path, help="write the page there")
    one = suites.add_parser("backbones", parents=[shared], help="inference of the backbones and of timm's peers")
    one.add_argument("--models", nargs="+", default=["*"], metavar="NAME", help="names or globs (default: all)")
    one.add_argument("--batch", type=int, default=256)
    one.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    one.add_argument("--compile-models", nargs="+", metavar="NAME", help="compile these (default: one a family)")
    one.add_argument("--no-compile", action="store_true", help="compile none")
    one.add_argument("--limit", type=float, default=12.0, help="seconds for each step of one model")
    one.add_argument("--compile-limit", type=float, default=90.0, help="seconds for compiling one model")
    one.add_argument("--budget", type=float, default=480.0, help="seconds after which no further model is begun")
    one.add_argument("--from-csv", type=Path, help="measure nothing, make the page from this file")
    two = suites.add_parser("train", parents=[shared], help="a training step of LoRA, peft's LoRA and everything")
    two.add_argument("--model", default="vit_base_patch16_224", help="a ViT of timm's")
    two.add_argument("--batch", type=int, default=8)
    two.add_argument("--dtype", choices=DTYPES[:2], default="float32", help="bfloat16 runs under autocast")
    two.add_argument("--rank", type=int, default=16)
    return parser.parse_args(argv)


def backbones(args: argparse.Namespace) -> None:
    """The suite `backbones`."""
    from zoo.benchmark import backbones as suite
    from zoo.benchmark.report import read_csv, write_markdown

    if args.from_csv is not None:
        if args.markdown is None:
            raise OptionError("--from-csv makes a page: say where with --markdown")
        write_markdown(suite.page(read_csv(args.from_csv)), args.markdown)
        return
    names = suite.chosen(args.models)
    compiled = suite.chosen(args.compile_models) if args.compile_models else suite.COMPILED
    settings = suite.Settings(
        **common(args),
        compile_models=() if args.no_compile else tuple(compiled),
        limit=args.limit,
        compile_limit=args.compile_limit,
        budget=args.budget,
    )
    report = suite.measure(names, settings, args.csv)
    if args.markdown is not None:
        write_markdown(suite.page(report), args.markdown)


def train(args: argparse.Namespace) -> None:
    """The suite `train`."""
    from zoo.benchmark import train as suite
    from zoo.benchmark.report import write_csv, write_markdown

    report = suite.measure(args.model, rank=args.rank, **common(args))
    print(suite.page(report), end="")
    if args.csv is not None:
        write_csv(report, args.csv)
    if args.markdown is not None:
        write_markdown(suite.page(report), args.markdown)


def common(args: argparse.Namespace) -> dict[str, Any]:
    """What both suites are told."""
    import torch

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {"device": device, "dtype": getattr(torch, args.dtype), "batch": args.batch, "rounds": args.rounds}


def main(argv: list[str] | None = None) -> int:
    """0: measured; 2: a mistake in the options, in one line."""
    args = parse(argv)
    try:
        {"backbones": backbones, "train": train}[args.suite](args)
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
