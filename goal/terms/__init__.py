"""Triplet weights T(s⁺, s⁻) and pair weights P±(s): the terms whose product is a gradient.

A term is a small pure function of tensors, written with torch operators and registered by name:

    @goal.triplet_weight("mine")
    def mine(s_pos, s_neg, *, tau=10.0):
        return torch.sigmoid(tau * (s_neg - s_pos))

It is evaluated elementwise, so the same function serves per-anchor vectors (mined objectives) and tiles of
similarities (dense objectives). `goal.T.mine(tau=5.0)` is the term with its parameters bound.
"""

from goal.names import Parameter
from goal.terms.pair import pair_weight
from goal.terms.product import Product
from goal.terms.registry import P, Registry, T
from goal.terms.term import STATISTICS, Definition, Potential, Term
from goal.terms.triplet import triplet_weight

__all__ = [
    "STATISTICS",
    "Definition",
    "P",
    "Parameter",
    "Potential",
    "Product",
    "Registry",
    "T",
    "Term",
    "pair_weight",
    "triplet_weight",
]
