"""Selections: which parameters each of them trains, and what attaching one does."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from zoo.adapters.bitfit import BitFit
from zoo.adapters.full import FullFineTuning
from zoo.adapters.inject import attach
from zoo.adapters.last_blocks import LastBlocks
from zoo.adapters.linear_probe import LinearProbe
from zoo.adapters.norm_tuning import NormTuning
from zoo.adapters.selection import base_parameters
from zoo.errors import OptionError, SiteError

C = 768


def base(**options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", **options)


def tiny(name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    options = {**dict(depth=3, embed_dim=32, num_heads=2, img_size=32, patch_size=8, num_classes=5), **options}
    return timm.create_model(name, **options)


def clip() -> nn.Module:
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=32)
    model: nn.Module = CLIP(16, vision, CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=2))
    assert isinstance(model, open_clip.CLIP)
    return model


@pytest.mark.parametrize(
    "kind, options, count",
    [
        (FullFineTuning, {}, 86_567_656),
        (LinearProbe, {}, C * 1000 + 1000),
        (BitFit, {}, 12 * 11 * C + 2 * C + 1000),
        (NormTuning, {}, 25 * 2 * C),
        (LastBlocks, dict(blocks=1), 7_087_872 + 2 * C + C * 1000 + 1000),
        (LastBlocks, dict(blocks=3), 3 * 7_087_872 + 2 * C + C * 1000 + 1000),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_count_on_vit_base(kind: type, options: dict[str, int], count: int) -> None:
    model = base()
    own = dict(model.named_parameters())
    chosen = kind.names(model, **options)  # type: ignore[attr-defined]
    assert sum(own[name].numel() for name in chosen) == count
    assert chosen == [name for name in own if name in set(chosen)]


def test_attach_trains_exactly_the_chosen_and_detach_gives_the_flags_back() -> None:
    model = tiny()
    model.pos_embed.requires_grad_(False)
    attached = attach(model, "BitFit")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == BitFit.names(model)
    assert set(attached.state_dict()) >= set(BitFit.names(model))
    attached.detach()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_bitfit_takes_split_biases_but_no_bias_tables() -> None:
    names = BitFit.names(tiny("beit_base_patch16_224"))
    assert "blocks.0.attn.q_bias" in names and "blocks.0.attn.v_bias" in names
    assert not any("table" in name for name in names)
    assert "visual.transformer.resblocks.0.attn.in_proj_bias" in BitFit.names(clip())
    with pytest.raises(SiteError, match="Linear has none"):
        BitFit.names(nn.Linear(3, 3, bias=False))


def test_linear_probe_finds_the_classifier() -> None:
    assert LinearProbe.names(tiny("deit_tiny_distilled_patch16_224")) == [
        "head.weight", "head.bias", "head_dist.weight", "head_dist.bias",
    ]  # fmt: skip
    assert LinearProbe.names(timm.create_model("resnet18", num_classes=3)) == ["fc.weight", "fc.bias"]
    assert LinearProbe.names(tiny(num_classes=0)) == []


def test_norm_tuning_takes_every_kind_of_norm() -> None:
    resnet = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    names = NormTuning.names(resnet)
    assert {"bn1.weight", "bn1.bias", "layer2.0.downsample.1.weight"} <= set(names)
    owners = {type(resnet.get_submodule(name.rpartition(".")[0])) for name in names}
    assert owners == {nn.BatchNorm2d}
    with pytest.raises(SiteError, match="none with weights"):
        NormTuning.names(nn.Sequential(nn.Linear(2, 2)))


class TestLastBlocks:
    def test_takes_everything_behind(self) -> None:
        names = LastBlocks.names(tiny(), blocks=2)
        tops = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
        assert tops == ["blocks.1", "blocks.2", "norm.weight", "norm.bias", "head.weight", "head.bias"]

    def test_counts_through_stages(self) -> None:
        model = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 8, 8), num_classes=2)
        names = LastBlocks.names(model, blocks=2)
        assert {name.split(".")[0] for name in names} == {"stages", "head"}
        stages = {".".join(name.split(".")[1:4]) for name in names if name.startswith("stages")}
        assert stages == {"2.blocks.1", "3.blocks.0", *{s for s in stages if s.startswith("3.downsample")}}

    def test_asks_which_tower(self) -> None:
        with pytest.raises(SiteError, match="under="):
            LastBlocks.names(clip())
        names = LastBlocks.names(clip(), under="visual")
        assert all(name.startswith(("visual.transformer.resblocks.1.", "visual.ln_post.")) for name in names)

    def test_bad_options(self) -> None:
        for blocks in (0, 4, True, 1.5):
            with pytest.raises(OptionError, match=f"from 1 to 3 .* got {blocks}"):
                LastBlocks.names(tiny(), blocks=blocks)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="no module called 'tower'"):
            LastBlocks.names(tiny(), under="tower")
        with pytest.raises(SiteError, match="none that are known"):
            LastBlocks.names(nn.Linear(2, 2))


def test_selections_see_only_the_base() -> None:
    model = tiny()
    before = FullFineTuning.names(model)
    attach(model, dict(type="Houlsby", width=2), name="a")
    assert FullFineTuning.names(model) == before == [name for name, _ in base_parameters(model)]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    attach(model, "NormTuning", name="b")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained | set(NormTuning.names(model))
