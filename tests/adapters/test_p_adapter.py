"""p-Adapter: the reference's attention with graphs of three kinds, limits of p and mu, and where it can sit."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from adapter_checks import MODELS, check_compiles, check_half, check_round_trips, clip, golden, run, shake, vit
from torch import Tensor, nn

from zoo.adapters.attended import attended
from zoo.adapters.inject import attach, using
from zoo.adapters.p_adapter import PAdapter, PAdapterFFN, attention_weights, message_passing
from zoo.adapters.sites import find_sites
from zoo.attention.cached import CachedAttention
from zoo.errors import OptionError, SiteError

CLOSE = dict(atol=1e-5, rtol=1e-5)
CASES = ("self_train_causal", "self_decode_past6", "cross_pool5")


class Layer(nn.Module):
    """The reference's attention sublayer, post-norm."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.attn = CachedAttention(width, heads, context_width=context_width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        return self.norm(self.attn(x, *rest, **more)[0] + x)


def config(**options: Any) -> dict[str, Any]:
    return dict(type="PAdapter", reduction=4, mu=1.0, **options)


def layer_of(case: str) -> tuple[Layer, Any, dict[str, Tensor], dict[str, Any]]:
    tensors, about = golden(f"p-adapter/{case}")
    size = about["config"]
    context = size["encoder_width"] if about["is_cross_attention"] else None
    model = Layer(size["hidden_size"], size["num_attention_heads"], context)
    for theirs, ours in (
        ("self.query", "attn.q_proj"),
        ("self.key", "attn.k_proj"),
        ("self.value", "attn.v_proj"),
        ("output.dense", "attn.out_proj"),
        ("output.LayerNorm", "norm"),
    ):
        copy_into(model.get_submodule(ours), tensors, theirs)
    inputs = dict(x=tensors["in.hidden_states"].requires_grad_())
    if "in.encoder_hidden_states" in tensors:
        inputs |= dict(context=tensors["in.encoder_hidden_states"], mask=tensors["in.encoder_attention_mask"])
    if "in.attention_mask" in tensors:
        inputs["mask"] = tensors["in.attention_mask"]
    if "in.past_key" in tensors:
        inputs["cache"] = (tensors["in.past_key"], tensors["in.past_value"])
    return model.eval(), inputs, tensors, about


def copy_into(layer: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    layer.load_state_dict({key: tensors[f"param.{name}.{key}"] for key in layer.state_dict()})


def adapt(model: nn.Module, inputs: dict[str, Any], about: dict[str, Any]) -> PAdapter:
    size = about["config"]
    settings = dict(
        type="PAdapter",
        reduction=size["text_laplacian_adapter_reduction_factor"],
        p=about["p"],
        mu=size["laplacian_adapter_mu"],
        pool=size["image_sample_len"],
    )
    example = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return attach(model, settings, example=example).placed[0].adapter


NAMES = {"nodes": "text_laplacian_adapter_i", "gate": "text_laplacian_adapter_gate", "up": "text_laplacian_adapter_o"}


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    model, inputs, tensors, about = layer_of(case)
    torch.testing.assert_close(model(**inputs), tensors["out.without_adapter"], **CLOSE)
    adapter = adapt(model, inputs, about)
    for ours, theirs in NAMES.items():
        copy_into(getattr(adapter, ours), tensors, f"output.{theirs}")
    with torch.no_grad():
        adapter.p.copy_(tensors["param.output.laplacian_adapter_p"])
        adapter.theta.copy_(tensors["param.output.laplacian_adapter_mu"])
    y = model(**inputs)
    torch.testing.assert_close(y, tensors["out.hidden_states"], **CLOSE)
    (y * tensors["in.cotangent"]).sum().backward()
    torch.testing.assert_close(inputs["x"].grad, tensors["grad.hidden_states"], atol=1e-5, rtol=1e-4)
    for ours, theirs in NAMES.items():
        for key, parameter in getattr(adapter, ours).named_parameters():
            torch.testing.assert_close(parameter.grad, tensors[f"grad.output.{theirs}.{key}"], atol=1e-5, rtol=1e-4)
    for ours, theirs in (("p", "p"), ("theta", "mu")):
        gradient = tensors[f"grad.output.laplacian_adapter_{theirs}"]
        torch.testing.assert_close(getattr(adapter, ours).grad, gradient, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)
    nn.init.zeros_(adapter.up.weight)
    nn.init.zeros_(adapter.up.bias)
    torch.testing.assert_close(model(**inputs), tensors["out.without_adapter"], **CLOSE)


def test_golden_feed_forward() -> None:
    tensors, about = golden("p-adapter/ffn_adapter")
    x, hidden = tensors["in.input_tensor"], tensors["in.hidden_states"]
    mlp = timm.layers.Mlp(32, 40)
    model = nn.ModuleDict(dict(mlp=mlp))
    site = next(site for site in find_sites(model) if site.role == "mlp")
    adapter = PAdapterFFN(site, reduction=about["config"]["text_ffn_adapter_reduction_factor"])
    copy_into(adapter.down, tensors, "text_ffn_adapter.0")
    copy_into(adapter.up, tensors, "text_ffn_adapter.2")
    copy_into(mlp.fc2, tensors, "dense")
    norm = nn.LayerNorm(32, eps=1e-12)
    copy_into(norm, tensors, "LayerNorm")
    torch.testing.assert_close(norm(adapter.after(x, mlp.fc2(hidden)) + x), tensors["out.y"], **CLOSE)


def graph(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(2, 3, 5, 7).softmax(-1), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)


def test_limits_of_p_and_mu() -> None:
    weights, queries, keys = graph()
    square = torch.randn(2, 3, 7, 7).softmax(-1)
    two, small, huge = torch.tensor(2.0), torch.tensor(0.7), torch.tensor(1e12)
    plain = message_passing(square, keys, keys, two, small, own=True)
    torch.testing.assert_close(plain, (square @ keys + small * keys) / (1 + small), **CLOSE)
    torch.testing.assert_close(message_passing(square, keys, keys, two * 0.75, huge, own=True), keys, **CLOSE)
    assert message_passing(weights, queries, keys, two * 0.75, huge, own=False).abs().max() < 1e-5
    near = message_passing(square, keys, keys, torch.tensor(1.25), torch.tensor(1e-6), own=True)
    torch.testing.assert_close(near, keys, atol=0.05, rtol=0.05)  # self-loops outweigh the rest
    apart = message_passing(square, keys, keys, torch.tensor(1.25), torch.tensor(1e-6), own=True, self_loops=False)
    assert (apart - keys).abs().max() > 0.5


def test_the_two_sided_graph_is_the_whole_one() -> None:
    weights, queries, keys = graph()
    nodes = torch.cat([queries, keys], 2)
    whole = torch.zeros(2, 3, 12, 12)
    whole[..., :5, 5:] = weights
    whole[..., 5:, :5] = weights.transpose(-2, -1)
    p, mu = torch.tensor(1.5), torch.tensor(0.3)
    expected = message_passing(whole, nodes, nodes, p, mu, own=False)[..., :5, :]
    torch.testing.assert_close(message_passing(weights, queries, keys, p, mu, own=False), expected, **CLOSE)


def test_order_of_values_matters_only_with_pooling() -> None:
    for pool in (None, 4):
        torch.manual_seed(1)
        model = Layer(16, 2, 12).eval()
        x, context = torch.randn(2, 3, 16), torch.randn(2, 9, 12)
        attached = attach(model, config(pool=pool), example=dict(x=x, context=context))
        shake(attached)
        shuffled = context[:, torch.randperm(9)]
        assert torch.allclose(model(x, context), model(x, shuffled), atol=1e-5) == (pool is None)


def test_no_nan_for_identical_tokens_and_masked_keys() -> None:
    model = Layer(16, 2)
    attached = attach(model, config(p=1.25), example=torch.zeros(1, 3, 16))
    x = torch.ones(2, 5, 16).requires_grad_()
    model(x, mask=torch.full((1, 1, 5, 5), -1e4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attached.parameters())
    seen = attended(model.attn, x, None, torch.full((1, 1, 5, 5), float("-inf")))
    assert attention_weights(seen).isfinite().all()
    with torch.no_grad():
        attached.placed[0].adapter.p.fill_(-3.0)  # training may carry p there; it counts as 1
    assert model(x).isfinite().all()


def test_decoding_with_a_cache_is_the_whole_sequence_without_adapters() -> None:
    torch.manual_seed(2)
    model = CachedAttention(16, 2).eval()
    x = torch.randn(2, 6, 16)
    causal = torch.full((6, 6), float("-inf")).triu(1)
    whole, _ = model(x, mask=causal)
    steps, cache = [], None
    for i in range(6):
        y, cache = model(x[:, i : i + 1], cache=cache)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
    assert cache is not None and cache[0].shape == (2, 2, 6, 8)


@pytest.mark.parametrize("name", MODELS)
def test_on_towers(name: str) -> None:
    base, model = MODELS[name](), MODELS[name]()
    attached = attach(model, config())
    assert len(attached.placed) == (2 if name == "timm ViT" else 4)
    shake(attached, 0.1)  # not so far that p falls below 1, where it no longer counts
    y = run(model)
    assert not torch.allclose(y, run(base), atol=1e-3)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in attached.parameters())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, _ in attached.named_parameters()}
    with using(model), torch.no_grad():
        torch.testing.assert_close(run(model), run(base), atol=2e-6, rtol=1e-5)
    with pytest.raises(SiteError, match="no merged form"):
        attached.merge()


def test_multihead_attention_and_timm_attention_agree() -> None:
    torch.manual_seed(3)
    stock = timm.layers.Attention(16, num_heads=2, qkv_bias=True).eval()
    torch_one = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    torch_one.load_state_dict(
        dict(
            in_proj_weight=stock.qkv.weight,
            in_proj_bias=stock.qkv.bias,
            **{f"out_proj.{k}": v for k, v in stock.proj.state_dict().items()},
        )
    )

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch_one

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    class Timm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = stock

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x)

    x = torch.randn(2, 5, 16)
    models = [Torch(), Timm()]
    sets = [attach(model, config(where="attn"), example=x) for model in models]
    shake(sets[0])
    sets[1].load_state_dict(sets[0].state_dict())
    torch.testing.assert_close(models[0](x), models[1](x), **CLOSE)


@pytest.mark.parametrize("whole", [config(where="attn"), dict(type="Houlsby", width=4, where="attn")], ids=str)
@pytest.mark.parametrize("inner", ["q, v", "out"])
def test_adapters_of_an_attention_and_of_its_projections_run_together(whole: dict[str, Any], inner: str) -> None:
    low_rank = dict(type="LoRA", rank=2, init="both_normal", where=inner)
    outputs = []
    for order in ((whole, low_rank), (low_rank, whole)):
        model = clip()
        sets = {one["type"]: attach(model, one, name=one["type"], freeze=False) for one in order}
        with torch.no_grad():
            torch.manual_seed(4)
            for kind in sorted(sets):
                for parameter in sets[kind].parameters():
                    parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
        outputs.append(run(model))
        with using(model, whole["type"]):
            alone = run(model)
        assert not torch.allclose(outputs[-1], alone, atol=1e-3)
        sets["LoRA"].merge()
        torch.testing.assert_close(run(model), outputs[-1], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-5, rtol=1e-5)


def test_save_load_copy_half_and_compile() -> None:
    check_round_trips(vit, config())
    check_half(vit, config())
    check_compiles(config())
    check_round_trips(vit, dict(type="PAdapterFFN"))


def test_counts() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", depth=1)
    attention = attach(model, dict(type="PAdapter"), name="a")
    feed_forward = attach(model, dict(type="PAdapterFFN"), name="b")
    sizes = [sum(p.numel() for p in one.parameters()) for one in (attention, feed_forward)]
    assert sizes == [222_146, 148_320]
    assert 12 * (2 * sizes[0] + sizes[1]) == 7_111_344
    fixed = attach(model, dict(type="PAdapter", learn_p=False), name="c")
    assert sum(p.requires_grad for p in fixed.parameters()) == len(fixed.parameters()) - 1


def test_errors() -> None:
    wrong = [dict(reduction=0), dict(p=0.5), dict(p=float("nan")), dict(mu=0.0), dict(pool=0), dict(q=1)]
    for options in wrong:
        with pytest.raises(OptionError):
            attach(vit(), {**config(), **options})
    with pytest.raises(SiteError, match="does not divide"):
        attach(vit(), config(where="attn") | dict(reduction=7))
    with pytest.raises(SiteError, match="heads"):
        attach(vit(), config() | dict(reduction=12))
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1,), num_heads=(2,), embed_dim=32)
    with pytest.raises(SiteError, match="does not tell its q, k and v"):
        attach(swin, config())
    with pytest.raises(SiteError, match="cannot sit on"):
        attach(vit(), config(where="mlp"))
    stock = timm.layers.Attention(16, num_heads=2)
    with pytest.raises(SiteError, match="mask"):
        attended(stock, torch.zeros(1, 3, 16), torch.zeros(3, 3))
    with pytest.raises(OptionError, match="cross-attention has none"):
        CachedAttention(8, 2)(torch.zeros(1, 1, 8), torch.zeros(1, 2, 8), cache=(torch.zeros(1), torch.zeros(1)))
    with pytest.raises(OptionError, match="divide"):
        CachedAttention(9, 2)
