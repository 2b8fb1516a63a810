"""Can a new model's queries be answered from an old model's vectors? The whole matrix of versions.

Two readings of the same vectors. *Identification*: the gallery is reduced to one vector per class,
and a query is right if the nearest has its class, as the papers on compatible representations
report it. *Retrieval*: the gallery is searched vector by vector, as a search service does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bakeoff.errors import DataError

Vectors = NDArray[np.float32]
Units = NDArray[np.float64]

# Similarities held at once: 64 MiB of float32.
_BLOCK_ENTRIES = 16 * 2**20


@dataclass(frozen=True, eq=False)
class CompatibilityMatrix:
    """Scores of every version's queries on every older version's gallery.

    Parameters
    ----------
    names
        The T versions, oldest first.
    measures
        Names of what was measured.
    per_query
        ``per_query[measure][t, k]`` is a float64 array with one score per query: queries embedded
        by version t, gallery by version k. Pairs with k > t are there only if they were asked for.
    """

    names: tuple[str, ...]
    measures: tuple[str, ...]
    per_query: Mapping[str, Mapping[tuple[int, int], Units]]

    def matrix(self, measure: str = "identification") -> Units:
        """Return the mean scores ``(T, T)``; rows are query versions; NaN where not measured."""
        result = np.full((len(self.names), len(self.names)), np.nan)
        for (query_version, gallery_version), scores in self._of(measure).items():
            result[query_version, gallery_version] = scores.mean()
        return result

    def average_compatibility(self, measure: str = "identification") -> float:
        """Return AC, the share of pairs in which a new model's queries beat the old model's own.

        See `average_compatibility`.
        """
        return average_compatibility(self.matrix(measure))

    def average_accuracy(self, measure: str = "identification") -> float:
        """Return AA, the mean over the diagonal and what is below, from 0 to 1."""
        return average_accuracy(self.matrix(measure))

    def scores(self, measure: str = "identification") -> dict[str, dict[str, Units]]:
        """Return the scores as ``bakeoff.study.compare`` takes them.

        Returns
        -------
        dict
            ``{"NEW on OLD": {measure: (1, n_queries)}}``.

        Examples
        --------
        >>> vectors = [(np.eye(3)[:2], np.eye(3)), (np.eye(3)[:2], np.eye(3))]
        >>> found = compatibility_matrix(vectors, None, None, ["a", "b"], ["a", "b", "c"])
        >>> list(found.scores())
        ['version 0 on version 0', 'version 1 on version 0', 'version 1 on version 1']
        """
        return {
            f"{self.names[t]} on {self.names[k]}": {measure: scores[None, :]}
            for (t, k), scores in self._of(measure).items()
        }

    def describe(self, measure: str = "identification") -> str:
        """Return the matrix with AC and AA as text."""
        matrix = self.matrix(measure)
        width = max(len(name) for name in (*self.names, "query \\ gallery"))
        head = "query \\ gallery".ljust(width) + "".join(
            f"  {name:>{max(7, len(name))}}" for name in self.names
        )
        lines = [head]
        for name, row in zip(self.names, matrix, strict=True):
            cells = (
                f"  {'' if np.isnan(value) else f'{value:.3f}':>{max(7, len(column))}}"
                for column, value in zip(self.names, row, strict=True)
            )
            lines.append(name.ljust(width) + "".join(cells))
        tail = f"{measure}: AA {self.average_accuracy(measure):.3f}"
        if len(self.names) > 1:
            tail += f", AC {self.average_compatibility(measure):.2f}"
        return "\n".join([*lines, tail])

    def _of(self, measure: str) -> Mapping[tuple[int, int], Units]:
        if measure not in self.per_query:
            raise DataError(f"measure must be one of {list(self.measures)}, got {measure!r}")
        return self.per_query[measure]


def average_compatibility(matrix: ArrayLike) -> float:
    """Return AC: the share of pairs t > k with ``matrix[t, k] > matrix[k, k]``, strictly.

    That is how often it pays, in the old gallery, to send the new model's queries instead of the
    old one's. It says nothing about by how much; look at the matrix as well.

    Parameters
    ----------
    matrix
        ``(T, T)``, rows are query versions, oldest first; what is above the diagonal is not read.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If the matrix is not square, has only one version, or its lower triangle has
        a NaN.

    Examples
    --------
    >>> round(average_compatibility([[0.3, 0, 0], [0.35, 0.5, 0], [0.28, 0.55, 0.6]]), 4)
    0.6667
    """
    array = _checked_matrix(matrix)
    if len(array) < 2:
        raise DataError("average compatibility needs at least two versions, got one")
    rows, columns = np.tril_indices(len(array), -1)
    return float((array[rows, columns] > array[columns, columns]).mean())


def average_accuracy(matrix: ArrayLike) -> float:
    """Return AA: the mean of the diagonal and what is below it, in the unit of the matrix.

    Unlike the released code's, zeros count and nothing is multiplied by 100.

    Examples
    --------
    >>> round(average_accuracy([[0.3, 0, 0], [0.35, 0.5, 0], [0.28, 0.55, 0.6]]), 4)
    0.43
    """
    array = _checked_matrix(matrix)
    return float(array[np.tril_indices(len(array))].mean())


def compatibility_matrix(
    models: Sequence[Any],
    queries: Any,
    gallery: Any,
    query_labels: Sequence[Any] | NDArray[Any],
    gallery_labels: Sequence[Any] | NDArray[Any],
    *,
    names: Sequence[str] | None = None,
    cutoffs: Sequence[int] = (1, 10),
    upper: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CompatibilityMatrix:
    """Score the queries of every version on the galleries of all older ones.

    Parameters
    ----------
    models
        T versions, oldest first: objects with ``transform`` or ``encode``, functions from inputs to
        vectors, or the vectors themselves, pairs ``(query_vectors, gallery_vectors)``. All must
        give vectors of one width. Each embeds queries and gallery once.
    queries, gallery
        What the models take (rows or texts); None where `models` are vectors.
    query_labels, gallery_labels
        Which class each item has. A gallery item is relevant to a query if their labels are equal;
        every query needs one. Queries must not be in the gallery.
    names
        Of the versions.
    cutoffs
        The k of ``hit@k``.
    upper
        Whether to score old queries on newer galleries as well.
    progress
        Called with (pairs done, pairs in total).

    Returns
    -------
    CompatibilityMatrix
        Measures, all from 0 to 1 per query:

        - ``"identification"``: unit vectors of the gallery are averaged per class and scaled to
          length 1 again; 1 if the template with the largest inner product is the query's class;
        - ``"hit@k"``: 1 if one of the k nearest gallery items is relevant, else 0 (metric learning
          calls this recall@k);
        - ``"mrr"``: one over the rank of the first relevant item;
        - ``"map"``: average precision over the whole ranking.

        Irrelevant items that tie with a relevant one count as ranked before it.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If lengths or widths disagree, vectors are not finite or have length 0, or a
        query has nothing relevant in the gallery.

    References
    ----------
    Yantao Shen et al. "Towards Backward-Compatible Representation Learning". CVPR 2020.
    arXiv:2003.11942. Niccolò Biondi et al. "Stationary Representations". CVPR 2024.
    arXiv:2405.02581.

    Examples
    --------
    >>> one, two = np.eye(4), np.roll(np.eye(4), 1, axis=1)
    >>> labels = ["a", "b", "c", "d"]
    >>> found = compatibility_matrix([(one, one), (two, two)], None, None, labels, labels)
    >>> found.matrix("mrr")
    array([[1.  ,  nan],
           [0.25, 1.  ]])
    """
    if not len(models):
        raise DataError("models is empty")
    chosen = tuple(names or (f"version {number}" for number in range(len(models))))
    if len(chosen) != len(models) or len(set(chosen)) != len(chosen):
        raise DataError(f"names must be {len(models)} distinct names, got {list(chosen)}")
    if not cutoffs or min(cutoffs) < 1:
        raise DataError(f"cutoffs must be at least one number above 0, got {list(cutoffs)}")
    _, codes = np.unique(
        np.array([*map(_key, query_labels), *map(_key, gallery_labels)], dtype=str),
        return_inverse=True,
    )
    n_queries, n_gallery = len(query_labels), len(gallery_labels)
    if not n_queries or not n_gallery:
        raise DataError(f"got {n_queries} queries and {n_gallery} gallery items; none may be empty")
    query_codes, gallery_codes = codes[:n_queries], codes[n_queries:]
    lost = ~np.isin(query_codes, gallery_codes)
    if lost.any():
        raise DataError(
            f"{int(lost.sum())} of {n_queries} queries have no gallery item of their class, first "
            f"query {int(np.flatnonzero(lost)[0])} ({query_labels[int(np.flatnonzero(lost)[0])]!r})"
        )
    embedded = [
        _embedded(name, model, queries, gallery, n_queries, n_gallery)
        for name, model in zip(chosen, models, strict=True)
    ]
    widths = {name: pair[0].shape[1] for name, pair in zip(chosen, embedded, strict=True)}
    if len(set(widths.values())) > 1:
        raise DataError(f"versions must have vectors of one width, got {widths}")

    pairs = [(t, k) for t in range(len(models)) for k in range(len(models)) if upper or k <= t]
    measures = ("identification", *(f"hit@{k}" for k in cutoffs), "mrr", "map")
    scores: dict[str, dict[tuple[int, int], Units]] = {name: {} for name in measures}
    for done, (t, k) in enumerate(pairs, start=1):
        query_vectors, gallery_vectors = embedded[t][0], embedded[k][1]
        scores["identification"][t, k] = identification_hits(
            query_vectors, gallery_vectors, query_codes, gallery_codes
        )
        first, precision = first_ranks_and_precision(
            query_vectors, gallery_vectors, query_codes, gallery_codes
        )
        for cutoff in cutoffs:
            scores[f"hit@{cutoff}"][t, k] = (first <= cutoff).astype(np.float64)
        scores["mrr"][t, k] = 1.0 / first
        scores["map"][t, k] = precision
        if progress is not None:
            progress(done, len(pairs))
    return CompatibilityMatrix(chosen, measures, scores)


def identification_hits(
    queries: Vectors,
    gallery: Vectors,
    query_classes: NDArray[np.int64],
    gallery_classes: NDArray[np.int64],
) -> Units:
    """Return 1 for each query whose nearest class template is of its class, else 0.

    Parameters
    ----------
    queries, gallery
        ``(n, d)`` and ``(N, d)``, unit rows.
    query_classes, gallery_classes
        Whole numbers.

    Returns
    -------
    array
        float64 ``(n,)``. A template of another class that ties with the own one counts as nearer.
    """
    classes, members = np.unique(gallery_classes, return_inverse=True)
    templates = np.zeros((len(classes), gallery.shape[1]))
    np.add.at(templates, members, gallery.astype(np.float64))
    length = np.linalg.norm(templates, axis=1, keepdims=True)
    # Vectors that cancel out leave no direction; their template is near to nothing.
    templates = templates / np.maximum(length, 1e-12)
    own = np.searchsorted(classes, query_classes)
    hits = np.empty(len(queries))
    for rows, block in _blocks(queries, len(classes)):
        similarity = block @ templates.T
        mine = similarity[np.arange(len(block)), own[rows]][:, None]
        hits[rows] = (similarity >= mine).sum(axis=1) == 1
    return hits


def first_ranks_and_precision(
    queries: Vectors,
    gallery: Vectors,
    query_classes: NDArray[np.int64],
    gallery_classes: NDArray[np.int64],
) -> tuple[Units, Units]:
    """Return the rank of each query's first relevant item, and its average precision.

    Parameters
    ----------
    queries, gallery
        ``(n, d)`` and ``(N, d)``, unit rows.
    query_classes, gallery_classes
        Whole numbers; an item is relevant if its class is the query's. Every query has one.

    Returns
    -------
    first_ranks, average_precision
        float64 ``(n,)`` each; ranks count from 1. Of equal similarities, irrelevant items rank
        first.
    """
    order = np.argsort(gallery_classes, kind="stable")
    sorted_classes = gallery_classes[order]
    begins = np.searchsorted(sorted_classes, query_classes, side="left")
    ends = np.searchsorted(sorted_classes, query_classes, side="right")
    by_class = gallery[order]
    first, precision = np.empty(len(queries)), np.empty(len(queries))
    for rows, block in _blocks(queries, len(gallery)):
        similarity = block @ by_class.T
        for offset, row in enumerate(range(rows.start, rows.stop)):
            begin, end = begins[row], ends[row]
            others = np.concatenate([similarity[offset, :begin], similarity[offset, end:]])
            ranks = ranks_among(similarity[offset, begin:end], others)
            first[row] = ranks[0]
            precision[row] = (np.arange(1, len(ranks) + 1) / ranks).mean()
    return first, precision


def ranks_among(relevant: NDArray[Any], others: NDArray[Any]) -> NDArray[np.int64]:
    """Return the ranks of relevant items, ascending from 1, given all similarities to a query.

    Of equal similarities, the other items rank first.

    Examples
    --------
    >>> ranks_among(np.array([0.9, 0.2]), np.array([0.5, 0.2, 0.1])).tolist()
    [1, 4]
    """
    relevant = np.sort(relevant)
    others = others[others >= relevant[0]]
    # For each other item, how many relevant ones it is at least as similar as.
    beaten = np.bincount(
        np.searchsorted(relevant, others, side="right"), minlength=len(relevant) + 1
    )
    # Others at least as similar as the j-th most similar relevant item.
    before = beaten[1:][::-1].cumsum()
    return np.asarray(np.arange(1, len(relevant) + 1) + before, dtype=np.int64)


def unit_vectors(
    name: str, given: Any, rows: int | None = None, *, numbers: NDArray[np.int64] | None = None
) -> Vectors:
    """Return rows of length 1 as float32; raise DataError naming what cannot be scaled.

    `rows` is how many there must be, `numbers` what the rows are called where `given` is a part.
    """
    if hasattr(given, "detach"):  # a torch tensor
        given = given.detach().cpu().float().numpy()
    array = np.asarray(given)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(f"{name} must be vectors (n, d), got {array.dtype} of shape {array.shape}")
    if rows is not None and len(array) != rows:
        raise DataError(f"{name} must be {rows} vectors, got {len(array)}")
    result = np.empty(array.shape, dtype=np.float32)
    for start in range(0, len(array), 65_536):
        block = array[start : start + 65_536].astype(np.float64)
        length = np.linalg.norm(block, axis=1, keepdims=True)
        bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
        if len(bad):
            first = start + int(bad[0])
            raise DataError(
                f"{name}: vector {first if numbers is None else numbers[first]} is not finite or "
                "has length 0, so that it has no direction to compare"
            )
        result[start : start + 65_536] = block / length
    return result


def _blocks(queries: Vectors, columns: int) -> Iterator[tuple[slice, Vectors]]:
    size = max(1, _BLOCK_ENTRIES // max(1, columns))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        yield rows, queries[rows]


def _embedded(
    name: str, model: Any, queries: Any, gallery: Any, n_queries: int, n_gallery: int
) -> tuple[Vectors, Vectors]:
    if isinstance(model, tuple):
        if len(model) != 2:
            raise DataError(f"{name} must be (query_vectors, gallery_vectors), got {len(model)}")
        parts = model
    elif queries is None or gallery is None:
        raise DataError(f"{name} is a model: queries and gallery must be given")
    else:
        embed = _function(name, model)
        parts = (embed(queries), embed(gallery))
    return (
        unit_vectors(f"query vectors of {name}", parts[0], n_queries),
        unit_vectors(f"gallery vectors of {name}", parts[1], n_gallery),
    )


def _function(name: str, model: Any) -> Callable[[Any], Any]:
    # A torch module is callable, but not on texts or arrays: its own verbs come first.
    for verb in ("transform", "encode"):
        if hasattr(model, verb):
            return cast("Callable[[Any], Any]", getattr(model, verb))
    if callable(model):
        return cast("Callable[[Any], Any]", model)
    raise DataError(
        f"{name} must have transform or encode, be a function, or a pair of vector arrays, got "
        f"{type(model).__name__}"
    )


def _key(label: Any) -> str:
    """Return a name for a label that keeps 1 and "1" apart."""
    plain = label.item() if isinstance(label, np.generic) else label
    return f"{type(plain).__name__}:{plain}"


def _checked_matrix(matrix: ArrayLike) -> Units:
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not len(array):
        raise DataError(f"matrix must be (T, T) with T > 0, got shape {array.shape}")
    if np.isnan(array[np.tril_indices(len(array))]).any():
        raise DataError("matrix has a NaN on or below the diagonal")
    return array
