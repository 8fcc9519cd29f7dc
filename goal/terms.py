"""Triplet weights T(s⁺, s⁻) and pair weights P±(s): the terms whose product is a gradient.

A term is one small pure function of tensors, written with torch operators and registered by name:

    @goal.triplet_weight("mine")
    def mine(s_pos, s_neg, *, tau=10.0):
        return torch.sigmoid(tau * (s_neg - s_pos))

It is evaluated elementwise, so the same function serves per-anchor vectors (mined objectives) and whole tiles of
similarities (dense objectives). `goal.T.mine(tau=5.0)` is the term with its parameters bound.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

Parameter = float | bool | None
Potential = Callable[..., Tensor | None]

# The relative similarities a term may declare, with the parameter each one reads from its term.
# All are means over a batch-dependent set, 0 where the set is empty, constants for the gradient; shape of the anchors.
STATISTICS: Mapping[str, str | None] = {
    "r_pos_lin": None,  # R⁺ = mean (s⁺ᵢ − s⁺ₖ)  over k ≠ i with s⁺ₖ ≤ s⁻ᵢ + 0.1, zeros left out
    "r_neg_lin": None,  # R⁻ = mean (s⁻ᵢ − sᵢⱼ)  over non-hardest negatives with sᵢⱼ ≥ min s⁺ − 0.1, zeros out
    "r_pos_exp": "alpha",  # R⁺ = mean exp(α(s⁺ᵢ − s⁺ₖ))  over the same k, self left out
    "r_neg_exp": "beta",  # R⁻ = mean exp(−β(s⁻ᵢ − sᵢⱼ))  over the same j
}
_POSITIVE = frozenset({"tau", "alpha", "beta"})
_NOT_NEGATIVE = frozenset({"margin", "eps"})


def spell(name: str) -> str:
    """The registered spelling of a name: hyphens, whatever was typed."""
    return name.replace("_", "-")


def unknown(argument: str, came: object, known: Sequence[str]) -> ValueError:
    """The error for an unknown name: what came, the nearest known name, and all of them."""
    near = difflib.get_close_matches(spell(str(came)), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{argument}={came!r} is not known.{hint} Known: {', '.join(known)}.")


def check_number(owner: str, name: str, value: object) -> float:
    """A finite Python float from a number of any kind; raises with the argument's name otherwise."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{owner}: parameter {name!r} requires grad, but a parameter of a gradient-space objective has no "
            "gradient (there is no loss to differentiate). Pass a number; use a schedule to change it."
        )
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
        raise TypeError(f"{owner}: parameter {name!r} must be a number, got {type(value).__name__} ({value!r}).")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{owner}: parameter {name!r} must be within a float's range, got {value}.") from None
    if not -math.inf < value < math.inf:  # torch.compile traces this with a symbolic number
        raise ValueError(f"{owner}: parameter {name!r} must be finite, got {value}.")
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{owner}: parameter {name!r} must be > 0, got {value}.")
    if name in _NOT_NEGATIVE and value < 0:
        raise ValueError(f"{owner}: parameter {name!r} must be >= 0, got {value}.")
    return value


def check_bool(what: str, value: object) -> bool:
    """A Python bool from one of any kind; raises with the argument's name otherwise."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{what} must be True or False, got {value!r}.")
    return bool(value)


@dataclass(frozen=True)
class Term:
    """A registered weight with its parameters bound: what `goal.T.cir(tau=5.0)` returns.

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
    potentials: Mapping[str, tuple[Potential, tuple[str, ...]]] = field(default_factory=dict)  # and what it asks for

    def __call__(self, **params: object) -> Term:
        owner = f"goal.{self.registry}.{self.name.replace('-', '_')}"
        if stray := [name for name in params if name not in self.defaults]:
            raise TypeError(f"{owner} has no parameter {stray[0]!r}. Known: {', '.join(self.defaults) or 'none'}.")
        return Term(self, tuple((n, self._checked(owner, n, params.get(n, d), d)) for n, d in self.defaults.items()))

    def __reduce__(self) -> tuple[Callable[..., Definition], tuple[object, ...]]:
        """What is registered is stored by its name, so that a copy is the same term; what is not, by its parts."""
        if self.name in (registry := _REGISTRIES[self.registry]) and registry[self.name] is self:
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
        """The decorator behind `goal.triplet_weight` and `goal.pair_weight`, which `check` the term by its defaults."""
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


def _probe(term: Term) -> None:
    """Run a term on [−1, 1]², relative similarities at 0 and ½, and refuse what is no weight.

    Raises:
        ValueError: it fails there, is not elementwise, not finite, or a negative T.
    """
    at = torch.arange(-20, 21, dtype=torch.float64, device="cpu") / 20
    tile, few = (at[:, None].expand(41, 41), at.expand(41, 41)), (at[:30], at[:30])
    for r in (0.0, 0.5):
        try:
            whole, anchors = (
                term(s_pos, s_neg, **dict.fromkeys(term.statistics, torch.full_like(s_pos, r)))
                for s_pos, s_neg in (tile, few)
            )
        except Exception as error:
            raise ValueError(f"{term!r} fails on similarities in [−1, 1]: {type(error).__name__}: {error}") from error
        if term.definition.registry == "T":
            weights = {"T": (whole, anchors)}
        elif isinstance(whole, tuple) and len(whole) == 2:
            weights = {"P⁺": (whole[0], anchors[0]), "P⁻": (whole[1], anchors[1])}
        else:
            raise ValueError(f"{term!r} must return two weights, `return p_pos, p_neg`; it returns {_kind(whole)}.")
        for name, (on_tile, on_anchors) in weights.items():
            _probe_weight(term, name, on_tile, on_anchors, tile)


def _probe_weight(term: Term, name: str, tile: Any, anchors: Any, at: tuple[Tensor, Tensor]) -> None:
    """One of a term's weights, on a (41, 41) tile of similarities and on the first 30 of its diagonal."""

    def where(bad: Tensor) -> str:
        i, j = (int(k) for k in bad.nonzero()[0])
        return f"{name} = {weight[i, j]:.4g} at s⁺ = {at[0][i, j]:.4g}, s⁻ = {at[1][i, j]:.4g}"

    for found, shape in ((tile, (41, 41)), (anchors, (30,))):
        if not isinstance(found, Tensor | int | float):
            raise ValueError(f"{term!r} must return tensors or numbers; {name} is {_kind(found)}.")
        if isinstance(found, Tensor) and found.shape not in (shape, ()):
            raise ValueError(
                f"{term!r} must be elementwise: of similarities of shape {shape}, {name} has {tuple(found.shape)}."
            )
    here: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    weight, along = torch.as_tensor(tile, **here).expand(41, 41), torch.as_tensor(anchors, **here).expand(30)
    if not weight.isfinite().all():
        raise ValueError(f"{term!r} must be finite on [−1, 1]²: {where(~weight.isfinite())}.")
    if not torch.allclose(weight.diagonal()[:30], along, rtol=1e-6, atol=1e-9):
        raise ValueError(f"{term!r} must be elementwise: {name} of a pair changes with the other similarities.")
    if (weight < 0).any():
        if name == "T":
            raise ValueError(f"{term!r} must be >= 0: {where(weight < 0)}.")
        warnings.warn(f"{term!r} is negative somewhere, so it pushes the other way: {where(weight < 0)}.", stacklevel=4)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else repr(value)


T = Registry("T", "triplet weight")
P = Registry("P", "pair weight")
_REGISTRIES = {"T": T, "P": P}


def _registered(registry: str, name: str) -> Definition:
    """The term that was stored under this name."""
    if name not in _REGISTRIES[registry]:
        raise ValueError(
            f"goal.{registry} has no {name!r} in this process, and what is loaded uses it: import the module that "
            "registers it before loading."
        )
    return _REGISTRIES[registry][name]


def triplet_weight(
    name: str, *, statistics: Sequence[str] = (), potential: Mapping[str, Potential] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a triplet weight T(s⁺, s⁻) under a name.

    The function is written ``def f(s_pos, s_neg, *, tau=10.0)``: torch operators only, elementwise, returning a
    tensor that broadcasts with its inputs, or a plain number. Parameters called ``tau``, ``alpha`` and ``beta`` must
    be > 0, ``margin`` and ``eps`` >= 0.

    Args:
        name: how it is asked for; hyphens and underscores are the same.
        statistics: relative similarities it needs, from `goal.terms.STATISTICS`; they arrive as keyword tensors.
        potential: for the pair weights with which it has one, name → ``f(s_pos, s_neg, *, ...)``: the loss whose
            gradient (−T·P⁺, T·P⁻) is, used as the returned value. It asks for parameters of either term by name,
            and returns None where its parameters leave no potential.

    Raises:
        ValueError: the name is taken or malformed, or a statistic is unknown; or, with its default parameters on
            [−1, 1]², the term fails, is not elementwise, is not finite, or is a negative T, where the message says
            at which point. A negative P is a warning: it pulls where others push.
        TypeError: the signature is not that of a term.

    Example:
        >>> import goal, torch
        >>> @goal.triplet_weight("soft-hinge")
        ... def soft_hinge(s_pos, s_neg, *, tau=10.0, margin=0.2):
        ...     return torch.sigmoid(tau * (s_neg - s_pos + margin))
        >>> goal.T.soft_hinge(tau=5.0)
        T.soft_hinge(tau=5.0, margin=0.2)
    """
    return T.register(name, statistics, potential, _probe)


def pair_weight(
    name: str, *, statistics: Sequence[str] = (), potential: Mapping[str, Potential] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a pair weight (P⁺(s⁺), P⁻(s⁻)) under a name.

    As `triplet_weight`, but the function returns the two weights: ``return p_pos, p_neg``.

    Example:
        >>> import goal, torch
        >>> @goal.pair_weight("square")
        ... def square(s_pos, s_neg):
        ...     return (1 - s_pos) ** 2, s_neg ** 2
        >>> x = torch.eye(4, requires_grad=True)
        >>> loss = goal.apply(x, torch.eye(4), T="nca", P="square")
    """
    return P.register(name, statistics, potential, _probe)


# ---------------------------------------------------------------------------------------------- triplet weights


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


# ------------------------------------------------------------------- potentials: the losses that some T × P are
# Each is the loss l(s⁺, s⁻) with ∂l/∂s⁺ = −T·P⁺ and ∂l/∂s⁻ = T·P⁻; None where a hinge's jump leaves none.


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


# -------------------------------------------------------------------------------------------------- pair weights


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


# --------------------------------------------------------------------------------------------------- the product


@dataclass(frozen=True)
class Product:
    """T × P: what the gradient is made of."""

    T: Term
    P: Term

    @property
    def statistics(self) -> tuple[str, ...]:
        """The relative similarities that either term declares."""
        return tuple(dict.fromkeys((*self.T.statistics, *self.P.statistics)))

    def read_by(self, statistic: str) -> Any:
        """The parameter that a declared statistic reads from the term that declares it."""
        term = self.P if statistic in self.P.statistics else self.T
        return term.params[str(STATISTICS[statistic])]

    def weights(self, s_pos: Tensor, s_neg: Tensor, relative: Mapping[str, Tensor]) -> tuple[Any, Any, Any]:
        """T, P⁺, P⁻ at these similarities; tensors that broadcast with them, or plain numbers.

        P is kept below √finfo.max, the largest similarity whose square is representable: far-off similarities would
        carry its exponentials and products out of the dtype's range.
        """
        t = self.T(s_pos, s_neg, **{name: relative[name] for name in self.T.statistics})
        p_pos, p_neg = self.P(s_pos, s_neg, **{name: relative[name] for name in self.P.statistics})
        return t, _saturate(p_pos), _saturate(p_neg)

    def value(self, s_pos: Tensor, s_neg: Tensor) -> Tensor:
        """l(s⁺, s⁻): the loss whose gradient T × P is where the terms carry it, else the violation s⁻ − s⁺."""
        found = self.P.definition.potentials.get(self.T.name) or self.T.definition.potentials.get(self.P.name)
        if found is not None:
            function, names = found
            params = {**self.P.params, **self.T.params}
            loss = function(s_pos, s_neg, **{name: params[name] for name in names})
            if loss is not None:
                return loss
        return s_neg - s_pos


def _saturate(weight: Any) -> Any:
    if not isinstance(weight, Tensor):
        return weight
    limit = torch.finfo(weight.dtype).max ** 0.5
    return weight.clamp(-limit, limit)
