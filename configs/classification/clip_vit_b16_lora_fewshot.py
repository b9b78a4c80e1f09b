# CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv 2405.18541): CLIP ViT-B/16 (OpenAI's weights, fetched by open_clip), LoRA
# of rank 2 on q, k and v of every block of both towers, 16 images a class, last-step accuracy. Needs a CUDA GPU (fp16).
#
# The set is EuroSAT as folders of images, data/eurosat/{train,test}/<class>. For another of the eleven public sets
# change `root`, `classes` and, if wanted, `templates` (tasks/classification/clip_templates.py). Published numbers use
# CoOp's splits, shots 1, 2, 4, 8, 16 and the mean over seeds 1, 2, 3; `few_shot_run(config, shots=4, seed=2)` of
# tasks/classification/few_shot.py gives the config of one cell. By hand, `max_iters` is 500 times the shots.
_base_ = ["../_base_/runtime.py"]

classes = [
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
]
_names = [
    *("Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road", "Industrial Buildings"),
    *("Pasture Land", "Permanent Crop Land", "Residential Buildings", "River", "Sea or Lake"),
]
_size = (224, 224)
_data = dict(type="ImageFolderDataset", classes=classes)
_test = dict(root="data/eurosat/test", transform=dict(type="EvalTransform", size=_size, crop_pct=1.0), **_data)

model = dict(
    type="CLIPClassifier",
    backbone=dict(type="OpenCLIPModel", name="ViT-B-16/openai", pretrained=True),
    # The one sentence that CLIP-LoRA's published code uses on every set.
    head=dict(type="CLIPZeroShotHead", classes=_names, templates=["a photo of a {}."]),
    adapter=dict(type="LoRA", rank=2, alpha=1, rslora=True, dropout=0.25, where=["q", "k", "v"]),
    preprocessing=dict(size=_size, crop_pct=1.0, normalise=True),
)
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="FewShotDataset",
        shots=16,
        seed=1,
        dataset=dict(
            root="data/eurosat/train",
            transform=dict(type="TrainTransform", size=_size, scale=(0.08, 1.0), flip=0.5),
            **_data,
        ),
    ),
)
val_dataloader = dict(batch_size=256, num_workers=4, sampler=dict(type="DefaultSampler", shuffle=False), dataset=_test)
test_dataloader = val_dataloader
randomness = dict(seed=1)
optim_wrapper = dict(optimizer=dict(type="adamw", lr=2e-4, weight_decay=1e-2, betas=(0.9, 0.999)), amp="fp16")
param_scheduler = dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=False)
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=8000, val_interval=8000)
