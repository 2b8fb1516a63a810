"""Prompts come with languages that hold their answers."""

import json
import re

import pytest

from bakeoff.data.constrained_prompts import SKEWED_BITS, constrained_prompts
from bakeoff.errors import DataError


@pytest.mark.parametrize(("size", "n"), [("smoke", 6), ("demo", 29), ("full", 70)])
def test_every_answer_is_in_its_language(size, n):
    found = constrained_prompts(size)
    assert len(found.prompts) == len(found.grammars) == n
    assert len({prompt.text for prompt in found.prompts}) == n
    for prompt, grammar in zip(found.prompts, found.grammars, strict=True):
        for answer in prompt.answers:
            if grammar is None:
                assert answer in prompt.options
            elif isinstance(grammar, re.Pattern):
                assert grammar.fullmatch(answer)
            else:
                value = json.loads(answer)
                assert list(value) == grammar["required"]
                assert 0 <= value["n"] <= 9
    assert (size == "smoke") <= all(not isinstance(g, dict) for g in found.grammars)


def test_the_papers_skewed_language_is_one_of_them():
    found = constrained_prompts("smoke")
    assert found.grammars[0].pattern == SKEWED_BITS
    bits = [f"{i:05b}" for i in range(32)]
    assert sum(bool(re.fullmatch(SKEWED_BITS, each)) for each in bits) == 17


def test_descriptions_are_those_of_python():
    found = constrained_prompts("full")
    named = {prompt.answers[0]: prompt.text for prompt in found.prompts if "Python" in prompt.text}
    assert len(named) == 32
    assert "Return the sine of x" in named["sin"]
    assert all(len(text) > 60 for text in named.values())


def test_open_records_are_added_on_demand():
    plain, more = constrained_prompts("smoke"), constrained_prompts("smoke", open_ended=True)
    assert more.prompts[:6] == plain.prompts
    assert len(more.prompts) == 12
    assert all("name" in grammar["properties"] for grammar in more.grammars[6:])


def test_sizes_are_named():
    with pytest.raises(DataError, match="size must be one of 'smoke', 'demo', 'full', got 'huge'"):
        constrained_prompts("huge")
