"""Influence against enumeration, closed forms, cynetdiff and plain greedy choice. 10 seconds."""

import itertools
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array, csc_matrix, csr_array
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bakeoff.errors import DataError
from bakeoff.selection import ideal
from bakeoff.selection.ideal import (
    InfluenceSelector,
    diffusion_layers,
    influence,
    similarity_graph,
)


def graph_of(edges, n):
    """A graph from {(from, to): probability}."""
    ends = np.array(list(edges), dtype=np.int64).reshape(-1, 2)
    return coo_array((list(edges.values()), (ends[:, 0], ends[:, 1])), shape=(n, n)).tocsr()


def random_graph(rng, n, density, scale=1.0):
    dense = np.where(rng.random((n, n)) < density, scale * rng.random((n, n)), 0.0)
    dense[(rng.random((n, n)) < 0.05) & (dense > 0)] = 1.0
    return csr_array(dense)


def reached(successors, seeds):
    found, stack = set(seeds), list(seeds)
    while stack:
        for u in successors[stack.pop()]:
            if u not in found:
                found.add(u)
                stack.append(u)
    return found


def exact_influence(graph, seeds):
    """Sum over all patterns of living edges."""
    edges = coo_array(graph)
    total = 0.0
    for pattern in itertools.product([False, True], repeat=edges.nnz):
        probability = np.prod(np.where(pattern, edges.data, 1 - edges.data))
        successors = [[] for _ in range(graph.shape[0])]
        for v, u, lives in zip(edges.row, edges.col, pattern, strict=True):
            if lives:
                successors[v].append(u)
        total += probability * len(reached(successors, seeds))
    return total


def plain_greedy(graph, n_select, n_simulations, seed, labeled=()):
    """Recompute every gain before every pick, on the selector's coins."""
    coins = ideal._Coins(ideal._checked_graph(graph), seed)
    edges = coo_array(coins.graph)
    n = graph.shape[0]
    worlds = []
    for lives in coins.live(np.arange(n_simulations)):
        successors = [[] for _ in range(n)]
        for v, u in zip(edges.row[lives], edges.col[lives], strict=True):
            successors[v].append(int(u))
        worlds.append(successors)
    f = lambda chosen: sum(len(reached(world, chosen)) for world in worlds)  # noqa: E731
    picks, gains, chosen = [], [], list(labeled)
    for _ in range(n_select):
        values = [f([*chosen, v]) if v not in chosen else -1 for v in range(n)]
        picks.append(int(np.argmax(values)))
        gains.append((max(values) - f(chosen)) / n_simulations)
        chosen.append(picks[-1])
    return picks, gains


@pytest.fixture(scope="module")
def wine():
    return StandardScaler().fit_transform(load_wine().data)


@pytest.fixture(scope="module")
def wine_graph(wine):
    return similarity_graph(wine, 10)


# The graph


def test_wine_graph_has_the_weights_of_the_official_code(wine_graph):
    expected = {39: 0.094507, 22: 0.094589, 55: 0.094604, 5: 0.094774, 7: 0.094938}
    expected |= {3: 0.096284, 54: 0.102621, 40: 0.105503, 56: 0.109734, 20: 0.112446}
    assert wine_graph.nnz == 1780
    row = wine_graph[[0]].tocoo()
    assert dict(zip(row.col.tolist(), row.data, strict=True)) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(wine_graph.sum(axis=1), 1, rtol=1e-12)


def test_graph_equals_the_definition():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 5)) + 2
    moved = vectors - vectors.mean(axis=0)
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    for metric, rows in (("cosine", unit), ("dot", moved)):
        similarity = rows @ rows.T
        np.fill_diagonal(similarity, -np.inf)
        expected = np.zeros((40, 40))
        for v in range(40):
            nearest = np.argsort(-similarity[v])[:4]
            expected[v, nearest] = similarity[v, nearest] / similarity[v, nearest].sum()
        graph = similarity_graph(vectors, 4, metric=metric)
        np.testing.assert_allclose(graph.toarray(), expected, atol=1e-5)


def test_center_is_what_it_says():
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((30, 4)) + 1
    centred = (vectors - vectors.mean(axis=0)).astype(np.float32)
    a = similarity_graph(vectors, 3).toarray()
    np.testing.assert_allclose(a, similarity_graph(centred, 3, center=False).toarray(), atol=1e-5)
    assert np.abs(a - similarity_graph(vectors, 3, center=False).toarray()).max() > 0.1


def test_copies_are_successors_of_each_other_and_a_row_is_none_of_its_own():
    rng = np.random.default_rng(2)
    vectors = np.concatenate(
        [np.tile(rng.standard_normal(6), (8, 1)), rng.standard_normal((30, 6))]
    )
    graph = similarity_graph(vectors, 3)
    np.testing.assert_allclose(graph.sum(axis=1), 1, rtol=1e-12)
    assert graph.diagonal().sum() == 0
    assert (np.diff(graph.indptr) == 3).all()
    assert (graph.indices.reshape(-1, 3)[:8] < 8).all()


def test_negative_similarities_count_as_zero_and_a_row_without_others_is_uniform():
    angles = np.deg2rad([0, 80, 160, 270])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    with pytest.warns(UserWarning, match="4 of 4 rows have negative similarities"):
        graph = similarity_graph(vectors, 3, center=False).toarray()
    np.testing.assert_allclose(graph[0], [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(graph[1], [0.5, 0, 0.5, 0], atol=1e-6)
    opposite = np.array([[1.0, 0], [-1, 1], [-1, -1]])
    with pytest.warns(UserWarning, match="3 of 3"):
        graph = similarity_graph(opposite, 2, center=False).toarray()
    np.testing.assert_allclose(graph[0], [0, 0.5, 0.5])


def test_no_warning_up_to_one_percent_of_rows():
    # Row 0 points away from all others, which have each other.
    vectors = np.concatenate([[[-1.0, 0]], np.random.default_rng(0).normal([3, 0], 0.1, (99, 2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        similarity_graph(vectors, 2, center=False)
    with pytest.warns(UserWarning, match="1 of 99 rows"):
        similarity_graph(vectors[:99], 2, center=False)


# The influence


def test_random_numbers_are_those_of_splitmix64():
    # Published outputs of the reference implementation for seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    published += [4593380528125082431, 16408922859458223821]
    ours = ideal._splitmix64(1234567, np.arange(5, dtype=np.uint64))
    assert ours.tolist() == [value >> 11 for value in published]


def test_an_edge_of_every_simulation_lives_with_its_probability():
    probabilities = np.array([0, 1e-3, 0.1, 0.5, 0.9, 1])
    graph = graph_of({(0, i + 1): p for i, p in enumerate(probabilities) if p}, 7)
    coins = ideal._Coins(graph, 5)
    lives = coins.live(np.arange(100_000))
    share = lives.mean(axis=0)
    expected = probabilities[1:]
    assert (np.abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / 100_000)).all()
    assert share[-1] == 1
    some = np.array([3, 99_999, 17])
    assert (coins.live(some) == lives[some]).all()
    edges = np.array([0, 2, 3])
    assert (coins.live(some, edges) == lives[some, edges]).all()


def test_influence_equals_the_sum_over_all_patterns():
    rng = np.random.default_rng(3)
    graph = similarity_graph(rng.standard_normal((5, 3)) + 3, 2, center=False)
    assert graph.nnz == 10
    for seeds in ([0], [3], [1, 4], [0, 2, 3]):
        mean, error = influence(graph, seeds, 20_000, random_state=0)
        assert abs(mean - exact_influence(graph, seeds)) < 3.5 * error


def test_closed_forms():
    p, q, s = 0.3, 0.6, 0.8
    cases = [
        (graph_of({(0, 1): p, (1, 2): q}, 3), [0], 1 + p + p * q),
        (graph_of({(0, 1): p, (0, 2): q, (0, 3): s}, 4), [0], 1 + p + q + s),
        (graph_of({(0, 2): p, (1, 2): q}, 3), [0, 1], 3 - (1 - p) * (1 - q)),
        # A row that two others activate in the same round counts once and tries once.
        (graph_of({(0, 1): 1, (0, 2): 1, (1, 3): 1, (2, 3): 1, (3, 4): q}, 5), [0], 4 + q),
    ]
    for graph, seeds, expected in cases:
        mean, error = influence(graph, seeds, 40_000, random_state=1)
        assert abs(mean - expected) < 3.5 * error
        assert error < 0.01


def test_standard_error_is_that_of_the_mean():
    graph = graph_of({(0, 1): 0.3}, 2)
    mean, error = influence(graph, [0], 1000, random_state=0)
    share = mean - 1
    assert error == pytest.approx(np.sqrt(share * (1 - share) / 999))
    assert np.isnan(influence(graph, [0], 1).standard_error)
    means = [influence(graph, [0], 1000, random_state=i).mean for i in range(300)]
    assert np.std(means) == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize(
    ("seeds", "mean", "error"), [([0], 4.865, 0.012), ([0, 60, 150], 14.970, 0.021)]
)
def test_influence_on_wine_equals_200000_runs_of_cynetdiff(wine_graph, seeds, mean, error):
    ours = influence(wine_graph, seeds, 50_000, random_state=0)
    assert abs(ours.mean - mean) < 3.5 * np.hypot(ours.standard_error, error)


def test_influence_equals_cynetdiff(wine_graph):
    pytest.importorskip("cynetdiff")
    networkx = pytest.importorskip("networkx")
    from cynetdiff.utils import networkx_to_ic_model

    graph = networkx.from_scipy_sparse_array(
        wine_graph, create_using=networkx.DiGraph, edge_attribute="activation_prob"
    )
    model, _ = networkx_to_ic_model(graph, rng=0)
    picks = InfluenceSelector(n_select=3, random_state=0).fit(graph=wine_graph).selected_indices_
    for seeds in ([0], [122], [5, 60], picks.tolist()):
        model.set_seeds(seeds)
        runs = []
        for _ in range(20_000):
            model.reset_model()
            model.advance_until_completion()
            runs.append(model.get_num_activated_nodes())
        ours = influence(wine_graph, seeds, 20_000, random_state=0)
        error = np.hypot(np.std(runs) / np.sqrt(len(runs)), ours.standard_error)
        assert abs(ours.mean - np.mean(runs)) < 3.5 * error


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 9), density=st.floats(0.05, 0.7), seed=st.integers(0, 10_000))
def test_influence_is_monotone_and_submodular(n, density, seed):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, n, density)
    order = rng.permutation(n).tolist()
    small, large, extra = order[: n // 3], order[: 2 * n // 3], order[-1]
    f = lambda rows: influence(graph, rows, 50, seed).mean if rows else 0.0  # noqa: E731
    assert f(small) <= f(large) <= n
    gain_small, gain_large = f([*small, extra]) - f(small), f([*large, extra]) - f(large)
    assert gain_small >= gain_large - 1e-12
    assert gain_large >= 0


def test_layers_are_one_cascade(wine_graph):
    predecessors = wine_graph.tocsc()
    deep = 0
    for seed in range(20):
        layers = diffusion_layers(wine_graph, [7, 3], random_state=seed)
        assert layers[0].tolist() == [7, 3]
        assert all(len(layer) for layer in layers)
        rows = np.concatenate(layers)
        assert len(set(rows.tolist())) == len(rows)
        assert len(rows) == influence(wine_graph, [7, 3], 1, seed).mean
        for before, layer in itertools.pairwise(layers):
            for row in layer:
                assert np.isin(predecessors[:, [row]].tocoo().row, before).any()
        deep += len(layers) > 3
    assert deep > 3
    assert [layer.tolist() for layer in diffusion_layers(csr_array((3, 3)), [2, 0])] == [[2, 0]]


# The search


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(2, 14),
    density=st.floats(0.02, 0.6),
    scale=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 10_000),
    coins=st.sampled_from([1, 300, 2**21]),
    candidates=st.sampled_from([1, 3, 16]),
    marks=st.sampled_from([1, 500, 2**24]),
    backward=st.sampled_from([0, 0.1, 2]),
)
def test_picks_and_gains_are_those_of_plain_greedy(
    n, density, scale, seed, coins, candidates, marks, backward
):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, n, density, scale)
    labeled = rng.permutation(n)[: rng.integers(0, n)].tolist()
    n_select = int(rng.integers(1, n - len(labeled) + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ideal, "_COINS", coins)
        patch.setattr(ideal, "_CANDIDATES", candidates)
        patch.setattr(ideal, "_MARKS", marks)
        patch.setattr(ideal, "_CASCADE_MARKS", coins)
        patch.setattr(ideal, "_BACKWARD", backward)
        selector = InfluenceSelector(n_select, n_simulations=12, random_state=seed)
        selector.fit(graph=graph, already_labeled=labeled)
        f = [
            influence(graph, [*labeled, *selector.selected_indices_[: i + 1]], 12, seed).mean
            for i in range(n_select)
        ]
    picks, gains = plain_greedy(graph, n_select, 12, seed, labeled)
    assert selector.selected_indices_.tolist() == picks
    np.testing.assert_allclose(selector.marginal_gains_, gains, atol=1e-12)
    np.testing.assert_allclose(selector.influence_, f, atol=1e-12)


def test_picks_on_wine_are_those_of_plain_greedy(wine, wine_graph):
    selector = InfluenceSelector(12, n_simulations=30, random_state=4).fit(wine)
    picks, gains = plain_greedy(wine_graph, 12, 30, 4)
    assert selector.selected_indices_.tolist() == picks
    np.testing.assert_allclose(selector.marginal_gains_, gains)
    assert (selector.graph_ != wine_graph).nnz == 0


def test_evaluates_few_rows():
    vectors = np.random.default_rng(0).standard_normal((1500, 64))
    evaluated = []
    with pytest.MonkeyPatch.context() as patch:
        original = ideal._LiveGraphs.evaluate
        patch.setattr(
            ideal._LiveGraphs,
            "evaluate",
            lambda self, rows: evaluated.extend(rows) or original(self, rows),
        )
        InfluenceSelector(50, random_state=0).fit(vectors)
    assert len(evaluated) < 1500  # plain greedy: 75,000


@pytest.mark.parametrize("size", [2, 3])
def test_greedy_keeps_its_guarantee(size):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        graph = similarity_graph(rng.standard_normal((9, 3)) + 2, 2, center=False)
        f = {
            rows: influence(graph, rows, 2000, seed).mean
            for rows in itertools.combinations(range(9), size)
        }
        selector = InfluenceSelector(size, n_simulations=2000, random_state=seed).fit(graph=graph)
        achieved = f[tuple(sorted(selector.selected_indices_.tolist()))]
        assert achieved == pytest.approx(selector.influence_[-1])
        assert achieved >= (1 - (1 - 1 / size) ** size) * max(f.values())
        assert achieved >= np.mean(list(f.values()))


def test_first_pick_is_the_best_row_and_not_the_first(wine_graph):
    selector = InfluenceSelector(1, n_simulations=2000, random_state=0).fit(graph=wine_graph)
    best = int(selector.selected_indices_[0])
    other = influence(wine_graph, [best], 20_000, random_state=1)
    assert other.mean > 5.5 > 5 > influence(wine_graph, [0], 20_000, random_state=1).mean


def test_gains_fall_and_add_up(wine_graph):
    selector = InfluenceSelector(178, random_state=0).fit(graph=wine_graph)
    assert sorted(selector.selected_indices_) == list(range(178))
    assert (np.diff(selector.marginal_gains_) <= 1e-12).all()
    np.testing.assert_allclose(np.cumsum(selector.marginal_gains_), selector.influence_)
    assert selector.influence_[-1] == 178


def test_equal_gains_go_to_the_lowest_row():
    alone = InfluenceSelector(3, n_simulations=5).fit(graph=csr_array((6, 6)))
    assert alone.selected_indices_.tolist() == [0, 1, 2]
    assert alone.marginal_gains_.tolist() == [1, 1, 1]
    ring = graph_of({(i, (i + 1) % 6): 1.0 for i in range(6)}, 6)
    around = InfluenceSelector(3, n_simulations=5).fit(graph=ring, already_labeled=[])
    assert around.selected_indices_.tolist() == [0, 1, 2]
    assert around.marginal_gains_.tolist() == [6, 0, 0]


def test_long_chains_and_dense_graphs():
    n = 1000
    chain = graph_of({(i, i + 1): 1.0 for i in range(n - 1)}, n)
    selector = InfluenceSelector(3, n_simulations=3).fit(graph=chain)
    assert selector.marginal_gains_.tolist() == [n, 0, 0]
    middle = InfluenceSelector(2, n_simulations=3).fit(graph=chain, already_labeled=[600])
    assert middle.selected_indices_.tolist() == [0, 1]
    assert middle.marginal_gains_.tolist() == [600, 0]
    hub = graph_of({(i, 0): 1.0 for i in range(1, n)}, n)
    assert InfluenceSelector(2).fit(graph=hub).marginal_gains_.tolist() == [2, 1]
    dense = csr_array(np.random.default_rng(0).random((60, 60)))
    selector = InfluenceSelector(4, n_simulations=6, random_state=0).fit(graph=dense)
    assert selector.selected_indices_.tolist() == plain_greedy(dense, 4, 6, 0)[0]


def test_continuing_a_selection_gives_its_rest(wine):
    whole = InfluenceSelector(20, random_state=0).fit(wine)
    first = whole.selected_indices_[:8]
    rest = InfluenceSelector(12, random_state=0).fit(wine, already_labeled=first)
    assert rest.selected_indices_.tolist() == whole.selected_indices_[8:].tolist()
    np.testing.assert_allclose(rest.influence_, whole.influence_[8:])


def test_more_simulations_make_selections_more_alike(wine_graph):
    def overlap(n_simulations):
        picks = [
            set(InfluenceSelector(18, n_simulations=n_simulations, random_state=i)
                .fit(graph=wine_graph).selected_indices_.tolist())
            for i in range(4)
        ]  # fmt: skip
        return np.mean([len(a & b) / len(a | b) for a, b in itertools.combinations(picks, 2)])

    assert overlap(1000) > overlap(20) + 0.1


# The estimator


@pytest.mark.parametrize(
    "make", [lambda: 3, lambda: np.random.default_rng(3), lambda: np.random.RandomState(3)]
)
def test_same_random_state_same_picks(wine, make):
    a, b = (InfluenceSelector(10, random_state=make()).fit(wine) for _ in range(2))
    assert a.selected_indices_.tolist() == b.selected_indices_.tolist()
    assert a.selected_indices_.dtype == np.int64
    c = InfluenceSelector(10, random_state=4).fit(wine)
    assert a.selected_indices_.tolist() != c.selected_indices_.tolist()


def test_is_an_estimator(wine, wine_graph):
    selector = InfluenceSelector(n_select=5, k=7, random_state=0)
    assert clone(selector).get_params() == selector.get_params()
    direct = selector.fit(StandardScaler().fit_transform(load_wine().data)).selected_indices_
    pipeline = make_pipeline(StandardScaler(), clone(selector)).fit(load_wine().data)
    assert pipeline[-1].selected_indices_.tolist() == direct.tolist()
    restored = pickle.loads(pickle.dumps(selector))
    assert restored.selected_indices_.tolist() == direct.tolist()
    assert selector.select(wine, 3).tolist() == direct[:3].tolist()
    sparse = selector.select(csc_matrix(wine_graph), 3)
    assert sparse.tolist() == selector.select(None, 3, graph=wine_graph).tolist()


def test_reasons_and_progress(wine):
    calls = []
    selector = InfluenceSelector(3, random_state=0).fit(wine, progress=lambda *a: calls.append(a))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert selector.reasons()[0] == f"reaches {selector.marginal_gains_[0]:.1f} rows more"
    assert len(selector.reasons()) == 3


def test_loops_and_explicit_zeros_change_nothing(wine_graph):
    dense = wine_graph.toarray()
    np.fill_diagonal(dense, 0.5)
    rows, columns = np.nonzero(np.ones_like(dense))
    padded = coo_array((dense.ravel(), (rows, columns)), shape=dense.shape)
    a = InfluenceSelector(5, random_state=0).fit(graph=padded).selected_indices_
    assert a.tolist() == InfluenceSelector(5, random_state=0).select(wine_graph).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_select": 179}, "n_select must be between 1 and 178"),
        ({"n_select": 0}, "n_select must be between"),
        ({"n_select": 2.0}, "n_select must be an integer"),
        ({"k": 178}, "k must be between 1 and 177"),
        ({"k": 0}, "k must be between"),
        ({"k": 1.5}, "k must be an integer, got 1.5"),
        ({"n_simulations": 0}, "n_simulations must be at least 1, got 0"),
        ({"n_simulations": "many"}, "n_simulations must be an integer"),
        ({"metric": "euclidean"}, 'metric must be "cosine" or "dot"'),
        ({"random_state": -1}, "random_state must be"),
        ({"random_state": "x"}, "random_state must be"),
    ],
)
def test_bad_parameters(wine, options, message):
    with pytest.raises(DataError, match=message):
        InfluenceSelector(**{"n_select": 5} | options).fit(wine)


def test_bad_data(wine, wine_graph):
    selector = InfluenceSelector(5)
    with pytest.raises(DataError, match="either X"):
        selector.fit()
    with pytest.raises(DataError, match="either X"):
        selector.fit(wine, graph=wine_graph)
    for row, message in ((np.nan, "NaN or inf in row 3"), (0, "only zeros.* in row 3")):
        broken = wine.copy()
        broken[3] = row
        with pytest.raises(DataError, match=message):
            selector.fit(broken)
    with pytest.raises(DataError, match=r"must be square.*made dense"):
        selector.fit(csr_array(wine))
    with pytest.raises(DataError, match="scipy sparse matrix of probabilities, got ndarray"):
        selector.fit(graph=wine_graph.toarray())
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(DataError, match="probabilities from 0 to 1"):
            selector.fit(graph=graph_of({(0, 1): bad}, 9))
    with pytest.raises(DataError, match="real numbers"):
        selector.fit(graph=graph_of({(0, 1): 1j}, 9))
    with pytest.raises(DataError, match="already_labeled has row 1 twice"):
        selector.fit(wine, already_labeled=[1, 1])
    with pytest.raises(DataError, match="between 1 and 2"):
        selector.fit(wine, already_labeled=range(176))
    for seeds, message in (
        ([178], "seeds must be row numbers from 0 to 177"),
        ([-1], "seeds must be row numbers"),
        ([1, 1], "seeds must be distinct"),
        ([], "at least one row"),
        ([0.5], "list of row numbers"),
    ):
        with pytest.raises(DataError, match=message):
            influence(wine_graph, seeds)
        with pytest.raises(DataError, match=message):
            diffusion_layers(wine_graph, seeds)
