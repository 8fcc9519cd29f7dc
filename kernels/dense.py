"""Objectives with all negatives, on an accelerator: their value, and G tile by tile.

    value          Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ), a number for each tile
    coefficients   a tile of G, stored in 16 bit if the inputs have no more, and its part of G at the anchors' pairs
    out_of_range   a NaN for anchors with similarities beyond the range of float32
    product        ∂l/∂x = G y and ∂l/∂y = Gᵀ x from the tiles of G, some rows of tiles at a time

T, P and l are the terms' own functions, lowered (lower.py). The kernels process either all anchors of both directions
(`listed` is None), or the first `count` anchors of x→y in a list. The host does not wait for the count: programs beyond
it are launched too and end at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from goal.kernels.bits import beyond, halving, poison, power, unhalving, wide
from goal.kernels.tile import dot, negatives, pairs_in, tile_of, zeros
from goal.kernels.weigh import Relative, equation


class Anchors(NamedTuple):
    """Data of one side's anchors in a block: pointers to the first anchor's."""

    s_pos: Any
    share: Any  # weight of each of their negatives
    relative: Any  # Relative


class Listed(NamedTuple):
    """A list in which the dense anchors come first, and a pointer to their number."""

    anchors: Any
    count: Any


class Pulls(NamedTuple):
    """Pulls of tiles at the pairs of their anchors."""

    rows: Any  # (width, row_anchors), at the positions in the list
    cols: Any  # (height, col_anchors)


class Range(NamedTuple):
    """Targets and sources of a product, counted within w, and the offsets of w; D features."""

    targets: Any
    sources: Any
    first_target: Any
    first_source: Any
    D: Any


# ── tiles of any rows ───────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _similarities(x, y, row, col, here, inside, D, bounds, CUT: tl.constexpr, ARITHMETIC: tl.constexpr):
    """(height, width) float32 of S at these rows and columns; 0 where not `here` or not `inside`."""
    acc = zeros(CUT)
    depth = tl.arange(0, CUT.depth)
    p_x = x.at + row[:, None] * x.row + depth[None, :] * x.col
    p_y = y.at + col[None, :] * y.row + depth[:, None] * y.col
    for start in range(0, D, CUT.depth):
        deep = depth + start < D
        a = tl.load(p_x, mask=here[:, None] & deep[None, :], other=0)
        b = tl.load(p_y, mask=inside[None, :] & deep[:, None], other=0)
        acc = dot(a, b, acc, ARITHMETIC)
        p_x += CUT.depth * x.col
        p_y += CUT.depth * y.col
    if ARITHMETIC == "halved":
        acc *= unhalving(bounds)
    return acc


@triton.jit
def _rows(listed, place, block):
    """The rows at some positions, and whether they exist."""
    if listed is None:
        row, here = wide(0) + place, place < block.N
    else:
        here = place < tl.load(listed.count)
        row = tl.load(listed.anchors + place, mask=here, other=0)
    return row, here


@triton.jit
def _share(anchors, at, on, bounds):
    """(A,) the weight of each negative of these anchors; NaN if x or y has a NaN or inf."""
    return tl.load(anchors.share + at, mask=on, other=0) + tl.where(on, poison(bounds), 0.0)


@triton.jit
def _one(relative, at, on, AXIS: tl.constexpr):
    """A relative similarity of some anchors, broadcast along AXIS; a dummy 0 if no term reads it."""
    if relative is None:
        return 0.0
    else:
        return tl.expand_dims(tl.load(relative + at, mask=on, other=0), AXIS)


@triton.jit
def _relative(anchors, at, on, AXIS: tl.constexpr):
    of = anchors.relative
    return Relative(
        _one(of.r_pos_lin, at, on, AXIS), _one(of.r_neg_lin, at, on, AXIS),
        _one(of.r_pos_exp, at, on, AXIS), _one(of.r_neg_exp, at, on, AXIS),
    )  # fmt: skip


@triton.jit
def out_of_range(x, y, ids, bounds, shares, block, tiles, limit, ARITHMETIC: tl.constexpr, CUT: tl.constexpr):
    """Write NaN into the shares of anchors with a similarity beyond a limit; return at once if there can be none."""
    if not beyond(bounds, limit):
        return
    i, j = tile_of(tl.program_id(0), tiles.height, tiles.width)
    row, first_col, c = wide(i) * CUT.height + tl.arange(0, CUT.height), wide(j) * CUT.width, tl.arange(0, CUT.width)
    col = first_col + c
    s = _similarities(x, y, row, col, row < block.N, col < block.M, block.D, bounds, CUT, ARITHMETIC)
    pair = pairs_in(row, first_col, block)[:, None] == c[None, :]
    met = negatives(row, first_col, ids, block, CUT.width) | pair
    bad = tl.where(met & ~(tl.abs(s) <= limit), 1, 0)
    on = row < block.row_anchors
    share = tl.load(shares.rows + row, mask=on, other=0)
    tl.store(shares.rows + row, float("nan"), mask=(tl.max(bad, 1) > 0) & on & (share != 0))
    on = col < block.col_anchors
    share = tl.load(shares.cols + col, mask=on, other=0)
    tl.store(shares.cols + col, float("nan"), mask=(tl.max(bad, 0) > 0) & on & (share != 0))


# ── the value ───────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _losses(anchors, at, on, s, bounds, numbers, VALUE: tl.constexpr, AXIS: tl.constexpr):
    """The losses of a tile in one direction, at all entries, negatives or not."""
    weight = tl.expand_dims(_share(anchors, at, on, bounds), AXIS)
    own = tl.expand_dims(tl.load(anchors.s_pos + at, mask=on, other=0), AXIS)
    return weight * VALUE(own, s, 0.0, 0.0, 0.0, 0.0, *numbers)


@triton.jit
def value(
    x, y, ids, rows, cols, bounds, listed, out, block, tiles, numbers,
    VALUE: tl.constexpr, ARITHMETIC: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """out (height · width,): the tile's part of the value. rows, cols: Anchors."""
    i, j = tile_of(tl.program_id(0), tiles.height, tiles.width)
    begin = (tiles.first + i) * CUT.height
    if listed is not None:  # noqa: SIM102
        if begin >= tl.load(listed.count):
            tl.store(out + wide(i) * tiles.width + j, 0.0)
            return
    place, first_col = begin + tl.arange(0, CUT.height), wide(j) * CUT.width
    col = first_col + tl.arange(0, CUT.width)
    row, here = _rows(listed, place, block)
    s = _similarities(x, y, row, col, here, col < block.M, block.D, bounds, CUT, ARITHMETIC)
    live = negatives(row, first_col, ids, block, CUT.width) & here[:, None]
    loss = _losses(rows, row, here & (row < block.row_anchors), s, bounds, numbers, VALUE, 1)
    if listed is None:
        loss += _losses(cols, col, col < block.col_anchors, s, bounds, numbers, VALUE, 0)
    tl.store(out + wide(i) * tiles.width + j, tl.sum(tl.where(live, loss, 0.0)))


# ── the gradient ────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _entries(anchors, at, on, s, live, bounds, numbers, WEIGHTS: tl.constexpr, AXIS: tl.constexpr):
    """A tile's entries of G in one direction: (pull, push), both of the tile's shape; pull is negated."""
    own = tl.expand_dims(tl.load(anchors.s_pos + at, mask=on, other=0), AXIS)
    weights = WEIGHTS(own, s, *_relative(anchors, at, on, AXIS), *numbers)
    share = tl.expand_dims(_share(anchors, at, on, bounds), AXIS)
    return equation(weights, share, live & tl.expand_dims(on, AXIS))


@triton.jit
def coefficients(
    x, y, ids, rows, cols, bounds, listed, w, scales, pulls, block, tiles, numbers,
    WEIGHTS: tl.constexpr, ARITHMETIC: tl.constexpr, SCALED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Write a tile of G into w (if SCALED, G = w · scales, (height, width)), and its pulls. rows, cols: Anchors."""
    i, j = tile_of(tl.program_id(0), tiles.height, tiles.width)
    begin = (tiles.first + i) * CUT.height
    if listed is not None:  # noqa: SIM102
        if begin >= tl.load(listed.count):
            return
    place, first_col = begin + tl.arange(0, CUT.height), wide(j) * CUT.width
    col = first_col + tl.arange(0, CUT.width)
    row, here = _rows(listed, place, block)
    s = _similarities(x, y, row, col, here, col < block.M, block.D, bounds, CUT, ARITHMETIC)
    live = negatives(row, first_col, ids, block, CUT.width) & here[:, None]
    on = here & (row < block.row_anchors)
    pull, g = _entries(rows, row, on, s, live, bounds, numbers, WEIGHTS, 1)
    tl.store(pulls.rows + wide(j) * block.row_anchors + place, tl.sum(pull, 1), mask=on)
    if listed is None:
        on = col < block.col_anchors
        pull, push = _entries(cols, col, on, s, live, bounds, numbers, WEIGHTS, 0)
        tl.store(pulls.cols + wide(i) * block.col_anchors + col, tl.sum(pull, 0), mask=on)
        g += push
    if SCALED:  # float16 has few exponents: the tile's largest coefficient is scaled to near 100
        by = power(tl.max(tl.abs(g)))
        tl.store(scales + wide(i) * tiles.width + j, 1.0 / by)
        g *= by
    at = wide(i) * CUT.height + tl.arange(0, CUT.height)
    tl.store(w.at + at[:, None] * w.row + col[None, :] * w.col, g.to(w.at.dtype.element_ty))


@triton.jit
def product(
    w, scales, other, out, length, listed, size,
    LISTED: tl.constexpr, SCALED: tl.constexpr, ARITHMETIC: tl.constexpr,
    TARGETS: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TARGETS rows of out (·, D) float32, BLOCK of their columns: += Σ over sources of w · other[source].

    w, scales: matrices (target, source), of entries and of tiles. LISTED: whether the "targets" or the "sources" are
    positions in the list. length: the norm that gave the scale of `other`, see `bits.halving`.
    """
    t = tl.program_id(0)
    target, column = t * TARGETS + tl.arange(0, TARGETS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    targets, sources = size.targets, size.sources
    if LISTED == "targets":
        targets = tl.minimum(targets, tl.load(listed.count) - size.first_target)
    if LISTED == "sources":
        sources = tl.minimum(sources, tl.load(listed.count) - size.first_source)
    if (t * TARGETS >= targets) | (sources <= 0):
        return
    total = tl.zeros([TARGETS, BLOCK], tl.float32)
    for step in range(0, tl.cdiv(sources, SOURCES)):
        source = step * SOURCES + tl.arange(0, SOURCES)
        on = source < sources
        at = wide(size.first_source) + source
        if LISTED == "sources":
            at = tl.load(listed.anchors + at, mask=on, other=0)
        inside = (target < targets)[:, None] & on[None, :]
        p_w = w.at + target[:, None] * wide(w.row) + source[None, :] * wide(w.col)
        g = tl.load(p_w, mask=inside, other=0)
        inside = on[:, None] & (column < size.D)[None, :]
        rows = tl.load(other.at + at[:, None] * other.row + column[None, :] * other.col, mask=inside, other=0)
        part = dot(g, rows, tl.zeros([TARGETS, BLOCK], tl.float32), ARITHMETIC)
        if SCALED:
            part *= tl.load(scales.at + wide(t) * scales.row + step * scales.col)
        total += part
    if ARITHMETIC == "halved":
        total *= 1.0 / halving(length)
    to = wide(size.first_target) + target
    if LISTED == "targets":
        to = tl.load(listed.anchors + to, mask=target < targets, other=0)
    p_out = out + to[:, None] * size.D + column[None, :]
    inside = (target < targets)[:, None] & (column < size.D)[None, :]
    tl.store(p_out, total + tl.load(p_out, mask=inside, other=0), mask=inside)
