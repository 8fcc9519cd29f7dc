"""A checked objective: all its settings, without the data."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from goal import mining as mining_
from goal import similarity as similarity_
from goal import terms
from goal.engine.statistics import Request, Statistics, r_pos_exp, r_pos_lin
from goal.mining import Mining
from goal.names import unknown
from goal.similarity import Dot
from goal.terms import Parameter, Product, Term

REDUCTIONS = ("mean", "sum")
IMPLEMENTATIONS = ("auto", "torch", "triton")
PRECISIONS = ("fast", "tf32", "exact")


@dataclass(frozen=True)
class Settings:
    """A checked objective: all its settings, without the data."""

    product: Product
    mining: Mining
    similarity: Dot
    reduction: str
    request: Request  # the statistics that the miner has to compute
    impl: str
    precision: str

    @property
    def mines(self) -> bool:
        """Whether the gradient needs the mining stage."""
        return self.mining.mined != "none" or bool(self.product.statistics)

    def relative(self, statistics: Statistics) -> dict[str, Tensor]:
        """The relative similarities that the terms declared, each (2, K)."""
        relative: dict[str, Tensor] = {}
        for name in self.product.statistics:
            if name == "r_pos_lin":
                relative[name] = r_pos_lin(statistics.s_pos, statistics.s_neg)
            elif name == "r_pos_exp":
                relative[name] = r_pos_exp(statistics.s_pos, statistics.s_neg, self.product.read_by(name))
            else:
                relative[name] = getattr(statistics, name)
        return relative


def settings(
    T: str | Term,
    P: str | Term,
    mining: str | Mining,
    similarity: str | Dot,
    reduction: str,
    impl: str = "auto",
    precision: str = "fast",
) -> Settings:
    """The checked objective for the arguments of `goal.apply`; cached by arguments."""
    arguments = (T, P, mining, similarity, reduction, impl, precision)
    known = not torch.compiler.is_compiling() and all(isinstance(one, Hashable) for one in arguments)
    return (_make_once if known else _make)(*arguments)


def _make(
    T: str | Term,
    P: str | Term,
    mining: str | Mining,
    similarity: str | Dot,
    reduction: str,
    impl: str,
    precision: str,
) -> Settings:
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    if impl not in IMPLEMENTATIONS:
        raise unknown("impl", impl, IMPLEMENTATIONS)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    product, rule = Product(terms.T.bind(T), terms.P.bind(P)), mining_.bind(mining)
    request = Request(
        semi_hard=rule.margin if rule.mined == "semi-hard" else None,
        lin="r_neg_lin" in product.statistics,
        beta=product.read_by("r_neg_exp") if "r_neg_exp" in product.statistics else None,
    )
    measure = similarity if isinstance(similarity, Dot) else similarity_.bind(similarity)
    return Settings(product, rule, measure, reduction, request, impl, precision)


_make_once = functools.lru_cache(maxsize=256)(_make)
Numbers = tuple[dict[str, Parameter], dict[str, Parameter], dict[str, float | None]]  # of T, of P, of the mining


def numbers(objective: Settings) -> Numbers:
    """The parameters of T, of P and of the mining rule."""
    mining = objective.mining
    return objective.product.T.params, objective.product.P.params, {"margin": mining.margin, "eps": mining.eps}


def renumbered(
    objective: Settings, T: dict[str, Parameter], P: dict[str, Parameter], mining: dict[str, float | None]
) -> Settings:
    """The objective with other numbers."""
    old = objective.mining
    return settings(
        objective.product.T.definition(**T),
        objective.product.P.definition(**P),
        Mining(old.name, old.mined, old.dense, old.average, mining["margin"], mining["eps"]),
        objective.similarity,
        objective.reduction,
        objective.impl,
        objective.precision,
    )
