"""The scan: a tile of S in registers, reduced in both directions to partials for its rows and for its columns.

docs/mathematics.md says what a partial is, and why merging partials only ever adds. Partials are int32 words, with
floats bitcast, in a buffer [word, tile, anchor]. The request decides which words there are (`words`). Nothing here
reads a value back to the host.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from goal.kernels.bits import (
    INTERPRET,
    LARGEST,
    LIFT,
    NO_KEY,
    beyond,
    bits,
    exp2,
    halving,
    keys_of,
    place_of,
    power,
    reach_of,
    saturated,
    scale_of,
    threshold,
    tie_of,
    units_of,
    value_of,
    wide,
)
from goal.kernels.tile import negatives, or_zero, same_ids, tile, tile_of

_NEVER: tl.constexpr = tl.constexpr(float("-inf"))  # stands for the similarity at an entry that is no negative
KEPT = 4  # candidates of each anchor that are rescored exactly


class Words(NamedTuple):
    """The layout of a partial [word, tile, anchor], or of merged partials [word, anchor]; compile-time constants.

    None means not requested. A partial has a key for the best candidate; merged partials have the KEPT best, first
    their units and then their indices.
    """

    size: int  # total number of words
    best: int  # the hardest negatives
    semi: int | None = None  # the hardest semi-hard negatives
    lin_sum: int | None = None  # Σ (sᵢⱼ − threshold) over the valid negatives
    lin_count: int | None = None  # number of valid negatives; in a partial, plus 4096 for each tie
    ties: int | None = None  # number of negatives equal to the best; merged partials only
    exp_count: int | None = None  # number of valid negatives
    exp_sum: int | None = None  # Σ exp(−β(best − sᵢⱼ)) over the valid negatives but the best, or the KEPT best


def words(semi: bool, lin: bool, exp: bool, merged: bool = False) -> Words:
    """The layout for a request, of partials or of merged partials."""
    keys = 2 * KEPT if merged else 1
    sizes = {"best": keys, "semi": keys * semi, "lin_sum": lin, "lin_count": lin, "ties": lin and merged}
    sizes |= {"exp_count": exp, "exp_sum": exp}
    place, places = 0, {}
    for name, size in sizes.items():
        if size:
            places[name] = place
        place += size
    return Words(**places, size=place)


class Numbers(NamedTuple):
    """Numbers of a request, for comparisons and sums."""

    margin: Any  # of semi-hard mining
    slack: Any  # similarities closer than slack · max ‖x‖ · max ‖y‖ are equal
    near: Any  # candidates within near · max ‖x‖ · max ‖y‖ of the best are rescored exactly
    beta: Any  # of the exponential sums


class Column(NamedTuple):
    """The words of some anchors in a buffer: pointers to the first word, the stride of words, and a mask of anchors."""

    at: Any
    stride: Any
    on: Any


@triton.jit
def put(column, WORD: tl.constexpr, value):
    tl.store(column.at + WORD * column.stride, value, mask=column.on)


@triton.jit
def get(column, WORD: tl.constexpr, other):
    return tl.load(column.at + WORD * column.stride, mask=column.on, other=other)


# ── reductions of a tile ────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _spread(t):
    """The rows of a tile in two halves, in a layout in which a thread has many rows of few columns.

    In the layout of a product, a column lies in many threads, and its reduction would shuffle every column through all
    of them. tl.split requires both halves in the same thread, so the compiler converts the layout of the tile, once.
    """
    return tl.split(tl.permute(tl.reshape(t, [t.shape[0] // 2, 2, t.shape[1]]), (0, 2, 1)))


@triton.jit
def _own(t):
    """(rows of a thread, other rows, columns) for a product of four warps on sm_80 and sm_90, 8 and 64 rows apart."""
    H: tl.constexpr = t.shape[0] // 64
    return tl.reshape(tl.permute(tl.reshape(t, [H, 4, 2, 8, t.shape[1]]), (0, 2, 1, 3, 4)), [2 * H, 32, t.shape[1]])


@triton.jit
def _max(t, DIM: tl.constexpr, FOLD: tl.constexpr):
    """Maxima along an axis."""
    if DIM == 1:
        return tl.max(t, 1)
    else:
        if FOLD:
            a, b = _spread(tl.max(_own(t), 0))
        else:
            a, b = _spread(t)
        return tl.max(tl.maximum(a, b), 0)


@triton.jit
def _sum(t, DIM: tl.constexpr, FOLD: tl.constexpr):
    """Sums along an axis."""
    if DIM == 1:
        return tl.sum(t, 1)
    else:
        if FOLD:
            a, b = _spread(tl.sum(_own(t), 0))
        else:
            a, b = _spread(t)
        return tl.sum(a + b, 0)


@triton.jit
def _once(word):
    """The same word, computed once: otherwise the compiler repeats a reduction for every layout in which it is used."""
    if INTERPRET:
        return word
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [word], tl.int32, is_pure=False, pack=1)


@triton.jit
def _best(keys, place, DIM: tl.constexpr, FOLD: tl.constexpr):
    """Largest key along DIM minus the lowest position (< 256) among equals: one reduction gives value and position."""
    return _max(keys - (tl.expand_dims(place, 1 - DIM) - LIFT), DIM, FOLD)


@triton.jit
def _best_below(keys, place, high, low, DIM: tl.constexpr, FOLD: tl.constexpr):
    """The same for keys above `low` and below `high`.

    As unsigned numbers, the differences to `high` are largest just below it, and small for keys from `high` on.
    """
    high -= 255
    ahead = (keys - (tl.expand_dims(place, 1 - DIM) + tl.expand_dims(high, DIM))).to(tl.uint32, bitcast=True)
    best = _max(ahead, DIM, FOLD).to(tl.int32, bitcast=True)
    found = best + high
    return tl.where((best < 0) & (found > low), found + LIFT, NO_KEY)


@triton.jit
def _between(own, margin, top, floor, scale):
    """The keys between which the semi-hard negatives of anchors lie."""
    return keys_of(own - top, scale), keys_of(tl.maximum(own - margin, floor), scale)


@triton.jit
def scan(
    x, y, ids, s_pos, bounds, partials, block, tiles, numbers,
    WORDS: tl.constexpr, WIDE: tl.constexpr, ARITHMETIC: tl.constexpr, TMA: tl.constexpr,
    CUT: tl.constexpr, FOLD: tl.constexpr, PARTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Reduce a tile of a block into partials.rows [word, tile, tiles.anchors] and .cols [word, tile, col_anchors].

    s_pos: in the arithmetic of the scan. WIDE: 0 runs if a single shift serves all exponents, 1 runs otherwise, 2 runs
    always. INNER: for counting instructions, a tile with negatives only.
    """
    LIN: tl.constexpr = WORDS.lin_sum is not None
    EXP: tl.constexpr = WORDS.exp_sum is not None
    if EXP:  # noqa: SIM102
        if WIDE < 2 and (numbers.beta * (reach_of(bounds, PARTS) - threshold(bounds, PARTS)) >= 80.0) != (WIDE == 1):
            return  # the other launch scans
    i, j = tile_of(tl.program_id(0), tiles.height, tiles.width)
    first_row, first_col = (tiles.first + i) * CUT.height, j * CUT.width
    s = tile(x, y, first_row, first_col, block, CUT, ARITHMETIC, TMA)
    if ARITHMETIC == "halved":
        by_x, by_y = halving(bounds + 1), halving(bounds + 2)
        back = 1.0 / (by_x * by_y)
    if not INNER:  # noqa: SIM102
        if beyond(bounds, LARGEST, PARTS):  # an overflow is the best, so that `finish` rescores it and it shows
            if ARITHMETIC == "halved":
                s = s * (1.0 / by_x) * (1.0 / by_y)
                back = tl.full([], 1.0, tl.float32)
            s = tl.maximum(tl.minimum(s, LARGEST), -LARGEST)
    if ARITHMETIC == "halved":
        s *= back
    r, c = tl.arange(0, CUT.height), tl.arange(0, CUT.width)
    row, col = first_row + r, first_col + c
    if ids is not None:
        s = tl.where(same_ids(row, col, ids, block), _NEVER, s)
    if not INNER:
        edge = (first_row + CUT.height > block.N) | (first_col + CUT.width > block.M)
        pair = first_row + or_zero(block.ahead)
        if edge | ((pair < first_col + CUT.width) & (first_col < pair + CUT.height)):
            s = tl.where(negatives(row, first_col, None, block, CUT.width), s, _NEVER)

    anchor = i * CUT.height + r
    rows = Column(
        partials.rows + wide(j) * tiles.anchors + anchor, wide(tiles.width) * tiles.anchors, anchor < tiles.anchors
    )
    cols = Column(
        partials.cols + wide(i) * block.col_anchors + col, wide(tiles.height) * block.col_anchors,
        col < block.col_anchors,
    )  # fmt: skip
    reach = reach_of(bounds, PARTS)
    scale = scale_of(reach)
    keys = keys_of(s, scale)
    row_best, col_best = _best(keys, c, 1, FOLD), _once(_best(keys, r, 0, FOLD))
    put(rows, WORDS.best, row_best)
    put(cols, WORDS.best, col_best)
    if WORDS.semi is not None:
        top, floor = numbers.slack * reach, -2 * reach  # the floor is below all similarities, within the keys' range
        own = tl.load(s_pos.rows + row, mask=row < block.row_anchors, other=0)
        high, low = _between(own, numbers.margin, top, floor, scale)
        put(rows, WORDS.semi, _best_below(keys, c, high, low, 1, FOLD))
        own = tl.load(s_pos.cols + col, mask=col < block.col_anchors, other=0)
        high, low = _between(own, numbers.margin, top, floor, scale)
        put(cols, WORDS.semi, _best_below(keys, r, high, low, 0, FOLD))
    if LIN or EXP:
        least = threshold(bounds, PARTS)
        row_value, col_value = value_of(units_of(row_best), scale), value_of(units_of(col_best), scale)
        steep = tl.minimum(scale, 1099511627776.0) * 1152921504606846976.0  # above a limit means by more than 1 / steep
        valid = saturated(s, steep, -(least - tl.abs(least) * 1.2e-7) * steep)
    if LIN:
        # sums of the excess over `least`, times a power of two that keeps it below 1; a tie counts 4096 and a valid
        # negative 1: a tile has at most 256 of each
        top = tie_of(reach, numbers.slack)
        unit = tl.maximum(power(reach - least) * 0.0078125, 1.1754943508222875e-38)
        above = saturated(s, unit, -least * unit)
        put(rows, WORDS.lin_sum, bits(_sum(above, 1, FOLD) * (1.0 / unit)))
        put(cols, WORDS.lin_sum, bits(_sum(above, 0, FOLD) * (1.0 / unit)))
        equal = saturated(s, steep, ((top - row_value) * steep)[:, None])
        put(rows, WORDS.lin_count, bits(_sum(equal * 4096.0 + valid, 1, FOLD)))
        equal = saturated(s, steep, ((top - col_value) * steep)[None, :])
        put(cols, WORDS.lin_count, bits(_sum(equal * 4096.0 + valid, 0, FOLD)))
    if EXP:
        # the sum of each direction leaves out its own hardest negative
        rate = numbers.beta * 1.4426950408889634
        row_top, col_top = tl.maximum(row_value, least), tl.maximum(col_value, least)
        not_row = tl.where(c.to(tl.float32)[None, :] != place_of(row_best).to(tl.float32)[:, None], 1.0, 0.0)
        not_col = tl.where(r.to(tl.float32)[:, None] != place_of(col_best).to(tl.float32)[None, :], 1.0, 0.0)
        put(rows, WORDS.exp_count, bits(_sum(valid, 1, FOLD)))
        put(cols, WORDS.exp_count, bits(_sum(valid, 0, FOLD)))
        if WIDE > 0:
            of_row = _sum(not_row * (valid * exp2(rate * tl.minimum(s - row_top[:, None], 0.0))), 1, FOLD)
            of_col = _sum(not_col * (valid * exp2(rate * tl.minimum(s - col_top[None, :], 0.0))), 0, FOLD)
        else:  # both directions share an exponential, relative to an upper bound of the similarities
            shift = rate * reach
            e = exp2(rate * s - shift) * valid
            of_row = _sum(not_row * e, 1, FOLD) * exp2(shift - rate * row_top)
            of_col = _sum(not_col * e, 0, FOLD) * exp2(shift - rate * col_top)
        put(rows, WORDS.exp_sum, bits(of_row))
        put(cols, WORDS.exp_sum, bits(of_col))
