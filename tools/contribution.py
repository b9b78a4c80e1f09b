"""Print and plot how much each layer contributes to a task, and the ranks CoLoRA gives them under a budget.

python tools/contribution.py CONFIG BASELINE TARGET [--images 16] [--steps 100] [--budget 0.07]
                             [--plot bars.png] [--out adapter.json] [--cfg-options a.b=1 ...]
CONFIG names the task and its training data; its adapter is left out. BASELINE and TARGET hold the weights before and
after a short fine-tuning of everything: a saved folder, a resume file (.pth) or a .safetensors file; BASELINE may be
`init` for the weights the config starts from. --out writes the config for `model.adapter`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine.config import DictAction

from zoo.errors import OptionError, ZooError

if TYPE_CHECKING:
    from zoo.adapters.contribution import Allocation


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or the name of a model (a file under configs/)")
    parser.add_argument("baseline", help="weights before the fine-tuning, or `init`")
    parser.add_argument("target", help="weights after it")
    parser.add_argument("--images", type=int, default=16, help="how many training images are scored")
    parser.add_argument("--steps", type=int, default=100, help="points on the line between the two")
    parser.add_argument("--budget", type=float, default=0.07, help="share of the parameters that may train")
    parser.add_argument("--beta", type=float, default=0.5, help="0 gives all layers the same share")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="write a bar chart there")
    parser.add_argument("--out", type=Path, help="write the adapter's config there, as JSON")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> Allocation:
    """Contributions and ranks of the backbone."""
    from zoo.adapters.contribution import allocate, attributions, contributions
    from zoo.engine.config import load_config
    from zoo.engine.data import build_loader
    from zoo.engine.weights import load_weights
    from zoo.registry import MODELS

    if args.images < 1:
        raise OptionError(f"--images must be at least 1, got {args.images}")
    cfg = load_config(args.config, args.cfg_options)
    cfg.model.pop("adapter", None)
    model: Any = MODELS.create(cfg.model.to_dict()).to(args.device)
    ends = []
    for source in (args.baseline, args.target):
        if source != "init":
            load_weights(model, source)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    loader = build_loader({**cfg.train_dataloader.to_dict(), "batch_size": 1}, seed=0, diff_rank_seed=False)

    def loss(model: Any, batch: Any) -> Any:
        return model.parse_losses(model(**model.data_preprocessor(batch, False), mode="loss"))[0]

    scores = attributions(model, ends[0], ends[1], loss, itertools.islice(loader, args.images), steps=args.steps)
    means = {k.removeprefix("backbone."): v for k, v in contributions(scores).items() if k.startswith("backbone.")}
    return allocate(model.backbone, means, budget=args.budget, beta=args.beta)


def table(made: Allocation) -> str:
    """One line a layer."""
    lines = [f"{'contribution':>12} {'share':>6} {'rank':>5} {'params':>9}  layer"]
    for share in made.shares:
        norm, rank = share.role == "norm", "full" if share.full else share.rank
        value = "" if norm else f"{share.contribution:.3e}"
        lines.append(f"{value:>12} {share.delta:>6.3f} {rank:>5} {share.tuned:>9,}  {share.path} ({share.role})")
    return "\n".join([*lines, f"{made.tuned:,} of {made.total:,} parameters ({made.tuned / made.total:.2%})"])


def plot(made: Allocation, path: Path) -> None:
    """Contribution of each layer, in model order, on a logarithmic axis."""
    from matplotlib.figure import Figure

    shares = [share for share in made.shares if share.role != "norm"]
    figure = Figure(figsize=(max(4.0, 0.25 * len(shares) + 1), 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(shares)), [share.contribution for share in shares])
    axes.set(yscale="log", ylabel="mean contribution of a parameter")
    axes.set_xticks(range(len(shares)), [share.path for share in shares], rotation=90, fontsize=6)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a mistake in config, weights or options, in one line."""
    args = parse(argv)
    try:
        made = measure(args)
        print(table(made))
        if args.plot:
            plot(made, args.plot)
        if args.out:
            from zoo.engine.state import write_atomically

            write_atomically(args.out, lambda file: file.write(json.dumps(made.config(), indent=1).encode()))
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
