"""The gradient of mined objectives on an accelerator: three entries of G for each pair, gathered without atomics.

    ∂l/∂xᵢ = gᵢᵢ yᵢ + g_{i,h(i)} y_{h(i)} + Σ over the anchors j of y→x whose negative is i of g_{ji} yⱼ

and the same for y. The last sum is over a segment of the anchors sorted by their negative. A program takes a block of
targets, whose segments lie side by side, and sums them as a product: (targets × sources) coefficients times
(sources × D) rows, source after source. So the order of summing is fixed, and the bits are the same in every run.
"""

import triton
import triton.language as tl

from goal.kernels.mine import _wide


@triton.jit
def _first(targets, size, target):
    """How many of the sorted targets lie below one."""
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        below = tl.load(targets + middle) < target
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit
def _rows(x, at, x_row, x_col, on, column, D):
    """Some rows of x, a block of their columns, float32; 0 where not `on`."""
    inside = on[:, None] & (column < D)[None, :]
    return tl.load(x + at[:, None] * x_row + column[None, :] * x_col, mask=inside, other=0).to(tl.float32)


@triton.jit
def emit(
    x, y, gx, gy, pull, push, index, targets, order, incoming,
    N, M, K, D, x_row, x_col, y_row, y_col, blocks,
    SORTED: tl.constexpr, ROWS: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of ∂l/∂x (the first `blocks` programs) or of ∂l/∂y, BLOCK of their columns.

    pull, push, index (2, K): as in `similarity.Mined`. incoming (1,): what everything is multiplied by.
    targets, order (2, K): index sorted, stably; not SORTED: index itself, and every anchor is looked at.
    """
    program = tl.program_id(0)
    if program < blocks:
        other, row, col, out, size, side = y, y_row, y_col, gx, N, 0
    else:
        other, row, col, out, size, side = x, x_row, x_col, gy, M, 1
        program -= blocks
    target = _wide(program) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    anchor = target < K
    own, away = _wide(side) * K, _wide(1 - side) * K
    value = tl.load(pull + target, mask=anchor, other=0) + tl.load(pull + _wide(K) + target, mask=anchor, other=0)
    total = value[:, None] * _rows(other, target, row, col, anchor, column, D)
    value = tl.load(push + own + target, mask=anchor, other=0)
    at = tl.load(index + own + target, mask=anchor, other=0)
    total += value[:, None] * _rows(other, at, row, col, anchor, column, D)
    if SORTED:
        begin = _first(targets + away, K, program * ROWS)
        end = _first(targets + away, K, program * ROWS + ROWS)
    else:
        begin, end = 0, K
    for start in range(begin, end, SOURCES):
        place = start + tl.arange(0, SOURCES)
        on = place < end
        goal = tl.load(targets + away + place, mask=on, other=-1)
        source = place.to(tl.int64)
        if SORTED:
            source = tl.load(order + away + place, mask=on, other=0)
        each = tl.load(push + away + source, mask=on, other=0)
        g = tl.where(goal[None, :] == target[:, None], each[None, :], 0.0)  # (ROWS, SOURCES)
        total += tl.dot(g, _rows(other, source, row, col, on, column, D), input_precision="ieee")
    total *= tl.load(incoming).to(tl.float32)
    inside = (target < size)[:, None] & (column < D)[None, :]
    tl.store(out + target[:, None] * D + column[None, :], total.to(out.dtype.element_ty), mask=inside)
