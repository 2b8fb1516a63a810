from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny

from bakeoff.errors import DataError, ModelError
from bakeoff.models.attention import bidirectional, make_bidirectional
from bakeoff.models.states import _HOOKS_AGREE, hidden_states, tokenize

TEXTS = [
    "the cat sat on a mat",
    "dog",
    "the red dog ran under the tree and saw the cat",
    "a mat",
    "the cat sat on a mat",
    "cat cat cat cat cat cat cat cat cat cat cat cat cat cat cat",
]


@torch.no_grad()
def oracle(base, ids: list[int], attention: str, n_prefix: int = 0) -> dict[str, torch.Tensor]:
    """One text, alone and unpadded, with everything transformers reports."""
    from contextlib import nullcontext

    block = bidirectional(base.model) if attention == "bidirectional" else nullcontext()
    with block:
        output = base.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    states = torch.stack([state[0] for state in output.hidden_states])
    assert torch.equal(states[-1], output.last_hidden_state[0])  # that is, after the final norm
    return {
        "means": states[:, n_prefix:].mean(1),
        "lasts": states[:, -1],
        "tokens": output.last_hidden_state[0, n_prefix:],
    }


def by_text(base, texts, **options) -> list[dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for batch in hidden_states(base, texts, **options):
        for row, index in enumerate(batch.indices.tolist()):
            span = slice(batch.offsets[row], batch.offsets[row + 1])
            assert index not in found
            found[index] = {
                "means": batch.layer_means[row],
                "lasts": batch.layer_lasts[row],
                "tokens": batch.tokens[span],
                "ids": batch.token_ids[span],
                "truncated": batch.truncated[row],
            }
    assert sorted(found) == list(range(len(texts)))
    return [found[i] for i in range(len(texts))]


def assert_same(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_equals_what_transformers_reports_for_each_text_alone(name, attention):
    base = tiny.base(name, "eager" if name == "gemma2" else "sdpa")
    for text, found in zip(TEXTS, by_text(base, TEXTS, attention=attention), strict=True):
        ids = base.tokenizer(text)["input_ids"]
        assert found["ids"].tolist() == ids
        assert_same(found, oracle(base, ids, attention))


LLAMA = tiny.base()
SENTENCES = st.lists(
    st.lists(st.sampled_from(tiny.WORDS), max_size=14).map(" ".join), min_size=0, max_size=9
)


@settings(max_examples=40, deadline=None)
@given(texts=SENTENCES, batch_tokens=st.integers(1, 60), both=st.booleans())
def test_neither_batch_mates_nor_budget_nor_order_matter(texts, batch_tokens, both):
    attention = "bidirectional" if both else "causal"
    found = by_text(LLAMA, texts, attention=attention, batch_tokens=batch_tokens)
    for text, result in zip(texts, found, strict=True):
        ids = LLAMA.tokenizer(text)["input_ids"] or [LLAMA.tokenizer.eos_token_id]
        assert result["ids"].tolist() == ids
        assert_same(result, oracle(LLAMA, ids, attention))


@settings(max_examples=40, deadline=None)
@given(texts=SENTENCES, batch_tokens=st.integers(1, 60))
def test_batches_keep_the_budget_and_waste_little(texts, batch_tokens):
    previous = np.inf
    for batch in hidden_states(LLAMA, texts, batch_tokens=batch_tokens):
        lengths = np.diff(batch.offsets)
        assert len(lengths) == 1 or len(lengths) * lengths.max() <= batch_tokens
        assert lengths.max() <= previous
        previous = lengths.min()


@pytest.mark.parametrize("eos", [False, True])
def test_truncation_is_counted_and_keeps_an_appended_end_of_text_token(eos):
    base = tiny.base(eos=eos)
    texts = ["cat " * 6, "cat " * 5, "dog cat " * 50]
    limit = 6
    found = by_text(base, texts, max_length=limit)
    assert [bool(f["truncated"]) for f in found] == [eos, False, True]
    for result in found:
        assert len(result["ids"]) <= limit
        assert result["ids"].tolist().count(2) == int(eos)
        assert (result["ids"][-1].item() == 2) == eos
    kept = base.tokenizer("dog cat dog cat dog" + ("" if eos else " cat"))["input_ids"]
    assert found[2]["ids"].tolist() == kept
    assert_same(found[2], oracle(base, kept, "causal"))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("eos", [False, True])
def test_prefix_tokens_are_attended_to_but_not_kept(eos, attention):
    base = tiny.base(eos=eos)
    prefixes = ["", "the red ", "saw under on ", "a ", "", "the "]
    found = by_text(base, TEXTS, attention=attention, prefixes=prefixes, batch_tokens=30)
    for text, prefix, result in zip(TEXTS, prefixes, found, strict=True):
        ids = base.tokenizer(prefix + text)["input_ids"]
        n_prefix = len(prefix.split())
        assert result["ids"].tolist() == ids[n_prefix:]
        assert_same(result, oracle(base, ids, attention, n_prefix))
    shared = by_text(base, TEXTS, attention=attention, prefixes="the ")
    assert_same(shared[5], {k: found[5][k] for k in ("means", "lasts", "tokens")})


def test_texts_without_tokens_stand_as_an_end_of_text_token():
    for eos, prefix, expected, n_prefix in [
        (False, None, [2], 0),
        (True, None, [2], 0),
        (False, "the ", [4, 2], 1),
        (True, "the ", [4, 2], 1),
    ]:
        base = tiny.base(eos=eos)
        for text in ("", "  \n"):
            (result,) = by_text(base, [text], prefixes=prefix)
            assert result["ids"].tolist() == [2]
            assert_same(result, oracle(base, expected, "causal", n_prefix))
    base = tiny.base()
    base.tokenizer.eos_token = base.tokenizer.pad_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        hidden_states(base, [""])


def test_a_prefix_must_leave_room():
    base = tiny.base()
    for text in ("cat cat", ""):
        with pytest.raises(DataError, match="text 1 takes up all 2 tokens"):
            hidden_states(base, ["dog", text], prefixes=["", "the red "], max_length=2)
    assert len(by_text(base, ["cat cat"], prefixes="the ", max_length=2)[0]["ids"]) == 1


def test_layers_can_be_selected():
    base = tiny.base()
    every = by_text(base, TEXTS)
    some = by_text(base, TEXTS, layers=[3, 0, -1])
    for full, selected in zip(every, some, strict=True):
        for name in ("means", "lasts"):
            torch.testing.assert_close(selected[name], full[name][[3, 0, 4]])
        torch.testing.assert_close(selected["tokens"], full["tokens"])


def encoder(name: str, **extra):
    import transformers

    shape = {k: tiny.SHAPE[k] for k in ("vocab_size", "hidden_size", "intermediate_size")}
    config = getattr(transformers, f"{name}Config")(
        **shape, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0, **extra
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    return dataclasses.replace(tiny.base(), model=model, num_layers=3, is_decoder=False)


@pytest.mark.parametrize(("name", "by_hooks"), [("Bert", True), ("Albert", False)])
def test_encoders_are_read_as_they_are(name, by_hooks):
    base = encoder(name)
    for text, found in zip(TEXTS, by_text(base, TEXTS, attention="bidirectional"), strict=True):
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = torch.cat(base.model(input_ids=ids, output_hidden_states=True).hidden_states)
        assert_same(found, {"means": states.mean(1), "lasts": states[:, -1], "tokens": states[-1]})
    # ALBERT runs one layer three times, so hooks on a list of layers cannot tell its states apart.
    assert _HOOKS_AGREE[base.model] is by_hooks
    with pytest.raises(ModelError, match="no causal mask"):
        hidden_states(base, TEXTS, attention="causal")


def test_the_model_is_left_as_it_was_even_by_a_half_consumed_iteration():
    base = tiny.base()
    iterator = hidden_states(base, TEXTS, attention="bidirectional", batch_tokens=16)
    batch = next(iterator)
    assert not batch.layer_means.requires_grad
    iterator.close()
    assert getattr(base.model.config, "is_causal", True)
    hooks = [h for m in base.model.layers for h in m._forward_pre_hooks.values()]
    assert hooks == []
    assert base.model.embed_tokens.weight.requires_grad
    assert torch.is_grad_enabled()


def test_a_lastingly_bidirectional_model_is_not_passed_off_as_causal():
    base = tiny.base()
    expected = by_text(base, TEXTS, attention="bidirectional")
    make_bidirectional(base.model)
    with pytest.raises(ModelError, match="made bidirectional"):
        hidden_states(base, TEXTS, attention="causal")
    for a, b in zip(by_text(base, TEXTS, attention="bidirectional"), expected, strict=True):
        assert_same(a, {k: b[k] for k in ("means", "lasts", "tokens")})


def test_half_precision_is_reduced_in_single():
    exact, rough = tiny.base(), tiny.base()
    rough.model.to(torch.bfloat16)
    for a, b in zip(by_text(exact, TEXTS), by_text(rough, TEXTS), strict=True):
        assert b["means"].dtype == torch.float32
        torch.testing.assert_close(a["means"], b["means"], atol=0.3, rtol=0.1)
        state = b["tokens"].mean(0)  # the mean of bfloat16 states is not a bfloat16 number
        torch.testing.assert_close(b["means"][-1], state, atol=1e-5, rtol=1e-5)


def test_overflow_is_an_error_not_a_feature():
    base = tiny.base()
    base.model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(ModelError, match="infinite or undefined"):
        list(hidden_states(base, TEXTS))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": "one string"}, TypeError, "texts must be a sequence"),
        ({"texts": ["a", None]}, TypeError, r"texts\[1\] must be a string, got NoneType"),
        ({"attention": "sideways"}, ValueError, "attention must be .*'sideways'"),
        ({"max_length": 0}, ValueError, "max_length must be between 1 and 128 .*got 0"),
        ({"max_length": 129}, ValueError, "max_length must be between 1 and 128 .*got 129"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be at least 1, got 0"),
        ({"layers": [5]}, ValueError, r"layers must be .*\[-5, 4\].*got 5"),
        ({"layers": ["last"]}, ValueError, "got 'last'"),
        ({"prefixes": ["a"]}, ValueError, "prefixes: 1 given for 6 texts"),
    ],
)
def test_bad_arguments_are_named_at_once(options, error, message):
    with pytest.raises(error, match=message):
        hidden_states(LLAMA, **{"texts": TEXTS, **options})


def test_no_texts_no_batches():
    assert list(hidden_states(LLAMA, [])) == []
    assert tokenize(LLAMA, []) == []


@pytest.mark.model
def test_smollm2_states_do_not_depend_on_batch_mates():
    from bakeoff.models import load

    base = load("smollm2-135m")
    texts = ["Return the sum of a list.", "A cat.", "Open a file and read every line of it. " * 3]
    for attention in ("causal", "bidirectional"):
        for text, found in zip(texts, by_text(base, texts, attention=attention), strict=True):
            expected = oracle(base, base.tokenizer(text)["input_ids"], attention)
            for name, value in expected.items():
                # A few of its coordinates are in the thousands: 1e-5 of the largest one.
                scale = value.abs().max()
                torch.testing.assert_close(found[name] / scale, value / scale, atol=1e-5, rtol=0)
