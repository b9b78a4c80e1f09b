"""The baseline adapters: parameter counts, the papers' formulas, prompts, layouts and merging."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.adapters.adaptformer import AdaptFormer
from zoo.adapters.base import Part, Site
from zoo.adapters.bottleneck import channels_first
from zoo.adapters.houlsby import Houlsby
from zoo.adapters.inject import attach, using
from zoo.adapters.pfeiffer import Pfeiffer
from zoo.adapters.ssf import SSF
from zoo.adapters.vpt import VPT
from zoo.errors import OptionError, SiteError

TINY = dict(depth=2, embed_dim=32, num_heads=2, img_size=32, patch_size=8, num_classes=5)


def vit(name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **options}).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.1)
    return model


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def randomise(attached: object) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in attached.parameters():  # type: ignore[attr-defined]
            parameter.add_(0.3 * torch.randn_like(parameter))


def site(module: nn.Module, role: str, inputs: int, outputs: int | None = None) -> Site:
    return Site("here", role, 0, module, inputs, inputs if outputs is None else outputs)


def mlp_site(width: int = 6) -> Site:
    return site(nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)), "mlp", width)


@pytest.mark.parametrize("name, width", [("vit_tiny_patch16_224", 192), ("vit_base_patch16_224", 768)])
@pytest.mark.parametrize(
    "config, count",
    [
        (dict(type="Houlsby", width=64), lambda c: 12 * 2 * (2 * c * 64 + 64 + c)),
        (dict(type="Pfeiffer"), lambda c: 12 * (2 * c * (c // 16) + c // 16 + c)),
        (dict(type="AdaptFormer"), lambda c: 12 * (2 * c * 64 + 64 + c)),
        (dict(type="SSF"), lambda c: 2 * c * (1 + 12 * (1 + 3 + 1 + 1 + 4 + 1) + 1)),
        (dict(type="VPT", tokens=10), lambda c: 12 * 10 * c),
        (dict(type="VPT", tokens=10, deep=False), lambda c: 10 * c),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_parameter_count(name: str, width: int, config: dict[str, object], count: object) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        attached = attach(model, config)
    assert sum(p.numel() for p in attached.parameters()) == count(width)  # type: ignore[operator]


def test_ssf_count_is_the_papers() -> None:
    with torch.device("meta"):
        attached = attach(timm.create_model("vit_base_patch16_224", num_classes=0), "SSF")
    assert sum(p.numel() for p in attached.parameters()) == 205_824  # table 1: 0.205 M besides the head


@pytest.mark.parametrize("config", ["Houlsby", "Pfeiffer", "AdaptFormer", dict(type="SSF", std=0.0)], ids=str)
def test_fresh_adapter_is_exactly_the_base(config: str | dict[str, object]) -> None:
    model, x = vit(), images()
    with torch.no_grad():
        before = model(x)
        attached = attach(model, config)
        assert torch.equal(model(x), before)
        randomise(attached)
        assert (model(x) - before).abs().max() > 1e-2


@pytest.mark.parametrize("config", ["SSF", "VPT"])
def test_methods_that_start_elsewhere_say_so(config: str) -> None:
    model, x = vit(), images()
    with torch.no_grad():
        before = model(x)
        attached = attach(model, config)
        assert not torch.equal(model(x), before)
    assert not any(placed.adapter.identity for placed in attached.placed)


def test_bottleneck_formulas() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    for adapter, act, source, scale in (
        (Houlsby(mlp_site(), width=3), F.gelu, y, 1.0),
        (Pfeiffer(mlp_site(), reduction=2), F.relu, y, 1.0),
        (AdaptFormer(mlp_site(), width=3, scale=0.1).eval(), F.relu, x, 0.1),
    ):
        core = adapter.bottleneck
        for parameter in core.parameters():
            nn.init.normal_(parameter)
        expected = y + scale * (act(source @ core.down.weight.T + core.down.bias) @ core.up.weight.T + core.up.bias)
        torch.testing.assert_close(adapter.after(x, y), expected)


def test_initial_values() -> None:
    torch.manual_seed(0)
    wide = mlp_site(512)
    houlsby, adaptformer = Houlsby(wide), AdaptFormer(wide)
    down = houlsby.bottleneck.down.weight
    assert down.abs().max() <= 0.02 and 0.008 < down.std() < 0.01
    assert 0.9 / 512**0.5 < adaptformer.bottleneck.down.weight.abs().max() <= 1 / 512**0.5
    vpt = VPT(site(vit(embed_dim=32).blocks[0], "block", 32), tokens=100, patch_size=8)
    bound = (6 / (3 * 64 + 32)) ** 0.5
    assert 0.95 * bound < vpt.prompts.abs().max() <= bound
    ssf = SSF(Site("here", "linear", 0, nn.Linear(4, 4096), 4, 4096))
    assert abs(ssf.scale.mean() - 1) < 2e-3 and abs(ssf.shift.std() - 0.02) < 2e-3


def test_dropout_follows_the_mode() -> None:
    adapter = AdaptFormer(mlp_site(), width=32, dropout=0.5)
    nn.init.normal_(adapter.bottleneck.up.weight)
    x = torch.randn(1, 4, 6)
    assert not torch.equal(adapter.after(x, x), adapter.after(x, x))
    adapter.eval()
    assert torch.equal(adapter.after(x, x), adapter.after(x, x))


@pytest.mark.parametrize("kind", [Houlsby, AdaptFormer])
def test_channels_first_is_the_same_map_pixel_by_pixel(kind: type[Houlsby] | type[AdaptFormer]) -> None:
    torch.manual_seed(0)
    convolutions = site(nn.Sequential(nn.Conv2d(6, 12, 1), nn.GELU(), nn.Conv2d(12, 6, 1)), "mlp", 6)
    first, last = kind(convolutions, width=3).eval(), kind(mlp_site(), width=3).eval()
    assert channels_first(convolutions) and not channels_first(mlp_site())
    with torch.no_grad():
        for a, b in zip(first.parameters(), last.parameters(), strict=True):
            b.copy_(a.normal_().reshape(b.shape))
    x, y = torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)
    expected = last.after(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(first.after(x, y), expected)


def test_layout_comes_from_the_first_layer() -> None:
    pvt = nn.ModuleDict(dict(fc1=nn.Linear(6, 12), dwconv=nn.Conv2d(12, 12, 3, groups=12), fc2=nn.Linear(12, 6)))
    assert not channels_first(site(pvt, "mlp", 6))
    assert not channels_first(site(nn.MultiheadAttention(6, 2), "attn", 6))
    with pytest.raises(SiteError, match=r"here .AvgPool2d. holds no Linear or Conv2d"):
        Houlsby(site(nn.AvgPool2d(3), "attn", 6))


class TestSSF:
    def test_merged_is_unmerged_where_a_bias_has_to_be_made(self) -> None:
        torch.manual_seed(0)
        model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=5).eval()
        plain = copy.deepcopy(model.state_dict())
        attached = attach(model, "SSF")
        randomise(attached)
        with torch.no_grad():
            adapted = model(images(64))
            attached.merge()
            torch.testing.assert_close(model(images(64)), adapted, rtol=1e-5, atol=1e-5)
            assert model.conv1.bias is not None
            attached.unmerge()
        assert model.conv1.bias is None
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in plain.items())

    def test_a_norm_with_activation_scales_before_the_activation(self) -> None:
        norm = timm.layers.BatchNormAct2d(3).eval()
        model = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
        attached = attach(model, dict(type="SSF", where="norm"), example=torch.zeros(1, 3, 4, 4))
        adapter = attached.placed[0].adapter
        with torch.no_grad():
            adapter.scale.copy_(torch.tensor([2.0, -1.0, 0.5]))
            adapter.shift.copy_(torch.tensor([0.1, 0.2, -0.3]))
            x = torch.randn(2, 3, 4, 4)
            z = F.batch_norm(model[0](x), norm.running_mean, norm.running_var)
            scale, shift = adapter.scale.view(3, 1, 1), adapter.shift.view(3, 1, 1)
            torch.testing.assert_close(model(x), F.relu(z * scale + shift))

    def test_only_the_chosen_rows_move(self) -> None:
        torch.manual_seed(0)
        qkv = nn.Linear(4, 12)
        parts = (Part("q", ((0, 4),)), Part("v", ((8, 12),)))
        adapter = SSF(Site("here", "qkv", 0, qkv, 4, 12, parts), std=1.0)
        assert adapter.scale.shape == (8,)
        x = torch.randn(3, 4)
        y = adapter.after(x, qkv(x))
        assert torch.equal(y[:, 4:8], qkv(x)[:, 4:8])
        torch.testing.assert_close(y[:, 8:], qkv(x)[:, 8:] * adapter.scale[4:] + adapter.shift[4:])
        bias = adapter.rebias(qkv.weight, qkv.bias)
        torch.testing.assert_close(F.linear(x, adapter.reweight(qkv.weight), bias), y)

    def test_refuses_what_it_cannot_move(self) -> None:
        bypassed = Site("a.qkv", "qkv", 0, nn.Linear(4, 12), 4, 12, mode="weight")
        with pytest.raises(SiteError, match=r"a.qkv .Linear. is never called"):
            SSF(bypassed)
        with pytest.raises(SiteError, match="standardises its weight"):
            SSF(site(StdConv2d(4, 4, 3), "conv", 4))
        with pytest.raises(SiteError, match=r"RmsNorm. has no bias"):
            SSF(site(timm.layers.RmsNorm(4), "norm", 4))
        with pytest.raises(OptionError, match=r"std must be .* got -1"):
            SSF(site(nn.Linear(4, 4), "linear", 4), std=-1.0)


class TestVPT:
    MODELS = [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_small_patch14_reg4_dinov2", {}, 5),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_tiny_patch16_224", dict(class_token=False, global_pool="avg"), 0),
    ]

    @pytest.mark.parametrize("name, options, prefix", MODELS)
    @pytest.mark.parametrize("deep", [True, False])
    def test_equals_prompts_between_prefix_and_patches(
        self, name: str, options: dict[str, object], prefix: int, deep: bool
    ) -> None:
        """The paper's sequence [class, prompts, patches], written out block by block."""
        model, x = vit(name, **options), images()
        assert model.num_prefix_tokens == prefix
        attached = attach(model, dict(type="VPT", tokens=3, deep=deep))
        randomise(attached)
        prompts = attached.parameters()
        with torch.no_grad(), using(model):
            t = model._pos_embed(model.patch_embed(x))
            for index, block in enumerate(model.blocks):
                if deep or index == 0:
                    p = prompts[index].expand(2, -1, -1)
                    t = torch.cat([t[:, :prefix], p, t[:, prefix:]], 1)
                t = block(t)
                if deep or index == len(model.blocks) - 1:
                    t = torch.cat([t[:, :prefix], t[:, prefix + 3 :]], 1)
            expected = model.forward_head(model.norm(t))
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    def test_token_counts_inside_and_between_blocks(self) -> None:
        model, x = vit("vit_small_patch14_reg4_dinov2"), images()
        attach(model, dict(type="VPT", tokens=3))
        inside, between = [], []
        for block in model.blocks:
            block.attn.register_forward_pre_hook(lambda _, args: inside.append(args[0].shape[1]))
            block.register_forward_hook(lambda _, args, y: between.append((args[0].shape[1], y.shape[1])))
        with torch.no_grad():
            features = model.forward_features(x)
        tokens = 1 + 4 + 16
        assert inside == [tokens + 3] * 2 and between == [(tokens, tokens)] * 2 and features.shape[1] == tokens
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 2

    def test_shallow_prompts_enter_first_and_leave_last(self) -> None:
        model = vit(depth=4)
        attached = attach(model, dict(type="VPT", tokens=3, deep=False, where="depth=1-2"))
        assert [key for key, _ in attached.named_parameters()] == ["blocks.1.adapters.default.prompts"]
        seen: list[int] = []
        for block in model.blocks:
            block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        with torch.no_grad():
            model(images())
        assert seen == [17, 20, 20, 17]

    def test_check_leaves_random_stream_and_modes_alone(self) -> None:
        block = vit(proj_drop_rate=0.5).blocks[0].train()
        modes = [module.training for module in block.modules()]
        here = site(block, "block", 32)
        torch.manual_seed(4)
        first = VPT(here).prompts.detach()
        torch.manual_seed(4)
        assert torch.equal(first, VPT(here).prompts)
        bound = (6 / (3 * 256 + 32)) ** 0.5
        torch.manual_seed(4)
        assert torch.equal(first, torch.empty(10, 32).uniform_(-bound, bound))
        assert modes == [module.training for module in block.modules()] and all(modes)

    def test_refuses_blocks_that_know_positions(self) -> None:
        for name, options, words in (
            ("beit_base_patch16_224", {}, "any number of tokens"),
            ("eva02_tiny_patch14_224", {}, "rotary embedding"),
        ):
            with pytest.raises(SiteError, match=words):
                attach(vit(name, **options), "VPT")
        late = nn.TransformerEncoderLayer(32, 2, 8)
        with pytest.raises(SiteError, match="not batch-first"):
            VPT(site(late, "block", 32))


@pytest.mark.parametrize(
    "config, words",
    [
        (dict(type="Houlsby", width=0), "width must be .* got 0"),
        (dict(type="Houlsby", widht=8), "did you mean 'width'"),
        (dict(type="Pfeiffer", reduction=0.5), "reduction must be .* got 0.5"),
        (dict(type="AdaptFormer", scale=0.0), "scale must be .* got 0.0"),
        (dict(type="AdaptFormer", dropout=1.0), "dropout must be .* got 1.0"),
        (dict(type="VPT", tokens=True), "tokens must be .* got True"),
        (dict(type="VPT", patch_size=0), "patch_size must be .* got 0"),
    ],
    ids=str,
)
def test_bad_options(config: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        attach(vit(), config)


def test_adapters_stay_off_unfit_roles() -> None:
    with pytest.raises(SiteError, match=r"AdaptFormer cannot sit on .* attn"):
        attach(vit(), dict(type="AdaptFormer", where="attn"))
