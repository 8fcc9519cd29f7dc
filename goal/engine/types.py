"""The tuples that cross the seams of the engine: pairs, blocks of S, entries of G, gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from goal.terms.product import Product

Gradients = tuple[Tensor | None, Tensor | None]  # at x and at y; None where `needs` says so
Needs = tuple[bool, bool]


def total(*parts: Tensor | None) -> Tensor | None:
    """The sum of those that are there."""
    sum_ = None
    for part in parts:
        sum_ = part if sum_ is None else sum_ if part is None else sum_ + part
    return sum_


class Entries(NamedTuple):
    """Entries of G = ∂l/∂S; repeated ones add."""

    row: Tensor  # (E,) int64
    col: Tensor  # (E,) int64
    value: Tensor  # (E,)


class Mined(NamedTuple):
    """What weighing leaves of mined objectives: entries of G, row 0 of anchors x→y, row 1 of anchors y→x."""

    negative: Tensor  # (2, K) int64: its row in y, or in x
    pull: Tensor  # (2, K) entries at the pairs; both rows add
    push: Tensor  # (2, K) entries at the negatives

    def entries(self) -> Entries:
        """The same, one by one: those at the pairs, then x→y's, then y→x's."""
        anchors = torch.arange(self.negative.shape[1], device=self.negative.device)
        return Entries(
            row=torch.cat((anchors, anchors, self.negative[1])),
            col=torch.cat((anchors, self.negative[0], anchors)),
            value=torch.cat((self.pull.sum(0), self.push.flatten())),
        )


class Pairs(NamedTuple):
    """What leaves the pair stage."""

    s_pos: Tensor  # (K,) similarity of each pair
    bounds: Tensor  # (3,) −min s⁺, max ‖x‖, max ‖y‖, as a backend writes them; (0,) where it needs none beforehand


class Masks(NamedTuple):
    """What makes S[i, j] not a negative, in a block of S: the pair itself, and equal ids."""

    n: int  # rows of the block
    m: int  # its columns
    size: tuple[int, int]  # (N, M) of the batch
    row_offset: int = 0  # index in the batch of the block's first row
    col_offset: int = 0
    ids: Tensor | None = None  # (n,) int64 ids of the block's rows
    y_ids: Tensor | None = None  # (m,) of its columns

    @property
    def pairs(self) -> int:
        """K: rows and columns of the batch below it are anchors."""
        return min(self.size)

    @property
    def whole(self) -> bool:
        """Whether the block is all of S."""
        return (self.n, self.m) == self.size

    @property
    def may_lack(self) -> bool:
        """Whether an anchor could be left without a negative here."""
        return self.ids is not None or min(self.n, self.m) < 2

    def block(self, rows: slice, cols: slice) -> Masks:
        """Those of some rows and columns of a whole batch."""
        ids, y_ids = (None if one is None else one[at] for one, at in ((self.ids, rows), (self.y_ids, cols)))
        n, m = rows.stop - rows.start, cols.stop - cols.start
        return Masks(n, m, self.size, rows.start, cols.start, ids, y_ids)

    def tile(self, rows: slice) -> Masks:
        """Those of some rows of the block, with all of its columns."""
        ids = None if self.ids is None else self.ids[rows]
        return self._replace(n=rows.stop - rows.start, ids=ids, row_offset=self.row_offset + rows.start)

    def anchors(self, side: int) -> slice:
        """Which anchors of the batch the block begins with: its rows (side 0) or its columns (side 1)."""
        offset, size = (self.col_offset, self.m) if side else (self.row_offset, self.n)
        return slice(offset, offset + max(0, min(self.pairs - offset, size)))

    def negatives(self, side: int, device: torch.device) -> Tensor:
        """(A,) how many negatives the anchors of one side have in the block."""
        at = self.anchors(side)
        own, others, offset, m = self.ids, self.y_ids, self.col_offset, self.m
        if side:
            own, others, offset, m = others, own, self.row_offset, self.n
        place = torch.arange(at.start - offset, at.stop - offset, device=device)
        pair = (place >= 0) & (place < m)
        if own is None or others is None:
            return m - pair.long()
        own = own[: at.stop - at.start]
        pair &= own != others[place.clamp(0, m - 1)]  # ids remove it already where they are equal
        return m - _occurrences(own, others) - pair.long()

    def diagonal(self, tile: Tensor) -> Tensor:
        """View of the entries of a tile that are pairs."""
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


class Block(NamedTuple):
    """A block of S, which may be all of it: rows of x and of y, embedded, in the dtype that a backend takes."""

    x: Tensor  # (n, D)
    y: Tensor  # (m, D)
    masks: Masks


class Dense(NamedTuple):
    """Anchors that meet all their negatives, weighed: what makes the entries of G tile by tile."""

    product: Product
    s_pos: Tensor  # (K,)
    bounds: Tensor  # of the batch, as `Pairs` has them
    share: Tensor  # (2, K) what an anchor's negatives weigh; 0 for anchors that do not meet all of them
    relative: dict[str, Tensor]  # the statistics that the terms declared, each (2, K)
    every: bool  # all anchors meet all their negatives, not only some


class Limits(NamedTuple):
    """What the reductions of any block compare with: numbers of the batch."""

    threshold: float  # min s⁺ − 0.1: the similarity from which a negative is valid for the sums
    tie: float  # similarities closer than this are equal (the rounding of one product)


class Plan(NamedTuple):
    """How an implementation would go about a batch, for `goal.explain`."""

    tile: tuple[int, int]  # rows and columns of S that are made at once
    arithmetic: str  # of the products
    held: int  # bytes beyond the inputs and their gradients, at the peak
