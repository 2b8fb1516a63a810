"""Prompts whose answers must be texts of a formal language: names, dates, times, records, bits.

Descriptions of functions are those of the running Python. Nothing is fetched. Languages are given
in the plain forms in which users have them: options, regular expressions, JSON schemas.
"""

from __future__ import annotations

import builtins
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bakeoff.data.prompts import Prompt
from bakeoff.errors import DataError

Size = Literal["smoke", "demo", "full"]

_SIZES: dict[Size, dict[str, int | None]] = {
    "smoke": {"bits": 1, "function": 2, "question": 2, "time": 1},
    "demo": {"bits": 3, "function": 10, "question": 6, "date": 3, "time": 4, "record": 3},
    "full": dict.fromkeys(("bits", "function", "question", "date", "time", "record")),
}

SKEWED_BITS = "00000|1[01]{4}"
"""The paper's skewed language: beginning with 0 leaves one text, beginning with 1 sixteen."""

_BITS = (
    "Write a random binary number of five digits.",
    "Toss a coin five times. Write 1 for heads and 0 for tails, without spaces.",
    "Write the number 21 as five binary digits.",
    "Write the number 0 as five binary digits.",
    "Write the number 31 as five binary digits.",
    "Write a password of five digits, each of which is 0 or 1.",
)
# All of them are in every Python from 3.11 on, and have a description.
_FUNCTIONS = {
    math: "acos asin atan ceil cos cosh exp fabs floor gcd lcm log2 sin sinh sqrt tan tanh trunc",
    builtins: "abs all any bin chr hash hex len oct ord pow repr round sum",
}
_QUESTIONS = {
    "Is the Moon larger than the Earth?": "no",
    "Is Paris the capital of France?": "yes",
    "Will it rain in Lisbon on the first day of next month?": "unsure",
    "Do penguins fly?": "no",
    "Is 17 a prime number?": "yes",
    "Is there life on other planets?": "unsure",
    "Is gold heavier than water?": "yes",
    "Did Shakespeare write Hamlet?": "yes",
    "Is a tomato a mineral?": "no",
    "Will the next coin toss be heads?": "unsure",
    "Does water boil at 50 degrees Celsius at sea level?": "no",
    "Is my neighbour's dog brown?": "unsure",
}
_DATES = {
    "When is Christmas Day?": "12-25",
    "On which day did people first land on the Moon?": "07-20",
    "When is New Year's Day?": "01-01",
    "When do the French celebrate the storming of the Bastille?": "07-14",
    "When is Valentine's Day?": "02-14",
    "On which day did the Berlin Wall fall?": "11-09",
}
_DATE = "(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIMES = {
    "The train leaves at a quarter past eight in the morning.": "08:15",
    "The shop closes at half past six in the evening.": "18:30",
    "The party ends at midnight.": "00:00",
    "Lunch is served at noon.": "12:00",
    "The film begins at a quarter to nine in the evening.": "20:45",
    "The bus comes at half past seven in the morning.": "07:30",
    "Dinner is at seven in the evening.": "19:00",
    "The alarm rings at a quarter to six in the morning.": "05:45",
}
_TIME = "([01][0-9]|2[0-3]):(00|15|30|45)"
_RECORDS = {
    "How many legs has a spider?": "8",
    "How many days has a week?": "7",
    "How many sides has a triangle?": "3",
    "How many wheels has a bicycle?": "2",
    "How many planets are nearer to the Sun than Mars?": "3",
    "How many strings has a violin?": "4",
}
_OPEN = (
    "Invent a person.",
    "Name a scientist.",
    "Name an explorer.",
    "Invent a villain of a film.",
    "Name a painter.",
    "Name a writer.",
)


@dataclass(frozen=True)
class ConstrainedPrompts:
    """Prompts, each with the language of its answers.

    Parameters
    ----------
    prompts
        What is asked, with the right answers where there are some.
    grammars
        A compiled regular expression or a JSON schema for each; None where the prompt's own options
        are the language.
    """

    prompts: tuple[Prompt, ...]
    grammars: tuple[re.Pattern[str] | Mapping[str, Any] | None, ...]


def constrained_prompts(size: Size = "demo", *, open_ended: bool = False) -> ConstrainedPrompts:
    """Return prompts with languages, most of them of 3 to 400 texts.

    Parameters
    ----------
    size
        ``"smoke"`` (6), ``"demo"`` (29) or ``"full"`` (all, 70).
    open_ended
        Whether to add six records with a free name, whose language is too large to be enumerated.

    Raises
    ------
    DataError
        If there is no such size.

    Examples
    --------
    >>> found = constrained_prompts("smoke")
    >>> found.prompts[0].text, found.grammars[0].pattern
    ('Write a random binary number of five digits.', '00000|1[01]{4}')
    """
    if size not in _SIZES:
        raise DataError(f"size must be one of {', '.join(map(repr, _SIZES))}, got {size!r}")
    chosen: list[tuple[Prompt, Any]] = []
    kinds = _kinds()
    for kind, n in _SIZES[size].items():
        chosen += kinds[kind][:n]
    if open_ended:
        chosen += _open_records()
    return ConstrainedPrompts(
        tuple(prompt for prompt, _ in chosen), tuple(grammar for _, grammar in chosen)
    )


def _kinds() -> dict[str, list[tuple[Prompt, Any]]]:
    record = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    yes_no = "Answer yes, no or unsure, in lower case."
    return {
        "bits": [(Prompt(text), re.compile(SKEWED_BITS)) for text in _BITS],
        "function": [(prompt, None) for prompt in _functions()],
        "question": [
            (Prompt(f"{text} {yes_no}", (answer,), ("yes", "no", "unsure")), None)
            for text, answer in _QUESTIONS.items()
        ],
        "date": [
            (Prompt(f"{text} Answer with month and day as MM-DD.", (answer,)), re.compile(_DATE))
            for text, answer in _DATES.items()
        ],
        "time": [
            (Prompt(f"{text} Write the time as HH:MM.", (answer,)), re.compile(_TIME))
            for text, answer in _TIMES.items()
        ],
        "record": [
            (
                Prompt(f'{text} Answer in JSON, as in {{"n":5}}.', (f'{{"n":{answer}}}',)),
                record,
            )
            for text, answer in _RECORDS.items()
        ],
    }


def _functions() -> Iterable[Prompt]:
    """Yield a prompt for every function, the modules by turns."""
    by_module: list[list[Prompt]] = []
    for module, listed in _FUNCTIONS.items():
        names = listed.split()
        found = []
        for name in names:
            described = (inspect.getdoc(getattr(module, name)) or name).split("\n\n")[0]
            text = (
                f"Which Python function does this: {' '.join(described.split())} "
                "Answer with its name only."
            )
            found.append(Prompt(text, (name,), tuple(names)))
        by_module.append(found)
    longest = max(map(len, by_module))
    for place in range(longest):
        for prompts in by_module:
            yield from prompts[place : place + 1]


def _open_records() -> list[tuple[Prompt, Any]]:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 24},
            "born": {"type": "integer", "minimum": 1000, "maximum": 2025},
        },
        "required": ["name", "born"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    example = '{"name":"Ada","born":1815}'
    return [
        (Prompt(f"{text} Answer in JSON with name and year of birth, as in {example}."), schema)
        for text in _OPEN
    ]
