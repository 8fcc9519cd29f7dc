"""Hard negatives of complete datasets: the exact k most similar of every row, both ways, from files larger than memory.

The unit of work is a tile of S, as everywhere in the library: computed, reduced along both sides, dropped. A tile gives
each row its k best negatives as sorted *keys*, integers that order by similarity and then by the lowest index. So
merging means taking the k largest keys. It is associative, commutative and repeatable, because a repeated key counts
once.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
import math
import numbers
import operator
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool1d

from goal import validation
from goal.data.files import (
    BAR_BYTES,
    Damaged,
    alone,
    atomic_file,
    read_array,
    read_json,
    require,
    write_atomically,
)
from goal.data.terminal import bar
from goal.evaluation import exact_float32, floating
from goal.similarity import Dot, bind

BLOCK = 4096  # rows of y read at a time, and per file of partial results
_ROWS = 1024  # rows of x in a tile
_GROUP = 16  # entries of a tile reduced to their maximum before single entries are compared
_AT_ONCE = 512  # rows of a tile whose groups are examined at a time
_LOW = 0xFFFFFFFF
_MOST = 1 << 24  # maximum number of negatives per row
_DIGEST = 32  # bytes of SHA-256
_CPU = torch.device("cpu")


class Sliced(Protocol):
    """Anything with rows to slice: an array, a memory map, a dataset of h5py, an object that computes its rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


Source = str | Path | Tensor | NDArray[Any] | Sliced


class Found(NamedTuple):
    """The hardest negatives of some rows, hardest first; −1 and −inf if there are fewer than k."""

    index: Tensor  # type: ignore[assignment]  # (N, k) int64
    similarity: Tensor  # (N, k) float32


def search(
    x: Tensor | NDArray[Any],
    blocks: Iterable[Any],
    k: int = 10,
    *,
    ids: Any = None,
    y_ids: Any = None,
    similarity: str = "dot",
) -> Found:
    """The k most similar negatives of every row of x in a stream of blocks, in one pass over the stream.

    Args:
        x: (N, D) floating point, the queries. They stay in memory; a tensor on a GPU is searched there.
        blocks: (b, D) arrays or tensors, one after the other, of any number of rows.
        k: negatives for each row, 1 to 2²⁴.
        ids: (N,) integers; rows with equal ids are never negatives of each other. By default all rows of the stream
            are negatives of all rows of x.
        y_ids: (M,) integers for all rows of the stream; given together with `ids`.
        similarity: `dot`, `cosine` or `order` (x images, the stream captions), as for `goal.apply`.

    Returns:
        `Found`; indices count the rows of the stream. Similarities are float32 products. Among equal similarities the
        lowest index comes first; similarities that differ by less than the rounding of a product may change places.

    Raises:
        ValueError, TypeError: a shape, dtype or id that does not fit; an embedding or a similarity that is not finite.

    Example:
        >>> import goal, torch
        >>> x = torch.eye(3)
        >>> goal.offline.search(x, [-x, x / 2], k=2).index
        tensor([[3, 1],
                [4, 0],
                [5, 0]])
    """
    x, k = validation.matrix("x", floating("x", x), "(N, D)"), _count(k)
    scan = _Scan(bind(similarity), x.device)
    if (ids is None) != (y_ids is None):
        raise ValueError("ids and y_ids are given together, or neither.")
    own = others = None
    if ids is not None:
        own = validation.identity("ids", ids, len(x), "x", x.device)
        if not hasattr(y_ids, "__len__"):
            raise TypeError(f"y_ids must be integers, one for each row of the stream, got {type(y_ids).__name__}.")
        others = validation.identity("y_ids", y_ids, len(y_ids), "the stream", x.device)
    keys, first = _no_keys(len(x), k, x.device), 0
    with torch.inference_mode(), exact_float32(x.device):
        queries = _Rows(scan.measure.embed(_float32("x", x, 0, x.shape[1], x.device)), own, 0)
        for block in blocks:
            found = _float32("the stream", block, first, x.shape[1], x.device)
            for rows in found.split(BLOCK) if len(found) else ():
                of = None if others is None else others[first : first + len(rows)]
                first += len(rows)
                if of is not None and len(of) < len(rows):
                    raise ValueError(f"y_ids has {len(y_ids)} integers, and the stream has at least {first} rows.")
                scan(queries, _Rows(scan.measure.embed(rows), of, first - len(rows)), keys, None)
    if others is not None and len(others) != first:
        raise ValueError(f"y_ids has {len(others)} integers, and the stream has {first} rows.")
    return Found(*_decoded(keys))


def mine(
    x: Source,
    y: Source,
    k: int = 10,
    *,
    out: str | Path,
    ids: Any = None,
    y_ids: Any = None,
    similarity: str = "dot",
    memory: int = 1 << 30,
    device: str | torch.device = "cpu",
    save_every: float = 30.0,
) -> Path:
    """Write the k most similar negatives of every row of x in y, and of every row of y in x, from one pass over S.

    As many rows of x as fit are kept in memory, and y is read block by block. Partial results are in the folder
    ``<out>.partial``, so after an interruption of any kind the same call resumes. Files are written under another name
    and renamed, and a damaged file is named when it is read. Calls are the same if their arguments, ids and rows are
    equal, wherever these come from: all rows are read once before the work to take their digest, and once after it,
    since nothing may change meanwhile. Only one call at a time may work on an `out`. The folder is removed once `out`
    is written.

    Args:
        x: (N, D) floating point: a .npy file, read piece by piece, or anything whose rows can be sliced.
        y: (M, D) rows of the other side.
        k: negatives for each row, 1 to 2²⁴.
        out: a file to write. `.parquet` (with pyarrow) and `.csv` have the columns side (x: row is one of x and
            negative one of y; or y), row, rank (from 1), negative, similarity. `.npz` has x_index (N, k), x_similarity,
            y_index (M, k) and y_similarity, with −1 and −inf where a row has fewer than k negatives.
        ids: (N,) integers; rows with equal ids are never negatives of each other. By default each row of x has an id of
            its own, 0 … N − 1.
        y_ids: (M,) integers, by default `ids`, which requires N = M. For captions of images this is the row of x to
            which a caption belongs (`image_of`).
        similarity: `dot`, `cosine` or `order`.
        memory: bytes to use, in addition to Python, torch and the ids; more means fewer passes over y.
        device: computes the products.
        save_every: seconds ≥ 0 between saves of the partial results for the rows of x in memory.

    Returns:
        The path `out`.

    Raises:
        ValueError, TypeError: a shape, dtype, id or ending that does not fit; a memory that is too small, with the
            minimum; an `out` that exists, or whose partial results are damaged or belong to another call; an embedding
            or a similarity that is not finite; rows that changed while they were mined.
        goal.data.files.Busy: another call is working on this `out`.

    Example:
        >>> import goal, numpy as np, tempfile
        >>> rng = np.random.default_rng(0)
        >>> images, texts = rng.normal(size=(20, 8)), rng.normal(size=(100, 8))
        >>> image_of = np.arange(20).repeat(5)
        >>> out = tempfile.mkdtemp() + "/negatives.npz"
        >>> with np.load(goal.offline.mine(images, texts, k=3, y_ids=image_of, out=out)) as found:
        ...     found["x_index"].shape, found["y_index"].shape
        ((20, 3), (100, 3))
    """
    sides = _opened("x", x), _opened("y", y)
    (n, d), (m, width) = (side.shape for side in sides)
    if d != width:
        raise ValueError(f"x and y must have the same D, got x {(n, d)} and y {(m, width)}.")
    if max(n, m) > _LOW:
        raise ValueError(f"x and y may have up to {_LOW} rows, got {max(n, m)}.")
    path, k, device, save_every = _checked(Path(out)), _count(k), _usable(device), _seconds(save_every)
    labels = _identities(ids, y_ids, n, m)
    scan = _Scan(bind(similarity), device)
    rows = _rows_in(memory, n, m, d, k)
    exists = f"out: {str(out)!r} exists. Delete it, or choose another."
    folder = path.with_name(f"{path.name}.partial")
    with _workplace(folder), torch.inference_mode(), exact_float32(device):
        if not (folder / "job.json").exists():
            _clear(folder)  # files of a call that was interrupted before its job was written, or in its last steps
            if path.exists():
                raise ValueError(exists)
        digests = _digests(sides, labels)
        store = _Store(folder, {"k": k, "similarity": scan.measure.name, **digests}, n, m, device)
        if path.exists() and store.start < n:
            raise ValueError(f"out: {str(out)!r} exists, and what {folder} holds is not finished. Delete one of them.")
        while store.start < n:
            _mine_rows(store, scan, sides, labels, rows, save_every)
        if changed := [name for name, digest in _digests(sides, labels).items() if digest != digests[name]]:
            raise ValueError(
                f"{' and '.join(changed)} changed while they were mined: delete {folder}, and begin again."
            )
        complete = folder / folder.stem  # equal calls write equal files
        with atomic_file(complete) as file:
            _WRITERS[path.suffix](file, store, n, m, k)
        store.check_place()
        if path.exists() and not filecmp.cmp(complete, path, shallow=False):
            raise ValueError(exists)
        os.replace(complete, path)
        _clear(folder)
    return path


# ---- keys: (similarity, index) as one integer ------------------------------------------------------------


def _keys(similarity: Tensor, index: Tensor) -> Tensor:
    """int64 keys in the order of (similarity, −index); similarity float32, index below 2³²."""
    bits = (similarity + 0.0).view(torch.int32)  # −0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.long().mul_(1 << 32).add_(_LOW).sub(index)


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(index, similarity) of keys; index −1 where the similarity is −inf."""
    ordered = (keys >> 32).int()
    similarity = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return torch.where(similarity == -torch.inf, -1, _LOW - (keys & _LOW)), similarity


def _no_keys(rows: int, k: int, device: torch.device) -> Tensor:
    """(rows, k) keys of no negative."""
    nothing = torch.full((rows, k), -torch.inf, dtype=torch.float32, device=device)
    return _keys(nothing, torch.full((rows, k), _LOW, device=device))


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The k largest keys of both sets for each row, without duplicates: (A, k), (A, any) → (A, k), sorted.

    >>> merge(torch.tensor([[9, 5, 2]]), torch.tensor([[7, 5, 9, 1]]))
    tensor([[9, 7, 5]])
    """
    k = a.shape[1]
    both = torch.cat([a, b], 1)
    top = both.topk(min(2 * k, both.shape[1]), dim=1).values  # neither set has a key twice
    again = top[:, 1:] == top[:, :-1]
    if again.any():
        top[:, 1:].masked_fill_(again, int(_no_keys(1, 1, torch.device("cpu"))))
        top = top.topk(k, dim=1).values
    return top[:, :k]


# ---- a tile of S -----------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Some rows of one side."""

    rows: Tensor  # (n, D) float32, embedded
    ids: Tensor | None  # (n,) int64; None: all differ from the other side's
    first: int  # index of the first row in the dataset


class _Scan:
    """Tiles of S for a similarity on a device; the memory of a tile is used again for the next."""

    def __init__(self, measure: Dot, device: torch.device) -> None:
        self.measure, self._tile = measure, torch.empty(0, dtype=torch.float32, device=device)

    def __call__(self, x: _Rows, y: _Rows, x_keys: Tensor, y_keys: Tensor | None) -> None:
        """Update the keys of x (n, k), and those of y (m, k) if given, with each other's rows, in place."""
        ordered = None if y.ids is None else y.ids.sort()
        for start in range(0, len(x.rows), _ROWS):
            part = slice(start, min(start + _ROWS, len(x.rows)))
            tile = self._similarities(x.rows[part], y.rows)
            if ordered is not None and x.ids is not None and y.ids is not None:
                _hide(tile, x.ids[part], y.ids, *ordered)
            _improve(x_keys[part], tile, 0, y.first)
            if y_keys is not None:
                _improve(y_keys, tile, 1, x.first + start)

    def _similarities(self, x: Tensor, y: Tensor) -> Tensor:
        """(m, n) similarities, both sizes padded with −inf to full groups."""
        n, m = len(x), len(y)
        height, width = (-(-size // _GROUP) * _GROUP for size in (m, n))
        if self._tile.numel() < height * width:
            self._tile = x.new_empty(height * width)
        tile = self._tile[: height * width].view(height, width)
        if self.measure.name == "order":  # not symmetric
            tile[:m, :n] = self.measure.tile(x, y).T
        else:
            self.measure.tile(y, x, out=tile[:m, :n])
        tile[m:], tile[:, n:] = -torch.inf, -torch.inf
        return tile


def _hide(tile: Tensor, x_ids: Tensor, y_ids: Tensor, ordered: Tensor, order: Tensor) -> None:
    """Write −inf where ids are equal; entry by entry if these are few. `ordered`, `order`: y_ids sorted."""
    low, high = (torch.searchsorted(ordered, x_ids, right=right) for right in (False, True))
    count = high - low
    total = int(count.sum())
    if total > tile.numel() // 32:
        tile[: len(y_ids), : len(x_ids)].masked_fill_(y_ids[:, None] == x_ids, -torch.inf)
        return
    column = torch.repeat_interleave(count)
    place = torch.arange(total, device=tile.device) + (low - count.cumsum(0) + count)[column]
    tile[order[place], column] = -torch.inf


def _improve(keys: Tensor, tile: Tensor, candidates: int, first: int) -> None:
    """Merge the keys (n, k), in place, with those of a tile whose dimension `candidates` counts from `first`.

    Each of the k best entries lies in one of the k groups with the largest maxima, the first groups among equals:
    otherwise each of these groups would have an entry that beats it. Groups count only if their maximum exceeds the
    k-th best so far; indices grow from tile to tile, so an equal entry would come after it.
    """
    n, k = keys.shape
    if candidates == 0:
        grouped = tile.view(-1, _GROUP, tile.shape[1])
        maxima, grouped = grouped.amax(1).T[:n], grouped.permute(2, 0, 1)  # (n, groups), (n or more, groups, group)
    else:
        grouped = tile.view(len(tile), -1, _GROUP)
        maxima = max_pool1d(tile[:n, None], _GROUP)[:, 0]  # amax over short rows is four times slower
    worst = _decoded(keys[:, -1])[1]
    if not bool((maxima.amax(1) < torch.inf).all()):
        raise ValueError(f"a similarity of the rows from {first} on is not finite: scale the embeddings down.")
    counts, order = (maxima > worst[:, None]).sum(1).clamp(max=k).sort()
    idle = int((counts == 0).sum())
    groups = torch.arange(maxima.shape[1], device=tile.device)
    inside = torch.arange(_GROUP, device=tile.device)
    for start in range(idle, n, _AT_ONCE):
        rows = order[start : start + _AT_ONCE]
        taken = int(counts[start : start + _AT_ONCE][-1])  # counts are sorted, so all of these rows need about as many
        chosen = _LOW - (_keys(maxima[rows], groups).topk(taken, dim=1).values & _LOW)  # (a, taken)
        at = chosen[..., None] * _GROUP + inside  # (a, taken, group)
        keys[rows] = merge(keys[rows], _keys(grouped[rows[:, None], chosen], first + at).flatten(1))


# ---- a job and its partial results -----------------------------------------------------------------------


@contextmanager
def _workplace(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock (`alone`); remove it if it is empty afterwards."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(alone(folder))
                except FileNotFoundError:  # another call has just ended, and removed the folder
                    continue
                yield
            return
        finally:
            with suppress(OSError):  # the folder is not empty, or another call is using it
                folder.rmdir()


def _lock_of(folder: Path) -> int | None:
    """The inode of the lock file: it differs if the folder has been made anew."""
    with suppress(OSError):
        return (folder / ".lock").stat().st_ino
    return None


def _clear(folder: Path) -> None:
    """Remove a store, the job first: without it the other files are ignored."""
    for path in (folder / "job.json", folder / "place.json", folder / folder.stem, *folder.glob("[xy]-*.npy")):
        path.unlink(missing_ok=True)


def _mine_rows(
    store: _Store,
    scan: _Scan,
    sides: tuple[_Side, _Side],
    labels: tuple[Tensor | None, Tensor | None],
    rows: int,
    save_every: float,
) -> None:
    """Mine the rows of x from `store.start` on, as many as fit in memory, against all of y."""
    (x, y), (ids, y_ids) = sides, labels
    (n, d), (m, _) = x.shape, y.shape
    start = store.start
    stop = min(start + rows, store.stop or n)
    store.begin(start, stop)
    embedded = torch.empty(stop - start, d, dtype=torch.float32, device=store.device)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        embedded[first - start : last - start] = scan.measure.embed(x.read(first, last, store.device))
    queries = _Rows(embedded, _ids_of(ids, start, stop, store.device), start)
    keys = store.rows_of_x(start, stop)
    saved = time.monotonic()
    blocks = range(0, m, BLOCK)
    for first in bar(blocks, f"{start}–{stop} of {n} rows of x, against y", store.column // BLOCK):
        last = min(first + BLOCK, m)
        block = scan.measure.embed(y.read(first, last, store.device))
        others = store.rows_of_y(first, last)
        scan(queries, _Rows(block, _ids_of(y_ids, first, last, store.device), first), keys, others)
        store.keep_y(first, others)
        if time.monotonic() - saved >= save_every and last < m:
            store.keep_x(start, stop, last, keys)
            saved = time.monotonic()
    store.keep_x(start, stop, m, keys)


class _Store:
    """Partial results in a folder: keys of y for each block, keys of x for each part, and the position reached.

    Keys may be ahead of the position, never behind: merging the same candidates twice changes nothing. The position
    says which files must exist; other files are ignored. A file ends in a digest of the job, its position and content.
    """

    def __init__(self, folder: Path, job: dict[str, Any], n: int, m: int, device: torch.device) -> None:
        self.folder, self.k, self.n, self.m, self.device = folder, job["k"], n, m, device
        self._lock, self._job = _lock_of(folder), f"{json.dumps(job, sort_keys=True)} {BLOCK}"
        known, self._place = folder / "job.json", folder / "place.json"
        if known.exists():
            before = self._read_json(known)
            if differing := [name for name in job if before.get(name) != job[name]]:
                raise ValueError(
                    f"{folder} holds what another call has found so far: {', '.join(differing)} differ. "
                    "Delete the folder, or give another out."
                )
        else:
            write_atomically(known, json.dumps(job).encode())
        self.start = 0  # first of the rows of x in progress
        self.stop = 0  # end of these rows, 0 if they have not begun
        self.column = 0  # number of rows of y already mined with them
        if self._place.exists():
            at = self._read_json(self._place)
            if at.pop("digest", None) != self._digest(json.dumps(at)).hexdigest():
                raise self._damaged(self._place)
            self.start, self.stop, self.column = at["start"], at["stop"], at["column"]
        for side, end in (("x", self.start), ("y", m if self.start else self.column)):
            for _ in self._keys(side, end):  # checks that all files that are needed exist and are undamaged
                pass

    def _damaged(self, path: Path, how: str = "is damaged") -> Damaged:
        return Damaged(f"{path} {how}: delete {self.folder}, and begin again.")

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            known = read_json(path)
        except (Damaged, RecursionError):
            known = None
        if not isinstance(known, dict):
            raise self._damaged(path)
        return known

    def _digest(self, what: str) -> Any:
        return hashlib.sha256(f"{self._job} {what}".encode())

    def _file(self, side: str, first: int) -> Path:
        return self.folder / f"{side}-{first:010}.npy"

    def _stored(self, side: str, first: int) -> Iterator[NDArray[np.int64]]:
        """The keys of a file, BLOCK rows at a time; raises after the last if the digest does not match."""
        path, header = self._file(side, first), _header((1, self.k), "<i8")  # the length is the same for more rows
        if not path.is_file():
            raise self._damaged(path, "is missing")
        with path.open("rb") as file:
            rows, rest = divmod(path.stat().st_size - len(header) - _DIGEST, 8 * self.k)
            if rows < 1 or rest or file.read(len(header)) != _header((rows, self.k), "<i8"):
                raise self._damaged(path)
            digest = self._digest(f"{side} {first} {rows}")
            for start in range(0, rows, BLOCK):
                keys = np.empty((min(BLOCK, rows - start), self.k), "<i8")
                if file.readinto(keys.data) < keys.nbytes:
                    raise self._damaged(path)
                digest.update(keys)
                yield keys
            if file.read() != digest.digest():
                raise self._damaged(path)

    def _keys(self, side: str, end: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(first row, keys) of a side up to row `end`, in order."""
        first = 0
        while first < end:
            row = first
            for keys in self._stored(side, first):
                yield row, keys
                row += len(keys)
            if row > end:
                raise self._damaged(self._file(side, first))
            first = row

    def _read(self, side: str, first: int, last: int) -> Tensor:
        keys, row = _no_keys(last - first, self.k, self.device), first
        for part in self._stored(side, first):
            taken = part[: max(0, last - row)]  # a part of x has more rows if it was written with more memory
            keys[row - first : row - first + len(taken)] = torch.from_numpy(taken).to(self.device)
            row += len(part)
        if row < last:
            raise self._damaged(self._file(side, first), f"has {row - first} rows of {last - first}")
        return keys

    def rows_of_x(self, start: int, stop: int) -> Tensor:
        return self._read("x", start, stop) if self.column else _no_keys(stop - start, self.k, self.device)

    def rows_of_y(self, first: int, last: int) -> Tensor:
        if self.start or first < self.column:
            return self._read("y", first, last)
        return _no_keys(last - first, self.k, self.device)

    def check_place(self) -> None:
        """Check that the folder is still the one that this call has locked."""
        if _lock_of(self.folder) != self._lock:
            raise ValueError(f"{self.folder} was removed while a call was at work in it: begin again.")

    def _write(self, side: str, first: int, keys: Tensor) -> None:
        array = np.ascontiguousarray(keys.cpu().numpy(), "<i8")
        digest = self._digest(f"{side} {first} {len(array)}")
        digest.update(array)
        self.check_place()
        with atomic_file(self._file(side, first)) as file:
            np.save(file, array, allow_pickle=False)
            file.write(digest.digest())

    def keep_y(self, first: int, keys: Tensor) -> None:
        self._write("y", first, keys)

    def begin(self, start: int, stop: int) -> None:
        """Note the rows of x in progress, before their keys exist; the next call uses them, whatever its memory."""
        if (start, stop) != (self.start, self.stop):
            self._move(start, stop, self.column)

    def keep_x(self, start: int, stop: int, column: int, keys: Tensor) -> None:
        """Write the keys first, then the position."""
        self._write("x", start, keys)
        self._move(*((stop, 0, 0) if column == self.m else (start, stop, column)))

    def _move(self, start: int, stop: int, column: int) -> None:
        self.check_place()
        self.start, self.stop, self.column = start, stop, column
        at: dict[str, Any] = {"start": start, "stop": stop, "column": column}
        digest = self._digest(json.dumps(at)).hexdigest()
        write_atomically(self._place, json.dumps({**at, "digest": digest}).encode())

    def found(self, side: str) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
        """(first row, index (b, k), similarity (b, k)) of a side, in order."""
        for first, keys in self._keys(side, self.n if side == "x" else self.m):
            index, similarity = _decoded(torch.from_numpy(keys))
            yield first, index.numpy(), similarity.numpy()


def _header(shape: tuple[int, int], kind: str) -> bytes:
    """The header of a .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    return header.getvalue()


def _rows_in(memory: int, n: int, m: int, d: int, k: int) -> int:
    """The number of rows of x to keep in memory, so that all arrays fit into `memory` bytes."""
    memory = validation.whole_number("memory", memory)
    block = min(BLOCK, m)
    width = min(_ROWS, n)
    tile = (block + _GROUP) * (width + _GROUP)
    fixed = 4 * tile * 2  # the tile, and its maxima, hidden entries, or a copy of it
    fixed += 6 * 8 * _AT_ONCE * (block // _GROUP + min(k, block // _GROUP + 1) * _GROUP + 3 * k)  # intermediate keys
    fixed += block * (d * 4 * 4 + k * 8 * 4)  # a block as read, in float32, embedded; its keys
    each = d * 4 + k * 8 * 2 + 16  # embeddings, keys, ids
    least = fixed + each * min(n, _ROWS)
    if memory < least:
        gigabytes = math.ceil(least / 1e5) / 1e4
        raise ValueError(
            f"memory must be at least {least} bytes (goal mine --memory {gigabytes}) for D = {d} and k = {k}, "
            f"got {memory}."
        )
    return min(n, max(_ROWS, (memory - fixed) // each // _ROWS * _ROWS))


def _digests(sides: tuple[_Side, _Side], labels: tuple[Tensor | None, Tensor | None]) -> dict[str, str]:
    """A digest of each side: of every number in float32, and of all ids."""
    digests = {}
    for side, ids in zip(sides, labels, strict=True):
        n, d = side.shape
        digest = hashlib.sha256(f"{side.shape}".encode())
        starts = range(0, n, BLOCK)
        for first in bar(starts, f"reading {side.name}") if 4 * n * d > BAR_BYTES else starts:  # seconds
            digest.update(side.read(first, min(first + BLOCK, n), _CPU).contiguous().numpy().data)
        digest.update(b"" if ids is None else ids.numpy().data)
        digests[side.name] = digest.hexdigest()
    return digests


# ---- writing the result ----------------------------------------------------------------------------------


def _write_npz(file: IO[bytes], store: _Store, n: int, m: int, k: int) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for side, rows in (("x", n), ("y", m)):
            for at, name, kind in ((1, "index", "<i8"), (2, "similarity", "<f4")):
                with archive.open(f"{side}_{name}.npy", "w", force_zip64=True) as member:
                    member.write(_header((rows, k), kind))
                    for found in store.found(side):
                        member.write(np.ascontiguousarray(found[at], dtype=kind).tobytes())


def _columns(store: _Store) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
    """The long form, some rows at a time: the side, then row, rank, negative, similarity; without missing negatives."""
    for side in ("x", "y"):
        for first, index, similarity in store.found(side):
            row, rank = (index >= 0).nonzero()
            columns = {"row": first + row, "rank": 1 + rank}
            yield side, {**columns, "negative": index[row, rank], "similarity": similarity[row, rank]}


def _write_csv(file: IO[bytes], store: _Store, n: int, m: int, k: int) -> None:
    file.write(b"side,row,rank,negative,similarity\n")
    for side, columns in _columns(store):
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        lines = (f"{side},{row},{rank},{negative},{value:.9g}\n" for row, rank, negative, value in rows)
        file.write("".join(lines).encode())


def _write_parquet(file: IO[bytes], store: _Store, n: int, m: int, k: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"row": pa.int64(), "rank": pa.int32(), "negative": pa.int64(), "similarity": pa.float32()}
    schema = pa.schema([("side", pa.string()), *kinds.items()])
    with parquet.ParquetWriter(file, schema) as writer:
        for side, columns in _columns(store):
            arrays = [pa.array(columns[name], kind) for name, kind in kinds.items()]
            sides = pa.array([side] * len(columns["row"]), pa.string())
            writer.write_table(pa.Table.from_arrays([sides, *arrays], schema=schema))


_WRITERS: dict[str, Callable[[IO[bytes], _Store, int, int, int], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".npz": _write_npz,
}


# ---- reading the inputs ----------------------------------------------------------------------------------


class _Side(NamedTuple):
    """The data of a side; rows are read when they are needed."""

    name: str
    shape: tuple[int, int]  # (N, D)
    slice: Callable[[int, int], Any]  # (first, last) → rows (b, D), array or tensor

    def read(self, first: int, last: int, device: torch.device) -> Tensor:
        """Rows in float32, checked."""
        found = _float32(self.name, self.slice(first, last), first, self.shape[1], device)
        if len(found) != last - first:
            raise ValueError(f"{self.name}[{first}:{last}] gave {len(found)} rows.")
        return found


def _opened(name: str, source: Source) -> _Side:
    """A source as a side; a file is mapped anew for each read, so that its pages do not stay in memory."""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix != ".npy":
            raise ValueError(f"{name}: {path} must be a .npy file, which can be read piece by piece.")
        shape = read_array(path, name).shape

        def rows(first: int, last: int) -> Any:
            return np.array(read_array(path, name)[first:last])

    else:
        if not hasattr(source, "shape") or not hasattr(source, "__getitem__"):
            raise TypeError(
                f"{name} must be a .npy file or have a shape and rows to slice, got {type(source).__name__}."
            )
        if isinstance(source, Tensor):
            source = floating(name, source)
        table = getattr(source, "to_numpy", None)  # a data frame, whose slices may follow its index
        array = source if table is None else table()
        shape = array.shape

        def rows(first: int, last: int) -> Any:
            return array[first:last]

    try:
        n, d = map(operator.index, shape)
    except (TypeError, ValueError):
        n = d = 0
    if n < 1 or d < 1:
        raise ValueError(f"{name} must have shape (N, D) with rows and columns, got {shape}.")
    side = _Side(name, (n, d), rows)
    side.read(0, 1, _CPU)  # checks the kind of rows before any work
    return side


def _float32(name: str, rows: Any, first: int, d: int, device: torch.device) -> Tensor:
    """(b, D) in float32 on the device, finite."""
    found = floating(name, rows, first)
    if found.dim() != 2 or found.shape[1] != d:
        raise ValueError(f"{name} must have rows of {d} numbers, got shape {tuple(found.shape)}.")
    found = found.to(device, torch.float32)
    if not bool(found.sum().isfinite()):  # a single sum is fast; rows are checked only if it is not finite
        bad = (~found.isfinite().all(1)).nonzero()
        if len(bad):
            raise ValueError(f"{name} must be finite in float32, but row {first + int(bad[0])} has NaN or inf.")
    return found


def _identities(ids: Any, y_ids: Any, n: int, m: int) -> tuple[Tensor | None, Tensor | None]:
    """(N,) and (M,) ids on the CPU; None: the row number is the id."""
    ids, y_ids = (each.copy() if isinstance(each, np.ndarray) else each for each in (ids, y_ids))  # not a memory map
    own = None if ids is None else validation.identity("ids", ids, n, "x", _CPU)
    if y_ids is not None:
        return own, validation.identity("y_ids", y_ids, m, "y", _CPU)
    if n != m:
        raise ValueError(
            f"y_ids (goal mine --image-of) is needed where N ≠ M, to tell positives: x has {n} rows and y has {m}."
        )
    return own, own


def _ids_of(ids: Tensor | None, first: int, last: int, device: torch.device) -> Tensor:
    return torch.arange(first, last, device=device) if ids is None else ids[first:last].to(device)


def _checked(out: Path) -> Path:
    if out.suffix not in _WRITERS:
        raise ValueError(f"out must end in one of {', '.join(_WRITERS)}, got {str(out)!r}.")
    if out.suffix == ".parquet":
        require("pyarrow", "mine")
    if not out.parent.is_dir():
        raise ValueError(f"out: there is no folder {str(out.parent)!r}.")
    return out


def _count(k: object) -> int:
    count = validation.whole_number("k", k)
    if count > _MOST:
        raise ValueError(f"k must be at most {_MOST}, got {count}.")
    return count


def _seconds(save_every: object) -> float:
    allowed = "save_every (goal mine --save-every) must be a finite number of seconds >= 0"
    if isinstance(save_every, bool) or not isinstance(save_every, numbers.Real):
        raise TypeError(f"{allowed}, got {save_every!r}.")
    seconds = float(save_every)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{allowed}, got {seconds}.")
    return seconds


def _usable(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(1, device=found).sum().item()
    except (RuntimeError, AssertionError) as error:  # no such device, a device without values, or torch without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"device (goal mine --device): {str(device)!r} cannot be used: {reason}") from None
    return found
