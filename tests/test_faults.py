"""The planted faults of faults.py: their texts are there, a handful turns the suite red, the runner can be trusted."""

from pathlib import Path

import faults
import pytest
from faults import FAULTS, Fault, Outcome

HANDFUL = (  # quick ones, for CI; `python -m tests.faults` runs them all
    "the hinge is open at its margin",
    "zeros stay in the set of lin-ms",
    "the mean divides by the number of pairs",
    "a tie between blocks goes to the highest index",
)
BY_NAME = {fault.name: fault for fault in FAULTS}


def test_every_fault_can_be_planted() -> None:
    assert [(fault.name, wrong) for fault in FAULTS if (wrong := faults.stale(fault)) is not None] == []
    assert [fault.name for fault in FAULTS if fault.old == fault.new] == []
    assert len(BY_NAME) == len(FAULTS) >= 40
    assert sum(fault.blind for fault in FAULTS) >= 10


@pytest.mark.parametrize("name", HANDFUL)
def test_a_fault_turns_the_suite_red(name: str) -> None:
    (outcome,) = faults.run([BY_NAME[name]], clean=False)
    assert outcome.verdict == "red"
    assert outcome.first.startswith("tests/test_contract.py::")


# ── the runner ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one function, a symlink as in the real one, and two tests of it."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which takes longer than these tests
    for folder in ("goal", "kernels", "tests", "docs/img"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "goal/__init__.py").write_text("")
    (tmp_path / "goal/kernels").symlink_to("../kernels")
    (tmp_path / "kernels/signs.py").write_text("def sign(x):\n    return (x > 0) - (x < 0)\n")
    (tmp_path / "docs/img/large.png").write_bytes(b"")
    (tmp_path / "tests/test_signs.py").write_text(
        "from goal.kernels.signs import sign\n\n\n"
        "def test_positive():\n    assert sign(2) == 1\n\n\n"
        "def test_negative():\n    assert sign(-2) == -1\n"
    )
    return tmp_path


def fault(old: str, new: str, tests: str = "tests/test_signs.py") -> Fault:
    return Fault(f"{old} → {new}", "kernels/signs.py", old, new, "", tests)


def verdicts(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    return [(outcome.verdict, outcome.first) for outcome in outcomes]


def test_red_green_stale_and_broken(tree: Path) -> None:
    planted = [
        fault("x < 0", "x > 0"),
        fault("x > 0", "x >= 0"),  # nobody asks for the sign of 0
        fault("x", "y"),
        fault("x == 0", "x"),
        fault("sign(x):", "sign(x)"),
        fault("x < 0", "x > 0", "tests/test_signs.py -k positive"),
    ]
    found = faults.run(planted, jobs=2, root=tree)
    assert verdicts(found) == [
        ("red", "tests/test_signs.py::test_positive"),
        ("GREEN", ""),
        ("STALE", "its text is 3 times in kernels/signs.py, and not once"),
        ("STALE", "its text is 0 times in kernels/signs.py, and not once"),
        ("BROKEN", "tests/test_signs.py"),
        ("red", "tests/test_signs.py::test_positive"),
    ]
    lines = faults.table(found).splitlines()
    assert lines[2].startswith("| x < 0 → x > 0 | `kernels/signs.py` | red | `tests/test_signs.py::test_positive` | ")
    assert len(lines) == 2 + len(planted)


def test_a_missing_file_is_stale(tree: Path) -> None:
    assert faults.stale(fault("x", "y")._replace(file="goal/gone.py"), tree) == "there is no goal/gone.py"


def test_nothing_is_left_of_a_fault(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy")
    faults.copy_tree(tree, copy)
    assert (copy / "goal/kernels").is_symlink()
    assert not (copy / "docs/img").exists()
    path = copy / "kernels/signs.py"
    text, changed = path.read_text(), path.stat().st_mtime_ns
    with faults.planted(fault("x < 0", "x > 0"), copy):
        assert path.read_text() == text.replace("x < 0", "x > 0")
        assert int(path.stat().st_mtime) != changed // 10**9
    assert path.read_text() == text
    assert path.stat().st_mtime_ns == changed


def test_a_selection_that_is_not_green_by_itself_is_an_error(tree: Path) -> None:
    for tests, said in (("tests/test_signs.py -k nothing", "pytest ends with 5"), ("tests/none.py", "ends with 4")):
        with pytest.raises(RuntimeError, match="not green without a fault") as error:
            faults.run([fault("x < 0", "x > 0", tests)], root=tree)
        assert said in str(error.value)


def test_the_command_fails_where_a_fault_does_not_turn_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(faults: list[Fault], jobs: int, root: Path) -> list[Outcome]:
        return [Outcome(one, one.why, "", 0.0) for one in faults]

    planted = [fault("x", "y")._replace(name=name, why=name) for name in ("red", "GREEN", "STALE", "BROKEN")]
    monkeypatch.setattr(faults, "FAULTS", planted)
    monkeypatch.setattr(faults, "run", run)
    for named, code, said in (
        (["red"], 0, "1 of 1"),
        (["GREEN"], 1, "0 of 1"),
        (["STALE"], 1, "0 of 1"),
        ([], 1, "1 of 4"),
    ):
        assert faults.main(named) == code
        assert f"{said} faults turn the suite red." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        faults.main(["nobody"])


def test_what_runs_is_ended_with_the_runner(tree: Path) -> None:
    """As by Ctrl-C: the run, its children and the copies are gone."""
    (tree / "tests/test_long.py").write_text(
        "import subprocess, sys\n\n\ndef test_long():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"    open({str(tree / 'child')!r}, 'w').write(str(child.pid))\n    child.wait()\n"
    )
    with pytest.raises(KeyboardInterrupt), faults.Runner(tree, 1) as runner:  # noqa: PT012
        runner._pool.submit(runner._clean, "tests/test_long.py")
        while not (tree / "child").exists() or not (tree / "child").read_text():
            pass
        folder = Path(runner._folder.name)
        assert folder.exists()
        raise KeyboardInterrupt
    assert not folder.exists()
    pid = (tree / "child").read_text()
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # dead, if not yet waited for by its new parent
