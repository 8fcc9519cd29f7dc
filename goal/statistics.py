"""What leaves the mining stage: partial reductions of S that merge, and the statistics they finish into."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_UNDERFLOW = 745.13  # exp(−z) is exactly 0 in float64 beyond: such entries are left out of the positive sets
_FEW = 256  # pairs up to which the definition is quicker than sorting
BAND = 0.1  # the reach of multi-similarity's valid sets: s ≥ min s⁺ − 0.1 and s⁺ ≤ s⁻ + 0.1


class Pairs(NamedTuple):
    """What leaves the pair stage."""

    s_pos: Tensor  # (K,) similarity of each pair
    bounds: Tensor  # (3,) for kernels: min s⁺, max ‖x‖ and max ‖y‖, as they write them; (0,) for the reference


class Masks(NamedTuple):
    """What makes S[i, j] not a negative: the pair itself, and equal ids."""

    ids: Tensor | None  # (n,) ids of the rows of this block: codes in the tiles' dtype, or int64 for kernels
    y_ids: Tensor | None  # (m,) of its columns
    row_offset: int  # global index of the block's first row
    col_offset: int
    pairs: int  # K: rows and columns below it are anchors

    def may_lack(self, n: int, m: int) -> bool:
        """Whether an anchor of an (n, m) block could be left without a negative."""
        return self.ids is not None or min(n, m) < 2

    def anchors(self, side: int, size: int) -> int:
        """How many of the block's first rows (side 0) or columns (side 1), of which there are `size`, are anchors."""
        return max(0, min(self.pairs - (self.col_offset if side else self.row_offset), size))

    def negatives(self, side: int, n: int, m: int, device: torch.device) -> Tensor:
        """(A,) how many negatives the anchors of one side of an (n, m) block have in it."""
        own, others, first, offset = self.ids, self.y_ids, self.row_offset, self.col_offset
        if side:
            own, others, first, offset, n, m = others, own, offset, first, m, n
        anchors = self.anchors(side, n)
        place = torch.arange(first - offset, first - offset + anchors, device=device)
        pair = (place >= 0) & (place < m)
        if own is None or others is None:
            return m - pair.long()
        pair &= own[:anchors] != others[place.clamp(0, m - 1)]  # ids remove it already where they are equal
        return m - _occurrences(own[:anchors], others) - pair.long()

    def rows(self, rows: slice) -> Masks:
        ids = None if self.ids is None else self.ids[rows]
        return self._replace(ids=ids, row_offset=self.row_offset + rows.start)

    def diagonal(self, tile: Tensor) -> Tensor:
        """View of the entries of a tile that are pairs."""
        first = max(self.row_offset, self.col_offset)
        last = min(self.row_offset + tile.shape[0], self.col_offset + tile.shape[1], self.pairs)
        i, j = first - self.row_offset, first - self.col_offset
        size = max(0, last - first)
        return tile[i : i + size, j : j + size].diagonal() if size else tile[:0, :0].diagonal()

    def differ(self, tile: Tensor) -> Tensor | None:
        """The indicator of "ids differ" in the tile's shape and dtype; None without ids."""
        if self.ids is None or self.y_ids is None:
            return None
        return torch.ne(self.ids[:, None], self.y_ids, out=torch.empty_like(tile))

    def hide(self, tile: Tensor) -> Tensor:
        """The tile with −inf wherever an entry is not a negative, in place."""
        self.diagonal(tile).fill_(-torch.inf)
        differ = self.differ(tile)
        # the log of the indicator is 0 or −inf: streaming passes, several times faster than a masked fill
        return tile if differ is None else tile.add_(differ.log_())

    def live(self, tile: Tensor) -> Tensor:
        """1 where an entry is a negative, else 0, in the tile's shape and dtype."""
        differ = self.differ(tile)
        live = torch.ones_like(tile) if differ is None else differ
        self.diagonal(live).zero_()
        return live


def _occurrences(of: Tensor, among: Tensor) -> Tensor:
    ordered = among.sort().values
    return torch.searchsorted(ordered, of, right=True) - torch.searchsorted(ordered, of)


class Request(NamedTuple):
    """What the chosen terms and mining need from S; the hardest negative is always found."""

    semi_hard: float | None = None  # the margin of semi-hard mining
    lin: bool = False  # r_neg_lin
    beta: float | None = None  # r_neg_exp

    @property
    def sums(self) -> bool:
        return self.lin or self.beta is not None

    @property
    def compares(self) -> bool:
        """Whether equal similarities have to be told from close ones."""
        return self.lin or self.semi_hard is not None


class Limits(NamedTuple):
    """What the reductions of any block compare with: numbers of the whole batch."""

    threshold: float  # min s⁺ − 0.1: the similarity from which a negative is valid for the sums
    tie: float  # similarities closer than this are equal (the rounding of one product)


class Plan(NamedTuple):
    """How an implementation would go about a batch, for `goal.explain`."""

    tile: tuple[int, int]  # rows and columns of S that are made at once
    arithmetic: str  # of the products
    held: int  # bytes beyond the inputs and their gradients, at the peak


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


def merge(a: Partial, b: Partial, request: Request, threshold: float, tie: float) -> Partial:
    """The partial over both sets of candidates: associative, and commutative but for the order of summing.

    Args:
        a, b: partials of the same anchors over disjoint candidates.
        request: what both were asked for.
        threshold: min s⁺ − 0.1.
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
    if not request.sums:
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


def finish(s_pos: Tensor, *directions: Partial) -> Statistics:
    """The partials over all candidates, x→y and y→x (or one that holds both as its rows) → statistics."""
    part = directions[0]
    if len(directions) == 2:
        columns: list[Any] = [
            None if a is None or b is None else torch.stack((a, b)) for a, b in zip(*directions, strict=True)
        ]
        part = Partial(*columns)

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
    )


def r_pos_lin(s_pos: Tensor, s_neg: Tensor) -> Tensor:
    """R⁺ = mean (s⁺ᵢ − s⁺ₖ) over k ≠ i with s⁺ₖ ≤ s⁻ᵢ + 0.1, zeros left out: (K,), (2, K) → (2, K).

    By the definition for small K, else from sorted prefix sums: O(K log K).
    """
    own, reach = s_pos.double(), s_neg.double() + BAND
    if own.shape[0] <= _FEW:
        differences = own[:, None] - own  # (K, K), zero at k = i
        valid = (own <= reach[..., None]) & (differences != 0)  # (2, K, K)
        return ((differences * valid).sum(-1) / valid.sum(-1).clamp_(min=1)).to(s_pos.dtype)
    ordered = own.sort().values
    prefix = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)))
    valid = torch.searchsorted(ordered, reach, right=True)  # (2, K), how many k lie below
    first, last = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    equal = (torch.minimum(valid, last) - first).clamp(min=0)  # zeros: s⁺ₖ = s⁺ᵢ, i itself among them
    total = valid * own - prefix[valid]
    return (total / (valid - equal).clamp(min=1)).to(s_pos.dtype)


def r_pos_exp(s_pos: Tensor, s_neg: Tensor, alpha: float) -> Tensor:
    """R⁺ = mean exp(α(s⁺ᵢ − s⁺ₖ)) over k ≠ i with s⁺ₖ ≤ s⁻ᵢ + 0.1: (K,), (2, K) → (2, K).

    By the definition for small K. Else in sorted order, where the set is [0, rank) ∪ (rank, valid): a prefix, and the
    difference of two suffixes whose first entry is their largest, so nothing cancels; in logarithms nothing overflows.
    O(K log K). Entries that are exactly 0 in float64 are left out.
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
