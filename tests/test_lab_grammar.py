"""Terms drawn from the grammar: they are terms like any other, and the laboratory's verdicts about them agree."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lower import evaluated, inputs, lowered
from torch import Tensor

import goal
from goal.kernels.lower import lower
from goal.lab import Integrability, dissect, integrability
from goal.lab.field import CELLS, field_of, gradient_of, work
from goal.lab.grammar import ACTIVATIONS, BUILT_IN, GAPS, NUMBERS, SHAPES, Expression, Seeded, definition, pair, triplet
from goal.lab.read import read
from goal.terms import Product

pytestmark = pytest.mark.usefixtures("registries", "one_thread")


class Drawn:
    """A trial whose choices hypothesis makes; numbers lie on a grid, so that none is all but zero."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        return self.draw(st.sampled_from(choices))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        share = self.draw(st.integers(0, 20)) / 20
        return float(low * (high / low) ** share) if log else low + (high - low) * share


@st.composite
def products(draw: Any) -> tuple[Expression, Expression]:
    """T and P; every other P is one with which some T have a loss."""
    trial = Drawn(draw)
    T, P = triplet(trial), pair(trial)
    of_losses = (Expression("P", ("constant", "constant")), Expression("P", ("linear", "linear")))
    return T, draw(st.sampled_from((P, P, *of_losses)))


def product(T: Expression, P: Expression) -> Product:
    return Product(T.term(), P.term())


def weights(product: Product, s_pos: Tensor, s_neg: Tensor) -> Tensor:
    """(3, …) T, P⁺, P⁻."""
    zero = torch.zeros_like(s_pos + s_neg)
    return torch.stack([zero + each for each in product.weights(s_pos, s_neg, {})])


def square(dtype: torch.dtype, side: int = 41) -> tuple[Tensor, Tensor]:
    """s⁺ (side, 1) and s⁻ (1, side), corners and middle among them."""
    at = torch.linspace(-1, 1, side, dtype=dtype)
    return at[:, None], at[None, :]


# ── terms like any other ────────────────────────────────────────────────────────────────────────────────────────────


@given(products())
@settings(max_examples=200)
def test_drawn_terms_are_bounded_and_run_lower_and_read(drawn: tuple[Expression, Expression]) -> None:
    T, P = drawn
    made = product(T, P)
    for dtype in (torch.float32, torch.float64):
        t, p_pos, p_neg = weights(made, *square(dtype))
        assert all(each.isfinite().all() and each.abs().max() < 1e3 for each in (t, p_pos, p_neg))
        assert (t >= 0).all()
    x, y = torch.nn.functional.normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    for mining in ("hardest", "all"):
        dx, dy, _ = goal.gradients(x, y, T=made.T, P=made.P, mining=mining)
        assert dx.isfinite().all()
        assert dy.isfinite().all()
    lower(made)
    reading = read(made)
    assert {symbol.name for symbol in reading.values} == set(T.params | P.params)


@given(products())
@settings(max_examples=20)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_lowered_they_are_the_same(drawn: tuple[Expression, Expression]) -> None:
    made, (s_pos, s_neg, relative) = product(*drawn), inputs(by_row=True)
    expected = evaluated(made, s_pos.double(), s_neg.double(), relative.double())
    torch.testing.assert_close(lowered(made, s_pos, s_neg, relative).double(), expected, rtol=2e-4, atol=2e-5)


@given(products())
@settings(max_examples=200)
def test_what_is_printed_is_what_runs_under_any_name(drawn: tuple[Expression, Expression]) -> None:
    """`term`, the registered definition with these numbers, and the pasted source: the same bits."""
    at = square(torch.float32)
    for expression in drawn:
        registry = {"T": goal.T, "P": goal.P}[expression.kind]
        pasted = f"pasted-{random.Random(repr(expression)).getrandbits(60)}"
        if pasted not in registry:
            exec(expression.source(pasted), {"torch": torch, "goal": goal})
        by_name = definition(expression.kind, expression.name)(**expression.params)
        assert by_name.definition is registry[expression.name]
        found = [_values(term, *at) for term in (expression.term(), by_name, registry[pasted]())]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def _values(term: Any, s_pos: Tensor, s_neg: Tensor) -> Tensor:
    result = term(s_pos, s_neg)
    return torch.stack(
        [torch.zeros_like(s_pos + s_neg) + r for r in (result if isinstance(result, tuple) else [result])]
    )


def test_an_altered_source_is_another_term() -> None:
    """What the comparison of the last test is worth: each of these faults shows."""
    T = Expression("T", ("sigmoid", "margin"))
    at = square(torch.float32)
    for was, now in (("s_neg - s_pos", "s_neg + s_pos"), ("margin)", "-margin)"), ("tau *", "1.001 * tau *")):
        altered = T.source("altered").replace(was, now)
        assert altered != T.source("altered")
        namespace: dict[str, Any] = {"torch": torch, "goal": goal}
        exec(altered.partition("\n")[2], namespace)
        assert not torch.equal(_values(T.term(), *at), _values(namespace["altered_t"], *at))


def test_every_production_is_drawn_and_draws_are_a_function_of_the_seed() -> None:
    words: set[str] = set()
    for seed in range(300):
        T, P = triplet(Seeded(seed)), pair(Seeded(seed))
        assert (triplet(Seeded(seed)), pair(Seeded(seed))) == (T, P)
        words |= {*T.words, *P.words}
        for name, value in (T.params | P.params).items():
            assert NUMBERS[name].low <= value <= NUMBERS[name].high
    assert words == {"constant", "product", "mixture", *ACTIVATIONS, *GAPS, *SHAPES}


def test_an_optuna_trial_draws_too() -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    products = set()
    for _ in range(40):  # choices must not depend on other choices, or Optuna refuses them
        trial = study.ask()
        T, P = triplet(trial), pair(trial)
        assert trial.params.keys() >= {*T.params, *P.params}
        study.tell(trial, 0.0)
        products |= {T.words[1:]} if T.words[0] == "product" else set()
    assert any(words[:2] != words[2:] for words in products), "both atoms of a product are one choice"


@pytest.mark.parametrize(("kind", "words"), BUILT_IN)
def test_the_built_in_terms_are_in_it(kind: Any, words: tuple[str, ...]) -> None:
    expression = Expression(kind, words)
    built_in = {"T": goal.T, "P": goal.P}[kind][str(expression.built_in)]
    params = {name: value for name, value in expression.params.items() if name in built_in.defaults}
    found, expected = (_values(term, *square(torch.float64)) for term in (expression.term(), built_in(**params)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("T", "found-sigmoid"), ("T", "found-sigmoid-margin-circle"), ("T", "found-linear-linear"), ("T", "found-"),
     ("T", "found-product-sigmoid-margin"), ("P", "found-sigmoid"), ("P", "found-linear-linear-linear"),
     ("P", "found-hinge-margin")],
)  # fmt: skip
def test_names_that_are_not_of_the_grammar(kind: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}='{name}' is not of the grammar"):
        definition(kind, name)


def test_other_names_are_looked_up_as_always() -> None:
    assert definition("T", "cir") is goal.T["cir"]
    assert definition("P", "found_linear_ramp") is goal.P["found-linear-ramp"]
    with pytest.raises(ValueError, match="Did you mean 'cir'"):
        definition("T", "cirr")
    with pytest.raises(ValueError, match="has no parameter 'margin'; it has tau"):
        Expression("T", ("sigmoid", "circle"), (("margin", 0.1),)).source("mine")


# ── the laboratory about them ───────────────────────────────────────────────────────────────────────────────────────


def has_loss(T: Expression, P: Expression) -> bool:
    """Known without algebra: nothing couples s⁺ and s⁻, or T is a function of s⁻ − s⁺, or of circle loss's squares."""
    gaps = {word for word in T.words if word in GAPS}
    along_difference = gaps <= {"difference", "margin"} and P.words == ("constant", "constant")
    return not gaps or along_difference or (gaps <= {"circle"} and P.words == ("linear", "linear"))


def points(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s_pos, s_neg = 1.9 * torch.rand(2, count, generator=generator, dtype=torch.float64) - 0.95
    return s_pos, s_neg


@given(products())
def test_verdicts_in_symbols_and_in_numbers_agree(drawn: tuple[Expression, Expression]) -> None:
    check(*drawn)


@pytest.mark.full
@given(products())
@settings(max_examples=200)
def test_verdicts_of_many_products_agree(drawn: tuple[Expression, Expression]) -> None:
    check(*drawn)


def check(T: Expression, P: Expression) -> Integrability:
    found = integrability(T.term(), P.term())
    assert found.unread is None
    assert found.agree, f"in symbols {found.symbolic}, in numbers {found.numerical}"
    if has_loss(T, P):
        assert found.integrable
    if found.potential is not None:
        s_pos, s_neg = points(40)
        expected = field_of(product(T, P))(s_pos, s_neg)
        if found.potential.expression is not None:
            slopes = gradient_of(found.potential)(s_pos, s_neg)
        else:  # integrated along lines: autograd cannot tell, differences can
            step = 1e-5
            slopes = tuple(
                (found.potential(s_pos + a, s_neg + b) - found.potential(s_pos - a, s_neg - b)) / (2 * step)
                for a, b in ((step, 0.0), (0.0, step))
            )
        for slope, true in zip(slopes, expected, strict=True):
            close = (slope - true).abs() <= 1e-5 * true.abs().max() + 1e-7
            assert close.double().mean() > 0.9  # a difference may straddle a jump
            assert close.all() or found.potential.expression is None
    return found


LOSSES = [
    (("sigmoid", "difference"), ("constant", "constant")),
    (("hinge", "margin"), ("constant", "constant")),
    (("square", "margin"), ("constant", "constant")),
    (("mixture", "constant", "sigmoid", "margin"), ("constant", "constant")),
    (("sigmoid", "circle"), ("linear", "linear")),
    (("constant",), ("sigmoid", "rational")),
    (("constant",), ("exponential", "square")),
    (("constant",), ("square", "sigmoid")),
]


@pytest.mark.parametrize(("T", "P"), LOSSES)
def test_dissecting_the_potential_gives_the_terms_back_up_to_the_gauge(T: Any, P: Any) -> None:
    T, P = Expression("T", T), Expression("P", P)
    found = check(T, P)
    assert found.potential is not None
    assert found.potential.expression is not None
    back = dissect(found.potential)
    assert back.factors
    assert back.T is not None
    assert back.P is not None
    s_pos, s_neg = points(200, seed=1)
    given, returned = weights(product(T, P), s_pos, s_neg), weights(Product(back.T, back.P), s_pos, s_neg)
    inside = given[0] > 1e-3 * given[0].max()  # where T is 0 nothing is known of P
    gauge = (returned[0] / given[0])[inside].median()
    assert gauge > 0
    torch.testing.assert_close(returned[0], gauge * given[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gauge * returned[1:, inside], given[1:, inside], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("T", "P"),
    [
        (("sigmoid", "difference"), ("linear", "linear")),
        (("hinge", "tilted"), ("constant", "constant")),
        (("relu", "circle"), ("constant", "constant")),
        (("product", "hinge", "circle", "exponential", "difference"), ("ramp", "hinge")),  # several switches
    ],
)
def test_what_has_no_loss_has_none(T: Any, P: Any) -> None:
    tilted = (("tilt", 0.5),) if "tilted" in T else ()
    found = check(Expression("T", T, tilted), Expression("P", P))
    assert not found.integrable
    assert found.potential is None


def test_a_closed_form_is_printed_with_torchs_functions() -> None:
    T = Expression("T", ("mixture", "rational", "margin", "hinge", "difference"), (("tau", 1.15),))
    potential = check(T, Expression("P", ("constant", "constant"))).potential
    assert potential is not None
    assert "atan" in str(potential.expression)


@pytest.mark.parametrize("activation", ["hinge", "relu", "exponential"])
def test_a_line_that_bends_is_seen_wherever_it_cuts_an_edge(activation: str) -> None:
    assert check(Expression("T", (activation, "circle")), Expression("P", ("linear", "linear"))).integrable


@pytest.mark.parametrize("at", [0.001, 0.003, 0.4999, 0.999, 1 - 1e-6])
def test_work_sees_a_jump_however_near_an_end(at: float) -> None:
    def field(s_pos: Tensor, s_neg: Tensor) -> tuple[Tensor, Tensor]:
        return (s_pos > at).double(), torch.zeros_like(s_neg)

    start, end = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert work(field, start, end).item() == pytest.approx(1 - at, abs=1e-9)
    assert CELLS % 2 == 1


def test_the_checks_notice_a_field_that_is_not_the_potentials(monkeypatch: pytest.MonkeyPatch) -> None:
    own = field_of

    def stronger(made: Product) -> Any:
        return lambda a, b: tuple(1.001 * each for each in own(made)(a, b))

    T, P = Expression("T", ("sigmoid", "difference")), Expression("P", ("constant", "constant"))
    check(T, P)
    monkeypatch.setitem(check.__globals__, "field_of", stronger)
    with pytest.raises(AssertionError):
        check(T, P)
