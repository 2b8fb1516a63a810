"""The user's own files as training pairs and tasks.

Reading is one pass: rows stream by, cells are checked, and where a maximum is set only a sample
chosen by hash stays in memory. Nothing is unpickled or executed.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bakeoff.data.formats import PathLike, Row, count, iterate_rows, listed
from bakeoff.data.splits import (
    hold_out,
    hold_out_by_label,
    normalise,
    sample,
    without_task_texts,
)
from bakeoff.data.tasks import (
    ClassificationTask,
    ClusteringTask,
    EmbeddingData,
    RetrievalTask,
    SimilarityTask,
    Task,
    TextPairs,
)
from bakeoff.errors import DataError

MINIMUM_ROWS = 10
"""Fewer distinct rows than this cannot be split into anything that a statistic could be made of."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    "pairs": ("text", "positive"),
    "labelled": ("text", "label"),
    "scored": ("text", "positive", "score"),
}
"""The roles that each layout needs; pairs may have a negative besides."""

_MEANING = {
    "text": "the text or query",
    "positive": "the text that belongs to it, or the second text of a scored pair",
    "negative": "a text that does not belong to it",
    "label": "the class",
    "score": "how similar the two texts are",
}

_USUAL_NAMES = {
    "text": (
        *("text", "anchor", "query", "question", "sentence", "sentence1", "sentence_1"),
        *("sentence_a", "text1", "text_1", "text_a", "docstring", "prompt", "premise", "content"),
        *("comment", "review", "snippet", "utterance", "headline"),
    ),
    "positive": (
        *("positive", "pos", "positive_text", "answer", "document", "doc", "passage", "context"),
        *("response", "reply", "code", "sentence2", "sentence_2", "sentence_b", "text2", "text_2"),
        *("text_b", "hypothesis", "completion", "paraphrase"),
    ),
    "negative": ("negative", "neg", "negative_text", "hard_negative", "negative_passage"),
    "label": (
        *("label", "labels", "class", "category", "target", "topic", "intent", "label_text"),
        *("sentiment", "genre"),
    ),
    "score": ("score", "scores", "similarity", "similarity_score", "sim", "gold", "relatedness"),
}

NO_PAIRS = "There are no training pairs in these files: only designs without training run."
"""A note that concerns embedding alone."""

# What people call the two texts of a scored pair when they name the columns themselves.
_ROLE_ALIASES = {"text_a": "text", "text_b": "positive"}


def embedding_data(
    paths: PathLike | Sequence[PathLike],
    *,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    test_fraction: float = 0.2,
    max_test: int = 1000,
    seed: int = 0,
    max_texts: int | None = None,
    name: str | None = None,
) -> EmbeddingData:
    r"""Turn the user's files into training pairs and held-out tasks, one group of them per file.

    What a file becomes follows from its columns:

    - *pairs* or triplets (text, positive, and perhaps negative): training pairs, and a retrieval
      task over the held-out queries. Its pool is made of the held-out positives and negatives.
    - *labelled* texts (text, label): a classification task, and a clustering task over its test
      texts where every class has at least two on average.
    - *scored* pairs (text, positive, score): a similarity task.

    Rows are held out by hash of their content, never by order, and texts that are equal but for
    case and spacing are never on both sides; a `datasets` folder or Parquet shards with a train and
    a test split (or validation, if there is no test) keep their split. No text of any task is left
    in the training pairs of any file.

    Parameters
    ----------
    paths
        One or several of what `read_table` accepts.
    columns
        Column name by role, for names that are not guessed or match twice: roles are ``"text"``,
        ``"positive"``, ``"negative"``, ``"label"`` and ``"score"``, and ``"text_a"``, ``"text_b"``
        for the two texts of a scored pair.
    task
        ``"pairs"``, ``"labelled"`` or ``"scored"``, where columns allow several.
    test_fraction
        Part of the rows (of each class, if labelled) to hold out, in (0, 1). All scored pairs are
        held out, because none are trained on.
    max_test
        At most this many held-out rows per file.
    seed
        Another seed holds out, and samples, other rows.
    max_texts
        Use at most this many texts: rows are sampled by hash while reading, the same number from
        each file. None uses all.
    name
        For reports; the files' names by default.

    Returns
    -------
    EmbeddingData
        Its notes say which column was taken for what, and what was dropped and why.

    Raises
    ------
    DataError
        If a file cannot be read; a column is missing or doubly matching; cells are missing, blank,
        or not text; there are fewer than 10 distinct rows, one class only, constant scores, or
        texts that are all identical. The message names file, column and the first rows concerned.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "faq.csv"
    >>> lines = [f"question {i},answer {i}" for i in range(50)]
    >>> _ = path.write_text("\n".join(["query,answer", *lines]))
    >>> data = embedding_data(path)
    >>> len(data.train[0]), len(data.tasks[0].queries)
    (40, 10)
    """
    files = _files(paths)
    settings = _checked_settings(files, columns, task, test_fraction, max_test, seed, max_texts)
    names = _distinct_names(files)
    parts = [_read_part(file, label, settings) for file, label in zip(files, names, strict=True)]
    tasks = tuple(task for part in parts for task in part.tasks)
    train, n_removed = without_task_texts([pairs for part in parts for pairs in part.train], tasks)
    notes = [note for part in parts for note in part.notes]
    if n_removed:
        notes.append(
            f"{count(n_removed, 'training row')} left out because another file holds a text of "
            "theirs out for testing."
        )
    if not train:
        notes.append(NO_PAIRS)
    return EmbeddingData(name or ", ".join(names), train, tasks, tuple(notes))


# --- settings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    columns: Mapping[str, str]
    task: str | None
    test_fraction: float
    max_test: int
    seed: int
    max_texts: int | None


def _files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    if isinstance(paths, str | os.PathLike):
        return [Path(paths).expanduser()]
    return [Path(path).expanduser() for path in paths]


def _checked_settings(
    files: Sequence[Path],
    columns: Mapping[str, str] | None,
    task: str | None,
    test_fraction: float,
    max_test: int,
    seed: int,
    max_texts: int | None,
) -> _Settings:
    if not files:
        raise DataError("paths is empty: give at least one file")
    if len({file.resolve() for file in files}) < len(files):
        raise DataError(f"paths names a file twice: {', '.join(map(str, files))}")
    if task is not None and task not in LAYOUTS:
        raise DataError(f"task must be one of {listed(LAYOUTS)} or None, got {task!r}")
    for argument, value in (("max_test", max_test), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{argument} must be an integer, got {value!r}")
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, got {test_fraction!r}")
    if max_test < 2:
        raise DataError(f"max_test must be at least 2, got {max_test!r}")
    if max_texts is not None and max_texts < 3 * MINIMUM_ROWS * len(files):
        raise DataError(
            f"max_texts must be at least {3 * MINIMUM_ROWS} per file, got {max_texts!r} for "
            f"{count(len(files), 'file')}"
        )
    roles = {_ROLE_ALIASES.get(role, role): column for role, column in (columns or {}).items()}
    unknown = [role for role in roles if role not in _MEANING]
    if unknown:
        raise DataError(
            f"unknown role {unknown[0]!r} in --column {unknown[0]}={roles[unknown[0]]}; roles are "
            f"{listed([*_MEANING, *_ROLE_ALIASES])}"
        )
    share = None if max_texts is None else max_texts // len(files)
    return _Settings(roles, task, test_fraction, max_test, seed, share)


def _distinct_names(files: Sequence[Path]) -> list[str]:
    """Name each file by its stem, and number those that share one."""
    stems = [file.resolve().stem if not file.is_dir() else file.resolve().name for file in files]
    counts: Counter[str] = Counter()
    names = []
    for stem in stems:
        counts[stem] += 1
        names.append(stem if counts[stem] == 1 else f"{stem} {counts[stem]}")
    return names


# --- one file: columns, cells, layout ---------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    train: tuple[TextPairs, ...] = ()
    tasks: tuple[Task, ...] = ()
    notes: tuple[str, ...] = ()


class _Record(NamedTuple):
    """A row that passed its checks: texts in order of role, and a label or score."""

    split: str | None
    texts: tuple[str, ...]
    value: str | float | None


@dataclass
class _BadCells:
    """How many cells of a column cannot be used, and where the first three stand."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.first) < 3:
            self.first.append(place)


@dataclass
class _File:
    """What the three layouts need to know about the file that they are made from."""

    path: Path
    name: str
    roles: Mapping[str, str]
    settings: _Settings
    notes: list[str] = field(default_factory=list)

    def error(self, message: str) -> DataError:
        return DataError(f"{self.path}: {message}")

    def dropped(self, n: int, what: str) -> None:
        if n:
            self.notes.append(f"{self.path.name}: {count(n, 'row')} left out, {what}.")


def _read_part(path: Path, name: str, settings: _Settings) -> _Part:
    # A JSON record may lack an optional key, so the columns are those of the first rows together.
    first = list(islice(iterate_rows(path), 100))
    if not first:
        raise DataError(f"{path}: the file is empty; it must hold at least {MINIMUM_ROWS} rows")
    found = list(dict.fromkeys(column for row in first for column in row.values))
    layout, roles = _layout(path, found, settings)
    file = _File(path, name, roles, settings)
    records, n_rows = _records(file, layout, iterate_rows(path, roles.values()))
    file.notes.append(
        f"{path.name}: {count(n_rows, 'row')} read as {layout}; "
        + ", ".join(f"{role} from column {column!r}" for role, column in roles.items())
        + (f"; {len(records):,} of them sampled" if len(records) < n_rows else "")
        + "."
    )
    # Of copies the first is kept: a text that the file has in both splits is to be tested on.
    records.sort(key=lambda record: record.split != "test")
    build = {"pairs": _pairs_part, "labelled": _labelled_part, "scored": _scored_part}[layout]
    part = build(file, records)
    return _Part(part.train, part.tasks, tuple(file.notes))


def _layout(path: Path, found: Sequence[str], settings: _Settings) -> tuple[str, dict[str, str]]:
    """Decide what the file is and which column plays which role."""
    for role, column in settings.columns.items():
        if column not in found:
            raise DataError(
                f"{path}: --column {role}={column}: no such column; columns found: {listed(found)}"
            )
    matches = _matches(found, settings.columns)
    layout = settings.task or _guessed_layout(path, found, matches, settings.columns)
    if layout == "labelled" and not matches["text"]:
        matches["text"] = matches["positive"]  # a labelled "document" or "passage" is the text
    needed = LAYOUTS[layout]
    optional = ("negative",) if layout == "pairs" and matches["negative"] else ()
    roles: dict[str, str] = {}
    for role in (*needed, *optional):
        candidates = matches[role]
        if not candidates:
            raise DataError(
                f"{path}: no column for {role!r} ({_MEANING[role]}). Columns found: "
                f"{listed(found)}. Names recognised: {', '.join(_USUAL_NAMES[role])}. Name yours "
                f"with --column {role}=NAME"
            )
        if len(candidates) > 1:
            raise DataError(
                f"{path}: columns {listed(candidates)} could each be {role!r} ({_MEANING[role]}). "
                f"Columns found: {listed(found)}. Choose with --column {role}=NAME"
            )
        roles[role] = candidates[0]
    taken = Counter(roles.values())
    twice = [column for column, n in taken.items() if n > 1]
    if twice:
        both = [role for role, column in roles.items() if column == twice[0]]
        raise DataError(f"{path}: column {twice[0]!r} cannot be {' and '.join(map(repr, both))}")
    return layout, roles


def _matches(found: Sequence[str], chosen: Mapping[str, str]) -> dict[str, list[str]]:
    matches = {}
    for role, names in _USUAL_NAMES.items():
        if role in chosen:
            matches[role] = [chosen[role]]
        else:
            free = (column for column in found if column not in chosen.values())
            matches[role] = [column for column in free if _canonical(column) in names]
    return matches


def _canonical(column: str) -> str:
    return re.sub(r"[\s-]+", "_", column.strip().casefold())


def _guessed_layout(
    path: Path,
    found: Sequence[str],
    matches: Mapping[str, Sequence[str]],
    chosen: Mapping[str, str],
) -> str:
    if "score" in chosen:
        return "scored"
    if "label" in chosen and "positive" not in chosen:
        return "labelled"
    if "positive" in chosen or "negative" in chosen:
        return "scored" if matches["score"] and not matches["negative"] else "pairs"
    texts, positive = bool(matches["text"]), bool(matches["positive"])
    label, score = bool(matches["label"]), bool(matches["score"])
    if label and positive and texts:
        raise DataError(
            f"{path}: the columns allow several readings: {listed(found)}. Choose one with "
            "--task pairs, --task labelled or --task scored"
        )
    if label and (texts or positive):
        return "labelled"
    if texts and positive:
        return "scored" if score and not matches["negative"] else "pairs"
    raise DataError(
        f"{path}: columns are not recognised. Columns found: {listed(found)}. Accepted are pairs "
        "(text, positive, and perhaps negative), labelled texts (text, label) and scored pairs "
        "(text, positive, score). Name yours with --column text=NAME --column positive=NAME, or "
        "--column text=NAME --column label=NAME"
        + (" (the first line must name the columns)" if path.suffix in (".csv", ".tsv") else "")
    )


def _records(file: _File, layout: str, rows: Iterable[Row]) -> tuple[list[_Record], int]:
    """Check every row, and keep all of them or a sample by hash."""
    text_roles = [role for role in ("text", "positive", "negative") if role in file.roles]
    value_role = {"labelled": "label", "scored": "score"}.get(layout)
    bad: dict[tuple[str, str], _BadCells] = defaultdict(_BadCells)
    n_rows = 0

    def checked() -> Iterator[_Record]:
        nonlocal n_rows
        for row in rows:
            n_rows += 1
            texts: list[str] = []
            for role in text_roles:
                cell = row.values.get(file.roles[role])
                problem = _text_problem(cell)
                if problem is None and isinstance(cell, str):
                    texts.append(cell)
                else:
                    bad[role, "text"].add(f"{row.place} ({problem})")
            value: str | float | None = None
            if value_role is not None:
                cell = row.values.get(file.roles[value_role])
                value = _label(cell) if value_role == "label" else _score(cell)
                if value is None:
                    kind = "a label" if value_role == "label" else "a finite number"
                    bad[value_role, kind].add(f"{row.place} ({_description(cell)})")
            if not bad:
                yield _Record(row.split, tuple(texts), value)

    limit = file.settings.max_texts
    n_kept = None if limit is None else limit // len(text_roles)
    records = sample(checked(), n_kept, file.settings.seed, key=lambda r: "\0".join(r.texts))
    if bad:
        (role, kind), cells = next(iter(bad.items()))
        raise file.error(
            f"column {file.roles[role]!r}: {count(cells.count, 'cell')} "
            f"{'is' if cells.count == 1 else 'are'} not {kind}: {', '.join(cells.first)}"
            + (", ..." if cells.count > len(cells.first) else "")
            + "; mend or remove these rows"
        )
    return records, n_rows


def _text_problem(cell: object) -> str | None:
    if not isinstance(cell, str):
        return _description(cell)
    if not cell or cell.isspace():
        return "blank"
    try:
        cell.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, which no tokenizer accepts"
    return None


def _label(cell: object) -> str | None:
    if isinstance(cell, str):
        return cell.strip() or None
    if isinstance(cell, float):  # integers with gaps arrive as floats; other floats are no classes
        return str(int(cell)) if math.isfinite(cell) and cell.is_integer() else None
    return str(cell) if isinstance(cell, int) else None


def _score(cell: object) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return None
    try:
        number = float(cell)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _description(cell: object) -> str:
    if cell is None:
        return "missing"
    if isinstance(cell, str):
        return f"the text {cell[:30]!r}" if cell.strip() else "blank"
    if isinstance(cell, float) and math.isnan(cell):
        return "missing: NaN"
    if isinstance(cell, bool | int | float):
        return f"the {'value' if isinstance(cell, bool) else 'number'} {cell}"
    return f"a {type(cell).__name__}"


# --- the three layouts ------------------------------------------------------------------------


def _pairs_part(file: _File, records: list[_Record]) -> _Part:
    rows = _distinct(file, records, key=lambda record: tuple(map(normalise, record.texts)))
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        answers[normalise(row.texts[0])].add(normalise(row.texts[1]))
    rows = _without_contradictions(file, rows, answers)
    _check_enough(file, rows, ("text", "positive"))
    test_rows, train_rows = _split_pairs(file, rows)
    task = _retrieval(file, test_rows, train_rows, answers)
    held_out = {normalise(text) for text in (*task.queries, *task.documents)}
    # The rest of a held-out row is in nobody's pool, but its texts are still spoken for.
    held_out.update(normalise(text) for row in test_rows for text in row.texts[:2])
    clean = [row for row in train_rows if held_out.isdisjoint(map(normalise, row.texts))]
    file.dropped(
        len(train_rows) - len(clean), "because a text of theirs is held out in another row"
    )
    has_negatives = "negative" in file.roles
    train = TextPairs(
        tuple(row.texts[0] for row in clean),
        tuple(row.texts[1] for row in clean),
        tuple(row.texts[2] for row in clean) if has_negatives else None,
        file.name,
    )
    file.notes.append(
        f"{file.path.name}: {len(task.queries):,} queries are held out, to be found among "
        f"{len(task.documents):,} documents; {len(clean):,} rows train."
    )
    return _Part((train,) if clean else (), (task,))


def _without_contradictions(
    file: _File, rows: list[_Record], answers: Mapping[str, set[str]]
) -> list[_Record]:
    """Drop triplets whose negative is an answer to the same query."""
    if "negative" not in file.roles:
        return rows
    kept = [row for row in rows if normalise(row.texts[2]) not in answers[normalise(row.texts[0])]]
    file.dropped(len(rows) - len(kept), "because their negative is a positive of the same query")
    return kept


def _split_pairs(file: _File, rows: list[_Record]) -> tuple[list[_Record], list[_Record]]:
    settings = file.settings
    if any(row.split == "test" for row in rows):
        test = [row for row in rows if row.split == "test"]
        test = sample(test, settings.max_test, settings.seed, key=lambda row: "\0".join(row.texts))
        return test, [row for row in rows if row.split != "test"]
    mask = hold_out(
        [row.texts[:2] for row in rows],
        fraction=settings.test_fraction,
        seed=settings.seed,
        maximum=settings.max_test,
    )
    test = [row for row, held in zip(rows, mask, strict=True) if held]
    if len(test) < 2:
        raise file.error(
            f"cannot be split: nearly all of its {len(rows):,} rows are linked by texts that they "
            "share, so that none can be held out without its query or positive being trained on"
        )
    return test, [row for row, held in zip(rows, mask, strict=True) if not held]


def _retrieval(
    file: _File,
    test: list[_Record],
    train: list[_Record],
    answers: Mapping[str, set[str]],
) -> RetrievalTask:
    """Build the task: each query once, each document once, exactly one right answer in the pool.

    `answers` are all that the file knows, those of rows dropped since included.
    """
    first: dict[str, _Record] = {}
    for row in test:
        first.setdefault(normalise(row.texts[0]), row)
    chosen = {normalise(row.texts[1]) for row in first.values()}
    clear = {query: row for query, row in first.items() if len(answers[query] & chosen) == 1}
    file.dropped(
        len(test) - len(clear),
        "held out with a query that has another answer (a query is asked once, for one answer)",
    )
    if len(clear) < 2:
        raise file.error("fewer than 2 held-out queries have exactly one answer: nothing to rank")
    pool: dict[str, str] = {}
    for row in clear.values():
        pool.setdefault(normalise(row.texts[1]), row.texts[1])
    if len(pool) < 2:
        raise file.error("all held-out queries have the same positive: nothing to rank")
    relevant_of = {document: index for index, document in enumerate(pool)}
    # A distractor must not have been trained on, nor be a right answer kept out of the pool.
    taken = {normalise(text) for row in train for text in row.texts}
    taken.update(answer for query in clear for answer in answers[query])
    for row in clear.values():
        for negative in row.texts[2:]:
            if normalise(negative) not in taken:
                pool.setdefault(normalise(negative), negative)
    return RetrievalTask(
        f"{file.name} retrieval",
        tuple(row.texts[0] for row in clear.values()),
        tuple(pool.values()),
        np.array([relevant_of[normalise(row.texts[1])] for row in clear.values()]),
    )


def _labelled_part(file: _File, records: list[_Record]) -> _Part:
    rows = _distinct(file, records, key=lambda record: (normalise(record.texts[0]),))
    label_of = {normalise(row.texts[0]): row.value for row in rows}
    n_conflicts = sum(label_of[normalise(row.texts[0])] != row.value for row in records)
    if n_conflicts:
        file.notes.append(
            f"{file.path.name}: {count(n_conflicts, 'row')} repeat a text with another label; the "
            "first label counts."
        )
    _check_enough(file, rows, ("text",))
    texts = [row.texts[0] for row in rows]
    labels = [str(row.value) for row in rows]
    sizes = Counter(labels)
    if len(sizes) < 2:
        raise file.error(
            f"column {file.roles['label']!r} holds one class only ({labels[0]!r}); at least 2 are "
            "needed"
        )
    test = _labelled_test(file, rows, texts, labels)
    single = sorted(label for label, n in sizes.items() if n == 1)
    if single:
        file.notes.append(
            f"{file.path.name}: {count(len(single), 'class', 'classes')} with one text only "
            f"({listed(single[:5])}{', ...' if len(single) > 5 else ''}): trained on, never "
            "tested."
        )
    if len({labels[i] for i in test}) < 2:
        raise file.error(
            f"column {file.roles['label']!r}: fewer than 2 classes have a text to test on; at "
            "least 2 classes need 2 distinct texts each"
        )
    held_out = set(test)
    train = [i for i in range(len(rows)) if i not in held_out and rows[i].split != "test"]
    if len({labels[i] for i in train}) < 2:
        raise file.error(
            f"column {file.roles['label']!r}: fewer than 2 classes are left to train on"
        )
    test_texts = tuple(texts[i] for i in test)
    test_labels = tuple(labels[i] for i in test)
    tasks: list[Task] = [
        ClassificationTask(
            f"{file.name} classification",
            tuple(texts[i] for i in train),
            tuple(labels[i] for i in train),
            test_texts,
            test_labels,
        )
    ]
    if len(test) >= 2 * len(set(test_labels)):
        tasks.append(ClusteringTask(f"{file.name} clustering", test_texts, test_labels))
    else:
        file.notes.append(
            f"{file.path.name}: no clustering task, its {len(test)} test texts are fewer than two "
            "per class."
        )
    file.notes.append(
        f"{file.path.name}: {len(sizes)} classes; {len(train):,} texts for the classifier to learn "
        f"from, {len(test):,} held out."
    )
    return _Part((), tuple(tasks))


def _labelled_test(
    file: _File, rows: Sequence[_Record], texts: Sequence[str], labels: Sequence[str]
) -> list[int]:
    settings = file.settings
    given = [index for index, row in enumerate(rows) if row.split == "test"]
    if given:
        return sample(given, settings.max_test, settings.seed, key=lambda index: texts[index])
    mask = hold_out_by_label(
        texts,
        labels,
        fraction=settings.test_fraction,
        seed=settings.seed,
        maximum=settings.max_test,
    )
    return [int(index) for index in np.flatnonzero(mask)]


def _scored_part(file: _File, records: list[_Record]) -> _Part:
    if any(record.split == "test" for record in records):
        kept = [record for record in records if record.split == "test"]
        file.dropped(len(records) - len(kept), "not of the test split: scored pairs do not train")
        records = kept
    rows = _distinct(file, records, key=lambda record: tuple(sorted(map(normalise, record.texts))))
    _check_enough(file, rows, ("text", "positive"))
    settings = file.settings
    chosen = sample(rows, settings.max_test, settings.seed, key=lambda row: "\0".join(row.texts))
    scores = np.array([row.value for row in chosen], dtype=np.float64)
    if scores.min() == scores.max():
        raise file.error(
            f"column {file.roles['score']!r}: all scores are {scores[0]:g}; a rank correlation "
            "needs scores that differ"
        )
    file.dropped(len(rows) - len(chosen), f"beyond {settings.max_test:,} scored pairs")
    task = SimilarityTask(
        f"{file.name} similarity",
        tuple(row.texts[0] for row in chosen),
        tuple(row.texts[1] for row in chosen),
        scores,
    )
    return _Part((), (task,))


def _distinct(
    file: _File, records: Iterable[_Record], key: Callable[[_Record], tuple[str, ...]]
) -> list[_Record]:
    first: dict[tuple[str, ...], _Record] = {}
    n_records = 0
    for n_records, record in enumerate(records, start=1):  # noqa: B007 (used after the loop)
        first.setdefault(key(record), record)
    file.dropped(
        n_records - len(first), "because they repeat an earlier row (but for case and space)"
    )
    return list(first.values())


def _check_enough(file: _File, rows: Sequence[_Record], roles: Sequence[str]) -> None:
    for index, role in enumerate(roles):
        if len(rows) > 1 and len({normalise(row.texts[index]) for row in rows}) == 1:
            raise file.error(
                f"column {file.roles[role]!r}: all texts are identical "
                f"({rows[0].texts[index][:40]!r}); nothing can be compared"
            )
    if len(rows) < MINIMUM_ROWS:
        raise file.error(
            f"only {count(len(rows), 'distinct row')}; at least {MINIMUM_ROWS} are needed to hold "
            "some out and train on the rest"
        )
