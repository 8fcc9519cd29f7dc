"""Representations of numbers in kernels: ordered integers, keys of a similarity and its position, bounds of a batch.

Nothing here knows of tiles or matrices. Bounds (3, PARTS) int32 are the result of `tile.pair` for a batch: −min s⁺ as
an ordered integer, and the bits of max ‖x‖ and of max ‖y‖. If there are several parts, their maximum counts, and the
reader takes it.
"""

import triton
import triton.language as tl

INTERPRET: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOWEST: tl.constexpr = tl.constexpr(-(2**31))
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
SQUARE: tl.constexpr = tl.constexpr(1.8446742974197924e19)  # √LARGEST: the largest similarity whose square is finite
NO_KEY: tl.constexpr = tl.constexpr(-(2**30))  # the key if there is no similarity; keys of similarities are >= 0
LIFT: tl.constexpr = tl.constexpr(2**28)  # keeps the key of -inf away from the lowest integer
_NAN: tl.constexpr = tl.constexpr(0x7FC00000)


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def wide(number):
    """A number, which may be a compile-time constant, as int64."""
    return tl.full([], 1, tl.int64) * number


@triton.jit
def bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def real(word):
    """The float with the bits of a word."""
    return word.to(tl.float32, bitcast=True)


@triton.jit
def ordered(word):
    """Bits of a float ↔ an integer in the floats' order; its own inverse. A positive NaN is above all."""
    return word ^ ((word >> 31) & 0x7FFFFFFF)


@triton.jit
def visible(value):
    """Bits of a float with every NaN positive, so that it wins a maximum of ordered integers."""
    return tl.where(value != value, _NAN, bits(value))


@triton.jit
def exp2(z):
    """2ᶻ in one instruction; results below the normal numbers are 0."""
    if INTERPRET:
        return tl.exp2(z)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)


@triton.jit
def saturated(s, by, plus):
    """s · by + plus in [0, 1], in one instruction."""
    if INTERPRET:
        return tl.minimum(tl.maximum(s * by + plus, 0.0), 1.0)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [s, by, plus], tl.float32, is_pure=True, pack=1
        )


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def bound(bounds, which, PARTS: tl.constexpr = 1):
    if PARTS == 1:
        return tl.load(bounds + which)
    else:
        return tl.max(tl.load(bounds + which * PARTS + tl.arange(0, PARTS)), 0)


@triton.jit
def threshold(bounds, PARTS: tl.constexpr = 1):
    """min s⁺ − 0.1: the similarity from which a negative is valid for the sums."""
    return -real(ordered(bound(bounds, 0, PARTS))) - 0.1


@triton.jit
def reach_of(bounds, PARTS: tl.constexpr = 1):
    """max ‖x‖ · max ‖y‖ ≥ every |s|, clamped to the largest float32."""
    return tl.minimum(real(bound(bounds, 1, PARTS)) * real(bound(bounds, 2, PARTS)), LARGEST)


@triton.jit
def beyond(bounds, limit, PARTS: tl.constexpr = 1):
    """Whether a similarity may exceed a limit."""
    return real(bound(bounds, 1, PARTS)) * real(bound(bounds, 2, PARTS)) > limit


@triton.jit
def poison(bounds, PARTS: tl.constexpr = 1):
    """0, or NaN if x or y has a NaN or inf, which has to show."""
    x, y = real(bound(bounds, 1, PARTS)), real(bound(bounds, 2, PARTS))
    return (x - x) + (y - y)


@triton.jit
def lost(own, other, p_pos, p_neg):
    """Where the weights of triplets cannot be computed in float32, so that a NaN has to show; see `range.lost`."""
    finite = (tl.abs(own) < float("inf")) & (tl.abs(other) < float("inf"))
    beyond = (tl.abs(own) > SQUARE) | (tl.abs(other) > SQUARE)
    return ~finite | (beyond & ((tl.abs(p_pos) >= SQUARE) | (tl.abs(p_neg) >= SQUARE)))


# ── powers of two ───────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def power(length):
    """2ᵏ that scales a length into [64, 128); 1 for 0 and non-finite lengths."""
    exponent = (bits(length) >> 23) & 0xFF
    shift = tl.minimum(tl.maximum(260 - exponent, 1), 254)
    return tl.where((exponent == 0) | (exponent == 255), 1.0, real(shift << 23))


@triton.jit
def halving(length):
    """The factor of rows in a 16-bit copy; `length` points to the bits of the longest row's norm."""
    return power(real(tl.load(length)))


@triton.jit
def unhalving(bounds):
    """The factor that turns similarities of 16-bit copies into those of the original rows."""
    return 1.0 / (halving(bounds + 1) * halving(bounds + 2))


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def scale_of(reach):
    """Key units in 1: |s| · scale stays below 2²⁰. At most 2¹²⁶, the largest number with a normal reciprocal."""
    return tl.minimum(power(reach), 10384593717069655257060992658440192.0) * 8192.0


@triton.jit
def tie_of(reach, slack):
    """Similarities closer than this are equal: slack · max ‖x‖ · max ‖y‖, rounded down to a unit, plus half a unit."""
    scale = scale_of(reach)
    return (tl.floor(slack * reach * scale) + 0.5) * (1.0 / scale)


@triton.jit
def keys_of(s, scale):
    """Similarities as integers in their order, in units of 1 / scale, in the upper 24 bits of a word.

    Adding 1.5 · 2²³ leaves round(s · scale) in the lower bits of a float, of either sign; the shift drops the rest.
    """
    return bits(s * scale + 12582912.0) << 8


@triton.jit
def place_of(best):
    """The position (< 256) that was subtracted from a key."""
    return -best & 255


@triton.jit
def units_of(best):
    """The similarity of a key, in units; < 0 if there is none."""
    return (best + 255) >> 8


@triton.jit
def value_of(units, scale):
    """Units as a similarity, to within 1 / (2 scale)."""
    return (units - ((1 << 22) + (1 << 20))).to(tl.float32) * (1.0 / scale)
