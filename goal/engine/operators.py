"""The quadratic stages as the path calls them: directly, or as operators in a graph of `torch.compile`.

Dispatching an operator costs more than a small product, so outside a graph the backend is called directly. In a graph
the stages are the operators `goal::pair`, `goal::positives`, `goal::mine`, `goal::dense_value`, `goal::dense_block`,
`goal::soft_block` and `goal::mined_emit`. `_operator` makes each of them from a function that computes the stage and a
function that gives the shapes of its results. All operators take the same arguments: a `Work`, packed into tensors,
sizes, numbers and a string of structure (names and flags). Numbers are data, with NaN for None, so changing τ or a
margin changes a tensor and not the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal import similarity as similarity_
from goal import terms
from goal.engine.backend import Backend
from goal.engine.partials import positives_of
from goal.engine.statistics import Request, Statistics
from goal.engine.types import Block, Dense, Gradients, Masks, Mined, Needs, Pairs, Soft
from goal.mining import CURVES, Softmax
from goal.positives import Positives
from goal.terms import Parameter, Product, Term


def pair(backend: Backend, block: Block, mined: bool) -> Pairs:
    """s⁺ of a whole batch; `mined`: the objective never uses all negatives."""
    if not torch.compiler.is_compiling():
        return backend.pair(block.x, block.y, block.masks.pairs, mined)
    return Pairs(*_PAIR(Work(backend, block)))


def positives(backend: Backend, block: Block, rule: Positives) -> Pairs:
    """The positives by ids of a whole batch."""
    if not torch.compiler.is_compiling():
        return positives_of(rule, block.masks.positives, *backend.positives(block, rule))
    s_pos, *rest = _POSITIVES(Work(backend, block, rule=rule))
    hardest, log_sum, exact = (one if one.numel() else None for one in rest)
    return Pairs(s_pos, torch.empty(0, dtype=torch.float64), hardest, log_sum, exact)


def statistics(backend: Backend, block: Block, pairs: Pairs, request: Request) -> Statistics:
    """The requested statistics of a whole batch."""
    if not torch.compiler.is_compiling():
        return backend.statistics(block, pairs, request)
    mined: list[Any] = _MINE(Work(backend, block, pairs, request))
    return Statistics(pairs.s_pos, *(one if one.numel() else None for one in mined))


def dense_value(backend: Backend, block: Block, dense: Dense) -> Tensor:
    """Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ) over the negatives in a block of S, 0-d."""
    if not torch.compiler.is_compiling():
        return backend.dense_value(block, dense)
    return _DENSE_VALUE(Work(backend, block, dense=dense))[0]


def dense_block(
    backend: Backend, block: Block, dense: Dense, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of the negatives in a block of S at its rows and columns, and the pull at the pairs (2, K)."""
    if not torch.compiler.is_compiling():
        return backend.dense_block(block, dense, needs)
    gx, gy, pull = _DENSE_BLOCK(Work(backend, block, dense=dense, needs=needs))
    return gx if needs[0] else None, gy if needs[1] else None, pull


def soft_block(backend: Backend, block: Block, soft: Soft, needs: Needs) -> Gradients:
    """Gradients of the softmaxes over a block of S at its rows and columns."""
    if not torch.compiler.is_compiling():
        return backend.soft_block(block, soft, needs)
    gx, gy = _SOFT_BLOCK(Work(backend, block, soft=soft, needs=needs))
    return gx if needs[0] else None, gy if needs[1] else None


def mined_emit(backend: Backend, block: Block, mined: Mined, incoming: Tensor | None, needs: Needs) -> Gradients:
    """Gradients of the mined entries in a block of S at its rows and columns, times the incoming gradient (0-d)."""
    if not (backend.kernels and torch.compiler.is_compiling()):  # the eager stage is plain tensor functions
        return backend.mined_emit(block, mined, incoming, needs)
    incoming = mined.push.new_ones(()) if incoming is None else incoming
    gx, gy = _MINED_EMIT(Work(backend, block, mined=mined, incoming=incoming, needs=needs))
    return gx if needs[0] else None, gy if needs[1] else None


# ── the arguments of operators ──────────────────────────────────────────────────────────────────────────────────────


class Work(NamedTuple):
    """The arguments of an operator's stage."""

    backend: Backend
    block: Block
    pairs: Pairs | None = None
    request: Request | None = None
    rule: Positives | None = None
    dense: Dense | None = None
    soft: Soft | None = None
    mined: Mined | None = None
    incoming: Tensor | None = None
    needs: Needs = (True, True)


Packed = tuple[list[Tensor], list[int], Tensor, str]  # tensors, sizes, numbers, structure


def pack(work: Work) -> Packed:
    (impl, precision, similarity), (x, y, masks) = work.backend, work.block
    numbers: list[Parameter] = []
    tensors, parts = [x, y], [impl, precision, similarity.name]
    sizes = [masks.n, masks.m, *masks.size, masks.row_offset, masks.col_offset]
    if masks.ids is not None and masks.y_ids is not None:
        tensors += [masks.ids, masks.y_ids]
        parts.append("ids")
    parts += ["by-ids"] * masks.by_ids + ["one-set"] * masks.one_set
    if work.pairs is not None:
        tensors += [work.pairs.s_pos, work.pairs.bounds]
        parts.append("pairs")
    if work.rule is not None:
        parts.append(f"rule:{work.rule.name}")
        if work.rule.softmax is not None:
            numbers += work.rule.softmax.numbers.values()
            parts[-1] = _softmax_as_text(parts[-1], work.rule.softmax)
    if work.request is not None:
        semi_hard, lin, beta, hardest, softmax, shares = work.request
        numbers += [semi_hard, beta]
        flags = (semi_hard is not None, lin, beta is not None, hardest, shares)
        parts.append("request:" + ":".join("1" if flag else "0" for flag in flags))
        if softmax is not None:
            numbers += softmax.numbers.values()
            parts.append(_softmax_as_text("sums", softmax))
    if work.dense is not None:
        product, s_pos, bounds, share, relative, every, _, apart = work.dense
        tensors += [s_pos, bounds, share, *relative.values()]
        numbers += [value for term in (product.T, product.P) for value in term.params.values()]
        how = "every" if every else "some", "apart" if apart else "together"
        parts.append(":".join(["dense", product.T.name, product.P.name, *how, *relative]))
    if work.soft is not None:
        soft = work.soft
        pulls = [] if soft.pull is None else [soft.pull]
        tensors += [soft.log_sum, soft.push, soft.s_pos, *pulls, *soft.relative.values()]
        numbers += soft.softmax.numbers.values()
        parts.append(_softmax_as_text("soft:pulls" if pulls else "soft:none", soft.softmax))
        if soft.product is not None:
            numbers += [value for term in (soft.product.T, soft.product.P) for value in term.params.values()]
            parts.append(":".join(["each", soft.product.T.name, soft.product.P.name, *soft.relative]))
    if work.mined is not None and work.incoming is not None:
        pulls = [] if work.mined.pull is None else [work.mined.pull]
        tensors += [work.mined.negative, work.mined.push, work.incoming, *pulls]
        parts.append("mined:pulls" if pulls else "mined:none")
    parts.append("".join("1" if need else "0" for need in work.needs))
    as_numbers = [math.nan if value is None else float(value) for value in numbers]
    return tensors, sizes, torch.tensor(as_numbers, dtype=torch.float64, device="cpu"), ",".join(parts)


def unpack(tensors: Sequence[Tensor], sizes: Sequence[int], numbers: Sequence[float], structure: str) -> Work:
    impl, precision, similarity, *parts, needs = structure.split(",")
    tensor, number = iter(tensors), iter(numbers)
    x, y = next(tensor), next(tensor)
    n, m, rows, cols, row_offset, col_offset = sizes
    by_ids, one_set = "by-ids" in parts, "one-set" in parts
    masks = Masks(n, m, (rows, cols), row_offset, col_offset, by_ids=by_ids, one_set=one_set)
    if "ids" in parts:
        masks = masks._replace(ids=next(tensor), y_ids=next(tensor))
    wanted: Needs = (needs[0] == "1", needs[1] == "1")
    work = Work(Backend(impl, precision, similarity_.by_name(similarity)), Block(x, y, masks), needs=wanted)
    for part in parts:
        kind, *rest = part.split(":")
        if kind == "pairs":
            work = work._replace(pairs=Pairs(next(tensor), next(tensor)))
        elif kind == "request":
            semi, lin, exp, hardest, shares = (flag == "1" for flag in rest)
            margin, beta = next(number), next(number)
            request = Request(margin if semi else None, lin, beta if exp else None, hardest, None, shares)
            work = work._replace(request=request)
        elif kind == "sums":
            assert work.request is not None
            work = work._replace(request=work.request._replace(softmax=_softmax(rest, number)))
        elif kind == "soft":
            softmax = _softmax(rest[1:], number)
            log_sum, push, s_pos = next(tensor), next(tensor), next(tensor)
            pull = next(tensor) if rest[0] == "pulls" else None
            work = work._replace(soft=Soft(softmax, log_sum, pull, push, s_pos, {}, None, None))
        elif kind == "rule":
            name, *its = rest
            work = work._replace(rule=Positives(name, _softmax(its, number) if its else None))
        elif kind == "each":
            assert work.soft is not None
            t, p, *names = rest
            product = Product(_term(terms.T[t], number), _term(terms.P[p], number))
            relative = {name: next(tensor) for name in names}
            work = work._replace(soft=work.soft._replace(product=product, relative=relative))
        elif kind == "dense":
            t, p, every, apart, *names = rest
            product = Product(_term(terms.T[t], number), _term(terms.P[p], number))
            s_pos, bounds, share = next(tensor), next(tensor), next(tensor)
            relative = {name: next(tensor) for name in names}
            work = work._replace(
                dense=Dense(product, s_pos, bounds, share, relative, every == "every", apart=apart == "apart")
            )
        elif kind == "mined":
            negative, push, incoming = next(tensor), next(tensor), next(tensor)
            mined = Mined(negative, next(tensor) if rest[0] == "pulls" else None, push)
            work = work._replace(mined=mined, incoming=incoming)
    return work


def _term(definition: terms.Definition, numbers: Iterator[float]) -> Term:
    """The term whose parameters are the next numbers; NaN is None, and a boolean is known by its default's type."""

    def value(default: Parameter, number: float) -> Parameter:
        return bool(number) if isinstance(default, bool) else None if math.isnan(number) else number

    return Term(
        definition, tuple((name, value(default, next(numbers))) for name, default in definition.defaults.items())
    )


def _softmax_as_text(kind: str, softmax: Softmax) -> str:
    curves = softmax.hardness.key, softmax.level.key
    return ":".join([kind, *curves, softmax.at, softmax.over, softmax.normalise])


def _softmax(structure: Sequence[str], numbers: Iterator[float]) -> Softmax:
    hardness, level, at, over, normalise = structure
    tau, alpha, margin = next(numbers), next(numbers), next(numbers)
    return Softmax(CURVES[hardness], CURVES[level], tau, alpha, margin, at, over, normalise)


# ── the operators ───────────────────────────────────────────────────────────────────────────────────────────────────

Outputs = Sequence[Tensor | None]
Operator = Callable[[Work], list[Tensor]]


def _operator(name: str, run: Callable[[Work], Outputs], shapes: Callable[[Work], Outputs]) -> Operator:
    """A `torch.library` operator from a stage's function and a function that returns empty tensors like its results."""
    schema = "(Tensor[] tensors, SymInt[] sizes, Tensor numbers, str structure) -> Tensor[]"

    def returned(work: Work, outputs: Outputs) -> list[Tensor]:
        nothing = work.block.x.new_empty(0)
        return [nothing.clone() if one is None else one for one in outputs]

    def compute(tensors: list[Tensor], sizes: list[int], numbers: Tensor, structure: str) -> list[Tensor]:
        work = unpack(tensors, sizes, numbers.tolist(), structure)
        return [one.clone() for one in returned(work, run(work))]  # an operator's results must not alias its inputs

    def fake(tensors: list[Tensor], sizes: list[int], numbers: Tensor, structure: str) -> list[Tensor]:
        work = unpack(tensors, sizes, [0.5] * numbers.shape[0], structure)
        return returned(work, shapes(work))

    operator = torch.library.custom_op(f"goal::{name}", compute, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    overload = getattr(torch.ops.goal, name).default

    def call(work: Work) -> list[Tensor]:
        outputs: list[Tensor] = overload(*pack(work))
        return outputs

    return call


def _pair(work: Work) -> Outputs:
    x, y, masks = work.block
    return work.backend.pair(x, y, masks.pairs)[:2]


def _pair_shapes(work: Work) -> Outputs:
    kernels, x = work.backend.kernels, work.block.x
    s_pos = x.new_empty(work.block.masks.pairs, dtype=torch.float32 if kernels else x.dtype)
    return s_pos, x.new_empty(3 if kernels else 0, dtype=torch.int32 if kernels else torch.float64)


def _positives(work: Work) -> Outputs:
    assert work.rule is not None
    found = positives_of(work.rule, work.block.masks.positives, *work.backend.positives(work.block, work.rule))
    return found.s_pos, found.hardest, found.log_sum, found.exact


def _positives_shapes(work: Work) -> Outputs:
    assert work.rule is not None
    x, k, soft = work.block.x, work.block.masks.pairs, work.rule.softmax is not None
    index, log_sum = x.new_empty(2, k, dtype=torch.int64), x.new_empty(2, k, dtype=torch.float64)
    return x.new_empty(2, k), *((None, log_sum, torch.empty_like(log_sum)) if soft else (index, None, None))


def _mine(work: Work) -> Outputs:
    assert work.pairs is not None
    assert work.request is not None
    return work.backend.statistics(work.block, work.pairs, work.request)[1:-1]  # the exponentials are not kept


def _mine_shapes(work: Work) -> Outputs:
    assert work.pairs is not None
    assert work.request is not None
    s_pos, (semi_hard, lin, beta, hardest, softmax, shares) = work.pairs.s_pos, work.request
    k = s_pos.shape[-1]

    def value() -> Tensor:
        return s_pos.new_empty(2, k)

    def index() -> Tensor:
        return s_pos.new_empty(2, k, dtype=torch.int64)

    semi = semi_hard is not None
    extrema = [one() if wanted else None for wanted in (hardest, semi) for one in (value, index)]
    sums = [value() if wanted else None for wanted in (lin, beta is not None)]
    log_sum = None if softmax is None else s_pos.new_empty(2, k, dtype=torch.float64)
    own = None if softmax is None or work.block.masks.by_ids else s_pos.new_empty(k)
    return *extrema, *sums, log_sum, own, value() if shares else None


def _dense_value(work: Work) -> Outputs:
    assert work.dense is not None
    return (work.backend.dense_value(work.block, work.dense),)


def _dense_value_shapes(work: Work) -> Outputs:
    assert work.dense is not None
    return (work.dense.s_pos.new_empty(()),)


def _dense_block(work: Work) -> Outputs:
    assert work.dense is not None
    return work.backend.dense_block(work.block, work.dense, work.needs)


def _dense_block_shapes(work: Work) -> Outputs:
    assert work.dense is not None
    s_pos, (x, y, _) = work.dense.s_pos, work.block
    gx, gy = (s_pos.new_empty(one.shape) if need else None for one, need in zip((x, y), work.needs, strict=True))
    return gx, gy, torch.empty_like(work.dense.share)


def _soft_block(work: Work) -> Outputs:
    assert work.soft is not None
    return work.backend.soft_block(work.block, work.soft, work.needs)


def _mined_emit(work: Work) -> Outputs:
    assert work.mined is not None
    return work.backend.mined_emit(work.block, work.mined, work.incoming, work.needs)


def _emit_shapes(work: Work) -> Outputs:
    x, y, _ = work.block
    return [torch.empty_like(one) if need else None for one, need in zip((x, y), work.needs, strict=True)]


_PAIR = _operator("pair", _pair, _pair_shapes)
_POSITIVES = _operator("positives", _positives, _positives_shapes)
_MINE = _operator("mine", _mine, _mine_shapes)
_DENSE_VALUE = _operator("dense_value", _dense_value, _dense_value_shapes)
_DENSE_BLOCK = _operator("dense_block", _dense_block, _dense_block_shapes)
_SOFT_BLOCK = _operator("soft_block", _soft_block, _emit_shapes)
_MINED_EMIT = _operator("mined_emit", _mined_emit, _emit_shapes)
