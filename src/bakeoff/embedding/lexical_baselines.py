"""What lexical specialisation has to beat: word vectors for less, under the same two methods.

Each is made with ``fit(constraints)`` and asked with ``encode_words(words, language=...)``, as
`bakeoff.embedding.lexical.LexicalSpecializer` is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from bakeoff.data.lexicons import Constraints, WordPairs, build_pairs
from bakeoff.embedding.word_vectors import Layer, WordEncoder
from bakeoff.errors import DataError

Vectors = NDArray[np.float32]


class _Frozen(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """What the baselines on a frozen model share."""

    base_model: Any
    layer: Layer
    device: str

    def _load(self) -> WordEncoder:
        """Return the encoder, of the parameters as they are at `fit`."""
        # What encodes words already needs no copy of its model.
        made = hasattr(self.base_model, "has_tokens")
        self.encoder_: WordEncoder = (
            self.base_model if made else WordEncoder(self.base_model, device=self.device)
        )
        return self.encoder_


class RawWordVectors(_Frozen):
    """The mean over a word's tokens in the model as it is.

    Parameters
    ----------
    base_model
        As for `bakeoff.embedding.lexical.LexicalSpecializer`; or a `WordEncoder`, which is then
        used as it is.
    layer, device
        As there.
    """

    def __init__(
        self, base_model: Any = "all-minilm-l6-v2", *, layer: Layer = -1, device: str = "cpu"
    ) -> None:
        self.base_model = base_model
        self.layer = layer
        self.device = device

    def fit(self, constraints: object = None, y: object = None) -> Self:
        """Load the model; there is nothing to learn."""
        self._load()
        return self

    def encode_words(self, words: Sequence[str], *, language: str | None = None) -> Vectors:
        """Return one vector per word, ``(n, d)`` float32."""
        check_is_fitted(self, "encoder_")
        return self.encoder_.encode(words, self.layer)


class AllButTheTop(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Takes from vectors their mean, and then their directions of largest variance.

    Parameters
    ----------
    n_components
        How many directions; the authors suggest a hundredth of the width. 0 only centres.

    Attributes
    ----------
    mean_ : float32 array of shape (d,)
    components_ : float32 array of shape (n_components, d)
        Orthonormal rows.

    References
    ----------
    Jiaqi Mu and Pramod Viswanath. "All-but-the-Top: Simple and Effective Postprocessing for Word
    Representations". ICLR 2018. arXiv:1702.01417.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> vectors = rng.standard_normal((100, 4)) + 10 * rng.standard_normal((100, 1))
    >>> bool(np.abs(AllButTheTop(1).fit_transform(vectors)).max() < 4)
    True
    """

    def __init__(self, n_components: int = 3) -> None:
        self.n_components = n_components

    def fit(self, X: Any, y: object = None) -> Self:
        """Find mean and directions of vectors ``(n, d)``.

        Raises
        ------
        DataError
            If vectors are not ``(n, d)`` or finite, or there are fewer than directions.
        """
        vectors = _checked(X)
        if not 0 <= self.n_components < min(vectors.shape):
            raise DataError(
                f"n_components must be from 0 to {min(vectors.shape) - 1} for vectors "
                f"{vectors.shape}, got {self.n_components}"
            )
        mean = vectors.mean(axis=0, dtype=np.float64)
        centred = vectors - mean
        # Of the (d, d) covariance, so that memory does not grow with the number of words.
        _, directions = np.linalg.eigh(centred.T @ centred)
        self.mean_ = mean.astype(np.float32)
        last = directions.shape[1] - self.n_components
        self.components_ = directions[:, last:].T[::-1].astype(np.float32)
        return self

    def transform(self, X: Any) -> Vectors:
        """Return the vectors without mean and directions, ``(n, d)`` float32."""
        check_is_fitted(self, "mean_")
        centred = _checked(X) - self.mean_
        if not self.n_components:
            return np.asarray(centred, dtype=np.float32)
        return np.asarray(
            centred - centred @ self.components_.T @ self.components_, dtype=np.float32
        )


class AllButTheTopWords(_Frozen):
    """The raw vectors, centred and without their largest directions, found on the training words.

    Parameters
    ----------
    base_model, layer, device
        As for `RawWordVectors`.
    n_components
        As for `AllButTheTop`.
    """

    def __init__(
        self,
        base_model: Any = "all-minilm-l6-v2",
        *,
        n_components: int = 3,
        layer: Layer = -1,
        device: str = "cpu",
    ) -> None:
        self.base_model = base_model
        self.n_components = n_components
        self.layer = layer
        self.device = device

    def fit(self, constraints: Constraints | WordPairs, y: object = None) -> Self:
        """Find mean and directions of the distinct words."""
        encoder = self._load()
        vectors = encoder.encode(_words(constraints, encoder), self.layer)
        self.post_ = AllButTheTop(self.n_components).fit(vectors)
        return self

    def encode_words(self, words: Sequence[str], *, language: str | None = None) -> Vectors:
        """Return one vector per word, ``(n, d)`` float32."""
        check_is_fitted(self, "post_")
        vectors: Vectors = self.post_.transform(self.encoder_.encode(words, self.layer))
        return vectors


class CharacterNgramVectors(BaseEstimator):  # type: ignore[misc]
    """TF-IDF of a word's runs of letters: what spelling alone can do, cognates above all.

    Runs that no training word has count too, as the rarest ones: a name is found by its letters in
    a script that training has not seen.

    Parameters
    ----------
    shortest, longest
        Lengths of runs; a word's ends count as letters, case does not.

    Examples
    --------
    >>> words = Constraints.of([("1", "nation", "en"), ("1", "nación", "es"), ("2", "dog", "en")])
    >>> vectors = CharacterNgramVectors().fit(words).encode_words(["nation", "nación", "dog"])
    >>> similarity = (vectors @ vectors.T).toarray()
    >>> bool(similarity[0, 1] > 0.1), float(similarity[0, 2])
    (True, 0.0)
    """

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        self.shortest = shortest
        self.longest = longest

    def fit(self, constraints: Constraints | WordPairs, y: object = None) -> Self:
        """Count runs of letters in the training words.

        Raises
        ------
        DataError
            If lengths are out of order.
        """
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
        from sklearn.pipeline import make_pipeline

        if not 1 <= self.shortest <= self.longest:
            raise DataError(
                f"shortest must be from 1 to longest, got {self.shortest} and {self.longest}"
            )
        counts = HashingVectorizer(  # a vocabulary would forget the runs that training lacks
            analyzer="char_wb",
            ngram_range=(self.shortest, self.longest),
            n_features=2**20,
            alternate_sign=False,
            norm=None,
            dtype=np.float32,
        )
        self.vectorizer_ = make_pipeline(counts, TfidfTransformer()).fit(_words(constraints, None))
        return self

    def encode_words(self, words: Sequence[str], *, language: str | None = None) -> Any:
        """Return a scipy sparse matrix of unit rows; runs are told apart by a hash of 20 bits."""
        check_is_fitted(self, "vectorizer_")
        return self.vectorizer_.transform(list(words))


class Procrustes(BaseEstimator):  # type: ignore[misc]
    """The rotation that brings one set of vectors closest to another.

    ``W = argmin over orthogonal W of ||X W - Y||``, in closed form by an SVD. With fewer pairs than
    dimensions many rotations are equally close; of these it is the one nearest to no rotation, so
    that what the pairs say nothing of stays as it is.

    Parameters
    ----------
    centre
        Whether both sides' means are taken away first.

    Attributes
    ----------
    rotation_ : float64 array of shape (d, d)
    source_mean_, target_mean_ : float64 arrays of shape (d,)

    References
    ----------
    Peter H. Schönemann. "A generalized solution of the orthogonal Procrustes problem".
    Psychometrika 31(1), 1966. For words: Chao Xing et al. "Normalized Word Embedding and
    Orthogonal Transform for Bilingual Word Translation". NAACL 2015.

    Examples
    --------
    >>> turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> points = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]])
    >>> np.abs(Procrustes(centre=False).fit(points, points @ turn).rotation_ - turn).max() < 1e-12
    np.True_
    """

    def __init__(self, *, centre: bool = True) -> None:
        self.centre = centre

    def fit(self, X: Any, Y: Any) -> Self:
        """Find the rotation from rows of `X` to rows of `Y`, both ``(n, d)``.

        Raises
        ------
        DataError
            If shapes differ or vectors are not finite.
        """
        one, other = _checked(X), _checked(Y)
        if one.shape != other.shape:
            raise DataError(f"X and Y must be of one shape, got {one.shape} and {other.shape}")
        width = one.shape[1]
        self.source_mean_ = one.mean(axis=0) if self.centre else np.zeros(width)
        self.target_mean_ = other.mean(axis=0) if self.centre else np.zeros(width)
        left, sizes, right = np.linalg.svd(
            (one - self.source_mean_).T @ (other - self.target_mean_)
        )
        told = sizes > sizes[0] * width * np.finfo(np.float64).eps
        free_left, free_right = left[:, ~told], right[~told]
        turn, _, back = np.linalg.svd(free_left.T @ free_right.T)
        self.rotation_: NDArray[np.float64] = (
            left[:, told] @ right[told] + free_left @ turn @ back @ free_right
        )
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Return the rotated vectors ``(n, d)``, in the (centred) space of the target side."""
        check_is_fitted(self, "rotation_")
        rotated: NDArray[np.float64] = (_checked(X) - self.source_mean_) @ self.rotation_
        return rotated


class ProcrustesWords(_Frozen):
    """Raw vectors, each language rotated onto a pivot language by its training pairs.

    Unit vectors, centred per language, then rotated: the usual recipe for aligning word
    embeddings. A language without pairs with the pivot is centred at the mean of all languages and
    not rotated: nothing is known of it.

    Parameters
    ----------
    base_model, layer, device
        As for `RawWordVectors`.
    pivot
        The language onto which others are rotated; the one with the most words if None.
    min_pairs
        Fewest pairs for a rotation.
    """

    def __init__(
        self,
        base_model: Any = "all-minilm-l6-v2",
        *,
        pivot: str | None = None,
        min_pairs: int = 10,
        layer: Layer = -1,
        device: str = "cpu",
    ) -> None:
        self.base_model = base_model
        self.pivot = pivot
        self.min_pairs = min_pairs
        self.layer = layer
        self.device = device

    def fit(self, constraints: Constraints | WordPairs, y: object = None) -> Self:
        """Rotate each language by its pairs with the pivot.

        Raises
        ------
        DataError
            If the pivot does not occur, or no language has enough pairs with it.
        """
        if isinstance(constraints, WordPairs):
            pairs, words = constraints, constraints.constraints
        else:
            words = constraints
            pairs = build_pairs(words, max_per_language_pair=None, monolingual=False)
        counts = Counter(words.languages)
        pivot = (
            max(counts, key=lambda one: (counts[one], one)) if self.pivot is None else self.pivot
        )
        if pivot not in counts:
            raise DataError(f"pivot {pivot!r} is not among the languages {sorted(counts)}")
        by_language: dict[str, list[tuple[str, str]]] = defaultdict(list)
        languages = words.languages
        for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
            one, other = languages[first], languages[second]
            if (one == pivot) != (other == pivot):
                away, home = (second, first) if one == pivot else (first, second)
                by_language[languages[away]].append((words.words[away], words.words[home]))
        encoder = self._load()
        self.rotations_: dict[str, Procrustes] = {}
        for language, found in by_language.items():
            fit = encoder.has_tokens([a for a, _ in found]) & encoder.has_tokens(
                [b for _, b in found]
            )
            kept = [pair for pair, good in zip(found, fit, strict=True) if good]
            if len(kept) >= self.min_pairs:
                self.rotations_[language] = Procrustes().fit(
                    self._unit([a for a, _ in kept]), self._unit([b for _, b in kept])
                )
        if not self.rotations_:
            raise DataError(
                f"no language has {self.min_pairs} pairs with the pivot {pivot!r}; give another "
                "pivot, or lower min_pairs"
            )
        self.pivot_ = pivot
        self.pivot_mean_ = self._unit(_words(words.only([pivot]), encoder)).mean(axis=0)
        means = [rotation.source_mean_ for rotation in self.rotations_.values()]
        self.other_mean_ = np.mean([*means, self.pivot_mean_], axis=0)
        return self

    def encode_words(self, words: Sequence[str], *, language: str | None = None) -> Vectors:
        """Return one vector per word, ``(n, d)`` float32.

        Parameters
        ----------
        words
            All of one language.
        language
            Which: it decides the rotation. None, and a language without one, is only centred.
        """
        check_is_fitted(self, "pivot_")
        vectors = self._unit(words)
        if language in self.rotations_:
            return self.rotations_[language].transform(vectors).astype(np.float32)
        mean = self.pivot_mean_ if language == self.pivot_ else self.other_mean_
        return np.asarray(vectors - mean, dtype=np.float32)

    def _unit(self, words: Sequence[str]) -> NDArray[np.float64]:
        vectors = self.encoder_.encode(words, self.layer).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[np.float64] = vectors / np.maximum(lengths, 1e-12)
        return unit


def _words(constraints: Constraints | WordPairs, encoder: WordEncoder | None) -> list[str]:
    """Return the distinct training words, without those that the tokenizer makes nothing of."""
    if isinstance(constraints, WordPairs):
        rows = np.union1d(constraints.first, constraints.second).tolist()
        words = list(dict.fromkeys(constraints.constraints.words[row] for row in rows))
    else:
        words = list(dict.fromkeys(constraints.words))
    if encoder is None:
        return words
    return [word for word, fit in zip(words, encoder.has_tokens(words), strict=True) if fit]


def _checked(vectors: Any) -> NDArray[np.float64]:
    array = np.asarray(vectors, dtype=np.float64)
    if array.ndim != 2 or not len(array) or not np.isfinite(array).all():
        raise DataError(f"vectors must be (n, d), n above 0, and finite, got shape {array.shape}")
    return array
