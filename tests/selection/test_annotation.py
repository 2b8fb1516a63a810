"""Answers by the nearest label against scikit-learn, and who is shown what while picking."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from bakeoff.selection.annotation import (
    LabelledPool,
    nearest_label,
    nearest_label_confidence,
    pick_for_budgets,
)
from bakeoff.selection.selectors import SELECTORS, selector_kind

LABELS = np.array(["cat", "dog", "tree", "mat"])


def made(n=60, width=6, seed=0, n_classes=4):
    rng = np.random.default_rng(seed)
    vectors = (rng.normal(size=(n, width)) + 2).astype(np.float32)
    return LabelledPool(
        vectors, [f"text {i}" for i in range(n)], LABELS[rng.integers(n_classes, size=n)]
    )


def never(rows):
    raise AssertionError("no confidence is needed")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n_picked=st.integers(1, 60), n_tests=st.integers(1, 30))
def test_nearest_labels_are_scikit_learns(seed, n_picked, n_tests):
    pool = made(seed=seed)
    rng = np.random.default_rng(seed + 1)
    rows = rng.choice(60, n_picked, replace=False)
    tests = (rng.normal(size=(n_tests, 6)) + 2).astype(np.float32)
    centre = pool.vectors.astype(np.float64).mean(axis=0)
    oracle = KNeighborsClassifier(1, metric="cosine", algorithm="brute")
    oracle.fit(pool.vectors[rows] - centre, pool.labels[rows])
    distances, _ = oracle.kneighbors(tests - centre)
    found = nearest_label(pool, rows, tests)
    assert found.labels.tolist() == oracle.predict(tests - centre).tolist()
    np.testing.assert_allclose(found.similarities, 1 - distances[:, 0], atol=1e-5)
    assert found.similarities.dtype == np.float64


def test_the_mean_is_that_of_the_whole_pool_and_accumulates_in_double():
    pool = made()
    np.testing.assert_allclose(pool.mean, pool.vectors.astype(np.float64).mean(axis=0), rtol=1e-6)
    large = np.full((2**19, 3), 16.1, dtype=np.float32)
    assert (LabelledPool(large, [], np.array([])).mean == np.float32(16.1)).all()
    assert (large.mean(axis=0) != np.float32(16.1)).all()  # what running sums in float32 give


def test_a_picked_row_asked_again_gets_its_own_label():
    pool = made()
    rows = np.array([5, 17, 40])
    found = nearest_label(pool, rows, pool.vectors[rows])
    assert found.labels.tolist() == pool.labels[rows].tolist()
    np.testing.assert_allclose(found.similarities, 1, atol=1e-6)


def by_hand(pool, rows):
    """Return the lead of the best class, row by row."""
    moved = pool.vectors.astype(np.float64) - pool.vectors.astype(np.float64).mean(axis=0)
    cosine = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    leads = []
    for row in range(len(moved)):
        best = {}
        for known in rows:
            label = pool.labels[known]
            best[label] = max(best.get(label, -2), float(cosine[row] @ cosine[known]))
        ordered = sorted(best.values(), reverse=True)
        leads.append(ordered[0] - ordered[1] if len(ordered) > 1 else ordered[0])
    return leads


@pytest.mark.parametrize("n_classes", [1, 2, 4])
def test_confidence_is_the_lead_over_the_next_class(n_classes):
    pool = made(n_classes=n_classes)
    rows = np.array([3, 8, 21, 34, 55])
    np.testing.assert_allclose(nearest_label_confidence(pool, rows), by_hand(pool, rows), atol=1e-5)


def test_without_labels_nothing_is_sure():
    found = nearest_label_confidence(made(), np.empty(0, dtype=np.int64))
    assert found.tolist() == [0.0] * 60


# Picking ------------------------------------------------------------------------------------------


def test_a_nested_method_runs_once_for_all_budgets(monkeypatch):
    kind = selector_kind("random")
    built = []
    original = type(kind).build
    monkeypatch.setattr(
        type(kind), "build", lambda self, **a: built.append(a["n_select"]) or original(self, **a)
    )
    picks = pick_for_budgets(kind, {}, made(), [4, 20, 9], seed=3, confidence_of=never)
    assert built == [20]
    assert sorted(picks) == [4, 9, 20]
    for budget, found in picks.items():
        assert found.rows.tolist() == picks[20].rows[:budget].tolist()
        assert found.seconds >= 0
    built.clear()
    pick_for_budgets(selector_kind("kmeans"), {}, made(), [4, 9], seed=3, confidence_of=never)
    assert built == [4, 9]


@pytest.mark.parametrize("name", ["least-confidence", "vote-k-confidence"])
@pytest.mark.filterwarnings("ignore:k=")
def test_confidence_is_asked_for_once_per_budget_with_a_tenth_of_it(name):
    asked = []
    pool = made()

    def confidence_of(rows):
        asked.append(rows.tolist())
        return nearest_label_confidence(pool, rows)

    picks = pick_for_budgets(
        selector_kind(name), {}, pool, [5, 20], seed=3, confidence_of=confidence_of
    )
    assert [len(rows) for rows in asked] == [1, 2]
    for rows, budget in zip(asked, (5, 20), strict=True):
        found = picks[budget].rows
        assert len(set(found.tolist())) == budget
        assert (
            found[: len(rows)].tolist() == rows
        )  # what was labelled first counts, and comes first


def test_a_budget_of_one_has_no_first_batch():
    asked = []

    def confidence_of(rows):
        asked.append(rows)
        return np.zeros(60)

    kind = selector_kind("least-confidence")
    picks = pick_for_budgets(kind, {}, made(), [1], seed=0, confidence_of=confidence_of)
    assert len(picks[1].rows) == 1
    assert [len(rows) for rows in asked] == [0]


def test_least_confidence_takes_the_least_sure_after_its_first_batch():
    pool = made()
    confidence = np.random.default_rng(9).random(60)
    kind = selector_kind("least-confidence")
    picks = pick_for_budgets(kind, {}, pool, [10], seed=0, confidence_of=lambda rows: confidence)
    first, rest = picks[10].rows[:1], picks[10].rows[1:]
    expected = [row for row in np.argsort(confidence).tolist() if row not in first.tolist()][:9]
    assert rest.tolist() == expected


def test_the_first_batch_follows_the_seed():
    kind = selector_kind("least-confidence")

    def picked(seed):
        found = pick_for_budgets(
            kind, {}, made(), [20], seed=seed, confidence_of=lambda rows: np.arange(60.0)
        )
        return found[20].rows.tolist()

    assert picked(1) == picked(1)
    assert picked(1)[:2] != picked(2)[:2]


ANNOTATING = [
    name
    for name, kind in SELECTORS.items()
    if kind.reads in ("rows", "vectors") and not {"queries", "groups"} & set(kind.needs)
]


@pytest.mark.filterwarnings("ignore:k=")
@pytest.mark.parametrize("name", ANNOTATING)
def test_labels_of_unpicked_rows_change_no_pick(name):
    """Confidences come from labels paid for; all other labels are swapped around at will."""
    picks = []
    pool = made()
    for attempt in range(3):
        labels = pool.labels
        if attempt:
            labels = labels.copy()
            hidden = np.setdiff1d(np.arange(60), picks[0])
            labels[hidden] = np.random.default_rng(attempt).permutation(labels[hidden])
            assert (labels != pool.labels).any()
        shown = LabelledPool(pool.vectors, pool.texts, labels)
        found = pick_for_budgets(
            selector_kind(name),
            {},
            shown,
            [12],
            seed=5,
            confidence_of=lambda rows, shown=shown: nearest_label_confidence(shown, rows),
        )
        picks.append(found[12].rows.tolist())
    assert picks[0] == picks[1] == picks[2]
    assert len(set(picks[0])) == 12
