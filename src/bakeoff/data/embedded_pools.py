"""Pools to select from, made of the same real text as the embedding family's default data.

Which examples to label: docstrings by package and manual paragraphs by topic. Which texts to train
on: a mixed pool in which the texts of each of five kinds can be the target, with repeated and
scrambled text among them, as crawled pools have.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from bakeoff.data.embedded import (
    HELD_OUT_PACKAGES,
    HELD_OUT_TOPICS,
    fetch_embedded,
    film_snippets,
    manual_paragraphs,
    news_articles,
    standard_library_pairs,
)
from bakeoff.data.samples import Sample, TrainingPool
from bakeoff.data.splits import hold_out_by_label, normalise, position, sample
from bakeoff.data.tasks import ClassificationTask
from bakeoff.errors import DataError

PoolSize = Literal["smoke", "demo", "full"]

LABELLED_PACKAGES = (*HELD_OUT_PACKAGES, "importlib", "inspect", "pydoc", "tkinter", "turtle")
"""Standard-library packages whose docstrings are the default pool to label, one class each."""

LABELLED_TOPICS = (*HELD_OUT_TOPICS, "compound", "customization", "specialnames", "types")
"""Topics of the language reference whose paragraphs are the other pool, one class each."""

TARGETS = ("manual", "news", "films", "docstrings", "code")
"""Kinds of text in the default training pool; each can be the target."""

# Texts of a class, those of its test part included.
_PER_CLASS: dict[str, int | None] = {"smoke": 24, "demo": 160, "full": None}
# Texts of each kind in the training pool, then what a target keeps for queries and for testing.
_PER_KIND: dict[str, tuple[int, int, int]] = {
    "smoke": (40, 20, 12),
    "demo": (300, 60, 80),
    "full": (4000, 200, 400),
}
# A scrambled and a repeated text for so many others.
_ONE_SCRAMBLED_IN = 5
_ONE_REPEATED_IN = 10
_WORDS_OF_NEWS = 60


def labelled_default(size: PoolSize = "demo", seed: int = 0) -> tuple[ClassificationTask, ...]:
    """Return labelled texts, split into what may be picked from and what is tested on.

    Parameters
    ----------
    size
        ``"smoke"`` (4 classes of docstrings, 96 texts), ``"demo"`` (about 1,800 docstrings of 17
        classes and 640 paragraphs of 16) or ``"full"`` (everything).
    seed
        Another seed takes other samples and splits.

    Returns
    -------
    tuple of ClassificationTask
        ``"docstrings by package"``, and ``"manual by topic"`` but for the smoke size. A quarter of
        each class is held out.

    Raises
    ------
    DataError
        If `size` is unknown, or the running Python has no source of its standard library.
    """
    _check(size)
    packages = LABELLED_PACKAGES[:4] if size == "smoke" else LABELLED_PACKAGES
    docstrings: dict[str, list[str]] = {package: [] for package in packages}
    for pair in standard_library_pairs():
        if pair.package in docstrings:
            docstrings[pair.package].append(pair.docstring)
    tasks = [_task("docstrings by package", docstrings, size, seed)]
    if size != "smoke":
        manual = manual_paragraphs()
        by_topic = {topic: manual[topic] for topic in LABELLED_TOPICS if topic in manual}
        tasks.append(_task("manual by topic", by_topic, size, seed))
    return tuple(tasks)


def training_pools_default(
    size: PoolSize = "demo", targets: Sequence[str] = ("manual",), seed: int = 0
) -> tuple[TrainingPool, ...]:
    """Return one pool per target: the same mixed texts, with the target's queries and test texts.

    The pool mixes paragraphs of Python's language reference, passages of news, film snippets,
    docstrings and code, in equal parts where there is enough of each, with one scrambled text (its
    words shuffled) for every five others and one repeated text for every ten.

    Parameters
    ----------
    size
        ``"smoke"``, ``"demo"`` (about 1,800 texts) or ``"full"`` (about 11,000).
    targets
        Of `TARGETS`. A target's queries and test texts are in nobody's pool.
    seed
        Another seed takes other samples and splits.

    Returns
    -------
    tuple of TrainingPool
        In the order of `targets`; the source of a sample is its kind, ``"scrambled"`` for
        scrambled ones.

    Raises
    ------
    DataError
        If `size` or a target is unknown, or Python has no source of its standard library.
    FetchError
        If the package with news and films is not in the cache and cannot be fetched.
    """
    _check(size)
    for target in targets:
        if target not in TARGETS:
            raise DataError(f"targets must be among {', '.join(TARGETS)}, got {target!r}")
    fetch_embedded()  # before the seconds of parsing: a missing network is said at once
    n_pool, n_queries, n_test = _PER_KIND[size]
    kept: dict[str, tuple[list[str], list[str]]] = {}
    pool: list[Sample] = []
    for kind, texts in _texts_by_kind(seed).items():
        # At most a third is kept back, so that a small kind is still to be found in the pool.
        queries = min(n_queries, len(texts) // 6)
        test = min(n_test, len(texts) // 6)
        kept[kind] = (texts[:queries], texts[queries : queries + test])
        pool += [Sample(text, source=kind) for text in texts[queries + test :][:n_pool]]
    pool += _scrambled(pool, seed) + _repeated(pool, seed)
    pool.sort(key=lambda each: position(each.source + each.text, seed))
    sources = np.array([each.source for each in pool])
    notes = (
        f"{len(pool):,} texts: "
        + ", ".join(f"{np.count_nonzero(sources == kind):,} {kind}" for kind in sorted({*sources}))
        + ", repeated ones included.",
        f"From Python {platform.python_version()} and the test files of gensim.",
    )
    return tuple(
        TrainingPool(
            f"target {target}",
            tuple(pool),
            tuple(Sample(text, source=target) for text in kept[target][0]),
            tuple(Sample(text, source=target) for text in kept[target][1]),
            relevant=sources == target,
            notes=notes,
        )
        for target in targets
    )


def _check(size: str) -> None:
    if size not in _PER_KIND:
        raise DataError(f"size must be one of {', '.join(map(repr, _PER_KIND))}, got {size!r}")


def _task(
    name: str, texts_of: Mapping[str, Sequence[str]], size: PoolSize, seed: int
) -> ClassificationTask:
    rows: dict[str, tuple[str, str]] = {}
    for label, of_class in texts_of.items():
        for text in sample(of_class, _PER_CLASS[size], seed, key=str):
            rows.setdefault(normalise(text), (text, label))
    texts, labels = zip(*rows.values(), strict=True)
    test = hold_out_by_label(texts, labels, fraction=0.25, seed=seed)
    return ClassificationTask(
        name,
        tuple(text for text, out in zip(texts, test, strict=True) if not out),
        tuple(label for label, out in zip(labels, test, strict=True) if not out),
        tuple(text for text, out in zip(texts, test, strict=True) if out),
        tuple(label for label, out in zip(labels, test, strict=True) if out),
    )


def _texts_by_kind(seed: int) -> dict[str, list[str]]:
    """Return the distinct texts of each kind, in an order drawn by content and seed."""
    pairs = standard_library_pairs()
    by_kind = {
        "manual": [text for topic in manual_paragraphs().values() for text in topic],
        "news": [
            passage
            for lead, rest in news_articles()
            for passage in _passages(f"{lead} {rest}", _WORDS_OF_NEWS)
        ],
        "films": [text for text, _ in film_snippets()],
        "docstrings": [pair.docstring for pair in pairs],
        "code": [pair.code for pair in pairs],
    }
    return {
        kind: sorted(
            {normalise(text): text for text in texts}.values(),
            key=lambda text: position(text, seed),
        )
        for kind, texts in by_kind.items()
    }


def _passages(text: str, n_words: int) -> list[str]:
    """Cut a text into runs of words; the last one, if it is short, is left out."""
    words = text.split()
    runs = [words[start : start + n_words] for start in range(0, len(words), n_words)]
    return [" ".join(run) for run in runs if len(run) > n_words // 2]


def _scrambled(pool: Sequence[Sample], seed: int) -> list[Sample]:
    chosen = sample(pool, len(pool) // _ONE_SCRAMBLED_IN, seed + 1, key=lambda each: each.text)
    made = []
    for each in chosen:
        words = each.text.split()
        random.Random(position(each.text, seed)).shuffle(words)
        made.append(Sample(" ".join(words), source="scrambled"))
    return made


def _repeated(pool: Sequence[Sample], seed: int) -> list[Sample]:
    """Return one text in ten again, word for word."""
    return sample(pool, len(pool) // _ONE_REPEATED_IN, seed + 2, key=lambda each: each.text)
