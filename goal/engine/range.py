"""Similarities beyond the range of a dtype: the gradient must show them as NaN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from goal.terms.product import Weights


def reach(dtype: torch.dtype) -> float:
    """The largest z for which both exp(z) and exp(−z) are well inside the dtype: 80 in float32."""
    return 0.9 * math.log(torch.finfo(dtype).max)


def bounded(*similarities: Tensor) -> bool:
    """Whether these are known to be far inside the dtype's range; read on the CPU only, where reading does not wait."""
    if torch.compiler.is_compiling() or similarities[0].device.type != "cpu":
        return False
    far = torch.finfo(similarities[0].dtype).max ** 0.75
    return all(torch.dot(s, s).item() < far for s in map(torch.flatten, similarities))


def lost(s_pos: Tensor, s_neg: Tensor, weights: Weights, loss: Tensor) -> Tensor:
    """Where the weights of triplets cannot be computed in this dtype, so that a NaN has to show; bool.

    That is: a similarity is not finite, or its square is not finite and the weights or the loss overflow too.
    """
    limit = torch.finfo(s_neg.dtype).max ** 0.5
    size = torch.maximum(s_pos.abs(), s_neg.abs())
    cut = ~loss.isfinite()
    for weight in (weights.P_pos, weights.P_neg):
        if isinstance(weight, Tensor):
            cut = cut | ~(weight.abs() < limit)
    gone: Tensor = ~(size < torch.inf) | ((size > limit) & cut)
    return gone
