"""Bilingual lexicon induction and word similarity: what word vectors are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.lexicons import Lexicon
from bakeoff.errors import DataError

Encode = Callable[[Sequence[str]], Any]
"""Words to vectors ``(n, d)``: an array, a torch tensor or a scipy sparse matrix."""

Matrix = Any
"""A float32 array ``(n, d)``, or a scipy sparse matrix of that shape."""

Metric = Literal["mrr", "p@1"]

# Similarities held at once: 64 MiB of float32, enough for matrix products to run at full speed.
_BLOCK_ENTRIES = 16 * 2**20
# Rows searched between two calls of `progress`, and so the longest wait for Ctrl-C.
_ROWS_PER_CALL = 8192


@dataclass(frozen=True, eq=False)
class LexiconScores:
    """How well translations were found, question by question.

    Parameters
    ----------
    source_words
        The n questions that could be asked.
    ranks
        ``(n,)`` int64: the place of the best right answer among all candidates, from 1.
    nearest
        ``(n,)``: the candidate in the first place.
    n_candidates
        How many candidates there were.
    dropped
        Questions that were not asked, with the reason: ``(source word, reason)``.
    rows
        ``(n,)`` int64: which of the lexicon's questions these are.
    """

    source_words: tuple[str, ...]
    ranks: NDArray[np.int64]
    nearest: tuple[str, ...]
    n_candidates: int
    dropped: tuple[tuple[str, str], ...]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def reciprocal_ranks(self) -> NDArray[np.float64]:
        """One over the rank of each question, ``(n,)``."""
        scores: NDArray[np.float64] = 1.0 / self.ranks
        return scores

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank."""
        return float(self.reciprocal_ranks.mean())

    @property
    def precision_at_1(self) -> float:
        """Share of questions whose first candidate is right."""
        return self.precision_at(1)

    def precision_at(self, k: int) -> float:
        """Return the share of questions with a right answer among the first k candidates."""
        return float((self.ranks <= k).mean())

    def score(self, metric: Metric) -> float:
        """Return one figure: ``"mrr"`` or ``"p@1"``."""
        if metric not in ("mrr", "p@1"):
            raise DataError(f"metric must be 'mrr' or 'p@1', got {metric!r}")
        return self.mrr if metric == "mrr" else self.precision_at_1

    def per_query(self, metric: Metric = "mrr") -> NDArray[np.float64]:
        """Return each question's own score, ``(n,)``; their mean is `score`."""
        self.score(metric)
        if metric == "mrr":
            return self.reciprocal_ranks
        hits: NDArray[np.float64] = (self.ranks == 1).astype(np.float64)
        return hits

    def n_dropped(self) -> dict[str, int]:
        """Return the number of questions not asked by reason."""
        reasons: dict[str, int] = {}
        for _, reason in self.dropped:
            reasons[reason] = reasons.get(reason, 0) + 1
        return reasons

    def select(self, rows: NDArray[Any]) -> LexiconScores:
        """Return the scores of some questions: indices, or a mask of length n."""
        kept = np.flatnonzero(rows) if np.asarray(rows).dtype == np.bool_ else np.asarray(rows)
        if not len(kept):
            raise DataError("no question is left")
        return LexiconScores(
            tuple(self.source_words[row] for row in kept.tolist()),
            self.ranks[kept],
            tuple(self.nearest[row] for row in kept.tolist()),
            self.n_candidates,
            self.dropped,
            self.rows[kept],
        )


def bli(
    encode: Encode,
    source_words: Sequence[str],
    target_vocabulary: Sequence[str],
    gold: Sequence[str | Sequence[str]],
    *,
    source_vocabulary: Sequence[str] = (),
    csls_k: int | None = None,
    has_tokens: Callable[[Sequence[str]], NDArray[np.bool_]] | None = None,
    encode_target: Encode | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LexiconScores:
    """Find each source word's translation among all words of the target language.

    Parameters
    ----------
    encode
        Makes vectors of words, each in isolation; for example ``WordEncoder(...).encode``.
    source_words
        The questions.
    target_vocabulary
        All candidates. The usual test has the 100,000 most frequent words; ranks among the test's
        own answers are far better and not comparable.
    gold
        For each question its right answer, or several, of which the best placed one counts.
    source_vocabulary
        If not empty, questions outside it are dropped, and CSLS compares candidates with it; else
        with the questions.
    csls_k
        Neighbours of CSLS (10 is usual), which takes from each similarity what the candidate has
        with its nearest source words anyway. None ranks by cosine.
    has_tokens
        Tells which words the tokenizer makes no token of; they are dropped, candidates too. For
        example ``WordEncoder(...).has_tokens``.
    encode_target
        For the target language's words, where they are embedded otherwise.
    progress
        Called with (questions ranked, questions in all).

    Returns
    -------
    LexiconScores
        Ranks, and what was dropped: questions whose word, or all of whose answers, are not in the
        vocabularies, neither as they are nor in lower case.

    Raises
    ------
    DataError
        If lengths differ, the vocabulary has none of the right answers, or vectors are unusable.

    Notes
    -----
    Of two candidates with the same similarity the one that comes first in the vocabulary is placed
    first. With an uncased tokenizer many words share one vector, and this decides: sort the
    vocabulary by frequency.

    References
    ----------
    Alexis Conneau et al. "Word Translation Without Parallel Data". ICLR 2018. arXiv:1710.04087.

    Examples
    --------
    >>> table = {"dog": [1, 0], "cat": [0, 1], "chien": [0.9, 0.1], "chat": [0.2, 0.9]}
    >>> scores = bli(lambda words: np.array([table[word] for word in words]),
    ...              ["dog", "cat"], ["chien", "chat"], ["chien", "chat"])
    >>> scores.mrr, scores.nearest
    (1.0, ('chien', 'chat'))
    """
    if len(source_words) != len(gold) or not len(source_words):
        raise DataError(
            f"source_words and gold must be of one length above 0, got {len(source_words)} and "
            f"{len(gold)}"
        )
    answers = [(one,) if isinstance(one, str) else tuple(one) for one in gold]
    lexicon = Lexicon(
        "source",
        "target",
        tuple(source_words),
        tuple(answers),
        tuple(dict.fromkeys(target_vocabulary)),
        tuple(dict.fromkeys(source_vocabulary)),
    )
    return bli_lexicon(
        encode,
        lexicon,
        csls_k=csls_k,
        has_tokens=has_tokens,
        encode_target=encode_target,
        progress=progress,
    )


def bli_lexicon(
    encode: Encode,
    lexicon: Lexicon,
    *,
    csls_k: int | None = None,
    has_tokens: Callable[[Sequence[str]], NDArray[np.bool_]] | None = None,
    encode_target: Encode | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LexiconScores:
    """Return `bli` of a `bakeoff.data.lexicons.Lexicon`.

    Where source and target language are the same (synonyms), a word is no candidate for itself.

    Parameters
    ----------
    encode, csls_k, has_tokens, encode_target, progress
        As for `bli`.
    lexicon
        Questions, answers and candidates.

    Raises
    ------
    DataError
        As `bli`.
    """
    candidates = list(dict.fromkeys(lexicon.target_vocabulary))
    sources = list(dict.fromkeys(lexicon.source_vocabulary))
    if has_tokens is not None:
        candidates = [
            word for word, fit in zip(candidates, has_tokens(candidates), strict=True) if fit
        ]
        if sources:
            sources = [word for word, fit in zip(sources, has_tokens(sources), strict=True) if fit]
    places = {word: place for place, word in enumerate(candidates)}
    known_sources = set(sources)
    tokens = (
        [True] * len(lexicon) if has_tokens is None else has_tokens(lexicon.source_words).tolist()
    )
    same = lexicon.source_language == lexicon.target_language
    rows: list[int] = []
    right: list[list[int]] = []
    own_places: list[int] = []
    dropped: list[tuple[str, str]] = []
    for row, (word, gold) in enumerate(
        zip(lexicon.source_words, lexicon.translations, strict=True)
    ):
        own = places.get(word, -1) if same else -1
        known = {_place(one, places) for one in gold} - {None, own}
        if not tokens[row]:
            dropped.append((word, "no token"))
        elif sources and word not in known_sources and word.lower() not in known_sources:
            dropped.append((word, "source word not in vocabulary"))
        elif not known:
            dropped.append((word, "no translation in vocabulary"))
        else:
            rows.append(row)
            right.append(sorted(cast("set[int]", known)))
            own_places.append(own)
    if not rows:
        first = ", ".join(repr(gold[0]) for gold in lexicon.translations[:3])
        raise DataError(
            f"lexicon {lexicon.label}: no question is left of {len(lexicon):,}; of the right "
            f"answers ({first}, ...) the target vocabulary of {len(candidates):,} words has none, "
            "or the source words are not in theirs"
        )
    asked = [lexicon.source_words[row] for row in rows]
    target_vectors = (encode_target or encode)(candidates)
    source_vectors = encode(asked)
    background = None
    if csls_k is not None and sources:
        background = target_vectors if same and sources == candidates else encode(sources)
    ranks, nearest = ranks_of_gold(
        source_vectors,
        target_vectors,
        right,
        csls_k=csls_k,
        background=background,
        excluded=own_places,
        progress=progress,
    )
    return LexiconScores(
        tuple(asked),
        ranks,
        tuple(candidates[place] for place in nearest.tolist()),
        len(candidates),
        tuple(dropped),
        np.array(rows, dtype=np.int64),
    )


def _place(word: str, places: dict[str, int]) -> int | None:
    place = places.get(word)
    return places.get(word.lower()) if place is None else place


def ranks_of_gold(
    source: Matrix,
    target: Matrix,
    gold: Sequence[Sequence[int]],
    *,
    csls_k: int | None = None,
    background: Matrix | None = None,
    excluded: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank right answers among all candidates, by blocks.

    Parameters
    ----------
    source
        ``(n, d)``: the questions' vectors, of any length.
    target
        ``(m, d)``: the candidates'.
    gold
        For each question the rows of `target` that are right; at least one.
    csls_k
        Ranks by CSLS with so many neighbours; None by cosine.
    background
        ``(s, d)``: what CSLS compares candidates with; `source` if None.
    excluded
        For each question one row of `target` that is no candidate, -1 for none.
    progress
        Called with (questions done, questions in all).

    Returns
    -------
    ranks : int64 array
        ``(n,)``: 1 plus the number of candidates before the best placed right answer. Of equal
        ones, the lower row is before.
    nearest : int64 array
        ``(n,)``: the first candidate's row.

    Raises
    ------
    DataError
        If shapes do not agree, a question has no right answer, rows are out of range, or vectors
        are not finite.
    """
    questions, candidates = _unit(source, "source"), _unit(target, "target")
    _same_width(questions, candidates)
    n, m = questions.shape[0], candidates.shape[0]
    _check_gold(gold, n, m, excluded)
    right = [sorted(places) for places in gold]  # of equal ones the lower row is the better placed
    offset: NDArray[np.float32] | None = None
    if csls_k is not None:
        pool = questions if background is None else _unit(background, "background")
        _same_width(pool, candidates)
        offset = _mean_of_nearest(candidates, pool, csls_k)
    ranks = np.empty(n, dtype=np.int64)
    nearest = np.empty(n, dtype=np.int64)
    for block, scores in _blocks(questions, candidates, offset):
        for row, own in enumerate(scores, start=block.start):  # a row stays in the cache
            if excluded is not None and excluded[row] >= 0:
                own[excluded[row]] = -np.inf
            best = max(right[row], key=own.__getitem__)
            level = own[best]
            before = np.count_nonzero(own > level) + np.count_nonzero(own[:best] == level)
            ranks[row] = 1 + before
            nearest[row] = own.argmax()
        if progress is not None:
            progress(block.stop, n)
    return ranks, nearest


def csls_offsets(
    source: Matrix,
    target: Matrix,
    k: int = 10,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what CSLS subtracts: each word's mean cosine to its k nearest of the other side.

    ``CSLS(x, y) = 2 cos(x, y) - r(x) - r(y)``.

    Parameters
    ----------
    source, target
        ``(n, d)`` and ``(m, d)``, of any length.
    k
        Neighbours; where a side has fewer, all of them.
    progress
        Called with (rows done, rows in all), both sides together.

    Returns
    -------
    r_source, r_target : float32 arrays
        ``(n,)`` and ``(m,)``.

    Raises
    ------
    DataError
        If shapes do not agree, `k` is below 1, or vectors are not finite.

    Examples
    --------
    >>> one, other = csls_offsets(np.eye(2), np.array([[1.0, 0.0], [0.6, 0.8]]), k=1)
    >>> one.round(1).tolist(), other.round(1).tolist()
    ([1.0, 0.800000011920929], [1.0, 0.800000011920929])
    """
    one, other = _unit(source, "source"), _unit(target, "target")
    _same_width(one, other)
    total = one.shape[0] + other.shape[0]

    def so_far(start: int) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, _: progress(start + done, total)

    return (
        _mean_of_nearest(one, other, k, so_far(0)),
        _mean_of_nearest(other, one, k, so_far(one.shape[0])),
    )


def translate(
    source: Matrix,
    target: Matrix,
    n: int = 1,
    *,
    csls_k: int | None = 10,
    background: Matrix | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the n best candidates of each source word.

    Parameters
    ----------
    source, target
        ``(s, d)`` and ``(m, d)``, of any length.
    n
        How many.
    csls_k
        Ranks by CSLS; None by cosine.
    background
        What candidates are compared with; `source` if None.

    Returns
    -------
    rows : int64 array
        ``(s, n)`` rows of `target`, the best first; of equal ones the lower row first.
    scores : float32 array
        ``(s, n)``: cosine, or CSLS less what the source word subtracts (the same for all its
        candidates).

    Raises
    ------
    DataError
        If shapes do not agree or there are fewer candidates.
    """
    questions, candidates = _unit(source, "source"), _unit(target, "target")
    _same_width(questions, candidates)
    if not 1 <= n <= candidates.shape[0]:
        raise DataError(f"n must be between 1 and {candidates.shape[0]} (candidates), got {n}")
    offset = None
    if csls_k is not None:
        pool = questions if background is None else _unit(background, "background")
        offset = _mean_of_nearest(candidates, pool, csls_k)
    rows = np.empty((questions.shape[0], n), dtype=np.int64)
    values = np.empty((questions.shape[0], n), dtype=np.float32)
    for block, scores in _blocks(questions, candidates, offset):
        level = np.partition(scores, -n, axis=1)[:, -n]
        for row, own in enumerate(scores):
            fit = np.flatnonzero(own >= level[row])
            order = fit[np.lexsort((fit, -own[fit]))][:n]
            rows[block.start + row] = order
            values[block.start + row] = own[order]
    return rows, values


# Word similarity ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WordSimilarityScores:
    """How well cosines follow people's judgement.

    Parameters
    ----------
    spearman
        Rank correlation of `cosines` and `judgements`.
    cosines, judgements
        ``(n,)`` float64, of the pairs that could be scored.
    rows
        ``(n,)`` int64: which of the pairs given these are.
    dropped
        Pairs left out because of a word without token.
    """

    spearman: float
    cosines: NDArray[np.float64]
    judgements: NDArray[np.float64]
    rows: NDArray[np.int64]
    dropped: tuple[tuple[str, str], ...]


def word_similarity(
    encode: Encode,
    first: Sequence[str],
    second: Sequence[str],
    judgements: Sequence[float],
    *,
    has_tokens: Callable[[Sequence[str]], NDArray[np.bool_]] | None = None,
    encode_second: Encode | None = None,
) -> WordSimilarityScores:
    """Correlate the cosine of two words with people's judgement of their similarity.

    Parameters
    ----------
    encode
        Makes vectors of words, each in isolation.
    first, second
        n words each; row i of one belongs to row i of the other. Of two languages where the test
        is across languages.
    judgements
        n numbers, on any scale; only their order counts.
    has_tokens
        As for `bli`: pairs with a word without token are dropped.
    encode_second
        For the second words, where they are embedded otherwise.

    Returns
    -------
    WordSimilarityScores
        Spearman's correlation, with mean ranks for ties; cosines are rounded to 6 decimals.

    Raises
    ------
    DataError
        If lengths differ, fewer than 3 pairs are left, or all judgements are equal.

    Examples
    --------
    >>> table = {"a": [1, 0], "b": [1, 0.1], "c": [1, 1], "d": [0, 1]}
    >>> word_similarity(lambda words: np.array([table[w] for w in words], dtype=float),
    ...                 ["a", "a", "a"], ["b", "c", "d"], [9, 5, 1]).spearman
    1.0
    """
    from scipy.stats import spearmanr

    if not len(first) == len(second) == len(judgements):
        raise DataError(
            f"first, second and judgements must be of one length, got {len(first)}, {len(second)} "
            f"and {len(judgements)}"
        )
    fit = np.ones(len(first), dtype=np.bool_)
    if has_tokens is not None:
        fit = has_tokens(list(first)) & has_tokens(list(second))
    rows = np.flatnonzero(fit)
    judged = np.asarray(judgements, dtype=np.float64)[rows]
    if len(rows) < 3 or not np.isfinite(judged).all() or len(np.unique(judged)) < 2:
        raise DataError(
            f"{len(rows)} pairs are left of {len(first)}: at least 3 with finite judgements that "
            "are not all equal are needed"
        )
    kept = rows.tolist()
    one = _unit(_once(encode, [first[row] for row in kept]), "first")
    other = _unit(_once(encode_second or encode, [second[row] for row in kept]), "second")
    _same_width(one, other)
    product = one.multiply(other) if hasattr(one, "multiply") else one * other
    # To what float32 can tell: a word with itself should tie with another word with itself.
    cosines = np.asarray(product.sum(axis=1), dtype=np.float64).ravel().round(6)
    dropped = tuple((first[row], second[row]) for row in np.flatnonzero(~fit).tolist())
    return WordSimilarityScores(
        float(spearmanr(cosines, judged).statistic), cosines, judged, rows, dropped
    )


def _once(encode: Encode, words: Sequence[str]) -> Any:
    """Embed each distinct word once."""
    places = {word: place for place, word in enumerate(dict.fromkeys(words))}
    vectors = encode(list(places))
    if hasattr(vectors, "tocsr"):
        vectors = vectors.tocsr()
    return vectors[[places[word] for word in words]]


# Matrices -----------------------------------------------------------------------------------------


def _unit(vectors: Any, name: str) -> Matrix:
    """Return float32 rows of length 1; a row of zeros stays zero."""
    if hasattr(vectors, "tocsr"):
        from sklearn.preprocessing import normalize

        if not np.isfinite(vectors.data).all():
            raise DataError(f"{name}: vectors are not all finite")
        return normalize(vectors.tocsr().astype(np.float32))
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().cpu().float().numpy()
    from bakeoff.data.neighbours import unit_rows

    array = np.asarray(vectors)
    if array.ndim != 2 or not len(array):
        raise DataError(f"{name}: vectors must be (n, d) with n above 0, got {array.shape}")
    # A sum is finite only if all of its terms are, and needs no array of its own.
    wide = np.result_type(array, np.float32)
    if not np.isfinite(array.sum(axis=1, dtype=wide)).all():
        raise DataError(f"{name}: vectors are not all finite")
    return unit_rows(array)


def _same_width(one: Matrix, other: Matrix) -> None:
    if one.shape[1] != other.shape[1]:
        raise DataError(f"vectors are of widths {one.shape[1]} and {other.shape[1]}")
    if hasattr(one, "tocsr") != hasattr(other, "tocsr"):
        raise DataError("one side's vectors are sparse, the other's are not")


def _check_gold(
    gold: Sequence[Sequence[int]], n: int, m: int, excluded: Sequence[int] | None
) -> None:
    if len(gold) != n:
        raise DataError(f"gold must have {n} entries, one per question, got {len(gold)}")
    if excluded is not None and len(excluded) != n:
        raise DataError(f"excluded must have {n} entries, one per question, got {len(excluded)}")
    for row, places in enumerate(gold):
        if not len(places):
            raise DataError(f"gold[{row}] is empty: every question needs a right answer")
        if not 0 <= min(places) <= max(places) < m:
            raise DataError(f"gold[{row}] must hold rows from 0 to {m - 1}, got {list(places)}")
        if excluded is not None and not (excluded[row] < m and excluded[row] not in places):
            raise DataError(
                f"excluded[{row}] must be a row below {m} that is not right, got {excluded[row]}"
            )


def _blocks(
    questions: Matrix, candidates: Matrix, offset: NDArray[np.float32] | None = None
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield the similarities of some questions at a time with all candidates, to be overwritten.

    With the candidates' `offset`, CSLS but for what the question subtracts, which is the same for
    all its candidates.
    """
    n, m = questions.shape[0], candidates.shape[0]
    # Never one row alone: libraries then compute equal columns by different sums, and break ties.
    size = max(2, min(n, _BLOCK_ENTRIES // m))
    sparse = hasattr(questions, "tocsr")
    columns = candidates.T.tocsr() if sparse else candidates.T
    room = None if sparse else np.empty((size, m), dtype=np.float32)
    for start in range(0, n, size):
        block = slice(start, min(start + size, n))
        rows = questions[block] if offset is None else 2 * questions[block]
        if room is None:
            scores = (rows @ columns).toarray()
        elif len(rows) == 1:
            scores = np.matmul(np.repeat(rows, 2, axis=0), columns, out=room[:2])[:1]
        else:
            scores = np.matmul(rows, columns, out=room[: len(rows)])
        if offset is not None:
            scores -= offset
        yield block, scores


def _mean_of_nearest(
    rows: Matrix,
    pool: Matrix,
    k: int,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the mean similarity of each row to its k nearest rows of the pool."""
    if k < 1:
        raise DataError(f"csls_k must be at least 1, got {k}")
    k = min(k, pool.shape[0])
    means = np.empty(rows.shape[0], dtype=np.float32)
    if not hasattr(rows, "tocsr"):
        import faiss  # its search costs little more than the bare product

        for start in range(0, len(rows), _ROWS_PER_CALL):
            end = min(start + _ROWS_PER_CALL, len(rows))
            nearest, _ = faiss.knn(rows[start:end], pool, k, metric=faiss.METRIC_INNER_PRODUCT)
            means[start:end] = nearest.mean(axis=1, dtype=np.float64)
            if progress is not None:
                progress(end, len(rows))
        return means
    for block, similarities in _blocks(rows, pool):
        # Only the k largest are summed; their order does not matter.
        similarities.partition(similarities.shape[1] - k, axis=1)
        means[block] = similarities[:, -k:].mean(axis=1, dtype=np.float64)
        if progress is not None:
            progress(block.stop, rows.shape[0])
    return means
