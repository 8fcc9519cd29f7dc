"""Registries: the triplet weights and the pair weights by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from goal.names import Parameter, spell, unknown
from goal.terms.term import REGISTRIES, STATISTICS, Definition, Potential, Term


class Registry:
    """The weights of one kind by name: `goal.T` and `goal.P`.

    `goal.T.cir(tau=5.0)` binds parameters; `"cir" in goal.T`, `list(goal.T)` and `goal.T["cir"]` look names up.
    """

    def __init__(self, kind: str, meaning: str) -> None:
        self._kind = kind
        self._meaning = meaning
        self._definitions: dict[str, Definition] = {}

    def __getattr__(self, name: str) -> Definition:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except ValueError as error:
            raise AttributeError(str(error)) from None

    def __getitem__(self, name: str) -> Definition:
        if spell(name) not in self._definitions:
            raise unknown(self._kind, name, list(self._definitions))
        return self._definitions[spell(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and spell(name) in self._definitions

    def __iter__(self) -> Iterator[str]:
        return iter(self._definitions)

    def __len__(self) -> int:
        return len(self._definitions)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(name.replace("-", "_") for name in self)]

    def __repr__(self) -> str:
        return f"goal.{self._kind}: {self._meaning}s {', '.join(self)}"

    def bind(self, term: str | Term | Definition) -> Term:
        """A term from what a user passes as `T=` or `P=`: a name, `goal.T.cir`, or `goal.T.cir(tau=5.0)`."""
        if isinstance(term, str):
            return self[term]()
        if isinstance(term, Definition):
            term = term()
        if not isinstance(term, Term):
            raise TypeError(
                f"{self._kind} must be a name or a {self._meaning} such as goal.{self._kind}.con(), "
                f"got {type(term).__name__} ({term!r})."
            )
        if term.definition.registry != self._kind:
            raise TypeError(f"{self._kind}={term!r} is not a {self._meaning}.")
        return term

    def register(
        self,
        name: str,
        statistics: Sequence[str] = (),
        potential: Mapping[str, Potential] | None = None,
        check: Callable[[Term], None] = lambda term: None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The decorator of `goal.triplet_weight` and `goal.pair_weight`; `check` gets the term with its defaults."""
        if not isinstance(name, str) or not spell(name).replace("-", "").isalnum():
            raise ValueError(f"name={name!r} must consist of letters, digits, '-' and '_'.")
        for statistic in statistics:
            if statistic not in STATISTICS:
                raise unknown("statistics", statistic, list(STATISTICS))

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            if spell(name) in self._definitions:
                raise ValueError(f"A {self._meaning} called {spell(name)!r} is registered already.")
            defaults = _defaults(function, statistics)
            potentials = {spell(other): (f, _asked(f)) for other, f in (potential or {}).items()}
            definition = Definition(self._kind, spell(name), function, defaults, tuple(statistics), potentials)
            check(definition())  # the defaults must be valid parameters
            self._definitions[spell(name)] = definition
            return function

        return decorate


def _defaults(function: Callable[..., Any], statistics: Sequence[str]) -> dict[str, Parameter]:
    """The keyword-only parameters of a term's function, after checking its signature."""
    parameters = list(inspect.signature(function).parameters.values())
    shape = f"def {function.__name__}(s_pos, s_neg, *, tau=10.0, {', '.join(statistics)})".replace(", )", ")")
    if [p.name for p in parameters[:2]] != ["s_pos", "s_neg"] or any(
        p.kind is not p.KEYWORD_ONLY for p in parameters[2:]
    ):
        raise TypeError(f"A term is written as `{shape}`, got `{function.__name__}{inspect.signature(function)}`.")
    asked = {p.name for p in parameters[2:] if p.default is p.empty}
    if asked != set(statistics):
        raise TypeError(
            f"`{function.__name__}`: keywords without a default are the declared statistics {sorted(statistics)}, "
            f"got {sorted(asked)}. Give parameters a default; declare statistics with `statistics=(...)`."
        )
    given = {p.name: p.default for p in parameters[2:] if p.default is not p.empty}
    defaults = {name: bool(value) if isinstance(value, np.bool_) else value for name, value in given.items()}
    for statistic in statistics:
        reads = STATISTICS[statistic]
        if reads is not None and reads not in defaults:
            raise TypeError(f"`{function.__name__}` declares {statistic!r}, which reads a parameter {reads!r}.")
    return defaults


def _asked(potential: Potential) -> tuple[str, ...]:
    """The parameters that a potential reads from the terms."""
    return tuple(inspect.signature(potential).parameters)[2:]


T = Registry("T", "triplet weight")
P = Registry("P", "pair weight")
REGISTRIES.update(T=T, P=P)
