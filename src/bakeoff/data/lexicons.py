"""Which words mean the same: synsets in many languages, pairs of them, and what is held out."""

from __future__ import annotations

import hashlib
import json
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.formats import PathLike, count, listed
from bakeoff.data.splits import normalise, position
from bakeoff.errors import DataError

Indices = NDArray[np.int64]
Cell = Literal["synsets", "languages", "both", "seen"]


@dataclass(frozen=True, eq=False)
class Constraints:
    """Words with the synset that each belongs to: words of one synset mean the same.

    Parameters
    ----------
    synsets, words, languages
        One entry each, n in all. A word may belong to several synsets.
    glosses
        A definition for each entry, ``""`` where there is none; or None.
    name
        For reports.
    notes
        What was left out.

    Raises
    ------
    DataError
        If lengths differ, there is no entry, or a word, synset or language is empty.

    Examples
    --------
    >>> names = Constraints(("DE", "DE", "FR"), ("Germany", "Allemagne", "France"),
    ...                     ("en", "fr", "en"))
    >>> len(names), names.all_languages, names.n_synsets
    (3, ('en', 'fr'), 2)
    """

    synsets: tuple[str, ...]
    words: tuple[str, ...]
    languages: tuple[str, ...]
    glosses: tuple[str, ...] | None = None
    name: str = "constraints"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = {"synsets": self.synsets, "words": self.words, "languages": self.languages}
        if self.glosses is not None:
            columns["glosses"] = self.glosses
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"columns of constraints differ in length: {lengths}")
        if not self.words:
            raise DataError("constraints must hold at least one entry, got none")
        for name in ("synsets", "words", "languages"):
            empty = [row for row, cell in enumerate(columns[name]) if not str(cell).strip()]
            if empty:
                raise DataError(
                    f"{name}: {count(len(empty), 'entry', 'entries')} empty, the first at rows "
                    f"{empty[:3]}"
                )

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, entries: Iterable[Sequence[str]], name: str = "constraints") -> Constraints:
        """Return constraints of rows ``(synset, word, language[, gloss])``.

        Raises
        ------
        DataError
            If rows have another number of cells, or differ in it.
        """
        rows = [tuple(str(cell) for cell in row) for row in entries]
        widths = {len(row) for row in rows}
        if not rows or len(widths) > 1 or not widths <= {3, 4}:
            raise DataError(
                "constraints must be rows (synset, word, language) or (synset, word, language, "
                f"gloss), got {count(len(rows), 'row')} of widths {sorted(widths)}"
            )
        columns = list(zip(*rows, strict=True))
        glosses = columns[3] if len(columns) == 4 else None
        return cls(columns[0], columns[1], columns[2], glosses, name)

    @cached_property
    def all_languages(self) -> tuple[str, ...]:
        """Languages, sorted."""
        return tuple(sorted(set(self.languages)))

    @cached_property
    def n_synsets(self) -> int:
        """Number of synsets."""
        return len(set(self.synsets))

    @cached_property
    def synset_codes(self) -> Indices:
        """Number of each entry's synset, ``(n,)`` int64: the same for every run on this data."""
        number = {synset: code for code, synset in enumerate(dict.fromkeys(self.synsets))}
        return np.array([number[synset] for synset in self.synsets], dtype=np.int64)

    @cached_property
    def language_codes(self) -> Indices:
        """Place of each entry's language in `all_languages`, ``(n,)`` int64."""
        number = {language: code for code, language in enumerate(self.all_languages)}
        return np.array([number[language] for language in self.languages], dtype=np.int64)

    def select(self, rows: Iterable[int] | NDArray[Any], *notes: str) -> Constraints:
        """Return the entries at these rows (indices, or a mask of length n).

        Raises
        ------
        DataError
            If nothing is left.
        """
        chosen = np.asarray(list(rows) if not isinstance(rows, np.ndarray) else rows)
        if chosen.dtype == np.bool_:
            chosen = np.flatnonzero(chosen)
        if not len(chosen):
            raise DataError(f"{self.name}: no entry is left" + "".join(f"; {n}" for n in notes))
        kept = chosen.tolist()
        return Constraints(
            tuple(self.synsets[row] for row in kept),
            tuple(self.words[row] for row in kept),
            tuple(self.languages[row] for row in kept),
            None if self.glosses is None else tuple(self.glosses[row] for row in kept),
            self.name,
            (*self.notes, *notes),
        )

    def only(self, languages: Collection[str]) -> Constraints:
        """Return the entries of some languages.

        Raises
        ------
        DataError
            If a language does not occur; names those that do.
        """
        _check_languages(languages, self.all_languages)
        wanted = set(languages)
        return self.select(np.array([language in wanted for language in self.languages]))

    def distinct(self) -> Constraints:
        """Return the entries without exact repetitions, the first of each kept."""
        glosses = self.glosses or ("",) * len(self)
        keys = zip(self.synsets, self.words, self.languages, glosses, strict=True)
        first: dict[tuple[str, ...], int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        if len(first) == len(self):
            return self
        left_out = len(self) - len(first)
        return self.select(
            list(first.values()),
            f"{count(left_out, 'repeated entry', 'repeated entries')} left out.",
        )

    def without_ambiguous(self, most: int = 1) -> Constraints:
        """Return the entries whose word has at most `most` synsets in its language.

        A word of several synsets comes into a batch under different labels: it is then told to be
        unlike itself.
        """
        if most < 1:
            raise DataError(f"most must be at least 1, got {most}")
        known: dict[tuple[str, str], set[str]] = defaultdict(set)
        for synset, word, language in zip(self.synsets, self.words, self.languages, strict=True):
            known[normalise(word), language].add(synset)
        kept = [
            len(known[normalise(word), language]) <= most
            for word, language in zip(self.words, self.languages, strict=True)
        ]
        n_left_out = count(kept.count(False), "entry", "entries")
        return self.select(
            np.array(kept), f"{n_left_out} with a word of more than {most} synsets left out."
        )

    def concepts(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Return the words by synset and language."""
        found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for synset, word, language in zip(self.synsets, self.words, self.languages, strict=True):
            found[synset][language].append(word)
        return {
            synset: {language: tuple(dict.fromkeys(words)) for language, words in by.items()}
            for synset, by in found.items()
        }

    def fingerprint(self) -> str:
        """Return a digest, in hexadecimal, of all entries in their order."""
        columns = [self.synsets, self.words, self.languages, self.glosses]
        return hashlib.sha256(json.dumps(columns).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, eq=False)
class WordPairs:
    """Pairs of words of one synset, as rows of `Constraints`.

    Parameters
    ----------
    constraints
        Where the words are.
    first, second
        ``(n,)`` int64 rows; both of a pair are of one synset.

    Raises
    ------
    DataError
        If lengths differ, a row is out of range, or a pair joins two synsets.
    """

    constraints: Constraints
    first: Indices
    second: Indices

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape or self.first.ndim != 1:
            raise DataError(
                f"first and second must be (n,), got {self.first.shape} and {self.second.shape}"
            )
        codes = self.constraints.synset_codes
        for name, rows in (("first", self.first), ("second", self.second)):
            if len(rows) and not 0 <= rows.min() <= rows.max() < len(codes):
                raise DataError(f"{name} must hold rows from 0 to {len(codes) - 1}")
        if (codes[self.first] != codes[self.second]).any():
            raise DataError("a pair joins words of two synsets")

    def __len__(self) -> int:
        return len(self.first)

    @property
    def labels(self) -> Indices:
        """Number of each pair's synset, ``(n,)`` int64."""
        return self.constraints.synset_codes[self.first]

    def language_pairs(self) -> list[tuple[str, str]]:
        """Return the two languages of each pair, sorted, since a pair has no direction."""
        languages = self.constraints.languages
        return [
            (a, b) if (a := languages[i]) <= (b := languages[j]) else (b, a)
            for i, j in zip(self.first.tolist(), self.second.tolist(), strict=True)
        ]

    def select(self, rows: NDArray[Any]) -> WordPairs:
        """Return the pairs at these rows (indices, or a mask of length n)."""
        return WordPairs(self.constraints, self.first[rows], self.second[rows])

    def without_words(self, words: Iterable[str]) -> WordPairs:
        """Return the pairs neither of whose words is among `words`, spelling as in `normalise`."""
        banned = {normalise(word) for word in words}
        fit = np.array([normalise(word) not in banned for word in self.constraints.words])
        return self.select(fit[self.first] & fit[self.second])

    def weights(self, alpha: float | None = 0.5) -> NDArray[np.float64]:
        """Return the probability with which each pair is to be drawn.

        Parameters
        ----------
        alpha
            With p the share of a pair's language pair, that language pair is drawn with a
            probability proportional to ``p ** alpha``: 1 changes nothing, 0 makes all language
            pairs equal. None (or -1, as in the paper's code) for no resampling.

        Returns
        -------
        float64 array
            ``(n,)``, sums to 1.

        Examples
        --------
        >>> words = Constraints.of([("1", "a", "en"), ("1", "b", "en"), ("1", "c", "en"),
        ...                         ("1", "d", "fr")])
        >>> pairs = WordPairs(words, np.array([0, 0, 1, 0]), np.array([1, 2, 2, 3]))
        >>> [round(float(w), 3) for w in pairs.weights(0.5)]  # 3 : 1 becomes sqrt(3) : 1
        [0.211, 0.211, 0.211, 0.366]
        """
        if not len(self):
            raise DataError("pairs is empty: there is nothing to draw from")
        if alpha is None or alpha == -1:
            return np.full(len(self), 1 / len(self))
        if not alpha >= 0:
            raise DataError(f"alpha must be at least 0, or None for no resampling, got {alpha}")
        one, other = (self.constraints.language_codes[rows] for rows in (self.first, self.second))
        n_languages = len(self.constraints.all_languages)
        pairs = np.minimum(one, other) * n_languages + np.maximum(one, other)
        _, kinds = np.unique(pairs, return_inverse=True)
        sizes = np.bincount(kinds)
        shares = (sizes / sizes.sum()) ** alpha
        weights: NDArray[np.float64] = (shares / shares.sum() / sizes)[kinds]
        return weights


def build_pairs(
    constraints: Constraints,
    *,
    max_per_language_pair: int | None = 1000,
    max_pairs: int | None = None,
    monolingual: bool = True,
    cross_lingual: bool = True,
    identical: bool = False,
    seed: int = 0,
) -> WordPairs:
    """Return pairs of words of one synset, at most so many per pair of languages.

    Parameters
    ----------
    constraints
        The words.
    max_per_language_pair
        Drawn without replacement where there are more; the paper's released set has 1,000.
    max_pairs
        A budget over all language pairs, drawn evenly from what the caps leave. The smaller of two
        budgets is part of the larger.
    monolingual, cross_lingual
        Which pairs of languages.
    identical
        Whether two words with the same letters (``"Angola"`` in two languages) make a pair. Their
        vectors are equal already: they dilute the loss.
    seed
        Determines the draw. What is drawn for two languages does not depend on the others, nor on
        the order of synsets.

    Raises
    ------
    DataError
        If no pair is left, or a cap is below 1.

    Examples
    --------
    >>> names = Constraints.of([("DE", "Germany", "en"), ("DE", "Allemagne", "fr"),
    ...                         ("AO", "Angola", "en"), ("AO", "Angola", "fr")])
    >>> pairs = build_pairs(names)
    >>> names.words[pairs.first[0]], names.words[pairs.second[0]], len(pairs)
    ('Germany', 'Allemagne', 1)
    """
    for name, cap in (("max_per_language_pair", max_per_language_pair), ("max_pairs", max_pairs)):
        if cap is not None and cap < 1:
            raise DataError(f"{name} must be at least 1, or None for no limit, got {cap}")
    ranks = {synset: rank for rank, synset in enumerate(sorted(set(constraints.synsets)))}
    codes = np.array([ranks[synset] for synset in constraints.synsets], dtype=np.int64)
    spelling: dict[str, int] = {}
    spellings = np.array([spelling.setdefault(word, len(spelling)) for word in constraints.words])
    languages = np.array(constraints.languages)
    rows_of: dict[str, Indices] = {}
    for language in constraints.all_languages:
        rows = np.flatnonzero(languages == language)
        rows_of[language] = rows[np.argsort(codes[rows], kind="stable")]
    firsts, seconds = [], []
    for place, one in enumerate(constraints.all_languages):
        for other in constraints.all_languages[place:]:
            if not (monolingual if one == other else cross_lingual):
                continue
            first, second = _joined(rows_of[one], rows_of[other], codes)
            fit = np.ones(len(first), dtype=np.bool_) if one != other else first < second
            if not identical:
                fit &= spellings[first] != spellings[second]
            first, second = first[fit], second[fit]
            if max_per_language_pair is not None and len(first) > max_per_language_pair:
                rng = np.random.default_rng([seed, zlib.crc32(f"{one}\t{other}".encode())])
                kept = np.sort(rng.permutation(len(first))[:max_per_language_pair])
                first, second = first[kept], second[kept]
            firsts.append(first)
            seconds.append(second)
    pairs = WordPairs(
        constraints,
        np.concatenate(firsts) if firsts else np.empty(0, np.int64),
        np.concatenate(seconds) if seconds else np.empty(0, np.int64),
    )
    if not len(pairs):
        raise DataError(
            f"{constraints.name}: no two different words of {len(constraints):,} entries share a "
            "synset in the languages asked for, so there is no pair to train on"
        )
    if max_pairs is not None and len(pairs) > max_pairs:
        kept = np.random.default_rng([seed, 1]).permutation(len(pairs))[:max_pairs]
        pairs = pairs.select(np.sort(kept))
    return pairs


def _joined(one: Indices, other: Indices, codes: Indices) -> tuple[Indices, Indices]:
    """Return all pairs of rows of one synset; both lists are sorted by synset."""
    low = np.searchsorted(codes[other], codes[one], side="left")
    high = np.searchsorted(codes[other], codes[one], side="right")
    sizes = high - low
    starts = np.repeat(low - (np.cumsum(sizes) - sizes), sizes)
    return np.repeat(one, sizes), other[starts + np.arange(sizes.sum())]


# Held out -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lexicon:
    """Source words with their translations, and the vocabulary these have to be found in.

    Parameters
    ----------
    source_language, target_language
        Names.
    source_words
        The n distinct questions.
    translations
        For each, the words that count as right.
    target_vocabulary
        All candidates, distinct; their order breaks ties.
    source_vocabulary
        Words of the source language; what CSLS compares candidates with, and, if not empty, the
        words that a source word must be among.
    overlaps
        For each source word, how much of a translation could be had by its letters alone, from 0
        to 1 (see `string_overlap`); or None.
    name
        For reports.

    Raises
    ------
    DataError
        If there is no source word, lengths differ, or a source word has no translation.
    """

    source_language: str
    target_language: str
    source_words: tuple[str, ...]
    translations: tuple[tuple[str, ...], ...]
    target_vocabulary: tuple[str, ...]
    source_vocabulary: tuple[str, ...] = ()
    overlaps: tuple[float, ...] | None = None
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if not self.source_words:
            raise DataError(f"lexicon {self.label}: no source word")
        if len(self.source_words) != len(self.translations) or (
            self.overlaps is not None and len(self.overlaps) != len(self.source_words)
        ):
            raise DataError(f"lexicon {self.label}: one entry per source word is needed")
        bare = [
            word
            for word, gold in zip(self.source_words, self.translations, strict=True)
            if not gold
        ]
        if bare:
            raise DataError(f"lexicon {self.label}: {listed(bare[:3])} without translation")

    def __len__(self) -> int:
        return len(self.source_words)

    @property
    def label(self) -> str:
        """What it is called: its name, or its languages."""
        return self.name or f"{self.source_language}-{self.target_language}"

    def words(self) -> set[str]:
        """Return source words and translations: what training must not see."""
        return {*self.source_words, *(word for gold in self.translations for word in gold)}

    def select(self, rows: Iterable[int] | NDArray[Any], name: str = "") -> Lexicon:
        """Return the questions at these rows (indices, or a mask), with the same vocabularies."""
        chosen = np.asarray(list(rows) if not isinstance(rows, np.ndarray) else rows)
        kept = (np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen).tolist()
        return Lexicon(
            self.source_language,
            self.target_language,
            tuple(self.source_words[row] for row in kept),
            tuple(self.translations[row] for row in kept),
            self.target_vocabulary,
            self.source_vocabulary,
            None if self.overlaps is None else tuple(self.overlaps[row] for row in kept),
            name=name or self.name,
        )

    def low_overlap(self, at_most: float = 0.5) -> Lexicon:
        """Return the questions whose answer cannot be had by comparing letters.

        Raises
        ------
        DataError
            If overlaps are not known, or no question is left.
        """
        if self.overlaps is None:
            raise DataError(f"lexicon {self.label}: overlaps are not known")
        rows = np.array(self.overlaps) <= at_most
        return self.select(rows, name=f"{self.label}, low overlap")

    def seen_in(self, constraints: Constraints) -> NDArray[np.bool_]:
        """Return, per question, whether its word or a translation of it occurs in training data.

        The same spelling in the same language counts, as `normalise` compares.
        """
        known = {
            (language, normalise(word))
            for language, word in zip(constraints.languages, constraints.words, strict=True)
        }
        return np.array(
            [
                (self.source_language, normalise(word)) in known
                or any((self.target_language, normalise(one)) in known for one in gold)
                for word, gold in zip(self.source_words, self.translations, strict=True)
            ]
        )


def lexicon(
    constraints: Constraints,
    source_language: str,
    target_language: str,
    *,
    synsets: Collection[str] | None = None,
    name: str = "",
) -> Lexicon:
    """Make a test lexicon of two languages' words in the same synsets.

    Parameters
    ----------
    constraints
        All words; the vocabularies are all of the two languages' words in it.
    source_language, target_language
        They must differ, or be the same for synonyms (then a word is no translation of itself, and
        stays a candidate of others).
    synsets
        Only questions of these synsets.
    name
        For reports.

    Raises
    ------
    DataError
        If a language does not occur, or no synset has words of both.

    Examples
    --------
    >>> names = Constraints.of([("DE", "Germany", "en"), ("DE", "Allemagne", "fr"),
    ...                         ("FR", "France", "fr")])
    >>> test = lexicon(names, "en", "fr")
    >>> test.source_words, test.translations, test.target_vocabulary
    (('Germany',), (('Allemagne',),), ('Allemagne', 'France'))
    """
    _check_languages((source_language, target_language), constraints.all_languages)
    wanted = None if synsets is None else set(synsets)
    gold: dict[str, dict[str, None]] = {}
    vocabularies: dict[str, dict[str, None]] = {source_language: {}, target_language: {}}
    for synset, by_language in constraints.concepts().items():
        for language, vocabulary in vocabularies.items():
            vocabulary.update(dict.fromkeys(by_language.get(language, ())))
        if wanted is not None and synset not in wanted:
            continue
        for word in by_language.get(source_language, ()):
            right = [
                other
                for other in by_language.get(target_language, ())
                if source_language != target_language or other != word
            ]
            if right:
                gold.setdefault(word, {}).update(dict.fromkeys(right))
    if not gold:
        raise DataError(
            f"no synset asked for has words of both {source_language!r} and {target_language!r}"
        )
    return Lexicon(
        source_language,
        target_language,
        tuple(gold),
        tuple(tuple(words) for words in gold.values()),
        tuple(vocabularies[target_language]),
        tuple(vocabularies[source_language]),
        name=name,
    )


def read_lexicon(
    path: PathLike,
    source_language: str,
    target_language: str,
    *,
    target_vocabulary: Sequence[str] | None = None,
    source_vocabulary: Sequence[str] = (),
) -> Lexicon:
    """Read a file of word pairs without header, two words a line, as MUSE and PanLex sets have it.

    Parameters
    ----------
    path
        UTF-8 text; the words are separated by a tab, or by a space where there is no tab.
    source_language, target_language
        Names.
    target_vocabulary, source_vocabulary
        See `Lexicon`. The file's own target words if None; ranks among so few are far better than
        among the usual 100,000 words, and not comparable.

    Raises
    ------
    DataError
        If the file cannot be read or a line has not two words; names it.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    gold: dict[str, dict[str, None]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split())]
        if len(cells) != 2 or not all(cells):
            raise DataError(f"{file}: line {number} has not two words: {line!r}")
        gold.setdefault(cells[0], {})[cells[1]] = None
    own = dict.fromkeys(word for words in gold.values() for word in words)
    return Lexicon(
        source_language,
        target_language,
        tuple(gold),
        tuple(tuple(words) for words in gold.values()),
        tuple(own if target_vocabulary is None else dict.fromkeys(target_vocabulary)),
        tuple(dict.fromkeys(source_vocabulary)),
        name=file.stem,
    )


@dataclass(frozen=True, eq=False)
class ConstraintSplit:
    """Training words, and three kinds of words that were held out.

    Parameters
    ----------
    whole
        Everything.
    train
        Seen synsets in seen languages, without words that a held-out synset has too.
    held_out_synsets, held_out_languages
        What training knows nothing of.
    notes
        What was left out.
    """

    whole: Constraints
    train: Constraints
    held_out_synsets: frozenset[str]
    held_out_languages: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def seen_languages(self) -> tuple[str, ...]:
        """Languages to train on."""
        return self.train.all_languages

    def cell(self, cell: Cell) -> Constraints:
        """Return the words of one cell: ``"synsets"``, ``"languages"``, ``"both"``, ``"seen"``."""
        new_synset, new_language = _cell_kind(cell)
        return self.whole.select(
            np.array(
                [
                    (synset in self.held_out_synsets) == new_synset
                    and (language in self.held_out_languages) == new_language
                    for synset, language in zip(
                        self.whole.synsets, self.whole.languages, strict=True
                    )
                ]
            )
        )

    def lexicon(self, cell: Cell, source_language: str, target_language: str) -> Lexicon:
        """Return the test of one cell, with each question's `overlaps`.

        Parameters
        ----------
        cell
            ``"synsets"``: held-out synsets, both languages seen. ``"languages"``: synsets that
            training has, one of the languages held out. ``"both"``. ``"seen"``: what was trained
            on.
        source_language, target_language
            Names.

        Returns
        -------
        Lexicon
            Candidates are all words of the target language, of seen and of held-out synsets. The
            overlap of a question is the largest likeness of letters between a translation and the
            source word or any training word of the same synset.

            A model that reads letters does not know languages apart: a question whose word and
            one of whose translations are both spelled like training words of the synset (English
            to Dutch *Poland*, *Polen*, after German *Polen*) is no unseen one and is left out, but
            for ``"seen"``. Case and diacritics make no difference.

        Raises
        ------
        DataError
            If the languages do not fit the cell, or there is no question (left).
        """
        new_synset, new_language = _cell_kind(cell)
        held = {source_language, target_language} & set(self.held_out_languages)
        if bool(held) != new_language:
            raise DataError(
                f"cell {cell!r} needs {'one of the languages' if new_language else 'no language'} "
                f"held out, got {source_language!r} and {target_language!r}; held out are "
                f"{listed(self.held_out_languages) or 'none'}"
            )
        synsets = self.held_out_synsets if new_synset else frozenset(self.train.synsets)
        found = lexicon(
            self.whole,
            source_language,
            target_language,
            synsets=synsets,
            name=f"{source_language}-{target_language} ({cell})",
        )
        trained: dict[str, set[str]] = defaultdict(set)
        for synset, word in zip(self.train.synsets, self.train.words, strict=True):
            trained[synset].add(word)
        synsets_of: dict[str, set[str]] = defaultdict(set)
        for synset, word, language in zip(
            self.whole.synsets, self.whole.words, self.whole.languages, strict=True
        ):
            if language == source_language and synset in synsets:
                synsets_of[word].add(synset)
        rows, overlaps = [], []
        for row, (word, gold) in enumerate(
            zip(found.source_words, found.translations, strict=True)
        ):
            known = set[str]().union(*(trained[synset] for synset in synsets_of[word]))
            spelled = {_letters(one) for one in known}
            trained_on = _letters(word) in spelled and any(_letters(one) in spelled for one in gold)
            if cell == "seen" or not trained_on:
                rows.append(row)
                overlaps.append(max(string_overlap(one, {word, *known}) for one in gold))
        if not rows:
            raise DataError(f"{found.name}: training has all questions with an answer, by letters")
        return replace(found.select(rows), overlaps=tuple(overlaps))


def split_constraints(
    constraints: Constraints,
    *,
    held_out_languages: Collection[str] = (),
    fraction: float = 0.1,
    max_synsets: int | None = None,
    seed: int = 0,
) -> ConstraintSplit:
    """Hold out some synsets, some languages, and so both at once.

    Parameters
    ----------
    constraints
        Everything.
    held_out_languages
        Languages that training does not see.
    fraction
        Part of the synsets to hold out, in [0, 1), chosen by a hash of their names.
    max_synsets
        At most this many.
    seed
        Another seed holds out other synsets.

    Returns
    -------
    ConstraintSplit
        A word that a held-out synset shares with a seen one (``"Arabic"`` is a language and a
        script) is not trained on, in any language: the note counts such words.

    Raises
    ------
    DataError
        If a language does not occur, or nothing is left to train on.

    Examples
    --------
    >>> from bakeoff.data.lexicon_sources import cldr_names
    >>> names = cldr_names(["de", "en", "fr", "fi"], ["territories"])
    >>> split = split_constraints(names, held_out_languages=["fi"], fraction=0.25)
    >>> split.seen_languages, len(split.lexicon("both", "en", "fi")) > 50
    (('de', 'en', 'fr'), True)
    """
    if not 0 <= fraction < 1:
        raise DataError(f"fraction must be in [0, 1), got {fraction}")
    if held_out_languages:
        _check_languages(held_out_languages, constraints.all_languages)
    hidden = set(held_out_languages)
    synsets = sorted(set(constraints.synsets), key=lambda synset: (position(synset, seed), synset))
    n_held = round(fraction * len(synsets))
    if max_synsets is not None:
        n_held = min(n_held, max_synsets)
    held = frozenset(synsets[:n_held])
    rows = list(zip(constraints.synsets, constraints.words, constraints.languages, strict=True))
    spelled = [normalise(word) for word in constraints.words]
    banned = {word for word, (synset, _, _) in zip(spelled, rows, strict=True) if synset in held}
    seen = [synset not in held and language not in hidden for synset, _, language in rows]
    kept = [fit and word not in banned for fit, word in zip(seen, spelled, strict=True)]
    n_shared = sum(seen) - sum(kept)
    notes = [
        f"{count(n_held, 'synset')} of {len(synsets):,} and "
        f"{count(len(hidden), 'language')} of {len(constraints.all_languages)} held out."
    ]
    if n_shared:
        notes.append(
            f"{count(n_shared, 'training entry', 'training entries')} left out that a held-out "
            "synset has too."
        )
    return ConstraintSplit(
        constraints,
        constraints.select(np.array(kept), *notes),
        held,
        tuple(sorted(hidden)),
        tuple(notes),
    )


def string_overlap(word: str, others: Iterable[str]) -> float:
    """Return how alike a word is to the most similar of others by letters, from 0 to 1.

    One minus the edit distance over the longer length, without case and diacritics.

    Examples
    --------
    >>> string_overlap("Türkei", ["Turkey", "Turquie"])
    0.8333333333333334
    >>> string_overlap("Россия", ["Russia"])
    0.0
    """
    own = _letters(word)
    best = 0.0
    for other in others:
        letters = _letters(other)
        longest = max(len(own), len(letters))
        if not longest:
            continue
        # No likeness above that of lengths: most pairs need no table.
        if min(len(own), len(letters)) / longest > best:
            best = max(best, 1 - _edit_distance(own, letters) / longest)
    return best


def _letters(word: str) -> str:
    parts = unicodedata.normalize("NFD", normalise(word))
    return "".join(letter for letter in parts if not unicodedata.combining(letter))


def _edit_distance(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, letter_there in enumerate(other, start=1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != letter_there)),
            )
    return row[-1]


def _cell_kind(cell: str) -> tuple[bool, bool]:
    kinds = {
        "synsets": (True, False),
        "languages": (False, True),
        "both": (True, True),
        "seen": (False, False),
    }
    if cell not in kinds:
        raise DataError(f"cell must be one of {listed(kinds)}, got {cell!r}")
    return kinds[cell]


def _check_languages(given: Collection[str], known: Sequence[str]) -> None:
    if isinstance(given, str):
        raise DataError(f"languages must be several names, got the text {given!r}")
    unknown = [language for language in given if language not in known]
    if unknown or not given:
        raise DataError(
            f"languages: {listed(unknown) or 'none'} not in the constraints, which have "
            f"{listed(known[:20])}{' ...' if len(known) > 20 else ''}"
        )


def language_counts(constraints: Constraints) -> dict[str, int]:
    """Return the number of entries of each language, the largest first."""
    return dict(Counter(constraints.languages).most_common())
