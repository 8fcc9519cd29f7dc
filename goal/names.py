"""Names of terms, rules and settings: a canonical spelling, their text with parameters, an error for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

R = TypeVar("R")

Parameter = float | bool | None  # of a term
Value = Parameter | str  # of a mining rule, too


@dataclass(frozen=True)
class Named:
    """A name with those of its parameters that differ from their defaults, in the order of their definition.

    >>> str(Named.of("sig", {"alpha": 2.0, "beta": 20.0}, {"alpha": 2.0, "beta": 10.0}))
    'sig(beta=20)'
    """

    name: str
    parameters: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, name: str, values: Mapping[str, Value], defaults: Mapping[str, Value]) -> Named:
        """The name with `values`, without the values that are defaults."""
        off = ((key, values[key]) for key, default in defaults.items() if key in values and values[key] != default)
        return cls(name, tuple(off))

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={literal(value)}" for name, value in self.parameters)
        return f"{self.name}({inside})" if inside else self.name


def line(products: Iterable[str], axes: Mapping[str, str]) -> str:
    """An objective's text: its terms or its recipe, then each axis by its keyword; the mining rule needs none.

    >>> line(["cir", "sig"], {"mining": "semi-hard", "reduction": "sum"})
    'cir × sig | semi-hard | reduction=sum'
    """
    tail = (text if axis == "mining" else f"{axis}={text}" for axis, text in axes.items())
    return " | ".join([" × ".join(products), *tail])


def literal(value: Value) -> str:
    """A value as text that reads back to the same value."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)).removesuffix(".0")


def spell(name: str) -> str:
    """The registered spelling of a name: with hyphens instead of underscores."""
    return name.replace("_", "-")


def rule_of(argument: str, given: object, kind: type[R], rules: Mapping[str, Callable[..., R]], example: str) -> R:
    """A rule from what a user passes: an object of its kind, or a name, with its defaults."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, str):
        raise TypeError(f"{argument} must be a name or an object such as {example}, got {given!r}.")
    if spell(given) not in rules:
        raise unknown(argument, given, list(rules))
    return rules[spell(given)]()


def unknown(argument: str, came: object, known: Sequence[str]) -> ValueError:
    """The error for an unknown name: the name, the nearest known name, and all known names."""
    return ValueError(f"{argument}={came!r} is not known.{nearest(came, known)} Known: {', '.join(known)}.")


def nearest(came: object, known: Sequence[str]) -> str:
    """The question whether the nearest known name was meant; empty if no known name is near."""
    near = difflib.get_close_matches(spell(str(came)), known, n=1) or difflib.get_close_matches(str(came), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
