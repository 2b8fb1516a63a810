"""Texts of several domains: to train language models on, and documents to judge them by."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
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
_COPIED = 12
# Unless more texts than these, and than this share of them, hold it: a licence, say, or a footer.
_BOILERPLATE = (5, 0.1)


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
        Documents by domain, of the same domains.
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

    Training texts that share twelve words in a row with a held-out document, of any domain, are
    left out. Where that would take more than half of a domain, words that many of its texts share,
    such as a licence at the top of every file, do not count; where it would still take all, only
    whole copies are left out. The notes say so.

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
    distinct = {
        domain: list({normalise(text): text for text in given if text.strip()}.values())
        for domain, given in texts.items()
    }
    aside = {
        domain: _aside(domain, distinct[domain], share)
        if held_out is None
        else [text for text in held_out[domain] if text.strip()]
        for domain in texts
    }
    judged: dict[str, tuple[str, ...]] = {}
    for domain, chosen in aside.items():
        documents = [piece for text in chosen for piece in pieces(text)]
        judged[domain] = tuple(sample(documents, max_held_out, 0, key=lambda text: text))
    # Of all domains: what one domain is judged by, another may hold too.
    banned = {normalise(text) for chosen in aside.values() for text in chosen}
    copied = {
        run for documents in judged.values() for text in documents for run in runs(text, _COPIED)
    }
    training: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for domain in texts:
        own = {normalise(text) for text in aside[domain]}
        others = [text for text in distinct[domain] if normalise(text) not in own]
        kept, said = _without_copies(others, banned, copied)
        training[domain] = tuple(_within(kept, max_characters))
        notes += [f"{domain}: {sentence}" for sentence in said]
    return DomainTexts(name, training, judged, tuple(notes))


def _aside(domain: str, distinct: Sequence[str], share: float) -> list[str]:
    """Return the texts to hold out of a domain, at least one and not all."""
    if len(distinct) < 2:
        raise DataError(
            f"domain {domain!r} has {count(len(distinct), 'distinct text')}: at least 2 are "
            "needed, one to train on and one to judge by"
        )
    n_aside = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    return sorted(distinct, key=lambda text: position(text, 1))[:n_aside]


def _without_copies(
    texts: Sequence[str], banned: set[str], copied: set[tuple[str, ...]]
) -> tuple[list[str], list[str]]:
    """Return the texts that hold nothing of a held-out document, and what to tell the reader.

    If less than half of them would be left, words that many of them share do not count.
    """
    shared = [copied & runs(text, _COPIED) for text in texts]
    whole = [normalise(text) in banned for text in texts]

    def without(allowed: set[tuple[str, ...]]) -> list[str]:
        found = zip(texts, shared, whole, strict=True)
        return [text for text, copy, is_whole in found if copy <= allowed and not is_whole]

    kept = without(set())
    why = f"{_COPIED} words in a row from a held-out document"
    if len(kept) < len(texts) / 2:
        holders = Counter(run for found in shared for run in found)
        least, part = _BOILERPLATE
        most = max(least, part * len(texts))
        kept = without({run for run, n in holders.items() if n > most})
        why += " (words that many texts share were not counted)"
    if not kept:  # rather than nothing
        return without(copied), [f"every text has {why}; only whole copies were left out."]
    n_out = len(texts) - len(kept)
    return kept, [f"{count(n_out, 'text')} left out of training, with {why}."] if n_out else []


def pieces(text: str, longest: int = _LONGEST) -> list[str]:
    r"""Cut a text at blank lines into pieces of at most `longest` characters.

    Paragraphs that are longer are cut where they are. What is shorter than 200 characters is left
    out, unless it is all there is.

    Examples
    --------
    >>> [len(piece) for piece in pieces("\n\n".join(["x" * 299] * 5), longest=700)]
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
        ``NAME=PATH``, or a path: then the folder's name, or the file's without suffix, is the
        domain's. The same name may come several times. A path is a folder (its .py, .txt, .md and
        .rst files), a table (Parquet, JSON Lines, JSON, CSV, TSV; one text a row) or one file of
        text.
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
        return name.strip(), Path(given.strip()).expanduser()
    path = Path(text).expanduser()
    return path.resolve().name if path.is_dir() else path.stem, path


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
