custom_imports = dict(imports=["tiny_task"], allow_failed_imports=False)
model = dict(type="TinyTask", data_preprocessor=dict(type="ZooPreprocessor", mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2)))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type="TinyImages", size=22, augment=True),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(type="TinyImages", size=16),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="TinyAccuracy")]
test_evaluator = val_evaluator
optim_wrapper = dict(
    optimizer=dict(type="adamw", lr=0.01, weight_decay=0.05),
    accumulative_counts=1,
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(type="SafeCheckpoint", every_steps=1, keep=2))
custom_hooks = [dict(type="TrainableEMA", decay=0.9)]
