"""A chat template in two parts says what the template says."""

import pytest
from tests.models import tiny

from bakeoff.errors import DataError
from bakeoff.models.chat import chat_frame

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [bot]"


def test_the_parts_and_the_words_are_the_whole():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    before, after = chat_frame(tokenizer, "tiny")
    assert (before, after) == ("[user] ", " [bot]")
    for words in ("a cat", "", "two\nlines {{ and }} marks"):
        message = [{"role": "user", "content": words}]
        whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert before + words + after == whole


def test_a_missing_or_deaf_template_is_refused():
    tokenizer = tiny.tokenizer()
    with pytest.raises(DataError, match="tokenizer of tiny has no chat template"):
        chat_frame(tokenizer, "tiny")
    tokenizer.chat_template = "Hello."
    with pytest.raises(DataError, match="does not repeat what the user says"):
        chat_frame(tokenizer, "tiny")
