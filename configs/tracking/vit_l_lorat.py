# LoRAT-L-224: as vit_b_lorat, with DINOv2 ViT-L/14 and drop path. Published: LaSOT AUC 74.2, normalised precision 83.6.
_base_ = "vit_b_lorat.py"
model = dict(backbone=dict(name="vit_large_patch14_dinov2.lvd142m", drop_path=0.1))
