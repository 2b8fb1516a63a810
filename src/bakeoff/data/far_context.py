"""Made-up samples that differ in one thing: where in a long context their answer stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bakeoff.data.samples import Sample
from bakeoff.errors import DataError

KINDS = ("far", "near", "none", "noise", "hop")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Common words, so that a small language model can copy them from its context.
_NAMES = _words(
    """
    Adam Alice Amy Andrew Anna Arthur Barbara Ben Bob Brian Carl Carol Charles Chris Claire
    Daniel David Diana Edward Elizabeth Emily Emma Eric Ethan Eva Frank Fred George Grace
    Hannah Harry Helen Henry Ian Isaac Ivan Jack James Jane Jason Jennifer Jessica John
    Joseph Julia Karen Kate Kevin Laura Leo Lewis Linda Lisa Louis Lucy Luke Margaret Maria
    Mark Martin Mary Matthew Michael Nancy Nathan Nick Nina Oliver Oscar Paul Peter Philip
    Rachel Ralph Rebecca Richard Robert Rose Roy Ruth Sam Sarah Simon Sophie Stephen Susan
    Thomas Tim Tony Victor Victoria Walter William
    """
)
_SURNAMES = _words(
    """
    Adams Baker Bell Brown Carter Clark Cook Davis Evans Fisher Green Hall Harris Hill Hunt
    Jones King Lee Lewis Miller Moore Morgan Parker Reed Scott Smith Taylor Turner Walker
    White Wood Young
    """
)
_QUALITIES = _words(
    """
    black blue broken bronze brown copper dark glass golden green grey heavy iron large
    leather little long new old orange paper pink plastic purple red round silver small
    steel white wooden yellow
    """
)
_THINGS = _words(
    """
    bag ball basket bell boat book bottle box brush camera candle chair clock coat coin
    crown cup drum flag flute guitar hammer hat horse jacket key knife ladder lamp letter
    map mirror mug needle painting pen piano pipe plate radio ring rope ruler shirt shoe
    spoon stone sword table telescope ticket tower toy train umbrella vase violin watch
    wheel whistle
    """
)
_PLACES = _words(
    """
    attic bank barn basement bathroom bedroom cabin car castle cave cellar church closet
    desk drawer factory field forest garage garden hall harbor hotel house hut kitchen
    library market museum office park prison river school shed shop stable station street
    studio tent theater tower tunnel valley van village yard
    """
)


@dataclass(frozen=True)
class FarContextSample(Sample):
    """A made-up sample and how it was made.

    Parameters
    ----------
    kind
        One of `KINDS`; also the sample's `source`.
    line
        Number of the context's line that the response is copied from, from 0; -1 if there is none.
    """

    kind: str = ""
    line: int = -1


def far_context_samples(
    n: int,
    n_lines: int = 64,
    seed: int = 0,
    kinds: Sequence[str] = ("far", "near", "none", "noise"),
    *,
    far_lines: tuple[float, float] = (0.0, 0.125),
) -> tuple[FarContextSample, ...]:
    """Make samples whose context lists who keeps what, with questions about it.

    A context is one line per person, such as ``"Emma keeps a copper bell in the garden."``, some 12
    tokens. Responses of all kinds are drawn alike, so that nothing but the place of the answer
    tells the kinds apart:

    * ``"far"``: about a person in the first eighth of the lines, or where `far_lines` says;
    * ``"near"``: about the person in the last line;
    * ``"none"``: the instruction itself says the answer, the context does not;
    * ``"noise"``: about a person at any place, with a response that is made up;
    * ``"hop"``: one of these lines says that one person keeps the same as another one in these
      lines, and it is the first one's that is asked for.

    Parameters
    ----------
    n
        How many; kinds take turns.
    n_lines
        Lines of a context, 16 or more; 64 are about 800 tokens.
    seed
        Sample i depends on the seed, i and the other arguments alone: a longer list begins with a
        shorter one.
    kinds
        Which kinds, in the order in which they take turns.
    far_lines
        Between which shares of the lines the answers of ``"far"`` and ``"hop"`` stand: at least two
        lines, and never the last one. Attention dwells on the first tokens whatever they say; a
        range that leaves them out tells that from reading.

    Returns
    -------
    tuple of FarContextSample
        Samples with ``kind``, and ``line`` where the answer stands.

    Raises
    ------
    DataError
        If a number is too small, there are more lines than names, or a kind does not exist.

    Examples
    --------
    >>> sample = far_context_samples(1, n_lines=16)[0]
    >>> sample.kind, sample.response in sample.context.splitlines()[sample.line]
    ('far', True)
    >>> len(sample.context.splitlines())
    16
    """
    most = len(_NAMES) * len(_SURNAMES)
    if n < 1:
        raise DataError(f"n must be at least 1, got {n}")
    if not 16 <= n_lines <= most:
        raise DataError(f"n_lines must be between 16 and {most}, got {n_lines}")
    if not kinds or (unknown := [kind for kind in kinds if kind not in KINDS]):
        raise DataError(
            f"kinds must be one or more of {', '.join(KINDS)}, got "
            f"{repr(unknown[0]) if kinds else 'none'}"
        )
    first, end = (round(share * n_lines) for share in far_lines)
    far = range(first, min(end, n_lines - 1))
    if not 0 <= far_lines[0] < far_lines[1] <= 1 or len(far) < 2:
        raise DataError(
            "far_lines must be two shares between 0 and 1 with at least two lines between them "
            f"beside the last, got {far_lines} of {n_lines} lines"
        )
    return tuple(
        _sample(kinds[number % len(kinds)], n_lines, far, np.random.default_rng([seed, number]))
        for number in range(n)
    )


def _sample(kind: str, n_lines: int, far: range, rng: np.random.Generator) -> FarContextSample:
    people = _people(n_lines, rng)
    values = _values(n_lines + 1, rng)  # one more than lines: a value that the context lacks
    lines = [f"{person} keeps {value}." for person, value in zip(people, values[:-1], strict=True)]
    line, value = -1, values[-1]
    if kind == "far":
        line = int(rng.integers(far.start, far.stop))
    elif kind == "near":
        line = n_lines - 1
    elif kind == "hop":
        asked, line = (int(row) for row in rng.choice(far, size=2, replace=False))
        lines[asked] = f"{people[asked]} keeps the same as {people[line]}."
    person = people[int(rng.integers(n_lines)) if line < 0 else line]
    if kind == "hop":
        person = people[asked]
    if line >= 0:
        value = values[line]
    question = f"What does {person} keep, and where?"
    if kind == "none":
        question = f"Repeat these words: {value}"
    return FarContextSample(
        response=f"{value}.",
        instruction=question,
        context="\n".join(lines),
        source=kind,
        kind=kind,
        line=line,
    )


def _people(n: int, rng: np.random.Generator) -> list[str]:
    """Return n different people: by first name as long as there are enough."""
    if n <= len(_NAMES):
        return [_NAMES[row] for row in rng.permutation(len(_NAMES))[:n]]
    pairs = rng.choice(len(_NAMES) * len(_SURNAMES), size=n, replace=False)
    return [f"{_NAMES[p // len(_SURNAMES)]} {_SURNAMES[p % len(_SURNAMES)]}" for p in pairs]


def _values(n: int, rng: np.random.Generator) -> list[str]:
    """Return n different things in places."""
    shape = (len(_QUALITIES), len(_THINGS), len(_PLACES))
    drawn = rng.choice(int(np.prod(shape)), size=n, replace=False)
    values = []
    for quality, thing, place in zip(*np.unravel_index(drawn, shape), strict=True):
        article = "an" if _QUALITIES[quality][0] in "aeiou" else "a"
        values.append(f"{article} {_QUALITIES[quality]} {_THINGS[thing]} in the {_PLACES[place]}")
    return values
