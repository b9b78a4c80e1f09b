"""Registries of the zoo: children of mmengine's, filled lazily, one source file at a time.

mmengine imports a whole package on the first look-up. Ours read (without importing) which file declares a
name, so that `ADAPTERS.get("LoRA")` imports `zoo/adapters/lora.py` and nothing else, and listing names costs
no torch import at all.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import mmengine.registry as root
from mmengine.registry import Registry

from zoo.catalog import declared
from zoo.errors import OptionError, UnknownNameError, nearest


class ZooRegistry(Registry):
    """A mmengine registry that imports only the file that declares the wanted name.

    Args:
        name: what the entries are, in the singular ("adapter"); used in error messages.
        packages: packages whose files may declare entries by `@REGISTRY.register_module()`.
        variable: the name of the variable that holds this registry, as written in those decorators.
        parent: mmengine's root registry of the same kind, if it has one.
    """

    def __init__(self, name: str, packages: tuple[str, ...], variable: str, parent: Registry | None = None) -> None:
        super().__init__(name, parent=parent, scope="zoo")
        self._packages = packages
        self._variable = variable

    def names(self) -> dict[str, str]:
        """Every name that can be built, with the first line of its documentation. Imports nothing."""
        found = {n: e.summary for n, e in declared(self._packages, self._variable).items()}
        for name, obj in self._module_dict.items():  # registered by the user at run time
            found.setdefault(name, ((obj.__doc__ or "").strip().splitlines() or [""])[0])
        return found

    def get(self, key: str) -> Any:
        """The class or function registered as `key`; raises `UnknownNameError` naming the nearest ones.

        Unlike mmengine's, never resolves a dotted path by importing it: a config from a hub is data.
        """
        name = key.removeprefix("zoo.").removeprefix("mmengine.")
        if name not in self._module_dict:
            entry = declared(self._packages, self._variable).get(name)
            if entry is not None:
                import_module(entry.module)
        ancestor: Registry | None = self
        while ancestor is not None:
            if name in ancestor.module_dict:
                return ancestor.module_dict[name]
            ancestor = ancestor.parent
        choices = [*self.names(), *(self.parent.module_dict if self.parent else ())]
        raise UnknownNameError(f"no {self.name} is called {key!r}; {nearest(name, choices)}")

    def create(self, config: str | dict[str, Any], **extra: Any) -> Any:
        """Build from a name or a `dict(type=..., **options)`; a wrong option raises `OptionError`."""
        options: dict[str, Any] = {"type": config} if isinstance(config, str) else dict(config)
        if "type" not in options:
            raise OptionError(f"the {self.name} config {options!r} has no `type`; one of {sorted(self.names())}")
        kind = options.pop("type")
        build = self.get(kind) if isinstance(kind, str) else kind
        given = {**extra, **options}
        try:
            inspect.signature(build).bind(**given)
        except TypeError as error:
            known = [name for name in inspect.signature(build).parameters if name not in extra]
            wrong = next((name for name in given if name not in known), None)
            hint = nearest(wrong, known) if wrong is not None else f"it takes {', '.join(known)}"
            raise OptionError(f"{self.name} {getattr(build, '__name__', build)!r}: {error}; {hint}") from error
        return build(**given)


ADAPTERS = ZooRegistry("adapter", ("zoo.adapters", "zoo.attention"), "ADAPTERS")
ATTENTION = ZooRegistry("attention", ("zoo.attention",), "ATTENTION")
BACKBONES = ZooRegistry("backbone", ("backbones",), "BACKBONES")
HEADS = ZooRegistry("head", ("heads",), "HEADS")
CONSISTENCY = ZooRegistry("consistency loss", ("zoo.adapters",), "CONSISTENCY")
MODELS = ZooRegistry("model", ("tasks",), "MODELS", root.MODELS)
DATASETS = ZooRegistry("dataset", ("tasks",), "DATASETS", root.DATASETS)
TRANSFORMS = ZooRegistry("transform", ("tasks",), "TRANSFORMS", root.TRANSFORMS)
METRICS = ZooRegistry("metric", ("tasks",), "METRICS", root.METRICS)
HOOKS = ZooRegistry("hook", ("zoo.engine", "tasks"), "HOOKS", root.HOOKS)
OPTIM_WRAPPERS = ZooRegistry("optimizer wrapper", ("zoo.engine",), "OPTIM_WRAPPERS", root.OPTIM_WRAPPERS)
OPTIM_WRAPPER_CONSTRUCTORS = ZooRegistry(
    "optimizer constructor", ("zoo.engine",), "OPTIM_WRAPPER_CONSTRUCTORS", root.OPTIM_WRAPPER_CONSTRUCTORS
)
DATA_SAMPLERS = ZooRegistry("data sampler", ("tasks", "zoo.engine"), "DATA_SAMPLERS", root.DATA_SAMPLERS)

# The runner looks these up under the default scope and warns when a scope has no child of that kind.
OPTIMIZERS = ZooRegistry("optimizer", ("zoo.engine",), "OPTIMIZERS", root.OPTIMIZERS)
PARAM_SCHEDULERS = ZooRegistry("parameter scheduler", ("zoo.engine",), "PARAM_SCHEDULERS", root.PARAM_SCHEDULERS)
LOOPS = ZooRegistry("loop", ("zoo.engine",), "LOOPS", root.LOOPS)
RUNNERS = ZooRegistry("runner", ("zoo.engine",), "RUNNERS", root.RUNNERS)
EVALUATORS = ZooRegistry("evaluator", ("zoo.engine",), "EVALUATORS", root.EVALUATOR)
VISUALIZERS = ZooRegistry("visualizer", ("zoo.engine",), "VISUALIZERS", root.VISUALIZERS)
VISBACKENDS = ZooRegistry("visualizer backend", ("zoo.engine",), "VISBACKENDS", root.VISBACKENDS)
LOG_PROCESSORS = ZooRegistry("log processor", ("zoo.engine",), "LOG_PROCESSORS", root.LOG_PROCESSORS)
MODEL_WRAPPERS = ZooRegistry("model wrapper", ("zoo.engine",), "MODEL_WRAPPERS", root.MODEL_WRAPPERS)
FUNCTIONS = ZooRegistry("function", ("zoo.engine",), "FUNCTIONS", root.FUNCTIONS)
