"""goal: objectives that live in gradient space.

A gradient is the product of a triplet weight T(s⁺, s⁻) and a pair weight P±(s); `goal.apply(x, y, T=..., P=...)` emits
∂l/∂x and ∂l/∂y straight from the chosen terms.
"""

from goal import mining
from goal.autograd import apply, apply_similarity, gradients
from goal.objective import InfoNCE, Objective, SigLIP, pairs, recipe, recipes
from goal.stats import Stats
from goal.terms import P, T, pair_weight, triplet_weight

__version__ = "0.1.0"

__all__ = [
    "InfoNCE",
    "Objective",
    "P",
    "SigLIP",
    "Stats",
    "T",
    "apply",
    "apply_similarity",
    "gradients",
    "mining",
    "pair_weight",
    "pairs",
    "recipe",
    "recipes",
    "triplet_weight",
]
