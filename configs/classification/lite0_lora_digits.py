# The quickstart under the name of its kind, without the baseline that runs first there.
_base_ = "../quickstart.py"
custom_hooks = [dict(type="ClassificationReport")]
