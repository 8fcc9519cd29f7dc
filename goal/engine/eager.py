"""The quadratic stages in plain PyTorch: mine S tile by tile, emit the gradient. The reference for the kernels.

No N × M matrix is stored. A tile, which is some rows of S with all columns, is computed, reduced in both directions and
dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.engine import soft as softly
from goal.engine.partials import Partial, finish, merge
from goal.engine.range import bounded, lost, reach
from goal.engine.statistics import BAND, Exps, Request, Statistics
from goal.engine.types import Block, Dense, Entries, Gradients, Limits, Masks, Mined, Needs, Pairs, Plan, Soft, of_side
from goal.positives import Positives
from goal.similarity import Dot, norm

TILE = 1 << 22  # elements of S in memory at a time
SMALL = 1 << 18  # elements of S up to which the calls cost more than the arithmetic
_GROUP = 16  # rows reduced to their maximum before its index is searched


def tiles(n: int, m: int) -> Iterator[slice]:
    """The rows of each tile of an (n, m) matrix: all of them where n·m fits one tile."""
    rows = max(64, TILE // max(1, m))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def _coded(masks: Masks, dtype: torch.dtype) -> Masks:
    """The masks with ids as small floats: comparing a tile with floats is many times faster."""
    if masks.ids is None or masks.y_ids is None:
        return masks
    _, codes = torch.unique(torch.cat((masks.ids, masks.y_ids)), return_inverse=True)
    if len(codes) < 1 << 24:  # float32 represents all integers below
        codes = codes.to(dtype)
    return masks._replace(ids=codes[: masks.n], y_ids=codes[masks.n :])


def bounds(similarity: Dot, x: Tensor, y: Tensor, s_pos: Tensor, request: Request) -> list[float]:
    """−min s⁺, max ‖x‖ and max ‖y‖ of some rows; 0 for a bound that the request does not need.

    The bounds of several blocks together are the maxima of the blocks' bounds.
    """
    least = -s_pos.min().item() if request.sums and s_pos.shape[0] else 0.0
    if not request.compares or similarity.name == "given":
        return [least, 0.0, 0.0]
    return [least, norm(x).max().item(), norm(y).max().item()]


def limits(similarity: Dot, block: Block, pairs: Pairs, request: Request) -> Limits:
    """Thresholds for the reductions of a block, from the bounds of the batch; without those, from the block's own.

    Similarities closer than 2√D · eps · max ‖x‖ · max ‖y‖ are equal in the arithmetic of a product. Order embeddings
    are no product: there the larger of the two norms takes the place of their product.
    """
    x, y, _ = block
    known = pairs.bounds.tolist() if pairs.bounds.numel() else bounds(similarity, x, y, pairs.of(0), request)
    least, x_norm, y_norm = known
    size = max(x_norm, y_norm) if similarity.name == "order" else x_norm * y_norm
    tie = 2 * math.sqrt(x.shape[1]) * torch.finfo(x.dtype).eps * size
    if pairs.s_pos.dim() == 1:
        return Limits(-least - BAND, tie)
    forth, back = pairs.s_pos.amin(1).tolist()
    return Limits(forth - BAND, tie, back - BAND)


def statistics(similarity: Dot, block: Block, pairs: Pairs, request: Request) -> Statistics:
    """The mining stage over a whole batch: `mine`, then `finish`.

    A square batch of at most SMALL entries of S is reduced in both directions at once, with S beside its transpose.
    This halves the number of calls, which dominates the time of a small batch.
    """
    x, y, masks = block
    n, m = masks.n, masks.m
    if n != m or n * m > SMALL or request.softmax is not None or masks.by_ids:
        rows, cols, exps = _mined(similarity, block, pairs, request)
        return finish(pairs.s_pos, rows, cols)._replace(exps=exps)
    tile = _coded(masks, x.dtype).hide(similarity.tile(x, y))
    both = torch.stack((tile, tile.T))  # (2, K, K), candidates last
    part, _ = _Reduction(request, limits(similarity, block, pairs, request))(both, -1, 0, pairs.s_pos)

    def scores(negative: Tensor) -> Tensor:
        return torch.stack((similarity.pairs(x, y, None, negative[0]), similarity.pairs(x, y, negative[1], None)))

    def count() -> Tensor:
        return torch.stack([masks.negatives(side, x.device) for side in (0, 1)])

    return finish(pairs.s_pos, _rescore(part, count if masks.may_lack else None, scores))


def mine(similarity: Dot, block: Block, pairs: Pairs, request: Request) -> tuple[Partial, Partial]:
    """The partials of a block of S in both directions, from one pass over its tiles.

    Args:
        pairs: of the batch; without bounds, the block's own are used, which is right if the block is all of S.

    Returns:
        The partials of the block's anchors x→y (rows) and y→x (columns), with indices in the batch.
        The mined similarities are those of `similarity.pairs`, not of the tile's product.
    """
    rows, cols, _ = _mined(similarity, block, pairs, request)
    return rows, cols


def _mined(similarity: Dot, block: Block, pairs: Pairs, request: Request) -> tuple[Partial, Partial, Exps | None]:
    """The same, and the exponentials of soft mining if the block is a single tile."""
    x, y, masks = block
    coded, (rows, cols) = _coded(masks, x.dtype), (masks.anchors(0), masks.anchors(1))
    n_rows, n_cols = rows.stop - rows.start, cols.stop - cols.start
    of_both = limits(similarity, block, pairs, request)
    reduce = _Reduction(request, of_both.of(0))
    back = reduce if of_both.back is None else _Reduction(request, of_both.of(1))  # one object has one memory
    of_rows: Partial | None = None
    of_cols: Partial | None = None
    exps = None
    for at in tiles(masks.n, masks.m):
        inside = coded.tile(at)
        out = reduce.memory("tile", (inside.n, inside.m), x)
        tile = similarity.tile(x[at], y, out=out)
        here, single = inside.anchors(0), inside.n == masks.n
        anchors = here.stop - here.start
        soft_rows, soft_cols, exps = reduce.softly(tile, inside, keep=single)
        shared = None
        tile = inside.hide(tile) if request.hardest else tile
        if anchors:
            part, shared = reduce(tile[:anchors], -1, masks.col_offset, pairs.of(0)[here])
            of_rows = _filled(of_rows, _beside(part, soft_rows, anchors), at.start, n_rows)
        if n_cols:
            if (anchors, n_cols) != tile.shape or back is not reduce:
                shared = None  # extra rows or columns: the two directions see different parts of the tile
            part, _ = back(tile[:, :n_cols], 0, inside.row_offset, pairs.of(1)[cols], shared)
            part = _beside(part, soft_cols, n_cols)
            of_cols = part if of_cols is None else merge(of_cols, part, request, back.limits)
    x_to_y = of_rows if of_rows is not None else _nothing(pairs.s_pos, request, masks.by_ids)
    y_to_x = of_cols if of_cols is not None else _nothing(pairs.s_pos, request, masks.by_ids)
    if not request.hardest:
        return x_to_y, y_to_x, exps
    counts: list[Callable[[], Tensor] | None] = [None, None]
    if masks.may_lack:
        counts = [lambda: masks.negatives(0, x.device), lambda: masks.negatives(1, x.device)]

    def of_x(negative: Tensor) -> Tensor:
        return similarity.pairs(x[:n_rows], y, None, negative - masks.col_offset)

    def of_y(negative: Tensor) -> Tensor:
        return similarity.pairs(x, y[:n_cols], negative - masks.row_offset, None)

    return _rescore(x_to_y, counts[0], of_x), _rescore(y_to_x, counts[1], of_y), exps


def positives(similarity: Dot, block: Block, rule: Positives) -> tuple[Partial, Partial]:
    """The partials of a block of S over positives by ids, in both directions.

    A hardest positive is a partial's hardest negative of −S.
    """
    x, y, masks = block
    coded, request, nowhere = _coded(masks, x.dtype), Request(softmax=rule.softmax), Limits(0.0, 0.0)
    of_rows: list[Partial] = []
    of_cols: Partial | None = None
    for at in tiles(masks.n, masks.m):
        rows, cols = _positive(similarity.tile(x[at], y), coded.tile(at), rule)
        of_rows.append(rows)
        of_cols = cols if of_cols is None else merge(of_cols, cols, request, nowhere)
    assert of_cols is not None
    columns = zip(*of_rows, strict=True)
    parts: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
    rows = Partial(*parts)
    if rule.softmax is not None:
        return rows, of_cols
    return (
        _as_pairs(rows, lambda index: similarity.pairs(x, y, None, index - masks.col_offset)),
        _as_pairs(of_cols, lambda index: similarity.pairs(x, y, index - masks.row_offset, None)),
    )


def _positive(tile: Tensor, masks: Masks, rule: Positives) -> tuple[Partial, Partial]:
    """The partials of a tile, which is overwritten."""
    if rule.softmax is None:
        hidden = masks.hide(tile.neg_(), "positives")
        (s, at), (t, by) = _max(hidden, -1), _max(hidden, 0)
        return Partial(s, at + masks.col_offset), Partial(t, by + masks.row_offset)
    sums = masks.equal(tile).mul_(tile)
    owns = sums.sum(1), sums.sum(0)
    *parts, _ = softly.scan(tile, masks, rule.softmax, shares=False)
    of_rows, of_cols = (Partial(**one._asdict(), own=own) for one, own in zip(parts, owns, strict=True))
    return of_rows, of_cols


def _as_pairs(part: Partial, scores: Callable[[Tensor], Tensor]) -> Partial:
    """The partial of hardest positives with similarities as those of pairs; a non-finite maximum stays."""
    assert part.s_neg is not None
    assert part.negative is not None
    s = torch.add(-scores(part.negative), part.s_neg, alpha=0)
    return part._replace(s_neg=torch.where(part.s_neg == -math.inf, part.s_neg, s))


def plan(n: int, m: int, dtype: torch.dtype, request: Request, dense: bool) -> Plan:
    """The tiles of S (n, m), the arithmetic, and the memory."""
    rows = next(tiles(n, m)).stop
    tiles_held = 1 + 3 * request.lin + 2 * (request.beta is not None) + 3 * dense
    if request.softmax is not None:  # G beside the tile, the tile beside its hardness, the shares of two directions
        linear, each = request.softmax.slope is not None, request.softmax.at == "each"
        tiles_held += 1 + request.hardest + (not linear) + 2 * each
    kept = request.softmax is not None and request.softmax.at == "aggregate" and rows >= n
    name = str(dtype).removeprefix("torch.")
    return Plan((rows, m), f"{name}, no reduced precision anywhere", rows * m * dtype.itemsize * tiles_held, kept)


class _Shared(NamedTuple):
    """Intermediates of a tile that the sums of both directions use; computed once."""

    valid: Tensor  # 1 where sᵢⱼ ≥ threshold
    excess: Tensor | None  # max(sᵢⱼ − threshold, 0)
    exps: Tensor | None  # valid · exp(β(sᵢⱼ − shift)); None where that would underflow
    shift: float


class _Memory(dict[str, Tensor]):
    """The memory of tile-sized intermediates, by their use, from one tile to the next: fresh pages cost time."""

    def __call__(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of the shape, dtype as `like`; it overwrites the previous tensor of the same use."""
        size = math.prod(shape)
        kept = self.get(use)
        if kept is None or kept.numel() < size:
            kept = self[use] = torch.empty(size, dtype=like.dtype, device=like.device)
        return kept[:size].view(shape)


class _Reduction:
    """Reduces tiles to partials; one object serves all tiles of a block, in both directions."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self.request, self.limits, self.memory = request, limits, _Memory()

    def __call__(
        self, tile: Tensor, dim: int, offset: int, s_pos: Tensor, shared: _Shared | None = None
    ) -> tuple[Partial, _Shared | None]:
        """The partial of a tile in one direction; entries that are no negatives are −inf.

        Args:
            tile: (n, m), or (2, K, K) with both directions' candidates last.
            dim: the dimension of the candidates, 0 or −1.
            offset: global index of the tile's first candidate.
            s_pos: of the tile's anchors.
            shared: intermediates from the other direction of the same tile; computed here if None, and returned.
        """
        if not self.request.hardest:
            return Partial(), None
        s_neg, index = _max(tile, dim)
        part = Partial(s_neg, index + offset if offset else index)
        if self.request.semi_hard is not None:
            above, below = (s_pos - self.request.semi_hard).unsqueeze(dim), (s_pos - self.limits.tie).unsqueeze(dim)
            semi, semi_index = _max(torch.where((tile > above) & (tile < below), tile, -torch.inf), dim)
            info = torch.finfo(tile.dtype)
            if self.limits.tie > info.eps * info.max**0.5:  # squares are out of range, and `tie` is no reliable limit
                hidden = (tile > above) & (tile >= below) & (tile < s_pos.unsqueeze(dim))
                semi = torch.where(hidden.any(dim), torch.nan, semi)
            part = part._replace(semi=semi, semi_negative=semi_index + offset)
        if not self.request.sums:
            return part, None
        shared = self._share(tile, s_neg) if shared is None else shared
        valid = shared.valid.sum(dim)  # includes the hardest negative, if it is valid
        has = (s_neg >= self.limits.threshold).to(tile.dtype)
        if shared.excess is not None:
            cut, out = (s_neg - self.limits.tie).unsqueeze(dim), self.memory("ties", tile.shape, tile)
            ties = torch.ge(tile, cut, out=out).sum(dim)
            reach = (s_neg - self.limits.threshold).clamp_(min=0)
            part = part._replace(
                ties=ties,
                lin_count=(valid - ties).clamp_(min=0) * has,
                lin_sum=(valid * reach - shared.excess.sum(dim)).clamp_(min=0),
            )
        if self.request.beta is not None:
            total = self._exp_sum(tile, dim, s_neg, index.unsqueeze(dim), shared, self.request.beta)
            part = part._replace(exp_count=valid - has, exp_sum=total)
        return part, shared

    def softly(self, tile: Tensor, masks: Masks, keep: bool) -> tuple[Partial, Partial, Exps | None]:
        """The log-sums of a tile's rows and columns, if soft mining is requested; it is overwritten if nothing else is.

        Args:
            tile: (n, m), all entries.
            keep: whether to return the exponentials.
        """
        softmax = self.request.softmax
        if softmax is None:
            return Partial(), Partial(), None
        owns = self._owns(tile, masks)
        if self.request.hardest:
            tile = self.memory("hardness", tile.shape, tile).copy_(tile)
        *sums, exps = softly.scan(tile, masks, softmax, self.request.shares)
        rows, cols = (Partial(**one._asdict(), own=own) for one, own in zip(sums, owns, strict=True))
        return rows, cols, exps if keep and softmax.at == "aggregate" else None

    @staticmethod
    def _owns(tile: Tensor, masks: Masks) -> tuple[Tensor | None, Tensor | None]:
        """The similarities of a tile's pairs, for its rows (n,) and its columns (m,); 0 where the pair is elsewhere."""
        if masks.by_ids:
            return None, None
        rows, cols, pairs = tile.new_zeros(masks.n), tile.new_zeros(masks.m), masks.diagonal(tile)
        first = max(masks.row_offset, masks.col_offset)
        for own, offset in ((rows, masks.row_offset), (cols, masks.col_offset)):
            own[first - offset : first - offset + len(pairs)] = pairs
        return rows, cols

    def _share(self, tile: Tensor, s_neg: Tensor) -> _Shared:
        valid = torch.ge(tile, self.limits.threshold, out=self.memory("valid", tile.shape, tile))
        excess, exps, shift, beta = None, None, 0.0, self.request.beta
        if self.request.lin:
            excess = torch.sub(tile, self.limits.threshold, out=self.memory("excess", tile.shape, tile)).clamp_(min=0)
        if beta is not None:
            shift = max(s_neg.max().item(), self.limits.threshold)
            if beta * (shift - self.limits.threshold) < reach(tile.dtype):
                origin, out = tile.new_tensor(-beta * shift), self.memory("exps", tile.shape, tile)
                exps = torch.add(origin, tile, alpha=beta, out=out).exp_().mul_(valid)
        return _Shared(valid, excess, exps, shift)

    def _exp_sum(self, tile: Tensor, dim: int, s_neg: Tensor, hardest: Tensor, shared: _Shared, beta: float) -> Tensor:
        """Σ exp(−β(s⁻ − sᵢⱼ)) over the valid negatives but the hardest, which is excluded, not subtracted."""
        top = s_neg.clamp(min=self.limits.threshold)  # below the threshold the sum is empty
        if shared.exps is not None:
            outside = shared.exps.gather(dim, hardest)
            total = shared.exps.scatter_(dim, hardest, 0).sum(dim) * torch.exp(beta * (shared.shift - top))
            shared.exps.scatter_(dim, hardest, outside)
            return total
        exps = torch.sub(tile, top.unsqueeze(dim), out=self.memory("exps", tile.shape, tile)).mul_(beta).exp_()
        return exps.mul_(shared.valid).scatter_(dim, hardest, 0).sum(dim)


def _max(tile: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`tile.max(dim)`, values and the lowest index; for long columns by groups of rows, several times faster."""
    if dim == -1 or tile.shape[0] % _GROUP or tile.numel() < 1 << 16:
        values, index = tile.max(dim)
        return values, index
    n, m = tile.shape
    groups = tile.view(n // _GROUP, _GROUP, m)
    values, group = groups.amax(1).max(0)  # (m,)
    columns = torch.arange(m, device=tile.device)
    within = groups[group, :, columns].max(1).indices  # (m, _GROUP) → (m,)
    return values, group * _GROUP + within


def _beside(part: Partial, sums: Partial, count: int) -> Partial:
    """The partial of a tile's anchors with their log-sums; they are the first of its rows or columns."""
    return part._replace(**{name: one[:count] for name, one in sums._asdict().items() if one is not None})


def _filled(full: Partial | None, part: Partial, start: int, size: int) -> Partial:
    """The partial of `size` anchors with the part from `start` on filled in.

    Parts kept in a list until the end would lie between the memory of large tiles, and prevent its reuse.
    """
    if full is None:
        if _anchors(part) == size:
            return part
        columns: list[Any] = [None if column is None else column.new_empty(size) for column in part]
        full = Partial(*columns)
    for column, values in zip(full, part, strict=True):
        if column is not None and values is not None:
            column[start : start + values.shape[0]] = values
    return full


def _anchors(part: Partial) -> int:
    return next(len(column) for column in part if column is not None)


def _nothing(s_pos: Tensor, request: Request, by_ids: bool) -> Partial:
    """The partial of no anchors."""
    none, index = s_pos.new_empty(0), s_pos.new_empty(0, dtype=torch.int64)
    wanted = {
        **dict.fromkeys(("s_neg", "negative"), request.hardest),
        **dict.fromkeys(("semi", "semi_negative"), request.semi_hard is not None),
        **dict.fromkeys(("ties", "lin_count", "lin_sum"), request.lin),
        **dict.fromkeys(("exp_count", "exp_sum"), request.beta is not None),
        **dict.fromkeys(("peak", "soft_sum"), request.softmax is not None),
        "soft_norm": request.shares,
        "own": request.softmax is not None and not by_ids,
    }
    return Partial(**{name: index if "negative" in name else none for name, asked in wanted.items() if asked})


def _rescore(part: Partial, count: Callable[[], Tensor] | None, pairs: Callable[[Tensor], Tensor]) -> Partial:
    """The partial with its mined similarities computed in the same way as s⁺, so that equal pairs compare equal.

    count: the number of negatives of each anchor in the block, if some may have none. A non-finite maximum stays.
    """
    assert part.s_neg is not None
    assert part.negative is not None
    s_neg = torch.add(pairs(part.negative), part.s_neg, alpha=0)
    if count is not None:
        none = part.s_neg == -torch.inf
        s_neg = torch.where(none, part.s_neg, s_neg)
        if bool(none.any()):  # no negatives, or all similarities of the anchor are below the dtype's range
            s_neg = torch.where(none & (count() > 0), torch.nan, s_neg)
    part = part._replace(s_neg=s_neg)
    if part.semi is not None and part.semi_negative is not None:
        semi = torch.add(pairs(part.semi_negative), part.semi, alpha=0)
        part = part._replace(semi=torch.where(part.semi == -torch.inf, part.semi, semi))
    return part


def dense_value(similarity: Dot, block: Block, dense: Dense) -> Tensor:
    """Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ) over the negatives of both directions in a block of S, 0-d."""
    x, y, masks = block
    s_pos, coded = dense.s_pos, _coded(masks, x.dtype)
    total = s_pos.new_zeros(())
    for rows in tiles(masks.n, masks.m):
        tile, inside = similarity.tile(x[rows], y), coded.tile(rows)
        live, fits = inside.live(tile), bounded(tile, s_pos)
        for dim, part, at in _directions(inside):
            own, s, met = (
                of_side(s_pos, 1 - dim)[at].unsqueeze(dim),
                tile[part],
                dense.share[1 - dim, at].unsqueeze(dim),
            )
            loss = dense.product.value(own, s)
            if not fits:
                loss = torch.where(own.isfinite() & s.isfinite(), loss, torch.nan)
                loss = torch.where(live[part] * met != 0, loss, 0.0)  # 0 · inf would be NaN
            total += (met * loss * live[part]).sum()
    return total


def dense_block(
    similarity: Dot, block: Block, dense: Dense, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of the negatives in a block of S: computes S a second time, and G, tile by tile.

    Args:
        needs: whether x and y need a gradient.

    Returns:
        ∂l/∂x (n, D) and ∂l/∂y (m, D) without the contribution of the pairs, and (2, K), the block's pull at the pairs
        of x→y and of y→x: its share of −G there.
    """
    x, y, masks = block
    product, s_pos, coded = dense.product, dense.s_pos, _coded(masks, x.dtype)
    gx = torch.zeros_like(x) if needs[0] else None
    gy = torch.zeros_like(y) if needs[1] else None
    pull = torch.zeros_like(dense.share)
    for rows in tiles(masks.n, masks.m):
        tile, inside = similarity.tile(x[rows], y), coded.tile(rows)
        live, g, fits = inside.live(tile), torch.zeros_like(tile), bounded(tile, s_pos)
        for dim, part, at in _directions(inside):
            own, s = of_side(s_pos, 1 - dim)[at].unsqueeze(dim), tile[part]
            relative = {name: value[1 - dim, at].unsqueeze(dim) for name, value in dense.relative.items()}
            weights = product.weights(own, s, relative)
            met = live[part] * dense.share[1 - dim, at].unsqueeze(dim)
            if not fits:
                gone = (met != 0) & lost(own, s, weights, product.value(own, s))
                met = torch.where(gone, torch.nan, met)
            of_pairs, of_negatives = weights.coefficients(met)
            if dense.apart:
                of_pairs = met * weights.T
            g[part] += of_negatives
            pull[1 - dim, at] += of_pairs.sum(dim)
        similarity.add_vjp(x[rows], y, g, None if gx is None else gx[rows], gy)
    return gx, gy, pull


def mined_emit(similarity: Dot, block: Block, mined: Mined, incoming: Tensor | None, needs: Needs) -> Gradients:
    """∂l/∂x (n, D) and ∂l/∂y (m, D) of the mined entries in a block of S, times the incoming gradient (0-d)."""
    x, y, masks = block
    entries = mined.entries(masks.size)
    if not masks.whole:
        row, col = entries.row - masks.row_offset, entries.col - masks.col_offset
        inside = (row >= 0) & (row < masks.n) & (col >= 0) & (col < masks.m)
        entries = Entries(row[inside], col[inside], entries.value[inside])
    if incoming is not None:
        entries = entries._replace(value=entries.value * incoming)
    return similarity.vjp(x, y, entries, needs)


def soft_block(similarity: Dot, block: Block, soft: Soft, needs: Needs) -> Gradients:
    """∂l/∂x (n, D) and ∂l/∂y (m, D) of a block of S, for anchors with a softmax over their negatives.

    Computes S a second time, and G, tile by tile; for a batch in a single tile its exponentials were kept.
    """
    x, y, masks = block
    if not any(needs):
        return None, None
    if soft.exps is not None and masks.whole:
        return similarity.tile_vjp(x, y, softly.of_exps(soft.exps, masks, soft), needs)
    coded, memory = _coded(masks, x.dtype), _Memory()
    gx = torch.zeros_like(x) if needs[0] else None
    gy = torch.zeros_like(y) if needs[1] else None
    for rows in tiles(masks.n, masks.m):
        inside = coded.tile(rows)
        tile = similarity.tile(x[rows], y, out=memory("tile", (inside.n, inside.m), x))
        g = softly.coefficients(tile, inside, soft, memory("g", tile.shape, tile))
        similarity.add_vjp(x[rows], y, g, None if gx is None else gx[rows], gy)
    return gx, gy


Index = tuple[slice, slice]


def _directions(masks: Masks) -> Iterator[tuple[int, Index, slice]]:
    """For x→y and y→x: the candidates' dimension, the part of a tile that has anchors, and these anchors' slice."""
    rows, cols = masks.anchors(0), masks.anchors(1)
    yield 1, (slice(0, rows.stop - rows.start), slice(None)), rows
    yield 0, (slice(None), slice(0, cols.stop - cols.start)), cols
