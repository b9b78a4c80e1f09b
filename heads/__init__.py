"""Heads: from features to raw predictions, with their loss and decoding. Importing this package imports no torch."""
