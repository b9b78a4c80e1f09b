"""Which places of a model are really run: the guard against adapters that never see a gradient.

Some models read a layer's weight without calling the layer (timm's BEiT, EVA and Swin-V2, torchvision's Swin, torch's
fused encoder layer). A branch around such a layer does nothing at all. `probe` runs the model once and tells.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_map_only

from zoo.adapters.base import Site
from zoo.adapters.sites import find_sites
from zoo.errors import OptionError, SiteError

Use = Literal["called", "read", "never"]
_STRENGTH: dict[Use, int] = {"never": 0, "read": 1, "called": 2}


def probe(model: nn.Module, example: Any = None) -> dict[str, Use]:
    """How one forward pass uses each module that is a site: path -> "called", "read" (its parameters only) or "never".

    The pass runs in evaluation mode on a copy that has shapes but no data, so it costs neither memory nor arithmetic
    and leaves `model` untouched. Where a model cannot run that way, it runs for real on one sample, without gradients.

    example: what the model is called with: a tensor `(B, C, H, W)`, a tuple of arguments or a dict of keyword
        arguments; derived by `derive_example` if None.

    Raises `OptionError` if no example is given and none can be derived, `SiteError` if the model cannot run on it.
    """
    if example is None:
        example = derive_example(model)
    if example is None:
        raise OptionError(
            f"cannot tell what {type(model).__name__} takes as input; pass example=, e.g. torch.zeros(1, 3, 224, 224)"
        )
    with contextlib.suppress(Exception):  # data-dependent code, custom kernels, uncopyable attributes may stop it
        return _probe_fake(model, example)
    try:
        return _probe_real(model, example)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SiteError(
            f"{type(model).__name__} does not run on the example ({reason}); pass one that fits as example="
        ) from error


def correct_modes(sites: Sequence[Site], model: nn.Module, example: Any = None) -> list[Site]:
    """The sites with mode "weight" wherever the model reads a weight but never calls its module.

    Sites inside an `nn.MultiheadAttention` keep their mode: its host does call them. Without an `example`, and where
    none can be derived, the sites come back as they are, with a warning.

    Raises `SiteError` for sites that the model does not use at all.
    """
    example = derive_example(model) if example is None else example
    if example is None:
        warnings.warn(
            f"not checked whether {type(model).__name__} uses every adapted place: pass example= to attach for that",
            stacklevel=2,
        )
        return list(sites)
    uses = probe(model, example)
    hosted = {site.path for site in find_sites(model) if site.mode == "mha"}
    corrected, unused = [], []
    for site in sites:
        use = uses.get(site.path, "never")
        if site.path.rpartition(".")[0] in hosted and site.role == "out":
            corrected.append(site)
        elif use == "never" or (use == "read" and not site.parts):
            unused.append(site)
        elif use == "read" and site.mode != "weight":
            corrected.append(replace(site, mode="weight"))
        else:
            corrected.append(site)
    if unused:
        shown = ", ".join(f"{site.path!r} ({type(site.module).__name__})" for site in unused[:5])
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise SiteError(
            f"{type(model).__name__} never runs {shown}{more}: such a site can never receive a gradient; "
            "leave it out of `where`"
        )
    return corrected


def derive_example(model: nn.Module) -> Any:
    """An input that `model` accepts, of zeros and batch 1, or None if nothing tells its size.

    Known are timm models (`pretrained_cfg`, the patch embedding's image size), open_clip models and towers
    (`image_size`, `context_length`), torchvision models, whatever has an `image_size`, and tasks over such a
    `backbone`.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    visual, backbone = getattr(model, "visual", None), getattr(model, "backbone", None)
    length = getattr(model, "context_length", None) or getattr(getattr(model, "text", None), "context_length", None)
    if isinstance(visual, nn.Module):
        image = _image_size(visual)
        if image is None or not isinstance(length, int):
            return None
        return _zeros(image, model, device), torch.zeros(1, length, dtype=torch.long, device=device)
    image = _image_size(backbone if isinstance(backbone, nn.Module) else model)
    return None if image is None else _zeros(image, model, device)


def _image_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) of the images a model takes."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    channels = size[0] if size else 3
    built_for = (
        getattr(module, "img_size", None) for module in model.modules()
    )  # a patch embedding knows; it may differ
    side = next((s for s in built_for if s), None) or (size[1:] if size else None) or getattr(model, "image_size", None)
    if side is None and type(model).__module__.startswith("torchvision.models"):
        side = 224
    if side is None:
        return None
    height, width = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    return channels, height, width


def _zeros(shape: tuple[int, int, int], model: nn.Module, device: torch.device) -> Tensor:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)  # in_chans=1 is in no config
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    channels = shape[0] if first is None else first.in_channels
    return torch.zeros(1, channels, *shape[1:], device=device, dtype=dtype)


def _probe_fake(model: nn.Module, example: Any) -> dict[str, Use]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        twin = copy.deepcopy(model)
    example = tree_map_only(Tensor, fake.from_tensor, example)
    twin.eval()
    with fake, _watched(twin) as uses, torch.no_grad():
        _call(twin, example)
    return uses


def _probe_real(model: nn.Module, example: Any) -> dict[str, Use]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(), _watched(model) as uses, torch.no_grad():
            _call(model, tree_map_only(Tensor, lambda t: t[:1] if t.ndim else t, example))
    finally:
        for module, training in modes.items():
            module.training = training
    return uses


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, Mapping):
        model(**example)
    elif isinstance(example, tuple):
        model(*example)
    else:
        model(example)


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Use]]:
    """Record calls and parameter reads of every site's module while the context lasts.

    The modules get a subclass instead of hooks, because torch's fused encoder layer behaves differently under hooks.
    """
    modules = {site.path: site.module for site in find_sites(model)}
    uses: dict[str, Use] = dict.fromkeys(modules, "never")
    classes = {path: type(module) for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.__class__ = _watcher(type(module), path, uses)
        yield uses
    finally:
        for path, module in modules.items():
            module.__class__ = classes[path]


def _watcher(plain: type[nn.Module], path: str, uses: dict[str, Use]) -> type[nn.Module]:
    def mark(use: Use) -> None:
        if _STRENGTH[use] > _STRENGTH[uses[path]]:
            uses[path] = use

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mark("called")
        return plain.__call__(self, *args, **kwargs)

    def read(self: nn.Module, name: str) -> Any:  # sees properties too, which a host puts in a parameter's place
        if name != "__dict__" and name in self.__dict__.get("_parameters", ()):
            mark("read")
        return plain.__getattribute__(self, name)

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (plain,), {"__call__": call, "__getattribute__": read, **names})
