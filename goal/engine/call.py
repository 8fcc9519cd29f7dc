"""A checked call: the data of an objective, in the form that every path takes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal import validation
from goal.engine.functorch import inside, outside, plain
from goal.engine.types import Needs


class Call(NamedTuple):
    """The checked data of a call: plain tensors, detached."""

    x: Tensor  # (N, D) in its own dtype; or the similarity matrix S (N, M)
    y: Tensor  # (M, D); (M, 0) beside a similarity matrix
    ids: Tensor | None  # (N,) int64
    y_ids: Tensor | None  # (M,) int64; `ids` itself if the caller gave no y_ids
    weight: Tensor | None  # (K,) or (2, K), >= 0
    needs: Needs  # whether x and y need a gradient
    finite: bool  # whether the entries were checked to be finite
    inputs: tuple[Tensor, Tensor]  # x and y as the caller gave them: the gradient goes to these
    one_set: bool = False  # y is x: a single set of labelled rows


class Arguments(NamedTuple):
    """The data of a call as the caller gave them; `goal.apply` describes them."""

    x: object
    y: object = None  # None: x is a similarity matrix, or a single set of rows
    ids: object = None
    y_ids: object = None
    weight: object = None
    check_finite: bool | None = None
    needs: Needs | None = None  # by default, whether x and y require grad
    ordinary: bool = False  # for a loss with autograd, which torch.func's transforms handle by themselves
    one_set: bool = False  # x alone, with ids

    def checked(self, even: bool = False) -> Call:
        """The checked call; `even`: x and y must have the same number of rows, as over ranks.

        Raises:
            ValueError, TypeError: as `goal.apply`.
            RuntimeError: for tensors of torch.func.vmap or with a forward-mode tangent.
        """
        if self.one_set:
            x: Any = self.x
            again = x.view_as(x) if torch.compiler.is_compiling() else x  # a graph takes a tensor for one input alone
            return self._replace(y=again, one_set=False)._checked_set(even)
        given: tuple[Any, ...] = self[:5]
        x, y, ids, y_ids, weight = given if self.ordinary else plain(*given)
        needs, wrapped = self.needed(), inside() and not self.ordinary
        with nullcontext() if self.ordinary else outside():
            if y is None:
                x = validation.similarity_matrix(x)
                y, named = x.new_empty(x.shape[1], 0), {"S": x}
            else:
                x, y = validation.embeddings(x, y)
                named = {"x": x, "y": y}
            n, m = x.shape[0], y.shape[0]
            if even and n != m:
                raise ValueError(
                    f"x and y must have the same number of rows on each rank with group=, got {n} and {m}."
                )
            finite = validation.checks_finite(self.check_finite, x)
            ids, y_ids = validation.identities(ids, y_ids, n, m, x.device)
            weight = validation.anchor_weight(weight, min(n, m), x.device, finite)
            if finite:
                validation.finite(**named)
            inputs = (self.x, y if self.y is None else self.y) if wrapped else (x, y)
            return Call(x.detach(), y.detach(), ids, y_ids, weight, needs, finite, inputs)  # type: ignore[arg-type]

    def _checked_set(self, even: bool) -> Call:
        """The checked call of a single set, whose rows are x and y."""
        if self.ids is None:
            raise ValueError("ids must be given where y is left out: the labels of x, by which rows are positives.")
        if self.y_ids is not None:
            raise ValueError("y_ids is given where y is left out: ids are the labels of all rows.")
        return self.checked(even)._replace(one_set=True)

    def needed(self) -> Needs:
        """Whether x and y need a gradient; works for unchecked arguments."""
        if self.needs is not None:
            return self.needs
        tracked = torch.is_grad_enabled()
        of_x, of_y = (tracked and isinstance(side, Tensor) and side.requires_grad for side in self[:2])
        return of_x, of_y
