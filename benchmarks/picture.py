"""The picture of docs/scaling.md: kept measurements of the cached step, and the model of many GPUs.

Left, megabytes that a step needs beyond its inputs, against pairs, of the newest `cached-*.json` under
benchmarks/results/; right, megabytes that a GPU sends in a step, against GPUs, as `model` prints them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import cached, network
from benchmarks.report import RESULTS
from goal import plotting

GPUS = [2**k for k in range(1, 13)]
ROWS, D = 1024, 1024  # pairs a GPU, of bfloat16 embeddings


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels, both axes logarithmic."""
    figure = plotting.figure(10, 4)
    left, right = figure.subplots(1, 2)
    for place, way in enumerate(cached.WAYS):
        its = [row for row in rows if row["way"] == way]
        style = {"color": plotting.COLOURS[place], "linestyle": plotting.DASHES[place], "marker": "o", "markersize": 4}
        left.plot([row["n"] for row in its], [row["mb"] for row in its], label=way, **style)
    left.set(xlabel="pairs in a batch", ylabel="MB beyond the inputs", title="a step on one device, measured")
    sizes = [network.schemes(ranks, ROWS, D, torch.bfloat16, "sig-ms", "hardest") for ranks in GPUS]
    for place, schemes in enumerate(zip(*sizes, strict=True)):
        style = {"color": plotting.COLOURS[place], "linestyle": plotting.DASHES[place]}
        right.plot(GPUS, [scheme.sent / 1e6 for scheme in schemes], label=schemes[0].name, **style)
    right.set(xlabel="GPUs", ylabel="MB sent by each in a step", title=f"{ROWS} pairs a GPU, D = {D}, counted")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=8.5)
        axes.grid(color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)
    plotting.save(figure, path)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("scaling.png"), help="file to write: .png, .svg or .pdf")


def main(options: argparse.Namespace) -> None:
    newest = max(RESULTS.glob("cached-*.json"))
    draw(json.loads(newest.read_text())["rows"], options.out)
    print(f"{options.out}, of {newest.name} and the model")
