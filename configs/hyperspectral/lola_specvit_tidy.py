# The tidy LoLA-SpecViT (1.2 M parameters, all trained) on Indian Pines; blocks of the scene keep test ground apart.
# Another scene: --cfg-options with its name in all three `dataset.scene`s, its bands in `model.reduction`
# (both numbers) and `model.backbone.in_chans`, and its num_classes.
_base_ = ["../_base_/runtime.py", "../_base_/adamw_cosine.py"]

_data = dict(
    type="SpectralPatches",
    scene=dict(name="indian_pines", root="data/hyperspectral"),
    split=dict(how="blocks", block=16, train=0.5, val=0.1),
    reduction=dict(kind="standardise", unit_length=True),
    patch=9,
)
model = dict(
    type="SpectralClassifier",
    backbone=dict(type="TimmBackbone", name="lola_specvit_tidy", in_chans=200, img_size=9, band_stride=(4, 2, 1)),
    head=dict(type="LinearHead", num_classes=16, label_smoothing=0.1),
    patch=9,
    reduction=dict(bands=200, components=200, unit_length=True),
    data_preprocessor=dict(class_mix=1.0),
)
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(part="train", augment=True, **_data),
)
val_dataloader = dict(
    batch_size=512,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(part="val", **_data),
)
test_dataloader = dict(
    batch_size=512,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(part="test", **_data),
)
val_evaluator = dict(type="SceneMetric")
test_evaluator = dict(type="SceneMetric", prefix="test")
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
train_cfg = dict(max_epochs=50, val_interval=5)
custom_hooks = [dict(type="SpectralReport"), dict(type="SpectralBaselines")]
