"""Train a model from a config.

python tools/train.py CONFIG [--work-dir D] [--resume [FILE]] [--amp bf16] [--compile] [--cfg-options a.b=1 ...]
torchrun --nproc_per_node 2 tools/train.py CONFIG --launcher pytorch
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine.config import Config, DictAction

from zoo.errors import ZooError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or the name of a model (a file under configs/)")
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/NAME)")
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, metavar="FILE",
        help="continue from FILE, or from the newest resume file of the work folder",
    )  # fmt: skip
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision; fp16 needs a GPU")
    parser.add_argument("--compile", action="store_true", help="compile feature extraction with torch.compile")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    parser.add_argument("--launcher", choices=("none", "pytorch"), default="none")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: the config's, else 0)")
    return parser.parse_args(argv)


def configure(args: argparse.Namespace) -> Config:
    """The config with the command line applied."""
    from zoo.engine.config import load_config

    cfg = load_config(args.config, args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(cfg.filename).stem))
    cfg.launcher = args.launcher
    cfg.resume = args.resume or cfg.get("resume", False)
    randomness = dict(cfg.get("randomness") or {})
    seed = args.seed if args.seed is not None else randomness.get("seed")
    cfg.randomness = {**randomness, "seed": 0 if seed is None else seed}  # never random: a resume needs the same one
    if args.amp:
        cfg.optim_wrapper.amp = args.amp
    if args.compile:
        cfg.compile = cfg.get("compile") or True
    return cfg


def main(argv: list[str] | None = None) -> int:
    """0: trained; 2: a mistake in config or data, in one line; 130: interrupted, state saved."""
    args = parse(argv)
    try:
        cfg = configure(args)
        from zoo.engine.launch import distributed
        from zoo.engine.runner import ZooRunner

        with distributed(args.launcher):
            ZooRunner.from_cfg(cfg).train()
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"python tools/train.py {args.config} --work-dir {cfg.work_dir} --resume"
        print(f"stopped; continue with: {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
