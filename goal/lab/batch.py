"""Is the gradient that an objective emits for a full batch the gradient of any loss?

The field is F(z) = (∂l/∂x, ∂l/∂y) at the embeddings z = (x, y), in float64, as autograd returns it. A field can fail to
have a potential in two ways, and there is a test for each. Its Jacobian is not symmetric (a curl), or a closed path
does work (a curl elsewhere, or a jump that no loss has).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from goal.validation import whole_number

Loss = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> 0-d, with the field behind it
Field = Callable[[Tensor], Tensor]  # (n,) -> (n,)

_STEPS = (1e-3, 1e-4, 1e-5, 1e-6)  # of central differences, times the embeddings' root mean square
_TOLERANCE = 1e-5  # of the work along an edge, times the edge's length and the largest |F| on it
_BUDGET = 20_000  # evaluations of an edge; what is not resolved by then shows in the error
_NODES = 16  # intervals of the finer Clenshaw-Curtis rule; its every other node makes the coarser one


class Loop(NamedTuple):
    """The work ∮ F · dz along one closed loop."""

    work: float
    error: float  # the quadrature's, an upper estimate
    effort: float  # ∮ |F · dz|, what the work is small or large against

    @property
    def closed(self) -> bool:
        """Whether the work is 0 as far as the error lets one see."""
        return abs(self.work) <= self.error


@dataclass(frozen=True)
class BatchIntegrability:
    """What `batch_integrability` found."""

    antisymmetric_share: float  # |A|² / (|A|² + |S|²), Frobenius norms; 0 where the Jacobian is 0
    standard_error: float  # of that estimate, rough below some 50 probes; nan for one
    largest: float  # max |uᵀAv| over the probes
    noise: float  # t, at least twice the error of a probe
    probes: int
    loops: tuple[Loop, ...]

    @property
    def symmetric(self) -> bool:
        """Whether no probe saw an antisymmetric part of the Jacobian."""
        return self.largest <= self.noise / 2

    @property
    def integrable(self) -> bool:
        """Whether neither the Jacobian nor a loop speaks against a potential."""
        return self.symmetric and all(loop.closed for loop in self.loops)

    def __repr__(self) -> str:
        open_loops = [loop for loop in self.loops if not loop.closed]
        verdict = "no potential" if not self.integrable else "integrable, as far as these tests see"
        share = f"{self.antisymmetric_share:.3g} ± {self.standard_error:.1g}"
        if self.symmetric:
            unseen = f"{4 * self.noise:.1e} stays unseen by {self.probes} probes with probability ≤ 4^-{self.probes}"
            jacobian = f"symmetric; an antisymmetric part with largest singular value ≥ {unseen}"
        else:
            jacobian = f"not symmetric: antisymmetric share {share}, max |uᵀAv| {self.largest:.2g}, t {self.noise:.1e}"
        lines = [f"BatchIntegrability: {verdict}", f"  Jacobian  {jacobian}"]
        if self.loops:
            worst = max(self.loops, key=lambda loop: abs(loop.work) - loop.error)
            work = f"work {worst.work:.2g} ± {worst.error:.1g} of {worst.effort:.2g}"
            lines.append(f"  loops     {len(open_loops)} of {len(self.loops)} do work; the clearest: {work}")
        return "\n".join(lines)


def batch_integrability(
    objective: Loss,
    x: Tensor,
    y: Tensor,
    *,
    probes: int = 16,
    loops: int = 3,
    size: float = 0.25,
    seed: int = 0,
) -> BatchIntegrability:
    """Whether the whole field that an objective emits at a batch is the gradient of any function of the embeddings.

    F(z) = (∂l/∂x, ∂l/∂y) with z = (x, y) flattened, as backward hands it out: relative similarities, which the field
    treats as constants but which move with the batch, and the selection of negatives, or their shares in soft mining,
    are part of it.

    **Jacobian.** A gradient has a symmetric Jacobian J = S + A, A = 0. Each probe draws u, v ~ N(0, I) and measures
    uᵀAv = (uᵀJv − vᵀJu) / 2, with Jv from central differences at several steps and Richardson's extrapolation; how far
    two steps differ gives the error of a probe, and t is at least twice that. E[(uᵀAv)²] = |A|², so the probes also
    estimate the antisymmetric share |A|² / (|A|² + |S|²). If every probe measures ≤ t/2, then |uᵀAv| ≤ t for all, and
    that is improbable for a large A: let σ be its largest singular value, which an antisymmetric matrix has twice.
    Given v, uᵀAv is N(0, |Av|²), so P(|uᵀAv| ≤ t) ≤ √(2/π) t / |Av|; and |Av| ≥ σρ with ρ the length of v's part in a
    plane, whose E[1/ρ] = √(π/2). Together P(|uᵀAv| ≤ t) ≤ t/σ. Hence k probes miss σ ≥ 4t with probability ≤ 4⁻ᵏ.

    **Loops.** Jumps (a hinge that switches on, a negative that takes another's place) have no Jacobian. So the work is
    taken around random triangles with corners z + size · (root mean square of a row) · noise, by adaptive quadrature
    which finds jumps by bisection. A gradient does none. Loops prove that there is no potential and cannot prove that
    there is one: what they do not cross they do not see.

    At N = 8, D = 4 the default call takes two or three seconds for the hardest negative, half a second where nothing
    jumps (InfoNCE, nca over all or soft), and about ten where much does: -ms weights, selective and semi-hard mining.

    Args:
        objective: `goal.Objective`, `goal.InfoNCE`, or any deterministic function of (x, y) that returns a 0-d tensor.
        x: (N, D), any dtype that converts to float64; not where the field jumps (no exact ties).
        y: (M, D).
        probes: how many u, v, >= 1.
        loops: how many triangles, >= 0.
        size: of the triangles, > 0: how far a row moves, relative to its length.
        seed: of the random numbers.

    Returns:
        `BatchIntegrability`: `.integrable`, `.antisymmetric_share` ± `.standard_error`, `.noise` (t), `.loops`.

    Raises:
        ValueError, TypeError: for an argument out of range; an objective whose value or field is not what is asked for
            or not finite, or which answers twice differently; a point where the field jumps.

    Example:
        >>> import goal, torch
        >>> from goal.lab.batch import batch_integrability
        >>> x, y = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).double()
        >>> batch_integrability(goal.InfoNCE(tau=2.0), x, y).integrable
        True
        >>> batch_integrability(goal.Objective(T="nca", P="lin"), x, y, loops=0).integrable
        False
        >>> batch_integrability(goal.Objective("nca", "con", mining=goal.mining.soft(alpha=5.0)), x, y).integrable
        False

    Source: the symmetric Jacobian is Poincaré's lemma; Richardson (1911); Clenshaw and Curtis (1960).
    """
    x, y = embeddings("x", x), embeddings("y", y)
    probes, loops = whole_number("probes", probes), whole_number("loops", loops, 0)
    seed, size = whole_number("seed", seed, 0), number("size", size)
    field = _flat(objective, x, y)
    z = torch.cat([x.flatten(), y.flatten()])
    if not torch.equal(field(z), field(z)):
        raise ValueError("objective gives two different gradients for the same x and y: it must be deterministic.")
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(len(z), generator=generator, dtype=torch.float64, device="cpu")

    scale = z.square().mean().sqrt().item() or 1.0
    antisymmetric, symmetric, errors = [], [], []
    for _ in range(probes):
        u, v = noise(), noise()
        (ju, error_u), (jv, error_v) = _derivative(field, z, u, scale), _derivative(field, z, v, scale)
        forward, backward = (u @ jv).item(), (v @ ju).item()
        antisymmetric.append((forward - backward) / 2)
        symmetric.append((forward + backward) / 2)
        errors.append(error_u + error_v)
    a, s = (torch.tensor(values, dtype=torch.float64, device="cpu").square() for values in (antisymmetric, symmetric))
    total = (a + s).mean().item()
    share = a.mean().item() / total if total else 0.0
    spread = (a - share * (a + s)).std().item() if probes > 1 else math.nan  # of a ratio of two means
    found = []
    for _ in range(loops):
        corners = [z + size * scale * noise() for _ in range(3)]
        found.append(_around(field, corners))
    return BatchIntegrability(
        antisymmetric_share=share,
        standard_error=spread / total / math.sqrt(probes) if total else 0.0 * spread,
        largest=a.max().sqrt().item(),
        noise=4 * max(errors),
        probes=probes,
        loops=tuple(found),
    )


def loop_work(objective: Loss, corners: Sequence[tuple[Tensor, Tensor]]) -> Loop:
    """∮ F · dz along the polygon through these batches, back to the first: 0 for the gradient of a loss.

    Args:
        objective: as for `batch_integrability`.
        corners: at least three (x, y) of the same shapes, (N, D) and (M, D).

    Returns:
        `Loop`: `.work`, the `.error` of the quadrature, and the `.effort` ∮ |F · dz|.

    Raises:
        ValueError, TypeError: fewer than three corners, different shapes, or as for `batch_integrability`.

    Example:
        >>> import goal, torch
        >>> from goal.lab.batch import loop_work
        >>> corners = [tuple(torch.randn(2, 5, 3)) for _ in range(3)]
        >>> loop_work(goal.InfoNCE(tau=2.0), corners).closed
        True
    """
    batches = [(embeddings("corners", x), embeddings("corners", y)) for x, y in corners]
    shapes = {(x.shape, y.shape) for x, y in batches}
    if len(batches) < 3 or len(shapes) > 1:
        raise ValueError(f"corners must be at least three batches of one shape, got {len(batches)} of {len(shapes)}.")
    return _around(_flat(objective, *batches[0]), [torch.cat([x.flatten(), y.flatten()]) for x, y in batches])


# ---- the field -------------------------------------------------------------------------------------------


def emitted(objective: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value (0-d, detached) and the gradients at x and y that an objective's backward hands out."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(x, y)
    if not isinstance(value, Tensor) or value.ndim != 0:
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"objective(x, y) must be a 0-d tensor, got {came}.")
    if not value.requires_grad:
        raise ValueError("objective(x, y) has no gradient behind it: it depends on neither x nor y, or detaches them.")
    gx, gy = torch.autograd.grad(value, (x, y), materialize_grads=True)
    return value.detach(), gx, gy


def embeddings(name: str, value: object) -> Tensor:
    """A detached (rows, D) float64 tensor on the CPU, all of it finite."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers that convert to float64, got {value.dtype}.")
    if value.ndim != 2 or not value.numel():
        raise ValueError(f"{name} must be 2-D, (rows, D), and not empty, got shape {tuple(value.shape)}.")
    value = value.detach().to("cpu", torch.float64)
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {value[~value.isfinite()][0].item()}.")
    return value


def number(name: str, value: object, or_zero: bool = False) -> float:
    """A finite float that is > 0, or >= 0."""
    real = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not (0 < real < math.inf or (or_zero and real == 0)):
        raise ValueError(f"{name} must be a finite number {'>=' if or_zero else '>'} 0, got {value!r}.")
    return real


def _flat(objective: Loss, x: Tensor, y: Tensor) -> Field:
    """F on flattened embeddings of these shapes."""

    def field(z: Tensor) -> Tensor:
        at_x, at_y = z.split([x.numel(), y.numel()])
        _, gx, gy = emitted(objective, at_x.view_as(x), at_y.view_as(y))
        gradient = torch.cat([gx.flatten(), gy.flatten()])
        if not bool(gradient.isfinite().all()):
            raise ValueError("objective's gradient is not finite near these embeddings, so it cannot be tested there.")
        return gradient

    return field


# ---- the Jacobian ----------------------------------------------------------------------------------------


def _derivative(field: Field, z: Tensor, v: Tensor, scale: float) -> tuple[Tensor, float]:
    """Jv (n,) by central differences, at the step whose two sizes agree best; its error is twice their difference."""

    def central(h: float) -> Tensor:
        return (field(z + h * v) - field(z - h * v)) / (2 * h)

    best, error = torch.zeros_like(z), math.inf
    for step in _STEPS:
        wide, narrow = central(step * scale), central(step * scale / 2)
        apart = 2 * torch.linalg.vector_norm(wide - narrow).item()
        if apart < error:
            best, error = (4 * narrow - wide) / 3, apart
    if error > 0.2 * torch.linalg.vector_norm(best).item():
        raise ValueError(
            "x, y: the field jumps there, or is too noisy to differentiate (ties between negatives, a triplet on a "
            "hinge's edge, low precision inside). Add a little noise to the embeddings."
        )
    return best, error


# ---- loops -----------------------------------------------------------------------------------------------


def _around(field: Field, corners: Sequence[Tensor]) -> Loop:
    """The work along a closed polygon."""
    edges = [_edge(field, start, end) for start, end in zip(corners, [*corners[1:], corners[0]], strict=True)]
    return Loop(*(math.fsum(values) for values in zip(*edges, strict=True)))


def _edge(field: Field, start: Tensor, end: Tensor) -> tuple[float, float, float]:
    """The work along a straight line, its error and its effort.

    Clenshaw-Curtis rules of 17 and 9 nodes; they see the ends of an interval, where a jump may hide. Where they differ
    the largest change between neighbouring nodes is bisected: if it does not shrink it is a jump, and the interval is
    cut there; if it does, the field is smooth but quick, and the interval is halved. They are compared as vectors: the
    mere component along the line may agree by chance, one that two jumps conspire to.
    """
    direction = end - start
    length = torch.linalg.vector_norm(direction).item()
    nodes, fine, coarse = _rules()
    evaluations, largest = 0, 0.0

    def at(t: float) -> Tensor:
        nonlocal evaluations, largest
        evaluations += 1
        value = field(start + t * direction)
        largest = max(largest, torch.linalg.vector_norm(value).item())
        return value

    work, error, effort = 0.0, 0.0, 0.0
    waiting = [(0.0, at(0.0), 1.0, at(1.0))]
    while waiting:
        low, at_low, high, at_high = waiting.pop()
        width = high - low
        places = [low + width * node for node in nodes]
        values = torch.stack([at_low, *(at(t) for t in places[1:-1]), at_high])
        along = values @ direction
        apart = torch.linalg.vector_norm(fine @ values - coarse @ values[::2]).item()
        if apart <= _TOLERANCE * largest or width < 1e-10 or evaluations > _BUDGET:
            work += width * (fine @ along).item()
            error += width * length * (apart + 1e-13 * largest)
            effort += width * (fine @ along.abs()).item()
            continue
        k = int(torch.linalg.vector_norm(values.diff(dim=0), dim=1).argmax())
        left, right, at_left, at_right = places[k], places[k + 1], values[k], values[k + 1]
        first = change = torch.linalg.vector_norm(at_right - at_left).item()
        halvings = 0
        while halvings < 4 or (change > first / 5 and (right - left) * change > 0.1 * _TOLERANCE * largest):
            middle = (left + right) / 2
            at_middle = at(middle)
            before, after = (torch.linalg.vector_norm(value - at_middle).item() for value in (at_left, at_right))
            if before > after:
                right, at_right, change = middle, at_middle, before
            else:
                left, at_left, change = middle, at_middle, after
            halvings += 1
        if change <= first / 5:
            middle, at_middle = low + width / 2, values[_NODES // 2]
            waiting += [(low, at_low, middle, at_middle), (middle, at_middle, high, at_high)]
            continue
        gap = right - left
        on_left, on_right = (at_left @ direction).item(), (at_right @ direction).item()
        work, error = work + gap * (on_left + on_right) / 2, error + gap * abs(on_right - on_left) / 2
        effort += gap * (abs(on_left) + abs(on_right)) / 2
        waiting += [(low, at_low, left, at_left), (right, at_right, high, at_high)]
    return work, error, effort


def _rules() -> tuple[list[float], Tensor, Tensor]:
    """The nodes of Clenshaw-Curtis on [0, 1], their weights, and those of every other node for the coarse rule."""

    def weights(n: int) -> Tensor:
        k, j = (
            torch.arange(n + 1, dtype=torch.float64, device="cpu"),
            torch.arange(1, n // 2 + 1, dtype=torch.float64, device="cpu"),
        )
        ends = torch.where((k == 0) | (k == n), 1.0, 2.0)
        b = torch.where(j == n // 2, 1.0, 2.0)
        cosines = torch.cos(2 * math.pi * k[:, None] * j / n)
        return ends / (2 * n) * (1 - (b / (4 * j.square() - 1) * cosines).sum(1))

    nodes = [(1 - math.cos(math.pi * k / _NODES)) / 2 for k in range(_NODES + 1)]
    return nodes, weights(_NODES), weights(_NODES // 2)
