"""Text baselines against plain formulas, bm25s, and transformers' own loss."""

import math
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from tests.models import tiny

from bakeoff.data.samples import Sample
from bakeoff.errors import DataError
from bakeoff.models import LanguageModel
from bakeoff.selection import text_baselines
from bakeoff.selection.query_selection import round_robin
from bakeoff.selection.text_baselines import (
    BM25Selector,
    IFDSelector,
    LongestSelector,
    PerplexitySelector,
    TfidfSelector,
)

POOL = [
    "The cat sat on the mat.",
    "Stocks fell today",
    "a dog and a cat, a CAT!",
    "bond yields rose; stocks did not",
    "",
    "x = y",
]


def words(text):
    return re.findall(r"\w+", text.lower())


def salad(n, seed=0, vocabulary=30, longest=12):
    rng = np.random.default_rng(seed)
    names = [f"w{i}" for i in range(vocabulary)]
    shares = 1 / np.arange(1, vocabulary + 1)
    return [
        " ".join(rng.choice(names, rng.integers(1, longest), p=shares / shares.sum()))
        for _ in range(n)
    ]


def bm25_by_hand(query, pool, k1, b):
    """The formula of the docstring, word by word."""
    documents = [words(text) for text in pool]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        total = 0.0
        for word in words(query):
            n = sum(word in other for other in documents)
            f = document.count(word)
            if f:
                idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
                total += idf * f / (f + k1 * (1 - b + b * len(document) / mean))
        scores.append(total)
    return np.array(scores)


def tfidf_by_hand(query, pool):
    """Cosine of counts times ln((1 + N) / (1 + n)) + 1."""
    documents = [Counter(words(text)) for text in pool]
    idf = {
        word: math.log((1 + len(pool)) / (1 + sum(word in other for other in documents))) + 1
        for document in documents
        for word in document
    }
    vector = lambda counts: {w: c * idf[w] for w, c in counts.items() if w in idf}  # noqa: E731
    length = lambda v: math.sqrt(sum(x * x for x in v.values())) or 1.0  # noqa: E731
    asked = vector(Counter(words(query)))
    scores = []
    for document in map(vector, documents):
        product = sum(x * asked.get(word, 0.0) for word, x in document.items())
        scores.append(product / length(document) / length(asked))
    return np.array(scores)


def all_scores(selector, pool, query):
    """The score of every row: that of all picks where all rows are picked."""
    selector.fit(pool, queries=[query])
    scores = np.empty(len(pool))
    scores[selector.selected_indices_] = selector.scores_
    return scores


@pytest.mark.filterwarnings("ignore:only .* rows share a word")
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (0.0, 1.0), (2.0, 0.0)])
def test_bm25_is_the_formula(k1, b):
    for pool, query in ((POOL, "a cat and the other CAT x"), (salad(40), "w0 w3 w3 w7 w29 none")):
        found = all_scores(BM25Selector(len(pool), k1=k1, b=b), pool, query)
        np.testing.assert_allclose(found, bm25_by_hand(query, pool, k1, b), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:only .* rows share a word")
def test_bm25_is_that_of_bm25s():
    bm25s = pytest.importorskip("bm25s")
    pool, query = salad(200, vocabulary=100), "w0 w3 w3 w17 w80 w99"
    index = bm25s.BM25(k1=1.2, b=0.6, method="lucene")
    index.index([words(text) for text in pool], show_progress=False)
    found = all_scores(BM25Selector(len(pool), k1=1.2, b=0.6), pool, query)
    np.testing.assert_allclose(found, index.get_scores(words(query)), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:only .* rows share a word")
def test_tfidf_is_the_formula():
    for pool, query in ((POOL, "a cat and the other CAT x"), (salad(40), "w0 w3 w3 w7 w29 none")):
        found = all_scores(TfidfSelector(len(pool)), pool, query)
        np.testing.assert_allclose(found, tfidf_by_hand(query, pool), rtol=1e-5, atol=1e-6)


def quantised_scores(pool, queries):
    """Small whole numbers, so that sums are exact and there are many ties: words in common."""
    return np.array(
        [[sum(w in words(p) for w in set(words(q))) for p in pool] for q in queries], dtype=float
    )


class OverlapSelector(text_baselines._WordOverlapSelector):
    """Scores are the numbers above: what is tested is who gets which row."""

    _score_name = "words"

    def __init__(self, n_select, strategy="round_robin"):
        self.n_select = n_select
        self.strategy = strategy

    def _weights(self, texts, queries, progress):
        columns = {f"w{i}": i for i in range(30)}
        pool, _ = text_baselines._counts(texts, columns, progress)
        asked, _ = text_baselines._counts(queries, columns, None)
        pool.data[:] = 1
        asked.data[:] = 1
        return pool.astype(np.float32), asked.T.toarray().astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    n_pool=st.integers(1, 40),
    n_queries=st.integers(1, 6),
    seed=st.integers(0, 500),
    share=st.floats(0, 1),
    n_labeled=st.integers(0, 10),
    strategy=st.sampled_from(["round_robin", "global_max", "mean"]),
    block=st.sampled_from([1, 13, 10**6]),
    free=st.sampled_from([1, 10**6]),
)
@pytest.mark.filterwarnings("ignore:.* share .* word")
def test_picks_are_those_of_brute_force(
    n_pool, n_queries, seed, share, n_labeled, strategy, block, free
):
    pool, queries = salad(n_pool, seed), salad(n_queries, seed + 1000)
    labeled = np.random.default_rng(seed).permutation(n_pool)[: min(n_labeled, n_pool - 1)]
    n = max(1, round(share * (n_pool - len(labeled))))
    scores = quantised_scores(pool, queries)
    scores[:, labeled] = 0
    asked = np.flatnonzero(scores.any(axis=1))
    matched = np.flatnonzero(scores.any(axis=0))
    if not len(asked):
        with pytest.raises(DataError, match="no query shares a word"):
            OverlapSelector(n).fit(pool, queries=queries, already_labeled=labeled)
        return
    listed = np.where(scores > 0, scores, -np.inf)[asked]
    if strategy == "global_max":
        listed = listed.max(axis=0, keepdims=True)
    elif strategy == "mean":
        listed = np.where(scores.any(axis=0), scores.mean(axis=0), -np.inf)[None]
    expected, takers = round_robin(listed, min(n, len(matched)))
    rest = np.setdiff1d(np.setdiff1d(np.arange(n_pool), matched), labeled)
    expected = [*expected.tolist(), *rest.tolist()][:n]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_baselines, "_BLOCK_ENTRIES", block)
        patch.setattr(text_baselines, "_FREE_ENTRIES", free)
        found = OverlapSelector(n, strategy).fit(pool, queries=queries, already_labeled=labeled)
    assert found.selected_indices_.tolist() == expected
    whole = quantised_scores(pool, queries)[:, expected]
    if strategy == "round_robin":
        assert found.query_of_each_[: len(takers)].tolist() == asked[takers].tolist()
        np.testing.assert_allclose(found.scores_, whole[found.query_of_each_, np.arange(n)])
    else:
        reduced = whole.max(axis=0) if strategy == "global_max" else whole.mean(axis=0)
        np.testing.assert_allclose(found.scores_, reduced, rtol=1e-6)
        assert found.query_of_each_.tolist() == whole.argmax(axis=0).tolist()


def test_a_query_whose_best_row_is_taken_spends_its_turn():
    # Query 0 prefers rows 0, 1, 2; query 1 prefers 0, 2, 3: the card's example as texts.
    pool = ["q q q q r r r r", "q q q z z z z z", "q q z z z r r z", "r z z z z z z z"]
    assert BM25Selector(3, b=0).fit(pool, queries=["q", "r"]).selected_indices_.tolist() == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("selector", [BM25Selector(3), TfidfSelector(3)])
def test_overlap_selectors_keep_the_conventions(selector):
    queries = ["stocks and bonds", "my cat"]
    first = selector.fit(POOL, queries=queries).selected_indices_
    assert first.dtype == np.int64
    assert clone(selector).fit(POOL, queries=queries).selected_indices_.tolist() == first.tolist()
    assert selector.select([Sample(t) for t in POOL], queries=queries).tolist() == first.tolist()
    whole = [Sample("the mat.", instruction="The cat sat on"), *POOL[1:]]
    assert selector.select(whole, queries=queries).tolist() == first.tolist()
    assert pickle.loads(pickle.dumps(selector)).reasons() == selector.reasons()
    name = selector._score_name
    for reason, query in zip(selector.reasons(), selector.query_of_each_, strict=True):
        assert re.fullmatch(rf"nearest query {query}, {name} \d+\.\d\d", reason)
    seen = []
    selector.fit(POOL, queries=queries, progress=lambda *done: seen.append(done))
    assert seen == [(6, 6)]
    order = np.random.default_rng(0).permutation(len(POOL))
    moved = selector.fit([POOL[i] for i in order], queries=queries)
    assert order[moved.selected_indices_].tolist() == first.tolist()


def test_queries_and_rows_without_words_in_common_are_reported():
    with pytest.warns(UserWarning, match=r"2 of 3 queries share no word.*: 0, 2"):
        found = BM25Selector(2).fit(POOL, queries=["zebra", "cat", ""])
    assert found.query_of_each_.tolist() == [1, 1]
    with pytest.warns(UserWarning, match=r"only 2 rows share a word.*: 2 of 4 picks are filled"):
        found = BM25Selector(4).fit(POOL, queries=["cat"])
    assert found.selected_indices_.tolist() == [2, 0, 1, 3]
    assert found.reasons()[2:] == ["shares no word with a query"] * 2
    with pytest.raises(DataError, match="no query shares a word"):
        BM25Selector(1).fit(POOL, queries=["cat"], already_labeled=[0, 2])


@pytest.mark.parametrize(
    ("selector", "X", "queries", "message"),
    [
        (BM25Selector(1, k1=-1), POOL, ["a"], "k1 must be a number of at least 0, got -1"),
        (BM25Selector(1, b=1.5), POOL, ["a"], "b must be between 0 and 1, got 1.5"),
        (BM25Selector(1, strategy="best"), POOL, ["a"], "strategy must be one of.*got 'best'"),
        (BM25Selector(7), POOL, ["a"], "n_select must be between 1 and 6"),
        (BM25Selector(1), POOL, None, "queries must be texts.*got none"),
        (BM25Selector(1), POOL, [], "queries must have at least one text"),
        (BM25Selector(1), POOL, "cat", "queries must be a list of texts or samples, got str"),
        (BM25Selector(1), [], ["a"], "X must have at least one text"),
        (BM25Selector(1), ["a", 3], ["a"], "X must be texts.*got int in row 1"),
        (BM25Selector(1), ["", "--"], ["a"], "no query shares a word"),
        (TfidfSelector(1), ["", "--"], ["a"], "X must hold at least one text with a word"),
        (LongestSelector(1, unit="lines"), POOL, 0, "unit must be one of words, characters"),
        (LongestSelector(1, part="prompt"), POOL, 0, "part must be one of text, response"),
        (PerplexitySelector(1, order="mid"), POOL, 0, "order must be one of highest, middle"),
        (PerplexitySelector(1, max_length=1), POOL, 0, "max_length must be.*at least 2, got 1"),
        (PerplexitySelector(1, model=(1, 2, 3)), POOL, 0, r"model must be \(model, tokenizer\)"),
        (PerplexitySelector(9), POOL, 0, "n_select must be between 1 and 6"),
        (IFDSelector(1, order="middle"), POOL, 0, "order must be one of highest, lowest"),
        (IFDSelector(1, max_ratio=0), POOL, 0, "max_ratio must be above 0 or None, got 0"),
        (IFDSelector(1), POOL, 0, "X must be samples with an instruction.*got str in row 0"),
    ],
)
def test_bad_input_is_named(selector, X, queries, message):
    data = {} if queries == 0 else {"queries": queries}
    with pytest.raises(DataError, match=message):
        selector.fit(X, **data)


def test_the_longest_come_first_and_ties_by_row():
    pool = ["a b", "aaaaaaaaaa", "a  b\tc", "d e f", ""]
    selector = LongestSelector(3).fit(pool)
    assert selector.selected_indices_.tolist() == [2, 3, 0]
    assert selector.reasons() == ["3 words", "3 words", "2 words"]
    assert LongestSelector(2).select(pool, already_labeled=[2, 0]).tolist() == [3, 1]
    by_characters = LongestSelector(1, unit="characters").fit(pool)
    assert (by_characters.selected_indices_.tolist(), by_characters.reasons()) == (
        [1],
        ["10 characters"],
    )
    samples = [Sample("one", instruction="a very long question"), Sample("two words")]
    assert LongestSelector(1).select(samples).tolist() == [0]
    assert LongestSelector(1, part="response").fit(samples).selected_indices_.tolist() == [1]
    assert LongestSelector(2).fit(samples).lengths_.tolist() == [5, 2]
    assert LongestSelector(1).select(pool, 4).tolist() == [2, 3, 0, 1]


# Language models ----------------------------------------------------------------------------------


def causal_model(seed=3):
    import transformers

    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(tiny.config(initializer_range=0.2)).eval()


def bos_tokenizer():
    from tokenizers import processors

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def sentences(n, seed=0, shortest=3, longest=14):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(tiny.WORDS, rng.integers(shortest, longest))) for _ in range(n)]


def hf_loss(model, ids, n_masked=0):
    """transformers' own mean loss, the first tokens not counted."""
    labels = torch.tensor([ids])
    labels[0, :n_masked] = -100
    with torch.no_grad():
        return model(torch.tensor([ids]), labels=labels).loss.item()


@pytest.mark.parametrize("bos", [False, True])
def test_losses_are_those_of_transformers(bos):
    model, tokenizer = causal_model(), bos_tokenizer() if bos else tiny.tokenizer()
    texts = sentences(20)
    start = [1] if bos else []
    plain = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    for max_length in (512, 6):
        expected = [hf_loss(model, (start + ids)[:max_length]) for ids in plain]
        selector = PerplexitySelector(5, model=(model, tokenizer), max_length=max_length)
        selector.fit(texts, batch_tokens=40)
        np.testing.assert_allclose(selector.losses_, expected, rtol=1e-5)


def test_orders_of_perplexity():
    model, texts = (causal_model(), tiny.tokenizer()), sentences(30)
    selector = PerplexitySelector(4, model=model).fit(texts)
    descending = np.argsort(-selector.losses_, kind="stable").tolist()
    assert selector.selected_indices_.tolist() == descending[:4]
    loss = selector.losses_.max()
    assert selector.reasons()[0] == f"loss {loss:.2f}, perplexity {math.exp(loss):.1f}"
    for order, expected in (
        ("lowest", descending[::-1][:4]),
        ("middle", descending[9:13]),  # int(0.33 * 30) = 9
    ):
        found = PerplexitySelector(4, model=model, order=order).fit(texts)
        assert found.selected_indices_.tolist() == expected
    late = PerplexitySelector(25, model=model, order="middle").fit(texts)
    assert late.selected_indices_.tolist() == descending[5:]
    taken = PerplexitySelector(2, model=model).fit(texts, already_labeled=descending[:3])
    assert taken.selected_indices_.tolist() == descending[3:5]
    assert np.isnan(taken.losses_).sum() == 3


def test_the_model_is_shared_and_not_copied():
    model = causal_model()
    selector = PerplexitySelector(2, model=(model, tiny.tokenizer()), order="lowest")
    assert clone(selector).model[0] is model
    assert clone(IFDSelector(2, model=(model, tiny.tokenizer()))).model[0] is model
    texts = sentences(6)
    assert selector.select(texts).tolist() == selector.fit(texts).selected_indices_.tolist()
    wrapped = LanguageModel("tiny", model, tiny.tokenizer(), None, "0", max_length=5)
    short = PerplexitySelector(2, model=wrapped).fit(texts)
    expected = [hf_loss(model, tiny.tokenizer()(text)["input_ids"][:5]) for text in texts]
    np.testing.assert_allclose(short.losses_, expected, rtol=1e-5)


def test_texts_with_nothing_to_predict_are_never_picked():
    model = (causal_model(), tiny.tokenizer())
    texts = ["", "cat", *sentences(4), "dog"]
    with pytest.warns(UserWarning, match=r"nothing to predict in 3 of 7 rows.*: 0, 1, 6"):
        found = PerplexitySelector(4, model=model).fit(texts)
    assert sorted(found.selected_indices_.tolist()) == [2, 3, 4, 5]
    with pytest.raises(DataError, match=r"at most 4, got 5: there is nothing to predict in 3"):
        PerplexitySelector(5, model=model).fit(texts)
    with pytest.warns(UserWarning, match=r"nothing to predict in 1 of 7 rows.*: 0"):  # after <s>
        PerplexitySelector(6, model=(model[0], bos_tokenizer())).fit(texts)


def test_a_broken_model_is_refused():
    model = causal_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="no finite loss for row 0"):
        PerplexitySelector(1, model=(model, tiny.tokenizer())).fit(sentences(3))


def chats(n, seed=0):
    asked, answers = sentences(n, seed), sentences(n, seed + 1)
    return [Sample(a, instruction=q) for a, q in zip(answers, asked, strict=True)]


@pytest.mark.parametrize("marker", ["### Response:", "cat", ""])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [512, 14])
@pytest.mark.filterwarnings("ignore:no instruction")
def test_ifd_is_the_ratio_of_transformers_losses(marker, bos, max_length):
    model, tokenizer = causal_model(), bos_tokenizer() if bos else tiny.tokenizer()
    samples = chats(20)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start = [1] if bos else []
    selector = IFDSelector(
        1,
        model=(model, tokenizer),
        max_ratio=None,
        response_marker=marker,
        max_length=max_length,
    ).fit(samples, batch_tokens=60)
    n_scored = 0
    for row, sample in enumerate(samples):
        prompt = start + ids(f"{sample.instruction}\n\n{marker}")
        answer = ids(sample.response)[: max(0, max_length - len(prompt))]
        direct = start + ids(marker)
        given = 0 if direct else 1  # the first token cannot be predicted from nothing
        if len(answer) <= given:
            assert np.isnan(selector.ifd_[row])
            continue
        n_scored += 1
        conditional = hf_loss(model, prompt + answer, len(prompt) + given)
        alone = hf_loss(model, direct + answer, len(direct) + given)
        assert selector.ifd_[row] == pytest.approx(conditional / alone, rel=1e-5)
    assert n_scored > (5 if max_length == 14 else 19)
    assert selector.selected_indices_.tolist() == [np.nanargmax(selector.ifd_)]


def test_samples_that_the_instruction_does_not_help_are_left_out():
    model, samples = (causal_model(), tiny.tokenizer()), chats(30)
    every = IFDSelector(30, model=model, max_ratio=None).fit(samples).ifd_
    assert (every > 1).any()
    assert (every < 1).any()
    n = int((every <= 1).sum())
    kept = IFDSelector(n, model=model).fit(samples)
    picked = every[kept.selected_indices_]
    assert (np.diff(picked) <= 0).all()
    assert (picked <= 1).all()
    row = kept.selected_indices_[0]
    assert kept.reasons()[0] == (
        f"IFD {picked[0]:.2f}: loss {kept.conditional_losses_[row]:.2f} with the instruction, "
        f"{kept.direct_losses_[row]:.2f} without"
    )
    lowest = IFDSelector(3, model=model, order="lowest").fit(samples)
    assert lowest.selected_indices_.tolist() == np.argsort(every)[:3].tolist()
    with pytest.raises(DataError, match=rf"n_select must be at most {n}, the samples with an IFD"):
        IFDSelector(n + 1, model=model).fit(samples)


def test_samples_that_have_no_ifd_are_never_picked():
    model = (causal_model(), tiny.tokenizer())
    samples = [Sample("cat sat on"), *chats(5), Sample("", instruction="the cat")]
    long = Sample("the cat", instruction=" ".join(["dog"] * 40))
    with pytest.warns(UserWarning, match=r"no instruction.* in 3 of 8 rows.*: 0, 6, 7"):
        found = IFDSelector(1, model=model, max_length=30, max_ratio=None).fit([*samples, long])
    assert np.isnan(found.ifd_[[0, 6, 7]]).all()
    assert np.isfinite(found.ifd_[1:6]).all()
    seen = []
    IFDSelector(1, model=model, max_ratio=None).fit(
        chats(5), already_labeled=[0], progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (8, 8)


@pytest.mark.model
def test_a_real_model_tells_text_from_noise():
    from bakeoff.models import load_language_model

    model = load_language_model("smollm2-135m")
    texts = [
        "The capital of France is Paris, and the capital of Italy is Rome.",
        "zq xv kk 91 ;; Rome of pp is the the jj wq capital 7z",
        "Water freezes at zero degrees Celsius and boils at one hundred.",
    ]
    assert PerplexitySelector(1, model=model).select(texts).tolist() == [1]
    samples = [
        Sample("Paris.", instruction="What is the capital of France?"),
        Sample("Paris.", instruction="How many legs does a spider have?"),
    ]
    scores = IFDSelector(1, model=model, max_ratio=None).fit(samples).ifd_
    assert scores[0] < scores[1]
