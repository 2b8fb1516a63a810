"""What a sceptic would pick instead: random, clusters, facility location, farthest first, doubt.

All of them need only vectors of the pool, or less, and no language model.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.validation import validate_data

from bakeoff.data.neighbours import nearest_neighbours, unit_rows
from bakeoff.errors import DataError
from bakeoff.selection.selector import Selector, checked_count, checked_labeled, checked_vectors

Progress = Callable[[int, int], None]
RandomState = int | np.random.Generator | np.random.RandomState | None

# Similarities held as a matrix: 1 GiB of float32, 16,384 rows. Larger pools are recomputed by
# blocks.
_DENSE_ENTRIES = 2**28
# Entries worked on at once: what is read from a matrix should fit the processor's cache, what is
# computed should be large enough for the matrix product to run at full speed.
_READ_ENTRIES = 2**18
_COMPUTED_ENTRIES = 2**25
# Above this many rows k-means looks at batches of rows instead of all of them in each step.
_MINI_BATCH_ROWS = 20_000


class RandomSelector(Selector):
    """A uniform sample without replacement: what every other selector has to beat.

    Parameters
    ----------
    n_select
        How many rows to pick.
    random_state
        Seed, numpy ``Generator`` or ``RandomState``, or None for a different sample every time.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        With one seed, the picks for a smaller `n_select` are the first of those for a larger one.

    Examples
    --------
    >>> RandomSelector(3, random_state=0).fit(["a", "b", "c", "d"]).selected_indices_
    array([2, 0, 1])
    """

    def __init__(self, n_select: int, random_state: RandomState = None) -> None:
        self.n_select = n_select
        self.random_state = random_state

    def fit(  # type: ignore[override]  # says which data it takes
        self, X: Any, y: None = None, *, already_labeled: Sequence[int] | ArrayLike | None = None
    ) -> Self:
        """Draw the rows.

        Parameters
        ----------
        X
            Anything with a length.
        y
            Not used.
        already_labeled
            Rows that are not drawn.

        Raises
        ------
        DataError
            If `X` has no length, or fewer rows than asked for.
        """
        candidates = _candidates(n_rows := _length(X), checked_labeled(already_labeled, n_rows))
        n_select = checked_count(self.n_select, len(candidates))
        self.selected_indices_ = _generator(self.random_state).permutation(candidates)[:n_select]
        return self

    def reasons(self) -> list[str]:
        """Return ``"drawn at random"`` for every pick."""
        return ["drawn at random"] * len(self.selected_indices_)

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that the pool's content is not looked at."""
        return _unread(super().__sklearn_tags__())


class BalancedRandomSelector(Selector):
    """A random sample with equally many rows of every source.

    A source that runs out leaves its share to the others, so that all sources which still have rows
    give equally many (one more or less, drawn by lot).

    Parameters
    ----------
    n_select
        How many rows to pick.
    random_state
        Seed, numpy ``Generator`` or ``RandomState``, or None for a different sample every time.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        In rounds over the sources, so that the first n picks are balanced for every n.
    groups_ : list of length n_select
        The source of each pick.

    References
    ----------
    The "random balanced" baseline of Hamish Ivison, Muru Zhang, Faeze Brahman, Pang Wei Koh and
    Pradeep Dasigi. "Large-Scale Data Selection for Instruction Tuning". 2025. arXiv:2503.01807.

    Examples
    --------
    >>> sources = ["web"] * 90 + ["books"] * 9 + ["code"]
    >>> chosen = BalancedRandomSelector(11, random_state=0).fit(sources, groups=sources)
    >>> [chosen.groups_.count(source) for source in ("web", "books", "code")]
    [5, 5, 1]
    """

    def __init__(self, n_select: int, random_state: RandomState = None) -> None:
        self.n_select = n_select
        self.random_state = random_state

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any,
        y: None = None,
        *,
        groups: Iterable[Hashable] | None = None,
        already_labeled: Sequence[int] | ArrayLike | None = None,
    ) -> Self:
        """Draw the rows.

        Parameters
        ----------
        X
            Anything with a length.
        y
            Not used.
        groups
            The source of each row: N labels. By default the attribute ``source`` of each item, as
            `bakeoff.data.samples.Sample` has it.
        already_labeled
            Rows that are not drawn. They count for their sources: what is balanced is the labelled
            rows and the picks together.

        Raises
        ------
        DataError
            If there are no groups, or not one per row, or fewer rows than asked for.
        """
        n_rows = _length(X)
        labeled = checked_labeled(already_labeled, n_rows)
        candidates = _candidates(n_rows, labeled)
        n_select = checked_count(self.n_select, len(candidates))
        if groups is None:
            try:
                groups = [item.source for item in X]
            except (AttributeError, TypeError):
                raise DataError(
                    "groups must give the source of each row (fit(X, groups=...)); got none, and "
                    "the items have no attribute source"
                ) from None
        labels = groups.tolist() if isinstance(groups, np.ndarray) else list(groups)
        if len(labels) != n_rows:
            raise DataError(f"groups must have one label per row, {n_rows}, got {len(labels)}")
        try:
            numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        except TypeError as error:
            raise DataError(f"groups must be labels such as strings or integers: {error}") from None
        group = np.array([numbers[label] for label in labels], dtype=np.int64)

        # A row's turn is how many rows of its source come before it. Rows of one turn, one of each
        # source at most, follow in random order.
        generator = _generator(self.random_state)
        shuffled = generator.permutation(candidates)
        by_source = shuffled[np.argsort(group[shuffled], kind="stable")]
        taken = np.bincount(group[labeled], minlength=len(numbers))
        free = np.bincount(group[candidates], minlength=len(numbers))
        first = np.cumsum(free) - free
        turn = np.arange(len(by_source)) + (taken - first)[group[by_source]]
        order = np.lexsort((generator.random(len(by_source)), turn))
        self.selected_indices_ = by_source[order[:n_select]]
        self.groups_ = [labels[row] for row in self.selected_indices_.tolist()]
        return self

    def reasons(self) -> list[str]:
        """Return e.g. ``"drawn at random from books"`` per pick."""
        return [f"drawn at random from {group}" for group in self.groups_]

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that the pool's content is not looked at."""
        return _unread(super().__sklearn_tags__())


class LeastConfidenceSelector(Selector):
    """The rows of which a model is least sure ("uncertainty sampling").

    Good for a model that already works and whose doubts mean something; at the very start it picks
    outliers and noise.

    Parameters
    ----------
    n_select
        How many rows to pick.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Least confident first; of equal ones the lowest row.
    confidence_ : float64 array of shape (n_select,)
        The confidence of each pick.

    References
    ----------
    David D. Lewis and William A. Gale. "A Sequential Algorithm for Training Text Classifiers".
    SIGIR 1994. arXiv:cmp-lg/9407020.

    Examples
    --------
    >>> chosen = LeastConfidenceSelector(2).fit("abcd", confidence=[0.9, 0.2, 0.7, 0.4])
    >>> chosen.selected_indices_
    array([1, 3])
    """

    def __init__(self, n_select: int) -> None:
        self.n_select = n_select

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any,
        y: None = None,
        *,
        confidence: ArrayLike | None = None,
        already_labeled: Sequence[int] | ArrayLike | None = None,
    ) -> Self:
        """Choose the rows.

        Parameters
        ----------
        X
            Anything with a length.
        y
            Not used.
        confidence
            One finite number per row, the larger the more confident, in any unit (a probability, a
            log-probability, a negative loss).
        already_labeled
            Rows that are not picked.

        Raises
        ------
        DataError
            If `confidence` is missing, not one finite number per row, or there are fewer rows than
            asked for.
        """
        n_rows = _length(X)
        candidates = _candidates(n_rows, checked_labeled(already_labeled, n_rows))
        n_select = checked_count(self.n_select, len(candidates))
        if confidence is None:
            raise DataError("confidence must give one number per row (fit(X, confidence=...))")
        try:
            values = np.asarray(confidence, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"confidence must be numbers, one per row: {error}") from error
        if values.shape != (n_rows,):
            raise DataError(
                f"confidence must have one number per row, shape ({n_rows},), got {values.shape}"
            )
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"confidence must be finite, got {values[bad]} for row {bad}")
        order = np.argsort(values[candidates], kind="stable")[:n_select]
        self.selected_indices_ = candidates[order]
        self.confidence_ = values[self.selected_indices_]
        return self

    def reasons(self) -> list[str]:
        """Return e.g. ``"confidence 0.12"`` per pick."""
        return [f"confidence {value:.3g}" for value in self.confidence_.tolist()]

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that the pool's content is not looked at."""
        return _unread(super().__sklearn_tags__())


class KMeansSelector(Selector):
    """The row nearest to the centre of each of `n_select` clusters.

    Parameters
    ----------
    n_select
        How many rows to pick.
    metric
        ``"cosine"``: rows are scaled to length 1 first. ``"euclidean"``: as they are.
    center
        Whether the mean of the pool is subtracted before that.
    n_init
        How often k-means starts anew; the clustering of least inertia counts.
    random_state
        Seed, numpy ``Generator`` or ``RandomState``, or None.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        From the largest cluster to the smallest.
    labels_ : int64 array of shape (N,)
        The cluster of every row.
    cluster_sizes_ : int64 array of shape (n_select,)
        How many rows the cluster of each pick has.

    Notes
    -----
    With rows labelled already, the pool is cut into ``n_select + len(already_labeled)`` clusters,
    so that at least `n_select` hold no labelled row, unless rows coincide. Picks come from the
    clusters with the fewest labelled and picked rows, among these from the largest. Where clusters
    are left empty, which happens when the pool has fewer distinct rows than clusters, others give
    their second-nearest row; a row is never picked twice.

    Clusters come from scikit-learn's ``KMeans`` up to 20,000 rows and from ``MiniBatchKMeans``
    above.

    Examples
    --------
    >>> pool = [[0.0], [0.1], [0.2], [9.0], [9.1]]
    >>> KMeansSelector(2, metric="euclidean", random_state=0).fit(pool).selected_indices_
    array([1, 3])
    """

    def __init__(
        self,
        n_select: int,
        metric: Literal["cosine", "euclidean"] = "cosine",
        center: bool = True,
        n_init: int = 3,
        random_state: RandomState = None,
    ) -> None:
        self.n_select = n_select
        self.metric = metric
        self.center = center
        self.n_init = n_init
        self.random_state = random_state

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: ArrayLike,
        y: None = None,
        *,
        already_labeled: Sequence[int] | ArrayLike | None = None,
    ) -> Self:
        """Cluster the pool and choose the rows.

        Parameters
        ----------
        X
            Vectors ``(N, d)``.
        y
            Not used.
        already_labeled
            Rows that are not picked and whose clusters come last.

        Raises
        ------
        DataError
            If vectors are not finite, or all zero with cosines; or fewer rows than asked for.
        """
        rows = _compared(self, X, self.metric, self.center)
        labeled = checked_labeled(already_labeled, len(rows))
        n_select = checked_count(self.n_select, len(rows) - len(labeled))
        labels, centres = _clusters(
            rows, n_select + len(labeled), self.n_init, _generator(self.random_state)
        )
        distances = np.empty(len(rows))
        for block in _blocks(len(rows), rows.shape[1]):
            difference = rows[block] - centres[labels[block]]
            distances[block] = np.einsum("nd,nd->n", difference, difference)

        def nearest(members: NDArray[np.int64]) -> tuple[int, float]:
            best = int(distances[members].argmin())
            return best, float(distances[members[best]])

        self.labels_ = labels
        self.selected_indices_, _ = _from_clusters(labels, labeled, n_select, nearest)
        self.cluster_sizes_ = np.bincount(labels)[labels[self.selected_indices_]]
        return self

    def reasons(self) -> list[str]:
        """Return e.g. ``"centre of a cluster of 63 rows"`` per pick."""
        seen: set[int] = set()
        sentences = []
        for label, size in zip(
            self.labels_[self.selected_indices_].tolist(), self.cluster_sizes_.tolist(), strict=True
        ):
            place = "next to the centre" if label in seen else "centre"
            sentences.append(f"{place} of a cluster of {_rows(size)}")
            seen.add(label)
        return sentences


class TypicalClusterSelector(Selector):
    """TypiClust: from each cluster the row in its densest place, which need not be its centre.

    Parameters
    ----------
    n_select
        How many rows to pick.
    metric
        ``"cosine"``: rows are scaled to length 1 first. ``"euclidean"``: as they are.
    center
        Whether the mean of the pool is subtracted before that.
    n_neighbors
        Neighbours within the cluster whose mean distance tells how dense a place is; at most half
        of the cluster.
    max_clusters
        More clusters than this are not formed; they then give several rows each.
    min_cluster_size
        Smaller clusters give rows only when no other has any left.
    n_init
        How often k-means starts anew.
    random_state
        Seed, numpy ``Generator`` or ``RandomState``, or None.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        From the largest cluster to the smallest, then second rows in the same order, and so on.
    labels_ : int64 array of shape (N,)
        The cluster of every row.
    distances_ : float64 array of shape (n_select,)
        Mean Euclidean distance of each pick (of unit rows, for cosines) to its neighbours in the
        cluster that were not picked or labelled before it: the reciprocal of the paper's
        typicality.

    Notes
    -----
    The number of clusters is the number of labelled rows and picks together. Each pick comes from
    the cluster with the fewest labelled and picked rows, of these from the largest; in the
    published code the order of clusters is fixed once, which is the same unless some hold several
    labelled rows. That code averages squared distances and leaves out clusters of 5 rows; here, as
    in the paper, distances are not squared and 5 rows are enough.

    References
    ----------
    Guy Hacohen, Avihu Dekel and Daphna Weinshall. "Active Learning on a Budget: Opposite Strategies
    Suit High and Low Budgets". ICML 2022. arXiv:2202.02794.

    Examples
    --------
    >>> pool = [[0.0], [0.1], [0.2], [3.0], [9.0], [9.1], [9.2], [9.9], [7.0]]
    >>> chosen = TypicalClusterSelector(2, metric="euclidean", min_cluster_size=1, random_state=0)
    >>> chosen.fit(pool).selected_indices_
    array([5, 1])
    """

    def __init__(
        self,
        n_select: int,
        metric: Literal["cosine", "euclidean"] = "cosine",
        center: bool = True,
        n_neighbors: int = 20,
        max_clusters: int = 500,
        min_cluster_size: int = 5,
        n_init: int = 3,
        random_state: RandomState = None,
    ) -> None:
        self.n_select = n_select
        self.metric = metric
        self.center = center
        self.n_neighbors = n_neighbors
        self.max_clusters = max_clusters
        self.min_cluster_size = min_cluster_size
        self.n_init = n_init
        self.random_state = random_state

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: ArrayLike,
        y: None = None,
        *,
        already_labeled: Sequence[int] | ArrayLike | None = None,
    ) -> Self:
        """Cluster the pool and choose the rows.

        Parameters
        ----------
        X
            Vectors ``(N, d)``.
        y
            Not used.
        already_labeled
            Rows that are not picked and whose clusters come last.

        Raises
        ------
        DataError
            If vectors are not finite, or all zero with cosines; a parameter is less than 1; or
            there are fewer rows than asked for.
        """
        rows = _compared(self, X, self.metric, self.center)
        labeled = checked_labeled(already_labeled, len(rows))
        n_select = checked_count(self.n_select, len(rows) - len(labeled))
        n_neighbors = _at_least_one("n_neighbors", self.n_neighbors)
        n_clusters = min(n_select + len(labeled), _at_least_one("max_clusters", self.max_clusters))
        labels, _ = _clusters(rows, n_clusters, self.n_init, _generator(self.random_state))

        def densest(members: NDArray[np.int64]) -> tuple[int, float]:
            if len(members) == 1:
                return 0, 0.0
            searched = NearestNeighbors(
                n_neighbors=min(n_neighbors, len(members) // 2), algorithm="brute"
            ).fit(rows[members])
            distances = searched.kneighbors()[0].mean(axis=1, dtype=np.float64)
            best = int(distances.argmin())
            return best, float(distances[best])

        self.labels_ = labels
        self.selected_indices_, self.distances_ = _from_clusters(
            labels,
            labeled,
            n_select,
            densest,
            min_size=_at_least_one("min_cluster_size", self.min_cluster_size),
        )
        return self

    def reasons(self) -> list[str]:
        """Return e.g. ``"typical of a cluster of 63 rows, 0.41 from its neighbours"`` per pick."""
        sizes = np.bincount(self.labels_)[self.labels_[self.selected_indices_]]
        return [
            f"typical of a cluster of {_rows(size)}, {distance:.2f} from its neighbours"
            for size, distance in zip(sizes.tolist(), self.distances_.tolist(), strict=True)
        ]


class FarthestFirstSelector(Selector):
    """Each pick is the row farthest from all picks before it (greedy k-centre, "diversity").

    The largest distance from any row to its nearest pick is at most twice what the best possible
    choice of as many rows reaches. Outliers are therefore picked first.

    Parameters
    ----------
    n_select
        How many rows to pick.
    metric
        ``"cosine"``: distance is ``1 - cosine`` (the guarantee above holds for the Euclidean
        distance of the rows scaled to length 1, which orders rows alike). ``"euclidean"``.
    center
        Whether the mean of the pool is subtracted first. Matters for cosines only.
    start
        The first pick: ``"mean"``, the row nearest to the mean (with cosines, to the mean of the
        unit rows: the one most similar to all on average); or ``"random"``. With rows labelled
        already there is no such pick: the first is the row farthest from them.
    random_state
        Used by ``start="random"``: seed, numpy ``Generator`` or ``RandomState``, or None.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Of equally far rows the lowest comes first. The picks for a smaller `n_select` are the first
        of those for a larger one.
    distances_ : float64 array of shape (n_select,)
        Distance of each pick to the nearest pick or labelled row before it, never increasing;
        infinite where there is none.
    radius_ : float
        Distance from the row that is worst served to its nearest pick or labelled row.

    References
    ----------
    Teofilo F. Gonzalez. "Clustering to minimize the maximum intercluster distance". Theoretical
    Computer Science 38, 1985.

    Ozan Sener and Silvio Savarese. "Active Learning for Convolutional Neural Networks: A Core-Set
    Approach". ICLR 2018. arXiv:1708.00489.

    Examples
    --------
    >>> chosen = FarthestFirstSelector(3, metric="euclidean").fit([[0.0], [4.0], [5.0], [9.0]])
    >>> chosen.selected_indices_, chosen.distances_, chosen.radius_
    (array([1, 3, 0]), array([inf,  5.,  4.]), 1.0)
    """

    def __init__(
        self,
        n_select: int,
        metric: Literal["cosine", "euclidean"] = "cosine",
        center: bool = True,
        start: Literal["mean", "random"] = "mean",
        random_state: RandomState = None,
    ) -> None:
        self.n_select = n_select
        self.metric = metric
        self.center = center
        self.start = start
        self.random_state = random_state

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: ArrayLike,
        y: None = None,
        *,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Choose the rows.

        Parameters
        ----------
        X
            Vectors ``(N, d)``.
        y
            Not used.
        already_labeled
            Rows that are not picked, and that picks keep away from.
        progress
            Called with (picks done, picks in total).

        Raises
        ------
        DataError
            If vectors are not finite, or all zero with cosines; or fewer rows than asked for.
        """
        rows = _compared(self, X, self.metric, self.center)
        labeled = checked_labeled(already_labeled, len(rows))
        n_select = checked_count(self.n_select, len(rows) - len(labeled))
        if self.start not in ("mean", "random"):
            raise DataError(f"start must be 'mean' or 'random', got {self.start!r}")
        nearest = np.full(len(rows), np.inf)  # squared distances
        taken = np.zeros(len(rows), dtype=bool)
        for row in labeled.tolist():
            np.minimum(nearest, _squared_distances(rows, rows[row]), out=nearest)
        taken[labeled] = True

        selected = np.empty(n_select, dtype=np.int64)
        squared = np.empty(n_select)
        for step in range(n_select):
            if step or len(labeled):
                pick = int(np.where(taken, -1.0, nearest).argmax())
            elif self.start == "mean":
                mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
                pick = int(_squared_distances(rows, mean).argmin())
            else:
                pick = int(_generator(self.random_state).integers(len(rows)))
            selected[step], squared[step] = pick, nearest[pick]
            taken[pick] = True
            np.minimum(nearest, _squared_distances(rows, rows[pick]), out=nearest)
            if progress is not None:
                progress(step + 1, n_select)
        self.selected_indices_ = selected
        self.distances_ = self._distance(squared)
        self.radius_ = float(self._distance(nearest.max()))
        self._started_from_labeled = len(labeled) > 0
        return self

    def _distance(self, squared: Any) -> Any:
        # Of rows of length 1, half the squared distance is 1 - cosine, and exactly 0 for equals.
        return squared / 2 if self.metric == "cosine" else np.sqrt(squared)

    def reasons(self) -> list[str]:
        """Return e.g. ``"0.83 from the nearest pick"`` per pick."""
        other = "pick or labelled row" if self._started_from_labeled else "pick"
        first = "first: nearest to the mean" if self.start == "mean" else "first: drawn at random"
        return [
            f"{distance:.2f} from the nearest {other}" if np.isfinite(distance) else first
            for distance in self.distances_.tolist()
        ]


class FacilityLocationSelector(Selector):
    """The rows to which all rows of the pool are most similar: greedy facility location.

    Every row counts with its similarity to the pick that is most similar to it, and each pick is
    the one that raises the sum over all rows most:
    ``f(S) = sum over rows i of max over picks j of max(0, similarity(i, j))``. Greedy choice
    reaches at least ``1 - 1/e``, 63 %, of the best possible sum.

    Parameters
    ----------
    n_select
        How many rows to pick.
    metric
        ``"cosine"``. Or ``"precomputed"``: `fit` is given similarities ``(N, N)``, dense or scipy
        sparse, where entry (i, j) is how well row j stands for row i, and missing entries are 0.
    center
        Whether the mean of the pool is subtracted before cosines are taken.
    n_neighbors
        If given, a row counts similarities to that many nearest neighbours and to itself only. For
        pools from about 20,000 rows on: memory and time of the choice then grow with
        ``N * n_neighbors``, and only the search for neighbours still compares all pairs.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Of equal gains the lowest row comes first. The picks for a smaller `n_select` are the first
        of those for a larger one.
    gains_ : float64 array of shape (n_select,)
        By how much each pick raised the sum; never increasing. In units of rows, since a row's
        similarity to itself is 1 (of the similarities given, with ``metric="precomputed"``).
    objective_ : float
        ``f`` of the picks and the rows labelled already together.

    Notes
    -----
    Negative similarities count as 0, as in submodlib, whose sum also starts from 0; apricot takes
    them as given, and asks for none. Similarities are rounded to multiples of 2⁻²³ (of the power of
    two above the largest one). All sums are then exact in float64 in any order, so that gains can
    be kept up to date from pick to pick without drifting: a pick costs as many rows of similarities
    as it serves better than the picks before it. The result is that of plain greedy choice, which
    computes all gains anew for each pick, and so that of lazy greedy choice.

    Up to 16,384 rows the similarities are held (1 GiB at most); beyond, without `n_neighbors`, they
    are computed anew in blocks whenever needed.

    References
    ----------
    G. L. Nemhauser, L. A. Wolsey and M. L. Fisher. "An analysis of approximations for maximizing
    submodular set functions". Mathematical Programming 14, 1978.

    Hui Lin and Jeff Bilmes. "A Class of Submodular Functions for Document Summarization". ACL 2011.

    Examples
    --------
    >>> chosen = FacilityLocationSelector(2, metric="precomputed")
    >>> chosen.fit([[1.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.0]]).selected_indices_
    array([1, 2])
    >>> chosen.gains_, chosen.objective_
    (array([1.75, 0.75]), 2.5)
    """

    def __init__(
        self,
        n_select: int,
        metric: Literal["cosine", "precomputed"] = "cosine",
        center: bool = True,
        n_neighbors: int | None = None,
    ) -> None:
        self.n_select = n_select
        self.metric = metric
        self.center = center
        self.n_neighbors = n_neighbors

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any,
        y: None = None,
        *,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Choose the rows.

        Parameters
        ----------
        X
            Vectors ``(N, d)``, or similarities ``(N, N)`` with ``metric="precomputed"``.
        y
            Not used.
        already_labeled
            Rows that are not picked; what they cover already is no gain.
        progress
            Called with (picks done, picks in total).

        Raises
        ------
        DataError
            If vectors are not finite or all zero; similarities are not square; `n_neighbors` is not
            between 1 and N - 1; or there are fewer rows than asked for.
        """
        similarities = self._similarities(X)
        n_rows = similarities.n_rows
        labeled = checked_labeled(already_labeled, n_rows)
        n_select = checked_count(self.n_select, n_rows - len(labeled))
        covered = np.zeros(n_rows, dtype=np.float32)
        for row in labeled.tolist():
            np.maximum(covered, similarities.to(row), out=covered)
        gains = similarities.between(
            np.arange(n_rows), covered, np.full(n_rows, np.inf, dtype=np.float32)
        )
        gains[labeled] = -np.inf

        selected = np.empty(n_select, dtype=np.int64)
        gained = np.empty(n_select)
        for step in range(n_select):
            pick = int(gains.argmax())
            selected[step], gained[step] = pick, gains[pick]
            to_pick = similarities.to(pick)
            improved = np.flatnonzero(to_pick > covered)
            # What a candidate could have gained below the new level is no gain any more.
            gains -= similarities.between(improved, covered[improved], to_pick[improved])
            gains[pick] = -np.inf
            covered[improved] = to_pick[improved]
            if progress is not None:
                progress(step + 1, n_select)
        self.selected_indices_ = selected
        self.gains_ = gained
        self.objective_ = float(covered.sum(dtype=np.float64))
        return self

    def _similarities(self, X: Any) -> _Similarities:
        if self.metric == "precomputed":
            if self.n_neighbors is not None:
                raise DataError(
                    "n_neighbors needs metric='cosine'; give a sparse matrix of similarities to "
                    "leave some out"
                )
            return _precomputed(self, X)
        if self.metric != "cosine":
            raise DataError(f"metric must be 'cosine' or 'precomputed', got {self.metric!r}")
        rows = _compared(self, X, "cosine", self.center)
        if self.n_neighbors is None:
            dense = len(rows) ** 2 <= _DENSE_ENTRIES
            return _Held(_cosines(rows, np.arange(len(rows)))) if dense else _Recomputed(rows)
        n_neighbors = _at_least_one("n_neighbors", self.n_neighbors)
        if n_neighbors >= len(rows):
            raise DataError(
                f"n_neighbors must be less than the {len(rows)} rows of the pool, got {n_neighbors}"
            )
        found = nearest_neighbours(rows, n_neighbors)
        own = np.arange(len(rows))[:, None]
        columns = np.concatenate([own, found.indices], axis=1)
        values = np.concatenate(
            [np.ones_like(own, dtype=np.float32), found.similarities], axis=1
        ).ravel()
        starts = np.arange(0, columns.size + 1, columns.shape[1])
        matrix = sparse.csr_array(
            (_rounded(values, 1.0), columns.ravel(), starts), shape=(len(rows), len(rows))
        )
        return _Sparse(matrix)

    def reasons(self) -> list[str]:
        """Return e.g. ``"covers 41.2"`` per pick: its gain."""
        return [f"covers {gain:.4g}" for gain in self.gains_.tolist()]

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn when the pool is a matrix of similarities."""
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.metric == "precomputed"
        tags.input_tags.sparse = self.metric == "precomputed"
        return tags


class _Similarities(Protocol):
    """Similarities of all rows to all candidates, none negative."""

    n_rows: int

    def to(self, candidate: int) -> NDArray[np.float32]:
        """Return every row's similarity to one candidate."""

    def between(
        self, rows: NDArray[np.int64], low: NDArray[np.float32], high: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Return for each candidate how much similarity `rows` have to it from `low` up to `high`.

        Which is the sum over `rows` of ``clip(similarity, low, high) - low``, with one `low` and
        one `high` per row.
        """


class _Held:
    """A matrix in memory."""

    def __init__(self, matrix: NDArray[np.float32]) -> None:
        self.matrix = matrix
        self.n_rows = len(matrix)

    def to(self, candidate: int) -> NDArray[np.float32]:
        column: NDArray[np.float32] = self.matrix[:, candidate]
        return column

    def between(
        self, rows: NDArray[np.int64], low: NDArray[np.float32], high: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        total = np.zeros(self.n_rows)
        for block in _blocks(len(rows), self.n_rows, _READ_ENTRIES):
            total += _between(self.matrix[rows[block]], low[block], high[block])
        return total


class _Recomputed:
    """Cosines of unit rows, computed whenever they are asked for."""

    def __init__(self, unit: NDArray[np.float32]) -> None:
        self.unit = unit
        self.n_rows = len(unit)

    def to(self, candidate: int) -> NDArray[np.float32]:
        return _cosines(self.unit, np.array([candidate], dtype=np.int64)).reshape(-1)

    def between(
        self, rows: NDArray[np.int64], low: NDArray[np.float32], high: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        total = np.zeros(self.n_rows)
        for block in _blocks(len(rows), self.n_rows, _COMPUTED_ENTRIES):
            total += _between(_cosines(self.unit, rows[block]), low[block], high[block])
        return total


class _Sparse:
    """A sparse matrix; what it leaves out is 0."""

    def __init__(self, matrix: Any) -> None:
        self.by_row = matrix
        self.by_column = matrix.tocsc()
        self.n_rows = int(matrix.shape[0])

    def to(self, candidate: int) -> NDArray[np.float32]:
        column = self.by_column
        stored = slice(column.indptr[candidate], column.indptr[candidate + 1])
        values = np.zeros(self.n_rows, dtype=np.float32)
        values[column.indices[stored]] = column.data[stored]
        return values

    def between(
        self, rows: NDArray[np.int64], low: NDArray[np.float32], high: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        chosen = self.by_row[rows]
        lengths = np.diff(chosen.indptr)
        floor = np.repeat(low, lengths)
        amounts = np.clip(chosen.data, floor, np.repeat(high, lengths)) - floor
        total = np.zeros(self.n_rows)
        total += np.bincount(chosen.indices, weights=amounts, minlength=self.n_rows)
        return total


def _between(
    block: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]
) -> NDArray[np.float64]:
    np.clip(block, low[:, None], high[:, None], out=block)
    block -= low[:, None]
    total: NDArray[np.float64] = block.sum(axis=0, dtype=np.float64)
    return total


def _cosines(unit: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return cosines of some rows to all, rounded, none negative; to themselves exactly 1."""
    everything = len(rows) == len(unit)
    cosines = (unit if everything else unit[rows]) @ unit.T
    cosines[np.arange(len(rows)), rows] = 1
    return _rounded(cosines, 1.0)


def _rounded(values: NDArray[np.float32], power: float) -> NDArray[np.float32]:
    """Clip `values` to ``[0, power]``, a power of two, and round to multiples of power * 2⁻²³."""
    np.clip(values, 0, np.float32(power), out=values)
    values += np.float32(power)  # what lies between power and 2 * power has these spacings
    values -= np.float32(power)
    return values


def _precomputed(selector: Selector, X: Any) -> _Similarities:
    """Return similarities that were given, as `_Held` or `_Sparse`."""
    matrix: Any
    is_sparse: bool = sparse.issparse(X)
    if is_sparse:
        matrix = sparse.csr_array(X, dtype=np.float32, copy=True)
        matrix.sum_duplicates()
        values = matrix.data
        if not np.isfinite(values).all():
            raise DataError("X has NaN or inf among its similarities")
    else:
        matrix = values = checked_vectors(X, cosine=False)
    if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise DataError(
            f"X must be a square matrix with metric='precomputed', got shape {matrix.shape}"
        )
    validate_data(selector, X, skip_check_array=True)
    largest = float(values.max(initial=0.0))
    _rounded(values, 2.0 ** float(np.ceil(np.log2(largest))) if largest > 0 else 1.0)
    return _Sparse(matrix) if is_sparse else _Held(matrix)


def _from_clusters(
    labels: NDArray[np.int64],
    labeled: NDArray[np.int64],
    n_select: int,
    best_of: Callable[[NDArray[np.int64]], tuple[int, float]],
    min_size: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pick from the cluster with the fewest labelled and picked rows, of these from the largest.

    `best_of` says which of a cluster's free rows, ascending, to take, and its score.
    """
    free_rows = _candidates(len(labels), labeled)
    by_cluster = free_rows[np.argsort(labels[free_rows], kind="stable")]
    sizes = np.bincount(labels)
    ends = np.cumsum(np.bincount(labels[free_rows], minlength=len(sizes)))
    free = np.split(by_cluster, ends[:-1])
    taken = np.bincount(labels[labeled], minlength=len(sizes))
    # Small clusters last; then fewest taken, largest; then lowest row, as numbers mean nothing.
    queue = [
        (int(sizes[c] < min_size), int(taken[c]), -int(sizes[c]), int(free[c][0]), c)
        for c in range(len(sizes))
        if len(free[c])
    ]
    heapq.heapify(queue)
    selected = np.empty(n_select, dtype=np.int64)
    scores = np.empty(n_select)
    for step in range(n_select):
        small, count, size, first, cluster = queue[0]
        place, scores[step] = best_of(free[cluster])
        selected[step] = free[cluster][place]
        free[cluster] = np.delete(free[cluster], place)
        if len(free[cluster]):
            heapq.heapreplace(queue, (small, count + 1, size, first, cluster))
        else:
            heapq.heappop(queue)
    return selected, scores


def _clusters(
    rows: NDArray[np.float32], n_clusters: int, n_init: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the cluster of each row, and the centres."""
    kind, more = (
        (KMeans, {})
        if len(rows) <= _MINI_BATCH_ROWS
        else (
            MiniBatchKMeans,
            {"batch_size": 4096},
        )
    )
    model = kind(
        n_clusters=n_clusters,
        n_init=_at_least_one("n_init", n_init),
        random_state=int(generator.integers(2**31 - 1)),
        **more,
    )
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: some stay empty, which is dealt with.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows)
    return model.labels_.astype(np.int64), model.cluster_centers_.astype(np.float32)


def _compared(selector: Selector, X: ArrayLike, metric: str, center: bool) -> NDArray[np.float32]:
    """Return the rows whose Euclidean distances or inner products count, and note their columns."""
    if metric not in ("cosine", "euclidean"):
        raise DataError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    vectors = checked_vectors(X, cosine=metric == "cosine")
    validate_data(selector, X, skip_check_array=True)
    # The mean of equal rows must be that row, or rounding errors would count as directions.
    offset = vectors.mean(axis=0, dtype=np.float64).astype(np.float32) if center else None
    if metric == "cosine":
        return unit_rows(vectors, offset=offset)
    return vectors if offset is None else vectors - offset


def _squared_distances(
    rows: NDArray[np.float32], point: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return squared Euclidean distances, exactly 0 for equal rows."""
    squared = np.empty(len(rows))
    for block in _blocks(len(rows), rows.shape[1], _READ_ENTRIES // 2):
        difference = rows[block] - point
        squared[block] = np.einsum("nd,nd->n", difference, difference)
    return squared


def _blocks(n_rows: int, width: int, entries: int = _READ_ENTRIES) -> Iterable[slice]:
    size = max(1, entries // width)
    return (slice(start, start + size) for start in range(0, n_rows, size))


def _candidates(n_rows: int, labeled: NDArray[np.int64]) -> NDArray[np.int64]:
    free = np.ones(n_rows, dtype=bool)
    free[labeled] = False
    return np.flatnonzero(free)


def _length(X: Any) -> int:
    shape = getattr(X, "shape", None)
    try:
        n_rows = shape[0] if shape is not None else len(X)
    except (IndexError, TypeError):
        raise DataError(f"X must have a length, got {type(X).__name__}") from None
    if n_rows == 0:
        raise DataError("X must have at least one row, got none")
    return int(n_rows)


def _generator(random_state: Any) -> np.random.Generator:
    if random_state is None or isinstance(random_state, np.random.Generator):
        return np.random.default_rng(random_state)
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(2**31 - 1))
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer):
        raise DataError(
            "random_state must be None, a seed of at least 0, or a numpy Generator or RandomState, "
            f"got {random_state!r}"
        )
    if random_state < 0:
        raise DataError(f"random_state must be at least 0, got {random_state}")
    return np.random.default_rng(int(random_state))


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise DataError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _unread(tags: Any) -> Any:
    tags.no_validation = True
    tags.input_tags.allow_nan = tags.input_tags.sparse = tags.input_tags.string = True
    return tags
