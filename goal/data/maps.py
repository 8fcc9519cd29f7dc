"""Memory maps that are pickled as the path of their file, not as its content, so workers share them cheaply."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

Stamp = tuple[int, int]  # a file's size, and when it was last written


class ByPath:
    """An object whose read-only memory maps, and views of them, are pickled and copied as a path and a place in it.

    Other arrays travel by value. A file that has changed since it was mapped is refused where the copy is opened.

    >>> import pickle, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x.npy"
    >>> np.save(path, np.arange(200_000.0))
    >>> class Rows(ByPath):
    ...     def __init__(self, x):
    ...         self.x = x
    >>> state = Rows(np.load(path, mmap_mode="r")[::2]).__getstate__()
    >>> len(pickle.dumps(state)) < 1000
    True
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: on_disk(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {name: value.open() if isinstance(value, OnDisk) else value for name, value in state.items()}
        vars(self).update(opened)


class OnDisk(NamedTuple):
    """An array that is a part of a file."""

    path: str  # absolute
    stamp: Stamp
    start: int  # byte of the first entry
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    def open(self) -> NDArray[Any]:
        """Map it again.

        Raises:
            ValueError: the file is gone, or another.
        """
        try:
            now = stamp_of(self.path)
            if now != self.stamp:
                raise ValueError(f"{self.path}: has changed since it was mapped; read the data anew.")
            whole = np.memmap(self.path, np.uint8, mode="r")
        except OSError as error:
            raise ValueError(f"{self.path}: was mapped, and cannot be any more: {error.strerror}") from error
        _STAMPS[map_of(whole)] = now
        first = whole[self.start : self.start + self.dtype.itemsize].view(self.dtype)
        return np.lib.stride_tricks.as_strided(first, self.shape, self.strides, subok=True, writeable=False)


_STAMPS: WeakKeyDictionary[mmap.mmap, Stamp] = WeakKeyDictionary()  # of the files behind the maps that are open


def mapped(array: NDArray[Any]) -> NDArray[Any]:
    """The array; if it is a map, what its file is now is remembered."""
    if isinstance(array, np.memmap):
        _STAMPS.setdefault(map_of(array), stamp_of(str(array.filename)))
    return array


def on_disk(value: Any) -> Any:
    """Where a read-only map lies in its file; anything else as it is."""
    if not isinstance(value, np.memmap) or value.mode != "r" or value.size == 0:
        return value
    opened = map_of(value)
    first = value.offset - value.offset % mmap.ALLOCATIONGRANULARITY  # byte at which the map begins
    inside = address(value) - address(np.frombuffer(opened, np.uint8))
    stamp = _STAMPS.get(opened) or stamp_of(str(value.filename))
    return OnDisk(str(value.filename), stamp, first + inside, value.shape, value.strides, value.dtype)


def map_of(array: Any) -> mmap.mmap:
    """What an array, or what it is a view of, is mapped by."""
    while not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else array.base
    return array


def address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def stamp_of(path: str) -> Stamp:
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns
