"""A search for new objectives: terms drawn from a grammar, against the published ones with the same budget.

trials/              a folder for each run of the search; its record contains validation figures alone
tests/               a folder for each tested run
found.py             the new terms, as code to paste
trials.json          all trials of both searches
discovery.md         a report of the results
table.md, …          the tables and pictures of the tested runs, as a sweep writes them
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from goal.data.files import alone, folder_name, folder_name_of, require, write_atomically
from goal.lab.grammar import Expression, pair, triplet
from goal.lab.verdict import Integrability, integrability
from goal.training.config import CHOICES, MOST, TrainConfig, check_device, flat
from goal.training.display import Lines, display
from goal.training.features import Sampler
from goal.training.folder import Record, Row, place
from goal.training.loop import Diverged, read_pairs, train
from goal.training.report import Difference, RunRecord, significant_differences, terminal_table, write_report
from goal.training.sweep import Incomplete, entries, quick_settings
from goal.training.tune import span, with_parameters
from goal.training.workers import Done, Failed, Job, cores, work
from goal.validation import real_number, whole_number

TRIALS, QUICK_TRIALS = 150, 40  # of each search
SEEDS = 5  # of the test
FINALISTS, CHECKS = 3, 2  # trials that are trained again, with so many seeds more, before one of them is chosen
ROUND = 8  # trials of each search that are chosen at once, and so may run side by side
LR = 5.0  # the learning rate is looked for within this factor of the given one
FOUND, PUBLISHED = "found", "published"
QUICK_NOTE = "QUICK: small heads, few trials, little patience; what it finds may not stand without --quick."


class Tried(NamedTuple):
    """A trial, judged on the validation split."""

    config: TrainConfig | None  # None where a term was refused
    val_rsum: float  # 0 where it failed
    why: str  # it failed, or nothing


class Finalist(NamedTuple):
    """One of the best trials, with seeds that it was not chosen by."""

    config: TrainConfig
    trial: float  # the trial's validation RSUM
    checks: tuple[float, ...]  # (CHECKS,) validation RSUM

    @property
    def mean(self) -> float:
        """Of the seeds that it was not chosen by."""
        return math.fsum(self.checks) / len(self.checks)


@dataclass(frozen=True, repr=False)
class Discovery:
    """What `discover` found.

    Attributes:
        T, P: the terms, with their numbers.
        trials: by search, "found" and "published", every trial.
        finalists: by search, the best first.
        records: of the tested runs, labelled "found" and by the name of the published objective.
        differences: between the two, on test, by `goal.training.report.significant_differences`.
        integrability: whether T × P is the gradient of a loss.
        folder: where all of it is written.
        note: the conditions, in sentences.
    """

    T: Expression
    P: Expression
    trials: Mapping[str, Sequence[Tried]]
    finalists: Mapping[str, Sequence[Finalist]]
    records: Sequence[Record]
    differences: Sequence[Difference]
    integrability: Integrability
    folder: Path
    note: str

    @property
    def source(self) -> str:
        """The terms as Python, to paste into one's own code; `goal.apply(x, y, T="found", P="found")` then works."""
        return f"import torch\n\nimport goal\n\n\n{self.T.source(FOUND)}\n\n{self.P.source(FOUND)}"

    @property
    def verdict(self) -> str:
        """One sentence: whether what was found is better than what was published."""
        by_name = {each.objective: each for each in self.differences}
        found = by_name.pop(FOUND)
        ((name, published),) = by_name.items()
        gap, behind = found.mean - published.mean, published if found.verdict == "best" else found
        ahead = "better" if gap > 0 else "worse"
        if behind.verdict == "below best":
            text = f"The found terms are {ahead} than {name}, by {abs(gap):.1f} RSUM, which exceeds the noise."
        else:
            signed = f"{gap:+.1f}".replace("-", "−")
            text = f"Nothing better was found: {signed} RSUM to {name} is within the noise (p = {behind.p:.2g})."
        if self.T.built_in and self.P.built_in:
            text += f" What was found is {self.T.built_in} × {self.P.built_in}, which is published."
        return text

    @property
    def table(self) -> str:
        """The tested runs as plain text."""
        return terminal_table(cast(Sequence[RunRecord], self.records))

    def markdown(self) -> str:
        """All of it as a page."""
        chosen = [
            "| search | objective | parameters | in its trial | other seeds |",
            "| :--- | :--- | :--- | ---: | ---: |",
        ]
        for search, finalists in self.finalists.items():
            for each in finalists:
                shown = ", ".join(f"{name} {value:.3g}" for name, value in _numbers(each.config).items())
                checks = " / ".join(f"{value:.1f}" for value in each.checks)
                chosen.append(f"| {search} | {_name(each.config)} | {shown} | {each.trial:.1f} | {checks} |")
        failed = [
            f"* {search}, trial {number}: {_name(each.config) if each.config else 'refused'}: {each.why}"
            for search, trials in self.trials.items()
            for number, each in enumerate(trials)
            if each.why
        ]
        noise = [
            "| objective | RSUM | to the best | 95 % interval | p | verdict |",
            "| :--- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for d in self.differences:
            interval = f"{d.low:+.1f} … {d.high:+.1f}" if d.verdict != "best" else ""
            noise.append(
                f"| {d.objective} | {d.mean:.1f} | {d.difference:+.1f} | {interval} | {d.p:.2g} | {d.verdict} |"
            )
        parts = [
            "# What `goal discover` found",
            self.verdict,
            f"```python\n{self.source}```",
            f"```text\n{self.integrability!r}\n```",
            f"*{self.note}*",
            "## On the test split",
            f"```text\n{self.table}\n```",
            "\n".join(noise),
            "## The best trials, on the validation split",
            "\n".join(chosen),
            "## Trials that failed, and count as RSUM 0",
            "\n".join(failed) or "None.",
        ]
        return "\n\n".join(parts) + "\n"

    def __repr__(self) -> str:
        return f"{self.verdict}\n\n{self.source}\n{self.integrability!r}\n\n{self.table}"


def discover(
    *,
    quick: bool = False,
    trials: int | None = None,
    seeds: int = SEEDS,
    name: str | None = None,
    root: Path = Path("runs"),
    workers: int | None = None,
    save_every: float = 10.0,
    command: str = "",
    **settings: Any,
) -> Discovery:
    """Search the grammar of `goal.lab.grammar` for an objective that beats the published ones.

    There are two searches of equally many trials by the same sampler (Optuna's TPE): one over the grammar and its
    numbers, one over the built-in T × P and the recipes and theirs; the learning rate is part of both. The published
    one first tries every objective with its defaults, as far as its trials go, which is a head start that the grammar
    does not get. A trial is a run with seed 0, judged by its best validation RSUM; one that diverges, or a term that is
    refused, counts with RSUM 0. The three best of each search are trained with two further seeds, and the best mean of
    those, on validation still, is what the search found. Only then is the test split looked at, once: both are trained
    with new seeds, and compared by `significant_differences`.

    Trials are chosen eight at a time, as a function of the trials before them, and each is a run with a folder of its
    own: killed at any point, the same call goes on and ends with the same result, on however many workers.

    Args:
        quick: small heads and `QUICK_TRIALS`.
        trials: of each search; by default `TRIALS`.
        seeds: with which what was found is tested.
        name: of the folder; by default made of the data.
        root: the folder's parent.
        workers: processes; by default one for each core, or 1 on an accelerator.
        save_every: seconds between the checkpoints of a run.
        command: goes into the note.
        **settings: fields of `TrainConfig` for all runs, but those of the objective, and the seed.

    Returns:
        A `Discovery`, which prints as a summary; the same is written to the folder.

    Raises:
        ValueError, TypeError: settings out of range, or data that cannot be read; before anything is trained.
        Busy: another process is at work in the folder.
        Incomplete: runs could not be made (a full disk, say), or a tested one diverged. The same call tries them again.

    >>> discovery = discover(quick=True)  # doctest: +SKIP
    >>> print(discovery.source)  # doctest: +SKIP
    """
    trials = whole_number("trials", (QUICK_TRIALS if quick else TRIALS) if trials is None else trials, 1, MOST)
    seeds, save_every = whole_number("seeds", seeds, 1, MOST), real_number("save_every", save_every, 0, finite=False)
    workers = None if workers is None else whole_number("workers", workers, 1, MOST)
    name = None if name is None else folder_name("name", name)
    settings = flat(settings)
    if chosen := [each for each in ("objective", *CHOICES, "mining", "params", "seed") if each in settings]:
        raise ValueError(f"{chosen[0]} cannot be set: the search chooses it, got {settings[chosen[0]]!r}.")
    settings = (quick_settings(settings) if quick else {}) | settings
    base = TrainConfig(**settings)
    check_device(base.device)
    for package in ("matplotlib", "optuna", "safetensors"):
        require(package, "train")
    parts = (Path(base.data).resolve().name, "discover", "quick" * quick)
    folder = Path(root) / (name or folder_name_of("-".join(filter(None, parts))))
    data = read_pairs(base)
    Sampler(data.train.image_of, base.optimiser.batch, base.seed)
    folder.mkdir(parents=True, exist_ok=True)
    by_default = max(1, cores() // base.threads) if base.device == "cpu" else 1
    with alone(folder):
        with display() as shown:
            runs = _Runs(folder, workers or by_default, save_every, shown)
            searches = {FOUND: _Grammar(settings), PUBLISHED: _Published(settings, trials)}
            tried = _search(runs, searches, trials)
            finalists = _finalists(runs, tried)
            found, published = (finalists[search][0].config for search in searches)
            records = _test(runs, found, published, seeds)
        note = _note(quick, base, len(data.train.x), trials, seeds, records, command)
        T, P = (_expression(kind, found) for kind in ("T", "P"))
        differences = significant_differences(cast(Sequence[RunRecord], records))
        proof = integrability(T.term(), P.term())
        discovery = Discovery(T, P, tried, finalists, records, differences, proof, folder, note)
        _write(discovery)
    return discovery


# ---- what is tried ---------------------------------------------------------------------------------------


class _Grammar:
    """Terms of the grammar."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.starts: list[dict[str, Any]] = []

    def propose(self, trial: Any) -> TrainConfig:
        T, P = triplet(trial), pair(trial)
        lr = _lr(trial, TrainConfig(**self.settings).optimiser.lr)
        return TrainConfig(**{**self.settings, "T": T.name, "P": P.name, "params": T.params | P.params, "lr": lr})


class _Published:
    """The built-in T × P and the recipes, those with equal configurations once."""

    def __init__(self, settings: Mapping[str, Any], trials: int) -> None:
        self.configs = {
            _name(config): config for config in dict.fromkeys(entry.config for entry in entries(**settings))
        }
        self.starts = [
            {"objective": label, "lr": config.optimiser.lr, **config.params} for label, config in self.configs.items()
        ][:trials]

    def propose(self, trial: Any) -> TrainConfig:
        config = self.configs[trial.suggest_categorical("objective", tuple(self.configs))]
        found = {"lr": _lr(trial, config.optimiser.lr)}
        for name, start in config.params.items():
            r = span(name, start)
            found[name] = trial.suggest_float(name, r.low, r.high, log=r.log)
        return with_parameters(config, found)


def _name(config: TrainConfig) -> str:
    """An objective without its parameters, which the search chooses."""
    return config.objective.spec.names


def _numbers(config: TrainConfig) -> dict[str, float]:
    return {"lr": config.optimiser.lr} | config.params


def _lr(trial: Any, given: float) -> float:
    return float(trial.suggest_float("lr", given / LR, given * LR, log=True))


def _expression(kind: Any, config: TrainConfig) -> Expression:
    """A term of the grammar as a configuration names it."""
    bare = Expression(kind, tuple(getattr(config.objective.spec, kind).name.split("-")[1:]))
    return dataclasses.replace(bare, values=tuple((name, config.params[name]) for name in bare.params))


# ---- stages ----------------------------------------------------------------------------------------------


class _Runs:
    """Runs by their configuration, made by worker processes where they are not there yet."""

    def __init__(self, folder: Path, workers: int, save_every: float, shown: Lines) -> None:
        self.folder, self.workers, self.save_every, self.shown = folder, workers, save_every, shown

    def perform(self, function: Callable[..., Record], kind: str, configs: Sequence[TrainConfig]) -> list[Record]:
        """What the function makes of each configuration, in a folder of its own."""
        jobs = [
            Job(config.run_name, function, (config, place(config, self.folder / kind), self.save_every))
            for config in dict.fromkeys(configs)
        ]
        results, failures = {}, []
        self.shown.expect(len(jobs), finished=0)
        for event in work(jobs, self.workers):
            if isinstance(event, Done):
                results[event.key] = event.result
            elif isinstance(event, Failed):
                failures.append(f"\n  {event.key}: {event.message}")
            self.shown.show(event, lambda: [])
        if failures:
            raise Incomplete(f"{len(failures)} of the runs failed; the others are in {self.folder}:{''.join(failures)}")
        return [results[config.run_name] for config in configs]


def judge(config: TrainConfig, run_dir: Path, save_every: float, *, on_evaluation: Callable[[Row], None]) -> Record:
    """The record of a run that is judged on the validation split; best_val_rsum 0, and why, where it diverges.

    Its heads are not kept: those of hundreds of trials would fill a disk.
    """
    try:
        record = train(config, run_dir, save_every, test=False, on_evaluation=on_evaluation)
    except Diverged as error:
        state = {"best_step": 0, "steps": 0, "why": str(error)}
        return {"label": _name(config), "seed": config.seed, "best_val_rsum": 0.0, **state}
    (run_dir / "model.safetensors").unlink(missing_ok=True)
    return record


def _search(runs: _Runs, searches: Mapping[str, Any], trials: int) -> dict[str, list[Tried]]:
    """All trials of the searches, a round of each at a time."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    studies = {search: optuna.create_study(direction="maximize") for search in searches}
    for search, source in searches.items():
        for start in source.starts:
            studies[search].enqueue_trial(start)
    tried: dict[str, list[Tried]] = {search: [] for search in searches}
    for first in range(0, trials, ROUND):
        asked: list[tuple[str, Any, TrainConfig | None, str]] = []
        for search, source in searches.items():
            for number in range(first, min(first + ROUND, trials)):
                studies[search].sampler = optuna.samplers.TPESampler(seed=number)
                trial = studies[search].ask()
                try:
                    asked.append((search, trial, source.propose(trial), ""))
                except ValueError as error:  # a term is refused
                    asked.append((search, trial, None, str(error)))
        configs = [config for _, _, config, _ in asked if config is not None]
        records = dict(zip(configs, runs.perform(judge, "trials", configs), strict=True))
        for search, trial, config, why in asked:
            record: Record = records[config] if config is not None else {"best_val_rsum": 0.0, "why": why}
            studies[search].tell(trial, record["best_val_rsum"])
            tried[search].append(Tried(config, record["best_val_rsum"], record.get("why", "")))
    return tried


def _finalists(runs: _Runs, tried: Mapping[str, Sequence[Tried]]) -> dict[str, list[Finalist]]:
    """The best trials of each search with further seeds, the best mean of those first.

    Raises:
        Incomplete: every trial of a search failed.
    """
    best: dict[str, dict[TrainConfig, float]] = {}
    for search, trials in tried.items():
        order = sorted((each for each in trials if not each.why), key=lambda each: -each.val_rsum)
        if not order:
            raise Incomplete(f"every trial of the {search} objectives failed; the first: {trials[0].why}")
        best[search] = dict(list({cast(TrainConfig, each.config): each.val_rsum for each in order}.items())[:FINALISTS])
    again = [
        seeded for configs in best.values() for config in configs for seeded in _seeded(config, range(1, 1 + CHECKS))
    ]
    records = dict(zip(again, runs.perform(judge, "trials", again), strict=True))

    def checked(config: TrainConfig) -> tuple[float, ...]:
        return tuple(records[seeded]["best_val_rsum"] for seeded in _seeded(config, range(1, 1 + CHECKS)))

    return {
        search: sorted((Finalist(c, value, checked(c)) for c, value in configs.items()), key=lambda each: -each.mean)
        for search, configs in best.items()
    }


def _test(runs: _Runs, found: TrainConfig, published: TrainConfig, seeds: int) -> list[Record]:
    """The records of both with seeds that chose nothing, the test split scored."""
    new = range(1 + CHECKS, 1 + CHECKS + seeds)
    labels = {
        seeded: label for label, c in ((FOUND, found), (_name(published), published)) for seeded in _seeded(c, new)
    }
    records = runs.perform(train, "tests", list(labels))
    names = [{"T": "-", "P": "-", "recipe": label, "label": label} for label in labels.values()]
    return [{**record, **name} for record, name in zip(records, names, strict=True)]


def _seeded(config: TrainConfig, seeds: Sequence[int]) -> Iterator[TrainConfig]:
    return (dataclasses.replace(config, seed=seed) for seed in seeds)


# ---- what is written -------------------------------------------------------------------------------------


def _note(
    quick: bool, base: TrainConfig, images: int, trials: int, seeds: int, records: Sequence[Record], command: str
) -> str:
    sentences = [
        f"{images} training images of {base.data}; {base.setting}, or within a factor of {LR:g} of "
        f"that. {trials} trials for the grammar and as many for the published objectives, "
        f"judged on the validation split with one seed; {FINALISTS} of each with {CHECKS} seeds more; what came out of "
        f"that tested once, with {seeds} new seeds."
    ]
    if quick:
        sentences.insert(0, QUICK_NOTE)
    if rising := sum(record["stopped"] == "max_steps" for record in records):
        sentences.append(f"{rising} of {len(records)} tested runs met the limit of {base.stopping.max_steps} steps.")
    if command:
        sentences.append(f"Command: {command}")
    return " ".join(sentences)


def _write(discovery: Discovery) -> None:
    folder = discovery.folder
    trials = {
        search: [
            {
                "objective": _name(each.config),
                "lr": each.config.optimiser.lr,
                **each.config.params,
                "val_rsum": each.val_rsum,
            }
            if each.config
            else {"refused": each.why, "val_rsum": each.val_rsum}
            for each in tried
        ]
        for search, tried in discovery.trials.items()
    }
    write_atomically(folder / "trials.json", (json.dumps(trials, indent=2) + "\n").encode())
    write_atomically(folder / "found.py", discovery.source.encode())
    write_atomically(folder / "discovery.md", discovery.markdown().encode())
    title = "Found and published, mean ± standard deviation over seeds"
    write_report(cast(Sequence[RunRecord], discovery.records), folder, title=title, note=discovery.note)
