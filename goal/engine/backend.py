"""The choice between PyTorch and Triton kernels for the quadratic stages, behind a common interface.

    pair            s⁺                                                               O(N·D)
    positives       positives by ids of a block of S, as partials                    O(N·M·D)
    statistics      the miner's reductions of all of S                               O(N·M·D)
    mine            the same for a block of S, as partials that merge
    dense_value     the value of anchors with all their negatives
    dense_block     ∂l/∂x and ∂l/∂y of a block of S, for such anchors
    soft_block      ∂l/∂x and ∂l/∂y of a block of S, for anchors with a softmax over their negatives
    mined_emit      ∂l/∂x and ∂l/∂y of mined entries                                 O(N·D)
    weigh           small mined objectives in a single launch; kernels only

This is the only file that knows both implementations. It imports Triton when a kernel is first used.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goal import terms
from goal.engine import eager
from goal.engine.partials import Partial
from goal.engine.settings import Settings
from goal.engine.statistics import Request, Statistics
from goal.engine.types import Block, Dense, Gradients, Limits, Masks, Mined, Needs, Pairs, Plan, Soft
from goal.positives import Positives
from goal.similarity import Dot
from goal.terms import Parameter, Product, Term

WEIGHED = 256  # pairs up to which kernels weigh in one launch


class Backend(NamedTuple):
    """The implementation that computes, its arithmetic, and the similarity."""

    impl: str  # "torch" or "triton"
    precision: str  # "fast", "tf32" or "exact": the arithmetic of Triton's scans of float32 inputs
    similarity: Dot

    @property
    def kernels(self) -> bool:
        return self.impl == "triton"

    def dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        """The dtype of the stages' rows: the computing dtype; kernels with dot take 16-bit rows as given."""
        as_they_are = self.kernels and self.similarity.name == "dot" and x.dtype == y.dtype
        return x.dtype if as_they_are else computing_dtype(x, y)

    def block(self, x: Tensor, y: Tensor, masks: Masks) -> Block:
        """The embedded rows of a block of S."""
        dtype, embed = self.dtype(x, y), self.similarity.embed
        return Block(embed(x.detach().to(dtype)), embed(y.detach().to(dtype)), masks)

    def plan(self, x: Tensor, y: Tensor, request: Request, dense: bool) -> Plan:
        """How the quadratic stages would compute a batch."""
        if self.kernels:
            plan: Plan = _kernels().plan(x, y, request, dense, self.precision)
            return plan
        return eager.plan(x.shape[0], y.shape[0], computing_dtype(x, y), request, dense)

    def pair(self, x: Tensor, y: Tensor, pairs: int, mined: bool = False) -> Pairs:
        """s⁺ (K,) of the first K = `pairs` rows, and the bounds of the batch if the backend needs them beforehand.

        `mined`: the objective never uses all negatives, so the bounds may be left in parts.
        """
        if self.kernels:
            positives: Pairs = _kernels().pair(x, y, pairs, mined)
            return positives
        s_pos = self.similarity.pairs(x[:pairs], y[:pairs], None, None)
        return Pairs(s_pos, s_pos.new_empty(0, dtype=torch.float64))

    def positives(self, block: Block, rule: Positives) -> tuple[Partial, Partial]:
        """The partials of a block of S over positives by ids in both directions."""
        return eager.positives(self.similarity, block, rule)

    def bounds(self, block: Block, pairs: Pairs, request: Request) -> list[float]:
        """Bounds of some rows of a batch; their maximum over all rows is `Pairs.bounds`."""
        if self.kernels:
            return [float(word) for word in pairs.bounds.tolist()]
        return eager.bounds(self.similarity, block.x, block.y, pairs.s_pos, request)

    def limits(self, block: Block, pairs: Pairs, request: Request) -> Limits:
        """The limits of the batch by which partials of blocks are merged."""
        if self.kernels:
            limits: Limits = _kernels().limits(pairs.bounds, block.x.shape[1])
            return limits
        return eager.limits(self.similarity, block, pairs, request)

    def statistics(self, block: Block, pairs: Pairs, request: Request) -> Statistics:
        """The requested statistics of a whole batch."""
        if self.kernels:
            statistics: Statistics = _kernels().statistics(block, pairs, request, self.precision)
            return statistics
        return eager.statistics(self.similarity, block, pairs, request)

    def mine(self, block: Block, pairs: Pairs, request: Request) -> tuple[Partial, Partial]:
        """The partials of a block of S in both directions."""
        if self.kernels:
            partials: tuple[Partial, Partial] = _kernels().mine(block, pairs, request, self.precision)
            return partials
        return eager.mine(self.similarity, block, pairs, request)

    def dense_value(self, block: Block, dense: Dense) -> Tensor:
        """Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ) over the negatives in a block of S, 0-d."""
        if self.kernels:
            value: Tensor = _kernels().dense_value(block, dense, self.precision)
            return value
        return eager.dense_value(self.similarity, block, dense)

    def dense_block(self, block: Block, dense: Dense, needs: Needs) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gradients of a block's negatives at its rows and columns, and the pull at the pairs (2, K); see `eager`."""
        if self.kernels:
            emitted: tuple[Tensor | None, Tensor | None, Tensor] = _kernels().dense_block(
                block, dense, needs, self.precision
            )
            return emitted
        return eager.dense_block(self.similarity, block, dense, needs)

    def soft_block(self, block: Block, soft: Soft, needs: Needs) -> Gradients:
        """Gradients of the softmaxes over a block of S at its rows and columns; see `eager`."""
        return eager.soft_block(self.similarity, block, soft, needs)

    def mined_emit(self, block: Block, mined: Mined, incoming: Tensor | None, needs: Needs) -> Gradients:
        """Gradients of the mined entries in a block of S at its rows and columns, times the incoming gradient (0-d)."""
        if self.kernels:
            incoming = mined.push.new_ones(()) if incoming is None else incoming
            gradients: Gradients = _kernels().mined_emit(block, mined, incoming, needs)
            return gradients
        return eager.mined_emit(self.similarity, block, mined, incoming, needs)

    def weighs(self, product: Product, pairs: int) -> bool:
        """Whether `weigh` supports a mined objective: a small one whose terms lower, on kernels, outside a graph."""
        if not self.kernels or pairs > WEIGHED or torch.compiler.is_compiling():
            return False
        return cannot_lower(product) is None

    def weigh(self, statistics: Statistics, product: Product, share: Any) -> tuple[Mined, Tensor]:
        """The entries of G and the value of a mined objective in one launch; `share`: (K,) or a number."""
        weighed: tuple[Mined, Tensor] = _kernels().weighed(statistics, product, share)
        return weighed


def computing_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """float64 if either side is float64, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32


def _kernels() -> ModuleType:
    from goal.kernels import launch

    return launch


# ── the choice ──────────────────────────────────────────────────────────────────────────────────────────────────────


def backend(settings: Settings, x: Tensor, y: Tensor) -> tuple[Backend, str]:
    """The backend and why it was chosen. Where kernels cannot run, impl="triton" raises and "auto" takes PyTorch."""
    eager_one = Backend("torch", settings.precision, settings.similarity)
    if settings.impl == "torch":
        return eager_one, "asked for"
    obstacle = _obstacle(settings, x, y)
    if obstacle is None:
        asked = "asked for" if settings.impl == "triton" else f"the inputs are on {x.device.type}"
        return eager_one._replace(impl="triton"), asked
    if settings.impl == "triton":
        raise ValueError(f"impl='triton' cannot be used here: {obstacle}. Use impl='torch' or 'auto'.")
    return eager_one, obstacle


def _obstacle(settings: Settings, x: Tensor, y: Tensor) -> str | None:
    """The reason why kernels cannot run, or None."""
    if settings.similarity.name not in ("dot", "cosine"):
        return f"similarity={settings.similarity.name!r} is no matrix product"
    if torch.float64 in (x.dtype, y.dtype):
        return "float64 is computed by PyTorch"
    interpreted = _interpreted() if settings.impl == "triton" else False
    if x.device.type != "cuda" and not interpreted:
        return f"the inputs are on {x.device.type}, and kernels need a GPU (or TRITON_INTERPRET=1, which is slow)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if settings.mining.softmax is not None:
        return "soft mining has no kernels yet"
    if settings.positives.by_ids:
        return "positives by ids have no kernels yet"
    if settings.mining.dense == "never":
        return None
    return cannot_lower(settings.product)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def cannot_lower(product: Product) -> str | None:
    """Why T × P has no dense kernels, or None. Numbers do not matter; in a graph the answer is a constant."""
    T, P = product.T, product.P
    return _cannot_lower(T.name, _structure(T), P.name, _structure(P))


def _structure(term: Term) -> tuple[Parameter, ...]:
    """A term's parameters, with 0.5 in place of every number."""
    return tuple(value if value is None or isinstance(value, bool) else 0.5 for _, value in term.values)


def _cannot_lower(t: str, t_values: tuple[Parameter, ...], p: str, p_values: tuple[Parameter, ...]) -> str | None:
    def term(definition: terms.Definition, values: tuple[Parameter, ...]) -> Term:
        return Term(definition, tuple(zip(definition.defaults, values, strict=True)))

    return _refusal(Product(term(terms.T[t], t_values), term(terms.P[p], p_values)))


# the effect of torch.compiler.assume_constant_result; calling that here would import Dynamo, and Triton with it
_cannot_lower._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _refusal(product: Product) -> str | None:
    from goal.kernels import lower

    try:
        lower.lower(product)
    except lower.CannotLower as error:
        return str(error)
    return None
