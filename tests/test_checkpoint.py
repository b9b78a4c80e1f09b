"""Saved folders: what is written and what comes back, from disk and from a hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, Repo
from safetensors.torch import load_file
from saved_models import LITE0, LORA, VIT, assert_equal, edit, run, trained, tree, vit, write_base

import zoo
from zoo.adapters.inject import attachments
from zoo.checkpoint import load_into
from zoo.errors import ZooError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base"), **VIT)


@pytest.fixture(scope="module")
def saved(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save(trained(vit(pretrained=base)), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved adapter of its own for every test, to be tampered with."""
    return Path(shutil.copytree(saved, tmp_path / "saved"))


class TestRoundTrip:
    @pytest.mark.parametrize(
        "adapter",
        [
            LORA,
            dict(type="LoRA", rank=4, where=["q", "v", "depth<1"], per_site={"v": dict(rank=2)}, rslora=True),
            "SSF",
            "VPT",
            "BitFit",
            "FullFineTuning",
            None,
        ],
        ids=str,
    )
    def test_bare(self, base: str, adapter: Any, tmp_path: Path) -> None:
        model = trained(vit(pretrained=base, adapter=adapter))
        folder = zoo.save(model, tmp_path / "a")
        again = zoo.load(folder)
        assert_equal(again, model)
        assert sorted(tree(folder)) == ["README.md", "adapter.safetensors", "config.json"]
        moved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert moved | {"head.weight", "head.bias"} == load_file(folder / "adapter.safetensors").keys()
        second = zoo.load(zoo.save(trained(again), tmp_path / "b"))
        assert_equal(second, again)

    def test_task(self, base: str, tmp_path: Path) -> None:
        config = dict(
            type="ImageClassifier",
            backbone=dict(type="TimmBackbone", name="vit_tiny_patch16_224", pretrained=base, **VIT),
            head=dict(type="MLPHead", num_classes=3, hidden_features=8),
            adapter=[LORA, dict(type="LoRA", rank=1, where="fc1")],
            preprocessing=dict(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)),
        )
        model = trained(zoo.create(config, pretrained=base))
        folder = zoo.save(model, tmp_path, labels=["a", "b", "c"], metrics={"accuracy": torch.tensor(0.5)})
        again = zoo.load(folder)
        assert_equal(again, model)
        assert again.zoo_card["labels"] == ["a", "b", "c"] and again.zoo_card["metrics"] == {"accuracy": 0.5}
        assert again.zoo_card["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
        keys = load_file(folder / "adapter.safetensors")
        assert all(".adapters." in k or k.startswith("head.") for k in keys)

    def test_random_base_is_saved_whole(self, tmp_path: Path) -> None:
        model = trained(vit())
        folder = zoo.save(model, tmp_path)
        assert load_file(folder / "adapter.safetensors").keys() == model.state_dict().keys()
        again = zoo.load(folder)
        assert torch.equal(run(again), run(model))
        assert "random initialisation" in (folder / "README.md").read_text()

    def test_pip_weights_keep_the_folder_small(self, tmp_path: Path) -> None:
        adapter = dict(type="LoRA", rank=4, where="conv")
        model = trained(zoo.create("tf_efficientnet_lite0", pretrained=LITE0, num_classes=10, adapter=adapter))
        folder = zoo.save(model, tmp_path)
        assert sum(len(content) for content in tree(folder).values()) < 700_000  # 141,174 trained numbers of 4 bytes
        assert_equal(zoo.load(folder), model, side=64)
        card = json.loads((folder / "config.json").read_text())
        assert card["base"]["source"] == LITE0 and card["preprocessing"]["mean"] == [0.5, 0.5, 0.5]

    def test_running_statistics_that_moved_are_kept(self, tmp_path: Path) -> None:
        """A frozen norm still counts batches when the model is trained outside of a task."""
        weights = write_base(tmp_path, "test_efficientnet")
        adapter = dict(type="LoRA", rank=1, where="conv")
        model = zoo.create("test_efficientnet", pretrained=weights, num_classes=4, adapter=adapter)
        model.train()
        with torch.no_grad():
            model(torch.rand(2, 3, 64, 64))
        model.eval()
        again = zoo.load(zoo.save(model, tmp_path))
        assert_equal(again, model, side=64)
        assert_equal(zoo.load(zoo.save(again, tmp_path / "again")), model, side=64)

    def test_attach_after_create(self, base: str, tmp_path: Path) -> None:
        """The new classifier is random, frozen by `attach`, and still belongs to what must be saved."""
        model = vit(pretrained=base, adapter=None)
        zoo.attach(model, LORA, name="mine")
        again = zoo.load(zoo.save(trained(model), tmp_path))
        assert torch.equal(run(again), run(model)) and list(attachments(again)) == ["mine"]

    def test_half_precision_base(self, base: str, tmp_path: Path) -> None:
        model = trained(vit(pretrained=base, dtype=torch.bfloat16))
        assert {p.dtype for a in attachments(model).values() for p in a.parameters()} == {torch.float32}
        assert model.norm.weight.dtype == torch.bfloat16
        assert_equal(zoo.load(zoo.save(model, tmp_path)), model)

    def test_saved_folder_as_name_and_as_checkpoint(self, base: str, tmp_path: Path) -> None:
        model = trained(vit(pretrained=base))
        folder = zoo.save(model, tmp_path)
        assert_equal(zoo.create(str(folder)), model)
        assert_equal(vit(pretrained=base, checkpoint=str(folder)), model)
        plain = vit(pretrained=base, adapter=None)
        load_into(plain, folder)
        assert torch.equal(run(plain), run(model))
        with pytest.raises(ZooError, match="comes as it was saved"):
            zoo.create(str(folder), num_classes=5)

    def test_save_over_an_older_save(self, base: str, tmp_path: Path) -> None:
        zoo.save(vit(pretrained=base, adapter="SSF"), tmp_path)
        model = trained(vit(pretrained=base))
        zoo.save(model, tmp_path)
        assert_equal(zoo.load(tmp_path), model)

    def test_card_says_what_is_there(self, base: str, tmp_path: Path) -> None:
        model = vit(pretrained=base)
        labels = [f"class|{i}" for i in range(25)]
        text = (zoo.save(model, tmp_path, labels=labels, metrics={"top1": 0.25}) / "README.md").read_text()
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert text.startswith("---\nlibrary_name:") and f"trained: {count:,} of" in text
        assert "`blocks.0.attn.qkv` | qkv | q+k+v" in text and "(x - mean) / std" in text
        assert "| top1 | 0.25 |" in text and "19. class\\|19" in text and "class\\|20" not in text and "5 more" in text
        assert json.loads((tmp_path / "config.json").read_text())["base"]["sha256"] in text


class TestHub:
    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
        for name in ("ZOO_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the client reads its variable once
        with HubServer() as running:
            monkeypatch.setenv("HF_ENDPOINT", running.url)
            yield running

    def publish(self, server: HubServer, folder: Path, name: str) -> str:
        repo = Repo()
        repo.commit(tree(folder))
        server.repos[f"org/{name}"] = repo
        return f"hf-hub:org/{name}"

    def test_push_and_load(self, server: HubServer) -> None:
        model = trained(vit())
        zoo.push_to_hub(model, "org/mine", token=server.token, labels=["a", "b", "c"])
        again = zoo.load("hf-hub:org/mine")
        assert torch.equal(run(again), run(model)) and again.zoo_card["labels"] == ["a", "b", "c"]
        assert torch.equal(run(zoo.create("hf-hub:org/mine")), run(model))

    @pytest.mark.parametrize(
        "change",
        [
            dict(pretrained="file:/etc/passwd"),
            dict(pretrained="/etc/passwd"),
            dict(pretrained="../../secret.safetensors"),
            dict(pretrained="weights.safetensors"),
            dict(pretrained="hf-hub:org/../../x"),
            dict(name="local-dir:/etc"),
            dict(checkpoint_path="weights.bin"),
            dict(pretrained_cfg_overlay=dict(file="weights.npz", custom_load=True)),
            dict(pretrained=["~/x"]),
        ],
        ids=str,
    )
    def test_paths_of_this_machine(self, server: HubServer, folder: Path, change: dict[str, Any]) -> None:
        edit(folder, lambda card: card["model"].update(change))
        with pytest.raises(ZooError, match=r"refused|malformed|must be a relative"):
            zoo.load(self.publish(server, folder, "evil"))
