"""Questions made of the library's own text: one right option, nothing given away, always equal."""

import inspect
import re
import shutil
import statistics
import textwrap

import pytest

from bakeoff.data import choices, embedded
from bakeoff.data.choices import KINDS, choice_prompts
from bakeoff.errors import DataError


@pytest.fixture(scope="module")
def every():
    """All questions, by kind."""
    return {kind: choice_prompts("full", kinds=[kind]) for kind in KINDS}


def test_every_question_has_four_options_of_which_one_is_right(every):
    for kind, prompts in every.items():
        assert len(prompts) > 80, kind
        assert len(set(prompts)) == len(prompts)
        for prompt in prompts:
            assert len(set(prompt.options)) == 4
            assert len(prompt.answers) == 1
            assert prompt.answers[0] in prompt.options
            assert len(prompt.passages) == (4 if kind == "passages" else 0)


def test_the_right_option_stands_anywhere_in_the_list_and_in_the_alphabet(every):
    """Neither the first place nor the first letter may be the better guess."""
    for prompts in every.values():
        for order in (list, sorted):
            places = [order(prompt.options).index(prompt.answers[0]) for prompt in prompts]
            shares = [places.count(place) / len(places) for place in range(4)]
            assert max(shares) < 0.25 + 4 * (0.25 * 0.75 / len(places)) ** 0.5, shares


def test_functions_are_described_by_their_own_docstring(every):
    checked = 0
    for prompt in every["functions"]:
        match = re.fullmatch(
            r"Which function of the Python module (\S+) is described by: (.*)", prompt.text
        )
        module, description = match.groups()
        assert prompt.answers[0].lower() not in description.lower()
        if module in ("shutil", "textwrap", "statistics"):
            named = getattr({"shutil": shutil, "textwrap": textwrap}.get(module, statistics),
                            prompt.answers[0], None)  # fmt: skip
            if inspect.isfunction(named):
                checked += 1
                assert " ".join(inspect.getdoc(named).split()).startswith(description)
    assert checked >= 3


def test_a_gapped_sentence_is_whole_again_with_its_answer(every):
    from bakeoff.data.embedded import manual_paragraphs

    manual = " ".join(text for texts in manual_paragraphs().values() for text in texts)
    for prompt in every["words"]:
        (answer,) = prompt.answers
        sentence = prompt.text.removeprefix("Which word is missing from this sentence? ")
        assert sentence.count("____") == 1
        assert sentence.replace("____", answer) in manual
        assert len({option[-2:] for option in prompt.options}) == 1
        words = re.findall(r"\w+", sentence.lower())
        assert not set(words) & set(prompt.options)


def test_one_passage_names_the_answer_and_quotes_the_question(every):
    for prompt in every["passages"]:
        description = prompt.text.split(" is described by: ")[1]
        holding = [text for text in prompt.passages if text.endswith(f"): {description}")]
        assert len(holding) == 1
        assert holding[0].startswith(f"{prompt.answers[0]}(")
        names = {text.split("(")[0] for text in prompt.passages}
        assert names == set(prompt.options)


def test_sizes_are_parts_of_one_another_and_seeds_ask_other_questions():
    demo, full = choice_prompts("demo"), choice_prompts("full")
    assert len(demo) == 64
    assert set(demo) < set(full)
    assert len(full) > 1000
    assert choice_prompts("demo") == demo
    smoke = choice_prompts("smoke")
    assert [len(prompt.options) for prompt in smoke] == [3] * 4
    assert {prompt.text for prompt in smoke} <= {prompt.text for prompt in demo}
    other = choice_prompts("demo", seed=1)
    assert len(set(other) & set(demo)) < 20
    assert choice_prompts("demo", kinds=["passages", "words"]) == demo[24:]


def test_wrong_arguments_are_refused():
    with pytest.raises(DataError, match="size must be one of 'smoke', 'demo', 'full', got 'big'"):
        choice_prompts("big")
    for kinds in ([], ["verbs"]):
        with pytest.raises(DataError, match="kinds must be among functions, words, passages, got"):
            choice_prompts("smoke", kinds=kinds)


def modules_of_a_python_in(folder, monkeypatch):
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(folder))
    return embedded.standard_library_modules.__wrapped__()


def test_a_python_without_source_is_told(monkeypatch, tmp_path):
    choices._by_module.cache_clear()
    monkeypatch.setattr(
        choices, "standard_library_modules", lambda: modules_of_a_python_in(tmp_path, monkeypatch)
    )
    try:
        with pytest.raises(DataError, match="no source of its standard library"):
            choice_prompts("demo")
    finally:
        choices._by_module.cache_clear()
