# Block-LoRA (Zhou et al. 2025, arXiv 2501.16720) in CLIP-LoRA's protocol: two blocks of the rank share one A, which
# leaves 138,240 trained numbers of CLIP-LoRA's 184,320. Rank and number of blocks of the paper's tables are not known.
_base_ = "clip_vit_b16_lora_fewshot.py"
model = dict(
    adapter=dict(_delete_=True, type="BlockLoRA", rank=2, blocks=2, alpha=1.0, dropout=0.25, where=["q", "k", "v"])
)
