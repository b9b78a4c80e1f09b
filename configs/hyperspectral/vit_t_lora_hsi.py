# A ViT-Ti/16 of photographs (ImageNet-21k, then 1k; fetched by timm) on Indian Pines: patches through a 3-D convolution
# to three channels, enlarged to 224, LoRA on q and v; the front end and the head train beside it.
_base_ = "lola_specvit_tidy.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SpectralFrontEnd",
        in_chans=200,
        front=dict(kind="conv3d", width=(8, 16), band_stride=(4, 2, 1)),
        size=224,
        backbone=dict(type="TimmBackbone", name="vit_tiny_patch16_224", pretrained=True),
    ),
    adapter=dict(type="LoRA", rank=8, where=["q", "v"]),
)
train_cfg = dict(max_epochs=30)
custom_hooks = [dict(type="SpectralReport")]
