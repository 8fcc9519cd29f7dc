"""The public functions over the engine, `apply`, `apply_similarity` and `gradients`, and the link to autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from goal.distributed import forward as over_ranks
from goal.distributed.exchange import Ranks, ranks
from goal.engine import path
from goal.engine.call import Arguments, Call
from goal.engine.functorch import batched, inside, no_autocast, outside, plain
from goal.engine.path import Emits, Outcome, Seen
from goal.engine.settings import Scale, Settings, settings
from goal.engine.types import Gradients
from goal.mining import Mining
from goal.positives import Positives, bind
from goal.similarity import GIVEN
from goal.stats import Stats, stats
from goal.terms import Term

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def apply(
    x: Tensor,
    y: Tensor | None = None,
    T: str | Term = "cir",
    P: str | Term = "sig-ms",
    *,
    mining: str | Mining = "hardest",
    positives: str | Positives | None = None,
    reduction: str = "mean",
    scale: Scale = 1.0,
    directions: str = "both",
    ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    weight: Tensor | None = None,
    similarity: str = "dot",
    impl: str = "auto",
    precision: str = "fast",
    check_finite: bool | None = None,
    group: ProcessGroup | str | None = None,
    averaged: bool = False,
    exchange: str = "gather",
) -> Tensor:
    """A scalar whose backward returns the gradient composed of T and P±, without a loss behind it.

    With S = x yᵀ and K = min(N, M) pairs (row k of x, row k of y), for each anchor i of both directions and its
    selected negatives j (mᵢⱼ > 0):

        ∂l/∂sᵢⱼ  += mᵢⱼ · T(s⁺ᵢ, sᵢⱼ) · P⁻(sᵢⱼ)
        ∂l/∂s⁺ᵢ  −= mᵢⱼ · T(s⁺ᵢ, sᵢⱼ) · P⁺(s⁺ᵢ)

    and ∂l/∂x, ∂l/∂y follow by the chain rule. The incoming gradient multiplies. N × M is never stored.

    Args:
        x: (N, D) embeddings of one modality; float32, float64, bfloat16 or float16. The mathematics is in float32,
            or in float64 for float64; gradients come back in the input's dtype.
        y: (M, D) embeddings of the other modality. Rows beyond K of the longer side are candidates only: negatives for
            the other side's anchors that are no anchors themselves (a memory bank). Left out, x is a single set of
            labelled rows: `ids` are its labels, every row is an anchor of the others, in a single direction.
        T: triplet weight, a name (`con`, `nca`, `cir`, or a registered one) or an object, `goal.T.cir(tau=5.0)`.
        P: pair weight, a name (`con`, `lin`, `sig`, `lin-ms`, `sig-ms`) or an object.
        mining: `hardest`, `semi-hard`, `soft`, `all`, `selective`, or an object, `goal.mining.semi_hard(margin=0.2)`.
        positives: `pair`, row k and row k; or, by equal ids, `hardest` or `soft` (`goal.positives.soft(tau=2.0)`): then
            all rows of both sides are anchors, N and M are free, and `mean` divides by their number. By default `pair`,
            and `hardest` where y is left out. Over ranks `all` and `selective` mining take pairs alone.
        reduction: `mean` divides by K (by the sum of `weight`), `sum` does not. The two directions add.
        scale: factor of the value and of the gradient, > 0; or a function of numbers of the objective, which it asks
            for by name: ``lambda tau: tau / 2``. A name that several have means T's, then P's, then the mining rule's.
        directions: `both`; `x→y`, where the anchors are rows of x, and candidates rows of y; or `y→x`. Also written
            `x->y` and `x2y`. A single set has one direction, whatever this says.
        ids: (N,) integers; rows with equal ids are never negatives of each other.
        y_ids: (M,) integers; by default `ids`, which N ≠ M does not allow. The two ids of a pair are equal, which is
            checked where `check_finite` is on.
        weight: (K,) numbers >= 0 that scale anchors; 0 removes an anchor (its rows remain candidates). Or (2, K), for
            the anchors of x→y and of y→x; `mean` then divides each direction by the sum of its own. With positives by
            ids N = M = K.
        similarity: `dot`, `cosine` (normalises inside) or `order` (s = −‖max(0, y − x)‖).
        impl: `auto`, `torch` or `triton`. `auto` takes the kernels for inputs on a GPU if they support the objective,
            else PyTorch; `goal.explain` says which, and why. `triton` never falls back: it raises.
        precision: the arithmetic in which kernels search negatives among float32 inputs: `fast` (float16 copies; tf32
            in small batches), `tf32` or `exact`. The mined similarities are computed again in float32. 16-bit inputs
            are used as they are. PyTorch's path is always exact.
        check_finite: raise for NaN or inf in x or y; by default on the CPU, outside `torch.compile`. Otherwise a NaN
            shows in the gradient, also where finite inputs give similarities beyond the range of their dtype.
        group: a `torch.distributed.ProcessGroup`, or `world`: the objective is that of the global batch, the ranks'
            rows in rank order. A rank has as many rows of x as of y; ranks may have different numbers. All ranks call
            it together; the value is the global one, the gradient that of the own rows. See docs/scaling.md.
        averaged: multiply the gradient, not the value, by the number of ranks: for wrappers that average the ranks'
            parameter gradients (DDP, FSDP).
        exchange: how rows travel between ranks: `gather`, all at once, or `ring`, block by block, with at most two
            blocks of other ranks in memory and the gradient emitted in forward.

    Returns:
        0-d tensor. Its value is the true loss if T × P is the gradient of a loss that the terms register, else the mean
        violation s⁻ − s⁺ of the selected triplets; the value never affects the gradient.

    Raises:
        ValueError: a shape, name, range or non-finite entry, with the argument, its value and the allowed values.
        TypeError: the same for types and dtypes.
        RuntimeError: on a second derivative, which does not exist for a gradient without a loss; under torch.func.vmap
            and forward-mode differentiation. torch.func.grad, vjp, jacrev and functional_call work.

    Example:
        >>> import goal, torch
        >>> x = torch.nn.functional.normalize(torch.randn(8, 16), dim=1).requires_grad_()
        >>> y = torch.nn.functional.normalize(torch.randn(8, 16), dim=1).requires_grad_()
        >>> loss = goal.apply(x, y, T="cir", P="sig-ms")
        >>> loss.backward()
        >>> x.grad.shape
        torch.Size([8, 16])

    Source: Xuan & Chen, "Dissecting Deep Metric Learning Losses for Image-Text Retrieval", WACV 2023, eq. 6-12.
    """
    rule = bind(positives, y is None)
    objective = settings(T, P, mining, similarity, reduction, impl, precision, scale, directions, rule)
    arguments = Arguments(x, y, ids, y_ids, weight, check_finite, one_set=y is None)
    return run(arguments, objective, ranks(group, averaged, exchange)).loss


def apply_similarity(
    S: Tensor,
    T: str | Term = "cir",
    P: str | Term = "sig-ms",
    *,
    mining: str | Mining = "hardest",
    positives: str | Positives | None = None,
    reduction: str = "mean",
    scale: Scale = 1.0,
    directions: str = "both",
    ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    weight: Tensor | None = None,
    impl: str = "auto",
    check_finite: bool | None = None,
) -> Tensor:
    """As `apply`, for a similarity matrix from any model (cross-attention scorers): emits ∂l/∂S.

    Args:
        S: (N, M), entry (k, k) is the similarity of pair k for k < K = min(N, M). Other arguments as for `apply`.

    Example:
        >>> import goal, torch
        >>> S = torch.tensor([[0.9, 0.1], [0.4, 0.8]], requires_grad=True)
        >>> goal.apply_similarity(S, T="con", P="con", reduction="sum").backward()
        >>> S.grad
        tensor([[-2.,  2.],
                [ 2., -2.]])
    """
    rule = bind(positives, False)
    objective = settings(T, P, mining, GIVEN, reduction, impl, "fast", scale, directions, rule)
    return run(Arguments(S, None, ids, y_ids, weight, check_finite), objective).loss


@overload
def gradients(x: Tensor, y: Tensor, *terms: Any, **options: Any) -> tuple[Tensor, Tensor, Stats]: ...


@overload
def gradients(x: Tensor, y: None = None, *terms: Any, **options: Any) -> tuple[Tensor, None, Stats]: ...


def gradients(
    x: Tensor,
    y: Tensor | None = None,
    T: str | Term = "cir",
    P: str | Term = "sig-ms",
    *,
    mining: str | Mining = "hardest",
    positives: str | Positives | None = None,
    reduction: str = "mean",
    scale: Scale = 1.0,
    directions: str = "both",
    ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    weight: Tensor | None = None,
    similarity: str = "dot",
    impl: str = "auto",
    precision: str = "fast",
    check_finite: bool | None = None,
    group: ProcessGroup | str | None = None,
    averaged: bool = False,
    exchange: str = "gather",
) -> tuple[Tensor, Tensor | None, Stats]:
    """The gradient itself, without autograd: (∂l/∂x (N, D), ∂l/∂y (M, D), `Stats`). Arguments as for `apply`.

    Where y is left out, ∂l/∂x has both roles of the rows of x, and ∂l/∂y is None.

    Example:
        >>> import goal, torch
        >>> gx, gy, stats = goal.gradients(torch.eye(3), torch.eye(3), T="con", P="lin")
        >>> stats.recall_at_1
        tensor([1., 1.])
    """
    rule, one_set = bind(positives, y is None), y is None
    objective = settings(T, P, mining, similarity, reduction, impl, precision, scale, directions, rule)
    arguments = Arguments(x, y, ids, y_ids, weight, check_finite, (True, True), one_set=one_set)
    with torch.no_grad():
        outcome = _outcome(arguments, objective, ranks(group, averaged, exchange), shown=True)
        gx, gy = outcome.emission.emit(x, x if y is None else y, None, (True, True))
        assert gx is not None
        assert gy is not None
        found = stats(objective, outcome.seen)
        return (gx + gy, None, found) if one_set else (gx, gy, found)


# ── a call ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Run(NamedTuple):
    """Result of a call of an objective."""

    loss: Tensor  # 0-d; its backward returns the emitted gradient
    seen: Seen


def run(arguments: Arguments, objective: Settings, over: Ranks | None = None) -> Run:
    """Check the arguments, compute the value, attach the gradient."""
    if over is None:
        return emitted(arguments.checked(), objective)
    arguments = arguments._replace(needs=arguments.needed())
    inputs = arguments.x, arguments.x if arguments.one_set else arguments.y
    return _attached(inputs, _outcome(arguments, objective, over), any(arguments.needed()))


def emitted(call: Call, objective: Settings) -> Run:
    """`run` for a checked call."""
    return _attached(call.inputs, _forward(call, objective), any(call.needs))


def _outcome(arguments: Arguments, objective: Settings, over: Ranks | None, shown: bool = False) -> Outcome:
    """Forward, over ranks if there are any; `shown`: mine statistics in any case."""
    if over is None:
        return _forward(arguments.checked(), objective)
    forward = torch.compiler.disable(over_ranks.forward) if torch.compiler.is_compiling() else over_ranks.forward
    device = arguments.x.device.type if isinstance(arguments.x, Tensor) else "cpu"
    with torch.no_grad(), outside(), no_autocast(device):
        outcome: Outcome = forward(arguments, objective, over, shown)
        return outcome


def _forward(call: Call, objective: Settings) -> Outcome:
    with torch.no_grad(), outside(), no_autocast(call.x.device.type):
        return path.forward(call, objective)


# ── the gradient in autograd ────────────────────────────────────────────────────────────────────────────────────────


def _attached(inputs: tuple[Any, Any], outcome: Outcome, needed: bool) -> Run:
    """The value with its emission attached as a graph, if a gradient is needed."""
    if not needed:
        return Run(outcome.value, outcome.seen)
    attach: Any = _EmitApart.apply if inside() else _Emit.apply
    return Run(attach(*inputs, (outcome.value,), outcome.emission), outcome.seen)


class _Emit(torch.autograd.Function):
    """Forward returns the value; backward returns the emitted gradient times the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, value: tuple[Tensor], emission: Emits) -> Tensor:
        _save(ctx, x, y, emission)  # the value comes in a tuple, so it is no input and is returned without a copy
        return value[0].clone() if torch.compiler.is_compiling() else value[0]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        return *_handed_out(ctx, incoming), None, None


class _EmitApart(torch.autograd.Function):
    """The same for torch.func, which requires a separate setup_context, at ten times the cost of a call."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, value: tuple[Tensor], emission: Emits) -> Tensor:
        return value[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, _, emission = inputs
        _save(ctx, x, y, emission)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        return *_handed_out(ctx, incoming), None, None


def _save(ctx: Any, x: Tensor, y: Tensor, emission: Emits) -> None:
    """Store what backward needs; its large tensor where autograd frees it after backward."""
    kept = emission.kept
    ctx.save_for_backward(x, y, *([] if kept is None else [kept]))
    ctx.emission = emission if kept is None else emission.keeping(None)


def _handed_out(ctx: Any, incoming: Tensor) -> Gradients:
    """The gradients; under create_graph=True with a graph that raises in a second backward."""
    every = ctx.saved_tensors  # read once, as checkpoints require
    saved, kept = every[:2], every[2:]
    x, y = plain(*saved)
    emission = ctx.emission.keeping(*plain(*kept)) if kept else ctx.emission
    many = not torch.compiler.is_compiling() and batched(incoming)  # under jacrev: a batch of incoming gradients
    (times,) = (None,) if many else plain(incoming)
    with torch.no_grad(), outside(), no_autocast(x.device.type):
        gx, gy = emission.emit(x, y, times, ctx.needs_input_grad[:2])
    if many:
        gx, gy = (None if g is None else g * incoming.to(g.dtype) for g in (gx, gy))
    if torch.is_grad_enabled():
        refuse: Any = _NoSecondDerivative.apply
        gx, gy = (None if g is None else refuse(g, *saved, incoming) for g in (gx, gy))
    return gx, gy


class _NoSecondDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "goal emits a gradient, not a loss: T × P has no second derivative that autograd could take (most "
            "combinations are the gradient of no function). Leave out create_graph=True, or use an ordinary loss."
        )
