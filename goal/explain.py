"""How `goal.apply` would compute its arguments, and what that would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from goal import validation
from goal.distributed.traffic import size_of, traffic
from goal.engine.backend import backend, computing_dtype
from goal.engine.settings import Settings, settings
from goal.mining import Mining
from goal.positives import Positives, bind
from goal.terms import Term

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Explanation(NamedTuple):
    """What `goal.apply` would compute for these arguments, how, and at what cost."""

    impl: str  # the implementation of the quadratic stages
    why: str
    dtype: str  # of the mathematics
    products: str  # the arithmetic of S
    mined: tuple[str, ...]  # the statistics that the miner reduces from S
    tile: tuple[int, int]  # rows and columns of S that are computed at once
    passes: int  # times that S is computed, forward and backward together
    flops: int  # of the products, forward and backward together
    moved: int  # bytes of inputs and gradients that pass through the processor, at least
    held: int  # bytes at the peak, beyond the inputs and their gradients
    ranks: int | None = None  # if given, all numbers are those of a rank, which has all columns for its rows of S
    gather: int | None = None  # bytes that a rank sends in a step with exchange="gather"
    ring: int | None = None  # the same with "ring": at most, averaged over the ranks
    rounds: int | None = None  # times that y goes round with "ring"

    def __str__(self) -> str:
        return "\n".join(f"{name:8} {value}" for name, value in self._asdict().items() if value is not None)


def explain(
    x: Tensor,
    y: Tensor,
    T: str | Term = "cir",
    P: str | Term = "sig-ms",
    *,
    mining: str | Mining = "hardest",
    positives: str | Positives = "pair",
    directions: str = "both",
    similarity: str = "dot",
    impl: str = "auto",
    precision: str = "fast",
    group: ProcessGroup | str | None = None,
    exchange: str = "gather",
    ranks: int | None = None,
) -> Explanation:
    """The implementation for these arguments, what it mines, and the cost; nothing is computed.

    Args: as for `goal.apply`, and
        ranks: number of ranks, without a group; each with as many rows as x and y here. By default the group's.

    Ids add 8 bytes · (ranks − 1) per row to the bytes sent, `y_ids` the same again, `weight` an element or two.

    Example:
        >>> import goal, torch
        >>> print(goal.explain(torch.empty(8192, 1024), torch.empty(8192, 1024), P="sig-ms"))
        impl     torch
        why      the inputs are on cpu, and kernels need a GPU (or TRITON_INTERPRET=1, which is slow)
        dtype    float32
        products float32, no reduced precision anywhere
        mined    ('hardest', 'r_neg_exp')
        tile     (512, 8192)
        passes   1
        flops    137438953472
        moved    134217728
        held     50331648
        >>> shared = goal.explain(torch.empty(1024, 1024), torch.empty(1024, 1024), P="sig-ms", ranks=8)
        >>> shared.gather, shared.ring
        (59122112, 42365376)
    """
    objective = settings(T, P, mining, similarity, "mean", impl, precision, 1.0, directions, bind(positives, False))
    x, y = validation.embeddings(x, y, meta=True)
    size = size_of(group, ranks, exchange)
    if size is None:
        return _explanation(objective, x, y)
    return _explanation_spread(objective, x, y, size, exchange)


def _explanation(objective: Settings, x: Tensor, y: Tensor, alone: bool = True) -> Explanation:
    """`alone`: in one process, which keeps the exponentials of a small batch."""
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    does, why = backend(objective, x, y)
    request, dtype, dense = objective.request, computing_dtype(x, y), objective.mining.dense
    soft = objective.mining.softmax is not None
    names = ("hardest", "semi-hard", "r_neg_lin", "r_neg_exp", "log-sum")
    asked = (
        objective.mines and request.hardest,
        request.semi_hard is not None,
        request.lin,
        request.beta is not None,
        soft,
    )
    plan = does.plan(x, y, request, dense != "never")
    products = {"never": 1, "always": 4 + objective.mines, "fallback": 5}[dense]
    passes = products if dense == "never" else products - 2
    if soft:
        passes = 1 if plan.kept and alone else 2  # S again, for the gradient, unless its exponentials are kept
        products = passes + 2
    if objective.positives.by_ids:  # they are found first, and the pull of several is emitted apart
        shared = objective.positives.softmax is not None
        passes, products = passes + 1 + shared, products + 1 + 3 * shared
    return Explanation(
        impl=does.impl,
        why=why,
        dtype=str(dtype).removeprefix("torch."),
        products=plan.arithmetic,
        mined=tuple(name for name, on in zip(names, asked, strict=True) if on),
        tile=plan.tile,
        passes=passes,
        flops=2 * n * m * d * products,
        moved=(passes + 1) * d * (n * x.element_size() + m * y.element_size()),
        held=plan.held,
    )


def _explanation_spread(objective: Settings, x: Tensor, y: Tensor, size: int, exchange: str) -> Explanation:
    """A rank's share: its rows of S, block by block or at once, and in backward its columns if it has all rows."""
    n, d = x.shape
    if len(y) != n:
        raise ValueError(f"x and y must have the same number of rows on each rank, got {n} and {len(y)}.")
    gathers, dense, width = exchange == "gather", objective.mining.dense != "never", y.element_size()
    here = _explanation(objective, x, y.new_empty(n * size, d, device="meta") if gathers else y, alone=False)
    strips = 2 * n * n * size * d  # the products of one pass
    soft = objective.mining.softmax is not None
    again = int(gathers and (dense or soft))  # a tile is in the rows of one rank and in the columns of another
    sent = traffic(objective, n, d, x.element_size(), width, computing_dtype(x, y).itemsize, size)
    return here._replace(
        passes=here.passes + again,
        flops=here.flops * (1 if gathers else size) + again * strips,
        moved=(here.passes + again + 1) * d * n * (x.element_size() + size * width),
        held=here.held + sent.held[exchange],
        ranks=size,
        gather=sent.gather,
        ring=sent.ring,
        rounds=sent.rounds,
    )
