"""Samples, their tokens, and pools that keep the target out of what is picked from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny

from bakeoff.data.samples import Sample, TrainingPool, as_samples, tokenize_sample
from bakeoff.errors import DataError

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id
A, B, C, D = (Sample(text) for text in "abcd")


def words(most, least=0):
    return st.lists(st.sampled_from(tiny.WORDS), min_size=least, max_size=most).map(" ".join)


@pytest.mark.parametrize(
    ("sample", "text", "prefix"),
    [
        (Sample("r"), "r", ""),
        (Sample("r", instruction="i"), "i\n\nr", "i\n\n"),
        (Sample("r", context="c"), "c\n\nr", "c\n\n"),
        (Sample("r", instruction="i", context="c"), "c\n\ni\n\nr", "c\n\ni\n\n"),
    ],
)
def test_the_text_is_context_instruction_and_response(sample, text, prefix):
    assert sample.text == text
    assert sample.prefix == prefix


# Tokens -------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    response=words(12, 1),
    instruction=words(8),
    context=words(8),
    length=st.integers(1, 40),
    end=st.booleans(),
)
def test_tokens_are_cut_as_documented(response, instruction, context, length, end):
    sample = Sample(response, instruction=instruction, context=context)
    prefix, kept = tokenize_sample(sample, TOKENIZER, length, end=end)
    whole = TOKENIZER(response).input_ids + [EOS] * end
    before = TOKENIZER(sample.prefix).input_ids if sample.prefix else []
    assert kept == whole[:length]  # its end is cut
    room = length - len(kept)
    assert prefix == before[len(before) - min(room, len(before)) :]  # its beginning is cut
    assert len(prefix) + len(kept) == min(length, len(before) + len(whole))


def test_no_special_token_stands_within():
    """A tokenizer that ends every text must not end the prefix, nor end the response twice."""
    closing = tiny.tokenizer(eos=True)
    assert closing("cat").input_ids[-1] == EOS
    prefix, response = tokenize_sample(Sample("dog ran", instruction="cat"), closing, 20)
    assert EOS not in prefix
    assert response.count(EOS) == 1
    assert response[-1] == EOS


def test_a_tokenizer_without_an_end_token_adds_none():
    plain = tiny.tokenizer()
    plain.eos_token = None
    assert tokenize_sample(Sample("cat"), plain, 20) == ([], plain("cat").input_ids)


def test_nothing_to_learn_is_refused():
    with pytest.raises(DataError, match="a sample's response has no tokens: '  '"):
        tokenize_sample(Sample("  ", instruction="cat"), TOKENIZER, 20)
    with pytest.raises(DataError, match="max_length must be at least 1, got 0"):
        tokenize_sample(Sample("cat"), TOKENIZER, 0)


def test_texts_become_samples_and_samples_stay():
    given = ["a", Sample("b", source="here")]
    assert as_samples(given, source="there") == (
        Sample("a", source="there"),
        Sample("b", source="here"),
    )
    assert as_samples([]) == ()
    with pytest.raises(DataError, match="got one string"):
        as_samples("one text")
    with pytest.raises(DataError, match=r"texts\[1\] must be a text or a Sample, got int"):
        as_samples(["a", 2])


# Pools --------------------------------------------------------------------------------------------


def pool(**changes):
    parts = {"name": "p", "samples": [A, B], "queries": [C], "test": [D], **changes}
    return TrainingPool(**parts)


def test_parts_become_tuples_and_marks_an_array():
    made = pool(relevant=[True, False])
    assert (made.samples, made.queries, made.test) == ((A, B), (C,), (D,))
    assert made.relevant.dtype == bool
    assert made.relevant.tolist() == [True, False]


@pytest.mark.parametrize("part", ["samples", "queries", "test"])
def test_empty_parts_are_refused(part):
    with pytest.raises(DataError, match=rf"training pool 'p': {part} must not be empty"):
        pool(**{part: []})


@pytest.mark.parametrize("part", ["samples", "queries"])
def test_a_test_text_elsewhere_is_refused(part):
    leak = {part: [A, B, Sample("r", instruction="i", source="other")]}
    with pytest.raises(
        DataError,
        match=r"'p': 2 test texts are also in the pool or the queries \(first: test row",
    ):
        pool(**leak, test=[D, Sample("i\n\nr"), B])
    assert pool(**leak, test=[D, Sample("r")])  # the same response to something else is no leak


def test_queries_may_be_in_the_pool_and_samples_twice():
    assert pool(samples=[A, A, C]).samples == (A, A, C)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ([True], r"relevant must be 2 booleans, got dtype bool and shape \(1,\)"),
        ([1, 0], r"got dtype int64 and shape \(2,\)"),
        ([[True, False]], r"shape \(1, 2\)"),
    ],
)
def test_marks_that_do_not_fit_are_refused(marks, message):
    with pytest.raises(DataError, match=message):
        pool(relevant=marks)


def test_the_fingerprint_follows_every_text_and_mark():
    prints = {
        pool().fingerprint(),
        pool(samples=[B, A]).fingerprint(),
        pool(samples=[A, B, C]).fingerprint(),
        pool(samples=[A], queries=[B, C]).fingerprint(),  # the same texts in a row
        pool(queries=[B, C]).fingerprint(),
        pool(test=[Sample("e")]).fingerprint(),
        pool(samples=[A, Sample("b", source="s")]).fingerprint(),
        pool(samples=[A, Sample("b", instruction="s")]).fingerprint(),
        pool(samples=[A, Sample("b", context="s")]).fingerprint(),
        pool(relevant=[True, False]).fingerprint(),
        pool(relevant=[False, True]).fingerprint(),
    }
    assert len(prints) == 11
    assert pool(name="another", notes=("n",)).fingerprint() == pool().fingerprint()
    assert pool(samples=[A, Sample("half \ud83d")]).fingerprint() != pool().fingerprint()
    assert pool(relevant=np.array([True, False])).fingerprint() in prints
