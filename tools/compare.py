"""Train a list of methods under the same conditions and put them side by side.

python tools/compare.py CONFIG [--methods NAME NAME:option=value,... ...] [--seeds 0 1 2] [--lr-grid 1e-3 1e-2] --out D

CONFIG holds data, backbone, head, epochs and schedule, which all methods share, and may hold `methods=dict(NAME=
dict(adapter=..., lr=[...]))`, the default list. Learning rates are tried on the first seed and chosen by validation;
the other seeds use the chosen one. D gets results.csv (one row a run), table.md and accuracy.png. Started again, only
what is missing or failed runs. `--methods` with no name only draws table and picture anew.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine.config import DictAction

from zoo.errors import ZooError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or the name of a model (a file under configs/)")
    parser.add_argument("--methods", nargs="*", metavar="SPEC", help="what to compare (default: the config's methods)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr-grid", nargs="+", type=float, metavar="RATE", help="try these on every method")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--title", help="title of the picture (default: the config's name)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: table and picture are written; 1: so they are, but a method failed; 2: a mistake, told in one line."""
    args = parse(argv)
    try:
        from zoo.compare.methods import methods_of
        from zoo.compare.plan import RESULTS, compare
        from zoo.compare.plot import draw
        from zoo.compare.table import markdown, read_rows
        from zoo.engine.config import load_config
        from zoo.engine.state import write_atomically

        config = load_config(args.config, args.cfg_options)
        if args.methods == []:
            rows = read_rows(args.out / RESULTS)
        else:
            rows = compare(config, methods_of(config, args.methods, args.lr_grid), args.seeds, args.out)
        if not rows:
            raise ZooError(f"{args.out / RESULTS} holds no results yet")
        table = markdown(rows)
        write_atomically(args.out / "table.md", lambda file: file.write(table.encode()))
        print(table)
        if any("error" not in row for row in rows):
            draw(rows, args.out / "accuracy.png", args.title or Path(config.filename).stem)
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues with what is missing", file=sys.stderr)
        return 130
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the run in progress would outlive this process
    sys.exit(main())
