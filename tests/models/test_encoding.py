from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import tiny

from bakeoff.errors import DataError, ModelError
from bakeoff.models import embed_batch, encode
from bakeoff.models.encoding import token_budget_batches

WINDOW = 24


def texts_of_all_lengths(n: int = 70, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    drawn = [" ".join(rng.choice(tiny.WORDS, size=rng.integers(1, 20))) for _ in range(n)]
    return ["", *drawn, drawn[3], "the", " the  cat "]


def sentence_transformer(tmp_path, name="bert", pooling="mean", **options):
    """Return a model made of stock modules around a tiny random backbone."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
    from transformers import BertConfig, BertModel

    folder = tmp_path / name
    torch.manual_seed(1)
    if name == "bert":
        shape = {**tiny.SHAPE, "initializer_range": 0.2}
        BertModel(BertConfig(**shape), add_pooling_layer=False).save_pretrained(folder)
    else:
        tiny.model(name).save_pretrained(folder)
    tokenizer = tiny.tokenizer(eos=True)
    tokenizer.padding_side = "left" if name == "llama" else "right"
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=WINDOW)
    include_prompt = options.pop("include_prompt", True)
    modules = [transformer, Pooling(32, pooling_mode=pooling, include_prompt=include_prompt)]
    if pooling == "mean":
        modules += [Dense(32, 20), Normalize()]
    prompts = {"query": "the dog saw ", "none": ""}
    return SentenceTransformer(modules=modules, prompts=prompts, device="cpu", **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sentence_transformer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def threads():
    """A function that sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("bert", "mean"), ("bert", "cls"), ("bert", "max"), ("llama", "lasttoken"), ("qwen3", "mean")],
)
@pytest.mark.parametrize(("batch_tokens", "n_threads"), [(1, 1), (40, 3), (None, 2)])
def test_gives_the_vectors_of_sentence_transformers(
    tmp_path, threads, name, pooling, batch_tokens, n_threads
):
    threads(n_threads)
    model = sentence_transformer(tmp_path, name, pooling)
    texts = texts_of_all_lengths()
    # A random BERT's vectors differ by 0.1 and more between texts, so 1e-5 is a strict demand.
    assert np.ptp(model.encode(texts), axis=0).max() > 0.1
    np.testing.assert_allclose(
        encode(model, texts, batch_tokens=batch_tokens), model.encode(texts), atol=1e-5
    )


def test_batches_run_side_by_side_and_the_number_of_threads_comes_back(model, threads):
    threads(3)
    running, most, seen = 0, 0, set()
    lock = threading.Lock()

    def enter(*_):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            seen.add((threading.current_thread().name, torch.get_num_threads()))
        time.sleep(0.01)

    def leave(*_):
        nonlocal running
        with lock:
            running -= 1

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    try:
        encode(model, texts_of_all_lengths(), batch_tokens=40)
    finally:
        for hook in hooks:
            hook.remove()
    assert most == 3
    assert {n for name, n in seen if name.startswith("encode")} == {1}
    assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_modules_of_unknown_origin_see_one_batch_at_a_time(model, threads):
    from sentence_transformers import SentenceTransformer

    class Remembers(torch.nn.Module):
        def forward(self, features):
            self.batch = features["sentence_embedding"]
            time.sleep(0.001)
            return {**features, "sentence_embedding": self.batch * 2}

    threads(3)
    doubled = SentenceTransformer(modules=[*model, Remembers()], device="cpu")
    texts = texts_of_all_lengths()
    np.testing.assert_allclose(
        encode(doubled, texts, batch_tokens=40), 2 * encode(model, texts), atol=1e-5
    )


def test_an_error_in_a_module_reaches_the_caller(model, threads):
    threads(2)
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            encode(model, texts_of_all_lengths(), batch_tokens=40)
    finally:
        hook.remove()
    assert torch.get_num_threads() == 2


def test_depends_neither_on_order_nor_on_the_other_texts(model):
    texts = texts_of_all_lengths()
    whole = encode(model, texts)
    order = np.random.default_rng(1).permutation(len(texts))
    np.testing.assert_allclose(encode(model, [texts[i] for i in order]), whole[order], atol=1e-5)
    alone = np.concatenate([encode(model, [text]) for text in texts])
    np.testing.assert_allclose(alone, whole, atol=1e-5)


def test_many_windows_are_read_ahead_and_joined_in_order(model, monkeypatch):
    import sys

    module = sys.modules["bakeoff.models.encoding"]
    monkeypatch.setattr(module, "_FIRST_WINDOW", 5)
    monkeypatch.setattr(module, "_WINDOW", 7)
    texts = texts_of_all_lengths()
    np.testing.assert_allclose(encode(model, texts), model.encode(texts), atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_are_those_of_sentence_transformers(tmp_path, include_prompt):
    model = sentence_transformer(tmp_path, include_prompt=include_prompt)
    texts = texts_of_all_lengths(20)
    for given_prompt in ({"prompt_name": "query"}, {"prompt": "a red mat "}, {"prompt": ""}):
        vectors = encode(model, texts, **given_prompt)
        np.testing.assert_allclose(vectors, model.encode(texts, **given_prompt), atol=1e-5)
    assert np.abs(encode(model, texts, prompt_name="query") - encode(model, texts)).max() > 0.1


def test_default_prompt_and_truncated_dimensions_are_respected(tmp_path):
    model = sentence_transformer(tmp_path, default_prompt_name="query", truncate_dim=8)
    texts = texts_of_all_lengths(20)
    vectors = encode(model, texts, normalize=True)
    np.testing.assert_allclose(vectors, model.encode(texts, normalize_embeddings=True), atol=1e-5)
    assert vectors.shape[1] == 8
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_first_module_that_is_no_transformer_works_too(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    words = StaticEmbedding(tiny.tokenizer().backend_tokenizer, embedding_dim=12)
    model = SentenceTransformer(modules=[words], device="cpu")
    texts = [text for text in texts_of_all_lengths() if text]
    np.testing.assert_allclose(encode(model, texts), model.encode(texts), atol=1e-5)


def test_equal_texts_are_computed_once(model):
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]["input_ids"])))
    try:
        vectors = encode(model, ["the cat", "a dog", "the cat", "the cat"])
    finally:
        hook.remove()
    assert sum(seen) == 2
    assert (vectors[0] == vectors[2]).all()
    assert (vectors[0] == vectors[3]).all()


def test_padding_costs_at_most_what_it_saves(model):
    batches = []
    hook = model.register_forward_pre_hook(
        lambda _, args: batches.append(args[0]["attention_mask"])
    )
    try:
        encode(model, texts_of_all_lengths(300), batch_tokens=256)
    finally:
        hook.remove()
    assert all(mask.numel() <= 256 for mask in batches)
    assert all((mask == 0).sum() <= 64 for mask in batches)
    total = sum(mask.numel() for mask in batches)
    assert sum(mask.sum() for mask in batches) > 0.9 * total


def masks_seen(model, run):
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]["attention_mask"]))
    try:
        run()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "pooling"), [("bert", "mean"), ("bert", "cls"), ("llama", "lasttoken")]
)
@pytest.mark.parametrize("prompt", [None, "the dog saw "])
def test_a_batch_has_the_vectors_and_gradients_of_one_padded_pass(tmp_path, name, pooling, prompt):
    model = sentence_transformer(tmp_path, name, pooling, include_prompt=False).eval()
    texts = texts_of_all_lengths(40)
    weights = torch.randn(len(texts), model.get_embedding_dimension())

    def gradients(one_pass):
        model.zero_grad()
        vectors = embed_batch(model, texts, prompt=prompt, one_pass=one_pass)
        (vectors * weights).sum().backward()
        return vectors.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, expected = gradients(True)
    assert torch.allclose(
        whole, model(model.preprocess(texts, prompt=prompt))["sentence_embedding"]
    )
    vectors, found = gradients(False)
    assert torch.allclose(vectors, whole, atol=1e-5)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max().clamp_min(1)))


def test_short_texts_of_a_batch_are_not_padded_to_the_long_ones(model):
    texts = ["the cat"] * 30 + [" ".join(["dog"] * 20)] * 30
    passes = masks_seen(model, lambda: embed_batch(model, texts))
    assert sum(len(mask) for mask in passes) == 60
    assert all((mask == 0).sum() <= 64 for mask in passes)
    (whole,) = masks_seen(model, lambda: embed_batch(model, texts, one_pass=True))
    assert whole.shape[0] == 60
    assert sum(mask.numel() for mask in passes) < 0.7 * whole.numel()


def test_what_looks_at_the_whole_batch_sees_it(tmp_path):
    from sentence_transformers import SentenceTransformer

    class Standardise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(20)

        def forward(self, features):
            features["sentence_embedding"] = self.norm(features["sentence_embedding"])
            return features

    inner = sentence_transformer(tmp_path)
    model = SentenceTransformer(modules=[*inner.children(), Standardise()], device="cpu").train()
    vectors = embed_batch(model, texts_of_all_lengths(40))
    assert torch.allclose(vectors.mean(dim=0), torch.zeros(20), atol=1e-5)


def test_no_texts_give_no_rows_of_the_right_width(model):
    assert encode(model, []).shape == (0, 20)
    assert encode(model, []).dtype == np.float32


def test_texts_beyond_the_window_are_reported(model, caplog):
    # The window holds 23 words and </s>.
    exact, longer = " ".join(["cat"] * (WINDOW - 1)), " ".join(["cat"] * WINDOW)
    texts = [longer, "the", exact, longer, longer + " dog"]
    reports: list[list[int]] = []
    encode(model, texts, on_truncated=reports.append)
    assert reports == [[0, 3, 4]]
    encode(model, [exact], on_truncated=reports.append)
    assert len(reports) == 1
    with caplog.at_level(logging.WARNING):
        encode(model, texts)
    assert "3 of 5 texts are longer than the model's 24 tokens" in caplog.text


def test_progress_ends_at_the_number_of_texts(model):
    steps: list[tuple[int, int]] = []
    texts = texts_of_all_lengths()
    encode(model, texts, batch_tokens=50, progress=lambda done, total: steps.append((done, total)))
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert steps[-1] == (len(texts), len(texts))


def test_a_folder_serves_and_dropout_does_not_disturb(tmp_path, model):
    model.save(str(tmp_path / "saved"))
    model.train()
    texts = texts_of_all_lengths(10)
    np.testing.assert_allclose(encode(model, texts), encode(tmp_path / "saved", texts), atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("the cat", "texts must be a list of strings, got a single one"),
        (["the", None], r"texts\[1\] must be a string, got NoneType"),
        (["the", "a", float("nan")], r"texts\[2\] must be a string, got float: nan"),
        ([b"the"], r"texts\[0\] must be a string, got bytes"),
    ],
)
def test_what_is_not_text_is_named(model, texts, message):
    with pytest.raises(DataError, match=message):
        encode(model, texts)


def test_wrong_arguments_are_named(model, tmp_path):
    with pytest.raises(ModelError, match=r"no prompt 'qury'; its prompts are: 'query'"):
        encode(model, ["a"], prompt_name="qury")
    with pytest.raises(ModelError, match="there is no folder"):
        encode(tmp_path / "absent", ["a"])
    with pytest.raises(ModelError, match="must be a SentenceTransformer or a folder, got Linear"):
        encode(torch.nn.Linear(2, 2), ["a"])
    with pytest.raises(ValueError, match="batch_tokens must be positive, got 0"):
        encode(model, ["a"], batch_tokens=0)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 600), st.integers(0, 100))
def test_batches_cover_every_text_within_the_budget(lengths, budget, pass_cost):
    batches = list(token_budget_batches(lengths, budget, pass_cost))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
        assert sum(longest - lengths[i] for i in batch) <= pass_cost


@pytest.mark.model
def test_packaged_encoder_gives_the_same_vectors():
    from sentence_transformers import SentenceTransformer

    from bakeoff.models import pull

    model = SentenceTransformer(str(pull("all-minilm-l6-v2")), device="cpu")
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "", "Taxes rose again. " * 90]
    vectors = encode(model, texts, on_truncated=lambda cut: None)
    np.testing.assert_allclose(vectors, model.encode(texts), atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[3] + 0.2
