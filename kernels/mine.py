"""Mining on an accelerator: both directions' reductions of S from one pass over its tiles.

    pair     s⁺, min s⁺, max ‖x‖ and max ‖y‖                                 one read of x and y
    copy     aligned copies where rows are not; float16 ones, if the scan of float32 inputs is to run in them
    scan     tiles of S = x yᵀ in registers; each leaves a partial for its rows and one for its columns
    merge    the partials of many tiles → one for each anchor, with the few best candidates kept apart
    finish   the candidates' similarities computed as s⁺ is, exactly; the best of them; means over the valid sets;
             of a small batch it merges too

What a partial is, and why merging it only ever adds: docs/mathematics.md. Partials are int32 words, floats bitcast, in
a buffer [field, tile, anchor]; which fields there are follows from the request. Nothing here reads a value back.
"""

import triton
import triton.language as tl

INTERPRET: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOWEST: tl.constexpr = tl.constexpr(-(2**31))
_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
_NEVER: tl.constexpr = tl.constexpr(float("-inf"))  # the similarity of what is no negative
_NONE: tl.constexpr = tl.constexpr(-(2**30))  # key of no similarity; those of similarities are >= 0
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
SQUARE: tl.constexpr = tl.constexpr(1.8446742974197924e19)  # √ of it: the largest similarity with a square
_LIFT: tl.constexpr = tl.constexpr(2**28)  # keeps the key of -inf away from the least integer
KEPT = 4  # candidates of each anchor that are scored exactly


# ── numbers as ordered integers ─────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _wide(number):
    """A number, which may be one that Triton compiled in, as int64."""
    return tl.full([], 1, tl.int64) * number


@triton.jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _float(word):
    return word.to(tl.float32, bitcast=True)


@triton.jit
def _ordered(word):
    """Bits of a float ↔ an integer in the floats' order; its own inverse. A positive NaN is above all."""
    return word ^ ((word >> 31) & 0x7FFFFFFF)


@triton.jit
def _visible(value):
    """Bits of a float with every NaN positive, so that it wins a maximum of ordered integers."""
    return tl.where(value != value, _NAN, _bits(value))


# ── single similarities ─────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _similarities(x, row, x_row, x_col, y, col, y_row, y_col, on, D, BLOCK: tl.constexpr):  # fmt: skip
    """(B,) float32 S[row, col], the same bits for equal pairs wherever they stand; 0 where not `on`."""
    total = tl.zeros([row.shape[0], BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = on[:, None] & (at < D)[None, :]
        u = tl.load(x + row[:, None] * x_row + at[None, :] * x_col, mask=inside, other=0).to(tl.float32)
        v = tl.load(y + col[:, None] * y_row + at[None, :] * y_col, mask=inside, other=0).to(tl.float32)
        total += u * v
    return tl.sum(total, 1)


@triton.jit
def _norm(x, row, x_row, x_col, on, D, BLOCK: tl.constexpr):
    """(B,) ‖x‖ of rows, for any representable norm; NaN for a row that holds one."""
    largest = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = on[:, None] & (at < D)[None, :]
        u = tl.load(x + row[:, None] * x_row + at[None, :] * x_col, mask=inside, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(u), 1))
    unit = tl.where(largest > 0, largest, 1.0)
    total = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = on[:, None] & (at < D)[None, :]
        u = tl.load(x + row[:, None] * x_row + at[None, :] * x_col, mask=inside, other=0).to(tl.float32)
        u = u / unit[:, None]
        total += tl.sum(u * u, 1)
    return unit * tl.sqrt(total)


@triton.jit
def _leave(bounds, which, words, PARTS: tl.constexpr):
    if PARTS == 1:
        tl.atomic_max(bounds + which, tl.max(words, 0))
    else:
        tl.store(bounds + which * PARTS + tl.program_id(0), tl.max(words, 0))


@triton.jit
def pair(
    x, y, s_pos, bounds,
    N, M, K, D, x_row, x_col, y_row, y_col,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s⁺ (K,), and bounds (3, PARTS) int32: −min s⁺ as an ordered integer, the bits of max ‖x‖ and max ‖y‖.

    A single part begins as LOWEST; of several, each program writes its own, and who reads takes their maximum.
    """
    row = _wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    _leave(bounds, 1, _visible(_norm(x, row, x_row, x_col, row < N, D, BLOCK)), PARTS)
    _leave(bounds, 2, _visible(_norm(y, row, y_row, y_col, row < M, D, BLOCK)), PARTS)
    on = row < K
    s = _similarities(x, row, x_row, x_col, y, row, y_row, y_col, on, D, BLOCK)
    tl.store(s_pos + row, s, mask=on)
    _leave(bounds, 0, tl.where(on, _ordered(_visible(-s)), LOWEST), PARTS)


@triton.jit
def _bound(bounds, which, PARTS: tl.constexpr):
    if PARTS == 1:
        return tl.load(bounds + which)
    else:
        return tl.max(tl.load(bounds + which * PARTS + tl.arange(0, PARTS)), 0)


@triton.jit
def _threshold(bounds, PARTS: tl.constexpr = 1):
    """min s⁺ − 0.1: the similarity from which a negative is valid."""
    return -_float(_ordered(_bound(bounds, 0, PARTS))) - 0.1


@triton.jit
def _reach(bounds, PARTS: tl.constexpr = 1):
    """max ‖x‖ · max ‖y‖ ≥ every |s|, no larger than float32 holds."""
    return tl.minimum(_float(_bound(bounds, 1, PARTS)) * _float(_bound(bounds, 2, PARTS)), _LARGEST)


@triton.jit
def beyond(bounds, limit, PARTS: tl.constexpr = 1):
    """Whether a similarity may be larger than a limit."""
    return _float(_bound(bounds, 1, PARTS)) * _float(_bound(bounds, 2, PARTS)) > limit


@triton.jit
def lost(own, other, p_pos, p_neg):
    """Where a triplet's weights are not to be had in float32, so that a NaN has to show: `reference.lost`."""
    finite = (tl.abs(own) < float("inf")) & (tl.abs(other) < float("inf"))
    beyond = (tl.abs(own) > SQUARE) | (tl.abs(other) > SQUARE)
    return ~finite | (beyond & ((tl.abs(p_pos) >= SQUARE) | (tl.abs(p_neg) >= SQUARE)))


@triton.jit
def _poison(bounds, PARTS: tl.constexpr = 1):
    """0, or NaN where x or y holds a NaN or inf, which has to show."""
    x, y = _float(_bound(bounds, 1, PARTS)), _float(_bound(bounds, 2, PARTS))
    return (x - x) + (y - y)


@triton.jit
def _scale(reach):
    """Units of a key in 1: |s| · scale stays below 2²⁰. No larger than what has a normal reciprocal, 2¹²⁶."""
    return tl.minimum(_power(reach), 10384593717069655257060992658440192.0) * 8192.0


@triton.jit
def _tie(reach, slack):
    """Similarities closer than this are equal: slack · max ‖x‖ · max ‖y‖ down to a half between two units."""
    scale = _scale(reach)
    return (tl.floor(slack * reach * scale) + 0.5) * (1.0 / scale)


@triton.jit
def _power(length):
    """2ᵏ that brings a length into [64, 128); 1 for 0 and whatever is not finite."""
    exponent = (_bits(length) >> 23) & 0xFF
    shift = tl.minimum(tl.maximum(260 - exponent, 1), 254)
    return tl.where((exponent == 0) | (exponent == 255), 1.0, _float(shift << 23))


@triton.jit
def copy(
    x, out, length, N, D, width, x_row, x_col,
    HALVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies (N, width) of rows, 0 beyond D.

    HALVED: float16, times the power of two that suits the longest; `length` its bits.
    """
    row = _wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = (row < N)[:, None]
    u = tl.load(x + row[:, None] * x_row + at[None, :] * x_col, mask=here & (at < D)[None, :], other=0)
    if HALVED:
        u = (u * _power(_float(tl.load(length)))).to(tl.float16)
    tl.store(out + row[:, None] * width + at[None, :], u, mask=here & (at < width)[None, :])


@triton.jit
def scale_back(s, out, bounds, K, BLOCK: tl.constexpr):
    """(K,) similarities of 16-bit copies, without the powers of two that `copy` multiplied by."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    by = 1.0 / (_power(_float(tl.load(bounds + 1))) * _power(_float(tl.load(bounds + 2))))
    tl.store(out + at, tl.load(s + at, mask=at < K, other=0) * by, mask=at < K)


# ── the scan ────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _tile_of(program, height, width, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that what they load stays in the L2 cache."""
    in_group = GROUP * width
    first = (program // in_group) * GROUP
    size = tl.minimum(height - first, GROUP)
    return first + (program % in_group) % size, (program % in_group) // size


@triton.jit
def tile(
    x, y, first_row, first_col, N, M, D, x_row, x_col, y_row, y_col,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(HEIGHT, WIDTH) float32 of S; 0 beyond its edges. With TMA, x and y are tensor descriptors."""
    acc = tl.zeros([HEIGHT, WIDTH], tl.float32)
    if TMA:
        for start in range(0, D, DEPTH):
            a = x.load([first_row, start])
            b = y.load([first_col, start])
            acc = tl.dot(a, b.T, acc)
    else:
        row = first_row + tl.arange(0, HEIGHT)
        col = first_col + tl.arange(0, WIDTH)
        depth = tl.arange(0, DEPTH)
        p_x = x + row.to(tl.int64)[:, None] * x_row + depth[None, :] * x_col
        p_y = y + col.to(tl.int64)[None, :] * y_row + depth[:, None] * y_col
        for start in range(0, D, DEPTH):
            inside = depth + start < D
            a = tl.load(p_x, mask=(row < N)[:, None] & inside[None, :], other=0)
            b = tl.load(p_y, mask=(col < M)[None, :] & inside[:, None], other=0)
            if INTERPRET:  # its product of bfloat16 is wrong
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            p_x += DEPTH * x_col
            p_y += DEPTH * y_col
    return acc


@triton.jit
def negatives(s, row, col, ids, y_ids, N, M, K, IDS: tl.constexpr):
    """Where entries of a tile are negatives: inside S, no pair, ids that differ."""
    live = (row < N)[:, None] & (col < M)[None, :]
    live = live & ((row[:, None] != col[None, :]) | (row >= K)[:, None])
    if IDS:
        own = tl.load(ids + row, mask=row < N, other=0)
        other = tl.load(y_ids + col, mask=col < M, other=0)
        live = live & (own[:, None] != other[None, :])
    return live


@triton.jit
def _keys(s, scale):
    """Similarities as integers in their order, in units of 1 / scale, in the upper 24 bits of a word.

    Adding 1.5 · 2²³ leaves round(s · scale) in the lower bits of a float, of either sign; the shift drops the rest.
    """
    return _bits(s * scale + 12582912.0) << 8


@triton.jit
def _spread(t):
    """The rows of a tile, in two halves, laid so that a thread holds many rows of few columns.

    Where a product leaves it, a column lies in many threads, and reducing it would shuffle every column through all of
    them. tl.split wants the halves of a pair in one thread: that is what makes the compiler move the tile, once.
    """
    return tl.split(tl.permute(tl.reshape(t, [t.shape[0] // 2, 2, t.shape[1]]), (0, 2, 1)))


@triton.jit
def _own(t):
    """(rows of a thread, other rows, columns): of a product of four warps on sm_80 and sm_90, 8 and 64 rows apart."""
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
    """The same, and computed once: else the compiler makes a reduction again for every layout that it is used in."""
    if INTERPRET:
        return word
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [word], tl.int32, is_pure=False, pack=1)


@triton.jit
def _saturated(s, by, plus):
    """s · by + plus in [0, 1], in one instruction."""
    if INTERPRET:
        return tl.minimum(tl.maximum(s * by + plus, 0.0), 1.0)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [s, by, plus], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _best(keys, place, DIM: tl.constexpr, FOLD: tl.constexpr):
    """The largest key along DIM, the lowest place (< 256) among equals subtracted from it: one reduction finds both."""
    return _max(keys - (tl.expand_dims(place, 1 - DIM) - _LIFT), DIM, FOLD)


@triton.jit
def _best_below(keys, place, high, low, DIM: tl.constexpr, FOLD: tl.constexpr):
    """The same among keys above `low` and below `high`.

    As unsigned numbers, differences to `high` are largest just below it and small from it on.
    """
    high -= 255
    ahead = (keys - (tl.expand_dims(place, 1 - DIM) + tl.expand_dims(high, DIM))).to(tl.uint32, bitcast=True)
    best = _max(ahead, DIM, FOLD).to(tl.int32, bitcast=True)
    found = best + high
    return tl.where((best < 0) & (found > low), found + _LIFT, _NONE)


@triton.jit
def _place(best):
    return -best & 255


@triton.jit
def _units(best):
    """The similarity behind a key in units; < 0 where there is none."""
    return (best + 255) >> 8


@triton.jit
def _value(units, scale):
    """Units as a similarity, to within 1 / (2 scale)."""
    return (units - ((1 << 22) + (1 << 20))).to(tl.float32) * (1.0 / scale)


@triton.jit
def _exp2(z):
    """2ᶻ in one instruction; results below the normal numbers are 0."""
    if INTERPRET:
        return tl.exp2(z)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)


@triton.jit
def _put(out, field, stride, word, on):
    tl.store(out + field * stride, word, mask=on)


@triton.jit
def scan(
    x, y, ids, y_ids, s_pos, bounds, rows, cols,
    N, M, K, D, x_row, x_col, y_row, y_col, first, height, width, row_anchors,
    margin, slack, beta,
    IDS: tl.constexpr, SEMI: tl.constexpr, LIN: tl.constexpr, EXP: tl.constexpr, WIDE: tl.constexpr,
    HALVED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, FOLD: tl.constexpr,
    PARTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile of S: `rows` [field, width, row_anchors] and `cols` [field, height, K] get its partials.

    first: the first row of tiles of which there are `height`, each of `width` tiles; row_anchors of their rows are
    anchors. s_pos: of the arithmetic of the scan. margin: of semi-hard mining. slack: similarities closer than
    slack · max ‖x‖ · max ‖y‖ are equal. WIDE: 0 runs where one shift serves all exponents, 1 runs elsewhere,
    2 runs always. INNER: for counting instructions, a tile of negatives alone.
    """
    if EXP:  # noqa: SIM102
        if WIDE < 2 and (beta * (_reach(bounds, PARTS) - _threshold(bounds, PARTS)) >= 80.0) != (WIDE == 1):
            return  # the other launch does it
    i, j = _tile_of(tl.program_id(0), height, width, GROUP)
    first_row, first_col = (first + i) * HEIGHT, j * WIDTH
    s = tile(x, y, first_row, first_col, N, M, D, x_row, x_col, y_row, y_col, HEIGHT, WIDTH, DEPTH, PRECISION, TMA)
    if HALVED:
        by_x, by_y = _power(_float(tl.load(bounds + 1))), _power(_float(tl.load(bounds + 2)))
        back = 1.0 / (by_x * by_y)
    if not INNER:  # noqa: SIM102
        if beyond(bounds, _LARGEST, PARTS):  # what overflows is the best, for `finish` to compute it again and show it
            if HALVED:
                s = s * (1.0 / by_x) * (1.0 / by_y)
                back = tl.full([], 1.0, tl.float32)
            s = tl.maximum(tl.minimum(s, _LARGEST), -_LARGEST)
    if HALVED:
        s *= back
    r, c = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    row, col = first_row + r, first_col + c
    if IDS:
        own = tl.load(ids + row, mask=row < N, other=0)
        other = tl.load(y_ids + col, mask=col < M, other=0)
        s = tl.where(own[:, None] != other[None, :], s, _NEVER)
    if not INNER:
        edge = (first_row + HEIGHT > N) | (first_col + WIDTH > M)
        if edge | ((first_row < first_col + WIDTH) & (first_col < first_row + HEIGHT)):
            s = tl.where(negatives(s, row, col, ids, y_ids, N, M, K, False), s, _NEVER)

    anchor = i * HEIGHT + r
    is_row, is_col = anchor < row_anchors, col < K
    row_field, col_field = _wide(width) * row_anchors, _wide(height) * K
    rows += _wide(j) * row_anchors + anchor
    cols += _wide(i) * K + col
    reach = _reach(bounds, PARTS)
    scale = _scale(reach)
    keys = _keys(s, scale)
    row_best, col_best = _best(keys, c, 1, FOLD), _once(_best(keys, r, 0, FOLD))
    _put(rows, 0, row_field, row_best, is_row)
    _put(cols, 0, col_field, col_best, is_col)
    if SEMI:
        top, floor = slack * reach, -2 * reach  # below all similarities, and inside a key's range
        own = tl.load(s_pos + row, mask=row < K, other=0)
        low, high = _keys(tl.maximum(own - margin, floor), scale), _keys(own - top, scale)
        _put(rows, 1, row_field, _best_below(keys, c, high, low, 1, FOLD), is_row)
        own = tl.load(s_pos + col, mask=col < K, other=0)
        low, high = _keys(tl.maximum(own - margin, floor), scale), _keys(own - top, scale)
        _put(cols, 1, col_field, _best_below(keys, r, high, low, 0, FOLD), is_col)
    SUMS: tl.constexpr = 2 if SEMI else 1  # the field where they begin
    if LIN or EXP:
        least = _threshold(bounds, PARTS)
        row_value, col_value = _value(_units(row_best), scale), _value(_units(col_best), scale)
        steep = tl.minimum(scale, 1099511627776.0) * 1152921504606846976.0  # who is above a limit is so by > 1 / steep
        valid = _saturated(s, steep, -(least - tl.abs(least) * 1.2e-7) * steep)
    if LIN:
        # sums of what lies above `least`, in a power of two that keeps it below 1; a tie counts 4096 and a valid one 1:
        # there are no more of either than places, 256
        top = _tie(reach, slack)
        unit = tl.maximum(_power(reach - least) * 0.0078125, 1.1754943508222875e-38)
        above = _saturated(s, unit, -least * unit)
        _put(rows, SUMS, row_field, _bits(_sum(above, 1, FOLD) * (1.0 / unit)), is_row)
        _put(cols, SUMS, col_field, _bits(_sum(above, 0, FOLD) * (1.0 / unit)), is_col)
        equal = _saturated(s, steep, ((top - row_value) * steep)[:, None])
        _put(rows, SUMS + 1, row_field, _bits(_sum(equal * 4096.0 + valid, 1, FOLD)), is_row)
        equal = _saturated(s, steep, ((top - col_value) * steep)[None, :])
        _put(cols, SUMS + 1, col_field, _bits(_sum(equal * 4096.0 + valid, 0, FOLD)), is_col)
    if EXP:
        # each direction leaves its own hardest out while summing
        AT: tl.constexpr = SUMS + 2 if LIN else SUMS
        rate = beta * 1.4426950408889634
        row_top, col_top = tl.maximum(row_value, least), tl.maximum(col_value, least)
        not_row = tl.where(c.to(tl.float32)[None, :] != _place(row_best).to(tl.float32)[:, None], 1.0, 0.0)
        not_col = tl.where(r.to(tl.float32)[:, None] != _place(col_best).to(tl.float32)[None, :], 1.0, 0.0)
        _put(rows, AT, row_field, _bits(_sum(valid, 1, FOLD)), is_row)
        _put(cols, AT, col_field, _bits(_sum(valid, 0, FOLD)), is_col)
        if WIDE > 0:
            of_row = _sum(not_row * (valid * _exp2(rate * tl.minimum(s - row_top[:, None], 0.0))), 1, FOLD)
            of_col = _sum(not_col * (valid * _exp2(rate * tl.minimum(s - col_top[None, :], 0.0))), 0, FOLD)
        else:  # both directions share an exponential, relative to the largest similarity that there can be
            shift = rate * reach
            e = _exp2(rate * s - shift) * valid
            of_row = _sum(not_row * e, 1, FOLD) * _exp2(shift - rate * row_top)
            of_col = _sum(not_col * e, 0, FOLD) * _exp2(shift - rate * col_top)
        _put(rows, AT + 1, row_field, _bits(of_row), is_row)
        _put(cols, AT + 1, col_field, _bits(of_col), is_col)


# ── merging and finishing ───────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _insert(n, at, v0, v1, v2, v3, i0, i1, i2, i3):
    """The four best of five, in order; equal ones stay in the order of their coming. Last, the one that is left out."""
    b0, b1, b2, b3 = n > v0, n > v1, n > v2, n > v3
    out = tl.where(b3, v3, n)
    v3, i3 = tl.where(b2, v2, tl.where(b3, n, v3)), tl.where(b2, i2, tl.where(b3, at, i3))
    v2, i2 = tl.where(b1, v1, tl.where(b2, n, v2)), tl.where(b1, i1, tl.where(b2, at, i2))
    v1, i1 = tl.where(b0, v0, tl.where(b1, n, v1)), tl.where(b0, i0, tl.where(b1, at, i1))
    v0, i0 = tl.where(b0, n, v0), tl.where(b0, at, i0)
    return v0, v1, v2, v3, i0, i1, i2, i3, out


@triton.jit
def _get(buffer, field, stride, on, other):
    return tl.load(buffer + field * stride, mask=on, other=other)


@triton.jit
def _kept(state, stride, on):
    """Units and indices of the candidates that were kept; none where not `on`."""
    v0, v1 = _get(state, 0, stride, on, -1), _get(state, 1, stride, on, -1)
    v2, v3 = _get(state, 2, stride, on, -1), _get(state, 3, stride, on, -1)
    i0, i1 = _get(state, 4, stride, on, 0), _get(state, 5, stride, on, 0)
    i2, i3 = _get(state, 6, stride, on, 0), _get(state, 7, stride, on, 0)
    return v0, v1, v2, v3, i0, i1, i2, i3


@triton.jit
def _keep(state, stride, on, v0, v1, v2, v3, i0, i1, i2, i3):
    _put(state, 0, stride, v0, on)
    _put(state, 1, stride, v1, on)
    _put(state, 2, stride, v2, on)
    _put(state, 3, stride, v3, on)
    _put(state, 4, stride, i0, on)
    _put(state, 5, stride, i1, on)
    _put(state, 6, stride, i2, on)
    _put(state, 7, stride, i3, on)


@triton.jit
def _sums(state, stride, on, LIN: tl.constexpr, EXP: tl.constexpr):
    """Count, sum and ties of LIN; count and sum of EXP. 0 where not `on`, and what is not asked for."""
    AT: tl.constexpr = 3 if LIN else 0
    zero = tl.zeros([on.shape[0]], tl.float32)
    lin_count, lin_sum, ties, count, total = zero, zero, zero, zero, zero
    if LIN:
        lin_count, lin_sum = _float(_get(state, 0, stride, on, 0)), _float(_get(state, 1, stride, on, 0))
        ties = _float(_get(state, 2, stride, on, 0))
    if EXP:
        count, total = _float(_get(state, AT, stride, on, 0)), _float(_get(state, AT + 1, stride, on, 0))
    return lin_count, lin_sum, ties, count, total


@triton.jit
def _more(
    here, sums, field, on, tiles, anchors, begin, length, scale, least, tie, rate,
    v0, v1, v2, v3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total,
    LIN: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    """What is kept and summed, and the partials of `tiles` tiles of `length`, whose places begin at `begin`.

    here, sums: where the first tile's best key and its sums are.
    """
    AT: tl.constexpr = 2 if LIN else 0  # of the exponential sums
    for t in range(0, tiles):
        best = _get(here, 0, field, on, _NONE)
        n = _units(best)
        before = _value(v0, scale)
        fresh = v0 < 0
        v0, v1, v2, v3, i0, i1, i2, i3, out = _insert(
            n, begin + t * length + _place(best), v0, v1, v2, v3, i0, i1, i2, i3
        )
        if LIN:
            lin_sum += _float(_get(sums, 0, field, on, 0))
            counts = _float(_get(sums, 1, field, on, 0))
            more = tl.floor(counts * 0.000244140625)
            lin_count += counts - 4096.0 * more
            gap = _value(n, scale) - before
            ties = tl.where(fresh | (gap > tie), 0.0, ties) + tl.where((n >= 0) & (fresh | (gap >= -tie)), more, 0.0)
        if EXP:
            count += _float(_get(sums, AT, field, on, 0))
            top = tl.maximum(_value(v0, scale), least)
            own = _float(_get(sums, AT + 1, field, on, 0))
            total *= tl.exp2(rate * (tl.maximum(before, least) - top))
            total += own * tl.exp2(rate * (tl.maximum(_value(n, scale), least) - top))
            left = _value(out, scale)
            joins = (out >= 0) & (left >= least)
            total += tl.where(joins, tl.exp2(rate * tl.minimum(left - top, 0.0)), 0.0)
        here += anchors
        sums += anchors
    return v0, v1, v2, v3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total


@triton.jit
def merge(
    rows, cols, state, bounds, K, first, height, width, row_anchors, slack, beta,
    SEMI: tl.constexpr, LIN: tl.constexpr, EXP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partials of a row of tiles, or of a column of them, into `state` [field, 2, K].

    Fields: units and indices of the KEPT best; the same of the semi-hard; then counts and sums over everything but
    the KEPT. Rows are complete after their chunk of tiles; columns go on from chunk to chunk.
    """
    side = tl.program_id(1)
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if side == 0:
        part, tiles, anchors, skipped, length, begin = rows, width, row_anchors, first * HEIGHT, WIDTH, 0
    else:
        part, tiles, anchors, skipped, length, begin = cols, height, K, 0, HEIGHT, first * HEIGHT
    on = local < anchors
    field = _wide(tiles) * anchors
    stride = 2 * _wide(K)
    part += local
    state += _wide(side) * K + skipped + local
    old = on & (begin + tl.zeros([BLOCK], tl.int32) > 0)  # columns that go on; what is first begins
    reach, least, rate = _reach(bounds, PARTS), _threshold(bounds, PARTS), beta * 1.4426950408889634
    scale, tie = _scale(reach), _tie(reach, slack)
    FROM: tl.constexpr = 2 if SEMI else 1  # of the sums in a partial
    AT: tl.constexpr = 16 if SEMI else 8  # in the state
    v0, v1, v2, v3, i0, i1, i2, i3 = _kept(state, stride, old)
    lin_count, lin_sum, ties, count, total = _sums(state + AT * stride, stride, old, LIN, EXP)
    v0, v1, v2, v3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total = _more(
        part, part + FROM * field, field, on, tiles, anchors, begin, length, scale, least, tie, rate,
        v0, v1, v2, v3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total, LIN, EXP,
    )  # fmt: skip
    _keep(state, stride, on, v0, v1, v2, v3, i0, i1, i2, i3)
    if LIN:
        _put(state, AT, stride, _bits(lin_count), on)
        _put(state, AT + 1, stride, _bits(lin_sum), on)
        _put(state, AT + 2, stride, _bits(ties), on)
    if EXP:
        EXP_AT: tl.constexpr = AT + 3 if LIN else AT
        _put(state, EXP_AT, stride, _bits(count), on)
        _put(state, EXP_AT + 1, stride, _bits(total), on)
    if SEMI:
        v0, v1, v2, v3, i0, i1, i2, i3 = _kept(state + 8 * stride, stride, old)
        v0, v1, v2, v3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total = _more(
            part + field, part, field, on, tiles, anchors, begin, length, scale, least, tie, rate,
            v0, v1, v2, v3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total, False, False,
        )  # fmt: skip
        _keep(state + 8 * stride, stride, on, v0, v1, v2, v3, i0, i1, i2, i3)


@triton.jit
def _score(units, at, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK: tl.constexpr):
    """A kept candidate's exact similarity, and whether it was computed."""
    close = on & (units >= 0) & (units >= cut)
    at = at.to(tl.int64)
    row, col = tl.where(side == 0, anchor, at), tl.where(side == 0, at, anchor)
    return _similarities(x, row, x_row, x_col, y, col, y_row, y_col, close, D, BLOCK), close


@triton.jit
def _better(s, at, close, best, index, which, RANK: tl.constexpr):
    """The winner so far after one more candidate: the higher, the lower index among equals."""
    wins = close & ((s > best) | ((s == best) & (at < index)))
    return tl.where(wins, s, best), tl.where(wins, at, index), tl.where(wins, RANK, which)


@triton.jit
def _joins(units, s, which, top, least, rate, RANK: tl.constexpr):
    """exp(−β(s⁻ − s)) of a kept candidate that did not win, if it is valid."""
    return tl.where((units >= 0) & (which != RANK) & (s >= least), tl.exp2(rate * tl.minimum(s - top, 0.0)), 0.0)


@triton.jit
def finish(
    x, y, rows, cols, state, bounds, s_neg, negative, semi, semi_negative, r_lin, r_exp,
    K, D, x_row, x_col, y_row, y_col, height, width, slack, near, beta,
    SEMI: tl.constexpr, LIN: tl.constexpr, EXP: tl.constexpr, MERGES: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics, each (2, K). Exact is the best of the candidates within near · max ‖x‖ · max ‖y‖ of the best.

    MERGES: the partials of all tiles are merged here; else `state` holds what `merge` left.
    """
    side = tl.program_id(1)
    anchor = _wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    on = anchor < K
    stride = 2 * _wide(K)
    out = _wide(side) * K + anchor
    state += out
    reach, least, rate = _reach(bounds, PARTS), _threshold(bounds, PARTS), beta * 1.4426950408889634
    scale, tie = _scale(reach), _tie(reach, slack)
    if side == 0:
        part, tiles, length = rows, width, WIDTH
    else:
        part, tiles, length = cols, height, HEIGHT
    part += anchor
    field = _wide(tiles) * K
    FROM: tl.constexpr = 2 if SEMI else 1  # of the sums in a partial
    AT: tl.constexpr = 16 if SEMI else 8  # in the state
    known = on & (not MERGES)
    u0, u1, u2, u3, i0, i1, i2, i3 = _kept(state, stride, known)
    lin_count, lin_sum, ties, count, total = _sums(state + AT * stride, stride, known, LIN, EXP)
    if MERGES:
        u0, u1, u2, u3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total = _more(
            part, part + FROM * field, field, on, tiles, K, 0, length, scale, least, tie, rate,
            u0, u1, u2, u3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total, LIN, EXP,
        )  # fmt: skip
    close = (near * reach * scale).to(tl.int32) + 2
    cut = u0 - close
    if EXP:  # all of them: those that do not win join the sum
        cut = cut * 0
    s0, _ = _score(u0, i0, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK)
    s1, c1 = _score(u1, i1, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK)
    s2, c2 = _score(u2, i2, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK)
    s3, c3 = _score(u3, i3, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK)
    best, index, which = s0, i0, tl.zeros([ROWS], tl.int32)
    best, index, which = _better(s1, i1, c1, best, index, which, 1)
    best, index, which = _better(s2, i2, c2, best, index, which, 2)
    best, index, which = _better(s3, i3, c3, best, index, which, 3)
    poison = _poison(bounds, PARTS)  # a NaN or inf anywhere is in every maximum
    shown = tl.where(best == -float("inf"), float("nan"), best) + poison  # −inf says that there is no negative
    tl.store(s_neg + out, tl.where(u0 >= 0, shown, -float("inf")), mask=on)
    tl.store(negative + out, index.to(tl.int64), mask=on)
    if LIN:
        others = tl.maximum(lin_count - ties, 0.0)
        gap = best - least
        mean = tl.maximum(lin_count * gap - lin_sum, 0.0) / tl.maximum(others, 1.0)
        tl.store(r_lin + out, tl.where((u0 >= 0) & (gap >= 0) & (others > 0), mean, 0.0), mask=on)
    if EXP:
        top = tl.maximum(best, least)
        # the best is known to within a unit only now; in units of long rows that may be far
        shift = rate * (tl.maximum(_value(u0, scale), least) - top)
        total = tl.where(total > 0, total * tl.exp2(tl.minimum(shift, 126.0)), 0.0)
        total += _joins(u0, s0, which, top, least, rate, 0)
        total += _joins(u1, s1, which, top, least, rate, 1)
        total += _joins(u2, s2, which, top, least, rate, 2)
        total += _joins(u3, s3, which, top, least, rate, 3)
        count -= tl.where(best >= least, 1.0, 0.0)
        tl.store(
            r_exp + out,
            tl.where((u0 >= 0) & (count > 0), tl.minimum(total / tl.maximum(count, 1.0), 1.0), 0.0),
            mask=on,
        )
    if SEMI:
        u0, u1, u2, u3, i0, i1, i2, i3 = _kept(state + 8 * stride, stride, known)
        if MERGES:
            u0, u1, u2, u3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total = _more(
                part + field, part, field, on, tiles, K, 0, length, scale, least, tie, rate,
                u0, u1, u2, u3, i0, i1, i2, i3, lin_count, lin_sum, ties, count, total, False, False,
            )  # fmt: skip
        cut = u0 - close
        best, _ = _score(u0, i0, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK)
        s1, c1 = _score(u1, i1, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK)
        s2, c2 = _score(u2, i2, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK)
        s3, c3 = _score(u3, i3, anchor, side, on, cut, x, x_row, x_col, y, y_row, y_col, D, BLOCK)
        index, which = i0, tl.zeros([ROWS], tl.int32)
        best, index, which = _better(s1, i1, c1, best, index, which, 1)
        best, index, which = _better(s2, i2, c2, best, index, which, 2)
        best, index, which = _better(s3, i3, c3, best, index, which, 3)
        found = tl.where(u0 >= 0, best + poison, -float("inf"))
        tl.store(semi + out, tl.where(reach > SQUARE, float("nan"), found), mask=on)  # ties would hide what is none
        tl.store(semi_negative + out, index.to(tl.int64), mask=on)
