"""From B bands to K features a pixel: PCA or standardisation, fitted once, kept with the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.errors import OptionError, ZooError

Kind = Literal["pca", "standardise"]


@dataclass(frozen=True)
class Basis:
    """z = (x - mean) @ matrix, for x (..., B), after dividing x by its own length where `unit_length` is set."""

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]  # (B, K)
    unit_length: bool = False

    def __call__(self, cube: NDArray[Any], rows: int = 32) -> NDArray[np.float32]:
        """(H, W, B) -> (H, W, K) float32, a few rows at a time, so a memory-mapped cube stays on the disk.

        Raises:
            ZooError: another number of bands than it was fitted on.
        """
        if cube.shape[-1] != len(self.mean):
            raise ZooError(f"the cube has {cube.shape[-1]} bands; what it is given to was fitted on {len(self.mean)}")
        out = np.empty((*cube.shape[:-1], self.matrix.shape[1]), dtype=np.float32)
        for i in range(0, len(cube), rows):
            out[i : i + rows] = (_spectra(cube[i : i + rows], self.unit_length) - self.mean) @ self.matrix
        return out


def fit_basis(
    pixels: NDArray[Any], *, kind: Kind = "pca", components: int = 15, whiten: float = 1.0, unit_length: bool = False
) -> Basis:
    """Fit on pixels (N, B).

    Args:
        kind: "pca" keeps the `components` directions of largest variance; "standardise" keeps all bands, each with
            zero mean and unit deviation.
        whiten: 1 scales each component to unit variance (over N - 1); 0 keeps their proportions, the first with unit
            variance; 0.5 lies halfway on a logarithmic scale. Full whitening makes noise as loud as the signal, none
            leaves all but the first few components too quiet for a network.
        unit_length: divide each spectrum by its Euclidean length first, which takes away most of the illumination.

    Raises:
        OptionError: more components than bands or than pixels allow. ZooError: pixels that are all alike.
    """
    if not 0 <= whiten <= 1:
        raise OptionError(f"whiten must lie in [0, 1], got {whiten}")
    spectra = _spectra(pixels, unit_length)
    mean = spectra.mean(0)
    centred = spectra - mean
    if kind == "standardise":
        return _basis(mean, np.diag(1 / np.maximum(centred.std(0), 1e-12)), unit_length)
    if kind != "pca":
        raise OptionError(f"the reduction is 'pca' or 'standardise', got {kind!r}")
    if not 1 <= components <= min(spectra.shape[1], len(spectra) - 1):
        raise OptionError(
            f"{components} components cannot be fitted on {len(spectra)} pixels of {spectra.shape[1]} bands"
        )
    variance, vectors = np.linalg.eigh(centred.T @ centred / (len(spectra) - 1))
    order = np.argsort(variance)[::-1][:components]
    variance, vectors = np.maximum(variance[order], 0), vectors[:, order]
    if variance[0] == 0:
        raise ZooError("all training pixels have the same spectrum: there is nothing to tell apart")
    # The sign of a direction is arbitrary; the largest entry is made positive, so that it is the same everywhere.
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.sign(vectors[largest, np.arange(components)])
    share = np.maximum(variance / variance[0], 1e-12)
    vectors = vectors / np.sqrt(variance[0] * share**whiten)
    return _basis(mean, vectors, unit_length)


def _basis(mean: NDArray[np.float64], matrix: NDArray[np.float64], unit_length: bool) -> Basis:
    # Rounded to what a saved model can hold, so that a loaded model reduces bit for bit as the training did.
    return Basis(mean.astype(np.float32).astype(np.float64), matrix.astype(np.float32).astype(np.float64), unit_length)


def _spectra(values: NDArray[Any], unit_length: bool) -> NDArray[np.float64]:
    spectra = np.asarray(values, dtype=np.float64)
    if not unit_length:
        return spectra
    return spectra / np.maximum(np.linalg.norm(spectra, axis=-1, keepdims=True), 1e-12)


class Reduction(nn.Module):
    """Keeps a basis with the model, so that a new cube is reduced exactly as the training pixels were.

    Args:
        bands: B. components: K. unit_length: see `fit_basis`.
    """

    mean: Tensor
    matrix: Tensor
    num_batches_tracked: Tensor

    def __init__(self, bands: int, components: int, unit_length: bool = False) -> None:
        super().__init__()
        self.unit_length = unit_length
        self.register_buffer("mean", torch.zeros(bands))
        self.register_buffer("matrix", torch.zeros(bands, components))
        # Statistics of training data, like those of a batch norm, and counted so: a saved model then holds them.
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    @property
    def fitted(self) -> bool:
        """Whether a basis was put in."""
        return bool(self.num_batches_tracked)

    def keep(self, basis: Basis) -> None:
        """Take a basis.

        Raises:
            OptionError: of another size than the model was built for, or of another treatment of lengths.
        """
        if basis.matrix.shape != tuple(self.matrix.shape) or basis.unit_length != self.unit_length:
            raise OptionError(
                f"the data are reduced from {basis.matrix.shape[0]} bands to {basis.matrix.shape[1]} with unit_length="
                f"{basis.unit_length}; the model's `reduction` says {tuple(self.matrix.shape)} and {self.unit_length}"
            )
        self.mean.copy_(torch.from_numpy(basis.mean))
        self.matrix.copy_(torch.from_numpy(basis.matrix))
        self.num_batches_tracked.fill_(1)

    def basis(self) -> Basis:
        """The basis that was kept.

        Raises:
            ZooError: none was.
        """
        if not self.fitted:
            raise ZooError("the model holds no reduction: train it with the hook SpectralReport, or call keep(basis)")
        return Basis(self.mean.cpu().double().numpy(), self.matrix.cpu().double().numpy(), self.unit_length)
