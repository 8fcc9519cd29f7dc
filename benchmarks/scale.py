"""The figures of docs/scaling.md: past one machine and past one memory, what it costs, measured or modelled.

    python -m benchmarks.scale                                     # all, as below
    python -m benchmarks.scale ranks                               # ranks 1 to 4 on this machine, Gloo; minutes
    python -m benchmarks.scale cached                              # steps of 10³ … 10⁵ pairs; a few minutes
    python -m benchmarks.scale mine                                # 10⁴ × 10⁶ from files, beside faiss; minutes
    python -m benchmarks.scale mine --candidates 10000000 --save   # a slice of 10⁷ × 10⁷, kept as JSON
    python -m benchmarks.scale model                               # 8 to 4096 GPUs, expected; at once
    python -m benchmarks.scale draw --out docs/img/scaling.png     # what is kept of `cached`, and the model

What is measured is checked: gradients of ranks and of the cached step, before, against those of one process and of the
plain step; what was mined, after, against a float64 search. `model` measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from benchmarks import cached, network, offline, picture, ranks

PARTS: dict[str, ModuleType] = {"ranks": ranks, "cached": cached, "mine": offline, "model": network, "draw": picture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        part.arguments(
            parts.add_parser(name, description=part.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        )
    if sys.argv[1:]:
        options = parser.parse_args()
        PARTS[options.part].main(options)
        return
    for name, part in PARTS.items():
        print(f"\n## {name}\n")
        part.main(parser.parse_args([name]))


if __name__ == "__main__":
    main()
