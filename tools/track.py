"""Follow one object through a film, or through every film of a data set.

python tools/track.py CHECKPOINT FILM --box 120,80,60,40 --out DIR         a folder of frames, or a video
python tools/track.py CHECKPOINT --dataset type=GOT10k root=data/got10k split=test --style got10k --out DIR
CHECKPOINT is a saved folder or its address; or, with --published FILE, the name of a model (vit_b_lorat) whose LoRAT
weights lie in FILE. Boxes, here and in the results, are x,y,w,h in pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine.config import DictAction

from zoo.errors import OptionError, ZooError

if TYPE_CHECKING:
    from tasks.tracking.model import JointTracker


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a saved folder, its address, or a model's name (with --published)")
    parser.add_argument("film", nargs="?", type=Path, help="a folder of frames or a video")
    parser.add_argument("--box", help="x,y,w,h of the object in the first frame (default: the folder's groundtruth)")
    parser.add_argument("--dataset", nargs="+", action=DictAction, metavar="KEY=VALUE", help="a set of sequences")
    parser.add_argument("--style", default="plain", help="files of a data set's results: plain or got10k")
    parser.add_argument("--origin", type=int, default=0, help="first pixel in a data set's results (LaSOT: 1)")
    parser.add_argument("--published", type=Path, help="a checkpoint file of LoRAT's authors")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--no-drawing", action="store_true", help="write text only")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> JointTracker:
    """The tracker, on its device."""
    import torch

    import zoo
    from tasks.tracking.model import JointTracker

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.published is None:
        model = zoo.load(args.checkpoint, device=device)
    else:
        from tasks.tracking.published import load_published

        model = zoo.create(args.checkpoint, pretrained=True, device=device)
        load_published(model, args.published)
    if not isinstance(model, JointTracker):
        raise OptionError(f"{args.checkpoint} holds a {type(model).__name__}, not a tracker")
    return model


def box_of(text: str | None) -> list[float] | None:
    """`x,y,w,h` as numbers."""
    if text is None:
        return None
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise OptionError(f"--box is x,y,w,h in pixels, such as 120,80,60,40; got {text!r}")
    return numbers


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a film ended early, its results so far are there; 2: nothing done, with the reason; 130: Ctrl-C."""
    args = parse(argv)
    try:
        if (args.film is None) == (args.dataset is None):
            raise OptionError("give either a film or --dataset")
        from tasks.tracking.predict import open_film, track_film, track_set
        from zoo.registry import DATASETS

        if args.dataset is not None:
            sequences = DATASETS.create(args.dataset).sequences
            troubles = track_set(build(args), sequences, args.out, style=args.style, origin=args.origin)
        else:
            sequence = open_film(args.film, box_of(args.box))
            track = track_film(build(args), sequence, args.out, draw=not args.no_drawing)
            print(f"{len(track.boxes)} of {len(sequence.frames)} frames: {args.out / sequence.name}.txt")
            if track.interrupted:
                raise KeyboardInterrupt
            troubles = [f"{args.film}: {track.stopped}"] if track.stopped else []
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the results so far are in {args.out}", file=sys.stderr)
        return 130
    for trouble in troubles:
        print(f"ended early: {trouble}", file=sys.stderr)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
