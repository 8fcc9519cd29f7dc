"""Tiles of S and single similarities, through which all other kernels read x and y.

    pair     s⁺, min s⁺, max ‖x‖ and max ‖y‖, in a single read of x and y
    copy     aligned copies of unaligned rows; float16 copies, if the scan of float32 inputs runs in float16

The named tuples are the arguments of kernels: a launch makes them, and a helper takes such a tuple as an argument.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from goal.kernels.bits import INTERPRET, LOWEST, halving, ordered, unhalving, visible, wide

GROUP: tl.constexpr = tl.constexpr(8)  # rows of tiles that are processed together


class Matrix(NamedTuple):
    """A matrix in memory: a pointer and the strides of its rows and columns."""

    at: Any
    row: Any
    col: Any


class Sides(NamedTuple):
    """A pair of values: for x→y, or the rows of S; and for y→x, or the columns of S."""

    rows: Any
    cols: Any


class Block(NamedTuple):
    """A block of S. Kernels count rows and columns from its first ones. If it is all of S, the last three are None."""

    N: Any  # rows
    M: Any  # columns
    D: Any
    row_anchors: Any  # number of rows that are anchors of x→y; they come first
    col_anchors: Any  # number of columns that are anchors of y→x; they come first
    row_offset: Any  # global index of the first row
    col_offset: Any  # global index of the first column
    ahead: Any  # the pair of row i is column i + ahead, which may lie outside the block


class Tiles(NamedTuple):
    """Some rows of tiles of a block."""

    first: Any  # index of the first row of tiles
    height: Any  # number of rows of tiles
    width: Any  # number of tiles in a row of tiles
    anchors: Any  # number of their rows that are anchors


class Cut(NamedTuple):
    """Rows and columns of a tile, and the number of features loaded at once; compile-time constants."""

    height: int
    width: int
    depth: int


# ── tiles ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def tile_of(program, height, width):
    """Row and column of a program's tile: GROUP rows of tiles together, so that their loads stay in the L2 cache."""
    in_group = GROUP * width
    first = (program // in_group) * GROUP
    size = tl.minimum(height - first, GROUP)
    return first + (program % in_group) % size, (program % in_group) // size


@triton.jit
def dot(a, b, acc, ARITHMETIC: tl.constexpr):
    """acc + a b, in `ieee`, or in the tensor-core arithmetic of the operands' dtype."""
    if INTERPRET:  # the interpreter's product of bfloat16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    PRECISION: tl.constexpr = "ieee" if ARITHMETIC == "ieee" else "tf32"
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def zeros(CUT: tl.constexpr):
    """A tile of zeros, float32."""
    HEIGHT: tl.constexpr = CUT.height  # a field of what is compiled in cannot stand in a list, before Triton 3.9
    WIDTH: tl.constexpr = CUT.width
    return tl.zeros([HEIGHT, WIDTH], tl.float32)


@triton.jit
def tile(x, y, first_row, first_col, block, CUT: tl.constexpr, ARITHMETIC: tl.constexpr, TMA: tl.constexpr):
    """(height, width) float32 of S; 0 beyond its edges. With TMA, x and y are tensor descriptors."""
    acc = zeros(CUT)
    if TMA:
        for start in range(0, block.D, CUT.depth):
            a = x.load([first_row, start])
            b = y.load([first_col, start])
            acc = tl.dot(a, b.T, acc)
    else:
        row = first_row + tl.arange(0, CUT.height)
        col = first_col + tl.arange(0, CUT.width)
        depth = tl.arange(0, CUT.depth)
        p_x = x.at + row.to(tl.int64)[:, None] * x.row + depth[None, :] * x.col
        p_y = y.at + col.to(tl.int64)[None, :] * y.row + depth[:, None] * y.col
        for start in range(0, block.D, CUT.depth):
            inside = depth + start < block.D
            a = tl.load(p_x, mask=(row < block.N)[:, None] & inside[None, :], other=0)
            b = tl.load(p_y, mask=(col < block.M)[None, :] & inside[:, None], other=0)
            acc = dot(a, b, acc, ARITHMETIC)
            p_x += CUT.depth * x.col
            p_y += CUT.depth * y.col
    return acc


@triton.jit
def same_ids(row, col, ids, block):
    """Where entries have equal ids."""
    own = tl.load(ids.rows + row, mask=row < block.N, other=0)
    other = tl.load(ids.cols + col, mask=col < block.M, other=0)
    return own[:, None] == other[None, :]


@triton.jit
def or_zero(offset):
    """An offset of a block; 0, compiled in, if the block is all of S."""
    if offset is None:
        return 0
    else:
        return offset


@triton.jit
def pairs_in(row, first_col, block):
    """For each row the column of its pair, counted from the tile's first; out of range if it is not in the tile.

    If both rows of a pair are in S, they are anchors.
    """
    return (row + (or_zero(block.ahead) - first_col)).to(tl.int32)


@triton.jit
def negatives(row, first_col, ids, block, WIDTH: tl.constexpr):
    """Where entries of a tile are negatives: inside the block, no pair, different ids (`ids` may be None)."""
    place = tl.arange(0, WIDTH)
    live = (row < block.N)[:, None] & (first_col + place < block.M)[None, :]
    live = live & (pairs_in(row, first_col, block)[:, None] != place[None, :])
    if ids is not None:
        live = live & ~same_ids(row, first_col + place, ids, block)
    return live


# ── single similarities ─────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def similarities(x, row, y, col, on, D, BLOCK: tl.constexpr):
    """(B,) float32 S[row, col]; equal pairs give equal bits in any position; 0 where not `on`."""
    total = tl.zeros([row.shape[0], BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = on[:, None] & (at < D)[None, :]
        u = tl.load(x.at + row[:, None] * x.row + at[None, :] * x.col, mask=inside, other=0).to(tl.float32)
        v = tl.load(y.at + col[:, None] * y.row + at[None, :] * y.col, mask=inside, other=0).to(tl.float32)
        total += u * v
    return tl.sum(total, 1)


@triton.jit
def _norm(x, row, on, D, BLOCK: tl.constexpr):
    """(B,) ‖x‖ of rows, for any representable norm; NaN for a row that has a NaN."""
    largest = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = on[:, None] & (at < D)[None, :]
        u = tl.load(x.at + row[:, None] * x.row + at[None, :] * x.col, mask=inside, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(u), 1))
    unit = tl.where(largest > 0, largest, 1.0)
    total = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = on[:, None] & (at < D)[None, :]
        u = tl.load(x.at + row[:, None] * x.row + at[None, :] * x.col, mask=inside, other=0).to(tl.float32)
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
def pair(x, y, s_pos, bounds, N, M, K, D, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """s⁺ (K,), and bounds (3, PARTS) int32: −min s⁺ as an ordered integer, the bits of max ‖x‖ and max ‖y‖.

    A single part must be initialised with LOWEST; of several, each program writes one, and readers take the maximum.
    """
    row = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    _leave(bounds, 1, visible(_norm(x, row, row < N, D, BLOCK)), PARTS)
    _leave(bounds, 2, visible(_norm(y, row, row < M, D, BLOCK)), PARTS)
    on = row < K
    s = similarities(x, row, y, row, on, D, BLOCK)
    tl.store(s_pos + row, s, mask=on)
    _leave(bounds, 0, tl.where(on, ordered(visible(-s)), LOWEST), PARTS)


# ── copies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def copy(x, out, length, N, D, width, HALVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies (N, width) of rows, 0 beyond D.

    HALVED: in float16, times a power of two for the longest row; `length` points to the bits of its norm.
    """
    row = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = (row < N)[:, None]
    u = tl.load(x.at + row[:, None] * x.row + at[None, :] * x.col, mask=here & (at < D)[None, :], other=0)
    if HALVED:
        u = (u * halving(length)).to(tl.float16)
    tl.store(out + row[:, None] * width + at[None, :], u, mask=here & (at < width)[None, :])


@triton.jit
def scale_back(s, out, bounds, K, BLOCK: tl.constexpr):
    """(K,) similarities of 16-bit copies, divided by the powers of two of `copy`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    by = unhalving(bounds)
    tl.store(out + at, tl.load(s + at, mask=at < K, other=0) * by, mask=at < K)
