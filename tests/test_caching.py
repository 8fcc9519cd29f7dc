"""The cached step against the step of the whole batch: every gradient, state and refusal of it."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import goal

pytestmark = pytest.mark.usefixtures("one_thread")

N, D = 37, 6


class Tower(nn.Module):
    """A small encoder of unit rows."""

    def __init__(self, width: int, *, dropout: float = 0.0, norm: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 11), nn.Tanh(), norm(), nn.Dropout(dropout), nn.Linear(11, D))

    def forward(self, values: Tensor) -> Tensor:
        return normalize(self.body(values), dim=1)


def towers(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tower, Tower]:
    torch.manual_seed(3)
    return Tower(8, **options).to(dtype), Tower(5, **options).to(dtype)


def batch(n: int = N, m: int = N, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, width, generator=generator, dtype=dtype) for size, width in ((n, 8), (m, 5)))  # type: ignore[return-value]


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


def whole(x: nn.Module, y: nn.Module, inputs: Any, objective: Any, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The step that has the memory: one forward, one backward."""
    both = [copy.deepcopy(each) for each in (x, y)]
    objective = copy.deepcopy(objective)
    loss = objective(both[0](inputs[0]), both[1](inputs[1]), **arguments)
    loss.backward()
    own = [objective] if isinstance(objective, nn.Module) else []
    return loss.detach(), gradients(*both, *own)


def in_chunks(encoder: Callable[..., Tensor], inputs: Tensor, chunk: int) -> Tensor:
    """What the encoder makes chunk by chunk, with graph."""
    return torch.cat([encoder(part) for part in inputs.tensor_split(-(-len(inputs) // chunk))])


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1e-3, other.abs().max().item())


def error(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest error, in units of the largest entry of each gradient."""
    gaps = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, true, strict=True)]
    return max(gap.item() for gap in gaps)


OBJECTIVES = {
    **{name: functools.partial(goal.recipe, name) for name in goal.recipes()},
    "semi-hard": lambda: goal.Objective("nca", "lin-ms", mining="semi-hard", similarity="cosine", reduction="sum"),
    "selective": lambda: goal.Objective("cir", "sig-ms", mining=goal.mining.selective(0.3)),
    "all": lambda: goal.Objective("con", "sig", mining="all"),
}


# ── the gradient of the whole batch ─────────────────────────────────────────────────────────────────────


BY_IDS = ("supcon", "soft-targets")


@pytest.mark.parametrize(
    ("name", "ids"), [(name, ids) for name in OBJECTIVES for ids in (False, True) if ids or name not in BY_IDS]
)
def test_the_step_is_that_of_the_whole_batch(name: str, ids: bool) -> None:
    x, y = towers()
    objective = OBJECTIVES[name]().double()
    arguments = {"ids": torch.arange(N) // 3} if ids else {}
    loss, expected = whole(x, y, batch(), objective, **arguments)
    found, stats = goal.cached_step(x, y, batch(), objective, chunk=7, **arguments)
    close(gradients(x, y, objective), expected)
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    assert not found.requires_grad
    assert (stats is None) == (name == "siglip")
    assert stats is None or stats.s_pos.shape == ((2, N) if name in BY_IDS else (N,))


@pytest.mark.parametrize("chunk", [1, 2, 36, 37, 1000])
def test_the_chunk_changes_nothing(chunk: int) -> None:
    x, y = towers()
    objective = goal.Objective()
    _, expected = whole(x, y, batch(), objective)
    goal.cached_step(x, y, batch(), objective, chunk=chunk)
    close(gradients(x, y), expected)


@pytest.mark.parametrize(("n", "m"), [(37, 20), (20, 37), (1, 5)])
def test_sides_of_different_lengths(n: int, m: int) -> None:
    x, y = towers()
    arguments = {"ids": torch.arange(n), "y_ids": torch.arange(m), "weight": torch.arange(min(n, m)) + 1.0}
    _, expected = whole(x, y, batch(n, m), goal.Objective(mining="all"), **arguments)
    goal.cached_step(x, y, batch(n, m), goal.Objective(mining="all"), chunk=8, **arguments)
    close(gradients(x, y), expected)


def test_float32_is_as_exact_as_the_whole_batch_in_float32() -> None:
    errors, yardsticks = [], []
    for seed in range(4):
        inputs = batch(dtype=torch.float32, seed=seed)
        x, y = towers(torch.float32)
        objective = goal.Objective("nca", "sig")  # smooth but for ties, which random rows do not have
        _, true = whole(copy.deepcopy(x).double(), copy.deepcopy(y).double(), [s.double() for s in inputs], objective)
        _, plain = whole(x, y, inputs, objective)
        goal.cached_step(x, y, inputs, objective, chunk=5)
        errors.append(error(gradients(x, y), true))
        yardsticks.append(error(plain, true))
    assert max(yardsticks) < 1e-5
    assert max(errors) <= 2 * max(yardsticks) + 2 * torch.finfo(torch.float32).eps


def test_a_loop_of_ones_own_is_the_same() -> None:
    x, y = towers()
    inputs = batch()
    _, expected = whole(x, y, inputs, lambda a, b: goal.apply(a, b) + 0.1 * (a.sum(0) ** 2).sum())
    with goal.Cache(chunk=10) as cache:
        a, b = cache.encode(x, inputs[0]), cache.encode(y, inputs[1])
        goal.apply(a, b).backward()  # two losses, two backwards: they add up
        (0.1 * (a.sum(0) ** 2).sum()).backward()
        assert gradients(x, y) == []
    close(gradients(x, y), expected)


def test_gradients_accumulate() -> None:
    x, y = towers()
    objective = goal.Objective()
    steps = [whole(x, y, batch(seed=seed), objective)[1] for seed in (0, 1)]
    for seed in (0, 1):
        goal.cached_step(x, y, batch(seed=seed), objective, chunk=9)
    close(gradients(x, y), [a + b for a, b in zip(*steps, strict=True)])


def test_tuples_and_dicts_are_split_too() -> None:
    x, y = towers()
    inputs = batch()
    scale = torch.rand(N, 1, dtype=torch.float64)
    _, expected = whole(x, y, (inputs[0] * scale, inputs[1] * scale), goal.Objective())

    def scaled(values: Tensor, by: Tensor) -> Tensor:
        return x(values * by)

    def named(*, by: Tensor, values: Tensor) -> Tensor:
        return y(values * by)

    goal.cached_step(scaled, named, ((inputs[0], scale), {"values": inputs[1], "by": scale}), goal.Objective(), chunk=8)
    close(gradients(x, y), expected)


def test_inputs_that_are_leaves_get_their_gradient() -> None:
    x, y = towers()
    leaf = batch()[0].requires_grad_()
    goal.apply(x(leaf), y(batch()[1])).backward()
    expected, leaf.grad = leaf.grad, None
    goal.cached_step(x, y, (leaf, batch()[1]), goal.Objective(), chunk=8)
    assert leaf.grad is not None
    close([leaf.grad], [expected])


def test_one_encoder_for_both_sides() -> None:
    x, _ = towers()
    inputs = batch()[0], batch(seed=1)[0]
    goal.apply(x(inputs[0]), x(inputs[1])).backward()
    expected = gradients(x)
    x.zero_grad()
    goal.cached_step(x, x, inputs, goal.Objective(), chunk=8)
    close(gradients(x), expected)


def test_a_frozen_side_is_encoded_once() -> None:
    x, y = towers()
    y.requires_grad_(False)
    calls: list[bool] = []
    y.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    _, expected = whole(x, y, batch(), goal.Objective())
    calls.clear()
    goal.cached_step(x, y, batch(), goal.Objective(), chunk=8)
    close(gradients(x, y), expected)
    assert calls.count(True) == 1, "the first chunk of the second turn tells that nothing is to be trained"


def test_a_chunk_without_graph_stops_no_other() -> None:
    x, y = towers()
    inputs = batch()
    seen: list[int] = []

    def at_times_frozen(values: Tensor) -> Tensor:
        seen.append(1)
        return x(values).detach() if len(seen) % 5 == 1 else x(values)  # the first of five chunks

    goal.cached_step(at_times_frozen, y, inputs, goal.Objective(), chunk=8)
    found = gradients(x)
    x.zero_grad()
    rows = torch.cat([x(inputs[0][:8]).detach(), x(inputs[0][8:])])
    goal.apply(rows, y(inputs[1]).detach()).backward()
    close(found, gradients(x))


def test_no_graph_is_larger_than_a_chunk() -> None:
    x, y = towers()
    held: list[int] = []

    def packed(tensor: Tensor) -> Tensor:
        held.append(len(tensor))
        return tensor

    calls: list[int] = []
    for tower in (x, y):
        tower.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    with goal.Cache(chunk=4) as cache:
        a, b = cache.encode(x, batch()[0]), cache.encode(y, batch()[1])
        goal.apply(a, b).backward()
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
            cache.backward()
    assert max(calls) == 4
    assert held
    assert max(held) <= 11, "the widest weight; no whole batch"


# ── both turns agree ────────────────────────────────────────────────────────────────────────────────────


def test_dropout_is_the_same_in_both_turns() -> None:
    x, y = towers(dropout=0.4)
    inputs = batch()
    both = copy.deepcopy(x), copy.deepcopy(y)

    def objective(a: Tensor, b: Tensor) -> Tensor:
        return goal.apply(a, b, weight=torch.rand(N))  # draws numbers, too

    torch.manual_seed(11)
    rows = [in_chunks(encoder, side, 8) for encoder, side in zip(both, inputs, strict=True)]
    objective(*rows).backward()
    after = torch.get_rng_state()
    torch.manual_seed(11)
    goal.cached_step(x, y, inputs, objective, chunk=8)
    close(gradients(x, y), gradients(*both))
    assert torch.equal(torch.get_rng_state(), after), "as one turn and the objective leave it"


def test_randomness_that_is_not_put_back_raises() -> None:
    x, y = towers()
    rng = np.random.default_rng(0)

    def noisy(values: Tensor) -> Tensor:
        return x(values + torch.from_numpy(rng.normal(size=values.shape)))

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"noisy gave other embeddings the second time .* not torch's own"):
        goal.cached_step(noisy, y, batch(), goal.Objective(), chunk=8)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_turn_of_nan_raises() -> None:
    x, y = towers()
    inputs, turns = batch(), iter([1.0] * 2 + [torch.nan] * 99)

    def broken(values: Tensor) -> Tensor:
        return x(values) * next(turns)

    with pytest.raises(RuntimeError, match="broken gave other embeddings"):
        goal.cached_step(broken, y, inputs, goal.Objective(), chunk=-(-len(inputs[0]) // 2))


def test_inputs_that_change_inside_the_block_raise() -> None:
    x, y = towers()
    inputs = batch()
    cache = goal.Cache(chunk=8)
    goal.apply(cache.encode(x, inputs[0]), cache.encode(y, inputs[1])).backward()
    inputs[0].mul_(2)
    with pytest.raises(RuntimeError, match="Tower gave other embeddings"):
        cache.backward()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("as_function", [False, True])
def test_running_statistics_are_updated_once(momentum: float | None, as_function: bool) -> None:
    x, y = towers(norm=lambda: nn.BatchNorm1d(11, momentum=momentum))
    inputs = batch()
    both = copy.deepcopy(x), copy.deepcopy(y)
    rows = [in_chunks(encoder, side, 8) for encoder, side in zip(both, inputs, strict=True)]
    goal.apply(*rows).backward()
    encode_x: Any = (lambda values: x(values)) if as_function else x
    goal.cached_step(encode_x, y, inputs, goal.Objective(), chunk=8)
    close(gradients(x, y), gradients(*both))
    for one, other in zip((x, y), both, strict=True):
        for found, expected in zip(one.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class Counting(nn.Module):
    """Its output depends on how often it has been called in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(D, dtype=torch.float64))

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return normalize(values[:, :D] * self.weight + self.calls, dim=1)


def test_state_that_the_output_depends_on() -> None:
    counting = Counting()
    inputs = batch()[0], batch(seed=1)[0]
    expected = copy.deepcopy(counting)
    goal.apply(in_chunks(expected, inputs[0], 8), in_chunks(expected, inputs[1], 8)).backward()
    goal.cached_step(counting, counting, inputs, goal.Objective(), chunk=8)
    assert counting.calls == expected.calls == 10
    close(gradients(counting), gradients(expected))
    counting.zero_grad()
    with goal.Cache(chunk=8) as cache:  # the second side has no part in the loss
        goal.apply(cache.encode(counting, inputs[0]), batch(seed=2)[0][:, :D]).backward()
        cache.encode(counting, inputs[1])
    assert counting.calls == 20


# ── autocast, scaling ───────────────────────────────────────────────────────────────────────────────────


def test_autocast_holds_in_both_turns() -> None:
    x, y = towers(torch.float32)
    inputs = batch(dtype=torch.float32)
    both = copy.deepcopy(x), copy.deepcopy(y)
    with torch.autocast("cpu", torch.bfloat16):
        rows = [in_chunks(encoder, side, 8) for encoder, side in zip(both, inputs, strict=True)]
        loss = goal.apply(*rows)
    loss.backward()
    dtypes = []
    x.body[0].register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = goal.cached_step(x, y, inputs, goal.Objective(), chunk=8)
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 10
    assert found == loss
    close(gradients(x, y), gradients(*both), tolerance=0.02)
    plain = towers(torch.float32)
    _, exact = whole(*plain, inputs, goal.Objective())
    assert error(gradients(x, y), [g.double() for g in exact]) > 1e-4, "it was bfloat16 that agreed"


def test_autocast_in_a_loop_of_ones_own() -> None:
    x, y = towers(torch.float32)
    inputs = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        goal.cached_step(x, y, inputs, goal.Objective(), chunk=8)
    expected = gradients(x, y)
    x.zero_grad(), y.zero_grad()
    with goal.Cache(chunk=8) as cache:
        with torch.autocast("cpu", torch.bfloat16):
            loss = goal.apply(cache.encode(x, inputs[0]), cache.encode(y, inputs[1]))
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(x, y), expected, strict=True))


def test_the_scaler_scales_once() -> None:
    x, y = towers()
    _, expected = whole(x, y, batch(), goal.Objective())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, _ = goal.cached_step(x, y, batch(), goal.Objective(), chunk=8, scaler=scaler)
    close(gradients(x, y), [1024 * g for g in expected])
    assert loss.item() == pytest.approx(goal.apply(x(batch()[0]), y(batch()[1])).item())
    optimizer = torch.optim.SGD([*x.parameters(), *y.parameters()], lr=0.5)
    before = [p.detach().clone() for p in (*x.parameters(), *y.parameters())]
    scaler.step(optimizer)
    moved = [(old - p.detach()) / 0.5 for old, p in zip(before, (*x.parameters(), *y.parameters()), strict=True)]
    close(moved, expected, tolerance=1e-10)


# ── DistributedDataParallel ─────────────────────────────────────────────────────────────────────────────


class Both(nn.Module):
    """Two towers in one module, of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = towers()

    def forward(self, values: Tensor, side: str) -> Tensor:
        found: Tensor = getattr(self, side)(values)
        return found


def replica(rank: int, folder: str) -> None:
    """One of two ranks."""
    with ranks.joined(rank, 2, folder, seconds=120):  # ranks that reduce another number of times wait for each other
        compared(rank)
    Path(folder, f"done-{rank}").touch()


def compared(rank: int) -> None:
    """What each of the ranks does: its own rows, of another number than the other's."""
    inputs = [batch(n, n, seed=n) for n in (21, 9)]
    truths = [whole(*towers(), each, goal.Objective())[1] for each in inputs]
    expected = [(a + b) / 2 for a, b in zip(*truths, strict=True)]
    reductions: list[int] = []

    def counted(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reductions.append(1)
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / 2)

    x, y = (DistributedDataParallel(tower) for tower in towers())
    both = DistributedDataParallel(Both())
    for module in (x, y, both):
        module.register_comm_hook(None, counted)
    sides = [functools.partial(both, side=side) for side in ("image", "text")]
    for encode_x, encode_y, modules in ((x, y, (x, y)), (*sides, (both,))):
        for turn in (1, 2):
            reductions.clear()
            goal.cached_step(encode_x, encode_y, inputs[rank], goal.Objective(), chunk=8)
            close(gradients(*modules), [turn * g for g in expected])  # they add up
            assert len(reductions) == len(modules), f"{len(reductions)} reductions"
    both.zero_grad()
    reductions.clear()
    with both.no_sync():  # the loop's own accumulation
        goal.cached_step(*sides, inputs[rank], goal.Objective(), chunk=8)
    close(gradients(both), truths[rank])
    assert not reductions


def test_replicas_reduce_once(tmp_path: Path) -> None:
    run_ranks(replica, 2, str(tmp_path))
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_has_rows(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk must be a whole number >= 1, got {chunk}"):
        goal.Cache(chunk)


@pytest.mark.parametrize("chunk", [True, 2.0, "8"])
def test_a_chunk_is_a_number_of_rows(chunk: Any) -> None:
    with pytest.raises(TypeError, match="chunk must be a whole number >= 1"):
        goal.Cache(chunk)


def test_inputs_that_are_refused() -> None:
    x, _ = towers()
    rows = batch()[0]
    encode = goal.Cache(4).encode
    with pytest.raises(TypeError, match="inputs must be a tensor, or a tuple or a dict of tensors, got ndarray"):
        encode(x, rows.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'mask' must be a tensor with rows, got NoneType"):
        encode(x, {"values": rows, "mask": None})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"one number of rows, at least 1, got \{0: 37, 1: 36\}"):
        encode(x, (rows, rows[1:]))
    for empty in (rows[:0], (), {}):
        with pytest.raises(ValueError, match="at least 1"):
            encode(x, empty)
    with pytest.raises(ValueError, match="0 has a graph behind it: detach it"):
        encode(x, rows.clone().requires_grad_() * 2)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda rows: rows[:-1], "a float64 tensor of shape \\(3, 8\\)"),
        (lambda rows: (rows, rows), "tuple"),
        (lambda rows: rows.sum(), "shape \\(\\)"),
        (lambda rows: rows.long(), "a int64 tensor"),
    ],
)
def test_outputs_that_are_refused(output: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"must return a floating-point tensor with one row for each of the 4 .*{got}"):
        goal.Cache(4).encode(output, batch()[0])


def test_chunks_that_are_not_alike() -> None:
    widths = iter(range(1, 99))
    with pytest.raises(ValueError, match="must return rows alike from every chunk"):
        goal.Cache(4).encode(lambda rows: rows[:, : next(widths)], batch()[0])


def test_a_batch_is_two_sides_and_a_loss_is_a_scalar() -> None:
    x, y = towers()
    for wrong in (batch()[0], (*batch(), *batch()), {"x": batch()[0]}):
        with pytest.raises(TypeError, match=r"batch must be \(x inputs, y inputs\)"):
            goal.cached_step(x, y, wrong, goal.Objective(), chunk=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"objective must return a 0-d tensor, got a float64 tensor of shape \(37,\)"):
        goal.cached_step(x, y, batch(), lambda a, b: (a * b).sum(1), chunk=4)


def test_a_block_without_backward_raises() -> None:
    x, y = towers()
    with pytest.raises(RuntimeError, match=r"no embedding has a gradient. Call backward\(\)"), goal.Cache(4) as cache:
        goal.apply(cache.encode(x, batch()[0]), cache.encode(y, batch()[1]))


def test_an_error_inside_is_not_covered_and_leaves_nothing() -> None:
    x, _ = towers()
    cache = goal.Cache(4)

    def failing() -> None:
        with cache:
            cache.encode(x, batch()[0]).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert gradients(x) == []
    with cache:
        pass
    assert gradients(x) == []


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_compiled_encoders() -> None:
    x, y = towers()
    _, expected = whole(x, y, batch(), goal.Objective())
    encode_x, encode_y = (torch.compile(tower, backend="eager", dynamic=True) for tower in (x, y))
    goal.cached_step(lambda values: encode_x(values), encode_y, batch(), goal.Objective(), chunk=12)
    close(gradients(x, y), expected)


# ── remainders ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rows", "chunk", "sizes"),
    [
        (65, 32, [22, 22, 21]),
        (64, 32, [32, 32]),
        (33, 32, [17, 16]),
        (7, 3, [3, 2, 2]),
        (5, 9, [5]),
        (3, 1, [1, 1, 1]),
        (1, 4, [1]),
        (3, 2, [2, 1]),
    ],
)
def test_chunks_are_even(rows: int, chunk: int, sizes: list[int]) -> None:
    seen: list[int] = []

    def encode(values: Tensor) -> Tensor:
        seen.append(len(values))
        return values * torch.ones(1, requires_grad=True)

    inputs = torch.randn(rows, 4)
    with goal.Cache(chunk) as cache:
        found = cache.encode(encode, inputs)
        found.sum().backward()
    assert seen == 2 * sizes
    assert torch.equal(found, inputs)


@pytest.mark.parametrize(("rows", "chunk"), [(5, 2), (3, 1)])
def test_a_chunk_of_one_row_that_an_encoder_refuses_is_named(rows: int, chunk: int) -> None:
    encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    said = (
        rf"chunk={chunk} leaves a chunk of one row of the {rows}, which the encoder Sequential refuses: .*more than 1"
    )
    with pytest.raises(ValueError, match=said):
        goal.Cache(chunk).encode(encoder, torch.randn(rows, 4))
    with pytest.raises(ValueError, match=r"^Expected more than 1 value"):
        goal.Cache(chunk).encode(encoder, torch.randn(1, 4))


@pytest.mark.parametrize("rows", [33, 64, 65, 97])
def test_batch_norm_meets_no_chunk_of_one_row(rows: int) -> None:
    encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    goal.cached_step(encoder, encoder, (torch.randn(rows, 4), torch.randn(rows, 4)), goal.Objective(), chunk=32)
