"""The thin layer over mmengine: runner, hooks, optimisation. Importing this package imports no torch."""
