"""The objectives of the literature by name, including ordinary losses of the full matrix S for comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from goal import mining, terms, validation
from goal.distributed.exchange import ranks
from goal.distributed.rows import batch_of
from goal.engine.backend import computing_dtype
from goal.engine.call import Arguments
from goal.engine.functorch import no_autocast
from goal.names import unknown
from goal.objective import Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Yardstick(nn.Module):
    """Base class of ordinary losses of the full matrix S, with autograd; arguments and checks as for all objectives.

    Args:
        check_finite, group, averaged: as for `goal.apply`; every rank computes the full loss
            (`goal.distributed.gathered`).
    """

    def __init__(self, check_finite: bool | None, group: ProcessGroup | str | None, averaged: bool) -> None:
        super().__init__()
        self.check_finite = check_finite
        self.ranks = ranks(group, averaged, "gather")

    def forward(self, x: Tensor, y: Tensor, ids: Tensor | None = None, y_ids: Tensor | None = None) -> Tensor:
        """The loss for (N, D) and (M, D) embeddings; 0-d."""
        arguments = Arguments(x, y, ids, y_ids, None, self.check_finite, ordinary=True)
        call = batch_of(arguments, self.ranks, self.ranks and self._agreed())
        (x, y), rows, cols = call.inputs, call.ids, call.y_ids
        dtype = computing_dtype(x, y)
        with no_autocast(x.device.type):
            s = x.to(dtype) @ y.to(dtype).T
            same = torch.zeros_like(s, dtype=torch.bool)
            if rows is not None and cols is not None:
                same = rows[:, None] == cols
                same.fill_diagonal_(False)
            return self._loss(s, same)

    def _loss(self, s: Tensor, same: Tensor) -> Tensor:
        """The loss of S (N, M); `same` (N, M) is true at equal ids off the pairs."""
        raise NotImplementedError

    def _agreed(self) -> str:
        """A text that must be the same on all ranks."""
        return str(self)


class InfoNCE(Yardstick):
    """The symmetric cross entropy over the batch, −log softmax(τ s)ᵢᵢ, averaged over both directions; plain autograd.

    Args:
        tau: inverse temperature, > 0.
        check_finite, group, averaged: as for `goal.apply`; every rank computes the full loss
            (`goal.distributed.gathered`).

    Example:
        >>> import goal, torch
        >>> x = torch.eye(3, requires_grad=True)
        >>> goal.InfoNCE(tau=20.0)(x, torch.eye(3)).backward()

    Source: Oord et al., 2018; Radford et al. (CLIP), 2021, fig. 3, with a fixed temperature.
    """

    def __init__(
        self,
        tau: float = 20.0,
        *,
        check_finite: bool | None = None,
        group: ProcessGroup | str | None = None,
        averaged: bool = False,
    ) -> None:
        super().__init__(check_finite, group, averaged)
        self.tau = validation.check_number("goal.recipe('infonce')", "tau", tau)

    def _loss(self, s: Tensor, same: Tensor) -> Tensor:
        s = (self.tau * s).masked_fill(same, -torch.inf)
        k = min(s.shape)
        target = torch.arange(k, device=s.device)
        return (cross_entropy(s[:k], target) + cross_entropy(s[:, :k].T, target)) / 2

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


class SigLIP(Yardstick):
    """−Σᵢⱼ log σ(zᵢⱼ(e^t s + b)) / K with z = 1 at the pairs and −1 elsewhere; t and b are learned; plain autograd.

    t and b are the parameters `log_tau` and `bias`, float32 of shape (1,), as wrappers that shard parameters require.
    Older state dicts, with 0-d parameters, still load.

    Args:
        tau: initial e^t, > 0.
        bias: initial b.
        check_finite, group, averaged: as for `goal.apply`; every rank computes the full loss
            (`goal.distributed.gathered`). t and b get their full gradient on every rank, so they need no
            `DistributedDataParallel`; they must be equal on all ranks.

    Example:
        >>> import goal, torch
        >>> loss = goal.SigLIP()(torch.eye(3), torch.eye(3))
        >>> loss.backward()  # t and b are parameters: give them to the optimiser

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, algorithm 1.
    """

    def __init__(
        self,
        tau: float = 10.0,
        bias: float = -10.0,
        *,
        check_finite: bool | None = None,
        group: ProcessGroup | str | None = None,
        averaged: bool = False,
    ) -> None:
        super().__init__(check_finite, group, averaged)
        checked = [validation.check_number("goal.recipe('siglip')", *one) for one in (("tau", tau), ("bias", bias))]
        device = validation.device_of_values()
        t, b = (torch.tensor([one], dtype=torch.float32, device=device) for one in checked)
        self.log_tau, self.bias = nn.Parameter(t.log()), nn.Parameter(b)

    def _loss(self, s: Tensor, same: Tensor) -> Tensor:
        if self.bias.device != s.device:
            where = f"x and y are on {s.device} and t and b on {self.bias.device}"
            raise ValueError(f"{where}: move the objective by .to({str(s.device)!r}).")
        t, b = self.log_tau.to(s.dtype), self.bias.to(s.dtype)  # (1,)
        z = -torch.ones_like(s)
        z.fill_diagonal_(1.0)
        each = logsigmoid(z * (t.exp() * s + b))
        return -each.masked_fill(same, 0).sum() / min(s.shape)

    def _agreed(self) -> str:
        return f"SigLIP(log_tau={self.log_tau.item()}, bias={self.bias.item()})"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("log_tau", "bias"):  # 0-d in earlier versions
            if prefix + name in state_dict and state_dict[prefix + name].dim() == 0:
                state_dict[prefix + name] = state_dict[prefix + name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _objective(**fixed: Any) -> Callable[..., nn.Module]:
    return lambda **overrides: Objective(**{**fixed, **overrides})


_HINGE, _ORDER_HINGE = terms.T.con(margin=0.2), terms.T.con(margin=0.05)
_SUM_OF_HINGES = mining.all_negatives(average=False)
_RECIPES: dict[str, Callable[..., nn.Module]] = {
    "vse0": _objective(T=_HINGE, P="con", mining=_SUM_OF_HINGES, reduction="sum"),
    "vse++": _objective(T=_HINGE, P="con", mining="hardest", reduction="sum"),
    "t-selhn": _objective(T=_HINGE, P="con", mining="selective"),
    "order0": _objective(T=_ORDER_HINGE, P="con", mining=_SUM_OF_HINGES, reduction="sum", similarity="order"),
    "order++": _objective(T=_ORDER_HINGE, P="con", mining="hardest", reduction="sum", similarity="order"),
    "circle": _objective(T="cir", P="lin"),
    "nca": _objective(T="nca", P="con"),
    "binomial-deviance": _objective(T="con", P="sig"),
    "multi-similarity": _objective(T="con", P="sig-ms"),
    "goal": _objective(T="cir", P="sig-ms"),
    "infonce": InfoNCE,
    "siglip": SigLIP,
}


def recipes() -> tuple[str, ...]:
    """The names that `goal.recipe` knows.

    Example:
        >>> import goal
        >>> "vse++" in goal.recipes()
        True
    """
    return tuple(_RECIPES)


def recipe(name: str, **overrides: Any) -> nn.Module:
    """An objective of the literature by name.

    | name | objective | source |
    |---|---|---|
    | `vse0`, `vse++` | con(0.2) × con over all negatives or the hardest, sum | Faghri et al., BMVC 2018, eq. 5, 6 |
    | `t-selhn` | con(0.2) × con, selective mining, mean | Li et al., RVSE++, T-SelHN |
    | `order0`, `order++` | the same, margin 0.05, on order embeddings of abs(x), abs(y) | Vendrov et al., 2016 |
    | `circle` | cir × lin | Sun et al., Circle loss, CVPR 2020 |
    | `nca` | nca × con | Goldberger et al., 2004; InfoNCE with one negative |
    | `binomial-deviance` | con × sig | Yi et al., 2014 |
    | `multi-similarity` | con × sig-ms | Wang et al., CVPR 2019 |
    | `goal` | cir × sig-ms | Xuan & Chen, WACV 2023 |
    | `infonce`, `siglip` | yardsticks, ordinary losses with autograd | see `InfoNCE`, `SigLIP` |

    Args:
        name: one of `goal.recipes()`.
        **overrides: arguments of `goal.Objective` (or of `InfoNCE`, `SigLIP`) to change.

    Returns:
        A module to call with (x, y): L2-normalised embeddings, but |x|, |y| unnormalised for the order recipes.

    Example:
        >>> import goal
        >>> goal.recipe("vse++", reduction="mean")
        Objective(con(margin=0.2) × con)
    """
    if not isinstance(name, str) or name not in _RECIPES:
        raise unknown("name", name, recipes())
    return _RECIPES[name](**overrides)
