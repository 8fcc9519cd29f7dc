"""The batch test against Jacobians and works known by other means, and against what is known to have a loss or none."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

import goal
from goal.lab import batch
from goal.lab.batch import batch_integrability, loop_work
from goal.lab.dynamics import simulate, triplet_trajectory

pytestmark = pytest.mark.usefixtures("one_thread")

HINGE = goal.T.con(margin=0.2)


def draw(seed: int, n: int = 6, d: int = 4, pull: float = 0.7) -> tuple[Tensor, Tensor]:
    """Pairs that lie together, so that hinges are near their edge and the sets of relative similarities hold some."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    x = normalize(x, dim=1)
    return x, normalize(x + pull * normalize(noise, dim=1), dim=1)


def linear(matrix: Tensor) -> Any:
    """An objective whose field is z ↦ matrix · z, a gradient or not."""

    class Emit(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z.sum()

        @staticmethod
        def backward(ctx: Any, *incoming: Tensor) -> Tensor:
            return incoming[0] * (matrix @ ctx.saved_tensors[0])

    return lambda x, y: Emit.apply(torch.cat([x.flatten(), y.flatten()]))


# ── which fields are gradients ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("T", "P", "mining"),
    [
        ("nca", "con", "hardest"),
        ("cir", "lin", "hardest"),
        ("con", "con", "hardest"),
        ("con", "lin", "hardest"),
        ("con", "sig", "hardest"),
        (HINGE, "con", "hardest"),
        ("nca", "con", "all"),
    ],
)
def test_losses_are_integrable(T: Any, P: str, mining: str, seed: int) -> None:
    report = batch_integrability(
        goal.Objective(T=T, P=P, mining=mining), *draw(seed, n=5), probes=8, loops=1, seed=seed
    )
    assert report.integrable
    assert report.antisymmetric_share < 1e-12
    assert report.noise < 1e-6
    assert all(loop.effort > 0.01 and loop.error < 1e-4 * loop.effort for loop in report.loops)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("T", "P"), [("nca", "lin"), ("cir", "con"), ("con", "sig-ms"), ("con", "lin-ms")])
def test_fields_with_a_curl_are_not(T: str, P: str, seed: int) -> None:
    x, y = draw(seed)
    *_, stats = goal.gradients(x, y, T=T, P=P)
    if P.endswith("-ms"):  # what makes them move with the batch is there
        plain = goal.gradients(x, y, T=T, P=P.removesuffix("-ms"))[2]
        assert not torch.allclose(stats.P_neg, plain.P_neg)
    report = batch_integrability(goal.Objective(T=T, P=P), x, y, loops=0, seed=seed)
    assert not report.integrable
    assert report.antisymmetric_share > 1e-3
    assert report.largest > 1e3 * report.noise
    assert report.loops == ()


@pytest.mark.parametrize("seed", range(3))
def test_a_jump_that_no_loss_has_shows_in_loops_alone(seed: int) -> None:
    x, y = draw(seed, n=5)
    report = batch_integrability(goal.Objective(T=HINGE, P="lin"), x, y, loops=2, seed=seed)
    assert report.symmetric
    assert not report.integrable
    assert any(abs(loop.work) > 10 * loop.error for loop in report.loops)


def test_a_relative_similarity_does_work() -> None:
    report = batch_integrability(goal.Objective(T="con", P="lin-ms"), *draw(0, n=4), probes=1, loops=1)
    assert not report.loops[0].closed
    assert math.isnan(report.standard_error)


@pytest.mark.parametrize("seed", range(3))
def test_infonce_is_integrable(seed: int) -> None:
    report = batch_integrability(goal.InfoNCE(), *draw(seed), probes=8, seed=seed)
    assert report.integrable
    assert report.antisymmetric_share < 1e-12


def test_more_candidates_than_anchors() -> None:
    x, y = draw(1)
    assert batch_integrability(goal.Objective(T="nca", P="con"), x[:4], y, probes=4, loops=1).integrable
    assert not batch_integrability(goal.Objective(T="nca", P="lin"), x[:4], y, loops=0).integrable


# ── soft mining ─────────────────────────────────────────────────────────────────────────────────────────


WAYS = [(over, normalise) for over in ("negatives", "candidates") for normalise in ("sum", "mean")]
KEEP = {"hardness": "square", "level": "root", "at": "each"}  # circle loss, its weights differentiated


S = torch.tensor([[0.55, 0.3, -0.1, 0.45]], dtype=torch.float64)  # s⁺ and three negatives


def differences(emit: Any, s: Tensor = S) -> Tensor:
    """∂gₐ/∂s_b − ∂g_b/∂sₐ over the four entries of S, by central differences."""
    step = 1e-5 * torch.eye(4, dtype=torch.float64)[:, None]
    jacobian = torch.stack([(emit(s + h) - emit(s - h))[0] / 2e-5 for h in step], dim=1)
    return jacobian - jacobian.T


def emission(T: str, P: str, mining: goal.mining.Mining) -> Any:
    def emit(s: Tensor) -> Tensor:
        s = s.clone().requires_grad_()
        value = goal.apply_similarity(s, T, P, mining=mining, directions="x→y")
        return torch.autograd.grad(value, s)[0]

    return emit


def slopes(T: str, P: str, s_pos: Tensor, s_neg: Tensor) -> dict[str, Tensor]:
    """T, P⁻ and the derivatives that the curl is made of, by autograd through the terms."""
    s_pos, s_neg = s_pos.clone().requires_grad_(), s_neg.clone().requires_grad_()
    zero = 0 * (s_pos + s_neg)
    t = zero + goal.T[T].function(s_pos, s_neg, **goal.T[T].defaults)
    p_pos, p_neg = (zero + p for p in goal.P[P].function(s_pos, s_neg, **goal.P[P].defaults))

    def d(of: Tensor, at: Tensor) -> Tensor:
        return torch.autograd.grad(of, at, retain_graph=True)[0]

    return {
        "T": t.detach(),
        "P⁺": p_pos.detach(),
        "P⁻": p_neg.detach(),
        "∂₊T": d(t, s_pos),
        "∂₋T": d(t, s_neg),
        "∂₊TP⁻": d(t * p_neg, s_pos),
        "∂₋TP⁻": d(t * p_neg, s_neg),
        "∂₋TP⁺": d(t * p_pos, s_neg),
    }


@pytest.mark.parametrize(("over", "normalise"), WAYS)
@pytest.mark.parametrize(
    ("T", "P", "integrable"),
    [
        ("nca", "con", True),
        ("cir", "lin", True),
        ("con", "sig", True),
        (HINGE, "con", True),
        ("nca", "lin", False),
        ("cir", "con", False),
        ("con", "lin-ms", False),
    ],
)
def test_soft_mining_keeps_the_verdict(T: Any, P: str, integrable: bool, over: str, normalise: str) -> None:
    objective = goal.Objective(T, P, mining=goal.mining.soft(tau=8.0, over=over, normalise=normalise))
    report = batch_integrability(objective, *draw(0, n=5), probes=4, loops=int(integrable))
    assert report.integrable == integrable
    assert report.largest < 1e-7 if integrable else report.largest > 1e3 * report.noise
    assert all(loop.effort > 0.01 and loop.error < 1e-3 * loop.effort for loop in report.loops)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("over", "normalise", "met"),
    [("negatives", "sum", True), ("candidates", "mean", True), ("candidates", "sum", False)],
)
def test_a_jump_counts_where_soft_mining_meets_it(over: str, normalise: str, met: bool, seed: int) -> None:
    """con(m) × lin fails at s⁻ = s⁺ − m; over the candidates the sum's s̃ is never below s⁺."""
    objective = goal.Objective(HINGE, "lin", mining=goal.mining.soft(tau=8.0, over=over, normalise=normalise))
    report = batch_integrability(objective, *draw(seed, n=5), probes=2, loops=2, seed=seed)
    assert report.symmetric
    assert report.integrable != met


@pytest.mark.parametrize(
    ("T", "P", "soft", "integrable"),
    [
        ("nca", "con", {"alpha": 4.0}, False),
        (HINGE, "con", {"alpha": 4.0}, False),
        ("con", "con", {"alpha": 4.0}, True),
        ("con", "sig", {"alpha": 4.0}, True),
        ("nca", "con", {"at": "each"}, True),
        ("con", "sig", {"at": "each"}, False),
        ("cir", "lin", {"at": "each"}, False),
        ("con", "con", {"hardness": "circle", "at": "each"}, False),
        ("cir", "lin", {"hardness": "circle", "at": "each"}, False),
        ("con", "lin", {"hardness": "circle", "at": "each"}, False),  # a negative lies below −m
        ("con", "lin", {"hardness": "circle", "at": "each", "margin": 1.0}, True),
        ("con", "lin", {"hardness": "circle", "margin": 1.0}, False),
        ("cir", "lin", KEEP, True),
        ("cir", "lin", KEEP | {"over": "candidates"}, True),
        ("con", "con", KEEP, False),
    ],
)
def test_soft_mining_with_other_shares(T: Any, P: str, soft: dict[str, Any], integrable: bool) -> None:
    """A loss wants a push of T · P⁻(s̃) · ∂s̃/∂sⱼ."""
    objective = goal.Objective(T, P, mining=goal.mining.soft(tau=4.0, **soft))
    loops = 2 if T is HINGE else 0
    x, y = draw(0, n=5)
    report = batch_integrability(objective, x, y, probes=4, loops=loops)
    assert report.integrable == integrable
    assert (x @ y.T).min() < -0.4


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("margin", [0.25, 0.0])
def test_the_published_circle_loss_is_the_gradient_of_none(margin: float) -> None:
    """Where nothing is clipped; docs/mathematics.md gives the Jacobian's differences, which vanish without a margin."""
    tau = 4.0

    @goal.triplet_weight("circle-published")
    def triplet(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        return torch.sigmoid(tau * (s_neg + (1 + margin - s_pos).clamp(min=0) * (1 - margin - s_pos)))

    @goal.pair_weight("circle-published")
    def pair(s_pos: Tensor, s_neg: Tensor) -> tuple[Tensor, Tensor]:
        return (1 + margin - s_pos).clamp(min=0), (s_neg + margin).clamp(min=0)

    mining = goal.mining.soft(tau, hardness="circle", margin=margin, at="each")
    x, y = (0.5 * side.abs() + 0.1 for side in draw(1, n=5))
    objective = goal.Objective("circle-published", "circle-published", mining=mining)
    assert batch_integrability(objective, x, y, probes=4, loops=0).integrable == (margin == 0)
    s = S.abs()
    found = differences(emission("circle-published", "circle-published", mining), s)
    s_pos, s_neg = s[0, 0], s[0, 1:]
    h = tau * (s_neg + margin) * (s_neg - margin)
    t, q = triplet(s_pos, h.logsumexp(0) / tau), torch.softmax(h, 0)
    with_positive = 2 * tau * margin * (s_pos + s_neg - 1) * t * (1 - t) * q
    between = 2 * tau * margin * (s_neg[:, None] - s_neg) * t**2 * q[:, None] * q
    torch.testing.assert_close(found[1:, 0], with_positive, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1:, 1:], between, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("T", "P"), [("nca", "con"), ("nca", "lin"), ("cir", "con"), ("cir", "sig"), ("con", "sig")])
@pytest.mark.parametrize(
    "soft",
    [
        *({"over": over, "normalise": normalise, "alpha": alpha} for over, normalise in WAYS for alpha in (0.0, 3.0)),
        {"at": "each", "alpha": 3.0},
        {"hardness": "square"},
        {"hardness": "circle", "normalise": "mean"},
        {"hardness": "square", "level": "root", "at": "each"},
    ],
    ids=repr,
)
def test_the_jacobian_of_soft_mining_is_that_of_the_mathematics(T: str, P: str, soft: dict[str, Any]) -> None:
    """docs/mathematics.md, "Where it does not": the formulas with h, level and shares written here by autograd."""
    tau, margin, alpha = 5.0, 0.4, soft.get("alpha", 0.0)
    over, normalise, place = (soft.get(name) for name in ("over", "normalise", "at"))
    s = S[0].clone().requires_grad_()
    candidates = s if over == "candidates" else s[1:]
    h = {
        None: (tau + alpha) * candidates,
        "square": tau * candidates**2,
        "circle": tau * (candidates**2 - margin**2),  # all lie above −m
    }[soft.get("hardness")]
    z = h.logsumexp(0)
    z_of_level = (z - (math.log(len(h)) if normalise == "mean" else 0.0)).detach().requires_grad_()
    level = (z_of_level / tau).sqrt() if soft.get("level") == "root" else z_of_level / tau
    (level_slope,) = torch.autograd.grad(level, z_of_level)
    h_slope = torch.autograd.grad(h.sum(), s, retain_graph=True)[0][1:]
    q = torch.softmax(h, 0).detach()[-3:]
    at = slopes(T, P, S[0, 0], level.detach())
    p_neg = torch.stack([slopes(T, P, S[0, 0], negative)["P⁻"] for negative in S[0, 1:]])
    if place != "each":
        with_positive = q * (at["∂₊TP⁻"] + level_slope * h_slope * at["∂₋TP⁺"])
        turn = level_slope * at["∂₋TP⁻"] - at["T"] * at["P⁻"]
        between = turn * (h_slope[None] - h_slope[:, None])
    else:
        with_positive = q * (p_neg * at["∂₊T"] + level_slope * h_slope * at["∂₋T"] * at["P⁺"])
        turn = level_slope * at["∂₋T"] - at["T"]
        between = turn * (p_neg[:, None] * h_slope[None] - p_neg[None] * h_slope[:, None])
    found = differences(emission(T, P, goal.mining.soft(tau, **soft)))
    torch.testing.assert_close(found[1:, 0], with_positive, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1:, 1:], q[:, None] * q * between, rtol=1e-6, atol=1e-8)
    if not soft.get("alpha") and "hardness" not in soft:  # the theorem: the curl times the share, and symmetric
        torch.testing.assert_close(found[1:, 0], q * (at["∂₊TP⁻"] + at["∂₋TP⁺"]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("T", "P", "soft"),
    [
        *((T, P, {"over": over}) for T, P in (("nca", "con"), ("con", "sig"), (HINGE, "con")) for over, _ in WAYS[::2]),
        ("cir", "lin", {"normalise": "mean", "over": "candidates"}),
        ("cir", "lin", KEEP),
    ],
)
def test_the_value_of_soft_mining_is_the_loss(T: Any, P: str, soft: dict[str, Any]) -> None:
    """The work along an edge is the change of the value, through hinges too, and with a factor."""
    objective = goal.Objective(T, P, mining=goal.mining.soft(tau=4.0, **soft), scale=1.5)
    ends = [draw(seed, n=5) for seed in (0, 100)]
    before, after = (batch.emitted(objective, x, y)[0].item() for x, y in ends)
    start, end = (torch.cat([x.flatten(), y.flatten()]) for x, y in ends)
    work, error, effort = batch._edge(batch._flat(objective, *ends[0]), start, end)
    assert abs(work - (after - before)) <= error < 1e-3 < 0.1 < effort


def test_the_loss_under_alpha_is_not_the_value() -> None:
    """con × con with shares of slope τ + α: the loss is s̃ / (1 + α/τ) − s⁺, the value s̃ − s⁺."""
    tau, alpha = 4.0, 3.0
    mining = goal.mining.soft(tau, alpha=alpha)
    (x, y), (x_end, y_end) = draw(0, n=5), draw(100, n=5)
    objective = goal.Objective("con", "con", mining=mining)

    def parts(x: Tensor, y: Tensor) -> tuple[float, float]:
        s = x @ y.T
        hidden = ((tau + alpha) * s).fill_diagonal_(-torch.inf)
        soft = [(hidden.logsumexp(k) / tau).mean().item() for k in (0, 1)]
        return sum(soft), -2 * s.diagonal().mean().item()

    (push, pull), (push_end, pull_end) = parts(x, y), parts(x_end, y_end)
    start, end = (torch.cat([a.flatten(), b.flatten()]) for a, b in ((x, y), (x_end, y_end)))
    work, error, _ = batch._edge(batch._flat(objective, x, y), start, end)
    assert abs(work - ((push_end - push) / (1 + alpha / tau) + pull_end - pull)) <= error < 1e-3
    value = [batch.emitted(objective, a, b)[0].item() for a, b in ((x, y), (x_end, y_end))]
    assert value == pytest.approx([push + pull, push_end + pull_end])
    assert abs(work - (value[1] - value[0])) > 100 * error


@pytest.mark.parametrize(("T", "P"), [("nca", "con"), ("con", "sig"), ("cir", "sig")])
@pytest.mark.parametrize("average", [False, True])
def test_a_pull_once_has_an_nth_of_the_mixed_derivative(T: str, P: str, average: bool) -> None:
    found = differences(emission(T, P, goal.mining.all_negatives(average=average, pull="once")))
    for j, negative in enumerate(S[0, 1:]):
        at = slopes(T, P, S[0, 0], negative)
        expected = at["∂₊TP⁻"] / (3 if average else 1) + at["∂₋TP⁺"] / 3
        torch.testing.assert_close(found[1 + j, 0], expected, rtol=1e-6, atol=1e-8)
    assert found[1:, 1:].abs().max() < 1e-8


# ── the numbers ─────────────────────────────────────────────────────────────────────────────────────────


def test_derivatives_are_those_of_autograd() -> None:
    """Jv of a loss against autograd's Hessian; uᵀJv is the same to the error that is claimed."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        s = x @ y.T
        return (softplus(10 * (s - s.diagonal()[:, None])) / 10).sum()

    x, y = draw(0, n=4, d=3)
    z = torch.cat([x.flatten(), y.flatten()])
    hessian = torch.autograd.functional.hessian(lambda q: loss(q[:12].view(4, 3), q[12:].view(4, 3)), z)
    v = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    jv, error = batch._derivative(batch._flat(loss, x, y), z, v, scale=1.0)
    assert torch.linalg.vector_norm(jv - hessian @ v) <= error < 1e-6


def test_two_steps_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one coarse step Richardson's error is far below the difference of the two sizes: h⁴ to h²."""
    monkeypatch.setattr(batch, "_STEPS", (1e-2,))
    x, y = draw(0, n=4, d=3)
    z = torch.cat([x.flatten(), y.flatten()])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(x @ y.T).sum()

    hessian = torch.autograd.functional.hessian(lambda q: loss(q[:12].view(4, 3), q[12:].view(4, 3)), z)
    v = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    jv, error = batch._derivative(batch._flat(loss, x, y), z, v, scale=1.0)
    assert torch.linalg.vector_norm(jv - hessian @ v) < 1e-3 * error


def test_the_share_and_its_error_are_those_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_STEPS", (1e-3,))  # enough for a linear field, and quicker
    matrix = torch.randn(24, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    a, s = (matrix - matrix.T) / 2, (matrix + matrix.T) / 2
    share = (a.square().sum() / (a.square().sum() + s.square().sum())).item()
    report = batch_integrability(linear(matrix), *draw(0, n=4, d=3), probes=200, loops=0, seed=7)
    assert abs(report.antisymmetric_share - share) < 3 * report.standard_error < 0.2
    # the same draws through the matrix itself, and the error by the jackknife
    generator = torch.Generator().manual_seed(7)
    draws = torch.stack([torch.randn(24, generator=generator, dtype=torch.float64) for _ in range(400)])
    u, v = draws[::2], draws[1::2]
    squares = [((u @ part) * v).sum(1).square() for part in (a, s)]
    without = torch.stack([part.sum() - part for part in squares])  # (2, 200): a probe left out of each
    shares = without[0] / without.sum(0)
    jackknife = (199 * (shares - shares.mean()).square().mean()).sqrt().item()
    assert report.antisymmetric_share == pytest.approx((squares[0].sum() / sum(squares).sum()).item(), rel=1e-6)
    assert report.standard_error == pytest.approx(jackknife, rel=0.1)


def test_probes_miss_as_rarely_as_they_say() -> None:
    """P(|uᵀAv| ≤ t) ≤ t/σ, an equality for rank 2 and small t; measured on a turn by σ in one plane of 24."""
    sigma, t, k = 0.8, 0.2, 20_000
    generator = torch.Generator().manual_seed(2)
    u, v = torch.randn(2, k, 24, generator=generator, dtype=torch.float64)
    seen = sigma * (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]).abs()
    share = (seen <= t).double().mean().item()
    assert 0.75 * t / sigma < share < t / sigma


def test_a_small_antisymmetric_part_is_found_when_it_is_above_the_noise() -> None:
    matrix = torch.diag(torch.arange(24, dtype=torch.float64))
    x, y = draw(0, n=4, d=3)
    symmetric = batch_integrability(linear(matrix), x, y)
    assert symmetric.integrable
    matrix[0, 1], matrix[1, 0] = 8 * symmetric.noise, -8 * symmetric.noise
    assert not batch_integrability(linear(matrix), x, y, loops=0).integrable


def test_the_work_of_a_turn_is_its_area() -> None:
    """F = (−q, p) in one plane does twice the area of a triangle as work."""
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    matrix[0, 1], matrix[1, 0] = -1.0, 1.0
    zero, right, up = torch.zeros(3, 2, 2, dtype=torch.float64)
    right[0, 0], up[0, 1] = 3.0, 2.0
    corners = [(zero, zero), (right, zero), (up, zero)]
    loop = loop_work(linear(matrix), corners)
    assert loop.work == pytest.approx(6.0, abs=1e-9)
    assert loop_work(linear(matrix), corners[::-1]).work == pytest.approx(-6.0, abs=1e-9)
    assert not loop.closed


class Step(nn.Module):
    """Two jumps close to each other: F = 1[p > √2/2] (1, 0) + 1[p > e/4] (3, 1), where p is the first coordinate."""

    places = math.sqrt(2) / 2, math.e / 4

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p, q = x[0, 0], x[0, 1]
        first, second = ((p.detach() > place).double() for place in self.places)
        return first * p + second * (3 * p + q)


def test_jumps_are_found_where_they_are() -> None:
    start, end = torch.zeros(2, 8, dtype=torch.float64)
    end[0] = 1.0
    field = batch._flat(Step(), *torch.zeros(2, 2, 2, dtype=torch.float64))
    work, error, effort = batch._edge(field, start, end)
    expected = (1 - Step.places[0]) + 3 * (1 - Step.places[1])
    assert abs(work - expected) <= error < 1e-4
    assert effort == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_work_along_an_edge_is_the_change_of_the_loss(seed: int) -> None:
    """Through many changes of the hardest negative and of the hinge, whose loss is written here by hand."""

    def loss(x: Tensor, y: Tensor) -> float:
        s = x @ y.T
        off = s.clone().fill_diagonal_(-torch.inf)
        rows = [torch.relu(off.amax(k) - s.diagonal() + 0.2) for k in (0, 1)]
        return sum(row.mean().item() for row in rows)

    (x, y), (x_end, y_end) = draw(seed), draw(seed + 100)
    start, end = (torch.cat([a.flatten(), b.flatten()]) for a, b in ((x, y), (x_end, y_end)))
    work, error, _ = batch._edge(batch._flat(goal.Objective(T=HINGE, P="con"), x, y), start, end)
    assert abs(work - (loss(x_end, y_end) - loss(x, y))) <= error < 1e-3


def test_the_rules_integrate_polynomials() -> None:
    nodes, fine, coarse = batch._rules()
    t = torch.tensor(nodes, dtype=torch.float64)
    for power in range(9):
        assert (fine @ t**power).item() == pytest.approx(1 / (power + 1), abs=1e-14)
        assert (coarse @ t[::2] ** power).item() == pytest.approx(1 / (power + 1), abs=1e-14)
    assert (fine @ t**16).item() == pytest.approx(1 / 17, abs=1e-14)


# ── what is said ────────────────────────────────────────────────────────────────────────────────────────


def test_reports_read_well() -> None:
    x, y = draw(0)
    yes = repr(batch_integrability(goal.InfoNCE(), x, y, loops=1))
    assert "integrable, as far as these tests see" in yes
    assert "probability ≤ 4^-16" in yes
    assert "0 of 1 do work" in yes
    no = repr(batch_integrability(goal.Objective(T="nca", P="lin"), x, y, loops=0))
    assert "no potential" in no
    assert "antisymmetric share" in no
    assert "loops" not in no


def test_the_same_seed_gives_the_same_report() -> None:
    reports = [batch_integrability(goal.InfoNCE(), *draw(0), loops=1, seed=seed) for seed in (3, 3, 4)]
    assert reports[0] == reports[1] != reports[2]


X, Y = draw(0)
NAN = X.clone()
NAN[2, 1] = torch.nan


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
        ({"x": X[0]}, ValueError, r"x must be 2-D, .*got shape \(4,\)"),
        ({"y": Y[:0]}, ValueError, r"y must be 2-D, .*not empty, got shape \(0, 4\)"),
        ({"y": Y.to(torch.complex64)}, TypeError, "y must hold real numbers.*complex64"),
        ({"x": NAN}, ValueError, "x must be finite, got nan"),
        ({"probes": 0}, ValueError, "probes must be a whole number >= 1, got 0"),
        ({"probes": 2.0}, TypeError, "probes must be a whole number >= 1, got 2.0"),
        ({"loops": -1}, ValueError, "loops must be a whole number >= 0, got -1"),
        ({"size": 0}, ValueError, "size must be a finite number > 0, got 0"),
        ({"objective": lambda x, y: 1.0}, TypeError, "must be a 0-d tensor, got float"),
        ({"objective": lambda x, y: x}, TypeError, r"must be a 0-d tensor, got shape \(6, 4\)"),
        ({"objective": lambda x, y: x.detach().sum()}, ValueError, "no gradient behind it"),
        ({"objective": lambda x, y: (x - x).norm() / 0}, ValueError, "gradient is not finite"),
        ({"objective": lambda x, y: (x * torch.rand(6, 4)).sum()}, ValueError, "must be deterministic"),
        ({"x": torch.ones(6, 4), "y": torch.eye(6, 4)}, ValueError, "x, y: the field jumps there"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    given: dict[str, Any] = {"objective": goal.Objective(T=HINGE, P="con"), "x": X, "y": Y} | arguments
    with pytest.raises(error, match=says):
        batch_integrability(**given)


def test_loops_need_three_batches_of_one_shape() -> None:
    for corners in ([(X, Y), (Y, X)], [(X, Y), (Y, X), (X[:3], Y[:3])], []):
        with pytest.raises(ValueError, match="corners must be at least three batches of one shape"):
            loop_work(goal.InfoNCE(), corners)


def test_what_is_given_stays_as_it_was() -> None:
    x, y = X.float().requires_grad_(), Y.clone()
    batch_integrability(goal.InfoNCE(), x, y, probes=1, loops=0)
    assert x.grad is None
    assert torch.equal(y, Y)
    assert not y.requires_grad


def test_numbers_of_numpy_are_numbers() -> None:
    """Of the laboratory's settings, as they come out of an array."""
    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = np.int64(1), np.int32(2)
    objective = goal.Objective("nca", "lin")
    found = batch_integrability(objective, x, y, probes=two, loops=one, size=np.float32(0.25), seed=one)
    assert repr(found) == repr(batch_integrability(objective, x, y, probes=2, loops=1, size=0.25, seed=1))
    run = simulate(T="con", P="con", n=np.int64(8), d=np.int8(4), steps=two, lr=np.float32(0.5), noise=one, seed=one)
    assert torch.equal(run.x, simulate(T="con", P="con", n=8, d=4, steps=2, lr=0.5, noise=1.0, seed=1).x)
    path = triplet_trajectory("con", "lin", s_pos=np.float32(0.25), s_neg=np.float64(0.5), steps=two, lr=one)
    assert (
        path.s_pos.tolist() == triplet_trajectory("con", "lin", s_pos=0.25, s_neg=0.5, steps=2, lr=1.0).s_pos.tolist()
    )
