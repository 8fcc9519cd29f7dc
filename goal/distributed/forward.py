"""An objective over the batches of many ranks: `group=` of `goal.apply`, `goal.gradients` and `goal.Objective`.

The global batch is the ranks' rows in rank order. A call has six steps:

    agree    every rank sends a line: its number of rows, a digest of its arguments, any error       O(1)
    share    s⁺, ids and weights of all pairs                                                        O(N)
    mine     each rank mines its own rows of x against all rows of y, so every tile of S is computed once; rows of y
             arrive in an all-gather (`gather.py`) or block by block round a ring (`ring.py`), during the mining
    home     partials of columns go to the ranks that own the columns and are merged and finished there; then all
             ranks share all statistics                                                              O(N)
    weigh    every rank weighs all anchors, so it knows all entries of G                             O(N)
    emit     ∂l/∂x and ∂l/∂y of the rank's own rows; nothing is sent in backward

All messages go through `goal.distributed.exchange`, as rows of bytes, and are counted there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.distributed.agree import Agreed, Line, agree
from goal.distributed.exchange import Ranks, Wire, pack, unpack
from goal.distributed.gather import Gathered
from goal.distributed.ring import Ring
from goal.distributed.rows import columns_of, described, of_all
from goal.distributed.spread import Spread
from goal.engine.backend import Backend, backend
from goal.engine.call import Arguments, Call
from goal.engine.path import Outcome, Seen, check_ids, pulled_back, weighed_by
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Block, Gradients, Masks, Needs, Pairs
from goal.engine.weigh import Weighed, share_of, weights_of


def forward(arguments: Arguments, settings: Settings, over: Ranks, shown: bool) -> Outcome:
    """The objective of the global batch; `shown`: mine statistics in any case. All ranks call it together."""
    wire, mines = Wire(over.group), settings.mines or (shown and over.exchange == "ring")
    settings = settings.shown if shown and over.exchange == "ring" else settings
    ready: Ready | None = None
    try:
        call = arguments.checked(even=True)
        does, _ = backend(settings, call.x, call.y)
        n = len(call.x)
        block, by_ids = does.block(call.x, call.y, Masks(n, n, (n, n))), settings.positives.by_ids
        if by_ids and settings.mining.dense != "never":
            raise ValueError(f"positives must be 'pair' for mining={settings.mining.name!r} over ranks.")
        if not by_ids:
            check_ids(call, settings.positives)
        pairs = Pairs(block.x.new_zeros(n), block.x.new_empty(0)) if by_ids else does.pair(block.x, block.y, n)
        bounds = does.bounds(block, pairs, settings.request)
        same = {**described(call), **_described(settings, does), "averaged": over.averaged}
        line = Line(n, {**same, "exchange": over.exchange, "mines": mines}, None, call.needs, tuple(bounds))
        ready = Ready(call, does, block, pairs)
    except (TypeError, ValueError) as refused:
        line = Line(0, {}, refused)
    device = arguments.x.device if isinstance(arguments.x, Tensor) else torch.device("cpu")
    agreed = agree(wire, line, device)
    assert ready is not None
    spread = _share(wire, settings, ready, agreed)
    blocks = Ring(spread) if over.exchange == "ring" else Gathered(spread)
    if settings.positives.by_ids:
        check_ids(ready.call._replace(ids=spread.masks.ids, y_ids=spread.masks.y_ids), settings.positives)
        spread = blocks.spread = _with_positives(spread, blocks.positives(), agreed)
    own = blocks.statistics() if mines else None
    statistics = None if own is None else _shared(spread, own)
    weighed = weighed_by(spread.backend, settings, spread.masks, spread.pairs, statistics, spread.share)
    part, emit = blocks.finish(weighed.coefficients)
    value = weighed.value
    if part is not None:
        value = value + wire.gather(part.view(1, 1).view(torch.uint8), [1] * wire.size).wait().view(part.dtype).sum()
    emission = Emission(spread, emit, wire.size if over.averaged else 1)
    return Outcome(value, emission, _seen(spread, weighed, own, statistics, blocks))


class Ready(NamedTuple):
    """A rank's data before the first exchange."""

    call: Call
    backend: Backend
    block: Block  # the own rows, embedded
    pairs: Pairs  # of the own rows


def _share(wire: Wire, settings: Settings, ready: Ready, agreed: Agreed) -> Spread:
    """s⁺, ids and weights of all pairs in one exchange."""
    call, does, block, pairs = ready
    columns = [pairs.s_pos, *columns_of(call)]
    s_pos, *rest = unpack(wire.gather(pack(*columns), agreed.counts).wait(), columns)
    ids, y_ids, weight = of_all(call, rest)
    k, start = len(s_pos), sum(agreed.counts[: wire.rank])
    by_ids, here = settings.positives.by_ids, slice(start, start + len(block.x))
    masks = Masks(k, k, (k, k), ids=ids, y_ids=y_ids, by_ids=by_ids, one_set=call.one_set)
    own = block._replace(masks=masks.block(here, here))
    pairs = Pairs(s_pos, agreed.bounds.to(pairs.bounds.dtype))
    share = share_of(pairs, weight, settings, masks)
    return Spread(wire, agreed.counts, settings, does, (call.x, call.y), own, masks, pairs, share, agreed.needs)


def _with_positives(spread: Spread, own: Pairs, agreed: Agreed) -> Spread:
    """The positives by ids of all ranks' anchors, from those of the own anchors."""
    fields = own.s_pos, own.hardest, own.log_sum, own.exact
    columns = [one.T for one in fields if one is not None]
    every = iter(unpack(spread.wire.gather(pack(*columns), spread.counts).wait(), columns))
    s_pos, *rest = (None if one is None else next(every).T.contiguous() for one in fields)
    assert s_pos is not None
    return spread._replace(pairs=Pairs(s_pos, agreed.bounds, *rest))


def _described(settings: Settings, does: Backend) -> dict[str, object]:
    """The parts of an objective that must be the same on all ranks."""
    return {
        "T": settings.product.T,
        "P": settings.product.P,
        "mining": settings.mining,
        "positives": settings.positives,
        "similarity": settings.similarity.name,
        "reduction": settings.reduction,
        "scale": settings.factor,
        "directions": settings.directions,
        "impl": does.impl,
        "precision": does.precision,
    }


def _seen(spread: Spread, weighed: Weighed, own: Statistics | None, statistics: Statistics | None, blocks: Any) -> Seen:
    """The fields of `Stats` for the own anchors."""
    here, weights = spread.here, weighed.weights
    if weights is None and statistics is not None:  # R⁺ is over all pairs: the own pairs alone do not give it
        weights = weights_of(spread.settings, statistics)
    if weights is not None:
        own_ones = (one[..., here] if isinstance(one, Tensor) and one.dim() else one for one in weights)
        weights = type(weights)(*own_ones)
    fallback, stands = (None if one is None else one[:, here] for one in (weighed.fallback, weighed.stands))
    return Seen(spread.pairs.s_pos[..., here], own, weights, fallback, stands, blocks)  # `blocks` keeps all rows alive


def _shared(spread: Spread, own: Statistics) -> Statistics:
    """The statistics of all ranks' anchors, from those of the own anchors."""
    fields = own._replace(effective=None)[1:-1]  # nothing is weighed by the effective number
    columns = [one.movedim(-1, 0) for one in fields if one is not None]
    rows = spread.wire.gather(pack(*columns), spread.counts).wait()
    every = iter(unpack(rows, columns))
    shared: list[Any] = [None if one is None else next(every).movedim(0, -1).contiguous() for one in fields]
    return Statistics(spread.pairs.s_pos, *shared)


# ── the call ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Emission(NamedTuple):
    """Emits the gradient of the own rows."""

    spread: Spread
    own: Callable[[Tensor | None, Needs], Gradients]  # (incoming, needs) → at the embedded own rows
    by: int  # factor of the gradient
    kept: Tensor | None = None  # ranks keep no large tensor but rows

    def keeping(self, kept: Tensor | None) -> Emission:
        return self

    def emit(self, x: Tensor, y: Tensor, incoming: Tensor | None, needs: Needs) -> Gradients:
        if self.by != 1:
            incoming = self.spread.pairs.s_pos.new_tensor(self.by) if incoming is None else incoming * self.by
        gradients = self.own(incoming, needs)
        return pulled_back(self.spread.backend.similarity, (x, y), self.spread.own, gradients)
