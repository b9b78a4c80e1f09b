# The quickstart's data and budget; everything trains, batch statistics included.
_base_ = "lite0_lora_digits.py"
model = dict(adapter=None)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
