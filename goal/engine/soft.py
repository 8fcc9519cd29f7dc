"""Softmaxes in plain PyTorch: log-sums of a tile of S in both directions, and the coefficients G of a tile.

Both need e^{h(s)} of every entry, relative to a shift, or it would leave the dtype. A single shift serves the rows and
the columns of a tile, and so a single exponential an entry, while all that is compared with it spans at most `reach`
(80 in float32, the shift in its middle): the largest hardness of each row and column, or their log-sums. Otherwise rows
and columns take their own.

Log-sums are in float64 whatever the dtype of S: shares are relative to them, so their error is that of the shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from goal.engine.range import reach
from goal.engine.statistics import Exps
from goal.engine.types import Masks, Soft, of_side
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
    if softmax.slope is not None and softmax.over == "negatives":
        low, high = (softmax.slope * one.item() for one in torch.aminmax(tile))
        shift = _shift(low, high, tile)
        if shift is not None:  # for masked entries as well, which are cleared afterwards
            exps = torch.add(tile.new_tensor(-shift), tile, alpha=softmax.slope, out=tile).exp_()
            differ = masks.differ(exps)
            exps = exps if differ is None else exps.mul_(differ)
            masks.diagonal(exps).zero_()
            return *_shared(exps, shift, shares), Exps(exps, shift)
    hardness = hidden(tile, masks, softmax)
    tops = hardness.amax(1), hardness.amax(0)
    shift = _shift(*_span(torch.cat(tops)), tile)
    if shift is not None:
        exps = hardness.sub_(shift).exp_()
        return *_shared(exps, shift, shares), Exps(exps, shift)
    rows, cols = (_own(hardness, top, dim, shares) for top, dim in zip(tops, (1, 0), strict=True))
    return rows, cols, None


def hidden(tile: Tensor, masks: Masks, softmax: Softmax) -> Tensor:
    """The hardness of a tile, −inf at entries that stand in no sum; the tile may be overwritten."""
    hardness = tile.mul_(softmax.slope) if softmax.slope is not None else softmax.h(tile)
    return masks.hide(hardness, softmax.over)


def _shift(low: float, high: float, like: Tensor) -> float | None:
    """The middle, if a single shift serves all that lies between, exactly as the dtype of `like` has it."""
    middle = like.new_tensor((low + high) / 2).item()
    within = high - low <= reach(like.dtype) and abs(middle) * torch.finfo(like.dtype).eps < 1e-2
    return middle if within else None


def _span(numbers: Tensor) -> tuple[float, float]:
    """The least and the largest number, −inf left out; (0, 0) if there is none."""
    known = numbers[numbers > -math.inf]
    return (known.min().item(), known.max().item()) if len(known) else (0.0, 0.0)


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
        shift = _shift(*_span(torch.cat([log_sum for _, _, log_sum, _ in sides])), tile)
        if shift is not None:
            return of_exps(Exps(hardness.sub_(shift).exp_(), shift), masks, soft, out)
    g = out.zero_()
    for side, (dim, part, log_sum, push) in enumerate(sides):
        of_negatives = _shares(hardness[part], log_sum, push, dim)
        if soft.product is not None:
            of_negatives *= _pair_weight(soft, soft.product, side, masks.anchors(side), tile[part], dim)
        g[part] += of_negatives
    return _with_pulls(g, masks, soft)


def of_exps(exps: Exps, masks: Masks, soft: Soft, out: Tensor | None = None) -> Tensor:
    """The entries of G from exponentials relative to a shift: (aᵢ + bⱼ) e^{h − shift}, and the pulls."""
    (n, m), dtype = exps.values.shape, exps.values.dtype
    factors = []
    for (_, _, log_sum, push), size in zip(_sides(masks, soft), (n, m), strict=True):
        factor = torch.where(push == 0, push, push * torch.exp(exps.shift - log_sum))  # without negatives Z = 0
        factors.append(torch.nn.functional.pad(factor.to(dtype), (0, size - len(factor))))  # rows beyond the anchors
    rows, cols = factors
    g: Tensor = torch.add(rows[:, None], cols, out=out)
    return _with_pulls(g.mul_(exps.values), masks, soft)


def _with_pulls(g: Tensor, masks: Masks, soft: Soft) -> Tensor:
    """The tile of G with the pulls of both directions at its pairs."""
    if soft.pull is None:
        return g
    pairs = masks.diagonal(g)
    first = max(masks.row_offset, masks.col_offset)
    pairs += soft.pull[:, first : first + len(pairs)].sum(0)
    return g


def _pair_weight(soft: Soft, product: Product, side: int, at: slice, tile: Tensor, dim: int) -> Tensor | float:
    """P⁻ at each entry of a tile, for the anchors of a side; P⁺ where the softmax is over positives."""
    relative = {name: value[side, at].unsqueeze(dim) for name, value in soft.relative.items()}
    of_positives = soft.softmax.over == "positives"
    s_pos = tile if of_positives else of_side(soft.s_pos, side)[at].unsqueeze(dim)
    weights = product.weights(s_pos, tile, relative)
    weight: Tensor | float = weights.P_pos if of_positives else weights.P_neg
    return weight


def _shares(hardness: Tensor, log_sum: Tensor, push: Tensor, dim: int) -> Tensor:
    """The push times q = e^{h − log Z}, which is at most 1, also where log Z has lost bits."""
    log_sum = torch.where(log_sum == -math.inf, 0, log_sum)
    near = log_sum.to(hardness.dtype)
    rest = torch.exp(near - log_sum).to(push.dtype)  # what the dtype of the tile cannot tell from 1 in e^{h − near}
    return (hardness - near.unsqueeze(dim)).clamp_(max=0).exp_() * (push * rest).unsqueeze(dim)


def _sides(masks: Masks, soft: Soft) -> Iterator[tuple[int, tuple[slice, slice], Tensor, Tensor]]:
    """For x→y and y→x: the candidates' dimension, the part of a tile with anchors, and their log-sums and pushes."""
    rows, cols = masks.anchors(0), masks.anchors(1)
    yield 1, (slice(0, rows.stop - rows.start), slice(None)), soft.log_sum[0, rows], soft.push[0, rows]
    yield 0, (slice(None), slice(0, cols.stop - cols.start)), soft.log_sum[1, cols], soft.push[1, cols]
