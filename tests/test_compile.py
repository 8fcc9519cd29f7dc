"""torch.compile(fullgraph=True) keeps the objective whole, and its operators keep the rules of torch.library."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import normalize

import goal
from goal.engine import path
from goal.engine.operators import How
from goal.engine.settings import settings


def inputs(n: int = 24, m: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 8, generator=generator), torch.randn(m, 8, generator=generator)
    return normalize(x).requires_grad_(), normalize(y).requires_grad_()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("mining", ["hardest", "semi-hard", "all", "selective"])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "order"])
@pytest.mark.parametrize(("T", "P"), [("con", "con"), ("cir", "sig-ms"), ("nca", "lin-ms")])
def test_one_graph_equals_eager(T: str, P: str, mining: str, similarity: str) -> None:
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
    masks = path.masks(x, y, *ids, How("torch", "fast"))
    s_pos = (x * y[:9]).sum(1)
    share = torch.full((2, 9), 0.1)
    numbers = torch.tensor([0.2, 10.0], dtype=torch.float64)
    relative = [torch.full((2, 9), 0.3)] * len(chosen.product.P.statistics)
    terms = (torch.tensor([10.0], dtype=torch.float64), torch.tensor([2.0, 10.0, 0.5, 0.0], dtype=torch.float64))
    terms = terms if P == "sig-ms" else (terms[0], terms[1][:0])
    request = chosen.request
    reduced = request.semi_hard is not None, request.lin, request.beta is not None
    how, pairs, ids = ("torch", "fast"), (s_pos, torch.empty(0, dtype=torch.int32)), (masks.ids, masks.y_ids)
    torch.library.opcheck(torch.ops.goal.pair, (x, y, "dot", 9, *how))
    torch.library.opcheck(torch.ops.goal.mine, (x, y, *pairs, *ids, "dot", numbers, *reduced, *how))
    torch.library.opcheck(torch.ops.goal.dense_value, (x, y, *pairs, share, *ids, "dot", "nca", P, *terms, True, *how))
    names = ",".join(chosen.product.P.statistics)
    flags = (True, False, True)  # need_x, need_y, every
    torch.library.opcheck(
        torch.ops.goal.dense_emit, (x, y, *pairs, share, relative, names, *ids, "dot", "nca", P, *terms, *flags, *how)
    )
