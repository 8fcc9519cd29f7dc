"""Mining rules, by which an anchor's negatives share its push: hardest, semi-hard, soft, all, selective."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from goal.names import Value, rule_of, unknown
from goal.validation import check_bool, check_number, real_number

CURVES: dict[str, Curve] = {}  # by key
MANY = 1e6  # negatives of an anchor, up to which terms have to be finite with soft mining


class Curve(NamedTuple):
    """A hardness h(s) or a level(z), with the numbers of the rule that it asks for by name."""

    name: str
    function: Callable[..., Tensor]
    asks: tuple[str, ...]
    key: str  # a name that no other curve of the process has

    @classmethod
    def of(cls, function: Callable[..., Tensor], asks: tuple[str, ...], name: str | None = None) -> Curve:
        """The curve of a function, which graphs of torch.compile know by its key."""
        owner = getattr(function, "__module__", "user")
        key = f"{owner}.{getattr(function, '__qualname__', type(function).__qualname__)}"
        while key in CURVES and CURVES[key].function is not function:
            key += "'"
        return CURVES.setdefault(key, cls(name or key, function, asks, key))

    def __call__(self, at: Tensor, numbers: Mapping[str, float]) -> Tensor:
        return self.function(at, **{name: numbers[name] for name in self.asks})


@dataclass(frozen=True)
class Softmax:
    """A softmax over an anchor's negatives: Z = Σ e^{h(s)}, shares q = e^{h(s)} / Z, and s̃⁻ = level(log Z)."""

    hardness: Curve
    level: Curve
    tau: float
    alpha: float
    margin: float
    at: str  # where P⁻ is taken: "aggregate", at s̃⁻, or "each", at every sᵢⱼ
    over: str  # "negatives"; "candidates", the positive has a share too; or "positives", of `goal.positives.soft`
    normalise: str  # "sum", or "mean": log Z − log n

    @property
    def numbers(self) -> dict[str, float]:
        return {"tau": self.tau, "alpha": self.alpha, "margin": self.margin}

    @property
    def slope(self) -> float | None:
        """The factor of s in a linear hardness; None for another hardness."""
        return self.tau + self.alpha if self.hardness.function is _linear else None

    def h(self, s: Tensor) -> Tensor:
        """The hardness of similarities, as a new tensor."""
        return self.hardness(s, self.numbers)

    def stands(self, log_sum: Tensor, count: Tensor | None = None) -> Tensor:
        """s̃, the similarity that stands for all, from log Z and their number; −inf without negatives, inf without
        positives.
        """
        z = log_sum - count.log() if self.normalise == "mean" and count is not None else log_sum
        nothing = math.inf if self.over == "positives" else -math.inf
        return torch.where(log_sum == -math.inf, nothing, self.level(z, self.numbers))

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest s̃⁻ for similarities in [−1, 1] and up to `MANY` negatives."""
        s = torch.linspace(-1, 1, 41, dtype=torch.float64, device="cpu")
        h = self.h(s)
        more = math.log(MANY) if self.normalise == "sum" else 0.0
        low, high = self.level(torch.stack((h.min(), h.max() + more)), self.numbers).tolist()
        return low, high


@dataclass(frozen=True)
class Mining:
    """A selection mᵢⱼ ≥ 0 over each anchor's negatives, in the form that the engine needs.

    `margin` is set for semi-hard mining alone, `eps` for selective, `softmax` for soft; `average` and `pull` are
    another than by default for all negatives alone, where the user asks for it.
    """

    name: str
    mined: Literal["hardest", "semi-hard", "soft", "none"]  # what stands for the negatives in the weights
    dense: Literal["never", "always", "fallback"]  # which anchors use all their negatives, by weights of their own
    average: bool = True  # dense anchors: a negative weighs 1 / number of negatives, not 1
    margin: float | None = None
    eps: float | None = None
    pull: Literal["each", "once"] = "each"  # dense anchors: the sum, or the mean, of the pulls of their triplets
    softmax: Softmax | None = None

    @property
    def params(self) -> dict[str, Value]:
        """The parameters of the rule."""
        if (softmax := self.softmax) is not None:
            rest = {"at": softmax.at, "over": softmax.over, "normalise": softmax.normalise}
            return {**softmax.numbers, "hardness": softmax.hardness.name, "level": softmax.level.name, **rest}
        of_all = {"average": self.average, "pull": self.pull} if self.name == "all" else {}
        given = {"margin": self.margin, "eps": self.eps, **of_all}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def picks(self) -> bool:
        """Whether the mined push goes to a single negative."""
        return self.mined in ("hardest", "semi-hard")

    @property
    def numbers(self) -> dict[str, float | None]:
        """The numbers of the rule, which may change from step to step."""
        return {"margin": self.margin, "eps": self.eps} if self.softmax is None else dict(self.softmax.numbers)

    def renumbered(self, numbers: Mapping[str, float | None]) -> Mining:
        """The rule with other numbers, unchecked."""
        changed: dict[str, Any] = dict(numbers)
        if self.softmax is None:
            return dataclasses.replace(self, **changed)
        return dataclasses.replace(self, softmax=dataclasses.replace(self.softmax, **changed))

    @property
    def known(self) -> bool:
        """Whether the rule of its name makes it, from its parameters."""
        rule, given = RULES.get(self.name), self.params
        return rule is not None and given.keys() == defaults(self.name).keys() and _made(rule, given) == self

    def __repr__(self) -> str:
        if self.known:
            usual, given = defaults(self.name), self.params
            shown = {name: value for at, (name, value) in enumerate(given.items()) if not at or value != usual[name]}
        else:
            shown = dataclasses.asdict(self)
        text = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"mining.{RULES[self.name].__name__}({text})" if self.known else f"Mining({text})"


def _made(rule: Callable[..., Mining], params: Mapping[str, Value]) -> Mining | None:
    """The rule with these parameters; None if it refuses them."""
    try:
        return rule(**params)
    except (TypeError, ValueError):
        return None


def hardest() -> Mining:
    """The negative with the highest similarity (Faghri et al., VSE++, eq. 6).

    Example:
        >>> import goal
        >>> goal.Objective(mining=goal.mining.hardest()).settings.mining
        mining.hardest()
    """
    return Mining("hardest", "hardest", "never")


def semi_hard(margin: float = 0.2) -> Mining:
    """The hardest among s⁺ − margin < s⁻ < s⁺; an anchor without any emits nothing (Schroff et al., FaceNet, §3.2).

    Negatives whose s⁻ equals s⁺ within the rounding of a product count as ties, and are therefore not below s⁺.

    Args:
        margin: how far below s⁺ a negative may lie, > 0.

    Example:
        >>> import goal
        >>> goal.mining.semi_hard(margin=0.1)
        mining.semi_hard(margin=0.1)
    """
    margin = check_number("goal.mining.semi_hard", "margin", margin)
    if margin == 0:
        raise ValueError("goal.mining.semi_hard: parameter 'margin' must be > 0, got 0.0 (no s⁻ lies between).")
    return Mining("semi-hard", "semi-hard", "never", margin=margin)


def all_negatives(average: bool = True, pull: str = "each") -> Mining:
    """Every negative; with `average` each weighs 1 / (number of the anchor's negatives), without it 1.

    Args:
        average: whether to average over the negatives.
        pull: `each` pulls the positive in every triplet; `once` pulls it by the mean of its triplets' pulls, however
            many negatives there are: sums such as SigLIP's, with one positive and many negatives. With `average` the
            gradient is the same. With `once`, and T that does not depend on the similarities, an anchor without
            negatives keeps its pull.

    Example:
        >>> import goal
        >>> goal.mining.all_negatives(average=False)
        mining.all_negatives(average=False)
    """
    average = check_bool("goal.mining.all_negatives: average", average)
    if pull not in ("each", "once"):
        raise unknown("goal.mining.all_negatives: pull", pull, ("each", "once"))
    return Mining("all", "none", "always", average=average, pull="once" if pull == "once" else "each")


def soft(
    tau: float = 20.0,
    *,
    alpha: float = 0.0,
    margin: float = 0.4,
    hardness: str | Callable[..., Tensor] = "linear",
    level: str | Callable[..., Tensor] = "linear",
    at: str = "aggregate",
    over: str = "negatives",
    normalise: str = "sum",
) -> Mining:
    """All negatives, which share the push by a softmax: between `hardest` (τ → ∞) and `all` (τ → 0, with the mean).

        Zᵢ = Σⱼ e^{h(sᵢⱼ)}    qᵢⱼ = e^{h(sᵢⱼ)} / Zᵢ    s̃⁻ᵢ = level(log Zᵢ)

    s̃⁻ takes the place of s⁻ in T and P⁻, and the push is shared by q. With the linear hardness and level, α = 0 and P⁻
    at the aggregate, T × P is then the gradient of a loss if it is one with a single negative. With P = con this is the
    family of InfoNCE: `goal.recipe("infonce")`.

    Args:
        tau: inverse temperature, > 0.
        alpha: what `linear` adds to τ, >= 0: a sharper share than s̃⁻ has. With α > 0 the field has no loss, unless T
            is a constant.
        margin: of the hardness `circle`.
        hardness: h(s): `linear`, (τ + α)s; `square`, τs²; `circle`, τ(s + m)₊(s − m); or a function ``h(s, *, tau)``,
            with any of the keywords tau, alpha and margin, of torch operators, elementwise. A function is kept for as
            long as the process lives: make it once.
        level: s̃⁻ from z = log Z: `linear`, z/τ; `root`, √(z₊/τ); or a function ``level(z, *, tau)``.
        at: P⁻ at the `aggregate` s̃⁻, or at `each` sᵢⱼ.
        over: `negatives`; or `candidates`: the positive stands in the sum too, and gets its share of the push.
        normalise: `sum`; or `mean`, which subtracts log n, so that s̃⁻ does not grow with the number n of negatives.

    An anchor without negatives emits nothing; where T does not depend on the similarities, its pull stays.

    Example:
        >>> import goal
        >>> goal.mining.soft(tau=50.0, normalise="mean")
        mining.soft(tau=50.0, normalise='mean')
    """
    owner = "goal.mining.soft"
    tau, margin = check_number(owner, "tau", tau), check_number(owner, "margin", margin)
    alpha = real_number(f"{owner}: parameter 'alpha'", alpha, 0.0)
    numbers = {"tau": tau, "alpha": alpha, "margin": margin}
    curves = _curve("hardness", hardness, HARDNESS, numbers), _curve("level", level, LEVELS, numbers)
    for name, value, allowed in (
        ("at", at, ("aggregate", "each")),
        ("over", over, ("negatives", "candidates")),
        ("normalise", normalise, ("sum", "mean")),
    ):
        if value not in allowed:
            raise unknown(f"{owner}: {name}", value, allowed)
    return Mining("soft", "soft", "never", softmax=Softmax(*curves, tau, alpha, margin, at, over, normalise))


def selective(eps: float = 0.01) -> Mining:
    """T-SelHN: the mean over all negatives where |s⁺ − max s⁻| < eps, else the hardest; per anchor and direction.

    The hardest negative's gradient vanishes for s⁻ ≈ s⁺, which is where a collapsed start lies (Li et al., T-SelHN).

    Args:
        eps: half the width of the vanishing zone, >= 0.

    Example:
        >>> import goal
        >>> goal.mining.selective()
        mining.selective(eps=0.01)
    """
    eps = check_number("goal.mining.selective", "eps", eps)
    return Mining("selective", "hardest", "fallback", eps=eps)


# ── hardness and level of soft mining ───────────────────────────────────────────────────────────────────────────────


def _linear(s: Tensor, *, tau: float, alpha: float) -> Tensor:
    return (tau + alpha) * s


def _square(s: Tensor, *, tau: float) -> Tensor:
    return tau * s.square()


def _circle(s: Tensor, *, tau: float, margin: float) -> Tensor:
    return tau * (s + margin).clamp(min=0) * (s - margin)


def _quotient(z: Tensor, *, tau: float) -> Tensor:
    return z / tau


def _root(z: Tensor, *, tau: float) -> Tensor:
    return (z.clamp(min=0) / tau).sqrt()


HARDNESS = {
    "linear": Curve.of(_linear, ("tau", "alpha"), "linear"),
    "square": Curve.of(_square, ("tau",), "square"),
    "circle": Curve.of(_circle, ("tau", "margin"), "circle"),
}
LEVELS = {"linear": Curve.of(_quotient, ("tau",), "linear"), "root": Curve.of(_root, ("tau",), "root")}


def _curve(argument: str, given: object, known: Mapping[str, Curve], numbers: Mapping[str, float]) -> Curve:
    """The curve of a name, or of a user's function, after a trial on [−1, 1]."""
    owner = f"goal.mining.soft: {argument}"
    if isinstance(given, str):
        if given not in known and given not in CURVES:
            raise unknown(owner, given, list(known))
        return known[given] if given in known else CURVES[given]
    if not callable(given):
        raise TypeError(f"{owner} must be one of {', '.join(known)}, or a function, got {given!r}.")
    try:
        first, *rest = inspect.signature(given).parameters.values()
    except ValueError:
        raise TypeError(f"{owner} must be a function written in Python, got {given!r}.") from None
    asked = tuple(one.name for one in rest)
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD) or not set(asked) <= set(numbers):
        shape = f"def {argument}(s, *, {', '.join(numbers)})"
        raise TypeError(f"{owner} is written as `{shape}`, with any of these keywords, got {inspect.signature(given)}.")
    _try_curve(owner, given, {name: numbers[name] for name in asked})
    return Curve.of(given, asked)


def _try_curve(owner: str, function: Callable[..., Tensor], numbers: Mapping[str, float]) -> None:
    """Raise if a user's curve is not elementwise or not finite on [−1, 1], or changes the dtype."""
    for dtype in (torch.float64, torch.float32):
        trial = torch.linspace(-1, 1, 41, dtype=dtype, device="cpu")
        whole, part = function(trial.clone(), **numbers), function(trial[:7].clone(), **numbers)
        if not isinstance(whole, Tensor) or (whole.shape, whole.dtype) != (trial.shape, dtype):
            came = f"{tuple(whole.shape)} {whole.dtype}" if isinstance(whole, Tensor) else repr(whole)
            raise ValueError(
                f"{owner} must return a tensor like its input, of {tuple(trial.shape)} {dtype}, got {came}."
            )
        if not bool(whole.isfinite().all()):
            raise ValueError(f"{owner} must be finite on [−1, 1], got {whole[~whole.isfinite()][0].item()}.")
        if not torch.allclose(whole[:7], part, rtol=1e-5, atol=1e-6):
            raise ValueError(f"{owner} must be elementwise: its value at a similarity changes with the others.")


RULES: dict[str, Callable[..., Mining]] = {
    "hardest": hardest,
    "semi-hard": semi_hard,
    "soft": soft,
    "all": all_negatives,
    "selective": selective,
}


def defaults(name: str) -> dict[str, Value]:
    """The default parameters of a rule."""
    return {key: parameter.default for key, parameter in inspect.signature(RULES[name]).parameters.items()}


def bind(mining: str | Mining) -> Mining:
    """A `Mining` from the user's argument `mining=`."""
    return rule_of("mining", mining, Mining, RULES, "goal.mining.hardest()")
