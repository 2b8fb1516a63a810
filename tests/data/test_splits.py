"""The hash split: disjoint, stable, of the stated size (about 5 s)."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.data.splits import (
    hold_out,
    hold_out_by_label,
    linked_rows,
    normalise,
    position,
    runs,
    sample,
    without_near_copies,
    without_task_texts,
)
from bakeoff.data.tasks import ClassificationTask, ClusteringTask, RetrievalTask, TextPairs

few_words = st.text(alphabet="abcAB ", min_size=1, max_size=2)
rows_of_pairs = st.lists(st.tuples(few_words, few_words), min_size=1, max_size=30)


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_ascii_shortcut_agrees_with_the_general_rule(text):
    # A non-ASCII word forces the general path; the rest must come out the same.
    assert normalise(text + " é") == (normalise(text) + " é").strip()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Straße", "STRASSE"),
        ("ﬁne", "FINE"),
        ("cafe\u0301", "café"),
        ("a\u00a0 b", "A\tB\n"),
        ("Ａ", "a"),
    ],
)
def test_copies_are_recognised(one, other):
    assert normalise(one) == normalise(other)
    assert position(one, 3) == position(other, 3)


def test_positions_are_uniform_and_seeds_unrelated():
    from scipy.stats import kstest, pearsonr

    texts = [f"text {i}" for i in range(4000)]
    first, second = ([position(text, seed) for text in texts] for seed in (0, 1))
    assert kstest(first, "uniform").pvalue > 1e-3
    assert abs(pearsonr(first, second).statistic) < 0.06
    assert all(0 <= place < 1 for place in first)


@given(rows_of_pairs)
def test_links_are_the_transitive_closure_of_sharing_a_text(rows):
    linked = np.eye(len(rows), dtype=bool)
    for i, j in combinations(range(len(rows)), 2):
        shared = {normalise(t) for t in rows[i]} & {normalise(t) for t in rows[j]}
        linked[i, j] = linked[j, i] = bool(shared)
    for _ in rows:  # brute force: the path length doubles at every squaring, n squarings suffice
        linked = (linked.astype(int) @ linked.astype(int)) > 0
    groups = linked_rows(rows)
    np.testing.assert_array_equal(groups[:, None] == groups[None, :], linked)


@given(rows_of_pairs, st.floats(0.05, 0.95), st.integers(0, 5), st.integers(2, 10))
def test_no_text_is_on_both_sides_and_the_maximum_holds(rows, fraction, seed, maximum):
    held_out = hold_out(rows, fraction=fraction, seed=seed, maximum=maximum)
    sides = {side: set() for side in (True, False)}
    for row, side in zip(rows, held_out.tolist(), strict=True):
        sides[side].update(map(normalise, row))
    assert sides[True].isdisjoint(sides[False])
    assert held_out.sum() <= min(maximum, max(2, round(fraction * len(rows))))


@given(st.integers(2, 60), st.floats(0.05, 0.95), st.integers(0, 100))
def test_distinct_rows_are_held_out_in_exactly_the_stated_number(n, fraction, seed):
    rows = [(f"query {i}", f"answer {i}") for i in range(n)]
    assert hold_out(rows, fraction=fraction, seed=seed).sum() == max(2, round(fraction * n))


@settings(deadline=None)
@given(st.integers(10, 60), st.integers(0, 20), st.floats(0.1, 0.9), st.integers(0, 9))
def test_appended_rows_move_at_most_as_many_old_ones(n, n_new, fraction, seed):
    rows = [(f"query {i}", f"answer {i}") for i in range(n + n_new)]
    before = hold_out(rows[:n], fraction=fraction, seed=seed)
    after = hold_out(rows, fraction=fraction, seed=seed)[:n]
    assert (before != after).sum() <= n_new


@given(rows_of_pairs, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows, random):
    rows = list(dict.fromkeys(rows))
    shuffled = random.sample(rows, len(rows))
    sides = dict(zip(rows, hold_out(rows, fraction=0.3, seed=1).tolist(), strict=True))
    # Rows are distinct, but groups are not of one size: passing over must not depend on order.
    assert sides == dict(
        zip(shuffled, hold_out(shuffled, fraction=0.3, seed=1).tolist(), strict=True)
    )


def test_group_size_does_not_decide_which_group_is_held_out():
    # 40 groups of 5 rows and 40 single rows: over seeds, both kinds must be held out alike often.
    rows = [(f"shared {i}", f"answer {i} {j}") for i in range(40) for j in range(5)]
    rows += [(f"alone {i}", f"single {i}") for i in range(40)]
    rates = np.mean([hold_out(rows, fraction=0.5, seed=seed) for seed in range(60)], axis=0)
    assert rates[:200].mean() == pytest.approx(0.5, abs=0.04)
    assert rates[200:].mean() == pytest.approx(0.5, abs=0.04)


def test_a_group_of_more_than_half_the_test_set_stays_in_training():
    # 10 rows are wanted of 100: a group of 6 is never among them, a group of 5 sometimes.
    rows = [(f"alone {i}", f"answer {i}") for i in range(89)]
    rows += [("five", f"five {i}") for i in range(5)] + [("six", f"six {i}") for i in range(6)]
    splits = np.array([hold_out(rows, fraction=0.1, seed=seed) for seed in range(100)])
    assert not splits[:, 94:].any()
    assert splits[:, 89:94].any()
    assert (splits.sum(axis=1) == 10).all()


def test_a_file_that_is_one_group_yields_nothing():
    assert not hold_out([("same", f"answer {i}") for i in range(50)], fraction=0.2, seed=0).any()


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_each_class_is_split_alike(labels, fraction):
    texts = [f"text {i}" for i in range(len(labels))]
    held_out = hold_out_by_label(texts, labels, fraction=fraction, seed=0)
    for label in set(labels):
        of_class = held_out[np.array(labels) == label]
        n = len(of_class)
        expected = 0 if n == 1 else min(max(1, round(fraction * n)), n - 1)
        assert of_class.sum() == expected


def test_the_maximum_lowers_the_fraction_of_every_class():
    labels = ["a"] * 800 + ["b"] * 200
    held_out = hold_out_by_label(
        [f"text {i}" for i in range(1000)], labels, fraction=0.5, seed=0, maximum=100
    )
    assert (held_out[:800].sum(), held_out[800:].sum()) == (80, 20)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        hold_out([("a", "b")], fraction=fraction, seed=0)
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        hold_out_by_label(["a"], ["b"], fraction=fraction, seed=0)


@given(st.lists(st.text(max_size=3), max_size=40), st.integers(0, 40), st.integers(0, 9))
def test_samples_are_the_lowest_positions_in_given_order(items, n, seed):
    chosen = sample(iter(items), n, seed, key=str)
    ranked = sorted(range(len(items)), key=lambda i: (position(items[i], seed), i))[:n]
    assert chosen == [items[i] for i in sorted(ranked)]
    assert sample(items, None, seed, key=str) == items


def test_rows_with_task_texts_are_taken_out_of_training():
    train = TextPairs(
        ("q0", "q1", "q2", "q3", "q4"),
        ("p0", "p1", "p2", "p3", "p4"),
        ("n0", "n1", "n2", "n3", "n4"),
        "g",
    )
    tasks = [
        RetrievalTask("r", ("Q1 ",), ("P2",), np.array([0])),
        ClusteringTask("c", ("N3",), ("x",)),
        ClassificationTask("k", ("other",), ("x",), ("another",), ("y",)),
    ]
    kept, n_removed = without_task_texts([train], tasks)
    assert kept == (TextPairs(("q0", "q4"), ("p0", "p4"), ("n0", "n4"), "g"),)
    assert n_removed == 3
    assert without_task_texts([train], [ClusteringTask("c", train.queries, ("x",) * 5)]) == ((), 5)


def test_near_copies_are_taken_out_by_shared_runs_of_words():
    text = "one two three four five"
    train = TextPairs((text, text), ("a b", "zero, ONE two; three four!"), group="g")
    task = ClusteringTask("c", ("zero one two three four",), ("x",))
    assert without_near_copies([train], [task], n_words=5)[0][0].positives == ("a b",)
    assert without_near_copies([train], [task], n_words=4) == ((), 2)
    assert runs("one two", 3) == set()
