"""Few-shot subsets: n images a class, drawn by a seed, of any labelled data set; and the CLIP-LoRA schedule on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.config import Config
from torch.utils.data import Dataset

from tasks.classification.data import ClassificationDataset, report_problems
from zoo.errors import OptionError
from zoo.registry import DATASETS

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)
STEPS_PER_SHOT = 500


@DATASETS.register_module()
class FewShotDataset(Dataset[dict[str, Any]]):
    """`shots` images of every class of another data set.

    The subset depends on the other set's items, `shots` and `seed` only; fewer shots of the same seed are part of
    more. Published splits (CoOp's files) were drawn by another generator: to use those, list them in a table.

    Args:
        dataset: a `ClassificationDataset` or its config.
        shots: images a class, at least 1.
        seed: which images.

    Raises:
        ZooError: lists the classes that have fewer images. OptionError: shots below 1, or another kind of data set.
    """

    def __init__(self, dataset: ClassificationDataset | dict[str, Any], *, shots: int, seed: int = 1) -> None:
        built = DATASETS.create(dict(dataset)) if isinstance(dataset, dict) else copy.copy(dataset)
        if not isinstance(built, ClassificationDataset):
            raise OptionError(f"few shots are drawn from labelled images, not from a {type(built).__name__}")
        chosen = few_shot_indices(built.labels, shots, seed, built.metainfo["classes"])
        built.items = [built.items[i] for i in chosen]
        self.dataset = built
        self.metainfo = built.metainfo

    @property
    def items(self) -> list[Any]:
        """The chosen items, classes taking turns."""
        return self.dataset.items

    @property
    def labels(self) -> list[int]:
        """Class index of every item."""
        return self.dataset.labels

    @property
    def transform(self) -> Any:
        """The other set's transform, where the engine looks for generators to seed."""
        return self.dataset.transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


def few_shot_indices(labels: Sequence[int], shots: int, seed: int, classes: Sequence[str]) -> list[int]:
    """Indices of `shots` items a class, classes taking turns; a class's draw does not depend on the other classes."""
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise OptionError(f"shots must be a whole number of at least 1, got {shots!r}")
    array = np.asarray(labels)
    drawn: list[list[int]] = []
    problems = []
    for label, name in enumerate(classes):
        own = np.flatnonzero(array == label)
        if len(own) < shots:
            problems.append(f"class {name!r} has {len(own)} images, {shots} are asked for")
        drawn.append(np.random.default_rng([seed, label]).permutation(own)[:shots].tolist())
    report_problems(f"{shots} shots a class", problems)
    return [one[turn] for turn in range(shots) for one in drawn]


def few_shot_run(config: Config, *, shots: int, seed: int) -> Config:
    """A copy of a few-shot config for another cell of the protocol: shots, seed, and 500 steps a shot.

    The images drawn and the random numbers of the run both follow `seed`; the only evaluation is the one after the
    last step, as nothing is selected by it.

    Raises:
        OptionError: the config's training data are not few-shot, or it trains by epochs.
    """
    if shots < 1:
        raise OptionError(f"shots must be at least 1, got {shots}")
    cell: Config = copy.deepcopy(config)
    data = cell.train_dataloader.dataset
    if data.get("type") != "FewShotDataset" or cell.train_cfg.get("by_epoch", True):
        raise OptionError("the config does not train a FewShotDataset by steps (train_cfg.by_epoch=False)")
    data.shots, data.seed = shots, seed
    cell.train_cfg.max_iters = cell.train_cfg.val_interval = STEPS_PER_SHOT * shots
    cell.randomness = {**cell.get("randomness", {}), "seed": seed}
    return cell
