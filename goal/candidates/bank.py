"""More negatives than the batch has: embeddings of past batches, stored as candidates."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from goal import validation
from goal.candidates.two_way import TwoWay
from goal.distributed.exchange import ranks
from goal.distributed.rows import batch_of
from goal.engine.call import Arguments, Call
from goal.objective import Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Past(NamedTuple):
    """Embeddings of earlier batches."""

    rows: Tensor  # (A, D)
    ids: Tensor  # (A,) int64


class Buffer(nn.Module):
    """A first-in, first-out buffer of the last `size` pushed rows, with their ids: one side of a `Bank`."""

    rows: Tensor
    ids: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = validation.device_of_values()
        rows = torch.zeros(size, dim, dtype=dtype, device=device)
        self.register_buffer("rows", rows)  # the p-th row pushed is stored at p modulo size
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64, device=device))
        self.pushed = 0

    @property
    def held(self) -> Past:
        """The stored rows (A, D) and ids (A,), in no particular order; views, which the next push overwrites."""
        count = min(self.pushed, len(self.rows))
        return Past(self.rows[:count], self.ids[:count])

    def push(self, rows: Tensor, ids: Tensor) -> None:
        """Replace the oldest rows by rows (n, D), in the buffer's dtype."""
        size = len(self.rows)
        first = max(0, len(rows) - size)  # of more rows than fit, only the last are stored
        at = (self.pushed + torch.arange(first, len(rows), device=self.rows.device)) % size
        self.rows.index_copy_(0, at, rows[first:])
        self.ids.index_copy_(0, at, ids[first:])
        self.pushed += len(rows)

    def keep_finite(self) -> int:
        """Remove rows that are not finite, and return their number."""
        fine = self.held.rows.isfinite().all(1)
        count = int((~fine).sum())
        if count:
            first = self.pushed % len(fine) if self.pushed > len(self.rows) else 0
            rows, ids, fine = (each.roll(-first, 0) for each in (*self.held, fine))  # the oldest first
            self.pushed = 0
            self.push(rows[fine], ids[fine])
        return count

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.pushed, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.pushed = validation.whole_number("the number of rows pushed", state, 0)


class Bank(nn.Module):
    """The embeddings of the last `size` items of each side, first in, first out, with their ids.

    `Banked` uses them as candidates. They are in the state dict, and move with ``to(device)``. Pushed rows are detached
    and come from older encoders, at most size / (batch size) steps ago. So either the bank is short compared with the
    speed of learning (Wang et al. start it when learning has slowed down), or the pushed rows come from a slow copy of
    the encoders, `torch.optim.swa_utils.AveragedModel`.

    Args:
        size: rows stored for each side, ≥ 1.
        dim: D.
        dtype: of the stored rows; they are used in the dtype of the batch.
        group: a `ProcessGroup` or `"world"`, for an objective with that group: every rank stores the rows of all
            ranks, so all banks are the same; `size` counts all these rows.

    Raises:
        ValueError, TypeError: a size, dim, dtype or group that is not allowed, at construction.

    Example:
        >>> import goal, torch
        >>> bank = goal.Bank(size=3, dim=2)
        >>> bank.push(torch.eye(2), torch.eye(2), ids=torch.tensor([4, 5]))
        >>> bank.push(-torch.eye(2), -torch.eye(2), ids=torch.tensor([6, 7]))
        >>> bank.x.held.ids, len(bank)
        (tensor([7, 5, 6]), 3)

    Source: Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020.
    """

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, *, group: ProcessGroup | str | None = None
    ) -> None:
        super().__init__()
        self.ranks = ranks(group, False, "gather")
        size, dim = validation.whole_number("size", size), validation.whole_number("dim", dim)
        if dtype not in validation.DTYPES:
            known = ", ".join(map(str, validation.DTYPES))
            raise TypeError(f"dtype must be a floating-point torch.dtype, one of {known}, got {dtype!r}.")
        self.x, self.y = Buffer(size, dim, dtype), Buffer(size, dim, dtype)
        self._warned = False
        self.register_load_state_dict_post_hook(_keep_finite)  # type: ignore[no-untyped-call]

    def push(self, x: Tensor, y: Tensor, ids: Tensor, y_ids: Tensor | None = None) -> None:
        """Store these rows, after the loss of their batch: before it they would be their own candidates.

        Rows that are not finite in the bank's dtype, as after a step that overflowed, are left out; the same row of the
        other side is stored. This also holds for a loaded state. A bank warns the first time.

        Args:
            x: (N, D) embeddings.
            y: (M, D) embeddings of the other side.
            ids: (N,) integers.
            y_ids: (M,), by default `ids`.

        With a group all ranks call it together, each with its own rows.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit.
        """
        call = batch_of(Arguments(x, y, ids, y_ids, check_finite=False), self.ranks, self)
        rows, cols = self._fitting(call)
        x, y = call.x.to(self.x.rows.dtype), call.y.to(self.y.rows.dtype)
        fine_x, fine_y = x.isfinite().all(1), y.isfinite().all(1)
        all_fine = bool(torch.cat((fine_x, fine_y)).all())  # the only synchronisation with a GPU
        if not all_fine:
            x, rows, y, cols = x[fine_x], rows[fine_x], y[fine_y], cols[fine_y]
        self.x.push(x, rows)
        self.y.push(y, cols)
        if not all_fine and not self._warned:
            self._warned = True
            bad = " and ".join(
                f"{int((~fine).sum())} of {len(fine)} rows of {side}, the first row {int((~fine).nonzero()[0])}"
                for side, fine in (("x", fine_x), ("y", fine_y))
                if not fine.all()
            )
            warnings.warn(
                f"the bank leaves out rows that are not finite in {self.x.rows.dtype}: {bad}. This is said once.",
                stacklevel=2,
            )

    def load_finite(self) -> None:
        """Remove rows of a loaded state that are not finite, as `push` does."""
        bad = [f"{count} rows of {side}" for side in ("x", "y") if (count := getattr(self, side).keep_finite())]
        if bad and not self._warned:
            self._warned = True
            warnings.warn(
                f"the bank leaves out rows of its state that are not finite in {self.x.rows.dtype}: "
                f"{' and '.join(bad)}. This is said once.",
                stacklevel=2,
            )

    def _fitting(self, call: Call) -> tuple[Tensor, Tensor]:
        """The ids of a call, after checking that its rows fit this bank."""
        if call.ids is None or call.y_ids is None:
            raise TypeError("ids must be integers, one for each row of x, got None: an item may meet its own past.")
        dim, device = self.x.rows.shape[1], self.x.rows.device
        if call.x.shape[1] != dim:
            raise ValueError(f"x and y must have the bank's {dim} columns, got {call.x.shape[1]}.")
        if call.x.device != device:
            here = call.x.device
            raise ValueError(f"x and y are on {here} and the bank is on {device}: bank.to({str(here)!r}).")
        return call.ids, call.y_ids

    def __len__(self) -> int:
        """Number of stored rows of x."""
        return len(self.x.held.ids)

    def extra_repr(self) -> str:
        return f"size={len(self.x.rows)}, dim={self.x.rows.shape[1]}"


def _keep_finite(bank: Bank, unfit: object) -> None:
    """Hook after loading a state; a function of the module, so that banks can be pickled and copied."""
    if not bank.x.rows.is_meta:
        bank.load_finite()


class Banked(TwoWay):
    """An objective with the batch's and a bank's rows as negatives: xᵢ meets y and the bank's y, yⱼ meets x and its x.

    It is exactly the objective with the bank's rows as constant candidates. They receive no gradient. They are neither
    anchors nor positives, so they enter neither minₖ s⁺ₖ nor the positive sets, and K and the divisor of `mean` are
    the batch's. They are ordinary negatives: of every anchor of another id, in the negative sets of multi-similarity,
    and counted in the mean over all negatives.

    Args:
        objective: any `goal.Objective`; with `group=` that of the global batch, computed on every rank
            (`goal.distributed.gathered`), and the bank needs the same group.
        bank: the source of candidates; `Bank.push` fills it, a call of the objective does not.

    Raises:
        TypeError: objective is no `goal.Objective`, or bank no `goal.Bank`.
        ValueError: the objective has a group and the bank does not have the same; exchange="ring".

    Example:
        >>> import goal, torch
        >>> bank = goal.Bank(size=64, dim=4)
        >>> objective = goal.Banked(goal.Objective(similarity="cosine"), bank)
        >>> for step in range(3):
        ...     x, y, ids = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4), torch.arange(8) + 8 * step
        ...     objective(x, y, ids).backward()
        ...     bank.push(x, y, ids)
        >>> objective.stats.index.max() >= 8  # a bank's row is somebody's hardest negative
        tensor(True)
    """

    def __init__(self, objective: Objective, bank: Bank) -> None:
        super().__init__(objective)
        if not isinstance(bank, Bank):
            raise TypeError(f"bank must be a goal.Bank, got {type(bank).__name__}.")
        groups = [None if one is None else one.group for one in (objective.ranks, bank.ranks)]
        if groups[0] != groups[1]:
            raise ValueError(f"objective and bank must have the same group, got {groups[0]!r} and {groups[1]!r}.")
        self.bank = bank

    def forward(
        self, x: Tensor, y: Tensor, ids: Tensor, y_ids: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The scalar for (N, D) and (M, D) embeddings.

        Args:
            x, y, y_ids, weight: as for `goal.apply`.
            ids: (N,) integers, required: an item that comes again meets its own past.

        Raises:
            ValueError, TypeError: as `goal.apply`; no ids; a bank of another dimension or on another device; if
                finiteness is checked, a row of the bank that is not finite in the batch's dtype.
        """
        over = self.objective.ranks
        what = over and f"{self}, {self.bank.x.pushed} of x, {self.bank.y.pushed} of y pushed"  # compared over ranks
        call = batch_of(Arguments(x, y, ids, y_ids, weight, self.objective.check_finite), over, what)
        self.bank._fitting(call)
        past_x, past_y = self.bank.x.held, self.bank.y.held
        beside_x = past_x._replace(rows=past_x.rows.to(call.x.dtype))
        beside_y = past_y._replace(rows=past_y.rows.to(call.y.dtype))
        if call.finite:
            validation.finite(**{"the bank's x": beside_x.rows, "the bank's y": beside_y.rows})
        return self._emit(call, beside_x, beside_y)
