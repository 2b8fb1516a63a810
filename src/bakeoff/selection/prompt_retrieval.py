"""Choosing the labelled examples that go into a prompt: the most similar that fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bakeoff.data.neighbours import unit_rows
from bakeoff.errors import DataError
from bakeoff.selection.selector import checked_vectors

# Similarities held at once: 32 MiB of float64.
_BLOCK_ENTRIES = 4 * 2**20
# Similarities that agree to so many decimals are equal, whatever the size of the matrix product
# that they come from.
_DECIMALS = 12
# Unit vectors no farther apart than this are the same item: above the noise of an encoder that
# embeds one text in two batches, far below the distance of different texts.
_SAME = 1e-5


class SimilarityPromptRetriever:
    """Choose labelled examples for the prompt of each input, most similar first, within a budget.

    From the most similar example downwards: the input itself is skipped, an example that is too
    long is skipped, and the walk *stops* at the first that would exceed the budget (a shorter one
    further down is not tried). In the prompt, the most similar example stands last, right before
    the input.

    Parameters
    ----------
    embeddings
        The labelled examples' vectors ``(M, d)``, M at least 1.
    texts
        What each example adds to a prompt, M strings, the answer included; or M tuples of strings,
        whose parts are counted one by one, e.g. (input, answer).
    tokenizer
        Counts tokens: a transformers or tokenizers tokenizer (special tokens are not counted), or
        a function from a string to its tokens, e.g. ``str.split``.
    max_tokens
        Budget of one prompt, the input's own text included; None for none. What stands between
        examples is not counted.
    order
        Order in the prompt: ``"ascending"`` similarity, or ``"descending"``.
    max_example_tokens
        Longer examples are skipped; None for no limit.
    n_shots
        Stop after so many examples; None for no limit.
    center
        What is subtracted from all vectors before the cosine: an array ``(d,)``, best the mean of
        the pool that the examples were chosen from (`VoteK.mean_`); True for the examples' own
        mean; False for nothing.
    skip_identical
        Whether an example whose vector has the same direction as the input's is skipped: that is
        the input itself.
    choose
        ``"similarity"``; or ``"random"``, the control, which walks through the examples in random
        order and is else the same.
    random_state
        Seed, or ``numpy.random.Generator``, of ``choose="random"``. With a seed, equal calls give
        equal examples.

    Attributes
    ----------
    n_tokens : int64 array (M,)
        Tokens of each example.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If lengths do not agree, a vector has no cosine, or an option is unknown.

    Notes
    -----
    Departures from the released code: the input itself is told by a distance of at most 1e-5
    between unit vectors, where the released code asks for a similarity that rounds to exactly 1;
    test inputs are centred with the pool's mean, not with their own.

    References
    ----------
    Hongjin Su, Jungo Kasai, Chen Henry Wu, Weijia Shi, Tianlu Wang, Jiayi Xin, Rui Zhang, Mari
    Ostendorf, Luke Zettlemoyer, Noah A. Smith and Tao Yu. "Selective Annotation Makes Language
    Models Better Few-Shot Learners". ICLR 2023. arXiv:2209.01975.

    Examples
    --------
    >>> retriever = SimilarityPromptRetriever(
    ...     [[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], ["a b c", "d e", "f"], str.split, max_tokens=6
    ... )
    >>> retriever.retrieve([[0.9, 0.1]], ["x"])  # 1 + 3 + 2 tokens; the third would make 7
    [array([1, 0])]
    """

    def __init__(
        self,
        embeddings: ArrayLike,
        texts: Sequence[str | tuple[str, ...]],
        tokenizer: Any,
        max_tokens: int | None,
        order: str = "ascending",
        *,
        max_example_tokens: int | None = 250,
        n_shots: int | None = None,
        center: bool | ArrayLike = False,
        skip_identical: bool = True,
        choose: str = "similarity",
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        vectors = checked_vectors(embeddings, name="embeddings", cosine=center is False)
        if len(texts) != len(vectors):
            raise DataError(
                f"texts must have one entry per row of embeddings, {len(vectors)}, got {len(texts)}"
            )
        if order not in ("ascending", "descending"):
            raise DataError(f"order must be 'ascending' or 'descending', got {order!r}")
        if choose not in ("similarity", "random"):
            raise DataError(f"choose must be 'similarity' or 'random', got {choose!r}")
        for name, limit in (
            ("max_tokens", max_tokens),
            ("max_example_tokens", max_example_tokens),
            ("n_shots", n_shots),
        ):
            whole = isinstance(limit, int | np.integer) and not isinstance(limit, bool)
            if limit is not None and not (whole and limit >= 1):
                raise DataError(f"{name} must be an integer of at least 1, or None, got {limit!r}")
        self.order = order
        self.choose = choose
        self.random_state = random_state
        self.skip_identical = skip_identical
        self._budget = math.inf if max_tokens is None else max_tokens
        self._longest = math.inf if max_example_tokens is None else max_example_tokens
        self._most = len(vectors) if n_shots is None else n_shots
        self._tokenizer = tokenizer
        self._offset = _checked_offset(center, vectors)
        self._vectors = _unit(vectors, self._offset, "embeddings")
        self.n_tokens = np.array([self._count(text) for text in texts], dtype=np.int64)

    def retrieve(
        self,
        query_embeddings: ArrayLike,
        query_texts: Sequence[str | tuple[str, ...]] | None = None,
        *,
        exclude: Sequence[int | Sequence[int] | None] | NDArray[np.int64] | None = None,
    ) -> list[NDArray[np.int64]]:
        """Return for each input its examples, as rows of `embeddings`, in the order of the prompt.

        Parameters
        ----------
        query_embeddings
            The inputs' vectors ``(n, d)``.
        query_texts
            The inputs as they stand in the prompt, n strings, to be counted; by default they take
            no tokens.
        exclude
            For each input the example, or the examples, that it must not get: n entries, each a row
            number, a list of them, or None (or -1) for none.

        Returns
        -------
        list of n int64 arrays
            Empty where nothing fits.

        Raises
        ------
        bakeoff.errors.DataError
            (a ValueError) If lengths or widths do not agree.

        Warns
        -----
        UserWarning
            If inputs get no example; says how many.
        """
        queries = checked_vectors(
            query_embeddings, name="query_embeddings", cosine=not self._offset.any()
        )
        if queries.shape[1] != self._vectors.shape[1]:
            raise DataError(
                f"query_embeddings must have {self._vectors.shape[1]} columns like embeddings, got "
                f"{queries.shape[1]}"
            )
        n, m = len(queries), len(self._vectors)
        if query_texts is not None and len(query_texts) != n:
            raise DataError(
                f"query_texts must have one entry per row of query_embeddings, {n}, got "
                f"{len(query_texts)}"
            )
        excluded = _checked_exclude(exclude, n, m)
        units = _unit(queries, self._offset, "query_embeddings")
        rng = np.random.default_rng(self.random_state) if self.choose == "random" else None
        found: list[NDArray[np.int64]] = []
        size = max(1, _BLOCK_ENTRIES // m)
        for start in range(0, n, size):
            block = units[start : start + size]
            similarities = np.round(block @ self._vectors.T, _DECIMALS)
            for query, row in zip(block, similarities, strict=True):
                walk = np.argsort(-row, kind="stable") if rng is None else rng.permutation(m)
                spent = 0 if query_texts is None else self._count(query_texts[len(found)])
                barred = excluded[len(found)]
                if self.skip_identical:
                    near = np.flatnonzero(row >= 1 - _SAME)
                    distance = np.linalg.norm(self._vectors[near] - query, axis=1)
                    barred = barred | set(near[distance <= _SAME].tolist())
                chosen = self._walk(walk.tolist(), spent, barred)
                # Least similar first, the same whichever way the examples were walked through.
                chosen = chosen[np.lexsort((-chosen, row[chosen]))]
                found.append(chosen if self.order == "ascending" else chosen[::-1].copy())
        without = sum(not len(chosen) for chosen in found)
        if without:
            warnings.warn(
                f"{without} of {n} inputs get no example: all are excluded or too long for "
                "max_tokens or max_example_tokens",
                stacklevel=2,
            )
        return found

    def _walk(self, walk: list[int], spent: int, barred: set[int]) -> NDArray[np.int64]:
        chosen: list[int] = []
        for row in walk:
            if len(chosen) == self._most:
                break
            tokens = int(self.n_tokens[row])
            if row in barred or tokens > self._longest:
                continue
            spent += tokens
            if spent > self._budget:
                break
            chosen.append(row)
        return np.array(chosen, dtype=np.int64)

    def _count(self, text: str | tuple[str, ...]) -> int:
        parts = (text,) if isinstance(text, str) else text
        if hasattr(self._tokenizer, "encode"):
            return sum(
                len(self._tokenizer.encode(part, add_special_tokens=False)) for part in parts
            )
        return sum(len(self._tokenizer(part)) for part in parts)


def _unit(
    vectors: NDArray[np.float32], offset: NDArray[np.float32], name: str
) -> NDArray[np.float64]:
    """Return rows of length 1 in float64, so that similarities are exact to twelve decimals."""
    unit: NDArray[np.float64] = unit_rows(vectors, offset=offset).astype(np.float64)
    lengths = np.linalg.norm(unit, axis=1, keepdims=True)
    zero = np.flatnonzero(lengths == 0)
    if len(zero):
        raise DataError(
            f"{name} has {len(zero)} rows, the first is row {zero[0]}, that equal the mean that "
            "center subtracts, so that they have no cosine: use center=False"
        )
    unit /= lengths
    return unit


def _checked_offset(center: bool | ArrayLike, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    width = vectors.shape[1]
    if isinstance(center, bool | np.bool_):
        if not center:
            return np.zeros(width, dtype=np.float32)
        mean: NDArray[np.float64] = vectors.mean(axis=0, dtype=np.float64)
        return mean.astype(np.float32)
    offset = np.asarray(center)
    if offset.shape != (width,) or offset.dtype.kind not in "fiu" or not np.isfinite(offset).all():
        raise DataError(
            f"center must be True, False or a finite array of {width} numbers, got "
            f"shape {offset.shape} and dtype {offset.dtype}"
        )
    return offset.astype(np.float32)


def _checked_exclude(exclude: Any, n: int, m: int) -> list[set[int]]:
    if exclude is None:
        return [set() for _ in range(n)]
    if len(exclude) != n:
        raise DataError(f"exclude must have one entry per input, {n}, got {len(exclude)}")
    excluded = []
    for entry in exclude:
        rows = [] if entry is None else np.atleast_1d(np.asarray(entry)).tolist()
        wrong = [row for row in rows if not isinstance(row, int) or not -1 <= row < m]
        if wrong:
            raise DataError(
                f"exclude must have row numbers from 0 to {m - 1} (or -1), got {wrong[0]}"
            )
        excluded.append(set(rows))
    return excluded
