"""The text of an objective: what it may say, how it prints, and where an error is."""

import keyword
import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from table import covering

import goal
from goal import spec
from goal.mining import Mining
from goal.names import Named
from goal.recipes import settable
from goal.spec import AXES, Spec, parse, split
from goal.terms.term import Definition

# ── what is read ────────────────────────────────────────────────────────────────────────────────────────

CONSTANT = "T.con(margin=None)"
SIG_MS = "P.sig_ms(alpha=2.0, beta=10.0, lam=0.5, self_term=False)"


@pytest.mark.parametrize(
    ("text", "canonical", "built"),
    [
        ("cir × sig-ms", "cir × sig-ms", f"T.cir(tau=10.0) × {SIG_MS}, mining.hardest(), mean, dot"),
        ("cir*sig_ms", "cir × sig-ms", f"T.cir(tau=10.0) × {SIG_MS}, mining.hardest(), mean, dot"),
        ("cir:sig-ms", "cir × sig-ms", f"T.cir(tau=10.0) × {SIG_MS}, mining.hardest(), mean, dot"),
        ("nca(tau=5):con", "nca(tau=5) × con", "T.nca(tau=5.0) × P.con(), mining.hardest(), mean, dot"),
        ("nca( tau = 10 ) × con()", "nca × con", "T.nca(tau=10.0) × P.con(), mining.hardest(), mean, dot"),
        ("con(margin=none) × lin", "con × lin", f"{CONSTANT} × P.lin(), mining.hardest(), mean, dot"),
        ("con(margin=1e-3) × lin", "con(margin=0.001) × lin",
         "T.con(margin=0.001) × P.lin(), mining.hardest(), mean, dot"),
        ("con × sig-ms(self-term=TRUE)", "con × sig-ms(self_term=true)",
         f"{CONSTANT} × {SIG_MS.replace('False', 'True')}, mining.hardest(), mean, dot"),
        ("nca × con | semi-hard(margin=0.1)", "nca × con | semi-hard(margin=0.1)",
         "T.nca(tau=10.0) × P.con(), mining.semi_hard(margin=0.1), mean, dot"),
        ("nca × con|mining=semi_hard(margin=0.2)", "nca × con | semi-hard",
         "T.nca(tau=10.0) × P.con(), mining.semi_hard(margin=0.2), mean, dot"),
        ("nca × con | reduction=sum | all(average=false) | similarity=cosine",
         "nca × con | all(average=false) | similarity=cosine | reduction=sum",
         "T.nca(tau=10.0) × P.con(), mining.all_negatives(average=False), sum, cosine"),
        ("vse++", "vse++", "T.con(margin=0.2) × P.con(), mining.hardest(), sum, dot"),
        ("vse++(margin=0.2)", "vse++", "T.con(margin=0.2) × P.con(), mining.hardest(), sum, dot"),
        ("vse++(margin=0.1) | reduction=mean", "vse++(margin=0.1) | reduction=mean",
         "T.con(margin=0.1) × P.con(), mining.hardest(), mean, dot"),
        ("t-selhn | selective(eps=0.1)", "t-selhn | selective(eps=0.1)",
         "T.con(margin=0.2) × P.con(), mining.selective(eps=0.1), mean, dot"),
        ("nca", "nca", "T.nca(tau=10.0) × P.con(), mining.hardest(), mean, dot"),  # the recipe, not the term
    ],
)  # fmt: skip
def test_a_text_is_read_printed_and_built(text: str, canonical: str, built: str) -> None:
    found = parse(text)
    assert str(found) == repr(found) == canonical
    assert parse(canonical) == found
    objective: Any = goal.objective(text)
    settings = objective.settings
    product = f"{settings.product.T} × {settings.product.P}"
    assert f"{product}, {settings.mining}, {settings.reduction}, {settings.similarity.name}" == built
    again: Any = goal.objective(repr(objective).removeprefix("Objective(").removesuffix(")"))
    assert again.settings == settings


def test_an_objective_prints_as_its_text() -> None:
    made = goal.Objective(T=goal.T.cir(tau=5.0), P="lin-ms", mining=goal.mining.semi_hard(margin=0.3))
    assert repr(made) == "Objective(cir(tau=5) × lin-ms | semi-hard(margin=0.3))"
    assert repr(goal.recipe("vse++")) == "Objective(con(margin=0.2) × con | reduction=sum)"
    assert repr(goal.objective("vse++ | reduction=mean")) == "Objective(con(margin=0.2) × con)"
    for case in covering():
        objective = goal.Objective(
            T=goal.T[case.T](**case.T_params),
            P=goal.P[case.P](**case.P_params),
            mining=goal.mining.RULES[case.mining](**case.mining_params),
            similarity=case.similarity,
            reduction=case.reduction,
            scale=case.scale,
            directions=case.directions,
            positives=goal.positives.RULES[case.positives](**case.positives_params),
        )
        again: Any = goal.objective(objective.extra_repr())
        assert again.settings == objective.settings, objective


def test_what_is_another_than_its_name_says_prints_as_python() -> None:
    """So that no text reads back as another objective."""
    by_hand = (
        Mining("mine", "hardest", "never"),
        Mining("hardest", "hardest", "fallback"),
        Mining("semi-hard", "semi-hard", "never"),
        Mining("hardest", "hardest", "never", average=False),
    )
    for rule in by_hand:
        shown = repr(goal.Objective(mining=rule))
        assert f"Mining(name='{rule.name}'" in shown
    other = Definition("T", "cir", lambda s_pos, s_neg, tau: tau + 0 * s_neg, {"tau": 3.0})
    assert repr(goal.Objective(T=other())) == "Objective(T.cir(tau=3.0) × sig-ms)"


def test_yardsticks_have_parameters() -> None:
    assert repr(goal.objective("infonce(tau=30)")) == "Objective(nca(tau=30) × con | soft(tau=30) | scale=15)"
    assert repr(goal.InfoNCE(30)) == "InfoNCE(nca(tau=30) × con | soft(tau=30) | scale=15)"
    siglip: Any = goal.objective("siglip(tau=2, bias=-3)")
    assert (siglip.log_tau.exp().item(), siglip.bias.item()) == (pytest.approx(2), -3)


def test_what_the_text_leaves_open_is_an_argument() -> None:
    objective: Any = goal.objective("cir × lin", precision="exact", check_finite=False)
    assert (objective.settings.precision, objective.check_finite) == ("exact", False)
    yardstick: Any = goal.objective("infonce", check_finite=True)
    assert yardstick.check_finite is True
    for text, rest in (
        ("cir × lin", {"T": "con"}),
        ("cir × lin | all", {"mining": "all"}),
        ("vse++ | reduction=sum", {"reduction": "sum"}),
    ):
        with pytest.raises(TypeError, match=f"^{next(iter(rest))} is set by the objective {text!r} already, got"):
            goal.objective(text, **rest)


def test_it_emits_what_the_same_arguments_emit() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 4)
    found: Any = goal.objective("cir(tau=5) * sig(beta=20) | selective(eps=0.5) | similarity=cosine | reduction=sum")
    T, P, mining = goal.T.cir(tau=5), goal.P.sig(beta=20), goal.mining.selective(eps=0.5)
    assert found(x, y) == goal.apply(x, y, T=T, P=P, mining=mining, similarity="cosine", reduction="sum")


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "error", "message", "place"),
    [
        ("", ValueError, "objective must have a recipe, or T × P here, got the end.", "▶"),
        ("  ", ValueError, "objective must have a recipe, or T × P here, got the end.", "  ▶"),
        ("× con", ValueError, "objective must have a recipe, or T × P here, got '×'.", "▶× con"),
        ("cir ×", ValueError, "objective must have a pair weight P here, got the end.", "cir ×▶"),
        ("cir × | all", ValueError, "objective must have a pair weight P here, got '|'.", "cir × ▶| all"),
        ("cir", ValueError, "must have two terms, T × P, or be a recipe, got cir alone: write cir × sig-ms", "▶cir"),
        ("sig", ValueError, "must have two terms, T × P, or be a recipe, got sig alone: write cir × sig, say.", "▶sig"),
        ("vse", ValueError, "recipe='vse' is not known. Did you mean 'vse0'? Known: vse0, vse++, ", "▶vse"),
        ("circ × con", ValueError, "T='circ' is not known. Did you mean 'cir'? Known: con, nca, cir.", "▶circ × con"),
        ("cir × sigg", ValueError, "P='sigg' is not known. Did you mean 'sig'? Known: con, ", "cir × ▶sigg"),
        ("vse++ × con", ValueError, "T='vse++' is not known.", "▶vse++ × con"),
        ("cir × con × lin", ValueError, "objective must have | or the end here, got '×'.", "cir × con ▶× lin"),
        ("cir × con, vse++", ValueError, "objective must have | or the end here, got ','.", "cir × con▶, vse++"),
        ("cir × con)", ValueError, "objective must have | or the end here, got ')'.", "cir × con▶)"),
        ("cir(tua=5) × con", ValueError, "cir has no parameter 'tua'. Did you mean 'tau'? Known: tau.",
         "cir(▶tua=5) × con"),
        ("cir × con(tau=5)", ValueError, "con has no parameter 'tau'. Known: none.", "cir × con(▶tau=5)"),
        ("vse++(tau=5)", ValueError, "vse++ has no parameter 'tau'. Known: margin.", "vse++(▶tau=5)"),
        ("infonce(margin=1)", ValueError, "infonce has no parameter 'margin'. Known: tau.", "infonce(▶margin=1)"),
        ("cir(tau) × con", ValueError, "objective must have = and a value after tau here, got ')'.", "cir(tau▶) × con"),
        ("cir(tau=) × con", ValueError, "objective must have a value here, got ')'.", "cir(tau=▶) × con"),
        ("cir(5) × con", ValueError, "objective must have = and a value after 5 here, got ')'.", "cir(5▶) × con"),
        ("cir(=5) × con", ValueError, "objective must have a parameter of cir, or ) here, got '='.", "cir(▶=5) × con"),
        ("cir(tau=5", ValueError, "objective must have , or ) here, got the end.", "cir(tau=5▶"),
        ("cir(tau=5 × con", ValueError, "objective must have , or ) here, got '×'.", "cir(tau=5 ▶× con"),
        ("sig(tau=5, tau=6)", ValueError, "objective gives tau twice.", "sig(tau=5, ▶tau=6)"),
        ("cir(tau=five) × con", ValueError, "objective must have a number, true, false or none here, got 'five'.",
         "cir(tau=▶five) × con"),
        ("cir(tau=0) × con", ValueError, "goal.T.cir: parameter 'tau' must be > 0, got 0.0.", "cir(▶tau=0) × con"),
        ("cir(tau=nan) × con", ValueError, "goal.T.cir: parameter 'tau' must be finite, got nan.",
         "cir(▶tau=nan) × con"),
        ("cir(tau=none) × con", TypeError, "goal.T.cir: parameter 'tau' must be a number, got NoneType",
         "cir(▶tau=none) × con"),
        ("cir(tau=true) × con", TypeError, "goal.T.cir: parameter 'tau' must be a number, got bool",
         "cir(▶tau=true) × con"),
        ("con × sig-ms(self_term=1)", TypeError, "parameter 'self_term' must be True or False, got 1.0.",
         "con × sig-ms(▶self_term=1)"),
        ("infonce(tau=true)", TypeError, "recipe infonce: parameter 'tau' must be a number", "infonce(▶tau=true)"),
        ("vse++ |", ValueError, "must have a mining rule, or an axis such as reduction=sum here, got", "vse++ |▶"),
        ("vse++ | hard", ValueError, "mining='hard' is not known. Did you mean 'hardest'?", "vse++ | ▶hard"),
        ("vse++ | sum", ValueError, "must have a mining rule here, got 'sum': write reduction=sum.", "vse++ | ▶sum"),
        ("vse++ | order", ValueError, "must have a mining rule here, got 'order': write similarity=order.",
         "vse++ | ▶order"),
        ("vse++ | semi-hard(eps=1)", ValueError, "semi-hard has no parameter 'eps'. Known: margin.",
         "vse++ | semi-hard(▶eps=1)"),
        ("vse++ | semi-hard(margin=0)", ValueError, "parameter 'margin' must be > 0", "vse++ | semi-hard(▶margin=0)"),
        ("vse++ | all(average=0.5)", TypeError, "must be True or False, got 0.5.", "vse++ | all(▶average=0.5)"),
        ("vse++ | hardest | all", ValueError, "objective sets mining twice.", "vse++ | hardest | ▶all"),
        ("vse++ | reduction=max", ValueError, "reduction='max' is not known. Known: mean, sum.",
         "vse++ | reduction=▶max"),
        ("vse++ | reduction=", ValueError, "must have reduction, such as sum here, got the", "vse++ | reduction=▶"),
        ("vse++ | similarity=cosin", ValueError, "similarity='cosin' is not known. Did you mean 'cosine'?",
         "vse++ | similarity=▶cosin"),
        ("vse++ | reductoin=sum", ValueError, "objective has no axis 'reductoin'. Did you mean 'reduction'? Known: min",
         "vse++ | ▶reductoin=sum"),
        ("infonce | hardest", ValueError, "mining cannot be set: infonce has its own.", "infonce | ▶hardest"),
        ("siglip | reduction=sum", ValueError, "reduction cannot be set: siglip has", "siglip | ▶reduction=sum"),
    ],
)  # fmt: skip
def test_an_error_says_what_came_what_is_allowed_and_where(
    text: str, error: type[Exception], message: str, place: str
) -> None:
    with pytest.raises(error) as caught:
        parse(text)
    assert message in str(caught.value)
    assert str(caught.value).endswith(f" At ▶ in {place!r}.")


@pytest.mark.parametrize("value", [None, 3, b"vse++", ["vse++"], parse("vse++")])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"^objective must be text such as 'cir × sig-ms', got "):
        parse(value)  # type: ignore[arg-type]


def test_a_long_text_is_shown_around_the_place() -> None:
    with pytest.raises(ValueError, match="is not known") as caught:
        parse("cir × con | " + " " * 300 + "hard" + " " * 300)
    assert len(str(caught.value)) < 250
    assert f"'…{' ' * 40}▶hard{' ' * 36}…'" in str(caught.value)


def test_one_name_on_its_own() -> None:
    assert spec.named("mining", "semi-hard(margin=0.5)") == Named("semi-hard", (("margin", 0.5),))
    with pytest.raises(ValueError, match=r"^mining must have the end here, got '\|'. At ▶ in 'all ▶\| sum'"):
        spec.named("mining", "all | sum")
    with pytest.raises(TypeError, match=r"^T must be text such as 'cir\(tau=5\)', got int"):
        spec.named("T", 3)  # type: ignore[arg-type]


# ── lists, axes, parameters ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vse++", ["vse++"]),
        ("cir:sig-ms,vse++", ["cir:sig-ms", "vse++"]),
        (" cir × sig(alpha=1, beta=2) | all , infonce(tau=3)", ["cir × sig(alpha=1, beta=2) | all", "infonce(tau=3)"]),
        ("a,,b", ["a", "", "b"]),
        ("", [""]),
        ("a), b", ["a)", "b"]),
    ],
)
def test_a_list_is_split_at_commas_outside_brackets(text: str, parts: list[str]) -> None:
    assert split(text) == parts


def test_axes_are_changed_and_left_out() -> None:
    found = parse("cir × con | all")
    assert str(found.with_axes(mining=None, similarity="order")) == "cir × con | similarity=order"
    assert found.axis("mining") == Named("all")
    assert found.axis("reduction") is None
    with pytest.raises(ValueError, match=r"objective has no axis 'minning'\. Did you mean 'mining'"):
        found.with_axes(minning="all")
    with pytest.raises(ValueError, match="mining='no' is not known"):
        found.with_axes(mining="no")


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("con × con", {}),
        ("con(margin=0.2) × con | semi-hard", {"margin": 0.2, "mining.margin": 0.2}),
        ("con × sig | all", {"alpha": 2.0, "beta": 10.0, "lam": 0.5, "mining.average": True}),
        ("t-selhn", {"margin": 0.2}),
        ("siglip(tau=3)", {"tau": 3.0, "bias": -10.0}),
    ],
)
def test_parameters_are_those_of_terms_and_of_a_rule_that_was_named(text: str, parameters: dict[str, Any]) -> None:
    found = parse(text)
    assert found.parameters == parameters
    assert found.with_parameters(found.parameters) == found


def test_parameters_are_changed_by_their_names() -> None:
    found = parse("con(margin=0.2) × con | semi-hard")
    assert str(found.with_parameters({"mining.margin": 0.1})) == "con(margin=0.2) × con | semi-hard(margin=0.1)"
    assert str(found.with_parameters({"margin": 0.1})) == "con(margin=0.1) × con | semi-hard"
    assert str(found.with_parameters({"margin": None})) == "con × con | semi-hard"
    with pytest.raises(
        ValueError, match=r"con × con \| semi-hard has no parameter 'eps'. Known: margin, mining.margin."
    ):
        found.with_parameters({"eps": 1})
    with pytest.raises(ValueError, match=r"goal.mining.semi_hard: parameter 'margin' must be >= 0"):
        found.with_parameters({"mining.margin": -1})


@pytest.mark.usefixtures("registries")
def test_terms_of_the_users_own_and_their_parameters_are_known() -> None:
    goal.triplet_weight("my-own")(lambda s_pos, s_neg, *, tau=3.0, gain=2, flip=False: 0 * s_neg + gain)
    goal.pair_weight("my-own")(lambda s_pos, s_neg, *, tau=1.5: (tau + 0 * s_pos, tau + 0 * s_neg))
    found = parse("my_own(gain=4, flip=true) × my-own(tau=2)")
    assert str(found) == "my-own(gain=4, flip=true) × my-own(tau=2)"
    assert found.parameters == {"T.tau": 3.0, "gain": 4.0, "P.tau": 2.0}
    assert str(found.with_parameters({"tau": 5})) == "my-own(tau=5, gain=4, flip=true) × my-own(tau=5)"
    assert str(found.with_parameters({"P.tau": 5})) == "my-own(gain=4, flip=true) × my-own(tau=5)"
    assert parse("my-own(gain=2) × con") == parse("my-own × con")


def test_terms_that_a_search_spelled_are_known_by_their_names() -> None:
    found = parse("cir × found-linear-square")
    assert parse(str(found)) == found
    with pytest.raises(ValueError, match=r"not of the grammar.* At ▶ in '▶found-no-such × con'"):
        parse("found-no-such × con")


# ── there and back, for everything that is registered ───────────────────────────────────────────────────

NAMES: dict[str, Callable[[], list[str]]] = {
    "T": lambda: [name for name in goal.T if not name.startswith("found-")],
    "P": lambda: [name for name in goal.P if not name.startswith("found-")],
    "recipe": lambda: list(goal.recipes()),
    "mining": lambda: list(goal.mining.RULES),
    "positives": lambda: list(goal.positives.RULES),
    "similarity": lambda: ["dot", "cosine", "order"],
    "reduction": lambda: ["mean", "sum"],
    "scale": lambda: ["0.25", "10"],
    "directions": lambda: ["both", "x→y", "y→x"],
}
CHOICES = {  # of options that are names
    "hardness": ["linear", "square", "circle"],
    "level": ["linear", "root"],
    "at": ["aggregate", "each"],
    "over": ["negatives", "candidates"],
    "normalise": ["sum", "mean"],
    "pull": ["each", "once"],
}
POSITIVE = st.floats(1e-6, 1e6)


@st.composite
def calls(draw: st.DrawFn, kind: str) -> str:
    """A name of a kind with some of its parameters, in any order."""
    name = draw(st.sampled_from(NAMES[kind]()))
    some = draw(st.lists(st.sampled_from(sorted(spec.member(kind, name).defaults) or [""]), unique=True))
    inside = []
    for key in filter(None, some):
        default = spec.member(kind, name).defaults[key]
        values = st.sampled_from(["true", "false"]) if isinstance(default, bool) else POSITIVE.map(repr)
        names = ["linear", "circle"] if (kind, key) == ("positives", "hardness") else CHOICES.get(key)
        values = st.sampled_from(names) if isinstance(default, str) else values
        inside.append(f"{key}={draw(st.just('none') | values if default is None else values)}")
    return f"{name}({', '.join(inside)})" if inside or draw(st.booleans()) else name


@st.composite
def texts(draw: st.DrawFn) -> str:
    space = draw(st.sampled_from(["", " "]))
    head = draw(calls("recipe"))
    if draw(st.booleans()):
        head = draw(calls("T")) + space + draw(st.sampled_from("×*:")) + space + draw(calls("P"))
    recipe = parse(head).recipe
    allowed = sorted(axis for axis in AXES if recipe is None or settable(recipe.name, axis))
    if not allowed:
        return head
    axes = draw(st.lists(st.sampled_from(allowed), unique=True))
    tail = [draw(calls(axis)) if axis == "mining" else f"{axis}={draw(calls(axis))}" for axis in axes]
    return f"{space}|{space}".join([head, *tail])


@given(texts())
def test_what_is_printed_reads_back_to_the_same(text: str) -> None:
    found = parse(text)
    assert parse(repr(found)) == found
    assert str(parse(str(found))) == str(found)
    assert found.with_parameters(found.parameters) == found
    assert hash(parse(str(found))) == hash(found)
    assert split(f"{found}, {found}") == [str(found)] * 2
    built, again = (each.build() for each in (found, parse(str(found))))
    assert repr(built) + str(built.state_dict()) == repr(again) + str(again.state_dict())


@given(st.text(alphabet=string.ascii_lowercase[:6] + "cirsg-ms+×*:|(),= .0", max_size=30))
def test_any_text_is_read_or_refused_with_the_place(text: str) -> None:
    try:
        found = parse(text)
    except (ValueError, TypeError) as error:
        said = str(error)
    else:
        said = " At ▶ in " * (parse(str(found)) == found)
    assert " At ▶ in " in said


@pytest.mark.parametrize("kind", NAMES)
def test_every_name_and_parameter_has_its_default_left_out(kind: str) -> None:
    forms = {"T": "{} × con", "P": "con × {}", "recipe": "{}", "mining": "vse++ | {}"}
    form = forms.get(kind, f"vse++ | {kind}={{}}")
    for name in NAMES[kind]():
        defaults = spec.member(kind, name).defaults
        assert all(key.isidentifier() and not keyword.iskeyword(key) for key in defaults)
        written = ", ".join(f"{key}={value}" for key, value in defaults.items())
        assert str(parse(form.format(f"{name}({written})"))) == form.format(name)


def test_specs_are_frozen_and_compared_by_what_they_say() -> None:
    assert parse("vse++") == Spec(recipe=Named("vse++")) != parse("vse0")
    with pytest.raises(AttributeError):
        parse("vse++").recipe = None  # type: ignore[misc]
