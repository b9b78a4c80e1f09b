"""VLSM-Adapter: the reference's logits and gradients on a whole CLIPSeg, its counts, and what stays untouched."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from adapter_checks import check_compiles, check_half, check_round_trips, golden, randomise, run, vit
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from heads.clipseg_decoder import CLIPSeg, CLIPSegDecoder, dice_ce, from_transformers
from zoo.adapters.inject import attach
from zoo.adapters.vlsm_adapter import VLSMBlock, VLSMNeck, dense
from zoo.errors import CheckpointError, OptionError, SiteError

CLOSE = dict(atol=1e-5, rtol=1e-5)
KERNELS = dict(atol=1e-6, rtol=1e-5)  # torch picks attention kernels by requires_grad; they sum in another order


def config(**options: Any) -> dict[str, Any]:
    return dict(type="VLSMAdapter", width=6, **options)


def test_save_load_copy_and_detach() -> None:
    check_round_trips(vit, config())


def test_half_precision() -> None:
    check_half(vit, config())


def test_compiles_to_one_graph() -> None:
    check_compiles(config())


def test_not_the_identity_but_the_base_with_silent_adapters() -> None:
    base, model = vit(), vit()
    attached = attach(model, config())
    assert not any(item.adapter.identity for item in attached.placed)
    assert not torch.allclose(run(model), run(base), atol=1e-3)
    silence(item.adapter.block for item in attached.placed)
    assert torch.equal(run(model), run(base))
    with pytest.raises(SiteError, match="no merged form"):
        attached.merge()


def silence(blocks: Any) -> None:
    for block in blocks:
        nn.init.zeros_(block.fc2.weight)
        nn.init.zeros_(block.fc2.bias)


def test_golden_block() -> None:
    tensors, about = golden("vlsm-adapter/adapter")
    for gelu, name in ((False, "out.y"), (True, "out.y_gelu")):
        block = VLSMBlock(about["config"]["input_dim"], about["config"]["adapter_dim"], gelu)
        block.load_state_dict({k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")})
        x = tensors["in.x"].clone().requires_grad_()
        y = block(x)
        torch.testing.assert_close(y, tensors[name], **CLOSE)
        if not gelu:
            assert (y - x >= 0).all()


def segmenter(about: dict[str, Any], neck: nn.Module | None = None) -> CLIPSeg:
    size = about["config"]["clipseg"]
    seen, read = size["vision_config"], size["text_config"]
    vision = CLIPVisionCfg(
        layers=seen["num_hidden_layers"],
        width=seen["hidden_size"],
        head_width=seen["hidden_size"] // seen["num_attention_heads"],
        mlp_ratio=seen["intermediate_size"] / seen["hidden_size"],
        patch_size=seen["patch_size"],
        image_size=seen["image_size"],
    )
    text = CLIPTextCfg(
        context_length=read["max_position_embeddings"],
        vocab_size=read["vocab_size"],
        width=read["hidden_size"],
        heads=read["num_attention_heads"],
        layers=read["num_hidden_layers"],
        mlp_ratio=read["intermediate_size"] / read["hidden_size"],
    )
    decoder = CLIPSegDecoder(
        vision_width=seen["hidden_size"],
        projection=size["projection_dim"],
        width=size["reduce_dim"],
        heads=size["decoder_num_attention_heads"],
        hidden=size["decoder_intermediate_size"],
    )
    clip = CLIP(size["projection_dim"], vision, text, quick_gelu=True)
    return CLIPSeg(clip, decoder, neck, extract=size["extract_layers"]).eval()


def load_base(model: CLIPSeg, tensors: dict[str, Tensor]) -> None:
    base = {k.removeprefix("param.clipseg."): v for k, v in tensors.items() if k.startswith("param.clipseg.")}
    missing, extra = model.load_state_dict(from_transformers(base), strict=False)
    assert not extra and all(name.startswith("neck.") for name in missing)


def load_block(block: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    block.load_state_dict({k: tensors[f"param.{name}.{k}"] for k in block.state_dict()})


def check_gradients(block: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    for key, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[f"grad.{name}.{key}"], atol=1e-4, rtol=1e-4)


def test_golden_dense_vlc() -> None:
    tensors, about = golden("vlsm-adapter/dense_vlc")
    size = about["config"]
    wide = dict(projection=size["clipseg"]["projection_dim"], condition_width=size["cond_adapter_dim"])
    model = segmenter(about, VLSMNeck(condition=True, **wide))
    load_base(model, tensors)
    load_block(model.neck.condition, tensors, "cond_adapter")
    blocks = {"cond_adapter": model.neck.condition}
    for name, settings in dense("VLC", extract=model.extract, width=size["adapter_dim"]).items():
        attached = attach(model.clip, settings, name=name, freeze=False)
        for item in attached.placed:
            kind = f"{name[0].replace('t', 'l')}_{'attn' if item.site.role == 'attn' else 'out'}_adapters"
            blocks[f"{kind}.{item.site.depth}"] = item.adapter.block
    for name, block in blocks.items():
        load_block(block, tensors, name)
    logits = model(tensors["in.pixel_values"], tensors["in.input_ids"])
    torch.testing.assert_close(logits, tensors["out.logits"], **CLOSE)
    activations, _ = model.visual_activations(tensors["in.pixel_values"])
    for i, x in zip(model.extract, activations, strict=True):
        torch.testing.assert_close(x, tensors[f"out.vision_hidden_{i + 1}"], **CLOSE)
    condition, _ = model.text_features(tensors["in.input_ids"])
    found = (condition, model.neck.condition(condition))
    assert any(torch.allclose(c, tensors["out.text_features"], **CLOSE) for c in found)
    (logits * tensors["in.cotangent"]).sum().backward()
    for name, block in blocks.items():
        check_gradients(block, tensors, name)
    trained = {n for b in blocks.values() for n in [id(p) for p in b.parameters()]}
    assert {id(p) for p in model.parameters() if p.grad is not None} == trained
    assert {f"{name}.{key}" for name, b in blocks.items() for key in b.state_dict()} == set(about["trainable"])


def test_golden_shallow_vl() -> None:
    tensors, about = golden("vlsm-adapter/shallow_vl")
    width = about["config"]["clipseg"]
    neck = VLSMNeck(
        vision_width=width["vision_config"]["hidden_size"],
        text_width=width["text_config"]["hidden_size"],
        projection=width["projection_dim"],
        width=about["config"]["adapter_dim"],
        vision=True,
        text=True,
    )
    model = segmenter(about, neck)
    load_base(model, tensors)
    for kind, blocks in (("vision", neck.vision), ("text", neck.text)):
        for i, block in enumerate(blocks):
            load_block(block, tensors, f"{kind}_extract_adapters.{i}")
    before, _ = model.visual_activations(tensors["in.pixel_values"])
    logits = model(tensors["in.pixel_values"], tensors["in.input_ids"])
    torch.testing.assert_close(logits, tensors["out.logits"], **CLOSE)
    (logits * tensors["in.cotangent"]).sum().backward()
    for kind, blocks in (("vision", neck.vision), ("text", neck.text)):
        for i, block in enumerate(blocks):
            check_gradients(block, tensors, f"{kind}_extract_adapters.{i}")
    assert all(p.grad is None for p in (*model.clip.parameters(), *model.decoder.parameters()))
    after, _ = model.visual_activations(tensors["in.pixel_values"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    silence(neck.vision)
    plain = segmenter(about)
    load_base(plain, tensors)
    inputs = tensors["in.pixel_values"], tensors["in.input_ids"]
    assert not torch.allclose(model(*inputs), plain(*inputs))  # A(x) = x + ...: the text terms remain
    model.neck = VLSMNeck(vision_width=24, text_width=16, projection=16, vision=True)
    silence(model.neck.vision)
    torch.testing.assert_close(model(*inputs), plain(*inputs), **KERNELS)


def test_variants_touch_only_their_tower_and_silence_gives_the_plain_logits() -> None:
    tensors, about = golden("vlsm-adapter/dense_vlc")
    inputs = tensors["in.pixel_values"], tensors["in.input_ids"]
    plain = segmenter(about)
    load_base(plain, tensors)
    seen, read = plain.visual_activations(inputs[0])[0], plain.text_features(inputs[1])[0]
    model = segmenter(about)
    load_base(model, tensors)
    sets = {n: attach(model.clip, c, name=n, freeze=False) for n, c in dense("VL", extract=(1, 2, 4), width=5).items()}
    both = model(*inputs)
    silence(item.adapter.block for item in sets["text"].placed)
    torch.testing.assert_close(model.text_features(inputs[1])[0], read, **KERNELS)
    assert not torch.allclose(model.visual_activations(inputs[0])[0][2], seen[2], atol=1e-3)
    only_vision = model(*inputs)
    assert not torch.allclose(only_vision, both)
    sets["text"].detach()
    torch.testing.assert_close(model(*inputs), only_vision, **KERNELS)
    silence(item.adapter.block for item in sets["vision"].placed)
    torch.testing.assert_close(model(*inputs), plain(*inputs), **KERNELS)


def test_other_image_sizes_and_padding() -> None:
    _, about = golden("vlsm-adapter/shallow_vl")
    model = segmenter(about)
    randomise(model)
    ids = torch.tensor([[58, 4, 9, 59, 1, 1, 1], [58, 7, 59, 1, 1, 1, 1]])
    for size in ((64, 64), (96, 64), (352, 352)):
        assert model(torch.randn(2, 3, *size), ids).shape == (2, 1, *size)
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(image, ids), model(image, ids[:, :4]), **CLOSE)


@pytest.fixture(scope="module")
def large_clip() -> nn.Module:
    with torch.device("meta"):
        return CLIP(**open_clip.get_model_config("ViT-B-16"))


COUNTS = {"V": (1_784_448, 2_363_136), "VL": (2_974_464, 3_939_072), "VLC": (3_237_376, 4_201_984)}


@pytest.mark.parametrize("variant", COUNTS)
def test_counts_on_clip_vit_b_16(variant: str, large_clip: nn.Module) -> None:
    sets = [attach(large_clip, settings, name=name) for name, settings in dense(variant).items()]
    towers = sum(p.numel() for attached in sets for p in attached.parameters())
    for attached in sets:
        attached.detach()
    with torch.device("meta"):
        neck = VLSMNeck(condition=True) if variant == "VLC" else None
        parts = dict(vision=True, text=variant != "V", condition=variant == "VLC")
        shallow = VLSMNeck(**parts)
        base = large_clip, CLIPSegDecoder()
    found = [sum(p.numel() for p in m.parameters()) for m in (neck or nn.Identity(), shallow)]
    assert (towers + found[0], found[1]) == COUNTS[variant]
    assert sum(p.numel() for m in base for p in m.parameters()) == 150_747_746


def test_loss_terms() -> None:
    logits, target = torch.randn(3, 1, 6, 5), (torch.rand(3, 1, 6, 5) > 0.5).long()
    perfect = (target * 2 - 1) * 50.0
    assert dice_ce(perfect, target) < 1e-4
    bce = nn.functional.binary_cross_entropy_with_logits
    p = logits.sigmoid()
    single, double = (dice_ce(logits, target, dice=0.0, double_sigmoid=flag) for flag in (False, True))
    torch.testing.assert_close(single, bce(logits, target.float()))
    torch.testing.assert_close(double, bce(p, target.float()))
    soft = 1 - 2 * (p * target).sum((1, 2, 3)) / (p + target).sum((1, 2, 3))
    torch.testing.assert_close(dice_ce(logits, target, ce=0.0), 1.5 * soft.mean(), atol=1e-5, rtol=1e-5)


def test_errors() -> None:
    for wrong in (dict(width=0), dict(width=2.5), dict(wide=3)):
        with pytest.raises(OptionError):
            attach(vit(), {**config(), **wrong})
    with pytest.raises(SiteError, match="cannot sit on"):
        attach(vit(), config(where="fc1"))
    with pytest.raises(OptionError, match="V, VL and VLC"):
        dense("LV")
    with pytest.raises(OptionError, match="does nothing"):
        VLSMNeck()
    with pytest.raises(OptionError, match="must be 512"):
        VLSMNeck(text=True, text_width=768)
    with pytest.raises(OptionError, match="3 levels, but got 2"):
        VLSMNeck(vision=True, vision_width=4, width=2)([torch.zeros(1, 5, 4)] * 2, torch.zeros(1, 512), [])
    with pytest.raises(OptionError, match="takes 3 activations"):
        CLIPSegDecoder()([torch.zeros(1, 5, 768)], torch.zeros(1, 512), (2, 2))
    with pytest.raises(OptionError, match="grid"):
        CLIPSegDecoder()([torch.zeros(1, 5, 768)] * 3, torch.zeros(1, 512), (2, 3))
    with pytest.raises(OptionError, match="conditional_layer"):
        CLIPSegDecoder(conditional_layer=3)
    with pytest.raises(OptionError, match="patches of 16"):
        CLIPSegDecoder(patch=32)
    with pytest.raises(CheckpointError, match=r"vision\.foo"):
        from_transformers({"vision.foo": torch.zeros(1)})
