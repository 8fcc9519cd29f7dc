"""Exchange by ring: the blocks pass from rank to rank, and at most two blocks of other ranks are in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from goal.distributed.exchange import as_bytes, pack, unpack
from goal.distributed.spread import Columns, Join, Meet, Spread, mine, positives
from goal.engine.partials import Partial
from goal.engine.path import at_pairs, entries_emit
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Block, Coefficients, Dense, Entries, Gradients, Mined, Needs, Pairs, Soft, total


class Ring:
    """Blocks of y go round the ring, followed by the reductions for their rows; at most two of other ranks are here.

    The next block arrives while the current block is processed. Gradients are emitted in forward, because in backward
    the rows of other ranks are gone; backward only multiplies.
    """

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        keeps = any(spread.needs) and spread.settings.mining.picks
        self._won = torch.empty_like(spread.own.x) if keeps else None  # (n, D) rows of the own x's negatives

    def walk(self, meet: Meet, join: Join) -> Columns:
        """Call `meet` for all blocks of y with the own x; return all ranks' reductions for the own block, joined."""
        spread, wire = self.spread, self.spread.wire
        like: Columns = []
        block, behind = as_bytes(spread.rows[1]), None
        for step in range(wire.size):
            owner, following = (wire.rank - step) % wire.size, (wire.rank - step - 1) % wire.size
            coming = wire.shift(block, spread.counts[following]) if step < wire.size - 1 else None
            y = spread.embed(block, spread.rows[1])
            like = meet(spread.block(spread.own.x, spread.here, y, spread.of(owner)))
            joined = like if behind is None else join(unpack(behind.wait(), like), like)
            behind = wire.shift(pack(*joined) if joined else block[:, :0], spread.counts[following])
            if coming is not None:
                block = coming.wait()
        assert behind is not None
        return unpack(behind.wait(), like)

    def positives(self) -> Pairs:
        """The positives by ids of the own anchors; all ranks call it together."""
        return positives(self.spread, self.walk)

    def statistics(self) -> Statistics:
        """The statistics of the own anchors; all ranks call it together."""
        return mine(self.spread, self.walk, self._keep)

    def mine(self, settings: Settings) -> Statistics:
        """Raises: `Stats` of an objective that mined nothing would need another round."""
        raise RuntimeError(
            "stats want the hardest negatives, and soft mining's shares, which a ring has not looked for (it would "
            "take one more round, on all ranks): use exchange='gather', or goal.gradients, which looks for them."
        )

    def _keep(self, block: Block, before: Partial | None, merged: Partial) -> None:
        """Store the rows of the mined negatives so far."""
        if self._won is None:
            return
        index = _negative(merged)
        new = torch.ones_like(index, dtype=torch.bool) if before is None else index != _negative(before)
        self._won[new] = block.y[index[new] - block.masks.col_offset]

    def finish(self, coefficients: Coefficients) -> tuple[Tensor | None, Callable[[Tensor | None, Needs], Gradients]]:
        """The own rows' part of the dense value, and the function that emits."""
        mined, dense, soft, of_positives = coefficients
        value, gx, gy = None, None, None
        if mined is not None and any(self.spread.needs):
            gx, gy = self._mined(mined)
        if dense is not None:
            value, (dense_x, dense_y) = self._dense(dense)
            gx, gy = total(gx, dense_x), total(gy, dense_y)
        rounds: list[Mined | Soft] = [] if soft is None else [soft]
        if of_positives is not None:
            rounds.append(of_positives.entries(of_positives.pull))
        for part in rounds if any(self.spread.needs) else []:
            soft_x, soft_y = self._round(part)
            gx, gy = total(gx, soft_x), total(gy, soft_y)

        def emit(incoming: Tensor | None, needs: Needs) -> Gradients:
            wanted = [one if needed else None for one, needed in zip((gx, gy), needs, strict=True)]
            times = [None if one is None else one.clone() if incoming is None else one * incoming for one in wanted]
            return times[0], times[1]

        return value, emit

    def _mined(self, mined: Mined) -> Gradients:
        """The owner of an anchor has the row of its negative, and sends the gradient of this row to the row's owner."""
        spread, (negative, pull, push) = self.spread, mined
        vjp, here, needs = spread.backend.similarity.vjp, spread.here, spread.needs
        x, y = spread.own.x.to(push.dtype), spread.own.y.to(push.dtype)
        k = torch.arange(len(x), device=x.device)
        forth, back = _Routes(spread, negative[0]), _Routes(spread, negative[1])
        won = spread.embed(back.fetch(as_bytes(spread.rows[0])), spread.rows[0]).to(push.dtype)
        assert self._won is not None
        gx, to_y = vjp(x, self._won.to(push.dtype), Entries(k, k, push[0, here]), needs)
        to_x, gy = vjp(won, y, Entries(k, k, push[1, here]), needs)
        pair_x, pair_y = None, None
        if pull is not None:
            pair_x, pair_y = at_pairs(spread.backend.similarity, spread.own, pull.sum(0), needs)
        from_y = None if to_x is None else back.deliver(to_x)
        from_x = None if to_y is None else forth.deliver(to_y)
        return total(gx, pair_x, from_y), total(gy, pair_y, from_x)

    def _dense(self, dense: Dense) -> tuple[Tensor, Gradients]:
        """A separate round for the value, and for the gradients if any rank needs them."""
        spread, needs = self.spread, self.spread.needs
        value, taken, here = dense.s_pos.new_zeros(()), torch.zeros_like(dense.share), spread.here
        gradients: list[Tensor | None] = [None]

        def meet(block: Block) -> Columns:
            value.add_(spread.backend.dense_value(block, dense.valued))
            if not any(needs):
                return []
            at_x, at_y, pull = spread.backend.dense_block(block, dense, needs)
            gradients[0] = total(gradients[0], at_x)
            taken[0].add_(pull[0])
            return [pull[1, block.masks.anchors(1)], *([] if at_y is None else [at_y])]

        home = self.walk(meet, _added)
        if not any(needs):
            return value, (None, None)
        taken[1, here] = home[0]
        pair_x, pair_y = at_pairs(spread.backend.similarity, spread.own, dense.at_pairs(taken).sum(0), needs)
        return value, (total(gradients[0], pair_x), total(home[1] if needs[1] else None, pair_y))

    def _round(self, part: Mined | Soft) -> Gradients:
        """A separate round for gradients: log-sums and positives are known when all blocks were met."""
        spread, needs = self.spread, self.spread.needs
        gradients: list[Tensor | None] = [None]

        def meet(block: Block) -> Columns:
            at_x, at_y = entries_emit(spread.backend, block, part, None, needs)
            gradients[0] = total(gradients[0], at_x)
            return [] if at_y is None else [at_y]

        home = self.walk(meet, _added)
        return gradients[0], home[0] if needs[1] else None


def _added(a: Columns, b: Columns) -> Columns:
    return [one + other for one, other in zip(a, b, strict=True)]


def _negative(part: Partial) -> Tensor:
    index = part.negative if part.semi_negative is None else part.semi_negative
    assert index is not None
    return index


class _Routes:
    """Exchange between anchors and their negatives' owners; a row that a rank's anchors share is sent to it once."""

    def __init__(self, spread: Spread, negative: Tensor) -> None:
        own = spread.here
        self.spread = spread
        self.rows, self.inverse = torch.unique(negative[own], return_inverse=True)  # ascending: by owner
        ends = torch.tensor(list(itertools.accumulate(spread.counts)), device=negative.device)
        self.theirs = torch.bincount(torch.bucketize(self.rows, ends, right=True), minlength=len(ends)).tolist()
        mine = [one[(one >= own.start) & (one < own.stop)].unique() for one in negative.split(spread.counts)]
        self.ours = [len(one) for one in mine]
        self.at = torch.cat(mine) - own.start  # own rows that are negatives of the ranks' anchors, rank by rank

    def fetch(self, rows: Tensor) -> Tensor:
        """The row of each own anchor's negative, from all ranks' own `rows`."""
        return self.spread.wire.swap(rows[self.at], self.ours, self.theirs)[self.inverse]

    def deliver(self, gradient: Tensor) -> Tensor:
        """(n, D) for each own row, the sum of the gradients of all ranks' anchors whose negative it is."""
        total = gradient.new_zeros(len(self.rows), gradient.shape[1]).index_add_(0, self.inverse, gradient)
        came = self.spread.wire.swap(as_bytes(total), self.theirs, self.ours).view(gradient.dtype)
        return torch.zeros_like(gradient).index_add_(0, self.at, came)
