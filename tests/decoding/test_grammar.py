"""Masks against the enumerated language, bounds against its shortest text, and refusals."""

import json
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter
from tests.models import tiny

from bakeoff.decoding.grammar import (
    Grammar,
    GrammarConstraint,
    TokenConstraint,
    as_grammar,
    constraint_for,
)
from bakeoff.errors import DataError

PIECES = ("a", "b", "ab", "c", "0", "1")


def letter_tokenizer(pieces=PIECES):
    """Return a byte-level tokenizer whose texts are spelt by `pieces`, some of them in two ways."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<end>": 3}
    vocabulary |= {piece: 4 + number for number, piece in enumerate(pieces)}
    merges = [tuple(piece) for piece in pieces if len(piece) == 2]
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<end>"],
    )


def byte_tokenizer():
    """Return a tokenizer with one token for every byte."""
    from tokenizers import pre_tokenizers

    return letter_tokenizer(tuple(sorted(pre_tokenizers.ByteLevel.alphabet())))


def spells(constraint, tokenizer, text):
    return constraint.accepts(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_masks(grammar, language, pieces=PIECES):
    """Compare the mask after every live prefix with what the enumerated language says."""
    tokenizer = letter_tokenizer(pieces)
    constraint = GrammarConstraint(grammar, tokenizer, vocab_size=4 + len(pieces) + 5)
    todo, seen = [("", constraint.start())], set()
    while todo:
        text, state = todo.pop()
        if text in seen:
            continue
        seen.add(text)
        legal = constraint.legal(state)
        assert legal.dtype == np.bool_
        assert legal.shape == (4 + len(pieces) + 5,)
        assert not legal[:4].any()  # special tokens spell nothing
        assert not legal[4 + len(pieces) :].any()  # the model's unused logits
        for number, piece in enumerate(pieces):
            live = any(word.startswith(text + piece) for word in language)
            assert legal[4 + number] == live, (text, piece)
            if live:
                todo.append((text + piece, constraint.advance(state, 4 + number)))
        assert constraint.may_end(state) == (text in language), text
    assert len(seen) > 1


WORDS = {"".join(w) for w in (("ab",), ("abc",), ("a0",), ("c1",), ("a",))}


@pytest.mark.parametrize(
    ("grammar", "language"),
    [
        (Grammar.choice(sorted(WORDS)), WORDS),
        (re.compile("abc?|a0|c1|a"), WORDS),
        (
            Grammar.regex("(ab|c)[01]{2}"),
            {p + x + y for p in ("ab", "c") for x in "01" for y in "01"},
        ),
        ('start: "a" tail\ntail: "b" | "b" DIGIT\nDIGIT: /[01]/', {"ab", "ab0", "ab1"}),
        ('root ::= "a" tail\ntail ::= "b" | "b" [01]', {"ab", "ab0", "ab1"}),
        ({"enum": [0, 1, 10, 11]}, {"0", "1", "10", "11"}),
        ('{"type": "integer", "minimum": 0, "maximum": 1}', {"0", "1"}),
        ({"type": "integer", "minimum": 10, "maximum": 11}, {"10", "11"}),
    ],
)
def test_masks_are_those_of_the_enumerated_language(grammar, language):
    check_masks(grammar, language)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.text("abc01", min_size=1, max_size=5), min_size=1, max_size=6))
def test_masks_of_any_finite_language(language):
    check_masks(Grammar.choice(sorted(language)), language)


def test_a_forced_text_may_be_spelt_in_every_way():
    pieces = ('"', "a", "b", "ab", "c")
    check_masks({"enum": ["abc"]}, {'"abc"'}, pieces)
    check_masks(Grammar.regex("abab"), {"abab"}, pieces)
    check_masks('root ::= "cab"', {"cab"}, pieces)


def test_states_are_values():
    constraint = GrammarConstraint(Grammar.regex("ab*"), letter_tokenizer())
    start = constraint.start()
    before = constraint.legal(start)
    after = constraint.advance(start, 4)
    np.testing.assert_array_equal(constraint.legal(start), before)
    assert constraint.may_end(after)
    assert not constraint.may_end(start)
    with pytest.raises(DataError, match="token 7 is not legal here"):
        constraint.advance(start, 7)
    np.testing.assert_array_equal(constraint.legal(start), before)


def test_a_prefix_that_no_token_continues_is_dead_and_not_ended():
    constraint = GrammarConstraint(Grammar.regex("az|b"), letter_tokenizer())
    dead = constraint.advance(constraint.start(), 4)
    assert not constraint.legal(dead).any()
    assert not constraint.may_end(dead)


class Person(BaseModel):
    name: str
    age: int


def test_pydantic_models_and_adapters_become_their_schemas():
    tokenizer = byte_tokenizer()
    constraint = GrammarConstraint(Person, tokenizer)
    assert spells(constraint, tokenizer, Person(name="Zoë", age=3).model_dump_json())
    assert spells(constraint, tokenizer, '{"name": "Zo", "age": 3}')
    assert not spells(constraint, tokenizer, '{"name": "Zo"}')
    assert not spells(constraint, tokenizer, '{"name": "Zo", "age": "3"}')
    tight = GrammarConstraint(Grammar.pydantic(Person, whitespace=False), tokenizer)
    assert not spells(tight, tokenizer, '{"name": "Zo", "age": 3}')
    assert spells(tight, tokenizer, '{"name":"Zo","age":3}')
    listed = GrammarConstraint(TypeAdapter(list[int]), tokenizer)
    assert spells(listed, tokenizer, "[1,2]")
    assert not spells(listed, tokenizer, "[true]")


TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("grammar", "shortest"),
    [
        (Grammar.json_schema(TREE), '{"next":null}'),
        (Grammar.pydantic(Person), '{"name":"","age":0}'),
        (Grammar.json_schema({"type": "array", "items": {"type": "boolean"}, "minItems": 2}), None),
        (Grammar.json_schema({"enum": ["ab", "é"]}), '"é"'),
        (Grammar.json_schema({"type": ["string", "integer"], "minLength": 9}), "0"),
        (Grammar.lark('start: "x" start | "yz"'), "yz"),
        (Grammar.lark('start: ("ab" | "c")~2 tail+\ntail: "0" | "1" tail'), "cc0"),
        (Grammar.lark('start: a? [b] "z"\na: "abc"\nb: a a'), "z"),
        (Grammar.lark('// start: "no"\nstart: WORD "!" // "comment"\nWORD: "a".."f"'), "a!"),
        (Grammar.lark('start: a{2,3}\na: "b"'), "bb"),
        (Grammar.gbnf('root ::= "(" root ")" | "x"'), "x"),
    ],
)
def test_the_bound_is_the_shortest_text_where_every_part_is_understood(grammar, shortest):
    tokenizer = byte_tokenizer()
    if shortest is None:  # the bound on the items is loose: they are counted, not looked into
        shortest = "[true,true]"
        assert 2 <= grammar.min_bytes <= len(shortest)
    else:
        assert grammar.min_bytes == len(shortest.encode())
    assert spells(GrammarConstraint(grammar, tokenizer), tokenizer, shortest)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.lark('start: "a" %json {"type": "integer"}'),
        Grammar.lark("start: T\nT: /a+/ & /.{3}/"),
        Grammar.lark("start: <[4-6]>"),
        Grammar.lark('start: A "b"i\nA: /a/'),
        Grammar.lark('start: text "ab"\ntext[max_tokens=3]: /(?s:.*)/'),
        Grammar.lark('%ignore /\\s+/\nstart: "a" "b"'),
    ],
)
def test_what_is_not_understood_only_loosens_the_bound(grammar):
    assert 0 <= grammar.min_bytes <= 3
    assert math.isfinite(grammar.min_bytes)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Grammar.lark('start: "a" start'),
        lambda: Grammar.lark('start: a | b\na: "x" b\nb: a b'),
        lambda: Grammar.gbnf('root ::= "a" root'),
        lambda: Grammar.json_schema(
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
        ),
        lambda: Grammar.json_schema(
            {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}
        ),
    ],
)
def test_languages_without_a_finite_text_are_refused(build):
    with pytest.raises(DataError, match=r"describes no text at all: every way .* recurs"):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Grammar.lark("start: foo"), r'invalid grammar: at 1\(8\): unknown name: "foo"'),
        (lambda: Grammar.lark('start: "a" |\nb: "c'), r"2\(6\): lexer error"),
        (lambda: Grammar.gbnf('root ::= "a b'), "invalid grammar: .*line 1"),
        (
            lambda: Grammar.regex("[a-"),
            r"^invalid regular expression: regex parse error:\n +\[a-\n",
        ),
        (lambda: Grammar.regex("(?!a)b"), "look-around"),
        (lambda: Grammar.json_schema('{"type": }'), "no JSON: .* at line 1, column 10"),
        (lambda: Grammar.json_schema({"type": "foo"}), "invalid JSON schema: Invalid type: foo"),
        (lambda: Grammar.json_schema(False), "it is false, which admits nothing"),
        (lambda: Grammar.json_schema({"minimum": 5, "maximum": 3, "type": "integer"}), "greater"),
        (lambda: Grammar.json_schema({"$ref": "#/$defs/x"}), "does not exist"),
        (lambda: Grammar.json_schema([1]), "must be a JSON object or a boolean, got list"),
        (lambda: Grammar.json_schema({"const": {1}}), "must hold JSON values only"),
        (lambda: Grammar.choice([]), "at least one text"),
        (lambda: Grammar.choice("yes"), "at least one text"),
        (lambda: Grammar.pydantic(dict), "must be a Pydantic model"),
        (lambda: as_grammar("[0-9]+"), "may be several things"),
        (lambda: as_grammar(re.compile("a", re.IGNORECASE)), "have no flags"),
        (lambda: as_grammar(re.compile(b"a")), "must be of text"),
        (lambda: as_grammar(7), "got int"),
    ],
)
def test_bad_grammars_say_what_and_where(build, message):
    with pytest.raises(DataError, match=message):
        build()


@pytest.mark.parametrize(
    "grammar",
    [Grammar.regex("[^\\s\\S]"), Grammar.regex("z"), Grammar.lark("start: A\nA: /a/ & /b/")],
)
def test_languages_that_the_tokenizer_cannot_begin_are_refused(grammar):
    with pytest.raises(DataError, match="no text that this tokenizer could begin"):
        GrammarConstraint(grammar, letter_tokenizer())


def test_the_empty_text_is_a_language():
    constraint = GrammarConstraint(Grammar.regex(""), letter_tokenizer())
    assert constraint.may_end(constraint.start())
    assert not constraint.legal(constraint.start()).any()


def test_bad_tokenizers_and_widths_are_refused():
    grammar = Grammar.regex("a")
    with pytest.raises(DataError, match=r"the tokens of this .* are not bytes"):
        GrammarConstraint(grammar, tiny.tokenizer())
    with pytest.raises(DataError, match="do not belong together"):
        GrammarConstraint(grammar, letter_tokenizer(), vocab_size=5)
    with pytest.raises(DataError, match=r"among the tokenizer.s 10 tokens, got \[10\]"):
        GrammarConstraint(grammar, letter_tokenizer(), vocab_size=12, eos_token_id=10)
    with pytest.raises(DataError, match="at least one token"):
        GrammarConstraint(grammar, letter_tokenizer(), eos_token_id=[])
    with pytest.raises(DataError, match="must be a fast one"):
        GrammarConstraint(grammar, Slow())
    ready = GrammarConstraint(grammar, letter_tokenizer())
    assert constraint_for(ready, None, 10, [2]) is ready
    with pytest.raises(DataError, match="vocab_size is 10, but the model gives 11"):
        constraint_for(ready, None, 11, [2])


class Slow:
    eos_token_id = 2

    def __len__(self):
        return 4


def test_fingerprints_tell_grammars_tokenizers_and_ends_apart():
    tokenizer = letter_tokenizer()
    made = [
        GrammarConstraint(Grammar.regex("a"), tokenizer),
        GrammarConstraint(Grammar.regex("b"), tokenizer),
        GrammarConstraint(Grammar.regex("a"), letter_tokenizer(("a", "b"))),
        GrammarConstraint(Grammar.regex("a"), tokenizer, vocab_size=12),
        GrammarConstraint(Grammar.regex("a"), tokenizer, eos_token_id=[2, 3]),
    ]
    assert len({constraint.fingerprint for constraint in made}) == len(made)
    again = GrammarConstraint(Grammar.regex("a"), letter_tokenizer())
    assert again.fingerprint == made[0].fingerprint
    assert isinstance(again, TokenConstraint)


def test_grammars_are_pickled_and_compared_by_value():
    grammar = Grammar.pydantic(Person)
    assert pickle.loads(pickle.dumps(grammar)) == grammar
    assert as_grammar(grammar) is grammar
    assert as_grammar(json.loads(grammar.source)) == grammar
