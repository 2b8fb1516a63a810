"""Readers against the model itself, a dense attention in numpy, and each other."""

import json
import re

import numpy as np
import pytest
import torch
from tests.decoding.test_block_memory import rotary, rotated, run, tensors
from tests.selection.tiny_selection import save_encoder, save_language_model

from bakeoff.decoding.block_memory import BlockStore, MemorySettings, WindowLayer
from bakeoff.decoding.document_baselines import (
    READERS,
    CuttingReader,
    FullReader,
    MemoryReader,
    RetrievingReader,
    WindowReader,
    cache_bytes,
    document_reader,
    load_reader,
)
from bakeoff.decoding.winner import Settings, save_settings
from bakeoff.errors import DataError
from bakeoff.models import TextEncoder, load_language_model

FACT = "The pass key is 4711, said the cat."
PARAGRAPHS = [
    "A tree grows in the yard. It is old.",
    "Dogs ran under the mat.",
    FACT,
    "Rain fell all day on the red roof, and nobody saw it.",
    "The last words are these.",
]
DOCUMENT = "\n\n".join(PARAGRAPHS)
QUESTION = "What is the pass key?"
SIZES = {"n_init": 4, "n_local": 60, "block_size": 8, "topk": 4, "repr_topk": 2, "exec_chunk": 16}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="module")
def model(folder):
    return load_language_model(save_language_model(folder / "base"))


@pytest.fixture(scope="module")
def chat_model(folder):
    path = save_language_model(folder / "chat")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_language_model(path)


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder(save_encoder(folder / "encoder"))


def whole(document=DOCUMENT, question=QUESTION):
    return f"{document}\n\n{question}\nAnswer:"


def text_of(read, model):
    return model.tokenizer.decode(read.prompt_ids)


def log_probs(model, ids):
    """Log-probability of each token but the first, by one plain pass."""
    ids = torch.tensor(ids)[None]
    with torch.no_grad():
        logits = model.model(ids).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]


def results(read, answer="4711"):
    return read.log_probability(answer), read.end_log_probability, read.generate(8).text


# The window ---------------------------------------------------------------------------------------


def dense_window(q, k, v, n_init, window):
    """Attend to the first tokens, at a capped distance, and to the window; token by token."""
    n_heads, n_tokens, width = q.shape
    group = n_heads // k.shape[0]
    output = np.zeros_like(q)
    for i in range(n_tokens):
        near = np.arange(max(0, i - window + 1), i + 1)
        far = np.arange(min(n_init, max(0, i - window + 1)))
        for h in range(n_heads):
            keys, values = k[h // group], v[h // group]
            close = rotated(keys[near], near) @ rotated(q[h, i], i)
            distant = keys[far] @ rotated(q[h, i], window - 1)
            logits = np.concatenate((distant, close)) * width**-0.5
            weights = np.exp(logits - logits.max())
            output[h, i] = weights / weights.sum() @ values[np.concatenate((far, near))]
    return output


@pytest.mark.parametrize("calls", [[150], [1] * 150, [7, 50, 1, 1, 91], [40] * 3 + [30]])
@pytest.mark.parametrize("sizes", [(4, 32, 16), (0, 20, 20), (30, 9, 5), (4, 200, 64)])
def test_a_window_with_first_tokens_is_a_dense_attention(sizes, calls):
    n_init, window, chunk = sizes
    q, k, v = tensors(150)
    settings = MemorySettings(n_init, window, 1, 0, 1, chunk, True)
    layer = WindowLayer(settings, rotary(), BlockStore("cpu"))
    found = run(layer, q, k, v, calls)
    expected = dense_window(*(x[0].numpy() for x in (q, k, v)), n_init, window)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)
    assert layer.n_blocks == 0
    assert layer.length == 150


def test_a_copy_of_a_window_goes_on_alike():
    q, k, v = tensors(90)
    layer = WindowLayer(MemorySettings(4, 32, 1, 0, 1, 16, True), rotary(), BlockStore("cpu"))
    run(layer, *(x[:, :, :60] for x in (q, k, v)), [60])
    twin = layer.copied(layer.store)
    assert type(twin) is WindowLayer
    rest = [x[:, :, 60:] for x in (q, k, v)]
    torch.testing.assert_close(
        run(twin, *rest, [30]), run(layer, *rest, [10, 20]), atol=1e-6, rtol=0
    )


def test_what_a_window_keeps_does_not_grow(model):
    kept = []
    for repeats in (6, 12):
        with WindowReader(model, budget=64, n_init=4, exec_chunk=16) as reader:
            kept.append(reader.read(DOCUMENT * repeats, QUESTION).generate(4).memory_bytes)
    assert kept[0] == kept[1]


# Readers and the model itself ---------------------------------------------------------------------


def test_full_reading_is_the_model_itself(model):
    read = FullReader(model).read(DOCUMENT, QUESTION, n_scored=20)
    ids = model.tokenizer(whole())["input_ids"]
    assert read.prompt_ids == ids
    answer = model.tokenizer(" 4711")["input_ids"]
    expected = log_probs(model, ids + answer)
    assert read.log_probability("4711") == pytest.approx(float(expected[-5:].mean()), abs=1e-5)
    n_document = len(model.tokenizer(DOCUMENT)["input_ids"])
    of_end = expected[n_document - 20 : n_document - 1]
    assert len(of_end) == 19
    assert read.end_log_probability == pytest.approx(float(of_end.mean()), abs=1e-5)
    continued = model.model.generate(
        torch.tensor([ids]), max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    found = read.generate(9)
    assert found.text == model.tokenizer.decode(continued[0, len(ids) :], skip_special_tokens=True)
    assert found.n_tokens == continued.shape[1] - len(ids)
    assert 0 < read.seconds < found.seconds_to_first_token
    config = model.model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert found.memory_bytes == per_token * (len(ids) + found.n_tokens - 1)


def test_the_end_is_predicted_alike_in_passing_and_apart(model):
    reader = FullReader(model)
    before, text, _ = reader._parts(DOCUMENT, QUESTION)
    in_passing = reader.read(DOCUMENT, QUESTION, n_scored=30).end_log_probability
    assert reader._end_log_probability(before, text, 30) == pytest.approx(in_passing, abs=1e-5)
    assert reader.read(DOCUMENT, QUESTION).end_log_probability is None


@pytest.mark.parametrize("method", list(READERS))
def test_with_room_for_everything_every_reader_reads_alike(method, model, encoder):
    arguments = {
        "full-attention": {},
        "infllm": {**SIZES, "n_local": 400},
    }.get(method, {"budget": 600})
    expected = FullReader(model).read(DOCUMENT, QUESTION, n_scored=20)
    with document_reader(method, model, **arguments) as reader:
        read = reader.read(DOCUMENT, QUESTION, n_scored=20)
        found = results(read)
        assert read.n_kept == read.n_document == expected.n_document
    assert read.prompt_ids == expected.prompt_ids
    assert found[:2] == pytest.approx(results(expected)[:2], abs=1e-5)
    assert found[2] == results(expected)[2]


@pytest.mark.parametrize("method", ["streaming", "infllm"])
def test_answers_do_not_disturb_what_was_read_and_the_model_is_restored(method, model):
    before = results(FullReader(model).read(DOCUMENT, QUESTION, n_scored=20))
    sizes = SIZES if method == "infllm" else {"budget": 96}
    with document_reader(method, model, **sizes) as reader:
        read = reader.read(DOCUMENT, QUESTION, n_scored=20)
        one = results(read)
        assert results(read) == one
        assert one[:2] != pytest.approx(before[:2], abs=1e-4)
        # Reading in other pieces, or after another document, changes nothing.
        reader.read(DOCUMENT[::-1], QUESTION)
        assert results(reader.read(DOCUMENT, QUESTION, n_scored=20)) == pytest.approx(one, abs=1e-6)
    assert results(FullReader(model).read(DOCUMENT, QUESTION, n_scored=20)) == before


def test_a_window_scores_an_answer_at_once_as_token_by_token(model):
    with WindowReader(model, budget=64, n_init=4, exec_chunk=16) as reader:
        read = reader.read(DOCUMENT, QUESTION)
        at_once = read.log_probability("4711 is it")
        reader.looks_up_by_token = True
        assert read.log_probability("4711 is it") == pytest.approx(at_once, abs=1e-5)


def test_blocks_on_disk_are_not_in_memory(model):
    found = {}
    for offload in ("cpu", "disk"):
        with MemoryReader(model, **SIZES, offload=offload, max_cached_blocks=4) as reader:
            read = reader.read(DOCUMENT * 4, QUESTION)
            found[offload] = (*results(read), read.generate(4).memory_bytes)
    assert found["cpu"][:3] == found["disk"][:3]
    assert found["disk"][3] < found["cpu"][3]


def test_the_size_of_a_cache_is_that_of_its_tensors():
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 7, 8), torch.zeros(1, 2, 7, 8), layer)
    assert cache_bytes(cache) == 3 * 2 * (2 * 7 * 8) * 4


# What budget readers read -------------------------------------------------------------------------


def room(budget, max_new_tokens):
    """How much of a document fits: bytes are tokens."""
    return budget - len("\n\n" + QUESTION + "\nAnswer:") - max_new_tokens


@pytest.mark.parametrize("keep", ["both ends", "end"])
def test_cutting_fills_the_budget_to_the_token(model, keep):
    reader = CuttingReader(model, budget=120, keep=keep, max_new_tokens=8)
    read = reader.read(DOCUMENT, QUESTION)
    n = room(120, 8)
    assert read.n_kept == n
    assert len(read.prompt_ids) + 8 == 120
    head = n // 2 if keep == "both ends" else 0
    assert text_of(read, model) == whole(DOCUMENT[:head] + DOCUMENT[len(DOCUMENT) - n + head :])


def test_retrieval_takes_the_passage_with_the_answer_in_the_documents_order(model):
    budget = 110
    reader = RetrievingReader(model, budget=budget, max_new_tokens=8)
    read = reader.read(DOCUMENT, QUESTION)
    assert read.n_kept <= room(budget, 8)
    kept = text_of(read, model).removesuffix(whole(""))
    assert FACT in kept
    pieces = [part for part in kept.split("\n\n") if part]
    assert pieces == [part for part in PARAGRAPHS if part in pieces]
    assert len(pieces) > 1


def test_retrieval_by_meaning_takes_the_nearest_by_cosine(model, encoder):
    reader = RetrievingReader(model, budget=110, by="meaning", encoder=encoder, max_new_tokens=8)
    kept = text_of(reader.read(DOCUMENT, QUESTION), model)
    vectors = encoder.encode([QUESTION, *(f"{part}\n\n" for part in PARAGRAPHS)])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    left, expected = room(110, 8), []
    lengths = [len(part) + 2 for part in PARAGRAPHS[:-1]] + [len(PARAGRAPHS[-1])]
    for row in np.argsort(-(unit[1:] @ unit[0]), kind="stable"):
        if lengths[row] <= left:
            expected.append(row)
            left -= lengths[row]
    assert [row for row, part in enumerate(PARAGRAPHS) if part in kept] == sorted(expected)


def test_to_predict_the_end_retrieval_reads_the_newest_and_what_is_like_it(model):
    reader = RetrievingReader(model, budget=90, max_new_tokens=8)
    _, text, _ = reader._parts(f"{DOCUMENT}\n\nThe cat said the pass key is ", QUESTION)
    kept = reader.choose_before(text, len(text), 80)
    assert len(kept) <= 80
    assert kept[-40:].tolist() == list(range(len(text) - 40, len(text)))
    assert FACT in "".join(text.text[i] for i in kept)
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize("limit", [1, 7, 30, 1000])
def test_passages_tile_the_document_and_keep_short_paragraphs_whole(model, limit):
    _, text, _ = FullReader(model)._parts(f"\n\n{DOCUMENT}\n\n \n\nEnd", QUESTION)
    spans = text.passages(limit)
    assert [spans[0][0], *(end for _, end in spans)] == [*(start for start, _ in spans), len(text)]
    assert all(0 < end - start <= limit for start, end in spans)
    pieces = [text.slice(*span) for span in spans]
    assert "".join(pieces) == text.text
    for paragraph in PARAGRAPHS:
        if len(paragraph) + 6 <= limit:
            assert paragraph in [piece.strip() for piece in pieces]
    if limit == 30:  # sentences stay whole where they fit
        assert "A tree grows in the yard." in [piece.strip() for piece in pieces]


def test_a_document_without_words_can_be_retrieved_from(model):
    reader = RetrievingReader(model, budget=80, max_new_tokens=4)
    assert reader.read(" \n" * 200, "?").n_kept > 0


# Chat templates and special tokens ----------------------------------------------------------------


def test_a_chat_template_goes_around_document_and_question(chat_model):
    reader = CuttingReader(chat_model, budget=400)
    assert reader.uses_chat
    read = reader.read(DOCUMENT, QUESTION)
    assert text_of(read, chat_model) == f"[user]{DOCUMENT}\n\n{QUESTION}[answer]"
    ids = read.prompt_ids + chat_model.tokenizer("4711")["input_ids"]  # no space before it
    expected = log_probs(chat_model, ids)[-4:].mean()
    assert read.log_probability("4711") == pytest.approx(float(expected), abs=1e-5)
    plain = CuttingReader(chat_model, budget=400, chat=False).read(DOCUMENT, QUESTION)
    assert text_of(plain, chat_model) == whole()


def test_a_beginning_token_comes_once(folder):
    from tests.selection.tiny_selection import byte_tokenizer

    path = save_language_model(folder / "bos")
    byte_tokenizer(bos=True).save_pretrained(path)
    model = load_language_model(path)
    read = FullReader(model).read(DOCUMENT, QUESTION)
    assert read.prompt_ids == model.tokenizer(whole())["input_ids"]
    assert read.prompt_ids.count(1) == 1


# Refusals -----------------------------------------------------------------------------------------


def test_readers_that_patch_are_used_in_a_with_block(model):
    for reader in (WindowReader(model, budget=64), MemoryReader(model, **SIZES)):
        with pytest.raises(DataError, match="use it in a with block"):
            reader.read(DOCUMENT, QUESTION)
        with reader:
            read = reader.read(DOCUMENT, QUESTION)
        with pytest.raises(DataError, match="use it in a with block"):
            read.generate()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("keep-end", {"budget": 0}, "budget must be between 1 and 1024, .* got 0"),
        ("keep-end", {"budget": 5000}, "the longest input of .*, got 5000"),
        ("streaming", {"budget": 8, "n_init": 8}, r"n_init must be between 0 and budget - 1 \(7\)"),
        ("retrieve", {"budget": 90, "by": "smell"}, "by must be 'words' or 'meaning', got 'smell'"),
        ("retrieve", {"budget": 90, "by": "meaning"}, "needs an encoder"),
        ("retrieve", {"budget": 90, "passage_tokens": 0}, "passage_tokens must be at least 1"),
        ("keep-end", {"budget": 90, "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("full-attention", {"chat": True}, "has no chat template"),
        ("telepathy", {}, "there is no reader 'telepathy'; there are: full-attention, streaming"),
    ],
)
def test_bad_arguments_are_refused(model, method, arguments, message):
    with pytest.raises(DataError, match=message):
        document_reader(method, model, **arguments)
    if method == "keep-end":
        with pytest.raises(DataError, match="keep must be 'both ends' or 'end'"):
            CuttingReader(model, budget=90, keep="middle")


def test_what_cannot_be_read_is_refused(model, chat_model):
    with pytest.raises(DataError, match="answer has no tokens: ''"):
        FullReader(chat_model).read(DOCUMENT, QUESTION).log_probability("")
    with pytest.raises(DataError, match="document has no tokens"):
        FullReader(model).read("", QUESTION)
    with pytest.raises(DataError, match=r"budget must be larger than 40, .* got 40"):
        CuttingReader(model, budget=40, max_new_tokens=9).read(DOCUMENT, QUESTION)
    with pytest.raises(DataError, match=r"fit into the 1,024 that .* was trained for"):
        FullReader(model).read("a" * 1100, QUESTION)


# Leaving ------------------------------------------------------------------------------------------


def test_settings_make_the_reader_again(model, folder, tmp_path):
    settings = Settings(
        "infllm", "infllm", SIZES, str(folder / "base"), {"max_new_tokens": 6, "chat": False}
    )
    save_settings(tmp_path / "won", settings, usage=[])
    with MemoryReader(model, **SIZES) as reader:
        expected = results(reader.read(DOCUMENT, QUESTION))
    with load_reader(tmp_path / "won") as reader:
        assert reader.max_new_tokens == 6
        assert results(reader.read(DOCUMENT, QUESTION)) == expected
    other = Settings("greedy", "greedy", {}, str(folder / "base"))
    save_settings(tmp_path / "other", other, usage=[])
    with pytest.raises(DataError, match=re.escape("holds greedy, which reads no documents")):
        load_reader(tmp_path / "other")
