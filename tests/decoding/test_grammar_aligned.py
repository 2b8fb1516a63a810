"""Samplers against the exactly enumerated distribution, the official trie, and `generate`."""

import inspect
import itertools
import re

import numpy as np
import pytest
import torch
from scipy import stats
from tests.decoding.test_grammar import letter_tokenizer
from tests.models import tiny

from bakeoff.decoding.alignment_trie import AlignmentTrie, ByteLRU, log_sum
from bakeoff.decoding.grammar import Grammar, GrammarConstraint
from bakeoff.decoding.grammar_aligned import (
    Following,
    GrammarAlignedLogitsProcessor,
    Warping,
    _Numbers,
    _Walk,
    model_fingerprint,
    sample_aligned,
    walker_for,
)
from bakeoff.decoding.prefix_reader import PrefixReader
from bakeoff.errors import DataError

# "a" leads almost nowhere, as in the paper's skewed example: masking over-draws it.
PATTERN = "ab00|(b|c)[abc]?[01]?"
PIECES = {4: "a", 5: "b", 6: "ab", 7: "c", 8: "0", 9: "1"}
PROMPT = [1, 5, 7, 4]
LIMIT = 5
ENDS = (2, 3)
WIDTH = 12


LATIN = [*range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x130)]


def tiny_model(seed=0, kind="llama", **changes):
    import transformers

    classes = {"llama": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM"}
    torch.manual_seed(seed)
    settings = {"vocab_size": WIDTH, "initializer_range": 0.2, **changes}
    model = getattr(transformers, classes[kind])(tiny.config(kind, **settings)).eval()
    model.generation_config.eos_token_id = list(ENDS)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


class Exact:
    """The target by enumeration: every token sequence, and Python's own regular expressions."""

    def __init__(self, model, pattern=PATTERN, temperature=1.0):
        sequences = [w for n in range(LIMIT) for w in itertools.product(PIECES, repeat=n)]
        texts = [w for w in sequences if re.fullmatch(pattern, "".join(map(PIECES.get, w)))]
        self.step = {}  # live prefix -> log-probabilities of what follows
        for length in range(LIMIT):
            prefixes = sorted({w[:length] for w in texts if len(w) >= length})
            if prefixes:
                rows = torch.tensor([PROMPT + list(prefix) for prefix in prefixes])
                with torch.no_grad():
                    logits = model(rows).logits[:, -1].double() / temperature
                values = torch.log_softmax(logits, -1).numpy()
                self.step.update(zip(prefixes, values, strict=True))
        self.log_p = {}
        for text in texts:
            above = sum(self.step[text[:i]][token] for i, token in enumerate(text))
            for end in ENDS:
                self.log_p[(*text, end)] = above + self.step[text][end]
        self.z = sum(np.exp(value) for value in self.log_p.values())
        self.live = {w[:i] for w in self.log_p for i in range(len(w) + 1)}
        self.q = {w: np.exp(value) / self.z for w, value in self.log_p.items()}

    def future(self, prefix):
        """Return c: the probability of legal texts given that they begin with `prefix`."""
        found = [w for w in self.log_p if w[: len(prefix)] == prefix]
        above = sum(self.step[prefix[:i]][token] for i, token in enumerate(prefix))
        return sum(np.exp(self.log_p[w] - above) for w in found)

    def masked(self):
        """Return the distribution of step-by-step masking."""
        out = {}
        for w in self.log_p:
            out[w] = 1.0
            for i, token in enumerate(w):
                p = np.exp(self.step[w[:i]])
                legal = {u[i] for u in self.live if len(u) > i and u[:i] == w[:i]}
                out[w] *= p[token] / sum(p[v] for v in legal)
        return out

    def aligned(self, trie):
        """Return the distribution of ASAp's next sample, given its bounds."""
        out = {}
        for w in self.log_p:
            out[w] = 1.0
            for i, token in enumerate(w):
                p = np.exp(self.step[w[:i]])
                mass = {
                    u[i]: p[u[i]] * np.exp(trie.log_bound(u))
                    for u in self.live
                    if len(u) == i + 1 and u[:i] == w[:i]
                }
                out[w] *= mass[token] / sum(mass.values())
        return out

    def distance(self, other):
        """Return the total variation between a distribution and the target."""
        return 0.5 * sum(abs(other.get(w, 0.0) - q) for w, q in self.q.items())

    def p_value(self, samples):
        """Return the p-value of Pearson's test that the samples are from the target."""
        order = sorted(self.q, key=self.q.get)
        counts = np.array([samples.count(w) for w in order])
        assert counts.sum() == len(samples)
        expected = np.array([self.q[w] for w in order]) * len(samples)
        # Rare sequences are counted together, so that every cell expects at least 5.
        cut = int(np.searchsorted(np.cumsum(expected), 5)) + 1
        counts = np.append(counts[cut:], counts[:cut].sum())
        expected = np.append(expected[cut:], expected[:cut].sum())
        return stats.chisquare(counts, expected).pvalue


@pytest.fixture(scope="module")
def exact(model):
    return Exact(model)


def draw(model, tokenizer, n=400, **settings):
    settings = {"grammar": Grammar.regex(PATTERN), "max_new_tokens": LIMIT, **settings}
    return sample_aligned(model, tokenizer, PROMPT, n=n, **settings)


# The target ---------------------------------------------------------------------------------------


def test_the_example_is_one_where_masking_goes_wrong(exact):
    assert 0.001 < exact.z < 0.2
    assert len(exact.q) == 2 * (2 + 2 * 4 * 3)  # ends, spellings of ab00, and the rest
    assert exact.distance(exact.masked()) > 0.3


@pytest.mark.parametrize("method", ["rejection", "adaptive"])
def test_exact_methods_pass_the_chi_square_test_and_masking_fails_it(
    model, tokenizer, exact, method
):
    found = draw(model, tokenizer, 700, method=method, random_state=1)
    assert exact.p_value(list(found.tokens)) > 0.01
    masked = draw(model, tokenizer, 700, method="gcd", random_state=1)
    assert exact.p_value(list(masked.tokens)) < 1e-6


def test_every_early_sample_of_adaptive_is_exact(model, tokenizer, exact):
    """First samples of fresh tries: nothing is learnt yet, and they are from Q all the same."""
    firsts, rng = [], np.random.default_rng(5)
    constraint = GrammarConstraint(
        Grammar.regex(PATTERN), tokenizer, vocab_size=WIDTH, eos_token_id=ENDS
    )
    settings = {"grammar": constraint, "method": "adaptive", "random_state": rng}
    for _ in range(150):
        firsts += draw(model, tokenizer, 2, **settings).tokens[1:]
    assert exact.p_value(firsts) > 0.01


def test_asap_tends_to_the_target_and_masking_does_not(model, tokenizer, exact):
    trie = AlignmentTrie()
    distances = []
    rng = np.random.default_rng(1)
    for n in (1, 40, 3000):
        draw(model, tokenizer, n, trie=trie, random_state=rng)
        distances.append(exact.distance(exact.aligned(trie)))
    assert distances[-1] < 2e-3 < distances[1] < exact.distance(exact.masked())


def test_late_samples_of_asap_pass_the_chi_square_test(model, tokenizer, exact):
    found = draw(model, tokenizer, 1000, burn_in=500, random_state=3)
    assert len(found) == 1000
    assert exact.p_value(list(found.tokens)) > 0.01


def test_masking_is_the_closed_form(model, tokenizer, exact):
    masked = exact.masked()
    found = draw(model, tokenizer, 200, method="gcd")
    for tokens, log_p, log_q in zip(
        found.tokens, found.log_probs, found.log_proposals, strict=True
    ):
        assert log_p == pytest.approx(exact.log_p[tokens], abs=1e-4)
        # Masking cannot see that a text will not end in time, here none.
        assert log_q == pytest.approx(np.log(masked[tokens]), abs=1e-4)


def test_the_first_asap_sample_is_masking(model, tokenizer, exact):
    masked = exact.masked()
    for seed in range(10):
        found = draw(model, tokenizer, 1, random_state=seed)
        assert found.log_proposals[0] == pytest.approx(np.log(masked[found.tokens[0]]), abs=1e-4)


@pytest.mark.parametrize("method", ["asap", "gcd", "rejection", "adaptive"])
def test_bounds_on_z_hold_and_only_tighten(model, tokenizer, exact, method):
    found = draw(model, tokenizer, 300, method=method)
    upper, lower = np.exp(found.attempt_log_z_upper), np.exp(found.attempt_log_z_lower)
    assert (np.diff(upper) <= 0).all()
    assert (np.diff(lower) >= 0).all()
    assert (lower <= exact.z * (1 + 1e-5)).all()
    assert (upper >= exact.z * (1 - 1e-5)).all()
    assert found.z_bounds == (lower[-1], upper[-1])
    assert len(upper) == len(found.attempt_log_weights) == found.n_attempts
    failed = found.n_illegal + found.n_truncated + found.n_dead_ends
    assert found.n_attempts == len(found) + failed
    assert set(found.accepted_attempts) == set(np.flatnonzero(found.attempt_log_weights > -np.inf))


def test_bounds_hold_at_every_prefix(model, tokenizer, exact):
    trie = AlignmentTrie()
    rng = np.random.default_rng(2)
    before = dict.fromkeys(exact.live, 0.0)
    for _ in range(30):
        draw(model, tokenizer, 5, trie=trie, random_state=rng)
        for prefix in exact.live:
            now = trie.log_bound(prefix)
            assert now <= before[prefix]
            floor = 1.0 if prefix and prefix[-1] in ENDS else exact.future(prefix)
            assert np.exp(now) >= floor * (1 - 1e-5)
            before[prefix] = now
    draw(model, tokenizer, 1500, trie=trie, random_state=rng)
    assert np.exp(trie.log_z_upper) == pytest.approx(exact.z, rel=5e-3)
    assert np.exp(trie.log_found) == pytest.approx(exact.z, rel=5e-3)


@pytest.mark.parametrize("method", ["asap", "gcd", "rejection", "adaptive"])
def test_the_estimate_of_z_is_unbiased(model, tokenizer, exact, method):
    found = draw(model, tokenizer, 1200, method=method, random_state=4)
    weights = np.exp(found.attempt_log_weights)
    error = max(weights.std() / np.sqrt(len(weights)), 1e-4 * exact.z)
    assert abs(found.z_estimate - exact.z) < 4 * error


@pytest.mark.parametrize("method", ["asap", "gcd"])
def test_weights_turn_samples_into_the_target(model, tokenizer, exact, method):
    found = draw(model, tokenizer, 3000, method=method, random_state=6)
    weighted = {}
    for tokens, weight in zip(found.tokens, found.weights, strict=True):
        weighted[tokens] = weighted.get(tokens, 0.0) + weight
    assert found.weights.sum() == pytest.approx(1)
    assert exact.distance(weighted) < 0.08
    assert 1 <= found.effective_sample_size <= 3000


def test_temperature_belongs_to_the_model(model, tokenizer):
    warmed = Exact(model, temperature=1.7)
    found = draw(model, tokenizer, 1200, method="adaptive", temperature=1.7, random_state=9)
    assert warmed.p_value(list(found.tokens)) > 0.01
    for tokens, log_p in zip(found.tokens, found.log_probs, strict=True):
        assert log_p == pytest.approx(warmed.log_p[tokens], abs=1e-4)


def test_top_k_takes_tokens_out_of_the_model(model, tokenizer, exact):
    found = draw(model, tokenizer, 60, method="gcd", top_k=8)
    for tokens, log_p in zip(found.tokens, found.log_probs, strict=True):
        expected = 0.0
        for i, token in enumerate(tokens):
            p = exact.step[tokens[:i]]
            kept = np.sort(p)[-8:]
            assert p[token] >= kept[0]
            expected += p[token] - np.log(np.exp(kept).sum())
        assert log_p == pytest.approx(expected, abs=1e-4)


# The official trie --------------------------------------------------------------------------------

# What transformers_gad's oracle trie (commit e89dffcb) gives for `toy_logits` and `toy_legal` after
# each of `TOY_PATHS`: the success rates of the prefixes in `TOY_PREFIXES`.
TOY_PATHS = [(0, 0, 0, 2), (1, 0, 1, 2), (0, 0, 0, 2), (1, 1, 1, 2), (1, 0, 0, 2), (1, 1, 0, 2)]
TOY_PREFIXES = [(), (0,), (1,), (1, 0), (1, 1)]
TOY_RATES = [
    (0.48070502112, 0.001268388326, 1, 1, 1),
    (0.089650661781, 0.001268388326, 0.186195947977, 0.403941625083, 1),
    (0.089650661781, 0.001268388326, 0.186195947977, 0.403941625083, 1),
    (0.083483835864, 0.001268388326, 0.173362468949, 0.403941625083, 0.399065248725),
    (0.006182493065, 0.001268388326, 0.012494434892, 0.009733539543, 0.399065248725),
    (0.002189131656, 0.001268388326, 0.004184046276, 0.009733539543, 0.009926706896),
]


def toy_log_probs(prefix):
    seed = sum((token + 1) * 7**i for i, token in enumerate(prefix))
    logits = 2 * np.sin(np.arange(5) * 1.7 + 0.9 * seed + 0.3)
    return logits - log_sum(logits)


def toy_legal(prefix):
    """The language 000 | 1xx; token 2 ends a text."""
    if len(prefix) == 3:
        return [2]
    return [0] if prefix and prefix[0] == 0 else [0, 1]


def walk(trie, path):
    nodes = [0]
    for i, token in enumerate(path):
        ids = np.array(toy_legal(path[:i]))
        log_p = toy_log_probs(path[:i])[ids]
        trie.expand(nodes[-1], ids, log_p)
        nodes.append(trie.add_child(nodes[-1], token, ids, log_p))
    trie.finish(nodes[-1])
    trie.update(nodes)


def test_the_trie_has_the_values_of_the_official_one():
    trie = AlignmentTrie()
    for path, rates in zip(TOY_PATHS, TOY_RATES, strict=True):
        walk(trie, path)
        found = [np.exp(trie.log_bound(prefix)) for prefix in TOY_PREFIXES]
        np.testing.assert_allclose(found, rates, rtol=1e-9)
    total = {p: sum(toy_log_probs(p[:i])[t] for i, t in enumerate(p)) for p in TOY_PATHS}
    assert trie.log_found == pytest.approx(log_sum(np.array(list(total.values()))), abs=1e-12)
    assert trie.log_found == pytest.approx(trie.log_z_upper, abs=1e-9)  # all texts were met


def test_tiny_bounds_stay_accurate():
    """One legal token of probability 1e-30 at each of ten steps, after the others are closed."""
    trie, node, nodes = AlignmentTrie(), 0, [0]
    ids, log_p = np.array([0, 1]), np.array([np.log(1e-30), np.log(0.5)])
    for _ in range(10):
        trie.expand(node, ids, log_p)
        dead = trie.add_child(node, 1, ids, log_p)
        trie.expand(dead, ids[:0], log_p[:0])
        trie.update([dead])
        node = trie.add_child(node, 0, ids, log_p)
        nodes.append(node)
    trie.finish(node)
    trie.update(nodes)
    assert trie.log_z_upper == pytest.approx(300 * np.log(0.1), rel=1e-12)


# `generate` ---------------------------------------------------------------------------------------


def generate(model, **settings):
    ids = torch.tensor([PROMPT])
    settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **settings}
    return model.generate(ids, **settings)


def regex_mask(pattern):
    """A mask for `generate` that knows nothing of this library: live prefixes by enumeration."""
    words = {
        "".join(PIECES[token] for token in w)
        for length in range(LIMIT)
        for w in itertools.product(PIECES, repeat=length)
        if re.fullmatch(pattern, "".join(PIECES[token] for token in w))
    }

    def mask(input_ids, scores):
        out = torch.full_like(scores, -float("inf"))
        for row, ids in enumerate(input_ids[:, len(PROMPT) :].tolist()):
            if ids and ids[-1] in (0, *ENDS):
                out[row] = scores[row]
                continue
            text = "".join(PIECES[token] for token in ids)
            legal = [t for t, p in PIECES.items() if any(w.startswith(text + p) for w in words)]
            legal += ENDS if text in words else ()
            out[row, legal] = scores[row, legal]
        return out

    return mask


@pytest.mark.parametrize("seed", range(4))
def test_cold_masking_is_greedy_generate_with_a_mask(tokenizer, seed):
    model = tiny_model(seed)
    plain = generate(
        model, do_sample=False, max_new_tokens=LIMIT, logits_processor=[regex_mask(PATTERN)]
    )
    found = draw(model, tokenizer, 1, method="gcd", temperature=1e-4)
    assert list(found.tokens[0]) == plain[0, len(PROMPT) :].tolist()
    processor = GrammarAlignedLogitsProcessor(
        GrammarConstraint(Grammar.regex(PATTERN), tokenizer, vocab_size=WIDTH, eos_token_id=ENDS),
        align=False,
    )
    ours = generate(model, do_sample=False, max_new_tokens=LIMIT, logits_processor=[processor])
    assert ours.tolist() == plain.tolist()


def test_masking_draws_what_generate_draws_with_the_same_seed(model, tokenizer):
    settings = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": LIMIT,
        "num_return_sequences": 40,
    }
    torch.manual_seed(11)
    theirs = generate(model, logits_processor=[regex_mask(PATTERN)], **settings)
    constraint = GrammarConstraint(
        Grammar.regex(PATTERN), tokenizer, vocab_size=WIDTH, eos_token_id=ENDS
    )
    torch.manual_seed(11)
    processor = GrammarAlignedLogitsProcessor(constraint, align=False)
    ours = generate(model, logits_processor=[processor], **settings)
    assert ours.tolist() == theirs.tolist()


def test_probabilities_of_masking_are_those_of_generate(model, tokenizer):
    torch.manual_seed(12)
    out = generate(
        model,
        do_sample=True,
        top_k=0,
        max_new_tokens=LIMIT,
        num_return_sequences=60,
        logits_processor=[regex_mask(PATTERN)],
        output_scores=True,
        return_dict_in_generate=True,
    )
    theirs = {}
    for row, ids in enumerate(out.sequences[:, len(PROMPT) :].tolist()):
        ids = ids[: next(i for i, token in enumerate(ids) if token in ENDS) + 1]
        theirs[tuple(ids)] = sum(
            torch.log_softmax(out.scores[i][row].double(), -1)[token].item()
            for i, token in enumerate(ids)
        )
    found = draw(model, tokenizer, 300, method="gcd")
    both = [
        (q, theirs[w])
        for w, q in zip(found.tokens, found.log_proposals, strict=True)
        if w in theirs
    ]
    assert len(both) > 50
    np.testing.assert_allclose(*zip(*both, strict=True), atol=1e-4)


ANYTHING = Grammar.lark("start: <[*]>*")


@pytest.mark.parametrize("method", ["asap", "gcd", "rejection", "adaptive"])
def test_without_a_constraint_sampling_is_plain(model, tokenizer, method):
    found = draw(model, tokenizer, 100, grammar=ANYTHING, method=method)
    assert found.n_illegal == found.n_dead_ends == 0
    if method in ("gcd", "rejection"):
        np.testing.assert_allclose(found.log_proposals, found.log_probs, atol=1e-9)
    ids = torch.tensor([PROMPT])
    for tokens, log_p in zip(found.tokens[:20], found.log_probs[:20], strict=True):
        row = torch.cat([ids, torch.tensor([tokens])], dim=1)
        with torch.no_grad():
            logits = model(row).logits[0, len(PROMPT) - 1 : -1].double()
        steps = torch.log_softmax(logits, -1)[range(len(tokens)), list(tokens)]
        assert log_p == pytest.approx(steps.sum().item(), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_without_a_constraint_cold_sampling_is_greedy_generate(tokenizer, seed):
    model = tiny_model(seed)
    plain = generate(model, do_sample=False, max_new_tokens=60)[0, len(PROMPT) :].tolist()
    if plain[-1] not in ENDS:  # a greedy text that never ends is no sample
        with pytest.raises(DataError, match="did not end within max_new_tokens=60"):
            draw(
                model,
                tokenizer,
                1,
                grammar=ANYTHING,
                method="gcd",
                temperature=1e-4,
                max_new_tokens=60,
                max_failures=3,
            )
    else:
        found = draw(
            model, tokenizer, 1, grammar=ANYTHING, method="gcd", temperature=1e-4, max_new_tokens=60
        )
        assert list(found.tokens[0]) == plain


def test_the_processor_learns_what_sample_aligned_learns(model, tokenizer, exact):
    constraint = GrammarConstraint(
        Grammar.regex(PATTERN), tokenizer, vocab_size=WIDTH, eos_token_id=ENDS
    )
    trie = AlignmentTrie()
    processor = GrammarAlignedLogitsProcessor(constraint, trie, max_new_tokens=LIMIT, model=model)
    torch.manual_seed(0)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": LIMIT}
    previous = 0.0
    for _ in range(40):
        rows = generate(model, num_return_sequences=8, logits_processor=[processor], **settings)
        for row in rows[:, len(PROMPT) :].tolist():
            end = next(i for i, token in enumerate(row) if token in ENDS)
            assert tuple(row[: end + 1]) in exact.log_p
        assert trie.log_z_upper <= previous
        previous = trie.log_z_upper
    assert np.exp(previous) >= exact.z * (1 - 1e-5)
    assert exact.distance(exact.aligned(trie)) < 0.01 < exact.distance(exact.masked())
    # One trie for both: the bindings agree, and nothing is left to compute.
    found = draw(model, tokenizer, 5, trie=trie)
    assert found.attempt_log_z_upper[0] <= previous


def test_processors_do_not_share_tries_and_refuse_other_prompts(model, tokenizer):
    constraint = GrammarConstraint(
        Grammar.regex(PATTERN), tokenizer, vocab_size=WIDTH, eos_token_id=ENDS
    )
    one, two = GrammarAlignedLogitsProcessor(constraint), GrammarAlignedLogitsProcessor(constraint)
    assert one.trie is not two.trie
    scores = torch.zeros(1, WIDTH)
    one(torch.tensor([PROMPT]), scores)
    with pytest.raises(DataError, match="prompt must be the same"):
        one(torch.tensor([[1, 4]]), scores)
    with pytest.raises(DataError, match="prompt must be the same"):
        two(torch.tensor([PROMPT, [1, 4, 4, 4]]), torch.zeros(2, WIDTH))
    three = GrammarAlignedLogitsProcessor(constraint, one.trie, temperature=2.0)
    with pytest.raises(DataError, match="another warping"):
        three(torch.tensor([PROMPT]), scores)
    with pytest.raises(DataError, match="tied to a tokenizer"):
        GrammarAlignedLogitsProcessor(Grammar.regex("a"))
    with pytest.raises(DataError, match=r"mask has shape \(12,\), but the model gives \(13,\)"):
        GrammarAlignedLogitsProcessor(constraint)(torch.tensor([PROMPT]), torch.zeros(1, 13))


# States -------------------------------------------------------------------------------------------


def reader_model(kind):
    import transformers

    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=WIDTH, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "mamba":
        config = transformers.MambaConfig(
            vocab_size=WIDTH, hidden_size=16, state_size=4, num_hidden_layers=2
        )
        return transformers.MambaForCausalLM(config).eval()
    return tiny_model(kind=kind)


@pytest.mark.parametrize("cache_bytes", [0, 3000, 2**20])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mamba"])
def test_logits_along_the_trie_are_those_of_a_pass_over_everything(kind, cache_bytes):
    model = reader_model(kind)
    reader = PrefixReader(model, PROMPT, ByteLRU(cache_bytes))
    rng = np.random.default_rng(0)
    for _ in range(60):
        tokens = tuple(rng.integers(4, 7, rng.integers(0, 9)).tolist())
        with torch.no_grad():
            expected = model(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1]
        found = reader.logits(list(tokens))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert reader.cache.used <= cache_bytes


@pytest.mark.parametrize("cache_bytes", [0, 3000, 9000, 2**20])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_logits_side_by_side_are_those_of_a_pass_over_everything(kind, cache_bytes):
    """Rows that go on, fork, end and join from states that are remembered in part."""
    model = reader_model(kind)
    reader = PrefixReader(model, PROMPT, ByteLRU(cache_bytes), max_new_tokens=12)
    rng = np.random.default_rng(0)
    for _ in range(12):
        prefixes = [()]
        for length in range(int(rng.integers(0, 4)), 10):
            grown = {
                (*prefix, *rng.integers(4, 8, length - len(prefix)).tolist())
                for prefix in prefixes
                for _ in range(int(rng.integers(0, 4)))
            }
            # Some that were not read last time, or never.
            grown |= {tuple(rng.integers(4, 6, length).tolist()) for _ in range(2)}
            prefixes = [tuple(p) for p in rng.permutation(sorted(grown))[:9].tolist()]
            rows = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])
            with torch.no_grad():
                expected = model(rows).logits[:, -1]
            n_calls, n_tokens = reader.n_calls, reader.n_tokens
            found = reader.read(prefixes)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
            assert reader.n_calls - n_calls <= 3
            assert reader.n_tokens - n_tokens >= len(prefixes) or prefixes == [()]
            assert reader.cache.used <= cache_bytes
            if rng.random() < 0.1:
                reader.logits(list(prefixes[0]))


def test_no_prefix_is_computed_twice(model, tokenizer):
    found = draw(model, tokenizer, 300, lookahead=1)
    n_expanded = sum(
        found.trie.is_expanded(n) and not found.trie.is_finished(n) for n in range(len(found.trie))
    )
    assert found.n_model_calls == n_expanded
    assert found.n_model_tokens == len(PROMPT) + n_expanded - 1
    again = draw(model, tokenizer, 300, trie=found.trie, random_state=0)
    assert again.n_model_calls < 5


# Reading ahead ------------------------------------------------------------------------------------


def same_samples(one, other):
    assert one.tokens == other.tokens
    assert one.n_attempts == other.n_attempts
    assert len(one.trie) == len(other.trie)
    assert one.accepted_attempts.tolist() == other.accepted_attempts.tolist()
    for name in ("log_probs", "log_proposals", "attempt_log_weights"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)
    for name in ("attempt_log_z_upper", "attempt_log_z_lower"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)


METHODS = ["asap", "gcd", "rejection", "adaptive"]


@pytest.mark.parametrize("pattern", [PATTERN, "[abc01]*"])  # the second is cut off often
@pytest.mark.parametrize("method", METHODS)
def test_reading_ahead_changes_nothing(model, tokenizer, method, pattern):
    settings = {"method": method, "grammar": Grammar.regex(pattern), "random_state": 7}
    alone = draw(model, tokenizer, 60, lookahead=1, burn_in=5, **settings)
    for lookahead in (2, 5, 40):
        for cache_bytes in (0, 12_000, 2**29):
            settings |= {"lookahead": lookahead, "cache_bytes": cache_bytes}
            same_samples(draw(model, tokenizer, 60, burn_in=5, **settings), alone)


@pytest.mark.parametrize("lookahead", [1, 8])
def test_calls_with_one_generator_go_on_as_one_call_does(model, tokenizer, lookahead):
    whole = draw(model, tokenizer, 30, random_state=4, lookahead=lookahead)
    rng, trie, parts = np.random.default_rng(4), AlignmentTrie(), []
    for n in (1, 1, 7, 20, 1):
        settings = {"trie": trie, "random_state": rng, "lookahead": lookahead}
        parts += draw(model, tokenizer, n, **settings).tokens
    assert tuple(parts) == whole.tokens


def wide_language():
    """More tokens than a node keeps for good, so that what was forgotten is computed again."""
    pairs = {x + y for x in "abcdefghij" for y in "abcdefghij"}
    wide = letter_tokenizer(tuple(sorted({*map(chr, range(0x21, 0x7F)), *pairs, *map(chr, LATIN)})))
    assert len(wide) > 320
    settings = {"max_new_tokens": 4, "temperature": 1.5, "eos_token_id": range(300, len(wide))}
    return wide, Grammar.lark("start: <[4-290]>{1,3}"), settings


@pytest.mark.parametrize("method", METHODS)
def test_reading_ahead_saves_calls(method):
    wide, grammar, settings = wide_language()
    big = tiny_model(vocab_size=len(wide))
    settings |= {"method": method, "random_state": 3, "max_failures": 10**6}
    alone = sample_aligned(big, wide, PROMPT, grammar, 60, lookahead=1, **settings)
    ahead = sample_aligned(big, wide, PROMPT, grammar, 60, lookahead=16, **settings)
    same_samples(ahead, alone)
    assert ahead.n_model_calls < alone.n_model_calls / 5
    # Little is read in vain.
    assert alone.n_model_tokens <= ahead.n_model_tokens < 1.3 * alone.n_model_tokens
    short = sample_aligned(
        big, wide, PROMPT, grammar, 60, lookahead=16, cache_bytes=60_000, **settings
    )
    same_samples(short, alone)


def test_masking_is_foreseen_without_fail(model, tokenizer):
    """Its draws do not depend on what was learnt: nothing is read in vain."""
    alone, ahead = (
        draw(model, tokenizer, 100, method="gcd", lookahead=size, random_state=5)
        for size in (1, 16)
    )
    assert ahead.n_model_tokens == alone.n_model_tokens
    assert ahead.n_model_calls < alone.n_model_calls


@pytest.mark.parametrize("method", METHODS)
def test_what_was_foreseen_mostly_happens(method):
    wide, grammar, settings = wide_language()
    settings["warp"] = Warping(settings.pop("temperature"))
    big = tiny_model(vocab_size=len(wide))
    walker = walker_for(
        big, wide, PROMPT, grammar, lookahead=16, random=np.random.default_rng(0), **settings
    )
    for number in range(150):
        walker.attempt(method, ahead=150 - number)
    assert walker.n_foreseen > 50
    assert walker.n_right > 0.8 * walker.n_foreseen
    assert walker.n_right == walker.n_foreseen or method in ("asap", "adaptive")
    if method != "rejection":
        rows = walker.reader._rows
        assert 1 < rows.n_rows <= 16
    assert len(walker._numbers) < 8 * 16  # nothing piles up


def test_rows_take_no_more_memory_than_allowed(model, tokenizer):
    size = 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    for n_rows in (2, 5):
        walker = walker_for(
            model,
            tokenizer,
            PROMPT,
            Grammar.regex("[abc01]*"),
            max_new_tokens=LIMIT,
            warp=Warping(),
            cache_bytes=n_rows * size * (len(PROMPT) + LIMIT) + 50,
            lookahead=64,
            random=np.random.default_rng(0),
        )
        for _ in range(40):
            walker.attempt("gcd", ahead=100)
        held = [tensor.nbytes for pair in walker.reader._rows.states for tensor in pair]
        assert 0 < sum(held) <= n_rows * size * (len(PROMPT) + LIMIT)
        assert walker.reader.cache.used <= walker.reader.cache.max_bytes


def test_models_with_recurrent_layers_are_read_one_by_one(tokenizer):
    model = reader_model("mamba")
    alone, ahead = (
        draw(model, tokenizer, 20, eos_token_id=ENDS, lookahead=size) for size in (1, 16)
    )
    same_samples(ahead, alone)
    assert ahead.n_model_calls == alone.n_model_calls


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_true_bounds(model, tokenizer, exact, monkeypatch, error):
    whole = draw(model, tokenizer, 60, lookahead=4).n_model_calls
    forward = type(model).forward
    for stop in range(whole):
        calls = []

        def failing(self, *args, calls=calls, stop=stop, **kwargs):
            calls.append(1)
            if len(calls) > stop:
                raise error
            return forward(self, *args, **kwargs)

        trie = AlignmentTrie()
        failing.__signature__ = inspect.signature(forward)
        monkeypatch.setattr(type(model), "forward", failing)
        with pytest.raises(error):
            draw(model, tokenizer, 60, lookahead=4, trie=trie)
        monkeypatch.undo()
        for prefix in exact.live:
            floor = 1.0 if prefix and prefix[-1] in ENDS else exact.future(prefix)
            assert np.exp(trie.log_bound(prefix)) >= floor * (1 - 1e-5)
        if stop % 5 == 0:
            draw(model, tokenizer, 400, trie=trie, random_state=1)
            assert np.exp(trie.log_z_upper) == pytest.approx(exact.z, rel=0.03)


@pytest.mark.parametrize(
    "bounds", [(1, 1, 1, 1), (0.5, 0.9, 0.1, 1), (1e-3, 2e-3, 1e-9, 1e-4), (0, 0, 0, 1e-12)]
)
def test_a_step_is_drawn_in_proportion_to_probability_times_bound(model, tokenizer, bounds):
    """20,000 first tokens; where bounds are tiny, all tries fail and the sums decide."""
    p = np.array([0.4, 0.1, 0.3, 0.05, 0.1])  # the last token was never drawn
    ids = np.array([4, 5, 6, 8, 9])
    trie = AlignmentTrie()
    trie.expand(0, ids, np.log(p))
    expected = p.copy()
    if max(bounds) < 1:
        expected[4] = p[4] = 1e-3 * max(bounds)
        trie = AlignmentTrie()
        trie.expand(0, ids, np.log(p))
    for place, bound in enumerate(bounds):
        child = trie.add_child(0, int(ids[place]), ids, np.log(p))
        only = np.array([4])
        trie.expand(child, only if bound else only[:0], np.log([bound] if bound else []))
        trie.update([0, child])
        expected[place] = p[place] * bound
    walker = walker_for(
        model,
        tokenizer,
        PROMPT,
        Grammar.regex(PATTERN),
        max_new_tokens=LIMIT,
        warp=Warping(),
        random=np.random.default_rng(1),
    )
    walker.trie = trie
    what = Following.of(ids, np.log(p), -np.inf)
    drawn = []
    for number in range(20_000):
        outcome, token = walker._draw(_Walk(number, _Numbers(number)), what, "asap")
        assert outcome == "accepted"
        drawn.append(token)
    counts = np.array([drawn.count(token) for token in ids])
    expected *= len(drawn) / expected.sum()
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    cells = [np.append(each[~rare], each[rare].sum()) for each in (counts, expected)]
    cells = [each[cells[1] > 0] for each in cells]
    assert len(cells[0]) == 1 or stats.chisquare(*cells).pvalue > 0.01


def test_results_do_not_depend_on_what_is_remembered():
    wide, grammar, settings = wide_language()
    big = tiny_model(vocab_size=len(wide))
    for method in ("asap", "adaptive"):
        kept, dropped = (
            sample_aligned(
                big, wide, PROMPT, grammar, 40, method=method, cache_bytes=size, **settings
            )
            for size in (2**24, 0)
        )
        assert kept.tokens == dropped.tokens
        np.testing.assert_allclose(kept.log_proposals, dropped.log_proposals, atol=1e-5)
        assert dropped.n_model_tokens > kept.n_model_tokens


def test_the_model_is_left_in_its_mode(tokenizer):
    model = tiny_model().train()
    draw(model, tokenizer, 2)
    assert model.training


# Files --------------------------------------------------------------------------------------------


def test_a_saved_trie_is_the_same_trie(model, tokenizer, exact, tmp_path):
    found = draw(model, tokenizer, 300)
    found.trie.save(tmp_path / "trie.safetensors")
    loaded = AlignmentTrie.load(tmp_path / "trie.safetensors")
    assert len(loaded) == len(found.trie) > 20
    assert loaded.binding == found.trie.binding
    assert (loaded.log_z_upper, loaded.log_found) == (found.trie.log_z_upper, found.trie.log_found)
    for prefix in exact.live:
        assert loaded.log_bound(prefix) == found.trie.log_bound(prefix)
    warm = draw(model, tokenizer, 50, trie=loaded, random_state=9)
    same = draw(model, tokenizer, 50, trie=found.trie, random_state=9)
    assert warm.tokens == same.tokens
    np.testing.assert_array_equal(warm.log_proposals, same.log_proposals)
    assert warm.n_model_calls < 10


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"grammar": Grammar.regex("a|b")}, "grammar"),
        ({"prompt": [1, 4]}, "prompt"),
        ({"model": "other"}, "model"),
        ({"temperature": 2.0}, "warping"),
        ({"max_new_tokens": LIMIT + 1}, "max_new_tokens"),
        ({"eos_token_id": 2}, "eos_token_id"),
    ],
)
def test_a_trie_is_refused_elsewhere(model, tokenizer, change, what):
    trie = draw(model, tokenizer, 3).trie
    settings = {"prompt": PROMPT, "grammar": Grammar.regex(PATTERN), "max_new_tokens": LIMIT}
    settings |= {"model": model, **change}
    if settings["model"] == "other":
        settings["model"] = tiny_model(1)
    with pytest.raises(DataError, match=rf"trie belongs to .*another {what}"):
        sample_aligned(tokenizer=tokenizer, n=1, trie=trie, **settings)


def test_fingerprints_change_with_weights():
    one, same, two = tiny_model(0), tiny_model(0), tiny_model(1)
    assert model_fingerprint(one) == model_fingerprint(same) != model_fingerprint(two)


def test_damaged_files_are_refused(model, tokenizer, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "trie.safetensors"
    draw(model, tokenizer, 20).trie.save(path)
    arrays = load_file(path)
    save_file(arrays, tmp_path / "plain.safetensors")
    with pytest.raises(DataError, match="its format is None"):
        AlignmentTrie.load(tmp_path / "plain.safetensors")
    metadata = {"format": "bakeoff-alignment-trie-1", "binding": "{}"}
    for name, value in [
        ("parent", arrays["parent"][::-1].copy()),
        ("token", arrays["token"][:-1].copy()),
        ("legal", arrays["legal"][:-1].copy()),
    ]:
        save_file({**arrays, name: value}, path, metadata=metadata)
        with pytest.raises(DataError, match="is damaged"):
            AlignmentTrie.load(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(DataError, match="no safetensors file"):
        AlignmentTrie.load(path)


# Limits and refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["asap", "gcd", "rejection", "adaptive"])
def test_texts_that_are_cut_off_are_no_samples(model, tokenizer, method):
    settings = {"grammar": Grammar.regex("[abc01]*"), "method": method}
    found = draw(model, tokenizer, 1000, **settings)  # masking cuts off one in 140
    assert all(tokens[-1] in ENDS and len(tokens) <= LIMIT for tokens in found.tokens)
    assert all(re.fullmatch("[abc01]*", text) for text in found.texts)
    if method == "gcd":
        assert found.n_truncated > 0
    exact = Exact(model, "[abc01]*")
    assert found.z_bounds[0] <= exact.z * (1 + 1e-5)
    assert found.z_bounds[1] >= exact.z * (1 - 1e-5)


def test_a_schema_that_cannot_close_in_time_is_refused_before_any_work(model, tokenizer):
    schema = {"const": 111111111111}
    with pytest.raises(DataError, match=r"max_new_tokens=5: .* 12 bytes, .* at least 7 tokens"):
        draw(model, tokenizer, 1, grammar=schema)


def test_a_language_without_a_text_in_time_is_found_out(model, tokenizer):
    with pytest.raises(DataError, match="all its beginnings were tried"):
        draw(model, tokenizer, 1, grammar=Grammar.regex("[01]{5}"))
    with pytest.raises(DataError, match=r"a dead end|all its beginnings were tried"):
        draw(model, tokenizer, 1, grammar=Grammar.regex("az"))


def test_giving_up_says_why(model, tokenizer):
    with pytest.raises(DataError, match=r"20 attempts in a row .* Try method='asap'"):
        draw(
            model, tokenizer, 1, grammar=Grammar.regex("0110"), method="rejection", max_failures=20
        )
    with pytest.raises(DataError, match="Try a larger max_new_tokens"):
        draw(
            model, tokenizer, 1, grammar=Grammar.regex("[ab01c]{40}"), method="gcd", max_failures=3
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1"),
        ({"lookahead": 0}, "lookahead must be an integer of at least 1"),
        ({"burn_in": -1}, "burn_in must be"),
        ({"method": "gad"}, "method must be one of asap"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"prompt": ""}, "prompt must have at least one token"),
        ({"prompt": []}, "prompt must have at least one token"),
        ({"max_new_tokens": 400}, "exceed the model's 128 positions"),
        ({"eos_token_id": 99}, "eos_token_id must be tokens below 12"),
        ({"eos_token_id": 11}, "among the tokenizer.s 10 tokens"),
        ({"tokenizer": None}, "tokenizer may be None only with a LanguageModel"),
        ({"grammar": 3}, "grammar must be a Grammar"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, change, message):
    settings = {"prompt": PROMPT, "grammar": Grammar.regex("a"), "n": 1, "max_new_tokens": LIMIT}
    with pytest.raises(DataError, match=message):
        sample_aligned(**{"model": model, "tokenizer": tokenizer, **settings, **change})


def test_a_backbone_without_head_is_refused(tokenizer):
    with pytest.raises(DataError, match="language-model head, got LlamaModel"):
        draw(tiny.model(), tokenizer, 1)


def test_seeds_and_progress(model, tokenizer):
    seen = []
    one = draw(
        model, tokenizer, 6, burn_in=2, progress=lambda done, all_: seen.append((done, all_))
    )
    assert seen == [(i, 8) for i in range(1, 9)]
    assert one.tokens == draw(model, tokenizer, 6, burn_in=2).tokens
    assert one.tokens != draw(model, tokenizer, 6, burn_in=2, random_state=1).tokens


class Bits:
    """A ready constraint over tokens 8 and 9 without any engine: exactly three of them."""

    vocab_size, fingerprint = WIDTH, "three bits"

    def start(self):
        return 0

    def legal(self, state):
        return np.isin(np.arange(WIDTH), [8, 9]) & (state < 3)

    def advance(self, state, token):
        return state + 1

    def may_end(self, state):
        return state == 3


def test_any_engine_can_stand_behind_a_constraint(model, tokenizer):
    own = draw(model, tokenizer, 100, grammar=Bits(), random_state=2)
    engine = draw(model, tokenizer, 100, grammar=Grammar.regex("[01]{3}"), random_state=2)
    assert own.tokens == engine.tokens
    np.testing.assert_allclose(own.log_proposals, engine.log_proposals)


def test_the_least_recently_used_goes_first():
    cache = ByteLRU(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert (cache.get("a"), cache.get("b"), cache.get("c"), cache.used) == (1, None, 3, 8)
    cache.put("a", 5, 10)
    assert (cache.get("a"), len(cache), cache.used) == (5, 1, 10)


@pytest.mark.model
def test_a_real_model_writes_what_the_schema_asks_for():
    import json

    from bakeoff.models import load_language_model

    smollm = load_language_model("smollm2-135m")
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}, "degrees": {"enum": [10, 20, 30]}},
        "required": ["sunny", "degrees"],
        "additionalProperties": False,
    }
    found = sample_aligned(
        smollm,
        None,
        "Today's weather as JSON: ",
        Grammar.json_schema(schema, whitespace=False),
        2,
        max_new_tokens=24,
        lookahead=1,
    )
    for text, tokens in zip(found.texts, found.tokens, strict=True):
        assert json.loads(text)["degrees"] in (10, 20, 30)
        assert smollm.tokenizer.decode(list(tokens[:-1])) == text
    low, high = found.z_bounds
    assert 0 < low <= high < 0.5
    assert found.n_model_calls <= len(found.tokens[0]) + len(found.tokens[1]) - 1
