"""Around `backward`: what torch.func, forward mode, checkpoints and hooks make of an emitted gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd import functional as ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import goal

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (normalize(torch.randn(6, 4, generator=GENERATOR), dim=1) for _ in range(2))
IDS = torch.arange(6) // 2

CALLS: dict[str, dict[str, Any]] = {
    "default": {},
    "ids": {"ids": IDS, "weight": torch.arange(6.0)},
    "semi-hard": {"mining": "semi-hard", "T": "con", "P": "con"},
    "all": {"mining": "all", "P": "lin-ms"},
    "selective": {"mining": goal.mining.selective(eps=0.3)},
    "cosine": {"similarity": "cosine"},
    "order": {"similarity": "order"},
}


def emitted(side: Tensor, **call: Any) -> Tensor:
    """The gradient at a side, without autograd."""
    return goal.gradients(side, Y, **call)[0]


def of(call: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: goal.apply(x, Y, **call)


def leaf() -> Tensor:
    return X.clone().requires_grad_()


def within(how: Any, call: dict[str, Any]) -> Tensor:
    """The gradient of a loss made within a context manager."""
    x = leaf()
    with how:
        loss = goal.apply(x, Y, **call)
    return torch.autograd.grad(loss, x)[0]


def checkpointed(call: dict[str, Any], reentrant: bool) -> Tensor:
    x = leaf()
    checkpoint(of(call), x, use_reentrant=reentrant).backward()
    assert x.grad is not None
    return x.grad


def batched(call: dict[str, Any]) -> Tensor:
    """Two incoming gradients at once."""
    x = leaf()
    (found,) = torch.autograd.grad(goal.apply(x, Y, **call), x, torch.tensor([1.0, 3.0]), is_grads_batched=True)
    torch.testing.assert_close(found[1], 3 * found[0])
    return found[0]


WAYS: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "grad": lambda call: grad(of(call))(X),
    "grad and value": lambda call: grad_and_value(of(call))(X)[0],
    "vjp": lambda call: vjp(of(call), X)[1](torch.tensor(2.0))[0] / 2,
    "jacrev": lambda call: jacrev(of(call))(X),
    "a chain": lambda call: grad(lambda x: 3 * goal.apply(x @ torch.eye(4), Y, **call))(X) / 3,
    "both sides": lambda call: grad(lambda x, y: goal.apply(x, y, **call), argnums=(0, 1))(X, Y)[0],
    "an outer grad over others": lambda call: grad(lambda w: (grad(of(call))(X) * w).sum())(torch.ones(6, 4)),
    "jacobian": lambda call: ad.jacobian(of(call), X),
    "jacobian, vectorised": lambda call: ad.jacobian(of(call), X, vectorize=True),
    "several incoming": batched,
    "checkpoint": lambda call: checkpointed(call, False),
    "checkpoint, reentrant": lambda call: checkpointed(call, True),
    "saved on the CPU": lambda call: within(save_on_cpu(), call),
    "hooks": lambda call: within(saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()), call),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_the_gradient_comes_through(call: str, way: str) -> None:
    torch.testing.assert_close(WAYS[way](CALLS[call]), emitted(X, **CALLS[call]), rtol=1e-5, atol=1e-7)


def test_anomaly_mode_finds_nothing() -> None:
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        assert torch.equal(within(torch.enable_grad(), {}), emitted(X))


def test_a_matrix_of_similarities() -> None:
    S = X @ Y.T
    torch.testing.assert_close(grad(lambda s: goal.apply_similarity(s))(S) @ Y, emitted(X))


def test_a_model_as_a_function_of_its_parameters() -> None:
    model, objective = torch.nn.Linear(4, 4), goal.Objective()
    objective(model(X), Y).backward()
    of_weights = grad(lambda weights: objective(functional_call(model, weights, (X,)), Y))
    found = of_weights({name: value.detach() for name, value in model.named_parameters()})
    torch.testing.assert_close(found["weight"], model.weight.grad)
    assert objective.stats.s_pos.shape == (6,), "plain tensors, which outlive the transform"


@pytest.mark.parametrize("recipe", ["siglip"])
def test_ordinary_losses_go_through_everything(recipe: str) -> None:
    loss = goal.recipe(recipe).double()
    x, y = X[:3].double(), Y[:3].double()
    torch.testing.assert_close(
        hessian(lambda x: loss(x, y))(x), ad.hessian(lambda x: loss(x, y), x), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(vmap(loss)(torch.stack((x, y)), torch.stack((y, y)))[0], loss(x, y))


def dual(call: Callable[..., Any]) -> Any:
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(X, Y), Y)


SEVERAL = torch.stack((X, Y))
TRANSFORMS = r"does not go through .*torch\.func\.vmap.*torch\.func\.grad, vjp, jacrev and functional_call work"
SECOND = "no second derivative"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "vmap": (lambda: vmap(goal.apply)(SEVERAL, SEVERAL), TRANSFORMS),
    "vmap over one side": (lambda: vmap(lambda x: goal.apply(x, Y))(SEVERAL), TRANSFORMS),
    "vmap over weights": (lambda: vmap(lambda w: goal.apply(X, Y, weight=w))(torch.ones(2, 6)), TRANSFORMS),
    "vmap of grad": (lambda: vmap(grad(goal.apply))(SEVERAL, SEVERAL), TRANSFORMS),
    "vmap over matrices": (lambda: vmap(goal.apply_similarity)(torch.ones(2, 3, 3)), TRANSFORMS),
    "vmap of gradients": (lambda: vmap(lambda x: goal.gradients(x, Y)[0])(SEVERAL), TRANSFORMS),
    "jvp": (lambda: jvp(of({}), (X,), (Y,)), TRANSFORMS),
    "jacfwd": (lambda: jacfwd(of({}))(X), TRANSFORMS),
    "hessian": (lambda: hessian(of({}))(X), TRANSFORMS),
    "linearize": (lambda: torch.func.linearize(of({}), X), TRANSFORMS),
    "functionalize": (lambda: grad(torch.func.functionalize(of({})))(X), TRANSFORMS),
    "dual": (lambda: dual(goal.apply), TRANSFORMS),
    "dual of gradients": (lambda: dual(goal.gradients), TRANSFORMS),
    "dual of an objective": (lambda: dual(goal.Objective()), TRANSFORMS),
    "forward-mode jacobian": (lambda: ad.jacobian(of({}), X, vectorize=True, strategy="forward-mode"), TRANSFORMS),
    "grad of grad": (lambda: grad(lambda x: grad(of({}))(x).square().sum())(X), SECOND),
    "jacrev of jacrev": (lambda: jacrev(jacrev(of({})))(X), SECOND),
    "grad of vjp": (lambda: grad(lambda v: vjp(of({}), X)[1](v)[0].sum())(torch.tensor(1.0)), SECOND),
    "hessian of autograd": (lambda: ad.hessian(of({}), X), SECOND),
    "hvp": (lambda: ad.hvp(of({}), X, Y), SECOND),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_through_says_so(what: str) -> None:
    call, said = REFUSED[what]
    with pytest.raises(RuntimeError, match=said):
        call()
