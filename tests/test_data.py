"""The data package: the shipped emoji, the field's folders, plain pairs, and what bad files say."""

import copy
import hashlib
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import goal.data
import goal.data.files
from goal.data import Pairs, build_emoji, groups, load, paired, precomp
from goal.data.files import read_lines, write_atomically
from goal.data.int8 import dequantise, quantise
from goal.training.features import Mapped
from goal.training.features import split as taken

EMOJI = Path(goal.data.__file__).parent / "emoji"
SPLITS = ("train", "val", "test")


def features(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def write_precomp(folder: Path, split: str, ims: NDArray[np.float32], n_captions: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split}_ims.npy", ims)
    (folder / f"{split}_caps.txt").write_text("".join(f"caption {i}\n" for i in range(n_captions)))


# emoji


@pytest.fixture(scope="module")
def images() -> list[dict[str, str]]:
    header, *rows = (line.split("\t") for line in read_lines(EMOJI / "images.tsv"))
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize("split", SPLITS)
def test_emoji_has_five_captions_for_each_image(split: str) -> None:
    pairs = load("emoji", split)
    assert (pairs.name, pairs.split) == ("emoji", split)
    assert pairs.y is not None
    assert pairs.captions is not None
    assert pairs.x.shape == (len(pairs.x), 1280)
    assert pairs.y.shape == (5 * len(pairs.x), 384)
    assert pairs.x.dtype == pairs.y.dtype == np.float32
    assert np.isfinite(pairs.x).all()
    assert np.isfinite(pairs.y).all()
    assert pairs.image_of.dtype == np.int64
    assert (pairs.image_of == np.arange(len(pairs.y)) // 5).all()
    assert len(pairs.captions) == len(pairs.y)
    assert all(caption.strip() == caption != "" for caption in pairs.captions)


def test_emoji_splits_cover_every_image_once(images: list[dict[str, str]]) -> None:
    sizes = {split: len(load("emoji", split).x) for split in SPLITS}
    assert sum(sizes.values()) == len(images) == len({image["codepoints"] for image in images})
    for split, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        assert sizes[split] == pytest.approx(share * len(images), abs=1.5)


def test_emoji_captions_belong_to_their_image(images: list[dict[str, str]]) -> None:
    for split in SPLITS:
        captions = load("emoji", split).captions
        assert captions is not None
        assert list(captions[::5]) == [image["name"] for image in images if image["split"] == split]


def test_emoji_features_belong_to_their_caption() -> None:
    pairs = load("emoji", "test")
    assert pairs.y is not None
    assert pairs.captions is not None
    first: dict[str, int] = {}
    for row, caption in enumerate(pairs.captions):  # equal texts have equal features, and only they have
        assert (pairs.y[row] == pairs.y[first.setdefault(caption, row)]).all()
    texts = sorted(first.values())
    assert len(np.unique(pairs.y[texts], axis=0)) == len({caption.lower() for caption in first})


def test_emoji_groups_do_not_straddle_a_split(images: list[dict[str, str]]) -> None:
    split_of: dict[str, str] = {}
    for image in images:
        assert split_of.setdefault(image["group"], image["split"]) == image["split"]
    assert 1200 < len(split_of) < len(images)


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("person running", ["man running", "woman running", "woman running facing right"]),
        ("family", ["family man woman girl", "family adult adult child child"]),
        ("mermaid", ["merman", "merperson"]),
        ("old woman", ["older person", "old man"]),
        ("kiss", ["kiss man man"]),
    ],
)
def test_variants_of_one_emoji_share_a_group(images: list[dict[str, str]], name: str, variants: list[str]) -> None:
    group_of = {image["name"]: image["group"] for image in images}
    assert {group_of[variant] for variant in variants} == {group_of[name]}


def test_emoji_near_duplicates_do_not_straddle_a_split() -> None:
    x = {split: load("emoji", split).x.astype(np.float64) for split in SPLITS}
    mean = np.concatenate(list(x.values())).mean(0)
    unit = {split: (rows - mean) / np.linalg.norm(rows - mean, axis=1)[:, None] for split, rows in x.items()}
    for one, other in [("train", "val"), ("train", "test"), ("val", "test")]:
        assert (unit[one] @ unit[other].T).max() <= groups.NEAR_DUPLICATE
    inside = unit["train"] @ unit["train"].T
    assert (inside[~np.eye(len(inside), dtype=bool)] > groups.NEAR_DUPLICATE).any()  # there are some


def test_emoji_leaves_out_skin_tones_and_country_flags(images: list[dict[str, str]]) -> None:
    left_out = {*range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200), *range(0xE0020, 0xE0080)}
    used = {int(code, 16) for image in images for code in image["codepoints"].split("-")}
    assert not used & left_out


def test_emoji_files_are_those_recorded(images: list[dict[str, str]]) -> None:
    provenance = json.loads((EMOJI / "provenance.json").read_text())
    recorded = provenance["sha256"]
    assert recorded == {name: hashlib.sha256((EMOJI / name).read_bytes()).hexdigest() for name in recorded}
    files = {path.name for path in EMOJI.iterdir()}
    assert files == {*recorded, "provenance.json", "LICENSES.md"}
    assert sum((EMOJI / name).stat().st_size for name in files) < 6_000_000
    assert provenance["counts"]["images"] == len(images)
    assert provenance["seed"] == build_emoji.SEED


def test_emoji_split_follows_from_features_names_and_seed(images: list[dict[str, str]]) -> None:
    x = dequantise(np.load(EMOJI / "x.npy"), np.load(EMOJI / "x_scale.npy"))
    found = groups.group(x, [[build_emoji.variant_key(image["name"])] for image in images])
    assert found == [int(image["group"]) for image in images]
    split = groups.split_groups(found, np.random.default_rng(build_emoji.SEED))
    assert split == [image["split"] for image in images]


def test_five_captions_are_five_whatever_there_is() -> None:
    five = build_emoji.five_captions
    assert five("a", "b", ["k4", "k1", "k3", "k2"], []) == ("a", "b", "k1, k4", "k2", "k3")
    assert five("Big Ben", "big ben", [":)", "BIG ben"], ["tower"])[:4] == ("Big Ben", "tower", "Big", "Ben")
    assert five("leo", "leo", [], []) == ("leo",) * 5


def test_quantise_keeps_the_direction() -> None:
    rows = np.concatenate([features(20, 64), np.zeros((1, 64), np.float32)])
    with np.errstate(all="raise"):
        codes, scale = quantise(rows)
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    assert np.abs(dequantise(codes, scale) - rows).max() <= scale.max() * 0.5001
    assert not dequantise(codes, scale)[-1].any()


# the field's folders


@pytest.mark.parametrize("subfolder", ["", "precomp"])
@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 8)])
def test_precomp_reads_both_layouts(tmp_path: Path, subfolder: str, shape: tuple[int, ...]) -> None:
    ims = features(*shape)
    write_precomp(tmp_path / "f30k" / subfolder, "test", ims, 20)
    pairs = load(tmp_path / "f30k", "test")
    assert isinstance(pairs.x, np.memmap)
    assert (pairs.x == ims).all()
    assert pairs.y is None
    assert pairs.captions == tuple(f"caption {i}" for i in range(20))
    assert pairs.image_of.tolist() == [i // 5 for i in range(20)]
    assert (pairs.name, pairs.split) == ("f30k", "test")


def test_precomp_stores_images_once_or_five_times(tmp_path: Path) -> None:
    ims = features(4, 3, 8)
    write_precomp(tmp_path, "train", ims.repeat(5, axis=0), 20)
    pairs = load(tmp_path, "train")
    assert isinstance(pairs.x, np.memmap)
    assert (pairs.x == ims).all()
    assert pairs.image_of.tolist() == [i // 5 for i in range(20)]

    write_precomp(tmp_path, "train", features(20, 8), 20)  # all different: one caption each
    pairs = load(tmp_path, "train")
    assert pairs.x.shape == (20, 8)
    assert pairs.image_of.tolist() == list(range(20))


def test_precomp_copies_are_compared_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal.data.files, "CHUNK_BYTES", 7 * 32)  # 7 rows, no multiple of 5
    ims = features(4, 8).repeat(5, axis=0)
    write_precomp(tmp_path, "train", ims, 20)
    assert load(tmp_path, "train").x.shape == (4, 8)
    ims[19, 7] += 1
    write_precomp(tmp_path, "train", ims, 20)
    assert load(tmp_path, "train").x.shape == (20, 8)


def test_precomp_val_is_dev_and_other_splits_keep_their_names(tmp_path: Path) -> None:
    write_precomp(tmp_path, "dev", features(2, 8), 10)
    write_precomp(tmp_path, "testall", features(3, 8), 15)
    assert load(tmp_path, "val").split == load(tmp_path, "dev").split == "dev"
    assert len(load(tmp_path, "testall").x) == 3
    with pytest.raises(ValueError, match=r"split: .* has no train_ims\.npy; known: 'dev', 'testall'"):
        load(tmp_path, "train")


def test_precomp_takes_sentence_features(tmp_path: Path) -> None:
    write_precomp(tmp_path, "test", features(2, 8), 10)
    y = features(10, 6)
    np.save(tmp_path / "test_caps.npy", y)
    loaded = load(tmp_path, "test").y
    assert isinstance(loaded, np.memmap)
    assert (loaded == y).all()
    np.save(tmp_path / "test_caps.npy", y[:9])
    with pytest.raises(ValueError, match=r"test_caps\.npy: 9 rows for the 10 captions of test_caps\.txt"):
        load(tmp_path, "test")


@pytest.mark.parametrize("shape", [(10, 6), (10, 3, 6)])
def test_precomp_takes_features_without_texts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "test_ims.npy", features(2, 8))
    np.save(tmp_path / "test_caps.npy", features(*shape))
    pairs = load(tmp_path, "test")
    assert pairs.captions is None
    assert pairs.y is not None
    assert pairs.y.shape == shape
    assert pairs.image_of.tolist() == [0] * 5 + [1] * 5
    np.save(tmp_path / "test_ims.npy", features(3, 8))
    with pytest.raises(ValueError, match=r"test_caps\.npy: 10 captions, no multiple of the 3 images"):
        load(tmp_path, "test")
    (tmp_path / "test_caps.npy").unlink()
    with pytest.raises(ValueError, match=r"test_caps\.txt: no such file, and no test_caps\.npy either"):
        load(tmp_path, "test")
    (tmp_path / "test_caps.npy").symlink_to("nowhere.npy")  # not the same as no file
    with pytest.raises(ValueError, match=r"test_caps\.npy: no such file"):
        load(tmp_path, "test")


def test_precomp_captions_end_only_at_newlines(tmp_path: Path) -> None:
    write_precomp(tmp_path, "test", features(3, 8), 0)
    (tmp_path / "test_caps.txt").write_bytes("a\u2028b \r\n\nc\x0cd\re".encode())
    assert load(tmp_path, "test").captions == ("a\u2028b", "", "c\x0cd\re")
    (tmp_path / "test_caps.txt").write_bytes(b"a\n\xff\nc\n")
    with pytest.raises(ValueError, match=r"test_caps\.txt: row 1 is not UTF-8"):
        load(tmp_path, "test")


@pytest.mark.parametrize(
    "ids",
    [
        [7, 8],  # one for each image
        [7, 7, 7, 7, 7, 8, 8, 8, 8, 8],  # its image's id for each caption
        list(range(10)),  # each caption's own id
    ],
)
def test_precomp_accepts_ids_that_agree(tmp_path: Path, ids: list[int]) -> None:
    write_precomp(tmp_path, "test", features(2, 8), 10)
    (tmp_path / "test_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    assert load(tmp_path, "test").image_of.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([7, 8, 9], "3 ids for 2 images and 10 captions"),
        ([7, 7], "row 1 gives image 1 the id '7' of image 0"),
        ([7, 7, 7, 7, 8, 8, 8, 8, 8, 8], "row 4 gives image 0 the id '8', it had '7'"),
        ([7, 7, 7, 7, 7, 7, 8, 8, 8, 8], "row 5 gives image 1 the id '7' of image 0"),
    ],
)
def test_precomp_refuses_ids_that_disagree(tmp_path: Path, ids: list[int], message: str) -> None:
    write_precomp(tmp_path, "test", features(2, 8), 10)
    (tmp_path / "test_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    with pytest.raises(ValueError, match=rf"test_ids\.txt: {message}"):
        load(tmp_path, "test")


def test_precomp_says_which_file_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no test_ims\.npy; known: none"):
        precomp(tmp_path, "test")
    write_precomp(tmp_path, "test", features(3, 8), 16)
    with pytest.raises(ValueError, match=r"test_caps\.txt: 16 captions, no multiple of the 3 images"):
        load(tmp_path, "test")
    write_precomp(tmp_path, "test", features(3, 8), 0)
    with pytest.raises(ValueError, match=r"test_caps\.txt: 0 captions"):
        load(tmp_path, "test")
    (tmp_path / "test_caps.txt").unlink()
    with pytest.raises(ValueError, match=r"test_caps\.txt: no such file"):
        load(tmp_path, "test")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_is_named_in_the_stored_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    monkeypatch.setattr(goal.data.files, "CHUNK_BYTES", 4 * 8 * 4)  # 4 rows
    ims = features(4, 8).repeat(5, axis=0)
    ims[13, 2] = bad
    write_precomp(tmp_path, "test", ims, 20)
    with pytest.raises(ValueError, match=r"test_ims\.npy: row 13 holds NaN or infinity"):
        load(tmp_path, "test")


def test_large_files_are_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal.data.files, "CHUNK_BYTES", 1 << 16)
    ims = features(200, 36, 64).repeat(5, axis=0)  # 9.2 MB
    write_precomp(tmp_path, "train", ims, 1000)
    del ims
    tracemalloc.start()
    pairs = load(tmp_path, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pairs.x.shape == (200, 36, 64)
    assert peak < 1_500_000


def test_a_slow_check_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_precomp(tmp_path, "test", features(4, 8), 20)
    load(tmp_path, "test")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(goal.data.files, "BAR_BYTES", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    load(tmp_path, "test")
    shown = capsys.readouterr()
    assert "checking test_ims.npy" in shown.err
    assert shown.out == ""


# plain pairs


def test_paired_folder_reads_npy_and_safetensors(tmp_path: Path) -> None:
    x, y = features(4, 8), features(8, 6)
    np.save(tmp_path / "train_x.npy", x.astype(np.float16))
    save_file({"embeddings": torch.from_numpy(y).bfloat16()}, tmp_path / "train_y.safetensors")
    pairs = load(tmp_path, "train")
    assert pairs.x.dtype == np.float16
    assert isinstance(pairs.x, np.memmap)
    assert pairs.y is not None
    assert pairs.y.dtype == np.float32
    assert (pairs.y == torch.from_numpy(y).bfloat16().float().numpy()).all()
    assert pairs.image_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (pairs.name, pairs.split, pairs.captions) == (tmp_path.name, "train", None)


def test_paired_takes_image_of(tmp_path: Path) -> None:
    np.save(tmp_path / "val_x.npy", features(3, 2, 8))
    np.save(tmp_path / "val_y.npy", features(4, 6))
    np.save(tmp_path / "val_image_of.npy", np.array([2, 0, 0, 1], np.int32))
    pairs = load(tmp_path, "val")
    assert pairs.image_of.tolist() == [2, 0, 0, 1]
    assert pairs.image_of.dtype == np.int64


@pytest.mark.parametrize(
    ("image_of", "message"),
    [
        (np.array([0, 1, 3, 0]), "row 2 is 3, there are images 0 to 2"),
        (np.array([0, -1, 2, 0]), "row 1 is -1, there are images 0 to 2"),
        (np.array([0, 1, 2]), r"must be \(4,\) integers, one for each caption; got \(3,\) int64"),
        (np.array([0.0, 1.0, 2.0, 0.0]), r"must be \(4,\) integers.*got \(4,\) float64"),
    ],
)
def test_image_of_must_name_images(tmp_path: Path, image_of: NDArray[np.int64], message: str) -> None:
    np.save(tmp_path / "x.npy", features(3, 8))
    np.save(tmp_path / "y.npy", features(4, 6))
    np.save(tmp_path / "of.npy", image_of)
    with pytest.raises(ValueError, match=rf"of\.npy: {message}"):
        paired(tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "of.npy")


def test_safetensors_with_several_tensors_are_chosen_by_name(tmp_path: Path) -> None:
    x, y = torch.ones(2, 8), torch.ones(4, 6)
    save_file({"x": x, "y": y}, tmp_path / "both.safetensors")
    pairs = paired(tmp_path / "both.safetensors", tmp_path / "both.safetensors")
    assert pairs.y is not None
    assert (pairs.name, pairs.x.shape, pairs.y.shape) == ("both", (2, 8), (4, 6))
    save_file({"a": x, "b": y}, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"one tensor, or one named 'x'; it holds \['a', 'b'\]"):
        paired(tmp_path / "both.safetensors", tmp_path / "both.safetensors")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 8), np.int64), "must be floating point, got int64"),
        (np.ones(8, np.float32), r"must have 2 or 3 dimensions, got shape \(8,\)"),
        (np.ones((0, 8), np.float32), r"must not be empty, got shape \(0, 8\)"),
        (np.array([[None]], dtype=object), "no array of numbers"),
    ],
)
def test_features_of_the_wrong_kind_are_refused(tmp_path: Path, array: NDArray[np.generic], message: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    np.save(tmp_path / "y.npy", features(4, 6))
    with pytest.raises(ValueError, match=rf"x\.npy: .*{message}"):
        paired(tmp_path / "x.npy", tmp_path / "y.npy")


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "test_x.npy", features(4, 8))
    with pytest.raises(ValueError, match=r"test_y\.npy or \.safetensors: no such file"):
        load(tmp_path, "test")
    np.save(tmp_path / "test_y.npy", features(4, 8))
    with pytest.raises(ValueError, match=r"has no train_x\.npy or train_x\.safetensors; known: 'test'"):
        load(tmp_path, "train")
    (tmp_path / "test_y.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"test_y\.npy and test_y\.safetensors both exist"):
        load(tmp_path, "test")
    (tmp_path / "test_y.npy").unlink()
    with pytest.raises(ValueError, match=r"test_y\.safetensors: not in safetensors format"):
        load(tmp_path, "test")
    with pytest.raises(ValueError, match=r"absent\.npy: no such file"):
        paired(tmp_path / "absent.npy", tmp_path / "test_x.npy")
    (tmp_path / "x.csv").touch()
    with pytest.raises(ValueError, match=r"must be a \.npy or a \.safetensors file"):
        paired(tmp_path / "x.csv", tmp_path / "test_x.npy")
    whole = (tmp_path / "test_x.npy").read_bytes()
    (tmp_path / "test_x.npy").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"test_x\.npy: no array of numbers"):
        paired(tmp_path / "test_x.npy", tmp_path / "test_x.npy")


# arrays of any kind


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_another_byte_order_are_what_they_are(tmp_path: Path, dtype: str, order: Any) -> None:
    x, y, tokens = features(4, 8), features(8, 6), features(8, 3, 6)
    expected = [torch.from_numpy(array.astype(dtype).astype(np.float32)) for array in (x, y, tokens)]
    for name, array in (("x", x), ("y", y), ("tokens", tokens), ("of", np.arange(8) // 2)):
        np.save(tmp_path / f"{name}.npy", array.astype(">i8" if name == "of" else dtype, order=order))
    with torch.device("meta"):  # another default device must not reach the data
        part, words = (
            taken(paired(*(tmp_path / f"{name}.npy" for name in ("x", captions, "of")))) for captions in ("y", "tokens")
        )
        values, lengths = words.y[torch.arange(8, device="cpu")]
    assert torch.equal(part.x, expected[0])
    assert torch.equal(part.y, expected[1])
    assert torch.equal(values, expected[2])
    assert lengths.tolist() == [3] * 8
    assert part.image_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert part.ids.tolist() == [0, 1, 2, 3]


def test_features_without_a_finite_norm_are_refused(tmp_path: Path) -> None:
    for side in ("x", "y"):
        for name in ("x", "y"):
            rows = features(4, 8)
            rows[2] *= 1e25 if name == side else 1
            np.save(tmp_path / f"{name}.npy", rows)
        with pytest.raises(ValueError, match=rf"{side}\.npy: row 2 is too large"):
            taken(paired(tmp_path / "x.npy", tmp_path / "y.npy"))
    regions = np.full((4, 36, 2), 3e38, np.float32)  # whose sum is infinite
    with pytest.raises(ValueError, match="mine, 'val': row 0 is too large"):
        taken(Pairs("mine", "val", regions, features(4, 2), np.arange(4), None))


# copies and processes


SLICES: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "all": lambda x: x,
    "fifths": lambda x: x[::5],
    "first": lambda x: x[:7],
    "later": lambda x: x[3:][2:],
    "backwards": lambda x: x[::-1],
    "inside": lambda x: x[:, 1:2, ::2],
}


def copies(value: Any) -> list[Any]:
    return [pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value)]


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize(("dtype", "order"), [("<f4", "C"), (">f2", "C"), ("<f8", "F")])
def test_maps_travel_as_their_path(tmp_path: Path, name: str, dtype: str, order: Any) -> None:
    np.save(tmp_path / "x.npy", features(200, 3, 50).astype(dtype, order=order))
    np.save(tmp_path / "y.npy", features(200, 6))
    pairs = paired(tmp_path / "x.npy", tmp_path / "y.npy")
    pairs = replace(pairs, x=SLICES[name](pairs.x))
    side = Mapped(pairs.x)
    assert len(pickle.dumps(pairs)) < 4000
    assert len(pickle.dumps(side)) < 1000
    for each in copies(pairs):
        for again in (each, *copies(each)):  # from a worker to its own
            assert isinstance(again.x, np.memmap)
            assert again.x.dtype == pairs.x.dtype
            assert not again.x.flags.writeable
            assert np.array_equal(again.x, pairs.x)
            assert np.array_equal(again.y, pairs.y)
            assert (again.name, again.split, again.captions) == (pairs.name, pairs.split, None)
    for each in copies(side):
        assert np.array_equal(each.array, pairs.x)


def test_a_folder_is_left_and_maps_still_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_precomp(tmp_path / "a", "test", features(4, 8).repeat(5, axis=0), 20)
    monkeypatch.chdir(tmp_path / "a")
    pairs = load(".", "test")
    monkeypatch.chdir(tmp_path)
    assert all(np.array_equal(each.x, features(4, 8)) for each in copies(pairs))


def test_what_is_in_memory_travels_by_value(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", features(40, 6))
    written = np.load(tmp_path / "x.npy", mmap_mode="c")  # a map that was written to, but not in its file
    written[3] = 9
    for x in (features(40, 6), written):
        pairs = Pairs("mine", "train", x, None, np.arange(40), ("a",) * 40)
        for each in copies(pairs):
            assert np.array_equal(each.x, x)
            assert each.captions == pairs.captions
    unpickled = copies(load("emoji", "val"))[0]
    assert np.array_equal(unpickled.x, load("emoji", "val").x)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", ["longer", "rewritten", "gone"])
def test_a_file_that_changed_is_no_copy(tmp_path: Path, when: str, change: str) -> None:
    for name in ("x", "y"):
        np.save(tmp_path / f"{name}.npy", features(40, 6))
    pairs, path = paired(tmp_path / "x.npy", tmp_path / "y.npy"), tmp_path / "x.npy"
    sent = pickle.dumps(pairs) if when == "after" else b""
    stat = path.stat()
    path.unlink()  # the map keeps the file that was there
    if change != "gone":
        np.save(path, features(41 if change == "longer" else 40, 6))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (change == "rewritten")))
    sent = sent or pickle.dumps(pairs)
    with pytest.raises(
        ValueError, match=r"x\.npy: (has changed since it was mapped|was mapped, and cannot be any more)"
    ):
        pickle.loads(sent)


# names


def test_unknown_names_and_splits_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name_or_path: 'coco' is no folder and no dataset; known: 'emoji'"):
        load("coco", "train")
    with pytest.raises(ValueError, match="split: emoji has no 'dev'; known: 'train', 'val', 'test'"):
        load("emoji", "dev")
    with pytest.raises(ValueError, match=r"holds no \{split\}_ims\.npy"):
        load(tmp_path, "train")


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    write_atomically(tmp_path / "a.bin", b"old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(tmp_path / "a.bin", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"
