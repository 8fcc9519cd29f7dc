"""Pair weights P±(s): how hard the gradient pulls a positive and pushes a negative."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from goal.terms.probe import probe
from goal.terms.registry import P
from goal.terms.term import Potential


def pair_weight(
    name: str, *, statistics: Sequence[str] = (), potential: Mapping[str, Potential] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a pair weight (P⁺(s⁺), P⁻(s⁻)) under a name.

    Works as `triplet_weight`, but the function returns the two weights: ``return p_pos, p_neg``.

    Example:
        >>> import goal, torch
        >>> @goal.pair_weight("square")
        ... def square(s_pos, s_neg):
        ...     return (1 - s_pos) ** 2, s_neg ** 2
        >>> x = torch.eye(4, requires_grad=True)
        >>> loss = goal.apply(x, torch.eye(4), T="nca", P="square")
    """
    return P.register(name, statistics, potential, probe)


# Potentials: the losses l(s⁺, s⁻) of those T × P that have one, with ∂l/∂s⁺ = −T·P⁺ and ∂l/∂s⁻ = T·P⁻; None where the
# jump of a hinge leaves no loss.


def _triplet(s_pos: Tensor, s_neg: Tensor, *, margin: float | None) -> Tensor:
    return s_neg - s_pos if margin is None else torch.relu(s_neg - s_pos + margin)


def _softplus_triplet(s_pos: Tensor, s_neg: Tensor, *, tau: float) -> Tensor:
    return softplus(tau * (s_neg - s_pos)) / tau


def _quadratic(s_pos: Tensor, s_neg: Tensor, *, margin: float | None) -> Tensor | None:
    return ((1 - s_pos).square() + s_neg.square()) / 2 if margin is None else None


def _circle(s_pos: Tensor, s_neg: Tensor, *, tau: float) -> Tensor:
    return softplus(tau * ((1 - s_pos).square() + s_neg.square() - 0.5)) / (2 * tau)


def _binomial_deviance(
    s_pos: Tensor, s_neg: Tensor, *, margin: float | None, alpha: float, beta: float, lam: float
) -> Tensor | None:
    if margin is not None:
        return None
    return softplus(-alpha * (s_pos - lam)) / alpha + softplus(beta * (s_neg - lam)) / beta


@P.register("con", potential={"con": _triplet, "nca": _softplus_triplet})
def _p_con(s_pos: Tensor, s_neg: Tensor) -> tuple[float, float]:
    """1 and 1."""
    return 1.0, 1.0


@P.register("lin", potential={"con": _quadratic, "cir": _circle})
def _p_lin(s_pos: Tensor, s_neg: Tensor) -> tuple[Tensor, Tensor]:
    """1 − s⁺ and s⁻."""
    return 1 - s_pos, s_neg


@P.register("sig", potential={"con": _binomial_deviance})
def _p_sig(
    s_pos: Tensor, s_neg: Tensor, *, alpha: float = 2.0, beta: float = 10.0, lam: float = 0.5
) -> tuple[Tensor, Tensor]:
    """σ(−α(s⁺ − λ)) and σ(β(s⁻ − λ)): binomial deviance."""
    return torch.sigmoid(-alpha * (s_pos - lam)), torch.sigmoid(beta * (s_neg - lam))


@P.register("lin-ms", statistics=("r_pos_lin", "r_neg_lin"))
def _p_lin_ms(s_pos: Tensor, s_neg: Tensor, *, r_pos_lin: Tensor, r_neg_lin: Tensor) -> tuple[Tensor, Tensor]:
    """(1 − R⁺)(1 − s⁺) and (1 + R⁻) s⁻."""
    return (1 - r_pos_lin) * (1 - s_pos), (1 + r_neg_lin) * s_neg


@P.register("sig-ms", statistics=("r_pos_exp", "r_neg_exp"))
def _p_sig_ms(
    s_pos: Tensor,
    s_neg: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 10.0,
    lam: float = 0.5,
    self_term: bool = False,
    r_pos_exp: Tensor,
    r_neg_exp: Tensor,
) -> tuple[Tensor, Tensor]:
    """1 / (e^{α(s⁺−λ)} + R⁺) and 1 / (e^{−β(s⁻−λ)} + R⁻); `self_term` adds multi-similarity's 1 to both."""
    own = 1.0 if self_term else 0.0
    p_pos = 1 / (torch.exp(alpha * (s_pos - lam)) + (r_pos_exp + own))
    p_neg = 1 / (torch.exp(-beta * (s_neg - lam)) + (r_neg_exp + own))
    return p_pos, p_neg
