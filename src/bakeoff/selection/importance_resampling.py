"""Importance resampling of a pool towards a target, by hashed n-grams (DSIR)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bakeoff.errors import DataError
from bakeoff.selection.selector import Selector, checked_count, checked_labeled

Progress = Callable[[int, int], None]

# Runs of letters and digits, and runs of punctuation: the released code's words.
_WORDS = re.compile(r"\w+|[^\w\s]+")
# Texts whose n-grams are looked up together.
_BLOCK = 512
# n-grams whose buckets are remembered, about 80 MB; rarer ones are hashed each time they occur.
_REMEMBERED = 2**19
# Bytes of buckets kept from the first pass over the pool; what lies beyond is hashed again.
_KEPT_BYTES = 256 * 2**20


class ImportanceResampler(Selector):
    r"""Samples texts in proportion to how much likelier the target makes them than the pool.

    A text is a bag of n-grams hashed into buckets. With the buckets' shares p in the target and q
    in the pool, a text's log weight is the sum of log(p / q) over its n-grams; rows are drawn
    without replacement with these weights, by the Gumbel-top-k trick. No language model is needed.

    Parameters
    ----------
    n_select
        How many rows to pick.
    n_buckets
        Buckets that n-grams are hashed into.
    ngrams
        Longest n-gram; all lengths from 1 are counted.
    smoothing
        Added to every bucket's share before the logarithm, as released.
    min_words
        Texts with fewer words are never picked. The released code's default is 100.
    adjust_length
        Whether log weights are scaled to the pool's mean number of n-grams. By default they are
        sums, as published for pieces of 128 words each; in a pool of mixed lengths a long text's
        sum is nearly always far below a short one's, so that short texts win (see *Notes*).
    noise
        Whether to sample. Without, the largest weights are taken.
    random_state
        Seed, ``numpy.random.Generator`` or None.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows in the order in which they were drawn.
    log_weights_ : float64 array of shape (N,)
        Every row's log importance weight, up to a constant.
    n_words_ : int64 array of shape (N,)
        Every row's number of words.
    log_ratios_ : float64 array of shape (n_buckets,)
        log((p + smoothing) / (q + smoothing)) of every bucket.

    Notes
    -----
    Words are lower-cased runs of letters and digits, or of punctuation; n-grams are joined by a
    space and hashed with SHA-256, as released, so that weights equal those of the
    ``data-selection`` package. The pool may be any object that can be iterated over twice, e.g. a
    class whose ``__iter__`` reads files: beyond 400 MB or so, memory grows by some 60 bytes a text.

    Weights are products over a text's n-grams, so they spread over hundreds of nats and the noise,
    about one nat, matters only among near ties. Empty texts would have log weight 0 and win;
    `min_words` is 1 for that reason.

    References
    ----------
    Sang Michael Xie, Shibani Santurkar, Tengyu Ma and Percy Liang. "Data Selection for Language
    Models via Importance Resampling". NeurIPS 2023. arXiv:2302.03169.

    Examples
    --------
    >>> pool = ["the cat and the dog", "stocks fell and bonds rose", "the dog saw the cat"]
    >>> resampler = ImportanceResampler(n_select=2, random_state=0)
    >>> sorted(resampler.fit(pool, queries=["the dog and the cat"]).selected_indices_.tolist())
    [0, 2]
    """

    def __init__(
        self,
        n_select: int,
        n_buckets: int = 10_000,
        ngrams: int = 2,
        smoothing: float = 1e-8,
        min_words: int = 1,
        adjust_length: bool = False,
        noise: bool = True,
        random_state: Any = None,
    ) -> None:
        self.n_select = n_select
        self.n_buckets = n_buckets
        self.ngrams = ngrams
        self.smoothing = smoothing
        self.min_words = min_words
        self.adjust_length = adjust_length
        self.noise = noise
        self.random_state = random_state

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any,
        y: None = None,
        *,
        queries: Iterable[Any] | None = None,
        already_labeled: ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Draw rows of the pool.

        Parameters
        ----------
        X
            Texts, or samples with ``.text``. Iterated over twice.
        y
            Ignored.
        queries
            Texts or samples that look like the target.
        already_labeled
            Rows never to pick; they count as part of the pool's distribution.
        progress
            Called with (texts read, texts to read) over both passes; the second number is 0 while
            it is unknown.

        Raises
        ------
        DataError
            If there are no queries, queries or pool have no words, the pool cannot be iterated
            over twice, or a parameter is out of range.
        """
        generator = _generator(self.random_state)
        hasher = self._hasher()
        if not 0 < self.smoothing < 1:
            raise DataError(f"smoothing must be between 0 and 1, got {self.smoothing!r}")
        if isinstance(X, str) or not isinstance(X, Iterable) or iter(X) is X:
            raise DataError(
                "X must be texts that can be iterated over twice, e.g. a list or an object whose "
                f"__iter__ opens the files anew; got {type(X).__name__}"
            )
        if queries is None or isinstance(queries, str):
            raise DataError(
                "queries must be texts or samples that look like the target, got "
                f"{'none' if queries is None else 'one string'}"
            )
        target = np.zeros(self.n_buckets, dtype=np.int64)
        for block in hasher.blocks(queries, "queries"):
            target += np.bincount(block.buckets, minlength=self.n_buckets)
        if not target.any():
            raise DataError("queries must hold at least one text with a word")

        expected = 2 * len(X) if isinstance(X, Sized) else 0
        raw = np.zeros(self.n_buckets, dtype=np.int64)
        kept: list[_Block] = []
        room = _KEPT_BYTES
        lengths: list[NDArray[np.int64]] = []
        words: list[NDArray[np.int64]] = []
        read = 0
        for block in hasher.blocks(X, "X"):
            raw += np.bincount(block.buckets, minlength=self.n_buckets)
            lengths.append(block.lengths)
            words.append(block.words)
            read += len(block.lengths)
            room -= block.buckets.nbytes
            if room >= 0:  # once one block does not fit, no later one is kept either
                kept.append(block)
            if progress is not None:
                progress(read, expected)
        if not raw.any():
            raise DataError("X must hold at least one text with a word")
        labeled = checked_labeled(already_labeled, read)
        n_ngrams = np.concatenate(lengths)
        self.n_words_ = np.concatenate(words)
        may = self.n_words_ >= self.min_words
        may[labeled] = False
        n_select = checked_count(
            self.n_select, int(may.sum()), pool=f"the pool (min_words={self.min_words})"
        )

        self.log_ratios_ = np.log(target / target.sum() + self.smoothing) - np.log(
            raw / raw.sum() + self.smoothing
        )
        weights = []
        again = 0
        for block in self._second_pass(X, hasher, kept, complete=room >= 0):
            weights.append(block.sums(self.log_ratios_))
            again += len(block.lengths)
            if progress is not None:
                progress(read + again, 2 * read)
        if again != read:
            raise DataError(
                f"X gave {read} texts when it was read first and {again} when it was read again"
            )
        self.log_weights_ = np.concatenate(weights)
        if self.adjust_length:
            self._mean_ngrams = float(n_ngrams[n_ngrams > 0].mean())
            self.log_weights_ *= self._mean_ngrams / np.maximum(n_ngrams, 1)
        rows = np.flatnonzero(may)
        if self.noise:
            picks = gumbel_top_k(self.log_weights_[rows], n_select, random_state=generator)
        else:
            picks = np.argsort(-self.log_weights_[rows], kind="stable")[:n_select]
        self.selected_indices_ = rows[picks].astype(np.int64)
        self._rank = _ranks(self.log_weights_[rows])[picks]
        self._n_candidates = len(rows)
        return self

    def log_weights(self, texts: Iterable[Any]) -> Iterator[float]:
        """Yield the log weight of each of further texts, which may be a stream of any length.

        Parameters
        ----------
        texts
            Texts or samples; read as the weights are asked for, some hundred at a time.
        """
        for block in self._hasher().blocks(texts, "texts"):
            sums = block.sums(self.log_ratios_)
            if self.adjust_length:
                sums *= self._mean_ngrams / np.maximum(block.lengths, 1)
            yield from sums.tolist()

    def reasons(self) -> list[str]:
        """Return each pick's log weight and its place among the candidates' weights."""
        return [
            f"log weight {weight:.1f}, {rank + 1} of {self._n_candidates}"
            for weight, rank in zip(
                self.log_weights_[self.selected_indices_].tolist(), self._rank.tolist(), strict=True
            )
        ]

    def _hasher(self) -> _NgramHasher:
        for name in ("n_buckets", "ngrams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise DataError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.n_buckets > 2**31:
            raise DataError(f"n_buckets must be at most 2**31, got {self.n_buckets}")
        return _NgramHasher(int(self.n_buckets), int(self.ngrams))

    @staticmethod
    def _second_pass(
        X: Iterable[Any], hasher: _NgramHasher, kept: list[_Block], *, complete: bool
    ) -> Iterator[_Block]:
        yield from kept
        if not complete:
            skip = sum(len(block.lengths) for block in kept)
            yield from hasher.blocks(islice(X, skip, None), "X")


def gumbel_top_k(log_weights: ArrayLike, k: int, *, random_state: Any = None) -> NDArray[np.int64]:
    """Draw k of n items without replacement, each time in proportion to the weights left.

    Standard Gumbel noise is added to the log weights and the k largest are taken, which has the
    same law as drawing one by one.

    Parameters
    ----------
    log_weights
        Array ``(n,)``; minus infinity for what must not be drawn.
    k
        Between 1 and the number of finite log weights.
    random_state
        Seed, ``numpy.random.Generator`` or None.

    Returns
    -------
    int64 array of shape (k,)
        In the order in which they were drawn.

    Raises
    ------
    DataError
        If a log weight is NaN or plus infinity, or there are fewer than `k` to draw from.

    References
    ----------
    Wouter Kool, Herke van Hoof and Max Welling. "Stochastic Beams and Where to Find Them". ICML
    2019. arXiv:1903.06059.

    Examples
    --------
    >>> gumbel_top_k([0.0, -1000.0, -2000.0], 2, random_state=0)
    array([0, 1])
    """
    weights = np.asarray(log_weights, dtype=np.float64)
    if weights.ndim != 1:
        raise DataError(f"log_weights must have one dimension, got shape {weights.shape}")
    if np.isnan(weights).any() or np.isposinf(weights).any():
        raise DataError("log_weights must not be NaN or plus infinity")
    available = int(np.isfinite(weights).sum())
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= available:
        raise DataError(
            f"k must be an integer between 1 and {available}, the finite log weights, got {k!r}"
        )
    keys = weights + _generator(random_state).gumbel(size=len(weights))
    top = np.argpartition(-keys, k - 1)[:k]
    return top[np.argsort(-keys[top], kind="stable")].astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Block:
    """The buckets of some texts' n-grams, one text after the other."""

    buckets: NDArray[Any]
    lengths: NDArray[np.int64]
    words: NDArray[np.int64]

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each text's sum of its buckets' values."""
        sums = np.zeros(len(self.lengths))
        filled = self.lengths > 0
        if filled.any():
            starts = (np.cumsum(self.lengths) - self.lengths)[filled]
            sums[filled] = np.add.reduceat(values[self.buckets], starts)
        return sums


class _NgramHasher(dict[str, int]):
    """The bucket of every n-gram met so far, and how texts become buckets."""

    def __init__(self, n_buckets: int, ngrams: int) -> None:
        super().__init__()
        self.n_buckets = n_buckets
        self.ngrams = ngrams
        self.dtype = np.uint16 if n_buckets <= 2**16 else np.uint32

    def __missing__(self, ngram: str) -> int:
        digest = sha256(ngram.encode("utf-8", "surrogatepass")).digest()
        bucket = int.from_bytes(digest) % self.n_buckets
        if len(self) < _REMEMBERED:
            self[ngram] = bucket
        return bucket

    def blocks(self, texts: Iterable[Any], name: str) -> Iterator[_Block]:
        """Yield the buckets of all texts, a few hundred texts at a time."""
        stream = iter(texts)
        first = 0
        while batch := list(islice(stream, _BLOCK)):
            ngrams: list[str] = []
            ends = np.empty(len(batch), dtype=np.int64)
            words = np.empty(len(batch), dtype=np.int64)
            for place, item in enumerate(batch):
                found = _WORDS.findall(text_of(item, name, first + place).lower())
                words[place] = len(found)
                ngrams += found
                for length in range(2, self.ngrams + 1):
                    ngrams += map(" ".join, zip(*(found[i:] for i in range(length)), strict=False))
                ends[place] = len(ngrams)
            buckets = np.array([self[ngram] for ngram in ngrams], dtype=self.dtype)
            yield _Block(buckets, np.diff(ends, prepend=0), words)
            first += len(batch)


def text_of(item: Any, name: str, row: int) -> str:
    """Return a text as it is and a sample's ``.text``; raise `DataError` for anything else."""
    text = item if isinstance(item, str) else getattr(item, "text", None)
    if not isinstance(text, str):
        raise DataError(
            f"{name} must be texts or samples with a .text, got {type(item).__name__} in row {row}"
        )
    return text


def _ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each value's place in descending order, from 0."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return ranks


def _generator(random_state: Any) -> np.random.Generator:
    try:
        return np.random.default_rng(random_state)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"random_state must be an integer of at least 0, a Generator or None, got "
            f"{random_state!r}"
        ) from error
