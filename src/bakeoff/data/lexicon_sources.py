"""Where constraints come from: the user's files, CLDR's names, WordNet and FreeDict."""

from __future__ import annotations

import contextlib
import gzip
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bakeoff.data.formats import PathLike, Row, count, iterate_rows, listed
from bakeoff.data.lexicons import Constraints, Indices, WordPairs
from bakeoff.errors import DataError

Kind = Literal["territories", "languages", "scripts", "currencies", "units", "months", "days"]

CLDR_KINDS: tuple[Kind, ...] = (
    "territories",
    "languages",
    "scripts",
    "currencies",
    "units",
    "months",
    "days",
)

# Column names that files use, the first one found counts.
_SYNSET = ("synset", "synset_id", "synsetID", "synsetid", "concept", "code", "id")
_WORD = ("word", "lemma", "term", "name", "form")
_LANGUAGE = ("language", "lang", "lang_code", "language_code")
_GLOSS = ("gloss", "definition", "sent", "sentence")

# Files --------------------------------------------------------------------------------------------


def read_constraints(
    path: PathLike,
    *,
    synset_column: str | None = None,
    word_column: str | None = None,
    language_column: str | None = None,
    gloss_column: str | None = None,
    language: str | None = None,
    skip_empty: bool = False,
) -> Constraints:
    r"""Read words with their synsets, one a row, or pairs of synonyms, one pair a row.

    Parameters
    ----------
    path
        A table: see `bakeoff.data.read_table`. Either with columns synset, word, language (and
        gloss), or with columns synset (optional), word1, lang1, word2, lang2 (and gloss1, gloss2).
        `read_pairs` keeps such pairs as they are.
    synset_column, word_column, language_column, gloss_column
        Their names, if they are not usual ones. For pairs without the 1 and 2.
    language
        The language of all words, for a file without that column.
    skip_empty
        Whether to leave out, with a note, rows with an empty cell instead of refusing the file.

    Returns
    -------
    Constraints
        Distinct entries. In pairs without synset, all that the same first word is paired with
        makes one synset with it.

    Raises
    ------
    DataError
        If a column is missing (lists those there are), or cells are empty: counts them and names
        the first three.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "names.tsv"
    >>> _ = path.write_text("synset\tword\tlang\nDE\tGermany\ten\nDE\tAllemagne\tfr\n")
    >>> read_constraints(path).words
    ('Germany', 'Allemagne')
    """
    names = (synset_column, word_column, language_column, gloss_column)
    read = _read_rows(Path(path).expanduser(), names, language, skip_empty)
    return read[0].distinct()


def read_pairs(
    path: PathLike,
    *,
    synset_column: str | None = None,
    word_column: str | None = None,
    language_column: str | None = None,
    gloss_column: str | None = None,
    language: str | None = None,
    skip_empty: bool = False,
) -> WordPairs:
    """Read pairs of synonyms as they stand in a file, repeated ones too.

    Parameters
    ----------
    path, synset_column, word_column, language_column, gloss_column, language, skip_empty
        As for `read_constraints`, for a file of pairs.

    Raises
    ------
    DataError
        As `read_constraints`; also if the file has one word a row.
    """
    names = (synset_column, word_column, language_column, gloss_column)
    constraints, firsts, seconds = _read_rows(Path(path).expanduser(), names, language, skip_empty)
    if firsts is None or seconds is None:
        raise DataError(f"{path}: has one word a row, not pairs: use read_constraints")
    return WordPairs(constraints, firsts, seconds)


def _read_rows(
    path: Path,
    names: tuple[str | None, str | None, str | None, str | None],
    language: str | None,
    skip_empty: bool,
) -> tuple[Constraints, Indices | None, Indices | None]:
    rows = iterate_rows(path)
    head = list(islice(rows, 1))
    if not head:
        raise DataError(f"{path}: has no row")
    columns = list(head[0].values)
    paired = _column(columns, names[1], _WORD, suffix="1") is not None
    suffixes = ("1", "2") if paired else ("",)
    synset = _column(columns, names[0], _SYNSET)
    if synset is None and not paired:
        raise DataError(_missing(path, "synset", names[0], _SYNSET, columns))
    sides = []
    for suffix in suffixes:
        word = _column(columns, names[1], _WORD, suffix)
        spoken = _column(columns, names[2], _LANGUAGE, suffix)
        if word is None:
            raise DataError(_missing(path, "word" + suffix, names[1], _WORD, columns, suffix))
        if spoken is None and (language is None or names[2] is not None):
            raise DataError(
                _missing(path, "language" + suffix, names[2], _LANGUAGE, columns, suffix)
            )
        gloss = _column(columns, names[3], _GLOSS, suffix)
        if gloss is None and names[3] is not None:
            raise DataError(_missing(path, "gloss" + suffix, names[3], _GLOSS, columns, suffix))
        sides.append((word, spoken, gloss))
    entries: dict[tuple[str, str, str, str], int] = {}
    pairs: list[tuple[int, int]] = []
    empty: list[str] = []
    for row in chain(head, rows):
        found = []
        for word, spoken, gloss in sides:
            cells = (
                _cell(row, word),
                language or "" if spoken is None else _cell(row, spoken),
                "" if gloss is None else _cell(row, gloss),
            )
            found.append(cells)
        label = _cell(row, synset) if synset is not None else f"{found[0][1]}:{found[0][0]}"
        if not label or any(not word or not spoken for word, spoken, _ in found):
            empty.append(row.place)
            continue
        places = [entries.setdefault((label, *cells), len(entries)) for cells in found]
        if paired:
            pairs.append((places[0], places[1]))
    if empty and (not skip_empty or not entries):
        raise DataError(
            f"{path}: {count(len(empty), 'row')} with an empty synset, word or language, the first "
            f"at {', '.join(empty[:3])}"
        )
    taken = {"synset": synset, "word": sides[0][0], "language": sides[0][1], "gloss": sides[0][2]}
    columns_taken = ", ".join(
        f"{role} from column {name!r}" for role, name in taken.items() if name
    )
    notes: tuple[str, ...] = (f"{path.name}: {columns_taken}.",)
    if empty:
        notes += (f"{count(len(empty), 'row')} with an empty cell left out.",)
    synsets, words, languages, glosses = zip(*entries, strict=True)
    constraints = Constraints(
        synsets, words, languages, glosses if any(glosses) else None, path.name, notes
    )
    if not paired:
        return constraints, None, None
    array = np.array(pairs, dtype=np.int64)
    return constraints, array[:, 0], array[:, 1]


def constraints_of_columns(columns: Mapping[str, Sequence[Any]]) -> Constraints:
    """Return the constraints in columns synset, word, language (and gloss), by their usual names.

    Raises
    ------
    DataError
        If a column is missing (lists those there are), or a cell is empty or NaN.

    Examples
    --------
    >>> constraints_of_columns({"synset_id": [1], "word": ["dog"], "lang": ["en"]}).words
    ('dog',)
    """
    chosen = []
    for what, usual in (("synset", _SYNSET), ("word", _WORD), ("language", _LANGUAGE)):
        name = _column(list(columns), None, usual)
        if name is None:
            raise DataError(_missing(Path("constraints"), what, None, usual, list(columns)))
        chosen.append(tuple(map(_text, columns[name])))
    gloss = _column(list(columns), None, _GLOSS)
    glosses = None
    if gloss is not None:
        glosses = tuple(map(_text, columns[gloss]))
    return Constraints(chosen[0], chosen[1], chosen[2], glosses)


def hold_pairs(columns: Sequence[str]) -> bool:
    """Say whether columns of these names hold pairs of words, not one word a row.

    Examples
    --------
    >>> hold_pairs(["synset", "word1", "lang1", "word2", "lang2"]), hold_pairs(["synset", "word"])
    (True, False)
    """
    return _column(columns, None, _WORD, suffix="1") is not None


def pairs_of_columns(columns: Mapping[str, Sequence[Any]]) -> WordPairs:
    """Return the pairs in columns synset, word1, language1, word2, language2 (and gloss1, gloss2).

    Columns have the usual names, and pairs stay as they stand, repeated ones too.

    Raises
    ------
    DataError
        As `constraints_of_columns`.

    Examples
    --------
    >>> pairs = pairs_of_columns({"synset": [1], "word1": ["dog"], "lang1": ["en"],
    ...                           "word2": ["chien"], "lang2": ["fr"]})
    >>> pairs.constraints.words, pairs.language_pairs()
    (('dog', 'chien'), [('en', 'fr')])
    """
    names = list(columns)
    synset = _column(names, None, _SYNSET)
    if synset is None:
        raise DataError(_missing(Path("constraints"), "synset", None, _SYNSET, names))
    n_pairs = len(columns[synset])
    labels = [_text(cell) for cell in columns[synset]]
    sides: list[list[tuple[str, ...]]] = []
    for side in ("1", "2"):
        cells: list[list[str]] = []
        for what, usual in (("word", _WORD), ("language", _LANGUAGE), ("gloss", _GLOSS)):
            name = _column(names, None, usual, side)
            if name is None and what != "gloss":
                raise DataError(
                    _missing(Path("constraints"), what + side, None, usual, names, side)
                )
            found = [""] * n_pairs if name is None else [_text(cell) for cell in columns[name]]
            if what != "gloss" and (bare := [row for row, cell in enumerate(found) if not cell]):
                raise DataError(
                    f"{name}: {count(len(bare), 'entry', 'entries')} empty, the first at rows "
                    f"{bare[:3]}"
                )
            cells.append(found)
        sides.append(list(zip(labels, *cells, strict=True)))
    entries: dict[tuple[str, ...], int] = {}
    for pair in zip(*sides, strict=True):
        for key in pair:
            entries.setdefault(key, len(entries))
    if not entries:
        raise DataError("constraints must hold at least one pair, got none")
    synsets, words, languages, glosses = zip(*entries, strict=True)
    constraints = Constraints(synsets, words, languages, glosses if any(glosses) else None)
    first, second = (np.array([entries[key] for key in side], dtype=np.int64) for side in sides)
    return WordPairs(constraints, first, second)


def _cell(row: Row, column: str) -> str:
    return _text(row.values.get(column))


def _text(value: object) -> str:
    """Return a cell as text; what tables hold where there is nothing (None, NaN) is empty."""
    return "" if value is None or value != value else str(value).strip()


def _column(
    columns: Sequence[str], given: str | None, usual: Sequence[str], suffix: str = ""
) -> str | None:
    names = [given + suffix] if given is not None else [name + suffix for name in usual]
    lower = {column.lower(): column for column in columns}
    for name in names:
        if name in columns:
            return name
        if given is None and name.lower() in lower:
            return lower[name.lower()]
    return None


def _missing(
    path: Path,
    what: str,
    given: str | None,
    usual: Sequence[str],
    columns: Sequence[str],
    suffix: str = "",
) -> str:
    wanted = [given + suffix] if given is not None else [name + suffix for name in usual]
    role = what.removesuffix("1").removesuffix("2")
    return (
        f"{path}: no column for the {what}: looked for {listed(wanted)}, the file has "
        f"{listed(columns)}. Name yours with {role}_column=..., or --column {role}=NAME on the "
        "command line"
    )


# CLDR ---------------------------------------------------------------------------------------------


def cldr_names(
    languages: Collection[str] | None = None,
    kinds: Sequence[Kind] = CLDR_KINDS,
    *,
    min_names: int = 200,
) -> Constraints:
    """Return names of countries, languages, scripts, currencies, units, months and days.

    They come from the Unicode locale data in the package `babel`; a synset is a kind and a code,
    for example ``"territory:DE"``.

    Parameters
    ----------
    languages
        Locales, for example ``"de"`` or ``"zh_Hant"``. All locales that name neither a territory
        nor a script if None.
    kinds
        Which names.
    min_names
        With ``languages=None``, a language with fewer names is left out.

    Returns
    -------
    Constraints
        Names that a locale only inherits from the root (codes and symbols) are left out, and
        so are locales whose names all equal those of a locale before them (Norwegian Bokmål is
        there as ``nb`` and as ``no``): as a language held out, such a copy would be no unseen one.

    Raises
    ------
    DataError
        If a kind is unknown, or the data have no such locale.

    Notes
    -----
    Each locale is read from `babel` afresh. Its dictionaries resolve aliases on first use and keep
    the result in parts that all locales share, so that month names depend on which locale was asked
    first (babel 2.18: after ``Locale("jgo").months``, Japanese months are in Ngomba).

    Examples
    --------
    >>> names = cldr_names(["de", "fr"], ["territories", "months"])
    >>> names.concepts()["territory:DE"]
    {'de': ('Deutschland',), 'fr': ('Allemagne',)}
    """
    from babel import localedata

    unknown = [kind for kind in kinds if kind not in CLDR_KINDS]
    if unknown or not kinds:
        raise DataError(f"kinds must be among {listed(CLDR_KINDS)}, got {list(kinds)}")
    known = set(localedata.locale_identifiers())
    if languages is None:
        chosen = sorted(name for name in known if "_" not in name)
    else:
        chosen = list(dict.fromkeys(languages))
        missing = [name for name in chosen if name not in known]
        if missing or not chosen:
            raise DataError(
                f"languages must be locales of CLDR such as 'de' or 'zh_Hant', got "
                f"{listed(missing) or 'none'}"
            )
    root = _cldr_of("root", kinds)
    synsets: list[str] = []
    words: list[str] = []
    spoken: list[str] = []
    seen: dict[frozenset[tuple[str, str]], str] = {}
    copies: list[str] = []
    n_small = 0
    for language in chosen:
        names = {
            synset: name
            for synset, name in _cldr_of(language, kinds).items()
            if name and root.get(synset) != name and synset.split(":", 1)[1] != name
        }
        if languages is None and len(names) < min_names:
            n_small += 1
            continue
        original = seen.setdefault(frozenset(names.items()), language)
        if original != language:
            copies.append(f"{language} (as {original})")
            continue
        synsets += names
        words += names.values()
        spoken += [language] * len(names)
    notes = []
    if copies:
        notes.append(f"Locales that repeat another: {', '.join(copies)}.")
    if n_small:
        notes.append(f"{count(n_small, 'locale')} with fewer than {min_names} names left out.")
    if not words:
        raise DataError(f"no name is left of {count(len(chosen), 'locale')}")
    return Constraints(tuple(synsets), tuple(words), tuple(spoken), None, "CLDR", tuple(notes))


def _cldr_of(language: str, kinds: Sequence[Kind]) -> dict[str, str]:
    """Return the names in one locale by synset."""
    from babel import localedata

    with _fresh_locale_data():
        raw: Any = localedata.load(language)
    data = localedata.LocaleDataDict(raw)
    tables: dict[Kind, Callable[[], Mapping[Any, Any]]] = {
        "territories": lambda: data["territories"],
        "languages": lambda: data["languages"],
        "scripts": lambda: data["scripts"],
        "currencies": lambda: data["currency_names"],
        "units": lambda: {
            unit: forms["long"]
            for unit, forms in data["unit_display_names"].items()
            if "long" in forms
        },
        "months": lambda: data["months"]["stand-alone"]["wide"],
        "days": lambda: data["days"]["stand-alone"]["wide"],
    }
    singular = dict(
        zip(
            CLDR_KINDS,
            ("territory", "language", "script", "currency", "unit", "month", "day"),
            strict=True,
        )
    )
    found: dict[str, str] = {}
    for kind in kinds:
        try:
            table = tables[kind]()
        except KeyError:  # not every locale has every table
            continue
        for code in table:
            name = table[code]
            if isinstance(name, str) and any(letter.isalpha() for letter in name):
                found[f"{singular[kind]}:{code}"] = " ".join(name.split())
    return found


@contextlib.contextmanager
def _fresh_locale_data() -> Iterator[None]:
    """Let babel read its files anew, and put its own memory back afterwards."""
    from babel import localedata

    cache: dict[str, Any] | None = getattr(localedata, "_cache", None)
    lock = getattr(localedata, "_cache_lock", None)
    if cache is None or lock is None:  # another version of babel: then its own memory has to do
        yield
        return
    with lock:
        kept = dict(cache)
        cache.clear()
        try:
            yield
        finally:
            cache.clear()
            cache.update(kept)


# WordNet ------------------------------------------------------------------------------------------

_WORDNET_PARTS = ("noun", "verb", "adj", "adv")


def wordnet_folder(folder: PathLike | None = None) -> Path:
    """Return a folder with WordNet's database files: the one given, or where Debian puts it.

    Raises
    ------
    DataError
        If it has no ``data.noun``; says how to get it.
    """
    path = Path("/usr/share/wordnet" if folder is None else folder).expanduser()
    if not (path / "data.noun").is_file():
        raise DataError(
            f"{path}: no WordNet database (a folder with data.noun, data.verb, data.adj and "
            "data.adv): install Debian's wordnet-base, or unpack a WNdb archive and give its "
            "folder dict"
        )
    return path


def wordnet(
    folder: PathLike | None = None,
    *,
    parts: Sequence[str] = _WORDNET_PARTS,
    language: str = "en",
    max_words: int | None = None,
) -> Constraints:
    """Read the synsets of a WordNet database (format wndb(5WN)) with their glosses.

    Parameters
    ----------
    folder
        Holds ``data.noun`` and so on; where Debian's package wordnet-base puts them if None.
    parts
        Parts of speech: ``"noun"``, ``"verb"``, ``"adj"``, ``"adv"``.
    language
        What language the words are said to be in. The name of WordNets in other languages, if they
        come in this format.
    max_words
        A lemma of more words than this is left out.

    Returns
    -------
    Constraints
        Lemmas with spaces for underscores and without the markers of adjectives; synsets are
        named ``"wn:00001740-n"``.

    Raises
    ------
    DataError
        If a file is missing or a line is not in that format; names the line.

    References
    ----------
    George A. Miller. "WordNet: a lexical database for English". Communications of the ACM 38(11),
    1995.

    Examples
    --------
    >>> wordnet("PATH/dict", parts=["noun"]).words[:2]  # doctest: +SKIP
    ('entity', 'physical entity')
    """
    unknown = [part for part in parts if part not in _WORDNET_PARTS]
    if unknown or not parts:
        raise DataError(f"parts must be among {listed(_WORDNET_PARTS)}, got {list(parts)}")
    if max_words is not None and max_words < 1:
        raise DataError(f"max_words must be at least 1, got {max_words}")
    root = wordnet_folder(folder)
    synsets: list[str] = []
    words: list[str] = []
    glosses: list[str] = []
    for part in parts:
        path = root / f"data.{part}"
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        with open(path, encoding="utf-8", errors="strict") as stream:
            for number, line in enumerate(stream, start=1):
                if line.startswith("  ") or not line.strip():  # the licence
                    continue
                name, lemmas, gloss = _wordnet_line(path, number, line)
                for lemma in lemmas:
                    if max_words is None or len(lemma.split()) <= max_words:
                        synsets.append(name)
                        words.append(lemma)
                        glosses.append(gloss)
    if not words:
        raise DataError(f"{root}: no lemma is left")
    return Constraints(
        tuple(synsets), tuple(words), (language,) * len(words), tuple(glosses), "WordNet"
    ).distinct()


def _wordnet_line(path: Path, number: int, line: str) -> tuple[str, list[str], str]:
    data, _, gloss = line.partition("|")
    fields = data.split()
    try:
        offset, kind, n_words = fields[0], fields[2], int(fields[3], 16)
        lemmas = fields[4 : 4 + 2 * n_words : 2]
        if len(lemmas) != n_words or not offset.isdigit() or kind not in set("nvasr"):
            raise ValueError
    except (IndexError, ValueError):
        raise DataError(
            f"{path}: line {number} is not in the format wndb(5WN): {line[:60]!r}"
        ) from None
    cleaned = [re.sub(r"\((?:a|p|ip)\)$", "", lemma).replace("_", " ") for lemma in lemmas]
    return f"wn:{offset}-{kind}", cleaned, " ".join(gloss.split())


# FreeDict -----------------------------------------------------------------------------------------

_BASE64 = {
    letter: value
    for value, letter in enumerate(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    )
}
# A pronunciation between slashes; a slash between two spaces is part of the text.
_PRONUNCIATION = re.compile(r"(?:(?<=\s)|^)/(?=\S)[^/\n]*(?<=\S)/(?=[\s,;]|$)")
_REMARK = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\{[^{}]*\}")
_BRACKET = re.compile(r"\([^()]*\)")
_SENSE = re.compile(r"^\s*\d+\.\s*")
_MARKUP = frozenset("()[]{}<>|=/\\~")
_NOT_TRANSLATIONS = ("see:", "synonym", "antonym", "note:", '"', "'", "->", "see also")


def freedict(
    path: PathLike,
    *,
    languages: tuple[str, str] | None = None,
    max_words: int = 3,
    max_entries: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Constraints:
    """Read a bilingual dictionary of FreeDict in dictd's format: each sense becomes a synset.

    Parameters
    ----------
    path
        The ``.dict.dz`` (or ``.dict``) or the ``.index`` file, which lie side by side, for example
        ``/usr/share/dictd/freedict-deu-eng.index`` of Debian's dict-freedict-deu-eng.
    languages
        Of headwords and translations. Read from the file's name (``freedict-deu-eng``, shortened to
        ``"de"`` and ``"en"`` where there is a code of two letters) if None.
    max_words
        A headword or translation of more words is left out: it is an explanation.
    max_entries
        Stop after this many entries of the index.
    progress
        Called with (entries done, entries in all).

    Returns
    -------
    Constraints
        Headwords and translations of each sense that has at least one of either.

    Raises
    ------
    DataError
        If a file is missing or damaged, or the name tells no languages.

    Notes
    -----
    The format is made for people to read. Pronunciations, grammar, labels, examples, cross
    references and remarks in brackets are told by their marks and left out; where a dictionary puts
    a remark into the text without any mark, it stays.

    Examples
    --------
    >>> freedict("PATH/freedict-swe-eng.index").concepts()  # doctest: +SKIP
    {'swe-eng:79:1': {'sv': ('abbedissa',), 'en': ('abbess',)}, ...}
    """
    for name, least in (("max_words", max_words), ("max_entries", max_entries)):
        if least is not None and least < 1:
            raise DataError(f"{name} must be at least 1, got {least}")
    index, body = _dictd_files(Path(path).expanduser())
    stem = index.name.removesuffix(".index")
    source, target = _dictd_languages(stem) if languages is None else languages
    pair = stem.removeprefix("freedict-")
    try:
        text = body.read_bytes()
        if body.suffix == ".dz":  # dictzip is gzip with an index of its own in the header
            text = gzip.decompress(text)
        lines = index.read_text(encoding="utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{body}: cannot be read: {error}") from None
    entries: dict[tuple[int, int], None] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) < 3:
            if line.strip():
                raise DataError(f"{index}: line {number} is not headword, offset, length: {line!r}")
            continue
        if re.match(r"00-?database", fields[0]):
            continue
        start, size = (_dictd_number(index, number, cell) for cell in fields[1:3])
        if start + size > len(text):
            raise DataError(f"{index}: line {number} points behind the end of {body.name}")
        entries[start, size] = None
    about = {  # the dictionary's own description is indexed under empty names too
        (start, size)
        for start, size in entries
        if text[start : start + 12].lower().startswith((b"00-database", b"00database"))
    }
    synsets: list[str] = []
    words: list[str] = []
    spoken: list[str] = []
    chosen = sorted(key for key in entries if key not in about)[:max_entries]
    for done, (start, size) in enumerate(chosen, start=1):
        entry = text[start : start + size].decode("utf-8", "replace")
        heads, senses = _dictd_entry(entry, max_words)
        for sense, translations in senses if heads else ():
            name = f"{pair}:{start}:{sense}"
            synsets += [name] * (len(heads) + len(translations))
            words += [*heads, *translations]
            spoken += [source] * len(heads) + [target] * len(translations)
        if progress is not None and (done % 4096 == 0 or done == len(chosen)):
            progress(done, len(chosen))
    if not words:
        raise DataError(f"{body}: no entry with a headword and a translation was found")
    return Constraints(
        tuple(synsets), tuple(words), tuple(spoken), None, f"FreeDict {pair}"
    ).distinct()


def _dictd_files(path: Path) -> tuple[Path, Path]:
    name = path.name
    for ending in (".index", ".dict.dz", ".dict"):
        name = name.removesuffix(ending)
    index = path.with_name(f"{name}.index")
    bodies = [path.with_name(f"{name}{ending}") for ending in (".dict.dz", ".dict")]
    body = next((one for one in bodies if one.is_file()), None)
    if body is None or not index.is_file():
        raise DataError(
            f"{path}: a dictionary is two files side by side, {name}.index and {name}.dict.dz (or "
            f"{name}.dict); at least one of them is missing"
        )
    return index, body


def _dictd_languages(stem: str) -> tuple[str, str]:
    from babel.core import get_global

    match = re.fullmatch(r"(?:.*-)?([a-z]{2,3})-([a-z]{2,3})", stem)
    if match is None:
        raise DataError(f"the name {stem!r} tells no two languages: give languages=(from, to)")
    shorter = get_global("language_aliases")
    one, other = (str(shorter.get(code, code)) for code in match.groups())
    return one, other


def _dictd_number(index: Path, line: int, digits: str) -> int:
    value = 0
    for digit in digits.strip():
        if digit not in _BASE64:
            raise DataError(f"{index}: line {line}: {digits!r} is not a number of dictd's base 64")
        value = 64 * value + _BASE64[digit]
    return value


def _dictd_entry(entry: str, max_words: int) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the headwords, and the translations of each sense by its number."""
    first, *rest = entry.split("\n")
    heads = _terms(_PRONUNCIATION.sub("", first), max_words, separators=",;")
    senses: dict[int, list[str]] = {}
    sense = 1
    skipping = False
    for line in rest:
        if not line.strip():
            continue
        numbered = _SENSE.match(line)
        if numbered:
            sense = int(numbered.group().strip().rstrip("."))
            line, skipping = line[numbered.end() :], False
        text = line.strip()
        if text.lower().startswith(_NOT_TRANSLATIONS):
            # What follows a cross reference, indented, is about the headword.
            skipping = text.lower().startswith("see:") or skipping
            continue
        if skipping or (not numbered and line.startswith("   ")):
            continue
        terms = _terms(text, max_words, separators=",;")
        if terms:
            senses.setdefault(sense, []).extend(terms)
    return heads, [(number, list(dict.fromkeys(terms))) for number, terms in senses.items()]


def _terms(text: str, max_words: int, separators: str) -> list[str]:
    """Split a line into its terms, without grammar, labels and remarks."""
    text = _PRONUNCIATION.sub("", _REMARK.sub(" ", text))
    while (shorter := _BRACKET.sub(" ", text)) != text:  # brackets in brackets
        text = shorter
    found = []
    for part in re.split(f"[{separators}]", text):
        term = " ".join(part.split()).strip(" .:!?…\"'")
        is_word = any(map(str.isalpha, term)) and not _MARKUP & set(term)
        if is_word and len(term.split()) <= max_words:
            found.append(term)
    return list(dict.fromkeys(found))
