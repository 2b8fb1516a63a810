"""How to upgrade an encoder without embedding everything again: ways compared on class streams.

A service's classes arrive over T tasks; after each, its encoder is trained further, or replaced by
one that was trained elsewhere and then trained further. Every version's vectors of the documents
are kept as an index, and every version's queries are searched in every older index.

With ``train="head"`` the encoder is a small network on the cached vectors of a frozen one, so that
a trial takes seconds; with ``train="full"`` a sentence-transformers model is trained as a whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import atomic_folder, build_once, cache_directory, write_text
from bakeoff.data.formats import count, listed
from bakeoff.data.splits import normalise, position, sample
from bakeoff.errors import BakeoffError, DataError
from bakeoff.models.gguf import quiet_transformers
from bakeoff.models.text_encoder import TextEncoder
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from bakeoff.embedding.stationary import ClassSlots
    from bakeoff.embedding.stationary_head import IncrementalHead

Size = Literal["smoke", "demo", "full"]
Train = Literal["head", "full"]
Vectors = NDArray[np.float32]
Units = NDArray[np.float64]
Scores = dict[str, dict[str, Units]]

UPGRADE_METRICS: dict[str, Metric] = {
    "old_index": Metric("MRR@10 of the newest queries in the oldest index", margin=0.02),
    "old_index_identification": Metric(
        "nearest class template of the newest queries in the oldest index", margin=0.02
    ),
    "self_test": Metric("MRR@10 of the newest queries in the newest index", margin=0.02),
    "average_accuracy": Metric(
        "nearest class template over all versions and older indexes", margin=0.02
    ),
    "average_compatibility": Metric("share of compatible pairs of versions (AC)", margin=0.05),
}
"""By name; the unit is a query, for the last one a pair of versions."""

_QUESTION = "how to upgrade an encoder without re-indexing"
# Raise when a trial's scores change.
_VERSION = 1
_CUTOFF = 10
_LEAST_TEXTS = 4
# Losses differ in size, so that one learning rate for all would favour some: each design takes the
# one of these that serves its oldest index best, on training texts set aside.
_RATES = (0.1, 0.03, 0.01, 0.003)
_SEARCH_SEED = 1_000_003


@dataclass(frozen=True)
class _Kind:
    """What a method trains, and how it searches an old index."""

    head: str
    geometry: Literal["simplex", "orthonormal", "gaussian"] = "simplex"
    search: Literal["as it is", "adapter", "embed again", "first version", "untrained"] = "as it is"
    parameters: tuple[str, ...] = ()
    # What a replacement is tied to: itself, as it came, or the service's last version.
    tied_to: Literal["replacement", "last"] = "replacement"
    # Share of cross-entropy in the loss of an update.
    lam: float = 0.1
    whole: bool = True


_FIXED = ("n_slots", "lam", "mu", "same_class", "tied_to")
_KINDS: dict[str, _Kind] = {
    "stationary": _Kind("StationaryHead", parameters=_FIXED),
    "simplex-ce": _Kind("FixedClassifierHead", parameters=("n_slots",)),
    "orthonormal": _Kind("StationaryHead", geometry="orthonormal", parameters=_FIXED),
    "gaussian": _Kind("StationaryHead", geometry="gaussian", parameters=_FIXED),
    "replay": _Kind("ReplayHead", whole=False),
    "bct": _Kind(
        "BackwardCompatibleHead",
        parameters=("lam", "tied_to"),
        tied_to="last",
        lam=0.5,
        whole=False,
    ),
    "l2": _Kind("DistillationHead", parameters=("lam", "tied_to"), tied_to="last", whole=False),
    "info-nce": _Kind(
        "InfoNCEHead", parameters=("lam", "mu", "tied_to"), tied_to="last", whole=False
    ),
    "procrustes": _Kind("ReplayHead", search="adapter", parameters=("n_pairs",)),
    "ridge": _Kind("ReplayHead", search="adapter", parameters=("n_pairs",)),
    "re-embed": _Kind("ReplayHead", search="embed again"),
    "keep-first": _Kind("ReplayHead", search="first version"),
    "untrained": _Kind("", search="untrained"),
}


def upgrade_designs() -> Designs:
    """Return the method, its controls, and what a sceptic would do instead.

    Examples
    --------
    >>> [design.name for design in upgrade_designs()][:4]
    ['replay', 'stationary', 'simplex, cross-entropy alone', 'orthonormal']
    """
    return Designs(
        [
            Design("replay", "replay"),
            Design("stationary", "stationary"),
            Design("simplex, cross-entropy alone", "simplex-ce"),
            Design("orthonormal", "orthonormal"),
            Design("gaussian", "gaussian"),
            Design("stationary, tied to the last version", "stationary", {"tied_to": "last"}),
            Design("BCT", "bct"),
            Design("L2", "l2"),
            Design("InfoNCE", "info-nce"),
            Design("Procrustes", "procrustes"),
            Design("ridge", "ridge"),
            Design("keep the first version", "keep-first"),
            Design("untrained vectors", "untrained"),
            Design("re-embed", "re-embed"),
        ]
    )


# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassTexts:
    """Texts with their classes, out of which a stream of classes is made.

    Parameters
    ----------
    name
        For reports.
    texts, labels
        Of one length. Texts that are equal but for case and spacing count once, with their first
        label; classes with fewer than four texts are left out.
    notes
        Sentences about how the data was read.

    Raises
    ------
    DataError
        If lengths differ or a text is blank.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for part in ("texts", "labels", "notes"):
            object.__setattr__(self, part, tuple(getattr(self, part)))
        if len(self.texts) != len(self.labels):
            raise DataError(
                f"class texts {self.name!r}: {len(self.texts)} texts and {len(self.labels)} labels"
            )
        blank = [row for row, text in enumerate(self.texts) if not str(text).strip()]
        if blank:
            raise DataError(f"class texts {self.name!r}: text {blank[0]} is blank")

    def fingerprint(self) -> str:
        """Return the SHA-256 of texts and labels, as hexadecimal digits."""
        rows = json.dumps([self.texts, self.labels], ensure_ascii=False)
        return hashlib.sha256(rows.encode("utf-8", "surrogatepass")).hexdigest()


def read_class_texts(
    paths: Path | str | Sequence[Path | str],
    *,
    columns: Mapping[str, str] | None = None,
    max_texts: int | None = None,
) -> tuple[ClassTexts, ...]:
    """Return the labelled texts of the user's files, each a stream of classes of its own.

    Parameters
    ----------
    paths, columns, max_texts
        As `bakeoff.data.embedding_data` takes them; every file needs a text and a label column.
    """
    from bakeoff.data.files import NO_PAIRS, embedding_data
    from bakeoff.data.tasks import ClassificationTask

    data = embedding_data(paths, columns=columns, task="labelled", max_texts=max_texts)
    # Notes on how a classifier's data was split say nothing here.
    notes = [
        note
        for note in data.notes
        if note != NO_PAIRS
        and not any(word in note for word in ("held out", "clustering", "never tested"))
    ]
    found = []
    for number, task in enumerate(t for t in data.tasks if isinstance(t, ClassificationTask)):
        name = task.name.removesuffix(" classification")
        texts = (*task.train_texts, *task.test_texts)
        labels = (*task.train_labels, *task.test_labels)
        own = tuple(notes) if not number else ()
        if few := sorted(label for label, n in Counter(labels).items() if n < _LEAST_TEXTS):
            own += (
                f"{name}: {count(len(few), 'class', 'classes')} with fewer than {_LEAST_TEXTS} "
                f"texts left out ({listed(few[:5])}{', ...' if len(few) > 5 else ''}).",
            )
        found.append(ClassTexts(name, texts, labels, own))
    return tuple(found)


# Classes and texts of a class, by source and size; None takes all there are.
_PACKAGES: dict[str, tuple[int, int]] = {"smoke": (9, 24), "demo": (27, 60), "full": (43, 200)}
_TOPICS: dict[str, int] = {"demo": 60, "full": 200}
_ARTICLES: dict[str, int] = {"full": 60}
_LEAST_OF_A_CLASS = 20
_WORDS_OF_A_PASSAGE = 25


def default_class_texts(size: Size = "demo") -> tuple[ClassTexts, ...]:
    """Return real text by class that any machine can have.

    Parameters
    ----------
    size
        ``"smoke"``: docstrings of nine standard-library packages, 24 each. ``"demo"``: of 27, up to
        60 each, and the language reference's paragraphs by topic. ``"full"``: all packages with at
        least 20, and passages of 25 words by news article as well.

    Raises
    ------
    DataError
        If `size` is unknown, or the running Python has no source of its standard library.
    FetchError
        If the package with news is not in the cache and cannot be fetched (``"full"``).
    """
    from bakeoff.data.embedded import manual_paragraphs, news_articles, standard_library_pairs

    if size not in _PACKAGES:
        raise DataError(f"size must be one of {', '.join(_PACKAGES)}, got {size!r}")
    docstrings: dict[str, list[str]] = {}
    for pair in standard_library_pairs():
        docstrings.setdefault(pair.package.lstrip("_"), []).append(pair.docstring)
    n_classes, n_texts = _PACKAGES[size]
    found = [_sampled("docstrings by package", docstrings, n_classes, n_texts)]
    if size in _TOPICS:
        topics = {topic: list(texts) for topic, texts in manual_paragraphs().items()}
        found.append(_sampled("manual by topic", topics, None, _TOPICS[size]))
    if size in _ARTICLES:
        articles = {}
        for number, (lead, rest) in enumerate(news_articles()):
            words = f"{lead} {rest}".split()
            starts = range(0, len(words) - _WORDS_OF_A_PASSAGE + 1, _WORDS_OF_A_PASSAGE)
            articles[f"article {number}"] = [
                " ".join(words[start : start + _WORDS_OF_A_PASSAGE]) for start in starts
            ]
        found.append(_sampled("news by article", articles, _ARTICLES[size], 200, least=8))
    return tuple(found)


def _sampled(
    name: str,
    texts_of: Mapping[str, Sequence[str]],
    n_classes: int | None,
    n_texts: int,
    least: int = _LEAST_OF_A_CLASS,
) -> ClassTexts:
    """Return the largest classes, so many texts of each, chosen by hash."""
    distinct = {
        label: list({normalise(text): text for text in texts}.values())
        for label, texts in texts_of.items()
    }
    largest = sorted(
        (label for label, texts in distinct.items() if len(texts) >= least),
        key=lambda label: (-len(distinct[label]), label),
    )[:n_classes]
    rows = [
        (text, label)
        for label in sorted(largest)
        for text in sample(distinct[label], n_texts, 0, key=str)
    ]
    texts, labels = zip(*rows, strict=True)
    return ClassTexts(name, texts, labels)


@dataclass(frozen=True)
class _Stream:
    """Which class is met when, and which text is used for what (row numbers)."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    elsewhere: tuple[str, ...]
    arriving: tuple[tuple[str, ...], ...]
    never: tuple[str, ...]
    training: Mapping[str, NDArray[np.int64]]
    documents: Mapping[str, NDArray[np.int64]]
    queries: Mapping[str, NDArray[np.int64]]

    @property
    def own(self) -> tuple[str, ...]:
        return tuple(label for group in self.arriving for label in group)

    def rows(self, part: Mapping[str, NDArray[np.int64]], labels: Iterable[str]) -> NDArray[Any]:
        found = [part[label] for label in labels]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def labels_of(self, rows: NDArray[Any]) -> list[str]:
        return [self.labels[row] for row in rows.tolist()]


def arrange(data: ClassTexts, steps: int) -> _Stream:
    """Decide by hash, not by order, which class is met when and which text is used for what.

    A third of the classes belongs to those who train elsewhere, a third is never trained on; the
    rest arrives over the steps. Where classes are few, the two others have fewer than a third, but
    at least two. Of each class, a fifth of the texts is queries, a third documents of the index,
    the rest is trained on.
    """
    first: dict[str, int] = {}
    for row, text in enumerate(data.texts):
        first.setdefault(normalise(text), row)
    members: dict[str, list[int]] = {}
    for row in first.values():
        members.setdefault(data.labels[row], []).append(row)
    kept = sorted(
        (label for label, rows in members.items() if len(rows) >= _LEAST_TEXTS),
        key=lambda label: position(label, 1),
    )
    n_other = max(2, min(len(kept) // 3, (len(kept) - steps - 1) // 2))
    needed = 2 * n_other + steps + 1
    if len(kept) < needed:
        raise DataError(
            f"class texts {data.name!r}: {len(kept)} classes have at least {_LEAST_TEXTS} texts; "
            f"{steps} steps need {steps + 5} (2 to train on elsewhere, 2 never trained on, 2 for "
            "the first step and one for each other)"
        )
    own = kept[n_other:-n_other]
    # The first step has the most classes, as in the paper; it needs two to have negatives.
    groups = [list(group) for group in np.array_split(np.array(own[1:], dtype=object), steps)]
    groups[0] = [own[0], *groups[0]]
    parts: tuple[dict[str, NDArray[np.int64]], ...] = ({}, {}, {})
    for label in kept:
        for part, some in zip(parts, _cut(members[label], data.texts, 2), strict=True):
            part[label] = some
    queries, documents, training = parts
    return _Stream(
        data.name,
        data.texts,
        data.labels,
        elsewhere=tuple(kept[:n_other]),
        arriving=tuple(tuple(group) for group in groups),
        never=tuple(kept[-n_other:]),
        training=training,
        documents=documents,
        queries=queries,
    )


def _cut(rows: Sequence[int], texts: Sequence[str], seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of a class that are queries, documents and trained on, decided by hash."""
    order = np.array(sorted(rows, key=lambda row: position(texts[row], seed)))
    n_queries, n_documents = max(1, len(rows) // 5), max(1, len(rows) // 3)
    return [np.sort(part) for part in np.split(order, (n_queries, n_queries + n_documents))]


def _inside(stream: _Stream) -> _Stream | None:
    """Return the stream with training texts alone, split anew; None if a class has too few."""
    parts: tuple[dict[str, NDArray[np.int64]], ...] = ({}, {}, {})
    for label, rows in stream.training.items():
        if label not in stream.own:
            for part in parts:
                part[label] = rows
            continue
        if len(rows) < _LEAST_TEXTS:
            return None
        for part, some in zip(parts, _cut(rows.tolist(), stream.texts, 4), strict=True):
            part[label] = some
    queries, documents, training = parts
    return replace(stream, training=training, documents=documents, queries=queries)


# The problem --------------------------------------------------------------------------------------


class UpgradeProblem:
    """How to upgrade an encoder without re-indexing, when classes arrive and models are replaced.

    A third of the classes trains models elsewhere, with slots from the beginning; a third is never
    trained on; the rest arrives over `steps` tasks. The first version starts from a model trained
    elsewhere on a part of its classes; at each replacement the service discards its own and starts
    from the next one, which was trained from other random weights, on more classes, and has a wider
    hidden layer. In each task a design trains on the task's texts and a memory of earlier ones.

    There are two indexes, one of the service's own classes and one of those never trained on, both
    with documents that no version was trained on, and three tasks: queries of the classes of the
    first step, of those that came later, and of those never trained on.

    Parameters
    ----------
    data
        `ClassTexts`, each a stream of its own; or a size of the default ones.
    encoder
        The frozen encoder, or the one to start from with ``train="full"``: packaged name, folder or
        hub id; mean over tokens where a folder does not say otherwise.
    train
        ``"head"``: a network on cached vectors. ``"full"``: all weights of a small encoder. The
        designs with a learned classifier in the index's own model (replay, BCT, L2, InfoNCE) are
        there for heads only, and what searches through adapters or embeds again is trained against
        random class vectors that versions do not share.
    steps
        Number T of versions, at least 2.
    replacements
        Steps (from 1) that begin with a model trained elsewhere; by default the last one.
    n_slots
        Preallocated classes; by default 128, or the next power of two above four times the classes.
    hidden
        Width of the hidden layer of the first model trained elsewhere.
    epochs, batch_size, learning_rate
        Of each training. By default 70 epochs for heads and 3 epochs at 2e-5 for whole encoders.
        Without a learning rate, models elsewhere are trained at 0.1, and each design looks for the
        rate of its updates (0.1, 0.03, 0.01 or 0.003) on training texts set aside, once for all
        seeds: the one whose newest queries find most in the oldest index. Batches are smaller than
        the paper's 128: streams of text have tens of texts in a class where it has 300 images, and
        a version is to take hundreds of steps, not tens.
    memory_per_class
        Texts of each class that are kept for later steps.
    n_pairs
        Documents that an adapter is fitted on at each upgrade: a random sample of texts that are
        neither queries nor in an index searched here, as from a large index.
    device
        Where heads are trained.

    Raises
    ------
    DataError
        If there is no data, a stream has too few classes, or a number is out of range.

    Examples
    --------
    >>> problem = UpgradeProblem("smoke", epochs=5)  # doctest: +SKIP
    >>> problem.n_slots  # doctest: +SKIP
    128
    """

    name = "embedding"

    def __init__(
        self,
        data: Sequence[ClassTexts] | ClassTexts | Size = "demo",
        encoder: str | Path = "all-minilm-l6-v2",
        *,
        train: Train = "head",
        steps: int = 3,
        replacements: Sequence[int] | None = None,
        n_slots: int | None = None,
        hidden: int = 256,
        epochs: int | None = None,
        batch_size: int = 32,
        learning_rate: float | None = None,
        memory_per_class: int = 20,
        n_pairs: int = 300,
        device: str = "cpu",
    ) -> None:
        _check_choice("train", train, ("head", "full"))
        self.train = train
        whole = train == "full"
        self.steps, self.hidden, self.batch_size = steps, hidden, batch_size
        self.epochs = (3 if whole else 70) if epochs is None else epochs
        self.searches = learning_rate is None and not whole
        self.learning_rate = (
            (2e-5 if whole else _RATES[0]) if learning_rate is None else learning_rate
        )
        self.memory_per_class, self.n_pairs, self.device = memory_per_class, n_pairs, device
        least = {"steps": 2, "hidden": 1, "epochs": 1, "batch_size": 2}
        for name, bound in {**least, "memory_per_class": 1, "n_pairs": 2}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise DataError(f"{name} must be a whole number of at least {bound}, got {value!r}")
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate must be positive, got {learning_rate!r}")
        self.replacements = (steps - 1,) if replacements is None else tuple(sorted(replacements))
        if not set(self.replacements) <= set(range(1, steps)) or len(set(self.replacements)) < len(
            self.replacements
        ):
            raise DataError(
                f"replacements must be distinct steps from 1 to {steps - 1}, got "
                f"{list(self.replacements)}"
            )
        if isinstance(data, str):
            data = default_class_texts(data)
        self.data = (data,) if isinstance(data, ClassTexts) else tuple(data)
        names = [one.name for one in self.data]
        if not names or len(set(names)) < len(names):
            raise DataError(f"data must be at least one stream, names distinct, got {names}")
        self.streams = tuple(arrange(one, steps) for one in self.data)
        n_classes = max(len(one.elsewhere) + len(one.own) for one in self.streams)
        if n_slots is None:
            n_slots = max(128, 1 << (4 * n_classes - 1).bit_length())
        if n_slots < n_classes:
            raise DataError(f"n_slots must be at least the {n_classes} classes, got {n_slots}")
        self.n_slots = n_slots
        self.encoder = str(encoder)
        self._encoder = TextEncoder(self.encoder)
        self._vectors = _Vectors()

    # -- what a study asks -----------------------------------------------------------------------

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """New queries on the oldest index first."""
        return UPGRADE_METRICS

    def fingerprint(self) -> str:
        """Return a digest of data, encoder and settings."""
        facts = {
            "question": "upgrades",
            "data": [one.fingerprint() for one in self.data],
            "encoder": self._encoder.fingerprint,
            "train": [self.train, self.epochs, self.batch_size, self.learning_rate],
            "rates": _RATES if self.searches else None,
            "stream": [self.steps, self.replacements, self.memory_per_class],
            "head": [self.n_slots, self.hidden],
            "n_pairs": self.n_pairs,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        what = (
            f"a network with a hidden layer of {self.hidden} on the vectors of {self.encoder}"
            if self.train == "head"
            else f"all weights of {self.encoder}"
        )
        return {
            "question": _QUESTION,
            "data": {
                one.name: f"{len(one.own)} classes in {self.steps} steps "
                f"({' + '.join(str(len(group)) for group in one.arriving)}), "
                f"{len(one.elsewhere)} trained on elsewhere, {len(one.never)} never; "
                f"{len(one.rows(one.documents, one.own))} and "
                f"{len(one.rows(one.documents, one.never))} documents in the indexes"
                for one in self.streams
            },
            "trained": f"{what}; {self.epochs} epochs a version, batches of {self.batch_size}, "
            + (
                f"the learning rate of updates is the best of {', '.join(map(str, _RATES))} on "
                "training texts set aside"
                if self.searches
                else f"learning rate {self.learning_rate:g}"
            ),
            "replaced by a model trained elsewhere": f"before step "
            f"{', '.join(str(step + 1) for step in self.replacements)}"
            if self.replacements
            else "never",
            "slots": self.n_slots,
            "memory": f"{self.memory_per_class} texts of each class",
            "adapters are fitted on": f"at most {self.n_pairs} documents at each upgrade",
            "notes": [note for one in self.data for note in one.notes],
        }

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return str(_VERSION)

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""
        check_method(design, tuple(_KINDS), _QUESTION)
        kind = _KINDS[design.method]
        check_parameters(design, kind.parameters)
        if self.train == "full" and (not kind.whole or "tied_to" in design.params):
            raise DataError(
                f"design {design.name!r}: {design.method} trains heads on given vectors: with "
                "train='full' there are "
                f"{', '.join(name for name, one in _KINDS.items() if one.whole)}"
            )
        try:
            _check_values(design.params)
            for stream in self.streams:
                self._manifest(design, stream)
        except DataError as error:
            raise DataError(f"design {design.name!r}: {error}") from error

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs; embed all texts with the frozen encoder, once."""
        for design in designs:
            self.check(design)
        for number, stream in enumerate(self.streams):

            def progress(done: int, total: int, number: int = number) -> None:
                fraction = (number + done / max(1, total)) / len(self.streams)
                work.progress(fraction, "embedding texts")

            self._base_vectors(stream, progress)

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Train all versions of one design on every stream, and search every older index.

        Raises
        ------
        BakeoffError
            If training diverged.
        """
        self.check(design)
        scores: Scores = {}
        cost: Counter[str] = Counter()
        notes: list[str] = []
        for number, stream in enumerate(self.streams):

            def progress(
                done: int, total: int, number: int = number, name: str = stream.name
            ) -> None:
                work.progress((number + done / total) / len(self.streams), f"{name}, versions")

            folder = work.directory / _folder_name(number, stream.name)
            try:
                rate = self._rate(design, stream)
                if rate is not None:
                    notes.append(f"{stream.name}: updates at a learning rate of {rate:g}.")
                found, spent = self._stream(design, seed, stream, folder, progress, rate)
            except FloatingPointError as error:
                raise BakeoffError(
                    f"design {design.name!r}: {error}; try a learning_rate below "
                    f"{self.learning_rate:g}"
                ) from error
            for metric, tasks in found.items():
                scores.setdefault(metric, {}).update(tasks)
            trained = spent.pop("trained_parameters")
            cost.update(spent)
            cost["trained_parameters"] = max(cost["trained_parameters"], trained)  # type: ignore[assignment]
        return Trial(
            scores=scores,
            cost={name: float(value) for name, value in cost.items()},
            artifact=work.directory,
            notes=tuple(notes),
        )

    # -- one stream ------------------------------------------------------------------------------

    def _stream(
        self,
        design: Design,
        seed: int,
        stream: _Stream,
        folder: Path,
        progress: Callable[[int, int], None],
        rate: float | None,
    ) -> tuple[Scores, dict[str, float]]:
        kind = _KINDS[design.method]
        began = time.perf_counter()
        made = self._versions(design, seed, stream, progress, rate)
        cost: dict[str, float] = {
            "training_seconds": time.perf_counter() - began,
            "trained_parameters": made.trained_parameters,
            "labels_used": made.labels_used,
            "paired_vectors": made.paired_vectors,
            "texts_embedded_again": 0,
        }
        adapters = _Adapters(design, self.n_pairs, stream, made.embed)
        scores: Scores = {}
        for group in ("own", "never"):
            labels = stream.own if group == "own" else stream.never
            queries, documents = (
                stream.rows(part, labels) for part in (stream.queries, stream.documents)
            )
            found = _all_pairs(kind.search, self.steps, made.embed, adapters, queries, documents)
            matrix = _matrix(found, queries, documents, stream)
            for task, rows in _tasks(stream, group, queries).items():
                for metric, values in _summary(matrix, rows, self.steps).items():
                    scores.setdefault(metric, {})[task] = values
        n_documents = len(stream.rows(stream.documents, (*stream.own, *stream.never)))
        upgrades = self.steps - 1
        if kind.search == "embed again":
            cost["texts_embedded_again"] = float(upgrades * n_documents)
        if kind.search == "adapter":
            newest = adapters(self.steps - 1, 0)
            cost["texts_embedded_again"] = float(upgrades * adapters.n_pairs)
            cost["paired_vectors"] = float(upgrades * adapters.n_pairs)
            cost["trained_parameters"] += float(newest.n_features_in_ * newest.n_features_out_)
            cost["adapter_seconds"] = adapters.seconds
            newest.save(folder)
        made.save(folder)
        write_text(folder / "made.json", json.dumps({"search": kind.search}) + "\n")
        return scores, cost

    def _versions(
        self,
        design: Design,
        seed: int,
        stream: _Stream,
        progress: Callable[[int, int], None],
        rate: float | None = None,
    ) -> _Made:
        kind = _KINDS[design.method]
        if kind.search == "untrained":
            vectors = self._base_vectors(stream)
            return _Made(lambda version, rows: vectors[rows], 0, 0, 0, lambda folder: None)
        trainer: _HeadTrainer | _EncoderTrainer
        if self.train == "head":
            vectors = self._base_vectors(stream)
            trainer = _HeadTrainer(self, design, seed, stream, vectors, rate)
        else:
            trainer = _EncoderTrainer(self, design, seed, stream)
        n_steps = 1 if kind.search == "first version" else self.steps
        total = n_steps + 1 + len(self.replacements)
        done = labels_used = 0
        current: Any = None
        versions: list[Any] = []
        for step in range(n_steps):
            start = current
            if step == 0 or step in self.replacements:
                number = 0 if step == 0 else 1 + self.replacements.index(step)
                start = trainer.elsewhere(number)
                done += 1
                progress(done, total)
            rows = stream.rows(stream.training, stream.arriving[step])
            current = trainer.step(step, start, current, rows)
            versions.append(current)
            labels_used += len(rows)
            done += 1
            progress(done, total)
        first_only = kind.search == "first version"

        def embed(version: int, rows: NDArray[Any]) -> Vectors:
            return trainer.embed(versions[0 if first_only else version], rows)

        return _Made(
            embed,
            trainer.parameters(versions[-1]),
            labels_used,
            trainer.paired_vectors,
            lambda folder: trainer.save(versions[-1], folder),
        )

    def _rate(self, design: Design, stream: _Stream) -> float | None:
        """Return the learning rate of a design's updates, or None where none is looked for."""
        kind = _KINDS[design.method]
        inner = _inside(stream)
        if not self.searches or kind.search == "untrained" or inner is None:
            return None
        facts = {
            "version": _VERSION,
            "encoder": self._encoder.fingerprint,
            "texts": [stream.texts, stream.labels],
            "method": design.method,
            "params": dict(design.params),
            "train": [self.epochs, self.batch_size, self.learning_rate, _RATES],
            "stream": [self.steps, self.replacements, self.memory_per_class],
            "head": [self.n_slots, self.hidden, self.n_pairs],
        }
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

        def build(folder: Path) -> None:
            tried = {}
            for rate in _RATES:
                try:
                    tried[str(rate)] = self._found_inside(design, inner, rate)
                except (FloatingPointError, DataError):  # diverged, or vectors of length 0
                    tried[str(rate)] = -1.0
            write_text(folder / "rates.json", json.dumps(tried))

        folder = build_once(cache_directory() / "upgrades" / f"rates-{digest}", build)
        tried = json.loads((folder / "rates.json").read_text("utf-8"))
        return max(_RATES, key=lambda rate: tried[str(rate)])

    def _found_inside(self, design: Design, stream: _Stream, rate: float) -> float:
        """Return how much of the oldest index the newest queries find at a learning rate."""
        kind = _KINDS[design.method]
        made = self._versions(design, _SEARCH_SEED, stream, lambda done, total: None, rate)
        adapters = _Adapters(design, self.n_pairs, stream, made.embed)
        queries, documents = (
            stream.rows(part, stream.own) for part in (stream.queries, stream.documents)
        )
        pairs = _all_pairs(kind.search, self.steps, made.embed, adapters, queries, documents)
        ends = (self.steps - 1, 0)
        found = _matrix({ends: pairs[ends]}, queries, documents, stream)
        return float(found[ends][0].mean())

    def _manifest(self, design: Design, stream: _Stream) -> ClassSlots:
        """Return the slots of all classes: those trained elsewhere from the beginning."""
        from bakeoff.embedding.stationary import ClassSlots

        kind = _KINDS[design.method]
        slots = ClassSlots(int(design.params.get("n_slots", self.n_slots)), geometry=kind.geometry)
        return slots.add(stream.elsewhere, from_end=False).add(stream.own)

    def _elsewhere(self, stream: _Stream, number: int) -> tuple[str, ...]:
        """Return the classes that the next model was trained on elsewhere: more each time."""
        n_models = 1 + len(self.replacements)
        n_classes = max(2, round(len(stream.elsewhere) * (number + 1) / n_models))
        return stream.elsewhere[:n_classes]

    def _base_vectors(
        self, stream: _Stream, progress: Callable[[int, int], None] | None = None
    ) -> Vectors:
        """Return what the frozen encoder makes of all texts of a stream, from the cache."""
        known = self._vectors.of_stream.get(stream.name)
        if known is not None:
            return known
        text = json.dumps([self._encoder.fingerprint, stream.texts], ensure_ascii=False)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

        def build(folder: Path) -> None:
            vectors = self._encoder.encode(
                stream.texts, on_truncated=lambda cut: None, progress=progress
            )
            np.save(folder / "vectors.npy", vectors.astype(np.float32), allow_pickle=False)

        folder = build_once(cache_directory() / "upgrades" / f"vectors-{digest}", build)
        vectors: Vectors = np.load(folder / "vectors.npy", allow_pickle=False)
        self._vectors.of_stream[stream.name] = vectors
        return vectors

    # -- what leaves -----------------------------------------------------------------------------

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save the newest encoder of each stream as a sentence-transformers folder.

        With an adapter behind it, where the design has one: its queries then search the oldest
        index. What is needed to train the next version (weights and slots) is in ``update``.

        Parameters
        ----------
        design
            The trial's design.
        artifact
            Its artifact folder.
        destination
            The folder to write; replaced if it exists.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            Whether the folders load without bakeoff.
        """
        from bakeoff.embedding.upgrade_baselines import ADAPTER_FILE, LinearAdapter

        foreign = False
        with atomic_folder(destination) as scratch:
            for number, stream in enumerate(self.streams):
                name = _folder_name(number, stream.name)
                modules = self._modules(design, artifact / name)
                if (artifact / name / ADAPTER_FILE).is_file():
                    modules += LinearAdapter.load(artifact / name).modules()
                _save_encoder(self._encoder.model, modules, scratch / name)
                foreign |= any(
                    not type(m).__module__.startswith("sentence_transformers") for m in modules
                )
                update = artifact / name / "update"
                if update.is_dir():
                    shutil.copytree(update, scratch / name / "update")
            write_text(scratch / "README.md", self._read_me(design, destination, reason))
        return not foreign

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use the winner in `destination`."""
        folder = destination / _folder_name(0, self.streams[0].name)
        return [
            "from sentence_transformers import SentenceTransformer",
            f"queries = SentenceTransformer({str(folder)!r}).encode(['your query'])",
        ]

    def _modules(self, design: Design, folder: Path) -> list[Any]:
        """Return the modules of a trial's newest encoder."""
        if _KINDS[design.method].search == "untrained":
            return list(self._encoder.model)
        if self.train == "full":
            from bakeoff.embedding.stationary_text import plain_encoder
            from bakeoff.models import load_encoder

            return list(plain_encoder(load_encoder(folder / "update")))
        return [*self._encoder.model, *_head_modules(_head_class(design).load(folder / "update"))]

    def _read_me(self, design: Design, destination: Path, reason: str) -> str:
        kind = _KINDS[design.method]
        meaning = {
            "as it is": "Its queries are put to indexes of earlier versions as they are; the "
            "report says how much they find there.",
            "adapter": "The last modules map its queries to the oldest index.",
            "embed again": "Every index has to be made again with it.",
            "first version": "This is the first version: it made the index.",
            "untrained": "This is the encoder as it came.",
        }[kind.search]
        names = ", ".join(f"`{_folder_name(n, s.name)}/`" for n, s in enumerate(self.streams))
        parts = [
            f"# {design.name}",
            f"Method: {design.method}. {meaning}",
            reason,
            f"One folder for each stream of classes: {names}. In `update/` are weights and class "
            "slots to train the next version from." * (kind.search != "untrained"),
            "```python\n" + "\n".join(self.usage(destination)) + "\n```",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


# What is trained ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """The versions of one design on one stream."""

    embed: Callable[[int, NDArray[Any]], Vectors]
    trained_parameters: float
    labels_used: float
    paired_vectors: float
    save: Callable[[Path], None]


class _HeadTrainer:
    """Networks on the vectors of a frozen encoder."""

    def __init__(
        self,
        problem: UpgradeProblem,
        design: Design,
        seed: int,
        stream: _Stream,
        vectors: Vectors,
        rate: float | None,
    ) -> None:
        self.problem, self.design, self.seed = problem, design, seed
        self.stream, self.vectors, self.rate = stream, vectors, rate
        self.kind = _KINDS[design.method]
        self.slots = problem._manifest(design, stream)
        self.paired_vectors = 0

    def elsewhere(self, number: int) -> IncrementalHead:
        import torch

        labels = self.problem._elsewhere(self.stream, number)
        rows = self.stream.rows(self.stream.training, labels)
        head = self._head(number, self.seed * 1000 + 100 + number, from_end=False)
        head.fit(self.vectors[rows], np.array(self.stream.labels_of(rows), dtype=object))
        # A model comes without the data that it was trained on.
        head.memory_ = (torch.zeros(0, self.vectors.shape[1]), [])
        return head

    def step(
        self, step: int, start: IncrementalHead, last: IncrementalHead | None, rows: NDArray[Any]
    ) -> IncrementalHead:
        tied_to = self.design.params.get("tied_to", self.kind.tied_to)
        head = self._head(0, self.seed * 1000 + step) if last is None else last.version()
        head.random_state = self.seed * 1000 + step
        head.learning_rate = self.problem.learning_rate if self.rate is None else self.rate
        tie = last if tied_to == "last" and last is not None else None
        n_memory = 0 if last is None else len(last.memory_[1])
        head.partial_fit(
            self.vectors[rows],
            np.array(self.stream.labels_of(rows), dtype=object),
            previous=start,
            compatible_with=tie,
        )
        if self._is_tied() and step > 0:
            self.paired_vectors += len(rows) + n_memory
        return head

    def embed(self, version: IncrementalHead, rows: NDArray[Any]) -> Vectors:
        return version.transform(self.vectors[rows])

    def parameters(self, version: IncrementalHead) -> float:
        import torch

        modules = [version.network_, version.classifier_]
        return float(
            sum(
                p.numel() for m in modules if isinstance(m, torch.nn.Module) for p in m.parameters()
            )
        )

    def save(self, version: IncrementalHead, folder: Path) -> None:
        version.save(folder / "update")

    def _is_tied(self) -> bool:
        return self.kind.head not in ("ReplayHead", "FixedClassifierHead")

    def _head(self, number: int, random_state: int, *, from_end: bool = True) -> IncrementalHead:
        problem, params = self.problem, self.design.params
        head: IncrementalHead = _head_class(self.design)(
            self.slots.num_slots,
            hidden=(problem.hidden * (number + 1),),
            slots=self.slots,
            from_end=from_end,
            geometry=self.kind.geometry,
            lam=float(params.get("lam", self.kind.lam)),
            mu=float(params.get("mu", 10.0)),
            same_class=params.get("same_class", "zero"),
            epochs=problem.epochs,
            batch_size=problem.batch_size,
            learning_rate=problem.learning_rate,
            memory_per_class=problem.memory_per_class,
            random_state=random_state,
            device=problem.device,
        )
        return head


class _EncoderTrainer:
    """Whole text encoders with a projection against fixed class vectors behind them."""

    def __init__(self, problem: UpgradeProblem, design: Design, seed: int, stream: _Stream) -> None:
        self.problem, self.design, self.seed, self.stream = problem, design, seed, stream
        self.kind = _KINDS[design.method]
        self.slots = problem._manifest(design, stream)
        self.memory = np.zeros(0, dtype=np.int64)
        self.paired_vectors = 0

    def elsewhere(self, number: int) -> SentenceTransformer:
        from bakeoff.embedding.stationary import ClassSlots
        from bakeoff.embedding.stationary_text import stationary_encoder

        seed = self.seed * 1000 + 100 + number
        slots, geometry = self.slots, self.kind.geometry
        if self.kind.head == "ReplayHead":
            # An ordinary model shares its class vectors with no other.
            geometry = "gaussian"
            slots = ClassSlots(slots.num_slots, list(slots), geometry=geometry, seed=seed)
        model = stationary_encoder(
            copy.deepcopy(self.problem._encoder.model),
            slots.num_slots,
            slots=slots,
            geometry=geometry,
            seed=seed,
        )
        rows = self.stream.rows(self.stream.training, self.problem._elsewhere(self.stream, number))
        self._fit(model, rows, None, seed)
        return model

    def step(
        self,
        step: int,
        start: SentenceTransformer,
        last: SentenceTransformer | None,
        rows: NDArray[Any],
    ) -> SentenceTransformer:
        rows = np.concatenate([rows, self.memory])
        model = copy.deepcopy(start)
        tied = self.kind.head == "StationaryHead"
        self._fit(model, rows, start if tied else None, self.seed * 1000 + step)
        if tied and step > 0:
            self.paired_vectors += len(rows)
        rng = np.random.default_rng([self.seed, step])
        labels = np.array(self.stream.labels_of(rows), dtype=object)
        self.memory = np.concatenate(
            [
                rng.permutation(rows[labels == label])[: self.problem.memory_per_class]
                for label in sorted(set(labels))
            ]
        )
        return model

    def embed(self, version: SentenceTransformer, rows: NDArray[Any]) -> Vectors:
        from bakeoff.models import encode

        texts = [self.stream.texts[row] for row in rows.tolist()]
        return encode(version, texts, on_truncated=lambda cut: None)

    def parameters(self, version: SentenceTransformer) -> float:
        return float(sum(p.numel() for p in version.parameters()))

    def save(self, version: SentenceTransformer, folder: Path) -> None:
        version.save(str(folder / "update"), create_model_card=False)

    def _fit(
        self,
        model: SentenceTransformer,
        rows: NDArray[Any],
        old: SentenceTransformer | None,
        seed: int,
    ) -> None:
        from bakeoff.embedding.stationary_text import fit_stationary_encoder

        params = self.design.params
        fit_stationary_encoder(
            model,
            [self.stream.texts[row] for row in rows.tolist()],
            self.stream.labels_of(rows),
            old=old,
            epochs=self.problem.epochs,
            batch_size=self.problem.batch_size,
            learning_rate=self.problem.learning_rate,
            lam=float(params.get("lam", self.kind.lam)),
            mu=float(params.get("mu", 10.0)),
            same_class=params.get("same_class", "zero"),
            seed=seed,
        )


def _head_class(design: Design) -> Any:
    from bakeoff.embedding import stationary_head, upgrade_baselines

    name = _KINDS[design.method].head
    return getattr(stationary_head if name == "StationaryHead" else upgrade_baselines, name)


class _Adapters:
    """Adapters from a version's queries to an older index, each fitted once."""

    def __init__(
        self,
        design: Design,
        n_pairs: int,
        stream: _Stream,
        embed: Callable[[int, NDArray[Any]], Vectors],
    ) -> None:
        self.method = design.method
        # What an index holds is known without labels, of classes never trained on as well.
        rows = stream.rows(stream.training, (*stream.own, *stream.never)).tolist()
        wanted = int(design.params.get("n_pairs", n_pairs))
        chosen = sample(rows, wanted, 3, key=lambda row: stream.texts[row])
        self._rows = np.array(chosen, dtype=np.int64)
        self.n_pairs = len(self._rows)
        self.seconds = 0.0
        self._embed = embed
        self._fitted: dict[tuple[int, int], Any] = {}

    def __call__(self, new: int, old: int) -> Any:
        from bakeoff.embedding.upgrade_baselines import (
            LinearAdapter,
            ProcrustesAdapter,
            RidgeAdapter,
        )

        if (new, old) not in self._fitted:
            kind = ProcrustesAdapter if self.method == "procrustes" else RidgeAdapter
            vectors = self._embed(new, self._rows), self._embed(old, self._rows)
            began = time.perf_counter()
            self._fitted[new, old] = LinearAdapter.of(kind().fit(*vectors))
            self.seconds += time.perf_counter() - began
        return self._fitted[new, old]


# Scores -------------------------------------------------------------------------------------------

# By (query version, index version): vectors of the queries and of the documents.
_Pairs = dict[tuple[int, int], tuple[Vectors, Vectors]]


def _all_pairs(
    search: str,
    steps: int,
    embed: Callable[[int, NDArray[Any]], Vectors],
    adapters: _Adapters,
    queries: NDArray[Any],
    documents: NDArray[Any],
) -> _Pairs:
    """Return what every version searches with, and in what, for every older index."""
    query_vectors = [embed(version, queries) for version in range(steps)]
    indexes = [embed(version, documents) for version in range(steps)]
    found: _Pairs = {}
    for new in range(steps):
        for old in range(new + 1):
            asked = query_vectors[new]
            if search == "adapter" and old < new:
                asked = adapters(new, old).transform(asked)
            found[new, old] = (asked, indexes[new if search == "embed again" else old])
    return found


def _matrix(
    pairs: _Pairs, queries: NDArray[Any], documents: NDArray[Any], stream: _Stream
) -> dict[tuple[int, int], tuple[Units, Units]]:
    """Return the reciprocal rank at 10 and the right templates of every query, by versions."""
    from bakeoff.embedding.compatibility import first_ranks_and_precision, identification_hits

    number = {label: place for place, label in enumerate(sorted(set(stream.labels)))}
    classes = [
        np.array([number[label] for label in stream.labels_of(rows)], dtype=np.int64)
        for rows in (queries, documents)
    ]
    found = {}
    for versions, (asked, index) in pairs.items():
        asked, index = _unit_or_zero(asked), _unit_or_zero(index)
        first, _ = first_ranks_and_precision(asked, index, *classes)
        reciprocal = np.where(first <= _CUTOFF, 1.0 / first, 0.0)
        found[versions] = (reciprocal, identification_hits(asked, index, *classes))
    return found


def _unit_or_zero(vectors: Vectors) -> Vectors:
    """Return rows of length 1; a row of zeros, which no direction fits, stays and finds nothing."""
    if not np.isfinite(vectors).all():
        raise FloatingPointError("vectors of a version are not finite")
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)


def _tasks(stream: _Stream, group: str, queries: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Return which queries belong to which task."""
    if group == "never":
        return {f"{stream.name}: never trained on": np.ones(len(queries), dtype=bool)}
    early = np.isin(np.array(stream.labels_of(queries)), stream.arriving[0])
    return {f"{stream.name}: from the start": early, f"{stream.name}: came later": ~early}


def _summary(
    matrix: Mapping[tuple[int, int], tuple[Units, Units]], rows: NDArray[np.bool_], steps: int
) -> dict[str, Units]:
    """Return the metrics of one task: per query, the last one per pair of versions."""
    newest = steps - 1
    mean = {versions: hits[rows].mean() for versions, (_, hits) in matrix.items()}
    return {
        "old_index": matrix[newest, 0][0][rows],
        "old_index_identification": matrix[newest, 0][1][rows],
        "self_test": matrix[newest, newest][0][rows],
        "average_accuracy": np.mean([hits[rows] for _, hits in matrix.values()], axis=0),
        "average_compatibility": np.array(
            [float(mean[new, old] > mean[old, old]) for new, old in mean if new > old]
        ),
    }


# Small parts --------------------------------------------------------------------------------------


class _Vectors:
    """What a process has read from the cache; left behind when pickled."""

    def __init__(self) -> None:
        self.of_stream: dict[str, Vectors] = {}

    def __reduce__(self) -> tuple[type[_Vectors], tuple[()]]:
        return (type(self), ())


def _head_modules(head: IncrementalHead) -> list[Any]:
    """Return a head as modules of sentence-transformers alone."""
    from sentence_transformers.base.modules import Dense, Normalize
    from torch import nn

    layers = [layer for layer in head.network_ if not isinstance(layer, nn.ReLU)]  # type: ignore[attr-defined]
    modules: list[Any] = []
    for layer, last in zip(layers, [*[False] * (len(layers) - 1), True], strict=True):
        modules.append(
            Dense(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                activation_function=nn.Identity() if last else nn.ReLU(),
                init_weight=layer.weight.detach().clone(),
                init_bias=None if layer.bias is None else layer.bias.detach().clone(),
            )
        )
    return [*modules, Normalize()]


def _save_encoder(like: SentenceTransformer, modules: list[Any], folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        modules=modules,
        prompts=like.prompts,
        default_prompt_name=like.default_prompt_name,
        similarity_fn_name="cosine",
        device="cpu",
    )
    with quiet_transformers():
        model.save(str(folder), create_model_card=False)


def _folder_name(number: int, name: str) -> str:
    plain = re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:60] or "stream"
    return plain if number == 0 else f"{number + 1}-{plain}"


def _check_values(params: Mapping[str, Any]) -> None:
    for name, least in (("n_slots", 2), ("n_pairs", 2)):
        value = params.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name} must be a whole number of at least {least}, got {value!r}")
    for name, low, high in (("lam", 0.0, 1.0), ("mu", 1e-9, float("inf"))):
        value = params.get(name, 0.5)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise DataError(f"{name} is out of range: {value!r}")
    _check_choice("same_class", params.get("same_class", "zero"), ("zero", "drop"))
    _check_choice("tied_to", params.get("tied_to", "last"), ("replacement", "last"))


def _check_choice(name: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise DataError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
