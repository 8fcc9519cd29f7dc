"""Finished runs as tables, pictures and verdicts: which objective wins, and by more than the noise?

A run is a plain dictionary, a JSON line of a sweep (`RunRecord`). Runs that differ only in their seed are the same
*objective*: a cell T × P, or a recipe, which is an extra row. Every number is mean ± sample standard deviation over the
seeds.
"""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from goal import plotting
from goal.data.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {  # name in a record: heading in a table
    "rsum": "RSUM",
    "i2t_r1": "i→t R@1",
    "i2t_r5": "i→t R@5",
    "i2t_r10": "i→t R@10",
    "t2i_r1": "t→i R@1",
    "t2i_r5": "t→i R@5",
    "t2i_r10": "t→i R@10",
    "i2t_medr": "i→t MedR",
    "t2i_medr": "t→i MedR",
    "i2t_meanr": "i→t MeanR",
    "t2i_meanr": "t→i MeanR",
    "i2t_ties": "i→t ties %",
    "t2i_ties": "t→i ties %",
}
_REQUIRED = tuple(METRICS)[:7]
HINGE = ("con(margin=0.2)", "con(0.2)")  # T = con in the tables, now and as records once wrote it
_T_ORDER = ("con", "nca", "cir")
_P_ORDER = ("con", "lin", "sig", "lin-ms", "sig-ms")


class RunRecord(TypedDict):
    """One finished run, as it stands in a line of JSON; recalls in percent."""

    T: str  # "con(margin=0.2)", "nca", "cir(tau=5)", or "-"
    P: str  # "con", "lin", "sig", "lin-ms", "sig-ms", or "-"
    recipe: NotRequired[str | None]  # where the run is a recipe, or more than T × P: its spec
    label: NotRequired[str]
    seed: int
    test: Mapping[str, float]  # the names of METRICS, the first seven at least
    best_val_rsum: NotRequired[float]
    best_step: NotRequired[int]
    curve: NotRequired[Sequence[Mapping[str, float]]]  # step, val_rsum, …, s_pos, s_neg; in order of steps
    ranks: NotRequired[Mapping[str, Any]]  # i2t, t2i, and image_of where it is known: lists, arrays or .npy paths
    params: NotRequired[Mapping[str, Any]]
    tuned: NotRequired[bool]


class Difference(NamedTuple):
    """How an objective stands to the best one."""

    objective: str
    mean: float  # of the metric, over seeds
    difference: float  # mean − the best objective's mean, ≤ 0
    low: float  # interval of the difference, 95 % at level 0.05, not corrected
    high: float
    p: float  # of a difference this large between equal objectives, Holm-corrected over all of them
    verdict: Literal["best", "tied with best", "below best"]


def write_report(records: Sequence[RunRecord], out_dir: str | Path, *, title: str, note: str) -> list[Path]:
    """Write every table and picture of a sweep and return their paths; no file is ever half-written.

        table.csv   T, P, metric, mean, std, seeds: a row for each objective and metric; std is empty for one seed
        table.md    T × P of RSUM and R@1, recipes, all metrics, which differences exceed the noise
        table.tex   all recalls, for a paper (needs the package booktabs)
        heatmap.png, curves.png, similarities.png

    Where default and tuned runs are both given, the tuned ones go to files named `…_tuned`, and table.md sets both
    side by side with the parameters that were found. Pictures for which the records carry no data are left out.

    Args:
        records: the finished runs, in any order.
        out_dir: a folder, made if need be.
        title: one line, above every table.
        note: the conditions (dataset, seeds, steps, command), printed beneath every table and picture.

    Raises:
        ValueError: no records, or a record that is incomplete, not finite, or there twice.
        ImportError: matplotlib is missing; the tables have been written by then.
    """
    out = Path(out_dir)
    groups = _default_and_tuned(records)
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def write(name: str, content: str | bytes) -> None:
        write_atomically(out / name, content if isinstance(content, bytes) else content.encode())
        written.append(out / name)

    named = [("" if kind == "default" or len(groups) == 1 else "_tuned", group) for kind, group in groups.items()]
    for suffix, group in named:
        write(f"table{suffix}.csv", _csv(group))
        write(f"table{suffix}.tex", _tex(group, title, note))
    write("table.md", _markdown(groups, title, note))
    for suffix, group in named:
        for name, draw in (("heatmap", _heatmap), ("curves", _curves), ("similarities", _similarities)):
            figure = draw(group, title, note)
            if figure is not None:
                write(f"{name}{suffix}.png", _png(figure))
    return written


def terminal_table(records: Sequence[RunRecord], *, color: bool = False) -> str:
    """The T × P tables of RSUM and R@1 and the recipes as plain text, at most 96 columns wide.

    Args:
        records: the runs that are finished so far; a cell without any is a dot.
        color: show the best of each table in bold, with terminal codes.

    >>> test = dict.fromkeys(("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"), 10.0) | {"rsum": 60.0}
    >>> print(terminal_table([{"T": "cir", "P": "sig-ms", "seed": 0, "test": test}]))
    RSUM   sig-ms
    cir      60.0
    <BLANKLINE>
    R@1 i→t   sig-ms
    cir         10.0
    <BLANKLINE>
    R@1 t→i   sig-ms
    cir         10.0
    <BLANKLINE>
    1 objective, 1 seed.
    """
    groups = _default_and_tuned(records)
    blocks = []
    for kind, objectives in groups.items():
        if len(groups) == 2:
            blocks.append(f"── {kind} ──")
        cells, recipes = _cells(objectives), [o for o in objectives if o.P == "-"]
        if cells:
            for metric, heading in (("rsum", "RSUM"), ("i2t_r1", "R@1 i→t"), ("t2i_r1", "R@1 t→i")):
                rows, columns = _axes(objectives)
                best = _best([*cells.values()], metric)
                body = [
                    [T, *(_bold(_text(cells.get((T, P)), metric), cells.get((T, P)) is best, color) for P in columns)]
                    for T in rows
                ]
                blocks.append(_align([[heading, *columns], *body]))
        if recipes:
            metrics = ("rsum", "i2t_r1", "t2i_r1")
            best_of = {metric: _best(recipes, metric) for metric in metrics}
            body = [[o.T, *(_bold(_text(o, m), o is best_of[m], color) for m in metrics)] for o in recipes]
            blocks.append(_align([["recipe", "RSUM", "R@1 i→t", "R@1 t→i"], *body]))
        blocks.append(_counts(objectives))
    return "\n\n".join(blocks)


def significant_differences(
    records: Sequence[RunRecord],
    *,
    metric: Literal["rsum", "r1"] = "rsum",
    resamples: int = 2000,
    level: float = 0.05,
    seed: int = 0,
) -> list[Difference]:
    """Which objectives are below the best one by more than the noise of test queries and seeds, best first.

    Paired bootstrap: in each resample every objective is scored on the same queries, drawn with replacement, and its
    mean over seeds is moved by a normal deviate with the standard error of the seeds. The spread of the seeds is the
    objective's own or the pooled one of all objectives, whichever is larger, since a few seeds can agree by chance.
    p counts the resamples in which the difference strays from its mean as far as the observed one from 0, and is
    Holm-corrected over all comparisons. With a single seed everywhere only the queries vary: the verdicts are then
    about these trained models, not about the objectives.

    Args:
        records: runs with `ranks` for the same test queries. Images are drawn with all their captions where the
            ranks carry `image_of` (n_captions,), else images and captions are drawn independently.
        metric: "rsum", or "r1", the mean of R@1 of both directions.
        resamples: number of resamples; p is never smaller than 1 / (resamples + 1).
        level: the verdict is "below best" where the corrected p is smaller; intervals hold 1 − level.
        seed: of the random numbers.

    Raises:
        ValueError: a record without ranks, or ranks for different numbers of queries.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 16; Holm (1979).
    """
    objectives = _objectives(records)
    runs = [run for objective in objectives for run in objective.runs]
    i2t, t2i = (_credits(runs, side, metric) for side in ("i2t", "t2i"))  # (runs, queries)
    image_of = _image_of(runs, i2t.shape[1], t2i.shape[1])
    counts = np.array([len(objective.runs) for objective in objectives])
    starts = np.cumsum(counts) - counts

    def over_seeds(values: NDArray[Any]) -> NDArray[np.float64]:  # (…, runs) -> (…, objectives)
        return np.asarray(np.add.reduceat(values, starts, axis=-1) / counts)

    rng = np.random.default_rng(seed)
    per_run = i2t.mean(1) + t2i.mean(1)
    means = over_seeds(per_run)
    square = np.add.reduceat((per_run - np.repeat(means, counts)) ** 2, starts)
    pooled = square.sum() / max(1, (counts - 1).sum())
    spread = np.sqrt(np.maximum(square / np.maximum(1, counts - 1), pooled))

    image_credits, caption_credits = over_seeds(i2t.T), over_seeds(t2i.T)  # (queries, objectives)
    samples = np.empty((resamples, len(objectives)))
    step = max(1, (1 << 22) // len(caption_credits))
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        images = _weights(rng, len(image_credits), size)  # (size, images)
        captions = _weights(rng, len(caption_credits), size) if image_of is None else images[:, image_of]
        samples[first : first + size] = images @ image_credits / images.sum(1, keepdims=True)
        samples[first : first + size] += captions @ caption_credits / captions.sum(1, keepdims=True)
    samples += rng.standard_normal(samples.shape) * spread / np.sqrt(counts)

    best = int(means.argmax())
    difference = means - means[best]
    drawn = samples - samples[:, [best]]  # (resamples, objectives)
    low, high = np.quantile(drawn, [level / 2, 1 - level / 2], axis=0)
    stray = np.abs(drawn - difference) >= np.abs(difference)
    p = (1 + stray.sum(0)) / (1 + resamples)
    others = np.delete(np.arange(len(objectives)), best)
    p[others], p[best] = _holm(p[others]), 1.0
    result = []
    for k in np.argsort(-means, kind="stable"):
        verdict: Literal["best", "tied with best", "below best"]
        verdict = "best" if k == best else "below best" if p[k] < level else "tied with best"
        mean, gap, lowest, highest, chance = (float(v[k]) for v in (means, difference, low, high, p))
        result.append(Difference(objectives[k].name, mean, gap, lowest, highest, chance, verdict))
    return result


# ---- objectives ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Objective:
    """The runs of one cell T × P, or of one recipe (T is its name, P is "-"), by seed."""

    T: str
    P: str
    runs: tuple[RunRecord, ...]

    @property
    def name(self) -> str:
        return self.T if self.P == "-" else f"{self.T} × {self.P}"

    def values(self, metric: str) -> NDArray[np.float64]:
        """(seeds,)"""
        return np.array([run["test"][metric] for run in self.runs], np.float64)

    def mean(self, metric: str) -> float:
        return float(self.values(metric).mean())

    def std(self, metric: str) -> float | None:
        """Sample standard deviation over the seeds; None for one seed."""
        return float(self.values(metric).std(ddof=1)) if len(self.runs) > 1 else None

    def end(self, key: str) -> float | None:
        """Mean over seeds of what a curve ends with, such as s_pos; None where no run recorded it."""
        ends = [run["curve"][-1][key] for run in self.runs if run.get("curve") and key in run["curve"][-1]]
        return float(np.mean(ends)) if ends else None


def _default_and_tuned(records: Sequence[RunRecord]) -> dict[str, list[_Objective]]:
    """The objectives of the default runs and of the tuned runs, those of the two that there are."""
    if not records:
        raise ValueError("records is empty: there is no finished run to report.")
    kinds = {
        kind: [record for record in records if bool(record.get("tuned")) is tuned]
        for kind, tuned in (("default", False), ("tuned", True))
    }
    return {kind: _objectives(some) for kind, some in kinds.items() if some}


def _objectives(records: Sequence[RunRecord]) -> list[_Objective]:
    """Records grouped by objective: cells in the order of the tables, then recipes as they first came."""
    groups: dict[tuple[str, str], dict[int, RunRecord]] = {}
    for record in records:
        _check(record)
        recipe = record.get("recipe")
        key = (recipe, "-") if recipe else (_name(record), record["P"])
        seeds = groups.setdefault(key, {})
        if record["seed"] in seeds:
            raise ValueError(f"two records for T={key[0]}, P={key[1]}, seed={record['seed']}.")
        seeds[record["seed"]] = record

    def place(key: tuple[str, str]) -> tuple[int, int, int]:
        T, P = key
        return (P == "-", _index(_T_ORDER, T), _index(_P_ORDER, P)) if P != "-" else (1, 0, 0)

    return [
        _Objective(*key, tuple(groups[key][seed] for seed in sorted(groups[key]))) for key in sorted(groups, key=place)
    ]


def _name(record: RunRecord) -> str:
    """T as the tables call it: `con` is the hinge of margin 0.2."""
    return "con" if record["T"] in HINGE else record["T"]


def _check(record: RunRecord) -> None:
    missing = [key for key in ("T", "P", "seed", "test") if key not in record]
    missing += [f"test.{name}" for name in _REQUIRED if name not in record.get("test", {})]
    if missing:
        raise ValueError(f"a record lacks {', '.join(missing)}; it has {', '.join(record)}.")
    for name in METRICS:
        value = record["test"].get(name, 0.0)
        if not math.isfinite(value):
            who = f"T={record['T']}, P={record['P']}, seed={record['seed']}"
            raise ValueError(f"the record of {who} has test.{name} = {value}, which no mean can include.")


def _index(order: Sequence[str], name: str) -> int:
    return order.index(name) if (name := name.partition("(")[0]) in order else len(order)


def _cells(objectives: Sequence[_Objective]) -> dict[tuple[str, str], _Objective]:
    return {(o.T, o.P): o for o in objectives if o.P != "-"}


def _axes(objectives: Sequence[_Objective]) -> tuple[list[str], list[str]]:
    """The T and the P that occur in cells, in the order of the tables."""
    cells = _cells(objectives)
    rows = sorted(dict.fromkeys(T for T, _ in cells), key=lambda T: _index(_T_ORDER, T))
    columns = sorted(dict.fromkeys(P for _, P in cells), key=lambda P: _index(_P_ORDER, P))
    return rows, columns


def _best(objectives: Sequence[_Objective], metric: str) -> _Objective:
    return max(objectives, key=lambda o: o.mean(metric))


def _shared_metrics(objectives: Sequence[_Objective]) -> list[str]:
    """The metrics that every run has."""
    return [m for m in METRICS if all(m in run["test"] for o in objectives for run in o.runs)]


# ---- noise -----------------------------------------------------------------------------------------------


def _credits(runs: Sequence[RunRecord], side: str, metric: str) -> NDArray[np.float64]:
    """(runs, queries): what each query adds to the metric, whose value is the mean over the queries."""
    if metric not in ("rsum", "r1"):
        raise ValueError(f"metric={metric!r} is not known. Known: rsum, r1.")
    ranks = [_array(run.get("ranks", {}).get(side)) for run in runs]
    sizes = {len(r) for r in ranks if r is not None}
    if any(r is None for r in ranks):
        raise ValueError(f"a record has no ranks[{side!r}]: without the rank of every test query noise is unknown.")
    if len(sizes) > 1:
        raise ValueError(f"records have ranks[{side!r}] of {sorted(sizes)} queries: not the same test set.")
    ranked = np.stack([r for r in ranks if r is not None])
    cutoffs, scale = ((1, 5, 10), 100) if metric == "rsum" else ((1,), 50)
    return np.asarray(sum((ranked <= k) * float(scale) for k in cutoffs))


def _image_of(runs: Sequence[RunRecord], n_images: int, n_captions: int) -> NDArray[Any] | None:
    image_of = _array(runs[0].get("ranks", {}).get("image_of"))
    if image_of is not None and (image_of.shape != (n_captions,) or image_of.max() >= n_images):
        raise ValueError(f"ranks['image_of'] does not map {n_captions} captions to {n_images} images.")
    return image_of


def _array(value: Any) -> NDArray[Any] | None:
    """A list, an array, or the path of an .npy file; None stays None."""
    if value is None:
        return None
    return np.asarray(np.load(value, allow_pickle=False) if isinstance(value, str | Path) else value)


def _weights(rng: np.random.Generator, n: int, size: int) -> NDArray[np.float64]:
    """(size, n): how often each of n queries is drawn."""
    return rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)


def _holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down correction."""
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(len(p), 0, -1)))
    return corrected


# ---- text ------------------------------------------------------------------------------------------------


def _text(objective: _Objective | None, metric: str, plus_minus: str = " ± ") -> str:
    """`12.3 ± 0.4`, without the deviation for one seed; a dot for nothing."""
    if objective is None:
        return "·"
    std = objective.std(metric)
    return f"{objective.mean(metric):.1f}" + ("" if std is None else f"{plus_minus}{std:.1f}")


def _bold(text: str, bold: bool, color: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if bold and color else text


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right."""

    def width(text: str) -> int:
        return len(re.sub("\x1b.*?m", "", text))

    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padding = [" " * (w - width(text)) for w, text in zip(widths, row, strict=True)]
        first, *others = zip(row, padding, strict=True)
        lines.append("   ".join([first[0] + first[1], *(pad + text for text, pad in others)]).rstrip())
    return "\n".join(lines)


def _counts(objectives: Sequence[_Objective]) -> str:
    """How many objectives and seeds stand behind a table, and what its ± means."""
    seeds = [len(o.runs) for o in objectives]
    several = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else f"{seeds[0]}"
    unit = "seed" if several == "1" else "seeds"
    text = f"{len(seeds)} objective{'s' * (len(seeds) > 1)}, {several} {unit}"
    text += "." if max(seeds) == 1 else "; mean ± sample standard deviation over seeds."
    return text + (" T = con is con(margin=0.2)." if any(map(_has_margin, objectives)) else "")


def _has_margin(objective: _Objective) -> bool:
    """Whether every run of T = con had the margin 0.2."""
    return objective.T == "con" and all(
        run["T"] in HINGE or run.get("params", {}).get("margin") == 0.2 for run in objective.runs
    )


def _csv(objectives: Sequence[_Objective]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["T", "P", "metric", "mean", "std", "seeds"])
    for o in objectives:
        for metric in _shared_metrics(objectives):
            std = o.std(metric)
            row = [o.T, o.P, metric, f"{o.mean(metric):.4f}", "" if std is None else f"{std:.4f}", len(o.runs)]
            writer.writerow(row)
    return file.getvalue()


def _markdown(groups: Mapping[str, list[_Objective]], title: str, note: str) -> str:
    conditions = f"*{' · '.join(note.split(chr(10)))}*"
    parts = [f"# {title}"]
    for kind, objectives in groups.items():
        of = f" ({kind})" if len(groups) == 2 else ""
        recipes = [o for o in objectives if o.P == "-"]
        if _cells(objectives):
            for metric in ("rsum", "i2t_r1", "t2i_r1"):
                parts += [f"## {METRICS[metric]}: T × P{of}", _matrix(objectives, metric), conditions]
        if recipes:
            parts += [f"## Recipes{of}", _rows(recipes, ["rsum", "i2t_r1", "t2i_r1"]), conditions]
        every = _shared_metrics(objectives)
        parts += [f"## All metrics{of}", _rows(objectives, every, ends=True), conditions]
        parts += [f"## Which differences exceed the noise{of}", _noise(objectives), conditions]
        parts.append(_counts(objectives))
    if len(groups) == 2:
        parts += ["## Default and tuned", _side_by_side(groups["default"], groups["tuned"]), conditions]
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    rule = [":---", *["---:"] * (len(head) - 1)]
    lines = (" | ".join(cell.replace("|", r"\|") for cell in row) for row in (head, rule, *body))
    return "\n".join(f"| {line} |" for line in lines)


def _matrix(objectives: Sequence[_Objective], metric: str) -> str:
    cells = _cells(objectives)
    best = _best([*cells.values()], metric)
    rows, columns = _axes(objectives)

    def cell(T: str, P: str) -> str:
        text = _text(cells.get((T, P)), metric)
        return f"**{text}**" if cells.get((T, P)) is best else text

    return _markdown_table([["T × P", *columns], *([T, *(cell(T, P) for P in columns)] for T in rows)])


def _rows(objectives: Sequence[_Objective], metrics: Sequence[str], ends: bool = False) -> str:
    """A row for each objective; with `ends` also where s⁺ and s⁻ stand after the last step."""
    best = {metric: _best(objectives, metric) for metric in metrics if metric in _REQUIRED}
    curves = ends and any(o.end("s_pos") is not None for o in objectives)
    body = []
    for o in objectives:
        texts = [_text(o, metric) for metric in metrics]
        marked = [f"**{t}**" if best.get(m) is o else t for m, t in zip(metrics, texts, strict=True)]
        body.append([o.name, *marked, *([_ends(o)] if curves else []), str(len(o.runs))])
    last = ["s⁺ / s⁻ at the end"] if curves else []
    return _markdown_table([["objective", *(METRICS[m] for m in metrics), *last, "seeds"], *body])


def _ends(objective: _Objective) -> str:
    ends = (objective.end("s_pos"), objective.end("s_neg"))
    return " / ".join("·" if end is None else f"{end:.2f}" for end in ends)


def _noise(objectives: Sequence[_Objective]) -> str:
    """The verdicts on RSUM and on R@1 as a table, with how they were made."""
    runs = [run for o in objectives for run in o.runs]
    if any(not run.get("ranks") for run in runs):
        return "Unknown: the records carry no ranks of the single test queries."
    resamples = 2000
    rsum = significant_differences(runs, metric="rsum", resamples=resamples)
    r1 = {d.objective: d for d in significant_differences(runs, metric="r1", resamples=resamples)}
    head = ["objective", "RSUM", "to the best", "95 % interval", "verdict"]
    head += ["R@1", "to the best", "95 % interval", "verdict"]
    body = [[d.objective, *_difference(d), *_difference(r1[d.objective])] for d in rsum]
    several = any(len(o.runs) > 1 for o in objectives)
    method = (
        f"Paired bootstrap with {resamples} resamples over test queries{' and seeds' * several}; verdicts at 5 % after "
        f"Holm's correction for {len(objectives) - 1} comparisons, intervals uncorrected. R@1 is the mean of both "
        "directions. A tie is no proof of equality."
    )
    if not several:
        method = (
            "**One seed: a verdict compares these trained models, not their objectives, which another seed may put "
            f"in another order.** {method}"
        )
    return f"{_markdown_table([head, *body])}\n\n{method}"


def _difference(d: Difference) -> list[str]:
    if d.verdict == "best":
        return [f"{d.mean:.1f}", "", "", "**best**"]
    return [f"{d.mean:.1f}", _signed(d.difference), f"{_signed(d.low)} … {_signed(d.high)}", d.verdict]


def _signed(number: float) -> str:
    return f"{number:+.1f}".replace("-", "−")


def _side_by_side(default: Sequence[_Objective], tuned: Sequence[_Objective]) -> str:
    defaults, tuneds = {o.name: o for o in default}, {o.name: o for o in tuned}
    head = ["objective", "RSUM default", "RSUM tuned", "R@1 i→t default", "R@1 i→t tuned"]
    head += ["R@1 t→i default", "R@1 t→i tuned", "s⁺ / s⁻ default", "s⁺ / s⁻ tuned", "found parameters"]
    body = []
    for name in dict.fromkeys([*defaults, *tuneds]):
        pair = (defaults.get(name), tuneds.get(name))
        texts = [_text(o, metric) for metric in ("rsum", "i2t_r1", "t2i_r1") for o in pair]
        ends = [_ends(o) if o else "·" for o in pair]
        body.append([name, *texts, *ends, _parameters(pair[1])])
    return _markdown_table([head, *body])


def _parameters(objective: _Objective | None) -> str:
    """`lr 0.0005, tau 12`; those of each seed where they differ."""
    if objective is None:
        return "·"
    found = [
        ", ".join(f"{key} {value:.3g}" for key, value in run.get("params", {}).items() if value is not None)
        for run in objective.runs
    ]
    return " / ".join(dict.fromkeys(found))


def _tex(objectives: Sequence[_Objective], title: str, note: str) -> str:
    """A booktabs table of all recalls, a group of rows for each T and one for the recipes; the best in bold."""
    best = {metric: _best(objectives, metric) for metric in _REQUIRED}
    order = (*_REQUIRED[1:], "rsum")
    lines = []
    for previous, o in zip([None, *objectives], objectives, strict=False):
        if previous is None or (previous.T != o.T and not previous.P == o.P == "-"):
            lines.append(r"\midrule")
        texts = (_text(o, metric, r" \pm ") for metric in order)
        cells = [rf"$\mathbf{{{t}}}$" if best[m] is o else f"${t}$" for m, t in zip(order, texts, strict=True)]
        lines.append(" & ".join([_escape(o.name), *cells]) + r" \\")
    body = "\n".join(lines)
    caption = _escape(f"{title}. {'; '.join(note.splitlines())}. {_counts(objectives)}")
    return rf"""% needs \usepackage{{booktabs}}
\begin{{table}}[t]
\centering
\small
\setlength{{\tabcolsep}}{{4pt}}
\begin{{tabular}}{{l rrr rrr r}}
\toprule
& \multicolumn{{3}}{{c}}{{image $\to$ text}} & \multicolumn{{3}}{{c}}{{text $\to$ image}} & \\
\cmidrule(lr){{2-4}} \cmidrule(lr){{5-7}}
objective & R@1 & R@5 & R@10 & R@1 & R@5 & R@10 & RSUM \\
{body}
\bottomrule
\end{{tabular}}
\caption{{{caption}}}
\end{{table}}
"""


def _escape(text: str) -> str:
    for symbol in "&%$#_{}":
        text = text.replace(symbol, f"\\{symbol}")
    for symbol, tex in (("×", r"$\times$"), ("|", "$|$"), ("±", r"$\pm$"), ("→", r"$\to$"), ("·", r"$\cdot$")):
        text = text.replace(symbol, tex)
    return text


# ---- pictures --------------------------------------------------------------------------------------------


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight", pad_inches=0.15, facecolor="white")
    return file.getvalue()


def _frame(figure: Figure, title: str, note: str, objectives: Sequence[_Objective]) -> None:
    """The title above a picture and the conditions beneath it."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    width = int(figure.get_figwidth() * 15)
    lines = [*note.splitlines(), _counts(objectives)]
    text = "\n".join("\n".join(textwrap.wrap(line, width)) for line in lines)
    figure.text(0.01, -0.02, text, ha="left", va="top", fontsize=8, color="#555555", linespacing=1.4)


def _heatmap(objectives: Sequence[_Objective], title: str, note: str) -> Figure | None:
    """RSUM and R@1 of every cell T × P; None without cells."""
    cells = _cells(objectives)
    if not cells:
        return None
    rows, columns = _axes(objectives)
    size = (2.2 + 3 * (0.95 * len(columns) + 0.5), 1.6 + 0.75 * len(rows))
    figure = plotting.figure(*size)
    for axes, metric in zip(figure.subplots(1, 3, squeeze=False)[0], ("rsum", "i2t_r1", "t2i_r1"), strict=True):
        grid = np.array([[cells[T, P].mean(metric) if (T, P) in cells else np.nan for P in columns] for T in rows])
        low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
        margin = 0.2 * (high - low) or 1.0  # keeps the palette's palest and darkest ends out
        mesh = axes.pcolormesh(
            grid, cmap="Blues", vmin=low - margin / 2, vmax=high + margin, edgecolor="white", linewidth=2
        )
        best = _best([*cells.values()], metric)
        for i, T in enumerate(rows):
            for j, P in enumerate(columns):
                _annotate(axes, i, j, cells.get((T, P)), metric, best, dark=mesh.norm(grid[i, j]) > 0.55)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.invert_yaxis()
        axes.set_title(METRICS[metric].replace("i→t", "image → text").replace("t→i", "text → image"), fontsize=11)
        axes.set_xlabel("pair weight P")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.axes[0].set_ylabel("triplet weight T")
    _frame(figure, title, note, objectives)
    return figure


def _annotate(axes: Axes, i: int, j: int, cell: _Objective | None, metric: str, best: _Objective, dark: bool) -> None:
    """The number of the cell in row i and column j on its colour, framed where it is the best."""
    if cell is None:
        axes.text(j + 0.5, i + 0.5, "·", ha="center", va="center", color="#999999")
        return
    ink, std = "white" if dark else "#1A1A1A", cell.std(metric)
    height = 0.5 if std is None else 0.4
    axes.text(j + 0.5, i + height, f"{cell.mean(metric):.1f}", ha="center", va="center", color=ink, fontsize=11)
    if std is not None:
        axes.text(j + 0.5, i + 0.7, f"± {std:.1f}", ha="center", va="center", color=ink, fontsize=8)
    if cell is best:
        x, y = np.array([0.04, 0.96, 0.96, 0.04, 0.04]), np.array([0.04, 0.04, 0.96, 0.96, 0.04])
        axes.plot(j + x, i + y, color="#E69F00", linewidth=2.4, solid_joinstyle="miter")


def _curves(objectives: Sequence[_Objective], title: str, note: str) -> Figure | None:
    """Validation RSUM against steps: a panel for each T, and for every six recipes; None without curves."""
    drawn = [o for o in objectives if len(_mean_curve(o)[0])]
    if not drawn:
        return None
    panels = {f"T = {T}": [o for o in drawn if o.T == T and o.P != "-"] for T in _axes(drawn)[0]}
    recipes = [o for o in drawn if o.P == "-"]
    for first in range(0, len(recipes), 6):
        part = f" {first // 6 + 1}" if len(recipes) > 6 else ""
        panels[f"recipes{part}"] = recipes[first : first + 6]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = plotting.figure(0.8 + 4.1 * columns, 0.8 + 3.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    highest = max(_mean_curve(o)[1].max() for o in drawn)
    for axes, (name, lines) in zip(grid, panels.items(), strict=False):
        axes.axhline(highest, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        for k, o in enumerate(lines):
            k = _index(_P_ORDER, o.P) if o.P != "-" else k
            steps, mean, std = _mean_curve(o)
            colour, dash = plotting.COLOURS[k % 6], plotting.DASHES[k % 6]
            axes.plot(steps, mean, color=colour, linestyle=dash, linewidth=1.8, label=o.T if o.P == "-" else o.P)
            axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(name, fontsize=11, loc="left")
        axes.grid(color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", handlelength=3.2)
    for k in range(len(panels), len(grid)):
        grid[k].set_visible(False)
        grid[k - columns].tick_params(labelbottom=True)
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("validation RSUM", fontsize=10)
    several = any(len(o.runs) > 1 for o in drawn)
    band = "Bands: ± one standard deviation over seeds, as far as all seeds went. " if several else ""
    _frame(figure, title, f"{note}\n{band}Dotted: the highest mean of all.", objectives)
    return figure


def _mean_curve(objective: _Objective) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """Steps that every seed reached, with mean and deviation of the validation RSUM over the seeds."""
    curves = [{point["step"]: point["val_rsum"] for point in run.get("curve", ())} for run in objective.runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])
    return np.array(steps), values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))


def _similarities(objectives: Sequence[_Objective], title: str, note: str) -> Figure | None:
    """Where s⁺ and s⁻ stand after the last step, for each objective; None where no curve has them."""
    recorded = [o for o in objectives if o.end("s_pos") is not None and o.end("s_neg") is not None]
    drawn = [o for o in recorded if all(abs(o.end(key) or 0.0) <= 1 for key in ("s_pos", "s_neg"))]
    if not drawn:
        return None
    figure = plotting.figure(7.5, 1.4 + 0.27 * len(drawn))
    axes = figure.subplots()
    place = range(len(drawn))
    ends = {key: np.array([o.end(key) for o in drawn], np.float64) for key in ("s_neg", "s_pos")}
    axes.hlines(place, ends["s_neg"], ends["s_pos"], color="#BBBBBB", linewidth=2, zorder=1)
    axes.scatter(ends["s_neg"], place, marker="s", s=38, color="#D55E00", label="hardest negative s⁻", zorder=2)
    axes.scatter(ends["s_pos"], place, marker="o", s=42, color="#0072B2", label="positive s⁺", zorder=2)
    axes.set_yticks(place, [o.name for o in drawn])
    axes.invert_yaxis()
    axes.set_xlabel("mean similarity after the last step")
    axes.grid(axis="x", color="#EEEEEE")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)
    others = ", ".join(o.name for o in recorded if o not in drawn)
    _frame(figure, title, f"{note}\nNot a cosine, so not drawn: {others}." if others else note, objectives)
    return figure
