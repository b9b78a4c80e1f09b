"""Image classification. Importing this package imports no torch."""
