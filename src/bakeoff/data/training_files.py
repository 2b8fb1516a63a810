"""The user's files as a training pool: what can be trained on, and what the target looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bakeoff.data.formats import count
from bakeoff.data.pool_files import PoolFiles
from bakeoff.data.samples import Sample, TrainingPool
from bakeoff.data.splits import normalise, position
from bakeoff.errors import DataError

_SOURCE = "source"


def training_pool(
    paths: Sequence[Path],
    target: Path,
    *,
    columns: Mapping[str, str] | None = None,
    max_texts: int | None = None,
    max_test: int = 500,
    seed: int = 0,
    name: str | None = None,
) -> TrainingPool:
    """Read a pool to train on, and a target whose rows are split into queries and tests.

    Parameters
    ----------
    paths
        The pool: files or folders with texts, or with instruction and response (and context). A
        column ``source`` says where each row comes from.
    target
        A file of the same kind with at least 4 rows that look like what the model is for. Half of
        them, drawn by content, are queries that designs may see; the others, at most `max_test`,
        are for testing.
    columns
        Column name by role: ``text``, or ``context``, ``instruction`` and ``response``.
    max_texts
        At most so many rows of the pool, drawn at random.
    seed
        Another seed splits and draws otherwise.
    name
        For reports; the pool's file names by default.

    Returns
    -------
    TrainingPool
        Pool rows that are also tests are left out; its notes say how many.

    Raises
    ------
    DataError
        If a file cannot be read, the target is too small, or nothing is left in the pool.
    """
    label = name or ", ".join(Path(path).name for path in paths)
    files = PoolFiles([Path(path) for path in paths], columns=columns, samples=True)
    source = _SOURCE if _SOURCE in files.names else None
    found = files.scan(groups=source, max_rows=max_texts, seed=seed)
    groups = found.groups or [""] * len(found)
    samples = [
        replace(sample, source=group)
        for sample, group in zip(files.samples(found), groups, strict=True)
    ]
    queries, tests = _split(_read(Path(target), files), target, max_test, seed)
    held_out = {normalise(sample.text) for sample in tests}
    kept = [sample for sample in samples if normalise(sample.text) not in held_out]
    if not kept:
        raise DataError(f"{label}: every row of the pool is also a test row of {target}")
    notes = [*found.notes]
    if len(kept) < len(samples):
        notes.append(
            f"{count(len(samples) - len(kept), 'row')} of the pool left out: also among the tests."
        )
    notes.append(f"{Path(target).name}: {len(queries):,} queries, {len(tests):,} tests.")
    return TrainingPool(label, tuple(kept), queries, tests, notes=tuple(notes))


def _read(target: Path, pool: PoolFiles) -> list[Sample]:
    """Read the target by the pool's columns or, where it has others, by those of usual names."""
    try:
        own = PoolFiles([target], columns=pool.roles, samples=True)
    except DataError:
        own = PoolFiles([target], samples=True)
    return list(own.samples(own.scan()))


def _split(
    rows: Sequence[Sample], target: Path, max_test: int, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    distinct = list({normalise(sample.text): sample for sample in rows}.values())
    if len(distinct) < 4:
        raise DataError(f"{target}: a target needs at least 4 distinct rows, got {len(distinct)}")
    distinct.sort(key=lambda sample: position(sample.text, seed))
    half = len(distinct) // 2
    return tuple(distinct[:half]), tuple(distinct[half:][:max_test])
