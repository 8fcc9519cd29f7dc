"""Shared parts of all pictures: an empty figure, a palette, and writing a file completely or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goal.data.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by people with any kind of colour vision; a dash pattern repeats each colour.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)), (0, (8, 3)))
_FORMATS = (".png", ".svg", ".pdf")


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn by the Agg backend, whatever the caller uses.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'goal-objectives[train]'") from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(drawn: Figure, path: str | Path, dpi: int = 110) -> None:
    """Write a figure whole or not at all.

    Raises:
        ValueError: a kind of file other than .png, .svg and .pdf.
    """
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"path={str(path)!r} must end in one of {', '.join(_FORMATS)}.")
    file = io.BytesIO()
    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    style: dict[str, Any] = {"bbox_inches": "tight", "facecolor": "white", "metadata": metadata}
    drawn.savefig(file, format=path.suffix[1:], dpi=dpi, **style)
    write_atomically(path, file.getvalue())
