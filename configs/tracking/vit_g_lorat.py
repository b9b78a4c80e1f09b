# LoRAT-g-224: as vit_b_lorat, with DINOv2 ViT-g/14 (SwiGLU: both halves of its first layer share one adapter).
_base_ = "vit_b_lorat.py"
model = dict(backbone=dict(name="vit_giant_patch14_dinov2.lvd142m", drop_path=0.4))
