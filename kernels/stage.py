"""The quadratic stages on an accelerator: pair, statistics, dense_value, dense_emit, mined_emit.

Launching only; the work is in mine.py, emit.py and dense.py. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from goal.engine.statistics import Request, Statistics
from goal.engine.types import Gradients, Masks, Mined, Needs, Pairs, Plan
from goal.kernels import dense, emit, mine, weigh
from goal.kernels.lower import lower, numbers
from goal.terms import STATISTICS, Product

HELD = 1 << 26  # bytes of partials, or of coefficients, held at once
LOWEST = mine.LOWEST.value
FUSED = {"enable_fp_fusion": True}  # of every launch: Triton's default changes with 3.10, and the bits with it
ROWS, BLOCK = 16, 128  # of a program's part of x or y
SINGLE = {"ROWS": 8, "BLOCK": 128, **FUSED}  # of what computes single similarities: equal pairs have equal bits
FEW = 1024  # pairs up to which the emission looks at every anchor instead of sorting them
PARTS = 32  # of the bounds of few pairs, so that nobody has to clear them first; a power of two
MERGING = 8  # tiles in a row or column up to which `finish` merges their partials itself
SMALL = 1 << 20  # elements of S up to which float32 inputs are scanned in tf32: copying them costs more than it saves


class Tiling(NamedTuple):
    """How a scan cuts S."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int


def tiling(request: Request, arithmetic: str, capability: tuple[int, int] = (9, 0)) -> Tiling:
    """Wide tiles where only maxima are sought; narrower ones leave registers for the sums."""
    if arithmetic == "ieee":
        return Tiling(64, 64, 32, 4, 2)
    depth = 32 if arithmetic == "tf32" else 64
    blackwell = capability >= (10, 0)
    narrow = request.sums or (blackwell and request.semi_hard is not None)
    return Tiling(128, 64 if narrow else 128, depth, 8 if blackwell and request.sums else 4, 3)


def dense_tiling(arithmetic: str) -> Tiling:
    """Tiles of G hold both directions' weights at once: few elements for each thread."""
    return Tiling(64, 64, 32 if arithmetic in ("ieee", "tf32") else 64, 8, 2)


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def arithmetic(x: Tensor, y: Tensor, precision: str) -> str:
    """What the products of a scan are computed in: `half`, `halved` (copies of float32 inputs), `tf32` or `ieee`."""
    if torch.float32 not in (x.dtype, y.dtype):
        return "half"
    if precision == "exact":
        return "ieee"
    return "tf32" if precision == "tf32" or x.shape[0] * y.shape[0] <= SMALL else "halved"


def plan(x: Tensor, y: Tensor, request: Request, dense: bool, precision: str) -> Plan:
    """How S would be walked through."""
    (n, d), m, k = x.shape, y.shape[0], min(x.shape[0], y.shape[0])
    how, said = arithmetic(x, y, precision), {"halved": "scanned in float16", "half": "16-bit inputs as they are"}
    cut = tiling(request, how, _capability(x))
    fields = _fields(request)
    partials = _chunk(n, m, k, cut, fields) * 4 * fields * (triton.cdiv(m, cut.width) * cut.height + k)
    copies = sum(_copy_size(one, how) for one in (x, y))
    words = 2 * k * (8 + fields) * 4 + (HELD + 4 * (n + m) * d if dense else 0)
    exactly = "the mined similarities in float32"
    return Plan((cut.height, cut.width), f"{said.get(how, how)}, {exactly}", partials + copies + words)


def _padded(d: int) -> int:
    """Features of a copy."""
    return -(-d // 16) * 16


def _copy_size(x: Tensor, how: str) -> int:
    """Bytes of the copy that a scan takes of one side."""
    if how != "halved" and _direct(x):
        return 0
    return x.shape[0] * _padded(x.shape[1]) * (2 if how == "halved" else x.element_size())


def _fields(request: Request) -> int:
    """Words of a partial."""
    return 1 + (request.semi_hard is not None) + 2 * request.lin + 2 * (request.beta is not None)


def _chunk(n: int, m: int, k: int, cut: Tiling, fields: int) -> int:
    """Rows of tiles whose partials are held at once."""
    height, width = triton.cdiv(n, cut.height), triton.cdiv(m, cut.width)
    fitting: int = HELD // (4 * fields * (width * cut.height + k))
    return int(max(1, min(height, fitting)))


def _bulk(x: Tensor) -> bool:
    """Whether the tensor memory accelerator (sm_90 on) can load tiles of it: aligned rows, one after another."""
    return (
        _capability(x) >= (9, 0)
        and x.element_size() == 2
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


def _direct(x: Tensor) -> bool:
    """Whether a scan loads it as it lies, many elements at a time; else it takes copies."""
    aligned = x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0
    return aligned or _bulk(x)


def _fold(x: Tensor, cut: Tiling, how: str) -> bool:
    """Whether a thread holds several rows of a tile's columns (`mine._own`): not on sm_100, nor for ieee."""
    return cut.height % 64 == 0 and how != "ieee" and _capability(x) < (10, 0)


def pair(x: Tensor, y: Tensor, pairs: int, apart: bool = False) -> Pairs:
    """s⁺ (K,), and bounds (3,): min s⁺, max ‖x‖, max ‖y‖ as `mine.pair` writes them.

    `apart`: bounds of a small batch may be (3, PARTS), which the kernels of mined objectives read.
    """
    n, m, rows = x.shape[0], y.shape[0], SINGLE["ROWS"]
    parts = PARTS if apart and max(n, m) <= PARTS * rows and n * m <= SMALL else 1
    new: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    bounds = torch.full((3,), LOWEST, **new) if parts == 1 else torch.empty(3, parts, **new)
    s_pos = x.new_empty(pairs, dtype=torch.float32)
    mine.pair[(triton.cdiv(max(n, m), rows) if parts == 1 else parts,)](
        x, y, s_pos, bounds, n, m, pairs, x.shape[1], *x.stride(), *y.stride(),
        PARTS=parts, **SINGLE,
    )  # fmt: skip
    return Pairs(s_pos, bounds)


def _descriptor(x: Tensor, rows: int, depth: int) -> Any:
    return TensorDescriptor.from_tensor(x, [rows, depth])


def _copied(x: Tensor, halved: bool, length: Tensor) -> Tensor:
    """(N, D or a little more): what a scan loads; halved: in float16, `length` the longest row's."""
    (n, d), width = x.shape, _padded(x.shape[1])
    out = torch.empty(n, width, dtype=torch.float16 if halved else x.dtype, device=x.device)
    mine.copy[(triton.cdiv(n, ROWS), triton.cdiv(width, BLOCK))](
        x, out, length, n, d, width, *x.stride(), HALVED=halved, ROWS=ROWS, BLOCK=BLOCK, **FUSED
    )
    return out


def _loaded(x: Tensor, y: Tensor, how: str, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """What the products of a scan are made of: the inputs, or copies of them."""
    halved = how == "halved"
    a = _copied(x, halved, bounds[1:]) if halved or not _direct(x) else x
    return a, _copied(y, halved, bounds[2:]) if halved or not _direct(y) else y


def _scaled_back(s: Tensor, bounds: Tensor) -> Tensor:
    """Similarities of 16-bit copies as those of what they are copies of."""
    out = torch.empty_like(s)
    mine.scale_back[(triton.cdiv(s.shape[0], 1024),)](s, out, bounds, s.shape[0], BLOCK=1024, **FUSED)
    return out


def statistics(
    x: Tensor, y: Tensor, pairs: Pairs, request: Request, masks: Masks, precision: str, cut: Tiling | None = None
) -> Statistics:
    """The mining stage over a whole batch: scan and merge, some rows of tiles at a time, then finish."""
    s_pos, bounds = pairs
    how = arithmetic(x, y, precision)
    (n, d), m, k = x.shape, y.shape[0], masks.pairs
    cut = cut or tiling(request, how, _capability(x))
    a, b = _loaded(x, y, how, bounds)
    depth, scanned = max(a.shape[1], b.shape[1]), s_pos
    if how == "halved" and request.semi_hard is not None:  # decided on numbers of one arithmetic
        scanned = _scaled_back(pair(a, b, k).s_pos, bounds)
    semi, lin, exp = request.semi_hard is not None, request.lin, request.beta is not None
    fields = _fields(request)
    height, width = triton.cdiv(n, cut.height), triton.cdiv(m, cut.width)
    step = _chunk(n, m, k, cut, fields)
    new: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    rows = torch.empty(fields * width * min(step * cut.height, n), **new)
    cols = torch.empty(fields * step * k, **new)
    merging = step == height and max(height, width) <= MERGING
    state = rows if merging else torch.empty(8 * (1 + semi) + 3 * lin + 2 * exp, 2, k, **new)
    margin, beta = request.semi_hard or 0.0, request.beta or 0.0
    slack = max(2 * d**0.5, 16) * torch.finfo(torch.float32).eps  # at least a unit of a key
    bulk = _bulk(a) and _bulk(b)
    p_x, p_y = (_descriptor(a, cut.height, cut.depth), _descriptor(b, cut.width, cut.depth)) if bulk else (a, b)
    asked = {"SEMI": semi, "LIN": lin, "EXP": exp}
    shape = {"HEIGHT": cut.height, "WIDTH": cut.width, "PARTS": bounds.numel() // 3}
    ids, y_ids = _ids(masks, s_pos)
    for first in range(0, height, step):
        high = min(step, height - first)
        anchors = max(0, min(k - first * cut.height, high * cut.height))
        # one of the two launches does the work, whichever the range asks for; a small batch takes the general one alone
        wides = (0,) if not exp else (2,) if n * m <= SMALL else (0, 1)
        for wide in wides:
            mine.scan[(high * width,)](
                p_x, p_y, ids, y_ids, scanned, bounds, rows, cols, n, m, k, depth, *a.stride(), *b.stride(),
                first, high, width, anchors, margin, slack, beta,
                IDS=masks.ids is not None, **asked, WIDE=wide, HALVED=how == "halved",
                PRECISION="ieee" if how == "ieee" else "tf32", TMA=bulk,
                **shape, DEPTH=cut.depth, GROUP=8, FOLD=_fold(x, cut, how), INNER=False,
                num_warps=cut.warps, num_stages=cut.stages, **FUSED,
            )  # fmt: skip
        if not merging:
            mine.merge[(triton.cdiv(max(anchors, k), 64), 2)](
                rows, cols, state, bounds, k, first, high, width, anchors, slack, beta,
                **asked, **shape, BLOCK=64, **FUSED,
            )  # fmt: skip
    value, index = x.new_empty(4, 2, k, dtype=torch.float32), torch.empty(2, 2, k, dtype=torch.int64, device=x.device)
    mine.finish[(triton.cdiv(k, SINGLE["ROWS"]), 2)](
        x, y, rows, cols, state, bounds, value[0], index[0], value[1], index[1], value[2], value[3],
        k, d, *x.stride(), *y.stride(), height, width, slack, _NEAR[how], beta,
        **asked, MERGES=merging, **(shape if merging else {**shape, "HEIGHT": 0, "WIDTH": 0}),
        **SINGLE,
    )  # fmt: skip
    return Statistics(
        s_pos=s_pos,
        s_neg=value[0],
        negative=index[0],
        semi=value[1] if semi else None,
        semi_negative=index[1] if semi else None,
        r_neg_lin=value[2] if lin else None,
        r_neg_exp=value[3] if exp else None,
    )


def _ids(masks: Masks, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' ids; something else where there are none, which no kernel then looks at."""
    return (like, like) if masks.ids is None or masks.y_ids is None else (masks.ids, masks.y_ids)


# candidates this far below the best (in max ‖x‖ · max ‖y‖) may be the best: the error of the scan's arithmetic
_NEAR = {"half": 2**-20, "ieee": 2**-20, "tf32": 2**-9, "halved": 2**-9}


def weighed(statistics: Statistics, product: Product, scale: Any) -> tuple[Mined, Tensor]:
    """The entries of G and the value (0-d) of a mined objective; `scale`: what anchors weigh, (K,) or a number."""
    s_pos, hardest, negative, semi, semi_negative, r_lin, r_exp = statistics
    k = s_pos.shape[0]
    selected, index = (hardest, negative) if semi is None or semi_negative is None else (semi, semi_negative)
    pull, push, value = torch.empty_like(hardest), torch.empty_like(hardest), torch.empty_like(s_pos[0])
    lowered, declared = lower(product), product.statistics
    weights = isinstance(scale, Tensor)
    weigh.weigh[(1,)](
        s_pos, hardest, selected, hardest if r_lin is None else r_lin, hardest if r_exp is None else r_exp,
        scale if weights else s_pos, pull, push, value, k, 0.0 if weights else scale,
        product.read_by("r_pos_exp") if "r_pos_exp" in declared else 0.0, *numbers(product),
        WEIGHTS=lowered.weights, VALUE=lowered.value, WEIGHTED=weights,
        **{name.upper(): name in declared for name in STATISTICS}, ANCHORS=64, BLOCK=64, **FUSED,
    )  # fmt: skip
    return Mined(index, pull, push), value


def mined_emit(x: Tensor, y: Tensor, mined: Mined, incoming: Tensor, needs: Needs) -> Gradients:
    """∂l/∂x and ∂l/∂y of a mined objective, in the dtypes of x and y."""
    (n, d), m, k = x.shape, y.shape[0], mined.negative.shape[1]
    index, pull, push = (one.contiguous() for one in mined)
    few = k <= FEW
    targets, order = (index, index) if few else index.sort(dim=1, stable=True)
    gx, gy = x.new_empty(n if needs[0] else 0, d), y.new_empty(m if needs[1] else 0, d)
    blocks = triton.cdiv(gx.shape[0], ROWS)
    emit.emit[(blocks + triton.cdiv(gy.shape[0], ROWS), triton.cdiv(d, BLOCK))](
        x, y, gx, gy, pull, push, index, targets, order, incoming,
        n, m, k, d, *x.stride(), *y.stride(), blocks, SORTED=not few, ROWS=ROWS, SOURCES=32, BLOCK=BLOCK, **FUSED,
    )  # fmt: skip
    return gx if needs[0] else None, gy if needs[1] else None


class _Pass(NamedTuple):
    """One walk over the tiles that dense anchors meet: x→y and y→x at once, or the listed anchors of one of them."""

    x: Tensor  # the anchors' side
    y: Tensor
    ids: Tensor
    y_ids: Tensor
    side: int  # 0: anchors of x→y
    listed: Tensor  # (K,) anchors, those that are met first
    size: Tensor  # (1,) how many those are
    both: bool


class _Dense(NamedTuple):
    """What the kernels of dense.py need, however they walk."""

    x: Tensor  # what products are made of: the inputs, or their 16-bit copies
    y: Tensor
    how: str
    pairs: Pairs
    share: Tensor
    masks: Masks
    cut: Tiling

    @property
    def precision(self) -> str:
        return "ieee" if self.how == "ieee" else "tf32"

    def passes(self, every: bool) -> list[_Pass]:
        ids, y_ids = _ids(self.masks, self.pairs.s_pos)
        none = self.pairs.bounds
        if every:
            return [_Pass(self.x, self.y, ids, y_ids, 0, none, none, both=True)]
        met = self.share != 0  # (2, K)
        listed, count = (~met).int().argsort(dim=1, stable=True), met.sum(1, dtype=torch.int32)
        return [
            _Pass(self.x, self.y, ids, y_ids, 0, listed[0], count[:1], both=False),
            _Pass(self.y, self.x, y_ids, ids, 1, listed[1], count[1:], both=False),
        ]

    def shape(self, walk: _Pass) -> tuple[int, int]:
        """Rows and columns of tiles of a pass."""
        rows = walk.x.shape[0] if walk.both else self.masks.pairs
        return triton.cdiv(rows, self.cut.height), triton.cdiv(walk.y.shape[0], self.cut.width)

    def options(self, walk: _Pass) -> dict[str, Any]:
        return {
            "BOTH": walk.both, "IDS": self.masks.ids is not None, "HALVED": self.how == "halved",
            "PRECISION": self.precision, "HEIGHT": self.cut.height, "WIDTH": self.cut.width, "DEPTH": self.cut.depth,
            "GROUP": 8, "num_warps": self.cut.warps, "num_stages": self.cut.stages, **FUSED,
        }  # fmt: skip


def _dense(
    x: Tensor, y: Tensor, pairs: Pairs, share: Tensor, masks: Masks, product: Product, precision: str,
    cut: Tiling | None,
) -> _Dense:  # fmt: skip
    how = arithmetic(x, y, precision)
    d = x.shape[1]
    x, y = _loaded(x, y, how, pairs.bounds)
    run = _Dense(x, y, how, pairs, share.clone(memory_format=torch.contiguous_format), masks, cut or dense_tiling(how))
    walk = run.passes(every=True)[0]
    height, width = run.shape(walk)
    options = {name: option for name, option in run.options(walk).items() if name != "BOTH"}
    dense.out_of_range[(height * width,)](
        x, y, walk.ids, walk.y_ids, pairs.bounds, run.share, x.shape[0], y.shape[0], masks.pairs, d,
        *x.stride(), *y.stride(), height, width, lower(product).limit, **options,
    )  # fmt: skip
    return run


def dense_value(
    x: Tensor, y: Tensor, pairs: Pairs, share: Tensor, masks: Masks, product: Product, precision: str, every: bool,
    cut: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ) over all negatives, 0-d; `every`: all anchors meet them, not just those with a share."""
    run = _dense(x, y, pairs, share, masks, product, precision, cut)
    total = []
    for walk in run.passes(every):
        height, width = run.shape(walk)
        out = torch.empty(height * width, dtype=torch.float32, device=x.device)
        dense.value[(height * width,)](
            walk.x, walk.y, walk.ids, walk.y_ids, pairs.s_pos, run.share, pairs.bounds, walk.listed, walk.size, out,
            walk.x.shape[0], walk.y.shape[0], masks.pairs, x.shape[1], *walk.x.stride(), *walk.y.stride(),
            0, height, width, walk.side, *numbers(product), VALUE=lower(product).value, **run.options(walk),
        )  # fmt: skip
        total.append(out.sum())
    return torch.stack(total).sum()


def dense_emit(
    x: Tensor, y: Tensor, pairs: Pairs, share: Tensor, relative: dict[str, Tensor], masks: Masks, product: Product,
    needs: Needs, precision: str, every: bool, cut: Tiling | None = None,
) -> Gradients:  # fmt: skip
    """∂l/∂x and ∂l/∂y, float32, of anchors that meet all their negatives: G some rows of tiles at a time."""
    run = _dense(x, y, pairs, share, masks, product, precision, cut)
    cut, k = run.cut, masks.pairs
    d = run.x.shape[1] if run.x.shape[1] == run.y.shape[1] else x.shape[1]  # of copies, with columns of 0
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    out = (torch.zeros(x.shape[0], d, **new), torch.zeros(y.shape[0], d, **new))
    pull = torch.zeros(k, **new)
    nothing = torch.zeros(2, k, **new)
    known = torch.stack([relative.get(name, nothing) for name in STATISTICS])
    scaled = run.x.dtype == torch.float16
    for walk in run.passes(every):
        height, width = run.shape(walk)
        line = width * cut.width
        step = max(1, min(height, HELD // (run.x.element_size() * cut.height * line)))
        w = torch.empty(step * cut.height, line, dtype=run.x.dtype, device=x.device)
        scales = torch.empty(step, width, **new)
        into_x, into_y = (out[0], out[1]) if walk.side == 0 else (out[1], out[0])
        need_x, need_y = needs if walk.side == 0 else needs[::-1]
        pull_rows = torch.zeros(width, k, **new)
        options = {"SCALED": scaled, "HALVED": run.how == "halved", "PRECISION": run.precision, **FUSED}
        for first in range(0, height, step):
            high = min(step, height - first)
            pull_cols = torch.zeros(high if walk.both else 0, k, **new)
            dense.coefficients[(high * width,)](
                walk.x, walk.y, walk.ids, walk.y_ids, pairs.s_pos, run.share, known, pairs.bounds, walk.listed,
                walk.size, w, scales, pull_rows, pull_cols, walk.x.shape[0], walk.y.shape[0], k, d,
                *walk.x.stride(), *walk.y.stride(), line, first, high, width, walk.side, *numbers(product),
                WEIGHTS=lower(product).weights, SCALED=scaled, **run.options(walk),
            )  # fmt: skip
            pull += pull_cols.sum(0)
            begin = first * cut.height
            rows = min(high * cut.height, (walk.x.shape[0] if walk.both else k) - begin)
            block = 64 if run.how == "ieee" else BLOCK  # which holds its operands in registers
            columns = triton.cdiv(d, block)
            if need_x:
                dense.product[(triton.cdiv(rows, cut.height), columns)](
                    w, scales, walk.y, into_x, pairs.bounds, walk.listed, walk.size, rows, walk.y.shape[0], d,
                    line, 1, *walk.y.stride(), width, 1, begin, 0, 2 - walk.side,
                    LISTED="none" if walk.both else "targets", **options,
                    TARGETS=cut.height, SOURCES=cut.width, BLOCK=block, num_warps=cut.warps,
                )  # fmt: skip
            if need_y:
                dense.product[(width, columns)](
                    w, scales, walk.x, into_y, pairs.bounds, walk.listed, walk.size, walk.y.shape[0], rows, d,
                    1, line, *walk.x.stride(), 1, width, 0, begin, 1 + walk.side,
                    LISTED="none" if walk.both else "sources", **options,
                    TARGETS=cut.width, SOURCES=cut.height, BLOCK=block, num_warps=cut.warps,
                )  # fmt: skip
        taken = pull_rows.sum(0)
        pull = pull + taken if walk.both else pull + torch.zeros_like(pull).scatter(0, walk.listed, taken)
    gx, gy = (gradient[:, : x.shape[1]].contiguous() for gradient in out)
    for gradient, other in ((gx, y), (gy, x)):
        gradient[:k].addcmul_(pull[:, None], other[:k].float(), value=-1)
    return gx if needs[0] else None, gy if needs[1] else None
