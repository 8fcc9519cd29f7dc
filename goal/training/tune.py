"""A search for the learning rate and an objective's own parameters, with equally many trials for every objective."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from goal.data.files import alone, write_atomically
from goal.training.config import MOST, TrainConfig
from goal.training.folder import Row, best, place
from goal.training.loop import Diverged, train
from goal.validation import real_number, whole_number


class Range(NamedTuple):
    """Where a parameter is looked for."""

    low: float
    high: float
    log: bool


RANGES = {  # of names that the field knows; others are looked for around their defaults
    "lr": Range(5e-5, 5e-3, log=True),
    "tau": Range(1.0, 100.0, log=True),
    "alpha": Range(0.5, 10.0, log=True),
    "beta": Range(2.0, 100.0, log=True),
    "lam": Range(0.0, 1.0, log=False),
    "margin": Range(0.01, 0.5, log=True),
    "bias": Range(-20.0, 0.0, log=False),
}


def span(name: str, start: float) -> Range:
    """Where a parameter is looked for that begins at `start`: by its name, or within a factor of ten, its start inside.

    >>> span("tau", 200.0), span("gain", 2.0), span("shift", 0.0)
    (Range(low=1.0, high=200.0, log=True), Range(low=0.2, high=20.0, log=True), Range(low=0.0, high=1.0, log=False))
    """
    known = RANGES.get(name.rpartition(".")[2])
    if known is not None and not (known.log and start <= 0):
        return Range(min(known.low, start), max(known.high, start), known.log)
    if start > 0:
        return Range(start / 10, start * 10, log=True)
    return Range(min(10 * start, 0.0), 0.0 if start else 1.0, log=False)


def order(names: Iterable[str]) -> list[str]:
    """Parameters in the order in which they are searched, those of `RANGES` first."""
    known = list(RANGES)
    return sorted(names, key=lambda name: known.index(name) if name in RANGES else len(known))


def search(
    config: TrainConfig,
    trials: int,
    folder: Path,
    save_every: float = 10.0,
    *,
    on_evaluation: Callable[[Row], None] = lambda row: None,
) -> TrainConfig:
    """The configuration with the highest validation RSUM among the given one and `trials` − 1 of a TPE sampler.

    The test split is not looked at. Each trial is a training run of its own in `folder`, and the sampler's choice for
    a trial is a function of the trials before it; so a search that was killed continues where it stood, and ends with
    the same result. `tuning.json` lists the trials. A trial that diverges counts, with RSUM 0.

    Raises:
        Busy: another process is at work in the folder.
        ValueError, TypeError: fewer than one trial, or a number of another kind.
    """
    import optuna

    trials, save_every = whole_number("trials", trials, 1, MOST), real_number("save_every", save_every, 0, finite=False)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = {"lr": config.optimiser.lr} | config.params
    space: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution((False, True))
        if isinstance(start[name], bool)
        else optuna.distributions.FloatDistribution(*span(name, start[name]))
        for name in order(start)
    }
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({name: start[name] for name in space})
    tried: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        for number in range(trials):
            study.sampler = optuna.samplers.TPESampler(seed=number)
            trial = study.ask(space)
            candidate = with_parameters(config, trial.params)
            try:
                record = train(
                    candidate,
                    place(candidate, folder),
                    save_every,
                    test=False,
                    on_evaluation=lambda row, number=number: on_evaluation(row | {"trial": number}),  # type: ignore[misc]
                )
                value = best(record)
            except Diverged:
                value = 0.0
            study.tell(trial, value)
            tried.append({"val_rsum": value, **trial.params})
        content = {"objective": config.label, "trials": tried, "best": study.best_trial.number}
        write_atomically(folder / "tuning.json", (json.dumps(content, indent=2) + "\n").encode())
    return with_parameters(config, study.best_params)


def with_parameters(config: TrainConfig, found: Mapping[str, float | bool]) -> TrainConfig:
    """The configuration with another learning rate and other parameters of its objective."""
    params = {name: value for name, value in found.items() if name != "lr"}
    return config.replace(lr=found["lr"], params=params)
