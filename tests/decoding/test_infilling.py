"""Prompts and stops by scripted models that copy, plain generate, and one trained in seconds."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from bakeoff.decoding.codegen2 import (
    InfillTokens,
    SpanCorruption,
    add_infill_tokens,
    corrupt_spans,
    plain_ids,
    psm,
    spm,
    train_decoder,
)
from bakeoff.decoding.infilling import (
    LAYOUTS,
    format_infill,
    infill,
    infill_batch,
    infill_holes,
    infill_holes_losses,
    infill_losses,
    infill_prompt,
)
from bakeoff.errors import DataError
from bakeoff.models import LanguageModel

TEXT = "def f(x):\n    return x + 1  # <sep> ümlaut\n"


def byte_tokenizer():
    from bakeoff.models.small_gpt import _byte_pair_tokenizer

    tokenizer = _byte_pair_tokenizer([TEXT] * 20, 300, 4096)
    add_infill_tokens(tokenizer, max_sentinels=4)
    return tokenizer


TOKENIZER = byte_tokenizer()
TOKENS = InfillTokens.of(TOKENIZER)


class Scripted(LlamaForCausalLM, GenerationMixin):
    """A model without weights worth the name: `script` says which token follows which ids."""

    def __init__(self, script, context=512):
        small = {"vocab_size": len(TOKENIZER), "max_position_embeddings": context}
        super().__init__(tiny.config(**small, num_hidden_layers=1))
        self.script = script
        self.eval()

    def forward(self, input_ids=None, attention_mask=None, **_):
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
        for row, ids in enumerate(input_ids.tolist()):
            full = attention_mask is None
            real = [True] * len(ids) if full else attention_mask[row, : len(ids)].bool().tolist()
            seen = [token for token, keep in zip(ids, real, strict=True) if keep]
            logits[row, -1, self.script(seen)] = 9.0
        return CausalLMOutputWithPast(logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def copy_the_suffix(seen):
    """Write what follows the hole, then the end of the mask: every layout says where that is."""
    _, after, middle = TOKENS.fim
    if TOKENS.separator in seen:  # prefix mask suffix eot sep mask ...
        at = seen.index(TOKENS.masks[0])
        suffix = seen[at + 1 : seen.index(TOKENS.separator) - 1]
        written = len(seen) - 1 - (len(seen) - 1 - seen[::-1].index(TOKENS.masks[0]))
    else:
        suffix = seen[seen.index(after) + 1 :]
        suffix = suffix[: suffix.index(middle) if middle in suffix else None]
        written = len(seen) - 1 - seen.index(middle)
        if seen[1] == after:  # the prefix stands between the marker and what is written
            written -= copy_the_suffix.n_prefix
    return suffix[written] if written < len(suffix) else TOKENS.end_of_mask


def language_model(vocab_size=None, **changes):
    torch.manual_seed(3)
    size = vocab_size or len(TOKENIZER)
    return LlamaForCausalLM(
        tiny.config(vocab_size=size, initializer_range=0.2, eos_token_id=None, **changes)
    ).eval()


# Layouts ------------------------------------------------------------------------------------------


def test_the_published_format():
    assert format_infill("def f():\n    ", "    return name") == (
        "def f():\n    <mask_1>    return name<|endoftext|><sep><mask_1>"
    )
    with pytest.raises(DataError, match="suffix spells out '<eom>'"):
        format_infill("a", "b<eom>")
    # The ids are what the tokenizer makes of the string.
    ids = infill_prompt(TOKENIZER, "def f(", "return x")
    text = format_infill("def f(", "return x", eot=TOKENIZER.eos_token)
    assert ids == TOKENIZER(text, add_special_tokens=False).input_ids


texts = st.text(st.sampled_from("def f(x):\n <sep>mask_1ü"), max_size=30)


@settings(max_examples=100, deadline=None)
@given(prefix=texts, middle=texts.filter(bool), suffix=texts)
def test_prompt_and_fill_are_what_training_writes(prefix, middle, suffix):
    parts = [plain_ids(TOKENIZER, text) for text in (prefix, middle, suffix)]
    cuts = (len(parts[0]), len(parts[0]) + len(parts[1]))
    whole = [token for part in parts for token in part]
    for layout, written in (
        ("codegen2", corrupt_spans(whole, [cuts], TOKENS)),
        ("psm", psm(whole, cuts, TOKENS)),
        ("spm", spm(whole, cuts, TOKENS)),
    ):
        prompt = infill_prompt(TOKENIZER, prefix, suffix, layout=layout)
        assert [*prompt, *parts[1], TOKENS.end_of_mask] == written
        assert sum(token in TOKENS.control for token in prompt) == 3
    # Sentinels spelled out in the text are characters, and come back as such.
    assert TOKENIZER.decode(whole) == prefix + middle + suffix


@settings(max_examples=100, deadline=None)
@given(prefix=texts, suffix=texts, room=st.integers(5, 40), layout=st.sampled_from(LAYOUTS))
def test_a_long_prompt_keeps_what_is_near_the_hole(prefix, suffix, room, layout):
    prompt = infill_prompt(TOKENIZER, prefix, suffix, layout=layout, max_tokens=room)
    full = infill_prompt(TOKENIZER, prefix, suffix, layout=layout)
    assert len(prompt) == min(room, len(full))
    before, after = plain_ids(TOKENIZER, prefix), plain_ids(TOKENIZER, suffix)
    if layout == "codegen2":
        at = prompt.index(TOKENS.masks[0])
        kept, following = prompt[:at], prompt[at + 1 : -3]
        assert kept == before[len(before) - len(kept) :]
        assert following == after[: len(following)]
        # Neither side is cut while the other has more than half of the room.
        if len(kept) < len(before):
            assert len(following) <= (room - 4) // 2 or len(after) == len(following) == 0
    if layout == "left-to-right" and before:
        assert prompt == before[-room:]


@pytest.mark.parametrize("layout", ["codegen2", "psm", "spm"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_model_that_copies(layout, batch_size):
    model = Scripted(copy_the_suffix)
    pairs = [("def f(", "x):\n"), ("def g(", "return x + 1"), ("f(((((", "x")]
    assert len({len(plain_ids(TOKENIZER, prefix)) for prefix, _ in pairs}) > 1
    fills = []
    if layout == "spm":  # the script has to know where the prefix ends
        for pair in pairs:
            copy_the_suffix.n_prefix = len(plain_ids(TOKENIZER, pair[0]))
            fills += infill_batch(model, TOKENIZER, [pair], layout=layout)
    else:
        fills = infill_batch(model, TOKENIZER, pairs, layout=layout, batch_size=batch_size)
    assert [fill.text for fill in fills] == [suffix for _, suffix in pairs]
    assert {fill.stopped for fill in fills} == {"end of mask"}
    assert [list(fill.ids) for fill in fills] == [plain_ids(TOKENIZER, s) for _, s in pairs]


@pytest.mark.parametrize(
    ("stop", "stopped"),
    [
        (TOKENS.end_of_mask, "end of mask"),
        (TOKENS.eot, "end of text"),
        (TOKENS.masks[1], "sentinel"),
        (TOKENS.separator, "sentinel"),
        (None, "length"),
    ],
)
def test_what_stops_a_fill(stop, stopped):
    [letter] = plain_ids(TOKENIZER, "x")

    def script(seen):
        written = len(seen) - len(infill_prompt(TOKENIZER, "a", "b"))
        return stop if stop is not None and written == 2 else letter

    calls = []
    fill = infill_batch(
        Scripted(script),
        TOKENIZER,
        [("a", "b")],
        max_new_tokens=5,
        progress=lambda done, total: calls.append((done, total)),
    )[0]
    assert (fill.text, fill.stopped) == ("xx" if stop is not None else "xxxxx", stopped)
    assert fill.ids == (letter,) * len(fill.text)
    assert calls == [(1, 1)]


def test_several_holes_are_filled_in_order_as_in_training():
    prompts = []

    def script(seen):
        at = seen.index(TOKENS.separator)
        asked = [token for token in seen[at:] if token in TOKENS.masks]
        written = len(seen) - 1 - (len(seen) - 1 - seen[::-1].index(asked[-1]))
        number = TOKENS.masks.index(asked[-1])
        ids = plain_ids(TOKENIZER, ["f", "(x)", "x + 1"][number])
        if written == 0:
            prompts.append(seen)
        return ids[written] if written < len(ids) else TOKENS.end_of_mask

    parts = ["def ", "", ":\n    return ", "\n"]
    fills = infill_holes(Scripted(script), TOKENIZER, parts)
    assert [fill.text for fill in fills] == ["f", "(x)", "x + 1"]
    holes = [plain_ids(TOKENIZER, text) for text in ("f", "(x)", "x + 1")]
    around = [plain_ids(TOKENIZER, text) for text in parts]
    expected = []
    for part, mask in zip(around, (*TOKENS.masks[:3], TOKENS.eot), strict=True):
        expected += [*part, mask]
    expected.append(TOKENS.separator)
    for number, hole in enumerate(holes):
        expected.append(TOKENS.masks[number])
        assert prompts[number] == expected
        expected += [*hole, TOKENS.end_of_mask]
    with pytest.raises(DataError, match="1 to 4 holes, got 6"):
        infill_holes(Scripted(script), TOKENIZER, ["x"] * 6)
    with pytest.raises(DataError, match="leaves room for"):
        infill_holes(Scripted(script, context=20), TOKENIZER, parts, max_new_tokens=10)


@pytest.mark.parametrize("layout", ["psm", "spm", "left-to-right"])
def test_layouts_of_one_hole_fill_several_one_after_the_other(layout):
    model = language_model()
    parts = ["def ", "(x", ":\n    return ", "\n"]
    fills = infill_holes(model, TOKENIZER, parts, layout=layout, max_new_tokens=5)
    before = parts[0]
    for number, fill in enumerate(fills):
        after = "".join(parts[number + 1 :])
        alone = infill(model, TOKENIZER, before, after, 5, layout=layout)
        # The tokens written are kept as they are, which need not be how their text is split.
        if plain_ids(TOKENIZER, before) == [
            token
            for part, done in zip(parts, [*fills[:number], None], strict=False)
            for token in [*plain_ids(TOKENIZER, part), *(done.ids if done else ())]
        ]:
            assert alone.ids == fill.ids
        before += fill.text + parts[number + 1]
    assert len(fills) == 3
    assert fills[0] == infill(model, TOKENIZER, "def ", "".join(parts[1:]), 5, layout=layout)


def test_one_of_several_holes_is_one_hole():
    model = language_model()
    triples = [("def f(", "x", "):"), ("def ", "f(x):\n    ret", "urn x")]
    texts = [((prefix, suffix), (middle,)) for prefix, middle, suffix in triples]
    for layout in LAYOUTS:
        for attention in ["causal"] + ["prefix"] * (layout in ("codegen2", "left-to-right")):
            options = {"layout": layout, "attention": attention}
            one = infill_losses(model, TOKENIZER, triples, **options)
            several = infill_holes_losses(model, TOKENIZER, texts, **options)
            np.testing.assert_allclose(several.sums, one.sums, rtol=1e-5)
            assert several.n_tokens.tolist() == one.n_tokens.tolist()
    prefix, _, suffix = triples[0]
    fill = infill(model, TOKENIZER, prefix, suffix, 6, attention="prefix")
    assert infill_holes(
        model, TOKENIZER, [prefix, suffix], max_new_tokens=6, attention="prefix"
    ) == [fill]


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_losses_of_several_holes_follow_the_training_layout(attention):
    """One pass over the sequence that training would write gives the same losses."""
    from bakeoff.decoding.codegen2 import prefix_lm_mask

    model = language_model()
    parts, middles = ("def ", "(x", ":\n    return ", "\n"), ("f", ", y)", "x + 1")
    pieces = [plain_ids(TOKENIZER, part) for part in parts]
    fills = [plain_ids(TOKENIZER, middle) for middle in middles]
    whole, spans = list(pieces[0]), []
    for fill, piece in zip(fills, pieces[1:], strict=True):
        spans.append((len(whole), len(whole) + len(fill)))
        whole += [*fill, *piece]
    written = corrupt_spans(whole, spans, TOKENS)
    at = written.index(TOKENS.separator) + 1
    segments = torch.tensor([[int(place < at) for place in range(len(written))]])
    mask = prefix_lm_mask(segments if attention == "prefix" else torch.zeros_like(segments))
    with torch.no_grad():
        table = model(torch.tensor([written]), attention_mask=mask).logits[0].double()
    table = table.log_softmax(-1)
    control = TOKENS.control
    inside = [place for place in range(at, len(written)) if written[place] not in control]
    expected = -sum(table[place - 1, written[place]].item() for place in inside)
    found = infill_holes_losses(model, TOKENIZER, [(parts, middles)], attention=attention)
    assert found.sums[0] == pytest.approx(expected, rel=1e-5)
    assert found.n_tokens[0] == sum(map(len, fills))


def test_long_texts_with_several_holes_lose_what_is_far_from_them():
    model = language_model()
    text = (("x + y " * 30, "(x):", " z" * 40), ("f", "return"))
    room = 40
    cut = infill_holes_losses(model, TOKENIZER, [text], max_tokens=room)
    first, between, last = (plain_ids(TOKENIZER, part) for part in text[0])
    fills = [plain_ids(TOKENIZER, middle) for middle in text[1]]
    left = room - sum(map(len, fills)) - len(between) - 8
    n_last = left // 2
    kept = first[len(first) - (left - n_last) :], last[:n_last]
    shorter = (tuple(TOKENIZER.decode(ids) for ids in (kept[0], between, kept[1])), text[1])
    assert [plain_ids(TOKENIZER, part) for part in shorter[0]] == [kept[0], between, kept[1]]
    whole = infill_holes_losses(model, TOKENIZER, [shorter])
    assert cut.sums[0] == pytest.approx(whole.sums[0], rel=1e-6)
    with pytest.raises(DataError, match="text 0: its holes leave no room in 12 tokens"):
        infill_holes_losses(model, TOKENIZER, [text], max_tokens=12)
    with pytest.raises(DataError, match="text 0 has 3 parts around 1 middles"):
        infill_holes_losses(model, TOKENIZER, [(text[0], ("f",))])
    with pytest.raises(DataError, match="2 texts or more"):
        infill_holes(model, TOKENIZER, ["x"])


def test_a_prefix_decoder_goes_on_from_what_it_read_in_both_directions():
    from bakeoff.decoding.codegen2 import prefix_lm_mask

    model = language_model()
    options = {"layout": "left-to-right", "attention": "prefix"}
    fills = infill_batch(
        model, TOKENIZER, [("def f(x", ""), ("", "x")], max_new_tokens=5, **options
    )
    for prefix, fill in (("def f(x", fills[0]), ("", fills[1])):
        ids = infill_prompt(TOKENIZER, prefix, "", layout="left-to-right")
        n_given, n_prompt = len(ids) - 1, len(ids)
        for _ in range(5):
            segments = torch.tensor([[int(place < n_given) for place in range(len(ids))]])
            with torch.no_grad():
                logits = model(torch.tensor([ids]), attention_mask=prefix_lm_mask(segments)).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in {TOKENS.eot, *TOKENS.control}:
                ids.pop()
                break
        assert ids[n_prompt:] == list(fill.ids)
    alone = infill(model, TOKENIZER, "", "x", 5, **options)
    assert alone.ids == fills[1].ids


# Generation ---------------------------------------------------------------------------------------


def test_left_to_right_is_plain_generate():
    model = language_model()
    ids = torch.tensor([plain_ids(TOKENIZER, "def f(x")])
    plain = model.generate(
        ids, max_new_tokens=20, do_sample=False, pad_token_id=TOKENS.eot, eos_token_id=None
    )[0, ids.shape[1] :].tolist()
    stops = {TOKENS.eot, *TOKENS.control}
    plain = plain[: next((i for i, token in enumerate(plain) if token in stops), None)]
    fill = infill(
        model, TOKENIZER, "def f(x", "never seen", max_new_tokens=20, layout="left-to-right"
    )
    assert list(fill.ids) == plain
    # Sampling: the same draws as generate with the same seed.
    torch.manual_seed(11)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 9, "max_new_tokens": 6}
    sampled = model.generate(ids, pad_token_id=TOKENS.eot, eos_token_id=[*stops], **options)
    sampled = [t for t in sampled[0, ids.shape[1] :].tolist() if t not in stops]
    state = torch.get_rng_state()
    fill = infill(model, TOKENIZER, "def f(x", layout="left-to-right", random_state=11, **options)
    assert list(fill.ids) == sampled
    assert torch.equal(torch.get_rng_state(), state)  # the caller's randomness is untouched


def test_fills_do_not_depend_on_batch_mates():
    model = language_model()
    pairs = [("def f(x", "return"), ("d", "x" * 20), ("def " * 5, ""), ("", "x + 1")]
    alone = [infill(model, TOKENIZER, *pair, max_new_tokens=12) for pair in pairs]
    together = infill_batch(model, TOKENIZER, pairs, max_new_tokens=12, batch_size=4)
    assert alone == together
    assert len({fill.ids for fill in alone}) > 1
    model.train()
    assert infill_batch(model, TOKENIZER, pairs, max_new_tokens=12, batch_size=2) == alone
    assert model.training


def test_a_prefix_model_reads_the_prompt_in_both_directions():
    from bakeoff.decoding.codegen2 import prefix_lm_mask

    model = language_model()
    pairs = [("def f(", "x):\n    return x"), ("d", "x")]
    fills = infill_batch(model, TOKENIZER, pairs, attention="prefix", max_new_tokens=8)
    causal = infill_batch(model, TOKENIZER, pairs, max_new_tokens=8)
    assert [fill.ids for fill in fills] != [fill.ids for fill in causal]
    triples = [(*pair[:1], "f(x", *pair[1:]) for pair in pairs]
    losses = infill_losses(model, TOKENIZER, triples, attention="prefix")
    for row, (pair, fill) in enumerate(zip(pairs, fills, strict=True)):
        prompt = infill_prompt(TOKENIZER, *pair)
        n_given = len(prompt) - 1

        def scores(ids, n_prefix=n_given):
            segments = torch.tensor([[int(place < n_prefix) for place in range(len(ids))]])
            with torch.no_grad():
                mask = prefix_lm_mask(segments)
                return model(torch.tensor([ids]), attention_mask=mask).logits[0].double()

        ids = list(prompt)
        stops = {TOKENS.eot, *TOKENS.control}
        for _ in range(8):  # by hand, without a cache
            ids.append(int(scores(ids)[-1].argmax()))
            if ids[-1] in stops:
                ids.pop()
                break
        assert list(fill.ids) == ids[len(prompt) :]
        middle = plain_ids(TOKENIZER, "f(x")
        table = scores([*prompt, *middle]).log_softmax(-1)
        expected = -sum(table[len(prompt) - 1 + n, token].item() for n, token in enumerate(middle))
        assert losses.sums[row] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="goes with layout='codegen2' or 'left-to-right'"):
        infill(model, TOKENIZER, "a", "b", 5, layout="psm", attention="prefix")


def test_a_language_model_brings_its_tokenizer():
    model = language_model()
    whole = LanguageModel(
        "tiny", model, TOKENIZER, Path("tiny"), hashlib.sha256(b"").hexdigest(), 128
    )
    assert infill(whole, None, "def f(", "x", max_new_tokens=5) == infill(
        model, TOKENIZER, "def f(", "x", max_new_tokens=5
    )


def test_healing_begins_with_the_characters_taken_back():
    model = language_model()
    prefix = "def f(x):\n    retu"
    forced = TOKENIZER.decode(plain_ids(TOKENIZER, prefix)[-1:])
    pairs = [(prefix, "x"), ("def f(x", "y")]
    healed = infill_batch(model, TOKENIZER, pairs, heal=True, max_new_tokens=10)
    for (text, suffix), fill in zip(pairs, healed, strict=True):
        ids = plain_ids(TOKENIZER, text)
        taken = TOKENIZER.decode(ids[-1:])
        assert TOKENIZER.decode(list(fill.ids)) == taken + fill.text
        # By hand: the best token among those that agree with what was taken back.
        prompt = torch.tensor([infill_prompt(TOKENIZER, TOKENIZER.decode(ids[:-1]), suffix)])
        with torch.no_grad():
            scores = model(prompt).logits[0, -1]
        fits = [
            token
            for token in range(len(TOKENIZER))
            if token not in {TOKENS.eot, *TOKENS.control}
            and (word := TOKENIZER.decode([token]))
            and (word.startswith(taken) or taken.startswith(word))
        ]
        assert fill.ids[0] == max(fits, key=lambda token: scores[token].item())
    assert forced
    assert infill(model, TOKENIZER, "", "x", heal=True, max_new_tokens=3) == infill(
        model, TOKENIZER, "", "x", max_new_tokens=3
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_a_loop_over_tokens(layout):
    model = language_model()
    triples = [("def f(", "x", "):"), ("def ", "f(x):\n    ret", "urn x"), ("a b", "c d", "")]
    found = infill_losses(model, TOKENIZER, triples, layout=layout)
    for row, (prefix, middle, suffix) in enumerate(triples):
        ids = infill_prompt(TOKENIZER, prefix, suffix, layout=layout)
        total = 0.0
        for token in plain_ids(TOKENIZER, middle):
            with torch.no_grad():
                total -= model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token]
            ids = [*ids, token]
        assert found.sums[row] == pytest.approx(float(total), rel=1e-5)
    # What follows the end of the mask changes nothing: the decoder is causal.
    shorter = infill_losses(model, TOKENIZER, triples, layout=layout, max_tokens=14)
    assert np.isfinite(shorter.sums).all()


def test_bad_arguments():
    model = language_model()
    with pytest.raises(DataError, match="do_sample=True needs random_state"):
        infill(model, TOKENIZER, "a", "b", do_sample=True)
    with pytest.raises(DataError, match="layout must be one of"):
        infill(model, TOKENIZER, "a", "b", layout="middle-out")
    with pytest.raises(DataError, match="no room for text"):
        infill(model, TOKENIZER, "a", "b", max_new_tokens=126)
    with pytest.raises(DataError, match="tokenizer may be None only"):
        infill(model, None, "a", "b")
    plain = tiny.tokenizer()
    with pytest.raises(DataError, match="lacks <sep>"):
        infill(model, plain, "the", "cat", max_new_tokens=5)
    with pytest.raises(DataError, match="byte-level"):
        infill(model, plain, "the", "cat", 5, layout="left-to-right", heal=True)
    with pytest.raises(DataError, match="lacks <fim_prefix>"):
        infill_prompt(plain, "a", "b", layout="psm")


# Trained ------------------------------------------------------------------------------------------


def test_training_teaches_to_fill_what_only_the_suffix_tells():
    """Documents repeat a random word: left to right the first one is a guess among 8."""
    words = list(range(10, 18))
    tokens = InfillTokens(eot=2, separator=60, end_of_mask=61, masks=(62, 63))

    def document(rng):
        word = int(rng.choice(words))
        return [5, word, 6, word, 7]

    def model():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            tiny.config(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=False)
        ).eval()

    rng = np.random.default_rng(0)
    rows = [document(rng) for _ in range(400)]
    test = [document(rng) for _ in range(40)]

    def accuracy(trained, prompt):
        right = 0
        for ids in test:
            with torch.no_grad():
                scores = trained(torch.tensor([prompt(ids)])).logits[0, -1]
            right += int(scores.argmax()) == ids[1]
        return right / len(test)

    options = {"steps": 400, "batch_size": 16, "learning_rate": 5e-3, "seed": 0}
    spans = SpanCorruption(tokens, p_causal=0.3, ratio=(0.2, 0.2), span_len=(1, 1), seed=0)
    mixed, causal = model(), model()
    train_decoder(mixed, spans, rows, **options)
    train_decoder(causal, SpanCorruption(tokens, p_causal=1.0), rows, **options)
    assert accuracy(mixed, lambda ids: [5, 62, 6, ids[3], 7, 2, 60, 62]) > 0.9
    assert accuracy(causal, lambda ids: [5]) < 0.5
    # And left to right it has lost nothing: the second word is known from the first.
    assert accuracy(mixed, lambda ids: [5, ids[1], 6]) > 0.9
    assert accuracy(causal, lambda ids: [5, ids[1], 6]) > 0.9
