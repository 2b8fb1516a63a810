"""Selective annotation by influence: the rows from which information spreads furthest (IDEAL)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array, csr_array, issparse
from scipy.sparse.csgraph import connected_components

from bakeoff.data.neighbours import nearest_neighbours, unit_rows
from bakeoff.errors import DataError
from bakeoff.selection.selector import Selector, checked_count, checked_labeled, checked_vectors

METHOD = {
    "slug": "ideal",
    "title": "Influence-driven selective annotation",
    "paper": "Zhang et al., IDEAL: Influence-Driven Selective Annotations Empower In-Context "
    "Learners in Large Language Models, ICLR 2024, arXiv 2310.10873",
    "designs": ["ideal"],
    "names": ["InfluenceSelector", "influence", "diffusion_layers", "similarity_graph"],
}

# Coins tossed at once: 8 bytes each, and a few copies.
_COINS = 2**19
# Candidates whose gain is computed at once, and the marks (one byte each) that this may take.
_CANDIDATES = 16
_MARKS = 64 * 2**20
# How often backward searches after a pick may visit as many states as there are.
_BACKWARD = 2
# Simulations of which `influence` keeps one mark per row at once.
_CASCADE_MARKS = 2**20
# The share of rows with a negative cosine among their neighbours from which there is a warning.
_CLIPPED_SHARE = 0.01


class InfluenceEstimate(NamedTuple):
    """What `influence` returns.

    Parameters
    ----------
    mean
        Rows reached, the seeds included, on average over the simulations.
    standard_error
        Of that mean; NaN after a single simulation.
    """

    mean: float
    standard_error: float


def similarity_graph(
    X: ArrayLike,
    k: int = 10,
    *,
    metric: str = "cosine",
    center: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> csr_array[np.float64, tuple[int, int]]:
    """Return the graph in which every row may pass information to its k most similar rows.

    Parameters
    ----------
    X
        Vectors ``(N, d)``.
    k
        Successors per row, less than N. A row is no successor of its own; copies of it are.
    metric
        ``"cosine"``, or ``"dot"`` for the inner product. Negative values count as 0.
    center
        Whether the mean of `X` is subtracted first, as the paper does.
    progress
        Called with (rows searched, rows in total).

    Returns
    -------
    csr_array
        float64 ``(N, N)``. Entry (v, u) is the probability that v activates u: the similarity of
        the two, divided by the sum of the similarities of v's k successors. Every row sums to 1; a
        row with no positive similarity has k probabilities of 1/k.

    Warns
    -----
    UserWarning
        If more than 1 % of the rows had a negative similarity among their k.

    Raises
    ------
    DataError
        If `X` is no finite matrix, has rows of zeros (for cosines), or `k` or `metric` cannot be.

    Examples
    --------
    >>> graph = similarity_graph([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]], k=1, center=False)
    >>> graph.toarray().tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if metric not in ("cosine", "dot"):
        raise DataError(f'metric must be "cosine" or "dot", got {metric!r}')
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise DataError(f"k must be an integer, got {k!r}")
    vectors = checked_vectors(X, cosine=metric == "cosine")
    offset = vectors.mean(axis=0, dtype=np.float64).astype(np.float32) if center else None
    if metric == "cosine":
        vectors = unit_rows(vectors, offset=offset)
    elif offset is not None:
        vectors = vectors - offset
    found = nearest_neighbours(vectors, int(k), progress=progress)
    weights = np.maximum(found.similarities, 0).astype(np.float64)
    clipped = (found.similarities < 0).any(axis=1)
    if clipped.mean() > _CLIPPED_SHARE:
        warnings.warn(
            f"{int(clipped.sum())} of {len(vectors)} rows have negative similarities among their "
            f"{k} nearest, which count as 0: use a smaller k",
            stacklevel=2,
        )
    total = weights.sum(axis=1, keepdims=True)
    probabilities = np.where(total > 0, weights, 1.0) / np.where(total > 0, total, float(k))
    n = len(vectors)
    rows = np.repeat(np.arange(n), int(k))
    graph = coo_array((probabilities.ravel(), (rows, found.indices.ravel())), shape=(n, n)).tocsr()
    graph.eliminate_zeros()
    return graph


def influence(
    graph: Any,
    seeds: Sequence[int] | ArrayLike,
    n_simulations: int = 10_000,
    random_state: Any = None,
) -> InfluenceEstimate:
    """Estimate how many rows the independent cascade reaches from `seeds`, these included.

    Every row that has become active tries once, independently, to activate each of its successors.

    Parameters
    ----------
    graph
        Square scipy sparse matrix of probabilities; entry (v, u) is that of v activating u.
    seeds
        Rows active at the start.
    n_simulations
        Cascades to average over.
    random_state
        None, an integer, or a numpy ``Generator`` or ``RandomState``. The same integer gives the
        same coin for every edge of every simulation, whatever the seeds: differences between sets
        of seeds are much less noisy than the two estimates.

    Raises
    ------
    DataError
        If the graph is not square or holds something that is no probability, or if a seed or
        `n_simulations` is out of range.

    Examples
    --------
    >>> from scipy.sparse import csr_array
    >>> chain = csr_array([[0, 0.5, 0], [0, 0, 0.5], [0, 0, 0]])
    >>> mean, standard_error = influence(chain, [0], 40_000, random_state=0)
    >>> abs(mean - 1.75) < 4 * standard_error
    True
    """
    coins = _Coins(_checked_graph(graph), random_state)
    n = coins.graph.shape[0]
    chosen = _checked_seeds(seeds, n)
    n_simulations = _checked_simulations(n_simulations)
    total = squares = 0
    block = max(1, _CASCADE_MARKS // n)
    for start in range(0, n_simulations, block):
        simulations = np.arange(start, min(start + block, n_simulations))
        reached = np.zeros(len(simulations), dtype=np.int64)
        for layer, _ in _cascade(coins, chosen, simulations):
            reached += np.bincount(layer, minlength=len(simulations))
        total += int(reached.sum())
        squares += int((reached**2).sum())
    mean = total / n_simulations
    if n_simulations == 1:
        return InfluenceEstimate(mean, math.nan)
    # Integers until here, so that the result does not depend on the blocks.
    variance = (squares * n_simulations - total**2) / (n_simulations * (n_simulations - 1))
    return InfluenceEstimate(mean, math.sqrt(variance / n_simulations))


def diffusion_layers(
    graph: Any, seeds: Sequence[int] | ArrayLike, random_state: Any = None
) -> list[NDArray[np.int64]]:
    """Return the rows that one random cascade activates, round by round.

    Auto-IDEAL labels the layers in this order with a model, prompted by rows of earlier layers.

    Parameters
    ----------
    graph, seeds, random_state
        As for `influence`, of which this is the first simulation.

    Returns
    -------
    list of int64 arrays
        The seeds as given, then the rows activated in round 1, 2, ... in ascending order. No row
        occurs twice and no layer is empty.

    Raises
    ------
    DataError
        As `influence`.

    Examples
    --------
    >>> from scipy.sparse import csr_array
    >>> certain = csr_array([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    >>> [layer.tolist() for layer in diffusion_layers(certain, [0])]
    [[0], [1, 2], [3]]
    """
    coins = _Coins(_checked_graph(graph), random_state)
    chosen = _checked_seeds(seeds, coins.graph.shape[0])
    layers = [rows for _, rows in _cascade(coins, chosen, np.zeros(1, dtype=np.int64))]
    return [chosen, *layers[1:]]


class InfluenceSelector(Selector):
    """Choose the rows that together reach most of the pool by diffusion on its similarity graph.

    Every row may activate its k most similar rows, with probabilities that sum to 1. The influence
    of a set is the expected number of rows that the independent cascade reaches from it. The
    selector adds, one at a time, the row that raises the influence most.

    Parameters
    ----------
    n_select
        Rows to pick.
    k
        Successors of each row in the graph.
    n_simulations
        Random graphs over which the influence is averaged; the same for all picks. With more of
        them another seed gives a more similar selection. Time and memory grow in proportion.
    metric
        ``"cosine"`` or ``"dot"``, see `similarity_graph`.
    center
        Whether the pool's mean is subtracted first.
    random_state
        None, an integer, or a numpy ``Generator`` or ``RandomState``.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows in pick order.
    marginal_gains_ : float64 array of shape (n_select,)
        By how many rows, on average over the simulations, each pick raised the influence. Never
        rises.
    influence_ : float64 array of shape (n_select,)
        Rows reached by the first 1, 2, ... picks together with the rows labelled before. As greedy
        choice favours rows that were lucky in these simulations it is too high by a little;
        `influence` with another seed estimates without that bias.
    graph_ : csr_array of shape (N, N)
        The probabilities, float64.

    Notes
    -----
    *Exact greedy.* The coins of all edges are tossed once for all picks (the "live-edge" form of
    the cascade), so that the influence is the mean number of rows reachable in `n_simulations`
    fixed graphs. That is monotone and submodular, whence the guarantee: at least
    ``1 - (1 - 1/m)**m`` (more than 0.632) of the influence of the best m rows. It holds for
    the influence, not for the accuracy of whatever is trained on the picks. Lazy evaluation (CELF)
    leaves the result of plain greedy choice unchanged; it starts from an upper bound, the number of
    paths in each graph after merging its strongly connected components, so that most rows are never
    evaluated. Equal gains go to the lowest row; when nothing is left to gain, so do the picks.

    *Departures from the released code.* Its first pick is always row 0, it tosses new coins for
    every candidate, by default for ten simulations only, and it counts a row twice that two others
    activate in the same round. Here, negative similarities count as 0.

    *Cost.* Time and memory (about 20 bytes per row) in proportion to the simulations. Cheap on
    similarity graphs, where the probabilities of a row sum to 1 and cascades are short. On a graph
    of your own whose cascades reach most of the pool each evaluation takes time in proportion to
    what it reaches: minutes for thousands of rows.

    References
    ----------
    Shaokun Zhang, Xiaobo Xia, Zhaoqing Wang, Ling-Hao Chen, Jiale Liu, Qingyun Wu and Tongliang
    Liu. "IDEAL: Influence-Driven Selective Annotations Empower In-Context Learners in Large
    Language Models". ICLR 2024. arXiv:2310.10873.

    David Kempe, Jon Kleinberg and Eva Tardos. "Maximizing the Spread of Influence through a Social
    Network". KDD 2003.

    Jure Leskovec, Andreas Krause, Carlos Guestrin, Christos Faloutsos, Jeanne VanBriesen and
    Natalie Glance. "Cost-effective Outbreak Detection in Networks". KDD 2007.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> pool = np.concatenate([rng.normal(center, 0.3, size=(20, 2)) for center in (-5, 5)])
    >>> selector = InfluenceSelector(n_select=2, k=5, random_state=0).fit(pool)
    >>> sorted((selector.selected_indices_ // 20).tolist())  # one of each group
    [0, 1]
    """

    marginal_gains_: NDArray[np.float64]
    influence_: NDArray[np.float64]
    graph_: csr_array[np.float64, tuple[int, int]]

    def __init__(
        self,
        n_select: int = 100,
        k: int = 10,
        n_simulations: int = 200,
        metric: str = "cosine",
        center: bool = True,
        random_state: Any = None,
    ) -> None:
        self.n_select = n_select
        self.k = k
        self.n_simulations = n_simulations
        self.metric = metric
        self.center = center
        self.random_state = random_state

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any = None,
        y: None = None,
        *,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        graph: Any = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Choose rows of the pool.

        Parameters
        ----------
        X
            Vectors ``(N, d)``, or a square scipy sparse matrix of probabilities.
        y
            Ignored.
        already_labeled
            Rows that are labelled already. They are active from the start and not picked again.
        graph
            The square sparse matrix of probabilities, in place of `X`. Entry (v, u) is the
            probability that v activates u; rows need not sum to 1.
        progress
            Called with (rows picked, `n_select`).

        Raises
        ------
        DataError
            If there is not exactly one of `X` and `graph`, either is unfit, or a parameter is out
            of range.
        """
        if (X is None) == (graph is None):
            raise DataError("give either X (vectors or a sparse graph) or graph=, and not both")
        n_simulations = _checked_simulations(self.n_simulations)
        if graph is not None or issparse(X):
            edges = _checked_graph(X if graph is None else graph)
        else:
            edges = similarity_graph(X, self.k, metric=self.metric, center=self.center)
        n = edges.shape[0]
        labeled = checked_labeled(already_labeled, n)
        n_select = checked_count(self.n_select, n - len(labeled))

        worlds = _LiveGraphs(_Coins(edges, self.random_state), n_simulations)
        reached = worlds.cover(labeled)
        picks, gains = _lazy_greedy(worlds, n_select, labeled, progress)
        self.graph_ = edges
        self.selected_indices_ = picks
        self.marginal_gains_ = gains / n_simulations
        self.influence_ = (reached + np.cumsum(gains)) / n_simulations
        return self

    def reasons(self) -> list[str]:
        """Return for every pick by how many rows it raised the influence."""
        return [f"reaches {gain:.1f} rows more" for gain in self.marginal_gains_]


class _Coins:
    """One fixed random number for every edge of every simulation, computed when it is asked for.

    The numbers are those of the SplitMix64 generator (Steele, Lea and Flood, OOPSLA 2014), whose
    i-th output is a function of its seed and i alone. So neither the order in which edges are
    tried nor the size of blocks changes anything.
    """

    def __init__(self, graph: csr_array[np.float64, tuple[int, int]], random_state: Any) -> None:
        self.graph = graph
        if isinstance(random_state, np.random.RandomState):
            self._seed = int(random_state.randint(2**64, dtype=np.uint64))
        else:
            try:
                rng = np.random.default_rng(random_state)
            except (TypeError, ValueError) as error:
                raise DataError(
                    "random_state must be None, an integer of at least 0 or a numpy generator, got "
                    f"{random_state!r}"
                ) from error
            self._seed = int(rng.integers(2**64, dtype=np.uint64))
        # Of 2**53 equally likely numbers, those below live: exactly the share p, up to rounding.
        self._limits = np.ceil(graph.data * 2.0**53).astype(np.uint64)

    def live(
        self, simulations: NDArray[np.int64], edges: NDArray[np.int64] | None = None
    ) -> NDArray[np.bool_]:
        """Return whether edges live: all in each simulation, or each in the simulation beside it.

        Parameters
        ----------
        simulations
            Numbers of simulations, ``(s,)``.
        edges
            Positions among the graph's entries, ``(s,)``; by default all of them, for a result of
            shape ``(s, entries)``.
        """
        first = simulations.astype(np.uint64) * np.uint64(len(self._limits))
        if edges is None:
            every = np.arange(len(self._limits), dtype=np.uint64)
            return _splitmix64(self._seed, first[:, None] + every) < self._limits
        return _splitmix64(self._seed, first + edges.astype(np.uint64)) < self._limits[edges]


def _splitmix64(seed: int, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return outputs `index` of SplitMix64, shifted to 53 bits; `index` is overwritten."""
    mixed = index
    mixed += np.uint64(1)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(seed)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    mixed >>= np.uint64(11)
    return mixed


def _cascade(
    coins: _Coins, seeds: NDArray[np.int64], simulations: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Run cascades side by side; yield per round (position in `simulations`, row) of the new."""
    n = coins.graph.shape[0]
    starts, targets = coins.graph.indptr.astype(np.int64), coins.graph.indices
    active = np.zeros(len(simulations) * n, dtype=np.bool_)
    states = (np.arange(len(simulations))[:, None] * n + seeds).ravel()
    while len(states):
        active[states] = True
        which, rows = np.divmod(states, n)
        yield which, rows
        edges, degrees = _expanded(starts, rows)
        which = np.repeat(which, degrees)
        states = which * n + targets[edges]
        # A coin is tossed only where it matters.
        open_ = np.flatnonzero(~active[states])
        live = coins.live(simulations[which[open_]], edges[open_])
        states = np.unique(states[open_[live]])


def _expanded(
    starts: NDArray[np.integer[Any]], nodes: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.integer[Any]]]:
    """Return the positions of all edges out of `nodes`, one node's after the other's, and degrees.

    `np.repeat` with the degrees gives each edge what belongs to its node.
    """
    first = starts[nodes]
    degrees = starts[1:][nodes] - first
    ends = degrees.cumsum()
    edges = np.arange(ends[-1] if len(ends) else 0)
    edges += np.repeat(first - ends + degrees, degrees)
    return edges, degrees


class _LiveGraphs:
    """All simulated graphs side by side: state ``r * N + v`` is row v in simulation r.

    Parameters
    ----------
    coins
        Graph and random numbers.
    n_simulations
        How many graphs.

    Attributes
    ----------
    bounds
        int64 ``(N,)``: no row reaches more states than this that are not covered.
    exact
        bool ``(N,)``: where the bound is the very number.
    batch
        Rows that `evaluate` takes at once.
    """

    def __init__(self, coins: _Coins, n_simulations: int) -> None:
        graph = coins.graph
        n = graph.shape[0]
        self.n, self.n_simulations, self.n_states = n, n_simulations, n * n_simulations
        self.bounds = np.zeros(n, dtype=np.int64)
        self.exact = np.zeros(n, dtype=np.bool_)
        rows = np.repeat(np.arange(n), np.diff(graph.indptr))
        forward, backward = _Adjacency(self.n_states), _Adjacency(self.n_states)
        block = max(1, _COINS // max(graph.nnz, n))
        for start in range(0, n_simulations, block):
            simulations = np.arange(start, min(start + block, n_simulations))
            which, edges = np.nonzero(coins.live(simulations))
            ends = which * n + rows[edges], which * n + graph.indices[edges]
            size = len(simulations) * n
            live = csr_array((np.ones(len(edges)), ends), shape=(size, size))
            forward.append(live)
            backward.append(live.T.tocsr())
            self.bounds += _reach_bounds(live, n).reshape(len(simulations), n).sum(axis=0)
        self._forward, self._backward = forward.finish(), backward.finish()
        self._open = np.ones(self.n_states, dtype=np.bool_)
        self.batch = max(1, min(_CANDIDATES, _MARKS // self.n_states))
        self._unseen = np.ones(self.batch * self.n_states, dtype=np.bool_)

    def evaluate(self, rows: NDArray[np.int64]) -> None:
        """Make the bounds of at most `batch` rows exact."""
        states = self._states(rows)
        owners = np.repeat(np.arange(len(rows)), self.n_simulations)
        shifts = np.arange(len(rows)) * self.n_states
        open_ = self._open[states]
        reached = np.zeros(len(rows), dtype=np.int64)
        states, owners = states[open_], owners[open_]
        for _, of in self._search(self._forward, states, owners, shifts, self.n_states):
            reached += np.bincount(of, minlength=len(rows))
        self.bounds[rows] = reached
        self.exact[rows] = True

    def cover(self, rows: NDArray[np.int64]) -> int:
        """Cover all that `rows` reach and lower the bounds by it; return how much was new."""
        states = self._states(rows)
        states = states[self._open[states]]
        owner = np.zeros(len(states), dtype=np.int64)
        search = self._search(self._forward, states, owner, owner[:1], self.n_states)
        new = np.concatenate([states[:0], *(found for found, _ in search)])
        # Rows that reach a new state can gain it no more. Searches backward from all new states
        # find them; as each stays in its simulation, a mark per row is enough for it.
        budget = _BACKWARD * self.n_states
        group = len(self._unseen) // self.n
        for start in range(0, len(new), group):
            states = new[start : start + group]
            owners = np.arange(len(states))
            shifts = (owners - states // self.n) * self.n
            for above, _ in self._search(
                self._backward, states, owners, shifts, self.n, limit=budget
            ):
                np.subtract.at(self.bounds, above % self.n, 1)
                budget -= len(above)
            if budget < 0:
                # Counting on would cost more than new evaluations. What was counted is right, so
                # that the bounds are still bounds.
                self.exact[:] = False
                break
        self._open[new] = False
        return len(new)

    def _states(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the states of the rows in all simulations, row by row."""
        return (rows[:, None] + np.arange(self.n_simulations) * self.n).ravel()

    def _search(
        self,
        adjacency: _Adjacency,
        states: NDArray[np.int64],
        owners: NDArray[np.int64],
        shifts: NDArray[np.int64],
        width: int,
        limit: float = math.inf,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Search for several owners side by side; yield (states, owners) newly found, per round.

        The mark of a state is ``state + shifts[owner]``; the marks of an owner lie between
        ``owner * width`` and ``(owner + 1) * width``. Covered states are passed over. Ends early
        after more than `limit` finds.
        """
        keys = states + shifts[owners]
        found = []
        while len(keys):
            self._unseen[keys] = False
            found.append(keys)
            yield states, owners
            limit -= len(keys)
            if limit < 0:
                break
            edges, degrees = _expanded(adjacency.starts, states)
            ends = adjacency.targets[edges]
            keys = ends + np.repeat(shifts[owners], degrees)
            # Rows reachable from covered ones are covered too, so nothing lies beyond these.
            keys = _distinct(keys[self._unseen[keys] & self._open[ends]])
            owners = keys // width
            states = keys - shifts[owners]
        for keys in found:
            self._unseen[keys] = True


class _Adjacency:
    """Lists of neighbours in a block-diagonal graph, whose blocks are appended in order."""

    starts: NDArray[np.signedinteger[Any]]
    targets: NDArray[np.signedinteger[Any]]

    def __init__(self, n_states: int) -> None:
        self._dtype = np.int32 if n_states < 2**31 else np.int64
        self._starts: list[NDArray[Any]] = [np.zeros(1, dtype=np.int64)]
        self._targets: list[NDArray[Any]] = []
        self._n_states = self._n_edges = 0

    def append(self, block: csr_array[Any, tuple[int, int]]) -> None:
        """Append the neighbours in one block."""
        self._starts.append(block.indptr[1:].astype(np.int64) + self._n_edges)
        self._targets.append((block.indices + self._n_states).astype(self._dtype))
        self._n_states += block.shape[0]
        self._n_edges += len(block.indices)

    def finish(self) -> Self:
        """Join the blocks."""
        wide = np.int32 if self._n_edges < 2**31 else np.int64
        self.starts = np.concatenate([part.astype(wide) for part in self._starts])
        self.targets = np.concatenate(self._targets)
        self._starts, self._targets = [], []
        return self


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the distinct values in order, faster than `numpy.unique`; `values` gets sorted."""
    values.sort()
    first = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


def _reach_bounds(live: csr_array[np.float64, tuple[int, int]], most: int) -> NDArray[np.int64]:
    """Return for every state a bound on how many it reaches, itself included, at most `most`.

    Strongly connected components are merged. A component's bound is its size plus the bounds of
    its successors, which is exact where no two paths meet again.
    """
    count, labels = connected_components(live, connection="strong")
    sources = np.repeat(labels, np.diff(live.indptr))
    targets = labels[live.indices]
    between = sources != targets
    ones = np.ones(int(between.sum()), dtype=np.int8)
    # From successors to predecessors; the conversion merges parallel edges.
    back = coo_array((ones, (targets[between], sources[between])), shape=(count, count)).tocsr()
    waiting = np.bincount(back.indices, minlength=count)
    bounds = np.bincount(labels, minlength=count)
    done = np.flatnonzero(waiting == 0)
    while len(done):
        bounds[done] = np.minimum(bounds[done], most)
        edges, degrees = _expanded(back.indptr, done)
        above = back.indices[edges]
        np.add.at(bounds, above, np.repeat(bounds[done], degrees))
        np.subtract.at(waiting, above, 1)
        finished = above[waiting[above] == 0]
        done = _distinct(finished.astype(np.int64))
    return bounds[labels]


def _lazy_greedy(
    worlds: _LiveGraphs,
    n_select: int,
    excluded: NDArray[np.int64],
    progress: Callable[[int, int], None] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows that plain greedy choice picks, and their gains summed over simulations."""
    open_ = np.ones(worlds.n, dtype=np.bool_)
    open_[excluded] = False
    picks = np.empty(n_select, dtype=np.int64)
    gains = np.empty(n_select, dtype=np.int64)
    for i in range(n_select):
        while True:
            bounds = np.where(open_, worlds.bounds, -1)
            # The lowest of equal ones. If its bound is exact, no other row gains more.
            best = int(bounds.argmax())
            if worlds.exact[best]:
                break
            # With it the next ones in line, as many as keep the search small.
            size = min(worlds.batch, worlds.n, max(1, _MARKS // int(4 * bounds[best] + 1)))
            bounds[worlds.exact] = -1
            top = np.argpartition(bounds, worlds.n - size)[worlds.n - size :]
            if best not in top:
                top[0] = best
            worlds.evaluate(top[bounds[top] >= 0])
        picks[i], gains[i] = best, worlds.bounds[best]
        open_[best] = False
        worlds.cover(picks[i : i + 1])
        if progress is not None:
            progress(i + 1, n_select)
    return picks, gains


def _checked_graph(graph: Any) -> csr_array[np.float64, tuple[int, int]]:
    """Return a graph of probabilities as float64 CSR, a copy without zeros and loops."""
    sparse: bool = issparse(graph)  # a plain bool, which narrows no type
    if not sparse:
        raise DataError(
            "the graph must be a scipy sparse matrix of probabilities, got "
            f"{type(graph).__name__}; make one with similarity_graph(X)"
        )
    if graph.ndim != 2 or graph.shape[0] != graph.shape[1] or graph.shape[0] == 0:
        raise DataError(
            f"the graph must be square, one row and column per item, got shape {graph.shape}. "
            "Sparse vectors have to be made dense"
        )
    if graph.dtype.kind not in "fiub":
        raise DataError(f"the graph must hold real numbers, got dtype {graph.dtype}")
    edges = graph.tocoo()
    row, column, probability = edges.row, edges.col, edges.data.astype(np.float64)
    away = row != column  # a loop activates nobody
    checked = coo_array(
        (probability[away], (row[away], column[away])), shape=graph.shape
    ).tocsr()  # adds up what occurs twice
    bad = ~((checked.data >= 0) & (checked.data <= 1))
    if bad.any():
        raise DataError(
            f"the graph must hold probabilities from 0 to 1, got {checked.data[bad][0]:g}"
        )
    checked.eliminate_zeros()
    return checked


def _checked_seeds(seeds: Sequence[int] | ArrayLike, n: int) -> NDArray[np.int64]:
    rows = np.asarray(seeds)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise DataError(f"seeds must be a list of row numbers, got {seeds!r}")
    if rows.size == 0:
        raise DataError("seeds must have at least one row")
    if rows.min() < 0 or rows.max() >= n:
        raise DataError(f"seeds must be row numbers from 0 to {n - 1}, got {rows.tolist()}")
    if len(np.unique(rows)) < len(rows):
        raise DataError(f"seeds must be distinct, got {rows.tolist()}")
    return rows.astype(np.int64)


def _checked_simulations(n_simulations: Any) -> int:
    if isinstance(n_simulations, bool) or not isinstance(n_simulations, int | np.integer):
        raise DataError(f"n_simulations must be an integer, got {n_simulations!r}")
    if n_simulations < 1:
        raise DataError(f"n_simulations must be at least 1, got {n_simulations}")
    return int(n_simulations)
