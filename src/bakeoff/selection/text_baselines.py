"""Rivals that a sceptic would try on texts first: length, word overlap, perplexity, IFD."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from bakeoff.data.samples import tokenize_sample
from bakeoff.errors import DataError
from bakeoff.selection.importance_resampling import text_of
from bakeoff.selection.query_selection import STRATEGIES, Strategy, reasons_of, round_robin
from bakeoff.selection.selector import Selector, checked_count, checked_labeled

if TYPE_CHECKING:
    from pathlib import Path

    from bakeoff.models.loading import LanguageModel

Progress = Callable[[int, int], None]

# Scores held at once: 16 MiB of float32.
_BLOCK_ENTRIES = 4 * 2**20
# Up to this many entries, lists are kept so long that a second pass is never needed.
_FREE_ENTRIES = 2**20
# Texts read or tokenised between two calls of `progress`.
_CHUNK = 1024
# Rows named in a message about rows that cannot be picked.
_NAMED = 5
# Every run of letters, digits and underscores: code has words of one letter.
_WORD = re.compile(r"\w+")


class LongestSelector(Selector):
    """Picks the longest texts: no model, no target, and a rival that is hard to beat on chat data.

    Parameters
    ----------
    n_select
        How many rows to pick.
    unit
        ``"words"`` (separated by white space) or ``"characters"``.
    part
        ``"text"`` counts all of a sample, ``"response"`` only what is learnt. A plain text is both.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows, the longest first; of equally long ones the lowest row first.
    lengths_ : int64 array of shape (N,)
        Every row's length.

    References
    ----------
    Hao Zhao, Maksym Andriushchenko, Francesco Croce and Nicolas Flammarion. "Long Is More for
    Alignment: A Simple but Tough-to-Beat Baseline for Instruction Fine-Tuning". ICML 2024.
    arXiv:2402.04833. They take the longest responses.

    Examples
    --------
    >>> selector = LongestSelector(2).fit(["one", "one two three", "one two"])
    >>> selector.selected_indices_, selector.reasons()
    (array([1, 2]), ['3 words', '2 words'])
    """

    def __init__(
        self,
        n_select: int,
        unit: Literal["words", "characters"] = "words",
        part: Literal["text", "response"] = "text",
    ) -> None:
        self.n_select = n_select
        self.unit = unit
        self.part = part

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any,
        y: None = None,
        *,
        already_labeled: ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Choose rows of a pool of texts or samples; `already_labeled` rows are not picked."""
        _one_of("unit", self.unit, ("words", "characters"))
        _one_of("part", self.part, ("text", "response"))
        if self.part == "response":
            texts = [item if isinstance(item, str) else item.response for item in _pool(X, "X")]
        else:
            texts = _texts(X, "X")
        candidates = _candidates(len(texts), already_labeled)
        n_select = checked_count(self.n_select, len(candidates))
        self.lengths_ = np.array(
            [len(text.split()) if self.unit == "words" else len(text) for text in texts],
            dtype=np.int64,
        )
        order = np.argsort(-self.lengths_[candidates], kind="stable")
        self.selected_indices_ = candidates[order[:n_select]]
        if progress is not None:
            progress(len(texts), len(texts))
        return self

    def reasons(self) -> list[str]:
        """Return each pick's length, e.g. ``"412 words"``."""
        return [
            f"{length} {self.unit if length != 1 else self.unit[:-1]}"
            for length in self.lengths_[self.selected_indices_].tolist()
        ]


class _WordOverlapSelector(Selector):
    """Shares a selection among query texts by a sparse score of words in common."""

    _score_name: str
    strategy: Strategy
    scores_: NDArray[np.float32]
    query_of_each_: NDArray[np.int64]

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any,
        y: None = None,
        *,
        queries: Sequence[Any] | None = None,
        already_labeled: ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Choose rows of a pool of texts.

        Parameters
        ----------
        X
            N texts, or samples with ``.text``.
        y
            Ignored.
        queries
            Q texts or samples that look like what is wanted.
        already_labeled
            Rows never to pick; they count in the pool's statistics of words.
        progress
            Called with (texts done, texts in total).

        Raises
        ------
        DataError
            If there are no queries, none shares a word with the pool, or an argument is out of
            range.

        Warns
        -----
        UserWarning
            If some queries share no word with the pool (they take no turns), or fewer rows than
            `n_select` share a word with any query (the rest is filled in row order).
        """
        _one_of("strategy", self.strategy, STRATEGIES)
        texts = _texts(X, "X")
        if queries is None:
            raise DataError("queries must be texts or samples that look like the target, got none")
        wanted = _texts(queries, "queries")
        candidates = _candidates(len(texts), already_labeled)
        n_select = checked_count(self.n_select, len(candidates))
        pool, target = self._weights(texts, wanted, progress)
        closed = np.ones(len(texts), dtype=np.bool_)
        closed[candidates] = False
        matched = np.zeros(len(texts), dtype=np.bool_)
        heard = np.zeros(len(wanted), dtype=np.bool_)
        for start, scores in _score_blocks(pool, target):
            scores[closed[start : start + len(scores)]] = 0
            matched[start : start + len(scores)] = scores.any(axis=1)
            heard |= scores.any(axis=0)
        if not heard.any():
            raise DataError("no query shares a word with a row of the pool that can be picked")
        if not heard.all():
            warnings.warn(
                f"{int((~heard).sum())} of {len(heard)} queries share no word with the pool and "
                f"take no turns: {_named(~heard)}",
                stacklevel=2,
            )
        n_matched = int(matched.sum())
        asked = np.flatnonzero(heard)
        picks, takers = _pick(
            pool, target[:, asked], min(n_select, n_matched), self.strategy, closed
        )
        if n_matched < n_select:
            warnings.warn(
                f"only {n_matched} rows share a word with a query: {n_select - n_matched} of "
                f"{n_select} picks are filled in row order",
                stacklevel=2,
            )
            rest = np.flatnonzero(~matched & ~closed)[: n_select - n_matched]
            picks = np.concatenate([picks, rest])
        scores = np.asarray((pool[picks] @ target).astype(np.float32))
        nearest = scores.argmax(axis=1)
        if self.strategy == "round_robin":
            nearest[: len(takers)] = asked[takers]
        self.selected_indices_ = picks
        self.query_of_each_ = nearest.astype(np.int64)
        self.scores_ = (
            scores.mean(axis=1)
            if self.strategy == "mean"
            else scores[np.arange(len(picks)), nearest]
        )
        return self

    def reasons(self) -> list[str]:
        """Return e.g. ``"nearest query 3, BM25 12.40"`` for each pick."""
        found = reasons_of(self.scores_, self.query_of_each_, self.strategy, self._score_name)
        return [
            reason if score > 0 else "shares no word with a query"
            for reason, score in zip(found, self.scores_.tolist(), strict=True)
        ]

    def _weights(
        self, texts: list[str], queries: list[str], progress: Progress | None
    ) -> tuple[sparse.csr_matrix, NDArray[np.float32]]:
        """Return ``(N, V)`` and ``(V, Q)`` so that their product is the scores."""
        raise NotImplementedError


class BM25Selector(_WordOverlapSelector):
    r"""Picks the texts that match query texts best by BM25, queries taking turns.

    The score of text d for query q is the sum over the words of q, each occurrence counted, of
    :math:`\log(1 + \frac{N - n + 0.5}{n + 0.5}) \cdot \frac{f}{f + k_1 (1 - b + b\,|d| / L)}`
    with f the word's count in d, n the number of texts that have it, and L the mean length.

    Parameters
    ----------
    n_select
        How many rows to pick.
    k1
        How slowly repeated words saturate; at least 0.
    b
        How much length counts, from 0 to 1.
    strategy
        ``"round_robin"``, ``"global_max"`` or ``"mean"``, as in
        `bakeoff.selection.query_selection`.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows in pick order.
    scores_ : float32 array of shape (n_select,)
        Each pick's score to the query whose turn it was; for ``"global_max"`` the highest one, for
        ``"mean"`` the mean.
    query_of_each_ : int64 array of shape (n_select,)
        That query; for ``"mean"`` the nearest one.

    Notes
    -----
    Words are lower-cased runs of letters, digits and underscores; no stop words are removed, as
    their weight is near 0 anyway. The formula is that of Lucene and of the ``bm25s`` package's
    default. As the queries are known beforehand, only their words are indexed: memory is that of
    these words' occurrences in the pool.

    References
    ----------
    Stephen Robertson and Hugo Zaragoza. "The Probabilistic Relevance Framework: BM25 and Beyond".
    Foundations and Trends in Information Retrieval, 2009.

    Examples
    --------
    >>> pool = ["the cat sat on the mat", "stocks fell", "a dog and a cat", "bond yields rose"]
    >>> selector = BM25Selector(2).fit(pool, queries=["my cat", "bond market"])
    >>> selector.selected_indices_, selector.reasons()
    (array([2, 3]), ['nearest query 0, BM25 0.25', 'nearest query 1, BM25 0.54'])
    """

    _score_name = "BM25"

    def __init__(
        self, n_select: int, k1: float = 1.5, b: float = 0.75, strategy: Strategy = "round_robin"
    ) -> None:
        self.n_select = n_select
        self.k1 = k1
        self.b = b
        self.strategy = strategy

    def _weights(
        self, texts: list[str], queries: list[str], progress: Progress | None
    ) -> tuple[sparse.csr_matrix, NDArray[np.float32]]:
        if not (np.isfinite(self.k1) and self.k1 >= 0):
            raise DataError(f"k1 must be a number of at least 0, got {self.k1!r}")
        if not 0 <= self.b <= 1:
            raise DataError(f"b must be between 0 and 1, got {self.b!r}")
        columns: dict[str, int] = {}
        for query in queries:
            for word in _WORD.findall(query.lower()):
                columns.setdefault(word, len(columns))
        asked, _ = _counts(queries, columns, None)
        counts, lengths = _counts(texts, columns, progress)
        mean_length = max(float(lengths.mean()), 1.0)  # 0 only where no text has a word
        n = np.bincount(counts.indices, minlength=len(columns))
        idf = np.log1p((len(texts) - n + 0.5) / (n + 0.5))
        saturation = self.k1 * (1 - self.b + self.b * lengths / mean_length)
        f = counts.data
        f = f / (f + np.repeat(saturation, np.diff(counts.indptr)))
        counts.data = (f * idf[counts.indices]).astype(np.float32)
        return counts, asked.T.toarray().astype(np.float32)


class TfidfSelector(_WordOverlapSelector):
    """Picks the texts whose TF-IDF vectors are nearest to those of query texts, by cosine.

    Parameters
    ----------
    n_select
        How many rows to pick.
    strategy
        ``"round_robin"``, ``"global_max"`` or ``"mean"``, as in
        `bakeoff.selection.query_selection`.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows in pick order.
    scores_, query_of_each_
        As for `BM25Selector`.

    Notes
    -----
    scikit-learn's ``TfidfVectorizer``, fitted on the pool, with words as for `BM25Selector`. Words
    that only queries have are left out.

    Examples
    --------
    >>> pool = ["the cat sat on the mat", "stocks fell", "a dog and a cat", "bond yields rose"]
    >>> TfidfSelector(2).fit(pool, queries=["my cat", "bond market"]).selected_indices_
    array([2, 3])
    """

    _score_name = "cosine"

    def __init__(self, n_select: int, strategy: Strategy = "round_robin") -> None:
        self.n_select = n_select
        self.strategy = strategy

    def _weights(
        self, texts: list[str], queries: list[str], progress: Progress | None
    ) -> tuple[sparse.csr_matrix, NDArray[np.float32]]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(token_pattern=_WORD.pattern, dtype=np.float32)
        try:
            pool = vectorizer.fit_transform(_reported(texts, progress))
        except ValueError as error:
            raise DataError("X must hold at least one text with a word") from error
        asked = vectorizer.transform(queries)
        used = np.unique(asked.indices)
        # What no query has cannot contribute; vectors keep their lengths.
        return sparse.csr_matrix(pool[:, used]), asked[:, used].T.toarray()


class PerplexitySelector(Selector):
    """Picks texts by how improbable a language model finds them.

    Parameters
    ----------
    n_select
        How many rows to pick.
    model
        A packaged name or a folder (loaded when fitting), a `bakeoff.models.LanguageModel`, or
        ``(transformers causal language model, tokenizer)``.
    order
        ``"highest"`` loss first (top-PPL), ``"lowest"`` first, or ``"middle"`` (mid-PPL): a run of
        the descending list that starts at its 33rd percentile, or earlier if it is too short.
    max_length
        Tokens of a text that are read.
    part
        ``"text"``: the loss of all tokens. ``"response"``: of samples, that of the response given
        what precedes it; of what does not fit the beginning is left out.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows in pick order; equal losses by row.
    losses_ : float64 array of shape (N,)
        Nats per token of the whole text or of the response; NaN where nothing is predicted.

    Notes
    -----
    The first token is predicted only if the tokenizer puts a beginning-of-sequence token before
    it. Rows with nothing to predict are never picked. Copies of the selector share the model.

    References
    ----------
    Hamish Ivison, Muru Zhang, Faeze Brahman, Pang Wei Koh and Pradeep Dasigi. "Large-Scale Data
    Selection for Instruction Tuning". 2025. arXiv:2503.01807. Compares top-PPL and mid-PPL.

    Max Marion, Ahmet Üstün, Luiza Pozzobon, Alex Wang, Marzieh Fadaee and Sara Hooker. "When Less
    is More: Investigating Data Pruning for Pretraining LLMs at Scale". 2023. arXiv:2309.04564.

    Examples
    --------
    >>> selector = PerplexitySelector(100, order="middle").fit(texts)  # doctest: +SKIP
    >>> selector.reasons()[0]  # doctest: +SKIP
    'loss 3.21, perplexity 24.8'
    """

    def __init__(
        self,
        n_select: int,
        model: str | Path | LanguageModel | tuple[Any, Any] = "smollm2-135m",
        order: Literal["highest", "middle", "lowest"] = "highest",
        max_length: int = 512,
        part: Literal["text", "response"] = "text",
    ) -> None:
        self.n_select = n_select
        self.model = model
        self.order = order
        self.max_length = max_length
        self.part = part

    def __sklearn_clone__(self) -> Self:
        return type(self)(**self.get_params(deep=False))  # the model itself is not copied

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any,
        y: None = None,
        *,
        already_labeled: ArrayLike | None = None,
        batch_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Score all texts and choose.

        Parameters
        ----------
        X
            Texts, or samples with ``.text``.
        y
            Ignored.
        already_labeled
            Rows never to pick; they are not scored.
        batch_tokens
            As for `bakeoff.models.likelihood.response_losses`.
        progress
            Called with (texts scored, texts to score).

        Raises
        ------
        DataError
            If fewer than `n_select` rows have something to predict, or an argument is wrong.

        Warns
        -----
        UserWarning
            If rows have nothing to predict; names the first.
        """
        from bakeoff.models.likelihood import response_losses

        _one_of("order", self.order, ("highest", "middle", "lowest"))
        texts = _texts(X, "X")
        candidates = _candidates(len(texts), already_labeled)
        checked_count(self.n_select, len(candidates))
        _one_of("part", self.part, ("text", "response"))
        model, tokenizer, limit = _scorer(self.model, self.max_length)
        start = _leading_tokens(tokenizer)
        room = limit - len(start)
        prefixes: list[list[int]] = [[] for _ in candidates]
        ids = [tokens[:room] for tokens in _token_ids(tokenizer, [texts[r] for r in candidates])]
        if self.part == "response":
            parts = [tokenize_sample(X[row], tokenizer, room, end=False) for row in candidates]
            prefixes, ids = [prefix for prefix, _ in parts], [response for _, response in parts]
        prefixes = [[*start, *prefix] for prefix in prefixes]
        lengths = [(len(p) + len(r), len(r)) for p, r in zip(prefixes, ids, strict=True)]
        readable = np.array([both > 1 and own > 0 for both, own in lengths])
        rows = _usable(candidates, readable, self.n_select, "nothing to predict")
        losses = response_losses(
            model,
            [prefix for prefix, kept in zip(prefixes, readable, strict=True) if kept],
            [tokens for tokens, kept in zip(ids, readable, strict=True) if kept],
            batch_tokens=batch_tokens,
            progress=progress,
        ).means
        _finite(losses, rows)
        self.losses_ = np.full(len(texts), np.nan)
        self.losses_[rows] = losses
        descending = np.argsort(-losses, kind="stable")
        if self.order == "lowest":
            order = np.argsort(losses, kind="stable")
        elif self.order == "middle":
            order = descending[min(int(0.33 * len(rows)), len(rows) - self.n_select) :]
        else:
            order = descending
        self.selected_indices_ = rows[order[: self.n_select]]
        return self

    def reasons(self) -> list[str]:
        """Return each pick's loss and perplexity."""
        return [
            f"loss {loss:.2f}, perplexity {np.exp(loss):.1f}"
            for loss in self.losses_[self.selected_indices_].tolist()
        ]


class IFDSelector(Selector):
    """Picks the samples whose instruction helps least to predict the response (IFD).

    The instruction-following difficulty is ``loss(response | instruction) / loss(response)``, both
    per token. Above 1 the instruction makes the response less likely; such samples are taken to be
    misaligned and are left out.

    Parameters
    ----------
    n_select
        How many rows to pick.
    model
        As for `PerplexitySelector`. In the paper it is first tuned on about a thousand samples.
    order
        ``"highest"`` (the paper) or ``"lowest"`` ratio first.
    max_length
        Tokens of prompt and response that are read. Of a longer sample the response's end is left
        out, in both losses.
    max_ratio
        Samples above are never picked; None for no limit.
    response_marker
        Stands before the response in both losses, so that the model knows that an answer begins.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows in pick order; equal ratios by row.
    ifd_ : float64 array of shape (N,)
        The ratios; NaN where there is none.
    conditional_losses_, direct_losses_ : float64 arrays of shape (N,)
        Nats per token with and without the instruction.

    Notes
    -----
    Differences from the released code: prompt and response are tokenised apart, so that the
    boundary is exact and both losses are over the same tokens; the prompt is the sample's own
    ``prefix`` (context, instruction), which other methods train on; and if the marker is empty and
    the tokenizer has no beginning-of-sequence token, the response's first token counts in neither
    loss. The later "Superfiltering" paper takes the ratio of perplexities instead.

    References
    ----------
    Ming Li, Yong Zhang, Zhitao Li, Jiuhai Chen, Lichang Chen, Ning Cheng, Jianzong Wang, Tianyi
    Zhou and Jing Xiao. "From Quantity to Quality: Boosting LLM Performance with Self-Guided Data
    Selection for Instruction Tuning". NAACL 2024. arXiv:2308.12032.

    Examples
    --------
    >>> selector = IFDSelector(100).fit(samples)  # doctest: +SKIP
    >>> selector.reasons()[0]  # doctest: +SKIP
    'IFD 0.97: loss 2.10 with the instruction, 2.16 without'
    """

    def __init__(
        self,
        n_select: int,
        model: str | Path | LanguageModel | tuple[Any, Any] = "smollm2-135m",
        order: Literal["highest", "lowest"] = "highest",
        max_length: int = 512,
        max_ratio: float | None = 1.0,
        response_marker: str = "### Response:",
    ) -> None:
        self.n_select = n_select
        self.model = model
        self.order = order
        self.max_length = max_length
        self.max_ratio = max_ratio
        self.response_marker = response_marker

    def __sklearn_clone__(self) -> Self:
        return type(self)(**self.get_params(deep=False))  # the model itself is not copied

    def fit(  # type: ignore[override]  # says which data it takes
        self,
        X: Any,
        y: None = None,
        *,
        already_labeled: ArrayLike | None = None,
        batch_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Score all samples twice and choose.

        Parameters
        ----------
        X
            Samples with ``.prefix`` and ``.response``.
        y
            Ignored.
        already_labeled
            Rows never to pick; they are not scored.
        batch_tokens
            As for `bakeoff.models.likelihood.response_losses`.
        progress
            Called with (texts scored, texts to score); every sample is scored twice.

        Raises
        ------
        DataError
            If an item is no sample, or fewer than `n_select` have a ratio of at most `max_ratio`.

        Warns
        -----
        UserWarning
            If samples have no instruction, no response, or a prompt that leaves no room for one;
            names the first.
        """
        from bakeoff.models.likelihood import response_losses

        _one_of("order", self.order, ("highest", "lowest"))
        if self.max_ratio is not None and not self.max_ratio > 0:
            raise DataError(f"max_ratio must be above 0 or None, got {self.max_ratio!r}")
        samples = _pool(X, "X")
        for row, sample in enumerate(samples):
            if not all(isinstance(getattr(sample, p, None), str) for p in ("prefix", "response")):
                raise DataError(
                    "X must be samples with an instruction and a response (bakeoff.data.samples."
                    f"Sample), got {type(sample).__name__} in row {row}"
                )
        candidates = _candidates(len(samples), already_labeled)
        checked_count(self.n_select, len(candidates))
        model, tokenizer, limit = _scorer(self.model, self.max_length)
        chosen = [samples[row] for row in candidates.tolist()]
        start = _leading_tokens(tokenizer)
        direct = start + _token_ids(tokenizer, [self.response_marker])[0]
        prompts = [
            start + tokens
            for tokens in _token_ids(
                tokenizer, [sample.prefix + self.response_marker for sample in chosen]
            )
        ]
        responses = [
            tokens[: max(0, limit - len(prompt))]
            for prompt, tokens in zip(
                prompts, _token_ids(tokenizer, [sample.response for sample in chosen]), strict=True
            )
        ]
        # After nothing, a first token is not predicted: then it must not count after a prompt.
        given = 0 if direct else 1
        readable = np.array(
            [
                bool(sample.prefix) and len(tokens) > given
                for sample, tokens in zip(chosen, responses, strict=True)
            ]
        )
        rows = _usable(
            candidates,
            readable,
            self.n_select,
            "no instruction, no response, or no room for one within max_length",
        )
        kept = np.flatnonzero(readable).tolist()
        both = response_losses(
            model,
            [prompts[place] + responses[place][:given] for place in kept]
            + [direct + responses[place][:given] for place in kept],
            [responses[place][given:] for place in kept] * 2,
            batch_tokens=batch_tokens,
            progress=progress,
        ).means
        _finite(both, np.concatenate([rows, rows]))
        conditional, alone = np.split(both, 2)
        self.conditional_losses_ = np.full(len(samples), np.nan)
        self.conditional_losses_[rows] = conditional
        self.direct_losses_ = np.full(len(samples), np.nan)
        self.direct_losses_[rows] = alone
        ratios = np.full(len(rows), np.nan)
        np.divide(conditional, alone, out=ratios, where=alone > 0)
        self.ifd_ = np.full(len(samples), np.nan)
        self.ifd_[rows] = ratios
        limit_ratio = np.inf if self.max_ratio is None else self.max_ratio
        eligible = np.flatnonzero(ratios <= limit_ratio)
        if len(eligible) < self.n_select:
            raise DataError(
                f"n_select must be at most {len(eligible)}, the samples with an IFD of at most "
                f"{limit_ratio:g}, got {self.n_select}"
            )
        key = -ratios if self.order == "highest" else ratios
        order = np.argsort(key[eligible], kind="stable")
        self.selected_indices_ = rows[eligible[order[: self.n_select]]]
        return self

    def reasons(self) -> list[str]:
        """Return each pick's ratio and its two losses."""
        return [
            f"IFD {self.ifd_[row]:.2f}: loss {self.conditional_losses_[row]:.2f} with the "
            f"instruction, {self.direct_losses_[row]:.2f} without"
            for row in self.selected_indices_.tolist()
        ]


# Pools --------------------------------------------------------------------------------------------


def _pool(X: Any, name: str) -> list[Any]:
    if isinstance(X, str) or not hasattr(X, "__len__") or not hasattr(X, "__iter__"):
        raise DataError(f"{name} must be a list of texts or samples, got {type(X).__name__}")
    if len(X) == 0:
        raise DataError(f"{name} must have at least one text, got none")
    return list(X)


def _texts(X: Any, name: str) -> list[str]:
    return [text_of(item, name, row) for row, item in enumerate(_pool(X, name))]


def _candidates(n: int, already_labeled: ArrayLike | None) -> NDArray[np.int64]:
    may = np.ones(n, dtype=np.bool_)
    may[checked_labeled(already_labeled, n)] = False
    return np.flatnonzero(may).astype(np.int64)


def _one_of(name: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise DataError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def _named(marked: NDArray[np.bool_]) -> str:
    rows = np.flatnonzero(marked)
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(map(str, rows[:_NAMED])) + more


# Words in common ----------------------------------------------------------------------------------


def _counts(
    texts: list[str], columns: dict[str, int], progress: Progress | None
) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """Return the counts ``(N, V)`` of the words that have a column, and all texts' lengths."""
    found: list[int] = []
    ends = np.zeros(len(texts) + 1, dtype=np.int64)
    lengths = np.zeros(len(texts), dtype=np.int64)
    for row, text in enumerate(_reported(texts, progress)):
        words = _WORD.findall(text.lower())
        lengths[row] = len(words)
        found += [columns[word] for word in words if word in columns]
        ends[row + 1] = len(found)
    counts = sparse.csr_matrix(
        (np.ones(len(found)), np.array(found, dtype=np.int64), ends),
        shape=(len(texts), len(columns)),
    )
    counts.sum_duplicates()
    return counts, lengths


def _reported(texts: list[str], progress: Progress | None) -> Iterator[str]:
    for done, text in enumerate(texts, start=1):
        yield text
        if progress is not None and (done % _CHUNK == 0 or done == len(texts)):
            progress(done, len(texts))


def _score_blocks(
    pool: sparse.csr_matrix, target: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row, scores ``(rows, Q)``)."""
    rows = max(1, _BLOCK_ENTRIES // target.shape[1])
    for start in range(0, pool.shape[0], rows):
        yield start, np.asarray(pool[start : start + rows] @ target)


def _pick(
    pool: sparse.csr_matrix,
    target: NDArray[np.float32],
    n: int,
    strategy: Strategy,
    closed: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return n rows with a score above 0, and the list that each came from."""
    n_lists = target.shape[1] if strategy == "round_robin" else 1
    # Lists that share rows give fewer than n; then they are made longer.
    length = min(n, max(4 * -(-n // n_lists), _FREE_ENTRIES // n_lists))
    while True:
        values, rows = _best_of_each(pool, target, length, strategy, closed)
        columns, place = np.unique(np.concatenate(rows), return_inverse=True)
        if len(columns) >= n:
            matrix = np.full((n_lists, len(columns)), -np.inf, dtype=np.float32)
            lists = np.repeat(np.arange(n_lists), [len(found) for found in rows])
            matrix[lists, place] = np.concatenate(values)
            picked, list_of_each = round_robin(matrix, n)
            return columns[picked], list_of_each
        length = min(n, 4 * length)


def _best_of_each(
    pool: sparse.csr_matrix,
    target: NDArray[np.float32],
    length: int,
    strategy: Strategy,
    closed: NDArray[np.bool_],
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]:
    """Return the best scores above 0 of every list and their rows; equal scores by row."""
    n_lists = target.shape[1] if strategy == "round_robin" else 1
    values = [np.empty(0, dtype=np.float32)] * n_lists
    rows = [np.empty(0, dtype=np.int64)] * n_lists
    last = np.zeros(n_lists, dtype=np.float32)
    for start, scores in _score_blocks(pool, target):
        if strategy == "global_max":
            scores = scores.max(axis=1, keepdims=True)
        elif strategy == "mean":
            scores = scores.mean(axis=1, keepdims=True)
        scores[closed[start : start + len(scores)]] = 0
        # A later row of the same score comes after those that a full list has.
        better = np.ascontiguousarray((scores > last).T)
        for number in np.flatnonzero(better.any(axis=1)).tolist():
            found = np.flatnonzero(better[number])
            joined = np.concatenate([values[number], scores[found, number]])
            order = np.argsort(-joined, kind="stable")[:length]
            values[number] = joined[order]
            rows[number] = np.concatenate([rows[number], found + start])[order]
            if len(order) == length:
                last[number] = values[number][-1]
    return values, rows


# Language models ----------------------------------------------------------------------------------


def _scorer(model: Any, max_length: Any) -> tuple[Any, Any, int]:
    """Return the model, its tokenizer, and the most tokens that are read."""
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise DataError(f"max_length must be an integer of at least 2, got {max_length!r}")
    if isinstance(model, tuple):
        if len(model) != 2:
            raise DataError(f"model must be (model, tokenizer), got {len(model)} parts")
        longest = getattr(model[0].config, "max_position_embeddings", None)
        return *model, min(max_length, longest or max_length)
    if not hasattr(model, "tokenizer"):
        from bakeoff.models import load_language_model

        model = load_language_model(model)
    return model.model, model.tokenizer, min(max_length, model.max_length)


def _leading_tokens(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before a text: its beginning-of-sequence token, or nothing."""
    special = list(tokenizer("")["input_ids"])
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the texts' token ids, without special tokens around them."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        ids += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _usable(
    candidates: NDArray[np.int64], readable: NDArray[np.bool_], n_select: int, what: str
) -> NDArray[np.int64]:
    """Return the candidates that can be scored, and say which cannot."""
    bad = np.zeros(int(candidates.max()) + 1, dtype=np.bool_)
    bad[candidates[~readable]] = True
    n_usable = int(readable.sum())
    if n_usable < n_select:
        raise DataError(
            f"n_select must be at most {n_usable}, got {n_select}: there is {what} in "
            f"{len(candidates) - n_usable} of {len(candidates)} rows: {_named(bad)}"
        )
    if bad.any():
        warnings.warn(
            f"{what} in {len(candidates) - n_usable} of {len(candidates)} rows, which are never "
            f"picked: {_named(bad)}",
            stacklevel=3,
        )
    return candidates[readable]


def _finite(losses: NDArray[np.float64], rows: NDArray[np.int64]) -> None:
    bad = ~np.isfinite(losses)
    if bad.any():
        raise DataError(f"the model gives no finite loss for row {int(rows[bad][0])}")
