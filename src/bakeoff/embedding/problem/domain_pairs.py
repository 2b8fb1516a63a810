"""What encoders for several domains are tried out on, how they are judged, and words as rivals."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import build_once, cache_directory, write_text
from bakeoff.data.citations import CitationGraph, CoCitationSplit, LabelledPairs
from bakeoff.data.formats import count, listed
from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.pair_scores import f1_max
from bakeoff.errors import DataError

Size = Literal["smoke", "demo", "full"]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Similarities = Callable[[Indices], NDArray[np.floating[Any]]]
"""From numbers of documents, (m,), to their similarity with all n documents, (m, n)."""

SIZES: tuple[Size, ...] = ("smoke", "demo", "full")

_SMOKE_AREAS = ("network", "numbers and types")
# Raise when the default data are made in another way.
_DATA_VERSION = 1
# Entries of a block of similarities: 32 MiB of float64.
_BLOCK_ENTRIES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class DomainPairs:
    """Pairs to train on and to judge by, and which other documents are no wrong answers.

    Parameters
    ----------
    split
        Pairs by domain, split by document.
    related
        By domain, pairs of texts that a ranking must not count as wrong, see
        `bakeoff.data.citations.CoCitationPairs.related`. Test pairs themselves need not be among
        them.
    """

    split: CoCitationSplit
    related: Mapping[str, frozenset[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def from_graph(
        cls,
        graph: CitationGraph,
        *,
        max_domains: int | None = 8,
        max_citations: int | None = 40,
        min_cocitations: int = 1,
        test: float = 0.3,
        validation: float = 0.1,
        max_per_document: int | None = 8,
        max_pairs: int | None = 1000,
        seed: int = 0,
    ) -> DomainPairs:
        """Make pairs of a citation graph.

        Parameters
        ----------
        graph
            Who cites whom; see `bakeoff.data.citations`.
        max_domains
            Keep the domains with most training pairs; None for all. Each has an expert.
        max_citations, min_cocitations
            As in `bakeoff.data.citations.CoCitationPairs`.
        test, validation, max_per_document, max_pairs, seed
            As in `bakeoff.data.citations.CoCitationPairs.split`.

        Raises
        ------
        DataError
            If no domain has pairs on every side, or a number is out of range.
        """
        if max_domains is not None and max_domains < 1:
            raise DataError(f"max_domains must be at least 1, got {max_domains}")
        pairs = graph.pairs(max_citations=max_citations, min_cocitations=min_cocitations)
        split = pairs.split(
            test=test,
            validation=validation,
            max_per_document=max_per_document,
            max_pairs=max_pairs,
            seed=seed,
        )
        split = _with_most_pairs(split, max_domains)
        related: dict[str, frozenset[tuple[str, str]]] = {}
        for domain in split.domains:
            judged = _texts_of(split.test, domain) | _texts_of(split.validation, domain)
            documents = [
                key
                for key, text in pairs.texts.items()
                if text in judged and pairs.domain_of(key) == domain
            ]
            found = [(pairs.texts[a], pairs.texts[b]) for a, b in pairs.related(documents)]
            related[domain] = frozenset((a, b) for a, b in found if a != b)
        return cls(split, related)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted."""
        return self.split.domains

    def fingerprint(self) -> str:
        """Return the SHA-256 of all texts, labels, domains and what is related."""
        related = [[domain, sorted(pairs)] for domain, pairs in sorted(self.related.items())]
        text = json.dumps([self.split.fingerprint(), related], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def smaller(self, train: int, judged: int, *, domains: int | None = None) -> DomainPairs:
        """Return fewer pairs, `judged` of each label in each part; of the first domains only."""
        kept = self.domains[:domains]

        def fewer(pairs: LabelledPairs) -> LabelledPairs:
            rows: list[int] = []
            for domain in kept:
                for label in (1, 0):
                    found = [
                        row
                        for row, own in enumerate(pairs.domains)
                        if own == domain and pairs.labels[row] == label
                    ]
                    rows += found[:judged]
            return pairs.take(rows)

        split = CoCitationSplit(
            self.split.name,
            tuple(
                pairs.take(range(min(train, len(pairs))))
                for pairs in self.split.train
                if pairs.group in kept
            ),
            fewer(self.split.validation),
            fewer(self.split.test),
            self.split.notes,
        )
        return DomainPairs(
            split, {domain: self.related.get(domain, frozenset()) for domain in kept}
        )

    def save(self, path: Path) -> None:
        """Write all into one JSON file."""
        split = self.split
        parts = {
            part: [pairs.texts_a, pairs.texts_b, pairs.labels.tolist(), pairs.domains]
            for part, pairs in (("validation", split.validation), ("test", split.test))
        }
        content = {
            "name": split.name,
            "notes": split.notes,
            "train": [[pairs.group, pairs.queries, pairs.positives] for pairs in split.train],
            **parts,
            "related": {domain: sorted(pairs) for domain, pairs in self.related.items()},
        }
        write_text(path, json.dumps(content))

    @classmethod
    def load(cls, path: Path) -> DomainPairs:
        """Read what `save` wrote."""
        content = json.loads(path.read_text("utf-8"))
        validation, test = (
            LabelledPairs(tuple(a), tuple(b), np.array(labels, dtype=np.int64), tuple(domains))
            for a, b, labels, domains in (content["validation"], content["test"])
        )
        train = tuple(
            TextPairs(tuple(queries), tuple(positives), group=group)
            for group, queries, positives in content["train"]
        )
        split = CoCitationSplit(content["name"], train, validation, test, tuple(content["notes"]))
        return cls(
            split,
            {
                domain: frozenset((a, b) for a, b in pairs)
                for domain, pairs in content["related"].items()
            },
        )


def domain_pairs_default(size: Size = "demo") -> DomainPairs:
    """Return pairs of functions of the running Python's standard library that use functions.

    Five domains, areas of the library. Reading the library takes 10 to 30 s; the pairs are kept in
    the cache. ``"smoke"`` is a sample of two domains, for which less is read; ``"full"`` has all
    pairs of documents that are in many.

    Raises
    ------
    DataError
        If the size is unknown, or the library has no source files here.
    """
    if size not in SIZES:
        raise DataError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    most = None if size == "full" else 8
    areas = _SMOKE_AREAS if size == "smoke" else None
    key = json.dumps([_DATA_VERSION, platform.python_version(), most, areas])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        from bakeoff.data.citation_graphs import standard_library_graph

        pairs = DomainPairs.from_graph(
            standard_library_graph(areas=areas), max_per_document=most, max_pairs=None
        )
        pairs.save(folder / "pairs.json")

    folder = build_once(cache_directory() / "domains" / f"standard-library-{digest}", build)
    pairs = DomainPairs.load(folder / "pairs.json")
    return pairs.smaller(train=60, judged=15) if size == "smoke" else pairs


def _with_most_pairs(split: CoCitationSplit, limit: int | None) -> CoCitationSplit:
    if limit is None or limit >= len(split.domains):
        return split
    order = sorted(split.train, key=lambda pairs: (-len(pairs), pairs.group))
    kept = {pairs.group for pairs in order[:limit]}

    def of_kept(pairs: LabelledPairs) -> LabelledPairs:
        return pairs.take([row for row, domain in enumerate(pairs.domains) if domain in kept])

    left_out = sorted(set(split.domains) - kept)
    kept_ones = count(limit, "domain")
    note = f"{kept_ones} kept, with most training pairs; left out: {listed(left_out)}."
    return CoCitationSplit(
        split.name,
        tuple(pairs for pairs in split.train if pairs.group in kept),
        of_kept(split.validation),
        of_kept(split.test),
        (*split.notes, note),
    )


def _texts_of(pairs: LabelledPairs, domain: str) -> set[str]:
    own = pairs.of_domain(domain)
    return {*own.texts_a, *own.texts_b}


# --- judging ----------------------------------------------------------------------------------


class DomainJudge:
    """Judges similarities of one domain's documents, by numbers of single pairs.

    Parameters
    ----------
    pairs
        Labelled pairs of the domain.
    related
        Pairs of texts that a ranking must not count as wrong, beside the positives.

    Attributes
    ----------
    documents
        The distinct texts of the pairs, in order of appearance: n of them.
    """

    def __init__(
        self, pairs: LabelledPairs, related: frozenset[tuple[str, str]] = frozenset()
    ) -> None:
        place: dict[str, int] = {}
        for text in (*pairs.texts_a, *pairs.texts_b):
            place.setdefault(text, len(place))
        self.documents = tuple(place)
        self.first = np.array([place[text] for text in pairs.texts_a], dtype=np.int64)
        self.second = np.array([place[text] for text in pairs.texts_b], dtype=np.int64)
        self.labels = pairs.labels
        if set(self.labels.tolist()) != {0, 1}:
            raise DataError("a domain must have positive and negative pairs to judge by")
        known: dict[int, set[int]] = defaultdict(set)
        positive = self.labels == 1
        partners = [*zip(self.first[positive], self.second[positive], strict=True)]
        partners += [(place[a], place[b]) for a, b in related if a in place and b in place]
        for a, b in partners:
            known[int(a)].add(int(b))
            known[int(b)].add(int(a))
        self._known = {row: np.array(sorted(found)) for row, found in known.items()}

    def scores(self, similarities: Similarities) -> dict[str, Floats]:
        """Return the numbers of all metrics.

        Parameters
        ----------
        similarities
            How alike documents are; called with blocks of rows.

        Returns
        -------
        dict of str to array
            ``"mrr"``, one number per positive pair: the reciprocal rank of the partner among the
            domain's documents, the mean of both directions. Other documents that belong to the one
            asked about are no competitors; a tie counts half.
            ``"auc"``, one number per positive pair: the share of negative pairs that are less
            alike, ties half. Its mean is the area under the ROC curve.
            ``"f1"``, one number per labelled pair: F1max plus the pair's influence on it at the
            best threshold. Its mean is F1max.
        """
        ranks = np.zeros(len(self.labels))
        pair_scores = np.zeros(len(self.labels))
        for asked, partner, forth in (
            (self.first, self.second, True),
            (self.second, self.first, False),
        ):
            order = np.argsort(asked, kind="stable")
            step = max(1, _BLOCK_ENTRIES // len(self.documents))
            for start in range(0, len(order), step):
                block = order[start : start + step]
                rows, inverse = np.unique(asked[block], return_inverse=True)
                matrix = np.asarray(similarities(rows), dtype=np.float64)
                for pair, line in zip(block.tolist(), inverse.tolist(), strict=True):
                    own = matrix[line]
                    if forth:
                        pair_scores[pair] = own[partner[pair]]
                    if self.labels[pair] == 1:
                        ranks[pair] += self._reciprocal_rank(own, asked[pair], partner[pair]) / 2
        positive = self.labels == 1
        return {
            "mrr": ranks[positive],
            "auc": placement_values(pair_scores[positive], pair_scores[~positive]),
            "f1": f1_influences(pair_scores, self.labels),
        }

    def _reciprocal_rank(self, own: Floats, asked: int, partner: int) -> float:
        competes = np.ones(len(own), dtype=np.bool_)
        competes[asked] = False
        competes[self._known[int(asked)]] = False
        others, target = own[competes], own[partner]
        return float(1 / (1 + (others > target).sum() + (others == target).sum() / 2))


def placement_values(positive: Floats, negative: Floats) -> Floats:
    """Return for each positive's score the share of negatives below it, ties half.

    Parameters
    ----------
    positive, negative
        ``(p,)`` and ``(q,)`` scores.

    Returns
    -------
    array
        ``(p,)`` in [0, 1]; the mean is the area under the ROC curve.

    Examples
    --------
    >>> placement_values(np.array([0.9, 0.2]), np.array([0.1, 0.2])).tolist()
    [1.0, 0.75]
    """
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return np.asarray((below + not_above) / (2 * len(ordered)), dtype=np.float64)


def f1_influences(scores: Floats, labels: Indices) -> Floats:
    """Return F1max as a mean over labelled pairs.

    F1 is a ratio of two means: right calls, counted twice, over positives and calls. A pair's
    number is the ratio plus its influence on it (the linearisation that survey statistics makes of
    ratios), at the threshold with the best F1, where a small change of threshold matters least.

    Parameters
    ----------
    scores, labels
        ``(n,)`` each; labels 0 or 1.

    Returns
    -------
    array
        ``(n,)``; its mean is F1max exactly, its spread over the square root of n estimates the
        standard error of F1max. Single numbers may be outside of [0, 1].

    Examples
    --------
    >>> units = f1_influences(np.array([0.9, 0.6, 0.7, 0.1]), np.array([1, 1, 0, 0]))
    >>> round(float(units.mean()), 3)
    0.8
    """
    largest = float(np.abs(scores).max(initial=0.0))
    scaled = scores / largest if largest > 1 else scores
    _, _, _, threshold = f1_max(scaled, labels)
    called = (scaled >= threshold).astype(np.float64)
    positive = labels.astype(np.float64)
    right, counted = 2 * called * positive, called + positive
    ratio = right.sum() / counted.sum()
    return np.asarray(ratio + (right - ratio * counted) / counted.mean(), dtype=np.float64)


def cosine_similarities(vectors: NDArray[np.floating[Any]]) -> Similarities:
    """Return how alike documents are by the cosine of their vectors, ``(n, d)``."""
    given = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(given, axis=1, keepdims=True)
    unit = np.divide(given, lengths, out=np.zeros_like(given), where=lengths > 0)
    return lambda rows: unit[rows] @ unit.T


# --- words ------------------------------------------------------------------------------------

_BM25_K1, _BM25_B = 1.5, 0.75


def word_similarities(
    kind: Literal["tf-idf", "bm25"], documents: Sequence[str], collection: Sequence[str]
) -> Similarities:
    """Return how alike documents are by the words that they share.

    Parameters
    ----------
    kind
        ``"tf-idf"``: cosines of ``(1 + log tf) * idf``. ``"bm25"``: BM25 (k1 = 1.5, b = 0.75, with
        Lucene's idf) of one document as query for the other, the mean of both directions.
    documents
        n texts to compare.
    collection
        Further texts of the domain: the more, the better is known which words are rare.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    texts = list(dict.fromkeys([*documents, *collection]))
    words = {"token_pattern": r"\w+", "lowercase": True}
    if not any(any(character.isalnum() or character == "_" for character in t) for t in texts):
        return lambda rows: np.zeros((len(rows), len(documents)))
    if kind == "tf-idf":
        weights: Any = TfidfVectorizer(**words, sublinear_tf=True).fit(texts)
        vectors = weights.transform(documents).tocsr()
        return lambda rows: (vectors[rows] @ vectors.T).toarray()
    counter: Any = CountVectorizer(**words).fit(texts)
    everywhere = counter.transform(texts)
    n_texts = len(texts)
    n_with = np.bincount(everywhere.indices, minlength=everywhere.shape[1])
    idf = np.log1p((n_texts - n_with + 0.5) / (n_with + 0.5))
    mean_length = everywhere.sum() / n_texts
    counts = counter.transform(documents).tocsr().astype(np.float64)
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    shrink = _BM25_K1 * (1 - _BM25_B + _BM25_B * lengths / mean_length)
    entries = counts.tocoo()
    saturated = entries.data * (_BM25_K1 + 1) / (entries.data + shrink[entries.row])
    answers = sparse.csr_array(
        (saturated * idf[entries.col], (entries.row, entries.col)), shape=counts.shape
    )
    asked = sparse.csr_array(counts)
    return lambda rows: ((asked[rows] @ answers.T + answers[rows] @ asked.T) / 2).toarray()
