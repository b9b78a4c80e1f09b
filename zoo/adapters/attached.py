"""What `attach` returns: a named set of adapters on a model, or a named choice of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Site
from zoo.adapters.host import Host, bias_name, settle, updated
from zoo.errors import SiteError

BANKS = "adapter_banks"
RECORD = "_attached"  # attribute of the model that lists what was attached to it
FLAGS = "_trainable_before"  # beside it: which parameters trained before the first set came


class Placed(NamedTuple):
    """An adapter and the site it sits on."""

    site: Site
    adapter: Adapter


class Adapters(nn.ModuleDict):
    """A host's adapters by name. An `nn.Sequential` runs its children in turn and passes this one unchanged."""

    def forward(self, x: Any) -> Any:
        return x


class Attached:
    """One named set of adapters on a model.

    Attributes:
        name: the key under which each host holds its adapter.
        config: `dict(type=..., where=..., per_site=..., **options)`, enough to attach the same again.
        placed: the sites with their adapters, in model order.
        merged: whether the update is folded into the weights right now.
    """

    def __init__(
        self, model: nn.Module, name: str, config: dict[str, Any], placed: list[Placed], bank: nn.Module | None
    ) -> None:
        self.model = model
        self.name = name
        self.config = config
        self.placed = placed
        self.bank = bank
        self.merged = False
        self._before_merge: dict[str, tuple[Tensor, Tensor | None]] = {}

    @property
    def sites(self) -> list[Site]:
        return [placed.site for placed in self.placed]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Adapter parameters under their keys in the model's state dict."""
        for prefix, module in self._modules():
            yield from module.named_parameters(prefix)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """Adapter tensors (buffers included) under their keys in the model's state dict."""
        return {k: v.detach() for prefix, m in self._modules() for k, v in m.state_dict(prefix=f"{prefix}.").items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load exactly the tensors of `state_dict`; raises `SiteError` naming keys or shapes that differ."""
        _copy_exactly(self.name, self.state_dict(), state)

    def merge(self) -> None:
        """Fold the update into the weights; the adapters leave the tree until `unmerge`.

        Raises:
            SiteError: already merged, or an adapter that has no merged form.
        """
        if self.merged:
            raise SiteError(f"adapter {self.name!r} is merged already; unmerge it first")
        stuck = [placed.site.path for placed in self.placed if not placed.adapter.mergeable]
        if stuck:
            kind = type(self.placed[0].adapter).__name__
            raise SiteError(
                f"{kind} has no merged form (it is not a change of weights), so {stuck[0]} cannot be merged"
            )
        self._remove_from_tree()
        for site, adapter in self.placed:
            self._before_merge[site.path] = _fold(site, adapter)
        self.merged = True

    def unmerge(self) -> None:
        """Put back the weights as they were, bit for bit, and the adapters."""
        if not self.merged:
            raise SiteError(f"adapter {self.name!r} is not merged")
        for site, _ in self.placed:
            weight, bias = self._before_merge.pop(site.path)
            _restore(site, weight, bias)
        self.merged = False
        self.add_to_tree()

    def detach(self) -> None:
        """Take the adapters off: classes, keys and the trainable flags of the base become what they were."""
        if self.merged:
            self.unmerge()
        self._remove_from_tree()
        forget(self.model, self.name)

    def table(self) -> list[dict[str, Any]]:
        """One row a site: path, role, depth, parts, mode, form and number of parameters."""
        rows = []
        for site, adapter in self.placed:
            parts = "+".join(part.role for part in site.parts)
            count = sum(p.numel() for p in adapter.parameters())
            rows.append(
                {
                    **dict(path=site.path, role=site.role, depth=site.depth, parts=parts),
                    **dict(mode=site.mode, form=adapter.form, params=count),
                }
            )
        return rows

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"Attached({self.config['type']} as {self.name!r} at {len(self.placed)} sites, {count:,} parameters)"

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for site, adapter in self.placed:
            yield ".".join(filter(None, (site.path, "adapters", self.name))), adapter
        if self.bank is not None:
            yield f"{BANKS}.{self.name}", self.bank

    def add_to_tree(self) -> None:
        for site, adapter in self.placed:
            module = site.module
            if "adapters" not in module._modules:
                module.add_module("adapters", Adapters())
                module.__dict__["_host"] = (site.mode, site.weight)
            module.get_submodule("adapters").add_module(self.name, adapter)
            set_active(module, self._in_order(module, [*active_adapters(module), adapter]))
        if self.bank is not None:
            if BANKS not in self.model._modules:
                self.model.add_module(BANKS, nn.ModuleDict())
            self.model.get_submodule(BANKS).add_module(self.name, self.bank)
        settle_attention(self.model)

    def _in_order(self, module: nn.Module, active: list[Adapter]) -> list[Adapter]:
        """Sorted as attached, so that sums come out the same after a merge and unmerge."""
        order = list(self.model.__dict__.get(RECORD, {}))
        names = {id(a): n for n, a in module.get_submodule("adapters").named_children()}
        return sorted(active, key=lambda a: order.index(names[id(a)]) if names[id(a)] in order else len(order))

    def _remove_from_tree(self) -> None:
        for site, adapter in self.placed:
            module = site.module
            set_active(module, [a for a in active_adapters(module) if a is not adapter])
            held = module.get_submodule("adapters")
            del held._modules[self.name]
            if not held._modules:
                del module.adapters, module.__dict__["_host"]
        if self.bank is not None:
            banks = self.model.get_submodule(BANKS)
            del banks._modules[self.name]
            if not banks._modules:
                del self.model._modules[BANKS]
        settle_attention(self.model)


class Selected:
    """A named choice of base parameters to train (full fine-tuning, BitFit, ...); adds nothing to the model."""

    merged = False

    def __init__(self, model: nn.Module, name: str, config: dict[str, Any], chosen: Sequence[str]) -> None:
        self.model = model
        self.name = name
        self.config = config
        self.chosen = tuple(chosen)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        own = dict(self.model.named_parameters())
        return ((name, own[name]) for name in self.chosen)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """The chosen parameters, under their own names."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load exactly the tensors of `state_dict`; raises `SiteError` naming keys or shapes that differ."""
        _copy_exactly(self.name, self.state_dict(), state)

    def merge(self) -> None:
        raise SiteError(f"{self.config['type']} trains the base's own weights; there is nothing to merge")

    def detach(self) -> None:
        """Give the trainable flags back; what was trained stays trained."""
        forget(self.model, self.name)

    def table(self) -> list[dict[str, Any]]:
        return [dict(path=name, params=parameter.numel()) for name, parameter in self.named_parameters()]

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"Selected({self.config['type']} as {self.name!r}: {len(self.chosen)} tensors, {count:,} parameters)"


def remember(model: nn.Module, attached: Attached | Selected) -> None:
    """Enter a set in the model's record; the first one also notes which parameters trained before."""
    if RECORD not in model.__dict__:
        model.__dict__[RECORD] = {}
        model.__dict__[FLAGS] = {n: p.requires_grad for n, p in model.named_parameters()}
    model.__dict__[RECORD][attached.name] = attached


def forget(model: nn.Module, name: str) -> None:
    """Strike a set off the record; with the last one the trainable flags become what they were."""
    record = model.__dict__[RECORD]
    del record[name]
    if not record:
        del model.__dict__[RECORD]
        flags = model.__dict__.pop(FLAGS)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(key, parameter.requires_grad))


def _copy_exactly(name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shared = [k for k in own if k in state]
    wrong = [
        f"{k}: {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in shared if state[k].shape != own[k].shape
    ]
    if missing or extra or wrong:
        raise SiteError(f"adapter {name!r} does not fit: missing {missing}, unexpected {extra}, shapes {wrong}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def active_adapters(module: nn.Module) -> tuple[Adapter, ...]:
    return module.__dict__.get("_active", ())


def set_active(module: nn.Module, active: Sequence[Adapter]) -> None:
    mode, weight = module.__dict__["_host"]
    settle(module, mode, weight, active)


def settle_attention(model: nn.Module) -> None:
    """An adapted out_proj needs a parent that calls it; a parent that no longer needs a host gets its class back."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.__dict__.get("_host", ("mha",))[0] != "weight":
            out = module.out_proj
            if isinstance(module, Host) or (isinstance(out, Host) and out.__dict__["_host"][0] != "weight"):
                settle(module, "mha", "in_proj_weight", active_adapters(module))


@torch.no_grad()
def _fold(site: Site, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
    weight, bias = site.module._parameters[site.weight], site.module._parameters.get(bias_name(site.weight))
    assert weight is not None
    adapter.eval()  # what is folded is what evaluation runs, also for adapters that are random while training
    before = weight.detach().clone(), None if bias is None else bias.detach().clone()
    wide = torch.promote_types(weight.dtype, torch.float32)
    new_weight, new_bias = updated(weight.to(wide), None if bias is None else bias.to(wide), [adapter])
    weight.copy_(new_weight)
    if bias is not None and new_bias is not None:
        bias.copy_(new_bias)
    elif new_bias is not None:
        site.module._parameters[bias_name(site.weight)] = nn.Parameter(new_bias.to(weight.dtype), requires_grad=False)
    return before


@torch.no_grad()
def _restore(site: Site, weight: Tensor, bias: Tensor | None) -> None:
    site.module._parameters[site.weight].copy_(weight)  # type: ignore[union-attr]
    name = bias_name(site.weight)
    if bias is None:
        if name in site.module._parameters:
            site.module._parameters[name] = None
    else:
        site.module._parameters[name].copy_(bias)  # type: ignore[union-attr]
