"""Matrices against brute force, scikit-learn and released figures; the options of an upgrade."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score
from sklearn.neighbors import NearestCentroid
from tests.embedding.small_models import TEXTS, embedder

from bakeoff.embedding import compatibility
from bakeoff.embedding.baselines import MeanPooling
from bakeoff.embedding.compatibility import (
    average_accuracy,
    average_compatibility,
    compatibility_matrix,
    first_ranks_and_precision,
    identification_hits,
    ranks_among,
    unit_vectors,
)
from bakeoff.embedding.stationary_text import stationary_encoder
from bakeoff.embedding.upgrade import StoredIndex, evaluate_upgrade, read_index
from bakeoff.embedding.upgrade_baselines import RidgeAdapter, SkipReindex
from bakeoff.errors import DataError
from bakeoff.study import compare

# notebooks/iamcl2r_hoc.ipynb of the authors' repository, 7 tasks with two replacements.
PUBLISHED = np.array([
    [0.58892, 0, 0, 0, 0, 0, 0],
    [0.597, 0.6156, 0, 0, 0, 0, 0],
    [0.6305, 0.65276, 0.69314, 0, 0, 0, 0],
    [0.63336, 0.65298, 0.70626, 0.72374, 0, 0, 0],
    [0.65006, 0.67872, 0.70754, 0.72114, 0.73828, 0, 0],
    [0.6408, 0.67188, 0.71166, 0.72712, 0.74704, 0.76194, 0],
    [0.6314, 0.6635, 0.72096, 0.73496, 0.75232, 0.76652, 0.77164],
])  # fmt: skip


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


# AC and AA ----------------------------------------------------------------------------------------


def test_published_matrix_gives_the_published_figures():
    assert average_compatibility(PUBLISHED) == pytest.approx(20 / 21)
    assert round(average_compatibility(PUBLISHED), 2) == 0.95
    assert round(100 * average_accuracy(PUBLISHED), 3) == 68.899


def test_released_functions_values():
    matrix = [[0.3, 0, 0], [0.35, 0.5, 0], [0.28, 0.55, 0.6]]
    assert average_compatibility(matrix) == pytest.approx(2 / 3)
    assert average_accuracy(matrix) == pytest.approx(0.43)
    # Equality is a failure; a zero counts (the released code drops it).
    assert average_compatibility([[0.3, 0], [0.3, 0.5]]) == 0.0
    assert average_accuracy([[0.0, 9.0], [0.2, 0.4]]) == pytest.approx(0.2)
    with pytest.raises(DataError, match="at least two versions"):
        average_compatibility([[1.0]])
    with pytest.raises(DataError, match=r"\(T, T\)"):
        average_accuracy([[1.0, 2.0]])
    with pytest.raises(DataError, match="NaN on or below the diagonal"):
        average_accuracy([[1.0, np.nan], [np.nan, 1.0]])


# Scores per query ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    size=st.integers(4, 30),
    classes=st.integers(2, 4),
    seed=st.integers(0, 999),
    block=st.sampled_from([1, 10**6]),
)
def test_scores_equal_brute_force_and_scikit_learn(n, size, classes, seed, block):
    rng = np.random.default_rng(seed)
    queries, gallery = unit(rng.standard_normal((n, 5))), unit(rng.standard_normal((size, 5)))
    gallery_classes = np.concatenate([np.arange(classes), rng.integers(0, classes, size - classes)])
    query_classes = rng.integers(0, classes, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compatibility, "_BLOCK_ENTRIES", block)
        first, precision = first_ranks_and_precision(
            queries, gallery, query_classes, gallery_classes
        )
        hits = identification_hits(queries, gallery, query_classes, gallery_classes)
    templates = np.stack([gallery[gallery_classes == c].mean(axis=0) for c in range(classes)])
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    for i in range(n):
        scores, relevant = gallery @ queries[i], gallery_classes == query_classes[i]
        order = np.argsort(-scores)
        assert first[i] == 1 + np.flatnonzero(relevant[order])[0]
        assert precision[i] == pytest.approx(average_precision_score(relevant, scores), abs=1e-6)
        assert hits[i] == ((templates @ queries[i]).argmax() == query_classes[i])


def test_identification_is_nearly_a_nearest_centroid():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((6, 10))
    classes = rng.integers(0, 6, 600)
    rows = unit(centres[classes] + 1.5 * rng.standard_normal((600, 10)))
    hits = identification_hits(rows[:300], rows[300:], classes[:300], classes[300:])
    centroid = NearestCentroid().fit(rows[300:], classes[300:])
    same = hits == (centroid.predict(rows[:300]) == classes[:300])
    assert same.mean() > 0.95
    assert 0.5 < hits.mean() < 0.999


def test_ties_count_against_the_relevant_item():
    same = np.ones((6, 3), dtype=np.float32) / np.sqrt(3, dtype=np.float32)
    labels = [0, 0, 1, 1, 2, 2]
    found = compatibility_matrix([(same, same)], None, None, labels, labels)
    assert found.matrix("identification")[0, 0] == 0.0
    assert found.matrix("mrr")[0, 0] == pytest.approx(1 / 5)
    assert ranks_among(np.array([0.5, 0.5]), np.array([0.5, 0.7])).tolist() == [3, 4]


# The matrix ---------------------------------------------------------------------------------------


def three_versions():
    rng = np.random.default_rng(3)
    truth = rng.standard_normal((60, 8))
    labels = [f"class {i % 5}" for i in range(60)]
    centres = rng.standard_normal((5, 8))
    truth = centres[np.arange(60) % 5] + 0.7 * truth
    versions = [truth + noise * rng.standard_normal(truth.shape) for noise in (1.0, 0.5, 0.1)]
    return [(v[:25], v[25:]) for v in versions], labels[:25], labels[25:]


def test_matrix_of_vectors_functions_and_models_agree():
    vectors, query_labels, gallery_labels = three_versions()
    expected = compatibility_matrix(vectors, None, None, query_labels, gallery_labels)
    rows = {"q": 0, "g": 1}

    class Model:
        def __init__(self, version):
            self.version = version

        def encode(self, what):
            return torch.from_numpy(3 * vectors[self.version][rows[what]])

    models = [Model(0), lambda what: vectors[1][rows[what]], Model(2)]
    calls = []
    found = compatibility_matrix(
        models, "q", "g", query_labels, gallery_labels, names=["a", "b", "c"],
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(i, 6) for i in range(1, 7)]
    for measure in ("identification", "hit@1", "hit@10", "mrr", "map"):
        assert np.array_equal(found.matrix(measure), expected.matrix(measure), equal_nan=True)
        assert np.isnan(found.matrix(measure)[0, 1])
    assert found.average_accuracy("map") == pytest.approx(
        np.mean([found.matrix("map")[t, k] for t in range(3) for k in range(t + 1)])
    )
    assert found.matrix("map")[2, 2] > found.matrix("map")[0, 0]
    assert "AC" in found.describe("map")
    both = compatibility_matrix(vectors, None, None, query_labels, gallery_labels, upper=True)
    assert not np.isnan(both.matrix()).any()
    assert both.average_compatibility() == found.average_compatibility()


def test_scores_go_into_the_paired_comparison():
    vectors, query_labels, gallery_labels = three_versions()
    found = compatibility_matrix(vectors, None, None, query_labels, gallery_labels)
    result = compare(found.scores("mrr"), "version 0 on version 0")
    record = result["version 2 on version 0"].overall
    difference = found.matrix("mrr")[2, 0] - found.matrix("mrr")[0, 0]
    assert record.difference == pytest.approx(difference)
    assert record.n_units == 25


def test_rotating_one_version_breaks_it_and_rotating_all_does_not():
    vectors, query_labels, gallery_labels = three_versions()
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    plain = compatibility_matrix(vectors, None, None, query_labels, gallery_labels)
    all_turned = [(q @ turn, g @ turn) for q, g in vectors]
    same = compatibility_matrix(all_turned, None, None, query_labels, gallery_labels)
    assert np.allclose(same.matrix("map"), plain.matrix("map"), atol=1e-6, equal_nan=True)
    one = [vectors[0], all_turned[1], vectors[2]]
    broken = compatibility_matrix(one, None, None, query_labels, gallery_labels).matrix("map")
    assert broken[1, 1] == pytest.approx(plain.matrix("map")[1, 1], abs=1e-6)
    assert broken[1, 0] < plain.matrix("map")[1, 0] - 0.2


def test_matrix_bad_input():
    vectors, query_labels, gallery_labels = three_versions()
    with pytest.raises(DataError, match="1 of 25 queries have no gallery item"):
        compatibility_matrix(vectors, None, None, ["z", *query_labels[1:]], gallery_labels)
    with pytest.raises(DataError, match="one width, got"):
        compatibility_matrix(
            [vectors[0], tuple(v[:, :7] for v in vectors[1])],
            None, None, query_labels, gallery_labels,
        )  # fmt: skip
    with pytest.raises(DataError, match="must be 25 vectors, got 24"):
        compatibility_matrix(
            [(vectors[0][0][1:], vectors[0][1])], None, None, query_labels, gallery_labels
        )
    zero = vectors[0][0] * (np.arange(25) != 3)[:, None]
    with pytest.raises(DataError, match="query vectors of version 0: vector 3 is not finite or"):
        compatibility_matrix([(zero, vectors[0][1])], None, None, query_labels, gallery_labels)
    with pytest.raises(DataError, match="queries and gallery must be given"):
        compatibility_matrix([lambda x: x], None, None, query_labels, gallery_labels)
    with pytest.raises(DataError, match="must have transform or encode"):
        compatibility_matrix([3], "q", "g", query_labels, gallery_labels)
    with pytest.raises(DataError, match="3 distinct names"):
        compatibility_matrix(
            vectors, None, None, query_labels, gallery_labels, names=["a", "a", "b"]
        )
    with pytest.raises(DataError, match="measure must be one of"):
        compatibility_matrix(vectors, None, None, query_labels, gallery_labels).matrix("f1")
    # 1 and "1" are two classes.
    with pytest.raises(DataError, match="no gallery item of their class"):
        compatibility_matrix([(np.eye(2), np.eye(2))], None, None, [1, 2], ["1", "2"])


def test_unit_vectors_in_any_precision():
    rows = np.random.default_rng(0).standard_normal((5, 3))
    for given_rows in (rows, rows.astype(np.float16), torch.from_numpy(rows)):
        assert np.abs(unit_vectors("x", given_rows) - unit(rows)).max() < 2e-3
    with pytest.raises(DataError, match=r"x must be vectors \(n, d\)"):
        unit_vectors("x", rows[0])


# The upgrade --------------------------------------------------------------------------------------


def service(n=300, n_queries=60, width=12, seed=0):
    """Return old and new vectors of queries and documents; the new model is less noisy."""
    rng = np.random.default_rng(seed)
    meaning = rng.standard_normal((n, width))
    about = rng.integers(0, n, n_queries)
    asked = meaning[about] + 0.8 * rng.standard_normal((n_queries, width))
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
    noisy = lambda rows, noise: rows + noise * rng.standard_normal(rows.shape)  # noqa: E731
    old = (noisy(asked, 0.8), noisy(meaning, 0.4))
    new = (noisy(asked, 0.05) @ turn, noisy(meaning, 0.05) @ turn)
    return old, new, about


def test_every_option_equals_its_definition():
    old, new, about = service()
    result = evaluate_upgrade(old, new, None, None, relevant=about.tolist(), n_pairs=200)
    assert list(result.options) == [
        "today", "skip re-indexing", "procrustes", "ridge", "re-index",
    ]  # fmt: skip
    for name, queries, documents in (
        ("today", old[0], old[1]),
        ("skip re-indexing", new[0], old[1]),
        ("re-index", new[0], new[1]),
    ):
        similarity = unit(queries) @ unit(documents).T
        ranks = np.array([
            1 + (row > row[a]).sum() for row, a in zip(similarity, about, strict=True)
        ])  # fmt: skip
        scores = result.options[name].per_query
        assert np.allclose(scores["mrr@10"], np.where(ranks <= 10, 1 / ranks, 0))
        assert np.allclose(scores["recall@10"], ranks <= 10)
        truth = np.zeros_like(similarity)
        truth[np.arange(len(about)), about] = 1
        expected = [
            ndcg_score(truth[i : i + 1], similarity[i : i + 1], k=10) for i in range(len(about))
        ]
        assert np.allclose(scores["ndcg@10"], expected, atol=1e-6)
    means = {name: o.per_query["mrr@10"].mean() for name, o in result.options.items()}
    assert means["re-index"] > means["procrustes"] > means["skip re-indexing"] + 0.2
    assert [o.texts_to_embed for o in result.options.values()] == [0, 0, 200, 200, 300]
    assert result.options["re-index"].seconds_to_embed is None
    verdicts = compare(result.scores(), "re-index", margin=0.02)
    assert verdicts["skip re-indexing"].overall.verdict == "worse"
    assert "re-index" in result.describe()


def test_compatible_models_can_skip():
    old, _, about = service()
    result = evaluate_upgrade(old, old, None, None, relevant=about, adapters={})
    verdicts = compare(result.scores(), "re-index", margin=0.02)
    assert verdicts["skip re-indexing"].overall.verdict == "equivalent"
    assert list(result.options) == ["today", "skip re-indexing", "re-index"]


def test_several_relevant_documents_against_scikit_learn():
    old, new, _ = service(n=80, n_queries=15)
    rng = np.random.default_rng(1)
    relevant = [rng.choice(80, size=rng.integers(1, 15), replace=False) for _ in range(15)]
    result = evaluate_upgrade(old, new, None, None, relevant=relevant, k=5, adapters={})
    similarity = unit(new[0]) @ unit(new[1]).T
    scores = result.options["re-index"].per_query
    for i, rows in enumerate(relevant):
        truth = np.zeros((1, 80))
        truth[0, rows] = 1
        assert scores["ndcg@5"][i] == pytest.approx(
            ndcg_score(truth, similarity[i : i + 1], k=5), abs=1e-6
        )
        top = np.argsort(-similarity[i])[:5]
        assert scores["recall@5"][i] == pytest.approx(np.isin(top, rows).sum() / len(rows))


def test_without_labels_options_are_judged_by_agreement():
    old, new, _ = service()
    result = evaluate_upgrade(old, new, None, None, n_pairs=250, k=7)
    assert result.measures == ("agreement@7",)
    top = lambda q, d: np.argsort(-(unit(q) @ unit(d).T), axis=1)[:, :7]  # noqa: E731
    expected = [
        len(set(a) & set(b)) / 7
        for a, b in zip(top(new[0], old[1]).tolist(), top(*new).tolist(), strict=True)
    ]
    assert np.allclose(result.options["skip re-indexing"].per_query["agreement@7"], expected)
    assert (result.options["re-index"].per_query["agreement@7"] == 1).all()
    assert any("no statement about quality" in note for note in result.notes)


def test_a_sample_holds_all_relevant_documents_and_costs_are_for_all():
    old, new, about = service()
    texts = [f"document {i}" for i in range(300)]
    asked = []

    def embed(these):
        asked.extend(these)
        return np.stack([
            new[0][int(t.split()[1])] if t.startswith("query") else new[1][int(t.split()[1])]
            for t in these
        ])  # fmt: skip

    needed = len(set(about.tolist()))
    result = evaluate_upgrade(
        None, embed, StoredIndex(texts, old[1]), [f"query {i}" for i in range(60)],
        relevant=about, n_documents=needed + 40, n_pairs=100, seed=2,
    )  # fmt: skip
    assert result.n_documents == needed + 40
    assert (result.n_index, result.n_queries) == (300, 60)
    documents = [text for text in asked if text.startswith("document")]
    assert len(documents) == len(set(documents)) == needed + 140  # pairs from outside, each once
    assert "not there" in result.unavailable["today"]
    assert result.options["re-index"].texts_to_embed == 300
    assert result.options["re-index"].seconds_to_embed > result.options["ridge"].seconds_to_embed
    assert set(result.query_seconds) == {"new"}
    again = evaluate_upgrade(
        None, embed, StoredIndex(texts, old[1]), [f"query {i}" for i in range(60)],
        relevant=about, n_documents=needed + 40, n_pairs=100, seed=2,
    )  # fmt: skip
    for name, option in result.options.items():
        assert np.array_equal(option.per_query["mrr@10"], again.options[name].per_query["mrr@10"])


def test_times_are_per_text_and_costs_for_the_whole_index(monkeypatch):
    old, new, about = service()
    now = [0.0]

    def embed(these):
        rows = [int(text.split()[1]) for text in these]
        now[0] += (0.25 if these[0].startswith("query") else 2.0) * len(rows)
        return new[0 if these[0].startswith("query") else 1][rows]

    monkeypatch.setattr("bakeoff.embedding.upgrade.time.perf_counter", lambda: now[0])
    texts = [f"document {i}" for i in range(300)]
    result = evaluate_upgrade(
        None, embed, StoredIndex(texts, old[1]), [f"query {i}" for i in range(60)],
        relevant=about, n_documents=100, n_pairs=50,
    )  # fmt: skip
    assert result.query_seconds == {"new": pytest.approx(0.25)}
    seconds = {name: option.seconds_to_embed for name, option in result.options.items()}
    assert seconds == {
        "skip re-indexing": 0.0, "procrustes": 100.0, "ridge": 100.0, "re-index": 600.0,
    }  # fmt: skip


def test_the_seed_chooses_the_documents_that_are_searched():
    old, new, about = service()
    needed = set(about.tolist())

    def searched(seed):
        rows = []

        class Spy(SkipReindex):
            def fit(self, new_rows, old_rows):
                rows.extend(np.round(row, 4).tobytes() for row in new_rows)
                return super().fit(new_rows, old_rows)

        evaluate_upgrade(
            old, new, None, None, relevant=about, n_documents=len(needed) + 30, n_pairs=20,
            adapters={"spy": Spy()}, seed=seed,
        )  # fmt: skip
        return rows

    assert searched(1) == searched(1)
    assert set(searched(1)) != set(searched(2))


def test_adapters_are_fitted_on_documents_that_are_not_judged():
    old, new, about = service()
    seen = {}

    class Spy(RidgeAdapter):
        def fit(self, new_rows, old_rows):
            seen["rows"] = {np.round(row, 5).tobytes() for row in new_rows}
            return super().fit(new_rows, old_rows)

    def fitted_on(**options):
        result = evaluate_upgrade(old, new, None, None, adapters={"spy": Spy()}, **options)
        rows = [np.round(row, 5).tobytes() for row in unit_vectors("new", new[1])]
        return {place for place, row in enumerate(rows) if row in seen["rows"]}, result

    answers = set(about.tolist())
    everything, result = fitted_on(relevant=about)  # 1,000 are wanted, 300 are there
    assert everything == set(range(300)) - answers
    assert any("none that answers a query" in note for note in result.notes)
    # A sample leaves enough outside of it.
    some, result = fitted_on(relevant=about, n_documents=100, n_pairs=150)
    assert len(some) == 150
    assert not some & answers
    assert not any("fitted on" in note for note in result.notes)
    # Where nearly all documents answer something there is no other way, and it is said.
    many = [list(range(5 * i, 5 * i + 5)) for i in range(60)]
    everything, result = fitted_on(relevant=many)
    assert everything == set(range(300))
    assert any("those that answer queries among them" in note for note in result.notes)


def test_stored_vectors_of_any_length_are_compared_by_cosine():
    old, new, about = service()
    longer = (old[0], old[1] * np.random.default_rng(1).uniform(0.1, 9, (300, 1)))
    results = [evaluate_upgrade(one, new, None, None, relevant=about) for one in (old, longer)]
    for name, option in results[0].options.items():
        assert np.array_equal(
            option.per_query["mrr@10"], results[1].options[name].per_query["mrr@10"]
        )
    assert any("differ in length" in note and "cosine" in note for note in results[1].notes)
    same = (old[0], 3 * unit(old[1]))
    assert not any(
        "differ in length" in note
        for note in evaluate_upgrade(same, new, None, None, relevant=about).notes
    )


def test_what_cannot_be_tried_is_said():
    old, new, about = service()
    narrow = (new[0][:, :9], new[1][:, :9])
    result = evaluate_upgrade(old, narrow, None, None, relevant=about)
    assert "width 9, the stored ones 12" in result.unavailable["skip re-indexing"]
    assert "ridge" in result.options
    no_texts = evaluate_upgrade(
        lambda queries: old[0], lambda queries: new[0], StoredIndex(vectors=old[1]),
        ["?"] * 60, relevant=about,
    )  # fmt: skip
    assert list(no_texts.options) == ["today", "skip re-indexing"]
    assert set(no_texts.unavailable) == {"re-index", "procrustes", "ridge"}
    own = evaluate_upgrade(old, new, None, None, adapters={"light": RidgeAdapter((0.1,))})
    assert list(own.options) == ["today", "skip re-indexing", "light", "re-index"]


def test_stored_vectors_of_another_model_are_noticed():
    old, new, about = service()
    texts = [str(i) for i in range(300)]
    embed = lambda rows: lambda t: rows[1][[int(one) for one in t]]  # noqa: E731
    queries = [str(i) for i in about]
    with pytest.warns(UserWarning, match="does not reproduce the stored vectors"):
        evaluate_upgrade(
            embed(new), embed(new), StoredIndex(texts, old[1]), queries, relevant=about
        )
    with pytest.raises(DataError, match="built by another model"):
        evaluate_upgrade(
            embed((0, new[1][:, :5])), embed(new), StoredIndex(texts, old[1]), queries,
            relevant=about,
        )  # fmt: skip


def test_an_index_that_is_right_in_its_first_row_alone_is_noticed():
    old, _, about = service()
    order = np.concatenate([[0], np.random.default_rng(0).permutation(np.arange(1, 300))])
    embed = lambda t: old[1][[int(one) for one in t]]  # noqa: E731
    index = StoredIndex([str(i) for i in range(300)], old[1][order])
    with pytest.warns(UserWarning, match="not in the order of its texts"):
        evaluate_upgrade(embed, embed, index, [str(i) for i in about], relevant=about)


def test_upgrade_bad_input():
    old, new, about = service()
    with pytest.raises(DataError, match="nothing to judge by"):
        evaluate_upgrade(None, lambda t: new[0], StoredIndex(vectors=old[1]), ["?"] * 60)
    with pytest.raises(DataError, match="query 0 names 'z', which is no id"):
        evaluate_upgrade(old, new, None, None, relevant=["z", *about[1:]])
    with pytest.raises(DataError, match="query 2 has no document"):
        evaluate_upgrade(old, new, None, None, relevant=[0, 1, [], *about[3:]])
    with pytest.raises(DataError, match="one entry per query, got 59"):
        evaluate_upgrade(old, new, None, None, relevant=about[1:])
    with pytest.raises(DataError, match="index may be None only where"):
        evaluate_upgrade(lambda t: t, new, None, None)
    with pytest.raises(DataError, match="document vectors of new must be 300"):
        evaluate_upgrade(old, (new[0], new[1][1:]), None, None)
    with pytest.raises(DataError, match="one number above 0"):
        evaluate_upgrade(old, (new[0][1:], new[1]), None, None)
    with pytest.raises(DataError, match="hold the"):
        evaluate_upgrade(old, new, None, None, relevant=about, n_documents=10)
    with pytest.raises(DataError, match="must not be named"):
        evaluate_upgrade(old, new, None, None, adapters={"today": SkipReindex()})
    with pytest.raises(DataError, match=r"query 1 names 2\.5, which is no id and no row"):
        evaluate_upgrade(old, new, None, None, relevant=[0, 2.5, *about[2:]])
    with pytest.raises(DataError, match="got none"):
        evaluate_upgrade(None, lambda t: t, StoredIndex(vectors=old[1]), None)
    with pytest.raises(DataError, match="got 60 vectors by new, 1 texts"):
        evaluate_upgrade(None, new, StoredIndex(vectors=old[1]), ["?"])
    # Of ten documents every way finds the same ten.
    with pytest.raises(DataError, match="of 10 documents every way finds the same first 10"):
        evaluate_upgrade((old[0], old[1][:10]), (new[0], new[1][:10]), None, None)
    # A bad vector is named by its place in the index, not in the sample of it.
    broken = np.where(np.arange(300)[:, None] == 250, np.nan, old[1])
    for one, other in (((old[0], broken), new), (old, (new[0], broken))):
        with pytest.raises(DataError, match="vector 250 is not finite"):
            evaluate_upgrade(one, other, None, None, relevant=[250] * 60, n_documents=20)
    with pytest.raises(DataError, match="new must be a model"):
        evaluate_upgrade(old, None, StoredIndex(vectors=old[1]), None)


# Index files --------------------------------------------------------------------------------------


def test_index_files_of_all_kinds(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((5, 3)).astype(np.float32)
    texts, ids = [f"text {i}" for i in range(5)], [f"d{i}" for i in range(5)]
    np.save(tmp_path / "v.npy", vectors)
    index = read_index(tmp_path / "v.npy", texts=texts)
    assert np.array_equal(index.vectors, vectors)
    assert isinstance(index.vectors, np.memmap)
    assert (index.texts, index.ids) == (tuple(texts), tuple("01234"))
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 3), pa.list_(pa.float64())):
        table = pa.table({
            "doc_id": ids, "Embedding": pa.array(vectors.tolist(), kind), "text": texts,
        })  # fmt: skip
        pa.parquet.write_table(table, tmp_path / "v.parquet", row_group_size=2)
        index = read_index(tmp_path / "v.parquet")
        assert np.array_equal(index.vectors, vectors)
        assert (index.texts, index.ids) == (tuple(texts), tuple(ids))
    lines = [{"id": i, "passage": t} for i, t in zip(ids, texts, strict=True)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    index = read_index(tmp_path / "d.jsonl")
    assert (index.texts, index.ids, index.vectors) == (tuple(texts), tuple(ids), None)
    index = read_index(tmp_path / "d.jsonl", text_column="id", id_column="passage")
    assert index.ids == tuple(texts)


def test_odd_index_files(tmp_path):
    (tmp_path / "d.txt").write_bytes("\ufeffone\u2028and more\r\n\r\n two\n".encode())
    assert read_index(tmp_path / "d.txt").texts == ("one\u2028and more", "two")
    (tmp_path / "d.csv").write_text('id,text,embedding\na,x,"[1, 2]"\nb,y,"[3, 4.5]"\n')
    assert read_index(tmp_path / "d.csv").vectors.tolist() == [[1, 2], [3, 4.5]]
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        table = pa.table({"id": [f"{number}"], "text": ["t"], "vector": [[1.0, number]]})
        pa.parquet.write_table(table, shards / f"part-{number}.parquet")
    index = read_index(shards)
    assert (index.ids, index.vectors.tolist()) == (("0", "1"), [[1, 0], [1, 1]])
    pa.parquet.write_table(pa.table({"id": ["2"], "text": ["t"]}), shards / "part-2.parquet")
    with pytest.raises(DataError, match="shards differ in their columns"):
        read_index(shards)
    for name, content, message in (
        ("latin.txt", b"caf\xe9\n", "not UTF-8 at byte 3"),
        ("x.npz", b"z", r"an index is one of \.npy, .*, got '\.npz'"),
        ("id.jsonl", b'{"id": "a", "text": "x"}\n{"text": "y"}\n', "line 2: no id in column 'id'"),
        ("null.jsonl", b'{"id": null, "text": "x"}\n', "line 1: no id in column 'id'"),
        ("v.csv", b"text,vector\nx,1 2\n", "lists of numbers of one length"),
        ("t.jsonl", b'{"text": "x"}\n{"text": 3}\n', "row 1 must be a string, got 3"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_index(tmp_path / name)
    pa.parquet.write_table(
        pa.table({"id": ["a", None], "text": ["x", "y"]}), tmp_path / "n.parquet"
    )
    with pytest.raises(DataError, match="row 2: no id in column 'id'"):
        read_index(tmp_path / "n.parquet")
    with pytest.raises(DataError, match="the text of row 1 must be a string, got None"):
        StoredIndex(["x", None])


def test_bad_index_files(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        read_index(tmp_path / "none.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"no readable \.npy file"):
        read_index(tmp_path / "objects.npy")
    np.save(tmp_path / "flat.npy", np.ones(4))
    with pytest.raises(DataError, match=r"array \(N, d\), got float64 of shape \(4,\)"):
        read_index(tmp_path / "flat.npy")
    ragged = pa.table({"vector": [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]], "id": ["a", "b"]})
    pa.parquet.write_table(ragged, tmp_path / "ragged.parquet", row_group_size=1)
    with pytest.raises(DataError, match="lists of numbers of one length"):
        read_index(tmp_path / "ragged.parquet")
    pa.parquet.write_table(ragged, tmp_path / "one_group.parquet")
    with pytest.raises(DataError, match="lists of numbers of one length"):
        read_index(tmp_path / "one_group.parquet")
    pa.parquet.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no column of texts"):
        read_index(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="has no column 'y', it has"):
        read_index(tmp_path / "x.parquet", text_column="y")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match="no readable Parquet"):
        read_index(tmp_path / "junk.parquet")
    with pytest.raises(DataError, match="'a' occurs twice"):
        StoredIndex(["x", "y"], ids=("a", "a"))
    with pytest.raises(DataError, match="of one length, got 2 and 3"):
        StoredIndex(["x", "y"], np.ones((3, 2)))


# Models -------------------------------------------------------------------------------------------


def test_models_by_folder_with_our_own_modules(tmp_path):
    folders = []
    for seed in (0, 1):
        model = stationary_encoder(embedder(tmp_path / "base", MeanPooling(16)), 12, seed=seed)
        folders.append(str(tmp_path / f"version-{seed}"))
        model.save(folders[-1])
    seen = []
    result = evaluate_upgrade(
        folders[0], folders[1], list(TEXTS), [TEXTS[0], TEXTS[2]], relevant=[0, 2], k=2,
        progress=lambda what, done, total: seen.append(what),
    )  # fmt: skip
    assert (result.options["re-index"].per_query["mrr@2"] == 1).all()
    assert result.options["re-index"].seconds_to_embed > 0
    assert set(result.query_seconds) == {"old", "new"}
    assert {"queries by the old model", "documents by the new model"} <= set(seen)


def test_models_with_roles_and_texts_that_are_cut(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router

    def turned(seed):
        turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((16, 16)))[0]
        return Dense(
            *(16, 16),
            bias=False,
            activation_function=torch.nn.Identity(),
            init_weight=torch.from_numpy(turn.astype(np.float32)),
        )

    base = embedder(tmp_path / "base", MeanPooling(16))
    routes = Router({"query": [turned(0)], "document": [turned(1)]}, default_route="query")
    model = SentenceTransformer(modules=[*base, routes], device="cpu")
    texts, queries = [" ".join(TEXTS[: n + 1]) for n in range(4)], [TEXTS[0], TEXTS[2]]
    index = StoredIndex(texts, model.encode_document(texts))
    result = evaluate_upgrade(model, base, index, queries, relevant=[0, 2], k=2, adapters={})
    similarity = unit(model.encode_query(queries)) @ unit(index.vectors).T
    ranks = [(similarity[i] >= similarity[i, a]).sum() for i, a in enumerate((0, 2))]
    expected = [1 / rank if rank <= 2 else 0 for rank in ranks]
    assert np.allclose(result.options["today"].per_query["mrr@2"], expected)
    assert not any("reproduce" in note or "cut off" in note for note in result.notes)
    base.max_seq_length = 8
    result = evaluate_upgrade(None, base, index, queries, relevant=[0, 2], k=2, adapters={})
    (note,) = (note for note in result.notes if "cut off" in note)
    assert "of 4 documents are longer than the new model's 8 tokens" in note


def test_queries_and_documents_have_prompts_of_their_own(tmp_path):
    model = embedder(tmp_path / "base", MeanPooling(16))
    model.prompts = {"query": "find : ", "document": "under the "}
    texts, queries = [" ".join(TEXTS[: n + 1]) for n in range(4)], [TEXTS[0], TEXTS[2]]
    index = StoredIndex(texts, model.encode_document(texts))
    assert np.abs(index.vectors - model.encode(texts)).max() > 0.01
    result = evaluate_upgrade(model, model, index, queries, relevant=[0, 2], k=4, adapters={})
    assert not any("reproduce" in note for note in result.notes)
    similarity = unit(model.encode_query(queries)) @ unit(index.vectors).T
    ranks = np.array([(similarity[i] >= similarity[i, a]).sum() for i, a in enumerate((0, 2))])
    for name in ("today", "skip re-indexing", "re-index"):
        assert np.allclose(result.options[name].per_query["mrr@4"], 1 / ranks)
    # Judged by agreement with documents under the wrong prompt, these would not be all found.
    made = evaluate_upgrade(None, model, index, queries, k=2, adapters={})
    assert (made.options["skip re-indexing"].per_query["agreement@2"] == 1).all()
    bare = StoredIndex(texts, model.encode(texts))
    with pytest.warns(UserWarning, match="or with a prompt"):
        evaluate_upgrade(model, model, bare, queries, relevant=[0, 2], k=2, adapters={})


@pytest.mark.model
def test_real_encoders_on_the_standard_library():
    from bakeoff.data.embedded import standard_library_pairs

    pairs = [p for p in standard_library_pairs() if p.package in ("email", "asyncio", "http")][:300]
    cut = lambda texts: [text[:300] for text in texts]  # noqa: E731
    result = evaluate_upgrade(
        "all-minilm-l6-v2",
        _truncated_minilm(256),
        cut([p.code for p in pairs]),
        cut([p.docstring for p in pairs[:60]]),
        relevant=list(range(60)),
    )
    means = {name: o.per_query["mrr@10"].mean() for name, o in result.options.items()}
    assert "width 256" in result.unavailable["skip re-indexing"]
    assert means["today"] > 0.35
    assert abs(means["re-index"] - means["today"]) < 0.1
    assert means["ridge"] > means["today"] - 0.2


def _truncated_minilm(width):
    """Return MiniLM with a random projection: as good a model, in another space."""
    from bakeoff.models import TextEncoder

    encoder = TextEncoder("all-minilm-l6-v2")
    turn = np.random.default_rng(0).standard_normal((384, width)) / np.sqrt(width)
    return lambda texts: encoder.encode(texts) @ turn
