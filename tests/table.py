"""The one table that drives the contract tests: every term, miner, similarity, reduction, ids and shape.

`cases()` is every combination of T × P × mining × similarity × reduction × ids once, with parameters, shapes, scales,
directions and what counts as positive spread over them. `covering()` is the small part of it that the suite runs unless
it is asked for the full product (`pytest -m full`): what goes wrong where any three of the six meet goes wrong in one
of its cases.

The inputs lie on a binary grid coarse enough that every dot product, squared norm and difference is exact in float64,
in whatever order it is summed: a tie is a tie and no threshold is decided by rounding, so float64 results may be
compared anchor by anchor, none left out. The level of soft positives lies on no grid.
"""

import random
from collections.abc import Iterator, Mapping
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
Params = Mapping[str, Any]

# (name, parameters): entries of one name are its variants; con with a margin counts as a T of its own
TERMS_T: tuple[tuple[str, Params], ...] = (
    ("con", {}),
    ("con", {"margin": 0.2}),
    ("con", {"margin": 0.7}),
    ("nca", {}),
    ("nca", {"tau": 4.0}),
    ("cir", {}),
    ("cir", {"tau": 3.0}),
)
TERMS_P: tuple[tuple[str, Params], ...] = (
    ("con", {}),
    ("lin", {}),
    ("sig", {}),
    ("sig", {"alpha": 3.0, "beta": 7.0, "lam": 0.3}),
    ("lin-ms", {}),
    ("sig-ms", {}),
    ("sig-ms", {"alpha": 1.5, "beta": 6.0, "lam": 0.2}),
    ("sig-ms", {"self_term": True}),
    ("sig-ms", {"alpha": 4.0, "beta": 20.0, "lam": 0.7, "self_term": True}),
)
MINING: tuple[tuple[str, Params], ...] = (
    ("hardest", {}),
    ("semi-hard", {}),
    ("semi-hard", {"margin": 0.6}),
    ("all", {}),
    ("all", {"average": False}),
    ("all", {"average": False, "pull": "once"}),
    ("all", {"pull": "once"}),
    ("selective", {}),
    ("selective", {"eps": 0.3}),
    ("soft", {}),
    ("soft", {"tau": 4.0}),
    ("soft", {"tau": 6.0, "alpha": 2.5, "normalise": "mean"}),
    ("soft", {"tau": 5.0, "at": "each"}),
    ("soft", {"tau": 8.0, "over": "candidates"}),
    ("soft", {"tau": 6.0, "hardness": "square", "level": "root", "at": "each"}),
    ("soft", {"tau": 6.0, "hardness": "circle", "normalise": "mean", "over": "candidates"}),
)
SIMILARITIES = ("dot", "cosine", "order")
REDUCTIONS = ("mean", "sum")
SHAPES: tuple[tuple[int, int, int], ...] = (  # (N, M, D)
    (1, 1, 8),
    (1, 4, 8),
    (4, 1, 5),
    (2, 2, 1),
    (2, 2, 8),
    (5, 7, 1),
    (6, 6, 2),
    (7, 12, 8),
    (12, 7, 5),
    (12, 12, 8),
    (16, 16, 12),
    (11, 24, 6),
    (24, 13, 8),
)
IDS = (
    "none",
    "fives",  # groups of five, as five captions of one image
    "equal",  # all equal: no anchor has a negative
    "extra",  # N ≠ M, and the further rows share their ids with some pairs
    "unrelated",  # ids and y_ids drawn apart: positives by ids, and some anchors have none
)
PAIR: tuple[str, Params] = ("pair", {})
BY_IDS: tuple[tuple[str, Params], ...] = (
    ("hardest", {}),
    ("soft", {}),
    ("soft", {"tau": 0.0}),
    ("soft", {"tau": -4.0}),
    ("soft", {"tau": 5.0, "at": "each"}),
    ("soft", {"tau": 4.0, "hardness": "circle", "at": "each"}),
)

# lin-ms leaves out differences of exactly 0, which rounding decides where s̃⁺ is no similarity or mean of the grid
ON_GRID: tuple[tuple[str, Params], ...] = (("hardest", {}), ("soft", {"tau": 0.0}))

SCALES = (1.0, 1.0, 1.0, 1.0, 0.25, 3.0)  # drawn from: two thirds have the default
DIRECTIONS = ("both", "both", "both", "both", "x→y", "y→x")

# (T, T_params, P, P_params) that are the gradient of the value they return
INTEGRABLE: tuple[tuple[str, Params, str, Params], ...] = (
    *(("con", T_params, "con", {}) for T, T_params in TERMS_T if T == "con"),
    *(("con", {}, P, P_params) for P, P_params in TERMS_P if P in ("lin", "sig")),
    *(("nca", T_params, "con", {}) for T, T_params in TERMS_T if T == "nca"),
    *(("cir", T_params, "lin", {}) for T, T_params in TERMS_T if T == "cir"),
)


def stays_integrable(
    term: tuple[str, Params, str, Params],
    mining: str,
    params: Params,
    positives: str = "pair",
    positives_params: Mapping[str, Any] = {},
) -> bool:
    """Whether an entry of INTEGRABLE is the gradient of its value when it is mined so.

    A single pull beside the sum of all pushes needs a T that does not see the negatives. The level s̃ has the shares q
    as its derivative where hardness and level are the linear ones and alpha is 0, and P⁻(s̃) is P⁻(s) where it is
    constant. Left out is P = lin at each candidate with the square and its root, whose derivative is q · s / s̃. So it
    is with the level s̃⁺ of soft positives, whatever their tau.
    """
    T, T_params, P, _ = term
    if positives == "soft":
        linear = positives_params.get("hardness", "linear") == "linear"
        if not linear or (P != "con" and positives_params.get("at") == "each"):
            return False
    if mining == "all" and params == {"average": False, "pull": "once"}:
        return T == "con" and "margin" not in T_params
    if mining == "soft":
        linear = {params.get("hardness", "linear"), params.get("level", "linear")} == {"linear"}
        return linear and params.get("alpha", 0.0) == 0 and (P == "con" or params.get("at") != "each")
    return True


class Case(NamedTuple):
    T: str
    T_params: Params
    P: str
    P_params: Params
    mining: str
    mining_params: Params
    similarity: str
    reduction: str
    ids_case: str
    shape: tuple[int, int, int]
    scale: float = 1.0
    directions: str = "both"
    positives: str = "pair"
    positives_params: Mapping[str, Any] = {}

    @property
    def id(self) -> str:
        """A readable, unique name for pytest."""
        terms = [(self.T, self.T_params), (self.P, self.P_params), (self.mining, self.mining_params)]
        *calls, positives = [
            f"{name}({','.join(f'{k}={v}' for k, v in params.items())})"
            for name, params in (*terms, (self.positives, self.positives_params))
        ]
        sizes = "x".join(map(str, self.shape))
        scale = [] if self.scale == 1 else [f"scale={self.scale}"]
        directions = [] if self.directions == "both" else [self.directions]
        by_ids = [] if self.positives == "pair" else [f"positives={positives}"]
        named = [*calls, self.similarity, self.reduction, f"ids={self.ids_case}", sizes]
        return "-".join([*named, *scale, *directions, *by_ids])


def _families(terms: tuple[tuple[str, Params], ...]) -> list[list[tuple[str, Params]]]:
    """Terms grouped with their variants."""
    families: dict[tuple[str, bool], list[tuple[str, Params]]] = {}
    for name, params in terms:
        families.setdefault((name, name == "con" and "margin" in params), []).append((name, params))
    return list(families.values())


def _fits(shape: tuple[int, int, int], ids_case: str) -> bool:
    """Whether this shape has what the layout of ids is about: further rows, or two groups of five."""
    N, M, _ = shape
    return {"extra": N != M, "fives": max(N, M) > 5}.get(ids_case, True)


def cases() -> Iterator[Case]:
    """Every T × P × mining × similarity × reduction × ids, each with one choice of all else.

    Without ids positives are pairs, where ids and y_ids are unrelated they are by ids; half and half elsewhere.
    """
    positives_of = {"none": (PAIR,), "unrelated": BY_IDS}
    every = product(_families(TERMS_T), _families(TERMS_P), _families(MINING), SIMILARITIES, REDUCTIONS, IDS)
    for number, (Ts, Ps, minings, similarity, reduction, ids_case) in enumerate(every):
        choose = random.Random(f"draw {number}").choice
        shapes = [shape for shape in SHAPES if _fits(shape, ids_case)]
        (T, T_params), (P, P_params), (mining, mining_params) = choose(Ts), choose(Ps), choose(minings)
        terms = T, T_params, P, P_params, mining, mining_params
        further = choose(shapes), choose(SCALES), choose(DIRECTIONS)
        positives = choose(positives_of.get(ids_case, (PAIR,) * len(BY_IDS) + BY_IDS))
        if P == "lin-ms" and positives not in (PAIR, *ON_GRID):
            positives = choose(ON_GRID)
        yield Case(*terms, similarity, reduction, ids_case, *further, *positives)


FACTORS = ("T", "P", "mining", "similarity", "reduction", "ids_case")
Covered = set[tuple[tuple[str, Any], ...]]


def covers(case: Case) -> Covered:
    """What a case is an example of: values that meet in it.

    Every three of the six factors, T × P × mining × similarity with and without ids, P × mining × similarity with each
    layout of them; each variant of a term with each shape, and with each layout of ids; each variant of mining with a
    scale, each mining with each choice of directions; each variant of positives with each T, P, mining, similarity and
    shape, and with a scale; and each variant of mining with pairs and by ids. Where an anchor that lacks positives or
    negatives emits what it has, each layout of ids in each direction.
    """
    T = "con with a margin" if "margin" in case.T_params else case.T
    factors = [("T", T), *((name, getattr(case, name)) for name in FACTORS[1:])]
    of_T, P, mining, similarity, _, ids_case = factors
    with_ids = "ids", case.ids_case != "none"
    met: Covered = {
        *combinations(factors, 3),
        (of_T, P, mining, similarity, with_ids),
        (P, mining, similarity, ids_case),
    }
    variants = [(name, f"{getattr(case, name)}{getattr(case, f'{name}_params')}") for name in ("T", "P", "mining")]
    met |= {(variant, other) for variant in variants for other in (("shape", case.shape), ids_case)}
    scaled, positives = ("with a scale", case.scale != 1), ("positives", f"{case.positives}{case.positives_params}")
    met |= {(positives, other) for other in (of_T, P, mining, similarity, ("shape", case.shape), scaled)}
    met |= {(variants[-1], ("by ids", case.positives != "pair"))}
    once = case.mining_params.get("pull") == "once"
    in_parts = T == "con" and (once or (case.mining == "soft" and "over" not in case.mining_params))
    if in_parts and case.positives != "pair":
        emitted = ("x→y", "y→x") if case.directions == "both" else (case.directions,)
        met |= {(mining, ids_case, ("emits in parts", direction)) for direction in emitted}
    return met | {(variants[-1], scaled), (mining, ("directions", case.directions))}


def covering() -> list[Case]:
    """Few cases that cover what all do, in the order of `cases()`.

    For each T × P × mining × similarity, with ids and without, first the case that adds most: as many are needed. Then
    whatever still adds something.
    """
    every = list(cases())
    met = [covers(case) for case in every]
    missing: Covered = set().union(*met)
    taken: set[int] = set()
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, case in enumerate(every):
        T = case.T, "margin" in case.T_params
        of = T, case.P, case.mining, case.similarity, case.ids_case != "none"
        groups.setdefault(of, []).append(number)
    for numbers in groups.values():
        best = max(numbers, key=lambda number: len(met[number] & missing))
        taken.add(best)
        missing -= met[best]
    for number in range(len(every)):
        if met[number] & missing:
            taken.add(number)
            missing -= met[number]
    return [every[number] for number in sorted(taken)]


# ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────


def _turn(rng: np.random.Generator, rows: Array) -> Array:
    """Each row reflected, exactly, in a random (±½, ±½, ±½, ±½, 0, …); for D < 4 shuffled and signed anew."""
    n, D = rows.shape
    if D < 4:
        return rng.permuted(rows * rng.choice([-1.0, 1.0], (n, D)), axis=1)
    half = np.zeros((n, D))
    half[:, :4] = rng.choice([-0.5, 0.5], (n, 4))
    half = rng.permuted(half, axis=1)
    turned: Array = rows - 2 * (rows * half).sum(axis=1, keepdims=True) * half
    return turned


def _lengths(rng: np.random.Generator, case: Case, n: int, spread: bool) -> Array:
    """Row norms (n, 1): 1, or between 0.3 and 2; powers of two for the cosine, which then divides exactly."""
    if not spread:
        return np.ones((n, 1))
    if case.similarity == "cosine":
        return rng.choice([0.5, 1.0, 2.0], (n, 1))
    return np.ceil(rng.uniform(0.3, 2.0, (n, 1)) * 64) / 64


def _ids(rng: np.random.Generator, case: Case) -> tuple[Ids | None, Ids | None]:
    N, M, _ = case.shape
    K = min(N, M)
    match case.ids_case:
        case "none":
            return None, None
        case "fives":
            ids, y_ids = np.arange(N) // 5, np.arange(M) // 5
        case "equal":
            ids, y_ids = np.zeros(N, np.int64), np.zeros(M, np.int64)
        case "extra":
            known = np.arange(K)
            ids, y_ids = (np.concatenate([known, rng.integers(0, 2 * K, n - K)]) for n in (N, M))
        case "unrelated":
            ids, y_ids = rng.integers(0, 4, N), rng.integers(0, 4, M)
        case _:
            raise ValueError(f"ids_case={case.ids_case!r}")
    ids, y_ids = ids + 2**60 - 2, y_ids + 2**60 - 2  # apart only in int64: float64 rounds them all to 2**60
    return ids, None if N == M and case.ids_case != "unrelated" else y_ids


def make_inputs(case: Case, seed: int) -> tuple[Array, Array, Ids | None, Ids | None, Array | None]:
    """x (N, D), y (M, D), ids (N,), y_ids (M,) and weight (K,) for a case; the last three may be None.

    Half of the cases have unit rows, the others norms from 0.3 to 2. The pairs are alike by varying degrees,
    some identical; a few rows are copies of others, and in some cases one is zero. A third of the cases has
    weights, zeros among them, but where positives are by ids and N ≠ M: all rows are anchors there.
    """
    rng = np.random.default_rng(list(f"{case.id} {seed}".encode()))
    N, M, D = case.shape
    K = min(N, M)
    x, y = np.zeros((N, D)), np.zeros((M, D))
    x[:, 0] = y[:, 0] = 1.0
    for _ in range(12):
        x, y = _turn(rng, x), _turn(rng, y)
    y[:K] = x[:K]
    for probability in (0.75, 0.4):
        turned = rng.random(K) < probability
        y[:K] = np.where(turned[:, None], _turn(rng, y[:K]), y[:K])

    spread = bool(rng.integers(2))
    x *= _lengths(rng, case, N, spread)
    y *= _lengths(rng, case, M, spread)
    for rows in (x, y):
        for _ in range(len(rows) // 5):
            rows[rng.integers(len(rows))] = rows[rng.integers(len(rows))]
        if rng.random() < 0.15:
            rows[rng.integers(len(rows))] = 0.0

    ids, y_ids = _ids(rng, case)
    weight = None
    if rng.random() < 1 / 3:
        weight = rng.choice([0.0, 0.25, 1.0, 3.0], K)
    if case.positives != "pair" and N != M:
        weight = None
    return x, y, ids, y_ids, weight
