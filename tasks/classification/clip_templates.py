"""Sentences for the eleven public sets of the few-shot CLIP literature.

The sets and their customary sentences come from CoOp (Zhou et al. 2022, arXiv 2109.01134). CLIP-LoRA's published code
(Zanella and Ben Ayed 2024, arXiv 2405.18541) keeps these in comments and runs `GENERIC` on every set; say beside each
number which of the two it was.
"""

from __future__ import annotations

from collections.abc import Mapping

from zoo.errors import UnknownNameError, nearest

GENERIC = "a photo of a {}."

TEMPLATES: Mapping[str, str] = {
    "imagenet": GENERIC,
    "sun397": GENERIC,
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "eurosat": "a centered satellite photo of {}.",
    "stanford_cars": GENERIC,
    "food101": "a photo of {}, a type of food.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "caltech101": GENERIC,
    "dtd": "{} texture.",
    "ucf101": "a photo of a person doing {}.",
}

CLASSES_OF: Mapping[str, int] = {
    "imagenet": 1000, "sun397": 397, "fgvc_aircraft": 100, "eurosat": 10, "stanford_cars": 196, "food101": 101,
    "oxford_pets": 37, "oxford_flowers": 102, "caltech101": 100, "dtd": 47, "ucf101": 101,
}  # fmt: skip


def template_of(dataset: str) -> str:
    """The customary sentence of a public set; raises `UnknownNameError` naming the nearest sets."""
    if dataset not in TEMPLATES:
        raise UnknownNameError(f"no sentence is known for {dataset!r}; {nearest(dataset, TEMPLATES)}")
    return TEMPLATES[dataset]
