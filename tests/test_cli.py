"""The command `goal` as a user runs it: in processes of their own, killed and interrupted, with output to a pipe.

What can be seen as well without a process, which would first import PyTorch, is made in this one.
"""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from processes import inline

import goal
from goal import cli
from goal.training import sweep

SLICE = ["--limit", "120", "--batch", "40", "--hidden", "16", "--dim", "8", "--eval-every", "5"]
SWEEP = [
    "sweep",
    "--quick",
    "--workers",
    "1",
    *SLICE,
    "--max-steps",
    "60",
    "--objectives",
    "cir:sig-ms,infonce,goal",
    "--seeds",
    "2",
]
TWO_AT_ONCE = ["--workers", "2", "--save-every", "0"]


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "goal.cli", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(goal.__file__).parents[1]), "COLUMNS": "40"},
        # a shell that runs the tests in the background has its children ignore Ctrl-C
        preexec_fn=None if sys.platform == "win32" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(folder: Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run` in this process, which does the work of the workers too."""
    monkeypatch.setattr(sweep, "work", inline())
    monkeypatch.setenv("COLUMNS", "40")

    def run(folder: Path, *arguments: str) -> str:
        monkeypatch.chdir(folder)
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


def descendants(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(") ")[2][0] not in "ZX"


def wait_until(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".md", ".tex")}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small sweep that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "runs" / "emoji-quick", run(folder, *SWEEP)


def test_sweep_writes_its_tables_below_the_current_directory(swept: tuple[Path, str]) -> None:
    folder, printed = swept
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["T", "P", "metric", "mean", "std", "seeds"]
    assert {(row["T"], row["P"]) for row in rows} == {("cir", "sig-ms"), ("infonce", "-"), ("goal", "-")}
    assert {row["seeds"] for row in rows} == {"2"}
    assert {"table.md", "table.tex", "heatmap.png", "curves.png"} <= {path.name for path in folder.iterdir()}
    rsum = {row["T"]: row["mean"] for row in rows if row["metric"] == "rsum"}
    assert rsum["cir"] == rsum["goal"] != rsum["infonce"]  # one objective by two names, and another
    assert len(list((folder / "runs").iterdir())) == 4
    assert f"{float(rsum['infonce']):.1f} ±" in printed


def test_quick_says_so_and_a_pipe_gets_whole_lines(swept: tuple[Path, str]) -> None:
    folder, printed = swept
    assert "QUICK" in printed
    assert "QUICK" in (folder / "table.md").read_text()
    assert "of 4 runs met the limit of 60 steps" in printed  # 2 of the objectives are one
    assert "[4/4] " in printed
    assert "\x1b" not in printed
    assert "…" not in printed
    assert any(len(line) > 100 for line in printed.splitlines())  # 40 columns were set


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes")
def test_a_sweep_that_is_killed_ends_with_the_same_table(
    swept: tuple[Path, str], tmp_path: Path, here: Callable[..., str]
) -> None:
    """With other workers, too."""
    runs = tmp_path / "runs" / "emoji-quick" / "runs"
    process = start(tmp_path, *SWEEP, *TWO_AT_ONCE)
    wait_until("two checkpoints", lambda: len(list(runs.glob("*/checkpoint.safetensors"))) == 2)
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    wait_until("workers follow their parent", lambda: not any(map(alive, workers)))
    process.communicate()  # would wait for workers, who have the pipe too
    assert len(list(runs.glob("*/record.json"))) < 4
    for path in runs.glob("*/checkpoint.safetensors"):
        (path.parent / ".checkpoint.safetensors.abc").write_bytes(path.read_bytes()[:100])  # a write cut short
        with (path.parent / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
    printed = here(tmp_path, *SWEEP)
    whole, _ = swept
    assert tables(tmp_path / "runs" / "emoji-quick") == tables(whole)
    assert "infonce" in printed
    for log in runs.glob("*/metrics.jsonl"):
        assert log.read_bytes() == (whole / "runs" / log.parent.name / log.name).read_bytes()
    records = [json.loads((path / "record.json").read_text()) for path in runs.iterdir()]
    assert len(records) == 4


def test_a_sweep_that_has_ended_is_only_reported_again(swept: tuple[Path, str], here: Callable[..., str]) -> None:
    folder, printed = swept
    before = tables(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/record.json")}
    again = here(folder.parents[1], *SWEEP)
    assert tables(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/record.json")} == times
    assert again[again.index("\nRSUM") :] == printed[printed.index("\nRSUM") :]


def test_sweep_tunes_with_the_same_budget_for_each(tmp_path: Path, here: Callable[..., str]) -> None:
    arguments = ["sweep", *SLICE, "--max-steps", "10", "--objectives", "con:con,siglip", "--seeds", "1", "--tune", "2"]
    printed = here(tmp_path, *arguments)
    folder = tmp_path / "runs" / "emoji-tune2"
    searches = [json.loads(path.read_text()) for path in folder.glob("trials/*/tuning.json")]
    assert {search["objective"]: len(search["trials"]) for search in searches} == {
        "con(margin=0.2) × con": 2,
        "siglip": 2,
    }
    assert "found lr" in printed
    assert "2 trials" in (folder / "table.md").read_text()
    assert (folder / "table_tuned.csv").is_file()
    records = [json.loads(path.read_text()) for path in folder.glob("trials/*/*/record.json")]
    assert len(records) == 4
    assert not any("test" in record for record in records)  # a search looks at the validation split alone


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_train_stops_at_ctrl_c_goes_on_and_is_scored_by_eval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: Callable[..., str]
) -> None:
    arguments = ["train", "--recipe", "vse++", *SLICE, "--max-steps", "200", "--patience", "90", "--name", "mine"]
    process = start(tmp_path, *arguments, "--save-every", "0")
    log = tmp_path / "runs" / "mine" / "metrics.jsonl"
    wait_until("two evaluations", lambda: log.exists() and log.read_text().count("\n") > 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert f"goal train --recipe vse++ {SLICE[0]} 120" in err
    assert "Traceback" not in err
    printed = here(tmp_path, *arguments)
    assert "vse++, seed 0: best validation RSUM" in printed
    assert not printed.startswith("step 5 ")  # it went on
    mine = tmp_path / "runs" / "mine"
    record = json.loads((mine / "record.json").read_text())
    for arguments, rsum in (([], record["test"]["rsum"]), (["--split", "val"], record["best_val_rsum"])):
        assert cli.main(["eval", str(mine), *arguments]) == 0
        assert f"RSUM {rsum:.1f}" in capsys.readouterr().out


# ---- the rest, without a process of its own --------------------------------------------------------------


def test_eval_scores_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.eye(4, dtype=np.float32))
    np.save(tmp_path / "y.npy", 3 * np.eye(4, dtype=np.float32)[[1, 0, 2, 3]])
    np.save(tmp_path / "image_of.npy", np.array([1, 0, 2, 3]))
    files = ["--x", str(tmp_path / "x.npy"), "--y", str(tmp_path / "y.npy")]
    assert cli.main(["eval", *files, "--image-of", str(tmp_path / "image_of.npy")]) == 0
    assert "RSUM 600.0" in capsys.readouterr().out
    assert cli.main(["eval", *files, "--folds", "2"]) == 0
    assert "i2t R@1 50.0" in capsys.readouterr().out


def test_data_info_and_recipes_describe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "info", "emoji"]) == 0
    assert "test   330 images (330, 1280)  1650 captions, features (1650, 384)" in capsys.readouterr().out
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == list(goal.recipes())
    assert "margin=0.2" in printed


def test_the_laboratory_draws_one_product(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lab", "show", "--T", "nca", "--P", "con", "--tau", "4", "--html"]) == 0
    printed = capsys.readouterr().out
    assert "T.nca(tau=4.0) × P.con(): the gradient of a loss" in printed
    assert printed.splitlines()[-2:] == ["nca-con.png", "nca-con.html"]
    assert (tmp_path / "nca-con.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "nca-con.html").read_text().startswith("<!doctype html>")


def test_the_laboratory_follows_points(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["--n", "8", "--d", "4", "--steps", "20", "--out", str(tmp_path / "points.png")]
    assert cli.main(["lab", "simulate", "--T", "con", "--P", "con", "--mining", "hardest", "all", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("   ")[0].strip() for line in lines[1:3]] == ["con × con, hardest", "con × con, all"]
    norms = [line for line in lines if line.startswith("con × con, all")][1].removeprefix("con × con, all")
    run = goal.lab.simulate(T="con", P="con", mining="all", n=8, d=4, steps=20)
    assert [float(norm) for norm in norms.split()] == pytest.approx(run.gradient[::2], rel=0.05)
    assert (tmp_path / "points.png").stat().st_size > 10_000


def test_an_objective_is_a_text_an_option_or_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them end in one folder, whose name holds nothing of the text's symbols."""
    monkeypatch.chdir(tmp_path)
    few = [*SLICE, "--max-steps", "5"]
    (tmp_path / "a.toml").write_text('objective = "vse++"\nmax_steps = 5\n[optimiser]\nbatch = 7\nlr = 0.5\n')
    over = ["--config", "a.toml", "--lr", "5e-4"]
    text = "con(margin=0.3):lin|semi_hard(margin=0.1)"
    for arguments in (
        ["--objective", text],
        ["--T", "con(margin=0.3)", "--P", "lin", "--mining", "semi-hard(margin=0.1)"],
        ["--T", "con", "--P", "lin", "--margin", "0.3", "--mining", "semi-hard(margin=0.1)"],
        [*over, "--objective", "con(margin=0.3) × lin | semi-hard(margin=0.1)"],
        [*over, "--T", "con", "--P", "lin", "--margin", "0.3", "--mining", "semi-hard(margin=0.1)"],
    ):
        assert cli.main(["train", *few, *arguments]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"con-lin-semi-hard-s0-[0-9a-f]{10}", folder.name)
    record = json.loads((folder / "record.json").read_text())
    assert record["params"] == {"lr": 5e-4, "margin": 0.3, "mining.margin": 0.1}
    assert cli.main(["train", *few, "--config", str(folder / "config.json")]) == 0  # which is such a file
    assert list((tmp_path / "runs").iterdir()) == [folder]


def test_train_tunes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *SLICE, "--max-steps", "5", "--objective", "nca × con | selective", "--tune", "3"]
    assert cli.main([*arguments, "--name", "mine"]) == 0
    (found,) = (tmp_path / "runs" / "trials").glob("*/tuning.json")
    tuning = json.loads(found.read_text())
    assert [set(trial) for trial in tuning["trials"]] == [{"lr", "tau", "mining.eps", "val_rsum"}] * 3
    best = dict(tuning["trials"][tuning["best"]])
    record = json.loads((tmp_path / "runs" / "mine" / "record.json").read_text())
    assert record["best_val_rsum"] == best.pop("val_rsum") == max(trial["val_rsum"] for trial in tuning["trials"])
    assert record["params"] == best
    assert "nca × con | selective: found lr 0." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--tune", "x"])
    assert cli.main([*arguments, "--distributed"]) == 2


OWN = """
import contextlib
import sys

import goal
from goal.cli import main


@goal.triplet_weight("my-gain")
def my_gain(s_pos, s_neg, *, gain=2.0):
    return gain + 0 * s_neg


if __name__ == "__main__":
    with contextlib.suppress(SystemExit):
        main(["train", "--help"])
    sys.exit(main())
"""


def test_a_script_that_registers_a_term_sweeps_it(tmp_path: Path) -> None:
    """In its worker processes too."""
    (tmp_path / "own.py").write_text(OWN)
    objectives = "my-gain(gain=3):con, my-gain × con | all(average=false)"
    command = [*SWEEP[:4], *SLICE, "--max-steps", "5", "--seeds", "1", "--objectives", objectives, "--tune", "1"]
    path = {**os.environ, "PYTHONPATH": str(Path(goal.__file__).parents[1])}
    call = [sys.executable, "own.py", *command]
    process = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240, env=path)
    assert (process.returncode, process.stderr) == (0, "")
    assert re.search(r"--gain X +of my-gain", process.stdout)
    table = (tmp_path / "runs" / "emoji-quick-tune1" / "table.md").read_text()
    assert r"| my-gain × con \| all(average=false) |" in table
    assert "| my-gain(gain=3) × con |" in table
    assert "lr 0.001, gain 2, mining.average 0" in table


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"goal {goal.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--T", "circ"], "goal train: T='circ' is not known. Did you mean 'cir'?"),
        (["train", "--recipe", "infonce", "--margin", "0.1"], "infonce has no parameter 'margin'. Known: tau"),
        (["train", "--data", "nowhere"], "'nowhere' is no folder"),
        (["train", "--lr", "-1"], "lr must be > 0, got -1"),
        (["train", "--device", "abacus"], "device must be cpu, cuda or cuda:1"),
        (["sweep", "--objectives", "cir:sig-ms,vse"], "recipe='vse' is not known. Did you mean 'vse0'?"),
        (["sweep", "--objectives", "cir(tau=5,alpha=2):sig-ms"], "cir has no parameter 'alpha'. Known: tau. At ▶"),
        (["train", "--objective", "cir × sig-ms", "--T", "nca"], "objective must stand alone, got objective='cir × s"),
        (["train", "--objective", "cir(tau=-1) × con"], "parameter 'tau' must be > 0, got -1.0. At ▶ in 'cir(▶tau=-1)"),
        (["train", "--mining", "selective(eps=x)"], "mining must have a number, true, false or none here, got 'x'."),
        (["train", "--config", "settings.yaml"], "settings.yaml: must be a .toml or a .json file"),
        (["train", "--config", "settings.toml"], "settings.toml: no such file"),
        (["train", "--tune", "-1"], "--tune must be a whole number >= 0, got -1"),
        (["sweep", "--seeds", "0"], "seeds must be a whole number >= 1"),
        (["eval"], "give a run's folder, or both --x and --y"),
        (["eval", "somewhere", "--x", "x.npy", "--y", "y.npy"], "give a run's folder, or both"),
        (["eval", "somewhere"], "somewhere: holds no finished run"),
        (["eval", "--x", "x.npy", "--y", "y.npy"], "x.npy: no such file"),
        (["data", "info", "nothing"], "'nothing' is no folder"),
        (["discover", "--trials", "0"], "trials must be a whole number >= 1, got 0"),
        (["lab", "show", "--T", "ncs", "--P", "lin"], "T='ncs' is not known. Did you mean 'nca'?"),
        (
            ["lab", "show", "--T", "nca", "--P", "lin", "--beta", "3"],
            "nca × lin has no parameter --beta; its parameters: tau",
        ),
        (["lab", "show", "--T", "nca", "--P", "lin", "--tau", "-3"], "'tau' must be > 0"),
        (["lab", "simulate", "--T", "nca", "--P", "lin", "--mining", "hard"], "mining='hard' is not known"),
        (["lab", "simulate", "--T", "nca", "--P", "lin", "--start", "there"], "start='there' is not known"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = ["train", *SLICE, "--lr", "1e38", "--warmup", "0", "--clip", "1e30", "--root", str(tmp_path)]
    assert cli.main(bad) == 1
    error = capsys.readouterr().err
    assert "cir × sig-ms, seed 0" in error
    assert "at step" in error


def test_a_terminal_of_80_columns_shows_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    few = ["--max-steps", "4", "--eval-every", "2", "--curriculum", "mixup", "--switch", "1", "--root", str(tmp_path)]
    assert cli.main(["train", *SLICE, *few]) == 0
    shown = terminal.getvalue()
    assert re.search(r"step 4  stage 1  loss \d\.\d{3}  validation RSUM \d+\.\d  s⁺ -?\d\.\d\d  s⁻ -?\d\.\d\d\n", shown)
    assert "100%" in shown
