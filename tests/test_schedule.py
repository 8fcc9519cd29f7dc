"""Schedules, objectives that follow them, and the curriculum of stages: values, refusals, resuming, compiling."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import normalize

import goal
from goal.candidates import Augmented
from goal.lab import compose
from goal.training import Curriculum, FewSemiHard, Plateau, Scheduled, cosine, linear, piecewise, varying

pytestmark = pytest.mark.usefixtures("one_thread")


def embeddings(n: int = 12, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


# ── schedules ───────────────────────────────────────────────────────────────────────────────────────────


def test_ramps_follow_their_formulas() -> None:
    down, level = linear(0.3, 0.1, 7), cosine(0.3, 0.1, 7)
    for step in range(12):
        part = min(step / 7, 1)
        assert down(step) == pytest.approx(0.3 + (0.1 - 0.3) * part)
        assert level(step) == pytest.approx(0.1 + (0.3 - 0.1) * (1 + math.cos(math.pi * part)) / 2)
    assert down(7) == level(7) == down(10**9) == 0.1, "exactly, whatever rounding"


def test_pieces_hold_from_their_step_on_in_any_order() -> None:
    schedule = piecewise({10: "b", 0: "a", 20: linear(0.0, 1.0, 4)})
    assert [schedule(step) for step in (0, 9, 10, 19)] == ["a", "a", "b", "b"]
    assert [schedule(step) for step in (20, 22, 24, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert schedule.turns == (0, 10, 20, 24)


def test_terms_and_minings_with_changing_parameters() -> None:
    schedule = varying(goal.P.sig, beta=linear(10.0, 20.0, 10), lam=piecewise({0: 0.5, 3: 0.6}), alpha=3.0)
    assert schedule(5) == goal.P.sig(alpha=3.0, beta=15.0, lam=0.6)
    assert schedule.turns == (0, 3, 10)
    assert varying(goal.mining.semi_hard, margin=linear(0.2, 0.4, 2))(1).margin == pytest.approx(0.3)
    nested = piecewise({0: "con", 5: varying(goal.T.con, margin=linear(0.0, 0.2, 10))})
    assert nested(10) == goal.T.con(margin=0.1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: linear(0.0, 1.0, 0), "steps must be a whole number >= 1"),
        (lambda: cosine(0.0, 1.0, 1.5), "steps must be a whole number >= 1"),
        (lambda: linear(0.0, math.nan, 3), "end must be finite"),
        (lambda: linear("a", 1.0, 3), "start must be a number"),
        (lambda: piecewise({3: 1.0}), "from step 0 on"),
        (lambda: piecewise({}), "from step 0 on"),
        (lambda: piecewise({0: 1.0, -2: 1.0}), "a key must be a whole number >= 0"),
        (lambda: piecewise({0: 1.0, 2.5: 1.0}), "a key must be a whole number >= 0"),
        (lambda: varying(goal.T.cir, taw=linear(1.0, 2.0, 3)), "no parameter 'taw'. Known: tau"),
    ],
)
def test_refused_schedules(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make()


# ── objectives that follow them ─────────────────────────────────────────────────────────────────────────


def moving() -> Scheduled:
    return Scheduled(
        T=varying(goal.T.cir, tau=linear(4.0, 12.0, 8)),
        P=piecewise({0: "lin", 4: varying(goal.P.sig_ms, beta=linear(5.0, 15.0, 4))}),
        mining=piecewise({0: varying(goal.mining.semi_hard, margin=linear(0.5, 0.9, 3)), 3: "hardest", 6: "selective"}),
        reduction=piecewise({0: "mean", 2: "sum"}),
    )


def fixed(step: int) -> goal.Objective:
    """What `moving` is at a step, written out."""
    return goal.Objective(
        T=goal.T.cir(tau=4.0 + step),
        P="lin" if step < 4 else goal.P.sig_ms(beta=5.0 + 2.5 * (step - 4)),
        mining=goal.mining.semi_hard(0.5 + 0.4 * step / 3) if step < 3 else "hardest" if step < 6 else "selective",
        reduction="mean" if step < 2 else "sum",
    )


def test_every_argument_follows_its_schedule() -> None:
    objective = moving()
    for step in range(8):
        assert objective.done == step
        x, y = embeddings(seed=step)
        found, expected = objective(x, y), fixed(step)(x, y)
        assert torch.equal(found, expected)
        for one, other in zip(*(torch.autograd.grad(v, (x, y)) for v in (found, expected)), strict=True):
            assert torch.equal(one, other)
        objective.step()


def test_any_step_at_once_and_back() -> None:
    objective = moving()
    for step in (7, 0, 5):
        assert objective.at(step) is objective
        assert str(objective) == str(fixed(step)).replace("Objective", "Scheduled")
        assert objective.done == step
    for wrong in (-1, 1.0, True):
        with pytest.raises((ValueError, TypeError), match="step must be a whole number >= 0"):
            objective.at(wrong)  # type: ignore[arg-type]


def test_stats_are_of_the_call_and_not_of_the_next_step() -> None:
    x, y = embeddings()
    objective = Scheduled("nca", "con", mining=piecewise({0: "all", 1: "semi-hard"}))
    objective(x, y)
    before = objective.stats
    objective.step()
    for one, other in zip(objective.stats, before, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_schedule_of_the_laboratory_and_a_plain_function() -> None:
    objective = Scheduled("con", compose.schedule("con", "lin", steps=10), similarity=lambda step: "cosine")
    assert objective.at(5).settings.product.P.params == {"weight": 0.5}
    assert objective.settings.similarity.name == "cosine"


def test_unknown_names_are_refused_at_construction_wherever_they_stand() -> None:
    for argument in ({"mining": piecewise({0: "hardest", 900: "harder"})}, {"T": piecewise({0: "con", 900: "cri"})}):
        with pytest.raises(ValueError, match=r"^step 900: .* is not known"):
            Scheduled(**argument)
    with pytest.raises(ValueError, match=r"^step 0: P='con2' is not known"):
        Scheduled(P="con2")
    with pytest.raises(TypeError, match="marign"):
        Scheduled(marign=0.2)


def test_values_out_of_range_name_their_step() -> None:
    with pytest.raises(ValueError, match=r"^step 50: goal.T.cir: parameter 'tau' must be > 0, got 0.0"):
        Scheduled(T=varying(goal.T.cir, tau=linear(5.0, 0.0, 50)))
    objective = Scheduled(T=lambda step: goal.T.cir(tau=3.0 - step))
    objective.at(2)
    with pytest.raises(ValueError, match=r"^step 3: goal.T.cir: parameter 'tau' must be > 0"):
        objective.step()
    assert (objective.done, objective.settings.product.T.params) == (2, {"tau": 1.0}), "it stands where it stood"


def test_its_state_is_the_step() -> None:
    objective = moving().at(5)
    state = objective.state_dict()
    assert list(state) == ["_extra_state"]
    other = moving()
    other.load_state_dict(load(save(state)))  # as the training loop keeps it
    assert (other.done, str(other)) == (5, str(objective))


def test_a_number_compiles_once_more_and_a_name_as_often_as_it_changes() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    objective = Scheduled(
        T=varying(goal.T.cir, tau=linear(4.0, 12.0, 8)),
        P=varying(goal.P.sig_ms, beta=cosine(5.0, 15.0, 8)),
        mining=piecewise({0: varying(goal.mining.selective, eps=linear(0.01, 0.5, 8)), 6: "all"}),
    )
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    x, y = embeddings()
    frames = []
    for _ in range(8):
        expected = objective(x, y)
        torch.testing.assert_close(compiled(x, y), expected)
        assert torch.equal(objective.stats.T, goal.gradients(x, y, *both(objective), mining="selective")[2].T)
        frames.append(counter.frame_count)
        objective.step()
    assert frames == [1, 2, 2, 2, 2, 2, 3, 3]


def both(objective: goal.Objective) -> tuple[Any, Any]:
    return objective.settings.product.T, objective.settings.product.P


# ── the curriculum ──────────────────────────────────────────────────────────────────────────────────────


class Named(nn.Module):
    """A stage that says which it is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> tuple[str, Any, Any]:
        return self.name, args, kwargs


def test_a_stage_ends_after_its_steps_and_never_comes_back() -> None:
    objective = Curriculum([Named("a"), Named("b"), Named("c")], until=[2, 3])
    seen = []
    for _ in range(9):
        seen.append(objective(1, key=2))
        objective.step()
    assert [name for name, _, _ in seen] == list("aabbbcccc")
    assert seen[0][1:] == ((1,), {"key": 2})


def test_a_plateau_is_so_many_steps_without_a_new_best() -> None:
    objective = Curriculum([Named("a"), Named("b")], until=[Plateau(patience=3)])
    switched = [objective.step(value) for value in (1.0, 0.5, 2.0, math.inf, math.nan, 3.0, 3.0, 3.0, 2.9, 99.0)]
    assert switched == [False] * 8 + [True, False]
    objective = Curriculum([Named("a"), Named("b")], until=[Plateau(patience=3)])
    with pytest.raises(ValueError, match=r"call step\(value\)"):
        objective.step()


def semi_hard(margin: float = 0.2) -> goal.Objective:
    return goal.Objective("con", "con", mining=goal.mining.semi_hard(margin))


def test_few_semi_hard_negatives_in_a_row_end_a_stage() -> None:
    x, y = embeddings()
    noise = 0.01 * torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    near = normalize(x + noise, dim=1)  # every pair is far ahead of its negatives
    objective = Curriculum([semi_hard(), goal.Objective()], until=[FewSemiHard(share=0.3, patience=2)])
    left = []
    for other in (y, near, y, near, near, near):
        objective(x, other)
        if objective.stage == 0:
            assert objective.stats.index.shape == (2, 12)
            left.append((objective.stats.s_neg > -torch.inf).double().mean().item())
        objective.step()
    assert len(left) == 5, "a batch with many begins the count anew"
    assert [share < 0.3 for share in left] == [False, True, False, True, True]
    assert objective.stage == 1


def test_a_scheduled_stage_counts_from_its_own_beginning() -> None:
    def stage() -> Scheduled:
        return Scheduled(varying(goal.T.cir, tau=linear(1.0, 11.0, 10)))

    first, second = stage(), stage()
    objective = Curriculum([first, Augmented(second)], until=[3])
    for _ in range(5):
        objective.step()
    assert (first.done, second.done) == (3, 2)
    assert objective.settings is second.settings


@pytest.mark.parametrize(
    ("stages", "until", "said"),
    [
        ([], [], "one entry less"),
        ([Named("a")], [3], "one entry less"),
        ([Named("a"), Named("b")], [], "one entry less"),
        ([Named("a"), Named("b")], [0], r"until\[0\] must be a whole number >= 1"),
        ([Named("a"), Named("b")], ["plateau"], r"until\[0\] must be a whole number >= 1"),
        ([Named("a"), Named("b")], [FewSemiHard(0.1)], "stage 0 mines no semi-hard"),
        ([semi_hard(), goal.Objective(), Named("c")], [2, FewSemiHard(0.1)], "stage 1 mines no semi-hard"),
    ],
)
def test_refused_curricula(stages: list[nn.Module], until: list[Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        Curriculum(stages, until)


def test_refused_ends() -> None:
    for make in (lambda: Plateau(0), lambda: FewSemiHard(0.1, patience=0), lambda: FewSemiHard(0.0)):
        with pytest.raises(ValueError, match="must be"):
            make()
    assert Curriculum([semi_hard(), goal.Objective()], [FewSemiHard(0.1)]).stage == 0


# ── resuming ────────────────────────────────────────────────────────────────────────────────────────────


class Training:
    """A small loop whose randomness is a function of the step, and which is all in its state."""

    def __init__(self, until: Any) -> None:
        hinge: dict[str, Any] = {"T": varying(goal.T.con, margin=linear(0.1, 0.4, 20)), "P": "con"}
        torch.manual_seed(0)
        self.f, self.g = nn.Linear(8, 6), nn.Linear(8, 6)
        self.objective = Curriculum(
            [Scheduled(**hinge, mining="semi-hard"), Augmented(Scheduled(**hinge), "mixup"), goal.Objective()],
            until=[until, 9],
        )
        self.modules = nn.ModuleList([self.f, self.g, self.objective])
        self.optimizer = torch.optim.SGD(self.modules.parameters(), lr=0.5)

    def run(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            torch.manual_seed(100 + step)
            a = torch.randn(10, 8)
            x, y = (normalize(side(a + 0.5 * torch.randn(10, 8)), dim=1) for side in (self.f, self.g))
            loss = self.objective(x, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            self.objective.step(-loss.item())
        return losses


@pytest.mark.parametrize("until", [6, Plateau(patience=3), FewSemiHard(share=0.6, patience=2)], ids=str)
def test_a_killed_run_ends_with_the_same_bits(until: Any) -> None:
    whole = Training(until)
    expected = whole.run(range(24))
    assert whole.objective.stage == 2
    for killed in (2, 5, 8, 12, 20):
        begun = Training(until)
        begun.run(range(killed))
        state = load(save(begun.modules.state_dict()))
        again = Training(until)
        again.modules.load_state_dict(state)
        assert again.run(range(killed, 24)) == expected[killed:]
        for one, other in zip(again.modules.parameters(), whole.modules.parameters(), strict=True):
            assert torch.equal(one, other)
