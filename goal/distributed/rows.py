"""What each rank brings to a call, checked, and the global batch that it makes with all others'.

`gathered` is for losses of the whole matrix S, which every rank then computes; `goal.distributed` shares the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from goal import validation
from goal.distributed.exchange import Ranks, Wire, agree, pack, ranks, unpack
from goal.engine import path as engine

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# ── own arguments ───────────────────────────────────────────────────────────────────────────────────────────────────


class Local(NamedTuple):
    """This rank's arguments, checked."""

    x: Tensor  # (n, D), as they came
    y: Tensor  # (n, D)
    ids: Tensor | None  # (n,) int64
    y_ids: Tensor | None  # (n,); `ids` itself where none were given
    weight: Tensor | None  # (n,) or (2, n)
    finite: bool

    def described(self) -> dict[str, object]:
        """What of it has to be the same on all ranks."""
        return {
            "D": self.x.shape[1],
            "x.dtype": self.x.dtype,
            "y.dtype": self.y.dtype,
            "ids": "none" if self.ids is None else "given",
            "y_ids": "none" if self.y_ids is self.ids else "given",
            "weight": None if self.weight is None else "(K,)" if self.weight.dim() == 1 else "(2, K)",
            "check_finite": self.finite,
        }

    def columns(self) -> list[Tensor]:
        """Ids and weights, a row for each pair, as they are sent."""
        dtype = engine.computing_dtype(self.x, self.y)
        weight = None if self.weight is None else self.weight.to(dtype).movedim(-1, 0)
        y_ids = None if self.y_ids is self.ids else self.y_ids
        return [one for one in (self.ids, y_ids, weight) if one is not None]

    def of_all(self, columns: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """ids, y_ids and weight of all pairs, from all ranks' columns."""
        *ids, weight = columns if self.weight is not None else [*columns, None]
        rows, cols = (ids[0], ids[-1]) if ids else (None, None)
        return rows, cols, None if weight is None else weight.movedim(0, -1)


def local(x: object, y: object, ids: object, y_ids: object, weight: object, check_finite: bool | None) -> Local:
    x, y = validation.embeddings(x, y)
    n, m = len(x), len(y)
    if n != m:
        raise ValueError(f"x and y must have the same number of rows on each rank with group=, got {n} and {m}.")
    finite = validation.checks_finite(check_finite, x)
    rows, cols = validation.identities(ids, y_ids, n, m, x.device)
    scale = validation.anchor_weight(weight, n, x.device, finite)
    if finite:
        validation.finite(x=x, y=y)
    return Local(x.detach(), y.detach(), rows, cols, scale, finite)


# ── all rows on every rank ──────────────────────────────────────────────────────────────────────────────────────────


class Global(NamedTuple):
    """The rows of all ranks, one rank after the other."""

    x: Tensor  # (K, D); the own rows take the gradient, the others are constant
    y: Tensor  # (K, D)
    ids: Tensor | None  # (K,)
    y_ids: Tensor | None  # (K,)
    weight: Tensor | None  # (K,) or (2, K)


def gathered(
    x: Tensor,
    y: Tensor,
    ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    group: ProcessGroup | str = "world",
    averaged: bool = False,
    what: str = "",
) -> Global:
    """The global batch, for a loss that has no `group=` of its own: every rank computes all of it.

    The value is then the same on every rank, and the gradient at x and y exactly that of the global loss for the own
    rows: since all ranks compute one and the same function, nothing has to be sent in backward. It takes the work and
    the memory of the global batch on every rank; objectives with `group=` share them out. All ranks call it together.

    Args:
        x, y: (n, D) own rows, pairs in order; n may differ from rank to rank.
        ids, y_ids, weight: (n,), weight also (2, n), as for `goal.apply`.
        group: a `ProcessGroup`, or `"world"`.
        averaged: multiply the gradient at x and y by the number of ranks, for DDP and FSDP, which average that of
            parameters. Parameters of the loss itself get their whole gradient on every rank: leave those alone.
        what: has to be the same on all ranks, such as the loss and its numbers.

    Returns:
        `Global`.

    Raises:
        ValueError, TypeError: on all ranks, naming those whose arguments are refused, or differ and in what.

    Example:
        >>> import goal, tempfile, torch
        >>> from goal.distributed import gathered
        >>> store = tempfile.mkdtemp() + "/store"
        >>> torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        >>> x, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
        >>> every = gathered(x, y, averaged=True)
        >>> loss = torch.nn.functional.cross_entropy(every.x @ every.y.T, torch.arange(len(every.x)))
        >>> loss.backward()
        >>> torch.distributed.destroy_process_group()
    """
    checked = ranks(group, averaged, "gather")
    if checked is None:
        raise TypeError("group must be a torch.distributed.ProcessGroup or 'world', got None.")
    return whole(checked, what, x, y, ids, y_ids, weight)


def whole(
    ranks: Ranks | None,
    what: object,  # its text has to be the same on all ranks; made only where there are any
    x: Tensor,
    y: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    weight: Tensor | None = None,
    check_finite: bool | None = False,
) -> Global:
    """The batch: that of all ranks, as `gathered` says, or where there are none, what came."""
    if ranks is None:
        return Global(x, y, ids, y_ids, weight)
    if torch.compiler.is_compiling():  # a graph ends here, and another begins
        inner: Any = torch.compiler.disable(whole)
        found: Global = inner(ranks, what, x, y, ids, y_ids, weight, check_finite)
        return found
    wire, own, error = Wire(ranks.group), None, None
    arguments: dict[str, object] = {}
    try:
        own = local(x, y, ids, y_ids, weight, check_finite)
        arguments = {"what": what, "averaged": ranks.averaged, **own.described()}
    except (TypeError, ValueError) as refused:
        error = refused
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    counts = agree(wire, 0 if own is None else len(own.x), arguments, error, (False, False), (0.0, 0.0), device).counts
    assert own is not None
    columns = [own.x, own.y, *own.columns()]
    all_x, all_y, *rest = unpack(wire.gather(pack(*columns), counts).wait(), columns)
    start = sum(counts[: wire.rank])
    here, by = slice(start, start + len(own.x)), wire.size if ranks.averaged else 1
    rows, cols, scale = own.of_all(rest)
    return Global(_live(all_x, x, here, by), _live(all_y, y, here, by), rows, cols, scale)


def _live(every: Tensor, own: Tensor, here: slice, by: int) -> Tensor:
    """All ranks' rows, the own ones as they came, with their gradient multiplied by a number."""
    if own.requires_grad and by != 1:
        own = own.view_as(own)
        own.register_hook(lambda gradient: gradient * by)
    return torch.cat([every[: here.start], own, every[here.stop :]])


def shared_seed(ranks: Ranks, device: torch.device) -> int:
    """A random number of rank 0, the same on all ranks, which all draw one."""
    wire, drawn = Wire(ranks.group), torch.randint(2**62, (1, 1), device=device)
    return int(wire.gather(drawn.view(torch.uint8), [1] * wire.size).wait().view(torch.int64)[0])
