"""The gradient laboratory: see, prove and search objectives that no loss can express."""

from goal.lab.dissect import Dissection, dissect
from goal.lab.integrability import Integrability, Potential, integrability

__all__ = ["Dissection", "Integrability", "Potential", "dissect", "integrability"]
