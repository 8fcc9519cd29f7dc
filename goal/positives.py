"""Positives: which rows of the other side are an anchor's, and how it pulls several: pair, hardest, soft."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from goal.mining import Curve, Softmax
from goal.names import Value, rule_of, unknown
from goal.validation import check_number, real_number


@dataclass(frozen=True)
class Positives:
    """A rule for an anchor's positives, in the form that the engine needs."""

    name: str
    softmax: Softmax | None = None  # over the positives, if they share the pull

    @property
    def by_ids(self) -> bool:
        """Whether rows with equal ids are positives, instead of rows with equal numbers."""
        return self.name != "pair"

    @property
    def linear(self) -> bool:
        """Whether the hardness is linear, so that s̃⁺ lies among the positives' similarities but for log n."""
        return self.softmax is not None and self.softmax.hardness.function is _linear

    @property
    def mean(self) -> bool:
        """Whether all positives count the same."""
        return self.softmax is not None and self.softmax.tau == 0

    @property
    def params(self) -> dict[str, Value]:
        """The parameters of the rule."""
        if self.softmax is None:
            return {}
        its = self.softmax
        return {"tau": its.tau, "margin": its.margin, "hardness": its.hardness.name, "at": its.at}

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers of the rule, which may change from step to step."""
        return {} if self.softmax is None else dict(self.softmax.numbers)

    def renumbered(self, numbers: Mapping[str, float]) -> Positives:
        """The rule with other numbers, unchecked."""
        if self.softmax is None:
            return self
        changed: dict[str, Any] = dict(numbers)
        return dataclasses.replace(self, softmax=dataclasses.replace(self.softmax, **changed))

    def __repr__(self) -> str:
        usual = defaults(self.name)
        shown = [
            (name, value) for at, (name, value) in enumerate(self.params.items()) if not at or value != usual[name]
        ]
        return f"positives.{self.name}({', '.join(f'{name}={value!r}' for name, value in shown)})"


def pair() -> Positives:
    """Row k of the other side is the positive of row k.

    Example:
        >>> import goal
        >>> goal.Objective(positives=goal.positives.pair()).settings.positives
        positives.pair()
    """
    return Positives("pair")


def hardest() -> Positives:
    """Every row with the anchor's id is a positive; the least similar stands for them and takes the pull.

    Example:
        >>> import goal, torch
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> loss = goal.apply(torch.eye(4), ids=labels, T="con", P="con", positives="hardest")
    """
    return Positives("hardest")


def soft(tau: float = 10.0, *, margin: float = 0.4, hardness: str = "linear", at: str = "aggregate") -> Positives:
    """Every row with the anchor's id is a positive; a softmax shares the pull among them.

        Z⁺ᵢ = Σₚ e^{h(sᵢₚ)}    qᵢₚ = e^{h(sᵢₚ)} / Z⁺ᵢ    s̃⁺ᵢ = −(log Z⁺ᵢ)/τ

    s̃⁺ takes the place of s⁺ everywhere, also in R⁺ and in min s⁺.

    Args:
        tau: with h = −τs, τ > 0 leans to the lowest positive, τ < 0 to the highest; 0 takes their mean.
        margin: of the hardness `circle`.
        hardness: `linear`, −τs; or `circle`, τ(1 + m − s)₊(1 − m − s), for τ > 0.
        at: P⁺ at the `aggregate` s̃⁺, or at `each` sᵢₚ.

    Example:
        >>> import goal
        >>> goal.positives.soft(tau=2.0)
        positives.soft(tau=2.0)
    """
    owner = "goal.positives.soft"
    tau, margin = real_number(f"{owner}: parameter 'tau'", tau), check_number(owner, "margin", margin)
    if not isinstance(hardness, str) or hardness not in HARDNESS:
        raise unknown(f"{owner}: hardness", hardness, list(HARDNESS))
    if hardness != "linear" and tau <= 0:
        raise ValueError(f"{owner}: parameter 'tau' must be > 0 with hardness={hardness!r}, got {tau}.")
    if at not in ("aggregate", "each"):
        raise unknown(f"{owner}: at", at, ("aggregate", "each"))
    return Positives("soft", Softmax(HARDNESS[hardness], LEVEL, tau, 0.0, margin, at, "positives", "sum"))


def _linear(s: Tensor, *, tau: float) -> Tensor:
    return -tau * s


def _circle(s: Tensor, *, tau: float, margin: float) -> Tensor:
    return tau * (1 + margin - s).clamp(min=0) * (1 - margin - s)


def _level(z: Tensor, *, tau: float) -> Tensor:
    return z / -tau


HARDNESS = {
    "linear": Curve.of(_linear, ("tau",), "linear"),
    "circle": Curve.of(_circle, ("tau", "margin"), "circle"),
}
LEVEL = Curve.of(_level, ("tau",), "linear")
RULES = {"pair": pair, "hardest": hardest, "soft": soft}


def defaults(name: str) -> dict[str, Value]:
    """The default parameters of a rule."""
    return soft().params if name == "soft" else {}


def bind(positives: str | Positives | None, one_set: bool) -> Positives:
    """The positives from the user's argument `positives=`; by default the pairs, or the hardest of a single set."""
    if positives is None:
        return hardest() if one_set else pair()
    rule = rule_of("positives", positives, Positives, RULES, "goal.positives.hardest()")
    if one_set and not rule.by_ids:
        raise ValueError(
            "positives must be 'hardest' or 'soft' where y is left out, got 'pair': row k has no row k beside it."
        )
    return rule
