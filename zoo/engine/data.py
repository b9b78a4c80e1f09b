"""Data loading whose every random choice depends on (seed, epoch, sample) only, and that can start mid-epoch.

A run that is killed and resumed must draw the same crops and flips as one that was not, whatever the number of
workers. So the random state is not carried along: it is set anew for each sample.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import sync_random_seed
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, get_worker_info

from zoo.errors import OptionError
from zoo.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS


class SampleKey(NamedTuple):
    """Which sample, and which of its random versions."""

    index: Any
    epoch: int
    repeat: int  # how often this index came before in the same epoch


class SeededDataset(Dataset[Any]):
    """Seeds python, numpy and torch (CPU) before each sample, and gives the main process its state back after.

    A dataset (or its `transform`) with generators of its own is told by `set_random_seed(seed)`, as
    albumentations' `Compose` has it.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        owners = (dataset, getattr(dataset, "transform", None), getattr(dataset, "transforms", None))
        self.own_generators: list[Any] = [owner for owner in owners if hasattr(owner, "set_random_seed")]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "own_generators"):  # not there yet while unpickling in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, key: SampleKey) -> Any:
        if get_worker_info() is not None:  # a worker has nothing else to draw
            self._seed_all(key)
            return self.dataset[key.index]
        before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        try:
            self._seed_all(key)
            return self.dataset[key.index]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.default_generator.set_state(before[2])

    def _seed_all(self, key: SampleKey) -> None:
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little")
        random.seed(seed)
        np.random.seed(seed)
        # Not torch.manual_seed: it would reseed the GPUs too, and with them the model's dropout.
        torch.default_generator.manual_seed(seed)
        for owner in self.own_generators:
            owner.set_random_seed(seed)


class ResumableBatches(Sampler[list[SampleKey]]):
    """A batch sampler that can leave out the first batches without loading them."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.epoch = 0
        self.skip = 0  # batches to leave out in the next pass only

    @property
    def sampler(self) -> ResumableBatches:
        """Where mmengine's DistSamplerSeedHook looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch decides the order and the random version of every sample."""
        self.epoch = epoch
        owners: tuple[Any, ...] = (self.batches, getattr(self.batches, "sampler", None))
        for owner in owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        skip, self.skip = self.skip, 0
        seen: Counter[str] = Counter()
        for number, batch in enumerate(self.batches):
            keys = []
            for index in batch:
                keys.append(SampleKey(index, self.epoch, seen[repr(index)]))
                seen[repr(index)] += 1
            if number >= skip:
                yield keys


@FUNCTIONS.register_module()  # type: ignore[untyped-decorator]
def collate_samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples `dict(inputs=(C, H, W), data_samples=dict)` -> `dict(inputs=(B, C, H, W), data_samples=list)`.

    Inputs of different shapes stay a list; every key but `inputs` becomes a list of B values.
    """
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    images = batch.get("inputs", [])
    if images and all(isinstance(x, Tensor) and x.shape == images[0].shape for x in images):
        batch["inputs"] = torch.stack(images)
    return batch


def build_loader(config: dict[str, Any], seed: int | None, diff_rank_seed: bool) -> DataLoader[Any]:
    """A DataLoader over `SeededDataset` and `ResumableBatches` from mmengine's dataloader config.

    Raises:
        OptionError: no `dataset`, `sampler` or `batch_size` in the config.
    """
    config = copy.deepcopy(dict(config))
    if not isinstance(config.get("dataset"), dict) or not isinstance(config.get("sampler"), dict):
        raise OptionError("a dataloader needs `dataset=dict(type=...)` and `sampler=dict(type=...)`")
    dataset = DATASETS.build(config.pop("dataset"))
    if hasattr(dataset, "full_init"):
        dataset.full_init()
    sampler_seed = sync_random_seed() if seed is None or diff_rank_seed else seed
    sampler = DATA_SAMPLERS.build(config.pop("sampler"), default_args={"dataset": dataset, "seed": sampler_seed})
    if "batch_size" not in config:
        raise OptionError("a dataloader needs `batch_size`")
    size, drop_last = config.pop("batch_size"), config.pop("drop_last", False)
    batches = config.pop("batch_sampler", None)
    if batches is None:
        batches = BatchSampler(sampler, size, drop_last)
    else:
        batches = DATA_SAMPLERS.build(batches, default_args={"sampler": sampler, "batch_size": size})
    workers = config.setdefault("num_workers", 0)
    collate = config.pop("collate_fn", None)
    if isinstance(collate, dict):
        kind = collate.pop("type")
        collate = partial(FUNCTIONS.get(kind) if isinstance(kind, str) else kind, **collate)
    config["persistent_workers"] = config.get("persistent_workers", False) and workers > 0
    try:
        return DataLoader(
            SeededDataset(dataset, sampler_seed),
            batch_sampler=ResumableBatches(batches),
            collate_fn=collate or collate_samples,
            # A generator of its own: starting an iterator must not move the model's random state.
            generator=torch.Generator().manual_seed(sampler_seed),
            **config,
        )
    except TypeError as error:
        raise OptionError(f"a dataloader option is wrong: {error}") from error
