"""Numbers, dates, sums of money and the like, and how English reads them aloud: made by rule.

The kinds are classes of text normalisation, the first stage of a speech synthesiser. Answers have
from one word to some twenty; short ones can be hard (a fraction) and long ones easy (a telephone
number), and a wrong word is often the only wrong one.

Digits stand apart, so that any tokenizer gives each a token of its own.
"""

from __future__ import annotations

import calendar
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from bakeoff.data.prompts import Prompt
from bakeoff.data.splits import position
from bakeoff.errors import DataError

Size = Literal["smoke", "demo", "full"]

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_ONES = tuple(_BELOW_TWENTY.split())
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ODD_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_MONTH_NAMES = (
    "January February March April May June July August September October November December"
)
_MONTHS = tuple(_MONTH_NAMES.split())
_ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
# Sign: one and many of the whole, one and many of its hundredth.
_MONEY = {
    "£": ("pound", "pounds", "penny", "pence"),
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
}
_UNITS = {
    "mm": ("millimetre", "millimetres"),
    "cm": ("centimetre", "centimetres"),
    "km": ("kilometre", "kilometres"),
    "ft": ("foot", "feet"),
    "g": ("gram", "grams"),
    "kg": ("kilogram", "kilograms"),
    "lb": ("pound", "pounds"),
    "ml": ("millilitre", "millilitres"),
    "h": ("hour", "hours"),
    "kWh": ("kilowatt hour", "kilowatt hours"),
    "mph": ("mile per hour", "miles per hour"),
    "%": ("per cent", "per cent"),
}

# Whether a thing is asked about or trained on is a matter of its text alone.
_ASKED_SHARE = 0.25


class _Amount(NamedTuple):
    """How many prompts, and how many texts to train on."""

    prompts: int
    texts: int


_AMOUNTS: dict[Size, _Amount] = {
    "smoke": _Amount(240, 3_000),
    "demo": _Amount(2_000, 30_000),
    "full": _Amount(10_000, 150_000),
}


def number_in_words(number: int) -> str:
    """Return a whole number from 0 to 999,999 in British English.

    Raises
    ------
    DataError
        If it is another number.

    Examples
    --------
    >>> number_in_words(342_017)
    'three hundred and forty-two thousand and seventeen'
    """
    if not 0 <= number < 1_000_000:
        raise DataError(f"number must be from 0 to 999,999, got {number}")
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    step, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    many, rest = divmod(number, step)
    words = f"{number_in_words(many)} {name}"
    if not rest:
        return words
    return f"{words} {'and ' if rest < 100 else ''}{number_in_words(rest)}"


def ordinal_in_words(number: int) -> str:
    """Return the ordinal of a whole number from 0 to 999,999.

    Examples
    --------
    >>> ordinal_in_words(342), ordinal_in_words(20)
    ('three hundred and forty-second', 'twentieth')
    """
    words = number_in_words(number)
    cut = max(words.rfind(" "), words.rfind("-")) + 1
    head, last = words[:cut], words[cut:]
    if last in _ODD_ORDINALS:
        return head + _ODD_ORDINALS[last]
    return head + (last[:-1] + "ieth" if last.endswith("y") else last + "th")


def roman_numeral(number: int) -> str:
    """Return a whole number from 1 to 3,999 as a Roman numeral.

    Raises
    ------
    DataError
        If it is another number.

    Examples
    --------
    >>> roman_numeral(1947)
    'MCMXLVII'
    """
    if not 1 <= number < 4000:
        raise DataError(f"number must be from 1 to 3,999, got {number}")
    written = ""
    for value, letters in _ROMAN:
        while number >= value:
            written += letters
            number -= value
    return written


def year_in_words(year: int) -> str:
    """Return a year from 1000 to 2099 as it is read.

    Raises
    ------
    DataError
        If it is another year.

    Examples
    --------
    >>> year_in_words(1947), year_in_words(1905), year_in_words(2005)
    ('nineteen forty-seven', 'nineteen oh five', 'two thousand and five')
    """
    if not 1000 <= year < 2100:
        raise DataError(f"year must be from 1000 to 2099, got {year}")
    century, rest = divmod(year, 100)
    if century % 10 == 0 and rest < 10:
        return number_in_words(year)
    if rest == 0:
        return f"{number_in_words(century)} hundred"
    return f"{number_in_words(century)} {'oh ' if rest < 10 else ''}{number_in_words(rest)}"


# Kinds --------------------------------------------------------------------------------------------


def _spread(written: str) -> str:
    """Return characters with a space between any two."""
    return " ".join(written.replace(" ", ""))


def _digits_in_words(digits: str) -> str:
    return " ".join(_ONES[int(digit)] for digit in digits)


def _counted(number: int, one: str, many: str) -> str:
    return f"{number_in_words(number)} {one if number == 1 else many}"


def _below(rng: random.Random, n_digits: int) -> int:
    """Return a positive number whose count of digits is uniform from 1 to `n_digits`."""
    chosen = rng.randint(1, n_digits)
    return rng.randrange(10 ** (chosen - 1), 10**chosen)


def _cardinal(rng: random.Random) -> tuple[str, str]:
    number = _below(rng, 6)
    return str(number), number_in_words(number)


def _ordinal(rng: random.Random) -> tuple[str, str]:
    number = _below(rng, 4)
    ends = {1: "st", 2: "nd", 3: "rd"}
    end = "th" if 10 <= number % 100 < 20 else ends.get(number % 10, "th")
    return f"{number}{end}", ordinal_in_words(number)


def _decimal(rng: random.Random) -> tuple[str, str]:
    whole = rng.choice((0, _below(rng, 3)))
    digits = f"{rng.randrange(10 ** rng.randint(1, 4))}"
    return f"{whole}.{digits}", f"{number_in_words(whole)} point {_digits_in_words(digits)}"


def _fraction(rng: random.Random) -> tuple[str, str]:
    whole, below = rng.choice((0, _below(rng, 2))), rng.randint(2, 24)
    above = rng.randrange(1, below)
    parts = {2: ("half", "halves"), 4: ("quarter", "quarters")}
    one = ordinal_in_words(below)
    words = _counted(above, *parts.get(below, (one, f"{one}s")))
    if not whole:
        return f"{above}/{below}", words
    return f"{whole}+{above}/{below}", f"{number_in_words(whole)} and {words}"


def _date(rng: random.Random) -> tuple[str, str]:
    year, month = rng.randrange(1500, 2100), rng.randint(1, 12)
    day = rng.randint(1, calendar.monthrange(year, month)[1])
    # Not calendar.month_name, which speaks the language of the locale.
    words = f"the {ordinal_in_words(day)} of {_MONTHS[month - 1]} {year_in_words(year)}"
    return f"{day}.{month}.{year}", words


def _time(rng: random.Random) -> tuple[str, str]:
    hour, minute = rng.randrange(24), rng.randrange(60)
    nearest = hour if minute <= 30 else (hour + 1) % 24
    clock = number_in_words(nearest % 12 or 12)
    part = (
        "at night"
        if nearest < 6 or nearest > 21
        else "in the morning"
        if nearest < 12
        else "in the afternoon"
        if nearest < 18
        else "in the evening"
    )
    away, side = (minute, "past") if minute <= 30 else (60 - minute, "to")
    if minute == 0:
        words = f"{clock} o'clock"
    elif away == 30:
        words = f"half {side} {clock}"
    elif away == 15:
        words = f"quarter {side} {clock}"
    elif away % 5 == 0:
        words = f"{number_in_words(away)} {side} {clock}"
    else:
        words = f"{_counted(away, 'minute', 'minutes')} {side} {clock}"
    return f"{hour}:{minute:02}", f"{words} {part}"


def _money(rng: random.Random) -> tuple[str, str]:
    sign = rng.choice(list(_MONEY))
    one, many, one_part, many_parts = _MONEY[sign]
    whole, part = _below(rng, 5), rng.choice((0, rng.randrange(1, 100)))
    words = _counted(whole, one, many)
    if part:
        words += f" and {_counted(part, one_part, many_parts)}"
    return f"{sign}{whole}.{part:02}", words


def _measure(rng: random.Random) -> tuple[str, str]:
    unit = rng.choice(list(_UNITS))
    one, many = _UNITS[unit]
    number = _below(rng, 4)
    if rng.random() < 0.5:
        return f"{number}{unit}", _counted(number, one, many)
    part = str(rng.randrange(1, 100)).rstrip("0")
    words = f"{number_in_words(number)} point {_digits_in_words(part)} {many}"
    return f"{number}.{part}{unit}", words


def _telephone(rng: random.Random) -> tuple[str, str]:
    digits = "0" + "".join(rng.choice("0123456789") for _ in range(rng.randint(5, 10)))
    words: list[str] = []
    place = 0
    while place < len(digits):
        name = "oh" if digits[place] == "0" else _ONES[int(digits[place])]
        double = digits[place : place + 2] == 2 * digits[place]
        words.append(f"double {name}" if double else name)
        place += 1 + double
    return digits, " ".join(words)


def _roman(rng: random.Random) -> tuple[str, str]:
    number = min(_below(rng, 4), 3999)
    return roman_numeral(number), number_in_words(number)


_KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "cardinal": _cardinal,
    "ordinal": _ordinal,
    "decimal": _decimal,
    "fraction": _fraction,
    "date": _date,
    "time": _time,
    "money": _money,
    "measure": _measure,
    "telephone": _telephone,
    "roman": _roman,
}
SPELLING_KINDS = tuple(_KINDS)
"""What is read aloud; the first word of a prompt says which."""


# Data ---------------------------------------------------------------------------------------------


def spelling_prompts(size: Size = "demo") -> tuple[Prompt, ...]:
    """Return things to read aloud, each with its one right answer.

    Parameters
    ----------
    size
        ``"smoke"``: 240, ``"demo"``: 2,000, ``"full"``: 10,000 prompts, the kinds mixed.

    Returns
    -------
    tuple of Prompt
        Distinct; none of them is among `spelling_texts`, of whatever size.

    Raises
    ------
    DataError
        If the size is none of these.

    Examples
    --------
    >>> prompt = spelling_prompts("smoke")[0]
    >>> prompt.text, prompt.answers
    ('decimal 0 . 1 2 0 =', ('zero point one two zero',))
    """
    amount = _checked(size).prompts
    return tuple(Prompt(text, answers=(answer,)) for text, answer in _drawn(amount, asked=True))


def spelling_texts(size: Size = "demo") -> tuple[str, ...]:
    """Return texts to train a model on that is to answer `spelling_prompts`.

    Parameters
    ----------
    size
        ``"smoke"``: 3,000, ``"demo"``: 30,000, ``"full"``: 150,000 texts, a prompt and its answer
        each. Rare kinds of things come more than once, as there are few of them.

    Raises
    ------
    DataError
        If the size is none of these.
    """
    amount = _checked(size).texts
    return tuple(f"{text} {answer}" for text, answer in _drawn(amount, asked=False))


def _checked(size: Size) -> _Amount:
    if size not in _AMOUNTS:
        raise DataError(f"size must be one of {', '.join(_AMOUNTS)}, got {size!r}")
    return _AMOUNTS[size]


@lru_cache(maxsize=4)
def _drawn(amount: int, *, asked: bool) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for text, answer in _stream(seed=1 if asked else 2):
        if (position(text, 0) < _ASKED_SHARE) != asked or (asked and text in seen):
            continue
        seen.add(text)
        found.append((text, answer))
        if len(found) == amount:
            break
    return tuple(found)


def _stream(seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)
    while True:
        kind = rng.choice(SPELLING_KINDS)
        written, read = _KINDS[kind](rng)
        yield f"{kind} {_spread(written)} =", read
