"""What the shipped kernels compile to, gate by gate, on a machine that needs no GPU.

    python -m benchmarks.compile_report                       # every variant for sm_80, sm_90 and sm_100, some minutes
    python -m benchmarks.compile_report --subset              # ten of them, for continuous integration
    python -m benchmarks.compile_report --triton PATH         # with another Triton, from pip install --target PATH
    python -m benchmarks.compile_report --record              # keep the instructions per element as the new yardstick

The variants are not written down here: launch.py itself runs, on tensors without memory, and what it launches is kept
and compiled, with the argument types, divisibilities and options that a launch would have. The process ends with 1 and
names every gate that fails: a stack, local memory, float atomics, locks, too much shared memory, a product without
tensor cores, or more instructions per element of S than recorded.

Instructions per element are those after the last tensor-core instruction, as they stand in the SASS and without NOPs,
divided by the elements of S that a thread holds. For `scan` they are counted on a tile of negatives alone (INNER).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import goal
from benchmarks.report import RESULTS, conditions, facts, keep, markdown, show

ARCHS = (80, 90, 100)
SHARED = {
    80: 166912,
    90: 232448,
    100: 232448,
}  # bytes a program may ask for, 163 and 227 KB: CUDA C++ Programming Guide
RECORDED = RESULTS / "compile-recorded.json"  # Triton's version → variant → architecture → instructions per element
TOLERANCE = 1.05
# sizes decide what is divisible by 16, as they would in a launch
N, SMALL_N, TINY_N, D, ODD_D = 32768, 512, 128, 1024, 1001
MODULES = ("tile", "scan", "merge", "weigh", "dense", "emit")
# compiled well within a minute: one of each kind of kernel, the scan's requests where registers are scarcest
SUBSET = {
    80: ("scan argmax fp16",),
    90: (
        "scan argmax tma bf16",
        "scan lin tma bf16",
        "scan exp tma bf16",
        "merge exp",
        "finish exp bf16",
        "emit sorted bf16",
        "coefficients both bf16 cir × sig-ms",
        "product bf16",
    ),
    100: ("scan lin tma bf16",),
}


# ── what is launched ────────────────────────────────────────────────────────────────────────────────────────────────


class Variant(NamedTuple):
    """A kernel as one launch would have it compiled."""

    name: str
    fn: Any  # a triton.JITFunction
    signature: dict[str, Any]  # argument → Triton's name of its type, or a tuple of such names
    constexprs: dict[str, Any]  # what is compiled in; of a tuple "argument.field"
    divisible: tuple[str, ...]  # what is known to be a multiple of 16, named likewise
    warps: int
    stages: int
    elements: float | None  # of S that a thread holds; None where it makes no tile of S on tensor cores
    product: bool  # whether it has a product for tensor cores


class _Recorder:
    """Stands where a kernel stands while launch.py runs: it keeps what would be launched."""

    def __init__(self, fn: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.fn, self.launches = fn, launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.fn, args, options))


@contextlib.contextmanager
def _recording(arch: int, bulk: bool) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Launches of launch.py are listed and not made, as on a device of `arch`; without `bulk`, with pointers alone."""
    launch: Any = importlib.import_module("goal.kernels.launch")
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    replaced: list[tuple[Any, str, Any]] = [(launch, key, getattr(launch, key)) for key in ("_capability", "_bulk")]
    for name in MODULES:
        module = importlib.import_module(f"goal.kernels.{name}")
        kernels = [key for key, value in vars(module).items() if hasattr(value, "arg_names") and key[0] != "_"]
        replaced += [(module, key, getattr(module, key)) for key in kernels]
    try:
        launch._capability = lambda x: divmod(arch, 10)
        launch._bulk = launch._bulk if bulk else lambda x: False
        for module, key, value in replaced[2:]:
            setattr(module, key, _Recorder(value, launches))
        yield launches
    finally:
        for module, key, value in replaced:
            setattr(module, key, value)


def _inputs(dtype: torch.dtype, n: int = N, d: int = D) -> tuple[Tensor, Tensor]:
    return torch.empty(n, d, dtype=dtype, device="meta"), torch.empty(n, d, dtype=dtype, device="meta")


def _runs(bulk: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """What launch.py is asked to do: (a label for kernels that carry terms, the call)."""
    launch: Any = importlib.import_module("goal.kernels.launch")
    statistics: Any = importlib.import_module("goal.engine.statistics")
    terms: Any = importlib.import_module("goal.terms")
    types: Any = importlib.import_module("goal.engine.types")
    Request, Masks, Block = statistics.Request, types.Masks, types.Block
    half = (torch.bfloat16, torch.float16)
    requests = [Request(), Request(semi_hard=0.2), Request(lin=True), Request(beta=10.0)]

    def mine(dtype: torch.dtype, request: Any, precision: str, ids: bool = False, n: int = N, d: int = D) -> None:
        x, y = _inputs(dtype, n, d)
        each = torch.empty(n, dtype=torch.int64, device="meta") if ids else None
        pairs = launch.pair(x, y, n, apart=True)
        launch.statistics(Block(x, y, Masks(n, n, (n, n), ids=each, y_ids=each)), pairs, request, precision)

    def mine_part(dtype: torch.dtype, request: Any, masks: Any) -> None:
        x, y = _inputs(dtype)
        s_pos = x.new_empty(masks.pairs, dtype=torch.float32)
        pairs = types.Pairs(s_pos, launch.pair(x, y, N, apart=True).bounds)
        launch.mine(Block(x, y, masks), pairs, request, "fast")

    def dense(
        dtype: torch.dtype, product: Any, precision: str, every: bool, d: int = D, masks: Any = None
    ) -> None:  # fmt: skip
        x, y = _inputs(dtype, d=d)
        masks = masks or Masks(N, N, (N, N))
        block, share = Block(x, y, masks), x.new_empty(2, masks.pairs, dtype=torch.float32)
        relative = {name: torch.empty_like(share) for name in product.statistics}
        met = types.Dense(product, share[0], launch.pair(x, y, N).bounds, share, relative, every)
        launch.dense_value(block, met, precision)
        launch.dense_block(block, met, (True, True), precision)

    def mined(dtype: torch.dtype, n: int, product: Any, weighed: bool, masks: Any = None) -> None:
        x, y = _inputs(dtype, n)
        masks = masks or Masks(n, n, (n, n))
        of_pairs = x.new_empty(2, masks.pairs, dtype=torch.float32)
        index = torch.empty(2, masks.pairs, dtype=torch.int64, device="meta")
        if weighed:
            found = statistics.Statistics(of_pairs[0], of_pairs, index, None, None, of_pairs, of_pairs)
            launch.weighed(found, product, 1 / n)
        given = types.Mined(index, of_pairs, of_pairs)
        launch.mined_emit(Block(x, y, masks), given, x.new_empty((), dtype=torch.float32), (True, True))

    for dtype in half:
        for request in requests:
            yield "", functools.partial(mine, dtype, request, "fast")
        yield "", functools.partial(mine, dtype, Request(), "fast", ids=True)
    yield "", functools.partial(mine, torch.bfloat16, Request(beta=10.0), "fast", n=SMALL_N)
    yield "", functools.partial(mine, torch.bfloat16, Request(), "fast", n=TINY_N)
    yield "", functools.partial(mine, torch.float32, Request(beta=10.0), "fast", n=TINY_N)
    yield "", functools.partial(mine, torch.bfloat16, Request(), "fast", d=ODD_D)
    for precision in ("fast", "tf32", "exact"):  # float32 inputs: their 16-bit copies, tf32, ieee
        yield "", functools.partial(mine, torch.float32, Request(), precision)
    yield "", functools.partial(mine, torch.float32, Request(semi_hard=0.2), "fast")  # with the copies' own s⁺
    products = [terms.Product(goal.T[T](), goal.P[P]()) for T, P in (("nca", "con"), ("cir", "sig-ms"))]
    for product in products:
        label = f"{product.T.name} × {product.P.name}"
        for every in (True, False):
            yield label, functools.partial(dense, torch.bfloat16, product, "fast", every)
        yield label, functools.partial(mined, torch.float32, SMALL_N, product, True)
    for precision in ("fast", "tf32", "exact"):
        yield label, functools.partial(dense, torch.float32, products[-1], precision, True)
    for dtype in (torch.bfloat16, torch.float32):
        yield label, functools.partial(dense, dtype, products[-1], "exact", True, d=ODD_D)
    for dtype in (torch.bfloat16, torch.float32):
        yield "", functools.partial(mined, dtype, N, products[0], False)
    beside = Masks(N, N, (2 * N, 2 * N), col_offset=N)  # a block beside the diagonal, as ranks have them
    yield "", functools.partial(mine_part, torch.bfloat16, Request(beta=10.0), beside)
    yield label, functools.partial(dense, torch.bfloat16, products[-1], "fast", True, masks=beside)
    yield "", functools.partial(mined, torch.bfloat16, N, products[0], False, masks=beside)


_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def _argument(value: Any) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether it is a multiple of 16; "constexpr" for what is compiled in."""
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", value.storage_offset() * value.element_size() % 16 == 0
    if hasattr(value, "block_shape"):
        return f"tensordesc<{_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>", False
    if isinstance(value, float):
        return "fp32", False
    if not isinstance(value, int) or value == 1:
        return "constexpr", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0


def _fields(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What an argument holds: itself, or the fields of a tuple, by name."""
    if not isinstance(value, tuple):
        yield name, value
        return
    for field, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
        yield from _fields(part, f"{name}.{field}")


def _types(value: Any) -> Any:
    """Triton's name of an argument's type; of a tuple, such names in its shape."""
    if not isinstance(value, tuple):
        return _argument(value)[0]
    types = [_types(part) for part in value]
    return type(value)(*types) if hasattr(value, "_fields") else tuple(types)


def _place(variant: Variant, name: str) -> tuple[int, ...]:
    """Where something stands among the arguments, and in tuples."""
    argument, *fields = name.split(".")
    places, value = [variant.fn.arg_names.index(argument)], variant.signature[argument]
    for field in fields:
        places.append(value._fields.index(field) if hasattr(value, "_fields") else int(field))
        value = value[places[-1]]
    return tuple(places)


def _flags(name: str, given: dict[str, Any]) -> Iterator[str]:
    """What a launch is asked for, in words."""
    words, arithmetic = given.get("WORDS"), given.get("ARITHMETIC")
    asked = {"semi": words and words.semi, "lin": words and words.lin_sum, "exp": words and words.exp_sum}
    if name == "scan" and all(word is None for word in asked.values()):
        yield "argmax"
    if name in ("value", "coefficients") and given["listed"] is None:
        yield "both"
    if given.get("ids") is not None:
        yield "ids"
    yield from (word for word, place in asked.items() if place is not None)
    if arithmetic == "halved" or given.get("HALVED"):
        yield "halved"
    yield from (key.lower() for key, value in given.items() if value is True and key not in ("FOLD", "HALVED"))
    yield ("", "wide", "general")[given.get("WIDE", 0)]
    yield given.get("LISTED", "").replace("none", "")


def _variant(fn: Any, args: Sequence[Any], options: dict[str, Any], label: str) -> Variant:
    """A launch as what it has compiled; its name is made of what tells it from the other launches of the kernel."""
    given = {**dict(zip(fn.arg_names, args, strict=False)), **options}
    warps, stages = given.get("num_warps", 4), given.get("num_stages", 3)
    given = {key: given[key] for key in fn.arg_names}
    compiled_in = {fn.arg_names[parameter.num] for parameter in fn.params if parameter.is_constexpr}
    signature = {key: "constexpr" if key in compiled_in else _types(value) for key, value in given.items()}
    held = dict(pair for key, value in given.items() if key not in compiled_in for pair in _fields(value, key))
    arguments = {key: _argument(value) for key, value in held.items()}
    constexprs = {key: value for key, value in held.items() if arguments[key][0] == "constexpr"}
    constexprs |= {key: given[key] for key in compiled_in}
    kinds = [kind for kind, _ in arguments.values()]
    loaded = next(kind for kind in kinds if kind[0] in "*t").lstrip("*").split("<")[-1].split("[")[0]
    arithmetic, cut = given.get("ARITHMETIC"), given.get("CUT")
    words = [fn.__name__, *_flags(fn.__name__, given)]
    words += [arithmetic if arithmetic and loaded == "fp32" else loaded] if fn.__name__ != "merge" else []
    words += ["parts"] if given.get("PARTS", 1) > 1 else []
    words += ["block"] if getattr(given.get("block"), "ahead", None) is not None else []
    words += ["transposed"] if constexprs.get("w.row") == 1 else []
    words += [label] if any(hasattr(value, "arg_names") for value in given.values()) else []
    words += ["odd"] if ("i32", False) in (arguments.get(key) for key in ("D", "block.D", "size.D")) else []
    product = arithmetic is not None and (loaded != "fp32" or arithmetic != "ieee")
    return Variant(
        name=" ".join(word for word in words if word),
        fn=fn,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(key for key, (_, divisible) in arguments.items() if divisible),
        warps=warps,
        stages=stages,
        elements=cut.height * cut.width / (32 * warps) if product and cut else None,
        product=product,
    )


@functools.cache
def variants(arch: int) -> dict[str, Variant]:
    """By name, everything that launch.py launches on an architecture."""
    found: dict[str, Variant] = {}
    for bulk in (True, False) if arch >= 90 else (False,):
        for label, run in _runs(bulk):
            with _recording(arch, bulk) as launches:
                run()
            for fn, args, options in launches:
                variant = _variant(fn, args, options, label)
                name, count = variant.name, 1
                while name in found and _content(found[name]) != _content(variant):
                    count += 1
                    name = f"{variant.name} #{count}"
                found.setdefault(name, variant._replace(name=name))
    return found


def _content(variant: Variant) -> tuple[object, ...]:
    """What makes two launches of a kernel different kernels, but for what Triton infers from numbers."""
    types = [kind for key, value in variant.signature.items() for _, kind in _fields(value, key)]
    declared = {key: value for key, value in variant.constexprs.items() if key.isupper()}
    return variant.fn, len(types), set(types) - {"i32", "constexpr"}, declared, variant.warps, variant.stages


# ── what it compiles to ─────────────────────────────────────────────────────────────────────────────────────────────


class Row(NamedTuple):
    """What one variant compiled to."""

    variant: str
    arch: int
    product: bool  # whether there have to be tensor-core instructions
    threads: int
    tile: tuple[int, int, int] | None  # height, width, depth
    registers: int = 0  # per thread
    stack: int = 0  # bytes per thread
    shared: int = 0  # bytes per program
    tensor: int = 0  # tensor-core instructions
    local: int = 0  # instructions on local memory
    atomics: int = 0  # float atomics
    locks: int = 0  # compare-and-swaps, exchanges in a loop
    per_element: float | None = None  # instructions per element of S after the last product
    pipes: dict[str, float] = {}  # noqa: RUF012 — of these, by what executes them
    seconds: float = 0.0  # to compile
    error: str = ""  # why there is nothing


_TENSOR = re.compile(r"(?:[HIQBD]G?MMA|UTC\w*MMA)\b")
_FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w:.]*\.(?:f16|f16x2|bf16|bf16x2|f32|f64)\b")
_LABEL = re.compile(r"^\s*(\$?[\w$]+):", re.MULTILINE)
_PIPES = {
    "float": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HFMA2 HADD2 HMUL2",
    "integer": "FMNMX FMNMX3 FSET FSETP FSEL SEL IADD3 VIADD VIMNMX VIMNMX3 IMNMX ISETP LOP3 LEA SHF PRMT SGXT IMAD "
    "VIADDMNMX ISET PLOP3 IABS MOV BMSK P2R R2P I2FP",
    "shuffle": "SHFL CREDUX REDUX",
    "special": "MUFU I2F F2I F2F POPC FLO",
    "memory": "LDS STS LDSM STSM LDG STG LD ST LDTM STTM LDL STL",
}
_PIPE = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}


def resources(text: str) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from `cuobjdump --dump-resource-usage`."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource usage in {text!r}")
    return int(found[1]), int(found[2])


def instructions(sass: str) -> list[str]:
    """Opcodes of a disassembly, in the order in which they stand; NOPs pad and are left out."""
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return [opcode for opcode in found if opcode != "NOP"]


def after_product(opcodes: Sequence[str]) -> list[str]:
    """Those after the last tensor-core instruction; all where there is none."""
    last = max((place for place, opcode in enumerate(opcodes) if _TENSOR.match(opcode)), default=-1)
    return list(opcodes[last + 1 :])


def float_atomics(ptx: str) -> int:
    return len(_FLOAT_ATOMIC.findall(ptx))


def locks(ptx: str) -> int:
    """Compare-and-swaps, and exchanges that a later branch goes back over."""
    labels = {found[1]: found.start() for found in _LABEL.finditer(ptx)}
    loops = [(labels[to], at) for at, to in _branches(ptx) if labels.get(to, at) < at]
    exchanges = [found.start() for found in re.finditer(r"\batom\.[\w:.]*exch\b", ptx)]
    return len(re.findall(r"\batom\.[\w:.]*cas\b", ptx)) + sum(
        any(begin < place < end for begin, end in loops) for place in exchanges
    )


def _branches(ptx: str) -> Iterator[tuple[int, str]]:
    yield from ((found.start(), found[1]) for found in re.finditer(r"\bbra(?:\.uni)?\s+(\$?[\w$]+)", ptx))


def by_pipe(opcodes: Sequence[str]) -> dict[str, int]:
    """How many instructions each part of a multiprocessor gets; `other` for branches, barriers and the like."""
    count = dict.fromkeys([*_PIPES, "other"], 0)
    for opcode in opcodes:
        count[_PIPE.get(opcode.split(".")[0], "other")] += 1
    return count


class Compiled(NamedTuple):
    """What Triton and its disassembler say."""

    ptx: str
    sass: str
    usage: str  # of cuobjdump
    shared: int
    seconds: float


def compiled(variant: Variant, arch: int) -> Compiled:
    """A variant compiled by the installed Triton and taken apart again."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        variant.fn,
        variant.signature,
        constexprs={_place(variant, name): value for name, value in variant.constexprs.items()},
        attrs={_place(variant, name): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    start = time.perf_counter()
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        sass, usage = (
            subprocess.run([tools / command[0], *command[1:], cubin], check=True, capture_output=True, text=True).stdout
            for command in (["nvdisasm", "-c"], ["cuobjdump", "--dump-resource-usage"])
        )
    return Compiled(kernel.asm["ptx"], sass, usage, kernel.metadata.shared, seconds)


def measure(variant: Variant, arch: int) -> Row:
    """One line of the report."""
    cut = variant.constexprs.get("CUT")
    tile = tuple(cut) if cut and cut.depth and variant.product else None
    row = Row(variant.name, arch, variant.product, 32 * variant.warps, tile)
    try:
        found = compiled(variant, arch)
        opcodes = instructions(found.sass)
        inner, seconds = opcodes, found.seconds
        if variant.elements and "INNER" in variant.constexprs:
            other = compiled(variant._replace(constexprs={**variant.constexprs, "INNER": True}), arch)
            inner, seconds = instructions(other.sass), seconds + other.seconds
    except Exception as error:  # whatever Triton raises is the finding
        said = f"{type(error).__name__}: {error}".strip().splitlines()
        return row._replace(error=f"{said[0]} … {said[-1]}"[:400])
    registers, stack = resources(found.usage)
    row = row._replace(
        registers=registers,
        stack=stack,
        shared=found.shared,
        tensor=sum(bool(_TENSOR.match(opcode)) for opcode in opcodes),
        local=sum(opcode.split(".")[0] in ("STL", "LDL") for opcode in opcodes),
        atomics=float_atomics(found.ptx),
        locks=locks(found.ptx),
        seconds=seconds,
    )
    epilogue = after_product(inner)
    if variant.elements is None or len(epilogue) == len(inner):
        return row
    pipes = {pipe: count / variant.elements for pipe, count in by_pipe(epilogue).items()}
    return row._replace(per_element=len(epilogue) / variant.elements, pipes=pipes)


# ── gates ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def gates(row: Row, recorded: float | None) -> list[str]:
    """The gates that a row fails, in words; `recorded`: instructions per element that it may reach."""
    if row.error:
        return [f"does not compile: {row.error}"]
    failed = []
    if row.stack:
        failed.append(f"stack: {row.stack} bytes")
    if row.local:
        failed.append(f"local memory: {row.local} instructions")
    if row.product and not row.tensor:
        failed.append("tensor cores: none, though there is a product")
    if row.atomics:
        failed.append(f"float atomics: {row.atomics}")
    if row.locks:
        failed.append(f"locks: {row.locks}")
    if row.shared > SHARED[row.arch]:
        failed.append(f"shared memory: {row.shared} bytes of {SHARED[row.arch]}")
    if row.per_element is not None and recorded is not None and row.per_element > TOLERANCE * recorded:
        failed.append(f"instructions per element: {row.per_element:.2f}, recorded {recorded:.2f}")
    return failed


Recorded = dict[str, dict[str, dict[str, float]]]


def read_recorded() -> Recorded:
    """Triton's version → variant → architecture → instructions per element."""
    return dict(json.loads(RECORDED.read_text())) if RECORDED.exists() else {}


def updated(known: Recorded, version: str, rows: Sequence[Row], everything: bool) -> Recorded:
    """What is recorded after these rows; `everything`: what is not among them is forgotten."""
    figures: dict[str, dict[str, float]] = {} if everything else {**known.get(version, {})}
    for row in rows:
        if row.per_element is not None:
            figures[row.variant] = {**figures.get(row.variant, {}), str(row.arch): round(row.per_element, 2)}
    return {**known, version: dict(sorted(figures.items()))}


def table(rows: Sequence[Row], known: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown; `known`: what is recorded for this Triton."""
    heads = ["kernel variant", "arch", "tile", "registers", "stack", "shared", "tensor", "local", "float atomics"]
    heads += ["locks", "per element", "recorded", "compile s"]
    lines = []
    for row in rows:
        per_element = "" if row.per_element is None else f"{row.per_element:.2f}"
        recorded = known.get(row.variant, {}).get(str(row.arch))
        against = "" if row.per_element is None else "unrecorded" if recorded is None else f"{recorded:.2f}"
        figures = (row.registers, row.stack, row.shared, row.tensor, row.local, row.atomics, row.locks)
        cells = ["does not compile"] + [""] * 6 if row.error else [str(figure) for figure in figures]
        rest = [per_element, against, f"{row.seconds:.1f}"]
        tile = "×".join(map(str, row.tile or ()))
        lines.append([row.variant, f"sm_{row.arch}", tile, *cells, *rest])
    return markdown(heads, lines)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(cache: str) -> None:
    """A process that compiles: no interpreter, and a cache in which nothing lies yet. Before Triton is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=cache)
    torch.set_num_threads(1)


def _quiet(cache: str) -> None:
    """The same for a process of the pool: the pages that Triton prints before it raises are in nobody's way."""
    prepare(cache)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _work(task: tuple[int, str]) -> Row:
    arch, name = task
    return measure(variants(arch)[name], arch)


def run(tasks: Sequence[tuple[int, str]]) -> list[Row]:
    """Rows of (architecture, variant) pairs, in their order, compiled by as many processes as there are processors."""
    rows: dict[tuple[int, str], Row] = {}
    context = multiprocessing.get_context("spawn")
    processes = max(1, min(os.cpu_count() or 1, len(tasks)))
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ProcessPoolExecutor(processes, context, _quiet, (cache,)) as pool,
    ):
        waiting = {pool.submit(_work, task): task for task in tasks}
        for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            rows[waiting[future]] = future.result()
            show(f"compiled {done} of {len(tasks)}: {waiting[future][1]}, sm_{waiting[future][0]}")
    show("")
    return [rows[task] for task in tasks]


def chosen(archs: Sequence[int], only: Sequence[str], subset: bool) -> list[tuple[int, str]]:
    """(architecture, variant) pairs to compile. Raises SystemExit for a name that nothing has."""
    tasks = [(arch, name) for arch in archs for name in variants(arch)]
    if subset:
        missing = [(arch, name) for arch in archs for name in SUBSET[arch] if (arch, name) not in tasks]
        if missing:
            raise SystemExit(f"the subset names variants that do not exist: {missing}")
        tasks = [(arch, name) for arch, name in tasks if name in SUBSET[arch]]
    for part in only:
        if not any(part in name for _, name in tasks):
            raise SystemExit(f"no variant is called {part!r}; there are:\n" + "\n".join(sorted({n for _, n in tasks})))
    return [task for task in tasks if not only or any(part in task[1] for part in only)]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    made.add_argument("--only", nargs="+", default=[], metavar="NAME", help="variants whose names contain one of these")
    made.add_argument("--subset", action="store_true", help="ten variants, for continuous integration")
    made.add_argument("--triton", metavar="PATH", help="a folder with another version of Triton")
    made.add_argument("--record", action="store_true", help="make what is found now the recorded instruction counts")
    made.add_argument("--save", action="store_true", help="keep the rows as JSON under benchmarks/results/")
    return made


def elsewhere(path: str, arguments: Sequence[str]) -> int:
    """The exit status of the same command with another Triton."""
    given = os.pathsep.join(filter(None, (str(Path(path).resolve()), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.compile_report", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": given}, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.triton:
        place = list(arguments).index("--triton") if "--triton" in arguments else -1
        rest = [*arguments[:place], *arguments[place + 2 :]] if place >= 0 else []
        if place < 0:  # --triton=PATH
            rest = [one for one in arguments if not one.startswith("--triton")]
        return elsewhere(options.triton, rest)
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    start = time.perf_counter()
    tasks = chosen(options.arch, options.only, options.subset)
    rows = run(tasks)
    known = read_recorded()
    version = triton.__version__
    if options.record:
        everything = not options.only and not options.subset and set(options.arch) == set(ARCHS)
        known = updated(known, version, rows, everything)
        RESULTS.mkdir(exist_ok=True)
        RECORDED.write_text(json.dumps(known, indent=1) + "\n")
    figures = known.get(version, {})
    told = conditions("benchmarks.compile_report", arguments, triton=version)
    print(table(rows, figures))
    print(f"\n{facts(told)}")
    print(f"{len(rows)} variants in {time.perf_counter() - start:.0f} s")
    if options.save:
        keep(f"compile-{told['date']}-triton-{version}", told, [row._asdict() for row in rows])
    failed = [
        f"{row.variant}, sm_{row.arch}: {gate}"
        for row in rows
        for gate in gates(row, figures.get(row.variant, {}).get(str(row.arch)))
    ]
    for each in failed:
        print(f"gate failed: {each}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
