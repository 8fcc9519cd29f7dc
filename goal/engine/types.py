"""The tuples that cross the seams of the engine: pairs, blocks of S, entries of G, gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from goal.engine.statistics import Exps
from goal.mining import Softmax
from goal.terms.product import Product

Gradients = tuple[Tensor | None, Tensor | None]  # at x and at y; None where `needs` says so
Needs = tuple[bool, bool]


def total(*parts: Tensor | None) -> Tensor | None:
    """The sum of the parts that are not None; None if all are."""
    sum_ = None
    for part in parts:
        sum_ = part if sum_ is None else sum_ if part is None else sum_ + part
    return sum_


def of_side(s_pos: Tensor, side: int) -> Tensor:
    """s⁺ of the anchors of a side: the pairs' are those of both."""
    return s_pos if s_pos.dim() == 1 else s_pos[side]


class Entries(NamedTuple):
    """Entries of G = ∂l/∂S; repeated entries add."""

    row: Tensor  # (E,) int64
    col: Tensor  # (E,) int64
    value: Tensor  # (E,)


class Mined(NamedTuple):
    """Entries of G of mined objectives, from weighing; row 0 has the anchors of x→y, row 1 those of y→x."""

    negative: Tensor  # (2, K) int64, row of the negative in y (x→y) or in x (y→x); or of a positive
    pull: Tensor | None  # (2, K) entries at the pairs; both rows add
    push: Tensor  # (2, K) entries at the negatives

    def entries(self, size: tuple[int, int]) -> Entries:
        """The same as a list of entries: at the pairs, at the negatives of x→y, at the negatives of y→x.

        size: (N, M), which are the numbers of anchors where there are no pairs.
        """
        if self.pull is None:
            rows, cols = (torch.arange(count, device=self.negative.device) for count in size)
            return Entries(
                row=torch.cat((rows, self.negative[1, : size[1]])),
                col=torch.cat((self.negative[0, : size[0]], cols)),
                value=torch.cat((self.push[0, : size[0]], self.push[1, : size[1]])),
            )
        anchors = torch.arange(self.negative.shape[1], device=self.negative.device)
        return Entries(
            row=torch.cat((anchors, anchors, self.negative[1])),
            col=torch.cat((anchors, self.negative[0], anchors)),
            value=torch.cat((self.pull.sum(0), self.push.flatten())),
        )


class Pairs(NamedTuple):
    """Result of the pair stage, or of looking for positives by ids."""

    s_pos: Tensor  # (K,) similarity of each pair; by ids (2, A) s̃⁺, +inf if an anchor has no positive
    bounds: Tensor  # (3,) −min s⁺, max ‖x‖, max ‖y‖, in the backend's format; (0,) if it needs none beforehand
    hardest: Tensor | None = None  # (2, A) int64, row of the hardest positive by ids
    log_sum: Tensor | None = None  # (2, A) float64, log Z⁺ of soft positives
    exact: Tensor | None = None  # (2, A) float64, their s̃⁺

    def of(self, side: int) -> Tensor:
        """s⁺ of the anchors of a side, which is 0 for x→y."""
        return of_side(self.s_pos, side)


class Masks(NamedTuple):
    """Says which entries of a block of S are negatives, positives, or neither."""

    n: int  # rows of the block
    m: int  # columns of the block
    size: tuple[int, int]  # (N, M) of the batch
    row_offset: int = 0  # index in the batch of the block's first row
    col_offset: int = 0
    ids: Tensor | None = None  # (n,) int64 ids of the block's rows
    y_ids: Tensor | None = None  # (m,) int64 ids of the block's columns
    by_ids: bool = False  # positives are the rows with equal ids, and all rows are anchors; else row k is row k's
    one_set: bool = False  # x and y are the same rows: entry (k, k) is neither a positive nor a negative

    @property
    def pairs(self) -> int:
        """K: the first K rows and columns of the batch are anchors; by ids the larger number of anchors of a side."""
        return max(self.size) if self.by_ids else min(self.size)

    @property
    def whole(self) -> bool:
        """Whether the block is all of S."""
        return (self.n, self.m) == self.size

    @property
    def may_lack(self) -> bool:
        """Whether an anchor may have no negative in the block."""
        return self.ids is not None or self.by_ids or min(self.n, self.m) < 2

    def block(self, rows: slice, cols: slice) -> Masks:
        """The masks of some rows and columns of a whole batch."""
        ids, y_ids = (None if one is None else one[at] for one, at in ((self.ids, rows), (self.y_ids, cols)))
        n, m = rows.stop - rows.start, cols.stop - cols.start
        return self._replace(n=n, m=m, row_offset=rows.start, col_offset=cols.start, ids=ids, y_ids=y_ids)

    def tile(self, rows: slice) -> Masks:
        """The masks of some rows of the block, with all of its columns."""
        ids = None if self.ids is None else self.ids[rows]
        return self._replace(n=rows.stop - rows.start, ids=ids, row_offset=self.row_offset + rows.start)

    def anchors(self, side: int) -> slice:
        """The anchors of the batch among the block's rows (side 0) or columns (side 1); they come first."""
        offset, size = (self.col_offset, self.m) if side else (self.row_offset, self.n)
        return slice(offset, offset + max(0, min(self.pairs - offset, size)))

    def positives(self, side: int) -> Tensor:
        """(A,) number of positives by ids in the block for each anchor of a side."""
        assert self.ids is not None
        assert self.y_ids is not None
        count = _occurrences(self.y_ids, self.ids) if side else _occurrences(self.ids, self.y_ids)
        if not self.one_set:
            return count
        at, offset, m = self.anchors(side), self.row_offset if side else self.col_offset, self.n if side else self.m
        place = torch.arange(at.start - offset, at.stop - offset, device=count.device)
        return count - ((place >= 0) & (place < m)).long()

    def negatives(self, side: int, device: torch.device) -> Tensor:
        """(A,) number of negatives in the block for each anchor of a side."""
        at = self.anchors(side)
        own, others, offset, m = self.ids, self.y_ids, self.col_offset, self.m
        if side:
            own, others, offset, m = others, own, self.row_offset, self.n
        if self.by_ids and own is not None and others is not None:
            return m - _occurrences(own, others)
        place = torch.arange(at.start - offset, at.stop - offset, device=device)
        pair = (place >= 0) & (place < m)
        if own is None or others is None:
            return m - pair.long()
        own = own[: at.stop - at.start]
        pair &= own != others[place.clamp(0, m - 1)]  # equal ids already exclude the pair
        return m - _occurrences(own, others) - pair.long()

    def diagonal(self, tile: Tensor) -> Tensor:
        """View of a tile's pairs; by ids of the rows of one set with themselves, and empty for two sets."""
        if self.by_ids and not self.one_set:
            return tile[:0, :0].diagonal()
        first = max(self.row_offset, self.col_offset)
        last = min(self.row_offset + self.n, self.col_offset + self.m, self.pairs)
        i, j = first - self.row_offset, first - self.col_offset
        size = max(0, last - first)
        return tile[i : i + size, j : j + size].diagonal() if size else tile[:0, :0].diagonal()

    def differ(self, tile: Tensor) -> Tensor | None:
        """The indicator of "ids differ" in the tile's shape and dtype; None without ids."""
        if self.ids is None or self.y_ids is None:
            return None
        return torch.ne(self.ids[:, None], self.y_ids, out=torch.empty_like(tile))

    def equal(self, tile: Tensor) -> Tensor:
        """The indicator of positives by ids, in the tile's shape and dtype."""
        assert self.ids is not None
        assert self.y_ids is not None
        equal = torch.eq(self.ids[:, None], self.y_ids, out=torch.empty_like(tile))
        self.diagonal(equal).zero_()
        return equal

    def hide(self, tile: Tensor, over: str = "negatives") -> Tensor:
        """The tile with −inf at entries that are no negatives, no positives, or no candidates, in place."""
        if over == "candidates" and not self.by_ids:
            of_pairs = self.diagonal(tile).clone()
            tile = self.hide(tile)
            self.diagonal(tile).copy_(of_pairs)
            return tile
        self.diagonal(tile).fill_(-torch.inf)
        if over == "candidates":
            return tile
        if over == "positives":
            return tile.add_(self.equal(tile).log_())
        differ = self.differ(tile)
        # the log of the indicator is 0 or −inf: its streaming passes are several times faster than a masked fill
        return tile if differ is None else tile.add_(differ.log_())

    def live(self, tile: Tensor) -> Tensor:
        """1 where an entry is a negative, else 0, in the tile's shape and dtype."""
        differ = self.differ(tile)
        live = torch.ones_like(tile) if differ is None else differ
        self.diagonal(live).zero_()
        return live


def _occurrences(of: Tensor, among: Tensor) -> Tensor:
    ordered, of = among.sort().values, of.contiguous()
    return torch.searchsorted(ordered, of, right=True) - torch.searchsorted(ordered, of)


class Block(NamedTuple):
    """A block of S, which may be all of it: rows of x and of y, embedded, in the dtype that a backend takes."""

    x: Tensor  # (n, D)
    y: Tensor  # (m, D)
    masks: Masks


class Once(NamedTuple):
    """How anchors that use all their negatives pull their positive once."""

    share: Tensor  # (2, K) of the pulls of all triplets: 1 / number of negatives, or 1 if those are averaged
    lone: Tensor  # (2, K) the pull of anchors without negatives
    at: Tensor | None  # (K,) in the place of s⁺ in the value of a negative, if the loss is a sum


class Dense(NamedTuple):
    """Weighed anchors that use all their negatives; from these the entries of G are computed tile by tile."""

    product: Product
    s_pos: Tensor  # (K,)
    bounds: Tensor  # of the batch, as in `Pairs`
    share: Tensor  # (2, K) weight of each negative of an anchor; 0 for anchors that do not use all of theirs
    relative: dict[str, Tensor]  # the statistics that the terms declared: name → (2, K)
    every: bool  # whether all anchors use all their negatives
    once: Once | None = None  # if a positive is pulled once
    apart: bool = False  # whether the pulls are without P⁺, which is taken at each positive

    @property
    def valued(self) -> Dense:
        """The anchors as the value of their negatives sees them."""
        return self if self.once is None or self.once.at is None else self._replace(s_pos=self.once.at)

    def times(self, incoming: Tensor) -> Dense:
        """The anchors of the objective times a number."""
        once = None if self.once is None else self.once._replace(lone=self.once.lone * incoming)
        return self._replace(share=self.share * incoming, once=once)

    def at_pairs(self, taken: Tensor) -> Tensor:
        """(2, K) entries of G at the pairs, from the pulls of all triplets."""
        if self.once is None:
            return -taken
        return -(taken * self.once.share + self.once.lone)


class Soft(NamedTuple):
    """Weighed anchors whose push is shared among their negatives by a softmax; row 0 is x→y, row 1 is y→x."""

    softmax: Softmax
    log_sum: Tensor  # (2, K) log Z
    pull: Tensor | None  # (2, K) entries of G at the pairs, besides the pairs' own shares; both rows add
    push: Tensor  # (2, K) of all negatives together; without P⁻ where that is taken at each negative
    s_pos: Tensor  # (K,)
    relative: dict[str, Tensor]  # the statistics that the terms declared: name → (2, K)
    product: Product | None  # if P⁻ is taken at each negative
    exps: Exps | None  # if they were kept

    def times(self, incoming: Tensor) -> Soft:
        """The anchors of the objective times a number."""
        pull = None if self.pull is None else self.pull * incoming
        return self._replace(pull=pull, push=self.push * incoming)


class Positive(NamedTuple):
    """The pulls of anchors whose positives are found by ids, besides those of dense anchors."""

    pull: Tensor  # (2, A) entries of G, of all of an anchor's positives together
    hardest: Tensor | None  # (2, A) int64, row of the hardest positive, which takes the pull
    soft: Soft | None  # the positives share the pull; its `push` is left to `entries`

    def entries(self, pull: Tensor) -> Mined | Soft:
        """Pulls as entries of G at the positives."""
        if self.soft is not None:
            return self.soft._replace(push=pull)
        assert self.hardest is not None
        return Mined(self.hardest, None, pull)


class Coefficients(NamedTuple):
    """The entries of G, by the ways in which anchors share their push; None where no anchor does so."""

    mined: Mined | None = None
    dense: Dense | None = None
    soft: Soft | None = None
    positives: Positive | None = None


class Limits(NamedTuple):
    """Thresholds of the batch, the same for the reductions of every block."""

    threshold: float  # min s⁺ − 0.1: the similarity from which a negative is valid for the sums
    tie: float  # similarities closer than this count as equal (the rounding of a product)
    back: float | None = None  # the threshold of y→x, if it is another

    def of(self, side: int) -> Limits:
        """The limits of the anchors of a side."""
        return self if self.back is None or not side else Limits(self.back, self.tie)


class Plan(NamedTuple):
    """How an implementation computes a batch, for `goal.explain`."""

    tile: tuple[int, int]  # rows and columns of S that are computed at once
    arithmetic: str  # of the products
    held: int  # bytes at the peak, beyond the inputs and their gradients
    kept: bool = False  # whether exponentials of all of S are kept for the gradient
