"""What an embedding is worth: one number per query, pair or text, for each of the task kinds.

Reciprocal rank and accuracy are means over units by nature. Spearman's correlation and V-measure
are not, yet paired statistics need units; for these two a unit's number is its jackknife
pseudo-value, shifted so that the mean over units is exactly the familiar coefficient.

References
----------
.. [1] J. W. Tukey, "Bias and confidence in not-quite large samples", Annals of Mathematical
   Statistics 29, 1958 (the pseudo-value).
.. [2] A. Rosenberg and J. Hirschberg, "V-Measure: A conditional entropy-based external cluster
   evaluation measure", EMNLP-CoNLL 2007.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bakeoff.data.tasks import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    SimilarityTask,
    Task,
)
from bakeoff.errors import DataError

Vectors = NDArray[np.float32]
Units = NDArray[np.float64]
Role = Literal["query", "document", "text"]
Embed = Callable[[Sequence[str], Role], Vectors]

METRIC_OF_TASK: dict[type, str] = {
    RetrievalTask: "mrr_at_10",
    SimilarityTask: "spearman",
    ClusteringTask: "v_measure",
    ClassificationTask: "accuracy",
}


def score_task(task: Task, embed: Embed, *, seed: int) -> Units:
    """Score one task.

    Parameters
    ----------
    task
        A task record.
    embed
        ``embed(texts, role)`` returns a float32 array ``(len(texts), d)`` of unit vectors; `role`
        is ``"query"`` or ``"document"`` in retrieval, ``"text"`` elsewhere.
    seed
        Seeds k-means; the other measures are deterministic.

    Returns
    -------
    numpy.ndarray
        float64 ``(n_units,)``; its mean is the task's score.
    """
    if isinstance(task, RetrievalTask):
        queries, documents = embed(task.queries, "query"), embed(task.documents, "document")
        return reciprocal_ranks(queries, documents, task.relevant)
    if isinstance(task, SimilarityTask):
        left, right = embed(task.texts_a, "text"), embed(task.texts_b, "text")
        cosines = np.einsum("nd,nd->n", left, right, dtype=np.float64)
        return spearman_units(cosines, task.scores)
    if isinstance(task, ClusteringTask):
        return v_measure_units(
            task.labels, kmeans_labels(embed(task.texts, "text"), len(set(task.labels)), seed)
        )
    train = embed(task.train_texts, "text")
    test = embed(task.test_texts, "text")
    return classification_hits(train, task.train_labels, test, task.test_labels)


def reciprocal_ranks(
    queries: Vectors, documents: Vectors, relevant: NDArray[np.int64], *, cutoff: int = 10
) -> Units:
    """Return 1/rank of each query's document by cosine, 0 beyond `cutoff`.

    Documents that tie with the relevant one count as ranked before it, so that an embedding that
    maps everything to one point scores nothing instead of everything.

    Examples
    --------
    >>> vectors = np.eye(3, dtype=np.float32)
    >>> reciprocal_ranks(vectors, vectors, np.array([0, 1, 2])).tolist()
    [1.0, 1.0, 1.0]
    """
    units = np.empty(len(queries))
    block = max(1, 50_000_000 // max(1, len(documents)))
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ documents.T
        answer = relevant[start : start + block]
        own = scores[np.arange(len(scores)), answer][:, None]
        ranks = (scores >= own).sum(axis=1)
        units[start : start + block] = np.where(ranks <= cutoff, 1.0 / ranks, 0.0)
    return units


def spearman_units(predicted: NDArray[np.float64], human: NDArray[np.float64]) -> Units:
    """Return one number per pair whose mean is Spearman's rank correlation.

    Raises
    ------
    DataError
        With fewer than 4 pairs, or human scores that are all equal. Equal predictions are a
        correlation of 0: an embedding that cannot tell pairs apart knows nothing of similarity.

    Examples
    --------
    >>> x = np.array([0.1, 0.4, 0.2, 0.9, 0.5])
    >>> y = np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    >>> float(spearman_units(x, y).mean().round(12))
    1.0
    """
    n = len(human)
    if n < 4:
        raise DataError(f"a similarity task needs at least 4 scored pairs, got {n}")
    if np.ptp(human) == 0:
        raise DataError(f"all {n} human similarity scores are equal ({human[0]}); nothing to rank")
    if np.ptp(predicted) == 0:
        return np.zeros(n)
    x, y = stats.rankdata(predicted), stats.rankdata(human)
    whole = _correlation(x[None, :], y[None, :])[0]
    without = np.empty(n)
    # Removing pair i lowers the rank of everything above it by 1 and of its ties by one half.
    for block in np.array_split(np.arange(n), max(1, n * n // 4_000_000)):
        without[block] = _correlation(_ranks_without(x, block), _ranks_without(y, block))
    return _centred_pseudo_values(whole, without)


def v_measure_units(truth: Sequence[str], found: Sequence[int] | NDArray[np.int64]) -> Units:
    """Return one number per text whose mean is the V-measure of a clustering.

    Removing a text changes the contingency table by one in one cell, so texts of one cell share a
    pseudo-value and the cost is that of the table, not of the texts.

    Examples
    --------
    >>> float(v_measure_units(["a", "a", "b", "b"], [1, 1, 0, 0]).mean())
    1.0
    """
    classes, class_ids = np.unique(np.asarray(truth), return_inverse=True)
    clusters, cluster_ids = np.unique(np.asarray(found), return_inverse=True)
    table = np.zeros((len(classes), len(clusters)))
    np.add.at(table, (class_ids, cluster_ids), 1)
    whole = _v_measure(table)
    cells = np.argwhere(table > 0)
    without = np.zeros_like(table)
    for row, column in cells:
        table[row, column] -= 1
        without[row, column] = _v_measure(table)
        table[row, column] += 1
    return _centred_pseudo_values(whole, without[class_ids, cluster_ids])


def kmeans_labels(vectors: Vectors, n_clusters: int, seed: int) -> NDArray[np.int64]:
    """Cluster unit vectors with k-means (k-means++, best of 4 starts); returns ``(n,)`` labels."""
    from sklearn.cluster import KMeans

    if n_clusters < 2 or n_clusters > len(vectors):
        raise DataError(
            f"a clustering task needs from 2 labels to as many as texts, got {n_clusters} labels "
            f"for {len(vectors)} texts"
        )
    found = KMeans(n_clusters, n_init=4, random_state=seed).fit_predict(vectors)
    return np.asarray(found, dtype=np.int64)


def classification_hits(
    train: Vectors, train_labels: Sequence[str], test: Vectors, test_labels: Sequence[str]
) -> Units:
    """Return 1 for each test text that logistic regression on the vectors labels right, else 0.

    Features are standardised on the training vectors: embeddings differ in how much they spread,
    and a fixed penalty would otherwise reward spread instead of content.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(train_labels)) < 2:
        raise DataError(
            f"a classification task needs at least 2 labels in its training part, got "
            f"{sorted(set(train_labels))}"
        )
    # The strong penalty suits more dimensions than examples, the usual case here.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    model.fit(train, list(train_labels))
    found = np.asarray(model.predict(test))
    return np.asarray(found == np.asarray(test_labels), dtype=np.float64)


def _centred_pseudo_values(whole: float, without: Units) -> Units:
    n = len(without)
    pseudo = n * whole - (n - 1) * without
    # The jackknife also corrects bias; the shift undoes that, so the mean is the plain coefficient.
    return np.asarray(pseudo - pseudo.mean() + whole, dtype=np.float64)


def _ranks_without(ranks: Units, removed: NDArray[np.int64]) -> Units:
    own = ranks[removed][:, None]
    left = ranks[None, :] - (ranks[None, :] > own) - 0.5 * (ranks[None, :] == own)
    left[np.arange(len(removed)), removed] = np.nan
    return np.asarray(left)


def _correlation(x: Units, y: Units) -> Units:
    x = x - np.nanmean(x, axis=1, keepdims=True)
    y = y - np.nanmean(y, axis=1, keepdims=True)
    covariance = np.nansum(x * y, axis=1)
    scale = np.sqrt(np.nansum(x * x, axis=1) * np.nansum(y * y, axis=1))
    zeros = np.zeros_like(covariance)
    return np.asarray(np.divide(covariance, scale, out=zeros, where=scale > 0))


def _v_measure(table: NDArray[np.float64]) -> float:
    total = table.sum()
    joint = table[table > 0] / total
    by_class, by_cluster = table.sum(axis=1) / total, table.sum(axis=0) / total
    entropy_class, entropy_cluster = stats.entropy(by_class), stats.entropy(by_cluster)
    mutual = entropy_class + entropy_cluster + float((joint * np.log(joint)).sum())
    homogeneity = mutual / entropy_class if entropy_class else 1.0
    completeness = mutual / entropy_cluster if entropy_cluster else 1.0
    both = homogeneity + completeness
    return float(2 * homogeneity * completeness / both) if both > 0 else 0.0
