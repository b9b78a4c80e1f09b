# The quickstart's data and budget; only the head trains.
_base_ = "lite0_lora_digits.py"
model = dict(adapter=dict(_delete_=True, type="LinearProbe"))
optim_wrapper = dict(optimizer=dict(lr=1e-2))
