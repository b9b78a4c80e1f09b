"""The runner: mmengine's, with what this library needs done otherwise."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import BaseLoop, Runner
from torch import nn

from zoo.engine.data import build_loader
from zoo.engine.loops import EpochLoop, IterLoop
from zoo.engine.optim import TrainableConstructor
from zoo.engine.progress import Progress
from zoo.engine.resume import Baseline, restore
from zoo.engine.safe_checkpoint import SafeCheckpoint, latest
from zoo.engine.weights import load_weights
from zoo.errors import OptionError, ZooError
from zoo.registry import OPTIM_WRAPPER_CONSTRUCTORS

_COUNTER = itertools.count()
_TRACKERS = {
    "TensorboardVisBackend": "tensorboard",
    "WandbVisBackend": "wandb",
    "MLflowVisBackend": "mlflow",
    "ClearMLVisBackend": "clearml",
    "NeptuneVisBackend": "neptune",
}
_DEFAULT_HOOKS = {
    "checkpoint": {"type": "SafeCheckpoint"},
    "nan_guard": {"type": "NanGuard"},
    "progress": {"type": "Progress"},
    "results": {"type": "Results"},
}


class ZooRunner(Runner):
    """mmengine's runner with exact resume, trainable-only checkpoints, CPU and GPU alike, and a quiet start.

    Config keys beyond mmengine's: `resume` is False, True (the newest file of the work folder) or a path;
    `load_from` is read before that; `compile` compiles feature extraction (True or options of `torch.compile`);
    `classes` are the label names stored with the adapter. `default_hooks` also holds `checkpoint` (SafeCheckpoint),
    `nan_guard`, `progress` and `results`; None switches one off.
    """

    baseline: Baseline
    _has_loaded: bool
    pending_random: dict[str, Any] | None = None

    @property
    def bare_model(self) -> nn.Module:
        """The model without its distributed wrapper."""
        model: Any = getattr(self.model, "module", self.model)
        return model

    @classmethod
    def from_cfg(cls, cfg: Config) -> ZooRunner:
        """Build from a config; a wrong option anywhere in it is an `OptionError`."""
        cfg = Config(cfg.to_dict(), filename=cfg.filename)
        # mmengine keys its global objects by name and second; two runs may start in the same second.
        stem = Path(cfg.filename).stem if cfg.filename else "run"
        cfg.experiment_name = f"{cfg.get('experiment_name') or stem}_{os.getpid()}_{next(_COUNTER)}"
        cfg.default_scope = "zoo"
        with _blaming("the config"):
            runner: ZooRunner = super().from_cfg(cfg)
        return runner

    def train(self) -> nn.Module:
        """Train to the end; bars are closed and signals given back however it ends."""
        try:
            model: nn.Module = super().train()
            return model
        finally:
            for hook in self.hooks:
                if isinstance(hook, SafeCheckpoint):
                    hook.release_signals()
                if isinstance(hook, Progress):
                    hook.close()

    def announce(self, text: str) -> None:
        """A sentence the user should see, once, also on a quiet console."""
        self.logger.warning(text)

    def build_logger(self, log_level: int | str = "INFO", **options: Any) -> logging.Logger:
        """mmengine's logger: everything to the file, warnings to the console (progress has its own line)."""
        logger: logging.Logger = super().build_logger(log_level, **options)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.WARNING)
        return logger

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        on_gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
        self.logger.info(f"torch {torch.__version__}, {device}, {self.world_size} processes, seed {self.seed}")

    def build_visualizer(self, visualizer: Any = None) -> Any:
        """JSON lines by default; a tracker is used when it is named, and must be installed."""
        for backend in (visualizer or {}).get("vis_backends", []) if isinstance(visualizer, dict) else []:
            package = _TRACKERS.get(backend["type"])
            if package and importlib.util.find_spec(package) is None:
                raise OptionError(f"{backend['type']} needs the package {package!r}: pip install {package}")
        return super().build_visualizer(visualizer)

    def build_model(self, model: nn.Module | dict[str, Any]) -> nn.Module:
        """Build as `zoo.create` does, so that the result can be saved and rebuilt."""
        if isinstance(model, nn.Module):
            return model
        from zoo.factory import build

        return build(_plain_dict(model))

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """To the device; in a distributed run, into DDP on whatever device that is."""
        if not self.distributed:
            wrapped: nn.Module = super().wrap_model(model_wrapper_cfg, model)
            return wrapped
        if model_wrapper_cfg is not None:
            raise OptionError("model_wrapper_cfg is not supported; set find_unused_parameters at the top of the config")
        on_gpu = torch.cuda.is_available()
        device = int(os.environ["LOCAL_RANK"]) if on_gpu else "cpu"
        return MMDistributedDataParallel(
            model.to(device),
            device_ids=[device] if on_gpu else None,
            broadcast_buffers=False,
            find_unused_parameters=bool(self.cfg.get("find_unused_parameters", False)),
        )

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> Any:
        """Loaders whose randomness depends on (seed, epoch, sample) only; see zoo/engine/data.py."""
        if not isinstance(dataloader, dict):
            return dataloader
        with _blaming("a dataloader"):
            return build_loader(dataloader, seed, diff_rank_seed)

    def build_evaluator(self, evaluator: Any) -> Any:
        """mmengine's evaluator; in a distributed run results are exchanged in memory.

        By default mmengine writes them to a folder `.dist_test` of the working directory.
        """
        with _blaming("an evaluator"):
            built = super().build_evaluator(evaluator)
        for metric in built.metrics if self.distributed else ():
            if metric.collect_dir is None:
                metric.collect_device = "gpu"  # its name for "through the process group", gloo included
        return built

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """EpochLoop or IterLoop by `by_epoch`; a loop of another type must derive from one of them."""
        if not isinstance(loop, dict):
            return loop
        options = dict(loop)
        if "type" not in options:
            kind = EpochLoop if options.pop("by_epoch", True) else IterLoop
            with _blaming("train_cfg"):
                return kind(self, self._train_dataloader, **options)
        built: BaseLoop = super().build_train_loop(options)
        if not isinstance(built, (EpochLoop, IterLoop)):
            raise OptionError(
                f"train_cfg builds a {type(built).__name__}, which does not derive from EpochLoop or IterLoop"
            )
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Over trainable parameters in few groups, by `TrainableConstructor` or the `constructor` named."""
        if not isinstance(optim_wrapper, dict):
            return optim_wrapper
        config = _plain_dict(optim_wrapper)
        paramwise = config.pop("paramwise_cfg", None)
        if "constructor" in config:
            constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(config.pop("constructor"))
        else:
            constructor = TrainableConstructor
        if "optimizer" not in config:
            raise OptionError('optim_wrapper needs `optimizer=dict(type="adamw", lr=...)`')
        return constructor(config, paramwise)(self.model)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """mmengine's schedules, with mistakes in the config told as such."""
        with _blaming("param_scheduler"):
            return super().build_param_scheduler(scheduler)

    def register_default_hooks(self, hooks: dict[str, Hook | dict[str, Any] | None] | None = None) -> None:
        """mmengine's defaults, with the checkpoint hook replaced and ours added."""
        given = {**_DEFAULT_HOOKS, **(hooks or {})}
        off = [name for name, hook in given.items() if hook is None and name in _DEFAULT_HOOKS and name != "checkpoint"]
        # mmengine writes into the dicts it is given.
        super().register_default_hooks(
            {name: dict(h) if isinstance(h, dict) else h for name, h in given.items() if name not in off}
        )

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call a stage of all hooks; unlike mmengine's, lets errors through as they are."""
        for hook in self._hooks:
            if hasattr(hook, fn_name):
                getattr(hook, fn_name)(self, **kwargs)

    def load_or_resume(self) -> None:
        """Load `load_from`, then note what the frozen base is, then continue from the resume file if asked to."""
        if self._has_loaded:
            return
        if self._load_from:
            load_weights(self.bare_model, self._load_from)
        self._has_loaded = True
        if not isinstance(self._train_loop, (EpochLoop, IterLoop)):
            return  # only evaluating
        self.baseline = Baseline(self.bare_model)
        if self._resume:
            path = latest(self.work_dir) if self._resume is True else Path(str(self._resume))
            if path is None:  # a job that is always started with --resume begins so
                self.announce(f"nothing to resume in {self.work_dir}: starting from the beginning")
                return
            restore(self, path)
            self.announce(f"resumed from {path}: {self.epoch} epochs, {self.iter} steps done")

    def resume(self, filename: str, *unused: Any, **options: Any) -> None:
        """Not the way in: give `resume=` to the config, so that weights and data start together."""
        raise OptionError(f"set cfg.resume = {filename!r} before building the runner")

    def save_checkpoint(self, *unused: Any, **options: Any) -> None:
        """Not the way out: mmengine's checkpoint hook saves states that cannot be resumed exactly."""
        raise OptionError("the checkpoint hook here is SafeCheckpoint, not mmengine's CheckpointHook")

    def _maybe_compile(self, target: str) -> None:
        options = self.cfg.get("compile", None)
        if options:
            self.bare_model.compile_features(**({} if options is True else dict(options)))  # type: ignore[operator]


@contextmanager
def _blaming(part: str) -> Iterator[None]:
    """What a constructor says about its arguments is a mistake in `part` of the config, told in one line."""
    try:
        yield
    except ZooError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise OptionError(f"{part} does not fit: {error}") from error


def _plain_dict(config: Any) -> dict[str, Any]:
    return dict(config.to_dict()) if hasattr(config, "to_dict") else dict(config)
