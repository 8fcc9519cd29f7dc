"""T × P inside VSE++, VSE∞ and RVSE++: does what a system is trained with, beside its model, matter?

    goal data build emoji-grid                       # once, see docs/data.md
    python -m benchmarks.experiments.systems         # 5 seeds, 255 runs; an hour and a half on two cores
    python -m benchmarks.experiments.systems --seeds 2 --models vse++

Every cell of the grid, and the recipes that the three were published with. Captions are words, images of VSE∞ and
RVSE++ a 7 × 7 map of regions. Models are narrower and runs shorter than published (`SETTINGS`, `EPOCHS`); the rest is
each system's own: VSE∞ begins with an epoch of all negatives. Each system is a `goal.training.Sweep` in a folder of its
own; killed and started again, it continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu import commit
from goal.training import Incomplete, Sweep

MODELS = ("vse++", "vse-infinity", "rvse++")
SETTINGS: dict[str, Any] = {"dim": 128, "word_dim": 64, "batch": 64, "lr": 1e-3}
EPOCHS = {"vse++": 16, "vse-infinity": 4, "rvse++": 4}  # a step on regions takes five times as long
OBJECTIVES = [f"{T}:{P}" for T in ("con", "nca", "cir") for P in ("con", "lin", "sig", "lin-ms", "sig-ms")]
OBJECTIVES += ["vse++", "t-selhn"]


def sweep(model: str, options: argparse.Namespace) -> Sweep:
    """The runs of one system."""
    epochs = options.epochs or EPOCHS[model]
    return Sweep(
        model=model,
        data=str(options.data),
        objectives=options.objectives,
        seeds=options.seeds,
        root=options.folder,
        name=model,
        workers=options.workers,
        limit=options.limit,
        epochs=epochs,
        drop_epoch=max(1, epochs * 4 // 5),
        **SETTINGS,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not there yet, and print each system's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("emoji-grid"), help="a folder with regions and captions")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, metavar="T:P")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="of all three; the rate drops for the last fifth")
    parser.add_argument("--limit", type=int, help="train on the first images only")
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")
    parser.add_argument("--folder", type=Path, default=Path("runs/systems"))
    options = parser.parse_args(argv)
    command = " ".join(["python -m benchmarks.experiments.systems", *(sys.argv[1:] if argv is None else argv)])
    failed = 0
    for model in options.models:
        runs = sweep(model, options)
        try:
            runs.run(f"{command}, commit {commit()}")
        except Incomplete as error:
            print(error, file=sys.stderr)
            failed = 1
        if (runs.folder / "table.md").exists():
            print((runs.folder / "table.md").read_text())
    return failed


if __name__ == "__main__":
    sys.exit(main())
