# AdamW; one epoch of linear warm-up, then half a cosine to zero, both by steps.
optim_wrapper = dict(optimizer=dict(type="adamw", lr=1e-3, weight_decay=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=1, convert_to_iter_based=True),
]
