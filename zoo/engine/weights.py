"""Trained weights into a model that is already built: from a saved folder, a resume file, or a safetensors file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from zoo.engine.resume import load_tensors
from zoo.engine.state import read_resume_file
from zoo.errors import CheckpointFileError


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Load what was trained.

    Args:
        source: a folder written by `zoo.save` (or its address, `hf-hub:org/name`); a resume file `step_N.pth` or
            `best.pth`, whose averaged weights are taken if it has them; a `.safetensors` file with any part of the
            model's tensors.

    Raises:
        CheckpointFileError: nothing readable there. CheckpointError: it does not fit the model, naming the keys.
    """
    path = Path(source)
    if path.is_dir() or (not path.exists() and ":" in str(source)):
        from zoo.checkpoint import load_into

        load_into(model, source)
    elif path.suffix == ".safetensors" and path.is_file():
        from safetensors.torch import load_file

        load_tensors(model, load_file(path), str(path), partial=True)
    elif path.suffix == ".pth":
        content = read_resume_file(path)
        averaged = content.get("averaged", {}).get("tensors", {})
        load_tensors(model, {**content["state_dict"], **averaged}, str(path))
    else:
        raise CheckpointFileError(f"{source} is not a saved folder, a resume file (.pth) or a .safetensors file")
