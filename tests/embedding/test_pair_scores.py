"""F1max and its companions against a scan of all thresholds, official numbers and closed forms."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.data.citations import LabelledPairs
from bakeoff.embedding.pair_scores import (
    ALL_POSITIVE_F1,
    f1_at,
    f1_max,
    pair_cosines,
    pair_scores,
    score_pairs,
)
from bakeoff.errors import DataError


def by_scan(scores, labels):
    """Return the best F1 over all thresholds, and the lowest threshold that gives it."""
    best = (Fraction(-1), 0.0)
    for threshold in sorted(set(scores)):
        called = [score >= threshold for score in scores]
        right = sum(c and y for c, y in zip(called, labels, strict=True))
        f1 = Fraction(2 * right, sum(called) + sum(labels))
        if f1 > best[0]:
            best = (f1, threshold)
    return float(best[0]), best[1]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.1, 0.2, 0.9, 1.0]), st.integers(0, 1)),
        min_size=2,
        max_size=30,
    ).filter(lambda rows: len({label for _, label in rows}) == 2)
)
def test_equals_a_scan_and_a_count_of_pairs(rows):
    scores, labels = (list(column) for column in zip(*rows, strict=True))
    judged = pair_scores(scores, labels)
    f1, threshold = by_scan(scores, labels)
    assert judged.f1 == pytest.approx(f1)
    assert judged.threshold == threshold
    assert f1_at(scores, labels, judged.threshold) == pytest.approx(judged.f1)
    positive = [s for s, y in rows if y]
    negative = [s for s, y in rows if not y]
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    assert judged.roc_auc == pytest.approx(wins / len(positive) / len(negative))


def test_thresholds_with_the_same_f1_give_the_lowest():
    # Both thresholds have F1 2/3; as harmonic means of rounded ratios they differ.
    scores = [-1.0] * 3 + [-0.5] * 9
    labels = [0, 0, 1] + [0] * 4 + [1] * 5
    assert f1_max(scores, labels)[0] == f1_at(scores, labels, -0.5) == 2 / 3
    assert f1_max(scores, labels)[3] == -1.0


def test_official_values():
    # What metrics.py of the official repository gives for the same numbers.
    rng = np.random.default_rng(11)
    scores = rng.normal(size=60) * 0.3
    labels = (rng.random(60) < 0.5).astype(int)
    judged = pair_scores(scores + 0.2 * labels, labels)
    assert judged.f1 == pytest.approx(0.7608695605033081, abs=2e-8)  # they add 1e-8 below
    assert judged.precision == pytest.approx(0.6140350877192983)
    assert judged.recall == 1.0
    assert judged.threshold == pytest.approx(-0.37610217703540855)


def test_calling_everything_positive_is_the_floor():
    labels = np.tile([0, 1], 50)
    assert f1_max(np.zeros(100), labels)[0] == pytest.approx(ALL_POSITIVE_F1)
    scores = np.random.default_rng(0).random(100)
    assert f1_max(scores, labels)[0] >= ALL_POSITIVE_F1
    assert pair_scores(np.zeros(100), labels).similarity_ratio == float("inf")


def test_monotone_maps_change_the_threshold_only():
    rng = np.random.default_rng(3)
    scores, labels = rng.uniform(-1, 1, 50), rng.integers(0, 2, 50)
    one, other = pair_scores(scores, labels), pair_scores(scores**3, labels)
    assert (one.f1, one.roc_auc) == pytest.approx((other.f1, other.roc_auc))
    assert other.threshold == pytest.approx(one.threshold**3)


def test_similarity_ratio_and_correctness_per_pair():
    judged = pair_scores([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0])
    assert judged.similarity_ratio == pytest.approx(0.75 / 0.4)
    assert judged.correct().tolist() == [True, True, False, True]
    assert judged.correct(0.8).tolist() == [True, False, True, True]


def test_the_ratio_has_no_sign_and_scores_are_cut_at_the_range_of_a_cosine():
    assert pair_scores([0.6, -0.2], [1, 0]).similarity_ratio == pytest.approx(3)
    judged = pair_scores([1.0000001, 3.0, -7.0], [1, 0, 0])
    assert judged.scores.tolist() == [1.0, 1.0, -1.0]
    assert judged.roc_auc == 0.75  # what was cut is equal
    assert (judged.f1, judged.threshold) == (2 / 3, 1.0)


def test_cosines_leave_their_range_not_even_by_rounding():
    vectors = np.random.default_rng(0).standard_normal((500, 7))
    lengths = np.linalg.norm(vectors, axis=1)
    assert (np.einsum("nd,nd->n", vectors, vectors) / lengths**2).max() > 1  # without care
    assert pair_cosines(vectors, vectors).max() == 1.0
    assert pair_cosines(vectors, -3 * vectors).min() == -1.0


def test_by_domain_has_thresholds_of_its_own():
    judged = pair_scores([0.9, 0.8, 0.2, 0.1], [1, 0, 1, 0], ["a", "a", "b", "b"])
    assert judged.f1 == 2 / 3 or judged.f1 == pytest.approx(0.8)
    parts = judged.by_domain()
    assert {name: part.f1 for name, part in parts.items()} == {"a": 1.0, "b": 1.0}
    assert parts["b"].threshold == 0.2


def test_cosines_have_no_scale_and_know_zero_vectors():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 5, 3))
    expected = [
        float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in zip(first, second, strict=True)
    ]
    assert np.allclose(pair_cosines(7 * first, 0.1 * second), expected)
    assert pair_cosines(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0.0]
    assert pair_cosines([[3e-200, 0]], [[1.0, 0]]).tolist() == [1.0]


def test_texts_are_embedded_once_for_each_domain():
    pairs = LabelledPairs(("x", "x", "y"), ("y", "z", "x"), np.array([1, 0, 1]), ("a", "a", "b"))
    seen = []

    def encode(texts, domains):
        seen.extend(zip(texts, domains, strict=True))
        return np.array([[ord(text), 1.0 + (domain == "b")] for text, domain in seen])

    judged = score_pairs(encode, pairs)
    assert sorted(seen) == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b"), ("z", "a")]
    expected = pair_cosines([[120, 1], [120, 1], [121, 2]], [[121, 1], [122, 1], [120, 2]])
    assert np.allclose(judged.scores, expected)


def test_bad_input():
    with pytest.raises(DataError, match=r"one shape \(n,\), got \(2,\) and \(3,\)"):
        pair_scores([0.1, 0.2], [1, 0, 1])
    with pytest.raises(DataError, match="1 are not"):
        f1_max([0.1, np.nan], [1, 0])
    with pytest.raises(DataError, match="both occur"):
        f1_max([0.1, 0.2], [1, 1])
    with pytest.raises(DataError, match="one per pair, got 1 for 2"):
        pair_scores([0.1, 0.2], [1, 0], ["a"])
    with pytest.raises(DataError, match="one shape"):
        pair_cosines(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(DataError, match="finite"):
        pair_cosines([[np.inf]], [[1.0]])
    pairs = LabelledPairs(("x",), ("y",), np.array([1]), ("a",))
    with pytest.raises(DataError, match=r"must return \(2, d\) vectors for 2 texts"):
        score_pairs(lambda texts, domains: np.ones(3), pairs)
    with pytest.raises(DataError, match="no pairs"):
        score_pairs(lambda texts, domains: texts, pairs.take([]))
