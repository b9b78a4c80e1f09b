# Fourteen ways to adapt one convolutional network, side by side, in about half an hour on one CPU core:
#
#     OMP_NUM_THREADS=1 python tools/compare.py configs/compare/digits_lite0.py --out work_dirs/compare_digits
#
# EfficientNet-Lite0 with its ImageNet weights and the handwritten digits of the quickstart, with 30 training images a
# class for 5 epochs. Each method has two learning rates of its own, half an order of magnitude apart.
_base_ = "../quickstart.py"
train_cfg = dict(max_epochs=5, val_interval=5)  # only the end is looked at: no early stopping for anybody
train_dataloader = dict(dataset=dict(limit_per_class=30))
custom_hooks = []

_low, _middle, _high = [1e-3, 3e-3], [3e-3, 1e-2], [1e-2, 3e-2]
_pointwise = ["conv", "*conv_pw*"]  # the 31 1x1 convolutions
methods = {
    "LinearProbe": dict(adapter="LinearProbe", lr=_high),
    "BitFit": dict(adapter="BitFit", lr=_high),
    "NormTuning": dict(adapter="NormTuning", lr=_middle),
    "LastBlock": dict(adapter=dict(type="LastBlocks", blocks=1), lr=_low),
    "SSF": dict(adapter="SSF", lr=_high),
    "ELA": dict(adapter=dict(type="ELA", norm_groups=8), lr=_middle),
    "LoRA r4": dict(adapter=dict(type="LoRA", rank=4, alpha=8, where=_pointwise), lr=_middle),
    "LoRA r8": dict(adapter=dict(type="LoRA", rank=8, alpha=16, where=_pointwise), lr=_middle),
    "PiSSA r8": dict(adapter=dict(type="LoRA", rank=8, init="pissa", where=_pointwise), lr=_low),
    "DoRA r4": dict(adapter=dict(type="DoRA", rank=4, alpha=8, where=_pointwise), lr=_middle),
    "BlockLoRA 4x2": dict(adapter=dict(type="BlockLoRA", rank=8, blocks=4, alpha=4.0, where=_pointwise), lr=_middle),
    "Hydra k2": dict(adapter=dict(type="Hydra", rank=2, where=_pointwise), lr=_middle),
    "CoLoRA 7%": dict(adapter=dict(type="CoLoRA", delta=0.07), lr=_middle),
    "Full": dict(adapter="FullFineTuning", lr=_low),
}
