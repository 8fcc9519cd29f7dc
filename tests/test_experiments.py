"""The experiments, on a scale on which they are only seen to measure what they say."""

import json
from pathlib import Path

import pytest
import torch

import goal
from benchmarks.experiments import cold_start
from goal.training.features import Split, split

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts() -> tuple[Split, Split]:
    training, validation = (split(goal.data.load("emoji", name)) for name in ("train", "val"))
    return training, validation


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
