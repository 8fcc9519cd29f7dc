"""The systems of the literature from `TrainConfig` to a record, on small files of their shapes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Killed, killed_after
from torch import nn
from torch.nn.functional import normalize

import goal
from goal.candidates import Augmented
from goal.data import Pairs
from goal.models import SETTINGS, AudioVisual, Joint, Vocabulary
from goal.training import Curriculum, FewSemiHard, Plateau, Sweep, TrainConfig, loop, train
from goal.training.features import Mapped, Words, features, split
from goal.training.systems import SYSTEMS, embeddings, similarities
from goal.training.trained import load_trained, score

pytestmark = pytest.mark.usefixtures("one_thread")

REGIONS = ("vse-infinity", "rvse++", "scan")
SMALL: dict[str, Any] = {"dim": 16, "word_dim": 8, "batch": 8, "lr": 3e-3, "epochs": 2, "drop_epoch": 1}
SMALL_CLIPS: dict[str, Any] = {"hidden": 16, "dim": 8, "batch": 16, "eval_every": 4, "max_steps": 24}
COLOURS, THINGS = ("red", "green", "blue", "black", "white"), ("dog", "cat", "car", "tree")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty kinds of things, three regions, two captions; an image is its kind's vectors with noise."""
    folder = tmp_path_factory.mktemp("data") / "grid"
    folder.mkdir()
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((20, 3, 6))
    for name, count in (("train", 40), ("val", 20), ("test", 20)):
        rows = np.arange(count) % 20
        np.save(folder / f"{name}_ims.npy", (kinds[rows] + 0.1 * rng.standard_normal((count, 3, 6))).astype(np.float16))
        texts = [f"{COLOURS[row % 5]} {THINGS[row // 5]}" for row in rows]
        (folder / f"{name}_caps.txt").write_text("".join(f"a {text}\n{text} here\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds and pictures of four classes, seen through two random maps."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    folder.mkdir()
    rng = np.random.default_rng(1)
    classes, maps = rng.standard_normal((4, 5)), (rng.standard_normal((5, 7)), rng.standard_normal((5, 9)))
    for name, count in (("train", 64), ("val", 24), ("test", 24)):
        labels = np.arange(count) % 4
        audio, visual = (classes[labels] @ m + 0.3 * rng.standard_normal((count, m.shape[1])) for m in maps)
        np.savez(folder / f"{name}.npz", audio=40 + 3 * audio, visual=visual, labels=labels)
    return folder


def system(model: str, data: Path, **changes: Any) -> TrainConfig:
    small = (
        SMALL if model != "audio-visual" else {"hidden": 16, "dim": 8, "batch": 16, "eval_every": 4, "max_steps": 24}
    )
    return TrainConfig(model=model, data=str(data), **small | changes)


# ---- configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_the_defaults_are_the_published_settings(name: str) -> None:
    config, published = TrainConfig(model=name), SETTINGS[name]
    spec, its = config.objective.spec, config.optimiser
    assert spec.recipe is not None
    found = (spec.recipe.name, config.params["margin"], its.name, its.lr, its.weight_decay, config.stopping.epochs)
    assert found == published[:6]
    assert (its.drop_epoch, its.batch, its.clip, config.objective.all_first) == published[6:10]
    assert (config.model.dim, its.average, its.warmup) == (1024, 0.0, 0)
    assert TrainConfig.from_json(config.to_json()) == config


def test_heads_are_what_they_were() -> None:
    config = TrainConfig()
    model, its, stopping = config.model, config.optimiser, config.stopping
    assert (model.hidden, model.dim, model.dropout, model.texts) == (1024, 512, 0.3, "features")
    assert (its.batch, its.lr, its.weight_decay, its.warmup, its.clip, its.average) == (
        128, 5e-4, 0.01, 100, 2.0, 0.98)  # fmt: skip
    assert (stopping.max_steps, stopping.eval_every, stopping.patience, its.drops) == (6000, 50, 12, 1)
    assert (str(config.objective.spec), stopping.epochs) == ("cir × sig-ms", 0)


def test_t_and_p_take_the_place_of_a_systems_recipe_and_keep_the_rest() -> None:
    config = TrainConfig(model="vse-infinity", T="nca", P="lin")
    assert (str(config.objective.spec), config.objective.all_first) == ("nca × lin | reduction=sum", 1)
    assert config.optimiser.lr == 5e-4
    objective = config.build_objective()
    assert isinstance(objective, Curriculum)
    assert objective.until == (1,)
    first, then = objective.stages
    assert str(first.settings.product.T) == str(then.settings.product.T) == "T.nca(tau=10.0)"
    assert (first.settings.mining.dense, first.settings.mining.average) == ("always", False)
    assert then.settings.mining.name == "hardest"
    assert objective.settings.reduction == "sum"  # what the published clip goes with
    order = TrainConfig(model="order0", T="nca", P="lin").build_objective()
    assert order.settings.similarity.name == "order"


@pytest.mark.parametrize(
    ("settings", "reduction"),
    [
        ({}, "mean"),
        ({"model": "rvse++", "T": "nca"}, "mean"),
        ({"model": "rvse++"}, "mean"),
        ({"recipe": "vse++"}, "sum"),
        ({"recipe": "vse++", "reduction": "mean"}, "mean"),
        ({"model": "scan", "T": "nca", "reduction": "mean"}, "mean"),
        ({"model": "scan", "objective": "nca × con"}, "sum"),
        ({"model": "scan", "objective": "nca × con | reduction=mean"}, "mean"),
    ],
)
def test_a_reduction_may_be_chosen(settings: dict[str, Any], reduction: str) -> None:
    config = TrainConfig(**settings)
    built: Any = config.build_objective()
    assert built.settings.reduction == reduction
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "con(margin=0.2) × con | semi-hard"),
        ({"T": "con", "P": "lin"}, "con(margin=0.2) × lin | semi-hard"),
        ({"T": "con", "params": {"margin": 0.3}}, "con(margin=0.3) × con | semi-hard"),
        ({"T": "nca", "mining": "hardest"}, "nca × con | hardest"),
        ({"objective": "con × lin"}, "con × lin | semi-hard"),  # a text says all of its terms
        ({"mining": "all(average=false)"}, "con(margin=0.2) × con | all(average=false)"),
    ],
)
def test_what_is_not_said_is_the_models(settings: dict[str, Any], label: str) -> None:
    config = TrainConfig(model="audio-visual", **settings)
    assert config.label == label
    assert TrainConfig.from_json(config.to_json()) == config


def test_stages_follow_one_another_as_asked(clips: Path) -> None:
    plain = system("audio-visual", clips, curriculum="plain", switch="3").build_objective()
    assert [stage.settings.mining.name for stage in plain.stages] == ["semi-hard", "hardest"]
    assert plain.until == (3,)
    assert system("audio-visual", clips, curriculum="mixup", switch="few-semi-hard").build_objective().until == (
        FewSemiHard(share=0.1),
    )
    made = system("audio-visual", clips, curriculum="interpolate", patience=5, T="cir").build_objective()
    assert made.until == (Plateau(5),)
    assert isinstance(made.stages[1], Augmented)
    assert made.stages[1].augment == "interpolate"
    three = TrainConfig(model="vse-infinity", curriculum="plain", switch="2").build_objective()
    assert [stage.settings.mining.name for stage in three.stages] == ["all", "semi-hard", "hardest"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vse"}, "model='vse' is not known. Did you mean .*Known: heads, "),
        ({"model": "vse++", "hidden": 4}, r"hidden cannot be set: model vse\+\+ has none, got 4"),
        ({"word_dim": 4}, "word_dim cannot be set: model heads has none"),
        ({"texts": "words"}, "texts='words' is not known. Known: features"),
        ({"model": "vse++", "texts": "tokens"}, "texts='tokens' is not known. Known: words, features"),
        ({"model": "vse++", "optimizer": "SGD"}, "optimiser='SGD' is not known. .*Known: Adam, AdamW"),
        ({"model": "vse++", "epochs": 0}, "epochs must be >= 1 without patience, got 0"),
        ({"model": "vse-infinity", "eval_every": 5}, "all_first counts epochs"),
        ({"reduction": "median"}, "reduction='median' is not known. Did you mean 'mean'"),
        ({"mining": "hardest", "recipe": "infonce"}, "mining cannot be set: infonce has its own"),
        ({"curriculum": "cutmix"}, "curriculum='cutmix' is not known. .*Known: plain, interpolate, mixup"),
        ({"curriculum": "mixup", "model": "scan", "switch": "2"}, "scan makes similarities"),
        ({"curriculum": "plain", "recipe": "infonce"}, "curriculum cannot be set: infonce mines nothing"),
        ({"curriculum": "plain", "switch": "soon"}, "switch must be plateau"),
        ({"curriculum": "plain", "model": "vse++"}, "switch must not be plateau without patience"),
        (
            {"curriculum": "plain", "model": "vse-infinity", "switch": "few-semi-hard"},
            "which counts steps, beside all_first",
        ),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


# ---- what is read ----------------------------------------------------------------------------------------


def test_regions_stay_on_disk_and_words_are_those_of_the_training_captions(grid: Path) -> None:
    data = features(str(grid), None, "regions", "words")
    x = data.train.x
    assert isinstance(x.array, np.memmap)
    rows = torch.tensor([5, 0])
    assert torch.equal(x[rows], torch.from_numpy(np.load(grid / "train_ims.npy")[[5, 0]].astype(np.float32)))
    assert data.vocabulary is not None
    assert data.vocabulary.words == Vocabulary.of(goal.data.load(grid, "train")).words
    tokens, lengths = data.val.y[torch.tensor([0, 3])]
    expected = data.vocabulary.encode([goal.data.load(grid, "val").captions[row] for row in (0, 3)])  # type: ignore[index]
    assert torch.equal(tokens, expected[0])
    assert torch.equal(lengths, expected[1])


def test_a_batch_of_words_is_as_wide_as_its_longest() -> None:
    words = Words(["a", "a dog in a car", "dog"], Vocabulary(["a", "dog"]))
    assert words[torch.tensor([0, 2])][0].shape == (2, 3)
    assert len(words) == 3


def test_unit_vectors_and_means_of_regions(grid: Path) -> None:
    mean = torch.from_numpy(np.load(grid / "val_ims.npy").astype(np.float32)).mean(1)
    assert torch.allclose(features(str(grid), None, "vectors", "words").val.x, mean)
    assert torch.allclose(features(str(grid), None, "unit vectors", "words").val.x, normalize(mean, dim=1))


def test_token_features_end_where_zeros_begin() -> None:
    tokens = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)
    tokens[0, 2:], tokens[1, 1] = 0, 0  # a zero within is a token
    values, lengths = Mapped(tokens, padded=True)[torch.tensor([0, 1, 2])]
    assert lengths.tolist() == [2, 4, 4]
    assert torch.equal(values, torch.from_numpy(tokens))


def test_what_is_not_there_is_said(grid: Path) -> None:
    pairs = goal.data.load("emoji", "val")
    with pytest.raises(ValueError, match=r"takes regions, .*'val' are \(165, 1280\)"):
        split(pairs, "regions", Vocabulary(["a"]))
    with pytest.raises(ValueError, match="only features"):
        split(Pairs("p", "val", pairs.x, pairs.y, pairs.image_of, None), vocabulary=Vocabulary(["a"]))
    with pytest.raises(ValueError, match="only text"):
        features(str(grid), None, "regions", "features")


def test_limit_keeps_the_first_images_with_their_captions(grid: Path, clips: Path) -> None:
    part = features(str(grid), 5, "regions", "words").train
    assert (len(part.x), len(part.y), part.image_of.tolist()) == (5, 10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    some = features(str(clips), 6, "audio", "visual").train
    assert [len(each) for each in some] == [6, 6, 6, 6]
    with pytest.raises(ValueError, match=r"limit must be <= 64: .* has 64 training clips, got 65"):
        features(str(clips), 65, "audio", "visual")


def test_the_fingerprint_tells_files_apart(grid: Path, tmp_path: Path) -> None:
    def written(change: Callable[[np.ndarray], None]) -> dict[str, str]:
        for path in grid.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        array = np.load(tmp_path / "test_ims.npy")
        change(array)
        np.save(tmp_path / "test_ims.npy", array)
        return features(str(tmp_path), None, "regions", "words").fingerprints

    same = written(lambda array: None)
    assert same == written(lambda array: None)
    assert same != written(lambda array: array.__setitem__((3, 1, 2), 9))


# ---- trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vse++", "order0", "order++", *REGIONS])
def test_a_system_learns_ends_after_its_epochs_and_is_scored_again(model: str, grid: Path, tmp_path: Path) -> None:
    config = system(model, grid, epochs=12, drop_epoch=9, lr=1e-2)
    record = train(config, tmp_path)
    assert (record["stopped"], record["steps"], record["model"]) == ("epochs", 120, model)  # 80 captions, batches of 8
    assert [row["step"] for row in record["curve"]] == [10 * epoch for epoch in range(1, 13)]
    rates = [row["lr"] for row in record["curve"]]
    assert rates[:8] == [1e-2] * 8
    assert rates[9:] == pytest.approx([1e-3] * 3)
    assert record["test"]["rsum"] > 1.5 * 600 * (1 + 5 + 10) / 3 / 20  # chance
    run = load_trained(tmp_path)
    assert run.config == config
    again = score(run.config, run.model, run.split("test"))
    assert again.i2t_ranks.tolist() == record["ranks"]["i2t"]
    assert score(run.config, run.model, run.split("val")).rsum == record["best_val_rsum"]


def test_clips_learn_and_are_scored_by_map(clips: Path, tmp_path: Path) -> None:
    record = train(system("audio-visual", clips, max_steps=60, lr=1e-2), tmp_path)
    assert record["test"]["mean"] > 60  # a random order has about 30
    assert record["best_val_map"] == max(row["val_map"] for row in record["curve"])
    run = load_trained(tmp_path)
    assert isinstance(run.model, AudioVisual)
    found = run.split("test")
    x, y = run.model(found.x, found.y)
    labels = goal.data.clips(clips, "test").labels
    assert goal.map_at_all(x.detach(), y.detach(), labels, labels).as_dict() == record["test"]
    train_audio = torch.from_numpy(goal.data.clips(clips, "train").audio)
    assert torch.allclose(run.model.audio.centre, train_audio.mean(0))
    assert torch.allclose(run.model.audio.deviation, train_audio.std(0, correction=0))


def test_clips_of_a_class_are_no_negatives_of_each_other(clips: Path, tmp_path: Path) -> None:
    """Labels reach the objective: with one class there is nothing to push away, and nothing moves."""
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("train", "val", "test"):
        found = goal.data.clips(clips, name)
        np.savez(folder / f"{name}.npz", audio=found.audio, visual=found.visual, labels=0 * found.labels)
    record = train(system("audio-visual", folder, T="con", P="con", mining="hardest"), tmp_path / "run")
    assert {row["loss"] for row in record["curve"]} == {0.0}


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("vse-infinity", {"epochs": 3}),
        ("scan", {"all_first": 1, "epochs": 3}),
        ("rvse++", {"T": "cir", "P": "sig-ms", "epochs": 3}),
        ("vse++", {"recipe": "order0", "epochs": 3}),
        ("audio-visual", {"curriculum": "mixup", "switch": "2"}),
        ("audio-visual", {"curriculum": "interpolate", "switch": "few-semi-hard", "lr": 1e-2}),
        ("audio-visual", {"curriculum": "plain", "patience": 2, "epochs": 0}),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(
    model: str, changes: dict[str, Any], grid: Path, clips: Path, tmp_path: Path
) -> None:
    config = system(model, clips if model == "audio-visual" else grid, **changes)
    watched = 3 if model == "vse-infinity" else 0
    train(config, tmp_path / "whole", diagnose=watched)
    for _ in range(2):
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", 0, diagnose=watched, on_evaluation=killed_after(1))
    train(config, tmp_path / "killed", diagnose=watched)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "killed").iterdir()}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_stages_change_when_they_should(clips: Path, tmp_path: Path) -> None:
    config = system("audio-visual", clips, curriculum="plain", switch="2", max_steps=16)
    run = loop._Run(config, loop.read(config), tmp_path)
    seen = []
    while run.state.stopped is None:
        row = run.interval()
        seen.append((row["stage"], run.objective.stage))
    assert seen == [(0, 0), (0, 1), (1, 1), (1, 1)]


def test_a_new_stage_has_its_own_patience(clips: Path, tmp_path: Path) -> None:
    config = system("audio-visual", clips, curriculum="plain", patience=2, eval_every=1, lr=1e-12, average=0.0)
    run = loop._Run(config, loop.read(config), tmp_path)
    seen = []
    while run.state.stopped is None:
        run.interval()
        seen.append((run.objective.stage, run.state.stale, run.state.drops))
    assert seen == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (1, 2, 1)]
    assert run.state.stopped == "plateau"


def test_each_system_is_its_own_model(grid: Path, tmp_path: Path) -> None:
    def model(name: str, **changes: Any) -> Any:
        config = system(name, grid, **changes)
        return loop._Run(config, loop.read(config), tmp_path).model

    assert [model(name).order for name in ("vse++", "order0", "order++")] == [False, True, False]
    assert model("vse++", recipe="order0").order
    assert [model(name).image.residual for name in ("vse-infinity", "rvse++")] == ["input", "projected"]
    assert model("vse-infinity").text.states.masking == model("vse-infinity").image.drop == 0.2
    assert model("vse++").text.states.gru.bidirectional is False


def test_heads_are_scored_on_scaled_features(tmp_path: Path) -> None:
    train(TrainConfig(limit=60, hidden=8, dim=6, batch=20, max_steps=3, eval_every=3), tmp_path)
    run = load_trained(tmp_path)
    part = run.split("val")
    with torch.no_grad():
        expected = goal.evaluate(*run.model(part.x, part.y), part.image_of)
    assert score(run.config, run.model, part).t2i_ranks.tolist() == expected.t2i_ranks.tolist()


def test_the_warm_up_is_one_epoch_of_all_negatives(grid: Path, tmp_path: Path) -> None:
    config = system("vse-infinity", grid)
    run = loop._Run(config, loop.read(config), tmp_path)
    assert run.objective.settings.mining.name == "all"
    run.interval()
    assert run.objective.settings.mining.name == "hardest"
    assert run.state.step == 10


def test_a_diagnosis_is_written_at_every_so_manieth_step(grid: Path, tmp_path: Path) -> None:
    train(system("rvse++", grid), tmp_path, diagnose=4)
    rows = goal.diagnosis.read(tmp_path / "diagnosis.jsonl")
    assert [row["step"] for row in rows] == list(range(5))  # of 20 steps
    assert (tmp_path / "diagnosis.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="scan makes similarities"):
        train(system("scan", grid), tmp_path / "scan", diagnose=4)


def test_similarities_by_blocks_are_those_of_the_model(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = system("scan", grid)
    run = loop._Run(config, loop.read(config), tmp_path)
    model, part = run.model.eval(), run.val
    with torch.no_grad():
        whole = model(part.x[torch.arange(20)], part.y[torch.arange(40)])
        monkeypatch.setattr("goal.training.systems.ROWS", 7)
        assert torch.allclose(similarities(model, part, torch.device("cpu")), whole, atol=1e-5)


def test_embeddings_by_blocks_are_those_of_the_model(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = system("vse-infinity", grid)
    run = loop._Run(config, loop.read(config), tmp_path)
    model, part = run.model.eval(), run.val
    assert isinstance(model, Joint)
    with torch.no_grad():
        x, y = model(part.x[torch.arange(20)], part.y[torch.arange(40)])
        monkeypatch.setattr("goal.training.systems.ROWS", 7)
        found = embeddings(model, part, torch.device("cpu"))
    assert torch.allclose(found[0], x, atol=1e-6)
    assert torch.allclose(found[1], y, atol=1e-6)


def test_captions_may_come_as_features_of_sentences_or_tokens(grid: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for ndim, kind in ((2, "Projection"), (3, "TokenText")):
        folder = tmp_path / kind
        folder.mkdir()
        for path in grid.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for name, count in (("train", 80), ("val", 40), ("test", 40)):
            shape = (count, 5) if ndim == 2 else (count, 4, 5)
            np.save(folder / f"{name}_caps.npy", rng.standard_normal(shape).astype(np.float32))
        config = system("vse-infinity", folder, texts="features", epochs=1)
        train(config, folder / "run")
        run = load_trained(folder / "run")
        assert type(run.model.text).__name__ == kind
        assert run.vocabulary is None
    with pytest.raises(ValueError, match="scan reads captions as words"):
        train(system("scan", folder, texts="features"), tmp_path / "scan")
    with pytest.raises(ValueError, match="heads takes one vector a caption"):
        train(TrainConfig(data=str(folder), hidden=4, dim=4, batch=8), tmp_path / "heads")


def test_the_running_mean_takes_the_statistics_of_batch_norm_along(grid: Path, tmp_path: Path) -> None:
    config = system("rvse++", grid, average=0.9)
    run = loop._Run(config, loop.read(config), tmp_path)
    run.interval()
    norm = next(module for module in run.model.modules() if isinstance(module, nn.BatchNorm1d))
    kept = next(module for module in run.mean.modules() if isinstance(module, nn.BatchNorm1d))
    assert torch.equal(norm.running_mean, kept.running_mean)
    assert norm.running_mean.abs().max() > 0
    assert not torch.equal(norm.weight, kept.weight)


def test_a_sweep_compares_objectives_inside_a_system(grid: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 1, "drop_epoch": None}
    sweep = Sweep(model="rvse++", data=str(grid), objectives=["cir:lin", "t-selhn"], seeds=2, root=tmp_path, workers=1,
                  **settings)  # fmt: skip
    records = sweep.run()
    assert sweep.folder.name == "grid-rvse++"
    assert len(records) == 4
    assert (
        "rvse++ of 16 dimensions, batch 8, AdamW at 0.003, 1 epochs, 2 seeds. A run ends after its epochs"
        in (tmp_path / "grid-rvse++" / "table.md").read_text()
    )
    assert TrainConfig(model="vse++").setting in Sweep(model="vse++", objectives=["vse++"]).note()


def test_what_compares_recalls_refuses_clips(clips: Path) -> None:
    with pytest.raises(ValueError, match="audio-visual is judged by MAP@all"):
        Sweep(model="audio-visual", data=str(clips), objectives=["cir:lin"], batch=16)


def test_every_system_says_what_it_is() -> None:
    assert set(SETTINGS) | {"heads", "audio-visual"} == set(SYSTEMS)
    assert all(each.what for each in SYSTEMS.values())


def test_apply_similarity_of_an_objective_is_goals_own() -> None:
    torch.manual_seed(0)
    S = torch.randn(5, 7, requires_grad=True)
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 4])
    objective = goal.Objective("cir", "sig-ms", mining="semi-hard", similarity="cosine")
    loss = objective.apply_similarity(S, ids=ids[:5], y_ids=ids)
    (emitted,) = torch.autograd.grad(loss, S)
    expected = goal.apply_similarity(S, "cir", "sig-ms", mining="semi-hard", ids=ids[:5], y_ids=ids)
    assert torch.equal(emitted, torch.autograd.grad(expected, S)[0])
    assert loss == expected
    assert objective.stats.s_pos.tolist() == S.diagonal().tolist()


def test_the_commands_know_the_systems(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from goal.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in SYSTEMS)
    arguments = [
        "train",
        "--model",
        "vse-infinity",
        "--data",
        str(grid),
        "--dim",
        "8",
        "--word-dim",
        "4",
        "--batch",
        "8",
    ]
    assert main([*arguments, "--epochs", "2", "--name", "mine", "--diagnose", "5"]) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "runs" / "mine" / "record.json").read_text())
    assert f"best validation RSUM {record['best_val_rsum']:.1f}" in shown
    assert (tmp_path / "runs" / "mine" / "diagnosis.png").exists()
    assert main(["eval", str(tmp_path / "runs" / "mine")]) == 0
    assert f"RSUM {record['test']['rsum']:.1f}" in capsys.readouterr().out
