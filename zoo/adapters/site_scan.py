"""One walk over a model that finds its sites by structure: which module holds which weight, in which role and block.

The tables it reads are in `site_table.py`, the public functions in `sites.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from zoo.adapters.base import Mode, Part, Site
from zoo.adapters.site_table import (
    BLOCK_CLASSES,
    BLOCK_LISTS,
    FIRST_NAMES,
    FUSED,
    FUSED_CLASSES,
    GATED_NAMES,
    HEADS,
    INPUT_NAMES,
    LAST_NAMES,
    MLP_ATTRIBUTES,
    NOT_BLOCKS,
    NOT_MLP_ATTRIBUTES,
    NOT_MLP_CLASSES,
    OUTPUT_NAMES,
    PATCH_CLASSES,
    PATCH_NAMES,
    SPECIAL,
    TOWERS,
    bypassed_children,
    class_key,
    fused_parts,
    library_class,
)
from zoo.errors import SiteError

Modules = dict[str, nn.Module]
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Scan:
    """The sites of one model; `sites()` yields them in registration order, parents before their children."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: Modules = dict(_own_modules(model, ""))
        self.layers: Modules = {path: m for path, m in self.modules.items() if isinstance(m, (nn.Linear, _ConvNd))}
        self.roles: dict[str, tuple[str, str]] = {}  # layer path -> role, path of the module that gives it
        self.groups: dict[str, str] = {}  # module path -> "attn" or "mlp"
        self.bypassed: set[str] = set()
        self._claim_heads(model)
        for path, module in self.modules.items():
            self._claim_special(path, module)
            self._claim_embed(path, module)
            self._claim_attention(path, module)
            self._claim_mlp(path, module)
            self.bypassed.update(_join(path, child) for child in bypassed_children(module))
        self.depths = _block_depths(self.modules, self.layers)

    # ------------------------------------------------------------------ roles

    def _claim(self, layers: Iterable[str], role: str, owner: str) -> None:
        for layer in layers:
            self.roles.setdefault(layer, (role, owner))

    def _claim_heads(self, model: nn.Module) -> None:
        """The classifier: what timm calls so, and what sits under a top-level attribute with a classifier's name."""
        chosen = getattr(model, "get_classifier", None)
        named = chosen() if callable(chosen) else ()
        several = named if isinstance(named, (tuple, list)) else (named,)
        classifiers = {id(m) for m in several if isinstance(m, nn.Module)}
        for path, module in self.modules.items():
            if path and (id(module) in classifiers or is_head(path)):
                self._claim(self._under(path), "head", path)

    def _claim_special(self, path: str, module: nn.Module) -> None:
        for child, role in SPECIAL.get(class_key(module), {}).items():
            self._claim(self._projection(_join(path, child)), role, path)

    def _claim_embed(self, path: str, module: nn.Module) -> None:
        name = library_class(module).__name__
        if path.rpartition(".")[2] in PATCH_NAMES or any(word in name for word in PATCH_CLASSES):
            self._claim((p for p in self._under(path) if "backbone" not in p[len(path) :].split(".")), "embed", path)

    def _claim_attention(self, path: str, module: nn.Module) -> None:
        entry = FUSED_CLASSES.get(class_key(module))
        names = INPUT_NAMES if entry is None or not entry.child else {**INPUT_NAMES, entry.child: "qkv"}
        inputs = {name: self._projection(_join(path, name)) for name in module._modules if name in names}
        if not any(inputs.values()) and "in_proj_weight" not in module._parameters:
            return
        self.groups.setdefault(path, "attn")
        for name, layers in inputs.items():
            self._claim(layers, names[name], path)
        for name in OUTPUT_NAMES & module._modules.keys():
            self._claim(self._projection(_join(path, name)), "out", path)

    def _claim_mlp(self, path: str, module: nn.Module) -> None:
        name = path.rpartition(".")[2]
        if any(word in library_class(module).__name__ for word in NOT_MLP_CLASSES):
            return
        if not NOT_MLP_ATTRIBUTES.isdisjoint(path.split(".")):
            return
        found = {child: self._projection(_join(path, child)) for child in module._modules}
        found = {child: layers for child, layers in found.items() if layers}
        if isinstance(module, nn.Sequential) and name in MLP_ATTRIBUTES and len(found) == 2:
            roles = dict(zip(found, ("fc1", "fc2"), strict=True))
        else:
            roles = _mlp_roles({child: self.layers[layers[-1]] for child, layers in found.items()})
        if not {"fc1", "fc2"} <= set(roles.values()):
            return
        self.groups.setdefault(path, "mlp")
        for child, role in roles.items():
            self._claim(found[child], role, path)

    def _under(self, path: str) -> list[str]:
        return [p for p in self.layers if p == path or p.startswith(path + ".") or not path]

    def _projection(self, path: str) -> list[str]:
        """The layer that a named child stands for: itself, or the pointwise one inside a small wrapper."""
        if path in self.layers:
            return [path]
        module = self.modules.get(path)
        if module is None or isinstance(module, nn.MultiheadAttention):
            return []
        inside = self._under(path)
        if isinstance(module, nn.ModuleList) or len(inside) == 1:
            return inside
        pointwise = [p for p in inside if _is_pointwise(self.layers[p])]
        return pointwise[-1:] if len(inside) <= 3 else []

    # ------------------------------------------------------------------ sites

    def sites(self) -> Iterator[Site]:
        for path, module in self.modules.items():
            in_head = is_head(path)
            if path in self.depths:
                yield Site(path, "block", self.depths[path], module, *self._block_widths(path))
            elif path in self.groups and not in_head:
                yield self._group(path, module)
            if path in self.layers:
                yield self._layer(path, module)
            elif "in_proj_weight" in module._parameters:
                yield from self._packed(path, module)
            elif _norm_width(module):
                width = _norm_width(module)
                parts = (Part("norm", ((0, width),)),) if module._parameters.get("weight") is not None else ()
                yield Site(path, "norm", self._depth(path), module, width, width, parts, self._mode(path))

    def _layer(self, path: str, module: nn.Module) -> Site:
        role, owner = self.roles.get(path, ("linear" if isinstance(module, nn.Linear) else "conv", ""))
        if isinstance(module._parameters.get("weight"), nn.parameter.UninitializedParameter):
            raise SiteError(f"{path!r} ({type(module).__name__}) has no shape yet; run the model once first")
        width_in, width_out = _widths(module)
        parts: tuple[Part, ...] = (Part(role, ((0, width_out),)),)
        if isinstance(module, _ConvTransposeNd):  # its weight's rows are inputs: not a place for weight updates by rows
            role, parts = ("deconv", ()) if role != "head" else (role, ())
        elif role in FUSED:
            role, parts = fused_parts(self.modules[owner], role, width_out)
        return Site(path, role, self._depth(path), module, width_in, width_out, parts, self._mode(path))

    def _packed(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Projections that an attention module keeps as bare parameters."""
        stock = getattr(library_class(module), "forward", None) is nn.MultiheadAttention.forward
        packed = module._parameters["in_proj_weight"]
        mode: Mode = "mha" if stock and packed is not None and path not in self.bypassed else "weight"
        depth, role = self._depth(path), "head" if is_head(path) else ""
        if packed is not None:
            _, parts = fused_parts(module, "qkv", packed.shape[0])
            rows, width = packed.shape
            yield Site(path, role or "qkv", depth, module, width, rows, parts, mode, "in_proj_weight")
            return
        for one in ("q", "k", "v"):
            name = f"{one}_proj_weight"
            weight = module._parameters[name]
            assert weight is not None  # nn.MultiheadAttention has all three or none
            rows, width = weight.shape
            yield Site(path, role or one, depth, module, width, rows, (Part(one, ((0, rows),)),), mode, name)

    def _group(self, path: str, module: nn.Module) -> Site:
        """The site of a whole attention or feed-forward module."""
        role = self.groups[path]
        packed = "in_proj_weight" in module._parameters
        inside = [(name, self.layers[layer]) for layer, (name, owner) in self.roles.items() if owner == path]
        if packed and isinstance(module, nn.MultiheadAttention):
            widths = module.embed_dim, module.embed_dim
        elif role == "mlp":
            widths = self._ends(inside, ("fc1",), "fc2")
        else:
            widths = self._ends(inside, ("qkv", "q", "qk", "kv", "k", "v"), "out")
            bare = module._parameters.get("in_proj_weight")
            widths = widths if bare is None else (bare.shape[1], widths[1])
        if not widths[1]:  # attention without an output projection: the values come out
            fused = [fused_parts(module, name, _widths(layer)[1])[1] for name, layer in inside if name in FUSED]
            widths = widths[0], sum(part.width for parts in fused for part in parts if part.role == "v")
        weight = "in_proj_weight" if packed else "weight"
        return Site(path, role, self._depth(path), module, *widths, (), self._mode(path), weight)

    @staticmethod
    def _ends(inside: list[tuple[str, nn.Module]], first: tuple[str, ...], last: str) -> tuple[int, int]:
        """Input width of the first layer in a role of `first`, output width of the one in role `last`; 0 if missing."""
        starts = [_widths(layer)[0] for role in first for name, layer in inside if name == role]
        stops = [_widths(layer)[1] for name, layer in inside if name == last]
        return next(iter(starts), 0), next(iter(stops), 0)

    def _mode(self, path: str) -> Mode:
        return "weight" if path in self.bypassed else "branch"

    def _depth(self, path: str) -> int | None:
        while path not in self.depths:
            if not path:
                return None
            path = path.rpartition(".")[0]
        return self.depths[path]

    def _block_widths(self, path: str) -> tuple[int, int]:
        """Widths that enter and leave a block: in a transformer its first norm tells, else the first and last layer."""
        inside = self._under(path)
        if not inside:
            return 0, 0
        width_in, width_out = _widths(self.layers[inside[0]])[0], _widths(self.layers[inside[-1]])[1]
        if any(p in self.groups for p in self.modules if p.startswith(path + ".") or not path):
            for name, child in self.modules[path]._modules.items():
                if child is not None and name.startswith(("norm", "ln", "layer_norm")) and _norm_width(child):
                    return _norm_width(child), width_out
        return width_in, width_out


def is_head(path: str) -> bool:
    """Whether `path` lies in the classifier of a model, of a tower or of a task."""
    for name in path.split("."):
        if name in HEADS:
            return True
        if name not in TOWERS:
            return False
    return False


def _own_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, without the adapters that hosts carry."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        hosted = "_host" in module.__dict__ or library_class(module) is not type(module)
        for name, child in module._modules.items():
            if child is not None and not (name == "adapters" and hosted) and name != "adapter_banks":
                yield from walk(child, _join(path, name))

    yield from walk(module, path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _widths(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, _ConvNd)
    return module.in_channels, module.out_channels


def _is_pointwise(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear)


def _norm_width(module: nn.Module) -> int:
    """Width of a normalisation layer, 0 for anything else."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return math.prod(module.normalized_shape)
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, _NormBase):
        return module.num_features
    weight = getattr(module, "weight", None)
    named = "Norm" in library_class(module).__name__
    return weight.numel() if named and isinstance(weight, Tensor) and weight.ndim == 1 else 0


def _mlp_roles(children: Mapping[str, nn.Module]) -> dict[str, str]:
    """Roles of a feed-forward module's children, `{}` if it is none."""
    roles = {name: "fc1" for name in children if name in FIRST_NAMES}
    roles |= {name: "fc2" for name in children if name in LAST_NAMES}
    gated = [name for name in children if name in GATED_NAMES]
    if not gated or (not roles and len(gated) < 2):
        return roles
    width = _widths(children[next(iter(roles), gated[0])])[0]
    for name in gated:
        roles[name] = "fc1" if _widths(children[name])[0] == width else "fc2"
    if "fc2" not in roles.values():  # the hidden width equals the token width: the last one leads back
        roles[gated[-1]] = "fc2"
    return roles


# ---------------------------------------------------------------------- blocks


def _block_depths(modules: Modules, layers: Modules) -> dict[str, int]:
    """Block path -> running index within its tower."""
    blocks = _listed_blocks(modules, layers)
    if not blocks:
        blocks = {p for p, m in modules.items() if any(word in library_class(m).__name__ for word in BLOCK_CLASSES)}
        blocks = {p for p in blocks if not any(q != p and (q.startswith(p + ".") or not p) for q in blocks)}
    counts: Counter[str] = Counter()
    depths: dict[str, int] = {}
    for path in modules:
        if path in blocks and not is_head(path):
            names = path.split(".")
            tower = ".".join(names[: max((i + 1 for i, name in enumerate(names) if name in TOWERS), default=0)])
            depths[path] = counts[tower]
            counts[tower] += 1
    return depths


def _listed_blocks(modules: Modules, layers: Modules) -> set[str]:
    """Elements of the innermost block lists."""
    holders = {".".join(p.split(".")[:i]) for p in layers for i in range(p.count(".") + 1)} - layers.keys()
    lists = [p for p, m in modules.items() if isinstance(m, _LISTS) and p.rpartition(".")[2] in BLOCK_LISTS]
    blocks: set[str] = set()
    for path in sorted(lists, key=lambda p: -p.count(".")):
        for element, module in _elements(modules[path], path):
            named_otherwise = any(word in library_class(module).__name__ for word in NOT_BLOCKS)
            stage = any(block.startswith(f"{element}.") for block in blocks)
            if element in holders and not named_otherwise and not stage:
                blocks.add(element)
    return blocks


def _elements(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if isinstance(child, _LISTS):
            yield from _elements(child, _join(path, name))
        elif child is not None:
            yield _join(path, name), child
