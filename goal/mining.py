"""Mining rules, which select the negatives of an anchor: hardest, semi-hard, all, selective."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from goal.names import spell, unknown
from goal.validation import check_bool, check_number


@dataclass(frozen=True)
class Mining:
    """A selection mᵢⱼ ≥ 0 over each anchor's negatives, in the form that the engine needs.

    `margin` is set for semi-hard mining alone, `eps` for selective alone; `average` is False for all negatives alone,
    where the user asks for it.
    """

    name: str
    mined: Literal["hardest", "semi-hard", "none"]  # the negative that the miner finds for each anchor
    dense: Literal["never", "always", "fallback"]  # which anchors use all their negatives
    average: bool = True  # dense anchors: a negative weighs 1 / number of negatives, not 1
    margin: float | None = None
    eps: float | None = None

    @property
    def params(self) -> dict[str, float | bool]:
        """The parameters of the rule."""
        given = {"margin": self.margin, "eps": self.eps, "average": self.average if self.name == "all" else None}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def known(self) -> bool:
        """Whether the rule of its name makes it, from its parameters."""
        rule, given = RULES.get(self.name), self.params
        return rule is not None and given.keys() == defaults(self.name).keys() and rule(**given) == self

    def __repr__(self) -> str:
        given = self.params if self.known else dataclasses.asdict(self)
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"mining.{RULES[self.name].__name__}({shown})" if self.known else f"Mining({shown})"


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


def all_negatives(average: bool = True) -> Mining:
    """Every negative; with `average` each weighs 1 / (number of the anchor's negatives), without it 1.

    Example:
        >>> import goal
        >>> goal.mining.all_negatives(average=False)
        mining.all_negatives(average=False)
    """
    return Mining("all", "none", "always", average=check_bool("goal.mining.all_negatives: average", average))


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


RULES: dict[str, Callable[..., Mining]] = {
    "hardest": hardest,
    "semi-hard": semi_hard,
    "all": all_negatives,
    "selective": selective,
}


def defaults(name: str) -> dict[str, float | bool]:
    """The default parameters of a rule."""
    return {key: parameter.default for key, parameter in inspect.signature(RULES[name]).parameters.items()}


def bind(mining: str | Mining) -> Mining:
    """A `Mining` from the user's argument `mining=`."""
    if isinstance(mining, Mining):
        return mining
    if not isinstance(mining, str):
        raise TypeError(f"mining must be a name or an object such as goal.mining.hardest(), got {mining!r}.")
    if spell(mining) not in RULES:
        raise unknown("mining", mining, list(RULES))
    return RULES[spell(mining)]()
