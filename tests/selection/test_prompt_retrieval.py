"""Prompt examples against a plain walk, and worked cases of every rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from bakeoff.errors import DataError
from bakeoff.selection.prompt_retrieval import SimilarityPromptRetriever

ANGLES = np.radians([0, 10, 20, 30, 40])
CIRCLE = np.column_stack([np.cos(ANGLES), np.sin(ANGLES)])
LENGTHS = [1, 2, 4, 1, 3]


def words(n):
    return " ".join(["w"] * n)


def retriever(max_tokens=100, lengths=LENGTHS, **options):
    texts = [words(n) for n in lengths]
    return SimilarityPromptRetriever(CIRCLE, texts, str.split, max_tokens, **options)


def picks(found):
    return [rows.tolist() for rows in found]


def at(degrees):
    radians = np.radians(np.atleast_1d(degrees))
    return np.column_stack([np.cos(radians), np.sin(radians)])


def test_most_similar_last():
    assert picks(retriever().retrieve(at([1, 39]))) == [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]
    assert picks(retriever(order="descending").retrieve(at(1))) == [[0, 1, 2, 3, 4]]


def test_the_walk_stops_at_the_budget_and_does_not_skip():
    # From row 0: 1 + 2 tokens, then 4 would make 7. Row 3, with 1 token, would still fit.
    assert picks(retriever(6).retrieve(at(1))) == [[1, 0]]
    assert picks(retriever(7).retrieve(at(1))) == [[2, 1, 0]]  # the budget itself is allowed


def test_long_examples_are_skipped():
    assert picks(retriever(max_example_tokens=3).retrieve(at(1))) == [[4, 3, 1, 0]]
    assert picks(retriever(max_example_tokens=4).retrieve(at(1))) == [[4, 3, 2, 1, 0]]
    long = retriever(2000, lengths=[250, 251, 1, 1, 1])
    assert picks(long.retrieve(at(1))) == [[4, 3, 2, 0]]
    unlimited = retriever(2000, lengths=[250, 251, 1, 1, 1], max_example_tokens=None)
    assert picks(unlimited.retrieve(at(1))) == [[4, 3, 2, 1, 0]]


def test_the_inputs_own_tokens_count():
    assert picks(retriever(7).retrieve(at(1), [words(1)])) == [[1, 0]]
    assert picks(retriever(7).retrieve(at(1), [("", "")])) == [[2, 1, 0]]
    with pytest.warns(UserWarning, match="1 of 2 inputs get no example"):
        found = retriever(7).retrieve(at([1, 39]), [words(7), words(4)])
    assert picks(found) == [[], [4]]


def test_the_input_itself_is_skipped_whatever_its_length():
    assert picks(retriever().retrieve(3 * at(20))) == [[4, 0, 3, 1]]
    assert picks(retriever(skip_identical=False).retrieve(3 * at(20)))[0][-1] == 2
    # A near-copy, at a cosine that rounds to 1 in float32, is another item.
    assert picks(retriever().retrieve(at(20.003)))[0][-1] == 2
    assert np.float32(np.cos(np.radians(0.003))) == 1


def test_copies_and_ties_go_by_row():
    examples = SimilarityPromptRetriever(
        [[1, 0], [0, 1], [1, 0], [1, 0]], ["a"] * 4, str.split, None, n_shots=2
    )
    assert picks(examples.retrieve([[2, 1]])) == [[2, 0]]


def test_number_of_examples():
    assert picks(retriever(n_shots=2).retrieve(at(1))) == [[1, 0]]
    assert picks(retriever(None, n_shots=2).retrieve(at(1))) == [[1, 0]]
    assert picks(retriever(None, n_shots=9).retrieve(at(1))) == [[4, 3, 2, 1, 0]]


def test_excluded_examples():
    found = retriever(n_shots=2).retrieve(at([1, 1, 1, 1]), exclude=[0, [0, 2], None, -1])
    assert picks(found) == [[2, 1], [3, 1], [1, 0], [1, 0]]
    assert picks(retriever(n_shots=1).retrieve(at([1, 1]), exclude=np.array([0, 1]))) == [[1], [0]]


def test_centring_changes_the_cosine():
    pool = np.array([[10.0, 1.0], [10.2, -1.0], [30.0, 0.5]])
    query = np.array([[12.0, -1.1]])
    plain = SimilarityPromptRetriever(pool, ["a"] * 3, str.split, None)
    own = SimilarityPromptRetriever(pool, ["a"] * 3, str.split, None, center=True)
    other = SimilarityPromptRetriever(pool, ["a"] * 3, str.split, None, center=[10.1, 0.0])

    def expected(offset):
        a, b = pool - offset, query[0] - offset
        return np.argsort(a @ b / np.linalg.norm(a, axis=1)).tolist()

    assert picks(plain.retrieve(query)) == [expected(0)] == [[0, 2, 1]]
    assert picks(own.retrieve(query)) == [expected(pool.mean(axis=0))] == [[2, 0, 1]]
    assert picks(other.retrieve(query)) == [expected([10.1, 0.0])] == [[0, 1, 2]]
    assert picks(own.retrieve(np.repeat(query, 7, axis=0))) == [[2, 0, 1]] * 7  # not their mean


def test_random_control():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 4))
    queries = rng.standard_normal((200, 4))
    texts = [words(n) for n in rng.integers(1, 5, 50)]
    make = lambda seed: SimilarityPromptRetriever(  # noqa: E731
        vectors, texts, str.split, 20, n_shots=5, choose="random", random_state=seed
    )
    found = make(0).retrieve(queries)
    assert picks(found) == picks(make(0).retrieve(queries))
    assert picks(found) != picks(make(1).retrieve(queries))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for query, rows in zip(queries, found, strict=True):
        assert len(set(rows.tolist())) == len(rows) == 5
        assert (np.diff(unit[rows] @ query) > 0).all()  # in the prompt by similarity, as else
    # Every example about as often: 200 * 5 / 50 = 20 times; 5 standard deviations are 21.
    assert np.bincount(np.concatenate(found), minlength=50).max() < 42


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 25),
    budget=st.integers(1, 40),
    longest=st.integers(1, 9),
    shots=st.one_of(st.none(), st.integers(1, 5)),
    seed=st.integers(0, 10**6),
)
@pytest.mark.filterwarnings("ignore:.*get no example")
def test_a_plain_walk(m, budget, longest, shots, seed):
    rng = np.random.default_rng(seed)
    vectors, queries = rng.standard_normal((m, 5)), rng.standard_normal((4, 5))
    queries[0] = vectors[0]
    lengths, own = rng.integers(1, 10, m), rng.integers(0, 5, 4)
    examples = SimilarityPromptRetriever(
        vectors,
        [words(n) for n in lengths],
        str.split,
        budget,
        max_example_tokens=longest,
        n_shots=shots,
    )
    found = examples.retrieve(queries, [words(n) for n in own])
    one_by_one = [
        examples.retrieve(queries[i : i + 1], [words(own[i])])[0].tolist() for i in range(4)
    ]
    assert picks(found) == one_by_one
    for i in range(4):
        cosine = vectors @ queries[i] / np.linalg.norm(vectors, axis=1)
        left, chosen = budget - own[i], []
        for row in np.argsort(-cosine).tolist():
            if (i == 0 and row == 0) or lengths[row] > longest:
                continue
            left -= lengths[row]
            if left < 0 or len(chosen) == (shots or m):
                break
            chosen.insert(0, row)
        assert found[i].tolist() == chosen


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((30, 4)), rng.standard_normal((20, 4))
    examples = SimilarityPromptRetriever(vectors, ["a b"] * 30, str.split, 9)
    expected = picks(examples.retrieve(queries))
    monkeypatch.setattr("bakeoff.selection.prompt_retrieval._BLOCK_ENTRIES", 70)
    assert picks(examples.retrieve(queries)) == expected


def test_tokenizers_count_without_special_tokens():
    vocabulary = {"[UNK]": 0, "w": 1, "[CLS]": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert len(wrapped("w w")["input_ids"]) == 3
    for counter in (tokenizer, wrapped, str.split):
        examples = SimilarityPromptRetriever(at([0, 5]), ["w w", ("w", "w w")], counter, 5)
        assert examples.n_tokens.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "up"}, "order must be"),
        ({"choose": "best"}, "choose must be"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        ({"n_shots": 1.5}, "n_shots must be"),
        ({"max_example_tokens": True}, "max_example_tokens must be"),
        ({"center": [1.0]}, "finite array of 2 numbers"),
        ({"center": CIRCLE[2]}, "embeddings has 1 rows, the first is row 2"),
        ({"lengths": [1, 1]}, "texts must have one entry per row of embeddings, 5, got 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        retriever(**options)


@pytest.mark.parametrize(
    ("queries", "arguments", "message"),
    [
        (np.ones((2, 3)), {}, "must have 2 columns"),
        (np.zeros((1, 2)), {}, "row 0"),
        (at([1, 2]), {"query_texts": ["a"]}, "2, got 1"),
        (at([1, 2]), {"exclude": [1]}, "one entry per input, 2, got 1"),
        (at([1, 2]), {"exclude": [1, 5]}, "from 0 to 4"),
        (at([1, 2]), {"exclude": [1, "a"]}, "from 0 to 4"),
    ],
)
def test_bad_queries(queries, arguments, message):
    with pytest.raises(DataError, match=message):
        retriever().retrieve(queries, **arguments)
