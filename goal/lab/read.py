"""Terms as mathematics: the function that is run and lowered, read as an expression of SymPy.

Comparisons become *switches*: a symbol h that is 1 where an expression u(s⁺, s⁻) is positive and 0 elsewhere. Every
kink and every jump of a term consists of switches (relu(u) = h u, where(c, a, b) = h a + (1 − h) b). Between the lines
u = 0 an expression is therefore smooth, and the jump on a line can be computed exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from sympy.printing.pycode import PythonCodePrinter
from torch import Tensor

from goal.terms import STATISTICS, Parameter, Product, Term
from goal.terms.tracing import CannotTrace, Language, trace, translate

S_POS, S_NEG = sp.symbols("s_pos s_neg", real=True)
RELATIVE = {name: sp.Symbol(name, real=True) for name in STATISTICS}
_LATEX = {
    S_POS: "s^{+}",
    S_NEG: "s^{-}",
    RELATIVE["r_pos_lin"]: "R^{+}",
    RELATIVE["r_neg_lin"]: "R^{-}",
    RELATIVE["r_pos_exp"]: "R^{+}",
    RELATIVE["r_neg_exp"]: "R^{-}",
}
_EXPANDED = 100  # operations up to which maxima are looked for; products of many terms take SymPy for ever to expand
_GREEK = {"lam": r"\lambda", "eps": r"\varepsilon", "margin": "m"}


class CannotRead(CannotTrace):
    """A term holds something that SymPy cannot be told; the message names the term, the operation, the line."""


class sigmoid(sp.Function):
    """σ(z) = 1 / (1 + e⁻ᶻ)."""

    nargs = 1

    @classmethod
    def eval(cls, z: sp.Expr) -> sp.Expr | None:
        return sp.Rational(1, 2) if z == 0 else None

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return self * (1 - self)

    def _eval_evalf(self, prec: int) -> sp.Expr:
        return (1 / (1 + sp.exp(-self.args[0])))._eval_evalf(prec)

    def _latex(self, printer: Any) -> str:
        return rf"\sigma\left({printer._print(self.args[0])}\right)"


class softplus(sp.Function):
    """log(1 + eᶻ)."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return sigmoid(self.args[0])

    def _eval_evalf(self, prec: int) -> sp.Expr:
        return sp.log(1 + sp.exp(self.args[0]))._eval_evalf(prec)

    def _latex(self, printer: Any) -> str:
        return rf"\operatorname{{softplus}}\left({printer._print(self.args[0])}\right)"


@dataclass(frozen=True)
class Reading:
    """Expressions of s⁺ and s⁻, with their parameters as symbols.

    Attributes:
        results: what the function returns.
        switches: (h, u): the symbol that is 1 where u > 0 and 0 elsewhere; u may hold earlier ones.
        values: the numbers that the parameters are bound to, exactly.
        decided: the parameters whose numbers decided a comparison; with others the expressions might not hold.
    """

    results: tuple[sp.Expr, ...]
    switches: tuple[tuple[sp.Symbol, sp.Expr], ...]
    values: Mapping[sp.Symbol, sp.Expr]
    decided: frozenset[sp.Symbol] = frozenset()

    def shown(self, expression: sp.Expr) -> sp.Expr:
        """An expression with its switches written as Heaviside's function, or as a maximum where they form one."""
        on = [h for h, _ in self.switches]
        expression = expression.replace(lambda e: e.is_Pow and e.base in on and e.exp.is_positive, lambda e: e.base)
        short = expression.count_ops() <= _EXPANDED
        for h, u in reversed(self.switches):  # a line may be made of earlier switches
            whole = sp.expand(expression) if short else expression
            slope, rest = (whole.coeff(h, 1), whole.coeff(h, 0)) if short else (sp.Integer(0), whole)
            linear = slope != 0 and not slope.has(h) and sp.expand(rest + h * slope) == whole
            if linear and not (ratio := sp.cancel(slope / u)).has(S_POS, S_NEG):
                expression = rest + ratio * sp.Max(0, u)
            else:
                expression = expression.subs(h, sp.Heaviside(u))
        return expression

    def depends(self, expression: sp.Expr, *symbols: sp.Symbol) -> bool:
        """Whether an expression changes with one of the symbols, its switches included."""
        return bool(expression.has(*symbols) or any(expression.has(h) and u.has(*symbols) for h, u in self.switches))

    def bound(self, expression: sp.Expr) -> sp.Expr:
        """An expression with the parameters' numbers in it."""
        return expression.subs(self.values)


def read(product: Product) -> Reading:
    """T, P⁺ and P⁻ as expressions.

    Raises:
        CannotRead: a term branches on a value or uses an operation that is not in the table.

    Example:
        >>> import goal
        >>> from goal.terms import Product
        >>> read(Product(goal.T.nca(), goal.P.lin())).results
        (sigmoid(tau*(s_neg - s_pos)), 1 - s_pos, s_neg)
    """
    names = _parameters(product)

    def of(given: Mapping[str, Any]) -> tuple[Any, ...]:
        def called(term: Term) -> Any:
            bound = Term(term.definition, tuple((n, given.get(names.get((term, n), ""), v)) for n, v in term.values))
            return bound(given["s_pos"], given["s_neg"], **{name: given[name] for name in term.statistics})

        p_pos, p_neg = called(product.P)
        return called(product.T), p_pos, p_neg

    values = {names[term, n]: v for term in (product.T, product.P) for n, v in term.values if (term, n) in names}
    return _read(f"{product.T} × {product.P}", of, values)


def read_function(function: Callable[[Tensor, Tensor], Any], owner: str) -> Reading:
    """What a function of (s⁺, s⁻) returns, as an expression. Raises CannotRead as `read` does."""
    return _read(owner, lambda given: (function(given["s_pos"], given["s_neg"]),), {})


def _parameters(product: Product) -> dict[tuple[Term, str], str]:
    """The symbol of each number of each term: its own name, told apart only where T and P give it different values."""
    both = {name for name, value in product.T.values if product.P.params.get(name, value) != value}
    return {
        (term, name): f"{name}_{term.definition.registry}" if name in both else name
        for term in (product.T, product.P)
        for name, value in term.values
        if value is not None and not isinstance(value, bool)
    }


def _read(owner: str, function: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Parameter]) -> Reading:
    symbols = {name: _parameter(name) for name in values}
    numbers = {symbols[name]: _exactly(value) for name, value in values.items()}
    given = {"s_pos": S_POS, "s_neg": S_NEG, **RELATIVE, **symbols}
    switches: dict[sp.Expr, sp.Symbol] = {}
    decided: set[sp.Symbol] = set()

    def switch(u: sp.Expr) -> sp.Expr:
        """1 where u > 0; the same symbol for all comparisons that share their line."""
        u = sp.expand(u)
        known = u.subs(numbers)
        if known.is_number:
            decided.update(u.free_symbols & numbers.keys())
            return sp.Integer(bool(known > 0))
        if not u.has(S_POS, S_NEG):
            raise TypeError("it compares with a relative similarity, which the plane of (s⁺, s⁻) does not show")
        _, u = u.as_content_primitive()
        if -u in switches:
            return 1 - switches[-u]
        return switches.setdefault(u, sp.Symbol(f"h.{len(switches)}", real=True))  # no parameter has such a name

    language = Language(_table(switch), _exactly, "SymPy", CannotRead, _ELSE)
    graph = trace(owner, tuple(given), function, language)
    results = translate(owner, graph, given, language, keep=lambda value, operands: sp.sympify(value))
    return Reading(results, tuple((h, u) for u, h in switches.items()), numbers, frozenset(decided))


_ELSE = "or ask for its numerical verdict alone: it is still run, and its field is integrated round loops."


def _parameter(name: str) -> sp.Symbol:
    return sp.Symbol(name, positive=True) if name in ("tau", "alpha", "beta") else sp.Symbol(name, real=True)


def _exactly(number: Any) -> sp.Expr:
    """The rational that was meant by a float: 0.1 is 1/10."""
    return sp.Rational(repr(float(number))) if abs(number) < float("inf") else sp.Float(number)


def _table(switch: Callable[[sp.Expr], sp.Expr]) -> dict[str, Callable[..., Any]]:
    """Operations as torch names them → what SymPy makes of them."""

    def where(condition: sp.Expr, input: sp.Expr, other: sp.Expr) -> sp.Expr:
        return condition * input + (1 - condition) * other

    def maximum(input: sp.Expr, other: sp.Expr) -> sp.Expr:
        return other + switch(input - other) * (input - other)

    def minimum(input: sp.Expr, other: sp.Expr) -> sp.Expr:
        return -maximum(-input, -other)

    def clamp(input: sp.Expr, min: sp.Expr | None = None, max: sp.Expr | None = None) -> sp.Expr:
        above = input if min is None else maximum(input, min)
        return above if max is None else minimum(above, max)

    def soft(input: sp.Expr, beta: Any = 1, threshold: Any = None) -> sp.Expr:
        return softplus(beta * input) / beta

    def to(input: sp.Expr, dtype: Any) -> sp.Expr:
        if dtype is torch.bool:
            raise TypeError("a number is no truth; compare it")
        return input

    return {
        "add": lambda input, other, alpha=1: input + alpha * other,
        "sub subtract": lambda input, other, alpha=1: input - alpha * other,
        "mul multiply": lambda input, other: input * other,
        "div divide true_divide truediv": lambda input, other: input / other,
        "neg negative": lambda input: -input,
        "pow": lambda input, exponent: input**exponent,
        "square": lambda input: input**2,
        "sqrt": lambda input: sp.sqrt(input),
        "rsqrt": lambda input: 1 / sp.sqrt(input),
        "reciprocal": lambda input: 1 / input,
        "exp": lambda input: sp.exp(input),
        "log": lambda input: sp.log(input),
        "abs absolute": lambda input: (2 * switch(input) - 1) * input,
        "sigmoid": lambda input: sigmoid(input),
        "tanh": lambda input: 2 * sigmoid(2 * input) - 1,
        "softplus": soft,
        "logsigmoid log_sigmoid": lambda input: -softplus(-input),
        "relu": lambda input, inplace=None: maximum(input, sp.Integer(0)),
        "clamp clip": clamp,
        "clamp_min": lambda input, min: maximum(input, min),
        "clamp_max": lambda input, max: minimum(input, max),
        "minimum": minimum,
        "maximum": maximum,
        "where": where,
        "Tensor.where": lambda input, condition, other: where(condition, input, other),
        "gt greater ge greater_equal": lambda input, other: switch(input - other),
        "lt less le less_equal": lambda input, other: switch(other - input),
        "logical_and and_ bitwise_and": lambda input, other: input * other,
        "logical_or or_ bitwise_or": lambda input, other: input + other - input * other,
        "logical_not invert bitwise_not": lambda input: 1 - input,
        "ones_like": lambda input, dtype=None: sp.Integer(1),
        "zeros_like": lambda input, dtype=None: sp.Integer(0),
        "full_like": lambda input, fill_value, dtype=None: fill_value,
        "to type_as": to,
        "float double detach clone positive pos": lambda input: input,
    }


# ---------------------------------------------------------------------------------------------- writing expressions


def latex(expression: sp.Expr) -> str:
    """LaTeX with the field's own letters: s⁺, s⁻, R⁺, R⁻, λ, m."""
    letters = {symbol: _GREEK[symbol.name] for symbol in expression.free_symbols if symbol.name in _GREEK}
    return str(sp.latex(expression, symbol_names={**_LATEX, **letters}, mul_symbol=None))


class _Torch(PythonCodePrinter):
    """Expressions as Python with torch operators."""

    def _called(self, name: str, expression: sp.Expr) -> str:
        if expression.is_number:
            return repr(float(expression))
        return f"{name}({', '.join(map(self._print, expression.args))})"

    def _print_sigmoid(self, e: sp.Expr) -> str:
        return self._called("torch.sigmoid", e)

    def _print_softplus(self, e: sp.Expr) -> str:
        if e.is_number:
            return repr(float(e))
        # float64 sees what torch leaves out above its own threshold of 20
        return f"torch.nn.functional.softplus({self._print(e.args[0])}, threshold=40)"

    def _print_exp(self, e: sp.Expr) -> str:
        return self._called("torch.exp", e)

    def _print_log(self, e: sp.Expr) -> str:
        return self._called("torch.log", e)

    def _print_atan(self, e: sp.Expr) -> str:
        return self._called("torch.atan", e)

    def _print_Max(self, e: sp.Expr) -> str:
        number, *rest = sorted(e.args, key=lambda arg: not arg.is_number)
        if len(rest) == 1 and number == 0:
            return f"torch.relu({self._print(rest[0])})"
        raise CannotRead(f"{e} has no short name in torch.")

    def _print_Abs(self, e: sp.Expr) -> str:
        return self._called("torch.abs", e)

    def _print_Heaviside(self, e: sp.Expr) -> str:
        return f"(({self._print(e.args[0])}) > 0).to(s_neg.dtype)"

    def _print_Rational(self, e: Any) -> str:
        return repr(float(e))

    def _print_Pow(self, e: Any, **options: Any) -> str:
        base, exponent = e.as_base_exp()
        if exponent == sp.Rational(1, 2):
            return f"torch.sqrt({self._print(base)})"
        return str(super()._print_Pow(e, **options))

    _print_Half = _print_Pi = _print_Exp1 = _print_Rational


_OPERATORS = (sp.Add, sp.Mul, sp.Pow, sp.Symbol, sp.Number, sp.pi.func, sp.E.func)
_FUNCTIONS = (sp.exp, sp.log, sp.atan, sp.Abs, sigmoid, softplus, sp.Max, sp.Heaviside)


def torch_source(expression: sp.Expr) -> str:
    """Python that computes an expression of `s_pos`, `s_neg` and parameters with torch operators.

    Raises:
        CannotRead: it holds a function that has no name in torch, as an integral may.
    """
    if strange := [e for e in sp.preorder_traversal(expression) if not isinstance(e, (*_OPERATORS, *_FUNCTIONS))]:
        raise CannotRead(f"{strange[0].func.__name__} in {expression} has no name in torch.")
    return str(_Torch({"fully_qualified_modules": True, "strict": False}).doprint(expression))


def torch_function(expression: sp.Expr, values: Mapping[sp.Symbol, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """An expression as a function of tensors s⁺ and s⁻ of one shape, in their dtype."""
    source = torch_source(expression.subs(dict(values)))
    code = compile(source, f"<{expression}>", "eval")

    def evaluate(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        found: Tensor = eval(code, {"torch": torch, "s_pos": s_pos, "s_neg": s_neg})
        return found + torch.zeros_like(s_pos + s_neg)

    return evaluate
