"""DSIR against a closed form, the released package's numbers, and exact enumeration."""

import itertools
import json
import pickle

import numpy as np
import pytest
from sklearn.base import clone

from bakeoff.data.samples import Sample
from bakeoff.errors import DataError
from bakeoff.selection import importance_resampling
from bakeoff.selection.importance_resampling import ImportanceResampler, gumbel_top_k

POOL = [
    "The cat sat on the mat; the dog didn't.",
    "Stocks fell 3.5% today, and bond yields rose!",
    "A cat and a dog ran under the red tree.",
    "",
    "café Straße 東京 — naïve façade",
    "cat",
]
TARGET = ["the dog and the cat", "a red cat sat under the tree"]
# What HashedNgramDSIR(ngrams, num_buckets) of data-selection 1.0.3 makes of the above.
RELEASED = {
    (2, 10_000): [
        -215.13954551406601,
        -336.5081441441869,
        -145.3066202422934,
        0.0,
        -154.02025062770966,
        0.9223328796634833,
    ],
    (3, 64): [
        -234.7954647930453,
        -341.32588265445906,
        -127.21013941636835,
        0.0,
        -146.35372978380343,
        0.2708749074687411,
    ],
    (1, 70_000): [
        -97.72001416348135,
        -176.13037489217265,
        -22.143785657696576,
        0.0,
        -87.81894930020405,
        0.8938177893554389,
    ],
}


class Stream:
    """Texts that are made anew each time they are read."""

    def __init__(self, texts):
        self.texts = texts
        self.opened = 0

    def __iter__(self):
        self.opened += 1
        yield from self.texts


def word_salad(n, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(200)]
    return [" ".join(rng.choice(words, rng.integers(1, longest))) for _ in range(n)]


@pytest.mark.parametrize(("ngrams", "n_buckets"), RELEASED)
def test_weights_are_those_of_the_released_package(ngrams, n_buckets):
    resampler = ImportanceResampler(2, n_buckets=n_buckets, ngrams=ngrams, random_state=0)
    resampler.fit(POOL, queries=TARGET)
    np.testing.assert_allclose(resampler.log_weights_, RELEASED[ngrams, n_buckets], rtol=1e-12)


def test_weights_are_those_of_the_installed_package(tmp_path):
    """The same on 200 random texts, where the package can be imported."""
    package = pytest.importorskip("data_selection.hashed_ngram_dsir")
    pool, target = word_salad(200), word_salad(20, seed=1)
    for name, texts in (("pool", pool), ("target", target)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    theirs = package.HashedNgramDSIR(
        [str(tmp_path / "pool.jsonl")],
        [str(tmp_path / "target.jsonl")],
        str(tmp_path / "cache"),
        num_proc=1,
    )
    theirs.fit_importance_estimator()
    theirs.compute_importance_weights()
    expected = np.load(tmp_path / "cache" / "log_importance_weights" / "0.npy")
    ours = ImportanceResampler(5).fit(pool, queries=target).log_weights_
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-9)


def test_two_words_in_closed_form():
    # Target: 3 of 4 words are "a". Pool: 2 of 6. So log(p/q) is log(9/4) for "a", log(3/8) for "b".
    resampler = ImportanceResampler(1, ngrams=1, smoothing=1e-15, random_state=0)
    resampler.fit(["a b b", "b b", "a"], queries=["a a", "a b"])
    a, b = np.log(9 / 4), np.log(3 / 8)
    np.testing.assert_allclose(resampler.log_weights_, [a + 2 * b, 2 * b, a], rtol=1e-12)
    resampler.set_params(adjust_length=True).fit(["a b b", "b b", "a"], queries=["a a", "a b"])
    np.testing.assert_allclose(
        resampler.log_weights_, [2 / 3 * (a + 2 * b), 2 * b, 2 * a], rtol=1e-12
    )


def exact_orders(weights, k):
    """The probability of every ordered draw of k without replacement."""
    found = {}
    for order in itertools.permutations(range(len(weights)), k):
        left, probability = sum(weights), 1.0
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        found[order] = probability
    return found


def test_gumbel_top_k_has_the_law_of_drawing_one_by_one():
    weights = [1.0, 2.0, 3.0, 10.0]
    expected = exact_orders(weights, 2)
    assert sum(expected.values()) == pytest.approx(1)
    rng = np.random.default_rng(0)
    draws = 40_000
    counts = dict.fromkeys(expected, 0)
    for _ in range(draws):
        counts[tuple(gumbel_top_k(np.log(weights), 2, random_state=rng).tolist())] += 1
    # Chi-square over the 12 ordered pairs: 11 degrees of freedom, 99.9 % quantile 31.3.
    statistic = sum((counts[o] - draws * p) ** 2 / (draws * p) for o, p in expected.items())
    assert statistic < 31.3
    # The textbook's inclusion probabilities, which ranking by weight / Gumbel mistakes change.
    for item in range(4):
        share = sum(count for order, count in counts.items() if item in order) / draws
        exact = sum(p for order, p in expected.items() if item in order)
        assert abs(share - exact) < 4 * np.sqrt(exact * (1 - exact) / draws)


def test_a_selector_draws_by_its_weights():
    pool = ["a", "b", "a a", "c"]
    fitted = ImportanceResampler(2, ngrams=1, random_state=0).fit(pool, queries=["a b c c"])
    expected = exact_orders(np.exp(fitted.log_weights_).tolist(), 2)
    draws = 4000
    counts = dict.fromkeys(expected, 0)
    for seed in range(draws):
        fitted.set_params(random_state=seed).fit(pool, queries=["a b c c"])
        counts[tuple(fitted.selected_indices_.tolist())] += 1
    statistic = sum((counts[o] - draws * p) ** 2 / (draws * p) for o, p in expected.items())
    assert statistic < 31.3


def test_minus_infinity_is_never_drawn():
    for seed in range(50):
        assert 1 not in gumbel_top_k([0.0, -np.inf, -3.0], 2, random_state=seed)


@pytest.mark.parametrize(
    ("weights", "k", "message"),
    [
        ([0.0, np.nan], 1, "NaN"),
        ([0.0, np.inf], 1, "plus infinity"),
        ([0.0, -np.inf], 2, "between 1 and 1.*got 2"),
        ([0.0, 1.0], 0, "between 1 and 2.*got 0"),
        ([0.0, 1.0], 1.5, "got 1.5"),
        ([[0.0]], 1, "one dimension"),
    ],
)
def test_bad_draws_are_refused(weights, k, message):
    with pytest.raises(DataError, match=message):
        gumbel_top_k(weights, k)


def test_a_stream_gives_the_same_whatever_is_kept_in_memory(monkeypatch):
    pool, target = word_salad(1300), word_salad(5, seed=1)
    expected = ImportanceResampler(50, random_state=3).fit(pool, queries=target)
    for kept, block in ((0, 512), (20_000, 7), (2**30, 100)):
        monkeypatch.setattr(importance_resampling, "_KEPT_BYTES", kept)
        monkeypatch.setattr(importance_resampling, "_BLOCK", block)
        monkeypatch.setattr(importance_resampling, "_REMEMBERED", kept)
        stream = Stream(pool)
        found = ImportanceResampler(50, random_state=3).fit(stream, queries=iter(target))
        np.testing.assert_allclose(found.log_weights_, expected.log_weights_, rtol=1e-12)
        assert found.selected_indices_.tolist() == expected.selected_indices_.tolist()
        assert stream.opened == (1 if kept == 2**30 else 2)
    again = list(expected.log_weights(iter(pool)))
    np.testing.assert_allclose(again, expected.log_weights_, rtol=1e-12)


def test_further_texts_are_scored_lazily():
    fitted = ImportanceResampler(1, adjust_length=True).fit(POOL, queries=TARGET)
    endless = fitted.log_weights(itertools.cycle(POOL))
    first = list(itertools.islice(endless, 2 * len(POOL)))
    np.testing.assert_allclose(first, [*fitted.log_weights_, *fitted.log_weights_], rtol=1e-12)


def test_empty_and_short_texts_and_labelled_rows_are_not_picked():
    pool = ["", "the cat", "stocks and bonds fell", "the cat and the dog sat"]
    fitted = ImportanceResampler(3, random_state=0).fit(pool, queries=["the cat"])
    assert sorted(fitted.selected_indices_) == [1, 2, 3]
    fitted = ImportanceResampler(2, min_words=3, random_state=0).fit(pool, queries=["the cat"])
    assert sorted(fitted.selected_indices_) == [2, 3]
    fitted = ImportanceResampler(2, random_state=0)
    fitted.fit(pool, queries=["the cat"], already_labeled=[1])
    assert sorted(fitted.selected_indices_) == [2, 3]
    np.testing.assert_array_equal(fitted.n_words_, [0, 2, 4, 6])
    with pytest.raises(DataError, match=r"between 1 and 1.*min_words=5"):
        ImportanceResampler(2, min_words=5).fit(pool, queries=["the cat"])


def test_without_noise_the_largest_weights_are_taken_in_order():
    fitted = ImportanceResampler(3, noise=False).fit(word_salad(50), queries=word_salad(3, seed=2))
    weights = fitted.log_weights_
    assert fitted.selected_indices_.tolist() == np.argsort(-weights, kind="stable")[:3].tolist()
    assert fitted.reasons()[0] == f"log weight {weights.max():.1f}, 1 of 50"


def test_sums_follow_length_and_adjusted_weights_do_not():
    pool, queries = word_salad(400, longest=60), word_salad(20, seed=1, longest=60)
    correlation = {}
    for adjust in (False, True):
        fitted = ImportanceResampler(1, adjust_length=adjust).fit(pool, queries=queries)
        long = fitted.n_words_ >= 10  # means over fewer words are mostly chance
        correlation[adjust] = np.corrcoef(fitted.log_weights_[long], fitted.n_words_[long])[0, 1]
    assert correlation[False] < -0.9
    assert abs(correlation[True]) < 0.3


def test_conventions():
    resampler = ImportanceResampler(4, random_state=1)
    pool, target = word_salad(40), word_salad(3, seed=1)
    first = resampler.fit(pool, queries=target).selected_indices_
    assert first.dtype == np.int64
    assert len(set(first.tolist())) == 4
    assert clone(resampler).fit(pool, queries=target).selected_indices_.tolist() == first.tolist()
    assert resampler.select(pool, queries=target).tolist() == first.tolist()
    assert resampler.select(pool, 7, queries=target)[:4].tolist() == first.tolist()
    loaded = pickle.loads(pickle.dumps(resampler))
    assert loaded.reasons() == resampler.reasons()
    samples = [Sample(text) for text in pool]
    assert resampler.select(samples, queries=map(Sample, target)).tolist() == first.tolist()
    seen = []
    resampler.fit(pool, queries=target, progress=lambda *done: seen.append(done))
    assert seen == [(40, 80), (80, 80)]


class Shrinking(Stream):
    def __iter__(self):
        self.opened += 1
        yield from self.texts[: 3 if self.opened == 1 else 1]


@pytest.mark.parametrize(
    ("parameters", "X", "queries", "message"),
    [
        ({}, iter(["a"]), ["a"], "X must be texts that can be iterated over twice"),
        ({}, "one string", ["a"], "X must be texts.*got str"),
        ({}, ["a", 3], ["a"], "X must be texts or samples.*got int in row 1"),
        ({}, ["", " "], ["a"], "X must hold at least one text with a word"),
        ({}, ["a"], None, "queries must be texts.*got none"),
        ({}, ["a"], "a", "queries must be texts.*got one string"),
        ({}, ["a"], [" "], "queries must hold at least one text with a word"),
        ({}, ["a"], [b"a"], "queries must be texts.*got bytes in row 0"),
        ({"n_select": 3}, ["a", "b"], ["a"], "n_select must be between 1 and 2"),
        ({"n_buckets": 0}, ["a"], ["a"], "n_buckets must be an integer of at least 1, got 0"),
        ({"n_buckets": 2**40}, ["a"], ["a"], "n_buckets must be at most"),
        ({"ngrams": 1.5}, ["a"], ["a"], "ngrams must be an integer of at least 1, got 1.5"),
        ({"smoothing": 0}, ["a"], ["a"], "smoothing must be between 0 and 1, got 0"),
        ({"random_state": "x"}, ["a"], ["a"], "random_state must be an integer.*got 'x'"),
    ],
)
def test_bad_input_is_named(parameters, X, queries, message):
    with pytest.raises(DataError, match=message):
        ImportanceResampler(**{"n_select": 1, **parameters}).fit(X, queries=queries)


def test_a_pool_that_changes_is_refused(monkeypatch):
    monkeypatch.setattr(importance_resampling, "_KEPT_BYTES", 0)
    with pytest.raises(DataError, match="3 texts when it was read first and 1 when"):
        ImportanceResampler(1).fit(Shrinking(["a", "b", "c"]), queries=["a"])
