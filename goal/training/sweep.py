"""Every T × P and every recipe, with several seeds each: which objective wins?"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import goal
from goal.data.files import alone, folder_name, folder_name_of, require
from goal.names import Named
from goal.spec import Spec, parse
from goal.training.config import CHOICES, MOST, TrainConfig, check_device, flat
from goal.training.display import Lines, display
from goal.training.features import Sampler
from goal.training.folder import Record, finished, place
from goal.training.loop import TrainingError, read_pairs, train
from goal.training.report import RunRecord, write_report
from goal.training.systems import DEFAULT, SYSTEMS
from goal.training.tune import search
from goal.training.workers import Done, Failed, Job, cores, work
from goal.validation import real_number, whole_number

GRID_T, GRID_P = ("con", "nca", "cir"), ("con", "lin", "sig", "lin-ms", "sig-ms")
HINGE = "con(margin=0.2)"  # T = con in the grid
_HINGE = parse(f"{HINGE} × con")
SEEDS, QUICK_SEEDS = 5, 2
QUICK_NOTE = "QUICK: small models, few seeds, little patience; close places may change without --quick."


def quick_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model that end within minutes."""
    system = SYSTEMS.get(settings.get("model") or DEFAULT)
    return {} if system is None else dict(system.quick)  # what is unknown is refused when it is read


class Incomplete(TrainingError):
    """Some runs of a sweep failed; the tables hold the others."""


@dataclass(frozen=True)
class Entry:
    """A cell of the grid or a recipe, by the names of a record, and what trains it."""

    names: Mapping[str, str | None]  # T, P, recipe, label
    config: TrainConfig  # of seed 0

    def seeded(self, seed: int) -> TrainConfig:
        """The configuration of another seed."""
        return dataclasses.replace(self.config, seed=seed)


def entries(objectives: Iterable[str] | None = None, **settings: Any) -> list[Entry]:
    """The cells of the grid and the recipes; a recipe that is a cell of the grid shares the cell's runs.

    Args:
        objectives: some of them, or any others: "cir:sig-ms", "vse++", "cir(tau=5) × sig-ms | semi-hard"; by default
            the grid and the recipes. In a sweep T = con without a margin is the hinge with margin 0.2.
        **settings: of `TrainConfig`, for all of them.

    Raises:
        ValueError: an unknown objective.

    >>> [entry.names["label"] for entry in entries(["cir:lin", "circle"])]
    ['cir × lin', 'circle']
    >>> len({entry.config for entry in entries(["cir:lin", "circle"])})
    1
    """
    settings = flat(settings)
    if given := [name for name in ("objective", *CHOICES, "mining", "params") if settings.get(name) is not None]:
        raise ValueError(f"{given[0]} cannot be set: a sweep has objectives, got {settings[given[0]]!r}.")
    grid = {f"{T}:{P}": parse(f"{HINGE if T == 'con' else T} × {P}") for T in GRID_T for P in GRID_P}
    cells = {spec: TrainConfig(objective=spec, **settings) for spec in grid.values()}
    shown = {repr(config.build_objective()): config for config in cells.values()}
    asked = [*grid.values(), *map(parse, goal.recipes())] if objectives is None else _specs(objectives)
    found = []
    for spec in dict.fromkeys(asked):
        config = cells[spec] if spec in cells else TrainConfig(objective=spec, **settings)
        shared = config if spec.recipe is None else shown.get(repr(config.build_objective()), config)
        found.append(Entry(_names(spec, config), shared))
    return found


def _names(spec: Spec, config: TrainConfig) -> dict[str, str | None]:
    """How the tables have it: T × P alone is a cell, what has more to it a row of its own."""
    if spec.recipe is None and not spec.axes:
        return config.names
    return {"T": "-", "P": "-", "recipe": str(spec), "label": str(spec)}


def _specs(objectives: Iterable[str]) -> list[Spec]:
    """The objectives that were asked for; con is the hinge of the grid."""
    if isinstance(objectives, str) or not isinstance(objectives, Iterable):
        raise TypeError(f"objectives must be several texts, got {type(objectives).__name__} ({objectives!r}).")
    texts = list(objectives)
    if stray := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"objectives must be texts, got {type(stray[0]).__name__} ({stray[0]!r}).")
    asked = [parse(text) for text in texts]
    if not asked:
        raise ValueError("objectives must be one at least, got none.")
    return [dataclasses.replace(spec, T=_HINGE.T) if Named("con") == spec.T else spec for spec in asked]


class Sweep:
    """Every objective with several seeds, into one folder, which holds the runs, the tables and the pictures.

    Run again after it was killed, it continues and ends with the same table. Runs are kept by their configuration, so
    more seeds or objectives add to a folder.

    Args:
        quick: a small model, little patience and fewer seeds.
        seeds: how many, from 0; by default `SEEDS`, or `QUICK_SEEDS`.
        trials: give every objective a `search` of so many trials too, and train what it found with the same seeds.
        objectives: as for `entries`.
        name: of the folder; by default made of the data and of what is asked for.
        root: the folder's parent.
        workers: processes; by default one for each core (for each `threads` cores), or 1 on an accelerator.
        save_every: seconds between the checkpoints of a run.
        **settings: fields of `TrainConfig`, for all objectives.

    Raises:
        ValueError, TypeError: settings out of range, or data that cannot be read; before anything is trained.
        ModuleNotFoundError: a package of the extra `train` is missing.

    >>> sweep = Sweep(quick=True, objectives=["cir:sig-ms", "infonce"])
    >>> sweep.folder.name, sweep.seeds
    ('emoji-quick', 2)
    >>> records = sweep.run()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        quick: bool = False,
        seeds: int | None = None,
        trials: int = 0,
        objectives: Iterable[str] | None = None,
        name: str | None = None,
        root: Path = Path("runs"),
        workers: int | None = None,
        save_every: float = 10.0,
        **settings: Any,
    ) -> None:
        self.quick, self.save_every = quick, real_number("save_every", save_every, 0, finite=False)
        self.seeds = whole_number("seeds", (QUICK_SEEDS if quick else SEEDS) if seeds is None else seeds, 1, MOST)
        self.trials = whole_number("trials", trials, 0, MOST)
        workers = None if workers is None else whole_number("workers", workers, 1, MOST)
        name = None if name is None else folder_name("name", name)
        settings = flat(settings)
        self.entries = entries(objectives, **(quick_settings(settings) if quick else {}) | settings)
        self.tuned: list[Entry] = []  # what the searches found
        self.base = self.entries[0].config
        check_device(self.base.device)
        for package in ("matplotlib", "safetensors", *(["optuna"] if self.trials else [])):
            require(package, "train")
        model = self.base.model.name
        system = model * (model != DEFAULT)
        parts = (Path(self.base.data).resolve().name, system, "quick" * quick, f"tune{self.trials}" * bool(self.trials))
        self.folder = Path(root) / (name or folder_name_of("-".join(filter(None, parts))))
        data = read_pairs(self.base)
        Sampler(
            data.train.image_of, self.base.optimiser.batch, self.base.seed
        )  # too large a batch ends it here, not in each run
        self.images, self.fingerprints = len(data.train.x), data.fingerprints
        by_default = max(1, cores() // self.base.threads) if self.base.device == "cpu" else 1
        self.workers = workers or by_default
        self.results: dict[str, Any] = {}  # by the job's key
        self.failures: dict[str, str] = {}

    def run(self, command: str = "") -> list[Record]:
        """Train what is not yet trained and write the report; `command` goes into its note.

        Returns:
            The records of all runs, tuned ones last.

        Raises:
            Busy: another process is at work in the folder.
            Incomplete: some runs failed; the report of the others has been written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder):
            return self._run(command)

    def _run(self, command: str) -> list[Record]:
        self.failures = {}
        with display() as shown:
            searches = self._searches()
            self._perform([*self._runs(self.entries), *searches.values()], shown)
            for entry in self.entries:
                found = self.results.get(searches[entry.config].key) if searches else None
                if found is not None:
                    T = "con" if entry.names["T"] == HINGE else entry.names["T"]  # its margin was searched
                    self.tuned.append(Entry({**entry.names, "T": T}, found))
            self._perform(self._runs(self.tuned), shown)
        records = self.records()
        if records:
            title = f"{self.base.data}, mean ± standard deviation over {self.seeds} seeds"
            write_report(cast(Sequence[RunRecord], records), self.folder, title=title, note=self.note(command))
        if self.failures:
            lines = "".join(f"\n  {key}: {message}" for key, message in self.failures.items())
            raise Incomplete(f"{len(self.failures)} of the runs failed; the others are in {self.folder}:{lines}")
        return records

    def records(self) -> list[Record]:
        """The records of the runs that are finished."""
        return [
            {**self.results[run.run_name], **entry.names, "tuned": tuned}
            for tuned, group in ((False, self.entries), (True, self.tuned))
            for entry in group
            for run in map(entry.seeded, range(self.seeds))
            if run.run_name in self.results
        ]

    def note(self, command: str = "") -> str:
        """The conditions, in sentences."""
        base = self.base
        runs = [result for result in self.results.values() if isinstance(result, dict)]  # the others are of searches
        end = "after its epochs" if base.stopping.epochs else "when validation RSUM has stopped rising"
        sentences = [
            f"{self.images} training images of {base.data}; {base.setting}, {self.seeds} seeds. "
            f"A run ends {end}; "
            "the weights with the best validation RSUM are the ones tested.",
        ]
        specs = [entry.config.objective.spec for entry in self.entries]
        if any(spec.recipe is None and spec.axis("reduction") == Named("sum") for spec in specs):
            sentences.append("T × P is summed over the batch, as the system's own objective is.")
        if self.quick:
            sentences.insert(0, QUICK_NOTE)
        if rising := sum(run["stopped"] == "max_steps" for run in runs):
            sentences.append(
                f"{rising} of {len(runs)} runs met the limit of {base.stopping.max_steps} steps before that."
            )
        if self.trials:
            sentences.append(f"Every objective had {self.trials} trials, judged on the validation split.")
        if command:
            sentences.append(f"Command: {command}")
        return " ".join(sentences)

    def _runs(self, group: Sequence[Entry]) -> list[Job]:
        """Seed by seed, so that the table fills evenly; objectives that share a configuration share the run."""
        configs = dict.fromkeys(entry.seeded(seed) for seed in range(self.seeds) for entry in group)
        return [Job(run.run_name, train, (run, place(run, self.folder / "runs"), self.save_every)) for run in configs]

    def _settled(self, job: Job) -> bool:
        """Whether a run has a record already, which then counts, or cannot be begun."""
        if job.function is train and job.key not in self.results:
            config, run_dir, _ = job.arguments
            try:
                record = finished(config, run_dir, self.fingerprints)
            except ValueError as error:  # another's folder, other features, damage
                self.failures[job.key] = str(error)
            else:
                if record is not None:
                    self.results[job.key] = record
        return job.key in self.results or job.key in self.failures

    def _searches(self) -> dict[TrainConfig, Job]:
        if not self.trials:
            return {}
        return {
            config: Job(
                f"search-{config.run_name}",
                search,
                (config, self.trials, place(config, self.folder / "trials"), self.save_every),
            )
            for config in dict.fromkeys(entry.config for entry in self.entries)
        }

    def _perform(self, jobs: Sequence[Job], shown: Lines) -> None:
        left = {job.key: job for job in jobs if not self._settled(job)}
        shown.expect(len(jobs), finished=len(jobs) - len(left))
        for event in work(list(left.values()), self.workers):
            if isinstance(event, Done) and left[event.key].function is train:
                self._settled(left[event.key])  # files may have changed since the sweep began
            elif isinstance(event, Done):
                self.results[event.key] = event.result
            elif isinstance(event, Failed):
                self.failures[event.key] = event.message
            shown.show(event, self.records)
