"""Which runs a comparison needs, and getting them done one after the other, each in a process of its own."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from zoo.compare.methods import Method
from zoo.compare.table import Row, chosen_rate, read_rows, write_rows
from zoo.engine.config import SECTIONS
from zoo.errors import OptionError, ZooError

RESULTS = "results.csv"


def compare(config: Config, methods: Sequence[Method], seeds: Sequence[int], out: Path) -> list[Row]:
    """Run what `out/results.csv` does not hold yet, and return all rows of that table.

    Every method has the config's data, epochs and schedule; its adapter, learning rate and seed alone differ. Each
    learning rate is tried on the first seed, the one with the best last validation serves the other seeds. Every run
    reports its test result, which decides nothing. A run that fails becomes a row with the reason, and is tried again
    the next time.

    Raises:
        OptionError: no test data or no seed. ZooError: `out` holds results of another config.
    """
    if config.get("test_dataloader") is None or config.get("val_dataloader") is None:
        raise OptionError("a comparison chooses on validation data and reports test data; the config must have both")
    if not seeds or len(set(seeds)) < len(seeds):
        raise OptionError(f"seeds must be one or more different numbers, got {list(seeds)}")
    table = out / RESULTS
    rows, budget = read_rows(table), fingerprint(config)
    if any(row["budget"] != budget for row in rows):
        raise ZooError(f"{table} was made with another config (data, model or budget); choose another --out")
    for method in methods:
        for seed in seeds:
            own = [row for row in rows if row["method"] == method.name]
            rate = None if seed == seeds[0] else chosen_rate(own)
            for lr in method.rates if seed == seeds[0] else (rate,):
                if lr is None:
                    continue  # nothing worked on the first seed
                wanted = {"budget": budget, "method": method.name, "adapter": _text(method.adapter), "seed": seed}
                wanted["lr"] = lr
                if any(wanted.items() <= row.items() and "error" not in row for row in rows):
                    continue
                row = {**wanted, **_run(_config_of(config, method, seed, lr, out))}
                rows = [r for r in rows if not _replaced(r, wanted)] + [row]
                write_rows(table, _in_order(rows, seeds))
                rows = read_rows(table)
                print(_told(row), flush=True)
    return rows


def fingerprint(config: Config) -> str:
    """Twelve digits that change with anything all methods share: data, model, epochs, schedule."""
    own = ("work_dir", "resume", "randomness", "launcher", "custom_hooks")
    read = [key for key in SECTIONS[""] if key not in own]  # a config file's helper variables are in it as well
    shared = {key: value for key, value in config.to_dict().items() if key in read}
    shared.get("model", {}).pop("adapter", None)
    shared.get("optim_wrapper", {}).get("optimizer", {}).pop("lr", None)
    return hashlib.sha256(json.dumps(shared, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _config_of(config: Config, method: Method, seed: int, lr: float, out: Path) -> Config:
    own = copy.deepcopy(config)
    folder = re.sub(r"[^\w.=-]+", "_", f"{method.name}_seed{seed}_lr{lr:g}")
    own.model.adapter = method.adapter
    own.optim_wrapper.optimizer.lr = lr
    own.work_dir = str(out / "runs" / folder)
    own.randomness = {**(own.get("randomness") or {}), "seed": seed}
    own.resume, own.custom_hooks = False, []  # no pictures, no baselines: a run's row is all that is wanted
    own.default_hooks = {
        **(own.get("default_hooks") or {}),
        "progress": None,
        "checkpoint": {"type": "SafeCheckpoint", "keep": 1},
    }
    return own


def _run(config: Config) -> Row:
    """One run in a fresh process: its memory is its own, and a crash is its own too."""
    from zoo.compare import run

    row = Path(config.work_dir, run.ROW)
    row.unlink(missing_ok=True)
    process = _starter().Process(target=run.work, args=(config.to_dict(), config.filename))
    process.start()
    try:
        process.join()
    except BaseException:
        process.kill()  # SIGTERM would make it finish its step and save
        process.join()
        raise
    if not row.is_file():
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"error": f"the process ended without a result ({how}); see {row.with_name(run.LOG)}"}
    result: Row = json.loads(row.read_text(encoding="utf-8"))
    return result


def _starter() -> Any:
    """Processes that begin with torch imported: seconds saved a run. Where the system has none, fresh ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.compare.run"])
    return context


def _replaced(row: Row, wanted: Row) -> bool:
    """Whether the new row takes this one's place: the same run, or the method under other options."""
    if row["method"] != wanted["method"]:
        return False
    return row["adapter"] != wanted["adapter"] or (row["seed"], row["lr"]) == (wanted["seed"], wanted["lr"])


def _in_order(rows: Sequence[Row], seeds: Sequence[int]) -> list[Row]:
    """Methods as they came; within one the first seed first, since the learning rate is chosen there."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    place = {seed: number for number, seed in enumerate(seeds)}
    return sorted(rows, key=lambda row: (names.index(row["method"]), place.get(row["seed"], len(place)), row["lr"]))


def _text(adapter: dict[str, Any] | None) -> str:
    return json.dumps(adapter, sort_keys=True)


def _told(row: Row) -> str:
    head = f"{row['method']}, seed {row['seed']}, lr {row['lr']:g}:"
    if "error" in row:
        return f"{head} failed: {row['error']}"
    return f"{head} validation {row['val']:.4f}, test {row['test']:.4f}, {row['seconds']:.0f} s"
