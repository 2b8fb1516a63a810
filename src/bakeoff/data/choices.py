"""Questions with four answers to choose from, made of text that every Python carries.

The standard library says what its functions do, and the language reference has sentences to
complete. Nothing is fetched, and Python files are parsed, never imported. In two kinds of question
the options are the set that has no order; in the third it is four passages, one of which holds the
answer.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from bakeoff.data.embedded import manual_paragraphs, standard_library_modules
from bakeoff.data.prompts import Prompt
from bakeoff.data.splits import normalise, position, sample
from bakeoff.errors import DataError

ChoiceKind = Literal["functions", "words", "passages"]
ChoiceSize = Literal["smoke", "demo", "full"]
KINDS: tuple[ChoiceKind, ...] = ("functions", "words", "passages")
"""What a question is about: see `choice_prompts`."""

N_OPTIONS = 4

# Questions of each kind, in the order of KINDS; None takes all.
_SIZES: dict[str, tuple[int | None, ...]] = {
    "smoke": (0, 4, 0),
    "demo": (24, 16, 24),
    "full": (None, None, None),
}
# A vote over all orders of four options is 24 passes; of three, 6.
_SMOKE_OPTIONS = 3
# One module cannot ask most of the questions, nor a topic of the manual.
_MOST_PER_SOURCE = 6
_WORDS_IN_DESCRIPTION = range(5, 21)
_WORDS_IN_SENTENCE = range(10, 25)
_LETTERS_IN_GAP = range(5, 13)
_GAP = "____"


@dataclass(frozen=True)
class _Function:
    module: str
    name: str
    arguments: tuple[str, ...]
    description: str


def choice_prompts(
    size: ChoiceSize = "demo", seed: int = 0, kinds: Sequence[ChoiceKind] = KINDS
) -> tuple[Prompt, ...]:
    """Return questions with four options each, one of which is right: chance is 25 %.

    The questions are the same for every process and every run of one Python version.

    Parameters
    ----------
    size
        ``"smoke"`` (4 questions about words, of three options to save time), ``"demo"`` (64) or
        ``"full"`` (all: more than a thousand).
    seed
        Another seed asks other questions and draws other wrong options.
    kinds
        ``"functions"``: which function of a module a docstring describes, without naming it.
        ``"words"``: which word is missing from a sentence of the language reference; the wrong ones
        end in the same two letters. ``"passages"``: four functions of a module with their
        arguments and docstrings are the passages, one docstring is asked for, and the names are
        the options.

    Returns
    -------
    tuple of Prompt
        With one answer each. Where it stands among the options, or passages, is drawn. The text
        differs between Python versions.

    Raises
    ------
    DataError
        If `size` or a kind is unknown, or the running Python has no source of its library or no
        text behind ``help()``.

    Examples
    --------
    >>> prompts = choice_prompts("smoke")
    >>> len(prompts), {len(prompt.options) for prompt in prompts}
    (4, {3})
    """
    if size not in _SIZES:
        raise DataError(f"size must be one of {', '.join(map(repr, _SIZES))}, got {size!r}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise DataError(f"kinds must be among {', '.join(KINDS)}, got {list(kinds)}")
    made = {"functions": _about_functions, "words": _about_words, "passages": _with_passages}
    n_options = _SMOKE_OPTIONS if size == "smoke" else N_OPTIONS
    prompts: list[Prompt] = []
    for kind, n in zip(KINDS, _SIZES[size], strict=True):
        if kind in kinds and n != 0:
            prompts += sample(made[kind](seed, n_options), n, seed, key=lambda prompt: prompt.text)
    return tuple(prompts)


def _about_functions(seed: int, n_options: int) -> list[Prompt]:
    prompts = []
    for module, functions in _by_module().items():
        # Names within names ("open", "urlopen") would make the wording of an option a hint.
        asked = [one for one in functions if one.name.lower() not in one.description.lower()]
        for one in sample(asked, _MOST_PER_SOURCE, seed, key=_description_of):
            text = (
                f"Which function of the Python module {module} is described by: {one.description}"
            )
            others = [other.name for other in functions if other.name != one.name]
            options = _options(one.name, others, text, seed, n_options)
            prompts.append(Prompt(text, answers=(one.name,), options=options))
    return prompts


def _with_passages(seed: int, n_options: int) -> list[Prompt]:
    prompts = []
    for module, functions in _by_module().items():
        passages = {
            one.name: f"{one.name}({', '.join(one.arguments)}): {one.description}"
            for one in functions
        }
        # Another seed than for the questions without passages: not the same functions again.
        for one in sample(functions, 2, seed + 1, key=_description_of):
            text = f"Which function of {module} is described by: {one.description}"
            others = [other.name for other in functions if other.name != one.name]
            names = _options(one.name, others, text, seed, n_options)
            prompts.append(
                Prompt(
                    text,
                    answers=(one.name,),
                    options=names,
                    passages=tuple(passages[name] for name in names),
                )
            )
    return prompts


def _about_words(seed: int, n_options: int) -> list[Prompt]:
    by_topic = {topic: _sentences(paragraphs) for topic, paragraphs in manual_paragraphs().items()}
    by_ending: dict[str, set[str]] = defaultdict(set)
    for sentences in by_topic.values():
        for sentence in sentences:
            for word in _gaps(sentence):
                by_ending[word[-2:]].add(word)
    prompts = []
    for sentences in by_topic.values():
        for sentence in sample(sentences, _MOST_PER_SOURCE, seed, key=str):
            words = set(re.findall(r"\w+", sentence.lower()))
            gaps = [
                word for word in _gaps(sentence) if len(by_ending[word[-2:]] - words) >= N_OPTIONS
            ]
            if not gaps:
                continue
            answer = min(gaps, key=lambda word: position(f"{sentence}\n{word}", seed))
            gapped = re.sub(rf"\b{answer}\b", _GAP, sentence)
            text = f"Which word is missing from this sentence? {gapped}"
            options = _options(
                answer, sorted(by_ending[answer[-2:]] - words), text, seed, n_options
            )
            prompts.append(Prompt(text, answers=(answer,), options=options))
    return prompts


def _sentences(paragraphs: Iterable[str]) -> list[str]:
    """Return the plain first sentence of each paragraph."""
    first = (re.split(r"(?<=[.])\s+(?=[A-Z])", text)[0] for text in paragraphs)
    return [
        sentence
        for sentence in dict.fromkeys(first)
        if len(sentence.split()) in _WORDS_IN_SENTENCE
        and re.fullmatch(r"[A-Z][A-Za-z ,;'()-]+\.", sentence)
    ]


def _gaps(sentence: str) -> list[str]:
    """Return words that may be left out: in small letters, of some length, occurring once."""
    words = re.findall(r"\w+", sentence.lower())
    return [
        word
        for word in re.findall(r"(?<![\w'-])[a-z]+(?![\w'-])", sentence)
        if len(word) in _LETTERS_IN_GAP and words.count(word) == 1
    ]


def _options(
    answer: str, others: Sequence[str], question: str, seed: int, n_options: int
) -> tuple[str, ...]:
    """Return the answer among wrong ones; which ones and in which order goes by a hash."""
    wrong = sorted(others, key=lambda other: position(f"{question}\n{other}", seed))
    options = [answer, *wrong[: n_options - 1]]
    return tuple(sorted(options, key=lambda option: position(f"{option}\n{question}", seed)))


def _description_of(function: _Function) -> str:
    return function.description


@lru_cache(maxsize=1)
def _by_module() -> dict[str, tuple[_Function, ...]]:
    """Return documented functions by module, for modules that have enough of them."""
    modules: dict[str, tuple[_Function, ...]] = {}
    for path, source in standard_library_modules().items():
        parts = path.removesuffix(".py").split("/")
        module = ".".join(part for part in parts if part != "__init__")
        found = _functions(module, source)
        if len(found) >= N_OPTIONS:
            modules[module] = found
    return modules


def _functions(module: str, source: str) -> tuple[_Function, ...]:
    by_name: dict[str, _Function] = {}
    descriptions: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring or node.name.startswith("_") or len(node.name) < 3:
            continue
        description = _description(docstring)
        same = normalise(description)
        if not description or node.name in by_name or same in descriptions:
            continue
        descriptions.add(same)
        given = node.args
        arguments = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        arguments = [name for name in arguments if name not in ("self", "cls")]
        by_name[node.name] = _Function(module, node.name, tuple(arguments), description)
    return tuple(by_name.values())


def _description(docstring: str) -> str:
    """Return a docstring's first sentence, if it is plain prose of a fit length, or nothing."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
    sentence = re.split(r"(?<=[.])\s+(?=[A-Z])", paragraph)[0]
    plain = sentence.isascii() and sentence.endswith(".") and sentence[0].isupper()
    fits = len(sentence.split()) in _WORDS_IN_DESCRIPTION
    return sentence if plain and fits and ">>>" not in sentence else ""
