"""Reading image files: colours, orientation, and what is wrong with those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from tasks.classification.transforms import Image
from zoo.errors import ZooError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})


def read_image(path: str | Path) -> Image:
    """A file -> (H, W, 3) uint8, turned as its EXIF orientation says; the first frame of an animation.

    Transparent pixels keep the colour stored under them; 16-bit grey is scaled to 8 bits.
    Raises ZooError naming the file: missing, damaged, or no image.
    """
    try:
        with Pillow.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # Pillow would clip everything above 255 to white
                image = Pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ZooError(f"missing file {path}") from None
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise ZooError(f"unreadable image {path}: {error}") from error


def find_unreadable(paths: Sequence[Path], *, decode: bool) -> list[str]:
    """One line for each path that is missing or cannot be read; `decode` reads the pixels, not only the header."""
    with ThreadPoolExecutor(max_workers=8) as pool:  # Pillow's decoders release the interpreter lock
        return [problem for problem in pool.map(partial(_problem, decode=decode), paths) if problem]


def _problem(path: Path, *, decode: bool) -> str | None:
    if decode:
        try:
            read_image(path)
        except ZooError as error:
            return str(error)
        return None
    if not path.is_file():
        return f"missing file {path}"
    try:
        with Pillow.open(path):
            return None
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        return f"unreadable image {path}: {error}"
