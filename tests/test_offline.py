"""Mining whole datasets against the definition, every row's negatives sorted; and mining that is interrupted."""

import csv
import functools
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import goal
from goal import offline
from goal.cli import main

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
        if at.stop - at.start > 1:  # not those by which it is known again
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
            assert not list(tmp_path.rglob(".*")), "nothing half-written"
    assert calls >= 3
    check(tmp_path / "a.npz", x @ y.rows.T, np.arange(110), np.arange(400) % 130, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    if save_every == 0:
        assert y.reads <= 9 * 6 + 2 * calls, "only the block at work is read again"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rows", [(20, 60), (60, 20)])  # held by the first call and by the second, as memory allows
def test_stopped_between_any_two_files(rows: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, options = grid(70, seed=1), grid(100, seed=2), {"y_ids": np.arange(100), "save_every": 0.0}
    real = {name: getattr(offline, name) for name in ("write_atomically", "save_atomically")}
    for stop_at in itertools.count(1):
        written, out = itertools.count(1), tmp_path / f"{stop_at}.npz"

        def stopping(path: Path, content: Any, which: str, at: int = stop_at, count: Any = written) -> None:
            if next(count) == at:
                raise KeyboardInterrupt
            real[which](path, content)

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
    store = offline._Store(tmp_path / "partial", {}, 3, 10, torch.device("cpu"))
    store.keep_x(0, 5, 4, torch.zeros(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="has 5 rows of 6: delete"):
        store.rows_of_x(0, 6)


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
@pytest.mark.parametrize("at", ["rename", "rmtree"])
def test_stopped_at_the_very_end(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = grid(60), tmp_path / "a.npz"

    def stop(folder: Path, *_: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            if at == "rmtree":
                next(iter(folder.iterdir())).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((offline.shutil, "rmtree", stop) if at == "rmtree" else (Path, "rename", stop)))
        with pytest.raises(KeyboardInterrupt):
            offline.mine(x, x, 3, out=out)
    check(out, x @ x.T, np.arange(60), np.arange(60), 3)
    if at == "rmtree":
        with pytest.raises(ValueError, match="exists"):
            offline.mine(x, x, 3, out=out)
    else:
        offline.mine(x, x, 3, out=out)
        check(out, x @ x.T, np.arange(60), np.arange(60), 3)
    assert list(tmp_path.iterdir()) == [out]


def test_partial_results_are_of_one_call(tmp_path: Path) -> None:
    x, y = grid(110, seed=1), Interrupting(grid(110, seed=2))
    y.left = 0
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
offline.search(torch.ones(999, 64), [torch.ones(999, 64)])  # what libraries take when they are first used
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
        (TypeError, "x must be floating point, got torch.int64", {"x": np.ones((5, 6), np.int64)}),
        (TypeError, "x must be a .npy file or have a shape and rows to slice, got list", {"x": [[1.0]]}),
        (ValueError, r"x must have shape \(N, D\)", {"x": np.ones(5)}),
        (ValueError, "must be a .npy file", {"x": tmp_path / "x.safetensors"}),
        (ValueError, "no such file", {"x": tmp_path / "x.npy"}),
        (ValueError, "row 3 has NaN or inf", {"x": np.where(np.arange(5)[:, None] == 3, np.nan, x)}),
        (ValueError, "not finite: scale the embeddings down", {"x": np.full((5, 6), 3e38, np.float32)}),
    ]
    for kind, message, changed in refused:
        with pytest.raises(kind, match=message):
            offline.mine(**{"x": x, "y": x + 1, "out": out, **changed})
        partial = tmp_path / "a.npz.partial"
        if not message.startswith(("row 3", "not finite")):  # which only reading all of it tells
            assert not partial.exists(), "refused before anything is written"
        shutil.rmtree(partial, ignore_errors=True)
    out.write_bytes(b"")
    with pytest.raises(ValueError, match=r"exists\. Delete it, or choose another"):
        offline.mine(x, x, out=out)
    partial.mkdir()
    with pytest.raises(ValueError, match=r"exists, and what .* holds is not finished"):
        offline.mine(x, x, out=out)
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
