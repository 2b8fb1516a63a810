"""Which examples to label, tried out: pick from a pool, show the picks' labels, answer tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.neighbours import nearest_neighbours, unit_rows
from bakeoff.selection.selectors import SelectorKind

ConfidenceOf = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""From the rows labelled so far to how sure a learner with these labels is of every row."""


@dataclass(frozen=True, eq=False)
class LabelledPool:
    """Rows that can be picked, whose labels are shown when they are.

    Parameters
    ----------
    vectors
        float32 array ``(N, d)``.
    texts, labels
        N strings each.
    """

    vectors: NDArray[np.float32]
    texts: Sequence[str]
    labels: NDArray[np.str_]

    @property
    def mean(self) -> NDArray[np.float32]:
        """The vectors' mean, which is subtracted from pool and tests before cosines."""
        mean: NDArray[np.float32] = self.vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


@dataclass(frozen=True, eq=False)
class Picks:
    """Rows picked for one budget, in pick order, and the seconds that choosing took."""

    rows: NDArray[np.int64]
    seconds: float


def pick_for_budgets(
    kind: SelectorKind,
    params: Mapping[str, Any],
    pool: LabelledPool,
    budgets: Sequence[int],
    *,
    seed: int,
    confidence_of: ConfidenceOf,
) -> dict[int, Picks]:
    """Return the picks of one method for each budget.

    A method whose picks for a small budget begin those for a large one runs once. A method that
    needs confidences gets a tenth of the budget first: vote-k by its votes, others at random.

    Parameters
    ----------
    kind
        The method.
    params
        Its parameters.
    pool
        What it picks from; it sees no label.
    budgets
        Numbers of rows.
    seed
        Of whatever is random in it.
    confidence_of
        Called with the rows labelled first, for methods that need confidences.
    """
    if kind.nested and "confidence" not in kind.needs:
        largest = _pick(kind, params, pool, max(budgets), seed, confidence_of)
        return {budget: Picks(largest.rows[:budget], largest.seconds) for budget in budgets}
    return {budget: _pick(kind, params, pool, budget, seed, confidence_of) for budget in budgets}


def _pick(
    kind: SelectorKind,
    params: Mapping[str, Any],
    pool: LabelledPool,
    n: int,
    seed: int,
    confidence_of: ConfidenceOf,
) -> Picks:
    began = time.perf_counter()
    data: dict[str, Any] = {}
    first = np.empty(0, dtype=np.int64)
    selector = kind.build(n_select=n, seed=seed, **params)
    if "confidence" in kind.needs:
        if kind.picks_first:
            data["confidence"] = confidence_of
        else:
            n_first = min(max(1, round(n / 10)), n - 1)
            if n_first:
                rng = np.random.default_rng(seed)
                first = rng.choice(len(pool.texts), n_first, replace=False).astype(np.int64)
            data["confidence"] = confidence_of(first)
            data["already_labeled"] = first
            selector.set_params(n_select=n - n_first)
    selector.fit(pool.vectors, **data)
    rows = np.concatenate([first, selector.selected_indices_])
    return Picks(rows, time.perf_counter() - began)


@dataclass(frozen=True, eq=False)
class NearestLabel:
    """What a test text's most similar labelled text says, and how far away it is.

    Parameters
    ----------
    labels
        String array ``(n,)``.
    similarities
        float64 array ``(n,)``: cosine after the pool's mean is subtracted.
    """

    labels: NDArray[np.str_]
    similarities: NDArray[np.float64]


def nearest_label(
    pool: LabelledPool, rows: NDArray[np.int64], tests: NDArray[np.float32]
) -> NearestLabel:
    """Answer each test with the label of the most similar picked row."""
    known = unit_rows(pool.vectors[rows], offset=pool.mean)
    found = nearest_neighbours(known, 1, queries=unit_rows(tests, offset=pool.mean))
    return NearestLabel(
        pool.labels[rows][found.indices[:, 0]], found.similarities[:, 0].astype(np.float64)
    )


def nearest_label_confidence(pool: LabelledPool, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how sure the nearest label is of every row: the lead over the next other label.

    The cosine to the most similar labelled row minus that to the most similar labelled row of
    another class. With one class only, the cosine itself.
    """
    if not len(rows):
        return np.zeros(len(pool.texts))
    units = unit_rows(pool.vectors, offset=pool.mean)
    classes, codes = np.unique(pool.labels[rows], return_inverse=True)
    best = np.full((len(units), len(classes)), -np.inf)
    similarities = units @ units[rows].T
    for code in range(len(classes)):
        best[:, code] = similarities[:, codes == code].max(axis=1)
    best.sort(axis=1)
    lead: NDArray[np.float64] = best[:, -1] - best[:, -2] if len(classes) > 1 else best[:, -1]
    return lead
