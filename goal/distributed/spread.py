"""A rank's part of the global batch, and the mining of that part over blocks of S."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from goal.distributed.exchange import Wire
from goal.engine.backend import Backend
from goal.engine.partials import Partial, finish, merge
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Block, Limits, Masks, Needs, Pairs


class Spread(NamedTuple):
    """This rank's part of the global batch, and the O(N) that it knows of the whole."""

    wire: Wire
    counts: list[int]  # rows of each rank
    settings: Settings
    backend: Backend
    rows: tuple[Tensor, Tensor]  # (n, D) own rows of x and y as they came, which travel
    own: Block  # the own rows, embedded
    masks: Masks  # of the whole batch
    pairs: Pairs  # of all of them
    share: Any  # what each anchor weighs: (K,), (2, K) or a number
    needs: Needs  # of any rank

    def of(self, rank: int) -> slice:
        """A rank's rows in the global batch."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    @property
    def here(self) -> slice:
        return self.of(self.wire.rank)

    @property
    def everything(self) -> slice:
        return slice(0, sum(self.counts))

    @property
    def limits(self) -> Limits:
        """What blocks were reduced by, for merging them."""
        return self.backend.limits(self.own, self.pairs, self.settings.request)

    def block(self, x: Tensor, rows: slice, y: Tensor, cols: slice) -> Block:
        """A block of S, of embedded rows and their places."""
        return Block(x, y, self.masks.block(rows, cols))

    def embed(self, rows: Tensor, like: Tensor) -> Tensor:
        """Rows that came as bytes of `like`'s dtype, embedded."""
        return self.backend.similarity.embed(rows.view(like.dtype).to(self.own.x.dtype))


# ── mine ────────────────────────────────────────────────────────────────────────────────────────────────────────────

Columns = list[Tensor]  # what was reduced for the columns of a block: (m,) or (m, c) each
Meet = Callable[[Block], Columns]  # what a block has for its columns
Join = Callable[[Columns, Columns], Columns]  # of two blocks with the same columns
Walk = Callable[[Meet, Join], Columns]  # meets own x with all of y, block by block, and brings home what was joined
Met = Callable[[Block, Partial | None, Partial], None]  # a block, the own rows' partial before it and with it


def mine(spread: Spread, walk: Walk, met: Met = lambda block, before, merged: None) -> Statistics:
    """The own anchors' statistics: partials of each block, merged, those of its columns where they belong."""
    request, limits = spread.settings.request, spread.limits
    of_rows: list[Partial] = []
    like: list[Partial] = []

    def meet(block: Block) -> Columns:
        rows, cols = spread.backend.mine(block, spread.pairs, request)
        before = of_rows.pop() if of_rows else None
        merged = rows if before is None else merge(before, rows, request, limits)
        met(block, before, merged)
        of_rows.append(merged)
        like[:] = [cols]
        return fields(cols)

    def join(a: Columns, b: Columns) -> Columns:
        return fields(merge(partial(a, like[0]), partial(b, like[0]), request, limits))

    home = walk(meet, join)
    return finish(spread.pairs.s_pos[spread.here], of_rows[0], partial(home, like[0]))


def fields(part: Partial) -> Columns:
    """What of a partial there is."""
    return [one for one in part if one is not None]


def partial(columns: Columns, like: Partial) -> Partial:
    """The partial with these fields."""
    rest = iter(columns)
    every: list[Any] = [None if one is None else next(rest) for one in like]
    return Partial(*every)
