"""Soft mining in plain PyTorch: log-sums of a tile of S in both directions, and the coefficients G of a tile.

Both need e^{h(s)} of every entry, relative to a shift, or it would leave the dtype. A single shift serves the rows and
the columns of a tile, and so a single exponential an entry, while what it is compared with lies within `_reach` of it:
the largest hardness of each row and column, or their log-sums. Otherwise rows and columns take their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from goal.engine.range import reach
from goal.engine.statistics import Exps
from goal.engine.types import Masks, Soft
from goal.mining import Softmax
from goal.terms.product import Product


class Sums(NamedTuple):
    """Σ e^h of some anchors relative to a peak, as in `Partial`."""

    peak: Tensor  # (A,)
    soft_sum: Tensor  # (A,)
    soft_norm: Tensor | None  # (A,)


def scan(tile: Tensor, masks: Masks, softmax: Softmax, shares: bool) -> tuple[Sums, Sums, Exps | None]:
    """The sums of a tile's rows and of its columns, and the exponentials if a single shift serves them all.

    Args:
        tile: (n, m) of S, all entries; it is overwritten.
        masks: of the tile.
        shares: whether to compute the norms as well.
    """
    low, high = (one.item() for one in torch.aminmax(tile)) if softmax.slope is not None else (math.nan, math.nan)
    slope = 1.0 if softmax.slope is None else softmax.slope
    middle = slope * (low + high) / 2
    if slope * (high - low) <= reach(tile.dtype) and exact(middle, tile.dtype):
        exps = torch.add(tile.new_tensor(-middle), tile, alpha=slope, out=tile)
        of_pairs = masks.diagonal(exps).exp()
        exps = masks.clear(exps.exp_())
        if softmax.over == "candidates":
            masks.diagonal(exps).copy_(of_pairs)
        return *_shared(exps, middle, shares), Exps(exps, middle)
    hardness = hidden(tile, masks, softmax)
    tops = hardness.amax(1), hardness.amax(0)
    low, high = _span(torch.cat(tops))
    middle = (low + high) / 2
    if high - low <= reach(tile.dtype) and exact(middle, tile.dtype):
        exps = hardness.sub_(middle).exp_()
        return *_shared(exps, middle, shares), Exps(exps, middle)
    rows, cols = (_own(hardness, top, dim, shares) for top, dim in zip(tops, (1, 0), strict=True))
    return rows, cols, None


def hidden(tile: Tensor, masks: Masks, softmax: Softmax) -> Tensor:
    """The hardness of a tile, −inf at entries that stand in no sum; the tile may be overwritten."""
    hardness = tile.mul_(softmax.slope) if softmax.slope is not None else softmax.h(tile)
    of_pairs = masks.diagonal(hardness).clone()
    hardness = masks.hide(hardness)
    if softmax.over == "candidates":
        masks.diagonal(hardness).copy_(of_pairs)
    return hardness


def exact(shift: float, dtype: torch.dtype) -> bool:
    """Whether numbers of this size are exact enough in a dtype for their exponentials."""
    return abs(shift) * torch.finfo(dtype).eps < 1e-2


def _shared(exps: Tensor, shift: float, shares: bool) -> tuple[Sums, Sums]:
    """The sums of both directions from exponentials relative to a shift."""

    def sums(dim: int) -> Sums:
        total = exps.sum(dim)
        peak = torch.where(total == 0, -math.inf, total.new_tensor(shift))
        return Sums(peak, total, torch.linalg.vector_norm(exps, dim=dim) if shares else None)

    return sums(1), sums(0)


def _own(hardness: Tensor, top: Tensor, dim: int, shares: bool) -> Sums:
    """The sums in a direction, relative to each anchor's own largest hardness."""
    exps = (hardness - torch.where(top == -math.inf, 0, top).unsqueeze(dim)).exp_()
    return Sums(top, exps.sum(dim), torch.linalg.vector_norm(exps, dim=dim) if shares else None)


# ── G ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def coefficients(tile: Tensor, masks: Masks, soft: Soft, out: Tensor) -> Tensor:
    """The entries of G in a tile of S.

    Args:
        tile: (n, m) of S, all entries; it is overwritten.
        masks: of the tile.
        out: (n, m), for the result.
    """
    sides = list(_sides(masks, soft))
    hardness = hidden(tile if soft.product is None else tile.clone(), masks, soft.softmax)
    if soft.product is None:
        low, high = _span(torch.cat([log_sum for _, _, log_sum, _ in sides]))
        middle = (low + high) / 2
        if high - low <= reach(tile.dtype) and exact(middle, tile.dtype):
            return of_exps(Exps(hardness.sub_(middle).exp_(), middle), masks, soft, out)
    g = out.zero_()
    for side, (dim, part, log_sum, push) in enumerate(sides):
        of_negatives = _shares(hardness[part], log_sum, dim) * push.unsqueeze(dim)
        if soft.product is not None:
            of_negatives *= _p_neg(soft, soft.product, side, masks.anchors(side), tile[part], dim)
        g[part] += of_negatives
    return _with_pulls(g, masks, soft)


def of_exps(exps: Exps, masks: Masks, soft: Soft, out: Tensor | None = None) -> Tensor:
    """The entries of G from exponentials relative to a shift: (aᵢ + bⱼ) e^{h − shift}, and the pulls."""
    n, m = exps.values.shape
    factors = []
    for (_, _, log_sum, push), size in zip(_sides(masks, soft), (n, m), strict=True):
        factor = torch.where(push == 0, push, push * torch.exp(exps.shift - log_sum))  # without negatives Z = 0
        factors.append(torch.nn.functional.pad(factor, (0, size - len(factor))))  # rows beyond the anchors
    rows, cols = factors
    g: Tensor = torch.add(rows[:, None], cols, out=out)
    return _with_pulls(g.mul_(exps.values), masks, soft)


def _with_pulls(g: Tensor, masks: Masks, soft: Soft) -> Tensor:
    """The tile of G with the pulls of both directions at its pairs."""
    pairs = masks.diagonal(g)
    first = max(masks.row_offset, masks.col_offset)
    pairs += soft.pull[:, first : first + len(pairs)].sum(0)
    return g


def _p_neg(soft: Soft, product: Product, side: int, at: slice, tile: Tensor, dim: int) -> Tensor | float:
    """P⁻ at each entry of a tile, for the anchors of a side."""
    relative = {name: value[side, at].unsqueeze(dim) for name, value in soft.relative.items()}
    weight: Tensor | float = product.weights(soft.s_pos[at].unsqueeze(dim), tile, relative).P_neg
    return weight


def _shares(hardness: Tensor, log_sum: Tensor, dim: int) -> Tensor:
    """q = e^{h − log Z}; at most 1, also where log Z has lost bits."""
    log_sum = torch.where(log_sum == -math.inf, 0, log_sum).unsqueeze(dim)
    return (hardness - log_sum).clamp_(max=0).exp_()


def _span(numbers: Tensor) -> tuple[float, float]:
    """The least and the largest number, −inf left out; (0, 0) if there is none."""
    known = numbers[numbers > -math.inf]
    return (known.min().item(), known.max().item()) if len(known) else (0.0, 0.0)


def _sides(masks: Masks, soft: Soft) -> Iterator[tuple[int, tuple[slice, slice], Tensor, Tensor]]:
    """For x→y and y→x: the candidates' dimension, the part of a tile with anchors, and their log-sums and pushes."""
    rows, cols = masks.anchors(0), masks.anchors(1)
    yield 1, (slice(0, rows.stop - rows.start), slice(None)), soft.log_sum[0, rows], soft.push[0, rows]
    yield 0, (slice(None), slice(0, cols.stop - cols.start)), soft.log_sum[1, cols], soft.push[1, cols]
