"""Gradients of batches whose activations do not fit in memory: encode in chunks, then encode each chunk again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from goal import validation

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]  # split along dimension 0
Encoder = Callable[..., Tensor]  # called with a tensor, with *tensors, or with **tensors


class Step(NamedTuple):
    """Result of `cached_step`; the gradients are in the parameters' `grad`."""

    loss: Tensor  # 0-d, detached, not scaled
    stats: Any  # the objective's `stats`, `goal.Stats` for a `goal.Objective`; None if it has none or cannot have them


def cached_step(
    encode_x: Encoder,
    encode_y: Encoder,
    batch: tuple[Inputs, Inputs],
    objective: Callable[..., Tensor],
    *,
    chunk: int,
    scaler: torch.amp.GradScaler | None = None,
    **arguments: Any,
) -> Step:
    """Forward and backward of a batch of any size, with the activations of a single chunk in memory.

        x = [f(x₁); f(x₂); …], y likewise         in chunks, without graph
        ∂l/∂x, ∂l/∂y                              the objective over the whole batch, once
        ∂l/∂θ = Σ_c (∂f(x_c)/∂θ)ᵀ ∂l/∂x_c         each chunk encoded again, with graph

    The result is the gradient of the full batch, not of smaller batches. `Cache` does the same for loops of your own;
    its docstring covers dropout, BatchNorm, autocast and DistributedDataParallel.

    Args:
        encode_x: called with a chunk of the inputs, returns its (rows, D) embeddings. A module or any function.
        encode_y: the same for the other side; it may be the same encoder.
        batch: (x inputs, y inputs), each a tensor, a tuple of tensors for ``encode(*chunks)`` or a dict for
            ``encode(**chunks)``, all of the same length along dimension 0.
        objective: ``objective(x, y, **arguments)`` → 0-d: a `goal.Objective`, a recipe, any loss; its own parameters
            get their gradient too.
        chunk: maximum number of rows encoded at once, ≥ 1; chunks are of even size, 65 rows by 32 are 22, 22 and 21.
            Memory and time depend on it; the result does not, unless the encoding of a row depends on the rows beside
            it or on random numbers.
        scaler: a `torch.amp.GradScaler`; backward then starts from its ``scale(loss)``.
        **arguments: of the objective: ``ids=``, ``y_ids=``, ``weight=``.

    Returns:
        `Step`, (loss, stats). Gradients have been added to `grad`; no optimiser has stepped. Objectives that use all
        negatives mine once more for their stats; to avoid this, write a loop with `Cache`.

    Raises:
        ValueError, TypeError: a batch, a chunk or an encoder's output that is not as above.
        RuntimeError: as `Cache`.

    Example:
        >>> import goal, torch
        >>> image, text = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> batch = torch.randn(100, 8), torch.randn(100, 6)
        >>> loss, stats = goal.cached_step(image, text, batch, goal.Objective(similarity="cosine"), chunk=16)
        >>> image.weight.grad.shape, stats.s_pos.shape
        (torch.Size([4, 8]), torch.Size([100]))

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{len(batch)} of them" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"batch must be (x inputs, y inputs), got {what}.")
    with Cache(chunk) as cache:
        x, y = cache.encode(encode_x, batch[0]), cache.encode(encode_y, batch[1])
        loss = objective(x, y, **arguments)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise TypeError(f"objective must return a 0-d tensor, got {_described(loss)}.")
        with _autocast(_casts({x.device.type}), on=False):  # backward takes forward's dtypes by itself
            (loss if scaler is None else scaler.scale(loss)).backward()
    return Step(loss.detach(), _stats(objective))


def _stats(objective: object) -> Any:
    try:
        return getattr(objective, "stats", None)
    except RuntimeError:  # with exchange="ring" there are no stats for all negatives; the gradients are complete
        return None


class Cache:
    """Embeddings of a large batch as leaves, whose gradient is passed on to the encoders chunk by chunk.

    Inside ``with``, `encode` returns embeddings, from which any loss may be computed; call its backward in the block.
    When the block ends, every chunk is encoded a second time, with graph, and backward continues from its rows of the
    gradient to the parameters. The activations of one chunk are in memory at a time, besides the embeddings, their
    gradient and the inputs.

    * **Randomness.** The states of torch's generators, of the CPU and of all devices in use, are restored before each
      chunk's second encoding, so dropout is the same in both. After the block they are as after one encoding and the
      loss. Other randomness (`random`, NumPy, a generator of your own) is not restored: an encoder whose second
      encoding differs raises.
    * **Buffers.** Modules in training mode start the second encoding from the buffers before the first, so running
      statistics are updated once for every chunk. BatchNorm normalises each chunk by itself, as in gradient
      accumulation: this is a step of a chunked encoder, not of one that sees the full batch. It cannot take a chunk of
      one row, which only chunk=1, and chunk=2 with an odd number of rows, give: this raises an error.
    * **Autocast** as it is at `encode` holds in both encodings.
    * **DistributedDataParallel** reduces once a step: all chunks but the last of each `encode` run under ``no_sync``,
      and the last chunks share one backward. Replicas are found inside an encoder, and among modules that a function
      calls. Ranks may have different numbers of chunks.
    * **Accumulation.** Gradients are added to `grad`. Clip and step after the block.

    Args:
        chunk: maximum number of rows encoded at once, ≥ 1; N rows are cut into ⌈N / chunk⌉ chunks whose sizes differ
            by at most one.

    Raises:
        ValueError, TypeError: a chunk that is no whole number ≥ 1, or gives a single row to an encoder that refuses it.
        RuntimeError: at the block's end, if no embedding has a gradient (backward was not called inside), or if an
            encoder did not give the same embeddings twice. The gradients must then not be used.

    Example:
        >>> import goal, torch
        >>> image, text = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> with goal.Cache(chunk=16) as cache:
        ...     x = cache.encode(image, torch.randn(100, 8))
        ...     y = cache.encode(text, torch.randn(100, 6))
        ...     goal.apply(x, y, similarity="cosine").backward()
        >>> image.weight.grad.shape
        torch.Size([4, 8])
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = validation.whole_number("chunk", chunk)
        self._encoded: list[_Encoded] = []

    def encode(self, encoder: Encoder, inputs: Inputs) -> Tensor:
        """All embeddings of the inputs, (N, …), as a leaf that collects a gradient.

        Args:
            encoder: returns a floating-point tensor with one row for each row of its chunk.
            inputs: a tensor, a tuple for ``encoder(*chunks)`` or a dict for ``encoder(**chunks)``. Tensors that need a
                gradient must be leaves.
        """
        parts = _parts(inputs)
        length = len(next(iter(parts.values())))
        slices = _even(length, self.chunk)
        devices = _devices(encoder, parts)
        casts = _casts({device.type for device in devices})
        random: RandomState = {}
        leaf: Tensor | None = None
        with torch.no_grad(), _autocast(casts), _modules(encoder) as (buffers, replicas):
            for number, part in enumerate(slices):
                for device, state in _random_state(devices).items():
                    random.setdefault(device, state.new_empty(len(slices), len(state)))[number] = state
                try:
                    found = _encode(encoder, parts, part)
                except ValueError as error:
                    if part.stop - part.start > 1 or length == 1:
                        raise
                    raise ValueError(
                        f"chunk={self.chunk} leaves a chunk of one row of the {length}, which the encoder "
                        f"{_named(encoder)} refuses: {error} Take another chunk."
                    ) from error
                leaf = _filled(leaf, found, part, length, encoder)
        assert leaf is not None
        self._encoded.append(_Encoded(encoder, parts, slices, random, buffers, casts, replicas, leaf.requires_grad_()))
        return leaf

    def backward(self) -> None:
        """Encode every chunk again and continue backward from its rows of the gradient; called at the block's end."""
        encoded, self._encoded = self._encoded, []
        due = [each for each in encoded if each.leaf.grad is not None]
        if encoded and not due:
            raise RuntimeError("Cache: no embedding has a gradient. Call backward() of their loss inside the block.")
        random = _random_state({device for each in due for device in each.random})
        buffers = [(each.buffers, _copied(each.buffers)) for each in due]
        try:
            for each in due:
                _put_back(each.buffers)
                for part in range(len(each.slices) - bool(each.replicas)):  # a replica's last chunk waits
                    with ExitStack() as quiet:
                        for replica in each.replicas:
                            quiet.enter_context(replica.no_sync())
                        if not _backward([(each, part)]) and each.frozen:
                            break
            # reduces the gradients: in one backward, since a replica may serve encoders with other parameters
            _backward([(each, len(each.slices) - 1) for each in due if each.replicas])
        finally:
            _set_random_state(random)
            for _, kept in buffers:
                _put_back(kept)
        for each in due:
            each.check()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.backward()
        self._encoded = []


Buffers = list[tuple[nn.Module, str, Tensor]]  # module, name, a copy of the buffer
RandomState = dict[torch.device, Tensor]  # a state in bytes, or the states before each chunk: (chunks, bytes)
Casts = list[tuple[str, torch.dtype, bool]]  # kind of device, autocast's dtype, whether autocast is on


@dataclass
class _Encoded:
    """A call of `Cache.encode`, with all data for the second encoding."""

    encoder: Encoder
    inputs: Mapping[str | int, Tensor]
    slices: list[slice]  # rows of each chunk
    random: RandomState  # before each chunk; in a single tensor, for the reason given in `_filled`
    buffers: Buffers  # before the first chunk
    casts: Casts
    replicas: list[DistributedDataParallel]
    leaf: Tensor  # (N, …), the embeddings
    gap: Tensor | None = None  # 0-d, the largest difference between the two encodings

    @property
    def frozen(self) -> bool:
        """Whether no parameter of the encoder is trained; a chunk without graph then means that no chunk has one."""
        return isinstance(self.encoder, nn.Module) and not any(p.requires_grad for p in self.encoder.parameters())

    def again(self, part: int) -> tuple[Tensor, Tensor]:
        """A chunk's embeddings, with graph, and their gradient."""
        assert self.leaf.grad is not None
        rows = self.slices[part]
        _set_random_state({device: states[part].clone() for device, states in self.random.items()})  # refuses views
        with torch.enable_grad(), _autocast(self.casts):
            found = _encode(self.encoder, self.inputs, rows)
        gap = (found.detach() - self.leaf.detach()[rows]).abs().amax()
        self.gap = gap if self.gap is None else torch.maximum(self.gap, gap)
        return found, self.leaf.grad[rows]

    def check(self) -> None:
        """Raise if the two encodings differ by more than √eps of the coarsest arithmetic in use."""
        if self.gap is None:
            return
        dtypes = {self.leaf.dtype, *(dtype for _, dtype, on in self.casts if on)}
        dtypes |= {p.dtype for p in self.encoder.parameters()} if isinstance(self.encoder, nn.Module) else set()
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        gap, size = self.gap.item(), torch.linalg.vector_norm(self.leaf.detach(), torch.inf).item()
        if not gap <= math.sqrt(coarsest) * size and (math.isfinite(gap) or math.isfinite(size)):
            raise RuntimeError(
                f"Cache: the encoder {_named(self.encoder)} gave other embeddings the second time (by {gap:.1e}, where "
                f"the largest is {size:.1e}), so the gradients are wrong: it draws random numbers that are not torch's "
                "own, or its inputs or weights changed inside the block."
            )


def _backward(chunks: list[tuple[_Encoded, int]]) -> bool:
    """A single backward through these chunks; returns whether any of them requires grad."""
    pairs = [each.again(part) for each, part in chunks]
    pairs = [(found, gradient) for found, gradient in pairs if found.requires_grad]
    if pairs:
        with _autocast(chunks[0][0].casts, on=False):
            torch.autograd.backward([found for found, _ in pairs], [gradient for _, gradient in pairs])
    return bool(pairs)


# ---- encoding --------------------------------------------------------------------------------------------


def _parts(inputs: object) -> Mapping[str | int, Tensor]:
    """The tensors of the inputs by position or by name; a single tensor has position 0."""
    found: dict[Any, Any]
    if isinstance(inputs, Tensor):
        found = {0: inputs}
    elif isinstance(inputs, Mapping):
        found = dict(inputs)
    elif isinstance(inputs, tuple | list):
        found = dict(enumerate(inputs))
    else:
        raise TypeError(f"inputs must be a tensor, or a tuple or a dict of tensors, got {type(inputs).__name__}.")
    lengths = {}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise TypeError(f"inputs: {name!r} must be a tensor with rows, got {_described(value)}.")
        if value.requires_grad and not value.is_leaf:
            raise ValueError(f"inputs: {name!r} has a graph behind it: detach it, or make it inside the encoder.")
        lengths[name] = len(value)
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"inputs must have one number of rows, at least 1, got {lengths or 'no tensors'}.")
    return found


def _even(length: int, most: int) -> list[slice]:
    """The slices of the fewest chunks of at most `most` rows, whose sizes differ by at most one."""
    chunks = -(-length // most)
    size, longer = divmod(length, chunks)
    ends = [number * size + min(number, longer) for number in range(chunks + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def _encode(encoder: Encoder, inputs: Mapping[str | int, Tensor], rows: slice) -> Tensor:
    """The embeddings of some rows of the inputs."""
    parts = {name: value[rows] for name, value in inputs.items()}
    places = [value for name, value in parts.items() if isinstance(name, int)]
    found: object = encoder(*places, **{name: value for name, value in parts.items() if isinstance(name, str)})
    count = rows.stop - rows.start
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() == 0 or len(found) != count:
        raise TypeError(
            f"the encoder {_named(encoder)} must return a floating-point tensor with one row for each of the {count} "
            f"rows of its chunk, got {_described(found)}."
        )
    return found


def _filled(whole: Tensor | None, found: Tensor, rows: slice, length: int, encoder: Encoder) -> Tensor:
    """The embeddings of all rows with those of a chunk set.

    Stored separately, small tensors would lie where large ones have been freed, and prevent the memory's reuse.
    """
    if whole is None:
        whole = found.new_empty(length, *found.shape[1:])
    if (found.shape[1:], found.dtype, found.device) != (whole.shape[1:], whole.dtype, whole.device):
        raise ValueError(
            f"the encoder {_named(encoder)} must return rows alike from every chunk, got {_described(found)} after "
            f"rows of shape {tuple(whole.shape[1:])} in {str(whole.dtype).removeprefix('torch.')}."
        )
    whole[rows] = found
    return whole


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"


def _named(encoder: Encoder) -> str:
    return getattr(encoder, "__qualname__", type(encoder).__name__)


# ---- the state of an encoding ----------------------------------------------------------------------------


@contextmanager
def _modules(encoder: Encoder) -> Iterator[tuple[Buffers, list[DistributedDataParallel]]]:
    """Copies of the buffers that a forward in training mode may change, and the replicas.

    They are those of all modules within the encoder; for a function, of the modules that it calls inside the block.
    """
    buffers: Buffers = []
    replicas: list[DistributedDataParallel] = []
    seen: set[nn.Module] = set()

    def note(module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or module in seen:
            return
        for each in module.modules():
            if each in seen:
                continue
            seen.add(each)
            if isinstance(each, DistributedDataParallel):
                replicas.append(each)
            if each.training:
                buffers.extend((each, name, value.clone()) for name, value in each.named_buffers(recurse=False))

    if isinstance(encoder, nn.Module):
        note(encoder, None)
        yield buffers, replicas
        return
    handle = register_module_forward_pre_hook(note)
    try:
        yield buffers, replicas
    finally:
        handle.remove()


def _copied(buffers: Buffers) -> Buffers:
    """The same buffers with their current values."""
    return [(module, name, module.get_buffer(name).clone()) for module, name, _ in buffers]


def _put_back(buffers: Buffers) -> None:
    with torch.no_grad():
        for module, name, value in buffers:
            module.get_buffer(name).copy_(value)


def _devices(encoder: Encoder, inputs: Mapping[str | int, Tensor]) -> set[torch.device]:
    """Devices on which random numbers may be drawn: the CPU, those of inputs and weights, and a GPU in use."""
    found = {torch.device("cpu"), *(value.device for value in inputs.values())}
    if isinstance(encoder, nn.Module):
        found |= {value.device for value in encoder.parameters()}
    if torch.cuda.is_initialized():
        found.add(torch.device("cuda", torch.cuda.current_device()))
    return found


def _random_state(devices: Iterable[torch.device]) -> RandomState:
    return {
        device: torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        for device in devices
    }


def _set_random_state(states: RandomState) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def _casts(kinds: Iterable[str]) -> Casts:
    """The current state of autocast."""
    return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in sorted(kinds)]


@contextmanager
def _autocast(casts: Casts, on: bool = True) -> Iterator[None]:
    """A context with the given state of autocast, or with autocast off."""
    with ExitStack() as stack:
        for kind, dtype, enabled in casts:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled and on))
        yield
