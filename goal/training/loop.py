"""One training run: from a configuration to a record, resumable at any moment.

    config.json            everything that decides the result
    versions.json          versions of what computes it, and the data's fingerprint
    metrics.jsonl          one line per evaluation on the validation split
    checkpoint.safetensors where the run stands, weights, optimiser and state in one file; gone when it is done
    model.safetensors      the weights that were best on the validation split
    record.json            the result

The batch and the dropout of a step are functions of (seed, step), so a checkpoint needs no state of a generator, and a
run that was killed ends with the same bits as one that was not.

What is validated, kept and tested is a running mean of the weights: those of heads jitter from step to step, by more
than most objectives differ, and a plateau would be found by chance. The systems of the literature keep their weights as
they are (average = 0).
"""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import goal
from goal import data
from goal.data.files import Busy, Damaged, alone, append_line, read_json, require, write_atomically
from goal.evaluation import MapMetrics, RetrievalMetrics, evaluate, evaluate_similarity, map_at_all
from goal.models import SCAN, Vocabulary
from goal.training import systems
from goal.training.config import TrainConfig, available, check_device, check_seconds, check_whole
from goal.training.features import (
    Features,
    Inputs,
    Mapped,
    Sampler,
    Split,
    features,
    fingerprint,
    inputs_of,
    labelled,
    split,
)
from goal.training.schedule import Curriculum, FewSemiHard
from goal.training.systems import SYSTEMS

Row = dict[str, float]
Record = dict[str, Any]

RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
MEASURES = {"rsum": (*RECALLS, "rsum", "i2t_medr", "t2i_medr"), "map": ("x2y", "y2x", "mean")}  # of the test split


class TrainingError(RuntimeError):
    """Training could not end."""


class Diverged(TrainingError):
    """The loss or the gradient of a run is no longer finite."""


@dataclass
class State:
    """Where a run stands, beside its tensors."""

    step: int = 0  # done
    drops: int = 0  # of the learning rate, so far
    stale: int = 0  # evaluations since the last best, or since the last drop
    best_step: int = 0
    best: float = -1.0  # validation RSUM, or MAP@all of clips
    stopped: str | None = None  # "plateau", "epochs" or "max_steps"
    losses: list[float] = field(default_factory=list)  # of the steps since the last evaluation
    curve: list[Row] = field(default_factory=list)  # one row per evaluation


Groups = dict[str, dict[str, Tensor]]  # model, mean, best and optimizer by name
Checkpoint = tuple[State, Groups]


def train(
    config: TrainConfig,
    run_dir: Path,
    save_every: float = 10.0,
    *,
    test: bool = True,
    diagnose: int = 0,
    distributed: bool = False,
    on_evaluation: Callable[[Row], None] = lambda row: None,
) -> Record:
    """Train to a plateau on the validation split or for so many epochs, and score the best weights on the test split.

    Called again after it was killed, it continues; called again after it ended, it returns the record. What tells is
    content: another configuration or other features are refused, or what is half done is begun again, and so is a run
    whose checkpoint or record is damaged, with a warning.

    Args:
        config: what to train, and how.
        run_dir: folder of this run alone; made if need be.
        save_every: seconds between checkpoints, longer where writing one would take more than a twentieth of the time;
            0: after every step.
        test: score the test split at the end. Without, as for trials of a search, it is not looked at and need not be
            there.
        diagnose: watch the objective every so many steps: `diagnosis.jsonl` and, at the end, `diagnosis.png`. Of many
            ranks rank 0 watches, its own anchors among its own rows.
        distributed: over the ranks of the default process group, each with its part of every batch: the objective is
            that of the whole batch, and so is its gradient. Rank 0 evaluates and writes; a checkpoint goes on with
            any number of ranks. Batch norm sees a rank's own rows.
        on_evaluation: called with each new row of the curve: step, loss, lr, val_rsum, val_i2t_r1, val_t2i_r1 (of
            clips val_map, val_x2y, val_y2x), the mean s⁺ and hardest s⁻ on the validation split, and end, the last
            step there can be.

    Returns:
        label, model, T, P, recipe, params, seed, test (recalls or MAP@all, in percent), best_val_rsum (or
        best_val_map), best_step, steps, stopped ("plateau", "epochs" or "max_steps"), curve, ranks; plain JSON.

    Raises:
        Diverged: a loss or a gradient that is not finite.
        Busy: another process is at work in the folder.
        ValueError: a folder that holds another run, or one on other data, or whose configuration is damaged; a device
            that is not there; whatever the data's readers refuse, in any split that will be read; diagnose, or
            distributed, with a model that makes similarities.
        ModuleNotFoundError: a package of the extra `train` is missing.
        OSError: naming the file, where one cannot be written.

    >>> import tempfile
    >>> config = TrainConfig(recipe="infonce", hidden=8, dim=4, batch=64, max_steps=2, eval_every=2)
    >>> record = train(config, Path(tempfile.mkdtemp()))
    >>> record["steps"], record["stopped"], sorted(record["ranks"])
    (2, 'max_steps', ['i2t', 'image_of', 't2i'])
    """
    _check_call(config, save_every, diagnose, distributed)
    run_dir = Path(run_dir).absolute()  # on_evaluation may change the folder that the process is in
    features = read(config, test)
    record: Record | None = _told(lambda: finished(config, run_dir, features.fingerprints), distributed)
    if record is not None:
        return record
    with ExitStack() as work:
        record = _told(lambda: _entered(work, config, run_dir, features.fingerprints), distributed)
        if record is not None:
            return record
        device = torch.device(config.device)
        work.enter_context(_computing(config.threads, device))
        run = _Run(config, features, run_dir, save_every, distributed)
        restored = run.restore()
        if run.writes:
            run.write_notes(anew=not restored)
        with run.watched(diagnose if run.writes else 0):
            while run.state.stopped is None:
                row = run.interval()
                on_evaluation({**row, "end": run.end})
                run.save_if_due()
        made: Record = run.told(lambda: run.finish(test))
        return made


def _check_call(config: TrainConfig, save_every: float, diagnose: int, distributed: bool) -> None:
    """All that can be refused before anything is read."""
    check_seconds("save_every", save_every)
    check_whole("diagnose", diagnose, least=0)
    check_device(config.device)
    require("safetensors", "train")
    if diagnose:
        require("matplotlib", "train")
        if config.model == "scan":
            raise ValueError("diagnose: looks at x and y, and scan makes similarities of them")
    if distributed:
        _check_distributed(config)


def _entered(work: ExitStack, config: TrainConfig, run_dir: Path, fingerprints: Mapping[str, str]) -> Record | None:
    """Take the folder for this process alone; the record, where another has ended the run until then."""
    run_dir.mkdir(parents=True, exist_ok=True)
    work.enter_context(alone(run_dir))
    return _ended(config, run_dir, fingerprints)


def _check_distributed(config: TrainConfig) -> None:
    if config.model == "scan":
        raise ValueError("distributed: scan makes similarities, which no rank has all of")
    if config.batch < dist.get_world_size():
        raise ValueError(f"distributed: {dist.get_world_size()} ranks have too few rows of a batch of {config.batch}")


def read(config: TrainConfig, test: bool = True) -> Features:
    """The data of a run, in the form that its model takes, with or without the test split."""
    texts: Any = config.texts
    return features(config.data, config.limit, SYSTEMS[config.model].images, texts, test)


def read_pairs(config: TrainConfig) -> Features:
    """The data of runs that are compared by recall.

    Raises:
        ValueError: a model that is judged by MAP@all.
    """
    if _metric(config) != "rsum":
        raise ValueError(f"model: recalls are compared here, and {config.model} is judged by MAP@all; use goal train")
    return read(config)


def best(record: Record) -> float:
    """The best validation RSUM of a run, or MAP@all of clips."""
    return float(record["best_val_map" if "best_val_map" in record else "best_val_rsum"])


class Trained(NamedTuple):
    """What a run has left."""

    config: TrainConfig
    model: nn.Module  # with the best weights, in evaluation mode
    vocabulary: Vocabulary | None
    inputs: Inputs  # what the model reads
    fingerprints: dict[str, str]  # of the splits that it was trained, validated and tested on

    def split(self, name: str) -> Split:
        """A split of its data, in the form that its model takes.

        Raises:
            ValueError: what the readers refuse, or features of other dimensions than the model's.
        """
        system = SYSTEMS[self.config.model]
        if system.of_clips:
            part = labelled(self.config.data, name)
        else:
            part = split(data.load(self.config.data, name), system.images, self.vocabulary)
        if (found := inputs_of(part, self.vocabulary)) != self.inputs:
            raise ValueError(f"{self.config.data}: {name!r} has {found}, and the model reads {self.inputs}")
        known = None if name == "train" and self.config.limit else self.fingerprints.get(name)
        if known is not None and known != fingerprint(part, self.vocabulary):
            warnings.warn(f"{self.config.data}: {name!r} is not what it was when the model was trained", stacklevel=2)
        return part


def load_trained(run_dir: Path, *, device: str | None = None, data: str | None = None) -> Trained:
    """The configuration of a run, its best weights, and the words of its captions.

    Args:
        run_dir: the run's folder.
        device: where to compute; by default where it was trained, or on the CPU where that is not there.
        data: the dataset that `Trained.split` reads; by default the one it was trained on, where it lay then. That it
            has changed is a warning.

    Raises:
        ValueError: no finished run in the folder, a damaged file (named), a device that is not there.
    """
    path = Path(run_dir) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{run_dir}: holds no finished run (there is no model.safetensors)")
    try:
        told, tensors = _read_tensors(path, "run")
        config, inputs = TrainConfig.from_json(json.dumps(told["config"])), Inputs(**told["inputs"])
        if told.get("sha256") not in (None, _digest(tensors)):
            raise Damaged("its content is not what was written")
        prints, at = dict(told.get("data", {})), str(told.get("at", config.data))
    except Exception as error:  # whatever a damaged file leads to
        raise Damaged(f"{path}: holds no run: {error}") from error
    if device is not None or not available(config.device):
        config = dataclasses.replace(config, device=device or "cpu")
    check_device(config.device)
    config = dataclasses.replace(config, data=at if data is None else data)
    with torch.device("meta"):  # sizes first: a wrong one takes no memory
        like = _model(config, inputs)
    _check_tensors(path, tensors, like.state_dict())
    with _defaults():
        model = _model(config, inputs)
    model.load_state_dict(tensors)
    vocabulary = None
    if inputs.y_kind == "words":
        vocabulary = Vocabulary.load(path.with_name("vocabulary.json"))
        if len(vocabulary) != inputs.y:
            raise Damaged(f"{path.with_name('vocabulary.json')}: has {len(vocabulary)} tokens, the model {inputs.y}")
    return Trained(config, model.eval().to(config.device), vocabulary, inputs, prints if data is None else {})


def _read_tensors(path: Path, entry: str) -> tuple[Record, dict[str, Tensor]]:
    """A JSON entry of a .safetensors file's metadata, and its tensors on the CPU, which hold no map of the file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[entry]), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Whether a file's tensors are those of a model, by their names and shapes."""
    for name in sorted({*tensors, *like}):
        shapes = [tuple(one[name].shape) if name in one else "missing" for one in (tensors, like)]
        if shapes[0] != shapes[1]:
            raise Damaged(f"{path}: {name} is {shapes[0]}, by its configuration it is {shapes[1]}")


def score(config: TrainConfig, model: nn.Module, part: Split, folds: int = 1) -> RetrievalMetrics | MapMetrics:
    """Retrieval metrics of a split as a model of `SYSTEMS` embeds it; the products in float32."""
    with torch.inference_mode(), _defaults():
        prepared = systems.prepared(model, part, torch.device(config.device))
        return _measured(config, model, prepared, _similarity(config.objective()), folds)[0]


def _measured(
    config: TrainConfig, model: nn.Module, part: Split, similarity: str, folds: int = 1
) -> tuple[RetrievalMetrics | MapMetrics, Row]:
    """Metrics of a prepared split, and the mean s⁺ and hardest s⁻ of its images and first captions."""
    device = torch.device(config.device)
    first = torch.from_numpy(np.unique(part.image_of.numpy(), return_index=True)[1])  # caption of each image
    if isinstance(model, SCAN):
        s = systems.similarities(model, part, device)
        objective = goal.Objective(T="con", P="con")
        objective.apply_similarity(s[:, first], ids=part.ids)
        return evaluate_similarity(s, part.image_of, folds=folds), _seen(objective.stats)
    x, y = systems.embeddings(model, part, device)
    stats = goal.gradients(x, y[first], T="con", P="con", similarity=similarity, ids=part.ids.to(device))[2]
    if _metric(config) == "map":
        return map_at_all(x, y, part.ids, part.ids, similarity=similarity), _seen(stats)
    return evaluate(x, y, part.image_of, similarity=similarity, folds=folds), _seen(stats)


def _seen(stats: goal.Stats) -> Row:
    return {"s_pos": stats.s_pos.mean().item(), "s_neg": stats.s_neg.mean().item()}


class _Run:
    """A run's modules and state."""

    def __init__(
        self,
        config: TrainConfig,
        features: Features,
        run_dir: Path,
        save_every: float = math.inf,
        distributed: bool = False,
    ) -> None:
        self.config, self.run_dir, self.features = config, run_dir, features
        self.save_every, self.pause, self.saved = save_every, save_every, time.monotonic()
        self.device = torch.device(config.device)
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.writes = self.rank == 0
        self.state = State()
        self.versions = _versions(config, features)
        self.inputs = inputs_of(features.train, features.vocabulary)
        torch.manual_seed(config.seed)
        self.model = _model(config, self.inputs)
        systems.fit(self.model, features.train)
        self.model.to(config.device)
        self.mean = copy.deepcopy(self.model).eval()
        self.best = _copied(self.mean)
        self.objective: Any = config.objective(group="world" if distributed else None).to(config.device)
        self.encode: nn.Module = self.model if isinstance(self.model, SCAN) else systems.Encoders(self.model)
        if distributed:
            self.encode = nn.parallel.DistributedDataParallel(self.encode)
        self.modules = nn.ModuleDict({"model": self.model, "objective": self.objective})
        groups = [
            {"params": list(self.model.parameters()), "weight_decay": config.weight_decay},
            {"params": list(self.objective.parameters()), "weight_decay": 0.0},  # SigLIP learns its scale and bias
        ]
        optimizer = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[config.optimizer]
        self.optimizer = optimizer([g for g in groups if g["params"]], lr=config.lr, fused=True)
        self.train, self.val = (
            systems.prepared(self.model, part, self.device) for part in (features.train, features.val)
        )
        self.sampler = Sampler(features.train.image_of, config.batch, config.seed)
        self.epoch = max(1, len(features.train.y) // config.batch)  # steps
        self.end = min(n for n in (config.max_steps, config.epochs * self.epoch, sys.maxsize) if n)
        self.generator = _generator(self.device)
        self.metric = _metric(config)
        self.diagnosis: goal.Diagnosis | None = None
        self.every = 0  # steps between two rows of the diagnosis

    @contextmanager
    def watched(self, every: int) -> Iterator[None]:
        """With a diagnosis of the objective every so many steps, drawn when training has ended."""
        if not every:
            yield
            return
        path = self.run_dir / "diagnosis.jsonl"
        start = -(-self.state.step // every)  # rows up to the checkpoint stay
        with goal.diagnose(self.objective, self.model, path=path, start=start) as diagnosis:
            self.diagnosis, self.every = diagnosis, every
            yield
        if diagnosis.rows:
            diagnosis.draw(self.run_dir / "diagnosis.png")

    def interval(self) -> Row:
        """The steps up to the next evaluation, and the evaluation; returns its row."""
        config, state = self.config, self.state
        every = config.eval_every or self.epoch
        until = min(self.end, (state.step // every + 1) * every)
        self.model.train()
        while state.step < until:
            state.losses.append(self._step())
            state.step += 1
            if state.step < until:
                self.save_if_due()
        validated = self.told(self._validate)
        loss = math.fsum(state.losses) / len(state.losses)
        row = {"step": state.step, "loss": loss, "lr": self._lr(), **validated}
        if isinstance(self.objective, Curriculum):
            row["stage"] = self.objective.stage  # in which this evaluation ends the interval
        state.curve.append(row)
        state.losses = []
        value = row[f"val_{self.metric}"]
        if value > state.best:
            state.best, state.best_step, state.stale = value, state.step, 0
            self.best = _copied(self.mean)
        else:
            state.stale += 1
        switched = isinstance(self.objective, Curriculum) and not self._counts_steps and self.objective.step(value)
        if switched:
            state.stale = 0
        elif not config.epochs and config.patience is not None and state.stale >= config.patience:
            self._plateau()
        if state.step >= self.end and state.stopped is None:
            state.stopped = "max_steps" if self.end == config.max_steps else "epochs"
        if self.writes:
            append_line(self.run_dir / "metrics.jsonl", json.dumps(row))
        return row

    def told(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on all ranks."""
        return _told(make, self.ranks > 1)

    def _plateau(self) -> None:
        """Nothing better for long: the rate drops and the best weights come back, or it ends."""
        state = self.state
        if state.drops < self.config.drops:
            state.drops, state.stale = state.drops + 1, 0
            self.model.load_state_dict(self.best)
            self.mean.load_state_dict(self.best)
        else:
            state.stopped = "plateau"

    @functools.cached_property
    def _counts_steps(self) -> bool:
        """Whether the curriculum counts steps of the optimiser, and not evaluations."""
        return any(isinstance(until, FewSemiHard) for until in self.objective.until)

    def _lr(self) -> float:
        """The rate of the step at hand."""
        config, state = self.config, self.state
        late = config.drop_epoch is not None and state.step >= config.drop_epoch * self.epoch
        return config.lr * config.drop ** (state.drops + late) * min(1.0, (state.step + 1) / max(1, config.warmup))

    def _step(self) -> float:
        config, step = self.config, self.state.step
        own = [config.seed, step, *([self.rank] if self.rank else [])]
        self.generator.manual_seed(int(np.random.SeedSequence(own).generate_state(1)[0]))  # of dropout
        images, captions = (rows.tensor_split(self.ranks)[self.rank] for rows in self.sampler(step))
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        x, y = (
            systems.moved(side[rows], self.device) for side, rows in ((self.train.x, images), (self.train.y, captions))
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = systems.loss_of(self.encode, self.objective, x, y, self.train.ids[images].to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        if self.diagnosis is not None and step % self.every == 0:
            self.diagnosis.step()
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), config.clip)
        value = float(loss.item())
        for name, number in (("loss", value), ("norm of the gradient", norm.item())):
            if not math.isfinite(number):
                raise Diverged(
                    f"{config.label}, seed {config.seed}: the {name} is {number} at step {step + 1} "
                    f"(learning rate {self._lr():g}, {self.run_dir})"
                )
        self.optimizer.step()
        if isinstance(self.objective, Curriculum) and self._counts_steps:
            ends = self.ranks > 1 and self.objective.stage == 0  # the second stage has no end
            self.objective.step(self._share() if ends else None)
        keep = min(config.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, weight in zip(self.mean.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(weight, 1 - keep)
            for kept, buffer in zip(self.mean.buffers(), self.model.buffers(), strict=True):
                kept.copy_(buffer)
        return value

    def _share(self) -> float:
        """The share of anchors, of all ranks, that have a negative."""
        has = self.objective.stats.index >= 0
        counts = torch.tensor([has.sum(), has.numel()], dtype=torch.int64, device=self.device)
        dist.all_reduce(counts)
        return float((counts[0] / counts[1]).item())

    def _validate(self) -> Row:
        """The metrics on the validation split that choose the weights, and its mean s⁺ and hardest s⁻."""
        with torch.inference_mode():
            metrics, seen = _measured(self.config, self.mean, self.val, _similarity(self.objective))
        if isinstance(metrics, MapMetrics):
            return {"val_map": metrics.mean, "val_x2y": metrics.x2y, "val_y2x": metrics.y2x, **seen}
        return {"val_rsum": metrics.rsum, "val_i2t_r1": metrics.i2t_r1, "val_t2i_r1": metrics.t2i_r1, **seen}

    def save_if_due(self) -> None:
        """Write the checkpoint, if the last one is old enough."""
        start = time.monotonic()
        if not self.writes or start - self.saved < self.pause:
            return
        self.save()
        self.saved = time.monotonic()
        self.pause = max(self.save_every, 20 * (self.saved - start)) if self.save_every else 0

    def save(self) -> None:
        """Write the checkpoint: one file, so that weights, state and whose they are never come apart."""
        from safetensors.torch import save

        tensors = {f"model.{name}": tensor for name, tensor in self.modules.state_dict().items()}
        tensors |= {f"mean.{name}": tensor for name, tensor in self.mean.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        self._check_files()
        told = dataclasses.asdict(self.state) | {"run": self._identity()}
        told["sha256"] = _digest(tensors, told)
        write_atomically(self.run_dir / "checkpoint.safetensors", save(tensors, {"state": json.dumps(told)}))

    def _check_files(self) -> None:
        """No file that is read while training goes on has changed: the result would be of neither content."""
        for side in (side for part in self.features[:3] if part is not None for side in part[:2]):
            if isinstance(side, Mapped):
                side.check_file()

    def _identity(self) -> Record:
        """What a checkpoint has to be of to be continued."""
        return {"config": json.loads(self.config.to_json()), "versions": self.versions}

    def restore(self) -> bool:
        """Continue from the checkpoint; False without one, with a damaged one, or with one of other versions or data.

        Rank 0 decides, and reads it for all.
        """
        found: Checkpoint | None = self.told(self._checkpoint)
        if found is None:
            return False
        self.state, groups = found
        self.modules.load_state_dict(groups["model"])
        self.mean.load_state_dict(groups["mean"])
        self.best = {name: tensor.to(self.device) for name, tensor in groups["best"].items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        return True

    def _checkpoint(self) -> Checkpoint | None:
        """The state, and the tensors on the CPU."""
        path = self.run_dir / "checkpoint.safetensors"
        if not path.is_file():
            return None
        groups: Groups = {"model": {}, "mean": {}, "best": {}, "optimizer": {}}
        try:
            told, tensors = _read_tensors(path, "state")
            if told.get("run") != self._identity():
                return None
            if told.pop("sha256", None) != _digest(tensors, told):
                raise Damaged("its content is not what was written")
            for name, tensor in tensors.items():
                group, _, rest = name.partition(".")
                groups[group][rest] = tensor
            state = State(**{name: value for name, value in told.items() if name != "run"})
            self._check_groups(path, groups)
        except Exception as error:  # whatever a damaged file leads to
            _warn_damaged(path, error)
            return None
        return state, groups

    def _check_groups(self, path: Path, groups: Groups) -> None:
        """Whether the tensors are those of this run's modules and optimiser."""
        _check_tensors(path, groups["model"], self.modules.state_dict())
        _check_tensors(path, groups["mean"], self.mean.state_dict())
        _check_tensors(path, groups["best"], self.best)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for name, moment in groups["optimizer"].items():
            index = int(name.partition(".")[0])
            if moment.dim() and moment.shape != weights[index].shape:
                raise Damaged(f"{path}: optimizer.{name} is {tuple(moment.shape)}")

    def write_notes(self, anew: bool) -> None:
        """Say whose folder it is, and begin the log with the rows up to the checkpoint; what a killed run wrote goes.

        Args:
            anew: what an earlier run has left goes first, its results before the rest.
        """
        for name in (*RESULTS, *NOTES) if anew else ():
            (self.run_dir / name).unlink(missing_ok=True)
        write_atomically(self.run_dir / "config.json", self.config.to_json().encode())
        write_atomically(self.run_dir / "versions.json", _json(self.versions))
        lines = "".join(json.dumps(row) + "\n" for row in self.state.curve)
        write_atomically(self.run_dir / "metrics.jsonl", lines.encode())
        if anew:
            self.save()

    def finish(self, test: bool) -> Record:
        """Write the best weights and the record, and remove the checkpoint."""
        from safetensors.torch import save

        config, state = self.config, self.state
        self._check_files()
        self.mean.load_state_dict(self.best)
        record: Record = {
            **config.names,
            "model": config.model,
            "params": {"lr": config.lr} | config.params,
            "seed": config.seed,
            f"best_val_{self.metric}": state.best,
            "best_step": state.best_step,
            "steps": state.step,
            "stopped": state.stopped,
            "curve": state.curve,
        }
        if test:
            assert self.features.test is not None
            metrics = score(config, self.mean, self.features.test)
            if isinstance(metrics, MapMetrics):
                record["test"] = metrics.as_dict()
            else:
                record["test"] = {name: getattr(metrics, name) for name in MEASURES["rsum"]}
                record["ranks"] = {
                    "i2t": metrics.i2t_ranks.tolist(),
                    "t2i": metrics.t2i_ranks.tolist(),
                    "image_of": self.features.test.image_of.tolist(),
                }
        if self.features.vocabulary is not None:
            self.features.vocabulary.save(self.run_dir / "vocabulary.json")
        told = {
            "config": json.loads(config.to_json()),
            "inputs": self.inputs._asdict(),
            "data": self.features.fingerprints,
            "at": config.data if config.data == "emoji" else str(Path(config.data).resolve()),
            "sha256": _digest(self.best),
        }
        content = save(self.best, {"run": json.dumps(told)})  # one entry: they are written in any order
        write_atomically(self.run_dir / "model.safetensors", content)
        write_atomically(self.run_dir / "record.json", _json(record))
        (self.run_dir / "checkpoint.safetensors").unlink(missing_ok=True)
        return record


def _model(config: TrainConfig, inputs: Inputs) -> nn.Module:
    order = _similarity(config.objective()) == "order"
    return systems.build(config.model, inputs, order, dataclasses.asdict(config))


def _told(make: Callable[[], Any], distributed: bool) -> Any:
    """What rank 0 makes, on all ranks; where it raises, all of them do."""
    if not distributed:
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    made, refusal = box
    if refusal is not None:
        raise refusal
    return made


def _metric(config: TrainConfig) -> str:
    """What chooses the weights."""
    return "map" if SYSTEMS[config.model].of_clips else "rsum"


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _generator(device: torch.device) -> torch.Generator:
    """Where dropout takes its random numbers from; `torch.manual_seed` does far more than is needed at each step."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _similarity(objective: nn.Module) -> str:
    settings: Any = getattr(objective, "settings", None)  # a yardstick has none
    return "dot" if settings is None else str(settings.similarity.name)


@contextmanager
def _computing(threads: int, device: torch.device) -> Iterator[None]:
    """The run's threads, random numbers and defaults; the caller's come back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _defaults(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _defaults() -> Iterator[None]:
    """What modules are made of where nothing else is said: float32 on the CPU."""
    before, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def _versions(config: TrainConfig, data: Features) -> Record:
    return {
        "goal": goal.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else config.device,
        "data": data.fingerprints,
        "terms": config.definitions(),
    }


def _digest(tensors: Mapping[str, Tensor], told: Record | None = None) -> str:
    """SHA-256 of what a file holds."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {array.dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(array.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- a run's folder --------------------------------------------------------------------------------------

RESULTS = ("record.json", "checkpoint.safetensors", "model.safetensors")  # what is lost with them is work
NOTES = ("vocabulary.json", "metrics.jsonl", "diagnosis.jsonl", "diagnosis.png", "versions.json", "config.json")


def finished(config: TrainConfig, run_dir: Path, fingerprints: Mapping[str, str]) -> Record | None:
    """The record of a run that has ended; None where there is none, or, with a warning, a damaged one.

    Args:
        fingerprints: those of the run's `Features`.

    Raises:
        Damaged: naming the file that should tell whose folder it is.
        ValueError: a folder with the results of another configuration, or of a run on other features.
    """
    record = _ended(config, run_dir, fingerprints)
    if record is not None and any((run_dir / name).exists() for name in ("checkpoint.safetensors", ".lock")):
        with suppress(Busy, OSError), alone(run_dir):  # it was killed at its last line
            (run_dir / "checkpoint.safetensors").unlink(missing_ok=True)
    return record


def _ended(config: TrainConfig, run_dir: Path, fingerprints: Mapping[str, str]) -> Record | None:
    if not any((run_dir / name).is_file() for name in RESULTS):
        return None
    path = run_dir / "config.json"
    try:
        owner = TrainConfig.from_json(json.dumps(read_json(path)))
    except (TypeError, ValueError) as error:
        raise Damaged(f"{path}: is damaged, or of another version of goal; move {run_dir} away: {error}") from error
    if owner != config:
        names = [spec.name for spec in dataclasses.fields(config)]
        differ = ", ".join(name for name in names if getattr(owner, name) != getattr(config, name))
        raise ValueError(f"{run_dir}: holds a run of another configuration ({differ}); move it away, or name another")
    path = run_dir / "record.json"
    if not path.is_file():
        return None
    versions = read_json(run_dir / "versions.json")
    if not isinstance(versions, dict):
        raise Damaged(f"{run_dir / 'versions.json'}: is damaged: it holds {type(versions).__name__}")
    then = versions.get("data")
    if not isinstance(then, dict) or any(then.get(name, value) != value for name, value in fingerprints.items()):
        raise ValueError(f"{run_dir}: was trained on other features of {config.data!r}; move it away, or name another")
    if versions.get("terms", {}) != config.definitions():
        raise ValueError(f"{run_dir}: was trained with another definition of {config.label}; move it away")
    try:
        record: Record = read_json(path)
        _check_record(record, config)
    except Damaged as error:
        _warn_damaged(path, error.__cause__ or error)
        return None
    if "test" in fingerprints and "test" not in record:
        raise ValueError(f"{run_dir}: holds a run without a test; move it away, or name another")
    return record


def _check_record(record: Any, config: TrainConfig) -> None:
    """Whether it is what `finish` writes for such a run."""
    fixed = {**config.names, "model": config.model, "seed": config.seed}
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in fixed.items()):
        raise Damaged("it is no record of this run")
    metric = _metric(config)
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


def _warn_damaged(path: Path, error: BaseException) -> None:
    warnings.warn(f"{path}: is damaged, so the run is begun again: {error}", stacklevel=2)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
