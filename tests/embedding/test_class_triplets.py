"""Triplets from classes: properties that hold for any labels, and counts by chance. About 1 s."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.embedding import ClassTriplets
from bakeoff.embedding.training import negatives_of
from bakeoff.errors import DataError

LABELS = ["a"] * 3 + ["b"] * 4 + ["c"] * 5
TEXTS = [f"{label}{i}" for i, label in enumerate(LABELS)]


@settings(max_examples=50, deadline=None)
@given(
    classes=st.lists(st.integers(2, 8), min_size=2, max_size=5),
    mode=st.sampled_from(["example", "label"]),
    num_negatives=st.integers(1, 3),
    seed=st.integers(0, 1000),
    shared=st.booleans(),
)
def test_positives_share_the_class_and_negatives_do_not(classes, mode, num_negatives, seed, shared):
    labels = [f"class {c}" for c, size in enumerate(classes) for _ in range(size)]
    texts = [f"text {i}" for i in range(len(labels))]
    if shared:  # a text that stands in two classes
        texts[-1] = texts[0]
    members = {
        label: {t for t, x in zip(texts, labels, strict=True) if x == label} for label in labels
    }
    triplets = ClassTriplets(labels, texts, mode=mode)
    fewest = (
        min(len(set(texts) - members[label]) for label in members)
        if mode == "example"
        else len(members) - 1
    )
    if fewest < num_negatives:
        with pytest.raises(DataError, match=f"num_negatives={num_negatives}"):
            triplets.pairs(seed, num_negatives)
        return
    pairs = triplets.pairs(seed, num_negatives)
    assert pairs == triplets.pairs(seed, num_negatives)
    assert pairs.queries == tuple(texts)
    rows = zip(texts, labels, pairs.positives, negatives_of(pairs), strict=True)
    for text, label, positive, negatives in rows:
        assert len(set(negatives)) == len(negatives) == num_negatives
        if mode == "example":
            assert positive in members[label] - {text}
            assert not set(negatives) & members[label]
            assert all(any(n in members[other] for other in labels) for n in negatives)
        else:
            assert positive == label
            assert set(negatives) <= set(labels) - {label}


def test_draws_are_uniform():
    positives, negatives = Counter(), Counter()
    triplets = ClassTriplets(LABELS, TEXTS)
    for seed in range(3000):
        pairs = triplets.pairs(seed)
        positives[pairs.positives[0]] += 1
        negatives[pairs.negatives[0]] += 1
    assert set(positives) == {"a1", "a2"}
    assert positives["a1"] == pytest.approx(1500, abs=4 * (3000 * 0.25) ** 0.5)
    assert len(negatives) == 9
    for count in negatives.values():
        assert count == pytest.approx(3000 / 9, abs=4 * (3000 * 8 / 81) ** 0.5)


def test_seeds_differ():
    triplets = ClassTriplets(LABELS, TEXTS)
    assert triplets.pairs(0).positives != triplets.pairs(1).positives


def test_bad_input():
    with pytest.raises(DataError, match="2 labels for 1 texts"):
        ClassTriplets(["a", "b"], ["x"])
    with pytest.raises(ValueError, match="mode must be"):
        ClassTriplets(["a", "b"], ["x", "y"], mode="examples")
    with pytest.raises(DataError, match="at least two classes"):
        ClassTriplets(["a", "a"], ["x", "y"])
    with pytest.raises(DataError, match=r"1 classes have one: \['b'\]"):
        ClassTriplets(["a", "a", "b", "b"], ["x", "y", "z", "z"])
    ClassTriplets(["a", "a", "b"], ["x", "y", "z"], mode="label")
    with pytest.raises(DataError, match="num_negatives=2, but class 'a' has only 1 labels"):
        ClassTriplets(["a", "b"], ["x", "y"], mode="label").pairs(0, num_negatives=2)
    with pytest.raises(DataError, match="num_negatives=8, but class 'c' has only 7 texts"):
        ClassTriplets(LABELS, TEXTS).pairs(0, num_negatives=8)
    with pytest.raises(ValueError, match="num_negatives must be at least 1"):
        ClassTriplets(LABELS, TEXTS).pairs(0, num_negatives=0)
