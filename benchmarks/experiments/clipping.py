"""Sum or mean over the batch, under a clip of the gradient's norm: the same objective, and not the same training.

    python -m benchmarks.experiments.clipping        # 5 seeds, 45 runs; ten minutes on two cores

Adam does not see the scale of a gradient, a clip does. The norm of a sum of hinges is above the published clip of 2 at
every step, so it is normalised: steps keep their size while the gradients of hardest negatives vanish. The norm of the
mean is below, and Adam's running mean of squares holds the steps small for a thousand steps after gradients have
fallen. VSE++ on the captions of emoji, in three ways: the sum with clip 2, the mean with clip 2, and the mean with
2 / batch, which is the sum again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import mean_and_deviation, trained
from benchmarks.report import command, commit, markdown
from goal.training import TrainConfig

BATCH, CLIP = 64, 2.0
SETTINGS: dict[str, Any] = {"model": "vse++", "dim": 128, "word_dim": 64, "batch": BATCH, "lr": 1e-3}
OBJECTIVES = ("con(margin=0.2) × con", "cir × con", "cir × sig-ms")
WAYS = (("sum", CLIP), ("mean", CLIP), ("mean", CLIP / BATCH))


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="emoji", help="images and captions as texts")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=16, help="the rate drops for the last fifth")
    parser.add_argument("--limit", type=int, help="train on the first images only")
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")
    parser.add_argument("--folder", type=Path, default=Path("runs/clipping"))
    options = parser.parse_args(argv)
    configs = [
        TrainConfig(objective=objective, reduction=reduction, clip=clip,
                    data=options.data, limit=options.limit, epochs=options.epochs,
                    drop_epoch=max(1, options.epochs * 4 // 5), **SETTINGS)
        for objective in OBJECTIVES for reduction, clip in WAYS
    ]  # fmt: skip
    groups = trained(configs, options.seeds, options.folder, options.workers)
    heads = ["objective", "over the batch", "clip", "RSUM", "i→t R@1", "t→i R@1", "s⁺ / s⁻ halfway", "at the end"]
    rows = []
    ways = [reduction for _ in OBJECTIVES for reduction, _ in WAYS]
    for config, reduction, runs in zip(configs, ways, groups, strict=True):
        cells = [config.objective.spec.names, reduction, f"{config.optimiser.clip:.3g}"]
        cells += [mean_and_deviation([run["test"][name] for run in runs]) for name in ("rsum", "i2t_r1", "t2i_r1")]
        for place in (options.epochs // 2, options.epochs - 1):
            means = (sum(run["curve"][place][name] for run in runs) / len(runs) for name in ("s_pos", "s_neg"))
            cells.append(" / ".join(f"{mean:.2f}" for mean in means))
        rows.append(cells)
    print(markdown(heads, rows))
    line = command("benchmarks.experiments.clipping", argv)
    print(f"\n*{options.data}, {configs[0].setting}, {options.seeds} seeds; commit {commit()}, command {line}*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
