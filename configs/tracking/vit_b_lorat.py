# LoRAT-B-224 (Lin et al., ECCV 2024, arXiv 2403.05231): DINOv2 ViT-B/14 (fetched by timm), LoRA of rank 64 on every
# linear layer of the blocks with q, k and v apart, search crops of 224 px, template crops of 112 px.
#
#     python tools/train.py vit_b_lorat
#
# 170 epochs of 1,024 steps of 128 pairs from GOT-10k, LaSOT, TrackingNet and COCO in equal shares. The published run
# leaves out about 1,000 sequences of GOT-10k that overlap with other benchmarks: give their list as `exclude`. For the
# GOT-10k protocol train on GOT-10k alone, 100 epochs. Published: LaSOT AUC 71.7, normalised precision 80.9.
_base_ = ["../_base_/tracking.py"]

_template, _search = (112, 112), (224, 224)
model = dict(
    type="JointTracker",
    backbone=dict(
        type="JointViT",
        name="vit_base_patch14_dinov2.lvd142m",
        pretrained=True,
        template_size=_template,
        search_size=_search,
    ),
    head=dict(type="MLPAnchorFreeHead", window=0.45),
    adapter=dict(type="LoRA", rank=64, alpha=64, init="both_normal", where=["q", "k", "v", "out", "fc1", "fc2"]),
    tracking=dict(template_factor=2.0, search_factor=4.0, least_side=10.0),
)
train_dataloader = dict(
    dataset=dict(template_size=_template, search_size=_search, template_factor=2.0, search_factor=4.0)
)
