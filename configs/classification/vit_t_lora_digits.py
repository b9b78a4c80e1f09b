# ViT-Ti/16 (ImageNet-21k, fine-tuned on ImageNet-1k; fetched by timm) + LoRA on q and v, on handwritten digits.
_base_ = ["../_base_/runtime.py", "../_base_/adamw_cosine.py", "../_base_/digits.py"]

_geometry = dict(size=(224, 224), crop_pct=1.0, interpolation="bicubic")
_data = dict(dataset=dict(transform=dict(**_geometry)))
model = dict(
    type="ImageClassifier",
    backbone=dict(type="TimmBackbone", name="vit_tiny_patch16_224", pretrained=True),
    head=dict(type="LinearHead", num_classes=10),
    adapter=dict(type="LoRA", rank=8, where=["q", "v"]),
    preprocessing=dict(mean=(0.5,) * 3, std=(0.5,) * 3, normalise=True, **_geometry),
)
train_dataloader = val_dataloader = test_dataloader = _data
optim_wrapper = dict(optimizer=dict(lr=2e-3))
