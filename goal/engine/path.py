"""pair → mine → weigh → emit: the path of every objective, over any blocks of S.

s⁺                      pair   O(N·D)
Statistics              mine   O(N·M·D), the only quadratic step
T, P⁺, P⁻, entries of G weigh  O(N), plain tensor functions
∂l/∂x, ∂l/∂y            emit   O(N·D) for mined objectives

Here the batch is in a single process, and a single block is all of S (`Whole`). For a batch that is spread over ranks,
`goal.distributed` supplies the blocks and uses the same `emit_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from goal.engine import operators
from goal.engine.backend import Backend, backend
from goal.engine.call import Call
from goal.engine.settings import Settings
from goal.engine.statistics import Statistics
from goal.engine.types import Block, Coefficients, Entries, Gradients, Masks, Mined, Needs, Pairs, Soft, total
from goal.engine.weigh import Weighed, share_of, weigh
from goal.positives import Positives
from goal.similarity import Dot
from goal.terms.product import Weights
from goal.validation import check_paired, check_positives


class Mines(Protocol):
    """A batch that can be mined."""

    def mine(self, settings: Settings) -> Statistics:
        """The statistics of the own anchors."""
        ...


class Seen(NamedTuple):
    """Inputs of the weights, for `Stats`; row 0 is x→y, row 1 is y→x."""

    s_pos: Tensor  # (K,)
    statistics: Statistics | None
    weights: Weights | None  # of the mined triplets; fields (2, K) or a number
    fallback: Tensor | None  # (2, K) bool: anchors that use all their negatives
    stands: Tensor | None  # (2, K) s̃⁻ of soft mining
    miner: Mines  # mines on request, if the objective mined nothing


class Emits(Protocol):
    """Emits the gradient of a call in backward."""

    @property
    def kept(self) -> Tensor | None:
        """A large tensor that was kept for backward, and may be freed after it."""
        ...

    def keeping(self, kept: Tensor | None) -> Emits:
        """The same with this in its place."""
        ...

    def emit(self, x: Tensor, y: Tensor, incoming: Tensor | None, needs: Needs) -> Gradients:
        """∂l/∂x and ∂l/∂y in the inputs' dtypes, times the incoming gradient; None for a side that needs none."""
        ...


class Outcome(NamedTuple):
    """The result of forward."""

    value: Tensor  # 0-d
    emission: Emits
    seen: Seen


class Whole(NamedTuple):
    """A batch in one process: one block, which is all of S."""

    backend: Backend
    block: Block
    pairs: Pairs

    def mine(self, settings: Settings) -> Statistics:
        """The mining stage."""
        return operators.statistics(self.backend, self.block, self.pairs, settings.request)


def batch_of(call: Call, settings: Settings) -> Whole:
    """The batch of a call: embedded, with its pairs."""
    does, _ = backend(settings, call.x, call.y)
    n, m = call.x.shape[0], call.y.shape[0]
    by_ids = settings.positives.by_ids
    check_ids(call, settings.positives)
    masks = Masks(n, m, (n, m), ids=call.ids, y_ids=call.y_ids, by_ids=by_ids, one_set=call.one_set)
    block = does.block(call.x, call.y, masks)
    if by_ids:
        return Whole(does, block, operators.positives(does, block, settings.positives))
    return Whole(does, block, operators.pair(does, block, settings.mining.dense == "never"))


def check_ids(call: Call, positives: Positives) -> None:
    """Check that the ids fit the rule of positives; what they hold is read where entries are checked to be finite."""
    if positives.by_ids and (call.finite or call.ids is None):
        check_positives(call.ids, call.y_ids, call.one_set, positives)
    if positives.by_ids and call.weight is not None and len(call.x) != len(call.y):
        raise ValueError(
            f"weight wants as many rows of x as of y where positives are {positives!r}, got {len(call.x)} and "
            f"{len(call.y)}: then every row of both is an anchor."
        )
    if not positives.by_ids and call.finite:
        check_paired(call.ids, call.y_ids)


def forward(call: Call, settings: Settings) -> Outcome:
    """The value, and the objects that backward needs besides x and y."""
    batch = batch_of(call, settings)
    does, block, pairs = batch
    share = share_of(pairs, call.weight, settings, block.masks)
    statistics = batch.mine(settings) if settings.mines else None
    weighed = weighed_by(does, settings, block.masks, pairs, statistics, share)
    value, dense = weighed.value, weighed.coefficients.dense
    if dense is not None:
        value = value + operators.dense_value(does, block, dense.valued)
    emission = Emission(does, block.masks, weighed.coefficients)
    return Outcome(value, emission, seen(pairs.s_pos, statistics, weighed, batch))


def seen(s_pos: Tensor, statistics: Statistics | None, weighed: Weighed, miner: Mines) -> Seen:
    """The fields of `Stats`, without what was kept for the gradient."""
    if statistics is not None:
        statistics = statistics._replace(exps=None)
    return Seen(s_pos, statistics, weighed.weights, weighed.fallback, weighed.stands, miner)


def weighed_by(
    does: Backend, settings: Settings, masks: Masks, pairs: Pairs, statistics: Statistics | None, share: object
) -> Weighed:
    """The weighing stage: small mined objectives on kernels in one launch, all others by plain tensor functions."""
    alike = not isinstance(share, Tensor) or share.dim() == 1  # same in both directions, as the kernel requires
    mined = statistics is not None and settings.mining.dense == "never"
    if statistics is not None and mined and alike and does.weighs(settings.product, masks.pairs):
        entries, value = does.weigh(statistics, settings.product, share)
        return Weighed(value, Coefficients(entries))
    return weigh(settings, masks, pairs, statistics, share)


# ── emit ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Emission(NamedTuple):
    """Emits the gradient of a batch in one process."""

    backend: Backend
    masks: Masks
    coefficients: Coefficients

    @property
    def kept(self) -> Tensor | None:
        soft = self.coefficients.soft
        return None if soft is None or soft.exps is None else soft.exps.values

    def keeping(self, kept: Tensor | None) -> Emission:
        soft = self.coefficients.soft
        if soft is None or soft.exps is None:
            return self
        values = soft.exps.values.new_empty(0) if kept is None else kept
        soft = soft._replace(exps=soft.exps._replace(values=values))
        return self._replace(coefficients=self.coefficients._replace(soft=soft))

    def emit(self, x: Tensor, y: Tensor, incoming: Tensor | None, needs: Needs) -> Gradients:
        block = self.backend.block(x, y, self.masks)
        blocks = [(block, (True, True))]
        gradients = emit_blocks(self.backend, blocks, block, self.coefficients, incoming, needs)
        return pulled_back(self.backend.similarity, (x, y), block, gradients)


Blocks = Iterable[tuple[Block, tuple[bool, bool]]]  # with: has it all candidates of its rows, of its columns?


def emit_blocks(
    does: Backend,
    blocks: Blocks,
    own: Block,
    coefficients: Coefficients,
    incoming: Tensor | None,
    needs: Needs,
) -> Gradients:
    """∂l/∂x and ∂l/∂y at the embedded rows of the own block, from blocks that have all candidates of these rows.

    Args:
        blocks: a block counts for its rows, its columns or both, if it has all of their candidates; those are own rows.
        own: the own rows of x and of y, pair by pair.
        coefficients: of all anchors.
    """
    blocks, (mined, dense, soft, positives) = list(blocks), coefficients
    gx, gy = None, None
    of_dense: Mined | Soft | None = None  # the pulls of dense anchors at positives by ids
    if dense is not None:
        dense = dense if incoming is None else dense.times(incoming)
        pull = torch.zeros_like(dense.share)
        for block, (rows, cols) in blocks:
            at_x, at_y, taken = operators.dense_block(does, block, dense, (needs[0] and rows, needs[1] and cols))
            gx, gy = total(gx, at_x), total(gy, at_y)
            counted = [
                one if counts else torch.zeros_like(one) for one, counts in zip(taken, (rows, cols), strict=True)
            ]
            pull = pull + torch.stack(counted)
        if positives is None:
            at_x, at_y = at_pairs(does.similarity, own, dense.at_pairs(pull).sum(0), needs)
            gx, gy = total(gx, at_x), total(gy, at_y)
        else:
            of_dense = positives.entries(dense.at_pairs(pull))
    of_mined: Mined | Soft | None = None  # those of the other anchors
    if positives is not None and (mined is not None or soft is not None):
        of_mined = positives.entries(positives.pull)
    for part, times in ((soft, incoming), (mined, incoming), (of_dense, None), (of_mined, incoming)):
        if part is None:
            continue
        for block, (rows, cols) in blocks:
            at_x, at_y = entries_emit(does, block, part, times, (needs[0] and rows, needs[1] and cols))
            gx, gy = total(gx, at_x), total(gy, at_y)
    return gx, gy


def entries_emit(does: Backend, block: Block, part: Mined | Soft, incoming: Tensor | None, needs: Needs) -> Gradients:
    """∂l/∂x and ∂l/∂y of a block of S, from entries of G or shares of them, times the incoming gradient."""
    if not any(needs):
        return None, None
    if isinstance(part, Soft):
        return operators.soft_block(does, block, part if incoming is None else part.times(incoming), needs)
    return operators.mined_emit(does, block, part, incoming, needs)


def at_pairs(similarity: Dot, own: Block, value: Tensor, needs: Needs) -> Gradients:
    """∂l/∂x and ∂l/∂y at own rows, from entries of G (K,) at all pairs."""
    anchors = own.masks.anchors(0)
    k = torch.arange(anchors.stop - anchors.start, device=value.device)
    x, y = own.x.to(value.dtype), own.y.to(value.dtype)
    return similarity.vjp(x, y, Entries(k, k, value[anchors]), needs)


def pulled_back(similarity: Dot, inputs: tuple[Tensor, Tensor], own: Block, gradients: Gradients) -> Gradients:
    """The gradients at the inputs, in their dtypes, from those at the embedded rows."""

    def back(x: Tensor, embedded: Tensor, g: Tensor | None) -> Tensor | None:
        return None if g is None else similarity.pull_back(x.detach().to(g.dtype), embedded, g).to(x.dtype)

    (x, y), (gx, gy) = inputs, gradients
    return back(x, own.x, gx), back(y, own.y, gy)
