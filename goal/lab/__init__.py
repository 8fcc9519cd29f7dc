"""The gradient laboratory: see, prove and search objectives that no loss can express."""

from goal.lab import compose
from goal.lab.dissect import Dissection, dissect
from goal.lab.integrability import Integrability, Potential, integrability
from goal.lab.table import Table, known_loss, table

__all__ = [
    "Dissection",
    "Integrability",
    "Potential",
    "Table",
    "compose",
    "dissect",
    "integrability",
    "known_loss",
    "table",
]
