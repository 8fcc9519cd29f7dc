"""Exchange by all-gather: all ranks' rows arrive in the background while a rank mines its own block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from goal.distributed.exchange import as_bytes, pack, unpack
from goal.distributed.spread import Columns, Join, Meet, Spread, mine, positives
from goal.engine.partials import finish
from goal.engine.path import emit_blocks
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Block, Coefficients, Gradients, Needs, Pairs


class Gathered:
    """The blocks of S if a rank has all rows: own x with all of y, and for gradients all of x with own y."""

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        needs, wire, (x, y) = spread.needs, spread.wire, spread.rows
        self._y = wire.gather(as_bytes(y), spread.counts)
        dense = spread.settings.mining.dense != "never"  # dense entries at the pairs need all of x and all of y
        self._x = None
        soft = spread.settings.mining.softmax is not None
        later = soft or not spread.settings.mines  # stats may be requested later
        if needs[1] or (dense and needs[0]) or later:
            self._x = wire.gather(as_bytes(x), spread.counts)

    @functools.cached_property
    def y(self) -> Tensor:
        """(N, D) all rows of y, embedded."""
        return self.spread.embed(self._y.wait(), self.spread.rows[1])

    @functools.cached_property
    def x(self) -> Tensor:
        """(N, D) all rows of x; raises if they were not exchanged because no gradient needs them."""
        if self._x is None:
            raise RuntimeError("no gradient of y needs the rows of x, so they were not exchanged.")
        return self.spread.embed(self._x.wait(), self.spread.rows[0])

    @property
    def rows(self) -> Block:
        """Own rows of S, with all columns."""
        spread = self.spread
        return spread.block(spread.own.x, spread.here, self.y, spread.everything)

    @property
    def cols(self) -> Block:
        """Own columns of S, with all rows."""
        spread = self.spread
        return spread.block(self.x, spread.everything, spread.own.y, spread.here)

    def walk(self, meet: Meet, join: Join) -> Columns:
        """Mine the own block while other rows arrive, then the blocks before and after; columns go home in a swap."""
        spread = self.spread
        own, end = spread.here, spread.everything.stop
        here = meet(spread.own)
        parts = [here]
        for cols in (slice(0, own.start), slice(own.stop, end)):
            if cols.start < cols.stop:
                parts.append(meet(spread.block(spread.own.x, own, self.y[cols], cols)))
        in_order = [parts[1], here, *parts[2:]] if own.start else parts
        columns = [torch.cat(column) for column in zip(*in_order, strict=True)]
        height = own.stop - own.start
        came = spread.wire.swap(pack(*columns), spread.counts, [height] * spread.wire.size)
        return functools.reduce(join, (unpack(rows, columns) for rows in came.split(height)))

    def positives(self) -> Pairs:
        """The positives by ids of the own anchors; all ranks call it together."""
        return positives(self.spread, self.walk)

    def statistics(self) -> Statistics:
        """The statistics of the own anchors; all ranks call it together."""
        return mine(self.spread, self.walk)

    def mine(self, settings: Settings) -> Statistics:
        """The same for `Stats` of objectives that mined nothing, from the rows on this rank; nothing is sent."""
        spread = self.spread
        rows, _ = spread.backend.mine(self.rows, spread.pairs, settings.request)
        _, cols = spread.backend.mine(self.cols, spread.pairs, settings.request)
        return finish(spread.pairs.s_pos[..., spread.here], rows, cols)

    def finish(self, coefficients: Coefficients) -> tuple[Tensor | None, Callable[[Tensor | None, Needs], Gradients]]:
        """The own rows' part of the dense value, and the function that emits; backward waits for no exchange."""
        spread, dense = self.spread, coefficients.dense
        value = None if dense is None else spread.backend.dense_value(self.rows, dense.valued)
        if self._x is not None:
            _ = self.x

        def blocks(needs: Needs) -> Iterator[tuple[Block, tuple[bool, bool]]]:
            if needs[0] or dense is not None:
                yield self.rows, (True, False)
            if needs[1] or dense is not None:
                yield self.cols, (False, True)

        def emit(incoming: Tensor | None, needs: Needs) -> Gradients:
            return emit_blocks(spread.backend, blocks(needs), spread.own, coefficients, incoming, needs)

        return value, emit
