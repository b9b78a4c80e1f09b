"""What a run on a scene leaves behind: the fitted reduction inside the model, the split, curves, class table, maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.hooks import Hook

from tasks.classification.report import confusion_figure, save_figure
from tasks.hyperspectral.data import SpectralPatches
from tasks.hyperspectral.maps import predict_scene, save_map
from tasks.hyperspectral.metrics import SceneMetric, accuracies, class_accuracy, confusion
from tasks.hyperspectral.splits import describe
from zoo.errors import OptionError
from zoo.registry import HOOKS

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner


@HOOKS.register_module()
class SpectralReport(Hook):  # type: ignore[misc]
    """Before training: checks that data and model fit, and puts the fitted reduction into the model. After it: maps.

    Writes into the work folder the map of the validation (and, after a test, of the test) scene beside ground truth
    and false colours, the predicted labels and their uncertainty as .npy and .mat, and the confusion matrix.

    Args:
        maps: draw whole scenes; off for scenes so large that only labelled pixels should be predicted.

    Raises:
        OptionError: classes, bands, components or patch sizes that do not fit each other, or parts of a run reduced
            by different bases.
    """

    priority = "LOW"  # after the table of results is written

    def __init__(self, maps: bool = True) -> None:
        self.maps = maps

    def before_train(self, runner: ZooRunner) -> None:
        """Everything that can be wrong between data and model, before the first step."""
        train = _data(runner.train_dataloader)
        self._check(runner, train)
        if runner.val_loop is not None:
            self._agree(train, _data(runner.val_dataloader))
        model: Any = runner.bare_model
        model.reduction.keep(train.basis)
        if runner.cfg.get("classes") is None:
            runner.cfg["classes"] = list(train.scene.classes)
        if runner.rank == 0 and train.scene.labels is not None:
            runner.logger.info("\n" + describe(train.scene.labels, train.parts, train.scene.classes))

    def before_test(self, runner: ZooRunner) -> None:
        """A model from a file must have been trained on the same reduction as the test scene got."""
        data, model = _data(runner.test_loop.dataloader), runner.bare_model
        self._check(runner, data)
        held = model.reduction.basis()  # type: ignore[union-attr, operator]
        if not np.allclose(held.matrix, data.basis.matrix, rtol=1e-4, atol=1e-6):
            raise OptionError(
                "the test data are reduced by another basis than the model was trained with; "
                "give the test dataset `fit_scene` and `fit_split` of the training data"
            )

    def after_train(self, runner: ZooRunner) -> None:
        """Draw the validation scene."""
        if runner.rank == 0 and runner.val_loop is not None:
            self._write(runner, runner.val_loop, "val")

    def after_test(self, runner: ZooRunner) -> None:
        """Draw the test scene."""
        if runner.rank == 0:
            self._write(runner, runner.test_loop, "test")

    def _write(self, runner: ZooRunner, loop: Any, stem: str) -> None:
        data, folder = _data(loop.dataloader), Path(runner.work_dir)
        classes = data.scene.classes
        for metric in loop.evaluator.metrics:
            if isinstance(metric, SceneMetric) and metric.confusion is not None:
                save_figure(confusion_figure(metric.confusion, classes), folder / f"{stem}_confusion.png")
                shares = class_accuracy(metric.confusion)
                runner.logger.info(f"{stem} accuracy of each class: {dict(zip(classes, shares.round(4), strict=True))}")
        if not self.maps:
            return
        found = predict_scene(runner.bare_model, data.scene.cube)
        inside = data.parts[data.part]
        assert data.scene.labels is not None
        counts = confusion(data.scene.labels[inside] - 1, found.labels[inside] - 1, len(classes))
        numbers = accuracies(counts)
        heading = f"{data.scene.name}, {data.part} pixels: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
        save_map(folder, stem, data.scene, found, classes, heading)

    def _check(self, runner: ZooRunner, data: SpectralPatches) -> None:
        model: Any = runner.bare_model
        bands, components = data.basis.matrix.shape
        if model.reduction.matrix.shape != (bands, components):
            raise OptionError(
                f"{data.scene.name} has {bands} bands, reduced to {components}; the model's `reduction` says "
                f"{tuple(model.reduction.matrix.shape)}"
            )
        if data.patch != model.patch:
            raise OptionError(f"patches of {data.patch} do not fit a model of patch={model.patch}")
        classes, head = data.scene.classes, model.head.num_classes
        if len(classes) != head:
            raise OptionError(f"the head has num_classes={head}, the scene {len(classes)} classes: {list(classes)}")
        named = runner.cfg.get("classes")
        if named is not None and list(named) != list(classes):
            raise OptionError(f"the config's classes {list(named)} are not the scene's {list(classes)}")

    def _agree(self, train: SpectralPatches, other: SpectralPatches) -> None:
        if train.scene.classes != other.scene.classes:
            raise OptionError(f"{train.scene.name} and {other.scene.name} differ in their classes")
        same = train.basis.matrix.shape == other.basis.matrix.shape
        if not same or not np.array_equal(train.basis.matrix, other.basis.matrix):
            raise OptionError(
                f"{train.part} and {other.part} data are reduced by different bases; give the same scene, split and "
                "reduction, or `fit_scene` and `fit_split`"
            )


def _data(loader: Any) -> SpectralPatches:
    data = getattr(loader.dataset, "dataset", loader.dataset)
    if not isinstance(data, SpectralPatches):
        raise OptionError(f"SpectralReport needs SpectralPatches, got {type(data).__name__}")
    return data
