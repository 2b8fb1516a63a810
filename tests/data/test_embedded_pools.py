"""The default pools: no leaks, right marks, the same every time (about 6 s, mostly parsing)."""

from __future__ import annotations

from collections import Counter

import pytest

from bakeoff.data import embedded_pools
from bakeoff.data.embedded import standard_library_pairs
from bakeoff.data.embedded_pools import (
    LABELLED_PACKAGES,
    LABELLED_TOPICS,
    TARGETS,
    labelled_default,
    training_pools_default,
)
from bakeoff.data.splits import normalise
from bakeoff.errors import DataError, FetchError


@pytest.fixture(scope="module")
def pools():
    return training_pools_default("smoke", TARGETS)


def texts(samples):
    return {normalise(sample.text) for sample in samples}


# To label -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["smoke", "demo"])
def test_labelled_texts_are_split_class_by_class_without_leaks(size):
    tasks = labelled_default(size)
    names = ["docstrings by package", "manual by topic"]
    assert [task.name for task in tasks] == names[: 1 if size == "smoke" else 2]
    for task, classes in zip(tasks, (LABELLED_PACKAGES, LABELLED_TOPICS), strict=False):
        train, test = ([*map(normalise, part)] for part in (task.train_texts, task.test_texts))
        assert len({*train, *test}) == len(train) + len(test)
        n_train, n_test = Counter(task.train_labels), Counter(task.test_labels)
        assert set(n_train) == set(n_test)
        assert set(n_train) <= set(classes)
        assert len(n_train) == (4 if size == "smoke" else len(classes))
        for label, n in n_test.items():
            assert n == round(0.25 * (n + n_train[label]))
    if size == "smoke":
        assert len(tasks[0].train_texts) + len(tasks[0].test_texts) == 96


def test_labels_are_the_packages_that_the_docstrings_come_from():
    package_of = {pair.docstring: pair.package for pair in standard_library_pairs()}
    (task,) = labelled_default("smoke")
    for text, label in zip(task.train_texts, task.train_labels, strict=True):
        assert package_of[text] == label


def test_labelled_texts_are_the_same_every_time_and_follow_the_seed():
    assert labelled_default("smoke") == labelled_default("smoke")
    (first,), (other,) = labelled_default("smoke"), labelled_default("smoke", seed=1)
    assert first.train_texts != other.train_texts
    assert set(first.test_texts) != set(other.test_texts)


def test_small_sizes_are_part_of_larger_ones():
    (small,) = labelled_default("smoke")
    large = labelled_default("demo")[0]
    assert {*small.train_texts, *small.test_texts} <= {*large.train_texts, *large.test_texts}


def test_labelled_texts_need_no_network(monkeypatch):
    """They come with Python; only news and films are fetched."""

    def absent():
        raise FetchError("no network")

    monkeypatch.setattr(embedded_pools, "fetch_embedded", absent)
    assert labelled_default("smoke")
    with pytest.raises(FetchError, match="no network"):
        training_pools_default("smoke")


# To train on --------------------------------------------------------------------------------------


def test_no_target_is_in_anybodys_pool_or_among_its_own_queries(pools):
    kept = set().union(*(texts(pool.queries) | texts(pool.test) for pool in pools))
    assert len(kept) == sum(len(pool.queries) + len(pool.test) for pool in pools)
    for pool in pools:
        assert pool.samples == pools[0].samples
        assert kept.isdisjoint(texts(pool.samples))
        assert texts(pool.queries).isdisjoint(texts(pool.test))
    assert [pool.name for pool in pools] == [f"target {target}" for target in TARGETS]


def test_marks_are_the_source(pools):
    for pool, target in zip(pools, TARGETS, strict=True):
        sources = [sample.source for sample in pool.samples]
        assert pool.relevant.tolist() == [source == target for source in sources]
        assert {sample.source for sample in (*pool.queries, *pool.test)} == {target}
    assert set(sources) == {*TARGETS, "scrambled"}
    plain = [source for source in sources if source != "scrambled"]
    assert min(Counter(plain).values()) >= 40
    note = pools[0].notes[0]
    assert note.startswith(f"{len(sources):,} texts: ")
    for source, n in Counter(sources).items():
        assert f"{n:,} {source}" in note


def test_one_text_is_scrambled_for_five_and_one_repeated_for_ten(pools):
    samples = pools[0].samples
    counts = Counter((sample.source, sample.text) for sample in samples)
    plain = {text for source, text in counts if source != "scrambled"}
    assert len(plain) == 200  # 40 of each of five kinds
    repeated = [key for key, n in counts.items() if n > 1]
    assert len(repeated) == 20
    assert all(n <= 2 for n in counts.values())
    scrambled = [text for source, text in counts if source == "scrambled"]
    assert len(scrambled) == 40
    words = {tuple(sorted(text.split())) for text in plain}
    assert all(tuple(sorted(text.split())) in words for text in scrambled)
    assert sum(text in plain for text in scrambled) <= 2  # of the shortest, maybe
    assert not any(source == "scrambled" for source, _ in repeated)


def test_kinds_are_mixed(pools):
    """Neither end of the pool is of few kinds, so that ties by row favour none."""
    sources = [sample.source for sample in pools[0].samples]
    for part in (sources[:60], sources[-60:]):
        assert set(part) == set(sources)


def test_pools_are_the_same_every_time_and_follow_the_seed(pools):
    again = training_pools_default("smoke", TARGETS[::-1])[::-1]
    assert [pool.fingerprint() for pool in again] == [pool.fingerprint() for pool in pools]
    (other,) = training_pools_default("smoke", seed=1)
    assert texts(other.samples) != texts(pools[0].samples)
    assert texts(other.test) != texts(pools[0].test)


def test_passages_are_runs_of_words_without_a_short_rest():
    words = [f"w{i}" for i in range(25)]
    found = embedded_pools._passages(" ".join(words), 10)
    assert found == [" ".join(words[:10]), " ".join(words[10:20])]
    assert embedded_pools._passages(" ".join(words + words[:1]), 10)[-1] == " ".join(
        [*words[20:], "w0"]
    )
    assert embedded_pools._passages("too short", 10) == []


def test_wrong_sizes_and_targets_are_refused():
    with pytest.raises(DataError, match="size must be one of 'smoke', 'demo', 'full', got 'huge'"):
        labelled_default("huge")
    with pytest.raises(DataError, match=r"size must be one of .*, got 'huge'"):
        training_pools_default("huge")
    with pytest.raises(DataError, match=r"targets must be among manual, news, .*, got 'poems'"):
        training_pools_default("smoke", ["news", "poems"])
    assert training_pools_default("smoke", []) == ()
