"""The public edge: every argument is checked before any work, and an error says what came and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def embeddings(x: object, y: object) -> tuple[Tensor, Tensor]:
    """x (N, D) and y (M, D) as tensors that belong together."""
    x, y = matrix("x", x, "(N, D)"), matrix("y", y, "(M, D)")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same D, got x {tuple(x.shape)} and y {tuple(y.shape)}.")
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got x on {x.device} and y on {y.device}.")
    return x, y


def similarity_matrix(s: object) -> Tensor:
    """S (N, M)."""
    return matrix("S", s, "(N, M)")


def matrix(name: str, value: object, shape: str) -> Tensor:
    """A floating-point matrix under its argument's name."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(value).__name__}.")
    if value.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known}, got {value.dtype}.")
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")
    if 0 in value.shape:
        raise ValueError(f"{name} must have at least one row and one column, got shape {tuple(value.shape)}.")
    return value


def identities(ids: object, y_ids: object, n: int, m: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """ids (N,) and y_ids (M,) as int64 tensors, or both None."""
    if ids is None:
        if y_ids is not None:
            raise ValueError("y_ids is given without ids: give both, or neither.")
        return None, None
    if y_ids is None and n != m:
        raise ValueError(f"ids with N ≠ M need y_ids as well: x has {n} rows and y has {m}.")
    rows = identity("ids", ids, n, "x", device)
    return rows, rows if y_ids is None else identity("y_ids", y_ids, m, "y", device)


def identity(name: str, value: object, length: int, side: str, device: torch.device) -> Tensor:
    """One integer for each row, int64."""
    try:
        ids = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers, one for each row of {side}: {error}") from None
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got dtype {ids.dtype}.")
    if tuple(ids.shape) != (length,):
        raise ValueError(f"{name} must have shape ({length},), one for each row of {side}, got {tuple(ids.shape)}.")
    return ids.long()


def anchor_weight(weight: object, k: int, device: torch.device, check: bool) -> Tensor | None:
    """weight (K,) or (2, K) >= 0, or None."""
    if weight is None:
        return None
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("weight requires grad, but a gradient-space objective has no gradient for it: detach it.")
    try:
        w = torch.as_tensor(weight, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"weight must be numbers, one for each pair: {error}") from None
    if w.dtype.is_complex or w.dtype == torch.bool:
        raise TypeError(f"weight must be real numbers, got {w.dtype}.")
    if tuple(w.shape) not in ((k,), (2, k)):
        raise ValueError(
            f"weight must have shape ({k},), one for each pair, or (2, {k}), a row for each direction, "
            f"got {tuple(w.shape)}."
        )
    w = w if w.is_floating_point() else w.float()
    if check and not bool(((w >= 0) & (w < torch.inf)).all()):
        bad = (~((w >= 0) & (w < torch.inf))).nonzero()[0].tolist()
        at = ", ".join(map(str, bad))
        raise ValueError(f"weight must be finite and >= 0, got {w[tuple(bad)].item()} at position {at}.")
    return w


def whole_number(name: str, value: object, least: int = 1) -> int:
    """An int from `least` on; NumPy's integers too."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number >= {least}, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value}.")
    return int(value)


def finite(**tensors: Tensor) -> None:
    """Raise for NaN or inf, naming the tensor and its first bad row; one reduction per tensor while all is well."""
    for name, tensor in tensors.items():
        if math.isfinite(tensor.detach().sum(dtype=_accumulator(tensor)).item()):
            continue
        bad = (~tensor.detach().isfinite().all(1)).nonzero()
        if len(bad):  # a sum may overflow where every entry is finite
            row = int(bad[0])
            value = tensor[row][~tensor[row].isfinite()][0].item()
            raise ValueError(
                f"{name} has a non-finite value ({value}) in row {row} ({len(bad)} such rows of {len(tensor)}). "
                "Look for a division by zero or an overflow before the objective; check_finite=False lets it pass "
                "into the gradient."
            )


def _accumulator(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32
