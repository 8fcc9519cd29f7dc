"""The truth in float64, written from the formulas entry by entry: dense, slow, free of clever algebra.

For anchor i with positive s⁺ᵢ and a selection mᵢⱼ over its negatives, each direction (rows against columns
and columns against rows) adds to G = ∂l/∂S

    Gᵢⱼ     += mᵢⱼ · T(s⁺ᵢ, sᵢⱼ) · P⁻(sᵢⱼ)
    Gᵢ,p(i) −= mᵢⱼ · T(s⁺ᵢ, sᵢⱼ) · P⁺(s⁺ᵢ)

or, where mining is soft, with the shares qᵢⱼ of the candidates in the level s̃ᵢ of all of them,

    Gᵢⱼ     += mᵢ · T(s⁺ᵢ, s̃ᵢ) · P⁻(s̃ᵢ) · qᵢⱼ
    Gᵢ,p(i) −= mᵢ · T(s⁺ᵢ, s̃ᵢ) · P⁺(s⁺ᵢ)

and ∂l/∂x, ∂l/∂y follow by the chain rule. Where positives are found by ids, s⁺ᵢ is the level s̃⁺ᵢ of all the anchor's
positives, and what is pulled at p(i) above is pulled at each of them by its share q⁺ᵢₚ of that level.

Sums of products are exactly rounded, so equal rows give equal similarities and a tie is a tie.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Params = Mapping[str, Any]


class Result(NamedTuple):
    """What an objective does to one batch. Row 0 of a (2, A) field is the direction x→y, row 1 is y→x.

    A is the number of pairs K, or max(N, M) where positives are found by ids. Where there is no such anchor, its
    statistics are those of an empty set.
    """

    G: Array  # (N, M) ∂l/∂S
    gx: Array | None  # (N, D) ∂l/∂x; None where only S was given
    gy: Array | None  # (M, D) ∂l/∂y; None where only S was given, and for one set, whose gradient is gx
    value: float  # the loss
    s_pos: Array  # (K,); by ids (2, A), +inf where there is none
    s_neg: Array  # (2, A) the hardest negative, −inf where there is none
    index: NDArray[np.int64]  # type: ignore[assignment]  # (2, A) its lowest index among ties, −1 where there is none
    r_pos: Array | None  # (2, A) relative similarities, 0 where the set is empty; None where P has none
    r_neg: Array | None  # (2, A)
    soft: Array | None  # (2, A) s̃, −inf where the set is empty; None where mining is not soft


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────


def exp(z: float) -> float:
    return math.inf if z > 709.7 else math.exp(z)


def sigmoid(z: float) -> float:
    return 1 / (1 + exp(-z))


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def inverse(z: float) -> float:
    return 1 / z if z != 0 else math.inf


def mean(values: Sequence[float]) -> float:
    """The mean, and 0 for an empty set."""
    return math.fsum(values) / len(values) if values else 0.0


def dot(u: Array, v: Array) -> float:
    return math.fsum((u * v).tolist())


def norm(v: Array) -> float:
    """‖v‖₂, free of underflow and overflow: v is scaled by a power of two first."""
    exponent = math.frexp(float(np.abs(v).max(initial=0.0)))[1]
    scaled = np.ldexp(v, -exponent)
    return math.ldexp(math.sqrt(dot(scaled, scaled)), exponent)


# ── terms ───────────────────────────────────────────────────────────────────────────────────────────────


def triplet_weight(T: str, params: Params, s_pos: float, s_neg: float) -> float:
    """T(s⁺, s⁻)."""

    def con(margin: float | None = None) -> float:
        return 1.0 if margin is None or s_neg - s_pos + margin > 0 else 0.0

    def nca(tau: float = 10.0) -> float:
        return sigmoid(tau * (s_neg - s_pos))

    def cir(tau: float = 10.0) -> float:
        return sigmoid(tau * ((1 - s_pos) ** 2 + s_neg**2 - 0.5))

    return {"con": con, "nca": nca, "cir": cir}[T](**params)


def pair_weight(P: str, params: Params, s_pos: float, s_neg: float, r_pos: float, r_neg: float) -> tuple[float, float]:
    """P⁺(s⁺) and P⁻(s⁻), given the anchor's relative similarities."""

    def con() -> tuple[float, float]:
        return 1.0, 1.0

    def lin() -> tuple[float, float]:
        return 1 - s_pos, s_neg

    def sig(alpha: float = 2.0, beta: float = 10.0, lam: float = 0.5) -> tuple[float, float]:
        return sigmoid(-alpha * (s_pos - lam)), sigmoid(beta * (s_neg - lam))

    def lin_ms() -> tuple[float, float]:
        return (1 - r_pos) * (1 - s_pos), (1 + r_neg) * s_neg

    def sig_ms(
        alpha: float = 2.0, beta: float = 10.0, lam: float = 0.5, self_term: bool = False
    ) -> tuple[float, float]:
        own = 1.0 if self_term else 0.0
        return (
            inverse(exp(alpha * (s_pos - lam)) + r_pos + own),
            inverse(exp(-beta * (s_neg - lam)) + r_neg + own),
        )

    return {"con": con, "lin": lin, "sig": sig, "lin-ms": lin_ms, "sig-ms": sig_ms}[P](**params)


def relative_similarities(
    P: str, params: Params, k: int, s_pos: list[float], row: list[float], negatives: list[int], hardest: int
) -> tuple[float, float]:
    """R⁺ and R⁻ of anchor k, whose similarities to the candidates are `row`.

    `s_pos` are those of all anchors of the direction, +inf where an anchor has no positive: it enters no R⁺ then.
    """
    threshold_neg = min(s_pos) - 0.1
    threshold_pos = row[hardest] + 0.1
    valid_neg = [j for j in negatives if j != hardest and row[j] >= threshold_neg]
    valid_pos = [i for i in range(len(s_pos)) if i != k and s_pos[i] <= threshold_pos and s_pos[k] < math.inf]
    to_pos = [s_pos[k] - s_pos[i] for i in valid_pos]
    to_neg = [row[hardest] - row[j] for j in valid_neg]
    if P == "lin-ms":
        return mean([d for d in to_pos if d != 0]), mean([d for d in to_neg if d != 0])
    if P == "sig-ms":
        alpha, beta = params.get("alpha", 2.0), params.get("beta", 10.0)
        exp_pos = [exp(alpha * d) for d in to_pos]
        return mean([e for e in exp_pos if e != 0]), mean([exp(-beta * d) for d in to_neg])
    return 0.0, 0.0


def parts_of_con(P: str, params: Params, s_pos: float, s_neg: float) -> tuple[float, float]:
    """f(s⁺) and g(s⁻) whose sum is the potential of con × P without a margin."""
    if P == "lin":
        return (1 - s_pos) ** 2 / 2, s_neg**2 / 2
    if P == "sig":
        alpha: float = params.get("alpha", 2.0)
        beta: float = params.get("beta", 10.0)
        lam: float = params.get("lam", 0.5)
        return softplus(-alpha * (s_pos - lam)) / alpha, softplus(beta * (s_neg - lam)) / beta
    return -s_pos, s_neg


def potential(T: str, T_params: Params, P: str, P_params: Params, s_pos: float, s_neg: float) -> float:
    """The loss of one triplet whose gradient T × P is; the violation s⁻ − s⁺ where the table has none."""
    margin: float | None = T_params.get("margin")
    tau: float = T_params.get("tau", 10.0)
    if T == "con" and margin is None:
        return math.fsum(parts_of_con(P, P_params, s_pos, s_neg))
    if (T, P) == ("con", "con") and margin is not None:
        return max(0.0, s_neg - s_pos + margin)
    if (T, P) == ("nca", "con"):
        return softplus(tau * (s_neg - s_pos)) / tau
    if (T, P) == ("cir", "lin"):
        return softplus(tau * ((1 - s_pos) ** 2 + s_neg**2 - 0.5)) / (2 * tau)
    return s_neg - s_pos


# ── positives ───────────────────────────────────────────────────────────────────────────────────────────

Positive = tuple[float, dict[int, float]]  # s̃⁺ of an anchor and the share q⁺ of each of its positives


def the_pair(row: list[float], positives: list[int]) -> Positive:
    (pair,) = positives
    return row[pair], {pair: 1.0}


def hardest_positive(row: list[float], positives: list[int]) -> Positive:
    """The positive of least similarity, the lowest index among ties."""
    least = min(row[p] for p in positives)
    return least, {min(p for p in positives if row[p] == least): 1.0}


def soft_positive(
    row: list[float],
    positives: list[int],
    *,
    tau: float = 10.0,
    hardness: str = "linear",
    margin: float = 0.4,
    at: str = "aggregate",
) -> Positive:
    """−log Σ e^{h⁺(s)} / tau, the mean for tau = 0; the exponents are exact, so one positive alone is its own level.

    `at` is for the pull alone: it says nothing here.
    """
    by, beyond = Fraction(tau), Fraction(margin)

    def linear(s: Fraction) -> Fraction:
        return -by * s

    def circle(s: Fraction) -> Fraction:
        if tau <= 0:
            raise ValueError(f"the circle's positives want tau > 0, not {tau}")
        return by * max(1 + beyond - s, Fraction(0)) * (1 - beyond - s)

    h = {"linear": linear, "circle": circle}[hardness]
    exponents = {p: h(Fraction(row[p])) for p in positives}
    if tau == 0:
        total_s = sum(Fraction(row[p]) for p in positives)
        return float(total_s / len(positives)), dict.fromkeys(positives, 1 / len(positives))
    largest = max(exponents.values())
    terms = {p: exp(float(exponent - largest)) for p, exponent in exponents.items()}
    total = math.fsum(terms.values())
    return float(-largest / by) - math.log(total) / tau, {p: term / total for p, term in terms.items()}


def aggregate_of(positives: str, params: Params, row: list[float], rows: list[int]) -> Positive:
    """s̃⁺ and the shares of the positives `rows` of one anchor; +inf and none where it has none."""
    aggregate = {"pair": the_pair, "hardest": hardest_positive, "soft": soft_positive}[positives]
    return aggregate(row, rows, **params) if rows else (math.inf, {})


# ── mining ──────────────────────────────────────────────────────────────────────────────────────────────


def hardest_of(row: list[float], candidates: list[int]) -> int:
    """The candidate of largest similarity, the lowest index among ties."""
    largest = max(row[j] for j in candidates)
    return min(j for j in candidates if row[j] == largest)


def selection(mining: str, params: Params, s_pos: float, row: list[float], negatives: list[int]) -> dict[int, float]:
    """The selected negatives of one anchor that has some, each with its mᵢⱼ."""
    hardest = {hardest_of(row, negatives): 1.0}

    def take_hardest() -> dict[int, float]:
        return hardest

    def take_semi_hard(margin: float = 0.2) -> dict[int, float]:
        inside = [j for j in negatives if s_pos - margin < row[j] < s_pos]
        return {hardest_of(row, inside): 1.0} if inside else {}

    def take_all(average: bool = True, pull: str = "each") -> dict[int, float]:
        return {j: 1 / len(negatives) if average else 1.0 for j in negatives}

    def take_selective(eps: float = 0.01) -> dict[int, float]:
        largest = max(row[j] for j in negatives)
        return take_all() if abs(s_pos - largest) < eps else hardest

    take = {
        "hardest": take_hardest,
        "semi-hard": take_semi_hard,
        "all": take_all,
        "selective": take_selective,
    }
    return take[mining](**params)


def soft_negative(
    row: list[float],
    positives: list[int],
    negatives: list[int],
    *,
    tau: float = 20.0,
    alpha: float = 0.0,
    margin: float = 0.4,
    hardness: str = "linear",
    level: str = "linear",
    at: str = "aggregate",
    over: str = "negatives",
    normalise: str = "sum",
) -> tuple[float, dict[int, float]]:
    """s̃ of an anchor and the share q of each candidate; −inf and none where there is no candidate.

    Hardnesses and their differences are exact, so that exponents of a million leave the shares all their digits.
    """
    candidates = {"negatives": negatives, "candidates": sorted([*negatives, *positives])}[over]
    if not candidates:
        return -math.inf, {}
    by, more, beyond = Fraction(tau), Fraction(alpha), Fraction(margin)

    def linear(s: Fraction) -> Fraction:
        return (by + more) * s

    def square(s: Fraction) -> Fraction:
        return by * s * s

    def circle(s: Fraction) -> Fraction:
        return by * max(s + beyond, Fraction(0)) * (s - beyond)

    h = {"linear": linear, "square": square, "circle": circle}[hardness]
    exponents = {j: h(Fraction(row[j])) for j in candidates}
    largest = max(exponents.values())
    terms = {j: exp(float(exponent - largest)) for j, exponent in exponents.items()}
    total = math.fsum(terms.values())
    z = float(largest) + math.log(total / {"sum": 1, "mean": len(candidates)}[normalise])
    s_soft = {"linear": z / tau, "root": math.sqrt(max(z, 0.0) / tau)}[level]
    return s_soft, {j: term / total for j, term in terms.items()}


# ── what an anchor adds ─────────────────────────────────────────────────────────────────────────────────


class Share(NamedTuple):
    """What an anchor of weight 1 adds."""

    pushes: Mapping[int, float]  # to the gradient at each of these candidates
    pulls: Mapping[int, float]  # from the gradient at each of its positives
    value: float


class Anchor(NamedTuple):
    """An anchor, its positives and the terms it is weighed by, and what it adds for each way of mining."""

    T: str
    T_params: Params
    P: str
    P_params: Params
    s_pos: float  # s̃⁺, +inf without positives
    positives: Mapping[int, tuple[float, float]]  # the share of each, and the similarity at which P⁺ sees it
    relative: tuple[float, float]  # R⁺ and R⁻, 0 where it has no negative

    def triplet(self, s_neg: float) -> float:
        return triplet_weight(self.T, self.T_params, self.s_pos, s_neg)

    def push(self, s_neg: float) -> float:
        """P⁻."""
        return pair_weight(self.P, self.P_params, 0.0, s_neg, *self.relative)[1]

    def pulls(self, weights: Sequence[float], over: Callable[[Sequence[float]], float] = math.fsum) -> dict[int, float]:
        """At each positive the sum of these weights, or what else is taken over them, times P⁺ and its share."""
        pulls = {}
        for p, (q, seen) in self.positives.items():
            p_pos = pair_weight(self.P, self.P_params, seen, 0.0, *self.relative)[0]
            pulls[p] = over([weight * p_pos for weight in weights]) * q
        return pulls

    @property
    def separate(self) -> bool:
        """Whether T sees neither similarity: con without a margin."""
        return self.T == "con" and self.T_params.get("margin") is None

    def part_of_positives(self) -> list[float]:
        return [parts_of_con(self.P, self.P_params, self.s_pos, 0.0)[0]] if self.positives else []

    def part_of_negative(self, s_neg: float) -> float:
        return parts_of_con(self.P, self.P_params, 0.0, s_neg)[1]

    def potential(self, s_neg: float) -> float:
        if self.separate:
            return math.fsum([*self.part_of_positives(), self.part_of_negative(s_neg)])
        return potential(self.T, self.T_params, self.P, self.P_params, self.s_pos, s_neg)

    def without_negatives(self) -> Share:
        """Its positives alone, which only con without a margin weighs without a negative."""
        if not self.separate:
            return Share({}, {}, 0.0)
        return Share({}, self.pulls([1.0]), math.fsum(self.part_of_positives()))

    def mined(self, row: list[float], selected: Mapping[int, float]) -> Share:
        """A triplet for each selected negative j, of weight mᵢⱼ."""
        weights = {j: m * self.triplet(row[j]) for j, m in selected.items()}
        return Share(
            pushes={j: weight * self.push(row[j]) for j, weight in weights.items()},
            pulls=self.pulls(list(weights.values())),
            value=math.fsum(m * self.potential(row[j]) for j, m in selected.items()),
        )

    def pulled_once(self, row: list[float], selected: Mapping[int, float]) -> Share:
        """The same pushes, the mean of the pulls, and in the value of con without a margin the part of s⁺ once."""
        pulls = self.pulls([self.triplet(row[j]) for j in selected], mean)
        mined = self.mined(row, selected)
        if not self.separate:
            return Share(mined.pushes, pulls, mined.value)
        values = [m * self.part_of_negative(row[j]) for j, m in selected.items()]
        return Share(mined.pushes, pulls, math.fsum([*values, *self.part_of_positives()]))

    def softly(self, row: list[float], s_soft: float, shares: Mapping[int, float], at: str = "aggregate") -> Share:
        """One triplet of the level s̃ of all candidates, pushed away by their shares of it."""
        t = self.triplet(s_soft)
        seen = {"aggregate": dict.fromkeys(shares, s_soft), "each": {j: row[j] for j in shares}}[at]
        return Share(
            pushes={j: t * self.push(seen[j]) * q for j, q in shares.items()},
            pulls=self.pulls([t]),
            value=self.potential(s_soft),
        )


# ── the objective on a matrix of similarities ───────────────────────────────────────────────────────────


def oracle_similarity(
    S: ArrayLike,
    *,
    T: str,
    T_params: Params,
    P: str,
    P_params: Params,
    mining: str,
    mining_params: Params,
    reduction: str = "mean",
    ids: ArrayLike | None = None,
    y_ids: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    scale: float = 1.0,
    directions: str = "both",
    positives: str = "pair",
    positives_params: Mapping[str, Any] = {},
    one_set: bool = False,
) -> Result:
    """G = ∂l/∂S and everything on the way to it, for a given S (N, M); gx and gy are None.

    The statistics are those of both directions, whichever emits. Without pairs, where `positives` are the rows of equal
    ids, all rows are anchors. `one_set` says that rows and columns of S are the same: its rows are the anchors.
    """
    S = np.asarray(S, dtype=np.float64)
    if not np.isfinite(S).all():
        raise ValueError("the oracle wants finite similarities")
    N, M = S.shape
    paired = positives == "pair"
    if one_set and (paired or N != M or y_ids is not None):
        raise ValueError(f"one set has positives by ids, not {positives!r}, a square S, not {S.shape}, and no y_ids")
    same = np.zeros((N, M), dtype=bool)  # pairs with equal ids are never negatives
    if ids is not None:
        row_ids = np.asarray(ids)
        col_ids = row_ids if y_ids is None else np.asarray(y_ids)
        if (row_ids.shape, col_ids.shape) != ((N,), (M,)):
            raise ValueError(f"ids {row_ids.shape} and y_ids {col_ids.shape} for S of shape {S.shape}")
        same = np.array([[bool(a == b) for b in col_ids] for a in row_ids])
    elif not paired:
        raise ValueError(f"positives={positives!r} want ids")
    anchors = (min(N, M),) * 2 if paired else (N, 0) if one_set else (N, M)  # of x→y, of y→x
    weights = weights_of(weight, anchors, both=not one_set)
    divisors = [{"mean": math.fsum(of), "sum": 1.0}[reduction] for of in weights]
    emits = {"both": (True, True), "x→y": (True, False), "y→x": (False, True)}[directions]
    if one_set:
        emits = True, False
    once = {"each": False, "once": True}[mining_params.get("pull", "each")]
    # mined so, con without a margin keeps what an anchor has where it lacks positives or negatives
    in_parts = once or (mining == "soft" and mining_params.get("over", "negatives") == "negatives")
    pull_at = positives_params.get("at", "aggregate")

    A = max(anchors)
    s_pos = np.full((2, A), math.inf)
    s_neg = np.full((2, A), -math.inf)
    index = np.full((2, A), -1, dtype=np.int64)
    r_pos, r_neg = np.zeros((2, A)), np.zeros((2, A))
    soft = np.full((2, A), -math.inf)
    G = np.zeros((N, M))
    value = 0.0
    views = ((S, G, same), (S.T, G.T, same.T))  # what is added to G.T stands in G
    for direction, (similarities, gradient, alike) in enumerate(views):
        rows = [similarities[k].tolist() for k in range(anchors[direction])]
        own: list[list[int]] = []  # the positives of each anchor
        for k, row in enumerate(rows):
            own.append([k] if paired else [j for j in range(len(row)) if alike[k, j] and not (one_set and j == k)])
        aggregates = [aggregate_of(positives, positives_params, row, own[k]) for k, row in enumerate(rows)]
        levels = [level for level, _ in aggregates]
        s_pos[direction, : len(rows)] = levels
        for k, row in enumerate(rows):
            negatives = [j for j in range(len(row)) if not alike[k, j] and not (paired and j == k)]
            relative = 0.0, 0.0
            if negatives:
                hardest = hardest_of(row, negatives)
                index[direction, k], s_neg[direction, k] = hardest, row[hardest]
                relative = relative_similarities(P, P_params, k, levels, row, negatives, hardest)
                r_pos[direction, k], r_neg[direction, k] = relative
            s_soft, shares = -math.inf, dict[int, float]()
            if mining == "soft":
                s_soft, shares = soft_negative(row, own[k], negatives, **mining_params)
                soft[direction, k] = s_soft
            if weights[direction][k] == 0 or not emits[direction]:
                continue

            s_plus, shares_pos = aggregates[k]
            seen = {p: {"aggregate": s_plus, "each": row[p]}[pull_at] for p in shares_pos}
            shared = {p: (q, seen[p]) for p, q in shares_pos.items()}
            anchor = Anchor(T, T_params, P, P_params, s_plus, shared, relative)
            if not own[k] and not (negatives and in_parts and anchor.separate):
                continue
            if shares:
                share = anchor.softly(row, s_soft, shares, mining_params.get("at", "aggregate"))
            elif mining == "soft" or (once and not negatives):
                share = anchor.without_negatives()
            elif not negatives:
                continue
            else:
                selected = selection(mining, mining_params, s_plus, row, negatives)
                share = (anchor.pulled_once if once else anchor.mined)(row, selected)
            m = weights[direction][k] * scale / divisors[direction]
            for j, push in share.pushes.items():
                gradient[k, j] += m * push
            for p, pull in share.pulls.items():
                gradient[k, p] -= m * pull
            value += m * share.value

    has_relative = P in ("lin-ms", "sig-ms")
    return Result(
        G=G,
        gx=None,
        gy=None,
        value=value,
        s_pos=s_pos[0] if paired else s_pos,
        s_neg=s_neg,
        index=index,
        r_pos=r_pos if has_relative else None,
        r_neg=r_neg if has_relative else None,
        soft=soft if mining == "soft" else None,
    )


def weights_of(weight: ArrayLike | None, anchors: tuple[int, int], both: bool) -> list[list[float]]:
    """The weights of the anchors of x→y and of y→x, given those of the anchors of either (A,) or of both (2, A)."""
    if weight is None:
        return [[1.0] * count for count in anchors]
    given = np.asarray(weight, dtype=np.float64)
    of = [given, given] if given.ndim == 1 else list(given)
    if not both:
        of[1] = of[1][:0]
    if len(of) != 2 or tuple(map(len, of)) != anchors:
        raise ValueError(f"weight {given.shape} for {anchors[0]} anchors x→y and {anchors[1]} y→x")
    return [one.tolist() for one in of]


# ── similarities and their chain rule ───────────────────────────────────────────────────────────────────


def unit(v: Array) -> Array:
    """v / ‖v‖, and 0 for a zero vector."""
    length = norm(v)
    return v / length if length > 0 else np.zeros_like(v)


def similarity_of(similarity: str, x: Array, y: Array) -> float:
    """s of one row x (D,) and one row y (D,)."""
    match similarity:
        case "dot":
            return dot(x, y)
        case "cosine":
            return dot(unit(x), unit(y))
        case "order":
            return -norm(np.maximum(0.0, y - x))
    raise ValueError(f"similarity={similarity!r}")


def similarity_gradient(similarity: str, x: Array, y: Array) -> tuple[Array, Array]:
    """∂s/∂x (D,) and ∂s/∂y (D,) of one pair of rows."""
    zero = np.zeros_like(x)
    match similarity:
        case "dot":
            return y, x
        case "cosine":
            a, b = unit(x), unit(y)
            s = dot(a, b)
            by_x = (b - s * a) / norm(x) if x.any() else zero
            by_y = (a - s * b) / norm(y) if y.any() else zero
            return by_x, by_y
        case "order":
            above = np.maximum(0.0, y - x)
            distance = norm(above)
            return (above / distance, -above / distance) if distance > 0 else (zero, zero)
    raise ValueError(f"similarity={similarity!r}")


def oracle(
    x: ArrayLike,
    y: ArrayLike | None,
    *,
    T: str,
    T_params: Params,
    P: str,
    P_params: Params,
    mining: str,
    mining_params: Params,
    reduction: str = "mean",
    similarity: str = "dot",
    ids: ArrayLike | None = None,
    y_ids: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    scale: float = 1.0,
    directions: str = "both",
    positives: str = "pair",
    positives_params: Mapping[str, Any] = {},
    one_set: bool = False,
) -> Result:
    """The gradient, the value and the statistics for embeddings x (N, D) and y (M, D); y is None for `one_set`."""
    if one_set != (y is None):
        raise ValueError("one set is x alone, y is None")
    x = np.asarray(x, dtype=np.float64)
    y = x if y is None else np.asarray(y, dtype=np.float64)
    S = np.array([[similarity_of(similarity, u, v) for v in y] for u in x])
    result = oracle_similarity(
        S,
        T=T,
        T_params=T_params,
        P=P,
        P_params=P_params,
        mining=mining,
        mining_params=mining_params,
        reduction=reduction,
        ids=ids,
        y_ids=y_ids,
        weight=weight,
        scale=scale,
        directions=directions,
        positives=positives,
        positives_params=positives_params,
        one_set=one_set,
    )
    gx, gy = np.zeros_like(x), np.zeros_like(y)
    for i in range(len(x)):
        for j in range(len(y)):
            if result.G[i, j] != 0:
                by_x, by_y = similarity_gradient(similarity, x[i], y[j])
                gx[i] += result.G[i, j] * by_x
                gy[j] += result.G[i, j] * by_y
    return result._replace(gx=gx + gy, gy=None) if one_set else result._replace(gx=gx, gy=gy)
