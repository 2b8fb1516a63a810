"""Text data in the shapes that methods train and are judged on. Plain frozen records, no I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bakeoff.errors import DataError


@dataclass(frozen=True)
class TextPairs:
    """Training pairs: `positives[i]` belongs to `queries[i]`; `negatives[i]` (if any) does not.

    All lists have one length. A query has one hard negative, or a tuple of several. `group` names
    the source; batches never mix groups.

    Examples
    --------
    >>> len(TextPairs(("capital of France?", "2 + 2?"), ("Paris", "4"), group="questions"))
    2
    """

    queries: tuple[str, ...]
    positives: tuple[str, ...]
    negatives: tuple[str, ...] | tuple[tuple[str, ...], ...] | None = None
    group: str = "pairs"

    def __post_init__(self) -> None:
        _as_tuples(self, "queries", "positives")
        if self.negatives is not None:
            _as_tuples(self, "negatives")
        _same_length(
            self, "queries", "positives", *(["negatives"] if self.negatives is not None else [])
        )

    def __len__(self) -> int:
        return len(self.queries)

    def texts(self, row: int) -> tuple[str, ...]:
        """Return a row's query, positive and negatives."""
        given = self.negatives[row] if self.negatives is not None else ()
        return (
            self.queries[row],
            self.positives[row],
            *((given,) if isinstance(given, str) else given),
        )

    def take(self, rows: Sequence[int]) -> TextPairs:
        """Return some of the rows, in the order asked for."""

        def chosen(column: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(column[row] for row in rows)

        negatives = None if self.negatives is None else chosen(self.negatives)
        return TextPairs(chosen(self.queries), chosen(self.positives), negatives, self.group)


@dataclass(frozen=True, eq=False)
class RetrievalTask:
    """For each query, find the one relevant document. Unit: query. Measure: reciprocal rank @10.

    `relevant[i]` is the index into `documents` of the answer to `queries[i]`.
    """

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    relevant: NDArray[np.int64]

    def __post_init__(self) -> None:
        _as_tuples(self, "queries", "documents")
        relevant = np.asarray(self.relevant)
        if relevant.ndim != 1 or (relevant.size and relevant.dtype.kind not in "iu"):
            raise DataError(
                f"task {self.name!r}: relevant must be one integer per query, got dtype "
                f"{relevant.dtype} and shape {relevant.shape}"
            )
        object.__setattr__(self, "relevant", relevant.astype(np.int64))
        _same_length(self, "queries", "relevant")
        if len(relevant) and not 0 <= relevant.min() <= relevant.max() < len(self.documents):
            raise DataError(
                f"task {self.name!r}: relevant must index the {len(self.documents)} documents, got "
                f"values from {relevant.min()} to {relevant.max()}"
            )


@dataclass(frozen=True, eq=False)
class SimilarityTask:
    """Pairs of texts with a human score. Unit: pair. Measure: Spearman's rank correlation."""

    name: str
    texts_a: tuple[str, ...]
    texts_b: tuple[str, ...]
    scores: NDArray[np.float64]

    def __post_init__(self) -> None:
        _as_tuples(self, "texts_a", "texts_b")
        scores = np.asarray(self.scores, dtype=np.float64)
        object.__setattr__(self, "scores", scores)
        _same_length(self, "texts_a", "texts_b", "scores")
        if not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))
            raise DataError(
                f"task {self.name!r}: scores must be finite, {len(bad)} are not (first at index "
                f"{bad[0]})"
            )


@dataclass(frozen=True)
class ClusteringTask:
    """Texts with the label of their cluster. Unit: text. Measure: V-measure of k-means."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _as_tuples(self, "texts", "labels")
        _same_length(self, "texts", "labels")


@dataclass(frozen=True)
class ClassificationTask:
    """Labelled texts, split. Unit: test text. Measure: accuracy of a logistic regression."""

    name: str
    train_texts: tuple[str, ...]
    train_labels: tuple[str, ...]
    test_texts: tuple[str, ...]
    test_labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _as_tuples(self, "train_texts", "train_labels", "test_texts", "test_labels")
        _same_length(self, "train_texts", "train_labels")
        _same_length(self, "test_texts", "test_labels")


Task = RetrievalTask | SimilarityTask | ClusteringTask | ClassificationTask


def task_texts(task: Task) -> Iterator[str]:
    """Yield every text of a task, those of a classification's training part included.

    Examples
    --------
    >>> list(task_texts(ClusteringTask("news", ("a", "b"), ("sport", "weather"))))
    ['a', 'b']
    """
    match task:
        case RetrievalTask():
            yield from task.queries
            yield from task.documents
        case SimilarityTask():
            yield from task.texts_a
            yield from task.texts_b
        case ClusteringTask():
            yield from task.texts
        case ClassificationTask():
            yield from task.train_texts
            yield from task.test_texts


@dataclass(frozen=True)
class EmbeddingData:
    """What an embedding study trains on and is judged by.

    Parameters
    ----------
    name
        For reports, e.g. ``"embedded default"`` or the user's file name.
    train
        Groups of training pairs; may be empty (then only training-free designs can run).
    tasks
        Held-out tasks; no text of theirs occurs in `train`.
    notes
        Sentences about how the data was read, split or cut, shown in the report.
    """

    name: str
    train: tuple[TextPairs, ...]
    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        _as_tuples(self, "train", "tasks", "notes")
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"tasks must have distinct names, got twice: {twice}")

    def texts(self) -> tuple[str, ...]:
        """Return every distinct text of training pairs and tasks, in order of appearance."""
        seen: dict[str, None] = {}
        for pairs in self.train:
            for row in range(len(pairs)):
                seen.update(dict.fromkeys(pairs.texts(row)))
        for task in self.tasks:
            seen.update(dict.fromkeys(task_texts(task)))
        return tuple(seen)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names, texts, labels and scores, as hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (*self.train, *self.tasks):
            digest.update(type(part).__name__.encode())
            for name, value in vars(part).items():
                plain: Any = value.tolist() if isinstance(value, np.ndarray) else value
                line = json.dumps([name, plain], ensure_ascii=False) + "\n"
                digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _as_tuples(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if isinstance(value, str):
            raise DataError(f"{type(record).__name__}: {name} must be a sequence, got one string")
        object.__setattr__(record, name, tuple(value))


def _same_length(record: Any, *names: str) -> None:
    lengths = {name: len(getattr(record, name)) for name in names}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{type(record).__name__}: lengths must agree, got {lengths}")
