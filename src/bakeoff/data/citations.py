"""Pairs of related texts from who cites whom: papers, packages, functions.

Two documents that a third one cites together belong together, which is a label that nobody had to
write. What counts as a citation is up to the data: a reference list, a package's dependencies, the
functions that a function calls.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.formats import PathLike, count, iterate_rows, listed
from bakeoff.data.splits import linked_rows, normalise, position, runs, sample
from bakeoff.data.tasks import TextPairs
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csc_array

Pair = tuple[str, str]

_ONE_DOMAIN = "documents"
_NO_DOMAIN = "(none)"
# How often right-hand documents are dealt out anew until no negative is co-cited by accident.
_DEALS = 50

_USUAL_NAMES = {
    "id": ("id", "doc_id", "document_id", "paper_id", "pmid", "pmcid", "doi", "key", "name"),
    "text": ("text", "abstract", "description", "content", "body", "summary"),
    "references": ("references", "refs", "citations", "cites", "cited", "bibliography", "links"),
    "domain": ("domain", "topic", "section", "category", "collection", "field"),
    "group": ("group", "source", "family"),
}
_REQUIRED = ("id", "text", "references")


@dataclass(frozen=True, eq=False)
class LabelledPairs:
    """Pairs of texts that belong together (label 1) or do not (label 0). Unit: pair.

    Parameters
    ----------
    texts_a, texts_b
        n texts each.
    labels
        ``(n,)``, 0 or 1.
    domains
        The domain of each pair; both of its texts are from there.

    Raises
    ------
    DataError
        If lengths do not agree or a label is neither 0 nor 1.
    """

    texts_a: tuple[str, ...]
    texts_b: tuple[str, ...]
    labels: NDArray[np.int64]
    domains: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("texts_a", "texts_b", "domains"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise DataError(f"{name} must be a sequence, got one string")
            object.__setattr__(self, name, tuple(value))
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
            raise DataError("labels must be one 0 or 1 per pair")
        object.__setattr__(self, "labels", labels.astype(np.int64))
        lengths = {
            name: len(getattr(self, name)) for name in ("texts_a", "texts_b", "labels", "domains")
        }
        if len(set(lengths.values())) > 1:
            raise DataError(f"lengths must agree, got {lengths}")

    def __len__(self) -> int:
        return len(self.texts_a)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> LabelledPairs:
        """Return some of the pairs, in the order asked for."""
        chosen = [int(row) for row in rows]
        return LabelledPairs(
            tuple(self.texts_a[row] for row in chosen),
            tuple(self.texts_b[row] for row in chosen),
            self.labels[chosen],
            tuple(self.domains[row] for row in chosen),
        )

    def of_domain(self, domain: str) -> LabelledPairs:
        """Return the pairs of one domain.

        Raises
        ------
        DataError
            If there are none; lists the domains there are.
        """
        rows = [row for row, own in enumerate(self.domains) if own == domain]
        if not rows:
            raise DataError(
                f"no pair is of domain {domain!r}; there are {listed(dict.fromkeys(self.domains))}"
            )
        return self.take(rows)


@dataclass(frozen=True, eq=False)
class CoCitationSplit:
    """Pairs to train on and labelled pairs to choose and to judge by; no document is in two parts.

    Parameters
    ----------
    name
        For reports.
    train
        Positive pairs, one group per domain, named after it.
    validation, test
        As many positives as negatives of each domain.
    notes
        Sentences for the reader.
    """

    name: str
    train: tuple[TextPairs, ...]
    validation: LabelledPairs
    test: LabelledPairs
    notes: tuple[str, ...] = ()

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted."""
        return tuple(pairs.group for pairs in self.train)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all texts, labels and domains, as hexadecimal digits."""
        digest = hashlib.sha256()

        def add(*parts: Any) -> None:
            line = json.dumps(parts, ensure_ascii=False) + "\n"
            digest.update(line.encode("utf-8", "surrogatepass"))

        for group in self.train:
            add(group.group, group.queries, group.positives)
        for part in (self.validation, self.test):
            add(part.texts_a, part.texts_b, part.labels.tolist(), part.domains)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class CitationGraph:
    """Documents and what they cite.

    Parameters
    ----------
    name
        For reports.
    references
        Ids that each id cites. An id without a text can cite but not be in a pair.
    texts
        Text by id.
    domains
        Domain by id, of every id with a text.
    groups
        Documents that must stay together because they are near-copies (binary packages of one
        source, versions of one paper); an id that is missing is by itself.
    notes
        Sentences about how it was read.
    """

    name: str
    references: Mapping[str, Sequence[str]]
    texts: Mapping[str, str]
    domains: Mapping[str, str]
    groups: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def pairs(self, **options: Any) -> CoCitationPairs:
        """Return the graph's pairs; options are those of `CoCitationPairs`."""
        return CoCitationPairs(
            self.references,
            self.texts,
            domains=self.domains,
            groups=self.groups,
            name=self.name,
            notes=self.notes,
            **options,
        )


class CoCitationPairs:
    """Positive and negative pairs of documents from a citation graph.

    Two documents of one domain are a positive pair where a third one cites both, and may be a
    negative pair where none does: neither them nor near-copies of them. References to documents
    without a text, and of a document to itself, are dropped.

    Parameters
    ----------
    references
        Ids that each id cites.
    texts
        Text by id; blank ones are left out.
    domains
        Domain by id; None puts all into one. Pairs never cross domains, but the document that
        cites both may be of another (a departure from the paper, whose graphs end at the domain:
        programs of all sections depend on libraries).
    groups
        Group by id: documents of one group are near-copies. They are never a pair, neither
        positive nor negative, and stay on one side of a split. Equal texts are one group always.
    min_cocitations
        How many documents must cite both; the paper does not state its own minimum.
    max_citations
        Documents cited more often than this are left out: what everybody cites (the C library,
        ``re.compile``) is cited together with everything. None keeps all.
    max_references
        Documents that cite more than this make no positive pairs, for the same reason; what they
        cite together is no negative either. None counts all.
    name, notes
        For reports.

    Raises
    ------
    DataError
        If no two documents are cited together.

    References
    ----------
    Logan Hallee, Rohan Kapur, Arjun Patel, Jason P. Gleghorn and Bohdan B. Khomtchouk.
    "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings in Biological
    Databases". Scientific Reports, 2025. arXiv:2401.15713.

    Examples
    --------
    >>> pairs = CoCitationPairs(
    ...     {"survey": ["a", "b"], "note": ["c", "d"], "d": ["d", "unknown"]},
    ...     {"a": "lungs", "b": "airways", "c": "skin", "d": "moles"},
    ... )
    >>> pairs.positives()
    [('a', 'b'), ('c', 'd')]
    >>> sorted(tuple(sorted(pair)) for pair in pairs.negatives(seed=0))
    [('a', 'c'), ('b', 'd')]
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        texts: Mapping[str, str],
        *,
        domains: Mapping[str, str] | None = None,
        groups: Mapping[str, str] | None = None,
        min_cocitations: int = 1,
        max_citations: int | None = None,
        max_references: int | None = None,
        name: str = "citations",
        notes: Sequence[str] = (),
    ) -> None:
        for option, value, least in (
            ("min_cocitations", min_cocitations, 1),
            ("max_citations", max_citations, 1),
            ("max_references", max_references, 2),
        ):
            if value is not None and (isinstance(value, bool) or value < least):
                raise DataError(f"{option} must be at least {least}, got {value!r}")
        self.texts = {key: text for key, text in texts.items() if text.strip()}
        if domains is not None:
            missing = [key for key in self.texts if key not in domains]
            if missing:
                raise DataError(
                    f"domains lacks {len(missing)} of the {len(self.texts)} documents, first "
                    f"{missing[0]!r}"
                )
        self.name = name
        self.notes = tuple(notes)
        self.min_cocitations = min_cocitations
        self.max_citations = max_citations
        self.max_references = max_references
        self._ids = sorted(self.texts)
        self._domain = {key: domains[key] if domains else _ONE_DOMAIN for key in self._ids}
        labels = groups or {}
        # By number, for rows are linked by normalised text and labels may differ in case alone.
        number = {label: index for index, label in enumerate(dict.fromkeys(labels.values()))}
        rows = [
            (self.texts[key], *([f"group\0{number[labels[key]]}"] if key in labels else []))
            for key in self._ids
        ]
        self._group = linked_rows(rows) if rows else np.zeros(0, dtype=np.int64)
        self._citing = self._matrix(references)
        if not any(len(pairs) for pairs in self._positive_rows.values()):
            if self._ids and not self._citing.nnz:
                raise DataError(
                    f"{self.name}: no reference is the id of another of the {len(self._ids)} "
                    f"documents with a text; their ids are like {listed(self._ids[:3])}"
                )
            raise DataError(
                f"{self.name}: no two of the {len(self._ids)} documents with a text are cited "
                f"together "
                f"{'once' if min_cocitations == 1 else f'{min_cocitations} times'} within one "
                "domain: check that references hold ids of the documents, or lower "
                "min_cocitations, or raise max_citations"
            )

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains with at least one positive pair, sorted."""
        return tuple(domain for domain, pairs in self._positive_rows.items() if len(pairs))

    def domain_of(self, document: str) -> str:
        """Return a document's domain, or raise DataError if there is no such document."""
        if document not in self._domain:
            raise DataError(f"{document!r} is no document with a text")
        return self._domain[document]

    def positives(self, domain: str | None = None) -> list[Pair]:
        """Return the pairs cited together, each once with its smaller id first, sorted.

        Parameters
        ----------
        domain
            Only of this domain; all for None.

        Raises
        ------
        DataError
            If there is no such domain; lists those there are.
        """
        if domain is not None and domain not in self._positive_rows:
            raise DataError(f"unknown domain {domain!r}; there are {listed(self.domains)}")
        chosen = self.domains if domain is None else [domain]
        return [
            (self._ids[a], self._ids[b])
            for name in chosen
            for a, b in self._positive_rows[name].tolist()
        ]

    def related(self, documents: Iterable[str]) -> set[Pair]:
        """Return the pairs of some documents that nobody may call unrelated.

        Cited together however seldom, by however long a list of references; near-copies; and
        near-copies of documents that are cited together.

        Parameters
        ----------
        documents
            Their ids, of any domains.

        Returns
        -------
        set of pairs
            Each with its smaller id first.
        """
        members: dict[int, list[str]] = defaultdict(list)
        place = {key: index for index, key in enumerate(self._ids)}
        for key in sorted(set(documents)):
            members[int(self._group[place[key]])].append(key)
        found = {pair for copies in members.values() for pair in combinations(copies, 2)}
        for number in self._taken:
            first, second = divmod(number, len(self._ids))
            if first != second:
                pairs = product(members.get(first, ()), members.get(second, ()))
                found |= {(min(pair), max(pair)) for pair in pairs}
        return found

    def negatives(self, seed: int, positives: Sequence[Pair] | None = None) -> list[Pair]:
        """Return as many pairs that nobody cites together as there are positives of each domain.

        The positives are taken apart and their halves dealt out anew, so that a document occurs
        as often among the negatives as among the positives: how well known a document is gives no
        label away. (The paper draws at random from all pairs that are not cited together.) Where
        that leaves no free partner, both documents are drawn at random.

        Parameters
        ----------
        seed
            Another seed deals otherwise.
        positives
            The positives to match; all for None.

        Returns
        -------
        list of pairs
            Each pair of documents at most once; fewer than positives where a domain has too few.

        Raises
        ------
        DataError
            If a positive has an unknown document or two domains.
        """
        place = {key: index for index, key in enumerate(self._ids)}
        given: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for a, b in self.positives() if positives is None else positives:
            domain = self.domain_of(a)
            if self.domain_of(b) != domain:
                raise DataError(f"positives must be within one domain, got {(a, b)}")
            given[domain].append((place[a], place[b]))
        found: list[Pair] = []
        for domain in sorted(given):
            rng = np.random.default_rng([seed, _number(domain)])
            dealt = self._deal(np.array(given[domain], dtype=np.int64), rng)
            found += [(self._ids[a], self._ids[b]) for a, b in dealt]
        return found

    def split(
        self,
        *,
        test: float = 0.2,
        validation: float = 0.1,
        max_pairs: int | None = None,
        max_per_document: int | None = None,
        near_copy_words: int = 12,
        seed: int = 0,
    ) -> CoCitationSplit:
        """Split by document, so that no text to judge by was seen in training.

        A pair whose documents fall on different sides is left out, which is what a split by pair
        would have leaked. Of pairs with the same two texts the first counts.

        Parameters
        ----------
        test, validation
            Share of each domain's documents (those with a positive pair).
        max_pairs
            Most positives of a domain in validation and in test; all for None.
        max_per_document
            Most positives that a document may be in, in each part; all for None.
        near_copy_words
            A text that shares a run of so many words with one that is judged by is left out of
            training; with one of the test, out of validation too.
        seed
            Another seed splits otherwise.

        Raises
        ------
        DataError
            If a share or a number is out of range, or no domain has pairs on every side.
        """
        if not (0 < test < 1 and 0 < validation < 1 and test + validation < 1):
            raise DataError(
                "test and validation must be above 0 and together below 1, got "
                f"{test!r} and {validation!r}"
            )
        for option, value in (
            ("max_pairs", max_pairs),
            ("max_per_document", max_per_document),
            ("near_copy_words", near_copy_words),
        ):
            if value is not None and value < 1:
                raise DataError(f"{option} must be at least 1, got {value!r}")
        notes = list(self.notes)
        place = {key: index for index, key in enumerate(self._ids)}
        side = self._sides({"test": test, "validation": validation}, seed)
        n_copies = self._set_copies_aside(side, near_copy_words)
        if n_copies:
            notes.append(
                f"{count(n_copies, 'document')} left out, with {near_copy_words} words in a row "
                "from one that is judged by."
            )
        n_across = 0
        parts: dict[str, dict[str, list[Pair]]] = {}
        left_out: list[str] = []
        for domain in self.domains:
            by_side: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
            for pair in self.positives(domain):
                sides = {side[place[end]] for end in pair}
                if len(sides - {"aside"}) > 1:
                    n_across += 1
                elif "aside" not in sides:
                    by_side[sides.pop()].append(pair)
            by_side = {
                part: _at_most_per_document(self._distinct(pairs), max_per_document, seed)
                for part, pairs in by_side.items()
            }
            for number, part in enumerate(("validation", "test")):
                chosen = sample(by_side[part], max_pairs, seed, key="\0".join)
                negatives = self.negatives(2 * seed + number, chosen)
                # Balanced, even where a domain has few pairs that nobody cites together.
                by_side[part] = chosen[: len(negatives)]
                by_side[f"{part} negatives"] = negatives[: len(chosen)]
            if len(by_side["train"]) >= 2 and by_side["validation"] and by_side["test"]:
                parts[domain] = by_side
            else:
                left_out.append(
                    f"{domain} ({len(by_side['train'])}, {len(by_side['validation'])}, "
                    f"{len(by_side['test'])})"
                )
        if not parts:
            raise DataError(
                f"no domain of {self.name} has 2 pairs to train on and 1 each to validate and test "
                "by after a split by document; positive pairs left (train, validation, test): "
                f"{', '.join(left_out)}. It takes more documents that are cited together"
            )
        if left_out:
            notes.append(
                "Domains left out, with too few pairs (train, validation, test): "
                f"{', '.join(left_out)}."
            )
        if n_across:
            notes.append(
                f"{count(n_across, 'positive pair')} left out, with documents on different sides."
            )
        judged = {part: self._labelled(parts, part) for part in ("validation", "test")}
        train = tuple(
            TextPairs(
                tuple(self.texts[a] for a, _ in by_side["train"]),
                tuple(self.texts[b] for _, b in by_side["train"]),
                group=domain,
            )
            for domain, by_side in parts.items()
        )
        return CoCitationSplit(self.name, train, judged["validation"], judged["test"], tuple(notes))

    # --- how it is done -----------------------------------------------------------------------

    def _matrix(self, references: Mapping[str, Sequence[str]]) -> csc_array:
        """Return who cites (rows) whom (columns), 1 where it does."""
        from scipy.sparse import csc_array

        place = {key: index for index, key in enumerate(self._ids)}
        rows: list[int] = []
        columns: list[int] = []
        for row, (citing, cited) in enumerate(references.items()):
            if isinstance(cited, str):
                raise DataError(
                    f"references[{citing!r}] must be a sequence of ids, got one string {cited!r}"
                )
            targets = {place[key] for key in cited if key != citing and key in place}
            rows += [row] * len(targets)
            columns += sorted(targets)
        shape = (max(1, len(references)), len(self._ids))
        ones = np.ones(len(rows), dtype=np.int32)
        return csc_array((ones, (rows, columns)), shape=shape)

    @cached_property
    def _columns(self) -> dict[str, NDArray[np.int64]]:
        """The documents of each domain that are not cited too often to be in a pair."""
        often = np.asarray(self._citing.sum(axis=0)).ravel()
        limit = np.inf if self.max_citations is None else self.max_citations
        by_domain: dict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(self._ids):
            if often[index] <= limit:
                by_domain[self._domain[key]].append(index)
        return {name: np.array(by_domain[name], dtype=np.int64) for name in sorted(by_domain)}

    def _cited_together(self, domain: str, *, counted: bool) -> tuple[Any, Any, Any]:
        """Return pairs of documents (row < column) and how many cite both."""
        from scipy.sparse import triu

        columns = self._columns[domain]
        citing: Any = self._citing[:, columns]
        if counted and self.max_references is not None:
            n_cited = np.asarray(self._citing.sum(axis=1)).ravel()
            citing = citing.tocsr()[n_cited <= self.max_references]
        both = triu(citing.T @ citing, k=1).tocoo()
        return columns[both.row], columns[both.col], both.data

    @cached_property
    def _positive_rows(self) -> dict[str, NDArray[np.int64]]:
        found = {}
        for domain in self._columns:
            a, b, times = self._cited_together(domain, counted=True)
            kept = (times >= self.min_cocitations) & (self._group[a] != self._group[b])
            pairs = np.stack([a[kept], b[kept]], axis=1)
            found[domain] = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        return found

    @cached_property
    def _taken(self) -> set[int]:
        """Groups with members that somebody cites together, each pair as one number."""
        found: set[int] = set()
        for domain in self._columns:
            a, b, _ = self._cited_together(domain, counted=False)
            found.update(self._numbers(a, b).tolist())
        return found

    def _numbers(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return one number for each pair of documents; near-copies of both have the same."""
        first, second = self._group[a], self._group[b]
        return np.minimum(first, second) * len(self._ids) + np.maximum(first, second)

    def _distinct(self, pairs: Sequence[Pair]) -> list[Pair]:
        seen: dict[frozenset[str], Pair] = {}
        for pair in pairs:
            seen.setdefault(frozenset(normalise(self.texts[end]) for end in pair), pair)
        return list(seen.values())

    def _deal(self, pairs: NDArray[np.int64], rng: np.random.Generator) -> list[tuple[int, int]]:
        flip = rng.random(len(pairs)) < 0.5
        pairs = np.where(flip[:, None], pairs[:, ::-1], pairs)
        left, right = pairs[:, 0].copy(), rng.permutation(pairs[:, 1])
        for _ in range(_DEALS):
            bad = self._unfit(left, right)
            if not bad.any():
                break
            # Deal the unfit ones again, together with as many others, or there would be no way out.
            again = np.flatnonzero(bad)
            others = np.flatnonzero(~bad)
            n_others = min(len(others), max(len(again), 8))
            again = np.concatenate([again, rng.choice(others, n_others, replace=False)])
            right[again] = right[rng.permutation(again)]
        bad = self._unfit(left, right)
        dealt = list(zip(left[~bad].tolist(), right[~bad].tolist(), strict=True))
        return dealt + self._drawn(int(bad.sum()), np.unique(pairs), dealt, rng)

    def _unfit(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which pairs are cited together, are near-copies, or come a second time."""
        numbers = self._numbers(left, right)
        unfit = self._group[left] == self._group[right]
        unfit |= np.array([number in self._taken for number in numbers.tolist()], dtype=np.bool_)
        first = np.zeros(len(numbers), dtype=np.bool_)
        first[np.unique(numbers, return_index=True)[1]] = True
        return cast("NDArray[np.bool_]", unfit | ~first)

    def _drawn(
        self,
        n: int,
        documents: NDArray[np.int64],
        dealt: Sequence[tuple[int, int]],
        rng: np.random.Generator,
    ) -> list[tuple[int, int]]:
        ends = np.array(dealt, dtype=np.int64).reshape(-1, 2)
        used = self._taken | set(self._numbers(ends[:, 0], ends[:, 1]).tolist())
        found: list[tuple[int, int]] = []
        for _ in range(100 * n):
            if len(found) == n:
                break
            pair = rng.choice(documents, 2)
            number = int(self._numbers(pair[:1], pair[1:])[0])
            if self._group[pair[0]] != self._group[pair[1]] and number not in used:
                used.add(number)
                found.append((int(pair[0]), int(pair[1])))
        return found

    def _sides(self, shares: Mapping[str, float], seed: int) -> list[str]:
        """Put each document on a side, whole groups at a time, by hash of the content."""
        side = ["train"] * len(self._ids)
        for domain in self.domains:
            documents = np.unique(self._positive_rows[domain]).tolist()
            members: dict[int, list[int]] = defaultdict(list)
            for index in documents:
                members[int(self._group[index])].append(index)

            def place(indices: list[int]) -> float:
                # The smallest of many positions is small, which would favour large groups.
                smallest = min(position(self.texts[self._ids[i]], seed) for i in indices)
                return position(repr(smallest), seed)

            waiting = sorted(members.values(), key=place)
            for name, share in shares.items():
                wanted = max(2, round(share * len(documents)))
                passed_over: list[list[int]] = []
                for indices in waiting:
                    if len(indices) <= wanted:
                        wanted -= len(indices)
                        for index in indices:
                            side[index] = name
                    else:
                        passed_over.append(indices)
                waiting = passed_over
        # A group may reach over domains: it then goes where its most judging member is.
        order = {"test": 0, "validation": 1, "train": 2}
        highest: dict[int, str] = {}
        for index, name in enumerate(side):
            own = int(self._group[index])
            highest[own] = min(highest.get(own, name), name, key=order.__getitem__)
        return [highest[int(self._group[index])] for index in range(len(side))]

    def _set_copies_aside(self, side: list[str], n_words: int) -> int:
        paired = np.unique(np.concatenate([*self._positive_rows.values()])).tolist()
        judged: set[tuple[str, ...]] = set()
        n_copies = 0
        for name in ("test", "validation", "train"):
            new: set[tuple[str, ...]] = set()
            for index in paired:
                if side[index] != name:
                    continue
                found = runs(self.texts[self._ids[index]], n_words)
                if not judged.isdisjoint(found):
                    side[index] = "aside"
                    n_copies += 1
                elif name != "train":
                    new |= found
            judged |= new
        return n_copies

    def _labelled(
        self, parts: Mapping[str, Mapping[str, Sequence[Pair]]], part: str
    ) -> LabelledPairs:
        rows = [
            (self.texts[a], self.texts[b], label, domain)
            for domain, by_side in parts.items()
            for label, name in ((1, part), (0, f"{part} negatives"))
            for a, b in by_side[name]
        ]
        texts_a, texts_b, labels, domains = zip(*rows, strict=True)
        return LabelledPairs(texts_a, texts_b, np.array(labels), domains)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _at_most_per_document(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    if limit is None:
        return pairs
    seen: Counter[str] = Counter()
    kept = []
    for pair in sorted(pairs, key=lambda pair: position("\0".join(pair), seed)):
        if all(seen[end] < limit for end in pair):
            seen.update(pair)
            kept.append(pair)
    return sorted(kept)


# --- the user's file --------------------------------------------------------------------------


def read_citations(
    path: PathLike, *, columns: Mapping[str, str] | None = None, name: str | None = None
) -> CitationGraph:
    r"""Read a citation graph from a file with one document a row.

    Parameters
    ----------
    path
        What `bakeoff.data.read_table` accepts: JSONL, JSON, CSV, TSV, Parquet or a datasets folder.
    columns
        Column by role, for names that are not guessed: ``"id"``, ``"text"``, ``"references"`` (a
        list of ids; in CSV a JSON list, or ids parted by ``;`` or blanks), and if there are any
        ``"domain"`` and ``"group"`` (see `CitationGraph`).
    name
        For reports; the file's name by default.

    Raises
    ------
    DataError
        If the file cannot be read, a column is missing, an id is blank or comes twice with other
        contents, or a cell is not what its role needs; names the file and the place.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "papers.csv"
    >>> _ = path.write_text("id,text,references\n1,lungs,\n2,airways,\n3,a survey,1;2\n")
    >>> read_citations(path).pairs().positives()
    [('1', '2')]
    """
    path = Path(path).expanduser()
    given = dict(columns or {})
    unknown = [role for role in given if role not in _USUAL_NAMES]
    if unknown:
        raise DataError(f"unknown role {unknown[0]!r}; roles are {listed(_USUAL_NAMES)}")
    rows = list(iterate_rows(path))
    if not rows:
        raise DataError(f"{path}: the file has no row")
    # Of all rows, for JSON leaves out what a row has not, and the first may only cite.
    roles = _roles(path, list(dict.fromkeys(key for row in rows for key in row.values)), given)
    texts: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    more: dict[str, dict[str, str]] = {"domain": {}, "group": {}}
    first_seen: dict[str, dict[str, Any]] = {}
    n_repeated = 0
    for row in rows:
        cells = {role: row.values.get(column) for role, column in roles.items()}
        place = f"{path}: {row.place}"
        key = _identifier(cells["id"], f"{place}: column {roles['id']!r}")
        if key in first_seen and cells == first_seen[key]:
            n_repeated += 1
            continue
        if key in first_seen:
            raise DataError(f"{place}: id {key!r} comes a second time with other contents")
        first_seen[key] = cells
        text = cells["text"]
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: column {roles['text']!r} must be text, got {text!r}")
        texts[key] = text or ""
        references[key] = _identifiers(cells["references"], f"{place}: {roles['references']!r}")
        for role, table in more.items():
            cell = cells.get(role)
            if cell is not None and str(cell).strip():
                table[key] = str(cell)
    cited = {one for row in references.values() for one in row}
    notes = [
        f"{path.name}: {count(len(texts), 'document')}, {len(cited & texts.keys()):,} of them "
        f"cited; {', '.join(f'{role} from column {column!r}' for role, column in roles.items())}."
    ]
    if n_repeated:
        notes.append(f"{count(n_repeated, 'row')} left out: the same as an earlier one.")
    if strange := sorted(cited - texts.keys()):
        notes.append(
            f"{count(len(strange), 'id')} referred to and not in the file, first {strange[0]!r}."
        )
    if n_blank := sum(not text.strip() for text in texts.values()):
        notes.append(f"{count(n_blank, 'document')} without a text: in no pair, but they may cite.")
    domains = more["domain"]
    if not domains:
        notes.append(
            "No column for the domain: all texts are one domain. Name yours with "
            "columns={'domain': ...}, or --column domain=NAME on the command line."
        )
    lost = [key for key, text in texts.items() if text.strip() and key not in domains]
    if domains and lost:
        notes.append(f"{count(len(lost), 'text')} without a domain: their domain is {_NO_DOMAIN}.")
    default = _NO_DOMAIN if domains else _ONE_DOMAIN
    domains = {key: domains.get(key, default) for key in texts}
    return CitationGraph(name or path.stem, references, texts, domains, more["group"], tuple(notes))


def _roles(path: Path, found: list[str], given: Mapping[str, str]) -> dict[str, str]:
    by_lower = {column.lower(): column for column in reversed(found)}
    roles = {}
    for role, names in _USUAL_NAMES.items():
        if role in given:
            if given[role] not in found:
                raise DataError(
                    f"{path}: no column {given[role]!r} for role {role!r}; columns found: "
                    f"{listed(found)}"
                )
            roles[role] = given[role]
            continue
        match = next((by_lower[name] for name in names if name in by_lower), None)
        if match is not None and match not in given.values() and match not in roles.values():
            roles[role] = match
        elif role in _REQUIRED:
            raise DataError(
                f"{path}: no column for {role!r}. Columns found: {listed(found)}. Names "
                f"recognised: {', '.join(names)}. Name yours with columns={{{role!r}: ...}}, or "
                f"--column {role}=NAME on the command line"
            )
    return roles


def _identifier(cell: object, place: str) -> str:
    if isinstance(cell, bool) or not isinstance(cell, str | int) or not str(cell).strip():
        raise DataError(f"{place} must hold an id (text or integer), got {cell!r}")
    return str(cell).strip()


def _identifiers(cell: object, place: str) -> list[str]:
    if cell is None:
        return []
    if isinstance(cell, str):
        if cell.lstrip().startswith("["):
            try:
                cell = json.loads(cell)
            except json.JSONDecodeError:
                raise DataError(f"{place}: {cell!r} is not a JSON list") from None
        else:
            return [part for part in re.split(r"[;\s]+", cell) if part]
    if isinstance(cell, np.ndarray):
        cell = cell.tolist()
    if isinstance(cell, int) and not isinstance(cell, bool):
        return [str(cell)]
    if not isinstance(cell, list | tuple):
        raise DataError(f"{place} must be a list of ids, got {cell!r}")
    return [_identifier(one, place) for one in cell]
