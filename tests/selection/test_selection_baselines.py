"""The simple selectors against submodlib, exhaustive search and plain greedy loops. 10 seconds."""

import itertools
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.metrics import pairwise_distances
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from bakeoff.errors import DataError
from bakeoff.selection import baselines
from bakeoff.selection.baselines import (
    BalancedRandomSelector,
    FacilityLocationSelector,
    FarthestFirstSelector,
    KMeansSelector,
    LeastConfidenceSelector,
    RandomSelector,
    TypicalClusterSelector,
)

WINE = StandardScaler().fit_transform(load_wine().data)
CANCER = StandardScaler().fit_transform(load_breast_cancer().data)
DIGITS = load_digits().data[:400]
ON_VECTORS = [
    KMeansSelector(4, random_state=0),
    TypicalClusterSelector(4, random_state=0),
    FarthestFirstSelector(4),
    FacilityLocationSelector(4),
    FacilityLocationSelector(4, n_neighbors=3),
]
by_type = lambda selector: type(selector).__name__  # noqa: E731


def cosines(X):
    """Centred cosines in float64, negative ones 0."""
    X = X - X.mean(axis=0)
    X = X / np.linalg.norm(X, axis=1, keepdims=True)
    return np.clip(X @ X.T, 0, None)


def covered(S, chosen):
    return S[:, list(chosen)].max(axis=1).clip(0).sum() if len(chosen) else 0.0


def plain_greedy(S, n, labeled=()):
    """All gains anew for each pick; the lowest of the best rows."""
    chosen, picks, gains = list(labeled), [], []
    for _ in range(n):
        now = covered(S, chosen)
        gain = [
            -1.0 if row in chosen else covered(S, [*chosen, row]) - now for row in range(len(S))
        ]
        picks.append(int(np.argmax(gain)))
        gains.append(max(gain))
        chosen.append(picks[-1])
    return picks, gains


# Facility location.


def by_submodlib(S, n, optimizer):
    function = pytest.importorskip("submodlib.functions.facilityLocation").FacilityLocationFunction
    objective = function(
        n=len(S), mode="dense", sijs=S.astype(np.float32), separate_rep=S.shape[0] != S.shape[1]
    )
    found = objective.maximize(
        budget=n,
        optimizer=optimizer,
        stopIfZeroGain=False,
        stopIfNegativeGain=False,
        show_progress=False,
    )
    picks = [row for row, _ in found]
    return picks, [gain for _, gain in found], objective.evaluate(set(picks))


@pytest.mark.parametrize("optimizer", ["NaiveGreedy", "LazyGreedy"])
@pytest.mark.parametrize("X", [WINE, CANCER, DIGITS], ids=["wine", "cancer", "digits"])
def test_facility_location_equals_submodlib(X, optimizer):
    picks, gains, objective = by_submodlib(cosines(X), 20, optimizer)
    chosen = FacilityLocationSelector(20).fit(X)
    assert chosen.selected_indices_.tolist() == picks
    np.testing.assert_allclose(chosen.gains_, gains, rtol=1e-4, atol=1e-3)
    assert chosen.objective_ == pytest.approx(objective, rel=1e-5)
    given = FacilityLocationSelector(20, metric="precomputed").fit(cosines(X))
    assert given.selected_indices_.tolist() == picks
    assert given.objective_ == pytest.approx(objective, rel=1e-5)


def test_negative_similarities_count_as_nothing_as_in_submodlib():
    S = np.random.default_rng(3).uniform(-1, 1, (40, 40))
    picks, gains, objective = by_submodlib(S, 12, "NaiveGreedy")
    chosen = FacilityLocationSelector(12, metric="precomputed").fit(S)
    assert chosen.selected_indices_.tolist() == picks
    np.testing.assert_allclose(chosen.gains_, gains, rtol=1e-5, atol=1e-5)
    assert chosen.objective_ == pytest.approx(objective, rel=1e-5)


@pytest.mark.parametrize("n_neighbors", [1, 5, 60, len(WINE) - 1])
def test_facility_location_on_neighbours_is_that_of_the_masked_matrix(n_neighbors):
    S = cosines(WINE)
    ranked = S + 2 * np.eye(len(S))  # itself, then the others by similarity
    kept = np.argsort(-ranked, axis=1, kind="stable")[:, : n_neighbors + 1]
    masked = np.zeros_like(S)
    np.put_along_axis(masked, kept, np.take_along_axis(S, kept, axis=1), axis=1)
    picks, _, objective = by_submodlib(masked, 15, "NaiveGreedy")
    chosen = FacilityLocationSelector(15, n_neighbors=n_neighbors).fit(WINE)
    assert chosen.objective_ == pytest.approx(objective, rel=1e-5)
    if n_neighbors > 1:  # with one, whole groups of gains tie up to rounding
        assert chosen.selected_indices_.tolist() == picks


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(1, 12), scale=st.sampled_from([1.0, 3.0, 2**-10, 1e6]))
def test_facility_location_is_plain_greedy_with_ties(data, size, scale):
    # Few distinct values: ties are the rule, and sums are exact (in the multiples of 2⁻²³ that
    # similarities are rounded to, which is why no scale is a decimal fraction).
    entries = st.lists(st.integers(-2, 4), min_size=size * size, max_size=size * size)
    S = np.array(data.draw(entries), dtype=float).reshape(size, size)
    labeled = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size - 1))
    n = data.draw(st.integers(1, size - len(labeled)))
    picks, gains = plain_greedy(S, n, labeled)
    for given_as in (S * scale, sparse.csr_matrix(S * scale), sparse.coo_array(S * scale)):
        chosen = FacilityLocationSelector(n, metric="precomputed")
        chosen.fit(given_as, already_labeled=labeled)
        assert chosen.selected_indices_.tolist() == picks
        np.testing.assert_allclose(chosen.gains_, np.array(gains) * scale, rtol=1e-6)
        assert chosen.objective_ == pytest.approx(covered(S, [*labeled, *picks]) * scale, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_facility_location_reaches_its_share_of_the_optimum(seed):
    X = np.random.default_rng(seed).standard_normal((13, 3))
    S = cosines(X)
    for n in (2, 3, 4):
        best = max(covered(S, subset) for subset in itertools.combinations(range(13), n))
        reached = FacilityLocationSelector(n).fit(X).objective_
        assert (1 - (1 - 1 / n) ** n) * best <= reached <= best + 1e-5


def test_similarities_need_not_be_held(monkeypatch):
    held = FacilityLocationSelector(30).fit(CANCER, already_labeled=[5, 200])
    monkeypatch.setattr(baselines, "_DENSE_ENTRIES", 0)
    for entries in (1, 10_000, 2**25):
        monkeypatch.setattr(baselines, "_COMPUTED_ENTRIES", entries)
        anew = FacilityLocationSelector(30).fit(CANCER, already_labeled=[5, 200])
        np.testing.assert_array_equal(anew.selected_indices_, held.selected_indices_)
        np.testing.assert_allclose(anew.gains_, held.gains_, atol=1e-4)


def test_results_do_not_depend_on_the_blocks_read(monkeypatch):
    expected = FacilityLocationSelector(60).fit(WINE)
    for entries in (1, 1000):
        monkeypatch.setattr(baselines, "_READ_ENTRIES", entries)
        found = FacilityLocationSelector(60).fit(WINE)
        np.testing.assert_array_equal(found.selected_indices_, expected.selected_indices_)
        np.testing.assert_array_equal(found.gains_, expected.gains_)  # to the last bit


@pytest.mark.parametrize("n_neighbors", [None, 10])
def test_facility_location_continues_where_it_stopped(n_neighbors):
    whole = FacilityLocationSelector(12, n_neighbors=n_neighbors).fit(WINE)
    first, rest = np.split(whole.selected_indices_, [5])
    assert FacilityLocationSelector(5, n_neighbors=n_neighbors).select(WINE).tolist() == [*first]
    more = FacilityLocationSelector(7, n_neighbors=n_neighbors).fit(WINE, already_labeled=first)
    np.testing.assert_array_equal(more.selected_indices_, rest)
    np.testing.assert_array_equal(more.gains_, whole.gains_[5:])
    assert more.objective_ == whole.objective_
    assert whole.gains_.sum() == pytest.approx(whole.objective_, rel=1e-12)
    assert (np.diff(whole.gains_) <= 0).all()


def test_facility_location_leaves_its_input_alone():
    for S in (cosines(WINE).astype(np.float32), sparse.csr_array(cosines(WINE), dtype=np.float32)):
        before = S.copy()
        FacilityLocationSelector(3, metric="precomputed").fit(S)
        assert abs(before - S).sum() == 0


def test_all_can_be_picked_and_then_cover_themselves():
    chosen = FacilityLocationSelector(len(WINE)).fit(WINE)
    assert sorted(chosen.selected_indices_) == list(range(len(WINE)))
    assert chosen.objective_ == len(WINE)


# Farthest first.


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_farthest_first_follows_its_definition(metric):
    X = WINE - WINE.mean(axis=0)
    D = pairwise_distances(X, metric=metric)
    centre = X / np.linalg.norm(X, axis=1, keepdims=True) if metric == "cosine" else X
    chosen = [int(np.linalg.norm(centre - centre.mean(axis=0), axis=1).argmin())]
    distances = [np.inf]
    for _ in range(11):
        nearest = D[:, chosen].min(axis=1)
        chosen.append(int(nearest.argmax()))
        distances.append(nearest.max())
    found = FarthestFirstSelector(12, metric=metric).fit(WINE)
    assert found.selected_indices_.tolist() == chosen
    np.testing.assert_allclose(found.distances_, distances, rtol=1e-5)
    assert found.radius_ == pytest.approx(D[:, chosen].min(axis=1).max(), rel=1e-5)
    more = FarthestFirstSelector(8, metric=metric).fit(WINE, already_labeled=chosen[:4])
    assert more.selected_indices_.tolist() == chosen[4:]
    assert more.radius_ == found.radius_
    assert more.reasons()[0] == f"{distances[4]:.2f} from the nearest pick or labelled row"
    assert found.reasons()[:2] == [
        "first: nearest to the mean",
        f"{distances[1]:.2f} from the nearest pick",
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), start=st.sampled_from(["mean", "random"]))
def test_farthest_first_is_within_twice_the_optimum(seed, n, start):
    X = np.random.default_rng(seed).standard_normal((10, 2))
    D = pairwise_distances(X)
    best = min(D[:, subset].min(axis=1).max() for subset in itertools.combinations(range(10), n))
    found = FarthestFirstSelector(n, metric="euclidean", start=start, random_state=seed).fit(X)
    assert best - 1e-5 <= found.radius_ <= 2 * best + 1e-5
    assert (np.diff(found.distances_[1:]) <= 0).all()


def test_a_random_start_is_uniform():
    starts = Counter(
        int(FarthestFirstSelector(1, start="random", random_state=seed).select(WINE[:5])[0])
        for seed in range(500)
    )
    assert all(abs(starts[row] - 100) < 45 for row in range(5))  # 5 standard deviations


# Clusters.


def separated(n_clusters=6, size=30, width=0.05):
    rng = np.random.default_rng(1)
    centres = 4 * np.eye(n_clusters, 8)
    truth = np.repeat(np.arange(n_clusters), size + 5 * np.arange(n_clusters)[::-1])
    return centres[truth] + width * rng.standard_normal((len(truth), 8)), truth


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("kind", [KMeansSelector, TypicalClusterSelector])
def test_one_pick_of_each_separated_cluster_largest_first(kind, metric, batches, monkeypatch):
    if batches:
        monkeypatch.setattr(baselines, "_MINI_BATCH_ROWS", 0)
    X, truth = separated()
    found = kind(6, metric=metric, n_init=10, random_state=0).fit(X)
    assert truth[found.selected_indices_].tolist() == [0, 1, 2, 3, 4, 5]
    more = kind(2, metric=metric, n_init=10, random_state=0)
    picks = more.select(X, already_labeled=[int(np.flatnonzero(truth == c)[0]) for c in range(4)])
    assert truth[picks].tolist() == [4, 5]


def test_k_means_picks_are_nearest_to_the_means_of_their_clusters():
    found = KMeansSelector(9, metric="euclidean", random_state=0).fit(CANCER)
    assert sorted(found.labels_[found.selected_indices_]) == list(range(9))
    for pick in found.selected_indices_.tolist():
        members = np.flatnonzero(found.labels_ == found.labels_[pick])
        distances = np.linalg.norm(CANCER[members] - CANCER[members].mean(axis=0), axis=1)
        assert distances[members == pick][0] <= distances.min() + 1e-3
    assert (np.diff(found.cluster_sizes_) <= 0).all()
    assert found.reasons()[0] == f"centre of a cluster of {found.cluster_sizes_[0]} rows"


def test_typical_rows_are_those_nearest_to_their_neighbours():
    chosen = TypicalClusterSelector(10, metric="euclidean", n_neighbors=7, random_state=0)
    found = chosen.fit(CANCER)
    taken = Counter()
    gone = []
    sizes = np.bincount(found.labels_)
    for pick, distance in zip(found.selected_indices_.tolist(), found.distances_, strict=True):
        label = found.labels_[pick]
        members = np.setdiff1d(np.flatnonzero(found.labels_ == label), gone)
        D = np.sort(pairwise_distances(CANCER[members]), axis=1)
        k = min(7, len(members) // 2)
        typical = D[:, 1 : k + 1].mean(axis=1) if k else np.zeros(1)
        assert distance == pytest.approx(typical.min(), rel=1e-5)
        assert members[typical.argmin()] == pick
        # Whatever comes later is from a cluster that was no better placed in the queue.
        order = (sizes[label] < 5, taken[label], -sizes[label])
        for other in range(len(sizes)):
            free = (found.labels_ == other).sum() > taken[other]
            if free and other != label:
                assert order <= (sizes[other] < 5, taken[other], -sizes[other])
        taken[label] += 1
        gone.append(pick)


def test_small_clusters_give_typical_rows_last():
    X, truth = separated(3, 20)
    X = np.concatenate([X, [[0.0] * 7 + [9.0]], [[0.0] * 7 + [9.1]]])
    truth = np.append(truth, [3, 3])
    chosen = TypicalClusterSelector(
        len(X), metric="euclidean", max_clusters=4, n_init=10, random_state=0
    )
    found = chosen.fit(X)
    assert sorted(found.selected_indices_) == list(range(len(X)))
    assert truth[found.selected_indices_[:3]].tolist() == [0, 1, 2]
    assert truth[found.selected_indices_[-2:]].tolist() == [3, 3]
    any_size = clone(found).set_params(min_cluster_size=1).select(X)
    assert truth[any_size[:4]].tolist() == [0, 1, 2, 3]


def test_clusters_do_not_matter_where_rows_coincide():
    X = np.repeat([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], 4, axis=0)
    found = KMeansSelector(8, random_state=0).fit(X)
    assert len(set(found.selected_indices_.tolist())) == 8
    counts = Counter(found.selected_indices_ // 4)
    assert sorted(counts.values()) == [2, 3, 3]
    assert {int(row) // 4 for row in found.selected_indices_[:3]} == {0, 1, 2}
    assert found.reasons()[0].startswith("centre of")
    assert found.reasons()[3] == "next to the centre of a cluster of 4 rows"


# Random.


def test_random_picks_are_uniform_and_nested():
    counts = np.zeros(10)
    for seed in range(1000):
        picks = RandomSelector(3, random_state=seed).select(range(10), already_labeled=[4])
        assert len(set(picks.tolist())) == 3
        counts[picks] += 1
    assert counts[4] == 0
    assert np.abs(np.delete(counts, 4) - 1000 / 3).max() < 5 * np.sqrt(1000 / 3 * 2 / 3)
    ten = RandomSelector(10, random_state=7).select(range(50))
    np.testing.assert_array_equal(RandomSelector(4, random_state=7).select(range(50)), ten[:4])


def test_random_states():
    pool = range(1000)
    assert not np.array_equal(RandomSelector(9).select(pool), RandomSelector(9).select(pool))
    for make in (np.random.default_rng, np.random.RandomState):
        first, again = (RandomSelector(9, random_state=make(3)).fit(pool) for _ in range(2))
        np.testing.assert_array_equal(first.selected_indices_, again.selected_indices_)
        second = first.fit(pool).selected_indices_  # the generator has moved on
        assert not np.array_equal(second, again.selected_indices_)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_balanced_shares_are_level(data, sizes):
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    labeled = data.draw(
        st.lists(st.integers(0, len(groups) - 1), unique=True, max_size=len(groups) - 1)
    )
    n = data.draw(st.integers(1, len(groups) - len(labeled)))
    seed = data.draw(st.integers(0, 99))
    found = BalancedRandomSelector(n, random_state=seed).fit(
        groups, groups=groups, already_labeled=labeled
    )
    picks = found.selected_indices_.tolist()
    assert len(set(picks)) == n
    assert not set(picks) & set(labeled)
    assert found.groups_ == groups[picks].tolist()
    for prefix in range(1, n + 1):
        count = np.bincount(groups[labeled + picks[:prefix]], minlength=len(sizes))
        picked = np.bincount(groups[picks[:prefix]], minlength=len(sizes))
        # Where a pick was made, no source that has rows left may be more than one behind.
        for source in range(len(sizes)):
            if count[source] < sizes[source] and picked.any():
                assert count[source] >= count[picked > 0].max() - 1


def test_balanced_shares_are_drawn_by_lot_and_rows_uniformly():
    groups = ["a"] * 8 + ["b"] * 4
    rows, odd = np.zeros(12), Counter()
    for seed in range(1500):
        found = BalancedRandomSelector(3, random_state=seed).fit(groups, groups=groups)
        rows[found.selected_indices_] += 1
        odd[Counter(found.groups_).most_common(1)[0][0]] += 1
    assert abs(odd["a"] - 750) < 5 * np.sqrt(1500) / 2
    for part in (rows[:8], rows[8:]):
        assert np.abs(part - part.mean()).max() < 5 * np.sqrt(part.mean())


def test_items_may_know_their_source():
    pool = [SimpleNamespace(source=source) for source in "aaab"]
    found = BalancedRandomSelector(2, random_state=0).fit(pool)
    assert sorted(found.groups_) == ["a", "b"]
    assert found.reasons() == [f"drawn at random from {source}" for source in found.groups_]


# Confidence.


def test_least_confident_first():
    confidence = [0.5, -3.0, 0.5, 0.123456, 9.0]
    found = LeastConfidenceSelector(3).fit("abcde", confidence=confidence)
    assert found.selected_indices_.tolist() == [1, 3, 0]  # of equal ones the lowest row
    assert found.reasons() == ["confidence -3", "confidence 0.123", "confidence 0.5"]
    again = LeastConfidenceSelector(2).select("abcde", confidence=confidence, already_labeled=[1])
    assert again.tolist() == [3, 0]


# All of them.


@pytest.mark.parametrize("selector", ON_VECTORS, ids=by_type)
def test_no_row_is_picked_twice_and_none_that_is_labelled(selector):
    X = np.repeat(WINE[:10], 3, axis=0)  # every row three times
    labeled = [0, 1, 2, 15]
    for n in (4, 26):
        found = clone(selector).set_params(n_select=n).fit(X, already_labeled=labeled)
        picks = found.selected_indices_
        assert picks.dtype == np.int64
        assert len({*picks.tolist(), *labeled}) == n + 4
        assert len(found.reasons()) == n
    if not isinstance(selector, TypicalClusterSelector):  # small clusters come in any order there
        assert len(set(selector.select(X) // 3)) == 4  # distinct rows before copies


@pytest.mark.parametrize("selector", ON_VECTORS[2:4], ids=by_type)
def test_shuffling_the_pool_shuffles_the_picks(selector):
    order = np.random.default_rng(0).permutation(len(CANCER))
    expected = selector.select(CANCER, 15)
    np.testing.assert_array_equal(order[selector.select(CANCER[order], 15)], expected)


@pytest.mark.parametrize("selector", ON_VECTORS, ids=by_type)
def test_centring_makes_shifts_harmless(selector):
    X = np.round(WINE, 2).astype(np.float64)
    np.testing.assert_array_equal(selector.select(X + 8), selector.select(X))
    if not isinstance(selector, TypicalClusterSelector | KMeansSelector):
        apart = clone(selector).set_params(center=False)
        assert not np.array_equal(apart.select(X + 8), apart.select(X))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("selector", ON_VECTORS[:4], ids=by_type)
def test_a_pool_of_one_and_a_pool_of_equals(selector, center):
    selector = clone(selector).set_params(center=center)
    assert selector.select([[3.0, 4.0]], 1).tolist() == [0]
    assert sorted(selector.select([[0.1, 0.7]] * 7, 7)) == list(range(7))


@pytest.mark.parametrize("selector", ON_VECTORS, ids=by_type)
def test_selectors_are_estimators(selector):
    found = clone(selector).fit(WINE)
    assert found.n_features_in_ == WINE.shape[1]
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.selected_indices_, found.selected_indices_)
    assert again.reasons() == found.reasons()
    raw = load_wine().data
    pipeline = make_pipeline(StandardScaler(), clone(selector)).fit(raw)
    np.testing.assert_array_equal(pipeline[-1].selected_indices_, found.selected_indices_)
    np.testing.assert_array_equal(selector.select(WINE, 4), found.selected_indices_)
    assert not hasattr(selector, "selected_indices_")


def test_progress_counts_picks():
    for selector in (FarthestFirstSelector(3), FacilityLocationSelector(3)):
        calls = []
        selector.fit(WINE, progress=lambda *done, calls=calls: calls.append(done))
        assert calls == [(1, 3), (2, 3), (3, 3)]


def test_reasons_give_gains():
    chosen = FacilityLocationSelector(2, metric="precomputed").fit([[1, 0.25], [0.5, 1]])
    assert chosen.reasons() == ["covers 1.5", "covers 0.5"]


REFUSALS = [
    ({"n_select": 179}, {}, "n_select must be between 1 and 178"),
    ({"n_select": 0}, {}, "n_select"),
    ({"n_select": 2.0}, {}, "n_select must be an integer"),
    ({"n_select": 178}, {"already_labeled": [3]}, "between 1 and 177"),
    ({}, {"already_labeled": [3, 3]}, "row 3 twice"),
    ({}, {"already_labeled": [178]}, "178"),
    ({"random_state": -1}, {}, "random_state must be at least 0"),
    ({"random_state": "x"}, {}, "random_state must be"),
    ({"metric": "l1"}, {}, "metric must be"),
    ({"n_init": 0}, {}, "n_init must be"),
    ({"n_neighbors": 0}, {}, "n_neighbors must be"),
    ({"max_clusters": 0}, {}, "max_clusters must be"),
    ({"min_cluster_size": 0}, {}, "min_cluster_size must be"),
    ({"start": "x"}, {}, "start must be"),
]


@pytest.mark.parametrize(
    ("selector", "change", "data", "message"),
    [
        (selector, *refusal)
        for selector in [*ON_VECTORS[:4], RandomSelector(4)]
        for refusal in REFUSALS
        if set(refusal[0]) <= set(selector.get_params())
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "fit") else str(value),
)
def test_refusals(selector, change, data, message):
    selector = clone(selector)
    if "random_state" in change and isinstance(selector, FarthestFirstSelector):
        selector.set_params(start="random")
    with pytest.raises(DataError, match=message):
        selector.set_params(**change).fit(WINE, **data)


@pytest.mark.parametrize(
    ("selector", "X", "data", "message"),
    [
        (FacilityLocationSelector(1), [[np.nan, 1.0]], {}, "row 0"),
        (FarthestFirstSelector(1), [[1.0, 1.0], [0.0, 0.0]], {}, "only zeros.*row 1"),
        (FacilityLocationSelector(1, n_neighbors=3), np.eye(3), {}, "less than the 3 rows"),
        (FacilityLocationSelector(1, "precomputed"), np.ones((2, 3)), {}, "square"),
        (FacilityLocationSelector(1, "precomputed"), sparse.eye_array(3, 2), {}, "square"),
        (
            FacilityLocationSelector(1, "precomputed"),
            sparse.csr_array([[np.inf]]),
            {},
            "NaN or inf",
        ),
        (FacilityLocationSelector(1, "precomputed", n_neighbors=1), np.eye(3), {}, "n_neighbors"),
        (RandomSelector(1), 7, {}, "X must have a length"),
        (RandomSelector(1), [], {}, "at least one row"),
        (BalancedRandomSelector(1), WINE, {}, "groups must give the source"),
        (BalancedRandomSelector(1), "ab", {"groups": ["x"]}, "one label per row, 2, got 1"),
        (BalancedRandomSelector(1), "ab", {"groups": [["x"], ["y"]]}, "groups must be labels"),
        (LeastConfidenceSelector(1), "ab", {}, "confidence must give"),
        (LeastConfidenceSelector(1), "ab", {"confidence": [1.0]}, r"shape \(2,\), got \(1,\)"),
        (LeastConfidenceSelector(1), "ab", {"confidence": [1.0, np.nan]}, "nan for row 1"),
        (LeastConfidenceSelector(1), "ab", {"confidence": ["x", "y"]}, "must be numbers"),
    ],
)
def test_more_refusals(selector, X, data, message):
    with pytest.raises(DataError, match=message):
        selector.fit(X, **data)


OTHER_WORDS = "refused in our own words"
EXPECTED = {
    "check_dtype_object": OTHER_WORDS,
    "check_estimators_empty_data_messages": OTHER_WORDS,
}
NO_COSINE = {"check_estimators_dtypes": "casts to integers, which leaves rows of zeros"}


def expected_failures(selector):
    if isinstance(selector, RandomSelector):
        return {}
    return {**EXPECTED, **(NO_COSINE if selector.metric == "cosine" else {})}


@parametrize_with_checks(
    [
        RandomSelector(1),
        KMeansSelector(1),
        KMeansSelector(1, metric="euclidean"),
        TypicalClusterSelector(1, metric="euclidean"),
        FarthestFirstSelector(1, metric="euclidean"),
        FacilityLocationSelector(1),
        FacilityLocationSelector(1, metric="precomputed"),
    ],
    expected_failed_checks=expected_failures,
)
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
