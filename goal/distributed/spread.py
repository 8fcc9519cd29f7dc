"""A rank's part of the global batch, and the mining of that part over blocks of S."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from goal.distributed.exchange import Wire
from goal.engine.backend import Backend
from goal.engine.partials import Partial, finish, merge, positives_of
from goal.engine.settings import Settings
from goal.engine.statistics import Request, Statistics
from goal.engine.types import Block, Limits, Masks, Needs, Pairs


class Spread(NamedTuple):
    """This rank's part of the global batch, and its O(N) data of the global batch."""

    wire: Wire
    counts: list[int]  # rows of each rank
    settings: Settings
    backend: Backend
    rows: tuple[Tensor, Tensor]  # (n, D) own rows of x and y in their own dtype, as they are sent
    own: Block  # the own rows, embedded
    masks: Masks  # of the global batch
    pairs: Pairs  # of the global batch
    share: Any  # weight of each anchor: (K,), (2, K) or a number
    needs: Needs  # whether any rank needs a gradient of x, of y

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
        """The limits of the global batch, for merging partials."""
        return self.backend.limits(self.own, self.pairs, self.settings.request)

    def block(self, x: Tensor, rows: slice, y: Tensor, cols: slice) -> Block:
        """A block of S, from embedded rows and their positions."""
        return Block(x, y, self.masks.block(rows, cols))

    def embed(self, rows: Tensor, like: Tensor) -> Tensor:
        """Received bytes as rows of `like`'s dtype, embedded."""
        return self.backend.similarity.embed(rows.view(like.dtype).to(self.own.x.dtype))


# ── mine ────────────────────────────────────────────────────────────────────────────────────────────────────────────

Columns = list[Tensor]  # reductions for the columns of a block: tensors (m,) or (m, c)
Meet = Callable[[Block], Columns]  # reduces a block for its columns
Join = Callable[[Columns, Columns], Columns]  # joins the reductions of two blocks with the same columns
Walk = Callable[[Meet, Join], Columns]  # meets own x with all of y, block by block; returns the own columns, joined
Met = Callable[[Block, Partial | None, Partial], None]  # a block, the own rows' partial before it and after it


def positives(spread: Spread, walk: Walk) -> Pairs:
    """The positives by ids of the own anchors, in the same way."""
    rule, nowhere = spread.settings.positives, Limits(0.0, 0.0)
    request = Request(softmax=rule.softmax)
    of_rows: list[Partial] = []
    like: list[Partial] = []

    def meet(block: Block) -> Columns:
        rows, cols = spread.backend.positives(block, rule)
        of_rows[:] = [merge(of_rows[0], rows, request, nowhere) if of_rows else rows]
        like[:] = [cols]
        return fields(cols)

    def join(a: Columns, b: Columns) -> Columns:
        return fields(merge(partial(a, like[0]), partial(b, like[0]), request, nowhere))

    def count(side: int) -> Tensor:
        here, everything = spread.here, spread.everything
        return spread.masks.block(*((everything, here) if side else (here, everything))).positives(side)

    home = walk(meet, join)
    return positives_of(rule, count, of_rows[0], partial(home, like[0]))


def mine(spread: Spread, walk: Walk, met: Met = lambda block, before, merged: None) -> Statistics:
    """The statistics of the own anchors: partials of all blocks are merged, those of columns at their owners."""
    request, limits, back = spread.settings.request, spread.limits.of(0), spread.limits.of(1)
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
        return fields(merge(partial(a, like[0]), partial(b, like[0]), request, back))

    home = walk(meet, join)
    return finish(spread.pairs.s_pos[..., spread.here], of_rows[0], partial(home, like[0]))


def fields(part: Partial) -> Columns:
    """The fields of a partial that are not None."""
    return [one for one in part if one is not None]


def partial(columns: Columns, like: Partial) -> Partial:
    """The inverse of `fields`; `like` says which fields there are."""
    rest = iter(columns)
    every: list[Any] = [None if one is None else next(rest) for one in like]
    return Partial(*every)
