"""The gradient of mined objectives on an accelerator: three entries of G for each pair, summed without atomics.

    ∂l/∂xᵢ = gᵢᵢ yᵢ + g_{i,h(i)} y_{h(i)} + Σ over the anchors j of y→x whose negative is i of g_{ji} yⱼ

and the same for y. The last sum is over a segment of the anchors sorted by their negative. A program takes a block of
targets, whose segments are adjacent, and computes their sums as a product: (targets × sources) coefficients times
(sources × D) rows, in the order of the sources. So the order of summing is fixed, and the bits are the same in every
run.
"""

import triton
import triton.language as tl

from goal.kernels.bits import wide
from goal.kernels.tile import Matrix, or_zero


@triton.jit
def _first(targets, size, target):
    """The number of sorted targets below `target`."""
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        below = tl.load(targets + middle) < target
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit
def _rows(x, at, size, on, column, D):
    """Rows `at` of a matrix, a block of their columns, float32; 0 where not `on`, and beyond its `size` rows.

    size: None if no row can lie beyond.
    """
    if size is not None:
        on = on & (at >= 0) & (at < size)
    inside = on[:, None] & (column < D)[None, :]
    return tl.load(x.at + at[:, None] * x.row + column[None, :] * x.col, mask=inside, other=0).to(tl.float32)


@triton.jit
def emit(
    x, y, gx, gy, mined, targets, order, incoming, block, K, blocks,
    SORTED: tl.constexpr, ROWS: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of ∂l/∂x (the first `blocks` programs) or of ∂l/∂y, BLOCK of their columns.

    mined: `goal.engine.types.Mined`, of the whole batch. incoming (1,): the incoming gradient, a factor of the result.
    targets, order (2, K): the negatives in stable sorted order; not SORTED: unsorted, and all anchors are compared.
    """
    program = tl.program_id(0)
    if program < blocks:
        at, row, col, out, size, side = y.at, y.row, y.col, gx, block.N, 0
        first, begins, others = wide(or_zero(block.row_offset)), wide(or_zero(block.col_offset)), wide(block.M)
    else:
        at, row, col, out, size, side = x.at, x.row, x.col, gy, block.M, 1
        first, begins, others = wide(or_zero(block.col_offset)), wide(or_zero(block.row_offset)), wide(block.N)
        program -= blocks
    if block.row_offset is None:
        others = None
    other, D = Matrix(at, row, col), block.D
    local = wide(program) * ROWS + tl.arange(0, ROWS)
    target, column = first + local, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    anchor = target < K
    own, away = wide(side) * K, wide(1 - side) * K
    value = tl.load(mined.pull + target, mask=anchor, other=0)
    value += tl.load(mined.pull + wide(K) + target, mask=anchor, other=0)
    total = value[:, None] * _rows(other, target - begins, others, anchor, column, D)
    value = tl.load(mined.push + own + target, mask=anchor, other=0)
    negative = tl.load(mined.negative + own + target, mask=anchor, other=0)
    total += value[:, None] * _rows(other, negative - begins, others, anchor, column, D)
    if SORTED:
        begin = _first(targets + away, K, first + program * ROWS)
        end = _first(targets + away, K, first + program * ROWS + ROWS)
    else:
        begin, end = 0, K
    for start in range(begin, end, SOURCES):
        place = start + tl.arange(0, SOURCES)
        on = place < end
        goal = tl.load(targets + away + place, mask=on, other=-1)
        source = place.to(tl.int64)
        if SORTED:
            source = tl.load(order + away + place, mask=on, other=0)
        each = tl.load(mined.push + away + source, mask=on, other=0)
        g = tl.where(goal[None, :] == target[:, None], each[None, :], 0.0)  # (ROWS, SOURCES)
        total += tl.dot(g, _rows(other, source - begins, others, on, column, D), input_precision="ieee")
    total *= tl.load(incoming).to(tl.float32)
    inside = (local < size)[:, None] & (column < D)[None, :]
    tl.store(out + local[:, None] * D + column[None, :], total.to(out.dtype.element_ty), mask=inside)
