"""pair → mine → weigh → emit: the one path that every objective takes.

s⁺                      pair   O(N·D)
Statistics              mine   O(N·M·D), the only quadratic step
T, P⁺, P⁻, entries of G weigh  O(N), plain tensor functions
∂l/∂x, ∂l/∂y            emit   O(N·D) for mined objectives
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.engine import eager as reference
from goal.engine import operators as ops
from goal.engine.operators import How
from goal.engine.settings import Settings
from goal.engine.statistics import Request, Statistics
from goal.engine.types import Gradients, Masks, Mined, Needs, Pairs, total
from goal.mining import Mining
from goal.similarity import Dot


class Batch(NamedTuple):
    """One call's data in the computing dtype."""

    x: Tensor  # (N, D), embedded
    y: Tensor  # (M, D)
    how: How
    masks: Masks


class Whole(NamedTuple):
    """What weighing has to know of the whole batch besides its statistics."""

    rows: int  # N
    cols: int  # M
    masks: Masks


class Dense(NamedTuple):
    """What emits G for anchors that meet all their negatives."""

    pairs: Pairs
    share: Tensor  # (2, K), what each of an anchor's negatives weighs
    relative: dict[str, Tensor]  # each (2, K)


def _not_mined() -> Statistics:
    raise RuntimeError("nothing was mined")


class Outcome(NamedTuple):
    """What forward knows at its end: the value, and all that backward needs besides x and y."""

    value: Tensor  # 0-d
    mined: Mined | None
    dense: Dense | None
    seen: Seen


class Seen(NamedTuple):
    """What the weights were computed from, for `Stats`; row 0 is x→y, row 1 is y→x."""

    s_pos: Tensor  # (K,)
    statistics: Statistics | None
    weights: tuple[Any, Any, Any] | None  # T, P⁺, P⁻ of the mined triplets, each (2, K) or a number
    fallback: Tensor | None  # (2, K) bool: anchors that met all their negatives
    later: Callable[[], Statistics] = _not_mined  # what mines them where there is no batch to do it from


def implementation(chosen: Settings, x: Tensor, y: Tensor) -> tuple[How, str]:
    """Who computes, and why; impl="triton" raises where it cannot, impl="auto" takes PyTorch there."""
    if chosen.impl == "torch":
        return How("torch", chosen.precision), "asked for"
    obstacle = _obstacle(chosen, x, y)
    if obstacle is None:
        asked = "asked for" if chosen.impl == "triton" else f"the inputs are on {x.device.type}"
        return How("triton", chosen.precision), asked
    if chosen.impl == "triton":
        raise ValueError(f"impl='triton' cannot be used here: {obstacle}. Use impl='torch' or 'auto'.")
    return How("torch", chosen.precision), obstacle


def _obstacle(chosen: Settings, x: Tensor, y: Tensor) -> str | None:
    """What stands in the way of kernels, or None."""
    if chosen.similarity.name not in ("dot", "cosine"):
        return f"similarity={chosen.similarity.name!r} is no matrix product"
    if torch.float64 in (x.dtype, y.dtype):
        return "float64 is computed by PyTorch"
    interpreted = _interpreted() if chosen.impl == "triton" else False
    if x.device.type != "cuda" and not interpreted:
        return f"the inputs are on {x.device.type}, and kernels need a GPU (or TRITON_INTERPRET=1, which is slow)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if chosen.mining.dense == "never":
        return None
    return ops.cannot_lower(chosen.product)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def computing_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """float64 where either side has it, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32


def masks(x: Tensor, y: Tensor, ids: Tensor | None, y_ids: Tensor | None, how: How) -> Masks:
    """What is no negative in the whole batch."""
    rows, cols = ids, y_ids
    if ids is not None and y_ids is not None and not how.kernels:
        rows, cols = reference.id_codes(ids, y_ids, computing_dtype(x, y))
    return Masks(rows, cols, row_offset=0, col_offset=0, pairs=min(x.shape[0], y.shape[0]))


def prepare(x: Tensor, y: Tensor, similarity: Dot, masks: Masks, how: How) -> Batch:
    """The inputs embedded, in the computing dtype; kernels take products of 16-bit numbers as they are."""
    x, y = x.detach(), y.detach()
    if not (how.kernels and similarity.name == "dot" and x.dtype == y.dtype):
        dtype = computing_dtype(x, y)
        x, y = similarity.embed(x.to(dtype)), similarity.embed(y.to(dtype))
    return Batch(x, y, how, masks)


def mine(batch: Batch, chosen: Settings, request: Request) -> Statistics:
    """The mining stage over the whole batch."""
    x, y, how, masks = batch
    pairs = ops.pair(how, chosen.similarity, x, y, masks.pairs)
    return ops.statistics(how, chosen.similarity, x, y, pairs, request, masks)


def forward(batch: Batch, chosen: Settings, weight: Tensor | None = None) -> Outcome:
    """pair, mine and weigh: the value and the entries of G. `weight` is (K,), or (2, K), a row for each direction."""
    x, y, how, masks = batch
    pairs = ops.pair(how, chosen.similarity, x, y, masks.pairs, chosen.mining.dense == "never")
    scale = _scale(pairs.s_pos, weight, chosen.reduction)  # what an anchor's selection weighs
    statistics = None
    if chosen.mines:
        statistics = ops.statistics(how, chosen.similarity, x, y, pairs, chosen.request, masks)
    alike = weight is None or weight.dim() == 1  # both directions, as the kernel that weighs takes them
    if (
        statistics is not None
        and alike
        and ops.weighs(how, chosen.product, chosen.mining.dense == "never", masks.pairs)
    ):
        weighed, value = ops.weigh(statistics, chosen.product, scale)
        return Outcome(value, weighed, None, Seen(pairs.s_pos, statistics, None, None))
    outcome = _weighed(chosen, Whole(x.shape[0], y.shape[0], masks), pairs, statistics, scale)
    if outcome.dense is None:
        return outcome
    every, share = chosen.mining.dense == "always", outcome.dense.share
    value = ops.dense_value(how, chosen.similarity, x, y, pairs, share, masks, chosen.product, every)
    return outcome._replace(value=outcome.value + value)


def weigh(
    chosen: Settings, whole: Whole, pairs: Pairs, statistics: Statistics | None, weight: Tensor | None
) -> Outcome:
    """The weighing stage alone, of a batch that somebody else has mined: all but the value of dense anchors."""
    return _weighed(chosen, whole, pairs, statistics, _scale(pairs.s_pos, weight, chosen.reduction))


def _weighed(chosen: Settings, whole: Whole, pairs: Pairs, statistics: Statistics | None, scale: Any) -> Outcome:
    s_pos = pairs.s_pos
    relative = {} if statistics is None else chosen.relative(statistics)
    if relative and not reference.bounded(s_pos):  # they are over all pairs
        lost = torch.where(s_pos.isfinite().all(), 0.0, torch.nan)
        relative = {name: value + lost for name, value in relative.items()}
    fallback = None
    if chosen.mining.eps is not None and statistics is not None:
        fallback = (s_pos - statistics.s_neg).abs() < chosen.mining.eps
    value = s_pos.new_zeros(())
    mined, weights, dense = None, None, None
    if chosen.mining.mined != "none" and statistics is not None:
        mined, weights, value = _weigh(chosen, whole, statistics, relative, scale, fallback)
    if chosen.mining.dense != "never":
        dense = Dense(pairs, _shares(whole, chosen.mining, scale, fallback, s_pos), relative)
    return Outcome(value, mined, dense, Seen(s_pos, statistics, weights, fallback))


def _scale(s_pos: Tensor, weight: Tensor | None, reduction: str) -> Any:
    """What each anchor weighs, (K,), (2, K) or a number: wᵢ, divided by Σ w (by K without weights) for the mean."""
    if weight is None:
        return 1.0 if reduction == "sum" else 1.0 / s_pos.shape[0]
    weight = weight.to(s_pos.dtype)
    if reduction == "sum":
        return weight
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total == 0, 1, total)  # all weights 0: nothing is emitted


def _weigh(
    chosen: Settings,
    whole: Whole,
    statistics: Statistics,
    relative: dict[str, Tensor],
    scale: Any,
    fallback: Tensor | None,
) -> tuple[Mined, tuple[Any, Any, Any], Tensor]:
    """The entries of G and the value of the mined triplets, one for each anchor and direction."""
    s_pos = statistics.s_pos
    s_neg, index = statistics.s_neg, statistics.negative
    if statistics.semi is not None and statistics.semi_negative is not None:
        s_neg, index = statistics.semi, statistics.semi_negative
    share: Any = scale
    if statistics.semi is not None or whole.masks.may_lack(whole.rows, whole.cols):
        has = s_neg != -torch.inf
        s_neg = torch.where(has, s_neg, s_pos)  # a stand-in where there is no negative: its share is 0
        share = has.to(s_pos.dtype) * share
    if fallback is not None:
        share = (~fallback).to(s_pos.dtype) * share
    t, p_pos, p_neg = chosen.product.weights(s_pos, s_neg, relative)
    loss = chosen.product.value(s_pos, s_neg)
    if not reference.bounded(s_pos, statistics.s_neg, *([] if statistics.semi is None else [s_neg])):
        hardest = statistics.s_neg  # a NaN or inf anywhere in the anchor's similarities is in their maximum
        if whole.masks.may_lack(whole.rows, whole.cols):
            hardest = torch.where(hardest == -torch.inf, s_pos, hardest)
        lost = reference.lost(s_pos, s_neg, p_pos, p_neg, loss) | ~hardest.isfinite()
        share = share + torch.where(lost, torch.nan, 0.0).to(s_pos.dtype)
        loss = torch.where(share == 0, 0.0, loss)
    value = (loss * share).sum()
    selected = t * share
    mined = Mined(index, _spread(-selected * p_pos, s_neg), _spread(selected * p_neg, s_neg))
    return mined, (t, p_pos, p_neg), value


def _spread(weight: Any, like: Tensor) -> Tensor:
    """A weight, which may be a plain number, in the shape of `like`."""
    return weight.expand_as(like) if isinstance(weight, Tensor) else torch.full_like(like, weight)


def _shares(whole: Whole, mining: Mining, scale: Any, fallback: Tensor | None, s_pos: Tensor) -> Tensor:
    """(2, K): what each negative weighs of the anchors that meet all of theirs; 0 for the others."""
    n, m, k = whole.rows, whole.cols, whole.masks.pairs
    sizes = s_pos.new_tensor([[m - 1.0], [n - 1.0]]).expand(2, k)  # number of negatives
    if whole.masks.ids is not None:
        sizes = torch.stack([whole.masks.negatives(side, n, m, s_pos.device) for side in (0, 1)]).to(s_pos.dtype)
    share = scale / sizes.clamp(min=1) if mining.average else torch.ones_like(sizes) * scale
    return share if fallback is None else torch.where(fallback, share, share.new_zeros(()))


def emit(
    batch: Batch, chosen: Settings, mined: Mined | None, dense: Dense | None, incoming: Tensor | None, needs: Needs
) -> Gradients:
    """∂l/∂x and ∂l/∂y at the embedded rows, times the incoming gradient; None for a side that needs none."""
    gx, gy = None, None
    x, y, how, masks = batch
    if dense is not None:
        every = chosen.mining.dense == "always"
        if incoming is not None:
            dense = dense._replace(share=dense.share * incoming)
        gx, gy = ops.dense_emit(how, chosen.similarity, x, y, *dense, masks, chosen.product, needs, every)
    if mined is None:
        return gx, gy
    mined_x, mined_y = ops.mined_emit(how, chosen.similarity, x, y, mined, incoming, needs)
    return total(gx, mined_x), total(gy, mined_y)
