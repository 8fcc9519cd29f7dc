"""Retrieval metrics against a loop-based float64 implementation, and the traps that metrics fall into."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import goal.evaluation
from goal.cli import main
from goal.evaluation import evaluate, evaluate_similarity, map_at_all


@pytest.fixture(autouse=True)
def one_thread():
    """Small work: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive_score(x, y, similarity):
    if similarity == "order":
        return -math.sqrt(sum(max(0.0, b - a) ** 2 for a, b in zip(x, y, strict=True)))
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    if similarity == "dot":
        return dot
    norms = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    return dot / norms if norms else 0.0


def naive_ranks(x, y, image_of, similarity="dot"):
    """Ranks and ties of both directions, in Python floats, by counting."""
    x, y = np.asarray(x, np.float64).tolist(), np.asarray(y, np.float64).tolist()
    scores = [[naive_score(a, b, similarity) for b in y] for a in x]
    i2t, i2t_tied, t2i, t2i_tied = [], [], [], []
    for i in range(len(x)):
        best = max(scores[i][j] for j in range(len(y)) if image_of[j] == i)
        wrong = [scores[i][j] for j in range(len(y)) if image_of[j] != i]
        i2t.append(1 + sum(s >= best for s in wrong))
        i2t_tied.append(any(s == best for s in wrong))
    for j in range(len(y)):
        best = scores[image_of[j]][j]
        wrong = [scores[i][j] for i in range(len(x)) if i != image_of[j]]
        t2i.append(1 + sum(s >= best for s in wrong))
        t2i_tied.append(any(s == best for s in wrong))
    return i2t, t2i, i2t_tied, t2i_tied


def naive_average_precision(scores, relevant):
    irrelevant = [s for s, r in zip(scores, relevant, strict=True) if not r]
    own = sorted((s for s, r in zip(scores, relevant, strict=True) if r), reverse=True)
    return sum(r / (r + sum(s >= mine for s in irrelevant)) for r, mine in enumerate(own, 1)) / len(own)


def retrieval_set(seed, n_images=40, d=16, noise=1.5):
    """Ragged captions in shuffled order, close enough to their images that ranks vary."""
    rng = np.random.default_rng(seed)
    image_of = np.concatenate([np.arange(n_images), rng.integers(0, n_images, 2 * n_images)])
    rng.shuffle(image_of)
    x = rng.standard_normal((n_images, d))
    return x, x[image_of] + noise * rng.standard_normal((len(image_of), d)), image_of


@pytest.mark.parametrize("similarity", ["dot", "cosine", "order"])
def test_agrees_with_the_naive_float64_loop(similarity):
    x, y, image_of = retrieval_set(0)
    metrics = evaluate(x, y, image_of, similarity=similarity, chunk=7)
    i2t, t2i, _, _ = naive_ranks(x, y, image_of, similarity)
    assert metrics.i2t_ranks.tolist() == i2t
    assert metrics.t2i_ranks.tolist() == t2i
    for side, ranks in (("i2t", i2t), ("t2i", t2i)):
        for k in (1, 5, 10):
            assert getattr(metrics, f"{side}_r{k}") == pytest.approx(100 * sum(r <= k for r in ranks) / len(ranks))
        ranks = sorted(ranks)
        middle = (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2
        assert getattr(metrics, f"{side}_medr") == middle
        assert getattr(metrics, f"{side}_meanr") == pytest.approx(sum(ranks) / len(ranks))
    assert 0 < metrics.i2t_r1 < 100  # the data decides something


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_ties_ragged_captions_and_any_shape(data):
    """Small integers make scores exact in float32, and ties frequent."""
    n, d = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    extra = data.draw(st.lists(st.integers(0, n - 1), max_size=8))
    image_of = data.draw(st.permutations([*range(n), *extra]))
    rows = st.lists(st.integers(-2, 2), min_size=d, max_size=d)
    x = data.draw(st.lists(rows, min_size=n, max_size=n))
    y = data.draw(st.lists(rows, min_size=len(image_of), max_size=len(image_of)))
    similarity = data.draw(st.sampled_from(["dot", "order"]))
    x, y = np.array(x, np.float32), np.array(y, np.float32)
    metrics = evaluate(x, y, image_of, similarity=similarity, chunk=data.draw(st.integers(1, 5)))
    i2t, t2i, i2t_tied, t2i_tied = naive_ranks(x, y, image_of, similarity)
    assert metrics.i2t_ranks.tolist() == i2t
    assert metrics.t2i_ranks.tolist() == t2i
    assert metrics.i2t_ties == pytest.approx(100 * sum(i2t_tied) / n)
    assert metrics.t2i_ties == pytest.approx(100 * sum(t2i_tied) / len(y))


@pytest.mark.parametrize("d", [1, 3, 16, 100, 1024])
@pytest.mark.parametrize("n", [7, 33, 127])
def test_equal_rows_tie_exactly(n, d):
    """A product does not give equal rows bit-equal results; ranks must not see that."""
    generator = torch.Generator().manual_seed(n * d)
    x = torch.randn(n, d, generator=generator)
    same = torch.randn(1, d, generator=generator)
    for similarity in ("dot", "cosine", "order"):
        for chunk in (1, n):
            one_caption = evaluate(x, same.repeat(n, 1), similarity=similarity, chunk=chunk)
            assert one_caption.i2t_ranks.tolist() == [n] * n
            one_image = evaluate(same.repeat(n, 1), x, similarity=similarity, chunk=chunk)
            assert one_image.t2i_ranks.tolist() == [n] * n


def test_signed_zeros_are_equal():
    rows, place = goal.evaluation._distinct(torch.tensor([[0.0, 1.0], [2.0, 1.0], [-0.0, 1.0]]))
    assert place.tolist() == [0, 1, 0]
    assert rows.tolist() == [[0, 1], [2, 1]]


def test_a_collapsed_model_scores_nothing():
    x = torch.full((60, 300), 0.1)
    metrics = evaluate(x, x.repeat_interleave(5, 0), torch.arange(60).repeat_interleave(5))
    assert metrics.rsum == 0
    assert metrics.i2t_ties == metrics.t2i_ties == 100
    assert set(metrics.i2t_ranks) == {296}
    assert set(metrics.t2i_ranks) == {60}


def test_own_captions_that_tie_with_each_other_do_no_harm():
    metrics = evaluate(np.eye(2), np.eye(2)[[0, 0, 0, 1]], [0, 0, 0, 1])
    assert metrics.rsum == 600
    assert metrics.i2t_ties == 0


def test_folds_are_consecutive_fifths_averaged():
    x, y, image_of = retrieval_set(1, n_images=50, noise=3.0)
    folded = evaluate(x, y, image_of, folds=5)
    parts = []
    for start in range(0, 50, 10):
        captions = np.flatnonzero((image_of >= start) & (image_of < start + 10))
        part = evaluate(x[start : start + 10], y[captions], image_of[captions] - start)
        assert folded.i2t_ranks[start : start + 10].tolist() == part.i2t_ranks.tolist()
        assert folded.t2i_ranks[captions].tolist() == part.t2i_ranks.tolist()
        parts.append(part.as_dict())
    for name in ("i2t_r1", "t2i_r5", "i2t_medr", "t2i_meanr"):
        assert getattr(folded, name) == pytest.approx(sum(part[name] for part in parts) / 5)
    assert folded.rsum == pytest.approx(sum(part["rsum"] for part in parts) / 5)
    assert len({part["i2t_r1"] for part in parts}) > 1
    assert folded.rsum > evaluate(x, y, image_of).rsum  # a tenth of the candidates: easier


def test_rsum_is_the_sum_of_the_six_recalls():
    x, y, image_of = retrieval_set(2)
    numbers = evaluate(x, y, image_of, folds=4).as_dict()
    assert numbers["rsum"] == pytest.approx(sum(numbers[f"{s}_r{k}"] for s in ("i2t", "t2i") for k in (1, 5, 10)))
    assert json.loads(json.dumps(numbers)) == numbers


def test_the_median_of_an_even_number_of_ranks_lies_between():
    metrics = evaluate_similarity(np.array([[0.9, 0.2], [0.3, 0.1]]))
    assert metrics.i2t_ranks.tolist() == [1, 2]
    assert metrics.i2t_medr == metrics.i2t_meanr == 1.5


def test_the_order_of_captions_does_not_matter():
    x, y, image_of = retrieval_set(3)
    order = np.random.default_rng(0).permutation(len(y))
    plain, shuffled = evaluate(x, y, image_of), evaluate(x, y[order], image_of[order])
    assert shuffled.as_dict() == plain.as_dict()
    assert shuffled.t2i_ranks.tolist() == plain.t2i_ranks[order].tolist()


@pytest.mark.parametrize("folds", [1, 4])
def test_a_given_matrix_is_ranked_like_embeddings(folds):
    x, y, image_of = retrieval_set(4)
    a = evaluate(x, y, image_of, folds=folds)
    for matrix in (x @ y.T, torch.from_numpy(x @ y.T).requires_grad_()):
        b = evaluate_similarity(matrix, image_of, folds=folds, chunk=3)
        assert b.as_dict() == pytest.approx(a.as_dict())
        assert b.t2i_ranks.tolist() == a.t2i_ranks.tolist()


def test_no_tile_is_larger_than_chunk_times_candidates(monkeypatch):
    x, y, image_of = retrieval_set(5, n_images=64)
    sizes = []
    dot = goal.evaluation.bind("dot")

    class Recording(type(dot)):
        def tile(self, x_block, y_block):
            tile = super().tile(x_block, y_block)
            sizes.append(tile.numel())
            return tile

    monkeypatch.setattr(goal.evaluation, "bind", lambda similarity: Recording())
    monkeypatch.setattr(goal.evaluation, "_CANDIDATES", 50)
    metrics = evaluate(x, y, image_of, chunk=8)
    assert max(sizes) <= 8 * 50
    assert sum(sizes) == 2 * len(x) * len(y)
    assert metrics.i2t_ranks.tolist() == naive_ranks(x, y, image_of)[0]


def test_scores_are_float32_whatever_the_training_loop_has_set():
    x, y, image_of = retrieval_set(6, n_images=150, d=256, noise=12.0)
    plain = evaluate(x, y, image_of)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (torch.from_numpy(x).float() @ torch.from_numpy(y).float().T).dtype == torch.bfloat16
            rough = evaluate(x, y, image_of)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert rough.i2t_ranks.tolist() == plain.i2t_ranks.tolist()
    assert rough.t2i_ranks.tolist() == plain.t2i_ranks.tolist()


def test_inputs_may_be_tensors_arrays_half_precision_or_need_gradients():
    x, y, image_of = retrieval_set(7)
    x, y = x.astype(np.float16), y.astype(np.float16)
    x.flags.writeable = False
    expected = evaluate(x.astype(np.float64), y.astype(np.float64), image_of).as_dict()
    assert evaluate(x, y, image_of.tolist()).as_dict() == expected
    tx, ty = torch.from_numpy(x.copy()).requires_grad_(), torch.from_numpy(y)
    assert evaluate(tx, ty, torch.from_numpy(image_of)).as_dict() == expected
    assert evaluate(tx.T.contiguous().T, ty, image_of).as_dict() == expected


def test_a_line_for_people():
    metrics = evaluate(np.eye(3), np.eye(3))
    perfect = "R@1 100.0  R@5 100.0  R@10 100.0  MedR 1"
    assert str(metrics) == f"i2t {perfect} | t2i {perfect} | RSUM 600.0"
    assert "ties 100.0 % / 100.0 %" in str(evaluate(np.ones((3, 2)), np.ones((3, 2))))
    assert "ranks" not in repr(metrics)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_embedding_is_named(bad):
    x, y = np.eye(4), np.eye(4)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=r"x \(images\) must be finite.*row 2 \(the first of 1\)"):
        evaluate(x, y)
    with pytest.raises(ValueError, match=r"y \(captions\) must be finite.*row 2"):
        evaluate(y, x)
    with pytest.raises(ValueError, match=r"y must be finite.*row 2"):
        map_at_all(y, x, [0, 1, 2, 3], [0, 1, 2, 3])


def test_a_bad_score_is_named_with_its_rows():
    x, y = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    x[3, 3] = y[3, 3] = 1e30
    with pytest.raises(ValueError, match="image row 3 and caption row 3 is inf"):
        evaluate(x, y, folds=2, chunk=1)
    matrix = np.eye(4)
    matrix[2, 3] = math.nan
    with pytest.raises(ValueError, match="image row 2 and caption row 3 is nan"):
        evaluate_similarity(matrix, folds=2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "one caption per image.*2 and 10", lambda e: evaluate(e[:2], e)),
        (ValueError, "the same D", lambda e: evaluate(e, e[:, :3])),
        (ValueError, "at least one row and one column", lambda e: evaluate(e[:0], e[:0])),
        (ValueError, "must have shape", lambda e: evaluate(e[0], e)),
        (TypeError, "must have one of the dtypes", lambda e: evaluate(e.astype(int), e)),
        (TypeError, "array of numbers, got str", lambda e: evaluate("embeddings.npy", e)),
        (TypeError, "image_of must be integers", lambda e: evaluate(e, e, np.arange(10.0))),
        (ValueError, r"image_of must have shape \(10,\)", lambda e: evaluate(e, e, np.arange(9))),
        (ValueError, r"image_of\[9\] = 10", lambda e: evaluate(e, e, [*range(9), 10])),
        (ValueError, r"image_of\[0\] = -1", lambda e: evaluate(e, e, [-1, *range(1, 10)])),
        (ValueError, "image 9 has no caption", lambda e: evaluate(e, e, [*range(9), 0])),
        (ValueError, "folds=3 must divide the 10", lambda e: evaluate(e, e, folds=3)),
        (ValueError, "chunk must be a whole number >= 1, got 0", lambda e: evaluate(e, e, chunk=0)),
        (TypeError, "folds must be a whole number >= 1, got 2.0", lambda e: evaluate(e, e, folds=2.0)),
        (ValueError, "similarity='dots'.*dot", lambda e: evaluate(e, e, similarity="dots")),
        (TypeError, "S must have one of the dtypes", lambda e: evaluate_similarity(e.astype(int))),
        (TypeError, "x_labels must be integers or strings", lambda e: map_at_all(e, e, e[0], range(10))),
        (TypeError, "labels must be of one kind", lambda e: map_at_all(e, e, list("abcdefghij"), range(10))),
        (ValueError, r"y_labels must have shape \(10,\)", lambda e: map_at_all(e, e, range(10), range(9))),
        (
            ValueError,
            "x row 9 has a label that no row of y",
            lambda e: map_at_all(e, e, range(10), [0, *range(9)]),
        ),
    ],
)
def test_bad_input_is_told_what_came_and_what_is_allowed(error, message, call):
    with pytest.raises(error, match=message):
        call(np.eye(10))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_average_precision_agrees_with_counting(data):
    n, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    rows = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    x = data.draw(st.lists(rows, min_size=n, max_size=n))
    y = data.draw(st.lists(rows, min_size=m, max_size=m))
    x_labels = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    y_labels = data.draw(st.lists(st.integers(0, 2), min_size=m, max_size=m))
    for missing in sorted(set(x_labels) ^ set(y_labels)):  # every label on both sides
        (x if missing in y_labels else y).append([missing, -1])
        (x_labels if missing in y_labels else y_labels).append(missing)
    metrics = map_at_all(np.array(x, float), np.array(y, float), x_labels, y_labels, chunk=data.draw(st.integers(1, 4)))
    scores = [[naive_score(a, b, "dot") for b in y] for a in x]
    x2y = [naive_average_precision(s, [b == a for b in y_labels]) for s, a in zip(scores, x_labels, strict=True)]
    y2x = [
        naive_average_precision([row[j] for row in scores], [a == b for a in x_labels]) for j, b in enumerate(y_labels)
    ]
    assert (metrics.x2y_ap / 100).tolist() == pytest.approx(x2y)
    assert (metrics.y2x_ap / 100).tolist() == pytest.approx(y2x)
    assert metrics.as_dict() == pytest.approx(
        {"x2y": 100 * np.mean(x2y), "y2x": 100 * np.mean(y2x), "mean": 50 * (np.mean(x2y) + np.mean(y2x))}
    )


def test_average_precision_of_a_collapsed_model_is_the_worst_there_is():
    labels = ["a", "b"] * 10
    metrics = map_at_all(np.ones((20, 3)), np.ones((20, 3)), labels, labels)
    assert metrics.x2y == pytest.approx(100 * sum(r / (10 + r) for r in range(1, 11)) / 10)
    perfect = map_at_all(np.eye(2)[[0, 1] * 10], np.eye(2)[[0, 1] * 10], labels, labels)
    assert perfect.mean == 100


# ── labels are compared exactly ─────────────────────────────────────────────────────────────────────────────────────


class Column:
    """As a table's: what it holds is only to be had as an array, and its index is another."""

    def __init__(self, values, dtype=None):
        self.values, self.dtype, self.index = values, dtype, range(100, 100 + len(values))

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype or self.dtype)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, at):
        return self.values[self.index.index(at)]


HASHES = [2**62 + i for i in range(8)]  # as float64 all are equal
FORMS = [
    np.array(HASHES, np.uint64),
    np.array(HASHES, ">i8"),
    np.array(HASHES, ">u8"),
    np.array(HASHES, object),
    np.array([*HASHES, 0]).repeat(2)[:16:2],  # with gaps between them
    torch.tensor(HASHES),
    torch.tensor(HASHES, dtype=torch.uint64),
    tuple(HASHES),
    [np.uint64(HASHES[0]), *map(np.int64, HASHES[1:4]), *HASHES[4:]],
    [torch.tensor(label) for label in HASHES],
    Column(HASHES),
    Column(HASHES, object),
    np.ma.array(HASHES),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_labels_of_any_integer_kind_are_compared_exactly(form):
    x, y = np.random.default_rng(0).standard_normal((2, 8, 4))
    expected = map_at_all(x, y, range(8), range(8))
    assert expected.x2y < 100
    for labels in ((HASHES, form), (form, HASHES), (form, np.array(HASHES, np.int64)), (form, form)):
        assert map_at_all(x, y, *labels).as_dict() == expected.as_dict()


def test_labels_beyond_int64():
    x, y = np.random.default_rng(0).standard_normal((2, 4, 4))
    signed, unsigned = np.array([-1, -2, 3, 4]), np.array([3, 4, 2**64 - 1, 2**64 - 2], np.uint64)
    with pytest.raises(ValueError, match="x row 0 has a label that no row of y"):
        map_at_all(x, y, signed, unsigned)
    huge = [2**100, 2**100 + 1, -(2**100), 0]
    assert map_at_all(x, y, huge, huge).as_dict() == map_at_all(x, y, range(4), range(4)).as_dict()


@pytest.mark.parametrize(
    "form",
    [
        np.array(["a", "bb", "é"]),
        np.array(["a", "bb", "é"], object),
        np.array(["a", "bb", "é"], np.dtypes.StringDType()),
        ("a", np.str_("bb"), "é"),
        Column(["a", "bb", "é"], object),
    ],
    ids=lambda form: str(getattr(form, "dtype", "tuple")),
)
def test_labels_of_strings(form):
    x, y = np.random.default_rng(0).standard_normal((2, 3, 4))
    assert map_at_all(x, y, form, ["a", "bb", "é"]).as_dict() == map_at_all(x, y, range(3), range(3)).as_dict()
    with pytest.raises(ValueError, match="x row 2 has a label that no row of y"):
        map_at_all(x, y, ["a", "bb", "é\0"], form)  # which NumPy cuts off


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 2], r"must be integers or strings, but row 1 is None \(NoneType\)"),
        ([0, 1, math.nan], r"must be integers or strings, but row 2 is nan \(float\)"),
        (Column(["a", None, "c"], object), "row 1 is None"),
        (Column([0, 1, math.nan]), "integers or strings, got float64"),
        ([0, True, 2], r"row 1 is True \(bool\)"),
        ([0, np.True_, 2], r"row 1 is np.True_ \(bool\)"),
        (np.array([True, False, True]), "integers or strings, got bool"),
        (torch.tensor([True, False, True]), "integers or strings, got bool"),
        (torch.tensor([0.0, 1.0, 2.0]), "integers or strings, got torch.float32"),
        (torch.tensor([0, 1, 2]).to_sparse(), "must be a dense"),
        ([0, 1.0, 2], r"row 1 is 1.0 \(float\)"),
        ([0, "1", 2], "must be of one kind, but row 0 is 0 and row 1 is '1'"),
        (np.array([b"a", b"b", b"c"]), r"integers or strings, got \|S1"),
        ([b"a", b"b", b"c"], r"row 0 is b'a' \(bytes\)"),
        (np.array(["2026-01-01"] * 3, "M8[ns]"), r"integers or strings, got datetime64\[ns\]"),
        ("abc", "one per row, got str"),
        ({0, 1, 2}, "one per row, got set"),
        (iter([0, 1, 2]), "one per row, got list_iterator"),
        (3, "one per row, got int"),
        ([0, 1], r"must have shape \(3,\), one per row, got \(2,\)"),
        ([[0], [1], [2]], r"row 0 is \[0\]"),
        (np.ma.array([0, 1, 2], mask=[0, 0, 1]), "must not be masked, but row 2 is"),
    ],
)
def test_labels_that_are_refused(labels, message):
    e = np.eye(3, dtype=np.float32)
    for side in ("x_labels", "y_labels"):
        both = {"x_labels": [0, 1, 2], "y_labels": [0, 1, 2], side: labels}
        with pytest.raises((TypeError, ValueError), match=f"{side} .*{message}"):
            map_at_all(e, e + 1, **both)


@pytest.mark.parametrize(
    "form",
    [
        np.array([2, 0, 1], np.uint64), np.array([2, 0, 1], ">i4"), [2, np.int8(0), 1], (2, 0, 1), Column([2, 0, 1]),
        torch.tensor([2, 0, 1], dtype=torch.uint8), np.array([2, 0, 1], object),
    ],
    ids=lambda form: type(form).__name__,
)  # fmt: skip
def test_image_of_is_integers_of_any_kind(form):
    x, y = np.random.default_rng(0).standard_normal((2, 3, 4))
    expected = evaluate(x, y, torch.tensor([2, 0, 1]))
    assert evaluate(x, y, form).as_dict() == expected.as_dict()
    assert evaluate_similarity(x @ y.T, form).as_dict() == pytest.approx(expected.as_dict())
    for wrong, message in (([2, 0, 1.0], "image_of must be integers"), ([2**64 - 1, 0, 1], "image_of must be within")):
        with pytest.raises((TypeError, ValueError), match=message):
            evaluate(x, y, wrong)


# ── arrays and tensors of any kind ──────────────────────────────────────────────────────────────────────────────────


def mapped(array, folder):
    path = folder / "rows.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def packed(array, folder):
    """Fields whose numbers start at odd addresses."""
    rows = np.zeros(array.shape, np.dtype([("a", "u1"), ("b", "f4")]))
    rows["b"] = array
    return rows["b"]


KINDS = {
    "other byte order": lambda a, _: a.astype(">f4"),
    "other byte order, float64": lambda a, _: a.astype(">f8"),
    "other byte order, float16": lambda a, _: a.astype(">f2"),
    "backwards": lambda a, _: a[::-1].copy()[::-1],
    "columns backwards": lambda a, _: a[:, ::-1].copy()[:, ::-1],
    "every other": lambda a, _: a.repeat(2, 0).repeat(2, 1)[::2, ::2],
    "columns first": lambda a, _: np.asfortranarray(a),
    "mapped": mapped,
    "mapped in the other byte order": lambda a, folder: mapped(a.astype(">f4"), folder),
    "odd addresses": packed,
    "nothing masked": lambda a, _: np.ma.array(a),
    "list": lambda a, _: a.tolist(),
    "table": lambda a, _: Column(a.tolist()),
    "tensor": lambda a, _: torch.from_numpy(a).T.contiguous().T.requires_grad_(),
    "parameter": lambda a, _: torch.nn.Parameter(torch.from_numpy(a)),
}
REFUSED = {
    "longdouble": (lambda a: a.astype(np.longdouble), "at most 64 bits, got float128|got float64"),
    "complex": (lambda a: a.astype(np.complex64), "dtypes .*, got torch.complex64"),
    "integers": (lambda a: a.astype(int), "dtypes .*, got torch.int64"),
    "objects": (lambda a: a.astype(object), "must be a tensor or an array of numbers, got object"),
    "text": (lambda a: a.astype(str), "must be a tensor or an array of numbers, got <U"),
    "masked": (lambda a: np.ma.array(a, mask=np.arange(36).reshape(6, 6) == 13), "must not be masked, but row 2 is"),
    "sparse": (lambda a: torch.from_numpy(a).to_sparse(), "must be a dense"),
    "rows of sparse": (lambda a: torch.from_numpy(a).to_sparse_csr(), "must be a dense"),
    "quantised": (lambda a: torch.quantize_per_tensor(torch.from_numpy(a), 1.0, 0, torch.qint8), "must be a dense"),
    "meta": (lambda a: torch.from_numpy(a).to("meta"), "meta"),
    "float8": (lambda a: torch.from_numpy(a).to(torch.float8_e5m2), "dtypes .*, got torch.float8_e5m2"),
    "uneven": (lambda a: [[1.0], [1.0, 2.0]], "must be a tensor or an array, got list"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_arrays(kind, tmp_path):
    x, y = (np.random.default_rng(seed).integers(-8, 8, (6, 5)).astype(np.float32) for seed in (0, 1))
    made = KINDS[kind](x, tmp_path)
    assert evaluate(made, y).as_dict() == evaluate(x, y).as_dict()
    assert map_at_all(y, made, [0, 1] * 3, [0, 1] * 3).as_dict() == map_at_all(y, x, [0, 1] * 3, [0, 1] * 3).as_dict()
    square = KINDS[kind](x @ y.T, tmp_path)
    assert evaluate_similarity(square).as_dict() == evaluate_similarity(x @ y.T).as_dict()


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_of_arrays_that_are_refused(kind):
    make, message = REFUSED[kind]
    x = np.random.default_rng(0).integers(1, 8, (6, 6)).astype(np.float32)
    if kind == "longdouble" and np.dtype(np.longdouble).itemsize == 8:
        return  # where it is float64
    for name, call in {
        r"x \(images\)": lambda bad: evaluate(bad, x),
        r"y \(captions\)": lambda bad: evaluate(x, bad),
        "S": evaluate_similarity,
        "x": lambda bad: map_at_all(bad, x, range(6), range(6)),
        "y": lambda bad: map_at_all(x, bad, range(6), range(6)),
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^{name} .*({message})"):
            call(make(x))


def test_numbers_of_numpy_are_settings():
    x, y = np.random.default_rng(0).standard_normal((2, 6, 4))
    expected = evaluate(x, y, folds=2, chunk=3)
    assert evaluate(x, y, folds=np.int64(2), chunk=np.uint8(3)).as_dict() == expected.as_dict()


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)])
def test_what_the_process_has_set_as_default_changes_nothing(device, dtype):
    x, y = np.random.default_rng(0).standard_normal((2, 6, 4))
    expected = evaluate(x, y).as_dict(), map_at_all(x, y, range(6), range(6)).as_dict()
    before = torch.get_default_dtype()
    try:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        found = evaluate(torch.from_numpy(x), y).as_dict(), map_at_all(x, y, range(6), range(6)).as_dict()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert found == expected


# ── one set on both sides ───────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_leaving_one_out_agrees_with_counting(data):
    n = data.draw(st.integers(2, 9))
    rows = st.lists(st.lists(st.integers(-2, 2), min_size=2, max_size=2), min_size=n, max_size=n)
    x = data.draw(rows)
    y = data.draw(st.one_of(st.just(x), rows))  # one set, or two views of it
    labels = data.draw(st.lists(st.integers(0, n // 3), min_size=n, max_size=n))
    options = {"chunk": data.draw(st.integers(1, n + 1)), "leave_one_out": True}
    similarity = data.draw(st.sampled_from(["dot", "order"]))
    scores = [[naive_score(a, b, similarity) for b in y] for a in x]
    given = np.array(x, np.float32), np.array(y, np.float32)
    if min(labels.count(label) for label in labels) > 1:
        found = map_at_all(*given, labels, labels, similarity=similarity, **options)
        for ap, table in ((found.x2y_ap, scores), (found.y2x_ap, list(zip(*scores, strict=True)))):
            expected = [
                naive_average_precision(
                    [s for j, s in enumerate(row) if j != i], [b == labels[i] for j, b in enumerate(labels) if j != i]
                )
                for i, row in enumerate(table)
            ]
            assert (ap / 100).tolist() == pytest.approx(expected)
    shift = data.draw(st.integers(1, n - 1))
    other = [(i + shift) % n for i in range(n)]  # the one positive of each
    found = evaluate(*given, other, similarity=similarity, **options)
    for ranks, ties, table, positive in (
        (found.i2t_ranks, found.i2t_ties, scores, [other.index(i) for i in range(n)]),
        (found.t2i_ranks, found.t2i_ties, list(zip(*scores, strict=True)), other),
    ):
        wrong = [[s for j, s in enumerate(row) if j not in (i, positive[i])] for i, row in enumerate(table)]
        best = [row[positive[i]] for i, row in enumerate(table)]
        assert ranks.tolist() == [1 + sum(s >= b for s in row) for row, b in zip(wrong, best, strict=True)]
        assert ties == pytest.approx(100 * np.mean([b in row for row, b in zip(wrong, best, strict=True)]))
    if similarity == "dot":
        again = evaluate_similarity(given[0] @ given[1].T, other, **options)
        assert again.i2t_ranks.tolist() == found.i2t_ranks.tolist()
        assert again.t2i_ranks.tolist() == found.t2i_ranks.tolist()


def test_leaving_one_out_in_folds():
    x = np.random.default_rng(0).standard_normal((12, 4))
    other = np.arange(12) ^ 1
    found = evaluate(x, x, other, folds=3, chunk=2, leave_one_out=True)
    for start in range(0, 12, 4):
        part = slice(start, start + 4)
        alone = evaluate(x[part], x[part], other[part] - start, leave_one_out=True)
        assert found.i2t_ranks[part].tolist() == alone.i2t_ranks.tolist()
        assert found.t2i_ranks[part].tolist() == alone.t2i_ranks.tolist()
    assert max(found.i2t_ranks) == 3  # of three candidates


LEFT = {"leave_one_out": True}


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("one item, but they have 3 and 4 rows", lambda x: map_at_all(x[:3], x, [0] * 3, [0] * 4, **LEFT)),
        ("of y is one item, but its labels differ", lambda x: map_at_all(x, x, [0, 0, 1, 1], [0, 1, 0, 1], **LEFT)),
        ("x row 3 has a label that no other row of y", lambda x: map_at_all(x, x, [0, 0, 0, 1], [0, 0, 0, 1], **LEFT)),
        ("one item, but they have 2 and 4 rows", lambda x: evaluate(x[:2], x, [0, 0, 1, 1], **LEFT)),
        ("row 0 for itself, and by image_of row 0 is its one positive", lambda x: evaluate(x, x, **LEFT)),
        ("leaves out row 2 for itself", lambda x: evaluate(x, x, [1, 0, 2, 3], **LEFT)),
        ("leaves out row 0 for itself", lambda x: evaluate_similarity(x, **LEFT)),
    ],
)
def test_one_cannot_be_left_out(message, call):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).standard_normal((4, 4)))


def test_the_same_rows_on_both_sides_are_warned_of():
    x = np.random.default_rng(0).standard_normal((4, 4))
    for call in (lambda y: evaluate(x, y), lambda y: map_at_all(x, y, [0, 0, 1, 1], [0, 0, 1, 1])):
        with pytest.warns(UserWarning, match=r"x and y hold the same rows.*leave_one_out=True") as caught:
            call(x.copy())
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(x + 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        map_at_all(x, x, [0, 0, 1, 1], [0, 0, 1, 1], leave_one_out=True)


def test_goal_eval_leaves_one_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x, other = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32), np.arange(6) ^ 1
    np.save("x.npy", x)
    np.save("other.npy", other)
    command = ["eval", "--x", "x.npy", "--y", "x.npy", "--leave-one-out"]
    assert main([*command, "--image-of", "other.npy", "--similarity", "dot"]) == 0
    expected = str(evaluate(x, x, other, leave_one_out=True)).split(" | ")
    assert capsys.readouterr().out.splitlines() == expected
    assert main(command) == 2
    assert "leave_one_out leaves out row 0 for itself" in capsys.readouterr().err
    assert main(["eval", "runs/a", "--leave-one-out"]) == 2
    assert "--leave-one-out must go with the files" in capsys.readouterr().err
