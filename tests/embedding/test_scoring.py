"""Scores per unit against scipy, scikit-learn, brute force and invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import v_measure_score

from bakeoff.data.tasks import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    SimilarityTask,
    task_texts,
)
from bakeoff.embedding.scoring import (
    classification_hits,
    kmeans_labels,
    reciprocal_ranks,
    score_task,
    spearman_units,
    v_measure_units,
)
from bakeoff.errors import DataError


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 40), st.integers(0, 10_000), st.booleans())
def test_spearman_units_average_to_scipy_and_match_leave_one_out(n, seed, tied):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = x + rng.normal(size=n)
    if tied:
        x, y = np.round(x), np.round(y)
    if np.ptp(y) == 0 or np.ptp(x) == 0:
        return
    units = spearman_units(x, y)
    assert units.mean() == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    keep = [np.delete(np.arange(n), i) for i in range(n)]
    if all(np.ptp(x[k]) > 0 and np.ptp(y[k]) > 0 for k in keep):
        left_out = np.array([stats.spearmanr(x[k], y[k]).statistic for k in keep])
        expected = -(n - 1) * (left_out - left_out.mean())
        np.testing.assert_allclose(units - units.mean(), expected, atol=1e-8)


def test_spearman_unit_spread_is_the_known_standard_error():
    # Independent variables: the standard error of Spearman's rho is 1 / sqrt(n - 1).
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(200):
        units = spearman_units(rng.normal(size=200), rng.normal(size=200))
        errors.append(units.std(ddof=1) / np.sqrt(200))
    assert np.mean(errors) == pytest.approx(1 / np.sqrt(199), rel=0.05)


def test_spearman_degenerate_inputs():
    with pytest.raises(DataError, match="at least 4"):
        spearman_units(np.arange(3.0), np.arange(3.0))
    with pytest.raises(DataError, match="equal"):
        spearman_units(np.arange(5.0), np.ones(5))
    assert spearman_units(np.ones(5), np.arange(5.0)).tolist() == [0.0] * 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=60))
def test_v_measure_units_average_to_sklearn_and_match_leave_one_out(pairs):
    truth = [str(a) for a, _ in pairs]
    found = [b for _, b in pairs]
    units = v_measure_units(truth, found)
    assert units.mean() == pytest.approx(v_measure_score(truth, found), abs=1e-9)
    n = len(pairs)
    left_out = np.array(
        [v_measure_score(truth[:i] + truth[i + 1 :], found[:i] + found[i + 1 :]) for i in range(n)]
    )
    np.testing.assert_allclose(
        units - units.mean(), -(n - 1) * (left_out - left_out.mean()), atol=1e-7
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 9999))
def test_reciprocal_rank_equals_sorting(n_queries, n_documents, seed):
    rng = np.random.default_rng(seed)
    queries, documents = (
        unit(rng.normal(size=(n_queries, 6))),
        unit(rng.normal(size=(n_documents, 6))),
    )
    relevant = rng.integers(0, n_documents, n_queries)
    got = reciprocal_ranks(queries, documents, relevant)
    for i in range(n_queries):
        order = np.argsort(-(queries[i] @ documents.T), kind="stable").tolist()
        rank = order.index(relevant[i]) + 1
        assert got[i] == pytest.approx(1 / rank if rank <= 10 else 0.0)


def test_one_point_for_everything_scores_nothing():
    same = np.ones((30, 4), dtype=np.float32) / 2
    assert reciprocal_ranks(same, same, np.arange(30)).sum() == 0


def test_retrieval_is_invariant_to_rotation_and_document_order():
    rng = np.random.default_rng(1)
    queries, documents = unit(rng.normal(size=(20, 8))), unit(rng.normal(size=(50, 8)))
    relevant = rng.integers(0, 50, 20)
    plain = reciprocal_ranks(queries, documents, relevant)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    np.testing.assert_array_equal(
        reciprocal_ranks(queries @ rotation, documents @ rotation, relevant), plain
    )
    order = rng.permutation(50)
    moved = np.argsort(order)[relevant]
    np.testing.assert_array_equal(reciprocal_ranks(queries, documents[order], moved), plain)


def test_classification_and_clustering_find_separated_groups():
    rng = np.random.default_rng(2)
    centres = unit(rng.normal(size=(3, 16)))
    labels = [str(i % 3) for i in range(60)]
    vectors = unit(
        np.repeat(centres[None], 20, 0).reshape(60, 16) + 0.02 * rng.normal(size=(60, 16))
    )
    assert v_measure_units(labels, kmeans_labels(vectors, 3, seed=0)).mean() == pytest.approx(1)
    hits = classification_hits(vectors[:30], labels[:30], vectors[30:], labels[30:])
    assert hits.tolist() == [1.0] * 30
    shuffled = rng.permutation(labels[:30]).tolist()
    assert classification_hits(vectors[:30], shuffled, vectors[30:], labels[30:]).mean() < 1


def test_score_task_covers_each_kind_and_embeds_each_text_of_it():
    rng = np.random.default_rng(3)
    texts = tuple(f"t{i}" for i in range(24))
    table = dict(zip(texts, unit(rng.normal(size=(24, 8))), strict=True))
    seen: list[str] = []
    roles: set[str] = set()

    def embed(asked, role):
        roles.add(role)
        seen.extend(asked)
        return np.stack([table[t] for t in asked])

    tasks = [
        RetrievalTask("r", texts[:8], texts[8:], np.arange(8)),
        SimilarityTask("s", texts[:12], texts[12:], rng.normal(size=12)),
        ClusteringTask("c", texts, tuple("ab" * 12)),
        ClassificationTask("k", texts[:12], tuple("ab" * 6), texts[12:], tuple("ab" * 6)),
    ]
    for task, n_units in zip(tasks, [8, 12, 24, 12], strict=True):
        seen.clear()
        roles.clear()
        units = score_task(task, embed, seed=0)
        retrieval = isinstance(task, RetrievalTask)
        assert roles == ({"query", "document"} if retrieval else {"text"})
        assert units.shape == (n_units,)
        assert units.dtype == np.float64
        assert sorted(seen) == sorted(task_texts(task))


def test_bad_tasks_say_what_is_wrong():
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(DataError, match="at least 2 labels"):
        classification_hits(vectors, ["a"] * 4, vectors, ["a"] * 4)
    with pytest.raises(DataError, match="1 labels"):
        kmeans_labels(vectors, 1, seed=0)
