"""The gradient laboratory: see, prove and search objectives that no loss can express."""

from goal.lab import compose
from goal.lab.batch import batch_integrability
from goal.lab.draw import gallery, show
from goal.lab.dynamics import compare, simulate, triplet_trajectory
from goal.lab.factor import Dissection, dissect
from goal.lab.losses import Table, known_loss, table
from goal.lab.search import Discovery, discover
from goal.lab.verdict import Integrability, Potential, integrability
from goal.lab.webpage import page

__all__ = [
    "Discovery",
    "Dissection",
    "Integrability",
    "Potential",
    "Table",
    "batch_integrability",
    "compare",
    "compose",
    "discover",
    "dissect",
    "gallery",
    "integrability",
    "known_loss",
    "page",
    "show",
    "simulate",
    "table",
    "triplet_trajectory",
]
