"""Sites: every weight once, roles, depths and modes by family, the `where` grammar."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from site_families import FAMILIES, family
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from zoo.adapters.base import Part
from zoo.adapters.inject import attach
from zoo.adapters.sites import describe_sites, find_sites, select
from zoo.errors import SiteError


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_belongs_to_one_site(name: str) -> None:
    model = family(name)
    sites = find_sites(model)
    owned = Counter(id(site.module._parameters[site.weight]) for site in sites if site.parts and site.role != "norm")
    expected = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd):
            expected.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            expected.add(id(module.in_proj_weight))
    assert owned == Counter(dict.fromkeys(expected, 1))
    for site in sites:
        assert model.get_submodule(site.path) is site.module
        covered = sorted(rows for part in site.parts for rows in part.rows)
        if covered and site.role != "norm":
            assert covered[0][0] == 0 and covered[-1][1] == site.weight_shape[0] == site.out_features
            assert all(before[1] == after[0] for before, after in pairwise(covered))
        if isinstance(site.module, nn.Linear):
            assert site.flat_in == site.in_features == site.module.in_features


ROLES = {
    "vit": "embed block norm attn qkv out mlp fc1 fc2 head",
    "swinv2": "embed block norm attn qkv out mlp fc1 fc2 head linear",
    "convnext": "conv block norm mlp fc1 fc2 head",
    "resnet18": "conv block norm head",
    "efficientnet_lite0": "conv block norm head",
    "mixer": "embed block norm mlp fc1 fc2 head",
    "poolformer": "conv block norm mlp fc1 fc2 head",
    "shvit": "embed conv block norm attn qkv out mlp fc1 fc2 head",
    "pvt_v2": "embed conv block norm attn q kv out mlp fc1 fc2 head",
    "eva02_split": "embed block norm attn q k v out mlp fc1 fc2 head",
    "convit": "embed block norm attn qk v qkv out linear mlp fc1 fc2 head",
    "levit": "conv block norm attn qkv q kv out mlp fc1 fc2 head",
    "siglip": "embed block norm attn qkv q kv out mlp fc1 fc2 head",
    "open_clip_rn": "conv block norm attn q k v qkv out mlp fc1 fc2",
    "torchvision_swin": "embed block norm attn qkv out mlp fc1 fc2 head linear",
    "encoder_layer": "block norm attn qkv out fc1 fc2",
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str) -> None:
    assert {site.role for site in find_sites(family(name))} == set(ROLES[name].split())


# ---------------------------------------------------------------- depths, widths, modes


@pytest.mark.parametrize(
    ("name", "blocks"), [("vit", 2), ("swin", 2), ("resnet18", 8), ("efficientnet_lite0", 16), ("torchvision_vit", 2)]
)
def test_blocks_are_numbered(name: str, blocks: int) -> None:
    found = [site for site in find_sites(family(name)) if site.role == "block"]
    assert [site.depth for site in found] == list(range(blocks))
    if name != "swin":  # patch merging between the stages doubles the width
        assert all(before.out_features == after.in_features for before, after in pairwise(found))


def test_depth_of_what_lies_inside_and_outside_of_blocks() -> None:
    depths = {site.path: site.depth for site in find_sites(family("vit"))}
    assert depths["blocks.1.attn.qkv"] == depths["blocks.1"] == 1
    assert depths["patch_embed.proj"] is None and depths["norm"] is None and depths["head"] is None


def test_each_tower_counts_for_itself() -> None:
    sites = find_sites(family("open_clip_vit"))
    blocks = {site.path: site.depth for site in sites if site.role == "block"}
    assert blocks == {
        "visual.transformer.resblocks.0": 0, "visual.transformer.resblocks.1": 1,
        "transformer.resblocks.0": 0, "transformer.resblocks.1": 1,
    }  # fmt: skip


def test_multihead_attention_offers_its_packed_weight_and_its_output() -> None:
    sites = find_sites(family("open_clip_vit").visual)
    packed = next(site for site in sites if site.path == "transformer.resblocks.0.attn" and site.role == "qkv")
    assert (packed.mode, packed.weight, packed.weight_shape) == ("mha", "in_proj_weight", (192, 64))
    assert [part.rows for part in packed.parts] == [((0, 64),), ((64, 128),), ((128, 192),)]
    out = next(site for site in sites if site.path == "transformer.resblocks.0.attn.out_proj")
    assert (out.role, out.mode) == ("out", "branch")


def test_separate_widths_in_multihead_attention() -> None:
    sites = find_sites(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    found = {site.role: (site.mode, site.weight, site.in_features) for site in sites if site.role != "attn"}
    assert found == {
        "q": ("weight", "q_proj_weight", 8),
        "k": ("weight", "k_proj_weight", 6),
        "v": ("weight", "v_proj_weight", 4),
        "out": ("weight", "weight", 8),
    }


def test_own_forward_over_multihead_attention_is_adapted_through_its_weight() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.in_proj_weight)[..., :8]

    assert next(site for site in find_sites(Mine(8, 2)) if site.role == "qkv").mode == "weight"


def test_grouped_and_transposed_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 2))
    grouped, transposed = find_sites(model)
    assert (grouped.role, grouped.in_features, grouped.flat_in) == ("conv", 8, 18)
    assert (transposed.role, transposed.parts) == ("deconv", ())


def test_unknown_model_offers_plain_roles() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Sequential(nn.GELU(), nn.Linear(6, 2, bias=False)))
    assert [(site.path, site.role, site.depth) for site in find_sites(model)] == [
        ("0", "linear", None), ("1", "norm", None), ("2.1", "linear", None)
    ]  # fmt: skip
    assert [site.path for site in find_sites(nn.Linear(3, 3))] == [""]


def test_foreign_class_of_a_known_name_keeps_its_weight_whole() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(6, 18)

    Attention.__module__ = "someone.levit"
    site = next(site for site in find_sites(Attention()) if site.role == "qkv")
    assert site.parts == (Part("qkv", ((0, 18),)),)


@pytest.mark.parametrize("name", ["vit", "beit", "open_clip_vit", "torchvision_swin", "encoder_layer"])
def test_attached_adapters_are_no_sites_and_change_none(name: str) -> None:
    model = copy.deepcopy(family(name))
    before = find_sites(model)
    example = torch.zeros(1, 4, 32) if name == "encoder_layer" else None
    attach(model, dict(type="LoRA", rank=2), where="q,v,fc1", example=example)
    assert find_sites(model) == before


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(SiteError, match="run the model once"):
        find_sites(nn.Sequential(nn.LazyLinear(4)))


# ---------------------------------------------------------------- select


def _chosen(name: str, where: object, default: tuple[str, ...] = ("q", "v")) -> list[tuple[str, list[str]]]:
    sites = find_sites(family(name))
    return [(site.path, [part.role for part in site.parts]) for site in select(sites, where, default, model_name=name)]  # type: ignore[arg-type]


QKV = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]


def test_roles_on_a_fused_weight() -> None:
    assert _chosen("vit", None) == [(path, ["q", "v"]) for path in QKV]
    assert _chosen("vit", "v, q") == [(path, ["q", "v"]) for path in QKV]
    assert _chosen("vit", ["k"]) == [(path, ["k"]) for path in QKV]
    assert _chosen("vit", "qkv") == [(path, ["qkv"]) for path in QKV]
    assert _chosen("vit", "qkv,!q") == [(path, ["kv"]) for path in QKV]
    assert _chosen("vit", "q,k,v,!k") == [(path, ["q", "v"]) for path in QKV]
    (site, _) = select(find_sites(family("vit")), "kv", (), model_name="vit")
    assert site.parts == (Part("kv", ((48, 144),)),) and site.role == "qkv"


def test_roles_on_split_projections() -> None:
    assert [path for path, _ in _chosen("eva02_split", "qkv,depth=0")] == [f"blocks.0.attn.{x}_proj" for x in "qkv"]
    assert [path for path, _ in _chosen("eva02_split", "v,depth=0")] == ["blocks.0.attn.v_proj"]
    pooled = "stages.0.blocks.0.attn"
    assert _chosen("pvt_v2", "qkv,depth=0") == [(f"{pooled}.q", ["q"]), (f"{pooled}.kv", ["kv"])]
    assert _chosen("pvt_v2", "v,depth=0") == [("stages.0.blocks.0.attn.kv", ["v"])]


def test_globs_depths_and_exclusions() -> None:
    towers = [f"visual.transformer.resblocks.{i}.attn" for i in (0, 1)]
    assert [path for path, _ in _chosen("open_clip_vit", "visual.*")] == towers
    assert [path for path, _ in _chosen("vit", "fc1,depth>=1")] == ["blocks.1.mlp.fc1"]
    assert [path for path, _ in _chosen("vit", "fc1,fc2,depth<1,!*.fc2")] == ["blocks.0.mlp.fc1"]
    assert [path for path, _ in _chosen("resnet18", "conv,depth=2-3,!*.downsample.*")] == [
        f"layer2.{block}.conv{i}" for block in (0, 1) for i in (1, 2)
    ]
    both = ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert [path for path, _ in _chosen("vit", "blocks.1.*,blocks.0.mlp.*,fc1")] == both


def test_an_exact_path_needs_no_role() -> None:
    assert _chosen("vit", "blocks.1.attn.proj") == [("blocks.1.attn.proj", ["out"])]
    assert _chosen("vit", QKV[0]) == [(QKV[0], ["q", "v"])]
    assert _chosen("vit", "head") == _chosen("vit", ["head"]) == [("head", ["head"])]


def test_the_head_is_never_chosen_by_the_way() -> None:
    paths = [path for path, _ in _chosen("vit", "*", ())]
    assert "blocks.0.mlp.fc1" in paths and "head" not in paths


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("qvk", "'qvk' is no role.*did you mean 'qkv'"),
        ("fc3", "did you mean 'fc"),
        ("blocks.9.*", "'blocks.9.\\*' is no path of vit"),
        ("q,depth>7", "chooses nothing on vit.*depth 0-1"),
        ("depth", "is no depth term"),
        ("depth<1-3", "is no depth term"),
        ("blocks", "write 'blocks.\\*'"),
        ("blocks.*.norm*", "no role was named"),
        ("!qq", "'!qq' is no role"),
        ("conv", "chooses nothing on vit.*qkv x2 \\(e.g. blocks.0.attn.qkv\\)"),
        ([], "names nothing"),
        (" , ", "names nothing"),
    ],
)
def test_what_cannot_be_chosen_says_why(where: object, says: str) -> None:
    with pytest.raises(SiteError, match=says):
        _chosen("vit", where)


def test_without_default_roles_something_must_be_named() -> None:
    with pytest.raises(SiteError, match="say in `where`"):
        _chosen("vit", None, ())


def test_description_folds_equal_blocks() -> None:
    lines = describe_sites(find_sites(family("vit"))).splitlines()
    line = next(line for line in lines if line.startswith("blocks.*.attn.qkv"))
    assert line.split() == ["blocks.*.attn.qkv", "qkv", "48", "->", "144", "q", "k", "v", "branch", "0-1", "2"]
    assert len(lines) == 1 + 12
