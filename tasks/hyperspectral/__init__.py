"""Hyperspectral classification: a class for each pixel of a cube. Importing this package imports no torch."""
