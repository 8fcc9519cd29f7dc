"""Objectives that meet all negatives, on an accelerator: their value, and G tile by tile.

    value          Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ), a number for each tile
    coefficients   a tile of G, written in 16 bit where the inputs have no more, and what its anchors' pairs get
    out_of_range   a NaN for anchors with similarities that float32 does not hold
    product        ∂l/∂x = G y and ∂l/∂y = Gᵀ x from the tiles of G, some rows of tiles at a time

T, P and l are the terms' own functions, lowered (lower.py). Either all anchors of both directions are met at once
(BOTH), or those of x→y that a list names, the first `count` of it: what lies beyond is launched and ends at once, so
that nobody waits for the count.
"""

import triton
import triton.language as tl

from goal.kernels.mine import INTERPRET, _float, _poison, _power, _tile_of, _wide, beyond, negatives


@triton.jit
def _similarities(
    x, y, row, col, here, inside, D, x_row, x_col, y_row, y_col, bounds,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, HALVED: tl.constexpr,
):  # fmt: skip
    """(HEIGHT, WIDTH) float32 of S at these rows and columns; 0 where they are not `here` and `inside`."""
    acc = tl.zeros([HEIGHT, WIDTH], tl.float32)
    depth = tl.arange(0, DEPTH)
    p_x = x + row[:, None] * x_row + depth[None, :] * x_col
    p_y = y + col[None, :] * y_row + depth[:, None] * y_col
    for start in range(0, D, DEPTH):
        deep = depth + start < D
        a = tl.load(p_x, mask=here[:, None] & deep[None, :], other=0)
        b = tl.load(p_y, mask=inside[None, :] & deep[:, None], other=0)
        if INTERPRET:  # its product of bfloat16 is wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        p_x += DEPTH * x_col
        p_y += DEPTH * y_col
    if HALVED:
        acc *= 1.0 / (_power(_float(tl.load(bounds + 1))) * _power(_float(tl.load(bounds + 2))))
    return acc


@triton.jit
def _relative(relative, field, side, at, on, K):
    """(A,) one of the four relative similarities (4, 2, K) of some anchors."""
    return tl.load(relative + (2 * field + side) * _wide(K) + at, mask=on, other=0)


@triton.jit
def _share(share, side, at, on, K, bounds):
    """(A,) what each negative of these anchors weighs; NaN where x or y holds a NaN or inf."""
    return tl.load(share + side * _wide(K) + at, mask=on, other=0) + tl.where(on, _poison(bounds), 0.0)


@triton.jit
def out_of_range(
    x, y, ids, y_ids, bounds, share,
    N, M, K, D, x_row, x_col, y_row, y_col, height, width, limit,
    IDS: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """NaN into share (2, K) where an anchor meets a similarity beyond a limit; ends at once where none can be."""
    if not beyond(bounds, limit):
        return
    i, j = _tile_of(tl.program_id(0), height, width, GROUP)
    row, col = _wide(i) * HEIGHT + tl.arange(0, HEIGHT), _wide(j) * WIDTH + tl.arange(0, WIDTH)
    s = _similarities(
        x, y, row, col, row < N, col < M, D, x_row, x_col, y_row, y_col, bounds, HEIGHT, WIDTH, DEPTH, PRECISION, HALVED
    )
    met = negatives(s, row, col, ids, y_ids, N, M, K, IDS) | (row[:, None] == col[None, :])
    bad = tl.where(met & ~(tl.abs(s) <= limit), 1, 0)
    nan = tl.full([HEIGHT], float("nan"), tl.float32)
    met_by = (tl.max(bad, 1) > 0) & (row < K)
    tl.store(share + row, nan, mask=met_by & (tl.load(share + row, mask=row < K, other=0) != 0))
    nan = tl.full([WIDTH], float("nan"), tl.float32)
    met_by = (tl.max(bad, 0) > 0) & (col < K)
    tl.store(share + K + col, nan, mask=met_by & (tl.load(share + K + col, mask=col < K, other=0) != 0))


@triton.jit
def value(
    x, y, ids, y_ids, s_pos, share, bounds, listed, count, out,
    N, M, K, D, x_row, x_col, y_row, y_col, first, height, width, side,
    p0, p1, p2, p3, p4, p5, p6, p7,
    VALUE: tl.constexpr, BOTH: tl.constexpr, IDS: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (height · width,): the tile's part of the value. `side`: which of share (2, K) belongs to the listed rows."""
    i, j = _tile_of(tl.program_id(0), height, width, GROUP)
    place, col = (first + i) * HEIGHT + tl.arange(0, HEIGHT), _wide(j) * WIDTH + tl.arange(0, WIDTH)
    if BOTH:
        row, here = _wide(0) + place, place < N
    else:
        if (first + i) * HEIGHT >= tl.load(count):
            tl.store(out + _wide(i) * width + j, 0.0)
            return
        here = place < tl.load(count)
        row = tl.load(listed + place, mask=here, other=0)
    s = _similarities(
        x, y, row, col, here, col < M, D, x_row, x_col, y_row, y_col, bounds, HEIGHT, WIDTH, DEPTH, PRECISION, HALVED
    )
    live = negatives(s, row, col, ids, y_ids, N, M, K, IDS) & here[:, None]
    on = here & (row < K)
    weight = _share(share, side, row, on, K, bounds)[:, None]
    own = tl.load(s_pos + row, mask=on, other=0)[:, None]
    loss = weight * VALUE(own, s, 0.0, 0.0, 0.0, 0.0, p0, p1, p2, p3, p4, p5, p6, p7)
    if BOTH:
        on = col < K
        weight = _share(share, 1, col, on, K, bounds)[None, :]
        own = tl.load(s_pos + col, mask=on, other=0)[None, :]
        loss += weight * VALUE(own, s, 0.0, 0.0, 0.0, 0.0, p0, p1, p2, p3, p4, p5, p6, p7)
    tl.store(out + _wide(i) * width + j, tl.sum(tl.where(live, loss, 0.0)))


@triton.jit
def coefficients(
    x, y, ids, y_ids, s_pos, share, relative, bounds, listed, count, w, scales, pull_rows, pull_cols,
    N, M, K, D, x_row, x_col, y_row, y_col, w_row, first, height, width, side,
    p0, p1, p2, p3, p4, p5, p6, p7,
    WEIGHTS: tl.constexpr, BOTH: tl.constexpr, IDS: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of G into w (height · HEIGHT, w_row), times scales (height, width) if SCALED.

    pull_rows (width, K) at the listed places, pull_cols (height, K): what the tile takes from the pairs of its anchors.
    """
    i, j = _tile_of(tl.program_id(0), height, width, GROUP)
    place, col = (first + i) * HEIGHT + tl.arange(0, HEIGHT), _wide(j) * WIDTH + tl.arange(0, WIDTH)
    if BOTH:
        row, here = _wide(0) + place, place < N
    else:
        if (first + i) * HEIGHT >= tl.load(count):
            return
        here = place < tl.load(count)
        row = tl.load(listed + place, mask=here, other=0)
    s = _similarities(
        x, y, row, col, here, col < M, D, x_row, x_col, y_row, y_col, bounds, HEIGHT, WIDTH, DEPTH, PRECISION, HALVED
    )
    live = negatives(s, row, col, ids, y_ids, N, M, K, IDS) & here[:, None]
    on = here & (row < K)
    own = tl.load(s_pos + row, mask=on, other=0)[:, None]
    r0 = _relative(relative, 0, side, row, on, K)[:, None]
    r1 = _relative(relative, 1, side, row, on, K)[:, None]
    r2 = _relative(relative, 2, side, row, on, K)[:, None]
    r3 = _relative(relative, 3, side, row, on, K)[:, None]
    t, p_pos, p_neg = WEIGHTS(own, s, r0, r1, r2, r3, p0, p1, p2, p3, p4, p5, p6, p7)
    selected = tl.where(live & on[:, None], _share(share, side, row, on, K, bounds)[:, None] * t, 0.0)
    tl.store(pull_rows + _wide(j) * K + place, tl.sum(selected * p_pos, 1), mask=here & (place < K))
    g = selected * p_neg
    if BOTH:
        on = col < K
        own = tl.load(s_pos + col, mask=on, other=0)[None, :]
        r0 = _relative(relative, 0, 1, col, on, K)[None, :]
        r1 = _relative(relative, 1, 1, col, on, K)[None, :]
        r2 = _relative(relative, 2, 1, col, on, K)[None, :]
        r3 = _relative(relative, 3, 1, col, on, K)[None, :]
        t, p_pos, p_neg = WEIGHTS(own, s, r0, r1, r2, r3, p0, p1, p2, p3, p4, p5, p6, p7)
        selected = tl.where(live & on[None, :], _share(share, 1, col, on, K, bounds)[None, :] * t, 0.0)
        tl.store(pull_cols + _wide(i) * K + col, tl.sum(selected * p_pos, 0), mask=on)
        g += selected * p_neg
    if SCALED:  # float16 has few exponents: the tile's largest coefficient goes near 100
        power = _power(tl.max(tl.abs(g)))
        tl.store(scales + _wide(i) * width + j, 1.0 / power)
        g *= power
    at = _wide(i) * HEIGHT + tl.arange(0, HEIGHT)
    tl.store(w + at[:, None] * w_row + col[None, :], g.to(w.dtype.element_ty))


@triton.jit
def product(
    w, scales, other, out, bounds, listed, count,
    targets, sources, D, w_target, w_source, o_row, o_col, scale_target, scale_source,
    first_target, first_source, length,
    LISTED: tl.constexpr, SCALED: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
    TARGETS: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TARGETS rows of out (·, D) float32, BLOCK of their columns: += Σ over sources of w · other[source].

    Targets and sources count within w; `first_target` and `first_source` say where w begins. LISTED: whether the
    "targets" or the "sources" are places of the list, of which there are `count`. length: which of bounds scaled other.
    """
    t = tl.program_id(0)
    target, column = t * TARGETS + tl.arange(0, TARGETS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if LISTED == "targets":
        targets = tl.minimum(targets, tl.load(count) - first_target)
    if LISTED == "sources":
        sources = tl.minimum(sources, tl.load(count) - first_source)
    if (t * TARGETS >= targets) | (sources <= 0):
        return
    total = tl.zeros([TARGETS, BLOCK], tl.float32)
    for step in range(0, tl.cdiv(sources, SOURCES)):
        source = step * SOURCES + tl.arange(0, SOURCES)
        on = source < sources
        at = _wide(first_source) + source
        if LISTED == "sources":
            at = tl.load(listed + at, mask=on, other=0)
        inside = (target < targets)[:, None] & on[None, :]
        p_w = w + target[:, None] * _wide(w_target) + source[None, :] * _wide(w_source)
        g = tl.load(p_w, mask=inside, other=0)
        inside = on[:, None] & (column < D)[None, :]
        rows = tl.load(other + at[:, None] * o_row + column[None, :] * o_col, mask=inside, other=0)
        if INTERPRET:
            g, rows = g.to(tl.float32), rows.to(tl.float32)
        part = tl.dot(g, rows, input_precision=PRECISION)
        if SCALED:
            part *= tl.load(scales + _wide(t) * scale_target + step * scale_source)
        total += part
    if HALVED:
        total *= 1.0 / _power(_float(tl.load(bounds + length)))
    to = _wide(first_target) + target
    if LISTED == "targets":
        to = tl.load(listed + to, mask=target < targets, other=0)
    p_out = out + to[:, None] * D + column[None, :]
    inside = (target < targets)[:, None] & (column < D)[None, :]
    tl.store(p_out, total + tl.load(p_out, mask=inside, other=0), mask=inside)
