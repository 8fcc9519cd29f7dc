"""The quadratic stages as `torch.library` operators, so that `torch.compile(fullgraph=True)` keeps them whole.

`goal::s_pos`, `goal::mine`, `goal::dense_value` and `goal::dense_emit` take tensors, strings, booleans and sizes only.
Numbers travel in a float64 tensor, NaN for None: changing τ or a margin changes data, not the graph. Outside a compiled
region the engine calls the implementation itself: an operator's dispatch costs more than a small product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from goal import reference, terms
from goal import similarity as similarity_
from goal.reference import Masks
from goal.similarity import Dot, Gradients, Needs
from goal.statistics import Request, Statistics
from goal.terms import Parameter, Product, Term


def s_pos(similarity: Dot, x: Tensor, y: Tensor, pairs: int) -> Tensor:
    """`reference.s_pos` as an operator."""
    found: Tensor = torch.ops.goal.s_pos(x, y, similarity.name, pairs)
    return found


@torch.library.custom_op("goal::s_pos", mutates_args=())
def _s_pos(x: Tensor, y: Tensor, similarity: str, pairs: int) -> Tensor:
    return reference.s_pos(similarity_.by_name(similarity), x, y, pairs).clone()


@_s_pos.register_fake
def _(x: Tensor, y: Tensor, similarity: str, pairs: int) -> Tensor:
    return x.new_empty(pairs)


def statistics(similarity: Dot, x: Tensor, y: Tensor, s_pos: Tensor, request: Request, masks: Masks) -> Statistics:
    """`reference.statistics` as an operator."""
    numbers = _numbers((request.semi_hard, request.beta))
    semi, exp = request.semi_hard is not None, request.beta is not None
    found = torch.ops.goal.mine(x, y, s_pos, masks.ids, masks.y_ids, similarity.name, numbers, semi, request.lin, exp)
    s_neg, negative, semi_s, semi_negative, r_lin, r_exp = found
    return Statistics(
        s_pos=s_pos,
        s_neg=s_neg,
        negative=negative,
        semi=semi_s if semi else None,
        semi_negative=semi_negative if semi else None,
        r_neg_lin=r_lin if request.lin else None,
        r_neg_exp=r_exp if exp else None,
    )


@torch.library.custom_op("goal::mine", mutates_args=())
def _mine(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    numbers: Tensor,
    semi: bool,
    lin: bool,
    exp: bool,
) -> list[Tensor]:
    semi_hard, beta = numbers.tolist()
    request = Request(semi_hard if semi else None, lin, beta if exp else None)
    masks = Masks(ids, y_ids, 0, 0, s_pos.shape[0])
    _, *found = reference.statistics(similarity_.by_name(similarity), x, y, s_pos, request, masks)
    return [s_pos.new_empty(0) if one is None else one.contiguous() for one in found]


@_mine.register_fake
def _(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    numbers: Tensor,
    semi: bool,
    lin: bool,
    exp: bool,
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


def dense_value(
    similarity: Dot, x: Tensor, y: Tensor, s_pos: Tensor, share: Tensor, masks: Masks, product: Product
) -> Tensor:
    """`reference.dense_value` as an operator."""
    value: Tensor = torch.ops.goal.dense_value(
        x, y, s_pos, share, masks.ids, masks.y_ids, similarity.name, *_pack(product)
    )
    return value


@torch.library.custom_op("goal::dense_value", mutates_args=())
def _dense_value(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    share: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    t: str,
    p: str,
    t_numbers: Tensor,
    p_numbers: Tensor,
) -> Tensor:
    masks = Masks(ids, y_ids, 0, 0, s_pos.shape[0])
    return reference.dense_value(
        similarity_.by_name(similarity), x, y, s_pos, share, masks, _unpack(t, p, t_numbers, p_numbers)
    )


@_dense_value.register_fake
def _(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    share: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    similarity: str,
    t: str,
    p: str,
    t_numbers: Tensor,
    p_numbers: Tensor,
) -> Tensor:
    return s_pos.new_empty(())


def dense_emit(
    similarity: Dot,
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
    share: Tensor,
    relative: dict[str, Tensor],
    masks: Masks,
    product: Product,
    needs: Needs,
    finite: bool,
) -> Gradients:
    """`reference.dense_emit` as an operator."""
    gx, gy = torch.ops.goal.dense_emit(
        x,
        y,
        s_pos,
        share,
        list(relative.values()),
        ",".join(relative),
        masks.ids,
        masks.y_ids,
        similarity.name,
        *_pack(product),
        needs[0],
        needs[1],
        finite,
    )
    return gx if needs[0] else None, gy if needs[1] else None


@torch.library.custom_op("goal::dense_emit", mutates_args=())
def _dense_emit(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
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
    finite: bool,
) -> list[Tensor]:
    gradients = reference.dense_emit(
        similarity_.by_name(similarity),
        x,
        y,
        s_pos,
        share,
        dict(zip(names.split(",") if names else [], relative, strict=True)),
        Masks(ids, y_ids, 0, 0, s_pos.shape[0]),
        _unpack(t, p, t_numbers, p_numbers),
        (need_x, need_y),
        finite,
    )
    return [s_pos.new_empty(0) if one is None else one for one in gradients]


@_dense_emit.register_fake
def _(
    x: Tensor,
    y: Tensor,
    s_pos: Tensor,
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
    finite: bool,
) -> list[Tensor]:
    return [torch.empty_like(side) if needed else s_pos.new_empty(0) for side, needed in ((x, need_x), (y, need_y))]


def _numbers(values: tuple[Parameter, ...]) -> Tensor:
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


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
