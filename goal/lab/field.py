"""The field (∂l/∂s⁺, ∂l/∂s⁻) = (−T·P⁺, T·P⁻) in numbers: its work along lines, and its gradient part.

All results derive from the work ∫ F·ds along the edges of a grid over [−1, 1]², with jumps located by bisection. The
work round a cell is the circulation, which is zero for a gradient whether or not a term has kinks and jumps. The
potential whose differences come nearest to the work (a discrete Helmholtz-Hodge decomposition) is the nearest loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from goal.terms import Product

Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (s⁺, s⁻) → (∂l/∂s⁺, ∂l/∂s⁻), float64, of their shape
REACH = 1.0  # cosines are within [−1, 1]
_STRAY = 1e-7  # relative: a kink that is missed by so much at an end costs its square
CELLS = 63  # a side: odd, so that no line through 0 or ±0.5, where terms like to turn, runs along an edge

# Kronrod's 15 nodes on [−1, 1], their weights, and those of the 7 that are Gauss's: Kronrod, 1965
_NODES = (0.991455371120813, 0.949107912342759, 0.864864423359769, 0.741531185599394,
          0.586087235467691, 0.405845151377397, 0.207784955007898, 0.0)  # fmt: skip
_KRONROD = (0.022935322010529, 0.063092092629979, 0.104790010322250, 0.140653259715525,
            0.169004726639267, 0.190350578064785, 0.204432940075298, 0.209482141084728)  # fmt: skip
_GAUSS = (0.0, 0.129484966168870, 0.0, 0.279705391489277, 0.0, 0.381830050505119, 0.0, 0.417959183673469)


def scattered(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count,) s⁺ and s⁻ spread evenly over the square, the same for a seed."""
    drawn = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    s_pos, s_neg = ((2 * drawn - 1) * REACH).T
    return s_pos, s_neg


def field_of(product: Product) -> Field:
    """The field of T × P for one triplet, with relative similarities 0, as in a batch whose valid sets are empty."""

    def field(s_pos: Tensor, s_neg: Tensor) -> tuple[Tensor, Tensor]:
        s_pos, s_neg = torch.broadcast_tensors(s_pos.double(), s_neg.double())
        zero = torch.zeros_like(s_pos)
        pull, push = product.weights(s_pos, s_neg, dict.fromkeys(product.statistics, zero)).coefficients(1.0)
        return zero - pull, zero + push

    return field


def gradient_of(loss: Callable[[Tensor, Tensor], Tensor]) -> Field:
    """The field of a loss l(s⁺, s⁻), by autograd."""

    def field(s_pos: Tensor, s_neg: Tensor) -> tuple[Tensor, Tensor]:
        s_pos, s_neg = (s.detach().double().requires_grad_() for s in torch.broadcast_tensors(s_pos, s_neg))
        with torch.enable_grad():
            value = loss(s_pos, s_neg)
            if not value.requires_grad:
                return torch.zeros_like(s_pos), torch.zeros_like(s_neg)
            found = torch.autograd.grad(value.sum(), (s_pos, s_neg), allow_unused=True)
        a, b = (torch.zeros_like(s_pos) if each is None else each.detach() for each in found)
        return a, b

    return field


def work(field: Field, start: Tensor, end: Tensor, tolerance: float = 1e-12, depth: int = 40) -> Tensor:
    """(L,) ∫ F·ds along L segments from start (L, 2) to end (L, 2), points (s⁺, s⁻); float64.

    Gauss-Kronrod quadrature, halving what has not converged: a jump ends up within 2⁻⁴⁰ of a segment. One between an
    end and the outermost node would show in no weight, so the ends have to be what the nodes extrapolate to as well.
    """
    nodes = torch.tensor([-1.0, *(-n for n in _NODES), *_NODES[-2::-1], 1.0], dtype=torch.float64, device="cpu")
    kronrod, gauss = (
        torch.tensor([0.0, *w, *w[-2::-1], 0.0], dtype=torch.float64, device="cpu") for w in (_KRONROD, _GAUSS)
    )
    inner = nodes[1:-1]
    others = inner + torch.diag(torch.full_like(inner, torch.nan))  # (15, 15) the nodes but its own, in each row
    ends = torch.stack([((e - others) / (inner[:, None] - others)).nan_to_num(1.0).prod(1) for e in (-1.0, 1.0)], 1)
    total = torch.zeros(len(start), dtype=torch.float64, device="cpu")
    which, a, b = torch.arange(len(start), device="cpu"), start.double(), end.double()
    for level in range(depth + 1):
        along = (b - a)[:, None, :]
        at = a[:, None, :] + along * (nodes[:, None] + 1) / 2
        f_pos, f_neg = field(at[..., 0], at[..., 1])
        power = (f_pos * along[..., 0] + f_neg * along[..., 1]) / 2  # (L, 17)
        fine, coarse = power @ kronrod, power @ gauss
        size = (power.abs() @ kronrod).clamp(min=1e-3)
        strays = (power[:, 1:-1] @ ends - power[:, [0, -1]]).abs().amax(1)
        done = ((fine - coarse).abs() <= tolerance * size) & (strays <= _STRAY * size) | ~fine.isfinite()
        if level == depth:
            done[:] = True
        total.index_add_(0, which[done], fine[done])
        if done.all():
            break
        which, a, b = which[~done], a[~done], b[~done]
        middle = (a + b) / 2
        which, a, b = torch.cat([which, which]), torch.cat([a, middle]), torch.cat([middle, b])
    return total


class Decomposition(NamedTuple):
    """A field over [−1, 1]² as the gradient that comes nearest to it, and the rest.

    Shapes with n = `CELLS`; the first axis is s⁺, the second s⁻.
    """

    at: Tensor  # (n+1,) the grid's lines, the same for both axes
    along_pos: Tensor  # (n, n+1) work along the edges in the direction of s⁺
    along_neg: Tensor  # (n+1, n) and in that of s⁻
    circulation: Tensor  # (n, n) work round each cell: the integral of the curl over it
    potential: Tensor  # (n+1, n+1) the nearest loss, 0 in the middle
    rotational_share: float  # of the squared field: what that loss does not express

    @property
    def rest_pos(self) -> Tensor:
        """(n, n+1) work along the edges that the nearest loss does not do."""
        return self.along_pos - self.potential.diff(dim=0)

    @property
    def rest_neg(self) -> Tensor:
        return self.along_neg - self.potential.diff(dim=1)

    @property
    def curl(self) -> Tensor:
        """(n, n) mean curl ∂F⁻/∂s⁺ − ∂F⁺/∂s⁻ of each cell."""
        return self.circulation / (self.at[1] - self.at[0]) ** 2


def decompose(field: Field, cells: int = CELLS) -> Decomposition:
    """The field's circulation and its nearest loss: argmin over φ of Σ over edges (∫F·ds − Δφ)².

    Raises:
        ValueError: the field is not finite somewhere on the square.

    Source: the discrete Hodge decomposition of a 1-cochain on a square grid; Jiang et al., "Statistical ranking and
    combinatorial Hodge theory", 2011, §3.
    """
    at = torch.linspace(-REACH, REACH, cells + 1, dtype=torch.float64, device="cpu")
    nodes = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1)
    edges = [(nodes[:-1], nodes[1:]), (nodes[:, :-1], nodes[:, 1:])]
    along_pos, along_neg = (work(field, a.reshape(-1, 2), b.reshape(-1, 2)).view(a.shape[:2]) for a, b in edges)
    if not (along_pos.isfinite().all() and along_neg.isfinite().all()):
        raise ValueError("the field is not finite everywhere on [−1, 1]²; its terms overflow or divide by 0 there.")
    # round a cell: along s⁺ below, up s⁻ at its far side, and back
    circulation = along_pos[:, :-1] + along_neg[1:] - along_pos[:, 1:] - along_neg[:-1]
    # normal equations: the grid's Laplacian, which is diagonal in the eigenvectors of a path's
    path = torch.diff(torch.eye(cells + 1, dtype=torch.float64, device="cpu"), dim=0)
    rates, vectors = torch.linalg.eigh(path.T @ path)
    divergence = path.T @ along_pos + along_neg @ path
    rates = rates[:, None] + rates
    rates[0, 0] = 1.0  # the constant, which no difference tells
    components = vectors.T @ divergence @ vectors / rates
    components[0, 0] = 0.0
    potential = vectors @ components @ vectors.T
    potential = potential - potential[cells // 2 : cells // 2 + 2, cells // 2 : cells // 2 + 2].mean()
    whole = along_pos.square().sum() + along_neg.square().sum()
    rest = (along_pos - potential.diff(dim=0)).square().sum() + (along_neg - potential.diff(dim=1)).square().sum()
    return Decomposition(at, along_pos, along_neg, circulation, potential, float(rest / whole) if whole > 0 else 0.0)
