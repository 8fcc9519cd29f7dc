"""benchmarks.scale, on sizes on which its parts are only seen to measure what they say; and what benchmarks share."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forking

from benchmarks import cached, offline, picture, process, ranks, report, scale

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {
    "ranks": "| ranks | pairs | what | ms | MB sent a rank | MB over loopback | MB beyond own rows |",
    "cached": "| pairs | step | s | processor s | × plain | peak MB | kB a pair |",
    "mine": "| x × y | who | s | processor s | processor ns an entry of S | peak MB | recall |",
    "model": "| GPUs | pairs | scheme | MB sent a rank | TFLOP a rank | ms | MB held |",
}
TINY = {
    "ranks": ["--ranks", "2", "--pairs", "64", "--rounds", "1"],
    "cached": ["--sizes", "100"],
    "mine": ["--queries", "200", "--candidates", "500", "--who", "goal"],
    "model": ["--gpus", "8"],
}
ROWS = {"ranks": 5, "cached": 3, "mine": 1, "model": 4}
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's own account of it")


def quick(patch: pytest.MonkeyPatch) -> None:
    """Of three processes that measure a step one is left, and ranks begin with everything imported."""

    def apart(module: str, n: int, way: str) -> Any:
        return process.apart(module, n, way) if way == "cached" else cached.step(n, way)

    patch.setattr(cached, "apart", apart)
    method = forking().get_start_method()
    patch.setattr(
        ranks.processes, "spawn", functools.partial(torch.multiprocessing.start_processes, start_method=method)
    )


@linux
@pytest.mark.parametrize("part", TINY)
def test_a_part_prints_its_table(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)  # where `python -m benchmarks.…` is found
    quick(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["scale", part, *TINY[part]])
    scale.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == HEADS[part]
    assert [line.count("|") for line in lines].count(HEADS[part].count("|")) == 2 + ROWS[part]
    if part != "model":
        assert f"command python -m benchmarks.scale {part} {' '.join(TINY[part])}, " in lines[-1]


@linux
@pytest.mark.parametrize(("part", "name"), [("cached", "cached-{}.json"), ("mine", "mine-{}-200x500.json")])
def test_rows_are_kept(part: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {"seconds": 2.0, "processor_seconds": 4.0, "mb": 1.0, "recall": 1.0}
    module = scale.PARTS[part]
    monkeypatch.setattr(module, "measure", lambda *_: [{"n": 100, "m": 500, "way": "plain", "who": "goal", **found}])
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["scale", part, *TINY[part], "--save"])
    scale.main()
    (path,) = (tmp_path / "results").iterdir()
    kept = json.loads(path.read_text())
    assert path.name == name.format(kept["date"])
    assert list(kept) == ["date", "commit", "torch", "python", "processor", "threads", "command", "rows"]
    assert kept["rows"][0]["processor_seconds"] == 4.0


def test_without_a_part_all_run_with_their_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {}
    for name, module in scale.PARTS.items():
        monkeypatch.setattr(module, "main", lambda options, name=name: asked.update({name: options}))
    monkeypatch.setattr(sys, "argv", ["scale"])
    scale.main()
    assert list(asked) == ["ranks", "cached", "mine", "model", "draw"]
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [f"## {name}" for name in asked]
    assert asked["ranks"].ranks == [1, 2, 3, 4]
    assert asked["mine"].candidates == 1_000_000
    assert not hasattr(asked["model"], "save")


@pytest.mark.parametrize("installed", [True, False])
def test_faiss_is_left_out_where_it_is_not_installed(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "faiss" or installed or None)
    monkeypatch.setattr(offline, "measure", lambda n, m, who, where: asked.append(who) or [])
    monkeypatch.setattr(sys, "argv", ["scale", "mine"])
    scale.main()
    assert asked == [["goal", "faiss"] if installed else ["goal"]]
    assert ("pip install faiss-cpu" in capsys.readouterr().err) != installed


def test_the_picture_is_of_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = []
    monkeypatch.setattr(picture, "draw", lambda rows, path: drawn.append((rows, path)))
    monkeypatch.setattr(sys, "argv", ["scale", "draw", "--out", str(tmp_path / "a.svg")])
    scale.main()
    newest = max(report.RESULTS.glob("cached-*.json"))
    assert drawn == [(json.loads(newest.read_text())["rows"], tmp_path / "a.svg")]
    monkeypatch.undo()
    picture.draw(drawn[0][0], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<!-- ") >= 2
    assert all(f"<!-- {name} -->" in text for name in [*cached.WAYS, "all-gather + grad", "ring"])


def test_options_belong_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for part, option in (("cached", "--who"), ("mine", "--sizes"), ("model", "--save"), ("ranks", "--gpus")):
        monkeypatch.setattr(sys, "argv", ["scale", part, option, "1"])
        with pytest.raises(SystemExit):
            scale.main()


def test_tables_of_kept_results_are_read() -> None:
    """Files of earlier runs have the rows that tables are made of."""
    for pattern, module in (("cached-*", cached), ("mine-*", offline), ("ranks-*", ranks)):
        paths = list(report.RESULTS.glob(pattern))
        assert paths
        for path in paths:
            rows = json.loads(path.read_text())["rows"]
            assert len(module.table(rows).splitlines()) == 2 + len(rows)


# ---- what benchmarks share -------------------------------------------------------------------------------


def test_a_table_has_numbers_of_three_figures_and_nothing_for_none() -> None:
    assert report.markdown(["N", "ms", ""], [[32, 0.12345, None], ["all", float("nan"), 1234.5]]).splitlines() == [
        "| N | ms |  |",
        "|---|---|---|",
        "| 32 | 0.123 |  |",
        "| all | nan | 1.23e+03 |",
    ]


def test_a_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu", "--rounds", "1"])
    assert report.command("benchmarks.cpu") == "python -m benchmarks.cpu --rounds 1"
    assert report.command("benchmarks.cpu", []) == "python -m benchmarks.cpu"


def test_conditions_have_the_command_last() -> None:
    found = report.conditions("benchmarks.gpu", ["--save"], device="none")
    assert list(found) == ["date", "commit", "torch", "python", "device", "command"]
    assert report.facts({"a": 1, "b": "c"}) == "a 1, b c"


@linux
def test_memory_is_that_of_the_call() -> None:
    """In a fresh process, as all measurements: of an old one the system may take back pages meanwhile."""
    script = "import json; from benchmarks.process import measured; held = []; "
    script += "print(json.dumps(measured(lambda: held.append(bytearray(b'1') * (64 << 20)))))"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, cwd=root)
    found = json.loads(run.stdout)
    assert 60 < found["mb"] < 80
    assert found["seconds"] > 0
    assert process.resident("VmRSS") > 0
