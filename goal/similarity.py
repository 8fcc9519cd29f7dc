"""Similarities: how S is computed from x and y, tile by tile, and how ∂l/∂S is propagated back.

A similarity has seven methods. The code that computes coefficients never knows which similarity they belong to.

    embed(x)                      the rows from which tiles are computed: x itself, or x / ‖x‖  (N, D) → (N, D)
    tile(x_block, y_block)        a block of S                                        (n, D), (m, D) → (n, m)
    pairs(x, y, row, col)         single entries S[row, col]; equal pairs are bit-equal  → (E,)
    vjp(x, y, entries, needs)     ∂l/∂x and ∂l/∂y of entries of G = ∂l/∂S; repeated entries add
    tile_vjp(x, y, g, needs)      the same for a full tile of G
    add_vjp(x, y, g, gx, gy)      adds it to the gradients of the tile's rows
    pull_back(x, embedded, g)     the gradient at x from the gradient at embed(x)
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from goal.engine.types import Entries, Gradients, Needs
from goal.names import spell, unknown


class Dot:
    """s = x·y: the inner product; for unit vectors the cosine."""

    name = "dot"
    _SMALL = 1 << 12  # entries of G up to which a full matrix is faster than gathering

    def embed(self, x: Tensor) -> Tensor:
        return x

    def tile(self, x_block: Tensor, y_block: Tensor, out: Tensor | None = None) -> Tensor:
        """A block of S, which the caller may overwrite; in `out` if given."""
        return torch.mm(x_block, y_block.T) if out is None else torch.mm(x_block, y_block.T, out=out)

    def pairs(self, x: Tensor, y: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
        """Entries S[row, col]; None takes the rows of that side in order, and at least one of the two is None."""
        first, second, at = (x, y, col) if row is None else (y, x, row)
        size = first.shape[0]
        if at is None:
            at = torch.arange(size, device=x.device)
        if _SAMPLES and x.device.type == "cpu":
            # the entries (k, at[k]) of first · secondᵀ, one in each row of a CSR matrix: without gathered copies
            rows = torch.arange(size + 1, device=x.device)
            shape, zeros = (size, second.shape[0]), first.new_zeros(size)
            wanted = torch.sparse_csr_tensor(rows, at, zeros, shape, device=x.device, check_invariants=False)
            entries: Tensor = torch.sparse.sampled_addmm(wanted, first, second.T, beta=0).values()
            return entries
        return (first * second.index_select(0, at)).sum(1)

    def vjp(self, x: Tensor, y: Tensor, entries: Entries, needs: Needs) -> Gradients:
        row, col, value = entries
        n, m = x.shape[0], y.shape[0]
        if n * m <= self._SMALL:
            g = value.new_zeros(n, m).index_put_((row, col), value, accumulate=True)
            return self.tile_vjp(x, y, g, needs)
        return (
            _gather(row, n, col, y, value) if needs[0] else None,
            _gather(col, m, row, x, value) if needs[1] else None,
        )

    def tile_vjp(self, x_block: Tensor, y_block: Tensor, g: Tensor, needs: Needs) -> Gradients:
        return g @ y_block if needs[0] else None, g.T @ x_block if needs[1] else None

    def add_vjp(self, x_block: Tensor, y_block: Tensor, g: Tensor, gx: Tensor | None, gy: Tensor | None) -> None:
        """Add the gradients of a full tile of G to gx and gy, in place; None where there is no need."""
        if gx is not None:
            gx.addmm_(g, y_block)
        if gy is not None:
            gy.addmm_(g.T, x_block)

    def pull_back(self, x: Tensor, embedded: Tensor, gradient: Tensor) -> Tensor:
        return gradient


class _Composed(Dot):
    """A similarity that is no product: its gradients are added after they were made."""

    def add_vjp(self, x_block: Tensor, y_block: Tensor, g: Tensor, gx: Tensor | None, gy: Tensor | None) -> None:
        at_x, at_y = self.tile_vjp(x_block, y_block, g, (gx is not None, gy is not None))
        if gx is not None and at_x is not None:
            gx += at_x
        if gy is not None and at_y is not None:
            gy += at_y


class Cosine(Dot):
    """s = x·y / (‖x‖ ‖y‖): a zero vector has similarity 0 with everything, and gradient 0."""

    name = "cosine"

    def embed(self, x: Tensor) -> Tensor:
        scaled, length, _ = _scaled(x)
        return _divide(scaled, length)

    def pull_back(self, x: Tensor, embedded: Tensor, gradient: Tensor) -> Tensor:
        radial = (gradient * embedded).sum(1, keepdim=True)
        _, length, power = _scaled(x)
        return _divide(gradient - radial * embedded, length) / power


class Order(_Composed):
    """s = −‖max(0, y − x)‖: order embeddings, x images, y captions (Vendrov et al., 2016, eq. 2).

    Where y ≤ x in every coordinate s = 0 and the subgradient is 0.
    """

    name = "order"
    _HELD = 1 << 18  # elements of the rows × columns × D differences in memory at a time: they stay in the cache

    def tile(self, x_block: Tensor, y_block: Tensor, out: Tensor | None = None) -> Tensor:
        rows = max(1, self._HELD // y_block.numel())
        return torch.cat([_violation(part[:, None], y_block) for part in torch.split(x_block, rows)])

    def pairs(self, x: Tensor, y: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
        return _violation(_rows(x, row), _rows(y, col))

    def vjp(self, x: Tensor, y: Tensor, entries: Entries, needs: Needs) -> Gradients:
        row, col, value = entries
        at_x = _order_gradient(x.index_select(0, row), y.index_select(0, col), value)
        return (
            torch.zeros_like(x).index_add_(0, row, at_x) if needs[0] else None,
            torch.zeros_like(y).index_add_(0, col, -at_x) if needs[1] else None,
        )

    def tile_vjp(self, x_block: Tensor, y_block: Tensor, g: Tensor, needs: Needs) -> Gradients:
        rows = max(1, self._HELD // y_block.numel())
        gx, gy = [], torch.zeros_like(y_block)
        for x_part, g_part in zip(torch.split(x_block, rows), torch.split(g, rows), strict=True):
            at_x = _order_gradient(x_part[:, None], y_block, g_part)  # (n, m, D)
            gx.append(at_x.sum(1))
            gy -= at_x.sum(0)
        return torch.cat(gx) if needs[0] else None, gy if needs[1] else None


class Given(_Composed):
    """A matrix S from any model: x is S itself, y is not used, and the gradient is G."""

    name = "given"

    def tile(self, x_block: Tensor, y_block: Tensor, out: Tensor | None = None) -> Tensor:
        return x_block.clone()

    def pairs(self, x: Tensor, y: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
        if row is None:
            row = torch.arange(min(x.shape) if col is None else col.shape[0], device=x.device)
        return x[row, torch.arange(row.shape[0], device=x.device) if col is None else col]

    def vjp(self, x: Tensor, y: Tensor, entries: Entries, needs: Needs) -> Gradients:
        row, col, value = entries
        return torch.zeros_like(x).index_put_((row, col), value, accumulate=True), None

    def tile_vjp(self, x_block: Tensor, y_block: Tensor, g: Tensor, needs: Needs) -> Gradients:
        return g, None


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _gather(at: Tensor, size: int, other: Tensor, source: Tensor, value: Tensor) -> Tensor:
    """Σ over entries with at = i of value · source[other], (size, D): each i's segment summed in source order."""
    order = torch.argsort(at, stable=True)
    starts = torch.searchsorted(at[order], torch.arange(size, device=at.device))
    # embedding_bag(weight, indices, offsets, scale_grad_by_freq, mode=sum, sparse, per_sample_weights, last offset)
    return torch.embedding_bag(source, other[order], starts, False, 0, False, value[order], False)[0]


def norm(x: Tensor) -> Tensor:
    """‖x‖ over the last dimension, for any representable norm: rows whose squares are not representable are scaled."""
    if torch.compiler.is_compiling():  # a graph cannot branch on a computed value
        _, length, power = _scaled(x)
        return torch.squeeze(length * power, -1)
    found: Tensor = torch.linalg.vector_norm(x, dim=-1)
    odd = _odd(found)
    if odd is not None:
        _, length, power = _scaled(x[odd])
        found[odd] = torch.squeeze(length * power, -1)
    return found


def _odd(length: Tensor) -> Tensor | None:
    """Mask of norms that are short, 0, inf or NaN; None if there are none."""
    info = torch.finfo(length.dtype)
    short = (info.tiny / info.eps) ** 0.5  # squares of smaller norms have lost bits
    if length.numel() == 0:
        return None
    least, most = torch.aminmax(length)
    return None if short < least.item() and most.item() < math.inf else ~((length > short) & (length < math.inf))


def _scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x divided by a power of two near max|x|, the norm of the quotient, and the power, (…, 1): no square overflows."""
    largest = x.abs().amax(-1, keepdim=True)
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    scaled = x / power
    length: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled, length, power


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """x / by, and 0 where by = 0."""
    return torch.where(by == 0, 0, x / by)


def _violation(x: Tensor, y: Tensor) -> Tensor:
    return -norm((y - x).clamp(min=0))


def _order_gradient(x: Tensor, y: Tensor, value: Tensor) -> Tensor:
    """value · ∂s/∂x = −value · ∂s/∂y, over the last dimension."""
    gap, value = (y - x).clamp(min=0), value[..., None]
    if torch.compiler.is_compiling():
        scaled, length, _ = _scaled(gap)
        return _divide(scaled, length) * value
    length = torch.linalg.vector_norm(gap, dim=-1, keepdim=True)
    found = _divide(gap * value, length)
    odd = _odd(length[..., 0])
    if odd is not None:
        scaled, length, _ = _scaled(gap[odd])
        found[odd] = _divide(scaled, length) * value[odd]
    return found


def _samples() -> bool:
    """Whether this PyTorch computes single entries of a product on the CPU (builds with MKL do)."""
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")  # "CSR support is in beta", which PyTorch says once per process
        try:
            one = torch.ones(1, 1, dtype=torch.float32)
            entry = torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), one.new_zeros(1), (1, 1))
            return bool(torch.sparse.sampled_addmm(entry, one, one, beta=0).values().item() == 1)
        except RuntimeError:
            return False


_SAMPLES = _samples()
_BY_NAME = {similarity.name: similarity for similarity in (Dot(), Cosine(), Order())}
GIVEN = Given()


def by_name(name: str) -> Dot:
    """The similarity of that name, `given` included."""
    return GIVEN if name == "given" else _BY_NAME[name]


def bind(similarity: str) -> Dot:
    """A similarity from what a user passes as `similarity=`."""
    if not isinstance(similarity, str):
        raise TypeError(f"similarity must be one of {', '.join(_BY_NAME)}, got {similarity!r}.")
    if spell(similarity) not in _BY_NAME:
        raise unknown("similarity", similarity, list(_BY_NAME))
    return _BY_NAME[spell(similarity)]
