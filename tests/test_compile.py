"""torch.compile(fullgraph=True) keeps the objective whole, and its operators keep the rules of torch.library."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import normalize

import goal
from goal.engine.backend import Backend
from goal.engine.operators import Work, pack
from goal.engine.settings import settings
from goal.engine.types import Block, Dense, Masks, Pairs
from goal.mining import RULES


def inputs(n: int = 24, m: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 8, generator=generator), torch.randn(m, 8, generator=generator)
    return normalize(x).requires_grad_(), normalize(y).requires_grad_()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


PRODUCTS = [("con", "con"), ("cir", "sig-ms"), ("nca", "lin-ms")]
SIMILARITIES = ["dot", "cosine", "order"]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("mining", list(RULES))
def test_one_graph_equals_eager(mining: str, number: int) -> None:
    """Each product with each rule and with each similarity, each rule with each similarity."""
    (T, P), similarity = PRODUCTS[number], SIMILARITIES[(number + list(RULES).index(mining)) % 3]
    objective = goal.Objective(T, P, mining=mining, similarity=similarity)
    ids = torch.arange(24) // 2
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    found = []
    for call in (objective, compiled):
        x, y = inputs()
        value = call(x, y, ids)
        value.backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0
        found.append((value.detach(), x.grad, y.grad, objective.stats.s_neg, objective.stats.T))
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


def test_the_default_backend() -> None:
    x, y = inputs()
    compiled = torch.compile(lambda x, y: goal.apply(x, y), fullgraph=True)
    compiled(x, y).backward()
    a, b = inputs()
    goal.apply(a, b).backward()
    torch.testing.assert_close(x.grad, a.grad, rtol=1e-5, atol=1e-7)


def test_a_changing_number_recompiles_once() -> None:
    counter = CompileCounter()

    def step(x: Tensor, y: Tensor, tau: float) -> Tensor:
        return goal.apply(x, y, T=goal.T.cir(tau=tau), P=goal.P.sig_ms(beta=tau))

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x, y = inputs()
    for tau in (4.0, 5.0, 6.0, 7.0, 8.0):
        torch.testing.assert_close(compiled(x, y, tau), step(x, y, tau))
    assert counter.frame_count == 2  # the first value, then any value


@pytest.mark.parametrize("P", ["con", "lin-ms", "sig-ms"])
@pytest.mark.parametrize("mining", ["semi-hard", "all"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck(P: str, mining: str, with_ids: bool) -> None:
    x, y = (side.detach() for side in inputs(9, 12))
    chosen = settings("nca", P, mining, "dot", "mean", "auto")
    ids = (torch.arange(9) // 2, torch.arange(12) // 2) if with_ids else (None, None)
    block = Block(x, y, Masks(9, 12, (9, 12), ids=ids[0], y_ids=ids[1]))
    pairs = Pairs((x * y[:9]).sum(1), torch.empty(0, dtype=torch.float64))
    relative = {name: torch.full((2, 9), 0.3) for name in chosen.product.statistics}
    dense = Dense(chosen.product, *pairs[:2], torch.full((2, 9), 0.1), relative, every=True)
    work = Work(Backend("torch", "fast", chosen.similarity), block, pairs, chosen.request, needs=(True, False))
    operators = torch.ops.goal
    torch.library.opcheck(operators.pair, pack(work._replace(pairs=None, request=None)))
    torch.library.opcheck(operators.mine, pack(work))
    for operator in (operators.dense_value, operators.dense_block):
        torch.library.opcheck(operator, pack(work._replace(pairs=None, request=None, dense=dense)))
