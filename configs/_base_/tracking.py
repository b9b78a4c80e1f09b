# LoRAT's training recipe (Lin et al., ECCV 2024, arXiv 2403.05231, and the authors' code). Data sets lie under data/.
# fp16 needs a GPU; on a CPU use --amp bf16. Two warm-up epochs, then a cosine whose last two epochs are not run.
default_scope = "zoo"
randomness = dict(seed=0)
train_cfg = dict(by_epoch=True, max_epochs=170, val_interval=10)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type="adamw", lr=1e-4, weight_decay=0.1), clip_grad=dict(max_norm=1.0), amp="fp16")
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, T_max=170, begin=2, end=172, convert_to_iter_based=True),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=False),  # the pairs are drawn, so their order says nothing
    dataset=dict(
        type="TrackingPairs",
        length=131072,
        sources=[
            dict(type="GOT10k", root="data/got10k", split="train"),
            dict(type="LaSOT", root="data/lasot", split="train"),
            dict(type="TrackingNet", root="data/trackingnet", split="train"),
            dict(type="COCOTracks", root="data/coco", split="train2017"),
        ],
    ),
)
_one = dict(batch_size=1, num_workers=2, sampler=dict(type="DefaultSampler", shuffle=False))
val_dataloader = dict(dataset=dict(type="GOT10k", root="data/got10k", split="val"), **_one)
val_evaluator = dict(type="TrackingMetric", profile="got10k")
test_dataloader = dict(dataset=dict(type="LaSOT", root="data/lasot", split="test"), **_one)
test_evaluator = dict(type="TrackingMetric", profile="stark", invisible_hit=False, prefix="test")
custom_hooks = [dict(type="TrackingReport")]
