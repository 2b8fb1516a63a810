"""Exact nearest neighbours by cosine, by blocks: memory is rows times neighbours, not rows squared.

The search is faiss's fused product and selection, which costs about what the bare matrix product
costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bakeoff.errors import DataError

# Rows searched between two calls of `progress`, and so the longest wait for Ctrl-C.
_BLOCK = 8192


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For each of n rows its k most similar rows of a pool, the most similar first.

    Parameters
    ----------
    indices
        int64 array ``(n, k)`` of rows of the pool.
    similarities
        float32 array ``(n, k)`` of their cosines, descending in each row.
    """

    indices: NDArray[np.int64]
    similarities: NDArray[np.float32]


def nearest_neighbours(
    pool: NDArray[np.float32],
    k: int,
    *,
    queries: NDArray[np.float32] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Neighbours:
    """Return the k rows of `pool` with the largest inner product, for every query.

    Parameters
    ----------
    pool
        float32 array ``(N, d)``; give rows of length 1 to get cosines (see `unit_rows`).
    k
        Neighbours per row.
    queries
        float32 array ``(n, d)``. By default the pool itself; then a row is no neighbour of its own
        (told by position, so that copies of it are) and `k` must be less than N.
    progress
        Called with (rows done, rows in total).

    Returns
    -------
    Neighbours
        Equal similarities are ordered by row, the lowest first.

    Raises
    ------
    DataError
        If there are fewer than `k` rows to choose from, or `k` is less than 1.

    Examples
    --------
    >>> pool = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    >>> nearest_neighbours(pool, 1).indices.ravel()
    array([2, 2, 1])
    """
    itself = queries is None
    rows = pool if queries is None else queries
    if not 1 <= k <= len(pool) - itself:
        raise DataError(
            f"k must be between 1 and {len(pool) - itself} (the rows to choose from), got {k}"
        )
    import faiss

    pool = np.ascontiguousarray(pool, dtype=np.float32)
    indices = np.empty((len(rows), k), dtype=np.int64)
    similarities = np.empty((len(rows), k), dtype=np.float32)
    for start in range(0, len(rows), _BLOCK):
        block = np.ascontiguousarray(rows[start : start + _BLOCK], dtype=np.float32)
        values, found = faiss.knn(block, pool, k + itself, metric=faiss.METRIC_INNER_PRODUCT)
        order = np.lexsort((found, -values), axis=-1)
        if itself:
            own = np.arange(start, start + len(block))[:, None]
            # Its own place goes last; where copies pushed it out, the least similar one does.
            at_end = np.take_along_axis(found, order, axis=1) == own
            order = np.take_along_axis(order, np.argsort(at_end, axis=1, kind="stable"), axis=1)
        order = order[:, :k]
        indices[start : start + len(block)] = np.take_along_axis(found, order, axis=1)
        similarities[start : start + len(block)] = np.take_along_axis(values, order, axis=1)
        if progress is not None:
            progress(start + len(block), len(rows))
    return Neighbours(indices, similarities)


def unit_rows(
    vectors: NDArray[np.float32], *, offset: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return ``vectors - offset`` with every row scaled to length 1; a row of zeros stays zero.

    Parameters
    ----------
    vectors
        Array ``(n, d)``.
    offset
        Array ``(d,)``, e.g. the mean of the pool; by default nothing is subtracted.

    Examples
    --------
    >>> unit_rows(np.array([[3.0, 4.0]], dtype=np.float32)).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    moved = np.array(vectors, dtype=np.float32)
    if offset is not None:
        moved -= np.asarray(offset, dtype=np.float32)
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    np.divide(moved, lengths, out=moved, where=lengths > 0)
    return moved
