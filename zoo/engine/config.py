"""Config files and the options given on the command line, checked before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from zoo import registry as registries
from zoo.catalog import config_files
from zoo.errors import OptionError, UnknownNameError, ZooError, nearest
from zoo.registry import ZooRegistry

# What the runner reads; a config need not set all of it, and --cfg-options may.
SECTIONS: dict[str, tuple[str, ...]] = {
    "": (
        *("model", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg"),
        *("optim_wrapper", "param_scheduler", "auto_scale_lr", "val_evaluator", "test_evaluator"),
        *("default_hooks", "custom_hooks", "log_processor", "log_level", "visualizer", "experiment_name"),
        *("load_from", "resume", "work_dir", "launcher", "env_cfg", "randomness", "compile", "classes"),
        *("find_unused_parameters", "sync_bn", "activation_checkpointing", "default_scope", "custom_imports"),
    ),
    "train_cfg": ("by_epoch", "max_epochs", "max_iters", "val_begin", "val_interval", "dynamic_intervals"),
    "optim_wrapper": ("optimizer", "accumulative_counts", "clip_grad", "amp", "paramwise_cfg", "constructor"),
    "optim_wrapper.paramwise_cfg": ("layer_decay", "head_lr_mult"),
    "optim_wrapper.clip_grad": ("type", "max_norm", "norm_type", "clip_value"),
    "randomness": ("seed", "deterministic", "diff_rank_seed"),
    "default_hooks": ("checkpoint", "nan_guard", "progress", "results", "logger", "timer", "param_scheduler"),
}
_LOADER = (
    *("dataset", "sampler", "batch_sampler", "collate_fn", "batch_size", "num_workers"),
    *("persistent_workers", "pin_memory", "drop_last", "prefetch_factor"),
)
SECTIONS.update(dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader"), _LOADER))


def load_config(name: str, options: Mapping[str, Any] | None = None) -> Config:
    """A config by file or by the name of a model of the zoo, with dotted `options` set in it.

    Raises:
        UnknownNameError: no such file or name. OptionError: an option that nothing in the config takes.
        ZooError: the file is not valid Python, or fails while it runs.
    """
    path = Path(name)
    if not path.is_file():
        if path.suffix == ".py":
            raise UnknownNameError(f"there is no config file {name}")
        named = config_files()
        if name not in named:
            raise UnknownNameError(f"no config is called {name!r}; {nearest(name, named)}")
        path = named[name]
    try:
        config = Config.fromfile(str(path), lazy_import=False)
    except ZooError:
        raise
    except Exception as error:
        raise ZooError(f"{path} cannot be read as a config: {type(error).__name__}: {error}") from error
    set_options(config, options or {})
    return config


def set_options(config: Config, options: Mapping[str, Any]) -> None:
    """Set dotted keys (`model.adapter.rank`, `param_scheduler.0.end`) in a config.

    A key that is there is replaced. A new key must be one that something takes: an option of the runner (`SECTIONS`),
    or a parameter of the class or function that the surrounding `type` names. Where a part is given by its name
    alone (`adapter="LoRA"`), setting an option below it turns it into `dict(type="LoRA", ...)`.

    Raises:
        OptionError: anything else, with the nearest valid keys.
    """
    for dotted, value in options.items():
        _set(config._cfg_dict, dotted, value)


def _set(config: Any, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    here: Any = config
    for depth, key in enumerate(parents):
        where = ".".join(parents[:depth])
        key = _existing(here, key, where, dotted)
        if isinstance(here[key], str):
            here[key] = {"type": here[key]}
        elif not isinstance(here[key], (dict, list)):
            here[key] = {}
        here = here[key]
    if isinstance(here, list):
        here[_existing(here, last, ".".join(parents), dotted)] = value
        return
    _check_key(here, last, ".".join(parents), dotted)
    here[last] = value


def _existing(here: Any, key: str, where: str, dotted: str) -> Any:
    if isinstance(here, list):
        if not key.isdigit() or int(key) >= len(here):
            raise OptionError(f"--cfg-options {dotted}: {where} is a list of {len(here)}, {key!r} is no index of it")
        return int(key)
    if key not in here:
        _check_key(here, key, where, dotted)
        here[key] = {}
    return key


def _check_key(here: Mapping[str, Any], key: str, where: str, dotted: str) -> None:
    if key in here:
        return
    known = accepted(str(here["type"])) if "type" in here else None
    if known is None and "type" in here:
        return  # takes any option; its constructor has the last word
    choices = {*here, *(known or ()), *SECTIONS.get(where, ())}
    if where == "optim_wrapper.optimizer":  # timm's optimizers; they name what they refuse
        return
    if key not in choices:
        place = f"{where} ({here['type']})" if "type" in here else where or "the config"
        raise OptionError(f"--cfg-options {dotted}: {place} has no {key!r}; {nearest(key, choices)}")


def accepted(kind: str) -> set[str] | None:
    """The options of whatever is registered as `kind`; None if it takes any, or nothing is registered so.

    A name that several registries know (a head and an adapter, say) takes what any of them does.
    """
    found: set[str] = set()
    for value in vars(registries).values():
        if not isinstance(value, ZooRegistry):
            continue
        try:
            names = _parameters(value.get(kind))
        except UnknownNameError:
            continue
        if names is None:
            return None
        found |= names
    return found or None


def _parameters(built: Any) -> set[str] | None:
    from mmengine.optim import _ParamScheduler

    if inspect.isclass(built) and issubclass(built, _ParamScheduler):
        # mmengine's schedulers hand **kwargs up their base classes; the builder itself takes one option more.
        bases = [vars(base)["__init__"] for base in built.__mro__[:-1] if "__init__" in vars(base)]
        return {name for init in bases for name in inspect.signature(init).parameters} | {"convert_to_iter_based"}
    parameters = inspect.signature(built).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)
