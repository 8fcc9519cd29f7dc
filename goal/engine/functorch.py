"""Calls under the transforms of torch.func and under autocast.

torch.func wraps tensors in levels of its own. A call unwraps its tensors, computes with plain tensors, and attaches its
gradient to the wrapped ones. So torch.func.grad, vjp, jacrev and functional_call work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

_REFUSED = {"Vmap": "vmap", "Jvp": "forward-mode differentiation", "Functionalize": "functionalize"}
_NO_TRANSFORM = (
    "goal emits a gradient in backward, which does not go through {} (torch.func.vmap, jvp, jacfwd, hessian and "
    "functionalize; torch.autograd.forward_ad). torch.func.grad, vjp, jacrev and functional_call work: use those, in a "
    "loop where there are several batches."
)


def plain(*arguments: Any) -> tuple[Any, ...]:
    """The arguments without the wrappers of torch.func.grad and vjp.

    Raises:
        RuntimeError: an argument is batched by vmap, or has a forward-mode tangent.
    """
    if torch.compiler.is_compiling() or not (inside() or forward_ad._current_level >= 0):
        return arguments
    kinds = {level.level(): level.key().name for level in functorch.get_interpreter_stack()} if inside() else {}
    unwrapped = []
    for argument in arguments:
        while isinstance(argument, Tensor) and functorch.is_functorch_wrapped_tensor(argument):
            kind = kinds.get(functorch.maybe_get_level(argument))
            if kind in _REFUSED:
                raise RuntimeError(_NO_TRANSFORM.format(_REFUSED[kind]))
            argument = functorch.get_unwrapped(argument)
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError(_NO_TRANSFORM.format(_REFUSED["Jvp"]))
        unwrapped.append(argument)
    return tuple(unwrapped)


def inside() -> bool:
    """Whether a transform of torch.func is active."""
    return not torch.compiler.is_compiling() and functorch.maybe_current_level() is not None


def outside() -> AbstractContextManager[Any]:
    """A context without the transforms of torch.func, for plain tensors."""
    return temporarily_clear_interpreter_stack() if inside() else nullcontext()


def batched(tensor: Tensor) -> bool:
    """Whether vmap batches the tensor."""
    while functorch.is_functorch_wrapped_tensor(tensor) and not functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def no_autocast(device: str) -> AbstractContextManager[None]:
    """A context without autocast; entered only if autocast is on, as entering costs more than a small product."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
