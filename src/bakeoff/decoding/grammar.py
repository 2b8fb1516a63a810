"""Grammars as masks over tokens: JSON schemas, regular expressions, Lark and GBNF texts.

The masks come from llguidance. What is added here: one value for every kind of grammar, one
protocol that samplers are written against, errors that say where a text is wrong, and proofs that a
language is empty or has no string short enough, which the engine itself does not look for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bakeoff.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GrammarKind = Literal["json_schema", "regex", "lark"]

Mask = NDArray[np.bool_]

_WHAT = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "lark": "grammar",
}
# Where the grammar leaves only one text, llguidance would allow only the tokens in which its
# tokenizer spells that text. The model's probability of the text is that of all its spellings.
_ALL_SPELLINGS = '\n%llguidance {"no_forcing": true}'


# What a language is -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grammar:
    """A formal language of texts, not yet tied to a tokenizer.

    Made by `Grammar.json_schema`, `Grammar.regex`, `Grammar.lark`, `Grammar.gbnf`,
    `Grammar.choice` or `Grammar.pydantic`, all of which refuse a faulty text at once.

    Parameters
    ----------
    kind
        What `source` is written in.
    source
        The text that was given, or made from what was given.
    definition
        The same in the form that llguidance compiles.

    Examples
    --------
    >>> Grammar.regex(r"[0-9]{4}-[0-9]{2}").kind
    'regex'
    >>> Grammar.lark('start: "(" start ")"').min_bytes  # it never ends
    Traceback (most recent call last):
    ...
    bakeoff.errors.DataError: the grammar describes no text at all: every way through it recurs \
without end
    """

    kind: GrammarKind
    source: str
    definition: str = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse what llguidance refuses, and languages that are provably empty."""
        from llguidance import LLMatcher

        plain = self.definition
        if self.kind == "json_schema":  # checked by itself, messages are about it alone
            plain = LLMatcher.grammar_from_json_schema(self.source)
        failed, messages = LLMatcher.validate_grammar_with_warnings(plain)
        if failed:
            raise DataError(f"invalid {_WHAT[self.kind]}: {_readable(self.kind, messages[0])}")
        if math.isinf(self.min_bytes):
            raise DataError(
                f"the {_WHAT[self.kind]} describes no text at all: every way through it recurs "
                "without end"
            )

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, Any] | bool | str, *, whitespace: bool = True
    ) -> Grammar:
        """Return the language of JSON texts that a schema admits.

        Parameters
        ----------
        schema
            A JSON schema as Python values or as a JSON text.
        whitespace
            Whether any amount of white space may stand between JSON's tokens; False for none.

        Raises
        ------
        DataError
            If the text is not JSON (says the line and column), the schema is invalid, uses a
            keyword that llguidance does not implement, or admits nothing.

        Examples
        --------
        >>> Grammar.json_schema({"type": "integer", "minimum": 0, "maximum": 9}).min_bytes
        1
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"the JSON schema is no JSON: {error.msg} at line {error.lineno}, column "
                    f"{error.colno}"
                ) from error
        if not isinstance(schema, Mapping | bool):
            raise DataError(
                f"schema must be a JSON object or a boolean, got {type(schema).__name__}"
            )
        if schema is False:
            raise DataError("invalid JSON schema: it is false, which admits nothing")
        schema = {} if schema is True else schema
        if not whitespace:
            told = schema.get("x-guidance")
            told = told if isinstance(told, Mapping) else {}
            schema = {**schema, "x-guidance": {**told, "whitespace_flexible": False}}
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise DataError(f"schema must hold JSON values only: {error}") from error
        return cls("json_schema", text, f"start: %json {text}{_ALL_SPELLINGS}")

    @classmethod
    def pydantic(cls, model: Any, *, whitespace: bool = True) -> Grammar:
        """Return the language of JSON texts that a Pydantic model or type adapter reads.

        Parameters
        ----------
        model
            A subclass of ``pydantic.BaseModel``, or a ``pydantic.TypeAdapter``.
        whitespace
            As in `Grammar.json_schema`.

        Raises
        ------
        DataError
            If it is neither, or its schema cannot be followed.
        """
        from pydantic import TypeAdapter

        if isinstance(model, TypeAdapter):
            return cls.json_schema(model.json_schema(), whitespace=whitespace)
        if not _is_pydantic(model):
            raise DataError(f"model must be a Pydantic model or type adapter, got {model!r}")
        return cls.json_schema(model.model_json_schema(), whitespace=whitespace)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Return the language of the texts that a regular expression matches as a whole.

        Parameters
        ----------
        pattern
            In the syntax of the Rust crate ``regex``: no look-around, no back-references.

        Raises
        ------
        DataError
            If the pattern is invalid; shows the place.
        """
        from llguidance import LLMatcher

        wrapped = json.loads(LLMatcher.grammar_from_regex(pattern))
        return cls("regex", pattern, wrapped["grammars"][0]["lark_grammar"] + _ALL_SPELLINGS)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Return the language of a context-free grammar in Lark's EBNF, from the rule ``start``.

        Parameters
        ----------
        text
            The grammar; see llguidance's documentation for what it adds to and leaves out of Lark.

        Raises
        ------
        DataError
            If the text is invalid (says ``at line(column)`` and shows the line), or no text
            can be derived.
        """
        return cls("lark", text, text + _ALL_SPELLINGS)

    @classmethod
    def gbnf(cls, text: str) -> Grammar:
        """Return the language of a grammar in llama.cpp's GBNF (``name ::= ...``), from ``root``.

        Raises
        ------
        DataError
            If the text is invalid (says line and place), or no text can be derived.
        """
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            converted = any_to_lark(text)
        except Exception as error:  # the converter raises a class of its own and some others
            raise DataError(f"invalid grammar: {error}") from error
        return cls.lark(converted)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """Return the language of the given texts and no others.

        Raises
        ------
        DataError
            If there is none.

        Examples
        --------
        >>> Grammar.choice(["yes", "no"]).min_bytes
        2
        """
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
            raise DataError(f"texts must be at least one text, got {texts!r}")
        return cls.lark("start: " + " | ".join(json.dumps(text) for text in texts))

    @cached_property
    def min_bytes(self) -> int | float:
        """A lower bound on the length of the language's shortest text, in UTF-8 bytes.

        Infinity is a proof that the language is empty. Of regular expressions nothing is known.
        """
        if self.kind == "json_schema":
            return _shortest_json(json.loads(self.source))
        if self.kind == "lark":
            return _shortest_lark(self.source)
        return 0


def as_grammar(grammar: Any) -> Grammar:
    """Return a grammar for any of the forms in which users have one.

    Parameters
    ----------
    grammar
        A `Grammar`; a dict or bool (JSON schema); a Pydantic model or type adapter; a compiled
        ``re.Pattern`` (regular expression); or a text, which is taken for a JSON schema if it
        begins with ``{``, for GBNF if it contains ``::=`` and for Lark if it has a rule ``start:``.

    Raises
    ------
    DataError
        If it is none of these, or a text of which one cannot tell what it is.

    Examples
    --------
    >>> import re
    >>> as_grammar(re.compile("a+")).kind, as_grammar({"type": "integer"}).kind
    ('regex', 'json_schema')
    """
    if isinstance(grammar, Grammar):
        return grammar
    if isinstance(grammar, Mapping | bool):
        return Grammar.json_schema(grammar)
    if isinstance(grammar, re.Pattern):
        if not isinstance(grammar.pattern, str) or grammar.flags & ~re.UNICODE:
            raise DataError(
                "a compiled pattern must be of text and have no flags: write them into the "
                "pattern, as in (?i)"
            )
        return Grammar.regex(grammar.pattern)
    if isinstance(grammar, str):
        if grammar.lstrip().startswith("{"):
            return Grammar.json_schema(grammar)
        if "::=" in grammar:
            return Grammar.gbnf(grammar)
        if re.search(r"^\s*\??start\b[^:\n]*:", grammar, re.MULTILINE):
            return Grammar.lark(grammar)
        raise DataError(
            f"grammar {grammar[:60]!r} may be several things: give Grammar.regex(...), "
            "Grammar.lark(...) (which needs a rule 'start'), Grammar.gbnf(...) or "
            "Grammar.choice([...])"
        )
    from pydantic import TypeAdapter

    if _is_pydantic(grammar) or isinstance(grammar, TypeAdapter):
        return Grammar.pydantic(grammar)
    raise DataError(
        "grammar must be a Grammar, a JSON schema, a Pydantic model, a compiled regular "
        f"expression or a Lark or GBNF text, got {type(grammar).__name__}"
    )


def _is_pydantic(value: Any) -> bool:
    from pydantic import BaseModel

    return isinstance(value, type) and issubclass(value, BaseModel)


def _readable(kind: GrammarKind, message: str) -> str:
    """Take out of llguidance's message what is about its wrapper and not about the user's text."""
    if kind == "regex":
        message = re.sub(r"^at \d+\(\d+\): invalid regex .*? \(in regex\): ", "", message, count=1)
        message = re.split(r"\n\s+1 \| start: /", message)[0]
    return message.split("\n<state>")[0].strip("\n")


# Which tokens are legal ---------------------------------------------------------------------------


@runtime_checkable
class TokenConstraint(Protocol):
    """What a sampler needs of a language over tokens.

    Any engine can stand behind it. States are values: `advance` leaves the state it is given as it
    was. End-of-text tokens are not advanced over; whether one may stand is `may_end`.
    """

    vocab_size: int
    fingerprint: str

    def start(self) -> Any:
        """Return the state before the first token."""
        ...

    def legal(self, state: Any) -> Mask:
        """Return bool ``(vocab_size,)``: the tokens, ends of text aside, that may come next."""
        ...

    def advance(self, state: Any, token: int) -> Any:
        """Return the state after a legal token."""
        ...

    def may_end(self, state: Any) -> bool:
        """Return whether the text so far is in the language."""
        ...


class GrammarConstraint:
    """A grammar over the tokens of one tokenizer.

    Parameters
    ----------
    grammar
        As for `as_grammar`.
    tokenizer
        A fast transformers tokenizer whose tokens are bytes (byte-level BPE, or SentencePiece with
        byte fallback), as those of all current decoders are.
    vocab_size
        Width of the model's logits, which may exceed the tokenizer's vocabulary; the tokens beyond
        spell nothing, and only Lark's ``<[*]>`` admits them. The tokenizer's own by default.
    eos_token_id
        The token or tokens that end a text; the tokenizer's own by default.

    Attributes
    ----------
    fingerprint
        64 hexadecimal digits that change with the grammar, the tokenizer or the arguments.

    Raises
    ------
    DataError
        If the grammar is invalid, the tokenizer is not of that kind, there is no end-of-text
        token, or the vocabulary has no token with which a text of the language could begin.

    Notes
    -----
    A text can be spelt by several token sequences, and all of them are legal.

    Examples
    --------
    >>> constraint = GrammarConstraint(Grammar.regex("ab*"), tokenizer)  # doctest: +SKIP
    >>> state = constraint.start()  # doctest: +SKIP
    >>> tokenizer.convert_ids_to_tokens(constraint.legal(state).nonzero()[0])  # doctest: +SKIP
    ['a', 'ab']
    """

    def __init__(
        self,
        grammar: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
    ) -> None:
        from llguidance import LLMatcher

        self.grammar = as_grammar(grammar)
        self.eos_token_ids = _eos_ids(eos_token_id, tokenizer)
        self.vocab_size = int(vocab_size or len(tokenizer))
        engine = _engine(tokenizer, self.vocab_size, self.eos_token_ids)
        self._tokenizer, self.longest_token, tokenizer_digest = engine
        self._names = tokenizer.convert_ids_to_tokens
        self._ends = np.array(self.eos_token_ids, dtype=np.int64)
        self.fingerprint = hashlib.sha256(
            json.dumps(
                [self.grammar.definition, tokenizer_digest, self.vocab_size, self.eos_token_ids]
            ).encode()
        ).hexdigest()
        # Log level 0: what goes wrong is raised, not printed.
        self._initial = LLMatcher(self._tokenizer, self.grammar.definition, log_level=0)
        if self._initial.is_error():
            message = _readable(self.grammar.kind, self._initial.get_error())
            raise DataError(f"invalid {_WHAT[self.grammar.kind]}: {message}")
        first = self._initial.deep_copy()
        if not self.legal(first).any() and not self.may_end(self._initial):
            raise DataError(
                f"the {_WHAT[self.grammar.kind]} describes no text that this tokenizer could begin:"
                " it is empty, or needs characters that no token has"
            )

    @property
    def min_tokens(self) -> int:
        """A lower bound on the tokens of the shortest text, the end-of-text token included."""
        return math.ceil(self.grammar.min_bytes / self.longest_token) + 1

    def start(self) -> Any:
        """Return the state before the first token."""
        return self._initial.deep_copy()

    def legal(self, state: Any) -> Mask:
        """Return bool ``(vocab_size,)``: the tokens, ends of text aside, that may come next.

        Raises
        ------
        DataError
            If the grammar exceeds the engine's limits here.
        """
        packed = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(packed, count=self.vocab_size, bitorder="little").view(np.bool_)
        if state.is_error():
            # Where no token fits the engine allows ends of text, even of unfinished texts.
            message = state.get_error()
            if not message.startswith("NoExtension"):
                raise DataError(
                    f"the {_WHAT[self.grammar.kind]} cannot be followed here: "
                    f"{_readable(self.grammar.kind, message)}"
                )
            mask[:] = False
        mask[self._ends] = False
        return mask

    def advance(self, state: Any, token: int) -> Any:
        """Return the state after a legal token.

        Raises
        ------
        DataError
            If the token is not legal.
        """
        after = state.deep_copy()
        if not after.consume_token(int(token)):
            raise DataError(f"token {token} is not legal here")
        return after

    def may_end(self, state: Any) -> bool:
        """Return whether the text so far is in the language."""
        return bool(state.is_accepting())

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text that tokens spell, without what tokenizers tidy up when they decode.

        Bytes that are no UTF-8 become U+FFFD. Special tokens are written as their names.
        """
        parts, run = [], list[int]()
        for token in tokens:
            if self._tokenizer.is_special_token(int(token)):
                parts += [
                    self._tokenizer.decode_bytes(run),
                    str(self._names(int(token)) or "").encode(),
                ]
                run = []
            else:
                run.append(int(token))
        parts.append(self._tokenizer.decode_bytes(run))
        return b"".join(parts).decode(errors="replace")

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Return whether the tokens, without an end of text, spell a text of the language."""
        state = self.start()
        for token in tokens:
            if not state.consume_token(int(token)):
                return False
        return self.may_end(state)


def _eos_ids(given: int | Iterable[int] | None, tokenizer: Any) -> list[int]:
    if given is None:
        given = getattr(tokenizer, "eos_token_id", None)
    if given is None:
        raise DataError("eos_token_id is needed: the tokenizer has no end-of-text token")
    ids = [given] if isinstance(given, int) else [int(token) for token in given]
    if not ids:
        raise DataError("eos_token_id must name at least one token")
    return sorted(set(ids))


# One per tokenizer object: building takes about a second, and is the same for all grammars.
_engines: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], tuple[Any, int, str]]]
_engines = weakref.WeakKeyDictionary()


def _engine(tokenizer: Any, vocab_size: int, ends: list[int]) -> tuple[Any, int, str]:
    """Return llguidance's tokenizer, its longest token in bytes, and a digest of the tokenizer."""
    known = _engines.setdefault(tokenizer, {})
    key = (vocab_size, *ends)
    if key in known:
        return known[key]
    from llguidance.hf import from_tokenizer

    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "tokenizer must be a fast one (of the tokenizers library), got "
            f"{type(tokenizer).__name__}"
        )
    if max(ends) >= len(tokenizer) or min(ends) < 0:
        raise DataError(
            f"eos_token_id must be among the tokenizer's {len(tokenizer)} tokens, got {ends}"
        )
    if vocab_size < len(tokenizer):
        raise DataError(
            f"vocab_size must be at least the tokenizer's {len(tokenizer)}, got {vocab_size}: "
            "model and tokenizer do not belong together"
        )
    try:
        engine = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends)
    except ValueError as error:
        raise DataError(
            f"the tokens of this {type(tokenizer).__name__} are not bytes, so that grammars cannot "
            f"be followed in it: {error}"
        ) from error
    longest = max(
        (
            len(engine.decode_bytes([token]))
            for token in range(len(tokenizer))
            if not engine.is_special_token(token)
        ),
        default=1,
    )
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    known[key] = engine, max(longest, 1), digest
    return known[key]


# How short a text can be --------------------------------------------------------------------------
# Lower bounds as least fixed points: every rule starts at infinity, and what stays there has no
# finite derivation. Whatever is not understood counts as zero bytes, which errs on the safe side.


def _shortest_json(schema: Any) -> int | float:
    """Return a lower bound on the bytes of a JSON text that the schema admits."""
    references: dict[str, int | float] = {}

    def resolve(pointer: str) -> Any:
        node: Any = schema
        for part in pointer.removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            node = node[int(key)] if isinstance(node, list) else node[key]
        return node

    def literal(value: Any) -> int:
        # Escapes are never shorter than the character in UTF-8.
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        return 1 if isinstance(value, float | dict | list) else len(text.encode())

    def bound(part: Any) -> int | float:
        if not isinstance(part, Mapping):
            return 1
        found: list[int | float] = [1]
        if isinstance(reference := part.get("$ref"), str) and reference.startswith("#"):
            references.setdefault(reference, math.inf)
            found.append(references[reference])
        if isinstance(part.get("enum"), list) and part["enum"]:
            found.append(min(literal(value) for value in part["enum"]))
        if "const" in part:
            found.append(literal(part["const"]))
        for word in ("anyOf", "oneOf"):
            if isinstance(part.get(word), list) and part[word]:
                found.append(min(bound(option) for option in part[word]))
        if isinstance(part.get("allOf"), list):
            found.extend(bound(option) for option in part["allOf"])
        kinds = part.get("type")
        if isinstance(kinds, str):
            found.append(of_type(kinds, part))
        elif isinstance(kinds, list) and kinds:
            found.append(min(of_type(kind, part) for kind in kinds))
        return max(found)

    def of_type(kind: str, part: Mapping[str, Any]) -> int | float:
        if kind == "object":
            properties = part.get("properties")
            properties = properties if isinstance(properties, Mapping) else {}
            required = part.get("required")
            required = list(dict.fromkeys(required)) if isinstance(required, list) else []
            entries = [literal(key) + 1 + bound(properties.get(key, {})) for key in required]
            return 2 + sum(entries) + max(len(entries) - 1, 0)
        if kind == "array":
            n = part.get("minItems")
            n = n if isinstance(n, int) else 0
            first = part.get("prefixItems")
            first = first if isinstance(first, list) else []
            rest = bound(part.get("items", {})) if n > len(first) else 0
            entries = [bound(item) for item in first[:n]]
            return 2 + sum(entries) + (n - len(entries)) * (rest if n > len(entries) else 0)
        if kind == "string":
            n = part.get("minLength")
            return 2 + (n if isinstance(n, int) else 0)
        return {"boolean": 4, "null": 4}.get(kind, 1)

    try:
        while True:
            least = bound(schema)
            before = dict(references)
            for reference in before:
                references[reference] = bound(resolve(reference))
            if references == before:
                return least
    except (KeyError, IndexError, ValueError, TypeError, RecursionError):
        return 0  # a reference of a form that is not followed here


_LARK_TOKEN = re.compile(
    r"""
    (?P<skip>[ \t\r]+|//[^\n]*|\#[^\n]*)
    |(?P<newline>\n)
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?![*/])(?:[^/\\\n]|\\.)+/[imslux]*)
    |(?P<special><[^>\n]*>)
    |(?P<range>\.\.)
    |(?P<repeat>~\s*\d+(?:\s*\.\.\s*\d+)?|\{\s*\d*\s*(?:,\s*\d*\s*)?\})
    |(?P<alias>->\s*\w+)
    |(?P<name>[?!]?[A-Za-z_]\w*)
    |(?P<mark>[|()\[\]?*+:&])
    """,
    re.VERBOSE,
)
_LARK_RULE = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)(?:\.-?\d+)?[ \t]*(\[[^\n]*?\])?[ \t]*:", re.M)


class _NotFollowedError(Exception):
    """A construct of the grammar language that the bound does not look into."""


def _shortest_lark(text: str) -> int | float:
    """Return a lower bound on the bytes of a text that the rule ``start`` derives."""
    heads = list(_LARK_RULE.finditer(text))
    lengths: dict[str, int | float] = {}
    bodies: dict[str, list[tuple[str, str]]] = {}
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        name = head.group(1)
        body = text[head.end() : following.start() if following else len(text)]
        body = re.split(r"^[ \t]*%", body, maxsplit=1, flags=re.M)[0]
        try:
            if name in bodies or head.group(2):
                raise _NotFollowedError  # attributes can change what the body means
            bodies[name] = _lark_tokens(body)
            lengths[name] = math.inf
        except _NotFollowedError:
            lengths[name] = 0
            bodies.pop(name, None)
    if "start" not in lengths:
        return 0
    while True:
        before = dict(lengths)
        for name, tokens in bodies.items():
            if name in lengths and lengths[name] != 0:
                try:
                    lengths[name] = _LarkBound(tokens, lengths).whole()
                except _NotFollowedError:
                    lengths[name] = 0
        if lengths == before:
            return lengths["start"]


def _lark_tokens(body: str) -> list[tuple[str, str]]:
    tokens, place = [], 0
    while place < len(body):
        match = _LARK_TOKEN.match(body, place)
        if match is None:
            raise _NotFollowedError
        place = match.end()
        if match.lastgroup not in ("skip", "newline", "alias"):
            tokens.append((str(match.lastgroup), match.group()))
    return tokens


class _LarkBound:
    """Recursive descent over one rule's body that adds up bytes instead of building a tree."""

    def __init__(self, tokens: list[tuple[str, str]], lengths: Mapping[str, int | float]) -> None:
        self.tokens, self.lengths, self.place = tokens, lengths, 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.place += 1
        return token

    def whole(self) -> int | float:
        least = self.alternatives()
        if self.peek()[0] != "end":
            raise _NotFollowedError
        return least

    def alternatives(self) -> int | float:
        least = self.sequence()
        while self.peek() == ("mark", "|"):
            self.take()
            least = min(least, self.sequence())
        return least

    def sequence(self) -> int | float:
        total: int | float = 0
        while (token := self.peek())[0] != "end" and token not in (
            ("mark", "|"),
            ("mark", ")"),
            ("mark", "]"),
        ):
            item = self.item()
            while self.peek() == ("mark", "&"):
                self.take()
                item = max(item, self.item())
            total += item
        return total

    def item(self) -> int | float:
        least = self.atom()
        while True:
            kind, text = self.peek()
            if (kind, text) in (("mark", "?"), ("mark", "*")):
                least = 0
            elif kind == "repeat":
                times = re.search(r"\d+", text.split(",")[0])
                n = int(times.group()) if times else 0
                least = n * least if n else 0
            elif (kind, text) != ("mark", "+"):
                return least
            self.take()

    def atom(self) -> int | float:
        kind, text = self.take()
        if kind == "string":
            if self.peek()[0] == "range":
                self.take()
                self.take()
                return 1
            try:
                return (
                    len(str(json.loads(text.removesuffix("i"))).encode()) if text[-1] == '"' else 0
                )
            except ValueError:
                return 0
        if kind in ("regex", "special"):
            return 0
        if kind == "name":
            return self.lengths.get(text.lstrip("?!"), 0)
        if text in ("(", "["):
            least = self.alternatives()
            if self.take() != ("mark", ")" if text == "(" else "]"):
                raise _NotFollowedError
            return least if text == "(" else 0
        raise _NotFollowedError


def constraint_for(
    grammar: Any, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]
) -> TokenConstraint:
    """Return `grammar` itself if it is a `TokenConstraint`, else a `GrammarConstraint` for it.

    Raises
    ------
    DataError
        As `GrammarConstraint`; also if a ready constraint is of another vocabulary.
    """
    if isinstance(grammar, type) or not isinstance(grammar, TokenConstraint):
        return GrammarConstraint(
            grammar, tokenizer, vocab_size=vocab_size, eos_token_id=eos_token_ids
        )
    if grammar.vocab_size != vocab_size:
        raise DataError(
            f"the grammar's vocab_size is {grammar.vocab_size}, but the model gives {vocab_size} "
            "logits"
        )
    return grammar
