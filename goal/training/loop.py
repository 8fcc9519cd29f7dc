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
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import goal
from goal import data
from goal.data.files import write_atomically
from goal.evaluation import MapMetrics, RetrievalMetrics, evaluate, evaluate_similarity, map_at_all
from goal.models import SCAN, Vocabulary
from goal.training import systems
from goal.training.config import TrainConfig
from goal.training.features import Features, Sampler, Split, features, labelled, split
from goal.training.schedule import Curriculum, FewSemiHard
from goal.training.systems import SYSTEMS, Inputs

Row = dict[str, float]
Record = dict[str, Any]
Checkpoint = tuple[Record, dict[str, dict[str, Tensor]]]  # the state; model, mean, best and optimizer by name

RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")


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

    Called again after it was killed, it continues; called again after it ended, it returns the record.

    Args:
        config: what to train, and how.
        run_dir: folder of this run alone; made if need be.
        save_every: seconds between checkpoints, longer where writing one would take more than a twentieth of the time;
            0: after every step.
        test: score the test split at the end. Without, as for trials of a search, it is not looked at.
        diagnose: watch the objective at every so-manieth step: `diagnosis.jsonl` and, at the end, `diagnosis.png`. Of
            many ranks rank 0 watches, its own anchors among its own rows.
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
        ValueError: a folder that holds another run, or one on other data; whatever the data's readers refuse;
            diagnose, or distributed, with a model that makes similarities.

    >>> import tempfile
    >>> config = TrainConfig(recipe="infonce", hidden=8, dim=4, batch=64, max_steps=2, eval_every=2)
    >>> record = train(config, Path(tempfile.mkdtemp()))
    >>> record["steps"], record["stopped"], sorted(record["ranks"])
    (2, 'max_steps', ['i2t', 'image_of', 't2i'])
    """
    if diagnose and config.model == "scan":
        raise ValueError("diagnose: looks at x and y, and scan makes similarities of them")
    if distributed:
        _check_distributed(config)
    features = read(config)
    versions = _versions(config, features)
    first, there = not distributed or dist.get_rank() == 0, (run_dir / "record.json").is_file()
    ended: Record | None = _told(_finished(config, run_dir, versions) if first and there else None, distributed)
    if ended is not None:
        return ended
    run_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device)
    with _computing(config.threads, device):
        run = _Run(config, features, run_dir, save_every, distributed)
        if not run.restore(versions) and run.writes:
            _write_json(run_dir / "config.json", json.loads(config.to_json()))
            _write_json(run_dir / "versions.json", versions)
        if run.writes:
            run.write_log()
        with run.watched(diagnose if run.writes else 0):
            while run.state.stopped is None:
                row = run.interval()
                on_evaluation({**row, "end": run.end})
                run.save_if_due()
        record: Record = run.told(run.finish(test) if run.writes else None)
        return record


def _check_distributed(config: TrainConfig) -> None:
    if config.model == "scan":
        raise ValueError("distributed: scan makes similarities, which no rank has all of")
    if config.batch < dist.get_world_size():
        raise ValueError(f"distributed: {dist.get_world_size()} ranks have too few rows of a batch of {config.batch}")


def read(config: TrainConfig) -> Features:
    """The data of a run, in the form that its model takes."""
    return features(config.data, config.limit, SYSTEMS[config.model].images, config.texts)


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

    def split(self, name: str) -> Split:
        """A split of its data, in the form that its model takes."""
        system = SYSTEMS[self.config.model]
        if system.of_clips:
            return labelled(self.config.data, name)
        return split(data.load(self.config.data, name), system.images, self.vocabulary)


def load_trained(run_dir: Path) -> Trained:
    """The configuration of a run, its best weights, and the words of its captions.

    Raises:
        ValueError: no finished run in the folder.
    """
    from safetensors import safe_open

    path = run_dir / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{run_dir}: holds no finished run (there is no model.safetensors)")
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["run"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config, inputs = TrainConfig.from_json(json.dumps(told["config"])), Inputs(**told["inputs"])
    model = _model(config, inputs)
    model.load_state_dict(tensors)
    vocabulary = Vocabulary.load(run_dir / "vocabulary.json") if inputs.y_kind == "words" else None
    return Trained(config, model.eval(), vocabulary)


def score(config: TrainConfig, model: nn.Module, part: Split, folds: int = 1) -> RetrievalMetrics | MapMetrics:
    """Retrieval metrics of a split as a model of `SYSTEMS` embeds it; the products in float32."""
    with torch.inference_mode():
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
        self.inputs = systems.inputs_of(features)
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
        self.train, self.val = (systems.prepared(self.model, part, self.device) for part in features[:2])
        self.sampler = Sampler(features.train.image_of, config.batch, config.seed)
        self.epoch = max(1, len(features.train.y) // config.batch)  # steps
        self.end = min(n for n in (config.max_steps, config.epochs * self.epoch, sys.maxsize) if n)
        self.generator = _generator(self.device)
        self.metric = _metric(config)
        self.diagnosis: goal.Diagnosis | None = None
        self.every = 0  # steps between two rows of the diagnosis

    @contextmanager
    def watched(self, every: int) -> Iterator[None]:
        """With a diagnosis of the objective at every so-manieth step, drawn when training has ended."""
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
        validated = self.told(self._validate() if self.writes else None)
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
            with (self.run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def told(self, what: Any) -> Any:
        """What rank 0 has, on all ranks."""
        return _told(what, self.ranks > 1)

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
        """Write the checkpoint: one file, so that weights and state are never of different steps."""
        from safetensors.torch import save

        tensors = {f"model.{name}": tensor for name, tensor in self.modules.state_dict().items()}
        tensors |= {f"mean.{name}": tensor for name, tensor in self.mean.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        write_atomically(
            self.run_dir / "checkpoint.safetensors",
            save(tensors, {"state": json.dumps(dataclasses.asdict(self.state))}),
        )

    def restore(self, versions: Record) -> bool:
        """Continue from the checkpoint; False without one, or with one that other versions or data have made.

        Rank 0 decides, and reads it for all.
        """
        found: Checkpoint | None = self.told(self._checkpoint(versions) if self.writes else None)
        if found is None:
            return False
        state, groups = found
        self.state = State(**state)
        self.modules.load_state_dict(groups["model"])
        self.mean.load_state_dict(groups["mean"])
        self.best = {name: tensor.to(self.device) for name, tensor in groups["best"].items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        return True

    def _checkpoint(self, versions: Record) -> Checkpoint | None:
        """The state, and the tensors of model, mean, best and optimizer, on the CPU."""
        from safetensors import safe_open

        path = self.run_dir / "checkpoint.safetensors"
        if not path.is_file() or _read_json(self.run_dir / "versions.json") != versions:
            return None
        _check_owner(self.config, self.run_dir)
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "mean": {}, "best": {}, "optimizer": {}}
        with safe_open(path, framework="pt") as file:
            state: Record = json.loads(file.metadata()["state"])
            for name in file.keys():  # noqa: SIM118
                group, _, rest = name.partition(".")
                groups[group][rest] = file.get_tensor(name)
        return state, groups

    def write_log(self) -> None:
        """Begin the log with the rows up to the checkpoint; what a killed run wrote after it, whole or half, goes."""
        lines = "".join(json.dumps(row) + "\n" for row in self.state.curve)
        write_atomically(self.run_dir / "metrics.jsonl", lines.encode())

    def finish(self, test: bool) -> Record:
        """Write the best weights and the record, and remove the checkpoint."""
        from safetensors.torch import save

        config, state = self.config, self.state
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
            metrics = score(config, self.mean, self.features.test)
            if isinstance(metrics, MapMetrics):
                record["test"] = metrics.as_dict()
            else:
                names = (*RECALLS, "rsum", "i2t_medr", "t2i_medr")
                record["test"] = {name: getattr(metrics, name) for name in names}
                record["ranks"] = {
                    "i2t": metrics.i2t_ranks.tolist(),
                    "t2i": metrics.t2i_ranks.tolist(),
                    "image_of": self.features.test.image_of.tolist(),
                }
        if self.features.vocabulary is not None:
            self.features.vocabulary.save(self.run_dir / "vocabulary.json")
        told = {"config": json.loads(config.to_json()), "inputs": self.inputs._asdict()}
        content = save(self.best, {"run": json.dumps(told)})  # one entry: they are written in any order
        write_atomically(self.run_dir / "model.safetensors", content)
        _write_json(self.run_dir / "record.json", record)
        (self.run_dir / "checkpoint.safetensors").unlink(missing_ok=True)
        return record


def _model(config: TrainConfig, inputs: Inputs) -> nn.Module:
    order = _similarity(config.objective()) == "order"
    return systems.build(config.model, inputs, order, dataclasses.asdict(config))


def _told(what: Any, distributed: bool) -> Any:
    """What rank 0 has, on all ranks."""
    if not distributed:
        return what
    box = [what]
    dist.broadcast_object_list(box)
    return box[0]


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
    """The run's threads and random numbers; the caller's come back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)


def _versions(config: TrainConfig, data: Features) -> Record:
    return {
        "goal": goal.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else config.device,
        "data": data.fingerprint,
    }


def _finished(config: TrainConfig, run_dir: Path, versions: Record) -> Record:
    """The record of a run that has ended."""
    _check_owner(config, run_dir)
    if _read_json(run_dir / "versions.json")["data"] != versions["data"]:
        raise ValueError(f"{run_dir}: was trained on other features of {config.data!r}; move it away, or name another")
    record: Record = _read_json(run_dir / "record.json")
    return record


def _check_owner(config: TrainConfig, run_dir: Path) -> None:
    if TrainConfig.from_json((run_dir / "config.json").read_text()) != config:
        raise ValueError(f"{run_dir}: holds a run of another configuration; move it away, or name another")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
