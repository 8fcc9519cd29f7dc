"""What leaves the mining stage: partial reductions of S that merge, and the statistics they finish into."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_UNDERFLOW = 745.13  # exp(−z) is exactly 0 in float64 beyond: such entries are left out of the positive sets
BAND = 0.1  # the reach of multi-similarity's valid sets: s ≥ min s⁺ − 0.1 and s⁺ ≤ s⁻ + 0.1


class Request(NamedTuple):
    """What the chosen terms and mining need from S; the hardest negative is always found."""

    semi_hard: float | None = None  # the margin of semi-hard mining
    lin: bool = False  # r_neg_lin
    beta: float | None = None  # r_neg_exp


class Partial(NamedTuple):
    """One direction's reductions over some of the candidates of A anchors. What was not requested is None.

    The sums are relative to the partial's own hardest negative, which stays outside them, so merging only ever adds.
    """

    s_neg: Tensor  # (A,) similarity of the hardest negative; −inf where there is none yet
    negative: Tensor  # (A,) int64, its global index
    semi: Tensor | None = None  # (A,) similarity of the hardest semi-hard negative; −inf where none
    semi_negative: Tensor | None = None  # (A,) int64
    ties: Tensor | None = None  # (A,) negatives equal to the hardest, itself included
    lin_count: Tensor | None = None  # (A,) valid negatives below the hardest
    lin_sum: Tensor | None = None  # (A,) Σ (s⁻ − sᵢⱼ) over them
    exp_count: Tensor | None = None  # (A,) valid negatives other than the hardest
    exp_sum: Tensor | None = None  # (A,) Σ exp(−β(s⁻ − sᵢⱼ)) over them


def merge(a: Partial, b: Partial, request: Request, threshold: Tensor, tie: float) -> Partial:
    """The partial over both sets of candidates: associative, and commutative but for the order of summing.

    Args:
        a, b: partials of the same anchors over disjoint candidates.
        request: what both were asked for.
        threshold: 0-d, min s⁺ − 0.1.
        tie: similarities closer than this are equal (the rounding of one product).
    """
    takes_b = _beats(b.s_neg, b.negative, a.s_neg, a.negative)
    s_neg, index = torch.where(takes_b, b.s_neg, a.s_neg), torch.where(takes_b, b.negative, a.negative)
    merged = Partial(s_neg, index)
    if a.semi is not None and b.semi is not None and a.semi_negative is not None and b.semi_negative is not None:
        takes_semi = _beats(b.semi, b.semi_negative, a.semi, a.semi_negative)
        merged = merged._replace(
            semi=torch.where(takes_semi, b.semi, a.semi),
            semi_negative=torch.where(takes_semi, b.semi_negative, a.semi_negative),
        )
    if not request.lin and request.beta is None:
        return merged

    def ordered(name: str) -> tuple[Tensor, Tensor]:  # (winner's, loser's)
        of_a, of_b = getattr(a, name), getattr(b, name)
        return torch.where(takes_b, of_b, of_a), torch.where(takes_b, of_a, of_b)

    lost = torch.where(takes_b, a.s_neg, b.s_neg)  # the loser's hardest now joins the sums, if it is valid
    joins = lost >= threshold
    gap = torch.where(joins, s_neg - lost, 0)
    if request.lin:
        count, lost_count = ordered("lin_count")
        total, lost_total = ordered("lin_sum")
        ties, lost_ties = ordered("ties")
        tied = gap <= tie
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


def _beats(s: Tensor, index: Tensor, other: Tensor, other_index: Tensor) -> Tensor:
    """Where s goes before other: higher, or equal with the lower index; NaN goes before all, so that it shows."""
    return (s > other) | ((s == other) & (index < other_index)) | s.isnan()


class Statistics(NamedTuple):
    """Per anchor and direction, row 0 is x→y and row 1 is y→x: what the weights are functions of."""

    s_pos: Tensor  # (K,) similarity of each pair
    s_neg: Tensor  # (2, K) of the hardest negative; −inf where an anchor has none
    negative: Tensor  # (2, K) int64: its row of y (x→y) or of x (y→x)
    semi: Tensor | None  # (2, K), of the hardest semi-hard negative; −inf where none
    semi_negative: Tensor | None  # (2, K)
    r_neg_lin: Tensor | None  # (2, K)
    r_neg_exp: Tensor | None  # (2, K)


def finish(s_pos: Tensor, x_to_y: Partial, y_to_x: Partial) -> Statistics:
    """Both directions' partials over all candidates → statistics."""

    def mean(total: Tensor, count: Tensor) -> Tensor:
        return total / count.clamp(min=1)  # an empty set has total 0

    def both(name: str) -> Tensor | None:
        parts = getattr(x_to_y, name), getattr(y_to_x, name)
        return None if parts[0] is None else torch.stack(parts)

    lin, lin_count, exp, exp_count = both("lin_sum"), both("lin_count"), both("exp_sum"), both("exp_count")
    return Statistics(
        s_pos=s_pos,
        s_neg=torch.stack((x_to_y.s_neg, y_to_x.s_neg)),
        negative=torch.stack((x_to_y.negative, y_to_x.negative)),
        semi=both("semi"),
        semi_negative=both("semi_negative"),
        r_neg_lin=None if lin is None or lin_count is None else mean(lin, lin_count),
        r_neg_exp=None if exp is None or exp_count is None else mean(exp, exp_count),
    )


def r_pos_lin(s_pos: Tensor, s_neg: Tensor) -> Tensor:
    """R⁺ = mean (s⁺ᵢ − s⁺ₖ) over k ≠ i with s⁺ₖ ≤ s⁻ᵢ + 0.1, zeros left out: (K,), (2, K) → (2, K).

    From sorted prefix sums: O(K log K).
    """
    ordered = s_pos.double().sort().values
    prefix = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)))
    valid = torch.searchsorted(ordered, (s_neg.double() + BAND), right=True)  # (2, K), how many k lie below
    own = s_pos.double().expand_as(s_neg).contiguous()
    first, last = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    equal = (valid.clamp(max=last) - first).clamp(min=0)  # zeros: s⁺ₖ = s⁺ᵢ, i itself among them
    total = valid * own - prefix[valid]
    return (total / (valid - equal).clamp(min=1)).to(s_pos.dtype)


def r_pos_exp(s_pos: Tensor, s_neg: Tensor, alpha: float) -> Tensor:
    """R⁺ = mean exp(α(s⁺ᵢ − s⁺ₖ)) over k ≠ i with s⁺ₖ ≤ s⁻ᵢ + 0.1: (K,), (2, K) → (2, K).

    In sorted order the set is [0, rank) ∪ (rank, valid): a prefix, and the difference of two suffixes whose
    first entry is their largest, so nothing cancels; in logarithms nothing overflows. O(K log K).
    """
    z = -alpha * s_pos.double()
    ordered, order = z.sort(descending=True)  # s⁺ ascending
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(z), device=z.device)).expand_as(s_neg)
    end = z.new_full((1,), -torch.inf)
    prefix = torch.cat((end, ordered.logcumsumexp(0)))
    suffix = torch.cat((ordered.flip(0).logcumsumexp(0).flip(0), end))
    reach = torch.minimum(s_neg.double() + BAND, s_pos.double() + _UNDERFLOW / alpha)
    valid = torch.searchsorted(s_pos.double()[order], reach, right=True)  # (2, K), how many k lie below
    after = suffix[(rank + 1).clamp(max=len(z))]
    rest = suffix[torch.maximum(valid, rank + 1)]
    # logsumexp(before, after − rest), each relative to own
    total = torch.exp(prefix[torch.minimum(rank, valid)] - z) + torch.exp(after - z) * -torch.expm1(
        torch.where(after == rest, 0, rest - after)
    )
    return (total / (valid - (rank < valid).long()).clamp(min=1)).to(s_pos.dtype)
