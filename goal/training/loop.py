"""One training run: from a configuration to a record, resumable at any moment.

    config.json            everything that decides the result
    versions.json          versions of what computes it, and the data's fingerprint
    metrics.jsonl          one line per evaluation on the validation split
    checkpoint.safetensors where the run stands, weights, optimiser and state in one file; gone when it is done
    model.safetensors      the weights that were best on the validation split
    record.json            the result

The batch and the dropout of a step are functions of (seed, step), so a checkpoint needs no state of a generator, and a
run that was killed ends with the same bits as one that was not.

What is validated, kept and tested is a running mean of the weights: the weights themselves jitter from step to step, by
more than most objectives differ, and a plateau would be found by chance.
"""

import copy
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import goal
from goal.data.files import write_atomically
from goal.evaluation import RetrievalMetrics, evaluate
from goal.training.config import TrainConfig
from goal.training.features import Features, Sampler, Split, features
from goal.training.heads import Heads

Row = dict[str, float]
Record = dict[str, Any]

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
    best_val_rsum: float = -1.0
    stopped: str | None = None  # "plateau" or "max_steps"
    curve: list[Row] = field(default_factory=list)  # one row per evaluation


def train(
    config: TrainConfig,
    run_dir: Path,
    save_every: float = 10.0,
    *,
    test: bool = True,
    on_evaluation: Callable[[Row], None] = lambda row: None,
) -> Record:
    """Train until validation RSUM stops rising, and score the best heads on the test split.

    Called again after it was killed, it continues; called again after it ended, it returns the record.

    Args:
        config: what to train, and how.
        run_dir: folder of this run alone; made if need be.
        save_every: seconds between checkpoints; they are written after an evaluation.
        test: score the test split at the end. Without, as for trials of a search, it is not looked at.
        on_evaluation: called with each new row of the curve: step, loss, lr, val_rsum, val_i2t_r1, val_t2i_r1, and
            the mean s⁺ and hardest s⁻ on the validation split.

    Returns:
        label, T, P, recipe, params, seed, test (recalls in percent), best_val_rsum, best_step, steps, stopped
        ("plateau" or "max_steps"), curve, ranks; plain JSON.

    Raises:
        Diverged: a loss or a gradient that is not finite.
        ValueError: a folder that holds another run, or one on other data; whatever the data's readers refuse.

    >>> import tempfile
    >>> config = TrainConfig(recipe="infonce", hidden=8, dim=4, batch=64, max_steps=2, eval_every=2)
    >>> record = train(config, Path(tempfile.mkdtemp()))
    >>> record["steps"], record["stopped"], sorted(record["ranks"])
    (2, 'max_steps', ['i2t', 'image_of', 't2i'])
    """
    data = features(config.data, config.limit)
    versions = _versions(config, data)
    if (run_dir / "record.json").is_file():
        return _finished(config, run_dir, versions)
    run_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device)
    with _computing(config.threads, device):
        run = _Run(config, data, run_dir)
        if not run.restore(versions):
            _write_json(run_dir / "config.json", json.loads(config.to_json()))
            _write_json(run_dir / "versions.json", versions)
        run.write_log()
        saved = time.monotonic()
        while run.state.stopped is None:
            row = run.interval()
            on_evaluation(row)
            if time.monotonic() - saved >= save_every:
                run.save()
                saved = time.monotonic()
        return run.finish(test)


def load_heads(run_dir: Path) -> tuple[TrainConfig, Heads]:
    """The configuration of a run and its best heads, in evaluation mode.

    Raises:
        ValueError: no finished run in the folder.
    """
    from safetensors import safe_open

    path = run_dir / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{run_dir}: holds no finished run (there is no model.safetensors)")
    with safe_open(path, framework="pt") as file:
        config = TrainConfig.from_json(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    heads = _heads(config, *(tensors[f"{side}.centre"].numel() for side in ("x", "y")))
    heads.load_state_dict(tensors)
    return config, heads.eval()


def score(config: TrainConfig, heads: Heads, data: Split, folds: int = 1) -> RetrievalMetrics:
    """Retrieval metrics of a split's embeddings; the products in float32."""
    with torch.inference_mode():
        x, y = heads(*(part.to(config.device) for part in (data.x, data.y)))
        return evaluate(x, y, data.image_of, similarity=_similarity(config.objective()), folds=folds)


class _Run:
    """A run's modules and state."""

    def __init__(self, config: TrainConfig, data: Features, run_dir: Path) -> None:
        self.config, self.run_dir, self.test = config, run_dir, data.test
        self.state = State()
        torch.manual_seed(config.seed)
        self.heads = _heads(config, data.train.x.shape[1], data.train.y.shape[1])
        self.heads.x.centre.copy_(data.train.x.mean(0))
        self.heads.y.centre.copy_(data.train.y.mean(0))
        self.heads.to(config.device)
        self.mean = copy.deepcopy(self.heads).eval()
        self.best = _copied(self.mean)
        self.objective = config.objective().to(config.device)
        self.modules = nn.ModuleDict({"heads": self.heads, "objective": self.objective})
        groups = [
            {"params": list(self.heads.parameters()), "weight_decay": config.weight_decay},
            {"params": list(self.objective.parameters()), "weight_decay": 0.0},  # SigLIP learns its scale and bias
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, fused=True)
        self.train, self.val = (self._scaled(split) for split in (data.train, data.val))
        self.sampler = Sampler(data.train.image_of, config.batch, config.seed)
        self.generator = _generator(self.train.x.device)
        # the first caption of each validation image: s⁺ and s⁻ of the curve
        self.first = torch.from_numpy(np.unique(data.val.image_of.numpy(), return_index=True)[1])

    def _scaled(self, split: Split) -> Split:
        x, y = split.x.to(self.config.device), split.y.to(self.config.device)
        return Split(self.heads.x.scale(x), self.heads.y.scale(y), split.image_of)

    def interval(self) -> Row:
        """The steps up to the next evaluation, and the evaluation; returns its row."""
        config, state = self.config, self.state
        until = min(config.max_steps, (state.step // config.eval_every + 1) * config.eval_every)
        losses = []
        self.heads.train()
        while state.step < until:
            losses.append(self._step())
            state.step += 1
        row = {"step": state.step, "loss": math.fsum(losses) / len(losses), "lr": self._lr(), **self._validate()}
        state.curve.append(row)
        if row["val_rsum"] > state.best_val_rsum:
            state.best_val_rsum, state.best_step, state.stale = row["val_rsum"], state.step, 0
            self.best = _copied(self.mean)
        else:
            state.stale += 1
        if state.stale >= config.patience:
            if state.drops < config.drops:
                state.drops, state.stale = state.drops + 1, 0
                self.heads.load_state_dict(self.best)
                self.mean.load_state_dict(self.best)
            else:
                state.stopped = "plateau"
        if state.step >= config.max_steps and state.stopped is None:
            state.stopped = "max_steps"
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def _lr(self) -> float:
        """The rate of the step at hand."""
        config, state = self.config, self.state
        return config.lr * config.drop**state.drops * min(1.0, (state.step + 1) / max(1, config.warmup))

    def _step(self) -> float:
        config, step = self.config, self.state.step
        self.generator.manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))  # of dropout
        images, captions = (rows.to(config.device) for rows in self.sampler(step))
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        with torch.autocast(self.train.x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            x, y = self.heads.x.embed(self.train.x[images]), self.heads.y.embed(self.train.y[captions])
        loss = self.objective(x, y, ids=images)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), config.clip)
        value = float(loss.item())
        for name, number in (("loss", value), ("norm of the gradient", norm.item())):
            if not math.isfinite(number):
                raise Diverged(
                    f"{config.label}, seed {config.seed}: the {name} is {number} at step {step + 1} "
                    f"(learning rate {self._lr():g}, {self.run_dir})"
                )
        self.optimizer.step()
        keep = min(config.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, weight in zip(self.mean.parameters(), self.heads.parameters(), strict=True):
                mean.lerp_(weight, 1 - keep)
        return value

    def _validate(self) -> Row:
        """RSUM and R@1 on the validation split, and the mean s⁺ and hardest s⁻ of its images and first captions."""
        with torch.inference_mode():
            x, y = self.mean.x.embed(self.val.x), self.mean.y.embed(self.val.y)
            similarity = _similarity(self.objective)
            metrics = evaluate(x, y, self.val.image_of, similarity=similarity)
            stats = goal.gradients(x, y[self.first], T="con", P="con", similarity=similarity)[2]
        return {
            "val_rsum": metrics.rsum,
            "val_i2t_r1": metrics.i2t_r1,
            "val_t2i_r1": metrics.t2i_r1,
            "s_pos": stats.s_pos.mean().item(),
            "s_neg": stats.s_neg.mean().item(),
        }

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
        """Continue from the checkpoint; False without one, or with one that other versions or data have made."""
        from safetensors import safe_open

        path = self.run_dir / "checkpoint.safetensors"
        if not path.is_file() or _read_json(self.run_dir / "versions.json") != versions:
            return False
        _check_owner(self.config, self.run_dir)
        with safe_open(path, framework="pt", device=self.config.device) as file:
            self.state = State(**json.loads(file.metadata()["state"]))
            groups: dict[str, dict[str, Tensor]] = {"model": {}, "mean": {}, "best": {}, "optimizer": {}}
            for name in file.keys():  # noqa: SIM118
                group, _, rest = name.partition(".")
                groups[group][rest] = file.get_tensor(name)
        self.modules.load_state_dict(groups["model"])
        self.mean.load_state_dict(groups["mean"])
        self.best = groups["best"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        return True

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
            "params": {"lr": config.lr} | config.params,
            "seed": config.seed,
            "best_val_rsum": state.best_val_rsum,
            "best_step": state.best_step,
            "steps": state.step,
            "stopped": state.stopped,
            "curve": state.curve,
        }
        if test:
            metrics = score(config, self.mean, self.test)
            names = (*RECALLS, "rsum", "i2t_medr", "t2i_medr")
            record["test"] = {name: getattr(metrics, name) for name in names}
            record["ranks"] = {
                "i2t": metrics.i2t_ranks.tolist(),
                "t2i": metrics.t2i_ranks.tolist(),
                "image_of": self.test.image_of.tolist(),
            }
        content = save(self.best, {"config": config.to_json()})
        write_atomically(self.run_dir / "model.safetensors", content)
        _write_json(self.run_dir / "record.json", record)
        (self.run_dir / "checkpoint.safetensors").unlink(missing_ok=True)
        return record


def _heads(config: TrainConfig, d_x: int, d_y: int) -> Heads:
    unit = _similarity(config.objective()) != "order"
    return Heads(d_x, d_y, hidden=config.hidden, dim=config.dim, dropout=config.dropout, unit=unit)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _generator(device: torch.device) -> torch.Generator:
    """Where dropout takes its random numbers from; `torch.manual_seed` does far more than is needed at each step."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _similarity(objective: nn.Module) -> str:
    return objective.settings.similarity.name if isinstance(objective, goal.Objective) else "dot"


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
