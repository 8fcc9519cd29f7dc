"""Two-stage curriculum against single stages on audio-visual retrieval with class labels, MAP@all.

    goal data build tuxpaint                         # once, see docs/data.md
    python -m benchmarks.experiments.curriculum      # 10 seeds, 70 runs; half an hour on two cores
    python -m benchmarks.experiments.curriculum --data path/to/ave --seeds 5

The hinge of the triplet loss, margin 0.2, over semi-hard, hardest, selected or all negatives from the beginning; or
semi-hard ones for 500 steps, and then the hardest: of the batch (plain), or also among rows that are interpolated
within a class or mixed between classes. A random order is beside them. Items of one class are no negatives of each
other. Each is compared with semi-hard alone by paired differences over seeds.

Source of the claim: Zeng & Ikeda, "Two-Stage Triplet Loss Training with Curriculum Augmentation for Audio-Visual
Retrieval", 2023.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import goal
from benchmarks.experiments.runs import Record, mean_and_deviation, sign_flip, trained
from benchmarks.report import command, commit, markdown
from goal import plotting
from goal.data.files import write_atomically
from goal.training import TrainConfig

SINGLE = ("semi-hard", "hardest", "all", "selective")
TWO_STAGES = ("plain", "interpolate", "mixup")
SWITCH = "20"  # evaluations, of 25 steps each
SETTINGS: dict[str, Any] = {"hidden": 512, "dim": 128, "eval_every": 25, "patience": 8, "max_steps": 3000}


def configs(options: argparse.Namespace) -> dict[str, TrainConfig]:
    """Every way of training, by what the table calls it."""
    common = {"model": "audio-visual", "data": str(options.data), "limit": options.limit, **SETTINGS}
    if options.max_steps is not None:
        common["max_steps"] = options.max_steps
    ways = {mining: TrainConfig(mining=mining, **common) for mining in SINGLE}
    return ways | {f"semi-hard, then {way}": TrainConfig(curriculum=way, switch=SWITCH, **common) for way in TWO_STAGES}


def random_order(labels: NDArray[np.int64], seeds: int) -> list[float]:
    """MAP@all of embeddings that know nothing, once for each seed."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(len(labels), 16, generator=generator) for _ in range(2))
        found.append(goal.map_at_all(x, y, labels, labels).mean)
    return found


def table(records: dict[str, list[Record]], chance: Sequence[float]) -> str:
    """Markdown: MAP@all of each way, the steps it took, and how it differs from the first."""
    heads = ["training", "MAP@all", "x→y", "y→x", "best step", "to semi-hard", "p"]
    lines = []
    base = [run["test"]["mean"] for run in next(iter(records.values()))]
    for way, runs in records.items():
        means = [run["test"]["mean"] for run in runs]
        gained = [mean - other for mean, other in zip(means, base, strict=True)]
        cells = [way, *(mean_and_deviation([run["test"][name] for run in runs]) for name in ("mean", "x2y", "y2x"))]
        cells += [f"{np.mean([run['best_step'] for run in runs]):.0f}"]
        cells += ["", ""] if means == base else [f"{np.mean(gained):+.1f}", f"{sign_flip(gained):.2g}"]
        lines.append(cells)
    return markdown(heads, [*lines, ["random order", mean_and_deviation(chance), *[""] * 5]])


def draw(records: dict[str, list[Record]], path: Path) -> None:
    """Validation MAP@all against steps, the mean over those seeds that are still training."""
    figure = plotting.figure(8, 4.5)
    axes = figure.subplots()
    for place, (way, runs) in enumerate(records.items()):
        curves = [{row["step"]: row["val_map"] for row in run["curve"]} for run in runs]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [np.mean([curve[step] for curve in curves]) for step in steps]
        colour, dash = plotting.COLOURS[place % len(plotting.COLOURS)], plotting.DASHES[place >= len(SINGLE)]
        axes.plot(steps, values, label=way, color=colour, linestyle=dash, linewidth=1.6)
    axes.set_xlabel("step (as far as every seed went)")
    axes.set_ylabel("validation MAP@all, %")
    axes.legend(fontsize=8.5)
    axes.grid(color="#EEEEEE")
    axes.spines[["top", "right"]].set_visible(False)
    plotting.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not there yet, print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("tuxpaint"), help="a folder of labelled clips")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--limit", type=int, help="train on the first clips only")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")
    parser.add_argument("--folder", type=Path, default=Path("runs/curriculum"))
    options = parser.parse_args(argv)
    asked = configs(options)
    found = trained(list(asked.values()), options.seeds, options.folder / "runs", options.workers)
    records = dict(zip(asked, found, strict=True))
    told = table(records, random_order(goal.data.clips(options.data, "test").labels, options.seeds))
    line = command("benchmarks.experiments.curriculum", argv)
    setting = next(iter(asked.values())).setting
    text = f"{told}\n\n*{options.data}, {setting}, {options.seeds} seeds, to a plateau; p of paired differences by "
    text += f"sign flips; commit {commit()}, command {line}*\n"
    print(text)
    write_atomically(options.folder / "table.md", text.encode())
    lines = (json.dumps({"way": way, **run}) + "\n" for way, runs in records.items() for run in runs)
    write_atomically(options.folder / "runs.jsonl", "".join(lines).encode())
    draw(records, options.folder / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
