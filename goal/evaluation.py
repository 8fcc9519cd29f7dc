"""Retrieval metrics: Recall@K, ranks and mean average precision, from embeddings or from a given score matrix.

All metrics rank a query by the same function, `_rank`. It reads the positive's score from the same tile as the scores
of all wrong items, ranks a wrong item with an equal score first, and raises if a score is not finite. Identical
embeddings are scored once and share the result. A matrix product does not promise bit-equal results for equal rows, so
otherwise rounding would decide an exact tie.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from goal import validation
from goal.similarity import Dot, bind

Array = Tensor | NDArray[Any]
Labels = Array | Sequence[int] | Sequence[str]
Scores = Callable[[slice], Tensor]  # rows of queries -> (rows, candidates)

_CUTOFFS = (1, 5, 10)
_CANDIDATES = 4096  # scored at a time; bounds the working memory of order embeddings


@dataclass(frozen=True, eq=False)
class RetrievalMetrics:
    """Recall@K and ranks of both directions; recalls and shares are percentages, ranks count from 1.

    With folds every number is the mean over the folds, and a query's rank is its rank within its fold.
    """

    i2t_r1: float  # images with one of their captions ranked first, %
    i2t_r5: float
    i2t_r10: float
    t2i_r1: float  # captions with their image ranked first, %
    t2i_r5: float
    t2i_r10: float
    i2t_medr: float  # median rank of an image's best caption
    t2i_medr: float
    i2t_meanr: float  # mean rank of an image's best caption
    t2i_meanr: float
    i2t_ties: float  # images whose best caption has exactly the score of some wrong caption, %
    t2i_ties: float
    n_images: int
    n_captions: int
    folds: int
    i2t_ranks: NDArray[np.int64] = field(repr=False)  # (n_images,) rank of each image's best caption
    t2i_ranks: NDArray[np.int64] = field(repr=False)  # (n_captions,) rank of each caption's image

    @property
    def rsum(self) -> float:
        """The sum of the six recalls, 0 to 600."""
        return self.i2t_r1 + self.i2t_r5 + self.i2t_r10 + self.t2i_r1 + self.t2i_r5 + self.t2i_r10

    def as_dict(self) -> dict[str, float]:
        """Every number by name, with `rsum` and without the per-query ranks; ready for JSON."""
        numbers = {name: value for name, value in vars(self).items() if not name.endswith("_ranks")}
        return {"rsum": self.rsum, **numbers}

    def __str__(self) -> str:
        sides = (
            f"{side} R@1 {getattr(self, f'{side}_r1'):.1f}  R@5 {getattr(self, f'{side}_r5'):.1f}"
            f"  R@10 {getattr(self, f'{side}_r10'):.1f}  MedR {getattr(self, f'{side}_medr'):g}"
            for side in ("i2t", "t2i")
        )
        tied = self.i2t_ties or self.t2i_ties
        ties = [f"ties {self.i2t_ties:.1f} % / {self.t2i_ties:.1f} %"] if tied else []
        return " | ".join([*sides, f"RSUM {self.rsum:.1f}", *ties])


@dataclass(frozen=True, eq=False)
class MapMetrics:
    """MAP@all of both directions, in percent, with the average precision of every query."""

    x2y: float  # mean over the rows of x as queries, %
    y2x: float
    x2y_ap: NDArray[np.float64] = field(repr=False)  # (n,) average precision of each row of x, %
    y2x_ap: NDArray[np.float64] = field(repr=False)  # (m,)

    @property
    def mean(self) -> float:
        """The mean of the two directions."""
        return (self.x2y + self.y2x) / 2

    def as_dict(self) -> dict[str, float]:
        """The three numbers by name; ready for JSON."""
        return {"x2y": self.x2y, "y2x": self.y2x, "mean": self.mean}

    def __str__(self) -> str:
        return f"MAP@all x→y {self.x2y:.1f}  y→x {self.y2x:.1f}  mean {self.mean:.1f}"


def evaluate(
    x: Array,
    y: Array,
    image_of: Labels | None = None,
    *,
    similarity: str = "dot",
    folds: int = 1,
    chunk: int = 256,
    leave_one_out: bool = False,
) -> RetrievalMetrics:
    """Recall@1/5/10, median and mean rank, image to text and text to image.

        rank of a query = 1 + number of wrong items whose score is at least that of its best positive

    A tie counts against the model, so a collapsed model scores 0 and not 100 %. For an image all its own
    captions are positives and the best of them counts; for a caption its image is the only positive.

    Args:
        x: (n_images, D) image embeddings, floating point: a dense tensor or an array of any layout or byte order.
        y: (n_captions, D) caption embeddings, on the same device.
        image_of: (n_captions,) integers, the row of x that each caption belongs to; an image may have any
            number of captions above none. None: caption k belongs to image k.
        similarity: "dot", "cosine" or "order". Scores are float32 whatever the input and settings.
        folds: evaluate consecutive, equal parts of the images with their captions separately, and average
            (COCO 1K: five folds of 5,000 images; COCO 5K: one).
        chunk: queries scored at a time; memory is chunk × candidates, never the full matrix.
        leave_one_out: row k of y is no candidate for row k of x, and the other way round. For x and y that are
            the same set, such as several views of things, if image_of names for each view another view of the thing.

    Raises:
        ValueError: shapes do not fit, an index is out of range, an image has no caption, an embedding or a
            score is not finite (the message names the side and the first bad row), or leave_one_out would leave
            out a positive.
        TypeError: embeddings that are not floating point, or an image_of that is not integer.

    Warns:
        UserWarning: x and y have the same rows and leave_one_out is off, so that every query finds itself.

    >>> import torch
    >>> x = torch.eye(3)
    >>> y = torch.eye(3)[[0, 1, 1, 2]]
    >>> print(evaluate(x, y, image_of=torch.tensor([0, 1, 1, 2])))
    i2t R@1 100.0  R@5 100.0  R@10 100.0  MedR 1 | t2i R@1 100.0  R@5 100.0  R@10 100.0  MedR 1 | RSUM 600.0

    Source: the protocol of Karpathy and Fei-Fei (2015) and VSE++ (Faghri et al., 2018); ties made explicit.
    """
    x, y = _embeddings("x (images)", x), _embeddings("y (captions)", y)
    validation.check_comparable(x, y)
    if not leave_one_out:
        _warn_of_one_set(x, y)
    owner, metric = _owners(image_of, len(x), len(y), leave_one_out).to(x.device), bind(similarity)

    def scores(images: Tensor, captions: Tensor) -> tuple[Scores, Scores]:
        return _pair_scores(x[images], y[captions], metric)

    with torch.inference_mode(), exact_float32(x.device):
        return _evaluate(scores, owner, len(x), folds, chunk, leave_one_out)


def evaluate_similarity(
    S: Array, image_of: Labels | None = None, *, folds: int = 1, chunk: int = 256, leave_one_out: bool = False
) -> RetrievalMetrics:
    """The metrics of `evaluate` for a model that returns the scores itself (cross-attention, ensembles).

    Args:
        S: (n_images, n_captions) scores, higher is better, floating point, compared in their own dtype.
        image_of, folds, chunk, leave_one_out: as in `evaluate`.

    Raises:
        ValueError, TypeError: as in `evaluate`.

    >>> evaluate_similarity(np.array([[0.9, 0.2], [0.3, 0.1]])).i2t_ranks
    array([1, 2])
    """
    matrix = validation.similarity_matrix(floating("S", S))
    owner = _owners(image_of, len(matrix), matrix.shape[1], leave_one_out).to(matrix.device)

    def scores(images: Tensor, captions: Tensor) -> tuple[Scores, Scores]:
        part = matrix if len(images) == len(matrix) else matrix[images][:, captions]
        return (lambda rows: part[rows]), (lambda rows: part[:, rows].T)

    with torch.inference_mode():
        return _evaluate(scores, owner, len(matrix), folds, chunk, leave_one_out)


def map_at_all(
    x: Array,
    y: Array,
    x_labels: Labels,
    y_labels: Labels,
    *,
    similarity: str = "dot",
    chunk: int = 256,
    leave_one_out: bool = False,
) -> MapMetrics:
    """Mean average precision over the whole ranking, both ways, for labelled data (audio-visual retrieval).

        AP of a query = mean over its relevant items r of r / (r + number of irrelevant items scoring ≥ it)

    Relevant are the items of the other side with the query's label, numbered r = 1, 2, … from the best.
    Ties count against the model: among items of equal score all irrelevant items rank before the relevant ones.
    If x and y are the same set, every query would find itself first: with `leave_one_out` the items of query k are
    all rows of the other side but row k.

    Args:
        x: (n, D) embeddings, floating point, as in `evaluate`.
        y: (m, D) embeddings, on the same device.
        x_labels: (n,) integers of any dtype or strings: an array, a tensor, a sequence or a table's column.
            They are compared exactly, whatever their dtypes.
        y_labels: (m,) labels of the same kind.
        similarity, chunk: as in `evaluate`.
        leave_one_out: row k of y is no item for row k of x, and the other way round; n = m, with the same labels.

    Raises:
        ValueError: shapes do not fit, a query has no relevant item (its average precision does not exist), or
            an embedding or a score is not finite.
        TypeError: embeddings that are not floating point, labels that are neither integers nor strings.

    Warns:
        UserWarning: x and y have the same rows and leave_one_out is off.

    >>> x, y = np.eye(2), np.array([[1.0, 0.0], [0.2, 0.9], [0.0, 0.8]])
    >>> print(map_at_all(x, y, ["dog", "cat"], ["dog", "dog", "cat"]))
    MAP@all x→y 75.0  y→x 83.3  mean 79.2
    >>> one_set = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> print(map_at_all(one_set, one_set, [0, 1, 0, 1], [0, 1, 0, 1], leave_one_out=True))
    MAP@all x→y 41.7  y→x 41.7  mean 41.7

    Source: Zhen et al., Deep Supervised Cross-modal Retrieval (2019), §4.2, with ties made explicit.
    """
    x, y = _embeddings("x", x), _embeddings("y", y)
    validation.check_comparable(x, y)
    codes = _codes(_labels("x_labels", x_labels, len(x)), _labels("y_labels", y_labels, len(y))).to(x.device)
    rows = torch.arange(max(len(x), len(y)), device=x.device)
    x_side, y_side = _Side("x", rows[: len(x)], codes[: len(x)]), _Side("y", rows[: len(y)], codes[len(x) :])
    if leave_one_out:
        _check_one_set(len(x), len(y))
        if not torch.equal(x_side.key, y_side.key):
            row = int((x_side.key != y_side.key).byte().argmax())
            raise ValueError(f"leave_one_out: row {row} of x and of y is one item, but its labels differ.")
    else:
        _warn_of_one_set(x, y)
    metric, chunk = bind(similarity), validation.whole_number("chunk", chunk)
    with torch.inference_mode(), exact_float32(x.device):
        x2y, y2x = _pair_scores(x, y, metric)
        x2y_ap = 100 * _average_precision(x2y, x_side, y_side, chunk, leave_one_out)
        y2x_ap = 100 * _average_precision(y2x, y_side, x_side, chunk, leave_one_out)
    return MapMetrics(float(x2y_ap.mean()), float(y2x_ap.mean()), x2y_ap, y2x_ap)


# ---- ranks -----------------------------------------------------------------------------------------------


def _evaluate(
    scores: Callable[[Tensor, Tensor], tuple[Scores, Scores]],
    owner: Tensor,
    n_images: int,
    folds: int,
    chunk: int,
    leave_one_out: bool,
) -> RetrievalMetrics:
    """Ranks of every fold, and the means over the folds; owner (n_captions,) is the image of each caption."""
    folds, chunk = validation.whole_number("folds", folds), validation.whole_number("chunk", chunk)
    if n_images % folds:
        raise ValueError(f"folds={folds} must divide the {n_images} images, else folds differ in difficulty.")
    ranks = {"i2t": np.empty(n_images, np.int64), "t2i": np.empty(len(owner), np.int64)}
    numbers: list[dict[str, float]] = []
    for images in torch.arange(n_images, device=owner.device).chunk(folds):
        captions = ((owner >= images[0]) & (owner <= images[-1])).nonzero()[:, 0]
        i2t, t2i = scores(images, captions)
        image_side, caption_side = _Side("image", images, images), _Side("caption", captions, owner[captions])
        fold: dict[str, float] = {}
        for side, score, query, candidate in (
            ("i2t", i2t, image_side, caption_side),
            ("t2i", t2i, caption_side, image_side),
        ):
            rank, tied = _rank(score, query, candidate, chunk, leave_one_out)
            ranks[side][query.row.cpu().numpy()] = rank
            fold |= {f"{side}_r{k}": 100 * float((rank <= k).mean()) for k in _CUTOFFS}
            fold |= {f"{side}_medr": float(np.median(rank)), f"{side}_meanr": float(rank.mean())}
            fold |= {f"{side}_ties": 100 * float(tied.mean())}
        numbers.append(fold)
    return RetrievalMetrics(
        **{name: sum(fold[name] for fold in numbers) / folds for name in numbers[0]},
        n_images=n_images,
        n_captions=len(owner),
        folds=folds,
        i2t_ranks=ranks["i2t"],
        t2i_ranks=ranks["t2i"],
    )


class _Side(NamedTuple):
    """The queries or the candidates of one direction."""

    name: str
    row: Tensor  # (n,) their rows in the caller's data
    key: Tensor  # (n,) a candidate is right for a query if their keys are equal


def _scored(
    score: Scores, query: _Side, candidate: _Side, chunk: int, leave_one_out: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of queries: (rows, scores, whether right), both (queries, candidates); the left-out candidate has −inf."""
    for start in range(0, len(query.row), chunk):
        rows = slice(start, start + chunk)
        s, right = score(rows), query.key[rows, None] == candidate.key
        _check_scores(s, rows, query, candidate)
        if leave_one_out:
            itself = query.row[rows, None] == candidate.row
            s, right = s.masked_fill(itself, -torch.inf), right & ~itself
        yield rows, s, right


def _rank(
    score: Scores, query: _Side, candidate: _Side, chunk: int, leave_one_out: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rank of each query's best right candidate, and whether a wrong candidate ties with it; both (queries,)."""
    ranks, ties = [], []
    for _, s, right in _scored(score, query, candidate, chunk, leave_one_out):
        best = s.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        above = (s > best).sum(1, dtype=torch.int32)  # wrong candidates only: best is the maximum of the right ones
        level = ((s == best) & ~right).sum(1, dtype=torch.int32)
        ranks.append(1 + above + level)
        ties.append(level > 0)
    return torch.cat(ranks).cpu().numpy().astype(np.int64), torch.cat(ties).cpu().numpy()


def _average_precision(
    score: Scores, query: _Side, candidate: _Side, chunk: int, leave_one_out: bool
) -> NDArray[np.float64]:
    """Average precision of each query, (queries,); among equal scores irrelevant candidates come first."""
    place = torch.arange(1, len(candidate.row) + 1, device=candidate.row.device)
    parts = []
    for rows, s, right in _scored(score, query, candidate, chunk, leave_one_out):
        relevant = right.byte()
        if not right.any(1).all():
            row = rows.start + int(relevant.amax(1).argmin())
            raise ValueError(
                f"{query.name} row {row} has a label that no {'other ' * leave_one_out}row of {candidate.name} has, "
                "so it has no average precision. Leave such queries out."
            )
        irrelevant_first = relevant.argsort(dim=1, stable=True)
        by_score = s.gather(1, irrelevant_first).argsort(dim=1, descending=True, stable=True)
        hit = relevant.gather(1, irrelevant_first.gather(1, by_score)).double()
        parts.append((hit * hit.cumsum(1) / place).sum(1) / hit.sum(1))
    return np.asarray(torch.cat(parts).cpu().numpy())


# ---- scores ----------------------------------------------------------------------------------------------


def _pair_scores(x: Tensor, y: Tensor, similarity: Dot) -> tuple[Scores, Scores]:
    """Functions of row slices: scores of x rows against all y, of y rows against all x; equal rows share a score."""
    (x_rows, x_place), (y_rows, y_place) = _distinct(x), _distinct(y)
    x_rows, y_rows = similarity.embed(x_rows), similarity.embed(y_rows)

    def i2t(rows: slice) -> Tensor:
        query = x_rows[x_place[rows]]
        s = torch.cat([similarity.tile(query, part) for part in torch.split(y_rows, _CANDIDATES)], 1)
        return s if len(y_rows) == len(y) else s[:, y_place]

    def t2i(rows: slice) -> Tensor:
        query = y_rows[y_place[rows]]
        s = torch.cat([similarity.tile(part, query) for part in torch.split(x_rows, _CANDIDATES)], 0).T
        return s if len(x_rows) == len(x) else s[:, x_place]

    return i2t, t2i


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows in order of appearance, and for every row its position among them."""
    places: dict[bytes, int] = {}
    place = [places.setdefault(row.tobytes(), len(places)) for row in (rows + 0.0).cpu().numpy()]  # −0 is 0
    first = np.unique(place, return_index=True)[1]
    return rows[torch.from_numpy(first).to(rows.device)], torch.tensor(place, device=rows.device)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """A context for products in true float32: no autocast, TF32 or bfloat16, whatever the training loop has set."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


# ---- checks ----------------------------------------------------------------------------------------------


def floating(name: str, value: Any, first: int = 0) -> Tensor:
    """The same numbers as a dense floating-point tensor without a gradient; `value` is copied only if necessary.

    An array in another byte order or layout is as good as its contiguous copy. Values that a conversion would lose
    are refused: masks, precision beyond 64 bits, the entries that a sparse tensor leaves out.

    Args:
        name: of the argument, for errors.
        value: a tensor or anything that NumPy converts to an array.
        first: the number of the first row, for errors.

    Raises:
        TypeError, ValueError: naming the argument and its value.

    >>> floating("x", np.ones((2, 3), ">f4")[:, ::-1]).shape
    torch.Size([2, 3])
    """
    tensor = validation.dense(name, value if isinstance(value, Tensor) else _from_array(name, value, first))
    return validation.check_floating(name, tensor).detach()


def _from_array(name: str, value: Any, first: int) -> Tensor:
    array = validation.as_array(name, value, first)
    if array.dtype.kind not in "iufcb":
        kind = "" if isinstance(value, np.ndarray) else f"{type(value).__name__} of "
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {kind}{array.dtype}.")
    native = np.require(array, array.dtype.newbyteorder("="), ["C", "ALIGNED"])
    if any(stride < 0 for stride in native.strides):  # a single row may count as C-contiguous with a negative stride
        native = native.copy()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing is written
            return torch.from_numpy(native)
    except TypeError:
        raise TypeError(f"{name} must be floating point of at most 64 bits, got {array.dtype}.") from None


def _embeddings(name: str, value: Array) -> Tensor:
    """(N, D) finite float32."""
    rows = validation.matrix(name, floating(name, value), "(N, D)").float()
    finite = rows.isfinite().all(1)
    if not finite.all():
        row, bad = int(finite.byte().argmin()), int((~finite).sum())
        raise ValueError(f"{name} must be finite in float32, but row {row} (the first of {bad}) has NaN or inf.")
    return rows


def _check_one_set(n: int, m: int) -> None:
    if n != m:
        raise ValueError(f"leave_one_out: row k of x and of y must be one item, but they have {n} and {m} rows.")


def _warn_of_one_set(x: Tensor, y: Tensor) -> None:
    if x.shape == y.shape and torch.equal(x, y):
        warnings.warn(
            "x and y hold the same rows, so every query finds itself among the candidates. "
            "leave_one_out=True leaves it out.",
            stacklevel=3,
        )


def _owners(image_of: Labels | None, n_images: int, n_captions: int, leave_one_out: bool) -> Tensor:
    """(n_captions,) int64 on the CPU: the image of each caption."""
    if leave_one_out:
        _check_one_set(n_images, n_captions)
    cpu = torch.device("cpu")
    if image_of is not None:
        owner = validation.identity("image_of", image_of, n_captions, "y (captions)", cpu)
    elif n_captions == n_images:
        owner = torch.arange(n_images, device=cpu)
    else:
        raise ValueError(
            f"image_of=None means one caption per image, but images and captions number {n_images} and "
            f"{n_captions}. Pass image_of, the image's row for each caption: "
            "torch.arange(n_images).repeat_interleave(k) if each image's k captions follow one another."
        )
    outside = ((owner < 0) | (owner >= n_images)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"image_of[{row}] = {int(owner[row])} is not a row of the {n_images} images.")
    counts = torch.bincount(owner, minlength=n_images)
    if not counts.all():
        raise ValueError(f"image {int(counts.argmin())} has no caption in image_of, so it has no rank.")
    itself = owner == torch.arange(n_captions, device=cpu)
    if leave_one_out and itself.any():
        row = int(itself.byte().argmax())
        raise ValueError(
            f"leave_one_out leaves out row {row} for itself, and by image_of row {row} is its one positive: "
            "image_of must name another row for each."
        )
    return owner


def _labels(name: str, value: Labels, n: int) -> list[int] | list[str]:
    """The labels as Python's own integers or strings, which compare exactly."""
    if isinstance(value, Tensor):
        value = validation.dense(name, value).detach().cpu()
        if value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name} must be integers or strings, got {value.dtype}.")
        value = value.numpy()
    if hasattr(value, "__array__"):
        array = validation.as_array(name, value)
        if array.shape != (n,):
            raise ValueError(f"{name} must have shape ({n},), one per row, got {array.shape}.")
        if array.dtype.kind not in "iuUTO":
            raise TypeError(f"{name} must be integers or strings, got {array.dtype}.")
        value = array.tolist()
    elif not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be integers or strings, one per row, got {type(value).__name__}.")
    elif len(value) != n:
        raise ValueError(f"{name} must have shape ({n},), one per row, got ({len(value)},).")
    items: list[Any] = [_plain(item) for item in value]  # np.array of a list would round, and mix kinds
    for row, item in enumerate(items):
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise TypeError(f"{name} must be integers or strings, but row {row} is {item!r} ({type(item).__name__}).")
        if isinstance(item, str) != isinstance(items[0], str):
            raise TypeError(f"{name} must be of one kind, but row 0 is {items[0]!r} and row {row} is {item!r}.")
    return items


def _plain(item: Any) -> Any:
    """A NumPy or torch integer or string as a Python one."""
    if isinstance(item, np.integer | np.str_) or (isinstance(item, Tensor) and item.dim() == 0):
        return item.item()
    return item


def _codes(x_labels: list[int] | list[str], y_labels: list[int] | list[str]) -> Tensor:
    """(n + m,) a number for each label; equal labels have equal numbers."""
    kinds = [str if isinstance(labels[0], str) else int for labels in (x_labels, y_labels)]
    if kinds[0] != kinds[1]:
        raise TypeError(f"labels must be of one kind, got {kinds[0].__name__} for x and {kinds[1].__name__} for y.")
    codes: dict[int | str, int] = {}
    return torch.tensor([codes.setdefault(label, len(codes)) for label in [*x_labels, *y_labels]], device="cpu")


def _check_scores(s: Tensor, rows: slice, query: _Side, candidate: _Side) -> None:
    low, high = torch.aminmax(s)  # both are NaN if any entry is
    if not (low.isfinite() and high.isfinite()):
        i, j = (~s.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"the score of {query.name} row {int(query.row[rows][i])} and {candidate.name} row "
            f"{int(candidate.row[j])} is {float(s[i, j])}: a score that is not finite has no rank."
        )


def _from_numpy(name: str, value: object) -> Tensor:
    array = np.asarray(value)
    if array.dtype.kind not in "iufcb":
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {type(value).__name__}.")
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
