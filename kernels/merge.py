"""Merging partials, and finishing them: exact similarities of the candidates, the hardest of them, the sums.

merge    the partials of many tiles → a partial for each anchor, with the few best candidates kept apart
finish   exact similarities of the candidates, computed as s⁺ is, and the best of them; for a small batch it also merges
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from goal.kernels.bits import (
    NO_KEY,
    SQUARE,
    bits,
    place_of,
    poison,
    reach_of,
    real,
    scale_of,
    threshold,
    tie_of,
    units_of,
    value_of,
    wide,
)
from goal.kernels.scan import Column, get, put
from goal.kernels.tile import or_zero, similarities


class Four(NamedTuple):
    """A value for each of the KEPT candidates, the best first."""

    a: Any
    b: Any
    c: Any
    d: Any


class Kept(NamedTuple):
    """The KEPT best candidates, in order; equal candidates in order of arrival."""

    units: Any  # Four similarities in units of a key; < 0 if there is none
    index: Any  # Four positions


class Sums(NamedTuple):
    """Sums over the candidates of anchors, as in `scan.Words`, as floats; 0 if not requested."""

    lin_count: Any
    lin_sum: Any
    ties: Any
    exp_count: Any  # number of valid negatives; exp_sum leaves out the kept candidates
    exp_sum: Any


class Limits(NamedTuple):
    """Thresholds of similarities."""

    reach: Any  # ≥ every |s|
    least: Any  # similarity from which a negative is valid
    scale: Any  # of keys
    tie: Any  # similarities closer than this are equal
    rate: Any  # β in powers of two


class Finished(NamedTuple):
    """Results for anchors, x→y's and then y→x's; the fields of `goal.engine.partials.Partial`, None if not requested.

    If there is no field for a count, the field of the sum has the mean.
    """

    s_neg: Any
    negative: Any
    semi: Any
    semi_negative: Any
    ties: Any
    lin_count: Any
    lin_sum: Any
    exp_count: Any
    exp_sum: Any


class Row(NamedTuple):
    """A row or column of tiles: number of tiles, of anchors, of candidates per tile, and the first tile's position."""

    tiles: Any
    anchors: Any
    length: Any
    begin: Any


@triton.jit
def _limits(bounds, numbers, PARTS: tl.constexpr):
    reach = reach_of(bounds, PARTS)
    least, rate = threshold(bounds, PARTS), numbers.beta * 1.4426950408889634
    return Limits(reach, least, scale_of(reach), tie_of(reach, numbers.slack), rate)


# ── kept candidates ─────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _insert(n, at, kept):
    """The kept candidates after one more candidate, and the units of the candidate that drops out."""
    v, i = kept.units, kept.index
    above_a, above_b, above_c, above_d = n > v.a, n > v.b, n > v.c, n > v.d
    units = Four(
        tl.where(above_a, n, v.a),
        tl.where(above_a, v.a, tl.where(above_b, n, v.b)),
        tl.where(above_b, v.b, tl.where(above_c, n, v.c)),
        tl.where(above_c, v.c, tl.where(above_d, n, v.d)),
    )
    index = Four(
        tl.where(above_a, at, i.a),
        tl.where(above_a, i.a, tl.where(above_b, at, i.b)),
        tl.where(above_b, i.b, tl.where(above_c, at, i.c)),
        tl.where(above_c, i.c, tl.where(above_d, at, i.d)),
    )
    return Kept(units, index), tl.where(above_d, v.d, n)


@triton.jit
def _get_kept(state, WORD: tl.constexpr):
    units = Four(get(state, WORD, -1), get(state, WORD + 1, -1), get(state, WORD + 2, -1), get(state, WORD + 3, -1))
    index = Four(get(state, WORD + 4, 0), get(state, WORD + 5, 0), get(state, WORD + 6, 0), get(state, WORD + 7, 0))
    return Kept(units, index)


@triton.jit
def _put_kept(state, WORD: tl.constexpr, kept):
    put(state, WORD, kept.units.a)
    put(state, WORD + 1, kept.units.b)
    put(state, WORD + 2, kept.units.c)
    put(state, WORD + 3, kept.units.d)
    put(state, WORD + 4, kept.index.a)
    put(state, WORD + 5, kept.index.b)
    put(state, WORD + 6, kept.index.c)
    put(state, WORD + 7, kept.index.d)


@triton.jit
def _get_sums(state, WORDS: tl.constexpr):
    zero = tl.zeros([state.on.shape[0]], tl.float32)
    lin_count, lin_sum, ties, exp_count, exp_sum = zero, zero, zero, zero, zero
    if WORDS.lin_sum is not None:
        lin_count, lin_sum = real(get(state, WORDS.lin_count, 0)), real(get(state, WORDS.lin_sum, 0))
        ties = real(get(state, WORDS.ties, 0))
    if WORDS.exp_sum is not None:
        exp_count, exp_sum = real(get(state, WORDS.exp_count, 0)), real(get(state, WORDS.exp_sum, 0))
    return Sums(lin_count, lin_sum, ties, exp_count, exp_sum)


@triton.jit
def _put_sums(state, WORDS: tl.constexpr, sums):
    if WORDS.lin_sum is not None:
        put(state, WORDS.lin_count, bits(sums.lin_count))
        put(state, WORDS.lin_sum, bits(sums.lin_sum))
        put(state, WORDS.ties, bits(sums.ties))
    if WORDS.exp_sum is not None:
        put(state, WORDS.exp_count, bits(sums.exp_count))
        put(state, WORDS.exp_sum, bits(sums.exp_sum))


# ── merging ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _next(part, row, WORD: tl.constexpr, t, kept):
    """The kept candidates after tile t of a row, the units of its best, and the units of the one that drops out."""
    best = get(part, WORD, NO_KEY)
    n = units_of(best)
    kept, out = _insert(n, row.begin + t * row.length + place_of(best), kept)
    return kept, n, out


@triton.jit
def _after(part, row):
    """The words of the same anchors in the next tile."""
    return Column(part.at + row.anchors, part.stride, part.on)


@triton.jit
def _merged(part, row, limits, kept, sums, WORDS: tl.constexpr):
    """Kept candidates and sums after merging the partials of a row of tiles; `part` points to the first."""
    lin_count, lin_sum, ties, exp_count, exp_sum = sums
    least, scale, tie, rate = limits.least, limits.scale, limits.tie, limits.rate
    for t in range(0, row.tiles):
        before = value_of(kept.units.a, scale)
        fresh = kept.units.a < 0
        kept, n, out = _next(part, row, WORDS.best, t, kept)
        if WORDS.lin_sum is not None:
            lin_sum += real(get(part, WORDS.lin_sum, 0))
            counts = real(get(part, WORDS.lin_count, 0))
            more = tl.floor(counts * 0.000244140625)
            lin_count += counts - 4096.0 * more
            gap = value_of(n, scale) - before
            ties = tl.where(fresh | (gap > tie), 0.0, ties) + tl.where((n >= 0) & (fresh | (gap >= -tie)), more, 0.0)
        if WORDS.exp_sum is not None:
            exp_count += real(get(part, WORDS.exp_count, 0))
            top = tl.maximum(value_of(kept.units.a, scale), least)
            own = real(get(part, WORDS.exp_sum, 0))
            exp_sum *= tl.exp2(rate * (tl.maximum(before, least) - top))
            exp_sum += own * tl.exp2(rate * (tl.maximum(value_of(n, scale), least) - top))
            left = value_of(out, scale)
            joins = (out >= 0) & (left >= least)
            exp_sum += tl.where(joins, tl.exp2(rate * tl.minimum(left - top, 0.0)), 0.0)
        part = _after(part, row)
    return kept, Sums(lin_count, lin_sum, ties, exp_count, exp_sum)


@triton.jit
def _merged_semi(part, row, kept, WORDS: tl.constexpr):
    """The same for the semi-hard candidates, which have no sums."""
    for t in range(0, row.tiles):
        kept, _, _ = _next(part, row, WORDS.semi, t, kept)
        part = _after(part, row)
    return kept


@triton.jit
def merge(
    partials, state, bounds, anchors, tiles, numbers,
    WORDS: tl.constexpr, STATE: tl.constexpr, CUT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the partials of a row of tiles, or of a column, into `state` [word, anchor], x→y's anchors first.

    anchors: their numbers, x→y and y→x.
    Rows are complete after their chunk of tiles; columns continue from chunk to chunk.
    """
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        part, count, size, length, begin = partials.rows, tiles.width, tiles.anchors, CUT.width, 0
        at = wide(tiles.first) * CUT.height
    else:
        part, count, size, length = partials.cols, tiles.height, anchors.cols, CUT.height
        begin, at = tiles.first * CUT.height, wide(anchors.rows)
    row = Row(count, size, length, begin)
    on = local < row.anchors
    part = Column(part + local, wide(row.tiles) * row.anchors, on)
    stride = wide(anchors.rows) + anchors.cols
    state = Column(state + at + local, stride, on)
    going_on = on & (row.begin + tl.zeros([BLOCK], tl.int32) > 0)  # the first chunk starts from nothing
    old = Column(state.at, stride, going_on)
    limits = _limits(bounds, numbers, PARTS)
    kept, sums = _merged(part, row, limits, _get_kept(old, STATE.best), _get_sums(old, STATE), WORDS)
    _put_kept(state, STATE.best, kept)
    _put_sums(state, STATE, sums)
    if STATE.semi is not None:
        _put_kept(state, STATE.semi, _merged_semi(part, row, _get_kept(old, STATE.semi), WORDS))


# ── finishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Scored(NamedTuple):
    """The exact similarities of the kept candidates, and the best of them."""

    s: Any  # Four
    best: Any
    index: Any
    which: Any  # position of the best among the four


@triton.jit
def _score(x, y, anchor, side, units, at, cut, on, D, BLOCK: tl.constexpr):
    """A kept candidate's exact similarity, and whether it was computed: only if its units are at least `cut`."""
    close = on & (units >= 0) & (units >= cut)
    at = at.to(tl.int64)
    row, col = tl.where(side == 0, anchor, at), tl.where(side == 0, at, anchor)
    return similarities(x, row, y, col, close, D, BLOCK), close


@triton.jit
def _better(s, at, close, best, index, which, RANK: tl.constexpr):
    """The best so far after one more candidate: the higher similarity, among equals the lower index."""
    wins = close & ((s > best) | ((s == best) & (at < index)))
    return tl.where(wins, s, best), tl.where(wins, at, index), tl.where(wins, RANK, which)


@triton.jit
def _scored(x, y, anchor, side, kept, cut, on, D, BLOCK: tl.constexpr):
    u, i = kept.units, kept.index
    a, _ = _score(x, y, anchor, side, u.a, i.a, cut, on, D, BLOCK)
    b, close_b = _score(x, y, anchor, side, u.b, i.b, cut, on, D, BLOCK)
    c, close_c = _score(x, y, anchor, side, u.c, i.c, cut, on, D, BLOCK)
    d, close_d = _score(x, y, anchor, side, u.d, i.d, cut, on, D, BLOCK)
    best, index, which = _better(b, i.b, close_b, a, i.a, tl.zeros([on.shape[0]], tl.int32), 1)
    best, index, which = _better(c, i.c, close_c, best, index, which, 2)
    best, index, which = _better(d, i.d, close_d, best, index, which, 3)
    return Scored(Four(a, b, c, d), best, index, which)


@triton.jit
def _joins(units, s, which, top, limits, RANK: tl.constexpr):
    """exp(−β(s⁻ − s)) of a kept candidate that is not the best, if it is valid; else 0."""
    valid = (units >= 0) & (which != RANK) & (s >= limits.least)
    return tl.where(valid, tl.exp2(limits.rate * tl.minimum(s - top, 0.0)), 0.0)


@triton.jit
def _finished_lin(sums, gap, has):
    """Number of valid negatives below the best, and Σ (best − sᵢⱼ) over them; 0 if the best is not valid."""
    valid = has & (gap >= 0)
    others = tl.maximum(sums.lin_count - sums.ties, 0.0)
    total = tl.maximum(sums.lin_count * gap - sums.lin_sum, 0.0)
    return tl.where(valid, others, 0.0), tl.where(valid & (others > 0), total, 0.0)


@triton.jit
def _finished_exp(sums, kept, scored, limits, has):
    """Number of valid negatives but the best, and Σ exp(−β(best − sᵢⱼ)) over them."""
    top = tl.maximum(scored.best, limits.least)
    # so far the best was known only to within a unit; for long rows a unit may be large
    shift = limits.rate * (tl.maximum(value_of(kept.units.a, limits.scale), limits.least) - top)
    total = tl.where(sums.exp_sum > 0, sums.exp_sum * tl.exp2(tl.minimum(shift, 126.0)), 0.0)
    total += _joins(kept.units.a, scored.s.a, scored.which, top, limits, 0)
    total += _joins(kept.units.b, scored.s.b, scored.which, top, limits, 1)
    total += _joins(kept.units.c, scored.s.c, scored.which, top, limits, 2)
    total += _joins(kept.units.d, scored.s.d, scored.which, top, limits, 3)
    count = tl.where(has, sums.exp_count - tl.where(scored.best >= limits.least, 1.0, 0.0), 0.0)
    return count, tl.where(count > 0, total, 0.0)


@triton.jit
def finish(
    x, y, partials, state, bounds, out, block, tiles, numbers,
    WORDS: tl.constexpr, STATE: tl.constexpr, MERGES: tl.constexpr,
    CUT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the statistics of the anchors to `out`, see `Finished`.

    MERGES: merge the partials of all tiles here; else `state` has the result of `merge`.
    """
    side = tl.program_id(1)
    anchor = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    # written as arithmetic: results of branches take registers
    on = anchor < block.row_anchors + side * (block.col_anchors - block.row_anchors)
    at = anchor + side * wide(block.row_anchors)
    row_offset, col_offset = or_zero(block.row_offset), or_zero(block.col_offset)
    offset = col_offset + side * (row_offset - col_offset)  # of the candidates
    if MERGES:
        if side == 0:
            part, count, anchors, length = partials.rows, tiles.width, block.row_anchors, CUT.width
        else:
            part, count, anchors, length = partials.cols, tiles.height, block.col_anchors, CUT.height
        row = Row(count, anchors, length, 0)
        part = Column(part + anchor, wide(row.tiles) * row.anchors, on)
    state = Column(state + at, wide(block.row_anchors) + block.col_anchors, on & (not MERGES))
    limits = _limits(bounds, numbers, PARTS)
    kept, sums = _get_kept(state, STATE.best), _get_sums(state, STATE)
    if MERGES:
        kept, sums = _merged(part, row, limits, kept, sums, WORDS)
    close = (numbers.near * limits.reach * limits.scale).to(tl.int32) + 2
    cut = kept.units.a - close
    if STATE.exp_sum is not None:  # score all candidates: those that are not the best join the sum
        cut = cut * 0
    scored = _scored(x, y, anchor, side, kept, cut, on, block.D, BLOCK)
    best, has = scored.best, kept.units.a >= 0
    # a NaN or inf in x or y shows in every maximum; −inf means that there is no negative
    shown = tl.where(best == -float("inf"), float("nan"), best) + poison(bounds, PARTS)
    tl.store(out.s_neg + at, tl.where(has, shown, -float("inf")), mask=on)
    tl.store(out.negative + at, scored.index.to(tl.int64) + offset, mask=on)
    if STATE.lin_sum is not None:
        count, total = _finished_lin(sums, best - limits.least, has)
        if out.lin_count is None:
            total = total / tl.maximum(count, 1.0)
        else:
            tl.store(out.ties + at, sums.ties, mask=on)
            tl.store(out.lin_count + at, count, mask=on)
        tl.store(out.lin_sum + at, total, mask=on)
    if STATE.exp_sum is not None:
        count, total = _finished_exp(sums, kept, scored, limits, has)
        total = tl.minimum(total, tl.maximum(count, 1.0))
        if out.exp_count is None:
            total = total / tl.maximum(count, 1.0)
        else:
            tl.store(out.exp_count + at, count, mask=on)
        tl.store(out.exp_sum + at, total, mask=on)
    if STATE.semi is not None:
        kept = _get_kept(state, STATE.semi)
        if MERGES:
            kept = _merged_semi(part, row, kept, WORDS)
        limits = _limits(bounds, numbers, PARTS)  # computed again: keeping it from above would take registers
        close = (numbers.near * limits.reach * limits.scale).to(tl.int32) + 2
        scored = _scored(x, y, anchor, side, kept, kept.units.a - close, on, block.D, BLOCK)
        found = tl.where(kept.units.a >= 0, scored.best + poison(bounds, PARTS), -float("inf"))
        found = tl.where(limits.reach > SQUARE, float("nan"), found)  # beyond it the limit of ties is not reliable
        tl.store(out.semi + at, found, mask=on)
        tl.store(out.semi_negative + at, scored.index.to(tl.int64) + offset, mask=on)
