"""The systems at the size of Flickr30K, on files of its shape: what loading takes, memory, and the time of a step.

    python -m benchmarks.full_size                              # VSE∞, 29,000 × 36 × 2048; some minutes on two cores
    python -m benchmarks.full_size --model rvse++ --steps 5
    python -m benchmarks.full_size --images 113287              # COCO's training split

The features are a sparse file: it has the size of the real one and takes no place on the disk, and reads as zeros,
which take as long to compute with as anything else. Captions are words drawn by Zipf's law. Everything else is what
`goal train --model … --data …` does with the published settings, stopped after a few steps: read, checked for NaN,
trained, validated and tested. Memory is what the process holds beside the file's pages, which the system may drop.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.process import resident
from benchmarks.report import command, commit, markdown, show
from goal.training import TrainConfig, train

CAPTIONS, WORDS, LENGTH = 5, 8000, 12  # of an image; different ones; of a caption


def write(folder: Path, split: str, images: int, regions: int, features: int) -> None:
    """A split in the layout of the releases; its features are a hole as large as they would be."""
    shape = (images, regions, features)
    np.lib.format.open_memmap(folder / f"{split}_ims.npy", mode="w+", dtype=np.float32, shape=shape)
    words = np.random.default_rng(0).zipf(1.3, (images * CAPTIONS, LENGTH)) % WORDS
    (folder / f"{split}_caps.txt").write_text("\n".join(" ".join(f"w{word}" for word in row) for row in words) + "\n")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of a few steps: seconds and GB."""
    config = TrainConfig(
        model=options.model, data=str(folder), max_steps=options.steps, threads=options.threads, device=options.device
    )
    ends: list[float] = []
    held = [resident("RssAnon")]  # of the process itself: no pages of files

    def stepped(*_: Any) -> None:
        ends.append(time.perf_counter())
        held.append(resident("RssAnon"))
        show(f"step {len(ends)} of {options.steps}")

    hook = register_optimizer_step_post_hook(stepped)
    begun = time.perf_counter()
    try:
        train(config, folder / "run")
    finally:
        hook.remove()
    steps = np.diff(ends)
    return {
        "model": options.model,
        "file GB": options.images * options.regions * options.features * 4 / 1e9,
        "held GB": (max(held) - held[0]) * 2**20 / 1e9,
        "to the first step s": ends[0] - begun,
        "step s": float(np.median(steps)) if len(steps) else float("nan"),
        "validation and test s": time.perf_counter() - ends[-1],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, train a few steps, print a line of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vse-infinity", choices=["vse-infinity", "rvse++", "scan", "vse++"])
    parser.add_argument("--images", type=int, default=29000, help="of the training split")
    parser.add_argument("--held-out", type=int, default=1000, help="images of the validation and of the test split")
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        for split, images in (("train", options.images), ("val", options.held_out), ("test", options.held_out)):
            show(f"writing {split}")
            write(Path(name), split, images, options.regions, options.features)
        found = measure(options, Path(name))
    show("")
    print(markdown(list(found), [list(found.values())]))
    line = command("benchmarks.full_size", argv)
    setting = f"{options.images} training images, {options.threads} threads, {options.device}"
    print(f"\n*{setting}; commit {commit()}, {line}*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
