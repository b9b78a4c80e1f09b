"""Saved folders that must not be read: torn, swapped, foreign and hostile ones change nothing and run nothing."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import VIT, edit, put_weights, trained, tree, vit, write_base
from torch import nn

import zoo
from zoo.adapters.inject import attachments
from zoo.checkpoint import load_into
from zoo.errors import CheckpointError, CheckpointFileError, ZooError


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


class TestSaveRefuses:
    def refused(self, model: nn.Module, folder: Path, match: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            zoo.save(model, folder, **options)
        assert not folder.exists()

    def test_what_could_not_come_back(self, base: str, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        self.refused(nn.Linear(2, 2), folder, "not built by zoo.create")
        model = vit(pretrained=base)
        self.refused(model, folder, "plain data", metrics={"loss": object()})
        zoo.merge(model)
        self.refused(model, folder, "merged")

    def test_interrupted_between_files(self, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        zoo.save(vit(pretrained=base), tmp_path)
        before = tree(tmp_path)
        real, done = os.replace, []

        def replace(source: str, target: Path) -> None:
            if done:
                raise KeyboardInterrupt
            done.append(target)
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            zoo.save(trained(vit(pretrained=base)), tmp_path)
        monkeypatch.undo()
        after = tree(tmp_path)
        assert after.keys() == before.keys() and after["config.json"] == before["config.json"]
        assert after["adapter.safetensors"] != before["adapter.safetensors"]
        with pytest.raises(CheckpointFileError, match="not the file that was saved"):
            zoo.load(tmp_path)


class Marker:
    """Pickles as a shell command that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


class TestLoadRefuses:
    @pytest.fixture(autouse=True)
    def nothing_changes(self, base: str, folder: Path, tmp_path: Path) -> Iterator[None]:
        """Whatever a test tried: no file appeared or changed but those the test wrote."""
        self.base, self.folder, self.marker = base, folder, tmp_path / "executed"
        yield
        assert not self.marker.exists()

    def refused(self, match: str, error: type[Exception] = CheckpointFileError, *, into: bool = True) -> None:
        """`load` and `load_into` raise one error; the folder and the model stay as they were."""
        files = tree(self.folder)
        with warnings.catch_warnings(), pytest.raises(error, match=match) as caught:
            warnings.simplefilter("error")
            zoo.load(self.folder)
        assert isinstance(caught.value, ZooError) and "\n" not in str(caught.value)
        assert tree(self.folder) == files
        if into:
            model = vit(pretrained=self.base, adapter=None)
            before = {k: v.clone() for k, v in model.state_dict().items()}
            with pytest.raises(error, match=match):
                load_into(model, self.folder)
            after = model.state_dict()
            assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in after)
            assert not attachments(model) and all(p.requires_grad for p in model.parameters())

    def test_truncated(self) -> None:
        data = (self.folder / "adapter.safetensors").read_bytes()
        (self.folder / "adapter.safetensors").write_bytes(data[:-100])
        self.refused("truncated, or swapped")
        put_weights(self.folder, data[:-100])
        self.refused("truncated or damaged")

    def test_swapped(self, tmp_path: Path) -> None:
        other = zoo.save(vit(pretrained=self.base, adapter="SSF"), tmp_path / "other")
        (self.folder / "adapter.safetensors").write_bytes((other / "adapter.safetensors").read_bytes())
        self.refused("not the file that was saved")
        put_weights(self.folder, (other / "adapter.safetensors").read_bytes())
        self.refused("does not fit the model: unexpected .*missing", CheckpointError)

    def test_wrong_shapes_and_missing_head(self) -> None:
        file = self.folder / "adapter.safetensors"
        tensors = load_file(file)
        save_file({k: (v[:1] if k.endswith("up") else v).contiguous() for k, v in tensors.items()}, file)
        put_weights(self.folder, file.read_bytes())
        self.refused("shapes .*up", CheckpointError)
        save_file({k: v for k, v in tensors.items() if not k.startswith("head.")}, file)
        put_weights(self.folder, file.read_bytes())
        self.refused("other base weights", CheckpointError)

    def test_missing_files(self) -> None:
        config = (self.folder / "config.json").read_bytes()
        (self.folder / "config.json").unlink()
        self.refused("no config.json")
        (self.folder / "config.json").write_bytes(config)
        (self.folder / "adapter.safetensors").unlink()
        self.refused("no adapter.safetensors")

    def test_wrong_base(self, tmp_path: Path) -> None:
        path = Path(self.base.removeprefix("file:"))
        tensors = load_file(path)
        tensors["norm.bias"] += 1e-6
        other = tmp_path / "other.safetensors"
        save_file(tensors, other)
        edit(self.folder, lambda card: card["model"].update(pretrained=f"file:{other}"))
        self.refused(
            r"other base weights.*vit_tiny_patch16_224\.safetensors with hash [0-9a-f]{64}.*other\.safetensors",
            CheckpointError,
            into=False,
        )

    def test_other_formats(self) -> None:
        text = (self.folder / "config.json").read_text()
        for content, match in [
            ("{", "not JSON"),
            ("[1, 2]", "holds a list"),
            ('{"architecture": "resnet18"}', "not a saved zoo model"),
            (text.replace('"format": 1', '"format": 2'), "format 2"),
            (text.replace('"adapters": [', '"adapters": {"a": [').replace('],\n "base"', ']},\n "base"'), "malformed"),
            ("\ufeff\x00", "not JSON"),
        ]:
            (self.folder / "config.json").write_text(content)
            self.refused(match)

    def test_deep_nesting_and_size(self) -> None:
        text = (self.folder / "config.json").read_text()
        for depth in (60, 900, 100_000):
            deep = "[" * depth + "]" * depth
            (self.folder / "config.json").write_text(text.replace('"labels": null', f'"labels": {deep}'))
            self.refused("nests deeper|not JSON")
        (self.folder / "config.json").write_text(text + " " * (17 << 20))
        self.refused("bytes, more than any config")

    def test_pickle_in_place_of_tensors(self) -> None:
        put_weights(self.folder, pickle.dumps(Marker(self.marker)))
        self.refused("not a whole safetensors file")

    def test_huge_header(self) -> None:
        for claimed in (1 << 62, 200_000_000, 0):
            put_weights(self.folder, struct.pack("<Q", claimed) + b"{}" + b"\0" * 100)
            self.refused("claims a header")

    @pytest.mark.parametrize(
        "kind", ["os.system", "subprocess.run", "torch.load", "zoo.os.system", "Linear", 5, ["LoRA"], None]
    )
    @pytest.mark.parametrize("place", ["model", "data_preprocessor", "adapter"])
    def test_types_that_are_not_ours(self, kind: Any, place: str) -> None:
        call = {"type": kind, "command": f"touch {self.marker}"}

        def change(card: dict[str, Any]) -> None:
            if place == "model":
                card["model"] = call
            elif place == "adapter":
                card["adapters"][0]["config"] = call
            else:
                card["model"] = dict(
                    type="ImageClassifier",
                    backbone=dict(type="TimmBackbone", name="vit_tiny_patch16_224", pretrained=self.base, **VIT),
                    head=dict(type="LinearHead", num_classes=3),
                    data_preprocessor=call,
                )

        edit(self.folder, change)
        self.refused("type|no adapter is called", ZooError, into=place == "adapter")

    def test_configs_that_cannot_be_built(self) -> None:
        text = (self.folder / "config.json").read_text()
        for change in [
            lambda card: card["model"].update(name=5),
            lambda card: card["model"].update(depth="two"),
            lambda card: card["model"].update(colour="red"),
            lambda card: card["model"].pop("name"),
            lambda card: card["model"].pop("type"),
        ]:
            (self.folder / "config.json").write_text(text)
            edit(self.folder, change)
            self.refused("cannot be built|no `type`", into=False)
        for change in [
            lambda card: card["adapters"][0].pop("root"),
            lambda card: card["adapters"][0].update(root="blocks.99"),
            lambda card: card["adapters"][0].update(root=7),
            lambda card: card.update(adapters=["LoRA"]),
            lambda card: card["adapters"][0]["config"].update(per_site=5),
        ]:
            (self.folder / "config.json").write_text(text)
            edit(self.folder, change)
            self.refused("malformed adapter entry")
        (self.folder / "config.json").write_text(text)
        edit(self.folder, lambda card: card["adapters"][0]["config"].update(rank="x"))
        self.refused("rank must be", ZooError)
