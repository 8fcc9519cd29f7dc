"""Retrieval metrics against a loop-based float64 implementation, and the traps that metrics fall into."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import goal.evaluation
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
        (ValueError, "equal width", lambda e: evaluate(e, e[:, :3])),
        (ValueError, "matrix with rows and columns", lambda e: evaluate(e[:0], e[:0])),
        (ValueError, "matrix with rows and columns", lambda e: evaluate(e[0], e)),
        (TypeError, "floating point", lambda e: evaluate(e.astype(int), e)),
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
        (TypeError, "S must be floating point", lambda e: evaluate_similarity(e.astype(int))),
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
