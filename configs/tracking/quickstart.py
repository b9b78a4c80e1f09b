# A small tracker from nothing, offline, on two CPU cores.
#
#     python tools/train.py configs/tracking/quickstart.py
#
# LoRAT's joint forward, head, losses and crops, with a ViT of half a million parameters that starts random (no ViT
# with weights ships in a package, so there is nothing to adapt and everything trains). The films are composed from
# photographs inside scikit-learn; those of the validation use other parts of the photographs than training.
# `val/still_auc` beside `val/auc` is what a box scores that stays where it began. Seed 0: AUC 64.1 % against 10.0 %,
# after 8 minutes on one shared CPU core; the score rises late (39.9 % after 5 epochs, 61.6 % after 15).
_template, _search = (32, 32), (64, 64)
default_scope = "zoo"
randomness = dict(seed=0)
model = dict(
    type="JointTracker",
    backbone=dict(
        type="JointViT",
        name="vit_tiny_patch16_224",
        **dict(img_size=_search, patch_size=8, embed_dim=96, depth=4, num_heads=3, weight_init="jax"),
        template_size=_template,
        search_size=_search,
        positions="sincos",
    ),
    head=dict(type="MLPAnchorFreeHead", init_std=0.1),
    tracking=dict(search_factor=3.0),
)
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=5)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type="adamw", lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=1, convert_to_iter_based=True),
]
_films = dict(type="ComposedTracks", size=128, speed=0.7)
train_dataloader = dict(
    batch_size=32,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="TrackingPairs",
        sources=[dict(split="train", count=400, length=8, **_films)],
        length=1600,
        template_size=_template,
        search_size=_search,
        stride=8,
        search_factor=3.0,
        jitter=dict(shift=2.0),
        augment=dict(type="PairAugment", jitter=0.2, strong=False),
    ),
)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(split="val", count=16, length=24, **_films),
)
val_evaluator = dict(type="TrackingMetric")
test_dataloader = dict(val_dataloader, dataset=dict(split="val", count=32, length=24, seed=1, **_films))
test_evaluator = dict(type="TrackingMetric", prefix="test")
custom_hooks = [dict(type="TrackingReport")]
