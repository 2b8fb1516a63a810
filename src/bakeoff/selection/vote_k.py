"""Vote-k: choose what to label from a nearest-neighbour graph, before any label exists."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from bakeoff.data.neighbours import nearest_neighbours, unit_rows
from bakeoff.errors import DataError
from bakeoff.selection.selector import Selector, checked_count, checked_labeled, checked_vectors

METHOD = {
    "slug": "vote-k",
    "title": "Graph-based selective annotation for in-context learning",
    "paper": "Su et al., Selective Annotation Makes Language Models Better Few-Shot Learners, "
    "ICLR 2023, arXiv 2209.01975",
    "designs": ["vote-k", "vote-k-confidence"],
    "names": ["VoteK", "SimilarityPromptRetriever"],
}

Progress = Callable[[int, int], None]
Confidence = ArrayLike | Callable[[NDArray[np.int64]], ArrayLike]

# What `strata_` says of a pick that no stratum made.
_BY_VOTES = -1
_AT_RANDOM = -2

# Scores this close, relatively and absolutely, are compared in exact arithmetic. The first is far
# above the rounding error of a sum of positive terms, the second above the subnormal numbers.
_CLOSE = 1e-12
_TINY = 1e-290

# Of the type of the counts: numpy's unbuffered addition is thirty times slower where it must cast.
_ONE = np.int32(1)


class VoteK(Selector):
    """Pick rows that many others are similar to, and that are not similar to each other.

    Every row votes for its `k` nearest neighbours. The row with the highest score is picked, again
    and again; a voter that already has c picks among its neighbours counts ``rho ** -c``, and a
    picked row votes no more. No label and no language model is needed ("fast vote-k"). With
    `confidence`, given to `fit`, only a first batch is picked so; the other picks are spread over
    strata of the language model's confidence, least confident first.

    Parameters
    ----------
    n_select
        How many new rows to pick.
    k
        Votes of each row, less than the number of rows N. The paper's 150 is 5 % of its pools of
        3,000; a float between 0 and 1 is taken as that share of N. Not used with a graph.
    rho
        Discount of a voter per pick among its neighbours. 1, which warns, means no discount.
    metric
        ``"cosine"``, or ``"dot"`` for inner products.
    center
        Whether the mean of the pool is subtracted first, as the paper's code does.
    n_first
        Only with `confidence`: size of the first batch, by default a tenth of `n_select`.
    drop_most_confident
        Only with `confidence`: share of the pool, the most confident, that is never picked from.
    random_state
        Seed, or ``numpy.random.Generator``. Only with `confidence`, for the few rows missing where
        a stratum had nothing left to pick; all else is deterministic.
    compat
        ``"official"`` breaks ties in the order of the authors' code (most votes first, then the
        row that was voted for first), and leaves the discounts as they are while picking from
        strata, as that code does by mistake. None: equal scores go to the lowest row.

    Attributes
    ----------
    selected_indices_ : int64 array (n_select,)
        Rows in the order in which they were picked; none of `already_labeled`.
    scores_ : float64 array (n_select,)
        The score of each pick at the moment when it was picked.
    strata_ : int64 array (n_select,)
        The stratum of confidence each pick is from, 0 the least confident; -1 for picks by votes
        alone, -2 for picks at random.
    votes_ : int64 array (N,)
        Votes that each row gets, undiscounted: its in-degree.
    discounts_ : int64 array (N,)
        How many neighbours of each row are labelled or picked in the end.
    mean_ : float32 array (d,)
        What was subtracted, zeros without `center`; None if a graph was given. Give it to
        `SimilarityPromptRetriever` as ``center``.

    Notes
    -----
    Ties are exact. Votes are counted per candidate and discount level in integers, and scores that
    floating point cannot tell apart are compared in rational arithmetic, so that the picks do not
    depend on the order of additions.

    Departures from the released code: a row is told from its copies by position, so that copies
    vote for each other and every row has k votes; rows without votes stay selectable, last; the
    discounts are updated while picking from strata, as the paper says.

    After the search for neighbours, whose cost grows with N squared, a pick costs k times the votes
    of the picked row.

    References
    ----------
    Hongjin Su, Jungo Kasai, Chen Henry Wu, Weijia Shi, Tianlu Wang, Jiayi Xin, Rui Zhang, Mari
    Ostendorf, Luke Zettlemoyer, Noah A. Smith and Tao Yu. "Selective Annotation Makes Language
    Models Better Few-Shot Learners". ICLR 2023. arXiv:2209.01975.

    Examples
    --------
    >>> angles = np.radians([0, 1, 3, 90, 91, 92, 180, 182, 183, 185])
    >>> pool = np.column_stack([np.cos(angles), np.sin(angles)])
    >>> selector = VoteK(n_select=3, k=2, center=False).fit(pool)
    >>> selector.selected_indices_
    array([7, 0, 3])
    >>> selector.reasons()[0]
    '3 votes, score 3'
    """

    def __init__(
        self,
        n_select: int = 100,
        k: int | float = 150,
        rho: float = 10.0,
        metric: str = "cosine",
        center: bool = True,
        *,
        n_first: int | None = None,
        drop_most_confident: float = 0.1,
        random_state: int | np.random.Generator | None = None,
        compat: str | None = None,
    ) -> None:
        self.n_select = n_select
        self.k = k
        self.rho = rho
        self.metric = metric
        self.center = center
        self.n_first = n_first
        self.drop_most_confident = drop_most_confident
        self.random_state = random_state
        self.compat = compat

    def fit(  # type: ignore[override]  # the base names no data; this class names its own
        self,
        X: Any,
        y: None = None,
        *,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        confidence: Confidence | None = None,
        graph: Any = None,
        progress: Progress | None = None,
    ) -> Self:
        """Pick rows of the pool.

        Parameters
        ----------
        X
            Vectors ``(N, d)``; or the neighbour graph as a square scipy sparse matrix ``(N, N)``,
            whose row v has an entry, of any value, in every column that v votes for.
        y
            Ignored.
        already_labeled
            Rows that have labels: they are not picked, do not vote, and discount their voters.
        confidence
            How sure the language model is of every row, larger is surer, ``(N,)``; what it says of
            labelled rows is not used. Or a function that returns this, called once with the rows
            labelled so far, int64: the time to label them and put them into prompts. If rows are
            labelled already, they are the first batch, and all picks are from strata.
        graph
            The neighbour graph, if `X` is the vectors or None.
        progress
            Called with (done, total), where rows searched and rows picked are counted together.

        Raises
        ------
        bakeoff.errors.DataError
            (a ValueError) If an argument or the pool cannot be used: `k` not below N, `rho` below
            1, `n_select` above the rows there are, rows that are NaN or (after centring) zero, a
            graph that is not square or has self-loops, a confidence of the wrong length.

        Warns
        -----
        UserWarning
            If rows vote for more than a fifth of the pool, or `rho` is 1.
        """
        _check_options(self.rho, self.metric, self.compat)
        if self.rho == 1:
            warnings.warn(
                "rho=1 does not discount votes: the picks will be close together", stacklevel=2
            )
        given = X if graph is None else graph
        edges: Any = None
        mean: NDArray[np.float32] | None
        if graph is not None or sp.issparse(X):
            edges = _checked_graph(given, "X" if graph is None else "graph")
            n, mean = int(edges.shape[0]), None
            if graph is not None and X is not None and _length(X) != n:
                raise DataError(f"graph must have a row per row of X, {_length(X)}, got {n}")
            degree = int(np.diff(edges.indptr).max())
        else:
            vectors = checked_vectors(X, cosine=self.metric == "cosine" and not self.center)
            n, degree = len(vectors), _checked_k(self.k, len(vectors))
            offset = np.zeros(vectors.shape[1], dtype=np.float32)
            if self.center:
                offset = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
            mean = offset
        if degree > n / 5:
            warnings.warn(
                f"k={degree} is more than a fifth of the pool of {n} rows: nearly every row gets "
                "nearly the same votes. Rows should vote for about 5 % of the pool",
                stacklevel=2,
            )
        labeled = checked_labeled(already_labeled, n)
        n_select = checked_count(self.n_select, n - len(labeled))
        n_first = 0
        if confidence is not None:
            n_first = 0 if len(labeled) else _checked_first(self.n_first, n_select)
            _stratum_size(n, n_select - n_first, self.drop_most_confident)
            if not callable(confidence):
                confidence = _checked_confidence(confidence, n, labeled)
        steps = n_select if edges is not None else n + n_select
        if edges is None:
            edges = _nearest_graph(vectors, offset, degree, self.metric, progress, steps)
            del vectors

        order = _first_voted(edges) if self.compat == "official" else None
        votes = _Votes(edges, self.rho, order)
        for row in labeled.tolist():
            votes.take(row)
        picks: list[tuple[int, float, int]] = []

        def pick(row: int, stratum: int, *, discount: bool = True) -> None:
            picks.append((row, votes.score(row), stratum))
            votes.take(row, discount=discount)
            if progress is not None:
                progress(steps - n_select + len(picks), steps)

        for _ in range(n_select if confidence is None else n_first):
            pick(votes.best(), _BY_VOTES)
        if confidence is not None and len(picks) < n_select:
            known = np.array([*labeled.tolist(), *(row for row, *_ in picks)], dtype=np.int64)
            if callable(confidence):
                confidence = _checked_confidence(confidence(known.copy()), n, known)
            # Labelled rows go last: the strata are shares of the whole pool.
            by_confidence = np.lexsort((confidence, ~votes.open))
            remaining = n_select - len(picks)
            size = _stratum_size(n, remaining, self.drop_most_confident)
            official = self.compat == "official"
            for stratum in range(remaining):
                rows = by_confidence[stratum * size : (stratum + 1) * size]
                rows = rows[votes.open[rows]]
                if len(rows):
                    # The official code visits a stratum from its least confident row.
                    ranks = np.arange(len(rows)) if official else rows
                    pick(votes.best(rows, ranks), stratum, discount=not official)
            missing = n_select - len(picks)
            if missing:
                rng = np.random.default_rng(self.random_state)
                for row in rng.choice(np.flatnonzero(votes.open), missing, replace=False).tolist():
                    pick(row, _AT_RANDOM)

        self.selected_indices_ = np.array([row for row, _, _ in picks], dtype=np.int64)
        self.scores_ = np.array([score for _, score, _ in picks], dtype=np.float64)
        self.strata_ = np.array([stratum for _, _, stratum in picks], dtype=np.int64)
        self.votes_ = votes.received
        self.discounts_ = votes.discounts
        self.mean_ = mean
        return self

    def select_with_confidence(
        self,
        X: Any,
        n: int,
        confidence: Confidence,
        initial: Sequence[int] | ArrayLike | None = None,
        drop_most_confident: float = 0.1,
        *,
        graph: Any = None,
        progress: Progress | None = None,
    ) -> NDArray[np.int64]:
        """Return the rows of full vote-k: a first batch, then one row per stratum of confidence.

        Nothing is kept; for scores and reasons use `fit` with ``confidence=``.

        Parameters
        ----------
        X, graph, progress
            As in `fit`.
        n
            How many rows in all, those of the first batch included.
        confidence
            As in `fit`: an array, or a function of the first batch.
        initial
            The first batch, labelled already. By default the first tenth of `n` (or `n_first`)
            that `fit` would pick without confidences.
        drop_most_confident
            Share of the pool, the most confident, that is never picked from.

        Returns
        -------
        int64 array (n,)
            The first batch, then the other picks from the least to the most confident stratum.
        """
        first = np.asarray([] if initial is None else initial)
        if initial is not None and not 1 <= len(first) < n:
            raise DataError(
                f"initial must have at least 1 row and fewer than n = {n}, got {len(first)}"
            )
        selector = clone(self).set_params(
            n_select=n - len(first), drop_most_confident=drop_most_confident
        )
        selector.fit(
            X, already_labeled=first, confidence=confidence, graph=graph, progress=progress
        )
        return np.concatenate([first.astype(np.int64), selector.selected_indices_])

    def reasons(self) -> list[str]:
        """Return one short reason per pick, in pick order, e.g. ``"34 votes, score 12.1"``."""
        strata = int((self.strata_ >= 0).sum())
        sentences = []
        for row, score, stratum in zip(
            self.selected_indices_, self.scores_, self.strata_, strict=True
        ):
            count = int(self.votes_[row])
            sentence = f"{count} vote{'' if count == 1 else 's'}, score {score:.3g}"
            if stratum == _AT_RANDOM:
                sentence = "picked at random to complete the number"
            elif stratum >= 0:
                sentence += f", confidence stratum {stratum + 1} of {strata}"
            sentences.append(sentence)
        return sentences


class _Votes:
    """The vote count of every candidate, kept up to date pick by pick.

    ``counts[u, j]`` is how many rows vote for u, are not labelled, and have j labelled neighbours.
    """

    def __init__(self, graph: Any, rho: float, tie_order: NDArray[np.int64] | None) -> None:
        n = graph.shape[0]
        self._start, self._neighbours = graph.indptr, graph.indices
        marks = np.ones(graph.nnz, dtype=np.bool_)
        by_candidate = sp.csr_array((marks, graph.indices, graph.indptr), shape=(n, n)).tocsc()
        self._voters_start, self._voters = by_candidate.indptr, by_candidate.indices
        self._tie_order = np.arange(n) if tie_order is None else tie_order
        self._rho = Fraction(float(rho))
        self.received = np.diff(self._voters_start).astype(np.int64)
        self.discounts = np.zeros(n, dtype=np.int64)
        self.open = np.ones(n, dtype=np.bool_)  # not labelled: votes, and can be picked
        self._counts = np.zeros((n, 2), dtype=np.int32)
        self._counts[:, 0] = self.received
        self._weights = np.array([1.0, 1 / rho])
        self._scores = self.received.astype(np.float64)  # -1 where not open

    def take(self, row: int, *, discount: bool = True) -> None:
        """Label a row: it votes no more, and its voters are discounted."""
        targets = [self._neighbours[self._start[row] : self._start[row + 1]]]
        self._counts[targets[0], self.discounts[row]] -= 1
        self.open[row] = False
        self._scores[row] = -1
        if discount:
            voters = self._voters[self._voters_start[row] : self._voters_start[row + 1]]
            voting = voters[self.open[voters]]
            places, lengths = _ragged(self._start, voting)
            targets.append(self._neighbours[places])
            levels = self.discounts[voting]
            if len(levels):
                self._grow(int(levels.max()) + 2)
            width = self._counts.shape[1]
            cells = targets[1] * np.int64(width) + np.repeat(levels, lengths)
            flat = self._counts.reshape(-1)
            np.subtract.at(flat, cells, _ONE)
            cells += 1
            np.add.at(flat, cells, _ONE)
            self.discounts[voters] += 1
        touched = np.zeros(len(self.open), dtype=np.bool_)
        for part in targets:
            touched[part] = True
        rows = np.flatnonzero(touched & self.open)
        self._scores[rows] = self._counts[rows] @ self._weights

    def best(
        self, rows: NDArray[np.int64] | None = None, ranks: NDArray[np.int64] | None = None
    ) -> int:
        """Return the row of highest score, of all or of `rows`; of equals the one ranked lowest."""
        scores = self._scores if rows is None else self._scores[rows]
        top = scores.max()
        places = np.flatnonzero(scores >= top - (_CLOSE * top + _TINY))
        near = places if rows is None else rows[places]
        if len(near) > 1:
            counts = self._counts[near]
            if (counts != counts[0]).any():
                different, which = np.unique(counts, axis=0, return_inverse=True)
                values = [self._numerator(levels.tolist()) for levels in different]
                highest = max(values)
                equal = np.array([value == highest for value in values])[which.reshape(-1)]
                near, places = near[equal], places[equal]
        order = self._tie_order[near] if ranks is None else ranks[places]
        return int(near[order.argmin()])

    def score(self, row: int) -> float:
        """Return a row's score, rounded once."""
        levels = self._counts[row].tolist()
        # Not power by power: Python rounds the quotient of two integers correctly.
        scale: int = self._rho.numerator ** (len(levels) - 1)
        return self._numerator(levels) / scale

    def _numerator(self, levels: list[int]) -> int:
        """Return the sum of ``levels[j] * rho ** -j``, times the power of rho's numerator."""
        total, power = 0, 1
        for count in levels:
            total = total * self._rho.numerator + count * power
            power *= self._rho.denominator
        return total

    def _grow(self, width: int) -> None:
        have = self._counts.shape[1]
        if width > have:
            width = max(width, have * 3 // 2)
            wider = np.zeros((len(self._counts), width), dtype=np.int32)
            wider[:, :have] = self._counts
            self._counts = wider
            self._weights = float(self._rho) ** -np.arange(width, dtype=np.float64)


def _ragged(start: NDArray[Any], rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of all entries of `rows` in a CSR matrix, and how many each row has."""
    begin = start[rows].astype(np.int64)
    lengths = start[rows + 1] - begin
    before = np.cumsum(lengths) - lengths
    return np.repeat(begin - before, lengths) + np.arange(lengths.sum()), lengths


def _nearest_graph(
    vectors: NDArray[np.float32],
    mean: NDArray[np.float32],
    k: int,
    metric: str,
    progress: Progress | None,
    steps: int,
) -> Any:
    """Return the graph of k nearest neighbours; each row's entries, the most similar first."""
    n = len(vectors)
    if metric == "cosine":
        moved = unit_rows(vectors, offset=mean)
        at_mean = np.flatnonzero(~moved.any(axis=1))
        if len(at_mean):
            raise DataError(
                f"X has {len(at_mean)} rows, the first is row {at_mean[0]}, that equal the mean of "
                "the pool, so that they have no cosine after centring: use center=False"
            )
    else:
        moved = vectors - mean
    report = None if progress is None else lambda done, total: progress(done, steps)
    found = nearest_neighbours(moved, k, progress=report).indices
    kind = np.int32 if n * k < np.iinfo(np.int32).max else np.int64
    indices = found.astype(kind).reshape(-1)
    start = np.arange(0, n * k + 1, k, dtype=kind)
    return sp.csr_array((np.ones(n * k, dtype=np.bool_), indices, start), shape=(n, n))


def _first_voted(graph: Any) -> NDArray[np.int64]:
    """Return each row's place in the order in which the authors' code visits candidates.

    By votes, most first; of equals, the row that was voted for first. Row 0 votes first, and every
    row for the least similar of its neighbours first.
    """
    n = graph.shape[0]
    voter = np.repeat(np.arange(n), np.diff(graph.indptr))
    place = np.arange(graph.nnz)
    reversed_within_row = np.lexsort((-place, voter))
    first = np.full(n, graph.nnz, dtype=np.int64)
    np.minimum.at(first, graph.indices[reversed_within_row], place)
    votes = np.bincount(graph.indices, minlength=n)
    ranks = np.empty(n, dtype=np.int64)
    ranks[np.lexsort((first, -votes))] = np.arange(n)
    return ranks


def _check_options(rho: Any, metric: Any, compat: Any) -> None:
    number = isinstance(rho, int | float | np.integer | np.floating) and not isinstance(rho, bool)
    if not number or not math.isfinite(rho) or rho < 1:
        raise DataError(f"rho must be a number above 1 (or 1, for no discount), got {rho!r}")
    if metric not in ("cosine", "dot"):
        raise DataError(
            f"metric must be 'cosine' or 'dot', got {metric!r}. For any other give the neighbour "
            "graph, a scipy sparse matrix"
        )
    if compat not in (None, "official"):
        raise DataError(f"compat must be None or 'official', got {compat!r}")


def _checked_k(k: Any, n: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int | float | np.integer | np.floating):
        raise DataError(f"k must be a number of neighbours or a share of the pool, got {k!r}")
    if isinstance(k, float | np.floating) and not float(k).is_integer():
        if not 0 < k < 1:
            raise DataError(f"k must be an integer, or a share between 0 and 1, got {k!r}")
        return min(max(1, round(k * n)), n - 1) if n > 1 else _checked_k(1, n)
    if not 1 <= k < n:
        raise DataError(
            f"k must be at least 1 and less than the {n} rows of the pool, got {k}. About 5 % of "
            "the pool is usual: k=0.05"
        )
    return int(k)


def _checked_graph(graph: Any, name: str) -> Any:
    if not sp.issparse(graph):
        raise DataError(f"{name} must be a scipy sparse matrix, got {type(graph).__name__}")
    matrix: Any = graph
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise DataError(
            f"{name} is sparse, so it must be a square neighbour graph (row v has entries in the "
            f"columns that v votes for), got shape {matrix.shape}. Give vectors as a dense array"
        )
    if matrix.nnz == 0:
        raise DataError(f"{name} must have entries: nobody votes")
    edges: Any = sp.csr_array(matrix)
    by_candidate = edges.tocsc()  # in order of voters, so that entries given twice are adjacent
    candidate = np.repeat(np.arange(edges.shape[1]), np.diff(by_candidate.indptr))
    if ((np.diff(by_candidate.indices) == 0) & (np.diff(candidate) == 0)).any():
        edges = edges.copy()
        edges.sum_duplicates()
    voter = np.repeat(np.arange(edges.shape[0]), np.diff(edges.indptr))
    loops = np.flatnonzero(edges.indices == voter)
    if len(loops):
        raise DataError(
            f"{name} has {len(loops)} self-loops, the first in row {voter[loops[0]]}: rows do not "
            "vote for themselves. Leave the diagonal empty"
        )
    return edges


def _checked_first(n_first: Any, n_select: int) -> int:
    if n_first is None:
        return max(1, round(n_select / 10))
    if isinstance(n_first, bool) or not isinstance(n_first, int | np.integer):
        raise DataError(f"n_first must be an integer or None, got {n_first!r}")
    if not 1 <= n_first <= n_select:
        raise DataError(f"n_first must be between 1 and n_select = {n_select}, got {n_first}")
    return int(n_first)


def _stratum_size(n: int, picks: int, dropped: Any) -> int:
    if not isinstance(dropped, int | float) or not 0 <= dropped < 1:
        raise DataError(f"drop_most_confident must be at least 0 and below 1, got {dropped!r}")
    size = math.floor(n * (1 - dropped) / max(1, picks) + 1e-9)  # 2.9999999999 is 3
    if size < 1:
        raise DataError(
            f"n_select is too large for strata: {picks} picks from {n} rows, of which the most "
            f"confident {dropped:.0%} are not used. Lower n_select or drop_most_confident"
        )
    return size


def _checked_confidence(
    confidence: ArrayLike, n: int, labeled: NDArray[np.int64]
) -> NDArray[np.float64]:
    try:
        values = np.array(confidence, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"confidence must be one number per row: {error}") from error
    if values.shape != (n,):
        raise DataError(
            f"confidence must be one number for each of the {n} rows, got shape {values.shape}"
        )
    values[labeled] = 0  # what was said of them is not used
    bad = np.flatnonzero(np.isnan(values))
    if len(bad):
        raise DataError(f"confidence is NaN for {len(bad)} rows, the first is row {bad[0]}")
    return values


def _length(X: Any) -> int:
    return int(X.shape[0]) if hasattr(X, "shape") else len(X)
