"""Single-object tracking. Importing this package imports no torch."""
