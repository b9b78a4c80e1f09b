"""Evaluate a trained model on the config's test set (or on its validation set with --split val).

python tools/test.py CONFIG CHECKPOINT [--split val] [--cfg-options a.b=1 ...]
CHECKPOINT is a saved folder (`adapter`), its address, a resume file (`best.pth`) or a .safetensors file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine.config import Config, DictAction

from zoo.errors import OptionError, ZooError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or the name of a model (a file under configs/)")
    parser.add_argument("checkpoint", help="what to load into the model")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--work-dir", help="where logs go (default: work_dirs/NAME)")
    parser.add_argument("--out", type=Path, help="also write the metrics to this JSON file")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    parser.add_argument("--launcher", choices=("none", "pytorch"), default="none")
    return parser.parse_args(argv)


def configure(args: argparse.Namespace) -> Config:
    """The config with the command line applied."""
    from zoo.engine.config import load_config

    cfg = load_config(args.config, args.cfg_options)
    if cfg.get(f"{args.split}_dataloader") is None:
        other = "val" if args.split == "test" else "test"
        raise OptionError(f"{args.config} has no {args.split}_dataloader; try --split {other}")
    if args.split == "val":
        cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, {}
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(cfg.filename).stem))
    cfg.launcher = args.launcher
    cfg.load_from, cfg.resume = args.checkpoint, False
    cfg.randomness = {"seed": 0, **{k: v for k, v in (cfg.get("randomness") or {}).items() if v is not None}}
    return cfg


def main(argv: list[str] | None = None) -> int:
    """0: evaluated; 2: a mistake in config, checkpoint or data, in one line."""
    args = parse(argv)
    try:
        cfg = configure(args)
        from zoo.engine.launch import distributed
        from zoo.engine.runner import ZooRunner
        from zoo.engine.state import write_atomically

        with distributed(args.launcher):
            runner = ZooRunner.from_cfg(cfg)
            metrics = runner.test()
        if runner.rank == 0:
            text = json.dumps(metrics, indent=1, default=str)
            print(text)
            if args.out:
                write_atomically(args.out, lambda file: file.write(text.encode()))
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
