"""Where does an objective lead without an encoder before the embeddings? Points on spheres, and single triplets.

`simulate` moves N pairs of points by gradient descent and measures: does recall rise, do the points collapse, do they
oscillate? Is the work of the field equal to the fall of the value, as it is for the gradient of a loss?
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

import goal
from goal import plotting
from goal.lab.batch import Loop, Loss, emitted, loop_work, number
from goal.lab.field import field_of
from goal.lab.progress import progress
from goal.mining import Mining
from goal.names import unknown
from goal.terms import Product, Term
from goal.validation import whole_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

EPS = 0.01  # half the width of the zone around s⁺ = s⁻ in which the hinge's gradient vanishes: T-SelHN's ε
COLLAPSED = 0.01  # spread below which the points count as collapsed: their mean cosine is above 0.99
_STARTS = ("collapsed", "random", "clustered")
_MODELS = ("points", "map")
_LR = {"points": 0.1, "map": 1.0}


class Account(NamedTuple):
    """The energy of a trajectory."""

    work: float  # −∫ F · dz along it
    error: float  # an upper estimate, of the order of what steps across jumps leave open
    fall: float  # of the value


@dataclass(frozen=True, eq=False)
class Simulation:
    """A run of `simulate`. Series have an entry for each state, the start included: (steps + 1,)."""

    label: str
    settings: str  # the conditions, in words
    value: Array  # the objective's scalar
    gradient: Array  # ‖(∂l/∂x, ∂l/∂y)‖ as emitted
    force: Array  # the norm of what of it is tangent to the spheres, and so moves points
    s_pos: Array  # mean over the pairs
    s_neg: Array  # mean over the anchors of both directions, of the hardest negative
    recall: Array  # share of anchors with s⁺ > every negative
    vanishing: Array  # share of anchors with |s⁺ − s⁻| < EPS
    spread: Array  # 1 − |mean of a modality's points|², averaged over the two: 1 − their mean cosine, 0 in one point
    work: Array  # (steps,) −∫ F · dz of each step, by Simpson's rule
    work_error: Array  # (steps,) how far the trapezoid's rule is from that: large where a step crosses jumps
    x: Tensor  # (steps + 1, N, D) the points
    y: Tensor  # (steps + 1, N, D)
    objective: Loss

    @property
    def separated(self) -> int | None:
        """The first step from which recall is 1 to the end; None where it is not 1 at the end."""
        below = np.flatnonzero(~(self.recall == 1))  # a NaN counts as below
        first = int(below[-1]) + 1 if len(below) else 0
        return first if first < len(self.recall) else None

    @property
    def collapsed(self) -> bool:
        """Whether the spread is below COLLAPSED at the end."""
        return bool(self.spread[-1] < COLLAPSED)

    @property
    def path(self) -> Array:
        """(steps,) how far the points went in each step, root mean square."""
        return _apart(self.x[1:], self.y[1:], self.x[:-1], self.y[:-1])

    @property
    def oscillation(self) -> float:
        """1 − (distance between the ends) / (length of the path), over the last quarter; 0 where nothing moves there.

        0 on a straight way, 1 for points that go to and fro or in circles. A path below 10⁻⁶ counts as rest.
        """
        steps = len(self.work)
        begin = steps - max(1, steps // 4)
        length = float(self.path[begin:].sum())
        gone = float(_apart(self.x[[-1]], self.y[[-1]], self.x[[begin]], self.y[[begin]])[0])
        return 0.0 if length < 1e-6 else 1 - gone / length

    @property
    def account(self) -> Account:
        """The work that the field did against the fall of the value.

        They agree to within the error if the value is a potential of the field. Where T × P has none the value is the
        violation s⁻ − s⁺, and the two have nothing to do with one another.
        """
        fall = float(self.value[0] - self.value[-1])
        return Account(float(self.work.sum()), float(self.work_error.sum()), fall)

    def loop_work(self) -> Loop:
        """The work along the triangle first state → half the path → last → first, in embedding space; 0 for a loss.

        Seconds for a few points, minutes for 64: each change of a negative is found by bisection.
        """
        gone = np.cumsum(self.path)
        half = int(np.searchsorted(gone, gone[-1] / 2)) + 1
        return loop_work(self.objective, [(self.x[k], self.y[k]) for k in (0, half, -1)])

    def plot(self, path: str | Path | None = None) -> Figure:
        """`plot_simulations` of this run alone."""
        return plot_simulations([self], path)

    def __str__(self) -> str:
        return table([self])


def simulate(
    objective: Loss | None = None,
    *,
    T: str | Term = "con",
    P: str | Term = "con",
    mining: str | Mining = "hardest",
    start: str = "collapsed",
    model: str = "points",
    n: int = 64,
    d: int = 16,
    steps: int = 400,
    lr: float | None = None,
    noise: float = 0.1,
    seed: int = 0,
) -> Simulation:
    """Gradient descent of N pairs of points on the unit sphere under an objective, and what happens to them.

    z ← normalize(z − lr · g), with g the part of ∂l/∂z that is tangent to the sphere; float64, the whole set is the
    batch. Or, with `model="map"`, the points are normalize(b + W h(h(u))) of fixed inputs with layers h = tanh(V ·),
    one map for both modalities, and it is the map that descends: then points cannot move on their own.

    | start | free points | map |
    |---|---|---|
    | `collapsed` | all around one direction, off by `noise` | a bias b of length 1, W of size `noise` |
    | `random` | uniform on the sphere | b = 0 |
    | `clustered` | √n centres, pairs in the same place off by `noise` | b = 0; the inputs are clustered |

    A map's inputs are u = l + ε, v = l + ε' with l, ε, ε' ~ N(0, I): two views that agree in half of what they say.

    Args:
        objective: `goal.Objective`, `goal.InfoNCE`, or another function of (x, y) that returns a 0-d tensor; in its
            place T, P and mining, whose anchors then are summed for points and averaged for a map.
        T, P, mining: as for `goal.apply`; not looked at beside an objective.
        start: `collapsed`, `random`, `clustered`.
        model: `points` or `map`.
        n: pairs, >= 2.
        d: dimensions, >= 2.
        steps: of gradient descent, >= 1.
        lr: learning rate, > 0; by default 0.1 for points, 1 for a map.
        noise: >= 0, relative to the unit length of the points.
        seed: of the start.

    Returns:
        `Simulation`: the series, `.separated`, `.collapsed`, `.oscillation`, `.account`, `.loop_work()`, `.plot()`.
        A NaN that comes up stays in them.

    Raises:
        ValueError, TypeError: for an unknown name or an argument out of range.

    Example:
        >>> from goal.lab.dynamics import simulate
        >>> run = simulate(T="con", P="con", mining="all", n=8, d=4, steps=50)
        >>> run.separated is not None, run.collapsed, run.recall.shape
        (True, False, (51,))
        >>> work, error, fall = run.account  # con × con over all negatives is a loss
        >>> abs(work - fall) < 1e-9
        True

    Source: the collapse under hardest negatives: Schroff et al., FaceNet, §3.2; the vanishing zone: Li et al., T-SelHN.
    """
    for name, chosen, known in (("start", start, _STARTS), ("model", model, _MODELS)):
        if chosen not in known:
            raise unknown(name, chosen, known)
    n, d = whole_number("n", n, 2), whole_number("d", d, 2)
    steps, seed = whole_number("steps", steps), whole_number("seed", seed, 0)
    lr = _LR[model] if lr is None else number("lr", lr)
    noise = number("noise", noise, or_zero=True)
    if objective is None:
        reduction = "sum" if model == "points" else "mean"
        objective = goal.Objective(T=T, P=P, mining=mining, reduction=reduction, check_finite=False)
        label = _label(T, P, mining)
    else:
        label = repr(objective)
    generator = torch.Generator().manual_seed(seed)
    moving: _Points | _Map = (_Points if model == "points" else _Map)(start, n, d, noise, generator)

    rows: list[_Row] = []
    xs, ys = torch.empty(2, steps + 1, n, d, dtype=torch.float64, device="cpu")
    work, work_error = np.empty(steps), np.empty(steps)
    x, y = moving.at()
    value, gx, gy = emitted(objective, x, y)
    with progress(label, steps) as show:
        for step in range(steps):
            xs[step], ys[step] = x, y
            rows.append(_measure(x, y, value, gx, gy))
            moving.step(gx, gy, lr)
            x, y = moving.at()
            _, middle_x, middle_y = emitted(objective, (x + xs[step]) / 2, (y + ys[step]) / 2)
            before_x, before_y = gx, gy
            value, gx, gy = emitted(objective, x, y)
            dx, dy = xs[step] - x, ys[step] - y
            ends = ((before_x + gx) * dx + (before_y + gy) * dy).sum().item() / 2
            work[step] = (ends + 2 * (middle_x * dx + middle_y * dy).sum().item()) / 3
            work_error[step] = abs(work[step] - ends)
            show(step + 1)
    xs[steps], ys[steps] = x, y
    rows.append(_measure(x, y, value, gx, gy))
    return Simulation(
        label=label,
        settings=f"{start} {model}, n = {n}, d = {d}, {steps} steps, lr = {lr:g}, noise = {noise:g}, seed {seed}",
        work=work,
        work_error=work_error,
        x=xs,
        y=ys,
        objective=objective,
        **{name: np.array([getattr(row, name) for row in rows]) for name in _Row._fields},
    )


def compare(objectives: Sequence[tuple[str | Term, str | Term, str | Mining]], **settings: Any) -> list[Simulation]:
    """`simulate` of several (T, P, mining) from the same start.

    Example:
        >>> from goal.lab.dynamics import compare, table
        >>> hinge = goal.T.con(margin=0.2)
        >>> runs = compare([(hinge, "con", m) for m in ("hardest", "selective")], model="map", steps=100)
        >>> [run.collapsed for run in runs]
        [True, False]
        >>> print(table(runs))
        objective recall@1 separated spread ...
        con(margin=0.2) × con, hardest ... never ... collapsed ...
        con(margin=0.2) × con, selective 100 % ...
        <BLANKLINE>
        collapsed map, n = 64, d = 16, 100 steps, lr = 1, noise = 0.1, seed 0
    """
    return [simulate(T=T, P=P, mining=mining, **settings) for T, P, mining in objectives]


def table(runs: Sequence[Simulation]) -> str:
    """Simulations as text, a row each: the end of the run, and its measures.

    `vanishing` is the share of anchors with |s⁺ − s⁻| < EPS, `end force` the norm of the gradient's tangent part, which
    moves the points; `work` and `fall of value` are `Simulation.account`.
    """
    head = ["objective", "recall@1", "separated", "spread", "s⁺", "s⁻", "vanishing", "end force", "oscillation"]
    head += ["work", "fall of value"]
    lines = [head]
    for run in runs:
        work, error, fall = run.account
        separated = "never" if run.separated is None else f"step {run.separated}"
        ends = [f"{run.s_pos[-1]:.2f}", f"{run.s_neg[-1]:.2f}", f"{100 * run.vanishing[-1]:.0f} %"]
        spread = f"{run.spread[-1]:.2g}" + " collapsed" * run.collapsed
        line = [run.label, f"{100 * run.recall[-1]:.0f} %", separated, spread, *ends, f"{run.force[-1]:.1e}"]
        lines.append([*line, f"{run.oscillation:.2f}", f"{work:.3g} ± {error:.1g}", f"{fall:.3g}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["   ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "", *dict.fromkeys(run.settings for run in runs)])


def plot_simulations(runs: Sequence[Simulation], path: str | Path | None = None) -> Figure:
    """Recall, gradient norm (log), vanishing share, and s⁺ and s⁻ through time, a colour and dash for each run.

    The norm that vanishes in a collapse is that of the gradient's part along the sphere. What is radial does not: a
    negative that many anchors share is pushed by all of them, and normalisation takes the push away.

    Args:
        runs: at least one.
        path: where to save a picture, by its ending; by default nowhere.

    Raises:
        ValueError: no runs.
        ImportError: matplotlib is missing.

    Example:
        >>> from goal.lab.dynamics import plot_simulations, simulate
        >>> figure = plot_simulations([simulate(n=4, d=3, steps=5)], "run.png")
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['recall@1', 'norm of the tangent gradient (thin: of all)', 'share in the vanishing zone', 's⁺ and s⁻ (thin)']
    """
    if not runs:
        raise ValueError("runs is empty: there is nothing to draw.")
    figure = plotting.figure(9.5, 6.4)
    recall, norm, vanishing, similarity = figure.subplots(2, 2, sharex=True).ravel()
    for k, run in enumerate(runs):
        colour, dash, time = plotting.COLOURS[(k + 2) % 6], plotting.DASHES[k // 6 % 6], np.arange(len(run.recall))
        style = {"color": colour, "linestyle": dash if k >= 6 else plotting.DASHES[k % 6]}
        recall.plot(time, run.recall, label=run.label, **style)
        for series, width in ((run.force, 2.2), (run.gradient, 0.9)):
            norm.plot(time, np.where(series == 0, np.nan, series), linewidth=width, **style)  # a log axis has no 0
        vanishing.plot(time, run.vanishing, **style)
        similarity.plot(time, run.s_pos, linewidth=2.2, **style)
        similarity.plot(time, run.s_neg, linewidth=0.9, **style)
    norm.set_yscale("log")
    titles = (
        "recall@1",
        "norm of the tangent gradient (thin: of all)",
        "share in the vanishing zone",
        "s⁺ and s⁻ (thin)",
    )
    for axes, title in zip(figure.axes, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (recall, vanishing):
        axes.set_ylim(-0.03, 1.03)
    figure.supxlabel("step", fontsize=10)
    figure.legend(loc="outside upper left", fontsize=9, frameon=False, handlelength=3.2)
    figure.text(0.01, -0.02, "\n".join(dict.fromkeys(run.settings for run in runs)), va="top", fontsize=8)
    if path is not None:
        plotting.save(figure, path)
    return figure


class Triplet(NamedTuple):
    """One triplet through time."""

    s_pos: Array  # (steps + 1,)
    s_neg: Array  # (steps + 1,)
    points: Array | None  # (steps + 1, 3, 3) anchor, positive, negative on the sphere; None in the plane


def triplet_trajectory(
    T: str | Term,
    P: str | Term,
    s_pos: float,
    s_neg: float,
    steps: int = 100,
    lr: float = 0.05,
    space: str = "sphere",
) -> Triplet:
    """Where one triplet goes, as a pair of similarities or as three unit vectors.

    plane: s⁺ ← s⁺ + lr · T P⁺, s⁻ ← s⁻ − lr · T P⁻, the similarities on their own; they may leave [−1, 1].
    sphere: anchor a, positive p and negative n in R³, whose gradients are ∂l/∂a = T (P⁻ n − P⁺ p), ∂l/∂p = −T P⁺ a,
    ∂l/∂n = T P⁻ a; each takes a step along the tangent and is normalised. A single triplet has no relative
    similarities: -ms weights get R = 0.

    Args:
        T, P: names or terms.
        s_pos, s_neg: where it begins; within [−1, 1] on the sphere, where p and n begin on opposite sides of a.
        steps: >= 1.
        lr: > 0.
        space: `plane` or `sphere`.

    Returns:
        `Triplet`: s⁺ and s⁻ (steps + 1,), float64, and on the sphere the points (steps + 1, 3, 3).

    Raises:
        ValueError, TypeError: for an unknown name or an argument out of range.

    Example:
        >>> from goal.lab.dynamics import triplet_trajectory
        >>> path = triplet_trajectory("con", "lin", s_pos=0.2, s_neg=0.6, steps=200)
        >>> f"{path.s_pos[-1]:.2f}", path.points.shape
        ('0.97', (201, 3, 3))

    Source: the plane of (s⁺, s⁻) is that of Xuan and Chen (2023), fig. 2 and Sun et al. (2020), fig. 2.
    """
    field = field_of(Product(goal.T.bind(T), goal.P.bind(P)))
    if space not in ("plane", "sphere"):
        raise unknown("space", space, ("plane", "sphere"))
    steps, lr = whole_number("steps", steps), number("lr", lr)
    for name, s in (("s_pos", s_pos), ("s_neg", s_neg)):
        real = isinstance(s, numbers.Real) and not isinstance(s, bool)
        if not real or not math.isfinite(s) or (space == "sphere" and abs(s) > 1):
            raise ValueError(f"{name} must be a finite number, within [-1, 1] on the sphere, got {s!r}.")

    def weights(at_pos: Tensor, at_neg: Tensor) -> tuple[Tensor, Tensor]:
        """T P⁺ and T P⁻."""
        f_pos, f_neg = field(at_pos, at_neg)
        return -f_pos, f_neg

    pos, neg = (torch.tensor(float(s), dtype=torch.float64, device="cpu") for s in (s_pos, s_neg))
    if space == "plane":
        line = [(pos, neg)]
        for _ in range(steps):
            toward, away = weights(pos, neg)
            pos, neg = pos + lr * toward, neg - lr * away
            line.append((pos, neg))
        flat = torch.tensor(line, dtype=torch.float64, device="cpu").numpy()
        return Triplet(flat[:, 0], flat[:, 1], None)
    sines = [math.sqrt(1 - s * s) for s in (s_pos, s_neg)]
    points = torch.tensor([[0, 0, 1], [sines[0], 0, s_pos], [-sines[1], 0, s_neg]], dtype=torch.float64, device="cpu")
    found = [points]
    for _ in range(steps):
        a, p, n = points
        toward, away = weights(a @ p, a @ n)
        gradient = torch.stack([away * n - toward * p, -toward * a, away * a])
        points = _moved(points, gradient, lr)
        found.append(points)
    through = torch.stack(found)  # (steps + 1, 3, 3)
    both = (through[:, :1] * through[:, 1:]).sum(2).numpy()
    return Triplet(both[:, 0], both[:, 1], through.numpy())


# ---- what moves ------------------------------------------------------------------------------------------


def _tangent(z: Tensor, gradient: Tensor) -> Tensor:
    """What of a gradient (n, d) at unit vectors is tangent to the sphere."""
    return gradient - (gradient * z).sum(1, keepdim=True) * z


def _moved(z: Tensor, gradient: Tensor, lr: float) -> Tensor:
    return normalize(z - lr * _tangent(z, gradient), dim=1)


class _Points:
    """Free points on the sphere."""

    def __init__(self, start: str, n: int, d: int, noise: float, generator: torch.Generator) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

        if start == "random":
            self.x, self.y = normalize(normal(n, d), dim=1), normalize(normal(n, d), dim=1)
            return
        centres = normalize(normal(1 if start == "collapsed" else math.isqrt(n), d), dim=1)
        near = centres[torch.arange(n, device="cpu") % len(centres)]
        self.x, self.y = (normalize(near + noise * normal(n, d) / math.sqrt(d), dim=1) for _ in range(2))

    def at(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def step(self, gx: Tensor, gy: Tensor, lr: float) -> None:
        self.x, self.y = _moved(self.x, gx, lr), _moved(self.y, gy, lr)


class _Map:
    """normalize(b + W tanh(V₂ tanh(V₁ u))), one map for the two views of each item; it is what descends."""

    def __init__(self, start: str, n: int, d: int, noise: float, generator: torch.Generator) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

        latent = normal(n, d)
        if start == "clustered":
            latent = normal(math.isqrt(n), d)[torch.arange(n, device="cpu") % math.isqrt(n)] + noise * latent
        self.views = latent + normal(n, d), latent + normal(n, d)
        size = noise if start == "collapsed" else 1.0
        weights = [normal(d, d) / math.sqrt(d), normal(d, d) / math.sqrt(d), size * normal(d, d) / d]
        bias = (
            normalize(normal(1, d), dim=1)
            if start == "collapsed"
            else torch.zeros(1, d, dtype=torch.float64, device="cpu")
        )
        self.weights = [weight.requires_grad_() for weight in (*weights, bias)]

    def _embed(self) -> tuple[Tensor, Tensor]:
        first, second, last, bias = self.weights
        x, y = (normalize(torch.tanh(torch.tanh(view @ first) @ second) @ last + bias, dim=1) for view in self.views)
        return x, y

    def at(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self._embed()

    def step(self, gx: Tensor, gy: Tensor, lr: float) -> None:
        gradients = torch.autograd.grad(self._embed(), self.weights, (gx, gy))
        with torch.no_grad():
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight -= lr * gradient


def _label(T: str | Term, P: str | Term, mining: str | Mining) -> str:
    """`con(margin=0.2) × con, hardest`: with the parameters that are not the defaults."""
    names = []
    for term in (goal.T.bind(T), goal.P.bind(P)):
        given = ", ".join(f"{k}={v:g}" for k, v in term.params.items() if v != term.definition.defaults[k])
        names.append(f"{term.name}({given})" if given else term.name)
    chosen = goal.mining.bind(mining)
    known = chosen == goal.mining.bind(chosen.name)
    return f"{' × '.join(names)}, {chosen.name if known else chosen}"


# ---- what is seen ----------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One state; names as in `Simulation`."""

    value: float
    gradient: float
    force: float
    s_pos: float
    s_neg: float
    recall: float
    vanishing: float
    spread: float


def _measure(x: Tensor, y: Tensor, value: Tensor, gx: Tensor, gy: Tensor) -> _Row:
    s = x @ y.T
    s_pos = s.diagonal()
    s = s.clone().fill_diagonal_(-torch.inf)
    s_neg = torch.stack([s.amax(1), s.amax(0)])  # (2, n)
    apart = s_pos - s_neg
    tangent = _tangent(x, gx).square().sum() + _tangent(y, gy).square().sum()
    known = not bool(apart.isnan().any())  # a comparison would make a share out of NaN
    means = (x.mean(0).square().sum() + y.mean(0).square().sum()) / 2
    return _Row(
        value=value.item(),
        gradient=(gx.square().sum() + gy.square().sum()).sqrt().item(),
        force=tangent.sqrt().item(),
        s_pos=s_pos.mean().item(),
        s_neg=s_neg.mean().item(),
        recall=(apart > 0).double().mean().item() if known else math.nan,
        vanishing=(apart.abs() < EPS).double().mean().item() if known else math.nan,
        spread=1 - means.item(),
    )


def _apart(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor) -> Array:
    """Root mean square distances of the points of two series of states, (k, N, D) each: (k,)."""
    squares = (x - other_x).square().sum(2) + (y - other_y).square().sum(2)
    return np.asarray((squares.mean(1) / 2).sqrt().numpy())
