"""The weighing stage: T · P± of every anchor, by plain tensor functions over all pairs of the batch, O(N)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.engine.range import bounded, lost
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Coefficients, Dense, Masks, Mined, Once, Pairs, Soft
from goal.terms.product import Weights


class Weighed(NamedTuple):
    """Result of weighing: the value, the entries of G, and fields for `Stats`."""

    value: Tensor  # 0-d, without that of dense anchors' negatives
    coefficients: Coefficients
    weights: Weights | None = None  # of the mined triplets; fields (2, K) or a number
    fallback: Tensor | None = None  # (2, K) bool: anchors that use all their negatives
    stands: Tensor | None = None  # (2, K) s̃⁻ of soft mining; −inf if an anchor has no negative


def share_of(pairs: Pairs, weight: Tensor | None, settings: Settings) -> Any:
    """The weight of each anchor, (K,), (2, K), (2, 1) or a number.

    That is wᵢ, divided by Σ w (by K without weights) for the mean, times the objective's scale; 0 in a direction that
    is left out.
    """
    s_pos, mean = pairs.s_pos, settings.reduction == "mean"
    share: Any = 1.0 / s_pos.shape[0] if mean else 1.0
    if weight is not None:
        share = weight.to(s_pos.dtype)
        if mean:
            total = share.sum(-1, keepdim=True)
            share = share / torch.where(total == 0, 1, total)  # all weights 0: nothing is emitted
    share = share * settings.factor
    if settings.directions != "both":
        share = share * s_pos.new_tensor([[1.0], [0.0]] if settings.directions == "x→y" else [[0.0], [1.0]])
    return share


def weigh(settings: Settings, masks: Masks, pairs: Pairs, statistics: Statistics | None, share: Any) -> Weighed:
    """The weighing stage; only the value of dense anchors' negatives is not included.

    Args:
        masks: of the whole batch.
        statistics: of all anchors; None where nothing was mined.
        share: the weight of each anchor, from `share_of`.
    """
    s_pos, mining = pairs.s_pos, settings.mining
    relative = {} if statistics is None else settings.relative(statistics)
    if relative and not bounded(s_pos):  # relative similarities depend on all pairs
        gone = torch.where(s_pos.isfinite().all(), 0.0, torch.nan)
        relative = {name: value + gone for name, value in relative.items()}
    if mining.softmax is not None and statistics is not None:
        return _soft(settings, masks, statistics, relative, share)
    fallback = None
    if mining.eps is not None and statistics is not None:
        fallback = (s_pos - statistics.hardest[0]).abs() < mining.eps
    weighed = Weighed(s_pos.new_zeros(()), Coefficients(), None, fallback)
    if mining.picks and statistics is not None:
        weighed = _mined(settings, masks, statistics, relative, share, fallback)
    if mining.dense != "never":
        dense, value = _dense(settings, masks, pairs, relative, share, fallback)
        weighed = weighed._replace(coefficients=weighed.coefficients._replace(dense=dense), value=weighed.value + value)
    return weighed


def weights_of(settings: Settings, statistics: Statistics) -> Weights:
    """T and P± of all anchors at the negatives that mining selects; at s⁺ if an anchor has none."""
    s_pos, (s_neg, _) = statistics.s_pos, statistics.selected
    stand_in = torch.where(s_neg == -torch.inf, s_pos, s_neg)
    return settings.product.weights(s_pos, stand_in, settings.relative(statistics))


def _mined(
    settings: Settings,
    masks: Masks,
    statistics: Statistics,
    relative: dict[str, Tensor],
    share: Any,
    fallback: Tensor | None,
) -> Weighed:
    """The entries of G and the value of the mined triplets, one for each anchor and direction."""
    s_pos, product = statistics.s_pos, settings.product
    s_neg, index = statistics.selected
    if statistics.semi is not None or masks.may_lack:
        has = s_neg != -torch.inf
        s_neg = torch.where(has, s_neg, s_pos)  # a stand-in for a missing negative: its share is 0
        share = has.to(s_pos.dtype) * share
    if fallback is not None:
        share = (~fallback).to(s_pos.dtype) * share
    weights = product.weights(s_pos, s_neg, relative)
    loss = product.value(s_pos, s_neg)
    hardest, _ = statistics.hardest
    if not bounded(s_pos, hardest, *([] if statistics.semi is None else [s_neg])):
        # a NaN or inf anywhere in the anchor's similarities is in their maximum
        if masks.may_lack:
            hardest = torch.where(hardest == -torch.inf, s_pos, hardest)
        gone = lost(s_pos, s_neg, weights, loss) | ~hardest.isfinite()
        share = share + torch.where(gone, torch.nan, 0.0).to(s_pos.dtype)
        loss = torch.where(share == 0, 0.0, loss)
    value = (loss * share).sum()
    pull, push = weights.coefficients(share)
    mined = Mined(index, _expanded(-pull, s_neg), _expanded(push, s_neg))
    return Weighed(value, Coefficients(mined), weights, fallback)


def _soft(settings: Settings, masks: Masks, statistics: Statistics, relative: dict[str, Tensor], share: Any) -> Weighed:
    """The anchors of soft mining and their value: s̃⁻ takes the place of the negative's similarity."""
    s_pos, softmax, product = statistics.s_pos, settings.mining.softmax, settings.product
    assert softmax is not None
    assert statistics.log_sum is not None
    count = _negatives(masks, s_pos) + (softmax.over == "candidates")
    stands = softmax.stands(statistics.log_sum, count)
    lone = masks.may_lack and softmax.over == "negatives"
    has = stands != -torch.inf
    s_neg = torch.where(has, stands, s_pos) if lone else stands  # a stand-in where there is no negative
    weights = product.weights(s_pos, s_neg, relative)
    loss = product.value(s_pos, s_neg)
    pushed, pulled = share, share
    if lone:
        pushed = has.to(s_pos.dtype) * share
        separate = product.separate(s_pos)
        pulled = share if separate else pushed
        loss = torch.where(has, loss, product.value(s_pos, product.split(s_pos)[1]) if separate else 0.0)
    if not bounded(s_pos, s_neg):
        gone = lost(s_pos, s_neg, weights, loss)
        pushed, pulled = (one + torch.where(gone, torch.nan, 0.0).to(s_pos.dtype) for one in (pushed, pulled))
        loss = torch.where(pulled == 0, 0.0, loss)
    pull, _ = weights.coefficients(pulled)
    each = softmax.at == "each"
    push = pushed * weights.T if each else weights.coefficients(pushed)[1]
    soft = Soft(
        softmax,
        statistics.log_sum,
        _expanded(-pull, s_neg),
        _expanded(push, s_neg),
        s_pos,
        relative if each else {},
        product if each else None,
        statistics.exps,
    )
    return Weighed((loss * pulled).sum(), Coefficients(soft=soft), weights, stands=stands)


def _expanded(weight: Any, like: Tensor) -> Tensor:
    """A weight, which may be a plain number, in the shape of `like`."""
    return weight.expand_as(like) if isinstance(weight, Tensor) else torch.full_like(like, weight)


def _dense(
    settings: Settings, masks: Masks, pairs: Pairs, relative: dict[str, Tensor], share: Any, fallback: Tensor | None
) -> tuple[Dense, Tensor]:
    """The anchors that use all their negatives, and the part of their value that needs none; others have share 0."""
    s_pos, mining = pairs.s_pos, settings.mining
    sizes = _negatives(masks, s_pos)
    each = share / sizes.clamp(min=1) if mining.average else torch.ones_like(sizes) * share
    if fallback is not None:
        each = torch.where(fallback, each, each.new_zeros(()))
    dense = Dense(settings.product, *pairs, each, relative, mining.dense == "always")
    if mining.pull == "each":
        return dense, s_pos.new_zeros(())
    once, value = _once(dense, sizes, torch.ones_like(sizes) * share, mining.average)
    return dense._replace(once=once), value


def _once(dense: Dense, sizes: Tensor, share: Tensor, average: bool) -> tuple[Once, Tensor]:
    """How a positive is pulled once, and the part of the value that depends on s⁺ alone.

    A loss that is a sum counts its part of the positive once, and an anchor without negatives keeps it.

    Args:
        sizes: (2, K) number of negatives.
        share: (2, K) weight of each anchor.
    """
    s_pos, product = dense.s_pos, dense.product
    of_pulls = torch.ones_like(sizes) if average else 1 / sizes.clamp(min=1)
    if not product.separate(s_pos):
        return Once(of_pulls, torch.zeros_like(sizes), None), s_pos.new_zeros(())
    pull, _ = product.weights(s_pos, s_pos, dense.relative).coefficients(torch.where(sizes == 0, share, 0))
    a, b = product.split(s_pos)
    value = (share * product.value(s_pos, b)).sum() - (dense.share * sizes).sum() * product.value(a, b)
    return Once(of_pulls, _expanded(pull, sizes), a.expand_as(s_pos)), value


def _negatives(masks: Masks, s_pos: Tensor) -> Tensor:
    """(2, K) number of each anchor's negatives, in the dtype of s⁺."""
    n, m = masks.size
    if masks.ids is None:
        return s_pos.new_tensor([[m - 1.0], [n - 1.0]]).expand(2, masks.pairs)
    return torch.stack([masks.negatives(side, s_pos.device) for side in (0, 1)]).to(s_pos.dtype)
