"""How well a model tells pairs that belong together from pairs that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from bakeoff.data.citations import LabelledPairs
from bakeoff.errors import DataError

ALL_POSITIVE_F1 = 2 / 3
"""F1 of calling every pair of a balanced set positive: the floor of `f1_max`."""


@dataclass(frozen=True, eq=False)
class PairScores:
    """Scores of labelled pairs, and what they are worth.

    Parameters
    ----------
    scores
        ``(n,)`` float64 in [-1, 1], the cosine of each pair.
    labels
        ``(n,)`` int64, 1 for pairs that belong together.
    domains
        The domain of each pair.
    f1, precision, recall
        At the threshold with the best F1 on these very pairs (F1max).
    threshold
        That threshold: pairs that score at least so much are called positive.
    roc_auc
        Probability that a random positive scores above a random negative; ties count half.
    similarity_ratio
        ``|mean score of positives / mean score of negatives|``.
    mean_positive, mean_negative
        Those means.
    """

    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    domains: tuple[str, ...]
    f1: float
    precision: float
    recall: float
    threshold: float
    roc_auc: float
    similarity_ratio: float
    mean_positive: float
    mean_negative: float

    def __len__(self) -> int:
        return len(self.scores)

    def correct(self, threshold: float | None = None) -> NDArray[np.bool_]:
        """Return whether each pair is called right, ``(n,)``: what two models are compared by.

        Parameters
        ----------
        threshold
            One that was chosen on other pairs, to be honest; by default the best one on these.
        """
        limit = self.threshold if threshold is None else threshold
        return np.asarray((self.scores >= limit) == (self.labels == 1), dtype=np.bool_)

    def by_domain(self) -> dict[str, PairScores]:
        """Return the same for each domain by itself, with a threshold of its own."""
        return {
            domain: pair_scores(self.scores[rows], self.labels[rows], (domain,) * int(rows.sum()))
            for domain in sorted(set(self.domains))
            for rows in [np.array([own == domain for own in self.domains])]
        }


def pair_scores(
    scores: ArrayLike, labels: ArrayLike, domains: Sequence[str] | None = None
) -> PairScores:
    """Judge scores of labelled pairs.

    Parameters
    ----------
    scores
        ``(n,)``, e.g. of `pair_cosines`; clipped to [-1, 1], as in the paper's code.
    labels
        ``(n,)``, 0 or 1, both present.
    domains
        The domain of each pair; None calls all one.

    Returns
    -------
    PairScores
        Scores and figures.

    Raises
    ------
    DataError
        If shapes do not agree, a score is not finite, or a label is missing.

    Notes
    -----
    F1max chooses its threshold on the pairs that it judges, and on balanced pairs it cannot fall
    below 2/3: see the ROC-AUC beside it, or `f1_at` with a threshold from validation pairs.

    References
    ----------
    Logan Hallee, Rohan Kapur, Arjun Patel, Jason P. Gleghorn and Bohdan B. Khomtchouk.
    "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings in Biological
    Databases". Scientific Reports, 2025. arXiv:2401.15713.

    Examples
    --------
    >>> judged = pair_scores([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0])
    >>> round(judged.f1, 3), judged.threshold, judged.roc_auc
    (0.8, 0.6, 0.75)
    """
    values, truth = _checked(scores, labels)
    own = ("",) * len(values) if domains is None else tuple(domains)
    if len(own) != len(values):
        raise DataError(f"domains must be one per pair, got {len(own)} for {len(values)} pairs")
    f1, precision, recall, threshold = f1_max(values, truth)
    positive, negative = float(values[truth == 1].mean()), float(values[truth == 0].mean())
    return PairScores(
        values,
        truth,
        own,
        f1,
        precision,
        recall,
        threshold,
        float(roc_auc_score(truth, values)),
        abs(positive / negative) if negative else float("inf"),
        positive,
        negative,
    )


def f1_max(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float, float, float]:
    """Return the best F1 over all thresholds, with its precision, recall and threshold.

    Of thresholds with the same F1 the lowest.

    Parameters
    ----------
    scores, labels
        As in `pair_scores`.

    Raises
    ------
    DataError
        As `pair_scores`.

    Examples
    --------
    >>> f1_max([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0])[0] == ALL_POSITIVE_F1
    True
    """
    values, truth = _checked(scores, labels)
    thresholds, starts = np.unique(np.sort(values), return_index=True)
    called = len(values) - starts
    positive = np.sort(values[truth == 1])
    right = len(positive) - np.searchsorted(positive, thresholds, side="left")
    # One division of whole numbers: thresholds with the same F1 give the same float, which the
    # harmonic mean of two rounded ratios does not.
    f1 = 2 * right / (called + len(positive))
    best = int(np.argmax(f1))
    return (
        float(f1[best]),
        float(right[best] / called[best]),
        float(right[best] / len(positive)),
        float(thresholds[best]),
    )


def f1_at(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """Return F1 where pairs that score at least `threshold` are called positive.

    Parameters
    ----------
    scores, labels
        As in `pair_scores`.
    threshold
        Chosen on other pairs, so that the figure is one that a user would see.

    Examples
    --------
    >>> f1_at([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0], threshold=0.8) == 2 / 3
    True
    """
    values, truth = _checked(scores, labels)
    called = values >= threshold
    right = int((called & (truth == 1)).sum())
    total = int(called.sum()) + int((truth == 1).sum())
    return 2 * right / total if total else 0.0


def pair_cosines(first: Any, second: Any) -> NDArray[np.float64]:
    """Return the cosine of each row with its partner, in [-1, 1].

    Parameters
    ----------
    first, second
        ``(n, d)`` arrays or tensors; a zero vector's cosine is 0.

    Returns
    -------
    NDArray[np.float64]
        ``(n,)``.

    Raises
    ------
    DataError
        If shapes do not agree or an entry is not finite.
    """
    a, b = (
        np.asarray(part.detach().cpu().float() if hasattr(part, "detach") else part, np.float64)
        for part in (first, second)
    )
    if a.ndim != 2 or a.shape != b.shape:
        raise DataError(f"first and second must have one shape (n, d), got {a.shape}, {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("vectors must be finite")
    # Divided by their largest entries first, or squares of small numbers would vanish.
    a, b = (
        part / np.maximum(np.abs(part).max(axis=1, keepdims=True, initial=0.0), 1e-300)
        for part in (a, b)
    )
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("nd,nd->n", a, b)
    cosines = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    return np.asarray(np.clip(cosines, -1, 1), dtype=np.float64)


def score_pairs(encode: Callable[[list[str], list[str]], Any], pairs: LabelledPairs) -> PairScores:
    """Embed the texts of labelled pairs and judge their cosines.

    Parameters
    ----------
    encode
        Called once with the distinct texts and the domain of each; returns ``(n, d)``. For a model
        without domains: ``lambda texts, domains: model.encode(texts)``.
    pairs
        What to judge by.

    Returns
    -------
    PairScores
        One score per pair, in the order of `pairs`.

    Raises
    ------
    DataError
        If there are no pairs, or the vectors are of the wrong shape or not finite.
    """
    if not len(pairs):
        raise DataError("there are no pairs to judge by")
    place: dict[tuple[str, str], int] = {}
    for side in (pairs.texts_a, pairs.texts_b):
        for text, domain in zip(side, pairs.domains, strict=True):
            place.setdefault((text, domain), len(place))
    texts, domains = [text for text, _ in place], [domain for _, domain in place]
    vectors = encode(texts, domains)
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().cpu().float()
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise DataError(
            f"encode must return ({len(texts)}, d) vectors for {len(texts)} texts, got shape "
            f"{vectors.shape}"
        )
    rows_a, rows_b = (
        [place[text, domain] for text, domain in zip(side, pairs.domains, strict=True)]
        for side in (pairs.texts_a, pairs.texts_b)
    )
    return pair_scores(pair_cosines(vectors[rows_a], vectors[rows_b]), pairs.labels, pairs.domains)


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != truth.shape:
        raise DataError(
            f"scores and labels must have one shape (n,), got {values.shape} and {truth.shape}"
        )
    if not np.isfinite(values).all():
        raise DataError(f"scores must be finite, {int((~np.isfinite(values)).sum())} are not")
    if not np.isin(truth, (0, 1)).all() or len(np.unique(truth)) < 2:
        raise DataError("labels must be 0 or 1 and both occur")
    return np.clip(values, -1.0, 1.0), truth.astype(np.int64)
