"""The probe: which sites a model calls, which it only reads, and that it leaves the model as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from site_families import family
from torch import Tensor, nn

from zoo.adapters import probe as probing
from zoo.adapters.probe import correct_modes, derive_example, probe
from zoo.adapters.sites import find_sites, select
from zoo.errors import OptionError, SiteError

# What the tables call bypassed or hosted must be what a forward pass shows, in both directions.
TABLED = [
    "vit", "deit3", "dinov3", "dinov3_qkv_bias", "naflexvit", "swin", "swinv2", "swinv2_cr", "beit", "beitv2",
    "eva02_fused", "eva02_split", "convit", "convnext", "resnet18", "cait", "levit", "siglip", "open_clip_vit",
    "open_clip_rn", "torchvision_vit", "torchvision_swin", "torchvision_swin_v2", "encoder_layer",
]  # fmt: skip


@pytest.mark.parametrize("name", TABLED)
def test_tables_agree_with_a_forward_pass(name: str) -> None:
    model = family(name)
    uses = probe(model, torch.zeros(1, 4, 32) if name == "encoder_layer" else None)
    sites = find_sites(model)
    assert set(uses) == {site.path for site in sites}
    hosted = {site.path for site in sites if site.mode == "mha"}
    for site in sites:
        inside_hosted = site.path.rpartition(".")[0] in hosted
        expected = "read" if site.mode == "weight" or inside_hosted else "called"
        assert uses[site.path] == expected, site


def test_known_bypasses() -> None:
    def bypassed(name: str) -> set[str]:
        return {site.path.rpartition(".")[2] for site in find_sites(family(name)) if site.mode == "weight"}

    for name in ("beit", "beitv2", "eva02_fused", "dinov3_qkv_bias", "swinv2"):
        assert bypassed(name) == {"qkv"}, name
    for name in ("vit", "dinov3", "eva02_split", "swin", "swinv2_cr", "open_clip_vit", "torchvision_vit"):
        assert bypassed(name) == set(), name
    assert bypassed("torchvision_swin") == bypassed("torchvision_swin_v2") == {"qkv", "proj"}
    assert bypassed("open_clip_rn") == {"q_proj", "k_proj", "v_proj", "c_proj"}
    assert bypassed("encoder_layer") == {"self_attn", "out_proj", "linear1", "linear2", "norm1", "norm2"}


class Odd(nn.Module):
    """Calls one layer, reads the weight of a second, ignores a third."""

    image_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.ran = 0

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return F.linear(self.called(x), self.read.weight)


class Stubborn(Odd):
    """Needs real numbers, so it cannot run on shapes alone."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 1 and not self.training and not torch.is_grad_enabled()
        return super().forward(x) if float(x.sum()) >= 0 else x


@pytest.mark.parametrize("kind", [Odd, Stubborn])
def test_three_answers_and_no_trace(kind: type[Odd]) -> None:
    model = kind().train()
    model.read.eval()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    values = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert probe(model, torch.ones(3, 2, 4)) == {"called": "called", "read": "read", "never": "never"}
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.ran == (1 if kind is Stubborn else 0)  # shapes alone need no run of the model itself
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_are_corrected_and_unused_sites_refused() -> None:
    model, example = Odd(), torch.ones(1, 4)
    sites = find_sites(model)
    modes = {site.path: site.mode for site in correct_modes(sites[:2], model, example)}
    assert modes == {"called": "branch", "read": "weight"}
    with pytest.raises(SiteError, match=r"Odd never runs 'never' \(Linear\).*never receive a gradient"):
        correct_modes(sites, model, example)


def test_a_bypassed_module_cannot_carry_a_branch() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp[2](self.mlp[1](self.mlp[0](x)))

    model = Skips()
    chosen = select(find_sites(model), "mlp", (), model_name="Skips")
    with pytest.raises(SiteError, match="never runs 'mlp'"):
        correct_modes(chosen, model, torch.ones(1, 4))


def test_sites_of_a_hosted_attention_keep_their_modes() -> None:
    model = family("open_clip_vit")
    chosen = select(find_sites(model), "visual.*,qkv,out", (), model_name="CLIP")
    assert [site.mode for site in correct_modes(chosen, model)] == ["mha", "branch"] * 2


def test_without_an_example_nothing_is_checked_and_it_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="pass example="):
        assert correct_modes(find_sites(model), model) == find_sites(model)
    with pytest.raises(OptionError, match="pass example="):
        probe(model)


def test_an_example_that_does_not_fit_is_named() -> None:
    with pytest.raises(SiteError, match="Odd does not run on the example"):
        probe(Odd(), torch.ones(1, 5))


def test_examples_are_derived() -> None:
    assert derive_example(family("vit")).shape == (1, 3, 32, 32)
    assert derive_example(family("mixer")).shape == (1, 3, 64, 64)
    assert derive_example(family("convnext")).shape == (1, 3, 224, 224)
    image, text = derive_example(family("open_clip_siglip"))
    assert image.shape == (1, 3, 224, 224) and text.shape == (1, 8) and text.dtype == torch.long
    assert derive_example(family("open_clip_vit").visual).shape == (1, 3, 32, 32)
    task = nn.Module()
    task.backbone = family("vit")
    assert derive_example(task).shape == (1, 3, 32, 32)
    assert derive_example(nn.Linear(3, 3)) is None


def test_keyword_and_tuple_examples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, a: Tensor, *, b: Tensor | None = None) -> Tensor:
            return self.left(a) if b is None else self.left(a) + self.right(b)

    a, b = torch.ones(1, 4), torch.ones(1, 3)
    assert probe(Two(), {"a": a, "b": b}) == {"left": "called", "right": "called"}
    assert probe(Two(), (a,)) == {"left": "called", "right": "never"}


def test_levit_caches_survive_the_probe() -> None:
    """LeViT caches tensors in evaluation mode; shapes without data must not end up there."""
    model = family("levit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe(model)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.isfinite(model(image)).all()


def test_half_precision_and_meta_models() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    assert set(probing.probe(model).values()) == {"called"}
    assert set(probe(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).bfloat16()).values()) == {"called"}
