"""Feature extractors of our own, and the doors to timm's and open_clip's. Importing this package imports no torch."""
