"""What crosses the seams of the engine: pairs, masks, entries of G, gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None]  # at x and at y; None where `needs` says so
Needs = tuple[bool, bool]


def total(*parts: Tensor | None) -> Tensor | None:
    """The sum of those that are there."""
    found = None
    for part in parts:
        found = part if found is None else found if part is None else found + part
    return found


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


class Limits(NamedTuple):
    """What the reductions of any block compare with: numbers of the whole batch."""

    threshold: float  # min s⁺ − 0.1: the similarity from which a negative is valid for the sums
    tie: float  # similarities closer than this are equal (the rounding of one product)


class Plan(NamedTuple):
    """How an implementation would go about a batch, for `goal.explain`."""

    tile: tuple[int, int]  # rows and columns of S that are made at once
    arithmetic: str  # of the products
    held: int  # bytes beyond the inputs and their gradients, at the peak
