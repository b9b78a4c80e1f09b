"""Plug-in attention: one module a file. Importing this package imports no torch."""
