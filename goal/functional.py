"""The public face over the engine: `apply`, `apply_similarity`, `gradients`, `explain`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from goal import validation
from goal.distributed import exchange as wire
from goal.distributed import spread as distributed
from goal.distributed.exchange import Ranks
from goal.engine import path as engine
from goal.engine.operators import How
from goal.engine.path import Batch, Dense, Outcome
from goal.engine.settings import Settings, settings
from goal.engine.types import Gradients, Masks, Mined, Needs
from goal.mining import Mining
from goal.similarity import GIVEN
from goal.stats import Stats, stats
from goal.terms import Term

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def apply(
    x: Tensor,
    y: Tensor,
    T: str | Term = "cir",
    P: str | Term = "sig-ms",
    *,
    mining: str | Mining = "hardest",
    reduction: str = "mean",
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
    """A scalar whose backward hands out the gradient that T and P± compose, without a loss behind it.

    With S = x yᵀ and K = min(N, M) pairs (row k of x, row k of y), for each anchor i of both directions and its
    selected negatives j (mᵢⱼ > 0):

        ∂l/∂sᵢⱼ  += mᵢⱼ · T(s⁺ᵢ, sᵢⱼ) · P⁻(sᵢⱼ)
        ∂l/∂s⁺ᵢ  −= mᵢⱼ · T(s⁺ᵢ, sᵢⱼ) · P⁺(s⁺ᵢ)

    and ∂l/∂x, ∂l/∂y follow by the chain rule. The incoming gradient multiplies. N × M is never stored.

    Args:
        x: (N, D) embeddings of one modality; float32, float64, bfloat16 or float16. The mathematics is in float32,
            or in float64 for float64; gradients come back in the input's dtype.
        y: (M, D) of the other. Rows beyond K of the longer side are candidates: negatives for the other side's
            anchors that are no anchors themselves (a memory bank).
        T: triplet weight, a name (`con`, `nca`, `cir`, or a registered one) or an object, `goal.T.cir(tau=5.0)`.
        P: pair weight, a name (`con`, `lin`, `sig`, `lin-ms`, `sig-ms`) or an object.
        mining: `hardest`, `semi-hard`, `all`, `selective`, or an object, `goal.mining.semi_hard(margin=0.2)`.
        reduction: `mean` divides by K (by the sum of `weight`), `sum` does not. Both directions always add.
        ids: (N,) integers; rows with equal ids are never negatives of each other.
        y_ids: (M,) integers; by default `ids`, which N ≠ M does not allow.
        weight: (K,) numbers >= 0 that scale anchors; 0 removes an anchor (its rows remain candidates). Or (2, K), for
            the anchors of x→y and of y→x; `mean` then divides each direction by the sum of its own.
        similarity: `dot`, `cosine` (normalises inside) or `order` (s = −‖max(0, y − x)‖).
        impl: `auto`, `torch` or `triton`. `auto` takes the kernels for inputs on a GPU where they can do all of it,
            else PyTorch; `goal.explain` tells which, and why. `triton` never falls back: it raises.
        precision: the arithmetic in which kernels look for negatives among float32 inputs: `fast` (float16 copies;
            tf32 in small batches), `tf32` or `exact`. What they find is computed again in float32. 16-bit inputs are
            taken as they are. PyTorch's path is always exact.
        check_finite: raise for NaN or inf in x or y; by default on the CPU, outside `torch.compile`. Otherwise a NaN
            shows in the gradient, as it does where finite inputs make similarities that their dtype cannot hold.
        group: a `torch.distributed.ProcessGroup`, or `world`: the objective is that of the global batch, the ranks'
            rows in rank order, as many of x as of y on each; how many may differ. All ranks call it together; the value
            is the global one, the gradient that of the own rows. See docs/scaling.md.
        averaged: multiply the gradient, not the value, by the number of ranks: for wrappers that average the ranks'
            parameter gradients (DDP, FSDP).
        exchange: how rows travel between ranks: `gather`, all at once, or `ring`, block by block, which holds at most
            two blocks of other ranks and emits the gradient in forward.

    Returns:
        0-d tensor. Its value is the true loss where T × P is the gradient of one that the term table carries, else
        the mean violation s⁻ − s⁺ of the selected triplets; the value never affects the gradient.

    Raises:
        ValueError: a shape, name, range or non-finite entry, with the argument, what came and what is allowed.
        TypeError: the same for types and dtypes.
        RuntimeError: on a second derivative, which a gradient without a loss does not have; under torch.func.vmap and
            forward-mode differentiation. torch.func.grad, vjp, jacrev and functional_call work.

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
    chosen = settings(T, P, mining, similarity, reduction, impl, precision)
    ranks = wire.ranks(group, averaged, exchange)
    return _run(x, y, chosen, ids, y_ids, weight, check_finite, ranks).loss


def apply_similarity(
    S: Tensor,
    T: str | Term = "cir",
    P: str | Term = "sig-ms",
    *,
    mining: str | Mining = "hardest",
    reduction: str = "mean",
    ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    weight: Tensor | None = None,
    impl: str = "auto",
    check_finite: bool | None = None,
) -> Tensor:
    """As `apply`, for a similarity matrix that any model made (cross-attention scorers): emits ∂l/∂S.

    Args:
        S: (N, M), entry (k, k) is the similarity of pair k for k < K = min(N, M). The rest is as for `apply`.

    Example:
        >>> import goal, torch
        >>> S = torch.tensor([[0.9, 0.1], [0.4, 0.8]], requires_grad=True)
        >>> goal.apply_similarity(S, T="con", P="con", reduction="sum").backward()
        >>> S.grad
        tensor([[-2.,  2.],
                [ 2., -2.]])
    """
    chosen = settings(T, P, mining, GIVEN, reduction, impl)
    return _run(S, None, chosen, ids, y_ids, weight, check_finite).loss


def gradients(
    x: Tensor,
    y: Tensor,
    T: str | Term = "cir",
    P: str | Term = "sig-ms",
    *,
    mining: str | Mining = "hardest",
    reduction: str = "mean",
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
) -> tuple[Tensor, Tensor, Stats]:
    """The gradient itself, without autograd: (∂l/∂x (N, D), ∂l/∂y (M, D), `Stats`). Arguments as for `apply`.

    Example:
        >>> import goal, torch
        >>> gx, gy, stats = goal.gradients(torch.eye(3), torch.eye(3), T="con", P="lin")
        >>> stats.recall_at_1
        tensor([1., 1.])
    """
    chosen = settings(T, P, mining, similarity, reduction, impl, precision)
    ranks, both = wire.ranks(group, averaged, exchange), (True, True)
    with torch.no_grad():
        if ranks is not None:
            found = _spread(x, y, chosen, ids, y_ids, weight, check_finite, ranks, both, shown=True)
            gx, gy = found.emit(x, y, None, both)
            seen, batch = found.seen, None
        else:
            batch, (_, mined, dense, seen), _ = _run(x, y, chosen, ids, y_ids, weight, check_finite)
            assert batch is not None
            gx, gy = _emit(x, y, chosen, batch, mined, dense, None, both)
        assert gx is not None
        assert gy is not None
        return gx, gy, stats(batch, chosen, seen)


def _no_autocast(device: str) -> AbstractContextManager[None]:
    """Products in the computing dtype; entered only where autocast is on, as it costs more than a small product."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


class Run(NamedTuple):
    """One call of an objective."""

    batch: Batch | None  # None where it is spread over ranks
    outcome: Outcome
    loss: Tensor  # 0-d, with the emitted gradient behind it


def _run(
    x: object,
    y: object | None,
    chosen: Settings,
    ids: object = None,
    y_ids: object = None,
    weight: object = None,
    check_finite: bool | None = None,
    ranks: Ranks | None = None,
) -> Run:
    """Validate, go forward, attach the gradient. `y` is None where x is a similarity matrix."""
    if ranks is not None:
        call = torch.compiler.disable(_run_spread) if torch.compiler.is_compiling() else _run_spread  # a graph ends
        return call(x, y, chosen, ids, y_ids, weight, check_finite, ranks)
    inputs: tuple[Any, Any] = x, y
    x, y, ids, y_ids, weight = _plain(x, y, ids, y_ids, weight)
    with _outside():
        if y is None:
            x = validation.similarity_matrix(x)
            y = x.new_empty(x.shape[1], 0)
            checked = {"S": x}
        else:
            x, y = validation.embeddings(x, y)
            checked = {"x": x, "y": y}
        check_finite = validation.checks_finite(check_finite, x)
        how, _ = engine.implementation(chosen, x, y)
        rows, cols = validation.identities(ids, y_ids, x.shape[0], y.shape[0], x.device)
        scale = validation.anchor_weight(weight, min(x.shape[0], y.shape[0]), x.device, check_finite)
        if check_finite:
            validation.finite(**checked)
        with torch.no_grad(), _no_autocast(x.device.type):
            masks = engine.masks(x, y, rows, cols, how)
            batch = engine.prepare(x, y, chosen.similarity, masks, how)
            outcome = engine.forward(batch, chosen, scale)
    loss = outcome.value
    of_x, of_y = inputs[0], y if inputs[1] is None else inputs[1]
    if torch.is_grad_enabled() and (of_x.requires_grad or of_y.requires_grad):
        rest = chosen, batch.masks, how, outcome.mined, outcome.dense
        if _inside():
            inside: Any = _EmitBy.apply
            loss = inside(of_x, of_y, (loss,), _emitter(*rest))
        else:
            attach: Any = _Emit.apply
            loss = attach(of_x, of_y, (loss,), *rest)
    return Run(batch, outcome, loss)


def _run_spread(
    x: Any,
    y: Any,
    chosen: Settings,
    ids: object,
    y_ids: object,
    weight: object,
    check_finite: bool | None,
    ranks: Ranks,
) -> Run:
    """`_run` over the ranks of a group."""
    tracked = torch.is_grad_enabled()
    of_x, of_y = (tracked and getattr(side, "requires_grad", False) for side in (x, y))
    value, emit, seen = _spread(x, y, chosen, ids, y_ids, weight, check_finite, ranks, (of_x, of_y), shown=False)
    loss = value
    if of_x or of_y:
        attach: Any = _EmitBy.apply
        loss = attach(x, y, (value,), emit)
    return Run(None, Outcome(value, None, None, seen), loss)


def _spread(
    x: Any,
    y: Any,
    chosen: Settings,
    ids: object,
    y_ids: object,
    weight: object,
    check_finite: bool | None,
    ranks: Ranks,
    needs: Needs,
    shown: bool,
) -> distributed.Result:
    x, y, ids, y_ids, weight = _plain(x, y, ids, y_ids, weight)
    with torch.no_grad(), _outside(), _no_autocast(x.device.type if isinstance(x, Tensor) else "cpu"):
        return distributed.run(x, y, chosen, ids, y_ids, weight, check_finite, ranks, needs, shown)


def _emit(
    x: Tensor,
    y: Tensor,
    chosen: Settings,
    batch: Batch,
    mined: Mined | None,
    dense: Dense | None,
    incoming: Tensor | None,
    needs: Needs,
) -> Gradients:
    """∂l/∂x and ∂l/∂y in the inputs' dtypes."""
    gx, gy = engine.emit(batch, chosen, mined, dense, incoming, needs)
    back = chosen.similarity.pull_back
    return (
        None if gx is None else back(x.detach().to(gx.dtype), batch.x, gx).to(x.dtype),
        None if gy is None else back(y.detach().to(gy.dtype), batch.y, gy).to(y.dtype),
    )


def _plain(*arguments: Any) -> tuple[Any, ...]:
    """The arguments without what torch.func.grad and vjp wrap tensors in: they are differentiated by `_Emit` alone.

    Raises:
        RuntimeError: one of them is batched by vmap, or has a forward-mode tangent.
    """
    if torch.compiler.is_compiling() or not (_inside() or forward_ad._current_level >= 0):
        return arguments
    kinds = {each.level(): each.key().name for each in functorch.get_interpreter_stack()} if _inside() else {}
    found = []
    for argument in arguments:
        while isinstance(argument, Tensor) and functorch.is_functorch_wrapped_tensor(argument):
            kind = kinds.get(functorch.maybe_get_level(argument))
            if kind in _REFUSED:
                raise RuntimeError(_NO_TRANSFORM.format(_REFUSED[kind]))
            argument = functorch.get_unwrapped(argument)
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError(_NO_TRANSFORM.format(_REFUSED["Jvp"]))
        found.append(argument)
    return tuple(found)


_REFUSED = {"Vmap": "vmap", "Jvp": "forward-mode differentiation", "Functionalize": "functionalize"}
_NO_TRANSFORM = (
    "goal emits a gradient in backward, which does not go through {} (torch.func.vmap, jvp, jacfwd, hessian and "
    "functionalize; torch.autograd.forward_ad). torch.func.grad, vjp, jacrev and functional_call work: use those, in a "
    "loop where there are several batches."
)


def _outside() -> AbstractContextManager[Any]:
    """Without the transforms of torch.func, for tensors that are plain."""
    return temporarily_clear_interpreter_stack() if _inside() else nullcontext()


def _inside() -> bool:
    """Whether a transform of torch.func is at work."""
    return not torch.compiler.is_compiling() and functorch.maybe_current_level() is not None


class _Emit(torch.autograd.Function):
    """The value forward; backward hands out the emitted gradient times the incoming one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        value: tuple[Tensor],  # in a tuple it is no input, and may be handed out without a copy
        chosen: Settings,
        masks: Masks,
        how: How,
        mined: Mined | None,
        dense: Dense | None,
    ) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.rest = chosen, masks, how, mined, dense
        return value[0].clone() if torch.compiler.is_compiling() else value[0]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        return *_handed_out(_emitter(*ctx.rest), ctx, incoming), *[None] * 6


def _emitter(chosen: Settings, masks: Masks, how: How, mined: Mined | None, dense: Dense | None) -> Emit:
    """What emits the gradient of a call, in backward."""

    def emit(x: Tensor, y: Tensor, incoming: Tensor | None, needs: Needs) -> Gradients:
        batch = engine.prepare(x, y, chosen.similarity, masks, how)
        return _emit(x, y, chosen, batch, mined, dense, incoming, needs)

    return emit


class _EmitBy(torch.autograd.Function):
    """As `_Emit`, by what emits: the own rows of a batch that is spread over ranks (nothing is sent in backward), and
    under torch.func, which wants the two parts of forward apart, at ten times the cost of a call.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, value: tuple[Tensor], emit: Emit) -> Tensor:
        return value[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, _, ctx.emit = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        return *_handed_out(ctx.emit, ctx, incoming), None, None


Emit = Callable[[Tensor, Tensor, Tensor | None, Needs], Gradients]  # (x, y, incoming, needs)


def _handed_out(emit: Emit, ctx: Any, incoming: Tensor) -> Gradients:
    """The gradients; under create_graph=True a second backward has to meet a refusal, not silence."""
    saved = ctx.saved_tensors
    x, y = _plain(*saved)
    many = not torch.compiler.is_compiling() and _batched(incoming)  # of jacrev: as many of them as it likes
    (times,) = (None,) if many else _plain(incoming)
    with torch.no_grad(), _outside(), _no_autocast(x.device.type):
        gx, gy = emit(x, y, times, ctx.needs_input_grad[:2])
    if many:
        gx, gy = (None if g is None else g * incoming.to(g.dtype) for g in (gx, gy))
    if torch.is_grad_enabled():
        refuse: Any = _NoSecondDerivative.apply
        gx, gy = (None if g is None else refuse(g, *saved, incoming) for g in (gx, gy))
    return gx, gy


def _batched(tensor: Tensor) -> bool:
    """Whether it stands for several, by vmap."""
    while functorch.is_functorch_wrapped_tensor(tensor) and not functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


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
