"""Bad arguments: the type of the error, and that it names the argument, what came and what is allowed."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import goal

X, Y = torch.eye(4, 6), torch.eye(4, 6)
S = torch.eye(4, 5)


def everywhere(**bad: Any) -> list[Callable[[], Any]]:
    """All the calls that take the argument."""
    return [
        lambda: goal.apply(X, Y, **bad),
        lambda: goal.gradients(X, Y, **bad),
        lambda: goal.Objective(**bad),
        *([] if "similarity" in bad else [lambda: goal.apply_similarity(S, **bad)]),
        lambda: goal.recipe("goal", **bad),
        *([] if "reduction" in bad else [lambda: goal.explain(X, Y, **bad)]),
    ]


def refused(error: type[Exception], *parts: str, by: Callable[[], Any]) -> None:
    """The call raises this error, and its message has all these parts."""
    with pytest.raises(error) as raised:
        by()
    for part in parts:
        assert part in str(raised.value), f"{part!r} is not in: {raised.value}"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("size", lambda value: goal.Bank(value, 4)),
        ("dim", lambda value: goal.Bank(4, value)),
        ("chunk", goal.Cache),
        ("ranks", lambda value: goal.explain(X, Y, ranks=value)),
    ],
)
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_whole_numbers(name: str, call: Callable[[Any], Any], value: Any, error: type[Exception]) -> None:
    refused(error, f"{name} must be a whole number >= 1, got {value!r}", by=lambda: call(value))


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────

UNKNOWN = [
    ("T", "circ", "'cir'", ["con", "nca", "cir"]),
    ("T", "CON", None, ["con", "nca", "cir"]),
    ("P", "sigms", "'sig-ms'", ["con", "lin", "sig", "lin-ms", "sig-ms"]),
    ("P", "lin_mss", "'lin-ms'", ["con", "lin", "sig", "lin-ms", "sig-ms"]),
    ("P", "zzz", None, ["con", "lin", "sig", "lin-ms", "sig-ms"]),
    ("mining", "hard", None, ["hardest", "semi-hard", "all", "selective"]),
    ("mining", "semihard", "'semi-hard'", ["hardest", "semi-hard", "all", "selective"]),
    ("reduction", "average", None, ["mean", "sum"]),
    ("reduction", "meen", "'mean'", ["mean", "sum"]),
    ("similarity", "cos", None, ["dot", "cosine", "order"]),
    ("similarity", "cosin", "'cosine'", ["dot", "cosine", "order"]),
    ("similarity", "given", None, ["dot", "cosine", "order"]),
    ("impl", "tritn", "'triton'", ["auto", "torch", "triton"]),
]


@pytest.mark.parametrize(("argument", "came", "nearest", "known"), UNKNOWN)
def test_an_unknown_name_lists_the_known_ones(argument: str, came: str, nearest: str | None, known: list[str]) -> None:
    for call in everywhere(**{argument: came}):
        suggestion = [f"Did you mean {nearest}?"] if nearest else []
        refused(ValueError, argument, repr(came), *known, *suggestion, by=call)


def test_a_far_off_name_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match="P='zzz'") as raised:
        goal.apply(X, Y, P="zzz")
    assert "mean" not in str(raised.value)


def test_hyphens_and_underscores_are_the_same() -> None:
    for one, other in (("sig-ms", "sig_ms"), ("lin-ms", "lin_ms")):
        assert torch.equal(goal.gradients(X, Y, P=one)[0], goal.gradients(X, Y, P=other)[0])
    assert goal.P["sig_ms"] is goal.P["sig-ms"] is goal.P.sig_ms
    assert "sig_ms" in goal.P
    assert "sig-ms" in goal.P
    assert torch.equal(
        goal.gradients(X, Y, mining="semi_hard")[0],
        goal.gradients(X, Y, mining="semi-hard")[0],
    )
    assert all("_" not in name for registry in (goal.T, goal.P) for name in registry)


@pytest.mark.parametrize(
    ("argument", "came"),
    [("T", 3), ("T", None), ("T", 1.5), ("P", ["sig"]), ("P", torch.ones(1)), ("mining", 2), ("mining", None)],
)
def test_a_wrong_type_where_a_name_belongs(argument: str, came: Any) -> None:
    for call in everywhere(**{argument: came}):
        refused(TypeError, argument, by=call)


def test_a_triplet_weight_is_no_pair_weight() -> None:
    refused(TypeError, "P=", "T.cir", "pair weight", by=lambda: goal.apply(X, Y, P=goal.T.cir()))
    refused(TypeError, "T=", "P.sig", "triplet weight", by=lambda: goal.apply(X, Y, T=goal.P.sig()))


def test_a_term_may_be_given_unbound() -> None:
    assert torch.equal(goal.gradients(X, Y, T=goal.T.nca, P=goal.P.con)[0], goal.gradients(X, Y, "nca", "con")[0])


def test_an_unknown_attribute_names_the_nearest() -> None:
    refused(AttributeError, "sig-ms", by=lambda: goal.P.sigms)
    assert not hasattr(goal.T, "__wrapped__")
    assert {"cir", "con", "nca"} <= set(dir(goal.T))
    assert {"sig_ms", "lin_ms"} <= set(dir(goal.P))


@pytest.mark.parametrize("came", ["vse+", "VSE++", "", 3, None])
def test_an_unknown_recipe(came: Any) -> None:
    refused(ValueError, "name", repr(came), "vse++", "multi-similarity", by=lambda: goal.recipe(came))


def test_impl_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(ValueError, "impl", "triton", "torch", by=lambda: goal.apply(X, Y, impl="triton"))


@pytest.mark.parametrize("recipe", goal.recipes())
def test_an_unknown_override(recipe: str) -> None:
    with pytest.raises(TypeError, match="taus"):
        goal.recipe(recipe, taus=3)


# ── parameters ──────────────────────────────────────────────────────────────────────────────────────────

TENSOR = torch.tensor(0.3, requires_grad=True)
OUT_OF_RANGE: list[tuple[Callable[..., Any], str, Any, type[Exception], str]] = [
    (goal.T.con, "margin", -0.2, ValueError, ">= 0"),
    (goal.T.con, "margin", float("nan"), ValueError, "finite"),
    (goal.T.con, "margin", "0.2", TypeError, "number"),
    (goal.T.con, "margin", True, TypeError, "number"),
    (goal.T.nca, "tau", 0, ValueError, "> 0"),
    (goal.T.nca, "tau", -1.0, ValueError, "> 0"),
    (goal.T.cir, "tau", 0.0, ValueError, "> 0"),
    (goal.T.cir, "tau", float("inf"), ValueError, "finite"),
    (goal.T.cir, "tau", None, TypeError, "number"),
    (goal.T.cir, "tau", [5.0], TypeError, "number"),
    (goal.T.cir, "tau", torch.tensor([1.0, 2.0]), TypeError, "number"),
    (goal.T.cir, "tau", TENSOR, ValueError, "requires grad"),
    (goal.T.cir, "tau", torch.nn.Parameter(torch.tensor(10.0)), ValueError, "requires grad"),
    (goal.P.sig, "alpha", 0.0, ValueError, "> 0"),
    (goal.P.sig, "beta", -3.0, ValueError, "> 0"),
    (goal.P.sig, "lam", float("-inf"), ValueError, "finite"),
    (goal.P.sig_ms, "alpha", -2.0, ValueError, "> 0"),
    (goal.P.sig_ms, "beta", 0, ValueError, "> 0"),
    (goal.P.sig_ms, "lam", TENSOR, ValueError, "requires grad"),
    (goal.P.sig_ms, "self_term", 1, TypeError, "True or False"),
    (goal.P.sig_ms, "self_term", "yes", TypeError, "True or False"),
    (goal.mining.semi_hard, "margin", 0.0, ValueError, "> 0"),
    (goal.mining.semi_hard, "margin", -0.1, ValueError, ">= 0"),
    (goal.mining.semi_hard, "margin", "wide", TypeError, "number"),
    (goal.mining.selective, "eps", -0.01, ValueError, ">= 0"),
    (goal.mining.selective, "eps", None, TypeError, "number"),
    (goal.mining.all_negatives, "average", 1, TypeError, "True or False"),
    (goal.mining.all_negatives, "average", "no", TypeError, "True or False"),
]


@pytest.mark.parametrize(("make", "parameter", "came", "error", "allowed"), OUT_OF_RANGE)
def test_a_parameter_out_of_range(
    make: Callable[..., Any], parameter: str, came: Any, error: type[Exception], allowed: str
) -> None:
    with pytest.raises(error) as raised:
        make(**{parameter: came})
    message = str(raised.value)
    assert "goal." in message  # whose parameter it is
    assert parameter in message
    assert allowed in message
    if isinstance(came, float | int | str) and not isinstance(came, bool):
        assert str(came) in message or repr(came) in message or str(float(came)) in message


def test_parameters_may_be_integers_and_tensors_of_one_number() -> None:
    assert goal.T.cir(tau=5) == goal.T.cir(tau=5.0) == goal.T.cir(tau=torch.tensor(5.0))
    assert goal.T.con() == goal.T.con(margin=None) != goal.T.con(margin=0.0)
    assert goal.P.sig(lam=-0.5).params == {"alpha": 2.0, "beta": 10.0, "lam": -0.5}


@pytest.mark.parametrize("make", [goal.T.con, goal.T.cir, goal.P.sig_ms, goal.P.lin, goal.P.lin_ms])
def test_an_unknown_parameter(make: Callable[..., Any]) -> None:
    refused(TypeError, "goal.", "'sigma'", by=lambda: make(sigma=1.0))
    refused(TypeError, "tau", by=lambda: goal.T.cir(sigma=1.0))


# ── embeddings ──────────────────────────────────────────────────────────────────────────────────────────

LIST: Any = [[1.0, 0.0], [0.0, 1.0]]
BAD_SHAPES: list[tuple[Any, Any, type[Exception], list[str]]] = [
    (torch.ones(4), Y, ValueError, ["x", "(N, D)", "(4,)"]),
    (X, torch.ones(2, 4, 6), ValueError, ["y", "(M, D)", "(2, 4, 6)"]),
    (torch.tensor(1.0), Y, ValueError, ["x", "(N, D)", "()"]),
    (X, torch.ones(4, 7), ValueError, ["x", "y", "D", "(4, 6)", "(4, 7)"]),
    (torch.ones(0, 6), Y, ValueError, ["x", "at least one row", "(0, 6)"]),
    (X, torch.ones(0, 6), ValueError, ["y", "at least one row", "(0, 6)"]),
    (torch.ones(4, 0), torch.ones(4, 0), ValueError, ["x", "column", "(4, 0)"]),
    (X.long(), Y, TypeError, ["x", "int64", "float32", "float64", "bfloat16", "float16"]),
    (X, Y.int(), TypeError, ["y", "int32", "float32"]),
    (X.bool(), Y, TypeError, ["x", "bool"]),
    (X.cfloat(), Y, TypeError, ["x", "complex64"]),
    (LIST, Y, TypeError, ["x", "list", "Tensor"]),
    (X, X.numpy(), TypeError, ["y", "ndarray", "Tensor"]),
    (None, Y, TypeError, ["x", "NoneType"]),
    (X, Y.to("meta"), ValueError, ["device", "cpu", "meta"]),
]


@pytest.mark.parametrize(("x", "y", "error", "parts"), BAD_SHAPES)
def test_bad_embeddings(x: Any, y: Any, error: type[Exception], parts: list[str]) -> None:
    calls: list[Callable[..., Any]] = [goal.apply, goal.gradients, goal.Objective(), goal.explain]
    for call in [*calls, goal.recipe("infonce"), goal.recipe("siglip")]:
        refused(error, *parts, by=lambda call=call: call(x, y))


@pytest.mark.parametrize(
    ("s", "error", "parts"),
    [
        (torch.ones(4), ValueError, ["S", "(N, M)", "(4,)"]),
        (torch.ones(0, 4), ValueError, ["S", "(0, 4)"]),
        (torch.ones(4, 0), ValueError, ["S", "(4, 0)"]),
        (torch.ones(4, 4, dtype=torch.int64), TypeError, ["S", "int64", "float32"]),
        ([[1.0]], TypeError, ["S", "list"]),
    ],
)
def test_a_bad_matrix(s: Any, error: type[Exception], parts: list[str]) -> None:
    refused(error, *parts, by=lambda: goal.apply_similarity(s))


# ── ids and weights ─────────────────────────────────────────────────────────────────────────────────────

FIVE = torch.eye(5, 6)
BAD_IDS: list[tuple[Tensor, dict[str, Any], type[Exception], list[str]]] = [
    (Y, {"ids": torch.arange(5)}, ValueError, ["ids", "(4,)", "(5,)", "x"]),
    (Y, {"ids": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, ["ids", "(4,)", "(4, 1)"]),
    (Y, {"ids": torch.arange(4.0)}, TypeError, ["ids", "integers", "float32"]),
    (Y, {"ids": torch.ones(4, dtype=torch.bool)}, TypeError, ["ids", "integers", "bool"]),
    (Y, {"ids": "abcd"}, TypeError, ["ids", "integers"]),
    (Y, {"ids": [1, 2, None, 4]}, TypeError, ["ids", "integers"]),
    (Y, {"y_ids": torch.arange(4)}, ValueError, ["y_ids", "ids", "both"]),
    (Y, {"ids": torch.arange(4), "y_ids": torch.arange(5)}, ValueError, ["y_ids", "(4,)", "(5,)", "y"]),
    (Y, {"ids": torch.arange(4), "y_ids": torch.arange(4.0)}, TypeError, ["y_ids", "integers", "float32"]),
    (FIVE, {"ids": torch.arange(4)}, ValueError, ["ids", "y_ids", "4", "5"]),
    (FIVE, {"ids": torch.arange(4), "y_ids": torch.arange(4)}, ValueError, ["y_ids", "(5,)", "(4,)"]),
]
BAD_WEIGHTS: list[tuple[Tensor, dict[str, Any], type[Exception], list[str]]] = [
    (Y, {"weight": torch.ones(5)}, ValueError, ["weight", "(4,)", "(5,)"]),
    (FIVE, {"weight": torch.ones(5)}, ValueError, ["weight", "(4,)", "(5,)"]),
    (Y, {"weight": torch.ones(4, 1)}, ValueError, ["weight", "(4,)", "(4, 1)"]),
    (Y, {"weight": 2.0}, ValueError, ["weight", "(4,)", "()"]),
    (Y, {"weight": torch.tensor([1.0, -0.5, 1.0, -2.0])}, ValueError, ["weight", ">= 0", "-0.5", "position 1"]),
    (Y, {"weight": [1.0, 1.0, float("nan"), 1.0]}, ValueError, ["weight", "nan", "position 2"]),
    (Y, {"weight": [1.0, 1.0, 1.0, float("inf")]}, ValueError, ["weight", "inf", "position 3"]),
    (Y, {"weight": torch.ones(4, requires_grad=True)}, ValueError, ["weight", "requires grad", "detach"]),
    (Y, {"weight": ["a", "b", "c", "d"]}, TypeError, ["weight", "numbers"]),
]


@pytest.mark.parametrize(("y", "given", "error", "parts"), BAD_IDS + BAD_WEIGHTS)
def test_bad_ids_and_weights(y: Tensor, given: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    refused(error, *parts, by=lambda: goal.apply(X, y, **given))
    refused(error, *parts, by=lambda: goal.gradients(X, y, **given))
    refused(error, *parts, by=lambda: goal.Objective()(X, y, **given))
    refused(error, *(part for part in parts if part not in "xy"), by=lambda: goal.apply_similarity(X @ y.T, **given))


def test_a_complex_weight_is_refused() -> None:
    refused(TypeError, "weight", "complex", by=lambda: goal.apply(X, Y, weight=torch.ones(4, dtype=torch.complex64)))


def test_ids_beyond_a_floats_precision_stay_apart() -> None:
    base = 2**62
    apart = goal.gradients(X, Y, ids=torch.tensor([base, base + 1, base + 2, base + 3]))[2]
    assert (apart.index >= 0).all()
    equal = goal.gradients(X, Y, ids=torch.tensor([base] * 4))[2]
    assert (equal.index == -1).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_ids_may_have_any_integer_dtype(dtype: torch.dtype) -> None:
    ids = torch.tensor([1, 1, 2, 2])
    expected = goal.gradients(X, Y, ids=ids)[0]
    assert torch.equal(goal.gradients(X, Y, ids=ids.to(dtype))[0], expected)
    assert torch.equal(goal.gradients(X, Y, ids=ids.tolist())[0], expected)


@pytest.mark.parametrize(
    ("embeddings", "labels", "error", "parts"),
    [
        (X, torch.arange(4), ValueError, ["labels", "twice"]),
        (X, torch.zeros(5, dtype=torch.int64), ValueError, ["(4,)", "(5,)"]),
        (X, torch.zeros(4), TypeError, ["integers", "float32"]),
        (X[0], torch.zeros(6, dtype=torch.int64), ValueError, ["(6,)"]),
        (X.long(), torch.zeros(4, dtype=torch.int64), TypeError, ["int64", "float32"]),
    ],
)
def test_bad_labels(embeddings: Any, labels: Any, error: type[Exception], parts: list[str]) -> None:
    refused(error, *parts, by=lambda: goal.pairs(embeddings, labels))


def test_the_errors_of_pairs_name_its_own_arguments() -> None:
    refused(ValueError, "labels", by=lambda: goal.pairs(X, torch.zeros(5, dtype=torch.int64)))
    refused(TypeError, "labels", by=lambda: goal.pairs(X, torch.zeros(4)))
    refused(ValueError, "embeddings", by=lambda: goal.pairs(X[0], torch.zeros(6, dtype=torch.int64)))


def test_bad_input_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from goal.engine import path

    monkeypatch.setattr(path, "forward", lambda *args: pytest.fail("work was done"))
    for bad in ({"T": "x"}, {"ids": torch.arange(3)}, {"weight": torch.ones(3)}, {"reduction": "none"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            goal.apply(X, Y, **bad)
    with pytest.raises(ValueError, match=r"^x "):
        goal.apply(X * torch.nan, Y)


# ── registering terms ───────────────────────────────────────────────────────────────────────────────────


def weight(s_pos: Tensor, s_neg: Tensor, *, tau: float = 2.0) -> Tensor:
    return torch.sigmoid(tau * (s_neg - s_pos))


@pytest.mark.usefixtures("registries")
class TestRegistration:
    def test_a_registered_term_is_there_by_all_its_names(self) -> None:
        returned = goal.triplet_weight("my_own-1")(weight)
        assert returned is weight
        assert "my-own-1" in list(goal.T)
        for spelling in ("my_own-1", "my-own-1", "my_own_1"):
            assert goal.T[spelling]().params == {"tau": 2.0}
        gx, gy, _ = goal.gradients(X, Y, T="my_own_1", P="con")
        expected = goal.gradients(X, Y, T=goal.T.nca(tau=2.0), P="con")
        assert torch.equal(gx, expected[0])
        assert torch.equal(gy, expected[1])
        refused(ValueError, "my-own-1", by=lambda: goal.apply(X, Y, T="unheard-of"))  # listed among the known

    def test_a_pair_weight_with_statistics(self) -> None:
        seen: list[Any] = []

        @goal.pair_weight("mine", statistics=("r_neg_exp", "r_pos_lin"))
        def mine(s_pos: Tensor, s_neg: Tensor, *, beta: float = 3.0, r_neg_exp: Tensor, r_pos_lin: Tensor) -> Any:
            seen.append((beta, tuple(r_neg_exp.shape), tuple(r_pos_lin.shape)))
            return 1 + r_pos_lin, 1 + r_neg_exp

        seen.clear()  # what registering tried it on
        goal.apply(X, Y, P=goal.P.mine(beta=4.0))
        assert seen == [(4.0, (2, 4), (2, 4))]

    def test_a_potential_is_the_value(self) -> None:
        def loss(s_pos: Tensor, s_neg: Tensor, *, tau: float, gain: float) -> Tensor:
            return gain * tau * (s_neg - s_pos)

        @goal.pair_weight("scaled", potential={"nca": loss})
        def scaled(s_pos: Tensor, s_neg: Tensor, *, gain: float = 3.0) -> Any:
            return gain, gain

        x = torch.eye(2)
        assert goal.apply(x, x, T=goal.T.nca(tau=2.0), P="scaled", reduction="sum").item() == 4 * 3.0 * 2.0 * -1.0
        assert goal.apply(x, x, T="con", P="scaled", reduction="sum").item() == 4 * -1.0  # the mean violation

    @pytest.mark.parametrize("register", [goal.triplet_weight, goal.pair_weight])
    @pytest.mark.parametrize("name", ["con", "mine", "mi-ne", "mi_ne"])
    def test_a_duplicate_name(self, register: Callable[..., Any], name: str) -> None:
        def weight(s_pos: Tensor, s_neg: Tensor) -> Any:
            return 1.0 if register is goal.triplet_weight else (1.0, 1.0)

        if name != "con":
            register(name.replace("-", "_"))(weight)
        refused(ValueError, f"'{name.replace('_', '-')}'", "already", by=lambda: register(name)(weight))

    @pytest.mark.parametrize("name", ["", "-", "a b", "a/b", 3, None])
    def test_a_malformed_name(self, name: Any) -> None:
        refused(ValueError, "name", repr(name), by=lambda: goal.triplet_weight(name))

    @pytest.mark.parametrize(
        "function",
        [
            lambda: 1,
            lambda s_pos: 1,
            lambda a, b: 1,
            lambda s_neg, s_pos: 1,
            lambda s_pos, s_neg, tau=1.0: 1,
            lambda s_pos, s_neg, *rest: 1,
            lambda s_pos, s_neg, **rest: 1,
            lambda s_pos, s_neg, *, tau: 1,
        ],
        ids=["none", "one", "names", "order", "positional", "args", "kwargs", "no default"],
    )
    def test_a_bad_signature(self, function: Any) -> None:
        before = list(goal.T)
        refused(TypeError, "<lambda>", by=lambda: goal.triplet_weight("mine")(function))
        assert list(goal.T) == before

    @pytest.mark.parametrize(
        ("register", "function", "parts"),
        [
            (goal.triplet_weight, lambda s_pos, s_neg: s_neg - s_pos, ["T = -0.05 at s⁺ = -0.95, s⁻ = -1", ">= 0"]),
            (goal.triplet_weight, lambda s_pos, s_neg: -1, ["T = -1 at s⁺ = -1, s⁻ = -1"]),
            (goal.triplet_weight, lambda s_pos, s_neg: 1 / s_neg.abs(), ["finite", "T = inf at s⁺ = -1, s⁻ = 0"]),
            (goal.triplet_weight, lambda s_pos, s_neg: torch.log(s_pos + 0.5), ["finite", "T = nan at s⁺ = -1"]),
            (goal.triplet_weight, lambda s_pos, s_neg: s_neg.sum(-1), ["elementwise", "(41, 41)"]),
            (goal.triplet_weight, lambda s_pos, s_neg: (s_neg + 1) / (s_neg + 1).max(), ["elementwise"]),
            (goal.triplet_weight, lambda s_pos, s_neg: 1 + s_neg.mean(), ["elementwise", "other similarities"]),
            (goal.triplet_weight, lambda s_pos, s_neg: torch.softmax(s_neg, -1), ["elementwise"]),
            (goal.triplet_weight, lambda s_pos, s_neg: None, ["tensors or numbers", "None"]),
            (goal.triplet_weight, lambda s_pos, s_neg: s_neg if s_neg > 0 else s_pos, ["fails", "ambiguous"]),
            (goal.pair_weight, lambda s_pos, s_neg: s_pos, ["two weights", "one tensor of shape (41, 41)"]),
            (goal.pair_weight, lambda s_pos, s_neg: (1.0, 1.0, 1.0), ["two weights", "a tuple of 3"]),
            (goal.pair_weight, lambda s_pos, s_neg: (1.0, 1 / s_neg), ["finite", "P⁻ = inf at s⁺ = -1, s⁻ = 0"]),
            (goal.pair_weight, lambda s_pos, s_neg: (s_pos[0], 1.0), ["elementwise", "P⁺"]),
        ],
    )
    def test_what_is_no_weight(self, register: Callable[..., Any], function: Any, parts: list[str]) -> None:
        before = list(goal.T), list(goal.P)
        refused(ValueError, "mine", *parts, by=lambda: register("mine")(function))
        assert (list(goal.T), list(goal.P)) == before

    def test_a_weight_that_fails_with_a_relative_similarity_alone(self) -> None:
        @goal.triplet_weight("fine", statistics=("r_pos_lin",))
        def fine(s_pos: Tensor, s_neg: Tensor, *, r_pos_lin: Tensor) -> Tensor:
            return 1 + r_pos_lin

        with pytest.raises(ValueError, match=r"must be >= 0: T = -0.5"):
            goal.triplet_weight("mine", statistics=("r_pos_lin",))(lambda s_pos, s_neg, *, r_pos_lin: -r_pos_lin)

    def test_a_negative_pair_weight_is_told_and_kept(self) -> None:
        with pytest.warns(UserWarning, match=r"P\.mine\(\) is negative .* P⁻ = -1 at s⁺ = -1, s⁻ = -1") as told:
            goal.pair_weight("mine")(lambda s_pos, s_neg: (1 - s_pos, s_neg))
        assert told[0].filename == __file__
        assert "mine" in goal.P

    def test_the_built_in_terms_are_weights(self) -> None:
        from goal.terms.probe import probe

        for definition in (*goal.T._definitions.values(), *goal.P._definitions.values()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if definition.name in ("lin", "lin-ms") else "error")
                probe(definition())

    def test_an_unknown_statistic(self) -> None:
        refused(
            ValueError,
            "statistics",
            "'r_pos_expo'",
            "Did you mean 'r_pos_exp'?",
            "r_neg_lin",
            by=lambda: goal.pair_weight("mine", statistics=("r_pos_expo",)),
        )

    @pytest.mark.parametrize(("statistic", "parameter"), [("r_pos_exp", "alpha"), ("r_neg_exp", "beta")])
    def test_a_statistic_without_its_parameter(self, statistic: str, parameter: str) -> None:
        namespace: dict[str, Any] = {}
        exec(f"def mine(s_pos, s_neg, *, {statistic}): return 1.0, 1.0", namespace)
        register = goal.pair_weight("mine", statistics=(statistic,))
        refused(TypeError, "mine", statistic, f"'{parameter}'", by=lambda: register(namespace["mine"]))

    def test_a_statistic_that_is_not_taken(self) -> None:
        register = goal.pair_weight("mine", statistics=("r_pos_lin",))
        refused(TypeError, "weight", "r_pos_lin", by=lambda: register(weight))

    @pytest.mark.parametrize(("parameter", "default"), [("tau", 0.0), ("alpha", -1.0), ("margin", -0.1), ("tau", "a")])
    def test_defaults_must_be_valid_parameters(self, parameter: str, default: Any) -> None:
        namespace: dict[str, Any] = {}
        exec(f"def mine(s_pos, s_neg, *, {parameter}={default!r}): return 1.0", namespace)
        before = list(goal.T)
        refused(
            (ValueError, TypeError),  # type: ignore[arg-type]
            f"'{parameter}'",
            by=lambda: goal.triplet_weight("mine")(namespace["mine"]),
        )
        assert list(goal.T) == before


# ── numbers that training checks by the same two functions ──────────────────────────────────────────────


@pytest.mark.parametrize("value", [3, np.int8(3), np.array(3), torch.tensor(3)])
def test_a_whole_number_of_any_kind_is_pythons(value: Any) -> None:
    found = goal.validation.whole_number("n", value, 3, 3)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2, ValueError, "n must be a whole number >= 3, got 2."),
        (9, ValueError, "n must be a whole number >= 3 and <= 8, got 9."),
        (10**400, ValueError, "n must be a whole number >= 3 and <= 8, got one of 1329 bits."),
        (4.0, TypeError, "n must be a whole number >= 3, got 4.0."),
        (True, TypeError, "n must be a whole number >= 3, got True."),
        (np.array([4]), TypeError, "n must be a whole number >= 3, got array([4])."),
        (np.ones(2, int), TypeError, "n must be a whole number >= 3, got array([1, 1])."),
        (torch.tensor(4, device="meta"), TypeError, "n must be a whole number >= 3, got tensor(..., device='meta'"),
    ],
)
def test_no_whole_number_within_limits(value: Any, error: type[Exception], message: str) -> None:
    refused(error, message, by=lambda: goal.validation.whole_number("n", value, 3, 8))


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array([0.5]), torch.tensor(0.5)])
def test_a_real_number_of_any_kind_is_pythons(value: Any) -> None:
    found = goal.validation.real_number("x", value, 0.5, 0.5)
    assert (found, type(found)) == (0.5, float)
    assert goal.validation.real_number("x", float("inf"), finite=False) == float("inf")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "x must be > 0 and <= 1, got 0."),
        (1.5, ValueError, "x must be > 0 and <= 1, got 1.5."),
        (float("nan"), ValueError, "x must be finite, got nan."),
        (float("inf"), ValueError, "x must be finite, got inf."),
        (10**400, ValueError, "x must be within a float's range."),
        ("1", TypeError, "x must be a number, got str ('1')."),
        (True, TypeError, "x must be a number, got bool (True)."),
        (torch.ones(2), TypeError, "x must be a number, got Tensor"),
        (torch.tensor(0.5, requires_grad=True), TypeError, "x must be a number, got Tensor"),
    ],
)
def test_no_real_number_within_limits(value: Any, error: type[Exception], message: str) -> None:
    refused(error, message, by=lambda: goal.validation.real_number("x", value, 0, 1, above=True))


def test_a_time_is_no_nan() -> None:
    refused(ValueError, "x must be finite, got nan.", by=lambda: goal.validation.real_number("x", np.nan, finite=False))
