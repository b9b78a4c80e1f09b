"""The model card: README.md of a saved folder, written from its `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from zoo.adapters.inject import attachments

_SHOWN_LABELS, _SHOWN_SITES = 20, 40


def model_card(card: Mapping[str, Any], model: nn.Module) -> str:
    """Markdown with YAML front matter for a folder that `zoo.save` writes.

    card: the content of `config.json`. model: the model that was saved; its adapters and parameters are counted.
    Says only what the two show: nothing about data, licence or quality that nobody wrote down.
    """
    names = [str(record["config"]["type"]) for record in card["adapters"]]
    title = f"{_model_name(card)} with {' and '.join(names)}" if names else _model_name(card)
    sections = [
        _front_matter(card, names),
        f"# {title}",
        _introduction(card, names),
        _usage(),
        _adapters(model),
        _counts(card, model),
        _preprocessing(card.get("preprocessing") or {}),
        _metrics(card.get("metrics") or {}),
        _labels(card.get("labels")),
        "## Limits\n\nThis page was written by the program that saved the files. It states what the files hold; it "
        "makes no claim about training data, licence, fairness or fitness. Check the base model's own terms.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def merged_card(name: str, folder_model: nn.Module, labels: Sequence[str] | None) -> str:
    """Markdown for a folder of plain weights: adapters are folded in, and the zoo is not needed to load it."""
    total = sum(p.numel() for p in folder_model.parameters())
    usage = (
        "## Use\n\n```python\nimport timm\n\n"
        'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()\n```'
        if _in_timm(folder_model)
        else "`model.safetensors` is the state dict of the plain module; build that module with its own library."
    )
    sections = [
        "---\n" + _yaml({"library_name": "timm", "tags": ["vision-adapter-zoo", "merged"]}) + "---",
        f"# {name}, adapters merged",
        f"Plain weights ({total:,} parameters). Adapters were folded into them; none can be taken off any more.",
        usage,
        _preprocessing(_cfg_of(folder_model)),
        _labels(labels),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(card: Mapping[str, Any], names: Sequence[str]) -> str:
    entries: dict[str, Any] = {
        "library_name": "vision-adapter-zoo",
        "tags": ["vision", "adapter", *dict.fromkeys(name.lower() for name in names)],
    }
    repo = _hub_id(card["base"].get("source"))
    if repo:  # the hub accepts repository ids here and nothing else
        entries["base_model"] = repo
    return "---\n" + _yaml(entries) + "---"


def _introduction(card: Mapping[str, Any], names: Sequence[str]) -> str:
    held = (
        f"the trained tensors only ({card['weights']['tensors']} of them)"
        if card["base"].get("source")
        else "all tensors"
    )
    kind = f"{', '.join(names)} on a frozen base" if names else "a model without adapters"
    made = f"Model type `{card['model']['type']}`, saved by vision-adapter-zoo {card['zoo_version']}"
    return f"{made}: {kind}. The folder holds {held}."


def _usage() -> str:
    return (
        "## Use\n\n```python\nimport zoo\n\n"
        'model = zoo.load("PATH_OF_THIS_FOLDER")  # or "hf-hub:org/name"; comes in eval mode\n```\n\n'
        "The base weights come from the source named below and are compared with its hash; other weights are refused."
    )


def _adapters(model: nn.Module) -> str:
    """A table a set: sites that differ only in nothing but their path are listed one by one, up to a limit."""
    blocks = []
    for name, attached in attachments(model).items():
        rows = attached.table()
        lines = [f"`{name}`: {attached.config['type']} with {_options(attached.config)}, {len(rows)} places.", ""]
        lines += ["| site | role | parts | parameters |", "|---|---|---|---:|"]
        for row in rows[:_SHOWN_SITES]:
            role, parts = row.get("role", "parameter"), row.get("parts") or "-"
            lines.append(f"| `{row['path'] or '(model)'}` | {role} | {parts} | {row['params']:,} |")
        if len(rows) > _SHOWN_SITES:
            rest = sum(row["params"] for row in rows[_SHOWN_SITES:])
            lines.append(f"| {len(rows) - _SHOWN_SITES} more | | | {rest:,} |")
        blocks.append("\n".join(lines))
    return "## Adapters\n\n" + "\n\n".join(blocks) if blocks else ""


def _counts(card: Mapping[str, Any], model: nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    source, digest = card["base"].get("source"), card["base"].get("sha256")
    base = (
        f"`{source}`, {card['base'].get('tensors')} tensors with content hash `{digest}`"
        if source
        else "random initialisation, so the folder holds every tensor"
    )
    return (
        "## Parameters\n\n"
        f"- trained: {trained:,} of {total:,} ({100 * trained / max(total, 1):.3f} %)\n"
        f"- base weights: {base}"
    )


def _preprocessing(how: Mapping[str, Any]) -> str:
    if not how:
        return "## Preprocessing\n\nNot recorded."
    mean, std = how.get("mean"), how.get("std")
    if mean is not None and std is not None:
        said = (
            "Inputs are scaled to 0..1, then normalised: (x - mean) / std "
            f"with mean {_listed(mean)} and std {_listed(std)}."
        )
    else:
        said = "No mean and std were recorded: whether inputs are normalised is not known."
    rest = [
        f"- {key}: {_listed(value)}" for key, value in how.items() if key not in ("mean", "std") and value is not None
    ]
    return "\n".join(["## Preprocessing", "", said, *(["", *rest] if rest else [])])


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "## Metrics\n\nNone were recorded."
    lines = ["## Metrics", "", "As given by whoever saved the model.", "", "| metric | value |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {_cell(key)} | {_cell(_short(value))} |" for key, value in metrics.items())])


def _labels(labels: Sequence[str] | None) -> str:
    if not labels:
        return ""
    shown = [f"{index}. {_cell(label)}" for index, label in enumerate(labels[:_SHOWN_LABELS])]
    more = [f"\n... and {len(labels) - _SHOWN_LABELS} more."] if len(labels) > _SHOWN_LABELS else []
    return "\n".join([f"## Labels ({len(labels)})", "", *shown, *more])


def _model_name(card: Mapping[str, Any]) -> str:
    model = card["model"]
    backbone = model.get("backbone")
    inner = backbone.get("name") if isinstance(backbone, Mapping) else None
    return str(f"{model['type']} on {inner}" if inner else model.get("name") or model["type"])


def _hub_id(source: str | None) -> str | None:
    """`org/name` where the weights come from a hub repository."""
    if source and source.startswith("hf-hub:"):
        return source.removeprefix("hf-hub:").partition(":")[0].partition("@")[0]
    if source and source.startswith("timm:"):
        return f"timm/{source.removeprefix('timm:')}"
    return None


def _in_timm(model: nn.Module) -> bool:
    """Whether timm can build the model by name; open_clip towers carry a timm-like card but are not its models."""
    import timm

    config = getattr(model, "pretrained_cfg", None) or {}
    return timm.is_model(str(config.get("architecture", "")))


def _cfg_of(model: nn.Module) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return {
        key: cfg[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct") if cfg.get(key) is not None
    }


def _options(config: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in config.items() if key != "type")
    return f"`{given}`" if given else "default options"


def _yaml(entries: Mapping[str, Any]) -> str:
    """Flat YAML; JSON strings are YAML strings, so nothing in a name can break out of its line."""
    lines = []
    for key, value in entries.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _listed(value: Any) -> str:
    return (
        ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
        if isinstance(value, (list, tuple))
        else str(value)
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
