"""T · P± of a small batch in a single launch, because there the launches of plain tensor functions dominate the time.

The terms are lowered (lower.py), and R⁺ is computed from its definition. A single program walks over all anchors, so
that the value is summed in a fixed order. Larger batches, and terms that do not lower, are weighed by `goal.engine`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from goal.kernels.bits import SQUARE, lost, wide


class Relative(NamedTuple):
    """The relative similarities of some anchors, in the order of the terms' arguments; None if no term reads them."""

    r_pos_lin: Any
    r_neg_lin: Any
    r_pos_exp: Any
    r_neg_exp: Any


@triton.jit
def equation(weights, share, met):
    """Pull and push of triplets: share · T · P⁺, which is −G at the pairs, and share · T · P⁻; 0 where not `met`.

    weights: T, P⁺ and P⁻. Kernels multiply them nowhere else.
    """
    t, p_pos, p_neg = weights
    selected = tl.where(met, share * t, 0.0)
    return selected * p_pos, selected * p_neg


@triton.jit
def _positives(
    s_pos, own, anchor, reach, alpha, K,
    LIN: tl.constexpr, EXP: tl.constexpr, ANCHORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(A,) mean s⁺ᵢ − s⁺ₖ and mean exp(α(s⁺ᵢ − s⁺ₖ)) over the k ≠ i with s⁺ₖ ≤ reach."""
    lin, lin_count = tl.zeros([ANCHORS], tl.float32), tl.zeros([ANCHORS], tl.float32)
    exp, exp_count = tl.zeros([ANCHORS], tl.float32), tl.zeros([ANCHORS], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        other = tl.load(s_pos + k, mask=k < K, other=float("inf"))[None, :]
        gap = own[:, None] - other
        valid = (other <= reach[:, None]) & (k < K)[None, :]
        if LIN:
            some = valid & (gap != 0)
            lin += tl.sum(tl.where(some, gap, 0.0), 1)
            lin_count += tl.sum(tl.where(some, 1.0, 0.0), 1)
        if EXP:  # for exponents below −745 an entry is 0 in float64, and left out
            some = valid & (k[None, :] != anchor[:, None]) & (alpha * gap > -745.13)
            exp += tl.sum(tl.where(some, tl.exp(alpha * gap), 0.0), 1)
            exp_count += tl.sum(tl.where(some, 1.0, 0.0), 1)
    return lin / tl.maximum(lin_count, 1.0), exp / tl.maximum(exp_count, 1.0)


@triton.jit
def weigh(
    statistics, selected, weight, mined, value, K, scale, alpha, numbers,
    WEIGHTS: tl.constexpr, VALUE: tl.constexpr, R_POS_LIN: tl.constexpr, R_POS_EXP: tl.constexpr,
    ANCHORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mined.pull and mined.push (2, K): the entries of G at the pairs and at the negatives; value (1,): their loss.

    statistics: `goal.engine.Statistics`, with R⁻ if the terms read it. selected (2, K): similarities of the selected
    negatives. weight (K,), or None and `scale`: the weight of an anchor.
    """
    loss = tl.zeros([ANCHORS], tl.float32)
    for start in range(0, 2 * K, ANCHORS):
        place = start + tl.arange(0, ANCHORS)
        on = place < 2 * K
        anchor = tl.where(place < K, place, place - K)
        at = wide(0) + place
        own = tl.load(statistics.s_pos + anchor, mask=on, other=0)
        hardest = tl.load(statistics.s_neg + at, mask=on, other=-float("inf"))
        found = tl.load(selected + at, mask=on, other=-float("inf"))
        has = found != -float("inf")
        met = tl.where(has, found, own)  # a stand-in for a missing negative: its share is 0
        share = tl.zeros([ANCHORS], tl.float32) + scale
        if weight is not None:
            share = tl.load(weight + anchor, mask=on, other=0)
        share = tl.where(has, share, 0.0)
        r0, r2 = _positives(
            statistics.s_pos, own, anchor, hardest + 0.1, alpha, K, R_POS_LIN, R_POS_EXP, ANCHORS, BLOCK
        )
        r1, r3 = r0, r2
        if statistics.r_neg_lin is not None:
            r1 = tl.load(statistics.r_neg_lin + at, mask=on, other=0)
        if statistics.r_neg_exp is not None:
            r3 = tl.load(statistics.r_neg_exp + at, mask=on, other=0)
        weights = WEIGHTS(own, met, r0, r1, r2, r3, *numbers)
        each = VALUE(own, met, r0, r1, r2, r3, *numbers)
        large = (tl.abs(own) > SQUARE) | (tl.abs(met) > SQUARE)
        gone = lost(own, met, weights[1], weights[2]) | (large & ~(tl.abs(each) < float("inf")))
        gone = gone | ~(tl.abs(tl.where(hardest == -float("inf"), own, hardest)) < float("inf"))
        share = tl.where(gone, float("nan"), share)
        pull, push = equation(weights, share, on)
        tl.store(mined.pull + at, -pull, mask=on)
        tl.store(mined.push + at, push, mask=on)
        loss += tl.where(on & (share != 0), share * each, 0.0)
    tl.store(value, tl.sum(loss, 0))
