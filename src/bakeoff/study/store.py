"""Where trials are kept: one DuckDB file beside Parquet files of unit scores.

A kill at any moment loses at most the trials that were running. A trial's files are on the disk
before the row that calls it finished, and its unit scores travel in that same row, in one DuckDB
transaction; now and then they are moved to a Parquet file, which is on the disk before the rows
point to it. So a row never promises what is not there, and whatever has no row is rubbish that the
next run sweeps out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff import __version__
from bakeoff.errors import StoreError
from bakeoff.study.design import Design

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1

Scores = dict[str, dict[str, NDArray[np.float64]]]
"""``scores[metric][task]``: one number per unit."""

_TABLES = """
CREATE TABLE meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE problems (
    fingerprint VARCHAR PRIMARY KEY,
    shared_wall_seconds DOUBLE NOT NULL,
    shared_peak_memory_bytes DOUBLE NOT NULL
);
CREATE TABLE trials (
    id VARCHAR PRIMARY KEY,
    problem VARCHAR NOT NULL,
    method VARCHAR NOT NULL,
    params JSON NOT NULL,
    seed BIGINT NOT NULL,
    method_version VARCHAR NOT NULL,
    status VARCHAR NOT NULL CHECK (status IN ('finished', 'failed')),
    summary JSON NOT NULL,         -- {metric: {task: [number of units, mean]}}
    cost JSON NOT NULL,
    notes JSON NOT NULL,
    artifact VARCHAR,              -- folder, relative to the study directory
    units VARCHAR,                 -- Parquet file in units/ with the unit scores; until there is
    pending BLOB,                  -- one, the scores themselves as an Arrow stream
    error VARCHAR,
    traceback VARCHAR,
    run_started VARCHAR NOT NULL,  -- when the run that made this trial began, ISO 8601
    run_seconds DOUBLE NOT NULL,   -- how far into that run the trial was recorded
    recorded VARCHAR NOT NULL      -- ISO 8601
);
"""

# Unit scores move to a Parquet file when there are those of so many trials, or so many bytes: one
# file per trial would be slow to write and slower to read.
_TRIALS_PER_FILE = 256
_BYTES_PER_FILE = 64 << 20

_TRIAL_FOLDER = re.compile(r"[0-9a-f]{64}")
_SCRATCH_FOLDER = re.compile(r"([0-9a-f]{64}|shared)\.[0-9a-f]{8}\.part")
_UNITS_FILE = re.compile(r"[0-9a-f]{16}\.parquet(\.part)?")


@dataclass(frozen=True)
class TrialKey:
    """Everything that identifies a trial.

    Parameters
    ----------
    problem
        The problem's fingerprint.
    design
        Its method and parameters count; its display name does not.
    seed
        Seed of the trial.
    method_version
        Version of the method's implementation.

    Examples
    --------
    >>> key = TrialKey("abc", Design("mean", "mean-pooling"), 0, "1")
    >>> key.id == TrialKey("abc", Design("average", "mean-pooling"), 0, "1").id
    True
    """

    problem: str
    design: Design
    seed: int
    method_version: str

    @property
    def id(self) -> str:
        """SHA-256 of the parts, 64 hexadecimal digits."""
        parts = [
            self.problem,
            self.design.method,
            dict(self.design.params),
            self.seed,
            self.method_version,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """The moment a trial was recorded, within the run that made it.

    Parameters
    ----------
    started
        When that run began, ISO 8601.
    seconds
        Wall time from there to the recording.
    recorded
        When the trial was recorded, ISO 8601.
    """

    started: str
    seconds: float
    recorded: str


@dataclass(frozen=True)
class StoredTrial:
    """One row of the store.

    Parameters
    ----------
    id
        See `TrialKey.id`.
    status
        ``"finished"`` or ``"failed"``.
    run
        When it was recorded.
    summary
        ``summary[metric][task]`` is ``(n_units, mean)``; empty if it failed.
    cost, notes
        As in `Trial`.
    artifact
        Folder relative to the study directory, with forward slashes.
    error, traceback
        One line, and the whole; only if it failed.
    """

    id: str
    status: Literal["finished", "failed"]
    run: Run
    summary: Mapping[str, Mapping[str, tuple[int, float]]] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    artifact: str | None = None
    error: str | None = None
    traceback: str | None = None

    @property
    def shape(self) -> dict[str, dict[str, int]]:
        """Number of units per metric and task."""
        return {
            metric: {task: n_units for task, (n_units, _) in tasks.items()}
            for metric, tasks in self.summary.items()
        }


class Store:
    """The trials of one study directory, open to one process at a time.

    Opening takes the lock, checks the version and sweeps out what a killed run left behind.

    Parameters
    ----------
    directory
        Study directory; created if absent.

    Raises
    ------
    StoreError
        If another study is running in the directory (names its process), if the store was written
        by another version (names both), if it is damaged, or if the directory cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, Store(directory) as store:
    ...     store.trials("some fingerprint")
    {}
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._units = self.directory / "units"
        self._trials = self.directory / "trials"
        try:
            for folder in (self.directory, self._units, self._trials):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the study directory {self.directory} cannot be made ({error.strerror or error}); "
                "choose one that can be written"
            ) from error
        self._lock = _Lock(self.directory / "lock")
        try:
            self._connection = _open_database(self.directory / "study.duckdb")
            self.forgotten = self._sweep()
            self._known = self._ids("TRUE")
            (self._n_pending, self._pending_bytes), *_ = self._execute(
                "SELECT count(pending), coalesce(sum(octet_length(pending)), 0) FROM trials"
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database and release the lock."""
        connection = getattr(self, "_connection", None)
        if connection is not None:
            connection.close()
        self._lock.release()

    def trials(self, problem: str) -> dict[str, StoredTrial]:
        """Return all recorded trials of the problem with this fingerprint, by id."""
        rows = self._execute(
            "SELECT id, status, summary, cost, notes, artifact, error, traceback,"
            " run_started, run_seconds, recorded FROM trials WHERE problem = ?",
            [problem],
        )
        return {row[0]: _stored_trial(row) for row in rows}

    def scratch(self, name: str = "shared") -> Path:
        """Return the path of a new folder (not made yet) for the trial with this id.

        Every attempt gets its own, so that a worker that outlived its killed study cannot write
        into the folder of the attempt that replaces it.
        """
        return self._trials / f"{name}.{secrets.token_hex(4)}.part"

    def discard(self, scratch: Path) -> None:
        """Remove a scratch folder and what is in it."""
        shutil.rmtree(scratch, ignore_errors=True)

    def finish(
        self,
        key: TrialKey,
        scores: Scores,
        *,
        cost: Mapping[str, float],
        notes: Iterable[str],
        scratch: Path,
        artifact: Path | None,
        run: Run,
    ) -> StoredTrial:
        """Record a finished trial; when this returns, it survives a kill or a power cut.

        Parameters
        ----------
        key
            What was run.
        scores
            Unit scores, finite.
        cost, notes
            As in `Trial`.
        scratch
            The trial's folder, whose files are already on the disk (see `sync_tree`); it is kept
            under the trial's id, or removed if empty.
        artifact
            A folder inside `scratch`, or `scratch` itself.
        run
            When this happens.
        """
        with self._guard_writing():
            kept = self._keep_files(key.id, scratch)
        if artifact is not None:
            artifact = (kept / artifact.relative_to(scratch)).relative_to(self.directory)
        stored = StoredTrial(
            id=key.id,
            status="finished",
            run=run,
            summary={
                metric: {task: (len(s), float(np.mean(s))) for task, s in tasks.items()}
                for metric, tasks in scores.items()
            },
            cost=dict(cost),
            notes=tuple(notes),
            artifact=None if artifact is None else artifact.as_posix(),
        )
        pending = _to_stream(_units_table(key.id, scores))
        self._record(key, stored, pending)
        self._n_pending += 1
        self._pending_bytes += len(pending)
        if self._n_pending >= _TRIALS_PER_FILE or self._pending_bytes >= _BYTES_PER_FILE:
            self.flush()
        return stored

    def fail(
        self, key: TrialKey, *, error: str, traceback: str, scratch: Path, run: Run
    ) -> StoredTrial:
        """Record a failed trial; the next run tries it again."""
        self.discard(scratch)
        stored = StoredTrial(id=key.id, status="failed", run=run, error=error, traceback=traceback)
        self._record(key, stored, None)
        return stored

    def scores(self, ids: Collection[str]) -> dict[str, Scores]:
        """Return the unit scores of these finished trials, by id."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = set(ids)
        rows = self._execute("SELECT id, units FROM trials WHERE units IS NOT NULL")
        found: dict[str, Scores] = {}
        for table in self._pending_tables():
            _add_scores(found, table, wanted)
        for file in sorted({file for trial, file in rows if trial in wanted}):
            try:
                _add_scores(found, pq.ParquetFile(self._units / file).read(), wanted)
            except (OSError, pa.ArrowException, KeyError) as error:
                raise StoreError(
                    f"{self._units / file} is damaged ({error}); delete it and run the study "
                    "again: only the trials in it are repeated"
                ) from error
        return found

    def flush(self) -> None:
        """Move unit scores that are still in the database to a Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = self._pending_tables()
        if not tables:
            return
        name = f"{secrets.token_hex(8)}.parquet"
        part = self._units / f"{name}.part"
        with self._guard_writing():
            pq.write_table(pa.concat_tables(tables), part)
            _sync(part)
            os.replace(part, self._units / name)
            _sync(self._units)
        self._execute(
            "UPDATE trials SET units = ?, pending = NULL WHERE pending IS NOT NULL", [name]
        )
        self._n_pending = self._pending_bytes = 0

    def add_shared_cost(self, problem: str, wall_seconds: float, peak_memory_bytes: float) -> None:
        """Add to the cost of work that the problem's designs share.

        Wall time adds up over runs (a later run may have prepared for further designs); memory is
        the largest peak.
        """
        self._execute(
            "INSERT INTO problems VALUES (?, ?, ?) ON CONFLICT (fingerprint) DO UPDATE SET"
            " shared_wall_seconds = shared_wall_seconds + excluded.shared_wall_seconds,"
            " shared_peak_memory_bytes ="
            " greatest(shared_peak_memory_bytes, excluded.shared_peak_memory_bytes)",
            [problem, wall_seconds, peak_memory_bytes],
        )

    def shared_cost(self, problem: str) -> dict[str, float]:
        """Return ``wall_seconds`` and ``peak_memory_bytes`` of the shared work so far."""
        rows = self._execute(
            "SELECT shared_wall_seconds, shared_peak_memory_bytes FROM problems"
            " WHERE fingerprint = ?",
            [problem],
        )
        wall_seconds, peak_memory_bytes = rows[0] if rows else (0.0, 0.0)
        return {"wall_seconds": wall_seconds, "peak_memory_bytes": peak_memory_bytes}

    def _execute(self, statement: str, parameters: list[Any] | None = None) -> list[Any]:
        import duckdb

        try:
            return list(self._connection.execute(statement, parameters).fetchall())
        except duckdb.Error as error:
            raise StoreError(
                f"{self.directory / 'study.duckdb'} cannot be used ({_first_line(error)}); "
                "the file is kept as it is"
            ) from error

    @contextmanager
    def _guard_writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the study directory {self.directory} cannot be written "
                f"({error.strerror or error}); finished trials are kept: make room or mend the "
                "rights, then run the study again"
            ) from error

    def _keep_files(self, trial_id: str, scratch: Path) -> Path:
        kept = self._trials / trial_id
        if not scratch.is_dir() or not any(scratch.iterdir()):
            self.discard(scratch)
            return kept
        self.discard(kept)
        scratch.rename(kept)
        _sync(self._trials)
        return kept

    def _ids(self, condition: str) -> set[str]:
        return {row[0] for row in self._execute(f"SELECT id FROM trials WHERE {condition}")}

    def _pending_tables(self) -> list[pa.Table]:
        import pyarrow as pa

        rows = self._execute("SELECT pending FROM trials WHERE pending IS NOT NULL")
        return [pa.ipc.open_stream(row[0]).read_all() for row in rows]

    def _record(self, key: TrialKey, stored: StoredTrial, pending: bytes | None) -> None:
        # OR REPLACE costs a search more, so only where there is a row to replace.
        insert = "INSERT OR REPLACE" if key.id in self._known else "INSERT"
        self._known.add(key.id)
        self._execute(
            f"{insert} INTO trials VALUES (?,?,?,?,?,?,?,?,?,?,?,NULL,?,?,?,?,?,?)",
            [
                stored.id,
                key.problem,
                key.design.method,
                json.dumps(dict(key.design.params), sort_keys=True),
                key.seed,
                key.method_version,
                stored.status,
                json.dumps(stored.summary),
                json.dumps(stored.cost),
                json.dumps(stored.notes),
                stored.artifact,
                pending,
                stored.error,
                stored.traceback,
                stored.run.started,
                stored.run.seconds,
                stored.run.recorded,
            ],
        )

    def _sweep(self) -> int:
        """Remove what no row refers to; return how many rows had lost their unit scores.

        Such rows are dropped, so that their trials are run again.
        """
        present = {entry.name for entry in os.scandir(self._units)}
        rows = self._execute("SELECT DISTINCT units FROM trials WHERE units IS NOT NULL")
        referred = {row[0] for row in rows}
        missing = sorted(referred - present)
        forgotten = self._execute(
            "DELETE FROM trials WHERE units IN (SELECT unnest(?)) RETURNING id", [missing]
        )
        for name in present - referred:
            if _UNITS_FILE.fullmatch(name):
                (self._units / name).unlink(missing_ok=True)
        finished = self._ids("status = 'finished'")
        for entry in os.scandir(self._trials):
            unfinished = _TRIAL_FOLDER.fullmatch(entry.name) and entry.name not in finished
            if unfinished or _SCRATCH_FOLDER.fullmatch(entry.name):
                shutil.rmtree(entry.path, ignore_errors=True)
        return len(forgotten)


class _Lock:
    """A lock that the operating system releases when its process ends, however it ends."""

    # Windows forbids others to read a locked range, so the lock lies beyond the text.
    _FAR = 1 << 30

    def __init__(self, path: Path) -> None:
        self._stream: IO[str] | None = None
        try:
            stream = open(path, "a+", encoding="ascii")  # noqa: SIM115 (held until release)
        except OSError as error:
            raise StoreError(
                f"the study directory {path.parent} cannot be written "
                f"({error.strerror or error}); choose one that can"
            ) from error
        try:
            self._acquire(stream)
        except OSError:
            stream.seek(0)
            holder = stream.read().strip()
            stream.close()
            raise StoreError(
                f"another study is running in {path.parent} (process {holder or 'unknown'}); "
                "wait for it, stop it, or choose another directory"
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        self._stream = stream

    def release(self) -> None:
        if self._stream is not None:
            self._stream.truncate(0)
            self._stream.close()
            self._stream = None

    def _acquire(self, stream: IO[str]) -> None:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(self._FAR)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_tree(folder: Path) -> None:
    """Force every file and folder below (and including) `folder` onto the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for file in files:
            path = Path(parent, file)
            if path.is_file():
                _sync(path)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; it journals their entries itself
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_database(path: Path) -> Any:
    """Open the DuckDB file, made first if absent, after checking that it is ours and whole."""
    import duckdb

    # One thread: statements are tiny, and the cores belong to the trials.
    config = {"threads": 1}
    try:
        if not path.exists():
            _create_database(path, config)
        connection = duckdb.connect(str(path), config=config)
        tables = {row[0] for row in connection.execute("SHOW TABLES").fetchall()}
        meta = (
            dict(connection.execute("SELECT key, value FROM meta").fetchall())
            if "meta" in tables
            else {}
        )
    except (duckdb.Error, UnicodeDecodeError) as error:
        reason = _first_line(error)
        if "set lock on file" in reason or "used by another process" in reason:
            raise StoreError(f"{path} is open in another program: {reason}") from error
        raise StoreError(
            f"{path} is damaged or was written by a newer DuckDB than {duckdb.__version__} "
            f"({reason}); the file is kept: put a copy back, or choose another directory"
        ) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror or error})") from error
    found = meta.get("schema_version")
    if found != str(SCHEMA_VERSION):
        connection.close()
        if found is None:
            raise StoreError(f"{path} is not a bakeoff store; choose another directory")
        raise StoreError(
            f"{path} has store version {found}, written by bakeoff "
            f"{meta.get('bakeoff_version', 'unknown')}; this is bakeoff {__version__}, which reads "
            f"store version {SCHEMA_VERSION}: use that version, or choose another directory"
        )
    return connection


def _create_database(path: Path, config: Mapping[str, Any]) -> None:
    """Make the file under another name first: a kill in the middle must not leave half a store."""
    import duckdb

    new = path.with_name(f".{path.name}.part")
    for leftover in (new, new.with_name(f"{new.name}.wal")):
        leftover.unlink(missing_ok=True)
    with duckdb.connect(str(new), config=dict(config)) as connection:
        connection.execute(_TABLES)
        connection.execute(
            "INSERT INTO meta VALUES ('schema_version', ?), ('bakeoff_version', ?)",
            [str(SCHEMA_VERSION), __version__],
        )
    _sync(new)
    os.replace(new, path)
    _sync(path.parent)


def _units_table(trial: str, scores: Scores) -> pa.Table:
    """Return one row per metric and task, with the list of its unit scores."""
    import pyarrow as pa

    rows = [
        (metric, task, values) for metric, tasks in scores.items() for task, values in tasks.items()
    ]
    return pa.table(
        {
            "trial": pa.array([trial] * len(rows), pa.string()),
            "metric": pa.array([row[0] for row in rows], pa.string()),
            "task": pa.array([row[1] for row in rows], pa.string()),
            "scores": pa.array([row[2] for row in rows], pa.list_(pa.float64())),
        }
    )


def _to_stream(table: pa.Table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _add_scores(found: dict[str, Scores], table: pa.Table, wanted: Collection[str]) -> None:
    lists = table["scores"].combine_chunks()
    values = lists.values.to_numpy()
    offsets = lists.offsets.to_numpy()
    names = zip(*(table[column].to_pylist() for column in ("trial", "metric", "task")), strict=True)
    for row, (trial, metric, task) in enumerate(names):
        if trial in wanted:
            chosen = values[offsets[row] : offsets[row + 1]]
            found.setdefault(trial, {}).setdefault(metric, {})[task] = chosen


def _stored_trial(row: tuple[Any, ...]) -> StoredTrial:
    summary = {
        metric: {task: (int(n_units), float(mean)) for task, (n_units, mean) in tasks.items()}
        for metric, tasks in json.loads(row[2]).items()
    }
    return StoredTrial(
        id=row[0],
        status=row[1],
        summary=summary,
        cost=json.loads(row[3]),
        notes=tuple(json.loads(row[4])),
        artifact=row[5],
        error=row[6],
        traceback=row[7],
        run=Run(row[8], row[9], row[10]),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
