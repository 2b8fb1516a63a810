"""Rows of a pool that lie nearest to query vectors, streamed: the pool may exceed memory.

The pool is an array, a ``numpy.memmap`` or a `bakeoff.data.vector_store.VectorStore`; it is read
block by block, and of each block only the rows that can still matter are kept.

Three ways to share a selection of n rows among queries:

==============  ====================================================================================
``round_robin``  queries take turns; each turn pops the query's best remaining row (RDS+)
``global_max``   the n rows with the highest score to any query; one query may take everything
``mean``         the n rows with the highest mean score over queries
==============  ====================================================================================

With `groups` (one label per query, e.g. its task) a row's score to a group is the highest one to a
query of that group, and the groups take the places of the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bakeoff.errors import DataError
from bakeoff.selection.selector import Selector, checked_count, checked_labeled, checked_vectors

Strategy = Literal["round_robin", "global_max", "mean"]
Metric = Literal["cosine", "dot"]
STRATEGIES: tuple[Strategy, ...] = ("round_robin", "global_max", "mean")
METRICS: tuple[Metric, ...] = ("cosine", "dot")

# Scores of a block held at once: 8 MiB of float32, which stays in cache between the matrix product
# that writes them and the comparison that reads them.
_BLOCK_ENTRIES = 2**21
# Candidates are rescored in float64 so many rows at a time.
_RESCORED_ROWS = 4096
# Up to this many entries, lists are kept so long that a second pass is never needed.
_FREE_ENTRIES = 2**14


@dataclass(frozen=True, eq=False)
class QuerySelection:
    """Rows picked for queries, in pick order.

    Parameters
    ----------
    indices
        int64 array ``(n,)``, rows of the pool, all different.
    scores
        float32 array ``(n,)``: the score to the query (or group) whose turn it was; the highest
        score for ``global_max``; the mean score for ``mean``.
    query_of_each
        int64 array ``(n,)``: the query that picked the row; with groups and for the other
        strategies, the query among those concerned to which the row is nearest.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    query_of_each: NDArray[np.int64]


def round_robin(scores: ArrayLike, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return n columns of a score matrix, the rows (queries) taking turns.

    Each query holds the columns in order of falling score, equal scores by column. In its turn it
    pops the first of what remains of its own list; a column that is selected already is popped
    too, and the turn is spent. A query whose list is empty is skipped.

    Parameters
    ----------
    scores
        Array ``(Q, N)``. ``-inf`` keeps a column off that query's list.
    n
        How many columns.

    Returns
    -------
    indices
        int64 array ``(n,)``, all different, in the order in which they were picked.
    query_of_each
        int64 array ``(n,)``: which query picked it.

    Raises
    ------
    DataError
        If scores are NaN or no matrix, or fewer than `n` columns are on a list.

    References
    ----------
    Hamish Ivison, Muru Zhang, Faeze Brahman, Pang Wei Koh and Pradeep Dasigi. "Large-Scale Data
    Selection for Instruction Tuning". 2025. arXiv:2503.01807. Its Algorithm 1 as printed can pick
    a row twice; here, as in the authors' code, it cannot.

    Examples
    --------
    >>> indices, query_of_each = round_robin([[0.9, 0.8, 0.7, 0.1], [0.95, 0.2, 0.6, 0.5]], 3)
    >>> indices, query_of_each
    (array([0, 1, 2]), array([0, 0, 1]))
    """
    matrix = np.asarray(scores)
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.dtype.kind not in "fiub":
        raise DataError(
            "scores must be a numeric array (queries, rows of the pool) and not empty, got "
            f"dtype {matrix.dtype} and shape {matrix.shape}"
        )
    if np.isnan(matrix).any():
        row, column = np.argwhere(np.isnan(matrix))[0]
        raise DataError(f"scores has NaN at query {row}, row {column} of the pool")
    n = checked_count(n, matrix.shape[1])
    if matrix.dtype.kind in "ub":  # negating these would wrap around
        matrix = matrix.astype(np.float64)
    lists = np.argsort(-matrix, axis=1, kind="stable")
    lists[np.isneginf(np.take_along_axis(matrix, lists, axis=1))] = -1
    # n turns each are always enough: no list names a row twice.
    indices, query_of_each = _take_turns(lists[:, :n], n)
    if len(indices) < n:
        raise DataError(
            f"n must be at most {len(indices)}, the rows with a score above -inf, got {n}"
        )
    return indices, query_of_each


def select_by_queries(
    pool: Any,
    queries: Any,
    n: int,
    *,
    strategy: Strategy = "round_robin",
    metric: Metric = "cosine",
    groups: Sequence[Hashable] | None = None,
    already_labeled: Sequence[int] | ArrayLike | None = None,
    block_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuerySelection:
    """Return the n rows of a pool that a strategy picks for queries; the pool is read in blocks.

    Parameters
    ----------
    pool
        Array or memmap ``(N, d)``, or a `VectorStore`. Rows need not have length 1.
    queries
        The same with Q rows; held in memory.
    n
        How many rows.
    strategy
        See the table at the top of this module.
    metric
        ``"cosine"``, or ``"dot"`` for the inner product.
    groups
        One label per query. Groups take their turns in the order of their first query.
    already_labeled
        Rows of the pool that are not picked.
    block_rows
        Rows read at a time; by default so many that their scores take 8 MiB.
    progress
        Called with (rows read, rows in total), from 0 again if a second pass is needed.

    Returns
    -------
    QuerySelection
        The same whatever the block size: candidates are found in float32 and compared by their
        scores in float64 rounded to float32, so that copies of a row tie exactly and the one that
        comes first in the pool goes first.

    Raises
    ------
    DataError
        If an argument is out of range, queries are empty, `pool` and `queries` differ in width,
        or a row has NaN or infinite values or (for cosines) only zeros; names the row.

    Notes
    -----
    Memory is that of one block and of the candidates, about twelve bytes times queries times the
    length of their lists. Lists begin at four times ``n / Q`` rows. Where queries agree so much
    that this does not give n different rows, the pool is read again with longer ones.

    Examples
    --------
    >>> pool = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
    >>> select_by_queries(pool, [[1, 0], [0, 1]], 2).indices
    array([0, 2])
    """
    if strategy not in STRATEGIES:
        raise DataError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if metric not in METRICS:
        raise DataError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    source = _Pool(pool)
    scorer = _Scorer(_checked_queries(queries, source.width, metric), strategy, metric, groups)
    labeled = checked_labeled(already_labeled, source.length)
    open_rows = source.length - len(labeled)
    n = checked_count(n, open_rows)
    if block_rows is None:
        block_rows = max(256, _BLOCK_ENTRIES // scorer.n_queries)
    elif isinstance(block_rows, bool) or not isinstance(block_rows, int) or block_rows < 1:
        raise DataError(f"block_rows must be an integer of at least 1 or None, got {block_rows!r}")
    closed = np.zeros(source.length, dtype=np.bool_)
    closed[labeled] = True

    share = -(-n // scorer.n_lists)
    length = n
    if scorer.n_lists > 1:
        length = min(n, max(4 * share, _FREE_ENTRIES // scorer.n_lists))
    while True:
        candidates = _candidates(source, scorer, length, closed, block_rows, progress)
        # Only what the turns reach is rescored, mostly a little more than each list's share.
        depth = min(length, share + share // 4 + 4)
        picked, list_of_each = _take_turns(candidates.best(depth), n)
        while len(picked) < n and depth < length:
            depth = min(length, 2 * depth)
            picked, list_of_each = _take_turns(candidates.best(depth), n)
        if len(picked) == n:
            break
        # The lists overlap. n rows each are always enough, as no list names a row twice.
        length = min(n, max(4 * length, int(1.25 * length * n / len(picked)) + 1))
    scores = np.empty(n, dtype=np.float32)
    query_of_each = np.empty(n, dtype=np.int64)
    for start in range(0, n, _RESCORED_ROWS):
        part = slice(start, start + _RESCORED_ROWS)
        scores[part], query_of_each[part] = scorer.explain(
            source.take(picked[part]), list_of_each[part]
        )
    return QuerySelection(picked, scores, query_of_each)


class NearestToQueries(Selector):
    """Picks the rows of a pool that are nearest to query vectors.

    The queries are a few examples of what is wanted; the vectors can come from any encoder.
    `bakeoff.selection.rds_plus.RepresentationSelector` is this with a language model's states.

    Parameters
    ----------
    n_select
        How many rows to pick.
    strategy
        ``"round_robin"`` (queries, or groups of queries, take turns), ``"global_max"`` (the highest
        score to any query) or ``"mean"`` (the highest mean score).
    metric
        ``"cosine"`` or ``"dot"``.
    block_rows
        Rows of the pool read at a time; by default so many that their scores take 8 MiB. Changes
        no result.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows of the pool in pick order.
    scores_ : float32 array of shape (n_select,)
        Each pick's score, as in `QuerySelection`.
    query_of_each_ : int64 array of shape (n_select,)
        The query that each pick is nearest to, or that picked it in its turn.

    References
    ----------
    Hamish Ivison, Muru Zhang, Faeze Brahman, Pang Wei Koh and Pradeep Dasigi. "Large-Scale Data
    Selection for Instruction Tuning". 2025. arXiv:2503.01807.

    Examples
    --------
    >>> pool = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
    >>> selector = NearestToQueries(2).fit(pool, queries=[[2, 0], [0, 1]])
    >>> selector.selected_indices_
    array([0, 2])
    >>> selector.reasons()
    ['nearest query 0, cosine 1.00', 'nearest query 1, cosine 1.00']
    """

    scores_: NDArray[np.float32]
    query_of_each_: NDArray[np.int64]

    def __init__(
        self,
        n_select: int = 100,
        strategy: Strategy = "round_robin",
        metric: Metric = "cosine",
        block_rows: int | None = None,
    ) -> None:
        self.n_select = n_select
        self.strategy = strategy
        self.metric = metric
        self.block_rows = block_rows

    def fit(  # type: ignore[override]  # the pool comes with queries
        self,
        X: Any,
        y: None = None,
        *,
        queries: Any = None,
        groups: Sequence[Hashable] | None = None,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Pick rows of `X`.

        Parameters
        ----------
        X
            Array or memmap ``(N, d)``, or a `VectorStore`.
        y
            Not used.
        queries
            Array ``(Q, d)``, from the same encoder. Required.
        groups
            One label per query, e.g. its task: groups take turns instead of queries.
        already_labeled
            Rows of the pool that are not picked.
        progress
            Called with (rows read, rows in total).

        Raises
        ------
        DataError
            As `select_by_queries`.
        """
        if queries is None:
            raise DataError("queries must be given: vectors (Q, d) from the pool's encoder")
        found = select_by_queries(
            X,
            queries,
            self.n_select,
            strategy=self.strategy,
            metric=self.metric,
            groups=groups,
            already_labeled=already_labeled,
            block_rows=self.block_rows,
            progress=progress,
        )
        self.selected_indices_ = found.indices
        self.scores_ = found.scores
        self.query_of_each_ = found.query_of_each
        return self

    def reasons(self) -> list[str]:
        """Return e.g. ``"nearest query 3, cosine 0.71"`` for each pick."""
        return reasons_of(self.scores_, self.query_of_each_, self.strategy, self.metric)


def reasons_of(
    scores: NDArray[np.float32], query_of_each: NDArray[np.int64], strategy: str, metric: str
) -> list[str]:
    """Return one short sentence for each pick of a `QuerySelection`."""
    name = "product" if metric == "dot" else metric
    if strategy == "mean":
        name = f"mean {name}"
    return [
        f"nearest query {query}, {name} {score:.2f}"
        for query, score in zip(query_of_each.tolist(), scores.tolist(), strict=True)
    ]


# The pool and the scores --------------------------------------------------------------------------


class _Pool:
    """Reads an array, a memmap or a vector store by rows, without loading it."""

    def __init__(self, pool: Any) -> None:
        self.store = pool if callable(getattr(pool, "blocks", None)) else None
        if self.store is not None:
            self.length, self.width = len(pool), int(pool.dimension)
        else:
            array = pool if isinstance(pool, np.ndarray) else np.asarray(pool)
            if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiub":
                raise DataError(
                    "X must be a numeric array (rows, columns) and not empty, got "
                    f"dtype {array.dtype} and shape {array.shape}"
                )
            self.array = array
            self.length, self.width = array.shape
        if self.length == 0:
            raise DataError("X must have at least one row, got an empty vector store")

    def blocks(self, rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        if self.store is not None:
            yield from self.store.blocks(rows)
            return
        for start in range(0, self.length, rows):
            yield start, np.ascontiguousarray(self.array[start : start + rows], dtype=np.float32)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if self.store is not None:
            taken: NDArray[np.float32] = self.store.take(rows)
            return taken
        return np.asarray(self.array[rows], dtype=np.float32)


def _checked_queries(queries: Any, width: int, metric: Metric) -> NDArray[np.float32]:
    if not hasattr(queries, "__len__") or len(queries) == 0:
        raise DataError("queries must have at least one row, got none")
    vectors = checked_vectors(queries, name="queries", cosine=metric == "cosine")
    if vectors.shape[1] != width:
        raise DataError(
            f"queries has {vectors.shape[1]} columns and the pool {width}: both must come from the "
            "same encoder"
        )
    return vectors


class _Scorer:
    """Scores rows of the pool against lists: one list per query or group, or one list in all.

    `coarse` is a float32 matrix product; `exact` is float64 rounded to float32. `error` bounds the
    difference between the two.
    """

    def __init__(
        self,
        queries: NDArray[np.float32],
        strategy: Strategy,
        metric: Metric,
        groups: Sequence[Hashable] | None,
    ) -> None:
        import torch

        self.torch = torch
        self.cosine = metric == "cosine"
        self.strategy = strategy
        exact = queries.astype(np.float64)
        self.queries = exact
        self.lengths = np.ones(len(exact))
        if self.cosine:
            self.lengths = np.linalg.norm(exact, axis=1)
            exact = exact / self.lengths[:, None]
        members = _members(groups, len(queries))
        if strategy == "global_max":
            members = [np.arange(len(queries))]
        self.members = members
        self.single = all(len(rows) == 1 for rows in members)
        self.n_lists = 1 if strategy == "mean" else len(members)
        if strategy == "mean" and self.single:
            # The mean of products is the product with the mean: one query instead of many.
            exact = exact.mean(axis=0, keepdims=True)
            order = np.zeros(1, dtype=np.int64)
        else:
            order = np.concatenate(members)
        self.starts = np.cumsum([0, *map(len, members[:-1])])
        self.left = torch.from_numpy(np.ascontiguousarray(exact[order], dtype=np.float32))
        self.n_queries = len(self.left)
        # The dot product's error bound, and one float32 rounding of its result.
        relative = (queries.shape[1] + 8) * 2.0**-24 + 2.0**-23
        self.relative_error: float = relative * float(np.linalg.norm(exact, axis=1).max())
        self.buffer = torch.empty(0)
        self.longest_row = 0.0

    @property
    def error(self) -> float:
        """How far `coarse` may be from `exact`, for the rows seen so far."""
        # Rows within 1e-6 of length 1 are not scaled.
        if self.cosine:
            return self.relative_error + 2e-6
        return self.relative_error * self.longest_row

    def coarse(self, block: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """Return scores ``(n_lists, b)``, valid until the next call."""
        norms = _checked_norms(block, start, zeros=not self.cosine)
        if self.cosine:
            if np.abs(norms - 1).max() > 1e-6:
                block = (block / norms[:, None]).astype(np.float32, copy=False)
        else:
            self.longest_row = max(self.longest_row, float(norms.max()))
        right = self._tensor(block)
        if self.buffer.shape != (len(self.left), len(block)):
            self.buffer = self.torch.empty((len(self.left), len(block)), dtype=self.torch.float32)
        products = self.torch.mm(self.left, right.T, out=self.buffer).numpy()
        if not self.single:
            products = np.maximum.reduceat(products, self.starts, axis=0)
            if self.strategy == "mean":
                products = products.mean(axis=0, keepdims=True)
        scores: NDArray[np.float32] = products
        return scores

    def exact(
        self, rows: NDArray[np.float32], lists: NDArray[np.int64], places: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the score of each pair: list ``lists[i]`` and row ``rows[places[i]]``."""
        wide = rows.astype(np.float64)
        lengths = self._lengths(wide)
        if self.strategy == "mean":
            if self.single:
                best = self._products(np.arange(len(self.queries)), wide, lengths)
            else:
                parts = [self._products(group, wide, lengths) for group in self.members]
                best = np.array([part.max(axis=0) for part in parts])
            means: NDArray[np.float64] = best.mean(axis=0)
            return means[places].astype(np.float32)
        result = np.empty(len(lists))
        if self.single:
            for begin in range(0, len(lists), _RESCORED_ROWS):
                part = slice(begin, begin + _RESCORED_ROWS)
                queries, here = np.concatenate(self.members)[lists[part]], places[part]
                # Divided at the end: products of float32 are exact in float64, so that what is
                # orthogonal scores zero and not the noise of two quotients.
                result[part] = np.einsum("pd,pd->p", self.queries[queries], wide[here])
                result[part] /= self.lengths[queries] * lengths[here]
        else:
            for number in np.unique(lists):
                here = np.flatnonzero(lists == number)
                products = self._products(
                    self.members[number], wide[places[here]], lengths[places[here]]
                )
                result[here] = products.max(axis=0)
        return result.astype(np.float32)

    def explain(
        self, rows: NDArray[np.float32], lists: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the exact score of each row to its list, and the query it is nearest to."""
        scores = self.exact(rows, lists, np.arange(len(rows)))
        if self.strategy != "mean" and self.single:
            return scores, np.concatenate(self.members)[lists]
        wide = rows.astype(np.float64)
        lengths = self._lengths(wide)
        if self.strategy == "mean":
            products = self._products(np.arange(len(self.queries)), wide, lengths)
            return scores, products.astype(np.float32).argmax(axis=0)
        nearest = np.empty(len(rows), dtype=np.int64)
        for number in np.unique(lists):
            here = np.flatnonzero(lists == number)
            members = self.members[number]
            products = self._products(members, wide[here], lengths[here])
            nearest[here] = members[products.astype(np.float32).argmax(axis=0)]
        return scores, nearest

    def _products(
        self, members: NDArray[np.int64], wide: NDArray[np.float64], lengths: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        products: NDArray[np.float64] = self.queries[members] @ wide.T
        products /= self.lengths[members, None]
        products /= lengths
        return products

    def _lengths(self, wide: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.linalg.norm(wide, axis=1) if self.cosine else np.ones(len(wide))

    def _tensor(self, block: NDArray[np.float32]) -> Any:
        if not block.flags.writeable:  # torch warns of read-only memory; nothing is written to it
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                return self.torch.from_numpy(block)
        return self.torch.from_numpy(block)


def _members(groups: Sequence[Hashable] | None, n_queries: int) -> list[NDArray[np.int64]]:
    """Return the queries of each group, groups in the order of their first query."""
    if groups is None:
        return list(np.arange(n_queries)[:, None])
    if isinstance(groups, str) or len(groups) != n_queries:
        given = repr(groups) if isinstance(groups, str) else f"{len(groups)} labels"
        raise DataError(f"groups must be a list of {n_queries} labels, one per query, got {given}")
    found: dict[Hashable, list[int]] = {}
    for query, label in enumerate(groups):
        found.setdefault(label, []).append(query)
    return [np.array(queries, dtype=np.int64) for queries in found.values()]


def _checked_norms(
    block: NDArray[np.float32], start: int, *, zeros: bool
) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return the length of each row; refuse rows that are not finite, or (unless `zeros`) zero."""
    norms: NDArray[Any] = np.sqrt(np.einsum("bd,bd->b", block, block))
    if np.isfinite(norms).all() and (norms > 1e-15).all():
        return norms
    # Squares may have overflowed or underflowed: once more with room.
    norms = np.linalg.norm(block.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms))
    if bad.size:
        raise DataError(f"X has NaN or inf in row {start + int(bad[0])}{_and_more(bad)}")
    bad = np.flatnonzero(norms == 0)
    if bad.size and not zeros:
        raise DataError(
            f"X has only zeros, so no cosine is defined, in row {start + int(bad[0])}"
            f"{_and_more(bad)}"
        )
    return norms


def _and_more(bad: NDArray[Any]) -> str:
    return f" and {len(bad) - 1} more of its block" if len(bad) > 1 else ""


# Streaming top lists ------------------------------------------------------------------------------


class _Candidates:
    """For each list, rows that may be among its `length` best, in the order of the pool.

    A row is dropped only if its coarse score is so far below that of `length` others that no
    rounding error explains it, or if exact scores say so.
    """

    def __init__(self, source: _Pool, scorer: _Scorer, length: int, block_rows: int) -> None:
        self.source, self.scorer, self.length = source, scorer, length
        self.full = length + max(length // 2, 64)
        capacity = self.full + min(block_rows, source.length)
        n_lists = scorer.n_lists
        self.values = np.full((n_lists, capacity), -np.inf, dtype=np.float32)
        self.rows = np.empty((n_lists, capacity), dtype=np.int64)
        self.counts = np.zeros(n_lists, dtype=np.int64)
        # The coarse score of the last of the `length` best so far.
        self.last = np.full(n_lists, -np.inf, dtype=np.float32)
        self.mask = np.empty(0, dtype=np.bool_)

    def add(self, start: int, scores: NDArray[np.float32], closed: NDArray[np.bool_]) -> None:
        """Take in the block that begins at row `start`; `closed` marks rows of it to leave out."""
        width = scores.shape[1]
        if closed.any():
            scores[:, closed] = -np.inf
        if width > self.length and np.isneginf(self.last).all():
            # The first block alone says where the lists end, so that not all of it is taken in.
            self.last = np.partition(scores, width - self.length, axis=1)[:, width - self.length]
        limits = self.last - np.float32(2.02 * self.scorer.error)
        if self.mask.shape != scores.shape:
            self.mask = np.empty(scores.shape, dtype=np.bool_)
        found = np.flatnonzero(np.greater_equal(scores, limits[:, None], out=self.mask))
        lists, columns = np.divmod(found, width)
        if closed.any():
            kept = ~closed[columns]
            lists, columns = lists[kept], columns[kept]
        if not len(lists):
            return
        added = np.bincount(lists, minlength=len(self.counts))
        first = np.cumsum(added) - added
        places = self.counts[lists] + np.arange(len(lists)) - first[lists]
        self.values[lists, places] = scores[lists, columns]
        self.rows[lists, places] = start + columns
        self.counts += added
        crowded = self.counts > self.full
        crowded |= np.isneginf(self.last) & (self.counts >= self.length)
        if crowded.any():
            self._thin(np.flatnonzero(crowded))

    def _thin(self, lists: NDArray[np.int64]) -> None:
        """Drop what is surely not among the best of these lists."""
        width = int(self.counts[lists].max())
        values = self.values[lists, :width]
        place = width - self.length
        last = np.partition(values, place, axis=1)[:, place]
        limits = last - np.float32(2.02 * self.scorer.error)
        kept = values >= limits[:, None]
        kept &= np.arange(width) < self.counts[lists, None]
        for number in np.flatnonzero(kept.sum(axis=1) > self.full):
            # More rows within rounding error than there is room for, e.g. copies of one text.
            kept[number] = self._exactly_best(lists[number], kept[number])
        order = np.argsort(~kept, axis=1, kind="stable")
        counts = kept.sum(axis=1)
        values = np.take_along_axis(values, order, axis=1)
        values[np.arange(width) >= counts[:, None]] = -np.inf
        self.values[lists, :width] = values
        rows = np.take_along_axis(self.rows[lists, :width], order, axis=1)
        self.rows[lists, :width] = rows
        self.counts[lists] = counts
        self.last[lists] = last

    def _exactly_best(self, number: np.int64, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        places = np.flatnonzero(kept)
        exact = np.empty(len(places), dtype=np.float32)
        for begin in range(0, len(places), _RESCORED_ROWS):
            part = slice(begin, begin + _RESCORED_ROWS)
            rows = self.source.take(self.rows[number, places[part]])
            exact[part] = self.scorer.exact(rows, np.full(len(rows), number), np.arange(len(rows)))
        best = np.argsort(-exact, kind="stable")[: self.length]
        result = np.zeros_like(kept)
        result[places[best]] = True
        return result

    def best(self, depth: int) -> NDArray[np.int64]:
        """Return the `depth` best rows of each list, ordered by exact score and then by row.

        Shape ``(n_lists, depth)``; -1 where a list is shorter. `depth` is at most `length`.
        """
        used = np.arange(self.rows.shape[1]) < self.counts[:, None]
        place = self.values.shape[1] - depth
        last = np.partition(self.values, place, axis=1)[:, place]
        used &= self.values >= (last - np.float32(2.02 * self.scorer.error))[:, None]
        counts = used.sum(axis=1)
        lists, rows = np.repeat(np.arange(len(counts)), counts), self.rows[used]
        exact = np.empty(len(rows), dtype=np.float32)
        # By rows of the pool, so that each is read once.
        order = np.argsort(rows, kind="stable")
        distinct, inverse = np.unique(rows[order], return_inverse=True)
        for begin in range(0, len(distinct), _RESCORED_ROWS):
            wanted = distinct[begin : begin + _RESCORED_ROWS]
            low, high = np.searchsorted(inverse, [begin, begin + len(wanted)])
            pairs = order[low:high]
            exact[pairs] = self.scorer.exact(
                self.source.take(wanted), lists[pairs], inverse[low:high] - begin
            )
        order = np.lexsort((rows, -exact, lists))
        best = np.full((len(counts), depth), -1, dtype=np.int64)
        first = np.cumsum(counts) - counts
        place = np.arange(len(rows)) - first[lists]  # `lists` is sorted, so `order` keeps it
        inside = place < depth
        best[lists[inside], place[inside]] = rows[order][inside]
        return best


def _candidates(
    source: _Pool,
    scorer: _Scorer,
    length: int,
    closed: NDArray[np.bool_],
    block_rows: int,
    progress: Callable[[int, int], None] | None,
) -> _Candidates:
    candidates = _Candidates(source, scorer, length, block_rows)
    for start, block in source.blocks(block_rows):
        stop = start + len(block)
        candidates.add(start, scorer.coarse(block, start), closed[start:stop])
        if progress is not None:
            progress(stop, source.length)
    return candidates


def _take_turns(lists: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return at most n rows and the list that each came from.

    Round r pops place r of every list. So the order of all pops is known beforehand, and a row is
    picked where it is popped first.
    """
    popped = lists.T.ravel()
    rows, first = np.unique(popped, return_index=True)
    first = np.sort(first[rows >= 0])[:n]
    return popped[first], first % len(lists)
