"""Adapters: one method a file. Importing this package imports no torch; `zoo.registry.ADAPTERS` finds the files."""
