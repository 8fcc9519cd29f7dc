"""The engine's stages in plain PyTorch: mine S tile by tile, emit the gradient. The truth that kernels are held to.

No N × M matrix is stored: a tile is some rows of S with all columns, made, reduced in both directions and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.engine.partials import Partial, finish, merge
from goal.engine.statistics import BAND, Request, Statistics
from goal.engine.types import Entries, Gradients, Limits, Masks, Needs, Plan
from goal.similarity import Dot, norm
from goal.terms import Product

TILE = 1 << 22  # elements of S held at once
SMALL = 1 << 18  # elements of S up to which the calls cost more than the arithmetic
_GROUP = 16  # rows whose maximum is taken before an index is sought


def tiles(n: int, m: int) -> Iterator[slice]:
    """The rows of each tile of an (n, m) matrix: all of them where n·m fits one tile."""
    rows = max(64, TILE // max(1, m))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def id_codes(ids: Tensor, y_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both sides' ids as small floats that are equal where the ids are (exact below 2²⁴ distinct ids)."""
    _, codes = torch.unique(torch.cat((ids, y_ids)), return_inverse=True)
    return codes[: len(ids)].to(dtype), codes[len(ids) :].to(dtype)


def rounding(similarity: Dot, x: Tensor, y: Tensor) -> float:
    """Similarities closer than this are equal for the arithmetic of one product: 2√D · eps · max‖x‖ · max‖y‖."""
    if similarity.name == "given":
        return 0.0
    return rounding_of(similarity, x.shape[1], x.dtype, longest(x), longest(y))


def rounding_of(similarity: Dot, d: int, dtype: torch.dtype, longest_x: float, longest_y: float) -> float:
    """The same from max‖x‖ and max‖y‖; order embeddings are no product: the longer of the two."""
    size = max(longest_x, longest_y) if similarity.name == "order" else longest_x * longest_y
    return 2 * math.sqrt(d) * torch.finfo(dtype).eps * size


def longest(x: Tensor) -> float:
    """max‖x‖ over the rows."""
    found: float = norm(x).max().item()
    return found


def bounded(*similarities: Tensor) -> bool:
    """Whether these are known to be far inside the dtype's range; only on the CPU, where asking waits for nobody."""
    if torch.compiler.is_compiling() or similarities[0].device.type != "cpu":
        return False
    far = torch.finfo(similarities[0].dtype).max ** 0.75
    return all(torch.dot(s, s).item() < far for s in map(torch.flatten, similarities))


def lost(s_pos: Tensor, s_neg: Tensor, p_pos: Any, p_neg: Any, loss: Tensor) -> Tensor:
    """Where the weights of triplets are not to be had in this dtype, so that a NaN has to show; bool.

    A similarity is not finite; or its square is not, and the weights or the loss are beyond their range with it.
    """
    limit = torch.finfo(s_neg.dtype).max ** 0.5
    size = torch.maximum(s_pos.abs(), s_neg.abs())
    cut = ~loss.isfinite()
    for weight in (p_pos, p_neg):
        if isinstance(weight, Tensor):
            cut = cut | ~(weight.abs() < limit)
    found: Tensor = ~(size < torch.inf) | ((size > limit) & cut)
    return found


def limits(s_pos: Tensor, request: Request, tie: float) -> Limits:
    """The limits of a batch; 0 where nothing that is requested asks for them."""
    threshold = s_pos.min().item() - BAND if request.sums and s_pos.shape[0] else 0.0
    return Limits(threshold, tie if request.compares else 0.0)


def s_pos(similarity: Dot, x: Tensor, y: Tensor, pairs: int) -> Tensor:
    """(K,) similarity of each pair."""
    return similarity.pairs(x[:pairs], y[:pairs], None, None)


def statistics(similarity: Dot, x: Tensor, y: Tensor, s_pos: Tensor, request: Request, masks: Masks) -> Statistics:
    """The mining stage over a whole batch: what `finish` makes of `mine`.

    A square batch that fits one tile is reduced in both directions at once, S beside its transpose: half the calls,
    which is what a small batch costs.
    """
    n, m = x.shape[0], y.shape[0]
    if n != m or n * m > SMALL:
        return finish(s_pos, *mine(similarity, x, y, s_pos, request, masks))
    tile = masks.hide(similarity.tile(x, y))
    both = torch.stack((tile, tile.T))  # (2, K, K), candidates last
    part, _ = _Reduction(similarity, x, y, s_pos, request)(both, -1, 0, s_pos)

    def pairs(negative: Tensor) -> Tensor:
        return torch.stack((similarity.pairs(x, y, None, negative[0]), similarity.pairs(x, y, negative[1], None)))

    def count() -> Tensor:
        return torch.stack([masks.negatives(side, n, m, x.device) for side in (0, 1)])

    return finish(s_pos, _rescore(part, count if masks.may_lack(n, m) else None, pairs))


def mine(
    similarity: Dot,
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    request: Request,
    masks: Masks,
    whole: Limits | None = None,
) -> tuple[Partial, Partial]:
    """Both directions' partials of one block of S, from one pass over its tiles.

    Args:
        x: (n, D) embedded rows of the block, the global rows from `masks.row_offset` on.
        y: (m, D) embedded columns.
        s_pos: (K,) of the whole batch.
        request: what is to be reduced.
        whole: the limits of the whole batch; by default those of the block, which are right where it is all there is.

    Returns:
        The partials of the block's anchors x→y (rows) and y→x (columns), with global indices.
        The mined similarities are those of `similarity.pairs`, not of the tile's product.
    """
    size = x.shape[0], y.shape[0]
    n_rows, n_cols = masks.anchors(0, size[0]), masks.anchors(1, size[1])
    reduce = _Reduction(similarity, x, y, s_pos, request, whole)
    of_rows: Partial | None = None
    of_cols: Partial | None = None
    for rows in tiles(x.shape[0], y.shape[0]):
        inside = masks.rows(rows)
        out = reduce.memory("tile", (rows.stop - rows.start, y.shape[0]), x)
        tile = inside.hide(similarity.tile(x[rows], y, out=out))
        shared = None
        anchors = max(0, min(n_rows - rows.start, tile.shape[0]))
        here = inside.row_offset
        if anchors:
            own = s_pos[here : here + anchors]
            part, shared = reduce(tile[:anchors], -1, masks.col_offset, own)
            of_rows = _filled(of_rows, part, rows.start, n_rows)
        if n_cols:
            own = s_pos[masks.col_offset : masks.col_offset + n_cols]
            if shared is not None and (anchors, n_cols) != tile.shape:
                shared = None  # extra rows or columns: the two directions see different parts of the tile
            part, _ = reduce(tile[:, :n_cols], 0, here, own, shared)
            of_cols = part if of_cols is None else merge(of_cols, part, request, reduce.threshold, reduce.tie)
    x_to_y = of_rows if of_rows is not None else _nothing(s_pos, request)
    y_to_x = of_cols if of_cols is not None else _nothing(s_pos, request)
    counts: list[Callable[[], Tensor] | None] = [None, None]
    if masks.may_lack(*size):
        counts = [lambda: masks.negatives(0, *size, x.device), lambda: masks.negatives(1, *size, x.device)]

    def of_x(negative: Tensor) -> Tensor:
        return similarity.pairs(x[:n_rows], y, None, negative - masks.col_offset)

    def of_y(negative: Tensor) -> Tensor:
        return similarity.pairs(x, y[:n_cols], negative - masks.row_offset, None)

    return _rescore(x_to_y, counts[0], of_x), _rescore(y_to_x, counts[1], of_y)


def plan(n: int, m: int, dtype: torch.dtype, request: Request, dense: bool) -> Plan:
    """How S (n, m) would be walked through."""
    rows = next(tiles(n, m)).stop
    tiles_held = 1 + 3 * request.lin + 2 * (request.beta is not None) + 3 * dense
    name = str(dtype).removeprefix("torch.")
    return Plan((rows, m), f"{name}, no reduced precision anywhere", rows * m * dtype.itemsize * tiles_held)


class _Shared(NamedTuple):
    """What both directions' sums over one tile are taken of, made once."""

    valid: Tensor  # 1 where sᵢⱼ ≥ threshold
    excess: Tensor | None  # max(sᵢⱼ − threshold, 0)
    exps: Tensor | None  # valid · exp(β(sᵢⱼ − shift)); None where that would underflow
    shift: float


class _Reduction:
    """How tiles are reduced to partials: one for all the tiles of a block, both directions.

    It keeps the memory of tile-sized intermediates from one tile to the next: fresh pages cost more than the sums.
    """

    def __init__(
        self, similarity: Dot, x: Tensor, y: Tensor, s_pos: Tensor, request: Request, whole: Limits | None = None
    ) -> None:
        self.request = request
        if whole is None:
            whole = limits(s_pos, request, rounding(similarity, x, y) if request.compares else 0.0)
        self.threshold, self.tie = whole
        self._memory: dict[str, Tensor] = {}

    def memory(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of that shape, dtype as `like`, its content undefined; what had the same use is overwritten."""
        size = math.prod(shape)
        held = self._memory.get(use)
        if held is None or held.numel() < size:
            held = self._memory[use] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)

    def __call__(
        self, tile: Tensor, dim: int, offset: int, s_pos: Tensor, shared: _Shared | None = None
    ) -> tuple[Partial, _Shared | None]:
        """One direction's partial of one tile whose non-negatives are −inf.

        Args:
            tile: (n, m), or (2, K, K) with both directions' candidates last.
            dim: that of the candidates, 0 or −1.
            offset: global index of the tile's first candidate.
            s_pos: of the tile's anchors.
            shared: what the other direction made of the same tile; made here where it is None, and returned.
        """
        s_neg, index = _max(tile, dim)
        part = Partial(s_neg, index + offset if offset else index)
        if self.request.semi_hard is not None:
            above, below = (s_pos - self.request.semi_hard).unsqueeze(dim), (s_pos - self.tie).unsqueeze(dim)
            semi, semi_index = _max(torch.where((tile > above) & (tile < below), tile, -torch.inf), dim)
            info = torch.finfo(tile.dtype)
            if self.tie > info.eps * info.max**0.5:  # where squares are out of range, ties hide what is no tie
                hidden = (tile > above) & (tile >= below) & (tile < s_pos.unsqueeze(dim))
                semi = torch.where(hidden.any(dim), torch.nan, semi)
            part = part._replace(semi=semi, semi_negative=semi_index + offset)
        if not self.request.sums:
            return part, None
        shared = self._share(tile, s_neg) if shared is None else shared
        valid = shared.valid.sum(dim)  # the hardest included, where it is valid
        has = (s_neg >= self.threshold).to(tile.dtype)
        if shared.excess is not None:
            cut, out = (s_neg - self.tie).unsqueeze(dim), self.memory("ties", tile.shape, tile)
            ties = torch.ge(tile, cut, out=out).sum(dim)
            reach = (s_neg - self.threshold).clamp_(min=0)
            part = part._replace(
                ties=ties,
                lin_count=(valid - ties).clamp_(min=0) * has,
                lin_sum=(valid * reach - shared.excess.sum(dim)).clamp_(min=0),
            )
        if self.request.beta is not None:
            total = self._exp_sum(tile, dim, s_neg, index.unsqueeze(dim), shared, self.request.beta)
            part = part._replace(exp_count=valid - has, exp_sum=total)
        return part, shared

    def _share(self, tile: Tensor, s_neg: Tensor) -> _Shared:
        valid = torch.ge(tile, self.threshold, out=self.memory("valid", tile.shape, tile))
        excess, exps, shift, beta = None, None, 0.0, self.request.beta
        if self.request.lin:
            excess = torch.sub(tile, self.threshold, out=self.memory("excess", tile.shape, tile)).clamp_(min=0)
        if beta is not None:
            shift = max(s_neg.max().item(), self.threshold)
            if beta * (shift - self.threshold) < _reach(tile.dtype):
                origin, out = tile.new_tensor(-beta * shift), self.memory("exps", tile.shape, tile)
                exps = torch.add(origin, tile, alpha=beta, out=out).exp_().mul_(valid)
        return _Shared(valid, excess, exps, shift)

    def _exp_sum(self, tile: Tensor, dim: int, s_neg: Tensor, hardest: Tensor, shared: _Shared, beta: float) -> Tensor:
        """Σ exp(−β(s⁻ − sᵢⱼ)) over the valid negatives but the hardest, which is left out, not subtracted."""
        top = s_neg.clamp(min=self.threshold)  # below the threshold the sum is empty
        if shared.exps is not None:
            outside = shared.exps.gather(dim, hardest)
            total = shared.exps.scatter_(dim, hardest, 0).sum(dim) * torch.exp(beta * (shared.shift - top))
            shared.exps.scatter_(dim, hardest, outside)
            return total
        exps = torch.sub(tile, top.unsqueeze(dim), out=self.memory("exps", tile.shape, tile)).mul_(beta).exp_()
        return exps.mul_(shared.valid).scatter_(dim, hardest, 0).sum(dim)


def _reach(dtype: torch.dtype) -> float:
    """The largest z for which both exp(z) and exp(−z) are well inside the dtype: 80 in float32."""
    return 0.9 * math.log(torch.finfo(dtype).max)


def _max(tile: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`tile.max(dim)`, values and the lowest index; down long columns by groups of rows, several times faster."""
    if dim == -1 or tile.shape[0] % _GROUP or tile.numel() < 1 << 16:
        values, index = tile.max(dim)
        return values, index
    n, m = tile.shape
    groups = tile.view(n // _GROUP, _GROUP, m)
    values, group = groups.amax(1).max(0)  # (m,)
    columns = torch.arange(m, device=tile.device)
    within = groups[group, :, columns].max(1).indices  # (m, _GROUP) → (m,)
    return values, group * _GROUP + within


def _filled(whole: Partial | None, part: Partial, start: int, size: int) -> Partial:
    """The partial of `size` anchors with those from `start` on set.

    Parts kept until all were there would lie between the memory of large tiles, and keep it from being used again.
    """
    if whole is None:
        if part.s_neg.shape[0] == size:
            return part
        columns: list[Any] = [None if column is None else column.new_empty(size) for column in part]
        whole = Partial(*columns)
    for column, values in zip(whole, part, strict=True):
        if column is not None and values is not None:
            column[start : start + values.shape[0]] = values
    return whole


def _nothing(s_pos: Tensor, request: Request) -> Partial:
    """The partial of no anchors."""
    none, index = s_pos.new_empty(0), s_pos.new_empty(0, dtype=torch.int64)
    semi = request.semi_hard is not None
    return Partial(
        none,
        index,
        none if semi else None,
        index if semi else None,
        *([none] * 3 if request.lin else [None] * 3),
        *([none] * 2 if request.beta is not None else [None] * 2),
    )


def _rescore(part: Partial, count: Callable[[], Tensor] | None, pairs: Callable[[Tensor], Tensor]) -> Partial:
    """The partial with its mined similarities computed as s⁺ is, so that equal pairs compare equal.

    count: how many negatives the anchors have here, where some may have none. A maximum that is not finite stays so.
    """
    s_neg = torch.add(pairs(part.negative), part.s_neg, alpha=0)
    if count is not None:
        none = part.s_neg == -torch.inf
        s_neg = torch.where(none, part.s_neg, s_neg)
        if bool(none.any()):  # or all of an anchor's similarities are below what the dtype holds
            s_neg = torch.where(none & (count() > 0), torch.nan, s_neg)
    part = part._replace(s_neg=s_neg)
    if part.semi is not None and part.semi_negative is not None:
        semi = torch.add(pairs(part.semi_negative), part.semi, alpha=0)
        part = part._replace(semi=torch.where(part.semi == -torch.inf, part.semi, semi))
    return part


def dense_value(
    similarity: Dot, x: Tensor, y: Tensor, s_pos: Tensor, share: Tensor, masks: Masks, product: Product
) -> Tensor:
    """Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ) over all negatives of both directions in a block of S, 0-d; `share` is (2, K)."""
    total = s_pos.new_zeros(())
    for rows in tiles(x.shape[0], y.shape[0]):
        tile, inside = similarity.tile(x[rows], y), masks.rows(rows)
        live, fits = inside.live(tile), bounded(tile, s_pos)
        for dim, part, at in _directions(tile, inside):
            own, s, met = s_pos[at].unsqueeze(dim), tile[part], share[1 - dim, at].unsqueeze(dim)
            loss = product.value(own, s)
            if not fits:
                loss = torch.where(own.isfinite() & s.isfinite(), loss, torch.nan)
                loss = torch.where(live[part] * met != 0, loss, 0.0)  # 0 · inf is no 0
            total += (met * loss * live[part]).sum()
    return total


def dense_emit(
    similarity: Dot,
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    share: Tensor,
    relative: dict[str, Tensor],
    masks: Masks,
    product: Product,
    needs: Needs,
) -> Gradients:
    """∂l/∂x and ∂l/∂y of anchors that meet all their negatives, over the whole batch.

    Args:
        share: (2, K), what each of an anchor's negatives weighs; 0 for anchors that do not meet all of them.
        relative: the statistics that the terms declared, each (2, K).
        product: T × P.
        needs: whether x and y need a gradient.
    """
    pull = torch.zeros_like(s_pos)  # both directions' in one
    gx, gy = dense_block(similarity, x, y, s_pos, share, relative, masks, product, needs, (pull, pull))
    pairs = torch.arange(s_pos.shape[0], device=x.device)
    _accumulate(gx, gy, slice(None), similarity.vjp(x, y, Entries(pairs, pairs, -pull), needs))
    return gx, gy


def dense_block(
    similarity: Dot,
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    share: Tensor,
    relative: dict[str, Tensor],
    masks: Masks,
    product: Product,
    needs: Needs,
    pull: tuple[Tensor, Tensor],
) -> Gradients:
    """What the negatives in one block of S give its rows and columns: G is made tile by tile, S a second time.

    The arguments as for `dense_emit`; x and y are those of the block, and the masks know where it lies.

    Args:
        pull: (K,) each, of x→y and of y→x: the block's share of −G at the pairs is added there.
    """
    gx = torch.zeros_like(x) if needs[0] else None
    gy = torch.zeros_like(y) if needs[1] else None
    for rows in tiles(x.shape[0], y.shape[0]):
        tile, inside = similarity.tile(x[rows], y), masks.rows(rows)
        live, g, fits = inside.live(tile), torch.zeros_like(tile), bounded(tile, s_pos)
        for dim, part, at in _directions(tile, inside):
            own = {name: value[1 - dim, at].unsqueeze(dim) for name, value in relative.items()}
            t, p_pos, p_neg = product.weights(s_pos[at].unsqueeze(dim), tile[part], own)
            met = live[part] * share[1 - dim, at].unsqueeze(dim)
            if not fits:
                loss = product.value(s_pos[at].unsqueeze(dim), tile[part])
                gone = (met != 0) & lost(s_pos[at].unsqueeze(dim), tile[part], p_pos, p_neg, loss)
                met = torch.where(gone, torch.nan, met)
            selected = met * t
            g[part] += selected * p_neg
            pull[1 - dim][at] += (selected * p_pos).sum(dim)
        if any(needs):
            _accumulate(gx, gy, rows, similarity.tile_vjp(x[rows], y, g, needs))
    return gx, gy


def _accumulate(gx: Tensor | None, gy: Tensor | None, rows: slice, found: Gradients) -> None:
    if gx is not None and found[0] is not None:
        gx[rows] += found[0]
    if gy is not None and found[1] is not None:
        gy += found[1]


Index = tuple[slice, slice]


def _directions(tile: Tensor, masks: Masks) -> Iterator[tuple[int, Index, slice]]:
    """For x→y and y→x: the candidates' dimension, a tile's part with anchors, and which anchors those are."""
    n, m = masks.anchors(0, tile.shape[0]), masks.anchors(1, tile.shape[1])
    yield 1, (slice(0, n), slice(None)), slice(masks.row_offset, masks.row_offset + n)
    yield 0, (slice(None), slice(0, m)), slice(masks.col_offset, masks.col_offset + m)
