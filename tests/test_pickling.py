"""What training keeps or sends to a worker: copies, pickles and saved modules say the same as what they are of."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
from goal.candidates import Augmented
from goal.lab import compose
from goal.training import Curriculum, FewSemiHard, Plateau, Scheduled, cosine, linear, piecewise, varying

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(value: Any) -> Any:
    """Through `torch.save`."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "save": saved,
}
ways = pytest.mark.parametrize("way", WAYS)

SCHEDULES = {
    "linear": linear(5.0, 20.0, steps=10),
    "cosine": cosine(0.0, 0.2, steps=10),
    "piecewise": piecewise({0: "semi-hard", 4: linear(0.0, 1.0, steps=3)}),
    "varying": varying(goal.T.con, margin=cosine(0.0, 0.2, steps=8)),
    "varying mining": varying(goal.mining.semi_hard, margin=piecewise({0: 0.1, 5: linear(0.1, 0.3, steps=4)})),
    "compose": compose.schedule("con", "lin", steps=10),
}


def moving() -> Scheduled:
    return Scheduled(
        T=varying(goal.T.cir, tau=linear(4.0, 12.0, 8)),
        P=compose.schedule("con", "lin", steps=8),
        mining=piecewise({0: "semi-hard", 3: varying(goal.mining.semi_hard, margin=linear(0.2, 0.5, 4))}),
    )


MODULES: dict[str, Callable[[], nn.Module]] = {
    "objective": lambda: goal.Objective(T=goal.T.con(margin=0.2), P="lin-ms", mining=goal.mining.selective(eps=0.3)),
    "composed": lambda: goal.Objective(
        T=compose.product(goal.T.con(margin=0.2), "nca"), P=compose.plus(goal.P.con(), goal.P.sig(), amount=0.5)
    ),
    "projected": lambda: goal.Objective(T="con", P=compose.plus("con", compose.rotational_part("nca", "lin"))),
    "scheduled": moving,
    "augmented": lambda: Augmented(goal.Objective(T=goal.T.con(margin=0.2), P="con"), "interpolate", n=2),
    "banked": lambda: goal.Banked(moving(), goal.Bank(size=20, dim=6)),
    "curriculum": lambda: Curriculum(
        [goal.Objective(mining="semi-hard"), moving(), goal.recipe("infonce")],
        until=[FewSemiHard(share=0.9, patience=2), Plateau(patience=1)],
    ),
}


@ways
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, way: str) -> None:
    schedule: Any = SCHEDULES[name]
    found = WAYS[way](schedule)
    assert [repr(found(step)) for step in range(12)] == [repr(schedule(step)) for step in range(12)]
    assert getattr(found, "turns", None) == getattr(schedule, "turns", None)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(9, 6, generator=generator), dim=1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def steps(module: Any) -> list[Tensor]:
    """Values and gradients of some steps."""
    found = []
    for step in range(4):
        x, y = inputs()
        torch.manual_seed(0)
        ids = [torch.arange(9) + 3 * step] if isinstance(module, goal.Banked) else []
        value = module(x, y, *ids)
        value.backward()
        found += [value.detach(), x.grad, y.grad]
        if isinstance(module, goal.Banked):
            module.bank.push(x, y, *ids)
        for each in module.modules() if not hasattr(module, "step") else [module]:
            if hasattr(each, "step"):
                each.step(*([0.0] if isinstance(each, Curriculum) else []))
    return found


@ways
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, used: bool, way: str) -> None:
    module = MODULES[name]()
    if used:
        steps(module)
    found = WAYS[way](module)
    for one, other in zip(steps(found), steps(module), strict=True):
        assert torch.equal(one, other)


@ways
def test_a_registered_term_stays_the_one_that_is_registered(way: str) -> None:
    for term in (goal.T.cir(tau=3.0), goal.P.sig_ms()):
        found = WAYS[way](term)
        assert found == term
        assert found.definition is term.definition


REGISTERS = """
import goal

@goal.triplet_weight("soft-step")
def soft_step(s_pos, s_neg, *, tau=10.0):
    return (tau * (s_neg - s_pos)).sigmoid()
"""


READS = """
import goal, pathlib, pickle

kept = pathlib.Path("o.pkl").read_bytes()
try:
    pickle.loads(kept)
except Exception as error:
    print(error)
import mine
print(pickle.loads(kept))
"""


@pytest.mark.usefixtures("registries")
def test_a_users_term_goes_to_another_process_by_its_name(tmp_path: Path) -> None:
    """Which has to know it."""
    (tmp_path / "mine.py").write_text(REGISTERS)
    exec(REGISTERS, {"__name__": "mine"})
    (tmp_path / "o.pkl").write_bytes(pickle.dumps(goal.Objective(T=goal.T.soft_step(tau=3.0))))
    read = subprocess.run([sys.executable, "-c", READS], cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after = read.stdout.splitlines()
    assert "goal.T has no 'soft-step' in this process" in before
    assert "import the module that registers it" in before
    assert after == "Objective(soft-step(tau=3) × sig-ms)"


def test_schedules_show_how_they_are_made() -> None:
    shown = "varying(T.con, margin=piecewise({0: 0.1, 4: linear(0.1, 0.2, steps=3)}))"
    assert repr(varying(goal.T.con, margin=piecewise({0: 0.1, 4: linear(0.1, 0.2, 3)}))) == shown
    assert repr(varying(goal.mining.semi_hard, margin=cosine(0.1, 0.2, 3))).startswith("varying(mining.semi_hard, mar")


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint32])
def test_numbers_of_numpy_are_numbers(kind: Any) -> None:
    three, half = kind(3), np.float32(0.5)
    assert linear(half, kind(2), three) == linear(0.5, 2.0, 3)
    assert piecewise({kind(0): "a", three: "b"})(3) == "b"
    assert Plateau(three) == Plateau(3)
    assert FewSemiHard(half, three) == FewSemiHard(0.5, 3)
    assert moving().at(three).done == 3
    assert Curriculum([goal.Objective(), goal.Objective()], until=[three]).until == (3,)
    assert [type(number) for number in (linear(half, kind(2), three)(1), Plateau(three).patience)] == [float, int]


@pytest.mark.parametrize(("number", "said"), [(True, "start must be a number"), ("1", "start must be a number")])
def test_what_is_no_number_is_none_here_either(number: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        linear(number, 1.0, 3)
