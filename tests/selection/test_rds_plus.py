"""RDS+ against sentence-transformers' pooling, closed forms, and its own invariances."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from tests.models import tiny

from bakeoff.data.samples import Sample
from bakeoff.data.vector_store import VectorStore
from bakeoff.errors import DataError
from bakeoff.selection.query_selection import round_robin, select_by_queries
from bakeoff.selection.rds_plus import (
    POOLINGS,
    RepresentationSelector,
    pool_states,
    tulu_text,
)

WORDS = np.array(tiny.WORDS)


def some_texts(n, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, longest)))) for _ in range(n)]


def selector(**options):
    return RepresentationSelector(**{"model": tiny.base(), **options})


def by_hand(text, pooling="weighted_mean", layer=-1, base=None):
    """One text, no batch: the formula of the paper's Appendix G in float64."""
    base = base or tiny.base()
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = base.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
    states = states.double().numpy()
    length = len(states)
    if pooling == "weighted_mean":
        vector = sum(2 * i / (length * (length + 1)) * states[i - 1] for i in range(1, length + 1))
    else:
        vector = states[-1] if pooling == "last" else states.mean(axis=0)
    return vector / np.linalg.norm(vector)


# Pooling ------------------------------------------------------------------------------------------


def test_card_value():
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
    pooled = pool_states(states, torch.ones(1, 3))
    torch.testing.assert_close(pooled, torch.tensor([[7 / 6, 4 / 3]]))
    torch.testing.assert_close(pool_states(states, torch.ones(1, 3), "mean")[0], torch.ones(2))
    assert pool_states(states, torch.ones(1, 3), "last").tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("pooling", "theirs"),
    [("weighted_mean", "weightedmean"), ("mean", "mean"), ("last", "lasttoken")],
)
def test_pooling_is_that_of_sentence_transformers(pooling, theirs):
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    states = torch.randn(6, 300, 32)
    lengths = torch.tensor([300, 1, 2, 17, 299, 150])
    mask = (torch.arange(300) < lengths[:, None]).long()  # right: that module weighs by column
    expected = Pooling(32, theirs)({"token_embeddings": states, "attention_mask": mask})
    torch.testing.assert_close(
        pool_states(states, mask, pooling), expected["sentence_embedding"], rtol=0, atol=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(POOLINGS))
def test_padding_on_either_side_changes_nothing(seed, pooling):
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 40, (), generator=generator))
    left, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    states = torch.randn(1, length, 8, generator=generator)
    padding = [torch.full((1, width, 8), torch.nan) for width in (left, right)]
    mask = torch.tensor([[0] * left + [1] * length + [0] * right])
    padded = torch.cat([padding[0], states, padding[1]], dim=1)
    torch.testing.assert_close(
        pool_states(padded, mask, pooling),
        pool_states(states, torch.ones(1, length), pooling),
        rtol=1e-5,
        atol=1e-6,
    )


def test_pooling_is_in_float32_whatever_the_states_are():
    # At 2048 tokens weights are about 1e-3, of which bfloat16 keeps two to three digits.
    states = torch.randn(1, 2048, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.ones(1, 2048)
    expected = pool_states(states.double(), mask)
    assert pool_states(states, mask).dtype == torch.float32
    torch.testing.assert_close(pool_states(states, mask), expected, rtol=0, atol=1e-6)


def test_pooling_refuses():
    with pytest.raises(DataError, match="row 1 has none"):
        pool_states(torch.ones(2, 3, 4), torch.tensor([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(DataError, match="pooling must be one of weighted_mean, mean, last"):
        pool_states(torch.ones(2, 3, 4), torch.ones(2, 3), "cls")


# Text ---------------------------------------------------------------------------------------------


def test_tulu_format():
    turns = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "\nTwo plus two?"},
        {"role": "assistant", "content": " Four.\n"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert tulu_text(turns, "</s>") == (
        "<|system|>\nBe brief.\n<|user|>\nTwo plus two?\n<|assistant|>\nFour.</s>\n"
        "<|user|>\nSure?\n<|assistant|>\nYes.</s>"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "human", "content": "a"}], "one of system, user, assistant, got 'human'"),
        ([{"role": "user"}], "must have a role and a content"),
        ([{"role": "user", "content": 3}], "content must be a string, got int"),
        (["text"], "must have a role and a content"),
        ([], "at least one message"),
    ],
)
def test_bad_conversations_are_refused_and_named(messages, message):
    with pytest.raises(DataError, match=message):
        tulu_text(messages)
    with pytest.raises(DataError, match=rf"items\[1\]: .*{message}"):
        selector().embed(["the cat", messages])


def test_samples_are_conversations_and_documents_are_texts():
    chosen = selector()
    sample = Sample("a mat", instruction="the cat sat on", context="the tree")
    turns = [
        {"role": "user", "content": "the tree\n\nthe cat sat on"},
        {"role": "assistant", "content": "a mat"},
    ]
    assert chosen.text_of(sample) == chosen.text_of(turns) == tulu_text(turns, "</s>")
    assert chosen.text_of(Sample(" a mat")) == chosen.text_of(" a mat") == " a mat"


def test_templates_of_the_tokenizer_and_of_the_user():
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    jinja = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    assert selector(template=jinja).text_of(turns) == "[user] the cat [assistant] sat "
    base = tiny.base()
    with pytest.raises(DataError, match="no chat template"):
        selector(model=base, template="chat").text_of(turns)
    base.tokenizer.chat_template = jinja
    assert selector(model=base, template="chat").text_of(turns).startswith("[user]")


# Vectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layer", [-1, 0, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_vectors_are_those_of_the_formula(pooling, layer, architecture):
    base = tiny.base(architecture)
    texts = some_texts(12)
    vectors = selector(model=base, pooling=pooling, layer=layer).embed(texts)
    expected = [by_hand(text, pooling, layer, base) for text in texts]
    np.testing.assert_allclose(vectors, expected, atol=2e-5)
    assert vectors.dtype == np.float32


def test_vectors_are_those_of_a_sentence_transformer(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    base = tiny.base()
    base.model.save_pretrained(tmp_path)
    base.tokenizer.padding_side = "right"
    base.tokenizer.save_pretrained(tmp_path)
    parts = [Transformer(str(tmp_path)), Pooling(32, "weightedmean")]
    texts = some_texts(40, longest=60)
    expected = SentenceTransformer(modules=parts, device="cpu").encode(
        texts, batch_size=8, normalize_embeddings=True
    )
    np.testing.assert_allclose(selector().embed(texts), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_batches_change_nothing(pooling):
    texts = some_texts(50)
    one = selector(pooling=pooling, batch_tokens=1).embed(texts)
    for batch_tokens in (100, 10_000):
        many = selector(pooling=pooling, batch_tokens=batch_tokens).embed(texts)
        np.testing.assert_allclose(many, one, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)


def test_left_padding_of_the_model_gives_the_same_vectors():
    base, texts = tiny.base(), some_texts(8)
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][:, 0].min() == 0
    mask = batch["attention_mask"]
    with torch.no_grad():
        states = base.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).last_hidden_state
    pooled = torch.nn.functional.normalize(pool_states(states, mask))
    np.testing.assert_allclose(selector(model=base).embed(texts), pooled.numpy(), atol=1e-5)


def test_texts_are_cut_on_the_right():
    texts = some_texts(5, longest=60)
    cut = [" ".join(text.split()[:7]) for text in texts]
    np.testing.assert_allclose(
        selector(max_length=7).embed(texts), selector().embed(cut), atol=1e-6
    )


def test_a_transformers_model_is_read_and_left_as_it_was():
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    head = LlamaForCausalLM(tiny.config("llama", attention_dropout=0.5))
    head.model.load_state_dict(tiny.model().state_dict())
    head.train()
    texts = some_texts(6)
    chosen = RepresentationSelector(head, tiny.tokenizer())
    np.testing.assert_allclose(chosen.embed(texts), selector().embed(texts), atol=1e-6)
    assert head.training
    assert head.model.training
    assert chosen.fingerprint()["max_length"] == 128  # the model's window, not 2048


def test_progress_counts_samples():
    seen = []
    selector(batch_tokens=64).embed(some_texts(30), progress=lambda *step: seen.append(step))
    assert seen[-1] == (30, 30)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("options", "items", "message"),
    [
        ({}, [], "at least one sample"),
        ({}, "one text", "got one string"),
        ({}, ["the", " \n"], r"items\[1\]: .*at least one token"),
        ({}, ["the", 3], r"items\[1\]: a sample must be a text"),
        ({"pooling": "max"}, ["the"], "pooling must be one of"),
        ({"layer": 5}, ["the"], "layer must be an integer from -5 to 4"),
        ({"max_length": 0}, ["the"], "max_length must be at least 1"),
        ({"batch_tokens": 0}, ["the"], "batch_tokens must be at least 1"),
        ({"model": 3}, ["the"], "model must be a name"),
        ({"model": tiny.model()}, ["the"], "tokenizer must be given"),
        ({"tokenizer": tiny.tokenizer()}, ["the"], "tokenizer must be None"),
    ],
)
def test_embed_refuses(options, items, message):
    with pytest.raises(DataError, match=message):
        selector(**options).embed(items)


def test_undefined_vectors_are_named():
    base = tiny.base()
    with torch.no_grad():
        base.model.embed_tokens.weight[4 + tiny.WORDS.index("red")] = torch.nan
    with pytest.raises(DataError, match="sample 1 has NaN or inf, text 'the red cat'"):
        selector(model=base).embed(["the cat", "the red cat", "a dog"])


# The index ----------------------------------------------------------------------------------------


def test_an_index_gives_what_memory_gives(tmp_path):
    pool, queries = some_texts(120), some_texts(6, seed=1)
    chosen = selector(n_select=15)
    store = chosen.build_index(pool, tmp_path / "i", rows_per_shard=16)
    vectors = chosen.embed(pool)
    np.testing.assert_allclose(np.asarray(store), vectors, atol=1e-5)
    scores = chosen.score(queries)
    np.testing.assert_allclose(scores, chosen.embed(queries) @ vectors.T, atol=1e-5)
    result = chosen.select_for(queries)
    np.testing.assert_array_equal(result.indices, round_robin(scores, 15)[0])
    np.testing.assert_array_equal(result.query_of_each, round_robin(scores, 15)[1])
    np.testing.assert_allclose(
        result.scores, scores[result.query_of_each, result.indices], atol=1e-6
    )
    in_memory = chosen.fit(pool, queries=queries)
    np.testing.assert_array_equal(in_memory.selected_indices_, result.indices)
    from_store = clone(chosen).fit(store, queries=queries)
    np.testing.assert_array_equal(from_store.selected_indices_, result.indices)
    later = selector().use_index(tmp_path / "i").select_for(queries, 15)
    np.testing.assert_array_equal(later.indices, result.indices)


def test_an_index_of_a_stream_goes_on_after_a_stop(tmp_path):
    pool = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "the mat"}]
        for text in some_texts(40)
    ]

    def stop(done, _):
        if done >= 20:
            raise KeyboardInterrupt

    chosen = selector()
    with pytest.raises(KeyboardInterrupt):
        chosen.build_index(lambda: iter(pool), tmp_path / "i", rows_per_shard=8, progress=stop)
    assert 1 <= len(list((tmp_path / "i").glob("shard-*.npy"))) < 5
    seen = []
    store = chosen.build_index(
        lambda: iter(pool), tmp_path / "i", rows_per_shard=8, progress=lambda *s: seen.append(s)
    )
    whole = selector().build_index(pool, tmp_path / "j", rows_per_shard=8)
    assert store.digest == whole.digest
    assert seen[-1] == (40, 0)
    with pytest.raises(DataError, match="other texts"):
        chosen.build_index(pool[::-1], tmp_path / "i")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pooling": "mean"}, "pooling is 'weighted_mean' there and 'mean' here"),
        ({"layer": 2}, "layer is 4 there and 2 here"),
        ({"max_length": 50}, "max_length is 128 there and 50 here"),
        ({"template": "{{ messages }}"}, "template is 'tulu' there"),
        ({"model": tiny.base(seed=1)}, "model is"),
    ],
)
def test_queries_of_another_kind_are_refused(tmp_path, change, named):
    store = selector().build_index(some_texts(10), tmp_path / "i")
    other = selector(n_select=2, **change)
    with pytest.raises(DataError, match=named):
        other.use_index(tmp_path / "i")
    with pytest.raises(DataError, match=named):
        other.fit(store, queries=["the cat"])


def test_a_fingerprint_tells_models_apart():
    def print_of(**changes):
        chosen = RepresentationSelector(tiny.model(**changes), tiny.tokenizer())
        return chosen.fingerprint()["model"]

    assert print_of() == print_of()
    assert len({print_of(), print_of(seed=1), print_of(name="mistral")}) == 3
    chosen = RepresentationSelector(tiny.model(), tiny.tokenizer(eos=True))
    assert chosen.fingerprint()["model"] != print_of()


def test_select_for_takes_groups_strategies_and_sources(tmp_path):
    pool, queries = some_texts(60), some_texts(4, seed=1)
    chosen = selector(n_select=5)
    store = chosen.build_index(pool, tmp_path / "i")
    groups, sources = ["x", "y", "x", "x"], ["even", "odd"] * 30
    result = chosen.select_for(queries, 20, groups=groups, sources=sources, already_labeled=[0, 1])
    expected = select_by_queries(
        store, chosen.embed(queries), 20, groups=groups, already_labeled=[0, 1]
    )
    np.testing.assert_array_equal(result.indices, expected.indices)
    assert {groups[query] for query in result.query_of_each[::2]} == {"x"}
    assert {groups[query] for query in result.query_of_each[1::2]} == {"y"}
    odd = int((result.indices % 2).sum())
    assert result.source_counts == {"odd": odd, "even": 20 - odd}
    for strategy in ("global_max", "mean"):
        result = chosen.select_for(queries, strategy=strategy)
        matrix = chosen.score(queries)
        combined = matrix.max(axis=0) if strategy == "global_max" else matrix.mean(axis=0)
        np.testing.assert_array_equal(result.indices, np.argsort(-combined, kind="stable")[:5])


def test_select_for_refuses(tmp_path):
    chosen = selector(n_select=5)
    with pytest.raises(DataError, match="no index"):
        chosen.select_for(["the cat"])
    chosen.build_index(some_texts(6), tmp_path / "i")
    for queries in ([], None, "the cat"):
        with pytest.raises(DataError, match="queries"):
            chosen.select_for(queries)
    with pytest.raises(DataError, match="between 1 and 6"):
        chosen.select_for(["the cat"], 7)
    with pytest.raises(DataError, match="sources"):
        chosen.select_for(["the cat"], sources=["a"])
    with pytest.raises(DataError, match=r"queries\[0\]"):
        chosen.select_for([""])


# The selector -------------------------------------------------------------------------------------


def test_fit_follows_the_conventions():
    rng = np.random.default_rng(0)
    pool = [Sample(text, source=str(rng.choice(["web", "book"]))) for text in some_texts(50)]
    queries = some_texts(3, seed=1)
    base = tiny.base()
    chosen = RepresentationSelector(base, n_select=12)
    again = clone(chosen)
    assert again.get_params(deep=False) == chosen.get_params(deep=False)
    assert again.model is base  # weights are shared
    chosen.fit(pool, queries=queries, already_labeled=[3, 4])
    assert len(set(chosen.selected_indices_) | {3, 4}) == 14
    np.testing.assert_array_equal(
        again.select(pool, 12, queries=queries, already_labeled=[3, 4]), chosen.selected_indices_
    )
    first = chosen.embed([pool[chosen.selected_indices_[0]]])[0] @ chosen.embed(queries)[0]
    assert chosen.reasons()[0] == f"nearest query 0, cosine {first:.2f}"
    assert sum(chosen.source_counts_.values()) == 12
    np.testing.assert_array_equal(
        clone(chosen).fit(iter(pool), queries=queries, already_labeled=[3, 4]).selected_indices_,
        chosen.selected_indices_,
    )
    with pytest.raises(DataError, match="queries"):
        chosen.fit(pool)


def test_a_copy_of_a_query_is_picked_first():
    pool = some_texts(80, seed=2)
    queries = [pool[41], pool[7], pool[60]]
    chosen = selector(n_select=3).fit(pool, queries=queries)
    assert chosen.selected_indices_.tolist() == [41, 7, 60]
    np.testing.assert_allclose(chosen.scores_, 1, atol=1e-5)


def test_shuffling_the_pool_permutes_indices_only():
    pool = list(dict.fromkeys(some_texts(60)))
    order = np.random.default_rng(0).permutation(len(pool))
    queries = some_texts(4, seed=1)
    plain = selector(n_select=15).fit(pool, queries=queries).selected_indices_
    shuffled = selector(n_select=15).fit([pool[row] for row in order], queries=queries)
    np.testing.assert_array_equal(order[shuffled.selected_indices_], plain)


def test_a_named_model_is_loaded_once_and_not_pickled(tmp_path, monkeypatch):
    from bakeoff.models import loading

    calls = []

    def load(name, **options):
        calls.append((name, options))
        return tiny.base()

    monkeypatch.setattr(loading, "load", load)
    chosen = RepresentationSelector("a-model", n_select=2, dtype="bfloat16")
    chosen.fit(some_texts(5), queries=["the cat"])
    picked = clone(chosen).select(some_texts(5), queries=["the cat"])
    np.testing.assert_array_equal(picked, chosen.selected_indices_)
    assert calls == [("a-model", {"dtype": "bfloat16", "device": "cpu"})]
    kept = pickle.dumps(chosen)
    assert len(kept) < 5000
    np.testing.assert_array_equal(pickle.loads(kept).selected_indices_, chosen.selected_indices_)
    chosen.set_params(model="another").embed(["the cat"])
    assert len(calls) == 2


@pytest.mark.model
def test_a_real_model_finds_the_kind_of_text_asked_for(tmp_path):
    code = [f"def f{i}(x):\n    return x * {i} + {i + 1}" for i in range(12)]
    prose = [f"In the year {1800 + i} the town by the river had {i + 2} inns." for i in range(12)]
    pool = [text for pair in zip(code, prose, strict=True) for text in pair]
    chosen = RepresentationSelector("smollm2-135m", n_select=12)
    store = chosen.build_index(pool, tmp_path / "i")
    result = chosen.select_for(["def square(number):\n    return number ** 2"])
    assert (result.indices % 2 == 0).mean() == 1
    assert isinstance(store, VectorStore)
    assert VectorStore.open(tmp_path / "i", chosen.fingerprint()).dimension == 576
