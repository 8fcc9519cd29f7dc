"""A training run: from a configuration to a record in the run's folder, resumable at any moment.

The batch and the dropout of a step are functions of (seed, step). So a checkpoint needs no generator state, and a run
that was killed ends with the same bits as an uninterrupted run.

A running mean of the weights is validated, saved and tested. The weights of small heads jitter from step to step, by
more than most objectives differ, and without the mean the plateau that ends training would be a matter of chance. The
systems of the literature use their weights without a mean (average = 0).
"""

import copy
import dataclasses
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import goal
from goal.data.files import Damaged, alone, append_line, require, write_atomically
from goal.evaluation import MapMetrics
from goal.training import systems
from goal.training.config import MOST, TrainConfig, check_device
from goal.training.features import (
    Features,
    Mapped,
    Sampler,
    features,
    inputs_of,
)
from goal.training.folder import (
    MEASURES,
    Record,
    Row,
    as_json,
    begin,
    check_tensors,
    digest,
    ended,
    finished,
    read_tensors,
    warn_damaged,
)
from goal.training.schedule import Curriculum, FewSemiHard
from goal.training.systems import SYSTEMS
from goal.training.trained import build_model, measured, plain_defaults, score, similarity_of
from goal.validation import real_number, whole_number


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
            begin(run_dir, config, run.versions, run.state.curve, anew=not restored)
            if not restored:
                run.save()
        with run.watched(diagnose if run.writes else 0):
            while run.state.stopped is None:
                row = run.interval()
                on_evaluation({**row, "end": run.end})
                run.save_if_due()
        made: Record = run.told(lambda: run.finish(test))
        return made


def _check_call(config: TrainConfig, save_every: float, diagnose: int, distributed: bool) -> None:
    """All that can be refused before anything is read."""
    real_number("save_every", save_every, low=0, finite=False)
    whole_number("diagnose", diagnose, 0, MOST)
    check_device(config.device)
    require("safetensors", "train")
    if diagnose:
        require("matplotlib", "train")
        if SYSTEMS[config.model.name].gives == "similarities":
            raise ValueError(f"diagnose must be 0: it looks at x and y, and {config.model.name} makes similarities.")
    if distributed:
        _check_distributed(config)


def _entered(work: ExitStack, config: TrainConfig, run_dir: Path, fingerprints: Mapping[str, str]) -> Record | None:
    """Take the folder for this process alone; the record, where another has ended the run until then."""
    run_dir.mkdir(parents=True, exist_ok=True)
    work.enter_context(alone(run_dir))
    return ended(config, run_dir, fingerprints)


def _check_distributed(config: TrainConfig) -> None:
    if SYSTEMS[config.model.name].gives == "similarities":
        raise ValueError(
            f"distributed must be False: {config.model.name} makes similarities, which no rank has all of."
        )
    if config.optimiser.batch < (ranks := dist.get_world_size()):
        raise ValueError(f"batch must be >= {ranks}, the number of ranks, got {config.optimiser.batch}.")


def read(config: TrainConfig, test: bool = True) -> Features:
    """The data of a run, in the form that its model takes, with or without the test split."""
    texts: Any = config.model.texts
    return features(config.data, config.limit, SYSTEMS[config.model.name].images, texts, test)


def read_pairs(config: TrainConfig) -> Features:
    """The data of runs that are compared by recall.

    Raises:
        ValueError: a model that is judged by MAP@all.
    """
    if SYSTEMS[config.model.name].judged != "rsum":
        model = config.model.name
        raise ValueError(f"model must be judged by recalls here, and {model} is judged by MAP@all: use goal train.")
    return read(config)


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
        self.system = SYSTEMS[config.model.name]
        self.save_every, self.pause, self.saved = save_every, save_every, time.monotonic()
        self.device = torch.device(config.device)
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.writes = self.rank == 0
        self.state = State()
        self.versions = _versions(config, features)
        self.inputs = inputs_of(features.train, features.vocabulary)
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.inputs)
        if self.system.fit is not None:
            self.system.fit(self.model, features.train)
        self.model.to(config.device)
        self.mean = copy.deepcopy(self.model).eval()
        self.best = _copied(self.mean)
        self.objective: Any = config.build_objective(group="world" if distributed else None).to(config.device)
        embeds = self.system.gives == "embeddings"
        self.encode: nn.Module = systems.Encoders(self.model) if embeds else self.model
        if distributed:
            self.encode = nn.parallel.DistributedDataParallel(self.encode)
        self.modules = nn.ModuleDict({"model": self.model, "objective": self.objective})
        its = config.optimiser
        groups = [
            {"params": list(self.model.parameters()), "weight_decay": its.weight_decay},
            {"params": list(self.objective.parameters()), "weight_decay": 0.0},  # SigLIP learns its scale and bias
        ]
        optimizer = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[its.name]
        self.optimizer = optimizer([g for g in groups if g["params"]], lr=its.lr, fused=True)
        self.train, self.val = (
            systems.prepared(self.system, self.model, part, self.device) for part in (features.train, features.val)
        )
        self.sampler = Sampler(features.train.image_of, its.batch, config.seed)
        self.epoch = max(1, len(features.train.y) // its.batch)  # steps
        self.end = min(n for n in (config.stopping.max_steps, config.stopping.epochs * self.epoch, sys.maxsize) if n)
        self.generator = _generator(self.device)
        self.metric = self.system.judged
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
        stopping, state = self.config.stopping, self.state
        every = stopping.eval_every or self.epoch
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
        elif not stopping.epochs and stopping.patience is not None and state.stale >= stopping.patience:
            self._plateau()
        if state.step >= self.end and state.stopped is None:
            state.stopped = "max_steps" if self.end == stopping.max_steps else "epochs"
        if self.writes:
            append_line(self.run_dir / "metrics.jsonl", json.dumps(row))
        return row

    def told(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on all ranks."""
        return _told(make, self.ranks > 1)

    def _plateau(self) -> None:
        """Nothing better for long: the rate drops and the best weights come back, or it ends."""
        state = self.state
        if state.drops < self.config.optimiser.drops:
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
        config, state = self.config.optimiser, self.state
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
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), config.optimiser.clip)
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
        keep = min(config.optimiser.average, (step + 1) / (step + 10))
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
            metrics, seen = measured(self.config, self.mean, self.val, similarity_of(self.objective))
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
        told["sha256"] = digest(tensors, told)
        write_atomically(self.run_dir / "checkpoint.safetensors", save(tensors, {"state": json.dumps(told)}))

    def _check_files(self) -> None:
        """No file that is read while training goes on has changed: the result would be of neither content."""
        for side in (side for part in self.features[:3] if part is not None for side in part[:2]):
            if isinstance(side, Mapped):
                side.check_file()

    def _identity(self) -> Record:
        """What a checkpoint has to be of to be continued."""
        return {"config": json.loads(self.config.to_json()), "versions": self.versions}

    def _is_own(self, run: Any) -> bool:
        """Whether a checkpoint of that identity is this run's, by whichever version's form of a configuration."""
        if not isinstance(run, dict) or run.get("versions") != self.versions:
            return False
        try:
            return TrainConfig(**run["config"]) == self.config
        except (KeyError, TypeError, ValueError):
            return False

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
            told, tensors = read_tensors(path, "state")
            if not self._is_own(told.get("run")):
                return None
            if told.pop("sha256", None) != digest(tensors, told):
                raise Damaged("its content is not what was written")
            for name, tensor in tensors.items():
                group, _, rest = name.partition(".")
                groups[group][rest] = tensor
            state = State(**{name: value for name, value in told.items() if name != "run"})
            self._check_groups(path, groups)
        except Exception as error:  # whatever a damaged file leads to
            warn_damaged(path, error)
            return None
        return state, groups

    def _check_groups(self, path: Path, groups: Groups) -> None:
        """Whether the tensors are those of this run's modules and optimiser."""
        check_tensors(path, groups["model"], self.modules.state_dict())
        check_tensors(path, groups["mean"], self.mean.state_dict())
        check_tensors(path, groups["best"], self.best)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for name, moment in groups["optimizer"].items():
            index = int(name.partition(".")[0])
            if moment.dim() and moment.shape != weights[index].shape:
                raise Damaged(f"{path}: optimizer.{name} is {tuple(moment.shape)}")

    def finish(self, test: bool) -> Record:
        """Write the best weights and the record, and remove the checkpoint."""
        from safetensors.torch import save

        config, state = self.config, self.state
        self._check_files()
        self.mean.load_state_dict(self.best)
        record: Record = {
            **config.names,
            "model": config.model.name,
            "params": {"lr": config.optimiser.lr} | config.params,
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
            "sha256": digest(self.best),
        }
        content = save(self.best, {"run": json.dumps(told)})  # one entry: they are written in any order
        write_atomically(self.run_dir / "model.safetensors", content)
        write_atomically(self.run_dir / "record.json", as_json(record))
        (self.run_dir / "checkpoint.safetensors").unlink(missing_ok=True)
        return record


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


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _generator(device: torch.device) -> torch.Generator:
    """Where dropout takes its random numbers from; `torch.manual_seed` does far more than is needed at each step."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


@contextmanager
def _computing(threads: int, device: torch.device) -> Iterator[None]:
    """The run's threads, random numbers and defaults; the caller's come back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with plain_defaults(), torch.random.fork_rng([device] if device.type == "cuda" else []):
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
        "data": data.fingerprints,
        "terms": config.definitions(),
    }
