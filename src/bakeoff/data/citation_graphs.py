"""Citation graphs that need no download: Debian's package index, and the standard library."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import lzma
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from bakeoff.data.citations import CitationGraph
from bakeoff.data.formats import PathLike, count, listed
from bakeoff.errors import DataError

# --- Debian's package index -------------------------------------------------------------------

_APT_LISTS = Path("/var/lib/apt/lists")


def debian_packages(
    path: PathLike | None = None,
    *,
    translation: PathLike | None = None,
    sections: Iterable[str] | None = None,
    relations: Sequence[str] = ("Depends", "Pre-Depends"),
) -> CitationGraph:
    """Read Debian's package index: descriptions that cite each other by depending on each other.

    Parameters
    ----------
    path
        A ``Packages`` file, plain or compressed (``.gz``, ``.xz``, ``.bz2``; ``.lz4`` with the tool
        lz4). None asks ``apt-cache dumpavail`` for what this machine knows.
    translation
        A ``Translation-en`` file with the long descriptions, which many indexes keep apart. With
        `path` None, one among apt's own lists is used if there is one.
    sections
        Only packages of these sections get a text; all for None. A section is the domain, without
        its area (``contrib/net`` is ``net``).
    relations
        Fields that count as citations. Of alternatives (``a | b``) the first counts.

    Returns
    -------
    CitationGraph
        Texts are the descriptions without the package's name. Packages of one source are one
        group. Of several versions the first counts; transitional and debug packages are left out.

    Raises
    ------
    DataError
        If there is no apt-cache here, the file cannot be read or holds no packages, or no package
        is in `sections`.
    """
    packages: dict[str, dict[str, str]] = {}
    wanted = {"Package", "Source", "Section", "Description", "Description-md5", *relations}
    with _index(path) as stream:
        for stanza in _stanzas(stream, wanted):
            if "Package" in stanza:
                packages.setdefault(stanza["Package"], stanza)
    if not packages:
        where = "apt-cache dumpavail" if path is None else str(path)
        raise DataError(
            f"{where} holds no packages"
            + ("; run `apt-get update`, or give a Packages file" if path is None else "")
        )
    long_texts = _translations(_translation_file(path, translation))
    chosen = None if sections is None else set(sections)
    known = {_section(stanza) for stanza in packages.values()}
    if chosen is not None and not chosen <= known:
        raise DataError(
            f"there is no section {sorted(chosen - known)[0]!r}; there are {listed(sorted(known))}"
        )
    texts: dict[str, str] = {}
    domains: dict[str, str] = {}
    groups: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    n_long = 0
    for package, stanza in packages.items():
        references[package] = [
            _first_alternative(part)
            for relation in relations
            for part in stanza.get(relation, "").split(",")
            if part.strip()
        ]
        description = long_texts.get(stanza.get("Description-md5", ""), "")
        description = description or stanza.get("Description", "")
        section = _section(stanza)
        if (chosen is not None and section not in chosen) or _says_little(package, description):
            continue
        n_long += "\n" in description
        texts[package] = description
        domains[package] = section
        groups[package] = stanza.get("Source", package).split(" ")[0]
    notes = [
        f"Debian's package index: {count(len(packages), 'package')}, {len(texts):,} of them with a "
        "description; dependencies count as citations, sections as domains."
    ]
    if n_long < len(texts) / 2:
        notes.append(
            "Descriptions are one line long: this index keeps the long ones in a Translation-en "
            "file, which was not given."
        )
    return CitationGraph("debian packages", references, texts, domains, groups, tuple(notes))


@contextmanager
def _index(path: PathLike | None) -> Iterator[TextIO]:
    """Open an index, whatever compresses it."""
    if path is None:
        if shutil.which("apt-cache") is None:
            raise DataError(
                "there is no apt-cache on this machine, so it knows no Debian packages: give the "
                "path of a Packages file (from dists/*/main/binary-*/ of any Debian mirror), or "
                "use another graph, such as standard_library_graph()"
            )
        with _output(["apt-cache", "dumpavail"]) as stream:
            yield stream
        return
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a Debian Packages file")
    if path.suffix == ".lz4":
        if shutil.which("lz4") is None:
            raise DataError(f"{path}: needs the tool lz4 (package lz4), which is not there")
        with _output(["lz4", "-dc", str(path)]) as stream:
            yield stream
        return
    opener: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8", errors="replace") as stream:
            yield stream
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


@contextmanager
def _output(command: list[str]) -> Iterator[TextIO]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        stream = io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace")
        yield stream
        # To the end, or the process would fail of a closed pipe and not of its own trouble.
        stream.read()
        complaint = process.stderr.read().decode("utf-8", "replace").strip()
        if process.wait() != 0:
            raise DataError(f"{' '.join(command)} failed: {complaint or process.returncode}")


def _stanzas(stream: Iterable[str], wanted: set[str]) -> Iterator[dict[str, str]]:
    """Yield the wanted fields of each paragraph of a Debian control file."""
    stanza: dict[str, str] = {}
    name = ""
    for line in stream:
        line = line.rstrip("\n")
        if not line.strip():
            if stanza:
                yield stanza
            stanza, name = {}, ""
        elif line[0] in " \t":
            if name:
                # A lone full stop stands for an empty line.
                stanza[name] += "\n" + ("" if line.strip() == "." else line.strip())
        else:
            key, _, value = line.partition(":")
            name = key if key in wanted else ""
            if name:
                stanza[name] = value.strip()
    if stanza:
        yield stanza


def _translation_file(path: PathLike | None, translation: PathLike | None) -> Path | None:
    if translation is not None:
        return Path(translation)
    if path is None:
        found = sorted(_APT_LISTS.glob("*_main_i18n_Translation-en*"))
        # One that nobody asked for is no reason to fail.
        readable = [file for file in found if file.suffix != ".lz4" or shutil.which("lz4")]
        return next(iter(readable), None)
    return None


def _translations(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    with _index(path) as stream:
        return {
            stanza["Description-md5"]: stanza["Description-en"]
            for stanza in _stanzas(stream, {"Description-md5", "Description-en"})
            if len(stanza) == 2
        }


def _section(stanza: Mapping[str, str]) -> str:
    return stanza.get("Section", "unknown").rsplit("/", 1)[-1]


def _first_alternative(relation: str) -> str:
    return re.split(r"[\s(|:\[]", relation.strip(), maxsplit=1)[0]


def _says_little(package: str, description: str) -> bool:
    first = description.split("\n", 1)[0].lower()
    return (
        len(first.split()) < 3
        or "transitional" in first
        or "dummy package" in first
        or package.endswith(("-dbg", "-dbgsym"))
    )


# --- the standard library ---------------------------------------------------------------------

# After the chapters of the library reference, joined to areas of some size.
_AREAS = {
    "text and data formats": (
        *("re", "string", "difflib", "textwrap", "codecs", "encodings", "unicodedata", "json"),
        *("csv", "configparser", "tomllib", "plistlib", "struct", "pickle", "pickletools"),
        *("copyreg", "shelve", "dbm", "sqlite3", "marshal", "base64", "binascii", "quopri", "uu"),
        *("html", "xml", "gettext", "locale", "stringprep", "netrc", "xdrlib", "colorsys"),
        *("zipfile", "tarfile", "gzip", "bz2", "lzma", "zlib", "_compression", "compression"),
        *("aifc", "wave", "sunau", "sndhdr", "imghdr", "chunk", "shlex", "optparse", "argparse"),
        *("getopt", "pprint", "reprlib", "token", "tokenize", "mimetypes"),
    ),
    "network": (
        *("http", "urllib", "email", "smtplib", "smtpd", "poplib", "imaplib", "nntplib", "ftplib"),
        *("telnetlib", "socket", "ssl", "socketserver", "xmlrpc", "wsgiref", "cgi", "cgitb"),
        *("mailbox", "mailcap", "ipaddress", "webbrowser", "uuid", "asyncore", "asynchat"),
        *("asyncio", "selectors"),
    ),
    "operating system": (
        *("os", "pathlib", "posixpath", "ntpath", "genericpath", "shutil", "glob", "fnmatch"),
        *("tempfile", "fileinput", "filecmp", "linecache", "stat", "io", "_pyio", "subprocess"),
        *("multiprocessing", "threading", "_threading_local", "concurrent", "queue", "sched"),
        *("signal", "platform", "getpass", "pty", "tty", "curses", "ctypes", "logging", "site"),
        *("crypt", "pipes", "nturl2path", "tkinter", "turtle", "cmd", "readline", "venv", "msilib"),
        *("sysconfig", "_osx_support", "_aix_support", "_bootsubprocess", "syslog", "rlcompleter"),
    ),
    "numbers and types": (
        *("_pydecimal", "decimal", "fractions", "numbers", "random", "statistics", "math"),
        *("cmath", "datetime", "_pydatetime", "calendar", "time", "_strptime", "zoneinfo"),
        *("collections", "_collections_abc", "heapq", "bisect", "array", "weakref", "_weakrefset"),
        *("types", "copy", "enum", "graphlib", "functools", "operator", "itertools", "contextlib"),
        *("dataclasses", "abc", "_py_abc", "hashlib", "hmac", "secrets", "_pylong", "contextvars"),
    ),
}  # fmt: skip
_OTHER_AREA = "language and tools"
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def standard_library_graph(
    *, min_words: int = 4, areas: Iterable[str] | None = None
) -> CitationGraph:
    """Return the running Python's standard library as a graph: what a function uses, it cites.

    Documents are the docstrings (first paragraphs) of functions, methods and classes. A function
    cites what it names: methods of its own class (``self.x``), definitions of its own module, and
    what it imports from other modules of the library. Domains are areas of the library.

    Files are parsed, never imported. Takes about 10 s, once per process.

    Parameters
    ----------
    min_words
        Shorter docstrings are left out.
    areas
        Read only the modules of these areas, which takes less time; all for None.

    Raises
    ------
    DataError
        If an area is unknown, or the library has no source files here (a zipped or compiled-only
        Python).

    Notes
    -----
    Modules that import modules give the same kind of graph (`standard_library_imports`), but a few
    hundred documents are too few to train on.
    """
    chosen = None if areas is None else tuple([areas] if isinstance(areas, str) else areas)
    known = (*_AREAS, _OTHER_AREA)
    unknown = [area for area in chosen or () if area not in known]
    if unknown:
        raise DataError(f"unknown area {unknown[0]!r}; there are {listed(known)}")
    return _standard_library(min_words, chosen)


@lru_cache(maxsize=1)
def _standard_library(min_words: int, areas: tuple[str, ...] | None) -> CitationGraph:
    modules = _parsed_modules(areas)
    definitions: dict[str, _Definition] = {}
    for module, (tree, _) in modules.items():
        _collect(tree, module, module, None, definitions)
    texts = {
        key: found.docstring
        for key, found in definitions.items()
        if len(found.docstring.split()) >= min_words
    }
    names = {module: _imported_names(module, *modules[module]) for module in modules}
    references = {
        key: _used(key, found, names[found.module], definitions)
        for key, found in definitions.items()
        if isinstance(found.node, _Function)
    }
    domains = {key: _area(definitions[key].module) for key in texts}
    note = (
        f"The running Python's standard library: docstrings of {len(texts):,} functions and "
        "classes; what a function uses counts as its references, areas of the library as domains."
    )
    return CitationGraph("standard library", references, texts, domains, {}, (note,))


def standard_library_imports(*, min_words: int = 8) -> CitationGraph:
    """Return the running Python's standard library as a graph of modules that import modules.

    Documents are the modules' docstrings; modules of one package are one group. Small: about 150
    documents in pairs, enough to look at.

    Parameters
    ----------
    min_words
        Shorter docstrings are left out.

    Raises
    ------
    DataError
        If the library has no source files here.
    """
    modules = _parsed_modules()
    texts: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for module, (tree, is_package) in modules.items():
        docstring = ast.get_docstring(tree) or ""
        if len(docstring.split()) >= min_words:
            texts[module] = docstring
        cited = set()
        for target in _imported_names(module, tree, is_package).values():
            while target and target not in modules:
                target = target.rpartition(".")[0]
            cited.add(target)
        references[module] = sorted(cited - {"", module})
    note = f"The running Python's standard library: {len(texts)} modules that import modules."
    return CitationGraph(
        "standard-library imports",
        references,
        texts,
        {module: _area(module) for module in texts},
        {module: module.split(".")[0] for module in texts},
        (note,),
    )


@dataclass(frozen=True)
class _Definition:
    """A function or class: where it stands and what it says."""

    module: str
    owner: str | None
    node: ast.AST
    docstring: str


def _parsed_modules(areas: Sequence[str] | None = None) -> dict[str, tuple[ast.Module, bool]]:
    """Return each module's syntax tree, and whether it is a package."""
    from bakeoff.data.embedded import standard_library_modules

    modules = {}
    for path, source in standard_library_modules().items():
        name = path.removesuffix(".py").replace("/", ".")
        if areas is not None and _area(name) not in areas:
            continue
        modules[name.removesuffix(".__init__")] = (ast.parse(source), name.endswith(".__init__"))
    return modules


def _collect(
    node: ast.AST, module: str, prefix: str, owner: str | None, found: dict[str, _Definition]
) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function | ast.ClassDef):
            key = f"{prefix}.{child.name}"
            paragraphs = re.split(r"\n\s*\n", ast.get_docstring(child) or "")
            found[key] = _Definition(module, owner, child, " ".join(paragraphs[0].split()))
            if isinstance(child, ast.ClassDef):
                _collect(child, module, key, key, found)
        elif isinstance(child, ast.If | ast.Try):  # definitions for one platform or another
            _collect(child, module, prefix, owner, found)


def _imported_names(module: str, tree: ast.Module, is_package: bool) -> dict[str, str]:
    """Return what each imported name stands for, imports inside functions included."""
    names: dict[str, str] = {}
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                names[alias.asname or alias.name] = f"{source}.{alias.name}"
    return names


def _used(
    key: str, own: _Definition, imported: Mapping[str, str], known: Mapping[str, _Definition]
) -> list[str]:
    used = set()
    for node in ast.walk(own.node):
        dotted = _dotted(node)
        head, _, rest = (dotted or "").partition(".")
        if not head:
            continue
        if head in ("self", "cls") and own.owner and rest:
            target = f"{own.owner}.{rest}"
        elif head in imported:
            target = f"{imported[head]}.{rest}" if rest else imported[head]
        else:
            target = f"{own.module}.{dotted}"
        if target in known and target != key:
            used.add(target)
    return sorted(used)


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return base and f"{base}.{node.attr}"
    return None


def _area(module: str) -> str:
    package = module.split(".")[0]
    return next((area for area, packages in _AREAS.items() if package in packages), _OTHER_AREA)
