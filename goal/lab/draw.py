"""Pictures of T × P over the square of similarities: weights, field, curl, loss, and the paths of triplets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from goal import plotting
from goal.lab.dynamics import triplet_trajectory
from goal.lab.field import Field, field_of
from goal.lab.losses import Table, known_loss
from goal.lab.verdict import Integrability
from goal.terms import Product

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STARTS = (
    (-0.6, 0.7),
    (0.1, 0.9),
    (0.2, -0.6),
    (0.8, 0.75),
    (-0.8, -0.5),
)  # (s⁺, s⁻) of the triplets that are followed
_PATH, _END = "#D55E00", "#000000"  # Okabe and Ito's orange-red, on blues and greys


def show(report: Integrability, path: str | Path | None = None) -> Figure:
    """Six panels for what `integrability` found: T, P±, field and trajectories, curl, loss, triplets on a sphere.

    s⁺ runs to the right and s⁻ upwards, so the goal, s⁺ = 1 with s⁻ low, is at the lower right. The field is that of
    descent, (T·P⁺, −T·P⁻). Its equilibria are where it vanishes.

    Args:
        report: of `goal.lab.integrability(T, P)`.
        path: a file to write as well: .png, .svg or .pdf.

    Raises:
        ValueError: another kind of file.
        ImportError: matplotlib is not installed; the extra `train` brings it.

    Example:
        >>> from goal import lab
        >>> figure = lab.show(lab.integrability("nca", "lin"), path="nca-lin.png")
    """
    figure = plotting.figure(13, 8.2)
    axes = figure.subplots(2, 3)
    field = field_of(Product(report.T, report.P))
    loss = known_loss(Product(report.T, report.P)) if report.integrable else None
    verdict = (
        f"the gradient of a loss{f' ({loss})' if loss else ''}" if report.integrable else "the gradient of no loss"
    )
    figure.suptitle(f"{report.T} × {report.P}: {verdict}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    _weights(axes[0, 0], axes[0, 1], report)
    _descent(axes[0, 2], report, field)
    _curl(axes[1, 0], report)
    _loss(axes[1, 1], report)
    axes[1, 2].remove()
    _sphere(figure.add_subplot(2, 3, 6, projection="3d"), report)
    if path is not None:
        plotting.save(figure, path)
    return figure


def gallery(table: Table, path: str | Path | None = None) -> Figure:
    """Every cell of a `table` as a small picture: the field's direction over its curl, a triplet followed from five
    starts; jumps show as lines of curl.
    """
    rows, columns = len(table.rows), len(table.columns)
    figure = plotting.figure(2.9 * columns, 2.95 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i in range(rows):
        for j in range(columns):
            axes, report = grid[i, j], table.cells[i][j]
            _curl(axes, report, bar=False)
            field = field_of(Product(report.T, report.P))
            _streams(axes, field, density=0.6, color="#555555")
            _paths(axes, report)
            above = f"P = {table.columns[j]}\n\n" if i == 0 else ""
            axes.set_title(above + table.text(i, j), fontsize=8)
            axes.set(xlabel="s⁺" if i == rows - 1 else "", ylabel=f"T = {table.rows[i]}\ns⁻" if j == 0 else "")
    if path is not None:
        plotting.save(figure, path)
    return figure


# ---------------------------------------------------------------------------------------------------------- the panels


def _square(axes: Axes, title: str) -> None:
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xlabel="s⁺", ylabel="s⁻", aspect="equal", title=title)


def _middles(report: Integrability) -> torch.Tensor:
    """The middles of the grid's cells."""
    return (report.field.at[1:] + report.field.at[:-1]) / 2


def _map(axes: Axes, at: torch.Tensor, values: torch.Tensor, **style: Any) -> Any:
    """Values [s⁺, s⁻] as colours."""
    ticks = at.numpy()
    return axes.pcolormesh(ticks, ticks, values.T.numpy(), shading="nearest", rasterized=True, **style)


def _weights(of_t: Axes, of_p: Axes, report: Integrability) -> None:
    at = _middles(report)
    s_pos, s_neg = torch.meshgrid(at, at, indexing="ij")
    product = Product(report.T, report.P)
    zero = dict.fromkeys(product.statistics, torch.zeros_like(s_pos))
    t, p_pos, p_neg = (torch.as_tensor(w).double().expand(s_pos.shape) for w in product.weights(s_pos, s_neg, zero))
    image = _map(of_t, at, t, cmap="viridis")
    of_t.figure.colorbar(image, ax=of_t, shrink=0.8)
    _square(of_t, "triplet weight T(s⁺, s⁻)")
    middle = len(at) // 2
    of_p.plot(at.numpy(), p_pos[:, middle].numpy(), color="#0072B2", label="P⁺(s⁺)")
    of_p.plot(at.numpy(), p_neg[middle].numpy(), color="#D55E00", linestyle="--", label="P⁻(s⁻)")
    if (p_pos.std(1) > 1e-12).any() or (p_neg.std(0) > 1e-12).any():  # of both similarities: the other one at 0
        of_p.set_title("pair weights, the other similarity at 0")
    else:
        of_p.set_title("pair weights")
    of_p.axhline(0, color="#999999", linewidth=0.8)
    of_p.set(xlim=(-1, 1), xlabel="similarity")
    of_p.legend(frameon=False)
    of_p.spines[["top", "right"]].set_visible(False)


def _streams(axes: Axes, field: Field, **style: Any) -> Any:
    at = torch.linspace(-1, 1, 41, dtype=torch.float64, device="cpu")
    s_pos, s_neg = torch.meshgrid(at, at, indexing="xy")
    f_pos, f_neg = field(s_pos, s_neg)
    if not (f_pos.any() or f_neg.any()):
        return None
    return axes.streamplot(at.numpy(), at.numpy(), -f_pos.numpy(), -f_neg.numpy(), linewidth=0.8, **style)


def _descent(axes: Axes, report: Integrability, field: Field) -> None:
    at = torch.linspace(-1, 1, 161, dtype=torch.float64, device="cpu")
    f_pos, f_neg = field(*torch.meshgrid(at, at, indexing="ij"))
    size = torch.hypot(f_pos, f_neg)
    image = _map(axes, at, size, cmap="Blues")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    _streams(axes, field, color="#444444", density=0.9)
    rest = size <= 1e-3 * size.max()
    if rest.any():  # where a triplet stays
        axes.contourf(
            at.numpy(), at.numpy(), rest.double().T.numpy(), levels=[0.5, 1.5], colors="none", hatches=["...."]
        )
    _paths(axes, report)
    _square(axes, "descent, its size, and triplets on a sphere")


def _paths(axes: Axes, report: Integrability) -> None:
    """Triplets on a sphere, followed until they rest or for 400 steps."""
    for s_pos, s_neg in _STARTS:
        path = triplet_trajectory(report.T, report.P, s_pos, s_neg, steps=400, lr=0.02)
        axes.plot(path.s_pos, path.s_neg, color=_PATH, linewidth=1.6)
        axes.plot(path.s_pos[0], path.s_neg[0], "o", color=_PATH, markersize=3.5)
        axes.plot(path.s_pos[-1], path.s_neg[-1], "s", color=_END, markersize=3.5)


def _curl(axes: Axes, report: Integrability, bar: bool = True) -> None:
    curl, at = report.field.curl, _middles(report)
    size, most = curl.abs().max().item(), 4 * curl.abs().quantile(0.95).item()
    limit = most if 1e-3 * size < most < size else size  # few cells that jump, far above the rest, are cut off
    limit = limit if size > 1e-9 else 1.0
    image = _map(axes, at, curl, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if bar:
        axes.figure.colorbar(image, ax=axes, shrink=0.8, extend="both" if size > limit else "neither")
    _square(axes, "curl ∂(T·P⁻)/∂s⁺ + ∂(T·P⁺)/∂s⁻" if size > 1e-9 else "curl: 0 everywhere")


def _loss(axes: Axes, report: Integrability) -> None:
    at, loss = report.field.at.numpy(), report.field.potential.T.numpy()
    axes.contourf(at, at, loss, levels=24, cmap="cividis")
    lines = axes.contour(at, at, loss, levels=12, colors="white", linewidths=0.7)
    axes.clabel(lines, fontsize=7)
    share = f"{100 * report.rotational_share:.2g} % of the field is not its gradient"
    _square(axes, "the loss" if report.integrable else f"the nearest loss;\n{share}")


def _sphere(axes: Any, report: Integrability) -> None:
    """Anchor, positive and negative of one triplet on their sphere."""
    u, v = torch.meshgrid(
        torch.linspace(0, 6.2832, 25, device="cpu"), torch.linspace(0, 3.1416, 13, device="cpu"), indexing="ij"
    )
    globe = [each.numpy() for each in (u.cos() * v.sin(), u.sin() * v.sin(), v.cos())]
    axes.plot_wireframe(*globe, color="#DDDDDD", linewidth=0.4)
    path = triplet_trajectory(report.T, report.P, *_STARTS[0], steps=400, lr=0.02)
    assert path.points is not None
    for k, (name, colour) in enumerate((("anchor", "#000000"), ("positive", "#0072B2"), ("negative", "#D55E00"))):
        x, y, z = path.points[:, k].T
        axes.plot(x, y, z, color=colour, label=name)
        axes.plot(x[-1:], y[-1:], z[-1:], "s", color=colour, markersize=4)
    axes.set(title=f"a triplet from s⁺ = {_STARTS[0][0]}, s⁻ = {_STARTS[0][1]}")
    axes.set_axis_off()
    axes.set_box_aspect((1, 1, 1), zoom=1.5)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
