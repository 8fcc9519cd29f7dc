"""At the ends of a dtype's range: a gradient is the right one, or it shows that it is not, as the value does."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracle import oracle, oracle_similarity
from torch import Tensor
from torch.nn.functional import normalize

import goal

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([0, 0, 1, 1, 2, 2, 3])
TERMS = list(itertools.product([("con", {}), ("con", {"margin": 0.2}), ("nca", {}), ("cir", {})], goal.P))
MININGS: list[tuple[str, str, dict[str, Any]]] = [
    ("hardest", "hardest", {}),
    ("semi-hard", "semi_hard", {"margin": 0.2}),
    ("all", "all_negatives", {"average": False}),
    ("selective", "selective", {}),
]
# of float32: squares end at 1.8e19, and begin at 1.1e-19; of float64 at 1.3e154 and 1.5e-154
LENGTHS: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "both beyond": {torch.float32: (1e20, 1e20), torch.float64: (1e160, 1e160)},
    "x beyond": {torch.float32: (1e20, 1.0), torch.float64: (1e160, 1.0)},
    "S² beyond": {torch.float32: (1e12, 1e12), torch.float64: (1e85, 1e85)},
}


def side(seed: int, length: float, dtype: torch.dtype, one_row: bool = False) -> Tensor:
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(7, 5)))
    lengths = torch.ones(7, 1, dtype=torch.float64)
    lengths[2 if one_row else slice(None)] = length
    return (rows * lengths).to(dtype)


def calls(ids: bool = True) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments of the library, and of the oracle."""
    for ((T, params), P), (mining, function, numbers), with_ids in itertools.product(TERMS, MININGS, (False, ids)):
        given = {"ids": IDS} if with_ids else {}
        made = {"T": goal.T[T](**params), "P": P, "mining": getattr(goal.mining, function)(**numbers), **given}
        named = {"T": T, "T_params": params, "P": P, "P_params": {}, "mining": mining, "mining_params": numbers}
        yield made, {**named, **{name: value.numpy() for name, value in given.items()}}


def wrong(call: dict[str, Any], loss: Tensor, leaves: list[Tensor], true: list[np.ndarray], tolerance: float) -> str:
    """What a call got wrong in silence; nothing where it is right or shows that it is not."""
    gradients = [leaf.grad for leaf in leaves]
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    if not finite:
        return ""
    if not loss.isfinite():
        return f"{call}: value {loss.item()} beside a finite gradient"
    for gradient, one in zip(gradients, true, strict=bool(true)):
        if not np.allclose(gradient.double().numpy(), one, rtol=tolerance, atol=tolerance * max(1, np.abs(one).max())):
            return f"{call}: {gradient} is not {one}"
    return ""


def known(of: Any, *inputs: Tensor, **named: Any) -> list[np.ndarray]:
    """The gradients of the oracle; none where they are beyond float64."""
    try:
        with np.errstate(all="ignore"):
            result = of(*(one.double().numpy() for one in inputs), **named)
    except (OverflowError, ValueError):
        return []
    return [result.G] if result.gx is None else [result.gx, result.gy]


def emitted(call: dict[str, Any], x: Tensor, y: Tensor | None, **more: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [one.clone().requires_grad_() for one in (x, y) if one is not None]
    loss = goal.apply_similarity(*leaves, **call) if y is None else goal.apply(*leaves, **call, **more)
    loss.backward()
    return loss.detach(), leaves


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("similarity", ["dot", "cosine", "order", "given"])
def test_right_or_not_finite(similarity: str, lengths: str, dtype: torch.dtype, one_row: bool) -> None:
    if similarity == "order" and one_row:
        pytest.skip("a row of 1e12 beside rows of 1 leaves ties, which is no matter of range")
    x, y = (side(seed, length, dtype, one_row) for seed, length in enumerate(LENGTHS[lengths][dtype]))
    S = x.double() @ y.double().T
    if similarity == "given" and not S.to(dtype).isfinite().all():
        pytest.skip("S itself is not representable, which is an error")
    longest = max(x.abs().max().item(), y.abs().max().item())
    largest = {"order": longest, "cosine": 1.0}.get(similarity, S.abs().max().item())
    found = []
    for call, named in calls():
        if call["P"].endswith("-ms") and largest < torch.finfo(dtype).max ** 0.5:
            continue  # kept within the range by saturation
        if similarity == "given":
            loss, leaves = emitted(call, S.to(dtype), None)
            true = known(oracle_similarity, S.to(dtype), **named)
        else:
            loss, leaves = emitted(call, x, y, similarity=similarity, check_finite=len(found) % 2 == 0)
            true = known(oracle, x, y, similarity=similarity, **named)
        found.append(wrong(call, loss, leaves, true, 1e-3 if dtype == torch.float32 else 1e-9))
    assert [one for one in found if one] == []


@pytest.mark.parametrize("length", [1e-30, 1e-25, 1e-20, 1e-19, 1e15, 1e19, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_embeddings_of_any_length(length: float, dtype: torch.dtype) -> None:
    """Their similarity scales with them, and the gradient of con × con does not change at all."""
    ones = [normalize(side(seed, 1.0, torch.float32)).abs().to(dtype) for seed in (0, 1)]
    power = 2.0 ** round(np.log2(length))
    for mining, ids in itertools.product(["hardest", "all", "selective"], [None, IDS]):
        call = {"T": "con", "P": "con", "mining": mining if mining != "selective" else goal.mining.selective(0.0)}
        small, large = (
            emitted({**call, "ids": ids}, *(by * one for one in ones), similarity="order") for by in (1.0, power)
        )
        assert large[0] == pytest.approx(power * small[0].item(), rel=1e-6)
        for one, other in zip(small[1], large[1], strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("length", [1e-25, 1e25])
def test_the_largest_negative_below_a_positive_of_any_length(length: float) -> None:
    """Semi-hard negatives of order embeddings, whose rounding goes with their length and not with its square."""
    ones = [side(seed, 1.0, torch.float32).abs() for seed in (0, 1)]
    power = 2.0 ** round(np.log2(length))
    found = [
        emitted({"T": "con", "P": "con", "mining": goal.mining.semi_hard(by)}, *(by * one for one in ones),
                similarity="order")
        for by in (1.0, power)
    ]  # fmt: skip
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-7)


def test_cosines_of_rows_whose_length_is_not_representable() -> None:
    x, y = (normalize(side(seed, 1.0, torch.float32)) for seed in (0, 1))
    x = x / x.abs().amax(1, keepdim=True)
    power = 2.0**127
    assert torch.linalg.vector_norm(1.9 * power * x, dim=1).isinf().any()
    gx, gy, stats = goal.gradients(1.9 * power * x, y, similarity="cosine", T="con", P="con")
    true_x, true_y, true = goal.gradients(x, y, similarity="cosine", T="con", P="con")
    torch.testing.assert_close(stats.s_pos, true.s_pos)
    torch.testing.assert_close(gy, true_y)
    torch.testing.assert_close(gx.double() * 1.9 * power, true_x.double(), rtol=1e-3, atol=1e-3)  # subnormal numbers


def test_negatives_below_the_range_are_not_none() -> None:
    """All of an anchor's similarities are −inf, which without a look at the ids is as if it had no negative."""
    x, y = torch.eye(4), torch.eye(4)
    x[0], y[0] = torch.tensor([1e20, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0])
    y[1:, 0] = -1e20
    for ids in (torch.arange(4), torch.tensor([0, 0, 1, 1])):
        gx, _, stats = goal.gradients(x, y, T="con", P="con", ids=ids)
        assert gx[0].isnan().any()
        assert stats.s_neg[0, 0].isnan()
    gx, _, stats = goal.gradients(x, y, T="con", P="con", ids=torch.zeros(4, dtype=torch.int64))
    assert not gx.any(), "no negatives at all, and nothing to show"
