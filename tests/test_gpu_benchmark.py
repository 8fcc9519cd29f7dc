"""benchmarks.gpu without a GPU: its arithmetic, its gate on interpreted kernels, and one whole call on a stand-in."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import goal
from benchmarks import gpu, report
from benchmarks.gpu import BARE, DENSE, EXP, HARDEST, LIN, MINED, OBJECTIVES, TARGET, Budget, Finding, Group, Verdict

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")

# ── samples and time ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_summary_is_the_median_and_the_outer_tenths() -> None:
    assert gpu.summary([float(ms) for ms in (*range(10, -1, -1),)]) == (5.0, 1.0, 9.0)
    assert gpu.summary([1.0, 1.0, 1.0, 500.0])[0] == 1.0
    assert gpu.summary([3.0]) == (3.0, 3.0, 3.0)


def test_a_budget_is_spent_by_the_clock() -> None:
    now = [100.0]
    budget = Budget(60, clock=lambda: now[0])
    assert budget.fits(60)
    assert not budget.fits(61)
    now[0] = 130.0
    assert budget.left() == 30.0
    assert not budget.fits(31)


def test_rounds_are_as_many_as_fit_within_bounds() -> None:
    assert gpu.rounds_in(10.0, 1.0) == 10
    assert gpu.rounds_in(10.0, 9.0) == 5
    assert gpu.rounds_in(10.0, 9.0, least=2) == 2
    assert gpu.rounds_in(10.0, 0.001) == gpu.rounds_in(10.0, 0.0) == 50


def test_what_the_targets_need_comes_first_and_nothing_is_lost() -> None:
    groups = gpu.by_importance(gpu.SIZES, gpu.DIMS, gpu.DTYPES)
    assert groups[:2] == [TARGET, TARGET._replace(dtype="fp32")]
    assert len(groups) == len(set(groups)) == len(gpu.SIZES) * len(gpu.DIMS) * len(gpu.DTYPES)
    assert {(group.d, group.dtype) for group in groups[2:7]} == {(1024, "bf16")}
    assert groups.index(Group(8192, 1024, "bf16")) < groups.index(Group(8192, 512, "fp16"))
    assert gpu.by_importance([128], [256], ["fp16"]) == [Group(128, 256, "fp16")]


def test_the_default_work_does_not_fit_by_estimate_of_the_largest_first() -> None:
    """N = 1,048,576 has to be worth trying in eight minutes, and its estimate has to know that little is timed."""
    largest = Group(gpu.LARGEST, 1024, "bf16")
    assert largest.huge
    assert not Group(gpu.SIZES[-1], 1024, "bf16").huge
    assert 30 < largest.seconds < 120
    assert largest.gate_seconds < 60
    assert Group(128, 256, "bf16").seconds < 3


# ── the gate's decision ─────────────────────────────────────────────────────────────────────────────────────────────

GREEN = Finding("case", "bf16", 2e-3, 1e-3, 2e-3, 1e-3, 4e-3, 0.01, 1e-6, 2e-6)


def test_twice_the_eager_error_and_two_roundings_are_allowed() -> None:
    assert gpu.faults(GREEN) == []
    assert gpu.faults(GREEN._replace(worst=9.9e-3, typical=9.9e-3)) == []
    assert gpu.faults(Finding("looked at the regret alone", "bf16", regret=1e-6, regret_allowed=1e-6)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"worst": 1.1e-2},
        {"typical": 1.1e-2},
        {"left_out": 0.03},
        {"regret": 3e-6},
        {"worst": float("nan")},
        {"typical": float("nan")},
        {"regret": float("nan")},
        {"worst_of_eager": float("nan")},
        {"regret": float("inf")},
        {"differing": 1},
        {"reached": False},
        {"raised": "RuntimeError: out of shared memory"},
    ],
    ids=str,
)
def test_each_fault_is_seen(wrong: dict[str, Any]) -> None:
    bad = GREEN._replace(**wrong)
    assert len(gpu.faults(bad)) == 1
    assert gpu.is_red([GREEN, bad, GREEN])
    assert not gpu.is_red([GREEN, GREEN])
    assert gpu.faults(bad)[0] in gpu.gate_table([GREEN, bad])


def test_a_gate_that_has_looked_at_nothing_is_red() -> None:
    findings, left_out = gpu.gate(["bf16", "fp16"], "cpu", gpu.Scale(), 0, Budget(0))
    assert findings == []
    assert len(left_out) == 2 * len(gpu.CASES)
    assert gpu.is_red(findings)


def test_only_what_has_passed_all_its_cases_is_timed() -> None:
    findings = [GREEN._replace(case=case.name) for case in gpu.CASES]
    assert gpu.passed(findings, "bf16") == list(OBJECTIVES)
    assert gpu.passed(findings, "fp16") == []
    assert gpu.passed([each for each in findings if each.case != "N > M"], "bf16") == [
        name for name in OBJECTIVES if name != EXP
    ]


def test_every_objective_is_in_a_case_of_the_gate_and_in_every_arithmetic() -> None:
    assert {case.objective for case in gpu.CASES} == set(OBJECTIVES)
    assert set(gpu.chosen_arithmetics(gpu.DTYPES)) == set(gpu.ARITHMETICS)
    assert gpu.chosen_arithmetics(["fp32"]) == ["fp32 fast", "fp32 tf32", "fp32 exact"]


# ── what the gate measures ──────────────────────────────────────────────────────────────────────────────────────────


def test_regret_is_what_the_choice_costs() -> None:
    s = torch.tensor([[9.0, 3.0, 2.0], [1.0, 9.0, 5.0], [4.0, 4.0, 9.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    live = ~torch.eye(4, 3, dtype=torch.bool)
    live[3] = False
    inf = float("inf")
    assert gpu.regret(s, live, torch.tensor([1, 2, 1, -1])).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert gpu.regret(s, live, torch.tensor([2, 0, 0, -1])).tolist() == [1.0, 4.0, 0.0, 0.0]
    assert gpu.regret(s, live, torch.tensor([0, -1, 2, 0])).tolist() == [inf, inf, inf, inf]


def test_errors_are_relative_and_a_nan_stays_one() -> None:
    true = [torch.tensor([[1.0, -4.0]], dtype=torch.float64), torch.tensor([[2.0, 0.0]], dtype=torch.float64)]
    worst, typical = gpu.errors([true[0] + torch.tensor([[0.0, 2.0]]), true[1]], true)
    assert worst == pytest.approx(0.5)
    assert typical == pytest.approx((2 / 8.5) ** 0.5)
    worst, typical = gpu.errors([true[0], true[1] * torch.nan], true)
    assert worst != worst
    assert typical != typical


def decided(objective: str, s: Tensor, within: float) -> list[bool]:
    live = ~torch.eye(len(s), dtype=torch.bool)
    return gpu.doubtful(objective, s, live, s.diagonal(), gpu.Rounding(within, within, within)).tolist()


SIMILARITIES = torch.tensor([[0.8, 0.3, 0.1], [0.4, 0.7, 0.0], [0.2, 0.5, 0.9]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "entry", "value"),
    [
        (HARDEST, (0, 2), 0.3),  # a tie
        (HARDEST, (0, 1), 0.6),  # the hinge
        ("vse0", (0, 2), 0.6),
        ("nca × con, semi-hard", (0, 1), 0.8),  # at s⁺
        ("nca × con, semi-hard", (0, 1), 0.6),  # at s⁺ − margin
        ("t-selhn", (0, 1), 0.79),  # ε
        (EXP, (0, 2), 0.6),  # the valid negatives: min s⁺ − 0.1
        (EXP, (0, 1), 0.8),  # the valid positives: s⁺ of row 2 − 0.1
        (LIN, (1, 1), 0.8),  # equal s⁺
    ],
)
def test_a_decision_within_the_rounding_is_doubtful(objective: str, entry: tuple[int, int], value: float) -> None:
    s = SIMILARITIES.clone()
    assert decided(objective, s, 1e-6) == [False] * 3
    s[entry] = value + 1e-9
    assert decided(objective, s, 1e-6)[entry[0]]
    assert not decided(objective, s, 1e-12)[entry[0]]


@pytest.mark.parametrize("data", ["spread", "close", "apart", "collapsed", "hub"])
def test_batches_are_what_they_say(data: str) -> None:
    x, y = gpu.batch(data, 240, 200, 128, torch.Generator().manual_seed(1))
    assert (x.norm(dim=1) - 1).abs().max() < 1e-12
    assert (y.norm(dim=1) - 1).abs().max() < 1e-12
    s, s_pos = x @ y.T, (x[:200] * y).sum(1)
    s.diagonal().fill_(-1)
    if data in ("spread", "hub"):
        assert not torch.equal(x, gpu.batch(data, 240, 200, 128, torch.Generator().manual_seed(2))[0])
    if data == "spread":
        assert 0.0 < s_pos.min() < 0.2
        assert (s[:200].amax(1) > 0.67).double().mean() > 0.7
    if data == "close":
        assert (s_pos > s[:200].amax(1)).double().mean() > 0.6
    if data == "apart":
        assert s_pos.min() > 0.05
        assert s_pos.max() < 0.35
        assert ((s - s_pos.mean() + 0.2).abs() < 0.05).double().mean() < 0.01
    if data == "collapsed":
        assert s[::2, ::2][s[::2, ::2] > -1].min() > 0.99
    if data == "hub":
        assert (s[1:].argmax(1) == 0).double().mean() > 0.95
        assert (s[:, 1:].argmax(0) == 0).double().mean() > 0.95


# ── the gate itself, on interpreted kernels ─────────────────────────────────────────────────────────────────────────

CASE = {case.name: case for case in gpu.CASES}
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")


@interpreted
@pytest.mark.parametrize(
    ("name", "arithmetic", "n"),
    [
        (HARDEST, "fp16", 32),
        ("semi-hard", "fp32 exact", 32),
        ("t-selhn, half the batch collapsed", "bf16", 24),
        ("N < M, odd D", "fp32 tf32", 30),
    ],
)
def test_the_gate_is_green_for_the_kernels(name: str, arithmetic: str, n: int) -> None:
    found = gpu.examine(CASE[name], arithmetic, gpu.Scale(n, 64, repeats=0), "cpu", seed=3)
    assert gpu.faults(found) == []
    assert found.worst is not None
    assert found.worst > 0
    assert found.worst_of_eager > 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Any], Any]]:
    """PyTorch's implementation wherever kernels are asked for, through a function that may spoil what they return."""
    spoil: dict[str, Callable[[Any], Any]] = {"by": lambda found: found}

    def instead(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, impl: str = "auto", precision: str = "fast", **rest: Any) -> Any:
            found = real(*args, impl="torch", **rest)
            return spoil["by"](found) if impl == "triton" and isinstance(found, tuple) else found

        return call

    monkeypatch.setattr(goal, "gradients", instead(goal.gradients))
    monkeypatch.setattr(goal, "apply", instead(goal.apply))
    return spoil


def scaled(found: Any) -> Any:
    return found[0] * 1.001, found[1], found[2]


def one_row(found: Any) -> Any:
    gy = found[1].clone()
    gy[5] = 0
    return found[0], gy, found[2]


def not_finite(found: Any) -> Any:
    gx = found[0].clone()
    gx[0, 0] = torch.nan
    return gx, found[1], found[2]


def another_negative(found: Any) -> Any:
    index = found[2].index.clone()
    index[1, 4] = (index[1, 4] + 1) % index.shape[1]
    return found[0], found[1], found[2]._replace(index=index)


def last_bit(found: Any) -> Any:
    gx = found[0].clone()
    gx[0, 0] *= 1 + torch.finfo(gx.dtype).eps
    return gx, found[1], found[2]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (scaled, "rms error"),
        (one_row, "largest error"),
        (not_finite, "largest error nan"),
        (another_negative, "regret"),
        (last_bit, "differ in bits"),
    ],
)
def test_the_gate_sees_a_wrong_gradient(
    stand_in: dict[str, Callable[[Any], Any]], spoil: Callable[[Any], Any], fault: str
) -> None:
    scale = gpu.Scale(48, 64, repeats=3)
    for name in (HARDEST, "with ids"):
        assert gpu.faults(gpu.examine(CASE[name], "fp32 exact", scale, "cpu", seed=3)) == []
    stand_in["by"] = spoil
    for name in (HARDEST, "with ids"):
        assert fault in "; ".join(gpu.faults(gpu.examine(CASE[name], "fp32 exact", scale, "cpu", seed=3)))


def test_the_gate_sees_a_wrong_negative_at_the_size_that_is_timed(stand_in: dict[str, Callable[[Any], Any]]) -> None:
    group = Group(96, 32, "fp32")
    found, share = gpu.examine_size(group, "cpu", held=1000)
    assert gpu.faults(found) == []
    assert share == 1.0
    stand_in["by"] = another_negative
    found, share = gpu.examine_size(group, "cpu", held=1000)
    assert "regret" in gpu.faults(found)[0]
    assert share == pytest.approx(1 - 1 / 192)


def test_a_case_that_raises_is_red_and_the_others_are_still_examined(
    stand_in: dict[str, Callable[[Any], Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def spoil(found: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of resources\nand more")
        return found

    stand_in["by"] = spoil
    cases = [CASE[HARDEST], CASE["vse0"]]
    findings, _ = gpu.gate(["fp32 exact"], "cpu", gpu.Scale(48, 64, 0), 3, cases=cases)
    assert [gpu.faults(each) for each in findings] == [["RuntimeError: out of resources"], []]
    assert "vse0, fp32 exact: green" in capsys.readouterr().err


# ── rows and targets ────────────────────────────────────────────────────────────────────────────────────────────────


def row(
    what: str, part: str, ms: float, dtype: str = "bf16", memory: float | None = None, n: int = TARGET.n
) -> gpu.Row:
    return gpu.row_of(TARGET._replace(dtype=dtype, n=n), what, part, [ms], [0.1], memory)


def rows() -> list[gpu.Row]:
    """One that meets every target by a quarter or so."""
    found = [row(BARE, "forward", 3.0), row(BARE, "forward", 9.0, "fp32"), row(DENSE, "both", 32.0)]
    for name in OBJECTIVES:
        found += [row(name, "forward", 3.2), row(name, "backward", 0.2), row(name, "both", 4.0, memory=100.0)]
        found.append(row(name, "both", 4.2, "fp32"))
    return found


def test_a_row_says_what_was_computed_in_what_time() -> None:
    found = gpu.row_of(TARGET, HARDEST, "both", [4.0, 2.0, 3.0], [0.5, 0.7, 0.6], 12.0)
    assert (found["ms"], found["host_ms"], found["memory_mb"]) == (3.0, 0.6, 12.0)
    assert found["samples"] == [4.0, 2.0, 3.0]
    assert found["tflops"] == pytest.approx(2 * 32768**2 * 1024 / 3e-3 / 1e12)
    assert row("vse0", "both", 3.0)["tflops"] == pytest.approx(4 * found["tflops"])
    assert row(HARDEST, "backward", 3.0)["tflops"] is None


def test_ratios_are_to_the_bare_product_of_the_same_group() -> None:
    found = [*rows(), row(HARDEST, "both", 1.0, n=128)]
    gpu.compare(found)
    by = {(each["n"], each["dtype"], each["what"], each["part"]): each["of_product"] for each in found}
    assert by[TARGET.n, "bf16", HARDEST, "both"] == pytest.approx(4 / 3)
    assert by[TARGET.n, "fp32", HARDEST, "both"] == pytest.approx(4.2 / 9)
    assert by[128, "bf16", HARDEST, "both"] is None


COUNTS = dict.fromkeys(MINED, 5)


def test_targets_are_read_from_the_rows() -> None:
    found = gpu.verdicts(rows(), COUNTS, 0.9999)
    expected = [3 / 3.2, 3 / 3.2, 3 / 3.2, 0.2, 8.0, 100.0, 1.05, 0.9999, 5.0]
    assert [each.value for each in found] == pytest.approx(expected)
    assert all(each.met for each in found)


@pytest.mark.parametrize(
    ("position", "spoiled"),
    [
        (0, [row(HARDEST, "forward", 3.8)]),
        (1, [row(LIN, "forward", 4.1)]),
        (2, [row(EXP, "forward", 4.4)]),
        (3, [row(MINED[-1], "backward", 0.31)]),
        (4, [row(DENSE, "both", 23.0)]),
        (5, [row("t-selhn", "both", 4.0, memory=151.0)]),
        (6, [row(MINED[1], "both", 4.7, "fp32")]),
    ],
)
def test_one_number_misses_one_target(position: int, spoiled: list[gpu.Row]) -> None:
    found = gpu.verdicts([*spoiled, *rows()], COUNTS, 0.9999)
    assert [each.met for each in found] == [at != position for at in range(len(found))]
    assert str(found[position]).startswith("missed by")


def test_counts_and_regret_miss_theirs() -> None:
    assert [each.met for each in gpu.verdicts(rows(), {**COUNTS, EXP: 7}, 0.99)][-2:] == [False, False]


def test_what_was_not_measured_is_not_met() -> None:
    assert [str(each) for each in gpu.verdicts([], {}, None)] == ["not measured"] * 9
    partly = [each for each in rows() if (each["what"], each["part"]) != (MINED[2], "backward")]
    assert gpu.verdicts(partly, COUNTS, None)[3].met is None
    assert gpu.verdicts(rows(), {**COUNTS, HARDEST: 0}, None)[-1].met is None  # a profiler that has seen nothing
    assert gpu.verdicts(rows(), {HARDEST: 5}, None)[-1].met is None
    assert Verdict("", float("nan"), 1.0, True).met is None


def test_a_verdict_says_by_how_much() -> None:
    assert str(Verdict("", 0.4, 0.8, at_most=False)) == "missed by 50 %"
    assert str(Verdict("", 0.88, 0.8, at_most=False)) == "met by 10 %"
    assert str(Verdict("", 0.33, 0.3, at_most=True)) == "missed by 10 %"
    assert str(Verdict("", 6.0, 6, at_most=True)) == "met by 0 %"


def test_launches_are_the_kernels_of_a_trace() -> None:
    events = [
        {"cat": "kernel", "name": "scan", "ts": 30.0},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 1.0},
        {"cat": "gpu_memset", "name": "Memset (Device)", "ts": 15.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 16.0},
        {"name": "process_name", "ph": "M"},
        {"cat": "kernel", "name": "pair", "ts": 20.0},
        {"cat": "kernel", "name": "scan", "ts": 40.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 2.0},
    ]
    assert gpu.kernels(events) == ["pair", "scan", "scan"]
    assert gpu.kernels([]) == []


def test_tables_have_as_many_cells_as_heads() -> None:
    assert report.markdown(["a", "b"], [[1, None], [0.12345, "x"]]).splitlines()[2:] == ["| 1 |  |", "| 0.123 | x |"]
    found = rows()
    gpu.compare(found)
    tables = (gpu.timing_table(found), gpu.target_table(gpu.verdicts(found, {}, None)), gpu.gate_table([GREEN]))
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


# ── one call ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_gpu_the_command_says_so_and_fails() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--sizes", "128"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert found.returncode != 0
    assert found.stdout == ""
    assert found.stderr.strip() == (
        "benchmarks.gpu: no GPU: torch.cuda.is_available() is False. Kernels are timed on an NVIDIA GPU or not at all."
    )


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        gpu.main([])


class Event:
    """As torch.cuda.Event, by the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def device(
    stand_in: dict[str, Callable[[Any], Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, Callable[[Any], Any]]:
    """What main needs of a GPU, played by the CPU at tiny sizes."""
    played: dict[str, Any] = {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 5 * gpu.MB,
        "get_device_name": lambda: "Stand In 1",
        "Event": Event,
    }
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replaced: dict[str, Any] = {
        "obstacle": lambda: None,
        "compile_all": lambda options, seconds: None,
        "count_launches": lambda n, d, device, objectives: {name: ["k"] * 5 for name in objectives},
        "rounds_in": lambda allowance, one, least=5, most=50: 3,
        "SIZES": [32],
        "LARGEST": 64,
        "OUTSIDERS_AT": (),
        "COLD": 16,
        "TARGET": Group(32, 16, "bf16"),
        "LEFT_OUT": 1.0,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return stand_in


ASKED = ["--sizes", "32", "--dims", "16", "--dtypes", "bf16", "fp32", "--save", "--largest"]


@pytest.mark.usefixtures("device")
def test_a_whole_call_leaves_a_table_its_samples_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(ASKED, device="cpu", scale=gpu.Scale(48, 128, 1))
    said = capsys.readouterr()
    for part in ("| gate |", "| N | D |", "| launches at N = 128", "| target at N = 32768", "Left out:", "seed "):
        assert part in said.out
    assert "KeOps (hardest, no gradient): the package pykeops is not installed" in said.out
    assert "timed: N = 32, D = 16, bf16" in said.err
    (path,) = tmp_path.glob("gpu-*-stand-in-1.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    saved = json.loads(path.read_text())
    for name in ("device", "driver", "torch", "triton", "python", "commit", "date", "command"):
        assert saved[name]
    assert len(saved["gate"]) == 4 * len(gpu.CASES) + 3  # bf16 and fp32 in three precisions; sizes
    timed = {(each["n"], each["dtype"], each["what"], each["part"]): each for each in saved["rows"]}
    for name in OBJECTIVES:
        for dtype in ("bf16", "fp32"):
            assert len(timed[32, dtype, name, "forward"]["samples"]) == 3
            assert timed[32, dtype, name, "backward"]["ms"] > 0
            assert timed[32, dtype, name, "both"]["of_product"] > 0
            assert 4.9 < timed[32, dtype, name, "both"]["memory_mb"] < 5
    assert [key[2:] for key in timed if key[0] == 64] == [(BARE, "forward"), (HARDEST, "both"), (EXP, "both")]
    assert [each["verdict"] for each in saved["targets"]].count("not measured") == 0


def only_where_it_is_timed(found: Any) -> Any:
    return another_negative(found) if found[0].shape == (32, 16) else found


@pytest.mark.parametrize(
    ("spoil", "fault", "examined"), [(scaled, "rms error", 0), (only_where_it_is_timed, "regret", 2)]
)
def test_a_red_gate_ends_the_call_without_timings(
    spoil: Callable[[Any], Any],
    fault: str,
    examined: int,
    device: dict[str, Callable[[Any], Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    device["by"] = spoil
    with pytest.raises(SystemExit, match="the gate is red"):
        gpu.main(ASKED, device="cpu", scale=gpu.Scale(48, 128, 0))
    said = capsys.readouterr()
    assert fault in said.out
    assert "| N | D |" not in said.out
    assert "timed:" not in said.err
    saved = json.loads(next(tmp_path.glob("gpu-*.json")).read_text())
    assert saved["rows"] == []
    assert len(saved["gate"]) == 4 * len(gpu.CASES) + examined  # a case that is red leaves no size to examine


def test_without_time_the_call_says_what_it_left_out(
    device: dict[str, Callable[[Any], Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.Group, "seconds", 1e9)
    gpu.main(["--sizes", "32", "--dims", "16", "--dtypes", "bf16"], device="cpu", scale=gpu.Scale(48, 128, 0))
    said = capsys.readouterr().out
    assert "* timings: N = 32, D = 16, bf16" in said
    assert said.count("not measured") >= 6


@pytest.mark.usefixtures("stand_in")
def test_what_fails_beside_ours_is_noted_and_ours_is_not_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def fails(_: object) -> None:
        raise ValueError("no such kernel")

    def too_large(_: object) -> None:
        raise torch.OutOfMemoryError("much")

    good, bad = gpu.Run(lambda: None, lambda _: None), gpu.Run(lambda: None, fails)
    left_out: list[str] = []
    runs = {(BARE, "forward"): good, (gpu.INF_CL, "both"): bad, (HARDEST, "both"): gpu.Run(lambda: None, too_large)}
    assert list(gpu.warmed(runs, left_out, TARGET)) == [(BARE, "forward")]
    assert left_out == [
        f"{TARGET}: Inf-CL (InfoNCE): ValueError: no such kernel",
        f"{TARGET}: {HARDEST}, both: out of memory",
    ]
    with pytest.raises(ValueError, match="no such kernel"):
        gpu.warmed({(HARDEST, "both"): bad}, left_out, TARGET)


def test_the_bare_product_is_complete_in_blocks() -> None:
    x, y = gpu.inputs(Group(40, 16, "fp32"), "cpu")
    for held, first in ((1 << 20, 0), (40 * 7, 35)):
        run = gpu.blockwise(x, y, held)
        assert torch.equal(run.call(run.prepare()), x.detach()[first:] @ y.detach().T)
