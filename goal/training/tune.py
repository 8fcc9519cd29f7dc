"""A search of the learning rate and of an objective's own parameters: every objective gets as many trials."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from goal.data.files import alone, write_atomically
from goal.training.config import TrainConfig, check_seconds, check_whole
from goal.training.loop import Diverged, Row, best, train


class Range(NamedTuple):
    """Where a parameter is looked for."""

    low: float
    high: float
    log: bool


RANGES = {
    "lr": Range(5e-5, 5e-3, log=True),
    "tau": Range(1.0, 100.0, log=True),
    "alpha": Range(0.5, 10.0, log=True),
    "beta": Range(2.0, 100.0, log=True),
    "lam": Range(0.0, 1.0, log=False),
    "margin": Range(0.01, 0.5, log=True),
    "bias": Range(-20.0, 0.0, log=False),
}


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

    trials, save_every = check_whole("trials", trials, least=1), check_seconds("save_every", save_every)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = {"lr": config.lr} | config.params
    space: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(min(r.low, start[name]), max(r.high, start[name]), log=r.log)
        for name, r in RANGES.items()
        if name in start
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
                    folder / candidate.run_name,
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


def with_parameters(config: TrainConfig, found: dict[str, float]) -> TrainConfig:
    """The configuration with another learning rate and other parameters of its objective."""
    params = {name: value for name, value in found.items() if name != "lr"}
    return dataclasses.replace(config, lr=found["lr"], params=params)
