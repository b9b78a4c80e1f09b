"""The authors' checkpoint files become ours: their outputs from their tensors, errors that name what does not fit."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from backbones.published import convert, convertible
from backbones.slab_norm import RepBN
from zoo.errors import CheckpointError, CheckpointFileError, UnknownNameError

ROOT = Path(__file__).resolve().parents[1]
VIT = dict(img_size=28, patch_size=2, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2)
PVT = dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2), depths=(1, 1, 2, 1))
SHVIT = dict(embed_dim=(16, 24, 32), partial_dim=(5, 6, 9), qk_dim=(4, 4, 4), depth=(1, 2, 1), types=("i", "s", "s"))
GOLDENS: dict[str, tuple[str, str, int, dict[str, Any]]] = {  # model -> file, expected output, classes, its options
    "illama_tiny": (
        "illama/model_rect",
        "out.logits.alpha0.0",
        7,
        dict(img_size=(40, 24), patch_size=8, embed_dim=32, depth=3, num_heads=4),
    ),
    "slab_deit_tiny": ("slab/slab_deit_tiny_dims", "out.logits.eval", 6, VIT),
    "slab_pvt_tiny": ("slab/slab_pvt_small_dims", "out.logits.eval", 6, PVT | dict(img_size=64, attn_type="LLSS")),
    "shvit_s1": ("shvit/model_rect", "out.logits.eval", 7, SHVIT),
    "poolformer_s12_gn": (
        "poolformer/model_rect",
        "out.logits",
        6,
        dict(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20)),
    ),
    "convit_tiny": (
        "convit-gpsa/convit_model_tiny",
        "out.logits",
        7,
        dict(
            img_size=32,
            patch_size=8,
            embed_dim=9,
            depth=4,
            num_heads=4,
            mlp_ratio=2.0,
            qkv_bias=True,
            local_up_to_layer=2,
        ),
    ),
}


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools" / "convert.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def run(*arguments: object) -> int:
    return int(tool().main([str(argument) for argument in arguments]))


@pytest.mark.parametrize("name", GOLDENS)
def test_authors_tensors_give_the_authors_output(name: str, tmp_path: Path) -> None:
    file, output, classes, options = GOLDENS[name]
    tensors = load_file(ROOT / "tests" / "golden" / f"{file}.safetensors")
    torch.save({"model": params(tensors), "epoch": 300}, tmp_path / "theirs.pth")
    made = convert(name, tmp_path / "theirs.pth", num_classes=classes, **options)
    model = timm.create_model(name, **made.options).eval()
    model.load_state_dict(made.state)
    with torch.no_grad():
        torch.testing.assert_close(model(tensors["in.x"]), tensors[output], rtol=1e-5, atol=1e-5)


def cswin_keys(model: nn.Module) -> dict[str, Tensor]:
    """The published layout of SLAB-CSWin, from ours."""
    theirs = {}
    for key, value in model.state_dict().items():
        stage = re.fullmatch(r"stages\.(\d)\.(embed|blocks)\.(\w+)\.(.*)", key)
        if stage is not None:
            index, part, layer, rest = int(stage[1]), *stage.groups()[1:]
            if part == "blocks":
                key = f"stage{index + 1}.{layer}.{rest}"
            elif index == 0:
                key = f"stage1_conv_embed.{0 if layer == 'proj' else 2}.{rest}"
            else:
                key = f"merge{index}.{'conv' if layer == 'proj' else 'norm'}.{rest}"
        theirs[key.replace("head.fc.", "head.")] = value
    return theirs


def swin_keys(model: nn.Module) -> dict[str, Tensor]:
    """The published layout of SLAB-Swin: merging belongs to the stage before, the head is flat, masks are stored."""
    theirs = {}
    for key, value in model.state_dict().items():
        merge = re.fullmatch(r"layers\.(\d)\.downsample\.(.*)", key)
        if merge is not None:
            key = f"layers.{int(merge[1]) - 1}.downsample.{merge[2]}"
        theirs[key.replace("head.fc.", "head.")] = value
    theirs["layers.2.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    theirs["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    return theirs


SWIN = dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=2, img_size=64)
CSWIN = dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), split=2, img_size=64)


@pytest.mark.parametrize(
    ("name", "options", "keys"), [("slab_cswin_tiny", CSWIN, cswin_keys), ("slab_swin_tiny", SWIN, swin_keys)]
)
def test_hierarchical_slab_layouts(name: str, options: dict[str, Any], keys: Any, tmp_path: Path) -> None:
    model = zoo.create(name, num_classes=5, **options)
    theirs = keys(model)
    assert theirs.keys() != model.state_dict().keys()
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    made = convert(name, tmp_path / "theirs.pth", num_classes=5, **options)
    assert made.state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, made.state[key]) for key, value in model.state_dict().items())


def test_models_published_with_repbn_alone(tmp_path: Path) -> None:
    model = zoo.create("prepbn_deit_tiny", num_classes=5, norm_layer=RepBN, **VIT)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    made = convert("prepbn_deit_tiny", tmp_path / "theirs.pth", num_classes=5, **VIT)
    assert made.options["norm_layer"] is RepBN and "norm.alpha" in made.state
    timm.create_model("prepbn_deit_tiny", **made.options).load_state_dict(made.state)


def authors_illama(path: Path, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = zoo.create("illama_tiny", num_classes=1000, **options)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("soft_mask_rate")}
    torch.save({"model": state}, path)
    return state


# ---- the tool ----
def test_tool_writes_a_file_that_zoo_create_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = authors_illama(tmp_path / "theirs.pth")
    out = tmp_path / "model.safetensors"
    assert run("illama_tiny", tmp_path / "theirs.pth", "--out", out) == 0
    assert "tensors of illama_tiny" in capsys.readouterr().out
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["model.safetensors", "theirs.pth"]
    model = zoo.create("illama_tiny", pretrained=f"file:{out}", num_classes=1000)
    assert model.soft_mask_rate == 0.0
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(("name", "size"), [("illama_base.in1k_384", 384), ("illama_base.in1k", 224)])
def test_a_tag_sets_the_image_size(name: str, size: int) -> None:
    # The 384 file keeps its 24 x 24 positions instead of being resized to 14 x 14.
    with torch.device("meta"):
        assert timm.create_model(name).pos_embed.shape[1] == (size // 16) ** 2 + 1


def test_tool_names_the_variant_that_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authors_illama(tmp_path / "theirs.pth")
    out = tmp_path / "model.safetensors"
    assert run("illama_small", tmp_path / "theirs.pth", "--out", out) == 2
    assert (
        capsys.readouterr()
        .err.rstrip()
        .endswith("theirs.pth holds the weights of 'illama_tiny', not of 'illama_small'")
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("illama_tiny", "theirs.pth", "--out", "model.pth"), "--out must end in .safetensors, got 'model.pth'"),
        (("illama_tiny", "theirs.pth", "--out", "no/model.safetensors"), "the folder .*no of --out does not exist"),
        (("illama_tini", "theirs.pth", "--out", "model.safetensors"), "'illama_tini'; did you mean 'illama_tiny'"),
        (("illama_tiny", "gone.pth", "--out", "model.safetensors"), "gone.pth does not exist"),
    ],
)
def test_tool_errors(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(tmp_path / a if "." in a else a for a in arguments)) == 2
    assert re.search(message, capsys.readouterr().err)


# ---- what does not fit ----
def test_every_unmatched_key_and_shape_is_named(tmp_path: Path) -> None:
    options = dict(depth=2, img_size=32)
    state = authors_illama(tmp_path / "theirs.pth", **options)
    del state["norm.weight"], state["blocks.1.norm2.weight"]
    state["extra.weight"], state["other.bias"] = torch.zeros(1), torch.zeros(2)
    state["head.bias"] = torch.zeros(10)
    torch.save({"model": state}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError) as caught:
        convert("illama_tiny", tmp_path / "theirs.pth", **options)
    assert str(caught.value).splitlines()[1:] == [
        "2 missing:",
        "  blocks.1.norm2.weight",
        "  norm.weight",
        "2 unexpected:",
        "  extra.weight",
        "  other.bias",
        "1 of another shape:",
        "  head.bias: expected (1000,), given (10,)",
    ]


@pytest.mark.parametrize("name", ["shvit_s1", "poolformer_s12_gn", "convit_tiny", "slab_pvt_tiny", "slab_swin_tiny"])
def test_foreign_weights_are_one_clear_error(name: str, tmp_path: Path) -> None:
    torch.save({"model": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError) as caught:
        convert(name, tmp_path / "resnet.pth")
    first, second = str(caught.value).splitlines()
    assert first.endswith(f"resnet.pth does not hold the weights of '{name}':")
    assert second.startswith("not ") and "'conv1.weight'" in second


def test_several_sets_and_foreign_objects(tmp_path: Path) -> None:
    state = authors_illama(tmp_path / "theirs.pth", depth=1, img_size=32)
    torch.save({"model": state, "model_ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "both.pth")
    with pytest.raises(CheckpointFileError, match=r"inside= one of \['model', 'model_ema'\]"):
        convert("illama_tiny", tmp_path / "both.pth", depth=1, img_size=32)
    made = convert("illama_tiny", tmp_path / "both.pth", inside="model_ema", depth=1, img_size=32)
    assert torch.equal(made.state["norm.weight"], state["norm.weight"] + 1)
    torch.save({"model": state, "args": Path("run")}, tmp_path / "pickled.pth")
    with pytest.raises(CheckpointFileError, match="asks to call or create pathlib"):
        convert("illama_tiny", tmp_path / "pickled.pth", depth=1, img_size=32)


def test_what_can_be_converted() -> None:
    names = convertible()
    assert {"illama_large", "slab_cswin_small", "prepbn_pvt_tiny", "shvit_s4", "poolformer_m48", "convit_base"} <= {
        *names
    }
    assert not any(name.startswith(("poolformerv2", "halonet")) for name in names)
    with pytest.raises(UnknownNameError, match="no published checkpoints are known for 'halonet_h0'"):
        convert("halonet_h0", "unused.pth")
