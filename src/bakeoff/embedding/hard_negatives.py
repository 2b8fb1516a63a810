"""Positive-aware mining of hard negatives (TopK-PercPos of NV-Retriever)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.training import pairs_with_negatives
from bakeoff.errors import DataError

Vectors = NDArray[np.float32]
Teacher = "SentenceTransformer | Callable[[Sequence[str]], Any] | tuple[NDArray[Any], NDArray[Any]]"

# Similarities held at once: 64 MiB of float32, enough for matrix products to run at full speed.
_BLOCK_ENTRIES = 16 * 2**20


@dataclass(frozen=True)
class HardNegatives:
    """What `mine_hard_negatives` found.

    Parameters
    ----------
    queries, positives, corpus
        The texts that were searched.
    indices
        ``(N, num_negatives)`` int64 into `corpus`, hardest first; -1 where there were not enough.
    scores
        ``(N, num_negatives)`` float32, the teacher's cosine; NaN where the index is -1.
    positive_scores
        ``(N,)`` float32, the teacher's cosine of each query and its positive.
    """

    queries: tuple[str, ...]
    positives: tuple[str, ...]
    corpus: tuple[str, ...]
    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    positive_scores: NDArray[np.float32]

    @property
    def n_without(self) -> int:
        """Number of queries with no negative at all."""
        return int((self.indices[:, 0] < 0).sum())

    @property
    def n_incomplete(self) -> int:
        """Number of queries with fewer negatives than asked for, none included."""
        return int((self.indices[:, -1] < 0).sum())

    def pairs(self, group: str = "mined") -> TextPairs:
        """Return the queries that have all their negatives, ready for training.

        With more than one negative per query, each entry of ``negatives`` is a tuple.

        Raises
        ------
        bakeoff.errors.DataError
            If no query has all its negatives.
        """
        kept = np.flatnonzero(self.indices[:, -1] >= 0).tolist()
        if not kept:
            raise DataError(
                f"no query has all {self.indices.shape[1]} negatives: ask for fewer, or give a "
                "larger corpus"
            )
        chosen = [tuple(self.corpus[i] for i in self.indices[row].tolist()) for row in kept]
        return pairs_with_negatives(
            [self.queries[row] for row in kept],
            [self.positives[row] for row in kept],
            chosen,
            group,
        )


def mine_hard_negatives(
    teacher: Any,
    queries: Sequence[str],
    positives: Sequence[str],
    corpus: Sequence[str] | None = None,
    *,
    num_negatives: int = 7,
    max_score_ratio: float | None = 0.95,
    max_score: float | None = None,
    skip_top: int = 0,
) -> HardNegatives:
    """Find, for each query, the documents that a teacher ranks highest and that are still wrong.

    Documents that score nearly as high as the positive are probably unlabelled positives, and are
    passed over: a candidate must not score above `max_score_ratio` times the positive's own score.
    Never returned are a positive of the query, a text equal to it or to the query, and the same
    text twice.

    Parameters
    ----------
    teacher
        One of: a SentenceTransformer (its ``encode_query`` and ``encode_document`` are used); a
        function from a list of texts to vectors ``(n, d)``; the vectors themselves,
        ``(query_vectors, corpus_vectors)``, one row per query and per entry of `corpus`.
    queries, positives
        N texts each; row i of one belongs to row i of the other. Equal queries pool their
        positives: none of them is a negative, and the lowest of their scores sets the limit.
    corpus
        Documents to choose from; the positives if None.
    num_negatives
        Negatives per query.
    max_score_ratio
        The limit relative to the positive's score p, as ``p - (1 - ratio) * |p|``, which is
        ``ratio * p`` unless p is negative. None for no such limit.
    max_score
        An absolute limit besides; None for none.
    skip_top
        How many of the hardest remaining candidates to pass over as well.

    Returns
    -------
    HardNegatives
        Indices, scores and texts. Candidates of equal score come in no particular order.

    Warns
    -----
    UserWarning
        If some queries have no negative left; says how many.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If no query has a negative left, lengths do not agree, or vectors are not
        finite or of the wrong shape.

    Notes
    -----
    Similarities are computed in blocks: beyond a few copies of the vectors, memory stays at about
    100 MiB whatever their number. The result is exact, where a
    search for a fixed number of neighbours can run out of candidates after filtering.

    References
    ----------
    Gabriel de Souza P. Moreira, Radek Osmulski, Mengyao Xu, Ronay Ak, Benedikt Schifferer and Even
    Oldridge. "NV-Retriever: Improving text embedding models with effective hard-negative mining".
    2024. arXiv:2407.15831.

    Examples
    --------
    >>> query, documents = np.array([[1.0, 0.0]]), np.array([[1.0, 0.1], [1.0, 0.12], [0.7, 0.7]])
    >>> mined = mine_hard_negatives(
    ...     (query, documents), ["q"], ["p"], ["p", "the same in other words", "wrong"],
    ...     num_negatives=1,
    ... )
    >>> mined.pairs().negatives
    ('wrong',)
    """
    if not queries or len(queries) != len(positives):
        raise DataError(
            f"queries and positives must be of one length above 0, got {len(queries)} and "
            f"{len(positives)}"
        )
    if num_negatives < 1 or skip_top < 0:
        raise ValueError(
            f"num_negatives must be at least 1 and skip_top at least 0, got {num_negatives} and "
            f"{skip_top}"
        )
    import torch

    documents = tuple(positives if corpus is None else corpus)
    given = isinstance(teacher, tuple)
    searched = documents
    if not given:  # the teacher can embed positives that the corpus lacks, for their scores
        known = set(documents)
        searched += tuple(dict.fromkeys(text for text in positives if text not in known))
    query_vectors, vectors = _embed(teacher, tuple(queries), searched)

    # One row per distinct text: the first of equal documents stands for all.
    row_of: dict[str, int] = {}
    for index, text in enumerate(searched):
        row_of.setdefault(text, index)
    missing = [text for text in dict.fromkeys(positives) if text not in row_of]
    if missing:
        raise DataError(
            f"corpus lacks {len(missing)} of the positives, so that the vectors given have no row "
            f"for them: {missing[0]!r}"
        )
    kept = np.array(sorted(row for row in row_of.values() if row < len(documents)), dtype=np.int64)
    column_of = {documents[row]: column for column, row in enumerate(kept.tolist())}

    positives_of: dict[str, set[str]] = {}
    for query, positive in zip(queries, positives, strict=True):
        positives_of.setdefault(query, set()).add(positive)
    rows = np.array([row_of[positive] for positive in positives])
    positive_scores = np.einsum("nd,nd->n", query_vectors, vectors[rows]).astype(np.float32)
    lowest: dict[str, float] = {}
    for query, score in zip(queries, positive_scores.tolist(), strict=True):
        lowest[query] = min(score, lowest.get(query, np.inf))
    limits = _limits(np.array([lowest[query] for query in queries]), max_score_ratio, max_score)

    indices = np.full((len(queries), num_negatives), -1, dtype=np.int64)
    scores = np.full((len(queries), num_negatives), np.nan, dtype=np.float32)
    block_size = max(1, _BLOCK_ENTRIES // max(1, len(kept)))
    candidates = vectors[kept]
    for start in range(0, len(queries), block_size):
        block = slice(start, start + block_size)
        similarity = query_vectors[block] @ candidates.T
        similarity[similarity > limits[block, None]] = -np.inf
        for row, query in enumerate(queries[block]):
            for text in (query, *positives_of[query]):
                if text in column_of:
                    similarity[row, column_of[text]] = -np.inf
        found, columns = torch.topk(
            torch.from_numpy(similarity), min(skip_top + num_negatives, len(kept)), dim=1
        )
        top_scores, top = found.numpy()[:, skip_top:], columns.numpy()[:, skip_top:]
        width = top.shape[1]
        indices[block, :width] = np.where(np.isfinite(top_scores), kept[top], -1)
        scores[block, :width] = np.where(np.isfinite(top_scores), top_scores, np.nan)

    mined = HardNegatives(
        tuple(queries), tuple(positives), documents, indices, scores, positive_scores
    )
    if mined.n_without == len(queries):
        raise DataError(
            f"none of the {len(queries)} queries has a negative left after filtering: raise "
            "max_score_ratio or max_score, lower skip_top, or give a larger corpus"
        )
    if mined.n_without:
        warnings.warn(
            f"{mined.n_without} of {len(queries)} queries have no negative left after filtering",
            stacklevel=2,
        )
    return mined


def _limits(
    positive_scores: NDArray[np.float64], max_score_ratio: float | None, max_score: float | None
) -> NDArray[np.float32]:
    limits = np.full(len(positive_scores), np.inf)
    if max_score_ratio is not None:
        # Not simply ratio * score, which would lie above the score where that is negative.
        limits = positive_scores - (1 - max_score_ratio) * np.abs(positive_scores)
    if max_score is not None:
        limits = np.minimum(limits, max_score)
    return limits.astype(np.float32)


def _embed(
    teacher: Any, queries: tuple[str, ...], documents: tuple[str, ...]
) -> tuple[Vectors, Vectors]:
    """Return unit vectors of queries and documents; each distinct text is embedded once."""
    if isinstance(teacher, tuple):
        if len(teacher) != 2:
            raise DataError(
                f"teacher must be (query_vectors, corpus_vectors), got {len(teacher)} parts"
            )
        parts = [np.asarray(part) for part in teacher]
    elif hasattr(teacher, "encode_query") and hasattr(teacher, "encode_document"):
        parts = [_once(teacher.encode_query, queries), _once(teacher.encode_document, documents)]
    elif callable(teacher):
        parts = [_once(teacher, queries), _once(teacher, documents)]
    else:
        raise TypeError(
            "teacher must be a SentenceTransformer, a function from texts to vectors, or "
            f"(query_vectors, corpus_vectors), got {type(teacher).__name__}"
        )
    checked = []
    for part, texts, name in zip(parts, (queries, documents), ("query", "corpus"), strict=True):
        if part.ndim != 2 or len(part) != len(texts):
            raise DataError(
                f"the teacher's {name} vectors must be ({len(texts)}, d), got shape {part.shape}"
            )
        if not np.isfinite(part).all():
            raise DataError(f"the teacher's {name} vectors are not all finite")
        length = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
        checked.append((part / np.maximum(length, 1e-12)).astype(np.float32))
    if checked[0].shape[1] != checked[1].shape[1]:
        raise DataError(
            f"the teacher's query vectors have width {checked[0].shape[1]}, its corpus vectors "
            f"{checked[1].shape[1]}"
        )
    return checked[0], checked[1]


def _once(embed: Callable[[list[str]], Any], texts: tuple[str, ...]) -> NDArray[Any]:
    position = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    vectors = embed(list(position))
    if hasattr(vectors, "detach"):  # a torch tensor
        vectors = vectors.detach().cpu().float().numpy()
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or len(vectors) != len(position):
        raise DataError(
            f"the teacher must return ({len(position)}, d) vectors for {len(position)} texts, got "
            f"shape {vectors.shape}"
        )
    return vectors[[position[text] for text in texts]]
