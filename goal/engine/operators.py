"""The quadratic stages, whoever does them, and the same as `torch.library` operators for `torch.compile`.

The engine calls `pair`, `statistics`, `dense_value`, `dense_emit` and `mined_emit`. Eagerly they call whoever does it,
since an operator's dispatch costs more than a small product; in a graph they are the operators `goal::pair`,
`goal::mine`, `goal::dense_value`, `goal::dense_emit` and `goal::mined_emit`, which take tensors, strings, booleans and
sizes only. Numbers travel in a float64 tensor, NaN for None: changing τ or a margin changes data, not the graph.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal import similarity as similarity_
from goal import terms
from goal.engine import eager as reference
from goal.engine.statistics import Request, Statistics
from goal.engine.types import Gradients, Masks, Mined, Needs, Pairs, Plan
from goal.similarity import Dot
from goal.terms import Parameter, Product, Term

WEIGHED = 256  # pairs up to which kernels weigh in one launch


class How(NamedTuple):
    """Who computes, and in which arithmetic."""

    impl: str  # "torch" or "triton"
    precision: str  # "fast", "tf32" or "exact": of Triton's scans of float32 inputs

    @property
    def kernels(self) -> bool:
        return self.impl == "triton"


def _kernels() -> ModuleType:
    from goal.kernels import stage

    return stage


def cannot_lower(product: Product) -> str | None:
    """What keeps T × P from the dense kernels, or None. Numbers do not matter; in a graph the answer is a constant."""
    T, P = product.T, product.P
    return _obstacle(T.name, _structure(T), P.name, _structure(P))


def _structure(term: Term) -> tuple[Parameter, ...]:
    """A term's parameters, any number in place of its numbers."""
    return tuple(value if value is None or isinstance(value, bool) else 0.5 for _, value in term.values)


def _obstacle(t: str, t_values: tuple[Parameter, ...], p: str, p_values: tuple[Parameter, ...]) -> str | None:
    def term(definition: terms.Definition, values: tuple[Parameter, ...]) -> Term:
        return Term(definition, tuple(zip(definition.defaults, values, strict=True)))

    return _refusal(Product(term(terms.T[t], t_values), term(terms.P[p], p_values)))


# what torch.compiler.assume_constant_result does; but calling that here would import Dynamo, and Triton with it
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _refusal(product: Product) -> str | None:
    from goal.kernels import lower

    try:
        lower.lower(product)
    except lower.CannotLower as error:
        return str(error)
    return None


def plan(how: How, x: Tensor, y: Tensor, dtype: torch.dtype, request: Request, dense: bool) -> Plan:
    """How the quadratic stages would go about a batch; `dtype`: of the mathematics."""
    if how.kernels:
        found: Plan = _kernels().plan(x, y, request, dense, how.precision)
        return found
    return reference.plan(x.shape[0], y.shape[0], dtype, request, dense)


# ── pair ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pair(how: How, similarity: Dot, x: Tensor, y: Tensor, pairs: int, mined: bool = False) -> Pairs:
    """s⁺ (K,) of the first K = `pairs` rows, and what kernels want to know of the whole batch.

    `mined`: nobody will meet all negatives, and the bounds may be left in parts.
    """
    if torch.compiler.is_compiling():
        return Pairs(*torch.ops.goal.pair(x, y, similarity.name, pairs, *how))
    return _pair(how, similarity, x, y, pairs, mined)


def _pair(how: How, similarity: Dot, x: Tensor, y: Tensor, pairs: int, mined: bool = False) -> Pairs:
    if how.kernels:
        found: Pairs = _kernels().pair(x, y, pairs, mined)
        return found
    s_pos = reference.s_pos(similarity, x, y, pairs)
    return Pairs(s_pos, s_pos.new_empty(0, dtype=torch.int32))


@torch.library.custom_op("goal::pair", mutates_args=())
def _pair_op(x: Tensor, y: Tensor, similarity: str, pairs: int, impl: str, precision: str) -> list[Tensor]:
    return [one.clone() for one in _pair(How(impl, precision), similarity_.by_name(similarity), x, y, pairs)]


@_pair_op.register_fake
def _(x: Tensor, y: Tensor, similarity: str, pairs: int, impl: str, precision: str) -> list[Tensor]:
    kernels = impl == "triton"
    dtype = torch.float32 if kernels else x.dtype
    return [x.new_empty(pairs, dtype=dtype), x.new_empty(3 if kernels else 0, dtype=torch.int32)]


# ── mine ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def statistics(
    how: How, similarity: Dot, x: Tensor, y: Tensor, pairs: Pairs, request: Request, masks: Masks
) -> Statistics:
    """What the request asks for of the whole batch."""
    if not torch.compiler.is_compiling():
        return _statistics(how, similarity, x, y, pairs, request, masks)
    numbers = _numbers((request.semi_hard, request.beta))
    semi, exp = request.semi_hard is not None, request.beta is not None
    found = torch.ops.goal.mine(
        x, y, *pairs, masks.ids, masks.y_ids, similarity.name, numbers, semi, request.lin, exp, *how
    )
    s_neg, negative, semi_s, semi_negative, r_lin, r_exp = found
    return Statistics(
        s_pos=pairs.s_pos,
        s_neg=s_neg,
        negative=negative,
        semi=semi_s if semi else None,
        semi_negative=semi_negative if semi else None,
        r_neg_lin=r_lin if request.lin else None,
        r_neg_exp=r_exp if exp else None,
    )


def _statistics(
    how: How, similarity: Dot, x: Tensor, y: Tensor, pairs: Pairs, request: Request, masks: Masks
) -> Statistics:
    if how.kernels:
        found: Statistics = _kernels().statistics(x, y, pairs, request, masks, how.precision)
        return found
    return reference.statistics(similarity, x, y, pairs.s_pos, request, masks)


@torch.library.custom_op("goal::mine", mutates_args=())
def _mine_op(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    bounds: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    numbers: Tensor,
    semi: bool,
    lin: bool,
    exp: bool,
    impl: str,
    precision: str,
) -> list[Tensor]:
    semi_hard, beta = numbers.tolist()
    request = Request(semi_hard if semi else None, lin, beta if exp else None)
    masks = Masks(ids, y_ids, 0, 0, s_pos.shape[0])
    pairs = Pairs(s_pos, bounds)
    _, *found = _statistics(How(impl, precision), similarity_.by_name(similarity), x, y, pairs, request, masks)
    return [s_pos.new_empty(0) if one is None else one.clone() for one in found]


@_mine_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    bounds: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    numbers: Tensor,
    semi: bool,
    lin: bool,
    exp: bool,
    impl: str,
    precision: str,
) -> list[Tensor]:
    k = s_pos.shape[0]
    value, index, none = s_pos.new_empty(2, k), s_pos.new_empty(2, k, dtype=torch.int64), s_pos.new_empty(0)
    return [
        value,
        index,
        torch.empty_like(value) if semi else none,
        torch.empty_like(index) if semi else torch.empty_like(none),
        torch.empty_like(value) if lin else torch.empty_like(none),
        torch.empty_like(value) if exp else torch.empty_like(none),
    ]


# ── dense objectives ────────────────────────────────────────────────────────────────────────────────────────────────


def dense_value(
    how: How,
    similarity: Dot,
    x: Tensor,
    y: Tensor,
    pairs: Pairs,
    share: Tensor,
    masks: Masks,
    product: Product,
    every: bool,
) -> Tensor:
    """Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ) over all negatives, 0-d; `every`: of all anchors, not only of those with a share."""
    if not torch.compiler.is_compiling():
        return _dense_value(how, similarity, x, y, pairs, share, masks, product, every)
    value: Tensor = torch.ops.goal.dense_value(
        x, y, *pairs, share, masks.ids, masks.y_ids, similarity.name, *_pack(product), every, *how
    )
    return value


def _dense_value(
    how: How,
    similarity: Dot,
    x: Tensor,
    y: Tensor,
    pairs: Pairs,
    share: Tensor,
    masks: Masks,
    product: Product,
    every: bool,
) -> Tensor:
    if how.kernels:
        value: Tensor = _kernels().dense_value(x, y, pairs, share, masks, product, how.precision, every)
        return value
    return reference.dense_value(similarity, x, y, pairs.s_pos, share, masks, product)


@torch.library.custom_op("goal::dense_value", mutates_args=())
def _dense_value_op(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    bounds: Tensor,
    share: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    t: str,
    p: str,
    t_numbers: Tensor,
    p_numbers: Tensor,
    every: bool,
    impl: str,
    precision: str,
) -> Tensor:
    masks, product = Masks(ids, y_ids, 0, 0, s_pos.shape[0]), _unpack(t, p, t_numbers, p_numbers)
    pairs, measure = Pairs(s_pos, bounds), similarity_.by_name(similarity)
    return _dense_value(How(impl, precision), measure, x, y, pairs, share, masks, product, every)


@_dense_value_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    bounds: Tensor,
    share: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    t: str,
    p: str,
    t_numbers: Tensor,
    p_numbers: Tensor,
    every: bool,
    impl: str,
    precision: str,
) -> Tensor:
    return s_pos.new_empty(())


def dense_emit(
    how: How,
    similarity: Dot,
    x: Tensor,
    y: Tensor,
    pairs: Pairs,
    share: Tensor,
    relative: dict[str, Tensor],
    masks: Masks,
    product: Product,
    needs: Needs,
    every: bool,
) -> Gradients:
    """∂l/∂x and ∂l/∂y of anchors that meet all their negatives; the arguments as for `reference.dense_emit`."""
    if not torch.compiler.is_compiling():
        return _dense_emit(how, similarity, x, y, pairs, share, relative, masks, product, needs, every)
    gx, gy = torch.ops.goal.dense_emit(
        x,
        y,
        *pairs,
        share,
        list(relative.values()),
        ",".join(relative),
        masks.ids,
        masks.y_ids,
        similarity.name,
        *_pack(product),
        *needs,
        every,
        *how,
    )
    return gx if needs[0] else None, gy if needs[1] else None


def _dense_emit(
    how: How,
    similarity: Dot,
    x: Tensor,
    y: Tensor,
    pairs: Pairs,
    share: Tensor,
    relative: dict[str, Tensor],
    masks: Masks,
    product: Product,
    needs: Needs,
    every: bool,
) -> Gradients:
    if how.kernels:
        found: Gradients = _kernels().dense_emit(
            x, y, pairs, share, relative, masks, product, needs, how.precision, every
        )
        return found
    return reference.dense_emit(similarity, x, y, pairs.s_pos, share, relative, masks, product, needs)


@torch.library.custom_op("goal::dense_emit", mutates_args=())
def _dense_emit_op(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    bounds: Tensor,
    share: Tensor,
    relative: list[Tensor],
    names: str,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    t: str,
    p: str,
    t_numbers: Tensor,
    p_numbers: Tensor,
    need_x: bool,
    need_y: bool,
    every: bool,
    impl: str,
    precision: str,
) -> list[Tensor]:
    gradients = _dense_emit(
        How(impl, precision),
        similarity_.by_name(similarity),
        x,
        y,
        Pairs(s_pos, bounds),
        share,
        dict(zip(names.split(",") if names else [], relative, strict=True)),
        Masks(ids, y_ids, 0, 0, s_pos.shape[0]),
        _unpack(t, p, t_numbers, p_numbers),
        (need_x, need_y),
        every,
    )
    return [s_pos.new_empty(0) if one is None else one for one in gradients]


@_dense_emit_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    bounds: Tensor,
    share: Tensor,
    relative: list[Tensor],
    names: str,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    t: str,
    p: str,
    t_numbers: Tensor,
    p_numbers: Tensor,
    need_x: bool,
    need_y: bool,
    every: bool,
    impl: str,
    precision: str,
) -> list[Tensor]:
    return [s_pos.new_empty(one.shape if needed else 0) for one, needed in ((x, need_x), (y, need_y))]


# ── mined objectives ────────────────────────────────────────────────────────────────────────────────────────────────


def weighs(how: How, product: Product, mined: bool, pairs: int) -> bool:
    """Whether `weigh` takes an objective: a small mined one whose terms lower, on kernels, outside a graph."""
    if not (how.kernels and mined and pairs <= WEIGHED) or torch.compiler.is_compiling():
        return False
    return cannot_lower(product) is None


def weigh(statistics: Statistics, product: Product, scale: Any) -> tuple[Mined, Tensor]:
    """The entries of G and the value of a mined objective in one launch; `scale`: (K,) or a number."""
    found: tuple[Mined, Tensor] = _kernels().weighed(statistics, product, scale)
    return found


def mined_emit(
    how: How, similarity: Dot, x: Tensor, y: Tensor, mined: Mined, incoming: Tensor | None, needs: Needs
) -> Gradients:
    """∂l/∂x and ∂l/∂y of the entries that weighing leaves, times the incoming gradient (0-d)."""
    if not how.kernels:
        entries = mined.entries()
        if incoming is not None:
            entries = entries._replace(value=entries.value * incoming)
        return similarity.vjp(x, y, entries, needs)
    incoming = mined.pull.new_ones(()) if incoming is None else incoming
    if torch.compiler.is_compiling():
        gx, gy = torch.ops.goal.mined_emit(x, y, *mined, incoming, *needs)
        return gx if needs[0] else None, gy if needs[1] else None
    found: Gradients = _kernels().mined_emit(x, y, mined, incoming, needs)
    return found


@torch.library.custom_op("goal::mined_emit", mutates_args=())
def _mined_emit_op(
    x: Tensor,
    y: Tensor,
    index: Tensor,
    pull: Tensor,
    push: Tensor,
    incoming: Tensor,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    found = _kernels().mined_emit(x, y, Mined(index, pull, push), incoming, (need_x, need_y))
    return [side.new_empty(0) if one is None else one for one, side in zip(found, (x, y), strict=True)]


@_mined_emit_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    index: Tensor,
    pull: Tensor,
    push: Tensor,
    incoming: Tensor,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    return [side.new_empty(side.shape if needed else 0) for side, needed in ((x, need_x), (y, need_y))]


# ── numbers and terms as data ───────────────────────────────────────────────────────────────────────────────────────


def _numbers(values: tuple[Parameter, ...]) -> Tensor:
    numbers = [math.nan if value is None else float(value) for value in values]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _pack(product: Product) -> tuple[str, str, Tensor, Tensor]:
    t, p = product.T, product.P
    return t.name, p.name, _numbers(tuple(t.params.values())), _numbers(tuple(p.params.values()))


def _unpack(t: str, p: str, t_numbers: Tensor, p_numbers: Tensor) -> Product:
    return Product(_term(terms.T[t], t_numbers), _term(terms.P[p], p_numbers))


def _term(definition: terms.Definition, numbers: Tensor) -> Term:
    """The term whose parameters became these numbers; NaN is None, and a default's type tells a boolean."""
    values = zip(definition.defaults.items(), numbers.tolist(), strict=True)
    return Term(
        definition,
        tuple(
            (name, bool(value) if isinstance(default, bool) else None if math.isnan(value) else value)
            for (name, default), value in values
        ),
    )
