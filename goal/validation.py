"""Checks of every public argument, before any work; an error says what was given and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C import _functorch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
_LIMIT = 2**63  # identities are sent, stored and written as int64


# ── embeddings ──────────────────────────────────────────────────────────────────────────────────────────────────────


def embeddings(x: object, y: object, meta: bool = False) -> tuple[Tensor, Tensor]:
    """x (N, D) and y (M, D) as tensors that fit each other; `meta`: tensors on the meta device are allowed."""
    x, y = matrix("x", x, "(N, D)", meta), matrix("y", y, "(M, D)", meta)
    check_comparable(x, y)
    return x, y


def check_comparable(x: Tensor, y: Tensor) -> None:
    """Check that a similarity can compare the rows: the same D, the same device."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same D, got x {tuple(x.shape)} and y {tuple(y.shape)}.")
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got x on {x.device} and y on {y.device}.")


def similarity_matrix(s: object) -> Tensor:
    """S (N, M)."""
    return matrix("S", s, "(N, M)")


def matrix(name: str, value: object, shape: str, meta: bool = False) -> Tensor:
    """A dense floating-point matrix with at least one row and one column; errors use the argument's name."""
    if not isinstance(value, Tensor):
        hint = f": torch.as_tensor({name}) makes one" if type(value) in (np.ndarray, list, tuple) else ""
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(value).__name__}{hint}.")
    value = check_floating(name, dense(name, value, meta))
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")
    if 0 in value.shape:
        raise ValueError(f"{name} must have at least one row and one column, got shape {tuple(value.shape)}.")
    return value


def check_floating(name: str, tensor: Tensor) -> Tensor:
    """The tensor, after checking that its dtype is a floating-point dtype that PyTorch computes in."""
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known}, got {tensor.dtype}.")
    return tensor


def dense(name: str, tensor: Tensor, meta: bool = False) -> Tensor:
    """The tensor, after checking that it is strided and has all its entries; a plain subclass becomes a Tensor."""
    came = None
    if tensor.is_nested:
        came = "a nested tensor", "to_padded_tensor(0)"
    elif isinstance(tensor, torch.masked.MaskedTensor):
        came = "a masked tensor", "to_tensor(0)"
    elif hasattr(tensor, "full_tensor"):
        came = "a DTensor", "full_tensor()"
    elif tensor.is_quantized:
        came = f"a quantised one of {tensor.dtype}", "dequantize()"
    elif tensor.layout != torch.strided:
        came = f"layout {tensor.layout}", "to_dense()"
    if came is not None:
        what, call = came
        raise TypeError(f"{name} must be a dense (strided) tensor, got {what}: call {name}.{call}.")
    if tensor.is_meta and not meta:
        raise ValueError(f"{name} is on the meta device, which holds no values: make it on another, such as cpu.")
    plain = type(tensor) in (Tensor, nn.Parameter) or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return tensor if plain or torch.compiler.is_compiling() else tensor.as_subclass(Tensor)


# ── identities ──────────────────────────────────────────────────────────────────────────────────────────────────────


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


def check_paired(ids: Tensor | None, y_ids: Tensor | None) -> None:
    """Raise if the ids contradict that row k of x and row k of y are a pair."""
    if ids is None or y_ids is None or ids is y_ids:
        return
    k = min(len(ids), len(y_ids))
    apart = (ids[:k] != y_ids[:k]).nonzero()[:, 0].tolist()
    if apart:
        rows = ", ".join(map(str, apart[:5])) + (", …" if len(apart) > 5 else "")
        at = apart[0]
        raise ValueError(
            f"ids and y_ids must be equal for the rows of a pair, got ids {ids[at].item()} and y_ids "
            f"{y_ids[at].item()} in row {at} ({len(apart)} such rows of {k}: {rows}). For positives by equal ids, "
            "wherever they stand, use positives='hardest' or 'soft'."
        )


def check_positives(ids: Tensor | None, y_ids: Tensor | None, one_set: bool, positives: object) -> None:
    """Raise if positives by ids have no ids, or if no anchor has a positive."""
    if ids is None or y_ids is None:
        raise ValueError(f"{positives!r} takes rows with equal ids as positives: give ids (and y_ids), got None.")
    some = len(ids.unique()) < len(ids) if one_set else bool(torch.isin(ids, y_ids).any())
    if not some:
        where = "no two rows of x have equal ids" if one_set else "no id of x is an id of y"
        raise ValueError(f"ids leave every anchor without a positive: {where}.")


def identity(name: str, value: object, length: int, side: str, device: torch.device) -> Tensor:
    """One integer for each row, (length,) int64 on `device`; equal integers stay equal, whatever their form.

    Args:
        value: integers of any width, with or without sign: a tensor, an array of either byte order, a list, a column
            of a table, whose index is ignored, or Python's integers in an array of objects.

    Raises:
        TypeError: anything else: numbers with a fraction could have been rounded to the same number already.
        ValueError: another length, or a number that int64 does not hold, with its row.
    """
    ids = dense(name, value if isinstance(value, Tensor) else _integers(name, value, side))
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers, got dtype {ids.dtype}.")
    if tuple(ids.shape) != (length,):
        raise ValueError(f"{name} must have shape ({length},), one for each row of {side}, got {tuple(ids.shape)}.")
    if ids.dtype == torch.uint64:
        ids = ids.view(torch.int64)  # numbers beyond int64 become negative
        if bool((ids < 0).any()):
            row = int((ids < 0).nonzero()[0])
            raise _too_large(name, int(ids[row]) + 2 * _LIMIT, row)
    return ids.detach().to(device, torch.int64)


def _integers(name: str, value: object, side: str) -> Tensor:
    """A CPU tensor from integers that are not in a tensor."""
    what = f"{name} must be integers, one for each row of {side}"
    if hasattr(value, "__array__"):  # an array, or a column of a table
        array = as_array(name, value)
        if array.dtype.kind in "iu":
            if array.dtype.kind == "u" and (array >= _LIMIT).any():
                row = int((array >= _LIMIT).argmax())
                raise _too_large(name, int(array.flat[row]), row)
            return torch.from_numpy(array.astype(np.int64))
        if array.dtype.kind != "O":
            raise TypeError(f"{what}, got dtype {array.dtype}{_ADVICE.get(array.dtype.kind, '')}.")
        value = array.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise TypeError(f"{what}, got {type(value).__name__}.")
    entries = [_integer(what, entry, row) for row, entry in enumerate(value)]
    for row, entry in enumerate(entries):
        if not -_LIMIT <= entry < _LIMIT:
            raise _too_large(name, entry, row)
    return torch.tensor(entries, dtype=torch.int64, device="cpu")


def _integer(what: str, entry: object, row: int) -> int:
    """An integer from an entry of a list."""
    if type(entry) is int:
        return entry
    if isinstance(entry, Tensor | np.ndarray) and entry.ndim == 0:
        entry = entry.item()
    if isinstance(entry, bool) or not isinstance(entry, numbers.Integral):
        kind = "U" if isinstance(entry, str) else "f" if entry is None or isinstance(entry, float | np.floating) else ""
        raise TypeError(f"{what}, got {entry!r} in row {row}{_ADVICE.get(kind, '')}.")
    return int(entry)


def _too_large(name: str, value: int, row: int) -> ValueError:
    return ValueError(f"{name} must be within int64, −2⁶³ to 2⁶³ − 1, got {value} in row {row}{_ADVICE['U']}.")


_RENUMBER = ": numpy.unique(..., return_inverse=True)[1], of both sides together, makes numbers of them"
_ADVICE = {  # by NumPy's letter for a kind of dtype
    **dict.fromkeys("UST", _RENUMBER),
    "f": ": a column with a missing value becomes float, so leave out such rows first",
}


def as_array(name: str, value: object, first: int = 0) -> NDArray[Any]:
    """An array, or a column as NumPy converts it, in either byte order, with no entry masked.

    Args:
        first: the number of the first row, for errors.
    """
    if np.ma.is_masked(value):
        masked = np.atleast_1d(np.ma.getmaskarray(np.ma.asarray(value)))
        row = first + int(masked.reshape(len(masked), -1).any(1).argmax())
        raise ValueError(f"{name} must not be masked, but row {row} is: leave such rows out, or fill them.")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # uneven rows, tensors with gradients in a list
        raise TypeError(f"{name} must be a tensor or an array, got {type(value).__name__}: {error}") from None


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def anchor_weight(weight: object, k: int, device: torch.device, check: bool) -> Tensor | None:
    """weight (K,) or (2, K) >= 0, or None."""
    if weight is None:
        return None
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("weight requires grad, but a gradient-space objective has no gradient for it: detach it.")
    w = dense("weight", weight if isinstance(weight, Tensor) else _reals(weight))
    if w.dtype.is_complex or w.dtype == torch.bool:
        raise TypeError(f"weight must be real numbers, got {w.dtype}.")
    if tuple(w.shape) not in ((k,), (2, k)):
        raise ValueError(
            f"weight must have shape ({k},), one for each pair, or (2, {k}), a row for each direction, "
            f"got {tuple(w.shape)}."
        )
    w = w.to(device, w.dtype if w.dtype in DTYPES and device.type != "mps" else torch.float32)  # mps has no float64
    if check and not bool(((w >= 0) & (w < torch.inf)).all()):
        bad = (~((w >= 0) & (w < torch.inf))).nonzero()[0].tolist()
        at = ", ".join(map(str, bad))
        raise ValueError(f"weight must be finite and >= 0, got {w[tuple(bad)].item()} at position {at}.")
    return w


def _reals(value: object) -> Tensor:
    """A CPU tensor from numbers that are not in a tensor, in float64 unless they have a narrower float dtype."""
    what = "weight must be numbers, one for each pair"
    if hasattr(value, "__array__"):
        array = as_array("weight", value)
        if array.dtype.kind not in "iufO":
            raise TypeError(f"{what}, got dtype {array.dtype}.")
        if array.dtype.kind != "O":
            narrow = array.dtype.kind == "f" and array.itemsize < 8
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("=") if narrow else np.float64))
        value = array.tolist()
    try:
        w = torch.as_tensor(value, device="cpu")
        return torch.as_tensor(value, dtype=torch.float64, device="cpu") if w.is_floating_point() else w
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what}: {error}") from None


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


_POSITIVE = frozenset({"tau", "alpha", "beta"})
_NOT_NEGATIVE = frozenset({"margin", "eps"})


def check_number(owner: str, name: str, value: object) -> float:
    """A finite Python float from a number of any kind; errors use the argument's name."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{owner}: parameter {name!r} requires grad, but a parameter of a gradient-space objective has no "
            "gradient (there is no loss to differentiate). Pass a number; use a schedule to change it."
        )
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = _item(value)
    if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
        raise TypeError(f"{owner}: parameter {name!r} must be a number, got {type(value).__name__} ({value!r}).")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{owner}: parameter {name!r} must be within a float's range, got {value}.") from None
    if not -math.inf < value < math.inf:  # torch.compile traces this with a symbolic number
        raise ValueError(f"{owner}: parameter {name!r} must be finite, got {value}.")
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{owner}: parameter {name!r} must be > 0, got {value}.")
    if name in _NOT_NEGATIVE and value < 0:
        raise ValueError(f"{owner}: parameter {name!r} must be >= 0, got {value}.")
    return value


def check_bool(what: str, value: object) -> bool:
    """A Python bool from a boolean of any kind; errors use the argument's name."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{what} must be True or False, got {value!r}.")
    return bool(value)


def whole_number(name: str, value: object, least: int = 1, most: int = _LIMIT - 1) -> int:
    """A Python int from `least` to `most`, from an integer of any kind."""
    given = _item(value) if getattr(value, "ndim", 0) == 0 else value
    if isinstance(given, bool) or not isinstance(given, numbers.Integral):
        raise TypeError(f"{name} must be a whole number >= {least}, got {value!r}.")
    number = int(given)
    if not least <= number <= most:
        above = "" if number < least else " and < 2⁶³" if most == _LIMIT - 1 else f" and <= {most}"
        came = number if number.bit_length() < 1000 else f"one of {number.bit_length()} bits"
        raise ValueError(f"{name} must be a whole number >= {least}{above}, got {came}.")
    return number


def real_number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    finite: bool = True,
) -> float:
    """A Python float within [low, high], or (low, high] with `above`, from a number of any kind."""
    given = _item(value)
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} ({value!r}).")
    try:
        real = float(given)
    except OverflowError:
        raise ValueError(f"{name} must be within a float's range.") from None
    if math.isnan(real) or (finite and math.isinf(real)):
        raise ValueError(f"{name} must be finite, got {real}.")
    if not low <= real <= high or (above and real == low):
        most = f" and <= {high:g}" if high < math.inf else ""
        raise ValueError(f"{name} must be {'>' if above else '>='} {low:g}{most}, got {real:g}.")
    return real


def _item(value: Any) -> object:
    """The number in an array or tensor of one element; other values, and tensors that require grad, unchanged."""
    if isinstance(value, Tensor) and (value.is_meta or value.requires_grad):
        return value
    return value.item() if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1 else value


def device_of_values() -> torch.device:
    """The device on which a module's values are created: torch's default device, but the CPU if that is meta."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def checks_finite(check_finite: bool | None, x: Tensor) -> bool:
    """Whether entries are checked, from the argument `check_finite=`: by default on the CPU, outside `torch.compile`
    and outside vmap.
    """
    if check_finite is None:
        return x.device.type == "cpu" and not torch.compiler.is_compiling() and not _functorch.is_batchedtensor(x)
    return bool(check_finite)


def finite(**tensors: Tensor) -> None:
    """Raise for NaN or inf, naming the tensor and its first bad row; if all is finite, one reduction per tensor."""
    for name, tensor in tensors.items():
        if math.isfinite(tensor.detach().sum(dtype=_accumulator(tensor)).item()):
            continue
        bad = (~tensor.detach().isfinite().all(1)).nonzero()
        if len(bad):  # the sum may overflow though every entry is finite
            row = int(bad[0])
            value = tensor[row][~tensor[row].isfinite()][0].item()
            raise ValueError(
                f"{name} has a non-finite value ({value}) in row {row} ({len(bad)} such rows of {len(tensor)}). "
                "Look for a division by zero or an overflow before the objective; check_finite=False lets it pass "
                "into the gradient."
            )


def _accumulator(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32
