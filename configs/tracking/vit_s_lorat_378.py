# LoRAT-S-378: search crops of 378 px with more context (factor 5), template crops of 196 px.
_base_ = "vit_s_lorat.py"
_template, _search = (196, 196), (378, 378)
model = dict(backbone=dict(template_size=_template, search_size=_search), tracking=dict(search_factor=5.0))
train_dataloader = dict(dataset=dict(template_size=_template, search_size=_search, search_factor=5.0))
