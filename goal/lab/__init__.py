"""The gradient laboratory: see, prove and search objectives that no loss can express."""

from goal.lab import compose
from goal.lab.batch import batch_integrability
from goal.lab.discover import Discovery, discover
from goal.lab.dissect import Dissection, dissect
from goal.lab.draw import gallery, show
from goal.lab.integrability import Integrability, Potential, integrability
from goal.lab.page import page
from goal.lab.simulate import compare, simulate, triplet_trajectory
from goal.lab.table import Table, known_loss, table

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
