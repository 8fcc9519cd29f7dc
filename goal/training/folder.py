"""A run's folder: which run it belongs to, its files, and whether they are complete.

    config.json            every setting that decides the result
    versions.json          versions of the software that computes the result, and the data's fingerprint
    metrics.jsonl          a line for each evaluation on the validation split
    checkpoint.safetensors the state of a run: weights, optimiser and state in a single file; deleted when it is done
    model.safetensors      the weights that were best on the validation split
    record.json            the result

The files decide which run a folder belongs to, not its name. Folders from before settings had sections can still be
read.
"""

import glob
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goal.data.files import Busy, Damaged, alone, read_json, write_atomically
from goal.training.config import SECTIONS, SETTINGS, TrainConfig, flat
from goal.training.systems import SYSTEMS

Row = dict[str, float]
Record = dict[str, Any]

RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
MEASURES = {"rsum": (*RECALLS, "rsum", "i2t_medr", "t2i_medr"), "map": ("x2y", "y2x", "mean")}  # of the test split
RESULTS = ("record.json", "checkpoint.safetensors", "model.safetensors")  # what is lost with them is work
NOTES = ("vocabulary.json", "metrics.jsonl", "diagnosis.jsonl", "diagnosis.png", "versions.json", "config.json")


def place(config: TrainConfig, parent: Path) -> Path:
    """The folder of a run, or of a search that begins with it: by its name, or as earlier versions named it.

    A search's folder holds the run that it begins with under its own name.
    """
    own = parent / config.run_name
    if own.exists():
        return own
    for other in sorted(parent.glob(f"{glob.escape(config.run_stem)}*")):
        first = other / other.name
        with suppress(ValueError, TypeError):  # whatever it is, it is not this run's
            values = read_json((first if first.is_dir() else other) / "config.json")
            if not set(SECTIONS) <= set(values) and TrainConfig(**values) == config:
                return other
    return own


def begin(run_dir: Path, config: TrainConfig, versions: Record, curve: Sequence[Row], anew: bool) -> None:
    """Say whose folder it is, and begin the log with the rows up to the checkpoint; what a killed run wrote goes.

    Args:
        anew: what an earlier run has left goes first, its results before the rest.
    """
    for name in (*RESULTS, *NOTES) if anew else ():
        (run_dir / name).unlink(missing_ok=True)
    write_atomically(run_dir / "config.json", config.to_json().encode())
    write_atomically(run_dir / "versions.json", as_json(versions))
    lines = "".join(json.dumps(row) + "\n" for row in curve)
    write_atomically(run_dir / "metrics.jsonl", lines.encode())


def finished(config: TrainConfig, run_dir: Path, fingerprints: Mapping[str, str]) -> Record | None:
    """The record of a run that has ended; None where there is none, or, with a warning, a damaged one.

    Args:
        fingerprints: those of the run's `Features`.

    Raises:
        Damaged: naming the file that should tell whose folder it is.
        ValueError: a folder with the results of another configuration, or of a run on other features.
    """
    record = ended(config, run_dir, fingerprints)
    if record is not None and any((run_dir / name).exists() for name in ("checkpoint.safetensors", ".lock")):
        with suppress(Busy, OSError), alone(run_dir):  # it was killed at its last line
            (run_dir / "checkpoint.safetensors").unlink(missing_ok=True)
    return record


def ended(config: TrainConfig, run_dir: Path, fingerprints: Mapping[str, str]) -> Record | None:
    """As `finished`, and nothing is cleared away."""
    if not any((run_dir / name).is_file() for name in RESULTS):
        return None
    path = run_dir / "config.json"
    try:
        owner = TrainConfig.from_json(json.dumps(read_json(path)))
    except (TypeError, ValueError) as error:
        raise Damaged(f"{path}: is damaged, or of another version of goal; move {run_dir} away: {error}") from error
    if owner != config:
        theirs, ours = flat(owner.values()), flat(config.values())
        differ = ", ".join(name for name in SETTINGS if theirs[name] != ours[name])
        raise ValueError(f"{run_dir}: holds a run of another configuration ({differ}); move it away, or name another.")
    path = run_dir / "record.json"
    if not path.is_file():
        return None
    versions = read_json(run_dir / "versions.json")
    if not isinstance(versions, dict):
        raise Damaged(f"{run_dir / 'versions.json'}: is damaged: it holds {type(versions).__name__}")
    then = versions.get("data")
    if not isinstance(then, dict) or any(then.get(name, value) != value for name, value in fingerprints.items()):
        raise ValueError(f"{run_dir}: was trained on other features of {config.data!r}; move it away, or name another.")
    if versions.get("terms", {}) != config.definitions():
        raise ValueError(f"{run_dir}: was trained with another definition of {config.label}; move it away.")
    try:
        record: Record = read_json(path)
        _check_record(record, config)
    except Damaged as error:
        warn_damaged(path, error.__cause__ or error)
        return None
    if "test" in fingerprints and "test" not in record:
        raise ValueError(f"{run_dir}: holds a run without a test; move it away, or name another.")
    return record


def _check_record(record: Any, config: TrainConfig) -> None:
    """Whether it is what a run of this configuration writes."""
    fixed = {"model": config.model.name, "seed": config.seed}
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in fixed.items()):
        raise Damaged("it is no record of this run")
    if any(_bare(record.get(name)) != _bare(config.names[name]) for name in ("T", "P", "recipe")):
        raise Damaged("it is no record of this run's objective")
    metric = SYSTEMS[config.model.name].judged
    tested = record.get("test", dict.fromkeys(MEASURES[metric], 0))  # a trial of a search has no test
    rows = record.get("curve")
    if not isinstance(tested, dict) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Damaged("it lacks its test or its curve")
    numbers = [record.get(name) for name in (f"best_val_{metric}", "best_step", "steps")]
    numbers += [tested.get(name) for name in MEASURES[metric]]
    numbers += [row.get(name) for row in rows for name in ("step", "loss", f"val_{metric}")]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise Damaged("it lacks a number")
    if not isinstance(record.get("stopped"), str) or not isinstance(record.get("params"), dict):
        raise Damaged("it does not say how it ended, or with what")


def _bare(name: object) -> object:
    """A name without its parameters, which were once written otherwise."""
    return name.partition("(")[0] if isinstance(name, str) else name


def best(record: Record) -> float:
    """The best validation RSUM of a run, or MAP@all of clips."""
    return float(record["best_val_map" if "best_val_map" in record else "best_val_rsum"])


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_tensors(path: Path, entry: str) -> tuple[Record, dict[str, Tensor]]:
    """A JSON entry of a .safetensors file's metadata, and its tensors on the CPU, which hold no map of the file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[entry]), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def check_tensors(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Whether a file's tensors are those of a model, by their names and shapes."""
    for name in sorted({*tensors, *like}):
        shapes = [tuple(one[name].shape) if name in one else "missing" for one in (tensors, like)]
        if shapes[0] != shapes[1]:
            raise Damaged(f"{path}: {name} is {shapes[0]}, by its configuration it is {shapes[1]}")


def digest(tensors: Mapping[str, Tensor], told: Record | None = None) -> str:
    """SHA-256 of what a file holds."""
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().reshape(-1)
        found.update(f"{name} {array.dtype} {tuple(tensors[name].shape)}".encode())
        found.update(array.view(torch.uint8).numpy().data)
    return found.hexdigest()


def warn_damaged(path: Path, error: BaseException) -> None:
    warnings.warn(f"{path}: is damaged, so the run is begun again: {error}", stacklevel=2)


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
