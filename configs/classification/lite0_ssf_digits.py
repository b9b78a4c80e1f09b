# The quickstart's data and budget; scale and shift of every site's output, and the head.
_base_ = "lite0_lora_digits.py"
model = dict(adapter=dict(_delete_=True, type="SSF"))
optim_wrapper = dict(optimizer=dict(lr=1e-2))
