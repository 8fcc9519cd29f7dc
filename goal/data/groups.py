"""Splits that test on new items: variants and near-duplicates form groups, and a group lies in a single split."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

NEAR_DUPLICATE = 0.9  # cosine of centred image features above which two drawings share a group
SHARES = {"test": 0.2, "val": 0.1}  # of the images; the rest is train
LARGEST_HELD_OUT = 10  # larger groups go to train: 21 clock faces would be an eighth of emoji's val


def group(x: NDArray[np.float32], keys: Sequence[Iterable[str]]) -> list[int]:
    """A group's number for every image: a shared key or cosine of centred features > 0.9, transitively.

    Args:
        x: (N, D) image features.
        keys: any number of keys for each image.

    >>> group(np.eye(4, dtype=np.float32), [["a"], ["b"], ["b", "c"], ["c"]])
    [0, 1, 1, 1]
    """
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    near = centred @ centred.T > NEAR_DUPLICATE  # (N, N)
    images_with = defaultdict(list)
    for image, own in enumerate(keys):
        for key in own:
            images_with[key].append(image)
    for images in images_with.values():
        near[np.ix_(images, images)] = True

    groups = [-1] * len(x)
    for first in range(len(x)):
        if groups[first] >= 0:
            continue
        number, reached = max(groups) + 1, [first]
        while reached:
            i = reached.pop()
            if groups[i] < 0:
                groups[i] = number
                reached.extend(np.flatnonzero(near[i]).tolist())
    return groups


def split_groups(groups: Sequence[int], rng: np.random.Generator) -> list[str]:
    """A split for every image: whole groups, in random order, fill test and then val; the rest is train."""
    size = Counter(groups)
    free = {split: round(share * len(groups)) for split, share in SHARES.items()}
    split_of = {}
    for number in rng.permutation(len(size)).tolist():
        fits = (split for split in free if size[number] <= min(free[split], LARGEST_HELD_OUT))
        split_of[number] = next(fits, "train")
        if split_of[number] in free:
            free[split_of[number]] -= size[number]
    return [split_of[number] for number in groups]


def split_by_class(groups: Sequence[int], labels: Sequence[int], rng: np.random.Generator) -> list[str]:
    """A split for every image, class by class, each as `split_groups` does; a group counts for its first image's class.

    >>> split = split_by_class(range(20), [0] * 10 + [1] * 10, np.random.default_rng(0))
    >>> split[:10].count("test"), split[:10].count("val"), split[10:].count("test")
    (2, 1, 2)
    """
    class_of: dict[int, int] = {}
    for number, label in zip(groups, labels, strict=True):
        class_of.setdefault(number, label)
    split_of: dict[int, str] = {}
    for label in sorted(set(labels)):
        own = [number for number in groups if class_of[number] == label]
        _, renumbered = np.unique(own, return_inverse=True)
        split_of.update(zip(own, split_groups(renumbered.tolist(), rng), strict=True))
    return [split_of[number] for number in groups]
