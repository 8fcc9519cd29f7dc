"""The diagnosis: its numbers against their formulas, its alarms, its file, and that training does not notice it."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
from goal.candidates import Augmented
from goal.diagnosis import BINS, read
from goal.training import Curriculum

pytestmark = pytest.mark.usefixtures("one_thread")

HINGE: dict[str, Any] = {"T": goal.T.con(margin=0.2), "P": "con"}


def embeddings(n: int = 12, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def collapsed(n: int = 16, noise: float = 1e-4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 8, generator=generator)
    x, y = (normalize(centre + noise * torch.randn(n, 8, generator=generator), dim=1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def diagnosed(objective: nn.Module, x: Tensor, y: Tensor, **given: Any) -> dict[str, Any]:
    """The row of one call."""
    with warnings.catch_warnings(action="ignore"), goal.diagnose(objective) as diagnosis:
        objective(x, y, **given).backward()
        return diagnosis.step()


class Model(nn.Module):
    """Two encoders with dropout and one objective, and a loop that draws all its randomness from a seed."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 6))
        self.g = nn.Linear(8, 6)
        self.objective = objective
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_for(self, steps: int, diagnosis: Any = None) -> list[Tensor]:
        torch.manual_seed(1)
        for _ in range(steps):
            a = torch.randn(10, 8)
            x, y = normalize(self.f(a), dim=1), normalize(self.g(a), dim=1)
            loss = self.objective(x, y)
            self.optimizer.zero_grad()
            loss.backward()
            if diagnosis is not None:
                diagnosis.step()
            self.optimizer.step()
        return [parameter.detach().clone() for parameter in self.parameters()]


# ── training does not notice ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "make",
    [
        goal.Objective,
        lambda: goal.Objective(mining="selective", similarity="cosine"),
        lambda: Augmented(goal.Objective(**HINGE), "mixup"),
        lambda: Curriculum([goal.Objective(**HINGE, mining="semi-hard"), goal.Objective()], until=[3]),
        goal.SigLIP,
    ],
)
def test_training_keeps_every_bit(make: Any, tmp_path: Path) -> None:
    plain = Model(make()).train_for(6)
    watched = Model(make())
    encoders = {"f": watched.f, "g": watched.g}
    with goal.diagnose(watched.objective, encoders, path=tmp_path / "log.jsonl") as diagnosis:
        found = watched.train_for(6, diagnosis)
    assert len(diagnosis.rows) == 6
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_nothing_is_left_when_it_is_closed() -> None:
    objective = goal.Objective()
    x, y = embeddings()
    diagnosis = goal.diagnose(objective)
    objective(x, y).backward()
    assert objective._forward_hooks
    assert x._backward_hooks
    diagnosis.close()
    assert not objective._forward_hooks
    assert not x._backward_hooks
    assert not y._backward_hooks
    with pytest.raises(RuntimeError, match="nothing to diagnose"):
        diagnosis.step()


def test_one_hook_a_tensor_however_many_calls() -> None:
    objective = goal.Objective()
    x, y = embeddings()
    with goal.diagnose(objective):
        for _ in range(5):
            objective(x, y).backward()
        assert x._backward_hooks is not None
        assert len(x._backward_hooks) == 1


# ── the numbers ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mining", ["hardest", "semi-hard", "all", "selective"])
def test_similarities_are_those_of_the_hardest_negatives(mining: str) -> None:
    x, y = embeddings()
    ids = torch.arange(12) // 2
    objective = goal.Objective(mining=mining)
    with goal.diagnose(objective, eps=0.3) as diagnosis:
        objective(x, y, ids=ids).backward()
        row = diagnosis.step()
    S = (x @ y.T).detach()
    s_pos = S.diagonal()
    S = S.masked_fill(ids[:, None] == ids, -torch.inf)
    s_neg = torch.stack([S.amax(1), S.amax(0)])
    assert row["vanishing"] == pytest.approx(((s_pos - s_neg).abs() < 0.3).double().mean().item())
    assert 0 < row["vanishing"] < 1
    assert row["recall_at_1"] == pytest.approx((s_pos > s_neg).double().mean().item())
    assert row["s_pos"] == pytest.approx(s_pos.mean().item())
    assert row["s_neg"] == pytest.approx(s_neg.mean().item())
    for name, s in (("s_pos", s_pos), ("s_neg", s_neg.flatten())):
        counts = torch.histogram(s, BINS, range=(-1.0, 1.0)).hist
        assert row["histogram"][name] == counts.int().tolist()


def test_gradients_and_what_of_them_is_along_the_sphere() -> None:
    x, y = embeddings()
    y = y.detach()
    longer = (2.5 * x.detach()).requires_grad_()
    objective = goal.Objective()
    row = diagnosed(objective, longer, y)
    gradient = torch.autograd.grad(goal.apply(longer, y), longer)[0]
    unit = normalize(longer.detach(), dim=1)
    projector = torch.eye(6, dtype=torch.float64) - unit[:, :, None] * unit[:, None]  # (n, D, D)
    along = (projector @ gradient[:, :, None]).norm().item()
    assert row["gradient"] == {"x": pytest.approx(gradient.norm().item())}, "y needs none"
    assert row["tangent"] == {"x": pytest.approx(along)}
    assert along < 0.99 * gradient.norm()


def test_the_gradient_of_all_uses_arrives() -> None:
    x, y = embeddings()
    objective = goal.Objective()
    with goal.diagnose(objective) as diagnosis:
        (3 * objective(x, y) + x.sum()).backward()
        row = diagnosis.step()
    assert x.grad is not None
    assert row["gradient"]["x"] == pytest.approx(x.grad.norm().item())


def test_gradients_of_encoders() -> None:
    model = Model(goal.Objective())
    with goal.diagnose(model.objective, {"f": model.f, "g": model.g}) as diagnosis:
        model.train_for(1, diagnosis)
    for name in "fg":
        parts = [parameter.grad.norm() for parameter in getattr(model, name).parameters()]
        assert diagnosis.rows[0]["encoders"][name] == pytest.approx(torch.stack(parts).norm().item())


def test_evaluations_and_calls_without_backward_make_no_row() -> None:
    x, y = embeddings()
    objective = goal.Objective()
    with goal.diagnose(objective) as diagnosis:
        with torch.no_grad():
            objective(x, y)
        with pytest.raises(RuntimeError, match="nothing to diagnose"):
            diagnosis.step()
        loss = objective(x, y)
        with pytest.raises(RuntimeError, match="nothing to diagnose"):
            diagnosis.step()
        loss.backward()
        with torch.no_grad():
            objective(x[:3], y[:3])
        assert sum(diagnosis.step()["histogram"]["s_pos"]) == 12, "the row is of the call that trains"
        with pytest.raises(RuntimeError, match="nothing to diagnose"):
            diagnosis.step()
    assert [row["step"] for row in diagnosis.rows] == [0]


def test_further_rows_and_other_similarities() -> None:
    x, y = embeddings()
    row = diagnosed(goal.Objective(), x[:5], y)
    assert sum(row["histogram"]["s_pos"]) == 5
    row = diagnosed(goal.recipe("order++"), x.detach().abs().requires_grad_(), (9 * y.detach()).abs())
    assert row["histogram"]["s_neg"][0] > 0, "below −1"
    assert row["s_neg"] < -1
    spoilt = torch.where(torch.arange(len(x))[:, None] == 2, torch.nan, x.detach()).requires_grad_()
    row = diagnosed(goal.Objective(check_finite=False), spoilt, y)
    assert "the loss is nan" in row["alarms"]["finite"]
    assert sum(row["histogram"]["s_pos"]) == len(x) - 1, "NaN is not a similarity of 0"


# ── alarms ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_collapse_is_told_in_words(reduction: str) -> None:
    words = diagnosed(goal.Objective(**HINGE, reduction=reduction), *collapsed())["alarms"]["collapse"]
    loss = "0.4" if reduction == "mean" else "6.4"
    assert words.startswith(f"loss {loss} is at 2·margin, as where every similarity is equal; 100% of anchors have")
    assert "|s⁺ − s⁻| < 0.01; 0.0% of the gradient is along the sphere" in words
    assert words.endswith("try mining='selective' or a warm-up")
    words = diagnosed(goal.Objective(**HINGE, mining="selective"), *collapsed())["alarms"]["collapse"]
    assert words.endswith("; try a warm-up")
    words = diagnosed(goal.InfoNCE(), *collapsed())["alarms"]["collapse"]
    assert "margin" not in words


def test_no_alarm_where_all_is_well() -> None:
    for objective in (goal.Objective(**HINGE), goal.InfoNCE()):
        assert diagnosed(objective, *embeddings())["alarms"] == {}


def test_a_share_below_the_threshold_is_no_collapse() -> None:
    x, y = collapsed(20)
    apart = torch.eye(8)[torch.arange(3)]
    x, y = (torch.cat([side.detach()[3:], apart]).requires_grad_() for side in (x, y))
    row = diagnosed(goal.Objective(**HINGE), x, y)
    assert 0.8 < row["vanishing"] < 0.9
    assert "collapse" not in row["alarms"]


def test_an_encoder_that_no_gradient_reaches() -> None:
    f, g = nn.Linear(8, 6), nn.Linear(8, 6)
    a = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    objective = goal.Objective()
    with goal.diagnose(objective, {"image": f, "text": g}) as diagnosis:
        objective(normalize(f(a), dim=1), normalize(g(a).detach(), dim=1)).backward()
        with pytest.warns(UserWarning, match=r"step 0: no gradient reaches 'text', though one of"):
            row = diagnosis.step()
    assert set(row["alarms"]) == {"unreached"}


def test_what_is_not_finite(tmp_path: Path) -> None:
    x, y = embeddings()
    broken = x.detach().clone()
    broken[3] = torch.nan
    objective = goal.Objective(check_finite=False)
    path = tmp_path / "log.jsonl"
    with goal.diagnose(objective, path=path) as diagnosis:
        objective(broken.requires_grad_(), y).backward()
        with pytest.warns(UserWarning, match="the loss is nan; the gradient at x is nan"):
            diagnosis.step()
    assert "NaN" not in path.read_text()
    assert read(path)[0]["loss"] is None


def test_a_warning_is_given_when_an_alarm_begins() -> None:
    objective = goal.Objective(**HINGE)
    told = []
    with goal.diagnose(objective) as diagnosis:
        for pair in (collapsed(), collapsed(), embeddings(), collapsed()):
            with warnings.catch_warnings(record=True, action="always") as caught:
                objective(*pair).backward()
                diagnosis.step()
            told.append(len([one for one in caught if one.category is UserWarning]))
    assert told == [1, 0, 0, 1]
    assert [bool(row["alarms"]) for row in diagnosis.rows] == [True, True, False, True]


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────


def rows(path: Path, steps: int, start: int = 0) -> list[dict[str, Any]]:
    objective = goal.Objective()
    with goal.diagnose(objective, path=path, start=start) as diagnosis:
        for step in range(start, steps):
            objective(*embeddings(seed=step)).backward()
            diagnosis.step()
    return diagnosis.rows


def test_a_line_for_each_row_as_soon_as_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    objective = goal.Objective()
    with goal.diagnose(objective, path=path) as diagnosis:
        for step in range(3):
            objective(*embeddings(seed=step)).backward()
            diagnosis.step()
            assert [json.loads(line) for line in path.read_text().splitlines()] == diagnosis.rows
    assert read(path) == diagnosis.rows


def test_a_line_that_was_cut_short_harms_nothing(tmp_path: Path) -> None:
    path, whole = tmp_path / "log.jsonl", tmp_path / "whole.jsonl"
    expected = rows(whole, 5)
    rows(path, 3)
    content = path.read_bytes()
    for cut in (1, 50, 200):
        path.write_bytes(content[:-cut])
        assert read(path) == expected[:2]
        assert rows(path, 5, start=2) == expected
        assert path.read_bytes() == whole.read_bytes()


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    expected = rows(path, 6)
    assert rows(path, 6, start=4) == expected
    assert [row["step"] for row in read(path)] == list(range(6))
    assert rows(path, 1) == read(path) == expected[:1], "start=0 begins it anew"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'eps' must be >= 0"):
        goal.diagnose(goal.Objective(), eps=-0.1)
    for start, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="start must be a whole number"):
            goal.diagnose(goal.Objective(), start=start)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "none")
    path = tmp_path / "other.jsonl"
    for content in ('{"a": 1}\n', "3\n", '{"step": 1\n{}\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match="line 1 is no row"):
            read(path)


# ── the picture ─────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_drawn(tmp_path: Path) -> None:
    model = Model(goal.Objective(**HINGE))
    diagnosis = goal.diagnose(model.objective, {"f": model.f, "g": model.g})
    with pytest.raises(ValueError, match="nothing to draw"):
        diagnosis.draw()
    model.train_for(4, diagnosis)
    figure = diagnosis.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    axes = figure.axes
    titles = [each.get_title(loc="left") for each in axes]
    assert titles[:2] == ["loss", "shares"]
    assert titles[4:] == ["s⁺", "hardest s⁻"]
    assert axes[0].lines[0].get_ydata().tolist() == [row["loss"] for row in diagnosis.rows]
    assert axes[1].lines[0].get_ydata().tolist() == [row["vanishing"] for row in diagnosis.rows]
    labels = [line.get_label() for line in axes[2].lines]
    assert labels == ["x, all", "x, along the sphere", "y, all", "y, along the sphere"]
    assert axes[2].lines[3].get_ydata().tolist() == [row["tangent"]["y"] for row in diagnosis.rows]
    assert [line.get_label() for line in axes[3].lines] == ["f", "g"]
    drawn = axes[4].collections[0].get_array().reshape(BINS, 4)
    assert drawn[:, 2].tolist() == pytest.approx([count / 10 for count in diagnosis.rows[2]["histogram"]["s_pos"]])


def test_gaps_and_alarms_are_drawn() -> None:
    objective = goal.Objective(**HINGE)
    with warnings.catch_warnings(action="ignore"), goal.diagnose(objective) as diagnosis:
        for x, y in (collapsed(), embeddings(), collapsed(), collapsed()):
            objective(x, y.detach()).backward()
            diagnosis.step()
    diagnosis.rows[1]["loss"] = None
    axes = diagnosis.draw().axes
    assert not axes[3].get_visible(), "no encoders"
    assert [(span.get_x(), span.get_width()) for span in axes[0].patches] == [(-0.5, 1), (1.5, 2)]
    assert math.isnan(axes[0].lines[0].get_ydata()[1])
    assert all(map(math.isnan, axes[2].lines[2].get_ydata())), "no gradient at y"
