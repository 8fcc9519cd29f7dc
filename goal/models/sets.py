"""Sets of different sizes in a padded tensor: masks of the real entries, and dropping entries in training."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Generator, Tensor

from goal import validation


def features(name: str, value: object, shape: str, width: int) -> Tensor:
    """A floating-point tensor of a shape such as "(N, R, D)", whose last dimension is `width`."""
    dims = shape.count(",") + 1
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(value).__name__}.")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}: call {name}.to_dense().")
    value = validation.check_floating(name, value)  # a DTensor may come too
    if value.dim() != dims or value.shape[-1] != width or value.numel() == 0:
        raise ValueError(f"{name} must have shape {shape}, not empty, D = {width}, got {tuple(value.shape)}.")
    return value


def share(name: str, value: float) -> float:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")
    return float(value)


def mask_of(name: str, lengths: object, values: Tensor) -> Tensor:
    """(N, L) bool: entry l of set n is real where l < lengths[n]; all are where `lengths` is None.

    Raises:
        TypeError: lengths that are no integers.
        ValueError: another shape than (N,), or a length outside 1 … L.

    >>> mask_of("lengths", torch.tensor([1, 3]), torch.zeros(2, 3, 8))
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    n, size = values.shape[:2]
    if lengths is None:
        return torch.ones(n, size, dtype=torch.bool, device=values.device)
    try:
        lengths = torch.as_tensor(lengths, device=values.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers, one for each set: {error}") from None
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {lengths.dtype}.")
    if lengths.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one for each set, got {tuple(lengths.shape)}.")
    lengths = lengths.long()
    bad = (lengths < 1) | (lengths > size)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} must lie in 1 … {size}, got {int(lengths[row])} at position {row}.")
    return torch.arange(size, device=values.device) < lengths[:, None]


def drawn(among: Tensor, rate: float, generator: Generator | None) -> Tensor:
    """(N, L) bool: each True of `among` with probability `rate`.

    One number is drawn for each candidate, in order, so that padding never changes what is drawn.

    Args:
        among: (N, L) bool.
        rate: in [0, 1).
        generator: where numbers come from, on any device; None is torch's own, which `torch.manual_seed` seeds.
    """
    where = among.device if generator is None else generator.device
    numbers = torch.rand(int(among.sum()), generator=generator, device=where, dtype=torch.float32).to(among.device)
    return torch.zeros_like(among).masked_scatter(among, numbers < rate)


def thinned(mask: Tensor, rate: float, generator: Generator | None) -> Tensor:
    """The mask with each entry dropped with probability `rate`; a set that would be left empty stays whole."""
    kept = mask & ~drawn(mask, rate, generator)
    return torch.where(kept.any(1, keepdim=True), kept, mask)


def pack(values: Tensor, mask: Tensor) -> Tensor:
    """The real entries alone, set by set: (N, L, D), (N, L) → (V, D)."""
    return values.flatten(0, 1).index_select(0, _places(mask))


def unpack(rows: Tensor, mask: Tensor) -> Tensor:
    """The way back, zeros elsewhere: (V, D), (N, L) → (N, L, D)."""
    padded = rows.new_zeros(mask.numel(), rows.shape[1]).index_copy(0, _places(mask), rows)
    return padded.view(*mask.shape, rows.shape[1])


def _places(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


def at_least_float32(values: Tensor) -> Tensor:
    """16-bit values as float32: norms, softmaxes and sums are not taken in less."""
    return values if values.dtype == torch.float64 else values.float()


def unit(values: Tensor, dim: int = 1) -> Tensor:
    """v / ‖v‖ along a dimension, float32 or float64; 0 stays 0, and its gradient stays bounded."""
    values = at_least_float32(values)
    norm: Tensor = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / norm.masked_fill(norm == 0, 1)
