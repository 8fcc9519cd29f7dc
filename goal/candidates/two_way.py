"""Objectives with other candidates in each of the two directions, as two one-way calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from goal.engine.call import Call
from goal.functional import emitted
from goal.objective import Objective
from goal.stats import Stats, stats

Candidates = tuple[Tensor, Tensor]  # rows (A, D) and their ids (A,)


class TwoWay(nn.Module):
    """Base class of objectives in which anchors of x meet y and some rows A, anchors of y meet x and some rows B.

    It makes two calls, (x, [y; A]) for x→y and ([x; B], y) for y→x, each with weight 0 for the other direction. In a
    single call the rows of A and B would be pairs; with two calls they enter neither min s⁺ nor the positive sets.

    If the objective has a `group=`, the batch is the global one, and every rank computes all of it
    (`goal.distributed.gathered`); `stats` are those of all ranks' anchors.

    Args:
        objective: the objective of both calls.

    Raises:
        TypeError: objective is no `goal.Objective`.
        ValueError: the objective has exchange="ring", with which no rank would have all rows, or positives by ids.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be a goal.Objective, got {type(objective).__name__}.")
        if objective.ranks is not None and objective.ranks.exchange != "gather":
            raise ValueError(f"exchange must be 'gather' where rows are added, got {objective.ranks.exchange!r}.")
        if objective.settings.positives.by_ids:
            raise ValueError(f"positives must be 'pair' where rows are added, got {objective.settings.positives!r}.")
        self.objective = objective
        self._seen: list[Any] = []  # settings and `Seen` of the two calls

    def _emit(self, call: Call, beside_x: Candidates, beside_y: Candidates) -> Tensor:
        """The scalar of a checked call, with candidates beside both sides; the first K = min(N, M) rows are anchors.

        The caller has made sure that the candidates are finite, if the objective checks for NaN and inf.
        """
        assert call.ids is not None
        assert call.y_ids is not None
        (x, y), (b, b_ids), (a, a_ids) = call.inputs, beside_x, beside_y
        k = min(len(x), len(y))
        scale = x.new_ones(k) if call.weight is None else call.weight
        one_way = torch.eye(2, dtype=scale.dtype, device=scale.device)[:, :, None] * scale  # (2, 2, K)
        sides = (
            (x[:k], torch.cat([y, a]), call.ids[:k], torch.cat([call.y_ids, a_ids])),
            (torch.cat([x, b]), y[:k], torch.cat([call.ids, b_ids]), call.y_ids[:k]),
        )
        losses, self._seen = [], []
        for (rows, cols, ids, y_ids), weight in zip(sides, one_way, strict=True):
            needs, detached = (rows.requires_grad, cols.requires_grad), (rows.detach(), cols.detach())
            one = Call(*detached, ids, y_ids, weight, needs, call.finite, (rows, cols))
            loss, seen = emitted(one, self.objective.traced)
            losses.append(loss)
            self._seen.append((self.objective.settings, seen))
        return losses[0] + losses[1]

    @property
    def settings(self) -> Any:
        """The settings of the objective."""
        return self.objective.settings

    @property
    def stats(self) -> Stats:
        """`goal.Stats` of the last call; an index from M (x→y) or N (y→x) on is a row beside the batch."""
        if not self._seen:
            raise RuntimeError("stats are those of the last call, and there was none: call objective(x, y) first.")
        with torch.no_grad():
            forth, back = (stats(settings, seen) for settings, seen in self._seen)
            fallback = [seen.fallback[side] for side, (_, seen) in enumerate(self._seen) if seen.fallback is not None]
        shown = [name for name in _OF_EACH_DIRECTION if getattr(forth, name) is not None]
        both = {name: torch.stack([getattr(forth, name)[0], getattr(back, name)[1]]) for name in shown}
        return Stats(
            s_pos=forth.s_pos,
            active=(both["T"] != 0).to(both["T"].dtype).mean(),
            fallback=torch.stack(fallback).to(forth.s_pos.dtype).mean() if fallback else forth.fallback,
            **both,
        )


_OF_EACH_DIRECTION = ("s_neg", "index", "T", "P_pos", "P_neg", "recall_at_1", "effective")
