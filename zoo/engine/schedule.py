"""Optimizer and learning-rate schedules after a resume, also when the config was changed in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.optim import OptimWrapper, _ParamScheduler

from zoo.errors import CheckpointError

Groups = list[dict[str, Any]]


def restore(
    wrapper: OptimWrapper,
    schedulers: list[_ParamScheduler] | None,
    content: Mapping[str, Any],
    *,
    same_length: bool,
) -> list[str]:
    """Load optimizer and scheduler states; returns sentences on what follows the new config instead.

    With an unchanged config the saved states are taken as they are. mmengine's schedulers save their own end, so a
    run made longer would keep the old one (open-mmlab/mmengine issue 1565): when the length or a starting rate
    changed, the new schedule is walked from its beginning to the saved step. The other numbers of the optimizer
    (weight decay, betas) always follow the config.

    Raises:
        CheckpointError: another number or kind of schedulers than the checkpoint's.
    """
    schedulers = schedulers or []
    saved = [dict(state) for state in content["param_schedulers"]]
    kinds = [state.pop("kind") for state in saved]
    if kinds != [type(s).__name__ for s in schedulers]:
        now = [type(s).__name__ for s in schedulers]
        raise CheckpointError(f"the checkpoint was written with schedulers {kinds}, the config now has {now}")
    fresh = [_options(group) for group in wrapper.param_groups]
    wrapper.load_state_dict(content["optimizer"])
    scheduled = {s.param_name for s in schedulers}
    notes = _follow_config(wrapper.param_groups, fresh, scheduled)
    if not schedulers:
        return notes
    starts = {f"initial_{name}" for name in scheduled}
    pairs = list(zip(wrapper.param_groups, fresh, strict=True))
    moved = any(group[key] != new[key] for group, new in pairs for key in starts)
    if same_length and not moved:
        for scheduler, state in zip(schedulers, saved, strict=True):
            scheduler.load_state_dict(state)
        return notes
    if any(getattr(s, "need_val_args", False) for s in schedulers):
        for scheduler, state in zip(schedulers, saved, strict=True):
            scheduler.load_state_dict(state)
        return [*notes, "the schedule changed, but one that follows a metric cannot be recomputed: it keeps its state"]
    for group, new in pairs:
        group.update({key: new[key] for key in (*scheduled, *starts)})
    _walk(wrapper, schedulers, content["meta"])
    rate = wrapper.param_groups[0]["lr"]
    return [*notes, f"the schedule changed: recomputed from its start, learning rate is now {rate:.4g}"]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _follow_config(groups: Groups, fresh: Groups, scheduled: set[str]) -> list[str]:
    """Options that no schedule moves take the config's value; says which of them that changed."""
    changed = {}
    for group, new in zip(groups, fresh, strict=True):
        for key, value in new.items():
            if key in scheduled or key.startswith("initial_") or group.get(key) == value:
                continue
            if isinstance(value, list) and tuple(value) == group.get(key):
                continue
            changed[key] = f"{group.get(key)} -> {value}"
            group[key] = value
    told = ", ".join(f"{key} {values}" for key, values in changed.items())
    return [f"the optimizer follows the changed config: {told}"] if changed else []


def _walk(wrapper: OptimWrapper, schedulers: list[_ParamScheduler], meta: Mapping[str, Any]) -> None:
    wrapper._global_step = 0  # else each scheduler warns that no optimizer step came before
    epochs = 0
    for step in range(1, meta["iter"] + 1):
        for scheduler in schedulers:
            if not scheduler.by_epoch:
                scheduler.step()
        if epochs < meta["epoch"] and step % meta["steps_per_epoch"] == 0:
            epochs += 1
            for scheduler in schedulers:
                if scheduler.by_epoch:
                    scheduler.step()
