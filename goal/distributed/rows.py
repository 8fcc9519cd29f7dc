"""All rows of the global batch on every rank.

`gathered` is for losses that need the full matrix S, which every rank then computes. `goal.distributed.spread` divides
the work of an objective among the ranks instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from goal.distributed.agree import Line, agree
from goal.distributed.exchange import Ranks, Wire, pack, ranks, unpack
from goal.engine.backend import computing_dtype
from goal.engine.call import Arguments, Call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# ── a rank's own data ───────────────────────────────────────────────────────────────────────────────────────────────


def described(call: Call) -> dict[str, object]:
    """The properties of a call that must be the same on all ranks."""
    return {
        "D": call.x.shape[1],
        "x.dtype": call.x.dtype,
        "y.dtype": call.y.dtype,
        "ids": "none" if call.ids is None else "given",
        "y_ids": "none" if call.y_ids is call.ids else "given",
        "weight": None if call.weight is None else "(K,)" if call.weight.dim() == 1 else "(2, K)",
        "check_finite": call.finite,
    }


def columns_of(call: Call) -> list[Tensor]:
    """Ids and weights as columns to send, a row for each pair."""
    dtype = computing_dtype(call.x, call.y)
    weight = None if call.weight is None else call.weight.to(dtype).movedim(-1, 0)
    y_ids = None if call.y_ids is call.ids else call.y_ids
    return [one for one in (call.ids, y_ids, weight) if one is not None]


def of_all(call: Call, columns: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """ids, y_ids and weight of all pairs, from all ranks' columns."""
    *ids, weight = columns if call.weight is not None else [*columns, None]
    rows, cols = (ids[0], ids[-1]) if ids else (None, None)
    return rows, cols, None if weight is None else weight.movedim(0, -1)


# ── all rows on every rank ──────────────────────────────────────────────────────────────────────────────────────────


class Global(NamedTuple):
    """The rows of all ranks, in rank order."""

    x: Tensor  # (K, D); the own rows receive the gradient, the others are constants
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
    """The global batch, for a loss without a `group=` of its own: every rank computes all of it.

    The value is then the same on every rank, and the gradient at x and y is exactly that of the global loss for the own
    rows. Since all ranks compute the same function, nothing is sent in backward. Every rank needs the work and the
    memory of the global batch; objectives with `group=` divide them. All ranks call it together.

    Args:
        x, y: (n, D) own rows, pairs in order; n may differ from rank to rank.
        ids, y_ids, weight: (n,), weight also (2, n), as for `goal.apply`.
        group: a `ProcessGroup`, or `"world"`.
        averaged: multiply the gradient at x and y by the number of ranks, for DDP and FSDP, which average the gradient
            of parameters. The loss's own parameters get their full gradient on every rank: leave them unwrapped.
        what: must be the same on all ranks, such as the loss and its numbers.

    Returns:
        `Global`.

    Raises:
        ValueError, TypeError: on all ranks, naming the ranks whose arguments are refused, or differ and in what.

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
    over = ranks(group, averaged, "gather")
    if over is None:
        raise TypeError("group must be a torch.distributed.ProcessGroup or 'world', got None.")
    call = batch_of(Arguments(x, y, ids, y_ids, weight, check_finite=False), over, what)
    return Global(*call.inputs, call.ids, call.y_ids, call.weight)


def batch_of(arguments: Arguments, over: Ranks | None, what: object) -> Call:
    """The checked call: over ranks the global batch, as in `gathered`; without ranks the arguments themselves.

    Args:
        what: its text must be the same on all ranks; the text is made only over ranks.
    """
    if over is None:
        return arguments.checked()
    if torch.compiler.is_compiling():  # a graph break
        inner: Any = torch.compiler.disable(batch_of)
        call: Call = inner(arguments, over, what)
        return call
    wire, own, line = Wire(over.group), None, Line(0, {})
    try:
        own = arguments.checked(even=True)
        line = Line(len(own.x), {"what": what, "averaged": over.averaged, **described(own)})
    except (TypeError, ValueError) as refused:
        line = Line(0, {}, refused)
    device = arguments.x.device if isinstance(arguments.x, Tensor) else torch.device("cpu")
    counts = agree(wire, line, device).counts
    assert own is not None
    columns = [own.x, own.y, *columns_of(own)]
    all_x, all_y, *rest = unpack(wire.gather(pack(*columns), counts).wait(), columns)
    start = sum(counts[: wire.rank])
    here, by = slice(start, start + len(own.x)), wire.size if over.averaged else 1
    inputs = _live(all_x, own.inputs[0], here, by), _live(all_y, own.inputs[1], here, by)
    ids, y_ids, weight = of_all(own, rest)
    return Call(all_x, all_y, ids, y_ids, weight, own.needs, own.finite, inputs)


def _live(every: Tensor, own: Tensor, here: slice, by: int) -> Tensor:
    """All ranks' rows; the own rows keep their graph, with their gradient multiplied by a number."""
    if own.requires_grad and by != 1:
        own = own.view_as(own)
        own.register_hook(lambda gradient: gradient * by)
    return torch.cat([every[: here.start], own, every[here.stop :]])


def shared_seed(over: Ranks, device: torch.device) -> int:
    """A random number, the same on all ranks: every rank draws one, and rank 0's is used."""
    wire, drawn = Wire(over.group), torch.randint(2**62, (1, 1), device=device)
    return int(wire.gather(drawn.view(torch.uint8), [1] * wire.size).wait().view(torch.int64)[0])
