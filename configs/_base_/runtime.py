# What every recipe shares: validate each epoch, keep the best, draw the report.
default_scope = "zoo"
randomness = dict(seed=0)
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type="ClassificationMetric")
test_evaluator = dict(type="ClassificationMetric", prefix="test")
custom_hooks = [dict(type="ClassificationReport")]
