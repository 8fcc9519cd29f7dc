"""The weighing stage: T · P± of every anchor, by plain tensor functions over all pairs of the batch, O(N)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.engine.range import bounded, lost
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Coefficients, Dense, Masks, Mined, Once, Pairs, Positive, Soft
from goal.terms.product import Product, Weights


class Weighed(NamedTuple):
    """Result of weighing: the value, the entries of G, and fields for `Stats`."""

    value: Tensor  # 0-d, without that of dense anchors' negatives
    coefficients: Coefficients
    weights: Weights | None = None  # of the mined triplets; fields (2, K) or a number
    fallback: Tensor | None = None  # (2, K) bool: anchors that use all their negatives
    stands: Tensor | None = None  # (2, K) s̃⁻ of soft mining; −inf if an anchor has no negative


def share_of(pairs: Pairs, weight: Tensor | None, settings: Settings, masks: Masks) -> Any:
    """The weight of each anchor, (K,), (2, K), (2, 1) or a number.

    That is wᵢ, divided by Σ w (by K without weights) for the mean, times the objective's scale; 0 in a direction that
    is left out.
    """
    s_pos, mean = pairs.s_pos, settings.reduction == "mean"
    share: Any = 1.0 / s_pos.shape[-1] if mean else 1.0
    if mean and masks.by_ids and masks.size[0] != masks.size[1]:
        share = s_pos.new_tensor([[1 / masks.size[0]], [1 / masks.size[1]]])
    if weight is not None:
        share = weight.to(s_pos.dtype)
        if mean:
            total = share.sum(-1, keepdim=True)
            share = share / torch.where(total == 0, 1, total)  # all weights 0: nothing is emitted
    share = share * settings.factor
    if settings.directions != "both" or masks.one_set:
        forth = masks.one_set or settings.directions == "x→y"
        share = share * s_pos.new_tensor([[1.0], [0.0]] if forth else [[0.0], [1.0]])
    return share


def weigh(settings: Settings, masks: Masks, pairs: Pairs, statistics: Statistics | None, share: Any) -> Weighed:
    """The weighing stage; only the value of dense anchors' negatives is not included.

    Args:
        masks: of the whole batch.
        statistics: of all anchors; None where nothing was mined.
        share: the weight of each anchor, from `share_of`.
    """
    mining = settings.mining
    relative = {} if statistics is None else settings.relative(statistics)
    has_pos = None
    if masks.by_ids:
        has_pos = pairs.s_pos != torch.inf  # a stand-in where there is none
        pairs = pairs._replace(s_pos=torch.where(has_pos, pairs.s_pos, 0))
        statistics = None if statistics is None else statistics._replace(s_pos=pairs.s_pos)
    s_pos = pairs.s_pos
    if relative and not bounded(s_pos):  # relative similarities depend on all pairs
        gone = torch.where(s_pos.isfinite().all(), 0.0, torch.nan)
        relative = {name: value + gone for name, value in relative.items()}
    if mining.softmax is not None and statistics is not None:
        return _soft(settings, masks, pairs, statistics, relative, share, has_pos)
    if has_pos is not None and mining.pull == "each":
        share = has_pos.to(s_pos.dtype) * share
    fallback = None
    if mining.eps is not None and statistics is not None:
        fallback = (s_pos - statistics.hardest[0]).abs() < mining.eps
    weighed = Weighed(s_pos.new_zeros(()), Coefficients(), None, fallback)
    if mining.picks and statistics is not None:
        weighed = _mined(settings, masks, pairs, statistics, relative, share, fallback)
    if mining.dense != "never":
        dense, value = _dense(settings, masks, pairs, relative, share, fallback, has_pos)
        coefficients = weighed.coefficients._replace(dense=dense)
        if masks.by_ids and coefficients.positives is None:
            nothing = torch.zeros_like(dense.share)
            coefficients = coefficients._replace(positives=_positive(settings, pairs, nothing, relative))
        weighed = weighed._replace(coefficients=coefficients, value=weighed.value + value)
    return weighed


def _positive(settings: Settings, pairs: Pairs, pull: Tensor, relative: dict[str, Tensor]) -> Positive:
    """Pulls at positives by ids; without P⁺ where that is taken at each positive."""
    softmax = settings.positives.softmax
    if softmax is None:
        return Positive(pull, pairs.hardest, None)
    assert pairs.log_sum is not None
    product = settings.product if softmax.at == "each" else None
    soft = Soft(softmax, pairs.log_sum, None, pull, pairs.s_pos, {} if product is None else relative, product, None)
    return Positive(pull, None, soft)


def weights_of(settings: Settings, statistics: Statistics) -> Weights:
    """T and P± of all anchors at the negatives that mining selects; at s⁺ if an anchor has none."""
    s_pos, (s_neg, _) = statistics.s_pos, statistics.selected
    stand_in = torch.where(s_neg == -torch.inf, s_pos, s_neg)
    return settings.product.weights(s_pos, stand_in, settings.relative(statistics))


def _mined(
    settings: Settings,
    masks: Masks,
    pairs: Pairs,
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
    if not masks.by_ids:
        mined = Mined(index, _expanded(-pull, s_neg), _expanded(push, s_neg))
        return Weighed(value, Coefficients(mined), weights, fallback)
    pull = share * weights.T if _at_each(settings) else pull
    positives = _positive(settings, pairs, _expanded(-pull, s_neg), relative)
    mined = Mined(index, None, _expanded(push, s_neg))
    return Weighed(value, Coefficients(mined, positives=positives), weights, fallback)


def _at_each(settings: Settings) -> bool:
    """Whether P⁺ is taken at each positive."""
    softmax = settings.positives.softmax
    return softmax is not None and softmax.at == "each"


def _soft(
    settings: Settings,
    masks: Masks,
    pairs: Pairs,
    statistics: Statistics,
    relative: dict[str, Tensor],
    share: Any,
    has_pos: Tensor | None,
) -> Weighed:
    """The anchors of soft mining and their value: s̃⁻ takes the place of the negative's similarity.

    In float64, which the error of a log-sum needs: T and the shares see τ times it.
    """
    softmax, product, dtype = settings.mining.softmax, settings.product, statistics.s_pos.dtype
    assert softmax is not None
    assert statistics.log_sum is not None
    s_pos = (statistics.s_pos if statistics.own is None else statistics.own).double()
    if pairs.exact is not None and has_pos is not None:
        s_pos = torch.where(has_pos, pairs.exact, 0)
    relative = {name: value.double() for name, value in relative.items()}
    count = _negatives(masks, s_pos)
    if softmax.over == "candidates":
        count = count + (_positives(masks, s_pos) if masks.by_ids else 1)
    has = count > 0
    stands = softmax.stands(statistics.log_sum, count)
    s_neg = torch.where(has, stands, s_pos)  # a stand-in where there is no negative
    weights = product.weights(s_pos, s_neg, relative).narrowed(dtype)
    loss = product.value(s_pos, s_neg)
    pushed, pulled, met = share, share, share
    if masks.may_lack:
        pushed, pulled, met, loss = _lone(product, (s_pos, s_neg), (has_pos, has), share, loss, softmax.over)
        pushed, pulled, met = (one.to(dtype) if isinstance(one, Tensor) else one for one in (pushed, pulled, met))
    if not bounded(statistics.s_pos, s_neg.to(dtype)):
        gone = lost(statistics.s_pos, s_neg.to(dtype), weights, loss)
        pushed, pulled, met = (one + torch.where(gone, torch.nan, 0.0).to(dtype) for one in (pushed, pulled, met))
        loss = torch.where(met == 0, 0.0, loss)
    pull = pulled * weights.T if _at_each(settings) else weights.coefficients(pulled)[0]
    each = softmax.at == "each"
    push = pushed * weights.T if each else weights.coefficients(pushed)[1]
    soft = Soft(
        softmax,
        statistics.log_sum,
        None if masks.by_ids else _expanded(-pull, s_neg).to(dtype),
        _expanded(push, s_neg).to(dtype),
        statistics.s_pos,
        {name: value.to(dtype) for name, value in relative.items()} if each else {},
        product if each else None,
        statistics.exps,
    )
    value = (loss * met).sum().to(dtype)
    stands = torch.where(has, stands, -torch.inf).to(dtype)
    positives = None
    if masks.by_ids:
        narrow = {name: one.to(dtype) for name, one in relative.items()}
        positives = _positive(settings, pairs, _expanded(-pull, s_neg).to(dtype), narrow)
    return Weighed(value, Coefficients(soft=soft, positives=positives), weights, stands=stands)


def _lone(
    product: Product,
    at: tuple[Tensor, Tensor],
    has: tuple[Tensor | None, Tensor],
    share: Any,
    loss: Tensor,
    over: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights of push, pull and value, and the value, where anchors lack positives or negatives.

    Such an anchor emits nothing; where the loss is a part of s⁺ and a part of s⁻, the part that the anchor has stays.

    Args:
        at: s⁺ and s⁻, with stand-ins.
        has: whether an anchor has a positive (None: all have), and a negative.
    """
    (s_pos, s_neg), (has_pos, has_neg) = at, has
    has_pos = torch.ones_like(has_neg) if has_pos is None else has_pos
    both = has_pos & has_neg
    if over == "candidates" or not product.separate(s_pos):
        alone = share * both.to(s_pos.dtype)
        return alone, alone, alone, torch.where(both, loss, 0.0)
    a, b = product.split(s_pos)
    of_pos, of_neg = product.value(s_pos, b), product.value(a, s_neg) - product.value(a, b)
    part = torch.where(has_pos, of_pos, torch.where(has_neg, of_neg, 0.0))
    pushed, pulled, met = (share * one.to(s_pos.dtype) for one in (has_neg, has_pos, has_pos | has_neg))
    return pushed, pulled, met, torch.where(both, loss, part)


def _expanded(weight: Any, like: Tensor) -> Tensor:
    """A weight, which may be a plain number, in the shape of `like`."""
    return weight.expand_as(like) if isinstance(weight, Tensor) else torch.full_like(like, weight)


def _dense(
    settings: Settings,
    masks: Masks,
    pairs: Pairs,
    relative: dict[str, Tensor],
    share: Any,
    fallback: Tensor | None,
    has_pos: Tensor | None,
) -> tuple[Dense, Tensor]:
    """The anchors that use all their negatives, and the part of their value that needs none; others have share 0."""
    s_pos, mining = pairs.s_pos, settings.mining
    sizes = _negatives(masks, s_pos)
    each = share / sizes.clamp(min=1) if mining.average else torch.ones_like(sizes) * share
    if fallback is not None:
        each = torch.where(fallback, each, each.new_zeros(()))
    every, apart = mining.dense == "always", _at_each(settings)
    dense = Dense(settings.product, s_pos, pairs.bounds, each, relative, every, apart=apart)
    if mining.pull == "each":
        return dense, s_pos.new_zeros(())
    return _once(dense, sizes, torch.ones_like(sizes) * share, mining.average, has_pos)


def _once(dense: Dense, sizes: Tensor, share: Tensor, average: bool, has_pos: Tensor | None) -> tuple[Dense, Tensor]:
    """The anchors with a positive pulled once, and the part of the value that depends on s⁺ alone.

    A loss that is a sum counts its part of the positive once, and an anchor that lacks negatives or positives keeps
    the other part.

    Args:
        sizes: (2, K) number of negatives.
        share: (2, K) weight of each anchor.
        has_pos: (2, K) whether an anchor has a positive; None: all have.
    """
    s_pos, product = dense.s_pos, dense.product
    of_pulls = torch.ones_like(sizes) if average else 1 / sizes.clamp(min=1)
    with_pos = torch.ones_like(sizes) if has_pos is None else has_pos.to(sizes.dtype)
    if not product.separate(s_pos):
        once = Once(of_pulls, torch.zeros_like(sizes), None)
        return dense._replace(share=dense.share * with_pos, once=once), s_pos.new_zeros(())
    alone = torch.where(sizes == 0, share * with_pos, 0)
    weights = product.weights(s_pos, s_pos, dense.relative)
    pull = alone * weights.T if dense.apart else weights.coefficients(alone)[0]
    a, b = product.split(s_pos)
    value = (share * with_pos * product.value(s_pos, b)).sum() - (dense.share * sizes).sum() * product.value(a, b)
    once = Once(of_pulls * with_pos, _expanded(pull, sizes), a.expand_as(s_pos).contiguous())  # as kernels read it
    return dense._replace(once=once), value


def _negatives(masks: Masks, s_pos: Tensor) -> Tensor:
    """(2, K) number of each anchor's negatives, in the dtype of s⁺."""
    n, m = masks.size
    if masks.ids is None:
        return s_pos.new_tensor([[m - 1.0], [n - 1.0]]).expand(2, masks.pairs)
    return _counted([masks.negatives(side, s_pos.device) for side in (0, 1)], s_pos)


def _positives(masks: Masks, s_pos: Tensor) -> Tensor:
    """(2, A) number of each anchor's positives by ids, in the dtype of s⁺."""
    return _counted([masks.positives(side) for side in (0, 1)], s_pos)


def _counted(counts: list[Tensor], s_pos: Tensor) -> Tensor:
    """The numbers of both directions' anchors; 0 where one direction has fewer."""
    size = max(len(one) for one in counts)
    return torch.stack([torch.nn.functional.pad(one, (0, size - len(one))) for one in counts]).to(s_pos.dtype)
