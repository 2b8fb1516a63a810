"""Vote-k against the authors' code (frozen picks), its set definition, and closed forms."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.neighbors import kneighbors_graph
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bakeoff.errors import DataError
from bakeoff.selection.vote_k import VoteK

# Small pools make k more than a fifth of them; that it warns is tested once, below.
pytestmark = pytest.mark.filterwarnings("ignore:k=.* is more than a fifth")


def standardised(load):
    X = load().data
    return (X - X.mean(axis=0)) / X.std(axis=0)


def random_graph(rng, n, k):
    """A graph with k neighbours for every row, or with 0 to k where ``k`` is negative."""
    rows = []
    for v in range(n):
        others = np.delete(np.arange(n), v)
        size = k if k > 0 else rng.integers(0, -k + 1)
        # Popular columns, so that votes differ and some rows have none.
        weights = (others + 1.0) ** -0.7
        rows.append(rng.choice(others, size, replace=False, p=weights / weights.sum()))
    voters = np.repeat(np.arange(n), [len(row) for row in rows])
    columns = np.concatenate(rows)
    return sp.csr_array((np.ones(len(columns)), (voters, columns)), shape=(n, n))


def as_sets(graph):
    graph = sp.csr_array(graph)
    n = graph.shape[0]
    return [set(graph.indices[graph.indptr[v] : graph.indptr[v + 1]].tolist()) for v in range(n)]


def score_by_definition(neighbours, labeled, u, rho):
    """Sum over the voters v of u that are not labelled of rho ** -(labelled neighbours of v)."""
    return sum(
        (
            Fraction(rho) ** -len(votes & labeled)
            for v, votes in enumerate(neighbours)
            if u in votes and v not in labeled
        ),
        Fraction(0),
    )


def picks_by_definition(neighbours, n_select, rho, labeled=()):
    labeled, picks, scores = set(labeled), [], []
    for _ in range(n_select):
        open_rows = [u for u in range(len(neighbours)) if u not in labeled]
        score = {u: score_by_definition(neighbours, labeled, u, rho) for u in open_rows}
        best = max(open_rows, key=lambda u: (score[u], -u))
        picks.append(best)
        scores.append(float(score[best]))
        labeled.add(best)
    return picks, scores


# ---- the authors' code --------------------------------------------------------------------------

# What `fast_votek` of the released code returns for columns of mean 0 and standard deviation 1.
OFFICIAL = [
    (load_breast_cancer, 15, [241, 339, 459, 393, 271, 229, 206, 308, 320, 302]),
    (
        load_breast_cancer,
        150,
        [211, 94, 46, 95, 311, 320, 230, 522, 114, 167, 283, 144, 61, 181, 125, 555, 87, 249],
    ),
    (load_wine, 15, [174, 5, 80, 42, 163, 128, 30, 90]),
]


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize(("load", "k", "expected"), OFFICIAL)
def test_picks_of_the_authors_code(load, k, expected, compat):
    selector = VoteK(len(expected), k, center=False, compat=compat).fit(standardised(load))
    assert selector.selected_indices_.tolist() == expected
    assert selector.selected_indices_.dtype == np.int64


# The same on ``default_rng(seed).standard_normal((n, 3))`` with a small k, where most picks are
# ties. Where the released code has run out of rows with votes it repeats a row; cut off there.
# fmt: off
OFFICIAL_TIES = [
    (40, 3, 0, [38, 33, 14, 4, 35, 8, 30, 37, 17, 22, 34, 10, 32, 25, 23, 15, 29, 2, 1, 3, 11, 24,
                18, 36, 5, 26, 31, 13, 7, 0]),
    (60, 2, 1, [30, 9, 37, 46, 42, 22, 50, 33, 15, 1, 26, 55, 45, 8, 34, 19, 53, 36, 58, 40, 32, 47,
                44, 13, 16, 24, 57, 56, 29, 14]),
    (200, 4, 2, [168, 95, 85, 139, 39, 137, 51, 131, 64, 185, 14, 69, 138, 142, 99, 146, 178, 128,
                 147, 188, 140, 15, 55, 105, 44, 100, 29, 38, 96, 4, 31, 126, 101, 124, 122, 149,
                 108, 25, 20, 130, 176, 141, 150, 195, 98, 87, 179, 112, 157, 129, 70, 132, 83, 77,
                 0, 27, 65, 91, 193, 134]),
]
# fmt: on


@pytest.mark.parametrize(("n", "k", "seed", "expected"), OFFICIAL_TIES)
def test_tie_order_of_the_authors_code(n, k, seed, expected):
    X = np.random.default_rng(seed).standard_normal((n, 3))
    selector = VoteK(len(expected), k, center=False, compat="official").fit(X)
    picks, scores = selector.selected_indices_.tolist(), selector.scores_
    # The released code adds 1 + 0.1 + 0.1 and 0.1 + 0.1 + 1, which differ in the last bit, and so
    # swaps two rows of one score. Nothing else differs.
    for place in np.flatnonzero(np.array(picks) != expected):
        run = np.flatnonzero(scores == scores[place])
        assert sorted(np.array(picks)[run]) == sorted(np.array(expected)[run])
        assert (n, scores[place]) == (40, 1.2)


def test_strata_of_the_authors_code():
    """What `iterative_selection` returned for a first batch of 10 and these losses."""
    X = standardised(load_breast_cancer)
    loss = np.abs(X[:, 0])
    # fmt: off
    expected = [211, 94, 46, 95, 311, 320, 230, 522, 114, 167, 202, 181, 567, 323, 252, 256, 68, 83,
                341, 152, 176, 444, 555, 376, 144, 296, 398, 561, 242, 137, 249, 566, 177, 52, 283,
                34, 330, 189, 383, 223, 111, 312, 79, 287, 562, 128, 47, 472, 430, 308]
    # fmt: on
    official = VoteK(50, 150, center=False, n_first=10, compat="official")
    assert official.fit(X, confidence=-loss).selected_indices_.tolist() == expected
    again = official.select_with_confidence(X, 50, -loss, initial=expected[:10])
    assert again.tolist() == expected
    # Discounts that go on being updated, as the paper says, lead elsewhere.
    ours = clone(official).set_params(compat=None).fit(X, confidence=-loss).selected_indices_
    assert ours[:11].tolist() == expected[:11]
    assert ours.tolist() != expected


# ---- the definition -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 30),
    k=st.integers(1, 6),
    ragged=st.booleans(),
    rho=st.sampled_from([1, 2, 10.0, 1.1, 1e6, 1e300]),
    n_labeled=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
@pytest.mark.filterwarnings("ignore:rho=1")
def test_incremental_counts_are_the_set_definition(n, k, ragged, rho, n_labeled, seed):
    rng = np.random.default_rng(seed)
    k = min(k, n - 1)
    graph = random_graph(rng, n, -k if ragged else k)
    if graph.nnz == 0:
        return
    labeled = rng.choice(n, n_labeled, replace=False)
    n_select = n - n_labeled  # to the last row, those without votes included
    selector = VoteK(n_select, rho=rho).fit(graph, already_labeled=labeled)
    neighbours = as_sets(graph)
    picks, scores = picks_by_definition(neighbours, n_select, rho, labeled.tolist())
    assert selector.selected_indices_.tolist() == picks
    assert selector.scores_.tolist() == scores  # to the last bit
    assert selector.votes_.tolist() == [sum(u in votes for votes in neighbours) for u in range(n)]
    assert selector.discounts_.tolist() == [len(votes) for votes in neighbours]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(12, 40),
    n_select=st.integers(2, 8),
    n_first=st.integers(1, 2),
    dropped=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_strata_are_the_set_definition(n, n_select, n_first, dropped, seed):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, n, 3)
    neighbours = as_sets(graph)
    confidence = rng.integers(0, 6, n).astype(float)  # with equal values
    selector = VoteK(n_select, n_first=n_first, drop_most_confident=dropped)
    selector.fit(graph, confidence=confidence)

    picks, scores = picks_by_definition(neighbours, n_first, 10)
    strata = [-1] * n_first
    order = sorted(range(n), key=lambda u: (u in picks, confidence[u], u))
    size = int(Fraction(str(1 - dropped)) * n / max(1, n_select - n_first))
    for stratum in range(n_select - n_first):
        rows = order[stratum * size : (stratum + 1) * size]
        score = {
            u: score_by_definition(neighbours, set(picks), u, 10) for u in rows if u not in picks
        }
        if score:  # of a small pool the last stratum can be the first batch alone
            best = max(score, key=lambda u: (score[u], -u))
            picks.append(best)
            scores.append(float(score[best]))
            strata.append(stratum)
    assert selector.selected_indices_.tolist()[: len(picks)] == picks
    assert selector.scores_.tolist()[: len(picks)] == scores
    assert selector.strata_.tolist() == strata + [-2] * (n_select - len(picks))
    never = order[size * (n_select - n_first) :]
    assert not set(never) & set(picks[n_first:])


def test_clusters_of_k_plus_one_rows_are_visited_in_turn():
    k, clusters = 6, 5
    rng = np.random.default_rng(0)
    X = np.repeat(np.eye(clusters, 8), k + 1, axis=0)
    X = X + 0.01 * rng.standard_normal(X.shape)
    cluster = np.repeat(np.arange(clusters), k + 1)
    shuffle = rng.permutation(len(X))
    selector = VoteK(clusters + 1, k, center=False).fit(X[shuffle])
    picked = cluster[shuffle][selector.selected_indices_]
    assert sorted(picked[:clusters]) == list(range(clusters))
    assert selector.scores_.tolist() == [k] * clusters + [(k - 1) / 10]
    assert (selector.votes_ == k).all()


def test_without_discount_the_largest_crowd_gets_all():
    """Ten rows vote for rows 0, 1 and 2, six other rows for rows 3, 4 and 5."""
    graph = sp.lil_array((22, 22))
    graph[6:16, 0:3] = 1
    graph[16:22, 3:6] = 1
    graph = graph.tocsr()
    with pytest.warns(UserWarning, match="rho=1"):
        undiscounted = VoteK(4, rho=1).fit(graph)
    assert undiscounted.selected_indices_.tolist() == [0, 1, 2, 3]
    assert undiscounted.scores_.tolist() == [10, 10, 10, 6]
    discounted = VoteK(4).fit(graph)
    assert discounted.selected_indices_.tolist() == [0, 3, 1, 4]
    assert discounted.scores_.tolist() == [10, 6, 1, 0.6]
    mild = VoteK(4, rho=1.25).fit(graph)  # 10, 8, 6.4, 6
    assert mild.selected_indices_.tolist() == [0, 1, 2, 3]


def test_direction_of_votes():
    """All rows vote for row 0, which votes for row 1: a hub, not a row with many out-edges."""
    graph = sp.lil_array((5, 5))
    graph[1:, 0] = 1
    graph[0, 1] = 1
    selector = VoteK(2).fit(graph.tocsr())
    assert selector.votes_.tolist() == [4, 1, 0, 0, 0]
    assert selector.selected_indices_.tolist() == [0, 1]
    # Row 0 is labelled and votes no more, so that row 1 has nothing left.
    assert selector.scores_.tolist() == [4, 0]
    assert selector.reasons() == ["4 votes, score 4", "1 vote, score 0"]


def test_copies_vote_for_each_other_and_every_row_has_k_votes():
    X = np.repeat([[1.0, 0.1], [0.1, 1.0]], 4, axis=0)
    selector = VoteK(8, 3, center=False).fit(X)
    assert selector.votes_.tolist() == [3] * 8
    assert sorted(selector.selected_indices_) == list(range(8))
    assert sorted(selector.selected_indices_[:2] // 4) == [0, 1]


def test_outliers_get_no_votes():
    rng = np.random.default_rng(3)
    clusters = np.repeat(rng.standard_normal((6, 32)), 50, axis=0)
    clusters += 0.3 * rng.standard_normal(clusters.shape)
    noise = 3 * rng.standard_normal((15, 32))
    picks = VoteK(18, 15).fit(np.concatenate([clusters, noise])).selected_indices_
    assert (picks >= 300).sum() == 0


# ---- the interface ------------------------------------------------------------------------------


@pytest.fixture
def pool():
    return np.random.default_rng(5).standard_normal((120, 8)) + 0.3


def test_labelled_rows_are_as_good_as_picked(pool):
    whole = VoteK(20, 12).fit(pool)
    first = VoteK(7, 12).fit(pool).selected_indices_
    rest = VoteK(13, 12).fit(pool, already_labeled=first)
    assert np.concatenate([first, rest.selected_indices_]).tolist() == (
        whole.selected_indices_.tolist()
    )
    assert rest.scores_.tolist() == whole.scores_[7:].tolist()
    assert rest.discounts_.tolist() == whole.discounts_.tolist()


def test_graph_and_vectors_agree(pool):
    centred = pool - pool.mean(axis=0)
    graph = kneighbors_graph(centred, 12, metric="cosine")
    expected = VoteK(20, 12).fit(pool)
    for selector in (
        VoteK(20).fit(graph),
        VoteK(20).fit(None, graph=graph.tocoo()),
        VoteK(20).fit(pool, graph=sp.csr_array(graph)),
    ):
        assert selector.selected_indices_.tolist() == expected.selected_indices_.tolist()
        assert selector.mean_ is None
    distances = kneighbors_graph(centred, 12, metric="cosine", mode="distance")
    assert VoteK(20).select(distances).tolist() == expected.selected_indices_.tolist()
    doubled = graph.tocsr()
    doubled.indices = np.repeat(doubled.indices, 2)  # every edge twice
    doubled.data, doubled.indptr = np.ones(2 * graph.nnz), 2 * doubled.indptr
    given = doubled.indices.copy()
    twice = VoteK(20).fit(doubled)
    assert twice.selected_indices_.tolist() == expected.selected_indices_.tolist()
    assert twice.votes_.tolist() == expected.votes_.tolist()
    assert (doubled.indices == given).all()
    np.testing.assert_allclose(expected.mean_, pool.mean(axis=0), rtol=1e-6)


def test_invariances(pool):
    expected = VoteK(20, 12).fit(pool).selected_indices_
    assert VoteK(20, 12).select(7 * pool).tolist() == expected.tolist()
    assert VoteK(20, 12).select(pool + 0.5).tolist() == expected.tolist()  # centring
    assert VoteK(20, 12, center=False).select(pool).tolist() != expected.tolist()
    assert VoteK(20, 0.1).select(pool).tolist() == expected.tolist()  # 12 of 120 rows
    assert VoteK(5, 12).select(pool).tolist() == expected[:5].tolist()
    order = np.random.default_rng(0).permutation(len(pool))
    # Where the scores are no ties, the order of the pool does not matter.
    top = VoteK(1, 12).select(pool[order])
    assert order[top].tolist() == expected[:1].tolist()


def test_inner_products():
    X = np.array([[1, 0], [0.9, 0.1], [0.8, 0.0], [5, 5]])
    selector = VoteK(1, 1, metric="dot", center=False).fit(X)
    assert selector.selected_indices_.tolist() == [3]  # long, so everybody's neighbour
    assert VoteK(1, 1, center=False).fit(X).selected_indices_.tolist() != [3]


def test_sklearn_conventions(pool):
    selector = VoteK(10, 12, 5.0, random_state=3)
    assert clone(selector).get_params() == selector.get_params()
    expected = selector.select(pool)
    assert not hasattr(selector, "selected_indices_")
    fitted = selector.fit(pool)
    assert pickle.loads(pickle.dumps(fitted)).selected_indices_.tolist() == expected.tolist()
    assert selector.select(pool, 3).tolist() == expected[:3].tolist()
    pipeline = make_pipeline(StandardScaler(), VoteK(10, 12)).fit(pool)
    scaled = StandardScaler().fit_transform(pool)
    assert pipeline[-1].selected_indices_.tolist() == VoteK(10, 12).select(scaled).tolist()
    given = pool.copy()
    selector.fit(given)
    assert (given == pool).all()


def test_full_method_by_phases_and_by_a_function_agree(pool):
    """First batch, labels, confidences, the rest: by hand, and as one call."""
    asked = []

    def confidence_given(labeled):
        asked.append(labeled.tolist())
        return -np.linalg.norm(pool - pool[labeled].mean(axis=0), axis=1)

    selector = VoteK(30, 12)
    whole = clone(selector).fit(pool, confidence=confidence_given)
    first = selector.select(pool, 3)
    assert asked == [first.tolist()]  # a tenth
    confidence = confidence_given(first)
    rest = selector.select(pool, 27, already_labeled=first, confidence=confidence)
    expected = whole.selected_indices_.tolist()
    assert first.tolist() + rest.tolist() == expected
    assert len(set(expected)) == 30
    assert selector.select_with_confidence(pool, 30, confidence).tolist() == expected
    assert selector.select_with_confidence(pool, 30, confidence_given, first).tolist() == expected
    # What is said of labelled rows does not matter.
    confidence[first] = np.nan
    assert selector.select_with_confidence(pool, 30, confidence, first).tolist() == expected
    assert whole.reasons()[3].endswith("confidence stratum 1 of 27")
    # One pick from each stratum, the least confident first, none of the last tenth.
    order = np.argsort(np.where(np.isnan(confidence), np.inf, confidence), kind="stable")
    places = np.argsort(order)[rest]
    assert (places // 4).tolist() == list(range(27))  # 4 = floor(0.9 * 120 / 27)


def test_sign_of_confidence(pool):
    confidence = np.arange(120.0)
    picks = VoteK(11, 12, n_first=1).fit(pool, confidence=confidence).selected_indices_[1:]
    assert (np.diff(picks) > 0).all()
    assert picks.max() < 110  # the tail is the confident one
    assert picks.min() < 12


def test_strata_without_open_rows_are_filled_at_random(pool):
    labeled = np.arange(60)
    confidence = np.arange(120.0)
    selector = VoteK(27, 12, random_state=0)
    picks = selector.fit(pool, already_labeled=labeled, confidence=confidence)
    # 108 rows in strata of 4; of these, the 60 open ones are in the first 15 strata.
    assert picks.strata_.tolist() == [*range(15), *[-2] * 12]
    assert picks.reasons()[-1] == "picked at random to complete the number"
    chosen = picks.selected_indices_.tolist()
    assert len(set(chosen)) == 27
    assert min(chosen) >= 60
    assert selector.select(pool, already_labeled=labeled, confidence=confidence).tolist() == chosen
    other = clone(selector).set_params(random_state=1)
    fill = other.select(pool, already_labeled=labeled, confidence=confidence).tolist()
    assert fill[:15] == chosen[:15]
    assert fill != chosen


def test_progress(pool):
    calls = []
    VoteK(20, 12).fit(pool, progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (120, 140)
    assert calls[-1] == (140, 140)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_large_share_warns(pool):
    with pytest.warns(UserWarning, match="k=25 is more than a fifth of the pool of 120"):
        VoteK(3, 25).fit(pool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_select": 121}, "n_select must be between 1 and 120"),
        ({"n_select": 0}, "n_select"),
        ({"k": 120}, "less than the 120 rows"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": 2.5}, "share between 0 and 1"),
        ({"k": "many"}, "k must be"),
        ({"rho": 0.99}, "rho must be a number above 1"),
        ({"rho": float("inf")}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"metric": "euclidean"}, "metric must be 'cosine' or 'dot'"),
        ({"compat": "paper"}, "compat"),
    ],
)
def test_bad_parameters(pool, arguments, message):
    with pytest.raises(DataError, match=message):
        VoteK(**{"n_select": 5, "k": 12, **arguments}).fit(pool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"already_labeled": [1, 2, 1]}, "row 1 twice"),
        ({"already_labeled": [120]}, "from 0 to 119"),
        ({"already_labeled": range(116)}, "between 1 and 4"),
        ({"confidence": np.zeros(119)}, r"each of the 120 rows, got shape \(119,\)"),
        ({"confidence": lambda rows: np.zeros((120, 1))}, "each of the 120 rows"),
        ({"confidence": np.where(np.arange(120) == 77, np.nan, 0)}, "first is row 77"),
        ({"confidence": ["sure"] * 120}, "one number per row"),
        ({"graph": np.zeros((120, 120))}, "graph must be a scipy sparse matrix"),
        ({"graph": sp.eye_array(120, 100, k=1)}, "square"),
        ({"graph": sp.eye_array(60, k=1)}, "graph must have a row per row of X, 120, got 60"),
        ({"graph": sp.eye_array(120)}, "120 self-loops, the first in row 0"),
        ({"graph": sp.csr_array((120, 120))}, "nobody votes"),
    ],
)
def test_bad_data(pool, arguments, message):
    with pytest.raises(DataError, match=message):
        VoteK(5, 12).fit(pool, **arguments)


def test_bad_rows(pool):
    pool[3, 2] = np.nan
    with pytest.raises(DataError, match="row 3"):
        VoteK(5, 12).fit(pool)
    pool[3] = 0
    with pytest.raises(DataError, match="row 3"):
        VoteK(5, 12, center=False).fit(pool)
    VoteK(5, 12).fit(pool)  # not zero once centred
    with pytest.raises(DataError, match="120 rows, the first is row 0, that equal the mean"):
        VoteK(5, 12).fit(np.full((120, 3), 0.1))
    with pytest.raises(DataError, match="square neighbour graph"):
        VoteK(5, 12).fit(sp.csr_array(pool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_most_confident": 1.0}, "drop_most_confident"),
        ({"n_first": 0}, "n_first"),
        ({"n_first": 6}, "n_first must be between 1 and n_select = 5"),
        ({"n_select": 120, "n_first": 1}, "too large for strata"),
    ],
)
def test_bad_strata(pool, arguments, message):
    with pytest.raises(DataError, match=message):
        VoteK(**{"n_select": 5, "k": 12, **arguments}).fit(pool, confidence=np.zeros(120))


@pytest.mark.parametrize("initial", [[], [1, 2, 3]])
def test_bad_first_batch(pool, initial):
    with pytest.raises(DataError, match="initial must have at least 1 row and fewer than n = 3"):
        VoteK(k=12).select_with_confidence(pool, 3, np.zeros(120), initial)
