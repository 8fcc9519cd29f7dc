"""How many bytes an objective over ranks sends and stores, for `goal.explain`."""

from __future__ import annotations

from typing import NamedTuple

from goal import validation
from goal.distributed.exchange import Wire, ranks
from goal.engine.settings import Settings


def size_of(group: object, ranks_: int | None, exchange: str) -> int | None:
    """The number of ranks that `goal.explain` is asked about; None for one process."""
    checked = ranks(group, False, exchange)
    if ranks_ is None:
        return None if checked is None else Wire(checked.group).size
    if checked is not None:
        raise ValueError("ranks and group are both given: ranks is for a plan without a group.")
    return validation.whole_number("ranks", ranks_)


class Traffic(NamedTuple):
    """Bytes that a rank sends in a step, forward and backward together."""

    gather: int  # bytes; exact
    ring: int  # bytes, at most, averaged over the ranks: negatives that are own rows, or shared, cost less
    rounds: int  # times that y goes round the ring
    held: dict[str, int]  # exchange → bytes of other ranks' rows, and of gradients in transit


def traffic(settings: Settings, n: int, d: int, x_size: int, y_size: int, size: int, ranks: int) -> Traffic:
    """The traffic of ranks of n rows each whose x and y need gradients; ids, y_ids and weights are not included.

    Args:
        x_size, y_size: bytes of an element of x and of y in their own dtypes.
        size: bytes of an element in the computing dtype.
    """
    request, others, mined = settings.request, ranks - 1, settings.mining.picks
    dense, soft = settings.mining.dense != "never", settings.mining.softmax is not None
    again = dense or soft  # gradients come in a round of their own
    rounds = settings.mines + again
    blocks = 2 * y_size + again * 2 * size
    held = {"gather": ranks * n * d * (x_size + y_size), "ring": n * d * (blocks + mined * 3 * size)}
    if not others:
        return Traffic(0, 0, rounds, held)
    extrema = request.hardest + (request.semi_hard is not None)
    sums = request.lin + (request.beta is not None)
    partial = extrema * (size + 8) + size * (3 * request.lin + 2 * (request.beta is not None) + 3 * soft)
    finished = 2 * (extrema * (size + 8) + sums * size) + soft * (2 * 8 + size)
    always = others * (64 + n * size + settings.mines * n * finished + dense * size)  # 64: the line
    gather = others * n * d * (x_size + y_size) + settings.mines * others * n * partial
    ring = rounds * others * n * d * y_size + settings.mines * ranks * n * partial
    ring += mined * n * d * (x_size + 2 * size) + again * ranks * n * (d + dense) * size
    return Traffic(always + gather, always + ring, rounds, held)
