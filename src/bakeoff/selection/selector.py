"""What all selectors share: scikit-learn's conventions, and the checks of their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, clone

from bakeoff.errors import DataError

# Rows named in a message about bad rows.
_NAMED = 5


class Selector(BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """Base of all selectors: ``fit(X)`` sets ``selected_indices_``; `select` is the short form.

    A selector is an estimator: parameters are constructor arguments, `get_params`, `set_params` and
    `clone` work, and it can be the last step of a scikit-learn ``Pipeline`` that makes vectors.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows of the pool in the order in which they were picked.
    """

    n_select: int
    selected_indices_: NDArray[np.int64]

    def fit(self, X: Any, y: None = None, **data: Any) -> Self:
        """Choose rows of the pool `X`."""
        raise NotImplementedError

    def reasons(self) -> list[str]:
        """Return one short reason per pick, in pick order."""
        raise NotImplementedError

    def select(self, X: Any, n: int | None = None, **data: Any) -> NDArray[np.int64]:
        """Return the rows that a copy of this selector picks from `X`; nothing is kept.

        Parameters
        ----------
        X
            The pool, as `fit` takes it.
        n
            How many; by default `n_select`.
        **data
            What `fit` takes beside the pool, e.g. ``already_labeled=``.
        """
        chosen = clone(self)
        if n is not None:
            chosen.set_params(n_select=n)
        picks: NDArray[np.int64] = chosen.fit(X, **data).selected_indices_
        return picks


def checked_vectors(X: ArrayLike, *, name: str = "X", cosine: bool = True) -> NDArray[np.float32]:
    """Return a pool of vectors as a float32 array ``(N, d)``.

    Parameters
    ----------
    X
        Two-dimensional and numeric.
    name
        The argument's name for messages.
    cosine
        Whether rows of zeros, which have no cosine, are refused.

    Raises
    ------
    DataError
        If `X` is empty, not a numeric matrix, or has NaN, infinite or (for cosines) all-zero rows;
        names the rows.
    """
    if sparse.issparse(X):
        raise DataError(
            f"{name} must be a dense array, got a sparse matrix: give {name}.toarray(), or fewer "
            "columns, e.g. by TruncatedSVD"
        )
    try:
        vectors = np.asarray(X)
        if vectors.dtype.kind == "c":
            raise DataError(f"{name} must be real. Complex data not supported: {vectors.dtype}")
        if vectors.dtype.kind not in "fiub":
            vectors = vectors.astype(np.float64)
    except DataError:
        raise
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be a numeric array (rows, columns): {error}") from error
    if vectors.ndim != 2:
        raise DataError(
            f"{name} must have two dimensions (rows, columns), got shape {vectors.shape}. Reshape "
            "your data: one row per item"
        )
    if 0 in vectors.shape:
        raise DataError(f"{name} must have at least one row and one column, got {vectors.shape}")
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is named below
        vectors = vectors.astype(np.float32)
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if broken.size:
        raise DataError(f"{name} has NaN or inf in {_named(broken)}")
    zero = np.flatnonzero(~vectors.any(axis=1))
    if cosine and zero.size:
        raise DataError(f"{name} has only zeros, so no cosine is defined, in {_named(zero)}")
    return vectors


def checked_count(n_select: Any, n_candidates: int, *, pool: str = "the pool") -> int:
    """Return `n_select` as an int between 1 and the number of rows that can be picked.

    Raises
    ------
    DataError
        If it is no integer, less than 1, or more than there are.
    """
    if isinstance(n_select, bool) or not isinstance(n_select, int | np.integer):
        raise DataError(f"n_select must be an integer, got {n_select!r}")
    if not 1 <= n_select <= n_candidates:
        raise DataError(
            f"n_select must be between 1 and {n_candidates}, the rows of {pool} that can be "
            f"picked, got {n_select}"
        )
    return int(n_select)


def checked_labeled(already_labeled: Sequence[int] | ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Return the rows that are labelled already, as given, or none.

    Raises
    ------
    DataError
        If one is no integer, out of range or given twice.
    """
    if already_labeled is None:
        return np.empty(0, dtype=np.int64)
    rows = np.asarray(already_labeled)
    if rows.size == 0:
        return np.empty(0, dtype=np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise DataError(
            "already_labeled must be a list of row numbers, got "
            f"dtype {rows.dtype} and shape {rows.shape}"
        )
    outside = rows[(rows < 0) | (rows >= n)]
    if outside.size:
        raise DataError(
            f"already_labeled must be row numbers from 0 to {n - 1}, got {int(outside[0])}"
        )
    values, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise DataError(f"already_labeled has row {int(values[counts > 1][0])} twice")
    return rows.astype(np.int64)


def _named(rows: NDArray[np.int64]) -> str:
    named = ", ".join(map(str, rows[:_NAMED]))
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {named}{more}"
