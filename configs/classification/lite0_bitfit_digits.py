# The quickstart's data and budget; biases and the head train.
_base_ = "lite0_lora_digits.py"
model = dict(adapter=dict(_delete_=True, type="BitFit"))
optim_wrapper = dict(optimizer=dict(lr=1e-2))
