"""One objective over the batches of many ranks: `group=` of `goal.apply`, `goal.gradients` and `goal.Objective`.

The global batch is the ranks' rows in rank order. A call goes

    agree    one line from each rank: how many rows, which arguments, is anything wrong     O(1)
    share    s⁺, ids and weights of all pairs                                                O(N)
    mine     each rank its own rows of x against all of y, so that a tile is made once; rows of y come in one
             all-gather ("gather") or block by block round a ring ("ring"), while others are being mined
    home     what was found for a column goes to its owner, is merged and finished, and all statistics are shared: O(N)
    weigh    every rank weighs all anchors: it knows all entries of G
    emit     ∂l/∂x and ∂l/∂y of its own rows; nothing is sent in backward

What is sent goes through `goal.wire`, as rows of bytes, and is counted there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal import validation
from goal.distributed.exchange import Agreed, Ranks, Wire, agree, pack, ranks, unpack
from goal.distributed.rows import Local, local
from goal.engine import eager as reference
from goal.engine import path as engine
from goal.engine.partials import Partial, finish, merge
from goal.engine.path import Dense, Outcome, Seen, Whole
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Entries, Gradients, Limits, Masks, Mined, Needs, Pairs, total

Emit = Callable[[Tensor | None, Needs], Gradients]  # times the incoming gradient, at the embedded own rows


def _signature(own: Local, chosen: Settings, ranks: Ranks, mines: bool) -> dict[str, object]:
    """What has to be the same on all ranks."""
    return {
        **own.described(),
        "T": chosen.product.T,
        "P": chosen.product.P,
        "mining": chosen.mining,
        "similarity": chosen.similarity.name,
        "reduction": chosen.reduction,
        "averaged": ranks.averaged,
        "exchange": ranks.exchange,
        "mines": mines,
    }


# ── share ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Spread(NamedTuple):
    """This rank's part of the global batch, and the O(N) that it knows of the whole."""

    wire: Wire
    counts: list[int]  # rows of each rank
    chosen: Settings
    local: Local
    x: Tensor  # (n, D) own rows, embedded, in the computing dtype
    y: Tensor  # (n, D)
    s_pos: Tensor  # (K,) of all pairs
    ids: Tensor | None  # (K,) codes, as `Masks` takes them
    y_ids: Tensor | None  # (K,)
    weight: Tensor | None  # (K,) or (2, K)
    needs: Needs  # of any rank
    limits: Limits

    def of(self, rank: int) -> slice:
        """A rank's rows in the global batch."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    @property
    def own(self) -> slice:
        return self.of(self.wire.rank)

    @property
    def everything(self) -> slice:
        return slice(0, sum(self.counts))

    def masks(self, rows: slice, cols: slice) -> Masks:
        ids, y_ids = (None if self.ids is None else self.ids[rows]), (None if self.y_ids is None else self.y_ids[cols])
        return Masks(ids, y_ids, rows.start, cols.start, pairs=len(self.s_pos))

    def mine(self, x: Tensor, rows: slice, y: Tensor, cols: slice) -> tuple[Partial, Partial]:
        """Both directions' partials of a block of S."""
        chosen = self.chosen
        masks = self.masks(rows, cols)
        return reference.mine(chosen.similarity, x, y, self.s_pos, chosen.request, masks, self.limits)

    def merge(self, a: Partial, b: Partial) -> Partial:
        return merge(a, b, self.chosen.request, *self.limits)

    def embed(self, rows: Tensor, like: Tensor) -> Tensor:
        """Rows that came as bytes of `like`'s dtype, embedded."""
        return self.chosen.similarity.embed(rows.view(like.dtype).to(self.x.dtype))

    def dense_value(self, y: Tensor, cols: slice, dense: Dense) -> Tensor:
        """What the negatives in own rows × some columns add to the value."""
        chosen, masks = self.chosen, self.masks(self.own, cols)
        return reference.dense_value(chosen.similarity, self.x, y, self.s_pos, dense.share, masks, chosen.product)

    def dense_block(
        self, x: Tensor, rows: slice, y: Tensor, cols: slice, dense: Dense, pull: tuple[Tensor, Tensor], needs: Needs
    ) -> Gradients:
        """What the negatives in a block of S give its rows and columns; to `pull`, (K,) each, as `reference` says."""
        similarity, product, masks = self.chosen.similarity, self.chosen.product, self.masks(rows, cols)
        (s_pos, _), share, relative = dense
        return reference.dense_block(similarity, x, y, s_pos, share, relative, masks, product, needs, pull)

    def pairs(self, value: Tensor, needs: Needs) -> Gradients:
        """∂l/∂x and ∂l/∂y of entries of G at the own pairs, (n,)."""
        k = torch.arange(len(self.x), device=self.x.device)
        return self.chosen.similarity.vjp(self.x, self.y, Entries(k, k, value), needs)


def _share(wire: Wire, own: Local, chosen: Settings, agreed: Agreed, x: Tensor, y: Tensor) -> Spread:
    """s⁺, ids and weights of all pairs in one exchange."""
    columns = [reference.s_pos(chosen.similarity, x, y, len(x)), *own.columns()]
    s_pos, *rest = unpack(wire.gather(pack(*columns), agreed.counts).wait(), columns)
    ids, y_ids, weight = own.of_all(rest)
    if ids is not None and y_ids is not None:
        ids, y_ids = reference.id_codes(ids, y_ids, x.dtype)
    tie = reference.rounding_of(chosen.similarity, x.shape[1], x.dtype, *agreed.longest)
    limits = reference.limits(s_pos, chosen.request, tie)
    return Spread(wire, agreed.counts, chosen, own, x, y, s_pos, ids, y_ids, weight, agreed.needs, limits)


def _fields(part: Partial) -> list[Tensor]:
    return [one for one in part if one is not None]


def _part(columns: list[Tensor], like: Partial) -> Partial:
    rest = iter(columns)
    found: list[Any] = [None if one is None else next(rest) for one in like]
    return Partial(*found)


def _shared(spread: Spread, found: Statistics) -> Statistics:
    """All ranks' statistics from the own anchors'."""
    columns = [one.T for one in found[1:] if one is not None]
    rows = spread.wire.gather(pack(*columns), spread.counts).wait()
    every = iter(unpack(rows, columns))
    shared: list[Any] = [None if one is None else next(every).T.contiguous() for one in found[1:]]
    return Statistics(spread.s_pos, *shared)


# ── mine and emit: all rows at once ─────────────────────────────────────────────────────────────────────────────────


class Gathered:
    """Everybody's rows come once, in the background; the own block is mined meanwhile."""

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        own, needs, wire = spread.local, spread.needs, spread.wire
        self._y = wire.gather(own.y.contiguous().view(torch.uint8), spread.counts)
        dense = spread.chosen.mining.dense != "never"  # its entries at the pairs want both
        self._x = None
        if needs[1] or (dense and needs[0]) or not spread.chosen.mines:  # for stats, which may be asked for later
            self._x = wire.gather(own.x.contiguous().view(torch.uint8), spread.counts)

    @functools.cached_property
    def y(self) -> Tensor:
        """(N, D) all rows of y, embedded."""
        return self.spread.embed(self._y.wait(), self.spread.local.y)

    @functools.cached_property
    def x(self) -> Tensor:
        """(N, D) all rows of x; where no rank needs a gradient they have not been sent."""
        if self._x is None:
            raise RuntimeError("no rank needs a gradient of y, so the rows of x were not exchanged.")
        return self.spread.embed(self._x.wait(), self.spread.local.x)

    def mine(self) -> tuple[Partial, Partial]:
        """The own anchors' partials, x→y and y→x, over all candidates."""
        spread = self.spread
        own, end = spread.own, spread.everything.stop
        here = spread.mine(spread.x, own, spread.y, own)  # while the others' rows arrive
        parts = [here]
        for cols in (slice(0, own.start), slice(own.stop, end)):
            if cols.start < cols.stop:
                parts.append(spread.mine(spread.x, own, self.y[cols], cols))
        of_rows = functools.reduce(spread.merge, (rows for rows, _ in parts))
        in_order = [parts[1], here, *parts[2:]] if own.start else parts
        found = [torch.cat(column) for column in zip(*(_fields(cols) for _, cols in in_order), strict=True)]
        height = len(spread.x)
        came = spread.wire.swap(pack(*found), spread.counts, [height] * spread.wire.size)
        of_cols = [_part(unpack(rows, found), here[1]) for rows in came.split(height)]
        return of_rows, functools.reduce(spread.merge, of_cols)

    def later(self) -> Statistics:
        """The own anchors' statistics, for `Stats` of objectives that mined nothing; nothing is sent."""
        spread = self.spread
        own, everything = spread.own, spread.everything
        rows, _ = spread.mine(spread.x, own, self.y, everything)
        _, cols = spread.mine(self.x, everything, spread.y, own)
        return finish(spread.s_pos[own], rows, cols)

    def finish(self, outcome: Outcome) -> tuple[Tensor | None, Emit]:
        """The own rows' part of the dense value, and what emits."""
        spread, mined, dense = self.spread, outcome.mined, outcome.dense
        own, everything = spread.own, spread.everything
        similarity = spread.chosen.similarity
        value = None if dense is None else spread.dense_value(self.y, everything, dense)
        of_rows, of_cols = None, None
        if mined is not None:
            entries = mined.entries()
            of_rows, of_cols = (_within(entries, side, own) for side in ("row", "col"))
        if self._x is not None:
            _ = self.x  # nothing is waited for in backward

        def emit(incoming: Tensor | None, needs: Needs) -> Gradients:
            gx, gy = None, None
            if of_rows is not None and of_cols is not None:
                if needs[0]:
                    gx, _ = similarity.vjp(spread.x, self.y, _times(of_rows, incoming), (True, False))
                if needs[1]:
                    _, gy = similarity.vjp(self.x, spread.y, _times(of_cols, incoming), (False, True))
            if dense is None:
                return gx, gy
            scaled = dense if incoming is None else dense._replace(share=dense.share * incoming)
            forth, back, partly = (torch.zeros_like(spread.s_pos) for _ in range(3))  # own rows and columns are whole
            dense_x, _ = spread.dense_block(
                spread.x, own, self.y, everything, scaled, (forth, partly), (needs[0], False)
            )
            _, dense_y = spread.dense_block(
                self.x, everything, spread.y, own, scaled, (partly, back), (False, needs[1])
            )
            pair_x, pair_y = spread.pairs(-(forth + back)[own], needs)
            return total(gx, dense_x, pair_x), total(gy, dense_y, pair_y)

        return value, emit


def _within(entries: Entries, side: str, own: slice) -> Entries:
    """The entries whose row (or column) is an own one, counted from the first own one."""
    at: Tensor = getattr(entries, side)
    keep = (at >= own.start) & (at < own.stop)
    kept = Entries(*(one[keep] for one in entries))
    return kept._replace(**{side: at[keep] - own.start})


def _times(entries: Entries, incoming: Tensor | None) -> Entries:
    return entries if incoming is None else entries._replace(value=entries.value * incoming)


# ── mine and emit: block by block round a ring ──────────────────────────────────────────────────────────────────────


class Ring:
    """Blocks of y go round, with what was found for their rows behind them; two of others' are held at once.

    The next block arrives while this one is worked on. Emission is in forward, since rows of others are no longer there
    in backward; that has only to multiply.
    """

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        keeps = any(spread.needs) and spread.chosen.mining.mined != "none"
        self._won = torch.empty_like(spread.x) if keeps else None  # (n, D) the negatives of the own x

    def _round(self, meet: Callable[[Tensor, slice], Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Meets each block of y with the own x; returns what all ranks found for the own block.

        Args:
            meet: (block (m, D), its columns) → what was found for them, (m, B) uint8.
            join: two of those → one.
        """
        spread, wire = self.spread, self.spread.wire
        block, behind = spread.local.y.contiguous().view(torch.uint8), None
        for step in range(wire.size):
            owner, following = (wire.rank - step) % wire.size, (wire.rank - step - 1) % wire.size
            coming = wire.shift(block, spread.counts[following]) if step < wire.size - 1 else None
            found = meet(spread.embed(block, spread.local.y), spread.of(owner))
            if behind is not None:
                found = join(behind.wait(), found)
            behind = wire.shift(found, spread.counts[following])
            if coming is not None:
                block = coming.wait()
        assert behind is not None
        return behind.wait()

    def mine(self) -> tuple[Partial, Partial]:
        """The own anchors' partials, x→y and y→x, over all candidates."""
        spread = self.spread
        of_rows: list[Partial] = []
        like: list[Partial] = []

        def meet(y: Tensor, cols: slice) -> Tensor:
            rows, found = spread.mine(spread.x, spread.own, y, cols)
            before = of_rows.pop() if of_rows else None
            merged = rows if before is None else spread.merge(before, rows)
            if self._won is not None:
                index = _negative(merged)
                new = torch.ones_like(index, dtype=torch.bool) if before is None else index != _negative(before)
                self._won[new] = y[index[new] - cols.start]
            of_rows.append(merged)
            like[:] = [found]
            return pack(*_fields(found))

        def join(a: Tensor, b: Tensor) -> Tensor:
            first, second = (_part(unpack(rows, _fields(like[0])), like[0]) for rows in (a, b))
            return pack(*_fields(spread.merge(first, second)))

        home = self._round(meet, join)
        return of_rows[0], _part(unpack(home, _fields(like[0])), like[0])

    def later(self) -> Statistics:
        raise RuntimeError(
            "stats of mining='all' want the hardest negatives, which a ring has not looked for (it would take one more "
            "round, on all ranks): use exchange='gather', or goal.gradients, which looks for them."
        )

    def finish(self, outcome: Outcome) -> tuple[Tensor | None, Emit]:
        """The own rows' part of the dense value, and what emits."""
        value, gx, gy = None, None, None
        if outcome.mined is not None and any(self.spread.needs):
            gx, gy = self._mined(outcome.mined)
        if outcome.dense is not None:
            value, (dense_x, dense_y) = self._dense(outcome.dense)
            gx, gy = total(gx, dense_x), total(gy, dense_y)

        def emit(incoming: Tensor | None, needs: Needs) -> Gradients:
            wanted = [one if needed else None for one, needed in zip((gx, gy), needs, strict=True)]
            found = [None if one is None else one.clone() if incoming is None else one * incoming for one in wanted]
            return found[0], found[1]

        return value, emit

    def _mined(self, mined: Mined) -> Gradients:
        """An anchor's owner has its negative's row, and sends that row's gradient to its owner."""
        spread, (negative, pull, push) = self.spread, mined
        vjp, own, needs = spread.chosen.similarity.vjp, spread.own, spread.needs
        k = torch.arange(len(spread.x), device=spread.x.device)
        forth, back = _Routes(spread, negative[0]), _Routes(spread, negative[1])
        won = spread.embed(back.fetch(spread.local.x.contiguous().view(torch.uint8)), spread.local.x)
        assert self._won is not None
        gx, to_y = vjp(spread.x, self._won, Entries(k, k, push[0, own]), needs)
        to_x, gy = vjp(won, spread.y, Entries(k, k, push[1, own]), needs)
        pair_x, pair_y = spread.pairs(pull.sum(0)[own], needs)
        from_y = None if to_x is None else back.deliver(to_x)
        from_x = None if to_y is None else forth.deliver(to_y)
        return total(gx, pair_x, from_y), total(gy, pair_y, from_x)

    def _dense(self, dense: Dense) -> tuple[Tensor, Gradients]:
        """A round of its own: the value, and with it the gradients if anybody needs them."""
        spread, needs, own = self.spread, self.spread.needs, self.spread.own
        value, gx = spread.s_pos.new_zeros(()), torch.zeros_like(spread.x)
        forth, back = torch.zeros_like(spread.s_pos), torch.zeros_like(spread.s_pos)

        def meet(y: Tensor, cols: slice) -> Tensor:
            value.add_(spread.dense_value(y, cols, dense))
            if not any(needs):
                return y.new_empty(len(y), 0, dtype=torch.uint8)
            at_x, at_y = spread.dense_block(spread.x, own, y, cols, dense, (forth, back), needs)
            if at_x is not None:
                gx.add_(at_x)
            return pack(back[cols], *([] if at_y is None else [at_y]))

        def join(a: Tensor, b: Tensor) -> Tensor:
            return (a.view(gx.dtype) + b.view(gx.dtype)).view(torch.uint8) if any(needs) else a

        home = self._round(meet, join)
        if not any(needs):
            return value, (None, None)
        home = home.view(gx.dtype)
        pair_x, pair_y = spread.pairs(-(forth[own] + home[:, 0]), needs)
        return value, (total(gx, pair_x) if needs[0] else None, total(home[:, 1:], pair_y) if needs[1] else None)


def _negative(part: Partial) -> Tensor:
    return part.negative if part.semi_negative is None else part.semi_negative


class _Routes:
    """Between anchors and their negatives' owners: a row goes once between two ranks, however many anchors it has."""

    def __init__(self, spread: Spread, negative: Tensor) -> None:
        own = spread.own
        self.spread = spread
        self.rows, self.inverse = torch.unique(negative[own], return_inverse=True)  # ascending: by owner
        ends = torch.tensor(list(itertools.accumulate(spread.counts)), device=negative.device)
        self.theirs = torch.bincount(torch.bucketize(self.rows, ends, right=True), minlength=len(ends)).tolist()
        mine = [one[(one >= own.start) & (one < own.stop)].unique() for one in negative.split(spread.counts)]
        self.ours = [len(one) for one in mine]
        self.at = torch.cat(mine) - own.start  # own rows that others' anchors have, by rank

    def fetch(self, rows: Tensor) -> Tensor:
        """The negatives' rows for each own anchor, from what each rank has of its own."""
        return self.spread.wire.swap(rows[self.at], self.ours, self.theirs)[self.inverse]

    def deliver(self, gradient: Tensor) -> Tensor:
        """The own rows' sum of the gradients (n, D) that all ranks' anchors have for their negatives' rows."""
        total = gradient.new_zeros(len(self.rows), gradient.shape[1]).index_add_(0, self.inverse, gradient)
        came = self.spread.wire.swap(total.view(torch.uint8), self.theirs, self.ours).view(gradient.dtype)
        return torch.zeros_like(gradient).index_add_(0, self.at, came)


# ── the whole call ──────────────────────────────────────────────────────────────────────────────────────────────────


class Result(NamedTuple):
    """One call on one rank."""

    value: Tensor  # 0-d, of the global batch
    emit: Callable[[Tensor, Tensor, Tensor | None, Needs], Gradients]  # (x, y, incoming, needs) → own rows' gradients
    seen: Seen  # of the own anchors; indices are global


def run(
    x: Any,
    y: Any,
    chosen: Settings,
    ids: object,
    y_ids: object,
    weight: object,
    check_finite: bool | None,
    ranks: Ranks,
    needs: Needs,
    shown: bool,
) -> Result:
    """The objective of the global batch; `shown`: statistics are wanted in any case. All ranks call it together."""
    wire, own, error = Wire(ranks.group), None, None
    arguments: dict[str, object] = {}
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    mines = chosen.mines or (shown and ranks.exchange == "ring")
    longest = 0.0, 0.0
    try:
        if chosen.impl == "triton":
            raise ValueError("impl='triton' cannot be used with group=: the kernels take whole batches, no blocks.")
        own = local(x, y, ids, y_ids, weight, check_finite)
        arguments = _signature(own, chosen, ranks, mines)
        dtype = engine.computing_dtype(own.x, own.y)
        x, y = (chosen.similarity.embed(side.to(dtype)) for side in (own.x, own.y))
        if chosen.request.compares:
            longest = reference.longest(x), reference.longest(y)
    except (TypeError, ValueError) as refused:
        error = refused
    agreed = agree(wire, 0 if own is None else len(own.x), arguments, error, needs, longest, device)
    assert own is not None
    spread = _share(wire, own, chosen, agreed, x, y)
    blocks = Ring(spread) if ranks.exchange == "ring" else Gathered(spread)
    found = finish(spread.s_pos[spread.own], *blocks.mine()) if mines else None
    statistics = None if found is None else _shared(spread, found)
    everything = spread.everything
    whole = Whole(everything.stop, everything.stop, spread.masks(everything, everything))
    pairs = Pairs(spread.s_pos, spread.s_pos.new_empty(0))
    outcome = engine.weigh(chosen, whole, pairs, statistics, spread.weight)
    part, emit = blocks.finish(outcome)
    value = outcome.value
    if part is not None:
        value = value + wire.gather(part.view(1, 1).view(torch.uint8), [1] * wire.size).wait().view(part.dtype).sum()
    by = wire.size if ranks.averaged else 1

    def emitted(x: Tensor, y: Tensor, incoming: Tensor | None, needs: Needs) -> Gradients:
        if by != 1:
            incoming = spread.s_pos.new_tensor(by) if incoming is None else incoming * by
        gx, gy = emit(incoming, needs)
        back = chosen.similarity.pull_back
        return (
            None if gx is None else back(x.detach().to(gx.dtype), spread.x, gx).to(x.dtype),
            None if gy is None else back(y.detach().to(gy.dtype), spread.y, gy).to(y.dtype),
        )

    return Result(value, emitted, _seen(spread, outcome, found, blocks.later))


def _seen(spread: Spread, outcome: Outcome, found: Statistics | None, later: Callable[[], Statistics]) -> Seen:
    """What `Stats` shows of the own anchors."""
    own, (s_pos, statistics, weights, fallback, _) = spread.own, outcome.seen
    if weights is None and statistics is not None:  # R⁺ is over all pairs: not to be made again from the own ones
        stand_in = torch.where(statistics.s_neg == -torch.inf, s_pos, statistics.s_neg)
        weights = spread.chosen.product.weights(s_pos, stand_in, spread.chosen.relative(statistics))
    if weights is not None:
        t, p_pos, p_neg = (one[..., own] if isinstance(one, Tensor) and one.dim() else one for one in weights)
        weights = t, p_pos, p_neg
    seen = Seen(s_pos[own], found, weights, None if fallback is None else fallback[:, own])
    return seen if found is not None else seen._replace(later=later)  # which keeps all rows alive


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────────────────────


def size_of(group: object, ranks_: int | None, exchange: str) -> int | None:
    """How many ranks `goal.explain` is asked about; None without any."""
    checked = ranks(group, False, exchange)
    if ranks_ is None:
        return None if checked is None else Wire(checked.group).size
    if checked is not None:
        raise ValueError("ranks and group are both given: ranks is for a plan without a group.")
    return validation.whole_number("ranks", ranks_)


class Traffic(NamedTuple):
    """What a rank sends in a step, forward and backward together."""

    gather: int  # bytes; exact
    ring: int  # bytes, at most, on average over the ranks: a negative that is near, or shared, costs less
    rounds: int  # times that y goes round the ring
    held: dict[str, int]  # bytes of others' rows, and of gradients on their way, by exchange


def traffic(chosen: Settings, n: int, d: int, x_size: int, y_size: int, size: int, ranks: int) -> Traffic:
    """The same for ranks of n rows each whose x and y need gradients; ids, y_ids and weights come on top.

    Args:
        x_size, y_size: bytes of an element of x and y as they come.
        size: the same in the computing dtype.
    """
    request, others, mined = chosen.request, ranks - 1, chosen.mining.mined != "none"
    dense = chosen.mining.dense != "never"
    rounds = chosen.mines + dense
    blocks = 2 * y_size + dense * 2 * size
    held = {"gather": ranks * n * d * (x_size + y_size), "ring": n * d * (blocks + mined * 3 * size)}
    if not others:
        return Traffic(0, 0, rounds, held)
    extrema, sums = 1 + (request.semi_hard is not None), request.lin + (request.beta is not None)
    partial = extrema * (size + 8) + size * (3 * request.lin + 2 * (request.beta is not None))
    finished = 2 * (extrema * (size + 8) + sums * size)
    always = others * (64 + n * size + chosen.mines * n * finished + dense * size)  # 64: the line
    gather = others * n * d * (x_size + y_size) + chosen.mines * others * n * partial
    ring = rounds * others * n * d * y_size + chosen.mines * ranks * n * partial
    ring += mined * n * d * (x_size + 2 * size) + dense * ranks * n * (d + 1) * size
    return Traffic(always + gather, always + ring, rounds, held)
