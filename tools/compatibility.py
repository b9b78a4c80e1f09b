"""Print which adapter keeps which property on which backbone family, as the table of docs/compatibility.md.

    python tools/compatibility.py --out docs/compatibility.md
    python tools/compatibility.py --family ViT --family BEiT

The checks are those of tests/test_matrix.py, run for every pair, tracing included: some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

INTRODUCTION = """# Compatibility

Each adapter on a small model of each backbone family. `yes`: the property holds. `-`: it does not apply, because the
method has no merged form, is not the identity at first, or the model takes one image size only. Where a row says
`where=...`, the method's usual places do not all fit that family and this choice does. Made by
`tools/compatibility.py`.
"""


def table(family: str) -> Iterator[str]:
    from matrix_properties import METHODS, PROPERTIES, UNFIT, Pair, outcome

    from zoo.errors import SiteError

    yield f"\n## {family}\n"
    yield "| method | " + " | ".join(PROPERTIES) + " |"
    yield "|---" * (len(PROPERTIES) + 1) + "|"
    reasons = []
    for method in METHODS:
        pair = Pair(family, method)
        if pair not in UNFIT:
            where = METHODS[method].where.get(family)
            label = method if where is None else f"{method}, `where={where!r}`"
            yield f"| {label} | " + " | ".join(outcome(name, pair) for name in PROPERTIES) + " |"
            continue
        try:
            pair.attached()
            reasons.append(f"- {method}: FAILS, it was expected not to fit")
        except SiteError as error:
            reasons.append(f"- {method} does not fit: {str(error).splitlines()[0]}")
    if reasons:
        yield ""
        yield from reasons


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only this family (may be given several times)")
    parser.add_argument("--out", type=Path, help="write the page there instead of printing it")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from matrix_families import FAMILIES

    unknown = set(options.family or ()) - set(FAMILIES)
    if unknown:
        parser.error(f"no family is called {sorted(unknown)[0]!r}; one of {', '.join(FAMILIES)}")
    lines = [INTRODUCTION.rstrip()]
    for family in options.family or FAMILIES:
        lines += table(family)
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text, end="")
        return
    part = options.out.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, options.out)


if __name__ == "__main__":
    main()
