"""Terms as Triton code: T, P and their potential, traced with torch.fx and translated for tiles of similarities.

A term remains the single function that its author wrote. It is traced once for each structure (which functions, which
parameters are None, which booleans are set). Every operation becomes a line of Triton, and the dense kernels call the
result on tiles. Numbers are run-time arguments p0, …, p7, so changing τ compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import triton
import triton.language as tl

from goal.terms import STATISTICS, Product, Term
from goal.terms.tracing import CannotTrace, Language, trace, translate

MAX_PARAMS = 8
PARAMS = tuple(f"p{slot}" for slot in range(MAX_PARAMS))
ARGUMENTS = ("s_pos", "s_neg", *STATISTICS, *PARAMS)  # of every lowered function

_ELSE = 'or use impl="torch" or impl="auto".'


class CannotLower(CannotTrace):
    """A term has a part that no kernel can compute; the message names the term, the operation and the way out."""


class Lowered(NamedTuple):
    """T × P as Triton device functions of (s_pos, s_neg, r_pos_lin, r_neg_lin, r_pos_exp, r_neg_exp, p0, …, p7).

    The arguments are tiles or scalars that broadcast with each other; arguments that no term reads may be anything.
    Results are float32, of the common shape of s_pos and s_neg.
    """

    weights: Any  # → (t, p_pos, p_neg), as `Product.weights`
    value: Any  # → l(s_pos, s_neg), as `Product.value`
    limit: float  # the largest |s| for which the weights can be computed


def lower(product: Product) -> Lowered:
    """The device functions of T × P, for kernels that take them as ``WEIGHTS: tl.constexpr`` and call them.

    Products that differ only in numbers get the same object. A term is traced once: other values that it reads, such
    as a global number, are fixed from then on.

    Raises:
        CannotLower: a term branches on a traced value or uses an operation that is not in the table, or the two have
            more than `MAX_PARAMS` numbers.

    Example:
        >>> import goal
        >>> from goal.terms import Product
        >>> lowered = lower(Product(goal.T.nca(tau=5.0), goal.P.lin()))
        >>> lowered is lower(Product(goal.T.nca(tau=7.0), goal.P.lin()))
        True
    """
    numbers(product)
    return _lower(_renumbered(product, itertools.repeat(0.0)))


def numbers(product: Product) -> tuple[float, ...]:
    """p0, …, p7: the numbers of T, then those of P, padded with 0. None and booleans are left out.

    Raises:
        CannotLower: there are more than `MAX_PARAMS`.

    Example:
        >>> import goal
        >>> from goal.terms import Product
        >>> numbers(Product(goal.T.con(), goal.P.sig(alpha=3.0)))
        (3.0, 10.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    """
    found = [float(value) for _, value in (*product.T.values, *product.P.values) if _is_number(value)]
    if len(found) > MAX_PARAMS:
        raise CannotLower(
            f"{_called(product.T)} and {_called(product.P)} have {len(found)} numbers as parameters, a kernel takes "
            f"{MAX_PARAMS}. Write some of them into the functions, {_ELSE}"
        )
    return (*found, *[0.0] * (MAX_PARAMS - len(found)))


@functools.cache
def _lower(product: Product) -> Lowered:
    def t(bound: Product, given: Mapping[str, Any]) -> tuple[Any, ...]:
        return (_evaluated(bound.T, given),)

    def p(bound: Product, given: Mapping[str, Any]) -> tuple[Any, ...]:
        p_pos, p_neg = _evaluated(bound.P, given)
        return p_pos, p_neg

    def loss(bound: Product, given: Mapping[str, Any]) -> tuple[Any, ...]:
        return (bound.value(given["s_pos"], given["s_neg"]),)

    T, P = _called(product.T), _called(product.P)
    t_lines, t_results = _traced(T, "t", product, t)
    w_lines, w_results = _traced(P, "w", product, p)
    l_lines, l_results = _traced(f"the potential of {T} × {P}", "l", product, loss)
    return Lowered(
        weights=_device_function("weights", [*t_lines, *w_lines], [*t_results, *map(_saturated, w_results)]),
        value=_device_function("value", l_lines, l_results),
        limit=_LARGEST if all(weight.kind == "number" for weight in w_results) else _LIMIT,
    )


def _evaluated(term: Term, given: Mapping[str, Any]) -> Any:
    return term(given["s_pos"], given["s_neg"], **{name: given[name] for name in term.statistics})


def _renumbered(product: Product, values: Iterable[Any]) -> Product:
    """The product with these values in place of its numbers, T's first."""
    values = iter(values)

    def renumbered(term: Term) -> Term:
        return Term(term.definition, tuple((n, next(values) if _is_number(v) else v) for n, v in term.values))

    return Product(renumbered(product.T), renumbered(product.P))


def _is_number(value: object) -> TypeGuard[float]:
    return value is not None and not isinstance(value, bool)


def _called(term: Term) -> str:
    return repr(term).partition("(")[0]


# ── operands ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Value(NamedTuple):
    """An operand or a result. f"{x}" is a float32, f"{x:?}" a truth, f"{x:t}" never a literal."""

    code: str
    kind: str  # "real" and "truth": tensors; "number": a scalar computed from constants and parameters
    constant: float | None = None

    def __format__(self, spec: str) -> str:
        if spec == "?" and self.kind != "truth":
            raise TypeError("it takes the result of a comparison")
        if spec == "t" and self.constant is not None:
            return f"tl.full((), {self.code}, tl.float32)"
        return f"{self.code}.to(tl.float32)" if self.kind == "truth" and spec != "?" else self.code


def _truth(code: str) -> _Value:
    return _Value(code, "truth")


def _constant(number: float) -> _Value:
    number = float(number)
    return _Value(repr(number) if abs(number) < float("inf") else f'float("{number}")', "number", number)


def _are_truths(*values: _Value) -> bool:
    return all(value.kind == "truth" for value in values)


# ── operations ──────────────────────────────────────────────────────────────────────────────────────────────────────

_NAN = "propagate_nan=tl.PropagateNan.ALL"


def _maximum(input: Any, other: Any) -> str:
    return f"tl.maximum({input}, {other}, {_NAN})"


def _minimum(input: Any, other: Any) -> str:
    return f"tl.minimum({input}, {other}, {_NAN})"


def _relu(input: _Value, inplace: _Value | None = None) -> str:
    if inplace is not None and inplace.constant != 0:
        raise TypeError("a kernel changes nothing in place")
    return _maximum(input, 0.0)


def _clamp(input: _Value, min: _Value | None = None, max: _Value | None = None) -> str:
    code = f"{input}" if min is None else _maximum(input, min)
    return code if max is None else _minimum(code, max)


def _scaled(alpha: _Value | None, other: _Value) -> str:
    return f"{other}" if alpha is None else f"{alpha} * {other}"


def _add(input: _Value, other: _Value, alpha: _Value | None = None) -> str | _Value:
    return _truth(f"{input:?} | {other:?}") if _are_truths(input, other) else f"{input} + {_scaled(alpha, other)}"


def _mul(input: _Value, other: _Value) -> str | _Value:
    return _truth(f"{input:?} & {other:?}") if _are_truths(input, other) else f"{input} * {other}"


def _pow(input: _Value, exponent: _Value) -> str:
    n = exponent.constant
    if n == 0:
        return "tl.full((), 1.0, tl.float32)"
    if n is not None and n.is_integer() and abs(n) <= 16:
        return _power(f"{input}", int(n)) if n > 0 else f"1.0 / {_power(f'{input}', int(-n))}"
    if n is not None and abs(n) == 0.5:
        return f"tl.sqrt({input})" if n > 0 else f"tl.rsqrt({input})"
    base, nan = f"{input:t}", 'float("nan")'  # the result for a negative base, unless the exponent is an integer
    size = f"tl.exp2({exponent} * tl.log2(tl.abs({base})))"
    if n is not None:
        sign = nan if not n.is_integer() else "-1.0" if n % 2 else "1.0"
        return f"tl.where({base} < 0.0, {sign}, 1.0) * {size}"
    parity = f"{exponent} - 2.0 * tl.floor(0.5 * {exponent})"
    sign = f"tl.where({parity} == 0.0, 1.0, tl.where({parity} == 1.0, -1.0, {nan}))"
    power = f"tl.where({base} < 0.0, {sign}, 1.0) * {size}"
    return f"tl.where({exponent} == 0.0, 1.0, tl.where({base} == 1.0, 1.0, {power}))"


def _power(base: str, n: int) -> str:
    """A product of n factors, by squaring; the compiler shares equal halves."""
    if n == 1:
        return base
    half = _power(base, n // 2)
    return f"({half} * {half} * {base})" if n % 2 else f"({half} * {half})"


def _soft(z: str) -> str:
    return f"tl.maximum({z}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({z})))"


def _softplus(input: _Value, beta: _Value | None = None, threshold: _Value | None = None) -> str:
    z = f"{input}" if beta is None else f"({beta} * {input})"
    soft = _soft(z) if beta is None else f"({_soft(z)}) / {beta}"
    if threshold is None or (threshold.constant is not None and threshold.constant >= 20):  # torch's 20 is rounding
        return soft
    return f"tl.where({z} > {threshold}, {input}, {soft})"


def _where(condition: _Value, input: _Value, other: _Value) -> str | _Value:
    if _are_truths(input, other):
        return _truth(f"tl.where({condition:?}, {input:?}, {other:?})")
    return f"tl.where({condition:?}, {input:t}, {other:t})"


_DTYPES = {torch.float32: "real", torch.float64: "real", torch.bool: "truth"}


def _to(input: _Value, dtype: _Value | torch.dtype) -> _Value:
    """Convert to a dtype, also to that of a tensor. A dtype read from a tensor stands for the tensor."""
    kind = dtype.kind if isinstance(dtype, _Value) else _DTYPES.get(dtype)
    if kind is None:
        raise TypeError(f"a kernel computes in float32, there is no {dtype}")
    if kind == "truth":
        return input if _are_truths(input) else _truth(f"{input} != 0.0")
    return _Value(f"{input}", "real")


def _full_like(input: _Value, fill_value: _Value, dtype: torch.dtype | None = None) -> _Value:
    return _to(_Value(f"tl.cast({fill_value}, tl.float32)", "real"), input if dtype is None else dtype)


# Names of an operation, as a function of torch or operator and as a method → Triton. Arguments have torch's names.
# "Tensor." marks a method that differs from the function of that name.
_TABLE: Mapping[str, Callable[..., str | _Value]] = {
    "add": _add,
    "sub subtract": lambda input, other, alpha=None: f"{input} - {_scaled(alpha, other)}",
    "mul multiply": _mul,
    "div divide true_divide truediv": lambda input, other: f"{input} / {other}",
    "neg negative": lambda input: f"-{input}",
    "pow": _pow,
    "square": lambda input: f"{input} * {input}",
    "sqrt": lambda input: f"tl.sqrt({input})",
    "rsqrt": lambda input: f"tl.rsqrt({input})",
    "reciprocal": lambda input: f"1.0 / {input}",
    "exp": lambda input: f"tl.exp({input})",
    "log": lambda input: f"tl.log({input})",
    "abs absolute": lambda input: f"tl.abs({input})",
    "sigmoid": lambda input: f"1.0 / (1.0 + tl.exp(-{input}))",
    "tanh": lambda input: f"2.0 / (1.0 + tl.exp(-2.0 * {input})) - 1.0",
    "softplus": _softplus,
    "logsigmoid log_sigmoid": lambda input: f"-({_soft(f'(-{input})')})",
    "relu": _relu,
    "clamp clip": _clamp,
    "clamp_min": lambda input, min: _maximum(input, min),
    "clamp_max": lambda input, max: _minimum(input, max),
    "minimum": _minimum,
    "maximum": _maximum,
    "where": _where,
    "Tensor.where": lambda input, condition, other: _where(condition, input, other),
    "gt greater": lambda input, other: _truth(f"{input} > {other}"),
    "ge greater_equal": lambda input, other: _truth(f"{input} >= {other}"),
    "lt less": lambda input, other: _truth(f"{input} < {other}"),
    "le less_equal": lambda input, other: _truth(f"{input} <= {other}"),
    "eq": lambda input, other: _truth(f"{input} == {other}"),
    "ne not_equal": lambda input, other: _truth(f"{input} != {other}"),
    "logical_and and_ bitwise_and": lambda input, other: _truth(f"{input:?} & {other:?}"),
    "logical_or or_ bitwise_or": lambda input, other: _truth(f"{input:?} | {other:?}"),
    "logical_not invert bitwise_not": lambda input: _truth(f"~{input:?}"),
    "ones_like": lambda input, dtype=None: _full_like(input, _constant(1), dtype),
    "zeros_like": lambda input, dtype=None: _full_like(input, _constant(0), dtype),
    "full_like": _full_like,
    "to": _to,
    "type_as": lambda input, other: _to(input, other),
    "float": lambda input: _to(input, torch.float32),
    "double": lambda input: _to(input, torch.float64),
    "bool": lambda input: _to(input, torch.bool),
    "detach": lambda input: input,
    "clone": lambda input: input,
    "positive pos": lambda input: input,
}
_TRITON = Language(_TABLE, _constant, "a kernel", CannotLower, _ELSE)
_LARGEST = torch.finfo(torch.float32).max
_LIMIT = _LARGEST**0.5


def _saturated(weight: _Value) -> _Value:
    """As in `Product.weights`: tensors are clamped to ±√finfo.max, plain numbers are not."""
    if weight.kind == "number":
        return weight
    return _Value(f"tl.clamp({weight}, {-_LIMIT}, {_LIMIT}, {_NAN})", "real")


# ── from a function to lines ────────────────────────────────────────────────────────────────────────────────────────


def _traced(
    owner: str, prefix: str, product: Product, function: Callable[[Product, Mapping[str, Any]], tuple[Any, ...]]
) -> tuple[list[str], list[_Value]]:
    """The lines of Triton for a function of (product, arguments), and its results."""

    def of(given: Mapping[str, Any]) -> tuple[Any, ...]:
        return function(_renumbered(product, (given[name] for name in PARAMS)), given)

    def line(result: str | _Value, operands: list[Any]) -> _Value:
        if not isinstance(result, _Value):
            numbers = all(each.kind == "number" for each in operands if isinstance(each, _Value))
            result = _Value(result, "number" if numbers else "real")
        if result.code.isidentifier():
            return result
        lines.append(f"{prefix}{len(lines)} = {result.code}")
        return result._replace(code=f"{prefix}{len(lines) - 1}")

    graph = trace(owner, ARGUMENTS, of, _TRITON)
    used = [node.target for node in graph.nodes if node.op == "placeholder" and node.users]
    lines = [f"{name} = tl.cast({name}, tl.float32)" for name in used]
    given = {name: _Value(name, "number" if name in PARAMS else "real") for name in ARGUMENTS}
    return lines, list(translate(owner, graph, given, _TRITON, keep=line))


# ── from lines to a device function ─────────────────────────────────────────────────────────────────────────────────


def _device_function(name: str, lines: Sequence[str], results: Sequence[_Value]) -> Any:
    """A Triton function with the arguments `ARGUMENTS`."""
    body = [
        "s_pos = tl.cast(s_pos, tl.float32)",
        "s_neg = tl.cast(s_neg, tl.float32)",
        *lines,
        "like = s_pos + s_neg",  # for its shape
        "return " + ", ".join(f"tl.broadcast_to({result:t}, like.shape)" for result in results),
    ]
    lines = [f"def {name}({', '.join(ARGUMENTS)}):", *(f"    {line}" for line in dict.fromkeys(body))]
    return _jit(name, "\n".join(lines) + "\n")


@functools.cache
def _jit(name: str, source: str) -> Any:
    """The source as a `triton.jit` function with a unique full name: Triton compiles one body for each full name."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    file = f"<goal lowered {name} {digest}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # Triton reads the source here
    namespace = {"__name__": f"{__name__}.{digest}", "tl": tl, "triton": triton}
    exec(compile(source, file, "exec"), namespace)
    return triton.jit(namespace[name])
