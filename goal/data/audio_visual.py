"""Clips with a class label each: audio and visual feature vectors, read from npz or HDF5."""

from __future__ import annotations

import importlib
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goal.data.files import check_file

FIELDS = ("audio", "visual", "labels")
ENDINGS = (".npz", ".h5", ".hdf5")
SMALL_BYTES = 64 << 20  # an array of so much is read whatever its file says
NUMBERING = ": numpy.unique(..., return_inverse=True)[1] numbers the names of all splits, joined so that they agree"
MOST_COMPRESSED = 1032  # times: what deflate can do


@dataclass(frozen=True, eq=False)
class Clips:
    """One split of labelled clips; row k of each array is clip k.

    Attributes:
        name: the folder's.
        split: as the file is called.
        audio: (n, Da) float32.
        visual: (n, Dv) float32.
        labels: (n,) int64, the class of each clip.

    >>> one = np.zeros((1, 4), np.float32)
    >>> Clips("mine", "train", one, one, np.array([3])).labels
    array([3])
    """

    name: str
    split: str
    audio: NDArray[np.float32]
    visual: NDArray[np.float32]
    labels: NDArray[np.int64]


def clips(folder: str | Path, split: str) -> Clips:
    """One split of a folder of labelled audio-visual features, such as AVE's or VEGAS's.

    | file | what |
    |---|---|
    | `{split}.npz`, `{split}.h5` or `{split}.hdf5` | `audio` (n, Da), `visual` (n, Dv), `labels` (n,) integers |

    HDF5 needs the package h5py. Features that have a time axis, as AVE's have, are averaged over it first.

    Raises:
        ValueError: naming the file, and the row where there is one: an unknown split, two files of one split, a
            missing array, another shape or dtype, more than the file can hold, different lengths, NaN or infinity in
            float32, labels beyond int64.
        ModuleNotFoundError: HDF5 without h5py.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> np.savez(folder / "train.npz", audio=np.ones((3, 128)), visual=np.ones((3, 1024)), labels=[0, 0, 1])
    >>> clips(folder, "train").audio.shape
    (3, 128)
    """
    folder = Path(folder)
    found = {ending: path for ending in ENDINGS if os.path.lexists(path := folder / f"{split}{ending}")}
    if not found:
        known = sorted({path.stem for path in folder.glob("*") if path.suffix in ENDINGS})
        raise ValueError(f"split: {folder} has no {split}.npz, .h5 or .hdf5; known: {', '.join(known) or 'none'}.")
    if len(found) > 1:
        raise ValueError(f"{folder}: {' and '.join(path.name for path in found.values())} both exist, keep one.")
    ((ending, path),) = found.items()
    check_file(path)
    arrays = read_npz(path) if ending == ".npz" else read_hdf5(path)
    for name in FIELDS:
        if name not in arrays:
            raise ValueError(f"{path}: no array {name!r}; it holds {', '.join(sorted(arrays)) or 'none that is read'}.")
    audio, visual = (checked_features(path, name, arrays[name]) for name in ("audio", "visual"))
    labels = arrays["labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        hint = NUMBERING if labels.dtype.kind in "US" else ""
        raise ValueError(f"{path}: labels must be (n,) integers, got {labels.shape} {labels.dtype}{hint}.")
    if not len(audio) == len(visual) == len(labels):
        counts = f"{len(audio)} audio, {len(visual)} visual, {len(labels)} labels"
        raise ValueError(f"{path}: every clip has one of each, got {counts}.")
    beyond = labels > np.iinfo(np.int64).max
    if beyond.any():
        row = int(beyond.argmax())
        raise ValueError(f"{path}: row {row} of labels is {labels[row]}, they must fit int64.")
    return Clips(folder.resolve().name, split, audio, visual, labels.astype(np.int64))


def holds_clips(folder: str | Path) -> bool:
    """Whether `clips` can read a folder, by the names of its files."""
    return any(Path(folder, f"train{ending}").is_file() for ending in ENDINGS)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Those of the three arrays that are there; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            return {name: read_member(file, members[name]) for name in FIELDS if name in members}
    except Exception as error:  # .npy, pickles, cut short: the parsers' errors are of many types
        raise ValueError(f"{path}: no npz file of numbers: {error}") from error


def read_member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """An array of an npz file, once its header has been compared with what the file holds."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack any amount at once
        raise ValueError(f"{info.filename} is compressed in another way than by np.savez_compressed")
    with file.open(info) as member:
        version = np.lib.format.read_magic(member)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in headers:
            raise ValueError(f"{info.filename} has a header of version {version}")
        shape, _, dtype = headers[version](member)
    check_size(info.filename, shape, dtype, min(info.compress_size, os.path.getsize(str(file.filename))))
    with file.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def read_hdf5(path: Path) -> dict[str, NDArray[Any]]:
    """Those of the three datasets that are there."""
    try:
        h5py = importlib.import_module("h5py")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: HDF5 needs h5py: pip install 'goal-objectives[hdf5]'") from error
    try:
        with h5py.File(path, "r") as file:
            return {name: read_dataset(file[name], path) for name in FIELDS if isinstance(file.get(name), h5py.Dataset)}
    except Exception as error:
        raise ValueError(f"{path}: no HDF5 file of numbers: {error}") from error


def read_dataset(dataset: Any, path: Path) -> NDArray[Any]:
    """An array of an HDF5 file, once its size has been compared with what is stored."""
    name = dataset.name
    elsewhere = not os.path.samefile(dataset.file.filename, path)  # an external link
    if dataset.is_virtual or dataset.external or elsewhere:
        raise ValueError(f"{name} lies in other files; copy it into this one")
    if dataset.shape is None or dataset.dtype.kind not in "biufc":
        hint = NUMBERING if name == "/labels" else ""
        raise ValueError(f"{name} must be an array of numbers, got {dataset.shape} {dataset.dtype}{hint}")
    stored = min(dataset.id.get_storage_size(), path.stat().st_size)
    check_size(name, dataset.shape, dataset.dtype, stored)
    check_size(f"a chunk of {name}", dataset.chunks or (), dataset.dtype, stored)  # it is read at once
    return np.asarray(dataset)


def check_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], stored: int) -> None:
    """Refuse an array that cannot be in the bytes that are stored, before memory is taken for it."""
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > max(SMALL_BYTES, MOST_COMPRESSED * stored):
        raise ValueError(f"{name} declares the shape {shape} of {dtype}, {size} bytes, and {stored} bytes are stored")


def checked_features(path: Path, name: str, array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype.kind != "f":
        raise ValueError(f"{path}: {name} must be floating point, got {array.dtype}.")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{path}: {name} must be (n, D), not empty, got {array.shape}; average over time first.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinity
        features = array.astype(np.float32)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(f"{path}: row {int(finite.argmin())} of {name} holds NaN or infinity in float32.")
    return features
