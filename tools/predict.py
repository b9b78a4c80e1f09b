"""Run a trained model on files.

python tools/predict.py CHECKPOINT INPUT... --out DIR [--topk 5] [--device cpu]
CHECKPOINT is a saved folder (`adapter`) or its address. The model's task decides what comes out: the module `predict`
beside its model (tasks/classification/predict.py and so on) does the work.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.errors import OptionError, ZooError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a saved folder, or its address (hf-hub:org/name)")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--topk", type=int, default=5, help="classification: how many labels to list for a file")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: results written, skipped files are named; 2: nothing could be done, with the reason; 130: interrupted."""
    args = parse(argv)
    try:
        if args.topk < 1:
            raise OptionError(f"--topk must be at least 1, got {args.topk}")
        import torch

        from zoo.checkpoint import load

        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load(args.checkpoint, device=device)
        package = type(model).__module__.rpartition(".")[0]
        if not package.startswith("tasks.") or find_spec(f"{package}.predict") is None:
            raise OptionError(f"{args.checkpoint} holds a {type(model).__name__}, which has no predictions for files")
        options = {"topk": args.topk} if package == "tasks.classification" else {}
        done = import_module(f"{package}.predict").predict_files(model, args.inputs, args.out, **options)
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the results so far are in {args.out}", file=sys.stderr)
        return 130
    for item in done["skipped"]:
        print(f"skipped: {item['reason']}", file=sys.stderr)
    print(f"{len(done['predictions'])} predictions, {len(done['skipped'])} skipped: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
