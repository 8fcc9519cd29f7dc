"""Hardest against selectively hard negatives from a cold, deep start: when does Recall@1 leave chance?

    python -m benchmarks.experiments.cold_start            # 5 seeds; some minutes on two cores
    python -m benchmarks.experiments.cold_start --steps 200 --seeds 2 --depths 4

Frozen features of `emoji` go through two ReLU networks of equal depth, one for each modality, as PyTorch initialises
them: the deeper they are, the nearer all embeddings begin to each other. Nothing warms up. Each run is one line in the
folder's runs.jsonl; killed and started again, it continues. The line ends with what was learned on the validation
split, which is all that is looked at.

Source of the claim: Li et al., "Selectively hard negative mining for alleviating gradient vanishing in image-text
matching" (T-SelHN): with hardest negatives gradients vanish where s⁺ ≈ s⁻, and training does not start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
from benchmarks.report import command, commit, markdown, show
from goal.data.files import write_atomically
from goal.training.features import Sampler, Split, split

WIDTH, BATCH, LR, CLIP = 256, 128, 5e-4, 2.0
LEFT = 5.0  # Recall@1 has left chance when it is this many times chance
MININGS = {
    "hardest": goal.mining.hardest(),
    "selective, ε = 0.001": goal.mining.selective(eps=0.001),
    "selective, ε = 0.01": goal.mining.selective(eps=0.01),
    "all": goal.mining.all_negatives(),
}


class Run(NamedTuple):
    """What decides a run."""

    mining: str
    depth: int
    seed: int
    steps: int


def network(d_in: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with ReLU between them, initialised as PyTorch does."""
    widths = [d_in, *[WIDTH] * depth]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(run: Run, training: Split, validation: Split, every: int = 20) -> dict[str, Any]:
    """One run: when validation Recall@1 left chance (None: never), its end, and the share of vanished anchors."""
    torch.manual_seed(run.seed)
    nets = network(training.x.shape[1], run.depth), network(training.y.shape[1], run.depth)
    optimizer = torch.optim.Adam([*nets[0].parameters(), *nets[1].parameters()], lr=LR)
    objective = goal.Objective(T=goal.T.con(margin=0.2), P="con", mining=MININGS[run.mining], reduction="sum")
    sampler = Sampler(training.image_of, BATCH, run.seed)
    chance, left, vanished = 1 / len(validation.x), None, []
    recall = 0.0
    for step in range(run.steps):
        batch = sampler(step)
        x, y = (
            normalize(net(rows), dim=1)
            for net, rows in zip(nets, (training.x[batch.images], training.y[batch.captions]), strict=True)
        )
        optimizer.zero_grad()
        objective(x, y).backward()
        nn.utils.clip_grad_norm_([*nets[0].parameters(), *nets[1].parameters()], CLIP)
        optimizer.step()
        if step % every == 0 or step == run.steps - 1:
            seen = objective.stats
            vanished.append(float(((seen.s_pos - seen.s_neg).abs() < 0.01).float().mean()))
            recall = _recall(nets, validation)
            if left is None and recall >= LEFT * chance:
                left = step
    return {**run._asdict(), "left_chance": left, "recall": recall, "chance": chance, "vanished": vanished}


@torch.no_grad()
def _recall(nets: tuple[nn.Module, nn.Module], part: Split) -> float:
    """Recall@1, the mean of both directions, in [0, 1]."""
    found = goal.evaluate(*_embedded(nets, part), part.image_of)
    return (found.i2t_r1 + found.t2i_r1) / 200


def _embedded(nets: tuple[nn.Module, nn.Module], part: Split) -> tuple[Tensor, Tensor]:
    return normalize(nets[0](part.x), dim=1), normalize(nets[1](part.y), dim=1)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: when Recall@1 left chance, which anchors had vanished at first and halfway, Recall@1 at the end."""

    def pm(values: Sequence[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3g}{spread}"

    heads = ["layers", "mining", "left chance", "after steps", "vanished at first, %", "halfway, %"]
    heads += ["R@1 at the end, %"]
    lines = []

    def key(record: dict[str, Any]) -> tuple[int, int]:
        return record["depth"], list(MININGS).index(record["mining"])

    for (depth, _), group in itertools.groupby(sorted(records, key=key), key):
        runs = list(group)
        left = [run["left_chance"] for run in runs if run["left_chance"] is not None]
        halves = [run["vanished"][len(run["vanished"]) // 2] for run in runs]
        lines.append([
            depth, runs[0]["mining"], f"{len(left)} of {len(runs)}", pm(left) if left else "–",
            pm([100 * run["vanished"][0] for run in runs]), pm([100 * half for half in halves]),
            pm([100 * run["recall"] for run in runs]),
        ])  # fmt: skip
    return markdown(heads, lines)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that were written whole."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path("runs/cold-start"))
    options = parser.parse_args(argv)
    training, validation = (split(goal.data.load("emoji", name)) for name in ("train", "val"))
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "runs.jsonl"
    asked = [
        Run(mining, depth, seed, options.steps)
        for seed in range(options.seeds) for depth in options.depths for mining in MININGS
    ]  # fmt: skip
    done = {Run(*(record[name] for name in Run._fields)): record for record in read(path)}
    for number, run in enumerate(asked):
        if run not in done:
            show(f"[{number + 1}/{len(asked)}] {run.mining}, {run.depth} layers, seed {run.seed}")
            done[run] = train(run, training, validation)
            lines = "".join(json.dumps(record) + "\n" for record in done.values())
            write_atomically(path, lines.encode())
    show("")
    print(table([done[run] for run in asked]))
    line = command("benchmarks.experiments.cold_start", argv)
    settings = f"{WIDTH} wide, batch {BATCH}, Adam {LR:g}, clip {CLIP:g}, con(0.2) × con, sum; {options.steps} steps"
    print(f"\n*emoji, {settings}; chance {100 / len(validation.x):.2g} %; commit {commit()}, command {line}*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
