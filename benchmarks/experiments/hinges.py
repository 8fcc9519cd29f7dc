"""Sum against max of hinges, on cosines and on order embeddings: VSE0, VSE++, Order0, Order++.

    python -m benchmarks.experiments.hinges          # 5 seeds, 40 runs; half an hour on two cores
    python -m benchmarks.experiments.hinges --seeds 2 --epochs 1 --limit 300

Each as its release trains it, but narrower and for fewer epochs (`SETTINGS`): captions are words, images one vector.
The claim of VSE++ is that the max beats the sum, on order embeddings as well. Everything is trained at its release's
learning rate and at three times that, since the runs are short.

Source: Faghri et al., "VSE++", BMVC 2018, tables 1 and 3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import trained
from benchmarks.report import command, commit
from goal.training import TrainConfig
from goal.training.report import write_report

SETTINGS: dict[str, Any] = {"dim": 256, "word_dim": 128, "batch": 64}
SYSTEMS = {"vse0": ("vse++", 2e-4), "vse++": ("vse++", 2e-4), "order0": ("order0", 1e-3), "order++": ("order++", 2e-4)}
FASTER = 3.0


def configs(options: argparse.Namespace, faster: float) -> list[TrainConfig]:
    """The four objectives, at `faster` times their release's learning rate."""
    length = {"epochs": options.epochs, "drop_epoch": max(1, options.epochs * 2 // 3), "limit": options.limit}
    return [
        TrainConfig(model=model, objective=f"{recipe}(margin={0.05 if recipe == 'order0' else 0.2})",
                    data=str(options.data), lr=lr * faster, **SETTINGS, **length)
        for recipe, (model, lr) in SYSTEMS.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("emoji"), help="images and captions as texts")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12, help="the rate drops after two thirds of them")
    parser.add_argument("--limit", type=int, help="train on the first images only")
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")
    parser.add_argument("--folder", type=Path, default=Path("runs/hinges"))
    options = parser.parse_args(argv)
    line = command("benchmarks.experiments.hinges", argv)
    for name, faster in (("released", 1.0), ("faster", FASTER)):
        asked = configs(options, faster)
        records = trained(asked, options.seeds, options.folder / "runs", options.workers)
        out = options.folder / name
        rates = ", ".join(f"{config.objective.spec.names} {config.optimiser.lr:g}" for config in asked)
        note = f"{asked[0].setting.split(' at ')[0]}, {options.epochs} epochs; learning rates {rates}. "
        note += f"Command: {line}, commit {commit()}"
        title = f"{options.data}, {name} rates, mean ± standard deviation over {options.seeds} seeds"
        every: list[Any] = [record for group in records for record in group]
        write_report(every, out, title=title, note=note)
        print((out / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
