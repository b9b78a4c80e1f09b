"""From loader batches to normalised tensors, and the per-sample seeds of the loader."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import TinyTask
from torch import Tensor

from tasks.preprocess import ZooPreprocessor
from zoo.engine.data import ResumableBatches, SampleKey, SeededDataset, build_loader, collate_samples
from zoo.errors import OptionError

MEAN, STD = (0.2, 0.4, 0.6), (0.1, 0.2, 0.4)
LOADER: dict[str, Any] = {
    "batch_size": 4,
    "dataset": {"type": "TinyImages", "size": 10, "augment": True},
    "sampler": {"type": "DefaultSampler", "shuffle": True},
}


def test_uint8_is_scaled_and_normalised_and_floats_are_not_scaled() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    prepare = ZooPreprocessor(MEAN, STD)
    out = prepare({"inputs": images, "data_samples": [{"label": 1}, {"label": 2}]})
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - MEAN[channel]) / STD[channel]
        assert torch.allclose(out["inputs"][:, channel].double(), expected, atol=1e-6)
    assert out["data_samples"] == [{"label": 1}, {"label": 2}]
    assert torch.equal(prepare({"inputs": images.float() / 255})["inputs"], out["inputs"])
    assert not prepare.state_dict()


def test_batch_augment_runs_only_in_training() -> None:
    def negate(inputs: Tensor, samples: Any) -> tuple[Tensor, Any]:
        return -inputs, samples

    prepare = ZooPreprocessor(MEAN, STD, batch_augment=negate)
    data = {"inputs": torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "data_samples": [{}]}
    assert torch.equal(prepare(data, training=True)["inputs"], -prepare(data)["inputs"])


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 4, 3, 3), torch.zeros(3, 3, 3), [torch.zeros(3, 2, 2), torch.zeros(3, 2, 3)]]
)
def test_unfit_inputs_are_named(inputs: Any) -> None:
    with pytest.raises(OptionError, match=r"shape|sizes"):
        ZooPreprocessor(MEAN, STD)({"inputs": inputs})
    with pytest.raises(OptionError, match="std"):
        ZooPreprocessor(MEAN, (0.1, 0.0, 0.1))


def test_task_modes() -> None:
    task = TinyTask().eval()
    images = torch.rand(2, 3, 12, 12)
    samples = [{"label": 0}, {"label": 2}]
    assert task(images).shape == (2, 3)
    assert set(task(images, samples, mode="loss")) == {"loss_cls"}
    assert [r["pred"] for r in task(images, samples, mode="predict")] == task(images).argmax(1).tolist()
    with pytest.raises(OptionError, match="mode"):
        task(images, samples, mode="training")
    task.head = None
    assert task(images).shape == (2, 24)
    with pytest.raises(OptionError, match="needs a head"):
        task(images, samples, mode="loss")


def test_samples_depend_on_epoch_and_repeat_but_not_on_the_global_state() -> None:
    loader = build_loader(LOADER, seed=0, diff_rank_seed=False)
    data = loader.dataset
    assert isinstance(data, SeededDataset) and data.metainfo["classes"] and len(data) == 10
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = data[SampleKey(3, 0, 0)]["inputs"]
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.manual_seed(99)
    assert torch.equal(data[SampleKey(3, 0, 0)]["inputs"], first)
    others = [data[SampleKey(3, epoch, repeat)]["inputs"] for epoch, repeat in ((1, 0), (0, 1), (2, 0))]
    assert any(not torch.equal(other, first) for other in others)


def test_iterating_a_loader_does_not_move_the_global_state() -> None:
    loader = build_loader(LOADER, seed=0, diff_rank_seed=False)
    before = torch.get_rng_state()
    for _ in loader:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_skipping_batches_gives_the_rest_of_the_epoch() -> None:
    loader = build_loader(LOADER, seed=0, diff_rank_seed=False)
    batches = loader.batch_sampler
    assert isinstance(batches, ResumableBatches)
    batches.set_epoch(2)
    whole = [[s["index"] for s in batch["data_samples"]] for batch in loader]
    batches.skip = 1
    assert [[s["index"] for s in batch["data_samples"]] for batch in loader] == whole[1:]
    assert [[s["index"] for s in batch["data_samples"]] for batch in loader] == whole  # once only
    batches.set_epoch(3)
    assert [[s["index"] for s in batch["data_samples"]] for batch in loader] != whole


def test_own_generators_of_a_transform_are_seeded() -> None:
    class Own:
        def set_random_seed(self, seed: int) -> None:
            self.rng = np.random.default_rng(seed)

    class Data:
        transform = Own()

        def __getitem__(self, index: int) -> float:
            return float(self.transform.rng.random())

    data = SeededDataset(Data(), seed=0)
    assert data[SampleKey(0, 0, 0)] == data[SampleKey(0, 0, 0)] != data[SampleKey(0, 1, 0)]


def test_collate_keeps_unequal_images_apart() -> None:
    same = collate_samples([{"inputs": torch.zeros(3, 2, 2), "data_samples": {"a": 1}}] * 2)
    assert same["inputs"].shape == (2, 3, 2, 2) and same["data_samples"] == [{"a": 1}, {"a": 1}]
    assert isinstance(collate_samples([{"inputs": torch.zeros(3, n, 2)} for n in (2, 3)])["inputs"], list)


@pytest.mark.parametrize("broken", [{"sampler": None}, {"batch_size": None}, {"batchsize": 3}])
def test_loader_mistakes_are_named(broken: dict[str, Any]) -> None:
    config = {key: value for key, value in {**LOADER, **broken}.items() if value is not None}
    with pytest.raises(OptionError, match="|".join(broken)):
        build_loader(config, seed=0, diff_rank_seed=False)
