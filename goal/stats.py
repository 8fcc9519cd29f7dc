"""Statistics of an objective's last batch, for logs and diagnosis."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.engine.path import Seen
from goal.engine.settings import Settings
from goal.engine.weigh import weights_of


class Stats(NamedTuple):
    """Statistics of a batch: detached tensors in the computing dtype; row 0 is x→y, row 1 is y→x.

    Of positives by ids, s⁺ is (2, A) with A = max(N, M): what stands for an anchor's positives, inf if it has none, or
    if the direction has no such anchor; shares are of the anchors that have positives.

    The negative is the one that mining selects; with all negatives, the hardest. Soft mining has s̃⁻, which stands for
    all of them, and the index of the hardest. With `group=` the K anchors, and all
    shares, are those of this rank; an index is a row of the global batch.
    """

    s_pos: Tensor  # (K,) similarity of each pair; (2, A) for positives by ids
    s_neg: Tensor  # (2, K) similarity of the negative; −inf if an anchor has none
    index: Tensor  # type: ignore[assignment]  # (2, K) int64, the negative's row in y or in x; −1 if there is none
    T: Tensor  # (2, K) triplet weight; 0 if an anchor has no negative
    P_pos: Tensor  # (2, K)
    P_neg: Tensor  # (2, K)
    active: Tensor  # 0-d, share of the 2K anchors whose triplet has T ≠ 0
    fallback: Tensor  # 0-d, share of the 2K anchors on selective mining's mean over all negatives
    recall_at_1: Tensor  # (2,) share of anchors with s⁺ > every negative in the batch (ties count against)
    effective: Tensor | None = None  # (2, K) effective number of negatives, 1 / Σ q², of soft mining

    def __str__(self) -> str:
        """Means, in one line."""
        s_neg, (forth, back) = self.s_neg[self.s_neg != -torch.inf], self.recall_at_1.tolist()
        negative = f"{s_neg.mean().item():.3f}" if s_neg.numel() else "none"
        s_pos = self.s_pos[self.s_pos != torch.inf]
        what = "pairs" if self.s_pos.dim() == 1 else "anchors with positives"
        return (
            f"{len(s_pos)} {what}: s⁺ {s_pos.mean().item():.3f}, s⁻ {negative}, recall@1 {forth:.3f} (x→y) "
            f"{back:.3f} (y→x), active {self.active.item():.3f}"
            + ("" if self.effective is None else f", {self.effective.mean().item():.1f} effective negatives")
        )


def stats(settings: Settings, seen: Seen) -> Stats:
    """`Stats` of a call; mines only if forward did not."""
    statistics = seen.statistics
    if statistics is None or (seen.stands is not None and statistics.effective is None):
        statistics = seen.miner.mine(settings.shown)
    s_pos, (s_neg, index) = statistics.s_pos, statistics.selected
    index = torch.where(s_neg == -torch.inf, -1, index)
    s_neg = s_neg if seen.stands is None else seen.stands
    counts = (s_pos != torch.inf).expand_as(s_neg)  # all of them are pairs' anchors
    has = (s_neg != -torch.inf) & counts
    weights = weights_of(settings, statistics) if seen.weights is None else seen.weights
    t, p_pos, p_neg = (torch.where(has, _full(weight, s_neg), 0) for weight in weights)
    on_fallback = torch.zeros_like(has) if seen.fallback is None else seen.fallback
    return Stats(
        s_pos=s_pos,
        s_neg=s_neg,
        index=index,
        T=t,
        P_pos=p_pos,
        P_neg=p_neg,
        active=_share(t != 0, counts, None, t.dtype),
        fallback=_share(on_fallback, counts, None, t.dtype),
        recall_at_1=_share(s_pos > statistics.hardest[0], counts, 1, t.dtype),
        effective=statistics.effective,
    )


def _share(of: Tensor, among: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """The share of the anchors that count, of both directions together or (2,) of each; 0 if none counts."""
    return (of & among).to(dtype).sum(dim) / among.sum(dim).clamp(min=1)


def _full(weight: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(weight, dtype=like.dtype, device=like.device).expand_as(like)
