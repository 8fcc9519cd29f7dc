"""T × P: the product of a triplet weight and a pair weight, which defines the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal.terms.term import STATISTICS, Term


class Weights(NamedTuple):
    """T, P⁺ and P⁻ of triplets: tensors that broadcast with their similarities, or plain numbers."""

    T: Any
    P_pos: Any
    P_neg: Any

    def narrowed(self, dtype: torch.dtype) -> Weights:
        """The same in another dtype, P saturated to it."""
        limit = torch.finfo(dtype).max ** 0.5
        t, *pair = (
            one.to(dtype) if isinstance(one, Tensor) else one
            for one in (self.T, *(_saturate(one, limit) for one in self[1:]))
        )
        return Weights(t, *pair)

    def coefficients(self, share: Any) -> tuple[Any, Any]:
        """The pull of the triplets at s⁺ and their push at s⁻: m·T·P⁺ and m·T·P⁻, the equation of every objective.

        Args:
            share: m, the weight of each triplet.
        """
        selected = share * self.T
        return selected * self.P_pos, selected * self.P_neg


@dataclass(frozen=True)
class Product:
    """T × P: the triplet weight and the pair weight that define the gradient."""

    T: Term
    P: Term

    @property
    def statistics(self) -> tuple[str, ...]:
        """The relative similarities that either term declares."""
        return tuple(dict.fromkeys((*self.T.statistics, *self.P.statistics)))

    def read_by(self, statistic: str) -> Any:
        """The parameter that a declared statistic reads from the term that declares it."""
        term = self.P if statistic in self.P.statistics else self.T
        return term.params[str(STATISTICS[statistic])]

    def weights(self, s_pos: Tensor, s_neg: Tensor, relative: Mapping[str, Tensor]) -> Weights:
        """T, P⁺, P⁻ at these similarities.

        P is clamped to √finfo.max, the largest similarity whose square is representable. Otherwise extreme similarities
        would carry its exponentials and products out of the dtype's range.
        """
        t = self.T(s_pos, s_neg, **{name: relative[name] for name in self.T.statistics})
        p_pos, p_neg = self.P(s_pos, s_neg, **{name: relative[name] for name in self.P.statistics})
        limit = torch.finfo(s_neg.dtype).max ** 0.5
        return Weights(t, _saturate(p_pos, limit), _saturate(p_neg, limit))

    def value(self, s_pos: Tensor, s_neg: Tensor) -> Tensor:
        """l(s⁺, s⁻): the loss whose gradient is T × P if the terms register it, else the violation s⁻ − s⁺."""
        potential = self.P.definition.potentials.get(self.T.name) or self.T.definition.potentials.get(self.P.name)
        if potential is not None:
            function, names = potential
            params = {**self.P.params, **self.T.params}
            loss = function(s_pos, s_neg, **{name: params[name] for name in names})
            if loss is not None:
                return loss
        return s_neg - s_pos

    def separate(self, like: Tensor) -> bool:
        """Whether T is a plain number, so that pull and push do not depend on each other."""
        zero = like.new_zeros(())
        return not isinstance(self.T(zero, zero, **dict.fromkeys(self.T.statistics, zero)), Tensor)

    def split(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), 0-d, at which the parts of a loss that is a sum vanish: l(s⁺, b) depends on s⁺ alone, l(a, s⁻) on s⁻.

        Softplus forms vanish far away, at (∞, −∞); other losses at (1, 0) or at (0, 0).
        """
        far, one, zero = like.new_tensor(torch.finfo(like.dtype).max ** 0.25), like.new_ones(()), like.new_zeros(())
        vanishes, at_one = self.value(far, -far) == 0, self.value(one, zero) == 0
        return torch.where(vanishes, far, torch.where(at_one, one, zero)), torch.where(vanishes, -far, zero)


def _saturate(weight: Any, limit: float) -> Any:
    return weight.clamp(-limit, limit) if isinstance(weight, Tensor) else weight
