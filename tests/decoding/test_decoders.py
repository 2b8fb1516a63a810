"""Every method answers by name as its own component does, and says what it lacks."""

import math
import re

import numpy as np
import pytest
import torch
from tests.decoding.tiny_decoder import save_decoder

from bakeoff.data.prompts import Prompt
from bakeoff.decoding import (
    Cascade,
    MemoryProblem,
    OrderEnsembleModel,
    PlainOrderModel,
    QuantileScore,
    SetPrompt,
    SetPromptingModel,
    TextGenerator,
    document_reader,
    infill,
    load_reader,
    memory_designs,
    sample_aligned,
)
from bakeoff.decoding.alignment_trie import AlignmentTrie
from bakeoff.decoding.decoders import DECODERS, Generation, Resources, decoder_kind, generate
from bakeoff.decoding.grammar import Grammar
from bakeoff.decoding.winner import load_settings
from bakeoff.errors import DataError
from bakeoff.models import load_language_model

HOW = Generation(max_new_tokens=6)
PROMPTS = [Prompt("one two"), Prompt("the cat sat")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_language_model(str(save_decoder(tmp_path_factory.mktemp("m"), chat=True)))


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    return load_language_model(str(save_decoder(tmp_path_factory.mktemp("f"), infill=True)))


def plain(model, text, n=6):
    ids = model.tokenizer(text, return_tensors="pt")
    out = model.model.generate(**ids, max_new_tokens=n, do_sample=False)
    return out[0, ids.input_ids.shape[1] :]


def test_greedy_is_generate_and_its_log_probability_that_of_one_pass(model):
    for prompt, (answer,) in zip(PROMPTS, generate("greedy", model, PROMPTS, HOW), strict=True):
        new = plain(model, prompt.text)
        assert answer.text == model.tokenizer.decode(new, skip_special_tokens=True)
        assert answer.n_tokens == len(new)
        given = model.tokenizer(prompt.text)["input_ids"]
        ids = torch.tensor([[*given, *new.tolist()]])
        with torch.no_grad():
            logp = model.model(ids).logits.log_softmax(-1)[0, len(given) - 1 : -1]
        expected = logp.gather(1, new[:, None]).sum().item()
        assert answer.log_prob == pytest.approx(expected, abs=1e-4)
        assert 0 < answer.seconds_to_first_token <= answer.seconds


def test_a_document_comes_first(model):
    (found,) = generate("greedy", model, [Prompt("two", document="one")], HOW)
    (expected,) = generate("greedy", model, [Prompt("one\n\ntwo")], HOW)
    assert found[0].text == expected[0].text


def test_chat_is_the_template(model):
    how = Generation(max_new_tokens=6, chat=True)
    (found,) = generate("greedy", model, [Prompt("one")], how)
    (expected,) = generate("greedy", model, [Prompt("<user>one\n<assistant>")], HOW)
    assert found[0].text == expected[0].text
    assert found[0].log_prob == pytest.approx(expected[0].log_prob)


def test_samples_differ_and_repeat(model):
    how = Generation(max_new_tokens=6, n_samples=3, temperature=2.0)
    first = [answer.text for answer in generate("sample", model, PROMPTS, how)[1]]
    assert len(set(first)) == 3
    assert first == [answer.text for answer in generate("sample", model, PROMPTS, how)[1]]


@pytest.mark.parametrize("method", ["gcd", "asap", "adaptive", "rejection"])
def test_constrained_methods_are_sample_aligned(model, method):
    grammar = Grammar.choice(["yes", "no", "maybe"])
    how = Generation(max_new_tokens=12, n_samples=4, seed=3)
    params = {"max_failures": 100_000}
    prompt = [Prompt("the cat")]
    if method in ("adaptive", "rejection"):  # a random model rarely ends where it should
        grammar = re.compile("[a-z ]*")
        how = Generation(max_new_tokens=3, n_samples=2, seed=3)
    (found,) = generate(method, model, prompt, how, resources=Resources(grammar), params=params)
    expected = sample_aligned(
        model,
        None,
        "the cat",
        grammar,
        how.n_samples,
        method=method,
        max_new_tokens=how.max_new_tokens,
        random_state=3,
        **params,
    )
    assert [answer.text for answer in found] == list(expected.texts)
    assert [answer.log_prob for answer in found] == pytest.approx(expected.log_probs.tolist())
    assert sum(answer.facts["weight"] for answer in found) == pytest.approx(1)


def test_a_trie_is_taken_up_and_extended(model):
    trie = AlignmentTrie()
    how = Generation(max_new_tokens=12, n_samples=5)
    resources = Resources(Grammar.choice(["yes", "no"]), trie)
    (first,) = generate("asap", model, PROMPTS[:1], how, resources=resources)
    bound = trie.log_z_upper
    assert bound < 0
    (again,) = generate("asap", model, PROMPTS[:1], how, resources=resources)
    assert trie.log_z_upper <= bound
    assert again[0].facts["model_calls"] <= first[0].facts["model_calls"]


OPTIONS = ("cat", "mat", "three")


@pytest.mark.parametrize(
    ("method", "component", "params"),
    [
        ("plain-order", PlainOrderModel, {}),
        ("sorted-order", PlainOrderModel, {}),
        ("set-based", SetPromptingModel, {}),
        ("set-based", SetPromptingModel, {"edit_mask": False}),
        ("permute-and-vote", OrderEnsembleModel, {"n_orders": 4}),
        ("average-over-orders", OrderEnsembleModel, {"n_orders": 4}),
    ],
)
def test_order_methods_choose_as_their_component(model, method, component, params):
    extra = {"aggregate": "mean"} if method == "average-over-orders" else {}
    reader = component(model, **params, **extra)
    asked = SetPrompt.from_options("which sat?", OPTIONS)
    in_order = {"canonical_order": True} if method == "sorted-order" else {}
    choices = [f' "{option}"' for option in OPTIONS]
    scores = reader.score([asked], [choices], **in_order)[0]
    prompt = Prompt("which sat?", options=OPTIONS)
    ((answer,),) = generate(method, model, [prompt], HOW, params=params)
    assert answer.text == OPTIONS[int(np.argmax(scores))]
    assert list(answer.facts["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


def test_passages_and_marked_sets_are_continued(model):
    passages = ("one two", "three four", "the cat")
    answers = [
        generate("set-based", model, [Prompt("who?", passages=order)], HOW)[0][0]
        for order in (passages, passages[::-1])
    ]
    assert answers[0].text == answers[1].text
    marked = SetPrompt("a ", [["cat", "mat"]], " sat").marked
    ((answer,),) = generate("set-based", model, [Prompt(marked)], HOW)
    assert answer.text == SetPromptingModel(model).generate([marked], max_new_tokens=6)[0]
    assert answer.seconds_to_first_token > 0


def test_infllm_within_its_window_is_greedy(model):
    sizes = {"n_local": 64, "n_init": 4, "block_size": 8, "topk": 2, "exec_chunk": 32}
    prompts = [Prompt("two", document="one"), Prompt("three"), Prompt("sat", document="one")]
    chat = Generation(max_new_tokens=6, chat=True)
    found = generate("infllm", model, prompts, chat, params=sizes)
    plainly = generate("greedy", model, prompts, chat)
    for (mine,), (theirs,) in zip(found, plainly, strict=True):
        assert mine.text == theirs.text
    assert found[0][0].facts["memory"]["tokens"] > 0
    assert model.model.config._attn_implementation != "infllm"


@pytest.mark.parametrize("chat", [False, True])
def test_infllm_asks_as_the_reader_of_a_study_does(model, chat):
    sizes = {"n_local": 32, "n_init": 4, "block_size": 8, "topk": 2, "exec_chunk": 16}
    prompt = Prompt("two", document="the cat sat on a mat. " * 20)
    ((mine,),) = generate("infllm", model, [prompt], Generation(6, chat=chat), params=sizes)
    with document_reader("infllm", model, chat=chat, max_new_tokens=6, **sizes) as reader:
        theirs = reader.read(prompt.document, prompt.text).generate()
    assert mine.text == theirs.text


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("full-attention", {}),
        ("streaming", {"budget": 64}),
        ("truncate-middle", {"budget": 64}),
        ("keep-end", {"budget": 64}),
        ("retrieve", {"budget": 64}),
        ("keep-end", {}),  # all that the model was trained for
        ("streaming", {}),
    ],
)
def test_readers_of_documents_within_their_budget_are_greedy(model, method, params):
    prompt = Prompt("two", document="one two three")
    # Without a template readers put "Answer:" behind the question, where greedy puts nothing.
    chat = Generation(max_new_tokens=6, chat=True)
    ((mine,),) = generate(method, model, [prompt], chat, params=params)
    ((plainly,),) = generate("greedy", model, [prompt], chat)
    assert mine.text == plainly.text
    assert mine.facts["tokens_read"] == mine.facts["document_tokens"]
    with pytest.raises(DataError, match=f"{method} needs a document"):
        generate(method, model, [Prompt("two")], HOW, params=params)


def test_a_cascade_says_who_answered(model, tmp_path):
    options = {"max_new_tokens": 6}
    small = TextGenerator(model, embeddings=True, **options)
    rng = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "the", "cat", "sat", "on", "a", "mat"]
    texts = list(dict.fromkeys(" ".join(rng.choice(words, 4)) for _ in range(80)))
    cascade = Cascade(
        small,
        TextGenerator(model, **options),
        QuantileScore(0.0),
        quality=lambda text, reference: float(len(text) % 2),
        target_rate=0.5,
    ).fit([(text, "") for text in texts])
    cascade.save(tmp_path / "rule.safetensors")
    found = generate(
        "cascade",
        model,
        [Prompt(text) for text in texts[:8]],
        HOW,
        resources=Resources(large=model, rule=tmp_path / "rule.safetensors"),
    )
    expected = cascade.generate(texts[:8])
    assert [answer.text for (answer,) in found] == expected.texts
    who = [answer.facts["answered_by"] for (answer,) in found]
    assert who == [answer.answered_by for answer in expected]


def test_holes_are_filled(filler):
    ((one,),) = generate("infill", filler, [Prompt("one <fill> three")], HOW)
    fill = infill(filler, None, "one ", " three", max_new_tokens=6)
    assert one.text == f"one {fill.text} three"
    ((two,),) = generate("infill", filler, [Prompt("one <fill> three <fill>.")], HOW)
    assert len(two.facts["fills"]) == 2
    assert two.text.startswith("one ")
    assert two.text.endswith(".")


@pytest.mark.parametrize(
    ("method", "prompt", "how", "resources", "params", "message"),
    [
        ("nope", "a", HOW, {}, {}, r"no decoding method 'nope'; there are: greedy \(.*asap"),
        ("asap", "a", HOW, {}, {}, "asap needs a grammar"),
        ("cascade", "a", HOW, {}, {}, "cascade needs a large model"),
        ("greedy", "a", HOW, {"grammar": "x"}, {}, "greedy makes no use of a grammar"),
        ("greedy", "a", Generation(n_samples=2), {}, {}, "greedy gives the same answer every time"),
        ("greedy", Prompt("a", options=("b", "c")), HOW, {}, {}, "prompt 0 has options, which gr"),
        ("greedy", "a", HOW, {}, {"topk": 1}, "greedy takes no parameters; got topk"),
        ("set-based", "a", HOW, {}, {}, r"set-based needs options, passages, or a set"),
        ("infill", "a", HOW, {}, {}, "infill needs <fill> where it is to write"),
    ],
)
def test_what_is_missing_is_named(model, method, prompt, how, resources, params, message):
    prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
    with pytest.raises(DataError, match=message):
        generate(method, model, [prompt], how, resources=Resources(**resources), params=params)


def test_other_bad_input(model, filler):
    with pytest.raises(DataError, match="at least one prompt"):
        generate("greedy", model, [])
    with pytest.raises(DataError, match="has no chat template"):
        generate("greedy", filler, PROMPTS, Generation(chat=True))
    with pytest.raises(DataError, match="a trie belongs to one prompt, got 2"):
        generate("asap", model, PROMPTS, resources=Resources("{}", AlignmentTrie()))
    both = Prompt("a", options=("b", "c"), passages=("d", "e"))
    with pytest.raises(DataError, match="options or passages as its set, not both"):
        generate("set-based", model, [both])
    with pytest.raises(DataError, match="temperature must be above 0, got 0; the method greedy"):
        Generation(temperature=0)
    with pytest.raises(DataError, match="max_new_tokens must be at least 1, got 0"):
        Generation(max_new_tokens=0)


def test_progress_and_the_table(model):
    seen = []
    generate("greedy", model, PROMPTS, HOW, progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]
    assert all(decoder_kind(name).does for name in DECODERS)
    assert not math.isnan(generate("greedy", model, PROMPTS, HOW)[0][0].log_prob)


@pytest.mark.parametrize("design", memory_designs(), ids=lambda design: design.name)
def test_every_winner_among_readers_can_be_taken_up(design, tmp_path):
    folder = save_decoder(tmp_path / "model")
    document = "the cat sat on a mat. " * 9
    asked = [Prompt("who?", ("cat",), document=document), Prompt("what?", ("mat",), (), (), "one")]
    sizes = {"n_init": 4, "n_local": 32, "block_size": 8, "topk": 2, "exec_chunk": 16}
    problem = MemoryProblem(asked, model=str(folder), max_new_tokens=4, **sizes)
    problem.export(design, tmp_path, tmp_path / "winner")
    settings = load_settings(tmp_path / "winner")
    how = Generation(settings.extra["max_new_tokens"], chat=settings.extra["chat"])
    model = load_language_model(settings.model)
    ((mine,),) = generate(settings.method, model, asked[:1], how, params=settings.params)
    with load_reader(tmp_path / "winner") as reader:
        assert mine.text == reader.read(document, "who?").generate().text
