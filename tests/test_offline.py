"""Mining whole datasets against the definition, every row's negatives sorted; and mining that is interrupted."""

import csv
import errno
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_evaluation import KINDS, REFUSED

import goal
from goal import offline
from goal.cli import main
from goal.data.files import Busy, alone

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


def grid(n: int, d: int = 6, seed: int = 0) -> NDArray[np.float32]:
    """Rows on a coarse grid: all products are exact, and there are many ties."""
    return (np.random.default_rng(seed).integers(-3, 4, (n, d)) / 4).astype(np.float32)


def truth(S: NDArray[Any], ids: Any, y_ids: Any, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(index, similarity) of the k best of each row, the lowest index among ties; −1 and −inf where there are fewer."""
    index = np.full((len(S), k), -1, np.int64)
    similarity = np.full((len(S), k), -np.inf, np.float32)
    for i, row in enumerate(S):
        negatives = [j for j in range(len(row)) if ids is None or ids[i] != y_ids[j]]
        best = sorted(negatives, key=lambda j: (-row[j], j))[:k]
        index[i, : len(best)], similarity[i, : len(best)] = best, row[best]
    return index, similarity


def matrix(x: NDArray[Any], y: NDArray[Any], similarity: str) -> NDArray[Any]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    if similarity == "order":
        return -np.linalg.norm(np.maximum(0, y[None] - x[:, None]), axis=-1)
    return x @ y.T


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and tiles of few rows."""
    monkeypatch.setattr(offline, "BLOCK", 48)
    monkeypatch.setattr(offline, "_ROWS", 20)
    monkeypatch.setattr(offline, "_AT_ONCE", 7)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and no test cuts the power


def read(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


def check(path: Path, S: NDArray[Any], ids: Any, y_ids: Any, k: int) -> None:
    found = read(path)
    for side, similarities, own, others in (("x", S, ids, y_ids), ("y", S.T, y_ids, ids)):
        index, similarity = truth(similarities, own, others, k)
        np.testing.assert_array_equal(found[f"{side}_index"], index)
        np.testing.assert_allclose(found[f"{side}_similarity"], similarity, rtol=1e-6)


# ── the definition ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("similarity", ["dot", "order"])
@pytest.mark.parametrize("k", [1, 3, 17, 200])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 100), (75, 130), (130, 61)])
def test_both_sides_are_the_definition(n: int, m: int, k: int, similarity: str, tmp_path: Path) -> None:
    x, y = grid(n, seed=1), grid(m, seed=2)
    ids, y_ids = np.arange(n) // 3, np.random.default_rng(3).integers(0, n, m) // 3
    out = offline.mine(x, y, k, out=tmp_path / "a.npz", ids=ids, y_ids=y_ids, similarity=similarity)
    check(out, matrix(x, y, similarity), ids, y_ids, k)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("small")
def test_pairs_are_positives_by_default_and_captions_by_their_image(tmp_path: Path) -> None:
    x, y = grid(60, seed=1), grid(60, seed=2)
    check(offline.mine(x, y, 4, out=tmp_path / "a.npz"), x @ y.T, np.arange(60), np.arange(60), 4)
    y, image_of = grid(300, seed=2), np.arange(60).repeat(5)
    out = offline.mine(x, y, 4, y_ids=image_of, out=tmp_path / "b.npz")
    check(out, x @ y.T, np.arange(60), image_of, 4)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("labels", [1, 2, 40])
def test_few_labels_hide_much(labels: int, tmp_path: Path) -> None:
    x, y = grid(90, seed=1), grid(70, seed=2)
    ids, y_ids = (np.random.default_rng(seed).integers(0, labels, size) for seed, size in ((0, 90), (1, 70)))
    check(offline.mine(x, y, 5, ids=ids, y_ids=y_ids, out=tmp_path / "a.npz"), x @ y.T, ids, y_ids, 5)


@pytest.mark.usefixtures("small")
def test_equal_rows_tie_to_the_lowest_index(tmp_path: Path) -> None:
    x, y = np.ones((50, 4), np.float32), np.ones((170, 4), np.float32)
    found = read(offline.mine(x, y, 20, y_ids=np.arange(170) + 50, out=tmp_path / "a.npz"))
    assert (found["x_index"] == np.arange(20)).all()
    assert (found["y_index"] == np.arange(20)).all()


def test_large_tiles_and_cosine_against_float64(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2500, 24)).astype(np.float32), rng.normal(size=(5000, 24)).astype(np.float32)
    found = read(offline.mine(x, y, 10, y_ids=np.arange(5000) // 2, out=tmp_path / "a.npz", similarity="cosine"))
    unit = [rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True) for rows in (x, y)]
    S = unit[0] @ unit[1].T
    S[np.arange(5000) // 2, np.arange(5000)] = -np.inf
    for side, similarities in (("x", S), ("y", S.T)):
        best = -np.sort(-similarities, axis=1)[:, :10]
        taken = np.take_along_axis(similarities, found[f"{side}_index"], 1)
        assert np.abs(taken - best).max() <= 4 * np.finfo(np.float32).eps, "regret"
        assert np.abs(found[f"{side}_similarity"] - best).max() <= 4 * np.finfo(np.float32).eps
        assert all(len(set(row)) == 10 for row in found[f"{side}_index"].tolist())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [1, 33, 1000])
def test_a_stream_is_searched_block_by_block(size: int) -> None:
    x, y = grid(45, seed=1), grid(240, seed=2)
    blocks: Iterator[Any] = (y[start : start + size] for start in range(0, 240, size))
    found = offline.search(torch.from_numpy(x), blocks, 6)
    for one, other in zip(found, truth(x @ y.T, None, None, 6), strict=True):
        np.testing.assert_array_equal(one.numpy(), other)
    ids, y_ids = np.arange(45) // 2, np.arange(240) // 8
    blocks = (torch.from_numpy(y[start : start + size]).double() for start in range(0, 240, size))
    found = offline.search(torch.from_numpy(x).half(), blocks, 6, ids=ids, y_ids=torch.from_numpy(y_ids))
    for one, other in zip(found, truth(x @ y.T, ids, y_ids, 6), strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


# ── merging ─────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_order_by_similarity_then_by_the_lowest_index() -> None:
    similarity = torch.tensor([2.5, -0.0, 0.0, -3.0, 1e-40, -torch.inf, 2.5, -1e-40])
    index = torch.tensor([7, 4, 9, 0, 2**32 - 1, 3, 6, 1])
    keys = offline._keys(similarity, index)
    expected = sorted(range(8), key=lambda i: (-similarity[i].item() + 0.0, index[i].item()))
    assert keys.argsort(descending=True).tolist() == expected
    found, values = offline._decoded(keys)
    assert torch.equal(values, similarity + 0.0)
    assert found.tolist() == [7, 4, 9, 0, 2**32 - 1, -1, 6, 1]


def test_merging_is_associative_commutative_and_repeatable() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.integers(0, 6, (5, 40)).astype(np.float32))
    keys = offline._keys(values, torch.arange(40).expand(5, 40))
    expected = keys.sort(dim=1, descending=True).values[:, :8]
    for order in itertools.permutations(range(4)):
        merged = offline._no_keys(5, 8, torch.device("cpu"))
        for part in (*order, order[0]):  # the first a second time
            merged = offline.merge(merged, keys[:, part * 10 : part * 10 + 10])
        assert torch.equal(merged, expected)
        halves = [
            offline.merge(keys[:, a * 10 : a * 10 + 8], keys[:, b * 10 : b * 10 + 10])
            for a, b in (order[:2], order[2:])
        ]
        rest = [keys[:, a * 10 + 8 : a * 10 + 10] for a in (order[0], order[2])]
        assert torch.equal(offline.merge(offline.merge(*halves), torch.cat(rest, 1)), expected)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_ending_tells_the_same(tmp_path: Path) -> None:
    x, y = grid(9, seed=1), grid(12, seed=2)
    y_ids = np.array([*range(9), 0, 0, 0])
    paths = {end: offline.mine(x, y, 11, y_ids=y_ids, out=tmp_path / f"a{end}") for end in (".npz", ".csv", ".parquet")}
    arrays = read(paths[".npz"])
    expected = []
    for side in ("x", "y"):
        index = arrays[f"{side}_index"]
        for row, column in np.argwhere(index >= 0).tolist():
            expected.append(
                (side, row, column + 1, int(index[row, column]), float(arrays[f"{side}_similarity"][row, column]))
            )
    assert sum(1 for each in expected if each[0] == "x") < 9 * 11, "some are missing: fewer than k negatives"
    with paths[".csv"].open() as file:
        rows = [(a, int(b), int(c), int(d), float(e)) for a, b, c, d, e in list(csv.reader(file))[1:]]
    assert rows == expected
    from pyarrow import parquet

    table = parquet.read_table(paths[".parquet"])
    assert table.column_names == ["side", "row", "rank", "negative", "similarity"]
    assert [tuple(row.values()) for row in table.to_pylist()] == expected


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_are_read_piece_by_piece(dtype: Any, tmp_path: Path) -> None:
    x, y = grid(70, seed=1), grid(200, seed=2)
    np.save(tmp_path / "x.npy", x.astype(dtype))
    np.save(tmp_path / "y.npy", y.astype(dtype))
    out = offline.mine(tmp_path / "x.npy", str(tmp_path / "y.npy"), 3, y_ids=np.arange(200), out=tmp_path / "a.npz")
    check(out, x @ y.T, np.arange(70), np.arange(200), 3)


class Interrupting:
    """Rows that stop whoever reads them too often."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self.rows, self.shape, self.dtype = rows, rows.shape, rows.dtype
        self.left, self.reads = 10**9, 0

    def __getitem__(self, at: slice) -> NDArray[Any]:
        if at.stop - at.start > 1:  # not the row by which its kind is known
            self.left -= 1
            self.reads += 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.rows[at]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_what_is_interrupted_goes_on(save_every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = grid(110, seed=1), Interrupting(grid(400, seed=2))
    rows = iter(itertools.cycle([40, 20, 60]))  # as if the memory differed from call to call
    monkeypatch.setattr(offline, "_rows_in", lambda *_: next(rows))
    options: dict[str, Any] = {"y_ids": np.arange(400) % 130, "out": tmp_path / "a.npz", "save_every": save_every}
    calls = 0
    for allowed in itertools.count(12):
        y.left = allowed
        calls += 1
        try:
            offline.mine(x, y, 5, **options)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "a.npz").exists()
            assert not list(tmp_path.rglob(".*")), "nothing half-written, and no lock"
    assert calls >= 3
    check(tmp_path / "a.npz", x @ y.rows.T, np.arange(110), np.arange(400) % 130, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    if save_every == 0:
        digests = 9 * (calls + 1)  # of all 9 blocks, before each call and at the end
        assert y.reads <= digests + 9 * 6 + 2 * calls, "only the block at work is read again"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rows", [(20, 60), (60, 20)])  # held by the first call and by the second, as memory allows
def test_stopped_between_any_two_files(rows: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, options = grid(70, seed=1), grid(100, seed=2), {"y_ids": np.arange(100), "save_every": 0.0}
    real = {name: getattr(offline, name) for name in ("write_atomically", "atomic_file")}
    for stop_at in itertools.count(1):
        written, out = itertools.count(1), tmp_path / f"{stop_at}.npz"

        def stopping(*given: Any, which: str, at: int = stop_at, count: Any = written) -> Any:
            if next(count) == at:
                raise KeyboardInterrupt
            return real[which](*given)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(offline, name, functools.partial(stopping, which=name))
            patch.setattr(offline, "_rows_in", lambda *_: rows[0])
            try:
                offline.mine(x, y, 3, out=out, **options)
                break
            except KeyboardInterrupt:
                patch.setattr(offline, "_rows_in", lambda *_: rows[1])
                for name, write in real.items():
                    patch.setattr(offline, name, write)
                offline.mine(x, y, 3, out=out, **options)
        check(out, x @ y.T, np.arange(70), np.arange(100), 3)
    assert stop_at > 10


def test_a_part_that_is_short_is_refused(tmp_path: Path) -> None:
    store = offline._Store(tmp_path, {"k": 3}, 8, 10, torch.device("cpu"))
    store.keep_x(0, 5, 4, torch.zeros(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="has 5 rows of 6: delete"):
        store.rows_of_x(0, 6)
    with pytest.raises(ValueError, match=r"x-0000000000\.npy is damaged"):
        list(store._keys("x", 4))  # which says that there are 4 rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_are_sources(dtype: torch.dtype, tmp_path: Path) -> None:
    x, y = (torch.from_numpy(grid(40, seed=seed)).to(dtype).requires_grad_() for seed in (1, 2))
    out = offline.mine(x, y, 3, out=tmp_path / "a.npz")
    check(out, (x.double() @ y.double().T).detach().numpy(), np.arange(40), np.arange(40), 3)
    empty = [x[:0].detach(), y.detach(), y[:0].detach()]
    assert offline.search(x.detach(), empty, k=3).index.shape == (40, 3)


@pytest.mark.usefixtures("small")
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = grid(30, seed=1), grid(60, seed=2)
    real = np.save
    for fail_at in range(1, 5):
        written = itertools.count(1)

        def failing(file: Any, array: Any, at: int = fail_at, count: Any = written, **_: Any) -> None:
            if next(count) == at:
                file.write(b"half of it")
                raise OSError("disk full")
            real(file, array)

        with monkeypatch.context() as patch:
            patch.setattr(np, "save", failing)
            try:
                offline.mine(x, y, 3, y_ids=np.arange(60), out=tmp_path / "a.npz")
            except OSError:
                assert not (tmp_path / "a.npz").exists()
                assert not list(tmp_path.rglob(".*"))
    out = tmp_path / "a.npz"
    if not out.exists():
        offline.mine(x, y, 3, y_ids=np.arange(60), out=out)
    check(out, x @ y.T, np.arange(30), np.arange(60), 3)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("at", ["before out is there", "before the folder goes", "while the folder goes"])
def test_stopped_at_the_very_end(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, out, options = grid(60), tmp_path / "a.npz", {"y_ids": np.arange(60)}

    def stop(folder: Path) -> None:
        if (folder / "job.json").exists():
            if at == "while the folder goes":
                (folder / "job.json").unlink()
            raise KeyboardInterrupt

    def compare(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "before out is there":
            patch.setattr(offline._Store, "check_place", lambda store: compare() if store.start == 60 else None)
        else:
            patch.setattr(offline, "_clear", stop)
        with pytest.raises(KeyboardInterrupt):
            offline.mine(x, x, 3, out=out, **options)
    assert out.exists() == (at != "before out is there")
    if at == "while the folder goes":
        with pytest.raises(ValueError, match="exists"):
            offline.mine(x, x, 3, out=out, **options)
    else:
        offline.mine(x, x, 3, out=out, **options)
    check(out, x @ x.T, np.arange(60), np.arange(60), 3)
    assert list(tmp_path.iterdir()) == [out]


def stopped(x: Any, y: Any, out: Path, **options: Any) -> Path:
    """The partial results of a call that was stopped after many of its blocks of y, in its second part of x."""
    with pytest.MonkeyPatch.context() as patch:
        count, real = itertools.count(1), offline._Store.keep_x

        def keep(store: Any, *given: Any) -> None:
            real(store, *given)
            if next(count) == 5:
                raise KeyboardInterrupt

        patch.setattr(offline._Store, "keep_x", keep)
        patch.setattr(offline, "_rows_in", lambda *_: 40)
        with pytest.raises(KeyboardInterrupt):
            offline.mine(x, y, 3, out=out, save_every=0.0, **options)
    folder = out.with_name(f"{out.name}.partial")
    names = {path.name for path in folder.iterdir()}
    blocks = {f"y-{first:010}.npy" for first in (0, 48, 96)}
    assert names == blocks | {"job.json", "place.json", "x-0000000000.npy", "x-0000000040.npy"}
    return folder


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("what", ["x", "y", "ids", "y_ids"])
def test_content_decides_what_goes_on(what: str, tmp_path: Path) -> None:
    """Files keep their names whatever is in them; and the same numbers may come from elsewhere, in another form."""
    given = {"x": grid(110, seed=1), "y": grid(130, seed=2), "ids": np.arange(110), "y_ids": np.arange(130) % 110}
    S, path, out = given["x"] @ given["y"].T, tmp_path / "rows.npy", tmp_path / "a.npz"
    stopped(out=out, **given)
    for change in (1, -1):
        given[what][37] += change
        np.save(path, given[what].astype(">f8" if what in ("x", "y") else ">i8"))
        taken = {**given, what: path if what in ("x", "y") else np.load(path, mmap_mode="r")}
        if change == 1:
            with pytest.raises(
                ValueError, match=f"holds what another call has found so far: {what[0].replace('i', 'x')} d"
            ):
                offline.mine(out=out, k=3, **taken)
    check(offline.mine(out=out, k=3, **taken), S, given["ids"], given["y_ids"], 3)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("side", ["x", "y"])
def test_rows_that_change_while_they_are_mined(side: str, tmp_path: Path) -> None:
    sides: dict[str, Any] = {"x": grid(110, seed=1), "y": grid(130, seed=2)}
    sides[side] = changing = Interrupting(sides[side])

    def read(at: slice) -> Any:
        changing.reads += 1
        if changing.reads == 6:
            changing.rows[109] += 1
        return changing.rows[at]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupting, "__getitem__", lambda _, at: read(at))
        with pytest.raises(ValueError, match=f"^{side} changed while they were mined: delete .*a.npz.partial"):
            offline.mine(**sides, k=3, y_ids=np.arange(130), out=tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "another's":
        path.write_bytes(next(p for p in path.parent.glob("[xy]-*.npy") if p.name != path.name).read_bytes())
    elif how == "wide":
        np.save(path, np.load(path).repeat(2, axis=1))
    elif how == "float":
        np.save(path, np.load(path).astype(float))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        changed = bytearray(content)
        changed[-40] ^= 1
        written = {"empty": b"", "cut": content[:-9], "short": content[: len(content) // 2], "longer": content + b"1"}
        path.write_bytes({**written, "a bit": changed, "nonsense": b"[" * 100_000, "list": b"[]"}[how])


DAMAGE = {
    "[xy]-*.npy": ["missing", "empty", "cut", "short", "longer", "a bit", "another's", "wide", "float", "folder"],
    "place.json": ["empty", "cut", "a bit", "nonsense", "list"],
    "job.json": ["empty", "cut", "nonsense", "list"],
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kind", "how"), [(kind, how) for kind, each in DAMAGE.items() for how in each])
def test_damage_is_named(kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file of a store is damaged before the call goes on, or in its course, no output is made of it."""
    given: dict[str, Any] = {"x": grid(110, seed=1), "y": grid(130, seed=2), "y_ids": np.arange(130)}
    pristine = stopped(out=tmp_path / "pristine.npz", **given)
    out, names = tmp_path / "a.npz", [path.name for path in pristine.glob(kind)]
    both = (True, False) if kind == "[xy]-*.npy" else (True,)  # the place is not read again in the course of a call
    for name, before in itertools.product(names, both):
        path = Path(shutil.copytree(pristine, f"{out}.partial")) / name

        def write(*given: Any, path: Path = path) -> None:
            damaged(path, how)
            offline._write_npz(*given)

        with monkeypatch.context() as patch:
            if before:
                damaged(path, how)
            else:
                patch.setitem(offline._WRITERS, ".npz", write)
            with pytest.raises(ValueError, match=rf"{name} (is damaged|is missing): delete .*a.npz.partial, and begin"):
                offline.mine(**given, k=3, out=out)
        assert not out.exists()
        shutil.rmtree(f"{out}.partial")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["x-0000000040.npy", "y-0000000048.npy", "place.json"])
def test_a_file_of_another_call_is_damage(name: str, tmp_path: Path) -> None:
    x, y, options = grid(110, seed=1), grid(130, seed=2), {"y_ids": np.arange(130)}
    folder = stopped(x, y, tmp_path / "a.npz", **options)
    other = stopped(x, grid(130, seed=3), tmp_path / "b.npz", **options)
    shutil.copy(other / name, folder / name)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        offline.mine(x, y, 3, out=tmp_path / "a.npz", **options)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["job.json", "place.json"])
def test_without_its_head_a_store_is_begun_anew(name: str, tmp_path: Path) -> None:
    x, y, options = grid(110, seed=1), grid(130, seed=2), {"y_ids": np.arange(130)}
    folder = stopped(x, y, tmp_path / "a.npz", **options)
    (folder / name).unlink()
    for path in folder.glob("*.npy"):
        path.write_bytes(b"what is not looked at")
    check(offline.mine(x, y, 3, out=tmp_path / "a.npz", **options), x @ y.T, np.arange(110), np.arange(130), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


# ── several calls at once ───────────────────────────────────────────────────────────────────────────────────


class Waiting(Interrupting):
    """Rows that wait, when they are mined, until they may go on."""

    def __init__(self, rows: NDArray[Any]) -> None:
        super().__init__(rows)
        self.reached, self.free = threading.Event(), threading.Event()

    def __getitem__(self, at: slice) -> NDArray[Any]:
        if at.stop - at.start > 1 and (at.start, at.stop) == (0, 48):
            self.reads += 1
            if self.reads == 2:  # the first is for the digest
                self.reached.set()
                assert self.free.wait(60)
        return self.rows[at]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_one_call_at_a_time(patience: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another call, of any arguments, names the one that is at work, or waits for it and sees that out is there."""
    y, x, out = Waiting(grid(100, seed=2)), grid(100, seed=1), tmp_path / "a.npz"
    entered = threading.Event()

    def patient(folder: Path) -> Any:
        entered.set()
        return alone(folder, patience)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(offline.mine, x, y, 3, out=out)
        assert y.reached.wait(60)
        monkeypatch.setattr(offline, "alone", patient)
        if patience:
            second = pool.submit(offline.mine, x, x, 5, out=out)
            assert entered.wait(60)
        else:
            with pytest.raises(Busy, match=rf"a\.npz\.partial: is in use by process {os.getpid()}"):
                offline.mine(x, y, 3, out=out)
        y.free.set()
        check(first.result(60), x @ y.rows.T, np.arange(100), np.arange(100), 3)
        if patience:
            with pytest.raises(ValueError, match=r"exists\. Delete it, or choose another"):
                second.result(60)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("small")
def test_two_outs_in_one_folder(tmp_path: Path) -> None:
    y, x, outs = Waiting(grid(100, seed=2)), grid(100, seed=1), [tmp_path / f"{'long' * 20}{i}.npz" for i in range(2)]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(offline.mine, x, y, 3, out=outs[0])
        assert y.reached.wait(60)
        check(offline.mine(x, x, 5, out=outs[1]), x @ x.T, np.arange(100), np.arange(100), 5)
        y.free.set()
        check(first.result(60), x @ y.rows.T, np.arange(100), np.arange(100), 3)
    assert sorted(tmp_path.iterdir()) == outs


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("meanwhile", ["out", "folder"])
def test_what_others_do_meanwhile(meanwhile: str, tmp_path: Path) -> None:
    y, x, out = Waiting(grid(100, seed=2)), grid(100, seed=1), tmp_path / "a.npz"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(offline.mine, x, y, 3, out=out)
        assert y.reached.wait(60)
        if meanwhile == "out":
            out.write_bytes(b"of somebody else")
        else:
            shutil.rmtree(f"{out}.partial")
            Path(f"{out}.partial").mkdir()
        y.free.set()
        with pytest.raises(
            ValueError, match="exists" if meanwhile == "out" else "was removed while a call was at work"
        ):
            first.result(60)
    if meanwhile == "out":
        assert out.read_bytes() == b"of somebody else"
        out.unlink()
    check(offline.mine(x, y, 3, out=out), x @ y.rows.T, np.arange(100), np.arange(100), 3)
    assert list(tmp_path.iterdir()) == [out]


def test_partial_results_are_of_one_call(tmp_path: Path) -> None:
    x, y = grid(110, seed=1), Interrupting(grid(110, seed=2))
    y.left = 1  # which the digest reads
    with pytest.raises(KeyboardInterrupt):
        offline.mine(x, y, 5, out=tmp_path / "a.npz")
    y.left = 100
    x[109] += 1
    with pytest.raises(ValueError, match=r"a\.npz\.partial holds what another call has found so far: k, x differ"):
        offline.mine(x, y, 6, out=tmp_path / "a.npz")
    assert set(json.loads((tmp_path / "a.npz.partial" / "job.json").read_text())) == {"k", "similarity", "x", "y"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of memory")
def test_memory_is_bounded(tmp_path: Path) -> None:
    for name, rows in (("x", 100_000), ("y", 2048)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float16))
    code = """
import pathlib, sys, torch
from goal import offline

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
labels = torch.arange(2048) + 100_000
offline.mine(torch.ones(999, 64), torch.ones(999, 64), 3, out=f"first-{sys.argv[1]}.npz")  # what libraries take
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = resident()
offline.mine("x.npy", "y.npy", 3, y_ids=labels, out=f"{sys.argv[1]}.npz", memory=int(sys.argv[1]))
print(resident() - before)
"""
    peaks = []
    for memory in (28 << 20, 1 << 30):
        command = [sys.executable, "-c", code, str(memory)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        peaks.append(int(run.stdout))
    assert peaks[0] <= 28 << 20, f"{peaks[0] >> 20} MB"
    assert peaks[1] > 34 << 20, "it would have been more"
    one, other = (read(tmp_path / f"{memory}.npz") for memory in (28 << 20, 1 << 30))
    assert all(np.array_equal(one[name], other[name]) for name in one)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────


def test_what_is_refused(tmp_path: Path) -> None:
    x, out = grid(5), tmp_path / "a.npz"
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"out must end in one of \.parquet, \.csv, \.npz, got .*a\.txt", {"out": tmp_path / "a.txt"}),
        (ValueError, "out: there is no folder", {"out": tmp_path / "no" / "a.npz"}),
        (ValueError, "k must be a whole number >= 1, got 0", {"k": 0}),
        (TypeError, "k must be a whole number", {"k": 2.0}),
        (
            ValueError,
            r"memory must be at least \d+ bytes \(goal mine --memory 0\.\d+\) for D = 6 and k = 10, got 1000",
            {"memory": 1000},
        ),
        (ValueError, r"y_ids \(goal mine --image-of\) is needed where N ≠ M", {"y": grid(6)}),
        (ValueError, "x and y must have the same D", {"y": grid(5, 7)}),
        (ValueError, r"y_ids must have shape \(5,\)", {"y_ids": [1, 2]}),
        (TypeError, "ids must be integers", {"ids": np.ones(5)}),
        (ValueError, "similarity", {"similarity": "euclid"}),
        (TypeError, "x must have one of the dtypes .*, got torch.int64", {"x": np.ones((5, 6), np.int64)}),
        (TypeError, "x must be a .npy file or have a shape and rows to slice, got list", {"x": [[1.0]]}),
        (ValueError, r"x must have shape \(N, D\)", {"x": np.ones(5)}),
        (ValueError, "must be a .npy file", {"x": tmp_path / "x.safetensors"}),
        (ValueError, "no such file", {"x": tmp_path / "x.npy"}),
        (ValueError, "row 3 has NaN or inf", {"x": np.where(np.arange(5)[:, None] == 3, np.nan, x)}),
        (ValueError, "not finite: scale the embeddings down", {"x": np.full((5, 6), 3e38, np.float32)}),
        (ValueError, "k must be at most 16777216, got 1000000000", {"k": 10**9}),
        (ValueError, r"save_every \(goal mine --save-every\) must be a finite .*>= 0, got nan", {"save_every": np.nan}),
        (ValueError, "save_every .* got inf", {"save_every": np.inf}),
        (ValueError, "save_every .* got -1", {"save_every": -1}),
        (TypeError, "save_every .* got '1'", {"save_every": "1"}),
        (ValueError, "device .*'nowhere' cannot be used", {"device": "nowhere"}),
        (ValueError, "device .*'meta' cannot be used", {"device": "meta"}),
    ]
    for kind, message, changed in refused:
        with pytest.raises(kind, match=message):
            offline.mine(**{"x": x, "y": x + 1, "out": out, **changed})
        partial = tmp_path / "a.npz.partial"
        if not message.startswith("not finite"):  # which only the products tell
            assert not partial.exists(), "refused before anything is written"
        shutil.rmtree(partial, ignore_errors=True)
    out.write_bytes(b"")
    with pytest.raises(ValueError, match=r"exists\. Delete it, or choose another"):
        offline.mine(x, x, out=out)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("small")
def test_an_out_that_exists_beside_partial_results(tmp_path: Path) -> None:
    x, y, out = grid(110, seed=1), grid(130, seed=2), tmp_path / "a.npz"
    stopped(x, y, out, y_ids=np.arange(130))
    out.write_bytes(b"")
    with pytest.raises(ValueError, match=r"exists, and what .* holds is not finished"):
        offline.mine(x, y, 3, y_ids=np.arange(130), out=out)
    assert out.read_bytes() == b""


def test_what_a_search_refuses() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="ids and y_ids are given together"):
        offline.search(x, [x], ids=[1, 2, 3])
    for length, said in ((5, "has at least 6 rows"), (7, "has 6 rows")):
        with pytest.raises(ValueError, match=f"y_ids has {length} integers, and the stream {said}"):
            offline.search(x, [x, x], ids=[1, 2, 3], y_ids=torch.arange(length))
    with pytest.raises(ValueError, match=r"the stream must have rows of 2 numbers, got shape \(3, 4\)"):
        offline.search(x, [torch.ones(3, 4)])
    with pytest.raises(ValueError, match="the stream must be finite in float32, but row 4 has NaN or inf"):
        offline.search(x, [x, x.clone().index_fill_(0, torch.tensor(1), torch.nan)])


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────


def test_goal_mine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y, image_of = grid(20, seed=1), grid(60, seed=2), np.arange(60) // 3
    for name, rows in (("a", x), ("b", y), ("image_of", image_of)):
        np.save(f"{name}.npy", rows)
    command = ["mine", "--images", "a.npy", "--texts", "b.npy", "-k", "4", "--similarity", "dot"]
    assert main([*command, "--image-of", "image_of.npy", "--out", "n.npz"]) == 0
    assert capsys.readouterr().out == "n.npz\n"
    check(Path("n.npz"), x @ y.T, np.arange(20), image_of, 4)
    assert main([*command, "--out", "n.csv"]) == 2
    assert "y_ids (goal mine --image-of) is needed where N ≠ M" in capsys.readouterr().err
    assert main([*command, "--image-of", "image_of.npy", "--out", "n.txt"]) == 2
    assert "goal mine: out must end in one of" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main([*command, "--image-of", "image_of.npy", "--out", "n.parquet"]) == 2
    assert "goal-objectives[mine]" in capsys.readouterr().err
    assert goal.offline is offline


# ── rows, ids and settings of any kind ──────────────────────────────────────────────────────────────────────────────


class Lying:
    """Rows to slice that are not as their shape says."""

    def __init__(self, shape: Any, rows: Any) -> None:
        self.shape, self.rows = shape, rows

    def __getitem__(self, at: slice) -> Any:
        return self.rows if callable(self.rows) else self.rows[at]


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_sources(kind: str, tmp_path: Path) -> None:
    x, y = grid(60, seed=1), grid(60, seed=2)
    made = KINDS[kind](x, tmp_path)
    if kind not in ("list", "table"):  # which have no rows to slice
        out = offline.mine(y, made, 3, out=tmp_path / "a.npz")
        check(out, y @ x.T, np.arange(60), np.arange(60), 3)
    for found in (offline.search(torch.from_numpy(y), [made], 3), offline.search(torch.from_numpy(y), [x], 3)):
        for one, other in zip(found, truth(y @ x.T, None, None, 3), strict=True):
            np.testing.assert_array_equal(one.numpy(), other)
    found = offline.search(made, [y], 3)
    np.testing.assert_array_equal(found.index.numpy(), truth(x @ y.T, None, None, 3)[0])


class Frame(Lying):
    """A table whose slices go by an index that runs backwards."""

    def __getitem__(self, at: slice) -> Any:
        return self.rows[::-1][at]

    def to_numpy(self) -> Any:
        return self.rows


def test_a_table_is_read_by_position(tmp_path: Path) -> None:
    x, y = grid(60, seed=1), grid(60, seed=2)
    out = offline.mine(Frame(x.shape, x), y, 3, out=tmp_path / "a.npz")
    check(out, x @ y.T, np.arange(60), np.arange(60), 3)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind != "uneven"])
def test_kinds_of_sources_that_are_refused(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    x = np.random.default_rng(0).integers(1, 8, (6, 6)).astype(np.float32)
    if kind == "longdouble" and np.dtype(np.longdouble).itemsize == 8:
        return  # where it is float64
    for name, call in {
        "x": lambda bad: offline.mine(bad, x, out=tmp_path / "a.npz"),
        "y": lambda bad: offline.mine(x, bad, out=tmp_path / "a.npz"),
        "the stream": lambda bad: offline.search(torch.from_numpy(x), [bad]),
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^{name} .*({message})"):
            call(make(x))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Lying((9, 4), np.ones((9, 3), np.float32)), r"x must have rows of 4 numbers, got shape \(1, 3\)"),
        (Lying((9, 4), np.ones((7, 4), np.float32)), r"x\[0:9\] gave 7 rows"),
        (Lying((9, 4), np.ones(9, np.float32)), r"x must have rows of 4 numbers, got shape \(1,\)"),
        (Lying((9, 4), lambda: None), "x must be a tensor or an array of numbers"),
        (Lying((9, 4), [None] * 9), "x must be a tensor or an array of numbers, got list of object"),
        (Lying((9, -4), np.ones((9, 4))), r"x must have shape \(N, D\) with rows and columns, got \(9, -4\)"),
        (Lying((9, 4.0), np.ones((9, 4))), r"x must have shape \(N, D\)"),
        (Lying((None, 4), np.ones((9, 4))), r"x must have shape \(N, D\)"),
        (Lying(None, np.ones((9, 4))), r"x must have shape \(N, D\)"),
        (Lying(9, np.ones((9, 4))), r"x must have shape \(N, D\)"),
        (Lying((9, 4, 1), np.ones((9, 4))), r"x must have shape \(N, D\)"),
        (Lying((10**30, 4), np.ones((9, 4))), "x and y may have up to 4294967295 rows"),
        (np.ones(9, [("a", "f4"), ("b", "f4")]), r"x must have shape \(N, D\)"),
    ],
)
def test_a_shape_that_lies(source: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        offline.mine(source, np.ones((9, 4), np.float32), y_ids=np.arange(9), out=tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "u1", object])
def test_ids_of_any_integer_kind(dtype: Any, tmp_path: Path) -> None:
    x, y = grid(40, seed=1), grid(50, seed=2)
    ids, y_ids = np.arange(40) // 2, np.arange(50) % 20
    out = offline.mine(x, y, 3, ids=ids.astype(dtype), y_ids=y_ids.astype(dtype), out=tmp_path / "a.npz")
    check(out, x @ y.T, ids, y_ids, 3)
    huge = ids + 2**62, (y_ids + 2**62).tolist()  # as float64 many are equal
    check(offline.mine(x, y, 3, ids=huge[0], y_ids=huge[1], out=tmp_path / "b.npz"), x @ y.T, ids, y_ids, 3)
    found = offline.search(torch.from_numpy(x), [y], 3, ids=-huge[0], y_ids=[-label for label in huge[1]])
    np.testing.assert_array_equal(found.index.numpy(), truth(x @ y.T, ids, y_ids, 3)[0])


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)])
def test_what_the_process_has_set_as_default_changes_nothing(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    x, y, before = grid(40, seed=1), grid(40, seed=2), torch.get_default_dtype()
    try:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        out = offline.mine(
            x, y, np.int64(3), memory=np.int64(1 << 30), save_every=np.float32(1), out=tmp_path / "a.npz"
        )
        found = offline.search(torch.from_numpy(x), [y], 3)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    check(out, x @ y.T, np.arange(40), np.arange(40), 3)
    np.testing.assert_array_equal(found.index.numpy(), truth(x @ y.T, None, None, 3)[0])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("end", [".npz", ".csv", ".parquet"])
def test_a_full_disk_is_named_with_the_file(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = grid(60), tmp_path / f"a{end}"
    real = offline._Store._keys

    def full(store: Any, side: str, end: int) -> Iterator[Any]:
        if end == 60:  # the output is being written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(store, side, end)

    with monkeypatch.context() as patch:
        patch.setattr(offline._Store, "_keys", full)
        with pytest.raises(OSError, match=rf"a\{end} cannot be written: No space left"):
            offline.mine(x, x + 1, 3, out=out)
    assert not list(tmp_path.rglob(".*"))
    first = offline.mine(x, x + 1, 3, out=out).read_bytes()
    out.unlink()
    assert offline.mine(x, x + 1, 3, out=out).read_bytes() == first, "equal calls write equal files"


def test_what_killed_calls_have_left(tmp_path: Path) -> None:
    x, y, out = grid(110, seed=1), grid(130, seed=2), tmp_path / "a.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "BLOCK", 48)
        folder = stopped(x, y, out, y_ids=np.arange(130))
        for name in (".a.npz.aaaaaaaa.tmp", ".place.json.bbbbbbbb.tmp", ".lock", ".locked-by", "a.npz"):
            (folder / name).write_bytes(b"half")
        check(offline.mine(x, y, 3, y_ids=np.arange(130), out=out), x @ y.T, np.arange(110), np.arange(130), 3)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--memory", "inf"], "--memory must be a finite number of gigabytes > 0, got inf"),
        (["--memory", "nan"], "--memory must be .* got nan"),
        (["--memory", "-1"], "--memory must be .* got -1"),
        (["--memory", "0"], "--memory must be .* got 0"),
        (["--memory", "1e300"], "--memory must be .* got 1e[+]300"),
        (["--save-every", "nan"], "--save-every.* got nan"),
        (["--save-every", "inf"], "--save-every.* got inf"),
        (["--save-every", "-1"], "--save-every.* got -1"),
        (["-k", "1000000000"], "k must be at most"),
        (["-k", "-1"], "k must be a whole number >= 1"),
        (["--device", "nowhere"], "--device"),
        (["--image-of", "far.npy"], r"far\.npy: row 3 is 99, there are images 0 to 4"),
        (["--image-of", "before.npy"], r"before\.npy: row 4 is -1, there are images 0 to 4"),
        (["--image-of", "large.npy"], r"large\.npy: row 0 is 18446744073709551615, there are"),
        (["--image-of", "floats.npy"], r"floats\.npy: must be \(5,\) integers"),
        (["--image-of", "short.npy"], r"short\.npy: must be \(5,\) integers"),
    ],
)
def test_what_goal_mine_refuses(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", grid(5))
    np.save("far.npy", [0, 1, 2, 99, 4])
    np.save("before.npy", [0, 1, 2, 3, -1])
    np.save("large.npy", np.array([2**64 - 1, 1, 2, 3, 4], np.uint64))
    np.save("floats.npy", np.arange(5.0))
    np.save("short.npy", np.arange(4))
    assert main(["mine", "--images", "a.npy", "--texts", "a.npy", "--out", "n.npz", *given]) == 2
    assert re.match(f"goal mine: .*{message}", capsys.readouterr().err)
    assert not list(tmp_path.glob("n.npz*"))
