"""Lowered terms against the functions they come from: every built-in product, every operation, every refusal."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of Triton, which is made for one or the other

import math
import operator
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from table import TERMS_P, TERMS_T
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.jit import JITFunction

import goal
from goal.kernels import lower as lowering
from goal.kernels.lower import MAX_PARAMS, CannotLower, lower, numbers
from goal.terms import STATISTICS, Product

# beyond float32 and outside a function's domain NumPy warns, in whose arithmetic the interpreter computes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ROWS, COLS = 32, 16
PRODUCTS = [Product(goal.T[T](**T_params), goal.P[P](**P_params)) for T, T_params in TERMS_T for P, P_params in TERMS_P]
EPS = torch.finfo(torch.float32).eps


@triton.jit
def _kernel(
    s_pos, s_neg, relative, out, p0, p1, p2, p3, p4, p5, p6, p7,
    ROWS: tl.constexpr, COLS: tl.constexpr, ANCHORS_ARE_ROWS: tl.constexpr, WEIGHTS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    anchor = row[:, None] if ANCHORS_ARE_ROWS else col[None, :]
    anchors = ROWS if ANCHORS_ARE_ROWS else COLS
    tile = row[:, None] * COLS + col[None, :]
    a, b = tl.load(s_pos + anchor), tl.load(s_neg + tile)
    r0, r1 = tl.load(relative + anchor), tl.load(relative + anchors + anchor)
    r2, r3 = tl.load(relative + 2 * anchors + anchor), tl.load(relative + 3 * anchors + anchor)
    t, p_pos, p_neg = WEIGHTS(a, b, r0, r1, r2, r3, p0, p1, p2, p3, p4, p5, p6, p7)
    loss = VALUE(a, b, r0, r1, r2, r3, p0, p1, p2, p3, p4, p5, p6, p7)
    for result in tl.static_range(4):
        each = t if result == 0 else p_pos if result == 1 else p_neg if result == 2 else loss
        tl.static_assert(each.shape[0] == ROWS and each.shape[1] == COLS and each.dtype == tl.float32)
        tl.store(out + result * ROWS * COLS + tile, each)


def lowered(product: Product, s_pos: Tensor, s_neg: Tensor, relative: Tensor) -> Tensor:
    """(4, ROWS, COLS) of T, P⁺, P⁻ and the value; s_pos and the (4, …) relative are (ROWS, 1) or (1, COLS)."""
    out = torch.full((4, ROWS, COLS), torch.nan)
    by_row = s_pos.shape[0] == ROWS
    weights, value, _ = lower(product)
    arguments = s_pos, s_neg, relative, out, *numbers(product)
    _kernel[(1,)](*arguments, ROWS=ROWS, COLS=COLS, ANCHORS_ARE_ROWS=by_row, WEIGHTS=weights, VALUE=value)
    return out


def evaluated(product: Product, s_pos: Tensor, s_neg: Tensor, relative: Tensor) -> Tensor:
    """The same from the terms themselves, in the dtype of the inputs."""
    weights = product.weights(s_pos, s_neg, dict(zip(STATISTICS, relative, strict=True)))
    found = [*weights, product.value(s_pos, s_neg)]
    return torch.stack([torch.as_tensor(each, dtype=s_neg.dtype).expand(ROWS, COLS) for each in found])


def inputs(by_row: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """s_pos, s_neg in [−1, 1] and statistics in [0, 1], a few of them 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, 1) if by_row else (1, COLS)
    s_pos, s_neg = (2 * torch.rand(size, generator=generator) - 1 for size in (shape, (ROWS, COLS)))
    relative = torch.rand(4, *shape, generator=generator)
    return s_pos, s_neg, relative * (relative > 0.1)


@pytest.mark.parametrize("by_row", [True, False], ids=["[:, None]", "[None, :]"])
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: f"{product.T}{product.P}")
def test_built_in_terms(product: Product, by_row: bool) -> None:
    given = inputs(by_row)
    came, truth = lowered(product, *given), evaluated(product, *(each.double() for each in given))
    for one, true in zip(came.double(), truth, strict=True):
        assert (one - true).abs().max() <= 8 * EPS * true.abs().max()


# ── operation by operation ──────────────────────────────────────────────────────────────────────────────────────────

# functions of (a, b): a stands for s_pos, b for s_neg
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: 0.5 + a + b + 2,
    "torch.add": lambda a, b: torch.add(torch.add(a, 1), b, alpha=-0.5),
    ".add": lambda a, b: a.add(b).add(b, alpha=3),
    "-": lambda a, b: 0.5 - (a - b),
    "torch.sub": lambda a, b: torch.sub(a, b, alpha=2.5),
    ".subtract": lambda a, b: a.subtract(b),
    "*": lambda a, b: 3 * a * b,
    "torch.mul": lambda a, b: torch.mul(a, b),
    ".multiply": lambda a, b: a.multiply(0.25),
    "/": lambda a, b: 2 / (a / b) / 3,
    "torch.div": lambda a, b: torch.div(a, b),
    ".true_divide": lambda a, b: a.true_divide(b),
    "neg": lambda a, b: (-a) * torch.neg(b) + b.neg(),
    "pos": lambda a, b: +a,
    **{f"** {n}": lambda a, b, n=n: b**n for n in (0, 1, 2, 3, 4, 5, 7, 16, -1, -2, -3, 0.5, -0.5, 2.5, -1.5, 20, 33)},
    "torch.pow": lambda a, b: torch.pow(b, 3) + b.pow(exponent=2),
    "run-time **": lambda a, b: a**b,
    "run-time torch.pow": lambda a, b: torch.pow(a, b),
    "number **": lambda a, b: 2.5**b + 2**a,
    "negative number **": lambda a, b: torch.pow(-2.0, b),
    "square": lambda a, b: torch.square(a) * b.square(),
    "sqrt": lambda a, b: torch.sqrt(a) + b.sqrt(),
    "rsqrt": lambda a, b: torch.rsqrt(a) + b.rsqrt(),
    "reciprocal": lambda a, b: torch.reciprocal(a) * b.reciprocal(),
    "exp": lambda a, b: torch.exp(a) * b.exp(),
    "log": lambda a, b: torch.log(a) + b.log(),
    "abs": lambda a, b: torch.abs(a) + b.abs() + abs(b),
    "operator.abs": lambda a, b: operator.abs(b),
    "sigmoid": lambda a, b: torch.sigmoid(a) + b.sigmoid(),
    "F.sigmoid": lambda a, b: F.sigmoid(b),
    "tanh": lambda a, b: torch.tanh(a) + b.tanh(),
    "softplus": lambda a, b: F.softplus(b),
    "softplus beta": lambda a, b: F.softplus(b, beta=2.5),
    "softplus threshold": lambda a, b: F.softplus(b, 2, 1.0),
    "softplus, large threshold": lambda a, b: F.softplus(b, threshold=30),
    "logsigmoid": lambda a, b: F.logsigmoid(b),
    "relu": lambda a, b: torch.relu(a) + b.relu() + F.relu(b),
    "clamp": lambda a, b: torch.clamp(b, -0.5, 0.5),
    ".clamp": lambda a, b: b.clamp(min=-0.3) + b.clamp(max=2) + b.clamp(None, 1.5),
    "clamp by a tensor": lambda a, b: torch.clamp(b, min=a) + b.clip(max=a),
    "clamp with crossed bounds": lambda a, b: torch.clamp(b, 0.5, -0.5),
    "clamp_min": lambda a, b: torch.clamp_min(b, 0.25) + b.clamp_min(0.5),
    "clamp_max": lambda a, b: torch.clamp_max(b, 0.25) + b.clamp_max(max=0.5),
    "minimum": lambda a, b: torch.minimum(a, b) + b.minimum(a),
    "maximum": lambda a, b: torch.maximum(a, b) + b.maximum(a),
    "where": lambda a, b: torch.where(a > b, a, b) + torch.where(b > 0, 1.0, 0.25) + torch.where(a > 0, b, 0),
    ".where": lambda a, b: a.where(b < 0.25, b),
    "where of truths": lambda a, b: ~torch.where(a > 0, b > 0, b < 0),
    "gt": lambda a, b: (a > b) + 2.0 * a.gt(b) + 4.0 * torch.gt(b, 0.5) + 8.0 * (b < 0.5),
    "ge": lambda a, b: (a >= b) + 2.0 * a.ge(b) + 4.0 * torch.ge(b, 0.5) + 8.0 * (b <= 0.5),
    "lt": lambda a, b: (a < b) + 2.0 * a.lt(b) + 4.0 * torch.lt(b, 0.5) + 8.0 * (b > 0.5),
    "le": lambda a, b: (a <= b) + 2.0 * a.le(b) + 4.0 * torch.le(b, 0.5) + 8.0 * (b >= 0.5),
    "eq": lambda a, b: (a == b) + 2.0 * a.eq(b) + 4.0 * torch.eq(b, 0.5),
    "ne": lambda a, b: (a != b) + 2.0 * a.ne(b) + 4.0 * torch.ne(b, 0.5),
    "&": lambda a, b: ((a > 0) & (b > 0)) + 2.0 * torch.logical_and(a > 0, b < 0) + 4.0 * (a > 0).logical_and(b != b),
    "|": lambda a, b: ((a > 0) | (b > 0)) + 2.0 * torch.logical_or(a > 0, b < 0) + 4.0 * (a > 0).logical_or(b != b),
    "~": lambda a, b: (~(b > 0)) + 2.0 * torch.logical_not(a > b) + 4.0 * (a > 0).logical_not(),
    "truth * truth": lambda a, b: (a > 0) * (b > 0),
    "truth + truth": lambda a, b: ((a > 0) + (b > 0)).float(),
    "truth in arithmetic": lambda a, b: torch.exp((a > b) * 0.5) - (b > 0) * b / 3 + (1 - (a > 0).float()),
    "comparison of truths": lambda a, b: (a > 0) != (b > 0),
    "ones_like": lambda a, b: torch.ones_like(b) + torch.ones_like(a, dtype=torch.float64),
    "zeros_like": lambda a, b: torch.zeros_like(b) - torch.ones_like(a > 0) * 1.0,
    "full_like": lambda a, b: torch.full_like(b, 0.3) + torch.full_like(a, fill_value=2),
    "to": lambda a, b: (a > b).to(b.dtype) + (a > 0).to(torch.float64) * b.to(dtype=torch.float32) + (b > 1).to(a),
    "to bool": lambda a, b: ~a.to(torch.bool) | ~b.bool(),
    "float": lambda a, b: (a > b).float() + a.float(),
    "double": lambda a, b: (a > b).double() * b.double(),
    "type_as": lambda a, b: (a > b).type_as(a),
    "detach": lambda a, b: a.detach() + torch.clone(b).clone(),
    "infinity": lambda a, b: torch.where(b > 0, float("inf"), -float("inf")) + torch.where(a > 0, 0.0, float("nan")),
    "beyond float32": lambda a, b: (b > 0) * 1e-40 + torch.where(a > 0, 1e-42, b * 1e300),
    "a constant": lambda a, b: 3,
    "a statement": lambda a, b: a if b is None else b,
}
VALUES = [torch.nan, 0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 20.0, -20.0, 100.0, -100.0, 0.3, -0.7]


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str) -> None:
    function = OPERATIONS[name]
    goal.T.register("case")(lambda s_pos, s_neg: function(s_pos, s_neg))
    random = torch.randn(ROWS - len(VALUES), generator=torch.Generator().manual_seed(0))
    s_pos, s_neg = torch.cat([torch.tensor(VALUES), random])[:, None], torch.tensor(VALUES).expand(ROWS, COLS)
    given = s_pos, s_neg.contiguous(), torch.zeros(4, ROWS, 1)
    product = Product(goal.T.case(), goal.P.con())
    came, meant = lowered(product, *given)[0], evaluated(product, *given)[0]
    rtol = 1e-5 if "pow" in name or "**" in name else 2e-6  # an exponential magnifies the rounding of its argument
    torch.testing.assert_close(came, meant, rtol=rtol, atol=2e-7, equal_nan=True)


def test_every_operation_has_a_case() -> None:
    """What the table knows beyond these are other spellings."""
    spelled = {name.strip(".").removeprefix("torch.").removeprefix("F.").split()[0] for name in OPERATIONS}
    signs = {"+": "add", "-": "sub", "*": "mul", "/": "div", "**": "pow", "&": "logical_and", "|": "logical_or"}
    spelled |= {signs.get(name, name) for name in spelled} | {"logical_not", "clone", "positive", "bool"}
    assert {names.split()[0].removeprefix("Tensor.") for names in lowering._TABLE} <= spelled


@pytest.mark.parametrize("name", ["minimum", "maximum", "clamp", "clamp_min", "clamp_max", "relu", "softplus", "tanh"])
def test_nan_is_seen(name: str) -> None:
    """That the comparison above, which takes NaN for equal, had some to compare."""
    values = torch.tensor(VALUES)
    assert OPERATIONS[name](values, values)[0].isnan()


# ── terms of users ──────────────────────────────────────────────────────────────────────────────────────────────────


def _register(T: Callable[..., Any], P: Callable[..., Any] | None = None, **options: Any) -> Product:
    goal.T.register("mine", **options)(T)
    if P is not None:
        goal.P.register("ours")(P)
    return Product(goal.T.mine(), goal.P.con() if P is None else goal.P.ours())


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("by_row", [True, False])
def test_a_term_with_everything(by_row: bool) -> None:
    @goal.T.register("mine", statistics=("r_neg_exp", "r_pos_lin"))
    def mine(s_pos, s_neg, *, tau=10.0, margin=None, hard=False, beta=3.0, r_pos_lin, r_neg_exp):  # type: ignore[no-untyped-def]
        shift = 0.0 if margin is None else margin
        scaled = tau**2 / 50 * (s_neg - s_pos + shift) * (1 + r_neg_exp)
        return (scaled > 0) * beta if hard else F.softplus(scaled, beta=tau / 3) - r_pos_lin

    @goal.P.register("ours", statistics=("r_neg_lin",))
    def ours(s_pos, s_neg, *, lam=0.5, tau=2.0, r_neg_lin):  # type: ignore[no-untyped-def]
        return lam, torch.sigmoid(tau * (s_neg - lam)) + r_neg_lin

    for params in ({}, {"margin": 0.3}, {"hard": True}, {"margin": 0.1, "hard": True, "beta": 0.7}):
        product = Product(goal.T.mine(**params), goal.P.ours(lam=0.25))
        given = inputs(by_row, seed=1)
        came, truth = lowered(product, *given).double(), evaluated(product, *(each.double() for each in given))
        assert ((came - truth).abs().amax((1, 2)) <= 8 * EPS * truth.abs().amax((1, 2))).all(), params


@pytest.mark.usefixtures("registries")
def test_pair_weights_are_saturated_and_nothing_else() -> None:
    def huge(s_pos, s_neg):  # type: ignore[no-untyped-def]
        return s_neg * 1e30

    def pair(s_pos, s_neg, *, scale=1e30):  # type: ignore[no-untyped-def]
        return scale * 2, torch.where(s_pos > 0.8, float("nan"), s_neg * scale)

    product, given = _register(huge, pair), inputs(True)
    came, meant = lowered(product, *given), evaluated(product, *given)
    torch.testing.assert_close(came, meant, rtol=1e-6, atol=0, equal_nan=True)
    assert came[0].max() > 1e29
    assert (came[1] == 2e30).all()
    assert came[2].isnan().any()
    assert came[2].nan_to_num().abs().max() < 1.9e19


@pytest.mark.usefixtures("registries")
def test_a_potential_reads_both_terms() -> None:
    def potential(s_pos, s_neg, *, lam, tau, margin):  # type: ignore[no-untyped-def]
        return None if margin is None else lam * s_neg - tau * s_pos + margin

    goal.T.register("mine", potential={"ours": potential})(lambda s_pos, s_neg, *, tau=3.0, margin=None: s_neg)
    goal.P.register("ours")(lambda s_pos, s_neg, *, lam=5.0, tau=100.0: (s_pos, s_neg))
    s_pos, s_neg, relative = inputs(True)
    with_margin = Product(goal.T.mine(margin=0.25), goal.P.ours())
    torch.testing.assert_close(lowered(with_margin, s_pos, s_neg, relative)[3], 5 * s_neg - 3 * s_pos + 0.25)
    without = Product(goal.T.mine(), goal.P.ours())
    torch.testing.assert_close(lowered(without, s_pos, s_neg, relative)[3], s_neg - s_pos)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("T", [lambda s_pos, s_neg, *, tau=2.0: tau, lambda s_pos, s_neg: True])
def test_a_number_is_spread(T: Callable[..., Any]) -> None:
    given = inputs(False)
    product = _register(T, lambda s_pos, s_neg, *, lam=0.5: (s_pos, -lam))
    torch.testing.assert_close(lowered(product, *given), evaluated(product, *given))


# ── numbers and structure ───────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_are_those_of_t_then_p() -> None:
    product = Product(goal.T.con(margin=0.25), goal.P.sig_ms(alpha=3, beta=4.0, lam=0.5, self_term=True))
    assert numbers(product) == (0.25, 3.0, 4.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    assert numbers(Product(goal.T.con(), goal.P.con())) == (0.0,) * MAX_PARAMS


def test_a_number_changes_nothing_and_the_structure_does() -> None:
    assert lower(Product(goal.T.nca(tau=5.0), goal.P.lin())) is lower(Product(goal.T.nca(tau=0.25), goal.P.lin()))
    assert lower(Product(goal.T.con(margin=0.0), goal.P.lin())) is lower(Product(goal.T.con(margin=1.0), goal.P.lin()))
    different = [goal.T.con(), goal.T.con(margin=0.0), goal.T.nca()]
    assert len({lower(Product(T, goal.P.con())).weights for T in different}) == 3
    different = [goal.P.sig_ms(), goal.P.sig_ms(self_term=True), goal.P.lin_ms()]
    assert len({lower(Product(goal.T.con(), P)).weights for P in different}) == 3


def test_different_code_has_different_keys() -> None:
    """Triton's key for what it has compiled; also the names under which several can stand in one kernel."""
    weights = {id(lower(product)): lower(product).weights for product in PRODUCTS}
    assert len(weights) == 4 * 6
    functions = [*weights.values(), *{lower(product).value for product in PRODUCTS}]
    made = [JITFunction(function.fn) for function in functions]
    assert len({function.cache_key for function in made}) == len(functions)
    assert len({f"{function.__module__}.{function.__qualname__}" for function in made}) == len(functions)


@pytest.mark.usefixtures("registries")
def test_a_name_registered_anew_is_lowered_anew() -> None:
    first = lower(_register(lambda s_pos, s_neg: s_neg))
    goal.T._definitions.pop("mine")
    assert lower(_register(lambda s_pos, s_neg: s_pos)).weights is not first.weights


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _changes_in_place(s_pos, s_neg):  # type: ignore[no-untyped-def]
    violation = s_neg - s_pos
    violation.clamp_(min=0)
    return violation


def _root_of_a_number(s_pos, s_neg, *, tau=2.0):  # type: ignore[no-untyped-def]
    return math.sqrt(tau) * s_neg


BRANCH = r"T\.mine branches on a value .* torch\.where"
TRACED = r"T\.mine cannot be traced: .*known operations: add, "
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "branch on a similarity": (lambda s_pos, s_neg: s_pos if s_neg > 0 else s_neg, BRANCH),
    "branch on a number": (lambda s_pos, s_neg, *, tau=1.0: s_neg if tau > 2 else s_pos, BRANCH),
    "max of two": (lambda s_pos, s_neg: max(s_pos, s_neg), BRANCH),
    "math": (_root_of_a_number, TRACED),
    "len": (lambda s_pos, s_neg: s_neg * len(s_neg), TRACED),
    "function": (lambda s_pos, s_neg: torch.erf(s_neg), r"T\.mine: torch\.erf cannot .* operations: add, .*dtype\."),
    "function of nn": (lambda s_pos, s_neg: F.gelu(s_neg), r"T\.mine: torch\.nn\.functional\.gelu cannot"),
    "method": (lambda s_pos, s_neg: s_neg.sum(), r"T\.mine: Tensor\.sum cannot"),
    "half precision": (lambda s_pos, s_neg: s_neg.half(), r"T\.mine: Tensor\.half cannot"),
    "operator": (lambda s_pos, s_neg: s_neg // 2, r"T\.mine: operator\.floordiv cannot"),
    "index": (lambda s_pos, s_neg: s_neg[0], r"T\.mine: operator\.getitem cannot"),
    "attribute": (lambda s_pos, s_neg: s_neg / s_neg.shape[0], r"T\.mine: Tensor\.shape cannot"),
    "in place, result unused": (_changes_in_place, r"T\.mine: Tensor\.clamp_ cannot"),
    "in place by argument": (lambda s_pos, s_neg: F.relu(s_neg, inplace=True), r"relu cannot .* in place"),
    "argument": (lambda s_pos, s_neg: torch.div(s_pos, s_neg, rounding_mode="floor"), r"torch\.div cannot .*'floor'"),
    "another argument": (lambda s_pos, s_neg: torch.exp(s_neg, out=s_pos), r"torch\.exp cannot .*'out'"),
    "integers": (lambda s_pos, s_neg: s_neg.to(torch.int64), r"T\.mine: Tensor\.to cannot .*no torch\.int64"),
    "logic of numbers": (lambda s_pos, s_neg: ~s_neg, r"T\.mine: operator\.invert cannot .*comparison"),
    "tensor of its own": (lambda s_pos, s_neg: torch.maximum(s_neg, torch.zeros(())), r"maximum cannot .*tensor\(0"),
    "nothing returned": (lambda s_pos, s_neg: None, r"T\.mine returns what a kernel cannot have: \(None,\)"),
    "a tensor returned": (lambda s_pos, s_neg: torch.ones(()), r"T\.mine returns what a kernel cannot have: tensor\(1"),
    "two returned": (lambda s_pos, s_neg: (s_pos, s_neg), r"T\.mine returns what a kernel cannot have: "),
}


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("case", REFUSED)
def test_refusal(case: str) -> None:
    T, message = REFUSED[case]
    with pytest.raises(CannotLower, match=message) as refusal:
        lower(_register(T))
    assert 'impl="torch"' in str(refusal.value)


@pytest.mark.usefixtures("registries")
def test_the_term_that_is_refused_is_named() -> None:
    product = _register(lambda s_pos, s_neg: s_neg, lambda s_pos, s_neg: (s_pos, torch.erf(s_neg)))
    with pytest.raises(CannotLower, match=r"^P\.ours: torch\.erf .* in `product = .*` \(line \d+\); known"):
        lower(product)
    goal.T.register("hers", potential={"con": lambda s_pos, s_neg: s_neg.erf()})(lambda s_pos, s_neg: s_neg)
    with pytest.raises(CannotLower, match=r"^the potential of T\.hers × P\.con: Tensor\.erf "):
        lower(Product(goal.T.hers(), goal.P.con()))


@pytest.mark.usefixtures("registries")
def test_one_pair_weight_is_not_two() -> None:
    with pytest.raises(CannotLower, match=r"P\.ours"):
        lower(_register(lambda s_pos, s_neg: s_neg, lambda s_pos, s_neg: s_pos))


@pytest.mark.usefixtures("registries")
def test_too_many_numbers() -> None:
    product = _register(
        lambda s_pos, s_neg, *, a=1.0, b=2.0, c=3.0, d=4.0, e=None: a * b * c * d * s_neg,
        lambda s_pos, s_neg, *, a=5.0, b=6.0, c=7.0, d=8.0, on=True: (a * b * s_pos, c * d * s_neg),
    )
    assert numbers(product) == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    one_more = Product(goal.T.mine(e=9.0), product.P)
    for function in (lower, numbers):
        with pytest.raises(CannotLower, match=r"T\.mine and P\.ours have 9 numbers .* takes 8"):
            function(one_more)


# ── compiled for an accelerator that need not be there ──────────────────────────────────────────────────────────────

COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import goal
from goal.kernels.lower import lower
from goal.terms import Product
from test_lower import OPERATIONS


@triton.jit
def kernel(s, out, p0, p1, p2, p3, p4, p5, p6, p7, WEIGHTS: tl.constexpr, VALUE: tl.constexpr, OTHER: tl.constexpr):
    a, b = tl.arange(0, 32)[:, None], tl.arange(0, 16)[None, :]
    at = a * 16 + b
    s_pos, s_neg, r = tl.load(s + a), tl.load(s + at), tl.load(s + 64 + a)
    t, p_pos, p_neg = WEIGHTS(s_pos, s_neg, r, r, r, r, p0, p1, p2, p3, p4, p5, p6, p7)
    loss = VALUE(s_pos, s_neg, r, r, r, r, p0, p1, p2, p3, p4, p5, p6, p7)
    tl.store(out + at, t * p_pos + t * p_neg + loss)
    tl.store(out + 512 + at, OTHER(s_pos, s_neg, r, r, r, r, p0, p1, p2, p3, p4, p5, p6, p7))


numbers = {f"p{slot}": "fp32" for slot in range(8)}
signature = {"s": "*fp32", "out": "*fp32", **numbers, **dict.fromkeys(("WEIGHTS", "VALUE", "OTHER"), "constexpr")}
other = lower(Product(goal.T.con(margin=0.2), goal.P.con())).value


def compiled(T, P):
    weights, value, _ = lower(Product(T, P))
    source = ASTSource(kernel, signature, {"WEIGHTS": weights, "VALUE": value, "OTHER": other}, {})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
    assert made.asm["cubin"]
    return source.hash(), made.asm["ttir"], made.asm["ptx"]


one, first, _ = compiled(goal.T.nca(), goal.P.con())
two, second, ptx = compiled(goal.T.con(), goal.P.sig_ms())
assert one != two
assert "math.log" in first and "arith.maximumf" in first, "softplus and hinge, both called value"
assert "math.log" not in second and "arith.maximumf" in second
assert "min.NaN.xorsign.abs" in ptx, "saturation is one instruction"

goal.T.register("all")(lambda s_pos, s_neg: sum(1.0 * function(s_pos, s_neg) for function in OPERATIONS.values()))
compiled(goal.T.all(), goal.P.con())
"""


def test_compiles_for_sm_90(tmp_path: Path) -> None:
    """Every operation; passed as constexpr and called; several in one kernel; another term, another kernel."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILE)
    path = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
