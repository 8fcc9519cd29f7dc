"""The experiments, on a scale on which they are only seen to measure what they say."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import inline

import goal
from benchmarks import full_size
from benchmarks.experiments import clipping, cold_start, collect, curriculum, hinges, runs, systems
from goal.training import TrainConfig, TrainingError, sweep
from goal.training.features import Split, split

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts() -> tuple[Split, Split]:
    training, validation = (split(goal.data.load("emoji", name)) for name in ("train", "val"))
    return training, validation


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are made in this process: a worker would first import PyTorch."""
    for module in (runs, sweep):
        monkeypatch.setattr(module, "work", inline())


def test_deeper_networks_begin_nearer_to_one_point(parts: tuple[Split, Split]) -> None:
    """And there hardest negatives vanish, which is what the experiment is about."""
    shares = []
    for depth in (1, 6):
        run = cold_start.Run("hardest", depth, 0, 1)
        shares.append(cold_start.train(run, *parts)["vanished"][0])
    assert shares[0] < 0.2 < 0.8 < shares[1]


def test_a_shallow_network_leaves_chance_and_the_step_is_told(parts: tuple[Split, Split]) -> None:
    record = cold_start.train(cold_start.Run("all", 1, 0, 41), *parts)
    assert record["left_chance"] in (20, 40)
    assert record["recall"] >= cold_start.LEFT * record["chance"]
    assert record["chance"] == 1 / len(parts[1].x)
    nothing = cold_start.train(cold_start.Run("hardest", 6, 0, 21), *parts)
    assert nothing["left_chance"] is None


def test_recall_is_that_of_the_embeddings(parts: tuple[Split, Split]) -> None:
    torch.manual_seed(0)
    nets = cold_start.network(1280, 1), cold_start.network(384, 1)
    x, y = (torch.nn.functional.normalize(net(rows), dim=1) for net, rows in zip(nets, parts[1][:2], strict=True))
    s = (x @ y.T).detach()
    of_images = (parts[1].image_of[s.argmax(1)] == torch.arange(len(x))).double().mean()
    of_captions = (s.argmax(0) == parts[1].image_of).double().mean()
    assert of_images + of_captions > 0
    assert cold_start._recall(nets, parts[1]) == pytest.approx((of_images + of_captions).item() / 2, rel=1e-6)


def test_networks_end_without_a_relu() -> None:
    layers = cold_start.network(10, 3)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_a_killed_experiment_goes_on_and_prints_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--seeds", "2", "--depths", "1", "--steps", "3", "--folder", str(tmp_path / "runs")]
    assert cold_start.main(small) == 0
    whole = capsys.readouterr().out
    path = tmp_path / "runs" / "runs.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * len(cold_start.MININGS)
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # killed while it wrote
    trained = []
    train = cold_start.train
    monkeypatch.setattr(cold_start, "train", lambda run, *parts: trained.append(run) or train(run, *parts))
    assert cold_start.main(small) == 0
    assert capsys.readouterr().out == whole
    assert len(trained) == len(lines) - 3
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(line) for line in lines]


def test_the_table_says_how_many_left_chance() -> None:
    common = {"depth": 2, "steps": 9, "chance": 0.01}
    records = [
        {**common, "mining": "hardest", "seed": 0, "left_chance": None, "recall": 0.01, "vanished": [1.0, 0.9, 0.8]},
        {**common, "mining": "hardest", "seed": 1, "left_chance": 40, "recall": 0.05, "vanished": [1.0, 0.7, 0.6]},
    ]
    assert cold_start.table(records).splitlines()[2] == ("| 2 | hardest | 1 of 2 | 40 | 100 ± 0 | 80 ± 14 | 3 ± 2.8 |")


# ---- runs of a training configuration --------------------------------------------------------------------


def test_sign_flips_by_hand() -> None:
    assert runs.sign_flip([1.0]) == 1.0
    assert runs.sign_flip([1.0, 1.0, 1.0, 1.0]) == 2 / 16
    assert runs.sign_flip([3.0, 1.0, 1.0, -1.0]) == 8 / 16  # 6 once, 4 three times, both signs
    assert runs.sign_flip([0.0, 0.0]) == 1.0


TINY = TrainConfig(recipe="infonce", hidden=4, dim=4, batch=16, limit=40, eval_every=2, max_steps=4)


def test_runs_come_in_order_and_are_not_trained_twice(tmp_path: Path) -> None:
    """By worker processes; in this file only here."""
    configs = [TINY, dataclasses.replace(TINY, lr=1e-3)]
    first = runs.trained(configs, 2, tmp_path, workers=1)
    assert [[run["params"]["lr"] for run in group] for group in first] == [[5e-4] * 2, [1e-3] * 2]
    assert [run["seed"] for run in first[0]] == [0, 1]
    begun = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/record.json")}
    assert runs.trained(configs, 2, tmp_path, workers=1) == first
    assert begun == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/record.json")}
    assert len(begun) == 4


@pytest.mark.usefixtures("here")
def test_a_run_that_fails_is_told_when_the_others_have_ended(tmp_path: Path) -> None:
    bad = dataclasses.replace(TINY, lr=1e38, warmup=0, clip=1e30)
    with pytest.raises(TrainingError, match="infonce, seed 0: the"):
        runs.trained([bad, TINY], 1, tmp_path, workers=1)
    assert len(list(tmp_path.glob("*/record.json"))) == 1


def test_the_curriculum_is_compared_with_semi_hard_by_seed() -> None:
    def record(mean: float, step: int) -> dict[str, object]:
        return {"test": {"mean": mean, "x2y": mean - 1, "y2x": mean + 1}, "best_step": step}

    found = curriculum.table(
        {"semi-hard": [record(10, 50), record(12, 100)], "hardest": [record(11, 20), record(14, 30)]}, [6.0, 6.5]
    )
    assert found.splitlines()[2:] == [
        "| semi-hard | 11.0 ± 1.4 | 10.0 ± 1.4 | 12.0 ± 1.4 | 75 |  |  |",
        "| hardest | 12.5 ± 2.1 | 11.5 ± 2.1 | 13.5 ± 2.1 | 25 | +1.5 | 0.5 |",
        "| random order | 6.2 ± 0.4 |  |  |  |  |  |",
    ]


def test_a_random_order_has_about_the_share_of_a_class() -> None:
    labels = np.arange(400) % 4
    assert np.mean(curriculum.random_order(labels, 3)) == pytest.approx(25, abs=1.5)


@pytest.mark.usefixtures("here")
def test_the_curriculum_runs_on_labelled_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "val", "test"):
        audio, visual = (rng.standard_normal((160, 4)).astype(np.float32) for _ in range(2))
        np.savez(tmp_path / f"{name}.npz", audio=audio, visual=visual, labels=np.arange(160) % 5)
    arguments = ["--data", str(tmp_path), "--seeds", "1", "--max-steps", "3", "--folder", str(tmp_path / "out")]
    assert curriculum.main([*arguments, "--workers", "1"]) == 0
    told = capsys.readouterr().out
    for way in (*curriculum.SINGLE, *curriculum.TWO_STAGES, "random order"):
        assert f"| {way} |" in told or f"| semi-hard, then {way} |" in told
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 7


@pytest.mark.filterwarnings("ignore:.*most words are unknown")
@pytest.mark.usefixtures("here")
def test_the_four_hinges_are_what_they_are_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--seeds", "1", "--epochs", "1", "--limit", "64", "--workers", "1", "--folder", str(tmp_path)]
    assert hinges.main(small) == 0
    told = capsys.readouterr().out
    assert "# emoji, released rates" in told
    assert "# emoji, faster rates" in told
    for name in ("vse0", "vse++", "order0", "order++(margin=0.2)"):  # a margin of 0.05 is order++'s own
        assert f"| {name} |" in told
    options = argparse.Namespace(data="emoji", epochs=3, limit=None)
    shown = [str(config.build_objective()) for config in hinges.configs(options, 1.0)]
    assert shown == [
        "Objective(con(margin=0.2) × con | all(average=false) | reduction=sum)",
        "Objective(con(margin=0.2) × con | reduction=sum)",
        "Objective(con(margin=0.05) × con | all(average=false) | similarity=order | reduction=sum)",
        "Objective(con(margin=0.2) × con | similarity=order | reduction=sum)",
    ]


@pytest.mark.usefixtures("here")
def test_systems_print_a_table_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "grid"
    data.mkdir()
    for name in ("train", "val", "test"):
        np.save(data / f"{name}_ims.npy", (rng.standard_normal((70, 3, 5)) * [1, 2, 3, 4, 5] + 7).astype(np.float16))
        (data / f"{name}_caps.txt").write_text("a dog\n" * 140)
    small = ["--data", str(data), "--models", "rvse++", "--objectives", "cir:lin", "t-selhn", "--seeds", "1"]
    for _ in range(2):  # the second time nothing is trained
        assert systems.main([*small, "--epochs", "1", "--workers", "1", "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "rvse++ of 64 dimensions, batch 64, AdamW at 0.001, 1 epochs, 1 seeds" in told
    assert told.count("5 of 5 principal components hold 100.0 % of the variance") == 1
    parts = np.load(tmp_path / f"grid-{systems.COMPONENTS}" / "train_ims.npy").reshape(-1, 5)
    assert np.allclose(parts.mean(0), 0, atol=1e-4)
    scatter = np.cov(parts.T, bias=True)
    assert np.allclose(scatter, np.diag(np.diag(scatter)), atol=1e-3)
    assert np.trace(scatter) == pytest.approx(5, rel=1e-3)


def test_full_size_measures_a_small_one(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "vse++", "--images", "200", "--held-out", "8", "--regions", "2", "--features", "6"]
    assert full_size.main([*small, "--steps", "3", "--threads", "1"]) == 0
    head, _, row = capsys.readouterr().out.strip().splitlines()[:3]
    found = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert found["model"] == "vse++"
    assert float(found["file GB"]) == pytest.approx(200 * 2 * 6 * 4 / 1e9, rel=0.01)
    assert float(found["step s"]) > 0


@pytest.mark.filterwarnings("ignore:.*most words are unknown")
@pytest.mark.usefixtures("here")
def test_a_clip_of_the_mean_is_a_clip_of_the_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sum with clip c and the mean with clip c / batch take the same steps, but for what Adam adds to its root."""
    small = ["--seeds", "1", "--epochs", "2", "--limit", "64", "--workers", "1", "--folder", str(tmp_path)]
    assert clipping.main(small) == 0
    rows = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| con × con")
    ]
    found = [
        dict(zip(("objective", "over", "clip", "rsum", "i2t", "t2i", "half", "end"), row, strict=True)) for row in rows
    ]
    assert [(row["over"], row["clip"]) for row in found] == [("sum", "2"), ("mean", "2"), ("mean", "0.0312")]
    assert found[0]["end"] == found[2]["end"]


@pytest.mark.usefixtures("here")
def test_runs_are_collected_with_configuration_and_curve(tmp_path: Path) -> None:
    records = runs.trained([TINY], 2, tmp_path / "a" / "runs", workers=1)[0]
    assert collect.main([str(tmp_path), str(tmp_path / "all.jsonl"), "--commit", "abc"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [(line["commit"], line["seed"], line["test"]) for line in lines] == [
        ("abc", record["seed"], record["test"]) for record in records
    ]
    assert lines[0]["curve"]["step"] == [2, 4]
    assert TrainConfig(**lines[1]["config"]) == dataclasses.replace(TINY, seed=1)
