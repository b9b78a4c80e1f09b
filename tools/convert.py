"""Turn a published checkpoint file of a model's authors into our layout.

python tools/convert.py MODEL_NAME SOURCE_FILE --out model.safetensors [--inside model_ema] [--num-classes 1000]
MODEL_NAME may carry a tag that sets the image size (illama_base.in1k_384). The result loads with
`zoo.create(MODEL_NAME, pretrained="file:/path/to/model.safetensors", num_classes=1000)`. Every key and shape must fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.errors import OptionError, ZooError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_NAME", help="a model of iLLaMA, SLAB, SHViT, PoolFormer or ConViT")
    parser.add_argument("source", type=Path, metavar="SOURCE_FILE", help="the authors' .pth or .safetensors file")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--inside", help="which entry of the file, where it holds several (model, model_ema)")
    parser.add_argument("--num-classes", type=int, default=1000, help="classes of the file's classifier")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: written; 2: the file or the name does not fit, with the reason."""
    args = parse(argv)
    try:
        if args.out.suffix != ".safetensors":
            raise OptionError(f"--out must end in .safetensors, got {args.out.name!r}")
        if not args.out.parent.is_dir():
            raise OptionError(f"the folder {args.out.parent} of --out does not exist")
        from backbones.published import convert
        from zoo.folder import replace_file, serialise

        made = convert(args.model, args.source, inside=args.inside, num_classes=args.num_classes)
        replace_file(args.out, serialise(made.state))
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(made.state)} tensors of {args.model}")
    if "norm_layer" in made.options:
        print("the file holds RepBN alone: build the model with norm_layer=backbones.slab_norm.RepBN")
    return 0


if __name__ == "__main__":
    sys.exit(main())
