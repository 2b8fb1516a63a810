"""The checks that all selectors share, and scikit-learn's conventions."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.base import clone

from bakeoff.errors import DataError
from bakeoff.selection.selector import Selector, checked_count, checked_labeled, checked_vectors


class FromTheEnd(Selector):
    """Picks the last rows."""

    def __init__(self, n_select: int = 2, *, step: int = 1):
        self.n_select = n_select
        self.step = step

    def fit(self, X, y=None, *, already_labeled=None):
        vectors = checked_vectors(X)
        taken = checked_labeled(already_labeled, len(vectors))
        free = np.setdiff1d(np.arange(len(vectors)), taken)[::-1][:: self.step]
        self.selected_indices_ = free[: checked_count(self.n_select, len(free))]
        return self


# Vectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]], dtype=np.float16),
        np.array([[1, 2], [3, 4]], dtype=np.uint8),
        np.array([[1, 2], [3, 4]], dtype=object),
        np.asfortranarray([[1.0, 2], [3, 4]]),
    ],
)
def test_numbers_of_any_kind_become_float32(given):
    vectors = checked_vectors(given)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 2], [3, 4]]


def test_the_callers_array_is_not_written_to():
    given = np.ones((2, 2), dtype=np.float32)
    checked_vectors(given)[0, 0] = 9
    assert given[0, 0] == 1


def silently(pool):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checked_vectors(pool)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0], r"X must have two dimensions \(rows, columns\), got shape \(2,\)"),
        (np.ones((2, 2, 2)), r"got shape \(2, 2, 2\)"),
        (np.ones((0, 3)), r"at least one row and one column, got \(0, 3\)"),
        (np.ones((3, 0)), r"at least one row and one column, got \(3, 0\)"),
        ([["a", "b"]], "X must be a numeric array"),
        ([[1.0], [1.0, 2.0]], "X must be a numeric array"),
        ([[None, 1.0]], "X has NaN or inf in row 0"),
        (np.ones((1, 1)) * 1j, "Complex data not supported"),
        (sparse.eye(3).tocsr(), r"dense array, got a sparse matrix: give X\.toarray\(\)"),
        (np.array([[1.0, np.nan], [1, 1], [np.inf, 1]]), "X has NaN or inf in rows 0, 2"),
        (np.array([[1e300, 1.0]]), "X has NaN or inf in row 0"),
        (np.array([[1.0], [0.0]]), "X has only zeros, so no cosine is defined, in row 1"),
    ],
)
def test_what_is_no_pool_of_vectors_is_named(given, message):
    # The message says all that there is to say.
    with pytest.raises(DataError, match=message):
        silently(given)


def test_many_bad_rows_are_counted():
    with pytest.raises(
        DataError, match=r"queries has NaN or inf in rows 0, 1, 2, 3, 4 and 3 more$"
    ):
        checked_vectors(np.full((8, 2), np.nan), name="queries")


def test_zeros_are_fine_where_no_cosine_is_taken():
    assert checked_vectors([[0.0], [1.0]], cosine=False).tolist() == [[0], [1]]


# Counts and rows ----------------------------------------------------------------------------------


@settings(max_examples=50)
@given(n=st.integers(-3, 12), there=st.integers(0, 9))
def test_a_count_is_between_one_and_what_there_is(n, there):
    if 1 <= n <= there:
        assert checked_count(n, there) == n
        assert type(checked_count(np.int32(n), there)) is int
    else:
        with pytest.raises(DataError, match=rf"between 1 and {there}, the rows of .* got {n}$"):
            checked_count(n, there)


@pytest.mark.parametrize("given", [True, 2.0, "2", None])
def test_a_count_is_an_integer(given):
    with pytest.raises(DataError, match="n_select must be an integer, got"):
        checked_count(given, 9)


def test_labelled_rows_are_kept_in_their_order():
    for labelled in ([5, 0, 3], (5, 0, 3), np.array([5, 0, 3], dtype=np.uint16)):
        rows = checked_labeled(labelled, 6)
        assert rows.dtype == np.int64
        assert rows.tolist() == [5, 0, 3]
    for nothing in (None, [], np.array([])):
        assert checked_labeled(nothing, 6).shape == (0,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([6], "row numbers from 0 to 5, got 6"),
        ([0, -1], "row numbers from 0 to 5, got -1"),
        ([2, 3, 2], "already_labeled has row 2 twice"),
        ([1.0], "must be a list of row numbers, got dtype float64"),
        ([True] * 6, "must be a list of row numbers, got dtype bool"),
        ([[1, 2]], r"got dtype int64 and shape \(1, 2\)"),
    ],
)
def test_wrong_rows_are_named(given, message):
    with pytest.raises(DataError, match=message):
        checked_labeled(given, 6)


# Selectors ----------------------------------------------------------------------------------------


def test_select_keeps_nothing_and_takes_another_number():
    selector = FromTheEnd(3)
    pool = np.ones((6, 2))
    assert selector.select(pool).tolist() == [5, 4, 3]
    assert selector.select(pool, 1).tolist() == [5]
    assert selector.select(pool, 2, already_labeled=[5]).tolist() == [4, 3]
    assert selector.n_select == 3
    assert not hasattr(selector, "selected_indices_")


def test_selectors_are_estimators():
    selector = FromTheEnd(3, step=2)
    assert selector.get_params() == {"n_select": 3, "step": 2}
    assert clone(selector).set_params(step=1).get_params() == {"n_select": 3, "step": 1}
    fitted = pickle.loads(pickle.dumps(selector.fit(np.ones((6, 2)))))
    assert fitted.selected_indices_.tolist() == [5, 3, 1]


def test_a_selector_without_a_method_says_so():
    with pytest.raises(NotImplementedError):
        Selector().fit([[1.0]])
