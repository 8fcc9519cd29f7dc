"""Records of similarities and gradients while a model trains, with alarms when embeddings collapse."""

from __future__ import annotations

import functools
import itertools
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import get_total_norm

from goal import plotting, validation
from goal.data.files import append_line, write_atomically
from goal.functional import gradients
from goal.validation import check_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

BINS = 40  # of the histograms, over [−1, 1]
COLLAPSED = 0.9  # share of anchors in the vanishing zone that raises an alarm
_ARGUMENTS = ("x", "y", "ids", "y_ids", "weight")  # of an objective's call


class _Call(NamedTuple):
    """The last call of the objective that requires grad."""

    given: dict[str, Any]  # the arguments, detached
    loss: Tensor  # 0-d
    settings: Any  # of a `goal.Objective`; None for other objectives
    norms: dict[str, tuple[Tensor, Tensor]]  # side → ‖gradient‖ and the norm of its tangential part, 0-d


class Diagnosis:
    """The rows that `goal.diagnose` collects: one for each call of `step`.

    Attributes:
        rows: dictionaries of plain JSON (see `goal.diagnose`).

    Example:
        >>> import goal, torch
        >>> objective = goal.Objective()
        >>> with goal.diagnose(objective) as diagnosis:
        ...     x = torch.eye(4, requires_grad=True)
        ...     objective(x, torch.eye(4)).backward()
        ...     row = diagnosis.step()
        >>> row["vanishing"], len(diagnosis.rows)
        (0.0, 1)
    """

    def __init__(
        self, objective: nn.Module, encoders: Mapping[str, nn.Module], path: Path | None, eps: float, start: int
    ) -> None:
        self.rows: list[Row] = []
        self._encoders, self._eps, self._start = encoders, eps, start
        self._path = None if path is None else path.absolute()  # the working directory may change
        if path is not None:
            if start:
                self.rows = [row for row in read(path) if row["step"] < start]
            write_atomically(path, "".join(f"{_line(row)}\n" for row in self.rows).encode())
        self._call: _Call | None = None
        self._taps: list[Any] = []
        self._hook = objective.register_forward_hook(self._forward, with_kwargs=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks from the objective; the rows stay."""
        self._hook.remove()
        self._release()

    def _release(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._taps, self._call = [], None

    def _forward(self, objective: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if not loss.requires_grad:  # an evaluation
            return
        self._release()
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        norms: dict[str, tuple[Tensor, Tensor]] = {}
        for side in ("x", "y"):
            if given[side].requires_grad:
                tap = functools.partial(_tap, norms, side, given[side].detach())
                self._taps.append(given[side].register_hook(tap))
        kept = {name: value.detach() if isinstance(value, Tensor) else value for name, value in given.items()}
        self._call = _Call(kept, loss.detach(), getattr(objective, "settings", None), norms)

    def step(self) -> Row:
        """The row of the last call of the objective: after `backward`, before the optimiser's step.

        It computes S once more, and need not be called at every step of training.

        Returns:
            The row; it is also written to the file, if there is one, and its new alarms are warnings.

        Raises:
            RuntimeError: no call since the last row, or no backward of that call.
        """
        call = self._call
        if call is None or (self._taps and not call.norms):
            raise RuntimeError("nothing to diagnose: call objective(x, y) and backward, and then step().")
        number = self.rows[-1]["step"] + 1 if self.rows else self._start
        row = {"step": number, **self._measure(call)}
        alarms = _alarms(row, call, self._eps)
        before = self.rows[-1]["alarms"] if self.rows else {}
        row["alarms"] = alarms
        self.rows.append(row)
        if self._path is not None:
            append_line(self._path, _line(row))
        self._release()
        for kind, words in alarms.items():
            if kind not in before:
                warnings.warn(f"step {number}: {words}", stacklevel=2)
        return row

    @torch.no_grad()
    def _measure(self, call: _Call) -> Row:
        given = {name: value for name, value in call.given.items() if name != "weight"}
        similarity = "dot" if call.settings is None else call.settings.similarity
        seen = gradients(**given, T="con", P="con", similarity=similarity, check_finite=False)[2]
        has = seen.index >= 0
        s_neg = seen.s_neg[has]
        apart = (seen.s_pos - seen.s_neg)[has].abs()
        norms = {side: tuple(norm.item() for norm in call.norms[side]) for side in "xy" if side in call.norms}
        return {
            "loss": call.loss.item(),
            "vanishing": _mean(apart < self._eps),
            "recall_at_1": seen.recall_at_1.mean().item(),
            "s_pos": _mean(seen.s_pos),
            "s_neg": _mean(s_neg),
            "gradient": {side: emitted for side, (emitted, _) in norms.items()},
            "tangent": {side: tangent for side, (_, tangent) in norms.items()},
            "encoders": {name: _norm(module) for name, module in self._encoders.items()},
            "histogram": {"s_pos": _histogram(seen.s_pos), "s_neg": _histogram(s_neg)},
        }

    def draw(self, path: str | Path | None = None) -> Figure:
        """The rows as curves and as histograms over time, saved to `path` if given.

        Raises:
            ValueError: there is no row.
            ImportError: matplotlib is not installed.
        """
        if not self.rows:
            raise ValueError("there is nothing to draw: no step has been diagnosed.")
        figure = plotting.figure(10.5, 8.5)
        grid = figure.subplots(3, 2, sharex=True)
        self._curves(grid[0, 0], "loss", {"": "loss"})
        self._curves(grid[0, 1], "shares", {f"|s⁺ − s⁻| < {self._eps:g}": "vanishing", "recall@1": "recall_at_1"})
        sides = {f"{side}, {what}": f"{key}.{side}" for side in "xy" for what, key in _PARTS.items()}
        self._curves(grid[1, 0], "norm of the gradient at the embeddings", sides, log=True)
        encoders = {name: f"encoders.{name}" for name in self._encoders}
        self._curves(grid[1, 1], "norm of the gradient at the encoders", encoders, log=True)
        grid[1, 1].set_visible(bool(encoders))
        for axes, key, title in zip(grid[2], ("s_pos", "s_neg"), ("s⁺", "hardest s⁻"), strict=True):
            self._densities(axes, key, title)
        grid[0, 1].set_ylim(-0.03, 1.03)
        figure.supxlabel("step", fontsize=10)
        if path is not None:
            plotting.save(figure, path)
        return figure

    def _curves(self, axes: Axes, title: str, names: Mapping[str, str], log: bool = False) -> None:
        """Lines of row entries, where `a.b` is row["a"]["b"]; grey while an alarm is on."""
        steps = [row["step"] for row in self.rows]
        for place, (label, name) in enumerate(names.items()):
            key, _, inner = name.partition(".")
            values = [row[key].get(inner) if inner else row[key] for row in self.rows]
            known = [math.nan if value is None or (log and value == 0) else value for value in values]
            style: dict[str, Any] = {
                "color": plotting.COLOURS[(place + 2) % 6],
                "linestyle": plotting.DASHES[place % 2],
                "linewidth": 1.6,
            }
            axes.plot(steps, known, label=label, marker="." if len(steps) == 1 else "", **style)
        for alarmed, run in itertools.groupby(self.rows, lambda row: bool(row["alarms"])):
            if alarmed:
                first, *_, last = 2 * [row["step"] for row in run]
                axes.axvspan(first - 0.5, last + 0.5, color="#BBBBBB", alpha=0.35, linewidth=0, zorder=0)
        if log:
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", handlelength=3.2)
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)

    def _densities(self, axes: Axes, key: str, title: str) -> None:
        """A histogram for each row; darker means more similarities."""
        found = [row["histogram"][key] for row in self.rows]
        counts = torch.tensor(found, dtype=torch.float64, device="cpu")  # (rows, BINS)
        shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).T.numpy()
        steps = [row["step"] for row in self.rows]
        edges = [step - 0.5 for step in steps] + [steps[-1] + 0.5]
        bins = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64, device="cpu").numpy()
        axes.pcolormesh(edges, bins, shares, cmap="Blues", vmin=0, rasterized=True)
        axes.set_title(title, fontsize=11, loc="left")


def diagnose(
    objective: nn.Module,
    encoders: nn.Module | Mapping[str, nn.Module] | None = None,
    *,
    path: str | Path | None = None,
    eps: float = 0.01,
    start: int = 0,
) -> Diagnosis:
    """Watch an objective while it trains: similarities, gradient norms, and alarms in words.

    A row contains loss; vanishing, the share of anchors with |s⁺ − max s⁻| < eps, where the gradients of a hardest
    negative and of its pair cancel; recall_at_1, s_pos and s_neg (means; of the batch's hardest negatives, whatever the
    mining); gradient, ‖g‖_F of the gradient at x and at y, and tangent, the same norm of

        g − (g · ẑ) ẑ,    ẑ = z / ‖z‖ of each row z

    the only part that moves a normalised embedding; encoders, the norm of all gradients of a module's parameters;
    histogram, counts of s⁺ and of the hardest s⁻ in 40 bins over [−1, 1], the outer bins open; and alarms, words by
    kind: `collapse`, `unreached` (no gradient at an encoder), `finite` (which values are not). Training is unchanged to
    the bit.

    Args:
        objective: called, in eager mode, with (x, y, …): any module of this library, or another module of that form,
            such as `goal.training.Curriculum`. Calls without gradient are ignored.
        encoders: modules whose gradients are watched, by name.
        path: a file that gets a line of JSON for each row; an existing file is replaced.
        eps: half the width of the vanishing zone, >= 0.
        start: number of the first row; a resumed run keeps the file's earlier rows.

    Returns:
        `Diagnosis`: call its `step()` between backward and the optimiser's step. With a loss scale the gradients at
        the embeddings are scaled. `close()` it, or use it in `with`.

    Raises:
        ValueError, TypeError: an eps or a start that is not allowed; a file that is no such log.

    Example:
        >>> import goal, torch, warnings
        >>> encoder = torch.nn.Linear(8, 4)
        >>> objective = goal.Objective(T=goal.T.con(margin=0.2), P="con")
        >>> with goal.diagnose(objective, encoder) as diagnosis, warnings.catch_warnings(action="ignore"):
        ...     x = torch.nn.functional.normalize(encoder(torch.ones(6, 8)), dim=1)
        ...     objective(x, x.detach()).backward()
        ...     print(diagnosis.step()["alarms"]["collapse"].partition(";")[0])
        loss 0.4 is at 2·margin, as where every similarity is equal

    Source: the vanishing zone is that of T-SelHN (Li et al., RVSE++).
    """
    eps = check_number("goal.diagnose", "eps", eps)
    start = validation.whole_number("start", start, 0)
    if isinstance(encoders, nn.Module):
        encoders = {"encoder": encoders}
    return Diagnosis(objective, dict(encoders or {}), None if path is None else Path(path), eps, start)


def read(path: str | Path) -> list[Row]:
    """The rows of a file that `diagnose` wrote; an incomplete last line is left out.

    Raises:
        ValueError: no such file, or a line that is no row.

    Example:
        >>> import goal, tempfile, torch
        >>> from goal.diagnosis import read
        >>> path, objective = tempfile.mkdtemp() + "/log.jsonl", goal.Objective()
        >>> with goal.diagnose(objective, path=path) as diagnosis:
        ...     objective(torch.eye(4, requires_grad=True), torch.eye(4)).backward()
        ...     row = diagnosis.step()
        >>> read(path) == [row]
        True
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline there is nothing, or an incomplete line
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            row["step"], row["alarms"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: line {number + 1} is no row of a diagnosis: {error!r}") from None
        rows.append(row)
    return rows


def _line(row: Row) -> str:
    return json.dumps(_plain(row), allow_nan=False)


def _plain(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tap(norms: dict[str, tuple[Tensor, Tensor]], side: str, z: Tensor, gradient: Tensor) -> None:
    """Hook at rows z (n, D): store the norms of the gradient."""
    with torch.no_grad():
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        g, unit = gradient.detach().to(wide), normalize(z.to(wide), dim=1)
        norms[side] = g.norm(), (g - (g * unit).sum(1, keepdim=True) * unit).norm()


def _norm(module: nn.Module) -> float:
    found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return float(get_total_norm(found).item()) if found else 0.0


def _mean(values: Tensor) -> float:
    return values.double().mean().item() if values.numel() else 0.0


def _histogram(s: Tensor) -> list[int]:
    place = ((s[~s.isnan()] + 1) / 2 * BINS).clamp(0, BINS - 1).long()
    return place.bincount(minlength=BINS).tolist()


def _alarms(row: Row, call: _Call, eps: float) -> dict[str, str]:
    """Kind of alarm → message."""
    found = {}
    numbers = {"loss": row["loss"], **{f"gradient at {side}": norm for side, norm in row["gradient"].items()}}
    if wrong := [f"the {name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]:
        found["finite"] = "; ".join(wrong)
    if row["vanishing"] >= COLLAPSED:
        found["collapse"] = _collapse(row, call, eps)
    arrived = math.hypot(*row["gradient"].values()) if row["gradient"] else 0.0
    if arrived > 0 and (silent := [repr(name) for name, norm in row["encoders"].items() if norm == 0]):
        found["unreached"] = (
            f"no gradient reaches {', '.join(silent)}, though one of {arrived:.3g} is at the embeddings"
        )
    return found


def _collapse(row: Row, call: _Call, eps: float) -> str:
    parts, advice = [], "try mining='selective' or a warm-up"
    if call.settings is not None:
        term, mean = call.settings.product.T, call.settings.reduction == "mean"
        margin = term.params.get("margin") if term.name == "con" else None
        level = row["loss"] if mean else row["loss"] / min(len(call.given["x"]), len(call.given["y"]))
        if margin and abs(level / (2 * margin) - 1) < 0.01:
            parts.append(f"loss {row['loss']:.4g} is at 2·margin, as where every similarity is equal")
        if call.settings.mining.name == "selective":
            advice = "try a warm-up"
    parts.append(f"{row['vanishing']:.0%} of anchors have |s⁺ − s⁻| < {eps:g}")
    arrived, along = (math.hypot(*row[key].values()) if row[key] else 0.0 for key in ("gradient", "tangent"))
    if along < 0.1 * arrived:
        parts.append(f"{along / arrived:.1%} of the gradient is along the sphere, which is what moves unit embeddings")
    return "; ".join([*parts, advice])


_PARTS = {"all": "gradient", "along the sphere": "tangent"}
