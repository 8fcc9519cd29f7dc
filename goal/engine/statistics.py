"""The statistics of each anchor, of which the weights are functions, and the request that a miner gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from goal.mining import Softmax

_UNDERFLOW = 745.13  # exp(−z) is exactly 0 in float64 for larger z: such entries are left out of the positive sets
_FEW = 256  # pairs up to which the definition is faster than sorting
BAND = 0.1  # the reach of multi-similarity's valid sets: s ≥ min s⁺ − 0.1 and s⁺ ≤ s⁻ + 0.1


class Request(NamedTuple):
    """The statistics that terms and mining need from S."""

    semi_hard: float | None = None  # the margin of semi-hard mining
    lin: bool = False  # r_neg_lin
    beta: float | None = None  # r_neg_exp
    hardest: bool = True  # the hardest negative; soft mining does without, if its terms do
    softmax: Softmax | None = None  # log Z of soft mining
    shares: bool = False  # Σ q² of soft mining

    @property
    def sums(self) -> bool:
        return self.lin or self.beta is not None

    @property
    def compares(self) -> bool:
        """Whether the reductions have to distinguish equal similarities from close ones."""
        return self.lin or self.semi_hard is not None


class Exps(NamedTuple):
    """The exponentials of a soft mining's hardness, e^{h − shift}, over all of S."""

    values: Tensor  # (N, M); 0 at entries that stand in no sum
    shift: float


class Statistics(NamedTuple):
    """The inputs of the weights, for each anchor and direction; row 0 is x→y, row 1 is y→x."""

    s_pos: Tensor  # (K,) similarity of each pair
    s_neg: Tensor | None  # (2, K) similarity of the hardest negative; −inf if an anchor has none
    negative: Tensor | None  # (2, K) int64, its row in y (x→y) or in x (y→x)
    semi: Tensor | None  # (2, K) similarity of the hardest semi-hard negative; −inf if there is none
    semi_negative: Tensor | None  # (2, K)
    r_neg_lin: Tensor | None  # (2, K)
    r_neg_exp: Tensor | None  # (2, K)
    log_sum: Tensor | None = None  # (2, K) float64, log Z of soft mining; −inf if an anchor has no negative
    own: Tensor | None = None  # (K,) s⁺ in the arithmetic of the tiles, with which soft mining's sums compare
    effective: Tensor | None = None  # (2, K) 1 / Σ q², the effective number of negatives
    exps: Exps | None = None  # of all of S, if they are small enough to be kept for the gradient

    @property
    def hardest(self) -> tuple[Tensor, Tensor]:
        """Similarity and index of the hardest negative, both (2, K); −inf if an anchor has none."""
        assert self.s_neg is not None
        assert self.negative is not None
        return self.s_neg, self.negative

    @property
    def selected(self) -> tuple[Tensor, Tensor]:
        """Similarity and index of the negative that mining selects, both (2, K); −inf if an anchor has none."""
        if self.semi is not None and self.semi_negative is not None:
            return self.semi, self.semi_negative
        return self.hardest


def by_direction(relative: Callable[..., Tensor], statistics: Statistics) -> Tensor:
    """R⁺ (2, A) of s⁺ and s⁻; by ids the positives of the two directions are apart, and 0 for anchors without any."""
    s_pos, (s_neg, _) = statistics.s_pos, statistics.hardest
    if s_pos.dim() == 1:
        return relative(s_pos, s_neg)
    own = s_pos.double().clamp(max=1e300)  # in nobody's set, and finite
    both = torch.cat([relative(own[side], s_neg[side : side + 1]) for side in (0, 1)])
    return torch.where(s_pos == torch.inf, 0, both).to(s_pos.dtype)


def r_pos_lin(s_pos: Tensor, s_neg: Tensor) -> Tensor:
    """R⁺ = mean (s⁺ᵢ − s⁺ₖ) over k ≠ i with s⁺ₖ ≤ s⁻ᵢ + 0.1, zeros left out: (K,), (2, K) → (2, K).

    Computed by the definition for small K, else from sorted prefix sums: O(K log K).
    """
    own, reach = s_pos.double(), s_neg.double() + BAND
    if own.shape[0] <= _FEW:
        differences = own[:, None] - own  # (K, K), zero at k = i
        valid = (own <= reach[..., None]) & (differences != 0)  # (2, K, K)
        return ((differences * valid).sum(-1) / valid.sum(-1).clamp_(min=1)).to(s_pos.dtype)
    ordered = own.sort().values
    prefix = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)))
    valid = torch.searchsorted(ordered, reach, right=True)  # (2, K), number of k with s⁺ₖ within reach
    first, last = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    equal = (torch.minimum(valid, last) - first).clamp(min=0)  # number of zeros: s⁺ₖ = s⁺ᵢ, including k = i
    total = valid * own - prefix[valid]
    return (total / (valid - equal).clamp(min=1)).to(s_pos.dtype)


def r_pos_exp(s_pos: Tensor, s_neg: Tensor, alpha: float) -> Tensor:
    """R⁺ = mean exp(α(s⁺ᵢ − s⁺ₖ)) over k ≠ i with s⁺ₖ ≤ s⁻ᵢ + 0.1: (K,), (2, K) → (2, K).

    Computed by the definition for small K. For larger K in sorted order, where the set is [0, rank) ∪ (rank, valid): a
    prefix, and the difference of two suffixes whose first entry is their largest, so nothing cancels; in logarithms
    nothing overflows. O(K log K). Entries that are exactly 0 in float64 are left out.
    """
    own, reach = s_pos.double(), s_neg.double() + BAND
    k = own.shape[0]
    if k <= _FEW:
        exponents = (alpha * (own[:, None] - own)).fill_diagonal_(-torch.inf)  # (K, K), never k = i
        entries = torch.where(own <= reach[..., None], exponents, -torch.inf).exp_()  # (2, K, K)
        return (entries.sum(-1) / (entries != 0).sum(-1).clamp_(min=1)).to(s_pos.dtype)
    z = -alpha * own
    ordered, order = z.sort(descending=True)  # s⁺ ascending
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(k, device=z.device)).expand_as(s_neg)
    end = z.new_full((1,), -torch.inf)
    prefix = torch.cat((end, ordered.logcumsumexp(0)))
    suffix = torch.cat((ordered.flip(0).logcumsumexp(0).flip(0), end))
    valid = torch.searchsorted(own[order], torch.minimum(reach, own + _UNDERFLOW / alpha), right=True)
    before = prefix[torch.minimum(rank, valid)]
    after, rest = suffix[rank + 1], suffix[torch.maximum(valid, rank + 1)]
    gap = torch.where(after == rest, 0, rest - after)
    total = torch.exp(before - z) - torch.exp(after - z) * torch.expm1(gap)
    return (total / (valid - (rank < valid).long()).clamp(min=1)).to(s_pos.dtype)
