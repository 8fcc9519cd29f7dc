"""More negatives than the batch has: rows made from embeddings, which objectives mine beside the embeddings themselves.

Rows are made with ordinary differentiable torch, so the gradient at a made row flows back to the rows it comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from goal import validation
from goal.candidates.two_way import TwoWay
from goal.distributed.rows import batch_of, shared_seed
from goal.engine.call import Arguments
from goal.names import unknown
from goal.objective import Objective

_SHORT = 1e-3  # a made row shorter than this is not normalised: its direction is noise, and its gradient huge


class Made(NamedTuple):
    """Rows made from other rows."""

    rows: Tensor  # (A, D), unit, differentiable
    ids: Tensor  # (A,) int64; a row is no negative of anchors with its id


def interpolate(x: Tensor, ids: Tensor, n: int = 2, generator: torch.Generator | None = None) -> Made:
    """n rows on each line between two items of the same id, dividing the line into n + 1 equal parts, with that id.

        x̄ₖ = (k·a + (n + 1 − k)·b) / (n + 1), then x̄ₖ / ‖x̄ₖ‖,    k = 1 … n

    The items of an id stand in a ring in random order, and lines connect neighbours: there is a single line for two
    items, and none for one.

    Args:
        x: (B, D) unit embeddings, differentiable; of both modalities, one after the other, if there are two.
        ids: (B,) integers.
        n: rows on a line, >= 1.
        generator: draws the order, on the device of x; by default torch's own, as for dropout.

    Returns:
        `Made`: rows (A, D) and ids (A,); A is n times the number of lines.

    Raises:
        ValueError, TypeError: for a shape, a dtype or an n that is not allowed.

    Example:
        >>> import torch
        >>> from goal.candidates import interpolate
        >>> made = interpolate(torch.eye(3), torch.tensor([5, 8, 5]), n=1)
        >>> made.rows, made.ids
        (tensor([[0.7071, 0.0000, 0.7071]]), tensor([5]))

    Source: Ko & Gu, "Embedding Expansion", CVPR 2020, §3.1 (one line between the two items of a class; the ring is
    our extension to classes with more items).
    """
    x, ids, n = _checked(x, ids, n)
    shuffle = torch.randperm(len(ids), generator=generator, device=ids.device)
    order, first, size = _groups(ids, shuffle)
    place = torch.arange(len(ids), device=ids.device)
    following = order[first + (place - first + 1) % size]
    line = (size > 2) | ((size == 2) & (place == first))
    a, b = order[line], following[line]
    k = torch.arange(1, n + 1, device=x.device, dtype=x.dtype)[:, None, None] / (n + 1)
    rows = k * x[a] + (1 - k) * x[b]  # (n, lines, D)
    return Made(normalize(rows.flatten(0, 1), dim=1, eps=_SHORT), ids[a].repeat(n))


def mixup(x: Tensor, ids: Tensor, n: int = 2, generator: torch.Generator | None = None) -> Made:
    """n mixtures of each item with random items of other ids; the item has the greater share, and the mixture its id.

        x̄ = λ·a + (1 − λ)·b, then x̄ / ‖x̄‖,    λ uniform in [½, 1]

    A mixture is a negative of every item of another id, including items of b's id, whose share is less than half.

    Args:
        x: (B, D) unit embeddings, differentiable; of both modalities, one after the other, if there are two.
        ids: (B,) integers, not all the same.
        n: mixtures of each item, >= 1; every mixture has another random partner.
        generator: draws λ and the partners, on the device of x; by default torch's own, as for dropout.

    Returns:
        `Made`: rows (n·B, D) and ids (n·B,).

    Raises:
        ValueError, TypeError: for a shape, a dtype or an n that is not allowed, or if all ids are the same.

    Example:
        >>> import torch
        >>> from goal.candidates import mixup
        >>> made = mixup(torch.eye(3), torch.tensor([5, 8, 5]), n=4)
        >>> made.rows.shape, bool((made.rows[:3].diagonal() > 0.7).all())
        (torch.Size([12, 3]), True)

    Source: Zhang et al., "mixup", ICLR 2018, with λ ~ Beta(1, 1) folded at ½; a negative with a share of less than half
    of its query is from Kalantidis et al., "Hard Negative Mixing", NeurIPS 2020, §3.3. Normalising is our addition.
    """
    x, ids, n = _checked(x, ids, n)
    order, first, size = _groups(ids, torch.arange(len(ids), device=ids.device))
    if bool(size[0] == len(ids)):
        raise ValueError("mixup: all ids are the same, so no item has another to be mixed with.")
    draw = torch.rand(2, n, len(ids), generator=generator, device=x.device, dtype=torch.float64)
    place = (draw[0] * (len(ids) - size)).long()  # (n, B) among the items of other ids, before and after the group
    partner = order[place + size * (place >= first)]
    share = (0.5 + draw[1] / 2).to(x.dtype)[..., None]
    rows = share * x[order] + (1 - share) * x[partner]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(ids), device=ids.device)
    return Made(normalize(rows[:, back].flatten(0, 1), dim=1, eps=_SHORT), ids.repeat(n))


def _checked(x: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    x, n = validation.matrix("x", x, "(B, D)"), validation.whole_number("n", n)
    return x, validation.identity("ids", ids, len(x), "x", x.device), n


def _groups(ids: Tensor, shuffle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Items sorted by id, within an id in the order of `shuffle`; the first position and the size of each id's group.

    All three are (B,), by position in the sorted order.
    """
    ordered, within = ids[shuffle].sort(stable=True)
    _, group, sizes = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    return shuffle[within], (sizes.cumsum(0) - sizes)[group], sizes[group]


_BY_NAME: dict[str, Callable[[Tensor, Tensor, int, torch.Generator | None], Made]] = {
    "interpolate": interpolate,
    "mixup": mixup,
}


class Augmented(TwoWay):
    """An objective whose negatives are the batch's rows and rows made from them ("the augmented space").

    With C made from the 2K embeddings, the anchors xᵢ meet the candidates y ∪ C, the anchors yᵢ meet x ∪ C. Pairs,
    anchors and positive sets remain those of the batch. `TwoWay` describes this, and the objective's `group=`; with a
    group all ranks make the same rows.

    Args:
        objective: its T, P and mining are used in the augmented space. Similarity `dot` or `cosine`.
        augment: `interpolate` (within an id) or `mixup` (between ids).
        n: as in `interpolate` or `mixup`.

    Raises:
        ValueError, TypeError: an unknown name, an n that is not allowed, or order embeddings, at construction.

    Example:
        >>> import goal, torch
        >>> from goal.candidates import Augmented
        >>> objective = Augmented(goal.Objective(T="con", P="lin"), augment="interpolate", n=2)
        >>> x, y = torch.eye(4, requires_grad=True), torch.ones(4, 4) / 2
        >>> objective(x, y).backward()
        >>> objective.stats.index >= 4  # for y→x, rows between an x and its y lie nearer than another x
        tensor([[False, False, False, False],
                [ True,  True,  True,  True]])
    """

    def __init__(self, objective: Objective, augment: str = "interpolate", n: int = 2) -> None:
        super().__init__(objective)
        if objective.settings.similarity.name not in ("dot", "cosine"):
            raise ValueError(f"similarity={objective.settings.similarity.name!r}: made rows are unit vectors.")
        if augment not in _BY_NAME:
            raise unknown("augment", augment, list(_BY_NAME))
        self.augment, self.n = augment, validation.whole_number("n", n)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        y_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The scalar for (K, D) and (K, D) embeddings.

        Args:
            x, y: unit vectors, or of any length with similarity `cosine`.
            ids: (K,) integers, by default a different one for each pair.
            y_ids: (K,), by default `ids`.
            weight: (K,) or (2, K), as for `goal.apply`.

        Raises:
            ValueError, TypeError: as `goal.apply`; x and y of different lengths; for `mixup`, if all ids are the same.
                `interpolate` makes no rows if no id has two items.
        """
        over = self.objective.ranks
        call = batch_of(Arguments(x, y, ids, y_ids, weight, self.objective.check_finite), over, self)
        (x, y), k = call.inputs, len(call.x)
        if len(y) != k:
            raise ValueError(f"x and y must have the same number of rows to be augmented, got {k} and {len(y)}.")
        rows, cols = call.ids, call.y_ids
        if rows is None or cols is None:
            rows = cols = torch.arange(k, device=x.device)
        if self.objective.settings.similarity.name == "cosine":
            x, y = normalize(x, dim=1), normalize(y, dim=1)
        generator = None
        if over is not None:
            generator = torch.Generator(x.device).manual_seed(shared_seed(over, x.device))
        made = _BY_NAME[self.augment](torch.cat([x, y]), torch.cat([rows, cols]), self.n, generator)
        if call.finite:
            validation.finite(**{"the made rows": made.rows})
        return self._emit(call._replace(ids=rows, y_ids=cols, inputs=(x, y)), made, made)

    def extra_repr(self) -> str:
        return f"{self.augment}, n={self.n}"
