"""Ranks, CSLS and correlations against their definitions. About 3 seconds."""

import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr

from bakeoff.data.lexicons import Constraints, Lexicon, lexicon
from bakeoff.embedding import lexicon_induction
from bakeoff.embedding.lexicon_induction import (
    bli,
    bli_lexicon,
    csls_offsets,
    ranks_of_gold,
    translate,
    word_similarity,
)
from bakeoff.errors import DataError


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def csls(x, y, k, background=None):
    """The definition, all at once."""
    cosine = unit(x) @ unit(y).T
    pool = unit(x if background is None else background) @ unit(y).T
    r_source = np.sort(cosine, axis=1)[:, -k:].mean(axis=1)
    r_target = np.sort(pool, axis=0)[-k:].mean(axis=0)
    return 2 * cosine - r_source[:, None] - r_target[None, :]


def ranks_by_sorting(scores, gold):
    ranks = []
    for row, right in zip(scores, gold, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        ranks.append(1 + min(order.index(one) for one in right))
    return ranks


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 15), st.integers(0, 10**6),
    st.sampled_from([None, 1, 3, 50]),
    st.sampled_from([7, 10**6]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_ranks_are_those_of_sorting_all_scores(n, m, seed, k, block, sparse, with_background):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, 6)), rng.standard_normal((m, 6))
    background = rng.standard_normal((9, 6)) if with_background else None
    gold = [
        sorted(rng.choice(m, size=rng.integers(1, min(m, 3) + 1), replace=False).tolist())
        for _ in range(n)
    ]
    if k is None:
        scores = unit(x) @ unit(y).T
    else:
        pool = 9 if with_background else n
        scores = csls(x, y, min(k, pool), background) if k <= min(m, pool) else None
        if scores is None:  # neighbours of the question shift its scores alike: no rank changes
            inner = unit(x) @ unit(y).T
            near = unit(x if background is None else background) @ unit(y).T
            scores = 2 * inner - np.sort(near, axis=0)[-min(k, pool) :].mean(axis=0)
    as_given = csr_matrix if sparse else np.asarray
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lexicon_induction, "_BLOCK_ENTRIES", block)
        patch.setattr(lexicon_induction, "_ROWS_PER_CALL", 4)
        ranks, nearest = ranks_of_gold(
            as_given(3 * x),
            as_given(y),
            gold,
            csls_k=k,
            background=None if background is None else as_given(background),
        )
    assert ranks.tolist() == ranks_by_sorting(scores, gold)
    assert nearest.tolist() == scores.argmax(axis=1).tolist()


def test_of_equal_candidates_the_first_in_the_vocabulary_is_placed_first():
    x = np.array([[1.0, 0.0]])
    y = np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [4.0, 0.0], [-1.0, 0.0]])
    for gold, rank in ((1, 1), (2, 2), (3, 3), (0, 4), (4, 5)):
        ranks, nearest = ranks_of_gold(x, y, [[gold]])
        assert ranks.tolist() == [rank]
        assert nearest.tolist() == [1]
    assert ranks_of_gold(x, y, [[2, 3]])[0].tolist() == [2]
    assert ranks_of_gold(x, y, [[3, 2]])[0].tolist() == [2]
    assert ranks_of_gold(x, y, [[2]], excluded=[1])[0].tolist() == [1]
    rows, scores = translate(x, y, n=4, csls_k=None)
    assert rows.tolist() == [[1, 2, 3, 0]]
    assert scores.tolist() == [[1, 1, 1, 0]]


def test_scores_are_those_of_the_authors_code():
    # Frozen from their utils/functions.py (commit 141cb24), run on these arrays.
    rng = np.random.default_rng(0)
    source, target = rng.standard_normal((12, 6)), rng.standard_normal((40, 6))
    gold = rng.integers(0, 40, 12)
    ranks, _ = ranks_of_gold(source, target, gold[:, None].tolist())
    assert (1 / ranks).mean() == pytest.approx(0.14406645597378356)  # compute_mrr
    assert (ranks == 1).mean() == pytest.approx(0.08333333333333333)  # compute_p1
    ranks, _ = ranks_of_gold(
        source, source + rng.standard_normal((12, 6)), [[row] for row in range(12)]
    )
    assert (1 / ranks).mean() == pytest.approx(0.7111111111111111)  # retrieval_func, "mrr"
    assert (ranks == 1).mean() == 0.5  # retrieval_func, "p@1"


@pytest.mark.parametrize("block", [10**6, 2 * 1003])
@pytest.mark.parametrize("k", [None, 5])
def test_equal_candidates_tie_in_every_block_also_in_one_of_a_single_question(
    monkeypatch, block, k
):
    # A matrix times one vector sums in another order than a product of matrices.
    monkeypatch.setattr(lexicon_induction, "_BLOCK_ENTRIES", block)
    rng = np.random.default_rng(0)
    for d in (33, 384):
        target = rng.standard_normal((1003, d))
        target[501:1002] = target[:501]
        for n in (1, 3):  # alone, or alone in the last block
            source = rng.standard_normal((n, d))
            for gold in range(0, 501, 25):
                first, _ = ranks_of_gold(source, target, [[gold]] * n, csls_k=k)
                second, _ = ranks_of_gold(source, target, [[gold + 501]] * n, csls_k=k)
                assert (second - first).tolist() == [1] * n


def test_ranking_holds_one_block_of_similarities_at_a_time():
    rng = np.random.default_rng(0)
    source = rng.standard_normal((1500, 4), dtype=np.float32)
    target = rng.standard_normal((50_000, 4), dtype=np.float32)
    tracemalloc.start()
    ranks_of_gold(source, target, [[row] for row in range(1500)])  # all at once: 286 MiB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80 * 2**20


@pytest.mark.parametrize("k", [1, 4, 99])
@pytest.mark.parametrize("sparse", [False, True])
def test_offsets_and_translations_are_those_of_the_definition(k, sparse):
    rng = np.random.default_rng(k)
    x, y = rng.standard_normal((11, 5)), rng.standard_normal((13, 5))
    as_given = csr_matrix if sparse else np.asarray
    calls = []
    one, other = csls_offsets(
        as_given(x), as_given(y), k, progress=lambda *done: calls.append(done)
    )
    cosine = unit(x) @ unit(y).T
    assert np.allclose(one, np.sort(cosine, axis=1)[:, -k:].mean(axis=1), atol=1e-6)
    assert np.allclose(other, np.sort(cosine, axis=0)[-k:].mean(axis=0), atol=1e-6)
    assert calls[-1] == (24, 24)
    rows, scores = translate(as_given(x), as_given(y), 3, csls_k=k)
    expected = 2 * cosine - one[:, None] - other[None, :]
    assert rows.tolist() == np.argsort(-expected, axis=1)[:, :3].tolist()
    assert np.allclose(scores - one[:, None], -np.sort(-expected, axis=1)[:, :3], atol=1e-5)


def test_csls_undoes_a_hub():
    # One candidate is near to everything; CSLS takes that from it.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 30))
    y = x + 1.2 * rng.standard_normal((60, 30))
    x, y = x + 1.0, np.vstack([y + 1.0, np.ones((1, 30))])
    gold = [[row] for row in range(60)]
    plain, nearest = ranks_of_gold(x, y, gold)
    corrected, _ = ranks_of_gold(x, y, gold, csls_k=10)
    assert (nearest == 60).mean() > 0.2
    assert (1 / corrected).mean() > (1 / plain).mean() + 0.1


TABLE = {"dog": [1, 0.1], "cat": [0, 1], "owl": [1, 1], "chien": [1, 0], "chat": [0.1, 1],
         "hibou": [1, 0.9], "Paris": [-1, 0], "paris": [-1, 0]}  # fmt: skip


def encode(words):
    return np.array([TABLE[word] for word in words], dtype=np.float32)


def test_dropped_questions_are_reported_with_their_reasons():
    scores = bli(
        encode,
        ["dog", "cat", "owl", "Paris", "paris"],
        ["chien", "chat", "chat", "paris"],
        ["chien", ("minou", "chat"), "hibou", "Paris", "paris"],
        source_vocabulary=["dog", "cat", "owl", "paris"],
        has_tokens=lambda words: np.array([word != "paris" or len(words) != 5 for word in words]),
    )
    # "Paris" is looked up as "paris" on both sides; "paris" as a question has no token here.
    assert scores.source_words == ("dog", "cat", "Paris")
    assert scores.rows.tolist() == [0, 1, 3]
    assert scores.n_dropped() == {"no translation in vocabulary": 1, "no token": 1}
    assert scores.dropped[0] == ("owl", "no translation in vocabulary")
    assert scores.n_candidates == 3
    assert scores.mrr == 1.0
    outside = bli(encode, ["dog", "cat"], ["chien", "chat"], ["chien", "chat"],
                  source_vocabulary=["dog"])  # fmt: skip
    assert outside.n_dropped() == {"source word not in vocabulary": 1}


def test_scores_per_query_and_their_means():
    scores = bli(
        encode, ["dog", "cat", "owl"], ["chien", "hibou", "chat"], ["hibou", "chat", "chien"]
    )
    assert scores.ranks.tolist() == [2, 1, 3]
    assert scores.nearest == ("chien", "chat", "hibou")
    assert scores.mrr == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)
    assert scores.precision_at_1 == scores.score("p@1") == pytest.approx(1 / 3)
    assert scores.precision_at(2) == pytest.approx(2 / 3)
    for metric in ("mrr", "p@1"):
        assert scores.per_query(metric).mean() == pytest.approx(scores.score(metric))
    part = scores.select(np.array([True, False, True]))
    assert part.source_words == ("dog", "owl")
    assert part.mrr == pytest.approx((1 / 2 + 1 / 3) / 2)
    with pytest.raises(DataError, match="metric must be"):
        scores.score("map")
    with pytest.raises(DataError, match="no question is left"):
        scores.select(np.zeros(3, dtype=bool))


def test_synonyms_do_not_find_themselves():
    words = Constraints.of(
        [("1", "dog", "x"), ("1", "chien", "x"), ("2", "cat", "x"), ("2", "chat", "x")]
    )
    test = lexicon(words, "x", "x")
    scores = bli_lexicon(encode, test)
    assert len(test) == 4
    assert scores.mrr == 1.0
    assert scores.nearest == ("chien", "dog", "chat", "cat")


def test_a_word_is_no_right_answer_to_itself():
    test = Lexicon("x", "x", ("dog", "cat"), (("dog", "chien"), ("cat",)), ("dog", "chien", "cat"))
    scores = bli_lexicon(encode, test)
    assert scores.source_words == ("dog",)
    assert scores.nearest == ("chien",)
    assert scores.ranks.tolist() == [1]
    assert scores.dropped == (("cat", "no translation in vocabulary"),)


def test_vectors_of_half_precision_are_not_taken_for_infinite():
    x = np.full((2, 4), 30_000, dtype=np.float16)
    assert ranks_of_gold(x, x, [[0], [1]])[0].tolist() == [1, 2]


def test_two_encoders_tensors_and_background_vocabulary():
    seen = []

    def tensors(words):
        seen.append(tuple(words))
        return torch.tensor([TABLE[word] for word in words], dtype=torch.bfloat16)

    test = Lexicon("en", "fr", ("dog",), (("chien",),), ("chien", "chat"), ("dog", "cat", "owl"))
    scores = bli_lexicon(tensors, test, csls_k=2, encode_target=tensors)
    assert scores.ranks.tolist() == [1]
    assert seen == [("chien", "chat"), ("dog",), ("dog", "cat", "owl")]


def test_word_similarity_is_spearmans_of_cosines():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(20)]
    table = dict(zip(words, rng.standard_normal((20, 6)), strict=True))
    first, second = rng.choice(words, 30).tolist(), rng.choice(words, 30).tolist()
    judged = rng.integers(0, 5, 30)  # with ties
    calls = []

    def vectors(given):
        calls.append(list(given))
        return np.array([table[word] for word in given])

    found = word_similarity(vectors, first, second, judged)
    cosines = [
        (unit(table[a][None]) @ unit(table[b][None]).T).item()
        for a, b in zip(first, second, strict=True)
    ]
    assert np.allclose(found.cosines, cosines, atol=1e-6)
    assert found.spearman == pytest.approx(spearmanr(np.round(cosines, 6), judged).statistic)
    assert all(len(call) == len(set(call)) for call in calls)
    assert word_similarity(vectors, first, second, 2.0**judged).spearman == found.spearman
    deaf = word_similarity(
        vectors, first, second, judged, has_tokens=lambda ws: np.array([w != first[0] for w in ws])
    )
    assert {first[0]} <= {w for pair in deaf.dropped for w in pair}
    assert len(deaf.rows) + len(deaf.dropped) == 30
    both = word_similarity(lambda ws: csr_matrix(vectors(ws)), first, second, judged)
    assert both.spearman == pytest.approx(found.spearman)


def test_bad_input():
    x = np.eye(3)
    with pytest.raises(DataError, match="none, or the source words"):
        bli(encode, ["dog"], ["chat"], ["chien"])
    with pytest.raises(DataError, match="one length above 0, got 1 and 2"):
        bli(encode, ["dog"], ["chat"], ["chien", "chat"])
    with pytest.raises(DataError, match=re.escape("gold[1] is empty")):
        ranks_of_gold(x, x, [[0], [], [1]])
    with pytest.raises(DataError, match="rows from 0 to 2, got"):
        ranks_of_gold(x, x, [[0], [3], [1]])
    with pytest.raises(DataError, match="gold must have 3 entries"):
        ranks_of_gold(x, x, [[0]])
    with pytest.raises(DataError, match="excluded must have 3 entries, one per question, got 1"):
        ranks_of_gold(x, x, [[0]] * 3, excluded=[1])
    for row in (0, 3):
        with pytest.raises(DataError, match=re.escape("excluded[2] must be a row below 3 that is")):
            ranks_of_gold(x, x, [[0]] * 3, excluded=[1, -1, row])
    with pytest.raises(DataError, match="widths 3 and 2"):
        ranks_of_gold(x, x[:, :2], [[0]] * 3)
    with pytest.raises(DataError, match="not all finite"):
        ranks_of_gold(x + np.inf, x, [[0]] * 3)
    with pytest.raises(DataError, match="one side's vectors are sparse"):
        ranks_of_gold(csr_matrix(x), x, [[0]] * 3)
    with pytest.raises(DataError, match="csls_k must be at least 1"):
        ranks_of_gold(x, x, [[0]] * 3, csls_k=0)
    with pytest.raises(DataError, match="n must be between 1 and 3"):
        translate(x, x, n=4)
    with pytest.raises(DataError, match=r"got \(3,\)"):
        ranks_of_gold(np.ones(3), x, [[0]] * 3)
    with pytest.raises(DataError, match="one length"):
        word_similarity(encode, ["dog"], ["cat"], [1, 2])
    with pytest.raises(DataError, match="at least 3"):
        word_similarity(encode, ["dog"] * 3, ["cat"] * 3, [1, 1, 1])
