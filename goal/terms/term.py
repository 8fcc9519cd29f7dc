"""Terms: a registered weight is a `Definition`, and with its parameters bound a `Term`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from goal.names import Parameter
from goal.validation import check_bool, check_number

Potential = Callable[..., Tensor | None]
# The relative similarities that a term may declare, with the parameter that they read from the term.
# All are means over a batch-dependent set, 0 for an empty set, constants for the gradient; shape of the anchors.
STATISTICS: Mapping[str, str | None] = {
    "r_pos_lin": None,  # R⁺ = mean (s⁺ᵢ − s⁺ₖ)  over k ≠ i with s⁺ₖ ≤ s⁻ᵢ + 0.1, without zeros
    "r_neg_lin": None,  # R⁻ = mean (s⁻ᵢ − sᵢⱼ)  over non-hardest negatives with sᵢⱼ ≥ min s⁺ − 0.1, without zeros
    "r_pos_exp": "alpha",  # R⁺ = mean exp(α(s⁺ᵢ − s⁺ₖ))  over the same k, without k = i
    "r_neg_exp": "beta",  # R⁻ = mean exp(−β(s⁻ᵢ − sᵢⱼ))  over the same j
}


@dataclass(frozen=True)
class Term:
    """A registered weight with its parameters bound, as `goal.T.cir(tau=5.0)` returns it.

    Call it with the similarities (any broadcastable shapes) and the statistics that it declares.
    """

    definition: Definition
    values: tuple[tuple[str, Parameter], ...]  # the parameters, in the order of the function's signature

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def params(self) -> dict[str, Parameter]:
        return dict(self.values)

    @property
    def statistics(self) -> tuple[str, ...]:
        return self.definition.statistics

    def __call__(self, s_pos: Tensor, s_neg: Tensor, **statistics: Tensor) -> Any:
        return self.definition.function(s_pos, s_neg, **self.params, **statistics)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.params.items())
        return f"{self.definition.registry}.{self.name.replace('-', '_')}({shown})"


@dataclass(frozen=True, eq=False)
class Definition:
    """A registered term: its function, the defaults of its parameters, its statistics and its potentials."""

    registry: str  # "T" or "P"
    name: str
    function: Callable[..., Any]
    defaults: Mapping[str, Parameter]
    statistics: tuple[str, ...] = ()
    potentials: Mapping[str, tuple[Potential, tuple[str, ...]]] = field(default_factory=dict)  # and their parameters

    def __call__(self, **params: object) -> Term:
        owner = f"goal.{self.registry}.{self.name.replace('-', '_')}"
        if stray := [name for name in params if name not in self.defaults]:
            raise TypeError(f"{owner} has no parameter {stray[0]!r}. Known: {', '.join(self.defaults) or 'none'}.")
        return Term(self, tuple((n, self._checked(owner, n, params.get(n, d), d)) for n, d in self.defaults.items()))

    def __reduce__(self) -> tuple[Callable[..., Definition], tuple[object, ...]]:
        """Pickle a registered term by its name, so that a copy is the same term; any other term by its parts."""
        if self.name in (registry := REGISTRIES[self.registry]) and registry[self.name] is self:
            return _registered, (self.registry, self.name)
        parts = self.function, dict(self.defaults), self.statistics, dict(self.potentials)
        return Definition, (self.registry, self.name, *parts)

    @staticmethod
    def _checked(owner: str, name: str, value: object, default: Parameter) -> Parameter:
        if isinstance(default, bool):
            return check_bool(f"{owner}: parameter {name!r}", value)
        if value is None and default is None:
            return None
        return check_number(owner, name, value)


REGISTRIES: dict[str, Any] = {}  # kind → `Registry`; filled by registry.py


def _registered(registry: str, name: str) -> Definition:
    """The registered term of this name, for unpickling."""
    if name not in REGISTRIES[registry]:
        raise ValueError(
            f"goal.{registry} has no {name!r} in this process, and what is loaded uses it: import the module that "
            "registers it before loading."
        )
    definition: Definition = REGISTRIES[registry][name]
    return definition
