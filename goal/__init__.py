"""goal: objectives that live in gradient space.

A gradient is the product of a triplet weight T(s⁺, s⁻) and a pair weight P±(s); `goal.apply(x, y, T=..., P=...)`
emits ∂l/∂x and ∂l/∂y directly from these two weights.
"""

import importlib
import typing

from goal import mining, positives
from goal.caching import Cache, cached_step
from goal.candidates import Bank, Banked
from goal.evaluation import evaluate, evaluate_similarity, map_at_all
from goal.explain import Explanation, explain
from goal.functional import apply, apply_similarity, gradients
from goal.labels import pairs
from goal.objective import Objective
from goal.recipes import InfoNCE, SigLIP, recipe, recipes
from goal.spec import objective
from goal.stats import Stats
from goal.terms import P, T, pair_weight, triplet_weight

if typing.TYPE_CHECKING:
    from goal import data, offline
    from goal import lab as lab
    from goal import models as models
    from goal.diagnosis import Diagnosis, diagnose

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "Banked",
    "Cache",
    "Diagnosis",
    "Explanation",
    "InfoNCE",
    "Objective",
    "P",
    "SigLIP",
    "Stats",
    "T",
    "apply",
    "apply_similarity",
    "cached_step",
    "data",
    "diagnose",
    "evaluate",
    "evaluate_similarity",
    "explain",
    "gradients",
    "map_at_all",
    "mining",
    "objective",
    "offline",
    "pair_weight",
    "pairs",
    "positives",
    "recipe",
    "recipes",
    "triplet_weight",
]


# what a training step does not need comes when it is first asked for: its name, and the module that has it
_LATER = {
    **{module: module for module in ("data", "diagnosis", "lab", "models", "offline")},
    "Diagnosis": "diagnosis",
    "diagnose": "diagnosis",
}


if not typing.TYPE_CHECKING:  # which would take any name

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module 'goal' has no attribute {name!r}")
        module = importlib.import_module(f"goal.{_LATER[name]}")
        return module if name == _LATER[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
