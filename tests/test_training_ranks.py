"""`goal train --distributed`: two ranks end where one process ends, under torchrun itself and in two lasting processes.

A start of torchrun is three processes that import PyTorch. So what is said of ranks, and not of torchrun, is shown by
two that begin once and make one training after another, each in a group of its own.
"""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import Killed, forking, killed_after

import goal
from goal.cli import main
from goal.data.files import Busy
from goal.distributed import joined
from goal.training import TrainConfig, loop, train
from goal.training.trained import load_trained

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "limit": 120, "hidden": 16, "dim": 8, "batch": 37, "dropout": 0.0, "eval_every": 5, "max_steps": 15, "warmup": 0,
    "lr": 5e-3,
}  # fmt: skip


def command(folder: Path, *arguments: str) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return ["train", "--distributed", *options, *arguments, "--root", str(folder.parent), "--name", folder.name]


class Outcome(NamedTuple):
    """What a rank has made of a call."""

    result: Any
    stdout: str
    stderr: str


def life(rank: int, pipe: Connection) -> None:
    """Of a rank: it makes calls until nobody asks for more. Its environment is what torchrun's agent would set."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for port, function, arguments in iter(pipe.recv, None):
        os.environ["MASTER_PORT"] = str(port)
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            result = function(*arguments)
        pipe.send(Outcome(result, out.getvalue(), err.getvalue()))


Together = Callable[..., list[Outcome]]


@pytest.fixture(scope="module")
def together() -> Iterator[Together]:
    """A call of a function on two ranks, which begin once; each call has a store of its own, where a group meets."""
    context = forking()
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=life, args=(rank, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)

    def call(function: Callable[..., Any], *arguments: Any) -> list[Outcome]:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        for pipe in pipes:
            pipe.send((store.port, function, arguments))
        assert all(pipe.poll(60) for pipe in pipes), "a rank does not answer"
        return [pipe.recv() for pipe in pipes]

    yield call
    for pipe, process in zip(pipes, processes, strict=True):
        with suppress(BrokenPipeError):  # it has died: see its exit code
            pipe.send(None)
        process.join(30)
        process.kill()
        process.join()
        assert process.exitcode == 0


def assert_alike(record: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same but for the order of sums."""
    assert [row["step"] for row in record["curve"]] == [row["step"] for row in expected["curve"]]
    for name in ("loss", "s_pos", "s_neg"):
        found, wanted = ([row[name] for row in each["curve"]] for each in (record, expected))
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5), name
    assert record["test"]["rsum"] == pytest.approx(expected["test"]["rsum"], abs=1.5)  # a rank or two


def test_two_ranks_end_where_one_process_ends(tmp_path: Path) -> None:
    """Under torchrun; and they end well after the pictures of a diagnosis, which leave circles that hold the group."""
    expected = train(TrainConfig(**SMALL), tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "goal"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    asked = [*torchrun, *command(tmp_path / "two", "--diagnose=5")]
    ran = subprocess.run(asked, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("best validation RSUM") == 1  # one rank speaks
    assert_alike(json.loads((tmp_path / "two" / "record.json").read_text()), expected)
    weights = [load_trained(tmp_path / name).model.state_dict() for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert torch.allclose(weights[1][name], weight, atol=1e-4), name
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert (tmp_path / "two" / "diagnosis.png").exists()


def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path, together: Together) -> None:
    expected = train(TrainConfig(**SMALL), tmp_path / "one")

    with pytest.raises(Killed):
        train(TrainConfig(**SMALL), tmp_path / "two", save_every=0, on_evaluation=killed_after(1))
    assert (tmp_path / "two" / "checkpoint.safetensors").exists()
    ranks = together(main, command(tmp_path / "two"))
    assert [rank.result for rank in ranks] == [0, 0], ranks
    assert "best validation" in ranks[0].stdout
    assert "step 5 " not in ranks[0].stdout  # it did not begin again
    assert ranks[1].stdout == ""
    assert_alike(json.loads((tmp_path / "two" / "record.json").read_text()), expected)
    again = together(main, command(tmp_path / "two"))  # it has ended: this is its record
    assert [rank.result for rank in again] == [0, 0], again
    assert "step" not in again[0].stdout.split("best validation")[0]
    assert again[1].stdout == ""


def imported() -> tuple[str, bool]:
    return goal.__file__, "interpreter" in sys.modules


def test_ranks_import_what_is_tested(together: Together) -> None:
    assert [rank.result for rank in together(imported)] == [imported()] * 2


def circle() -> None:
    def trains() -> Any:
        try:
            raise ValueError
        except ValueError as error:
            kept = error  # noqa: F841 — and its traceback holds this frame: such are left by matplotlib, for one
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))  # noqa: F841
        return weakref.ref(dist.group.WORLD)

    gc.disable()  # the circle is there until it is looked for
    try:
        with joined():
            group = trains()
            assert group() is not None
        assert group() is None
    finally:
        gc.enable()


def test_the_group_is_gone_at_the_end(together: Together) -> None:
    """Gloo's threads, which a group has until it is freed, abort a process that ends beside them."""
    together(circle)


def test_without_torchrun_it_is_said_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["train", "--distributed"]) == 2
    assert "torchrun --nproc-per-node 2 -m goal train --distributed" in capsys.readouterr().err


def test_torchrun_without_distributed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--root", str(tmp_path)]) == 2
    assert "--distributed must be given: torchrun has started 2 processes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_tells_how_to_go_on(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("goal.cli._eval", mock.Mock(side_effect=KeyboardInterrupt))
    assert main(["eval", "--x", "a.npy", "--y", "b.npy"]) == 130
    told = "torchrun --nproc-per-node 4 -m goal eval --x a.npy --y b.npy"
    assert (told in capsys.readouterr().err) == (rank == "0")


@pytest.mark.parametrize(
    "changes",
    [{"recipe": "siglip"}, {"curriculum": "plain", "switch": "few-semi-hard"}, {"curriculum": "mixup", "switch": "1"}],
)
def test_losses_of_the_whole_batch(changes: dict[str, str], tmp_path: Path, together: Together) -> None:
    """Yardsticks and made rows, which every rank computes whole; a curriculum that counts anchors of all ranks."""
    changed = (f"--{name}={of}" for name, of in changes.items())
    ranks = together(main, command(tmp_path / "two", *changed, "--diagnose=5"))
    assert [rank.result for rank in ranks] == [0, 0], ranks
    if changes.get("curriculum") != "mixup":  # that draws other mixtures
        expected = train(TrainConfig(**SMALL, **changes), tmp_path / "one")
        assert_alike(json.loads((tmp_path / "two" / "record.json").read_text()), expected)
    rows = [json.loads(line) for line in (tmp_path / "two" / "diagnosis.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert (tmp_path / "two" / "diagnosis.png").exists()


def test_what_ranks_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="scan makes similarities"):
        train(TrainConfig(model="scan"), tmp_path / "run", distributed=True)
    with pytest.raises(ValueError, match="batch must be >= 3, the number of ranks, got 2"):
        train(TrainConfig(batch=2), tmp_path / "run", distributed=True)
    assert not (tmp_path / "run").exists()


def test_ranks_share_a_batch_and_draw_their_own_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(nn_parallel(), "DistributedDataParallel", lambda module: module)
    rows, drawn = [], []

    class Seen(Exception):
        pass

    def loss_of(encode: object, objective: object, x: torch.Tensor, y: object, ids: torch.Tensor) -> None:
        rows.append(ids.tolist())
        drawn.append(torch.rand(3).tolist())
        raise Seen

    monkeypatch.setattr("goal.training.systems.loss_of", loss_of)
    config = TrainConfig(**SMALL)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        run = loop._Run(config, loop.read(config), tmp_path, distributed=True)
        with pytest.raises(Seen):
            run._step()
    assert [len(each) for each in rows] == [19, 18]
    assert np.concatenate(rows).tolist() == run.sampler(0).images.tolist()
    assert drawn[0] != drawn[1]


def test_rank_0_decides_how_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks may see other files, in a folder of their own or while rank 0 begins anew."""
    config = TrainConfig(**SMALL)
    with pytest.raises(Killed):
        train(config, tmp_path / "one", save_every=0, on_evaluation=killed_after(1))
    first = loop._Run(config, loop.read(config), tmp_path / "one")
    said = first._checkpoint()
    assert said is not None
    first.versions = first.versions | {"goal": "0.0.0"}
    assert first._checkpoint() is None
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(nn_parallel(), "DistributedDataParallel", lambda module: module)

    def broadcast(box: list[Any]) -> None:
        assert box == [None, None]  # nothing was read here
        box[0] = said

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    for folder in ("one", "elsewhere"):
        run = loop._Run(config, loop.read(config), tmp_path / folder, distributed=True)
        assert run.restore()
        assert run.state.step == said[0].step > 5
        assert all(torch.equal(kept, said[1]["best"][name]) for name, kept in run.best.items())
        assert run.optimizer.state_dict()["state"]
    record = {"ended": True}
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box: box.__setitem__(0, record))
    assert train(config, tmp_path / "none", distributed=True) == record
    refused = Busy("one: is in use by process 1")
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box: box.__setitem__(1, refused))
    with pytest.raises(Busy, match="process 1"):  # on all ranks, which would wait for it else
        train(config, tmp_path / "none", distributed=True)


def test_the_share_of_semi_hard_negatives_is_that_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**SMALL, curriculum="plain", switch="few-semi-hard")
    run = loop._Run(config, loop.read(config), tmp_path)
    run._step()
    index = torch.tensor([[3, -1, -1, 0], [-1, -1, -1, 2]])  # of rank 0: 3 of 8
    monkeypatch.setattr(goal.Objective, "stats", mock.Mock(index=index))
    monkeypatch.setattr(dist, "all_reduce", lambda counts: counts.add_(torch.tensor([1, 2])))  # of rank 1: 1 of 2
    assert run._share() == pytest.approx(4 / 10)


def nn_parallel() -> Any:
    return torch.nn.parallel


def test_the_gradient_is_averaged_as_the_models_is() -> None:
    """AdamW would not show a wrong factor in a run."""
    for objective in (TrainConfig(), TrainConfig(recipe="vse++"), TrainConfig(model="vse-infinity")):
        made = objective.build_objective(group="world")
        for stage in getattr(made, "stages", [made]):
            assert stage.ranks.averaged
            assert stage.ranks.group == "world"
        alone = objective.build_objective()
        assert all(stage.ranks is None for stage in getattr(alone, "stages", [alone]))
