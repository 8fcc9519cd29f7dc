"""Similarities: how S is made from x and y, tile by tile, and how ∂l/∂S goes back.

A similarity answers five questions. Coefficients never know which similarity they belong to.

    embed(x)                    what the tiles are made of: x itself, or x / ‖x‖            (N, D) → (N, D)
    tile(x_block, y_block)      a block of S                                              (n, D), (m, D) → (n, m)
    pairs(x, y, row, col)       single entries S[row, col]; equal pairs are bit-equal     → (E,)
    scatter(...)                Σ over entries G[row, col] = value of G · ∂s/∂x            → (N, D)
    spread(...)                 the same for a whole tile of G                            → (n, D)

`y` has the role of x in the other direction, so one routine serves ∂l/∂x and ∂l/∂y; `side` says which.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from goal.terms import spell, unknown

Side = Literal["x", "y"]


class Dot:
    """s = x·y: the inner product; on unit vectors the cosine."""

    name = "dot"

    def embed(self, x: Tensor) -> Tensor:
        return x

    def tile(self, x_block: Tensor, y_block: Tensor) -> Tensor:
        return x_block @ y_block.T

    def pairs(self, x: Tensor, y: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
        """Entries S[row, col]; None takes the rows of that side as they come."""
        x, y = (x if row is None else x[row]), (y if col is None else y[col])
        return (x * y).sum(1)

    def scatter(self, x: Tensor, y: Tensor, row: Tensor, col: Tensor, value: Tensor, side: Side) -> Tensor:
        """∂l/∂x (side "x") or ∂l/∂y (side "y") of the entries G[row, col] = value; entries may repeat."""
        source, target, at, other = (y, x, row, col) if side == "x" else (x, y, col, row)
        order = torch.argsort(at, stable=True)  # segments of equal targets, summed in source order
        starts = torch.searchsorted(at[order], torch.arange(len(target), device=at.device))
        return embedding_bag(other[order], source, starts, mode="sum", per_sample_weights=value[order])

    def spread(self, x_block: Tensor, y_block: Tensor, g: Tensor, side: Side) -> Tensor:
        """∂l/∂x_block (side "x") or ∂l/∂y_block (side "y") of a tile g = ∂l/∂S, (n, m)."""
        return g @ y_block if side == "x" else g.T @ x_block

    def pull_back(self, x: Tensor, embedded: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at x from the gradient at embed(x)."""
        return gradient


class Cosine(Dot):
    """s = x·y / (‖x‖ ‖y‖): a zero vector has similarity 0 with everything, and gradient 0."""

    name = "cosine"

    def embed(self, x: Tensor) -> Tensor:
        return _divide(x, _norm(x))

    def pull_back(self, x: Tensor, embedded: Tensor, gradient: Tensor) -> Tensor:
        radial = (gradient * embedded).sum(1, keepdim=True)
        return _divide(gradient - radial * embedded, _norm(x))


class Order(Dot):
    """s = −‖max(0, y − x)‖: order embeddings, x images, y captions (Vendrov et al., 2016, eq. 2).

    Where y ≤ x in every coordinate s = 0 and the subgradient is 0.
    """

    name = "order"
    _ELEMENTS = 1 << 22  # of the (n, m, D) block of differences held at once

    def tile(self, x_block: Tensor, y_block: Tensor) -> Tensor:
        rows = max(1, self._ELEMENTS // max(1, y_block.numel()))
        return torch.cat([_violation(part[:, None], y_block) for part in torch.split(x_block, rows)])

    def pairs(self, x: Tensor, y: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
        return _violation(x if row is None else x[row], y if col is None else y[col])

    def scatter(self, x: Tensor, y: Tensor, row: Tensor, col: Tensor, value: Tensor, side: Side) -> Tensor:
        target, at = (x, row) if side == "x" else (y, col)
        return torch.zeros_like(target).index_add_(0, at, _order_gradient(x[row], y[col], value, side))

    def spread(self, x_block: Tensor, y_block: Tensor, g: Tensor, side: Side) -> Tensor:
        rows = max(1, self._ELEMENTS // max(1, y_block.numel()))
        parts = [
            _order_gradient(x_part[:, None], y_block, g_part, side).sum(1 if side == "x" else 0)
            for x_part, g_part in zip(torch.split(x_block, rows), torch.split(g, rows), strict=True)
        ]
        return torch.cat(parts) if side == "x" else torch.stack(parts).sum(0)


class Given(Dot):
    """A matrix S from any model: x is S itself, y is not looked at, and the gradient is G."""

    name = "given"

    def tile(self, x_block: Tensor, y_block: Tensor) -> Tensor:
        return x_block.clone()  # the miner writes into its tiles

    def pairs(self, x: Tensor, y: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
        if row is None and col is None:
            return x.diagonal()
        row = torch.arange(len(x), device=x.device)[: len(col)] if row is None else row  # type: ignore[arg-type]
        return x[row, torch.arange(len(row), device=x.device) if col is None else col]

    def scatter(self, x: Tensor, y: Tensor, row: Tensor, col: Tensor, value: Tensor, side: Side) -> Tensor:
        return torch.zeros_like(x).index_put_((row, col), value, accumulate=True)

    def spread(self, x_block: Tensor, y_block: Tensor, g: Tensor, side: Side) -> Tensor:
        return g


def _norm(x: Tensor) -> Tensor:
    """‖x‖ of each row, (N, 1), exact for any representable norm: squares are taken of x / max|x|."""
    largest = x.abs().amax(1, keepdim=True)
    scaled: Tensor = torch.linalg.vector_norm(_divide(x, largest), dim=1, keepdim=True)
    return scaled * largest


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """x / by, and 0 where by = 0."""
    return torch.where(by == 0, 0, x / by)


def _violation(x: Tensor, y: Tensor) -> Tensor:
    violation: Tensor = torch.linalg.vector_norm((y - x).clamp(min=0), dim=-1)
    return -violation


def _order_gradient(x: Tensor, y: Tensor, value: Tensor, side: Side) -> Tensor:
    """value · ∂s/∂x or value · ∂s/∂y, over the last dimension."""
    gap = (y - x).clamp(min=0)
    gradient = _divide(gap * value[..., None], torch.linalg.vector_norm(gap, dim=-1, keepdim=True))
    return gradient if side == "x" else -gradient


_BY_NAME = {similarity.name: similarity for similarity in (Dot(), Cosine(), Order())}
GIVEN = Given()


def bind(similarity: str) -> Dot:
    """A similarity from what a user passes as `similarity=`."""
    if not isinstance(similarity, str):
        raise TypeError(f"similarity must be one of {', '.join(_BY_NAME)}, got {similarity!r}.")
    if spell(similarity) not in _BY_NAME:
        raise unknown("similarity", similarity, list(_BY_NAME))
    return _BY_NAME[spell(similarity)]
