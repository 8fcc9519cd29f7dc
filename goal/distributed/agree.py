"""The first exchange of every call over ranks: do all ranks pass the same arguments, and how many rows has each?"""

from __future__ import annotations

import hashlib
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from goal.distributed.exchange import Wire, pack, unpack


class Line(NamedTuple):
    """A rank's message about its call."""

    rows: int
    arguments: dict[str, object]  # must be the same on all ranks
    error: Exception | None = None  # raised by the checks of the rank's arguments
    needs: tuple[bool, bool] = (False, False)  # whether the rank needs a gradient of its x, of its y
    bounds: tuple[float, ...] = (0.0, 0.0, 0.0)  # numbers whose maximum over all ranks is needed


class Agreed(NamedTuple):
    """Summary of all ranks' lines."""

    counts: list[int]  # rows of each rank
    needs: tuple[bool, bool]  # whether any rank needs a gradient of its x, of its y
    bounds: Tensor  # (3,) float64, maxima over the ranks


def agree(wire: Wire, line: Line, device: torch.device) -> Agreed:
    """Exchange one line per rank. If arguments differ, or a rank refuses its own, all ranks raise.

    The digest of the arguments travels with every call, in 8 bytes, because a rank cannot know whether another rank's
    arguments have changed. The texts are exchanged only if digests differ.

    Raises:
        ValueError: on every rank, naming the ranks that differ and what differs, or that refuse and why.
        TypeError: on a rank that refuses its own arguments with a TypeError.
    """
    error = line.error
    text = "\n".join(f"{name}={' '.join(str(value).split())}" for name, value in line.arguments.items())
    message = text if error is None else f"{type(error).__name__}: {error}"
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
    spoken = list(message.encode())
    needs = line.needs[0] + 2 * line.needs[1]
    numbers = torch.tensor([[line.rows, digest, needs, error is not None, len(spoken)]], device=device)
    bounds = torch.tensor([line.bounds], dtype=torch.float64, device=device)
    lines, bounds = unpack(wire.gather(pack(numbers, bounds), [1] * wire.size).wait(), (numbers, bounds))
    counts, digests, wanted, refused, lengths = lines.T.tolist()
    if any(refused) or len(set(digests)) > 1:
        said = torch.tensor(spoken, dtype=torch.uint8, device=device)[:, None]
        heard = bytes(wire.gather(said, lengths).wait().flatten().tolist())
        ends = list(itertools.accumulate(lengths, initial=0))
        texts = [heard[a:b].decode() for a, b in itertools.pairwise(ends)]
        raise _difference(texts, [bool(one) for one in refused], error) from error
    of_x, of_y = (any(each & bit for each in wanted) for bit in (1, 2))
    return Agreed(counts, (of_x, of_y), bounds.amax(0))


def _difference(texts: list[str], refused: list[bool], error: Exception | None) -> Exception:
    """The exception that a rank raises if the ranks do not agree."""
    if any(refused):
        said = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if refused[rank]]
        return (TypeError if isinstance(error, TypeError) else ValueError)("\n".join(said))
    tables = [dict(line.split("=", 1) for line in text.splitlines()) for text in texts]
    said = []
    for name in tables[0]:
        values: dict[str, list[str]] = {}
        for rank, table in enumerate(tables):
            values.setdefault(table.get(name, "unknown"), []).append(str(rank))
        if len(values) > 1:
            each = "; ".join(f"{value} on rank {', '.join(on)}" for value, on in values.items())
            said.append(f"{name} is {each}")
    return ValueError("the ranks of group do not agree: " + ". ".join(said) + ".")
