"""Files that lie, that are damaged, or that are none: an error that names the file, before memory is taken."""

import io
import json
import os
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from goal.data import clips, paired
from goal.data.files import read_array, read_lines

GIB = 1 << 30
X = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
Make = Callable[[Path], object]


# ── how files are made ──────────────────────────────────────────────────────────────────────────────────


def npy(header: dict[str, Any] | str, content: bytes = b"\0" * 64, version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy file with any header."""
    text = (header if isinstance(header, str) else repr(header)).encode() + b"\n"
    return np.lib.format.magic(*version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + content


def header(shape: object, descr: object = "<f4", fortran: bool = False) -> dict[str, Any]:
    return {"descr": descr, "fortran_order": fortran, "shape": shape}


def safetensors(content: dict[str, Any], body: bytes = b"\0" * 16, size: int | None = None) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def written(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


def saved(array: np.ndarray) -> Make:
    return lambda path: np.save(path, array, allow_pickle=True)


def zipped(compression: int = zipfile.ZIP_STORED, **content: bytes | np.ndarray) -> Make:
    """An npz file whose members may hold anything; sound ones are filled in."""

    def make(path: Path) -> None:
        sound = {"audio": X, "visual": X, "labels": np.arange(6)}
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, value in {**sound, **content}.items():
                buffer = io.BytesIO()
                if isinstance(value, np.ndarray):
                    np.save(buffer, value)
                file.writestr(f"{name}.npy", value if isinstance(value, bytes) else buffer.getvalue())

    return make


def hdf5(change: Callable[[Any, Any], object]) -> Make:
    """An HDF5 file whose `audio` is made by a function of the file and of h5py."""

    def make(path: Path) -> None:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file["visual"], file["labels"] = X, np.arange(6)
            change(file, h5py)

    return make


def external(file: Any, h5py: Any) -> None:
    Path(file.filename).with_suffix(".raw").write_bytes(X.tobytes())
    file.create_dataset("audio", (6, 4), "f4", external=[(f"{Path(file.filename).stem}.raw", 0, 96)])


def linked(file: Any, h5py: Any) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["audio"] = X
    file["link"] = h5py.ExternalLink("other.h5", "/audio")
    file["audio"] = h5py.SoftLink("/link")


def named_classes(file: Any, h5py: Any) -> None:
    del file["labels"]
    file["audio"], file["labels"] = X, ["Katze", "Hund"] * 3


def virtual(file: Any, h5py: Any) -> None:
    layout = h5py.VirtualLayout((6, 4), "f4")
    layout[:] = h5py.VirtualSource("nowhere.h5", "audio", (6, 4))
    file.create_virtual_dataset("audio", layout)


def links(file: Any, h5py: Any) -> None:
    file["audio"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/audio")


def wide_chunk(file: Any, h5py: Any) -> None:
    file.create_dataset("audio", (6, 4), "f4", chunks=(1 << 26, 4), maxshape=(None, 4))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"a\nb")
        file.truncate(GIB)


# ── what each says ──────────────────────────────────────────────────────────────────────────────────────


class Row(NamedTuple):
    """A file of a folder, and what its reader must say of it."""

    file: str
    make: Make
    message: str  # what the error has beside the file's name


def described(row: Row) -> str:
    return f"{row.file[:12]!r} {row.message}"


NO_ARRAY = "no array of numbers in .npy format"
TOKENS = np.zeros((6, 3, 2), np.float32)
TOKENS[:, 0] = 1
TOKENS[4] = 0
EMPTIED = TOKENS.astype(np.float64) + 1e-60 * (np.arange(6) == 4)[:, None, None]
FEATURES = [
    Row("x.npy", written(npy(header((10**30, 4)))), NO_ARRAY),
    Row("x.npy", written(npy(header((1 << 40, 1 << 40)))), NO_ARRAY),
    Row("x.npy", written(npy(header((GIB, 1)))), NO_ARRAY),
    Row("x.npy", written(npy(header((-4, 4)))), NO_ARRAY),
    Row("x.npy", written(npy(header((-4, -4)))), NO_ARRAY),
    Row("x.npy", written(npy(header((10**19, 0)))), "x.npy"),
    Row("x.npy", written(npy(header((0, 4)))), "must not be empty"),
    Row("x.npy", written(npy(header(()))), "must have 2 or 3 dimensions"),
    Row("x.npy", written(npy(header((6, 4), fortran="yes"))), NO_ARRAY),  # type: ignore[arg-type]
    Row("x.npy", written(npy(header((2, 2), "|O"))), NO_ARRAY),
    Row("x.npy", written(npy(header((2, 2), "<f3"))), NO_ARRAY),
    Row("x.npy", written(npy(header((2, 2), [("a", "<f4"), ("b", "<f4")]))), "must be floating point"),
    Row("x.npy", written(npy(header((2, 2), ("<f4", (10**9,))))), NO_ARRAY),
    Row("x.npy", written(npy("(" * 5000)), NO_ARRAY),
    Row("x.npy", written(npy("-" * 9000 + "1")), NO_ARRAY),
    Row("x.npy", written(npy(header((2, 2)), version=(2, 0))[:9]), NO_ARRAY),
    Row("x.npy", written(npy("{}", version=(9, 9))), NO_ARRAY),
    Row("x.npy", written(b"\x80\x04K\x01."), NO_ARRAY),
    Row("x.npy", saved(np.eye(4, dtype=np.longdouble)), "float16, float32 and float64 are read"),
    Row("x.npy", saved(np.eye(4, dtype=np.complex64)), "must be floating point, got complex64"),
    Row("x.npy", saved(np.eye(4, dtype=bool)), "must be floating point, got bool"),
    Row("x.npy", saved(np.eye(4, dtype=">i8")), "must be floating point, got >i8"),
    Row("x.npy", saved(np.eye(4) * 1e300), "row 0 holds NaN or infinity in float32"),
    Row("x.npy", saved(np.diag([0, 0, -1e39, 0])), "row 2 holds NaN or infinity in float32"),
    Row("x.npy", saved(np.diag([0, np.inf, 0]).astype(np.float16)), "row 1 holds NaN or infinity"),
    Row("x.npy", saved(np.diag([0, np.nan, 0]).astype(">f4")), "row 1 holds NaN or infinity"),
    Row("y.npy", saved(TOKENS), "row 4 holds no token: all of its 3 are zeros"),
    Row("y.npy", saved(EMPTIED), "row 4 holds no token"),
    Row("y.npy", saved(TOKENS.astype(">f2")), "row 4 holds no token"),
    Row("image_of.npy", saved(np.array([0, 1, 2, 1 << 63, 4, 5], np.uint64)), "row 3 is 9223372036854775808"),
    Row("image_of.npy", saved(np.array([0, 1, 2, 3, -1, 5], ">i8")), "row 4 is -1"),
    Row("image_of.npy", saved(np.ones(6, bool)), r"must be \(6,\) integers"),
    Row("image_of.npy", written(npy(header((1 << 60,), "<i8"))), NO_ARRAY),
    Row("x.npy", loop, "cannot be read"),
    Row("x.npy", Path.mkdir, "a folder"),
    Row("x.npy", os.mkfifo, "a pipe"),
    Row("x.npy", lambda path: path.symlink_to("nowhere.npy"), "no such file"),
]
TENSORS = [
    safetensors({"x": {"dtype": "F32", "shape": [10**12, 4], "data_offsets": [0, 16]}}),
    safetensors({"x": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 16]}}),
    safetensors({"x": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}),
    safetensors({"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16 * GIB]}}),
    safetensors({"x": {"dtype": "OBJECT", "shape": [2, 2], "data_offsets": [0, 16]}}),
    safetensors({}, size=1 << 62),
    b"",
]
LISTS = [
    Row("a.txt", written("ein Hund\n".encode("utf-16")), "is UTF-16 or UTF-32; save it as UTF-8"),
    Row("a.txt", written("女孩".encode("utf-16")), "UTF-16"),
    Row("a.txt", written("ein Hund\n".encode("utf-32")), "UTF-32"),
    Row("a.txt", written("ein\nHund\n".encode("utf-16-le")), "row 0 holds NUL bytes"),
    Row("a.txt", hole, "row 1 holds NUL bytes"),
    Row("a.txt", written("a\nmüde\n".encode("latin-1")), "row 1 is not UTF-8"),
    Row("a.txt", loop, "cannot be read"),
    Row("a.txt", Path.mkdir, "a folder"),
    Row("a.txt", os.mkfifo, "a pipe"),
    Row("a" * 300, lambda path: None, "cannot be read: File name too long"),
    Row("a\0b", lambda path: None, "no such file"),
]
CLIPS = [
    Row("train.npz", zipped(audio=npy(header((GIB, 1)))), "declares the shape"),
    Row("train.npz", zipped(audio=npy(header((10**30, 4)))), "declares the shape"),
    Row("train.npz", zipped(audio=npy(header((-6, 4)))), "declares the shape"),
    Row("train.npz", zipped(audio=npy(header((1 << 20, 4)))), "no npz file of numbers"),  # small, and not there
    Row("train.npz", zipped(zipfile.ZIP_DEFLATED, audio=npy(header((GIB, 1)), bytes(1 << 20))), "declares the shape"),
    Row("train.npz", zipped(zipfile.ZIP_BZIP2), "compressed in another way"),
    Row("train.npz", zipped(zipfile.ZIP_LZMA), "compressed in another way"),
    Row("train.npz", zipped(audio=npy(header((6, 4)), version=(3, 0))), "header of version"),
    Row("train.npz", zipped(audio=b"no array"), "no npz file of numbers"),
    Row("train.npz", zipped(audio=npy(header((6, 4), "|O"))), "Object arrays cannot be loaded"),
    Row("train.npz", zipped(audio=np.diag([0, 0, 1e39, 0, 0, 0])), "row 2 of audio holds NaN or infinity in float32"),
    Row("train.npz", zipped(labels=np.array([0, 1, 1 << 63, 3, 4, 5], np.uint64)), "row 2 of labels is 922"),
    Row("train.npz", zipped(labels=np.ones(6, bool)), r"labels must be \(n,\) integers"),
    Row("train.npz", loop, "cannot be read"),
    Row("train.npz", os.mkfifo, "a pipe"),
    Row("train.h5", hdf5(lambda file, h5py: file.create_dataset("audio", (GIB, 1), "f4")), "and 0 bytes are stored"),
    Row("train.h5", hdf5(lambda file, h5py: file.create_dataset("audio", (GIB, 1), "f4", chunks=(64, 1))), "declares"),
    Row("train.h5", hdf5(wide_chunk), "a chunk of /audio declares the shape"),
    Row("train.h5", hdf5(lambda file, h5py: file.create_dataset("audio", (1 << 62, 1 << 62), "f4")), "declares"),
    Row("train.h5", hdf5(external), "lies in other files"),
    Row("train.h5", hdf5(linked), "lies in other files"),
    Row("train.h5", hdf5(virtual), "lies in other files"),
    Row("train.h5", hdf5(named_classes), "/labels must be an array of numbers, .* numbers the names of all splits"),
    Row("train.npz", zipped(labels=np.array(["a", "b"] * 3)), "labels must be .* <U1: .* numbers the names of all"),
    Row("train.h5", hdf5(links), "no HDF5 file of numbers"),
    Row("train.h5", hdf5(lambda file, h5py: file.create_dataset("audio", data="text")), "must be an array of numbers"),
    Row("train.h5", hdf5(lambda file, h5py: file.create_dataset("audio", data=h5py.Empty("f4"))), "must be an array"),
    Row("train.h5", Path.mkdir, "a folder"),
]


def named(row: Row, folder: Path, read: Callable[[], object]) -> None:
    """The reader refuses, names the file, takes little memory, and warns of nothing."""
    row.make(folder / row.file)
    tracemalloc.start()
    with warnings.catch_warnings(action="error"), pytest.raises(ValueError, match=row.message) as raised:
        read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row.file in str(raised.value)
    assert peak < 80 << 20


@pytest.mark.parametrize("row", FEATURES, ids=described)
def test_features_that_lie(tmp_path: Path, row: Row) -> None:
    for name, array in (("x", X), ("y", X), ("image_of", np.arange(6))):
        if row.file != f"{name}.npy":
            np.save(tmp_path / f"{name}.npy", array)
    named(row, tmp_path, lambda: paired(*(tmp_path / f"{name}.npy" for name in ("x", "y", "image_of"))))


@pytest.mark.parametrize("content", TENSORS, ids=range(len(TENSORS)))
def test_tensors_that_lie(tmp_path: Path, content: bytes) -> None:
    row = Row("x.safetensors", written(content), "not in safetensors format")
    named(row, tmp_path, lambda: read_array(tmp_path / "x.safetensors", "x"))


@pytest.mark.parametrize("row", LISTS, ids=described)
def test_texts_that_are_none(tmp_path: Path, row: Row) -> None:
    named(row, tmp_path, lambda: read_lines(tmp_path / row.file))


@pytest.mark.parametrize("row", CLIPS, ids=described)
def test_clips_that_lie(tmp_path: Path, row: Row) -> None:
    named(row, tmp_path, lambda: clips(tmp_path, "train"))
