"""Tasks: one folder each, with model, data, transforms and metrics. Importing this package imports no torch."""
