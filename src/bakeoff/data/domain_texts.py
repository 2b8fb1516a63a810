"""Texts of several domains: to train language models on, and documents to judge them by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bakeoff.data.code_files import read_code
from bakeoff.data.formats import count
from bakeoff.data.splits import normalise, position, runs, sample
from bakeoff.errors import DataError

Size = Literal["smoke", "demo", "full"]

# Characters of training text per domain, and held-out documents; None takes all.
_SIZES: dict[str, tuple[int | None, int | None]] = {
    "smoke": (60_000, 8),
    "demo": (2_000_000, 60),
    "full": (None, 400),
}
_LONGEST = 1000
_SHORTEST = 200
_TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst")
# A run of this many words is no coincidence.
_COPIED_WORDS = 12


@dataclass(frozen=True)
class DomainTexts:
    """Training texts and held-out documents of each domain.

    Parameters
    ----------
    name
        For reports.
    training
        Texts by domain.
    held_out
        Documents by domain, of the same domains. No document is part of a training text.
    notes
        Sentences for the reader.

    Raises
    ------
    DataError
        If there is no domain, the two have different ones, or one is empty.
    """

    name: str
    training: Mapping[str, tuple[str, ...]]
    held_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.training:
            raise DataError("training must hold at least one domain")
        if list(self.training) != list(self.held_out):
            raise DataError(
                f"training has domains {list(self.training)}, held_out {list(self.held_out)}: they "
                "must be the same, in one order"
            )
        for what, by_domain in (("training", self.training), ("held_out", self.held_out)):
            for domain, texts in by_domain.items():
                if not texts:
                    raise DataError(f"{what}: domain {domain!r} has no text")

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(self.training)

    def fingerprint(self) -> str:
        """Return a digest, in hexadecimal, of all texts and their domains."""
        digest = hashlib.sha256()
        for by_domain in (self.training, self.held_out):
            line = json.dumps([[name, list(texts)] for name, texts in by_domain.items()])
            digest.update(line.encode())
        return digest.hexdigest()


def split_domains(
    texts: Mapping[str, Sequence[str]],
    *,
    name: str = "texts",
    held_out: Mapping[str, Sequence[str]] | None = None,
    share: float = 0.15,
    max_held_out: int | None = 100,
    max_characters: int | None = None,
) -> DomainTexts:
    """Hold out some texts of each domain, cut them into documents, and leave out what copies them.

    Parameters
    ----------
    texts
        Texts by domain: files, articles, rows of a table. A text is held out whole.
    name
        For reports.
    held_out
        What to judge by, where that is given apart; `texts` are then all for training.
    share
        How much of each domain is held out, chosen by content.
    max_held_out
        Most documents of a domain; a longer text is cut at blank lines into documents of at most
        1,000 characters.
    max_characters
        Most characters of a domain to train on.

    Raises
    ------
    DataError
        If a domain has fewer than two texts, or nothing is left of it, or a number is out of range.

    Examples
    --------
    >>> texts = {"a": [f"text {i} of domain a" for i in range(20)], "b": ["one text", "another"]}
    >>> split = split_domains(texts)
    >>> split.domains, len(split.training["a"]) + len(split.held_out["a"])
    (('a', 'b'), 20)
    """
    if not 0 < share < 1:
        raise DataError(f"share must be between 0 and 1, got {share}")
    if held_out is not None and set(held_out) != set(texts):
        raise DataError(
            f"held_out must have the domains {', '.join(texts)}, got {', '.join(held_out)}"
        )
    training: dict[str, tuple[str, ...]] = {}
    judged: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for domain, given in texts.items():
        distinct = list({normalise(text): text for text in given if text.strip()}.values())
        if held_out is None:
            if len(distinct) < 2:
                raise DataError(
                    f"domain {domain!r} has {count(len(distinct), 'distinct text')}: at least 2 "
                    "are needed, one to train on and one to judge by"
                )
            n_aside = min(len(distinct) - 1, max(1, round(share * len(distinct))))
            by_place = sorted(distinct, key=lambda text: position(text, 1))
            aside = by_place[:n_aside]
        else:
            aside = [text for text in held_out[domain] if text.strip()]
        documents = [piece for text in aside for piece in pieces(text)]
        documents = sample(documents, max_held_out, 0, key=lambda text: text)
        judged[domain] = tuple(documents)
        banned = {normalise(text) for text in aside}
        copied = {run for text in documents for run in runs(text, _COPIED_WORDS)}
        others = [text for text in distinct if normalise(text) not in banned]
        kept = [text for text in others if copied.isdisjoint(runs(text, _COPIED_WORDS))]
        if not kept:  # boilerplate in every text: then only whole copies are left out
            kept = others
        elif len(kept) < len(others):
            notes.append(
                f"{domain}: {count(len(others) - len(kept), 'text')} left out of training, with "
                f"{_COPIED_WORDS} words in a row from a held-out document."
            )
        training[domain] = tuple(_within(kept, max_characters))
    return DomainTexts(name, training, judged, tuple(notes))


def pieces(text: str, longest: int = _LONGEST) -> list[str]:
    r"""Cut a text at blank lines into pieces of at most `longest` characters.

    Paragraphs that are longer are cut where they are. What is shorter than 200 characters is left
    out, unless it is all there is.

    Examples
    --------
    >>> [len(piece) for piece in pieces(("x" * 299 + "\n\n") * 5, longest=700)]
    [600, 600, 299]
    """
    found: list[str] = []
    current = ""
    for paragraph in text.split("\n\n"):
        for start in range(0, max(len(paragraph), 1), longest):
            part = paragraph[start : start + longest]
            joined = f"{current}\n\n{part}" if current else part
            if len(joined) > longest:
                found.append(current)
                current = part
            else:
                current = joined
    found.append(current)
    long_enough = [piece for piece in found if len(piece.strip()) >= _SHORTEST]
    return long_enough or [piece for piece in found if piece.strip()][:1]


def _within(texts: Sequence[str], max_characters: int | None) -> Iterator[str]:
    """Yield texts in an order of their content until there are enough characters."""
    if max_characters is None:
        yield from texts
        return
    left = max_characters
    for text in sorted(texts, key=lambda text: position(text, 0)):
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def read_domains(
    sources: Sequence[str | Path],
    *,
    column: str | None = None,
    max_texts: int | None = None,
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Read the user's files, one domain each.

    Parameters
    ----------
    sources
        ``NAME=PATH``, or a path whose name without suffix names the domain. The same name may come
        several times. A path is a folder (its .py, .txt, .md and .rst files), a table (Parquet,
        JSON Lines, JSON, CSV, TSV; one text a row) or one file of text.
    column
        Of tables: which holds the text.
    max_texts
        Most texts of a domain, drawn by their content.

    Returns
    -------
    texts : dict of str to tuple of str
        By domain.
    notes : tuple of str
        What was left out.

    Raises
    ------
    DataError
        If nothing is given, a name is empty, or a file cannot be read.

    Examples
    --------
    >>> read_domains(["code=src", "docs=docs", "tickets=tickets.jsonl"])  # doctest: +SKIP
    """
    paths: dict[str, list[Path]] = {}
    for source in sources:
        name, path = _named(source)
        paths.setdefault(name, []).append(path)
    if not paths:
        raise DataError("give at least one domain, as NAME=PATH")
    texts: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for name, files in paths.items():
        found, said = read_code(files, suffixes=_TEXT_SUFFIXES, column=column, max_texts=max_texts)
        # A single file of text is one document to its reader, but more than one to be judged by.
        texts[name] = found if len(found) > 1 else tuple(pieces(found[0]))
        notes += [f"{name}: {sentence}" for sentence in said]
    return texts, tuple(notes)


def _named(source: str | Path) -> tuple[str, Path]:
    text = str(source)
    if "=" in text and not Path(text).exists():
        name, _, given = text.partition("=")
        if not name.strip() or not given.strip():
            raise DataError(f"a domain must be given as NAME=PATH, got {text!r}")
        return name.strip(), Path(given.strip())
    path = Path(text)
    return path.stem or path.resolve().name, path


def default_domains(size: Size = "demo") -> DomainTexts:
    """Return three real domains that any machine can have: Python, English and Bulgarian.

    Parameters
    ----------
    size
        ``"smoke"`` (60,000 characters of each and 8 documents), ``"demo"`` (at most 2 million and
        60) or ``"full"``.

    Returns
    -------
    DomainTexts
        ``"python"``: modules of the running Python's standard library. ``"english"``: encyclopedia
        articles and news. ``"bulgarian"``: discussions and articles, 0.2 million characters.

    Raises
    ------
    DataError
        If `size` is unknown, or the running Python has no source of its standard library.
    FetchError
        If the package with the texts is not in the cache and cannot be fetched.
    """
    from bakeoff.data.embedded import news_articles, standard_library_modules
    from bakeoff.data.encyclopedia import encyclopedia_pages

    if size not in _SIZES:
        raise DataError(f"size must be one of {', '.join(map(repr, _SIZES))}, got {size!r}")
    characters, documents = _SIZES[size]
    news = [f"{lead} {rest}" for lead, rest in news_articles()]
    texts = {
        "python": list(standard_library_modules().values()),
        "english": [*encyclopedia_pages("en"), *news],
        "bulgarian": list(encyclopedia_pages("bg")),
    }
    return split_domains(
        texts,
        name=f"Python, English and Bulgarian ({size})",
        max_held_out=documents,
        max_characters=characters,
    )
