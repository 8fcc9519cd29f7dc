"""A map of the literature: every T × P as its loss, or as a field that is the gradient of no loss."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from goal.lab.field import field_of, gradient_of, scattered
from goal.lab.progress import progress
from goal.lab.verdict import Integrability, integrability
from goal.terms import Definition, Product, Term
from goal.terms import P as PAIRS
from goal.terms import T as TRIPLETS

# The triplet losses that have a name; they ask for the parameters of either term by theirs.
LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "linear triplet": lambda s_pos, s_neg: s_neg - s_pos,
    "triplet": lambda s_pos, s_neg, *, margin: torch.relu(s_neg - s_pos + margin),
    "squared triplet": lambda s_pos, s_neg, *, margin: torch.relu(s_neg - s_pos + margin).square(),
    "NCA, InfoNCE with one negative": lambda s_pos, s_neg, *, tau: softplus(tau * (s_neg - s_pos), threshold=40),
    "exponential triplet": lambda s_pos, s_neg, *, tau: torch.exp(tau * (s_neg - s_pos)),
    "circle": lambda s_pos, s_neg, *, tau: softplus(tau * ((1 - s_pos) ** 2 + s_neg**2 - 0.5), threshold=40),
    "squares of 1 − s⁺ and s⁻": lambda s_pos, s_neg: (1 - s_pos) ** 2 + s_neg**2,
    "binomial deviance": lambda s_pos, s_neg, *, alpha, beta, lam: (
        softplus(-alpha * (s_pos - lam), threshold=40) / alpha + softplus(beta * (s_neg - lam), threshold=40) / beta
    ),
}


def known_loss(product: Product) -> str | None:
    """The name of the loss whose gradient T × P is, up to a positive factor; None if it has none of those names.

    Compared at 400 points of [−1, 1]², to nine digits.

    Example:
        >>> import goal
        >>> from goal.terms import Product
        >>> known_loss(Product(goal.T.cir(), goal.P.lin()))
        'circle'
    """
    params = {**product.P.params, **product.T.params}
    points = scattered(400, seed=3)
    true = torch.cat(field_of(product)(*points))
    for name, loss in LOSSES.items():
        asked = list(inspect.signature(loss).parameters)[2:]
        if any(params.get(parameter) is None for parameter in asked):
            continue
        given: dict[str, Any] = {parameter: params[parameter] for parameter in asked}

        def bound(s_pos: Tensor, s_neg: Tensor, of: Callable[..., Tensor] = loss, given: Any = given) -> Tensor:
            return of(s_pos, s_neg, **given)

        found = torch.cat(gradient_of(bound)(*points))
        factor = (true @ found) / (found @ found)
        if factor > 0 and (true - factor * found).abs().max() <= 1e-9 * true.abs().max():
            return name
    return None


class Table(NamedTuple):
    """T × P with a verdict in each cell; prints as Markdown."""

    rows: list[str]  # triplet weights
    columns: list[str]  # pair weights
    cells: list[list[Integrability]]

    def text(self, row: int, column: int) -> str:
        """A cell's verdict in a few words."""
        found = self.cells[row][column]
        if found.integrable:
            return known_loss(Product(found.T, found.P)) or "a loss without a name"
        if found.coupling:
            return "new: not integrable, moved by other pairs"
        return f"new: not integrable, {100 * found.rotational_share:.2g} % rotational"

    def __str__(self) -> str:
        head = ["T \\ P", *self.columns]
        rows = [[row, *(self.text(i, j) for j in range(len(self.columns)))] for i, row in enumerate(self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def table(T: Sequence[str | Term | Definition] = (), P: Sequence[str | Term | Definition] = ()) -> Table:
    """Which losses the products of T and P are: each cell computed by `integrability`, each name by `known_loss`.

    Args:
        T: triplet weights; by default all that are registered, and con with a margin of 0.2.
        P: pair weights; by default all that are registered.

    Example:
        >>> from goal import lab
        >>> print(lab.table(["nca", "cir"], ["con", "lin"]))
        | T \\ P | con | lin |
        | --- | --- | --- |
        | nca | NCA, InfoNCE with one negative | new: not integrable, 8.7 % rotational |
        | cir | new: not integrable, 5.3 % rotational | circle |
    """
    rows = [TRIPLETS.bind(each) for each in T or [*TRIPLETS, TRIPLETS["con"](margin=0.2)]]
    columns = [PAIRS.bind(each) for each in P or list(PAIRS)]
    cells: list[list[Integrability]] = [[] for _ in rows]
    with progress("T × P", len(rows) * len(columns)) as show:
        for i, j in itertools.product(range(len(rows)), range(len(columns))):
            cells[i].append(integrability(rows[i], columns[j]))
            show(i * len(columns) + j + 1)
    return Table([_short(row) for row in rows], [_short(column) for column in columns], cells)


def _short(term: Term) -> str:
    """A term's name, with those parameters that are not at their default."""
    params = term.definition.defaults
    changed = ", ".join(f"{name}={value:g}" for name, value in term.params.items() if value != params[name])
    return term.name + (f"({changed})" if changed else "")
