"""A whole training run as one small file of plain data, and back.

The file holds what training changed (adapter, head, norm statistics), never the frozen base: that is rebuilt from
the config and recognised by its fingerprints.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.engine import schedule
from zoo.engine.state import fingerprint, fingerprints, plain, plain_hub, random_state, read_resume_file, rich_hub
from zoo.errors import CheckpointError
from zoo.freeze import trainable_parameters

if TYPE_CHECKING:
    from zoo.engine.runner import ZooRunner


class Baseline:
    """The tensors a model had when training began, by fingerprint; `changed` finds what differs since.

    Args:
        model: without a distributed wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self.frozen = fingerprints({name: t for name, t in _stored(model).items() if not t.requires_grad})

    def changed(self, model: nn.Module) -> dict[str, Tensor]:
        """Trainable tensors, and frozen parameters or buffers (norm statistics) that no longer are what they were."""
        found = {}
        for name, tensor in _stored(model).items():
            if tensor.requires_grad or (tensor.numel() and fingerprint(tensor) != self.frozen.get(name)):
                found[name] = tensor.detach()
        return found


def _stored(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def collect(runner: ZooRunner) -> dict[str, Any]:
    """The state of a run at a save point. Every process must call it; the content is the first process's to write.

    Raises:
        CheckpointError: a trained tensor is not finite (such a state is of no use), or state that is not plain data.
    """
    model, loop, wrapper = runner.bare_model, runner.train_loop, runner.optim_wrapper
    tensors = runner.baseline.changed(model)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or infinity after step {loop.iter}; this state is not saved")
    content: dict[str, Any] = {
        "format": "zoo-resume-1",
        "meta": {
            "epoch": loop.epoch,
            "iter": loop.iter,
            "steps_per_epoch": len(loop.dataloader),
            "max_epochs": loop.max_epochs,
            "max_iters": loop.max_iters,
            "seed": runner.seed,
            "world_size": runner.world_size,
            "config": str(runner.cfg.filename or ""),
            "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
        "base": runner.baseline.frozen,
        "state_dict": tensors,
        "groups": _group_names(runner),
        "optimizer": wrapper.state_dict(),
        "param_schedulers": [{"kind": type(s).__name__, **s.state_dict()} for s in runner.param_schedulers or []],
        "message_hub": plain_hub(runner.message_hub.state_dict()),
        "per_rank": _gather({"random": random_state(), "gradients": _waiting_gradients(runner)}),
    }
    runner.call_hook("before_save_checkpoint", checkpoint=content)
    return dict(plain(content))


def restore(runner: ZooRunner, path: Path) -> None:
    """Continue the run saved in `path`: weights, optimizer, schedules, logs, position in the data, random states.

    Raises:
        CheckpointFileError: the file cannot be read. CheckpointError: it belongs to another base model, another
            freezing, another grouping, another seed, or another data length in the middle of an epoch.
    """
    content = read_resume_file(path)
    meta, loop = content["meta"], runner.train_loop
    _check_base(content["base"], runner.baseline.frozen, path)
    if content["groups"] != _group_names(runner):
        raise CheckpointError(f"{path}: {_group_difference(content['groups'], _group_names(runner))}")
    if meta["seed"] != runner.seed:
        raise CheckpointError(
            f"{path} was trained with seed {meta['seed']}, this run has {runner.seed}: "
            f"resume with --seed {meta['seed']}"
        )
    load_tensors(runner.bare_model, content["state_dict"], str(path))
    loop.set_progress(meta["epoch"], meta["iter"], meta["steps_per_epoch"])
    runner.message_hub.load_state_dict(rich_hub(content["message_hub"]))
    same_length = (meta["max_epochs"], meta["max_iters"]) == (loop.max_epochs, loop.max_iters)
    for note in schedule.restore(runner.optim_wrapper, runner.param_schedulers, content, same_length=same_length):
        runner.announce(note)
    _restore_rank(runner, content["per_rank"])
    runner.call_hook("after_load_checkpoint", checkpoint=content)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str, *, partial: bool = False) -> None:
    """Copy `tensors` into the model; all trainable tensors must be there unless `partial`.

    Raises:
        CheckpointError: a key the model does not have, a trainable tensor that is missing, or another shape.
    """
    own = _stored(model)
    unknown = [name for name in tensors if name not in own]
    missing = [] if partial else [name for name in trainable_parameters(model) if name not in tensors]
    shapes = [n for n, t in tensors.items() if n in own and own[n].shape != t.shape]
    problems = {"not in the model": unknown, "missing in the file": missing, "of another shape": shapes}
    told = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names)
    if told:
        raise CheckpointError(f"{source} does not fit the model: {told}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _check_base(saved: Mapping[str, int], now: Mapping[str, int], path: Path) -> None:
    wrong = sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name))
    if wrong:
        raise CheckpointError(
            f"{path} was trained on another frozen base: {len(wrong)} of {len(now)} tensors differ, first "
            f"{wrong[0]!r}; use the same pretrained weights and the same freezing as before"
        )


def _group_names(runner: ZooRunner) -> list[list[str]]:
    name_of = {id(p): name for name, p in runner.bare_model.named_parameters()}
    return [[name_of[id(p)] for p in group["params"]] for group in runner.optim_wrapper.optimizer.param_groups]


def _group_difference(saved: list[list[str]], now: list[list[str]]) -> str:
    before, after = {n for g in saved for n in g}, {n for g in now for n in g}
    if before == after:
        return "the same parameters train, but grouped otherwise (layer_decay, head_lr_mult or weight decay changed)"
    return (
        f"another set of parameters trains now: {len(after - before)} new {sorted(after - before)[:3]}, "
        f"{len(before - after)} gone {sorted(before - after)[:3]}"
    )


def _waiting_gradients(runner: ZooRunner) -> dict[str, Tensor]:
    if not runner.optim_wrapper.mid_accumulation:
        return {}
    return {n: p.grad.cpu() for n, p in trainable_parameters(runner.bare_model).items() if p.grad is not None}


def _gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
    mine = plain(mine)
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _restore_rank(runner: ZooRunner, per_rank: list[dict[str, Any]]) -> None:
    if len(per_rank) != runner.world_size:
        runner.announce(
            f"saved by {len(per_rank)} processes, resumed by {runner.world_size}: random states start anew, "
            "the result will not be bit-equal to an uninterrupted run"
        )
        return
    mine = per_rank[runner.rank]
    parameters = trainable_parameters(runner.bare_model)
    for name, gradient in mine["gradients"].items():
        parameters[name].grad = gradient.to(parameters[name].device)
    runner.pending_random = mine["random"]
