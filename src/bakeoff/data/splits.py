"""Which rows are held out: by hash of their content, never by chance order or file position.

A row's place between 0 and 1 follows from its normalised text and the seed alone. The rows with the
smallest places are held out, so a file that grows keeps almost all rows where they were, a shuffled
file keeps all of them, and copies of a text always land on the same side.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.tasks import Task, TextPairs, task_texts

Item = TypeVar("Item")


def normalise(text: str) -> str:
    r"""Return `text` without what makes two copies look different: case, spacing, Unicode form.

    Examples
    --------
    >>> normalise("  The ﬁrst\nTEXT ")
    'the first text'
    """
    if text.isascii():
        return " ".join(text.lower().split())
    # The Unicode standard's compatibility caseless match (section 3.13, D146): folding can undo
    # normal form and the other way round, hence both twice.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(unicodedata.normalize("NFKC", folded.casefold()).split())


def position(text: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the normalised text and the seed only.

    Parameters
    ----------
    text
        Any text; copies that `normalise` makes equal get the same position.
    seed
        Another seed gives an unrelated position.
    """
    message = f"{seed}\0{normalise(text)}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(message, digest_size=8).digest()
    # 53 bits fill a float64 exactly, so the quotient stays below 1.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def linked_rows(rows: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """Return a group number for each row; rows that share a normalised text share the number.

    Sharing is transitive: if row 1 shares its query with row 2, and row 2 its answer with row 3,
    all three are one group.

    Parameters
    ----------
    rows
        For each row, the texts that must not straddle a split.

    Returns
    -------
    NDArray[np.int64]
        Shape ``(n_rows,)``.

    Examples
    --------
    >>> linked_rows([("a", "b"), ("c", "d"), ("B", "e")]).tolist()
    [0, 1, 0]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    text_ids: dict[str, int] = {}
    row_of, text_of = [], []
    for row_id, texts in enumerate(rows):
        for text in texts:
            row_of.append(row_id)
            text_of.append(len(rows) + text_ids.setdefault(normalise(text), len(text_ids)))
    n_nodes = len(rows) + len(text_ids)
    edges = coo_array((np.ones(len(row_of)), (row_of, text_of)), shape=(n_nodes, n_nodes))
    _, component = connected_components(edges, directed=False)
    return np.asarray(component[: len(rows)], dtype=np.int64)


def hold_out(
    rows: Sequence[Sequence[str]], *, fraction: float, seed: int, maximum: int | None = None
) -> NDArray[np.bool_]:
    """Choose the rows to hold out, whole groups of linked rows at a time.

    Groups are taken in order of position until `fraction` of the rows is held out. A group larger
    than what is still wanted, or than half of what is wanted in all, is passed over and so stays in
    training: it is there that many rows with one answer are of use, and a test set dominated by one
    text is not. Rows appended to the input move at most as many old rows as were appended, as long
    as none shares a text with another.

    Parameters
    ----------
    rows
        For each row, the texts that must not straddle the split.
    fraction
        Part of the rows to hold out, in (0, 1); at least 2 rows are asked for.
    seed
        Another seed holds out other rows.
    maximum
        Never hold out more rows than this; at least 2.

    Returns
    -------
    NDArray[np.bool_]
        Shape ``(n_rows,)``, true where held out. It may hold fewer than asked for, or none, where
        groups are too large.

    Examples
    --------
    >>> texts = [(f"question {i}", f"answer {i}") for i in range(10)]
    >>> int(hold_out(texts, fraction=0.3, seed=0).sum())
    3
    """
    _check_fraction(fraction)
    wanted = max(2, round(fraction * len(rows)))
    if maximum is not None:
        wanted = min(wanted, maximum)
    members: dict[int, list[int]] = defaultdict(list)
    for row_id, group in enumerate(linked_rows(rows).tolist()):
        members[group].append(row_id)

    def place(row_ids: list[int]) -> float:
        # The smallest of many positions is small, which would favour large groups: hash again.
        smallest = min(position(text, seed) for row_id in row_ids for text in rows[row_id])
        return position(repr(smallest), seed)

    held_out = np.zeros(len(rows), dtype=np.bool_)
    largest = wanted // 2
    for row_ids in sorted(members.values(), key=place):
        if len(row_ids) <= min(largest, wanted):
            held_out[row_ids] = True
            wanted -= len(row_ids)
        if wanted == 0:
            break
    return held_out


def hold_out_by_label(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    fraction: float,
    seed: int,
    maximum: int | None = None,
) -> NDArray[np.bool_]:
    """Choose the same fraction of every class to hold out.

    Of a class with two or more texts at least one is held out and one is kept; the text of a class
    with one is kept, because nobody can be asked to recognise a class never seen.

    Parameters
    ----------
    texts
        Distinct after normalisation.
    labels
        The class of each text.
    fraction
        Part of each class to hold out, in (0, 1).
    seed
        Another seed holds out other texts.
    maximum
        Lower the fraction until about this many are held out (more only where one of each class
        already is more).

    Returns
    -------
    NDArray[np.bool_]
        Shape ``(n_texts,)``, true where held out.
    """
    _check_fraction(fraction)
    if maximum is not None and texts:
        fraction = min(fraction, maximum / len(texts))
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_label[label].append(index)
    held_out = np.zeros(len(texts), dtype=np.bool_)
    for indices in by_label.values():
        if len(indices) > 1:
            wanted = min(max(1, round(fraction * len(indices))), len(indices) - 1)
            held_out[sample(indices, wanted, seed, key=lambda index: texts[index])] = True
    return held_out


def sample(
    items: Iterable[Item], n: int | None, seed: int, *, key: Callable[[Item], str]
) -> list[Item]:
    """Return the `n` items with the smallest positions, in their given order; all for None.

    One pass with memory for `n` items, so that a stream longer than memory can be sampled. Of two
    sizes with one seed, the smaller sample is part of the larger.

    Parameters
    ----------
    items
        Any iterable.
    n
        How many, at most.
    seed
        Another seed takes other items.
    key
        The text that decides about an item.
    """
    if n is None:
        return list(items)
    placed = ((position(key(item), seed), index, item) for index, item in enumerate(items))
    chosen = heapq.nsmallest(n, placed, key=lambda entry: entry[:2])
    return [item for _, _, item in sorted(chosen, key=lambda entry: entry[1])]


def without_task_texts(
    pairs: Sequence[TextPairs], tasks: Iterable[Task]
) -> tuple[tuple[TextPairs, ...], int]:
    """Take out of the training pairs every row that has a text of any task in it.

    Returns
    -------
    kept
        The groups with at least one row left.
    n_removed
        How many rows were taken out.
    """
    held_out = {normalise(text) for task in tasks for text in task_texts(task)}
    return _filtered(pairs, lambda text: normalise(text) not in held_out)


def without_near_copies(
    pairs: Sequence[TextPairs], tasks: Iterable[Task], *, n_words: int
) -> tuple[tuple[TextPairs, ...], int]:
    """Take out of the training pairs every row that shares a run of words with any task's text.

    Stricter than `without_task_texts` for texts of at least `n_words` words: it also finds the copy
    with a sentence added. Words are maximal runs of letters, digits and underscores.

    Parameters
    ----------
    pairs
        Groups of training pairs.
    tasks
        What the pairs must not give away.
    n_words
        Length of the run.

    Returns
    -------
    kept
        The groups with at least one row left.
    n_removed
        How many rows were taken out.
    """
    held_out = {run for task in tasks for text in task_texts(task) for run in runs(text, n_words)}
    return _filtered(pairs, lambda text: held_out.isdisjoint(runs(text, n_words)))


def runs(text: str, n_words: int) -> set[tuple[str, ...]]:
    """Return every run of `n_words` consecutive words of the normalised text.

    Examples
    --------
    >>> sorted(runs("To be, or not", 3))
    [('be', 'or', 'not'), ('to', 'be', 'or')]
    """
    words = re.findall(r"\w+", normalise(text))
    return {tuple(words[start : start + n_words]) for start in range(len(words) - n_words + 1)}


def _filtered(
    pairs: Sequence[TextPairs], allowed: Callable[[str], bool]
) -> tuple[tuple[TextPairs, ...], int]:
    kept, n_removed = [], 0
    for group in pairs:
        rows = [row for row in range(len(group)) if all(map(allowed, group.texts(row)))]
        n_removed += len(group) - len(rows)
        if rows:
            kept.append(group.take(rows))
    return tuple(kept), n_removed


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction!r}")
