"""The search for new objectives, with tiny budgets: what it judges by, that it resumes, what it refuses and reports."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Killed, forking, inline

import goal
from goal.lab import search as searching
from goal.lab.grammar import Expression
from goal.lab.search import CHECKS, FINALISTS, Discovery, discover
from goal.training import Diverged, Incomplete, TrainConfig, loop
from goal.training.report import Difference
from goal.training.trained import load_trained

pytestmark = pytest.mark.usefixtures("registries")

TINY: dict[str, Any] = {"limit": 120, "hidden": 16, "dim": 8, "batch": 40, "eval_every": 2, "warmup": 2, "max_steps": 4}


def tiny(root: Path, **changes: Any) -> Discovery:
    return discover(**{"trials": 3, "seeds": 2, "root": root, "save_every": 0, **TINY} | changes)


def told(discovery: Discovery) -> dict[str, str]:
    """What was written, but the pictures."""
    return {
        path.name: path.read_text() for path in discovery.folder.iterdir() if path.suffix in (".md", ".json", ".py")
    }


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Runs are made in this process, and pictures left out."""
    monkeypatch.setattr(searching, "work", inline())
    monkeypatch.setattr(searching, "write_report", lambda *_, **__: [])
    return monkeypatch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Discovery:
    """A search that two worker processes made."""
    context = forking()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("goal.training.workers.multiprocessing.get_context", lambda method: context)
        return tiny(tmp_path_factory.mktemp("whole"), workers=2, name="one", command="goal discover")


def test_it_reports_what_it_found(whole: Discovery) -> None:
    files = told(whole)
    assert {"discovery.md", "found.py", "table.md", "trials.json"} <= set(files)
    assert (whole.folder / "curves.png").is_file()
    page = files["discovery.md"]
    for part in (whole.verdict, whole.source, repr(whole.integrability), whole.table, "Command: goal discover"):
        assert part in page
    assert whole.verdict in repr(whole)
    assert whole.source in repr(whole)
    assert [record["label"] for record in whole.records] == ["found"] * 2 + [
        whole.finalists["published"][0].config.objective.spec.names
    ] * 2
    assert all(record["test"]["rsum"] > 0 for record in whole.records)
    trials = json.loads(files["trials.json"])
    assert [len(trials[search]) for search in ("found", "published")] == [3, 3]
    assert [trial["objective"] for trial in trials["published"]] == ["con × con", "con × lin", "con × sig"]  # defaults
    assert {trial["lr"] for trial in trials["published"]} == {TrainConfig().optimiser.lr}
    assert all(trial["objective"].startswith("found-") for trial in trials["found"])
    assert not any(each.why for tried in whole.trials.values() for each in tried)


def test_the_printed_source_is_what_was_trained(whole: Discovery) -> None:
    config = whole.finalists["found"][0].config
    spec = config.objective.spec
    assert (whole.T.name, whole.P.name, whole.T.params | whole.P.params) == (spec.T.name, spec.P.name, config.params)
    T, P = Expression("T", ("sigmoid", "margin"), (("tau", 3.0), ("margin", 0.1))), Expression("P", ("sigmoid", "ramp"))
    other = replace(whole, T=T, P=replace(P, values=(("alpha", 5.0), ("lam", 0.3))))
    exec(other.source, {})
    pasted = goal.Objective("found", "found").settings.product
    trained: Any = TrainConfig(T=T.name, P=P.name, params=other.T.params | other.P.params).build_objective()
    s_pos, s_neg = torch.linspace(-1, 1, 21)[:, None], torch.linspace(-1, 1, 21)[None, :]
    pairs = (each.weights(s_pos, s_neg, {}) for each in (pasted, trained.settings.product))
    for mine, own in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, own, rtol=0, atol=0)


def test_the_test_split_is_scored_once_with_seeds_that_chose_nothing(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    scored: list[TrainConfig] = []
    score = loop.score
    here.setattr(loop, "score", lambda config, *rest: scored.append(config) or score(config, *rest))
    found = tiny(tmp_path)
    assert len(scored) == 4
    chosen = {finalists[0].config.label for finalists in found.finalists.values()}
    assert {config.label for config in scored} == chosen
    assert {config.seed for config in scored} == {1 + CHECKS, 2 + CHECKS}
    for search, finalists in found.finalists.items():
        assert len(finalists) == min(FINALISTS, 3)
        assert finalists[0].mean == max(each.mean for each in finalists)
        assert finalists[0].trial in [each.val_rsum for each in found.trials[search]]
    for record in (tmp_path / "emoji-discover" / "trials").glob("*/record.json"):
        assert "test" not in json.loads(record.read_text())
    assert not list(tmp_path.glob("*/trials/*/model.safetensors"))


@pytest.mark.parametrize("kill_at", [6, 20, 40])
def test_killed_it_goes_on_and_ends_with_the_same(
    kill_at: int, tmp_path: Path, whole: Discovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a trial, with a finalist and in the test; and as the worker processes end."""
    again = {"name": "one", "command": "goal discover"}
    monkeypatch.setattr(searching, "work", inline(kill_at))
    with pytest.raises(Killed):
        tiny(tmp_path, **again)
    monkeypatch.setattr(searching, "work", inline())
    found = tiny(tmp_path, **again)
    assert told(found) == told(whole)
    assert (found.T, found.P, found.trials, found.differences) == (whole.T, whole.P, whole.trials, whole.differences)


def test_more_trials_go_on_from_those_there_are(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    here.setattr(searching, "ROUND", 2)
    few = tiny(tmp_path, trials=2, seeds=1)
    more = tiny(tmp_path, trials=5, seeds=1)
    for search in ("found", "published"):
        assert more.trials[search][:2] == few.trials[search]
        assert len({each.config for each in more.trials[search]}) == 5


def test_its_runs_can_be_loaded_where_nobody_knows_the_terms(whole: Discovery) -> None:
    run = next(path for path in (whole.folder / "tests").iterdir() if path.name.startswith("found"))
    for registry in (goal.T, goal.P):
        for name in [name for name in registry if name.startswith("found")]:
            del registry._definitions[name]
    config, heads, *_ = load_trained(run)
    assert whole.T.name == config.objective.spec.T.name
    assert config.build_objective()
    assert heads(torch.zeros(2, heads.x.centre.numel()), torch.zeros(2, heads.y.centre.numel()))


def test_what_fails_counts_as_nothing_and_is_told(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    train, triplet = searching.train, searching.triplet
    refusals = iter([True])

    def diverge(config: TrainConfig, *rest: Any, **named: Any) -> Any:
        if config.objective.spec.names == "con × lin":
            raise Diverged("the loss is nan at step 3")
        return train(config, *rest, **named)

    def refuse(trial: Any) -> Any:
        if next(refusals, False):
            raise ValueError("tau must be > 0")
        return triplet(trial)

    here.setattr(searching, "train", diverge)
    here.setattr(searching, "triplet", refuse)
    found = tiny(tmp_path)
    assert [each.val_rsum for each in found.trials["published"]].count(0.0) == 1
    assert found.trials["published"][1].why == "the loss is nan at step 3"
    assert found.trials["found"][0] == (None, 0.0, "tau must be > 0")
    assert "con × lin" not in [each.config.objective.spec.names for each in found.finalists["published"]]
    page = found.markdown()
    assert "published, trial 1: con × lin: the loss is nan at step 3" in page
    assert "found, trial 0: refused: tau must be > 0" in page
    assert json.loads((found.folder / "trials.json").read_text())["found"][0] == {
        "refused": "tau must be > 0",
        "val_rsum": 0.0,
    }


def test_when_everything_fails_there_is_nothing_to_report(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise Diverged("the loss is nan at step 3")

    here.setattr(searching, "train", diverge)
    with pytest.raises(Incomplete, match=r"every trial of the found objectives failed.*nan at step 3"):
        tiny(tmp_path)
    assert not list(tmp_path.glob("*/discovery.md"))


def test_a_run_that_cannot_be_made_ends_it_and_is_named(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    (tmp_path / "emoji-discover").mkdir()
    (tmp_path / "emoji-discover" / "trials").touch()  # a file where the folder of the trials should be
    with pytest.raises(Incomplete, match=r"(?s)6 of the runs failed.*\n  con-con-s0-.*Not a directory"):
        tiny(tmp_path)


def test_verdicts_in_words(whole: Discovery) -> None:
    def verdict(found: float, published: float, noise: str, **changes: Any) -> str:
        order = sorted([("found", found), ("vse++", published)], key=lambda each: -each[1])
        differences = [
            Difference(n, mean, mean - order[0][1], -1.0, 1.0, 0.3, "best" if k == 0 else noise)  # type: ignore[arg-type]
            for k, (n, mean) in enumerate(order)
        ]
        return replace(whole, differences=differences, **changes).verdict

    known = {"T": Expression("T", ("sigmoid", "circle")), "P": Expression("P", ("linear", "linear"))}
    new = {"T": Expression("T", ("sigmoid", "tilted")), "P": Expression("P", ("linear", "linear"))}
    assert verdict(190, 180, "below best", **new) == (
        "The found terms are better than vse++, by 10.0 RSUM, which exceeds the noise."
    )
    assert "worse than vse++, by 10.0 RSUM" in verdict(180, 190, "below best", **new)
    assert verdict(181.5, 180, "tied with best", **new) == (
        "Nothing better was found: +1.5 RSUM to vse++ is within the noise (p = 0.3)."
    )
    assert "Nothing better was found: −1.5 RSUM" in verdict(178.5, 180, "tied with best", **new)
    assert verdict(181, 180, "tied with best", **known).endswith("What was found is cir × lin, which is published.")


def test_bad_arguments_are_named_before_anything_is_trained(tmp_path: Path) -> None:
    for changes, message in (
        ({"trials": 0}, "trials must be a whole number >= 1, got 0"),
        ({"seeds": 0}, "seeds must be a whole number >= 1"),
        ({"workers": 0}, "workers must be a whole number >= 1"),
        ({"limit": 20}, "batch must be <= 20, the number of training images, got 40"),
        ({"data": "nowhere"}, "nowhere"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"T": "cir"}, "T cannot be set: the search chooses it"),
        ({"seed": 3}, "seed cannot be set: the search chooses it"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"no setting 'hiden'\. Did you mean 'hidden'"):
        tiny(tmp_path, hiden=3)
    assert not list(tmp_path.iterdir())
