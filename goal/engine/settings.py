"""A checked objective: all its settings, without the data."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goal import mining as mining_
from goal import positives as positives_
from goal import similarity as similarity_
from goal import terms
from goal.engine.statistics import Request, Statistics, by_direction, r_pos_exp, r_pos_lin
from goal.mining import Mining
from goal.names import nearest, unknown
from goal.positives import Positives
from goal.similarity import Dot
from goal.terms import Parameter, Product, Term
from goal.terms.probe import probe
from goal.validation import real_number

REDUCTIONS = ("mean", "sum")
DIRECTIONS = ("both", "x→y", "y→x")
_ALIASES = {"x->y": "x→y", "x2y": "x→y", "y->x": "y→x", "y2x": "y→x"}
Scale = float | Callable[..., Any]
_PAIR = positives_.pair()
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
    scale: Scale = 1.0  # factor of the value and of the gradient; or a function of the objective's numbers
    directions: str = "both"
    positives: Positives = _PAIR

    @property
    def factor(self) -> Any:
        """The number by which the value and the gradient are multiplied."""
        if not callable(self.scale):
            return self.scale
        known = self.numbers
        return self.scale(**{name: known[name] for name in _asked(self.scale)})

    @property
    def numbers(self) -> dict[str, Parameter]:
        """The numbers of the mining rule, of P and of T by name; of equal names T's counts, then P's."""
        known: dict[str, Parameter] = {}
        for some in (self.mining.numbers, self.product.P.params, self.product.T.params):
            known |= {name: value for name, value in some.items() if value is not None}
        return known

    @property
    def shown(self) -> Settings:
        """The same, with a request for all that `Stats` show."""
        return dataclasses.replace(
            self, request=self.request._replace(hardest=True, shares=self.request.softmax is not None)
        )

    @property
    def mines(self) -> bool:
        """Whether the gradient needs the mining stage."""
        return self.mining.mined != "none" or bool(self.product.statistics)

    def relative(self, statistics: Statistics) -> dict[str, Tensor]:
        """The relative similarities that the terms declared, each (2, K)."""
        relative: dict[str, Tensor] = {}
        for name in self.product.statistics:
            if name == "r_pos_lin":
                relative[name] = by_direction(r_pos_lin, statistics)
            elif name == "r_pos_exp":
                alpha = self.product.read_by(name)
                relative[name] = by_direction(functools.partial(r_pos_exp, alpha=alpha), statistics)
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
    scale: Scale = 1.0,
    directions: str = "both",
    positives: Positives = _PAIR,
) -> Settings:
    """The checked objective for the arguments of `goal.apply`; cached by arguments."""
    compiles = torch.compiler.is_compiling()
    if not callable(scale) and not compiles:  # before it is a key, to which True would be 1.0
        scale = real_number("scale", scale, 0.0, above=True)
    arguments = (T, P, mining, similarity, reduction, impl, precision, scale, directions, positives)
    return (_make if compiles or not _hashable(arguments) else _make_once)(*arguments)


def _make(
    T: str | Term,
    P: str | Term,
    mining: str | Mining,
    similarity: str | Dot,
    reduction: str,
    impl: str,
    precision: str,
    scale: Scale,
    directions: str,
    positives: Positives,
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
        hardest=rule.mined != "soft" or bool(product.statistics),
        softmax=rule.softmax,
    )
    measure = similarity if isinstance(similarity, Dot) else similarity_.bind(similarity)
    one_way = directions_of(directions)
    made = Settings(product, rule, measure, reduction, request, impl, precision, scale, one_way, positives)
    if not torch.compiler.is_compiling():
        _check_scale(made)
        _check_reach(made)
    return made


def _hashable(arguments: tuple[Any, ...]) -> bool:
    try:
        hash(arguments)
    except TypeError:
        return False
    return True


def directions_of(given: object) -> str:
    """The directions by their canonical name."""
    known = _ALIASES.get(given, given) if isinstance(given, str) else given
    if known not in DIRECTIONS:
        raise unknown("directions", given, DIRECTIONS)
    return str(known)


def _asked(scale: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(scale).parameters)


def _check_scale(made: Settings) -> None:
    """Check that a scale that is a function gives a number > 0 from numbers of the objective."""
    if not callable(made.scale):
        return
    known = list(made.numbers)
    if stray := [name for name in _asked(made.scale) if name not in known]:
        raise TypeError(
            f"scale asks for {stray[0]!r}, which the objective does not have.{nearest(stray[0], known)} "
            f"Known: {', '.join(known) or 'none'}."
        )
    real_number("scale", made.factor, 0.0, above=True)


def _check_reach(made: Settings) -> None:
    """Check that the terms are finite, and T >= 0, wherever soft mining's s̃⁻ may lie."""
    softmax = made.mining.softmax
    if softmax is None:
        return
    low, high = softmax.reach
    for term in (made.product.T, made.product.P):
        try:
            probe(term, (min(low, -1.0), max(high, 1.0)))
        except ValueError as error:
            advice = " normalise='mean' keeps s̃⁻ within the similarities." if softmax.normalise == "sum" else ""
            raise ValueError(
                f"{made.mining!r} does not go with {term!r}, as s̃⁻ is up to {high:.3g}: {error}{advice}"
            ) from None


_make_once = functools.lru_cache(maxsize=256)(_make)
# of T, of P, of the mining, the scale, and of the positives
Numbers = tuple[dict[str, Parameter], dict[str, Parameter], dict[str, float | None], Scale, dict[str, float]]


def numbers(objective: Settings) -> Numbers:
    """The parameters of T, of P and of the mining rule, and the scale."""
    product = objective.product
    of_positives = objective.positives.numbers
    return product.T.params, product.P.params, objective.mining.numbers, objective.scale, of_positives


def renumbered(
    objective: Settings,
    T: dict[str, Parameter],
    P: dict[str, Parameter],
    mining: dict[str, float | None],
    scale: Scale,
    positives: dict[str, float],
) -> Settings:
    """The objective with other numbers."""
    return settings(
        objective.product.T.definition(**T),
        objective.product.P.definition(**P),
        objective.mining.renumbered(mining),
        objective.similarity,
        objective.reduction,
        objective.impl,
        objective.precision,
        scale,
        objective.directions,
        objective.positives.renumbered(positives),
    )
