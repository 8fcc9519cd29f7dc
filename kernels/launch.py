"""The quadratic stages on an accelerator, as `goal.engine.backend` calls them.

This file only launches; the work is in the kernels. Only `limits` waits for the device. `statistics` takes the full
batch. `mine`, `dense_value`, `dense_block` and `mined_emit` take any block of S, and its masks give its place in S. The
data of the anchors and the bounds are always those of the full batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from goal.engine import types
from goal.engine.partials import Partial
from goal.engine.statistics import BAND, Request, Statistics
from goal.engine.types import Dense, Gradients, Limits, Masks, Mined, Needs, Pairs, Plan
from goal.kernels import dense, emit, merge, scan, tile, weigh
from goal.kernels.bits import LOWEST
from goal.kernels.lower import lower, numbers
from goal.kernels.tile import Block, Cut, Matrix, Sides, Tiles
from goal.terms import STATISTICS, Product

FAR = 1 << 30  # limit of `Block.ahead`; no block has as many rows
HELD = 1 << 26  # bytes of partials, or of coefficients, in memory at a time
FUSED = {"enable_fp_fusion": True}  # for every launch: Triton's default changes with 3.10, and the bits with it
ROWS, BLOCK = 16, 128  # rows and columns of x or y in a program
SINGLE = {"ROWS": 8, "BLOCK": 128, **FUSED}  # for kernels of single similarities: equal pairs get equal bits
FEW = 1024  # pairs up to which emission compares every anchor instead of sorting them
PARTS = 32  # parts of a small batch's bounds, so that no buffer has to be cleared first; a power of two
MERGING = 8  # tiles in a row or column up to which `finish` merges their partials itself
SMALL = 1 << 20  # elements of S up to which float32 inputs are scanned in tf32: copies would cost more than they save


class Tiling(NamedTuple):
    """The tiles of a scan."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int

    @property
    def cut(self) -> Cut:
        return Cut(self.height, self.width, self.depth)

    def tiles(self, n: int, m: int) -> tuple[int, int]:
        """Rows and columns of tiles of an (n, m) block."""
        return triton.cdiv(n, self.height), triton.cdiv(m, self.width)


def tiling(request: Request, arithmetic: str, capability: tuple[int, int] = (9, 0)) -> Tiling:
    """Wide tiles if only maxima are needed; narrower tiles leave registers for the sums."""
    if arithmetic == "ieee":
        return Tiling(64, 64, 32, 4, 2)
    depth = 32 if arithmetic == "tf32" else 64
    blackwell = capability >= (10, 0)
    narrow = request.sums or (blackwell and request.semi_hard is not None)
    return Tiling(128, 64 if narrow else 128, depth, 8 if blackwell and request.sums else 4, 3)


def dense_tiling(arithmetic: str) -> Tiling:
    """Tiles for G: they need the weights of both directions, so a thread has few elements."""
    return Tiling(64, 64, 32 if arithmetic in ("ieee", "tf32") else 64, 8, 2)


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def arithmetic(x: Tensor, y: Tensor, precision: str) -> str:
    """The arithmetic of a scan's products: `half`, `halved` (copies of float32 inputs), `tf32` or `ieee`."""
    if torch.float32 not in (x.dtype, y.dtype):
        return "half"
    if precision == "exact":
        return "ieee"
    return "tf32" if precision == "tf32" or x.shape[0] * y.shape[0] <= SMALL else "halved"


def plan(x: Tensor, y: Tensor, request: Request, dense: bool, precision: str) -> Plan:
    """The tiles of S, the arithmetic, and the memory."""
    (n, d), m, k = x.shape, y.shape[0], min(x.shape[0], y.shape[0])
    how, said = arithmetic(x, y, precision), {"halved": "scanned in float16", "half": "16-bit inputs as they are"}
    cut = tiling(request, how, _capability(x))
    fields = _words(request).size
    partials = _chunk(n, m, k, cut, fields) * 4 * fields * (triton.cdiv(m, cut.width) * cut.height + k)
    copies = sum(_copy_size(one, how) for one in (x, y))
    words = 2 * k * (8 + fields) * 4 + (HELD + 4 * (n + m) * d if dense else 0)
    exactly = "the mined similarities in float32"
    return Plan((cut.height, cut.width), f"{said.get(how, how)}, {exactly}", partials + copies + words)


def _padded(d: int) -> int:
    """Number of features of a copy."""
    return -(-d // 16) * 16


def _copy_size(x: Tensor, how: str) -> int:
    """Bytes of the copy that a scan makes of one side."""
    if how != "halved" and _direct(x):
        return 0
    return x.shape[0] * _padded(x.shape[1]) * (2 if how == "halved" else x.element_size())


def _words(request: Request, merged: bool = False) -> scan.Words:
    return scan.words(request.semi_hard is not None, request.lin, request.beta is not None, merged)


def _chunk(n: int, m: int, k: int, cut: Tiling, fields: int) -> int:
    """Rows of tiles whose partials are in memory at a time."""
    height, width = cut.tiles(n, m)
    fitting: int = HELD // (4 * fields * (width * cut.height + k))
    return int(max(1, min(height, fitting)))


def _bulk(x: Tensor) -> bool:
    """Whether the tensor memory accelerator (sm_90 and later) can load tiles of it: aligned, contiguous rows."""
    return (
        _capability(x) >= (9, 0)
        and x.element_size() == 2
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


def _direct(x: Tensor) -> bool:
    """Whether a scan can load it without a copy, many elements at a time."""
    aligned = x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0
    return aligned or _bulk(x)


def _fold(x: Tensor, cut: Tiling, how: str) -> bool:
    """Whether a thread has several rows of a tile's columns (`scan._own`): not on sm_100, nor for ieee."""
    return cut.height % 64 == 0 and how != "ieee" and _capability(x) < (10, 0)


def _matrix(x: Tensor) -> Matrix:
    return Matrix(x, *x.stride())


def _block(block: types.Block) -> Block:
    (n, d), m, masks = block.x.shape, block.y.shape[0], block.masks
    rows, cols = masks.anchors(0), masks.anchors(1)
    row_anchors, col_anchors = rows.stop - rows.start, cols.stop - cols.start
    if masks.whole:  # a kernel of its own, without what is always 0
        return Block(n, m, d, row_anchors, col_anchors, None, None, None)
    ahead = max(-FAR, min(masks.row_offset - masks.col_offset, FAR))
    return Block(n, m, d, row_anchors, col_anchors, masks.row_offset, masks.col_offset, ahead)


def _of_anchors(of_rows: Tensor, of_cols: Tensor, masks: Masks) -> Sides:
    """The block's part of values (K,) for anchors x→y and of values (K,) for anchors y→x."""
    return Sides(of_rows[masks.anchors(0)], of_cols[masks.anchors(1)])


def _ids(masks: Masks) -> Sides | None:
    return None if masks.ids is None or masks.y_ids is None else Sides(masks.ids, masks.y_ids)


def pair(x: Tensor, y: Tensor, pairs: int, apart: bool = False) -> Pairs:
    """s⁺ (K,), and bounds (3,): −min s⁺, max ‖x‖, max ‖y‖ as `tile.pair` writes them.

    `apart`: bounds of a small batch may be (3, PARTS), which the kernels of mined objectives read.
    """
    n, m, rows = x.shape[0], y.shape[0], SINGLE["ROWS"]
    parts = PARTS if apart and max(n, m) <= PARTS * rows and n * m <= SMALL else 1
    new: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    bounds = torch.full((3,), LOWEST.value, **new) if parts == 1 else torch.empty(3, parts, **new)
    s_pos = x.new_empty(pairs, dtype=torch.float32)
    programs = triton.cdiv(max(n, m), rows) if parts == 1 else parts
    tile.pair[(programs,)](_matrix(x), _matrix(y), s_pos, bounds, n, m, pairs, x.shape[1], PARTS=parts, **SINGLE)
    return Pairs(s_pos, bounds)


def _descriptor(x: Tensor, rows: int, depth: int) -> Any:
    return TensorDescriptor.from_tensor(x, [rows, depth])


def _copied(x: Tensor, halved: bool, length: Tensor) -> Tensor:
    """A copy (N, D or a little more) for a scan; `halved`: in float16, with `length` the longest row's norm."""
    (n, d), width = x.shape, _padded(x.shape[1])
    out = torch.empty(n, width, dtype=torch.float16 if halved else x.dtype, device=x.device)
    tile.copy[(triton.cdiv(n, ROWS), triton.cdiv(width, BLOCK))](
        _matrix(x), out, length, n, d, width, HALVED=halved, ROWS=ROWS, BLOCK=BLOCK, **FUSED
    )
    return out


def _loaded(x: Tensor, y: Tensor, how: str, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a scan's products: the inputs, or copies of them."""
    halved = how == "halved"
    a = _copied(x, halved, bounds[1:]) if halved or not _direct(x) else x
    return a, _copied(y, halved, bounds[2:]) if halved or not _direct(y) else y


def _scaled_back(s: Tensor, bounds: Tensor) -> Tensor:
    """Similarities of 16-bit copies, scaled back to those of the original rows."""
    out = torch.empty_like(s)
    tile.scale_back[(triton.cdiv(s.shape[0], 1024),)](s, out, bounds, s.shape[0], BLOCK=1024, **FUSED)
    return out


# ── mining ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# candidates this far below the best (in max ‖x‖ · max ‖y‖) may be the best: the error of the scan's arithmetic
_NEAR = {"half": 2**-20, "ieee": 2**-20, "tf32": 2**-9, "halved": 2**-9}


def statistics(
    block: types.Block, pairs: Pairs, request: Request, precision: str, cut: Tiling | None = None
) -> Statistics:
    """The mining stage over a whole batch."""
    out = _empty(block, request, sums=False)
    _reduce(block, pairs, request, precision, out, cut)
    of_both: list[Any] = [None if one is None else one.view(2, -1) for one in (*out[:4], out.lin_sum, out.exp_sum)]
    return Statistics(pairs.s_pos, *of_both)


def mine(
    block: types.Block, pairs: Pairs, request: Request, precision: str, cut: Tiling | None = None
) -> tuple[Partial, Partial]:
    """The partials of a block in both directions, as from `eager.mine`."""
    out = _empty(block, request, sums=True)
    _reduce(block, pairs, request, precision, out, cut)
    rows = block.masks.anchors(0)
    size = rows.stop - rows.start

    def of(at: slice) -> Partial:
        fields: list[Any] = [None if one is None else one[at] for one in out]
        return Partial(*fields)

    return of(slice(0, size)), of(slice(size, None))


def _empty(block: types.Block, request: Request, sums: bool) -> merge.Finished:
    """Memory for the results of anchors, x→y's first; without `sums` for means instead of counts and sums."""
    rows, cols = block.masks.anchors(0), block.masks.anchors(1)
    size, device = rows.stop - rows.start + cols.stop - cols.start, block.x.device

    def real(wanted: bool = True) -> Tensor | None:
        return torch.empty(size, dtype=torch.float32, device=device) if wanted else None

    def index(wanted: bool = True) -> Tensor | None:
        return torch.empty(size, dtype=torch.int64, device=device) if wanted else None

    semi, lin, exp = request.semi_hard is not None, request.lin, request.beta is not None
    of_lin = (real(lin and sums), real(lin and sums), real(lin))
    return merge.Finished(real(), index(), real(semi), index(semi), *of_lin, real(exp and sums), real(exp))


def _slack(d: int) -> float:
    """Similarities closer than this times max ‖x‖ · max ‖y‖ are equal; at least a unit of a key."""
    return float(max(2 * d**0.5, 16)) * torch.finfo(torch.float32).eps


def limits(bounds: Tensor, d: int) -> Limits:
    """The limits by which partials of blocks are merged, as the kernels compute them; reads the bounds (3,)."""
    least, *longest = bounds.cpu()
    s_pos = -(least ^ ((least >> 31) & 0x7FFFFFFF)).view(torch.float32)
    reach = (longest[0].view(torch.float32) * longest[1].view(torch.float32)).clamp(max=torch.finfo(torch.float32).max)
    exponent = torch.frexp(reach).exponent
    usual = (reach >= torch.finfo(torch.float32).tiny) & (reach < torch.inf)
    power = torch.where(usual, torch.ldexp(torch.ones(()), 7 - exponent), torch.ones(()))  # `bits.power`
    scale = power.clamp(max=2.0**113) * 8192.0
    tie = (torch.floor(_slack(d) * reach * scale) + 0.5) / scale  # `bits.tie_of`
    return Limits((s_pos - BAND).item(), tie.item())


def _reduce(
    of: types.Block, pairs: Pairs, request: Request, precision: str, out: merge.Finished, given: Tiling | None
) -> None:
    """Scan and merge, some rows of tiles at a time, then finish into `out`."""
    (x, y, masks), bounds, block = of, pairs.bounds, _block(of)
    how = arithmetic(x, y, precision)
    if how == "halved" and request.semi_hard is not None and not masks.whole:
        how = "tf32"  # the pairs of the block's anchors may lie outside it, so there are no float16 copies of them
    cut = given or tiling(request, how, _capability(x))
    a, b = _loaded(x, y, how, bounds)
    s_pos = _scanned(a, b, pairs, masks) if how == "halved" and request.semi_hard is not None else pairs.s_pos
    words, state_words = _words(request), _words(request, merged=True)
    height, width = cut.tiles(block.N, block.M)
    step = _chunk(block.N, block.M, block.col_anchors, cut, words.size)
    new: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    rows = torch.empty(words.size * width * min(step * cut.height, block.N), **new)
    cols = torch.empty(words.size * step * block.col_anchors, **new)
    partials, merging = Sides(rows, cols), step == height and max(height, width) <= MERGING
    state = rows if merging else torch.empty(state_words.size, block.row_anchors + block.col_anchors, **new)
    amounts = scan.Numbers(request.semi_hard or 0.0, _slack(block.D), _NEAR[how], request.beta or 0.0)
    bulk = _bulk(a) and _bulk(b)
    scanned = block._replace(D=max(a.shape[1], b.shape[1]))
    # the range decides which of the two launches scans; a small batch takes only the general launch
    wides = (0,) if request.beta is None else (2,) if block.N * block.M <= SMALL else (0, 1)
    options: dict[str, Any] = {"PARTS": bounds.numel() // 3, **FUSED}
    shape = cut.cut._replace(depth=0)  # merging does not depend on the depth
    for first in range(0, height, step):
        high = min(step, height - first)
        anchors = max(0, min(block.row_anchors - first * cut.height, high * cut.height))
        tiles = Tiles(first, high, width, anchors)
        for wide in wides:
            scan.scan[(high * width,)](
                _descriptor(a, cut.height, cut.depth) if bulk else _matrix(a),
                _descriptor(b, cut.width, cut.depth) if bulk else _matrix(b),
                _ids(masks), _of_anchors(s_pos, s_pos, masks), bounds, partials, scanned, tiles, amounts,
                WORDS=words, WIDE=wide, ARITHMETIC=how, TMA=bulk, CUT=cut.cut, FOLD=_fold(x, cut, how), INNER=False,
                num_warps=cut.warps, num_stages=cut.stages, **options,
            )  # fmt: skip
        if not merging:
            merge.merge[(triton.cdiv(max(anchors, block.col_anchors), 64), 2)](
                partials, state, bounds, Sides(block.row_anchors, block.col_anchors), tiles, amounts,
                WORDS=words, STATE=state_words, CUT=shape, BLOCK=64, **options,
            )  # fmt: skip
    merge.finish[(triton.cdiv(max(block.row_anchors, block.col_anchors), SINGLE["ROWS"]), 2)](
        _matrix(x), _matrix(y), partials, state, bounds, out, block,
        Tiles(0, height, width, block.row_anchors), amounts, WORDS=words, STATE=state_words,
        MERGES=merging, CUT=shape if merging else Cut(0, 0, 0), PARTS=options["PARTS"], **SINGLE,
    )  # fmt: skip


def _scanned(a: Tensor, b: Tensor, pairs: Pairs, masks: Masks) -> Tensor:
    """s⁺ of 16-bit copies, so that semi-hard negatives are compared with s⁺ in the same arithmetic."""
    return _scaled_back(pair(a, b, masks.pairs).s_pos, pairs.bounds)


# ── weighing and emitting mined entries ─────────────────────────────────────────────────────────────────────────────


def weighed(statistics: Statistics, product: Product, scale: Any) -> tuple[Mined, Tensor]:
    """The entries of G and the value (0-d) of a mined objective; `scale`: the weight of anchors, (K,) or a number."""
    s_pos, r_lin, r_exp = statistics.s_pos, statistics.r_neg_lin, statistics.r_neg_exp
    k, declared, (selected, index) = s_pos.shape[0], product.statistics, statistics.selected
    found = Mined(index, torch.empty_like(selected), torch.empty_like(selected))
    value, lowered, weights = torch.empty_like(s_pos[0]), lower(product), isinstance(scale, Tensor)
    read = statistics._replace(
        r_neg_lin=r_lin if "r_neg_lin" in declared else None, r_neg_exp=r_exp if "r_neg_exp" in declared else None
    )
    weigh.weigh[(1,)](
        read, selected, scale if weights else None, found, value, k, 0.0 if weights else scale,
        product.read_by("r_pos_exp") if "r_pos_exp" in declared else 0.0, numbers(product),
        WEIGHTS=lowered.weights, VALUE=lowered.value,
        R_POS_LIN="r_pos_lin" in declared, R_POS_EXP="r_pos_exp" in declared, ANCHORS=64, BLOCK=64, **FUSED,
    )  # fmt: skip
    return found, value


def mined_emit(block: types.Block, mined: Mined, incoming: Tensor, needs: Needs) -> Gradients:
    """∂l/∂x and ∂l/∂y, in the dtypes of x and y, of the mined entries that lie in a block."""
    (x, y, _), size, k = block, _block(block), mined.negative.shape[1]
    assert mined.pull is not None
    mined = Mined(mined.negative.contiguous(), mined.pull.contiguous(), mined.push.contiguous())
    few = k <= FEW
    targets, order = (mined.negative, mined.negative) if few else mined.negative.sort(dim=1, stable=True)
    gx, gy = x.new_empty(size.N if needs[0] else 0, size.D), y.new_empty(size.M if needs[1] else 0, size.D)
    blocks = triton.cdiv(gx.shape[0], ROWS)
    emit.emit[(blocks + triton.cdiv(gy.shape[0], ROWS), triton.cdiv(size.D, BLOCK))](
        _matrix(x), _matrix(y), gx, gy, mined, targets, order, incoming, size, k, blocks,
        SORTED=not few, ROWS=ROWS, SOURCES=32, BLOCK=BLOCK, **FUSED,
    )  # fmt: skip
    return gx if needs[0] else None, gy if needs[1] else None


# ── dense objectives ────────────────────────────────────────────────────────────────────────────────────────────────


class _Walk(NamedTuple):
    """A walk over the tiles of dense anchors: x→y and y→x at once, or the listed anchors of one direction."""

    x: Tensor  # the anchors' side
    y: Tensor
    ids: Sides | None
    anchors: Sides  # dense.Anchors of this side, and of the other
    listed: dense.Listed | None  # the list of dense anchors; None: all anchors, of both directions
    block: Block
    side: int  # 0: anchors of x→y


class _Dense(NamedTuple):
    """Arguments of the kernels of dense.py, the same for all walks."""

    x: Tensor  # operands of products: the inputs, or their 16-bit copies
    y: Tensor
    ids: Sides | None
    anchors: Sides
    block: Block
    bounds: Tensor
    how: str
    cut: Tiling

    def walks(self, every: bool) -> list[_Walk]:
        both = _Walk(self.x, self.y, self.ids, self.anchors, None, self.block, 0)
        if every:
            return [both]
        n, m, d, row_anchors, col_anchors, row_offset, col_offset, ahead = self.block
        behind = None if ahead is None else -ahead
        turned = Block(m, n, d, col_anchors, row_anchors, col_offset, row_offset, behind)
        ids = None if self.ids is None else Sides(*self.ids[::-1])
        other = _Walk(self.y, self.x, ids, Sides(*self.anchors[::-1]), None, turned, 1)
        return [walk._replace(listed=_listed(walk.anchors.rows.share)) for walk in (both, other)]

    def tiles(self, walk: _Walk) -> tuple[int, int]:
        """Rows and columns of tiles of a walk."""
        return self.cut.tiles(walk.block.N if walk.listed is None else walk.block.row_anchors, walk.block.M)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ARITHMETIC": self.how, "CUT": self.cut.cut, "num_warps": self.cut.warps, "num_stages": self.cut.stages,
            **FUSED,
        }  # fmt: skip


def _listed(share: Tensor) -> dense.Listed:
    met = share != 0
    return dense.Listed((~met).int().argsort(stable=True), met.sum(0, keepdim=True, dtype=torch.int32))


def _dense(of: types.Block, met: Dense, precision: str, cut: Tiling | None) -> _Dense:
    """The arguments of the walks; a copy of the share has NaN for anchors whose weights float32 cannot represent."""
    (x, y, masks), block = of, _block(of)
    how = arithmetic(x, y, precision)
    a, b = _loaded(x, y, how, met.bounds)
    share = met.share.clone(memory_format=torch.contiguous_format)

    s_pos, shares = _of_anchors(met.s_pos, met.s_pos, masks), _of_anchors(share[0], share[1], masks)
    known = {name: _of_anchors(values[0], values[1], masks) for name, values in met.relative.items()}

    def anchors(side: int) -> dense.Anchors:
        relative = weigh.Relative(*(known[name][side] if name in known else None for name in STATISTICS))
        return dense.Anchors(s_pos[side], shares[side], relative)

    run = _Dense(a, b, _ids(masks), Sides(anchors(0), anchors(1)), block, met.bounds, how, cut or dense_tiling(how))
    height, width = run.cut.tiles(block.N, block.M)
    dense.out_of_range[(height * width,)](
        _matrix(a), _matrix(b), run.ids, run.bounds, shares, block, Tiles(0, height, width, block.row_anchors),
        lower(met.product).limit, **run.options,
    )  # fmt: skip
    return run


def dense_value(block: types.Block, met: Dense, precision: str, cut: Tiling | None = None) -> Tensor:
    """Σ shareᵢ · l(s⁺ᵢ, sᵢⱼ) over the negatives in a block, 0-d."""
    run = _dense(block, met._replace(relative={}), precision, cut)
    total = []
    for walk in run.walks(met.every):
        height, width = run.tiles(walk)
        out = torch.empty(height * width, dtype=torch.float32, device=run.x.device)
        dense.value[(height * width,)](
            _matrix(walk.x), _matrix(walk.y), walk.ids, *walk.anchors, run.bounds, walk.listed, out, walk.block,
            Tiles(0, height, width, walk.block.row_anchors), numbers(met.product),
            VALUE=lower(met.product).value, **run.options,
        )  # fmt: skip
        total.append(out.sum())
    return torch.stack(total).sum()


def dense_block(
    block: types.Block, met: Dense, needs: Needs, precision: str, cut: Tiling | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of a block's negatives at its rows and columns, float32; G is computed some rows of tiles at a time.

    Returns:
        ∂l/∂x, ∂l/∂y, and pull (2, K): the block's pull at the pairs of its anchors, x→y and y→x.
    """
    run, (x, y, _) = _dense(block, met, precision, cut), block
    d = run.x.shape[1] if run.x.shape[1] == run.y.shape[1] else x.shape[1]  # of copies, with columns of 0
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    out = [torch.zeros(side.shape[0], d, **new) if needed else None for side, needed in zip((x, y), needs, strict=True)]
    pull = torch.zeros(2, block.masks.pairs, **new)
    pulled = _of_anchors(pull[0], pull[1], block.masks)  # views
    run = run._replace(block=run.block._replace(D=d))
    for walk in run.walks(met.every):
        turn = -1 if walk.side else 1
        _walk_through(run, walk, met.product, Sides(*out[::turn]), Sides(*pulled[::turn]))
    gx, gy = (None if gradient is None else gradient[:, : x.shape[1]].contiguous() for gradient in out)
    return gx, gy, pull


class _Held(NamedTuple):
    """Some rows of tiles of G."""

    w: Tensor  # (rows, columns) in the dtype of the operands of products
    scales: Tensor  # (rows of tiles, tiles in each), factors that undo the scaling of float16
    scaled: bool


def _walk_through(run: _Dense, walk: _Walk, product: Product, out: Sides, pulled: Sides) -> None:
    """Add the gradients of a walk to `out` and its pulls to `pulled`, for its rows and its columns."""
    block, cut = walk.block, run.cut
    height, width = run.tiles(walk)
    line = width * cut.width
    step = max(1, min(height, HELD // (walk.x.element_size() * cut.height * line)))
    new: dict[str, Any] = {"dtype": torch.float32, "device": walk.x.device}
    held = _Held(
        torch.empty(step * cut.height, line, dtype=walk.x.dtype, device=walk.x.device),
        torch.empty(step, width, **new), walk.x.dtype == torch.float16,
    )  # fmt: skip
    taken = torch.zeros(width, block.row_anchors, **new)
    for first in range(0, height, step):
        tiles = Tiles(first, min(step, height - first), width, block.row_anchors)
        begin = first * cut.height
        rows = min(tiles.height * cut.height, (block.N if walk.listed is None else block.row_anchors) - begin)
        cols = torch.zeros(tiles.height if walk.listed is None else 0, block.col_anchors, **new)
        _coefficients(run, walk, product, held, dense.Pulls(taken, cols), tiles)
        pulled.cols.add_(cols.sum(0))
        if out.rows is not None:
            _into_rows(run, walk, held, out.rows, dense.Range(rows, block.M, begin, 0, block.D))
        if out.cols is not None:
            _into_cols(run, walk, held, out.cols, dense.Range(block.M, rows, 0, begin, block.D))
    own = taken.sum(0)
    pulled.rows.add_(own if walk.listed is None else torch.zeros_like(own).scatter(0, walk.listed.anchors, own))


def _coefficients(
    run: _Dense, walk: _Walk, product: Product, held: _Held, pulls: dense.Pulls, tiles: Tiles
) -> None:  # fmt: skip
    """The first pass: some rows of tiles of G."""
    dense.coefficients[(tiles.height * tiles.width,)](
        _matrix(walk.x), _matrix(walk.y), walk.ids, *walk.anchors, run.bounds, walk.listed,
        _matrix(held.w), held.scales, pulls, walk.block, tiles, numbers(product),
        WEIGHTS=lower(product).weights, SCALED=held.scaled, **run.options,
    )  # fmt: skip


def _into_rows(run: _Dense, walk: _Walk, held: _Held, out: Tensor, size: dense.Range) -> None:
    """The second pass: out += G y."""
    _product(
        run, walk, held.scaled, _matrix(held.w), _matrix(held.scales), walk.y, out, size,
        length=2 - walk.side, listed="targets", targets=run.cut.height, sources=run.cut.width,
    )  # fmt: skip


def _into_cols(run: _Dense, walk: _Walk, held: _Held, out: Tensor, size: dense.Range) -> None:
    """The second pass: out += Gᵀ x."""
    _product(
        run, walk, held.scaled, _matrix(held.w.T), _matrix(held.scales.T), walk.x, out, size,
        length=1 + walk.side, listed="sources", targets=run.cut.width, sources=run.cut.height,
    )  # fmt: skip


def _product(
    run: _Dense, walk: _Walk, scaled: bool, w: Matrix, scales: Matrix, other: Tensor, out: Tensor, size: dense.Range,
    *, length: int, listed: str, targets: int, sources: int,
) -> None:  # fmt: skip
    """out += w · other; length: index of the bound that scaled `other`; listed: the side that the walk's list names."""
    block = 64 if run.how == "ieee" else BLOCK  # ieee has its operands in registers
    dense.product[(triton.cdiv(size.targets, targets), triton.cdiv(size.D, block))](
        w, scales, _matrix(other), out, run.bounds[length:], walk.listed, size,
        LISTED="none" if walk.listed is None else listed, SCALED=scaled, ARITHMETIC=run.how,
        TARGETS=targets, SOURCES=sources, BLOCK=block, num_warps=run.cut.warps, **FUSED,
    )  # fmt: skip
