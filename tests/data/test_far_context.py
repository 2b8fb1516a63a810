"""The made-up long-context samples: where the answer stands, and that nothing else tells."""

import dataclasses
import re
from collections import Counter

import pytest

from bakeoff.data.far_context import KINDS, FarContextSample, far_context_samples
from bakeoff.data.samples import Sample
from bakeoff.errors import DataError

LINE = re.compile(r"^(?P<who>.+) keeps (?P<what>.+)\.$")


def facts(sample):
    """Who keeps what, read from the context."""
    found = {}
    for line in sample.context.splitlines():
        match = LINE.match(line)
        assert match, line
        assert match["who"] not in found, f"{match['who']} occurs twice"
        found[match["who"]] = match["what"]
    return found


def asked(sample):
    return re.fullmatch(r"What does (.+) keep, and where\?", sample.instruction)[1]


@pytest.mark.parametrize(
    ("n_lines", "far_lines", "far"),
    [
        (16, (0, 0.125), range(2)),
        (64, (0, 0.125), range(8)),
        (200, (0.25, 0.5), range(50, 100)),
        (20, (0.5, 1), range(10, 19)),
    ],
)
def test_the_answer_stands_where_the_kind_says(n_lines, far_lines, far):
    samples = far_context_samples(50, n_lines, seed=3, kinds=KINDS, far_lines=far_lines)
    assert Counter(sample.kind for sample in samples) == dict.fromkeys(KINDS, 10)
    for sample in samples:
        known = facts(sample)
        people = list(known)
        value = sample.response.removesuffix(".")
        assert len(known) == n_lines
        assert sample.source == sample.kind
        if sample.kind == "far":
            assert known[asked(sample)] == value
            assert people.index(asked(sample)) == sample.line
            assert sample.line in far
        elif sample.kind == "near":
            assert known[asked(sample)] == value
            assert people.index(asked(sample)) == sample.line == n_lines - 1
        elif sample.kind == "hop":
            pointer = re.fullmatch("the same as (.+)", known[asked(sample)])[1]
            assert pointer != asked(sample)
            assert known[pointer] == value
            assert people.index(pointer) == sample.line
            assert sample.line in far
            assert people.index(asked(sample)) in far
        else:
            assert sample.line == -1
            assert value not in sample.context
            assert (value in sample.instruction) == (sample.kind == "none")
            if sample.kind == "noise":
                assert asked(sample) in known
        if sample.line >= 0:
            assert sample.context.count(value) == 1
            assert value not in sample.instruction


def test_responses_of_all_kinds_look_alike():
    """No kind can be told by its response: same words, same number of them."""
    samples = far_context_samples(1200, 16, kinds=KINDS[:4])
    shape = re.compile(r"an? \w+ \w+ in the \w+\.")
    qualities = {kind: Counter() for kind in KINDS[:4]}
    for sample in samples:
        assert shape.fullmatch(sample.response)
        qualities[sample.kind][sample.response.split()[1]] += 1
    for counts in qualities.values():
        assert len(counts) == len(qualities["far"])  # every quality occurs in 300 draws
        assert max(counts.values()) < 30  # expected 9.4 with a deviation of 3


def test_deterministic_and_a_longer_list_begins_with_a_shorter():
    samples = far_context_samples(9, 20, seed=5)
    assert samples == far_context_samples(9, 20, seed=5)
    assert samples[:4] == far_context_samples(4, 20, seed=5)
    other = far_context_samples(9, 20, seed=6)
    assert all(a.context != b.context for a, b in zip(samples, other, strict=True))
    assert len({sample.context for sample in samples}) == 9


def test_kinds_take_turns_as_given():
    kinds = ("hop", "far", "hop")
    assert [s.kind for s in far_context_samples(5, 16, kinds=kinds)] == [
        "hop",
        "far",
        "hop",
        "hop",
        "far",
    ]


def test_they_are_samples():
    sample = far_context_samples(1)[0]
    assert isinstance(sample, Sample)
    assert isinstance(sample, FarContextSample)
    assert sample.text == f"{sample.context}\n\n{sample.instruction}\n\n{sample.response}"
    assert len(sample.context.split()) == 64 * 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.kind = "near"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"n": 1, "n_lines": 15}, "n_lines must be between 16 and 2976, got 15"),
        ({"n": 1, "n_lines": 10**5}, "n_lines must be between"),
        ({"n": 1, "kinds": ()}, "one or more of far, near, none, noise, hop"),
        ({"n": 1, "kinds": ("far", "middle")}, "'middle'"),
        ({"n": 1, "far_lines": (0.5, 0.25)}, "far_lines must be two shares"),
        ({"n": 1, "far_lines": (0, 1.5)}, "far_lines"),
        ({"n": 1, "n_lines": 16, "far_lines": (0.9, 1)}, "at least two lines"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(DataError, match=message):
        far_context_samples(**arguments)
