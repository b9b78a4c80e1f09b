"""Measurements whose numbers can be compared: everything that is compared runs in turn, in one process."""
