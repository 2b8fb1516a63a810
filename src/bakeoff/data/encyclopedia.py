"""Real text in two languages: an extract of the English Wikipedia and one of the Bulgarian.

The package gensim carries both among its tests, as MediaWiki's XML. Its wheel is fetched once,
checked, and only the two files are kept. The English file holds articles; of the Bulgarian one most
is a talk archive of 2005: an article, a help page and many short discussions.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator
from functools import lru_cache
from xml.etree import ElementTree

from bakeoff.data.embedded import fetch_from_package

_FILES = {
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": (
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
    ),
    "bgwiki-latest-pages-articles-shortened.xml.bz2": (
        "8c67571ec18cb8f0f77a91ab2ee4a04c9368684358e40b94d95670f909210355"
    ),
}
_ENGLISH, _BULGARIAN = _FILES
_LEAST_CHARACTERS = 200

# What goes, innermost first: braces and tables nest.
_NESTED = (re.compile(r"\{\{[^{}]*\}\}"), re.compile(r"\{\|(?:(?!\{\||\|\}).)*?\|\}", re.DOTALL))
_GONE = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<(ref|math|gallery|timeline|nowiki|pre|code)\b[^>]*>.*?</\1>",
    re.DOTALL | re.IGNORECASE,
)
_FILE_LINK = re.compile(
    r"\[\[(?:File|Image|Category|Файл|Картинка|Категория):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]",
    re.IGNORECASE,
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_OUTSIDE_LINK = re.compile(r"\[(?:https?|ftp)://\S+ ?([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_QUOTES = re.compile(r"'{2,}")
_HEADING = re.compile(r"^=+.*=+\s*$", re.MULTILINE)


@lru_cache(maxsize=2)
def encyclopedia_pages(language: str) -> tuple[str, ...]:
    """Return what can be read on each page: its prose, without markup, tables and short lines.

    Parameters
    ----------
    language
        ``"en"``: 107 articles. ``"bg"``: sections of three pages, most of them discussions.

    Returns
    -------
    tuple of str
        In the order of the file; paragraphs are separated by a blank line.

    Raises
    ------
    FetchError
        If the files are not in the cache and cannot be fetched.
    """
    files = {"en": _ENGLISH, "bg": _BULGARIAN}
    texts = _wikitexts(files[language])
    if language == "bg":  # three pages, but discussions are texts of their own
        texts = (section for text in texts for section in _HEADING.split(text))
    pages = (prose(text) for text in texts)
    return tuple(page for page in pages if len(page) >= _LEAST_CHARACTERS)


def _wikitexts(name: str) -> Iterator[str]:
    folder = fetch_from_package(_FILES)
    with bz2.open(folder / name) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag.endswith("}text"):
                yield element.text or ""
                element.clear()


def prose(wikitext: str) -> str:
    """Return the running text of a page in MediaWiki's markup.

    Templates, tables, comments, references and files go, links leave their words, and of the rest
    lines that hold a sentence stay.

    Examples
    --------
    >>> prose("{{Stub|{{ants}}}}'''Ants''' live in [[colony|colonies]] as bees do.<ref>x</ref>")
    'Ants live in colonies as bees do.'
    """
    text = _GONE.sub("", wikitext)
    for pattern in _NESTED:
        before = None
        while before != text:
            before, text = text, pattern.sub("", text)
    text = _FILE_LINK.sub("", text)
    text = _OUTSIDE_LINK.sub(r"\1", _LINK.sub(r"\1", text))
    text = _QUOTES.sub("", _TAG.sub("", text)).replace("&nbsp;", " ")
    lines = (line.strip(" \t:*#") for line in text.splitlines() if not line.startswith(("=", "|")))
    kept = (line for line in lines if len(line.split()) >= 5 and re.search(r"[.!?…]", line))
    return "\n\n".join(kept)
