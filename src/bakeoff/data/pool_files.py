"""The user's files as a pool to select from: streamed, checked, and read again for what was picked.

Nothing here holds the texts. A first pass checks every text and counts; texts are then handed out
in a second pass, to whoever embeds them; a third one fetches the whole rows of the picks alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import atomic_path
from bakeoff.data.formats import Row, count, iterate_rows, listed, split_roles
from bakeoff.data.samples import Sample
from bakeoff.errors import DataError

if TYPE_CHECKING:
    import pyarrow

ROLES = ("text", "context", "instruction", "response")
"""What a column may be to a selector; texts are read from the first, samples from the others."""

OUTPUTS = (".parquet", ".jsonl", ".csv")
"""File formats that `write_picks` knows."""

# By role, what columns are usually called; the first that is there is taken.
_USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "text": (
        *("text", "sentence", "content", "document", "body", "passage", "comment", "review"),
        *("utterance", "question", "query", "title", "headline", "prompt", "instruction"),
    ),
    "context": ("context", "document", "passage", "article", "background", "input"),
    "instruction": ("instruction", "question", "query", "prompt"),
    "response": ("response", "answer", "output", "completion", "reply"),
}
_NAMED = 3
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, eq=False)
class Pool:
    """What the first pass found: which rows can be selected from, and what is known of them.

    Parameters
    ----------
    rows
        int64 array ``(N,)``: the number of each candidate's row in the data, ascending, from 0.
    n_read
        Rows that were read.
    labelled
        int64 array: candidates (positions in `rows`) that are labelled already.
    confidence
        float64 array ``(N,)``, or None if no such column was asked for.
    groups
        One per candidate, or None.
    fingerprint
        64 hexadecimal digits that change with the texts and their order.
    notes
        Sentences about what was left out.
    """

    rows: NDArray[np.int64]
    n_read: int
    labelled: NDArray[np.int64]
    confidence: NDArray[np.float64] | None
    groups: list[str] | None
    fingerprint: str
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


class PoolFiles:
    """One or several files with the same columns, read as one pool.

    Rows are numbered from 0 through all files in the order given, and through the shards of a
    folder in the order of their names.

    Parameters
    ----------
    paths
        What `bakeoff.data.formats.iterate_rows` accepts.
    columns
        Column name by role (see `ROLES`), for names that are not guessed.
    samples
        Whether context, instruction and response are read, rather than one text.

    Raises
    ------
    DataError
        If there is no row, files differ in their columns (Parquet files: or in their types), a
        named column is absent, or none can be guessed; lists the columns.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        columns: Mapping[str, str] | None = None,
        samples: bool = False,
    ) -> None:
        self.paths = [Path(path).expanduser() for path in paths]
        if not self.paths:
            raise DataError("give at least one file or folder to select from")
        self.names = _common_columns(self.paths)
        self.schema = _common_schema(self.paths)
        self.roles = _chosen_columns(self.names, dict(columns or {}), self._what, samples=samples)

    @property
    def _what(self) -> str:
        return ", ".join(str(path) for path in self.paths)

    @property
    def text_column(self) -> str:
        """The column of the text or, for samples, of the response."""
        return self.roles.get("text") or self.roles["response"]

    def require(self, column: str, what: str) -> None:
        """Raise `DataError` if there is no such column."""
        if column not in self.names:
            raise DataError(
                f"{what}: there is no column {column!r} in {self._what}; there are: "
                f"{listed(self.names)}"
            )

    def scan(
        self,
        *,
        labelled: str | Collection[int] | None = None,
        confidence: str | None = None,
        groups: str | None = None,
        max_rows: int | None = None,
        seed: int = 0,
    ) -> Pool:
        """Read everything once: check the texts, and collect what the other columns say.

        Rows whose text is missing or blank are left out, as are those that the data's own split
        calls test.

        Parameters
        ----------
        labelled
            A column that is not empty (null, blank, NaN or false) where a row is labelled already;
            or the numbers of those rows.
        confidence
            A column of numbers.
        groups
            A column of any values.
        max_rows
            Keep so many unlabelled rows, drawn at random, and all labelled ones.
        seed
            Of that draw.

        Raises
        ------
        DataError
            If a column is absent, a text is no text, a confidence no number, or nothing is left;
            names the file and the row.
        """
        extra = [labelled if isinstance(labelled, str) else None, confidence, groups]
        for column, what in zip(extra, ("already labelled", "confidence", "groups"), strict=True):
            if column is not None:
                self.require(column, what)
        wanted = [column for column in extra if column is not None]
        digest, found = hashlib.sha256(), _Found()
        for number, where, row in self._records([*self.roles.values(), *wanted]):
            sample = self._sample(row.values, where)
            found.n_read += 1
            if row.split == "test":
                found.tests += 1
                continue
            if not sample.response.strip():
                found.blank.append(where)
                continue
            for part in (sample.context, sample.instruction, sample.response):
                content = _encoded(part, where)
                digest.update(b"%d " % len(content) + content)
            found.rows.append(number)
            if isinstance(labelled, str):
                found.labels.append(_label_state(row.values.get(labelled)))
            if confidence is not None:
                found.confidence.append(_number(row.values.get(confidence), confidence, where))
            if groups is not None:
                value = row.values.get(groups)
                found.groups.append("" if value is None else str(value))
        return self._pool(found, labelled, digest.hexdigest(), max_rows, seed)

    def _pool(
        self,
        found: _Found,
        labelled: str | Collection[int] | None,
        digest: str,
        max_rows: int | None,
        seed: int,
    ) -> Pool:
        if not found.rows:
            raise DataError(
                f"{self._what}: no row has a text in column {self.text_column!r}"
                + (" outside the test split" if found.tests else "")
            )
        rows = np.array(found.rows, dtype=np.int64)
        marks = np.zeros(len(rows), dtype=np.bool_)
        notes = found.notes(self.text_column)
        if isinstance(labelled, str):
            marks = _marks(found.labels)
        elif labelled is not None:
            given = np.array(sorted(labelled), dtype=np.int64)
            outside = given[(given < 0) | (given >= found.n_read)]
            if len(outside):
                raise DataError(
                    f"already labelled: rows are numbered from 0 to {found.n_read - 1}, got "
                    f"{outside[0]}"
                )
            marks = np.isin(rows, given)
        kept = np.arange(len(rows))
        if max_rows is not None and (~marks).sum() > max_rows:
            drawn = np.random.default_rng(seed).choice(
                np.flatnonzero(~marks), max_rows, replace=False
            )
            kept = np.sort(np.concatenate([np.flatnonzero(marks), drawn]))
            notes.append(
                f"Of {count(int((~marks).sum()), 'row')} that could be picked, {max_rows:,} were "
                f"drawn at random (seed {seed})."
            )
            digest = hashlib.sha256(digest.encode() + rows[kept].tobytes()).hexdigest()
        return Pool(
            rows[kept],
            found.n_read,
            np.flatnonzero(marks[kept]).astype(np.int64),
            np.array(found.confidence)[kept] if found.confidence else None,
            [found.groups[i] for i in kept] if found.groups else None,
            digest,
            notes,
        )

    def samples(self, pool: Pool) -> Iterator[Sample]:
        """Yield the candidates in order, each as a sample (a text is a response to nothing)."""
        wanted = iter(pool.rows.tolist())
        following = next(wanted, None)
        for number, where, row in self._records(list(self.roles.values())):
            if number == following:
                yield self._sample(row.values, where)
                following = next(wanted, None)
                if following is None:
                    return
        if following is not None:
            raise DataError(f"{self._what}: the data became shorter while it was read")

    def texts(self, pool: Pool) -> Iterator[str]:
        """Yield the candidates' texts in order; of samples, all parts."""
        return (sample.text for sample in self.samples(pool))

    def fetch(self, numbers: Sequence[int]) -> PickedRows:
        """Return whole rows by number, in the order given.

        Parquet keeps its types and leaves row groups without a pick on disk; other formats are
        read through.
        """
        order = np.argsort(numbers, kind="stable")
        wanted = [int(numbers[i]) for i in order]
        back = np.argsort(order, kind="stable")
        parts = [_parquet_parts(path) for path in self.paths]
        if self.schema is not None and all(part is not None for part in parts):
            files = [file for part in parts for file in part or []]
            table = _fetched_table(files, wanted, self.schema)
            if len(table) == len(wanted):
                return PickedRows(table=table.take(back))
        else:
            places = set(wanted)
            found = {
                number: dict(row.values)
                for number, _, row in self._records(None, stop=wanted[-1])
                if number in places
            }
            if len(found) == len(places):
                return PickedRows(records=[found[int(number)] for number in numbers])
        raise DataError(f"{self._what}: the data became shorter while it was read")

    def _records(
        self, columns: list[str] | None, stop: int | None = None
    ) -> Iterator[tuple[int, str, Row]]:
        number = -1
        for path in self.paths:
            for row in iterate_rows(path, columns and list(dict.fromkeys(columns))):
                number += 1
                if stop is not None and number > stop:
                    return
                yield number, f"{path}: {row.place}", row

    def _sample(self, values: Mapping[str, object], where: str) -> Sample:
        cells = {
            "response" if role == "text" else role: _text(values.get(column), column, where)
            for role, column in self.roles.items()
        }
        return Sample(**cells)


@dataclass
class _Found:
    """What the first pass collects."""

    n_read: int = 0
    tests: int = 0
    blank: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    labels: list[bool | str] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def notes(self, column: str) -> list[str]:
        notes = []
        if self.blank:
            named = "; ".join(self.blank[:_NAMED])
            more = " and others" if len(self.blank) > _NAMED else ""
            notes.append(
                f"{count(len(self.blank), 'row')} without text in {column!r} cannot be picked "
                f"({named}{more})."
            )
        if self.tests:
            notes.append(f"{count(self.tests, 'row')} of the data's own test split were left out.")
        return notes


# Columns ------------------------------------------------------------------------------------------


def _common_columns(paths: Sequence[Path]) -> list[str]:
    found: list[list[str]] = []
    for path in paths:
        first = next(iterate_rows(path), None)
        if first is None:
            raise DataError(f"{path}: there are no rows")
        found.append(list(first.values))
        if set(found[-1]) != set(found[0]):
            raise DataError(
                f"files differ in their columns: {paths[0]} has {listed(found[0])}, {path} has "
                f"{listed(found[-1])}"
            )
    return found[0]


def _parquet_parts(path: Path) -> list[Path] | None:
    """Return the Parquet files behind a path in the order of reading; None if it is another kind.

    Those of splits that are not read (see `iterate_rows`) are not among them.
    """
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else None
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    shards = sorted(path.glob("*.parquet"))
    roles = split_roles([re.split(r"[-._]", shard.name)[0] for shard in shards])
    return [shard for shard, role in zip(shards, roles, strict=True) if role != "unused"]


def _common_schema(paths: Sequence[Path]) -> pyarrow.Schema | None:
    """Return the schema that holds every Parquet file's rows; None if there are other formats."""
    import pyarrow
    import pyarrow.parquet

    files: list[Path] = []
    for path in paths:
        parts = _parquet_parts(path)
        if parts is None:
            return None
        files += parts
    schemas = [pyarrow.parquet.read_schema(file).remove_metadata() for file in files]
    if all(schema.equals(schemas[0]) for schema in schemas):
        return schemas[0]
    try:
        return pyarrow.unify_schemas(schemas, promote_options="permissive")
    except pyarrow.ArrowException:
        for file, schema in zip(files, schemas, strict=True):
            for column in schema:
                first = schemas[0].field(column.name)
                if first.type != column.type:
                    raise DataError(
                        f"shards differ in their types: {column.name!r} is {first.type} in "
                        f"{files[0]} and {column.type} in {file}; write them with one schema"
                    ) from None
        raise


def _chosen_columns(
    names: Sequence[str], given: dict[str, str], what: str, *, samples: bool
) -> dict[str, str]:
    for role, name in given.items():
        if role not in ROLES:
            raise DataError(f"columns: there is no role {role!r}; there are: {', '.join(ROLES)}")
        if name not in names:
            raise DataError(
                f"{role}: there is no column {name!r} in {what}; there are: {listed(names)}"
            )
    plain = {name.casefold(): name for name in reversed(names)}

    def usual(role: str, besides: Mapping[str, str]) -> str | None:
        taken = set(besides.values())
        matches = (plain[name] for name in _USUAL_NAMES[role] if name in plain)
        return next((name for name in matches if name not in taken), None)

    if samples and "text" not in given:
        found = dict(given)
        for role in ("response", "instruction", "context"):
            guess = found.get(role) or usual(role, found)
            if guess is not None:
                found[role] = guess
        # An answer alone may be anything; with a question beside it, it is a sample.
        if "response" in found and (given or len(found) > 1):
            return {role: found[role] for role in ROLES if role in found}
    parts = [role for role in given if role != "text"]
    if parts:
        role = "response" if samples else "text"
        raise DataError(
            f"columns: {', '.join(parts)} given, but "
            + (
                f"no {role} in {what}; there are: {listed(names)}"
                if samples
                else "this method reads one text; give --column text=NAME"
            )
        )
    text = given.get("text") or usual("text", given) or (names[0] if len(names) == 1 else None)
    if text is None:
        raise DataError(
            f"{what}: no column has a usual name for a text; name one (--text-column NAME). There "
            f"are: {listed(names)}"
        )
    return {"text": text}


# Cells --------------------------------------------------------------------------------------------


def _text(value: object, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    raise DataError(
        f"{where}: column {column!r} holds {type(value).__name__} {str(value)[:40]!r}, not text; "
        "name the column of the text (--text-column NAME) or write it as text"
    )


def _encoded(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text has half a surrogate pair at character {error.start}, which is no "
            "character; mend it where it was cut"
        ) from None


def _number(value: object, column: str, where: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # what has no float raises
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: column {column!r} must hold numbers, got {value!r}")
    return number


def _label_state(value: object) -> bool | str:
    """Return whether a cell says that its row is labelled; "true" and "false" wait for the rest."""
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, str):
        plain = value.strip().casefold()
        return plain if plain in _TRUTH else bool(plain)
    return not (hasattr(value, "__len__") and len(value) == 0)


def _marks(states: list[bool | str]) -> NDArray[np.bool_]:
    # Text formats write booleans as words; beside other labels, "false" is a label.
    words = True not in states
    return np.array([_TRUTH[s] if isinstance(s, str) and words else bool(s) for s in states])


def read_row_numbers(path: Path) -> list[int]:
    """Return row numbers from a file.

    Parameters
    ----------
    path
        A table with a column ``row``, such as `write_picks` writes; a JSON array; or a text file of
        whole numbers with blanks, commas or line breaks between.

    Raises
    ------
    DataError
        If it is none of these.
    """
    accepted = (
        "accepted is a table with a column 'row', a JSON array, or whole numbers with blanks, "
        "commas or line breaks between"
    )
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: no such file; {accepted}")
    try:
        if suffix in (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv") or path.is_dir():
            values: list[Any] = []
            for row in iterate_rows(path):
                if "row" not in row.values:
                    raise DataError(
                        f"{path}: there is no column 'row' in {listed(row.values)}; {accepted}"
                    )
                values.append(row.values["row"])
        else:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if suffix == ".json" else re.split(r"[\s,]+", text.strip())
        values = [value for value in values if value != ""]
        numbers = [int(value) for value in values]
        whole = all(float(value) == int(value) for value in values)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a list of row numbers ({error}); {accepted}") from None
    if not whole:
        raise DataError(f"{path}: not a list of whole numbers; {accepted}")
    return numbers


# Picked rows --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PickedRows:
    """Whole rows, as an Arrow table if they come from Parquet, else as records."""

    table: pyarrow.Table | None = None
    records: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.records) if self.table is None else len(self.table)  # type: ignore[arg-type]


def _fetched_table(
    files: Sequence[Path], wanted: Sequence[int], schema: pyarrow.Schema
) -> pyarrow.Table:
    """Return rows by ascending number; only the row groups that hold one are read."""
    import pyarrow
    import pyarrow.parquet

    numbers = np.asarray(wanted)
    parts = [schema.empty_table()]
    start = 0
    for path in files:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if np.searchsorted(numbers, start) < np.searchsorted(numbers, stop):
                    for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                        low, high = np.searchsorted(numbers, [start, start + len(batch)])
                        if low < high:
                            taken = pyarrow.Table.from_batches([batch]).take(
                                numbers[low:high] - start
                            )
                            parts.append(taken.select(schema.names).cast(schema))
                        start += len(batch)
                start = stop
    return pyarrow.concat_tables(parts)


def write_picks(
    rows: PickedRows, path: Path, added: Mapping[str, Sequence[int] | Sequence[str]]
) -> dict[str, str]:
    """Write rows with further columns as a file, atomically.

    Parameters
    ----------
    rows
        What `PoolFiles.fetch` returned.
    path
        ``.parquet``, ``.jsonl`` or ``.csv``.
    added
        Columns to put after the others. One whose name is taken gets a number behind its name.

    Returns
    -------
    dict
        The name that each added column was given.
    """
    taken = (
        rows.table.column_names
        if rows.table is not None
        else list(dict.fromkeys(name for record in rows.records or [] for name in record))
    )
    named = {}
    for name in added:
        free = name
        while free in taken:
            free = f"{name}_{int(free[len(name) + 1 :] or 1) + 1}"
        named[name] = free
    columns = {named[name]: list(values) for name, values in added.items()}
    writers = {".parquet": _write_parquet, ".jsonl": _write_jsonl, ".csv": _write_csv}
    with atomic_path(path) as temporary:
        writers[path.suffix.lower()](rows, taken, columns, temporary)
    return named


def _write_parquet(
    rows: PickedRows, names: Sequence[str], columns: Mapping[str, list[Any]], path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    table = rows.table
    if table is None:
        cells = {name: [record.get(name) for record in rows.records or []] for name in names}
        table = pyarrow.table({name: _arrow_column(values) for name, values in cells.items()})
    for name, values in columns.items():
        table = table.append_column(name, pyarrow.array(values))
    pyarrow.parquet.write_table(table, path)


def _arrow_column(values: list[Any]) -> pyarrow.Array:
    """Return an Arrow array; values of no common type are written as JSON text."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
        return pyarrow.array([None if value is None else _json(value) for value in values])


def _write_jsonl(
    rows: PickedRows, names: Sequence[str], columns: Mapping[str, list[Any]], path: Path
) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        for i, record in enumerate(_records_of(rows)):
            added = {name: values[i] for name, values in columns.items()}
            stream.write(_json({**record, **added}) + "\n")


def _write_csv(
    rows: PickedRows, names: Sequence[str], columns: Mapping[str, list[Any]], path: Path
) -> None:
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*names, *columns])
        for i, record in enumerate(_records_of(rows)):
            cells = [_csv_cell(record.get(name)) for name in names]
            writer.writerow([*cells, *(values[i] for values in columns.values())])


def _records_of(rows: PickedRows) -> list[dict[str, Any]]:
    if rows.table is None:
        return rows.records or []
    records: list[dict[str, Any]] = rows.table.to_pylist()
    return records


def _csv_cell(value: object) -> object:
    if value is None:
        return ""
    return value if isinstance(value, str | int | float) else _plain_text(value)


def _plain_text(value: object) -> str:
    plain = _plain(value)
    return plain if isinstance(plain, str) else _json(value)


def _json(value: object) -> str:
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: object) -> Any:
    """Return the nearest thing that JSON knows; what it does not know at all becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if value is None or isinstance(value, str | int | bool) else str(value)
