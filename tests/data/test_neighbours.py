"""Nearest neighbours against a full sort of the similarity matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.data import neighbours
from bakeoff.data.neighbours import nearest_neighbours, unit_rows
from bakeoff.errors import DataError


def by_sorting(pool, k, queries=None):
    """Return the k best by a stable sort of float64 similarities."""
    rows = pool if queries is None else queries
    similarities = rows.astype(np.float64) @ pool.astype(np.float64).T
    if queries is None:
        np.fill_diagonal(similarities, -np.inf)
    return np.argsort(-similarities, axis=1, kind="stable")[:, :k]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(2, 60), own=st.booleans())
def test_neighbours_are_those_of_a_full_sort(seed, n, own):
    rng = np.random.default_rng(seed)
    pool = unit_rows(rng.standard_normal((n, 8)).astype(np.float32))
    k = int(rng.integers(1, n))
    queries = None if own else unit_rows(rng.standard_normal((7, 8)).astype(np.float32))
    found = nearest_neighbours(pool, k, queries=queries)
    assert found.indices.tolist() == by_sorting(pool, k, queries).tolist()


def test_copies_are_neighbours_and_a_row_is_not_its_own():
    rng = np.random.default_rng(0)
    pool = unit_rows(rng.standard_normal((30, 5)).astype(np.float32))
    pool[[4, 9, 11, 20]] = pool[2]
    found = nearest_neighbours(pool, 3).indices
    for row in range(30):
        assert row not in found[row]
    for row in (2, 4, 9, 11, 20):
        assert set(found[row]) < {2, 4, 9, 11, 20}


def test_block_size_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    pool = unit_rows(rng.standard_normal((100, 6)).astype(np.float32))
    whole = nearest_neighbours(pool, 5)
    seen = []
    monkeypatch.setattr(neighbours, "_BLOCK", 13)
    parts = nearest_neighbours(pool, 5, progress=lambda *a: seen.append(a))
    assert parts.indices.tolist() == whole.indices.tolist()
    assert seen[-1] == (100, 100)


def test_equal_similarities_come_in_row_order():
    pool = np.repeat(np.eye(2, dtype=np.float32), 4, axis=0)
    assert nearest_neighbours(pool, 3).indices[5].tolist() == [4, 6, 7]


def test_unit_rows_leaves_zeros_and_the_argument():
    vectors = np.array([[3.0, 4.0], [1.0, 1.0]])
    moved = unit_rows(vectors, offset=np.array([1.0, 1.0]))
    assert moved[1].tolist() == [0.0, 0.0]
    assert np.linalg.norm(moved[0]) == pytest.approx(1)
    assert vectors[0].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("k", [0, 3, -1])
def test_impossible_numbers_of_neighbours(k):
    with pytest.raises(DataError, match=f"between 1 and 2 .* got {k}"):
        nearest_neighbours(np.eye(3, dtype=np.float32), k)
