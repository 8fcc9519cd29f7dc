"""The inputs of a run: three checked splits in the form that the model takes, with a fingerprint."""

import dataclasses
import functools
import hashlib
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from goal.data import Pairs, clips, load
from goal.data.files import chunks
from goal.data.maps import ByPath, OnDisk, on_disk, stamp_of
from goal.data.pairs import precomp_roots
from goal.models import Vocabulary
from goal.models.joint import Input
from goal.models.text import padded

CHUNK = 1024  # images whose regions are averaged at once
SETTLED = 2 * 10**9  # nanoseconds after which a file's time tells whether it has changed

Images = Literal["vectors", "unit vectors", "regions", "audio"]
Texts = Literal["words", "features", "visual"]


class Side(Protocol):
    """One modality: `side[rows]` is what an encoder takes of these rows. A tensor in memory is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Input: ...


class Split(NamedTuple):
    """Two modalities, and what belongs together. Of labelled clips x is audio and y is visual, row k of both a clip."""

    x: Any  # a Side of n images
    y: Any  # a Side of m captions
    image_of: Tensor  # (m,) int64, the row of x that each row of y belongs to
    ids: Tensor  # (n,) int64: rows with equal ids are no negatives of each other


class Inputs(NamedTuple):
    """What the encoders are built for."""

    x: int  # dimensions of the features of an image, a region or a sound
    y: int  # tokens of the vocabulary, or dimensions of the features
    y_kind: str  # "words", "tokens" or "vectors"

    def __str__(self) -> str:
        captions = f"{self.y} words" if self.y_kind == "words" else f"{self.y_kind} of {self.y} dimensions"
        return f"images of {self.x} dimensions and captions as {captions}"


class Features(NamedTuple):
    """The splits, and what tells them from other features."""

    train: Split
    val: Split
    test: Split | None  # None where it was not asked for
    fingerprints: dict[str, str]  # of each split: the SHA-256 of all its rows
    vocabulary: Vocabulary | None = None  # of the training captions, where they are read as words


class Batch(NamedTuple):
    """Rows of a training step."""

    images: Tensor  # (batch,) int64, rows of x, all different
    captions: Tensor  # (batch,) int64, rows of y


class Mapped(ByPath):
    """Rows of an array that stays on disk: (n, R, D) regions, or (m, L, D) tokens that end in rows of zeros.

    Sent to another process, a memory map travels as its file's path.

    Args:
        array: memory-mapped, floating point.
        padded: hand out lengths too: where the trailing rows of zeros begin.

    >>> tokens = np.zeros((2, 3, 4), np.float16)
    >>> tokens[0, :2] = 1
    >>> values, lengths = Mapped(tokens, padded=True)[:1]
    >>> values.shape, values.dtype, lengths
    (torch.Size([1, 3, 4]), torch.float32, tensor([2]))
    """

    def __init__(self, array: NDArray[Any], padded: bool = False) -> None:
        self.array, self.padded = array, padded

    def __len__(self) -> int:
        return len(self.array)

    def check_file(self) -> None:
        """Raise where the file behind the map is no longer what was mapped.

        Raises:
            ValueError: naming the file.
        """
        place = on_disk(self.array)
        if isinstance(place, OnDisk) and (not Path(place.path).exists() or stamp_of(place.path) != place.stamp):
            raise ValueError(f"{place.path}: has changed while it was read; run it again, on what is there now.")

    def __getitem__(self, rows: Any) -> Input:
        read = self.array[rows.numpy() if isinstance(rows, Tensor) else rows]
        values = torch.from_numpy(np.array(read, np.float32))
        if not self.padded:
            return values
        places = torch.arange(1, values.shape[1] + 1, device="cpu")
        return values, ((values != 0).any(2) * places).amax(1)


class Words:
    """Captions as tokens of a vocabulary, encoded once and kept one after another; a batch is as wide as its longest.

    Args:
        captions: several texts.
        vocabulary: their words.
        name: what errors and warnings call the captions.

    >>> words = Words(["a dog", "a"], Vocabulary(["a", "dog"]))
    >>> words[1:]
    (tensor([[1, 5, 2]]), tensor([3]))
    """

    def __init__(self, captions: Sequence[str], vocabulary: Vocabulary, name: str = "captions") -> None:
        tokens, self.lengths = vocabulary.flat(captions, name)
        self.tokens = tokens.int()  # (ΣL,)
        self.first = self.lengths.cumsum(0) - self.lengths  # (m,) where each caption begins

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        lengths = self.lengths[rows]
        return padded(self.tokens, self.first[rows], lengths).long(), lengths


def features(
    data: str, limit: int | None, images: Images = "vectors", texts: Texts = "features", test: bool = True
) -> Features:
    """The splits of a dataset, checked; `limit` keeps the first training images.

    The last ones are kept in memory, for the next run on them, until a file in their folder changes.

    Args:
        data: as for `goal.data.load`; for "audio" a folder as for `goal.data.clips`.
        limit: how many.
        images: "vectors", where regions are averaged, or the same as "unit vectors"; "regions"; or "audio" of clips.
        texts: "words", or the given "features" of captions: of sentences, or of tokens; or "visual" of clips.
        test: read the test split; without, it need not be there.

    Raises:
        ValueError: no such dataset, one that does not hold what is asked for, an image without a caption, a limit
            beyond the images, splits of different dimensions.
    """
    return _features(data, limit, images, texts, test, _state(data))


@functools.lru_cache(maxsize=1)
def _features(data: str, limit: int | None, images: Images, texts: Texts, test: bool, state: object) -> Features:
    names = ("train", "val", "test") if test else ("train", "val")
    if images == "audio":
        splits = {name: labelled(data, name) for name in names}
        if limit is not None:
            _check_limit(limit, len(splits["train"].x), f"{data} has {{}} training clips")
            splits["train"] = Split(*(part[:limit] for part in splits["train"]))
        _check_alike(data, splits)
        prints = {name: fingerprint(part) for name, part in splits.items()}
        return Features(splits["train"], splits["val"], splits.get("test"), prints)
    pairs = {name: load(data, name) for name in names}
    if limit is not None:
        pairs["train"] = _first(pairs["train"], limit)
    vocabulary = Vocabulary.of(pairs["train"]) if texts == "words" else None
    splits = {name: split(part, images, vocabulary) for name, part in pairs.items()}
    _check_alike(data, splits, vocabulary)
    prints = {name: fingerprint(part, vocabulary) for name, part in splits.items()}
    return Features(splits["train"], splits["val"], splits.get("test"), prints, vocabulary)


def _state(data: str) -> object:
    """What tells whether the files of a dataset have changed: where they are, their sizes and times.

    Times are coarse: what has changed just now may change once more without another time, and is read again.
    """
    folder = Path(data).resolve()
    if data == "emoji" or not folder.is_dir():
        return None
    now, files = time.time_ns(), []
    for path in (path for root in precomp_roots(folder) if root.is_dir() for path in sorted(root.iterdir())):
        with suppress(OSError):  # a link to nothing: who wants to read it says so
            seen = path.stat()
            if stat.S_ISREG(seen.st_mode):
                changed = seen.st_mtime_ns, seen.st_ctime_ns
                files.append((str(path), seen.st_ino, seen.st_size, *changed, now * (max(changed) > now - SETTLED)))
    return tuple(files)


def _check_alike(data: str, splits: Mapping[str, Split], vocabulary: Vocabulary | None = None) -> None:
    """Whether what is built for the training split can read the others."""
    trained = inputs_of(splits["train"], vocabulary)
    for name, part in splits.items():
        if (found := inputs_of(part, vocabulary)) != trained:
            raise ValueError(f"{data}: {name!r} has {found}, and 'train' has {trained}.")


def inputs_of(part: Split, vocabulary: Vocabulary | None) -> Inputs:
    """What the encoders of a split are built for; captions are words where there is a vocabulary."""
    x, y = part.x[:1], part.y[:1]
    if vocabulary is not None:
        return Inputs(x.shape[-1], len(vocabulary), "words")
    values = y[0] if isinstance(y, tuple) else y
    return Inputs(x.shape[-1], values.shape[-1], "tokens" if isinstance(y, tuple) else "vectors")


def split(pairs: Pairs, images: Images = "vectors", vocabulary: Vocabulary | None = None) -> Split:
    """A split as a model takes it, captions as words where there is a vocabulary; arguments as for `features`.

    Raises:
        ValueError: captions or images that are not there in that form, an image without a caption, or one whose mean or
            norm is beyond float32.
    """
    bare = np.bincount(pairs.image_of, minlength=len(pairs.x)) == 0
    if bare.any():
        raise ValueError(f"{pairs.name}: image {int(bare.argmax())} of {pairs.split!r} has no caption.")
    if vocabulary is None:
        y = _features_of(pairs)
    else:
        y = Words(
            _texts_of(pairs), vocabulary, name=f"{pairs.name}: captions of {pairs.split!r} ({pairs.split}_caps.txt)"
        )
    x: Any
    if images == "regions":
        if pairs.x.ndim != 3:
            raise ValueError(
                f"{pairs.name}: the model takes regions, (n, R, D), and the images of {pairs.split!r} are "
                f"{pairs.x.shape}; `goal data build emoji-grid` makes a small dataset that has them."
            )
        x = Mapped(pairs.x)
    else:
        x = torch.from_numpy(np.concatenate(list(_pooled(pairs.x))))
        _check_norms(pairs, pairs.x, x)
        x = normalize(x, dim=1) if images == "unit vectors" else x
    return Split(x, y, torch.from_numpy(pairs.image_of), torch.arange(len(x), device="cpu"))


def _features_of(pairs: Pairs) -> Any:
    if pairs.y is None:
        raise ValueError(
            f"{pairs.name}: the captions of {pairs.split!r} are only text; put their features beside them "
            f"({pairs.split}_caps.npy, one row per caption)."
        )
    if pairs.y.ndim == 3:
        return Mapped(pairs.y, padded=True)
    y = torch.from_numpy(np.array(pairs.y, np.float32))
    _check_norms(pairs, pairs.y, y)
    return y


def _check_norms(pairs: Pairs, source: NDArray[Any], rows: Tensor) -> None:
    """Refuse (n, D) rows whose mean over regions, or whose norm, is infinite: they would be normalised to 0 or NaN."""
    finite = rows.norm(dim=1).isfinite()
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        file = getattr(source, "filename", None) or f"{pairs.name}, {pairs.split!r}"
        raise ValueError(f"{file}: row {row} is too large, its norm is infinite in float32.")


def _texts_of(pairs: Pairs) -> tuple[str, ...]:
    if pairs.captions is None:
        raise ValueError(f"{pairs.name}: the captions of {pairs.split!r} are only features; give texts='features'.")
    return pairs.captions


def _first(pairs: Pairs, limit: int) -> Pairs:
    """The first images of the training split, with their captions."""
    _check_limit(limit, len(pairs.x), f"{pairs.name} has {{}} training images")
    kept = np.flatnonzero(pairs.image_of < limit)
    return dataclasses.replace(
        pairs,
        x=pairs.x[:limit],
        y=None if pairs.y is None else pairs.y[kept],
        image_of=pairs.image_of[kept],
        captions=None if pairs.captions is None else tuple(pairs.captions[row] for row in kept),
    )


def labelled(data: str, name: str) -> Split:
    """A split of labelled clips: x is audio, y is visual, and the labels are the ids."""
    found = clips(data, name)
    audio, visual, labels = (torch.from_numpy(part) for part in (found.audio, found.visual, found.labels))
    return Split(audio, visual, torch.arange(len(labels), device="cpu"), labels)


def _check_limit(limit: int, count: int, what: str) -> None:
    if limit > count:
        raise ValueError(f"limit must be <= {count}: {what.format(count)}, got {limit}.")


def _pooled(x: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    """(n, D) float32 of (n, D) or, averaged, (n, R, D), some rows at a time."""
    for start in range(0, len(x), CHUNK):
        rows = np.asarray(x[start : start + CHUNK], np.float32)
        with np.errstate(over="ignore"):  # what is infinite then is refused
            pooled = rows if rows.ndim == 2 else rows.mean(1)
        yield pooled


def fingerprint(part: Split, vocabulary: Vocabulary | None = None) -> str:
    """SHA-256 of a split's tensors, tokens and arrays, of every row, however large a file is, and of the words."""
    digest = hashlib.sha256("\n".join(vocabulary.words if vocabulary is not None else ()).encode())
    for side in part:
        array = side.array if isinstance(side, Mapped) else (side.tokens if isinstance(side, Words) else side).numpy()
        digest.update(f"{array.dtype} {tuple(array.shape)}".encode())
        for _, rows in chunks(array, "reading features"):
            digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


class Sampler:
    """Batches of different images, each with one of its captions; a pure function of (seed, step).

    An epoch is a permutation of the images; the rest that fills no batch is left out.

    Raises:
        ValueError: a batch larger than the training split.
    """

    def __init__(self, image_of: Tensor, batch: int, seed: int) -> None:
        owner = image_of.numpy()
        self.count = np.bincount(owner)  # (n,) captions of each image
        if batch > len(self.count):
            raise ValueError(f"batch must be <= {len(self.count)}, the number of training images, got {batch}.")
        self.by_image = np.argsort(owner, kind="stable")  # (m,) captions, image by image
        self.first = np.cumsum(self.count) - self.count  # (n,) where each image's captions begin
        self.batch, self.seed = batch, seed
        self.steps_per_epoch = len(self.count) // batch
        self.epoch = -1

    def __call__(self, step: int) -> Batch:
        """The rows of a step, which count from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.images = rng.permutation(len(self.count))
            self.captions = self.by_image[self.first + rng.integers(self.count)]  # (n,)
            self.epoch = epoch
        images = self.images[place * self.batch : (place + 1) * self.batch]
        return Batch(torch.from_numpy(images), torch.from_numpy(self.captions[images]))
