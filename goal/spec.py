"""An objective as a line of text, for Python, the command line and configuration files alike.

    vse++                                            a recipe
    infonce(tau=30)                                  a recipe with another parameter
    cir(tau=5) × sig-ms                              T × P; also cir(tau=5) * sig-ms, or cir(tau=5):sig-ms
    cir × sig-ms | semi-hard(margin=0.1)             its mining rule
    vse++ | reduction=mean | similarity=cosine       every other axis by its keyword
    nca(tau=20) × con | soft(tau=20) | scale=10      a factor of the value and of the gradient

`parse` reads a line, checks all of it and returns a `Spec`. The `Spec` builds the objective and prints as the line,
without parameters at their defaults. Members that a user has registered work like built-in ones.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import nn

from goal import mining, positives, similarity, terms
from goal.engine.settings import DIRECTIONS, REDUCTIONS, directions_of
from goal.names import Named, Value, line, literal, nearest, spell, unknown
from goal.objective import Objective
from goal.recipes import parameters, recipes, settable
from goal.recipes import recipe as published
from goal.validation import check_bool, check_number, real_number

R = TypeVar("R")

_NAME = re.compile(r"[\w+-]+")
_AXIS = re.compile(r"[\w+.→>-]+")
_VALUE = re.compile(r"[^\s,()|=×*:]+")
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}
_CONTEXT = 40  # characters of a long text that an error shows on either side of the error's place
_FOUND = "found-"  # prefix of terms that `goal.lab.discover` found; their names spell their formulas


@dataclass(frozen=True, repr=False)
class Spec:
    """An objective as `parse` read it: a recipe or T × P, and the axes that the text names.

    Its str() is its canonical text, from which `parse` makes an equal object.

    >>> spec = parse("cir(tau=5):sig_ms|semi-hard(margin=0.2)")
    >>> spec
    cir(tau=5) × sig-ms | semi-hard
    >>> parse(str(spec)) == spec
    True
    """

    recipe: Named | None = None
    T: Named | None = None
    P: Named | None = None
    axes: tuple[tuple[str, Named], ...] = ()  # in the order of `AXES`

    def __str__(self) -> str:
        return self._text(str)

    __repr__ = __str__

    @property
    def names(self) -> str:
        """The text without parameters, and without axes except the mining rule: for names of folders."""
        short = dataclasses.replace(self, axes=tuple(axis for axis in self.axes if axis[0] == "mining"))
        return short._text(lambda call: call.name)

    def _text(self, show: Callable[[Named], str]) -> str:
        return line((show(call) for _, call in self._calls()), {axis: show(call) for axis, call in self.axes})

    def _calls(self) -> list[tuple[str, Named]]:
        """The names before the first `|`, with their kinds."""
        calls = (("recipe", self.recipe), ("T", self.T), ("P", self.P))
        return [(kind, call) for kind, call in calls if call is not None]

    def axis(self, name: str) -> Named | None:
        """The value of an axis, or None if the text does not name it."""
        return dict(self.axes).get(name)

    def with_axes(self, **axes: str | float | Named | None) -> Spec:
        """A copy with other axes; None resets an axis to its default.

        Raises:
            ValueError, TypeError: no such axis, or a value that is not allowed.

        >>> parse("vse++").with_axes(mining="selective(eps=0.1)", reduction="mean")
        vse++ | selective(eps=0.1) | reduction=mean
        """
        merged: dict[str, Named | None] = dict(self.axes)
        for name, value in axes.items():
            if name not in AXES:
                raise ValueError(
                    f"objective has no axis {name!r}.{nearest(name, list(AXES))} Known: {', '.join(AXES)}."
                )
            if value is not None and self.recipe is not None:
                _check_axes(self.recipe.name, name)
            if isinstance(value, int | float):
                value = literal(value)  # a scale
            merged[name] = named(name, value) if isinstance(value, str) else value
        ordered = ((name, merged.get(name)) for name in AXES)
        return dataclasses.replace(self, axes=tuple((name, call) for name, call in ordered if call is not None))

    @property
    def parameters(self) -> dict[str, float | bool]:
        """Parameters for a search: the numbers of the terms or the recipe, and all of a mining rule that is named.

        A name that T and P both have is `T.tau` and `P.tau`; those of the mining rule are `mining.margin`, …. Options
        that are names, or that the text leaves at their defaults, are not searched.

        >>> parse("con(margin=0.3) × sig | semi-hard").parameters
        {'margin': 0.3, 'alpha': 2.0, 'beta': 10.0, 'lam': 0.5, 'mining.margin': 0.2}
        """
        found: dict[str, float | bool] = {}
        for kind, call in (*self._calls(), *self.axes):
            its, given = member(kind, call.name), dict(call.parameters)
            for name, value in {**its.defaults, **given}.items():
                if value is None or isinstance(value, str) or (kind not in AXES and isinstance(value, bool)):
                    continue
                if name not in its.options or name in given:
                    found[self._named(kind, name)] = value if isinstance(value, bool) else float(value)
        return found

    def _named(self, kind: str, name: str) -> str:
        shared = kind in ("T", "P") and all(name in member(k, call.name).defaults for k, call in self._calls())
        return f"{kind}.{name}" if shared or kind in AXES else name

    def with_parameters(self, values: Mapping[str, Any]) -> Spec:
        """A copy with other parameters, by the names of `parameters`; a name without a prefix sets it in both terms.

        Raises:
            ValueError, TypeError: no such parameter, or a value that is not allowed.

        >>> parse("cir × sig-ms").with_parameters({"tau": 5, "beta": 20})
        cir(tau=5) × sig-ms(beta=20)
        """
        calls = dict((*self._calls(), *self.axes))
        left = dict(values)
        for kind, call in calls.items():
            given: dict[str, Any] = dict(call.parameters)
            for name in member(kind, call.name).defaults:
                for key in (f"{kind}.{name}", *([name] if kind not in AXES else [])):
                    if key in values:
                        given[name] = values[key]
                        left.pop(key, None)
            calls[kind] = _call(kind, call.name, given)
        if left:
            raise _no_parameter(self.names, next(iter(left)), list(self._known()))
        axes = tuple((name, calls[name]) for name, _ in self.axes)
        return Spec(calls.get("recipe"), calls.get("T"), calls.get("P"), axes)

    def _known(self) -> Iterable[str]:
        for kind, call in (*self._calls(), *self.axes):
            yield from (self._named(kind, name) for name in member(kind, call.name).defaults)

    def build(self, **rest: Any) -> nn.Module:
        """The objective.

        Args:
            **rest: arguments of `goal.Objective`, or of the recipe, that the text does not set: `group=`, `impl=`, ….

        Raises:
            ValueError, TypeError: an argument that the text sets, or that is unknown.

        >>> parse("vse++ | reduction=mean").build(check_finite=False)
        Objective(con(margin=0.2) × con)
        """
        axes = {name: member(name, call.name).make(**dict(call.parameters)) for name, call in self.axes}
        if twice := [name for name in rest if name in axes or (name in ("T", "P") and self.recipe is None)]:
            raise TypeError(f"{twice[0]} is set by the objective {str(self)!r} already, got {rest[twice[0]]!r}.")
        made: nn.Module
        if self.recipe is not None:
            made = published(self.recipe.name, **dict(self.recipe.parameters), **axes, **rest)
        else:
            made = Objective(
                **{k: member(k, c.name).make(**dict(c.parameters)) for k, c in self._calls()}, **axes, **rest
            )
        return made


def objective(spec: str, **rest: Any) -> nn.Module:
    """An objective from one line of text, the same text as for `goal train --objective` and configuration files.

        objective  =  recipe  |  T × P                    × may be * or :
                      [| mining] [| positives=…] [| similarity=…] [| reduction=…] [| scale=…] [| directions=…]
        each name  =  name  or  name(parameter=value, …)   values: numbers, true, false, none

    Args:
        spec: the text. Names are those of `goal.recipes()`, `goal.T`, `goal.P` and `goal.mining`, including your own.
        **rest: arguments of `goal.Objective`, or of the recipe, that the text does not set: `group=`, `impl=`, ….

    Returns:
        A module to call with (x, y), as from `goal.Objective` and `goal.recipe`.

    Raises:
        ValueError, TypeError: an unknown name, a parameter out of range, a syntax error; with the place in the text.

    Example:
        >>> import goal
        >>> goal.objective("cir(tau=5) × sig-ms | semi-hard(margin=0.1)").settings.mining
        mining.semi_hard(margin=0.1)
        >>> goal.objective("infonce(tau=30)")
        Objective(nca(tau=30) × con | soft(tau=30) | scale=15)
    """
    return parse(spec).build(**rest)


def parse(text: str) -> Spec:
    """The objective that a text describes, checked; see `goal.objective` for the grammar.

    Raises:
        ValueError, TypeError: the error, the allowed values, and ▶ at its place in the text.

    >>> parse("nca * lin")
    nca × lin
    >>> parse("nca × sigg")
    Traceback (most recent call last):
    ValueError: P='sigg' is not known. Did you mean 'sig'? Known: con, lin, sig, lin-ms, sig-ms. At ▶ in 'nca × ▶sigg'.
    """
    if not isinstance(text, str):
        raise TypeError(f"objective must be text such as 'cir × sig-ms', got {type(text).__name__} ({text!r}).")
    return _Reader(text).spec()


def split(text: str) -> list[str]:
    """The objectives in a list separated by commas; commas in brackets separate parameters.

    >>> split("cir(tau=5, x=1):sig, vse++")
    ['cir(tau=5, x=1):sig', 'vse++']
    """
    parts, depth, begin = [], 0, 0
    for at, symbol in enumerate(text):
        depth += (symbol == "(") - (symbol == ")")
        if symbol == "," and depth <= 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [part.strip() for part in (*parts, text[begin:])]


# ── the names in a text ─────────────────────────────────────────────────────────────────────────────────────────────


class Member(NamedTuple):
    """The meaning of a name."""

    name: str
    owner: str  # its name in errors
    defaults: Mapping[str, Value]
    make: Callable[..., Any]  # makes the object from its parameters; raises if one is not allowed
    options: tuple[str, ...] = ()  # parameters that are given by keyword alone


def _term(kind: str) -> Callable[[str], Member]:
    """Look-up of a registry's terms; a term from a search is spelled by its name, so that every process knows it."""
    registry = {"T": terms.T, "P": terms.P}[kind]

    def find(name: str) -> Member:
        if spell(name).startswith(_FOUND) and name not in registry:
            from goal.lab.grammar import definition as spelled

            definition = spelled("T" if kind == "T" else "P", name)
        else:
            definition = registry[name]
        return Member(definition.name, f"goal.{kind}.{definition.name}", definition.defaults, definition)

    return find


def _rules(axis: str) -> Callable[[str], Member]:
    """Look-up of the rules of mining or of positives."""
    module: Any = {"mining": mining, "positives": positives}[axis]
    known, defaults = module.RULES, module.defaults

    def find(name: str) -> Member:
        if spell(name) not in known:
            raise unknown(axis, name, list(known))
        make = known[spell(name)]
        own = inspect.signature(make).parameters.values()
        options = tuple(parameter.name for parameter in own if parameter.kind is parameter.KEYWORD_ONLY)
        return Member(spell(name), f"goal.{axis}.{make.__name__}", defaults(spell(name)), make, options)

    return find


def _similarity(name: str) -> Member:
    bound = similarity.bind(name)
    return Member(bound.name, f"similarity {bound.name}", {}, lambda: bound.name)


def _reduction(name: str) -> Member:
    if name not in REDUCTIONS:
        raise unknown("reduction", name, REDUCTIONS)
    return Member(name, f"reduction {name}", {}, lambda: name)


def _scale(text: str) -> Member:
    number = real_number("scale", _number(text), 0.0, above=True)
    return Member(literal(number), "scale", {}, lambda: number)


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _directions(name: str) -> Member:
    directions = directions_of(name)
    return Member(directions, "directions", {}, lambda: directions)


def _published(name: str) -> Member:
    if spell(name) not in recipes():
        raise unknown("recipe", name, recipes())
    return Member(
        spell(name), f"recipe {spell(name)}", parameters(spell(name)), functools.partial(published, spell(name))
    )


class Kind(NamedTuple):
    """A kind of name in a text."""

    find: Callable[[str], Member]  # raises for an unknown name, with the known ones
    example: str


AXES = {  # the axes after |: arguments of `goal.Objective`, by keyword
    "mining": Kind(_rules("mining"), "semi-hard(margin=0.1)"),
    "positives": Kind(_rules("positives"), "hardest"),
    "similarity": Kind(_similarity, "cosine"),
    "reduction": Kind(_reduction, "sum"),
    "scale": Kind(_scale, "0.5"),
    "directions": Kind(_directions, DIRECTIONS[1]),
}
_KINDS = {
    "recipe": Kind(_published, "vse++"),
    "T": Kind(_term("T"), "cir(tau=5)"),
    "P": Kind(_term("P"), "sig-ms"),
    **AXES,
}


def member(kind: str, name: str) -> Member:
    """The meaning of a name of kind "T", "P", "recipe", or one of `AXES`.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    return _KINDS[kind].find(name)


def _check_axes(recipe: str, axis: str) -> None:
    """Raise if a recipe does not allow setting an axis."""
    if not settable(recipe, axis):
        raise ValueError(f"{axis} cannot be set: {recipe} has its own.")


def _call(kind: str, name: str, given: Mapping[str, Any]) -> Named:
    """A checked name with its parameters."""
    its = member(kind, name)
    checked: dict[str, Value] = {}
    for key, value in given.items():
        if key not in its.defaults:
            raise _no_parameter(its.name, key, list(its.defaults))
        default = its.defaults[key]
        if isinstance(default, bool):
            checked[key] = check_bool(f"{its.owner}: parameter {key!r}", value)
        elif value is None and default is None:
            checked[key] = None
        elif isinstance(default, str):
            checked[key] = value  # a name, which `make` checks
        elif kind == "positives" and key == "tau":
            checked[key] = real_number(f"{its.owner}: parameter {key!r}", value)  # of any sign
        elif kind == "mining" and default == 0:
            checked[key] = real_number(f"{its.owner}: parameter {key!r}", value, 0.0)
        else:
            checked[key] = check_number(its.owner, key, value)
    its.make(**checked)
    return Named.of(its.name, checked, its.defaults)


def _no_parameter(owner: str, name: object, known: Sequence[str]) -> ValueError:
    listed = ", ".join(dict.fromkeys(known)) or "none"
    return ValueError(f"{owner} has no parameter {name!r}.{nearest(name, known)} Known: {listed}.")


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def named(kind: str, text: str) -> Named:
    """Read a single name with parameters.

    Args:
        kind: "T", "P", "recipe", or one of `AXES`.
        text: the name as in an objective.

    Raises:
        ValueError, TypeError: as for `parse`.

    >>> named("mining", "semi_hard(margin=0.2)")
    Named(name='semi-hard', parameters=())
    """
    if not isinstance(text, str):
        raise TypeError(f"{kind} must be text such as {_KINDS[kind].example!r}, got {type(text).__name__} ({text!r}).")
    reader = _Reader(text, kind)
    pattern = _AXIS if kind in AXES else _NAME
    found = reader.call(kind, reader.raw(f"a name such as {_KINDS[kind].example}", pattern))
    reader.end()
    return found


class _Raw(NamedTuple):
    """A name with parameters as written, and their positions."""

    name: str
    at: int
    arguments: tuple[tuple[str, int, Value, int], ...]  # name, position, value, position


class _Reader:
    """A text and the position up to which it has been read."""

    def __init__(self, text: str, argument: str = "objective") -> None:
        self.text, self.argument, self.at = text, argument, 0

    def spec(self) -> Spec:
        first = self.raw("a recipe, or T × P")
        found = self._product(first) if self.took("×", "*", ":") else self._recipe(first)
        while self.took("|"):
            axis, call, at = self._axis()
            if found.axis(axis) is not None:
                raise self.wrong(at, f"sets {axis} twice.")
            found = self.located(at, functools.partial(found.with_axes, **{axis: call}))
        self.end()
        return found

    def _product(self, first: _Raw) -> Spec:
        T = self.call("T", first)
        return Spec(T=T, P=self.call("P", self.raw("a pair weight P")))

    def _recipe(self, first: _Raw) -> Spec:
        name = first.name
        if spell(name) not in recipes() and (name in terms.T or name in terms.P):
            form = f"{name} × sig-ms" if name in terms.T else f"cir × {name}"
            raise self.wrong(
                first.at, f"must have two terms, T × P, or be a recipe, got {name} alone: write {form}, say."
            )
        return Spec(recipe=self.call("recipe", first))

    def _axis(self) -> tuple[str, Named, int]:
        """An axis after |: its name, its value, and its position."""
        raw = self.raw("a mining rule, or an axis such as reduction=sum")
        if raw.arguments or not self.took("="):
            others = [axis for axis, its in AXES.items() if axis != "mining" and _known(its.find, raw.name)]
            if others and not _known(AXES["mining"].find, raw.name):
                raise self.wrong(
                    raw.at, f"must have a mining rule here, got {raw.name!r}: write {others[0]}={raw.name}."
                )
            return "mining", self.call("mining", raw), raw.at
        if raw.name not in AXES:
            raise self.wrong(
                raw.at, f"has no axis {raw.name!r}.{nearest(raw.name, list(AXES))} Known: {', '.join(AXES)}."
            )
        return raw.name, self.call(raw.name, self.raw(f"{raw.name}, such as {_KINDS[raw.name].example}", _AXIS)), raw.at

    def raw(self, wanted: str, pattern: re.Pattern[str] = _NAME) -> _Raw:
        """Read a name, and its parameters in brackets."""
        name, at = self._match(pattern, wanted)
        arguments: list[tuple[str, int, Value, int]] = []
        if self.took("("):
            while not self.took(")"):
                if arguments and not self.took(","):
                    raise self.expected(", or )")
                key, place = self._match(_NAME, f"a parameter of {name}, or )")
                key = key.replace("-", "_")
                if not self.took("="):
                    raise self.expected(f"= and a value after {key}")
                if key in (other for other, *_ in arguments):
                    raise self.wrong(place, f"gives {key} twice.")
                arguments.append((key, place, *self._literal()))
        return _Raw(name, at, tuple(arguments))

    def call(self, kind: str, raw: _Raw) -> Named:
        """The checked name of a kind, from the name as written."""
        self.located(raw.at, lambda: member(kind, raw.name))
        for key, at, value, place in raw.arguments:
            if isinstance(value, str) and not isinstance(member(kind, raw.name).defaults.get(key), str):
                raise self.wrong(place, f"must have a number, true, false or none here, got {value!r}.")
            self.located(at, functools.partial(_call, kind, raw.name, {key: value}))
        return self.located(raw.at, lambda: _call(kind, raw.name, {key: value for key, _, value, _ in raw.arguments}))

    def _literal(self) -> tuple[Value, int]:
        word, at = self._match(_VALUE, "a value")
        if word.lower() in _WORDS:
            return _WORDS[word.lower()], at
        try:
            return float(word), at
        except ValueError:
            return word, at

    def _match(self, pattern: re.Pattern[str], wanted: str) -> tuple[str, int]:
        self._skip()
        match = pattern.match(self.text, self.at)
        if match is None:
            raise self.expected(wanted)
        at, self.at = self.at, match.end()
        return match.group(), at

    def took(self, *symbols: str) -> bool:
        """Whether one of these symbols comes next; if so, move past it."""
        self._skip()
        comes = self.text[self.at : self.at + 1] in symbols
        self.at += comes
        return comes

    def _skip(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def end(self) -> None:
        self._skip()
        if self.at < len(self.text):
            raise self.expected("| or the end" if self.argument == "objective" else "the end")

    def expected(self, wanted: str) -> ValueError:
        came = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        return self.wrong(self.at, f"must have {wanted} here, got {came}.")

    def wrong(self, at: int, message: str) -> ValueError:
        return ValueError(self._placed(at, f"{self.argument} {message}"))

    def located(self, at: int, make: Callable[[], R]) -> R:
        """The result of `make`; its errors get the position in the text."""
        try:
            return make()
        except (ValueError, TypeError) as error:
            raise type(error)(self._placed(at, str(error))) from None

    def _placed(self, at: int, message: str) -> str:
        before, after = self.text[:at][-_CONTEXT:], self.text[at:][:_CONTEXT]
        shown = "…" * (at > _CONTEXT) + f"{before}▶{after}" + "…" * (len(self.text) - at > _CONTEXT)
        return f"{message} At ▶ in {shown!r}."


def _known(find: Callable[[str], Member], name: str) -> bool:
    try:
        find(name)
    except (ValueError, TypeError):
        return False
    return True
