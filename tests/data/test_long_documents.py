"""Facts in long documents: where they stand, that nothing else answers, and what a seed draws."""

import pickle
import re

import pytest

from bakeoff.data.embedded import manual_paragraphs
from bakeoff.data.long_documents import (
    CHARACTERS_PER_TOKEN,
    KINDS,
    LongDocuments,
    long_documents_default,
)
from bakeoff.errors import DataError

DOCUMENTS = LongDocuments((500, 2000), (0.0, 0.4, 1.0), n_numbers=5)
NUMBER = re.compile(r"The number of (the \w+ \w+) is (\d{5})\.")


@pytest.fixture(scope="module")
def drawn():
    return DOCUMENTS.draw(3)


def test_the_fact_stands_where_the_depth_says(drawn):
    places = [(length, depth) for length in DOCUMENTS.n_tokens for depth in DOCUMENTS.depths]
    longest = max(len(text) for texts in manual_paragraphs().values() for text in texts)
    for kind in KINDS:
        assert len(drawn[kind]) == len(places)
        for (length, depth), prompt in zip(places, drawn[kind], strict=True):
            document, (value,) = prompt.document, prompt.answers
            whole = length * CHARACTERS_PER_TOKEN
            assert whole <= len(document) <= whole + longest + 200
            # Between the two paragraphs that are nearest; other facts may stand before it.
            assert abs(document.index(value) - depth * len(document)) < longest / 2 + 500


def test_nothing_but_the_fact_answers(drawn):
    for prompt in drawn["pass keys"]:
        assert prompt.document.count(prompt.answers[0]) == 2
        assert prompt.document.count("pass key") == 2
    for prompt in drawn["numbers"]:
        known = NUMBER.findall(prompt.document)
        assert len(known) == len(dict(known)) == len({value for _, value in known}) == 5
        asked = re.search(r"the \w+ \w+(?=\?)", prompt.text)[0]
        assert dict(known)[asked] == prompt.answers[0]


def test_a_seed_draws_other_text_around_the_same_questions(drawn):
    other = DOCUMENTS.draw(4)
    again = DOCUMENTS.draw(3)
    assert again == drawn
    for kind in KINDS:
        for one, two in zip(drawn[kind], other[kind], strict=True):
            assert (one.text, one.answers) == (two.text, two.answers)
            assert one.document != two.document
    documents = [p.document for prompts in (*drawn.values(), *other.values()) for p in prompts]
    assert len(set(documents)) == len(documents)
    values = [p.answers[0] for prompts in drawn.values() for p in prompts]
    assert len(set(values)) == len(values)


def test_more_lengths_and_depths_leave_the_others_as_they_were(drawn):
    fewer = LongDocuments((2000,), (0.4,), n_numbers=5).draw(3)
    assert fewer["numbers"][0] == drawn["numbers"][4]
    assert pickle.loads(pickle.dumps(DOCUMENTS)).draw(3) == drawn


def test_the_fingerprint_follows_the_settings():
    same = LongDocuments((500, 2000), (0.0, 0.4, 1.0), n_numbers=5)
    assert same.fingerprint() == DOCUMENTS.fingerprint()
    changed = [
        LongDocuments((500,), (0.0, 0.4, 1.0), n_numbers=5),
        LongDocuments((500, 2000), (0.0, 0.4), n_numbers=5),
        LongDocuments((500, 2000), (0.0, 0.4, 1.0), n_numbers=6),
        LongDocuments((500, 2000), (0.0, 0.4, 1.0), ("numbers",), n_numbers=5),
    ]
    assert len({DOCUMENTS.fingerprint(), *(each.fingerprint() for each in changed)}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_tokens": ()}, "n_tokens must hold at least one value"),
        ({"n_tokens": (50,)}, "n_tokens must be between 100 and .* got 50"),
        ({"n_tokens": (10**6,)}, "length of the language reference, got 1000000"),
        ({"depths": (0.5, 0.5)}, "depths must hold at least one value, and none twice"),
        ({"depths": (1.5,)}, "depths must be between 0 and 1, got 1.5"),
        ({"kinds": ("tables",)}, "kinds must be among pass keys, numbers, got 'tables'"),
        ({"n_numbers": 1}, "n_numbers must be between 2 and 144, got 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        LongDocuments(**arguments)


def test_sizes():
    n_prompts = [
        sum(map(len, long_documents_default(size).draw(0).values())) for size in ("smoke", "demo")
    ]
    assert n_prompts == [4, 20]
    assert max(long_documents_default("full").n_tokens) == 32_000
    with pytest.raises(DataError, match="size must be one of 'smoke', 'demo', 'full', got 'big'"):
        long_documents_default("big")
