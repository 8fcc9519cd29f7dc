"""Works that were stopped, ran twice, or whose files were damaged or changed: what is right then, in one table each."""

import errno
import gc
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch
from processes import Killed, inline, killed_after
from test_training import SMALL, small

import goal
from goal import cli
from goal.data import files
from goal.data.files import Busy, Damaged, alone, atomic_file, write_atomically
from goal.data.terminal import bar, unfailing
from goal.training import Incomplete, Sweep, TrainConfig, loop, search, train
from goal.training.display import display
from goal.training.folder import digest, finished, place
from goal.training.trained import load_trained
from goal.training.workers import Failed

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ["--limit", "100", "--batch", "40", "--hidden", "8", "--dim", "4", "--max-steps", "2"]
TINY: dict[str, Any] = {"hidden": 16, "dim": 8, "batch": 16, "max_steps": 40, "eval_every": 10, "average": 0}


def written(folder: Path, seed: int, splits: tuple[str, ...] = ("train", "val", "test")) -> str:
    """A folder of features: captions are a linear map of their images, another for each seed."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    back = rng.standard_normal((8, 8))
    for split, count in zip(splits, (64, 32, 32), strict=False):
        y = rng.standard_normal((count, 8)).astype(np.float32)
        np.save(folder / f"{split}_x.npy", (y @ back).astype(np.float32))
        np.save(folder / f"{split}_y.npy", y)
    return str(folder)


def content(folder: Path) -> dict[str, bytes]:
    """What a run has left, but for what tells machines and features apart."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "versions.json"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a folder."""
    monkeypatch.setattr(files.alone.__wrapped__, "__defaults__", (0.0,))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a sweep are made in this process: a worker would first import PyTorch."""
    monkeypatch.setattr("goal.training.sweep.work", inline())


# ── a process at a time ─────────────────────────────────────────────────────────────────────────────────

WORKS: dict[str, Callable[[Path], Any]] = {
    "train": lambda folder: train(small(), folder),
    "search": lambda folder: search(small(), 1, folder),
    "sweep": lambda folder: Sweep(
        objectives=["infonce"], root=folder.parent, name=folder.name, **SMALL, max_steps=4
    ).run(),
}


@pytest.mark.usefixtures("impatient", "here")
def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    folders = {work: tmp_path / work for work in WORKS}
    for folder in folders.values():
        folder.mkdir()
    code = "import sys; from contextlib import ExitStack; from pathlib import Path; from goal.data.files import alone\n"
    code += "with ExitStack() as stack:\n"
    code += "    for name in sys.argv[1:]: stack.enter_context(alone(Path(name)))\n"
    code += "    print(flush=True); sys.stdin.read()"
    first = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, folders.values())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(goal.__file__).parents[1],
    )
    assert first.stdout is not None
    first.stdout.readline()
    for work, folder in folders.items():
        with pytest.raises(Busy, match=rf"{folder}: is in use by process {first.pid} on .* since .*Wait for it"):
            WORKS[work](folder)
        assert not [path for path in folder.iterdir() if not path.name.startswith(".")]
    first.kill()  # a lock ends with its process
    first.communicate()
    for work, folder in folders.items():
        WORKS[work](folder)
        assert not list(folder.rglob(".*"))


@pytest.mark.usefixtures("impatient")
def test_the_command_says_who_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    arguments = ["train", *FEW, "--name", "a", "--root", str(tmp_path)]
    with alone(tmp_path / "a"):
        assert cli.main(arguments) == 1
    assert f"goal train: {tmp_path / 'a'}: is in use by process {os.getpid()}" in capsys.readouterr().err


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path) -> None:
    long = tmp_path / ("checkpoint" * 20)
    for path in (tmp_path / "record.json", long):
        with atomic_file(path) as file:
            left = Path(file.name)
        path.rename(left)  # as a killed process leaves it
    mine = {"mine.tmp", ".mine", ".mine.tmp", ".my notes.tmp", ".a.SHOUTED1.tmp", ".folder.x1234567.tmp"}
    for name in mine - {".folder.x1234567.tmp"}:
        (tmp_path / name).write_bytes(b"the user's own")
    (tmp_path / ".folder.x1234567.tmp").mkdir()
    with alone(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == mine


@pytest.mark.parametrize("arguments", [[], [""], ["goal", "train", "--name", "m\udcff"], ["d\udcff/goal", "\0"]])
@pytest.mark.parametrize("told", [b"process 1 (\xff\xfe \x00)", None])
@pytest.mark.usefixtures("impatient")
def test_whoever_is_there_is_told_in_any_bytes(
    arguments: list[str], told: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):  # the first lets go of it
        with alone(tmp_path):
            if told is not None:
                (tmp_path / ".locked-by").write_bytes(told)
            with pytest.raises(Busy, match="is in use by process"), alone(tmp_path):
                pass
        assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("impatient")
def test_a_lock_is_let_go_whatever_happens_to_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, **more: Any) -> None:
        raise PermissionError(errno.EACCES, "open elsewhere", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)  # as Windows does while somebody reads
        with alone(tmp_path):
            pass
    with alone(tmp_path):
        pass


# ── what tells a run from another ───────────────────────────────────────────────────────────────────────


def copied(run: Path, to: Path) -> Path:
    """A run's folder, copied."""
    return Path(shutil.copytree(run, to, dirs_exist_ok=True))


def begun(config: TrainConfig, folder: Path, evaluations: int, save_every: float = 0) -> None:
    """A run that is killed after so many evaluations."""
    with pytest.raises(Killed):
        train(config, folder, save_every, on_evaluation=killed_after(evaluations))


def test_features_written_anew_in_their_folder_are_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data=written(Path("data"), 0), **TINY)
    times = {path: (path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in Path("data").iterdir()}
    first = train(config, tmp_path / "first")
    written(Path("data"), 1)
    for path, at in times.items():
        os.utime(path, ns=at)  # as old as before, and as large
    second = train(config, tmp_path / "second")
    assert first["curve"] != second["curve"]
    (tmp_path / "elsewhere").mkdir()
    written(tmp_path / "elsewhere" / "data", 0)
    monkeypatch.chdir(tmp_path / "elsewhere")  # the same relative path
    assert train(config, tmp_path / "third")["curve"] == first["curve"]


def test_a_folder_that_has_not_changed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, reads, load = written(tmp_path / "data", 0), [], goal.data.load
    monkeypatch.setattr("goal.training.features.load", lambda *asked: (reads.append(asked), load(*asked))[1])
    monkeypatch.setattr("goal.training.features.SETTLED", 0)
    for _ in range(3):
        loop.read(TrainConfig(data=data))
    assert len(reads) == 3  # a split each


def test_every_row_of_a_large_array_is_in_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)  # as if the arrays were large
    config = TrainConfig(data=written(tmp_path / "data", 0), **TINY)
    before = loop.read(config).fingerprints
    x = np.load(tmp_path / "data" / "train_x.npy")
    x[37, 5] += 1
    np.save(tmp_path / "data" / "train_x.npy", x)
    assert loop.read(config).fingerprints != before


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]] = {
    "other features": lambda data, patch: written(data, 1) and {},
    "another version": lambda data, patch: patch.setattr(goal, "__version__", "0.0.0") or {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_something_else_is_never_continued(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = TrainConfig(data=written(tmp_path / "data", 0), **TINY), tmp_path / "run"
    begun(config, run, evaluations=3)
    CHANGES[change](tmp_path / "data", monkeypatch)
    begun(config, run, evaluations=1, save_every=1e9)  # killed before a checkpoint of its own
    train(config, run)
    train(config, tmp_path / "whole")
    assert content(run) == content(tmp_path / "whole")


def test_a_folder_with_results_of_another_configuration_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path / "data", 0)
    begun(TrainConfig(data=data, T="con", P="con", **TINY), tmp_path / "run", evaluations=2)
    before = content(tmp_path / "run")
    for features in (0, 1):  # with other features, too
        written(tmp_path / "data", features)
        with pytest.raises(ValueError, match=r"run: holds a run of another configuration \(objective\); move it away"):
            train(TrainConfig(data=data, **TINY), tmp_path / "run")
    assert content(tmp_path / "run") == before


def test_what_an_earlier_run_left_is_gone_before_another_begins(tmp_path: Path) -> None:
    config, run = TrainConfig(data=written(tmp_path / "data", 0), **TINY), tmp_path / "run"
    run.mkdir()
    for name in ("vocabulary.json", "diagnosis.jsonl", "diagnosis.png"):
        (run / name).write_text("of an earlier run")
    train(config, run)
    train(config, tmp_path / "whole")
    assert content(run) == content(tmp_path / "whole")
    (run / "checkpoint.safetensors").write_bytes(b"killed before it was removed")
    train(config, run)
    assert content(run) == content(tmp_path / "whole")


@pytest.mark.usefixtures("registries")
def test_another_term_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    def trained(mine: Callable[..., Any]) -> Any:
        goal.T._definitions.pop("mine", None)
        goal.triplet_weight("mine")(mine)
        return train(small(T="mine", max_steps=4), tmp_path)

    # written twice, with a set that is gone through in another order, as in another process
    one, same = (eval(f"lambda s_pos, s_neg: s_neg - s_neg + 1 + (s_pos.dim() in {a})") for a in ("{8, 0}", "{0, 8}"))
    assert repr(one.__code__.co_consts) != repr(same.__code__.co_consts)
    record = trained(one)
    assert trained(same) == record
    with pytest.raises(ValueError, match="was trained with another definition of mine × sig-ms"):
        trained(lambda s_pos, s_neg: s_neg - s_neg + 2)


def test_regions_that_change_while_they_are_read_end_the_run(tmp_path: Path) -> None:
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for split in ("train", "val", "test"):
        np.save(data / f"{split}_ims.npy", rng.standard_normal((16, 3, 8)).astype(np.float32))
        (data / f"{split}_caps.txt").write_text("a red dog\na blue cat\n" * 8)
    config = TrainConfig(model="rvse++", data=str(data), dim=8, word_dim=4, batch=8, epochs=2)

    def change(row: loop.Row) -> None:
        np.save(data / "train_ims.npy", rng.standard_normal((16, 3, 8)).astype(np.float32))

    with pytest.raises(ValueError, match=r"train_ims\.npy: has changed while it was read"):
        train(config, tmp_path / "run", on_evaluation=change)
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.usefixtures("here")
def test_features_that_change_during_a_sweep_fail_what_comes_after(tmp_path: Path) -> None:
    data = written(tmp_path / "data", 0)
    sweep = Sweep(data=data, objectives=["infonce"], seeds=1, root=tmp_path / "runs", workers=1, **TINY)
    written(tmp_path / "data", 1)  # between the first look and the first run
    with pytest.raises(Incomplete, match=r"1 of the runs failed.*\n.*infonce.*was trained on other features"):
        sweep.run()
    assert sweep.records() == []


# ── damaged files ───────────────────────────────────────────────────────────────────────────────────────


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    path.write_bytes(b"\xff\x00 no json, no tensors")


def of_another_size(path: Path) -> None:
    """A checkpoint with the right words and a tensor of the wrong shape."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.startswith("mean."))
    save_file(tensors | {name: tensors[name][:1].clone()}, path, told)


def one_byte(path: Path) -> None:
    """As many bytes as before, one of them another."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def another_state(path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"state": json.dumps(json.loads(told["state"]) | {"drops": 1})})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, to copy and to compare with."""
    folder = tmp_path_factory.mktemp("whole")
    train(small(), folder)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed on its way, to copy."""
    folder = tmp_path_factory.mktemp("half")
    begun(small(), folder, evaluations=2)
    return folder


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoint.safetensors", cut),
        ("checkpoint.safetensors", one_byte),
        ("checkpoint.safetensors", another_state),
        ("checkpoint.safetensors", garbled),
        ("checkpoint.safetensors", of_another_size),
        ("record.json", cut),
        ("record.json", garbled),
        ("record.json", lambda path: path.write_text("[]")),
        ("record.json", lambda path: path.write_text("[" * 100_000)),
        ("record.json", lambda path: path.write_text(path.read_text().replace('"stopped"', '"ended"'))),
        ("record.json", lambda path: path.write_text(re.sub(r'"rsum": [\d.]+', '"rsum": NaN', path.read_text()))),
        ("record.json", lambda path: path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))),
        ("record.json", lambda path: path.write_text(path.read_text().replace('"t2i_r5"', '"t2i_r6"'))),
    ],
)
def test_a_damaged_result_is_made_again_by_name(
    name: str, damage: Callable[[Path], Any], whole: Path, half: Path, tmp_path: Path
) -> None:
    run = copied(whole if name == "record.json" else half, tmp_path)
    damage(run / name)
    with pytest.warns(UserWarning, match=f"{name}: is damaged, so the run is begun again"):
        train(small(), run)
    assert content(run) == content(whole)


@pytest.mark.parametrize(("copy", "left"), [("whole", []), ("half", [12, 16, 20])])
def test_copies_of_these_runs_go_on_while_nothing_is_damaged(
    copy: str, left: list[int], whole: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    steps: list[float] = []
    run = copied(request.getfixturevalue(copy), tmp_path)
    train(small(), run, on_evaluation=lambda row: steps.append(row["step"]))
    assert steps == left
    assert content(run) == content(whole)


def test_notes_of_a_half_done_run_are_written_again(half: Path, tmp_path: Path) -> None:
    run = copied(half, tmp_path)
    cut(run / "versions.json")
    record = train(small(), run)
    assert train(small(), run) == record


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(
            ("config.json", "versions.json"),
            (cut, garbled, deep, lambda path: path.write_text('{"later": 1}'), Path.unlink),
        ),
        ("versions.json", a_pipe),
        ("config.json", a_pipe),
    ],
)
def test_what_tells_whose_a_folder_is_has_to_be_whole(
    name: str, damage: Callable[[Path], Any], whole: Path, tmp_path: Path
) -> None:
    copied(whole, tmp_path)
    record = (tmp_path / "record.json").read_bytes()
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: is damaged|other features"):
        train(small(), tmp_path)
    assert (tmp_path / "record.json").read_bytes() == record


@pytest.mark.usefixtures("here")
def test_a_damaged_run_of_a_sweep_fails_alone_or_is_made_again(tmp_path: Path) -> None:
    def sweep() -> Sweep:
        return Sweep(objectives=["infonce", "cir:lin", "vse0"], seeds=1, root=tmp_path, workers=1, **SMALL, max_steps=8)

    first = sweep()
    runs = [first.folder / "runs" / entry.seeded(0).run_name for entry in first.entries]
    begun(first.entries[0].config, runs[0], evaluations=1)
    cut(runs[0] / "checkpoint.safetensors")
    train(first.entries[1].config, runs[1])
    cut(runs[1] / "config.json")
    with (
        pytest.warns(UserWarning, match=r"infonce.*checkpoint\.safetensors: is damaged, so the run is begun again"),
        pytest.raises(Incomplete, match=r"1 of the runs failed.*\n.*cir-lin.*config\.json: is damaged"),
    ):
        first.run()
    assert [record["label"] for record in first.records()] == ["infonce", "vse0"]
    (runs[1] / "record.json").unlink()
    (runs[1] / "model.safetensors").unlink()  # as the message says, moved away
    assert len(sweep().run()) == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(TrainConfig(model="vse++", data="emoji", limit=64, dim=8, word_dim=4, batch=32, epochs=1), folder)
    return folder


def with_metadata(path: Path, change: Callable[[dict[str, Any]], Any], entry: str = "run") -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        told, tensors = json.loads(file.metadata()[entry]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(told)
    if entry == "state":  # a checkpoint's digest is of what it tells, too
        told["sha256"] = digest(tensors, {name: value for name, value in told.items() if name != "sha256"})
    save_file(tensors, path, {entry: json.dumps(told)})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", cut, "model.safetensors: holds no run"),
        ("model.safetensors", one_byte, "model.safetensors: holds no run: its content is not what was written"),
        ("model.safetensors", garbled, "model.safetensors: holds no run"),
        ("vocabulary.json", cut, "vocabulary.json: no vocabulary"),
        ("vocabulary.json", lambda path: path.write_text('{"words": ["a"]}'), "vocabulary.json: has 6 tokens"),
        (
            "model.safetensors",
            lambda path: with_metadata(path, lambda told: told["config"].update(dim=10**9)),
            "model.safetensors: holds no run: dim must be a whole number >= 1 and <= 65536, got 1000000000",
        ),
        (
            "model.safetensors",
            lambda path: with_metadata(path, lambda told: told["config"].update(dim=60_000, word_dim=60_000)),
            r"model.safetensors: .* is \(.*8.*\), by its configuration it is \(.*60000.*\)",
        ),
        (
            "model.safetensors",
            lambda path: with_metadata(path, lambda told: told["inputs"].update(x=10**12)),
            "by its configuration it is .*1000000000000",
        ),
        (
            "model.safetensors",
            lambda path: with_metadata(path, lambda told: told.pop("inputs")),
            "model.safetensors: holds no run",
        ),
    ],
)
def test_a_damaged_model_is_refused_by_name(
    name: str, damage: Callable[[Path], Any], message: str, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    copied(trained, tmp_path)
    load_trained(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(Damaged if name == "model.safetensors" else ValueError, match=message):
        load_trained(tmp_path)
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


# ── folders from before settings stood in sections ──────────────────────────────────────────────────────

OLD = json.loads(Path(__file__).with_name("old_runs.json").read_text(encoding="utf-8"))  # as that version wrote them
FLAT = {"limit": 60, "hidden": 8, "dim": 6, "batch": 20, "max_steps": 4, "eval_every": 2, "warmup": 2}
NOW = {
    "cell": TrainConfig(objective="con(margin=0.2) × sig-ms(beta=20) | semi-hard", **FLAT),
    "recipe": TrainConfig(objective="vse++(margin=0.1) | reduction=mean", **FLAT),
    "yardstick": TrainConfig(objective="infonce(tau=30)", **FLAT),
}


def old_run(name: str, parent: Path) -> Path:
    folder = parent / OLD[name]["folder"]
    folder.mkdir()
    for file in ("config.json", "versions.json", "record.json"):
        (folder / file).write_text(json.dumps(OLD[name][file]))
    return folder


@pytest.mark.parametrize("name", OLD)
def test_a_run_of_the_flat_form_is_read_where_it_lies(name: str, tmp_path: Path) -> None:
    for other in OLD:
        old_run(other, tmp_path)
    folder, config = tmp_path / OLD[name]["folder"], NOW[name]
    assert TrainConfig.from_json((folder / "config.json").read_text()) == config
    assert place(config, tmp_path) == folder
    assert finished(config, folder, OLD[name]["versions.json"]["data"]) == OLD[name]["record.json"]
    other = config.replace(lr=0.25)
    assert place(other, tmp_path) == tmp_path / other.run_name  # whose stem is the same
    (tmp_path / config.run_name).mkdir()
    assert place(config, tmp_path) == tmp_path / config.run_name


def test_a_search_of_the_flat_form_goes_on_where_it_lies(tmp_path: Path) -> None:
    config, trials = NOW["yardstick"], tmp_path / "trials"
    inside = trials / OLD["yardstick"]["folder"]
    inside.mkdir(parents=True)
    first = old_run("yardstick", inside)
    (first / "versions.json").write_text(json.dumps({"data": loop.read(config, test=False).fingerprints}))
    assert place(config, trials) == inside
    assert place(NOW["recipe"], trials).name == NOW["recipe"].run_name
    assert search(config, 1, place(config, trials)) == config
    tried = json.loads((inside / "tuning.json").read_text())["trials"]
    assert [trial["val_rsum"] for trial in tried] == [OLD["yardstick"]["record.json"]["best_val_rsum"]]
    assert not (inside / config.run_name).exists()  # nothing was trained


def test_what_cannot_be_read_of_the_flat_form_is_refused_or_begun_again(tmp_path: Path) -> None:
    folder, prints = old_run("cell", tmp_path), OLD["cell"]["versions.json"]["data"]
    with pytest.raises(ValueError, match=r"holds a run of another configuration \(objective\); move it away"):
        finished(NOW["recipe"], folder, prints)
    with pytest.raises(ValueError, match="was trained on other features"):
        finished(NOW["cell"], folder, prints | {"val": "other"})
    (folder / "record.json").write_text(json.dumps(OLD["recipe"]["record.json"]))
    with pytest.warns(UserWarning, match="is damaged, so the run is begun again: it is no record of this run's obj"):
        assert finished(NOW["cell"], folder, prints) is None
    later = OLD["cell"]["config.json"] | {"spin": 1}
    (folder / "config.json").write_text(json.dumps(later))
    with pytest.raises(Damaged, match=r"of another version of goal; move .* away: .*no setting 'spin'"):
        finished(NOW["cell"], folder, prints)


def test_a_sweep_counts_the_runs_of_the_flat_form(tmp_path: Path) -> None:
    settings = {"root": tmp_path, "seeds": 1, **FLAT}
    sweep = Sweep(objectives=["infonce(tau=30)"], **settings)
    (sweep.folder / "runs").mkdir(parents=True)
    folder = old_run("yardstick", sweep.folder / "runs")
    (folder / "versions.json").write_text(json.dumps({"data": sweep.fingerprints}))
    kept = OLD["yardstick"]["record.json"]["test"]["rsum"]
    (record,) = sweep.run()
    assert (record["test"]["rsum"], record["label"]) == (kept, "infonce(tau=30)")
    assert [path.name for path in (sweep.folder / "runs").iterdir()] == [folder.name]


def test_weights_and_checkpoints_of_the_flat_form_are_read(tmp_path: Path) -> None:
    config, flat = NOW["cell"], OLD["cell"]["config.json"]
    train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, tmp_path / "run", save_every=0, on_evaluation=killed_after(1))
    (tmp_path / "run" / "config.json").write_text(json.dumps(flat))
    with_metadata(tmp_path / "run" / "checkpoint.safetensors", lambda told: told["run"].update(config=flat), "state")
    steps: list[float] = []
    train(config, tmp_path / "run", on_evaluation=lambda row: steps.append(row["step"]))
    assert steps == [4]  # it went on
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    with_metadata(tmp_path / "run" / "model.safetensors", lambda told: told.update(config=flat))
    assert load_trained(tmp_path / "run").config == config


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file may grow: what a full disk does, with another number."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "write_atomically": lambda path: write_atomically(path, b"1" * 10**6),
    "save_atomically": lambda path: files.save_atomically(path, np.zeros(10**6)),
    "append_line": lambda path: files.append_line(path, "1" * 10**6),
}


def test_a_diagnosis_writes_where_it_began_and_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    objective, x = goal.Objective(), torch.eye(4, requires_grad=True)
    monkeypatch.chdir(tmp_path)
    with goal.diagnose(objective, path=Path("rows.jsonl")) as diagnosis:
        monkeypatch.chdir("/")
        objective(x, torch.eye(4)).backward()
        diagnosis.step()
        assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 1
        objective(x, torch.eye(4)).backward()
        request.getfixturevalue("no_room")
        with pytest.raises(OSError, match=rf"{tmp_path / 'rows.jsonl'} cannot be written"):
            diagnosis.step()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_no_other(writer: str, tmp_path: Path, no_room: None) -> None:
    with pytest.raises(OSError, match=rf"{tmp_path / 'a.npy'} cannot be written"):
        WRITERS[writer](tmp_path / "a.npy")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.npy"}
    assert not (tmp_path / "a.npy").exists() or writer == "append_line"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at open files")
@pytest.mark.parametrize("fails", [False, True])
def test_no_open_file_is_renamed_or_removed(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows would refuse."""
    replace, unlink = os.replace, Path.unlink

    def closed(path: object) -> None:
        held = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        if os.path.realpath(str(path)) in held:
            raise PermissionError(errno.EACCES, "open", str(path))

    monkeypatch.setattr(os, "replace", lambda source, target: (closed(source), replace(source, target)))
    monkeypatch.setattr(Path, "unlink", lambda path, **more: (closed(path), unlink(path, **more)))
    with suppress(ZeroDivisionError), atomic_file(tmp_path / "a") as file:
        file.write(b"%g" % (1 / (not fails)))
    assert [path.name for path in tmp_path.iterdir()] == ([] if fails else ["a"])


# ── printing ────────────────────────────────────────────────────────────────────────────────────────────


class Stream:
    """Standard output of some kind."""

    encoding = "ascii"

    def __init__(self, error: Exception | None) -> None:
        self.error, self.text = error, ""

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        self.text += text.encode(self.encoding).decode()
        return len(text)


@pytest.mark.parametrize(
    "stream",
    [
        None,
        Stream(None),
        Stream(BrokenPipeError()),
        Stream(OSError(errno.ENOSPC, "full")),
        Stream(ValueError("closed")),
    ],
    ids=["closed", "ascii", "nobody reads", "full", "a closed file"],
)
def test_printing_never_ends_work(stream: Stream | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        assert cli.main(["train", *FEW, "--name", "a", "--root", str(tmp_path)]) == 0
        with display() as shown:  # of a sweep, from Python
            shown.show(Failed("s⁺", "s⁻"), list)
    assert (tmp_path / "a" / "record.json").is_file()
    if stream is not None and stream.error is None:
        assert "validation RSUM" in stream.text
        assert "cir ? sig-ms" in stream.text
        assert "[1/0] s?" in stream.text


class Bare:
    """A stream that can only write."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class Stubborn(io.StringIO):
    """A stream that takes no settings."""

    def reconfigure(self, **settings: Any) -> None:
        raise io.UnsupportedOperation("reconfigure")


def shut(path: Path) -> TextIO:
    with path.open("w") as file:
        return file


STREAMS: dict[str, Callable[[Path], Any]] = {
    "closed file": lambda folder: shut(folder / "shut"),
    "closed text": lambda folder: (text := io.StringIO(), text.close())[0],
    "detached": lambda folder: (text := io.TextIOWrapper(io.BytesIO()), text.detach())[0],
    "no settings": lambda folder: Stubborn(),
    "only write": lambda folder: Bare(),
    "nothing": lambda folder: object(),
    "full": lambda folder: open("/dev/full", "w"),  # noqa: SIM115
    "ascii": lambda folder: open(folder / "ascii", "w", encoding="ascii", errors="xmlcharrefreplace"),  # noqa: SIM115
}


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """The collector leaves alone what is there already, so that it is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.skipif(not Path("/dev/full").exists() or not Path("/proc/self/fd").is_dir(), reason="looks at open files")
@pytest.mark.parametrize("kind", STREAMS)
def test_streams_of_any_kind_are_printed_to_and_given_back_as_they_were(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "err").mkdir()
    streams = [STREAMS[kind](folder) for folder in (tmp_path, tmp_path / "err")]
    errors = [getattr(stream, "errors", None) for stream in streams]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        with unfailing():
            print("s⁺")
            print("s⁻", file=sys.stderr, flush=True)
        assert (sys.stdout, sys.stderr) == tuple(streams)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before
    assert [getattr(stream, "errors", None) for stream in streams] == errors
    text = getattr(streams[0], "text", None) or (streams[0].getvalue() if isinstance(streams[0], Stubborn) else "s⁺\n")
    assert text == "s⁺\n"
    if kind == "ascii":
        assert (tmp_path / "ascii").read_text() == "s?\n"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at open files")
def test_what_stands_for_closed_streams_is_inherited() -> None:
    """Else the first file that a worker opens gets what is printed."""
    code = "import os, sys; from goal import cli; sys.argv[1:] = ['recipes']; cli.main()"
    code += "; sys.exit(not all(os.get_inheritable(fd) for fd in (0, 1, 2)))"
    shell = 'exec "$0" -c "$1" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell, sys.executable, code], cwd=Path(goal.__file__).parents[1]).returncode == 0


@pytest.mark.parametrize("stream", [None, Stream(None), Stream(BrokenPipeError())], ids=["closed", "ascii", "nobody"])
def test_a_bar_never_ends_work(stream: Stream | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(bar(range(3), "s⁺")) == [0, 1, 2]
    assert stream is None or stream.error is not None or "s?" in stream.text


def test_a_missing_extra_names_its_install_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for package, arguments in (
        ("safetensors", ["train", *FEW]),
        ("matplotlib", ["train", *FEW, "--diagnose", "1"]),
        ("matplotlib", ["sweep", *FEW]),
        ("optuna", ["sweep", *FEW, "--tune", "2"]),
        ("matplotlib", ["lab", "show", "--T", "nca", "--P", "con"]),
        ("efficientnet_lite_pytorch", ["data", "build", "emoji-grid", "--out", "a/b"]),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert cli.main(arguments) == 2, package
        error = capsys.readouterr().err
        assert f"pip install 'goal-objectives[{'build' if arguments[0] == 'data' else 'train'}]'" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
