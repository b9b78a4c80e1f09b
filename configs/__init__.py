"""Python configs: one file is one model, one name, one training recipe."""
