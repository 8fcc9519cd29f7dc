"""The compile report's gates on kernels that are bad on purpose, its reading of real compiles; the model's limits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# for as long as it takes: nothing else at the root is to be imported, least of all kernels/
sys.path.insert(0, str(ROOT))

from benchmarks import compile_report as report  # noqa: E402
from benchmarks import model  # noqa: E402
from benchmarks.compile_report import Row  # noqa: E402

sys.path.remove(str(ROOT))

PLANTED = """
import triton
import triton.language as tl

@triton.jit
def good(x, y, out, B: tl.constexpr):
    r = tl.arange(0, B)
    s = tl.dot(tl.load(x + r[:, None] * B + r[None, :]), tl.load(y + r[:, None] * B + r[None, :]).T)
    tl.store(out + r, tl.max(s, 1))

@triton.jit
def spills(x, out, B: tl.constexpr):
    r = tl.arange(0, B)
    s = tl.load(x + r).to(tl.float32)
    tl.store(out + r, s - tl.sum(s, 0))

@triton.jit
def float_atomic(x, out, B: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, B), tl.load(x + tl.arange(0, B)).to(tl.float32))

@triton.jit
def integer_atomic(x, out, B: tl.constexpr):
    tl.atomic_max(out + tl.arange(0, B), tl.load(x + tl.arange(0, B)).to(tl.int32))

@triton.jit
def compares_and_swaps(x, out, B: tl.constexpr):
    while tl.atomic_cas(out, 0, 1) == 1:
        pass

@triton.jit
def spins(x, out, B: tl.constexpr):
    while tl.atomic_xchg(out, 1) == 1:
        pass

@triton.jit
def exchanges_once(x, out, B: tl.constexpr):
    tl.store(out + 1, tl.atomic_xchg(out, 1))
"""

COMPILE = """
import json, sys
from benchmarks import compile_report as report
report.prepare(sys.argv[1])
import planted
from goal.kernels import launch
from goal.engine.statistics import Request

def variant(name, out, block, warps, elements=None, product=False):
    fn = getattr(planted, name)
    types = {"x": "*fp16", "y": "*fp16", "out": out, "B": "constexpr"}
    signature = {key: types[key] for key in fn.arg_names}
    pointers = tuple(key for key in fn.arg_names if key != "B")
    return report.Variant(name, fn, signature, {"B": block}, pointers, warps, 2, elements, product)

variants = [
    variant("good", "*fp32", 64, 4, 32.0, True),
    variant("spills", "*fp32", 8192, 1),
    variant("float_atomic", "*fp32", 64, 1, product=True),
    variant("integer_atomic", "*i32", 64, 1),
    variant("compares_and_swaps", "*i32", 64, 1),
    variant("spins", "*i32", 64, 1),
    variant("exchanges_once", "*i32", 64, 1),
    variant("good", "*fp32", 48, 4)._replace(name="no power of two"),
]
launched = {arch: report.variants(arch) for arch in report.ARCHS}
good = report.compiled(variants[0], 90).sass
print(json.dumps({
    "status": report.main(["--arch", "90", "--only", "scale_back"]),
    "rows": {each.name: report.measure(each, 90) for each in variants},
    "opcodes": report.instructions(good),
    "sass": good,
    "names": {arch: list(found) for arch, found in launched.items()},
    "kernels": sorted({f"{each.fn.fn.__module__}.{each.fn.__name__}" for each in launched[90].values()}),
    "scan": launched[90]["scan argmax tma bf16"][2:],
    "pointers": launched[90]["scan argmax bf16"][2:],
    "warps": [launched[90]["scan lin tma bf16"].warps, launched[100]["scan lin tma bf16"].warps],
    "asked": [launch.tiling(Request(lin=True), "half", capability).warps for capability in ((9, 0), (10, 0))],
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds in which Triton compiles, whatever this one was started with."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, folder]))
    command = [sys.executable, "-c", COMPILE, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    *said, last = ran.stdout.splitlines()
    return {**json.loads(last), "said": "\n".join(said)}


@pytest.fixture(scope="module")
def rows(found: dict[str, Any]) -> dict[str, Row]:
    return {name: Row(*row) for name, row in found["rows"].items()}


# ── gates ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_good_kernel_passes_every_gate(rows: dict[str, Row]) -> None:
    assert report.gates(rows["good"], None) == []
    assert report.gates(rows["integer_atomic"], None) == []
    assert report.gates(rows["exchanges_once"], None) == []


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        ("spills", ["stack", "local memory"]),
        ("float_atomic", ["tensor cores", "float atomics"]),
        ("compares_and_swaps", ["locks"]),
        ("spins", ["locks"]),
        ("no power of two", ["does not compile"]),
    ],
)
def test_what_is_bad_fails_by_name(rows: dict[str, Row], kernel: str, names: list[str]) -> None:
    assert [failed.split(":")[0] for failed in report.gates(rows[kernel], None)] == names


@pytest.mark.parametrize("arch", report.ARCHS)
def test_shared_memory_is_held_to_the_chip(rows: dict[str, Row], arch: int) -> None:
    limit = report.SHARED[arch]
    assert report.gates(rows["good"]._replace(arch=arch, shared=limit), None) == []
    (failed,) = report.gates(rows["good"]._replace(arch=arch, shared=limit + 1), None)
    assert failed.startswith("shared memory")


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_real_compile_is_read_whole(found: dict[str, Any], rows: dict[str, Row]) -> None:
    row, opcodes = rows["good"], found["opcodes"]
    lines = [line for line in found["sass"].splitlines() if re.match(r"\s+/\*[0-9a-f]+\*/", line)]
    assert len(opcodes) == sum("NOP" not in line for line in lines) > 50
    assert "EXIT" in opcodes
    assert any(opcode.startswith("LDG") for opcode in opcodes)
    assert row.tensor == sum("GMMA" in line for line in lines) > 0
    assert 16 <= row.registers <= 255
    assert 64 * 64 * 2 <= row.shared <= report.SHARED[90]


def test_the_epilogue_is_what_follows_the_last_product(found: dict[str, Any], rows: dict[str, Row]) -> None:
    after = report.after_product(found["opcodes"])
    assert 32 <= len(after) < len(found["opcodes"])  # at least the maxima of 32 elements
    assert not any("MMA" in opcode for opcode in after)
    assert any(opcode.startswith("STG") for opcode in after)
    assert rows["good"].per_element == len(after) / 32
    assert sum(report.by_pipe(after).values()) == len(after)
    assert report.by_pipe(after)["shuffle"] >= 2
    assert sum(rows["good"].pipes.values()) == pytest.approx(rows["good"].per_element)
    assert rows["integer_atomic"].per_element is None


@pytest.mark.parametrize(
    ("opcode", "count"),
    [
        ("atom.global.gpu.acq_rel.add.f32", 1),
        ("red.global.add.noftz.bf16x2", 1),
        ("atom.global.v2.f32.add", 1),
        ("atom.shared::cta.max.s32", 0),
        ("red.global.add.u64", 0),
        ("add.f32", 0),
    ],
)
def test_float_atomics(opcode: str, count: int) -> None:
    assert report.float_atomics(f"\t@%p1 {opcode} %r1, [ %rd1 + 0 ], %r2;\n") == count


def test_an_exchange_is_a_lock_only_inside_a_loop() -> None:
    once = "$L0:\n\tatom.global.exch.b32 %r1, [%rd1], %r2;\n\t@%p1 bra $L1;\n$L1:\n\tret;\n"
    assert report.locks(once) == 0
    assert report.locks(once.replace("bra $L1", "bra $L0")) == 1
    assert report.locks("\tatom.relaxed.global.cas.b16 %r1, [%rd1], %r2, %r3;\n") == 1


# ── what is compiled is what is shipped ─────────────────────────────────────────────────────────────────────────────


def test_every_kernel_that_is_launched_is_compiled(found: dict[str, Any]) -> None:
    launched = re.findall(r"\b(\w+)\.(\w+)\[\(", (ROOT / "kernels" / "launch.py").read_text())
    assert len(launched) >= 11
    assert {f"goal.kernels.{module}.{name}" for module, name in launched} == set(found["kernels"])


def test_a_variant_is_what_a_launch_would_compile(found: dict[str, Any]) -> None:
    signature, constexprs, divisible, warps, _, elements, product = found["scan"]
    height, width, depth = constexprs["CUT"]
    assert signature["x"] == f"tensordesc<bf16[{height},{depth}]>"
    assert signature["y"] == f"tensordesc<bf16[{width},{depth}]>"
    assert signature["s_pos"] == ["*fp32", "*fp32"]
    assert signature["numbers"] == ["fp32"] * 4
    assert (constexprs["TMA"], constexprs["INNER"], constexprs["ids"]) == (True, False, None)
    assert {"block.N", "block.D", "s_pos.rows"} <= set(divisible)
    assert constexprs["block.row_offset"] is None  # all of S
    assert not {"numbers.margin", "ids"} & set(divisible)
    signature, constexprs, divisible, *_ = found["pointers"]
    assert signature["x"] == ["*bf16", "i32", "constexpr"]  # a pointer, a row's stride, and a column's, which is 1
    assert constexprs["x.col"] == 1
    assert {"x.at", "x.row"} <= set(divisible)
    assert elements == height * width / (32 * warps)
    assert product


def test_a_variant_is_cut_for_its_architecture(found: dict[str, Any]) -> None:
    assert found["warps"] == found["asked"]


def test_the_subset_is_small_and_exists(found: dict[str, Any]) -> None:
    assert set(report.SUBSET) == set(report.ARCHS)
    assert sum(map(len, report.SUBSET.values())) <= 12
    for arch, names in report.SUBSET.items():
        assert set(names) <= set(found["names"][str(arch)])


def test_without_a_tensor_memory_accelerator_there_are_pointers(found: dict[str, Any]) -> None:
    assert not any(" tma " in name for name in found["names"]["80"])
    for arch in ("90", "100"):
        scans = [name for name in found["names"][arch] if name.startswith("scan ")]
        assert {name.replace(" tma", "") for name in scans if " tma" in name} <= set(scans)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("factor", "status"), [(1.04, 0), (1.06, 1), (None, 0)])
def test_more_instructions_than_recorded_end_with_an_error(
    factor: float | None,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import triton

    row = Row("scan argmax tma bf16", 90, True, 128, (128, 128, 64), registers=168, tensor=8, per_element=8.0)
    known = {} if factor is None else {triton.__version__: {row.variant: {"90": 8.0 / factor}}}
    (tmp_path / "recorded.json").write_text(json.dumps(known))
    monkeypatch.setattr(report, "RECORDED", tmp_path / "recorded.json")
    monkeypatch.setattr(report, "chosen", lambda *_: [(90, row.variant)])
    monkeypatch.setattr(report, "run", lambda _: [row])
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command takes it away; this brings it back
    assert report.main(["--arch", "90"]) == status
    said = capsys.readouterr()
    assert ("gate failed: scan argmax tma bf16, sm_90: instructions per element: 8.00" in said.err) == bool(status)
    assert ("unrecorded" in said.out) == (factor is None)


def test_recording_keeps_what_was_not_compiled() -> None:
    row = Row("scan", 90, True, 128, None, per_element=8.126)
    known = {"1.0": {"scan": {"90": 1.0}}, "2.0": {"scan": {"80": 7.0}, "gone": {"90": 3.0}}}
    assert report.updated(known, "2.0", [row], everything=False) == {
        "1.0": {"scan": {"90": 1.0}},
        "2.0": {"gone": {"90": 3.0}, "scan": {"80": 7.0, "90": 8.13}},
    }
    assert report.updated(known, "2.0", [row], everything=True)["2.0"] == {"scan": {"90": 8.13}}


def test_the_command_compiles_and_prints_a_table(found: dict[str, Any]) -> None:
    assert found["status"] == 0
    assert re.search(
        r"^\| scale_back fp32 \| sm_90 \|  \| \d+ \| 0 \| 0 \| 0 \| 0 \| 0 \| 0 \|", found["said"], re.MULTILINE
    )


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────

PIPES = {"float": 2.0, "integer": 5.0, "shuffle": 0.5, "special": 1.0, "memory": 0.5, "other": 0.5}
SCAN = Row(
    "scan exp tma fp16", 90, True, 128, (128, 128, 64), registers=168, shared=98328, per_element=9.5, pipes=PIPES
)


@pytest.mark.parametrize("chip", model.CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (100, 33), (4096, 512), (32768, 1024)])
@pytest.mark.parametrize("arithmetic", ["fp16", "tf32"])
def test_nothing_is_expected_to_beat_the_bare_product(chip: model.Chip, n: int, d: int, arithmetic: str) -> None:
    found = model.expected(SCAN._replace(arch=chip.arch), chip, n, n, d, arithmetic)
    assert 0 < found.fraction <= 1
    assert found.fraction == found.floor / found.total
    assert found.total >= max(found.floor, found.product, found.epilogue, found.memory, found.fill or 0)
    assert found.product >= found.floor


@pytest.mark.parametrize("chip", model.CHIPS, ids=lambda chip: chip.name)
def test_more_work_takes_longer(chip: model.Chip) -> None:
    row = SCAN._replace(arch=chip.arch)
    base = model.expected(row, chip, 4096, 4096, 512, "fp16").total
    assert model.expected(row, chip, 8192, 4096, 512, "fp16").total > base
    assert model.expected(row, chip, 4096, 8192, 512, "fp16").total > base
    assert model.expected(row, chip, 4096, 4096, 1024, "fp16").total > base
    slow = row._replace(pipes={pipe: 100 * count for pipe, count in PIPES.items()})
    assert model.expected(slow, chip, 4096, 4096, 512, "fp16").total > base
    assert model.expected(row, chip, 4096, 4096, 512, "tf32").total > base


def test_a_program_alone_hides_nothing() -> None:
    chip = model.CHIPS[1]._replace(l2=None)
    alone = model.expected(SCAN._replace(registers=255, threads=256), chip, 4096, 4096, 128, "fp16")
    beside = model.expected(SCAN, chip, 4096, 4096, 128, "fp16")
    assert (alone.programs, beside.programs) == (1, 2)
    assert alone.total == alone.product + alone.epilogue
    assert beside.total == max(beside.product, beside.epilogue)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "programs"),
    [(168, 98328, 128, 2), (168, 0, 128, 3), (255, 0, 128, 2), (255, 0, 256, 1), (32, 0, 1024, 2), (16, 0, 32, 32)],
)
def test_programs_on_a_multiprocessor(registers: int, shared: int, threads: int, programs: int) -> None:
    assert model.programs(SCAN._replace(registers=registers, shared=shared, threads=threads)) == programs


def test_the_scarcest_pipe_counts() -> None:
    assert model.cycles({"float": 12.0, "integer": 3.0}) == 15 / 128
    assert model.cycles({"float": 1.0, "integer": 16.0}) == 16 / 64
    assert model.cycles({"float": 1.0, "special": 2.0}) == 2 / 16
    assert model.cycles({"other": 64.0}) == 0.5


def test_the_formulas_by_hand() -> None:
    chip = model.Chip("unit", 90, 10, 1e9, {"fp16": 1e12}, 1e11, 1e12)
    found = model.expected(SCAN._replace(tile=(128, 64, 64)), chip, 1000, 500, 100, "fp16")
    elements, deep = 1024 * 512, 128
    assert found.floor == pytest.approx(2 * 1000 * 500 * 100 / 1e12)
    assert found.product == pytest.approx(2 * elements * deep / 1e12)
    assert found.epilogue == pytest.approx(elements * 5 / 64 / 1e10)
    assert found.fill == pytest.approx(elements * (1 / 128 + 1 / 64) * deep * 2 / 1e12)
    assert found.memory == pytest.approx((1500 * 100 * 2 + 8 * elements * (1 / 128 + 1 / 64)) / 1e11)


def test_the_table_says_what_it_is(
    rows: dict[str, Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"rows": [SCAN._asdict(), rows["good"]._asdict()]}))
    read = model.read(tmp_path / "report.json")
    assert read == [SCAN, rows["good"]]
    assert model.scans(read, 90) == [SCAN]
    monkeypatch.setattr(sys, "argv", ["model", "--n", "4096", "--report", str(tmp_path / "report.json")])
    model.main()
    said = capsys.readouterr().out
    assert said.startswith("Expected, not measured")
    assert said.count("| scan exp tma fp16 | 128×128×64 | 2 |") == 2  # H100 and H200
