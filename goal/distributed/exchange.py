"""The exchanges between the processes of a group, and a count of the bytes that they send.

`joined` makes this process a rank of a group. `Wire` has the three exchanges that an objective needs. They send rows of
bytes; `pack` makes such rows from columns, and `unpack` splits them again. This is the only file that calls
torch.distributed, and it knows nothing of objectives.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from goal.names import unknown
from goal.validation import check_bool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EXCHANGES = ("gather", "ring")


class Ranks(NamedTuple):
    """The checked arguments about ranks."""

    group: ProcessGroup | str  # "world": the default group at the time of the call
    averaged: bool
    exchange: str


def ranks(group: object, averaged: object, exchange: str) -> Ranks | None:
    """The arguments `group`, `averaged` and `exchange` of `goal.apply`, checked; None without a group."""
    averaged = check_bool("averaged", averaged)
    if exchange not in EXCHANGES:
        raise unknown("exchange", exchange, EXCHANGES)
    if group is None:
        if averaged:
            raise ValueError("averaged=True multiplies the gradient by the number of ranks: it needs group=.")
        return None
    if not dist.is_available():
        raise ValueError("group is given, but this PyTorch was built without torch.distributed.")
    if not (isinstance(group, dist.ProcessGroup) or (isinstance(group, str) and group == "world")):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, 'world' or None, got {group!r}.")
    return Ranks(group, averaged, exchange)


@contextmanager
def joined(backend: str = "gloo", **options: Any) -> Iterator[None]:
    """Within the block this process is a rank of the default group; after it nothing of the group is left.

    Destroying a group is not enough: while any object refers to it, its threads live, and a thread that frees a tensor
    while Python ends aborts the process.

    Args:
        backend: "gloo", or "nccl" on GPUs.
        options: the other arguments of `torch.distributed.init_process_group`; by default torchrun's settings.

    Raises:
        ValueError, RuntimeError: as `init_process_group` does, for wrong arguments or missing ranks.

    Example:
        >>> import goal.distributed, tempfile, torch
        >>> store, x = "file://" + tempfile.mkdtemp() + "/store", torch.eye(3)
        >>> with goal.distributed.joined(init_method=store, rank=0, world_size=1):
        ...     goal.apply(x, x, group="world").item() == goal.apply(x, x).item()
        True
    """
    importlib.import_module("torch._dynamo")  # DDP imports it; imported while a group exists, it would keep the group
    dist.init_process_group(backend, **options)
    group = dist.group.WORLD  # kept to the end, so that only Python frees it: then its threads are waited for
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # frees references in models, and in reference cycles of frames of caught exceptions
        del group


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Sent:
    """Bytes that this rank has sent to other ranks."""

    def __init__(self) -> None:
        self.bytes = 0


_counting: list[Sent] = []


@contextmanager
def counting() -> Iterator[Sent]:
    """Count the bytes that this rank sends to others for objectives with `group=` within the block.

    Example:
        >>> import goal.distributed
        >>> with goal.distributed.counting() as sent:
        ...     pass  # goal.apply(x, y, group="world").backward()
        >>> sent.bytes
        0
    """
    sent = Sent()
    _counting.append(sent)
    try:
        yield sent
    finally:
        _counting.remove(sent)


class Coming(NamedTuple):
    """Rows in transit, and the tensors that must stay in memory until they have arrived."""

    rows: Tensor  # (n, B) uint8, undefined before `wait`
    works: list[Any]
    kept: tuple[Tensor, ...] = ()

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.rows


class Wire:
    """The three exchanges between the ranks of a group, all of rows of bytes (n, B)."""

    def __init__(self, group: ProcessGroup | str) -> None:
        if not dist.is_initialized():
            raise ValueError("group needs torch.distributed.init_process_group() before the call.")
        self.group: Any = dist.group.WORLD if isinstance(group, str) else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("this process is not a member of group.")

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Coming:
        """All ranks' rows in rank order; rank r has `counts[r]` rows."""
        if self.size == 1:
            return Coming(rows, [])
        self._count(rows.numel() * (self.size - 1))
        out = rows.new_empty(sum(counts), rows.shape[1])
        if len(set(counts)) == 1:
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
            return Coming(out, [gather(out, rows, group=self.group, async_op=True)], (rows,))
        parts = out.split(list(counts))
        parts[self.rank].copy_(rows)
        others = [rank for rank in range(self.size) if rank != self.rank]
        works = self._point_to_point(
            *((dist.isend, rows, rank) for rank in others), *((dist.irecv, parts[rank], rank) for rank in others)
        )
        return Coming(out, works, (rows,))

    def swap(self, rows: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        """Send the first `to[0]` rows to rank 0, the next `to[1]` to rank 1, …; receive `of[r]` rows from rank r."""
        if self.size == 1:
            return rows
        self._count((rows.shape[0] - to[self.rank]) * rows.shape[1])
        out = rows.new_empty(sum(of), rows.shape[1])
        dist.all_to_all_single(out, rows, list(of), list(to), group=self.group)
        return out

    def shift(self, rows: Tensor, height: int) -> Coming:
        """Send the rows to the next rank and receive `height` rows from the previous rank."""
        if self.size == 1:
            return Coming(rows, [])
        self._count(rows.numel())
        out = rows.new_empty(height, rows.shape[1])
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        works = self._point_to_point((dist.isend, rows, after), (dist.irecv, out, before))
        return Coming(out, works, (rows,))

    def _point_to_point(self, *calls: tuple[Any, Tensor, int]) -> list[Any]:
        return dist.batch_isend_irecv(
            [dist.P2POp(call, rows, group=self.group, group_peer=peer) for call, rows, peer in calls]
        )

    def _count(self, size: int) -> None:
        for sent in _counting:
            sent.bytes += size


def as_bytes(rows: Tensor) -> Tensor:
    """(n, B) uint8 from rows (n, c); a single column counts as contiguous whatever its stride, and is copied."""
    dense = rows if rows.stride(-1) == 1 else rows.clone(memory_format=torch.contiguous_format)
    return dense.contiguous().view(torch.uint8)


def pack(*columns: Tensor) -> Tensor:
    """(n, B) uint8: row i has the bytes of row i of all columns, which are (n,) or (n, c)."""
    return torch.cat([as_bytes(one.reshape(len(one), -1)) for one in columns], 1)


def unpack(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `pack`: columns with the dtypes and widths of `like`."""
    columns, start = [], 0
    for one in like:
        width = one.shape[1:].numel() * one.itemsize
        part = rows[:, start : start + width].clone(memory_format=torch.contiguous_format).view(one.dtype)
        columns.append(part[:, 0] if one.dim() == 1 else part)
        start += width
    return columns
