"""Points on spheres and single triplets against steps by hand, closed forms, and what is known of their ends."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor
from torch.nn.functional import normalize

import goal
from goal.lab import progress
from goal.lab.dynamics import Simulation, compare, plot_simulations, simulate, table, triplet_trajectory

pytestmark = pytest.mark.usefixtures("one_thread")

HINGE = goal.T.con(margin=0.2)


@pytest.fixture(scope="module")
def both() -> list[Simulation]:
    """The hardest and selective mining of a map's collapsed start."""
    return compare([(HINGE, "con", mining) for mining in ("hardest", "selective")], model="map", steps=120)


# ── a step, and what is recorded of it ──────────────────────────────────────────────────────────────────


def test_a_step_is_descent_along_the_sphere() -> None:
    """One step by autograd: the loss, as a function of unnormalised points that are normalised, has the tangent
    part as its gradient at the unit vectors."""
    run = simulate(T="nca", P="con", mining="all", start="random", n=5, d=4, steps=1, lr=0.3)
    x, y = (z[0].clone().requires_grad_() for z in (run.x, run.y))
    u, v = normalize(x, dim=1), normalize(y, dim=1)
    s = u @ v.T
    each = torch.nn.functional.softplus(10 * torch.stack([s - s.diagonal()[:, None], (s - s.diagonal()).T])) / 10
    value = (each.sum() - each.diagonal(dim1=1, dim2=2).sum()) / 4
    gx, gy = torch.autograd.grad(value, (x, y))
    assert_allclose(run.value[0], value.item(), rtol=1e-12)
    assert_allclose(run.force[0], math.sqrt((gx.square().sum() + gy.square().sum()).item()), rtol=1e-12)
    for z, g, after in ((x, gx, run.x[1]), (y, gy, run.y[1])):
        assert_allclose(after, normalize(z - 0.3 * g, dim=1).detach(), rtol=1e-12)


def test_the_series_are_those_of_the_states() -> None:
    run = simulate(T="cir", P="sig", start="random", n=6, d=3, steps=4, seed=2)
    for k in range(5):
        x, y = run.x[k].numpy(), run.y[k].numpy()
        assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-14)
        gx, gy, stats = goal.gradients(run.x[k], run.y[k], T="cir", P="sig", reduction="sum")
        assert_allclose(run.gradient[k], math.sqrt((gx.square().sum() + gy.square().sum()).item()), rtol=1e-12)
        s = x @ y.T
        off = np.where(np.eye(6, dtype=bool), -np.inf, s)
        hardest = np.concatenate([off.max(1), off.max(0)])
        pairs = np.concatenate([np.diag(s)] * 2)
        assert_allclose(run.s_pos[k], pairs.mean(), rtol=1e-12)
        assert_allclose(run.s_neg[k], hardest.mean(), rtol=1e-12)
        assert_allclose(run.recall[k], (pairs > hardest).mean(), rtol=1e-12)
        assert_allclose(run.recall[k], stats.recall_at_1.mean().item(), rtol=1e-12)
        assert run.vanishing[k] == (abs(pairs - hardest) < 0.01).mean()
        cosines = ((x @ x.T).mean() + (y @ y.T).mean()) / 2
        assert_allclose(run.spread[k], 1 - cosines, rtol=1e-12)
    assert run.value.shape == run.force.shape == (5,)
    assert run.work.shape == run.path.shape == (4,)
    apart = np.sqrt(((run.x[3] - run.x[2]).square().sum() + (run.y[3] - run.y[2]).square().sum()).item() / 12)
    assert_allclose(run.path[2], apart, rtol=1e-12)


def test_the_vanishing_zone_is_counted() -> None:
    near = simulate(T=HINGE, P="con", n=16, d=8, steps=1, noise=0.01)
    assert near.vanishing[0] == 1  # s⁺ and s⁻ are 1 − O(noise²)
    assert near.spread[0] < 1e-3
    assert near.collapsed
    far = simulate(T=HINGE, P="con", n=16, d=8, steps=1, start="random")
    assert far.vanishing[0] < 0.2
    assert far.spread[0] > 0.8
    assert not far.collapsed


def test_clusters_are_clusters() -> None:
    run = simulate(T=HINGE, P="con", start="clustered", n=16, d=16, steps=1, noise=0.1)
    s = (run.x[0] @ run.x[0].T).numpy()
    together = np.arange(16)[:, None] % 4 == np.arange(16) % 4
    assert s[together].min() > 0.9
    assert s[~together].max() < 0.9


# ── measures ────────────────────────────────────────────────────────────────────────────────────────────


def made(base: Simulation, recall: list[float], x: Tensor | None = None) -> Simulation:
    changes: dict[str, Any] = {"recall": np.array(recall), "work": np.zeros(len(recall) - 1)}
    if x is not None:
        changes |= {"x": x, "y": x}
    return dataclasses.replace(base, **changes)


def test_separation_is_for_good() -> None:
    base = simulate(n=2, d=2, steps=1)
    assert made(base, [0, 1, 0.5, 1, 1]).separated == 3
    assert made(base, [1, 1, 1]).separated == 0
    assert made(base, [1, 1, 0.5]).separated is None
    assert made(base, [1, 0, 1]).separated == 2
    assert made(base, [1, math.nan, 1]).separated == 2
    assert made(base, [1, 1, math.nan]).separated is None


def test_oscillation_is_about_the_way_and_not_the_distance() -> None:
    base = simulate(n=2, d=2, steps=1)
    recall, place = [0.0] * 9, torch.zeros(9, 2, 2, dtype=torch.float64)
    straight, swing, out = place.clone(), place.clone(), place.clone()
    straight[:, :, 0] = torch.arange(9.0)[:, None]
    swing[1::2, :, 1] = 1
    out[7] = 1.0  # the last quarter is the steps 6 → 7 → 8
    out[8] = 0.5
    assert made(base, recall, straight).oscillation == 0
    assert made(base, recall, swing).oscillation == 1
    assert made(base, recall, out).oscillation == pytest.approx(1 - 0.5 / 1.5)
    assert made(base, recall, place).oscillation == 0


def test_a_learning_rate_that_is_too_large_oscillates() -> None:
    settings: dict[str, Any] = {"T": "nca", "P": "con", "start": "random", "n": 12, "d": 3, "steps": 150}
    assert simulate(mining="all", lr=0.05, **settings).oscillation < 0.1
    assert simulate(mining="hardest", lr=1.0, **settings).oscillation > 0.9


@pytest.mark.parametrize("P", ["con", "lin"])
def test_the_energy_account_closes_for_a_loss(P: str) -> None:
    """con × con and con × lin over all negatives are losses without a jump, whose slope along a step is cubic at most:
    Simpson's rule has them exactly."""
    run = simulate(T="con", P=P, mining="all", start="random", n=12, d=4, steps=60)
    work, error, fall = run.account
    assert fall > 0.1
    assert abs(work - fall) < 1e-10
    assert error < 0.05 * fall
    # and the same through a mined loss, whose steps cross jumps: to within the error, which small steps make small
    mined = simulate(T="cir", P="lin", start="random", n=12, d=4, steps=200, lr=0.01)
    work, error, fall = mined.account
    assert abs(work - fall) <= error < 0.1 * fall


def test_the_energy_account_does_not_close_without_a_loss() -> None:
    """nca × lin: its value is the violation, of which it is not the gradient."""
    work, error, fall = simulate(T="nca", P="lin", start="random", n=12, d=4, steps=100, lr=0.02).account
    assert abs(work - fall) > 10 * error


def test_loop_work_tells_a_loss_from_a_field() -> None:
    settings: dict[str, Any] = {"start": "random", "n": 4, "d": 3, "steps": 40, "lr": 0.1}
    loss, field = (simulate(T="nca", P=P, **settings).loop_work() for P in ("con", "lin"))
    assert loss.closed
    assert loss.effort > 0.1
    assert not field.closed
    assert abs(field.work) > 100 * field.error


# ── where it leads ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mining", ["hardest", "selective", "all"])
def test_free_points_leave_the_collapse_under_any_mining(mining: str) -> None:
    run = simulate(T=HINGE, P="con", mining=mining, noise=0.01, steps=60, lr=0.3)
    assert run.vanishing[0] == 1
    assert run.separated is not None
    assert not run.collapsed


def test_a_map_stays_collapsed_under_the_hardest_and_leaves_it_under_selective(both: list[Simulation]) -> None:
    hardest, selective = both
    assert_allclose(hardest.x[0], selective.x[0], rtol=0)
    assert hardest.collapsed
    assert hardest.separated is None
    assert hardest.vanishing[-1] == 1
    assert hardest.spread[-1] < 0.1 * hardest.spread[0]  # it does not wait there, it goes there
    assert not selective.collapsed
    assert selective.recall[-1] == 1
    assert selective.vanishing[-1] == 0


def test_an_objective_is_as_good_as_its_terms() -> None:
    given = simulate(goal.Objective(T=HINGE, P="con", reduction="sum"), n=8, d=4, steps=5)
    named = simulate(T=HINGE, P="con", n=8, d=4, steps=5)
    assert_allclose(given.x, named.x, rtol=0)
    assert simulate(goal.InfoNCE(), n=8, d=4, steps=200, lr=0.2).recall[-1] == 1


def test_seeds_are_starts() -> None:
    a, b, c = (simulate(n=4, d=3, steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.x, c.x)


def test_nan_shows() -> None:
    def broken(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum() * math.nan

    run = simulate(broken, n=4, d=3, steps=3)
    assert np.isnan(run.value).all()
    for series in (run.recall, run.vanishing, run.spread, run.force):
        assert np.isnan(series[1:]).all()
    assert run.separated is None
    assert "nan" in str(run)
    assert math.isnan(run.oscillation)


# ── tables and pictures ─────────────────────────────────────────────────────────────────────────────────


def test_the_table_says_what_happened(both: list[Simulation]) -> None:
    text = table(both)
    head, hardest, selective, empty, conditions = text.splitlines()
    assert head.split()[:4] == ["objective", "recall@1", "separated", "spread"]
    assert hardest.startswith("con(margin=0.2) × con, hardest ")
    assert "never" in hardest
    assert "collapsed" in hardest
    assert f"step {both[1].separated}" in selective
    assert "collapsed" not in selective
    assert empty == ""
    assert conditions.startswith("collapsed map, n = 64, d = 16, 120 steps")
    assert str(both[0]).splitlines()[1].split() == hardest.split()


def test_labels_show_what_is_not_the_default() -> None:
    labels = [
        simulate(T=T, P=P, mining=mining, n=2, d=2, steps=1).label
        for T, P, mining in (
            ("cir", "sig-ms", "semi-hard"),
            (goal.T.cir(tau=5.0), goal.P.sig_ms(self_term=True), goal.mining.semi_hard(margin=0.1)),
        )
    ]
    assert labels == ["cir × sig-ms, semi-hard", "cir(tau=5) × sig-ms(self_term=1), mining.semi_hard(margin=0.1)"]


def test_pictures_show_every_series(both: list[Simulation], tmp_path: Path) -> None:
    figure = plot_simulations(both, tmp_path / "runs.png")
    recall, norm, vanishing, similarity = figure.axes
    assert [line.get_label() for line in recall.lines] == [run.label for run in both]
    assert_allclose(vanishing.lines[0].get_ydata(), both[0].vanishing)
    assert_allclose(similarity.lines[3].get_ydata(), both[1].s_neg)
    assert norm.get_yscale() == "log"
    assert len({(line.get_color(), line.get_linestyle()) for line in recall.lines}) == 2
    assert (tmp_path / "runs.png").read_bytes()[:4] == b"\x89PNG"
    assert len(both[0].plot().axes[0].lines) == 1
    with pytest.raises(ValueError, match="runs is empty"):
        plot_simulations([])


def test_a_bar_shows_on_a_terminal_once_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    class Bar:
        def __init__(self, transient: bool) -> None: ...

        def add_task(self, label: str, total: int) -> int:
            shown.append(-total)
            return 0

        def update(self, task: int, completed: int) -> None:
            shown.append(completed)

        def start(self) -> None: ...

        def stop(self) -> None:
            shown.append(0)

    clock = iter(range(100))
    monkeypatch.setattr("rich.progress.Progress", Bar)
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    simulate(n=2, d=2, steps=4)
    assert shown == []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    clock = iter(range(100))
    simulate(n=2, d=2, steps=4)
    assert shown == [-4, 3, 4, 0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"start": "colapsed"}, "start='colapsed' is not known. Did you mean 'collapsed'"),
        ({"model": "net"}, "model='net' is not known"),
        ({"n": 1}, "n must be a whole number >= 2, got 1"),
        ({"d": 0}, "d must be a whole number >= 2"),
        ({"steps": 0}, "steps must be a whole number >= 1"),
        ({"lr": 0}, "lr must be a finite number > 0, got 0"),
        ({"lr": math.nan}, "lr must be a finite number > 0, got nan"),
        ({"noise": -1}, "noise must be a finite number >= 0, got -1"),
        ({"T": "cos"}, "T='cos' is not known"),
        ({"mining": "hard"}, "mining='hard' is not known"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        simulate(**arguments)


# ── one triplet ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_plane_by_hand() -> None:
    path = triplet_trajectory("con", "lin", 0.2, 0.6, steps=30, lr=0.1, space="plane")
    t = np.arange(31)
    assert_allclose(path.s_pos, 1 - 0.8 * 0.9**t, rtol=1e-12)  # (s⁺)' = 1 − s⁺
    assert_allclose(path.s_neg, 0.6 * 0.9**t, rtol=1e-12)  # (s⁻)' = −s⁻
    assert path.points is None
    path = triplet_trajectory(HINGE, "con", 0.5, 0.5, steps=5, lr=0.06, space="plane")
    assert_allclose(path.s_pos - path.s_neg, [0, 0.12, 0.24, 0.24, 0.24, 0.24], atol=1e-12)  # it rests past the hinge
    path = triplet_trajectory("nca", goal.P.con(), 0.3, 0.7, steps=1, lr=0.1, space="plane")
    assert_allclose(path.s_pos[1], 0.3 + 0.1 / (1 + math.exp(-4)), rtol=1e-12)


@pytest.mark.parametrize(("T", "P"), [("con", "con"), ("nca", "lin"), ("cir", "sig"), ("cir", "sig-ms")])
def test_the_sphere_is_what_goal_emits(T: str, P: str) -> None:
    """A batch of one pair and one more candidate is the triplet; its R sets are empty."""
    path = triplet_trajectory(T, P, 0.3, 0.7, steps=3, lr=0.1)
    assert path.points is not None
    for now, then in zip(path.points[:-1], path.points[1:], strict=True):
        gx, gy, stats = goal.gradients(torch.tensor(now[:1]), torch.tensor(now[1:]), T=T, P=P, reduction="sum")
        assert stats.index[0].item() == 1
        gradient = torch.cat([gx, gy]).numpy()
        step = gradient - (gradient * now).sum(1, keepdims=True) * now
        expected = now - 0.1 * step
        assert_allclose(then, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-12)
    assert_allclose(path.s_pos, (path.points[:, 0] * path.points[:, 1]).sum(1), rtol=1e-12)
    assert_allclose(path.s_neg, (path.points[:, 0] * path.points[:, 2]).sum(1), rtol=1e-12)
    assert_allclose([path.s_pos[0], path.s_neg[0]], [0.3, 0.7], rtol=1e-12)


def test_a_term_of_triplets_with_relative_similarities_gets_none(registries: None) -> None:
    @goal.triplet_weight("relative", statistics=("r_pos_lin",))
    def relative(s_pos: Tensor, s_neg: Tensor, *, r_pos_lin: Tensor) -> Tensor:
        return 1 + r_pos_lin

    path = triplet_trajectory("relative", "con", 0.2, 0.6, steps=1, lr=0.1, space="plane")
    assert_allclose(path.s_pos[1], 0.3, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"s_pos": 1.2}, ValueError, r"s_pos must be a finite number, within \[-1, 1\] on the sphere, got 1.2"),
        ({"s_neg": math.nan, "space": "plane"}, ValueError, "s_neg must be a finite number"),
        ({"space": "torus"}, ValueError, "space='torus' is not known"),
        ({"steps": 0}, ValueError, "steps must be a whole number >= 1"),
        ({"T": "x"}, ValueError, "T='x' is not known"),
        ({"P": goal.T.con()}, TypeError, "is not a pair weight"),
    ],
)
def test_a_bad_triplet_is_named(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        triplet_trajectory(**({"T": "con", "P": "con", "s_pos": 0.2, "s_neg": 0.3} | arguments))
