"""The features of a run in memory: three splits, checked, with a fingerprint."""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from goal.data import Pairs, load

CHUNK = 1024  # images whose regions are averaged at once


class Split(NamedTuple):
    """Images, captions, and which image each caption describes."""

    x: Tensor  # (n, D_x) float32
    y: Tensor  # (m, D_y) float32
    image_of: Tensor  # (m,) int64


class Features(NamedTuple):
    """The three splits, and what tells them from other features."""

    train: Split
    val: Split
    test: Split
    fingerprint: str  # sha256 of all arrays


class Batch(NamedTuple):
    """Rows of a training step."""

    images: Tensor  # (batch,) int64, rows of x, all different
    captions: Tensor  # (batch,) int64, rows of y


@functools.lru_cache(maxsize=1)
def features(data: str, limit: int | None) -> Features:
    """Features of a dataset, region features averaged over the regions; `limit` keeps the first training images.

    Raises:
        ValueError: no such dataset, captions without features, an image without a caption, a limit beyond the images.
    """
    train, val, test = (split(load(data, name)) for name in ("train", "val", "test"))
    if limit is not None:
        if limit > len(train.x):
            raise ValueError(f"limit: {data} has {len(train.x)} training images, got {limit}")
        kept = train.image_of < limit
        train = Split(train.x[:limit], train.y[kept], train.image_of[kept])
    digest = hashlib.sha256()
    for part in (train, val, test):
        for array in part:
            digest.update(f"{tuple(array.shape)}".encode())
            digest.update(array.numpy().data)
    return Features(train, val, test, digest.hexdigest())


def split(pairs: Pairs) -> Split:
    """The split as float32 tensors, one row per image.

    Raises:
        ValueError: captions without features, or an image without a caption.
    """
    if pairs.y is None:
        raise ValueError(
            f"{pairs.name}: the captions of {pairs.split!r} are only text; put their features beside them "
            f"({pairs.split}_caps.npy, one row per caption)"
        )
    bare = np.bincount(pairs.image_of, minlength=len(pairs.x)) == 0
    if bare.any():
        raise ValueError(f"{pairs.name}: image {int(bare.argmax())} of {pairs.split!r} has no caption")
    x = np.concatenate(list(_pooled(pairs.x)))
    return Split(torch.from_numpy(x), torch.tensor(pairs.y, dtype=torch.float32), torch.from_numpy(pairs.image_of))


def _pooled(x: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    """(n, D) float32 of (n, D) or, averaged, (n, R, D), some rows at a time."""
    for start in range(0, len(x), CHUNK):
        rows = np.asarray(x[start : start + CHUNK], np.float32)
        yield rows if rows.ndim == 2 else rows.mean(1)


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
            raise ValueError(f"batch: {batch} is more than the {len(self.count)} training images")
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
