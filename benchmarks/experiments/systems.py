"""T × P inside VSE++, VSE∞ and RVSE++: does what a system is trained with, beside its model, matter?

    goal data build emoji-grid                       # once, see docs/data.md
    python -m benchmarks.experiments.systems         # 5 seeds, 255 runs; an hour and a half on two cores
    python -m benchmarks.experiments.systems --seeds 2 --models vse++

Every cell of the grid, and the recipes that the three were published with. Captions are words, images of VSE∞ and
RVSE++ a 7 × 7 map of regions, whose 1280 features are reduced to the first principal components of the training split:
a step then takes half the time, and runs can be long enough to leave the crowding at their beginning. Models are
narrower and runs shorter than published (`SETTINGS`, `EPOCHS`); the rest is each system's own: VSE∞ begins with an
epoch of all negatives. Each system is a `goal.training.Sweep` in a folder of its own; killed and started again, it
continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import command, commit
from goal.data.files import save_atomically
from goal.training import Incomplete, Sweep

MODELS = ("vse++", "vse-infinity", "rvse++")
SETTINGS: dict[str, Any] = {"dim": 64, "word_dim": 64, "batch": 64, "lr": 1e-3}
COMPONENTS = 128
EPOCHS = {"vse++": 16, "vse-infinity": 7, "rvse++": 7}  # a step on regions takes seven times as long
OBJECTIVES = [f"{T}:{P}" for T in ("con", "nca", "cir") for P in ("con", "lin", "sig", "lin-ms", "sig-ms")]
OBJECTIVES += ["vse++", "t-selhn"]


def reduced(data: Path, folder: Path) -> Path:
    """The data with regions as principal components of the training split's, in a folder of their own."""
    out = folder / f"{data.name}-{COMPONENTS}"
    if (out / "test_ims.npy").exists():  # written last
        return out
    out.mkdir(parents=True, exist_ok=True)
    splits = {split: np.load(data / f"{split}_ims.npy", mmap_mode="r") for split in ("train", "val", "test")}
    width = splits["train"].shape[2]
    mean, square = np.zeros(width), np.zeros((width, width))
    for image in splits["train"]:
        rows = image.astype(np.float64)
        mean += rows.sum(0)
        square += rows.T @ rows
    count, kept = splits["train"].shape[0] * splits["train"].shape[1], min(COMPONENTS, width)
    mean /= count
    values, vectors = np.linalg.eigh(square / count - np.outer(mean, mean))  # ascending
    held = values[-kept:].sum() / values.sum()
    print(f"{kept} of {width} principal components hold {100 * held:.1f} % of the variance")
    axes = vectors[:, -kept:] / np.sqrt(values[-kept:].mean())
    for split, images in splits.items():
        (out / f"{split}_caps.txt").write_bytes((data / f"{split}_caps.txt").read_bytes())
        parts = np.stack([((image - mean) @ axes).astype(np.float32) for image in images])
        save_atomically(out / f"{split}_ims.npy", parts)
    return out


def sweep(model: str, data: Path, options: argparse.Namespace) -> Sweep:
    """The runs of one system."""
    epochs = options.epochs or EPOCHS[model]
    return Sweep(
        model=model,
        data=str(data),
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
    line = command("benchmarks.experiments.systems", argv)
    failed, data = 0, reduced(options.data, options.folder)
    for model in options.models:
        runs = sweep(model, data, options)
        try:
            runs.run(f"{line}, commit {commit()}")
        except Incomplete as error:
            print(error, file=sys.stderr)
            failed = 1
        if (runs.folder / "table.md").exists():
            print((runs.folder / "table.md").read_text())
    return failed


if __name__ == "__main__":
    sys.exit(main())
