"""The weighing stage: T · P± of every anchor, by plain tensor functions over all pairs of the batch, O(N)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.engine.range import bounded, lost
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Dense, Masks, Mined, Pairs
from goal.terms.product import Weights


class Weighed(NamedTuple):
    """Result of weighing: the value, the entries of G, and fields for `Stats`."""

    value: Tensor  # 0-d, of the mined triplets
    mined: Mined | None
    dense: Dense | None
    weights: Weights | None = None  # of the mined triplets; fields (2, K) or a number
    fallback: Tensor | None = None  # (2, K) bool: anchors that use all their negatives


def share_of(pairs: Pairs, weight: Tensor | None, reduction: str) -> Any:
    """The weight of each anchor, (K,), (2, K) or a number: wᵢ, divided by Σ w (by K without weights) for the mean."""
    if weight is None:
        return 1.0 if reduction == "sum" else 1.0 / pairs.s_pos.shape[0]
    weight = weight.to(pairs.s_pos.dtype)
    if reduction == "sum":
        return weight
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total == 0, 1, total)  # all weights 0: nothing is emitted


def weigh(settings: Settings, masks: Masks, pairs: Pairs, statistics: Statistics | None, share: Any) -> Weighed:
    """The weighing stage; only the value of dense anchors is not included.

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
    fallback = None
    if mining.eps is not None and statistics is not None:
        fallback = (s_pos - statistics.s_neg).abs() < mining.eps
    weighed = Weighed(s_pos.new_zeros(()), None, None, None, fallback)
    if mining.mined != "none" and statistics is not None:
        weighed = _mined(settings, masks, statistics, relative, share, fallback)
    if mining.dense != "never":
        of_negatives = _dense_share(settings, masks, pairs, share, fallback)
        dense = Dense(settings.product, *pairs, of_negatives, relative, mining.dense == "always")
        weighed = weighed._replace(dense=dense)
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
    if not bounded(s_pos, statistics.s_neg, *([] if statistics.semi is None else [s_neg])):
        hardest = statistics.s_neg  # a NaN or inf anywhere in the anchor's similarities is in their maximum
        if masks.may_lack:
            hardest = torch.where(hardest == -torch.inf, s_pos, hardest)
        gone = lost(s_pos, s_neg, weights, loss) | ~hardest.isfinite()
        share = share + torch.where(gone, torch.nan, 0.0).to(s_pos.dtype)
        loss = torch.where(share == 0, 0.0, loss)
    value = (loss * share).sum()
    pull, push = weights.coefficients(share)
    mined = Mined(index, _expanded(-pull, s_neg), _expanded(push, s_neg))
    return Weighed(value, mined, None, weights, fallback)


def _expanded(weight: Any, like: Tensor) -> Tensor:
    """A weight, which may be a plain number, in the shape of `like`."""
    return weight.expand_as(like) if isinstance(weight, Tensor) else torch.full_like(like, weight)


def _dense_share(settings: Settings, masks: Masks, pairs: Pairs, share: Any, fallback: Tensor | None) -> Tensor:
    """(2, K): the weight of each negative of the anchors that use all of theirs; 0 for other anchors."""
    s_pos, (n, m) = pairs.s_pos, masks.size
    sizes = s_pos.new_tensor([[m - 1.0], [n - 1.0]]).expand(2, masks.pairs)  # number of negatives
    if masks.ids is not None:
        sizes = torch.stack([masks.negatives(side, s_pos.device) for side in (0, 1)]).to(s_pos.dtype)
    each = share / sizes.clamp(min=1) if settings.mining.average else torch.ones_like(sizes) * share
    return each if fallback is None else torch.where(fallback, each, each.new_zeros(()))
