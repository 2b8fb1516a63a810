"""Records of transformers models against transformers' own scores and a teacher-forced pass."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.models import tiny

from bakeoff.decoding.token_records import TextGenerator, TokenRecord, from_generate
from bakeoff.errors import DataError
from bakeoff.models import load_language_model
from bakeoff.models.loading import LanguageModel

PROMPTS = ["the cat sat on", "dog", "a red cat saw the dog and the tree", "under the mat ran a dog"]


def language_model(kind="llama", seed=0):
    """A random model that ends some answers early and others not at all."""
    import transformers

    torch.manual_seed(seed)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            initializer_factor=5.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        architecture = {"llama": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM"}[kind]
        config = tiny.config(kind, initializer_range=0.3)
        model = getattr(transformers, architecture)(config)
    model.eval().generation_config.eos_token_id = None
    # Random models do not end their answers, unless they happen upon what they do say.
    said = generated(model, tiny.tokenizer(), PROMPTS[0]).sequences[0].tolist()
    model.generation_config.eos_token_id = sorted({2, said[-8]})
    return model


def ends(model):
    return model.generation_config.eos_token_id


def generated(model, tokenizer, prompt, **options):
    batch = tokenizer(prompt, return_tensors="pt")
    return model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=12,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"do_sample": False, **options},
    )


def plain_text(model, tokenizer, prompt, **options):
    output = generated(model, tokenizer, prompt, **options)
    start = 1 if model.config.is_encoder_decoder else len(tokenizer(prompt)["input_ids"])
    return tokenizer.decode(output.sequences[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
def test_log_probabilities_are_those_of_transformers(kind):
    model, tokenizer = language_model(kind), tiny.tokenizer()
    records = TextGenerator(model, tokenizer, max_new_tokens=12, batch_size=3)(PROMPTS)
    ended = 0
    for prompt, record in zip(PROMPTS, records, strict=True):
        output = generated(model, tokenizer, prompt)
        expected = model.compute_transition_scores(
            output.sequences, output.scores, normalize_logits=True
        )[0].numpy()
        np.testing.assert_allclose(record.log_probs, expected, atol=1e-4)
        (other,) = from_generate(output, tokenizer, eos_token_id=ends(model))
        np.testing.assert_allclose(other.log_probs, expected, atol=1e-6)
        assert record.text == other.text == plain_text(model, tokenizer, prompt)
        ended += len(record.log_probs) < 12
    assert ended > 0  # padding and end tokens were met


def test_log_probabilities_are_those_of_a_teacher_forced_pass():
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    output = generated(model, tokenizer, PROMPTS[0])
    (record,) = TextGenerator(model, tokenizer, max_new_tokens=12)(PROMPTS[:1])
    ids = output.sequences[0]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids[None]).logits[0].double(), dim=-1)
    start = len(ids) - len(record.log_probs)
    expected = [log_probs[place - 1, ids[place]].item() for place in range(start, len(ids))]
    np.testing.assert_allclose(record.log_probs, expected, atol=1e-5)


def test_log_probabilities_are_raw_whatever_changes_the_choice():
    """Forbidden tokens, penalties and temperature change what is said, not what it is worth."""
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    options = {"repetition_penalty": 1.7, "bad_words_ids": [[30]], "no_repeat_ngram_size": 2}
    write = TextGenerator(model, tokenizer, max_new_tokens=12, **options)
    sample = TextGenerator(
        model,
        tokenizer,
        max_new_tokens=12,
        do_sample=True,
        temperature=2.0,
        top_k=5,
        random_state=4,
    )
    for generator in (write, sample):
        (record,) = generator(PROMPTS[:1])
        with torch.random.fork_rng():
            torch.manual_seed(4)
            settings = {k: v for k, v in generator.generation.items() if k != "max_new_tokens"}
            output = generated(model, tokenizer, PROMPTS[0], **settings)
        raw = model.compute_transition_scores(
            output.sequences, output.logits, normalize_logits=True
        )[0]
        np.testing.assert_allclose(record.log_probs, raw.numpy(), atol=2e-5)
        processed = model.compute_transition_scores(
            output.sequences, output.scores, normalize_logits=True
        )[0]
        assert np.abs(processed.numpy() - record.log_probs).max() > 0.01


def test_beams_are_read_through_their_indices():
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    output = generated(model, tokenizer, PROMPTS[2], num_beams=3, num_return_sequences=3)
    expected = model.compute_transition_scores(
        output.sequences, output.logits, output.beam_indices, normalize_logits=True
    ).numpy()
    records = from_generate(output, tokenizer, eos_token_id=ends(model))
    assert len({len(record.log_probs) for record in records}) >= 1
    for row, record in enumerate(records):
        n = len(record.log_probs)
        assert n == int((output.beam_indices[row] >= 0).sum())
        np.testing.assert_allclose(record.log_probs, expected[row, :n], atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_embeddings_are_means_of_the_last_layer(kind):
    model, tokenizer = language_model(kind), tiny.tokenizer()
    write = TextGenerator(model, tokenizer, embeddings=True, max_new_tokens=12, batch_size=4)
    scale = model.config.d_model**-0.5 if kind == "t5" and model.config.tie_word_embeddings else 1
    for prompt, record in zip(PROMPTS, write(PROMPTS), strict=True):
        output = generated(model, tokenizer, prompt, output_hidden_states=True)
        (expected,) = from_generate(output, tokenizer, eos_token_id=ends(model))
        np.testing.assert_allclose(record.embedding, expected.embedding * scale, atol=2e-5)
    states = output.decoder_hidden_states if kind == "t5" else output.hidden_states
    by_hand = np.mean([step[-1][0, -1].numpy() for step in states], axis=0)
    np.testing.assert_allclose(expected.embedding, by_hand, atol=1e-6)


def test_records_do_not_depend_on_the_batch():
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    together = TextGenerator(model, tokenizer, embeddings=True, max_new_tokens=12)(PROMPTS)
    apart = TextGenerator(model, tokenizer, embeddings=True, max_new_tokens=12, batch_size=1)(
        PROMPTS[::-1]
    )[::-1]
    for one, other in zip(together, apart, strict=True):
        assert one.text == other.text
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)
        np.testing.assert_allclose(one.embedding, other.embedding, atol=2e-5)
        assert one.cost == other.cost


def test_the_end_token_counts_and_padding_does_not():
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    model.generation_config.eos_token_id = list(range(2, 96))  # everything ends an answer
    for record in TextGenerator(model, tokenizer, max_new_tokens=12)(PROMPTS):
        assert len(record.log_probs) == 1
    model.generation_config.eos_token_id = None
    for record in TextGenerator(model, tokenizer, max_new_tokens=12)(PROMPTS):
        assert len(record.log_probs) == 12


def test_costs_count_operations():
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    (record,) = TextGenerator(model, tokenizer, max_new_tokens=3, eos_token_id=1)(PROMPTS[:1])
    n_parameters = sum(p.numel() for p in model.parameters())
    assert record.cost == 2 * n_parameters * (4 + len(record.log_probs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [10.0, 4.0, 1.0])
def test_probabilities_near_one_keep_their_resolution(dtype, gap):
    """bfloat16 has no number between 0.996 and 1, and float32 is coarse beside a logit of 60."""
    logits = torch.tensor([[60.0, 60 - gap, 58 - gap, -40.0]], dtype=dtype)
    output = SimpleNamespace(logits=(logits,), sequences=torch.tensor([[7, 0]]))
    (record,) = from_generate(output, tiny.tokenizer())
    expected = -math.log1p(math.exp(-gap) + math.exp(-gap - 2))
    assert record.log_probs[0] == pytest.approx(expected, rel=3e-3)


def test_the_model_is_left_as_it_was():
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    model.train()
    side = tokenizer.padding_side
    before = torch.random.get_rng_state()
    TextGenerator(model, tokenizer, embeddings=True, max_new_tokens=3)(PROMPTS)
    TextGenerator(model, tokenizer, max_new_tokens=3, do_sample=True, random_state=0)(PROMPTS)
    with pytest.raises(TypeError):
        TextGenerator(model, tokenizer, max_new_tokens="many")(PROMPTS)
    assert model.training
    assert tokenizer.padding_side == side
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model._forward_hooks
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_language_model_brings_its_tokenizer_and_progress_is_told(tmp_path):
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    bundle = LanguageModel("tiny", model, tokenizer, tmp_path, "0" * 64, 128)
    told = []
    records = TextGenerator(bundle, batch_size=3, max_new_tokens=4)(
        PROMPTS, progress=lambda *state: told.append(state)
    )
    assert told == [(3, 4), (4, 4)]
    plain = TextGenerator(model, tokenizer)(PROMPTS, max_new_tokens=4)
    assert [r.text for r in records] == [r.text for r in plain]


def test_chat_prompts_go_through_the_template():
    model, tokenizer = language_model("llama"), tiny.tokenizer()
    tokenizer.chat_template = "the {{ messages[0]['content'] }} sat"
    (record,) = TextGenerator(model, tokenizer, chat=True, max_new_tokens=5)(["cat"])
    (expected,) = TextGenerator(model, tokenizer, max_new_tokens=5)(["the cat sat"])
    assert (record.text, record.cost) == (expected.text, expected.cost)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: TextGenerator(m), "tokenizer is missing"),
        (lambda m, t: TextGenerator(t, t), "model must have generate"),
        (lambda m, t: TextGenerator(m, t, batch_size=0), "batch_size must be at least 1"),
        (lambda m, t: TextGenerator(m, t, num_beams=4), "num_beams must be 1, got 4"),
        (lambda m, t: TextGenerator(m, t)(["a"], num_return_sequences=2), "must be 1, got 2"),
        (lambda m, t: TextGenerator(m, t, stop_strings=["."]), "stop_strings is not offered"),
        (lambda m, t: TextGenerator(m, t, do_sample=True), "needs TextGenerator.*random_state"),
        (lambda m, t: TextGenerator(m, t)([""]), "prompt 0 has no tokens"),
        (lambda m, t: TextGenerator(m, t)(["a", 3]), "prompt 1 must be a text, got int"),
        (
            lambda m, t: from_generate(
                m.generate(torch.ones(1, 2, dtype=int), max_new_tokens=1), t
            ),
            "call generate with return_dict_in_generate",
        ),
    ],
)
def test_what_is_not_offered_is_refused_by_name(call, message):
    with pytest.raises(DataError, match=message):
        call(language_model("llama"), tiny.tokenizer())


def test_a_record_takes_what_rounding_made_positive():
    assert TokenRecord(np.array([1e-6, -1.0])).log_probs.tolist() == [0.0, -1.0]
    assert math.isnan(TokenRecord(np.zeros(1)).cost)


@pytest.mark.model
def test_a_real_model_gives_the_same_as_generate():
    bundle = load_language_model("smollm2-135m")
    prompts = ["The capital of France is", "One, two, three,"]
    records = TextGenerator(bundle, max_new_tokens=6, batch_size=1)(prompts)
    padded = TextGenerator(bundle, max_new_tokens=6, batch_size=2)(prompts)
    for one, other in zip(records, padded, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-3)
    for prompt, record in zip(prompts, records, strict=True):
        batch = bundle.tokenizer(prompt, return_tensors="pt")
        output = bundle.model.generate(
            **batch,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=bundle.tokenizer.pad_token_id,
        )
        # compute_transition_scores adds up 49,152 probabilities one by one in float32: 2e-4 off.
        logits = torch.cat(output.logits).double()
        chosen = output.sequences[0, -len(logits) :]
        expected = torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None])[:, 0].numpy()
        np.testing.assert_allclose(record.log_probs, expected[: len(record.log_probs)], atol=2e-5)
        n_prompt = batch["input_ids"].shape[1]
        assert record.text == bundle.tokenizer.decode(
            output.sequences[0, n_prompt:], skip_special_tokens=True
        )
