"""Partial reductions of S: a block gives a partial, and merging the partials of all blocks gives the result for S."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from goal.engine.statistics import Request, Statistics
from goal.engine.types import Limits, Pairs
from goal.positives import Positives


class Partial(NamedTuple):
    """One direction's reductions over some of the candidates of A anchors. Fields that were not requested are None.

    The sums are relative to the partial's own hardest negative and exclude it, so merging only ever adds.
    """

    s_neg: Tensor | None = None  # (A,) similarity of the hardest negative; −inf if there is none yet
    negative: Tensor | None = None  # (A,) int64, its global index
    semi: Tensor | None = None  # (A,) similarity of the hardest semi-hard negative; −inf if there is none
    semi_negative: Tensor | None = None  # (A,) int64
    ties: Tensor | None = None  # (A,) number of negatives equal to the hardest, itself included
    lin_count: Tensor | None = None  # (A,) valid negatives below the hardest
    lin_sum: Tensor | None = None  # (A,) Σ (s⁻ − sᵢⱼ) over them
    exp_count: Tensor | None = None  # (A,) valid negatives other than the hardest
    exp_sum: Tensor | None = None  # (A,) Σ exp(−β(s⁻ − sᵢⱼ)) over them
    peak: Tensor | None = None  # (A,) near the largest hardness of soft mining; −inf if there is no negative yet
    soft_sum: Tensor | None = None  # (A,) Σ e^{h − peak}
    soft_norm: Tensor | None = None  # (A,) (Σ e^{2(h − peak)})^½
    own: Tensor | None = None  # (A,) Σ s over the anchor's positives, as tiles have them: its pair, or those by ids


def merge(a: Partial, b: Partial, request: Request, limits: Limits) -> Partial:
    """The partial over both sets of candidates: associative, and commutative except for the order of summing.

    Args:
        a, b: partials of the same anchors over disjoint candidates.
        request: the request of both partials.
        limits: of the batch: the threshold of the sums, and the distance below which similarities are equal.
    """
    merged = _merged_softmax(a, b)
    if a.s_neg is None or b.s_neg is None or a.negative is None or b.negative is None:
        return merged
    takes_b = _beats(b.s_neg, b.negative, a.s_neg, a.negative)
    s_neg, index = torch.where(takes_b, b.s_neg, a.s_neg), torch.where(takes_b, b.negative, a.negative)
    merged = merged._replace(s_neg=s_neg, negative=index)
    if a.semi is not None and b.semi is not None and a.semi_negative is not None and b.semi_negative is not None:
        takes_semi = _beats(b.semi, b.semi_negative, a.semi, a.semi_negative)
        merged = merged._replace(
            semi=torch.where(takes_semi, b.semi, a.semi),
            semi_negative=torch.where(takes_semi, b.semi_negative, a.semi_negative),
        )
    if not request.sums:
        return merged

    def ordered(name: str) -> tuple[Tensor, Tensor]:  # (the winner's field, the loser's field)
        of_a, of_b = getattr(a, name), getattr(b, name)
        return torch.where(takes_b, of_b, of_a), torch.where(takes_b, of_a, of_b)

    lost = torch.where(takes_b, a.s_neg, b.s_neg)  # the loser's hardest negative joins the sums, if it is valid
    joins = lost >= limits.threshold
    gap = torch.where(joins, s_neg - lost, 0)
    if request.lin:
        count, lost_count = ordered("lin_count")
        total, lost_total = ordered("lin_sum")
        ties, lost_ties = ordered("ties")
        tied = gap <= limits.tie
        merged = merged._replace(
            ties=ties + lost_ties * (joins & tied),
            lin_count=count + lost_count + lost_ties * (joins & ~tied),
            lin_sum=total + lost_total + (lost_count + lost_ties * joins) * gap,
        )
    if request.beta is not None:
        count, lost_count = ordered("exp_count")
        total, lost_total = ordered("exp_sum")
        merged = merged._replace(
            exp_count=count + lost_count + joins,
            exp_sum=total + torch.exp(-request.beta * gap) * (lost_total + joins.to(total.dtype)),
        )
    return merged


def _merged_softmax(a: Partial, b: Partial) -> Partial:
    """The partial of the log-sums alone: both sums relative to the higher of the two peaks."""
    if a.peak is None or b.peak is None or a.soft_sum is None or b.soft_sum is None:
        return Partial()
    peak = torch.maximum(a.peak, b.peak)
    by_a, by_b = (torch.where(one == peak, 1, torch.exp(one - peak)) for one in (a.peak, b.peak))
    own = None if a.own is None or b.own is None else a.own + b.own
    merged = Partial(peak=peak, soft_sum=a.soft_sum * by_a + b.soft_sum * by_b, own=own)
    if a.soft_norm is None or b.soft_norm is None:
        return merged
    return merged._replace(soft_norm=torch.hypot(a.soft_norm * by_a, b.soft_norm * by_b))


def _beats(s: Tensor, index: Tensor, other: Tensor, other_index: Tensor) -> Tensor:
    """Where s goes before `other`: higher, or equal with the lower index; NaN goes before all, so that it shows."""
    return (s > other) | ((s == other) & (index < other_index)) | s.isnan()


def finish(s_pos: Tensor, *directions: Partial) -> Statistics:
    """Statistics from the partials over all candidates: x→y and y→x, or a single partial with both as its rows."""
    part = directions[0]
    if len(directions) == 2:
        part = Partial(
            **{name: _stacked(name, *(getattr(one, name) for one in directions)) for name in Partial._fields}
        )

    def mean(total: Tensor | None, count: Tensor | None) -> Tensor | None:
        return None if total is None or count is None else total / count.clamp(min=1)  # an empty set has total 0

    return Statistics(
        s_pos=s_pos,
        s_neg=part.s_neg,
        negative=part.negative,
        semi=part.semi,
        semi_negative=part.semi_negative,
        r_neg_lin=mean(part.lin_sum, part.lin_count),
        r_neg_exp=mean(part.exp_sum, part.exp_count),
        log_sum=log_sum(part),
        effective=_effective(part.soft_sum, part.soft_norm),
        own=None if part.own is None else part.own[0],
    )


def _stacked(name: str, rows: Tensor | None, cols: Tensor | None) -> Tensor | None:
    """A field of both directions, (2, A); where one has fewer anchors, what it lacks has no candidates."""
    if rows is None or cols is None:
        return None
    if len(rows) == len(cols):
        return torch.stack((rows, cols))
    nothing = -torch.inf if name in ("s_neg", "semi", "peak") else 0
    size = max(len(rows), len(cols))
    return torch.stack([torch.nn.functional.pad(one, (0, size - len(one)), value=nothing) for one in (rows, cols)])


def _both(rows: Partial, cols: Partial) -> Partial:
    """The partials of both directions as the rows of one."""
    fields = {name: _stacked(name, getattr(rows, name), getattr(cols, name)) for name in Partial._fields}
    return Partial(**fields)


def positives_of(rule: Positives, count: Callable[[int], Tensor], rows: Partial, cols: Partial) -> Pairs:
    """The positives of anchors from the partials over all candidates of x→y and of y→x.

    count: side → the number of positives of its anchors.
    """
    part = _both(rows, cols)
    none = torch.empty(0, dtype=torch.float64)
    if rule.softmax is None:
        assert part.s_neg is not None
        return Pairs(-part.s_neg, none, part.negative)
    sums, counts = log_sum(part), _stacked("count", count(0), count(1))
    assert sums is not None
    assert counts is not None
    assert part.own is not None
    stands = rule.softmax.stands(sums)
    if rule.linear:  # a single positive stands for itself, to the bit
        stands = torch.where(rule.mean | (counts == 1), part.own.double() / counts, stands)
    stands = torch.where(counts > 0, stands, torch.inf)
    return Pairs(stands.to(part.own.dtype), none, None, sums, stands)


def log_sum(part: Partial) -> Tensor | None:
    """log Z in float64; −inf without candidates."""
    if part.peak is None or part.soft_sum is None:
        return None
    return part.peak.double() + part.soft_sum.double().log()


def _effective(total: Tensor | None, norm: Tensor | None) -> Tensor | None:
    """(Σ e^h)² / Σ e^{2h}; 0 without negatives."""
    if total is None or norm is None:
        return None
    return torch.where(norm == 0, 0, total / norm).square()
