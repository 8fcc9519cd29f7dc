"""Names of terms, rules and settings: a canonical spelling, their text with parameters, an error for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Value = float | bool | None


@dataclass(frozen=True)
class Named:
    """A name and its parameters, those that are not at their defaults, in the order of their definition.

    >>> str(Named.of("sig", {"alpha": 2.0, "beta": 20.0}, {"alpha": 2.0, "beta": 10.0}))
    'sig(beta=20)'
    """

    name: str
    parameters: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, name: str, values: Mapping[str, Value], defaults: Mapping[str, Value]) -> Named:
        """Without the values that are defaults."""
        off = ((key, values[key]) for key, default in defaults.items() if key in values and values[key] != default)
        return cls(name, tuple(off))

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={_literal(value)}" for name, value in self.parameters)
        return f"{self.name}({inside})" if inside else self.name


def _literal(value: Value) -> str:
    """A value as it is written, which reads back to the same."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)).removesuffix(".0")


def spell(name: str) -> str:
    """The registered spelling of a name: hyphens, whatever was typed."""
    return name.replace("_", "-")


def unknown(argument: str, came: object, known: Sequence[str]) -> ValueError:
    """The error for an unknown name: what came, the nearest known name, and all of them."""
    return ValueError(f"{argument}={came!r} is not known.{nearest(came, known)} Known: {', '.join(known)}.")


def nearest(came: object, known: Sequence[str]) -> str:
    """The question whether a known name was meant; nothing where none is near."""
    near = difflib.get_close_matches(spell(str(came)), known, n=1) or difflib.get_close_matches(str(came), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
