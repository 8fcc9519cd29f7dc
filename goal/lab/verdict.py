"""Is (∂l/∂s⁺, ∂l/∂s⁻) = (−T·P⁺, T·P⁻) the gradient of a loss l(s⁺, s⁻)? A symbolic answer, and a numerical one.

In symbols: between the lines on which terms switch, the curl ∂(T·P⁻)/∂s⁺ + ∂(T·P⁺)/∂s⁻ must vanish; across such a line
the field may jump only at right angles to it. In numbers: the work round every cell of a grid must vanish, however the
field jumps. Both tests are always run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import mpmath
import sympy as sp
import torch
from torch import Tensor

from goal.lab.field import REACH, Decomposition, Field, decompose, field_of, gradient_of, scattered, work
from goal.lab.read import RELATIVE, S_NEG, S_POS, CannotRead, Reading, latex, read, sigmoid, softplus, torch_function
from goal.terms import Definition, Product, Term
from goal.terms import P as PAIRS
from goal.terms import T as TRIPLETS

_DIGITS = 40  # in which a symbolic expression is evaluated, to tell whether it is zero
_ZERO = 1e-9  # work round a cell, as a share of the largest along an edge, that rounding and quadrature leave
_POINTS = 400  # of the square, at which regions between lines are found
_SIMPLE = 400  # operations up to which an expression is simplified further, where that is needed at all
_SHOWN = 40  # and up to which it is for show alone: SymPy may never come back from more


Regions = dict[tuple[int, ...], list[tuple[float, float]]]  # what the switches are → points where they are that


class Potential(NamedTuple):
    """The loss l(s⁺, s⁻) whose gradient a field is, up to a constant. Call it with tensors of one shape."""

    expression: sp.Expr | None  # of `s_pos`, `s_neg` and parameters; None where SymPy finds no closed form
    evaluate: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, s_pos: Tensor, s_neg: Tensor) -> Tensor:
        return self.evaluate(s_pos, s_neg)

    def latex(self) -> str:
        """The closed form, or the line integral that it stands for."""
        if self.expression is None:
            return r"\int_{(0,0)}^{(s^{+},s^{-})} \left(-T P^{+}\,\mathrm{d}s^{+} + T P^{-}\,\mathrm{d}s^{-}\right)"
        return latex(self.expression)


@dataclass(frozen=True, repr=False)
class Integrability:
    """What `goal.lab.integrability` found.

    Attributes:
        T, P: the terms.
        integrable: whether the field is the gradient of a loss, by both verdicts.
        symbolic: the verdict in symbols; None where a term cannot be read.
        numerical: the verdict in numbers: no work round any cell of a grid over [−1, 1]².
        curl: ∂(T·P⁻)/∂s⁺ + ∂(T·P⁺)/∂s⁻, a jump across u = 0 as DiracDelta(u) times its strength; None if not read.
        coupling: for terms with relative similarities R, by R: ∂(T·P±)/∂R. Where it is not 0, other pairs move the
            field of this one without receiving the converse, and the batch's field is no gradient, whatever the curl.
        potential: the loss, where there is one.
        largest_curl, mean_curl: of the cells' mean curl, in absolute value.
        rotational_share: of the squared field, what even the nearest loss cannot express; R = 0 for relative terms.
        field: the field as numbers, its nearest loss and its work along a grid (`goal.lab.field.Decomposition`).
        unread: why the terms could not be read, or None.
    """

    T: Term
    P: Term
    integrable: bool
    symbolic: bool | None
    numerical: bool
    proven: bool
    curl: sp.Expr | None
    coupling: dict[str, sp.Expr]
    potential: Potential | None
    largest_curl: float
    mean_curl: float
    rotational_share: float
    field: Decomposition
    reading: Reading | None
    unread: str | None

    @property
    def agree(self) -> bool:
        """Whether the verdicts in symbols and in numbers are the same; about relative terms numbers say nothing."""
        return self.symbolic is None or bool(self.coupling) or self.symbolic == self.numerical

    def latex(self) -> str:
        """T, P±, the curl and the potential as an `align*` environment."""
        if self.reading is None:
            raise CannotRead(f"{self.T} × {self.P} has no expressions: {self.unread}")
        t, p_pos, p_neg = map(self.reading.shown, self.reading.results)
        lines = [
            f"T &= {latex(t)}",
            f"P^{{+}} &= {latex(p_pos)} & P^{{-}} &= {latex(p_neg)}",
            rf"\frac{{\partial (T P^{{-}})}}{{\partial s^{{+}}}} + \frac{{\partial (T P^{{+}})}}{{\partial s^{{-}}}} "
            rf"&= {latex(self.curl)}",
        ]
        if self.potential is not None:
            lines.append(rf"\ell &= {self.potential.latex()}")
        return "\\begin{align*}\n" + " \\\\\n".join(lines) + "\n\\end{align*}"

    def __repr__(self) -> str:
        lines = [f"{self.T} × {self.P}: {'the gradient of a loss' if self.integrable else 'the gradient of no loss'}"]
        if self.potential is not None:
            closed = self.potential.expression
            lines.append(f"  loss       {'no closed form found; integrated along lines' if closed is None else closed}")
        if self.curl is not None:
            lines.append(f"  curl       {self.curl}")
        if self.unread is not None:
            lines.append(f"  in symbols not read: {self.unread}")
        elif not self.proven:
            lines.append(f"  in symbols zero to {_DIGITS} digits wherever evaluated, but not simplified to 0")
        for name, expression in self.coupling.items():
            lines.append(f"  coupling   ∂/∂{name} = {expression}: other pairs move it, see batch_integrability")
        at = " (R = 0)" if self.coupling else ""
        if self.integrable:
            return "\n".join(lines)
        lines.append(f"  on [−1, 1]²{at}: |curl| up to {self.largest_curl:.3g}, {self.mean_curl:.3g} on average; "
                     f"{100 * self.rotational_share:.3g} % of the field is rotational")  # fmt: skip
        if not self.agree:
            lines.append(
                f"  WARNING    in symbols it is {'' if self.symbolic else 'not '}integrable, in numbers the opposite"
            )
        return "\n".join(lines)


def integrability(T: str | Term | Definition, P: str | Term | Definition) -> Integrability:
    """Whether T × P is the gradient of a loss of one triplet, which loss that is, or by how much it is none.

    The field is F = (∂l/∂s⁺, ∂l/∂s⁻) = (−T·P⁺, T·P⁻) on [−1, 1]², the square that cosines reach. It is a gradient iff

        ∂(T·P⁻)/∂s⁺ + ∂(T·P⁺)/∂s⁻ = 0

    between the lines where comparisons switch, and across each line u(s⁺, s⁻) = 0 its jump [F] is at right angles to
    it: [F⁻] ∂u/∂s⁺ − [F⁺] ∂u/∂s⁻ = 0. Relative similarities R are constants here, as the emitted gradient has them; a
    field that depends on one is not integrable over the batch (`Integrability.coupling`).

    Args:
        T: a triplet weight: a name, `goal.T.nca`, or `goal.T.nca(tau=5.0)`; your own ones too.
        P: a pair weight.

    Returns:
        An `Integrability`, which prints as a summary.

    Raises:
        ValueError: an unknown name; a field that is not finite on the square.
        TypeError: not a term.

    Example:
        >>> import goal
        >>> from goal import lab
        >>> lab.integrability("cir", "lin").potential.expression
        softplus(tau*(s_neg**2 + (s_pos - 1)**2 - 1/2))/(2*tau)
        >>> lab.integrability("nca", "lin").integrable
        False
        >>> lab.integrability(goal.T.con(margin=0.2), "lin").curl
        (-s_neg - s_pos + 1)*DiracDelta(margin + s_neg - s_pos)

    Source: Xuan and Chen, "GOAL: Gradient-based Objective AnaLysis", 2023, for the fields; Green's theorem.
    """
    product = Product(TRIPLETS.bind(T), PAIRS.bind(P))
    field = field_of(product)
    numbers = decompose(field)
    largest = max(numbers.along_pos.abs().max().item(), numbers.along_neg.abs().max().item())
    numerical = numbers.circulation.abs().max().item() <= _ZERO * largest
    symbolic, proven, curl, coupling, reading, unread = None, False, None, {}, None, None
    try:
        reading = read(product)
    except CannotRead as error:
        unread = str(error)
    if reading is not None:
        regions = _regions(reading)
        symbolic, proven, curl = _curl(reading, regions)
        coupling = _coupling(reading, regions)
        symbolic = symbolic and not coupling
    integrable = numerical and symbolic is not False and not (unread and product.statistics)
    absolute = numbers.curl.abs()
    return Integrability(
        T=product.T,
        P=product.P,
        integrable=integrable,
        symbolic=symbolic,
        numerical=numerical,
        proven=proven,
        curl=curl,
        coupling=coupling,
        potential=_potential(reading, field) if integrable else None,
        largest_curl=absolute.max().item(),
        mean_curl=absolute.mean().item(),
        rotational_share=numbers.rotational_share,
        field=numbers,
        reading=reading,
        unread=unread,
    )


# ------------------------------------------------------------------------------------------------- the curl, in symbols


def _field(reading: Reading) -> tuple[sp.Expr, sp.Expr]:
    t, p_pos, p_neg = reading.results
    return -t * p_pos, t * p_neg


def _curl(reading: Reading, regions: Regions) -> tuple[bool, bool, sp.Expr]:
    """Whether the field has none, whether that is proven, and the expression."""
    f_pos, f_neg = _field(reading)
    smooth = sp.diff(f_neg, S_POS) - sp.diff(f_pos, S_NEG)
    zero, proven = _vanishes(reading, regions, smooth)
    curl = sp.Integer(0) if zero and proven else reading.shown(_tidy(smooth))
    for h, u in reading.switches:
        jump_pos, jump_neg = (f.subs(h, 1) - f.subs(h, 0) for f in (f_pos, f_neg))
        line = _tidy(jump_neg * sp.diff(u, S_POS) - jump_pos * sp.diff(u, S_NEG))
        none, sure = _vanishes_on(reading, h, u, line)
        zero, proven = zero and none, proven and sure
        if not (none and sure):
            curl += sp.DiracDelta(u) * reading.shown(line)
    return zero, proven, curl


def _coupling(reading: Reading, regions: Regions) -> dict[str, sp.Expr]:
    """∂(T·P⁺)/∂R and ∂(T·P⁻)/∂R, the one that is not zero, by the name of R."""
    found = {}
    for name, symbol in RELATIVE.items():
        for component in _field(reading):
            moved = sp.diff(component, symbol)
            if not _vanishes(reading, regions, moved)[0]:
                found[name] = reading.shown(_tidy(moved))
    return found


def _tidy(expression: sp.Expr) -> sp.Expr:
    """A form to show: what stands in functions stays as its author wrote it."""
    if expression.count_ops() > _SHOWN:
        return expression
    functions = {function: sp.Dummy() for function in expression.atoms(sigmoid, softplus, sp.exp, sp.log)}
    bare = expression.subs(functions)
    shown = min((bare, sp.factor(bare), sp.simplify(bare)), key=sp.count_ops)
    return shown.subs({dummy: function for function, dummy in functions.items()})


# ------------------------------------------------------------------------------------------------------ is this zero?


def _regions(reading: Reading) -> Regions:
    """Points of the square by what the switches are there: the smooth pieces that it consists of."""
    s_pos, s_neg = scattered(_POINTS, seed=0)
    states = [(torch_function(reading.shown(u), reading.values)(s_pos, s_neg) > 0).int() for _, u in reading.switches]
    found: Regions = {}
    for k, (a, b) in enumerate(zip(s_pos.tolist(), s_neg.tolist(), strict=True)):
        found.setdefault(tuple(int(state[k]) for state in states), []).append((a, b))
    return found


def _vanishes(reading: Reading, regions: Regions, expression: sp.Expr) -> tuple[bool, bool]:
    """Whether it is zero in every smooth piece of the square, and whether that is proven.

    One point where it is not, in 40 digits, proves that it is not. That it is has to come from algebra.
    """
    if expression == 0:
        return True, True
    proven = True
    for state, points in regions.items():
        piece = expression.subs({h: on for (h, _), on in zip(reading.switches, state, strict=True)})
        if not _zero_at(reading.bound(piece), points[:5]):
            return False, True
        proven = proven and (_is_zero(piece) or _is_zero(reading.bound(piece)))
    return True, proven


def _zero_at(expression: sp.Expr, points: list[tuple[float, float]], relative: float = 0.375) -> bool:
    """Whether an expression is zero at points of (s⁺, s⁻), and for some values of R, to 30 of 40 digits."""
    for at in points:
        values = {S_POS: sp.Float(repr(at[0]), _DIGITS), S_NEG: sp.Float(repr(at[1]), _DIGITS)}
        values |= {symbol: sp.Float(relative * (k + 1), _DIGITS) for k, symbol in enumerate(RELATIVE.values())}
        if abs(sp.N(expression.subs(values), _DIGITS)) > mpmath.mpf(10) ** (10 - _DIGITS):
            return False
    return True


def _is_zero(expression: sp.Expr) -> bool:
    """By algebra: as a rational function of its exponentials, of one σ for each argument up to its sign."""
    rewritten = expression.replace(sigmoid, _sigmoid_of_one_sign)
    numerator = sp.numer(sp.together(sp.expand(rewritten, power_exp=True)))
    if sp.expand(sp.expand(numerator, power_exp=True)) == 0:
        return True
    return bool(expression.count_ops() <= _SIMPLE and sp.simplify(rewritten.replace(sigmoid, _as_exp)) == 0)


def _sigmoid_of_one_sign(z: sp.Expr) -> sp.Expr:
    z = sp.expand(z)
    return 1 - sigmoid(-z) if z.could_extract_minus_sign() else sigmoid(z)


def _as_exp(z: sp.Expr) -> sp.Expr:
    return 1 / (1 + sp.exp(-z))


def _vanishes_on(reading: Reading, h: sp.Symbol, u: sp.Expr, expression: sp.Expr) -> tuple[bool, bool]:
    """Whether it is zero along the line u = 0 inside the square, and whether that is proven."""
    if expression == 0:
        return True, True
    line = list(_on_line(torch_function(reading.shown(u), reading.values)))
    if not line:
        return True, True  # the line passes the square by
    others = [(other, reading.bound(reading.shown(each))) for other, each in reading.switches if other != h]
    pieces = []
    for a, b in line[:: max(1, len(line) // 5)]:
        at = {S_POS: a, S_NEG: b}
        state = {other: int(bool(each.subs(at) > 0)) for other, each in others}
        piece = reading.bound(expression.subs(state))
        if abs(float(piece.subs({**at, **dict.fromkeys(RELATIVE.values(), 0.375)}))) > _ZERO:
            return False, True
        pieces.append((piece, reading.bound(u.subs(state))))
    # algebra, which may take long, only where it is wanted
    return True, all(_is_zero_on(piece, curve) for piece, curve in dict.fromkeys(pieces))


def _is_zero_on(expression: sp.Expr, u: sp.Expr) -> bool:
    """By algebra, along u = 0."""
    solutions = sp.solve(u, S_NEG if u.has(S_NEG) else S_POS, dict=True)
    return any(_is_zero(expression.subs(solution)) for solution in solutions)


def _on_line(u: Callable[[Tensor, Tensor], Tensor]) -> Iterator[tuple[float, float]]:
    """Points with u(s⁺, s⁻) = 0 inside the square, by bisection along lines in both directions."""
    at = torch.linspace(-REACH, REACH, 48, dtype=torch.float64, device="cpu")
    for swap in (False, True):

        def along(fixed: Tensor, moving: Tensor, swap: bool = swap) -> Tensor:
            return u(moving, fixed) if swap else u(fixed, moving)

        fixed, low = (each.reshape(-1) for each in torch.meshgrid(at[1:-1], at[:-1], indexing="ij"))
        high = low + (at[1] - at[0])
        crossed = (along(fixed, low) > 0) != (along(fixed, high) > 0)
        fixed, low, high = fixed[crossed], low[crossed], high[crossed]
        for _ in range(60):
            middle = (low + high) / 2
            left = (along(fixed, middle) > 0) == (along(fixed, low) > 0)
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        for f, m in zip(fixed.tolist(), high.tolist(), strict=True):
            yield (m, f) if swap else (f, m)


# ------------------------------------------------------------------------------------------------------ the potential


def _potential(reading: Reading | None, field: Field) -> Potential:
    """The loss in closed form where one is found and its gradient is the field; else by integrating along a line."""
    for find in (_of_polynomials, _of_one_argument, _of_two_halves):
        expression = find(reading) if reading is not None else None
        if expression is None or reading is None:
            continue
        try:
            closed = torch_function(expression, reading.values)
        except CannotRead:
            continue
        if _is_gradient(closed, field):
            return Potential(expression, closed)

    def integrated(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        s_pos, s_neg = torch.broadcast_tensors(s_pos, s_neg)
        end = torch.stack([s_pos.double().reshape(-1), s_neg.double().reshape(-1)], 1)
        return work(field, torch.zeros_like(end), end).view(s_pos.shape).to(s_pos.dtype)

    return Potential(None, integrated)


def _is_gradient(loss: Callable[[Tensor, Tensor], Tensor], field: Field) -> bool:
    points = scattered(200, seed=1)
    pairs = zip(gradient_of(loss)(*points), field(*points), strict=True)
    return all(bool(torch.allclose(found, true, rtol=1e-9, atol=1e-9)) for found, true in pairs)


def _of_polynomials(reading: Reading) -> sp.Expr | None:
    """l = ∫ F⁻ ds⁻ + ∫ F⁺(s⁺, 0) ds⁺."""
    f_pos, f_neg = map(sp.expand, _field(reading))
    if not (f_pos.is_polynomial(S_POS, S_NEG) and f_neg.is_polynomial(S_POS, S_NEG)) or reading.switches:
        return None
    found = sp.integrate(f_neg, S_NEG) + sp.integrate(f_pos.subs(S_NEG, 0), S_POS)
    return min(found, sp.factor(found), key=sp.count_ops) if found.count_ops() <= _SIMPLE else found


def _of_one_argument(reading: Reading) -> sp.Expr | None:
    """l = ∫ w du, where the field is w(u) ∇u for the argument u of one of its functions or switches."""
    fields = _field(reading)
    arguments = {function.args[0] for f in fields for function in f.atoms(sp.Function)}
    z = sp.Dummy("z", real=True)
    for u in [u for _, u in reading.switches] + sorted(arguments, key=sp.default_sort_key):
        slopes = sp.diff(u, S_POS), sp.diff(u, S_NEG)
        if 0 in slopes:
            continue
        of_z = [f.subs(u, z) / slope for f, slope in zip(fields, slopes, strict=True)]
        if not slopes[1].has(S_NEG):  # u is linear in s⁻: put z there instead
            at = S_NEG + (z - u) / slopes[1]
            of_z = [w.subs(S_NEG, at) for w in of_z]
        w, other = map(sp.simplify, of_z)
        if not w.has(S_POS, S_NEG) and sp.simplify(w - other) == 0:
            return _integrated(reading, w, z, u)
    return None


def _integrated(reading: Reading, w: sp.Expr, z: sp.Dummy, u: sp.Expr) -> sp.Expr | None:
    """∫ w(z) dz at z = u; where w switches at 0 itself, each side from 0."""
    sides = {1: w, 0: w}
    switch = next((h for h, line in reading.switches if line == u and w.has(h)), None)
    if switch is not None:
        sides = {on: w.subs(switch, on) for on in (0, 1)}
    if any(side.has(h) for side in sides.values() for h, _ in reading.switches):
        return None
    found = {}
    for on, side in sides.items():
        integral = _antiderivative(side, z)
        if integral is None:
            return None
        found[on] = integral - (integral.subs(z, 0) if switch is not None else 0)
    if switch is None:
        return found[1].subs(z, u)
    return reading.shown(sp.expand(switch * found[1].subs(z, u) + (1 - switch) * found[0].subs(z, u)))


def _of_two_halves(reading: Reading) -> sp.Expr | None:
    """l = ∫ F⁺ ds⁺ + ∫ F⁻ ds⁻, where each half looks at its own similarity alone and nothing switches."""
    f_pos, f_neg = _field(reading)
    if f_pos.has(S_NEG) or f_neg.has(S_POS) or reading.switches:
        return None
    of_pos, of_neg = _antiderivative(f_pos, S_POS), _antiderivative(f_neg, S_NEG)
    return None if of_pos is None or of_neg is None else of_pos + of_neg


def _antiderivative(f: sp.Expr, z: sp.Symbol) -> sp.Expr | None:
    """∫ f dz: σ of something linear by hand, the rest by SymPy."""
    total = sp.Integer(0)
    for part in sp.Add.make_args(sp.expand(f)):
        factor, function = part.as_independent(z)
        slope = sp.diff(function.args[0], z) if isinstance(function, sigmoid) else None
        if slope is not None and not slope.has(z):
            total += factor * softplus(function.args[0]) / slope
            continue
        if sum(not each.is_polynomial(z) for each in sp.Mul.make_args(function)) > 1:
            return None  # SymPy would search for long, and mostly in vain
        integral = sp.integrate(part.replace(sigmoid, _as_exp), z)
        if integral.has(sp.Integral):
            return None
        total += integral
    return total
