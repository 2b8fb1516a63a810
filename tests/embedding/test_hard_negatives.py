"""Mining against brute force and sentence-transformers' own miner. About 3 seconds."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.util import mine_hard_negatives as library_miner

from bakeoff.embedding import hard_negatives, mine_hard_negatives
from bakeoff.embedding.training import negatives_of
from bakeoff.errors import DataError


class Teacher:
    """A table of vectors with what both miners ask of a SentenceTransformer."""

    device = torch.device("cpu")

    def __init__(self, seed=0, width=4):
        self.rng = np.random.default_rng(seed)
        self.width = width
        self.table = {}
        self.calls = []

    def encode_document(self, texts, **_):
        self.calls.append(list(texts))
        for text in texts:
            if text not in self.table:
                vector = self.rng.standard_normal(self.width) + 0.5
                self.table[text] = (vector / np.linalg.norm(vector)).astype(np.float32)
        return np.stack([self.table[text] for text in texts])

    encode_query = encode_document

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=1)


def pairs(n, extra=0):
    queries = [f"q{i}" for i in range(n)]
    positives = [f"p{i}" for i in range(n)]
    return queries, positives, positives + [f"d{i}" for i in range(extra)]


def by_brute_force(teacher, queries, positives, corpus, n, ratio, ceiling, skip):
    embed = lambda text: teacher.encode_document([text])[0].astype(np.float64)  # noqa: E731
    found = []
    for query in queries:
        own = {p for q, p in zip(queries, positives, strict=True) if q == query}
        limit = min(embed(query) @ embed(p) for p in own)
        limit = np.inf if ratio is None else limit - (1 - ratio) * abs(limit)
        if ceiling is not None:
            limit = min(limit, ceiling)
        scored = sorted(
            (-(embed(query) @ embed(text)), text)
            for text in set(corpus) - own - {query}
            if embed(query) @ embed(text) <= limit
        )
        found.append([text for _, text in scored[skip : skip + n]])
    return found


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 25),
    extra=st.integers(0, 25),
    n=st.integers(1, 6),
    ratio=st.sampled_from([None, 0.95, 0.6]),
    ceiling=st.sampled_from([None, 0.7]),
    skip=st.integers(0, 3),
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 40, 10**6]),
)
@pytest.mark.filterwarnings("ignore:.*have no negative left")
def test_equals_brute_force(size, extra, n, ratio, ceiling, skip, seed, block):
    teacher = Teacher(seed)
    queries, positives, corpus = pairs(size, extra)
    queries[-1] = queries[0]  # one query with two positives
    corpus = corpus + corpus[:3]  # some documents twice
    expected = by_brute_force(teacher, queries, positives, corpus, n, ratio, ceiling, skip)
    options = {"max_score_ratio": ratio, "max_score": ceiling, "skip_top": skip}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hard_negatives, "_BLOCK_ENTRIES", block)
        if not any(expected):
            with pytest.raises(DataError, match=f"none of the {size} queries"):
                mine_hard_negatives(teacher, queries, positives, corpus, num_negatives=n, **options)
            return
        mined = mine_hard_negatives(teacher, queries, positives, corpus, num_negatives=n, **options)
    for row, texts in enumerate(expected):
        assert [corpus[i] for i in mined.indices[row] if i >= 0] == texts
        assert (mined.indices[row] >= 0).sum() == len(texts)
        assert np.isnan(mined.scores[row, len(texts) :]).all()
        assert (np.diff(mined.scores[row, : len(texts)]) <= 0).all()
    assert mined.n_without == sum(not texts for texts in expected)
    assert mined.n_incomplete == sum(len(texts) < n for texts in expected)


@pytest.mark.parametrize("skip", [0, 2])
def test_equals_sentence_transformers(skip):
    teacher = Teacher(seed=5, width=8)
    queries, positives, corpus = pairs(40, 60)
    theirs = library_miner(
        Dataset.from_dict({"query": queries, "positive": positives}),
        teacher,
        corpus=corpus,
        range_min=skip,
        range_max=100,  # the whole corpus, so that it cannot run out of candidates
        relative_margin=0.05,
        num_negatives=5,
        output_format="n-tuple",
        verbose=False,
    )
    mined = mine_hard_negatives(teacher, queries, positives, corpus, num_negatives=5, skip_top=skip)
    ours = mined.pairs()
    columns = [theirs[f"negative_{i}"] for i in range(1, 6)]
    assert len(ours) > 20
    assert list(ours.queries) == list(theirs["query"])
    assert negatives_of(ours) == [tuple(row) for row in zip(*columns, strict=True)]


def test_planted_paraphrases_are_passed_over():
    rng = np.random.default_rng(0)
    documents = rng.standard_normal((50, 16))
    queries = documents[:20] + 0.3 * rng.standard_normal((20, 16))
    paraphrases = documents[:20] + 0.02 * rng.standard_normal((20, 16))
    corpus = [f"d{i}" for i in range(50)] + [f"d{i} again" for i in range(20)]
    vectors = (queries, np.concatenate([documents, paraphrases]))
    texts = [f"q{i}" for i in range(20)]

    def share_of_false_negatives(ratio):
        mined = mine_hard_negatives(
            vectors, texts, corpus[:20], corpus, num_negatives=3, max_score_ratio=ratio
        )
        return np.mean([50 + row in mined.indices[row] for row in range(20)])

    assert share_of_false_negatives(None) == 1.0
    assert share_of_false_negatives(0.95) == 0.0


def test_teachers_of_all_kinds_agree():
    teacher = Teacher(seed=2)
    queries, positives, corpus = pairs(12, 12)
    expected = mine_hard_negatives(teacher, queries, positives, corpus, num_negatives=2)
    tensors = mine_hard_negatives(
        lambda texts: torch.from_numpy(3 * teacher.encode_document(texts)),
        queries,
        positives,
        corpus,
        num_negatives=2,
    )
    given_vectors = mine_hard_negatives(
        (teacher.encode_query(queries), teacher.encode_document(corpus)),
        queries,
        positives,
        corpus,
        num_negatives=2,
    )
    for other in (tensors, given_vectors):
        assert np.array_equal(other.indices, expected.indices)


def test_each_text_is_embedded_once_and_missing_positives_too():
    teacher = Teacher()
    queries, positives, _ = pairs(4)
    mined = mine_hard_negatives(
        teacher, queries, positives, ["d1", "d2", "d1", "p0"], num_negatives=1, max_score_ratio=None
    )
    assert teacher.calls == [queries, ["d1", "d2", "p0", "p1", "p2", "p3"]]
    assert set(mined.indices.flatten().tolist()) <= {0, 1, 3}
    assert mined.indices[0, 0] != 3


def test_a_query_is_not_its_own_negative():
    texts = ["a", "b", "c"]
    vectors = np.eye(3) + 0.1
    mined = mine_hard_negatives(
        (vectors, vectors), texts, ["b", "c", "a"], texts, num_negatives=1, max_score_ratio=None
    )
    assert mined.indices.flatten().tolist() == [2, 0, 1]


@pytest.mark.filterwarnings("ignore:.*have no negative left")
def test_one_negative_is_a_plain_text_and_several_are_tuples():
    queries, positives, corpus = pairs(8, 20)
    one = mine_hard_negatives(Teacher(), queries, positives, corpus, num_negatives=1).pairs("m")
    assert one.group == "m"
    assert all(isinstance(negative, str) for negative in one.negatives)
    two = mine_hard_negatives(Teacher(), queries, positives, corpus, num_negatives=2).pairs()
    assert all(len(negative) == 2 for negative in two.negatives)


def test_queries_without_negatives_are_counted():
    vectors = np.array([[1.0, 0.0], [0.02, 1.0]])
    corpus = np.array([[1.0, 0.0], [1.0, 0.02], [1.0, 0.01]])  # all fit the first query
    with pytest.warns(UserWarning, match="1 of 2 queries have no negative left"):
        mined = mine_hard_negatives(
            (vectors, corpus),
            ["q0", "q1"],
            ["p0", "p1"],
            ["p0", "p1", "d"],
            num_negatives=1,
        )
    assert mined.n_without == 1
    assert mined.pairs().queries == ("q1",)


def test_bad_input():
    queries, positives, corpus = pairs(3, 3)
    vectors = np.eye(6)
    with pytest.raises(DataError, match="one length above 0, got 3 and 2"):
        mine_hard_negatives(Teacher(), queries, positives[:2])
    with pytest.raises(ValueError, match="num_negatives must be at least 1"):
        mine_hard_negatives(Teacher(), queries, positives, num_negatives=0)
    with pytest.raises(TypeError, match="teacher must be"):
        mine_hard_negatives("all-MiniLM", queries, positives)
    with pytest.raises(DataError, match=r"query vectors must be \(3, d\), got shape \(6, 6\)"):
        mine_hard_negatives((vectors, vectors), queries, positives, corpus)
    with pytest.raises(DataError, match="not all finite"):
        mine_hard_negatives((vectors[:3] * np.nan, vectors), queries, positives, corpus)
    with pytest.raises(DataError, match="width 5, its corpus vectors 6"):
        mine_hard_negatives((vectors[:3, :5], vectors), queries, positives, corpus)
    with pytest.raises(DataError, match="corpus lacks 3 of the positives"):
        mine_hard_negatives((vectors[:3], vectors[:3]), queries, positives, ["a", "b", "c"])
    with pytest.raises(DataError, match="must return"):
        mine_hard_negatives(lambda texts: np.zeros(3), queries, positives)
    few = mine_hard_negatives(Teacher(), queries, positives, num_negatives=9, max_score_ratio=None)
    with pytest.raises(DataError, match="no query has all 9 negatives"):
        few.pairs()
