"""Training, and what was trained, in another world: other devices, folders, data, names, kinds of numbers."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_interrupted import FEW, TINY, with_metadata, written
from test_training import small

import goal
from goal import cli
from goal.data.files import folder_name, folder_name_of
from goal.lab import discover
from goal.training import Sweep, TrainConfig, search, train
from goal.training.config import SETTINGS, alternatives
from goal.training.trained import load_trained, score

pytestmark = pytest.mark.usefixtures("one_thread")

# ── devices, folders, data ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a run and its data."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(TrainConfig(data=written(folder / "data", 0), **TINY), folder / "run")


def copied(run: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing to see where there is a GPU")
def test_a_run_of_a_gpu_is_scored_on_a_cpu(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, record = trained
    run = copied(folder / "run", tmp_path / "run")
    with_metadata(run / "model.safetensors", lambda told: told["config"].update(device="cuda"))
    rsum = f"RSUM {record['test']['rsum']:.1f}"
    for more in ([], ["--device", "cpu"]):
        assert cli.main(["eval", str(run), *more]) == 0
        assert rsum in capsys.readouterr().out
    assert cli.main(["eval", str(run), "--device", "cuda:3"]) == 2
    assert "device 'cuda:3' is not on this machine" in capsys.readouterr().err
    config = TrainConfig(device="cuda")  # is valid everywhere, and trained where there is one
    with pytest.raises(ValueError, match="device 'cuda' is not on this machine"):
        train(config, tmp_path / "other")
    with pytest.raises(ValueError, match="device 'cuda' is not on this machine"):
        Sweep(device="cuda", root=tmp_path)


def test_a_run_is_scored_on_the_data_that_is_named(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, record = trained
    run, moved = copied(folder / "run", tmp_path / "run"), copied(folder / "data", tmp_path / "moved data")
    with_metadata(run / "model.safetensors", lambda told: told.update(at="gone"))
    assert cli.main(["eval", str(run)]) == 2
    assert "'gone' is no folder" in capsys.readouterr().err
    assert cli.main(["eval", str(run), "--data", str(moved)]) == 0
    assert f"RSUM {record['test']['rsum']:.1f}" in capsys.readouterr().out
    other = load_trained(run, data=written(tmp_path / "other", 3))
    assert score(other.config, other.model, other.split("test")).rsum != record["test"]["rsum"]
    np.save(tmp_path / "other" / "test_x.npy", np.ones((32, 9), np.float32))
    with pytest.raises(ValueError, match=r"'test' has images of 9 dimensions .*the model reads images of 8 dimensions"):
        other.split("test")


def test_a_run_is_scored_on_its_own_data_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "data", seed)
    monkeypatch.chdir(tmp_path / "a")
    record = train(TrainConfig(data="data", **TINY), tmp_path / "a" / "run")
    monkeypatch.chdir(tmp_path / "b")
    assert cli.main(["eval", "../a/run"]) == 0
    assert f"RSUM {record['test']['rsum']:.1f}" in capsys.readouterr().out
    written(tmp_path / "a" / "data", 2)
    with pytest.warns(UserWarning, match="'test' is not what it was when the model was trained"):
        load_trained(tmp_path / "a" / "run").split("test")


def test_other_defaults_of_torch_change_nothing(tmp_path: Path) -> None:
    record = train(small(max_steps=4), tmp_path / "plain")
    others = (("meta", "meta", torch.float32), ("double", "cpu", torch.float64), ("half", "cpu", torch.float16))
    for name, device, dtype in others:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        try:
            assert train(small(max_steps=4), tmp_path / name) == record
            run = load_trained(tmp_path / name)
            assert score(run.config, run.model, run.split("test")).rsum == record["test"]["rsum"]
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)


# ── the splits ──────────────────────────────────────────────────────────────────────────────────────────


def test_training_without_a_test_wants_no_test_split(tmp_path: Path) -> None:
    config = TrainConfig(data=written(tmp_path / "data", 0, ("train", "val")), **TINY)
    assert "test" not in train(config, tmp_path / "run", test=False)
    assert "test" not in train(config, tmp_path / "run", test=False)
    with pytest.raises(ValueError, match=r"split: .* has no test_x\.npy"):
        train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("side", "shape", "words"), [("x", (32, 9), "9 dimensions"), ("y", (32, 4, 8), "tokens of 8")])
def test_a_split_unlike_the_training_split_is_refused_before_training(
    split: str, side: str, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    data = written(tmp_path / "data", 0)
    np.save(tmp_path / "data" / f"{split}_{side}.npy", np.ones(shape, np.float32))
    with pytest.raises(ValueError, match=rf"data: '{split}' has .*{words}.*, and 'train' has images of 8"):
        train(TrainConfig(data=data, **TINY), tmp_path / "run")
    assert not (tmp_path / "run").exists()


TEXTS = [name for name, setting in SETTINGS.items() if not {int, float} & {*alternatives(setting.hint)}]
TEXTS += ["T", "P", "recipe", "mining", "reduction"]

# ── names and numbers ───────────────────────────────────────────────────────────────────────────────────


NO_FOLDERS = ["../../x", "/tmp/x", "a/b", "a\\b", "..", ".", "", "a\nb", "a\0b", "é" * 101, "m\udcff"]
NO_FOLDERS += [
    *(f"a{mark}b" for mark in '<>:"|?*'),
    "a.",
    "a ",
    " a",
    "CON",
    "nul",
    "Com1.txt",
    "aux.",
    "lpt9 .a",
    "COM¹",
]


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_name_stays_in_its_root(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("train", "sweep", "discover"):
        assert cli.main([command, *FEW, f"--name={name}"]) == 2
        assert "name must name one folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name must name one folder"):
        Sweep(name=name)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_sweep_is_called_as_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "mine", 0)
    (tmp_path / "mine" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "mine" / "below")
    settings: dict[str, Any] = {"objectives": ["infonce"], "root": tmp_path / "runs", **TINY}
    assert Sweep(data="..", **settings).folder == tmp_path / "runs" / "mine"


@pytest.mark.parametrize("name", ["data\u202f1", "d\\e", "ü" * 110, "CON", "nul.a", "my data", "m\udcff", "a:b", "x."])
def test_data_of_any_name_make_a_name_of_a_folder(name: str, tmp_path: Path) -> None:
    data = written(tmp_path / name, 0)
    folder = Sweep(data=data, objectives=["infonce"], root=tmp_path / "runs", **TINY).folder
    assert folder.parent == tmp_path / "runs"
    assert folder_name("name", folder.name) == folder.name
    assert (folder.name == name) == (name == "my data")
    assert folder_name_of(name) != folder_name_of(name + "?") != folder_name_of(name + "*")


@pytest.mark.usefixtures("registries")
def test_a_long_name_of_a_term_makes_a_short_name_of_a_folder(tmp_path: Path) -> None:
    long = "a" * 500
    goal.triplet_weight(long)(lambda s_pos, s_neg: s_neg - s_neg + 1)
    configs = [small(T=long, P=P, max_steps=2) for P in ("con", "lin")]
    assert all(len(config.run_name) < 120 for config in configs)
    assert len({config.run_name for config in configs}) == 2
    train(configs[0], tmp_path / configs[0].run_name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 10**9}, "hidden must be a whole number >= 1 and <= 65536, got 1000000000"),
        ({"dim": 2**20}, "dim must .* <= 65536"),
        ({"model": "vse++", "word_dim": 10**9}, "word_dim must .* <= 65536"),
        ({"threads": 10**9}, "threads must .* <= 1024"),
        ({"seed": 2**64}, "seed must .* < 2⁶³"),
        ({"data": "a\0b"}, "data must hold no NUL"),
        ({"lr": np.float64("nan")}, "lr must be finite"),
        ({"params": {"tau": np.float32("inf")}}, "parameter 'tau' must be finite"),
        ({"params": {"tau": 10**400}}, "parameter 'tau' must be within a float's range"),
        ({"lr": 10**5000}, "lr must be within a float's range"),
        *(
            ({name: 10**5000}, f"{name} must be a whole number .*, got one of 16610 bits")
            for name in ("hidden", "seed")
        ),
        *(({name: "9" * 5000}, f"{name} must be of at most 4096 characters, got 5000") for name in TEXTS),
        ({"switch": "9" * 4000, "curriculum": "plain"}, "switch must be plateau, few-semi-hard or a number"),
        ({"params": {1: 2.0, "x": 1}}, "cir × sig-ms has no parameter 1"),
    ],
)
def test_a_number_beyond_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


NO_COUNTS = [2.5, True, "2", "x", float("nan"), -1, [], [1], np.ones(2), 10**400, 10**9, torch.tensor(2.0)]
WRONG: dict[str, list[Any]] = {
    **dict.fromkeys(("seeds", "trials", "workers"), NO_COUNTS),
    "save_every": ["x", True, float("nan"), -1, [], 10**400, None],
    "name": [3, b"a", ["a"]],
    "objectives": ["infonce", [], [1], 3],
}
ENTRANCES: dict[Any, list[str]] = {
    Sweep: list(WRONG),
    discover: ["seeds", "trials", "workers", "save_every", "name"],
    functools.partial(search, small(), folder=Path("nowhere")): ["trials", "save_every"],
}


@pytest.mark.parametrize(
    ("entrance", "argument", "wrong"),
    [(call, name, wrong) for call, names in ENTRANCES.items() for name in names for wrong in WRONG[name]],
    ids=lambda value: repr(value)[:20],
)
def test_an_argument_of_the_wrong_kind_is_refused_by_name_before_anything_is_read(
    entrance: Any, argument: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {"trials": 1} if isinstance(entrance, functools.partial) else {"data": "nowhere"}
    with pytest.raises((ValueError, TypeError), match=f"^{argument}:? must "):
        entrance(**more | {argument: wrong})
    assert not list(tmp_path.iterdir())


def test_counts_and_seconds_of_numpy_and_torch_are_counts_and_seconds(tmp_path: Path) -> None:
    numbers = {"seeds": np.int64(2), "trials": torch.tensor(1), "workers": np.array(1), "save_every": np.float32(2)}
    sweep = Sweep(objectives=iter(["infonce"]), root=tmp_path, **numbers)  # type: ignore[arg-type]
    found = sweep.seeds, sweep.trials, sweep.workers, sweep.save_every
    assert found == (2, 1, 1, 2.0)
    assert [type(number) for number in found] == [int, int, int, float]
    assert Sweep(objectives=["infonce"], root=tmp_path, save_every=float("inf")).save_every == float("inf")


@pytest.mark.parametrize(("save_every", "diagnose"), [(float("nan"), 0), (-1.0, 0), (1.0, -1)])
def test_train_refuses_a_time_or_step_that_is_none(save_every: float, diagnose: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(save_every|diagnose) must be .*(>= 0|finite)"):
        train(small(), tmp_path / "run", save_every, diagnose=diagnose)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    plain = TrainConfig(T="nca", P="sig", params={"tau": 5.0}, hidden=16, lr=0.5, seed=3)
    numpy = TrainConfig(
        T="nca", P="sig", params={"tau": np.float32(5)}, hidden=np.int64(16), lr=np.float64(0.5), seed=np.uint8(3)
    )
    assert plain == numpy
    for tau, hidden in ((torch.tensor([5]), torch.tensor(16)), (np.array([5.0]), np.array(16))):
        assert plain == TrainConfig(T="nca", P="sig", params={"tau": tau}, hidden=hidden, lr=0.5, seed=3)  # type: ignore[arg-type]
    assert TrainConfig(params=None) == TrainConfig()  # type: ignore[arg-type]
    for wrong in ([1], "tau", 3):
        with pytest.raises(TypeError, match="params must be numbers by name"):
            TrainConfig(params=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameter 'tau' must be a number, got Tensor"):
        TrainConfig(params={"tau": torch.tensor(1.0, device="meta")})
    with pytest.raises(ValueError, match="parameter 'tau' requires grad"):
        TrainConfig(params={"tau": torch.tensor(1.0, requires_grad=True)})
    with pytest.raises(TypeError, match="lr must be a number, got Tensor"):
        TrainConfig(lr=torch.tensor(1.0, requires_grad=True))
    assert json.loads(numpy.to_json()) == json.loads(plain.to_json())
    for wrong in ({"hidden": np.float64(16)}, {"hidden": np.bool_(True)}, {"lr": np.bool_(True)}, {"lr": "0.5"}):
        with pytest.raises(TypeError, match="must be a"):
            TrainConfig(**wrong)  # type: ignore[arg-type]
