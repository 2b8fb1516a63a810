"""The whole tree against another enumeration, and its walker against the real one."""

import math
import re

import numpy as np
import pytest
from scipy import stats
from tests.decoding.test_grammar import letter_tokenizer
from tests.decoding.test_grammar_aligned import (
    ENDS,
    LIMIT,
    PATTERN,
    PROMPT,
    WIDTH,
    Exact,
    tiny_model,
)

from bakeoff.decoding.alignment_trie import AlignmentTrie
from bakeoff.decoding.grammar import Grammar, GrammarConstraint
from bakeoff.decoding.grammar_aligned import Warping, walker_for
from bakeoff.decoding.language_tree import LanguageTree, TreeBounds, TreeWalker
from bakeoff.errors import DataError
from bakeoff.models.inference import evaluating

METHODS = ["asap", "gcd", "rejection", "adaptive"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


def constraint_of(pattern, tokenizer):
    return GrammarConstraint(Grammar.regex(pattern), tokenizer, vocab_size=WIDTH, eos_token_id=ENDS)


def tree_of(model, tokenizer, pattern=PATTERN, warp=None, limit=LIMIT):
    tree = LanguageTree.of(
        constraint_of(pattern, tokenizer), ENDS, max_new_tokens=limit, max_prefixes=10_000
    )
    tree.score(model, PROMPT, warp or Warping())
    return tree


def texts_of(tree):
    return [tuple(tree.token[tree.path(leaf)[1:]].tolist()) for leaf in tree.leaves]


# Texts that a limit cuts off, and beginnings after which nothing is in time.
@pytest.mark.parametrize("pattern", [PATTERN, "[abc01]*", "a[01]*|(bc){1,3}"])
def test_probabilities_are_those_of_another_enumeration(model, tokenizer, pattern):
    tree, exact = tree_of(model, tokenizer, pattern), Exact(model, pattern)
    texts = texts_of(tree)
    found = dict(zip(texts, tree.log_probs, strict=True))
    assert set(found) == set(exact.log_p)
    for text, log_p in exact.log_p.items():
        assert found[text] == pytest.approx(log_p, abs=1e-4)
        assert texts[tree.leaf(text)] == text
    assert math.exp(tree.log_z) == pytest.approx(exact.z, rel=1e-4)
    for text, log_q in zip(texts, tree.target(), strict=True):
        assert math.exp(log_q) == pytest.approx(exact.q[text], rel=1e-3)


def test_masking_is_the_closed_form(model, tokenizer):
    tree, exact = tree_of(model, tokenizer), Exact(model)
    masked = exact.masked()
    for text, log_q in zip(texts_of(tree), tree.masked(), strict=True):
        assert math.exp(log_q) == pytest.approx(masked[text], rel=1e-3)
    kl = sum(p * math.log(p / exact.q[text]) for text, p in masked.items())
    assert tree.divergence(tree.masked()) == pytest.approx(kl, rel=1e-3)
    assert tree.total_variation(tree.masked()) == pytest.approx(exact.distance(masked), rel=1e-3)
    mean = sum(p * exact.log_p[text] for text, p in masked.items())
    assert tree.mean_log_prob(tree.masked()) == pytest.approx(mean, rel=1e-4)


def test_what_masking_cannot_finish_in_time_is_left_out(model, tokenizer):
    """Drawn 4,000 times: the frequencies of what was finished are the computed ones."""
    tree = tree_of(model, tokenizer, "[abc]{2,}", limit=4)
    walker = TreeWalker(tree, AlignmentTrie(), np.random.default_rng(1))
    counts = np.zeros(len(tree.leaves))
    n_cut = 0
    for _ in range(4000):
        attempt = walker.attempt("gcd")
        if attempt.outcome == "accepted":
            counts[tree.leaf(attempt.tokens)] += 1
        else:
            n_cut += 1
    assert n_cut > 100
    expected = np.exp(tree.masked()) * counts.sum()
    rare = expected < 5
    cells = [np.append(each[~rare], each[rare].sum()) for each in (counts, expected)]
    assert stats.chisquare(*cells).pvalue > 0.01
    wrong = np.exp(tree.target()) * counts.sum()
    cells[1] = np.append(wrong[~rare], wrong[rare].sum())
    assert stats.chisquare(*cells).pvalue < 1e-6


def test_bounds_of_a_trie_give_the_next_distribution(model, tokenizer):
    tree, exact = tree_of(model, tokenizer), Exact(model)
    trie = AlignmentTrie()
    walker, bounds = TreeWalker(tree, trie, np.random.default_rng(3)), TreeBounds(tree)
    np.testing.assert_allclose(tree.aligned(bounds.log_bounds), tree.masked(), atol=1e-9)
    for _ in range(60):
        attempt = walker.attempt("asap")
        bounds.follow(trie, attempt.tokens)
        aligned = exact.aligned(trie)
        for text, log_q in zip(texts_of(tree), tree.aligned(bounds.log_bounds), strict=True):
            assert math.exp(log_q) == pytest.approx(aligned[text], rel=1e-3, abs=1e-9)
    assert tree.divergence(tree.aligned(bounds.log_bounds)) < 0.5 * tree.divergence(tree.masked())


def test_the_proposal_at_that_time_is_what_the_walker_says(model, tokenizer):
    tree = tree_of(model, tokenizer)
    trie = AlignmentTrie()
    walker, bounds = TreeWalker(tree, trie, np.random.default_rng(4)), TreeBounds(tree)
    for _ in range(40):
        before = tree.aligned(bounds.log_bounds)
        attempt = walker.attempt("asap")
        assert attempt.log_proposal == pytest.approx(before[tree.leaf(attempt.tokens)], abs=1e-9)
        bounds.follow(trie, attempt.tokens)


def test_accepted_texts_of_adaptive_rejection_are_from_the_target_at_any_time(model, tokenizer):
    tree = tree_of(model, tokenizer)
    trie = AlignmentTrie()
    walker, bounds = TreeWalker(tree, trie, np.random.default_rng(5)), TreeBounds(tree)
    for _ in range(50):
        exact = tree.adaptive(bounds.log_bounds, bounds.seen)
        np.testing.assert_allclose(exact, tree.target(), atol=1e-9)
        bounds.follow(trie, walker.attempt("adaptive").tokens)
    assert bounds.seen.sum() > 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [PATTERN, "[abc01]*"])
def test_the_walker_draws_what_the_real_one_draws(model, tokenizer, method, pattern):
    tree = tree_of(model, tokenizer, pattern)
    known = TreeWalker(tree, AlignmentTrie(), np.random.default_rng(6))
    real = walker_for(
        model,
        tokenizer,
        PROMPT,
        Grammar.regex(pattern),
        max_new_tokens=LIMIT,
        warp=Warping(),
        random=np.random.default_rng(6),
    )
    for _ in range(60):
        with evaluating(model):
            mine, theirs = known.attempt(method), real.attempt(method)
        assert (mine.outcome, mine.tokens) == (theirs.outcome, theirs.tokens)
        assert mine.log_proposal == pytest.approx(theirs.log_proposal, abs=1e-4)
    assert known.reader.n_calls == real.reader.n_calls
    assert known.trie.log_z_upper == pytest.approx(real.trie.log_z_upper, abs=1e-4)


@pytest.mark.parametrize("warp", [Warping(1.7), Warping(top_k=6)])
def test_warping_comes_first(model, tokenizer, warp):
    tree = tree_of(model, tokenizer, warp=warp)
    if warp.top_k:
        assert (tree.log_p == -np.inf).any()
        for log_q in (tree.masked(), tree.target()):
            assert np.exp(log_q).sum() == pytest.approx(1)
        walker = TreeWalker(tree, AlignmentTrie(), np.random.default_rng(0))
        assert all(np.isfinite(walker.attempt("gcd").log_prob) for _ in range(50))
    else:
        exact = Exact(model, temperature=warp.temperature)
        assert math.exp(tree.log_z) == pytest.approx(exact.z, rel=1e-4)


def test_models_whose_states_cannot_be_cut_give_the_same(model, tokenizer, monkeypatch):
    from bakeoff.decoding import language_tree

    usual = tree_of(model, tokenizer)
    monkeypatch.setattr(language_tree, "states_can_be_cut", lambda model: False)
    np.testing.assert_allclose(tree_of(model, tokenizer).log_p, usual.log_p, atol=1e-4)
    monkeypatch.setattr(language_tree, "_MOST_ROWS", 1)
    np.testing.assert_allclose(tree_of(model, tokenizer).log_p, usual.log_p, atol=1e-4)


def test_files_hold_all_of_it(model, tokenizer, tmp_path):
    tree = tree_of(model, tokenizer, "[abc01]*")
    tree.save(tmp_path / "tree.safetensors")
    again = LanguageTree.load(tmp_path / "tree.safetensors")
    np.testing.assert_array_equal(again.masked(), tree.masked())
    assert texts_of(again) == texts_of(tree)
    assert again.max_new_tokens == LIMIT


def test_large_languages_are_left_alone_and_empty_ones_refused(tokenizer):
    of = LanguageTree.of
    large = constraint_of("[abc01]*", tokenizer)
    assert of(large, ENDS, max_new_tokens=30, max_prefixes=500) is None
    late = constraint_of("[01]{6}", tokenizer)
    with pytest.raises(DataError, match=r"max_new_tokens=5: all its 31 beginnings"):
        of(late, ENDS, max_new_tokens=5, max_prefixes=500)
    with pytest.raises(DataError, match="token 4 is not legal here"):
        of(late, ENDS, max_new_tokens=9, max_prefixes=500).child(0, 4)
    small = of(constraint_of("0[01]", tokenizer), ENDS, max_new_tokens=5, max_prefixes=4)
    assert len(small) == 4 + 2 * len(ENDS)
    assert of(constraint_of("0[01]", tokenizer), ENDS, max_new_tokens=5, max_prefixes=3) is None
    assert re.fullmatch("0[01]", "01")
