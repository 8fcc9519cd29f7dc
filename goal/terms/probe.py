"""Checks of a term on similarities in [−1, 1], made when it is registered."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from goal.terms.term import Term


def probe(term: Term, within: tuple[float, float] | None = None) -> None:
    """Run a term on [−1, 1]², with relative similarities 0 and ½, and refuse it if it is no valid weight.

    Args:
        within: the lowest and the highest s⁻, if not [−1, 1]; a negative P then gives no warning.

    Raises:
        ValueError: the term fails there, is not elementwise, is not finite, or is a negative T.
    """
    at = torch.arange(-20, 21, dtype=torch.float64, device="cpu") / 20
    low, high = within or (-1.0, 1.0)
    s_neg = low + (at + 1) / 2 * (high - low)
    tile, few = (at[:, None].expand(41, 41), s_neg.expand(41, 41)), (at[:30], s_neg[:30])
    for r in (0.0, 0.5):
        try:
            matrix, anchors = (
                term(s_pos, s_neg, **dict.fromkeys(term.statistics, torch.full_like(s_pos, r)))
                for s_pos, s_neg in (tile, few)
            )
        except Exception as error:
            raise ValueError(f"{term!r} fails on similarities in [−1, 1]: {type(error).__name__}: {error}") from error
        if term.definition.registry == "T":
            weights = {"T": (matrix, anchors)}
        elif isinstance(matrix, tuple) and len(matrix) == 2:
            weights = {"P⁺": (matrix[0], anchors[0]), "P⁻": (matrix[1], anchors[1])}
        else:
            raise ValueError(f"{term!r} must return two weights, `return p_pos, p_neg`; it returns {_kind(matrix)}.")
        for name, (on_tile, on_anchors) in weights.items():
            _probe_weight(term, name, on_tile, on_anchors, tile, warn=within is None)


def _probe_weight(term: Term, name: str, tile: Any, anchors: Any, at: tuple[Tensor, Tensor], warn: bool) -> None:
    """Check a weight of a term, given on a (41, 41) tile of similarities and on the first 30 of its diagonal."""

    def where(bad: Tensor) -> str:
        i, j = (int(k) for k in bad.nonzero()[0])
        return f"{name} = {weight[i, j]:.4g} at s⁺ = {at[0][i, j]:.4g}, s⁻ = {at[1][i, j]:.4g}"

    for weight_, shape in ((tile, (41, 41)), (anchors, (30,))):
        if not isinstance(weight_, Tensor | int | float):
            raise ValueError(f"{term!r} must return tensors or numbers; {name} is {_kind(weight_)}.")
        if isinstance(weight_, Tensor) and weight_.shape not in (shape, ()):
            raise ValueError(
                f"{term!r} must be elementwise: of similarities of shape {shape}, {name} has {tuple(weight_.shape)}."
            )
    here: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    weight, along = torch.as_tensor(tile, **here).expand(41, 41), torch.as_tensor(anchors, **here).expand(30)
    if not weight.isfinite().all():
        raise ValueError(f"{term!r} must be finite on [−1, 1]²: {where(~weight.isfinite())}.")
    if not torch.allclose(weight.diagonal()[:30], along, rtol=1e-6, atol=1e-9):
        raise ValueError(f"{term!r} must be elementwise: {name} of a pair changes with the other similarities.")
    if (weight < 0).any():
        if name == "T":
            raise ValueError(f"{term!r} must be >= 0: {where(weight < 0)}.")
        if warn:
            pushes = f"{term!r} is negative somewhere, so it pushes the other way: {where(weight < 0)}."
            warnings.warn(pushes, stacklevel=4)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else repr(value)
