"""Triplet weights T(s⁺, s⁻): how much a triplet counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from goal.terms.probe import probe
from goal.terms.registry import T
from goal.terms.term import Potential


def triplet_weight(
    name: str, *, statistics: Sequence[str] = (), potential: Mapping[str, Potential] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a triplet weight T(s⁺, s⁻) under a name.

    The function is written ``def f(s_pos, s_neg, *, tau=10.0)``: torch operators only, elementwise, returning a
    tensor that broadcasts with its inputs, or a plain number. Parameters called ``tau``, ``alpha`` and ``beta`` must
    be > 0, ``margin`` and ``eps`` >= 0.

    Args:
        name: the name of the weight; hyphens and underscores are equivalent.
        statistics: relative similarities that it needs, from `goal.terms.STATISTICS`; passed as keyword tensors.
        potential: pair weight's name → ``f(s_pos, s_neg, *, ...)``, for the pair weights with which the weight has a
            loss: the loss whose gradient is (−T·P⁺, T·P⁻), used as the returned value. It reads parameters of either
            term by name, and returns None for parameters that leave no potential.

    Raises:
        ValueError: the name is taken or malformed, or a statistic is unknown; or, with its default parameters on
            [−1, 1]², the term fails, is not elementwise, is not finite, or is a negative T; the message says at which
            point. A negative P gives a warning: it pulls instead of pushing.
        TypeError: the signature is not that of a term.

    Example:
        >>> import goal, torch
        >>> @goal.triplet_weight("soft-hinge")
        ... def soft_hinge(s_pos, s_neg, *, tau=10.0, margin=0.2):
        ...     return torch.sigmoid(tau * (s_neg - s_pos + margin))
        >>> goal.T.soft_hinge(tau=5.0)
        T.soft_hinge(tau=5.0, margin=0.2)
    """
    return T.register(name, statistics, potential, probe)


@T.register("con")
def _t_con(s_pos: Tensor, s_neg: Tensor, *, margin: float | None = None) -> Any:
    """1, or with a margin the hinge 1[s⁻ − s⁺ + m > 0] of the triplet loss."""
    return 1.0 if margin is None else (s_neg - s_pos + margin > 0).to(s_neg.dtype)


@T.register("nca")
def _t_nca(s_pos: Tensor, s_neg: Tensor, *, tau: float = 10.0) -> Tensor:
    """σ(τ(s⁻ − s⁺)): NCA, or InfoNCE with one negative."""
    return torch.sigmoid(tau * (s_neg - s_pos))


@T.register("cir")
def _t_cir(s_pos: Tensor, s_neg: Tensor, *, tau: float = 10.0) -> Tensor:
    """σ(τ[(1 − s⁺)² + s⁻² − ½]): circle loss with m = ½."""
    return torch.sigmoid(tau * ((s_pos - 1).square() + s_neg.square() - 0.5))
