"""Hi LoRA: tensors and stages of the reference, stacking, the training hook, bridges and the grounding head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import MODELS, check_half, check_merge, check_round_trips, check_start, golden, run, shake, vit
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from heads.grounding import GroundingEncoder, grounding_losses
from zoo.adapters.bridge import BridgedTower, CrossModalBridge
from zoo.adapters.hi_lora import set_stage
from zoo.adapters.inject import attach
from zoo.errors import OptionError, SiteError, UnknownNameError

CLOSE = dict(atol=1e-5, rtol=1e-5)


def config(**options: Any) -> dict[str, Any]:
    return dict(type="HiLoRA", rank=4, alpha=2.0, **{"dropout": 0.0, **options})


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_start_and_merge(name: str, pairs: int) -> None:
    check_start(MODELS[name], config(pairs=pairs))
    check_merge(MODELS[name], config(pairs=pairs, dropout=0.1))


def test_save_load_copy_detach_and_half_precision() -> None:
    check_round_trips(vit, config(pairs=2))
    check_half(vit, config(pairs=2))


def test_golden_linear() -> None:
    tensors, about = golden("hi-lora/hilora_stage3_linear")
    model = nn.Sequential(nn.Linear(48, 48)).eval()
    model[0].load_state_dict(dict(weight=tensors["param.weight"], bias=tensors["param.bias"]))
    sizes = about["config"]
    settings = dict(type="HiLoRA", rank=sizes["r"], alpha=sizes["lora_alpha"], dropout=sizes["lora_dropout"])
    attached = attach(model, {**settings, "where": "linear"}, example=tensors["in.x"])
    adapter = attached.placed[0].adapter
    with torch.no_grad():
        adapter.downs[0].copy_(tensors["param.lora_A.default.weight"])
        adapter.ups[0].copy_(tensors["param.lora_B.default.weight"])
    assert adapter.scale == sizes["scaling"]
    torch.testing.assert_close(model(tensors["in.x"]), tensors["out.y"], **CLOSE)
    attached.merge()
    torch.testing.assert_close(model[0].weight, tensors["out.merged_weight"], **CLOSE)


class Inputs(nn.Module):
    """transformers' CLIP under the calling habits of this library."""

    def __init__(self) -> None:
        super().__init__()
        seen = dict(hidden_size=48, intermediate_size=64, num_attention_heads=4, num_hidden_layers=12)
        read = {**seen, "hidden_size": 32, "vocab_size": 30, "max_position_embeddings": 8}
        sizes = CLIPConfig(vision_config={**seen, "image_size": 16, "patch_size": 8}, text_config=read)
        self.model = CLIPModel(sizes)

    def forward(self, image: Tensor) -> Tensor:
        ids = torch.tensor([[0, 5, 29]]).expand(len(image), -1)
        return self.model(input_ids=ids, pixel_values=image).logits_per_image


def test_golden_trainable_tensors_of_every_stage() -> None:
    _, about = golden("hi-lora/hilora_stage3_linear")
    model = Inputs()
    settings = config(where=["q", "k", "v", "out"])
    attached = attach(model, settings, example=torch.zeros(1, 3, 16, 16))
    image = torch.randn(2, 3, 16, 16)
    model.eval()
    for stage, depth in enumerate((0, 5, 8, 12)):
        names = set_stage(attached, depth, tower="*vision_model*")
        found = set()
        for name in names:
            module, _, tensor = name.removeprefix("model.").rpartition(".adapters.default.")
            found.add(f"{module}.lora_{'A' if tensor == 'downs.0' else 'B'}.default.weight")
        assert found == set(about["trainable_lora_parameters_by_stage"][f"stage{stage}"])
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)
        before = model(image).detach()
        if not names:
            continue
        model.zero_grad()
        shake_trained(attached, 0.05)
        model(image).square().sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(names)
        after = model(image).detach()
        assert not torch.equal(before, after)
        set_stage(attached, 12, tower="*vision_model*")
        torch.testing.assert_close(model(image).detach(), after, **CLOSE)  # a switch changes flags only


def shake_trained(attached: Any, std: float) -> None:
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=std)


def test_stacked_pairs_add_up_and_earlier_ones_stay() -> None:
    model = vit(depth=3)
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    attached = attach(model, config(pairs=3))
    for stage in range(3):
        before = {n: p.detach().clone() for n, p in attached.named_parameters()}
        names = set_stage(attached, stage + 1, pair=stage)
        assert {n.rpartition(".")[2] for n in names} == {str(stage)}
        depths = {int(n.split(".")[1]) for n in names}
        assert depths == set(range(stage + 1))
        shake_trained(attached, 0.2)
        moved = {n for n, p in attached.named_parameters() if not torch.equal(p, before[n])}
        assert moved == set(names)
    expected = run(model)
    sums = {}
    for site, adapter in attached.placed:
        change = torch.zeros_like(weights[site.path])
        for j in range(3):
            parts = zip(site.parts, adapter.downs[j].split(4), strict=True)
            ups = adapter.ups[j].split([part.width for part in site.parts])
            change += adapter.scale * torch.cat([up @ down for (_, down), up in zip(parts, ups, strict=True)])
        sums[site.path] = weights[site.path] + change.detach()
    attached.merge()
    for path, weight in sums.items():
        torch.testing.assert_close(model.get_submodule(path).weight, weight, **CLOSE)
    torch.testing.assert_close(run(model), expected, **CLOSE)


def test_counts_of_clip_vit_b_16() -> None:
    with torch.device("meta"):
        clip = CLIP(512, CLIPVisionCfg(layers=12, width=768), CLIPTextCfg(width=512, heads=8, layers=12))
        bridges = [CrossModalBridge(768, 512, heads=12) for _ in range(4)]
        two = [CrossModalBridge(768, 512, heads=12, levels=2) for _ in range(4)]
        many = [CrossModalBridge(768, 512, heads=12, levels=12) for _ in range(4)]
        tower = BridgedTower(clip.visual, dict(zip((0, 3, 7, 11), bridges, strict=True)))
    for made, count in ((bridges, 30_078_976), (two, 31_809_536), (many, 49_115_136)):
        assert sum(p.numel() for bridge in made for p in bridge.parameters()) == count
    text = attach(clip.transformer, dict(type="HiLoRA"), example=torch.zeros(1, 77, 512, device="meta"))
    assert sum(p.numel() for p in text.parameters()) == 1_572_864
    vision = attach(tower.visual, dict(type="HiLoRA"), example=torch.zeros(1, 3, 224, 224, device="meta"))
    for depth, count in ((5, 983_040), (8, 1_572_864), (12, 2_359_296)):
        set_stage(vision, depth)
        assert sum(p.numel() for p in vision.parameters() if p.requires_grad) == count
    image, text_states = torch.zeros(1, 3, 224, 224, device="meta"), [torch.zeros(1, 77, 512, device="meta")]
    vision.detach()
    both = attach(tower, dict(type="HiLoRA"), example=(image, text_states))
    assert len(set_stage(both, 0, tower="visual.*", always=["bridges.*"])) == 4 * 4 * 2
    assert sum(p.numel() for p in both.parameters() if p.requires_grad) == 786_432
    set_stage(both, 12, tower="visual.*", always=["bridges.*"])
    assert sum(p.numel() for p in both.parameters() if p.requires_grad) == 786_432 + 2_359_296


def bridged(tensors: dict[str, Tensor], about: dict[str, Any], mix: bool = False) -> BridgedTower:
    size = about["config"]
    vision = CLIPVisionCfg(
        layers=size["layers"],
        width=size["hidden"],
        head_width=size["hidden"] // size["heads"],
        mlp_ratio=size["mlp"] / size["hidden"],
        patch_size=size["patch"],
        image_size=32,
    )
    visual = CLIP(8, vision, CLIPTextCfg(8, 20, 16, 2, 1), quick_gelu=True).visual
    options = dict(heads=size["heads"], levels=size["n_text_levels"], hidden=size["mlp"], legacy_batch_mix=mix)
    places = {i: CrossModalBridge(size["hidden"], size["text_hidden"], **options) for i in size["adapt_layer"]}
    tower = BridgedTower(visual, places).eval()
    state = {k: v for k, v in tower.state_dict().items() if k == "visual.proj"}
    for name, tensor in tensors.items():
        if name.startswith("param."):
            new = our_name(name.removeprefix("param."))
            if new.endswith(("in_proj_weight", "in_proj_bias")):
                tensor = torch.cat([tensors[name.replace("q_proj", f"{one}_proj")] for one in "qkv"])
            if new:
                state[new] = tensor
    tower.load_state_dict(state)
    return tower


def our_name(name: str) -> str:
    if "self_attn.k_proj" in name or "self_attn.v_proj" in name:
        return ""
    if ".cross_" in name:
        _, _, layer, part = name.split(".", 3)
        for old, new in (
            ("cross_norm", "norm"),
            ("cross_gate", "gate"),
            ("cross_attn", "attn"),
            ("cross_mlp", "mlp"),
        ):
            part = part.replace(old, new)
        if part.startswith("cross_adaptive_weights"):
            part = f"tables.{part.split('.')[1]}"
        return f"bridges.{layer}.{part}"
    for old, new in (
        ("encoder.layers", "transformer.resblocks"),
        ("self_attn.q_proj.", "attn.in_proj_"),
        ("self_attn", "attn"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"),
        ("embeddings.patch_embedding", "conv1"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.class_embedding", "class_embedding"),
    ):
        name = name.replace(old, new)
    return f"visual.{name}"


def test_golden_bridge_of_two_levels() -> None:
    tensors, about = golden("hi-lora/bridge_b1_two_levels")
    tower = bridged(tensors, about)
    image = tensors["in.pixel_values"].requires_grad_()
    states = tower(image, [tensors["in.text_states.0"], tensors["in.text_states.1"]])
    for i, state in enumerate(states):
        torch.testing.assert_close(state, tensors[f"out.hidden_states.{i}"], **CLOSE)
    torch.testing.assert_close(states[-1], tensors["out.last_hidden_state"], **CLOSE)
    torch.testing.assert_close(tower.visual.ln_post(states[-1][:, 0]), tensors["out.pooler_output"], **CLOSE)
    (states[-1] * tensors["in.cotangent"]).sum().backward()
    torch.testing.assert_close(image.grad, tensors["grad.pixel_values"], atol=1e-4, rtol=1e-4)
    for name, gradient in tensors.items():
        if name.startswith("grad.encoder"):
            found = tower.get_parameter(our_name(name.removeprefix("grad."))).grad
            torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-4)


def test_golden_bridge_of_a_batch_keeps_texts_apart_unless_told_otherwise() -> None:
    tensors, about = golden("hi-lora/bridge_b2_legacy_mix")
    images, texts = tensors["in.pixel_values"], tensors["in.text_states.0"]
    right, legacy = bridged(tensors, about), bridged(tensors, about, mix=True)
    torch.testing.assert_close(right(images, [texts])[-1], tensors["out.batch_first_last_hidden_state"], **CLOSE)
    torch.testing.assert_close(legacy(images, [texts])[-1], tensors["out.legacy_last_hidden_state"], **CLOSE)
    alone = torch.cat([right(images[i : i + 1], [texts[i : i + 1]])[-1] for i in range(2)])
    torch.testing.assert_close(right(images, [texts])[-1], alone, **CLOSE)
    assert right(torch.randn(1, 3, 48, 40), [texts[:1]])[-1].shape == (1, 31, 24)


def test_golden_grounding_encoder() -> None:
    tensors, about = golden("hi-lora/grounding_encoder_postnorm")
    size = about["config"]
    sizes = dict(heads=size["heads"], hidden=size["ffn"], layers=size["layers"], pre_norm=size["normalize_before"])
    model = GroundingEncoder(size["d"], **sizes).eval()
    state = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    state = {k.replace("encoder.encoder.", "").replace("bbox.layers", "box"): v for k, v in state.items()}
    model.load_state_dict(state)
    tokens, positions = (tensors[f"in.{name}"].transpose(0, 1) for name in ("src", "pos"))
    padding = tensors["in.mask"].bool()
    box, hidden = model(tokens, positions, padding)
    torch.testing.assert_close(box, tensors["out.box"], **CLOSE)
    expected = tensors["out.hidden"].transpose(0, 1)
    torch.testing.assert_close(hidden[~padding], expected[~padding], **CLOSE)
    other = torch.where(padding[..., None], torch.randn_like(tokens), tokens)
    torch.testing.assert_close(model(other, positions, padding)[0], box, **CLOSE)
    assert GroundingEncoder(16, heads=4, hidden=24, layers=1).norm is not None


def test_golden_losses() -> None:
    tensors, _ = golden("hi-lora/losses")
    boxes = tensors["in.pred_box"].requires_grad_()
    named = [tensors[f"in.{n}"] for n in ("gt_box", "logits_per_text", "patch_similarity", "seg_logits", "obj_mask")]
    losses = grounding_losses(boxes, *named)
    for name, value in losses.items():
        key = f"out.{name.replace('align_focal', 'algin_focal')}"
        torch.testing.assert_close(value.reshape(1), tensors[key], **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
    total = sum(losses.values())
    torch.testing.assert_close(total.reshape(1), tensors["out.total"], atol=1e-4, rtol=1e-5)
    total.backward()
    torch.testing.assert_close(boxes.grad, tensors["grad.pred_box"], **CLOSE)
    assert set(grounding_losses(*named[:1], named[0])) == {"loss_bbox", "loss_giou"}
    with pytest.raises(OptionError, match="mask"):
        grounding_losses(named[0], named[0], mask_logits=named[3])


STAGES = [dict(depth=0, epochs=1), dict(depth=1, epochs=1, lr_scale=0.5), dict(depth=2, epochs=2, lr_scale=0.1)]


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, **options: Any) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "engine"))
    from running import train as start

    hook = dict(type="HiLoRAStages", stages=STAGES, mode=mode, **options.pop("hook", {}))
    adapter = dict(type="HiLoRA", rank=2, alpha=2.0, pairs=2 if mode == "stack" else 1)
    given = dict(model__type="TinyAdaptedTask", model__adapter=adapter, param_scheduler=[], custom_hooks=[hook])
    return start(folder, **{**given, **options})


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_training_in_stages_and_resuming_inside_one(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.engine.stages import HiLoRAStages

    seen: list[tuple[int, set[str], float, int]] = []
    renewed = HiLoRAStages.before_train_epoch

    def watch(self: HiLoRAStages, runner: Any) -> None:
        renewed(self, runner)
        names = {n for n, p in runner.bare_model.backbone.named_parameters() if p.requires_grad}
        optimizer = runner.optim_wrapper.optimizer
        seen.append((self.current or 0, names, optimizer.param_groups[0]["lr"], len(optimizer.state)))

    monkeypatch.setattr(HiLoRAStages, "before_train_epoch", watch)
    options = dict(default_hooks__checkpoint__keep=50)
    whole = train(tmp_path / "whole", monkeypatch, mode, **options)
    assert [stage for stage, *_ in seen] == [0, 1, 2, 2]
    assert [round(lr, 9) for *_, lr, _ in seen] == [0.01, 0.005, 0.001, 0.001]
    assert [states == 0 for *_, states in seen] == [True, True, True, False]
    assert [len(names) for _, names, *_ in seen] == [0, 4, 8, 8]
    assert all(name.split(".")[1] == "0" for name in seen[1][1])
    if mode == "stack":
        assert {name[-1] for name in seen[1][1]} == {"0"} and {name[-1] for name in seen[2][1]} == {"1"}
    state = whole.bare_model.state_dict()
    files = sorted((tmp_path / "whole").rglob("step_*.pth"), key=lambda file: int(file.stem.split("_")[1]))
    middle = files[len(files) * 5 // 8]
    again = train(tmp_path / "again", monkeypatch, mode, resume=str(middle), **options)
    assert all(torch.equal(value, state[name]) for name, value in again.bare_model.state_dict().items())


@pytest.mark.parametrize(
    ("hook", "error", "said"),
    [
        (dict(stages=[dict(depth=1, epochs=1)]), OptionError, "max_epochs is 4"),
        (dict(stages=[dict(depth=3, epochs=4)]), OptionError, "0 ... 2"),
        (dict(adapter="lora"), UnknownNameError, "lora"),
        (dict(tower="text.*"), SiteError, "fits no site"),
        (dict(mode="stacks"), OptionError, "stack"),
        (dict(mode="stack"), OptionError, "pairs=1"),
        (dict(stages=[dict(depth=1)]), OptionError, "needs depth and epochs"),
        (dict(stages=[dict(deep=1, epochs=4)]), OptionError, "'deep'"),
        (dict(stages=[dict(depth=1, epochs=0)]), OptionError, "epochs must"),
        (dict(stages=[dict(depth=1, epochs=4, lr_scale=0)]), OptionError, "lr_scale"),
    ],
    ids=str,
)
def test_the_hook_refuses(
    hook: dict[str, Any], error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from zoo.engine.stages import HiLoRAStages

    model = vit()
    attach(model, dict(type="HiLoRA", rank=2, dropout=0.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runner = SimpleNamespace(
        max_epochs=4, distributed=False, bare_model=model, optim_wrapper=SimpleNamespace(optimizer=optimizer)
    )
    with pytest.raises(error, match=said):
        HiLoRAStages(**{"stages": STAGES, **hook}).before_train(runner)  # type: ignore[arg-type]


def test_errors() -> None:
    for wrong in (dict(rank=0), dict(pairs=0), dict(dropout=1.0), dict(pair=2)):
        with pytest.raises(OptionError):
            attach(vit(), dict(type="HiLoRA", **wrong))
    attached = attach(vit(), config(where="q, head"))
    with pytest.raises(SiteError, match="in no block"):
        set_stage(attached, 1)
    assert any(name.startswith("head.") for name in set_stage(attached, 0, always=["head"]))
    shake(attached)
    attached.merge()
    with pytest.raises(OptionError, match="merged"):
        set_stage(attached, 1, always=["head"])
    with pytest.raises(OptionError, match="divide"):
        CrossModalBridge(10, 4, heads=3)
    with pytest.raises(OptionError, match="at least one text level"):
        CrossModalBridge(8, 4, heads=2, levels=0)
    with pytest.raises(OptionError, match="2 text levels of 5"):
        CrossModalBridge(8, 4, heads=2, levels=2, length=5)(torch.zeros(1, 3, 8), [torch.zeros(1, 5, 4)])
    visual = CLIP(4, CLIPVisionCfg(1, 8, 4, patch_size=16, image_size=32), CLIPTextCfg(8, 9, 8, 2, 1)).visual
    with pytest.raises(SiteError, match="no place for a bridge at 7"):
        BridgedTower(visual, {7: CrossModalBridge(8, 4, heads=2)})
