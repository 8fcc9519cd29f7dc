"""The bank as a queue, and the objective with a bank against a dense float64 truth with constant candidates."""

import copy
import warnings
from collections import deque
from typing import Any

import pytest
import torch
from test_augment import one_way
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
from goal.candidates import Augmented

pytestmark = pytest.mark.usefixtures("one_thread")


def embeddings(n: int, d: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1)


# ── the queue ───────────────────────────────────────────────────────────────────────────────────────────


def pushes(seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of 1 to 9 rows, the sides of different lengths at times."""
    sizes = torch.randint(1, 10, (12, 2), generator=torch.Generator().manual_seed(seed))
    sizes[::2, 1] = sizes[::2, 0]
    return [
        (
            embeddings(n, seed=2 * i),
            embeddings(m, seed=2 * i + 1),
            torch.arange(n) + 100 * i,
            torch.arange(m) + 100 * i,
        )
        for i, (n, m) in enumerate(sizes.tolist())
    ]


def contents(ring: Any) -> set[tuple[Any, ...]]:
    return {(*row, label) for row, label in zip(ring.held.rows.tolist(), ring.held.ids.tolist(), strict=True)}


@pytest.mark.parametrize("size", [1, 5, 8, 1000])
def test_the_last_rows_are_held(size: int) -> None:
    bank = goal.Bank(size, 4, torch.float64)
    queues: tuple[deque[Any], deque[Any]] = deque(maxlen=size), deque(maxlen=size)
    for x, y, ids, y_ids in pushes():
        bank.push(x, y, ids, y_ids)
        for queue, rows, labels in zip(queues, (x, y), (ids, y_ids), strict=True):
            queue.extend((*row, label) for row, label in zip(rows.tolist(), labels.tolist(), strict=True))
        assert contents(bank.x) == set(queues[0])
        assert contents(bank.y) == set(queues[1])
        assert len(bank) == len(queues[0])


def test_its_state_is_saved_and_goes_on(tmp_path: Any) -> None:
    bank, other = goal.Bank(7, 4), goal.Bank(7, 4)
    batches = pushes()
    for each in batches[:5]:
        bank.push(*each)
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    for each in batches[5:]:
        bank.push(*each)
        other.push(*each)
        assert torch.equal(bank.x.rows, other.x.rows)
        assert torch.equal(bank.y.ids, other.y.ids)
    with pytest.raises(RuntimeError, match="size mismatch"):
        goal.Bank(8, 4).load_state_dict(bank.state_dict())


def test_what_is_pushed_is_detached_and_copied() -> None:
    bank = goal.Bank(4, 3, torch.float16)
    x = torch.ones(2, 3, requires_grad=True)
    bank.push(x, x, torch.tensor([1, 2]))
    with torch.no_grad():
        x.zero_()
    assert bank.x.held.rows.dtype == torch.float16
    assert not bank.x.held.rows.requires_grad
    assert (bank.x.held.rows == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_that_are_not_finite_in_its_dtype_are_left_out(dtype: torch.dtype) -> None:
    bank = goal.Bank(6, 4, dtype)
    x, y, ids = embeddings(5, seed=1), embeddings(5, seed=2), torch.arange(5)
    x[1, 2], x[3] = torch.nan, 1e39 if dtype != torch.float64 else torch.inf  # the latter finite, but not in the bank
    y[0] = -torch.inf
    x = x.requires_grad_()
    with pytest.warns(
        UserWarning, match=rf"the bank leaves out .* {dtype}: 2 of 5 rows of x, the first row 1 and 1 of 5 "
    ) as said:
        bank.push(x, y, ids)
    assert said[0].filename == __file__
    with warnings.catch_warnings(action="error"):  # it is said once
        bank.push(x, y, ids + 5)
        bank.push(x * torch.nan, y * torch.nan, ids)
    assert (bank.x.pushed, bank.y.pushed) == (6, 8)
    assert sorted(bank.x.held.ids.tolist()) == [0, 2, 4, 5, 7, 9]
    assert sorted(bank.y.held.ids.tolist()) == [3, 4, 6, 7, 8, 9]
    kept = dict(zip(bank.x.held.ids.tolist(), bank.x.held.rows, strict=True))
    assert torch.equal(kept[7], x[2].to(dtype))
    loss = goal.Banked(goal.Objective(check_finite=False), bank)(y[1:], y[1:], ids[1:])
    assert loss.isfinite()


@pytest.mark.parametrize("pushed", [5, 8, 11, 30])
def test_a_state_with_rows_that_are_not_finite_is_loaded_without_them(pushed: int) -> None:
    bank, restored, truth = (goal.Bank(8, 4) for _ in range(3))
    x, ids = embeddings(pushed).float(), torch.arange(pushed)
    bank.push(x, x, ids)
    state = copy.deepcopy(bank.state_dict())
    bad = [pushed - 3, pushed - 1]
    state["x.rows"][[row % 8 for row in bad], 1] = torch.tensor([torch.nan, torch.inf])
    with pytest.warns(UserWarning, match=r"leaves out rows of its state that are not finite in .*: 2 rows of x\. "):
        restored.load_state_dict(state)
    restored = copy.deepcopy(restored)
    with warnings.catch_warnings(action="error"):  # it is said once
        restored.load_state_dict(state)
    kept = [row for row in range(max(0, pushed - 8), pushed) if row not in bad]
    truth.push(x[kept], x, ids[kept], ids)
    assert contents(restored.x) == contents(truth.x)
    assert contents(restored.y) == contents(bank.y)
    for each in (restored, truth):  # what is oldest goes first
        each.push(x[:4], x[:4], ids[:4])
    assert contents(restored.x) == contents(truth.x)


@pytest.mark.filterwarnings("ignore:the bank leaves out")
def test_one_overflow_spoils_no_later_step() -> None:
    torch.manual_seed(0)
    image, text = nn.Linear(6, 4), nn.Linear(5, 4)
    optimiser = torch.optim.SGD([*image.parameters(), *text.parameters()], 0.1)
    scaler = torch.amp.GradScaler("cpu")
    bank = goal.Bank(64, 4)
    objective = goal.Banked(goal.Objective(check_finite=False), bank)
    losses = []
    for step in range(9):
        a, b, ids = torch.randn(8, 6), torch.randn(8, 5), torch.arange(8) + 8 * step
        a[3] = torch.inf if step == 2 else a[3]
        x, y = normalize(image(a), dim=1), normalize(text(b), dim=1)
        optimiser.zero_grad()
        loss = objective(x, y, ids)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        bank.push(x, y, ids)
        losses.append(loss.isfinite().item())
    assert losses == [step != 2 for step in range(9)]
    assert (bank.x.pushed, bank.y.pushed) == (71, 72)


@pytest.mark.parametrize("side", ["x", "y"])
def test_errors_name_whose_row_it_is(side: str) -> None:
    x, ids = embeddings(6).float(), torch.arange(6)
    bank, spoiled = goal.Bank(8, 4), goal.Bank(8, 4)
    bank.push(x, x, ids)
    spoiled.push(x, x, ids)
    getattr(spoiled, side).rows[2, 1] = torch.inf
    with pytest.raises(
        ValueError, match=rf"^the bank's {side} has a non-finite value \(inf\) in row 2 \(1 such rows of 6\)"
    ):
        goal.Banked(goal.Objective(), spoiled)(x, x, ids)
    bad = {"x": x, "y": x, side: x.clone()}
    bad[side][4, 0] = torch.nan
    for objective in (goal.Banked(goal.Objective(), bank), Augmented(goal.Objective(similarity="cosine"))):
        with pytest.raises(ValueError, match=rf"^{side} has a non-finite value \(nan\) in row 4 \(1 such rows of 6\)"):
            objective(**bad, ids=ids)
        with pytest.raises(ValueError, match=r"^weight must be .*, got -1\.0 at position 2\."):
            objective(x, x, ids, weight=[1, 1, -1, 1, 1, 1])


# ── the objective with a bank ───────────────────────────────────────────────────────────────────────────

TERMS: list[tuple[str, dict[str, float], str]] = [
    ("con", {"margin": 0.4}, "con"),
    ("cir", {}, "sig-ms"),
    ("nca", {"tau": 4.0}, "lin-ms"),
]


def truth(
    x: Tensor, y: Tensor, ids: list[int], y_ids: list[int], bank: goal.Bank, case: dict[str, Any]
) -> tuple[Any, ...]:
    """(value, ∂l/∂x, ∂l/∂y): anchors are the first K rows of both, candidates all of the other side and of its bank."""
    X, Y = x.numpy(), y.numpy()
    k = min(len(X), len(Y))
    all_x, all_y = (torch.cat([a, b.double()]).numpy() for a, b in ((x, bank.x.held.rows), (y, bank.y.held.rows)))
    forth, value = one_way(X[:k], Y[:k], all_y, ids[:k], y_ids + bank.y.held.ids.tolist(), case)
    back, more = one_way(Y[:k], X[:k], all_x, y_ids[:k], ids + bank.x.held.ids.tolist(), case)
    gx, gy = back[:, : len(X)].T @ Y[:k], forth[:, : len(Y)].T @ X[:k]
    gx[:k] += forth @ all_y
    gy[:k] += back @ all_x
    scale = {"mean": sum(case["weight"]), "sum": 1.0}[case["reduction"]]
    return (value + more) / scale, torch.from_numpy(gx) / scale, torch.from_numpy(gy) / scale


@pytest.mark.parametrize(("n", "m"), [(8, 8), (8, 11), (10, 8)])
@pytest.mark.parametrize("held", [0, 3, 30])
@pytest.mark.parametrize("mining", ["hardest", "semi-hard", "all", "selective"])
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_dense_truth_with_constant_candidates(
    n: int, m: int, held: int, mining: str, terms: Any, reduction: str
) -> None:
    T, T_params, P = terms
    x, y = embeddings(n, seed=1), embeddings(m, seed=2)
    ids = [0, 0, 1, 1, 6, 6, 2, 5, 20, 21][:n]
    y_ids = [0, 0, 1, 1, 6, 6, 2, 5, 30, 0, 3][:m]
    bank = goal.Bank(20, 4, torch.float64)
    if held:
        past = torch.arange(held) % 9  # of items in the batch, too
        bank.push(embeddings(held, seed=3), embeddings(held, seed=4), past, past + 1)
    weight = [1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 3.0, 1.0]
    case = {"T": T, "T_params": T_params, "P": P, "mining": mining, "reduction": reduction, "weight": weight}
    objective = goal.Banked(goal.Objective(goal.T[T](**T_params), P, mining=mining, reduction=reduction), bank)
    expected, *gradients = truth(x, y, ids, y_ids, bank, case)
    x.requires_grad_(), y.requires_grad_()
    value = objective(x, y, torch.tensor(ids), torch.tensor(y_ids), torch.tensor(weight, dtype=torch.float64))
    found = torch.autograd.grad(value, (x, y))
    assert value.item() == pytest.approx(expected, rel=1e-12)
    for one, other in zip(found, gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_empty_bank_changes_nothing() -> None:
    x, y, ids = embeddings(9, seed=1).requires_grad_(), embeddings(9, seed=2).requires_grad_(), torch.arange(9) // 2
    for objective in (goal.Objective(), goal.Objective(mining="all", similarity="order")):
        plain = torch.autograd.grad(objective(x, y, ids), (x, y))
        found = torch.autograd.grad(goal.Banked(objective, goal.Bank(5, 4))(x, y, ids), (x, y))
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_a_harder_row_of_the_bank_is_the_negative_of_its_own_direction_alone() -> None:
    x, y, ids = embeddings(6, seed=1).requires_grad_(), embeddings(6, seed=2), torch.arange(6)
    bank = goal.Bank(10, 4, torch.float64)
    bank.push(y.flip(0), embeddings(1, seed=5), torch.arange(6) + 10, torch.tensor([20]))
    objective = goal.Banked(goal.Objective("con", "con"), bank)
    objective(x, y, ids).backward()
    forth, back = objective.stats.index
    assert back.tolist() == [11, 10, 9, 8, 7, 6], "x's bank holds a copy of each y, s = 1"
    assert (objective.stats.s_neg[1] - 1).abs().max() < 1e-12
    assert forth.max() <= 6, "y's bank holds one row"
    assert bank.x.rows.grad is None
    assert bank.y.rows.grad is None


def test_an_item_that_comes_again_does_not_meet_its_past() -> None:
    x, ids = embeddings(6), torch.arange(6)
    bank = goal.Bank(6, 4, torch.float64)
    bank.push(x, x, ids)
    objective = goal.Banked(goal.Objective(), bank)
    objective(x, x, ids)
    assert (objective.stats.s_neg < 0.999).all()
    for call in (objective, bank.push):
        with pytest.raises(TypeError, match="ids must be integers, one for each row of x, got None"):
            call(x, x, None)


def test_a_bank_in_another_dtype_and_a_cached_step() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(5, 4).double()
    bank = goal.Bank(30, 4, torch.float16)
    bank.push(embeddings(12, seed=1), embeddings(12, seed=2), torch.arange(12))
    objective = goal.Banked(goal.Objective(similarity="cosine"), bank)
    inputs = torch.randn(20, 5).double(), torch.randn(20, 5).double()
    ids = torch.arange(20) + 5
    whole = copy.deepcopy(encoder)
    objective(whole(inputs[0]), whole(inputs[1]), ids).backward()
    loss, stats = goal.cached_step(encoder, encoder, inputs, objective, chunk=6, ids=ids)
    torch.testing.assert_close(encoder.weight.grad, whole.weight.grad, rtol=1e-12, atol=1e-15)
    assert loss.dtype == torch.float64
    assert (stats.index >= 20).any()
    assert len(bank) == 12, "a call pushes nothing"


def test_what_is_refused() -> None:
    x, ids = embeddings(3), torch.arange(3)
    for size, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="size must be a whole number >= 1"):
            goal.Bank(size, 4)  # type: ignore[arg-type]
    for dtype in (torch.int8, torch.float8_e4m3fn, "float32"):
        with pytest.raises(TypeError, match=r"dtype must be a floating-point .* torch\.bfloat16"):
            goal.Bank(4, 4, dtype)  # type: ignore[arg-type]
    bank = goal.Bank(4, 5)
    with pytest.raises(ValueError, match="x and y must have the bank's 5 columns, got 4"):
        bank.push(x, x, ids)
    with pytest.raises(ValueError, match=r"x and y are on cpu and the bank is on meta: bank.to\('cpu'\)"):
        goal.Bank(4, 4).to("meta").push(x, x, ids)
    with pytest.raises(TypeError, match=r"objective must be a goal.Objective, got SigLIP"):
        goal.Banked(goal.SigLIP(), bank)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"bank must be a goal.Bank, got Tensor"):
        goal.Banked(goal.Objective(), x)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="there was none"):
        _ = goal.Banked(goal.Objective(), bank).stats
