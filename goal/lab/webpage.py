"""The laboratory as a page: an HTML file that draws T, P±, their field and its curl, with sliders for the parameters.

The page computes with the expressions that SymPy read, printed as JavaScript; the verdict beside them is Python's. A
comparison of parameters alone, such as `relu(margin - 0.1)`, is decided when a term is read, so such parameters get no
slider.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

import sympy as sp
from sympy.printing.jscode import JavascriptCodePrinter
from sympy.printing.precedence import precedence
from sympy.printing.str import StrPrinter

from goal.lab.read import RELATIVE, S_NEG, S_POS, CannotRead, Reading
from goal.lab.verdict import Integrability, integrability
from goal.terms import Definition, Product, Term

_LETTERS = {"tau": "τ", "alpha": "α", "beta": "β", "lam": "λ", "eps": "ε", "margin": "m"}
_SIGNS = {"s_pos": "s⁺", "s_neg": "s⁻", "r_pos_lin": "R⁺", "r_neg_lin": "R⁻", "r_pos_exp": "R⁺", "r_neg_exp": "R⁻"}
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_RELATIVE_RANGES = {  # of similarities in [−1, 1]; s⁻ is the hardest; the exponentials have no useful end
    "r_pos_lin": (-1.0, 1.0, "mean of s⁺ᵢ − s⁺ₖ"),
    "r_neg_lin": (0.0, 2.0, "mean of s⁻ᵢ − sᵢⱼ"),
    "r_pos_exp": (0.0, 10.0, "mean of exp(α(s⁺ᵢ − s⁺ₖ))"),
    "r_neg_exp": (0.0, 1.0, "mean of exp(−β(s⁻ᵢ − sᵢⱼ))"),
}
_LARGEST = 1e300  # that a slider reaches


class Slider(NamedTuple):
    """A number that moves."""

    label: str  # its letter
    meaning: str  # its name in Python
    value: float
    low: float
    high: float
    log: bool


def page(T: str | Term | Definition, P: str | Term | Definition) -> str:
    """The text of an HTML file that shows T × P over (s⁺, s⁻) ∈ [−1, 1]², and follows sliders of its parameters.

    It draws T, P⁺ and P⁻, the descent field (s⁺, s⁻)' = (T P⁺, −T P⁻) with trajectories from where one clicks, the curl
    with the lines on which a term jumps, and the loss whose gradient the field is or comes nearest to. The file needs
    no network and no library. Write it with `goal.data.files.write_atomically(path, page(T, P).encode())`.

    Args:
        T: a triplet weight: a name, `goal.T.nca`, or `goal.T.nca(tau=5.0)`; your own ones too.
        P: a pair weight.

    Raises:
        CannotRead: a term cannot be told to SymPy, so there are no formulas to show.
        ValueError: an unknown name; a field that is not finite on the square.
        TypeError: not a term.

    Example:
        >>> from goal.lab.webpage import page
        >>> text = page("nca", "lin")
        >>> text.startswith("<!doctype html>"), "the gradient of no loss" in text
        (True, True)
    """
    found = integrability(T, P)
    if found.reading is None:
        raise CannotRead(str(found.unread))
    sliders = _sliders(found, found.reading)
    p_pos, p_neg = found.reading.results[1:]
    data = {
        "sliders": [slider._asdict() for slider in sliders.values()],
        "coupled": _relative_names(found),
        "curves": [
            "P⁺(s⁺, 0)" if found.reading.depends(p_pos, S_NEG) else "P⁺(s⁺)",
            "P⁻(0, s⁻)" if found.reading.depends(p_neg, S_POS) else "P⁻(s⁻)",
        ],
    }
    template = resources.files("goal.lab").joinpath("webpage.html").read_text(encoding="utf-8")
    head, script, tail = re.split(r"(?<=<script>)(.*)(?=</script>)", template, flags=re.DOTALL)
    script = script.replace("/*FORMULAS*/", _javascript(found.reading, list(sliders)))
    parts = {
        "title": html.escape(f"{found.T.name} × {found.P.name}"),
        "terms": html.escape(f"{found.T} × {found.P}"),
        "proof": _proof(found, found.reading),
        "data": json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }

    def filled(text: str) -> str:
        return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)

    return filled(head) + script + filled(tail)


# ------------------------------------------------------------------------------------------------------------- sliders


def _sliders(found: Integrability, reading: Reading) -> dict[sp.Symbol, Slider]:
    """A slider for each parameter, and for each relative similarity that a term declares."""
    sliders = {}
    for symbol, exact in reading.values.items():
        value = float(exact)
        if symbol not in reading.decided:
            sliders[symbol] = Slider(_unicode(symbol), symbol.name, value, *_range(symbol.name, value))
    for name in Product(found.T, found.P).statistics:
        low, high, meaning = _RELATIVE_RANGES[name]
        sliders[RELATIVE[name]] = Slider(_unicode(RELATIVE[name]), meaning, 0.0, low, high, False)
    return sliders


def _range(name: str, value: float) -> tuple[float, float, bool]:
    """(low, high, whether the scale is logarithmic) of a parameter, with its value inside.

    >>> _range("tau", 10.0), _range("margin", 0.2), _range("lam", 0.5), _range("shift", -3.0)
    ((0.1, 100.0, True), (0.0, 1.0, False), (-1.0, 1.0, False), (-6.0, 6.0, False))
    """
    name = name.removesuffix("_T").removesuffix("_P")
    wide = min(max(1.0, 2 * abs(value)), _LARGEST)
    if name in ("tau", "alpha", "beta"):
        return max(min(0.1, value / 10), 1 / _LARGEST), max(100.0, min(10 * value, _LARGEST)), True
    if name in ("margin", "eps"):
        return 0.0, wide, False
    if name == "lam":
        return -max(1.0, abs(value)), max(1.0, abs(value)), False
    if value > 0:
        return max(value / 10, 1 / _LARGEST), min(10 * value, _LARGEST), True
    return -wide, wide, False


# ---------------------------------------------------------------------------------------------------------- JavaScript


class _JavaScript(JavascriptCodePrinter):
    """Expressions as JavaScript; every symbol under a name of ours, so that no parameter's name gets into the code."""

    def __init__(self, names: Mapping[sp.Symbol, str], switches: frozenset[sp.Symbol]) -> None:
        super().__init__()
        self._names, self._on = dict(names), switches

    def _print_Symbol(self, e: sp.Symbol) -> str:
        return str(self._names[e])

    _print_Dummy = _print_Symbol

    def _print_sigmoid(self, e: sp.Expr) -> str:
        return f"sigmoid({self._print(e.args[0])})"

    def _print_softplus(self, e: sp.Expr) -> str:
        return f"softplus({self._print(e.args[0])})"

    def _print_Mul(self, e: sp.Expr) -> str:
        """h x as h ? x : 0, and (1 − h) x as h ? 0 : x: what is switched off may be infinite."""
        for factor in e.args:
            h = factor.base if factor.is_Pow and factor.exp.is_positive else factor
            rest = sp.Mul(*(other for other in e.args if other is not factor))
            if h in self._on:
                return f"({self._names[h]} ? {self._print(rest)} : 0)"
            if 1 - h in self._on:
                return f"({self._names[1 - h]} ? 0 : {self._print(rest)})"
        return str(super()._print_Mul(e))

    def function(self, reading: Reading, *results: sp.Expr) -> str:
        """`(a, b, p) => [...]`: expressions at (s⁺, s⁻) = (a, b) and parameters p."""
        on = [f"const {self._names[h]} = {self.doprint(u)} > 0 ? 1 : 0;" for h, u in reading.switches]
        fresh = (sp.Dummy(f"x{k}") for k in range(10_000))
        shared, results = sp.cse(results, symbols=fresh, ignore=self._on)
        for k, (symbol, _) in enumerate(shared):
            self._names[symbol] = f"x{k}"
        on += [f"const {self._names[symbol]} = {self.doprint(e)};" for symbol, e in shared]
        return f"(a, b, p) => {{ {' '.join(on)} return [{', '.join(map(self.doprint, results))}]; }}"


def _javascript(reading: Reading, moving: list[sp.Symbol]) -> str:
    """The object `formulas`: weights → [T, P⁺, P⁻]; curl → its two summands; for each switch its u, and its line.

    A line gives [J, |∇u|], where J δ(u) is the curl on u = 0: J / |∇u| is the circulation per length.
    """
    fixed = {symbol: value for symbol, value in reading.values.items() if symbol not in moving}
    names = {S_POS: "a", S_NEG: "b"} | {symbol: f"p[{k}]" for k, symbol in enumerate(moving)}
    names |= {h: f"h{k}" for k, (h, _) in enumerate(reading.switches)}
    t, p_pos, p_neg = (e.subs(fixed) for e in reading.results)
    switches = tuple((h, u.subs(fixed)) for h, u in reading.switches)
    reading = Reading((t, p_pos, p_neg), switches, reading.values)
    printer = _JavaScript(names, frozenset(h for h, _ in switches))
    f_pos, f_neg = -t * p_pos, t * p_neg
    lines = []
    for h, u in switches:
        slopes = sp.diff(u, S_POS), sp.diff(u, S_NEG)
        jump_pos, jump_neg = (f.subs(h, 1) - f.subs(h, 0) for f in (f_pos, f_neg))
        lines.append((jump_neg * slopes[0] - jump_pos * slopes[1], sp.sqrt(slopes[0] ** 2 + slopes[1] ** 2)))
    parts = {
        "weights": printer.function(reading, t, p_pos, p_neg),
        "curl": printer.function(reading, sp.diff(f_neg, S_POS), -sp.diff(f_pos, S_NEG)),
        "switches": "[" + ", ".join(printer.function(reading, u) for _, u in switches) + "]",
        "lines": "[" + ", ".join(printer.function(reading, *line) for line in lines) + "]",
    }
    return "{\n" + "".join(f"  {name}: {code},\n" for name, code in parts.items()) + "}"


# ------------------------------------------------------------------------------------------------------ words, formulas


class _Unicode(StrPrinter):
    """Expressions as the documentation writes them: σ(τ·(s⁻ − s⁺))."""

    def _print_Symbol(self, e: sp.Symbol) -> str:
        if e in (S_POS, S_NEG, *RELATIVE.values()):
            return _SIGNS[e.name]
        name, _, term = e.name.rpartition("_")
        if name in _LETTERS and term in ("T", "P"):
            return f"{_LETTERS[name]}_{term}"
        return str(_LETTERS.get(e.name, e.name))

    def _print_Pow(self, e: sp.Expr, rational: bool = False) -> str:
        base, exponent = e.as_base_exp()
        if exponent.is_Integer and exponent > 1:
            shown = self.parenthesize(base, precedence(e), strict=True)
            shown = f"({shown})" if base in (S_POS, S_NEG, *RELATIVE.values()) else shown
            return shown + str(exponent).translate(_SUPERSCRIPTS)
        if exponent.is_Integer and exponent < -1:
            return f"1/{self._print_Pow(sp.Pow(base, -exponent, evaluate=False))}"
        return str(super()._print_Pow(e, rational)).replace("**", "^")

    def _print_sigmoid(self, e: sp.Expr) -> str:
        return f"σ({self._print(e.args[0])})"

    def _print_Heaviside(self, e: sp.Expr) -> str:
        return f"1[{self._print(e.args[0])} > 0]"

    def _print_DiracDelta(self, e: sp.Expr) -> str:
        return f"δ({self._print(e.args[0])})"

    def _print_Max(self, e: sp.Expr) -> str:
        return f"max({', '.join(map(self._print, sorted(e.args, key=sp.default_sort_key)))})"


def _unicode(expression: sp.Expr) -> str:
    """
    >>> _unicode(sp.Symbol("tau", positive=True) * (S_NEG - S_POS) ** 2 / 2)
    'τ·(s⁻ − s⁺)²/2'
    """
    return str(_Unicode().doprint(expression)).replace("*", "·").replace("-", "−")


def _relative_names(found: Integrability) -> str:
    """ "R⁺ and R⁻", where the field depends on them; else nothing."""
    return " and ".join(sorted({_SIGNS[name] for name in found.coupling}))


def _proof(found: Integrability, reading: Reading) -> str:
    """What Python found, as HTML."""
    t, p_pos, p_neg = (_unicode(reading.shown(e)) for e in reading.results)
    rows = [("T", t), ("P⁺", p_pos), ("P⁻", p_neg)]
    rows.append(("curl", "" if found.curl is None else _unicode(found.curl)))
    if found.potential is not None:
        loss = found.potential.expression
        rows.append(("loss", "no closed form found; it is integrated along lines" if loss is None else _unicode(loss)))
    if reading.values:
        at = ", ".join(f"{_unicode(symbol)} = {float(value):g}" for symbol, value in reading.values.items())
        rows.append(("at", at.replace("-", "−")))
    verdict = f"the gradient of {'a' if found.integrable else 'no'} loss"
    remarks = []
    if found.integrable and not found.proven:
        remarks.append("The curl is zero to 40 digits wherever it was evaluated, but was not simplified to 0.")
    if found.coupling:
        remarks.append(
            f"The field depends on {_relative_names(found)}, which other pairs of the batch move without receiving the "
            "converse: over a batch it is the gradient of no loss, whatever the curl."
        )
    if not found.integrable:
        held = " (R = 0)" if found.coupling else ""
        remarks.append(
            f"On [−1, 1]²{held}: |curl| of a cell up to {found.largest_curl:.3g}, {found.mean_curl:.3g} on average; "
            f"{100 * found.rotational_share:.3g} % of the squared field is rotational."
        )
    if not found.agree:
        remarks.append("In symbols and in numbers the verdicts differ; trust neither.")
    if any(symbol in reading.decided for symbol in reading.values):
        stuck = ", ".join(_unicode(symbol) for symbol in reading.values if symbol in reading.decided)
        remarks.append(f"A term compares {stuck} with a number, so it does not move here.")
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in rows)
    said = "".join(f"<p>{html.escape(text)}</p>" for text in remarks)
    return f'<p><strong id="found">{verdict}</strong></p><dl>{listed}</dl>{said}'
