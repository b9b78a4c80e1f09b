"""The joint ViT and the tracker model: goldens from the authors' code, counts, what trains, checkpoints."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zoo
from backbones.lorat import JointViT, SubsetBlock, position_table, sincos_table
from tasks.tracking.model import JointTracker
from tasks.tracking.published import convert_published, load_published
from zoo.adapters.inject import merge, unmerge
from zoo.catalog import config_files
from zoo.engine.optim import parameter_groups
from zoo.errors import CheckpointError, CheckpointFileError, OptionError
from zoo.factory import resolve
from zoo.registry import MODELS

GOLDEN = Path(__file__).parents[1] / "golden" / "lorat"
LORA = dict(type="LoRA", init="both_normal", where=["q", "k", "v", "out", "fc1", "fc2"])


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def params(tensors):
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def small(adapter="default", template=(8, 12), search=(12, 20), **backbone):
    """The golden's model; sizes are (H, W)."""
    if adapter == "default":
        adapter = {**LORA, "rank": 4, "alpha": 8}
    options = dict(img_size=search, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    return JointTracker(
        dict(
            type="JointViT",
            name="vit_small_patch14_dinov2",
            template_size=template,
            search_size=search,
            **{**options, **backbone},
        ),
        dict(type="MLPAnchorFreeHead"),
        adapter=adapter,
    )


def loaded(tmp_path):
    t = golden("joint_forward_mlp_nonsquare")
    model = small()
    save_file(params(t), tmp_path / "model.bin")
    return t, model, load_published(model, tmp_path / "model.bin")


def inputs(t):
    return {"template": t["in.z"], "search": t["in.x"], "mask": t["in.z_feat_mask"]}


def test_golden_joint_forward_and_gradients(tmp_path):
    """Loaded through the reader of published files; q, k and v were three adapters there and are one fused here."""
    t, model, kept = loaded(tmp_path)
    assert kept == []
    z, x = t["in.z"].clone().requires_grad_(), t["in.x"].clone().requires_grad_()
    blocks = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, given, out: blocks.append(out))
    features = model.backbone(x, z, t["in.z_feat_mask"])
    close(features, t["out.x_feat"])
    for i in range(2):
        close(blocks[i], t[f"out.block{i}"])
    out = model.head(features)
    close(out.score_map, t["out.score_map"])
    close(out.boxes, t["out.boxes"])
    ((out.score_map * t["in.grad_score_map"]).sum() + (out.boxes * t["in.grad_boxes"]).sum()).backward()
    close(z.grad, t["grad.z"])
    close(x.grad, t["grad.x"])
    grads = convert_published({k.removeprefix("grad.param."): v for k, v in t.items() if k.startswith("grad.param.b")})
    named = dict(model.named_parameters())
    for key, value in grads.items():
        # the conversion scales B by alpha / r, here 1 / 4 as alpha is not among the gradients; gradients need none
        close(named[key].grad, value * (4 if key.endswith(".up") else 1), 2e-5)
    close(named["backbone.token_type_embed"].grad, t["grad.param.token_type_embed"])
    close(named["head.cls_mlp.layers.2.weight"].grad, t["grad.param.head.cls_mlp.layers.2.weight"])


def test_golden_tokens_and_positions():
    t = golden("joint_forward_mlp_nonsquare")
    close(position_table(t["in.vit_pos_embed"], (3, 5), (3, 5)), t["out.pos_embed_from_vit"])
    t = golden("pos_embed_interp")
    for side in (16, 27):
        close(position_table(t["in.pos_embed"], (37, 37), (side, side)), t[f"out.pos_{side}"])


def test_golden_merged_weights(tmp_path):
    t, model, _ = loaded(tmp_path)
    model.eval()
    before = model(inputs(t)).boxes
    merge(model)
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        close(model.backbone.blocks[0].get_submodule(part).weight, t[f"out.merged.blocks.0.{part}.weight"])
    close(model(inputs(t)).boxes, before)
    unmerge(model)
    assert torch.equal(model(inputs(t)).boxes, before)


def test_what_trains_is_what_the_authors_train(tmp_path):
    listed = json.loads((GOLDEN / "joint_forward_mlp_nonsquare.json").read_text())["trainable"]
    fused = {key.replace(".lora.A", ".down").replace(".lora.B", ".up") for key in listed}
    fused = {key.replace("qkv.q.", "qkv.").replace("qkv.k.", "qkv.").replace("qkv.v.", "qkv.") for key in fused}
    ours = {name for name, p in small().named_parameters() if p.requires_grad}
    assert {name.removeprefix("backbone.").replace(".adapters.default", "") for name in ours} == fused


COUNTS = {"vit_s": (5_902_853, 5_308_416, 27_530_885), "vit_b": (12_985_349, 10_616_832, 98_708_741)}
COUNTS |= {"vit_l": (32_518_149, 28_311_552, 335_744_005), "vit_g": (80_234_501, 70_778_880, 1_215_001_093)}
LARGE = {"vit_b": 99_072_005, "vit_l": 336_228_357, "vit_g": 1_215_727_621}


def on_meta(name):
    config = resolve(name)
    config["backbone"] = {**config["backbone"], "pretrained": False}
    with torch.device("meta"):
        return MODELS.create(config)


@pytest.mark.parametrize("variant", COUNTS)
def test_published_counts(variant):
    model = on_meta(f"{variant}_lorat")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in model.parameters())
    lora = sum(number for name, number in trained.items() if ".adapters." in name)
    assert (sum(trained.values()), lora, total) == COUNTS[variant]


@pytest.mark.parametrize("variant", LARGE)
def test_published_counts_at_378(variant):
    model = on_meta(f"{variant}_lorat_378")
    assert sum(p.numel() for p in model.parameters()) == LARGE[variant]
    assert model.head.map_size == (27, 27) and model.backbone.template_grid == (14, 14)
    assert model.settings.search_factor == 5.0


def test_create_by_name():
    model = zoo.create("vit_s_lorat")
    assert isinstance(model, JointTracker) and not model.training
    out = model({"template": torch.zeros(1, 3, 112, 112), "search": torch.zeros(1, 3, 224, 224),
                 "mask": torch.zeros(1, 8, 8, dtype=torch.long)})  # fmt: skip
    assert out.boxes.shape == (1, 16, 16, 4)
    assert {"vit_b_lorat", "vit_g_lorat_378", "tracking_quickstart"} <= config_files().keys()


def test_saved_folder_comes_back(tmp_path):
    torch.manual_seed(1)
    config = dict(
        type="JointTracker",
        backbone=dict(type="JointViT", name="vit_small_patch14_dinov2", img_size=28, template_size=(14, 14),
                      search_size=(28, 28), embed_dim=24, depth=1, num_heads=2),
        head=dict(type="MLPAnchorFreeHead"),
        adapter={**LORA, "rank": 2},
        tracking=dict(search_factor=3.0),
    )  # fmt: skip
    model = zoo.create(config)
    zoo.save(model, tmp_path / "saved")
    again = zoo.load(tmp_path / "saved")
    batch = {"template": torch.randn(1, 3, 14, 14), "search": torch.randn(1, 3, 28, 28)}
    batch["mask"] = torch.ones(1, 1, 1, dtype=torch.long)
    assert torch.equal(model(batch).boxes, again(batch).boxes)
    assert again.settings.search_factor == 3.0


def test_over_pretrained_weights_only_what_trained_is_saved(tmp_path):
    options = dict(img_size=28, embed_dim=24, depth=1, num_heads=2)
    plain = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **options)
    nn.init.normal_(plain.pos_embed)
    save_file(plain.state_dict(), tmp_path / "vit.safetensors")
    config = dict(
        type="JointTracker",
        backbone=dict(
            **dict(type="JointViT", name="vit_small_patch14_dinov2", template_size=(14, 14), search_size=(42, 42)),
            **options,
        ),
        head=dict(type="MLPAnchorFreeHead"),
        adapter={**LORA, "rank": 2},
    )
    model = zoo.create(config, pretrained=f"file:{tmp_path / 'vit.safetensors'}")
    assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    close(model.backbone.pos_embed, position_table(plain.pos_embed, (2, 2), (3, 3)))
    zoo.save(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter.safetensors")
    assert saved.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    again = zoo.load(tmp_path / "saved")
    batch = {"template": torch.randn(1, 3, 14, 14), "search": torch.randn(1, 3, 42, 42)}
    batch["mask"] = torch.zeros(1, 1, 1, dtype=torch.long)
    assert torch.equal(model(batch).boxes, again(batch).boxes)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == saved.keys()


def test_layers_for_layer_wise_rates():
    model = small(adapter=None)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    rate = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert rate["head.cls_mlp.layers.0.weight"] == 1.0 and "backbone.pos_embed" not in rate
    first, second = rate["backbone.blocks.0.mlp.fc1.weight"], rate["backbone.blocks.1.mlp.fc1.weight"]
    assert rate["backbone.token_type_embed"] < first < second <= rate["backbone.norm.weight"] < 1.0
    assert first == second / 2 == 2 * rate["backbone.patch_embed.proj.weight"]


def test_sincos_positions():
    """Entries by their definition: the column for the first half of the width, the row for the second."""
    table = sincos_table((2, 3), 8).reshape(2, 3, 8)
    close(table[1, 2, :2], torch.tensor([2.0, 2.0 / 100]).sin())
    close(table[1, 2, 2:4], torch.tensor([2.0, 2.0 / 100]).cos())
    close(table[1, 2, 4:6], torch.tensor([1.0, 1.0 / 100]).sin())
    model = small(positions="sincos")
    close(model.backbone.pos_embed, sincos_table((3, 5), 24))
    assert not model.backbone.pos_embed.requires_grad
    with pytest.raises(OptionError, match="own or sincos, got 'rope'"):
        small(positions="rope")


def test_trained_tensors_alone_are_enough(tmp_path):
    t = golden("joint_forward_mlp_nonsquare")
    whole = params(t)
    part = {k: v for k, v in whole.items() if ".lora." in k or k.startswith(("head", "token", "lora", "use"))}
    save_file(part, tmp_path / "base.bin")
    model = small()
    base = model.backbone.blocks[0].attn.qkv.weight.clone()
    kept = load_published(model, tmp_path / "base.bin")
    assert "backbone.blocks.0.attn.qkv.weight" in kept and "backbone.token_type_embed" not in kept
    assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, base)
    up = model.backbone.blocks[1].mlp.fc2.adapters["default"].up
    close(up, whole["blocks.1.mlp.fc2.lora.B"])  # alpha 8, rank 4 on both sides
    other = small(adapter={**LORA, "rank": 4, "alpha": 4})
    load_published(other, tmp_path / "base.bin")
    close(other.backbone.blocks[1].mlp.fc2.adapters["default"].up, 2 * whole["blocks.1.mlp.fc2.lora.B"])


def test_published_files_that_do_not_fit(tmp_path):
    whole = params(golden("joint_forward_mlp_nonsquare"))
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def refused(state, match, error=CheckpointError):
        save_file(state, tmp_path / "x.bin")
        with pytest.raises(error, match=match):
            load_published(model, tmp_path / "x.bin")

    refused({k: v for k, v in whole.items() if "qkv.k.lora.A" not in k}, "holds only q, v")
    refused({k: v for k, v in whole.items() if "fc1.lora" not in k}, "lacks 4 trained tensors")
    refused({**whole, "blocks.7.norm1.weight": torch.ones(24)}, "no 'backbone.blocks.7.norm1.weight'; did you mean")
    refused({**whole, "token_type_embed": torch.ones(3, 8)}, "another size")
    (tmp_path / "y.bin").write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointFileError, match="cannot be read as safetensors"):
        load_published(model, tmp_path / "y.bin")
    with pytest.raises(CheckpointError, match="one LoRA on the model, it has 0"):
        load_published(small(adapter=None), tmp_path / "x.bin")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name,options",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("deit_tiny_patch16_224", {}),
    ],
)
def test_plain_vits_without_template_are_timm_s_own_tokens(name, options):
    """Class and register tokens apart, embedding, pre-norm and positions are those of the ViT itself."""
    shape = dict(depth=1, embed_dim=24, num_heads=2)
    torch.manual_seed(0)
    side = 4 * timm.create_model(name, **shape).patch_embed.patch_size[0]
    torch.manual_seed(0)
    joint = JointViT(name, template_size=(side // 2,) * 2, search_size=(side, side), img_size=side, **shape)
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, img_size=side, **shape)
    nn.init.zeros_(joint.token_type_embed)
    image, seen = torch.randn(2, 3, side, side), []
    joint.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    plain.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert joint(image).shape == (2, 16, 24)
    plain(image)
    close(seen[0], seen[1][:, plain.num_prefix_tokens :])


def test_template_takes_the_corner_of_the_search_positions():
    model = small()
    table = model.backbone.pos_embed.reshape(3, 5, 24)
    assert torch.equal(model.backbone.template_positions(), table[:2, :3].reshape(1, 6, 24))


def test_drop_path():
    ordinary = small(drop_path=0.1).backbone.blocks[0]
    assert ordinary.drop_path1.drop_prob == 0.1 and not isinstance(ordinary, SubsetBlock)
    model = small(drop_path=0.4)
    block = model.backbone.blocks[0]
    assert isinstance(block, SubsetBlock)
    x = torch.randn(10, 5, 24)
    plain = small(drop_path=0.0)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(block.eval()(x), plain.backbone.blocks[0].eval()(x))
    seen = []
    block.attn.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    block.mlp.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    block.train()(x)
    assert seen == [6, 6]


def test_a_branch_on_a_subset_is_the_branch_on_average():
    block = small(drop_path=0.75).backbone.blocks[0]
    x = torch.randn(6, 5, 24)
    once = block._add(x, lambda t: t.square())
    changed = (once != x).any((1, 2))
    assert changed.sum() == 1  # int(6 * 0.25)
    torch.testing.assert_close((once - x)[changed], 6 * x[changed].square())
    mean = torch.stack([block._add(x, lambda t: t.square()) - x for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, x.square(), rtol=0.2, atol=0)  # 2000 draws at 1 in 6: 5 % standard error


def test_refusals():
    with pytest.raises(OptionError, match="multiples of the patch"):
        small(search=(13, 20))
    with pytest.raises(OptionError, match="does not fit into the search grid"):
        small(template=(16, 12))
    with pytest.raises(OptionError, match="plain timm VisionTransformer"):
        JointViT("resnet18")
    model = small()
    with pytest.raises(OptionError, match=r"search crop is \(12, 16\).*\(12, 20\)"):
        model({"template": torch.zeros(1, 3, 8, 12), "search": torch.zeros(1, 3, 12, 16), "mask": None})
    with pytest.raises(OptionError, match="needs its foreground mask"):
        model({"template": torch.zeros(1, 3, 8, 12), "search": torch.zeros(1, 3, 12, 20), "mask": None})
    with pytest.raises(OptionError, match="use JointViT"):
        JointTracker(dict(type="TimmBackbone", name="test_vit"), dict(type="MLPAnchorFreeHead"))
    with pytest.raises(OptionError, match="tracking takes template_factor"):
        JointTracker(small().backbone, small().head, tracking=dict(factor=3))
