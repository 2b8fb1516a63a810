"""The file formats that a user's data may come in, read row by row.

Reading streams: a consumer that samples never holds the whole file. Nothing is unpickled or
executed.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from bakeoff.errors import DataError

PathLike: TypeAlias = "str | os.PathLike[str]"

ACCEPTED = (
    "a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, a folder of .parquet shards, or a "
    "folder written by datasets.save_to_disk"
)

_TEST_SPLITS = ("test", "validation", "valid", "dev")


class Row(NamedTuple):
    """One record of a file and where it stands there.

    Parameters
    ----------
    place
        For error messages, as the user sees it in an editor, e.g. ``"line 3"``.
    split
        ``"train"`` or ``"test"`` if the file says so, else None.
    values
        Cells by column.
    """

    place: str
    split: str | None
    values: Mapping[str, object]


@dataclass(frozen=True)
class Table:
    """All rows of one file, by column.

    Parameters
    ----------
    columns
        Cells by column name, in the file's order; None where a JSON record lacks the key.
    places
        Where each row stands, e.g. ``"line 3"``; shape ``(n_rows,)``.
    splits
        ``"train"``, ``"test"`` or None for each row; shape ``(n_rows,)``.
    """

    columns: Mapping[str, tuple[object, ...]]
    places: tuple[str, ...]
    splits: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.places)


def read_table(path: PathLike) -> Table:
    r"""Read a whole file or folder of the accepted kinds.

    Parameters
    ----------
    path
        A ``.jsonl`` (or ``.ndjson``), ``.json`` (an array of objects, or one object a line),
        ``.csv``, ``.tsv`` or ``.parquet`` file; a folder of Parquet shards; or a folder written by
        `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk`. Text must be UTF-8, with or
        without a byte order mark.

    Returns
    -------
    Table
        Cells are what the format holds: text in CSV, JSON types in JSON. Integers of a
        `datasets.ClassLabel` column are replaced by their names.

    Raises
    ------
    DataError
        If the path does not exist, is of no accepted kind, is empty or cannot be parsed; names the
        file and the line or byte.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "faq.csv"
    >>> _ = path.write_text("question,answer\nWhere?,Here.\n")
    >>> read_table(path).columns
    {'question': ('Where?',), 'answer': ('Here.',)}
    """
    records = list(iterate_rows(Path(path).expanduser()))
    names = dict.fromkeys(name for row in records for name in row.values)
    return Table(
        {name: tuple(row.values.get(name) for row in records) for name in names},
        tuple(row.place for row in records),
        tuple(row.split for row in records),
    )


def iterate_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file or folder of any accepted kind.

    Parameters
    ----------
    path
        What `read_table` accepts.
    columns
        The only columns wanted. Formats that store columns apart then leave the others on disk;
        text formats yield them all the same. None yields all.
    """
    wanted = None if columns is None else list(columns)
    if path.is_dir():
        return _folder_rows(path, wanted)
    if not path.exists():
        raise DataError(f"{path}: no such file; accepted is {ACCEPTED}")
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_rows,
        ".csv": _delimited_rows,
        ".tsv": _delimited_rows,
        ".parquet": lambda file: _parquet_rows(file, wanted),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; accepted is {ACCEPTED}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return reader(path)


def _lines(path: Path) -> Iterator[str]:
    """Decode line by line, so that a wrong byte can be named by its place in the file."""
    offset = 0
    try:
        stream = open(path, "rb")  # noqa: SIM115 (closed below; a with would hide which call failed)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    with stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(
                    f"{path}: not UTF-8 at byte 0: the file begins with the mark of UTF-16; "
                    "convert it with iconv -f UTF-16 -t UTF-8"
                )
            mark = codecs.BOM_UTF8 if number == 1 and raw.startswith(codecs.BOM_UTF8) else b""
            try:
                yield raw[len(mark) :].decode("utf-8")
            except UnicodeDecodeError as error:
                at = len(mark) + error.start
                raise DataError(
                    f"{path}: not UTF-8 at byte {offset + at} (line {number}, value "
                    f"0x{raw[at]:02x}); tried UTF-8 with and without byte order mark. If it is a "
                    "Western European file, convert it with iconv -f WINDOWS-1252 -t UTF-8"
                ) from None
            offset += len(raw)


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            record = _parsed_json(path, line, f"line {number}")
            yield Row(f"line {number}", None, _object(path, record, f"line {number}"))


def _json_rows(path: Path) -> Iterator[Row]:
    first = next((line for line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _json_lines(path)  # many tools write JSON lines under this extension
        return
    records = _parsed_json(path, "".join(_lines(path)), None)
    for number, record in enumerate(records, start=1):
        yield Row(f"item {number}", None, _object(path, record, f"item {number}"))


def _parsed_json(path: Path, text: str, place: str | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place or f"line {error.lineno}"
        raise DataError(
            f"{path}: {where} is not valid JSON: {error.msg} at column {error.colno} (accepted is "
            "one object a line or, in a .json file, an array of objects)"
        ) from None
    except (ValueError, RecursionError) as error:  # an absurdly long number, or absurd nesting
        raise DataError(f"{path}: {place or 'the file'} is not usable JSON: {error}") from None


def _object(path: Path, record: object, place: str) -> Mapping[str, object]:
    if not isinstance(record, dict):
        raise DataError(
            f"{path}: {place} is {_json_kind(record)}, not an object; accepted is "
            '{"column": value, ...} for each row'
        )
    return record


def _json_kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _delimited_rows(path: Path) -> Iterator[Row]:
    lines = _lines(path)
    first, header_line = next(
        ((number, line) for number, line in enumerate(lines, start=1) if line.strip()), (0, "")
    )
    if not header_line:
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(header_line)
    # The limit is a global of the csv module and far below a long document.
    limit = csv.field_size_limit(2**31 - 1)
    start = first
    try:
        reader = csv.reader(chain([header_line], lines), delimiter=delimiter, strict=True)
        header = next(reader)
        twice = [name for name, n in Counter(header).items() if n > 1]
        if twice:
            raise DataError(f"{path}: the header names column {twice[0]!r} twice: {listed(header)}")
        start = first + reader.line_num
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}: line {start} has {count(len(cells), 'field')}, the header has "
                    f"{len(header)} ({listed(header)}); a text that holds the delimiter "
                    f"{delimiter!r} must stand in double quotes"
                )
            if cells:
                yield Row(f"line {start}", None, dict(zip(header, cells, strict=True)))
            start = first + reader.line_num
    except csv.Error as error:
        raise DataError(
            f"{path}: the row that starts at line {start} is not valid CSV: {error}"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _delimiter(header: str) -> str:
    """Return the delimiter of a .csv file: some programs write semicolons or tabs."""
    return max(",;\t", key=header.count)


def _parquet_rows(
    path: Path, columns: list[str] | None, split: str | None = None, prefix: str = ""
) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{prefix}row {number}", split, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file: {reason}") from None


def _folder_rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _datasets_rows(path, columns)
    shards = sorted(path.glob("*.parquet"))
    if not shards:
        raise DataError(
            f"{path}: a folder without .parquet shards or a saved dataset; accepted is {ACCEPTED}"
        )
    return _shard_rows(path, shards, columns)


def _shard_rows(path: Path, shards: Sequence[Path], columns: list[str] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    names: list[list[str]] = []
    for shard in shards:
        try:
            names.append(pyarrow.parquet.read_schema(shard).names)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{shard}: not a readable Parquet file: {reason}") from None
        if set(names[-1]) != set(names[0]):
            raise DataError(
                f"{path}: shards differ in their columns: {shards[0].name} has "
                f"{listed(names[0])}, {shard.name} has {listed(names[-1])}"
            )
    # Datasets on the hub name their shards train-00000-of-00002.parquet and so on.
    splits = split_roles([re.split(r"[-._]", shard.name)[0] for shard in shards])
    for shard, split in zip(shards, splits, strict=True):
        if split != "unused":
            yield from _parquet_rows(shard, columns, split, prefix=f"{shard.name} ")


def split_roles(names: Sequence[str]) -> list[str | None]:
    """Return train, test or unused for each part if their names form a split, else None for all."""
    test = next((name for name in _TEST_SPLITS if name in names), None)
    if test is None or not set(names) <= {"train", *_TEST_SPLITS}:
        return [None] * len(names)
    return ["test" if name == test else "train" if name == "train" else "unused" for name in names]


def _datasets_rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes of the library's many readers
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable datasets folder: {reason}") from None
    parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    for (name, part), split in zip(parts.items(), split_roles(list(parts)), strict=True):
        if split == "unused":
            continue
        if columns is not None:
            part = part.select_columns(columns)
        class_names = {
            column: feature.names
            for column, feature in part.features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        number = 0
        for batch in part.with_format("arrow").iter(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                for column, names in class_names.items():
                    code = values[column]
                    # -1 stands for "no label" in test splits that keep theirs secret.
                    values[column] = None if code is None or code < 0 else names[code]
                yield Row(f"{name} row {number}".strip(), split, values)


def listed(names: Iterable[str]) -> str:
    """Return names in quotes, with commas between."""
    return ", ".join(map(repr, names))


def count(n: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, e.g. ``"1 row"`` or ``"1,200 rows"``."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
