"""The objectives of the literature by name, including ordinary losses of the full matrix S for comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from goal import mining, positives, terms, validation
from goal.distributed.exchange import ranks
from goal.distributed.rows import batch_of
from goal.engine.backend import computing_dtype
from goal.engine.call import Arguments
from goal.engine.functorch import no_autocast
from goal.engine.settings import directions_of
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


# ── recipes: the arguments of an objective from the numbers of its paper ────────────────────────────────────────────


class Recipe(NamedTuple):
    """An objective of the literature."""

    arguments: Callable[..., dict[str, Any]]  # its parameters → arguments of `Objective`
    fixed: tuple[str, ...] = ()  # arguments that cannot be changed: its parameters stand in several of them
    averages: bool = False  # the mean of both directions, so that a single direction counts twice

    @property
    def defaults(self) -> dict[str, Any]:
        """The parameters with their defaults."""
        return {name: parameter.default for name, parameter in inspect.signature(self.arguments).parameters.items()}

    def objective(self, **given: Any) -> dict[str, Any]:
        """The arguments of `Objective`, from the recipe's parameters and other arguments of `Objective`."""
        own = {name: value for name, value in given.items() if name in self.defaults}
        made = self.arguments(**own)
        if self.averages and directions_of(given.get("directions", "both")) != "both":
            made["scale"] = 2 * made["scale"]
        return {**made, **{name: value for name, value in given.items() if name not in own}}


def _vse0(margin: float = 0.2) -> dict[str, Any]:
    every = mining.all_negatives(average=False)
    return {"T": terms.T.con(margin=margin), "P": "con", "mining": every, "reduction": "sum"}


def _vse_plus(margin: float = 0.2) -> dict[str, Any]:
    return {**_vse0(margin), "mining": "hardest"}


def _vse_plus_soft(margin: float = 0.2, tau: float = 20.0) -> dict[str, Any]:
    return {**_vse0(margin), "mining": mining.soft(tau)}


def _t_selhn(margin: float = 0.2) -> dict[str, Any]:
    return {"T": terms.T.con(margin=margin), "P": "con", "mining": "selective"}


def _order0(margin: float = 0.05) -> dict[str, Any]:
    return {**_vse0(margin), "similarity": "order"}


def _order_plus(margin: float = 0.05) -> dict[str, Any]:
    return {**_vse_plus(margin), "similarity": "order"}


def _circle(tau: float = 10.0) -> dict[str, Any]:
    return {"T": terms.T.cir(tau=tau), "P": "lin"}


def _circle_loss(tau: float = 80.0) -> dict[str, Any]:
    rule = mining.soft(tau, hardness="square", level="root", at="each")
    return {**_circle(tau), "mining": rule, "scale": 2 * tau}


def _nca(tau: float = 10.0) -> dict[str, Any]:
    return {"T": terms.T.nca(tau=tau), "P": "con"}


def _binomial_deviance(alpha: float = 2.0, beta: float = 10.0, lam: float = 0.5) -> dict[str, Any]:
    return {"T": "con", "P": terms.P.sig(alpha=alpha, beta=beta, lam=lam)}


def _multi_similarity(
    alpha: float = 2.0, beta: float = 10.0, lam: float = 0.5, self_term: bool = False
) -> dict[str, Any]:
    return {"T": "con", "P": terms.P.sig_ms(alpha=alpha, beta=beta, lam=lam, self_term=self_term)}


def _goal(
    tau: float = 10.0, alpha: float = 2.0, beta: float = 10.0, lam: float = 0.5, self_term: bool = False
) -> dict[str, Any]:
    return {**_multi_similarity(alpha, beta, lam, self_term), "T": terms.T.cir(tau=tau)}


def _infonce(tau: float = 20.0) -> dict[str, Any]:
    return {"T": terms.T.nca(tau=tau), "P": "con", "mining": mining.soft(tau), "scale": tau / 2}


def _dcl(tau: float = 20.0) -> dict[str, Any]:
    return {**_infonce(tau), "T": "con"}


def _hardness_infonce(tau: float = 20.0, alpha: float = 5.0) -> dict[str, Any]:
    return {**_infonce(tau), "mining": mining.soft(tau, alpha=alpha)}


def _supcon(tau: float = 10.0) -> dict[str, Any]:
    every = {"mining": mining.soft(tau, over="candidates"), "positives": positives.soft(0.0)}
    return {"T": "con", "P": "con", **every, "scale": tau}


def _soft_targets(tau: float = 1 / 0.07) -> dict[str, Any]:
    return {**_supcon(tau), "scale": tau / 2}


_TIED = ("T", "P", "mining", "positives", "scale")
_RECIPES: dict[str, Recipe] = {
    "vse0": Recipe(_vse0),
    "vse++": Recipe(_vse_plus),
    "vse++-soft": Recipe(_vse_plus_soft),
    "t-selhn": Recipe(_t_selhn),
    "order0": Recipe(_order0),
    "order++": Recipe(_order_plus),
    "circle": Recipe(_circle),
    "circle-loss": Recipe(_circle_loss, _TIED),
    "nca": Recipe(_nca),
    "binomial-deviance": Recipe(_binomial_deviance),
    "multi-similarity": Recipe(_multi_similarity),
    "goal": Recipe(_goal),
    "infonce": Recipe(_infonce, _TIED, averages=True),
    "dcl": Recipe(_dcl, _TIED, averages=True),
    "hardness-infonce": Recipe(_hardness_infonce, _TIED, averages=True),
    "supcon": Recipe(_supcon, _TIED),
    "soft-targets": Recipe(_soft_targets, _TIED, averages=True),
}


def recipes() -> tuple[str, ...]:
    """The names that `goal.recipe` knows.

    Example:
        >>> import goal
        >>> "vse++" in goal.recipes()
        True
    """
    return (*_RECIPES, "siglip")


def parameters(name: str) -> dict[str, Any]:
    """The parameters of a recipe, with their defaults.

    >>> parameters("infonce")
    {'tau': 20.0}
    """
    if name in _RECIPES:
        return _RECIPES[name].defaults
    own = inspect.signature(SigLIP).parameters.items()
    return {key: one.default for key, one in own if one.kind is one.POSITIONAL_OR_KEYWORD}


def settable(name: str, argument: str) -> bool:
    """Whether an argument of `goal.Objective` can be given beside a recipe.

    >>> settable("infonce", "mining"), settable("vse++", "mining")
    (False, True)
    """
    return name in _RECIPES and argument not in _RECIPES[name].fixed


def recipe(name: str, **overrides: Any) -> nn.Module:
    """An objective of the literature by name.

    | name | objective | source |
    |---|---|---|
    | `vse0`, `vse++` | con(m) × con over all negatives or the hardest, sum, m = 0.2 | Faghri et al., 2018, eq. 5, 6 |
    | `vse++-soft` | con(m) × con, soft(τ), sum: the hinge of a smooth maximum | this project |
    | `t-selhn` | con(m) × con, selective mining, mean | Li et al., RVSE++, T-SelHN |
    | `order0`, `order++` | as vse0, vse++, m = 0.05, on order embeddings of abs(x), abs(y) | Vendrov et al., 2016 |
    | `infonce` | nca(τ) × con, soft(τ), scale τ/2: the symmetric cross entropy | Oord et al., 2018; CLIP, 2021 |
    | `dcl` | con × con, soft(τ), scale τ/2: without the positive in the sum | Yeh et al., ECCV 2022 |
    | `hardness-infonce` | nca(τ) × con, shares by e^{(τ+α)s}, scale τ/2: no loss has it | Lan et al., LLaVE, 2025 |
    | `supcon` | con × con, soft(τ) over candidates, the mean of the positives by ids, scale τ | Khosla et al., 2020 |
    | `soft-targets` | the same, scale τ/2, 1/τ = 0.07: equal ids share the target | Li et al., ALBEF, 2021 |
    | `circle-loss` | cir(τ) × lin, shares by e^{τs²}, P⁻ at each negative, scale 2τ | Sun et al., CVPR 2020 |
    | `circle` | cir × lin, the hardest negative | the same |
    | `nca` | nca × con, the hardest negative | Goldberger et al., 2004 |
    | `binomial-deviance` | con × sig, the hardest negative | Yi et al., 2014 |
    | `multi-similarity` | con × sig-ms, the hardest negative | Wang et al., CVPR 2019 |
    | `goal` | cir × sig-ms | Xuan & Chen, WACV 2023 |
    | `siglip` | an ordinary loss with autograd | see `SigLIP` |

    Args:
        name: one of `goal.recipes()`.
        **overrides: numbers of the recipe (`tau=`, `margin=`, …), and arguments of `goal.Objective` (or of `SigLIP`)
            to change. Where a number stands in several of these, as τ in `infonce`, they cannot be given. A recipe that
            is the mean of both directions is, with `directions="x→y"`, that of the direction that is left.

    Returns:
        A module to call with (x, y): L2-normalised embeddings, but |x|, |y| unnormalised for the order recipes.

    Example:
        >>> import goal
        >>> goal.recipe("vse++", reduction="mean")
        Objective(con(margin=0.2) × con)
    """
    if not isinstance(name, str) or name not in recipes():
        raise unknown("name", name, recipes())
    if name == "siglip":
        known = inspect.signature(SigLIP).parameters
        if stray := [argument for argument in overrides if argument not in known]:
            raise TypeError(f"{stray[0]} cannot be set: siglip has its own. It takes {', '.join(known)}.")
        return SigLIP(**overrides)
    if given := [argument for argument in _RECIPES[name].fixed if argument in overrides]:
        raise TypeError(f"{given[0]} cannot be set: {name} has its own. Write T × P with goal.Objective instead.")
    return Objective(**_RECIPES[name].objective(**overrides))


class InfoNCE(Objective):
    """The symmetric cross entropy over the batch, −log softmax(τ s)ᵢᵢ, averaged over both directions.

    It is nca(τ) × con with soft(τ) mining and scale τ/2: `goal.recipe("infonce")`.

    Args:
        tau: inverse temperature, > 0.
        **rest: arguments of `goal.Objective`, but those that τ stands in.

    Example:
        >>> import goal, torch
        >>> x = torch.eye(3, requires_grad=True)
        >>> goal.InfoNCE(tau=20.0)(x, torch.eye(3)).backward()

    Source: van den Oord et al., 2018; Radford et al. (CLIP), 2021, fig. 3, with a fixed temperature.
    """

    def __init__(self, tau: float = 20.0, **rest: Any) -> None:
        super().__init__(**_RECIPES["infonce"].objective(tau=tau, **rest))
