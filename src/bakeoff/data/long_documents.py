"""Long documents with facts hidden in them, and questions that only these facts answer.

The text around the facts is Python's language reference. A pass key is one number, said twice, as
in the usual tests of long context. Of numbers there are several of one form, of different things,
and one of them is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from bakeoff.data.embedded import manual_paragraphs
from bakeoff.data.prompts import Prompt
from bakeoff.errors import DataError

DocumentsSize = Literal["smoke", "demo", "full"]
KINDS = ("pass keys", "numbers")

CHARACTERS_PER_TOKEN = 4.4
"""Of the language reference, by the tokenizer of SmolLM2."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_QUALITIES = _words("brass broken copper golden iron leather old paper plastic silver stone wooden")
_THINGS = _words("bell bottle comb drum glove kettle kite lamp ladder mirror ring spoon")
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class LongDocuments:
    """Documents that are drawn anew for every seed, with the same questions in each draw.

    Question i, its answer, how long its document is and how deep in it the fact stands are fixed;
    a seed draws the text around it, and the numbers of other things. So a draw repeats the test of
    one fact in another haystack, and draws can be compared question by question.

    Parameters
    ----------
    n_tokens
        Lengths of documents, in tokens, about: characters are counted.
    depths
        Where the fact stands, as shares of the document from its beginning.
    kinds
        Of `KINDS`.
    n_numbers
        Numbers in a document of that kind, the one that is asked for included.

    Raises
    ------
    DataError
        If a value is out of range, or the reference is shorter than a document.

    Examples
    --------
    >>> documents = LongDocuments(n_tokens=(500,), depths=(0.5,))
    >>> one, other = (documents.draw(seed)["pass keys"][0] for seed in (0, 1))
    >>> one.text == other.text, one.answers == other.answers, one.document == other.document
    (True, True, False)
    >>> one.answers[0] in one.document
    True
    """

    n_tokens: tuple[int, ...] = (2000,)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    kinds: tuple[str, ...] = KINDS
    n_numbers: int = 8

    def __post_init__(self) -> None:
        for name in ("n_tokens", "depths", "kinds"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or len(set(values)) < len(values):
                raise DataError(f"{name} must hold at least one value, and none twice")
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown:
            raise DataError(f"kinds must be among {', '.join(KINDS)}, got {unknown[0]!r}")
        longest = int(sum(map(len, _texts())) / CHARACTERS_PER_TOKEN)
        for length in self.n_tokens:
            if not 100 <= length <= longest:
                raise DataError(
                    f"n_tokens must be between 100 and {longest}, the length of the language "
                    f"reference, got {length}"
                )
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise DataError(f"depths must be between 0 and 1, got {depth}")
        most = len(_QUALITIES) * len(_THINGS)
        if not 2 <= self.n_numbers <= most:
            raise DataError(f"n_numbers must be between 2 and {most}, got {self.n_numbers}")

    def draw(self, seed: int) -> dict[str, tuple[Prompt, ...]]:
        """Return the prompts of a seed by kind: one for every length and depth, in that order."""
        return {
            kind: tuple(
                self._prompt(kind, length, depth, seed)
                for length in self.n_tokens
                for depth in self.depths
            )
            for kind in self.kinds
        }

    def fingerprint(self) -> str:
        """Return a SHA-256 of the settings and the text, as hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        digest.update("\0".join(_texts()).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """Say in a sentence what there is."""
        lengths = ", ".join(f"{length:,}" for length in self.n_tokens)
        depths = ", ".join(f"{depth:.0%}" for depth in self.depths)
        return (
            f"{' and '.join(self.kinds)} in the language reference of Python, about {lengths} "
            f"tokens, at {depths} of a document; each seed draws other text around them"
        )

    def _prompt(self, kind: str, length: int, depth: float, seed: int) -> Prompt:
        place = [KINDS.index(kind), length, round(depth * 10_000)]
        of_question = np.random.default_rng(place)
        of_seed = np.random.default_rng([*place, seed, 1])
        value = str(of_question.integers(10_000, 100_000))
        if kind == "pass keys":
            facts = [(depth, f"The pass key is {value}. Remember it. {value} is the pass key.")]
            question = "Which five-digit number is the pass key in the text above?"
        else:
            asked = int(of_question.integers(len(_QUALITIES) * len(_THINGS)))
            facts = [(depth, _number_of(asked, value))]
            facts += self._others(asked, value, of_seed)
            question = f"What is the number of {_thing(asked)}?"
        n_characters = length * CHARACTERS_PER_TOKEN - sum(len(fact) for _, fact in facts)
        text = _haystack(n_characters, value, of_seed)
        return Prompt(question, answers=(value,), document=_with_facts(text, facts))

    def _others(
        self, asked: int, value: str, generator: np.random.Generator
    ) -> list[tuple[float, str]]:
        """Return the numbers of other things, anywhere in the document."""
        n_others = self.n_numbers - 1
        things = generator.permutation(len(_QUALITIES) * len(_THINGS))
        values = [str(number) for number in generator.permutation(90_000)[: n_others + 1] + 10_000]
        others = [number for number in values if number != value][:n_others]
        return [
            (float(generator.random()), _number_of(thing, number))
            for thing, number in zip(things[things != asked][:n_others], others, strict=True)
        ]


def long_documents_default(size: DocumentsSize = "demo") -> LongDocuments:
    """Return pass keys and numbers in documents of usual lengths.

    Parameters
    ----------
    size
        ``"smoke"`` (600 tokens, 4 documents), ``"demo"`` (2,000 and 4,000 tokens, 20 documents) or
        ``"full"`` (4,000 to 32,000 tokens, 80 documents).

    Raises
    ------
    DataError
        If `size` is unknown, or the running Python comes without its language reference.

    Examples
    --------
    >>> [len(prompts) for prompts in long_documents_default("smoke").draw(0).values()]
    [2, 2]
    """
    tenths = tuple(round(0.05 + tenth / 10, 2) for tenth in range(10))
    if size == "smoke":
        return LongDocuments((600,), (0.3, 0.6), n_numbers=4)
    if size == "demo":
        return LongDocuments((2000, 4000))
    if size == "full":
        return LongDocuments((4000, 8000, 16_000, 32_000), tenths, n_numbers=16)
    raise DataError(f"size must be one of 'smoke', 'demo', 'full', got {size!r}")


@lru_cache(maxsize=1)
def _reference() -> dict[str, tuple[str, ...]]:
    return manual_paragraphs()


def _texts() -> list[str]:
    return [paragraph for of_topic in _reference().values() for paragraph in of_topic]


def _thing(number: int) -> str:
    quality, thing = divmod(int(number), len(_THINGS))
    return f"the {_QUALITIES[quality]} {_THINGS[thing]}"


def _number_of(thing: int, value: str) -> str:
    name = _thing(thing)
    return f"The number of {name} is {value}. Remember it. {value} is the number of {name}."


def _haystack(n_characters: float, value: str, generator: np.random.Generator) -> list[str]:
    """Return paragraphs, topic by topic, that do not hold a value."""
    by_topic = _reference()
    topics = sorted(by_topic)
    found: list[str] = []
    for row in generator.permutation(len(topics)):
        for paragraph in by_topic[topics[row]]:
            if n_characters <= 0:
                return found
            if value not in paragraph:
                found.append(paragraph)
                n_characters -= len(paragraph) + len(_BETWEEN)
    return found


def _with_facts(paragraphs: Sequence[str], facts: Sequence[tuple[float, str]]) -> str:
    """Return the text with each fact between the two paragraphs that are nearest to its depth."""
    ends = np.cumsum([0, *(len(paragraph) + len(_BETWEEN) for paragraph in paragraphs)])
    placed: list[tuple[int, int, str]] = [
        (int(np.abs(ends - depth * ends[-1]).argmin()), number, fact)
        for number, (depth, fact) in enumerate(facts)
    ]
    texts = list(paragraphs)
    for row, _, fact in sorted(placed, reverse=True):
        texts.insert(row, fact)
    return _BETWEEN.join(texts)
