# LoLA-SpecViT as its authors train it (arXiv 2506.17759 and their program), on Salinas; 254.6 M parameters, a GPU.
# Only the gated LoRA layers train, from a random base. As there, PCA sees all pixels (fit="scene") and test patches
# overlap training patches (how="random"): needed to compare with its numbers, no measure of accuracy on new ground.
# Not as there: bands come first, as the paper means it; `model.data_preprocessor.axis_order=rows_first` is theirs.
# The script's batch is 32 with accumulation over 2, clipping at 0.5, label smoothing 0.1, 10 % of each class to train.
_base_ = ["../_base_/runtime.py"]

_scene = dict(name="salinas", root="data/hyperspectral")
_data = dict(
    type="SpectralPatches",
    scene=_scene,
    split=dict(how="random", train=0.1, val=0.1, seed=345),
    reduction=dict(kind="pca", components=15, whiten=1.0, fit="scene"),
    patch=15,
)
model = dict(
    type="SpectralClassifier",
    backbone=dict(type="TimmBackbone", name="lola_specvit", in_chans=15, img_size=15, num_classes=16),
    head=dict(num_classes=16, label_smoothing=0.1),
    patch=15,
    reduction=dict(bands=204, components=15),
    lora_only=True,
    data_preprocessor=dict(per_patch=True, axis_order="bands_first"),
)
train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(part="train", **_data),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(part="val", **_data),
)
test_dataloader = dict(
    batch_size=128,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(part="test", **_data),
)
val_evaluator = dict(type="SceneMetric")
test_evaluator = dict(type="SceneMetric", prefix="test")
optim_wrapper = dict(
    optimizer=dict(type="adamw", lr=2e-5, weight_decay=0.01),
    accumulative_counts=2,
    clip_grad=dict(max_norm=0.5),
)
# Their cyclical schedule counts optimizer steps; the training script restarts by epochs instead (`restart_rate`).
param_scheduler = []
train_cfg = dict(max_epochs=100, val_interval=5)
custom_hooks = [dict(type="SpectralReport"), dict(type="CyclicLoRA", first=1000, growth=2, lowest=1e-6, scale=2.0)]
