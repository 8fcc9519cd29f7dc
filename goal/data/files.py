"""Feature and text files: errors name the file and the row, and files are written completely or not at all."""

import codecs
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from goal.data.maps import mapped
from goal.data.terminal import bar

T = TypeVar("T")

CHUNK_BYTES = 64 << 20  # a check reads this much at a time
BAR_BYTES = 2 << 30  # a check of a larger array shows a progress bar
TEMPORARY = ".tmp"  # how files end that take their place when they are whole
BLOCK_BYTES = 1 << 20  # text is read so much at a time
BYTE_ORDER_MARK = "\ufeff"
FORBIDDEN = frozenset('/\\<>:"|?*')  # in the name of a folder, on some system
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{digit}" for port in ("COM", "LPT") for digit in "123456789¹²³")}


def check_file(path: Path) -> Path:
    """The path of a file that is there to be read.

    Raises:
        ValueError: nothing is there, or something else, or it may not be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"{path}: no such file.") from error
    except OSError as error:  # links that go round, a name too long, no permission
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: no file, but {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}.")
    return path


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a UTF-8 file; only a newline ends one, since captions may hold other separators.

    A file without newlines has lines that end in carriage returns. Byte order marks are taken away.

    Raises:
        ValueError: no such file, or a line that is not UTF-8.
    """
    content = bytearray()
    for block in blocks(check_file(path)):
        content += block
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{path}: is UTF-16 or UTF-32; save it as UTF-8.")
        if 0 in block:  # before more of them is read: a file may have a hole of any size
            row = content[: content.index(0)].count(b"\n")
            raise ValueError(f"{path}: row {row} holds NUL bytes, so it is no UTF-8 text; save it as UTF-8.")
    end = b"\n" if b"\n" in content else b"\r"
    rows = content.removesuffix(end).split(end)
    lines = []
    for row, line in enumerate(rows if rows != [b""] else []):
        try:
            lines.append(line.decode().strip().strip(BYTE_ORDER_MARK).strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: row {row} is not UTF-8: {error}") from error
    return lines


def blocks(path: Path) -> Iterator[bytes]:
    """What a file holds, some of it at a time.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def read_features(path: Path, tensor: str, ndim: Sequence[int], tokens: bool = False) -> NDArray[Any]:
    """Features that are finite in float32: of .npy a read-only memory map in the file's dtype, of .safetensors float32.

    Args:
        path: the file.
        tensor: the tensor to take if a .safetensors file holds several.
        ndim: the numbers of dimensions allowed.
        tokens: (n, L, D) holds tokens, ended by rows of zeros, and each of the n has one at least.

    Raises:
        ValueError: no such file, another format, dtype or shape, no rows, a row with NaN, infinity or what is infinite
            in float32, or without tokens.
    """
    features = read_array(path, tensor)
    if features.dtype.kind != "f" or features.dtype.itemsize > 8:
        raise ValueError(
            f"{path}: features must be floating point, got {features.dtype}; float16, float32 and float64 are read."
        )
    if features.ndim not in ndim:
        allowed = " or ".join(map(str, ndim))
        raise ValueError(f"{path}: features must have {allowed} dimensions, got shape {features.shape}.")
    if features.size == 0:
        raise ValueError(f"{path}: features must not be empty, got shape {features.shape}.")
    for start, chunk in chunks(features, f"checking {path.name}"):
        with np.errstate(over="ignore", under="ignore"):
            rows = np.asarray(chunk, np.float32).reshape(len(chunk), -1)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise ValueError(f"{path}: row {start + int(finite.argmin())} holds NaN or infinity in float32.")
        if tokens and features.ndim == 3 and not (some := rows.any(axis=1)).all():
            row = start + int(some.argmin())
            raise ValueError(f"{path}: row {row} holds no token: all of its {features.shape[1]} are zeros in float32.")
    return features


def read_array(path: Path, tensor: str) -> NDArray[Any]:
    """An array from .npy, as a read-only memory map, or .safetensors, in memory; nothing is unpickled."""
    check_file(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path, tensor)
    if path.suffix != ".npy":
        raise ValueError(f"{path}: must be a .npy or a .safetensors file.")
    try:
        with np.errstate(over="ignore"):
            return mapped(np.lib.format.open_memmap(path, mode="r"))
    except Exception as error:  # pickled objects, another format, cut short, sizes beyond the file's: of many types
        raise ValueError(f"{path}: no array of numbers in .npy format: {error}") from error


def read_safetensors(path: Path, tensor: str) -> NDArray[Any]:
    from safetensors import safe_open  # an extra: .npy files do without it

    array = None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            name = names[0] if len(names) == 1 else tensor
            if name in names:
                loaded: torch.Tensor = file.get_tensor(name)
                array = loaded.float().numpy() if loaded.is_floating_point() else loaded.numpy()
    except Exception as error:
        raise ValueError(f"{path}: not in safetensors format: {error}") from error
    if array is None:
        raise ValueError(f"{path}: must hold one tensor, or one named {tensor!r}; it holds {names}.")
    return array


def chunks(array: NDArray[Any], what: str, multiple: int = 1) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first row, rows) in order, a bounded number of bytes at a time, in whole multiples of rows.

    >>> [(start, len(rows)) for start, rows in chunks(np.zeros((10, 1 << 22)), "reading", multiple=5)]
    [(0, 5), (5, 5)]
    """
    rows = max(1, CHUNK_BYTES // (array.nbytes // len(array)) // multiple) * multiple
    starts = range(0, len(array), rows)
    for start in bar(starts, what) if array.nbytes > BAR_BYTES else starts:
        yield start, array[start : start + rows]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written."""
    with atomic_file(path) as file:
        file.write(content)


def save_atomically(path: Path, array: NDArray[Any]) -> None:
    """Write a `.npy` file that is never seen half-written; the array is not copied first."""
    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file to write, which takes the place of `path` once it is on disk, or is gone after an error.

    It is closed before it is renamed: Windows renames no open file. One that a killed process has left stays until
    `alone` clears its folder.

    Raises:
        OSError: naming `path`, where the disk is full or the folder takes no file.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_prefix(path), suffix=TEMPORARY, delete=False) as file:
            temporary = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # temporary files are private
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename or TEMPORARY).endswith(TEMPORARY):
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
        raise


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}."  # names have a limit, and this one is longer than the file's


def clear_temporaries(folder: Path) -> None:
    """Remove what killed processes have left of the files of a folder; nobody else may be writing.

    Only what `atomic_file` makes: regular files with its names. What cannot be removed stays.
    """
    made = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(TEMPORARY)}", re.DOTALL)
    for left in folder.iterdir():
        with suppress(OSError):
            if made.fullmatch(left.name) and stat.S_ISREG(left.lstat().st_mode):
                left.unlink()


class Busy(RuntimeError):
    """Another process is at work in a folder."""


@contextmanager
def alone(folder: Path, patience: float = 3.0) -> Iterator[None]:
    """No other process works in a folder within the block; half-written files that a killed one left are cleared.

    The lock is the operating system's on the file `.lock`: it ends with its process, however that ends. `.locked-by`
    tells others who is there. Both are gone after the block.

    Args:
        folder: which exists.
        patience: seconds to wait for a process that is about to end.

    Raises:
        Busy: naming the folder and the process that is at work there.
    """
    lock, holder = FileLock(folder / ".lock"), folder / ".locked-by"
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        with suppress(OSError, ValueError):
            who = check_file(holder).read_text(encoding="utf-8", errors="replace")
            raise Busy(f"{folder}: is in use by {who}. Wait for it, stop it, or name another folder") from None
        raise Busy(f"{folder}: is in use by another process. Wait for it, or name another folder") from None
    try:
        clear_temporaries(folder)
        command = shlex.join([*(Path(program).name for program in sys.argv[:1]), *sys.argv[1:]])
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = f"process {os.getpid()} on {platform.node()} since {since} ({command})"
        write_atomically(holder, who.encode(errors="backslashreplace"))  # arguments may be any bytes
        yield
    finally:
        with suppress(OSError):  # Windows, where somebody who waits may be reading it
            holder.unlink(missing_ok=True)
        with suppress(OSError):  # Windows, where it goes by itself; elsewhere whoever waits for it makes another
            (folder / ".lock").unlink()
        lock.release()


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        OSError: naming the file, where the disk is full.
    """
    try:
        with path.open("ab") as file:
            file.write(f"{line}\n".encode())
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        Damaged: naming the file, where it is not there, cut short, or no JSON.
    """
    try:
        return json.loads(check_file(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
        raise Damaged(f"{path}: is damaged: {error}") from error


class Damaged(ValueError):
    """A file that this library wrote does not hold what it should."""


def folder_name(argument: str, name: str) -> str:
    """A name under which a folder is made on any system: no path, and no longer than file systems allow.

    Raises:
        ValueError, TypeError: naming the argument.

    >>> folder_name("name", "mine")
    'mine'
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be text, got {type(name).__name__} ({name!r}).")
    if not name or not name.isprintable() or len(name.encode()) > 200:  # surrogates are not printable
        why = "of at most 200 bytes that can be printed"
    elif set(name) & FORBIDDEN:
        why = "without any of " + " ".join(sorted(FORBIDDEN))
    elif name.startswith(" ") or name.endswith((" ", ".")):
        why = "that begins with no space, and ends with none and no dot"
    elif _reserved(name):
        why = "that is no device's on Windows"
    else:
        return name
    raise ValueError(f"{argument} must name one folder, {why}, got {name!r}.")


def folder_name_of(text: str) -> str:
    """The name of a folder that is made from a text: the text where it is one, else what is readable and a digest.

    >>> folder_name_of("my data"), folder_name_of("my/data")
    ('my data', 'my-data-ef4ccd65')
    """
    try:
        return folder_name("text", text)
    except ValueError:
        return f"{readable(text).strip('-.')}-{hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()[:8]}"


def readable(text: str) -> str:
    """What a folder's name may have of a text: its ASCII letters, digits, + and ., up to 80, and - for all else.

    >>> readable("cir × sig-ms"), readable("con.a")
    ('cir-sig-ms', '_con.a')
    """
    kept = re.sub(r"[^A-Za-z0-9+.]+", "-", text)[:80]
    return f"_{kept}" if _reserved(kept) else kept


def _reserved(name: str) -> bool:
    """Whether Windows has a device of that name, whatever it ends with."""
    return name.partition(".")[0].rstrip().upper() in DEVICES


def require(package: str, extra: str) -> None:
    """Raise before any work where a package is missing, with the line that installs it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install 'goal-objectives[{extra}]'", name=package)


def write_provenance(out: Path, files: Iterable[str], packages: Iterable[str], **facts: Any) -> None:
    """Record in provenance.json how the files of a folder were made: versions, their SHA-256, and `facts`.

    >>> folder = Path(tempfile.mkdtemp())
    >>> write_atomically(folder / "a.txt", b"a")
    >>> write_provenance(folder, ["a.txt"], ["numpy"], seed=0)
    >>> sorted(json.loads((folder / "provenance.json").read_text()))
    ['packages', 'python', 'seed', 'sha256']
    """
    provenance = {
        **facts,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "python": ".".join(map(str, sys.version_info[:3])),
        "sha256": {name: sha256(out / name) for name in files},
    }
    write_atomically(out / "provenance.json", (json.dumps(provenance, indent=2, sort_keys=True) + "\n").encode())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
