"""Selection by queries against the rules taken word for word, on whole score matrices."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from bakeoff.data.vector_store import VectorStore
from bakeoff.errors import DataError
from bakeoff.selection import query_selection
from bakeoff.selection.query_selection import (
    METRICS,
    STRATEGIES,
    NearestToQueries,
    round_robin,
    select_by_queries,
)


def turns_word_for_word(scores, n, without=()):
    """Pop by pop, as the paper's Algorithm 1 says, with a set of what is selected."""
    lists = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))
        lists.append([i for i in order if row[i] > -np.inf and i not in without])
    picked, query_of_each = [], []
    while len(picked) < n and any(lists):
        for query, remaining in enumerate(lists):
            if not remaining or len(picked) == n:
                continue
            best = remaining.pop(0)
            if best not in picked:
                picked.append(best)
                query_of_each.append(query)
    return picked, query_of_each


def all_scores(pool, queries, metric):
    wide, asked = np.float64(np.float32(pool)), np.float64(np.float32(queries))
    scores = asked @ wide.T
    if metric == "cosine":
        scores /= np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(wide, axis=1)
    return scores


def list_scores(scores, strategy, groups):
    """Return the matrix in which lists are rows, in float32."""
    labels = list(range(len(scores))) if groups is None else list(groups)
    rows = [
        [q for q, label in enumerate(labels) if label == kind] for kind in dict.fromkeys(labels)
    ]
    lists = np.array([scores[members].max(axis=0) for members in rows])
    if strategy == "global_max":
        lists = lists.max(axis=0, keepdims=True)
    if strategy == "mean":
        lists = lists.mean(axis=0, keepdims=True)
    return lists.astype(np.float32)


def random_vectors(seed, n, width, kind="normal"):
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.standard_normal((n, width)).astype(np.float32)
    vectors = rng.integers(-2, 3, (n, width)).astype(np.float32)  # many ties and copies
    vectors[~vectors.any(axis=1)] = 1
    return vectors


# Round robin over a matrix ------------------------------------------------------------------------


def test_card_example_a_duplicate_spends_the_turn():
    scores = [[0.9, 0.8, 0.7, 0.1], [0.95, 0.2, 0.6, 0.5]]
    indices, query_of_each = round_robin(scores, 3)
    assert indices.tolist() == [0, 1, 2]  # popping on until something new comes gives 0, 2, 1
    assert query_of_each.tolist() == [0, 0, 1]
    assert indices.dtype == query_of_each.dtype == np.int64


def test_equal_scores_go_by_column():
    assert round_robin(np.zeros((3, 5)), 5)[0].tolist() == [0, 1, 2, 3, 4]


def test_exhausted_queries_are_skipped():
    scores = [[5, -np.inf, -np.inf, -np.inf], [1, 4, 3, 2]]
    indices, query_of_each = round_robin(scores, 4)
    assert indices.tolist() == [0, 1, 2, 3]
    assert query_of_each.tolist() == [0, 1, 1, 1]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 200), st.data())
def test_round_robin_is_the_rule_word_for_word(seed, n_queries, n_rows, data):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, data.draw(st.sampled_from([2, 10, 10**6])), (n_queries, n_rows))
    scores = scores.astype(np.float64)
    scores[:, : n_rows - 1][rng.random((n_queries, n_rows - 1)) < 0.2] = -np.inf
    n = data.draw(st.integers(1, int((scores > -np.inf).any(axis=0).sum())))
    picked, query_of_each = turns_word_for_word(scores, n)
    found = round_robin(scores, n)
    assert found[0].tolist() == picked
    assert found[1].tolist() == query_of_each


def test_unsigned_scores_do_not_wrap_around():
    assert round_robin(np.array([[3, 1, 2]], dtype=np.uint8), 3)[0].tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("scores", "n", "message"),
    [
        ([[1.0, np.nan]], 1, "NaN at query 0, row 1"),
        ([1.0, 2.0], 1, "shape"),
        (np.empty((0, 3)), 1, "not empty"),
        ([[1.0, 2.0]], 3, "between 1 and 2"),
        ([[1.0, 2.0]], 0, "between 1 and 2"),
        ([[1.0, -np.inf]], 2, "at most 1"),
    ],
)
def test_round_robin_refuses(scores, n, message):
    with pytest.raises(DataError, match=message):
        round_robin(scores, n)


# Streamed selection -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.data())
def test_streamed_selection_is_that_of_the_whole_matrix(seed, data):
    rng = np.random.default_rng(seed)
    n_rows, n_queries = int(rng.integers(2, 200)), int(rng.integers(1, 12))
    width = int(rng.integers(1, 6))
    kind = data.draw(st.sampled_from(["normal", "integer"]))
    strategy, metric = data.draw(st.sampled_from(STRATEGIES)), data.draw(st.sampled_from(METRICS))
    pool = random_vectors(seed, n_rows, width, kind)
    queries = random_vectors(seed + 1, n_queries, width, kind)
    groups = data.draw(st.sampled_from([None, rng.integers(0, 3, n_queries).tolist()]))
    without = rng.choice(n_rows, int(rng.integers(0, n_rows // 3 + 1)), replace=False).tolist()
    n = int(rng.integers(1, n_rows - len(without) + 1))
    # Short first lists, so that they must grow; or such that they need not.
    free, query_selection._FREE_ENTRIES = query_selection._FREE_ENTRIES, int(rng.choice([1, 2**14]))
    try:
        found = select_by_queries(
            pool,
            queries,
            n,
            strategy=strategy,
            metric=metric,
            groups=groups,
            already_labeled=without,
            block_rows=int(rng.integers(1, 60)),
        )
    finally:
        query_selection._FREE_ENTRIES = free
    scores = all_scores(pool, queries, metric)
    lists = list_scores(scores, strategy, groups)
    picked, list_of_each = turns_word_for_word(lists, n, set(without))
    np.testing.assert_allclose(
        found.scores, lists[list_of_each, picked], rtol=1e-6, atol=1e-7 * np.abs(lists).max()
    )
    assert len(set(found.indices.tolist())) == n
    assert not set(found.indices.tolist()) & set(without)
    if strategy == "mean" and kind == "integer":
        return  # sums of quotients tie only up to rounding
    assert found.indices.tolist() == picked
    if strategy == "round_robin" and groups is None:
        assert found.query_of_each.tolist() == list_of_each
    else:
        reached = scores[found.query_of_each, found.indices]
        labels = np.zeros(n_queries) if groups is None or strategy == "mean" else np.array(groups)
        if strategy == "global_max":
            labels = np.zeros(n_queries)
        best = [
            scores[labels == labels[query], row].max()
            for query, row in zip(found.query_of_each, found.indices, strict=True)
        ]
        np.testing.assert_allclose(reached, best, atol=1e-6 * np.abs(scores).max())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["normal", "integer"])
def test_block_size_changes_nothing(strategy, kind):
    pool, queries = random_vectors(0, 3000, 24, kind), random_vectors(1, 7, 24, kind)
    runs = [
        select_by_queries(pool, queries, 400, strategy=strategy, block_rows=rows)
        for rows in (37, 500, 3000)
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.indices, runs[0].indices)
        np.testing.assert_array_equal(run.scores, runs[0].scores)


@pytest.mark.parametrize("metric", METRICS)
def test_copies_go_by_row_wherever_blocks_end(metric):
    # 800 copies of each of three rows: more ties than any list has room for.
    rows = random_vectors(3, 3, 50)
    pool = np.repeat(rows[None], 800, axis=0).reshape(-1, 50)
    found = select_by_queries(pool, rows[:2], 6, metric=metric, block_rows=333)
    own = all_scores(rows, rows[:2], metric).argmax(axis=1)
    expected = [int(own[turn % 2]) + 3 * (turn // 2) for turn in range(6)]
    if own[0] == own[1]:
        expected = [int(own[0]) + 3 * turn for turn in range(6)]
    assert found.indices.tolist() == expected


@pytest.mark.parametrize("metric", METRICS)
def test_a_rounding_error_does_not_reorder(metric):
    # Scores that differ by less than a float32 product's error, but by more than float32 resolves.
    rng = np.random.default_rng(5)
    query = rng.standard_normal(1024).astype(np.float32)
    pool = np.repeat(rng.standard_normal((1, 1024)).astype(np.float32), 300, axis=0)
    pool[np.arange(300), rng.integers(0, 1024, 300)] *= 1 + rng.random(300).astype(np.float32) / 50
    lists = all_scores(pool, query[None], metric).astype(np.float32)
    assert len(np.unique(lists)) > 200
    found = select_by_queries(pool, query[None], 100, metric=metric, block_rows=64)
    assert found.indices.tolist() == turns_word_for_word(lists, 100)[0]


def test_shuffling_the_pool_permutes_indices_only():
    pool, queries = random_vectors(0, 500, 16), random_vectors(1, 9, 16)
    order = np.random.default_rng(2).permutation(500)
    plain = select_by_queries(pool, queries, 60)
    shuffled = select_by_queries(pool[order], queries, 60)
    np.testing.assert_array_equal(order[shuffled.indices], plain.indices)
    np.testing.assert_array_equal(shuffled.query_of_each, plain.query_of_each)


def test_more_picks_begin_with_the_same():
    pool, queries = random_vectors(0, 500, 16), random_vectors(1, 9, 16)
    for strategy in STRATEGIES:
        few = select_by_queries(pool, queries, 30, strategy=strategy).indices
        many = select_by_queries(pool, queries, 200, strategy=strategy).indices
        np.testing.assert_array_equal(many[:30], few)


def test_lists_grow_when_queries_agree():
    # Equal queries: all pops but one of a round are spent, so that lists of 4 n / Q are too short.
    pool = random_vectors(0, 2000, 8)
    queries = np.repeat(random_vectors(1, 1, 8), 400, axis=0)
    passes = []
    found = select_by_queries(
        pool, queries, 900, progress=lambda done, total: passes.append(done == total)
    )
    assert sum(passes) > 1
    scores = list_scores(all_scores(pool, queries[:1], "cosine"), "round_robin", None)
    assert found.indices.tolist() == turns_word_for_word(scores, 900)[0]
    assert set(found.query_of_each.tolist()) == {0}


def test_global_max_starves_where_round_robin_shares():
    # Two targets; the second one's rows score lower throughout (the card's claim 3).
    rng = np.random.default_rng(0)
    axes = np.eye(8, dtype=np.float32)
    near = axes[0] + 0.05 * rng.standard_normal((300, 8)).astype(np.float32)
    far = axes[1] + 0.50 * rng.standard_normal((300, 8)).astype(np.float32)
    pool = np.concatenate([near, far])
    shares = {
        strategy: (
            select_by_queries(pool, axes[:2], 100, strategy=strategy).query_of_each == 0
        ).mean()
        for strategy in ("round_robin", "global_max")
    }
    assert shares["round_robin"] == 0.5
    assert shares["global_max"] > 0.95


def test_groups_take_turns_by_their_best_query():
    pool = np.array([[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    queries = np.eye(3, dtype=np.float32)
    found = select_by_queries(pool, queries, 4, groups=["a", "b", "a"])
    # Task a has rows 0 and 3 at 1.0 and then row 1; task b has row 2.
    assert found.indices.tolist() == [0, 2, 3, 1]
    assert found.query_of_each.tolist() == [0, 1, 2, 1]
    single = select_by_queries(pool, queries, 4, groups=[7, 8, 9])
    np.testing.assert_array_equal(single.indices, select_by_queries(pool, queries, 4).indices)


def test_memmap_store_and_other_dtypes_give_the_same(tmp_path):
    pool, queries = random_vectors(0, 700, 12), random_vectors(1, 5, 12)
    np.save(tmp_path / "pool.npy", pool)
    mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    texts = [str(row) for row in range(700)]
    store = VectorStore.build(
        tmp_path / "store",
        texts,
        lambda chunk: pool[[int(text) for text in chunk]],
        fingerprint={},
        rows_per_shard=64,
    )
    expected = select_by_queries(pool, queries, 90)
    for source in (mapped, store, pool.astype(np.float64), pool.tolist(), np.asfortranarray(pool)):
        found = select_by_queries(source, queries, 90, block_rows=100)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_memory_is_that_of_a_block(tmp_path):
    rows, width = 60_000, 64
    np.save(tmp_path / "pool.npy", random_vectors(0, rows, width))
    mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    queries = random_vectors(1, 100, width)
    select_by_queries(mapped[:5000], queries, 200, block_rows=1000)  # what is imported and kept
    tracemalloc.start()
    select_by_queries(mapped, queries, 200, block_rows=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6  # all scores would be 24e6, the pool 15e6 bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.empty((0, 4))}, "queries must have at least one row"),
        ({"queries": np.ones((2, 3))}, "queries has 3 columns and the pool 4"),
        ({"queries": np.full((1, 4), np.nan)}, "queries has NaN"),
        ({"queries": np.zeros((1, 4))}, "queries has only zeros"),
        ({"n": 21}, "between 1 and 20"),
        ({"n": 20, "already_labeled": [3]}, "between 1 and 19"),
        ({"n": True}, "integer"),
        ({"strategy": "max"}, "strategy must be one of round_robin"),
        ({"metric": "euclidean"}, "metric must be one of cosine"),
        ({"groups": ["a"]}, "groups must be a list of 2 labels"),
        ({"groups": "ab"}, "groups must be a list of 2 labels"),
        ({"block_rows": 0}, "block_rows"),
        ({"pool": np.ones(4)}, "two|rows, columns"),
        ({"pool": np.array([["a", "b"]])}, "numeric"),
    ],
)
def test_selection_refuses(change, message):
    arguments = {"pool": np.ones((20, 4)), "queries": np.ones((2, 4)), "n": 3, **change}
    with pytest.raises(DataError, match=message):
        select_by_queries(**arguments)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN or inf in row 17"), (np.inf, "NaN or inf in row 17")]
)
def test_a_bad_row_is_named(value, message):
    pool = np.ones((20, 4), dtype=np.float32)
    pool[17, 2] = value
    with pytest.raises(DataError, match=message):
        select_by_queries(pool, np.ones((1, 4)), 3, block_rows=6)


def test_a_row_of_zeros_is_named_for_cosines_only():
    pool = np.ones((20, 4), dtype=np.float32)
    pool[13] = 0
    with pytest.raises(DataError, match=r"only zeros.* in row 13"):
        select_by_queries(pool, np.ones((1, 4)), 3, block_rows=6)
    found = select_by_queries(pool, np.ones((1, 4)), 20, metric="dot").indices
    assert found[-1] == 13


def test_tiny_and_huge_rows_have_cosines():
    pool = random_vectors(0, 50, 4)
    scale = np.where(np.arange(50) % 2, 1e-30, 1e30).astype(np.float32)[:, None]
    queries = random_vectors(1, 3, 4)
    np.testing.assert_array_equal(
        select_by_queries(pool * scale, queries, 20).indices,
        select_by_queries(pool, queries, 20).indices,
    )


# The selector -------------------------------------------------------------------------------------


def test_selector_follows_the_conventions():
    pool, queries = random_vectors(0, 100, 8), random_vectors(1, 4, 8)
    selector = NearestToQueries(10, strategy="global_max")
    again = clone(selector)
    assert again.get_params() == selector.get_params()
    selector.fit(pool, queries=queries, already_labeled=[5, 6])
    expected = select_by_queries(pool, queries, 10, strategy="global_max", already_labeled=[5, 6])
    np.testing.assert_array_equal(selector.selected_indices_, expected.indices)
    np.testing.assert_array_equal(selector.scores_, expected.scores)
    np.testing.assert_array_equal(
        again.select(pool, 7, queries=queries, already_labeled=[5, 6]), expected.indices[:7]
    )
    kept = pickle.loads(pickle.dumps(selector))
    assert kept.reasons() == selector.reasons()
    with pytest.raises(DataError, match="queries must be given"):
        selector.fit(pool)


def test_selector_ends_a_pipeline():
    pool, queries = random_vectors(0, 100, 8), random_vectors(1, 4, 8)
    pipeline = make_pipeline(Normalizer(), NearestToQueries(5))
    pipeline.fit(pool, nearesttoqueries__queries=queries)
    expected = select_by_queries(pool, queries, 5).indices
    np.testing.assert_array_equal(pipeline[-1].selected_indices_, expected)


def test_reasons_say_which_query_and_how_near():
    pool = np.array([[1, 0], [0.6, 0.8], [0, 2]], dtype=np.float32)
    queries = np.array([[1, 0], [0, 1]], dtype=np.float32)
    say = {
        (strategy, metric): NearestToQueries(2, strategy, metric).fit(pool, queries=queries)
        for strategy, metric in [("round_robin", "cosine"), ("mean", "cosine"), ("mean", "dot")]
    }
    assert say["round_robin", "cosine"].reasons() == [
        "nearest query 0, cosine 1.00",
        "nearest query 1, cosine 1.00",
    ]
    # Row 1: (0.6 + 0.8) / 2; then row 0 before row 2, both 0.5.
    assert say["mean", "cosine"].reasons() == [
        "nearest query 1, mean cosine 0.70",
        "nearest query 0, mean cosine 0.50",
    ]
    assert say["mean", "dot"].reasons()[0] == "nearest query 1, mean product 1.00"
