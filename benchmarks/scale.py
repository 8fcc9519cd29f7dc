"""Past one machine and past one memory: what it costs, measured or modelled.

    python -m benchmarks.scale ranks --save      # ranks 1 to 4 on this machine, Gloo: time, bytes, memory; minutes
    python -m benchmarks.scale model             # 8 to 4096 GPUs: bytes and expected time by scheme; at once

`ranks` checks before it measures: each rank's gradient against that of one process. `model` measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks import network, ranks

PARTS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "ranks": (ranks.arguments, ranks.main),
    "model": (network.arguments, network.main),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, (arguments, _) in PARTS.items():
        arguments(parts.add_parser(name))
    options = parser.parse_args()
    PARTS[options.part][1](options)


if __name__ == "__main__":
    main()
