# 1,797 real handwritten digits of 8 x 8 pixels, inside scikit-learn: 60 % training, 20 % validation, 20 % test.
# Not flipped (a mirrored 2 is no 2) and not cropped (nothing in 8 pixels is margin).
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
geometry = dict(size=(64, 64), crop_pct=1.0, interpolation="bicubic")
_data = dict(type="EmbeddedDataset", name="digits", transform=dict(type="EvalTransform", **geometry))
train_dataloader = dict(
    batch_size=32, sampler=dict(type="DefaultSampler", shuffle=True), dataset=dict(split="train", **_data)
)
val_dataloader = dict(
    batch_size=64, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(split="val", **_data)
)
test_dataloader = dict(
    batch_size=64, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(split="test", **_data)
)
