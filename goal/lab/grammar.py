"""A small grammar of triplet weights and pair weights, from which the search for new objectives draws.

    T  →  atom  |  atom · atom  |  mix · atom + (1 − mix) · atom
    atom  →  1  |  activation(gap)
    activation  →  σ(τu)  |  1[u > 0]  |  relu(u)  |  relu(u)²  |  softplus(τu)/τ  |  e^min(τu, 0)  |  1/(1 + (τu)²)
    u  →  s⁻ − s⁺  |  s⁻ − s⁺ + m  |  (1 + tilt) s⁻ − (1 − tilt) s⁺ + m  |  (1 − s⁺)² + s⁻² − ½
    P⁺, P⁻  →  a member of `SHAPES` each

On [−1, 1]² every T is finite and ≥ 0, and every P± is finite. The grammar contains the constant, the hinge, NCA and
circle loss, and the pair weights of their losses.

An expression is plain data and keeps its structure apart from its numbers. Its `name` spells the structure
(`found-sigmoid-margin`), and `definition` reads the name back. So the name is all that a configuration, a worker or a
resumed run needs, and no file of code is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, Protocol

import torch

from goal.names import spell
from goal.terms import Definition, P, Registry, T, Term

PREFIX = "found-"
CONSTANT, SINGLE, PRODUCT, MIXTURE, FLOOR = "constant", "single", "product", "mixture", "floor"

GAPS = {
    "difference": "s_neg - s_pos",
    "margin": "s_neg - s_pos + margin",
    "tilted": "(1 + tilt) * s_neg - (1 - tilt) * s_pos + margin",
    "circle": "(s_pos - 1).square() + s_neg.square() - 0.5",
}
ACTIVATIONS = {
    "sigmoid": "torch.sigmoid(tau * ({u}))",
    "hinge": "({u} > 0).to(s_neg.dtype)",
    "relu": "torch.relu({u})",
    "square": "torch.relu({u}).square()",
    "softplus": "torch.nn.functional.softplus(tau * ({u}), threshold=40) / tau",  # its own 20 shows in float64
    "exponential": "torch.exp(torch.clamp(tau * ({u}), max=0.0))",
    "rational": "1 / (1 + (tau * ({u})).square())",
}
SHAPES = {  # P⁺, P⁻
    "constant": ("1.0", "1.0"),
    "linear": ("1 - s_pos", "s_neg"),
    "square": ("(1 - s_pos).square()", "s_neg.square()"),
    "sigmoid": ("torch.sigmoid(-alpha * (s_pos - lam))", "torch.sigmoid(beta * (s_neg - lam))"),
    "exponential": ("torch.exp(-alpha * (1 + s_pos))", "torch.exp(-beta * (1 - s_neg))"),
    "rational": ("1 / (1 + (alpha * (1 + s_pos)).square())", "1 / (1 + (beta * (1 - s_neg)).square())"),
    "hinge": ("(s_pos < lam).to(s_pos.dtype)", "(s_neg > lam).to(s_neg.dtype)"),
    "ramp": ("torch.relu(lam - s_pos)", "torch.relu(s_neg - lam)"),
}
BUILT_IN = {  # what the grammar has of the terms that `goal` comes with
    ("T", ("constant",)): "con",
    ("T", ("hinge", "margin")): "con",
    ("T", ("sigmoid", "difference")): "nca",
    ("T", ("sigmoid", "circle")): "cir",
    ("P", ("constant", "constant")): "con",
    ("P", ("linear", "linear")): "lin",
    ("P", ("sigmoid", "sigmoid")): "sig",
}


class Number(NamedTuple):
    """Where a parameter is drawn from, and its value before anyone has."""

    low: float
    high: float
    log: bool
    default: float


NUMBERS = {
    "tau": Number(1.0, 100.0, True, 10.0),
    "margin": Number(0.0, 0.5, False, 0.2),
    "tilt": Number(-0.9, 0.9, False, 0.0),
    "mix": Number(0.05, 0.95, False, 0.5),
    "alpha": Number(0.5, 10.0, True, 2.0),
    "beta": Number(0.5, 50.0, True, 10.0),
    "lam": Number(0.0, 1.0, False, 0.5),
}


class Trial(Protocol):
    """What draws: a trial of Optuna, or `Seeded`."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        """One of the choices."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number in [low, high]."""


class Seeded:
    """Uniform draws from a seeded generator.

    >>> Seeded(0).suggest_categorical("any", ["a", "b"])
    'b'
    """

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""
        return self._random.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number in [low, high]; its logarithm is uniform with `log`."""
        share = self._random.random()
        return float(low * (high / low) ** share) if log else low + (high - low) * share


@dataclass(frozen=True)
class Expression:
    """A triplet weight or a pair weight of the grammar.

    Attributes:
        kind: "T" or "P".
        words: the structure in prefix order, as in the name.
        values: the numbers, (parameter, value); those left out have their defaults.

    >>> nca = Expression("T", ("sigmoid", "difference"), (("tau", 5.0),))
    >>> nca.name
    'found-sigmoid-difference'
    >>> print(nca.source("mine"))
    @goal.triplet_weight("mine")
    def mine_t(s_pos, s_neg, *, tau=5.0):
        return torch.sigmoid(tau * (s_neg - s_pos))
    <BLANKLINE>
    >>> nca.term()
    T.found_sigmoid_difference(tau=5.0)
    """

    kind: Literal["T", "P"]
    words: tuple[str, ...]
    values: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """The structure in a word, from which `definition` makes the term again."""
        return PREFIX + "-".join(self.words)

    @property
    def built_in(self) -> str | None:
        """The built-in term that this one is, or None."""
        return BUILT_IN.get((self.kind, self.words))

    @property
    def params(self) -> dict[str, float]:
        """The numbers that occur in the expression, in the order of `NUMBERS`."""
        read, given = set(re.findall(r"\w+", _body(self.kind, self.words))), dict(self.values)
        found = {name: given.get(name, number.default) for name, number in NUMBERS.items() if name in read}
        if stray := [name for name in given if name not in found]:
            raise ValueError(f"{self.name} has no parameter {stray[0]!r}; it has {', '.join(found) or 'none'}.")
        return found

    def source(self, name: str) -> str:
        """A definition that can be pasted where `torch` and `goal` are imported, registered under `name`."""
        params = ", ".join(f"{key}={value!r}" for key, value in self.params.items())
        decorator = "triplet_weight" if self.kind == "T" else "pair_weight"
        return (
            f'@goal.{decorator}("{name}")\n'
            f"def {name.replace('-', '_')}_{self.kind.lower()}(s_pos, s_neg{f', *, {params}' if params else ''}):\n"
            f"    return {_body(self.kind, self.words)}\n"
        )

    def term(self) -> Term:
        """The term that nobody registered, made by running `source(name)` to the letter."""
        registry = Registry(self.kind, "weight")
        _execute(self.source(self.name), registry)
        return registry[self.name]()


def triplet(trial: Trial) -> Expression:
    """A triplet weight with its numbers, as the trial draws them.

    >>> triplet(Seeded(1)) == triplet(Seeded(1))
    True
    """
    form = trial.suggest_categorical("T", (CONSTANT, SINGLE, PRODUCT, MIXTURE, FLOOR))
    if form == CONSTANT:
        return Expression("T", (CONSTANT,))
    words = _atom(trial, "T.1")
    if form == FLOOR:
        words = (MIXTURE, CONSTANT, *words)
    elif form != SINGLE:
        words = (form, *words, *_atom(trial, "T.2"))
    return _numbered(trial, Expression("T", words))


def pair(trial: Trial) -> Expression:
    """A pair weight with its numbers, as the trial draws them.

    >>> pair(Seeded(1)).term().definition.registry
    'P'
    """
    words = tuple(trial.suggest_categorical(name, tuple(SHAPES)) for name in ("P.pos", "P.neg"))
    return _numbered(trial, Expression("P", words))


def definition(kind: Literal["T", "P"], name: str) -> Definition:
    """The registered term of that name; one of the grammar is registered first, where it is not yet.

    Raises:
        ValueError: a name that is neither registered nor of the grammar.

    >>> definition("P", "found-linear-square")()
    P.found_linear_square()
    """
    registry = {"T": T, "P": P}[kind]
    name = spell(name)
    if name.startswith(PREFIX) and name not in registry:
        _execute(Expression(kind, tuple(name.removeprefix(PREFIX).split("-"))).source(name), registry)
    return registry[name]


# ------------------------------------------------------------------------------------------------------------- inside


def _execute(source: str, registry: Registry) -> None:
    """Run a definition that this grammar wrote, so that it registers there."""
    decorators = SimpleNamespace(triplet_weight=registry.register, pair_weight=registry.register)
    exec(compile(source, f"<{PREFIX}term>", "exec"), {"torch": torch, "goal": decorators})


def _atom(trial: Trial, name: str) -> tuple[str, ...]:
    """The words of an activation of a gap."""
    return tuple(trial.suggest_categorical(f"{name}.{of}", tuple(o)) for of, o in (("f", ACTIVATIONS), ("u", GAPS)))


def _numbered(trial: Trial, expression: Expression) -> Expression:
    """With its numbers drawn, to three digits."""
    ranges = {name: NUMBERS[name] for name in expression.params}
    drawn = {name: trial.suggest_float(name, r.low, r.high, log=r.log) for name, r in ranges.items()}
    return replace(expression, values=tuple((name, float(f"{value:.3g}")) for name, value in drawn.items()))


def _body(kind: str, words: tuple[str, ...]) -> str:
    """What the function of a term returns."""
    left = list(words)
    try:
        if kind == "T":
            form = left.pop(0) if left[0] in (PRODUCT, MIXTURE) else ""
            first, second = _called(left), _called(left) if form else ""
            body = {PRODUCT: f"({first}) * ({second})", MIXTURE: f"mix * ({first}) + (1 - mix) * ({second})"}.get(
                form, first
            )
        else:
            body = f"{SHAPES[left.pop(0)][0]}, {SHAPES[left.pop(0)][1]}"
    except (KeyError, IndexError):
        left = ["?"]
    if left:
        raise ValueError(f"{kind}={PREFIX + '-'.join(words)!r} is not of the grammar in goal.lab.grammar.")
    return body


def _called(left: list[str]) -> str:
    """The atom that the first words are, which it takes away."""
    activation = left.pop(0)
    return "1.0" if activation == CONSTANT else ACTIVATIONS[activation].format(u=GAPS[left.pop(0)])
