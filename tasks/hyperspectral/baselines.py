"""Classifiers that a network has to beat: LDA, SVM with an RBF kernel, random forest, a 1-D network on single spectra.

All are trained on the run's own training pixels and judged on its own validation or test pixels. The first three see
the same spectra, with and without the mean over the pixel's neighbourhood: a network that sees a patch must not be
praised for what a box filter does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.hyperspectral.data import SpectralPatches
from tasks.hyperspectral.metrics import accuracies, confusion
from zoo.engine.state import write_atomically
from zoo.errors import OptionError, nearest
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner

Pixels = NDArray[np.float32]
Targets = NDArray[np.int64]
Fit = Callable[[Pixels, Targets, int], Callable[[Pixels], Targets]]


class Row(NamedTuple):
    """One line of the table; accuracies in 0..1."""

    name: str
    OA: float
    AA: float
    kappa: float
    seconds: float


def fit_lda(pixels: Pixels, targets: Targets, seed: int) -> Callable[[Pixels], Targets]:
    """Linear discriminants; the shared covariance is shrunk by 1e-4, as bands are nearly collinear."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-4).fit(pixels, targets).predict  # type: ignore[no-any-return]


def fit_svm(pixels: Pixels, targets: Targets, seed: int) -> Callable[[Pixels], Targets]:
    """RBF kernel on standardised bands, C = 100, gamma = 1 / (bands * variance)."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    return make_pipeline(StandardScaler(), SVC(C=100.0, cache_size=500)).fit(pixels, targets).predict  # type: ignore[no-any-return]


def fit_forest(pixels: Pixels, targets: Targets, seed: int) -> Callable[[Pixels], Targets]:
    """200 trees."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(200, random_state=seed).fit(pixels, targets).predict  # type: ignore[no-any-return]


class SpectralCNN(nn.Sequential):
    """A small 1-D network on one spectrum: (N, B) -> (N, C)."""

    def __init__(self, bands: int, num_classes: int) -> None:
        super().__init__(
            nn.Unflatten(1, (1, bands)),
            nn.Conv1d(1, 16, 11, 2, 5), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Conv1d(16, 32, 7, 2, 3), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Conv1d(32, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.2), nn.LazyLinear(num_classes),
        )  # fmt: skip


def fit_cnn(pixels: Pixels, targets: Targets, seed: int, epochs: int = 30) -> Callable[[Pixels], Targets]:
    """`SpectralCNN` on standardised bands; AdamW with a one-cycle rate."""
    mean, deviation = pixels.mean(0), pixels.std(0) + 1e-12
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SpectralCNN(pixels.shape[1], int(targets.max()) + 1)
        x, y = torch.from_numpy((pixels - mean) / deviation), torch.from_numpy(targets)
        net(x[:2])
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
        steps = epochs * -(-len(x) // 128)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(x)).split(128):
                if len(chosen) < 2:  # batch norm needs two
                    schedule.step()
                    continue
                loss = F.cross_entropy(net(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    net.eval()

    @torch.no_grad()
    def predict(values: Pixels) -> Targets:
        inputs = torch.from_numpy((values - mean) / deviation).split(4096)
        found: Tensor = torch.cat([net(part).argmax(1) for part in inputs])
        return found.numpy()

    return predict


METHODS: dict[str, tuple[str, Fit, bool]] = {  # name: (label, fit, with neighbourhood mean too)
    "lda": ("LDA", fit_lda, True),
    "svm": ("SVM (RBF)", fit_svm, True),
    "forest": ("random forest", fit_forest, True),
    "cnn": ("1-D CNN", fit_cnn, False),
}


def compare(
    train: SpectralPatches,
    judged: SpectralPatches,
    *,
    methods: Sequence[str] = tuple(METHODS),
    per_class: int = 400,
    seed: int = 0,
) -> Iterator[Row]:
    """A row for each method, as it finishes.

    Args:
        train: whose pixels train the methods, at most `per_class` of each class, drawn at random.
        judged: whose pixels give the accuracies.
    """
    for name in methods:
        if name not in METHODS:
            raise OptionError(f"no baseline is called {name!r}; {nearest(name, METHODS)}")
    chosen = _some_of_each(train.targets, per_class, np.random.default_rng(seed))
    classes = len(train.metainfo["classes"])
    for side in (1, train.patch):
        wanted = [METHODS[name] for name in methods if side == 1 or METHODS[name][2]]
        if not wanted:
            continue
        known, asked = _spectra(train, side)[chosen], _spectra(judged, side)
        for label, fit, _ in wanted:
            started = time.perf_counter()
            predicted = fit(known, train.targets[chosen], seed)(asked)
            numbers = accuracies(confusion(judged.targets, predicted, classes))
            where = "" if side == 1 else f", mean of {side} x {side}"
            yield Row(f"{label}{where}", **numbers, seconds=time.perf_counter() - started)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'method':<{width}}     OA     AA  kappa  seconds"]
    lines += [f"{r.name:<{width}}  {r.OA:.3f}  {r.AA:.3f}  {r.kappa:.3f}  {r.seconds:7.1f}" for r in rows]
    return "\n".join(lines)


@HOOKS.register_module()
class SpectralBaselines(Hook):  # type: ignore[misc]
    """Runs the baselines on a run's data after training, and prints and saves one table with the run's own numbers.

    The run's own row holds its last evaluation. The table is `baselines.csv` in the work folder. With a test
    dataloader the rows are about the test part, which the run is then tested on too; otherwise about validation.

    Args:
        methods: some of "lda", "svm", "forest", "cnn". per_class: most training pixels of a class they are given.
    """

    priority = "VERY_LOW"

    def __init__(self, methods: Sequence[str] = tuple(METHODS), per_class: int = 400) -> None:
        for name in methods:
            if name not in METHODS:
                raise OptionError(f"no baseline is called {name!r}; {nearest(name, METHODS)}")
        self.methods, self.per_class = tuple(methods), per_class
        self.rows: list[Row] = []

    def after_train(self, runner: ZooRunner) -> None:
        """Test the run, run the methods, print."""
        if runner.rank != 0 or runner.world_size > 1:
            return
        started = time.perf_counter()
        numbers, loader = _own_numbers(runner)
        own = Row("this run", numbers["OA"], numbers["AA"], numbers["kappa"], time.perf_counter() - started)
        train = runner.train_dataloader.dataset.dataset
        self.rows = list(compare(train, loader.dataset.dataset, methods=self.methods, per_class=self.per_class))
        self.rows.append(own)
        part = f"{loader.dataset.part} pixels of {loader.dataset.scene.name}"
        print(f"{len(loader.dataset):,} {part}\n{table(self.rows)}", flush=True)
        lines = [f'"{r.name}",{r.OA:.4f},{r.AA:.4f},{r.kappa:.4f},{r.seconds:.1f}' for r in self.rows]
        content = "\n".join([",".join(Row._fields), *lines]) + "\n"
        write_atomically(Path(runner.work_dir, "baselines.csv"), lambda file: file.write(content.encode()))


def _own_numbers(runner: ZooRunner) -> tuple[dict[str, float], Any]:
    """Metrics without their prefix, and the loader they were taken on."""
    if runner.cfg.get("test_dataloader") is not None:
        metrics = runner.test()
        loader = runner.test_loop.dataloader
    elif runner.val_loop is not None:
        metrics, loader = runner.val_loop.run(), runner.val_dataloader
    else:
        raise OptionError("SpectralBaselines needs a val_dataloader or a test_dataloader")
    return {key.rpartition("/")[2]: value for key, value in metrics.items()}, loader


def _spectra(data: SpectralPatches, side: int) -> Pixels:
    """(N, B) spectra of the part's pixels, each divided by its length if the run does so; `side` > 1 averages first."""
    from scipy.ndimage import uniform_filter

    cube = np.asarray(data.scene.cube, dtype=np.float32)
    if side > 1:
        cube = uniform_filter(cube, (side, side, 0))
    found: Pixels = cube[data.pixels[:, 0], data.pixels[:, 1]]
    if data.basis.unit_length:
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return found


def _some_of_each(targets: Targets, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    rows = [rng.permutation(np.flatnonzero(targets == label))[:most] for label in np.unique(targets)]
    return np.concatenate(rows)
