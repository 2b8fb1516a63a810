"""Texts to train a decoder on, from the user's own files: source files, or rows of a table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bakeoff.data.formats import PathLike, count, listed, read_table
from bakeoff.data.splits import normalise, sample
from bakeoff.errors import DataError

_TABLES = frozenset({".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv"})
# Folders with code that is not the project's own.
_OF_OTHERS = frozenset({"node_modules", "site-packages", "__pycache__"})
_USUAL_NAMES = ("content", "code", "source", "text", "body")


def read_code(
    paths: Sequence[PathLike],
    *,
    suffixes: Sequence[str] = (".py",),
    column: str | None = None,
    max_texts: int | None = None,
    seed: int = 0,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read source files and tables of texts.

    Parameters
    ----------
    paths
        Folders, of which all files with one of `suffixes` are read, but for those in hidden
        folders, virtual environments, ``site-packages`` and ``node_modules``; tables (Parquet, JSON
        Lines, JSON, CSV, TSV), one text a row; other files, each one text in UTF-8.
    suffixes
        Of the files in folders.
    column
        Of tables; by default the first of content, code, source, text and body that is there.
    max_texts
        At most so many, drawn by their content.
    seed
        Of that draw.

    Returns
    -------
    texts : tuple of str
        In the order found, blank ones and copies left out.
    notes : tuple of str
        Sentences about what was left out.

    Raises
    ------
    DataError
        If a file cannot be read or is no UTF-8, a table has no such column, or nothing is left;
        names the file.
    """
    if not paths:
        raise DataError("give at least one file or folder")
    if max_texts is not None and max_texts < 1:
        raise DataError(f"max_texts must be at least 1, got {max_texts}")
    found: dict[str, str] = {}
    blank = twice = 0
    notes: list[str] = []
    for path in map(Path, paths):
        for text in _texts(path, tuple(suffixes), column, notes):
            key = normalise(text)
            blank += not key
            twice += bool(key) and key in found
            if key:
                found.setdefault(key, text)
    for number, what in ((blank, "blank"), (twice, "seen before")):
        if number:
            notes.append(f"{count(number, 'text')} left out: {what}.")
    texts = tuple(found.values())
    if not texts:
        raise DataError(f"{listed(map(str, paths))}: no text in there")
    if max_texts is not None and len(texts) > max_texts:
        notes.append(f"{max_texts:,} of {len(texts):,} texts drawn by their content.")
        texts = tuple(sample(texts, max_texts, seed, key=lambda text: text))
    return texts, tuple(notes)


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield a project's files without hidden folders, environments and what others wrote."""
    for root, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name not in _OF_OTHERS
            and not Path(root, name, "pyvenv.cfg").is_file()
        ]
        yield from (Path(root, name) for name in names)


def _texts(
    path: Path, suffixes: tuple[str, ...], column: str | None, notes: list[str]
) -> list[str]:
    if path.is_dir():
        files = sorted(p for p in _own_files(path) if p.suffix in suffixes and p.is_file())
        if not files:
            raise DataError(f"{path}: no file in this folder ends with {listed(suffixes)}")
        texts = []
        for file in files:
            try:
                texts.append(_file(file))
            except DataError as error:  # one odd file among many is no reason to stop
                notes.append(f"left out: {error}.")
        return texts
    if path.suffix.lower() not in _TABLES:
        return [_file(path)]
    table = read_table(path)
    plain = {name.casefold(): name for name in reversed(list(table.columns))}
    name = column or next((plain[usual] for usual in _USUAL_NAMES if usual in plain), None)
    if name is None or name not in table.columns:
        problem = (
            f"no column has a usual name for texts ({listed(_USUAL_NAMES)}); name one"
            if column is None
            else f"there is no column {column!r}"
        )
        raise DataError(f"{path}: {problem}. There are: {listed(table.columns)}")
    texts = []
    for place, cell in zip(table.places, table.columns[name], strict=True):
        if cell is not None and not isinstance(cell, str):
            raise DataError(f"{path}, {place}: {name} must be text, got {type(cell).__name__}")
        texts.append(cell or "")
    return texts


def _file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
