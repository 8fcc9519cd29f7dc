"""Reports of synthetic runs: tables that parse back, pictures that exist, verdicts that find what was planted."""

import csv
import io
import math
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest

from goal.training import report
from goal.training.report import significant_differences, terminal_table, write_report

N, CAPTIONS = 80, 400
NOTE = "emoji, 80 images; 3 seeds; 300 steps\ngoal sweep --quick"


def metrics_of(i2t, t2i):
    test = {
        f"{side}_r{k}": 100 * float(np.mean(np.asarray(ranks) <= k))
        for side, ranks in (("i2t", i2t), ("t2i", t2i))
        for k in (1, 5, 10)
    }
    test["rsum"] = sum(test.values())
    return test | {"i2t_medr": float(np.median(i2t)), "t2i_medr": float(np.median(t2i))}


def run(T, P, seed, i2t, t2i, **more):
    """A record as training writes it, from the ranks of its test queries."""
    test = metrics_of(i2t, t2i)
    curve = [
        {"step": s, "val_rsum": test["rsum"] * (1 - 0.5 ** (s / 50)), "s_pos": 0.9 - 0.2 * (s >= 300), "s_neg": 0.4}
        for s in range(0, 301 + 50 * (seed % 2), 50)
    ]
    ranks = {"i2t": np.asarray(i2t).tolist(), "t2i": np.asarray(t2i).tolist()}
    record = {"T": T, "P": P, "recipe": None, "seed": seed, "test": test, "curve": curve, "ranks": ranks}
    return record | {"params": {"lr": 5e-4, "tau": 10.0, "margin": None}, "tuned": False} | more


class World:
    """Test queries of varying difficulty, and objectives that differ by their strength and by chance."""

    def __init__(self, seed, n=N, captions=CAPTIONS):
        self.rng = np.random.default_rng(seed)
        difficulty = self.rng.normal(1.5, 1.2, n)
        self.difficulty = difficulty, np.repeat(difficulty, captions // n)

    def ranks(self, strength, seed_spread=0.03):
        shift = strength + seed_spread * self.rng.standard_normal()
        return [np.exp(np.maximum(0, d - shift + self.rng.normal(0, 0.4, len(d)))).astype(int) for d in self.difficulty]

    def runs(self, T, P, strength, seeds=3, seed_spread=0.03, **more):
        return [run(T, P, s, *self.ranks(strength, seed_spread), **more) for s in range(seeds)]


@pytest.fixture(scope="module")
def records():
    world = World(0)
    runs = world.runs("cir", "sig-ms", 0.3) + world.runs("con(0.2)", "con", 0.0) + world.runs("cir", "con", 0.2)
    runs += world.runs("con", "con", 0.1, recipe="vse++") + world.runs("-", "-", 0.25, recipe="infonce")
    return runs


@pytest.fixture(scope="module")
def written(records, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "a" / "b"
    paths = write_report(records, out, title="Which wins? 100 % & more_", note=NOTE)
    return {path.name: path for path in paths}


def test_every_file_is_written_and_nothing_else(written):
    assert set(written) == {"table.csv", "table.md", "table.tex", "heatmap.png", "curves.png", "similarities.png"}
    folder = written["table.csv"].parent
    assert {path.name for path in folder.iterdir()} == set(written)
    for name, path in written.items():
        if name.endswith(".png"):
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size > 10_000


def test_csv_parses_back_to_mean_and_sample_deviation(records, written):
    rows = list(csv.DictReader(io.StringIO(written["table.csv"].read_text())))
    assert list(rows[0]) == ["T", "P", "metric", "mean", "std", "seeds"]
    objectives = list(dict.fromkeys((row["T"], row["P"]) for row in rows))
    cells = [("con", "con"), ("cir", "con"), ("cir", "sig-ms")]
    assert objectives == [*cells, ("vse++", "-"), ("infonce", "-")]
    assert len(rows) == 5 * 9
    for row in rows:
        recipe = row["T"] if row["P"] == "-" else None
        values = [
            r["test"][row["metric"]]
            for r in records
            if r["recipe"] == recipe and (recipe or (r["T"].removesuffix("(0.2)"), r["P"]) == (row["T"], row["P"]))
        ]
        assert len(values) == 3 == int(row["seeds"])
        assert float(row["mean"]) == pytest.approx(statistics.mean(values), abs=1e-4)
        assert float(row["std"]) == pytest.approx(statistics.stdev(values), abs=1e-4)


def test_one_seed_has_no_deviation(tmp_path):
    paths = write_report(World(1).runs("cir", "sig-ms", 0.0, seeds=1), tmp_path, title="t", note="n")
    rows = list(csv.DictReader(io.StringIO(paths[0].read_text())))
    assert {row["std"] for row in rows} == {""}
    assert "±" not in (tmp_path / "table.md").read_text()
    assert "One seed: a verdict compares these trained models" in (tmp_path / "table.md").read_text()


def test_markdown_has_matrix_recipes_metrics_and_verdicts(records, written):
    text = written["table.md"].read_text()
    first, *_, last = [block for block in text.split("\n\n") if block.startswith("|")]
    assert first.splitlines()[0] == "| T × P | con | sig-ms |"
    assert re.search(r"^\| con \| [\d.]+ ± [\d.]+ \| · \|$", first, re.M)  # con × sig-ms was not run
    assert first.count("**") == 2
    assert "| vse++ |" in text
    assert "| infonce |" in text
    assert "0.70 / 0.40" in text
    assert "2000 resamples" in text
    assert "below best" in last
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(headings) == len(tables) == text.count("*emoji, 80 images; 3 seeds; 300 steps · goal sweep --quick*")


def test_latex_is_balanced_and_escaped(written):
    text = written["table.tex"].read_text()
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "±" not in line and "pm" in line]
    assert len(rows) == 5
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {7}
    assert text.count("{") == text.count("}")
    assert r"100 \% \& more\_" in text
    assert not set("×±→·") & set(text)
    assert text.count(r"\mathbf") == 7


def test_pictures_carry_the_conditions(records):
    objectives = report._objectives(records)
    for draw in (report._heatmap, report._curves, report._similarities):
        figure = draw(objectives, "A title", NOTE)
        shown = " ".join(text.get_text() for text in figure.texts)
        assert "goal sweep --quick" in shown
        assert "con(margin=0.2)" in shown
        assert figure.get_suptitle() == "A title"


def test_the_heatmap_shows_every_cell_and_frames_the_best(records):
    best = World(7).runs("con(0.2)", "lin", 1.5)
    figure = report._heatmap(report._objectives([*records, *best]), "t", "n")
    rsum = figure.axes[0]
    assert [tick.get_text() for tick in rsum.get_yticklabels()] == ["con", "cir"]
    assert [tick.get_text() for tick in rsum.get_xticklabels()] == ["con", "lin", "sig-ms"]
    texts = {text.get_position(): text.get_text() for text in rsum.texts}
    shades = rsum.collections[0].get_array()
    for some, row, column in ((best, 0, 1), ([r for r in records if r["P"] == "sig-ms"], 1, 2)):
        mean = statistics.mean(r["test"]["rsum"] for r in some)
        assert texts[(column + 0.5, row + 0.4)] == f"{mean:.1f}"
        assert shades[row, column] == pytest.approx(mean)
    assert texts[(2.5, 0.5)] == texts[(1.5, 1.5)] == "·"
    (frame,) = rsum.lines
    assert (frame.get_xdata().mean() // 1, frame.get_ydata().mean() // 1) == (1, 0)


def test_curves_are_means_over_the_steps_that_all_seeds_reached(records):
    figure = report._curves(report._objectives(records), "t", "n")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["T = con", "T = cir", "recipes"]
    line = next(line for line in figure.axes[1].lines if line.get_label() == "sig-ms")
    curves = [{p["step"]: p["val_rsum"] for p in r["curve"]} for r in records if r["P"] == "sig-ms"]
    assert len({len(curve) for curve in curves}) == 2  # one seed went further
    assert line.get_xdata().tolist() == list(range(0, 301, 50))
    assert line.get_ydata()[-1] == pytest.approx(statistics.mean(curve[300] for curve in curves))


def test_pictures_without_data_are_left_out(tmp_path):
    runs = World(2).runs("-", "-", 0.0, recipe="infonce", curve=[])
    assert {path.suffix for path in write_report(runs, tmp_path, title="t", note="n")} == {".csv", ".md", ".tex"}


def test_what_is_no_cosine_is_not_drawn_among_cosines(records):
    orders = World(3).runs("-", "-", 0.0, recipe="order0", curve=[{"step": 0, "val_rsum": 1, "s_pos": -3, "s_neg": -4}])
    figure = report._similarities(report._objectives([*records, *orders]), "t", "n")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()][-1] == "infonce"
    assert any("not drawn: order0" in text.get_text() for text in figure.texts)


def test_default_and_tuned_stand_side_by_side(records, tmp_path):
    tuned = World(4).runs("cir", "sig-ms", 0.5, tuned=True, params={"lr": 1.23e-3, "tau": 17.5, "margin": None})
    names = {path.name for path in write_report([*tuned, *records], tmp_path, title="t", note="n")}
    assert {"table_tuned.csv", "table_tuned.tex", "heatmap_tuned.png", "curves_tuned.png"} <= names
    side_by_side = (tmp_path / "table.md").read_text().split("## Default and tuned")[1]
    (row,) = (line for line in side_by_side.splitlines() if line.startswith("| cir × sig-ms |"))
    default_mean, tuned_mean = (
        statistics.mean(r["test"]["rsum"] for r in some if r["P"] == "sig-ms") for some in (records, tuned)
    )
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1].startswith(f"{default_mean:.1f} ±")
    assert cells[2].startswith(f"{tuned_mean:.1f} ±")
    assert cells[-1] == "lr 0.00123, tau 17.5"
    assert "sig-ms" in (tmp_path / "table_tuned.csv").read_text()
    assert "vse++" not in (tmp_path / "table_tuned.csv").read_text()
    both = terminal_table([*records, *tuned])
    assert both.index("default") < both.index("tuned")


def test_tuned_runs_alone_take_the_plain_names(tmp_path):
    names = {
        path.name for path in write_report(World(4).runs("cir", "lin", 0.5, tuned=True), tmp_path, title="t", note="")
    }
    assert "table.csv" in names
    assert "table_tuned.csv" not in names


def test_the_terminal_table_is_plain_and_complete(records):
    world = World(5)
    runs = [
        r for T in ("con(0.2)", "nca", "cir") for P in ("con", "lin", "sig", "lin-ms", "sig-ms")
        for r in world.runs(T, P, 0.1)
    ]  # fmt: skip
    text = terminal_table([*runs, *world.runs("-", "-", 0.2, recipe="binomial-deviance")])
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 96
    for r in runs:
        values = [o["test"]["rsum"] for o in runs if (o["T"], o["P"]) == (r["T"], r["P"])]
        assert f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" in text
    assert "16 objectives, 3 seeds" in text
    assert "con(margin=0.2)" in text
    partial = terminal_table(records[:4])  # three runs of cir × sig-ms, one of con × con: the sweep goes on
    assert "·" in partial
    assert "2 objectives, 1 to 3 seeds" in partial
    colored = terminal_table(records, color=True)
    assert re.sub("\x1b.*?m", "", colored) == terminal_table(records)
    assert colored.count("\x1b[1m") == 6  # the best of three matrices and of three recipe columns


def test_the_margin_is_only_claimed_where_it_is_known():
    world = World(6)
    assert "margin" not in terminal_table(world.runs("con", "con", 0.0))
    assert "con(margin=0.2)" in terminal_table(world.runs("con", "con", 0.0, params={"margin": 0.2}))
    assert "margin" not in terminal_table(world.runs("con", "con", 0.0, params={"margin": 0.31}))


# ---- verdicts --------------------------------------------------------------------------------------------


def verdicts(runs, **options):
    return {d.objective: d for d in significant_differences(runs, resamples=500, **options)}


def test_a_planted_difference_is_found_and_equal_objectives_are_tied():
    world = World(10, n=200, captions=1000)
    runs = [r for P in ("con", "lin", "sig") for r in world.runs("cir", P, 0.0)] + world.runs("nca", "con", -0.4)
    for metric in ("rsum", "r1"):
        found = verdicts(runs, metric=metric)
        assert found["nca × con"].verdict == "below best"
        assert found["nca × con"].high < 0
        rest = sorted(found[f"cir × {P}"].verdict for P in ("con", "lin", "sig"))
        assert rest == ["best", "tied with best", "tied with best"]


def test_means_and_differences_are_those_of_the_records(records):
    found = significant_differences(records, resamples=200)
    assert [d.mean for d in found] == sorted((d.mean for d in found), reverse=True)
    for d in found:
        key = d.objective.split(" × ")
        own = [r for r in records if (r["recipe"] or r["T"].removesuffix("(0.2)")) == key[0]]
        own = [r for r in own if r["recipe"] or r["P"] == key[1]]
        assert d.mean == pytest.approx(statistics.mean(r["test"]["rsum"] for r in own))
        assert d.difference == pytest.approx(d.mean - found[0].mean)
        assert d.low <= d.difference <= d.high
    r1 = {d.objective: d.mean for d in significant_differences(records, metric="r1", resamples=10)}
    own = [(r["test"]["i2t_r1"] + r["test"]["t2i_r1"]) / 2 for r in records if r["recipe"] == "infonce"]
    assert r1["infonce"] == pytest.approx(statistics.mean(own))


def test_queries_are_paired():
    """A small difference that is the same on every query drowns unless both are scored on the same resample."""
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5
    worse = hard | (np.arange(400) % 20 == 0)  # 5 % of the queries are lost, none is won
    a, b = (np.where(miss, 50, 1) for miss in (hard, worse))
    found = verdicts([run("cir", "con", 0, a, a), run("cir", "lin", 0, b, b)])
    d = found["cir × lin"]
    unpaired = 300 * math.sqrt(2 * (0.5 * 0.5 / 400) * 2)  # standard error of the difference, both directions
    assert -d.difference < 1.5 * unpaired
    assert d.verdict == "below best"


def test_the_spread_of_the_seeds_counts_as_noise():
    hits = np.arange(400) % 2
    steady = [run("cir", "con", s, 1 + 20 * hits, 1 + 20 * hits) for s in range(3)]

    def other(lost):  # seeds lose so many of the 200 hits
        ranks = [1 + 20 * (hits | (np.arange(400) < 2 * k)) for k in lost]
        return [run("cir", "lin", s, r, r) for s, r in enumerate(ranks)]

    assert verdicts([*steady, *other((20, 20, 20))])["cir × lin"].verdict == "below best"
    scattered = verdicts([*steady, *other((0, 0, 60))])["cir × lin"]
    assert scattered.difference == pytest.approx(verdicts([*steady, *other((20, 20, 20))])["cir × lin"].difference)
    assert scattered.verdict == "tied with best"


def test_seeds_that_agree_by_chance_borrow_the_spread_of_the_others():
    hits = np.arange(400) % 2

    def runs(P, lost):
        ranks = [1 + 20 * (hits | (np.arange(400) < 2 * k)) for k in lost]
        return [run("cir", P, s, r, r) for s, r in enumerate(ranks)]

    pair = [*runs("con", (0, 0, 0)), *runs("lin", (12, 12, 12))]
    assert verdicts(pair)["cir × lin"].verdict == "below best"
    noisy = verdicts([*pair, *runs("sig", (0, 60, 120)), *runs("lin-ms", (10, 80, 120))])["cir × lin"]
    assert noisy.verdict == "tied with best"
    assert noisy.high - noisy.low > 20


def test_equal_objectives_are_seldom_told_apart():
    """Of 20 sweeps of 10 equal objectives, about one may hold a false verdict."""
    false = 0
    for seed in range(20):
        world = World(100 + seed)
        runs = [r for k in range(10) for r in world.runs(f"t{k}", "con", 0.0, seed_spread=0.05)]
        for r in runs:
            r["ranks"]["image_of"] = np.repeat(np.arange(N), CAPTIONS // N).tolist()
        false += any(d.verdict == "below best" for d in verdicts(runs).values())
    assert false <= 4


def test_captions_of_one_image_are_drawn_together():
    """Five copies of a caption are one query, not five."""
    rng = np.random.default_rng(0)
    a, b = (np.where(rng.random(100) < 0.5, 1, 50) for _ in range(2))
    runs = [run("cir", P, 0, np.ones(100, int), np.repeat(r, 5)) for P, r in (("con", a), ("lin", b))]
    alone = significant_differences(runs)[1]
    for r in runs:
        r["ranks"]["image_of"] = np.repeat(np.arange(100), 5).tolist()
    together = significant_differences(runs)[1]
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(5), rel=0.15)


def test_holm_correction():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.9])
    assert report._holm(p).tolist() == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    rng = np.random.default_rng(1)
    a = np.where(rng.random(400) < 0.5, 1, 50)
    b = np.where(rng.random(400) < 0.05, 50, a)
    pair = [run("cir", "con", 0, a, a), run("cir", "lin", 0, b, b)]
    equals = [run(f"t{k}", "con", 0, a, a) for k in range(7)]
    alone, among = (verdicts(runs)["cir × lin"].p for runs in (pair, [*pair, *equals]))
    assert alone < 0.02
    assert among == pytest.approx(8 * alone)


def test_ranks_may_lie_in_files(records, tmp_path):
    filed = []
    for k, r in enumerate(records):
        paths = {side: tmp_path / f"{k}-{side}.npy" for side in r["ranks"]}
        for side, path in paths.items():
            np.save(path, np.array(r["ranks"][side]))
        filed.append(r | {"ranks": {side: str(path) for side, path in paths.items()}})
    assert significant_differences(filed, resamples=50) == significant_differences(records, resamples=50)


def test_without_ranks_noise_is_unknown(records, tmp_path):
    bare = [{k: v for k, v in r.items() if k != "ranks"} for r in records]
    with pytest.raises(ValueError, match=r"no ranks\['i2t'\]"):
        significant_differences(bare)
    write_report(bare, tmp_path, title="t", note="n")
    assert "Unknown: the records carry no ranks" in (tmp_path / "table.md").read_text()


def test_different_test_sets_are_refused(records):
    other = run("cir", "lin", 0, np.ones(N - 1, int), np.ones(CAPTIONS, int))
    with pytest.raises(ValueError, match=r"\[79, 80\] queries: not the same test set"):
        significant_differences([*records, other])
    wrong = [r | {"ranks": r["ranks"] | {"image_of": [0] * 3}} for r in records]
    with pytest.raises(ValueError, match="does not map 400 captions to 80 images"):
        significant_differences(wrong)
    with pytest.raises(ValueError, match="metric='r5' is not known"):
        significant_differences(records, metric="r5")


# ---- bad input -------------------------------------------------------------------------------------------


def test_bad_records_are_refused_before_anything_is_written(records, tmp_path):
    good = records[0]
    cases = [
        ("records is empty", []),
        (r"T=cir, P=sig-ms, seed=0", [good, dict(good)]),
        ("lacks seed", [{k: v for k, v in good.items() if k != "seed"}]),
        (r"lacks test\.i2t_r5", [good | {"test": {k: v for k, v in good["test"].items() if k != "i2t_r5"}}]),
        (r"test\.rsum = nan", [good | {"test": good["test"] | {"rsum": math.nan}}]),
    ]
    for message, bad in cases:
        with pytest.raises(ValueError, match=message):
            write_report(bad, tmp_path / "out", title="t", note="n")
    assert not (tmp_path / "out").exists()


def test_tables_come_without_matplotlib_and_pictures_say_what_to_install(records, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'goal-objectives\[train\]'"):
        write_report(records, tmp_path, title="t", note="n")
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "table.md", "table.tex"}


def test_importing_the_report_imports_no_matplotlib():
    code = "import sys, goal.training.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_spec_is_a_row_and_breaks_no_table(tmp_path):
    world = World(2)
    texts = ["nca(tau=5) × con | all(average=false)", "vse++ | reduction=mean"]
    runs = world.runs("cir", "con", 0.3) + world.runs("nca(tau=5)", "con", 0.2)
    runs += world.runs("con(margin=0.2)", "con", 0)
    for text in texts:
        runs += world.runs("-", "-", 0.1, recipe=text, label=text)
    written = write_report(runs, tmp_path, title="t", note=NOTE)
    paths = {path.name: path.read_text() for path in written if path.suffix in (".md", ".tex")}
    rows = [line for line in paths["table.md"].splitlines() if line.startswith("|")]
    for text in texts:
        named = [row for row in rows if row.startswith(f"| {text} |".replace(" | ", r" \| ", 1))]
        assert len(named) == 3  # recipes, all metrics, noise
    cells = [len(re.split(r"(?<!\\)\|", row)) for row in rows]
    for before, after, row in zip(cells, cells[1:], rows[1:], strict=False):
        assert before == after or row.startswith(("| T × P |", "| objective |")), row
    assert "| nca(tau=5) |" in paths["table.md"]
    assert "| con |" in paths["table.md"]  # the hinge of the grid
    assert r"nca(tau=5) $\times$ con $|$ all(average=false) &" in paths["table.tex"]
    shown = terminal_table(runs).splitlines()
    assert [line.split("  ")[0] for line in shown[1:4]] == ["con", "nca(tau=5)", "cir"]


@pytest.mark.parametrize("name", ["con(margin=0.2)", "con(0.2)"])  # now, and as records once wrote it
def test_the_hinge_of_the_grid_is_con(name):
    (objective,) = report._objectives(World(3).runs(name, "lin", 0.1))
    assert objective.name == "con × lin"
    assert report._has_margin(objective)
