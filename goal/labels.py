"""Labelled batches of one modality as pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from goal import validation


def pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, ids) of a labelled batch of one modality, the usual case of deep metric learning.

    Each item is an anchor once, and its positive is the next item with its label (after the last, the first): y is a
    permutation of x within labels. Items without another item of their label have no positive and are left out.

    Args:
        embeddings: (B, D), differentiable.
        labels: (B,) integers.

    Returns:
        x (K, D), y (K, D), ids (K,): for ``goal.apply(x, y, ids=ids)``.

    Raises:
        ValueError: no label occurs twice.

    Example:
        >>> import goal, torch
        >>> x, y, ids = goal.pairs(torch.eye(5), torch.tensor([7, 3, 7, 3, 9]))
        >>> x.argmax(1), y.argmax(1), ids
        (tensor([1, 3, 0, 2]), tensor([3, 1, 2, 0]), tensor([3, 3, 7, 7]))
    """
    embeddings = validation.matrix("embeddings", embeddings, "(B, D)")
    ids = validation.identity("labels", labels, len(embeddings), "embeddings", embeddings.device)
    ordered, item = ids.sort(stable=True)
    _, group, size = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    first = size.cumsum(0) - size
    place = torch.arange(len(ids), device=ids.device)
    following = first[group] + (place - first[group] + 1) % size[group]
    paired = size[group] > 1
    if not bool(paired.any()):
        raise ValueError("labels: no label occurs twice, so no item has a positive.")
    return embeddings[item[paired]], embeddings[item[following[paired]]], ordered[paired]
