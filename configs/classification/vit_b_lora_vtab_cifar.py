# VTAB-1k, CIFAR-100: ViT-B/16 (ImageNet-21k, fetched by timm) + LoRA on q and v; another of the 19 sets by
#     --cfg-options with its folder in all three `dataset.root`s and its `model.head.num_classes`.
# Images are squashed to 224 x 224, not augmented, and NORMALISED by the backbone's mean and deviation. Published
# numbers of unnormalised inputs differ by up to ten points: compare with `model.preprocessing.normalise=False`.
# Hyperparameters are chosen on train800 / val200; this is the final run, on all 1,000 images, tested once at the end.
_base_ = ["../_base_/runtime.py", "../_base_/adamw_cosine.py"]

_geometry = dict(size=(224, 224), crop_pct=1.0, crop_mode="squash", interpolation="bicubic")
_data = dict(type="VTABDataset", root="data/vtab-1k/cifar", transform=dict(type="EvalTransform", **_geometry))
model = dict(
    type="ImageClassifier",
    backbone=dict(type="TimmBackbone", name="vit_base_patch16_224.augreg_in21k", pretrained=True),
    head=dict(type="LinearHead", num_classes=100),
    adapter=dict(type="LoRA", rank=8, where=["q", "v"]),
    preprocessing=dict(mean=(0.5,) * 3, std=(0.5,) * 3, normalise=True, **_geometry),
)
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(lists="train800val200", **_data),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(lists="test", **_data),
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=100, val_interval=100)
