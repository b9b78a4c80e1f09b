# LoRAT-S-224: as vit_b_lorat, with DINOv2 ViT-S/14. No published numbers.
_base_ = "vit_b_lorat.py"
model = dict(backbone=dict(name="vit_small_patch14_dinov2.lvd142m"))
