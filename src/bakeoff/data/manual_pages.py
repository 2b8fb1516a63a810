"""Manual pages as a citation graph: what a page says to see also, it cites."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bakeoff.data.citations import CitationGraph
from bakeoff.data.formats import PathLike, count, listed
from bakeoff.errors import DataError

SECTIONS = {
    "1": "commands",
    "2": "system calls",
    "3": "library",
    "4": "devices",
    "5": "files",
    "6": "games",
    "7": "overviews",
    "8": "administration",
}
"""Name of each section of the manual; the domain of its pages."""

_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}
_FOLDER = re.compile(r"man([1-8])[a-z]*")
_FILE = re.compile(r"(?P<name>.+)\.(?P<section>[1-8]\w*)")
_HEADING = re.compile(r"^[.'][ \t]*S[Hh][ \t]+(.+)$", re.MULTILINE)
_INCLUDED = re.compile(r"^[.']so[ \t]+(\S+)", re.MULTILINE)
_REFERENCE = re.compile(r"([A-Za-z0-9_.:+@\[-]+)\s?\(([1-8][A-Za-z]*)\)")
_SUMMARY = re.compile(r"\s(?:-{1,3}|\N{EN DASH}|\N{EM DASH})\s")


def is_manual(path: PathLike) -> bool:
    """Say whether a folder holds manual pages, in folders ``man1`` to ``man8``.

    Examples
    --------
    >>> is_manual("/no/such/folder")
    False
    """
    folder = Path(path).expanduser()
    return folder.is_dir() and any(
        _FOLDER.fullmatch(child.name) and child.is_dir() for child in folder.iterdir()
    )


def manual_pages(
    path: PathLike = "/usr/share/man", *, sections: Iterable[str] | None = None
) -> CitationGraph:
    """Read manual pages: their summaries and what they do, citing each other in *See also*.

    Parameters
    ----------
    path
        A folder with ``man1`` to ``man8``, pages plain or compressed (``.gz``, ``.xz``, ``.bz2``).
    sections
        Only pages of these sections get a text, by their digit; all for None.

    Returns
    -------
    CitationGraph
        A document is a page, ``ls(1)``; its text are its summary, without the name, and the first
        paragraph of its description. Pages that are other names of one are that one. The section
        is the domain.

    Raises
    ------
    DataError
        If the folder holds no manual pages, a section is unknown, or a file cannot be read.

    Notes
    -----
    Pages are written in one of two macro languages, man(7) and mdoc(7), of which what three of
    their sections need is understood: no page is run through a formatter. Pages that say nothing of
    themselves, or in other words than *Name*, *Description* and *See also*, have no text or no
    references.

    Examples
    --------
    >>> manual_pages().pairs(max_citations=40)  # doctest: +SKIP
    """
    folder = Path(path).expanduser()
    if not is_manual(folder):
        raise DataError(f"{path} holds no manual pages: there are no folders man1 to man8")
    chosen = None if sections is None else {str(section) for section in sections}
    if chosen is not None and not chosen <= set(SECTIONS):
        unknown = sorted(chosen - set(SECTIONS))[0]
        raise DataError(f"sections has {unknown!r}; there are {listed(SECTIONS)}")
    sources, other_names = _pages(folder)
    texts: dict[str, str] = {}
    domains: dict[str, str] = {}
    cited: dict[str, list[str]] = {}
    for key, source in sources.items():
        parts = _parts(source)
        cited[key] = _references(parts.get("see also", ""))
        section = _section(key)[:1]
        text = _text(parts)
        if text and (chosen is None or section in chosen):
            texts[key], domains[key] = text, SECTIONS[section]
    # A reference says "open(3)" where the page is of section 3pm, or by another of its names.
    known = {key: key for key in sources} | other_names
    loosely: dict[str, str] = {}
    for name, key in sorted(known.items()):
        loosely.setdefault(f"{name.rpartition('(')[0]}({_section(name)[:1]})", key)
    references = {}
    for key, names in cited.items():
        found = [
            known.get(name) or loosely.get(f"{name.rpartition('(')[0]}({_section(name)[:1]})")
            for name in names
        ]
        references[key] = [other for other in dict.fromkeys(found) if other and other != key]
    note = (
        f"Manual pages: {count(len(sources), 'page')}, {len(texts):,} of them with a text; what a "
        "page says to see also counts as its references, sections of the manual as domains."
    )
    return CitationGraph("manual pages", references, texts, domains, {}, (note,))


# Files --------------------------------------------------------------------------------------------


def _pages(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the source of each page by its id, and the id behind each other name."""
    sources: dict[str, str] = {}
    id_of: dict[Path, str] = {}
    place_of: dict[str, Path] = {}
    goes_on: dict[Path, Path] = {}
    # Real files first, so that a page has its own name and not that of a link to it.
    for key, file in sorted(_files(folder), key=lambda found: found[1].is_symlink()):
        place = _plain(file.resolve())
        place_of.setdefault(key, place)
        if place in id_of or place in goes_on or key in sources:
            continue
        source = _read(file)
        included = _INCLUDED.search(source)
        if included and not _HEADING.search(source):
            goes_on[place] = _plain((folder / included.group(1)).resolve())
        else:
            sources[key], id_of[place] = source, key
    other_names: dict[str, str] = {}
    for key, place in place_of.items():
        for _ in range(len(goes_on)):
            if place not in goes_on:
                break
            place = goes_on[place]
        if key not in sources and place in id_of:
            other_names[key] = id_of[place]
    return sources, other_names


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for child in sorted(folder.iterdir()):
        if not (_FOLDER.fullmatch(child.name) and child.is_dir()):
            continue
        for file in sorted(child.iterdir()):
            named = _FILE.fullmatch(_plain(file).name)
            if named and file.is_file():
                yield f"{named['name']}({named['section']})", file


def _plain(file: Path) -> Path:
    """Return a file's path without the ending of its compression."""
    return file.with_suffix("") if file.suffix in _UNPACK else file


def _read(file: Path) -> str:
    try:
        content = file.read_bytes()
        content = _UNPACK.get(file.suffix, bytes)(content)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    try:
        source = content.decode("utf-8")
    except UnicodeDecodeError:  # old pages
        source = content.decode("latin-1")
    return source.replace("\\\n", "")  # a line that goes on


def _section(key: str) -> str:
    return key.rpartition("(")[2].rstrip(")")


# Pages --------------------------------------------------------------------------------------------


def _parts(source: str) -> dict[str, str]:
    """Return the source of each section of a page by its heading in small letters."""
    named = re.search(r"^[.'][ \t]*Nm[ \t]+(\S+)", source, re.MULTILINE)
    if named:  # mdoc says the page's name once, and then "the name"
        source = re.sub(
            r"^([.'][ \t]*Nm)[ \t]*$", rf"\g<1> {named.group(1)}", source, flags=re.MULTILINE
        )
    headings = list(_HEADING.finditer(source))
    ends = [*(found.start() for found in headings), len(source)][1:]
    parts: dict[str, str] = {}
    for found, end in zip(headings, ends, strict=True):
        heading = _unescaped(found.group(1)).replace('"', "").strip().lower()
        parts.setdefault(heading, source[found.end() : end])
    return parts


def _text(parts: dict[str, str]) -> str:
    summary = _summary(parts.get("name", ""))
    about = next(iter(_paragraphs(parts.get("description", ""))), "")
    return " ".join(part if part[-1] in ".!?:" else f"{part}." for part in (summary, about) if part)


def _summary(source: str) -> str:
    parts = _SUMMARY.split(next(iter(_paragraphs(source)), ""), maxsplit=1)
    return parts[1].strip() if len(parts) == 2 else ""


def _references(source: str) -> list[str]:
    text = " ".join(_paragraphs(source))
    return list(dict.fromkeys(f"{name}({section})" for name, section in _REFERENCE.findall(text)))


# Requests and macros, of man(7) and mdoc(7): what ends a paragraph, what is said in another font.
_BREAKS = frozenset((
    "PP", "P", "LP", "Pp", "sp", "TP", "TQ", "IP", "HP", "SS", "Ss", "RS", "RE", "nf", "fi", "br",
    "Bl", "It", "El", "Bd", "Ed", "EX", "EE", "ce", "in", "ti",
))  # fmt: skip
_ALTERNATING = frozenset(("BR", "RB", "BI", "IB", "IR", "RI"))
_SPOKEN = _ALTERNATING | frozenset((
    "B", "I", "SB", "SM", "R", "Nm", "Ar", "Cm", "Fl", "Pa", "Em", "Sy", "Li", "Ql", "Dq", "Sq",
    "Qq", "Ic", "Nd", "Va", "Fa", "Fn", "Ft", "Ev", "Er", "Dv", "Xr", "MR", "No", "Tn",
))  # fmt: skip
# What is no text: tables, equations, definitions, what is ignored.
_OPENING, _CLOSING = frozenset(("TS", "EQ", "de", "de1", "ig")), frozenset(("TE", "EN"))
_PUNCTUATION = frozenset(".,;:?!)")
_AROUND = {"Nd": ("- ", ""), "Dq": ('"', '"'), "Qq": ('"', '"'), "Sq": ("'", "'")}


def _paragraphs(source: str) -> Iterator[str]:
    """Yield the paragraphs of a section as plain text."""
    words: list[str] = []
    skipping = False
    for line in source.splitlines():
        request = re.match(r"[.'][ \t]*(\w*)[ \t]*(.*)", line)
        macro, rest = request.groups() if request else ("", line)
        if macro in _OPENING:
            skipping = True
        elif macro in _CLOSING or line.startswith(".."):
            skipping = False
        if macro in _BREAKS or not line.strip():
            if words:
                yield " ".join(" ".join(words).split())
            words = []
        elif macro in _SPOKEN and not skipping:
            words.append(_spoken(macro, rest))
        elif request is None and not skipping:
            words.append(_unescaped(line))
    if words:
        yield " ".join(" ".join(words).split())


def _spoken(macro: str, rest: str) -> str:
    """Return what a macro that sets its arguments in some font says."""
    arguments = [
        _unescaped(quoted or plain)
        for quoted, plain in re.findall(r'"((?:[^"]|"")*)"|(\S+)', _without_comment(rest))
    ]
    if macro in _ALTERNATING:
        return "".join(arguments)
    if macro in ("Xr", "MR") and len(arguments) > 1:
        return f"{arguments[0]}({arguments[1]}){''.join(arguments[2:])}"
    trailing = ""
    while arguments and arguments[-1] in _PUNCTUATION:
        trailing = arguments.pop() + trailing
    if macro == "Fl":
        arguments = [f"-{argument}" for argument in arguments]
    before, after = _AROUND.get(macro, ("", ""))
    return f"{before}{' '.join(arguments)}{after}{trailing}"


# Special characters by name; what is not here (trademarks, bullets) is left out.
_SPECIAL = {
    "aq": "'", "cq": "'", "oq": "'", "dq": '"', "lq": '"', "rq": '"', "L\"": '"', "R\"": '"',
    "Fo": '"', "Fc": '"', "ga": "`", "aa": "'", "em": "\N{EM DASH}", "en": "\N{EN DASH}",
    "hy": "-", "mi": "-", "ha": "^", "ti": "~", "rs": "\\", "mu": "x", "->": "->", "<-": "<-",
    ">=": ">=", "<=": "<=", "ss": "ß", ":a": "ä", ":o": "ö", ":u": "ü", "'e": "é",
}  # fmt: skip
_PLAIN = {"-": "-", "e": "\\", "\\": "\\", "'": "'", "`": "`", ".": "."} | dict.fromkeys(
    " ~0t", " "
)
_ESCAPE = re.compile(
    r"""\\(?:
    [fmMFgnVkY](?:\(..|\[[^\]]*\]|.)                 # fonts, colours, registers
  | s(?:[+-]?\d|\([+-]?\d\d|\[[^\]]*\]|'[^']*')     # sizes
  | [hvwlLdDoxXzbNCAZR]'[^']*'                       # motions and drawings
  | \*?(?:\((?P<short>..)|\[(?P<long>[^\]]*)\])      # characters and strings by name
  | \*.
  | (?P<plain>.)
    )""",
    re.VERBOSE,
)


def _unescaped(line: str) -> str:
    """Return a line of text without the formatter's escapes."""

    def meant(found: re.Match[str]) -> str:
        name = found["short"] or found["long"]
        if name and re.fullmatch(r"u[0-9A-F]{4,6}", name):
            return chr(int(name[1:], 16))
        return _SPECIAL.get(name, "") if name else _PLAIN.get(found["plain"] or "", "")

    return _ESCAPE.sub(meant, _without_comment(line))


def _without_comment(line: str) -> str:
    return re.sub(r'\\["#].*', "", line)
