"""Configuration, heads, sampler, loop, workers, sweep and search, on a small slice of the built-in data."""

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Killed, killed_after

import goal
from goal.training import Diverged, Incomplete, Sweep, TrainConfig, entries, loop, search, train
from goal.training.config import NAMING, SECTIONS, SETTINGS, WORDS
from goal.training.features import Sampler, features
from goal.training.heads import Head
from goal.training.systems import SYSTEMS
from goal.training.trained import load_trained, score
from goal.training.workers import Done, Failed, Job, Progress, work

SMALL: dict[str, Any] = {"limit": 120, "hidden": 16, "dim": 8, "batch": 40, "eval_every": 4, "warmup": 4}


def small(**changes: Any) -> TrainConfig:
    return TrainConfig(**SMALL | {"max_steps": 20} | changes)


# ---- configuration ---------------------------------------------------------------------------------------


def test_config_round_trip() -> None:
    config = TrainConfig(T="con", P="sig_ms", params={"margin": 0.1, "beta": 20}, lr=1, limit=7)
    assert TrainConfig.from_json(config.to_json()) == config
    label = "con(margin=0.1) × sig-ms(beta=20)"
    assert config.names == {"T": "con(margin=0.1)", "P": "sig-ms(beta=20)", "recipe": None, "label": label}
    assert config.params == {"margin": 0.1, "alpha": 2.0, "beta": 20.0, "lam": 0.5}


def test_config_shows_defaults_and_so_equals_the_same_written_out() -> None:
    assert TrainConfig() == TrainConfig(T="cir", P="sig-ms", mining="hardest", params={"tau": 10})
    assert TrainConfig().digest == TrainConfig(params={"tau": 10}).digest


def test_every_setting_changes_the_digest() -> None:
    changed: dict[str, Any] = {
        "objective": "nca × con", "data": "folder", "limit": 5, "seed": 1, "hidden": 3, "dim": 3, "dropout": 0.1,
        "batch": 3, "lr": 0.1, "weight_decay": 0.5, "warmup": 3, "clip": 1.0, "average": 0.5, "max_steps": 3,
        "eval_every": 3, "patience": 3, "drops": 3, "drop": 0.5, "dtype": "bfloat16", "device": "cpu:0", "threads": 3,
        "model": "scan", "optimiser": "Adam", "all_first": 1, "epochs": 2, "drop_epoch": 1, "curriculum": "mixup",
        "switch": "3",
    }  # fmt: skip
    of_words = {"texts": "features", "word_dim": 7}  # heads have none
    instead: dict[str, Any] = {"T": "nca", "P": "con", "recipe": "vse++", "mining": "all", "params": {"tau": 3.0}}
    instead["reduction"] = "sum"
    assert {*changed, *of_words} == set(SETTINGS)
    assert set(instead) == set(WORDS)
    epochs = {"all_first": {"eval_every": 0}}
    digests = [TrainConfig(**{name: value, **epochs.get(name, {})}).digest for name, value in changed.items()]
    digests += [TrainConfig(model="vse++", **{name: value}).digest for name, value in of_words.items()]
    digests += [TrainConfig(**{name: value}).digest for name, value in instead.items()]
    digests += [TrainConfig().digest, TrainConfig(model="vse++").digest]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"T": "circ"}, ValueError, "Did you mean 'cir'"),
        ({"recipe": "vse"}, ValueError, "vse0"),
        ({"recipe": "vse++", "T": "cir"}, ValueError, r"recipe must stand alone, got recipe='vse\+\+' and T='cir'"),
        ({"mining": "hard"}, ValueError, "mining"),
        ({"params": {"taus": 1.0}}, ValueError, "Known: .*tau"),
        ({"params": {"tau": -1.0}}, ValueError, "tau"),
        ({"params": {"tau": "x"}}, TypeError, "parameter 'tau' must be a number"),
        ({"recipe": "infonce", "params": {"margin": 0.1}}, ValueError, "Known: tau"),
        ({"lr": 0}, ValueError, "lr must be > 0, got 0"),
        ({"lr": math.nan}, ValueError, "lr must be finite"),
        ({"dropout": 1.5}, ValueError, "dropout must be >= 0 and <= 1, got 1.5"),
        ({"batch": 1}, ValueError, "batch must be a whole number >= 2"),
        ({"batch": 2.5}, TypeError, "batch must be a whole number"),
        ({"seed": True}, TypeError, "seed"),
        ({"data": 3}, TypeError, "data must be text"),
        ({"dtype": "float16"}, ValueError, "Known: float32, bfloat16"),
        ({"device": "abacus"}, ValueError, "device must be cpu, cuda"),
    ],
)
def test_config_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**changes)


def test_config_refuses_json_of_something_else() -> None:
    with pytest.raises(ValueError, match=r"a configuration has no setting 'learning_rate'\..*Known: objective, "):
        TrainConfig.from_json('{"learning_rate": 1}')


@pytest.mark.parametrize("name", goal.recipes())
def test_config_parameters_reach_the_objective(name: str) -> None:
    defaults = TrainConfig(recipe=name).params
    assert defaults
    for parameter, value in defaults.items():
        other = TrainConfig(recipe=name, params={parameter: value + 0.25})
        plain, changed = TrainConfig(recipe=name).build_objective(), other.build_objective()
        shown = [repr(o) + repr([p.tolist() for p in o.parameters()]) for o in (plain, changed)]
        assert shown[0] != shown[1], parameter


# ---- heads and batches -----------------------------------------------------------------------------------


def test_head_centres_its_features_and_ends_on_the_sphere_or_in_the_positive_orthant() -> None:
    features = torch.randn(6, 5)
    head = Head(5, 7, 4, 0.5, unit=True).eval()
    head.centre.copy_(torch.ones(5))
    assert torch.allclose(head(features).norm(dim=1), torch.ones(6))
    assert torch.allclose(head(features), head(1 + 3 * (features - 1)), atol=1e-6)
    orders = Head(5, 7, 4, 0.5, unit=False).eval()(features)
    assert (orders >= 0).all()
    assert not torch.allclose(orders.norm(dim=1), torch.ones(6))


def test_sampler_gives_different_images_with_captions_of_their_own() -> None:
    image_of = torch.tensor([2, 0, 1, 1, 0, 3, 4, 4, 4, 3])
    sampler = Sampler(image_of, batch=2, seed=0)
    seen, captions = [], set()
    for step in range(40):
        batch = sampler(step)
        assert image_of[batch.captions].tolist() == batch.images.tolist()
        seen.append(batch.images.tolist())
        captions |= set(batch.captions.tolist())
    for first, second in zip(seen[::2], seen[1::2], strict=True):  # two batches an epoch
        assert len({*first, *second}) == 4
    assert captions == set(range(10))
    again = Sampler(image_of, batch=2, seed=0)
    assert [again(step).images.tolist() for step in (31, 2, 30)] == [seen[31], seen[2], seen[30]]
    assert [Sampler(image_of, 2, seed=1)(step).images.tolist() for step in range(40)] != seen


def test_sampler_refuses_a_batch_beyond_the_images() -> None:
    with pytest.raises(ValueError, match="batch must be <= 3, the number of training images, got 4"):
        Sampler(torch.tensor([0, 1, 2]), batch=4, seed=0)


def test_features_limit_keeps_the_first_images_with_their_captions() -> None:
    whole, part = features("emoji", None), features("emoji", 30)
    assert torch.equal(part.train.x, whole.train.x[:30])
    assert part.train.image_of.tolist() == np.repeat(np.arange(30), 5).tolist()
    assert torch.equal(part.val.x, whole.val.x)
    assert part.fingerprints != whole.fingerprints
    with pytest.raises(ValueError, match="limit must be <= 1157: emoji has 1157 training images, got 2000"):
        features("emoji", 2000)


def test_features_average_regions_and_need_captions_as_features(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(4, 3, 6)).astype(np.float32), np.ones((8, 2), np.float32)
    for name in ("train", "val", "test"):
        np.save(tmp_path / f"{name}_ims.npy", x)
        (tmp_path / f"{name}_caps.txt").write_text("a word\n" * 8)
    with pytest.raises(ValueError, match=r"only text; put their features .*train_caps\.npy"):
        features(str(tmp_path), None)
    for name in ("train", "val", "test"):
        np.save(tmp_path / f"{name}_caps.npy", y)
    assert np.allclose(features(str(tmp_path), None).test.x, x.mean(1), atol=1e-6)


# ---- the loop --------------------------------------------------------------------------------------------


def test_train_learns_and_writes_its_folder(tmp_path: Path) -> None:
    config = small(max_steps=60, eval_every=20, lr=5e-3, recipe="infonce")
    rows: list[loop.Row] = []
    record = train(config, tmp_path, on_evaluation=rows.append)
    assert {row.pop("end") for row in rows} == {60}
    assert record["curve"] == rows == [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert record["test"]["rsum"] > 15  # chance is about 9
    assert rows[-1]["loss"] < rows[0]["loss"]
    names = {"config.json", "versions.json", "metrics.jsonl", "model.safetensors", "record.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert TrainConfig.from_json((tmp_path / "config.json").read_text()) == config
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert json.loads((tmp_path / "versions.json").read_text())["torch"] == torch.__version__


def test_the_validation_split_alone_chooses_the_weights(tmp_path: Path) -> None:
    record = train(small(lr=0.01, max_steps=40), tmp_path)
    best = max(record["curve"], key=lambda row: row["val_rsum"])
    assert (record["best_step"], record["best_val_rsum"]) == (best["step"], best["val_rsum"])
    assert record["best_step"] < record["steps"]  # or the last weights would do
    config, heads, *_ = load_trained(tmp_path)
    data = features("emoji", 120)
    assert score(config, heads, data.val).rsum == record["best_val_rsum"]
    assert score(config, heads, data.test).rsum == record["test"]["rsum"]
    assert score(config, heads, data.test).t2i_ranks.tolist() == record["ranks"]["t2i"]


def test_rate_warms_up_drops_on_a_plateau_and_then_training_ends(tmp_path: Path) -> None:
    config = small(eval_every=1, warmup=3, patience=2, lr=1e-9, drop=0.5, max_steps=500)  # nothing moves: a plateau
    record = train(config, tmp_path)
    rates = [row["lr"] / config.optimiser.lr for row in record["curve"]]
    assert record["stopped"] == "plateau"
    assert record["steps"] == record["best_step"] + 4
    assert rates[:2] == pytest.approx([2 / 3, 1])
    assert rates[-2:] == pytest.approx([0.5, 0.5])
    assert train(small(), tmp_path / "short")["stopped"] == "max_steps"


def test_a_drop_goes_back_to_the_best_weights(tmp_path: Path) -> None:
    # a rate that ruins the heads, then one that changes nothing
    config = small(lr=0.5, drop=1e-12, eval_every=2, patience=3, warmup=20, clip=100.0, max_steps=200)
    record = train(config, tmp_path)
    dropped = [row for row in record["curve"] if row["lr"] < 1e-9]
    before = [row for row in record["curve"] if row["lr"] >= 1e-9]
    assert before[-1]["val_rsum"] < record["best_val_rsum"]
    assert dropped[-1]["val_rsum"] == record["best_val_rsum"]


def test_the_tested_weights_are_a_running_mean(tmp_path: Path) -> None:
    run = loop._Run(small(average=0.5, warmup=0), features("emoji", 120), tmp_path)
    expected = run.model.x.inner.weight.detach().clone()
    for step in range(20):
        run._step()
        run.state.step += 1
        keep = min(0.5, (step + 1) / (step + 10))
        expected = keep * expected + (1 - keep) * run.model.x.inner.weight.detach()
    assert torch.allclose(run.mean.x.inner.weight, expected, atol=1e-6)
    assert not torch.allclose(run.mean.x.inner.weight, run.model.x.inner.weight, atol=1e-6)


@pytest.mark.parametrize("objective", [{"T": "cir", "P": "sig-ms"}, {"recipe": "siglip"}, {"recipe": "order0"}])
def test_a_killed_run_ends_with_the_same_bits(objective: dict[str, Any], tmp_path: Path) -> None:
    config = small(**objective, max_steps=24, patience=2)
    train(config, tmp_path / "whole")
    for evaluations in (3, 1):
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", save_every=0, on_evaluation=killed_after(evaluations))
    assert (tmp_path / "killed" / "checkpoint.safetensors").is_file()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "loss": 0.1}\n{"step": 2')  # rows after the checkpoint, the last one half-written
    (tmp_path / "killed" / ".record.json.x1y2").write_text('{"half')  # a write that never ended
    steps: list[float] = []
    train(config, tmp_path / "killed", on_evaluation=lambda row: steps.append(row["step"]))
    assert steps[0] > 4  # it did not begin again
    for name in ("record.json", "metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_a_run_that_is_killed_between_evaluations_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(eval_every=8, max_steps=16)
    train(config, tmp_path / "whole")
    taken, step = [], loop._Run._step

    def counted(run: loop._Run) -> float:
        taken.append(run.state.step)
        if len(taken) == 6:
            raise Killed
        return step(run)

    monkeypatch.setattr(loop._Run, "_step", counted)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed", save_every=0)
    train(config, tmp_path / "killed")
    assert taken == [*range(6), *range(5, 16)]
    for name in ("record.json", "metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_checkpoints_come_when_they_are_due_and_take_a_small_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, saves = [0.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def save(run: loop._Run) -> None:
        saves.append(clock[0])
        clock[0] += 3

    monkeypatch.setattr(loop._Run, "save", save)
    run = loop._Run(small(), features("emoji", 120), tmp_path, save_every=10)
    for now in (9.0, 10.0, 50.0, 72.0, 73.0):  # the first save took 3 s: the next comes 60 s after it
        clock[0] = now
        run.save_if_due()
    assert saves == [10.0, 73.0]


def test_a_run_that_has_ended_is_not_run_again_and_not_mixed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = train(small(), tmp_path)
    assert train(small(), tmp_path, on_evaluation=killed_after(0)) == record
    with pytest.raises(ValueError, match="another configuration"):
        train(small(seed=1), tmp_path)
    changed = features("emoji", 120)._replace(fingerprints={"train": "other"})
    monkeypatch.setattr(loop, "features", lambda *asked: changed)
    with pytest.raises(ValueError, match="other features"):
        train(small(), tmp_path)


def test_other_versions_begin_a_half_finished_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        train(small(), tmp_path, save_every=0, on_evaluation=killed_after(2))
    monkeypatch.setattr(goal, "__version__", "0.0.0")
    steps: list[float] = []
    train(small(), tmp_path, on_evaluation=lambda row: steps.append(row["step"]))
    assert steps[0] == 4
    assert json.loads((tmp_path / "versions.json").read_text())["goal"] == "0.0.0"


@pytest.mark.parametrize("objective", [{"T": "con", "P": "lin"}, {"recipe": "infonce"}])
def test_what_is_not_finite_stops_the_run_and_says_where(objective: dict[str, Any], tmp_path: Path) -> None:
    config = small(**objective, lr=1e38, warmup=0, clip=1e30)
    with pytest.raises(Diverged, match=rf"{re.escape(config.label)}, seed 0: .* is (nan|inf) at step \d"):
        train(config, tmp_path)
    assert not (tmp_path / "record.json").exists()


def test_train_leaves_the_callers_threads_and_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train(small(max_steps=4, threads=threads + 1), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_load_trained_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        load_trained(tmp_path)


# ---- workers ---------------------------------------------------------------------------------------------


def _double(number: int, on_evaluation: Callable[[dict[str, float]], None]) -> int:
    on_evaluation({"number": number})
    if number == 2:
        raise ValueError("two is refused")
    if number == 3:
        os._exit(7)
    return 2 * number


def test_workers_do_all_jobs_and_tell() -> None:
    events = list(work([Job(str(n), _double, (n,)) for n in (1, 2, 4)], workers=2))
    assert {event.key: event.result for event in events if isinstance(event, Done)} == {"1": 2, "4": 8}
    assert [event for event in events if isinstance(event, Failed)] == [Failed("2", "two is refused")]
    assert len([event for event in events if isinstance(event, Progress)]) == 3


def test_a_job_whose_process_dies_fails_alone() -> None:
    events = list(work([Job(str(n), _double, (n,)) for n in (3, 1, 4)], workers=1))
    ((died,), done) = ([event for event in events if isinstance(event, kind)] for kind in (Failed, Done))
    assert died == Failed("3", "its process died with exit code 7 (is memory short?)")
    assert [event.result for event in done] == [2, 8]


# ---- sweep and search ------------------------------------------------------------------------------------


def test_entries_are_the_grid_and_the_recipes_and_share_runs() -> None:
    found = entries()
    assert len(found) == 15 + len(goal.recipes())
    by_label = {entry.names["label"]: entry for entry in found}
    assert by_label["con(margin=0.2) × lin"].config.params["margin"] == 0.2
    assert by_label["binomial-deviance"].config.params.get("margin") is None
    shared = {"circle": "cir × lin", "nca": "nca × con", "goal": "cir × sig-ms"}
    assert {recipe: by_label[recipe].config for recipe in shared} == {
        recipe: by_label[cell].config for recipe, cell in shared.items()
    }
    assert len({entry.config for entry in found}) == len(found) - len(shared)
    assert by_label["circle"].names == {"T": "-", "P": "-", "recipe": "circle", "label": "circle"}
    with pytest.raises(ValueError, match=r"P='lim' is not known. .*Known: con, lin, .* in 'cir:▶lim'"):
        entries(["cir:lin", "cir:lim"])


def test_sweep_refuses_before_it_trains(tmp_path: Path) -> None:
    for changes, message in (
        ({"seeds": 0}, "seeds must be a whole number >= 1"),
        ({"trials": -1}, "trials must be a whole number >= 0"),
        ({"workers": 0}, "workers must be a whole number >= 1"),
        ({"limit": 20}, "batch must be <= 20, the number of training images, got 128"),
        ({"data": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            Sweep(root=tmp_path, **changes)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_sweep_names_its_folder_by_what_is_asked() -> None:
    assert Sweep().folder == Path("runs/emoji")
    assert Sweep(quick=True, trials=3).folder == Path("runs/emoji-quick-tune3")
    assert Sweep(name="mine").folder == Path("runs/mine")


def test_a_run_that_fails_leaves_the_others_and_is_told(tmp_path: Path) -> None:
    sweep = Sweep(objectives=["infonce", "cir:lin"], seeds=1, root=tmp_path, **SMALL | {"max_steps": 4})
    blocked = sweep.folder / "runs" / sweep.entries[1].seeded(0).run_name
    blocked.parent.mkdir(parents=True)
    blocked.touch()  # a file where the folder of cir × lin should be
    with pytest.raises(Incomplete, match=r"1 of the runs failed.*\n.*cir-lin.*File exists"):
        sweep.run()
    assert [record["label"] for record in sweep.records()] == ["infonce"]
    assert "infonce" in (sweep.folder / "table.md").read_text()


def test_search_keeps_to_validation_counts_trials_and_resumes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "score", None)  # the test split's: a call would fail
    config = small(T="con", P="sig", params={"margin": 0.2}, max_steps=8)
    found = search(config, 4, tmp_path / "whole")
    told = json.loads((tmp_path / "whole" / "tuning.json").read_text())
    assert len(told["trials"]) == 4
    assert {name: told["trials"][0][name] for name in config.params} == config.params
    assert told["trials"][0]["lr"] == config.optimiser.lr
    assert len({trial["margin"] for trial in told["trials"]}) == 4
    best = max(told["trials"], key=lambda trial: trial["val_rsum"])
    assert {"lr": found.optimiser.lr, **found.params} == {name: best[name] for name in ("lr", *found.params)}
    assert found == config.replace(lr=found.optimiser.lr, params=found.params)

    evaluations = 0

    def kill(row: loop.Row) -> None:
        nonlocal evaluations
        evaluations += 1
        if evaluations == 6:  # in the third trial
            raise Killed

    with pytest.raises(Killed):
        search(config, 4, tmp_path / "killed", 0, on_evaluation=kill)
    assert search(config, 4, tmp_path / "killed") == found
    assert json.loads((tmp_path / "killed" / "tuning.json").read_text()) == told


def test_a_diverged_trial_counts_as_nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def diverge(config: TrainConfig, *_: Any, **__: Any) -> dict[str, Any]:
        calls.append(config)
        if len(calls) > 1:
            raise Diverged("at step 1")
        return {"best_val_rsum": 3.0}

    monkeypatch.setattr(sys.modules["goal.training.tune"], "train", diverge)
    assert search(small(), 3, tmp_path) == small()
    assert [t["val_rsum"] for t in json.loads((tmp_path / "tuning.json").read_text())["trials"]] == [3.0, 0.0, 0.0]


# ---- files of settings -----------------------------------------------------------------------------------

TOML = """
objective = "cir(tau=5) × sig-ms | semi-hard(margin=0.1)"
seed = 3

[model]
name = "heads"
hidden = 64

[optimiser]
lr = 1e-3

[stopping]
max_steps = 20
"""
NESTED = {
    "objective": {"spec": "cir(tau=5) × sig-ms | semi-hard(margin=0.1)", "switch": "plateau"},
    "model": {"hidden": 64},
    "optimiser": {"lr": 1e-3},
    "stopping": {"max_steps": 20},
    "seed": 3,
}
SAME = TrainConfig(T="cir", P="sig-ms", params={"tau": 5}, mining="semi-hard(margin=0.1)", hidden=64, lr=1e-3,
                   max_steps=20, seed=3)  # fmt: skip


def test_a_file_python_and_sections_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "b.json").write_text(json.dumps(NESTED))
    (tmp_path / "c.json").write_text(SAME.to_json())
    (tmp_path / "d.json").write_text(json.dumps({"T": "cir", "P": "sig-ms", "mining": "semi-hard(margin=0.1)",
        "params": {"tau": 5}, "hidden": 64, "lr": 1e-3, "max_steps": 20, "seed": 3}))  # fmt: skip
    assert {TrainConfig.read(path) for path in sorted(tmp_path.iterdir())} == {SAME}
    assert TrainConfig(**NESTED) == SAME
    assert TrainConfig(**vars(SAME)) == SAME  # of sections as they are


def test_changes_go_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(TOML)
    assert TrainConfig.read(path, lr=0.5, hidden=8) == SAME.replace(lr=0.5, hidden=8)
    assert TrainConfig.read(path, model={"hidden": 8}).optimiser.lr == 1e-3
    assert TrainConfig.read(path, recipe="vse++").label == "vse++"  # its mining was the file's objective's
    assert TrainConfig.read(path, mining="all").label == "cir(tau=5) × sig-ms | all"
    assert TrainConfig.read(path, params={"mining.margin": 0.3}).params["mining.margin"] == 0.3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "", r"a\.yaml: must be a \.toml or a \.json file"),
        ("a.toml", "lr = ", r"a\.toml: cannot be read: Invalid value"),
        ("a.json", "{", r"a\.json: cannot be read: "),
        ("a.json", "[" * 100_000, r"a\.json: cannot be read: "),
        ("a.json", b"\xff", r"a\.json: cannot be read: .*codec"),
        ("a.json", "[1]", r"a\.json: must hold settings by name, got list"),
        ("a.json", '{"lrr": 1}', r"no setting 'lrr'\. Did you mean 'lr'\? Known: objective, "),
        ("a.toml", "[optimiser]\nhidden = 1", r"optimiser has no setting 'hidden'\. Known: name, batch, lr, "),
        ("a.toml", "[stopping]\nmax_step = 1", r"stopping has no setting 'max_step'\. Did you mean 'max_steps'"),
        ("a.toml", 'stopping = "soon"', r"stopping must be settings by name, got str \('soon'\)"),
        ("a.toml", "model = 3", r"model must be text, got int \(3\)"),
        ("a.toml", "[optimiser]\nlr = true", "lr must be a number, got bool"),
        ("a.toml", "[model]\nhidden = 8.5", r"hidden must be a whole number >= 1, got 8\.5"),
        (
            "a.toml",
            'objective = "cir × con"\nP = "lin"',
            "objective must stand alone, got objective='cir × con' and P=",
        ),
        ("a.toml", 'recipe = "cir × con"', "recipe must be one of goal recipes, got 'cir × con'"),
    ],
)
def test_a_file_that_says_something_else_is_refused(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig.read(tmp_path / name)
    with pytest.raises(ValueError, match=r"nowhere\.toml: no such file"):
        TrainConfig.read(tmp_path / "nowhere.toml")


def test_a_name_on_its_own_goes_over_its_section() -> None:
    for settings in ({"optimiser": {"lr": 1, "clip": 3}, "lr": 0.5}, {"lr": 0.5, "optimizer": {"lr": 1, "clip": 3}}):
        config = TrainConfig(**settings)
        assert (config.optimiser.lr, config.optimiser.clip, config.optimiser.name) == (0.5, 3, "AdamW")
    assert dataclasses.replace(SAME, seed=4, device="cpu:0") == SAME.replace(seed=4, device="cpu:0")


def test_no_setting_is_there_twice() -> None:
    names = [f.name for kind in SECTIONS.values() for f in dataclasses.fields(kind) if f.name not in NAMING]
    names += [*SECTIONS, *(f.name for f in dataclasses.fields(TrainConfig) if f.name not in SECTIONS), *WORDS]
    assert len(names) == len(set(names))
    assert set(SETTINGS) == {*names} - {*WORDS, "stopping"}


@pytest.mark.parametrize("model", SYSTEMS)
def test_every_models_configuration_reads_back(model: str) -> None:
    for config in (TrainConfig(model=model), TrainConfig(model=model, objective="nca(tau=3) × lin | hardest")):
        assert TrainConfig.from_json(config.to_json()) == config
        assert config.replace() == config
        assert config.replace(seed=1) != config
        assert re.fullmatch(r"[A-Za-z0-9+-]+-s0-[0-9a-f]{10}", config.run_name)


# ---- objectives as texts in sweeps and searches ----------------------------------------------------------


def test_a_sweep_takes_any_objective() -> None:
    texts = ["cir:lin", "cir(tau=5) × lin", "con × lin | semi-hard", "vse++ | reduction=mean", "circle", "cir × lin"]
    found = entries(texts)
    assert [entry.names["label"] for entry in found] == [
        "cir × lin", "cir(tau=5) × lin", "con(margin=0.2) × lin | semi-hard", "vse++ | reduction=mean", "circle"
    ]  # fmt: skip
    assert [entry.names["T"] for entry in found] == ["cir", "cir(tau=5)", "-", "-", "-"]
    assert [entry.names["recipe"] for entry in found[2:4]] == [entry.names["label"] for entry in found[2:4]]
    assert found[0].config == found[4].config
    for setting in ({"T": "cir"}, {"objective": "vse++"}, {"mining": "all"}, {"params": {"tau": 1}}):
        with pytest.raises(ValueError, match=f"^{next(iter(setting))} cannot be set: a sweep has objectives"):
            entries(**setting)


def test_parameters_of_a_rule_and_of_the_users_own_terms_are_searched(
    tmp_path: Path, registries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal.triplet_weight("my-gain")(lambda s_pos, s_neg, *, gain=2.0, shift=0.0: 0 * s_neg + gain)
    monkeypatch.setattr(sys.modules["goal.training.tune"], "train", lambda config, *_, **__: {"best_val_rsum": 1.0})
    found = {}
    for text in ("my-gain × con | semi-hard", "nca × con | all", "con × con | selective(eps=0)"):
        search(small(objective=text), 8, tmp_path)
        trials = json.loads((tmp_path / "tuning.json").read_text())["trials"]
        found |= {name: [trial[name] for trial in trials] for name in trials[0]}
    assert found["gain"][0] == 2.0
    assert all(0.2 <= gain <= 20 for gain in found["gain"])
    assert all(0 <= shift <= 1 for shift in found["shift"])
    assert all(0.01 <= margin <= 0.5 for margin in found["mining.margin"])
    assert {*found["mining.average"]} == {True, False}
    assert all(0 <= eps <= 1 for eps in found["mining.eps"])
    assert all(len({*found[name]}) > 1 for name in ("gain", "shift", "mining.margin", "mining.eps"))
