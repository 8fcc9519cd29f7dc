"""The records of an experiment's runs as one file of JSON lines, to be kept: configuration, test, curve, versions.

python -m benchmarks.experiments.collect runs/hinges benchmarks/results/hinges.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import commit
from goal.data.files import write_atomically


def line(run: Path) -> dict[str, Any]:
    """One run without its ranks, the curve by columns, to four digits."""
    record, config, versions = (
        json.loads((run / f"{name}.json").read_text()) for name in ("record", "config", "versions")
    )
    names = [name for name in record["curve"][0] if name != "lr"]
    curve = {name: [float(f"{row[name]:.4g}") for row in record["curve"]] for name in names}
    kept = {name: value for name, value in record.items() if name not in ("ranks", "curve", "params")}
    return {**kept, "curve": curve, "config": config, "versions": versions}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are, at any depth")
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", default=commit(), help="with which they were trained")
    options = parser.parse_args(argv)
    runs = sorted(path.parent for path in options.folder.rglob("record.json"))
    lines = [json.dumps({"commit": options.commit, **line(run)}, ensure_ascii=False) + "\n" for run in runs]
    write_atomically(options.out, "".join(lines).encode())
    print(f"{len(lines)} runs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
